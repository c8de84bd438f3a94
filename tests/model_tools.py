"""What the model tests share: a tiny Llama, its logits, adapters off their start, snapshots of a whole model."""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from fastlora.nn.adapted import AdaptedLinear
from fastlora.nn.quantized import QuantizedWeight
from fastlora.nn.targets import adapted_layers

PREFIX = "base_model.model."
ATTENTION = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
MLP = ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
LINEARS = [f"model.layers.{i}.{name}" for i in range(2) for name in ATTENTION + MLP]


def llama(tied: bool = False, bias: bool = True, dtype: torch.dtype = torch.float32, seed: int = 0) -> LlamaForCausalLM:
    """Two layers of width 32, with random weights, norms and biases; the same for the same seed."""
    config = LlamaConfig(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        attention_bias=bias,
        mlp_bias=bias,
        tie_word_embeddings=tied,
        max_position_embeddings=64,
    )
    state = torch.random.get_rng_state()
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:
                parameter.normal_(0, parameter.shape[1] ** -0.5)
            else:
                parameter.normal_(1.0 if "norm" in name else 0.0, 0.2)
    torch.random.set_rng_state(state)
    return model.to(dtype).eval()


def tokens(rows: int = 3, length: int = 7) -> Tensor:
    return torch.arange(rows * length).mul(17).remainder(61).reshape(rows, length)


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(input_ids=tokens()).logits.detach().float()


def move(model: nn.Module, seed: int = 3) -> nn.Module:
    """Give everything that trains another value, so that its effect on the logits is as large as the base's."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue
            noise = torch.randn(parameter.shape, generator=generator)
            if "magnitude" in name:
                parameter.mul_(1 + 0.3 * noise)
            elif "lora_" in name:
                parameter.copy_(noise * (0.5 * parameter.shape[1] ** -0.5))
            else:
                parameter.add_(0.3 * noise)
    return model


def close(got: Tensor, want: Tensor, base: Tensor | None, tolerance: float = 2e-5) -> None:
    """Equal to `tolerance` of the largest value; `base` (the logits without adapter) must be far from both."""
    assert want.isfinite().all()
    scale = want.abs().max()
    if base is not None:
        moved = (want - base).abs().max() / scale
        assert moved > 100 * tolerance, f"the adapter moves the logits by only {moved:.1e}: the test shows nothing"
    error = (got - want).abs().max() / scale
    assert error <= tolerance, f"difference {error:.2e}, allowed {tolerance:.0e}"


def whole(model: nn.Module) -> dict[str, Any]:
    """All there is to a model: bytes, module types, requires_grad, adapters, and which objects its parameters are."""
    state: dict[str, Any] = {}
    for name, t in [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]:
        data = t.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        state[name] = (type(t).__name__, t.dtype, tuple(t.shape), t.requires_grad, id(t), data)
    for name, module in model.named_modules(remove_duplicate=False):
        state[f"{name}:module"] = (type(module).__name__, module.training, id(module))
        if isinstance(module, AdaptedLinear):
            records = module.scaling, module.adapter_configs, module.init_record
            state[f"{name}:adapters"] = (list(module.active_adapters), module.merged, *map(dict, records))
        if isinstance(module, QuantizedWeight):
            state[f"{name}:format"] = (module.quant_type, module.blocksize, tuple(module.shape), module.dtype)
    return state


@contextlib.contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """The model is the same afterwards, to the byte and the object."""
    before = whole(model)
    yield
    after = whole(model)
    assert after.keys() == before.keys()
    differ = [key for key in before if before[key] != after[key]]
    assert not differ, f"changed: {differ[:5]}"


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """No Python warning, and nothing logged at warning level by peft or transformers."""
    records: list[logging.LogRecord] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = records.append  # type: ignore[method-assign]
    loggers = [logging.getLogger(name) for name in ("peft", "transformers", "safetensors")]
    for logger in loggers:
        logger.addHandler(handler)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield
    finally:
        for logger in loggers:
            logger.removeHandler(handler)
    # Deprecations are between peft and transformers, not about the folder.
    told = [w for w in caught if not issubclass(w.category, (DeprecationWarning, FutureWarning))]
    said = [str(w.message) for w in told] + [record.getMessage() for record in records]
    assert not said, f"expected silence, got {said[:3]}"


def layers_of(model: nn.Module) -> dict[str, AdaptedLinear]:
    return dict(adapted_layers(model))


def contents(folder: Path) -> dict[str, bytes]:
    """Every file under a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def undo_quantization(plain: nn.Module, converted: nn.Module) -> nn.Module:
    """Give a plain model the values that the converted one's 4-bit weights have."""
    modules = dict(plain.named_modules())
    with torch.no_grad():
        for name, layer in layers_of(converted).items():
            modules[name].weight.copy_(layer.dequantize(torch.float32))
    return plain
