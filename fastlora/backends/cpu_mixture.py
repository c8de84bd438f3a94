"""The CPU backend's kernels for a mixture of experts over a gated MLP or a linear (csrc/cpu/mixture.h).

Everything between the products with the frozen weights in one call each way: experts' matrices, activation, weights,
sums over a token's slots. Nothing as large as [rows, width] is formed. fp32 inside; results do not depend on the number
of threads, bit for bit.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

import torch
from torch import Tensor

from fastlora.backends import _cpu_library
from fastlora.backends._cpu_library import ADAPTED, DTYPES, address, aligned
from fastlora.dispatch.registry import Kernel, register
from fastlora.math.segments import GatedExperts, Segments, Side
from fastlora.problem import Problem

ACTS = {"silu": 0, "gelu_tanh": 1}
_pack_call = struct.Struct("=17q").pack  # `struct Mixture` between its Args and its sides
_pack_side = struct.Struct("=2qd4q").pack


def _call(
    op: str,
    problem: Problem,
    shape: tuple[int, int, int],
    rows: Segments,
    inputs: Sequence[Tensor | None],
    outputs: Sequence[Tensor | None],
    sides: Sequence[Side | None],
    results: Sequence[tuple[Tensor | None, Tensor | None, Tensor | None]],
) -> None:
    """One call. shape: slots, out, act; inputs: x, dy, w, gate's and up's base, d_hidden; results: h, da, db a side."""
    library = _cpu_library.library()
    keep: list[Tensor] = []
    x, dy, *between = (0 if t is None else aligned(t, keep) for t in inputs)
    slots, out, act = shape
    record = _cpu_library.pack(
        m=problem.m // slots,
        n=problem.n,
        k=problem.k,
        r=problem.r,
        dtype=DTYPES[problem.dtype],
        tier=library.tier(),
        x=x,
        dy=dy,
    )
    order, offsets = rows.order.data_ptr(), rows.offsets.data_ptr()
    fixed = (slots, out, problem.groups, DTYPES[problem.adapter_dtype], act, order, offsets)
    record += _pack_call(*fixed, *between, *map(address, outputs))
    for side, (h, da, db) in zip(sides, results, strict=True):
        if side is None:
            record += _pack_side(0, 0, 0.0, 0, 0, 0, 0)
            continue
        a, b, scale = side
        places = aligned(a, keep), aligned(b, keep)
        record += _pack_side(*places, scale, a.shape[1], address(h), address(da), address(db))
    library.call(op, record)


def _empty(side: Side | None, need_a: bool, need_b: bool) -> tuple[Tensor | None, Tensor | None]:
    """Space for da and db."""
    if side is None:
        return None, None
    da, db = (
        torch.empty_like(t, memory_format=torch.contiguous_format) if need else None
        for t, need in zip(side[:2], (need_a, need_b), strict=True)
    )
    return da, db


def mixture_fwd(
    problem: Problem, given: GatedExperts, out: int, train: bool
) -> tuple[Tensor, Tensor, list[Tensor | None]]:
    """fp32 hidden [T, n], what W2's adapters add [T, out], and under `train` h of each side, fp32 [T S, r]."""
    x, w, rows, act, bases, sides = given
    tokens, slots = w.shape
    hidden = torch.empty((tokens, problem.n), dtype=torch.float32)
    y = torch.zeros((tokens, out), dtype=torch.float32)
    # Rows of no expert are not visited.
    hs = [None if side is None or not train else torch.zeros((tokens * slots, side[0].shape[1])) for side in sides]
    results = [(h, None, None) for h in hs]
    inputs, outputs = (x, None, w, *bases, None), (hidden, y, None, None, None, None)
    _call("mixture_fwd", problem, (slots, out, ACTS[act]), rows, inputs, outputs, sides, results)
    return hidden, y, hs


def mixture_bwd(
    problem: Problem,
    dy: Tensor,
    given: GatedExperts,
    d_hidden: Tensor,
    hs: Sequence[Tensor | None],
    needs: Sequence[tuple[bool, bool]],
    need_x: bool,
    need_w: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, list[tuple[Tensor | None, Tensor | None]]]:
    """dy [T, out], d_hidden = dy W2 -> fp32 d of c1 and c3 [T, n], the adapters' dx [T, k], dw; da, db a side."""
    x, w, rows, act, bases, sides = given
    tokens, slots = w.shape
    d_gate, d_up = torch.empty((2, tokens, problem.n), dtype=torch.float32)
    dx = torch.zeros((tokens, problem.k), dtype=torch.float32) if need_x else None
    dw = torch.zeros_like(w, memory_format=torch.contiguous_format) if need_w else None
    grads = [_empty(side, *need) for side, need in zip(sides, needs, strict=True)]
    results = [(h, da, db) for h, (da, db) in zip(hs, grads, strict=True)]
    inputs, outputs = (x, dy, w, *bases, d_hidden), (None, None, d_gate, d_up, dx, dw)
    shape = (slots, dy.shape[1], ACTS[act])
    _call("mixture_bwd", problem, shape, rows, inputs, outputs, sides, results)
    return d_gate, d_up, dx, dw, grads


def routed_fwd(
    problem: Problem, x: Tensor, w: Tensor, rows: Segments, side: Side, y: Tensor, train: bool
) -> Tensor | None:
    """x [T, k], w fp32 [T, S] -> h fp32 [T S, r] under `train`; y fp32 [T, n] is added to."""
    slots, out = w.shape[1], y.shape[1]
    h = torch.zeros((w.numel(), side[0].shape[1])) if train else None
    inputs, outputs = (x, None, w, None, None, None), (None, y, None, None, None, None)
    none = (None, None, None)
    _call(
        "routed_fwd", problem, (slots, out, 0), rows, inputs, outputs, (side, None, None), ((h, None, None), none, none)
    )
    return h


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
    """dy [T, n] -> dw, da, db, those needed; dx fp32 [T, k], if given, is added to."""
    dw = torch.zeros_like(w, memory_format=torch.contiguous_format) if needs[0] else None
    da, db = _empty(side, *needs[1:])
    inputs, outputs = (x, dy, w, None, None, None), (None, None, None, None, dx, dw)
    none, shape = (None, None, None), (w.shape[1], dy.shape[1], 0)
    _call("routed_bwd", problem, shape, rows, inputs, outputs, (side, None, None), ((h, da, db), none, none))
    return dw, da, db


register(Kernel("mixture_fwd", "cpu", mixture_fwd, ADAPTED))
register(Kernel("mixture_bwd", "cpu", mixture_bwd, ADAPTED))
register(Kernel("routed_fwd", "cpu", routed_fwd, ADAPTED))
register(Kernel("routed_bwd", "cpu", routed_bwd, ADAPTED))
