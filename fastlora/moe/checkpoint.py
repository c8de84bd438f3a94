"""Saving and loading mixtures in MoE-PEFT's layout: all or nothing, nothing missing passed over."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import pathlib
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastlora.config import LoraConfig
from fastlora.errors import ConfigError, StateDictError
from fastlora.io import moe_peft, peft
from fastlora.io.moe_peft import METHODS, Experts, MoeCheckpoint
from fastlora.moe.config import MoeConfig, config_from_dict
from fastlora.moe.convert import convert
from fastlora.moe.experts import ExpertLinear
from fastlora.moe.losses import MoeModule, moe_modules
from fastlora.moe.mixlora import MixLoraMLP
from fastlora.nn import checkpoint as plain
from fastlora.nn import folders
from fastlora.nn.adapters import check_name
from fastlora.nn.sharded import agree, any_sharded, fill, on_first, whole
from fastlora.nn.targets import adapted_layers

_IN_LAYER = re.compile(r"(?:.*\.)?(layers\.\d+\..+)")
# What must agree before tensors go over those of a model that has a mixture already; the rest is training's business.
_FUNCTION = (
    "routing_strategy",
    "num_experts",
    "r",
    "lora_alpha",
    "use_dora",
    "use_rslora",
    "top_k",
    "top_p",
    "temperature",
    "expert_capacity",
    "act_fn",
    "expert_lora",
)


def _short(name: str) -> str:
    """A module's name from its layer on, as the checkpoint has it.

    Raises:
        ConfigError: it is in no list called "layers".
    """
    found = _IN_LAYER.fullmatch(name)
    if found is None:
        raise ConfigError(f"{name} is in no list named 'layers': MoE-PEFT's format has no name for it")
    return found[1]


def _by_short(names: Mapping[str, Any]) -> dict[str, str]:
    """Short name -> whole name.

    Raises:
        ConfigError: two modules have one short name.
    """
    found: dict[str, str] = {}
    for name in names:
        if (other := found.setdefault(_short(name), name)) != name:
            raise ConfigError(f"{other} and {name} have one name in MoE-PEFT's format")
    return found


def _projections(module: MoeModule) -> dict[str, ExpertLinear]:
    """What holds experts, by its name after the module's (the module itself: "")."""
    if isinstance(module, MixLoraMLP):
        return {f".{name}": part for name, part in module.projections.items() if part.lora_A is not None}
    return {"": module}


# --- saving -----------------------------------------------------------------------------------------------------------


def _common_config(modules: Mapping[str, MoeModule]) -> MoeConfig:
    """The one config all mixtures were made from.

    Raises:
        ConfigError: there is no mixture, or they were made from several.
    """
    if not modules:
        raise ConfigError("the model has no mixture of experts: fastlora.save_adapter saves plain adapters")
    configs: list[Any] = [module.model_config for module in modules.values()]
    first: MoeConfig = configs[0]
    for name, config in zip(modules, configs, strict=True):
        if config.to_dict() != first.to_dict():
            raise ConfigError(f"{name} was made from another config than {next(iter(modules))}: the format holds one")
    return first


def _linears(model: nn.Module, config: MoeConfig, adapter_name: str) -> dict[str, peft.AdapterTensors]:
    """The plain adapters beside the experts, by whole name.

    Raises:
        ConfigError: one has another rank, scale, dropout or kind than the mixture's config says.
    """
    found, wanted = {}, config.lora_config()
    for name, layer in adapted_layers(model):
        if adapter_name not in layer.lora_A:
            continue
        have = layer.adapter_configs[adapter_name]
        for field in ("r", "scaling", "lora_dropout", "use_dora"):
            if getattr(have, field) != getattr(wanted, field):
                raise ConfigError(
                    f"{name} has {field}={getattr(have, field)}, the mixture {getattr(wanted, field)}: the format "
                    "holds only one"
                )
        magnitude = whole(layer.lora_magnitude[adapter_name]) if adapter_name in layer.lora_magnitude else None
        a, b = whole(layer.lora_A[adapter_name]), whole(layer.lora_B[adapter_name])
        found[name] = peft.AdapterTensors(a, b, magnitude)
    return found


def _gathered(model: nn.Module, adapter_name: str) -> tuple[MoeCheckpoint, MoeConfig]:
    modules = moe_modules(model)
    config = _common_config(modules)
    gates: dict[str, Tensor] = {}
    experts: dict[str, Experts] = {}
    for short, name in _by_short(modules).items():
        gates[short] = whole(modules[name].gate.weight)
        for ending, part in _projections(modules[name]).items():
            assert part.lora_A is not None and part.lora_B is not None
            magnitude = None if part.lora_magnitude is None else whole(part.lora_magnitude)
            experts[short + ending] = Experts(whole(part.lora_A), whole(part.lora_B), magnitude)
    tensors = _linears(model, config, adapter_name)
    linears = {short: tensors[name] for short, name in _by_short(tensors).items()}
    return MoeCheckpoint(config.peft_type, gates, experts, linears), config


