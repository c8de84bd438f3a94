"""An adapter's folder in another library's layout: read, checked, written whole or not at all."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastlora.config import AdaLoraConfig, LoraConfig
from fastlora.errors import ConfigError, StateDictError
from fastlora.io import moe_peft, peft, plain
from fastlora.io.moe_peft import MoeCheckpoint
from fastlora.io.peft import Checkpoint
from fastlora.math import init
from fastlora.nn import folders
from fastlora.nn.adapter_file import check_place
from fastlora.nn.output import check_output, copy_others, whole_folder
from fastlora.nn.streaming import opened

LAYOUTS = ("peft", "moe-peft", "plain")
NO_DROPOUT = 1e-12
_MODULE = re.compile(r"model\.layers\.(?P<layer>\d+)\.(?P<rest>(?:self_attn|mlp)\.\w+)")


@dataclasses.dataclass
class Converted:
    """What `convert_adapter` did.

    Attributes:
        method: "LoRA", "DoRA", "AdaLoRA", "MixLoRA", "LoRAMoE" or "MoLA".
        source, layout: what the folder was and became, each of `LAYOUTS`.
        modules, tensors, nbytes: how much of it there is.
        file: the name of the new file of weights.
        notes: what the reader of the new layout will not honour.
        copied: the other files.
    """

    method: str
    source: str
    layout: str
    modules: int
    tensors: int
    nbytes: int
    file: str
    notes: list[str]
    copied: list[str]


class _Found(NamedTuple):
    source: str
    checkpoint: Checkpoint | MoeCheckpoint
    fields: dict[str, Any]  # of adapter_config.json
    metadata: dict[str, str]
    config: LoraConfig | None  # None: a mixture


def convert_adapter(
    folder: str | os.PathLike[str], output: str | os.PathLike[str], layout: str, *, overwrite: bool = False
) -> Converted:
    """Write an adapter's folder in another layout; which one it has is found out. No tensor changes by a bit.

    "peft": adapter_model.safetensors under PEFT's keys. "moe-peft": adapter_model.bin, a pickle of tensors, as
    MoE-PEFT reads it. "plain": adapter.safetensors under the names of the adapted model's own state_dict.

    Args:
        folder: of LoRA, DoRA or AdaLoRA, or of a mixture (MixLoRA, LoRAMoE, MoLA).
        output: the folder to make.
        layout: one of `LAYOUTS`.
        overwrite: replace an adapter's folder that is there.

    Raises:
        ConfigError: an unknown layout, or an adapter the layout cannot hold; named. StateDictError: damaged, or no
        adapter's. OSError: files and folders.
    """
    source, target = Path(folder), Path(output)
    if layout not in LAYOUTS:
        raise ConfigError(f"unknown layout {layout!r}; known: {', '.join(LAYOUTS)}")
    check_output(target, [source], mark=peft.CONFIG_NAME, overwrite=overwrite)
    found = _read(source)
    state, fields, notes = _written(found, layout)
    state = {key: tensor.detach().contiguous() for key, tensor in state.items()}
    names = {"peft": peft.WEIGHTS_NAME, "moe-peft": moe_peft.PICKLE_NAME, "plain": plain.WEIGHTS_NAME}
    with whole_folder(target) as scratch:
        copied = [name for name in copy_others(source, scratch) if name != peft.CONFIG_NAME]
        text, settings = json.dumps(fields, indent=2, sort_keys=True, ensure_ascii=False), scratch / peft.CONFIG_NAME
        settings.write_text(text + "\n", encoding="utf-8")
        _save(state, scratch / names[layout], found.metadata)
        (scratch / names[layout]).chmod(settings.stat().st_mode)  # safetensors writes for the owner alone
    return Converted(
        method=_method(found),
        source=found.source,
        layout=layout,
        modules=len(_modules(found.checkpoint)),
        tensors=len(state),
        nbytes=sum(tensor.nbytes for tensor in state.values()),
        file=names[layout],
        notes=notes,
        copied=copied,
    )


def _modules(checkpoint: Checkpoint | MoeCheckpoint) -> list[str]:
    if isinstance(checkpoint, Checkpoint):
        return list(checkpoint.adapters)
    return [*checkpoint.experts, *checkpoint.linears]


def _method(found: _Found) -> str:
    if isinstance(found.checkpoint, MoeCheckpoint):
        return {"MIXLORA": "MixLoRA", "LORAMOE": "LoRAMoE", "MOLA": "MoLA"}[found.checkpoint.method]
    if isinstance(found.config, AdaLoraConfig):
        return "AdaLoRA"
    return "DoRA" if found.config is not None and found.config.use_dora else "LoRA"


# --- reading ----------------------------------------------------------------------------------------------------------


def _read(folder: Path) -> _Found:
    check_place(folder)
    if (folder / plain.WEIGHTS_NAME).is_file():
        return _read_plain(folder)
    files = folders.read(folder)
    if moe_peft.is_moe_state(files.state):
        fields = moe_peft.fields_from_json(files.config)
        checkpoint = moe_peft.from_state(files.state)
        if fields["peft_type"] != checkpoint.method:
            raise StateDictError(f"{peft.CONFIG_NAME} says {fields['peft_type']}, the keys {checkpoint.method}")
        return _Found("moe-peft", checkpoint, fields, files.metadata, None)
    config = peft.config_from_json(files.config, files.metadata)
    lora = peft.with_masks(peft.from_state(files.state), config, peft.masks_from_json(files.config))
    source = "moe-peft" if files.pickled else "peft"
    return _Found(source, lora, json.loads(files.config), dict(files.metadata), config)


def _read_plain(folder: Path) -> _Found:
    path = folder / peft.CONFIG_NAME
    with opened(folder / plain.WEIGHTS_NAME) as file:
        metadata = file.metadata() or {}
        state: dict[str, Tensor] = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - no mapping
    text = path.read_text(encoding="utf-8", errors="replace")
    try:
        kind = json.loads(text).get("peft_type")
    except (json.JSONDecodeError, AttributeError) as error:
        raise StateDictError(f"{path} is no JSON object: {error}") from None
    if kind in moe_peft.METHODS:
        fields = moe_peft.fields_from_json(text)
        mixture = moe_peft.from_state(moe_peft.to_state(plain.moe_from_state(state, kind)))
        return _Found("plain", mixture, fields, metadata, None)
    config = peft.config_from_json(text, metadata)
    lora = peft.with_masks(plain.from_state(state), config, peft.masks_from_json(text))
    return _Found("plain", lora, json.loads(text), metadata, config)


# --- writing ----------------------------------------------------------------------------------------------------------


def _written(found: _Found, layout: str) -> tuple[Mapping[str, Tensor], dict[str, Any], list[str]]:
    """The tensors under the layout's keys, the fields of its config, and what its reader will not honour."""
    fields = dict(found.fields)
    if isinstance(fields.get("target_modules"), Mapping):
        fields["target_modules"] = [name for name, wanted in fields["target_modules"].items() if wanted]
    if layout != "moe-peft":
        _replace_dropout(fields, NO_DROPOUT, 0.0)
    if isinstance(found.checkpoint, MoeCheckpoint):
        if layout == "peft":
            raise ConfigError(f"PEFT has no layout for {_method(found)}: known for it are moe-peft and plain")
        if layout == "plain":
            return plain.moe_to_state(found.checkpoint), fields, []
        if lists := sorted(name for name in ("num_experts", "top_k", "r") if isinstance(fields.get(name), list)):
            raise ConfigError(f"MoE-PEFT holds one {lists[0]}, and this mixture has one a layer")
        experts = found.checkpoint.experts.values()
        lost = _lost(any(each.magnitude is not None for each in experts)) + _above_zero(fields)
        return moe_peft.to_state(found.checkpoint), fields, lost
    config = found.config
    assert config is not None
    adapters = found.checkpoint.adapters.values()
    if layout == "plain":
        return plain.to_state(found.checkpoint), fields, []
    if layout == "peft":
        if config.use_dora and any(tensors.magnitude is None for tensors in adapters):
            raise ConfigError(
                "this adapter holds no DoRA magnitudes, which PEFT needs: fastlora.load_adapter makes them from the "
                "model's weights, and fastlora.save_adapter writes them"
            )
        return peft.to_state(found.checkpoint), fields, []
    fields = _moe_peft_fields(config, found.checkpoint, fields)
    lost = _lost(any(tensors.magnitude is not None for tensors in adapters)) + _above_zero(fields)
    return peft.to_state(found.checkpoint), fields, lost


