"""Model level: swap a model's linears for adapted ones, freeze the rest, count and group what trains."""

from __future__ import annotations

import ast
import difflib
import functools
import inspect
import math
import re
import textwrap
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from fastlora.config import LoraConfig
from fastlora.errors import ConfigError, DtypeError, FastloraError, ShapeError
from fastlora.math import init, nf4
from fastlora.nn.adapters import check_name, checked_config
from fastlora.nn.linear import AdaptedLinear, LoraLinear, QLoraLinear, check_compute_dtype
from fastlora.nn.quantized import QuantizedWeight

_OTHER_QUANTIZED = ("8bit", "GPTQ", "AWQ", "HQQ", "WQLinear", "QuantLinear")
_CLASSIFICATION_HEADS = ("score", "classifier")
_MAX_SEED = 2**63 - 1


def adapted_layers(model: nn.Module) -> Iterator[tuple[str, AdaptedLinear]]:
    """The model's adapted layers by name."""
    for name, module in model.named_modules():
        if isinstance(module, AdaptedLinear):
            yield name, module


# --- which modules ----------------------------------------------------------------------------------------------------


def matches(pattern: str | Sequence[str], name: str) -> bool:
    """PEFT's rule: a string is a full-match regular expression, a list holds names or name endings."""
    if isinstance(pattern, str):
        return re.fullmatch(pattern, name) is not None
    return any(name == ending or name.endswith("." + ending) for ending in pattern)


def _layer_index(name: str, patterns: str | Sequence[str] | None) -> int | None:
    """The index of the layer list a module is in; PEFT's rule."""
    lists = [patterns] if isinstance(patterns, str) else list(patterns or [])
    for pattern in lists or [r"[^.]*"]:
        found = re.match(rf"(?:^|.*?\.){pattern}\.(\d+)\.", name)
        if found:
            return int(found.group(1))
    return None


def _wanted_layer(name: str, config: LoraConfig) -> bool:
    if config.layers_to_transform is None:
        return True
    wanted = config.layers_to_transform
    indices = [wanted] if isinstance(wanted, int) else wanted
    return _layer_index(name, config.layers_pattern) in indices


@functools.cache
def _weights_read_directly(cls: type) -> frozenset[str]:
    """Names x such that a method of `cls` itself reads `self.x.weight`: swapping x would go unnoticed there."""
    names: set[str] = set()
    for base in cls.__mro__:
        if base is nn.Module:
            break
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(base)))
        except (OSError, TypeError, SyntaxError):
            continue
        for node in ast.walk(tree):
            inner = node.value if isinstance(node, ast.Attribute) and node.attr == "weight" else None
            if isinstance(inner, ast.Attribute) and isinstance(inner.value, ast.Name) and inner.value.id == "self":
                names.add(inner.attr)
    return frozenset(names)


def _is_head(model: nn.Module, name: str, module: nn.Module) -> bool:
    """Whether a linear makes the model's output: transformers' own answer, or a classification head by its name."""
    get = getattr(model, "get_output_embeddings", None)
    if not callable(get):
        return False
    return get() is module or (get() is None and name.partition(".")[0] in _CLASSIFICATION_HEADS)


def _other_quantizer(module: nn.Module) -> str:
    kind = type(module).__name__
    return f"{kind} bases are not supported" if any(mark in kind for mark in _OTHER_QUANTIZED) else ""


def _saved(name: str, config: LoraConfig) -> bool:
    """Whether a module is one of modules_to_save or inside one; PEFT's rule."""
    return any(re.match(rf"(^|.*\.){saved}($|\..*)", name) for saved in config.modules_to_save or ())


def _tied(model: nn.Module) -> set[int]:
    """Ids of parameters that more than one module holds, or whose module has more than one place."""
    owners: dict[int, int] = {}
    for module in model.modules():
        for child in (module, *module._modules.values()):
            for parameter in () if child is None else child._parameters.values():
                # Once for the module itself and once for each place it has.
                owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    return {key for key, count in owners.items() if count > 2}


def why_not(model: nn.Module, name: str, module: nn.Module, tied: set[int]) -> str:
    """Why a linear must not be swapped, or ""."""
    parent = model.get_submodule(name.rpartition(".")[0])
    child = name.rpartition(".")[2]
    if reason := _other_quantizer(module):
        return reason
    if id(module.weight) in tied:
        return "its weight is shared with another module"
    if isinstance(parent, nn.MultiheadAttention) or child in _weights_read_directly(type(parent)):  # type: ignore[arg-type]
        return f"{type(parent).__name__} reads {child}.weight itself"
    return ""


