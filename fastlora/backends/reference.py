"""The backend that runs everywhere: plain PyTorch, one fp32 (fp64 for fp64) evaluation of `math.reference`.

It is what a host without a compiler or a kernel falls back to, so it avoids needless copies, but its first duty is to
be right. Outputs are rounded once, to the dtype of x.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastlora.dispatch import cost
from fastlora.dispatch.registry import Kernel, Limits, register
from fastlora.math import nf4, philox, reference
from fastlora.math.activations import KNOWN
from fastlora.math.group import One
from fastlora.math.nf4 import PackedWeight
from fastlora.math.segments import Group, Segments, dropout_bits
from fastlora.problem import (
    DORA,
    DROPOUT,
    LAZY_H,
    NEED_DA,
    NEED_DB,
    NEED_DBIAS,
    NEED_DMAG,
    NEED_DX,
    SAVE_MASK,
    SHARED,
    TRAIN,
    Problem,
    base_drops,
)

Weight = Tensor | PackedWeight


def _working_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _dense(weight: Weight, dtype: torch.dtype) -> Tensor:
    return nf4.dequantize(weight, dtype) if isinstance(weight, PackedWeight) else weight.to(dtype)


def _adapter(
    a: Tensor, b: Tensor, scale: float, mag: Tensor | None, norm: Tensor | None, dtype: torch.dtype
) -> reference.Adapter:
    return reference.in_dtype(reference.Adapter(a, b, scale, mag, norm), dtype)


def _dropout(problem: Problem, mask: Tensor | None, p: float) -> reference.Dropout | None:
    if mask is None:
        return None
    semantics = "shared" if problem.flags & SHARED else "peft"
    return reference.Dropout(philox.unpack_bits(mask, problem.k), philox.keep_scale(p), semantics)


def dropout_mask(problem: Problem, seed: Tensor, stream: int, p: float) -> Tensor:
    """Bits [m, ceil(k/8)] of the dropout specification (`math.philox`)."""
    return philox.dropout_bits(seed, stream, problem.m, problem.k, p, device=seed.device)


def lora_fwd(
    problem: Problem,
    x: Tensor,
    weight: Weight,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    scale: float,
    mag: Tensor | None,
    norm: Tensor | None,
    seed: Tensor | None,
    stream: int,
    p: float,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """`math.reference.forward` in fp32 or fp64."""
    dtype, flags = _working_dtype(problem.dtype), problem.flags
    mask = None
    if flags & DROPOUT:
        assert seed is not None
        mask = dropout_mask(problem, seed, stream, p)
    out = reference.forward(
        x.to(dtype),
        _dense(weight, dtype),
        _adapter(a, b, scale, mag, norm, dtype),
        None if bias is None else bias.to(dtype),
        _dropout(problem, mask, p),
    )
    train = flags & TRAIN
    return (
        out.y.to(problem.dtype),
        out.h if train and not flags & LAZY_H else None,
        mask if train and flags & SAVE_MASK else None,
        out.z.to(problem.dtype) if train and flags & DORA else None,
    )


def lora_bwd(
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
) -> tuple[Tensor | None, ...]:
    """The equations of `math.reference.backward`, each only if its gradient is asked for."""
    dtype, flags = _working_dtype(problem.dtype), problem.flags
    if flags & DROPOUT and mask is None:
        assert seed is not None
        mask = dropout_mask(problem, seed, stream, p)
    dropout = _dropout(problem, mask, p)
    dy, d = dy.to(dtype), dy.to(dtype)
    adapter = _adapter(a, b, scale, mag, norm, dtype)
    if adapter.mag is not None and adapter.norm is not None:
        d = dy * (adapter.mag / adapter.norm)
    g = d @ adapter.b
    dx = da = db = dmag = dbias = None
    if flags & NEED_DX:
        delta = scale * (g @ adapter.a)
        w = _dense(weight, dtype)
        if flags & DORA and flags & DROPOUT and not flags & SHARED:
            dx = dy @ w + reference.drop((d - dy) @ w + delta, dropout)
        else:
            dx = (d @ w).add_(reference.drop(delta, dropout))
        dx = dx.to(problem.dtype)
    if flags & NEED_DA:
        assert x is not None
        da = (scale * (g.T @ reference.drop(x.to(dtype), dropout))).to(a.dtype)
    if flags & NEED_DB:
        if h is None:
            assert x is not None
            h = reference.drop(x.to(dtype), dropout) @ adapter.a.T
        db = (scale * (d.T @ h)).to(b.dtype)
    if flags & NEED_DMAG:
        assert z is not None and adapter.norm is not None
        dmag = (dy * z.to(dtype)).sum(0) / adapter.norm
    if flags & NEED_DBIAS:
        dbias = dy.sum(0)
    return dx, da, db, dmag, dbias


# --- several linears over one x ---


def projections_fwd(
    problem: Problem, x: Tensor, ones: Sequence[One], keep: bool
) -> tuple[list[tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]], list[Tensor | None]]:
    """Each by itself."""
    return [lora_fwd(one.problem, x, *one.args) for one in ones], [None] * len(ones)


def projections_bwd(
    problem: Problem, x: Tensor | None, ones: Sequence[One], weights: Sequence[Tensor | None]
) -> tuple[Tensor | None, list[tuple[Tensor | None, ...]]]:
    """Each by itself; dx in the order in which autograd would add them, the last first."""
    found = [lora_bwd(one.problem, one.args[0], x, *one.args[1:]) for one in ones]
    dx = None
    for grads in reversed(found):
        if grads[0] is not None:
            dx = grads[0] if dx is None else dx.add_(grads[0])
    return dx, [grads[1:] for grads in found]


# --- several adapters in one batch ------------------------------------------------------------------------------------


def grouped_mask(problem: Problem, segments: Segments, group: Group, seed: Tensor) -> Tensor:
    """`math.segments.dropout_bits`."""
    return dropout_bits(seed, segments.owner, group.streams, group.ps, problem.k)


def _keep(problem: Problem, mask: Tensor | None) -> Tensor | None:
    return None if mask is None else philox.unpack_bits(mask, problem.k)


def _own(segments: Segments, adapter: int, t: Tensor | None) -> Tensor | None:
    """The rows of one adapter, 0 elsewhere: chosen, not multiplied, so that NaN stays in its row."""
    return None if t is None else torch.where((segments.owner == adapter)[:, None], t, 0)


def _member(group: Group, adapter: int, dtype: torch.dtype) -> tuple[reference.Adapter, float, bool]:
    """One adapter in the working dtype, its dropout scale, and whether its base product drops too."""
    e = adapter
    member = _adapter(group.a[e], group.b[e], group.scales[e], group.mag[e], group.norm[e], dtype)
    return member, philox.keep_scale(group.ps[e]), base_drops(group.kinds[e])


def grouped_fwd(
    problem: Problem,
    x: Tensor,
    y: Tensor,
    bias: Tensor | None,
    group: Group,
    segments: Segments,
    mask: Tensor | None,
    dropped: Tensor | None,
) -> tuple[Tensor | None, Tensor | None]:
    """Every adapter sees all rows and its own are chosen: no gathering, no host sync."""
    dtype, train = _working_dtype(problem.dtype), problem.flags & TRAIN
    keep, start = _keep(problem, mask), y.to(dtype)
    xd = x.to(dtype) if keep is None else x.to(dtype) * keep
    out = y.clone()
    h = xd.new_zeros((problem.m, problem.r)) if train else None
    z = torch.zeros_like(y) if train and problem.flags & DORA else None
    for e in range(segments.groups):
        member, dscale, drops = _member(group, e, dtype)
        rows = (segments.owner == e)[:, None]
        hidden = dscale * (xd @ member.a.T)
        delta = member.scale * (hidden @ member.b.T)
        own = start + delta
        if member.mag is not None and member.norm is not None:
            base = start if bias is None else start - bias.to(dtype)
            if drops and dropped is not None:
                base = dropped.to(dtype) * dscale
            own = own + (member.mag / member.norm - 1) * (base + delta)
            if z is not None:
                z = torch.where(rows, (base + delta).to(z.dtype), z)
        out = torch.where(rows, own.to(out.dtype), out)
        if h is not None:
            rank = hidden.shape[1]
            h[:, :rank] = torch.where(rows, hidden, h[:, :rank])
    y.copy_(out)
    return h, z


def grouped_bwd(
    problem: Problem,
    dy: Tensor,
    x: Tensor | None,
    group: Group,
    segments: Segments,
    h: Tensor | None,
    mask: Tensor | None,
    z: Tensor | None,
    dx: Tensor | None,
    dropped_dx: Tensor | None,
) -> list[Tensor]:
    """The equations of `math.reference.backward` for the rows of each adapter, those asked for."""
    dtype, keep = _working_dtype(problem.dtype), _keep(problem, mask)
    xd = None if x is None else x.to(dtype) if keep is None else x.to(dtype) * keep
    grads: list[Tensor] = []
    for e, kind in enumerate(group.kinds):
        member, dscale, drops = _member(group, e, dtype)
        own = _own(segments, e, dy.to(dtype))
        assert own is not None
        d = own if member.mag is None or member.norm is None else own * (member.mag / member.norm)
        g = member.scale * (d @ member.b)
        if dx is not None:
            delta = g @ member.a
            if drops and dropped_dx is not None:
                delta = delta + dropped_dx.to(dtype)
            delta = dscale * (delta if keep is None else delta * keep)
            dx.copy_(torch.where((segments.owner == e)[:, None], (dx.to(dtype) + delta).to(dx.dtype), dx))
        if kind & NEED_DA:
            seen = _own(segments, e, xd)
            assert seen is not None
            grads.append((dscale * (g.T @ seen)).to(group.a[e].dtype))
        if kind & NEED_DB:
            assert h is not None
            hidden = _own(segments, e, h[:, : member.b.shape[1]])
            assert hidden is not None
            grads.append((member.scale * (d.T @ hidden)).to(group.b[e].dtype))
        if kind & NEED_DMAG:
            assert z is not None and member.norm is not None
            seen = _own(segments, e, z.to(dtype))
            assert seen is not None
            grads.append((own * seen).sum(0) / member.norm)
    return grads


def glu_fwd(problem: Problem, gate: Tensor, up: Tensor, act: str) -> Tensor:
    """act(gate) * up by PyTorch's own operations in the dtype of gate: the bits of a model that is not fused."""
    acted = KNOWN[act].forward(gate, torch.empty_like(gate))
    return acted.mul_(up)


