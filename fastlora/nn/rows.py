"""Adapters by row, and several at once: the general paths, built from the base and plain deltas."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastlora.errors import ConfigError, ShapeError
from fastlora.math import philox
from fastlora.ops.lora import autocast_dtype, draw_seed

if TYPE_CHECKING:
    from fastlora.nn.adapted import AdaptedLinear


def _delta(layer: AdaptedLinear, x: Tensor, keep: Tensor | None, name: str) -> Tensor:
    """scaling * drop(x) A^T B^T in at least fp32; x [m, in] -> [m, out]."""
    a, b, config = layer.lora_A[name], layer.lora_B[name], layer.adapter_configs[name]
    dtype = torch.promote_types(torch.promote_types(x.dtype, a.dtype), torch.float32)
    xd = x.to(dtype)
    if keep is not None:
        xd = xd * keep * philox.keep_scale(config.lora_dropout)
    return layer.scaling[name] * ((xd @ a.to(dtype).T) @ b.to(dtype).T)


def _keep(layer: AdaptedLinear, name: str, tokens: int, seed: Tensor | None) -> Tensor | None:
    """The dropout decision of every token row for one adapter, bool [tokens, in]; None when nothing is dropped."""
    p = layer.adapter_configs[name].lora_dropout
    if seed is None or p == 0.0:
        return None
    bits = torch.ops.fastlora.dropout_mask(seed, layer.stream(name), tokens, layer.in_features, p, "")
    return philox.unpack_bits(bits, layer.in_features)


def _seed(layer: AdaptedLinear, x: Tensor, names: Sequence[str]) -> Tensor | None:
    dropping = layer.training and any(layer.adapter_configs[name].lora_dropout for name in names)
    return draw_seed(x.device) if dropping else None


def add_deltas(layer: AdaptedLinear, x: Tensor, y: Tensor, names: Sequence[str]) -> Tensor:
    """y plus the contribution of each active adapter, summed in fp32 and rounded once to the dtype of y."""
    flat = x.reshape(-1, layer.in_features)
    seed = _seed(layer, x, names)
    total = y.reshape(-1, layer.out_features).to(torch.promote_types(y.dtype, torch.float32))
    with torch.amp.autocast(x.device.type, enabled=False):
        for name in names:
            total = total + _delta(layer, flat, _keep(layer, name, flat.shape[0], seed), name)
    return total.to(y.dtype).view(y.shape)


def forward(layer: AdaptedLinear, x: Tensor, adapter_names: Sequence[str | None]) -> Tensor:
    """One adapter, or None, per row of the batch (the first dimension of x).

    A row without adapter gets the base output, bit for bit. A DoRA row needs its own base product and gets it.

    Raises:
        ConfigError: unknown name, or adapters are merged. ShapeError: not one name per row.
    """
    if layer.merged:
        raise ConfigError(
            f"adapter_names needs an unmerged layer; {', '.join(layer._merged_adapters)} merged: unmerge()"
        )
    if x.dim() < 2 or len(adapter_names) != x.shape[0]:
        raise ShapeError(
            f"expected one adapter name per row, {x.shape[0] if x.dim() > 1 else 1}, got {len(adapter_names)}"
        )
    chosen = list(dict.fromkeys(name for name in adapter_names if name is not None))
    layer._known(*chosen)
    y = layer.adapter_forward(x, None)
    if layer._disabled or not chosen:
        return y
    k, n = layer.in_features, layer.out_features
    tokens = x.reshape(x.shape[0], -1, k).shape[1]
    flat, dtype = x.to(autocast_dtype(x) or x.dtype).reshape(-1, k), torch.promote_types(y.dtype, torch.float32)
    seed, total = _seed(layer, x, chosen), y.reshape(-1, n).to(dtype)
    for name in chosen:
        batch = [row for row, own in enumerate(adapter_names) if own == name]
        index = [row * tokens + token for row in batch for token in range(tokens)]
        rows = torch.tensor(index, dtype=torch.int64, device=x.device)
        if name in layer.lora_magnitude:
            own = layer.adapter_forward(flat[rows], name).to(dtype)
        else:
            keep = _keep(layer, name, flat.shape[0], seed)
            with torch.amp.autocast(x.device.type, enabled=False):
                own = total[rows] + _delta(layer, flat[rows], None if keep is None else keep[rows], name)
        total = total.index_copy(0, rows, own.to(dtype))
    return total.to(y.dtype).view(y.shape)
