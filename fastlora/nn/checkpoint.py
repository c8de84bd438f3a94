"""Saving and loading adapters of a model in PEFT's format: all or nothing, safetensors only."""

from __future__ import annotations

import functools
import os
import pathlib
import re
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastlora.config import AdaLoraConfig, LoraConfig
from fastlora.errors import ConfigError, StateDictError
from fastlora.io import peft
from fastlora.math import init
from fastlora.nn import folders
from fastlora.nn.adapted import AdaptedLinear
from fastlora.nn.adapters import check_name
from fastlora.nn.convert import convert
from fastlora.nn.model import set_adapter
from fastlora.nn.sharded import agree, any_sharded, fill, on_first, whole
from fastlora.nn.targets import adapted_layers, by_pattern, config_for, find_targets, matches, model_seed

# What a checkpoint says once for all its layers.
_ONCE = ("use_rslora", "use_dora", "lora_dropout", "dora_dropout", "bias", "modules_to_save")
_INIT_FIELDS = ("init_lora_weights", "init_bound")
_ADALORA_ONCE = ("lora_alpha", *peft.ADALORA_FIELDS)


def _refuse_peft(model: nn.Module) -> None:
    """An accelerated PEFT model's adapters are PEFT's, files and all."""
    if getattr(model, "peft_config", None) and not any(True for _ in adapted_layers(model)):
        raise ConfigError(
            f"the adapters of this {type(model).__name__} are PEFT's, accelerated or not: "
            "use its own load_adapter and save_pretrained"
        )


def _holders(model: nn.Module, adapter_name: str) -> dict[str, AdaptedLinear]:
    _refuse_peft(model)
    if any(hasattr(getattr(module, "model_config", None), "num_experts") for module in model.modules()):
        raise ConfigError(
            "the model has a mixture of experts, which PEFT's format cannot hold: use fastlora.moe.save_adapter"
        )
    layers = dict(adapted_layers(model))
    holders = {name: layer for name, layer in layers.items() if adapter_name in layer.lora_A}
    if not holders:
        known = sorted({name for layer in layers.values() for name in layer.lora_A})
        raise ConfigError(f"no layer has an adapter {adapter_name!r}; have {', '.join(known) or 'none'}")
    return holders


def _saved_config(holders: dict[str, AdaptedLinear], adapter_name: str) -> LoraConfig:
    """One config for all layers: the commonest rank and alpha, the others as patterns of whole names.

    Raises:
        ConfigError: the layers' configs differ in what one file can say only once.
    """
    configs = {name: layer.adapter_configs[adapter_name] for name, layer in holders.items()}
    first = next(iter(configs.values()))
    rewritten = any(init.changes_base(config.init_lora_weights) for config in configs.values())
    if len({type(config) for config in configs.values()}) > 1:
        raise ConfigError(
            f"adapter {adapter_name!r} is LoRA in some layers and AdaLoRA in others: no format holds both"
        )
    adalora = isinstance(first, AdaLoraConfig)
    for field in _ONCE + (_INIT_FIELDS if rewritten else ()) + (_ADALORA_ONCE if adalora else ()):
        values = [getattr(config, field) for config in configs.values()]
        if any(value != values[0] for value in values):
            raise ConfigError(f"adapter {adapter_name!r} has layers of different {field}: PEFT's format holds only one")
    ranks = {name: config.r for name, config in configs.items()}
    alphas = {name: config.lora_alpha for name, config in configs.items()}
    seeds = {name: config.init_seed for name, config in configs.items()}
    seeds |= {n: x.init_record[adapter_name].seed for n, x in holders.items() if seeds[n] is None}
    common = {None if seed is None else model_seed(name, seed) for name, seed in seeds.items()}
    seed = common.pop() if len(common) == 1 else None
    if isinstance(first, AdaLoraConfig):
        return first.replace(r=first.init_r, init_seed=seed)
    r, alpha = _commonest(ranks), _commonest(alphas)
    return first.replace(
        r=r,
        lora_alpha=alpha,
        rank_pattern=_patterns(ranks, r),
        alpha_pattern=_patterns(alphas, alpha),
        init_seed=seed,
    )


