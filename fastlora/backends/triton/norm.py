"""DoRA's row norms (Liu et al., 2402.09353, equation 5), nothing of size n x k materialised.

    out[i] = sqrt(sum_j (w[i,j] + s sum_l b[i,l] a[l,j])^2)

The sum of squares is of the tile itself: the factored form |w|^2 + 2 s b.(a w) + s^2 b (a a^T) b^T has as many
operations and loses everything where the adapter cancels the weight.
"""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from fastlora.backends.triton.launch import Target, Tile, cdiv, entry, launch, target
from fastlora.backends.triton.merge import load_b, low_rank_slabs, rank_blocks, terms, warps_k
from fastlora.backends.triton.primitives import SLAB, decode_slabs, slab_offsets
from fastlora.backends.triton.weight import weight_args
from fastlora.backends.triton.weight import wide as is_wide
from fastlora.math.nf4 import PackedWeight


@entry
def _norm_kernel(
    w_ptr,
    absmax_ptr,
    nested_absmax_ptr,
    nested_offset_ptr,
    table_ptr,
    map_ptr,
    a_ptr,
    b_ptr,
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
    STAGES: tl.constexpr,
    WIDE: tl.constexpr,
):
    """out[i] = sqrt(sum_j (w[i,j] + scale sum_l b[i,l] a[l,j])^2); w packed, or dense where BLOCKSIZE is 0."""
    first_row = tl.program_id(0) * BLOCK_N
    rows = tl.arange(0, BLOCK_N)
    total = tl.zeros([BLOCK_K // SLAB, BLOCK_N, SLAB], tl.float32)
    if RANK > 0:
        b = load_b(b_ptr, first_row, 0, n, r, BLOCK_N, BLOCK_R)
    where, cols = slab_offsets(k, BLOCK_N, BLOCK_K)
    for first_col in tl.range(0, k, BLOCK_K, num_stages=STAGES):
        if RANK > 0:
            delta = low_rank_slabs(
                a_ptr, b_ptr, b, first_row, first_col, n, k, r, BLOCK_N, BLOCK_K, BLOCK_R, RANK, TERMS, WARPS_K, WIDE
            )
        # [BLOCK_K / SLAB, BLOCK_N, SLAB]
        if BLOCKSIZE == 0:
            inside = (rows < n - first_row)[None, :, None] & (cols < k - first_col)
            start = first_row.to(tl.int64) * k + first_col
            value = tl.load(w_ptr + start + where, mask=inside, other=0.0).to(tl.float32)
        else:
            value = decode_slabs(
                w_ptr, absmax_ptr, nested_absmax_ptr, nested_offset_ptr, table_ptr, map_ptr,
                first_row, first_col, n, k, BLOCK_N, BLOCK_K, BLOCKSIZE, IS_NESTED, ALIGNED,
            )  # fmt: skip
        if RANK > 0:
            value = tl.fma(delta, scale, value)
        total = tl.fma(value, value, total)
    square = tl.sum(tl.sum(total, axis=2), axis=0)
    tl.store(out_ptr + first_row + rows, tl.sqrt_rn(square), mask=rows < n - first_row)


def tile_norm(target: Target, n: int, r: int) -> Tile:
    """BLOCK_N rows a program, BLOCK_K columns at a time."""
    if target.kind == "interpreter":
        return Tile(BLOCK_N=32, BLOCK_K=64, num_stages=1)
    # Each program reads and splits all of a: as many rows as still give every multiprocessor work.
    rows = 32 if 2 * cdiv(n, 32) > target.sms else 16
    if r <= 16:
        return Tile(BLOCK_N=rows, BLOCK_K=256, num_warps=8, num_stages=3 if target.kind == "cuda" else 1)
    return Tile(BLOCK_N=rows, BLOCK_K=128, num_warps=8, num_stages=1)


def dora_norm(weight: Tensor | PackedWeight, a: Tensor, b: Tensor, scale: float, *, wide: bool | None = None) -> Tensor:
    """|w + scale b a| of each row, fp32 [n].

    Args:
        weight: contiguous [n,k] bf16, fp16 or fp32, or packed.
        a, b: contiguous [r,k] and [n,r], fp32, bf16 or fp16; r may be 0.
        wide: force 64-bit offsets.
    """
    n, k = weight.shape
    r = a.shape[0]
    out = torch.empty((n,), dtype=torch.float32, device=a.device)
    if isinstance(weight, PackedWeight):
        pointers, constexprs = weight_args(weight)
    else:
        pointers = (weight, None, None, None, None, None)
        constexprs = {"BLOCKSIZE": 0, "IS_NESTED": False, "ALIGNED": False}
    at = target(a.device)
    tile = tile_norm(at, n, r)
    block_r, rank = rank_blocks(r, 16)
    launch(
        _norm_kernel,
        (cdiv(n, tile.BLOCK_N),),
        *pointers,
        a,
        b,
        out,
        n,
        k,
        r,
        scale,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        fp_fusion=False,
        **constexprs,
        BLOCK_N=tile.BLOCK_N,
        BLOCK_K=tile.BLOCK_K,
        BLOCK_R=block_r,
        RANK=rank,
        TERMS=terms(a.dtype, out.dtype),
        WARPS_K=warps_k(at, tile),
        STAGES=tile.num_stages,
        WIDE=is_wide(a) if wide is None else wide,
    )
    return out
