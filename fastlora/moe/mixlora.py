"""MixLoraMLP: a gated MLP whose tokens each go to a few LoRA experts (MixLoRA, 2404.15159)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastlora import settings
from fastlora.config import fresh_seed
from fastlora.errors import ConfigError, ShapeError
from fastlora.math import moe
from fastlora.math.activations import ALIASES, KNOWN, activation
from fastlora.moe.config import MixLoraConfig, checked
from fastlora.moe.experts import ExpertLinear, Quantization, check_base, derived_seed
from fastlora.moe.router import Router
from fastlora.ops.experts_mlp import Facts, experts_mlp
from fastlora.ops.lora import draw_seed


class Layout(NamedTuple):
    """How an MLP is built: the projections that read its input, the one that makes its output, whether it is gated."""

    inputs: tuple[str, ...]
    down: str
    gated: bool


LAYOUTS = (
    Layout(("gate_proj", "up_proj"), "down_proj", True),
    Layout(("gate_up_proj",), "down_proj", True),
    Layout(("fc1",), "fc2", False),
)
_ACTIVATIONS = ("act_fn", "activation_fn", "act")
# Modules that are an activation we know, by class name: torch's and transformers'.
_CLASSES = {
    "SiLU": "silu",
    "SiLUActivation": "silu",
    "GELUActivation": "gelu",
    "GELUTanh": "gelu_tanh",
    "PytorchGELUTanh": "gelu_tanh",
    "NewGELUActivation": "gelu_tanh",
    "FastGELUActivation": "gelu_tanh",
    "AccurateGELUActivation": "gelu_tanh",
    "ReLU": "relu",
}


def layout_of(mlp: nn.Module) -> Layout | None:
    """The layout whose linears the module has as children and whose shapes fit one another, or None."""
    for layout in LAYOUTS:
        parts: list[Any] = [mlp._modules.get(name) for name in (*layout.inputs, layout.down)]
        if not all(isinstance(part, nn.Linear) for part in parts):
            continue
        *inputs, down = parts
        width = down.in_features * (2 if layout.gated and len(inputs) == 1 else 1)
        if all(part.out_features == width and part.in_features == down.out_features for part in inputs):
            return layout
    return None


def activation_of(mlp: nn.Module) -> str | Callable[[Tensor], Tensor] | None:
    """The MLP's own activation: a name of `math.activations`, else the function itself; None where it has none."""
    for name in _ACTIVATIONS:
        act = getattr(mlp, name, None)
        if callable(act):
            return _known(act)
    return None


def _known(act: Any) -> str | Callable[[Tensor], Tensor]:
    if isinstance(act, nn.GELU):
        return "gelu_tanh" if act.approximate == "tanh" else "gelu"
    if act is F.silu:
        return "silu"
    function: Callable[[Tensor], Tensor] = act
    return _CLASSES.get(type(act).__name__, function)


def named_activation(name: str) -> str | Callable[[Tensor], Tensor]:
    """The activation transformers knows by that name.

    Raises:
        ConfigError: there is none.
    """
    own = ALIASES.get(name, name)
    if own in KNOWN:
        return own
    from transformers.activations import ACT2FN

    if name not in ACT2FN:
        raise ConfigError(f"act_fn {name!r} is not an activation of transformers")
    return _known(ACT2FN[name])


class Plan(NamedTuple):
    """What becomes of one MLP, checked; nothing has changed yet."""

    config: MixLoraConfig
    layout: Layout
    adapted: tuple[str, ...]
    act: str | Callable[[Tensor], Tensor]
    quantization: Quantization


def plan_of(mlp: nn.Module, config: MixLoraConfig, quantization: Quantization) -> Plan:
    """Check all that making a MixLoraMLP of this MLP needs.

    Raises:
        ConfigError, DtypeError, ShapeError: what does not fit; nothing has changed.
    """
    quantization.check()
    layout = layout_of(mlp)
    if layout is None:
        known = "; ".join(", ".join((*each.inputs, each.down)) for each in LAYOUTS)
        raise ConfigError(f"{type(mlp).__name__} is no MLP we know: expected linears {known}")
    names = (*layout.inputs, layout.down)
    adapted = names if config.targets is None else tuple(name for name in names if name in config.targets)
    if not adapted:
        raise ConfigError(f"target_modules {config.targets} names no linear of the MLP ({', '.join(names)})")
    act = activation_of(mlp) if config.act_fn is None else named_activation(config.act_fn)
    if act is None:
        raise ConfigError(f"{type(mlp).__name__} has no activation among {', '.join(_ACTIVATIONS)}: give act_fn")
    for name in names:
        check_base(mlp._modules[name], quantization)  # type: ignore[arg-type]
    if config.act_fn is None:
        _check_function(mlp, layout, act)
    return Plan(config, layout, adapted, act, quantization)


