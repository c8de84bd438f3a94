"""Which modules of a model an adapter goes on: PEFT's matching rules, and what must never be swapped."""

from __future__ import annotations

import ast
import difflib
import functools
import inspect
import re
import textwrap
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from fastlora.config import SEED_END, LoraConfig
from fastlora.errors import ConfigError
from fastlora.nn.adapted import AdaptedLinear

_OTHER_QUANTIZED = ("8bit", "GPTQ", "AWQ", "HQQ", "WQLinear", "QuantLinear")
_CLASSIFICATION_HEADS = ("score", "classifier")


def adapted_layers(model: nn.Module) -> Iterator[tuple[str, AdaptedLinear]]:
    """The model's adapted layers by name."""
    for name, module in model.named_modules():
        if isinstance(module, AdaptedLinear):
            yield name, module


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


def wanted_layer(name: str, config: LoraConfig) -> bool:
    """Whether layers_to_transform, if given, holds the index of the layer a module is in."""
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


def is_head(model: nn.Module, name: str, module: nn.Module) -> bool:
    """Whether a linear makes the model's output: transformers' own answer, or a classification head by its name."""
    get = getattr(model, "get_output_embeddings", None)
    if not callable(get):
        return False
    return get() is module or (get() is None and name.partition(".")[0] in _CLASSIFICATION_HEADS)


def other_quantizer(module: nn.Module) -> str:
    """Why another library's quantized layer cannot be a base, or ""."""
    kind = type(module).__name__
    return f"{kind} bases are not supported" if any(mark in kind for mark in _OTHER_QUANTIZED) else ""


def is_saved(name: str, config: LoraConfig) -> bool:
    """Whether a module is one of modules_to_save or inside one; PEFT's rule."""
    return any(re.match(rf"(^|.*\.){saved}($|\..*)", name) for saved in config.modules_to_save or ())


def shared_weights(model: nn.Module) -> set[int]:
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
    if reason := other_quantizer(module):
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
    tied, everything = shared_weights(model), config.target_modules == "all-linear"
    chosen: dict[str, nn.Module] = {}
    for name, module in modules.items():
        if config.exclude_modules and matches(config.exclude_modules, name):
            continue
        if is_saved(name, config) or not wanted_layer(name, config):
            continue
        if everything:
            if name not in linears or is_head(model, name, module):
                continue
            if other_quantizer(module):
                raise ConfigError(f"cannot adapt {name}: {other_quantizer(module)}; exclude_modules can leave it out")
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
    seed = None if config.init_seed is None else (config.init_seed + zlib.crc32(name.encode())) % SEED_END
    return config.replace(r=r, lora_alpha=alpha, init_seed=seed)


def model_seed(name: str, seed: int) -> int:
    """The config's seed from that of one module: the inverse of what `config_for` does to it."""
    return (seed - zlib.crc32(name.encode())) % SEED_END
