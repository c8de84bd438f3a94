"""PEFT models on our kernels with one line: `accelerate` a model, or `register` a config before it is built.

PEFT's layers stay the same objects with the same parameters, names and checkpoints; only their forward changes
(`nn.peft_layers`). `report` (`nn.report`) says which layers it changes and why others are left to PEFT.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any, TypeVar

from torch import nn

from fastlora.errors import ConfigError, DtypeError
from fastlora.nn import groups

Model = TypeVar("Model", bound=nn.Module)
Config = TypeVar("Config")


def layers() -> Any:
    """`nn.peft_layers`, which imports peft.

    Raises:
        ConfigError: peft is not installed.
    """
    try:
        from fastlora.nn import peft_layers
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "peft":
            raise
        raise ConfigError("PEFT models need the peft package: pip install 'fastlora[peft]'") from None
    return peft_layers


def tuner_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """PEFT's adapter layers by name: modules that wrap a `base_layer` and keep adapters by name."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            yield name, module


def _swaps(ours: Any) -> dict[type, type]:
    """PEFT's class -> ours."""
    found = {ours.peft_layer.Linear: ours.Linear}
    if ours.Linear4bit is not None:
        found[ours.peft_bnb.Linear4bit] = ours.Linear4bit
    return found


def is_ours(layer: nn.Module) -> bool:
    """Whether a PEFT layer runs our forward."""
    return isinstance(layer, tuple(_swaps(layers()).values()))  # FSDP2 makes subclasses of it


def swappable(layer: nn.Module) -> bool:
    """Whether `accelerate` would take a PEFT layer in."""
    return type(layer) in _swaps(layers())


def why_left(layer: nn.Module) -> str:
    """Why a PEFT layer is left to PEFT at every call in its present state; "" when it is not."""
    if is_ours(layer):
        why: str = layers().why_not_now(layer)
        return why
    kind, base = type(layer), layer.get_base_layer()  # type: ignore[operator]
    name = f"{kind.__module__.rpartition('.')[2]}.{kind.__name__}"
    return f"PEFT's {name} over {type(base).__name__} has no fused path"


def _configs(model: nn.Module) -> dict[str, Any]:
    """The adapters' PEFT configs, from wherever in the model PEFT keeps them."""
    for module in model.modules():
        configs = getattr(module, "peft_config", None)
        if isinstance(configs, dict):
            return configs
    return {}


def _swap_all(model: nn.Module) -> tuple[list[nn.Module], dict[str, list[str]]]:
    """Swap what can be; returns the layers swapped now, and reason -> names of those left to PEFT."""
    ours, configs = layers(), _configs(model)
    swaps, swapped = _swaps(ours), []
    ordinary = (ours.DISABLED, ours.MERGED, ours.ABSENT, ours.SEVERAL)
    left: dict[str, list[str]] = {}
    found = list(tuner_layers(model))
    if not found:
        raise ConfigError(
            f"{type(model).__name__} has no PEFT adapter layers: accelerate what peft.get_peft_model or "
            "PeftModel.from_pretrained returns"
        )
    for name, layer in found:
        if type(layer) in swaps:
            layer.__class__ = swaps[type(layer)]
            swapped.append(layer)
        if is_ours(layer):
            for adapter in layer.lora_A:  # type: ignore[union-attr]
                ours.note_ignored(layer, adapter, configs.get(adapter))
        why = why_left(layer)
        if why and why not in ordinary:
            left.setdefault(why, []).append(name)
    return swapped, left


def _restore(layer: nn.Module) -> None:
    ours = layers()
    back = {own: theirs for theirs, own in _swaps(ours).items()}
    if type(layer) not in back:
        raise ConfigError(f"{type(layer).__name__} was derived from an accelerated layer: undo that first")
    layer.__class__ = back[type(layer)]
    for attribute in (ours.ADOPTED, ours.LEFT, ours.IGNORED, ours.WARNED):
        layer.__dict__.pop(attribute, None)