@torch.no_grad()
def _check_function(mlp: nn.Module, layout: Layout, act: str | Callable[[Tensor], Tensor]) -> None:
    """One token through the MLP itself and through what we take it for: other models use the same names otherwise."""
    parts: Any = [mlp._modules[name] for name in (*layout.inputs, layout.down)]
    if any(part.weight.is_meta or hasattr(part.weight, "quant_state") for part in parts):
        return
    weight = parts[0].weight
    x = torch.linspace(-1.0, 1.0, weight.shape[1], dtype=torch.float32).to(weight.device, weight.dtype)[None]
    function = activation(act).forward
    was_training = mlp.training
    mlp.eval()
    try:
        want = mlp(x)
    finally:
        mlp.train(was_training)
    halves = [part(x) for part in parts[:-1]]
    if layout.gated and len(halves) == 1:
        halves = list(halves[0].chunk(2, -1))
    acted = function(halves[0], torch.empty_like(halves[0]))
    have = parts[-1](acted * halves[1] if layout.gated else acted)
    allowed = 2e-2 if weight.dtype.itemsize == 2 else 1e-4
    if not isinstance(want, Tensor) or not (want.float() - have.float()).norm() <= allowed * want.float().norm() + 1e-9:
        raise ConfigError(f"{type(mlp).__name__} computes something else than down(act(gate(x)) * up(x))")


