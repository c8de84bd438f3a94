"""PEFT's own LoRA layers with another forward: ours where it computes PEFT's function, PEFT's wherever it might not.

A layer becomes one of these by `module.__class__ = Linear`: the object, its parameters, hooks and names stay. The
names of the classes are PEFT's too, because "all-linear", status texts and LoftQ go by them. Nothing about the adapter
is remembered between calls: hot-swapping, `set_scale`, `p.data = ...`, merging and casts are seen by the next forward.

Importing this module imports peft; `nn.accelerate` does so when it is used.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from peft.import_utils import is_bnb_4bit_available
from peft.tuners.lora import layer as peft_layer
from peft.tuners.lora.dora import DoraLinearLayer
from peft.tuners.lora.variants import DoraLinearVariant
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from fastlora.errors import FastloraError
from fastlora.io import bnb
from fastlora.math import nf4
from fastlora.math.nf4 import PackedWeight
from fastlora.nn.groups import SCOPE, grouped, projection_of
from fastlora.ops.lora import dense_linear
from fastlora.ops.member import Projection
from fastlora.ops.qlora import packed_linear

FLOATS = frozenset({torch.float32, torch.bfloat16, torch.float16})
# Attributes of ours on PEFT's modules; `decelerate` takes them away again.
ADOPTED, LEFT, IGNORED, WARNED = "_fastlora_adopted", "_fastlora_left", "_fastlora_ignored", "_fastlora_warned"

DISABLED = "its adapters are disabled"
MERGED = "its adapters are merged into the base weight"
BY_ROW = "adapter_names or other arguments came with x"
ABSENT = "no active adapter of this layer"
SEVERAL = "several adapters are active"
SEVERAL_DORA = "several adapters are active, one of them DoRA: PEFT's result depends on their order"
HOOKED = "a hook, or a replaced forward, sits on {}, which we would not call"

# Fields that PEFT accepts and then ignores: everywhere but on GPTQ bases, and on 4-bit bases.
_IGNORED = ("use_qalora",)
_IGNORED_ON_4BIT = ("kasa_config", "monteclora_config", "use_bdlora")


def ignored_field(config: Any, four_bit: bool) -> str:
    """The config field that PEFT's layer ignores in silence, in words; "" if there is none."""
    names = _IGNORED + (_IGNORED_ON_4BIT if four_bit else ())
    found = [name for name in names if getattr(config, name, None)]
    if four_bit and getattr(config, "init_lora_weights", None) == "lora_ga":
        found.append('init_lora_weights="lora_ga"')
    where = "on a 4-bit base" if four_bit and found != ["use_qalora"] else "on this base"
    return f"PEFT ignores {', '.join(found)} {where}" if found else ""


# --- what every call asks ---------------------------------------------------------------------------------------------


def _hooked(*modules: nn.Module) -> bool:
    for module in modules:
        own = module.__dict__  # asked of four modules a call: twice as fast as attributes
        if (
            own["_forward_hooks"]
            or own["_forward_pre_hooks"]
            or own["_backward_hooks"]
            or own["_backward_pre_hooks"]
            or "forward" in own
        ):
            return True
    return False


def active_adapter(layer: Any) -> str:
    """Name of the one adapter in force; "" (or one this layer lacks) where there is none or more than one."""
    active = layer._active_adapter
    if type(active) is str:
        return active
    if len(active) == 1:
        name: str = active[0]
        return name
    present = [name for name in active if name in layer._modules["lora_A"]._modules]
    return present[0] if len(present) == 1 else ""


