"""LoraConfig and AdaLoraConfig: what an adapter is, in PEFT's words, checked once when it is made."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from fastlora.errors import ConfigError, DtypeError

if TYPE_CHECKING:
    from typing_extensions import Self

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


_INIT_R = -1  # r of an AdaLoraConfig that says nothing else


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
        rank_pattern: name pattern -> r for the modules it matches.
        alpha_pattern: name pattern -> lora_alpha for the modules it matches.
        layers_to_transform: only these layer indices.
        layers_pattern: the names of the lists that the indices count in.
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
        self._check_rank()
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

    def _check_rank(self) -> None:
        if not _is_integer(self.r) or self.r < 1:
            raise ConfigError(f"r must be an integer of at least 1, got {self.r!r}")

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

    def _values(self) -> dict[str, Any]:
        """The fields a copy is made from."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    def replace(self, **changes: Any) -> Self:
        """A copy with some fields changed, checked again.

        Raises:
            ConfigError, DtypeError: as when one is made.
        """
        return type(self)(**(self._values() | changes))

    @classmethod
    def of(cls, config: Any = None, **fields: Any) -> Self:
        """A LoraConfig from a config: a LoraConfig, a dict, one of PEFT's or None, with `fields` on top.

        Of an AdaLoRA config, ours or PEFT's, it makes an AdaLoraConfig.

        Raises:
            DtypeError: something else, or another kind of config than this class.
            ConfigError: a field that is unknown or that fastlora cannot honour; the message names it.
        """
        kind: type[Any] = cls
        if config is None:
            values: dict[str, Any] = {}
        elif isinstance(config, LoraConfig):
            kind, values = type(config), config._values()
        elif isinstance(config, Mapping):
            values = dict(config)
        elif dataclasses.is_dataclass(config) and hasattr(config, "peft_type"):
            kind, values = _from_peft(config)
        else:
            raise DtypeError(f"expected a LoraConfig, a dict or a peft.LoraConfig, got {type(config).__name__}")
        if not issubclass(kind, cls):
            raise DtypeError(f"expected a config of {cls.__name__}, got {kind.__name__}")
        values.update(fields)
        known = [field.name for field in dataclasses.fields(kind)]
        if unknown := sorted(set(values) - set(known)):
            raise ConfigError(f"unknown config field {unknown[0]!r}; known: {', '.join(known)}")
        made: Self = kind(**values)
        return made


