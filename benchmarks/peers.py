"""The floor and the peers: plain nn.Linear, bitsandbytes, PEFT on either base, Unsloth where it imports.

The floor is a frozen dense nn.Linear: its forward and dx are the two products nobody can avoid.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.cases import Case
from benchmarks.contenders import Built, Contender, Missing, Observed
from benchmarks.oracle import BASE, DENSE, PACKED, RANDOM, Drop, Inputs


def _frozen(inputs: Inputs) -> nn.Linear:
    n, k = inputs.w.shape
    linear = nn.Linear(k, n, bias=False, device="meta", dtype=inputs.w.dtype)
    linear.weight = nn.Parameter(inputs.w.clone(), requires_grad=False)
    return linear


def _bitsandbytes() -> Any:
    try:
        import bitsandbytes
    except (ImportError, OSError, RuntimeError) as error:
        raise Missing(f"bitsandbytes cannot be imported: {error}") from error
    return bitsandbytes


def _four_bit(case: Case, inputs: Inputs) -> nn.Module:
    """A Linear4bit over w, quantized once a weight."""
    layer = inputs.kept.get("Linear4bit")
    if layer is None:
        layer = inputs.kept["Linear4bit"] = _quantized(case, inputs)
    return copy.deepcopy(layer)


def _reference_bytes(inputs: Inputs) -> Any:
    """The reference's NF4 bytes of w, doubly quantized, as bitsandbytes' parameter."""
    from fastlora.nn.quantized import QuantizedWeight

    return QuantizedWeight(inputs.kept[PACKED], inputs.w.dtype).to_bnb()


def _quantized(case: Case, inputs: Inputs) -> nn.Module:
    bnb = _bitsandbytes()
    n, k = inputs.w.shape
    layer = bnb.nn.Linear4bit(
        k, n, bias=False, compute_dtype=case.dtype, compress_statistics=True, quant_type="nf4", device="meta"
    )
    if inputs.w.device.type == "cpu":
        # Its CPU quantizer needs 0.6 s here and takes the mean of the absmax values in fp32, which moves a few 8-bit
        # codes: in fp32 that alone would fail parity. So everybody gets the same bytes.
        layer.weight = _reference_bytes(inputs)
        return layer
    layer.weight = bnb.nn.Params4bit(
        inputs.w.clone(), requires_grad=False, compress_statistics=True, quant_type="nf4", blocksize=64
    )
    layer = layer.to(inputs.w.device)  # quantizes
    if getattr(layer.weight, "quant_state", None) is None:
        raise Missing(f"bitsandbytes did not quantize on {inputs.w.device.type}")
    return layer


def _set(leaf: Tensor, value: Tensor | None) -> Tensor:
    if value is None:
        raise Missing("the layer has a magnitude where the case has none")
    with torch.no_grad():
        leaf.copy_(value)
    return leaf


# --- floor and bases --------------------------------------------------------------------------------------------------


def _build_floor(case: Case, inputs: Inputs, copies: int) -> Built:
    return Built([_frozen(inputs) for _ in range(copies)], [{} for _ in range(copies)])


def _build_bnb(case: Case, inputs: Inputs, copies: int) -> Built:
    return Built([_four_bit(case, inputs).train(case.train) for _ in range(copies)], [{} for _ in range(copies)])


def _build_fp32(case: Case, inputs: Inputs, copies: int) -> Built:
    """The same layer for someone who computes in fp32 throughout: fp32 weight, input and gradient."""
    layers: list[Callable[[Tensor], Tensor]] = []
    for _ in range(copies):
        n, k = inputs.w.shape
        linear = nn.Linear(k, n, bias=False, device="meta")
        linear.weight = nn.Parameter(inputs.w.float(), requires_grad=False)
        layers.append(linear)
    return Built(layers, [{} for _ in range(copies)], dtype=torch.float32)


def _build_bnb_function(case: Case, inputs: Inputs, copies: int) -> Built:
    """`matmul_4bit` on canonical bytes: the module without its casts and without repacking in eval."""
    function = _bitsandbytes().matmul_4bit

    def layer(weight: Any) -> Callable[[Tensor], Tensor]:
        return lambda x: function(x, weight.data, weight.quant_state)

    layers = [layer(_four_bit(case, inputs).weight) for _ in range(copies)]
    return Built(list(layers), [{} for _ in range(copies)])


def _build_bnb_quantize(case: Case, inputs: Inputs, copies: int) -> Built:
    functional = _bitsandbytes().functional
    weights = [inputs.w.clone() for _ in range(copies)]

    def quantize(w: Tensor) -> tuple[Tensor, Any]:
        return functional.quantize_4bit(w, blocksize=64, compress_statistics=case.nested, quant_type="nf4")

    def observe(_: Tensor) -> Observed:
        """What its bytes stand for, decoded by the reference."""
        from fastlora.math import nf4
        from fastlora.nn.quantized import QuantizedWeight

        packed, state = quantize(weights[0])
        parameter = _bitsandbytes().nn.Params4bit(packed, requires_grad=False, quant_state=state, bnb_quantized=True)
        return Observed(nf4.dequantize(QuantizedWeight.from_bnb(parameter).pack(), torch.float32))

    layers = [functools.partial(lambda w, _: quantize(w)[0], w) for w in weights]
    return Built(list(layers), [{} for _ in range(copies)], observe=observe)


def _build_torch_mask(case: Case, inputs: Inputs, copies: int) -> Built:
    """The decision alone, as a bool tensor, from torch's generator."""

    def draw(_: Tensor) -> Tensor:
        return torch.empty(case.m, case.k, dtype=torch.bool, device=inputs.w.device).bernoulli_(1 - case.p)

    return Built([draw] * copies, [{} for _ in range(copies)])


