"""LoraConfig: what an adapter is, in PEFT's words, checked once when it is made."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import torch

from fastlora.errors import ConfigError, DtypeError

DORA_DROPOUT = ("peft", "shared")
BIAS = ("none", "all", "lora_only")

# Fields of a peft.LoraConfig that say nothing about the mathematics.
_PEFT_BOOKKEEPING = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "inference_mode",
        "loftq_config",
        "peft_type",
        "peft_version",
        "revision",
        "runtime_config",
        "task_type",
    }
)


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """One adapter (LoRA, 2106.09685; rsLoRA, 2312.03732; DoRA, 2402.09353).

    Attributes:
        r: rank, at least 1.
        lora_alpha: the adapter is scaled by lora_alpha / r, or lora_alpha / sqrt(r) with `use_rslora`.
        lora_dropout: p in [0, 1), on the adapter's input.
        use_rslora: rank-stabilised scaling.
        use_dora: train a magnitude per output row as well.
        init_lora_weights: a name of `fastlora.math.init.KNOWN`, True (kaiming) or False (random A and B).
        init_bound: clamp |A| to this at initialisation.
        init_seed: seed of the initialisation; None draws one from torch's generator and records it.
        dora_dropout: "peft" or "shared", how DoRA's base term sees dropout (`fastlora.math.reference`).
        adapter_dtype: of A, B and the magnitude.
        target_modules: "all-linear", a regular expression, or a list of name endings.
        exclude_modules: a regular expression or a list of name endings to leave out.
        rank_pattern, alpha_pattern: name pattern -> r or lora_alpha for the modules it matches.
        layers_to_transform, layers_pattern: only these layer indices, of lists so named.
        modules_to_save: name endings of further modules trained in full.
        bias: "none", "all" (every bias of the model trains) or "lora_only" (those of adapted layers).

    Raises:
        ConfigError, DtypeError: a field out of range; the message names it.
    """

    r: int = 8
    lora_alpha: float = 16
    lora_dropout: float = 0.0
    use_rslora: bool = False
    use_dora: bool = False
    init_lora_weights: bool | str = "kaiming"
    init_bound: float | None = None
    init_seed: int | None = None
    dora_dropout: str = "peft"
    adapter_dtype: torch.dtype = torch.float32
    target_modules: str | list[str] = "all-linear"
    exclude_modules: str | list[str] | None = None
    rank_pattern: dict[str, int] = dataclasses.field(default_factory=dict)
    alpha_pattern: dict[str, float] = dataclasses.field(default_factory=dict)
    layers_to_transform: int | list[int] | None = None
    layers_pattern: str | list[str] | None = None
    modules_to_save: list[str] | None = None
    bias: str = "none"

    def __post_init__(self) -> None:
        if isinstance(self.r, bool) or not isinstance(self.r, int) or self.r < 1:
            raise ConfigError(f"r must be an integer of at least 1, got {self.r!r}")
        if not isinstance(self.lora_alpha, (int, float)) or not math.isfinite(self.lora_alpha):
            raise ConfigError(f"lora_alpha must be a finite number, got {self.lora_alpha!r}")
        if not isinstance(self.lora_dropout, (int, float)) or not 0.0 <= self.lora_dropout < 1.0:
            raise ConfigError(f"lora_dropout must be in [0, 1), got {self.lora_dropout!r}")
        if self.dora_dropout not in DORA_DROPOUT:
            raise ConfigError(f"dora_dropout must be one of {', '.join(DORA_DROPOUT)}, got {self.dora_dropout!r}")
        if self.bias not in BIAS:
            raise ConfigError(f"bias must be one of {', '.join(BIAS)}, got {self.bias!r}")
        if self.init_bound is not None and not self.init_bound > 0:
            raise ConfigError(f"init_bound must be positive, got {self.init_bound!r}")
        if not isinstance(self.adapter_dtype, torch.dtype) or not self.adapter_dtype.is_floating_point:
            raise DtypeError(f"adapter_dtype must be a floating-point torch.dtype, got {self.adapter_dtype!r}")
        for name in ("rank_pattern", "alpha_pattern"):
            if not isinstance(getattr(self, name), Mapping):
                raise ConfigError(f"{name} must map name patterns to numbers, got {getattr(self, name)!r}")

    @property
    def scaling(self) -> float:
        """lora_alpha / r, or lora_alpha / sqrt(r) with `use_rslora`."""
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)

    def replace(self, **changes: Any) -> LoraConfig:
        """A copy with some fields changed, checked again."""
        return dataclasses.replace(self, **changes)

    @classmethod
    def of(cls, config: Any = None, **fields: Any) -> LoraConfig:
        """A LoraConfig from a LoraConfig, a dict, a `peft.LoraConfig` or None, with `fields` on top.

        Raises:
            ConfigError: a field that is unknown or that fastlora cannot honour; the message names it.
        """
        if config is None:
            values: dict[str, Any] = {}
        elif isinstance(config, cls):
            values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
        elif isinstance(config, Mapping):
            values = dict(config)
        elif dataclasses.is_dataclass(config) and hasattr(config, "peft_type"):
            values = _from_peft(config)
        else:
            raise DtypeError(f"expected a LoraConfig, a dict or a peft.LoraConfig, got {type(config).__name__}")
        values.update(fields)
        known = [field.name for field in dataclasses.fields(cls)]
        if unknown := sorted(set(values) - set(known)):
            raise ConfigError(f"unknown config field {unknown[0]!r}; known: {', '.join(known)}")
        return cls(**values)


def _from_peft(config: Any) -> dict[str, Any]:
    """The fields of a peft.LoraConfig we honour; anything else that differs from PEFT's default is refused by name."""
    if str(getattr(config.peft_type, "value", config.peft_type)) != "LORA":
        raise ConfigError(f"expected a peft config of type LORA, got {config.peft_type}")
    known = {field.name for field in dataclasses.fields(LoraConfig)}
    values: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name in known:
            if value is not None:
                values[field.name] = sorted(value) if isinstance(value, set) else value
        elif field.name not in _PEFT_BOOKKEEPING and value != _default(field):
            raise ConfigError(f"peft.LoraConfig field {field.name}={value!r} is not supported by fastlora's own layers")
    return values


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return None if field.default is dataclasses.MISSING else field.default