@dataclasses.dataclass(frozen=True)
class AdaLoraConfig(LoraConfig):
    """An adapter that spends one budget of ranks over all its layers (AdaLoRA, 2303.10512).

    A layer holds `lora_A [r, in]`, `lora_E [r, 1]`, `lora_B [out, r]` and computes
    y = x W^T + s drop(x) (A * E)^T B^T, s = lora_alpha / (init_r + 1e-5). That is PEFT's scale, not lora_alpha / r, and
    it stays when ranks are pruned. With lora_alpha <= 0, init_r stands in its place.

    Attributes:
        init_r: rank every layer starts with.
        target_r: the mean rank of a layer that the budget ends at, at most init_r.
        tinit: steps before ranks are first pruned.
        tfinal: steps at the end with the pattern frozen.
        deltaT: steps between two allocations.
        beta1: of the moving average of sensitivity, in (0, 1).
        beta2: of the moving average of uncertainty, in (0, 1).
        orth_reg_weight: of `fastlora.adalora.orthogonal_penalty`.
        total_step: optimizer steps of the whole run; must be given.
        init_lora_weights: True (E = 0, A and B normal with std 0.02) or False (all normal with std 1, for tests).
        r: the rank a layer holds; leave it alone (it is init_r). Only a layer loaded after pruning holds fewer.

    The other fields are those of `LoraConfig`;
    use_dora, use_rslora, rank_pattern and alpha_pattern are refused: PEFT's AdaLoRA has no such thing, or ignores it.

    Raises:
        ConfigError, DtypeError: a field out of range; the message names it.
    """

    r: int = _INIT_R
    init_lora_weights: bool | str = True
    _: dataclasses.KW_ONLY
    init_r: int = 12
    target_r: int = 8
    tinit: int = 0
    tfinal: int = 0
    deltaT: int = 1
    beta1: float = 0.85
    beta2: float = 0.85
    orth_reg_weight: float = 0.5
    total_step: int = 0

    def __post_init__(self) -> None:
        for name, least in (("init_r", 1), ("target_r", 1), ("tinit", 0), ("tfinal", 0), ("deltaT", 1)):
            if not _is_integer(value := getattr(self, name)) or value < least:
                raise ConfigError(f"{name} must be an integer of at least {least}, got {value!r}")
        if not _is_integer(self.total_step) or self.total_step < 1:
            got = f"got {self.total_step!r}" if self.total_step else "it was not given"
            raise ConfigError(f"total_step must be the number of optimizer steps of the whole run, at least 1; {got}")
        if self.target_r > self.init_r:
            raise ConfigError(f"target_r must be at most init_r={self.init_r}, got {self.target_r}")
        if self.tinit + self.tfinal >= self.total_step:
            raise ConfigError(
                f"no step is left to allocate ranks in: tinit={self.tinit} and tfinal={self.tfinal} must sum to less "
                f"than total_step={self.total_step}"
            )
        for name in ("beta1", "beta2"):
            if not _is_number(value := getattr(self, name)) or not 0 < value < 1:
                raise ConfigError(f"{name} must be in (0, 1), got {value!r}")
        if not _is_number(self.orth_reg_weight) or self.orth_reg_weight < 0:
            raise ConfigError(f"orth_reg_weight must be a finite number of at least 0, got {self.orth_reg_weight!r}")
        if not isinstance(self.init_lora_weights, bool):
            raise ConfigError(f"init_lora_weights of AdaLoRA must be True or False, got {self.init_lora_weights!r}")
        for name in ("use_dora", "use_rslora", "rank_pattern", "alpha_pattern"):
            if value := getattr(self, name):
                raise ConfigError(f"AdaLoRA has no {name}, got {value!r}")
        if self.r == _INIT_R:
            object.__setattr__(self, "r", self.init_r)
        super().__post_init__()

    def _check_rank(self) -> None:
        if not _is_integer(self.r) or not 0 <= self.r <= self.init_r:
            raise ConfigError(
                f"r is the rank a layer holds, 0 ... init_r={self.init_r}, got {self.r!r}; give init_r instead"
            )

    @property
    def scaling(self) -> float:
        """lora_alpha / (init_r + 1e-5), as PEFT; init_r in place of a lora_alpha that is not positive."""
        return (self.lora_alpha if self.lora_alpha > 0 else self.init_r) / (self.init_r + 1e-5)

    def _values(self) -> dict[str, Any]:
        values = super()._values()
        if self.r == self.init_r:  # so that a copy with another init_r holds that
            del values["r"]
        return values


def fresh_seed() -> int:
    """A seed drawn from torch's CPU generator."""
    return int(torch.randint(0, SEED_END, (1,), device="cpu").item())


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_regex(field: str, pattern: Any) -> None:
    try:
        re.compile(pattern)
    except (re.error, TypeError) as error:
        raise ConfigError(f"{field}: {pattern!r} is not a regular expression: {error}") from None


def _from_peft(config: Any) -> tuple[type[LoraConfig], dict[str, Any]]:
    """The fields of a peft config we honour; anything else that differs from PEFT's default is refused by name."""
    method = str(getattr(config.peft_type, "value", config.peft_type))
    if method not in METHODS:
        raise ConfigError(f"expected a peft config of type {' or '.join(METHODS)}, got {config.peft_type}")
    kind = METHODS[method]
    known = {field.name for field in dataclasses.fields(kind)}
    if kind is AdaLoraConfig:
        known -= {"r"}  # PEFT's AdaLoRA ignores it
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
        elif field.name not in PEFT_BOOKKEEPING and value != _default(field) and (field.name != "r" or "r" in known):
            raise ConfigError(f"peft.LoraConfig field {field.name}={value!r} is not supported by fastlora's own layers")
    return kind, values


METHODS: dict[str, type[LoraConfig]] = {"LORA": LoraConfig, "ADALORA": AdaLoraConfig}  # by PEFT's peft_type


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return None if field.default is dataclasses.MISSING else field.default
