"""The reference backend's kernels of mixtures: `ops.experts_fused`'s equations, one expert after another in PyTorch.

A definition to judge others by; a mixture that has no kernel of its own is composed of the grouped ones instead.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from fastlora.dispatch import cost
from fastlora.dispatch.registry import Kernel, Limits, register
from fastlora.math.activations import activation
from fastlora.math.segments import GatedExperts, Segments, Side
from fastlora.problem import Problem

Grads = tuple[Tensor | None, Tensor | None]


def _wide(t: Tensor) -> Tensor:
    return t.to(torch.promote_types(t.dtype, torch.float32))


def _each(rows: Segments, slots: int) -> list[tuple[Tensor, Tensor]]:
    """Rows and tokens of every expert."""
    order, offsets = rows.order, rows.offsets.tolist()
    found = [order[first:last] for first, last in itertools.pairwise(offsets)]
    return [(own, own // slots) for own in found]


def _ranks(side: Side | None, v: Tensor, e: int) -> Tensor | None:
    return None if side is None else v @ _wide(side[0][e]).T


def _delta(side: Side | None, h: Tensor | None, e: int, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if side is None or h is None else side[2] * (h @ _wide(side[1][e]).T)


def mixture_fwd(
    problem: Problem, given: GatedExperts, out: int, train: bool
) -> tuple[Tensor, Tensor, list[Tensor | None]]:
    """hidden [T, n], y [T, out], every h."""
    x, w, rows, act, bases, sides = given
    wide, (gate, up) = _wide(x), (_wide(c) for c in bases)
    hidden, y = torch.zeros_like(gate), gate.new_zeros((x.shape[0], out))
    hs = [None if side is None or not train else gate.new_zeros((w.numel(), side[0].shape[1])) for side in sides]
    for e, (own, tokens) in enumerate(_each(rows, w.shape[1])):
        v, weight = wide[tokens], w.reshape(-1)[own, None].to(wide.dtype)
        first, second = (_ranks(side, v, e) for side in sides[:2])
        z1 = gate[tokens] + _delta(sides[0], first, e, gate[tokens])
        z3 = up[tokens] + _delta(sides[1], second, e, up[tokens])
        u = activation(act).forward(z1, torch.empty_like(z1)) * z3
        third = _ranks(sides[2], u, e)
        hidden.index_add_(0, tokens, weight * u)
        y.index_add_(0, tokens, weight * _delta(sides[2], third, e, y[tokens]))
        for h, value in zip(hs, (first, second, third), strict=True):
            if h is not None and value is not None:
                h[own] = value
    return hidden, y, hs


def _back(side: Side | None, h: Tensor | None, d: Tensor, v: Tensor, own: Tensor, e: int, grads: Grads) -> Tensor:
    """What d [rows, out] of one expert's product gives to its input v; fills da and db."""
    if side is None or h is None:
        return torch.zeros_like(v)
    a, b, scale = side
    g = scale * (d @ _wide(b[e]))
    for grad, value in zip(grads, (g.T @ v, scale * (d.T @ h[own].to(d.dtype))), strict=True):
        if grad is not None:
            grad[e] = value.to(grad.dtype)
    return g @ _wide(a[e])


def mixture_bwd(
    problem: Problem,
    dy: Tensor,
    given: GatedExperts,
    d_hidden: Tensor,
    hs: Sequence[Tensor | None],
    needs: Sequence[tuple[bool, bool]],
    need_x: bool,
    need_w: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, list[Grads]]:
    """d of c1 and c3 [T, n], dx [T, k], dw [T, S]; da, db a side."""
    x, w, rows, act, bases, sides = given
    wide, (gate, up), dy, d_hidden = _wide(x), (_wide(c) for c in bases), _wide(dy), _wide(d_hidden)
    d_gate, d_up, dx, dw = torch.zeros_like(gate), torch.zeros_like(up), torch.zeros_like(wide), torch.zeros_like(w)
    grads = [_empty(side, need) for side, need in zip(sides, needs, strict=True)]
    function = activation(act)
    for e, (own, tokens) in enumerate(_each(rows, w.shape[1])):
        v, weight = wide[tokens], w.reshape(-1)[own, None].to(wide.dtype)
        ranks = [None if h is None else h[own].to(wide.dtype) for h in hs]
        z1 = gate[tokens] + _delta(sides[0], ranks[0], e, gate[tokens])
        z3 = up[tokens] + _delta(sides[1], ranks[1], e, up[tokens])
        acted = function.forward(z1, torch.empty_like(z1))
        through = weight * d_hidden[tokens] + _back(sides[2], hs[2], weight * dy[tokens], acted * z3, own, e, grads[2])
        whole = d_hidden[tokens] + _back(sides[2], hs[2], dy[tokens], acted * z3, own, e, (None, None))
        dw.view(-1)[own] = (whole * acted * z3).sum(-1).to(w.dtype)
        d1, d3 = function.backward(through * z3, z1, torch.empty_like(z1)), through * acted
        d_gate.index_add_(0, tokens, d1)
        d_up.index_add_(0, tokens, d3)
        dx.index_add_(0, tokens, _back(sides[0], hs[0], d1, v, own, e, grads[0]))
        dx.index_add_(0, tokens, _back(sides[1], hs[1], d3, v, own, e, grads[1]))
    return d_gate, d_up, dx if need_x else None, dw if need_w else None, grads


def _empty(side: Side | None, need: Sequence[bool]) -> Grads:
    if side is None:
        return None, None
    da, db = (torch.zeros_like(t) if wanted else None for t, wanted in zip(side[:2], need, strict=True))
    return da, db


def routed_fwd(
    problem: Problem, x: Tensor, w: Tensor, rows: Segments, side: Side, y: Tensor, train: bool
) -> Tensor | None:
    """h [T S, r] under `train`; y [T, n] is added to."""
    wide = _wide(x)
    h = wide.new_zeros((w.numel(), side[0].shape[1]))
    for e, (own, tokens) in enumerate(_each(rows, w.shape[1])):
        h[own] = wide[tokens] @ _wide(side[0][e]).T
        y.index_add_(0, tokens, w.reshape(-1)[own, None].to(y.dtype) * _delta(side, h[own], e, y[tokens]).to(y.dtype))
    return h if train else None


def routed_bwd(
    problem: Problem,
    dy: Tensor,
    x: Tensor,
    w: Tensor,
    rows: Segments,
    side: Side,
    h: Tensor,
    dx: Tensor | None,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dw, da, db, those needed; dx [T, k], if given, is added to."""
    wide, dy, dw, pair = _wide(x), _wide(dy), torch.zeros_like(w), _empty(side, needs[1:])
    for e, (own, tokens) in enumerate(_each(rows, w.shape[1])):
        weight = w.reshape(-1)[own, None].to(dy.dtype)
        dw.view(-1)[own] = (side[2] * (dy[tokens] @ _wide(side[1][e])) * h[own]).sum(-1).to(w.dtype)
        back = _back(side, h, weight * dy[tokens], wide[tokens], own, e, pair)
        if dx is not None:
            dx.index_add_(0, tokens, back.to(dx.dtype))
    return dw if needs[0] else None, *pair


def _seconds(problem: Problem) -> float:
    return (3 * cost.roofline_seconds(problem) + 10 * cost.device(problem.device).launch) * max(1, problem.groups)


for _run in (mixture_fwd, mixture_bwd, routed_fwd, routed_bwd):
    register(Kernel(_run.__name__, "reference", _run, Limits(), _seconds, "torch"))
