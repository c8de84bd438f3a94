"""DoRA's norm kernel against float64, where the adapter cancels the weight too."""

from __future__ import annotations

import pytest
import torch

from fastlora.backends.triton import merge, norm
from fastlora.backends.triton.launch import record
from fastlora.math.nf4 import PackedWeight
from fastlora.testing import roundoff
from tests.triton.adapted import SCALE, Adapted, adapted, guard_outputs

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def excess(out: torch.Tensor, case: Adapted) -> float:
    """Errors over the budget; the rows of the norm are single numbers: the worst eager error stands for each.

    An error e of the tile moves the norm by at most |e|: the sum over r is allowed its 4 u |b| |a|.
    """
    exact, eager = case.exact.norm(dim=1), case.eager.norm(dim=1)
    u = roundoff(torch.float32)
    allowed = 1.5 * (eager.double() - exact).abs().max() + u * exact + 4 * u * (exact + case.product.norm(dim=1))
    assert out.dtype == torch.float32 and out.shape == exact.shape and out.isfinite().all()
    return float(((out.double() - exact).abs() / allowed).max())


@pytest.mark.parametrize(("n", "k", "r"), [(1, 1, 1), (33, 100, 3), (17, 192, 8), (40, 64, 24), (3, 65, 100)])
@pytest.mark.parametrize("base", [None, *FLOATS])
def test_values(n, k, r, base):
    for adapter in FLOATS:
        case = adapted(n, k, r, adapter, base=base)
        assert excess(norm.dora_norm(case.weight, case.a, case.b, SCALE), case) <= 1
        assert case.intact()


@pytest.mark.parametrize("quant", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True])
def test_formats(quant, nested):
    case = adapted(34, 128, 3, quant=quant, nested=nested, blocksize=32)
    assert excess(norm.dora_norm(case.weight, case.a, case.b, SCALE), case) <= 1


@pytest.mark.parametrize("base", [torch.float32, None])
def test_where_the_adapter_cancels_the_weight(base):
    """s b a = -w but for 1e-4 of it: the factored form, or a delta in bf16 or tf32, has no correct digit left."""
    case = adapted(20, 96, 16, base=base, quant="nf4", nested=False, blocksize=32)
    # A weight of rank 16, and what is left over.
    left = case.w.double() @ torch.linalg.pinv(case.a.double()) / -SCALE
    case.b.copy_(left.float())
    if base is None:
        assert isinstance(case.weight, PackedWeight)
    else:
        weight = -SCALE * (case.b.double() @ case.a.double())
        weight += 1e-4 * weight.std() * torch.randn(weight.shape, dtype=torch.float64)
        case.weight.copy_(weight.float())
        case.w = case.weight.float()
        assert case.exact.norm() < 1e-3 * case.w.double().norm()
    assert excess(norm.dora_norm(case.weight, case.a, case.b, SCALE), case) <= 1
    if base is not None:  # the case is worth its name: a cheaper product fails it
        coarse = case.w.double() + SCALE * (case.b.bfloat16().double() @ case.a.bfloat16().double())
        assert excess(coarse.norm(dim=1).float(), case) > 10


def test_two_terms_would_not_do(monkeypatch):
    monkeypatch.setattr(norm, "terms", lambda *_: 2)
    case = adapted(20, 96, 16, base=torch.float32)
    case.weight.copy_(-SCALE * (case.b.double() @ case.a.double()))
    case.w = case.weight.float()
    assert excess(norm.dora_norm(case.weight, case.a, case.b, SCALE), case) > 1


def test_no_adapter():
    case = adapted(33, 128, 4)
    out = norm.dora_norm(case.weight, case.a[:0], case.b[:, :0].contiguous(), SCALE)
    case.b.zero_()
    assert excess(out, case) <= 1
    assert torch.equal(out, norm.dora_norm(case.weight, case.a, case.b, SCALE))


@pytest.mark.parametrize("n", [1, 33, 64])
def test_stays_inside(n, monkeypatch):
    case = adapted(n, 70, 3)
    bands = guard_outputs(monkeypatch)
    out = norm.dora_norm(case.weight, case.a, case.b, SCALE)
    assert bands[-1].tensor is out and bands[-1].intact() and case.intact()


def test_repeatable_and_wide():
    case = adapted(40, 192, 24)
    outs = [norm.dora_norm(case.weight, case.a, case.b, SCALE, wide=wide) for wide in (None, None, True)]
    assert torch.equal(outs[0], outs[1]) and torch.equal(outs[0], outs[2])


def test_a_nan_stays_in_its_row():
    case = adapted(35, 70, 3, base=torch.bfloat16)
    plain = norm.dora_norm(case.weight, case.a, case.b, SCALE)
    case.weight[7, 69] = float("nan")
    out = norm.dora_norm(case.weight, case.a, case.b, SCALE)
    assert out[7].isnan()
    rest = torch.arange(35) != 7
    assert torch.equal(out[rest], plain[rest])


def test_permutation_does_not_show(monkeypatch):
    monkeypatch.setattr(norm, "warps_k", lambda *_: 2)
    case = adapted(33, 130, 3)
    assert excess(norm.dora_norm(case.weight, case.a, case.b, SCALE), case) <= 1


def test_one_launch_and_nothing_for_no_rows():
    case = adapted(33, 64, 3)
    with record() as launches:
        norm.dora_norm(case.weight, case.a, case.b, SCALE)
    assert len(launches) == 1 and merge.terms(case.a.dtype, torch.float32) == 3
    with record() as launches:
        empty = norm.dora_norm(torch.empty(0, 64), case.a, case.b[:0], SCALE)
    assert empty.shape == (0,) and not launches
