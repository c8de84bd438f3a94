"""How many kernels a Llama layer's seven adapted projections and its SwiGLU start on the Triton path.

    TRITON_INTERPRET=1 python -m benchmarks.block_launches

Counted are our launches and the operations of PyTorch that start a kernel, forward and backward; not norms, rotary,
attention and residuals. Nothing is computed: launches are recorded, with the tiles an H100 gets. Prints JSON.
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from fastlora.backends.triton.launch import TARGETS, record
from fastlora.math import nf4
from fastlora.ops.glu import glu_linear
from fastlora.ops.member import Projection, alone
from fastlora.ops.projections import projections

# A quarter of an 8B model's widths: [k, n] of q, k, v, o, gate, up, down; tokens.
HIDDEN, HEADS, WIDE, TOKENS, RANK = 1024, 256, 3584, 4096, 16
LAYERS = {"q": (HIDDEN, HIDDEN), "k": (HIDDEN, HEADS), "v": (HIDDEN, HEADS), "o": (HIDDEN, HIDDEN)}
LAYERS |= {"gate": (HIDDEN, WIDE), "up": (HIDDEN, WIDE), "down": (WIDE, HIDDEN)}
BUDGET = {"forward": 25, "backward": 45}
# Operations that start no kernel.
_FREE = ("empty", "view", "strided", "slice", "select", "split", "detach", "alias", "expand", "reshape", "transpose")
_FREE += ("aten::t", "resize", "resolve_", "result_type", "unbind", "narrow", "squeeze", "is_", "item", "lift", "set_")
_PRODUCTS = ("aten::mm", "aten::addmm", "aten::addmm_")


def layer(name: str, p: float, dora: bool) -> Projection:
    """One adapted linear over a nested NF4 weight, rank 16, fp32 adapters that train."""
    k, n = LAYERS[name]
    a, b = (torch.randn(*size).requires_grad_() for size in ((RANK, k), (n, RANK)))
    magnitude = torch.rand(n).requires_grad_() if dora else None
    return Projection(nf4.pack(torch.randn(n, k), "nf4", 64, True), a, b, 2.0, None, magnitude, p)


def parts(made: dict[str, Projection], together: bool) -> Iterator[Callable[[Tensor], Any]]:
    """What runs between attention, norms and residuals, as functions of x; the seed is drawn elsewhere."""
    seed = torch.zeros(1, dtype=torch.int64)

    def one(name: str) -> Callable[[Tensor], Tensor]:
        return lambda x: alone(x, made[name], seed, "triton")

    if together:
        yield lambda x: projections(x, [made[name] for name in "qkv"], seed=seed, backend="triton")
        yield one("o")

        def mlp(x: Tensor) -> Tensor:
            gate, up = projections(x, [made["gate"], made["up"]], seed=seed, backend="triton")
            return glu_linear(gate, up, made["down"], seed=seed, backend="triton")

        yield mlp
    else:
        yield lambda x: tuple(one(name)(x) for name in "qkv")
        yield one("o")
        yield lambda x: one("down")(torch.nn.functional.silu(one("gate")(x)) * one("up")(x))


def _kernels(profile: Any) -> dict[str, int]:
    """Operations of PyTorch that start a kernel: those that call no other, and do more than look."""
    found: dict[str, int] = {}
    for event in profile.events():
        name = event.name
        if not name.startswith("aten::") or (event.cpu_parent is not None and event.cpu_parent.name in _PRODUCTS):
            continue
        leaf = not any(child.name.startswith("aten::") for child in event.cpu_children)
        if name in ("aten::mm", "aten::addmm_") or (leaf and not any(free in name for free in _FREE)):
            found[name] = found.get(name, 0) + 1
    return found


def _count(run: Callable[[], Any]) -> tuple[Any, dict[str, int]]:
    """What `run` returns, and how often it starts each kernel."""
    with (
        record(TARGETS["sm_90"]) as launches,
        torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen,
    ):
        result = run()
    found = _kernels(seen)
    for each in launches:
        found[each.name] = found.get(each.name, 0) + 1
    return result, found


def count(p: float = 0.0, dora: bool = False, together: bool = True) -> dict[str, dict[str, int]]:
    """Kernels of the layer by name, forward and backward, in bf16."""
    totals: dict[str, dict[str, int]] = {"forward": {}, "backward": {}}
    made = {name: layer(name, p, dora) for name in LAYERS}
    for run in parts(made, together):
        x = torch.randn(TOKENS, HIDDEN, dtype=torch.bfloat16).requires_grad_()
        ys, forward = _count(functools.partial(run, x))
        ys = ys if isinstance(ys, tuple) else (ys,)
        dys = [torch.randn_like(y) for y in ys]
        # Not `backward`: the recorder holds what kernels wrote, and .grad would become a copy of it.
        leaves = [x, *(leaf for each in made.values() for leaf in (each.a, each.b, each.magnitude) if leaf is not None)]
        _, backward = _count(functools.partial(torch.autograd.grad, ys, leaves, dys, allow_unused=True))
        for way, found in (("forward", forward), ("backward", backward)):
            for name, times in found.items():
                totals[way][name] = totals[way].get(name, 0) + times
    return totals


def report() -> dict[str, Any]:
    """Totals of every setting, with names; QLoRA without dropout is held to the budget."""
    found: dict[str, Any] = {"tokens": TOKENS, "widths": LAYERS, "rank": RANK, "budget": BUDGET, "settings": {}}
    for name, options in {
        "QLoRA": {},
        "QLoRA, one by one": {"together": False},
        "QLoRA, dropout": {"p": 0.05},
        "QDoRA": {"dora": True},
    }.items():
        ways = count(**options)
        found["settings"][name] = {way: {"kernels": sum(each.values()), "by_name": each} for way, each in ways.items()}
    return found


if __name__ == "__main__":
    print(json.dumps(report()))
    sys.exit(0)
