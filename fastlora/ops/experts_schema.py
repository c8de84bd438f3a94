"""The ops of stacked experts: what E adapters of one linear add to rows that already hold its frozen base.

They run the grouped kernels (equations and Kernel.run signatures: `ops.schema`) without a base product of their own:
a mixture of experts forms the base once for a token and repeats it for each expert the token goes to.
  experts_mask -> mask uint8 [m, ceil(k/8)]: row i by the stream and p of its own expert
  experts_fwd  -> h fp32 [m, r] and, under DORA and TRAIN, z [m, n]; y is changed in place
  experts_bwd  -> da [E, r, k], db [E, n, r], dmag [E, n] fp32, those NEED_* asks for; dx, if given, is changed in place
An op that changes an argument may not return an optional tensor: what is not asked for is an empty one.
Expert e's dropout stream is `stream` + e. Experts without a row get gradients of 0. DoRA's base term is never dropped.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastlora.math.segments import Group, Segments
from fastlora.ops.schema import _accumulator, _mask_like, _run, fake, op
from fastlora.problem import DENSE, DORA, DROPOUT, NEED_DA, NEED_DB, NEED_DMAG, SHARED, TRAIN, Problem

_EXPERTS = (
    "Tensor a, Tensor b, Tensor? mag, Tensor? norm, float scale, float p, int stream, "
    "Tensor owner, Tensor order, Tensor offsets"
)


def _group(
    a: Tensor, b: Tensor, mag: Tensor | None, norm: Tensor | None, scale: float, p: float, stream: int, kind: int
) -> Group:
    count = a.shape[0]
    none: Sequence[Tensor | None] = [None] * count
    return Group(
        list(a.unbind(0)),
        list(b.unbind(0)),
        none if mag is None else list(mag.unbind(0)),
        none if norm is None else list(norm.unbind(0)),
        [scale] * count,
        [p] * count,
        [stream + e for e in range(count)],
        [kind] * count,
    )


def _problem(op: str, m: int, dtype: torch.dtype, a: Tensor, b: Tensor, flags: int) -> Problem:
    experts, r, k = a.shape
    return Problem(op, m, b.shape[1], k, r, dtype, a.dtype, DENSE, flags, a.device.type, experts)


def _kind(flags: int) -> int:
    """The bits that hold for each expert."""
    shared = SHARED if flags & DORA and flags & DROPOUT else 0
    return (flags & (DROPOUT | DORA | NEED_DA | NEED_DB | NEED_DMAG)) | shared


@op(
    "experts_mask(Tensor seed, Tensor a, Tensor b, float p, int stream, Tensor owner, Tensor order, Tensor offsets, "
    "str backend) -> Tensor"
)
def experts_mask(
    seed: Tensor,
    a: Tensor,
    b: Tensor,
    p: float,
    stream: int,
    owner: Tensor,
    order: Tensor,
    offsets: Tensor,
    backend: str,
) -> Tensor:
    """Body of the op; arguments as its schema."""
    group = _group(a, b, None, None, 1.0, p, stream, DROPOUT)
    problem = _problem("grouped_mask", owner.shape[0], a.dtype, a, b, DROPOUT)
    mask: Tensor = _run(problem, backend, Segments(owner, order, offsets), group, seed)
    return mask


@fake("experts_mask")
def _(
    seed: Tensor,
    a: Tensor,
    b: Tensor,
    p: float,
    stream: int,
    owner: Tensor,
    order: Tensor,
    offsets: Tensor,
    backend: str,
) -> Tensor:
    return _mask_like(a.new_empty((owner.shape[0], a.shape[2])))


@op(
    f"experts_fwd(Tensor x, Tensor(a!) y, Tensor? bias, {_EXPERTS}, Tensor? mask, int flags, str backend) "
    "-> (Tensor, Tensor)"
)
def experts_fwd(x: Tensor, y: Tensor, bias: Tensor | None, *args: Any) -> tuple[Tensor, Tensor]:
    """Body of the op; arguments as its schema."""
    a, b, mag, norm, scale, p, stream, owner, order, offsets, mask, flags, backend = args
    group = _group(a, b, mag, norm, scale, p, stream, _kind(flags))
    problem = _problem("grouped_fwd", x.shape[0], x.dtype, a, b, flags | _kind(flags))
    h, z = _run(problem, backend, x, y, bias, group, Segments(owner, order, offsets), mask, None)
    return x.new_empty(0) if h is None else h, x.new_empty(0) if z is None else z


@fake("experts_fwd")
def _(x: Tensor, y: Tensor, bias: Tensor | None, *args: Any) -> tuple[Tensor, Tensor]:
    a, flags = args[0], args[-2]
    if not flags & TRAIN:
        return x.new_empty(0), x.new_empty(0)
    h = x.new_empty((x.shape[0], a.shape[1]), dtype=_accumulator(x.dtype))
    return h, torch.empty_like(y) if flags & DORA else x.new_empty(0)


@op(
    f"experts_bwd(Tensor dy, Tensor? x, Tensor(a!)? dx, {_EXPERTS}, Tensor? h, Tensor? mask, Tensor? z, int flags, "
    "str backend) -> (Tensor, Tensor, Tensor)"
)
def experts_bwd(dy: Tensor, x: Tensor | None, dx: Tensor | None, *args: Any) -> tuple[Tensor, ...]:
    """Body of the op; arguments as its schema."""
    a, b, mag, norm, scale, p, stream, owner, order, offsets, h, mask, z, flags, backend = args
    kind = _kind(flags)
    group = _group(a, b, mag, norm, scale, p, stream, kind)
    problem = _problem("grouped_bwd", dy.shape[0], dy.dtype, a, b, flags | kind)
    found = _run(problem, backend, dy, x, group, Segments(owner, order, offsets), h, mask, z, dx, None)
    wanted = [bit for bit in (NEED_DA, NEED_DB, NEED_DMAG) if flags & bit]
    stacks = {bit: torch.stack(found[place :: len(wanted)]) for place, bit in enumerate(wanted)}
    return tuple(stacks[bit] if flags & bit else dy.new_empty(0) for bit in (NEED_DA, NEED_DB, NEED_DMAG))


@fake("experts_bwd")
def _(dy: Tensor, x: Tensor | None, dx: Tensor | None, *args: Any) -> tuple[Tensor, ...]:
    a, b, flags = args[0], args[1], args[-2]
    sums = dy.new_empty(b.shape[:2], dtype=_accumulator(dy.dtype))
    return (
        torch.empty_like(a) if flags & NEED_DA else dy.new_empty(0),
        torch.empty_like(b) if flags & NEED_DB else dy.new_empty(0),
        sums if flags & NEED_DMAG else dy.new_empty(0),
    )