def _write(model: nn.Module, checkpoint: MoeCheckpoint, config: MoeConfig, target: pathlib.Path) -> pathlib.Path:
    names = {module.rpartition(".")[2] for module in (*checkpoint.experts, *checkpoint.linears)}
    base, task = folders.about(model)
    fields = {
        **config.to_dict(),
        "target_modules": sorted(names),
        "base_model_name_or_path": base,
        "task_type": task,
    }
    text = json.dumps(fields, indent=2, sort_keys=True) + "\n"
    return folders.write(target, moe_peft.to_state(checkpoint), {"format": "pt"}, text)


def save_adapter(model: nn.Module, folder: str | os.PathLike[str], adapter_name: str = "default") -> pathlib.Path:
    """Save a mixture: adapter_config.json and adapter_model.safetensors, keys and fields as MoE-PEFT has them.

    Also saved, though MoE-PEFT does not: DoRA's magnitudes ([out], `….lora_magnitude_vector`), the init and its seed,
    and the fields of the router that its own export leaves out. MoE-PEFT itself reads the tensors after
    `torch.save(safetensors.torch.load_file(...), "adapter_model.bin")`, but for lists of experts, ranks or top_k.

    Args:
        model: with a mixture.
        folder: where to; another name than "default" goes into a folder of that name inside it.
        adapter_name: of the plain adapters beside the experts.

    Returns:
        The folder the two files are in.

    Raises:
        ConfigError: no mixture, or parts the format cannot hold together.
        FileExistsError: the folder holds files of these names that are no adapter's; they stay.
        OSError: the folder cannot be written.
    """
    check_name(adapter_name)
    target = folders.place(folder, adapter_name)
    if not any_sharded(model):
        return _write(model, *_gathered(model, adapter_name), target)
    names, error = [], None
    try:
        names = sorted(moe_modules(model))
        _common_config(moe_modules(model))
    except ConfigError as failure:
        error = failure
    agree(names, error)
    checkpoint, config = _gathered(model, adapter_name)
    made: pathlib.Path = on_first(lambda: _write(model, checkpoint, config, target))
    return made


# --- loading ----------------------------------------------------------------------------------------------------------


def load_adapter(model: nn.Module, folder: str | os.PathLike[str], adapter_name: str = "default") -> nn.Module:
    """Load a mixture that `save_adapter` or MoE-PEFT saved; older MixLoRA files too.

    A plain model is converted first, its base staying as it is. In a model that has the mixture already every tensor
    must find its place and every place its tensor. Without a safetensors file adapter_model.bin is read, as tensors
    only. DoRA without magnitudes, as MoE-PEFT saves it, gets the row norms of W + s B A, and a warning.

    Args:
        folder: that holds the two files, itself or in a folder named as the adapter.
        adapter_name: of the plain adapters beside the experts.

    Returns:
        The same model.

    Raises:
        FileNotFoundError: files missing.
        StateDictError, ConfigError: not whole, of another method, or not fitting this model. The model has not changed
            then.
    """
    check_name(adapter_name)
    found = folders.read(folders.find(folder, adapter_name))
    config = config_from_dict(moe_peft.fields_from_json(found.config))
    checkpoint = moe_peft.from_state(found.state)
    if checkpoint.method != config.peft_type:
        raise StateDictError(
            f"{peft.CONFIG_NAME} is of {METHODS[config.peft_type]}, the tensors of {METHODS[checkpoint.method]}"
        )
    bare = found.pickled and _has_no_magnitudes(checkpoint)
    with _as_before_on_error(model):
        if not moe_modules(model):
            convert(
                model, config.replace(target_modules=_targets(model, config)), adapter_name=adapter_name, progress=False
            )
            for module in moe_modules(model).values():
                module.model_config = config  # the seed it was initialised with now means nothing
        loads = _plan(model, checkpoint, config, adapter_name, bare)
    with torch.no_grad():
        for load in loads:
            load()
    if bare and (config.use_dora or config.expert_config().use_dora):
        warnings.warn(folders.NO_MAGNITUDES, stacklevel=2)
    return model


def _has_no_magnitudes(checkpoint: MoeCheckpoint) -> bool:
    parts: list[Any] = [*checkpoint.experts.values(), *checkpoint.linears.values()]
    return all(part.magnitude is None for part in parts)


def _targets(model: nn.Module, config: MoeConfig) -> list[str] | None:
    """The modules to convert: of MoE-PEFT's names those this model has, as it does."""
    if config.targets is None:
        return None
    have = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    return [name for name in config.targets if name in have]


