"""Activations of gated MLPs with their derivatives, so that a backward can form them again from the input."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Activation(NamedTuple):
    """act(z), and its backward: (dout, z) -> dz."""

    forward: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor, Tensor], Tensor]


def _gelu_tanh(z: Tensor) -> Tensor:
    return F.gelu(z, approximate="tanh")


def _gelu_tanh_backward(d: Tensor, z: Tensor) -> Tensor:
    return torch.ops.aten.gelu_backward(d, z, approximate="tanh")


KNOWN: dict[str, Activation] = {
    "silu": Activation(F.silu, torch.ops.aten.silu_backward),
    "gelu": Activation(F.gelu, torch.ops.aten.gelu_backward),
    "gelu_tanh": Activation(_gelu_tanh, _gelu_tanh_backward),
    "relu": Activation(F.relu, lambda d, z: d * (z > 0)),
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

    def backward(d: Tensor, z: Tensor) -> Tensor:
        with torch.enable_grad():
            leaf = z.detach().requires_grad_()
            return torch.autograd.grad(act(leaf), leaf, d)[0]

    return Activation(act, backward)


def activation(act: str | Callable[[Tensor], Tensor]) -> Activation:
    """The activation of a canonical name, or of a function."""
    return KNOWN[act] if isinstance(act, str) else by_autograd(act)
