"""The backward plans: which kernels make up the gradients of x, a, b, the magnitude and the bias.

With d = c ∘ dy for DoRA (d = dy otherwise), c = mag / norm a constant:

    g = d b     db = s dᵀ h     da = s gᵀ drop(x)     dbias = Σ dy     dmag = Σ dy ∘ z / norm
    dx = d w + s drop'(g a);    DoRA with its own drop:  dx = dy w + drop'((d - dy) w + s g a)

    merge   quantized base, p = 0: dx = dy w_eff, the same bits as the forward's w_eff
    split   dx = s drop'(g a) first, the base product accumulates onto it in place
    dense   own product over the dense (or once decoded) weight, the adapter's term in its epilogue
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastlora.backends.triton import compose, expand, grad_a, project, shrink
from fastlora.backends.triton import dense as dense_kernels
from fastlora.backends.triton import weight as weights
from fastlora.backends.triton.dropout import dropout_mask
from fastlora.backends.triton.forward import Weight, decoded, own_drop, splits
from fastlora.backends.triton.launch import on_device
from fastlora.backends.triton.merge import merge as merged_weight
from fastlora.backends.triton.project import Projected
from fastlora.backends.triton.shrink import Planes
from fastlora.math import philox
from fastlora.math.nf4 import PackedWeight
from fastlora.problem import DORA, DROPOUT, NEED_DA, NEED_DB, NEED_DBIAS, NEED_DMAG, NEED_DX, Problem

Outputs = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]


class Given(NamedTuple):
    """What a group of projections has made for one of them."""

    weight: Tensor | None = None  # merged with c, or decoded (with c), as the plan wants it
    low_rank: tuple[Projected, Tensor | None] | None = None  # the projections of dy, and da; no g: dx holds its term
    into: Tensor | None = None  # dx of the others, to which this one's is added


class Call(NamedTuple):
    """The arguments of one backward, as every plan takes them; `bits` and `dscale` are dropout's."""

    problem: Problem
    dy: Tensor
    x: Tensor | None
    weight: Weight
    a: Tensor
    b: Tensor
    scale: float
    mag: Tensor | None
    norm: Tensor | None
    h: Tensor | None
    bits: Tensor | None
    z: Tensor | None
    dscale: float
    given: Given = Given()

    def needs(self, flag: int) -> bool:
        """Whether a gradient is asked for."""
        return bool(self.problem.flags & flag)


def project_all(
    call: Call,
    *,
    need_g: bool,
    scaled: str | None = None,
    need_db: bool | None = None,
    g_factor: float = 1.0,
    g_out: Tensor | None = None,
    later: list[Planes] | None = None,
) -> Projected:
    """One pass over dy: g (times g_factor, into g_out), and every gradient that sums over tokens of dy."""
    need_db = call.needs(NEED_DB) if need_db is None else need_db
    return project.project(
        call.dy,
        call.b,
        call.h if need_db else None,
        scale=call.scale,
        mag=call.mag,
        norm=call.norm,
        z=call.z,
        need_g=need_g and bool(call.problem.r),
        need_db=need_db and bool(call.problem.r),
        need_dmag=call.needs(NEED_DMAG),
        need_dbias=call.needs(NEED_DBIAS),
        scaled=scaled,
        splits=splits(call.problem),
        g_factor=g_factor,
        g_out=g_out,
        later=later,
    )


def scaled_dy(call: Call) -> str | None:
    """Which scaled dy the split plan multiplies a dense weight with: c cannot go into its rows."""
    dora = call.problem.flags & DORA
    return "d" if dora and not isinstance(call.weight, PackedWeight) and call.needs(NEED_DX) else None