def _build_bnb_dequantize(case: Case, inputs: Inputs, copies: int) -> Built:
    functional = _bitsandbytes().functional

    def layer(weight: Any) -> Callable[[Tensor], Tensor]:
        return lambda _: functional.dequantize_4bit(weight.data, weight.quant_state)

    return Built([layer(_four_bit(case, inputs).weight) for _ in range(copies)], [{} for _ in range(copies)])


# --- PEFT -------------------------------------------------------------------------------------------------------------


class _Holder(nn.Module):
    """The smallest model PEFT will adapt."""

    def __init__(self, linear: nn.Module, four_bit: bool) -> None:
        super().__init__()
        self.linear = linear
        self.is_loaded_in_4bit = four_bit  # how PEFT learns that it must use its 4-bit layer

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


def _peft_layer(case: Case, inputs: Inputs, adapter_dtype: torch.dtype) -> Any:
    try:
        import peft
    except (ImportError, OSError, RuntimeError) as error:
        raise Missing(f"peft cannot be imported: {error}") from error
    base = _four_bit(case, inputs) if case.quant else _frozen(inputs)
    config = peft.LoraConfig(
        r=case.r,
        lora_alpha=case.alpha,
        lora_dropout=case.p,
        use_dora=case.dora,
        target_modules=["linear"],
    )
    holder = _Holder(base, bool(case.quant))
    peft.get_peft_model(holder, config)  # swaps holder.linear in place
    layer: Any = holder.linear
    for parameter in (layer.lora_A["default"].weight, layer.lora_B["default"].weight):
        parameter.data = parameter.data.to(adapter_dtype)
    _set(layer.lora_A["default"].weight, inputs.a)
    _set(layer.lora_B["default"].weight, inputs.b)
    if case.dora:
        magnitude = layer.lora_magnitude_vector["default"]
        magnitude.weight.data = magnitude.weight.data.to(adapter_dtype)
        _set(magnitude.weight, inputs.mag)
    return layer.train(case.train)


def _peft_leaves(case: Case, layer: Any) -> dict[str, Tensor]:
    leaves = {"da": layer.lora_A["default"].weight, "db": layer.lora_B["default"].weight}
    if case.dora:
        leaves["dmag"] = layer.lora_magnitude_vector["default"].weight
    return leaves


def _peft_observe(layer: Any, p: float, x: Tensor) -> Observed:
    """The layer's own forward, its dropout's decisions read from what nn.Dropout let through."""
    seen: list[Tensor] = []

    def look(_: nn.Module, given: tuple[Tensor, ...], out: Tensor) -> None:
        seen.append((out != 0) | (given[0] == 0))

    hook = layer.lora_dropout["default"].register_forward_hook(look)
    try:
        y = layer(x)
    finally:
        hook.remove()
    return Observed(y, Drop(seen[0].detach(), 1 / (1 - p)) if p else None)


def _autocast(case: Case, inputs: Inputs, adapter_dtype: torch.dtype) -> Callable[[], AbstractContextManager[object]]:
    """Mixed precision as trainers run it: fp32 adapters over a 16-bit base mean autocast."""
    if adapter_dtype == case.dtype:
        return contextlib.nullcontext
    return lambda: torch.autocast(inputs.w.device.type, dtype=case.dtype)