def _commonest(values: dict[str, Any]) -> Any:
    """The value most layers have; the first of equally common ones."""
    counts: dict[Any, int] = {}
    for value in values.values():
        counts[value] = counts.get(value, 0) + 1
    return max(counts, key=lambda value: counts[value])


def _patterns(values: dict[str, Any], default: Any) -> dict[str, Any]:
    """Patterns that give every layer its value: whole names, tied to the start where they are other names' endings."""
    odd = {name: value for name, value in values.items() if value != default}
    if all(by_pattern(odd, name, default) == value for name, value in values.items()):
        return odd
    return {f"^{re.escape(name)}": value for name, value in odd.items()}


def _others(model: nn.Module, config: LoraConfig, holders: dict[str, AdaptedLinear]) -> dict[str, Tensor]:
    """What trains besides the adapters: modules_to_save in full, and biases."""
    wanted: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if config.modules_to_save and matches(config.modules_to_save, name):
            wanted |= {f"{name}.{key}": value for key, value in module.state_dict().items()}
        if config.bias == "all" or (config.bias == "lora_only" and name in holders):
            own = module.named_parameters(prefix=name, recurse=False)
            wanted |= {key: value for key, value in own if "bias" in key.rpartition(".")[2]}
    return wanted


def _adapter_tensors(layer: AdaptedLinear, name: str) -> peft.AdapterTensors:
    """One layer's adapter in full; of AdaLoRA what its last allocation kept."""
    a, b = whole(layer.lora_A[name]), whole(layer.lora_B[name])
    magnitude = whole(layer.lora_magnitude[name]) if name in layer.lora_magnitude else None
    if name not in layer.lora_E:
        return peft.AdapterTensors(a, b, magnitude)
    e, kept = whole(layer.lora_E[name]), layer.kept_triplets(name)
    if kept is None:
        return peft.AdapterTensors(a, b, None, e)
    if len(kept) == e.shape[0]:  # else they are the kept ones alone already
        rows = kept.to(e.device)
        a, b, e = a[rows], b[:, rows], e[rows]
    return peft.AdapterTensors(a, b, None, e, kept.tolist())


def _checkpoint(model: nn.Module, adapter_name: str) -> tuple[peft.Checkpoint, LoraConfig]:
    holders = _holders(model, adapter_name)
    config = _saved_config(holders, adapter_name)
    adapters = {name: _adapter_tensors(layer, adapter_name) for name, layer in holders.items()}
    if any(tensors.kept is not None for tensors in adapters.values()):
        everything = [True] * config.r
        adapters = {name: t._replace(kept=t.kept or everything) for name, t in adapters.items()}
    others = {name: whole(tensor) for name, tensor in _others(model, config, holders).items()}
    return peft.Checkpoint(adapters, others), config


def save_adapter(model: nn.Module, folder: str | os.PathLike[str], adapter_name: str = "default") -> pathlib.Path:
    """Save an adapter in PEFT's format: adapter_config.json and adapter_model.safetensors.

    "default" goes into `folder`, any other name into `folder/name`. Each file is written beside its place and moved
    there whole; an adapter that was there is replaced.

    Where parameters are cut over processes (FSDP2) every process must call it: all gather, the first one writes, and
    all return, or raise, together.

    Args:
        model: converted.
        folder: made where it is missing.
        adapter_name: which adapter.

    Returns:
        The folder the two files are in.

    Raises:
        ConfigError: no layer has the adapter.
        FileExistsError: the folder holds files of these names that are no adapter's; they stay.
        OSError: the folder cannot be written.
    """
    if not any_sharded(model):
        return _write(model, *_checkpoint(model, adapter_name), folders.place(folder, adapter_name))
    holders, error = [], None
    try:
        holders = sorted(_holders(model, adapter_name))
    except ConfigError as failure:
        error = failure
    agree(holders, error)
    checkpoint, config = _checkpoint(model, adapter_name)
    target: pathlib.Path = on_first(lambda: _write(model, checkpoint, config, folders.place(folder, adapter_name)))
    return target


