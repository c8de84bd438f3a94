"""The oracle: forward and backward of LoRA, QLoRA and DoRA as plain equations in any float dtype up to float64.

Everything is written out by hand, shares no code with an optimised path and is checked by `gradcheck`. For a 4-bit
base pass the dequantized weight. Letters: x[m,k] w[n,k] a[r,k] b[n,r] y[m,n], scale s, bias[n], mag[n], norm[n],
keep = the dropout decision [m,k] (True kept), dscale = 1/(1-p) of the dropout specification, xd = dscale * keep * x.

LoRA (Hu et al., 2106.09685, section 4.1):     y = x w^T + s xd a^T b^T + bias
DoRA (Liu et al., 2402.09353, section 4), c = mag / norm, norm = |w + s b a| per output row, a constant for the
gradient (section 4.3), in one of two dropout semantics that agree when nothing is dropped:
  shared:  y = c * (x w^T + s xd a^T b^T) + bias
  peft:    y = x w^T + (c - 1) * (xd w^T) + c * (s xd a^T b^T) + bias
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Adapter(NamedTuple):
    """One adapter as the equations see it: a[r,k], b[n,r], s, and for DoRA mag[n] with its norm[n]."""

    a: Tensor
    b: Tensor
    scale: float
    mag: Tensor | None = None
    norm: Tensor | None = None


class Dropout(NamedTuple):
    """The dropout decision keep[m,k], its scale, and DoRA's semantics ("peft" or "shared")."""

    keep: Tensor
    dscale: float
    dora: str = "peft"


class Forward(NamedTuple):
    """y[m,n]; h = xd a^T [m,r]; z[m,n], what c multiplies (equal to the LoRA output without bias when no DoRA)."""

    y: Tensor
    h: Tensor
    z: Tensor


class Gradients(NamedTuple):
    """Gradients of all inputs but the frozen w; dmag is None without DoRA."""

    dx: Tensor
    da: Tensor
    db: Tensor
    dmag: Tensor | None
    dbias: Tensor


def dora_norm(w: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """norm[n] = |w + s b a| over each row (DoRA, equation 5); w[n,k] a[r,k] b[n,r]."""
    return (w + scale * (b @ a)).square().sum(1).sqrt()


def merged_weight(w: Tensor, adapter: Adapter) -> Tensor:
    """w + s b a, for DoRA c * (w + s b a); [n,k]."""
    merged = w + adapter.scale * (adapter.b @ adapter.a)
    if adapter.mag is None or adapter.norm is None:
        return merged
    return (adapter.mag / adapter.norm)[:, None] * merged


def drop(x: Tensor, dropout: Dropout | None) -> Tensor:
    """xd = dscale * keep * x."""
    return x if dropout is None else x * dropout.keep.to(x.dtype) * dropout.dscale


def forward(
    x: Tensor, w: Tensor, adapter: Adapter, bias: Tensor | None = None, dropout: Dropout | None = None
) -> Forward:
    """The layer's output and what its backward needs; see the module's equations."""
    a, b, scale, mag, norm = adapter
    xd = drop(x, dropout)
    h = xd @ a.T
    delta = scale * (h @ b.T)
    base = x @ w.T
    if mag is None or norm is None:
        z = base + delta
        y = z
    elif dropout is None or dropout.dora == "shared":
        z = base + delta
        y = (mag / norm) * z
    else:
        dropped_base = xd @ w.T
        c = mag / norm
        z = dropped_base + delta
        y = base + (c - 1) * dropped_base + c * delta
    return Forward(y if bias is None else y + bias, h, z)


def backward(dy: Tensor, x: Tensor, w: Tensor, adapter: Adapter, dropout: Dropout | None = None) -> Gradients:
    """All gradients of `forward` for dy[m,n]; norm is a constant.

    dbias = sum_m dy;  dmag = sum_m dy * z / norm;  with d = c * dy (d = dy for LoRA) and g = d b:
    db = s d^T h;  da = s g^T xd;  dx = d w + s keep dscale * (g a), and for DoRA with "peft" dropout
    dx = dy w + keep dscale * ((d - dy) w + s g a).
    """
    a, b, scale, mag, norm = adapter
    saved = forward(x, w, adapter, None, dropout)
    dmag = None
    d = dy
    if mag is not None and norm is not None:
        dmag = (dy * saved.z).sum(0) / norm
        d = dy * (mag / norm)
    g = d @ b
    da = scale * (g.T @ drop(x, dropout))
    db = scale * (d.T @ saved.h)
    if mag is None or dropout is None or dropout.dora == "shared":
        dx = d @ w + drop(scale * (g @ a), dropout)
    else:
        dx = dy @ w + drop((d - dy) @ w + scale * (g @ a), dropout)
    return Gradients(dx, da, db, dmag, dy.sum(0))


class Mixed(NamedTuple):
    """Gradients of a batch in which every row has its own adapter; one entry an adapter."""

    dx: Tensor
    da: list[Tensor]
    db: list[Tensor]
    dmag: list[Tensor | None]
    dbias: Tensor


def mixed_forward(
    x: Tensor,
    w: Tensor,
    adapters: Sequence[Adapter],
    index: Tensor,
    bias: Tensor | None = None,
    dropouts: Sequence[Dropout | None] | None = None,
) -> Tensor:
    """y[m,n]: row i is row i of `forward` with adapter index[i]; the frozen base where index[i] = len(adapters).

    Every adapter sees all rows and its own are chosen: no sorting, no gathering, no value is read back.
    """
    y = x @ w.T if bias is None else x @ w.T + bias
    for number, adapter in enumerate(adapters):
        own = forward(x, w, adapter, bias, None if dropouts is None else dropouts[number]).y
        y = torch.where((index == number)[:, None], own, y)
    return y


def mixed_backward(
    dy: Tensor,
    x: Tensor,
    w: Tensor,
    adapters: Sequence[Adapter],
    index: Tensor,
    dropouts: Sequence[Dropout | None] | None = None,
) -> Mixed:
    """All gradients of `mixed_forward`: adapter e sees dy where index = e and 0 elsewhere."""
    dx = torch.where((index == len(adapters))[:, None], dy @ w, 0)
    parts: list[Gradients] = []
    for number, adapter in enumerate(adapters):
        own = torch.where((index == number)[:, None], dy, 0)
        grads = backward(own, x, w, adapter, None if dropouts is None else dropouts[number])
        parts.append(grads)
        dx = dx + grads.dx
    return Mixed(dx, [g.da for g in parts], [g.db for g in parts], [g.dmag for g in parts], dy.sum(0))


def in_dtype(adapter: Adapter, dtype: torch.dtype) -> Adapter:
    """The same adapter with every tensor in `dtype`."""
    tensors = (None if t is None else t.to(dtype) for t in (adapter.a, adapter.b, adapter.mag, adapter.norm))
    a, b, mag, norm = tensors
    assert a is not None and b is not None
    return Adapter(a, b, adapter.scale, mag, norm)
