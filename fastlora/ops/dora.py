"""DoRA's weight norm as a public function; the layer's forward and backward are those of `ops.lora`."""

from __future__ import annotations

import torch
from torch import Tensor

from fastlora.errors import ShapeError
from fastlora.math.nf4 import PackedWeight
from fastlora.ops import schema  # noqa: F401  (defines the ops)


def dora_weight_norm(
    weight: Tensor | PackedWeight, a: Tensor, b: Tensor, scale: float, *, backend: str | None = None
) -> Tensor:
    """norm[n] = |w + scale * b a| per output row, fp32 (fp64 for a float64 weight), detached (DoRA, equation 5).

    Args:
        weight: [n, k], dense or packed.
        a, b: [r, k] and [n, r], the same float dtype.
        scale: of the adapter.

    Raises:
        ShapeError: the three shapes do not fit one another.
    """
    if (b.shape[0], a.shape[1]) != tuple(weight.shape) or a.shape[0] != b.shape[1]:
        raise ShapeError(
            f"expected weight [n, k], a [r, k], b [n, r], got {tuple(weight.shape)}, {tuple(a.shape)}, {tuple(b.shape)}"
        )
    a, b = a.detach().contiguous(), b.detach().contiguous()
    if isinstance(weight, PackedWeight):
        return torch.ops.fastlora.qdora_norm(*weight[:7], False, a, b, scale, backend or "")
    return torch.ops.fastlora.dora_norm(weight.detach(), a, b, scale, backend or "")
