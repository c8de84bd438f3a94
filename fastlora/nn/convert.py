"""Swap a model's linears for adapted ones and freeze the rest."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

from fastlora.config import LoraConfig, fresh_seed
from fastlora.errors import ConfigError, DtypeError, ShapeError
from fastlora.math import init, nf4
from fastlora.nn import groups
from fastlora.nn.adapters import check_name, checked_config
from fastlora.nn.linear import LoraLinear, QLoraLinear, check_compute_dtype
from fastlora.nn.quantized import QuantizedWeight
from fastlora.nn.targets import (
    adapted_layers,
    config_for,
    find_targets,
    is_saved,
    matches,
)


def convert(
    model: nn.Module,
    config: Any = None,
    *,
    quantize: str | None = "nf4",
    blocksize: int = 64,
    double_quant: bool = True,
    compute_dtype: torch.dtype | None = None,
    adapter_name: str = "default",
    progress: bool = True,
    group: Any = False,
    shared_dropout: bool = False,
    **fields: Any,
) -> nn.Module:
    """Swap the model's linears in place for adapted ones and freeze the rest.

    `nn.Linear` becomes `QLoraLinear` (or, with quantize=None, `LoraLinear`); bitsandbytes' `Linear4bit` becomes
    `QLoraLinear` over its own bytes. Each dense weight is released as soon as it is quantized.

    Args:
        model: any module that holds linears.
        config: LoraConfig, dict or peft.LoraConfig; `fields` on top.
        quantize: "nf4", "fp4", or None to keep the weights as they are.
        blocksize, double_quant, compute_dtype: the 4-bit format, as in `QLoraLinear`.
        adapter_name: of the adapter.
        progress: show a progress bar.
        group: also let layers that read one input be computed together (`fastlora.group`, which calls the model once):
            True, or an example of its input as a tensor, tuple or dict.
        shared_dropout: layers of a group drop by one mask (`fastlora.group`); only with `group`.

    Returns:
        The same model.

    Raises:
        ShapeError, DtypeError: a weight that cannot be quantized.
        ConfigError: nothing matches (near names are listed), a field that cannot be honoured, or `shared_dropout`
            without `group`; nothing has changed.
    """
    groups.check_asked(group, shared_dropout)
    keywords: dict[str, Any] = {"quantize": quantize, "blocksize": blocksize, "double_quant": double_quant}
    plan = plan_of(model, config, fields, compute_dtype=compute_dtype, adapter_name=adapter_name, **keywords)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for name in with_progress(list(plan.targets), "convert", progress):
        linear = plan.targets.pop(name)
        layer = plan.make.pop(name)(linear, plan.configs[name])
        _keep_device_hook(linear, layer)
        put(model, name, layer)
        del linear
    finish(model, plan.config)
    groups.group_if_asked(model, group, shared_dropout)
    return model


class Plan(NamedTuple):
    """What becomes of a model, checked; nothing has changed yet.

    Attributes:
        config: with a seed.
        targets: the linears to swap, by name.
        configs: the config of each.
        make: (linear, config) -> adapted layer, for each.
    """

    config: LoraConfig
    targets: dict[str, nn.Module]
    configs: dict[str, LoraConfig]
    make: dict[str, Callable[..., nn.Module]]


def plan_of(
    model: nn.Module,
    config: Any,
    fields: dict[str, Any],
    *,
    quantize: str | None,
    blocksize: int,
    double_quant: bool,
    compute_dtype: torch.dtype | None,
    adapter_name: str,
) -> Plan:
    """Check everything `convert` is asked for; arguments and errors as there."""
    config = checked_config(config, fields)
    if quantize not in ("nf4", "fp4", None):
        raise ConfigError(f'quantize must be "nf4", "fp4" or None, got {quantize!r}')
    if config.init_seed is None:
        config = config.replace(init_seed=fresh_seed())
    targets = find_targets(model, config)
    if quantize is not None:
        nf4.check_format(quantize, blocksize)
    check_compute_dtype(compute_dtype)
    check_name(adapter_name)
    _check_saved(model, config)
    configs = {name: checked_config(config_for(name, config), {}) for name in targets}
    for name, module in targets.items():
        check_target(name, module, configs[name], quantize)
    keywords: dict[str, Any] = {"quant_type": quantize, "blocksize": blocksize, "double_quant": double_quant}
    make: dict[str, Callable[..., nn.Module]] = {}
    for name, module in targets.items():
        four_bit = hasattr(module.weight, "quant_state")
        if quantize is None and not four_bit:
            make[name] = functools.partial(LoraLinear.from_linear, adapter_name=adapter_name)
        else:
            own: dict[str, Any] = {} if four_bit else keywords
            make[name] = functools.partial(
                QLoraLinear.from_linear, adapter_name=adapter_name, compute_dtype=compute_dtype, **own
            )
    return Plan(config, targets, configs, make)


def _keep_device_hook(linear: nn.Module, layer: nn.Module) -> None:
    """accelerate's hook that moves a layer's input to its device (`device_map`) goes on to the layer in its place."""
    hook = getattr(linear, "_hf_hook", None)
    if hook is not None:
        from accelerate.hooks import add_hook_to_module

        add_hook_to_module(layer, hook)


def put(model: nn.Module, name: str, module: nn.Module) -> None:
    """Replace the submodule of that name."""
    setattr(model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2], module)


def finish(model: nn.Module, config: LoraConfig) -> None:
    """What is left to do once the layers stand: let train what `config` names, and tell transformers."""
    _unfreeze(model, config)
    if any(isinstance(layer, QLoraLinear) for _, layer in adapted_layers(model)):
        _release_from_transformers(model)


def _check_saved(model: nn.Module, config: LoraConfig) -> None:
    names = [name for name, _ in model.named_modules()]
    for saved in config.modules_to_save or ():
        if not any(matches([saved], name) for name in names):
            raise ConfigError(f"modules_to_save: no module is named {saved!r}")
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False) if config.modules_to_save else ():
        owners.setdefault(id(parameter), []).append(name)
    for shared in owners.values():
        outside = [name for name in shared if not is_saved(name, config)]
        if outside and len(outside) < len(shared):
            inside = next(name for name in shared if name not in outside)
            raise ConfigError(f"modules_to_save: {inside} is the same tensor as {outside[0]}; name both or neither")


def check_target(name: str, linear: nn.Module, config: LoraConfig, quantize: str | None) -> None:
    """Raise, before anything has changed, what making this layer would."""
    weight: Any = linear.weight
    four_bit = hasattr(weight, "quant_state")
    if weight.is_meta and hasattr(linear, "_hf_hook"):
        raise ConfigError(
            f"cannot adapt {name}: accelerate keeps its weight elsewhere (offloaded to CPU or disk); load the model "
            "without offloading, or stream its folder with fastlora.load_quantized"
        )
    if four_bit and weight.quant_state is not None:
        QuantizedWeight.from_bnb(linear)
    elif not weight.is_floating_point():
        raise DtypeError(f"cannot adapt {name}: expected a floating-point weight, got {weight.dtype}")
    strategy = init.canonical(config.init_lora_weights)
    if init.changes_base(strategy):
        if four_bit or (strategy == "loftq" and quantize is None):
            raise ConfigError(f"cannot adapt {name}: init {strategy!r} needs a float weight that gets quantized here")
        if config.r > min(weight.shape):
            raise ShapeError(f"cannot adapt {name}: {strategy!r} needs r at most {min(weight.shape)}, got {config.r}")
    if four_bit or weight.is_meta or (quantize is None and not init.changes_base(strategy)):
        return
    if quantize is not None and weight.dtype not in nf4.SOURCE_DTYPES:
        raise DtypeError(f"cannot quantize {name}: expected float32, bfloat16 or float16, got {weight.dtype}")
    if not torch.stack(weight.detach().aminmax()).isfinite().all():
        raise ShapeError(f"cannot {'factor' if quantize is None else 'quantize'} {name}: its weight holds NaN or inf")


def _unfreeze(model: nn.Module, config: LoraConfig) -> None:
    for name, module in model.named_modules():
        for own, parameter in module.named_parameters(recurse=False):
            if not parameter.is_floating_point():
                continue
            if is_saved(name, config) or (config.bias == "all" and own == "bias"):
                parameter.requires_grad_(True)


def _release_from_transformers(model: nn.Module) -> None:
    """The weights are ours now: clear the marks by which transformers would treat them as its quantizer's."""
    for mark in ("is_quantized", "is_loaded_in_4bit"):
        if getattr(model, mark, False):
            setattr(model, mark, False)
    if getattr(model, "hf_quantizer", None) is not None:
        model.hf_quantizer = None  # type: ignore[assignment]
    model_config: Any = getattr(model, "config", None)
    if getattr(model_config, "quantization_config", None) is not None:
        del model_config.quantization_config


def with_progress(items: list[str], label: str, show: bool) -> Any:
    """The items, with a progress bar where there are many."""
    if not show or len(items) < 8:
        return items
    from tqdm.auto import tqdm

    return tqdm(items, desc=label, unit="layer")
