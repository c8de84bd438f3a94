"""The "dense" plan: one own matrix product over a dense (or once decoded) weight, everything else in its epilogue.

    linear      y = c ∘ (x wᵀ + s h bᵀ) + bias        x[m,k] w[n,k] h[m,r] b[n,r], c = mag / norm
    linear_dx   dx = (c ∘ dy) w + s mask ∘ (g a)      dy[m,n] g[m,r] a[r,k]

A program walks over output tiles (as many programs as multiprocessors where loads are asynchronous copies by
descriptor), in groups of rows so that tiles in flight share their operands in the second-level cache. The adapter's
product lands on the accumulator of the base product: y is rounded once. h, b, g and a are rounded to the type of x
just before their product.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from fastlora.backends.triton import weight as weights
from fastlora.backends.triton.dense_tiles import tile_linear
from fastlora.backends.triton.launch import PRECISE_RANK, Target, cdiv, entry, launch, next_power_of_2, target
from fastlora.backends.triton.primitives import cast, dot, expand_bits, offsets

GROUP = 8  # row blocks walked together
RANK_STEP = 32  # columns of h multiplied at a time


# --- device functions -------------------------------------------------------------------------------------------------


@triton.jit
def grouped(index, down, across, GROUP: tl.constexpr):
    """Tile `index` of a grid of down x across tiles, GROUP rows at a time: (row, column)."""
    group = index // (GROUP * across)
    first = group * GROUP
    height = tl.minimum(down - first, GROUP)
    inner = index % (GROUP * across)
    return first + inner % height, inner // height


@triton.jit
def load_block(
    source, row, col, height, width, ROWS: tl.constexpr, COLS: tl.constexpr, TMA: tl.constexpr, WIDE: tl.constexpr
):
    """source[row : row + ROWS, col : col + COLS] of a contiguous [height, width] matrix; 0 outside."""
    if TMA:
        return source.load([row, col])
    else:
        rows = row + tl.arange(0, ROWS)
        cols = col + tl.arange(0, COLS)
        inside = (rows < height)[:, None] & (cols < width)[None, :]
        # [ROWS, COLS]
        return tl.load(source + offsets(rows, width, cols, WIDE), mask=inside, other=0.0)


@triton.jit
def store_block(
    out,
    value,
    row,
    col,
    height,
    width,
    DTYPE: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    TMA: tl.constexpr,
    WIDE: tl.constexpr,
):
    """out[row : row + ROWS, col : col + COLS] = value rounded to DTYPE, inside the [height, width] matrix only."""
    if TMA:
        out.store([row, col], cast(value, DTYPE))
    else:
        rows = row + tl.arange(0, ROWS)
        cols = col + tl.arange(0, COLS)
        inside = (rows < height)[:, None] & (cols < width)[None, :]
        tl.store(out + offsets(rows, width, cols, WIDE), cast(value, DTYPE), mask=inside)


@triton.jit
def low_rank(
    acc,
    u_ptr,
    v_ptr,
    row,
    col,
    m,
    c,
    r,
    factor,
    DTYPE: tl.constexpr,
    V_BY_RANK: tl.constexpr,
    TWO_TERMS: tl.constexpr,
    R: tl.constexpr,
    STEPS: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
):
    """acc + factor u vᵀ for u [m,r] and v [c,r] (V_BY_RANK: v [r,c] as it is), both rounded to DTYPE.

    TWO_TERMS: each as the sum of two DTYPE terms, the product of the two small ones left out.
    """
    rows = row + tl.arange(0, ROWS)
    cols = col + tl.arange(0, COLS)
    # One buffer is enough: a longer pipeline would take shared memory from the base product's.
    for first in tl.range(0, STEPS * R, R, num_stages=1):
        rank = first + tl.arange(0, R)
        # [ROWS, R]
        u = tl.load(u_ptr + offsets(rows, r, rank, WIDE), mask=(rows < m)[:, None] & (rank < r)[None, :], other=0.0)
        if V_BY_RANK:
            # [R, COLS]
            inside = (rank < r)[:, None] & (cols < c)[None, :]
            v = tl.load(v_ptr + offsets(rank, c, cols, WIDE), mask=inside, other=0.0)
            v = v.to(tl.float32) * factor
        else:
            # [COLS, R]
            inside = (cols < c)[:, None] & (rank < r)[None, :]
            v = tl.load(v_ptr + offsets(cols, r, rank, WIDE), mask=inside, other=0.0)
            v = (v.to(tl.float32) * factor).trans()
        high_u, high_v = cast(u, DTYPE), cast(v, DTYPE)
        if TWO_TERMS:
            acc = dot(cast(u - high_u.to(tl.float32), DTYPE), high_v, acc, PRECISION)
            acc = dot(high_u, cast(v - high_v.to(tl.float32), DTYPE), acc, PRECISION)
        acc = dot(high_u, high_v, acc, PRECISION)
    return acc


@triton.jit
def column_factor(mag_ptr, norm_ptr, cols, n):
    """c = mag / norm of the columns, fp32; 1 outside."""
    mag = tl.load(mag_ptr + cols, mask=cols < n, other=1.0).to(tl.float32)
    return mag / tl.load(norm_ptr + cols, mask=cols < n, other=1.0).to(tl.float32)


# --- forward ----------------------------------------------------------------------------------------------------------


@entry
def linear_kernel(
    x,
    w,
    y,
    z,
    h_ptr,
    b_ptr,
    mag_ptr,
    norm_ptr,
    bias_ptr,
    scale,
    m,
    n,
    k,
    r,
    programs,
    DTYPE: tl.constexpr,
    HAS_LORA: tl.constexpr,
    HAS_C: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    NEED_Z: tl.constexpr,
    TWO_TERMS: tl.constexpr,
    R: tl.constexpr,
    STEPS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
    TMA: tl.constexpr,
    FLATTEN: tl.constexpr,
    WIDE: tl.constexpr,
):
    """z = x wᵀ + scale h bᵀ;  y = (mag / norm) ∘ z + bias.

    The adapter's term comes last: work before the base product keeps the next tile's loads from starting early.
    """
    down, across = tl.cdiv(m, BLOCK_M), tl.cdiv(n, BLOCK_N)
    for index in tl.range(tl.program_id(0), down * across, programs, flatten=FLATTEN):
        block_row, block_col = grouped(index, down, across, GROUP)
        row, col = block_row * BLOCK_M, block_col * BLOCK_N
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for step in range(tl.cdiv(k, BLOCK_K)):
            x_tile = load_block(x, row, step * BLOCK_K, m, k, BLOCK_M, BLOCK_K, TMA, WIDE)
            w_tile = load_block(w, col, step * BLOCK_K, n, k, BLOCK_N, BLOCK_K, TMA, WIDE)
            acc = dot(x_tile, w_tile.trans(), acc, PRECISION)
        if HAS_LORA:
            acc = low_rank(
                acc,
                h_ptr,
                b_ptr,
                row,
                col,
                m,
                n,
                r,
                scale,
                DTYPE,
                False,
                TWO_TERMS,
                R,
                STEPS,
                BLOCK_M,
                BLOCK_N,
                PRECISION,
                WIDE,
            )
        if NEED_Z:
            store_block(z, acc, row, col, m, n, DTYPE, BLOCK_M, BLOCK_N, TMA, WIDE)
        cols = col + tl.arange(0, BLOCK_N)
        if HAS_C:
            acc = acc * column_factor(mag_ptr, norm_ptr, cols, n)[None, :]
        if HAS_BIAS:
            acc = acc + tl.load(bias_ptr + cols, mask=cols < n, other=0.0).to(tl.float32)[None, :]
        store_block(y, acc, row, col, m, n, DTYPE, BLOCK_M, BLOCK_N, TMA, WIDE)


DTYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


def precision(at: Target, dtype: torch.dtype) -> str:
    """How fp32 operands are multiplied: three tf32 products where tensor cores have them; 16 bits are exact anyway."""
    return "tf32x3" if dtype == torch.float32 and at.kind == "cuda" else "ieee"


def by_descriptor(at: Target, *matrices: Tensor) -> bool:
    """Whether the device copies tiles by descriptor and these matrices allow it: rows of a multiple of 16 bytes."""
    if at.kind == "hip" or (at.kind == "cuda" and at.arch < 90):
        return False
    aligned = all(t.shape[1] * t.element_size() % 16 == 0 and t.data_ptr() % 16 == 0 for t in matrices)
    return aligned and all(max(t.shape) < weights.INT32_END for t in matrices)


def _blocks(t: Tensor, rows: int, cols: int, tma: bool) -> Any:
    """What the kernel takes for a matrix read or written in blocks of [rows, cols]."""
    return TensorDescriptor.from_tensor(t, [rows, cols]) if tma else t


def _programs(at: Target, tiles: int, tma: bool) -> int:
    """One program a multiprocessor where the tile loop is pipelined across tiles, else one a tile."""
    return min(tiles, at.sms) if tma or at.kind == "interpreter" else tiles


def two_terms(dtype: torch.dtype, r: int, need_z: bool) -> bool:
    """Whether the adapter's product keeps two terms an element: z, unlike y, meets dy at full accuracy in dmag."""
    return need_z and dtype.itemsize == 2 and r <= PRECISE_RANK