def why_left(layer: Any) -> str:
    """Why PEFT's forward must run whatever x is; "" when ours can. Facts of the layer, its adapter, not its base.

    It runs at every call: flat, dictionary look-ups instead of module attributes, about 2 us.
    """
    if layer._disable_adapters:
        return DISABLED
    if layer.merged_adapters:
        return MERGED
    modules = layer._modules
    name = active_adapter(layer)
    a = modules["lora_A"]._modules.get(name)
    if a is None:
        return _why_no_adapter(layer)
    b, drop, base = modules["lora_B"]._modules[name], modules["lora_dropout"]._modules[name], modules["base_layer"]
    variant = layer.lora_variant.get(name)
    if variant is not None and (why := _why_not_dora(layer, name, variant, drop, b)):
        return why
    if type(a) is not nn.Linear or type(b) is not nn.Linear:
        return f"lora_A and lora_B are {type(a).__name__} and {type(b).__name__}, not plain nn.Linear"
    kind = type(drop)
    if kind is not nn.Identity and (kind is not nn.Dropout or drop.inplace or drop.p >= 1.0):
        return f"its dropout is {drop}"
    if _hooked(a, b, drop, base) or torch_module._has_any_global_hook():
        return _where_hooked({"lora_A": a, "lora_B": b, "the dropout": drop, "base_layer": base})
    if layer.fan_in_fan_out:
        return f"fan_in_fan_out=True: the {type(base).__name__} base keeps its weight as [in, out]"
    one, two = a._parameters.get("weight"), b._parameters.get("weight")
    if type(one) is not nn.Parameter or type(two) is not nn.Parameter:
        return "lora_A and lora_B are not plain parameters"
    dtype = one.dtype
    if dtype not in FLOATS or two.dtype is not dtype:
        return "lora_A and lora_B are not plain float parameters of one dtype"
    if hasattr(one, "ds_id"):
        return "DeepSpeed ZeRO-3 has partitioned the adapter"
    ignored: dict[str, str] | None = layer.__dict__.get(IGNORED)
    return ignored.get(name, "") if ignored else ""


def _where_hooked(parts: dict[str, nn.Module]) -> str:
    found = [name for name, module in parts.items() if _hooked(module)]
    return HOOKED.format(found[0]) if found else "global module hooks are registered"


def _why_no_adapter(layer: Any) -> str:
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    if len(names) < 2:
        return ABSENT
    return SEVERAL_DORA if any(name in layer.lora_magnitude_vector for name in names) else SEVERAL


def _why_not_dora(layer: Any, name: str, variant: Any, drop: nn.Module, b: Any) -> str:
    if type(variant) is not DoraLinearVariant:
        return f"the variant {type(variant).__name__.removesuffix('Variant')} has no fused path"
    magnitude = layer._modules["lora_magnitude_vector"]._modules[name]
    if type(magnitude) is not DoraLinearLayer:
        return f"its magnitude is a {type(magnitude).__name__}"
    if _hooked(magnitude):
        return HOOKED.format("the magnitude")
    if layer.training != drop.training:
        return "DoRA's layer and its dropout are in different modes"
    if _plain_dtype(magnitude) not in FLOATS:
        return "the magnitude is not a plain float parameter"
    if b.bias is not None or layer.ephemeral_gpu_offload:
        return "DoRA with lora_bias or ephemeral_gpu_offload"
    return ""


def _plain_dtype(module: nn.Module) -> torch.dtype | None:
    """Of a module's weight where that is a Parameter and nothing more (no DTensor, not flattened away)."""
    weight = module._parameters.get("weight")
    return weight.dtype if type(weight) is nn.Parameter else None


def _why_not_input(layer: Any, x: Any, adapter_dtype: torch.dtype) -> str:
    if type(x) is not Tensor and type(x) is not nn.Parameter:
        return f"x was a {type(x).__name__}"
    if x.dtype not in FLOATS:
        return f"x was {x.dtype}"
    if x.dtype is not adapter_dtype and not layer.cast_input_dtype_enabled:
        return "casting the input's dtype is switched off"
    if x.is_nested:
        return "x was a nested tensor"
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        return "torch.func is transforming it"
    return ""


def _operands(
    layer: Any, name: str, bias: Tensor | None
) -> tuple[Tensor, Tensor, float, Tensor | None, float, None, int, Tensor | None, str, None]:
    """What `ops.lora.adapted_linear` takes after x and the weight: A, B, scale, bias ... backend, in its order."""
    modules, scale = layer._modules, layer.scaling[name]
    adapters, b = modules["lora_A"]._modules, modules["lora_B"]._modules[name]._parameters
    own, drop = b["bias"], modules["lora_dropout"]._modules[name]
    if own is not None:  # lora_bias: s (B h + own) + bias = s B h + (bias + s own), in fp32: one rounding
        own = own.float() * scale
        bias = own if bias is None else bias.float() + own
    p, stream, magnitude = 0.0, 0, None
    if drop.training and type(drop) is nn.Dropout:
        p = drop.p
        stream = 0 if len(adapters) == 1 else list(adapters).index(name)
    if name in layer.lora_variant:
        magnitude = modules["lora_magnitude_vector"]._modules[name]._parameters["weight"]
    return adapters[name]._parameters["weight"], b["weight"], scale, bias, p, None, stream, magnitude, "peft", None


