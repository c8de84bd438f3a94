"""One adapted linear among others that one autograd Function computes: its tensors, checked and ready for the ops."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastlora import settings
from fastlora.config import DORA_DROPOUT
from fastlora.errors import DtypeError, ShapeError
from fastlora.math.nf4 import PackedWeight
from fastlora.ops import schema
from fastlora.ops.dora import dora_weight_norm
from fastlora.ops.lora import _PLAIN, _check, _check_devices, adapted_linear, autocast_dtype
from fastlora.ops.schema import flags_of, format_of
from fastlora.problem import DENSE, NEED_DA, NEED_DB, NEED_DBIAS, NEED_DMAG, Format

NEEDS = (NEED_DA, NEED_DB, NEED_DMAG, NEED_DBIAS)  # of a, b, magnitude, bias


class Call(NamedTuple):
    """The static facts of one call, in the order of `ops.lora.Call`."""

    scale: float
    stream: int
    p: float
    flags: int
    backend: str
    on_grid: bool


class Projection(NamedTuple):
    """An adapted linear as `lora_linear` and `qlora_linear` take it, without x and the seed.

    Attributes:
        weight: frozen [n, k], dense or packed.
        a, b: [r, k] and [n, r], one float dtype; both None for a linear without adapter.
        scale: a float, or a 0-dim tensor.
        bias, magnitude: [n] or None.
        dropout_p, stream, dora_dropout: as in `lora_linear`.
        on_grid, compute_dtype: as in `qlora_linear`.
    """

    weight: Tensor | PackedWeight
    a: Tensor | None = None
    b: Tensor | None = None
    scale: float | Tensor = 1.0
    bias: Tensor | None = None
    magnitude: Tensor | None = None
    dropout_p: float = 0.0
    stream: int = 0
    dora_dropout: str = "peft"
    on_grid: bool = False
    compute_dtype: torch.dtype | None = None

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """What must be plain for the fast path."""
        first = self.weight[0] if isinstance(self.weight, PackedWeight) else self.weight
        return first, self.a, self.b, self.bias, self.magnitude

    def trains(self, x: Tensor) -> bool:
        """Whether its output for x needs a backward."""
        scale = self.scale if isinstance(self.scale, Tensor) else None
        grads = (x, self.a, self.b, scale, self.bias, self.magnitude)
        return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in grads)


class Member(NamedTuple):
    """A projection as the ops take it: a, b contiguous (rank 0 without adapter), the norm taken, the call's facts."""

    a: Tensor
    b: Tensor
    mag: Tensor | None
    bias: Tensor | None
    weight: Tensor | PackedWeight
    norm: Tensor | None
    seed: Tensor | None
    call: Call

    @property
    def format(self) -> Format:
        """How the weight is stored."""
        return format_of(self.weight, self.call.on_grid) if isinstance(self.weight, PackedWeight) else DENSE


def watched() -> bool:
    """Whether something looks on that must see single ops: a compiler, a tracer, a mode, a transform. Not a profiler,
    which shows what runs."""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._len_torch_function_stack() > 0
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state() is not None
        or forward_ad._current_level >= 0
    )


def plain(*tensors: Tensor | None) -> bool:
    """Whether all are ordinary tensors with data."""
    return all(type(t) in _PLAIN and (t is None or not t.is_meta) for t in tensors)


def check(x: Tensor, projection: Projection) -> None:
    """Raise what `lora_linear` would for this x.

    Raises:
        ShapeError, DtypeError: expected and actual.
    """
    weight, a, b = projection.weight, projection.a, projection.b
    if len(weight.shape) != 2:
        raise ShapeError(f"expected a weight of shape [n, k], got {tuple(weight.shape)}")
    n, k = weight.shape
    if (a is None) != (b is None):
        raise ShapeError(f"expected both a and b or neither, got {'only b' if a is None else 'only a'}")
    if a is None or b is None:
        if projection.magnitude is not None or projection.dropout_p:
            raise ShapeError("a linear without adapter has neither magnitude nor dropout")
        a, b = x.new_empty((0, k)), x.new_empty((n, 0))
    _check(x, n, k, a, b, projection.bias, projection.magnitude, projection.dropout_p)
    _check_devices(x, *projection.tensors)
    if projection.dora_dropout not in DORA_DROPOUT:
        raise ShapeError(f"dora_dropout must be one of {', '.join(DORA_DROPOUT)}, got {projection.dora_dropout!r}")
    if isinstance(weight, Tensor) and weight.requires_grad:
        raise DtypeError("the base weight is frozen: expected weight.requires_grad=False, got True")


def compute_dtype(x: Tensor, projections: Sequence[Projection]) -> torch.dtype:
    """The one dtype x is computed in: theirs, autocast's, or its own.

    Raises:
        DtypeError: they differ.
    """
    wanted = {each.compute_dtype or autocast_dtype(x) or x.dtype for each in projections}
    if len(wanted) != 1:
        raise DtypeError(f"expected projections of one compute dtype, got {', '.join(sorted(map(str, wanted)))}")
    return wanted.pop()


