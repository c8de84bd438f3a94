"""Several packed weights of one format and width merged, or only decoded, by one launch: those that read one x.

Each is what `merge` makes of it, to the bit; without an adapter (rank 0) what `dequantize` does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from fastlora.backends.triton.launch import cdiv, entry, launch, target
from fastlora.backends.triton.merge import _STEPS, _merge_block, _warpgroups, rank_blocks, terms, tile_merge, warps_k
from fastlora.backends.triton.weight import weight_args
from fastlora.backends.triton.weight import wide as is_wide
from fastlora.math.nf4 import PackedWeight

MOST = 4  # weights a launch


class Part(NamedTuple):
    """One weight [n,k] and what is merged into it; a [0,k], b [n,0] for nothing, mag and norm None for c = 1."""

    weight: PackedWeight
    a: Tensor
    b: Tensor
    scale: float
    mag: Tensor | None = None
    norm: Tensor | None = None


@entry
def _merge_parts_kernel(
    packed0,
    absmax0,
    nested_absmax0,
    nested_offset0,
    a0,
    b0,
    mag0,
    norm0,
    out0,
    n0,
    r0,
    scale0,
    packed1,
    absmax1,
    nested_absmax1,
    nested_offset1,
    a1,
    b1,
    mag1,
    norm1,
    out1,
    n1,
    r1,
    scale1,
    packed2,
    absmax2,
    nested_absmax2,
    nested_offset2,
    a2,
    b2,
    mag2,
    norm2,
    out2,
    n2,
    r2,
    scale2,
    packed3,
    absmax3,
    nested_absmax3,
    nested_offset3,
    a3,
    b3,
    mag3,
    norm3,
    out3,
    n3,
    r3,
    scale3,
    table_ptr,
    map_ptr,
    k,
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
    """out_i = round(c_i (w_i + scale_i b_i a_i)) for up to four weights: each program finds whose tiles are its own."""
    pid = tl.program_id(0)
    spans = tl.cdiv(k, BLOCK_K * STEPS)
    blocks = tl.cdiv(n0, BLOCK_N) * spans
    if pid < blocks:
        _merge_block(
            pid, packed0, absmax0, nested_absmax0, nested_offset0, table_ptr, map_ptr,
            a0, b0, mag0, norm0, out0, n0, k, r0, scale0,
            BLOCKSIZE, IS_NESTED, ALIGNED, BLOCK_N, BLOCK_K, BLOCK_R, RANK, TERMS, WARPS_K, STEPS, WIDE,
        )  # fmt: skip
    if packed1 is not None:
        pid -= blocks
        blocks = tl.cdiv(n1, BLOCK_N) * spans
        if (pid >= 0) & (pid < blocks):
            _merge_block(
                pid, packed1, absmax1, nested_absmax1, nested_offset1, table_ptr, map_ptr,
                a1, b1, mag1, norm1, out1, n1, k, r1, scale1,
                BLOCKSIZE, IS_NESTED, ALIGNED, BLOCK_N, BLOCK_K, BLOCK_R, RANK, TERMS, WARPS_K, STEPS, WIDE,
            )  # fmt: skip
    if packed2 is not None:
        pid -= blocks
        blocks = tl.cdiv(n2, BLOCK_N) * spans
        if (pid >= 0) & (pid < blocks):
            _merge_block(
                pid, packed2, absmax2, nested_absmax2, nested_offset2, table_ptr, map_ptr,
                a2, b2, mag2, norm2, out2, n2, k, r2, scale2,
                BLOCKSIZE, IS_NESTED, ALIGNED, BLOCK_N, BLOCK_K, BLOCK_R, RANK, TERMS, WARPS_K, STEPS, WIDE,
            )  # fmt: skip
    if packed3 is not None:
        pid -= blocks
        blocks = tl.cdiv(n3, BLOCK_N) * spans
        if (pid >= 0) & (pid < blocks):
            _merge_block(
                pid, packed3, absmax3, nested_absmax3, nested_offset3, table_ptr, map_ptr,
                a3, b3, mag3, norm3, out3, n3, k, r3, scale3,
                BLOCKSIZE, IS_NESTED, ALIGNED, BLOCK_N, BLOCK_K, BLOCK_R, RANK, TERMS, WARPS_K, STEPS, WIDE,
            )  # fmt: skip


def alike(parts: Sequence[Part]) -> bool:
    """Whether one launch can make them all: one format, width and dtype of the adapters, tables of the standard."""
    facts = {(p.weight[5:7], p.weight.nested, p.weight.shape[1], p.a.dtype) for p in parts}
    return len(facts) == 1 and all(p.weight.code is None for p in parts)


def merge_parts(parts: Sequence[Part], dtype: torch.dtype, *, wide: bool | None = None) -> list[Tensor]:
    """c (w + scale b a) of each, rounded once to `dtype`: [n_i, k]. At most `MOST` parts, which are `alike`.

    Args:
        wide: force 64-bit offsets.
    """
    k = parts[0].weight.shape[1]
    outs = [torch.empty(part.weight.shape, dtype=dtype, device=part.weight.packed.device) for part in parts]
    at = target(outs[0].device)
    packed = [weight_args(part.weight) for part in parts]
    constexprs = packed[0].constexprs | {"ALIGNED": all(each.constexprs["ALIGNED"] for each in packed)}
    tile = tile_merge(at, constexprs["ALIGNED"])
    block_r, rank = rank_blocks(max(part.a.shape[0] for part in parts), 64 if _warpgroups(at, tile) else 16)
    args: list[Tensor | int | float | None] = []
    for part, each, out in zip(parts, packed, outs, strict=True):
        r, n = part.a.shape[0], part.weight.shape[0]
        args += [*each.pointers[:4], part.a, part.b, part.mag, part.norm, out, n, r, float(part.scale)]
    args += [None] * (12 * (MOST - len(parts)))
    blocks = sum(cdiv(part.weight.shape[0], tile.BLOCK_N) for part in parts)
    launch(
        _merge_parts_kernel,
        (blocks * cdiv(k, tile.BLOCK_K * _STEPS),),
        *args,
        *packed[0].pointers[4:],
        k,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        fp_fusion=False,
        **constexprs,
        BLOCK_N=tile.BLOCK_N,
        BLOCK_K=tile.BLOCK_K,
        BLOCK_R=block_r,
        RANK=rank,
        TERMS=terms(parts[0].a.dtype, dtype),
        WARPS_K=warps_k(at, tile),
        STEPS=_STEPS,
        WIDE=is_wide(*(part.a for part in parts)) if wide is None else wide,
    )
    return outs