class _Shared:
    """What both layers add to PEFT's: the record of what was left to PEFT, and of fields PEFT ignores."""

    _four_bit = False
    _fastlora_left = ""

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: Any, **kwargs: Any) -> None:
        """PEFT's; then note what of `config` PEFT has ignored."""
        super().update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config, **kwargs)  # type: ignore[misc]
        note_ignored(self, adapter_name, config)

    def projection(self, x: Tensor) -> Projection | None:
        """The layer as a group of projections takes it; None where PEFT must compute it."""
        found: Projection | None = (_packed_forward if self._four_bit else _dense_forward)(self, x, projection_of)
        return found

    def dropout_rates(self) -> list[float]:
        """p of the dropouts in force."""
        layer: Any = self
        if layer.disable_adapters:
            return []
        drops: Any = layer.lora_dropout
        return [getattr(drops[name], "p", 0.0) for name in layer.active_adapters if name in drops]

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        state.pop(ADOPTED, None)  # views of the base's bytes: a copy of the layer has bytes of its own
        return state


def _leave(layer: Any, why: str) -> None:
    """Leave this call to PEFT because of the layer's state, which `why_left` can find again."""
    if why is SEVERAL_DORA and not layer.__dict__.get(WARNED):
        layer.__dict__[WARNED] = True
        warnings.warn(f"left to PEFT: {why}", stacklevel=2)


def _leave_input(layer: Any, why: str) -> None:
    """Leave this call to PEFT because of x; remembered for `report`."""
    if layer._fastlora_left != why:
        layer._fastlora_left = why


def _by_row(layer: Any) -> Tensor | None:
    _leave_input(layer, BY_ROW)
    return None


def note_ignored(layer: Any, name: str, config: Any) -> str:
    """Keep (or forget) that PEFT ignores a field of the adapter's config; that adapter is left to PEFT."""
    why = ignored_field(config, layer._four_bit)
    if why:
        layer.__dict__.setdefault(IGNORED, {})[name] = why
    else:
        layer.__dict__.get(IGNORED, {}).pop(name, None)
    return why


# --- over a dense base ------------------------------------------------------------------------------------------------


def why_not_dense(layer: Any) -> str:
    """Why the base of a `lora.Linear` cannot be used; "" when it can."""
    base = layer._modules["base_layer"]
    if type(base) is not nn.Linear and not _linear_in_all_but_name(base):
        return foreign(base)
    weight = base._parameters.get("weight")
    if type(weight) is not nn.Parameter or weight.dtype not in FLOATS:
        kind = "no parameter" if weight is None else f"{type(weight).__name__} {weight.dtype}"
        return f"the base weight is {kind}, not a plain float parameter"
    return "the base weight trains" if weight.requires_grad else ""


def _linear_in_all_but_name(base: nn.Module) -> bool:
    return isinstance(base, nn.Linear) and type(base).forward is nn.Linear.forward


def foreign(base: nn.Module) -> str:
    """Why a base that is no plain linear layer is left to PEFT."""
    name = type(base).__name__
    if type(getattr(base, "weight", None)).__name__ == "Params4bit":
        return (
            f"PEFT put its dense wrapper over a bitsandbytes {name}, because the model lacks is_loaded_in_4bit=True: "
            "set that before get_peft_model"
        )
    return f"a {name} base has no fused path"


def _dense_forward(layer: Any, x: Tensor, run: Callable[..., Any] = dense_linear) -> Any:
    """y (what `run` makes of the operands), or None where PEFT must make it."""
    if why := why_left(layer) or why_not_dense(layer):
        _leave(layer, why)
        return None
    name, modules = active_adapter(layer), layer._modules
    base = modules["base_layer"]._parameters
    weight, operands = base["weight"], _operands(layer, name, base["bias"])
    if why := _why_not_input(layer, x, operands[0].dtype):
        _leave_input(layer, why)
        return None
    if x.dtype is not weight.dtype and not torch.is_autocast_enabled(x.device.type):
        _leave_input(layer, f"x was {x.dtype} and the base weight {weight.dtype}")
        return None
    y = run(x, weight, *operands)
    if layer._fastlora_left:
        layer._fastlora_left = ""
    return y