def ready(
    x: Tensor, projection: Projection, seed: Tensor | None, backend: str | None, *, train: bool, lazy_h: bool = False
) -> Member:
    """A checked projection for x [m, k] in its compute dtype; DoRA's norm is taken here.

    Args:
        seed: int64 [1], where it drops.
        train: whether the backward's needs are returned.
        lazy_h: whether the backward may form h, where that pays on a GPU.
    """
    weight, a, b, scale = projection[:4]
    n, k = weight.shape
    base: Tensor | PackedWeight = weight
    if isinstance(weight, Tensor):
        base = weight.to(x.dtype) if autocast_dtype(x) is not None else weight
        if base.dtype != x.dtype:
            raise DtypeError(f"expected x and weight of one dtype, got x {x.dtype} and weight {weight.dtype}")
    if a is None or b is None:
        a, b = x.new_empty((0, k)), x.new_empty((n, 0))
    if isinstance(scale, Tensor):  # in fp32, as in `adapted_linear`
        b, scale = b.to(torch.promote_types(b.dtype, torch.float32)) * scale, 1.0
        a = a.to(b.dtype)
    a, b, magnitude, p = a.contiguous(), b.contiguous(), projection.magnitude, projection.dropout_p
    norm = None
    if magnitude is not None:
        norm = dora_weight_norm(weight, a, b, scale, backend=backend)
    flags = flags_of(
        bias=projection.bias is not None,
        dropout=p > 0.0,
        dora=magnitude is not None,
        shared=projection.dora_dropout == "shared",
        train=train,
        save_mask=not settings.current.low_memory,
        lazy_h=lazy_h and x.device.type == "cuda" and isinstance(weight, PackedWeight) and p == 0.0 and k > n,
    )
    call = Call(float(scale), projection.stream, float(p), flags, backend or "", projection.on_grid)
    return Member(a, b, magnitude, projection.bias, base, norm, seed if p > 0.0 else None, call)


def alone(x: Tensor, projection: Projection, seed: Tensor | None, backend: str | None) -> Tensor:
    """One projection by itself, through the ops that anything may look on: x [..., k] -> [..., n] in the dtype of x."""
    weight, a, b, scale, bias, magnitude, p, stream, dora_dropout, on_grid, compute = projection
    n, k = weight.shape
    inside = x.to(compute or autocast_dtype(x) or x.dtype)
    y = adapted_linear(
        inside,
        weight.to(inside.dtype) if isinstance(weight, Tensor) and autocast_dtype(x) is not None else weight,
        x.new_empty((0, k)) if a is None else a,
        x.new_empty((n, 0)) if b is None else b,
        scale,
        bias=bias,
        dropout_p=p,
        seed=seed,
        stream=stream,
        magnitude=magnitude,
        dora_dropout=dora_dropout,
        backend=backend,
        on_grid=on_grid,
        norm_weight=weight if isinstance(weight, Tensor) else None,
    )
    return y if compute is None else y.to(x.dtype)


SAVED = 13  # tensors of a member in `save_for_backward`


def pack(member: Member, h: Tensor | None, mask: Tensor | None, z: Tensor | None) -> tuple[list[Any], Any]:
    """What a backward needs of a member: tensors for `save_for_backward`, and the rest."""
    weight = member.weight
    packed = isinstance(weight, PackedWeight)
    parts = list(weight[:5]) if isinstance(weight, PackedWeight) else [weight, None, None, None, None]
    dtypes = None if member.mag is None else member.mag.dtype, None if member.bias is None else member.bias.dtype
    facts = (weight[5:] if packed else None, member.call, dtypes)
    return [member.a, member.b, member.mag, member.norm, member.seed, h, mask, z, *parts], facts


class Kept(NamedTuple):
    """A member in the backward."""

    member: Member
    h: Tensor | None
    mask: Tensor | None
    z: Tensor | None
    dtypes: tuple[torch.dtype | None, torch.dtype | None]

    def run(self, dy: Tensor, x: Tensor | None, needs: int) -> tuple[Tensor | None, ...]:
        """dx, da, db, dmag, dbias by the op's body; `needs`: the NEED_* bits of those wanted."""
        member, call = self.member, self.member.call
        flags = call.flags | needs
        tail = (member.a, member.b, call.scale, member.mag, member.norm, self.h, self.mask, self.z, member.seed)
        return schema._backward(dy, x, member.weight, member.format, (*tail, call.stream, call.p, flags, call.backend))

    def cast(self, grads: Sequence[Tensor | None]) -> list[Tensor | None]:
        """da, db, dmag, dbias in the dtypes of what they belong to."""
        da, db, dmag, dbias = grads
        mag_dtype, bias_dtype = self.dtypes
        return [da, db, None if dmag is None else dmag.to(mag_dtype), None if dbias is None else dbias.to(bias_dtype)]


def unpack(tensors: Sequence[Any], facts: Any) -> Kept:
    """What `pack` packed; the flags without those of a forward."""
    packing, call, dtypes = facts
    a, b, mag, norm, seed, h, mask, z, *parts = tensors
    weight = parts[0] if packing is None else PackedWeight(*parts, *packing)
    return Kept(Member(a, b, mag, None, weight, norm, seed, call), h, mask, z, dtypes)


def forward(x: Tensor, member: Member) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """y, h, mask, z by the op's body."""
    call = member.call
    tail = (member.bias, member.a, member.b, call.scale, member.mag, member.norm, member.seed)
    return schema._forward(x, member.weight, member.format, (*tail, call.stream, call.p, call.flags, call.backend))