def ranks(r: int) -> dict[str, Any]:
    """The compile-time rank step and number of steps of rank r."""
    step = min(RANK_STEP, max(16, next_power_of_2(r)))
    return {"R": step, "STEPS": cdiv(r, step)}


def linear(
    x: Tensor,
    w: Tensor,
    h: Tensor | None = None,
    b: Tensor | None = None,
    scale: float = 1.0,
    *,
    mag: Tensor | None = None,
    norm: Tensor | None = None,
    bias: Tensor | None = None,
    need_z: bool = False,
    wide: bool | None = None,
) -> tuple[Tensor, Tensor | None]:
    """y = c ∘ (x wᵀ + scale h bᵀ) + bias.

    Args:
        x: [m,k]; w: [n,k] of the same dtype, bf16, fp16 or fp32.
        h: fp32 [m,r] or None; b: [n,r] with it.
        mag, norm: [n], both or neither: c = mag / norm. bias: [n] or None.
        need_z: also return z = x wᵀ + scale h bᵀ.
        wide: 64-bit offsets; by default where a matrix needs them.

    Returns:
        y [m,n] and z [m,n] or None, in x's dtype. All inputs contiguous.
    """
    (m, k), n = x.shape, w.shape[0]
    at, dtype = target(x.device), x.dtype
    y = torch.empty((m, n), dtype=dtype, device=x.device)
    z = torch.empty_like(y) if need_z else None
    if not y.numel():
        return y, z
    wide = weights.wide(x, w, y, h, b) if wide is None else wide
    tma = not wide and by_descriptor(at, x, w, y)
    tile = tile_linear(at, m, n, dtype, tma, two=need_z)
    programs = _programs(at, cdiv(m, tile.BLOCK_M) * cdiv(n, tile.BLOCK_N), tma)
    r = 0 if h is None else h.shape[1]
    launch(
        linear_kernel,
        (programs,),
        _blocks(x, tile.BLOCK_M, tile.BLOCK_K, tma),
        _blocks(w, tile.BLOCK_N, tile.BLOCK_K, tma),
        _blocks(y, tile.BLOCK_M, tile.BLOCK_N, tma),
        None if z is None else _blocks(z, tile.BLOCK_M, tile.BLOCK_N, tma),
        h if r else None,
        b if r else None,
        mag,
        norm,
        bias,
        float(scale),
        m,
        n,
        k,
        r,
        programs,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        DTYPE=DTYPES[dtype],
        HAS_LORA=r > 0,
        HAS_C=mag is not None,
        HAS_BIAS=bias is not None,
        NEED_Z=need_z,
        TWO_TERMS=two_terms(dtype, r, need_z),
        **ranks(r),
        BLOCK_M=tile.BLOCK_M,
        BLOCK_N=tile.BLOCK_N,
        BLOCK_K=tile.BLOCK_K,
        GROUP=GROUP,
        PRECISION=precision(at, dtype),
        TMA=tma,
        FLATTEN=tma and at.arch == 90,
        WIDE=wide,
    )
    return y, z


