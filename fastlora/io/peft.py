"""PEFT's LoRA and AdaLoRA checkpoints as pure functions: adapter_config.json and the keys of adapter_model.safetensors.

Keys, after "base_model.model." + the module's name:
  .lora_A.weight [r, in]   .lora_B.weight [out, r]   .lora_magnitude_vector [out] (DoRA; also read with ".weight")
  .lora_A [r', in]   .lora_E [r', 1]   .lora_B [out, r']   (AdaLoRA, no ".weight"; r' <= init_r once ranks were pruned:
      the config's rank_pattern then maps ".lora_E" of each module to the init_r booleans that say which are left)
  .base_layer.bias [out]   (bias="all" or "lora_only")      plain names for biases elsewhere and for modules_to_save
Source: https://github.com/huggingface/peft, `save_and_load.py` and `tuners/lora/config.py`, as of 0.21.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastlora.config import METHODS, PEFT_BOOKKEEPING, AdaLoraConfig, LoraConfig
from fastlora.errors import ConfigError, StateDictError
from fastlora.math import init

PREFIX = "base_model.model."
CONFIG_NAME, WEIGHTS_NAME = "adapter_config.json", "adapter_model.safetensors"
METADATA_KEY = "fastlora"

# Inits PEFT knows by the same name; the others leave the base as it is, so `true` is as good on load.
_SHARED_INITS = ("gaussian", "orthogonal", "pissa", "olora", "loftq")
# What PEFT cannot hold; it travels in the safetensors metadata, which PEFT ignores.
_OWN_FIELDS = ("init_lora_weights", "init_bound", "init_seed", "dora_dropout")
# How the keys of an adapter's tensors end; the plain ones are AdaLoRA's.
_ENDINGS = {
    "a": (".lora_A.weight",),
    "b": (".lora_B.weight",),
    "magnitude": (".lora_magnitude_vector", ".lora_magnitude_vector.weight"),
    "plain_a": (".lora_A",),
    "plain_b": (".lora_B",),
    "e": (".lora_E",),
}
# PEFT's AdaLoRA on top of the rest.
ADALORA_FIELDS = tuple(field.name for field in dataclasses.fields(AdaLoraConfig) if field.kw_only)
# PEFT fields without a meaning for our layers at any value.
_HARMLESS = frozenset({"megatron_core", "peft_version", "qalora_group_size", *PEFT_BOOKKEEPING})
# PEFT fields that must be at these values: another value asks for something our layers do not do.
_MUST_BE: dict[str, tuple[Any, ...]] = {
    "fan_in_fan_out": (False, None),
    "lora_bias": (False, None),
    "use_qalora": (False, None),
    "ensure_weight_tying": (False, None),
    "alora_invocation_tokens": (None,),
    "arrow_config": (None,),
    "corda_config": (None,),
    "eva_config": (None,),
    "kasa_config": (None,),
    "layer_replication": (None,),
    "lora_ga_config": (None,),
    "megatron_config": (None,),
    "monteclora_config": (None,),
    "target_parameters": (None, []),
    "trainable_token_indices": (None,),
    "use_bdlora": (None, False),
    "velora_config": (None,),
}


class AdapterTensors(NamedTuple):
    """One module's adapter as a checkpoint holds it."""

    a: Tensor  # [r, in]
    b: Tensor  # [out, r]
    magnitude: Tensor | None = None  # [out]
    e: Tensor | None = None  # [r, 1]: this is AdaLoRA
    kept: list[bool] | None = None  # of init_r: which triplets a, b and e are; None: all, never pruned


class Checkpoint(NamedTuple):
    """A whole adapter: per adapted module its tensors, and everything else that was trained, by parameter name."""

    adapters: dict[str, AdapterTensors]
    others: dict[str, Tensor]


def _init_for_peft(config: LoraConfig) -> bool | str:
    """What PEFT shall do before it loads the tensors: repeat an init that rewrites the base, or anything else.

    A base it cannot repeat, random or bounded, gets a name PEFT refuses: better than another function in silence.
    """
    strategy = config.init_lora_weights
    if init.changes_base(strategy) and (str(strategy).startswith("pissa_niter_") or config.init_bound is not None):
        return f"fastlora_{strategy}"
    return strategy if isinstance(strategy, bool) or strategy in _SHARED_INITS else True


