"""What the tests of grouped projections and gated units share: what a forward keeps for its backward."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastlora.math.nf4 import PackedWeight
from fastlora.ops.lora import lora_linear
from fastlora.ops.member import Projection
from fastlora.ops.qlora import qlora_linear
from fastlora.testing import Case, Inputs, make_inputs


def _storages(thing: Any) -> Iterable[int]:
    if isinstance(thing, PackedWeight):
        yield from (part.untyped_storage().data_ptr() for part in thing if isinstance(part, Tensor))
    elif isinstance(thing, Tensor):
        yield thing.untyped_storage().data_ptr()


def saved_storages(run: Callable[[], Any], ignore: Iterable[Any] = ()) -> list[int]:
    """Bytes of each storage that `run` keeps for its backward, each once, without those of `ignore`."""
    found: dict[int, Tensor] = {}
    known = {pointer for thing in ignore for pointer in _storages(thing)}

    def keep(tensor: Tensor) -> Tensor:
        found.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = run()
    kept = [tensor.untyped_storage().nbytes() for pointer, tensor in found.items() if pointer not in known]
    del result
    return kept


# --- groups -----------------------------------------------------------------------------------------------------------

_NF4 = {"quant": "nf4", "nested": True, "blocksize": 32}
# Named groups of cases over one x: m, k and dtype agree; n, r, format, bias, dropout and DoRA may not. r = 0 is a
# frozen linear.
GROUPS: dict[str, list[Case]] = {
    "qkv": [Case(9, n, 48, 4) for n in (32, 8, 8)],
    "nf4": [Case(9, n, 64, 8, **_NF4) for n in (48, 16, 16)],
    "gate-up": [Case(17, 70, 33, 3, bias=True, scale=0.7), Case(17, 70, 33, 3, bias=True)],
    "mixed": [Case(9, 20, 48, 3, bias=True), Case(9, 12, 48, 8, **_NF4), Case(9, 31, 48, 1, dora=True)],
    "partly": [Case(9, 20, 48, 4), Case(9, 20, 48, 0, bias=True), Case(9, 12, 48, 4, p=0.2)],
    "dropout": [Case(9, 20, 48, 4, p=0.25), Case(9, 12, 48, 4, p=0.5, **_NF4), Case(9, 12, 48, 4)],
    "dora": [Case(9, 20, 48, 4, dora=True, bias=True), Case(9, 12, 48, 4, dora=True, **_NF4)],
    "dora-drops": [
        Case(9, 20, 48, 4, dora=True, p=0.3),
        Case(9, 12, 48, 4, dora=True, p=0.3, dora_dropout="shared", **_NF4),
        Case(9, 12, 48, 4, p=0.3),
    ],
    "bf16": [Case(9, n, 64, 8, dtype=torch.bfloat16, **_NF4) for n in (48, 16, 16)],
    "bf16-adapters": [
        Case(9, n, 64, 8, dtype=torch.bfloat16, adapter_dtype=torch.bfloat16, bias=True) for n in (48, 16)
    ],
    "shapes": [Case(5, 1, 33, 1), Case(5, 65, 33, 24, bias=True), Case(5, 7, 33, 40)],
}


class Group(NamedTuple):
    """Tensors of a group: x, which asks for a gradient as the leaves do, one dy an output, and each case's inputs."""

    x: Tensor
    members: list[Projection]
    leaves: list[Tensor]
    dys: list[Tensor]
    inputs: list[Inputs]


def make_group(cases: Sequence[Case]) -> Group:
    """Random inputs of cases over one x; the dropout streams of all are 3."""
    x = None
    members, leaves, dys, given = [], [], [], []
    for number, case in enumerate(cases):
        inputs = make_inputs(dataclasses.replace(case, seed=number))
        x = inputs.x.clone().requires_grad_() if x is None else x
        given.append(inputs._replace(x=x.detach()))
        dys.append(inputs.dy)
        a, b = (inputs.a, inputs.b) if case.r else (None, None)
        mine = [None if t is None else t.clone().requires_grad_() for t in (a, b, inputs.mag, inputs.bias)]
        leaves += [leaf for leaf in mine if leaf is not None]
        members.append(
            Projection(inputs.weight, mine[0], mine[1], case.scale, mine[3], mine[2], case.p, 3, case.dora_dropout)
        )
    assert x is not None
    return Group(x, members, leaves, dys, given)


def alone(each: Projection, x: Tensor, seed: int, stream: int, backend: str | None = None) -> Tensor:
    """One linear of a group by the public function of its kind, its dropout stream after `stream`."""
    a = x.new_empty((0, x.shape[-1])) if each.a is None else each.a
    b = x.new_empty((each.weight.shape[0], 0)) if each.b is None else each.b
    keywords: dict[str, Any] = {
        "bias": each.bias,
        "dropout_p": each.dropout_p,
        "seed": seed,
        "stream": stream + each.stream,
        "magnitude": each.magnitude,
        "dora_dropout": each.dora_dropout,
        "backend": backend,
    }
    if isinstance(each.weight, PackedWeight):
        return qlora_linear(x, each.weight, a, b, each.scale, compute_dtype=each.compute_dtype, **keywords)
    return lora_linear(x, each.weight, a, b, each.scale, **keywords)
