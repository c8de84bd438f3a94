"""The "skinny" plan: y = c ∘ (x wᵀ + s h bᵀ) + bias for a few tokens and a 4-bit weight, bound by reading the weight.

    planes[p] = x[:, p] w[:, p]ᵀ      one program a block of rows of w and a slice p of k, fp32
    y = c ∘ (Σ_p planes[p] + s h bᵀ) + bias

The codes' sixteen values, rounded to the type of x, go to the matrix units as they are; the scale of a block of w
multiplies the block's sum. So nothing is multiplied per element. Both nibbles of a byte stay apart: the high ones meet
the even columns of x, the low ones the odd columns.

The table lookup is what costs. On CUDA four bytes become eight 16-bit values in 21 byte permutations and logical
operations, without memory: the eight low and eight high codes' bytes are looked up by `prmt`, whose selector takes
nibbles as they are, and bit 3 chooses between the two (`decode_pairs`). Elsewhere the table is read.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastlora.backends.triton import weight as weights
from fastlora.backends.triton.dense import DTYPES, column_factor, load_block, low_rank, precision, ranks, two_terms
from fastlora.backends.triton.launch import Target, Tile, cdiv, entry, launch, target
from fastlora.backends.triton.primitives import block_scales, cast, decode_tile, dot, lookup, offsets
from fastlora.math.nf4 import PackedWeight

PROGRAMS = 4  # programs a multiprocessor should get, so that one decodes while others wait for memory
FINISH = 128  # columns a program of the finishing kernel writes


def tile_skinny(at: Target, m: int, dtype: torch.dtype, aligned: bool = True) -> Tile:
    """Rows of x, rows of w and columns of one step."""
    if at.kind == "interpreter":
        return Tile(16, 32, 64, 1, 1)
    rows = 16 if m <= 16 else 32 if m <= 32 else 64
    if not aligned:  # an address and a scale for each element
        return Tile(min(rows, 16 if dtype == torch.float32 else 32), 64, 32, 8, 2)
    if dtype == torch.float32:
        return Tile(min(rows, 32) if at.kind == "cuda" and at.arch < 90 else rows, 64, 64, 4, 2)
    if at.kind == "hip":
        return Tile(rows, 64, 128, 4, 2)
    return Tile(rows, 128 if rows < 64 else 64, 256 if rows < 64 else 128, 4, 3)


def splits_of(at: Target, n: int, k: int, tile: Tile) -> int:
    """Slices of k: enough programs for the device, at least two steps each."""
    blocks, steps = cdiv(n, tile.BLOCK_N), cdiv(k, tile.BLOCK_K)
    wanted = max(1, PROGRAMS * at.sms // blocks)
    per = max(2, cdiv(steps, wanted)) if steps > 1 else 1
    return cdiv(steps, per)


# --- decoding four bytes at once --------------------------------------------------------------------------------------


def code_words(quant_type: str, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The table in 16 bits as `decode_pairs` takes it: int32 [8, 32].

    The high bytes of codes 0..15 in four words, then the low bytes, a copy for each lane.
    """

    def make() -> Tensor:
        bits = weights.table(quant_type, device).to(dtype).view(torch.uint8).view(16, 2)  # little-endian
        words = bits.T.flip(0).contiguous().view(torch.int32).reshape(8, 1)
        return words.expand(8, 32).contiguous()

    return weights.made_once((quant_type, dtype), device, make)


def _decode_asm() -> str:
    """PTX: $4 = four packed bytes -> $0,$1 the values of their high nibbles, $2,$3 those of their low nibbles.

    Nibbles are `prmt`'s selectors as they are: their low three bits find a byte among eight, bit 3 then chooses between
    the finds of both halves of the table. A 32-bit argument comes as four equal registers beside four bytes.
    """
    words = [f"${5 + 4 * index}" for index in range(8)]
    lines = [
        ".reg .b32 code, pick, p, q, hi, lo;",
        "and.b32 code, $4, 0x77777777;",
        "shr.u32 pick, $4, 1;",
        "and.b32 pick, pick, 0x44444444;",
        "or.b32 pick, pick, 0x32103210;",
    ]
    for half in range(2):
        if half:
            lines += ["shr.u32 code, code, 16;", "shr.u32 pick, pick, 16;"]
        for name, plane in (("hi", words[:4]), ("lo", words[4:])):
            lines += [
                f"prmt.b32 p, {plane[0]}, {plane[1]}, code;",
                f"prmt.b32 q, {plane[2]}, {plane[3]}, code;",
                f"prmt.b32 {name}, p, q, pick;",
            ]
        lines += [f"prmt.b32 ${half}, lo, hi, 0x7351;", f"prmt.b32 ${2 + half}, lo, hi, 0x6240;"]
    return "{ " + " ".join(lines) + " }"


