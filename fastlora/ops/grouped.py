"""Several adapters over one frozen base, one a row: an autograd Function with as many tensors as there are adapters."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable
from torch.nn import Parameter

from fastlora import settings
from fastlora.config import DORA_DROPOUT
from fastlora.errors import DtypeError, ShapeError
from fastlora.math.nf4 import PackedWeight
from fastlora.math.segments import Group, Segments
from fastlora.ops import grouped_schema
from fastlora.ops.dora import dora_weight_norm
from fastlora.ops.lora import _check, _check_devices, _direct, _refuse_tangents, _watched, as_seed
from fastlora.ops.schema import _forward, _run, format_of
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
    SHARED,
    TRAIN,
    Problem,
)


class RowAdapter(NamedTuple):
    """One adapter of a mixed batch.

    Attributes:
        a, b: [r, k] and [n, r], one float dtype.
        scale: s.
        name: for messages.
        magnitude: [n]; makes it DoRA.
        dropout_p, stream, dora_dropout: as in `lora.lora_linear`.
    """

    a: Tensor
    b: Tensor
    scale: float
    magnitude: Tensor | None = None
    dropout_p: float = 0.0
    stream: int = 0
    dora_dropout: str = "peft"
    name: str = ""


class _Facts(NamedTuple):
    """The static facts of one call, as the ops take them."""

    scales: list[float]
    ps: list[float]
    streams: list[int]
    kinds: list[int]
    flags: int
    backend: str
    on_grid: bool


class _Frozen(NamedTuple):
    """What no gradient flows to."""

    weight: Tensor | PackedWeight
    norms: list[Tensor | None]
    rows: Segments
    seed: Tensor | None


def _split(tensors: Sequence[Tensor | None], groups: int) -> tuple[Any, Any, Any]:
    """a_0 .., b_0 .., mag_0 .. as three lists."""
    return list(tensors[:groups]), list(tensors[groups : 2 * groups]), list(tensors[2 * groups :])


def _forward_op(
    x: Tensor, bias: Tensor | None, tensors: Sequence[Tensor | None], frozen: _Frozen, facts: _Facts
) -> Any:
    a, b, mag = _split(tensors, len(facts.kinds))
    group = (a, b, mag, frozen.norms, facts.scales, facts.ps, facts.streams, facts.kinds)
    tail = (bias, *group, *frozen.rows, frozen.seed, facts.flags, facts.backend)
    plain = _direct(x, frozen.weight, bias, frozen.seed, *tensors)
    if isinstance(frozen.weight, PackedWeight):
        run = grouped_schema.qgrouped_fwd if plain else torch.ops.fastlora.qgrouped_fwd
        return run(x, *frozen.weight[:7], facts.on_grid, *tail)
    return (grouped_schema.grouped_fwd if plain else torch.ops.fastlora.grouped_fwd)(x, frozen.weight, *tail)


class MixedLinear(torch.autograd.Function):
    """x[m,k], bias[n]|None, and every adapter's a, b, mag|None -> y[m,n]; equations in `ops.schema`.

    Saved for the backward: x, h [m, max r] fp32, the dropout bits (low memory: only the seed), DoRA's z [m,n] where an
    adapter is DoRA, the rows' order, and references to the parameters.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, bias: Tensor | None, frozen: _Frozen, facts: _Facts, *tensors: Tensor | None
    ) -> Tensor:
        """One op call; saves what its twin needs."""
        needs = ctx.needs_input_grad
        groups = len(facts.kinds)
        y, h, mask, z = _forward_op(x, bias, tensors, frozen, facts)
        need_a, need_b, need_mag = _split(needs[4:], groups)
        weight = frozen.weight
        packed = isinstance(weight, PackedWeight)
        ctx.save_for_backward(
            x if any(need_a) else None,
            h if any(need_b) else None,
            mask,
            z if any(need_mag) else None,
            frozen.seed,
            *frozen.rows,
            *(weight[:5] if isinstance(weight, PackedWeight) else (weight, None, None, None, None)),
            *frozen.norms,
            *tensors,
        )
        ctx.packing = weight[5:7] if packed else None
        ctx.bias_dtype = None if bias is None else bias.dtype
        bits = (NEED_DA, NEED_DB, NEED_DMAG)
        kinds = [
            kind | sum(bit for bit, need in zip(bits, each, strict=True) if need)
            for kind, *each in zip(facts.kinds, need_a, need_b, need_mag, strict=True)
        ]
        flags = facts.flags & ~(TRAIN | SAVE_MASK | BIAS) | NEED_DX * needs[0] | NEED_DBIAS * needs[1]
        for kind in kinds:
            flags |= kind & sum(bits)
        ctx.facts = facts._replace(kinds=kinds, flags=flags)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Any:
        """dy[m,n] -> dx, dbias and every adapter's da, db, dmag, each only if its input needs it."""
        facts, groups = ctx.facts, len(ctx.facts.kinds)
        x, h, mask, z, seed, owner, order, offsets, *rest = ctx.saved_tensors
        weight, norms, tensors = rest[:5], rest[5 : 5 + groups], rest[5 + groups :]
        a, b, mag = _split(tensors, groups)
        group = (a, b, mag, norms, facts.scales, facts.ps, facts.streams, facts.kinds)
        tail = (*group, owner, order, offsets, h, mask, z, seed, facts.flags, facts.backend)
        dy = dy.contiguous()
        plain = _direct(dy, weight[0], x, *tensors)
        if ctx.packing is None:
            run = grouped_schema.grouped_bwd if plain else torch.ops.fastlora.grouped_bwd
            dx, dbias, grads = run(dy, x, weight[0], *tail)
        else:
            run = grouped_schema.qgrouped_bwd if plain else torch.ops.fastlora.qgrouped_bwd
            dx, dbias, grads = run(dy, x, *weight, *ctx.packing, facts.on_grid, *tail)
        found = iter(grads)
        sets = [[next(found) if kind & bit else None for bit in (NEED_DA, NEED_DB, NEED_DMAG)] for kind in facts.kinds]
        da, db, dmag = zip(*sets, strict=True)
        dmag = tuple(None if d is None else d.to(m.dtype) for d, m in zip(dmag, mag, strict=True))
        return dx, None if dbias is None else dbias.to(ctx.bias_dtype), None, None, *da, *db, *dmag