def _write(model: nn.Module, checkpoint: peft.Checkpoint, config: LoraConfig, target: pathlib.Path) -> pathlib.Path:
    every_module = [name for name, _ in model.named_modules() if name]
    targets = peft.minimal_targets(list(checkpoint.adapters), every_module)
    kept = {name: tensors.kept for name, tensors in checkpoint.adapters.items() if tensors.kept is not None}
    text = peft.config_to_json(config, targets, *folders.about(model), kept or None)
    return folders.write(target, peft.to_state(checkpoint), peft.metadata_of(config), text)


def _read(folder: pathlib.Path) -> tuple[peft.Checkpoint, LoraConfig, bool]:
    """The adapter, its config, and whether the magnitudes are to be made: MoE-PEFT does not save them."""
    found = folders.read(folder)
    config = peft.config_from_json(found.config, found.metadata)
    checkpoint = peft.with_masks(peft.from_state(found.state), config, peft.masks_from_json(found.config))
    without = all(tensors.magnitude is None for tensors in checkpoint.adapters.values())
    return checkpoint, config, found.pickled and config.use_dora and without


def load_adapter(model: nn.Module, folder: str | os.PathLike[str], adapter_name: str = "default") -> nn.Module:
    """Load an adapter saved by `save_adapter`, by PEFT or, if it is plain LoRA or DoRA, by MoE-PEFT; make it active.

    Into a converted model the adapter is added under `adapter_name`, or loaded over the one of that name if its rank
    fits. A plain model is converted first: `nn.Linear` to LoraLinear, bitsandbytes' `Linear4bit` to QLoraLinear.

    Without a safetensors file adapter_model.bin is read, as tensors only: no code in it runs. If it holds no
    magnitudes for DoRA (MoE-PEFT saves none) they become the row norms of W + s B A, as MoE-PEFT loads it; a warning
    says so.

    Args:
        folder: that holds the two files (or, for a name other than "default", `folder/adapter_name`).

    Returns:
        The same model; dropout and everything else as the adapter's config says.

    Raises:
        FileNotFoundError: files missing.
        StateDictError, ConfigError: truncated, foreign or not fitting this model. The model has not changed then.
    """
    check_name(adapter_name)
    _refuse_peft(model)
    checkpoint, config, bare = _read(folders.find(folder, adapter_name))
    config = config.replace(adapter_dtype=peft.dtype_of(checkpoint))
    configs = {name: config_for(name, config) for name in checkpoint.adapters}
    for name, tensors in checkpoint.adapters.items():
        if tensors.kept is not None:
            configs[name] = configs[name].replace(r=sum(tensors.kept))
    check_modules(model, checkpoint, configs, bare)
    if not any(True for _ in adapted_layers(model)):
        _convert_for(model, checkpoint, config, adapter_name)
    loads = plan(model, checkpoint, configs, adapter_name)
    with torch.no_grad():
        for load in loads:
            load()
    set_adapter(model, adapter_name)
    if bare:
        warnings.warn(folders.NO_MAGNITUDES, stacklevel=2)
    return model


def _convert_for(model: nn.Module, checkpoint: peft.Checkpoint, config: LoraConfig, adapter_name: str) -> None:
    """Convert a plain model's layers that the checkpoint adapts, and no others."""
    strategy = config.init_lora_weights
    if _rewrites_at_random(config) and config.init_seed is None:
        raise ConfigError(f"init {strategy!r} rewrites the base by random probes, and the checkpoint holds no seed")
    wanted = config.replace(
        target_modules="|".join(re.escape(name) for name in checkpoint.adapters),
        exclude_modules=None,
        layers_to_transform=None,
        layers_pattern=None,
        # One that rewrites the base must be repeated; any other is overwritten anyway.
        init_lora_weights=strategy if init.changes_base(strategy) else True,
    )
    if lost := sorted(set(checkpoint.adapters) - set(find_targets(model, wanted))):
        raise StateDictError(f"the checkpoint adapts {lost[0]}, which is in its modules_to_save too")
    convert(model, wanted, quantize=None, adapter_name=adapter_name, progress=False)
    for name, layer in adapted_layers(model):
        if name in checkpoint.adapters and checkpoint.adapters[name].kept is not None:
            layer.delete_adapter(adapter_name)  # it comes back with fewer ranks


