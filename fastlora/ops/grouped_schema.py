"""The ops of a batch that mixes adapters: the frozen base by the kernels of one adapter, then the grouped ones.

Kernel.run signatures and equations: `ops.schema`. No op here reads a value of `owner`, `order` or `offsets`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastlora.math import philox
from fastlora.math.nf4 import PackedWeight
from fastlora.math.segments import Group, Segments
from fastlora.ops.schema import (
    _PACKED,
    _accumulator,
    _backward,
    _forward,
    _mask_like,
    _run,
    fake,
    format_of,
    op,
)
from fastlora.problem import (
    BIAS,
    DENSE,
    DORA,
    DROPOUT,
    NEED_DA,
    NEED_DB,
    NEED_DBIAS,
    NEED_DMAG,
    NEED_DX,
    SAVE_MASK,
    TRAIN,
    Format,
    Problem,
    base_drops,
)

_GROUP = (
    "Tensor[] a, Tensor[] b, Tensor?[] mag, Tensor?[] norm, float[] scales, float[] ps, int[] streams, int[] kinds, "
    "Tensor owner, Tensor order, Tensor offsets"
)
_GROUPED_FWD = f"Tensor? bias, {_GROUP}, Tensor? seed, int flags, str backend) -> (Tensor, Tensor?, Tensor?, Tensor?)"
_GROUPED_BWD = (
    f"{_GROUP}, Tensor? h, Tensor? mask, Tensor? z, Tensor? seed, int flags, str backend) "
    "-> (Tensor?, Tensor?, Tensor[])"
)


def _group_of(parts: Sequence[Any]) -> tuple[Group, Segments]:
    a, b, mag, norm, scales, ps, streams, kinds, owner, order, offsets = parts
    return Group(a, b, mag, norm, scales, ps, streams, kinds), Segments(owner, order, offsets)


def _grouped_problem(op: str, m: int, like: Tensor, group: Group, flags: int) -> Problem:
    (n, _), k = group.b[0].shape, group.a[0].shape[1]
    sizes = (m, n, k, max(group.ranks), like.dtype, group.a[0].dtype)
    return Problem(op, *sizes, DENSE, flags, like.device.type, len(group.a))


def _grouped_mask(x: Tensor, m: int, group: Group, segments: Segments, seed: Tensor | None, backend: str) -> Tensor:
    problem = _grouped_problem("grouped_mask", m, x, group, DROPOUT)
    mask: Tensor = _run(problem, backend, segments, group, seed)
    return mask


def _base_args(x: Tensor, weight: Tensor | PackedWeight) -> tuple[Tensor, Tensor]:
    n, k = weight.shape
    return x.new_empty((0, k)), x.new_empty((n, 0))


def _grouped_forward(x: Tensor, weight: Tensor | PackedWeight, fmt: Format, tail: Sequence[Any]) -> Any:
    bias, *parts, seed, flags, backend = tail
    group, segments = _group_of(parts)
    none = _base_args(x, weight)

    def base(rows: Tensor, vector: Tensor | None) -> Tensor:
        fixed = (vector, *none, 1.0, None, None, None, 0, 0.0, BIAS * (vector is not None), backend)
        return _forward(rows, weight, fmt, fixed)[0]

    y, mask, dropped = base(x, bias), None, None
    if flags & DROPOUT:
        mask = _grouped_mask(x, x.shape[0], group, segments, seed, backend)
    if mask is not None and any(map(base_drops, group.kinds)):
        dropped = base(x * philox.unpack_bits(mask, x.shape[1]), None)
    problem = _grouped_problem("grouped_fwd", x.shape[0], x, group, flags)
    h, z = _run(problem, backend, x, y, bias, group, segments, mask, dropped)
    return y, h, mask if flags & SAVE_MASK else None, z


def _dora_factors(dy: Tensor, group: Group, segments: Segments) -> tuple[Tensor, Tensor | None]:
    """dy with the factor of each row's base term, and (c - 1) dy for the rows whose base product drops, 0 elsewhere."""
    wide = _accumulator(dy.dtype)
    one = torch.ones((dy.shape[1],), dtype=wide, device=dy.device)
    full, late = [], []
    for mag, norm, kind in zip(group.mag, group.norm, group.kinds, strict=True):
        c = one if mag is None or norm is None else mag.to(wide) / norm.to(wide)
        full.append(one if base_drops(kind) else c)
        late.append(c - 1 if base_drops(kind) else torch.zeros_like(one))
    rows = (dy * torch.stack([*full, one])[segments.owner]).to(dy.dtype)
    if not any(map(base_drops, group.kinds)):
        return rows, None
    return rows, (dy * torch.stack([*late, torch.zeros_like(one)])[segments.owner]).to(dy.dtype)