def config_to_json(
    config: LoraConfig,
    target_modules: list[str] | str,
    base_model: str | None,
    task: str | None,
    kept: Mapping[str, list[bool]] | None = None,
) -> str:
    """adapter_config.json: only fields every PEFT of the last years knows, sorted as PEFT sorts them.

    Args:
        kept: of a pruned AdaLoRA adapter: module -> which of its init_r triplets are left.
    """
    fields: dict[str, Any] = {
        "alpha_pattern": dict(config.alpha_pattern),
        "auto_mapping": None,
        "base_model_name_or_path": base_model,
        "bias": config.bias,
        "exclude_modules": None,
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": _init_for_peft(config),
        "layers_pattern": None,
        "layers_to_transform": None,
        "lora_alpha": config.lora_alpha,
        "lora_dropout": config.lora_dropout,
        "modules_to_save": config.modules_to_save,
        "peft_type": "LORA",
        "r": config.r,
        "rank_pattern": dict(config.rank_pattern),
        "revision": None,
        "target_modules": target_modules if isinstance(target_modules, str) else sorted(target_modules),
        "task_type": task,
        "use_dora": config.use_dora,
        "use_rslora": config.use_rslora,
    }
    if isinstance(config, AdaLoraConfig):
        # PEFT's default r: its AdaLoRA ignores r and warns about any other.
        fields |= {"peft_type": "ADALORA", "r": 8, **{name: getattr(config, name) for name in ADALORA_FIELDS}}
        if kept is not None and config.lora_alpha <= 0:
            fields["lora_alpha"] = config.init_r  # the same function; PEFT would put the pruned rank in its place
        fields["rank_pattern"] = None if kept is None else {f"{name}.lora_E": mask for name, mask in kept.items()}
    return json.dumps(fields, indent=2, sort_keys=True) + "\n"


def metadata_of(config: LoraConfig) -> dict[str, str]:
    """The safetensors metadata: PEFT's format mark, and what its config cannot say."""
    own = {name: getattr(config, name) for name in _OWN_FIELDS}
    return {"format": "pt", METADATA_KEY: json.dumps(own, sort_keys=True)}


def _fields(text: str) -> dict[str, Any]:
    try:
        fields = json.loads(text)
    except json.JSONDecodeError as error:
        raise StateDictError(f"{CONFIG_NAME} is not JSON: {error}") from None
    method = fields.get("peft_type") if isinstance(fields, dict) else type(fields).__name__
    if not isinstance(fields, dict) or not isinstance(method, str) or method not in METHODS:
        wanted = " or ".join(f'"{name}"' for name in METHODS)
        hint = "; fastlora.moe.load_adapter reads it" if method in ("MIXLORA", "LORAMOE", "MOLA") else ""
        raise StateDictError(f"expected an adapter with peft_type {wanted} in {CONFIG_NAME}, got {method!r}{hint}")
    return _in_pefts_words(fields)


def _in_pefts_words(fields: dict[str, Any]) -> dict[str, Any]:
    """MoE-PEFT's configs of plain LoRA may name modules by booleans, and the init `lora_init`."""
    if isinstance(targets := fields.get("target_modules"), dict):
        fields["target_modules"] = [name for name, wanted in targets.items() if wanted]
    if (strategy := fields.pop("lora_init", None)) is not None:
        fields.setdefault("init_lora_weights", strategy)
    return fields


