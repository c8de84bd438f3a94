"""A mixture of LoRA experts over a whole gated MLP (MixLoRA, 2404.15159) as one autograd Function.

T tokens, S slots a token (experts it goes to), E experts; row p = t S + j is token t in slot j. A row whose slot has no
expert belongs to nobody (`math.segments`): it sees the base alone, and its weight is 0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastlora import settings
from fastlora.math.activations import activation
from fastlora.math.segments import Segments
from fastlora.ops import experts_schema
from fastlora.ops.experts import PARTS, Frozen, base_backward, base_forward, put_together, take_apart
from fastlora.ops.lora import _direct
from fastlora.problem import DORA, DROPOUT, NEED_DA, NEED_DB, NEED_DMAG, NEED_DX, TRAIN

_ops = torch.ops.fastlora


class Facts(NamedTuple):
    """The static facts of a mixture of MLPs.

    Attributes:
        slots: S.
        inputs: how many projections read x: two (gate, up), or one that holds both, gate first, or one alone (`gated`
            False: fc1).
        gated: whether the activated half is multiplied by the other.
        act: a name of `math.activations`, or a function.
        low_memory: draw dropout masks again in the backward.
    """

    slots: int
    inputs: int
    gated: bool
    act: str | Callable[[Tensor], Tensor]
    low_memory: bool


def _repeat(t: Tensor, slots: int) -> Tensor:
    """t [T, n] -> fresh rows [T S, n], each token's side by side."""
    return t[:, None].expand(-1, slots, -1).reshape(-1, t.shape[1]) if slots > 1 else t.clone()


def _combine(rows: Tensor, w: Tensor) -> Tensor:
    """rows [T S, n], w [T, S] -> sum over a token's slots of w row, in at least fp32: [T, n]."""
    view = rows.view(*w.shape, rows.shape[1])
    if rows.dtype == w.dtype:
        return torch.bmm(w[:, None], view)[:, 0]
    total = view[:, 0] * w[:, 0, None]
    for slot in range(1, w.shape[1]):
        total += view[:, slot] * w[:, slot, None]
    return total


def _sum_slots(rows: Tensor, slots: int) -> Tensor:
    return rows.view(-1, slots, rows.shape[1]).sum(1) if slots > 1 else rows


class _Side(NamedTuple):
    """One linear of the MLP with its experts' tensors; a is None where it has no adapters."""

    frozen: Frozen
    a: Tensor | None
    b: Tensor | None
    mag: Tensor | None

    @property
    def flags(self) -> int:
        return DROPOUT * (self.frozen.p > 0) | DORA * (self.mag is not None)


def _mask(side: _Side, rows: Segments, seed: Tensor | None) -> Tensor | None:
    """The dropout bits of a projection's rows, or None."""
    if seed is None or side.frozen.p == 0.0 or side.a is None or side.b is None:
        return None
    body = experts_schema.experts_mask if _direct(seed, side.a, side.b) else _ops.experts_mask
    return body(seed, side.a, side.b, side.frozen.p, side.frozen.stream, *rows, settings.current.backend)


def _add(
    side: _Side, x: Tensor, y: Tensor, bias: Tensor | None, rows: Segments, mask: Tensor | None, train: int
) -> tuple[Tensor | None, Tensor | None]:
    """What each row's expert adds to y [m, n], which holds the base; h and, of DoRA, z where `train` asks."""
    if side.a is None or side.b is None:
        return None, None
    frozen = side.frozen
    group = (side.a, side.b, side.mag, frozen.norm, frozen.scale, frozen.p, frozen.stream)
    body = experts_schema.experts_fwd if _direct(x, side.a, side.b, side.mag, y) else _ops.experts_fwd
    return body(x, y, bias, *group, *rows, mask, side.flags | train, settings.current.backend)


