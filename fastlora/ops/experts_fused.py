"""Mixtures in one call a direction, where a backend has it, beside the frozen products: an MLP, which `ops.experts_mlp`
composes otherwise, and a linear whose tokens go to few experts, which `ops.experts` forms for all of them otherwise.

Kernel.run signatures; T tokens, S slots, E experts, k in, n the width of the hidden rows; given is a `GatedExperts`, a
side (a [E, r, in], b [E, out, r], scale). problem: m = T S, r the largest rank.
  mixture_fwd(problem, given, out, train) -> hidden fp32 [T, n], y fp32 [T, out], every h
  mixture_bwd(problem, dy, given, d_hidden, hs, needs, need_x, need_w)
      -> fp32 d of c1 and of c3 [T, n], dx [T, k], dw [T, S], and (da, db) a side; None where not needed
For row p = t S + j of expert e, with bases c1, c3 [T, n] (bias inside):
  h1 = x_t A1^T, h3 = x_t A3^T; z = c_t + s h B^T; u = act(z1) * z3; h2 = u A2^T  (every h fp32 [T S, r], 0 without e)
  hidden_t = sum_j w_tj u;  y_t = sum_j w_tj s h2 B2^T, which lacks W2 hidden_t
  D = d_hidden_t + s (dy_t B2) A2, d_hidden = dy W2;  dw_tj = <D, u>;  dz1 = w D z3 act'(z1), dz3 = w D act(z1)
  d of c = sum_j dz;  dx_t = sum_j s (dz1 B1) A1 + s (dz3 B3) A3, which lacks d(c) W;  da, db as of a linear.
  routed_fwd(problem, x, w, rows, side, y, train) -> h; y fp32 [T, n] += sum_j w_tj s h B^T, h = x_t A^T
  routed_bwd(problem, dy, x, w, rows, side, h, dx, needs) -> dw, da, db, those needed; g = s dy_t B, dw_tj = <g, h>,
      dx fp32 [T, k], or None, += sum_j w_tj g A
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastlora import backends, settings
from fastlora.dispatch import registry
from fastlora.math.moe import Routing, scatter_gates
from fastlora.math.segments import GatedExperts, segments
from fastlora.ops.experts import Frozen, base_backward, base_forward, gated_linear, put_together, take_apart
from fastlora.ops.lora import _direct
from fastlora.ops.schema import _run
from fastlora.problem import DENSE, NEED_DA, NEED_DB, TRAIN, Problem

_ACTS = ("silu", "gelu_tanh")


class Mixture:
    """One mixture whose passes the kernels take whole; made by `mixture_of`."""

    def __init__(self, problem: Problem, act: str, layers: Sequence[Frozen], pairs: Sequence[Any]) -> None:
        self.problem, self.act, self.layers = problem, act, layers
        self.sides = [None if pair is None else (*pair, layer.scale) for pair, layer in zip(pairs, layers, strict=True)]

    def _given(self, x: Tensor, w: Tensor, experts: Tensor, cs: Sequence[Tensor]) -> GatedExperts:
        rows = segments(experts.reshape(-1), self.problem.groups)
        return GatedExperts(x, w, rows, self.act, cs, self.sides)

    def forward(
        self, x: Tensor, w: Tensor, experts: Tensor, train: int
    ) -> tuple[Tensor, list[Tensor], list[Tensor | None]]:
        """y [T, out] in the dtype of x; c1 and c3; every h."""
        gate, up, down = self.layers
        cs = [base_forward(x, gate), base_forward(x, up)]
        problem = self.problem._replace(flags=train)
        given, out = self._given(x, w, experts, cs), down.weight.shape[0]
        hidden, y, hs = _run(problem, settings.current.backend, given, out, bool(train))
        y += base_forward(hidden.to(x.dtype), down, bias=False)
        if down.bias is not None:
            y += w.sum(-1, keepdim=True) * down.bias
        return y.to(x.dtype), cs, hs

    def backward(
        self,
        dy: Tensor,
        x: Tensor,
        w: Tensor,
        experts: Tensor,
        cs: Sequence[Tensor],
        hs: Sequence[Tensor | None],
        needs: Sequence[bool],
    ) -> tuple[Tensor | None, Tensor | None, list[Tensor | None]]:
        """dx [T, k], dw [T, S], and da, db, None of each linear. needs: of x, of w, then of a, b and mag of each."""
        gate, up, down = self.layers
        need_x, need_w, *each = needs
        pairs = [(each[at], each[at + 1]) for at in range(0, len(each), 3)]
        problem = self.problem._replace(op="mixture_bwd", flags=NEED_DA | NEED_DB)
        given = (dy, self._given(x, w, experts, cs), base_backward(dy, down), hs, pairs, need_x, need_w)
        d_gate, d_up, dx, dw, grads = _run(problem, settings.current.backend, *given)
        if dx is not None:
            dx += base_backward(d_gate.to(x.dtype), gate)
            dx += base_backward(d_up.to(x.dtype), up)
            dx = dx.to(x.dtype)
        if dw is not None and down.bias is not None:
            dw += (dy @ down.bias.to(dy.dtype))[:, None]
        return dx, dw, [t for da, db in grads for t in (da, db, None)]


def mixture_of(
    x: Tensor,
    w: Tensor,
    experts: Tensor,
    seed: Tensor | None,
    layers: Sequence[Frozen],
    tensors: Sequence[Tensor | None],
    act: object,
) -> Mixture | None:
    """The mixture of a gate, an up and a down projection, if some kernel takes it; else None.

    Not with dropout, DoRA, other activations, or where a compiler or a mode wants to see the ops.

    Args:
        x: [T, k]. w, experts: [T, S]. seed: None without dropout.
        tensors: a, b, mag of each layer.
    """
    matrices = [t for at in range(0, 9, 3) for t in tensors[at : at + 2] if t is not None]
    if len(layers) != 3 or seed is not None or act not in _ACTS or not matrices or not x.shape[0]:
        return None
    if any(t is not None for t in tensors[2::3]) or w.dtype != torch.float32 or not w.shape[1]:
        return None
    dtype, (width, k) = matrices[0].dtype, layers[0].weight.shape
    if any(t.dtype != dtype for t in matrices) or not _direct(x, w, experts, *matrices):
        return None
    rank, groups = max(t.shape[1] for t in matrices[::2]), matrices[0].shape[0]
    rows = experts.numel()
    problem = Problem("mixture_fwd", rows, width, k, rank, x.dtype, dtype, DENSE, TRAIN, x.device.type, groups)
    backends.load()
    if not registry.has_own(problem, settings.current.backend):
        return None
    pairs = [None if tensors[at] is None else (tensors[at], tensors[at + 1]) for at in range(0, 9, 3)]
    return Mixture(problem, str(act), layers, pairs)


# --- one linear -------------------------------------------------------------------------------------------------------


class RoutedLinear(torch.autograd.Function):
    """y_t = W x_t + bias + sum_j w_tj s B_e A_e x_t, e = experts_tj: each token's own experts alone.

    x [T, k], w [T, S], experts int64 [T, S], a [E, r, k], b [E, n, r] -> y [T, n]. Saved: x, w, experts, h [T S, r],
    references to the parameters.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, w: Tensor, experts: Tensor, a: Tensor, b: Tensor, layer: Frozen, problem: Problem
    ) -> Tensor:
        """The base, and one call that adds to it."""
        with torch.amp.autocast(x.device.type, enabled=False):
            y = base_forward(x, layer).float()
            rows = segments(experts.reshape(-1), a.shape[0])
            h = _run(problem, settings.current.backend, x, w, rows, (a, b, layer.scale), y, True)
        parts, ctx.facts = take_apart(layer)
        ctx.problem = problem._replace(op="routed_bwd", flags=NEED_DA | NEED_DB)
        ctx.save_for_backward(x, w, experts, a, b, h, *parts)
        return y.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Any:
        """dy [T, n] -> dx, dw, da, db."""
        x, w, experts, a, b, h, *parts = ctx.saved_tensors
        layer, dy = put_together(parts, ctx.facts), dy.contiguous()
        need_x, need_w, _, *need = ctx.needs_input_grad[:5]
        with torch.amp.autocast(x.device.type, enabled=False):
            dx = base_backward(dy, layer).float() if need_x else None
            rows = segments(experts.reshape(-1), a.shape[0])
            given = (dy, x, w, rows, (a, b, layer.scale), h, dx, (need_w, *need))
            dw, da, db = _run(ctx.problem, settings.current.backend, *given)
        return None if dx is None else dx.to(x.dtype), dw, None, da, db, None, None


def routed_linear(
    x: Tensor, w: Tensor, experts: Tensor, a: Tensor, b: Tensor, seed: Tensor | None, layer: Frozen
) -> Tensor:
    """`RoutedLinear` where a kernel takes it and few enough experts are chosen; else `gated_linear`.

    x [T, k], w fp32 [T, S], experts int64 [T, S] -> [T, n]; the experts of one token differ.
    """
    (groups, rank, k), slots = a.shape, w.shape[1]
    suits = seed is None and x.shape[0] and 2 * slots <= groups and a.dtype == b.dtype and w.dtype == torch.float32
    if suits and _direct(x, w, experts, a, b):
        sizes = (x.shape[0] * slots, b.shape[1], k, rank, x.dtype, a.dtype)
        problem = Problem("routed_fwd", *sizes, DENSE, TRAIN, x.device.type, groups)
        backends.load()
        if registry.has_own(problem, settings.current.backend):
            y: Tensor = RoutedLinear.apply(x.contiguous(), w, experts, a, b, layer, problem)
            return y
    gates = scatter_gates(Routing(w, experts), groups)
    return gated_linear(x, gates, a, b, seed, layer)
