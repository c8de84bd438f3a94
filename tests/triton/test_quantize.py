"""Quantizing and dequantizing kernels: the bits of math.nf4, nothing read or written outside the tensors."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastlora.backends.triton import quantize
from fastlora.backends.triton.launch import record
from fastlora.math import nf4
from fastlora.testing import guarded
from tests.triton.adapted import guard_outputs

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def same(actual: Tensor, expected: Tensor) -> bool:
    return actual.dtype == expected.dtype and torch.equal(actual.nan_to_num(7.5), expected.nan_to_num(7.5))


def weight(shape: tuple[int, ...], quant_type: str = "nf4", blocksize: int = 64, nested: bool = False):
    generator = torch.Generator().manual_seed(len(shape) + blocksize)
    w = torch.randn(shape, generator=generator) * 10 ** torch.randn(
        shape[0], *[1] * (len(shape) - 1), generator=generator
    )
    return nf4.pack(w, quant_type, blocksize, nested)


@pytest.mark.parametrize("shape", [(1,), (7,), (33,), (3, 5, 7), (17, 100), (33, 64), (513,)])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64])
def test_dequantized_bits(shape, nested, dtype):
    for quant_type in nf4.QUANT_TYPES:
        packed = weight(shape, quant_type, 64, nested)
        assert same(quantize.dequantize(packed, dtype), nf4.dequantize(packed, dtype))


@pytest.mark.parametrize("blocksize", [32, 256, 4096])
def test_dequantized_bits_of_other_blocksizes(blocksize):
    packed = weight((35, 300), "nf4", blocksize, blocksize == 32)  # nested: two groups of scales
    for dtype in (torch.bfloat16, torch.float32):
        assert same(quantize.dequantize(packed, dtype), nf4.dequantize(packed, dtype))


def test_a_tensors_own_table():
    packed = weight((9, 40))
    code = torch.linspace(-2, 3, 16).pow(3)
    packed = packed._replace(code=nf4.as_bytes(code))
    for dtype in FLOATS:
        out = quantize.dequantize(packed, dtype)
        assert same(out, nf4.dequantize(packed, dtype))
        assert not same(out, nf4.dequantize(packed._replace(code=None), dtype))


def test_special_scales():
    """NaN, infinite, zero and denormal scales; products that overflow fp16 or round to fp16 denormals."""
    scales = torch.tensor([float("nan"), float("inf"), 0.0, 1e-41, 3e5, 1e-7, -2.0])
    packed = weight((7 * 64,))._replace(absmax=nf4.as_bytes(scales))
    for dtype in FLOATS:
        assert same(quantize.dequantize(packed, dtype), nf4.dequantize(packed, dtype))


@pytest.mark.parametrize("count", [1, 63, 515])
@pytest.mark.parametrize("nested", [False, True])
def test_dequantize_stays_inside(count, nested):
    packed = weight((count,), "nf4", 64, nested)
    parts = {name: guarded(part) for name, part in packed._asdict().items() if isinstance(part, Tensor)}
    inside = packed._replace(**{name: part.tensor for name, part in parts.items()})
    for dtype in (torch.bfloat16, torch.float32):
        out = guarded(torch.full((count,), float("nan"), dtype=dtype))
        assert quantize.dequantize(inside, dtype, out.tensor) is out.tensor
        assert out.intact() and all(part.intact() for part in parts.values())
        assert same(out.tensor, nf4.dequantize(packed, dtype))


@pytest.mark.parametrize("shift", [1, 2, 3])
def test_packed_bytes_that_start_inside_a_word(shift):
    packed = weight((300,))
    buffer = torch.zeros(packed.packed.numel() + 8, dtype=torch.uint8)
    start = -buffer.data_ptr() % 4 + shift
    inside = buffer[start : start + packed.packed.numel()].view(-1, 1)
    inside.copy_(packed.packed)
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        assert same(quantize.dequantize(packed._replace(packed=inside), dtype), nf4.dequantize(packed, dtype))


def test_nothing_to_do():
    packed = nf4.pack(torch.empty(0, 64))
    with record(run=True) as launches:
        assert quantize.dequantize(packed, torch.bfloat16).shape == (0, 64)
        codes, absmax = quantize.quantize(torch.empty(0, 64), "nf4", 64)
    assert codes.shape == (0, 1) and absmax.shape == (0,) and not launches


@pytest.mark.parametrize("shape", [(1,), (3,), (129,), (7, 100), (12, 64)])
@pytest.mark.parametrize("quant_type", nf4.QUANT_TYPES)
def test_quantized_bits(shape, quant_type):
    for dtype in FLOATS:
        w = torch.randn(shape).to(dtype)
        codes, absmax = quantize.quantize(w, quant_type, 64)
        expected = nf4.quantize_blocks(w, quant_type, 64)
        assert torch.equal(codes, expected[0]) and torch.equal(absmax, expected[1])


@pytest.mark.parametrize("quant_type", nf4.QUANT_TYPES)
@pytest.mark.parametrize("blocksize", [32, 512])
def test_quantized_bits_of_other_blocksizes(quant_type, blocksize):
    w = torch.randn(1030)
    codes, absmax = quantize.quantize(w, quant_type, blocksize)
    expected = nf4.quantize_blocks(w, quant_type, blocksize)
    assert torch.equal(codes, expected[0]) and torch.equal(absmax, expected[1])


@pytest.mark.parametrize("quant_type", nf4.QUANT_TYPES)
def test_ties_take_the_lower_code(quant_type):
    """Every midpoint, and the floats beside it, in a block whose absmax is 1: products are exact."""
    points = nf4.midpoints(quant_type)
    points = torch.cat([points, -points])
    near = [torch.nextafter(points, torch.full_like(points, end)) for end in (-9.0, 9.0)]
    values = torch.cat([points, *near])
    padded = torch.zeros(-(-values.numel() // 31) * 31)
    padded[: values.numel()] = values
    blocks = torch.nn.functional.pad(padded.view(-1, 31), (1, 0), value=1.0)  # its first element sets a block's scale
    codes, absmax = quantize.quantize(blocks, quant_type, 32)
    expected = nf4.quantize_blocks(blocks, quant_type, 32)
    assert torch.equal(codes, expected[0]) and torch.equal(absmax, expected[1])


@pytest.mark.parametrize("quant_type", nf4.QUANT_TYPES)
def test_special_weights(quant_type):
    """Blocks of zeros, -0, denormals, NaN, infinities; an odd count after a block that holds NaN."""
    w = torch.randn(6 * 32 + 5)
    w[:32] = 0.0
    w[5] = -0.0
    w[32:64] *= 1e-40
    w[70] = float("nan")
    w[100], w[101] = float("inf"), -float("inf")
    w[130] = -float("inf")
    w[160:192] = 3e38
    w[-2] = float("nan")
    for dtype in (torch.float32, torch.bfloat16):
        codes, absmax = quantize.quantize(w.to(dtype), quant_type, 32)
        expected = nf4.quantize_blocks(w.to(dtype), quant_type, 32)
        assert torch.equal(codes, expected[0]) and same(absmax, expected[1])


@pytest.mark.parametrize("count", [1, 33, 300])
def test_quantize_reads_only_the_weight(count):
    for dtype in FLOATS:
        w = guarded(torch.randn(count).to(dtype))
        codes, absmax = quantize.quantize(w.tensor, "nf4", 32)
        assert w.intact() and absmax.isfinite().all()
        assert torch.equal(codes, nf4.quantize_blocks(w.tensor, "nf4", 32)[0])


@pytest.mark.parametrize("count", [1, 33, 256, 300])
def test_quantize_stays_inside(count, monkeypatch):
    w = torch.randn(count)
    expected = nf4.quantize_blocks(w, "nf4", 32)
    bands = guard_outputs(monkeypatch)
    codes, absmax = quantize.quantize(w, "nf4", 32)
    assert bands[-2].tensor is codes and bands[-1].tensor is absmax and bands[-2].intact() and bands[-1].intact()
    assert torch.equal(codes, expected[0]) and torch.equal(absmax, expected[1])


def test_one_launch_each():
    packed = weight((20, 64), nested=True)
    with record(run=True) as launches:
        quantize.dequantize(packed, torch.bfloat16)
        quantize.quantize(torch.randn(20, 64), "nf4", 64)
    assert [launch.name for launch in launches] == ["_dequantize_kernel", "_quantize_kernel"]
    assert not any(launch.fp_fusion for launch in launches)
