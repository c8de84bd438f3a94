"""Every backend against the float64 oracle, by the error budget, for every output and gradient."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastlora import backends
from fastlora.dispatch import registry
from fastlora.math import nf4, philox
from fastlora.problem import DENSE, Problem
from fastlora.testing import Case, Inputs, eager, guarded, judge, make_inputs, oracle, run

backends.load()
DEVICE = "cpu"


def able(case: Case) -> list[str]:
    """Backends that run the case's forward on this host."""
    found = []
    for name in registry.backends():
        kernels = [k for k in registry.kernels("lora_fwd") if k.backend == name]
        limits = kernels[0].limits
        if any(not k.limits.missing() for k in kernels) and (limits.dtypes is None or case.dtype in limits.dtypes):
            found.append(name)
    return found


dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64])
cases = st.builds(
    Case,
    m=st.sampled_from([0, 1, 2, 3, 5, 8, 16, 17, 33, 70]),
    n=st.sampled_from([1, 3, 16, 31, 64, 97]),
    k=st.sampled_from([1, 7, 16, 32, 48, 80, 96, 100, 129]),
    r=st.sampled_from([1, 2, 3, 8, 16, 24]),
    dtype=dtypes,
    adapter_dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    quant=st.sampled_from(["", "nf4", "nf4", "fp4"]),
    blocksize=st.sampled_from([32, 64, 128]),
    nested=st.booleans(),
    bias=st.booleans(),
    p=st.sampled_from([0.0, 0.0, 0.1, 0.5, 0.9]),
    dora=st.booleans(),
    dora_dropout=st.sampled_from(["peft", "shared"]),
    scale=st.sampled_from([0.37, 1.0, 2.0]),
    seed=st.integers(0, 2**20),
)


