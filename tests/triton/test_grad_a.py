"""da = scale · dscale · gᵀ (mask∘x), alone and beside h = x aᵀ."""

from __future__ import annotations

import pytest
import torch

from fastlora.backends.triton import grad_a as module
from fastlora.backends.triton.grad_a import grad_a, shrink_grad_a
from fastlora.backends.triton.launch import record
from fastlora.math import philox
from fastlora.testing import guarded
from tests.triton.product_tools import DTYPES, close, poisoned

# m, k, r, dtype of x, splits
CASES = [
    (1, 100, 8, "bf16", 3),
    (17, 33, 16, "bf16", 3),
    (100, 40, 1, "bf16", 1),  # three planes over m
    (33, 3, 24, "bf16", 1),
    (65, 33, 3, "fp16", 3),
    (17, 65, 100, "fp16", 1),
    (100, 33, 3, "fp32", 1),
    (3, 1, 24, "fp32", 1),
]


def _inputs(m, k, r, dtype):
    generator = torch.Generator().manual_seed(m + 7 * k + 31 * r)
    x = guarded(torch.randn(m, k, generator=generator).to(DTYPES[dtype]))
    a = guarded(torch.randn(r, k, generator=generator) / k**0.5)
    return x, a, guarded(torch.randn(m, r, generator=generator))


def _rounded(t: torch.Tensor, x: torch.Tensor, splits: int) -> torch.Tensor:
    return t.to(x.dtype).float() if splits == 1 else t


def _check_da(da, x, g, factor, splits):
    """x in float64, masked."""
    eager = factor * _rounded(g.tensor, x, splits).T @ x.float()
    close("da", da, factor * g.tensor.double().T @ x.double(), eager, factor * g.tensor.double().T, x.double())


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_grad_a(case, masked, monkeypatch):
    m, k, r, dtype, splits = case
    x, _, g = _inputs(m, k, r, dtype)
    bits = guarded(philox.dropout_bits(5, 9, m, k, 0.4))
    options = {"bits": bits.tensor, "dscale": 1.25, "splits": splits} if masked else {"splits": splits}
    with poisoned(monkeypatch) as made:
        da = grad_a(g.tensor, x.tensor, 1.7, **options)
        assert torch.equal(da, grad_a(g.tensor, x.tensor, 1.7, **options))
        assert torch.equal(da, grad_a(g.tensor, x.tensor, 1.7, wide=True, **options))
    assert all(guard.intact() for guard in [x, g, bits, *made]) and da.dtype == torch.float32
    kept = x.tensor * philox.unpack_bits(bits.tensor, k) if masked else x.tensor
    _check_da(da, kept, g, 1.7 * (1.25 if masked else 1.0), splits)


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_h_and_da_from_one_pass_or_two(case, together, monkeypatch):
    m, k, r, dtype, splits = case
    x, a, g = _inputs(m, k, r, dtype)
    monkeypatch.setattr(module, "one_pass", lambda *args: together)
    with poisoned(monkeypatch) as made, record(run=True) as launches:
        h, da = shrink_grad_a(x.tensor, a.tensor, g.tensor, 1.7, splits=splits)
    reads = [launch.name for launch in launches if launch.name != "_finish_kernel"]
    assert reads == (["_walk_kernel"] if together else ["_rows_kernel", "_walk_kernel"])
    again = shrink_grad_a(x.tensor, a.tensor, g.tensor, 1.7, splits=splits, wide=True)
    assert torch.equal(h, again[0]) and torch.equal(da, again[1])
    assert all(guard.intact() for guard in [x, a, g, *made])
    eager = x.tensor.float() @ _rounded(a.tensor, x.tensor, splits).T
    close("h", h, x.tensor.double() @ a.tensor.double().T, eager, x.tensor.double(), a.tensor.double())
    _check_da(da, x.tensor, g, 1.7, splits)


def test_one_pass_is_chosen_by_size():
    def reads(m, k, r):
        with record(run=True) as launches:
            shrink_grad_a(torch.randn(m, k).bfloat16(), torch.randn(r, k), torch.randn(m, r), 1.0)
        return sum(launch.name != "_finish_kernel" for launch in launches)

    assert reads(65, 100, 1) == 1 and reads(65, 100, 24) == 2


def test_no_token():
    da = grad_a(torch.empty(0, 3), torch.empty(0, 9), 1.0)
    h, again = shrink_grad_a(torch.empty(0, 9), torch.randn(3, 9), torch.empty(0, 3), 1.0)
    assert torch.equal(da, torch.zeros(3, 9)) and torch.equal(again, da) and h.shape == (0, 3)


def test_dropped_nan_is_gone():
    x, g = torch.randn(20, 40), torch.randn(20, 3)
    x[7, 33] = float("nan")
    keep = torch.ones(20, 40, dtype=torch.bool)
    assert grad_a(g, x, 1.0)[:, 33].isnan().all()
    keep[7, 33] = False
    assert grad_a(g, x, 1.0, bits=philox.pack_bits(keep)).isfinite().all()
