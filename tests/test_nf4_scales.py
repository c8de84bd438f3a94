"""The 4-bit format: the errors it makes, nested scales, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastlora.errors import ConfigError, DtypeError, ShapeError
from fastlora.math import nf4
from fastlora.math.nf4 import PackedWeight
from tests.nf4_oracle import random_packed, same

FLOAT = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(scope="module")
def bnb():
    return pytest.importorskip("bitsandbytes.functional")


# --- errors the format makes ------------------------------------------------------------------------------------------

# Mean |e| and mean |e| / (|x| + 1e-8) for N(0, 1), then the standard deviation of each from one 1024 x 1024 draw to
# the next (measured over 40 draws; it grows with the blocksize, because few blocks leave their maxima to chance).
EXPECTED_ERROR = {
    "nf4": {
        32: (0.067746, 0.189726, 6.5e-5, 3.3e-4),
        64: (0.072798, 0.203339, 7.0e-5, 3.6e-4),
        128: (0.076831, 0.215237, 9.0e-5, 4.2e-4),
        256: (0.080337, 0.226105, 1.1e-4, 4.8e-4),
        512: (0.083547, 0.236079, 1.4e-4, 5.9e-4),
        1024: (0.086610, 0.245370, 1.8e-4, 7.0e-4),
        2048: (0.089592, 0.254163, 2.6e-4, 8.8e-4),
        4096: (0.092547, 0.262473, 3.8e-4, 1.1e-3),
    },
    "fp4": {
        32: (0.088925, 0.242443, 7.5e-5, 4.1e-4),
        64: (0.096543, 0.260125, 8.3e-5, 4.2e-4),
        128: (0.102969, 0.275817, 1.1e-4, 4.8e-4),
        256: (0.108684, 0.289831, 1.5e-4, 5.4e-4),
        4096: (0.129536, 0.337169, 6.7e-4, 1.4e-3),
    },
}


@pytest.fixture(scope="module")
def normal() -> Tensor:
    return torch.randn(1024, 1024, generator=torch.Generator().manual_seed(4))


@pytest.mark.parametrize("quant_type", nf4.QUANT_TYPES)
def test_mean_errors(normal, quant_type):
    for blocksize, (absolute, relative, *spread) in EXPECTED_ERROR[quant_type].items():
        error = (nf4.dequantize(nf4.pack(normal, quant_type, blocksize), torch.float32) - normal).abs()
        got = error.mean().item(), (error / (normal.abs() + 1e-8)).mean().item()
        sigmas = (got[0] - absolute) / spread[0], (got[1] - relative) / spread[1]
        print(f"{quant_type} {blocksize}: {got[0]:.6f} {got[1]:.6f}, sigmas {sigmas[0]:+.2f} {sigmas[1]:+.2f}")
        assert abs(sigmas[0]) < 7
        assert abs(sigmas[1]) < 7


def test_error_of_the_default_format(normal):
    plain = nf4.dequantize(nf4.pack(normal), torch.float32) - normal
    nested = nf4.dequantize(nf4.pack(normal, double_quant=True), torch.float32) - normal
    rms = [(error.norm() / normal.norm()).item() for error in (plain, nested)]
    print(f"rms-relative error: plain {rms[0]:.5f}, nested {rms[1]:.5f}")
    assert abs(rms[0] - 0.0920) < 2e-4
    assert 0 < rms[1] - rms[0] < 1e-4
    assert nested.abs().mean() < 0.11
    assert (nested.abs() / (normal.abs() + 1e-8)).mean() < 0.28


@pytest.mark.parametrize(
    ("dtype", "beta"), [(torch.float32, 0.15191), (torch.float16, 0.1522), (torch.bfloat16, 0.1535)]
)
def test_error_bound_of_each_element(dtype, beta):
    """Half the widest gap between codes, 0.1519036, and the output's rounding."""
    torch.manual_seed(5)
    w = (torch.rand(512, 512) * 2 - 1).to(dtype)
    for blocksize in (32, 4096):
        packed, absmax = nf4.quantize_blocks(w, "nf4", blocksize)
        weight = PackedWeight(packed, nf4.as_bytes(absmax), None, None, None, "nf4", blocksize, (512, 512))
        error = (nf4.dequantize(weight, dtype).float() - w.float()).abs().view(-1, blocksize)
        worst = (error / absmax[:, None]).max()
        assert worst <= beta
        assert worst > 0.1515, "the bound is nearly reached, or the test sees nothing"


@pytest.mark.parametrize("dtype", FLOAT)
@pytest.mark.parametrize("quant_type", nf4.QUANT_TYPES)
def test_quantizing_again_changes_nothing(dtype, quant_type):
    torch.manual_seed(6)
    for blocksize in nf4.BLOCKSIZES:
        first = nf4.pack(torch.randn(64, 1000).to(dtype), quant_type, blocksize)
        values = nf4.dequantize(first, dtype)
        second = nf4.pack(values, quant_type, blocksize)
        assert torch.equal(second.absmax, first.absmax)
        assert torch.equal(nf4.dequantize(second, dtype), values)
        if quant_type == "nf4":
            assert torch.equal(second.packed, first.packed)


