"""Quantize to and from 4 bits: the flat format of math/nf4.py, bit for bit.

dequantize:  w[i] = round(table[code[i]] * scale[i // blocksize])
quantize:    absmax = max|w| of the block,  code[i] = search(w[i] / max(absmax, 1e-38))
"""

from __future__ import annotations

import struct

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastlora.backends.triton.launch import Target, Tile, cdiv, entry, launch, target
from fastlora.backends.triton.primitives import block_scales, cast, lookup, nibbles, spread
from fastlora.backends.triton.weight import weight_args
from fastlora.math import nf4
from fastlora.math.nf4 import PackedWeight


def _floats(patterns: tuple[int, ...]) -> tuple[float, ...]:
    return struct.unpack(f"{len(patterns)}f", struct.pack(f"{len(patterns)}i", *patterns))


_NF4_POINTS = tl.constexpr(_floats(nf4.NF4_MID_BITS))
_FP4_POINTS = tl.constexpr(_floats(nf4.FP4_MID_BITS))
_TINY = tl.constexpr(nf4.TINY)
# Code of each FP4 magnitude, smallest value first: four bits each, the first lowest.
_FP4_ORDER = tl.constexpr(sum(code << 4 * i for i, code in enumerate(nf4.FP4_ORDER)))


# --- dequantize -------------------------------------------------------------------------------------------------------


