"""Mixtures of LoRA experts: routing, auxiliary losses, and the plain forward that every faster one is judged by.

p = softmax(x G^T) in at least fp32. A token's choices are "slots": at most `slots` pairs (expert, weight), those
without an expert marked by the number E. All of it is differentiable by autograd, in fp64 too.

  top-k    w, e = top k of p;  w <- w / sum w                                     (MixLoRA, MoLA)
  top-p    p sorted; slot j stays where the mass before it is <= top_p; no renormalisation      (MixLoRA dynamic)
  switch   the best expert with w = max p, while it is within its capacity in that sequence     (MixLoRA switch)
  soft     every expert with w = p                                                (LoRAMoE)

Losses, with f[j, e] the share of tokens whose slot j is e (no gradient) and P[e] the mean of p_e:
  balance  E sum_j sum_e f[j, e] P[e]; even load gives the mean number of slots in use, 1 if `normalized`
  switch   E^2 mean_e f[0, e] P[e];   z: mean_t logsumexp(z_t)^2
  LoRAMoE's constraint, per linear: Z = (sum_s p[b, s, e]) M[b, e];  Var(Z) / (Mean(Z)^2 + 1e-10), Var unbiased

Sources: MixLoRA (2404.15159), Switch Transformers (2101.03961), LoRAMoE (2312.09979), MoLA (2402.08562) and their code.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlora.errors import ShapeError


class Routing(NamedTuple):
    """What a router decided for T tokens.

    Attributes:
        weights: [T, slots], of the router's dtype; 0 in a slot without expert, except for switch, where a token that
            found no place keeps its weight.
        experts: int64 [T, slots], E in a slot without expert.
    """

    weights: Tensor
    experts: Tensor


def logits(x: Tensor, gate: Tensor) -> Tensor:
    """x [T, in], gate [E, in] -> [T, E] in the wider of fp32 and their dtypes."""
    dtype = torch.promote_types(torch.promote_types(x.dtype, gate.dtype), torch.float32)
    return x.to(dtype) @ gate.to(dtype).T


# --- routing ----------------------------------------------------------------------------------------------------------


def route_top_k(z: Tensor, k: int) -> Routing:
    """z [T, E] -> k slots whose weights sum to 1."""
    w, e = torch.topk(F.softmax(z, -1), k, -1)
    return Routing(w / w.sum(-1, keepdim=True), e)


def route_top_p(z: Tensor, top_p: float, temperature: float = 0.0) -> Routing:
    """z [T, E] -> E slots, sorted; a temperature divides the probabilities, as MoE-PEFT has it."""
    p = F.softmax(z, -1)
    if temperature > 0.0:
        p = p / temperature
    w, e = torch.sort(p, dim=-1, descending=True)
    out = torch.zeros_like(w, dtype=torch.bool)
    out[:, 1:] = _cumulated(w.detach())[:, :-1] > top_p
    return Routing(w.masked_fill(out, 0.0), e.masked_fill(out, z.shape[-1]))


def _cumulated(w: Tensor) -> Tensor:
    """cumsum over the last dimension, which torch has no deterministic kernel for on CUDA."""
    if w.device.type != "cuda" or not torch.are_deterministic_algorithms_enabled():
        return w.cumsum(-1)
    sums = [w[..., 0]]
    for at in range(1, w.shape[-1]):
        sums.append(sums[-1] + w[..., at])
    return torch.stack(sums, -1)


def route_switch(z: Tensor, capacity: int, sequence: int) -> Routing:
    """z [T, E], tokens of `sequence` in a row -> one slot; each expert takes `capacity` tokens a sequence, in order."""
    experts = z.shape[-1]
    w, e = F.softmax(z, -1).max(-1)
    choice = F.one_hot(e, experts).view(-1, sequence, experts)
    place = choice.cumsum(1).gather(-1, e.view(-1, sequence, 1)).view(-1)
    return Routing(w[:, None], torch.where(place <= capacity, e, experts)[:, None])


# --- losses -----------------------------------------------------------------------------------------------------------


def _means(p: Tensor, experts: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """f [slots, E], P [E] over the tokens that the mask keeps; p [T, E], experts [T, slots]."""
    chosen = F.one_hot(experts, p.shape[-1] + 1)[..., :-1].to(p.dtype)  # [T, slots, E]
    if mask is None:
        return chosen.mean(0), p.mean(0)
    weight = mask.reshape(-1).to(p.dtype)
    if weight.shape[0] != p.shape[0]:
        raise ShapeError(f"expected a mask of {p.shape[0]} tokens, got {weight.shape[0]}")
    total = weight.sum()
    return torch.einsum("t,tje->je", weight, chosen) / total, (weight @ p) / total


def balance(z: Tensor, experts: Tensor, mask: Tensor | None = None, *, normalized: bool = False) -> Tensor:
    """E sum_j sum_e f[j, e] P[e].

    Args:
        z: logits [T, E]. experts: [T, slots] as in `Routing`. mask: [T] or any shape of T entries, 0 for padding.
        normalized: divide by the mean number of slots in use, so that an even load gives 1.
    """
    f, p = _means(F.softmax(z, -1), experts, mask)
    loss = z.shape[-1] * (f * p).sum()
    return loss / f.sum() if normalized else loss


def switch_balance(z: Tensor, mask: Tensor | None = None) -> Tensor:
    """E^2 mean_e f_e P_e of each token's best expert; an even load gives 1."""
    f, p = _means(F.softmax(z, -1), z.argmax(-1, keepdim=True), mask)
    return (f[0] * p).mean() * z.shape[-1] ** 2


