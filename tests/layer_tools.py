"""What the layer tests share: backends to run under, budgets, snapshots of a module, PEFT's twin of a layer."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastlora import LoraConfig, LoraLinear, QLoraLinear, QuantizedWeight, backends, settings
from fastlora.dispatch import registry
from fastlora.testing import roundoff

backends.load()
OPS = ("quantize", "quantize_absmax", "dequantize", "dropout_mask", "dora_norm", "lora_fwd", "lora_bwd")
AdaptedLayer = LoraLinear | QLoraLinear


def able_backends() -> list[str]:
    """Backends that have a runnable CPU kernel for every op of a layer."""
    found = []
    for name in registry.backends():
        mine = [k for k in registry.kernels() if k.backend == name and not k.limits.missing()]
        on_cpu = [k for k in mine if k.limits.devices is None or "cpu" in k.limits.devices]
        if {k.op for k in on_cpu} >= set(OPS):
            found.append(name)
    return found


BACKENDS = able_backends()


def forced(backend: str) -> Any:
    """All ops by one backend; a backend that cannot run one of them raises."""
    return settings.override(backend=backend)


def make(kind: str, k: int = 48, n: int = 40, bias: bool = True, dtype: torch.dtype = torch.float32, **fields: Any):
    """A LoraLinear ("lora") or QLoraLinear ("qlora") with a seeded base; B is zero unless init_lora_weights says so."""
    torch.manual_seed(1234)
    fields.setdefault("r", 4)
    if kind == "qlora":
        fields.setdefault("blocksize", 32)
        layer = QLoraLinear(k, n, bias, **fields)
        if layer.bias is not None:
            layer.bias.data = layer.bias.data.to(dtype)
        return layer
    return LoraLinear(k, n, bias, dtype=dtype, **fields)


def shake(layer: AdaptedLayer, seed: int = 7) -> AdaptedLayer:
    """Move every adapter tensor off its start, so that the adapter's effect is as large as the base's."""
    generator = torch.Generator().manual_seed(seed)
    for group, spread in ((layer.lora_A, layer.in_features), (layer.lora_B, 0)):
        for name, parameter in group.items():
            config: LoraConfig = layer.adapter_configs[name]
            deviation = (1 / spread if spread else 1 / config.r) ** 0.5 / (max(abs(layer.scaling[name]), 1e-3) ** 0.5)
            parameter.data = (torch.randn(parameter.shape, generator=generator) * deviation).to(parameter.dtype)
    for name, parameter in layer.lora_magnitude.items():
        norm = layer.weight_norm(name).float()
        parameter.data = (norm * (1 + 0.3 * torch.randn(norm.shape, generator=generator))).to(parameter.dtype)
    return layer


def snapshot(module: nn.Module) -> dict[str, tuple[Any, ...]]:
    """Every parameter and buffer to the byte, with dtype, device, requires_grad and training mode of each module."""
    state: dict[str, tuple[Any, ...]] = {
        name: (
            type(t).__name__,
            t.dtype,
            tuple(t.shape),
            t.device.type,
            t.requires_grad,
            None if t.is_meta else t.detach().contiguous().reshape(-1).view(torch.uint8).tolist(),
        )
        for name, t in [*module.named_parameters(), *module.named_buffers()]
    }
    for name, child in module.named_modules():
        state[f"{name}:module"] = (type(child).__name__, child.training)
        if isinstance(child, (LoraLinear, QLoraLinear)):
            state[f"{name}:adapters"] = (
                list(child.active_adapters),
                dict(child.scaling),
                dict(child.adapter_configs),
                dict(child.init_record),
                child.merged,
            )
        if hasattr(child, "quant_type") and hasattr(child, "pack"):
            state[f"{name}:format"] = (child.quant_type, child.blocksize, tuple(child.shape), child.dtype)
    return state


def outline(model: nn.Module) -> Any:
    """All a failed convert could have changed: modules, parameters' identity and values, requires_grad."""
    return snapshot(model), [id(module) for module in model.modules()], [id(p) for p in model.parameters()]


