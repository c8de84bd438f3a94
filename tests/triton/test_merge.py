"""The merging kernel against float64, its bits where they are promised, and small adapters that must survive it."""

from __future__ import annotations

import pytest
import torch

from fastlora.backends.triton import merge
from fastlora.backends.triton.launch import TARGETS, record
from fastlora.math import nf4
from tests.triton.adapted import SCALE, adapted, excess, guard_outputs

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize(("n", "k", "r"), [(1, 1, 1), (33, 64, 3), (17, 100, 8), (40, 192, 16), (35, 65, 24)])
@pytest.mark.parametrize("adapter", FLOATS)
def test_values(n, k, r, adapter):
    case = adapted(n, k, r, adapter)
    for dtype in FLOATS:
        out = merge.merge(case.weight, case.a, case.b, SCALE, dtype)
        assert out.dtype == dtype
        assert excess(out, case.exact, case.eager.to(dtype), case.product) <= 1
    assert case.intact()


@pytest.mark.parametrize("dtype", FLOATS)
def test_a_rank_in_several_parts(dtype):
    case = adapted(3, 70, 100)
    out = merge.merge(case.weight, case.a, case.b, SCALE, dtype)
    assert excess(out, case.exact, case.eager.to(dtype), case.product) <= 1


@pytest.mark.parametrize("quant", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("k", [64, 96])
def test_formats(quant, nested, k):
    """k = 96: rows do not hold whole blocks of 64."""
    case = adapted(34, k, 3, quant=quant, nested=nested)
    out = merge.merge(case.weight, case.a, case.b, SCALE, torch.float32)
    assert excess(out, case.exact, case.eager, case.product) <= 1


@pytest.mark.parametrize("dtype", FLOATS)
def test_dora_factor(dtype):
    case = adapted(35, 130, 5)
    norm = case.exact.norm(dim=1).float()
    mag = (norm * (1 + 0.3 * torch.randn(35))).bfloat16()
    factor = mag.double() / norm.double()
    out = merge.merge(case.weight, case.a, case.b, SCALE, dtype, mag=mag, norm=norm)
    eager = ((mag.float() / norm)[:, None] * case.eager).to(dtype)
    product = factor.abs()[:, None] * case.product
    assert excess(out, factor[:, None] * case.exact, eager, product) <= 1


@pytest.mark.parametrize("k", [128, 70])
def test_no_adapter_is_dequantize(k):
    """r = 0, or b = 0: the bits of dequantize, so that a fresh adapter changes nothing; with c, of its product."""
    case = adapted(33, k, 4)
    norm, mag = torch.rand(33) + 0.5, torch.rand(33)
    for dtype in FLOATS:
        expected = nf4.dequantize(case.weight, dtype)
        assert torch.equal(merge.merge(case.weight, case.a[:0], case.b[:, :0].contiguous(), SCALE, dtype), expected)
        assert torch.equal(merge.merge(case.weight, case.a, torch.zeros_like(case.b), SCALE, dtype), expected)
        scaled = ((mag / norm)[:, None] * nf4.dequantize(case.weight, torch.float32)).to(dtype)
        none = case.a[:0], case.b[:, :0].contiguous()
        assert torch.equal(merge.merge(case.weight, *none, SCALE, dtype, mag=mag, norm=norm), scaled)


@pytest.mark.parametrize(("n", "k"), [(1, 1), (33, 64), (32, 70)])
def test_stays_inside(n, k, monkeypatch):
    case = adapted(n, k, 3)
    bands = guard_outputs(monkeypatch)
    for dtype in FLOATS:
        out = merge.merge(case.weight, case.a, case.b, SCALE, dtype)
        assert bands[-1].tensor is out and bands[-1].intact() and case.intact()


def test_repeatable_and_wide():
    case = adapted(40, 192, 24)
    outs = [merge.merge(case.weight, case.a, case.b, SCALE, torch.bfloat16, wide=wide) for wide in (None, None, True)]
    assert torch.equal(outs[0], outs[1]) and torch.equal(outs[0], outs[2])


def slope(case, out) -> float:
    """How much of the adapter's effect is left: regression of the change on the delta."""
    delta = case.exact - case.w.double()
    return float(((out.double() - case.w.double()) * delta).sum() / (delta * delta).sum())


@pytest.mark.parametrize("relative", [1e-4, 1e-3, 1e-2, 1e-1])
def test_small_adapters_survive(relative):
    case = adapted(64, 768, 4, relative=relative)
    out = merge.merge(case.weight, case.a, case.b, SCALE, torch.bfloat16)
    kept = slope(case, out) if relative >= 1e-2 else slope_of_difference(case, out)
    assert 0.9 <= kept <= 1.1


def slope_of_difference(case, out) -> float:
    """As `slope`, against the plain weight rounded the same way: for deltas below the rounding."""
    delta = case.exact - case.w.double()
    plain = nf4.dequantize(case.weight, out.dtype).double()
    return float(((out.double() - plain) * delta).sum() / (delta * delta).sum())


@pytest.mark.parametrize("adapter", [torch.float32, torch.bfloat16])
def test_one_launch_on_every_target(adapter):
    case = adapted(33, 64, 3, adapter)
    for target in TARGETS.values():
        with record(target) as launches:
            merge.merge(case.weight, case.a, case.b, SCALE, torch.bfloat16)
        assert len(launches) == 1 and not launches[0].fp_fusion
        assert launches[0].constexprs["TERMS"] == (2 if adapter == torch.float32 else 1)


def test_terms_of_an_adapter():
    """Two bf16 terms are not enough for fp32 results: three are taken."""
    assert merge.terms(torch.float32, torch.float32) == 3
    assert merge.terms(torch.float32, torch.float16) == 2
    assert merge.terms(torch.bfloat16, torch.float32) == 1


@pytest.mark.parametrize("warps", [1, 2])
def test_permutation_does_not_show(warps, monkeypatch):
    """However many warps share a row, the values are those of the plain product."""
    monkeypatch.setattr(merge, "warps_k", lambda *_: warps)
    case = adapted(33, 130, 3)
    out = merge.merge(case.weight, case.a, case.b, SCALE, torch.float32)
    assert excess(out, case.exact, case.eager, case.product) <= 1