class Linear(_Shared, peft_layer.Linear):
    """`peft.tuners.lora.Linear` whose forward runs on our kernels where it can."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x [..., in] -> [..., out], PEFT's function: y = x W^T + bias + scaling * drop(x) A^T B^T, or DoRA's."""
        y = grouped(self, x, *args, **kwargs) if SCOPE in self.__dict__ else None
        if y is None:
            y = _dense_forward(self, x) if not (args or kwargs) else _by_row(self)
        return super().forward(x, *args, **kwargs) if y is None else y


# --- over a bitsandbytes 4-bit base -----------------------------------------------------------------------------------


class Adopted(NamedTuple):
    """A `Params4bit` as the ops take it, and what it was made of: if any of that is another object, it is made anew."""

    parts: tuple[Any, ...]
    pointer: int
    packed: PackedWeight
    on_grid: bool


def _parts(weight: Any, state: Any) -> tuple[Any, ...]:
    nested = getattr(state, "state2", None)
    absmax2 = None if nested is None else nested.absmax
    return weight, state, state.absmax, nested, absmax2, state.offset, state.code


def _same(have: tuple[Any, ...], found: tuple[Any, ...]) -> bool:
    return all(one is other for one, other in zip(have, found, strict=True))


def _unchanged(have: Adopted, weight: Any, state: Any) -> bool:
    """Whether every part is still the object `have` was made of, its bytes where they were; asked at every call."""
    one, two, absmax, nested, absmax2, offset, code = have.parts
    if weight is not one or state is not two or state.absmax is not absmax or state.code is not code:
        return False
    if state.state2 is not nested or state.offset is not offset or getattr(state, "packing_format_for_cpu", False):
        return False
    if nested is not None and nested.absmax is not absmax2:
        return False
    with torch._C.DisableTorchFunctionSubclass():  # Params4bit reroutes every method through Python
        pointer: int = weight.data_ptr()
    return pointer == have.pointer


def adopt(layer: Any, base: Any) -> Adopted | str:
    """The base weight's bytes, shared, or why they cannot be. Kept on the layer until any part is replaced."""
    weight = base._parameters.get("weight")
    state = getattr(weight, "quant_state", None)
    have: Adopted | None = layer.__dict__.get(ADOPTED)
    if have is not None and not torch.compiler.is_compiling() and _unchanged(have, weight, state):
        return have
    if state is None or not hasattr(state, "absmax"):
        return "the base weight is not quantized (yet)"
    if getattr(state, "packing_format_for_cpu", False):
        return (
            "bitsandbytes has repacked the base weight for its CPU kernel (an eval forward on an AVX512_BF16 host); "
            "accelerate the model before its first eval forward"
        )
    parts = _parts(weight, state)
    if torch.compiler.is_compiling():
        if have is None or not _same(have.parts, parts):
            return "its bytes had not been read before torch.compile"
        if weight.dtype is not torch.uint8:
            return have
        return have._replace(packed=have.packed._replace(packed=weight.view(-1, 1)))  # .data may have been replaced
    with torch._C.DisableTorchFunctionSubclass():  # Params4bit reroutes every method through Python
        plain, pointer = weight.detach().as_subclass(Tensor), weight.data_ptr()
    try:
        packed, _ = bnb.from_quant_state(plain, state)
    except FastloraError as error:
        return str(error)
    on_grid = not packed.nested and nf4.absmax_on_grid(nf4.as_fp32(packed.absmax))
    made = Adopted(parts, pointer, packed, on_grid)
    if _shares_memory(state, packed):  # a converted copy would hide changes made in place
        layer.__dict__[ADOPTED] = made
    return made


def _shares_memory(state: Any, packed: PackedWeight) -> bool:
    pairs: list[tuple[Any, Any]] = [(state.absmax, packed.absmax)]
    if packed.nested:
        pairs += [(state.state2.absmax, packed.nested_absmax), (state.offset, packed.nested_offset)]
    return packed.code is None and all(theirs.data_ptr() == ours.data_ptr() for theirs, ours in pairs)


