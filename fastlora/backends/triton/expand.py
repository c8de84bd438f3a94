"""The up-projection: scale · h bᵀ written once, with everything that may follow it: mask, column factor, bias."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastlora.backends.triton.launch import Target, Tile, cdiv, entry, launch, target
from fastlora.backends.triton.primitives import cast, dot, offsets
from fastlora.backends.triton.shrink import keep, load_bits, precision, rank_block, ratio, round_tf32, stacked
from fastlora.backends.triton.weight import wide as is_wide


@triton.jit
def low_rank_tile(
    h_ptr,
    b_ptr,
    rows,
    cols,
    m,
    n,
    r,
    dtype: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    R: tl.constexpr,
    PART: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
):
    """(h bᵀ)[rows, cols] in fp32; b is stored [n,r], or [r,n], h as `shrink.stacked` says.

    For a bf16 result both are rounded to bf16 once.
    """
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, R, BLOCK_K):
        ranks = start + tl.arange(0, BLOCK_K)
        # [BLOCK_M, BLOCK_K]
        inside = (rows < m)[:, None] & (ranks < r)[None, :]
        h = tl.load(h_ptr + stacked(rows, ranks, m, r, PART, WIDE), mask=inside, other=0.0)
        if TRANSPOSED:
            # [BLOCK_K, BLOCK_N]
            inside = (ranks < r)[:, None] & (cols < n)[None, :]
            b = tl.load(b_ptr + offsets(ranks, n, cols, WIDE), mask=inside, other=0.0).to(tl.float32)
        else:
            # [BLOCK_N, BLOCK_K]
            inside = (cols < n)[:, None] & (ranks < r)[None, :]
            b = tl.trans(tl.load(b_ptr + offsets(cols, r, ranks, WIDE), mask=inside, other=0.0).to(tl.float32))
        if dtype == tl.bfloat16:
            acc = dot(cast(h, tl.bfloat16), cast(b, tl.bfloat16), acc, PRECISION)
        elif PRECISION == "tf32":
            acc = dot(round_tf32(h), round_tf32(b), acc, PRECISION)
        else:
            acc = dot(h, b, acc, PRECISION)
    return acc


@entry
def _expand_kernel(
    h_ptr,
    b_ptr,
    out_ptr,
    bits_ptr,
    bias_ptr,
    mag_ptr,
    norm_ptr,
    m,
    n,
    r,
    factor,
    TRANSPOSED: tl.constexpr,
    R: tl.constexpr,
    PART: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
):
    """out[i,j] = round(factor mask[i,j] c[j] Σ_l h[i,l] b[j,l] + bias[j]); c = mag / norm or 1."""
    pid = tl.program_id(0)
    blocks = tl.cdiv(n, BLOCK_N)
    block_n = pid % blocks
    rows = (pid // blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    acc = low_rank_tile(
        h_ptr, b_ptr, rows, cols, m, n, r, dtype, TRANSPOSED, R, PART, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION, WIDE
    )
    acc = acc * factor
    if mag_ptr is not None:
        acc = acc * ratio(mag_ptr, norm_ptr, cols, n)[None, :]
    if bits_ptr is not None:
        groups = block_n * (BLOCK_N // 8) + tl.arange(0, BLOCK_N // 8)
        acc = keep(acc, load_bits(bits_ptr, rows, groups, m, (n + 7) // 8, WIDE), BLOCK_M, BLOCK_N)
    if bias_ptr is not None:
        # [BLOCK_N]
        acc = acc + tl.load(bias_ptr + cols, mask=cols < n, other=0.0).to(tl.float32)[None, :]
    inside = (rows < m)[:, None] & (cols < n)[None, :]
    tl.store(out_ptr + offsets(rows, n, cols, WIDE), cast(acc, dtype), mask=inside)


def tile_expand(target: Target, m: int, r: int, dtype: torch.dtype) -> Tile:
    """BLOCK_M by BLOCK_N outputs a program, BLOCK_K ranks at a time."""
    if target.kind == "interpreter":
        return Tile(BLOCK_M=16, BLOCK_N=32, BLOCK_K=16, num_warps=4, num_stages=1)
    rank = rank_block(r)
    old = target.kind == "cuda" and target.arch < 90  # products keep their operands in registers
    block_k = min(rank, 32 if dtype != torch.bfloat16 or target.kind == "hip" or old else 64)
    if old and dtype == torch.float32:  # three tf32 terms of each operand
        block_k = 16
    if m <= 32:
        return Tile(BLOCK_M=16 if m <= 16 else 32, BLOCK_N=128, BLOCK_K=block_k, num_warps=4, num_stages=2)
    if rank <= 32:
        return Tile(BLOCK_M=64, BLOCK_N=128, BLOCK_K=block_k, num_warps=4, num_stages=2)
    if old and dtype == torch.float32:
        return Tile(BLOCK_M=64, BLOCK_N=128, BLOCK_K=block_k, num_warps=8, num_stages=2)
    return Tile(BLOCK_M=128, BLOCK_N=128, BLOCK_K=block_k, num_warps=8, num_stages=2)


def expand(
    h: Tensor,
    b: Tensor,
    scale: float,
    dtype: torch.dtype,
    *,
    transposed: bool = False,
    bits: Tensor | None = None,
    factor: float = 1.0,
    bias: Tensor | None = None,
    mag: Tensor | None = None,
    norm: Tensor | None = None,
    part: int | None = None,
    wide: bool | None = None,
) -> Tensor:
    """out = scale · factor · mask∘(c ⊙ (h bᵀ)) + bias, rounded once to `dtype`; one write.

    Args:
        h: fp32 [m, r] contiguous, or with `part` [r / part, m, part].
        b: [n, r] contiguous, or [r, n] where `transposed` (a's layout), any float dtype.
        bits: keep mask uint8 [m, ceil(n/8)] or None; mag, norm: [n], c = mag / norm per column, or None.
        bias: [n] of any float dtype or None; wide: force 64-bit offsets on or off.

    Returns:
        [m, n] of `dtype`.
    """
    m, r = h.shape[-2], b.shape[0 if transposed else 1]
    n = b.shape[1 if transposed else 0]
    out = torch.empty((m, n), dtype=dtype, device=h.device)
    device = target(h.device)
    tile = tile_expand(device, m, r, dtype)
    launch(
        _expand_kernel,
        (cdiv(m, tile.BLOCK_M) * cdiv(n, tile.BLOCK_N),),
        h,
        b,
        out,
        bits,
        bias,
        mag,
        norm,
        m,
        n,
        r,
        float(scale * factor),
        TRANSPOSED=transposed,
        R=rank_block(r),
        PART=part or 0,
        BLOCK_M=tile.BLOCK_M,
        BLOCK_N=tile.BLOCK_N,
        BLOCK_K=tile.BLOCK_K,
        PRECISION=precision(device, dtype),
        WIDE=is_wide(h, b, out) if wide is None else wide,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    return out
