"""The gated unit alone and fused with the down-projection: oracle, parity, what is kept, what is refused."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from fastlora import settings
from fastlora.errors import DtypeError, ShapeError, UnsupportedError
from fastlora.math import gated
from fastlora.math.nf4 import PackedWeight
from fastlora.ops.glu import glu, glu_linear
from fastlora.ops.lora import lora_linear
from fastlora.ops.member import Projection
from fastlora.ops.qlora import qlora_linear
from fastlora.testing import Case, make_inputs, roundoff
from tests.projection_tools import saved_storages

ACTS = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
    "relu": F.relu,
}
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def pair(m: int = 5, i: int = 24, dtype: torch.dtype = torch.float64, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(m, i, generator=generator).to(dtype).requires_grad_() for _ in range(2)]


@pytest.mark.parametrize("act", gated.NAMES)
def test_the_oracle_is_its_own_derivative(act):
    gate, up = pair()
    d = torch.randn(5, 24, dtype=torch.float64)
    want = torch.autograd.grad(gated.forward(gate, up, act), (gate, up), d)
    got = gated.backward(d, gate.detach(), up.detach(), act)
    assert torch.allclose(got.dgate, want[0], rtol=1e-12, atol=1e-14)
    assert torch.allclose(got.dup, want[1], rtol=1e-12, atol=1e-14)
    assert torch.equal(got.product, gated.forward(gate, up, act).detach())
    assert torch.allclose(got.product, ACTS[act](gate) * up, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("act", gated.NAMES)
def test_gradcheck(act):
    assert torch.autograd.gradcheck(lambda gate, up: glu(gate, up, act), pair())


@pytest.mark.parametrize("act", gated.NAMES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_cpu_path_is_bitwise_a_plain_models(act, dtype):
    gate, up = pair(dtype=dtype)
    y = glu(gate, up, act)
    want = ACTS[act](gate) * up
    assert torch.equal(y, want)
    d = torch.randn_like(y)
    for got, expected in zip(
        torch.autograd.grad(y, (gate, up), d), torch.autograd.grad(want, (gate, up), d), strict=True
    ):
        assert torch.equal(got, expected)


def test_any_shape_and_strides():
    gate, up = (torch.randn(2, 3, 10)[..., ::2].requires_grad_() for _ in range(2))
    assert torch.equal(glu(gate, up), F.silu(gate) * up)
    one = torch.randn(7)
    assert torch.equal(glu(one, one), F.silu(one) * one)
    none = torch.randn(0, 5, requires_grad=True)
    assert torch.autograd.grad(glu(none, none).sum(), none)[0].shape == (0, 5)


def test_only_what_needs_a_gradient_gets_one():
    gate, up = pair()
    assert torch.autograd.grad(glu(gate.detach(), up).sum(), up)[0].shape == up.shape
    assert not glu(gate.detach(), up.detach()).requires_grad
    with torch.no_grad():
        assert not glu(gate, up).requires_grad


def test_only_gate_and_up_are_kept():
    gate, up = pair(m=8, i=32, dtype=torch.float32)
    kept = saved_storages(lambda: glu(gate * 1, up * 1), ignore=(gate, up))
    assert sorted(kept) == [8 * 32 * 4] * 2  # what the two projections made
    eager = saved_storages(lambda: F.silu(gate * 1) * (up * 1), ignore=(gate, up))
    assert sum(eager) == 3 * 8 * 32 * 4


# --- with the down-projection -----------------------------------------------------------------------------------------

CASES = [
    Case(5, 12, 24, 3, dtype=torch.float64, adapter_dtype=torch.float64),
    Case(5, 12, 24, 3, dtype=torch.float64, adapter_dtype=torch.float64, bias=True, p=0.3),
    Case(5, 12, 24, 3, dtype=torch.float64, adapter_dtype=torch.float64, dora=True, bias=True),
    Case(5, 12, 24, 3, dtype=torch.float64, adapter_dtype=torch.float64, dora=True, p=0.3, quant="nf4", blocksize=32),
    Case(33, 40, 72, 8, bias=True),
    Case(33, 40, 72, 8, quant="nf4", nested=True, p=0.2),
    Case(9, 40, 64, 4, dtype=torch.bfloat16, quant="nf4", dora=True, bias=True),
    Case(9, 40, 64, 4, dtype=torch.bfloat16, p=0.2, dora=True, dora_dropout="shared"),
]


def down(case: Case) -> tuple[Projection, list[torch.Tensor], torch.Tensor]:
    inputs = make_inputs(case)
    leaves = [None if t is None else t.requires_grad_() for t in (inputs.a, inputs.b, inputs.mag, inputs.bias)]
    a, b, mag, bias = leaves
    made = Projection(inputs.weight, a, b, case.scale, bias, mag, case.p, 3, case.dora_dropout)
    return made, [leaf for leaf in leaves if leaf is not None], inputs.dy


def unfused(gate: torch.Tensor, up: torch.Tensor, act: str, each: Projection, seed: int) -> torch.Tensor:
    linear = qlora_linear if isinstance(each.weight, PackedWeight) else lora_linear
    return linear(
        ACTS[act](gate) * up,
        each.weight,
        each.a,
        each.b,
        each.scale,
        bias=each.bias,
        dropout_p=each.dropout_p,
        seed=seed,
        stream=each.stream,
        magnitude=each.magnitude,
        dora_dropout=each.dora_dropout,
    )


@pytest.mark.parametrize("low_memory", [False, True])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_fused_is_bitwise_the_unfused(case, low_memory):
    """The same kernels on the same values: all but g, which a second call makes again, and that in the same way."""
    each, leaves, dy = down(case)
    gate, up = pair(case.m, case.k, case.dtype)
    with settings.override(low_memory=low_memory):
        y = glu_linear(gate, up, each, "silu", seed=5)
        got = torch.autograd.grad(y, [gate, up, *leaves], dy)
    want_y = unfused(gate, up, "silu", each, 5)
    want = torch.autograd.grad(want_y, [gate, up, *leaves], dy)
    assert torch.equal(y, want_y)
    for one, other in zip(got, want, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("case", [case for case in CASES if case.dtype == torch.float64 and not case.dora], ids=str)
def test_fused_gradcheck(case):
    each, leaves, _ = down(case)

    def layer(gate, up, a, b, *rest):
        return glu_linear(gate, up, each._replace(a=a, b=b, bias=rest[0] if rest else None), "gelu", seed=5)

    assert torch.autograd.gradcheck(layer, (*pair(case.m, case.k), *leaves))


def test_neither_product_nor_activation_is_kept():
    case = Case(16, 24, 64, 4)
    each, leaves, _ = down(case)
    gate, up = pair(case.m, case.k, torch.float32)

    def kept(run):
        return sum(saved_storages(run, ignore=(gate, up, each.weight, *leaves)))

    wide, h = case.m * case.k * 4, case.m * case.r * 4
    assert kept(lambda: glu_linear(gate * 1, up * 1, each)) == 2 * wide + h
    assert kept(lambda: unfused(gate * 1, up * 1, "silu", each, 0)) == 4 * wide + h


@pytest.mark.parametrize("frozen", ["gate", "up", "both", "a", "b", "adapter"])
def test_what_is_frozen_gets_no_gradient(frozen):
    case = Case(7, 10, 16, 3, bias=True)
    each, _, dy = down(case)
    gate, up = pair(case.m, case.k, torch.float32)
    gate = gate.detach() if frozen in ("gate", "both") else gate
    up = up.detach() if frozen in ("up", "both") else up
    a = each.a.detach() if frozen in ("a", "adapter") else each.a
    b = each.b.detach() if frozen in ("b", "adapter") else each.b
    each = each._replace(a=a, b=b)
    leaves = [t for t in (gate, up, a, b, each.bias) if t.requires_grad]
    got = torch.autograd.grad(glu_linear(gate, up, each), leaves, dy)
    want = torch.autograd.grad(unfused(gate, up, "silu", each, 0), leaves, dy)
    for one, other in zip(got, want, strict=True):
        assert torch.equal(one, other)


def test_a_frozen_linear_without_adapter():
    case = Case(7, 10, 16, 0)
    inputs = make_inputs(case)
    gate, up = pair(case.m, case.k, torch.float32)
    y = glu_linear(gate, up, Projection(inputs.weight))
    want = F.linear(F.silu(gate) * up, inputs.weight)
    assert torch.allclose(y, want, atol=1e-5)
    grads = torch.autograd.grad(y, (gate, up), inputs.dy)
    for one, other in zip(grads, torch.autograd.grad(want, (gate, up), inputs.dy), strict=True):
        assert torch.allclose(one, other, atol=1e-5)


def test_a_scale_tensor_has_its_gradient():
    case = Case(7, 10, 16, 3)
    each, _, dy = down(case)
    gate, up = pair(case.m, case.k, torch.float32)
    scale = torch.tensor(1.5, requires_grad=True)
    (got,) = torch.autograd.grad(glu_linear(gate, up, each._replace(scale=scale)), scale, dy)
    (want,) = torch.autograd.grad(unfused(gate, up, "silu", each._replace(scale=scale), 0), scale, dy)
    assert torch.equal(got, want)


def test_autocast_and_compute_dtype_fall_to_the_plain_way():
    case = Case(7, 10, 16, 3)
    each, leaves, _ = down(case)
    gate, up = pair(case.m, case.k, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        got, want = glu_linear(gate, up, each), unfused(gate, up, "silu", each, 0)
    assert got.dtype == want.dtype == torch.bfloat16 and torch.equal(got, want)
    packed, *_ = down(dataclasses.replace(case, quant="nf4"))
    y = glu_linear(gate, up, packed._replace(compute_dtype=torch.bfloat16))
    assert y.dtype == torch.float32 and (y == y.bfloat16().float()).all()
    assert all(leaf.grad is None for leaf in leaves)


def test_compiled_in_one_graph():
    case = Case(7, 10, 16, 3)
    each, leaves, dy = down(case)
    gate, up = pair(case.m, case.k, torch.float32)
    torch._dynamo.reset()
    layer = torch.compile(lambda gate, up: glu_linear(gate, up, each), fullgraph=True, backend="aot_eager")
    got = torch.autograd.grad(layer(gate, up), [gate, up, *leaves], dy)
    want = torch.autograd.grad(glu_linear(gate, up, each), [gate, up, *leaves], dy)
    for one, other in zip(got, want, strict=True):
        assert torch.allclose(one, other, atol=1e-5)


def test_budget_in_16_bits():
    """The composition rounds act(gate), then the product: both roundings and no more."""
    gate, up = pair(64, 64, torch.bfloat16)
    exact = gated.forward(gate.detach().double(), up.detach().double(), "silu")
    error = (glu(gate, up).detach().double() - exact).norm()
    assert error <= 2 * roundoff(torch.bfloat16) * exact.norm()


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        ({"act": "tanh"}, ShapeError, "act must be one of silu, gelu, gelu_tanh, relu, got 'tanh'"),
        ({"up": torch.randn(5, 23)}, ShapeError, r"one shape \[..., i\], got \(5, 24\) and \(5, 23\)"),
        ({"up": torch.randn(5, 24, dtype=torch.float64)}, DtypeError, "float32 and torch.float64"),
        ({"gate": torch.ones(5, 24, dtype=torch.int32), "up": torch.ones(5, 24, dtype=torch.int32)}, DtypeError, "int"),
        ({"up": torch.empty(5, 24, device="meta")}, DtypeError, "on one device, got cpu and meta"),
        ({"gate": torch.tensor(1.0), "up": torch.tensor(1.0)}, ShapeError, r"got \(\) and \(\)"),
    ],
    ids=["act", "shape", "dtype", "integers", "device", "scalar"],
)
def test_bad_inputs(change, error, said):
    arguments = {"gate": torch.randn(5, 24), "up": torch.randn(5, 24), "act": "silu"} | change
    with pytest.raises(error, match=said):
        glu(**arguments)


def test_bad_projections():
    gate, up = (torch.randn(5, 24) for _ in range(2))
    weight, a, b = torch.randn(6, 24), torch.randn(3, 24), torch.randn(6, 3)
    with pytest.raises(ShapeError, match="in_features=20, got shape"):
        glu_linear(gate, up, Projection(torch.randn(6, 20), torch.randn(3, 20), b))
    with pytest.raises(ShapeError, match="both a and b or neither, got only a"):
        glu_linear(gate, up, Projection(weight, a))
    with pytest.raises(ShapeError, match="neither magnitude nor dropout"):
        glu_linear(gate, up, Projection(weight, dropout_p=0.1))
    with pytest.raises(ShapeError, match="dora_dropout must be one of"):
        glu_linear(gate, up, Projection(weight, a, b, dora_dropout="both"))
    with pytest.raises(DtypeError, match="frozen"):
        glu_linear(gate, up, Projection(weight.requires_grad_(), a, b))
    with pytest.raises(DtypeError, match="x and weight of one dtype"):
        glu_linear(gate, up, Projection(torch.randn(6, 24).double(), a, b))
    with pytest.raises(UnsupportedError, match="cannot run"):
        glu(gate.double(), up.double(), backend="triton")
