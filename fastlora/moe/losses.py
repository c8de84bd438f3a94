"""Router losses of a whole model, computed outside it: anyone's loop, transformers' Trainer, any checkpointing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastlora.errors import ConfigError, ShapeError
from fastlora.math import moe
from fastlora.moe.mixlora import MixLoraMLP
from fastlora.moe.plugin import GatedLoraLinear, LoraMoeLinear, MolaLinear

MoeModule = MixLoraMLP | GatedLoraLinear


def moe_modules(model: nn.Module) -> dict[str, MoeModule]:
    """The mixtures of a model by name, in its own order."""
    return {name: each for name, each in model.named_modules() if isinstance(each, (MixLoraMLP, GatedLoraLinear))}


def router_logits(model: nn.Module) -> dict[str, Tensor]:
    """The logits of the last forward of each mixture of a model, by name; those that have not run are left out.

    Returns:
        name -> fp32 [tokens, E].
    """
    found = {}
    for name, module in moe_modules(model).items():
        logits = module.gate.logits
        if logits is not None:
            found[name] = logits.reshape(-1, logits.shape[-1])
    return found


class _Rule(NamedTuple):
    """What must be equal for several routers to share one mean; `routing` tells how experts are chosen."""

    routing: tuple[object, ...]
    experts: int
    coefficient: float
    z_coefficient: float


def _rule(module: MoeModule) -> _Rule | None:
    """None where the config asks for no balance loss."""
    config = module.config
    if isinstance(module, MixLoraMLP):
        own = module.config
        if not own.router_loss:
            return None
        routing = {
            "mixlora": ("top_k", own.top_k),
            "mixlora-dynamic": ("top_p", own.top_p, own.temperature),
            "mixlora-switch": ("switch",),
        }[own.routing_strategy]
        z_coefficient = own.router_z_loss_coef if routing[0] == "switch" else 0.0
        return _Rule(routing, own.num_experts, own.router_aux_loss_coef, z_coefficient)
    if isinstance(module, MolaLinear):
        if not module.config.router_loss:
            return None
        return _Rule(("top_k", module.config.top_k), config.num_experts, module.config.router_aux_loss_coef, 0.0)
    return None


def _balance(rule: _Rule, z: Tensor, mask: Tensor | None, normalized: bool) -> Tensor:
    """One group's loss; z [tokens, E]."""
    kind, *facts = rule.routing
    if kind == "switch":
        loss = rule.coefficient * moe.switch_balance(z, mask)
        return loss + rule.z_coefficient * moe.z_loss(z, mask)
    routing = moe.route_top_k(z, *facts) if kind == "top_k" else moe.route_top_p(z, *facts)  # type: ignore[arg-type]
    return rule.coefficient * moe.balance(z, routing.experts, mask, normalized=normalized)


def _mask_of(attention_mask: Tensor | None, logits: Tensor, name: str) -> Tensor | None:
    """The mask as one entry a token, on the logits' device."""
    if attention_mask is None:
        return None
    tokens = logits.numel() // logits.shape[-1]
    if attention_mask.numel() != tokens:
        raise ShapeError(
            f"expected an attention_mask with an entry for each of the {tokens} tokens {name} saw, "
            f"got shape {tuple(attention_mask.shape)}"
        )
    return attention_mask.reshape(-1).to(logits.device)


def _grouped(
    modules: dict[str, MoeModule], rules: dict[str, _Rule], per_layer: bool | None
) -> list[tuple[_Rule, list[str]]]:
    """Which routers share a mean: all of them, or those of one decoder layer."""
    if per_layer is None:
        per_layer = len(set(rules.values())) > 1
    groups: dict[object, list[str]] = {}
    for name in rules:
        layer = modules[name].layer
        groups.setdefault((name if layer is None else layer) if per_layer else None, []).append(name)
    for names in groups.values():
        if len({rules[name] for name in names}) > 1:
            raise ConfigError("layers of different num_experts or routing share no mean: per_layer=True")
    return [(rules[names[0]], names) for names in groups.values()]


