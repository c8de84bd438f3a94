"""fastlora itself, as one more contender: what cannot be imported, built or run becomes a reason."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.cases import Case
from benchmarks.contenders import Built, Contender, Missing, Observed
from benchmarks.oracle import MASK_SEED, Drop, Inputs

_SEED = 20260101
PLANS = ("merge", "split", "dense", "fused", "skinny")


def _package() -> Any:
    try:
        import fastlora
    except (ImportError, OSError, RuntimeError) as error:
        raise Missing(f"fastlora cannot be imported: {error}") from error
    return fastlora


def _layer(case: Case, inputs: Inputs, adapter_dtype: torch.dtype) -> Any:
    package = _package()
    name = "QLoraLinear" if case.quant else "LoraLinear"
    kind = getattr(package, name, None)
    if kind is None:
        raise Missing(f"fastlora has no {name}")
    n, k = inputs.w.shape
    linear = nn.Linear(k, n, bias=False, device="meta", dtype=inputs.w.dtype)
    linear.weight = nn.Parameter(inputs.w.clone(), requires_grad=False)
    layer = kind.from_linear(
        linear,
        r=case.r,
        lora_alpha=case.alpha,
        lora_dropout=case.p,
        use_dora=case.dora,
        dora_dropout=case.dora_dropout,
        adapter_dtype=adapter_dtype,
    ).train(case.train)
    with torch.no_grad():
        layer.lora_A["default"].copy_(inputs.a)
        layer.lora_B["default"].copy_(inputs.b)
        if case.dora:
            layer.lora_magnitude["default"].copy_(inputs.mag)
    return layer


def _leaves(case: Case, layer: Any) -> dict[str, Tensor]:
    leaves = {"da": layer.lora_A["default"], "db": layer.lora_B["default"]}
    if case.dora:
        leaves["dmag"] = layer.lora_magnitude["default"]
    return leaves


def _observe(layer: Any, p: float, x: Tensor) -> Observed:
    """The layer's own forward; its decisions come from the specification, on the seed it must have drawn."""
    if p == 0:
        return Observed(layer(x))
    from fastlora.math import philox

    torch.manual_seed(_SEED)
    y = layer(x)
    torch.manual_seed(_SEED)
    seed = torch.ops.fastlora.draw_seed(torch.empty((1,), dtype=torch.int64, device=x.device))
    m, k = x.shape
    bits = philox.dropout_bits(seed, 0, m, k, p, device=x.device)
    return Observed(y, Drop(philox.unpack_bits(bits, k), philox.keep_scale(p)))


def _explain(case: Case, layer: Any) -> str:
    return str(layer.explain(case.m, case.dtype)) if hasattr(layer, "explain") else ""


def _build(case: Case, inputs: Inputs, copies: int, same_dtype: bool) -> Built:
    layers = [_layer(case, inputs, case.dtype if same_dtype else torch.float32) for _ in range(copies)]
    return Built(
        layers,
        [_leaves(case, layer) for layer in layers],
        observe=functools.partial(_observe, layers[0], case.p),
        note=_explain(case, layers[0]),
    )


def _quantized(case: Case, inputs: Inputs) -> Any:
    quantize = getattr(getattr(_package(), "functional", None), "quantize", None)
    if quantize is None:
        raise Missing("fastlora has no functional.quantize")
    return quantize(inputs.w, "nf4", 64, double_quant=True)


def _build_dequantize(case: Case, inputs: Inputs, copies: int) -> Built:
    weights = [_quantized(case, inputs) for _ in range(copies)]
    calls = [functools.partial(lambda weight, _: weight.dequantize(case.dtype), weight) for weight in weights]
    return Built(list(calls), [{} for _ in range(copies)])


def _build_norm(case: Case, inputs: Inputs, copies: int) -> Built:
    weights = [_quantized(case, inputs) for _ in range(copies)]
    norm = getattr(_package().functional, "dora_weight_norm", None)
    if norm is None:
        raise Missing("fastlora has no functional.dora_weight_norm")
    calls = [
        functools.partial(lambda weight, _: norm(weight, inputs.a, inputs.b, case.scale), weight) for weight in weights
    ]
    return Built(list(calls), [{} for _ in range(copies)])


def _build_function(case: Case, inputs: Inputs, copies: int, backend: str | None = None) -> Built:
    """`functional.lora_linear` or `qlora_linear` on plain tensors; with a backend, forced in both directions."""
    functional = _package().functional
    linear = functional.qlora_linear if case.quant else functional.lora_linear
    layers, leaves = [], []
    for _ in range(copies):
        weight = _quantized(case, inputs) if case.quant else inputs.w.clone()
        given = {"da": inputs.a, "db": inputs.b} | ({"dmag": inputs.mag} if inputs.mag is not None else {})
        own = {name: value.clone().requires_grad_(case.train) for name, value in given.items()}
        call = functools.partial(_call, linear, weight, own, case, backend)
        layers.append(call)
        leaves.append(own)
    return Built(layers, leaves, observe=functools.partial(_observe, layers[0], case.p))


