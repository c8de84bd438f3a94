"""Saving and loading adapters of a model in PEFT's format: all or nothing, safetensors only."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import pathlib
import tempfile
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastlora.config import LoraConfig
from fastlora.errors import ConfigError, StateDictError
from fastlora.io import peft
from fastlora.math import init
from fastlora.nn.convert import adapted_layers, by_pattern, convert, matches, set_adapter
from fastlora.nn.linear import AdaptedLinear


def _holders(model: nn.Module, adapter_name: str) -> dict[str, AdaptedLinear]:
    layers = dict(adapted_layers(model))
    holders = {name: layer for name, layer in layers.items() if adapter_name in layer.lora_A}
    if not holders:
        known = sorted({name for layer in layers.values() for name in layer.lora_A})
        raise ConfigError(f"no layer has an adapter {adapter_name!r}; have {', '.join(known) or 'none'}")
    return holders


def _saved_config(holders: dict[str, AdaptedLinear], adapter_name: str) -> LoraConfig:
    """One config for all layers: the commonest rank and alpha, the others as patterns of whole names."""
    configs = {name: layer.adapter_configs[adapter_name] for name, layer in holders.items()}
    ranks = [config.r for config in configs.values()]
    alphas = [config.lora_alpha for config in configs.values()]
    r, alpha = max(set(ranks), key=ranks.count), max(set(alphas), key=alphas.count)
    first = next(iter(configs.values()))
    return first.replace(
        r=r,
        lora_alpha=alpha,
        rank_pattern={name: config.r for name, config in configs.items() if config.r != r},
        alpha_pattern={name: config.lora_alpha for name, config in configs.items() if config.lora_alpha != alpha},
    )


def _others(model: nn.Module, config: LoraConfig, holders: dict[str, AdaptedLinear]) -> dict[str, Tensor]:
    """What trains besides the adapters: modules_to_save in full, and biases."""
    wanted: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if config.modules_to_save and matches(config.modules_to_save, name):
            wanted |= {f"{name}.{key}": value for key, value in module.state_dict().items()}
        bias = module._parameters.get("bias")
        if bias is not None and (config.bias == "all" or (config.bias == "lora_only" and name in holders)):
            wanted[f"{name}.bias"] = bias
    return wanted


def _checkpoint(model: nn.Module, adapter_name: str) -> tuple[peft.Checkpoint, LoraConfig]:
    holders = _holders(model, adapter_name)
    config = _saved_config(holders, adapter_name)
    adapters = {
        name: peft.AdapterTensors(
            layer.lora_A[adapter_name],
            layer.lora_B[adapter_name],
            layer.lora_magnitude.get(adapter_name, None),
        )
        for name, layer in holders.items()
    }
    return peft.Checkpoint(adapters, _others(model, config, holders)), config


def _folder(folder: str | os.PathLike[str], adapter_name: str) -> pathlib.Path:
    """PEFT's layout: "default" in the folder itself, another adapter in a folder of its name inside it."""
    path = pathlib.Path(folder)
    return path if adapter_name == "default" else path / adapter_name


def save_adapter(model: nn.Module, folder: str | os.PathLike[str], adapter_name: str = "default") -> pathlib.Path:
    """Save an adapter in PEFT's format: adapter_config.json and adapter_model.safetensors.

    "default" goes into `folder`, any other name into `folder/name`. Each file is written beside its place and moved
    there whole; an adapter that was there is replaced.

    Returns:
        The folder the two files are in.

    Raises:
        ConfigError: no layer has the adapter. FileExistsError: the folder holds files of these names that are no
        adapter's; they stay. OSError: the folder cannot be written.
    """
    from safetensors.torch import save_file

    checkpoint, config = _checkpoint(model, adapter_name)
    target = _folder(folder, adapter_name)
    _refuse_foreign_files(target)
    linears = [name for name, module in model.named_modules() if isinstance(module, (nn.Linear, AdaptedLinear))]
    targets = peft.minimal_targets(list(checkpoint.adapters), linears)
    base = getattr(getattr(model, "config", None), "_name_or_path", None) or None
    text = peft.config_to_json(config, targets, base, "CAUSAL_LM" if _is_causal_lm(model) else None)
    state = {key: value.detach().contiguous().cpu() for key, value in peft.to_state(checkpoint).items()}
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".saving-", dir=target) as scratch:
        weights, settings = pathlib.Path(scratch, peft.WEIGHTS_NAME), pathlib.Path(scratch, peft.CONFIG_NAME)
        save_file(state, weights, metadata=peft.metadata_of(config))
        settings.write_text(text, encoding="utf-8")
        os.replace(weights, target / peft.WEIGHTS_NAME)
        os.replace(settings, target / peft.CONFIG_NAME)
    return target