def _wider(x: Tensor, compute: torch.dtype, adapter: torch.dtype) -> str:
    """Why rounding x to the compute dtype would lose what PEFT's adapter keeps; "" when it does not."""
    device = x.device.type
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    if autocast is not None and torch.is_autocast_enabled() and torch.promote_types(x.dtype, autocast) is not x.dtype:
        return f"under autocast to {autocast} PEFT's output is wider than x, {x.dtype}"
    if compute is x.dtype or compute is (autocast or adapter):
        return ""
    seen = autocast or adapter
    if compute in (torch.promote_types(compute, x.dtype), torch.promote_types(compute, seen)):
        return ""
    return f"x was {x.dtype}: PEFT computes the adapter in {seen}, the base in its compute_dtype {compute}"


def _packed_forward(layer: Any, x: Tensor, run: Callable[..., Any] = packed_linear) -> Any:
    """y (what `run` makes of the operands), or None where PEFT must make it."""
    if why := why_left(layer):
        if why is MERGED:
            layer.__dict__.pop(ADOPTED, None)  # the bytes it shares are no longer the base's
        _leave(layer, why)
        return None
    name, base = active_adapter(layer), layer._modules["base_layer"]
    operands = _operands(layer, name, base._parameters["bias"])
    dtype = operands[0].dtype
    if why := _why_not_input(layer, x, dtype):
        _leave_input(layer, why)
        return None
    found = adopt(layer, base)
    if not isinstance(found, Adopted):
        _leave(layer, found)
        return None
    if not base.compute_type_is_set:  # the first input decides, as in bitsandbytes
        base.set_compute_type(x)
        base.compute_type_is_set = True
    compute = base.compute_dtype or x.dtype
    if why := _wider(x, compute, dtype):
        _leave_input(layer, why)
        return None
    y = run(x, found.packed, *operands, found.on_grid, compute_dtype=compute)
    if layer._fastlora_left:
        layer._fastlora_left = ""
    return y


def why_not_four_bit(layer: Any) -> str:
    """Why the base of a `lora.Linear4bit` cannot be used; "" when it can."""
    base = layer._modules["base_layer"]
    if not hasattr(base, "compute_type_is_set"):
        return foreign(base)
    found = adopt(layer, base)
    return found if isinstance(found, str) else ""


def why_not_now(layer: Any) -> str:
    """Why one of ours would leave a plain float x to PEFT in its present state; "" when it would not."""
    if "forward" in layer.__dict__:
        return "a device hook has replaced the layer's own forward: accelerate the model before dispatching it"
    return why_left(layer) or (why_not_four_bit(layer) if layer._four_bit else why_not_dense(layer))


if is_bnb_4bit_available():
    from peft.tuners.lora import bnb as peft_bnb

    class Linear4bit(_Shared, peft_bnb.Linear4bit):
        """`peft.tuners.lora.bnb.Linear4bit` whose forward runs on our kernels where it can, over the same bytes."""

        _four_bit = True

        def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            """x [..., in] -> [..., out] in the dtype of x, PEFT's function over the dequantized base."""
            y = grouped(self, x, *args, **kwargs) if SCOPE in self.__dict__ else None
            if y is None:
                y = _packed_forward(self, x) if not (args or kwargs) else _by_row(self)
            if y is not None:
                return y
            base = self._modules["base_layer"]
            if not base.__dict__.get("support_avx512bf16_for_cpu", False):
                return super().forward(x, *args, **kwargs)
            # An eval forward of the base would rewrite its bytes in a lossy layout.
            base.support_avx512bf16_for_cpu = False
            try:
                return super().forward(x, *args, **kwargs)
            finally:
                base.support_avx512bf16_for_cpu = True

        def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
            """PEFT's, which dequantizes, adds and requantizes; says so where it forgets the scale of a lora_bias."""
            names = self.active_adapters if adapter_names is None else adapter_names
            if any(self.lora_bias.get(name) for name in names):
                warnings.warn("PEFT merges the lora_bias of a 4-bit layer without its scaling", stacklevel=2)
            super().merge(safe_merge=safe_merge, adapter_names=adapter_names)

else:  # pragma: no cover - the tests' environment has bitsandbytes
    Linear4bit = peft_bnb = None  # type: ignore[assignment,misc]


def four_bit_layer(target: nn.Module, adapter_name: str, **keywords: Any) -> Any:
    """PEFT's `Linear4bit` over `target`; None where bitsandbytes is absent, or `target` or the model is not 4-bit."""
    return None if peft_bnb is None else peft_bnb.dispatch_bnb_4bit(target, adapter_name, **keywords)