DECODE_ASM = tl.constexpr(_decode_asm())
DECODE_OPERANDS = tl.constexpr("=r,=r,=r,=r,r" + ",r" * 32)


def words_for(at: Target, weight: PackedWeight, dtype: torch.dtype) -> Tensor | None:
    """`code_words` of a weight, or None where the table is read: other devices, fp32, a tensor's own table."""
    if at.kind != "cuda" or dtype == torch.float32 or weight.code is not None:
        return None
    return code_words(weight.quant_type, dtype, weight.packed.device)


@triton.jit
def _word(words_ptr, index: tl.constexpr):
    """One word, each lane its own copy: a value known to be the same in all lanes would be kept in a uniform register,
    which `prmt` takes once at most, and copied out at every use."""
    lane = tl.inline_asm_elementwise(
        "mov.u32 $0, %laneid;", "=r,r", [tl.program_id(0)], dtype=tl.int32, is_pure=True, pack=1
    )
    return tl.load(words_ptr + index * 32 + lane)


@triton.jit
def load_words(words_ptr, HAS_WORDS: tl.constexpr):
    """The eight words of `code_words`, for `decode_pairs`; nothing where the table is read."""
    if HAS_WORDS:
        a, b, c, d = _word(words_ptr, 0), _word(words_ptr, 1), _word(words_ptr, 2), _word(words_ptr, 3)
        e, f, g, h = _word(words_ptr, 4), _word(words_ptr, 5), _word(words_ptr, 6), _word(words_ptr, 7)
        return a, b, c, d, e, f, g, h
    else:
        return 0, 0, 0, 0, 0, 0, 0, 0


@triton.jit
def decode_pairs(byte, words, table_ptr, DTYPE: tl.constexpr, HAS_WORDS: tl.constexpr):
    """The table's values of the high and the low nibbles, rounded to DTYPE; uint8 [...] -> two of the same shape."""
    if HAS_WORDS:
        a, b, c, d, e, f, g, h = words
        arguments = [byte, a, b, c, d, e, f, g, h]
        if tl.bfloat16 == DTYPE:
            return tl.inline_asm_elementwise(
                DECODE_ASM, DECODE_OPERANDS, arguments, dtype=(tl.bfloat16, tl.bfloat16), is_pure=True, pack=4
            )
        else:
            return tl.inline_asm_elementwise(
                DECODE_ASM, DECODE_OPERANDS, arguments, dtype=(tl.float16, tl.float16), is_pure=True, pack=4
            )
    else:
        return cast(lookup(table_ptr, byte >> 4), DTYPE), cast(lookup(table_ptr, byte & 15), DTYPE)


