"""The adapted linear over a 4-bit base (QLoRA, 2305.14314, equation 5)."""

from __future__ import annotations

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
    y = adapted_linear(
        x.to(compute_dtype or autocast_dtype(x) or x.dtype),
        weight,
        a,
        b,
        scale,
        bias=bias,
        dropout_p=dropout_p,
        seed=seed,
        stream=stream,
        magnitude=magnitude,
        dora_dropout=dora_dropout,
        backend=backend,
        on_grid=on_grid,
    )
    return y if compute_dtype is None else y.to(x.dtype)
