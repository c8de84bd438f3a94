"""Device functions every kernel shares: exact casts, matrix products, dropout bits, decoding of 4-bit weights.

The interpreter multiplies the bit patterns of bf16 operands and truncates casts to bf16; `dot` and `cast` do the right
thing there and cost nothing when compiled. Names: upper case is a compile-time constant; a shape comment stands above
each load.
"""

from __future__ import annotations

import triton
import triton.language as tl

INTERPRET = tl.constexpr(bool(triton.knobs.runtime.interpret))

_M0 = tl.constexpr(0xD2511F53)
_M1 = tl.constexpr(0xCD9E8D57)
_W0 = tl.constexpr(0x9E3779B9)
_W1 = tl.constexpr(0xBB67AE85)
NESTED = tl.constexpr(256)  # scales per second-level scale
SLAB = tl.constexpr(32)  # columns of a slab, see `decode_slabs`


@triton.jit
def cast(x, dtype: tl.constexpr):
    """x rounded to nearest even in `dtype`."""
    if INTERPRET and x.dtype == tl.bfloat16:  # the interpreter widens denormals wrongly
        x = (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    if INTERPRET and dtype == tl.bfloat16:
        bits = x.to(tl.float32).to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        nan = (bits & 0x7FFFFFFF) > 0x7F800000
        return tl.where(nan, 0x7FC0, rounded).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return x.to(dtype)


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a b with fp32 accumulation; a [i,j], b [j,l] of one dtype. PRECISION matters to fp32 operands only."""
    if INTERPRET:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def offsets(rows, stride, cols, WIDE: tl.constexpr):
    """rows[:, None] * stride + cols[None, :]; 64-bit where WIDE (a tensor of 2^31 elements or more)."""
    if WIDE:
        return rows.to(tl.int64)[:, None] * stride + cols[None, :]
    else:  # not a plain return: the compiler would type both branches alike
        return rows[:, None] * stride + cols[None, :]


@triton.jit
def _upper_half(x):
    """x truncated to a bf16 number: as bf16, and what is left of x (exact)."""
    bits = x.to(tl.uint32, bitcast=True)
    upper = (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return upper, x - (bits & 0xFFFF0000).to(tl.float32, bitcast=True)


@triton.jit
def _bf16_terms(x):
    """x = high + middle + low, three bf16 numbers of eight bits each; finite fp32 x.

    Truncating takes a mask and a subtraction; rounding would take a conversion each, at a quarter of the rate.
    """
    high, rest = _upper_half(x)
    middle, rest = _upper_half(rest)
    low, _ = _upper_half(rest)
    return high, middle, low


@triton.jit
def dot_terms(a, b, acc, TERMS: tl.constexpr):
    """acc + a b with fp32 accumulation; a [i,j], b [j,l] of one dtype.

    TERMS 1: a, b as they are (bf16, fp16). TERMS 2 or 3: fp32 operands as sums of so many bf16 numbers, on bf16 matrix
    instructions; products are exact to about 2^-15 or 2^-23, the smallest added first.
    """
    if TERMS == 1:
        return dot(a, b, acc, "ieee")
    else:
        a1, a2, a3 = _bf16_terms(a)
        b1, b2, b3 = _bf16_terms(b)
        if TERMS == 3:
            acc = dot(a3, b1, acc, "ieee")
            acc = dot(a1, b3, acc, "ieee")
            acc = dot(a2, b2, acc, "ieee")
        acc = dot(a2, b1, acc, "ieee")
        acc = dot(a1, b2, acc, "ieee")
        return dot(a1, b1, acc, "ieee")


# --- dropout: the specification of math/philox.py ---------------------------------------------------------------------


@triton.jit
def _philox_round(c0, c1, c2, c3, k0, k1):
    high0, low0 = tl.umulhi(c0, c0 * 0 + _M0), c0 * _M0
    high1, low1 = tl.umulhi(c2, c2 * 0 + _M1), c2 * _M1
    return high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0


@triton.jit
def _lanes(word, threshold, SHIFT: tl.constexpr):
    """The two keep bits of a 32-bit word, low half first, at bit SHIFT."""
    low = ((word & 0xFFFF) >= threshold).to(tl.uint32)
    high = ((word >> 16) >= threshold).to(tl.uint32)
    return (low << SHIFT) | (high << (SHIFT + 1))


@triton.jit
def draw_bits(seed_ptr, stream, threshold, rows, groups, cols):
    """Dropout bits of eight columns each: rows [i], groups [j] (column >> 3) -> uint8 [i, j]; 0 beyond `cols`.

    Philox4x32-10, key = seed, counter = (group, row low, row high, stream); lane >= threshold keeps.
    """
    seed = tl.load(seed_ptr).to(tl.uint64)
    k0, k1 = (seed & 0xFFFFFFFF).to(tl.uint32), (seed >> 32).to(tl.uint32)
    row = rows.to(tl.uint64)[:, None]
    zero = (rows[:, None] * 0 + groups[None, :] * 0).to(tl.uint32)
    c0 = zero + groups.to(tl.uint32)[None, :]
    c1, c2 = zero + (row & 0xFFFFFFFF).to(tl.uint32), zero + (row >> 32).to(tl.uint32)
    c3 = zero + tl.cast(stream, tl.uint32)
    k0, k1 = zero + k0, zero + k1
    for _ in tl.static_range(10):
        c0, c1, c2, c3 = _philox_round(c0, c1, c2, c3, k0, k1)
        k0, k1 = k0 + _W0, k1 + _W1
    limit = tl.cast(threshold, tl.uint32)
    bits = _lanes(c0, limit, 0) | _lanes(c1, limit, 2) | _lanes(c2, limit, 4) | _lanes(c3, limit, 6)
    left = cols - groups * 8  # columns of the group that exist
    inside = (1 << tl.minimum(tl.maximum(left, 0), 8)) - 1
    return (bits & inside.to(tl.uint32)[None, :]).to(tl.uint8)


@triton.jit
def expand_bits(bits, ROWS: tl.constexpr, COLS: tl.constexpr):
    """uint8 [ROWS, COLS/8] -> int1 [ROWS, COLS], least significant bit first."""
    lane = tl.arange(0, 8).to(tl.uint8)
    return (((bits[:, :, None] >> lane[None, None, :]) & 1) != 0).reshape(ROWS, COLS)


# --- 4-bit weights: the format of math/nf4.py -------------------------------------------------------------------------


@triton.jit
def block_scales(
    absmax_ptr, nested_absmax_ptr, nested_offset_ptr, map_ptr, first, blocks, valid, IS_NESTED: tl.constexpr
):
    """fp32 scales of blocks first + blocks: absmax, or map[u8] * nested_absmax + offset: two roundings, unfused.

    `first` is a scalar and may need 64 bits, `blocks` is uint32: per element, addresses are 32-bit offsets.
    """
    if IS_NESTED:
        codes = tl.load(absmax_ptr + first + blocks, mask=valid, other=0).to(tl.int32)
        groups = ((first % NESTED).to(tl.uint32) + blocks) // NESTED
        second = tl.load(nested_absmax_ptr + first // NESTED + groups, mask=valid, other=0.0)
        return tl.load(map_ptr + codes) * second + tl.load(nested_offset_ptr)
    else:
        return tl.load(absmax_ptr + first + blocks, mask=valid, other=0.0)


@triton.jit
def lookup(table_ptr, codes):
    """table[code] in fp32, of the shape of `codes`.

    The sixteen values go to shared memory once a call and are gathered from there. Loading each value by its address
    instead takes two instructions more an element (64-bit addresses).
    """
    table = tl.load(table_ptr + tl.arange(0, 16))
    return tl.gather(table, tl.ravel(codes.to(tl.int32)), 0).reshape(codes.shape)


@triton.jit
def spread(COUNT: tl.constexpr):
    """0 .. COUNT-1 for loads of one element a thread, neighbours to neighbours: what the thread then decodes from its
    word is what it stores at once, and nothing moves between threads."""
    return tl.max_contiguous(tl.arange(0, COUNT), 1)


@triton.jit
def nibbles(words, PER: tl.constexpr):
    """Little-endian words of PER codes each, any shape -> int32 [..., PER] in the order of the elements."""
    # The high nibble of a byte comes first.
    shift = ((tl.arange(0, PER) ^ 1) * 4).to(tl.uint32)
    return (tl.expand_dims(words.to(tl.uint32), -1) >> shift).to(tl.int32) & 15


@triton.jit
def slab_offsets(row_stride, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """Offsets of a tile cut into slabs of SLAB columns, int32 [BLOCK_K / SLAB, BLOCK_N, SLAB], and its columns."""
    cols = (tl.arange(0, BLOCK_K // SLAB) * SLAB)[:, None, None] + tl.arange(0, SLAB)[None, None, :]
    return (tl.arange(0, BLOCK_N) * row_stride)[None, :, None] + cols, cols


@triton.jit
def decode_slabs(
    packed_ptr,
    absmax_ptr,
    nested_absmax_ptr,
    nested_offset_ptr,
    table_ptr,
    map_ptr,
    first_row,
    first_col,
    n,
    k,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCKSIZE: tl.constexpr,
    IS_NESTED: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """The tile of w at (first_row, first_col), fp32 [BLOCK_K / SLAB, BLOCK_N, SLAB], 0 outside; code * absmax.

    ALIGNED: k is a multiple of BLOCKSIZE, first_col of 8, and `packed` starts on a whole 32-bit word: one load and one
    scale for eight weights. Otherwise each element finds its own nibble and block in the flat weight. Sizes need no
    WIDE: the tile's start is 64-bit, offsets in it are 32-bit.
    """
    COUNT: tl.constexpr = BLOCK_K // SLAB
    inside_n = (tl.arange(0, BLOCK_N) < n - first_row)[None, :, None]
    if ALIGNED:
        WORDS: tl.constexpr = SLAB // 8
        rows = tl.arange(0, BLOCK_N)[None, :, None]
        word = (tl.arange(0, COUNT) * WORDS)[:, None, None] + spread(WORDS)[None, None, :]
        inside = inside_n & (word * 8 < k - first_col)
        start = first_row.to(tl.int64) * (k // 8) + first_col // 8
        # [COUNT, BLOCK_N, WORDS]
        word_ptr = packed_ptr.to(tl.pointer_type(tl.uint32)) + start
        words = tl.load(word_ptr + (rows * (k // 8) + word), mask=inside, other=0, eviction_policy="evict_first")
        first = first_row.to(tl.int64) * (k // BLOCKSIZE) + first_col // BLOCKSIZE
        column = (first_col % BLOCKSIZE // 8 + word).to(tl.uint32) // (BLOCKSIZE // 8)
        blocks = (rows * (k // BLOCKSIZE)).to(tl.uint32) + column
        scale = block_scales(
            absmax_ptr, nested_absmax_ptr, nested_offset_ptr, map_ptr, first, blocks, inside, IS_NESTED
        )
        value = lookup(table_ptr, nibbles(words, 8)) * tl.expand_dims(tl.where(inside, scale, 0.0), -1)
        return value.reshape(COUNT, BLOCK_N, SLAB)
    else:
        flat, cols = slab_offsets(k, BLOCK_N, BLOCK_K)
        inside = inside_n & (cols < k - first_col)
        start = first_row.to(tl.int64) * k + first_col
        # [COUNT, BLOCK_N, SLAB]
        nibble = (start % 2).to(tl.int32) + flat
        byte = tl.load(packed_ptr + start // 2 + nibble // 2, mask=inside, other=0).to(tl.int32)
        code = (byte >> ((nibble % 2 ^ 1) * 4)) & 15
        blocks = ((start % BLOCKSIZE).to(tl.int32) + flat).to(tl.uint32) // BLOCKSIZE
        scale = block_scales(
            absmax_ptr, nested_absmax_ptr, nested_offset_ptr, map_ptr, start // BLOCKSIZE, blocks, inside, IS_NESTED
        )
        return tl.where(inside, lookup(table_ptr, code) * scale, 0.0)


@triton.jit
def decode_tile(
    packed_ptr,
    absmax_ptr,
    nested_absmax_ptr,
    nested_offset_ptr,
    table_ptr,
    map_ptr,
    first_row,
    first_col,
    n,
    k,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCKSIZE: tl.constexpr,
    IS_NESTED: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """`decode_slabs` as fp32 [BLOCK_N, BLOCK_K]."""
    value = decode_slabs(
        packed_ptr, absmax_ptr, nested_absmax_ptr, nested_offset_ptr, table_ptr, map_ptr,
        first_row, first_col, n, k, BLOCK_N, BLOCK_K, BLOCKSIZE, IS_NESTED, ALIGNED,
    )  # fmt: skip
    return value.permute(1, 0, 2).reshape(BLOCK_N, BLOCK_K)
