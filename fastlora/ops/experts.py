"""Mixtures of LoRA experts over a frozen linear: the base alone, the router, and all experts in one product.

T tokens, E experts. A whole MLP is in `ops.experts_mlp`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastlora import settings
from fastlora.math import philox
from fastlora.math.nf4 import PackedWeight
from fastlora.ops import schema
from fastlora.ops.dora import dora_weight_norm
from fastlora.ops.lora import _direct, _forward_op
from fastlora.ops.schema import format_of
from fastlora.problem import BIAS, DENSE, NEED_DX

_ops = torch.ops.fastlora


class Frozen(NamedTuple):
    """What one linear holds besides its adapters, and how these enter.

    Attributes:
        weight: [n, k], dense in the dtype of x, or packed. bias: [n] or None. on_grid: as in `lora.adapted_linear`.
        scale, p, stream: of every expert's adapter.
        norm: [E, n] of DoRA, detached, else None.
    """

    weight: Tensor | PackedWeight
    bias: Tensor | None
    on_grid: bool
    scale: float = 1.0
    p: float = 0.0
    stream: int = 0
    norm: Tensor | None = None


def base_forward(x: Tensor, layer: Frozen, bias: bool = True) -> Tensor:
    """x [m, k] through the frozen base, [m, n]."""
    n, k = layer.weight.shape
    vector = layer.bias if bias else None
    call = 1.0, 0, 0.0, BIAS * (vector is not None), settings.current.backend, layer.on_grid
    none = (x.new_empty((0, k)), x.new_empty((n, 0)))
    y: Tensor = _forward_op(x.contiguous(), layer.weight, vector, *none, None, None, None, call)[0]
    return y


def base_backward(dy: Tensor, layer: Frozen) -> Tensor:
    """dy [m, n] -> dx [m, k] of the frozen base."""
    n, k = layer.weight.shape
    dy, weight = dy.contiguous(), layer.weight
    none = (dy.new_empty((0, k)), dy.new_empty((n, 0)))
    tail = (*none, 1.0, None, None, None, None, None, None, 0, 0.0, NEED_DX, settings.current.backend)
    dx: Tensor
    if isinstance(weight, PackedWeight):
        if _direct(dy, weight):
            dx = schema._backward(dy, None, weight, format_of(weight, layer.on_grid), tail)[0]  # type: ignore[assignment]
        else:
            dx = _ops.qlora_bwd.default(dy, None, *weight[:7], layer.on_grid, *tail)[0]
    elif _direct(dy, weight):
        dx = schema._backward(dy, None, weight, DENSE, tail)[0]  # type: ignore[assignment]
    else:
        dx = _ops.lora_bwd.default(dy, None, weight, *tail)[0]
    return dx


PARTS = 7  # tensors of a Frozen


def take_apart(layer: Frozen) -> tuple[list[Tensor | None], Any]:
    """A Frozen as tensors for `save_for_backward` and the rest."""
    weight = layer.weight
    if isinstance(weight, PackedWeight):
        return [*weight[:5], layer.bias, layer.norm], (weight[5:], *layer[2:6])
    return [weight, None, None, None, None, layer.bias, layer.norm], (None, *layer[2:6])


def put_together(tensors: Sequence[Any], facts: Any) -> Frozen:
    """What `take_apart` took apart."""
    packing, on_grid, scale, p, stream = facts
    weight = tensors[0] if packing is None else PackedWeight(*tensors[:5], *packing)
    return Frozen(weight, tensors[5], on_grid, scale, p, stream, tensors[6])


def expert_norms(weight: Tensor | PackedWeight, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """|w + scale b_e a_e| per output row and expert: [E, n], fp32, detached."""
    return torch.stack([dora_weight_norm(weight, each_a, each_b, scale) for each_a, each_b in zip(a, b, strict=True)])


# --- the router -------------------------------------------------------------------------------------------------------


class RouterLogits(torch.autograd.Function):
    """x [T, k], gate [E, k] -> z = x gate^T [T, E] in at least fp32; saves x as it is, not its fp32 copy."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Tensor) -> Tensor:
        """One product."""
        ctx.save_for_backward(x, gate)
        return router_product(x, gate)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dz: Tensor) -> Any:
        """dz [T, E] -> dx [T, k], dgate [E, k]."""
        x, gate = ctx.saved_tensors
        with torch.amp.autocast(x.device.type, enabled=False):
            dx = (dz @ gate.to(dz.dtype)).to(x.dtype) if ctx.needs_input_grad[0] else None
            dgate = (dz.T @ x.to(dz.dtype)).to(gate.dtype) if ctx.needs_input_grad[1] else None
        return dx, dgate


def router_product(x: Tensor, gate: Tensor) -> Tensor:
    """x gate^T in the wider of fp32 and their dtypes, whatever autocast says and whether TF32 is allowed or not."""
    dtype = torch.promote_types(torch.promote_types(x.dtype, gate.dtype), torch.float32)
    with torch.amp.autocast(x.device.type, enabled=False):
        if x.device.type == "cuda" and dtype == torch.float32:
            return product_of_terms(x, gate.to(dtype))
        return x.to(dtype) @ gate.to(dtype).T


_TF32 = -(1 << 13)  # the bits of an fp32 number that TF32 keeps: 11 significant ones


