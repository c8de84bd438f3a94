"""The merged weight of a checkpoint's second forward reaches the backward: single layers; and whoever looks on."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from fastlora import settings
from fastlora.backends.triton.launch import record
from fastlora.ops import merged, schema
from fastlora.ops import projections as group_ops
from fastlora.ops.projections import projections
from fastlora.ops.qlora import qlora_linear
from fastlora.testing import Case, make_inputs
from tests.projection_tools import GROUPS, make_group

BF16, FP32 = torch.bfloat16, torch.float32
NF4: dict[str, Any] = {"quant": "nf4", "nested": True, "blocksize": 32}
N, K = 48, 64


class Layer:
    """One layer by Triton's kernels, its leaves, and a loss."""

    def __init__(self, case: Case, backend: str = "triton") -> None:
        inputs = make_inputs(case)
        self.case, self.backend, self.weight = case, backend, inputs.weight
        fields = (inputs.a, inputs.b, inputs.mag, inputs.bias)
        self.a, self.b, self.mag, self.bias = (None if t is None else t.clone().requires_grad_() for t in fields)
        self.x = inputs.x.clone().requires_grad_()
        self.leaves = [t for t in (self.x, self.a, self.b, self.mag, self.bias) if t is not None]

    def __call__(self, x: Tensor) -> Tensor:
        case = self.case
        options = {"bias": self.bias, "magnitude": self.mag, "dropout_p": case.p, "seed": 5, "backend": self.backend}
        return qlora_linear(x, self.weight, self.a, self.b, case.scale, **options).float().square()

    def gradients(self, y: Tensor) -> list[Tensor]:
        for leaf in self.leaves:
            leaf.grad = None
        y.sum().backward()
        return [leaf.grad for leaf in self.leaves]


def merges(run: Callable[[], Any]) -> int:
    with record(run=True) as launches:
        run()
    return [each.name for each in launches].count("_merge_kernel")