def _lost(magnitudes: bool) -> list[str]:
    told = "MoE-PEFT does not read DoRA's magnitudes and takes the row norms of W + s B A: its outputs will differ"
    return [told] if magnitudes else []


def _above_zero(fields: dict[str, Any]) -> list[str]:
    """MoE-PEFT asserts that dropout is above 0, in evaluation too; what stands for 0 drops nothing."""
    changed = _replace_dropout(fields, 0.0, NO_DROPOUT)
    return [f"MoE-PEFT needs a dropout above 0: {NO_DROPOUT} stands for none"] if changed else []


def _replace_dropout(fields: dict[str, Any], old: float, new: float) -> bool:
    found = [each for each in (fields, fields.get("expert_lora")) if isinstance(each, dict)]
    found = [each for each in found if each.get("lora_dropout") == old]
    for each in found:
        each["lora_dropout"] = new
    return bool(found)


def _moe_peft_fields(config: LoraConfig, checkpoint: Checkpoint, fields: Mapping[str, Any]) -> dict[str, Any]:
    """adapter_config.json as MoE-PEFT exports it.

    Raises:
        ConfigError: something it has no word for.
    """
    reasons = {
        "AdaLoRA": isinstance(config, AdaLoraConfig),
        "rank_pattern": bool(config.rank_pattern),
        "alpha_pattern": bool(config.alpha_pattern),
        f"lora_alpha={config.lora_alpha}": config.lora_alpha != int(config.lora_alpha) or config.lora_alpha < 1,
        f"init {config.init_lora_weights!r}, which rewrites the base": init.changes_base(config.init_lora_weights),
        f"its own {next(iter(checkpoint.others), '')}": bool(checkpoint.others),
    }
    if why := [reason for reason, applies in reasons.items() if applies]:
        raise ConfigError(f"MoE-PEFT cannot hold {why[0]}")
    layers: dict[str, set[str]] = {}
    for name in checkpoint.adapters:
        found = _MODULE.fullmatch(name)
        if found is None:
            raise ConfigError(f"MoE-PEFT has no name for {name}: expected model.layers.N.self_attn or .mlp")
        layers.setdefault(found["layer"], set()).add(found["rest"])
    first = next(iter(layers.values()))
    if odd := [layer for layer, rest in layers.items() if rest != first]:
        raise ConfigError(f"MoE-PEFT adapts the same projections in every layer; layer {odd[0]} differs")
    made: dict[str, Any] = {"use_dora": True} if config.use_dora else {}
    made |= {"use_rslora": True} if config.use_rslora else {}
    kept = {name: fields[name] for name in ("base_model_name_or_path", "task_type") if name in fields}
    return made | {
        "bias": "none",
        "peft_type": "LORA",
        "r": config.r,
        "lora_alpha": int(config.lora_alpha),
        "lora_dropout": float(config.lora_dropout),
        "target_modules": sorted(name.rpartition(".")[2] for name in first),
        **kept,
    }


def _save(state: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str]) -> None:
    if path.name == moe_peft.PICKLE_NAME:
        torch.save({key: tensor.clone() for key, tensor in state.items()}, path)
        return
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file({key: tensor.clone() for key, tensor in state.items()}, path, metadata={"format": "pt", **metadata})
    except SafetensorError as error:
        raise OSError(f"cannot write {path}: {error}") from None
