"""The gated unit's kernels: oracle, bits of the product, launches, and a whole MLP's end with the down-projection."""

from __future__ import annotations

import pytest
import torch

from fastlora.backends.triton import gated as kernels
from fastlora.backends.triton.launch import TARGETS, record
from fastlora.math import gated
from fastlora.math.gated import NAMES
from fastlora.ops.glu import glu, glu_linear
from fastlora.ops.member import Projection, alone
from fastlora.problem import DENSE, Problem
from fastlora.testing import Case, Outputs, guarded, judge, make_inputs, roundoff
from tests.triton.product_tools import DTYPES, poisoned


def _problem(op, t):
    return Problem(op, *t.shape, 0, 0, t.dtype, t.dtype, DENSE, 0, "cpu")


@pytest.mark.parametrize("shape", [(1, 1), (3, 64), (5, 37)], ids=str)
@pytest.mark.parametrize("act", NAMES)
@pytest.mark.parametrize("dtype", list(DTYPES))
def test_within_one_rounding_of_the_oracle(act, dtype, shape, monkeypatch):
    generator = torch.Generator().manual_seed(sum(shape))
    gate, up, d = (guarded((2 * torch.randn(*shape, generator=generator)).to(DTYPES[dtype])) for _ in range(3))
    with poisoned(monkeypatch) as made:
        product = kernels.glu_fwd(_problem("glu_fwd", gate.tensor), gate.tensor, up.tensor, act)
        found = kernels.glu_bwd(_problem("glu_bwd", gate.tensor), d.tensor, gate.tensor, up.tensor, act, True)
        assert kernels.glu_bwd(_problem("glu_bwd", d.tensor), d.tensor, gate.tensor, up.tensor, act, False)[2] is None
    assert all(guard.intact() for guard in [gate, up, d, *made])
    exact = gated.backward(d.tensor.double(), gate.tensor.double(), up.tensor.double(), act)
    assert torch.equal(product, found[2])
    for got, want in zip(found, exact, strict=True):
        assert got.dtype == DTYPES[dtype]
        # One rounding of the result, and a few of fp32 in the activation (which is itself at most |z| + 1 steep).
        size = (gate.tensor.double().abs() + 1) * (up.tensor.double().abs() + d.tensor.double().abs() + 1) ** 2
        tiny = torch.finfo(DTYPES[dtype]).tiny
        assert ((got.double() - want).abs() <= roundoff(got.dtype) * want.abs() + 8 * 2.0**-24 * size + tiny).all()


@pytest.mark.parametrize("act", NAMES)
def test_extremes(act):
    gate = torch.tensor([[100.0, -100.0, float("inf"), float("nan"), 0.0]])
    y = glu(gate, torch.ones_like(gate), act, backend="triton")
    want = torch.tensor([[100.0, 0.0, float("inf"), float("nan"), 0.0]])
    assert torch.allclose(y, want, atol=1e-30, equal_nan=True)


def test_one_launch_each_way():
    gate, up = (torch.randn(5, 70, requires_grad=True) for _ in range(2))
    with record(run=True) as launches:
        y = glu(gate, up, backend="triton")
        assert [each.name for each in launches] == ["_gated_kernel"]
        y.sum().backward()
    assert [each.name for each in launches] == ["_gated_kernel", "_gated_backward_kernel"]
    with record(TARGETS["sm_90"]) as launches:
        kernels.glu_fwd(_problem("glu_fwd", y), *(torch.empty(8192, 14336, device="meta") for _ in range(2)), "silu")
    assert launches[0].grid == (8192 * 14336 // 2048,)


@pytest.mark.parametrize(
    "case",
    [
        Case(17, 48, 96, 8, dtype=torch.bfloat16, quant="nf4", nested=True),
        Case(17, 48, 96, 8, dtype=torch.float32, bias=True),
        Case(9, 33, 64, 4, dtype=torch.float16, quant="nf4", p=0.3),
        Case(17, 48, 96, 8, dtype=torch.float32, quant="nf4", dora=True, bias=True),
        Case(9, 33, 64, 4, dtype=torch.bfloat16, dora=True, p=0.3),
    ],
    ids=str,
)
def test_with_the_down_projection_within_budget(case):
    """The linear's budget for the very product the kernel makes; dgate and dup against their equations for its dx."""
    inputs = make_inputs(case)
    gate, up = (torch.randn(case.m, case.k).to(case.dtype).requires_grad_() for _ in range(2))
    product = glu(gate, up, backend="triton").detach()
    inputs = inputs._replace(x=product)
    leaves = [None if t is None else t.requires_grad_() for t in (inputs.a, inputs.b, inputs.mag, inputs.bias)]
    a, b, mag, bias = leaves
    each = Projection(inputs.weight, a, b, case.scale, bias, mag, case.p, 3, case.dora_dropout)
    y = glu_linear(gate, up, each, seed=case.seed + 7, backend="triton")
    wanted = [leaf for leaf in leaves if leaf is not None]
    dgate, dup, *rest = torch.autograd.grad(y, [gate, up, *wanted], inputs.dy)
    grads = iter(rest)
    da, db, dmag, dbias = (None if leaf is None else next(grads) for leaf in leaves)
    x = product.clone().requires_grad_()
    seed = torch.tensor([case.seed + 7]) if case.p else None
    (dx,) = torch.autograd.grad(alone(x, each, seed, "triton"), x, inputs.dy)
    assert judge(case, inputs, Outputs(y.detach(), dx, da, db, dmag, dbias)) == []
    exact = gated.backward(dx.double(), gate.detach().double(), up.detach().double(), "silu")
    for got, want in ((dgate, exact.dgate), (dup, exact.dup)):
        assert (got.double() - want).norm() <= 2 * roundoff(case.dtype) * want.norm() + 1e-6
