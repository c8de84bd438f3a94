"""LoraMoeLinear and MolaLinear: one linear whose experts are gated blocks of one low-rank product."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fastlora.config import fresh_seed
from fastlora.errors import ConfigError, ShapeError
from fastlora.math import moe
from fastlora.moe.config import LoraMoeConfig, MoeConfig, MolaConfig, checked
from fastlora.moe.experts import ExpertLinear, Quantization, derived_seed
from fastlora.moe.router import Router
from fastlora.ops.experts import Frozen, gated_linear
from fastlora.ops.experts_fused import routed_linear
from fastlora.ops.lora import draw_seed


class GatedLoraLinear(ExpertLinear):
    """y = x W^T + bias + sum_e g_e s B_e A_e drop(x), g = gates(x gate^T); see `LoraMoeLinear` and `MolaLinear`.

    One dropout mask is shared by all experts of a layer. The gate sees x undropped.

    Attributes:
        config: with its seed.
        model_config: the config `convert` was given, else the same.
        gate: the `Router`; gate.weight fp32 [E, in].
        layer: the decoder layer's number, None outside a model. The others are those of `ExpertLinear`.
    """

    config_class: ClassVar[type[MoeConfig]]
    gate: Router

    def __init__(
        self, linear: nn.Module, config: Any, quantization: Quantization | None = None, layer: int | None = None
    ) -> None:
        quantization = quantization or Quantization()
        quantization.check()
        config = checked(config, self.config_class)
        if config.init_seed is None:
            config = config.replace(init_seed=fresh_seed())
        own = self.own_config(config, layer)
        super().__init__(linear, own.expert_config(), own.num_experts, own.init_seed, quantization)
        self.config, self.model_config, self.layer = own, config, layer
        self.gate = Router(self._draw_gate(own))
        self.train(linear.training)

    @classmethod
    def own_config(cls, config: Any, layer: int | None) -> Any:
        """The config of one layer."""
        return config

    @classmethod
    def from_linear(
        cls,
        linear: nn.Module,
        config: Any,
        *,
        quantize: str | None = None,
        blocksize: int = 64,
        double_quant: bool = True,
    ) -> Any:
        """Adopt a linear's weight and bias (dense: no copy, frozen from now on; bitsandbytes 4-bit: its bytes).

        Args:
            linear: `nn.Linear` or a bitsandbytes 4-bit one.
            config: a config of the method, or a dict with MoE-PEFT's keys.
            quantize: "nf4" or "fp4" quantizes a dense base.
            blocksize: weights that share one scale of the 4-bit format.
            double_quant: quantize the scales too.

        Raises:
            ConfigError, DtypeError, ShapeError: a layer or config that does not fit; nothing has changed.
        """
        return cls(linear, config, Quantization(quantize, blocksize, double_quant))

    def _draw_gate(self, config: Any) -> Tensor:
        shape, device = (config.num_experts, self.in_features), self.device
        if device.type == "meta":
            return torch.empty(shape, device=device)
        generator = torch.Generator(device="cpu").manual_seed(derived_seed(config.init_seed, "gate"))
        bound = config.gate_bound(self.in_features)
        return ((2 * torch.rand(shape, generator=generator) - 1) * bound).to(device)

    def gates(self, logits: Tensor) -> Tensor:
        """logits [T, E] -> g [T, E]."""
        raise NotImplementedError

    def _mixed(self, x: Tensor, logits: Tensor, a: Tensor, b: Tensor, seed: Tensor | None, layer: Frozen) -> Tensor:
        """The layer's y for x [T, in] under the gate's logits."""
        return gated_linear(x, self.gates(logits), a, b, seed, layer)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out], in the dtype of x (autocast's when that is on).

        Raises:
            ShapeError, DtypeError: x does not fit.
        """
        if x.dim() < 1 or x.shape[-1] != self.in_features:
            raise ShapeError(f"expected x with last dimension {self.in_features}, got shape {tuple(x.shape)}")
        assert self.lora_A is not None and self.lora_B is not None
        dtype = self.operand_dtype(x)
        logits = self.gate(x)
        layer = self.frozen(dtype)
        seed = draw_seed(x.device) if layer.p > 0 else None
        flat = x.reshape(-1, self.in_features).to(dtype)
        y = self._mixed(flat, logits, self.lora_A, self.lora_B, seed, layer)
        if self.compute_dtype is not None:
            y = y.to(x.dtype)
        return y if x.dim() == 2 else torch.ops.aten._unsafe_view(y, (*x.shape[:-1], self.out_features))


class LoraMoeLinear(GatedLoraLinear):
    """Every expert, weighted by the softmax of the gate (LoRAMoE, 2312.09979). Made by `from_linear`.

    y = x W^T + bias + sum_e g_e s B_e A_e drop(x), g = softmax(x gate^T). Attributes: those of `ExpertLinear`, `gate`
    (weight fp32 [E, in]) and `config`.
    """

    config_class = LoraMoeConfig
    config: LoraMoeConfig

    def gates(self, logits: Tensor) -> Tensor:
        """softmax(logits): fp32 [T, E] -> [T, E]."""
        return torch.softmax(logits, -1)


class MolaLinear(GatedLoraLinear):
    """The top_k experts of a token, their weights summing to 1 (MoLA, 2402.08562). Made by `from_linear`.

    y = x W^T + bias + sum_e g_e s B_e A_e drop(x), g the renormalised top_k of softmax(x gate^T). Attributes: those of
    `ExpertLinear`, `gate` (weight fp32 [E, in]) and `config`.
    """

    config_class = MolaConfig
    config: MolaConfig

    @classmethod
    def own_config(cls, config: MolaConfig, layer: int | None) -> MolaConfig:
        """The config of one layer, without lists.

        Raises:
            ConfigError: lists, and no layer to choose from them.
        """
        if config.layers is not None and layer is None:
            raise ConfigError("lists of experts, ranks or top_k are for a model's layers: use fastlora.moe.convert")
        return config if layer is None else config.for_layer(layer)

    def gates(self, logits: Tensor) -> Tensor:
        """The renormalised top_k of softmax(logits), 0 elsewhere: fp32 [T, E] -> [T, E]."""
        return moe.scatter_gates(moe.route_top_k(logits, self.config.top_k), self.config.num_experts)  # type: ignore[arg-type]

    def _mixed(self, x: Tensor, logits: Tensor, a: Tensor, b: Tensor, seed: Tensor | None, layer: Frozen) -> Tensor:
        return routed_linear(x, *moe.route_top_k(logits, self.config.top_k), a, b, seed, layer)  # type: ignore[arg-type]
