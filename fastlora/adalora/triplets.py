"""The AdaLoRA adapters of a model: one triplet (row of A, entry of E, column of B) for each rank of each layer."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from fastlora.config import AdaLoraConfig
from fastlora.errors import ConfigError
from fastlora.nn.adapted import AdaptedLinear
from fastlora.nn.targets import adapted_layers


class Triplets(NamedTuple):
    """One layer's adapter."""

    name: str  # of the layer in the model
    layer: AdaptedLinear
    config: AdaLoraConfig
    a: nn.Parameter  # [r, in]
    e: nn.Parameter  # [r, 1]
    b: nn.Parameter  # [out, r]


def find(model: nn.Module, adapter_name: str | None = None) -> tuple[str, list[Triplets]]:
    """The layers of one AdaLoRA adapter, in the model's order.

    Args:
        adapter_name: None takes the one that trains.

    Returns:
        The adapter's name and its triplets.

    Raises:
        ConfigError: no such adapter, or without a name none or several that train.
    """
    layers = [(name, layer) for name, layer in adapted_layers(model) if len(layer.lora_E)]
    if adapter_name is None:
        training = {key for _, layer in layers for key, e in layer.lora_E.items() if e.requires_grad}
        if len(training) != 1:
            raise ConfigError(
                f"expected one AdaLoRA adapter that trains, found {', '.join(sorted(training)) or 'none'}: name it"
            )
        adapter_name = training.pop()
    found = []
    for name, layer in layers:
        config = layer.adapter_configs.get(adapter_name)
        if isinstance(config, AdaLoraConfig):
            group = (layer.lora_A, layer.lora_E, layer.lora_B)
            found.append(Triplets(name, layer, config, *(tensors[adapter_name] for tensors in group)))
    if not found:
        known = sorted({key for _, layer in layers for key in layer.lora_E})
        raise ConfigError(f"no layer has an AdaLoRA adapter {adapter_name!r}; have {', '.join(known) or 'none'}")
    return adapter_name, found


def rank_pattern(model: nn.Module, adapter_name: str | None = None) -> dict[str, list[bool]]:
    """Which triplets of each layer the last allocation kept, under PEFT's names ("<layer>.lora_E").

    A triplet whose E has moved off zero since then counts as kept, for dropping it would change the function. Before
    ranks were ever allocated all count.

    Args:
        model: with AdaLoRA layers.
        adapter_name: None takes the one that trains.

    Raises:
        ConfigError: no such adapter, or without a name none or several that train.
    """
    name, found = find(model, adapter_name)
    masks = [entry.layer.kept_triplets(name) for entry in found]
    there = [mask.cpu() for mask in masks if mask is not None]
    flat = torch.cat(there).tolist() if there else []  # one transfer, not one a layer
    pattern: dict[str, list[bool]] = {}
    for entry, mask in zip(found, masks, strict=True):
        size = entry.config.init_r
        kept, flat = ([True] * size, flat) if mask is None else (flat[:size], flat[size:])
        pattern[f"{entry.name}.lora_E" if entry.name else "lora_E"] = kept
    return pattern
