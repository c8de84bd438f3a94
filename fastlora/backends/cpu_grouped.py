"""The CPU backend's kernels for a batch that mixes adapters (csrc/cpu/grouped.h).

Each row meets its own adapter; the frozen base is the ops' of one adapter. fp32 inside; results do not depend on the
number of threads, bit for bit.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from fastlora.backends import _cpu_library
from fastlora.backends._cpu_library import ADAPTED, DTYPES, address, aligned, f32
from fastlora.dispatch.registry import ALL_FLAGS, Kernel, register
from fastlora.math import philox
from fastlora.math.segments import Group, Segments
from fastlora.problem import DORA, DROPOUT, LAZY_H, NEED_DA, NEED_DB, NEED_DMAG, TRAIN, Problem, base_drops


def _members(group: Group, keep: list[Tensor], outputs: Sequence[tuple[int, int, int]] | None = None) -> bytes:
    """A `struct Member` an adapter; `outputs`: addresses of da, db, dmag."""
    if group.memo is not None:
        known = [memo.get("cpu") for memo in group.memo]
        if None not in known:
            return b"".join(known)  # type: ignore[arg-type]
    records = []
    pack, none = _cpu_library.pack_member, (0, 0, 0)
    for e, (a, b, scale, kind) in enumerate(zip(group.a, group.b, group.scales, group.kinds, strict=True)):
        out = none if outputs is None else outputs[e]
        places = a.data_ptr(), b.data_ptr()
        if (places[0] | places[1]) % 4:
            places = aligned(a, keep), aligned(b, keep)
        if not kind & (DORA | DROPOUT):
            records.append(pack(*places, 0, 0, scale, 1.0, b.shape[1], 0, 0, 0, 0, *out))
            continue
        mag, norm = (f32(group.mag[e]), f32(group.norm[e])) if kind & DORA else (None, None)
        keep += [t for t in (mag, norm) if t is not None]
        drops, p = bool(kind & DROPOUT), group.ps[e]
        operands = (*places, address(mag), address(norm))
        dropping = (philox.threshold(p), group.streams[e], 1, base_drops(kind)) if drops else (0, 0, 0, 0)
        factors = (scale, philox.keep_scale(p) if drops else 1.0)
        records.append(pack(*operands, *factors, b.shape[1], *dropping, *out))
    if group.memo is not None and not keep and outputs is None:
        for memo, record in zip(group.memo, records, strict=True):
            memo["cpu"] = record
    return b"".join(records)


def _grouped_call(
    op: str,
    problem: Problem,
    segments: Segments,
    late: Tensor | None,
    members: bytes,
    seed: int = 0,
    x: int = 0,
    bias: int = 0,
    y: int = 0,
    h: int = 0,
    mask: int = 0,
    z: int = 0,
    dy: int = 0,
    dx: int = 0,
) -> None:
    """One call on a `struct Grouped`; addresses of `struct Args`."""
    library = _cpu_library.library()
    _, m, n, k, r, dtype, adapter_dtype, _, flags, _, groups = problem
    sizes = (m, n, k, r, DTYPES.get(dtype, 0), flags, torch.get_num_threads(), library.tier(), 0, 0, 0.0, 1.0, seed)
    weight, rest = (0, 0, 0, 0, 0, 0, 0, 0, 0), (0, 0, 0, 0, 0, 0)
    record = _cpu_library.pack_fields(*sizes, *weight, x, 0, 0, bias, 0, 0, y, h, mask, z, dy, dx, *rest)
    order, offsets = segments.order.data_ptr(), segments.offsets.data_ptr()
    adapters = DTYPES.get(adapter_dtype, 0)
    record += _cpu_library.pack_grouped(groups, adapters, order, offsets, 0, address(late))
    library.call(op, record + members)


def grouped_mask(problem: Problem, segments: Segments, group: Group, seed: Tensor) -> Tensor:
    """The keep bits of every row by its own adapter's stream and p: uint8 [m, ceil(k/8)]."""
    mask = torch.zeros((problem.m, -(-problem.k // 8)), dtype=torch.uint8)
    if mask.numel():
        members = _members(group, [])
        _grouped_call("grouped_mask", problem, segments, None, members, seed=seed.data_ptr(), mask=mask.data_ptr())
    return mask


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
    """Adds to y [m, n] in place; h fp32 [m, r] and z [m, n] where flags ask."""
    train = problem.flags & TRAIN
    h = x.new_zeros((problem.m, problem.r), dtype=torch.float32) if train else None
    z = torch.zeros_like(y) if train and problem.flags & DORA else None
    if problem.m:
        keep: list[Tensor] = []
        bias32 = f32(bias)
        members = _members(group, keep)
        places = (aligned(x, keep), address(bias32), y.data_ptr(), address(h), address(mask), address(z))
        _grouped_call("grouped_fwd", problem, segments, dropped, members, 0, *places)
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
    """Adds to dx [m, k] in place; da and db of a's dtype, dmag fp32, of each adapter that asks."""
    grads: list[Tensor] = []
    outputs = []
    for a, b, kind in zip(group.a, group.b, group.kinds, strict=True):
        da = torch.empty_like(a) if kind & NEED_DA else None
        db = torch.empty_like(b) if kind & NEED_DB else None
        dmag = torch.empty((problem.n,), dtype=torch.float32) if kind & NEED_DMAG else None
        grads += [t for t in (da, db, dmag) if t is not None]
        outputs.append((address(da), address(db), address(dmag)))
    keep: list[Tensor] = []
    members, given = _members(group, keep, outputs), (address(h), address(mask), address(z))
    places = (aligned(x, keep), 0, 0, *given, aligned(dy, keep), address(dx))
    _grouped_call("grouped_bwd", problem, segments, dropped_dx, members, 0, *places)
    return grads


_LIMITS = dataclasses.replace(ADAPTED, flags=ALL_FLAGS & ~LAZY_H)
register(Kernel("grouped_mask", "cpu", grouped_mask, dataclasses.replace(ADAPTED, dtypes=None, adapter_dtypes=None)))
register(Kernel("grouped_fwd", "cpu", grouped_fwd, _LIMITS))
register(Kernel("grouped_bwd", "cpu", grouped_bwd, _LIMITS))