def _constraint(
    module: LoraMoeLinear, logits: Tensor, mask: Tensor | None, task_types: Tensor | Sequence[int] | None
) -> Tensor:
    """LoRAMoE's balance constraint of one linear; logits [b, s, E]."""
    if logits.dim() != 3:
        raise ShapeError(f"the balance constraint needs inputs [batch, sequence, in], got logits {tuple(logits.shape)}")
    types = None if task_types is None else torch.as_tensor(task_types)
    if types is not None and types.shape != logits.shape[:1]:
        raise ShapeError(f"expected one task type a sequence, {logits.shape[0]}, got shape {tuple(types.shape)}")
    keep = None if mask is None else mask.view(logits.shape[:2])
    p = torch.softmax(logits, -1)
    return module.config.blc_weight * moe.balance_constraint(p, types, module.config.blc_alpha, keep)


def _check_delivery(modules: dict[str, MoeModule], logits: dict[str, Tensor]) -> None:
    """A gradient that has to wait for a checkpoint's second run must find it."""
    waiting = [name for name, z in logits.items() if z is not modules[name].gate.logits]
    if any(modules[name].gate.compiled for name in waiting):
        raise ConfigError(
            "the last forward of a compiled layer left no graph: under reentrant checkpointing its router gets no "
            "gradient; use_reentrant=False"
        )
    if len({logits[name].device for name in waiting}) > 1:
        raise ConfigError("reentrant checkpointing over several devices loses router gradients; use_reentrant=False")


def router_loss(
    model: nn.Module,
    attention_mask: Tensor | None = None,
    *,
    task_types: Tensor | Sequence[int] | None = None,
    per_layer: bool | None = None,
    normalized: bool = False,
) -> Tensor:
    """The auxiliary loss of a model's last forward, coefficients included: add it to the task loss before backward.

    MixLoRA top-k and top-p, MoLA: router_aux_loss_coef * E sum_j sum_e f[j, e] P[e]. Switch: its own balance and z
    loss. LoRAMoE: blc_weight * the balance constraint, summed over linears. Formulas: `fastlora.math.moe`; sources:
    MixLoRA (2404.15159), LoRAMoE (2312.09979), MoLA (2402.08562).

    A checkpoint's second run neither counts again nor loses the graph, under both modes; with use_reentrant=True call
    this after every forward and before its backward, in the same backward as the task loss.

    Args:
        attention_mask: [batch, sequence], 0 for padding, which then counts for nothing.
        task_types: LoRAMoE, one a sequence: 1 prefers the first half of the experts, 0 the second (by blc_alpha).
        per_layer: False pools all layers (MoE-PEFT), True sums one loss a decoder layer (MoLA's own code, with
            `normalized`); None pools where all layers have as many experts and one routing.
        normalized: divide by the slots in use (k for top-k), so that an even load gives 1 a mean, not k.

    Returns:
        0-dim, fp32; 0 where no config asks for a loss.

    Raises:
        ConfigError: no mixture has run, or a mean that layers cannot share. ShapeError: a mask of other tokens.
    """
    modules = {name: each for name, each in moe_modules(model).items() if each.gate.logits is not None}
    if not modules:
        raise ConfigError("no mixture of experts has run yet: call the model first")
    rules = {name: rule for name, each in modules.items() if (rule := _rule(each)) is not None}
    constrained = {n: m for n, m in modules.items() if isinstance(m, LoraMoeLinear) and m.config.blc_weight > 0}
    logits = {name: modules[name].gate.open_logits() for name in (*rules, *constrained)}
    _check_delivery(modules, logits)
    first = next(iter(modules.values())).gate.weight
    total = torch.zeros((), device=first.device)
    with torch.amp.autocast(first.device.type, enabled=False):
        for rule, names in _grouped(modules, rules, per_layer):
            z = torch.cat([logits[name].reshape(-1, rule.experts).to(first.device) for name in names])
            masks = [_mask_of(attention_mask, logits[name], name) for name in names]
            mask = None if masks[0] is None else torch.cat([m.to(first.device) for m in masks if m is not None])
            total = total + _balance(rule, z, mask, normalized)
        for name, module in constrained.items():
            own = _mask_of(attention_mask, logits[name], name)
            total = total + _constraint(module, logits[name], own, task_types).to(first.device)
    return total
