"""An adapted weight w + s b a, its float64 value and the budget of what kernels make of it."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from fastlora.math import nf4
from fastlora.math.nf4 import PackedWeight
from fastlora.testing import Guarded, guarded, roundoff

SCALE = 1.7


@dataclasses.dataclass
class Adapted:
    """A weight and an adapter with guard bands around every part."""

    weight: Tensor | PackedWeight
    w: Tensor  # fp32 values of the weight
    a: Tensor
    b: Tensor
    bands: list

    @property
    def exact(self) -> Tensor:
        return self.w.double() + SCALE * (self.b.double() @ self.a.double())

    @property
    def eager(self) -> Tensor:
        """The same in fp32."""
        return self.w + SCALE * (self.b.float() @ self.a.float())

    @property
    def product(self) -> Tensor:
        """Row norms of b times column norms of a: what an error of the last sum over r is measured by; [n,k]."""
        return SCALE * self.b.double().norm(dim=1)[:, None] * self.a.double().norm(dim=0)

    def intact(self) -> bool:
        return all(band.intact() for band in self.bands)


def adapted(
    n: int,
    k: int,
    r: int,
    adapter: torch.dtype = torch.float32,
    *,
    quant: str = "nf4",
    nested: bool = True,
    blocksize: int = 64,
    base: torch.dtype | None = None,
    relative: float = 1.0,
    seed: int = 0,
) -> Adapted:
    """Random; the delta's size is about `relative` of the weight's. `base`: a dense weight of that dtype instead."""
    generator = torch.Generator().manual_seed(seed + n + k + r)

    def randn(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator)

    bands = []

    def guard(t: Tensor) -> Tensor:
        bands.append(guarded(t))
        return bands[-1].tensor

    w = randn(n, k) / k**0.5
    if base is not None:
        weight = guard(w.to(base))
        w = weight.float()
    else:
        packed = nf4.pack(w, quant, blocksize, nested)
        w = nf4.dequantize(packed, torch.float32)
        parts = {name: guard(part) for name, part in packed._asdict().items() if isinstance(part, Tensor)}
        weight = packed._replace(**parts)
    a = guard((relative / SCALE * randn(r, k) / k**0.5).to(adapter))
    b = guard((randn(n, r) / max(1, r) ** 0.5).to(adapter))
    return Adapted(weight, w, a, b, bands)


def guard_outputs(monkeypatch: pytest.MonkeyPatch) -> list[Guarded]:
    """From now on torch.empty returns poisoned memory between guard bands; all of it, in order."""
    bands: list[Guarded] = []
    empty = torch.empty

    def poisoned(*size: Any, **keywords: Any) -> Tensor:
        inside = empty(*size, **keywords)
        if inside.device.type != "cpu" or not inside.numel():
            return inside
        with monkeypatch.context() as plain:
            plain.setattr(torch, "empty", empty)
            bands.append(guarded(inside.fill_(float("nan") if inside.is_floating_point() else 255)))
        return bands[-1].tensor

    monkeypatch.setattr(torch, "empty", poisoned)
    return bands


def excess(out: Tensor, exact: Tensor, eager: Tensor, product: Tensor) -> float:
    """The larger of the norm-wise error and the worst row's, over its budget; at most 1 is within it."""
    assert out.shape == exact.shape and out.isfinite().all()
    error, allowed = out.double() - exact, eager.double() - exact
    u, accumulate = roundoff(out.dtype), 4 * roundoff(torch.float32)
    whole = 1.5 * allowed.norm() + u * exact.norm() + accumulate * product.norm()
    rows = 1.5 * allowed.norm(dim=1).max() + u * exact.norm(dim=1) + accumulate * product.norm(dim=1)
    return max(float(error.norm() / whole), float((error.norm(dim=1) / rows).max()))
