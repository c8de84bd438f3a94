"""A recorded training step, replayed: what a CUDA graph does, shown on a CPU with a traced graph of the same ops.

A graph may hold no decision made on the host: no value read back, no copy from the host, and the dropout seed must be
drawn by an op inside the graph, from torch's generator. `tests/gpu/test_graphs.py` captures the real thing.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

import fastlora

KINDS = {
    "lora": (fastlora.LoraLinear, {}),
    "qlora": (fastlora.QLoraLinear, {}),
    "qdora": (fastlora.QLoraLinear, {"use_dora": True}),
    "qdora shared": (fastlora.QLoraLinear, {"use_dora": True, "dora_dropout": "shared"}),
}
READS = {"aten._local_scalar_dense", "aten.nonzero", "aten.item", "aten.equal", "aten.is_nonzero"}


def build(kind: str, p: float = 0.3) -> nn.Module:
    torch.manual_seed(0)
    cls, fields = KINDS[kind]
    return cls(32, 48, r=4, lora_dropout=p, init_lora_weights=False, init_seed=1, **fields).train()


class Ops(TorchDispatchMode):
    """The names of the ops that run, and every copy that leaves its device."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name().rsplit(".", 1)[0].replace("::", "."))
        return func(*args, **(kwargs or {}))


class Step:
    """Forward, backward and a momentum update with plain ops: all in one traceable function of tensors."""

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer
        self.trained = {name: p for name, p in layer.named_parameters() if p.requires_grad}
        self.state = [torch.zeros_like(p) for p in self.trained.values()]

    def __call__(self, x: Tensor, parameters: list[Tensor], momenta: list[Tensor]) -> tuple[Tensor, ...]:
        """x, parameters, momenta -> y, new parameters, new momenta."""
        leaves = [p.detach().requires_grad_() for p in parameters]
        y = torch.func.functional_call(self.layer, dict(zip(self.trained, leaves, strict=True)), (x,))
        gradients = torch.autograd.grad(y.square().mean(), leaves)
        moved = [0.9 * m + g for m, g in zip(momenta, gradients, strict=True)]
        return (y.detach(), *[p - 0.1 * m for p, m in zip(parameters, moved, strict=True)], *moved)

    def inputs(self, seed: int) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        x = torch.randn(6, 32, generator=torch.Generator().manual_seed(seed))
        return x, [p.detach().clone() for p in self.trained.values()], [m.clone() for m in self.state]


@pytest.mark.parametrize("kind", list(KINDS))
def test_no_step_reads_a_value_on_the_host(kind):
    layer, x = build(kind), torch.randn(6, 32)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-2, foreach=True)
    for _ in range(2):
        with Ops() as ops:
            layer(x).square().mean().backward()
        assert READS.isdisjoint(ops.names), kind
        assert sum("draw_seed" in name for name in ops.names) == 1
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("kind", list(KINDS))
def test_a_replay_draws_fresh_dropout_and_equals_eager(kind):
    step = Step(build(kind))
    torch.manual_seed(1)
    graph = make_fx(step)(*step.inputs(0))
    assert "draw_seed" in graph.code
    seen = []
    for seed in (5, 6):
        inputs = step.inputs(seed)
        torch.manual_seed(seed)
        want = step(*copy.deepcopy(inputs))
        torch.manual_seed(seed)
        got = graph(*inputs)
        for one, other in zip(got, want, strict=True):
            assert torch.equal(one, other)
        inputs = step.inputs(99)
        seen.append(graph(*inputs)[0])
    assert not torch.equal(*seen)  # the generator moved on between two replays of one input


def test_a_seed_that_is_given_is_part_of_the_graph_input():
    """Replays with the same seed tensor keep the mask; writing another seed into it changes the mask."""
    seed = torch.tensor([7])
    a, b = torch.eye(32), torch.eye(32)

    def call(x: Tensor, seed: Tensor) -> Tensor:
        return fastlora.functional.lora_linear(x, torch.zeros(32, 32), a, b, 1.0, dropout_p=0.5, seed=seed)

    x = torch.ones(8, 32)
    graph = make_fx(call)(x, seed)
    first = graph(x, seed)
    assert torch.equal(first, graph(x, seed))
    assert torch.equal(first > 0, fastlora.functional.dropout_mask((8, 32), 0.5, 7))
    assert torch.equal(graph(x, torch.tensor([8])) > 0, fastlora.functional.dropout_mask((8, 32), 0.5, 8))