def find_targets(model: nn.Module, config: LoraConfig) -> dict[str, nn.Module]:
    """The linears `config` asks for, by name.

    Raises:
        ConfigError: nothing matches (lists near names), or a module that was asked for by name cannot be swapped.
    """
    own = {id(part) for _, layer in adapted_layers(model) for part in layer.modules()}
    modules = {name: module for name, module in model.named_modules() if name and id(module) not in own}
    linears = {name: module for name, module in modules.items() if isinstance(module, nn.Linear)}
    tied, everything = _tied(model), config.target_modules == "all-linear"
    chosen: dict[str, nn.Module] = {}
    for name, module in modules.items():
        if config.exclude_modules and matches(config.exclude_modules, name):
            continue
        if _saved(name, config) or not _wanted_layer(name, config):
            continue
        if everything:
            if name not in linears or _is_head(model, name, module):
                continue
            if _other_quantizer(module):
                raise ConfigError(f"cannot adapt {name}: {_other_quantizer(module)}; exclude_modules can leave it out")
            if not why_not(model, name, module, tied):
                chosen[name] = module
        elif matches(config.target_modules, name):
            if name not in linears:
                if getattr(module, "weight", None) is None:
                    continue  # a container whose name ends alike
                kind = type(module).__name__
                raise ConfigError(
                    f"target_modules matched {name}, a {kind}; expected nn.Linear or bitsandbytes Linear4bit"
                )
            if reason := why_not(model, name, module, tied):
                raise ConfigError(f"cannot adapt {name}: {reason}")
            chosen[name] = module
    if not chosen:
        _raise_no_match(config, list(linears))
    return chosen


def _raise_no_match(config: LoraConfig, linears: list[str]) -> None:
    asked = [config.target_modules] if isinstance(config.target_modules, str) else list(config.target_modules)
    endings = sorted({name.rpartition(".")[2] for name in linears})
    near = sorted({hit for word in asked for hit in difflib.get_close_matches(word, endings, n=3, cutoff=0.5)})
    hint = f"near: {', '.join(near)}; " if near else ""
    raise ConfigError(
        f"target_modules={asked} matched no linear layer; {hint}linear names: {', '.join(endings) or 'none'}"
    )


def by_pattern(patterns: Mapping[str, Any], name: str, default: Any) -> Any:
    """PEFT's rank_pattern rule: the first pattern that matches the name or its ending."""
    for pattern, value in patterns.items():
        if re.fullmatch(rf"(.*\.)?({pattern})", name):
            return value
    return default


def config_for(name: str, config: LoraConfig) -> LoraConfig:
    """`config` with the rank, alpha and seed of one module; every module gets its own seed from the config's."""
    r = by_pattern(config.rank_pattern, name, config.r)
    alpha = by_pattern(config.alpha_pattern, name, config.lora_alpha)
    seed = None if config.init_seed is None else (config.init_seed + zlib.crc32(name.encode())) % _MAX_SEED
    return config.replace(r=r, lora_alpha=alpha, init_seed=seed)


def model_seed(name: str, seed: int) -> int:
    """The config's seed from that of one module: the inverse of what `config_for` does to it."""
    return (seed - zlib.crc32(name.encode())) % _MAX_SEED


# --- converting -------------------------------------------------------------------------------------------------------


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
    **fields: Any,
) -> nn.Module:
    """Swap the model's linears in place for adapted ones and freeze the rest.

    `nn.Linear` becomes `QLoraLinear` (or, with quantize=None, `LoraLinear`); bitsandbytes' `Linear4bit` becomes
    `QLoraLinear` over its own bytes. Each dense weight is released as soon as it is quantized.

    Args:
        config: LoraConfig, dict or peft.LoraConfig; `fields` on top.
        quantize: "nf4", "fp4" or None.
        progress: show a progress bar.

    Returns:
        The same model.

    Raises:
        ConfigError: nothing matches (near names are listed), or a field that cannot be honoured; nothing has changed.
    """
    config = checked_config(config, fields)
    if quantize not in ("nf4", "fp4", None):
        raise ConfigError(f'quantize must be "nf4", "fp4" or None, got {quantize!r}')
    if config.init_seed is None:
        config = config.replace(init_seed=int(torch.randint(0, _MAX_SEED, (1,), device="cpu").item()))
    targets = find_targets(model, config)
    if quantize is not None:
        nf4.check_format(quantize, blocksize)
    check_compute_dtype(compute_dtype)
    check_name(adapter_name)
    _check_saved(model, config)
    configs = {name: checked_config(config_for(name, config), {}) for name in targets}
    for name, module in targets.items():
        _check_target(name, module, configs[name], quantize)
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
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for name in _with_progress(list(targets), "convert", progress):
        parent = model.get_submodule(name.rpartition(".")[0])
        setattr(parent, name.rpartition(".")[2], make[name](targets.pop(name), configs[name]))
        del make[name]
    _unfreeze(model, config)
    if quantize is not None or any(isinstance(layer, QLoraLinear) for _, layer in adapted_layers(model)):
        _release_from_transformers(model)
    return model


def _check_saved(model: nn.Module, config: LoraConfig) -> None:
    names = [name for name, _ in model.named_modules()]
    for saved in config.modules_to_save or ():
        if not any(matches([saved], name) for name in names):
            raise ConfigError(f"modules_to_save: no module is named {saved!r}")
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False) if config.modules_to_save else ():
        owners.setdefault(id(parameter), []).append(name)
    for shared in owners.values():
        outside = [name for name in shared if not _saved(name, config)]
        if outside and len(outside) < len(shared):
            inside = next(name for name in shared if name not in outside)
            raise ConfigError(f"modules_to_save: {inside} is the same tensor as {outside[0]}; name both or neither")