def _rewrites_at_random(config: LoraConfig) -> bool:
    return str(init.canonical(config.init_lora_weights)).startswith("pissa_niter_")


def _base_recipe(config: LoraConfig) -> tuple[Any, ...] | None:
    """What decides the base weight an init leaves; None if it leaves the original."""
    strategy = init.canonical(config.init_lora_weights)
    if not init.changes_base(strategy):
        return None
    if strategy == "loftq":  # its base is the original, quantized
        return (strategy,)
    # PiSSA takes away the same w at any scale unless A was clamped.
    scale = config.scaling if strategy == "olora" or config.init_bound is not None else None
    return strategy, config.r, config.init_bound, scale, config.init_seed if _rewrites_at_random(config) else None


def check_modules(model: nn.Module, checkpoint: peft.Checkpoint, configs: dict[str, LoraConfig], bare: bool) -> None:
    """Every module is there, is linear, and has the checkpoint's sizes; `bare`: magnitudes are to be made."""
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
        config = configs[name]
        if tensors.a.shape[0] != config.r:
            raise StateDictError(f"{name}: expected rank {config.r} from {peft.CONFIG_NAME}, got {tensors.a.shape[0]}")
        if config.use_dora != (tensors.magnitude is not None) and not bare:
            raise StateDictError(
                f"{name}: use_dora={config.use_dora}, but the magnitude is "
                f"{'missing' if tensors.magnitude is None else 'present'}"
            )
        if isinstance(config, AdaLoraConfig) != (tensors.e is not None):
            method, part = type(config).__name__, "missing" if tensors.e is None else "present"
            raise StateDictError(f"{name}: {peft.CONFIG_NAME} is a {method}, but lora_E is {part}")
        if tensors.magnitude is not None and tensors.magnitude.numel() != module.out_features:
            raise StateDictError(
                f"{name}: expected a magnitude of {module.out_features}, got {tensors.magnitude.numel()}"
            )
    own = _own_tensors(model)
    for name, tensor in checkpoint.others.items():
        if name not in own or own[name].shape != tensor.shape:
            shape = str(tuple(own[name].shape)) if name in own else "no such parameter"
            raise StateDictError(f"{name}: the checkpoint holds {tuple(tensor.shape)}, the model has {shape}")
        if own[name].is_floating_point() != tensor.is_floating_point():
            raise StateDictError(f"{name}: the checkpoint holds {tensor.dtype}, the model has {own[name].dtype}")


def _own_tensors(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers(remove_duplicate=False))}


def plan(
    model: nn.Module, checkpoint: peft.Checkpoint, configs: dict[str, LoraConfig], adapter_name: str
) -> list[Callable[[], Any]]:
    """What loads each tensor in its place; all is checked before, so that none of it can fail half-way."""
    layers = dict(adapted_layers(model))
    holders = {name for name, layer in layers.items() if adapter_name in layer.lora_A}
    if surplus := sorted(holders - set(checkpoint.adapters)):
        raise StateDictError(
            f"adapter {adapter_name!r} exists on {surplus[0]}, which the checkpoint does not adapt "
            f"({len(surplus)} such layers); load it under another name"
        )
    neighbours = sorted({name for layer in layers.values() for name in layer.lora_A} - {adapter_name})
    if checkpoint.others and neighbours:
        raise ConfigError(
            f"the checkpoint holds {next(iter(checkpoint.others))} (its bias or modules_to_save), which the model has "
            f"only once and {neighbours[0]!r} uses too: delete that adapter first"
        )
    loads: list[Callable[[], Any]] = []
    for name, tensors in checkpoint.adapters.items():
        layer = layers.get(name)
        if layer is None:
            raise StateDictError(f"the checkpoint adapts {name}, which is not converted; convert it or a plain model")
        _check_fits(name, layer, configs[name], adapter_name)
        loads.append(_layer_load(layer, configs[name], tensors, adapter_name))
    own = _own_tensors(model)
    loads += [functools.partial(fill, own[name], tensor) for name, tensor in checkpoint.others.items()]
    return loads