# --- backward ---------------------------------------------------------------------------------------------------------


@entry
def linear_dx_kernel(
    dy,
    w,
    dx,
    g_ptr,
    a_ptr,
    mag_ptr,
    norm_ptr,
    bits_ptr,
    factor,
    m,
    n,
    k,
    r,
    programs,
    DTYPE: tl.constexpr,
    HAS_LORA: tl.constexpr,
    HAS_C: tl.constexpr,
    HAS_BITS: tl.constexpr,
    R: tl.constexpr,
    STEPS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
    TMA: tl.constexpr,
    FLATTEN: tl.constexpr,
    WIDE: tl.constexpr,
):
    """dx = ((mag / norm) ∘ dy) w + factor mask ∘ (g a); BLOCK_N walks over k, BLOCK_K over n.

    With a mask the adapter's term comes first: the mask then acts on the accumulator itself, not on a second one.
    Without, last, as in the forward.
    """
    down, across = tl.cdiv(m, BLOCK_M), tl.cdiv(k, BLOCK_N)
    for index in tl.range(tl.program_id(0), down * across, programs, flatten=FLATTEN):
        block_row, block_col = grouped(index, down, across, GROUP)
        row, col = block_row * BLOCK_M, block_col * BLOCK_N
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        if HAS_LORA and HAS_BITS:
            acc = low_rank(
                acc,
                g_ptr,
                a_ptr,
                row,
                col,
                m,
                k,
                r,
                factor,
                DTYPE,
                True,
                False,
                R,
                STEPS,
                BLOCK_M,
                BLOCK_N,
                PRECISION,
                WIDE,
            )
            width = tl.cdiv(k, 8)
            bits = load_block(bits_ptr, row, col // 8, m, width, BLOCK_M, BLOCK_N // 8, False, WIDE)
            acc = tl.where(expand_bits(bits, BLOCK_M, BLOCK_N), acc, 0.0)
        for step in range(tl.cdiv(n, BLOCK_K)):
            first = step * BLOCK_K
            dy_tile = load_block(dy, row, first, m, n, BLOCK_M, BLOCK_K, TMA, WIDE)
            w_tile = load_block(w, first, col, n, k, BLOCK_K, BLOCK_N, TMA, WIDE)
            if HAS_C:
                c = column_factor(mag_ptr, norm_ptr, first + tl.arange(0, BLOCK_K), n)
                dy_tile = cast(dy_tile.to(tl.float32) * c[None, :], DTYPE)
            acc = dot(dy_tile, w_tile, acc, PRECISION)
        if HAS_LORA and not HAS_BITS:
            acc = low_rank(
                acc,
                g_ptr,
                a_ptr,
                row,
                col,
                m,
                k,
                r,
                factor,
                DTYPE,
                True,
                False,
                R,
                STEPS,
                BLOCK_M,
                BLOCK_N,
                PRECISION,
                WIDE,
            )
        store_block(dx, acc, row, col, m, k, DTYPE, BLOCK_M, BLOCK_N, TMA, WIDE)


def linear_dx(
    dy: Tensor,
    w: Tensor,
    g: Tensor | None = None,
    a: Tensor | None = None,
    scale: float = 1.0,
    *,
    mag: Tensor | None = None,
    norm: Tensor | None = None,
    bits: Tensor | None = None,
    dscale: float = 1.0,
    wide: bool | None = None,
) -> Tensor:
    """dx = (c ∘ dy) w + scale dscale mask ∘ (g a).

    Args:
        dy: [m,n]; w: [n,k] of the same dtype, bf16, fp16 or fp32.
        g: fp32 [m,r] or None; a: [r,k] with it.
        mag, norm: [n], both or neither: c = mag / norm.
        bits: the keep mask, uint8 [m, ceil(k/8)], or None for all kept.
        wide: 64-bit offsets; by default where a matrix needs them.

    Returns:
        dx [m,k] in dy's dtype. All inputs contiguous.
    """
    (m, n), k = dy.shape, w.shape[1]
    at, dtype = target(dy.device), dy.dtype
    dx = torch.empty((m, k), dtype=dtype, device=dy.device)
    if not dx.numel():
        return dx
    wide = weights.wide(dy, w, dx, g, a) if wide is None else wide
    tma = not wide and by_descriptor(at, dy, w, dx)
    tile = tile_linear(at, m, k, dtype, tma, masked=bits is not None, scaled=mag is not None)
    programs = _programs(at, cdiv(m, tile.BLOCK_M) * cdiv(k, tile.BLOCK_N), tma)
    r = 0 if g is None else g.shape[1]
    launch(
        linear_dx_kernel,
        (programs,),
        _blocks(dy, tile.BLOCK_M, tile.BLOCK_K, tma),
        _blocks(w, tile.BLOCK_K, tile.BLOCK_N, tma),
        _blocks(dx, tile.BLOCK_M, tile.BLOCK_N, tma),
        g if r else None,
        a if r else None,
        mag,
        norm,
        bits if r else None,
        float(scale * dscale),
        m,
        n,
        k,
        r,
        programs,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        DTYPE=DTYPES[dtype],
        HAS_LORA=r > 0,
        HAS_C=mag is not None,
        HAS_BITS=bits is not None and r > 0,
        **ranks(r),
        BLOCK_M=tile.BLOCK_M,
        BLOCK_N=tile.BLOCK_N,
        BLOCK_K=tile.BLOCK_K,
        GROUP=GROUP,
        PRECISION=precision(at, dtype),
        TMA=tma,
        FLATTEN=tma and at.arch == 90 and (bits is None or not r),
        WIDE=wide,
    )
    return dx
