"""What an adapted layer owns besides its base: named adapters, which are active, and how they start."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastlora.config import SEED_END, AdaLoraConfig, LoraConfig, fresh_seed
from fastlora.errors import ConfigError, DtypeError, ShapeError
from fastlora.math import init
from fastlora.nn.sharded import refuse_sharded, whole


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


def checked_config(config: Any, fields: dict[str, Any], pruned: bool = False) -> LoraConfig:
    """A LoraConfig whose init is known too, so that a layer is only touched once its config is right.

    Only what comes with its tensors may be `pruned`: an AdaLoRA adapter of fewer ranks than init_r.
    """
    made = LoraConfig.of(config, **fields)
    if isinstance(made, AdaLoraConfig) and made.r != made.init_r and not pruned:
        raise ConfigError(f"AdaLoRA starts with init_r={made.init_r}, got r={made.r}; give init_r instead of r")
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
        lora_E: adapter name -> [r, 1], the factors of A's rows (only for AdaLoRA).
        rank_masks: adapter name -> bool [init_r], which triplets the last allocation kept (only after one).
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
        self.lora_E = AdapterTensors()
        self.rank_masks: dict[str, Tensor] = {}
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
        """|weight + scaling * B A| per row of the adapter `name`, fp32 [out]."""
        raise NotImplementedError

    # --- adapters -----------------------------------------------------------------------------------------------------

    def adapter_groups(self) -> dict[str, AdapterTensors]:
        """What adapters are made of, by attribute name."""
        return {
            "lora_A": self.lora_A,
            "lora_E": self.lora_E,
            "lora_B": self.lora_B,
            "lora_magnitude": self.lora_magnitude,
        }

    def effective_a(self, name: str) -> Tensor:
        """The A of the adapter `name` that enters the product, [r, in]: lora_A, of AdaLoRA with its rows times lora_E.

        It has the adapter's own dtype, and a gradient that reaches lora_A and lora_E.
        """
        modules = self._modules  # asked at every call: attributes of a module are slow to find
        a, e = modules["lora_A"]._parameters[name], modules["lora_E"]._parameters.get(name)  # type: ignore[union-attr]
        return a if e is None else a * e  # type: ignore[return-value, operator]

    def add_adapter(
        self, name: str, config: Any = None, tensors: tuple[Tensor, ...] | None = None, **fields: Any
    ) -> None:
        """Add one; the first becomes active and trainable, later ones wait, frozen, for `set_adapter`.

        Args:
            name: new, without dots.
            config: LoraConfig, dict or peft.LoraConfig; `fields` on top.
            tensors: (a [r, in], b [out, r]), with an AdaLoraConfig (a, b, e [r, 1]), to start from instead of the
                config's init; any float dtype, copied into the config's adapter_dtype.

        Raises:
            ConfigError: bad name or config. ShapeError, DtypeError: tensors that do not fit. Nothing has changed then.
        """
        config = checked_config(config, fields, pruned=tensors is not None)
        self.check_new(name, config)
        for parameter in self.parameters():
            refuse_sharded(parameter, "adding an adapter")
        with torch.no_grad():
            if tensors is not None:
                made = self._check_tensors(tensors, config)
                record = InitRecord("tensors", None)
            else:
                made, record = self._draw(config)
            device, dtype = self._base_device(), config.adapter_dtype
            for group, value in zip((self.lora_A, self.lora_B, self.lora_E), made, strict=False):
                group[name] = nn.Parameter(value.detach().to(device, dtype, copy=True).contiguous())
            self.scaling[name], self.adapter_configs[name], self.init_record[name] = config.scaling, config, record
            if config.use_dora:
                self.lora_magnitude[name] = nn.Parameter(self.weight_norm(name).to(dtype))
        if not self.active_adapters:
            self._activate([name])
            return
        for group in self.adapter_groups().values():
            if name in group:
                group[name].requires_grad_(False)

    def reset_parameters(self, name: str) -> None:
        """Draw the tensors of the adapter `name` anew by its config's strategy (`init_seed`, or a fresh seed).

        Raises:
            ConfigError: unknown adapter, or a strategy that rewrites the base (pissa, olora, loftq).
        """
        self._known(name)
        config = self.adapter_configs[name]
        if init.changes_base(config.init_lora_weights):
            raise ConfigError(f"{config.init_lora_weights!r} rewrote the base weight: build a new layer instead")
        with torch.no_grad():
            made, record = self._draw(config)
            for group, value in zip((self.lora_A, self.lora_B, self.lora_E), made, strict=False):
                group[name].copy_(value)
            self.rank_masks.pop(name, None)
            self.init_record[name] = record
            if name in self.lora_magnitude:
                self.lora_magnitude[name].copy_(self.weight_norm(name))

    def _draw(self, config: LoraConfig) -> tuple[tuple[Tensor, ...], InitRecord]:
        """(a, b), of AdaLoRA (a, b, e), and how they were drawn."""
        seed = _seed_of(config)
        if isinstance(config, AdaLoraConfig):
            return self._draw_adalora(config, seed)
        strategy = init.canonical(config.init_lora_weights)
        weight = None
        if init.changes_base(strategy):
            weight = self._float_base(strategy)
        if self._base_device().type == "meta":
            return self._empty(config.r)[:2], InitRecord(strategy, seed)
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
        return (drawn.a, drawn.b), InitRecord(drawn.strategy, drawn.seed)

    def _empty(self, r: int) -> tuple[Tensor, Tensor, Tensor]:
        shapes = ((r, self.in_features), (self.out_features, r), (r, 1))
        a, b, e = (torch.empty(shape, device="meta") for shape in shapes)
        return a, b, e

    def _draw_adalora(self, config: AdaLoraConfig, seed: int) -> tuple[tuple[Tensor, ...], InitRecord]:
        """a, b normal with std 0.02 and e = 0, so that the function is unchanged; False: all normal with std 1."""
        zero, r = config.init_lora_weights, config.r
        record = InitRecord("adalora" if zero else "random", seed)
        if self._base_device().type == "meta":
            return self._empty(r), record
        strategy = "normal" if zero else "standard_normal"
        sides = (self.in_features, config.init_bound), (self.out_features, None), (1, None)
        a, b, e = (
            init.init_adapter(strategy, r, width, 1, bound=bound, seed=(seed + turn) % SEED_END).a
            for turn, (width, bound) in enumerate(sides)
        )
        return (a, b.T, torch.zeros_like(e) if zero else e), record

    def _check_tensors(self, tensors: tuple[Tensor, ...], config: LoraConfig) -> tuple[Tensor, ...]:
        names = ("a", "b", "e") if isinstance(config, AdaLoraConfig) else ("a", "b")
        if len(tensors) != len(names) or not all(isinstance(tensor, Tensor) for tensor in tensors):
            what = "a triple (a [r, in], b [out, r], e [r, 1])" if len(names) == 3 else "a pair (a [r, in], b [out, r])"
            raise DtypeError(f"tensors must be {what}; give all of them or none")
        want = ((config.r, self.in_features), (self.out_features, config.r), (config.r, 1))[: len(names)]
        have = tuple(tuple(tensor.shape) for tensor in tensors)
        if have != want:
            expected = " and ".join(f"{name} {shape}" for name, shape in zip(names, want, strict=True))
            raise ShapeError(f"expected {expected}, got {' and '.join(map(str, have))}")
        if not all(tensor.is_floating_point() for tensor in tensors):
            kinds = [tensor.dtype for tensor in tensors]
            raise DtypeError(f"expected floating-point {' and '.join(names)}, got {' and '.join(map(str, kinds))}")
        return tensors

    def _known(self, *names: str) -> None:
        for name in names:
            if name not in self.lora_A:
                raise ConfigError(f"unknown adapter {name!r}; have {', '.join(self.lora_A) or 'none'}")

    def check_active(self, names: Sequence[str]) -> None:
        """Raise what `set_adapter(names)` would; change nothing.

        Raises:
            ConfigError: as there.
        """
        self._known(*names)
        if len(names) > 1 and any(name in self.lora_magnitude for name in names):
            raise ConfigError(f"several active adapters with DoRA depend on their order; got {', '.join(names)}")

    def check_new(self, name: str, config: LoraConfig) -> None:
        """Raise what `add_adapter(name, config)` would for its name and init; change nothing.

        Raises:
            ConfigError: a bad or used name, or an init that would rewrite a base that other adapters use.
        """
        check_name(name)
        if name in self.lora_A:
            raise ConfigError(f"adapter {name!r} exists already; have {', '.join(self.lora_A)}")
        if init.changes_base(config.init_lora_weights) and len(self.lora_A):
            raise ConfigError(
                f"init {config.init_lora_weights!r} rewrites the base that {', '.join(self.lora_A)} already adapts"
            )

    def set_adapter(self, names: str | Sequence[str]) -> None:
        """Make these the active adapters: they train, every other one is frozen.

        Args:
            names: one, or several whose contributions are added in this order; empty for none.

        Raises:
            ConfigError: unknown name, or several at once with DoRA among them (their order would change the function).
        """
        chosen = [names] if isinstance(names, str) else list(dict.fromkeys(names))
        self.check_active(chosen)
        self._activate(chosen)

    def _activate(self, chosen: list[str]) -> None:
        self.active_adapters = chosen
        for group in self.adapter_groups().values():
            for name, parameter in group.items():
                parameter.requires_grad_(name in chosen)

    def delete_adapter(self, name: str) -> None:
        """Remove the adapter `name`; if it was the only active one, the first that is left becomes active.

        Raises:
            ConfigError: unknown name.
        """
        self._known(name)
        for group in self.adapter_groups().values():
            if name in group:
                del group[name]
        self.rank_masks.pop(name, None)
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
        """scaling * B A (AdaLoRA: B E A), fp32 (fp64 for float64 adapters), [out, in]; without DoRA's row factor.

        Args:
            name: of the adapter.

        Raises:
            ConfigError: an unknown one.
        """
        self._known(name)
        a, b = self.lora_A[name].detach(), self.lora_B[name].detach()
        dtype = torch.promote_types(a.dtype, torch.float32)
        a = a.to(dtype)
        if name in self.lora_E:
            a = a * self.lora_E[name].detach().to(dtype)
        return self.scaling[name] * (b.to(dtype) @ a)

    def kept_triplets(self, name: str) -> Tensor | None:
        """bool [init_r]: what a pruned copy of the AdaLoRA adapter `name` keeps; None before ranks were allocated.

        Besides what the last allocation kept, every triplet whose E moved off zero since: dropping it would change the
        function.
        """
        mask = self.rank_masks.get(name)
        if mask is None:
            return None
        e = whole(self.lora_E[name].detach()).reshape(-1)
        return mask | (e != 0).to(mask.device) if e.shape == mask.shape else mask