def equal(some: list[Tensor], others: list[Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(some, others, strict=True))


CASES = {
    "bf16": Case(9, N, K, 8, dtype=BF16, bias=True, **NF4),
    "fp32": Case(9, N, K, 8, **NF4),
    "wide": Case(9, K, 3 * N, 4, dtype=BF16, **NF4),
}


@pytest.mark.parametrize("low_memory", [False, True])
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", list(CASES))
def test_a_recomputed_merge_is_not_made_again(name, reentrant, low_memory):
    layer = Layer(CASES[name])
    want = layer.gradients(layer(layer.x))
    got: list[Tensor] = []
    with settings.override(low_memory=low_memory):
        found = merges(lambda: got.extend(layer.gradients(checkpoint(layer, layer.x, use_reentrant=reentrant))))
    assert found == (3 if low_memory else 2)  # forward, recompute, and without memory for it the backward
    assert equal(got, want)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize(
    ("options", "found"), [({"dora": True}, 3), ({"p": 0.25}, 0), ({"dora": True, "p": 0.25}, 0)], ids=str
)
def test_what_a_backward_would_not_use_is_not_kept(options, found, reentrant):
    """DoRA's forward merges without c in training; dropout has no merge plan."""
    layer = Layer(Case(9, N, K, 8, **options, **NF4))
    want = layer.gradients(layer(layer.x))
    got: list[Tensor] = []
    assert merges(lambda: got.extend(layer.gradients(checkpoint(layer, layer.x, use_reentrant=reentrant)))) == found
    assert equal(got, want)


def test_without_dx_nothing_is_kept():
    layer = Layer(CASES["fp32"])
    x, kept = layer.x.detach(), []
    with monitored(kept, "torch.utils.checkpoint"):
        layer(x)
    assert not dense(kept)
    assert merges(lambda: layer.gradients(checkpoint(layer, x, use_reentrant=False))) == 2


# --- memory -----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def monitored(kept: list[Tensor], module: str) -> Iterator[None]:
    """What is saved, by hooks that come from `module`."""

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    pack.__module__ = module
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield


def dense(kept: list[Tensor]) -> list[Tensor]:
    return [t for t in kept if tuple(t.shape) == (N, K) and t.is_floating_point()]


@pytest.mark.parametrize(
    ("module", "low_memory", "count"),
    [("elsewhere", False, 0), ("torch.utils.checkpoint", False, 1), ("torch.utils.checkpoint", True, 0)],
)
def test_a_merged_weight_is_kept_in_checkpoints_only(module, low_memory, count):
    layer, kept = Layer(CASES["bf16"]), []
    with settings.override(low_memory=low_memory), monitored(kept, module):
        layer(layer.x)
    assert kept and len(dense(kept)) == count
    for made in dense(kept):
        assert made.dtype == BF16 and merged.real(made)


def test_without_hooks_nothing_is_kept():
    layer = Layer(CASES["bf16"])
    y = qlora_linear(layer.x, layer.weight, layer.a, layer.b, 1.0, bias=layer.bias, backend="triton")
    assert not dense([t for t in y.grad_fn.saved_tensors if t is not None])


# --- whoever looks on -------------------------------------------------------------------------------------------------


class Look(TorchDispatchMode):
    """A mode that changes nothing."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


LOOKS: dict[str, Callable[[], Any]] = {
    "mode": Look,
    "profiler": lambda: torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]),
    "function mode": lambda: torch.device("cpu"),
}


@pytest.mark.parametrize("where", ["forward", "backward", "both"])
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", list(LOOKS))
def test_a_checkpoint_may_be_looked_on_in_one_pass(name, reentrant, where):
    """Both forwards of a checkpoint by hooks must save alike, whatever stands between a call and an op's body."""
    layer = Layer(CASES["bf16"])
    want = layer.gradients(layer(layer.x))
    with LOOKS[name]() if where != "backward" else contextlib.nullcontext():
        y = checkpoint(layer, layer.x, use_reentrant=reentrant)
    with LOOKS[name]() if where != "forward" else contextlib.nullcontext():
        got = layer.gradients(y)
    assert equal(got, want)


def test_a_stand_in_has_no_bytes():
    stand_in = merged.stand_in(torch.ones(2, dtype=BF16), (1, 1))
    assert not merged.real(stand_in) and merged.real(torch.empty(1, 1))
    wide = merged.stand_in(torch.ones(2, dtype=BF16), (N, K))
    assert tuple(wide.shape) == (N, K) and wide.dtype == BF16 and wide.untyped_storage().nbytes() == 2


# --- a backward by another plan ---------------------------------------------------------------------------------------


def test_a_backward_that_does_not_merge_has_no_use_for_it(monkeypatch):
    monkeypatch.setattr(schema, "merged_lives", lambda: True)
    layer = Layer(CASES["fp32"])
    want = layer.gradients(layer(layer.x))
    y = layer(layer.x)
    with settings.override(merge=False):
        got = layer.gradients(y)
    for one, other in zip(got, want, strict=True):
        assert (one - other).norm() <= 1e-5 * other.norm()


def test_a_groups_backward_that_does_not_merge_has_no_use_for_it(monkeypatch):
    monkeypatch.setattr(group_ops, "merged_lives", lambda: True)
    group = make_group(GROUPS["nf4"])

    def step(merge: bool) -> list[Tensor]:
        ys = projections(group.x, group.members, backend="triton")
        with settings.override(merge=merge):
            return list(torch.autograd.grad(ys, [group.x, *group.leaves], group.dys))

    for one, other in zip(step(False), step(True), strict=True):
        assert (one - other).norm() <= 1e-5 * other.norm()


def test_no_tokens():
    layer = Layer(Case(0, N, K, 8, **NF4))
    for reentrant in (False, True):
        dx, da, db = layer.gradients(checkpoint(layer, layer.x, use_reentrant=reentrant))
        assert dx.shape == (0, K) and not da.any() and not db.any()
