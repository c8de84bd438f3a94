"""The gated unit act(gate) * up of a transformer's MLP (SwiGLU, GEGLU; 2002.05202), alone or with the down-projection.

Both forms keep gate and up for the backward as their projections made them, and nothing of their own. Fused with the
adapted linear that follows, its x, the product, is made again in the backward, in the pass that makes dgate and dup:
two [m, i] tensors less than eager PyTorch keeps (act(gate) and the product).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastlora.errors import DtypeError, ShapeError
from fastlora.math.gated import NAMES
from fastlora.ops import projections
from fastlora.ops.lora import as_seed
from fastlora.ops.member import (
    NEEDS,
    Member,
    Projection,
    alone,
    check,
    compute_dtype,
    forward,
    pack,
    plain,
    ready,
    unpack,
    watched,
)
from fastlora.ops.merged import merged_lives
from fastlora.ops.schema import _run
from fastlora.problem import DENSE, LAZY_H, NEED_DA, NEED_DB, NEED_DX, SAVE_MASK, TRAIN, Problem


def _problem(op: str, gate: Tensor) -> Problem:
    m, n = gate.shape
    return Problem(op, m, n, 0, 0, gate.dtype, gate.dtype, DENSE, 0, gate.device.type)


def _product(gate: Tensor, up: Tensor, act: str, backend: str) -> Tensor:
    product: Tensor = _run(_problem("glu_fwd", gate), backend, gate, up, act)
    return product


class Gated(torch.autograd.Function):
    """gate, up [m, i] -> act(gate) * up; keeps gate and up."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, act: str, backend: str) -> Tensor:
        """One pass."""
        ctx.save_for_backward(gate, up)
        ctx.facts = act, backend
        return _product(gate, up, act, backend)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d: Tensor) -> Any:
        """d[m, i] -> dgate, dup."""
        gate, up = ctx.saved_tensors
        act, backend = ctx.facts
        dgate, dup, _ = _run(_problem("glu_bwd", gate), backend, d.contiguous(), gate, up, act, False)
        return dgate, dup, None, None


class GatedLinear(torch.autograd.Function):
    """gate, up [m, i] -> adapted linear of act(gate) * up, [m, n]; keeps gate, up, h, mask, z, not the product."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, *rest: Any) -> Tensor:
        """rest: a, b, mag, bias, the rest of the member, act."""
        *fields, act = rest
        member = Member(*fields)
        need_gate, need_up, _, need_b, need_mag = ctx.needs_input_grad[:5]
        product = _product(gate, up, act, member.call.backend)
        keep = (need_gate or need_up) and merged_lives()
        with projections.no_autocast(product):
            ((y, h, mask, z),), weights = projections.forward(product, [member], keep)
        tensors, ctx.facts = pack(member, h if need_b else None, mask, z if need_mag else None)
        ctx.act = act
        ctx.save_for_backward(gate, up, *weights, *tensors)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Any:
        """dy[m, n] -> dgate, dup, da, db, dmag, dbias: dx first, then with the product made again the rest."""
        gate, up, weight, *tensors = ctx.saved_tensors
        need_gate, need_up, *need_own = ctx.needs_input_grad[:6]
        kept, dy = unpack(tensors, ctx.facts), dy.contiguous()
        call = kept.member.call
        lazy = bool(call.flags & LAZY_H)
        kept = kept._replace(member=kept.member._replace(call=call._replace(flags=call.flags & ~(TRAIN | SAVE_MASK))))
        own = sum(bit for bit, need in zip(NEEDS, need_own, strict=True) if need)
        again = bool(own & NEED_DA or (lazy and own & NEED_DB))
        dgate = dup = product = None
        if need_gate or need_up:
            with projections.no_autocast(dy):
                d, _ = projections.backward(None, [kept], [dy], [NEED_DX], [weight])
            dgate, dup, product = _run(_problem("glu_bwd", gate), call.backend, d, gate, up, ctx.act, again)
        elif again:
            product = _product(gate, up, ctx.act, call.backend)
        grads = kept.cast(kept.run(dy, product, own)[1:]) if own else [None] * 4
        return dgate if need_gate else None, dup if need_up else None, *grads, *[None] * 5


def _check(gate: Tensor, up: Tensor, act: str) -> None:
    if act not in NAMES:
        raise ShapeError(f"act must be one of {', '.join(NAMES)}, got {act!r}")
    if gate.shape != up.shape or gate.dim() < 1:
        raise ShapeError(f"expected gate and up of one shape [..., i], got {tuple(gate.shape)} and {tuple(up.shape)}")
    if gate.dtype != up.dtype or not gate.is_floating_point():
        raise DtypeError(f"expected gate and up of one float dtype, got {gate.dtype} and {up.dtype}")
    if gate.device != up.device:
        raise DtypeError(f"expected gate and up on one device, got {gate.device} and {up.device}")


def eager(gate: Tensor, up: Tensor, act: str) -> Tensor:
    """The same by PyTorch's operations, for whatever looks on."""
    if act == "silu":
        return torch.nn.functional.silu(gate) * up
    if act == "relu":
        return torch.nn.functional.relu(gate) * up
    return torch.nn.functional.gelu(gate, approximate="tanh" if act == "gelu_tanh" else "none") * up


