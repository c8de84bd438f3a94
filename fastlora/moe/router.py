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
        ctx.router = router
        return z.view_as(z)

    @staticmethod
    def backward(ctx: Any, dz: Tensor) -> Any:
        pending, ctx.router.pending = ctx.router.pending, None
        return dz if pending is None else dz + pending.view_as(dz), None


def _recomputing() -> bool:
    """Whether this forward runs inside a backward: the second run of a checkpoint."""
    return torch._C._current_graph_task_id() != -1


class Router(nn.Module):
    """z = x weight^T in fp32 (fp64 for fp64 inputs), whatever autocast or `.to(bf16)` say.

    Reentrant checkpointing runs the first forward without a graph and builds one in the backward. The loss of such a
    record is taken at a detached copy, whose gradient waits in `pending` for that second run.

    Attributes:
        weight: fp32 [E, in].
        logits: [..., E] of the last forward (not of a checkpoint's second run), or None.
        compiled: whether that forward was compiled.
        pending: a gradient on its way to a second run, or None.
    """

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.logits: Tensor | None = None
        self.compiled = False
        self.pending: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> z [T, E]."""
        z = router_logits(x.reshape(-1, x.shape[-1]), self.weight)
        kept = z.view(*x.shape[:-1], z.shape[-1])
        if torch.compiler.is_compiling():
            self.logits, self.compiled = kept, True
            return z
        if _recomputing():
            without_graph = self.logits is not None and not self.logits.requires_grad
            return _Delivered.apply(z, self) if without_graph and z.requires_grad else z
        self.logits, self.compiled, self.pending = kept, False, None
        return z

    def open_logits(self) -> Tensor:
        """The last logits, such that a loss of them reaches the gate; [..., E]."""
        assert self.logits is not None
        lost = self.training and self.weight.requires_grad and not self.logits.requires_grad
        if not lost or not torch.is_grad_enabled():
            return self.logits
        leaf = self.logits.detach().requires_grad_()

        def deliver(grad: Tensor) -> None:
            self.pending = grad if self.pending is None else self.pending + grad

        leaf.register_hook(deliver)
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
        return {**self.__dict__, "logits": None, "pending": None}

    def extra_repr(self) -> str:
        """Sizes, for `repr`."""
        return f"in_features={self.weight.shape[1]}, experts={self.weight.shape[0]}"