def accelerate(model: Model, *, strict: bool = False, group: Any = False, shared_dropout: bool = False) -> Model:
    """Let a PEFT model's LoRA layers run on our kernels; afterwards everything PEFT does works as before.

    `lora.Linear` over `nn.Linear` (fp32, bf16, fp16) and `lora.bnb.Linear4bit` (NF4, FP4; its bytes are shared, not
    copied) with LoRA, rsLoRA, DoRA, base bias and lora_bias. The layers stay the same objects, so optimizers,
    checkpoints, hooks and PEFT's methods go on. Whatever we cannot compute exactly as PEFT does (merged, mixed
    batches, several adapters, other variants and bases) runs PEFT's own forward: `fastlora.report` says what and why.
    Calling it again takes in layers added since.

    Args:
        model: what `peft.get_peft_model` or `PeftModel.from_pretrained` returns, or any module that holds PEFT layers.
        strict: raise instead of leaving a layer to PEFT.
        group: also let layers that read one input be computed together (`fastlora.group`, which calls the model once):
            True, or an example of its input as a tensor, tuple or dict.
        shared_dropout: layers of a group drop by one mask (`fastlora.group`); only with `group`.

    Returns:
        The same model.

    Raises:
        DtypeError: `group` is none of these.
        ConfigError: no PEFT layers in it, or peft is not installed; with `strict`, the layers that would be left to
            PEFT and why; `shared_dropout` without `group`. Nothing has changed then.
            Afterwards also what `fastlora.group` raises.
    """
    groups.check_asked(group, shared_dropout)
    swapped, left = _swap_all(model)
    if left:
        lines = [f"{why} ({_some(names)})" for why, names in left.items()]
        if strict:
            for layer in swapped:
                _restore(layer)
            raise ConfigError("cannot accelerate every layer: " + "; ".join(lines))
        warnings.warn("left to PEFT: " + "; ".join(lines), stacklevel=2)
    groups.group_if_asked(model, group, shared_dropout)
    return model


def _some(names: list[str]) -> str:
    shown = ", ".join(name or "the model itself" for name in names[:2])
    return shown if len(names) < 3 else f"{shown} and {len(names) - 2} more"


def decelerate(model: Model) -> Model:
    """Give PEFT's layers their own forward back and take groups away; nothing else about them has changed.

    Returns:
        The same model.

    Raises:
        ConfigError: a layer has been given another class since.
    """
    groups.ungroup(model)
    for _, layer in tuner_layers(model):
        if is_ours(layer):
            _restore(layer)
    return model


def register(config: Config) -> Config:
    """Make every model built from a `peft.LoraConfig` accelerated from the start, through PEFT's dispatch hook.

    For code that builds the model itself (`get_peft_model`, `SFTTrainer(peft_config=...)`). The hook survives
    `deepcopy` of the config, but is not part of its JSON: a model loaded by `PeftModel.from_pretrained` takes
    `accelerate`.

    Returns:
        The same config.

    Raises:
        DtypeError: not a `peft.LoraConfig`. ConfigError: AdaLoRA, or peft is not installed.
    """
    layers()
    from peft import AdaLoraConfig, LoraConfig

    if not isinstance(config, LoraConfig):
        raise DtypeError(f"expected a peft.LoraConfig, got {type(config).__name__}")
    if isinstance(config, AdaLoraConfig):
        raise ConfigError("AdaLoraConfig: AdaLoRA's layers have no fused path and no dispatch hook")
    config._register_custom_module({nn.Linear: dispatch})
    return config


def dispatch(
    target: nn.Module, adapter_name: str, config: Any, parameter_name: str | None = None, **keywords: Any
) -> nn.Module | None:
    """PEFT's dispatch hook: PEFT's own layer for `target`, made one of ours; None leaves the choice to PEFT."""
    ours = layers()
    base: Any = target.get_base_layer() if hasattr(target, "get_base_layer") else target  # type: ignore[operator]
    if parameter_name is not None:
        return None
    made: nn.Module | None
    if type(base) is nn.Linear and type(base.weight) is nn.Parameter:
        made = ours.peft_layer.dispatch_default(target, adapter_name, config=config, **keywords)
    else:
        made = ours.four_bit_layer(target, adapter_name, config=config, **keywords)
    if made is None or type(made) not in _swaps(ours):
        if type(getattr(base, "weight", None)).__name__ == "Params4bit":
            warnings.warn(f"left to PEFT: {ours.foreign(base)}", stacklevel=2)
        return None
    made.__class__ = _swaps(ours)[type(made)]
    if why := ours.note_ignored(made, adapter_name, config):
        warnings.warn(f"left to PEFT: {why} ({keywords.get('target_name', '')})", stacklevel=2)
    return made