@entry
def _dequantize_kernel(
    packed_ptr,
    absmax_ptr,
    nested_absmax_ptr,
    nested_offset_ptr,
    table_ptr,
    map_ptr,
    out_ptr,
    count,
    BLOCKSIZE: tl.constexpr,
    IS_NESTED: tl.constexpr,
    PER: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WORDS: tl.constexpr,
):
    """out[i] = round(table[code[i]] * scale[i // BLOCKSIZE]), i < count.

    A thread decodes words of PER codes, 16 bytes of output each, and stores them at once. WORDS: `packed` starts on a
    whole word and can be read by words.
    """
    pid = tl.program_id(0).to(tl.int64)
    start = pid * BLOCK_N  # in words; offsets from here are 32-bit
    word = spread(BLOCK_N)
    whole = word < tl.minimum(count // PER - start, BLOCK_N).to(tl.int32)
    # [BLOCK_N]
    if WORDS:
        kind: tl.constexpr = tl.uint32 if PER == 8 else (tl.uint16 if PER == 4 else tl.uint8)
        word_ptr = packed_ptr.to(tl.pointer_type(kind)) + start
        words = tl.load(word_ptr + word, mask=whole, other=0, eviction_policy="evict_first").to(tl.uint32)
    else:
        words = tl.zeros([BLOCK_N], tl.uint32)
        for byte in tl.static_range(PER // 2):
            part = tl.load(packed_ptr + start * (PER // 2) + word * (PER // 2) + byte, mask=whole, other=0)
            words = words | (part.to(tl.uint32) << (8 * byte))
    PER_BLOCK: tl.constexpr = BLOCKSIZE // PER
    blocks = ((start % PER_BLOCK).to(tl.uint32) + word.to(tl.uint32)) // PER_BLOCK
    scale = block_scales(
        absmax_ptr, nested_absmax_ptr, nested_offset_ptr, map_ptr, start // PER_BLOCK, blocks, whole, IS_NESTED
    )
    value = lookup(table_ptr, nibbles(words[:, None], PER)) * scale[:, None, None]
    # [BLOCK_N, PER]
    where = tl.arange(0, BLOCK_N)[:, None] * PER + tl.arange(0, PER)[None, :]
    result = cast(value.reshape(BLOCK_N, PER), out_ptr.dtype.element_ty)
    tl.store(out_ptr + start * PER + where, result, mask=whole[:, None])
    if pid == tl.num_programs(0) - 1:
        # The elements after the last whole word: part of one block.
        left = count % PER
        lane = tl.arange(0, PER)
        start = tl.cast(count - left, tl.int64)
        byte = tl.load(packed_ptr + start // 2 + lane // 2, mask=lane < left, other=0).to(tl.int32)
        absmax = block_scales(
            absmax_ptr, nested_absmax_ptr, nested_offset_ptr, map_ptr, start // BLOCKSIZE, 0, left > 0, IS_NESTED
        )
        rest = lookup(table_ptr, (byte >> ((lane % 2 ^ 1) * 4)) & 15) * absmax
        tl.store(out_ptr + start + lane, cast(rest, out_ptr.dtype.element_ty), mask=lane < left)


def tile_dequantize(target: Target) -> Tile:
    """BLOCK_N: words a program; a word is 16 bytes of output."""
    if target.kind == "interpreter":
        return Tile(BLOCK_N=32)
    return Tile(BLOCK_N=1024, num_warps=4)


def dequantize(weight: PackedWeight, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """fp32(code) * absmax, rounded once to `dtype` (fp32, bf16, fp16, fp64); bits of `math.nf4.dequantize`.

    Args:
        weight: of any shape.
        out: contiguous, of weight's shape and `dtype`; written and returned.
    """
    packed = weight.packed
    if out is None:
        out = torch.empty(weight.shape, dtype=dtype, device=packed.device)
    count, per = weight.numel, 16 // dtype.itemsize
    tile = tile_dequantize(target(packed.device))
    args = weight_args(weight)
    launch(
        _dequantize_kernel,
        (cdiv(count, tile.BLOCK_N * per),),
        *args.pointers,
        out,
        count,
        num_warps=tile.num_warps,
        fp_fusion=False,
        BLOCKSIZE=weight.blocksize,
        IS_NESTED=weight.nested,
        PER=per,
        BLOCK_N=tile.BLOCK_N,
        WORDS=packed.data_ptr() % (per // 2) == 0,
    )
    return out


# --- quantize ---------------------------------------------------------------------------------------------------------


@triton.jit
def _count_below(x, POINTS: tl.constexpr, COUNT: tl.constexpr):
    """How many of the ascending points lie strictly below each x; NaN counts them all."""
    count = tl.full(x.shape, COUNT, tl.int32)
    for i in tl.static_range(COUNT):
        count -= (x <= POINTS[i]).to(tl.int32)
    return count


@entry
def _quantize_kernel(
    w_ptr,
    packed_ptr,
    absmax_ptr,
    count,
    BLOCKSIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    FP4: tl.constexpr,
):
    """absmax = max|w| over each block; code = search(w / max(absmax, 1e-38)); element 2i in the high nibble."""
    start = tl.program_id(0).to(tl.int64) * BLOCK_N  # in blocks; offsets from here are 32-bit
    left = tl.minimum(count - start * BLOCKSIZE, BLOCK_N * BLOCKSIZE).to(tl.int32)
    block = tl.arange(0, BLOCK_N)
    where = block[:, None] * BLOCKSIZE + tl.arange(0, BLOCKSIZE)[None, :]
    inside = where < left
    # [BLOCK_N, BLOCKSIZE]
    w = tl.load(w_ptr + start * BLOCKSIZE + where, mask=inside, other=0.0, eviction_policy="evict_first")
    x = cast(w, tl.float32)
    # Bit patterns of magnitudes are ordered as the magnitudes are, NaN last: their maximum keeps a NaN.
    magnitude = tl.max((x.to(tl.int32, bitcast=True) & 0x7FFFFFFF), axis=1)
    absmax = magnitude.to(tl.float32, bitcast=True)
    tl.store(absmax_ptr + start + block, absmax, mask=block * BLOCKSIZE < left)
    inverse = tl.div_rn(1.0, tl.where(absmax < _TINY, _TINY, absmax))
    x = x * inverse[:, None]
    if FP4:
        code = (_FP4_ORDER >> (4 * _count_below(tl.abs(x), _FP4_POINTS, 7))) & 7
        code = code | tl.where(x < 0, 8, 0)
        code = tl.where(inside, code, 0)
    else:
        code = tl.where(inside, _count_below(x, _NF4_POINTS, 15), 7)
    high, low = tl.split(code.reshape(BLOCK_N, BLOCKSIZE // 2, 2))
    # [BLOCK_N, BLOCKSIZE // 2]
    byte = block[:, None] * (BLOCKSIZE // 2) + tl.arange(0, BLOCKSIZE // 2)[None, :]
    tl.store(packed_ptr + start * (BLOCKSIZE // 2) + byte, (high << 4 | low).to(tl.uint8), mask=byte * 2 < left)


def tile_quantize(target: Target, blocksize: int) -> Tile:
    """BLOCK_N: blocks a program."""
    if target.kind == "interpreter":
        return Tile(BLOCK_N=max(1, 256 // blocksize))
    return Tile(BLOCK_N=max(1, 4096 // blocksize), num_warps=8)


def quantize(w: Tensor, quant_type: str, blocksize: int) -> tuple[Tensor, Tensor]:
    """Bits of `math.nf4.quantize_blocks`.

    Args:
        w: contiguous fp32, bf16 or fp16 of any shape.

    Returns:
        packed uint8 [ceil(numel/2), 1], absmax fp32 [blocks].
    """
    count = w.numel()
    packed = torch.empty((cdiv(count, 2), 1), dtype=torch.uint8, device=w.device)
    absmax = torch.empty((cdiv(count, blocksize),), dtype=torch.float32, device=w.device)
    tile = tile_quantize(target(w.device), blocksize)
    launch(
        _quantize_kernel,
        (cdiv(count, tile.BLOCK_N * blocksize),),
        w,
        packed,
        absmax,
        count,
        num_warps=tile.num_warps,
        fp_fusion=False,
        BLOCKSIZE=blocksize,
        BLOCK_N=tile.BLOCK_N,
        FP4=quant_type == "fp4",
    )
    return packed, absmax