def glu_bwd(
    problem: Problem, d: Tensor, gate: Tensor, up: Tensor, act: str, need_product: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """dgate, dup and, where asked for, the product again; what autograd of `glu_fwd` computes.

    With the product d is given away: dup takes its place, because fresh memory costs more here than what is computed.
    """
    through = d * up
    dgate = KNOWN[act].backward(through, gate, through)
    acted = KNOWN[act].forward(gate, torch.empty_like(gate))
    if not need_product:
        return dgate, acted.mul_(d), None
    dup = torch.mul(acted, d, out=d)
    return dgate, dup, acted.mul_(up)


def dora_norm(problem: Problem, weight: Weight, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """|w + s b a| per row, fp32 (fp64 for fp64)."""
    dtype = _working_dtype(problem.dtype)
    return reference.dora_norm(_dense(weight, dtype), a.to(dtype), b.to(dtype), scale)


def quantize(problem: Problem, w: Tensor, quant_type: str, blocksize: int) -> tuple[Tensor, Tensor]:
    """`math.nf4.quantize_blocks`."""
    return nf4.quantize_blocks(w, quant_type, blocksize)


def quantize_absmax(problem: Problem, absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`math.nf4.quantize_absmax`."""
    return nf4.quantize_absmax(absmax)


def dequantize(problem: Problem, weight: PackedWeight, dtype: torch.dtype, out: Tensor | None) -> Tensor:
    """`math.nf4.dequantize`."""
    return nf4.dequantize(weight, dtype, out)


def _seconds(problem: Problem) -> float:
    """Unfused and through fp32 copies: about three times the roofline, and ten small launches."""
    once = 3 * cost.roofline_seconds(problem) + 10 * cost.device(problem.device).launch
    return once * max(1, problem.groups)  # of several adapters each sees all rows


for _run in (
    lora_fwd,
    lora_bwd,
    grouped_fwd,
    grouped_bwd,
    grouped_mask,
    projections_fwd,
    projections_bwd,
    glu_fwd,
    glu_bwd,
    dora_norm,
    quantize,
    quantize_absmax,
    dequantize,
    dropout_mask,
):
    register(Kernel(op=_run.__name__, backend="reference", run=_run, limits=Limits(), seconds=_seconds, plan="torch"))