def _is_causal_lm(model: nn.Module) -> bool:
    return type(model).__name__.endswith("ForCausalLM")


def _refuse_foreign_files(target: pathlib.Path) -> None:
    if target.exists() and not target.is_dir():
        raise FileExistsError(f"{target} is a file; expected a folder to save the adapter in")
    config, weights = target / peft.CONFIG_NAME, target / peft.WEIGHTS_NAME
    ours = False
    with contextlib.suppress(OSError, json.JSONDecodeError, UnicodeDecodeError):
        found = json.loads(config.read_text(encoding="utf-8"))
        ours = isinstance(found, dict) and "peft_type" in found
    if not ours:
        for path in (config, weights):
            if path.exists():
                raise FileExistsError(f"{path} exists and is no adapter's; move it away or save elsewhere")


def _read(folder: pathlib.Path) -> tuple[peft.Checkpoint, LoraConfig]:
    from safetensors import SafetensorError, safe_open

    config_path, weights_path = folder / peft.CONFIG_NAME, folder / peft.WEIGHTS_NAME
    if not config_path.is_file():
        raise FileNotFoundError(f"no {peft.CONFIG_NAME} in {folder}")
    if not weights_path.is_file():
        pickled = folder / "adapter_model.bin"
        hint = f"; {pickled.name} is a pickle and is not read: save it as safetensors" if pickled.exists() else ""
        raise FileNotFoundError(f"no {peft.WEIGHTS_NAME} in {folder}{hint}")
    try:
        with safe_open(weights_path, framework="pt") as file:
            metadata = file.metadata()
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
    except SafetensorError as error:
        raise StateDictError(f"{weights_path} is not a complete safetensors file: {error}") from None
    try:
        config = peft.config_from_json(config_path.read_text(encoding="utf-8"), metadata)
    except UnicodeDecodeError as error:
        raise StateDictError(f"{config_path} is not text: {error}") from None
    return peft.from_state(state), config


def load_adapter(model: nn.Module, folder: str | os.PathLike[str], adapter_name: str = "default") -> nn.Module:
    """Load an adapter saved by `save_adapter` or by PEFT, and make it active.

    Into a converted model the adapter is added under `adapter_name`, or loaded over the one of that name if its rank
    fits. A plain model is converted first: `nn.Linear` to LoraLinear, bitsandbytes' `Linear4bit` to QLoraLinear.

    Args:
        folder: that holds the two files (or, for a name other than "default", `folder/adapter_name`).

    Returns:
        The same model; dropout and everything else as the adapter's config says.

    Raises:
        FileNotFoundError: files missing; a pickled adapter_model.bin is never read.
        StateDictError, ConfigError: truncated, foreign or not fitting this model. The model has not changed then.
    """
    path = pathlib.Path(folder)
    if adapter_name != "default" and (path / adapter_name / peft.CONFIG_NAME).is_file():
        path = path / adapter_name
    checkpoint, config = _read(path)
    config = config.replace(adapter_dtype=peft.dtype_of(checkpoint))
    _check_modules(model, checkpoint, config)
    if not any(True for _ in adapted_layers(model)):
        wanted = config.replace(target_modules=list(checkpoint.adapters), init_lora_weights=_plain_init(config))
        convert(model, wanted, quantize=None, adapter_name=adapter_name, progress=False)
    loads = _plan(model, checkpoint, config, adapter_name)
    with torch.no_grad():
        for load in loads:
            load()
    set_adapter(model, adapter_name)
    return model


def _plain_init(config: LoraConfig) -> Any:
    """The init to rebuild layers with: one that rewrites the base must be repeated, any other is overwritten anyway."""
    return config.init_lora_weights if init.changes_base(config.init_lora_weights) else True