def _check_adapters(x: Tensor, n: int, k: int, adapters: Sequence[RowAdapter], bias: Tensor | None) -> torch.dtype:
    """Raise what does not fit, by the adapter's number; else the dtype they are computed in."""
    wide, device, host = adapters[0].a.dtype, x.device, x.is_cpu
    tangents = forward_ad._current_level >= 0
    for number, each in enumerate(adapters):
        a, b, _, mag, p = each[:5]
        dtype, shape = a.dtype, a.shape
        if dtype is not wide:
            wide = torch.promote_types(wide, dtype)
        # The quick look that most adapters pass; `_check` finds the words for those that do not.
        fits = (
            len(shape) == 2
            and shape[1] == k
            and b.shape == (n, shape[0])
            and b.dtype is dtype
            and dtype.is_floating_point
        )
        fits = fits and ((a.is_cpu and b.is_cpu) if host else (a.device == device and b.device == device))
        if fits and mag is None and p == 0.0 and number and not tangents:
            continue
        try:
            _check(x, n, k, a, b, bias, mag, p)
            _check_devices(x, a, b, mag)
            if each.dora_dropout not in DORA_DROPOUT:
                raise ShapeError(f"dora_dropout must be one of {', '.join(DORA_DROPOUT)}, got {each.dora_dropout!r}")
        except (ShapeError, DtypeError) as error:
            raise type(error)(f"adapter {each.name or number}: {error}") from None
        if tangents:
            _refuse_tangents(x, a, b, bias, mag)
    return wide


def _facts(
    train: bool, bias: Tensor | None, adapters: Sequence[RowAdapter], backend: str | None, on_grid: bool
) -> _Facts:
    """The static facts of a call."""
    kinds = [
        DROPOUT * (each.dropout_p > 0.0)
        | DORA * (each.magnitude is not None)
        | SHARED * (each.magnitude is not None and each.dropout_p > 0.0 and each.dora_dropout == "shared")
        for each in adapters
    ]
    flags = BIAS * (bias is not None) | TRAIN * train
    for kind in kinds:
        flags |= kind
    if train and flags & DROPOUT and not settings.current.low_memory:
        flags |= SAVE_MASK
    scales, ps = [float(each.scale) for each in adapters], [float(each.dropout_p) for each in adapters]
    return _Facts(scales, ps, [each.stream for each in adapters], kinds, flags, backend or "", on_grid)