class MixLoraMLP(nn.Module):
    """y = sum_j w_j FFN_e_j(x): a frozen gated MLP with E stacks of adapters (MixLoRA, 2404.15159).

    The router chooses for each token. Made by `from_mlp`. The projections keep their names: gate_proj, up_proj and
    down_proj (gate_up_proj and down_proj; fc1 and fc2), each an `ExpertLinear`.

    Routing in fp32: top-k with renormalised weights; top-p, not renormalised; switch, where a token beyond its expert's
    capacity in the sequence is passed on, p_max x. In training `jitter_noise` multiplies what router and experts see
    (switch: the router alone). DoRA's base term is not dropped, and its bias not scaled. Every adapter's input has its
    own dropout mask in each slot.

    Attributes:
        config: MixLoraConfig with its seed.
        model_config: the config `convert` was given, else the same.
        gate: the `Router`; gate.weight fp32 [E, in].
        layer: the decoder layer's number, None outside a model.
    """

    gate: Router

    def __init__(self, mlp: nn.Module, plan: Plan, layer: int | None = None) -> None:
        super().__init__()
        config = plan.config
        if config.init_seed is None:
            config = config.replace(init_seed=fresh_seed())
        assert config.init_seed is not None
        self.config = self.model_config = config
        self.layout, self.act, self.layer = plan.layout, plan.act, layer
        expert = config.expert_config()
        for number, name in enumerate((*self.layout.inputs, self.layout.down)):
            own = expert if name in plan.adapted else None
            seed = derived_seed(config.init_seed, name)
            part = ExpertLinear(mlp._modules[name], own, config.num_experts, seed, plan.quantization, number)  # type: ignore[arg-type]
            self.add_module(name, part)
        self.gate = Router(self._draw_gate())
        self.train(mlp.training)

    @classmethod
    def from_mlp(
        cls,
        mlp: nn.Module,
        config: Any,
        *,
        quantize: str | None = None,
        blocksize: int = 64,
        double_quant: bool = True,
    ) -> MixLoraMLP:
        """Adopt an MLP's linears (dense: no copy, frozen from now on; bitsandbytes 4-bit: its bytes).

        Args:
            mlp: with linears gate_proj, up_proj, down_proj (or gate_up_proj, down_proj; fc1, fc2).
            config: MixLoraConfig or a dict with MoE-PEFT's keys.
            quantize: "nf4" or "fp4" quantizes a dense base.
            blocksize: weights that share one scale of the 4-bit format.
            double_quant: quantize the scales too.

        Raises:
            ConfigError, DtypeError, ShapeError: no MLP we know, or a config that does not fit; nothing has changed.
        """
        plan = plan_of(mlp, checked(config, MixLoraConfig), Quantization(quantize, blocksize, double_quant))
        return cls(mlp, plan)

    def _draw_gate(self) -> Tensor:
        first = self._projection(self.layout.inputs[0])
        shape, device = (self.config.num_experts, first.in_features), first.device
        if device.type == "meta":
            return torch.empty(shape, device=device)
        seed, std = self.config.init_seed, self.config.router_init_range
        assert seed is not None and std is not None
        generator = torch.Generator(device="cpu").manual_seed(derived_seed(seed, "gate"))
        return (torch.randn(shape, generator=generator) * std).to(device)

    def _projection(self, name: str) -> ExpertLinear:
        part: ExpertLinear = self._modules[name]  # type: ignore[assignment]
        return part

    @property
    def projections(self) -> dict[str, ExpertLinear]:
        """The MLP's linears by name, the one that makes the output last."""
        return {name: self._projection(name) for name in (*self.layout.inputs, self.layout.down)}

    def route(self, logits: Tensor, sequence: int) -> moe.Routing:
        """logits fp32 [T, E], tokens of `sequence` in a row -> weights fp32 and experts int64 [T, S]."""
        config = self.config
        if config.routing_strategy == "mixlora":
            return moe.route_top_k(logits, config.top_k)
        if config.routing_strategy == "mixlora-dynamic":
            return _narrow(moe.route_top_p(logits, config.top_p, config.temperature), config.num_experts)
        return moe.route_switch(logits, config.expert_capacity, sequence)

    def _jittered(self, x: Tensor) -> Tensor:
        noise = self.config.jitter_noise
        if not noise or not self.training:
            return x
        return x * torch.empty_like(x).uniform_(1 - noise, 1 + noise)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out], in the dtype of x (autocast's when that is on).

        Raises:
            ShapeError, DtypeError: x does not fit.
        """
        parts = self.projections
        first = parts[self.layout.inputs[0]]
        if x.dim() < 1 or x.shape[-1] != first.in_features:
            raise ShapeError(f"expected x with last dimension {first.in_features}, got shape {tuple(x.shape)}")
        dtype = first.operand_dtype(x)
        switch = self.config.routing_strategy == "mixlora-switch"
        seen = self._jittered(x)
        logits = self.gate(seen)
        flat = (x if switch else seen).reshape(-1, first.in_features).to(dtype)
        routing = self.route(logits, max(1, x.shape[-2]) if x.dim() > 1 else 1)
        w, experts = routing
        lost = experts == self.config.num_experts
        kept = torch.where(lost, 0.0, w) if switch else w
        drops = self.training and any(part.dropout for part in parts.values())
        facts = Facts(
            experts.shape[1],
            self.config.num_experts,
            len(self.layout.inputs),
            self.layout.gated,
            self.act,
            settings.current.low_memory,
        )
        y = experts_mlp(
            flat,
            kept,
            experts,
            draw_seed(x.device) if drops else None,
            [part.frozen(dtype) for part in parts.values()],
            facts,
            [tensor for part in parts.values() for tensor in part.adapters()],
        )
        if switch:
            y = y + (torch.where(lost, w, 0.0) * flat).to(y.dtype)
            y = F.dropout(y, self.config.ffn_dropout, self.training)
        if first.compute_dtype is not None:
            y = y.to(x.dtype)
        return y if x.dim() == 2 else torch.ops.aten._unsafe_view(y, (*x.shape[:-1], y.shape[-1]))

    def extra_repr(self) -> str:
        """Strategy and number of experts, for `repr`."""
        return f"{self.config.routing_strategy}, experts={self.config.num_experts}"


def _narrow(routing: moe.Routing, experts: int) -> moe.Routing:
    """Only as many slots as some token uses, where asking for that number costs nothing: not on a GPU."""
    if routing.experts.device.type != "cpu" or torch.compiler.is_compiling() or not routing.experts.numel():
        return routing
    used = int((routing.experts < experts).sum(1).max())
    return moe.Routing(routing.weights[:, :used], routing.experts[:, :used])