def _build_peft(case: Case, inputs: Inputs, copies: int, same_dtype: bool) -> Built:
    adapter_dtype = case.dtype if same_dtype else torch.float32
    layers = [_peft_layer(case, inputs, adapter_dtype) for _ in range(copies)]
    return Built(
        layers,
        [_peft_leaves(case, layer) for layer in layers],
        context=_autocast(case, inputs, adapter_dtype),
        observe=functools.partial(_peft_observe, layers[0], case.p),
        note=f"{type(layers[0]).__module__}.{type(layers[0]).__name__}, adapters {adapter_dtype}",
    )


def _build_peft_norm(case: Case, inputs: Inputs, copies: int) -> Built:
    """The norm as PEFT's DoRA layer recomputes it in every forward."""
    from peft.utils.integrations import dequantize_module_weight

    def call(layer: Any, _: Tensor) -> Tensor:
        vector = layer.lora_magnitude_vector["default"]
        product = vector.get_lora_weight(lora_A=layer.lora_A["default"], lora_B=layer.lora_B["default"])
        weight = dequantize_module_weight(layer.base_layer).to(product.dtype)
        return vector.get_weight_norm(weight=weight, lora_weight=product, scaling=case.scale).detach()

    layers = [functools.partial(call, _peft_layer(case, inputs, torch.float32)) for _ in range(copies)]
    return Built(list(layers), [{} for _ in range(copies)])


# --- Unsloth ----------------------------------------------------------------------------------------------------------


def _build_unsloth(case: Case, inputs: Inputs, copies: int) -> Built:
    """Unsloth's one-projection autograd Function over the same bitsandbytes weight."""
    try:
        function = importlib.import_module("unsloth.kernels.fast_lora").LoRA_W
    except (ImportError, OSError, RuntimeError) as error:  # RuntimeError: it refuses to import without a GPU
        raise Missing(f"unsloth cannot be imported: {error}") from error
    layers: list[Callable[[Tensor], Tensor]] = []
    leaves: list[dict[str, Tensor]] = []

    def layer(weight: Any, state: Any, a: Tensor, b: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda x: function.apply(x.unsqueeze(0), weight, state, a, b, case.scale).squeeze(0)

    for _ in range(copies):
        base: Any = (_four_bit(case, inputs) if case.quant else _frozen(inputs)).weight
        a, b = inputs.a.clone().requires_grad_(), inputs.b.clone().requires_grad_()
        layers.append(layer(base, getattr(base, "quant_state", None), a, b))
        leaves.append({"da": a, "db": b})
    return Built(layers, leaves)


def peers() -> list[Contender]:
    """Every peer, whether or not it can be imported here."""
    return [
        Contender("floor", "floor", lambda case: case.op == "linear", _build_floor, DENSE),
        Contender("bitsandbytes", "base", lambda case: case.op == "linear" and bool(case.quant), _build_bnb, BASE),
        Contender(
            "peft",
            "peer",
            lambda case: case.op == "linear",
            functools.partial(_build_peft, same_dtype=False),
        ),
        Contender(
            "peft-16bit",
            "peer",
            lambda case: case.op == "linear" and case.dtype.itemsize == 2,
            functools.partial(_build_peft, same_dtype=True),
        ),
        Contender(
            "unsloth",
            "peer",
            lambda case: case.op == "linear" and case.p == 0 and not case.dora and case.train,
            _build_unsloth,
        ),
        Contender("bitsandbytes", "peer", lambda case: case.op == "dequantize", _build_bnb_dequantize),
        Contender("peft", "peer", lambda case: case.op == "dora_norm", _build_peft_norm),
    ]


def cpu_peers() -> list[Contender]:
    """Whom the CPU benchmarks add: nn.Linear in fp32 under a 16-bit case, and peers of the ops besides dequantize."""
    return [
        Contender(
            "linear-fp32", "floor", lambda case: case.op == "linear" and case.dtype.itemsize == 2, _build_fp32, DENSE
        ),
        Contender("bitsandbytes", "peer", lambda case: case.op == "quantize", _build_bnb_quantize),
        Contender("torch", "peer", lambda case: case.op == "dropout_mask", _build_torch_mask, RANDOM),
    ]


def bnb_function() -> Contender:
    """bitsandbytes' functional product, in the place of its layer."""
    return Contender(
        "bitsandbytes", "base", lambda case: case.op == "linear" and bool(case.quant), _build_bnb_function, BASE
    )
