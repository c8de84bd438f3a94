"""What an adapted layer owns besides its base: named adapters, which are active, and how they start."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastlora.config import LoraConfig, fresh_seed
from fastlora.errors import ConfigError, DtypeError, ShapeError
from fastlora.math import init
from fastlora.nn.sharded import refuse_sharded


class InitRecord(NamedTuple):
    """How an adapter was initialised; saved with it."""

    strategy: str
    seed: int | None


class AdapterTensors(nn.ParameterDict):
    """One tensor of each adapter, by adapter name; its layer loads it, so that loading is all or nothing."""

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        return None


def _seed_of(config: LoraConfig) -> int:
    if config.init_seed is not None:
        return config.init_seed
    return fresh_seed()


def checked_config(config: Any, fields: dict[str, Any]) -> LoraConfig:
    """A LoraConfig whose init is known too, so that a layer is only touched once its config is right."""
    made = LoraConfig.of(config, **fields)
    if init.canonical(made.init_lora_weights) == "orthogonal" and made.r % 2:
        raise ConfigError(f"init_lora_weights 'orthogonal' needs an even rank, got r={made.r}")
    return made


def check_name(name: str) -> None:
    """Raise ConfigError unless `name` can be an adapter's."""
    if not isinstance(name, str) or not name or "." in name or hasattr(nn.ParameterDict, name):
        raise ConfigError(
            f"an adapter name must be a non-empty string without dots, not a module attribute; got {name!r}"
        )


