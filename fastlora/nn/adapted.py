"""What LoraLinear and QLoraLinear share: the forward, merging, loading and explaining of an adapted layer."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastlora import backends
from fastlora.config import LoraConfig
from fastlora.dispatch import registry
from fastlora.errors import ConfigError, DtypeError, ShapeError
from fastlora.nn import explain, loading, rows
from fastlora.nn.adapters import AdapterLayer
from fastlora.nn.quantized import QuantizedWeight
from fastlora.nn.sharded import refuse_sharded
from fastlora.ops import lora
from fastlora.ops.dora import dora_weight_norm


class AdaptedLinear(AdapterLayer):
    """What both layers share: forward, merging, loading. See `LoraLinear` and `QLoraLinear`."""

    weight: Any
    bias: nn.Parameter | None
    compute_dtype: torch.dtype | None = None

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features)
        self._merged_adapters: list[str] = []
        self._unmerged: list[nn.Parameter | QuantizedWeight] = []  # a list: no key in state_dict, see _apply

    def _first_adapter(self, name: str, config: LoraConfig) -> None:
        self.add_adapter(name, config)
        if self.bias is not None:
            self.bias.requires_grad_(self.adapter_configs[name].bias != "none")

    # --- forward ------------------------------------------------------------------------------------------------------

    def forward(self, x: Tensor, adapter_names: Sequence[str | None] | None = None) -> Tensor:
        """x [..., in] -> [..., out], in the dtype of x (autocast's when that is on).

        Args:
            adapter_names: one name or None per row of the batch (the first dimension); default: the active adapters.

        Raises:
            ShapeError, DtypeError: x, or the number of names, does not fit. ConfigError: an unknown name, or a merged
                layer where names are given. UnsupportedError: no backend, or not the forced one, can run it.
        """
        if adapter_names is not None:
            return rows.forward(self, x, adapter_names)
        scope = self.__dict__.get("_fastlora_scope")  # while its parent runs, where `nn.groups` has found a group
        if scope is not None and (made := scope.output(self, x)) is not None:
            return made
        if self._merged_adapters and not self._disabled:
            return self._merged_forward(x)
        names = [] if self._disabled else self.active_adapters
        y = self.adapter_forward(x, names[0] if len(names) == 1 else None)
        return y if len(names) < 2 else rows.add_deltas(self, x, y, names)

    def adapter_forward(self, x: Tensor, name: str | None) -> Tensor:
        """The layer with one adapter, or with none: the frozen base. As `forward`: x [..., in] -> [..., out].

        Args:
            x: any float dtype; the result has it (autocast's when that is on).
            name: of an adapter the layer has, merged or not; None for none.
        """
        if name is None:
            return self._op(x, *self._no_adapter(x), 1.0)
        config, modules = self.adapter_configs[name], self._modules
        mag = modules["lora_magnitude"]._parameters.get(name)  # type: ignore[union-attr]
        return self._op(
            x,
            self.effective_a(name),
            modules["lora_B"]._parameters[name],  # type: ignore[union-attr, arg-type]
            self.scaling[name],
            dropout_p=config.lora_dropout if self.training else 0.0,
            stream=self.stream(name),
            magnitude=mag,
            dora_dropout=config.dora_dropout,
        )

    def _op(self, x: Tensor, a: Tensor, b: Tensor, scale: float, **keywords: Any) -> Tensor:
        raise NotImplementedError

    def _no_adapter(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The adapter of rank 0: the frozen base by the same kernel."""
        return x.new_empty((0, self.in_features)), x.new_empty((self.out_features, 0))

    def stream(self, name: str) -> int:
        """The dropout stream of the adapter `name`: its position among the layer's adapters."""
        return 0 if len(self.scaling) == 1 else list(self.scaling).index(name)

    def _merged_forward(self, x: Tensor) -> Tensor:
        dtype = lora.autocast_dtype(x) or x.dtype
        bias = None if self.bias is None else self.bias.to(dtype)
        return F.linear(x.to(dtype), self.weight.to(dtype), bias)

    def weight_norm(self, name: str) -> Tensor:
        """|weight + scaling * B A| per row, fp32 [out] (DoRA, 2402.09353, equation 5), by the forward's own kernel.

        Args:
            name: of an adapter, with DoRA or without.

        Raises:
            ConfigError: an unknown name.
        """
        self._known(name)
        return dora_weight_norm(self._base_operand(), self.effective_a(name), self.lora_B[name], self.scaling[name])

    def _base_operand(self) -> Any:
        """The unmerged weight as the ops take it."""
        weight = self._base()
        return weight.pack() if isinstance(weight, QuantizedWeight) else weight

    def _base(self) -> Any:
        """The unmerged weight: a Parameter or a QuantizedWeight."""
        if self._unmerged:
            return self._unmerged[0]
        dense = self._parameters.get("weight")
        return self.weight if dense is None else dense

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The frozen (if merged, the merged) weight as a dense [out, in] tensor.

        Args:
            dtype: of the result; default: the dense weight's own, of a 4-bit one that it was quantized from.
        """
        if isinstance(self.weight, QuantizedWeight):
            return self.weight.dequantize(dtype)
        return self.weight.detach().to(dtype or self.weight.dtype)

    # --- merging ------------------------------------------------------------------------------------------------------

    @property
    def merged(self) -> bool:
        """Whether adapters are folded into `weight`."""
        return bool(self._merged_adapters)

    def merge(
        self,
        safe: bool = True,
        *,
        adapter_names: Sequence[str] | None = None,
        dtype: torch.dtype | None = None,
        requantize: bool = False,
    ) -> None:
        """Fold adapters into the weight; `unmerge` brings the original bytes back.

        The original weight is kept while merged (memory: the merged weight comes on top of it). A quantized base
        becomes a dense weight: `dtype`, else its compute dtype if that is 16-bit, else bf16.

        Args:
            safe: refuse a merged weight with NaN or inf; nothing has changed then.
            adapter_names: which (default: the active ones); merging the same ones twice does nothing.
            dtype: of the merged weight (default for a dense base: its own).
            requantize: quantize the merged weight to the base's 4-bit format; warns with the error that introduces.

        Raises:
            ConfigError: unknown or other already merged adapters; several with DoRA; requantize over a dense base, or
                together with a dtype.
            ShapeError: NaN or inf. DtypeError: `dtype` is no float dtype. The layer has not changed then.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else list(dict.fromkeys(adapter_names or []))
        names = self.active_adapters if adapter_names is None else names
        self._known(*names)
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise DtypeError(f"expected a floating-point torch.dtype for the merged weight, got {dtype!r}")
        if self._merged_adapters:
            if names == self._merged_adapters:
                return
            raise ConfigError(f"{', '.join(self._merged_adapters)} merged already; unmerge before merging others")
        if not names:
            return
        original = self.weight
        quantized = isinstance(original, QuantizedWeight)
        if requantize and not quantized:
            raise ConfigError("requantize=True needs a quantized base")
        if requantize and dtype is not None:
            raise ConfigError(f"requantize=True merges into the base's 4-bit format, dtype={dtype} into that: give one")
        with torch.no_grad():
            merged = self.merged_weight(names)
            if not requantize:
                merged = merged.to(dtype or self._merged_dtype())
            if safe and not merged.isfinite().all():
                raise ShapeError(f"merging {', '.join(names)} gives NaN or inf in the weight; nothing was changed")
            new = self._requantized(merged, names) if requantize else nn.Parameter(merged, requires_grad=False)
        self._unmerged = [original]
        self._put_weight(new)
        self._merged_adapters = list(names)

    def _put_weight(self, weight: nn.Parameter | QuantizedWeight) -> None:
        """Replace the weight by one of either kind: a module refuses the other kind while the name is taken."""
        if isinstance(weight, QuantizedWeight):
            weight.__dict__["_loaded_by_layer"] = True
        del self.weight
        self.weight = weight

    def check_active(self, names: Sequence[str]) -> None:
        """Raise what `set_adapter(names)` would; change nothing.

        Raises:
            ConfigError: as there, or the layer is merged: it does not switch.
        """
        super().check_active(names)
        if self.merged and list(names) not in (self.active_adapters, self._merged_adapters):
            raise ConfigError(f"{', '.join(self._merged_adapters)} merged: unmerge() before switching adapters")

    def delete_adapter(self, name: str) -> None:
        """Remove the adapter `name`; if it was the only active one, the first that is left becomes active.

        Raises:
            ConfigError: unknown name, or merged.
        """
        if name in self._merged_adapters:
            raise ConfigError(f"{name} is merged: unmerge() before deleting it")
        super().delete_adapter(name)

    def merged_weight(self, names: Sequence[str]) -> Tensor:
        """c * (w + s b a) for DoRA, w + sum of s b a otherwise; fp32 (fp64 for a float64 base), [out, in].

        Args:
            names: of the adapters to add, in order.

        Raises:
            ConfigError: several with DoRA among them, an unknown one, or a base that is cut over processes.
        """
        if len(names) > 1 and any(name in self.lora_magnitude for name in names):
            raise ConfigError(f"several adapters with DoRA depend on their order; got {', '.join(names)}")
        base = self._base()
        refuse_sharded(base.packed if isinstance(base, QuantizedWeight) else base, "merging")
        if isinstance(base, QuantizedWeight):
            weight = base.dequantize(torch.float32)
        else:
            weight = base.detach().to(torch.promote_types(base.dtype, torch.float32))
        for name in names:
            weight = weight + self.delta_weight(name)
            if name in self.lora_magnitude:
                weight = (self.lora_magnitude[name].detach().to(weight.dtype) / self.weight_norm(name))[
                    :, None
                ] * weight
        return weight

    def _merged_dtype(self) -> torch.dtype:
        if isinstance(self.weight, QuantizedWeight):
            compute = self.compute_dtype
            return compute if compute is not None and compute.itemsize == 2 else torch.bfloat16
        dtype: torch.dtype = self.weight.dtype
        return dtype

    def _requantized(self, merged: Tensor, names: Sequence[str]) -> QuantizedWeight:
        base: QuantizedWeight = self.weight
        new = QuantizedWeight.from_float(merged, base.quant_type, base.blocksize, base.nested)
        change = merged - base.dequantize(torch.float32)
        error = (new.dequantize(torch.float32) - merged).norm() / change.norm().clamp_min(1e-30)
        warnings.warn(
            f"requantizing after merging {', '.join(names)} changed the weight by {error.item():.2f} times the "
            "adapter's own effect; a 16-bit merge (requantize=False) keeps it",
            stacklevel=3,
        )
        return new

    def unmerge(self) -> None:
        """Bring back the weight as it was before `merge`, bit for bit; does nothing when not merged."""
        if self._unmerged:
            self._put_weight(self._unmerged.pop())
        self._merged_adapters = []

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> AdaptedLinear:
        super()._apply(fn, recurse)
        for index, kept in enumerate(self._unmerged):
            if isinstance(kept, nn.Module):
                kept._apply(fn, recurse)
                continue
            new = fn(kept.data)
            if kept.is_meta == new.is_meta:
                kept.data = new
            else:
                self._unmerged[index] = nn.Parameter(new, requires_grad=False)
        return self

    # --- loading, explaining ------------------------------------------------------------------------------------------

    def _load_from_state_dict(self, state_dict: Any, prefix: str, local_metadata: Any, *rest: Any) -> None:
        loading.load_layer(self, state_dict, prefix, local_metadata, *rest[1:])

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        """As `nn.Module.load_state_dict`, but nothing changes when it raises.

        Accepts our keys, bitsandbytes' `Linear4bit` keys, and for a quantized layer a float `weight` (quantized here).

        Args:
            state_dict, strict, assign: as there.

        Raises:
            StateDictError: (a RuntimeError) keys missing or unexpected under `strict`, or tensors that do not fit.
        """
        return loading.load_strictly(self, super().load_state_dict, state_dict, strict, assign)

    def explain(
        self, tokens: int, dtype: torch.dtype = torch.float32, *, adapter_names: Sequence[str] | None = None
    ) -> str:
        """Which kernels a training step would run, and why; the dispatcher's tables.

        Args:
            tokens: rows of x. dtype: of x.
            adapter_names: of a batch that mixes these adapters; default: all rows run through the active one.

        The tables of a layer in a group are the same: it joins the others where all of them choose one backend.

        Raises:
            ConfigError: an unknown name.
        """
        backends.load()
        problems = explain.single(self, tokens, dtype)
        if adapter_names is not None:
            self._known(*adapter_names)
            problems = explain.mixed(self, tokens, dtype, adapter_names)
        return "\n".join(map(registry.explain, problems))

    def _on_grid(self) -> bool:
        return isinstance(self.weight, QuantizedWeight) and self.weight.absmax_on_grid

    def extra_repr(self) -> str:
        """Features, bias and adapters, for `repr`."""
        ranks = ", ".join(f"{name}: r={config.r}" for name, config in self.adapter_configs.items())
        merged = f", merged={self._merged_adapters}" if self.merged else ""
        bias = self.bias is not None
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={bias}, adapters=({ranks}){merged}"
        )