def _check_modules(model: nn.Module, checkpoint: peft.Checkpoint, config: LoraConfig) -> None:
    """Every module is there, is linear, and has the checkpoint's sizes."""
    modules = dict(model.named_modules())
    for name, tensors in checkpoint.adapters.items():
        module = modules.get(name)
        if module is None:
            raise StateDictError(f"the checkpoint adapts {name}, which this model does not have")
        if not isinstance(module, (nn.Linear, AdaptedLinear)):
            raise StateDictError(f"the checkpoint adapts {name}, a {type(module).__name__}; expected a linear layer")
        have, want = (tensors.b.shape[0], tensors.a.shape[1]), (module.out_features, module.in_features)
        if have != want:
            raise StateDictError(f"{name}: expected an adapter for [out, in] = {list(want)}, got {list(have)}")
        r = by_pattern(config.rank_pattern, name, config.r)
        if tensors.a.shape[0] != r:
            raise StateDictError(f"{name}: expected rank {r} from {peft.CONFIG_NAME}, got {tensors.a.shape[0]}")
        if config.use_dora != (tensors.magnitude is not None):
            raise StateDictError(
                f"{name}: use_dora={config.use_dora}, but the magnitude is "
                f"{'missing' if tensors.magnitude is None else 'present'}"
            )
        if tensors.magnitude is not None and tensors.magnitude.numel() != module.out_features:
            raise StateDictError(
                f"{name}: expected a magnitude of {module.out_features}, got {tensors.magnitude.numel()}"
            )
    parameters = dict(model.named_parameters())
    for name, tensor in checkpoint.others.items():
        if name not in parameters or parameters[name].shape != tensor.shape:
            shape = str(tuple(parameters[name].shape)) if name in parameters else "no such parameter"
            raise StateDictError(f"{name}: the checkpoint holds {tuple(tensor.shape)}, the model has {shape}")


def _plan(
    model: nn.Module, checkpoint: peft.Checkpoint, config: LoraConfig, adapter_name: str
) -> list[Callable[[], Any]]:
    layers = dict(adapted_layers(model))
    holders = {name for name, layer in layers.items() if adapter_name in layer.lora_A}
    if surplus := sorted(holders - set(checkpoint.adapters)):
        raise StateDictError(
            f"adapter {adapter_name!r} exists on {surplus[0]}, which the checkpoint does not adapt "
            f"({len(surplus)} such layers); load it under another name"
        )
    loads: list[Callable[[], Any]] = []
    for name, tensors in checkpoint.adapters.items():
        layer = layers.get(name)
        if layer is None:
            raise StateDictError(f"the checkpoint adapts {name}, which is not converted; convert it or a plain model")
        own = config.replace(
            r=by_pattern(config.rank_pattern, name, config.r),
            lora_alpha=by_pattern(config.alpha_pattern, name, config.lora_alpha),
        )
        _check_fits(name, layer, own, adapter_name)
        loads.append(_layer_load(layer, own, tensors, adapter_name))
    parameters = dict(model.named_parameters())
    loads += [functools.partial(parameters[name].copy_, tensor) for name, tensor in checkpoint.others.items()]
    return loads


def _check_fits(name: str, layer: AdaptedLinear, config: LoraConfig, adapter_name: str) -> None:
    rewritten = init.changes_base(config.init_lora_weights)
    if adapter_name in layer.lora_A:
        have = layer.adapter_configs[adapter_name]
        if (have.r, have.use_dora) != (config.r, config.use_dora):
            raise ConfigError(
                f"{name} has an adapter {adapter_name!r} with r={have.r}, use_dora={have.use_dora}; the checkpoint has "
                f"r={config.r}, use_dora={config.use_dora}: delete it or load under another name"
            )
    strategy = layer.init_record[adapter_name].strategy if adapter_name in layer.lora_A else None
    if rewritten and strategy != init.canonical(config.init_lora_weights):
        raise ConfigError(
            f"the adapter was started with init {config.init_lora_weights!r}, which rewrites the base weight: "
            f"convert the original model with the same init before loading it"
        )
    if layer.merged:
        raise ConfigError(f"{name} is merged; unmerge before loading an adapter")


def _layer_load(
    layer: AdaptedLinear, config: LoraConfig, tensors: peft.AdapterTensors, adapter_name: str
) -> Callable[[], None]:
    def load() -> None:
        if adapter_name in layer.lora_A:
            layer.lora_A[adapter_name].copy_(tensors.a)
            layer.lora_B[adapter_name].copy_(tensors.b)
            layer.adapter_configs[adapter_name] = config
            layer.scaling[adapter_name] = config.scaling
        else:
            layer.add_adapter(adapter_name, config, (tensors.a, tensors.b))
        if tensors.magnitude is not None:
            layer.lora_magnitude[adapter_name].copy_(tensors.magnitude.reshape(-1))

    return load