class AdapterLayer(nn.Module):
    """The adapters of one linear layer. `nn.adapted` adds the base weight, the forward and merging.

    Attributes:
        in_features, out_features: k and n.
        lora_A, lora_B, lora_magnitude: adapter name -> [r, in], [out, r], [out] (the last only for DoRA).
        scaling: adapter name -> float.
        adapter_configs: adapter name -> LoraConfig.
        init_record: adapter name -> strategy and seed its tensors were drawn with.
        active_adapters: names whose contribution is added, in order.
    """

    in_features: int
    out_features: int

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        if in_features < 1 or out_features < 1:
            raise ShapeError(f"in_features and out_features must be at least 1, got {in_features} and {out_features}")
        self.in_features, self.out_features = in_features, out_features
        self.lora_A, self.lora_B, self.lora_magnitude = AdapterTensors(), AdapterTensors(), AdapterTensors()
        self.scaling: dict[str, float] = {}
        self.adapter_configs: dict[str, LoraConfig] = {}
        self.init_record: dict[str, InitRecord] = {}
        self.active_adapters: list[str] = []
        self._disabled = False

    # --- what the base must give --------------------------------------------------------------------------------------

    def _float_base(self, strategy: str) -> Tensor:
        """The dense weight an init that rewrites the base starts from."""
        raise NotImplementedError

    def _replace_base(self, weight: Tensor) -> None:
        raise NotImplementedError

    def _round_trip(self, weight: Tensor) -> Tensor:
        """Quantize and dequantize; the identity for a dense base."""
        raise NotImplementedError

    def _base_device(self) -> torch.device:
        raise NotImplementedError

    def weight_norm(self, name: str) -> Tensor:
        """|weight + scaling * B A| per row, fp32 [out]."""
        raise NotImplementedError

    # --- adapters -----------------------------------------------------------------------------------------------------

    def add_adapter(
        self, name: str, config: Any = None, tensors: tuple[Tensor, Tensor] | None = None, **fields: Any
    ) -> None:
        """Add one; the first becomes active and trainable, later ones wait, frozen, for `set_adapter`.

        Args:
            name: new, without dots.
            config: LoraConfig, dict or peft.LoraConfig; `fields` on top.
            tensors: (a [r, in], b [out, r]) to start from instead of the config's init.

        Raises:
            ConfigError: bad name or config. ShapeError, DtypeError: tensors that do not fit. Nothing has changed then.
        """
        config = checked_config(config, fields)
        self.check_new(name, config)
        for parameter in self.parameters():
            refuse_sharded(parameter, "adding an adapter")
        with torch.no_grad():
            if tensors is not None:
                a, b = self._check_tensors(tensors, config)
                record = InitRecord("tensors", None)
            else:
                a, b, record = self._draw(config)
            device, dtype = self._base_device(), config.adapter_dtype
            self.lora_A[name] = nn.Parameter(a.detach().to(device, dtype, copy=True).contiguous())
            self.lora_B[name] = nn.Parameter(b.detach().to(device, dtype, copy=True).contiguous())
            self.scaling[name], self.adapter_configs[name], self.init_record[name] = config.scaling, config, record
            if config.use_dora:
                self.lora_magnitude[name] = nn.Parameter(self.weight_norm(name).to(dtype))
        if not self.active_adapters:
            self._activate([name])
            return
        for group in (self.lora_A, self.lora_B, self.lora_magnitude):
            if name in group:
                group[name].requires_grad_(False)

    def reset_parameters(self, name: str) -> None:
        """Draw an adapter's tensors anew by its config's strategy (with its `init_seed`, or a fresh seed).

        Raises:
            ConfigError: unknown adapter, or a strategy that rewrites the base (pissa, olora, loftq).
        """
        self._known(name)
        config = self.adapter_configs[name]
        if init.changes_base(config.init_lora_weights):
            raise ConfigError(f"{config.init_lora_weights!r} rewrote the base weight: build a new layer instead")
        with torch.no_grad():
            a, b, record = self._draw(config)
            self.lora_A[name].copy_(a)
            self.lora_B[name].copy_(b)
            self.init_record[name] = record
            if name in self.lora_magnitude:
                self.lora_magnitude[name].copy_(self.weight_norm(name))

    def _draw(self, config: LoraConfig) -> tuple[Tensor, Tensor, InitRecord]:
        strategy = init.canonical(config.init_lora_weights)
        weight = None
        if init.changes_base(strategy):
            weight = self._float_base(strategy)
        seed = _seed_of(config)
        if self._base_device().type == "meta":
            a = torch.empty(config.r, self.in_features, device="meta")
            return a, torch.empty(self.out_features, config.r, device="meta"), InitRecord(strategy, seed)
        drawn = init.init_adapter(
            strategy,
            config.r,
            self.in_features,
            self.out_features,
            weight=weight,
            scaling=config.scaling,
            bound=config.init_bound,
            seed=seed,
            requantize=self._round_trip,
        )
        if drawn.base is not None:
            self._replace_base(drawn.base)
        return drawn.a, drawn.b, InitRecord(drawn.strategy, drawn.seed)

    def _check_tensors(self, tensors: tuple[Tensor, Tensor], config: LoraConfig) -> tuple[Tensor, Tensor]:
        if len(tensors) != 2 or not all(isinstance(tensor, Tensor) for tensor in tensors):
            raise DtypeError("tensors must be a pair (a [r, in], b [out, r]); give both or neither")
        a, b = tensors
        want = ((config.r, self.in_features), (self.out_features, config.r))
        if (tuple(a.shape), tuple(b.shape)) != want:
            raise ShapeError(f"expected a {want[0]} and b {want[1]}, got {tuple(a.shape)} and {tuple(b.shape)}")
        if not (a.is_floating_point() and b.is_floating_point()):
            raise DtypeError(f"expected floating-point a and b, got {a.dtype} and {b.dtype}")
        return a, b

    def _known(self, *names: str) -> None:
        for name in names:
            if name not in self.lora_A:
                raise ConfigError(f"unknown adapter {name!r}; have {', '.join(self.lora_A) or 'none'}")

    def check_active(self, names: Sequence[str]) -> None:
        """Raise what `set_adapter(names)` would; change nothing."""
        self._known(*names)
        if len(names) > 1 and any(name in self.lora_magnitude for name in names):
            raise ConfigError(f"several active adapters with DoRA depend on their order; got {', '.join(names)}")

    def check_new(self, name: str, config: LoraConfig) -> None:
        """Raise what `add_adapter(name, config)` would for its name and init; change nothing."""
        check_name(name)
        if name in self.lora_A:
            raise ConfigError(f"adapter {name!r} exists already; have {', '.join(self.lora_A)}")
        if init.changes_base(config.init_lora_weights) and len(self.lora_A):
            raise ConfigError(
                f"init {config.init_lora_weights!r} rewrites the base that {', '.join(self.lora_A)} already adapts"
            )

    def set_adapter(self, names: str | Sequence[str]) -> None:
        """Make these the active adapters: they train, every other one is frozen.

        Raises:
            ConfigError: unknown name, or several at once with DoRA among them (their order would change the function).
        """
        chosen = [names] if isinstance(names, str) else list(dict.fromkeys(names))
        self.check_active(chosen)
        self._activate(chosen)

    def _activate(self, chosen: list[str]) -> None:
        self.active_adapters = chosen
        for group in (self.lora_A, self.lora_B, self.lora_magnitude):
            for name, parameter in group.items():
                parameter.requires_grad_(name in chosen)

    def delete_adapter(self, name: str) -> None:
        """Remove one; if it was the only active one, the first that is left becomes active.

        Raises:
            ConfigError: unknown name.
        """
        self._known(name)
        for group in (self.lora_A, self.lora_B, self.lora_magnitude):
            if name in group:
                del group[name]
        for record in (self.scaling, self.adapter_configs, self.init_record):
            record.pop(name)
        left = [active for active in self.active_adapters if active != name]
        if left or not len(self.lora_A):
            self.active_adapters = left
        else:
            self._activate([next(iter(self.lora_A))])

    @contextlib.contextmanager
    def disable_adapters(self) -> Iterator[None]:
        """Within the block the layer computes its base alone; everything is as before afterwards."""
        before, self._disabled = self._disabled, True
        try:
            yield
        finally:
            self._disabled = before

    def delta_weight(self, name: str) -> Tensor:
        """scaling * B A, fp32 (fp64 for float64 adapters), [out, in]; without DoRA's row factor."""
        self._known(name)
        a, b = self.lora_A[name].detach(), self.lora_B[name].detach()
        dtype = torch.promote_types(a.dtype, torch.float32)
        return self.scaling[name] * (b.to(dtype) @ a.to(dtype))
