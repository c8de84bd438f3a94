"""The oracle of a gated unit, product = act(gate) * up, as plain equations in any float dtype up to float64.

gate, up, product [m, i]; act is silu (SwiGLU), gelu (GEGLU), gelu_tanh or relu (Shazeer, 2002.05202):

    silu(z) = z s(z)             silu'(z) = s (1 + z (1 - s)),  s = 1 / (1 + exp(-z))
    gelu(z) = z P(z)             gelu'(z) = P + z exp(-z^2/2) / sqrt(2 pi),  P the normal distribution function
    gelu_tanh(z) = z (1 + t)/2   gelu_tanh'(z) = (1 + t)/2 + z (1 - t^2) u'/2,  t = tanh(u), u = C (z + 0.044715 z^3)
    dgate = dproduct * up * act'(gate)        dup = dproduct * act(gate)
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

NAMES = ("silu", "gelu", "gelu_tanh", "relu")
TANH_SCALE, TANH_CUBE = math.sqrt(2 / math.pi), 0.044715


class Gradients(NamedTuple):
    """Of a gated unit, and its product again; each [m, i]."""

    dgate: Tensor
    dup: Tensor
    product: Tensor


def act(z: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """act(z) and act'(z)."""
    if name == "silu":
        s = 1 / (1 + torch.exp(-z))
        return z * s, s * (1 + z * (1 - s))
    if name == "gelu":
        below = (1 + torch.erf(z / math.sqrt(2))) / 2
        return z * below, below + z * torch.exp(-z * z / 2) / math.sqrt(2 * math.pi)
    if name == "gelu_tanh":
        t = torch.tanh(TANH_SCALE * (z + TANH_CUBE * z**3))
        slope = TANH_SCALE * (1 + 3 * TANH_CUBE * z * z)
        return z * (1 + t) / 2, (1 + t) / 2 + z * (1 - t * t) * slope / 2
    return z.clamp_min(0), (z > 0).to(z.dtype)


def forward(gate: Tensor, up: Tensor, name: str) -> Tensor:
    """act(gate) * up."""
    return act(gate, name)[0] * up


def backward(d: Tensor, gate: Tensor, up: Tensor, name: str) -> Gradients:
    """The gradients of `forward` for d, and its product."""
    value, slope = act(gate, name)
    return Gradients(d * up * slope, d * value, value * up)
