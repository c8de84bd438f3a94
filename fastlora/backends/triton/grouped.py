"""The ops of a batch that mixes adapters, as the registry calls them; equations in `ops.schema`.

Own launches: the mask 1; forward 2; backward 4, and 1 to sum planes where few adapters' rows are split over several.
Where rows are too few to fill the device, h and g are split over columns: 1 more each. DoRA's norms are gathered by one
copy of the library, and the gradients leave their common buffer by another.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastlora.backends.triton import grouped_backward, grouped_forward
from fastlora.backends.triton.forward import splits
from fastlora.backends.triton.grouped_members import Members, members
from fastlora.backends.triton.launch import on_device
from fastlora.backends.triton.shrink import Planes, finish
from fastlora.math.segments import Group, Segments
from fastlora.problem import DORA, NEED_DA, NEED_DB, NEED_DMAG, TRAIN, Problem


def grouped_mask(problem: Problem, segments: Segments, group: Group, seed: Tensor) -> Tensor:
    """uint8 [m, ceil(k/8)]; bits of math.segments."""
    with on_device(seed):
        return grouped_forward.grouped_mask(seed, members(group, seed.device), segments, problem.k)


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
    """h fp32 [m, r] and z, both only under TRAIN; y is changed in place."""
    train = bool(problem.flags & TRAIN)
    keep_z = train and bool(problem.flags & DORA)
    if not problem.m:
        h = x.new_empty((0, problem.r), dtype=torch.float32)
        return h if train else None, torch.empty_like(y) if keep_z else None
    with on_device(x):
        held = members(group, x.device)
        h = grouped_forward.grouped_rows(
            x, group.a[0], held, segments, problem.r, down=True, bits=mask, splits=splits(problem)
        )
        z = grouped_forward.grouped_expand(h, y, group.b[0], held, segments, bias=bias, dropped=dropped, need_z=keep_z)
    return h if train else None, z


def _sums(
    problem: Problem,
    dy: Tensor,
    x: Tensor | None,
    group: Group,
    held: Members,
    segments: Segments,
    g: Tensor | None,
    h: Tensor | None,
    bits: Tensor | None,
    z: Tensor | None,
) -> tuple[Planes | None, Planes | None, Planes | None]:
    """da, db and dmag of every adapter that wants them, summed."""
    wants = 0
    for kind in group.kinds:
        wants |= kind
    precise = splits(problem)
    da = db = dmag = None
    if wants & NEED_DA:
        assert x is not None
        da, _ = grouped_backward.grouped_walk(x, g, held, segments, problem.r, down=True, bits=bits, splits=precise)
    if wants & (NEED_DB | NEED_DMAG):
        seen, hidden = z if wants & NEED_DMAG else None, h if wants & NEED_DB else None
        db, dmag = grouped_backward.grouped_walk(
            dy, hidden, held, segments, problem.r, down=False, z=seen, splits=precise
        )
    finish(da, db, dmag)
    return da, db, dmag


def _gradients(group: Group, held: Members, da: Planes | None, db: Planes | None, dmag: Planes | None) -> list[Tensor]:
    """Each wanted gradient in a tensor of its own: an op's outputs share no memory."""
    parts, grads = [], []
    for e, (a, b, kind) in enumerate(zip(group.a, group.b, group.kinds, strict=True)):
        for bit, stack, like, first in (
            (NEED_DA, da, a, held.first_a[e] * a.shape[1]),
            (NEED_DB, db, b, held.first_b[e] * b.shape[0]),
        ):
            if kind & bit:
                assert stack is not None
                parts.append(stack.out[first : first + like.numel()].view(like.shape))
                grads.append(torch.empty_like(like))
        if kind & NEED_DMAG:
            assert dmag is not None
            parts.append(dmag.out[held.doras.index(e)])
            grads.append(torch.empty_like(parts[-1]))
    if grads:
        torch._foreach_copy_(grads, parts)
    return grads


def _zeros(problem: Problem, dy: Tensor, group: Group) -> list[Tensor]:
    """The gradients of no tokens."""
    grads = []
    for a, b, kind in zip(group.a, group.b, group.kinds, strict=True):
        grads += [torch.zeros_like(like) for bit, like in ((NEED_DA, a), (NEED_DB, b)) if kind & bit]
        if kind & NEED_DMAG:
            grads.append(dy.new_zeros((problem.n,), dtype=torch.float32))
    return grads


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
    """For each adapter da, db, dmag as its kind asks; dx is changed in place."""
    if not problem.m:
        return _zeros(problem, dy, group)
    with on_device(dy):
        held, g = members(group, dy.device), None
        if dx is not None or any(kind & NEED_DA for kind in group.kinds):
            g = grouped_forward.grouped_rows(
                dy, group.b[0], held, segments, problem.r, down=False, splits=splits(problem)
            )
        if dx is not None:
            assert g is not None
            grouped_backward.grouped_input(g, dx, group.a[0], held, segments, bits=mask, dropped=dropped_dx)
        sums = _sums(problem, dy, x, group, held, segments, g, h, mask, z)
        return _gradients(group, held, *sums)