def grads(run: Callable[[Tensor], Tensor], x: Tensor, dy: Tensor, parameters: list[Tensor]) -> list[Tensor]:
    """y, dx and the gradient of each parameter."""
    x = x.detach().clone().requires_grad_()
    y = run(x)
    return [y.detach(), *torch.autograd.grad(y, [x, *parameters], dy.to(y.dtype))]


def same(got: Tensor, want: Tensor) -> None:
    """Bit for bit, with shape and dtype."""
    assert got.dtype == want.dtype
    assert got.shape == want.shape
    assert torch.equal(got, want), f"largest difference {(got.double() - want.double()).abs().max():.3e}"


def near(got: Tensor, want: Tensor, allowed: Tensor | None = None, units: float = 2.0, what: str = "") -> None:
    """‖got − want‖ ≤ 1.5‖allowed − want‖ + units·u·‖want‖, u of got's dtype; `allowed` is a peer at the same dtypes."""
    assert got.shape == want.shape, f"{what}: shape {tuple(got.shape)}, expected {tuple(want.shape)}"
    assert got.isfinite().all(), f"{what}: not finite"
    error = (got.double() - want.double()).norm()
    slack = 0.0 if allowed is None else 1.5 * (allowed.double() - want.double()).norm()
    budget = slack + units * roundoff(got.dtype) * want.double().norm()
    assert error <= budget, f"{what}: error {error:.3e} over {budget:.3e} of {want.double().norm():.3e}"


class Twin:
    """PEFT's layer with the very same numbers as one of ours, in any dtype; its base is our dequantized weight."""

    def __init__(self, layer: AdaptedLayer, dtype: torch.dtype, adapter_dtype: torch.dtype | None = None) -> None:
        import peft

        adapter_dtype = adapter_dtype or dtype
        linear = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None)
        weight = layer.dequantize(torch.float32 if isinstance(layer.weight, QuantizedWeight) else None)
        linear.weight.data = weight.to(dtype, copy=True)
        if layer.bias is not None:
            linear.bias.data = layer.bias.detach().to(dtype).clone()
        self.names = list(layer.lora_A)
        model: Any = None
        for name in self.names:
            config = layer.adapter_configs[name]
            own = peft.LoraConfig(
                r=config.r,
                lora_alpha=config.lora_alpha,
                lora_dropout=config.lora_dropout,
                use_rslora=config.use_rslora,
                use_dora=config.use_dora,
                target_modules=["lin"],
            )
            if model is None:
                model = peft.LoraModel(nn.ModuleDict({"lin": linear}), own, name)
            else:
                _add(model, own, name)
        self.model, self.layer = model, model.model["lin"]
        for name in self.names:
            self.layer.lora_A[name].weight.data = layer.lora_A[name].detach().to(adapter_dtype).clone()
            self.layer.lora_B[name].weight.data = layer.lora_B[name].detach().to(adapter_dtype).clone()
            if name in layer.lora_magnitude:
                magnitude = layer.lora_magnitude[name].detach().to(adapter_dtype).clone()
                self.layer.lora_magnitude_vector[name].weight.data = magnitude
        self.layer.set_adapter(list(layer.active_adapters))
        if layer.bias is not None:
            self.layer.base_layer.bias.requires_grad_(layer.bias.requires_grad)
        self.layer.train(layer.training)

    def parameters(self, name: str = "default") -> list[Tensor]:
        """A, B and, for DoRA, the magnitude."""
        found = [self.layer.lora_A[name].weight, self.layer.lora_B[name].weight]
        if name in self.layer.lora_magnitude_vector:
            found.append(self.layer.lora_magnitude_vector[name].weight)
        return found


def _add(model: Any, config: Any, name: str) -> None:
    model.peft_config[name] = config
    model.inject_adapter(model.model, name)


def parameters(layer: AdaptedLayer, name: str = "default") -> list[Tensor]:
    """A, B and, for DoRA, the magnitude of ours."""
    found = [layer.lora_A[name], layer.lora_B[name]]
    if name in layer.lora_magnitude:
        found.append(layer.lora_magnitude[name])
    return found


def clone_state(module: nn.Module) -> dict[str, Tensor]:
    """The state dict with copies of its tensors."""
    return {key: copy.deepcopy(value) for key, value in module.state_dict().items()}
