"""An adapter's folder whose tensors stay in the file until one asks for them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from fastlora.config import AdaLoraConfig, LoraConfig
from fastlora.errors import ConfigError, StateDictError
from fastlora.io import moe_peft, peft
from fastlora.math import init
from fastlora.nn import folders
from fastlora.nn.shards import dtype_of
from fastlora.nn.streaming import opened
from fastlora.nn.targets import config_for


def check_place(folder: Path) -> None:
    """Raise FileNotFoundError, naming near places, unless the folder holds an adapter's config."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is no folder")
    if not (folder / peft.CONFIG_NAME).is_file():
        inside = sorted(path.parent for path in folder.glob(f"*/{peft.CONFIG_NAME}"))
        hint = f"; there is one in {', '.join(map(str, inside))}" if inside else ""
        raise FileNotFoundError(f"no {peft.CONFIG_NAME} in {folder}{hint}")


class AdapterFile:
    """A LoRA, DoRA or AdaLoRA adapter in PEFT's layout (adapter_model.bin is read whole, as tensors only).

    Args:
        folder: with adapter_config.json and adapter_model.safetensors, or adapter_model.bin.

    Attributes:
        config: of the adapter as a whole. configs: of each module, with its own rank and alpha.
        checkpoint: what there is; its tensors are on the meta device.
        bare: DoRA without magnitudes, as MoE-PEFT saves it: they are the row norms of W + s B A.

    Raises:
        FileNotFoundError: files missing. StateDictError, ConfigError: damaged, or another kind of adapter.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        check_place(self.folder)
        self._held: Mapping[str, Tensor] = {}
        text, metadata, outline = self._outline()
        if moe_peft.is_moe_state(outline):
            raise StateDictError(f"{self.folder} holds a mixture of experts, which no single weight can hold")
        self.config = peft.config_from_json(text, metadata)
        self.checkpoint = peft.with_masks(peft.from_state(outline), self.config, peft.masks_from_json(text))
        self._keys = {id(tensor): key for key, tensor in outline.items()}
        self._outlines = list(outline.values())  # alive, so that an id stays one tensor's
        self.configs = {name: self._config_of(name) for name in self.checkpoint.adapters}
        adapters = self.checkpoint.adapters.values()
        self.bare = bool(self._held) and self.config.use_dora and all(t.magnitude is None for t in adapters)
        for name, tensors in self.checkpoint.adapters.items():
            _check(name, tensors, self.configs[name], self.bare)

    def _outline(self) -> tuple[str, Mapping[str, str], dict[str, Tensor]]:
        """The config's text, the metadata, and every tensor without its data."""
        weights = self.folder / peft.WEIGHTS_NAME
        if not weights.is_file():
            whole = folders.read(self.folder)
            self._held = whole.state
            return whole.config, whole.metadata, {k: t.detach().to("meta") for k, t in whole.state.items()}
        outline = {}
        with opened(weights) as file:
            metadata = file.metadata() or {}
            for key in file.keys():  # noqa: SIM118 - no mapping
                found = file.get_slice(key)
                dtype = dtype_of(found.get_dtype(), key)
                outline[key] = torch.empty(found.get_shape(), dtype=dtype, device="meta")
        try:
            return (self.folder / peft.CONFIG_NAME).read_text(encoding="utf-8"), metadata, outline
        except UnicodeDecodeError as error:
            raise StateDictError(f"{self.folder / peft.CONFIG_NAME} is not text: {error}") from None

    def _config_of(self, name: str) -> LoraConfig:
        tensors = self.checkpoint.adapters[name]
        config = config_for(name, self.config).replace(adapter_dtype=tensors.a.dtype)
        return config if tensors.kept is None else config.replace(r=sum(tensors.kept))

    def read(self, outline: Tensor) -> Tensor:
        """The data of one of the checkpoint's tensors."""
        key = self._keys[id(outline)]
        if self._held:
            return self._held[key]
        with opened(self.folder / peft.WEIGHTS_NAME) as file:
            tensor: Tensor = file.get_tensor(key)
        return tensor

    def tensors(self, name: str) -> peft.AdapterTensors:
        """One module's tensors, with data."""
        found = self.checkpoint.adapters[name]
        magnitude = None if found.magnitude is None else self.read(found.magnitude)
        e = None if found.e is None else self.read(found.e)
        return peft.AdapterTensors(self.read(found.a), self.read(found.b), magnitude, e, found.kept)

    def refuse_rewritten_base(self) -> None:
        """Raise ConfigError where the adapter fits only a base that its init has rewritten."""
        strategy = self.config.init_lora_weights
        if init.changes_base(strategy):
            raise ConfigError(
                f"init {strategy!r} rewrote the base this adapter was trained on: load it with fastlora.load_adapter "
                "into the original model, which repeats the init, and merge there"
            )


def _check(name: str, tensors: peft.AdapterTensors, config: LoraConfig, bare: bool) -> None:
    if tensors.a.shape[0] != config.r:
        raise StateDictError(f"{name}: expected rank {config.r} from {peft.CONFIG_NAME}, got {tensors.a.shape[0]}")
    have = tensors.magnitude is not None
    if config.use_dora != have and not bare:
        raise StateDictError(
            f"{name}: use_dora={config.use_dora}, but the magnitude is {'present' if have else 'missing'}"
        )
    if isinstance(config, AdaLoraConfig) != (tensors.e is not None):
        raise StateDictError(
            f"{name}: {peft.CONFIG_NAME} is a {type(config).__name__}, but lora_E is "
            f"{'missing' if tensors.e is None else 'present'}"
        )
    if tensors.magnitude is not None and tensors.magnitude.numel() != tensors.b.shape[0]:
        raise StateDictError(f"{name}: expected a magnitude of {tensors.b.shape[0]}, got {tensors.magnitude.numel()}")
