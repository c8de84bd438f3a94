"""What the tests of accelerated PEFT models share: single PEFT layers of a `Case`, a small Llama, training runs."""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Callable
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import bitsandbytes
import peft
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import fastlora
from benchmarks import adoption_runs
from benchmarks.adoption_runs import LINEARS, quantized
from fastlora import functional, testing
from fastlora.io import bnb
from fastlora.math.nf4 import PackedWeight
from fastlora.nn import accelerate as accelerating
from fastlora.ops.lora import draw_seed
from fastlora.testing import Case, Inputs, Outputs

# --- one layer --------------------------------------------------------------------------------------------------------


def params_4bit(weight: PackedWeight, dtype: torch.dtype = torch.float32, storage: torch.dtype = torch.uint8) -> Any:
    """bitsandbytes' parameter over the bytes of one of ours."""
    entries = bnb.to_state(weight, dtype)
    data = entries.pop("").view(-1).view(storage).view(-1, 1)
    return bitsandbytes.nn.Params4bit.from_prequantized(data, entries, requires_grad=False, device="cpu")


def linear_4bit(
    weight: PackedWeight, bias: Tensor | None, compute: torch.dtype | None, storage: torch.dtype = torch.uint8
) -> Any:
    """A `bitsandbytes.nn.Linear4bit` that holds a packed weight."""
    n, k = weight.shape
    base = bitsandbytes.nn.Linear4bit(k, n, bias is not None, compute_dtype=compute, quant_type=weight.quant_type)
    base.weight = params_4bit(weight, storage=storage)
    base.weight.module, base.quant_state = base, base.weight.quant_state
    if bias is not None:
        base.bias = nn.Parameter(bias, requires_grad=False)
    return base


def wrap(base: nn.Module, adapters: tuple[str, ...] = ("default",), **fields: Any) -> Any:
    """A `peft.LoraModel` of one layer, `model.lin`."""
    model = nn.ModuleDict({"lin": base})
    model.is_loaded_in_4bit = isinstance(base, bitsandbytes.nn.Linear4bit)  # type: ignore[assignment]
    config = peft.LoraConfig(target_modules=["lin"], **fields)
    wrapped: Any = peft.LoraModel(model, config, adapters[0])
    for name in adapters[1:]:
        wrapped.peft_config[name] = peft.LoraConfig(target_modules=["lin"], **fields)
        wrapped.inject_adapter(wrapped.model, name)
    return wrapped