@contextlib.contextmanager
def _as_before_on_error(model: nn.Module) -> Iterator[None]:
    """If the block raises, every module is again as it was: its children, parameters and attributes."""
    before = [
        (module, {name: dict(v) if isinstance(v, dict) else v for name, v in vars(module).items()})
        for module in model.modules()
    ]
    trained = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        yield
    except BaseException:
        for module, values in before:
            vars(module).clear()
            vars(module).update(values)
        for parameter, wanted in trained.items():
            parameter.requires_grad_(wanted)
        raise


def _plan(
    model: nn.Module, checkpoint: MoeCheckpoint, config: MoeConfig, adapter_name: str, bare: bool
) -> list[Callable[[], Any]]:
    """Check everything; what remains cannot fail."""
    modules = moe_modules(model)
    names = _by_short(modules)
    _check_config(modules, config)
    _same_names("gate", set(names), set(checkpoint.gates))
    parts = {short + e: part for short, name in names.items() for e, part in _projections(modules[name]).items()}
    _same_names("experts", set(parts), set(checkpoint.experts))
    loads: list[Callable[[], Any]] = []
    for short, name in names.items():
        gate = modules[name].gate.weight
        _check_shape(f"{short}.gate", gate, checkpoint.gates[short])
        loads.append(functools.partial(fill, gate, checkpoint.gates[short]))
    for short, part in parts.items():
        loads += _expert_loads(short, part, checkpoint.experts[short], bare)
    return loads + _linear_loads(model, checkpoint, config.lora_config(), adapter_name, bare)


def _check_config(modules: Mapping[str, MoeModule], config: MoeConfig) -> None:
    have: Any = next(iter(modules.values())).model_config
    if type(have) is not type(config):
        raise ConfigError(f"the model has {METHODS[have.peft_type]}, the checkpoint {METHODS[config.peft_type]}")
    for field in _FUNCTION:
        ours, theirs = getattr(have, field, None), getattr(config, field, None)
        if field not in _unused(config) and ours != theirs:
            raise ConfigError(f"the model was converted with {field}={ours!r}, the checkpoint has {theirs!r}")


def _unused(config: Any) -> set[str]:
    """Fields that this routing strategy does not look at."""
    own = {
        "mixlora": {"top_k"},
        "mixlora-dynamic": {"top_p", "temperature"},
        "mixlora-switch": {"expert_capacity"},
    }
    strategy = getattr(config, "routing_strategy", None)
    return set() if strategy not in own else set().union(*own.values()) - own[strategy]


def _same_names(what: str, have: set[str], given: set[str]) -> None:
    if missing := sorted(have - given):
        raise StateDictError(f"the checkpoint has no {what} for {missing[0]} ({len(missing)} such modules)")
    if surplus := sorted(given - have):
        raise StateDictError(f"the checkpoint has {what} for {surplus[0]}, where this model has none")


def _check_shape(name: str, parameter: Tensor, value: Tensor) -> None:
    if tuple(parameter.shape) != tuple(value.shape):
        raise StateDictError(f"{name}: expected {list(parameter.shape)}, the checkpoint has {list(value.shape)}")


def _expert_loads(short: str, part: ExpertLinear, given: Experts, bare: bool) -> list[Callable[[], Any]]:
    assert part.lora_A is not None and part.lora_B is not None
    _check_shape(f"{short}.lora_A", part.lora_A, given.a)
    _check_shape(f"{short}.lora_B", part.lora_B, given.b)
    loads: list[Callable[[], Any]] = [
        functools.partial(fill, part.lora_A, given.a),
        functools.partial(fill, part.lora_B, given.b),
    ]
    magnitude = part.lora_magnitude
    if given.magnitude is None and magnitude is not None and bare:
        return [*loads, lambda: fill(magnitude, part.weight_norm())]
    if (given.magnitude is None) != (magnitude is None):
        here = "missing" if given.magnitude is None else "present"
        raise StateDictError(f"{short}: use_dora={magnitude is not None}, but the magnitudes are {here}")
    if given.magnitude is not None and magnitude is not None:
        _check_shape(f"{short}.lora_magnitude", magnitude, given.magnitude)
        loads.append(functools.partial(fill, magnitude, given.magnitude))
    return loads


def _linear_loads(
    model: nn.Module, checkpoint: MoeCheckpoint, config: LoraConfig, adapter_name: str, bare: bool
) -> list[Callable[[], Any]]:
    """The plain adapters beside the experts, as `fastlora.load_adapter` loads them."""
    layers = {name: layer for name, layer in adapted_layers(model) if adapter_name in layer.lora_A}
    names = _by_short(layers)
    _same_names("plain adapter", set(names), set(checkpoint.linears))
    adapters = {names[short]: tensors for short, tensors in checkpoint.linears.items()}
    found = peft.Checkpoint(adapters, {})
    configs = {
        name: config.replace(init_seed=None, adapter_dtype=layers[name].lora_A[adapter_name].dtype) for name in adapters
    }
    plain.check_modules(model, found, configs, bare)
    return plain.plan(model, found, configs, adapter_name)
