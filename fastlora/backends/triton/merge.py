"""The merged weight of a 4-bit base: what one plain matrix product then multiplies.

    out = round(c * (w + s b a)),  w = table[code] * absmax in fp32, c = mag / norm of each row, or 1

Added in fp32 and rounded once: a small adapter survives where the base itself is rounded anyway (never for a dense
16-bit base). Without an adapter's effect (b = 0, c = 1) the bits are those of `dequantize`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastlora.backends.triton.launch import Target, Tile, cdiv, entry, launch, next_power_of_2, target
from fastlora.backends.triton.primitives import SLAB, cast, decode_slabs, dot_terms, offsets, slab_offsets
from fastlora.backends.triton.weight import weight_args
from fastlora.backends.triton.weight import wide as is_wide
from fastlora.math.nf4 import PackedWeight

_STEPS = 4  # tiles of BLOCK_K columns a program


@triton.jit
def load_b(b_ptr, first_row, first_rank, n, r, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr):
    """Rows of b from first_row on, columns from first_rank on, 0 outside; [BLOCK_N, BLOCK_R], for `low_rank_slabs`.

    Row (w, h, l) of the result, w < BLOCK_N / 16, h < 2, l < 8, is row (h, w, l) of the tile.
    """
    i = tl.arange(0, BLOCK_N)
    rows = (i >> 3 & 1) * (BLOCK_N // 2) + (i >> 4) * 8 + (i & 7)
    rank = tl.arange(0, BLOCK_R)
    inside = (rows < n - first_row)[:, None] & (rank < r - first_rank)[None, :]
    start = first_row.to(tl.int64) * r + first_rank
    return tl.load(b_ptr + start + offsets(rows, r, rank, False), mask=inside, other=0.0)


@triton.jit
def _load_a(
    a_ptr,
    first_rank,
    first_col,
    k,
    r,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    WARPS_K: tl.constexpr,
    WIDE: tl.constexpr,
):
    """a from (first_rank, first_col) on, 0 outside, columns in the order of `low_rank_slabs`; [BLOCK_R, BLOCK_K]."""
    rank, cols = first_rank + tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_K)
    inside = (rank < r)[:, None] & (cols < k - first_col)[None, :]
    a = tl.load(a_ptr + first_col + offsets(rank, k, cols, WIDE), mask=inside, other=0.0)
    # (group, warp, q, c, pair) -> (group, c, warp, q, pair)
    a = a.reshape(BLOCK_R, BLOCK_K // (SLAB * WARPS_K), WARPS_K, 4, 4, 2).permute(0, 1, 4, 2, 3, 5)
    return a.reshape(BLOCK_R, BLOCK_K)


@triton.jit
def low_rank_slabs(
    a_ptr,
    b_ptr,
    b,
    first_row,
    first_col,
    n,
    k,
    r,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    RANK: tl.constexpr,
    TERMS: tl.constexpr,
    WARPS_K: tl.constexpr,
    WIDE: tl.constexpr,
):
    """The tile of b a at (first_row, first_col) in fp32 [BLOCK_K / SLAB, BLOCK_N, SLAB]; see `dot_terms`.

    `b`: from `load_b`, its columns, so that a caller's loop over columns loads them once; not used where RANK (r,
    padded) exceeds BLOCK_R: then it is loaded here, BLOCK_R columns at a time.

    An NVIDIA matrix instruction leaves a thread with columns 2q and 2q + 1 of every eight that its warp has of a row, q
    being its number in a group of four. The product's columns are permuted (through a) such that these are eight
    neighbours in the tile, and its rows (through b) such that a warp has eight neighbouring ones: one packed word and
    one 16-byte store of the same thread, no exchange of accumulators. Other layouts give the same values.
    """
    acc = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    if RANK == BLOCK_R:
        acc = dot_terms(b, _load_a(a_ptr, 0, first_col, k, r, BLOCK_K, BLOCK_R, WARPS_K, WIDE), acc, TERMS)
    else:
        for first in range(0, RANK, BLOCK_R):
            part = load_b(b_ptr, first_row, first, n, r, BLOCK_N, BLOCK_R)
            a = _load_a(a_ptr, first, first_col, k, r, BLOCK_K, BLOCK_R, WARPS_K, WIDE)
            acc = dot_terms(part, a, acc, TERMS)
    # (w, h, l, group, c, warp, q, pair) -> (group, warp, h, w, l, q, c, pair)
    acc = acc.reshape(BLOCK_N // 16, 2, 8, BLOCK_K // (SLAB * WARPS_K), 4, WARPS_K, 4, 2)
    acc = acc.permute(3, 5, 1, 0, 2, 6, 4, 7)
    return acc.reshape(BLOCK_K // SLAB, BLOCK_N, SLAB)


@triton.jit
def _merge_block(
    pid,
    packed_ptr,
    absmax_ptr,
    nested_absmax_ptr,
    nested_offset_ptr,
    table_ptr,
    map_ptr,
    a_ptr,
    b_ptr,
    mag_ptr,
    norm_ptr,
    out_ptr,
    n,
    k,
    r,
    scale,
    BLOCKSIZE: tl.constexpr,
    IS_NESTED: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    RANK: tl.constexpr,
    TERMS: tl.constexpr,
    WARPS_K: tl.constexpr,
    STEPS: tl.constexpr,
    WIDE: tl.constexpr,
):
    """out[i,j] = round(c[i] (w[i,j] + scale sum_l b[i,l] a[l,j])), c = mag / norm or 1: program `pid`'s STEPS tiles."""
    spans = tl.cdiv(k, BLOCK_K * STEPS)
    first_row = (pid // spans) * BLOCK_N
    rows = tl.arange(0, BLOCK_N)
    inside_n = rows < n - first_row
    if mag_ptr is not None:
        # [BLOCK_N]
        mag = tl.load(mag_ptr + first_row + rows, mask=inside_n, other=0.0).to(tl.float32)
        factor = tl.div_rn(mag, tl.load(norm_ptr + first_row + rows, mask=inside_n, other=1.0))
    if RANK > 0:
        b = load_b(b_ptr, first_row, 0, n, r, BLOCK_N, BLOCK_R)
    where, cols = slab_offsets(k, BLOCK_N, BLOCK_K)
    begin = (pid % spans) * (BLOCK_K * STEPS)
    for first_col in range(begin, tl.minimum(begin + BLOCK_K * STEPS, k), BLOCK_K):
        if RANK > 0:
            delta = low_rank_slabs(
                a_ptr, b_ptr, b, first_row, first_col, n, k, r, BLOCK_N, BLOCK_K, BLOCK_R, RANK, TERMS, WARPS_K, WIDE
            )
        # [BLOCK_K / SLAB, BLOCK_N, SLAB]
        value = decode_slabs(
            packed_ptr, absmax_ptr, nested_absmax_ptr, nested_offset_ptr, table_ptr, map_ptr,
            first_row, first_col, n, k, BLOCK_N, BLOCK_K, BLOCKSIZE, IS_NESTED, ALIGNED,
        )  # fmt: skip
        if RANK > 0:
            value = tl.fma(delta, scale, value)
        if mag_ptr is not None:
            value = value * factor[None, :, None]
        inside = inside_n[None, :, None] & (cols < k - first_col)
        result = cast(value, out_ptr.dtype.element_ty)
        tl.store(out_ptr + first_row.to(tl.int64) * k + first_col + where, result, mask=inside)


@entry
def _merge_kernel(
    packed_ptr,
    absmax_ptr,
    nested_absmax_ptr,
    nested_offset_ptr,
    table_ptr,
    map_ptr,
    a_ptr,
    b_ptr,
    mag_ptr,
    norm_ptr,
    out_ptr,
    n,
    k,
    r,
    scale,
    BLOCKSIZE: tl.constexpr,
    IS_NESTED: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    RANK: tl.constexpr,
    TERMS: tl.constexpr,
    WARPS_K: tl.constexpr,
    STEPS: tl.constexpr,
    WIDE: tl.constexpr,
):
    """out[i,j] = round(c[i] (w[i,j] + scale sum_l b[i,l] a[l,j])), c = mag / norm or 1; STEPS tiles a program."""
    _merge_block(
        tl.program_id(0), packed_ptr, absmax_ptr, nested_absmax_ptr, nested_offset_ptr, table_ptr, map_ptr,
        a_ptr, b_ptr, mag_ptr, norm_ptr, out_ptr, n, k, r, scale,
        BLOCKSIZE, IS_NESTED, ALIGNED, BLOCK_N, BLOCK_K, BLOCK_R, RANK, TERMS, WARPS_K, STEPS, WIDE,
    )  # fmt: skip


def rank_blocks(r: int, most: int) -> tuple[int, int]:
    """(BLOCK_R, RANK): the rank padded to a power of two (0 stays 0), and how much of it is multiplied at once."""
    rank = max(16, next_power_of_2(r)) if r else 0
    return max(16, min(rank, most)), rank


def terms(adapter: torch.dtype, result: torch.dtype) -> int:
    """Into how many bf16 numbers fp32 adapters are split: 2 (2^-16) for 16-bit results, 3 (2^-24) for fp32 ones."""
    if adapter != torch.float32:
        return 1
    return 3 if result.itemsize > 2 else 2


def _warpgroups(target: Target, tile: Tile) -> bool:
    """Whether matrix instructions of four warps are used: operands stay in shared memory."""
    return target.kind == "cuda" and target.arch in (90, 100) and tile.BLOCK_N >= 64


def warps_k(target: Target, tile: Tile) -> int:
    """How many warps share a row of a product's tile: what `low_rank_slabs` permutes for (any number is correct)."""
    if target.kind != "cuda" or _warpgroups(target, tile) or tile.BLOCK_K <= tile.BLOCK_N:
        return 1
    return min(tile.num_warps, tile.BLOCK_K // 32)


def tile_merge(target: Target, aligned: bool) -> Tile:
    """BLOCK_N rows by BLOCK_K columns a step."""
    if target.kind == "interpreter":
        return Tile(BLOCK_N=32, BLOCK_K=64)
    if not aligned:  # an address and a scale for each element: registers
        return Tile(BLOCK_N=64, BLOCK_K=32, num_warps=8)
    return Tile(BLOCK_N=128, BLOCK_K=64, num_warps=8)


def merge(
    weight: PackedWeight,
    a: Tensor,
    b: Tensor,
    scale: float,
    dtype: torch.dtype,
    *,
    mag: Tensor | None = None,
    norm: Tensor | None = None,
    wide: bool | None = None,
) -> Tensor:
    """c * (w + scale b a) of a packed weight [n,k], rounded once to `dtype` (fp32, bf16, fp16).

    Args:
        a, b: contiguous [r,k] and [n,r], fp32, bf16 or fp16; r may be 0.
        mag, norm: [n] of any float dtype and fp32 [n], or None.
        wide: force 64-bit offsets.
    """
    n, k = weight.shape
    r = a.shape[0]
    out = torch.empty((n, k), dtype=dtype, device=weight.packed.device)
    at = target(out.device)
    args = weight_args(weight)
    tile = tile_merge(at, args.constexprs["ALIGNED"])
    # Where operands are held in registers, more than 16 of the rank at once spill.
    block_r, rank = rank_blocks(r, 64 if _warpgroups(at, tile) else 16)
    launch(
        _merge_kernel,
        (cdiv(n, tile.BLOCK_N) * cdiv(k, tile.BLOCK_K * _STEPS),),
        *args.pointers,
        a,
        b,
        mag,
        norm,
        out,
        n,
        k,
        r,
        scale,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        fp_fusion=False,
        **args.constexprs,
        BLOCK_N=tile.BLOCK_N,
        BLOCK_K=tile.BLOCK_K,
        BLOCK_R=block_r,
        RANK=rank,
        TERMS=terms(a.dtype, dtype),
        WARPS_K=warps_k(at, tile),
        STEPS=_STEPS,
        WIDE=is_wide(a) if wide is None else wide,
    )
    return out