def _same_place(have: LoraConfig, config: LoraConfig) -> bool:
    """Whether an adapter of `config` can be loaded over one of `have`."""
    if isinstance(have, AdaLoraConfig) and isinstance(config, AdaLoraConfig):
        # Pruned triplets have a place among init_r.
        return have.init_r == config.init_r and have.r in (config.r, config.init_r)
    return (type(have), have.r, have.use_dora) == (type(config), config.r, config.use_dora)


def _kind(config: LoraConfig) -> str:
    if isinstance(config, AdaLoraConfig):
        return f"r={config.r} of init_r={config.init_r}, AdaLoRA"
    return f"r={config.r}, use_dora={config.use_dora}"


def _spread(tensors: peft.AdapterTensors) -> tuple[Tensor, Tensor, Tensor]:
    """A pruned AdaLoRA adapter in its places among init_r triplets, zero elsewhere."""
    assert tensors.kept is not None and tensors.e is not None
    rows, r = torch.tensor(tensors.kept), len(tensors.kept)
    a, b = tensors.a.new_zeros(r, tensors.a.shape[1]), tensors.b.new_zeros(tensors.b.shape[0], r)
    e = tensors.e.new_zeros(r, 1)
    a[rows], b[:, rows], e[rows] = tensors.a, tensors.b, tensors.e
    return a, b, e


def _check_fits(name: str, layer: AdaptedLinear, config: LoraConfig, adapter_name: str) -> None:
    have = layer.adapter_configs.get(adapter_name)
    if have is not None and not _same_place(have, config):
        raise ConfigError(
            f"{name} has an adapter {adapter_name!r} with {_kind(have)}; the checkpoint has {_kind(config)}: "
            "delete it or load under another name"
        )
    recipe = _base_recipe(config)
    if recipe != (None if have is None else _base_recipe(have)):
        strategy = config.init_lora_weights if recipe is not None or have is None else have.init_lora_weights
        raise ConfigError(
            f"init {strategy!r} rewrites the base weight, and the adapter fits only the base it was trained on: load "
            "it into the original model, or one converted with the very same init, rank and scale"
        )
    if layer.merged:
        raise ConfigError(f"{name} is merged; unmerge before loading an adapter")


def _layer_load(
    layer: AdaptedLinear, config: LoraConfig, tensors: peft.AdapterTensors, adapter_name: str
) -> Callable[[], None]:
    def load() -> None:
        values = (tensors.a, tensors.b) if tensors.e is None else (tensors.a, tensors.b, tensors.e)
        made = config
        if adapter_name in layer.lora_A:
            have = layer.adapter_configs[adapter_name]
            if tensors.kept is not None and have.r != config.r:
                values, made = _spread(tensors), config.replace(r=have.r)
            for group, value in zip((layer.lora_A, layer.lora_B, layer.lora_E), values, strict=False):
                fill(group[adapter_name], value)
            # The parameters stay, for an optimizer may hold them, and so does their dtype.
            kept = layer.lora_A[adapter_name].dtype
            layer.adapter_configs[adapter_name] = made.replace(adapter_dtype=kept)
            layer.scaling[adapter_name] = made.scaling
        else:
            layer.add_adapter(adapter_name, made, values)
        if tensors.magnitude is not None:
            fill(layer.lora_magnitude[adapter_name], tensors.magnitude.reshape(-1))
        elif config.use_dora:
            fill(layer.lora_magnitude[adapter_name], layer.weight_norm(adapter_name))
        layer.rank_masks.pop(adapter_name, None)
        if tensors.kept is not None:
            layer.rank_masks[adapter_name] = torch.tensor(tensors.kept, device=layer.lora_A[adapter_name].device)

    return load
