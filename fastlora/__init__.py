"""fastlora: fused LoRA, QLoRA and DoRA linear layers for PyTorch.

Importing it needs neither a GPU nor triton, bitsandbytes, peft or transformers; each is imported when used.
"""

from fastlora import functional
from fastlora.config import LoraConfig
from fastlora.errors import (
    ConfigError,
    DtypeError,
    FastloraError,
    ShapeError,
    StateDictError,
    UnsupportedError,
)
from fastlora.nn.checkpoint import load_adapter, save_adapter
from fastlora.nn.convert import convert
from fastlora.nn.linear import LoraLinear, QLoraLinear
from fastlora.nn.loading import bnb_state_dict
from fastlora.nn.model import (
    add_adapters,
    merge,
    merge_and_unload,
    param_groups,
    print_trainable_parameters,
    set_adapter,
    trainable_parameters,
    unmerge,
)
from fastlora.nn.quantized import QuantizedWeight

__version__ = "0.1.0"

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
    "add_adapters",
    "bnb_state_dict",
    "convert",
    "functional",
    "load_adapter",
    "merge",
    "merge_and_unload",
    "param_groups",
    "print_trainable_parameters",
    "save_adapter",
    "set_adapter",
    "trainable_parameters",
    "unmerge",
]