def _add_backward(
    side: _Side,
    dy: Tensor,
    x: Tensor,
    dx: Tensor | None,
    rows: Segments,
    saved: tuple[Tensor | None, Tensor | None, Tensor | None],
    needs: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """da, db, dmag, those needed; dx [m, k] gets what flows through the adapter. saved: h, mask, z."""
    if side.a is None or side.b is None:
        return None, None, None
    frozen = side.frozen
    flags = side.flags | NEED_DX * (dx is not None)
    flags |= sum(bit for bit, need in zip((NEED_DA, NEED_DB, NEED_DMAG), needs, strict=True) if need)
    group = (side.a, side.b, side.mag, frozen.norm, frozen.scale, frozen.p, frozen.stream)
    body = experts_schema.experts_bwd if _direct(dy, side.a, side.b, side.mag, x, dx) else _ops.experts_bwd
    da, db, dmag = body(dy, x, dx, *group, *rows, *saved, flags, settings.current.backend)
    return da, db, dmag if dmag is None or side.mag is None else dmag.to(side.mag.dtype)


def _through_dora(side: _Side, d: Tensor, rows: Segments) -> Tensor:
    """d [m, n] times the factor c of each row's expert: the gradient of its base term."""
    norm = side.frozen.norm
    if side.mag is None or norm is None:
        return d
    c = side.mag.to(norm.dtype) / norm
    return (d * torch.cat([c, torch.ones_like(c[:1])])[rows.owner]).to(d.dtype)


def _halves(zs: list[Tensor], gated: bool) -> tuple[Tensor, Tensor | None]:
    if not gated:
        return zs[0], None
    if len(zs) == 2:
        return zs[0], zs[1]
    gate, up = zs[0].chunk(2, -1)
    return gate, up


def _hidden(zs: list[Tensor], facts: Facts) -> Tensor:
    """act(gate) * up."""
    gate, up = _halves(zs, facts.gated)
    out = activation(facts.act).forward(gate)
    return out if up is None else out.mul_(up)


def _hidden_backward(d: Tensor, zs: list[Tensor], facts: Facts) -> list[Tensor]:
    """d of the hidden rows -> d of each projection's rows."""
    gate, up = _halves(zs, facts.gated)
    act = activation(facts.act)
    if up is None:
        return [act.backward(d, gate)]
    parts = [act.backward(d * up, gate), act.forward(gate).mul_(d)]
    return parts if facts.inputs == 2 else [torch.cat(parts, -1)]


class ExpertsMLP(torch.autograd.Function):
    """y_t = sum_j w_tj FFN_e(t,j)(x_t), FFN_e(x) = W2'(act(W1' x) * W3' x), W' = the frozen W with expert e's adapter.

    c1 = W1 x and c3 = W3 x are formed once a token, z = c + s h B_e^T in every row; W2 is applied once to
    hbar = sum_j w_j act(z1) z3, beside what W2's adapters add to each row. In the backward g = W2^T dy is shared too:
    dw_j = <g + s A2^T B2^T dy, hidden_j>. With DoRA on W2 its product is formed for every row.

    x [T, k], w [T, S], then a [E, r, k], b [E, n, r], mag [E, n] of each input projection and of W2 -> y [T, out].
    Saved: x, w, c1, c3, every h [T S, r], dropout bits (low memory: the seed), of DoRA on W2 its z [T S, out], the
    rows' order, references to the parameters. The rows of z and hidden are formed again.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        w: Tensor,
        rows: Segments,
        seed: Tensor | None,
        layers: tuple[Frozen, ...],
        facts: Facts,
        *tensors: Tensor | None,
    ) -> Tensor:
        """See above."""
        sides = _sides(layers, tensors)
        with torch.amp.autocast(x.device.type, enabled=False):
            y, saved = mlp_forward(x, w, rows, seed, sides, facts, TRAIN)
        ctx.layer_facts, held = [], []
        for layer in layers:
            parts, fact = take_apart(layer)
            ctx.layer_facts.append(fact)
            held += parts
        ctx.facts, ctx.counts = facts, (len(held), len(tensors))
        ctx.save_for_backward(x, w, *rows, seed, *held, *tensors, *saved)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Any:
        """dy [T, out] -> dx, dw, and da, db, dmag of every projection, each only if its input needs it."""
        x, w, owner, order, offsets, seed, *rest = ctx.saved_tensors
        held, tensors = rest[: ctx.counts[0]], rest[ctx.counts[0] : sum(ctx.counts)]
        layers = tuple(
            put_together(held[at : at + PARTS], fact)
            for at, fact in zip(range(0, len(held), PARTS), ctx.layer_facts, strict=True)
        )
        sides, saved = _sides(layers, tensors), rest[sum(ctx.counts) :]
        (need_x, need_w), needs = ctx.needs_input_grad[:2], ctx.needs_input_grad[6:]
        with torch.amp.autocast(x.device.type, enabled=False):
            dx, dw, grads = _mlp_backward(
                dy.contiguous(),
                x,
                w,
                Segments(owner, order, offsets),
                seed,
                sides,
                ctx.facts,
                saved,
                (need_x, need_w, needs),
            )
        return dx, dw, None, None, None, None, *grads


def _sides(layers: Sequence[Frozen], tensors: Sequence[Any]) -> list[_Side]:
    return [_Side(layer, *tensors[3 * at : 3 * at + 3]) for at, layer in enumerate(layers)]


def mlp_forward(
    x: Tensor, w: Tensor, rows: Segments, seed: Tensor | None, sides: Sequence[_Side], facts: Facts, train: int
) -> tuple[Tensor, list[Tensor | None]]:
    """y, and under `train` what the backward needs: (c, h, mask) of each input projection, then (h, mask, z) of W2."""
    *inputs, down = sides
    saved: list[Tensor | None] = []
    xr, zs = _repeat(x, facts.slots) if facts.slots > 1 else x, []
    for side in inputs:
        c, mask = base_forward(x, side.frozen), _mask(side, rows, seed)
        z = _repeat(c, facts.slots)
        # z of DoRA is formed again in the backward.
        h, _ = _add(side, xr, z, side.frozen.bias, rows, mask, train)
        saved += [c, h, None if facts.low_memory else mask]
        zs.append(z)
    hidden = _hidden(zs, facts)
    mask = _mask(down, rows, seed)
    bias, h, z2 = down.frozen.bias, None, None
    if down.mag is not None:
        y_rows = base_forward(hidden, down.frozen)
        h, z2 = _add(down, hidden, y_rows, bias, rows, mask, train)
        y = _combine(y_rows, w)
    else:
        y = base_forward(_combine(hidden, w).to(x.dtype), down.frozen, bias=False)
        if bias is not None:
            y = y + w.sum(-1, keepdim=True) * bias
        if down.a is not None:
            delta = y.new_zeros((hidden.shape[0], y.shape[1]), dtype=x.dtype)
            h, _ = _add(down, hidden, delta, None, rows, mask, train)
            y = y + _combine(delta, w)
    saved += [h, None if facts.low_memory else mask, z2]
    return y.to(x.dtype), saved


def _down_backward(
    dy: Tensor,
    w: Tensor,
    hidden: Tensor,
    rows: Segments,
    side: _Side,
    saved: Sequence[Tensor | None],
    need_w: bool,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor | None, tuple[Tensor | None, ...]]:
    """dy [T, out] -> d of the hidden rows, dw, and da, db, dmag of W2's experts."""
    h, mask, z = saved
    slots = w.shape[1]
    dw, flat, bias = None, w.reshape(-1, 1), side.frozen.bias
    dy_rows = _repeat(dy, slots) if slots > 1 else dy
    if side.mag is not None:
        norm = side.frozen.norm
        assert z is not None and norm is not None
        weighted = (dy_rows * flat).to(dy.dtype)
        d = base_backward(_through_dora(side, weighted, rows), side.frozen)
        grads = _add_backward(side, weighted, hidden, d, rows, (h, mask, z), needs)
        if need_w:
            dw = (_through_dora(side, dy_rows, rows) * z).sum(-1, dtype=w.dtype).view_as(w)
    else:
        d = _repeat(base_backward(dy, side.frozen), slots)
        seen = (hidden * flat).to(hidden.dtype)
        grads = _add_backward(
            side, dy_rows, seen, d, rows, (None if h is None else h * flat.to(h.dtype), mask, None), needs
        )
        if need_w:
            dw = (d * hidden).sum(-1, dtype=w.dtype).view_as(w)
        d = (d * flat).to(d.dtype) if d.dtype != flat.dtype else d.mul_(flat)
    if dw is not None and bias is not None:
        dw = dw + (dy @ bias.to(dy.dtype))[:, None]
    return d, dw, grads


def _mlp_backward(
    dy: Tensor,
    x: Tensor,
    w: Tensor,
    rows: Segments,
    seed: Tensor | None,
    sides: list[_Side],
    facts: Facts,
    saved: Sequence[Tensor | None],
    needs: tuple[bool, bool, Sequence[bool]],
) -> tuple[Tensor | None, Tensor | None, list[Tensor | None]]:
    *inputs, down = sides
    need_x, need_w, need = needs
    xr = _repeat(x, facts.slots) if facts.slots > 1 else x
    zs, seen = [], []
    for at, side in enumerate(inputs):
        c, h, mask = saved[3 * at : 3 * at + 3]
        assert c is not None
        mask = _mask(side, rows, seed) if mask is None else mask
        z = _repeat(c, facts.slots)
        dora = TRAIN if side.mag is not None else 0
        _, inner = _add(side, xr, z, side.frozen.bias, rows, mask, dora)
        zs.append(z)
        seen.append((h, mask, inner))
    hidden = _hidden(zs, facts)
    h, mask, z2 = saved[3 * len(inputs) :]
    mask = _mask(down, rows, seed) if mask is None else mask
    d, dw, down_grads = _down_backward(dy, w, hidden, rows, down, (h, mask, z2), need_w, need[-3:])
    del hidden
    dzs = _hidden_backward(d, zs, facts)
    del zs, d
    dx, dxr = None, torch.zeros_like(xr) if need_x else None
    grads: list[Tensor | None] = []
    for at, side in enumerate(inputs):
        dz = dzs[at]
        grads += _add_backward(side, dz, xr, dxr, rows, seen[at], need[3 * at : 3 * at + 3])
        if need_x:
            part = base_backward(_sum_slots(_through_dora(side, dz, rows), facts.slots), side.frozen)
            dx = part if dx is None else dx + part
    if dxr is not None and dx is not None:
        dx = dx + _sum_slots(dxr, facts.slots)
    return dx, dw, [*grads, *down_grads]


def experts_mlp(
    x: Tensor,
    w: Tensor,
    rows: Segments,
    seed: Tensor | None,
    layers: Sequence[Frozen],
    facts: Facts,
    tensors: Sequence[Tensor | None],
) -> Tensor:
    """`ExpertsMLP`, or its forward alone where nothing needs a gradient."""
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, w, *tensors)):
        y: Tensor = ExpertsMLP.apply(x, w, rows, seed, tuple(layers), facts, *tensors)
        return y
    with torch.amp.autocast(x.device.type, enabled=False):
        return mlp_forward(x, w, rows, seed, _sides(layers, tensors), facts, 0)[0]
