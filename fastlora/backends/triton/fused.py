"""The "fused" plan: one kernel for a 4-bit layer with its adapter, for as many tokens as decoding stays memory-bound.

    h = dscale (mask ∘ x) aᵀ        xᵀ's tile meets a's columns beside w's, in the same loop over k
    z = x wᵀ + s h bᵀ               c = mag / norm
    y = c ∘ z + bias

Every program has a block of rows of w (columns of y) and makes h for itself; those of the first block write h and the
dropout bits. Decoding and the product with w are those of `skinny`.
"""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from fastlora.backends.triton import shrink as shrinking
from fastlora.backends.triton import weight as weights
from fastlora.backends.triton.dense import DTYPES, column_factor, load_block, precision, two_terms
from fastlora.backends.triton.launch import PRECISE_RANK, Target, Tile, cdiv, entry, launch, target
from fastlora.backends.triton.primitives import cast, decode_tile, dot, draw_bits, offsets
from fastlora.backends.triton.shrink import Dropout, fold, keep, load_bits, load_factor, product, terms
from fastlora.backends.triton.skinny import block_product, load_words, segment, step_scales, words_for
from fastlora.math.nf4 import PackedWeight


def tile_fused(at: Target, m: int, n: int, rank: int, dtype: torch.dtype, aligned: bool = True) -> Tile:
    """Rows of x, rows of w and columns of one step; rank counts the columns of h's accumulator."""
    if at.kind == "interpreter":
        return Tile(16, 32, 64, 1, 1)
    old, large = at.kind == "cuda" and at.arch < 90, rank > 64
    if dtype == torch.float32 and at.kind == "cuda":  # three tf32 terms of each operand
        return Tile(16, 32 if old and rank > 128 else 64, 32, 8, 2)
    rows = 16 if m <= 16 or rank > 128 else 32 if m <= 32 or large or old or not aligned else 64
    stages = 2 if dtype == torch.float32 or at.kind == "hip" else 3
    if not aligned:  # an address and a scale for each element
        return Tile(rows, 64, 32, 8, 2)
    wide = cdiv(n, 128) >= at.sms and at.kind == "cuda" and not large and not old
    return Tile(rows, 128 if wide else 64, 32 if rank > 128 else 64, 8 if large else 4, stages)


