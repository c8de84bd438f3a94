"""What the tests of mixtures share: small MLPs, random layers, the plain forward as their judge, samples of the ops."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastlora import moe
from fastlora.math import moe as reference
from fastlora.math import philox
from fastlora.math.activations import activation
from fastlora.math.segments import segments
from fastlora.moe.experts import ExpertLinear
from fastlora.problem import DORA, DROPOUT, NEED_DA, NEED_DB, NEED_DMAG, NEED_DX, TRAIN

H, I, E, R = 40, 56, 5, 3  # noqa: E741 (the letters of the papers)
TOKENS = (2, 11)  # a batch of sequences


class GatedMLP(nn.Module):
    """As transformers' Llama has it."""

    def __init__(self, bias: bool = False, act: nn.Module | None = None, h: int = H, i: int = I) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(h, i, bias=bias), nn.Linear(h, i, bias=bias)
        self.down_proj, self.act_fn = nn.Linear(i, h, bias=bias), act or nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class FusedMLP(nn.Module):
    """As transformers' Phi-3 has it: gate and up in one linear, the gate first."""

    def __init__(self, bias: bool = False) -> None:
        super().__init__()
        self.gate_up_proj, self.down_proj = nn.Linear(H, 2 * I, bias=bias), nn.Linear(I, H, bias=bias)
        self.activation_fn = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, -1)
        return self.down_proj(up * self.activation_fn(gate))


class PlainMLP(nn.Module):
    """As transformers' Phi has it: no gate."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.fc1, self.fc2, self.activation_fn = nn.Linear(H, I, bias=bias), nn.Linear(I, H, bias=bias), nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.activation_fn(self.fc1(x)))


def scramble(module: Any, gate: float = 1.0) -> Any:
    """Every adapter random: B off zero, the magnitude off its start, the gate wide enough to choose."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
            if name.endswith("lora_B"):
                parameter.copy_(0.2 * noise)
            elif name.endswith("lora_magnitude"):
                parameter.mul_(1 + 0.2 * noise)
            elif name.endswith("gate.weight"):
                parameter.copy_(gate * noise / math.sqrt(parameter.shape[1]))
    return module


def mixlora(mlp: nn.Module | None = None, *, base: dict[str, Any] | None = None, **fields: Any) -> moe.MixLoraMLP:
    """A scrambled MixLoraMLP in training mode, without jitter."""
    torch.manual_seed(0)
    config = {"num_experts": E, "r": R, "lora_alpha": 5, "init_seed": 1, "jitter_noise": 0.0, **fields}
    made = moe.MixLoraMLP.from_mlp(mlp or GatedMLP(), moe.MixLoraConfig(**config), **(base or {}))
    return scramble(made, gate=4.0).train()


def plugin(method: str, *, bias: bool = True, base: dict[str, Any] | None = None, **fields: Any) -> Any:
    """A scrambled LoraMoeLinear ("loramoe") or MolaLinear ("mola") in training mode."""
    torch.manual_seed(0)
    config = {"num_experts": E, "r": R, "lora_alpha": 5, "init_seed": 1, **fields}
    linear = nn.Linear(H, I, bias=bias)
    if method == "loramoe":
        made: Any = moe.LoraMoeLinear.from_linear(linear, moe.LoraMoeConfig(**config), **(base or {}))
    else:
        made = moe.MolaLinear.from_linear(linear, moe.MolaConfig(**config), **(base or {}))
    return scramble(made, gate=4.0).train()


def inputs(module: Any, dtype: torch.dtype = torch.float32, tokens: Sequence[int] = TOKENS) -> tuple[Tensor, Tensor]:
    """x and dy."""
    torch.manual_seed(3)
    out = module.down_width if hasattr(module, "down_width") else out_features(module)
    return torch.randn(*tokens, H, dtype=torch.float32).to(dtype), torch.randn(*tokens, out).to(dtype)


def out_features(module: Any) -> int:
    return (
        module.out_features if isinstance(module, ExpertLinear) else list(module.projections.values())[-1].out_features
    )


def step(module: Any, x: Tensor, dy: Tensor, run: Callable[[Tensor], Tensor] | None = None) -> dict[str, Tensor]:
    """y, dx and the gradient of all that trains, by name."""
    module.zero_grad()
    x = x.detach().clone().requires_grad_()
    y = (module if run is None else run)(x)
    y.backward(dy)
    found = {"y": y.detach(), "dx": x.grad}
    return found | {name: p.grad for name, p in module.named_parameters() if p.requires_grad}


def _layer(part: ExpertLinear, leaves: dict[str, Tensor], stem: str, dtype: torch.dtype) -> reference.Experts:
    def own(name: str) -> Tensor | None:
        return leaves.get(f"{stem}{name}")

    bias = None if part.bias is None else part.bias.detach().to(dtype)
    weight = part.dequantize(torch.float32).to(dtype)
    return reference.Experts(weight, bias, own("lora_A"), own("lora_B"), part.scaling, own("lora_magnitude"))


