"""LoraConfig: what an adapter is, in PEFT's words, checked once when it is made."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

import torch

from fastlora.errors import ConfigError, DtypeError

DORA_DROPOUT = ("peft", "shared")
SEED_END = 2**63 - 1  # seeds, of dropout and of initialisation, are in [0, SEED_END)
BIAS = ("none", "all", "lora_only")

# Fields of a peft.LoraConfig that say nothing about the mathematics.
PEFT_BOOKKEEPING = frozenset(
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
        if not _is_number(self.lora_alpha):
            raise ConfigError(f"lora_alpha must be a finite number, got {self.lora_alpha!r}")
        for name in ("use_rslora", "use_dora"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} must be True or False, got {getattr(self, name)!r}")
        if not isinstance(self.lora_dropout, (int, float)) or not 0.0 <= self.lora_dropout < 1.0:
            raise ConfigError(f"lora_dropout must be in [0, 1), got {self.lora_dropout!r}")
        if self.dora_dropout not in DORA_DROPOUT:
            raise ConfigError(f"dora_dropout must be one of {', '.join(DORA_DROPOUT)}, got {self.dora_dropout!r}")
        if self.bias not in BIAS:
            raise ConfigError(f"bias must be one of {', '.join(BIAS)}, got {self.bias!r}")
        if self.init_bound is not None and not (_is_number(self.init_bound) and self.init_bound > 0):
            raise ConfigError(f"init_bound must be a positive finite number or None, got {self.init_bound!r}")
        seed = self.init_seed
        if seed is not None and not (isinstance(seed, int) and not isinstance(seed, bool) and 0 <= seed < SEED_END):
            raise ConfigError(f"init_seed must be an integer in [0, 2**63 - 1) or None, got {seed!r}")
        if not isinstance(self.adapter_dtype, torch.dtype) or not self.adapter_dtype.is_floating_point:
            raise DtypeError(f"adapter_dtype must be a floating-point torch.dtype, got {self.adapter_dtype!r}")
        self._check_names()
        self._check_patterns()

    def _check_names(self) -> None:
        """The fields that choose modules: of the right type, regular expressions that compile."""
        if self.target_modules is None:
            raise ConfigError('target_modules must be "all-linear", a regular expression or a list of names, got None')
        for name in ("target_modules", "exclude_modules", "layers_pattern", "modules_to_save"):
            value = getattr(self, name)
            if isinstance(value, str):
                _check_regex(name, value)
            elif value is not None and not (
                isinstance(value, (list, tuple, set)) and all(isinstance(item, str) for item in value)
            ):
                raise ConfigError(f"{name} must be a string or a list of strings, got {value!r}")
        for pattern in () if isinstance(self.layers_pattern, str) else self.layers_pattern or ():
            _check_regex("layers_pattern", pattern)
        wanted = self.layers_to_transform
        indices = wanted if isinstance(wanted, (list, tuple)) else [wanted]
        if wanted is not None and not all(isinstance(index, int) for index in indices):
            raise ConfigError(f"layers_to_transform must be an integer or a list of integers, got {wanted!r}")
        if self.layers_pattern and wanted is None:
            raise ConfigError(f"layers_pattern={self.layers_pattern!r} does nothing without layers_to_transform")

    def _check_patterns(self) -> None:
        for name in ("rank_pattern", "alpha_pattern"):
            patterns = getattr(self, name)
            if not isinstance(patterns, Mapping):
                raise ConfigError(f"{name} must map name patterns to numbers, got {patterns!r}")
            for pattern, value in patterns.items():
                _check_regex(name, pattern)
                if not _is_number(value) or (name == "rank_pattern" and not (isinstance(value, int) and value > 0)):
                    raise ConfigError(f"{name}[{pattern!r}] does not fit the field, got {value!r}")

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


def fresh_seed() -> int:
    """A seed drawn from torch's CPU generator."""
    return int(torch.randint(0, SEED_END, (1,), device="cpu").item())


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _check_regex(field: str, pattern: Any) -> None:
    try:
        re.compile(pattern)
    except (re.error, TypeError) as error:
        raise ConfigError(f"{field}: {pattern!r} is not a regular expression: {error}") from None


def _from_peft(config: Any) -> dict[str, Any]:
    """The fields of a peft.LoraConfig we honour; anything else that differs from PEFT's default is refused by name."""
    if str(getattr(config.peft_type, "value", config.peft_type)) != "LORA":
        raise ConfigError(f"expected a peft config of type LORA, got {config.peft_type}")
    known = {field.name for field in dataclasses.fields(LoraConfig)}
    values: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name == "loftq_config":
            # PEFT ignores it for any other init; ours does one iteration of the base's own 4-bit format.
            ours: tuple[dict[str, int], ...] = ({}, {"loftq_bits": 4, "loftq_iter": 1})
            if config.init_lora_weights == "loftq" and dict(value or {}) not in ours:
                raise ConfigError(f"peft.LoraConfig field loftq_config={value!r} is not supported: 4 bits, 1 iteration")
        elif field.name == "target_modules" and value is None:
            values["target_modules"] = []  # PEFT would look the model's type up: never all linears in silence
        elif field.name in known:
            if value is not None:
                values[field.name] = sorted(value) if isinstance(value, set) else value
        elif field.name not in PEFT_BOOKKEEPING and value != _default(field):
            raise ConfigError(f"peft.LoraConfig field {field.name}={value!r} is not supported by fastlora's own layers")
    return values


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return None if field.default is dataclasses.MISSING else field.default
