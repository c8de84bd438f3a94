"""Elementwise passes over outputs and inputs: DoRA's column factor, its own dropout's composition, masks."""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from fastlora.backends.triton.expand import low_rank_tile, tile_expand
from fastlora.backends.triton.launch import Target, Tile, cdiv, entry, launch, target
from fastlora.backends.triton.primitives import cast, draw_bits, offsets
from fastlora.backends.triton.shrink import Dropout, keep, load_bits, precision, rank_block, ratio
from fastlora.backends.triton.weight import wide as is_wide


@entry
def _columns_kernel(
    z_ptr,
    out_ptr,
    mag_ptr,
    norm_ptr,
    bias_ptr,
    m,
    n,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WIDE: tl.constexpr,
):
    """out[i,j] = round(c[j] z[i,j] + bias[j]); c = mag / norm or 1."""
    pid = tl.program_id(0)
    blocks = tl.cdiv(n, BLOCK_N)
    rows = (pid // blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = (pid % blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = (rows < m)[:, None] & (cols < n)[None, :]
    where = offsets(rows, n, cols, WIDE)
    # [BLOCK_M, BLOCK_N]
    value = tl.load(z_ptr + where, mask=inside, other=0.0).to(tl.float32)
    if mag_ptr is not None:
        value = value * ratio(mag_ptr, norm_ptr, cols, n)[None, :]
    if bias_ptr is not None:
        # [BLOCK_N]
        value = value + tl.load(bias_ptr + cols, mask=cols < n, other=0.0).to(tl.float32)[None, :]
    tl.store(out_ptr + where, cast(value, out_ptr.dtype.element_ty), mask=inside)


@entry
def _mask_kernel(
    t_ptr,
    out_ptr,
    bits_ptr,
    seed_ptr,
    m,
    n,
    stream,
    threshold,
    factor,
    SCALED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WIDE: tl.constexpr,
):
    """out[i,j] = mask[i,j] t[i,j], times factor (rounded once) if SCALED; the mask is read from bits, or drawn."""
    pid = tl.program_id(0)
    blocks = tl.cdiv(n, BLOCK_N)
    rows = (pid // blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = (pid % blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    groups = (pid % blocks) * (BLOCK_N // 8) + tl.arange(0, BLOCK_N // 8)
    inside = (rows < m)[:, None] & (cols < n)[None, :]
    where = offsets(rows, n, cols, WIDE)
    # [BLOCK_M, BLOCK_N]
    value = tl.load(t_ptr + where, mask=inside, other=0.0)
    if bits_ptr is not None:
        bits = load_bits(bits_ptr, rows, groups, m, (n + 7) // 8, WIDE)
    else:
        bits = draw_bits(seed_ptr, stream, threshold, rows, groups, n)
    if SCALED:
        value = cast(value.to(tl.float32) * factor, value.dtype)
    tl.store(out_ptr + where, keep(value, bits, BLOCK_M, BLOCK_N), mask=inside)


@entry
def _compose_kernel(
    u_ptr,
    v_ptr,
    h_ptr,
    b_ptr,
    mag_ptr,
    norm_ptr,
    bias_ptr,
    m,
    n,
    r,
    scale,
    dscale,
    NEED_Z: tl.constexpr,
    R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
):
    """With e = scale Σ_l h[i,l] b[j,l], f = dscale v[i,j] and c = mag / norm, rounded once each:

    u[i,j] <- u[i,j] + (c[j]-1) f + c[j] e + bias[j]      v[i,j] <- f + e (if NEED_Z)
    """
    pid = tl.program_id(0)
    blocks = tl.cdiv(n, BLOCK_N)
    rows = (pid // blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = (pid % blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = (rows < m)[:, None] & (cols < n)[None, :]
    where = offsets(rows, n, cols, WIDE)
    dtype: tl.constexpr = u_ptr.dtype.element_ty
    delta = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if h_ptr is not None:
        delta = scale * low_rank_tile(
            h_ptr, b_ptr, rows, cols, m, n, r, dtype, False, R, 0, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION, WIDE
        )
    c = ratio(mag_ptr, norm_ptr, cols, n)[None, :]
    # [BLOCK_M, BLOCK_N]
    dropped = dscale * tl.load(v_ptr + where, mask=inside, other=0.0).to(tl.float32)
    y = tl.load(u_ptr + where, mask=inside, other=0.0).to(tl.float32) + (c - 1.0) * dropped + c * delta
    if bias_ptr is not None:
        # [BLOCK_N]
        y = y + tl.load(bias_ptr + cols, mask=cols < n, other=0.0).to(tl.float32)[None, :]
    tl.store(u_ptr + where, cast(y, dtype), mask=inside)
    if NEED_Z:
        tl.store(v_ptr + where, cast(dropped + delta, dtype), mask=inside)


def tile_columns(target: Target, m: int) -> Tile:
    """BLOCK_M by BLOCK_N elements a program: many rows share a column's factor, unless there are few."""
    if target.kind == "interpreter":
        return Tile(BLOCK_M=16, BLOCK_N=32, num_warps=4, num_stages=1)
    return Tile(BLOCK_M=32 if m > 256 else 4, BLOCK_N=256, num_warps=4, num_stages=1)


def tile_compose(target: Target, m: int, r: int, dtype: torch.dtype) -> Tile:
    """As `tile_expand`, with fewer rows: four tensors pass through registers here."""
    tile = tile_expand(target, m, r, dtype)
    if target.kind == "interpreter":
        return tile
    # As many columns as threads: the compiler then divides once for each column, not once for each thread's copy.
    return tile._replace(BLOCK_M=min(tile.BLOCK_M, 32 if rank_block(r) <= 64 else 16), num_warps=4)


def _grid(tile: Tile, m: int, n: int) -> tuple[int]:
    return (cdiv(m, tile.BLOCK_M) * cdiv(n, tile.BLOCK_N),)


def columns(
    z: Tensor,
    mag: Tensor | None,
    norm: Tensor | None,
    bias: Tensor | None,
    *,
    out: Tensor | None = None,
    wide: bool | None = None,
) -> Tensor:
    """y = (mag/norm)∘z + bias, rounded once to z's dtype; [m, n]. `out` may be z itself; no mag: c = 1."""
    m, n = z.shape
    out = torch.empty_like(z) if out is None else out
    tile = tile_columns(target(z.device), m)
    launch(
        _columns_kernel,
        _grid(tile, m, n),
        z,
        out,
        mag,
        norm,
        bias,
        m,
        n,
        BLOCK_M=tile.BLOCK_M,
        BLOCK_N=tile.BLOCK_N,
        WIDE=is_wide(z) if wide is None else wide,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    return out


def _masked(t: Tensor, decision: Tensor | Dropout, factor: float | None, out: Tensor, wide: bool | None) -> Tensor:
    m, n = t.shape
    bits = decision.bits if isinstance(decision, Dropout) else decision
    drawn = decision if isinstance(decision, Dropout) and bits is None else None
    tile = tile_columns(target(t.device), m)
    launch(
        _mask_kernel,
        _grid(tile, m, n),
        t,
        out,
        bits,
        None if drawn is None else drawn.seed,
        m,
        n,
        0 if drawn is None else drawn.stream,
        0 if drawn is None else drawn.threshold,
        1.0 if factor is None else factor,
        SCALED=factor is not None,
        BLOCK_M=tile.BLOCK_M,
        BLOCK_N=tile.BLOCK_N,
        WIDE=is_wide(t) if wide is None else wide,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        fp_fusion=False,
    )
    return out


def mask_rows(x: Tensor, bits: Tensor | Dropout, *, wide: bool | None = None) -> Tensor:
    """mask∘x, unscaled, bit for bit; x [m, k]. `bits`: uint8 [m, ceil(k/8)], or a Dropout to read or draw them from."""
    return _masked(x, bits, None, torch.empty_like(x), wide)


def masked_add(t: Tensor, bits: Tensor | Dropout, dscale: float, out: Tensor, *, wide: bool | None = None) -> Tensor:
    """out = dscale · mask∘t, rounded once to t's dtype: the masked term a base product is then added to.

    `out` may be t itself; `bits` as in `mask_rows`.
    """
    return _masked(t, bits, dscale, out, wide)


def compose(
    u: Tensor,
    v: Tensor,
    h: Tensor,
    b: Tensor,
    scale: float,
    mag: Tensor,
    norm: Tensor,
    bias: Tensor | None,
    dscale: float,
    *,
    need_z: bool,
    wide: bool | None = None,
) -> tuple[Tensor, Tensor | None]:
    """DoRA with PEFT's dropout. With c = mag/norm, written over u and (where need_z) over v, rounded once each:

        y = u + (c-1)∘(dscale v) + c∘(scale h bᵀ) + bias     z = dscale v + scale h bᵀ

    Args:
        u: x wᵀ [m, n]; v: (mask∘x) wᵀ [m, n], of u's dtype; both contiguous.
        h: fp32 [m, r]; b: [n, r], any float dtype; mag, norm: [n]; bias: [n] or None. r = 0: no adapter.

    Returns:
        y (u) and z (v), or None for z.
    """
    (m, n), r = u.shape, b.shape[1]
    device = target(u.device)
    tile = tile_compose(device, m, r, u.dtype)
    launch(
        _compose_kernel,
        _grid(tile, m, n),
        u,
        v,
        h if r else None,
        b if r else None,
        mag,
        norm,
        bias,
        m,
        n,
        r,
        float(scale),
        float(dscale),
        NEED_Z=need_z,
        R=rank_block(r),
        BLOCK_M=tile.BLOCK_M,
        BLOCK_N=tile.BLOCK_N,
        BLOCK_K=tile.BLOCK_K,
        PRECISION=precision(device, u.dtype),
        WIDE=is_wide(u, v, h, b) if wide is None else wide,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    return u, v if need_z else None
