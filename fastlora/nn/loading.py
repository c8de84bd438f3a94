"""Loading a layer's state dict: everything is checked before anything changes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from fastlora.errors import FastloraError, StateDictError
from fastlora.io import bnb
from fastlora.nn.quantized import PARTS, QuantizedWeight
from fastlora.nn.sharded import fill

if TYPE_CHECKING:
    from fastlora.nn.adapted import AdaptedLinear

Load = Callable[[], None]


def _mine(state_dict: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    return {key[len(prefix) :]: value for key, value in state_dict.items() if key.startswith(prefix)}


def _parameter_load(owner: nn.Module, name: str, value: Any, label: str, assign: bool) -> Load:
    parameter = owner._parameters[name]
    assert parameter is not None
    if not isinstance(value, Tensor):
        raise StateDictError(f"{label}: expected a tensor, got {type(value).__name__}")
    if tuple(value.shape) != tuple(parameter.shape):
        raise StateDictError(f"{label}: expected shape {tuple(parameter.shape)}, got {tuple(value.shape)}")
    if not value.is_floating_point():
        raise StateDictError(f"{label}: expected a floating-point tensor, got {value.dtype}")
    if value.is_meta and not parameter.is_meta and not assign:
        raise StateDictError(f"{label}: expected a tensor with data, got a meta tensor")
    if assign or (parameter.is_meta and not value.is_meta):
        new = nn.Parameter(value.detach(), requires_grad=parameter.requires_grad)
        return lambda: owner.register_parameter(name, new)

    return lambda: fill(parameter, value)


def _weight_load(layer: AdaptedLinear, entries: dict[str, Any], assign: bool) -> tuple[list[Load], set[str]]:
    """How to load the base weight, and the keys that takes (empty: the state dict has none)."""
    used = {key for key in entries if key == "weight" or key.startswith("weight.")}
    if not used:
        return [], used
    weight = layer.weight
    if not isinstance(weight, QuantizedWeight):
        if "weight" not in used:
            raise StateDictError(f"weight: expected a dense weight, got the 4-bit keys {sorted(used)}")
        return [_parameter_load(layer, "weight", entries["weight"], "weight", assign)], {"weight"}
    parts = {key.removeprefix("weight").removeprefix("."): entries[key] for key in used}
    if set(parts) == {""} and isinstance(parts[""], Tensor) and parts[""].is_floating_point():
        dense = parts[""]
        if tuple(dense.shape) != tuple(weight.shape):
            raise StateDictError(f"weight: expected shape {tuple(weight.shape)}, got {tuple(dense.shape)}")
        if weight.device.type != "meta":
            dense = dense.to(weight.device)
        fresh = QuantizedWeight.from_float(dense.detach(), weight.quant_type, weight.blocksize, weight.nested)
        return [weight.read(dict(fresh.state_dict()))], used
    if not all(isinstance(value, Tensor) for value in parts.values()):
        raise StateDictError(f"weight: expected tensors, got {sorted(used)}")
    return [weight.read(parts, assign)], used


def plan(layer: AdaptedLinear, entries: dict[str, Any], assign: bool) -> tuple[list[Load], list[str], list[str]]:
    """What would be loaded, and the missing and unexpected keys; changes nothing.

    Raises:
        StateDictError: an entry that does not fit, or half an adapter.
    """
    loads, used = _weight_load(layer, entries, assign)
    missing = [] if used else sorted(_weight_keys(layer))
    if layer.bias is not None and "bias" in entries:
        loads.append(_parameter_load(layer, "bias", entries["bias"], "bias", assign))
        used |= {"bias"}
    elif layer.bias is not None:
        missing.append("bias")
    for name in layer.lora_A:
        groups = [(key, group) for key, group in layer.adapter_groups().items() if name in group]
        have = [key for key, _ in groups if f"{key}.{name}" in entries]
        if have and len(have) < len(groups):
            lacking = next(key for key, _ in groups if key not in have)
            raise StateDictError(f"adapter {name!r} is incomplete: missing {lacking}.{name}")
        for key, group in groups:
            label = f"{key}.{name}"
            if label in entries:
                loads.append(_parameter_load(group, name, entries[label], label, assign))
                used |= {label}
            else:
                missing.append(label)
    return loads, missing, sorted(set(entries) - used)


def _weight_keys(layer: AdaptedLinear) -> list[str]:
    if not isinstance(layer.weight, QuantizedWeight):
        return ["weight"]
    present = [name for name in PARTS if getattr(layer.weight, name) is not None]
    return [f"weight.{name}" for name in (*present, "quant_state")]


def load_layer(
    layer: AdaptedLinear,
    state_dict: Mapping[str, Any],
    prefix: str,
    local_metadata: Mapping[str, Any],
    missing_keys: list[str],
    unexpected_keys: list[str],
    error_msgs: list[str],
) -> None:
    """What `nn.Module._load_from_state_dict` does, for the layer and its children at once, all or nothing."""
    try:
        assign = bool(local_metadata.get("assign_to_params_buffers", False))
        loads, missing, unexpected = plan(layer, _mine(state_dict, prefix), assign)
    except FastloraError as error:
        error_msgs.append(f"{prefix}{error}")
        return
    missing_keys.extend(prefix + key for key in missing)
    unexpected_keys.extend(prefix + key for key in unexpected)
    for load in loads:
        load()


def load_strictly(
    layer: AdaptedLinear, load: Callable[..., Any], state_dict: Mapping[str, Any], strict: bool, assign: bool
) -> Any:
    """`load_state_dict` of a single layer: check, then load; raises before anything has changed."""
    try:
        _, missing, unexpected = plan(layer, dict(state_dict), assign)
    except StateDictError:
        raise
    except FastloraError as error:
        raise StateDictError(str(error)) from None
    if strict and (missing or unexpected):
        raise StateDictError(
            f"state dict does not fit {type(layer).__name__}: missing keys {missing or 'none'}, "
            f"unexpected keys {unexpected or 'none'}"
        )
    return load(state_dict, strict=strict, assign=assign)


def bnb_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The model's state dict with every 4-bit weight under bitsandbytes' keys (`fastlora.io.bnb`).

    Returns:
        name -> tensor; the tensors share memory with the model's.
    """
    state: dict[str, Tensor] = dict(model.state_dict())
    for name, module in model.named_modules():
        if isinstance(module, QuantizedWeight):
            prefix = f"{name}." if name else ""
            for part in (*PARTS, "quant_state"):
                state.pop(f"{prefix}{part}", None)
            for key, value in bnb.to_state(module.pack(), module.dtype).items():
                state[f"{prefix}{key}".removesuffix(".")] = value
    return state