@triton.jit
def segment(scales, index: tl.constexpr, SEGMENTS: tl.constexpr):
    """Column `index` of scales [i, SEGMENTS]."""
    if SEGMENTS == 1:
        return scales.reshape(scales.shape[0])
    else:
        even, odd = tl.split(scales.reshape(scales.shape[0], SEGMENTS // 2, 2))
        if index % 2 == 0:
            return segment(even, index // 2, SEGMENTS // 2)
        else:
            return segment(odd, index // 2, SEGMENTS // 2)


@triton.jit
def step_scales(
    absmax_ptr,
    nested_absmax_ptr,
    nested_offset_ptr,
    map_ptr,
    row,
    start,
    n,
    k,
    BLOCK_N: tl.constexpr,
    SPAN: tl.constexpr,
    SEGMENTS: tl.constexpr,
    BLOCKSIZE: tl.constexpr,
    IS_NESTED: tl.constexpr,
):
    """fp32 [BLOCK_N, SEGMENTS]: the scales of w[row :, start + i SPAN]; 0 outside."""
    rows, spans = tl.arange(0, BLOCK_N), tl.arange(0, SEGMENTS)
    valid = (row + rows < n)[:, None] & (start + spans * SPAN < k)[None, :]
    first = row.to(tl.int64) * (k // BLOCKSIZE) + start // BLOCKSIZE
    blocks = (rows * (k // BLOCKSIZE)).to(tl.uint32)[:, None] + spans.to(tl.uint32)[None, :]
    return block_scales(absmax_ptr, nested_absmax_ptr, nested_offset_ptr, map_ptr, first, blocks, valid, IS_NESTED)


@triton.jit
def block_product(
    acc,
    x,
    packed_ptr,
    table_ptr,
    words,
    scale,
    row,
    half,
    n,
    k_half,
    DTYPE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPAN: tl.constexpr,
    PRECISION: tl.constexpr,
    HAS_WORDS: tl.constexpr,
):
    """acc [BLOCK_N, BLOCK_M] + w xᵀ over SPAN columns of one scale each row, from byte `half` of each row of w on."""
    rows, halves = tl.arange(0, BLOCK_N), half + tl.arange(0, SPAN // 2)
    inside = (row + rows < n)[:, None] & (halves < k_half)[None, :]
    # [BLOCK_N, SPAN // 2]
    where = packed_ptr + row.to(tl.int64) * k_half + (rows[:, None] * k_half + halves[None, :])
    byte = tl.load(where, mask=inside, other=0, eviction_policy="evict_first")
    high, low = decode_pairs(byte, words, table_ptr, DTYPE, HAS_WORDS)
    even, odd = tl.split(x.reshape(BLOCK_M, SPAN // 2, 2))
    part = dot(high, even.trans(), tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32), PRECISION)
    part = dot(low, odd.trans(), part, PRECISION)
    return acc + part * scale[:, None]


# --- kernels ----------------------------------------------------------------------------------------------------------


@entry
def skinny_kernel(
    x_ptr,
    packed_ptr,
    absmax_ptr,
    nested_absmax_ptr,
    nested_offset_ptr,
    table_ptr,
    map_ptr,
    words_ptr,
    planes_ptr,
    m,
    n,
    k,
    k_half,
    size,
    steps,
    DTYPE: tl.constexpr,
    BLOCKSIZE: tl.constexpr,
    IS_NESTED: tl.constexpr,
    ALIGNED: tl.constexpr,
    HAS_WORDS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
):
    """planes[p] = x[:, slice p] w[:, slice p]ᵀ, a slice being `steps` blocks of columns."""
    row, token = tl.program_id(0) * BLOCK_N, tl.program_id(2) * BLOCK_M
    first, first_half = tl.program_id(1) * steps * BLOCK_K, tl.program_id(1) * steps * (BLOCK_K // 2)
    words = load_words(words_ptr, HAS_WORDS)
    acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    SPAN: tl.constexpr = BLOCKSIZE if ALIGNED and BLOCKSIZE < BLOCK_K else BLOCK_K
    SEGMENTS: tl.constexpr = BLOCK_K // SPAN
    for step in range(steps):
        start = first + step * BLOCK_K
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
            x = load_block(x_ptr, token, start + index * SPAN, m, k, BLOCK_M, SPAN, False, WIDE)
            if ALIGNED:
                half = first_half + step * (BLOCK_K // 2) + index * (SPAN // 2)
                scale = segment(scales, index, SEGMENTS)
                acc = block_product(
                    acc,
                    x,
                    packed_ptr,
                    table_ptr,
                    words,
                    scale,
                    row,
                    half,
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
    rows, tokens = row + tl.arange(0, BLOCK_N), token + tl.arange(0, BLOCK_M)
    out = planes_ptr + tl.program_id(1).to(tl.int64) * size + offsets(tokens, n, rows, WIDE)
    tl.store(out, acc.trans(), mask=(tokens < m)[:, None] & (rows < n)[None, :])


@entry
def finish_kernel(
    planes_ptr,
    y_ptr,
    z_ptr,
    h_ptr,
    b_ptr,
    mag_ptr,
    norm_ptr,
    bias_ptr,
    scale,
    m,
    n,
    r,
    size,
    splits,
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
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
):
    """z = Σ_p planes[p] + scale h bᵀ in the order of p;  y = (mag / norm) ∘ z + bias."""
    row, col = tl.program_id(1) * BLOCK_M, tl.program_id(0) * BLOCK_N
    rows, cols = row + tl.arange(0, BLOCK_M), col + tl.arange(0, BLOCK_N)
    inside = (rows < m)[:, None] & (cols < n)[None, :]
    where = offsets(rows, n, cols, WIDE)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for _ in range(splits):
        # [BLOCK_M, BLOCK_N]
        acc += tl.load(planes_ptr + where, mask=inside, other=0.0)
        planes_ptr += size
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
        tl.store(z_ptr + where, cast(acc, DTYPE), mask=inside)
    if HAS_C:
        acc = acc * column_factor(mag_ptr, norm_ptr, cols, n)[None, :]
    if HAS_BIAS:
        acc = acc + tl.load(bias_ptr + cols, mask=cols < n, other=0.0).to(tl.float32)[None, :]
    tl.store(y_ptr + where, cast(acc, DTYPE), mask=inside)


# --- launchers --------------------------------------------------------------------------------------------------------


def _partial(x: Tensor, weight: PackedWeight, at: Target, wide: bool) -> Tensor:
    """fp32 planes [splits, m, n] that sum to x wᵀ."""
    (m, k), n, dtype = x.shape, weight.shape[0], x.dtype
    arguments, words = weights.weight_args(weight), words_for(at, weight, dtype)
    tile = tile_skinny(at, m, dtype, arguments.constexprs["ALIGNED"])
    splits = splits_of(at, n, k, tile)
    planes = torch.empty((splits, m, n), dtype=torch.float32, device=x.device)
    launch(
        skinny_kernel,
        (cdiv(n, tile.BLOCK_N), splits, cdiv(m, tile.BLOCK_M)),
        x,
        *arguments.pointers,
        words,
        planes,
        m,
        n,
        k,
        k // 2,
        m * n,
        cdiv(cdiv(k, tile.BLOCK_K), splits),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        DTYPE=DTYPES[dtype],
        **arguments.constexprs,
        HAS_WORDS=words is not None,
        BLOCK_M=tile.BLOCK_M,
        BLOCK_N=tile.BLOCK_N,
        BLOCK_K=tile.BLOCK_K,
        PRECISION=precision(at, dtype),
        WIDE=wide,
    )
    return planes


def skinny(
    x: Tensor,
    weight: PackedWeight,
    h: Tensor | None,
    b: Tensor | None,
    scale: float,
    *,
    mag: Tensor | None = None,
    norm: Tensor | None = None,
    bias: Tensor | None = None,
    need_z: bool = False,
    wide: bool | None = None,
) -> tuple[Tensor, Tensor | None]:
    """y = c ∘ (x wᵀ + scale h bᵀ) + bias for few rows of x: two launches.

    Args:
        x: [m,k] in bf16, fp16 or fp32; weight: of shape (n,k).
        h: fp32 [m,r] or None; b: [n,r] with it.
        mag, norm: [n], both or neither: c = mag / norm. bias: [n] or None.
        need_z: also return z = x wᵀ + scale h bᵀ.
        wide: 64-bit offsets; by default where a matrix needs them.

    Returns:
        y [m,n] and z [m,n] or None, in x's dtype. All inputs contiguous.
    """
    m, n, dtype, at = x.shape[0], weight.shape[0], x.dtype, target(x.device)
    y = torch.empty((m, n), dtype=dtype, device=x.device)
    z = torch.empty_like(y) if need_z else None
    if not y.numel():
        return y, z
    wide = weights.wide(x, weight, y, h, b) if wide is None else wide
    planes = _partial(x, weight, at, wide)
    r = 0 if h is None else h.shape[1]
    rows = 16 if m <= 16 else 32
    columns = 32 if at.kind == "interpreter" else FINISH if cdiv(n, FINISH) >= at.sms else 32
    launch(
        finish_kernel,
        (cdiv(n, columns), cdiv(m, rows)),
        planes,
        y,
        z,
        h if r else None,
        b if r else None,
        mag,
        norm,
        bias,
        float(scale),
        m,
        n,
        r,
        m * n,
        planes.shape[0],
        num_warps=4,
        num_stages=2,
        DTYPE=DTYPES[dtype],
        HAS_LORA=r > 0,
        HAS_C=mag is not None,
        HAS_BIAS=bias is not None,
        NEED_Z=need_z,
        TWO_TERMS=two_terms(dtype, r, need_z),
        **ranks(r),
        BLOCK_M=rows,
        BLOCK_N=columns,
        PRECISION=precision(at, dtype),
        WIDE=wide,
    )
    return y, z
