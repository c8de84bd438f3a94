"""fastlora: fused LoRA, QLoRA and DoRA linear layers for PyTorch.

Importing it needs neither a GPU nor triton, bitsandbytes, peft or transformers; each is imported when used. Torch
itself is imported with the first public name that is used, so that the command line can answer at once.
"""

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastlora import adalora, functional, moe
    from fastlora.config import LoraConfig
    from fastlora.errors import (
        ConfigError,
        DtypeError,
        FastloraError,
        ShapeError,
        StateDictError,
        UnsupportedError,
    )
    from fastlora.nn.accelerate import accelerate, decelerate, register
    from fastlora.nn.checkpoint import load_adapter, save_adapter
    from fastlora.nn.convert import convert
    from fastlora.nn.groups import group, ungroup
    from fastlora.nn.linear import LoraLinear, QLoraLinear
    from fastlora.nn.loading import bnb_state_dict
    from fastlora.nn.model import (
        add_adapters,
        merge,
        merge_and_unload,
        param_groups,
        print_trainable_parameters,
        set_adapter,
        train_adapters,
        trainable_parameters,
        unmerge,
    )
    from fastlora.nn.quantized import QuantizedWeight
    from fastlora.nn.report import report
    from fastlora.nn.streaming import load_quantized

__version__ = "0.1.0"

# Where each public name lives; the imports above say the same to type checkers.
_HOMES = {
    "ConfigError": "errors",
    "DtypeError": "errors",
    "FastloraError": "errors",
    "LoraConfig": "config",
    "LoraLinear": "nn.linear",
    "QLoraLinear": "nn.linear",
    "QuantizedWeight": "nn.quantized",
    "ShapeError": "errors",
    "StateDictError": "errors",
    "UnsupportedError": "errors",
    "accelerate": "nn.accelerate",
    "add_adapters": "nn.model",
    "bnb_state_dict": "nn.loading",
    "convert": "nn.convert",
    "decelerate": "nn.accelerate",
    "group": "nn.groups",
    "load_adapter": "nn.checkpoint",
    "load_quantized": "nn.streaming",
    "merge": "nn.model",
    "merge_and_unload": "nn.model",
    "param_groups": "nn.model",
    "print_trainable_parameters": "nn.model",
    "register": "nn.accelerate",
    "report": "nn.report",
    "save_adapter": "nn.checkpoint",
    "set_adapter": "nn.model",
    "train_adapters": "nn.model",
    "trainable_parameters": "nn.model",
    "ungroup": "nn.groups",
    "unmerge": "nn.model",
}

__all__ = [
    "ConfigError",
    "DtypeError",
    "FastloraError",
    "LoraConfig",
    "LoraLinear",
    "QLoraLinear",
    "QuantizedWeight",
    "ShapeError",
    "StateDictError",
    "UnsupportedError",
    "accelerate",
    "adalora",
    "add_adapters",
    "bnb_state_dict",
    "convert",
    "decelerate",
    "functional",
    "group",
    "load_adapter",
    "load_quantized",
    "merge",
    "merge_and_unload",
    "moe",
    "param_groups",
    "print_trainable_parameters",
    "register",
    "report",
    "save_adapter",
    "set_adapter",
    "train_adapters",
    "trainable_parameters",
    "ungroup",
    "unmerge",
]


def __getattr__(name: str) -> Any:
    """A public name, or a module of the package, imported when first asked for."""
    if name in _HOMES:
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    if not name.startswith("_") and importlib.util.find_spec(f"{__name__}.{name}") is not None:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
