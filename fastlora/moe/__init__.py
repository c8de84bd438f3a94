"""Mixtures of LoRA experts as plain modules: MixLoRA, LoRAMoE, MoLA.

config = MixLoraConfig(num_experts=8, top_k=2, r=16, lora_alpha=32)
fastlora.moe.convert(model, config)
for batch in batches:
    loss = model(**batch).loss + fastlora.moe.router_loss(model, batch["attention_mask"])
    loss.backward()
"""

import importlib
from typing import Any

from fastlora.moe.config import LoraMoeConfig, MixLoraConfig, MolaConfig, config_from_dict
from fastlora.moe.convert import convert
from fastlora.moe.losses import moe_modules, router_logits, router_loss
from fastlora.moe.mixlora import MixLoraMLP
from fastlora.moe.plugin import LoraMoeLinear, MolaLinear

__all__ = [
    "LoraMoeConfig",
    "LoraMoeLinear",
    "MixLoraConfig",
    "MixLoraMLP",
    "MolaConfig",
    "MolaLinear",
    "config_from_dict",
    "convert",
    "load_adapter",
    "moe_modules",
    "router_logits",
    "router_loss",
    "save_adapter",
]


def __getattr__(name: str) -> Any:
    """Saving and loading, imported when first asked for."""
    if name in ("load_adapter", "save_adapter"):
        return getattr(importlib.import_module("fastlora.moe.checkpoint"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
