"""Device functions alone: casts, split products, dropout bits, decoding."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from fastlora.backends.triton.primitives import cast, decode_tile, dot_terms, draw_bits, expand_bits, lookup, nibbles
from fastlora.backends.triton.weight import weight_args
from fastlora.math import nf4, philox


@triton.jit
def _cast_kernel(x_ptr, out_ptr, COUNT: tl.constexpr):
    where = tl.arange(0, COUNT)
    tl.store(out_ptr + where, cast(tl.load(x_ptr + where), out_ptr.dtype.element_ty))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_cast_rounds_to_nearest_even(dtype):
    odd = torch.tensor([0x3F808000, 0x3F818000, 0x3F818001, 0x7F7FFFFF, 1, 0x00008000], dtype=torch.int32)
    special = torch.tensor([float("inf"), -float("inf"), float("nan"), 0.0, -0.0])
    x = torch.cat([odd.view(torch.float32), special, torch.randn(53)])
    out = torch.empty(64, dtype=dtype)
    _cast_kernel[(1,)](x, out, 64)
    assert torch.equal(out.nan_to_num(5), x.to(dtype).nan_to_num(5)) and bool(out[8].isnan())


def test_cast_widens_bf16_exactly():
    x = torch.arange(0, 1 << 15, dtype=torch.int16).view(torch.bfloat16)[:32768]
    x = x[x.isfinite()][::32].contiguous()[:512]
    x = torch.cat([x, x.new_zeros(512 - x.numel())])
    out = torch.empty(512)
    _cast_kernel[(1,)](x, out, 512)
    assert torch.equal(out, x.float())


@triton.jit
def _dot_kernel(a_ptr, b_ptr, out_ptr, SIZE: tl.constexpr, TERMS: tl.constexpr):
    i = tl.arange(0, SIZE)
    where = i[:, None] * SIZE + i[None, :]
    acc = tl.zeros([SIZE, SIZE], tl.float32)
    tl.store(out_ptr + where, dot_terms(tl.load(a_ptr + where), tl.load(b_ptr + where), acc, TERMS))


@pytest.mark.parametrize(("terms", "bound"), [(2, 2.0**-14), (3, 2.0**-22)])
def test_split_products(terms, bound):
    """Elementwise in terms of |a| |b|: each more term is worth eight bits, and no more."""
    a, b = torch.randn(16, 16), torch.randn(16, 16)
    a[0] *= 1e10
    b[:, 3] *= 1e-10
    out = torch.empty(16, 16)
    _dot_kernel[(1,)](a, b, out, 16, terms)
    error = ((out.double() - a.double() @ b.double()).abs() / (a.double().abs() @ b.double().abs())).max()
    assert bound / 256 < error < bound


@triton.jit
def _bits_kernel(seed_ptr, out_ptr, stream, threshold, cols, ROWS: tl.constexpr, GROUPS: tl.constexpr):
    rows, groups = tl.arange(0, ROWS), tl.arange(0, GROUPS)
    bits = draw_bits(seed_ptr, stream, threshold, rows, groups, cols)
    where = rows[:, None] * (GROUPS * 8) + tl.arange(0, GROUPS * 8)[None, :]
    tl.store(out_ptr + where, expand_bits(bits, ROWS, GROUPS * 8))


@pytest.mark.parametrize("stream", [1, 2**32 - 1])
@pytest.mark.parametrize("cols", [1, 9, 32])
def test_bits_are_the_specification(stream, cols):
    """An argument of 1 is compiled in: `stream` and `threshold` may be constants."""
    seed, p = torch.tensor([2**40 + 7]), 1 / 65536
    out = torch.empty(4, 32, dtype=torch.bool)
    _bits_kernel[(1,)](seed, out, stream, philox.threshold(p), cols, 4, 4)
    expected = philox.unpack_bits(philox.dropout_bits(seed, stream, 4, cols, p), cols)
    assert torch.equal(out[:, :cols], expected) and not out[:, cols:].any()


@triton.jit
def _lookup_kernel(table_ptr, words_ptr, out_ptr, WORDS: tl.constexpr, PER: tl.constexpr):
    word, lane = tl.arange(0, WORDS), tl.arange(0, PER)
    codes = nibbles(tl.load(words_ptr + word), PER)
    tl.store(out_ptr + word[:, None] * PER + lane[None, :], lookup(table_ptr, codes))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.uint32])
def test_every_code_of_a_word(dtype):
    data = torch.arange(256, dtype=torch.uint8)
    table = torch.randn(16)
    codes = torch.stack([data >> 4, data & 15], dim=1).flatten()
    out = torch.empty(512)
    words = data.view(dtype)
    _lookup_kernel[(1,)](table, words, out, words.numel(), 2 * dtype.itemsize)
    assert torch.equal(out, table[codes.long()])


@triton.jit
def _decode_kernel(
    packed_ptr,
    absmax_ptr,
    nested_absmax_ptr,
    nested_offset_ptr,
    table_ptr,
    map_ptr,
    out_ptr,
    first_row,
    first_col,
    n,
    k,
    BLOCKSIZE: tl.constexpr,
    IS_NESTED: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    row = tl.program_id(0) + first_row
    tile = decode_tile(
        packed_ptr, absmax_ptr, nested_absmax_ptr, nested_offset_ptr, table_ptr, map_ptr,
        row, first_col, n, k, BLOCK_N, BLOCK_K, BLOCKSIZE, IS_NESTED, ALIGNED,
    )  # fmt: skip
    where = tl.arange(0, BLOCK_N)[:, None] * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]
    tl.store(out_ptr + where, tile)


@pytest.mark.parametrize(("k", "blocksize"), [(192, 64), (192, 32), (100, 64), (101, 32)])
@pytest.mark.parametrize("nested", [False, True])
def test_tiles_of_a_weight(k, blocksize, nested):
    """Tiles inside, across and beyond the edge; whole words or single nibbles; starts inside a block."""
    packed = nf4.pack(torch.randn(90, k), "nf4", blocksize, nested)
    dense = torch.zeros(200, 400)
    dense[:90, :k] = nf4.dequantize(packed, torch.float32)
    pointers, constexprs = weight_args(packed)
    assert constexprs["ALIGNED"] == (k == 192)
    for row, col in ((0, 0), (17, 96), (81, 160), (88, 72), (96, 224)):
        out = torch.full((16, 64), float("nan"))
        _decode_kernel[(1,)](*pointers, out, row, col, 90, k, **constexprs, BLOCK_N=16, BLOCK_K=64)
        assert torch.equal(out, dense[row : row + 16, col : col + 64])