def _call(linear: Any, weight: Any, own: dict[str, Tensor], case: Case, backend: str | None, x: Tensor) -> Tensor:
    p = case.p if case.train else 0.0
    kwargs = {"magnitude": own.get("dmag"), "dora_dropout": case.dora_dropout, "backend": backend}
    return linear(x, weight, own["da"], own["db"], case.scale, dropout_p=p, **kwargs)


def _plan_takes(plan: str, case: Case) -> bool:
    """Whether the Triton backend's plan is meant for the case; that it cannot run here at all does not count.

    Only cases with a target: on every case the plans' compilation alone would use up the report's time.
    """
    if case.op != "linear" or case.target is None:
        return False
    package = _package()
    from fastlora.dispatch import registry
    from fastlora.problem import DENSE, DORA, DROPOUT, Format, Problem

    package.backends.load()
    fmt = Format(case.quant, 64, case.nested) if case.quant else DENSE
    flags = (DROPOUT if case.p else 0) | (DORA if case.dora else 0)
    problem = Problem("lora_fwd", case.m, case.n, case.k, case.r, case.dtype, torch.float32, fmt, flags, "cuda")
    for kernel in registry.kernels("lora_fwd"):
        if (kernel.backend, kernel.plan) == ("triton", plan):
            limits = dataclasses.replace(kernel.limits, missing=lambda: "", devices=None)
            return not registry.why_not(dataclasses.replace(kernel, limits=limits), problem)
    return False


def _build_plan(case: Case, inputs: Inputs, copies: int, plan: str) -> Built:
    """The functional form, one plan forced."""
    package = _package()
    built = _build_function(case, inputs, copies, f"triton:{plan}")
    try:
        built.layers[0](inputs.x)  # compiles; what cannot run at all says why
    except package.UnsupportedError as error:
        raise Missing("; ".join(why for reasons in error.reasons.values() for why in reasons)) from error
    return built


def _build_quantize(case: Case, inputs: Inputs, copies: int) -> Built:
    quantize = _package().functional.quantize
    weights = [inputs.w.clone() for _ in range(copies)]

    def observe(_: Tensor) -> Observed:
        """What its bytes stand for, decoded by the reference."""
        from fastlora.math import nf4

        return Observed(nf4.dequantize(quantize(weights[0], "nf4", 64, case.nested).pack(), torch.float32))

    layers = [functools.partial(lambda w, _: quantize(w, "nf4", 64, case.nested).packed, w) for w in weights]
    return Built(list(layers), [{} for _ in range(copies)], observe=observe)


def _build_mask(case: Case, inputs: Inputs, copies: int) -> Built:
    """The packed decision, as the layers save it."""
    _package()
    seed = torch.tensor([MASK_SEED], device=inputs.w.device)

    def draw(_: Tensor) -> Tensor:
        return torch.ops.fastlora.dropout_mask(seed, 0, case.m, case.k, case.p, "")

    def observe(x: Tensor) -> Observed:
        from fastlora.math import philox

        return Observed(philox.unpack_bits(draw(x), case.k))

    return Built([draw] * copies, [{} for _ in range(copies)], observe=observe)


def function() -> Contender:
    """The functional form, in the place of the layers."""
    return Contender("fastlora", "ours", lambda case: case.op == "linear", _build_function)


def ours() -> list[Contender]:
    """fastlora's layers with fp32 adapters (the default) and with 16-bit ones, its ops, and each plan forced."""
    plans = [
        Contender(
            f"fastlora:{plan}",
            "plan",
            functools.partial(_plan_takes, plan),
            functools.partial(_build_plan, plan=plan),
        )
        for plan in PLANS
    ]
    return [
        Contender("fastlora", "ours", lambda case: case.op == "linear", functools.partial(_build, same_dtype=False)),
        Contender(
            "fastlora-16bit",
            "ours",
            lambda case: case.op == "linear" and case.dtype.itemsize == 2 and case.train,
            functools.partial(_build, same_dtype=True),
        ),
        Contender("fastlora", "ours", lambda case: case.op == "dequantize", _build_dequantize),
        Contender("fastlora", "ours", lambda case: case.op == "dora_norm", _build_norm),
        Contender("fastlora", "ours", lambda case: case.op == "quantize", _build_quantize),
        Contender("fastlora", "ours", lambda case: case.op == "dropout_mask", _build_mask),
        *plans,
    ]
