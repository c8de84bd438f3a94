"""The adapted linear over a 4-bit base (QLoRA, 2305.14314, equation 5)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastlora.errors import DtypeError, ShapeError
from fastlora.math.nf4 import PackedWeight
from fastlora.ops.lora import adapted_linear, autocast_dtype


def qlora_linear(
    x: Tensor,
    weight: PackedWeight,
    a: Tensor,
    b: Tensor,
    scale: float | Tensor,
    *,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    stream: int = 0,
    magnitude: Tensor | None = None,
    dora_dropout: str = "peft",
    backend: str | None = None,
    compute_dtype: torch.dtype | None = None,
    on_grid: bool = False,
) -> Tensor:
    """y = x deq(weight)^T + scale * drop(x) a^T b^T + bias; arguments, result and errors as `lora.lora_linear`.

    Args:
        weight: the packed [n, k] base; forward and backward use the same dequantized values.
        compute_dtype: x is cast to it, whatever autocast says, and the result back to the dtype of x.
        on_grid: every absmax is a bf16 value (`math.nf4.absmax_on_grid`), a fact the merge policy needs.
    """
    if not x.is_floating_point():
        raise DtypeError(f"expected a floating-point x, got {x.dtype}")
    if len(weight.shape) != 2:
        raise ShapeError(f"expected a weight of shape [n, k], got {tuple(weight.shape)}")
    return packed_linear(
        x,
        weight,
        a,
        b,
        scale,
        bias,
        dropout_p,
        seed,
        stream,
        magnitude,
        dora_dropout,
        backend,
        on_grid,
        compute_dtype=compute_dtype,
    )


def packed_linear(x: Tensor, weight: PackedWeight, *rest: Any, compute_dtype: torch.dtype | None) -> Tensor:
    """`qlora_linear` for a float x and an [n, k] weight; `rest` by position, as `lora.adapted_linear`."""
    dtype = compute_dtype or autocast_dtype(x) or x.dtype
    if dtype is x.dtype:
        return adapted_linear(x, weight, *rest)
    y = adapted_linear(x.to(dtype), weight, *rest)
    return y if compute_dtype is None else y.to(x.dtype)