def _low_rank(call: Call, *, g_for_dx: bool, scaled: str | None = None) -> tuple[Projected, Tensor | None]:
    """The projections of dy and da. Where h was not saved, it comes from the same pass over x as da."""
    if call.given.low_rank is not None:
        return call.given.low_rank
    need_da = call.needs(NEED_DA) and bool(call.problem.r)
    lazy = call.h is None and call.needs(NEED_DB) and bool(call.problem.r)
    out = project_all(call, need_g=need_da or g_for_dx, scaled=scaled, need_db=False if lazy else None)
    if not lazy:
        da = None
        if need_da:
            assert call.x is not None and out.g is not None
            da = grad_a.grad_a(
                out.g, call.x, call.scale, bits=call.bits, dscale=call.dscale, splits=splits(call.problem)
            )
        return out, da
    assert call.x is not None
    if out.g is None:
        h, _ = shrink.shrink(call.x, call.a, splits=splits(call.problem))
        da = None
    else:
        h, da = grad_a.shrink_grad_a(call.x, call.a, out.g, call.scale, splits=splits(call.problem))
    late = project.project(
        call.dy,
        call.b,
        h,
        scale=call.scale,
        mag=call.mag,
        norm=call.norm,
        need_g=False,
        need_db=True,
        splits=splits(call.problem),
    )
    return out._replace(db=late.db), da if need_da else None


def _finish(call: Call, dx: Tensor | None, out: Projected, da: Tensor | None) -> Outputs:
    """The gradients in the dtypes the op promises: a's for da and db, fp32 for dmag and dbias."""
    db = out.db
    if not call.problem.r:  # a frozen linear: its empty adapter has empty gradients
        da = torch.empty_like(call.a) if call.needs(NEED_DA) else None
        db = torch.empty_like(call.b) if call.needs(NEED_DB) else None
    elif call.a.dtype != torch.float32:
        da, db = (None if t is None else t.to(call.a.dtype) for t in (da, db))
    return dx, da, db, out.dmag, out.dbias


def merge(call: Call) -> Outputs:
    """dx = dy w_eff; the rest as everywhere."""
    assert isinstance(call.weight, PackedWeight)
    dx = None
    if call.needs(NEED_DX):
        w = base_weight("merge", call)
        dx = _plus(call, call.dy, w)
    out, da = _low_rank(call, g_for_dx=False)
    return _finish(call, dx, out, da)


def _input_delta(call: Call, g: Tensor, *, masked: bool) -> Tensor:
    """s g a, or s dscale mask ∘ (g a)."""
    return expand.expand(
        g,
        call.a,
        call.scale,
        call.dy.dtype,
        transposed=True,
        bits=call.bits if masked else None,
        factor=call.dscale if masked else 1.0,
    )


def base_weight(plan: str, call: Call) -> Tensor:
    """The matrix a plan multiplies dy with: merged (c and all), or decoded, c in its rows where it can be."""
    if call.given.weight is not None:
        return call.given.weight
    weight, dtype, given = call.weight, call.dy.dtype, parts_of(plan, call)
    if not isinstance(weight, PackedWeight):
        return weight
    if given is None:
        return decoded(weight, dtype)
    a, b, scale, mag, norm = given
    return merged_weight(weight, a, b, scale, dtype, mag=mag, norm=norm)


def parts_of(plan: str, call: Call) -> tuple[Tensor, Tensor, float, Tensor | None, Tensor | None] | None:
    """What goes into a packed weight while a plan decodes it: a, b, scale, mag, norm; None for nothing."""
    none = call.a[:0], call.b[:, :0]
    if plan == "merge":
        return call.a, call.b, call.scale, call.mag, call.norm
    if call.problem.flags & DORA and not own_drop(call.problem):  # c goes into the rows of w
        return *none, 1.0, call.mag, call.norm
    return None


def _plus(call: Call, d: Tensor, w: Tensor) -> Tensor:
    """d w, added to what the group has."""
    return d @ w if call.given.into is None else call.given.into.addmm_(d, w)


def _joined(call: Call, dx: Tensor) -> Tensor:
    """dx, added to what the group has."""
    return dx if call.given.into is None else call.given.into.add_(dx)


def split(call: Call) -> Outputs:
    """dx₀ = s drop'(g a), then the base product onto it."""
    problem, need_dx = call.problem, call.needs(NEED_DX)
    if own_drop(problem):
        return _split_own_drop(call)
    out, da = _low_rank(call, g_for_dx=need_dx, scaled=scaled_dy(call))
    dx = None
    if need_dx:
        d = call.dy if out.d is None else out.d
        w = base_weight("split", call)
        if out.g is None:
            dx = _plus(call, d, w)
        else:
            dx = _joined(call, _input_delta(call, out.g, masked=True))
            dx.addmm_(d, w)
    return _finish(call, dx, out, da)