def _grouped_backward(
    dy: Tensor, x: Tensor | None, weight: Tensor | PackedWeight, fmt: Format, tail: Sequence[Any]
) -> tuple[Tensor | None, Tensor | None, list[Tensor]]:
    *parts, h, mask, z, seed, flags, backend = tail
    group, segments = _group_of(parts)
    none = _base_args(dy, weight)

    def base(rows: Tensor, needs: int) -> tuple[Tensor | None, ...]:
        fixed = (*none, 1.0, None, None, None, None, None, None, 0, 0.0, needs, backend)
        return _backward(rows, None, weight, fmt, fixed)

    rows, late = dy, None
    if flags & NEED_DX and flags & DORA:
        rows, late = _dora_factors(dy, group, segments)
    dx, _, _, _, dbias = base(rows, flags & (NEED_DX if rows is not dy else NEED_DX | NEED_DBIAS))
    if flags & NEED_DBIAS and dbias is None:
        dbias = base(dy, NEED_DBIAS)[4]
    late_dx = None if late is None else base(late, NEED_DX)[0]
    if flags & DROPOUT and mask is None:
        mask = _grouped_mask(dy, dy.shape[0], group, segments, seed, backend)
    problem = _grouped_problem("grouped_bwd", dy.shape[0], dy, group, flags)
    grads: list[Tensor] = _run(problem, backend, dy, x, group, segments, h, mask, z, dx, late_dx)
    return dx, dbias, grads


def _fake_grouped_forward(x: Tensor, tail: Sequence[Any]) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    b, flags = tail[2], tail[-2]
    y = x.new_empty((x.shape[0], b[0].shape[0]))
    if not flags & TRAIN:
        return y, None, None, None
    h = x.new_empty((x.shape[0], max(each.shape[1] for each in b)), dtype=_accumulator(x.dtype))
    return y, h, _mask_like(x) if flags & SAVE_MASK else None, torch.empty_like(y) if flags & DORA else None


def _fake_grouped_backward(dy: Tensor, tail: Sequence[Any]) -> tuple[Tensor | None, Tensor | None, list[Tensor]]:
    a, b, kinds, flags = tail[0], tail[1], tail[7], tail[-2]
    sums = dy.new_empty((dy.shape[1],), dtype=_accumulator(dy.dtype))
    grads = []
    for each_a, each_b, kind in zip(a, b, kinds, strict=True):
        wanted = ((NEED_DA, each_a), (NEED_DB, each_b), (NEED_DMAG, sums))
        grads += [torch.empty_like(like) for bit, like in wanted if kind & bit]
    dx = dy.new_empty((dy.shape[0], a[0].shape[1])) if flags & NEED_DX else None
    return dx, torch.empty_like(sums) if flags & NEED_DBIAS else None, grads


@op(f"grouped_fwd(Tensor x, Tensor w, {_GROUPED_FWD}")
def grouped_fwd(x: Tensor, w: Tensor, *tail: Any) -> Any:
    """Body of the op; arguments as its schema."""
    return _grouped_forward(x, w, DENSE, tail)


@fake("grouped_fwd")
def _(x: Tensor, w: Tensor, *tail: Any) -> Any:
    return _fake_grouped_forward(x, tail)


@op(f"qgrouped_fwd(Tensor x, {_PACKED}, {_GROUPED_FWD}")
def qgrouped_fwd(x: Tensor, *args: Any) -> Any:
    """Body of the op; arguments as its schema."""
    tail = args[8:]
    weight = PackedWeight._make((*args[:7], (tail[2][0].shape[0], x.shape[1])))
    return _grouped_forward(x, weight, format_of(weight, args[7]), tail)


@fake("qgrouped_fwd")
def _(x: Tensor, *args: Any) -> Any:
    return _fake_grouped_forward(x, args[8:])


@op(f"grouped_bwd(Tensor dy, Tensor? x, Tensor w, {_GROUPED_BWD}")
def grouped_bwd(dy: Tensor, x: Tensor | None, w: Tensor, *tail: Any) -> Any:
    """Body of the op; arguments as its schema."""
    return _grouped_backward(dy, x, w, DENSE, tail)


@fake("grouped_bwd")
def _(dy: Tensor, x: Tensor | None, w: Tensor, *tail: Any) -> Any:
    return _fake_grouped_backward(dy, tail)


@op(f"qgrouped_bwd(Tensor dy, Tensor? x, {_PACKED}, {_GROUPED_BWD}")
def qgrouped_bwd(dy: Tensor, x: Tensor | None, *args: Any) -> Any:
    """Body of the op; arguments as its schema."""
    tail = args[8:]
    weight = PackedWeight._make((*args[:7], (dy.shape[1], tail[0][0].shape[1])))
    return _grouped_backward(dy, x, weight, format_of(weight, args[7]), tail)


@fake("qgrouped_bwd")
def _(dy: Tensor, x: Tensor | None, *args: Any) -> Any:
    return _fake_grouped_backward(dy, args[8:])
