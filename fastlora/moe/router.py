"""The router: a gate that stays in fp32, and what the last forward decided, for losses computed outside the layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastlora.ops.experts import router_logits


class _Delivered(torch.autograd.Function):
    """z -> z; in the backward the gradient that a loss outside a reentrant checkpoint left for it is added."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, router: Router) -> Tensor:
        # Not save_for_backward: a checkpoint counts what its two runs save.
        ctx.router, ctx.z = router, z.detach()
        return z.view_as(z)

    @staticmethod
    def backward(ctx: Any, dz: Tensor) -> Any:
        grad = ctx.router.collect(ctx.z)
        return dz if grad is None else dz + grad, None


def _recomputing() -> bool:
    """Whether this forward runs inside a backward: the second run of a checkpoint."""
    return torch._C._current_graph_task_id() != -1


class Router(nn.Module):
    """z = x weight^T in fp32 (fp64 for fp64 inputs), whatever autocast or `.to(bf16)` say.

    Reentrant checkpointing runs the first forward without a graph and builds one in the backward. The loss of such a
    record is taken at a detached copy, whose gradient waits in `pending` for that second run. Where several first runs
    went without a graph, the logits tell which of them a second run repeats.

    Attributes:
        weight: fp32 [E, in].
        logits: [..., E] of the last forward (not of a checkpoint's second run), or None.
        compiled: whether that forward was compiled.
        pending: logits of first runs and their gradients, on their way to second runs.
        open: first runs without a graph that no second run has repeated yet.
    """

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.logits: Tensor | None = None
        self.compiled = False
        self.pending: list[tuple[Tensor, Tensor]] = []
        self.open = 0

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> z [T, E]."""
        z = router_logits(x.reshape(-1, x.shape[-1]), self.weight)
        kept = z.view(*x.shape[:-1], z.shape[-1])
        if torch.compiler.is_compiling():
            self.logits, self.compiled = kept, True
            return z
        if _recomputing():
            return _Delivered.apply(z, self) if self.open and z.requires_grad else z
        self.logits, self.compiled = kept, False
        if kept.requires_grad:
            self.open, self.pending = 0, []
        elif self._may_lose_graph():
            self.open += 1
        return z

    def _may_lose_graph(self) -> bool:
        return self.training and self.weight.requires_grad and not torch.is_grad_enabled()

    def collect(self, z: Tensor) -> Tensor | None:
        """The gradient that waits for logits z [T, E], if one does."""
        lonely = self.open == 1 and len(self.pending) == 1
        self.open = max(0, self.open - 1)
        for at, (logits, grad) in enumerate(self.pending):
            if logits.numel() == z.numel() and (lonely or torch.allclose(logits.view_as(z), z, rtol=1e-2, atol=1e-3)):
                del self.pending[at]
                return grad.view_as(z)
        return None

    def open_logits(self) -> Tensor:
        """The last logits, such that a loss of them reaches the gate; [..., E]."""
        assert self.logits is not None
        lost = self.training and self.weight.requires_grad and not self.logits.requires_grad
        if not lost or not torch.is_grad_enabled():
            return self.logits
        first = self.logits.detach()
        leaf = first.clone().requires_grad_()
        leaf.register_hook(lambda grad: self.pending.append((first, grad)))
        return leaf

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Router:
        before = self.weight.data
        super()._apply(fn, recurse)
        if self.weight.dtype.itemsize < 4 and not self.weight.is_meta:
            self.weight.data = before.to(self.weight.device, torch.float32)
            if self.weight.grad is not None:
                self.weight.grad = self.weight.grad.to(torch.float32)
        return self

    def __getstate__(self) -> dict[str, Any]:
        # A copy or a pickle is of the module, not of what its last forward left behind.
        return {**self.__dict__, "logits": None, "pending": [], "open": 0}

    def extra_repr(self) -> str:
        """Sizes, for `repr`."""
        return f"in_features={self.weight.shape[1]}, experts={self.weight.shape[0]}"
