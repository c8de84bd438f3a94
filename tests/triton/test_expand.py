"""out = scale · factor · mask∘(c ⊙ (h bᵀ)) + bias, rounded once."""

from __future__ import annotations

import pytest
import torch

from fastlora.backends.triton import expand as module
from fastlora.backends.triton.expand import expand
from fastlora.backends.triton.launch import INTERPRETER, TARGETS, record
from fastlora.math import philox
from fastlora.testing import guarded
from tests.triton.product_tools import DTYPES, close, poisoned

# m, n, r, dtype of out, dtype of b, transposed, options
CASES = [
    (1, 100, 8, "bf16", "fp32", False, ""),
    (3, 33, 16, "bf16", "fp32", True, "bits factor"),
    (33, 65, 1, "bf16", "fp32", False, "bias"),
    (17, 33, 24, "bf16", "bf16", True, "bits factor bias"),
    (33, 40, 3, "bf16", "fp32", False, "dora bias"),
    (17, 70, 100, "bf16", "fp32", False, "bits dora"),
    (33, 3, 24, "fp16", "fp32", False, "bias"),
    (17, 100, 16, "fp16", "fp16", True, "bits factor"),
    (40, 1, 3, "fp32", "fp32", False, "dora bias"),
    (17, 65, 24, "fp32", "fp32", True, "bits factor"),
    (33, 33, 100, "fp32", "bf16", False, "bias"),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_expand(case, monkeypatch):
    m, n, r, dtype, adapter, transposed, options = case
    kind = DTYPES[dtype]
    generator = torch.Generator().manual_seed(m + 7 * n + 31 * r)

    def randn(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator)

    h, b = guarded(randn(m, r)), guarded(randn(*((r, n) if transposed else (n, r))).to(DTYPES[adapter]))
    bits = guarded(philox.dropout_bits(7, 1, m, n, 0.4))
    mag, norm = guarded(1 + 0.3 * randn(n).to(DTYPES[adapter])), guarded(1 + randn(n).abs())
    bias = guarded(3 * randn(n).to(kind))
    keywords = {
        "transposed": transposed,
        "bits": bits.tensor if "bits" in options else None,
        "factor": 1.3 if "factor" in options else 1.0,
        "bias": bias.tensor if "bias" in options else None,
        "mag": mag.tensor if "dora" in options else None,
        "norm": norm.tensor if "dora" in options else None,
    }
    with poisoned(monkeypatch) as made:
        out = expand(h.tensor, b.tensor, 1.7, kind, **keywords)
        assert torch.equal(out, expand(h.tensor, b.tensor, 1.7, kind, **keywords))
        assert torch.equal(out, expand(h.tensor, b.tensor, 1.7, kind, wide=True, **keywords))
    assert all(guard.intact() for guard in [h, b, bits, mag, norm, bias, *made])
    assert out.dtype == kind and out.shape == (m, n)

    def formula(left: torch.Tensor, right: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        value = left.to(dtype) @ (right if transposed else right.T).to(dtype) * (1.7 * keywords["factor"])
        if "dora" in options:
            value = value * (mag.tensor.to(dtype) / norm.tensor.to(dtype))
        if "bits" in options:
            value = value * philox.unpack_bits(bits.tensor, n)
        return value + bias.tensor.to(dtype) if "bias" in options else value

    eager = formula(h.tensor.to(kind), b.tensor.to(kind), torch.float32).to(kind)
    ref = formula(h.tensor, b.tensor, torch.float64)
    close("out", out, ref, eager, h.tensor.double(), 3 * b.tensor.double())
    if "bits" in options and "bias" not in options:
        assert not out[~philox.unpack_bits(bits.tensor, n)].any()


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_rounding_is_to_nearest_even(dtype):
    """One product a result: 1 + u is half way between two values of a 16-bit type, and goes to the even one."""
    unit = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-24}[dtype]
    bias = torch.tensor([0.0, unit, 3 * unit, 1.001 * unit])
    out = expand(torch.ones(1, 1), torch.ones(4, 1), 1.0, dtype, bias=bias)
    assert torch.equal(out, (1 + bias).to(dtype)[None])


def test_fp16_products_neither_underflow_nor_overflow():
    for scale in (1e-9, 1e6):
        h, b = torch.randn(17, 20) * scale, torch.randn(40, 20)
        out = expand(h, b, 1 / scale, torch.float16)
        close("out", out, (h.double() / scale) @ b.double().T, ((h / scale).half() @ b.half().T), h / scale, b)


def test_nan_stays_in_its_row():
    h, b = torch.randn(20, 5), torch.randn(33, 5)
    h[3, 4] = float("nan")
    out = expand(h, b, 1.0, torch.bfloat16)
    assert out[3].isnan().all() and out[[*range(3), *range(4, 20)]].isfinite().all()


def test_zero_b_gives_zeros_and_no_token_nothing():
    assert not expand(torch.randn(5, 3), torch.zeros(9, 3), 2.0, torch.bfloat16).any()
    with record(run=True) as launches:
        assert expand(torch.empty(0, 3), torch.randn(9, 3), 2.0, torch.bfloat16).shape == (0, 9)
    assert not launches


@pytest.mark.parametrize("name", ["interpreter", *TARGETS])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_tiles_fit_the_device(name, dtype):
    device = INTERPRETER if name == "interpreter" else TARGETS[name]
    for r in (1, 16, 24, 64, 100, 256):
        for m in (1, 20, 8192):
            tile = module.tile_expand(device, m, r, dtype)
            size = 2 if dtype == torch.bfloat16 else 4
            operands = tile.BLOCK_K * (tile.BLOCK_M + tile.BLOCK_N)
            assert tile.BLOCK_N % 8 == 0 and module.rank_block(r) % tile.BLOCK_K == 0
            assert operands * (size + (tile.num_stages - 1) * 4) <= device.shared_memory