def _flat(t: Tensor) -> Tensor:
    return (t if t.dim() == 2 else t.reshape(-1, t.shape[-1])).contiguous()


def glu(gate: Tensor, up: Tensor, act: str = "silu", *, backend: str | None = None) -> Tensor:
    """act(gate) * up (2002.05202), one pass each way; only gate and up are kept for the backward.

    Args:
        gate, up: [..., i], one float dtype, which the result has.
        act: "silu" (SwiGLU), "gelu" (GEGLU), "gelu_tanh" or "relu".
        backend: force one; never falls back in silence.

    Raises:
        ShapeError, DtypeError: what was expected and what came. UnsupportedError: why no backend can.
    """
    _check(gate, up, act)
    if watched() or not plain(gate, up):
        return eager(gate, up, act)
    flat = _flat(gate), _flat(up)
    if torch.is_grad_enabled() and (gate.requires_grad or up.requires_grad):
        y: Tensor = Gated.apply(*flat, act, backend or "")
    else:
        y = _product(*flat, act, backend or "")
    return y if gate.dim() == 2 else torch.ops.aten._unsafe_view(y, gate.shape)


def glu_linear(
    gate: Tensor,
    up: Tensor,
    projection: Projection,
    act: str = "silu",
    *,
    seed: int | Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """The adapted linear `projection` of act(gate) * up; its x is not kept but made again in the backward.

    Args:
        gate, up: [..., i], one float dtype, which the result has.
        projection: of in_features i.
        act, backend: as in `glu`. seed: as in `lora_linear`.

    Returns:
        [..., n].

    Raises:
        ShapeError, DtypeError: what was expected and what came. UnsupportedError: why no backend can.
    """
    _check(gate, up, act)
    check(gate, projection)
    dtype = compute_dtype(gate, [projection])
    drop = as_seed(seed, gate.device) if projection.dropout_p else None
    if watched() or not plain(gate, up, *projection.tensors) or dtype != gate.dtype:
        return alone(eager(gate, up, act), projection, drop, backend)
    flat = _flat(gate), _flat(up)
    train = projection.trains(gate) or (torch.is_grad_enabled() and up.requires_grad)
    member = ready(flat[0], projection, drop, backend, train=train, lazy_h=True)
    if train:
        y: Tensor = GatedLinear.apply(*flat, *member, act)
    else:
        y = forward(_product(*flat, act, backend or ""), member)[0]
    return y if gate.dim() == 2 else torch.ops.aten._unsafe_view(y, (*gate.shape[:-1], y.shape[1]))