def config_from_json(text: str, metadata: Mapping[str, str] | None = None) -> LoraConfig:
    """A LoraConfig from adapter_config.json (lora_alpha defaults to PEFT's 8) and the safetensors metadata.

    For AdaLoRA an AdaLoraConfig; its rank_pattern is read by `masks_from_json`.

    Raises:
        StateDictError: not JSON, or not a LoRA adapter's. ConfigError: a field we cannot honour; named.
    """
    fields = _fields(text)
    kind = METHODS[fields["peft_type"]]
    for name, allowed in _MUST_BE.items():
        if name in fields and fields[name] not in allowed:
            raise ConfigError(f"{CONFIG_NAME}: {name}={fields[name]!r} is not supported")
    known = {field.name for field in dataclasses.fields(kind)} - {"adapter_dtype"}
    for name in sorted(set(fields) - known - set(_MUST_BE) - _HARMLESS):
        if fields[name]:
            raise ConfigError(f"{CONFIG_NAME}: {name}={fields[name]!r} is not known, so it cannot be honoured")
    values = {name: value for name, value in fields.items() if name in known and value is not None}
    values.setdefault("lora_alpha", 8)
    own = _own_fields(metadata or {})
    values |= {name: own[name] for name in _OWN_FIELDS if own.get(name) is not None}
    if kind is AdaLoraConfig:
        for name in ("r", "rank_pattern"):  # PEFT ignores the one; the other is not a rank for each module
            values.pop(name, None)
        values["init_lora_weights"] = bool(values.get("init_lora_weights", True))  # all that PEFT asks of it
    return kind.of(values)


def masks_from_json(text: str) -> dict[str, list[bool]] | None:
    """AdaLoRA's rank_pattern, by module; None where there is none.

    Raises:
        StateDictError: not a mapping of "<module>.lora_E" to booleans.
    """
    fields = _fields(text)
    pattern = fields.get("rank_pattern")
    if fields["peft_type"] != "ADALORA" or not pattern:
        return None
    if not isinstance(pattern, dict):
        raise StateDictError(f"{CONFIG_NAME}: expected rank_pattern to map modules to booleans, got {pattern!r:.60}")
    for name, mask in pattern.items():
        if not name.endswith(".lora_E") or not isinstance(mask, list) or {type(kept) for kept in mask} - {bool}:
            raise StateDictError(
                f'{CONFIG_NAME}: expected rank_pattern to map "<module>.lora_E" to booleans, got {name!r}: {mask!r:.60}'
            )
    return {name.removesuffix(".lora_E"): mask for name, mask in pattern.items()}


def with_masks(checkpoint: Checkpoint, config: LoraConfig, masks: Mapping[str, list[bool]] | None) -> Checkpoint:
    """The checkpoint with the masks of its pruned AdaLoRA modules.

    Raises:
        StateDictError: masks that do not fit init_r, the tensors, or the modules.
    """
    if masks is None or not isinstance(config, AdaLoraConfig):
        return checkpoint
    if odd := sorted(set(masks) ^ set(checkpoint.adapters)):
        where = "a module without tensors" if odd[0] in masks else "an entry missing"
        raise StateDictError(f"{CONFIG_NAME}: rank_pattern does not fit the checkpoint: {where}, {odd[0]}")
    for name, mask in masks.items():
        rank = checkpoint.adapters[name].a.shape[0]
        if len(mask) != config.init_r or sum(mask) != rank:
            raise StateDictError(
                f"{CONFIG_NAME}: rank_pattern of {name} keeps {sum(mask)} of {len(mask)} ranks; expected {rank} of "
                f"init_r={config.init_r}"
            )
    kept = {name: tensors._replace(kept=masks[name]) for name, tensors in checkpoint.adapters.items()}
    return checkpoint._replace(adapters=kept)


def _own_fields(metadata: Mapping[str, str]) -> dict[str, Any]:
    try:
        own = json.loads(metadata.get(METADATA_KEY, "{}"))
    except json.JSONDecodeError as error:
        raise StateDictError(f"the {METADATA_KEY!r} metadata of {WEIGHTS_NAME} is not JSON: {error}") from None
    if not isinstance(own, dict):
        raise StateDictError(f"the {METADATA_KEY!r} metadata of {WEIGHTS_NAME} is not a JSON object: {own!r}")
    return own