def test_nested_codes_survive_quantizing_again():
    torch.manual_seed(7)
    first = nf4.pack(torch.randn(256, 1024), double_quant=True)
    second = nf4.pack(nf4.dequantize(first, torch.float32), double_quant=True)
    assert torch.equal(first.packed, second.packed)


# --- nested scales ----------------------------------------------------------------------------------------------------


@settings(derandomize=True, deadline=None, max_examples=60)
@given(blocks=st.integers(1, 900), exponent=st.integers(-30, 30), seed=st.integers(0, 2**31))
def test_nested_index_is_the_nearest_entry(blocks, exponent, seed):
    generator = torch.Generator().manual_seed(seed)
    absmax = torch.rand(blocks, generator=generator) * 10.0**exponent
    codes, nested_absmax, offset = nf4.quantize_absmax(absmax)
    assert (codes.shape, nested_absmax.shape, offset.shape) == ((blocks,), (-(-blocks // 256),), (1,))
    assert offset[0] == np.float32(absmax.double().mean().item())
    a = absmax.numpy() - offset.numpy()
    groups = [a[i : i + 256] for i in range(0, blocks, 256)]
    assert nested_absmax.tolist() == [np.abs(group).max() for group in groups]
    inv = np.float32(1) / np.maximum(nested_absmax.numpy(), np.float32(1e-38))
    x = np.concatenate([group * scale for group, scale in zip(groups, inv, strict=True)])
    entries = nf4.dynamic_map().double().numpy()
    distance = np.abs(x.astype(np.float64)[:, None] - entries[None, :])
    assert np.array_equal(codes.numpy(), distance.argmin(axis=1))  # argmin: the lower of two equals


def test_nested_scales_read_back_with_two_roundings():
    torch.manual_seed(8)
    absmax = torch.rand(1000) + 0.3
    codes, nested_absmax, offset = nf4.quantize_absmax(absmax)
    parts = (codes, nf4.as_bytes(nested_absmax), nf4.as_bytes(offset), None)
    weight = PackedWeight(torch.zeros(32000, 1, dtype=torch.uint8), *parts, "nf4", 64, (64000,))
    got = nf4.expand_absmax(weight)
    product = nf4.dynamic_map()[codes.long()].numpy() * np.repeat(nested_absmax.numpy(), 256)[:1000]
    assert product.dtype == np.float32
    assert np.array_equal(got.numpy(), product + offset.numpy())
    fused = (nf4.dynamic_map()[codes.long()].double() * nested_absmax.double().repeat_interleave(256)[:1000]) + offset
    assert not torch.equal(got, fused.float()), "one rounding must be told from two"
    # Half the widest gap of the map is 0.0072 (near +-0.99); the groups' largest |a| bounds the error.
    error = (got - absmax).abs()
    assert (error <= 0.0072 * nested_absmax.repeat_interleave(256)[:1000]).all()
    print(f"nested scales: mean relative error {(error / absmax).mean():.2e}")
    assert (error / absmax).mean() < 3e-3


def test_nested_scales_agree_with_bitsandbytes(bnb):
    """Its CPU quantizer looks 8-bit codes up in 65 536 bins, so few of them differ."""
    torch.manual_seed(9)
    w = torch.randn(1024, 1024).bfloat16()
    weight = nf4.pack(w, double_quant=True)
    packed, state = bnb.quantize_4bit(w, quant_type="nf4", compress_statistics=True)
    assert torch.equal(weight.packed, packed)
    assert torch.equal(nf4.as_fp32(weight.nested_absmax), state.state2.absmax)
    assert abs(nf4.as_fp32(weight.nested_offset) - state.offset) <= 2e-7 * state.offset
    steps = (weight.absmax.int() - state.absmax.int()).abs()
    print(f"nested codes unlike bitsandbytes: {(steps > 0).float().mean():.4%}, at most {steps.max()} steps")
    assert (steps > 0).float().mean() < 0.006
    assert steps.max() <= 2
    difference = (nf4.dequantize(weight, torch.float32) - bnb.dequantize_4bit(packed, state).float()).abs()
    assert difference.max() <= 0.02 * w.abs().max()


def test_equal_scales_survive_nesting_exactly():
    absmax = torch.full((300,), 0.3)
    codes, nested_absmax, offset = nf4.quantize_absmax(absmax)
    assert (codes == 127).all()
    assert (nested_absmax == 0).all()
    assert torch.equal(offset, absmax[:1])


def test_bits_per_parameter():
    weight = nf4.pack(torch.randn(1024, 1024), double_quant=True)
    parts = [part for part in weight if isinstance(part, Tensor)]
    bits = 8 * sum(part.numel() * part.element_size() for part in parts) / 2**20
    assert abs(bits - 4.127) < 1e-3


# --- bytes, grid, refusals --------------------------------------------------------------------------------------------


def test_bytes_round_trip_from_any_layout():
    t = torch.randn(6, 4)
    t[0, 0] = torch.nan
    for view in (t, t.t(), t[1:, ::2], t[0], t[0, 1], t[:0]):
        as_bytes = nf4.as_bytes(view)
        assert as_bytes.shape == (*view.shape, 4)
        assert same(nf4.as_fp32(as_bytes), view)
    buffer = torch.zeros(25, dtype=torch.uint8)
    buffer[1:] = nf4.as_bytes(t[1:2, :].expand(6, 4).contiguous()).flatten()[:24]
    assert torch.equal(nf4.as_fp32(buffer[1:].view(6, 4)), t[1].repeat(2)[:6])  # starts between two floats
    shared = nf4.as_bytes(t)
    assert shared.data_ptr() == t.data_ptr()
    assert nf4.as_fp32(shared).data_ptr() == t.data_ptr()


def test_absmax_on_grid():
    absmax = torch.rand(100)
    assert not nf4.absmax_on_grid(absmax)
    assert nf4.absmax_on_grid(absmax.bfloat16().float())
    assert not nf4.absmax_on_grid(absmax.half().float())
    assert nf4.absmax_on_grid(torch.tensor([1.0, torch.nan, torch.inf]))
    assert nf4.absmax_on_grid(nf4.quantize_blocks(torch.randn(640).bfloat16())[1])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"quant_type": "nf5"}, ConfigError, "nf4, fp4, got 'nf5'"),
        ({"blocksize": 48}, ConfigError, "32, 64, .*4096, got 48"),
        (
            {"packed": torch.zeros(49, 1, dtype=torch.uint8)},
            ShapeError,
            r"packed: expected shape \[50, 1\], got \[49, 1\]",
        ),
        ({"packed": torch.zeros(1, 50, dtype=torch.uint8)}, ShapeError, r"expected shape \[50, 1\], got \[1, 50\]"),
        ({"packed": torch.zeros(50, 1)}, DtypeError, "packed: expected torch.uint8, got torch.float32"),
        ({"absmax": torch.zeros(2)}, DtypeError, "absmax: expected torch.uint8, got torch.float32"),
        (
            {"absmax": torch.zeros(3, 4, dtype=torch.uint8)},
            ShapeError,
            r"absmax: expected shape \[2, 4\], got \[3, 4\]",
        ),
        ({"nested_offset": torch.zeros(1, 4, dtype=torch.uint8)}, ShapeError, "nested_offset: expected None"),
        ({"nested_absmax": torch.zeros(1, 4, dtype=torch.uint8)}, ShapeError, r"absmax: expected shape \[2\], got"),
        ({"code": torch.zeros(8, 4, dtype=torch.uint8)}, ShapeError, r"code: expected shape \[16, 4\], got \[8, 4\]"),
        ({"shape": (10, 11)}, ShapeError, r"packed: expected shape \[55, 1\], got \[50, 1\]"),
    ],
)
def test_inconsistent_weights_are_refused(change, error, message):
    weight = random_packed((10, 10))
    with pytest.raises(error, match=message):
        nf4.dequantize(weight._replace(**change), torch.float32)