def tf32_terms(t: Tensor) -> list[Tensor]:
    """Three fp32 tensors that TF32 holds exactly, whose sum is t; of a 16-bit t one."""
    if t.dtype.itemsize == 2:
        return [t.float()]
    terms = []
    for _ in range(3):
        term = (t.view(torch.int32) & _TF32).view(torch.float32)
        terms.append(term)
        t = t - term
    return terms


def product_of_terms(x: Tensor, gate: Tensor) -> Tensor:
    """x [T, k], gate fp32 [E, k] -> x gate^T, as exact on units that round their operands to TF32."""
    stacked = torch.cat(tf32_terms(gate))  # [3 E, k]
    z = None
    for term in tf32_terms(x):
        part = (term @ stacked.T).view(-1, 3, gate.shape[0]).sum(1)
        z = part if z is None else z + part
    assert z is not None
    return z


def router_logits(x: Tensor, gate: Tensor) -> Tensor:
    """`RouterLogits`, or its product alone where nothing needs a gradient."""
    if torch.is_grad_enabled() and (x.requires_grad or gate.requires_grad):
        logits: Tensor = RouterLogits.apply(x, gate)
        return logits
    return router_product(x, gate)


# --- one linear, all experts in one low-rank product ------------------------------------------------------------------


def _product_dtype(x: Tensor) -> torch.dtype:
    """What rank-sized products are formed in: fp32 and wider as they are, 16 bits on a GPU's matrix units."""
    if x.device.type == "cuda" and x.dtype.itemsize == 2:
        return x.dtype
    return torch.promote_types(x.dtype, torch.float32)


def _dropped(x: Tensor, mask: Tensor | None, p: float, dtype: torch.dtype) -> Tensor:
    if mask is None:
        return x.to(dtype)
    return x.to(dtype) * philox.unpack_bits(mask, x.shape[1]) * philox.keep_scale(p)


class GatedLinear(torch.autograd.Function):
    """y = x W^T + bias + s (t * (g (x) 1_r)) B_cat^T, t = drop(x) A_cat^T: every expert in one product of rank E r.

    x [T, k], gates g [T, E] (0 where an expert is not chosen), a [E, r, k], b [E, n, r] -> y [T, n]. One dropout mask
    is shared by all experts. Saved: x, g, t [T, E r], the mask's bits, references to the parameters.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, gates: Tensor, a: Tensor, b: Tensor, seed: Tensor | None, layer: Frozen) -> Tensor:
        """The base once, two products of rank E r."""
        experts, r, k = a.shape
        dtype = _product_dtype(x)
        with torch.amp.autocast(x.device.type, enabled=False):
            mask = None
            if seed is not None:
                mask = _ops.dropout_mask(seed, layer.stream, x.shape[0], k, layer.p, settings.current.backend)
            y = base_forward(x, layer)
            t = _dropped(x, mask, layer.p, dtype) @ a.reshape(-1, k).to(dtype).T
            u = (t.view(-1, experts, r) * (layer.scale * gates[..., None])).to(dtype).view_as(t)
            y = _add_product(y, u, _wide_b(b, dtype))
        parts, ctx.facts = take_apart(layer)
        ctx.save_for_backward(x, gates, a, b, t, mask, *parts)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Any:
        """dy [T, n] -> dx, dgates, da, db."""
        x, gates, a, b, t, mask, *parts = ctx.saved_tensors
        layer, (experts, r, k), dtype = put_together(parts, ctx.facts), a.shape, t.dtype
        need_x, need_gates, need_a, need_b = ctx.needs_input_grad[:4]
        dx = dgates = da = db = None
        with torch.amp.autocast(x.device.type, enabled=False):
            t3, wide = t.view(-1, experts, r), dy.to(dtype)
            weight = (layer.scale * gates)[..., None]
            if need_b:
                u = (t3 * weight).to(dtype).view_as(t)
                db = (wide.T @ u).view(-1, experts, r).transpose(0, 1).to(b.dtype).contiguous()
            du = (wide @ _wide_b(b, dtype)).view_as(t3)
            if need_gates:
                dgates = (layer.scale * (du * t3).sum(-1, dtype=gates.dtype)).to(gates.dtype)
            dt = (du * weight).to(dtype).view_as(t)
            if need_a:
                da = (dt.T @ _dropped(x, mask, layer.p, dtype)).view(a.shape).to(a.dtype)
            if need_x:
                dx = base_backward(dy, layer)
                a_cat = a.reshape(-1, k).to(dtype)
                dx = _add_product(dx, dt, a_cat.T) if mask is None else dx + _dropped(dt @ a_cat, mask, layer.p, dtype)
                dx = dx.to(x.dtype)
        return dx, dgates, da, db, None, None


def _wide_b(b: Tensor, dtype: torch.dtype) -> Tensor:
    """b [E, n, r] -> B_cat [n, E r]."""
    return b.to(dtype).transpose(0, 1).reshape(b.shape[1], -1)


def _add_product(y: Tensor, u: Tensor, b: Tensor) -> Tensor:
    """y + u b^T, y changed in place where the dtypes allow; u [T, q], b [n, q]."""
    if y.dtype == u.dtype:
        return y.addmm_(u, b.T)
    return (y + u @ b.T).to(y.dtype)


def gated_linear(x: Tensor, gates: Tensor, a: Tensor, b: Tensor, seed: Tensor | None, layer: Frozen) -> Tensor:
    """`GatedLinear`; x [T, k] -> [T, n]."""
    y: Tensor = GatedLinear.apply(x, gates, a, b, seed, layer)
    return y
