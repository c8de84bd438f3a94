"""Several adapted linears over one x as one Function: bits of the single layers, gradients, masks, what is kept."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from fastlora import settings
from fastlora.errors import DtypeError, ShapeError, UnsupportedError
from fastlora.math import philox
from fastlora.math.nf4 import PackedWeight
from fastlora.ops.member import Projection
from fastlora.ops.projections import STREAMS, projections
from fastlora.testing import Case, Outputs, judge
from tests.projection_tools import GROUPS, Group, alone, make_group, saved_storages

F64 = {"dtype": torch.float64, "adapter_dtype": torch.float64}


def together(group: Group, x: torch.Tensor, **keywords: Any) -> tuple[torch.Tensor, ...]:
    return projections(x, group.members, **{"seed": 9} | keywords)


def gradients(ys: Any, group: Group, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return torch.autograd.grad(ys, [x, *group.leaves], group.dys)


@pytest.mark.parametrize("low_memory", [False, True])
@pytest.mark.parametrize("name", list(GROUPS))
def test_bitwise_the_single_layers(name, low_memory):
    group = make_group(GROUPS[name])
    with settings.override(low_memory=low_memory):
        ys = together(group, group.x)
        got = gradients(ys, group, group.x)
    singles = [alone(each, group.x, 9, STREAMS * i) for i, each in enumerate(group.members)]
    want = gradients(singles, group, group.x)
    for one, other in zip((*ys, *got), (*singles, *want), strict=True):
        assert one.dtype == other.dtype and torch.equal(one, other)


@pytest.mark.parametrize("name", list(GROUPS))
def test_within_budget(name):
    cases = GROUPS[name]
    group = make_group(cases)
    ys = together(group, group.x)
    for i, (case, inputs) in enumerate(zip(cases, group.inputs, strict=True)):
        keep = None
        if case.p:
            bits = philox.dropout_bits(9, STREAMS * i + 3, case.m, case.k, case.p)
            keep = philox.unpack_bits(bits, case.k)
        each = group.members[i]
        leaves = [group.x, *(t for t in (each.a, each.b, each.magnitude, each.bias) if t is not None)]
        dx, *rest = torch.autograd.grad(ys[i], leaves, group.dys[i], retain_graph=True)
        grads = iter(rest)
        da, db, dmag, dbias = (None if t is None else next(grads) for t in (each.a, each.b, each.magnitude, each.bias))
        if each.a is None:
            da, db = inputs.a, inputs.b  # nothing: a [0, k], b [n, 0]
        assert judge(case, inputs._replace(keep=keep), Outputs(ys[i].detach(), dx, da, db, dmag, dbias)) == []


@pytest.mark.parametrize("name", ["qkv", "mixed", "dropout", "partly", "shapes"])
def test_gradcheck(name):
    cases = [dataclasses.replace(case, m=3, n=case.n % 5 + 2, k=8, r=min(case.r, 2), **F64) for case in GROUPS[name]]
    cases = [dataclasses.replace(case, dora=False, quant="") for case in cases]
    group = make_group(cases)

    def run(x, *leaves):
        given = iter(leaves)
        fields = ("a", "b", "magnitude", "bias")
        members = [
            each._replace(**{name: None if getattr(each, name) is None else next(given) for name in fields})
            for each in group.members
        ]
        return projections(x, members, seed=9)

    assert torch.autograd.gradcheck(run, (group.x, *group.leaves))


def test_each_drops_by_its_own_stream_or_all_by_one():
    cases = [Case(6, 10, 40, 4, p=0.5, bias=False) for _ in range(3)]
    group = make_group(cases)
    x, eye = torch.ones(6, 40), torch.eye(40)
    members = [
        Projection(torch.zeros(40, 40), eye, eye, 1.0, dropout_p=0.5, stream=each.stream) for each in group.members
    ]
    own = [y != 0 for y in projections(x, members, seed=4)]
    for i, kept in enumerate(own):
        want = philox.unpack_bits(philox.dropout_bits(4, i * STREAMS + 3, 6, 40, 0.5), 40)
        assert torch.equal(kept, want)
    one = [y != 0 for y in projections(x, members, seed=4, shared_dropout=True)]
    want = philox.unpack_bits(philox.dropout_bits(4, 3, 6, 40, 0.5), 40)
    assert all(torch.equal(kept, want) for kept in one)


def test_one_seed_is_drawn_and_only_where_something_drops():
    group = make_group(GROUPS["dropout"])
    torch.manual_seed(5)
    first = together(group, group.x, seed=None)
    torch.manual_seed(5)
    drawn = torch.randint(0, 2**63 - 1, (1,), dtype=torch.int64)
    state = torch.get_rng_state()
    assert all(torch.equal(a, b) for a, b in zip(first, together(group, group.x, seed=drawn), strict=True))
    torch.manual_seed(5)
    together(group, group.x, seed=None)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    together(make_group(GROUPS["qkv"]), make_group(GROUPS["qkv"]).x, seed=None)
    assert torch.equal(torch.get_rng_state(), before)


def test_x_is_kept_once():
    cases = GROUPS["qkv"]
    group = make_group(cases)
    frozen = [each.weight for each in group.members]
    kept = saved_storages(lambda: projections(group.x * 1, group.members), ignore=(*frozen, *group.leaves))
    case = cases[0]
    assert sorted(kept) == sorted([4 * case.m * case.k, *(4 * case.m * each.r for each in cases)])


def test_under_autocast_x_is_cast_and_kept_once():
    group = make_group([Case(8, 12, 64, 2), Case(8, 20, 64, 3)])
    weights = [each.weight.bfloat16() for each in group.members]
    members = [each._replace(weight=w) for each, w in zip(group.members, weights, strict=True)]
    with torch.autocast("cpu", torch.bfloat16):
        kept = saved_storages(lambda: projections(group.x, members), ignore=(*weights, *group.leaves))
        assert sorted(kept) == sorted([2 * 8 * 64, 4 * 8 * 2, 4 * 8 * 3])
        ys = projections(group.x, members)
        want = [alone(each, group.x, 0, 0) for each in members]
    got = gradients(ys, group._replace(dys=[dy.bfloat16() for dy in group.dys]), group.x)
    for y, other in zip(ys, want, strict=True):
        assert y.dtype == torch.bfloat16 and torch.equal(y, other)
    assert got[0].dtype == torch.float32


def test_compute_dtype_casts_back():
    cases = [Case(5, 12, 64, 2, quant="nf4"), Case(5, 20, 64, 3, quant="nf4")]
    group = make_group(cases)
    members = [each._replace(compute_dtype=torch.bfloat16) for each in group.members]
    ys = projections(group.x, members)
    want = [alone(each, group.x, 0, 0) for each in members]
    for y, other in zip(ys, want, strict=True):
        assert y.dtype == torch.float32 and torch.equal(y, other)
    # dx is added in bf16 and widened once, where single layers widen each: one rounding more.
    (dx, *grads), (other, *rest) = gradients(ys, group, group.x), gradients(want, group, group.x)
    assert (dx - other).norm() <= 2.0**-8 * other.norm()
    assert all(torch.equal(one, two) for one, two in zip(grads, rest, strict=True))


@pytest.mark.parametrize("used", [(0,), (1,), (0, 2), ()], ids=str)
def test_outputs_that_are_not_used(used):
    group = make_group(GROUPS["mixed"])
    ys = together(group, group.x)
    start = group.x.new_zeros(()) if used else group.x.sum()  # with it the sums over dx have another order
    loss = sum((ys[i].square().sum() for i in used), start)
    got = torch.autograd.grad(loss, [group.x, *group.leaves], allow_unused=True)
    singles = [alone(each, group.x, 9, STREAMS * i) for i, each in enumerate(group.members)]
    loss = sum((singles[i].square().sum() for i in used), start)
    want = torch.autograd.grad(loss, [group.x, *group.leaves], allow_unused=True)
    for one, other in zip(got, want, strict=True):
        assert (one is None) == (other is None)
        assert one is None or torch.equal(one, other)


@pytest.mark.parametrize("frozen", ["x", "a", "adapters", "one", "all"])
def test_what_is_frozen(frozen):
    group = make_group([dataclasses.replace(case, bias=True) for case in GROUPS["qkv"]])
    x = group.x.detach() if frozen in ("x", "all") else group.x
    members = list(group.members)
    for i, each in enumerate(members):
        if frozen in ("adapters", "all") or (frozen == "one" and i == 1):
            parts = (each.a, each.b, each.bias)
            members[i] = each._replace(**dict(zip(["a", "b", "bias"], (t.detach() for t in parts), strict=True)))
        elif frozen == "a":
            members[i] = each._replace(a=each.a.detach())
    ys = projections(x, members)
    singles = [alone(each, x, 0, 0) for each in members]
    assert [y.requires_grad for y in ys] == [y.requires_grad for y in singles]
    leaves = [t for t in (x, *(t for each in members for t in (each.a, each.b, each.bias))) if t.requires_grad]
    chosen = [i for i, y in enumerate(ys) if y.requires_grad]
    dys = [group.dys[i] for i in chosen]
    if chosen:
        got = torch.autograd.grad([ys[i] for i in chosen], leaves, dys)
        want = torch.autograd.grad([singles[i] for i in chosen], leaves, dys)
        assert all(torch.equal(one, other) for one, other in zip(got, want, strict=True))


def test_frozen_x_and_a_frozen_member():
    group = make_group(GROUPS["qkv"])
    members = [group.members[0], group.members[1]._replace(a=None, b=None, scale=1.0)]
    ys = projections(group.x.detach(), members)
    assert [y.requires_grad for y in ys] == [True, False]
    with torch.no_grad():
        assert not any(y.requires_grad for y in projections(group.x, members))
    with torch.inference_mode():
        assert all(torch.equal(a, b) for a, b in zip(ys, projections(group.x, members), strict=True))


@pytest.mark.parametrize("shape", [(40,), (2, 3, 40), (0, 40), (2, 0, 40)], ids=str)
def test_shapes_of_x(shape):
    group = make_group([Case(1, 12, 40, 2, bias=True), Case(1, 7, 40, 3, quant="nf4", blocksize=32)])
    x = torch.randn(*shape, requires_grad=True)
    ys = projections(x, group.members)
    singles = [alone(each, x, 0, 0) for each in group.members]
    for y, other in zip(ys, singles, strict=True):
        assert y.shape == other.shape and torch.equal(y, other)
    got = torch.autograd.grad([y.sum() for y in ys], [x, *group.leaves])
    want = torch.autograd.grad([y.sum() for y in singles], [x, *group.leaves])
    assert all(torch.equal(one, other) for one, other in zip(got, want, strict=True))


def test_strided_x_and_dy_and_output_changed_in_place():
    group = make_group([Case(6, 12, 40, 2), Case(6, 12, 40, 3)])
    x = torch.randn(40, 6).t().requires_grad_()
    ys = projections(x, group.members)
    dys = [torch.randn(12, 6).t(), torch.ones(1, 1).expand(6, 12)]
    singles = [alone(each, x, 0, 0) for each in group.members]
    got = torch.autograd.grad(ys, [x, *group.leaves], dys)
    want = torch.autograd.grad(singles, [x, *group.leaves], dys)
    assert all(torch.equal(one, other) for one, other in zip(got, want, strict=True))
    ys = projections(x, group.members)
    ys[0].mul_(2)
    ys[1].add_(ys[0])
    (ys[0].sum() + ys[1].sum()).backward()


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_repeats_the_masks(reentrant):
    group = make_group(GROUPS["dropout"])

    def block(x):
        return torch.cat(projections(x, group.members), -1).square()

    torch.manual_seed(3)
    want = torch.autograd.grad(block(group.x).sum(), [group.x, *group.leaves])
    torch.manual_seed(3)
    for leaf in (group.x, *group.leaves):
        leaf.grad = None
    checkpoint(block, group.x, use_reentrant=reentrant).sum().backward()
    for leaf, other in zip((group.x, *group.leaves), want, strict=True):
        assert torch.equal(leaf.grad, other)


def test_compiled_and_watched_go_one_by_one():
    group = make_group(GROUPS["qkv"])
    want = gradients(projections(group.x, group.members), group, group.x)
    torch._dynamo.reset()
    layer = torch.compile(lambda x: projections(x, group.members), fullgraph=True, backend="aot_eager")
    got = gradients(layer(group.x), group, group.x)
    for one, other in zip(got, want, strict=True):
        assert torch.equal(one, other)
    seen: list[str] = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    with Watch():
        projections(group.x, group.members)
    assert seen.count("fastlora.lora_fwd.default") == 3


def test_a_scale_tensor_has_its_gradient():
    group = make_group(GROUPS["qkv"])
    scale = torch.tensor(1.5, requires_grad=True)
    members = [group.members[0]._replace(scale=scale), *group.members[1:]]
    (got,) = torch.autograd.grad(projections(group.x, members), scale, group.dys)
    (want,) = torch.autograd.grad([alone(each, group.x, 0, 0) for each in members], scale, group.dys)
    assert torch.equal(got, want)


def test_double_backward_and_forward_mode_are_refused():
    group = make_group(GROUPS["qkv"])
    ys = projections(group.x, group.members)
    (dx,) = torch.autograd.grad(ys[0].square().sum(), group.x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()
    with pytest.raises(UnsupportedError, match="forward-mode"):
        torch.func.jvp(lambda x: projections(x, group.members)[0], (group.x.detach(),), (group.x.detach(),))


# --- what is refused --------------------------------------------------------------------------------------------------


def good() -> Projection:
    return Projection(torch.randn(6, 24), torch.randn(3, 24), torch.randn(6, 3))


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        ({"weight": torch.randn(6)}, ShapeError, r"weight of shape \[n, k\], got \(6,\)"),
        ({"weight": torch.randn(6, 20)}, ShapeError, "in_features=20, got shape"),
        ({"a": torch.randn(3, 20)}, ShapeError, r"expected a \[r, 24\] and b \[6, r\]"),
        ({"a": None}, ShapeError, "both a and b or neither, got only b"),
        ({"a": None, "b": None, "magnitude": torch.ones(6)}, ShapeError, "neither magnitude nor dropout"),
        ({"a": torch.randn(3, 24).half()}, DtypeError, "one floating dtype"),
        ({"bias": torch.randn(5)}, ShapeError, r"bias of shape \(6,\), got \(5,\)"),
        ({"magnitude": torch.randn(5)}, ShapeError, r"magnitude of shape \(6,\), got \(5,\)"),
        ({"dropout_p": 1.0}, ShapeError, r"dropout_p must be in \[0, 1\), got 1.0"),
        ({"dora_dropout": "none"}, ShapeError, "dora_dropout must be one of"),
        ({"compute_dtype": torch.bfloat16}, DtypeError, "one compute dtype"),
        ({"weight": torch.randn(6, 24).double()}, DtypeError, "x and weight of one dtype"),
        ({"weight": torch.randn(6, 24, requires_grad=True)}, DtypeError, "frozen"),
        ({"weight": torch.empty(6, 24, device="meta")}, DtypeError, "on the device of x, cpu, got one on meta"),
        ({"scale": float("nan")}, ShapeError, "scale must be finite"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_projections(change, error, said):
    with pytest.raises(error, match=said):
        projections(torch.randn(5, 24), [good(), good()._replace(**change)])


def test_bad_groups():
    x = torch.randn(5, 24)
    with pytest.raises(ShapeError, match="at least one projection, got none"):
        projections(x, [])
    with pytest.raises(ShapeError, match=r"needs one dropout_p, got 0\.1, 0\.2"):
        projections(x, [good()._replace(dropout_p=0.1), good()._replace(dropout_p=0.2)], shared_dropout=True)
    with pytest.raises(DtypeError, match="one-element int64"):
        projections(x, [good()._replace(dropout_p=0.1)], seed=torch.tensor([1, 2]))
    with pytest.raises(DtypeError, match="floating"):
        projections(torch.ones(5, 24, dtype=torch.int64), [good()])
    with pytest.raises(UnsupportedError, match="unknown backend 'quantum'"):
        projections(x, [good()], backend="quantum")
    assert isinstance(make_group(GROUPS["mixed"]).members[1].weight, PackedWeight)