@entry
def fused_kernel(
    x_ptr,
    packed_ptr,
    absmax_ptr,
    nested_absmax_ptr,
    nested_offset_ptr,
    table_ptr,
    map_ptr,
    words_ptr,
    a_ptr,
    b_ptr,
    seed_ptr,
    bits_ptr,
    saved_ptr,
    mag_ptr,
    norm_ptr,
    bias_ptr,
    h_ptr,
    y_ptr,
    z_ptr,
    scale,
    dscale,
    stream,
    threshold,
    m,
    n,
    k,
    k_half,
    r,
    DTYPE: tl.constexpr,
    BLOCKSIZE: tl.constexpr,
    IS_NESTED: tl.constexpr,
    ALIGNED: tl.constexpr,
    HAS_WORDS: tl.constexpr,
    HAS_LORA: tl.constexpr,
    HAS_C: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    TWO_TERMS: tl.constexpr,
    R: tl.constexpr,
    TERMS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
    PRECISION_H: tl.constexpr,
    WIDE: tl.constexpr,
):
    """h = dscale (mask ∘ x) aᵀ;  z = x wᵀ + scale h bᵀ;  y = (mag / norm) ∘ z + bias."""
    row, token = tl.program_id(0) * BLOCK_N, tl.program_id(1) * BLOCK_M
    rows, tokens = row + tl.arange(0, BLOCK_N), token + tl.arange(0, BLOCK_M)
    rank = tl.arange(0, R)
    owned = tokens < tl.where(tl.program_id(0) == 0, m, 0)  # rows of h and of the bits that this program writes
    words = load_words(words_ptr, HAS_WORDS)
    width = tl.cdiv(k, 8)
    acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    hidden = tl.zeros((BLOCK_M, TERMS * R), dtype=tl.float32)
    SPAN: tl.constexpr = BLOCKSIZE if ALIGNED and BLOCKSIZE < BLOCK_K else BLOCK_K
    SEGMENTS: tl.constexpr = BLOCK_K // SPAN
    for step in range(tl.cdiv(k, BLOCK_K)):
        start = row * 0 + step * BLOCK_K  # a tensor, also where k is one step and `step` a constant
        if ALIGNED:
            scales = step_scales(
                absmax_ptr,
                nested_absmax_ptr,
                nested_offset_ptr,
                map_ptr,
                row,
                start,
                n,
                k,
                BLOCK_N,
                SPAN,
                SEGMENTS,
                BLOCKSIZE,
                IS_NESTED,
            )
        for index in tl.static_range(SEGMENTS):
            col = start + index * SPAN
            x = load_block(x_ptr, token, col, m, k, BLOCK_M, SPAN, False, WIDE)
            if ALIGNED:
                acc = block_product(
                    acc,
                    x,
                    packed_ptr,
                    table_ptr,
                    words,
                    segment(scales, index, SEGMENTS),
                    row,
                    step * (BLOCK_K // 2) + index * (SPAN // 2),
                    n,
                    k_half,
                    DTYPE,
                    BLOCK_M,
                    BLOCK_N,
                    SPAN,
                    PRECISION,
                    HAS_WORDS,
                )
            else:
                w = decode_tile(
                    packed_ptr,
                    absmax_ptr,
                    nested_absmax_ptr,
                    nested_offset_ptr,
                    table_ptr,
                    map_ptr,
                    row,
                    start,
                    n,
                    k,
                    BLOCK_N,
                    BLOCK_K,
                    BLOCKSIZE,
                    IS_NESTED,
                    ALIGNED,
                )
                acc = dot(cast(w, DTYPE), x.trans(), acc, PRECISION)
            groups = col // 8 + tl.arange(0, SPAN // 8)
            if bits_ptr is not None:
                x = keep(x, load_bits(bits_ptr, tokens, groups, m, width, WIDE), BLOCK_M, SPAN)
            if seed_ptr is not None:
                bits = draw_bits(seed_ptr, stream, threshold, tokens, groups, k)
                if saved_ptr is not None:
                    inside_bits = owned[:, None] & (groups < width)[None, :]
                    tl.store(saved_ptr + offsets(tokens, width, groups, WIDE), bits, mask=inside_bits)
                x = keep(x, bits, BLOCK_M, SPAN)
            if HAS_LORA:
                a = load_factor(a_ptr, col + tl.arange(0, SPAN), rank, k, r, True, WIDE)
                hidden = product(x, terms(a, DTYPE, TERMS, PRECISION_H), hidden, PRECISION_H)
    if HAS_LORA:
        h = fold(hidden, TERMS) * dscale
        if h_ptr is not None:
            inside_h = owned[:, None] & (rank < r)[None, :]
            tl.store(h_ptr + offsets(tokens, r, rank, WIDE), h, mask=inside_h)
        b = load_factor(b_ptr, rows, rank, n, r, False, WIDE)
        b = b.to(tl.float32) * scale
        high_b, high_h = cast(b, DTYPE), cast(h, DTYPE)
        if TWO_TERMS:
            acc = dot(cast(b - high_b.to(tl.float32), DTYPE), high_h.trans(), acc, PRECISION)
            acc = dot(high_b, cast(h - high_h.to(tl.float32), DTYPE).trans(), acc, PRECISION)
        acc = dot(high_b, high_h.trans(), acc, PRECISION)
    z = acc.trans()
    inside = (tokens < m)[:, None] & (rows < n)[None, :]
    where = offsets(tokens, n, rows, WIDE)
    if z_ptr is not None:
        tl.store(z_ptr + where, cast(z, DTYPE), mask=inside)
    if HAS_C:
        z = z * column_factor(mag_ptr, norm_ptr, rows, n)[None, :]
    if HAS_BIAS:
        z = z + tl.load(bias_ptr + rows, mask=rows < n, other=0.0).to(tl.float32)[None, :]
    tl.store(y_ptr + where, cast(z, DTYPE), mask=inside)


def fused(
    x: Tensor,
    weight: PackedWeight,
    a: Tensor,
    b: Tensor,
    scale: float,
    *,
    dropout: Dropout | None = None,
    mag: Tensor | None = None,
    norm: Tensor | None = None,
    bias: Tensor | None = None,
    need_h: bool = False,
    save_mask: bool = False,
    need_z: bool = False,
    wide: bool | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """y = c ∘ (x wᵀ + scale h bᵀ) + bias with h = dscale (mask ∘ x) aᵀ: one launch.

    Args:
        x: [m,k] in bf16, fp16 or fp32; weight: of shape (n,k); a: [r,k], b: [n,r] of one float type, r may be 0.
        dropout: the decision, read from its bits or drawn from its seed; None keeps everything.
        mag, norm: [n], both or neither: c = mag / norm. bias: [n] or None.
        need_h, save_mask, need_z: also return h fp32 [m,r], the mask uint8 [m, ceil(k/8)], z = x wᵀ + scale h bᵀ.
        wide: 64-bit offsets; by default where a matrix needs them.

    Returns:
        y [m,n], h, mask, z (None where not asked for); y and z in x's dtype. All inputs contiguous.
    """
    (m, k), n, r, dtype, at = x.shape, weight.shape[0], a.shape[0], x.dtype, target(x.device)
    y = torch.empty((m, n), dtype=dtype, device=x.device)
    z = torch.empty_like(y) if need_z else None
    h = torch.empty((m, r), dtype=torch.float32, device=x.device) if need_h else None
    bits, seed = (None, None) if dropout is None else (dropout.bits, dropout.seed)
    saved = None
    if save_mask and bits is None:
        saved = torch.empty((m, cdiv(k, 8)), dtype=torch.uint8, device=x.device)
    if not y.numel():
        return y, h, saved if bits is None else bits, z
    wide = weights.wide(x, weight, y, a, b) if wide is None else wide
    splits = 3 if a.dtype == torch.float32 and dtype != torch.float32 and r <= PRECISE_RANK else 1
    rank, parts = shrinking.rank_block(r), shrinking.term_count(at, dtype, splits)
    arguments, words = weights.weight_args(weight), words_for(at, weight, dtype)
    tile = tile_fused(at, m, n, rank * parts, dtype, arguments.constexprs["ALIGNED"])
    launch(
        fused_kernel,
        (cdiv(n, tile.BLOCK_N), cdiv(m, tile.BLOCK_M)),
        x,
        *arguments.pointers,
        words,
        a if r else None,
        b if r else None,
        seed if bits is None and (r or saved is not None) else None,
        bits if r else None,
        saved,
        mag,
        norm,
        bias,
        h if r else None,
        y,
        z,
        float(scale),
        1.0 if dropout is None else float(dropout.dscale),
        0 if dropout is None else dropout.stream,
        0 if dropout is None else dropout.threshold,
        m,
        n,
        k,
        k // 2,
        r,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        DTYPE=DTYPES[dtype],
        **arguments.constexprs,
        HAS_WORDS=words is not None,
        HAS_LORA=r > 0,
        HAS_C=mag is not None,
        HAS_BIAS=bias is not None,
        TWO_TERMS=two_terms(dtype, r, need_z),
        R=rank,
        TERMS=parts,
        BLOCK_M=tile.BLOCK_M,
        BLOCK_N=tile.BLOCK_N,
        BLOCK_K=tile.BLOCK_K,
        PRECISION=precision(at, dtype),
        PRECISION_H=shrinking.precision(at, dtype),
        WIDE=wide,
    )
    return y, h, saved if bits is None or not save_mask else bits, z