def _check_target(name: str, linear: nn.Module, config: LoraConfig, quantize: str | None) -> None:
    """Raise, before anything has changed, what making this layer would."""
    weight: Any = linear.weight
    four_bit = hasattr(weight, "quant_state")
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
            if _saved(name, config) or (config.bias == "all" and own == "bias"):
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


def _with_progress(items: list[str], label: str, show: bool) -> Any:
    if not show or len(items) < 8:
        return items
    from tqdm.auto import tqdm

    return tqdm(items, desc=label, unit="layer")


# --- adapters of a whole model ----------------------------------------------------------------------------------------


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

    Raises:
        ConfigError: no layer has one of them, or a layer refuses the combination; nothing has changed then.
    """
    layers = _layers(model)
    chosen = _known_names(layers, names)
    for layer in layers:
        layer.check_active([name for name in chosen if name in layer.lora_A])
    for layer in layers:
        layer.set_adapter([name for name in chosen if name in layer.lora_A])


def add_adapters(model: nn.Module, configs: Mapping[str, Any]) -> None:
    """Add several adapters to every adapted layer that each config's target_modules picks.

    Raises:
        ConfigError: a name or field that does not fit, or a config that picks no layer; nothing has changed then.
    """
    layers = dict(adapted_layers(model)) if _layers(model) else {}
    checked = {name: checked_config(config, {}) for name, config in configs.items()}
    for name, config in checked.items():
        _shares_nothing(name, config)
        if config.init_seed is None:
            checked[name] = config.replace(init_seed=int(torch.randint(0, _MAX_SEED, (1,), device="cpu").item()))
    picked: dict[str, list[str]] = {}
    for name, config in checked.items():
        everything = config.target_modules == "all-linear"
        picked[name] = [
            path
            for path in layers
            if (everything or matches(config.target_modules, path))
            and not (config.exclude_modules and matches(config.exclude_modules, path))
            and _wanted_layer(path, config)
        ]
        if not picked[name]:
            raise ConfigError(f"target_modules={config.target_modules!r} of {name!r} matches no adapted layer")
        for path in picked[name]:
            layers[path].check_new(name, checked[name])
    made = [
        (x, path, checked_config(config_for(path, checked[x]), {})) for x, paths in picked.items() for path in paths
    ]
    for name, path, config in made:
        layers[path].add_adapter(name, config)


def _shares_nothing(name: str, config: LoraConfig) -> None:
    """Biases and whole modules exist once in a model: only the adapter it is converted with can train them."""
    for field, nothing in (("bias", "none"), ("modules_to_save", None)):
        if (value := getattr(config, field)) not in (nothing, []):
            raise ConfigError(f"{field}={value!r} of {name!r}: only the adapter given to convert can train these")


def merge(
    model: nn.Module, adapter_names: str | Sequence[str] | None = None, *, safe: bool = True, **keywords: Any
) -> None:
    """`layer.merge` on every adapted layer; if one refuses, those already merged are unmerged again.

    Raises:
        ConfigError, ShapeError: as `layer.merge`, or no layer has an adapter of one of the names.
    """
    done: list[AdaptedLinear] = []
    layers = _layers(model)
    chosen = None if adapter_names is None else _known_names(layers, adapter_names)
    try:
        for layer in layers:
            names = None if chosen is None else [name for name in chosen if name in layer.lora_A]
            fresh = not layer.merged
            layer.merge(safe, adapter_names=names, **keywords)
            if fresh:
                done.append(layer)
    except FastloraError:
        for layer in done:
            layer.unmerge()
        raise


def unmerge(model: nn.Module) -> None:
    """Bring back every layer's own weight, bit for bit."""
    for layer in _layers(model):
        layer.unmerge()


def merge_and_unload(model: nn.Module, *, safe: bool = True, dtype: torch.dtype | None = None) -> nn.Module:
    """Merge the active adapters and put plain `nn.Linear` layers back; 16-bit where the base was 4-bit.

    Returns:
        The same model, without adapters (a plain layer, if the model is an adapted layer itself).

    Raises:
        ConfigError, ShapeError: as `layer.merge`; the model has not changed then.
    """
    merge(model, safe=safe, dtype=dtype)
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
    return model


def trainable_parameters(model: nn.Module) -> tuple[int, int]:
    """(trainable, total) parameter counts; a 4-bit weight counts its weights, not its bytes."""
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
    """One line: trainable, total and their ratio."""
    trainable, total = trainable_parameters(model)
    line = f"trainable: {trainable:,} of {total:,} parameters ({100 * trainable / max(1, total):.2f} %)"
    print(line)  # noqa: T201 - what it is for


def param_groups(
    model: nn.Module, lr: float, loraplus_lr_ratio: float = 1.0, weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    """Parameter groups for any torch optimizer; B and the magnitudes learn `loraplus_lr_ratio` times faster.

    LoRA+ (2402.12354, section 4): the B matrices want a larger learning rate than the A matrices.

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
