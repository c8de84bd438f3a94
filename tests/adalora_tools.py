"""What the AdaLoRA tests share: one adapter in our model and in PEFT's, with the same tensors and gradients."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor, nn

import fastlora
from fastlora.adalora import AdaLoraConfig
from tests.model_tools import llama, silent

TARGETS = ["q_proj", "down_proj", "k_proj"]
SCHEDULE: dict[str, Any] = {"init_r": 6, "target_r": 3, "tinit": 5, "tfinal": 8, "deltaT": 3, "total_step": 50}


def fields(**changes: Any) -> dict[str, Any]:
    """Of both libraries' configs."""
    return {"lora_alpha": 7, "target_modules": TARGETS, **SCHEDULE, **changes}


def ours(model: nn.Module | None = None, quantize: str | None = None, **changes: Any) -> nn.Module:
    """A tiny Llama with AdaLoRA layers in `TARGETS`."""
    config = AdaLoraConfig(init_seed=0, **fields(**changes))
    return fastlora.convert(model or llama(), config, quantize=quantize, blocksize=32, progress=False)


def theirs(model: nn.Module | None = None, **changes: Any) -> Any:
    """The same, of PEFT."""
    config = peft.AdaLoraConfig(task_type="CAUSAL_LM", **fields(**changes))
    with silent():
        return peft.get_peft_model(model or llama(), config)


def tensors_of(model: Any, name: str = "default") -> dict[str, nn.Parameter]:
    """ "<layer>.lora_A" and so on -> parameter, of either library's model."""
    found = {}
    for key, parameter in model.named_parameters():
        if ".lora_" in key and key.endswith(f".{name}"):
            found[key.removeprefix("base_model.model.").removesuffix(f".{name}")] = parameter
    return found


@torch.no_grad()
def copy_adapter(source: Any, target: Any) -> None:
    into = tensors_of(target)
    for name, tensor in tensors_of(source).items():
        into[name].copy_(tensor)


@torch.no_grad()
def move_adapter(model: Any, seed: int = 3, zeroed: float = 0.0) -> Any:
    """Random tensors whose effect on the logits is as large as the base's; a share of E exactly zero."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in tensors_of(model).items():
        noise = torch.randn(tensor.shape, generator=generator)
        if name.endswith("lora_E"):
            tensor.copy_(noise * (torch.rand(tensor.shape, generator=generator) >= zeroed))
        else:
            tensor.copy_(noise * max(tensor.shape) ** -0.5)
    return model


def peft_opens(folder: Path, model: nn.Module | None = None) -> Any:
    """Plain PEFT opens the folder; of a rank_pattern, also one it wrote itself, it says that it matched no module."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The following rank_pattern keys did not match")
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        warnings.filterwarnings("error", category=UserWarning)
        return peft.PeftModel.from_pretrained(model or llama(), str(folder)).eval()


def random_gradients(parameters: dict[str, nn.Parameter], seed: int, spread: float = 1.0) -> dict[str, Tensor]:
    """Gradients of different sizes, which wander from layer to layer: ranks move, and some come back."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.logspace(-spread, spread, len(parameters))
    return {
        name: torch.randn(parameter.shape, generator=generator) * sizes[(index + seed // 6) % len(sizes)]
        for index, (name, parameter) in enumerate(sorted(parameters.items()))
    }
