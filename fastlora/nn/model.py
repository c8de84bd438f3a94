"""The adapters of a whole model: switch, add, merge, count and group them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from fastlora.config import LoraConfig, fresh_seed
from fastlora.errors import ConfigError
from fastlora.math import init
from fastlora.nn.adapted import AdaptedLinear
from fastlora.nn.adapters import checked_config
from fastlora.nn.linear import QLoraLinear
from fastlora.nn.quantized import QuantizedWeight
from fastlora.nn.targets import (
    adapted_layers,
    config_for,
    matches,
    wanted_layer,
)


def _layers(model: nn.Module) -> list[AdaptedLinear]:
    layers = [layer for _, layer in adapted_layers(model)]
    if not layers:
        raise ConfigError("the model has no adapted layers; call fastlora.convert first")
    return layers


def _known_names(layers: list[AdaptedLinear], names: str | Sequence[str]) -> list[str]:
    chosen = [names] if isinstance(names, str) else list(names)
    known = {name for layer in layers for name in layer.lora_A}
    for name in chosen:
        if name not in known:
            raise ConfigError(f"unknown adapter {name!r}; have {', '.join(sorted(known))}")
    return chosen


def set_adapter(model: nn.Module, names: str | Sequence[str]) -> None:
    """Make these adapters active in every layer that has them; the layers' other adapters are frozen.

    Args:
        model: with adapted layers.
        names: one, or several whose contributions are added in this order.

    Raises:
        ConfigError: no layer has one of them, or a layer refuses the combination; nothing has changed then.
    """
    layers = _layers(model)
    chosen = _known_names(layers, names)
    for layer in layers:
        layer.check_active([name for name in chosen if name in layer.lora_A])
    for layer in layers:
        layer.set_adapter([name for name in chosen if name in layer.lora_A])


def train_adapters(model: nn.Module, names: str | Sequence[str]) -> None:
    """Let these adapters train and freeze all others; which are active does not change.

    For batches that say for each row which adapter it uses (`adapter_names`): there several DoRA adapters can train at
    once, which `set_adapter` refuses because on the same row their order would matter.

    Args:
        model: with adapted layers.
        names: of the adapters that learn.

    Raises:
        ConfigError: no layer has one of them; nothing has changed then.
    """
    layers = _layers(model)
    chosen = set(_known_names(layers, names))
    for layer in layers:
        for group in layer.adapter_groups().values():
            for name, parameter in group.items():
                parameter.requires_grad_(name in chosen)


def add_adapters(model: nn.Module, configs: Mapping[str, Any]) -> None:
    """Add several adapters to every adapted layer that each config's target_modules picks, in one call.

    Args:
        model: converted.
        configs: adapter name -> LoraConfig, dict or peft.LoraConfig.

    Raises:
        ConfigError: a name or field that does not fit, or a config that picks no layer; nothing has changed then.
    """
    layers = dict(adapted_layers(model)) if _layers(model) else {}
    checked = {name: checked_config(config, {}) for name, config in configs.items()}
    for name, config in checked.items():
        _shares_nothing(name, config)
        if config.init_seed is None:
            checked[name] = config.replace(init_seed=fresh_seed())
    picked: dict[str, list[str]] = {}
    for name, config in checked.items():
        everything = config.target_modules == "all-linear"
        picked[name] = [
            path
            for path in layers
            if (everything or matches(config.target_modules, path))
            and not (config.exclude_modules and matches(config.exclude_modules, path))
            and wanted_layer(path, config)
        ]
        if not picked[name]:
            raise ConfigError(f"target_modules={config.target_modules!r} of {name!r} matches no adapted layer")
        for path in picked[name]:
            layers[path].check_new(name, checked[name])
            _alone_if_it_rewrites(name, path, checked, picked)
    made = [
        (x, path, checked_config(config_for(path, checked[x]), {})) for x, paths in picked.items() for path in paths
    ]
    done: list[tuple[AdaptedLinear, str]] = []
    try:
        for name, path, config in made:
            layers[path].add_adapter(name, config)
            done.append((layers[path], name))
    except BaseException:
        for layer, name in reversed(done):
            layer.delete_adapter(name)
        raise


def _alone_if_it_rewrites(
    name: str, path: str, configs: Mapping[str, LoraConfig], picked: Mapping[str, list[str]]
) -> None:
    """An init that changes the base must be a layer's first: two of one call would see each other's."""
    others = [other for other in picked if other != name and path in picked[other]]
    if others and any(init.changes_base(configs[each].init_lora_weights) for each in (name, *others)):
        raise ConfigError(f"{name!r} and {others[0]!r} of one call: the init of one rewrites the base of {path!r}")


def _shares_nothing(name: str, config: LoraConfig) -> None:
    """Biases and whole modules exist once in a model: only the adapter it is converted with can train them."""
    for field, nothing in (("bias", "none"), ("modules_to_save", None)):
        if (value := getattr(config, field)) not in (nothing, []):
            raise ConfigError(f"{field}={value!r} of {name!r}: only the adapter given to convert can train these")


def merge(
    model: nn.Module, adapter_names: str | Sequence[str] | None = None, *, safe: bool = True, **keywords: Any
) -> None:
    """`layer.merge` on every adapted layer; if one fails, those already merged are unmerged again.

    Args:
        model: with adapted layers.
        adapter_names: which (default: the active ones).
        safe: refuse a merged weight with NaN or inf.
        keywords: `dtype` and `requantize`, as `layer.merge`.

    Raises:
        ConfigError, ShapeError: as `layer.merge`, or no layer has an adapter of one of the names.
    """
    done: list[AdaptedLinear] = []
    layers = _layers(model)
    chosen = None if adapter_names is None else _known_names(layers, adapter_names)
    whole = False
    try:
        for layer in layers:
            names = None if chosen is None else [name for name in chosen if name in layer.lora_A]
            fresh = not layer.merged
            layer.merge(safe, adapter_names=names, **keywords)
            if fresh:
                done.append(layer)
        whole = True
    finally:  # also where memory ran out, or somebody pressed Ctrl-C
        for layer in done if not whole else ():
            layer.unmerge()


def unmerge(model: nn.Module) -> None:
    """Bring back every layer's own weight, bit for bit.

    Args:
        model: with adapted layers; those that are not merged stay as they are.

    Raises:
        ConfigError: it has none.
    """
    for layer in _layers(model):
        layer.unmerge()


def merge_and_unload(model: nn.Module, *, safe: bool = True, dtype: torch.dtype | None = None) -> nn.Module:
    """Merge the active adapters and put plain `nn.Linear` layers back; 16-bit where the base was 4-bit.

    So that the plain model runs, its other float parameters follow a base that was 4-bit to that 16-bit dtype; pass
    `dtype` to choose the linears' dtype and leave the rest alone.

    Args:
        model: with adapted layers.
        safe: refuse a merged weight with NaN or inf.
        dtype: of the merged weights.

    Returns:
        The same model, without adapters (a plain layer, if the model is an adapted layer itself).

    Raises:
        ConfigError, ShapeError: as `layer.merge`; the model has not changed then.
    """
    merge(model, safe=safe, dtype=dtype)
    sixteen = {layer._merged_dtype() for _, layer in adapted_layers(model) if isinstance(layer, QLoraLinear)}
    for name, layer in list(adapted_layers(model)):
        plain = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
        weight = layer.dequantize(dtype or layer._merged_dtype())
        plain.weight, plain.bias = nn.Parameter(weight, requires_grad=False), layer.bias  # type: ignore[assignment]
        if plain.bias is not None:
            plain.bias.data = plain.bias.data.to(weight.dtype)
        if not name:  # the model is itself the layer
            return plain.train(layer.training)
        parent = model.get_submodule(name.rpartition(".")[0])
        setattr(parent, name.rpartition(".")[2], plain.train(layer.training))
    if dtype is None and len(sixteen) == 1:
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.data = parameter.data.to(next(iter(sixteen)))
    return model


def trainable_parameters(model: nn.Module) -> tuple[int, int]:
    """(trainable, total) parameter counts of a model; a 4-bit weight counts its weights, not its bytes."""
    trainable = total = 0
    quantized: set[int] = set()
    for module in model.modules():
        if isinstance(module, QuantizedWeight):
            quantized |= {id(parameter) for parameter in module.parameters()}
            total += module.shape.numel()
    for parameter in model.parameters():
        if id(parameter) not in quantized:
            total += parameter.numel()
            trainable += parameter.numel() if parameter.requires_grad else 0
    return trainable, total


def print_trainable_parameters(model: nn.Module) -> None:
    """Print one line about a model: its trainable and all its parameters, and their ratio."""
    trainable, total = trainable_parameters(model)
    line = f"trainable: {trainable:,} of {total:,} parameters ({100 * trainable / max(1, total):.2f} %)"
    print(line)  # noqa: T201 - what it is for


def param_groups(
    model: nn.Module, lr: float, loraplus_lr_ratio: float = 1.0, weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    """Parameter groups for any torch optimizer; B and the magnitudes learn `loraplus_lr_ratio` times faster.

    LoRA+ (2402.12354, section 4): the B matrices want a larger learning rate than the A matrices.

    Args:
        model: every parameter of it that requires a gradient is in a group.
        lr: of A and everything else; above 0.
        loraplus_lr_ratio: B and the magnitudes learn with lr times this; at least 1.
        weight_decay: of every group.

    Returns:
        One group, or two; empty ones are left out.

    Raises:
        ConfigError: a ratio below 1, a learning rate that is not positive, or nothing to train.
    """
    if not (1.0 <= loraplus_lr_ratio < math.inf and 0.0 < lr < math.inf):
        raise ConfigError(f"expected lr > 0 and loraplus_lr_ratio >= 1, got {lr} and {loraplus_lr_ratio}")
    slow: list[nn.Parameter] = []
    fast: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (fast if "lora_B" in name or "lora_magnitude" in name else slow).append(parameter)
    if not slow and not fast:
        raise ConfigError("nothing to train: no parameter requires a gradient")
    common = {"weight_decay": weight_decay}
    groups = [{"params": slow, "lr": lr, **common}, {"params": fast, "lr": lr * loraplus_lr_ratio, **common}]
    return [group for group in groups if group["params"]]