@settings(max_examples=150, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
@given(case=cases)
def test_outputs_and_gradients_within_budget(case):
    if case.dtype == torch.float64:
        case = dataclasses.replace(case, adapter_dtype=torch.float64)
    inputs = make_inputs(case, DEVICE)
    truth = oracle(case, inputs)
    for backend in able(case):
        assert judge(case, inputs, run(case, inputs, backend), truth) == [], backend


@pytest.mark.parametrize("quant", ["", "nf4"])
def test_larger_shapes_within_budget(quant):
    for dtype in (torch.float32, torch.bfloat16):
        case = Case(150, 260, 520, 16, dtype=dtype, quant=quant, bias=True, p=0.1, dora=True, nested=True)
        inputs = make_inputs(case)
        for backend in able(case):
            assert judge(case, inputs, run(case, inputs, backend)) == [], backend


@pytest.mark.parametrize("p", [0.0, 0.05])
def test_long_reductions_of_few_tokens_within_budget(p):
    """da and db of a few tokens inherit the error of g = dy b and h = x a^T: long sums must not run in one chain."""
    for case in (Case(8, 4096, 64, 16, quant="nf4", p=p), Case(8, 64, 4096, 16, quant="nf4", p=p, dora=True)):
        inputs = make_inputs(case)
        for backend in able(case):
            assert judge(case, inputs, run(case, inputs, backend)) == [], backend


def test_a_transposed_weight_and_strided_operands():
    """Views with other strides are read as what they are."""
    case = Case(9, 24, 40, 3, bias=True, dora=True, p=0.2)
    inputs = make_inputs(case)
    strided = {name: getattr(inputs, name).mT.contiguous().mT for name in ("x", "weight", "a", "b", "dy")}
    strided |= {name: torch.stack([getattr(inputs, name)] * 2, 1)[:, 0] for name in ("bias", "mag")}
    assert not any(t.is_contiguous() for t in strided.values())
    for backend in able(case):
        assert judge(case, inputs, run(case, inputs._replace(**strided), backend)) == [], backend


def _tf32(t: torch.Tensor) -> torch.Tensor:
    """Round fp32 to the 10-bit mantissa of tf32."""
    bits = t.float().view(torch.int32)
    return ((bits + 0x1000) & ~0x1FFF).view(torch.float32)


def test_the_budget_rejects_tf32_and_small_mistakes():
    """fp32 means fp32: a tf32 emulation fails, and so do one-percent errors of any single output."""
    case = Case(64, 96, 128, 8, bias=True, dora=True, p=0.1)
    inputs = make_inputs(case)
    good = run(case, inputs, "reference")
    assert judge(case, inputs, good) == []
    rounded = Inputs(*(_tf32(t) if isinstance(t, torch.Tensor) and t.dtype == torch.float32 else t for t in inputs))
    assert judge(case, inputs, eager(case, rounded)) != []
    for name in good._fields:
        broken = good._replace(**{name: getattr(good, name) * 1.001})
        assert any(problem.startswith(name) for problem in judge(case, inputs, broken)), name


def why(backend: str) -> str:
    """Why a backend cannot run here, in its own words."""
    problem = Problem("lora_fwd", 1, 1, 1, 1, torch.float32, torch.float32, DENSE, 0, "cpu")
    kernels = [kernel for kernel in registry.kernels("lora_fwd") if kernel.backend == backend]
    return f"{backend}: {'; '.join(registry.why_not(kernels[-1], problem))}"


def test_masks_are_equal_across_backends():
    for m, k, p in ((1, 1, 0.5), (3, 13, 0.1), (40, 264, 0.9), (17, 100, 0.3)):
        seed = torch.tensor([2**40 + 12345], dtype=torch.int64)
        want = philox.dropout_bits(seed, 65537, m, k, p)
        for name in registry.backends():
            kernels = [k for k in registry.kernels("dropout_mask") if k.backend == name and not k.limits.missing()]
            if kernels:
                got = torch.ops.fastlora.dropout_mask(seed, 65537, m, k, p, name)
                assert torch.equal(got, want), name


@pytest.mark.parametrize("backend", registry.backends())
def test_dropout_gradients_use_the_forward_mask(backend):
    """With w = 0 and a = b = identity, dx is the mask itself times its scale."""
    if backend not in able(Case(1, 1, 1, 1)):
        pytest.skip(why(backend))
    k, p = 24, 0.4
    x = torch.ones(50, k, requires_grad=True)
    eye = torch.eye(k)
    from fastlora.functional import dropout_mask, lora_linear

    y = lora_linear(x, torch.zeros(k, k), eye, eye, 1.0, dropout_p=p, seed=11, stream=5, backend=backend)
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
    keep = dropout_mask((50, k), p, 11, 5)
    assert torch.equal(dx, keep * torch.tensor(philox.keep_scale(p), dtype=torch.float32))
    assert torch.equal(y.detach() != 0, keep)


@pytest.mark.parametrize("backend", registry.backends())
@pytest.mark.parametrize("quant", ["", "nf4"])
def test_guard_bands_and_repeatability(backend, quant):
    case = Case(19, 37, 53, 5, quant=quant, bias=True, p=0.2, dora=True)
    if backend not in able(case):
        pytest.skip(why(backend))
    inputs = make_inputs(case)
    first = run(case, inputs, backend)
    fenced = {
        f: guarded(t) for f, t in inputs._asdict().items() if isinstance(t, torch.Tensor) and t.dtype == torch.float32
    }
    weight = inputs.weight
    if quant:
        parts = {name: guarded(getattr(weight, name)) for name in ("packed", "absmax")}
        weight = weight._replace(**{name: part.tensor for name, part in parts.items()})
        fenced |= parts
    again = inputs._replace(**{f: g.tensor for f, g in fenced.items() if f in inputs._fields})
    again = again._replace(weight=weight if quant else again.weight)
    second = run(case, again, backend)
    for name, a, b in zip(first._fields, first, second, strict=True):
        assert torch.equal(a, b), f"{name} is not repeatable"
    assert all(fence.intact() for fence in fenced.values())


def test_forward_and_backward_use_the_same_weight():
    """dx of dy = e_j is row j of the very weight the forward multiplied with."""
    case = Case(8, 8, 64, 1, quant="nf4", scale=0.0)
    inputs = make_inputs(case)
    for backend in able(case):
        out = run(case, inputs._replace(dy=torch.eye(8)), backend)
        assert torch.equal(out.dx, inputs.w.float()), backend
        forward = run(case, inputs._replace(x=torch.eye(64)[:8], dy=torch.eye(8)), backend)
        assert torch.equal(forward.y, nf4.dequantize(inputs.weight, torch.float32)[:, :8].T), backend