def test_nested_weight_without_its_offset_is_refused():
    weight = nf4.pack(torch.randn(10, 10), double_quant=True)
    with pytest.raises(ShapeError, match=r"nested_offset: expected uint8 \[1, 4\], got None"):
        nf4.dequantize(weight._replace(nested_offset=None), torch.float32)


def test_wrong_dtypes_and_outputs_are_refused():
    weight = random_packed((10, 10))
    with pytest.raises(DtypeError, match=r"torch\.float16 can be quantized, got torch\.float64"):
        nf4.quantize_blocks(torch.zeros(4, dtype=torch.float64))
    with pytest.raises(DtypeError, match=r"got torch\.int8"):
        nf4.dequantize(weight, torch.int8)
    with pytest.raises(ShapeError, match=r"out: expected shape \[10, 10\], got \[100\]"):
        nf4.dequantize(weight, torch.float32, torch.empty(100))
    with pytest.raises(DtypeError, match=r"out: expected torch\.float32 on cpu, got torch\.float64"):
        nf4.dequantize(weight, torch.float32, torch.empty(10, 10, dtype=torch.float64))
    with pytest.raises(DtypeError, match=r"absmax: expected torch\.float32"):
        nf4.quantize_absmax(torch.zeros(4, dtype=torch.float64))
    with pytest.raises(ShapeError, match="1 dimension"):
        nf4.quantize_absmax(torch.zeros(4, 4))
    with pytest.raises(ShapeError, match="4 bytes"):
        nf4.as_fp32(torch.zeros(3, dtype=torch.uint8))