def truth(
    module: Any, x: Tensor, dy: Tensor, dtype: torch.dtype = torch.float64, keeps: Sequence[Tensor] | None = None
) -> dict[str, Tensor]:
    """What `step` should give: the plain forward of `math.moe`, expert by expert, its gradients by autograd."""
    leaves = {
        name: p.detach().to(torch.promote_types(dtype, torch.float32) if "gate.weight" in name else dtype)
        for name, p in module.named_parameters()
        if p.requires_grad
    }
    leaves = {name: t.requires_grad_() for name, t in leaves.items()}
    leaf = x.detach().to(dtype).requires_grad_()
    flat = leaf.reshape(-1, x.shape[-1])
    logits = reference.logits(flat, leaves["gate.weight"])
    if isinstance(module, moe.MixLoraMLP):
        routing = module.route(logits, x.shape[-2])
        parts = {name: _layer(part, leaves, f"{name}.", dtype) for name, part in module.projections.items()}
        *first, down = parts.values()
        out = activation(module.act)
        scale = philox.keep_scale(max(part.dropout for part in module.projections.values()))
        switch = module.config.routing_strategy == "mixlora-switch"

        def act(z: Tensor) -> Tensor:
            return _Act.apply(z, out)

        y = reference.mlp(flat, routing, first, down, act, keep_input=switch, keeps=keeps, keep_scale=scale)
    else:
        scale = philox.keep_scale(module.dropout)
        keep = None if keeps is None else keeps[0]
        layer = _layer(module, leaves, "", dtype)
        y = reference.gated_linear(flat, module.gates(logits), layer, keep, scale)
    y = y.view(*x.shape[:-1], -1)
    y.backward(dy.to(y.dtype))
    return {"y": y.detach(), "dx": leaf.grad} | {name: t.grad for name, t in leaves.items()}


class _Act(torch.autograd.Function):
    """An activation of `math.activations` for autograd; its derivative is compared with autograd's own elsewhere."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, act: Any) -> Tensor:
        ctx.save_for_backward(z)
        ctx.act = act
        return act.forward(z, torch.empty_like(z))

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> Any:
        (z,) = ctx.saved_tensors
        return ctx.act.backward(d.contiguous(), z, torch.empty_like(z)), None


def relative(got: Tensor, want: Tensor) -> float:
    return ((got.double() - want.double()).norm() / want.double().norm().clamp_min(1e-30)).item()


def judge(module: Any, x: Tensor, dy: Tensor, got: dict[str, Tensor], keeps: Any = None) -> None:
    """Each tensor within 1.5 times the error of the plain form in the same dtype, and a few roundings."""
    want, eager = truth(module, x, dy, keeps=keeps), truth(module, x, dy, x.dtype, keeps)
    unit = torch.finfo(x.dtype).eps
    assert got.keys() == want.keys()
    for name, reference_value in want.items():
        assert got[name].shape == reference_value.shape, name
        if name == "gate.weight" and reference_value.norm() < 1e-12:  # one renormalised weight is 1 for any gate
            assert got[name].norm() < 100 * unit * want["dx"].norm()
            continue
        assert reference_value.norm() > 0, f"{name} is 0: the case tests nothing"
        allowed = 1.5 * relative(eager[name], reference_value) + 4 * unit
        assert relative(got[name], reference_value) <= allowed, (name, relative(got[name], reference_value), allowed)


def op_samples() -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Arguments of every op of stacked experts, as the autograd Function passes them."""
    torch.manual_seed(0)
    ops, k, n = torch.ops.fastlora, 24, 20
    rows = segments(torch.tensor([2, 0, 3, 1, 1, 2, 3, 0, 2]), 3)
    x, y, dy = torch.randn(9, k), torch.randn(9, n), torch.randn(9, n)
    a, b, seed = torch.randn(3, R, k), torch.randn(3, n, R), torch.tensor([5])
    for p in (0.0, 0.3):
        for mag in (None, torch.rand(3, n) + 0.5):
            norm = None if mag is None else torch.rand(3, n) + 0.5
            flags = DROPOUT * (p > 0) | DORA * (mag is not None)
            group = (a, b, mag, norm, 0.7, p, 65536, *rows)
            mask = None
            if p:
                yield "experts_mask", (seed, a, b, p, 65536, *rows, "")
                mask = ops.experts_mask(seed, a, b, p, 65536, *rows, "")
            yield "experts_fwd", (x, y.clone(), torch.randn(n), *group, mask, flags, "")
            yield "experts_fwd", (x, y.clone(), torch.randn(n), *group, mask, flags | TRAIN, "")
            h, z = ops.experts_fwd(x, y.clone(), None, *group, mask, flags | TRAIN, "")
            z = z if mag is not None else None
            needs = flags | NEED_DA | NEED_DB | (NEED_DMAG if mag is not None else 0)
            yield "experts_bwd", (dy, x, torch.zeros(9, k), *group, h, mask, z, needs | NEED_DX, "")
            yield "experts_bwd", (dy, x, None, *group, h, mask, z, needs, "")
