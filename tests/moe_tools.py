"""What moe-peft 2.0.2 computed (tests/data/moe, made by benchmarks.moe_goldens), and models to compare with it."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

DATA = Path(__file__).resolve().parent / "data" / "moe"
PREFIX = {"LORA": "base_model.model.model", "MIXLORA": "mixlora", "LORAMOE": "loramoe", "MOLA": "mola"}
MIXTURES = (
    "mixlora",
    "mixlora_dora",
    "mixlora_dynamic",
    "mixlora_dynamic_own",
    "mixlora_switch",
    "loramoe",
    "mola",
)
BATCH = ("input_ids", "attention_mask", "labels")


class Golden(NamedTuple):
    """One case: tensors by name, the config it was made from, and the one that moe-peft saves."""

    tensors: dict[str, Tensor]
    config: dict[str, Any]
    exported: dict[str, Any]

    @property
    def prefix(self) -> str:
        return PREFIX[self.exported["peft_type"]]

    def part(self, name: str) -> dict[str, Tensor]:
        """The tensors under "name.", without it."""
        return {key[len(name) + 1 :]: t for key, t in self.tensors.items() if key.startswith(f"{name}.")}


def _load(name: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    with safe_open(DATA / f"{name}.safetensors", framework="pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118 (not a dict)


def golden(name: str) -> Golden:
    tensors, about = _load(name)
    return Golden(tensors, json.loads(about["config"]), json.loads(about["exported"]))


def batch() -> dict[str, Tensor]:
    """Two sequences of ten tokens, the second padded by three."""
    tensors, _ = _load("base")
    return {name: tensors[name] for name in BATCH}


def base(bias: bool = True) -> LlamaForCausalLM:
    """The frozen model of the goldens; DoRA's have no bias."""
    tensors, about = _load("base")
    state = {n: t for n, t in tensors.items() if n not in BATCH and (bias or not n.endswith("bias"))}
    sizes = json.loads(about["sizes"])
    config = LlamaConfig(attention_bias=bias, mlp_bias=bias, attn_implementation="eager", **sizes)
    model = LlamaForCausalLM(config)
    model.load_state_dict(state)
    return model.requires_grad_(False).eval()


def bias_of(case: Golden) -> bool:
    return not case.config.get("use_dora")


def write(case: Golden, folder: Path, pickled: bool = False, **changes: Any) -> Path:
    """The adapter as a folder; pickled: with the files and the config that moe-peft itself leaves."""
    folder.mkdir(parents=True, exist_ok=True)
    state = case.part("adapter")
    if pickled:
        torch.save({k: t for k, t in state.items() if "magnitude" not in k}, folder / "adapter_model.bin")
    else:
        save_file(state, folder / "adapter_model.safetensors")
    fields = (case.exported if pickled else case.config) | changes
    (folder / "adapter_config.json").write_text(json.dumps(fields))
    return folder


def in_peer_words(model: nn.Module, prefix: str, value: Callable[[nn.Parameter], Tensor]) -> dict[str, Tensor]:
    """Something of every trained parameter under moe-peft's keys; stacked experts one by one."""
    found: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        name = name.removeprefix("model.")
        tensor = value(parameter)
        if name.endswith(".gate.weight"):
            found[f"{prefix}.{name.removesuffix('.gate.weight')}.moe_gate.weight"] = tensor
            continue
        parts = re.fullmatch(r"(.+)\.(lora_A|lora_B|lora_magnitude)(\.default)?", name)
        assert parts is not None, f"{name} has no name in moe-peft"
        ending = "lora_magnitude_vector" if parts[2] == "lora_magnitude" else f"{parts[2]}.weight"
        if parts[3]:
            found[f"{prefix}.{parts[1]}.{ending}"] = tensor
        else:
            found |= {f"{prefix}.{parts[1]}.experts.{e}.{ending}": one for e, one in enumerate(tensor)}
    return found


def grad_of(parameter: nn.Parameter) -> Tensor:
    assert parameter.grad is not None, "a parameter has no gradient: DistributedDataParallel would wait for it"
    return parameter.grad


def close(got: Tensor, want: Tensor, rtol: float, atol: float, what: str = "") -> None:
    torch.testing.assert_close(got.detach(), want, rtol=rtol, atol=atol, msg=lambda text: f"{what}: {text}")


def all_close(got: dict[str, Tensor], want: dict[str, Tensor], rtol: float, atol: float) -> None:
    """The same names with the same values, and none of them zero everywhere."""
    assert got.keys() == want.keys(), sorted(got.keys() ^ want.keys())[:4]
    for name, tensor in want.items():
        close(got[name], tensor, rtol, atol, name)
    assert any(bool(tensor.any()) for tensor in want.values())


OUTPUT = {"rtol": 2e-5, "atol": 2e-6}
GRADIENT = {"rtol": 1e-4, "atol": 2e-5}
AUXILIARY = {"rtol": 1e-5, "atol": 1e-6}
