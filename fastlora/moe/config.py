"""MixLoraConfig, LoraMoeConfig, MolaConfig: MoE-PEFT's words, checked once when a config is made, JSON in and out."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from fastlora.config import PEFT_BOOKKEEPING, SEED_END, LoraConfig
from fastlora.errors import ConfigError, DtypeError
from fastlora.math import init

if TYPE_CHECKING:
    from typing_extensions import Self

STRATEGIES = ("mixlora", "mixlora-dynamic", "mixlora-switch")
# What MoE-PEFT writes beside the mathematics.
_BOOKKEEPING = PEFT_BOOKKEEPING | {"bias", "name", "task_name", "routing_strategy"}
_EXPERT_FIELDS = ("r", "lora_alpha", "lora_dropout", "use_dora", "use_rslora", "lora_init")


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_integer(name: str, value: Any, least: int) -> None:
    if not _is_integer(value) or value < least:
        raise ConfigError(f"{name} must be an integer of at least {least}, got {value!r}")


def _check_number(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value < 0:
        raise ConfigError(f"{name} must be a finite number of at least 0, got {value!r}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoeConfig:
    """What the three methods share; the names are MoE-PEFT's keys.

    Attributes:
        num_experts: E.
        r: rank of every expert and of the plain adapters beside them.
        lora_alpha: they are scaled by lora_alpha / r, or lora_alpha / sqrt(r) with use_rslora.
        lora_dropout: p in [0, 1), on their input.
        use_dora: experts train a magnitude per output row as well.
        use_rslora: rank-stabilised scaling.
        lora_init: a strategy of `fastlora.math.init` that leaves the base as it is ("original", "gaussian", ...).
        target_modules: names of linears, or name -> bool; None takes every one the method knows.
        router_init_range: how wide the gate starts.
        init_seed: of experts and gates; None draws one and records it.

    Raises:
        ConfigError: a field out of range; the message names it.
    """

    num_experts: int
    r: int = 8
    lora_alpha: float = 16
    lora_dropout: float = 0.0
    use_dora: bool = False
    use_rslora: bool = False
    lora_init: str = "original"
    target_modules: Sequence[str] | Mapping[str, bool] | None = None
    router_init_range: float = 0.02
    init_seed: int | None = None

    peft_type: ClassVar[str] = ""

    def __post_init__(self) -> None:
        self._check_sizes()
        _check_number("router_init_range", self.router_init_range)
        strategy = init.canonical(self.lora_init)
        if init.changes_base(strategy) or strategy == "orthogonal":
            raise ConfigError(f"lora_init {self.lora_init!r} does not fit several experts over one base")
        seed = self.init_seed
        if seed is not None and not (_is_integer(seed) and 0 <= seed < SEED_END):
            raise ConfigError(f"init_seed must be an integer in [0, 2**63 - 1) or None, got {seed!r}")
        self._check_targets()
        self.lora_config()

    def _check_sizes(self) -> None:
        _check_integer("num_experts", self.num_experts, 1)

    def _check_targets(self) -> None:
        targets = self.targets
        if targets is not None and (
            isinstance(self.target_modules, str)
            or not targets
            or not all(isinstance(name, str) and name for name in targets)
        ):
            raise ConfigError(
                f"target_modules must be a list of names, a dict name -> bool or None, got {self.target_modules!r}"
            )

    @property
    def targets(self) -> list[str] | None:
        """target_modules as a list; None is every linear the method knows."""
        if isinstance(self.target_modules, Mapping):
            return [name for name, wanted in self.target_modules.items() if wanted]
        return None if self.target_modules is None else list(self.target_modules)

    def lora_config(self, **changes: Any) -> LoraConfig:
        """The plain adapter with this config's rank, scale, dropout and init (beside the experts: attention)."""
        fields: dict[str, Any] = {
            "r": self.r,
            "lora_alpha": self.lora_alpha,
            "lora_dropout": self.lora_dropout,
            "use_dora": self.use_dora,
            "use_rslora": self.use_rslora,
            "init_lora_weights": self.lora_init,
            "init_seed": self.init_seed,
            "dora_dropout": "shared",
        }
        return LoraConfig(**(fields | changes))

    def expert_config(self) -> LoraConfig:
        """The config of one expert: a plain adapter's."""
        return self.lora_config()

    def gate_bound(self, in_features: int) -> float:
        """b: the gate of a linear starts uniform in +-b, kaiming-uniform with slope sqrt(router_init_range).

        Args:
            in_features: of the linear.
        """
        return math.sqrt(6.0 / ((1.0 + self.router_init_range) * in_features))

    def replace(self, **changes: Any) -> Self:
        """A copy with some fields changed, checked again."""
        return type(self)(**(self._values() | changes))

    def _values(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    # --- JSON ---------------------------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """What JSON can hold: MoE-PEFT's keys, those it forgets to write too."""
        values = {name: value for name, value in self._values().items() if value is not None}
        targets = values.pop("target_modules", None)
        if targets is not None:
            values["target_modules"] = dict(targets) if isinstance(targets, Mapping) else list(targets)
        for name, value in values.items():
            if isinstance(value, tuple):
                values[name] = list(value)
        return values | {"peft_type": self.peft_type, "bias": "none"}

    def to_json(self) -> str:
        """`to_dict` as text."""
        return json.dumps(self.to_dict(), indent=2, sort_keys=True)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Read what `to_dict` or MoE-PEFT wrote.

        Args:
            values: keys and values as in the JSON.

        Raises:
            ConfigError: another method's config, or a key that is missing, unknown or cannot be honoured.
        """
        kind = values.get("peft_type", cls.peft_type)
        if str(kind).upper() != cls.peft_type:
            raise ConfigError(f"expected a config of peft_type {cls.peft_type!r}, got {kind!r}")
        if values.get("bias", "none") != "none":
            raise ConfigError(f"bias must be 'none', got {values['bias']!r}")
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(set(values) - known - _BOOKKEEPING):
            raise ConfigError(f"unknown config field {unknown[0]!r}; known: {', '.join(sorted(known))}")
        if missing := sorted({"num_experts"} - set(values)):
            raise ConfigError(f"missing config field {missing[0]!r}")
        return cls(**{name: value for name, value in values.items() if name in known})

    @classmethod
    def from_json(cls, text: str) -> Self:
        """`from_dict` of JSON text.

        Raises:
            ConfigError: no JSON object, or as `from_dict`.
        """
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise ConfigError(f"expected a JSON object: {error}") from None
        if not isinstance(values, dict):
            raise ConfigError(f"expected a JSON object, got {type(values).__name__}")
        return cls.from_dict(values)


def _check_balance(coefficient: Any, router_loss: Any) -> None:
    _check_number("router_aux_loss_coef", coefficient)
    if not isinstance(router_loss, bool):
        raise ConfigError(f"router_loss must be True or False, got {router_loss!r}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MixLoraConfig(MoeConfig):
    """Experts over a whole gated MLP, plain adapters on attention (MixLoRA, 2404.15159).

    Attributes:
        routing_strategy: "mixlora" (top-k), "mixlora-dynamic" (top-p) or "mixlora-switch" (top-1 with a capacity).
        top_k: experts a token, for "mixlora".
        top_p: for "mixlora-dynamic": a token keeps experts until their mass exceeds it, in (0, 1].
        temperature: for "mixlora-dynamic": above 0 it divides the probabilities.
        expert_capacity: for "mixlora-switch": tokens a sequence and expert, at least 1.
        ffn_dropout: for "mixlora-switch": of the result, in [0, 1).
        router_z_loss_coef: for "mixlora-switch": of the z loss.
        jitter_noise: in training router and experts see x * U(1 - noise, 1 + noise) (switch: the router alone);
            default 0, for switch 0.01.
        router_init_range: standard deviation of the gate; default 0.02, for switch 1.0.
        router_aux_loss_coef: of the balance loss.
        router_loss: whether there is one.
        act_fn: name of the experts' activation; None: the model's own.
        expert_lora: the experts' own r, lora_alpha, lora_dropout, use_dora, use_rslora or lora_init.
        sparse_step: kept for MoE-PEFT, which does not use it.

    The other fields, and what is raised, are those of `MoeConfig`.
    """

    routing_strategy: str = "mixlora"
    top_k: int = 2
    top_p: float = 0.8
    temperature: float = 0.0
    expert_capacity: int = 32
    jitter_noise: float | None = None
    router_init_range: float | None = None  # type: ignore[assignment]
    router_aux_loss_coef: float = 0.001
    router_z_loss_coef: float = 0.001
    router_loss: bool = True
    ffn_dropout: float = 0.0
    act_fn: str | None = None
    expert_lora: Mapping[str, Any] | None = None
    sparse_step: int | None = None

    peft_type: ClassVar[str] = "MIXLORA"

    def __post_init__(self) -> None:
        if self.routing_strategy not in STRATEGIES:
            raise ConfigError(f"routing_strategy must be one of {', '.join(STRATEGIES)}, got {self.routing_strategy!r}")
        switch = self.routing_strategy == "mixlora-switch"
        if self.router_init_range is None:
            object.__setattr__(self, "router_init_range", 1.0 if switch else 0.02)
        if self.jitter_noise is None:
            object.__setattr__(self, "jitter_noise", 0.01 if switch else 0.0)
        super().__post_init__()
        self._check_routing()
        _check_balance(self.router_aux_loss_coef, self.router_loss)
        for name in ("jitter_noise", "router_z_loss_coef", "temperature"):
            _check_number(name, getattr(self, name))
        if not self.jitter_noise < 1:  # type: ignore[operator]
            raise ConfigError(f"jitter_noise must be in [0, 1), got {self.jitter_noise!r}")
        if self.act_fn is not None and not isinstance(self.act_fn, str):
            raise ConfigError(f"act_fn must be the name of an activation or None, got {self.act_fn!r}")
        if self.sparse_step is not None:
            _check_integer("sparse_step", self.sparse_step, 1)
        if self.expert_lora is not None:
            if not isinstance(self.expert_lora, Mapping):
                raise ConfigError(f"expert_lora must map fields to values, got {self.expert_lora!r}")
            if unknown := sorted(set(self.expert_lora) - set(_EXPERT_FIELDS)):
                raise ConfigError(f"unknown field {unknown[0]!r} in expert_lora; known: {', '.join(_EXPERT_FIELDS)}")
        self.expert_config()

    def _check_routing(self) -> None:
        if self.routing_strategy == "mixlora":
            _check_integer("top_k", self.top_k, 1)
            if self.top_k > self.num_experts:
                raise ConfigError(f"top_k must be at most num_experts={self.num_experts}, got {self.top_k}")
        _check_number("top_p", self.top_p)
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p must be in (0, 1], got {self.top_p!r}")
        _check_integer("expert_capacity", self.expert_capacity, 1)
        _check_number("ffn_dropout", self.ffn_dropout)
        if not self.ffn_dropout < 1:
            raise ConfigError(f"ffn_dropout must be in [0, 1), got {self.ffn_dropout!r}")

    @property
    def slots(self) -> int:
        """The most experts a token can have."""
        return {"mixlora": self.top_k, "mixlora-dynamic": self.num_experts}.get(self.routing_strategy, 1)

    def expert_config(self) -> LoraConfig:
        """The config of one expert: this config's adapter with `expert_lora` on top.

        Raises:
            ConfigError: a field of it does not fit.
        """
        own = dict(self.expert_lora or {})
        strategy = init.canonical(own.pop("lora_init", self.lora_init))
        if init.changes_base(strategy) or strategy == "orthogonal":
            raise ConfigError(f"lora_init {strategy!r} does not fit several experts over one base")
        return self.lora_config(init_lora_weights=strategy, **own)

    def to_dict(self) -> dict[str, Any]:
        """What JSON can hold: MoE-PEFT's keys, those it forgets to write too."""
        values = super().to_dict()
        if self.expert_lora is not None:
            values["expert_lora"] = dict(self.expert_lora)
        return values


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraMoeConfig(MoeConfig):
    """Every linear of the MLP gets all experts, softly gated; attention gets plain adapters (LoRAMoE, 2312.09979).

    Attributes:
        router_init_range: squared slope of the gate's kaiming-uniform start; 5.0 is uniform in +-1/sqrt(in).
        blc_alpha: of the localised balance constraint (`fastlora.moe.router_loss`), in [0, 1].
        blc_weight: of the same; 0: none.

    The other fields, and what is raised, are those of `MoeConfig`; use_dora is refused.
    """

    router_init_range: float = 5.0
    blc_alpha: float = 0.0
    blc_weight: float = 0.0

    peft_type: ClassVar[str] = "LORAMOE"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.use_dora:
            raise ConfigError("LoRAMoE's experts share one low-rank product: use_dora cannot be honoured")
        for name in ("blc_alpha", "blc_weight"):
            _check_number(name, getattr(self, name))
        if not self.blc_alpha <= 1:
            raise ConfigError(f"blc_alpha must be in [0, 1], got {self.blc_alpha!r}")

    def to_dict(self) -> dict[str, Any]:
        """What JSON can hold: MoE-PEFT's keys, those it forgets to write too."""
        return super().to_dict() | {"routing_strategy": "loramoe"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class MolaConfig(MoeConfig):
    """Every linear gets experts, of which a token takes top_k (MoLA, 2402.08562).

    Attributes:
        num_experts: one number, or a list with one for each decoder layer.
        top_k: experts a token; one number or a list.
        r: rank; one number or a list.
        router_init_range: squared slope of the gate's kaiming-uniform start; 5.0 is uniform in +-1/sqrt(in).
        router_aux_loss_coef: of the balance loss.
        router_loss: whether there is one (MoE-PEFT: no).

    The other fields, and what is raised, are those of `MoeConfig`; use_dora is refused.
    """

    num_experts: int | Sequence[int]  # type: ignore[assignment]
    r: int | Sequence[int] = 8  # type: ignore[assignment]
    top_k: int | Sequence[int] = 2
    router_init_range: float = 5.0
    router_aux_loss_coef: float = 0.001
    router_loss: bool = False

    peft_type: ClassVar[str] = "MOLA"

    def __post_init__(self) -> None:
        for name in ("num_experts", "r", "top_k"):
            value = getattr(self, name)
            if isinstance(value, Sequence) and not isinstance(value, str):
                object.__setattr__(self, name, tuple(value))
        super().__post_init__()
        if self.use_dora:
            raise ConfigError("MoLA's experts share one low-rank product: use_dora cannot be honoured")
        _check_balance(self.router_aux_loss_coef, self.router_loss)

    @property
    def layers(self) -> int | None:
        """How many decoder layers the lists are for; None without a list."""
        lengths = {len(value) for value in (self.num_experts, self.r, self.top_k) if isinstance(value, tuple)}
        return lengths.pop() if lengths else None

    def _check_sizes(self) -> None:
        lists = {name: getattr(self, name) for name in ("num_experts", "r", "top_k")}
        lengths = {name: len(value) for name, value in lists.items() if isinstance(value, tuple)}
        if len(set(lengths.values())) > 1 or 0 in lengths.values():
            raise ConfigError(f"the lists must have one entry a layer each, got lengths {lengths}")
        for layer in range(self.layers or 1):
            experts, r, top_k = (self._entry(name, layer) for name in lists)
            _check_integer("num_experts", experts, 1)
            _check_integer("r", r, 1)
            _check_integer("top_k", top_k, 1)
            if top_k > experts:
                at = f" in layer {layer}" if self.layers else ""
                raise ConfigError(f"top_k must be at most num_experts={experts}, got {top_k}{at}")

    def _entry(self, name: str, layer: int) -> Any:
        value = getattr(self, name)
        return value[layer] if isinstance(value, tuple) else value

    def lora_config(self, **changes: Any) -> LoraConfig:
        """One expert's adapter; of several ranks the first layer's."""
        return super().lora_config(**({"r": self._entry("r", 0)} | changes))

    def for_layer(self, layer: int) -> MolaConfig:
        """The config of one decoder layer, without lists.

        Raises:
            ConfigError: the lists have no such entry.
        """
        if self.layers is None:
            return self
        if not 0 <= layer < self.layers:
            raise ConfigError(f"the lists have {self.layers} entries, none for layer {layer}")
        return self.replace(**{name: self._entry(name, layer) for name in ("num_experts", "r", "top_k")})

    def to_dict(self) -> dict[str, Any]:
        """What JSON can hold: MoE-PEFT's keys, those it forgets to write too."""
        return super().to_dict() | {"routing_strategy": "mola"}


CONFIGS: dict[str, type[MoeConfig]] = {each.peft_type: each for each in (MixLoraConfig, LoraMoeConfig, MolaConfig)}
_BY_STRATEGY = {**dict.fromkeys(STRATEGIES, "MIXLORA"), "loramoe": "LORAMOE", "mola": "MOLA"}


def config_from_dict(values: Mapping[str, Any]) -> MoeConfig:
    """The config of whichever of the three methods: a known peft_type decides, else routing_strategy.

    Args:
        values: MoE-PEFT's keys and values.

    Raises:
        ConfigError: neither names a method, or a field that does not fit.
    """
    kind, strategy = str(values.get("peft_type", "")).upper(), values.get("routing_strategy")
    if kind not in CONFIGS:
        if strategy not in _BY_STRATEGY:
            raise ConfigError(
                f"expected a peft_type of {', '.join(CONFIGS)} or a routing_strategy of {', '.join(_BY_STRATEGY)}, "
                f"got {values.get('peft_type')!r} and {strategy!r}"
            )
        kind = _BY_STRATEGY[strategy]
        values = {**values, "peft_type": kind}
    return CONFIGS[kind].from_dict(values)


def checked(config: Any, kind: type[Any]) -> Any:
    """A config of that class, from one or from a mapping.

    Raises:
        ConfigError, DtypeError: of another class, or a field that does not fit.
    """
    if isinstance(config, Mapping):
        return kind.from_dict(config)
    if not isinstance(config, kind):
        raise DtypeError(f"expected a {kind.__name__} or a dict, got {type(config).__name__}")
    return config
