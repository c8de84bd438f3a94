"""The 4-bit format: tables, codes and values against bitsandbytes and against a flat numpy oracle."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastlora.math import nf4, nf4_header
from tests.nf4_oracle import CODES, NF4, oracle_absmax, oracle_codes, oracle_unpack, oracle_values, random_packed

HALF = (torch.bfloat16, torch.float16)
FLOAT = (torch.float32, *HALF)
# in_features: rows shorter than, straddling and not divisible by a block; odd ones give odd counts with odd rows.
WIDTHS = (7, 16, 32, 33, 48, 64, 80, 96, 100, 1040, 4304)


@pytest.fixture(scope="module")
def bnb():
    return pytest.importorskip("bitsandbytes.functional")


# --- tables -----------------------------------------------------------------------------------------------------------


def test_tables_are_the_published_decimals():
    for quant_type, values in CODES.items():
        assert np.array_equal(nf4.table(quant_type).numpy(), values)
    middles = (NF4[:-1] + NF4[1:]) / np.float32(2)
    assert np.array_equal(nf4.midpoints("nf4").numpy(), middles)
    magnitudes = nf4.table("fp4")[list(nf4.FP4_ORDER)]
    assert torch.equal(magnitudes, magnitudes.sort().values)
    assert torch.equal(nf4.midpoints("fp4"), (magnitudes[:-1] + magnitudes[1:]) / 2)


def test_dynamic_map_is_its_formula():
    exact = [0.0, 1.0]
    for e in range(7):
        edges = np.linspace(0.1, 1, 2**e + 1)
        means = 10.0 ** (e - 6) * (edges[:-1] + edges[1:]) / 2
        exact += [*means, *-means]
    table = nf4.dynamic_map().double().numpy()
    assert table.size == 256
    assert table[127] == 0
    error = np.abs(table - np.sort(exact))
    assert (error <= 2.0**-22 * np.abs(table)).all()
    entries, middles = nf4.dynamic_map().double(), nf4.dynamic_midpoints()
    exact_middles = (entries[:-1] + entries[1:]) / 2
    assert (middles.double() <= exact_middles).all()
    assert (torch.nextafter(middles, torch.tensor(torch.inf)).double() > exact_middles).all()


def test_tables_are_those_of_bitsandbytes(bnb):
    for quant_type in nf4.QUANT_TYPES:
        assert torch.equal(nf4.table(quant_type), bnb.get_4bit_type(quant_type, device="cpu"))
    assert torch.equal(nf4.dynamic_map(), bnb.create_dynamic_map())


def test_header_is_current_and_exact():
    path = Path(__file__).parents[1] / "csrc" / "include" / "nf4_table.h"
    text = path.read_text()
    assert text == nf4_header.header(), "run: python -m fastlora.math.nf4_header > csrc/include/nf4_table.h"
    arrays = dict(re.findall(r"FL_TABLE float (\w+)\[\d+\] = \{(.*?)\};", text, re.DOTALL))
    expected = {
        "fl_nf4_code": nf4.table("nf4"),
        "fl_nf4_mid": nf4.midpoints("nf4"),
        "fl_fp4_code": nf4.table("fp4"),
        "fl_fp4_mid": nf4.midpoints("fp4"),
        "fl_dynamic_map": nf4.dynamic_map(),
        "fl_dynamic_mid": nf4.dynamic_midpoints(),
    }
    assert arrays.keys() == expected.keys()
    for name, values in expected.items():
        written = [float.fromhex(word.strip().removesuffix("f")) for word in arrays[name].split(",") if word.strip()]
        assert torch.equal(torch.tensor(written, dtype=torch.float64), values.double()), name


# --- quantize ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("blocksize", nf4.BLOCKSIZES)
@pytest.mark.parametrize("dtype", HALF)
def test_half_sources_give_bitsandbytes_bytes(bnb, dtype, blocksize):
    torch.manual_seed(blocksize)
    for shape in ((256, 512), (33, 100), (5, 33), (1, 1)):
        w = torch.randn(shape).to(dtype)
        packed, absmax = nf4.quantize_blocks(w, "nf4", blocksize)
        theirs, state = bnb.quantize_4bit(w, blocksize=blocksize, quant_type="nf4")
        assert torch.equal(packed, theirs)
        assert torch.equal(absmax, state.absmax)


def test_fp32_sources_differ_in_a_millionth_of_the_codes_at_most(bnb):
    torch.manual_seed(0)
    w = torch.randn(1448, 1448)
    for blocksize in (32, 64, 4096):
        packed, absmax = nf4.quantize_blocks(w, "nf4", blocksize)
        theirs, state = bnb.quantize_4bit(w, blocksize=blocksize, quant_type="nf4")
        assert torch.equal(absmax, state.absmax)
        steps = np.abs(oracle_unpack(packed, w.numel()).astype(int) - oracle_unpack(theirs, w.numel()))
        print(f"fp32 codes unlike bitsandbytes at {blocksize}: {(steps > 0).sum()} of {w.numel()}")
        assert steps.max() <= 1
        assert (steps > 0).mean() <= 1e-6


@pytest.mark.parametrize("dtype", FLOAT)
def test_fp4_gives_bitsandbytes_values(bnb, dtype):
    """Bytes may differ (two codes of zero); a negative tie goes to the smaller magnitude here, to the larger there."""
    torch.manual_seed(1)
    for blocksize in nf4.BLOCKSIZES:
        w = torch.randn(200, 321).to(dtype)
        packed, absmax = nf4.quantize_blocks(w, "fp4", blocksize)
        theirs, state = bnb.quantize_4bit(w, blocksize=blocksize, quant_type="fp4")
        assert torch.equal(absmax, state.absmax)
        ours, peers = (oracle_values(p, absmax, "fp4", blocksize, w.numel()) for p in (packed, theirs))
        inv = np.float32(1) / np.repeat(absmax.numpy(), blocksize)[: w.numel()]
        tie = np.isin(np.abs(w.float().numpy().ravel() * inv), nf4.midpoints("fp4").numpy())
        assert torch.equal(ours[~tie], peers[~tie])
        assert tie.mean() < 0.01


@settings(derandomize=True, deadline=None, max_examples=80)
@given(
    count=st.integers(0, 700),
    blocksize=st.sampled_from(nf4.BLOCKSIZES),
    dtype=st.sampled_from(FLOAT),
    quant_type=st.sampled_from(nf4.QUANT_TYPES),
    exponent=st.integers(-44, 37),
    seed=st.integers(0, 2**31),
)
def test_quantize_is_the_oracle(count, blocksize, dtype, quant_type, exponent, seed):
    generator = torch.Generator().manual_seed(seed)
    if dtype == torch.float16:
        exponent = max(-8, min(exponent, 4))
    w = (torch.randn(count, generator=generator, dtype=torch.float64) * 10.0**exponent).to(dtype)
    w[torch.rand(count, generator=generator) < 0.1] = 0
    packed, absmax = nf4.quantize_blocks(w, quant_type, blocksize)
    assert packed.shape == ((count + 1) // 2, 1)
    assert packed.dtype == torch.uint8
    flat = w.float().numpy()
    expected = oracle_absmax(flat, blocksize)
    assert np.array_equal(absmax.numpy(), expected)
    assert np.array_equal(oracle_unpack(packed, count), oracle_codes(flat, expected, quant_type, blocksize))
    if count % 2:
        assert int(packed[-1]) & 15 == (7 if quant_type == "nf4" else 0), "the pad nibble must encode zero"


def test_ties_take_the_lower_code():
    middles = nf4.midpoints("nf4")
    above = torch.nextafter(middles, torch.tensor(torch.inf))
    w = torch.cat([torch.ones(1), middles, torch.ones(1), above])  # one block, absmax 1
    codes = oracle_unpack(nf4.quantize_blocks(w, "nf4", 32)[0], 32)
    assert codes[1:16].tolist() == list(range(15))
    assert codes[17:].tolist() == list(range(1, 16))
    middles = nf4.midpoints("fp4")
    w = torch.cat([torch.ones(1), middles, -middles])
    codes = oracle_unpack(nf4.quantize_blocks(w, "fp4", 32)[0], 15)
    assert codes[1:8].tolist() == list(nf4.FP4_ORDER[:7])
    assert codes[8:].tolist() == [8 + code for code in nf4.FP4_ORDER[:7]]


def test_high_nibble_first():
    assert nf4.quantize_blocks(torch.tensor([1.0, -1.0]))[0].tolist() == [[0xF0]]


@pytest.mark.parametrize("tail", [False, True])
@pytest.mark.parametrize("dtype", FLOAT)
def test_block_of_zeros(dtype, tail):
    w = torch.cat([torch.randn(64), torch.zeros(10 if tail else 64)]).to(dtype)
    for quant_type, byte in (("nf4", 0x77), ("fp4", 0x00)):
        weight = nf4.pack(w, quant_type)
        assert nf4.expand_absmax(weight)[1] == 0
        assert (weight.packed[32:] == byte).all()
        values = nf4.dequantize(weight, dtype)[64:]
        assert torch.equal(values, torch.zeros_like(values))
        assert not values.signbit().any()


@pytest.mark.parametrize("quant_type", nf4.QUANT_TYPES)
@pytest.mark.parametrize("tail", [False, True])
def test_block_with_nan_is_nan_and_its_neighbours_are_not(bnb, quant_type, tail):
    w = torch.randn(200 if tail else 192)
    w[-3] = torch.nan
    packed, absmax = nf4.quantize_blocks(w, quant_type)
    assert absmax.isnan().tolist() == [False] * (len(absmax) - 1) + [True]
    start = 64 * (len(absmax) - 1)
    assert (packed[start // 2 :] == (0xFF if quant_type == "nf4" else 0x33)).all()
    if quant_type == "nf4":
        assert torch.equal(packed, bnb.quantize_4bit(w, quant_type=quant_type)[0])
    values = nf4.dequantize(nf4.pack(w, quant_type), torch.bfloat16)
    assert values[start:].isnan().all()
    assert values[:start].isfinite().all()


@pytest.mark.parametrize("quant_type", nf4.QUANT_TYPES)
@pytest.mark.parametrize("sign", [1, -1])
def test_block_with_infinity(bnb, quant_type, sign):
    w = torch.randn(192)
    w[70] = sign * torch.inf
    packed, absmax = nf4.quantize_blocks(w, quant_type)
    assert absmax[1] == torch.inf
    assert absmax[[0, 2]].isfinite().all()
    if quant_type == "nf4":
        assert torch.equal(packed, bnb.quantize_4bit(w, quant_type=quant_type)[0])
    values = nf4.dequantize(nf4.pack(w, quant_type), torch.float32)
    assert values[70] == torch.inf  # bitsandbytes on a CPU loses the sign: inf * 0 is NaN, which searches to the top
    others = torch.cat([values[64:70], values[71:128]])
    assert others.isnan().all()
    assert values[:64].isfinite().all()


def test_block_far_below_the_smallest_divisor():
    w = torch.full((64,), 1e-41)
    weight = nf4.pack(w)
    assert nf4.expand_absmax(weight)[0] == w[0]
    assert (weight.packed == 0x77).all()
    assert (nf4.dequantize(weight, torch.float32) == 0).all()


def test_chunks_do_not_show(monkeypatch):
    torch.manual_seed(2)
    w = torch.randn(5, 4001).bfloat16()  # odd count, partial tail
    for quant_type in nf4.QUANT_TYPES:
        for blocksize in (32, 4096):
            whole = nf4.pack(w, quant_type, blocksize)
            values = nf4.dequantize(whole, torch.bfloat16)
            monkeypatch.setattr(nf4, "_CPU_CHUNK", 4096)
            split = nf4.pack(w, quant_type, blocksize)
            assert torch.equal(split.packed, whole.packed)
            assert torch.equal(split.absmax, whole.absmax)
            assert torch.equal(nf4.dequantize(whole, torch.bfloat16), values)
            monkeypatch.undo()


def test_device_search_is_the_cpu_search():
    """`bucketize` stands in for the compares on other devices."""
    x = torch.cat([torch.randn(1000), nf4.midpoints("nf4"), torch.tensor([torch.nan, torch.inf, -torch.inf])])
    for quant_type in nf4.QUANT_TYPES:
        points = nf4.midpoints(quant_type)
        assert torch.equal(nf4._count_below(x, points), torch.bucketize(x, points).to(torch.uint8))


# --- dequantize -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quant_type", nf4.QUANT_TYPES)
@pytest.mark.parametrize("blocksize", [32, 64, 256, 4096])
@pytest.mark.parametrize("width", WIDTHS)
def test_dequantize_is_the_oracle(width, blocksize, quant_type):
    weight = random_packed((13, width), quant_type, blocksize)
    absmax = nf4.as_fp32(weight.absmax)
    exact = oracle_values(weight.packed, absmax, quant_type, blocksize, weight.numel).view(weight.shape)
    for dtype in (*FLOAT, torch.float64):
        values = nf4.dequantize(weight, dtype)
        assert torch.equal(values, exact.to(dtype)), dtype
        out = torch.full(weight.shape, torch.nan, dtype=dtype)
        assert nf4.dequantize(weight, dtype, out) is out
        assert torch.equal(out, values)


@pytest.mark.parametrize("dtype", HALF)
def test_rounding_is_to_nearest_even_and_happens_once(dtype):
    """The stored value has no neighbour in the output type that is nearer to the fp32 product."""
    weight = random_packed((64, 1040))
    exact = nf4.dequantize(weight, torch.float64)
    values = nf4.dequantize(weight, dtype)
    bits = values.view(torch.int16)
    error = (values.double() - exact).abs()
    for step in (-1, 1):
        neighbour = torch.where(bits & 0x7FFF == 0, bits, bits + step).view(dtype)
        other = (neighbour.double() - exact).abs()
        assert (error <= other).all()
        assert ((error < other) | (bits & 1 == 0) | (bits & 0x7FFF == 0)).all()


def test_dequantize_is_bitsandbytes(bnb):
    """Where the latter is right on every CPU: in_features a multiple of the blocksize."""
    torch.manual_seed(3)
    for dtype in FLOAT:
        for blocksize in (32, 64, 256, 1024):
            w = torch.randn(48, 2048).to(dtype)
            packed, state = bnb.quantize_4bit(w, blocksize=blocksize, quant_type="nf4")
            assert torch.equal(nf4.dequantize(nf4.pack(w, "nf4", blocksize), dtype), bnb.dequantize_4bit(packed, state))


def test_own_table_is_used():
    weight = random_packed((8, 100))
    code = torch.linspace(-0.9, 0.9, 16)
    own = nf4.dequantize(weight._replace(code=nf4.as_bytes(code)), torch.float32)
    codes = torch.from_numpy(oracle_unpack(weight.packed, 800).astype(np.int64))
    assert torch.equal(own.view(-1), code[codes] * nf4.as_fp32(weight.absmax).repeat_interleave(64)[:800])


def test_out_may_be_strided():
    weight = random_packed((6, 10))
    out = torch.empty(10, 6).t()
    nf4.dequantize(weight, torch.float32, out)
    assert torch.equal(out, nf4.dequantize(weight, torch.float32))


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("shape", [(0,), (0, 5), (3, 0), (1,), (1, 1), (3, 5, 7), (65,)])
def test_round_trip_of_any_shape(shape, nested):
    w = torch.randn(shape)
    weight = nf4.pack(w, double_quant=nested)
    assert weight.shape == shape
    assert weight.packed.shape == ((w.numel() + 1) // 2, 1)
    assert weight.nested == nested
    values = nf4.dequantize(weight, torch.float32)
    assert values.shape == shape
    if w.numel():
        # One block or two: the nested scales are exact at the ends of their range.
        assert (values - w).abs().max() <= 0.1520 * w.abs().max() * (1.01 if nested else 1)


def test_source_may_be_strided_and_need_gradients():
    w = torch.randn(40, 30, requires_grad=True)
    assert torch.equal(nf4.pack(w.t()).packed, nf4.pack(w.detach().t().contiguous()).packed)
