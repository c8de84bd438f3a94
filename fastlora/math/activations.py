"""Activations of gated MLPs with their derivatives, so that a backward can form them again from the input."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

_aten = torch.ops.aten


class Activation(NamedTuple):
    """act(z) into `out`, and its backward (dout, z) -> dz into `out`; `out` may be z."""

    forward: Callable[[Tensor, Tensor], Tensor]
    backward: Callable[[Tensor, Tensor, Tensor], Tensor]


KNOWN: dict[str, Activation] = {
    "silu": Activation(
        lambda z, out: _aten.silu.out(z, out=out),
        lambda d, z, out: _aten.silu_backward.grad_input(d, z, grad_input=out),
    ),
    "gelu": Activation(
        lambda z, out: _aten.gelu.out(z, out=out),
        lambda d, z, out: _aten.gelu_backward.grad_input(d, z, grad_input=out),
    ),
    "gelu_tanh": Activation(
        lambda z, out: _aten.gelu.out(z, approximate="tanh", out=out),
        lambda d, z, out: _aten.gelu_backward.grad_input(d, z, approximate="tanh", grad_input=out),
    ),
    "relu": Activation(
        lambda z, out: torch.clamp_min(z, 0, out=out),
        lambda d, z, out: _aten.threshold_backward.grad_input(d, z, 0, grad_input=out),
    ),
}
# The names transformers knows them by.
ALIASES = {
    "swish": "silu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
    "gelu_python": "gelu",
}


def by_autograd(act: Callable[[Tensor], Tensor]) -> Activation:
    """Any elementwise function, its derivative by autograd."""

    def backward(d: Tensor, z: Tensor, out: Tensor) -> Tensor:
        with torch.enable_grad():
            leaf = z.detach().clone().requires_grad_()
            return out.copy_(torch.autograd.grad(act(leaf), leaf, d)[0])

    return Activation(lambda z, out: out.copy_(act(z)), backward)


def activation(act: str | Callable[[Tensor], Tensor]) -> Activation:
    """The activation of a canonical name, or of a function."""
    return KNOWN[act] if isinstance(act, str) else by_autograd(act)