def _split_own_drop(call: Call) -> Outputs:
    """dx = dy w + drop'((d - dy) w + s g a): two base products, the second onto the masked first."""
    need_dx = call.needs(NEED_DX)
    out, da = _low_rank(call, g_for_dx=need_dx, scaled="e" if need_dx else None)
    dx = None
    if need_dx:
        assert out.d is not None and call.bits is not None
        w = base_weight("split", call)
        if out.g is None:
            dx = out.d @ w
        else:
            dx = _input_delta(call, out.g, masked=False)
            dx.addmm_(out.d, w)
        dx = _joined(call, compose.masked_add(dx, call.bits, call.dscale, dx))
        dx.addmm_(call.dy, w)
    return _finish(call, dx, out, da)


def dense(call: Call) -> Outputs:
    """dx = (c ∘ dy) w + s drop'(g a) in one own product."""
    need_dx = call.needs(NEED_DX)
    out, da = _low_rank(call, g_for_dx=need_dx)
    dx = None
    if need_dx:
        dx = dense_kernels.linear_dx(
            call.dy,
            decoded(call.weight, call.dy.dtype),
            out.g,
            None if out.g is None else call.a,
            call.scale,
            mag=call.mag,
            norm=call.norm,
            bits=call.bits,
            dscale=call.dscale,
        )
    return _finish(call, dx, out, da)


PLANS = {"merge": merge, "split": split, "dense": dense}


def _zeros(problem: Problem, dy: Tensor, a: Tensor, b: Tensor) -> Outputs:
    """The gradients of no tokens."""

    def zeros(flag: int, *size: int) -> Tensor | None:
        return dy.new_zeros(size, dtype=torch.float32) if problem.flags & flag else None

    return (
        dy.new_empty((0, problem.k)) if problem.flags & NEED_DX else None,
        torch.zeros_like(a) if problem.flags & NEED_DA else None,
        torch.zeros_like(b) if problem.flags & NEED_DB else None,
        zeros(NEED_DMAG, problem.n),
        zeros(NEED_DBIAS, problem.n),
    )


def run(plan: str, problem: Problem, dy: Tensor, x: Tensor | None, *rest: Any) -> Outputs:
    """The op `lora_bwd` by one plan."""
    if not problem.m:
        return _zeros(problem, dy, *rest[1:3])
    with on_device(dy):
        return PLANS[plan](make_call(problem, dy, x, *rest))


def merge_kept(problem: Problem, dy: Tensor, x: Tensor | None, *rest: Any) -> Outputs:
    """`lora_bwd` by the merge plan; the last argument is the merged weight that the forward has made."""
    *rest, merged = rest  # type: ignore[assignment]
    if not problem.m:
        return _zeros(problem, dy, *rest[1:3])
    with on_device(dy):
        return merge(make_call(problem, dy, x, *rest)._replace(given=Given(weight=merged)))


def make_call(
    problem: Problem,
    dy: Tensor,
    x: Tensor | None,
    weight: Weight,
    a: Tensor,
    b: Tensor,
    scale: float,
    mag: Tensor | None,
    norm: Tensor | None,
    h: Tensor | None,
    mask: Tensor | None,
    z: Tensor | None,
    seed: Tensor | None,
    stream: int,
    p: float,
) -> Call:
    """The op's arguments as the plans take them: the weight checked, the dropout bits read or drawn again."""
    if isinstance(weight, PackedWeight):
        weights.check(weight)
    dora = problem.flags & DORA
    bits, dscale = None, 1.0
    if problem.flags & DROPOUT and problem.flags & (NEED_DX | NEED_DA):
        assert seed is not None
        dscale = philox.keep_scale(p)
        bits = dropout_mask(seed, stream, problem.m, problem.k, p, dy.device) if mask is None else mask
    rest = (mag if dora else None, norm if dora else None, h, bits, z, dscale)
    return Call(problem, dy, x, weight, a, b, scale, *rest)