def to_state(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """PEFT's keys for a checkpoint."""
    state = {}
    for module, tensors in checkpoint.adapters.items():
        ending = ".weight" if tensors.e is None else ""
        state[f"{PREFIX}{module}.lora_A{ending}"] = tensors.a
        state[f"{PREFIX}{module}.lora_B{ending}"] = tensors.b
        if tensors.e is not None:
            state[f"{PREFIX}{module}.lora_E"] = tensors.e
        if tensors.magnitude is not None:
            state[f"{PREFIX}{module}.lora_magnitude_vector"] = tensors.magnitude
    for name, tensor in checkpoint.others.items():
        module, _, last = name.rpartition(".")
        owner = f"{module}.base_layer" if last == "bias" and module in checkpoint.adapters else module
        state[f"{PREFIX}{owner}.{last}" if owner else f"{PREFIX}{last}"] = tensor
    return state


def from_state(state: Mapping[str, Tensor]) -> Checkpoint:
    """The inverse of `to_state`.

    Raises:
        StateDictError: a key that is not PEFT's, half an adapter, or adapter tensors that are not floating-point.
    """
    parts: dict[str, dict[str, Tensor]] = {}
    others: dict[str, Tensor] = {}
    for key, tensor in state.items():
        if not key.startswith(PREFIX):
            raise StateDictError(f"expected keys that start with {PREFIX!r}, got {key!r}: not a PEFT LoRA checkpoint")
        name = key[len(PREFIX) :]
        for kind, endings in _ENDINGS.items():
            ending = next((e for e in endings if name.endswith(e)), None)
            if ending:
                if not tensor.is_floating_point():
                    raise StateDictError(f"{name}: expected a floating-point tensor, got {tensor.dtype}")
                parts.setdefault(name.removesuffix(ending), {})[kind] = tensor
                break
        else:
            if ".lora_" in name:
                raise StateDictError(f"cannot read {key!r}: only linear layers' LoRA, DoRA and AdaLoRA are supported")
            others[name.replace(".base_layer.", ".")] = tensor
    adapters = {module: _joined(module, tensors) for module, tensors in parts.items()}
    if not adapters:
        raise StateDictError("the checkpoint holds no lora_A and lora_B tensors")
    return Checkpoint(adapters, others)


def _joined(module: str, found: dict[str, Tensor]) -> AdapterTensors:
    """One module's tensors, checked against one another."""
    adalora = bool({"plain_a", "plain_b", "e"} & set(found))
    a, b = ("plain_a", "plain_b") if adalora else ("a", "b")
    for kind, name in ((a, "lora_A"), (b, "lora_B"), *((("e", "lora_E"),) if adalora else ())):
        if kind not in found:
            raise StateDictError(f"the adapter of {module} is incomplete: {name} is missing")
    if adalora and len(found) > 3:
        raise StateDictError(f"{module}: holds the keys of both LoRA and AdaLoRA")
    rows = found[a].shape[0] if found[a].dim() == 2 else -1
    if found[b].dim() != 2 or found[b].shape[1] != rows:
        shapes = tuple(found[a].shape), tuple(found[b].shape)
        raise StateDictError(f"{module}: expected lora_A [r, in] and lora_B [out, r], got {shapes[0]} and {shapes[1]}")
    if adalora and tuple(found["e"].shape) != (rows, 1):
        raise StateDictError(f"{module}: expected lora_E [{rows}, 1], got {tuple(found['e'].shape)}")
    return AdapterTensors(found[a], found[b], found.get("magnitude"), found.get("e"))


def minimal_targets(adapted: list[str], every_module: list[str]) -> list[str] | str:
    """The shortest name endings that pick exactly `adapted` out of `every_module` by PEFT's rule.

    PEFT matches an entry of a list against a whole name or its ending after a dot; modules that cannot be told apart
    by their last part are written in full. Where a whole name is itself the ending of another module's only a regular
    expression (a string) can pick it.
    """
    rest = set(every_module) - set(adapted)
    taken = {".".join(parts[i:]) for parts in (name.split(".") for name in rest) for i in range(len(parts))}
    if any(name in taken for name in adapted):
        return "|".join(re.escape(name) for name in sorted(adapted))
    lasts = {name: name.rpartition(".")[2] for name in adapted}
    return sorted({name if last in taken else last for name, last in lasts.items()})


def dtype_of(checkpoint: Checkpoint) -> torch.dtype:
    """The dtype of the adapters (the first module's)."""
    return next(iter(checkpoint.adapters.values())).a.dtype