def z_loss(z: Tensor, mask: Tensor | None = None) -> Tensor:
    """mean_t logsumexp(z_t)^2."""
    squares = torch.logsumexp(z, -1).square()
    if mask is None:
        return squares.mean()
    weight = mask.reshape(-1).to(z.dtype)
    return (weight * squares).sum() / weight.sum()


def balance_constraint(
    p: Tensor, types: Tensor | None = None, alpha: float = 0.0, mask: Tensor | None = None
) -> Tensor:
    """LoRAMoE's localised balance constraint of one linear: the squared coefficient of variation of Z.

    Args:
        p: gates [b, s, E]. types: int [b], 1 for tasks meant for the first half of the experts, 0 for the second half;
            None: no preference. alpha: how strong that is. mask: [b, s], 0 for padding.

    Returns:
        Var(Z) / (Mean(Z)^2 + 1e-10), 0-dim; 0 for a single entry.
    """
    z = (p if mask is None else p * mask[..., None].to(p.dtype)).sum(1)  # [b, E]
    experts = p.shape[-1]
    if types is not None:
        late = torch.arange(experts, device=p.device) >= experts / 2
        wanted = (types.to(p.device) == 0)[:, None] == late[None, :]
        z = z * torch.where(wanted, 1 + alpha, 1 - alpha).to(p.dtype)
    z = z.flatten()
    if z.numel() == 1:
        return torch.zeros_like(z).sum()
    return z.var() / (z.mean().square() + 1e-10)


# --- the forward, expert by expert ------------------------------------------------------------------------------------


class Experts(NamedTuple):
    """One linear with E experts.

    Attributes:
        weight: [n, k]. bias: [n] or None. a, b: [E, r, k], [E, n, r]. scale: s.
        magnitude: [E, n] makes them DoRA; the norm has no gradient.
    """

    weight: Tensor
    bias: Tensor | None
    a: Tensor | None
    b: Tensor | None
    scale: float
    magnitude: Tensor | None = None


def expert_linear(x: Tensor, layer: Experts, e: int, keep: Tensor | None = None, keep_scale: float = 1.0) -> Tensor:
    """x [m, k] through expert e: c (x W^T + s drop(x) A^T B^T) + bias, c = 1 without DoRA."""
    y = x @ layer.weight.T
    if layer.a is not None and layer.b is not None:
        xd = x if keep is None else x * keep * keep_scale
        y = y + layer.scale * (xd @ layer.a[e].T) @ layer.b[e].T
        if layer.magnitude is not None:
            norm = (layer.weight + layer.scale * layer.b[e] @ layer.a[e]).norm(dim=1).detach()
            y = layer.magnitude[e] / norm * y
    return y if layer.bias is None else y + layer.bias


def mlp(
    x: Tensor,
    routing: Routing,
    projections: Sequence[Experts],
    down: Experts,
    act: Callable[[Tensor], Tensor],
    *,
    keep_input: bool = False,
    keeps: Sequence[Tensor] | None = None,
    keep_scale: float = 1.0,
) -> Tensor:
    """y = sum_j w_j FFN_{e_j}(x), FFN(x) = W2'(act(W1' x) * W3' x); every W' is the base with expert e's adapter.

    Args:
        x: [T, in]. projections: (gate, up), (one that holds both, gate first), or with act alone (fc1,) where its
            width is that of down.
        keep_input: switch: a slot without expert contributes w x.
        keeps: dropout: what each of (*projections, down) keeps of its adapters' input, [T S, k] each.
    """
    y = torch.zeros_like(x)
    slots = routing.experts.shape[1]
    experts = int(max(p.b.shape[0] for p in (*projections, down) if p.b is not None))
    for slot in range(slots):
        for e in range(experts):
            rows = (routing.experts[:, slot] == e).nonzero()[:, 0]
            seen = x[rows]
            at = rows * slots + slot
            kept = [None] * (len(projections) + 1) if keeps is None else [keep[at] for keep in keeps]
            parts = [
                expert_linear(seen, layer, e, keep, keep_scale)
                for layer, keep in zip(projections, kept[:-1], strict=True)
            ]
            if len(parts) == 1 and parts[0].shape[1] == 2 * down.weight.shape[1]:
                parts = list(parts[0].chunk(2, -1))
            hidden = act(parts[0]) if len(parts) == 1 else act(parts[0]) * parts[1]
            part = routing.weights[rows, slot, None].to(x.dtype) * expert_linear(hidden, down, e, kept[-1], keep_scale)
            y = y.index_add(0, rows, part.to(y.dtype))
        if keep_input:
            lost = (routing.experts[:, slot] == experts)[:, None]
            y = y + torch.where(lost, routing.weights[:, slot, None] * x, 0)
    return y


def gated_linear(
    x: Tensor, gates: Tensor, layer: Experts, keep: Tensor | None = None, keep_scale: float = 1.0
) -> Tensor:
    """y = x W^T + bias + sum_e gates[:, e] s drop(x) A_e^T B_e^T; gates [T, E], 0 where an expert is not chosen."""
    assert layer.a is not None and layer.b is not None
    y = x @ layer.weight.T
    xd = x if keep is None else x * keep * keep_scale
    for e in range(gates.shape[1]):
        y = y + gates[:, e, None].to(x.dtype) * (layer.scale * (xd @ layer.a[e].T) @ layer.b[e].T)
    return y if layer.bias is None else y + layer.bias


def scatter_gates(routing: Routing, experts: int) -> Tensor:
    """The weights as a dense [T, E], 0 where an expert is not chosen."""
    wide = routing.weights.new_zeros((routing.weights.shape[0], experts + 1))
    return wide.scatter(1, routing.experts, routing.weights)[:, :-1]