def layer_of(case: Case, inputs: Inputs, **fields: Any) -> Any:
    """PEFT's layer with the numbers of a case; not accelerated."""
    bias = None if inputs.bias is None else inputs.bias.clone()
    base: Any
    if isinstance(inputs.weight, PackedWeight):
        base = linear_4bit(inputs.weight, bias, case.dtype)
    else:
        base = nn.Linear(case.k, case.n, bias is not None)
        base.weight = nn.Parameter(inputs.weight.clone(), requires_grad=False)
        if bias is not None:
            base.bias = nn.Parameter(bias, requires_grad=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        layer = wrap(base, r=case.r, lora_dropout=case.p, use_dora=case.dora, **fields).model["lin"]
    layer.scaling["default"] = case.scale
    layer.lora_A["default"].weight = nn.Parameter(inputs.a.clone())
    layer.lora_B["default"].weight = nn.Parameter(inputs.b.clone())
    if inputs.mag is not None:
        layer.lora_magnitude_vector["default"].weight = nn.Parameter(inputs.mag.clone())
    return layer.train()


def parameters(layer: Any, name: str = "default") -> dict[str, Tensor | None]:
    """a, b, mag of an adapter and the base bias, by the names of `Outputs` without their d."""
    magnitude = layer.lora_magnitude_vector[name].weight if name in layer.lora_magnitude_vector else None
    bias = layer.base_layer.bias
    return {"a": layer.lora_A[name].weight, "b": layer.lora_B[name].weight, "mag": magnitude, "bias": bias}


def run_layer(layer: Any, inputs: Inputs) -> Outputs:
    """y and every gradient of a layer, by autograd; the base bias trains where there is one."""
    x, found = inputs.x.clone().requires_grad_(), parameters(layer)
    if found["bias"] is not None:
        found["bias"].requires_grad_()
    y = layer(x)
    wanted = {"x": x} | {name: t for name, t in found.items() if t is not None}
    grads = dict(zip(wanted, torch.autograd.grad(y, list(wanted.values()), inputs.dy.to(y.dtype)), strict=True))
    return Outputs(y.detach(), *(grads.get(name) for name in ("x", "a", "b", "mag", "bias")))  # type: ignore[arg-type]


def next_mask(shape: tuple[int, ...], p: float, stream: int = 0) -> Tensor:
    """The dropout decision that the next accelerated call will take; torch's generator is left as it was."""
    state = torch.random.get_rng_state()
    keep = functional.dropout_mask(shape, p, draw_seed(torch.device("cpu")), stream)
    torch.random.set_rng_state(state)
    return keep


def judged(case: Case, **fields: Any) -> list[str]:
    """Violations of the error budget by the accelerated layer of a case."""
    inputs = testing.make_inputs(case)
    layer = layer_of(case, inputs, **fields)
    fastlora.accelerate(layer)
    if case.p:
        inputs = inputs._replace(keep=next_mask((case.m, case.k), case.p))
    out = run_layer(layer, inputs)
    assert fused(layer)
    return testing.judge(case, inputs, out)


def fused(layer: Any) -> bool:
    """Whether the layer's last call, and its next, ran our kernels."""
    return accelerating.is_ours(layer) and not accelerating.why_left(layer) and not layer._fastlora_left


# --- a model ----------------------------------------------------------------------------------------------------------


def llama(bias: bool = True, quant: str = "", nested: bool = True, tied: bool = False) -> Any:
    """Two layers of width 64 with random weights, the same every time; its linears in NF4 or FP4 if asked for."""
    config = LlamaConfig(
        vocab_size=61,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        attention_bias=bias,
        mlp_bias=bias,
        tie_word_embeddings=tied,
        max_position_embeddings=64,
    )
    state = torch.random.get_rng_state()
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            spread = parameter.shape[1] ** -0.5 if parameter.dim() == 2 else 0.1
            parameter.normal_(1.0 if "norm" in name else 0.0, spread)
    torch.random.set_rng_state(state)
    return quantized(model, quant, nested) if quant else model.eval()


def adapted(model: Any, **fields: Any) -> Any:
    """A seeded `PeftModel` over all linears."""
    fields = {"r": 4, "lora_alpha": 8, "target_modules": LINEARS} | fields
    torch.manual_seed(1)
    return peft.get_peft_model(model, peft.LoraConfig(**fields))


def batch(step: int = 0, rows: int = 2, length: int = 12) -> Tensor:
    """Token numbers that differ from step to step."""
    return (torch.arange(rows * length) * 17 + step * 5 + step * step).remainder(61).reshape(rows, length)


def train(model: Any, steps: int = 50, lr: float = 1e-2, fresh: bool = True) -> list[float]:
    """Losses of a seeded AdamW run, on a fresh batch at every step or always on the same."""
    batches = [batch(step if fresh else 0) for step in range(steps)]
    return adoption_runs.losses(model, batches, lambda net, ids: net(input_ids=ids, labels=ids).loss, lr)


def shake(model: nn.Module, seed: int = 3) -> nn.Module:
    """Give every adapter tensor another value, so that its effect is as large as the base's."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
            if "magnitude" in name:
                parameter.mul_(1 + 0.3 * noise)
            elif "lora_" in name:
                parameter.copy_(noise * 0.5 * parameter.shape[-1] ** -0.5)
    return model


def logits(model: Any, **keywords: Any) -> Tensor:
    """What the model says about the first batch, without gradient."""
    with torch.no_grad():
        return model(input_ids=batch(), **keywords).logits.float()


def twins(make: Callable[[], Any], **keywords: Any) -> tuple[Any, Any]:
    """PEFT's model and a copy of it, accelerated."""
    theirs = make()
    return theirs, fastlora.accelerate(copy.deepcopy(theirs), **keywords)


def close(got: Tensor, want: Tensor, tolerance: float = 1e-5) -> None:
    """Logits equal but for fp32 sums in another order, through two layers; layers have their own, exact, budgets."""
    assert want.isfinite().all()
    error = (got - want).abs().max() / want.abs().max()
    assert error <= tolerance, f"difference {error:.2e} of the largest value, allowed {tolerance:.0e}"
