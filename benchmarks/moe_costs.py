"""What a mixture costs without a clock: floating-point operations by formula and as issued, bytes kept for backward.

Issued are all matrix products PyTorch dispatches (torch.utils.flop_counter's formulas) and all kernels of ours. A
kernel of the compiled backend is one opaque call and counts as `fastlora.dispatch.cost.work` says; only this backend
has a goal. On the reference backend, which forms every expert's product for all rows and masks it, PyTorch's own
products are counted one by one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode
from torch.utils.flop_counter import flop_registry

from benchmarks.moe_layers import Ours, Sizes, methods, shapes, tensors_for
from benchmarks.moe_peer import saved_bytes
from fastlora import settings
from fastlora.dispatch import cost, registry
from fastlora.ops import lora

BACKENDS = ("reference", "cpu")
_PRODUCTS = ("lora_fwd", "lora_bwd", "grouped_fwd", "grouped_bwd", "dora_norm")
_PRODUCTS += ("mixture_fwd", "mixture_bwd", "routed_fwd", "routed_bwd")
MOST = 1.05  # of the formula
MOST_SAVED = 12e6  # bytes, MixLoRA


class Flops(TorchDispatchMode):
    """Adds up the products of everything that is dispatched, and of our kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count, then run."""
        out = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func.overloadpacket)
        if formula is not None:
            self.total += formula(*args, **(kwargs or {}), out_val=out)
        return out

    def opened(self, kernel: registry.Kernel) -> Any:
        """A kernel's run that counts what its problem is worth, unless PyTorch does the work and is watched."""

        def run(problem: Any, *arguments: Any) -> Any:
            seen = kernel.backend == "reference" and _get_current_dispatch_mode() is self
            if not seen and problem.op in _PRODUCTS:
                self.total += cost.work(problem).flops
            return kernel.run(problem, *arguments)

        return mock.Mock(run=run)


@contextlib.contextmanager
def counted() -> Iterator[Flops]:
    """Count what the block issues."""
    flops, select = Flops(), registry.select
    chosen = mock.patch.object(registry, "select", lambda *given: flops.opened(select(*given)))
    # Ops go around the dispatcher unless somebody watches it; here too, so that what is in them is watched.
    around = mock.patch.object(lora, "_watched", return_value=False)
    with chosen, around, flops:
        yield flops


def formula(fields: dict[str, Any], sizes: Sizes) -> dict[str, float]:
    """Least operations of a forward and a backward with all gradients but the base's: base, adapters and router.

    MixLoRA: 3 u for the base, u = 2 T H I, whatever k is, and 6 k T r (H + I) for the experts. A linear: its product,
    and one of rank E r for all experts (MoLA too: masked). The backward forms the base's dx, and twice the adapters'.
    """
    tokens, linears = sizes.tokens, shapes(fields, sizes)
    width = sizes.top_k if fields["peft_type"] == "MIXLORA" else sizes.experts
    base = float(sum(2 * tokens * rows * columns for rows, columns in linears.values()))
    adapters = float(sum(2 * tokens * width * sizes.rank * (rows + columns) for rows, columns in linears.values()))
    router = 2.0 * tokens * sizes.hidden * sizes.experts
    return {"base": base, "adapters": adapters, "router": router, "forward": base + adapters + router} | {
        "backward": base + 2 * (adapters + router)
    }


def flops_of(ours: Ours, backend: str) -> dict[str, float]:
    """Operations issued by one forward and by its backward."""
    x = ours.x.clone().requires_grad_()
    with settings.override(backend=backend):
        with counted() as forward:
            y = ours.module(x)
        with counted() as backward:
            y.backward(ours.dy)
    return {"forward": forward.total, "backward": backward.total}


def saved_by(ours: Ours) -> int:
    """Bytes one forward keeps, weights apart."""
    weights = [*ours.module.parameters(), *ours.module.buffers()]
    return saved_bytes(ours.module, ours.x, weights)


def measure(sizes: Sizes, names: tuple[str, ...]) -> list[dict[str, Any]]:
    """Every method's counts, bf16 base and activations."""
    rows = []
    for name in names:
        fields = methods(sizes)[name]
        ours = Ours(fields, tensors_for(fields, sizes, torch.bfloat16))
        least = formula(fields, sizes)
        issued = {backend: flops_of(ours, backend) for backend in _there()}
        over = {
            backend: {way: found[way] / least[way] for way in ("forward", "backward")}
            for backend, found in issued.items()
        }
        kept = saved_by(ours)
        goals = None
        if name == "MixLoRA":
            flops = all(ratio <= MOST for ratio in over["cpu"].values()) if "cpu" in over else None
            goals = {"flops": flops, "saved": kept <= MOST_SAVED}
        rows.append(
            {
                "method": name,
                "formula": least,
                "issued": issued,
                "issued_over_formula": over,
                "saved_bytes": kept,
                "goals_met": goals,
            }
        )
    return rows


def _there() -> list[str]:
    """The backends this machine has."""
    from fastlora.backends import _cpu_library

    return [name for name in BACKENDS if name == "reference" or _cpu_library.loaded()[0] is not None]