def mixed_linear(
    x: Tensor,
    weight: Tensor | PackedWeight,
    adapters: Sequence[RowAdapter],
    rows: Segments,
    *,
    bias: Tensor | None = None,
    seed: int | Tensor | None = None,
    backend: str | None = None,
    on_grid: bool = False,
    norm_weight: Tensor | None = None,
) -> Tensor:
    """y[i] = x[i] w^T + bias, plus what adapter rows.owner[i] adds to it (see `ops.schema`); no host sync.

    Args:
        x: [m, k], float; y has its dtype.
        weight: [n, k] frozen: dense in the dtype of x, or packed.
        adapters: at least one; ranks, scales, dropout and DoRA may differ, dtypes too (the widest is computed in).
        rows: `math.segments.segments(owner, len(adapters))`.
        bias: [n]. seed: int or int64 tensor [1]; None draws one where an adapter drops.
        backend, on_grid, norm_weight: as in `lora.adapted_linear`.

    Returns:
        [m, n]; rows without adapter equal the frozen base bit for bit.

    Raises:
        ShapeError, DtypeError: what was expected and what came. UnsupportedError: why no backend can.
    """
    n, k = weight.shape
    if x.dim() != 2 or not adapters or rows.owner.shape[0] != x.shape[0] or rows.groups != len(adapters):
        raise ShapeError(
            f"expected x [m, k], one adapter at least and rows of both, got x {tuple(x.shape)}, {len(adapters)} "
            f"adapters and {rows.owner.shape[0]} rows of {rows.groups}"
        )
    if isinstance(weight, Tensor) and weight.dtype != x.dtype:
        raise DtypeError(f"expected x and weight of one dtype, got x {x.dtype} and weight {weight.dtype}")
    _check_devices(x, bias, rows.owner, weight[0] if isinstance(weight, PackedWeight) else weight)
    wide = _check_adapters(x, n, k, adapters, bias)
    train = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad
        for t in (x, bias, *(t for each in adapters for t in (each.a, each.b, each.magnitude)))
    )
    facts = _facts(train, bias, adapters, backend, on_grid)
    base = weight if norm_weight is None else norm_weight
    norms = [
        None if each.magnitude is None else dora_weight_norm(base, each.a, each.b, each.scale, backend=backend)
        for each in adapters
    ]
    matrices = [each.a for each in adapters] + [each.b for each in adapters]
    tensors: list[Tensor | None] = [
        t if t.dtype is wide and t.is_contiguous() else t.to(wide).contiguous() for t in matrices
    ]
    tensors += [each.magnitude for each in adapters]
    frozen = _Frozen(weight, norms, rows, as_seed(seed, x.device) if facts.flags & DROPOUT else None)
    x = x.contiguous()
    if train:
        return MixedLinear.apply(x, bias, frozen, facts, *tensors)
    y: Tensor = _forward_op(x, bias, tensors, frozen, facts)[0]
    return y


# --- known adapters again ---------------------------------------------------------------------------------------------


class Plain(NamedTuple):
    """An adapter of a mixed batch that `mixed_linear` has taken: no dropout, no DoRA, contiguous, on a CPU.

    A layer that is asked for it again, without gradients, need not look at it ten times.

    Attributes:
        signature: `plain_signature` of it. dtype, rank. memo: what a backend knows of it.
    """

    signature: tuple[Any, ...]
    dtype: torch.dtype
    rank: int
    memo: dict[str, Any]


def plain_signature(a: Tensor, b: Tensor, scale: float) -> tuple[Any, ...]:
    """All that an answer for an adapter rests on: places, shapes, dtypes, order in memory, scale."""
    return a.data_ptr(), b.data_ptr(), a.shape, b.shape, a.dtype, b.dtype, a.is_contiguous(), b.is_contiguous(), scale


def plain_of(adapter: RowAdapter) -> Plain | None:
    """The `Plain` of an adapter that `mixed_linear` took; None where there is more to it."""
    a, b, scale, mag, p = adapter[:5]
    if mag is not None or p or type(a) is not Parameter or type(b) is not Parameter:
        return None
    if not (a.is_cpu and a.is_contiguous() and b.is_contiguous()):
        return None
    return Plain(plain_signature(a, b, scale), a.dtype, a.shape[0], {})


@functools.lru_cache(maxsize=64)
def _no_adapter(dtype: torch.dtype, n: int, k: int) -> tuple[Tensor, Tensor]:
    return torch.empty((0, k), dtype=dtype), torch.empty((n, 0), dtype=dtype)


def plain_again(
    x: Tensor,
    weight: Tensor | PackedWeight,
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    scales: list[float],
    plain: Sequence[Plain],
    rows: Segments,
    bias: Tensor | None,
    on_grid: bool,
) -> Tensor | None:
    """`mixed_linear` for adapters that still are what `plain` says, without gradients; None where that must look again.

    x [m, k], plain and on a CPU like the weight; rows: its segments.
    """
    (m, k), n = x.shape, weight.shape[0]
    first = weight[0] if isinstance(weight, PackedWeight) else weight
    if weight.shape[1] != k or not first.is_cpu or not x.is_contiguous() or _watched():
        return None
    if first is weight and first.dtype is not x.dtype:
        return None
    fmt = format_of(weight, on_grid) if isinstance(weight, PackedWeight) else DENSE
    wide, rank = plain[0].dtype, 0
    for each in plain:
        if each.dtype is not wide:
            return None
        rank = each.rank if each.rank > rank else rank
    flags, count, dtype = BIAS * (bias is not None), len(plain), x.dtype
    fixed = (bias, *_no_adapter(dtype, n, k), 1.0, None, None, None, 0, 0.0, flags, "")
    y: Tensor = _forward(x, weight, fmt, fixed)[0]
    none, zeros = [None] * count, [0] * count
    group = Group(a, b, none, none, scales, [0.0] * count, zeros, zeros, [each.memo for each in plain])
    problem = Problem("grouped_fwd", m, n, k, rank, dtype, wide, DENSE, flags, "cpu", count)
    _run(problem, "", x, y, bias, group, rows, None, None)
    return y
