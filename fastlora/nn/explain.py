"""The problems that a training step of an adapted layer poses to the dispatcher, without running it."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastlora.ops.schema import flags_of, format_of
from fastlora.problem import (
    BIAS,
    DENSE,
    DORA,
    DROPOUT,
    LAZY_H,
    NEED_DA,
    NEED_DB,
    NEED_DMAG,
    NEED_DX,
    SAVE_MASK,
    TRAIN,
    Format,
    Problem,
    base_drops,
)

if TYPE_CHECKING:
    from fastlora.config import LoraConfig
    from fastlora.nn.adapted import AdaptedLinear


def _format(layer: AdaptedLinear) -> Format:
    weight = layer._base_operand()
    return DENSE if isinstance(weight, Tensor) else format_of(weight, layer._on_grid())


def _flags(layer: AdaptedLinear, config: LoraConfig | None) -> int:
    """Of the forward with one adapter, or with none."""
    return flags_of(
        bias=layer.bias is not None,
        dropout=bool(config and config.lora_dropout),
        dora=bool(config and config.use_dora),
        shared=bool(config and config.dora_dropout == "shared"),
        train=True,
        save_mask=True,
    )


def _lazy(layer: AdaptedLinear, flags: int) -> bool:
    """Whether on a GPU the backward forms h."""
    wide = layer.in_features > layer.out_features
    return wide and not flags & DROPOUT and _format(layer) is not DENSE


def _norm(layer: AdaptedLinear, r: int, adapter_dtype: torch.dtype) -> Problem:
    weight, device = layer._base_operand(), layer._base_device().type
    dtype = weight.dtype if isinstance(weight, Tensor) else adapter_dtype
    sizes = (layer.out_features, layer.in_features, r)
    return Problem("dora_norm", 0, *sizes, dtype, adapter_dtype, _format(layer), DORA, device)


def single(layer: AdaptedLinear, tokens: int, dtype: torch.dtype) -> list[Problem]:
    """With the active adapter, or none: the forward, DoRA's norm, the backward."""
    name = layer.active_adapters[0] if layer.active_adapters else None
    config = layer.adapter_configs[name] if name is not None else None
    dtype, flags, device = layer.compute_dtype or dtype, _flags(layer, config), layer._base_device().type
    flags |= LAZY_H * (device == "cuda" and _lazy(layer, flags))
    r, adapter_dtype = (config.r, config.adapter_dtype) if config else (0, dtype)
    sizes = (tokens, layer.out_features, layer.in_features, r, dtype, adapter_dtype, _format(layer))
    needs = NEED_DX | NEED_DA | NEED_DB | (NEED_DMAG if flags & DORA else 0)
    problems = [Problem("lora_fwd", *sizes, flags, device)]
    if flags & DORA:
        problems.append(_norm(layer, r, adapter_dtype))
    return [*problems, Problem("lora_bwd", *sizes, flags & ~(TRAIN | SAVE_MASK) | needs, device)]


def mixed(layer: AdaptedLinear, tokens: int, dtype: torch.dtype, names: Sequence[str]) -> list[Problem]:
    """With several adapters in one batch: the frozen base and what rows add to it, each way."""
    configs = [layer.adapter_configs[name] for name in dict.fromkeys(names)]
    dtype, device = layer.compute_dtype or dtype, layer._base_device().type
    n, k, fmt = layer.out_features, layer.in_features, _format(layer)
    flags = TRAIN | BIAS * (layer.bias is not None)
    for config in configs:
        flags |= _flags(layer, config)
    wide = functools.reduce(torch.promote_types, [config.adapter_dtype for config in configs], configs[0].adapter_dtype)
    group = (tokens, n, k, max(config.r for config in configs), dtype, wide, DENSE)
    needs = NEED_DX | NEED_DA | NEED_DB | (NEED_DMAG if flags & DORA else 0)
    norms = [(config.r, config.adapter_dtype) for config in configs if config.use_dora]
    problems = [Problem("lora_fwd", tokens, n, k, 0, dtype, dtype, fmt, flags & BIAS, device)]
    if flags & BIAS and any(base_drops(_flags(layer, config)) for config in configs):
        problems.append(problems[0]._replace(flags=0))
    problems += [_norm(layer, *norm) for norm in dict.fromkeys(norms)]
    if flags & DROPOUT:
        problems.append(Problem("grouped_mask", *group, DROPOUT, device, len(configs)))
    return [
        *problems,
        Problem("grouped_fwd", *group, flags, device, len(configs)),
        Problem("lora_bwd", tokens, n, k, 0, dtype, dtype, fmt, NEED_DX, device),
        Problem("grouped_bwd", *group, flags & ~(TRAIN | SAVE_MASK | BIAS) | needs, device, len(configs)),
    ]
