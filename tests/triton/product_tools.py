"""What the tests of the product kernels share: one layer's tensors in guard bands, the float64 truth, the budget."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from math import prod
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastlora.math import nf4, philox
from fastlora.math.nf4 import PackedWeight
from fastlora.testing import Guarded, guarded, roundoff

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
STREAM = 70001


class Layer(NamedTuple):
    """x[m,k] w[n,k] a[r,k] b[n,r] h[m,r] and what stands beside them; `packed` where the weight is quantized."""

    x: Tensor
    w: Tensor
    packed: PackedWeight | None
    a: Tensor
    b: Tensor
    h: Tensor
    scale: float
    mag: Tensor | None
    norm: Tensor | None
    bias: Tensor | None
    seed: Tensor
    bits: Tensor
    keep: Tensor
    dscale: float
    guards: list[Guarded]

    @property
    def factor(self) -> Tensor:
        """c = mag / norm in float64, ones without DoRA."""
        if self.mag is None or self.norm is None:
            return torch.ones(self.b.shape[0], dtype=torch.float64)
        return self.mag.double() / self.norm.double()

    def intact(self) -> bool:
        """Whether every guard band is still what it was."""
        return all(guard.intact() for guard in self.guards)


def make_layer(
    m: int,
    n: int,
    k: int,
    r: int,
    dtype: torch.dtype,
    *,
    adapter: torch.dtype = torch.float32,
    quant: str = "",
    blocksize: int = 64,
    dora: bool = False,
    bias: bool = False,
    p: float = 0.3,
    seed: int = 0,
) -> Layer:
    """Zero-mean inputs, every one of them between NaN guard bands; quant is "", "nf4", "fp4" or "nf4 nested"."""
    generator = torch.Generator().manual_seed(1000 * seed + m + 7 * n + 31 * k + 101 * r)
    guards: list[Guarded] = []

    def keep(t: Tensor) -> Tensor:
        guards.append(guarded(t))
        return guards[-1].tensor

    def randn(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator)

    x, w = keep(randn(m, k).to(dtype)), (randn(n, k) / k**0.5).to(dtype)
    packed = None
    if quant:
        packed = nf4.pack(w, quant.split()[0], blocksize, "nested" in quant)
        parts = {name: keep(t) for name, t in packed._asdict().items() if isinstance(t, Tensor)}
        packed = packed._replace(**parts)
        w = nf4.dequantize(packed, torch.float32)
    else:
        w = keep(w)
    a, b = keep((randn(r, k) / k**0.5).to(adapter)), keep((randn(n, r) / max(1, r) ** 0.5).to(adapter))
    number = torch.tensor([12345678901 + seed])
    bits = philox.dropout_bits(number, STREAM, m, k, p)
    kept = philox.unpack_bits(bits, k)
    h = keep((x.double() @ a.double().T).float())
    norm = keep(w.double().norm(dim=1).float()) if dora else None
    mag = keep(norm * (1 + 0.3 * randn(n))) if norm is not None else None
    plus = keep(randn(n).to(dtype)) if bias else None
    dscale = philox.keep_scale(p)
    return Layer(x, w, packed, a, b, h, 1.7, mag, norm, plus, number, keep(bits), kept, dscale, guards)


def close(name: str, got: Tensor, ref: Tensor, eager: Tensor, p: Tensor, q: Tensor) -> None:
    """|got - ref| <= 1.5 |eager - ref| + u_out |ref| + 4 u_acc |p| |q|, norm-wise and for the worst row."""
    assert got.shape == ref.shape
    assert got.isfinite().all(), f"{name}: not finite"
    if not got.numel():
        return
    error, slack = got.double() - ref, eager.double() - ref
    u_out, u_acc = roundoff(got.dtype), 2.0**-24
    budget = 1.5 * slack.norm() + u_out * ref.norm() + 4 * u_acc * p.norm() * q.norm()
    assert error.norm() <= budget, f"{name}: {error.norm():.3e} over {budget:.3e}"
    rows = 1.5 * slack.norm(dim=1).max() + u_out * ref.norm(dim=1) + 4 * u_acc * p.norm(dim=1) * q.norm()
    worst = (error.norm(dim=1) / rows).max()
    assert worst <= 1, f"{name}: worst row {worst:.2f} times its budget"


def check_forward(layer: Layer, y: Tensor, z: Tensor | None, h: Tensor | None = None) -> None:
    """y = c ∘ (x wᵀ + s h bᵀ) + bias and z = x wᵀ + s h bᵀ; h is the layer's (x aᵀ) unless given, in any float."""
    x, w, b, c, dtype = layer.x.double(), layer.w.double(), layer.b.double(), layer.factor, layer.x.dtype
    plus = 0.0 if layer.bias is None else layer.bias.double()
    h = layer.h if h is None else h
    truth = x @ w.T + layer.scale * (h.double() @ b.T)
    base = F.linear(layer.x, layer.w.to(dtype))
    eager = base + layer.scale * F.linear(h.to(layer.b.dtype), layer.b)
    close("y", y, c * truth + plus, (c.float() * eager + plus).to(dtype), x, w * c[:, None])
    assert y.dtype == dtype
    if z is not None:
        assert z.dtype == dtype
        close("z", z, truth, eager.to(dtype), x, w)


@contextlib.contextmanager
def poisoned(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Guarded]]:
    """Everything a launcher allocates is NaN, between guard bands."""
    made: list[Guarded] = []
    empty = torch.empty

    def poison(*size: int | tuple[int, ...], dtype: torch.dtype | None = None, device: object = None) -> Tensor:
        shape = size[0] if len(size) == 1 and not isinstance(size[0], int) else size
        count, pad = prod(shape), 64
        buffer = empty(count + 2 * pad, dtype=dtype)
        buffer.fill_(float("nan") if buffer.is_floating_point() else 255)
        made.append(Guarded(buffer[pad : pad + count].view(shape), buffer, pad))
        return made[-1].tensor

    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", poison)
        patch.setattr(torch, "empty_like", lambda t: poison(*t.shape, dtype=t.dtype))
        yield made
