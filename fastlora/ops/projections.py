"""Several adapted linears over one x, as one autograd Function: q, k and v of an attention, gate and up of an MLP.

Shared: the checks, the cast of x, one dropout seed, x itself in what is saved, one dx; and on backends that have
kernels for groups what `backends` says there. Where something looks on that must see single ops (a compiler, a mode, a
transform), every linear runs by itself, with the same masks.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastlora import backends
from fastlora.dispatch import registry
from fastlora.dispatch.registry import Kernel
from fastlora.errors import ShapeError
from fastlora.math.group import One
from fastlora.ops import member as members
from fastlora.ops import schema
from fastlora.ops.lora import as_seed
from fastlora.ops.member import NEEDS, SAVED, Member, Projection
from fastlora.ops.merged import merged_lives
from fastlora.problem import DENSE, NEED_DX, SAVE_MASK, TRAIN, Problem

FIELDS = len(Member._fields)
STREAMS = 65536  # dropout streams of one projection: its adapters
Outputs = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]


def _chosen(problems: Sequence[Problem], args: Sequence[tuple[Any, ...]], forced: str) -> list[Kernel]:
    """The kernel of each by itself."""
    backends.load()
    return [registry.select(problem, forced, arg) for problem, arg in zip(problems, args, strict=True)]


def _of_group(op: str, problems: Sequence[Problem], kernels: Sequence[Kernel]) -> tuple[Problem, Kernel] | None:
    """The group's problem and the kernel of the backend that all chose, where it has one and all plans can join."""
    if len({kernel.backend for kernel in kernels}) != 1 or any(kernel.plan in _ALONE for kernel in kernels):
        return None
    first, flags = problems[0], 0
    for problem in problems:
        flags |= problem.flags
    joint = first._replace(
        op=op,
        n=sum(problem.n for problem in problems),
        r=max(problem.r for problem in problems),
        format=DENSE,
        flags=flags,
        groups=len(problems),
    )
    for kernel in registry.kernels(op):
        if kernel.backend == kernels[0].backend and not registry.why_not(kernel, joint):
            return joint, kernel
    return None


_ALONE = frozenset({"fused", "skinny"})  # plans of few tokens, one kernel each


def forward(x: Tensor, group: Sequence[Member], keep: bool) -> tuple[list[Outputs], list[Tensor | None]]:
    """y, h, mask, z of each, and with `keep` merged weights for the backward."""
    problems, args = [], []
    for each in group:
        call, (n, r) = each.call, each.b.shape
        schema._check_scale(call.scale)
        facts = (x.dtype, each.a.dtype, each.format, call.flags, x.device.type)
        problems.append(Problem("lora_fwd", x.shape[0], n, x.shape[1], r, *facts))
        tail = (each.weight, each.bias, each.a, each.b, call.scale, each.mag, each.norm, each.seed, call.stream, call.p)
        args.append(tail)
    kernels = _chosen(problems, [(x, *tail) for tail in args], group[0].call.backend)
    together = _of_group("projections_fwd", problems, kernels)
    if together is None:
        outs = [kernel.run(problem, x, *tail) for kernel, problem, tail in zip(kernels, problems, args, strict=True)]
        return outs, [None] * len(group)
    joint, kernel = together
    ones = [One(own.plan, problem, tail) for own, problem, tail in zip(kernels, problems, args, strict=True)]
    found: tuple[list[Outputs], list[Tensor | None]] = kernel.run(joint, x, ones, keep)
    return found


def backward(
    x: Tensor | None,
    group: Sequence[members.Kept],
    dys: Sequence[Tensor],
    needs: Sequence[int],
    weights: Sequence[Tensor | None],
) -> tuple[Tensor | None, list[tuple[Tensor | None, ...]]]:
    """dx of all; da, db, dmag, dbias of each."""
    problems, args = [], []
    for kept, dy, need in zip(group, dys, needs, strict=True):
        each, call, (r, k) = kept.member, kept.member.call, kept.member.a.shape
        flags = call.flags & ~(TRAIN | SAVE_MASK) | need
        facts = (dy.dtype, each.a.dtype, each.format, flags, dy.device.type)
        problems.append(Problem("lora_bwd", dy.shape[0], dy.shape[1], k, r, *facts))
        saved = (each.mag, each.norm, kept.h, kept.mask, kept.z, each.seed, call.stream, call.p)
        args.append((dy, each.weight, each.a, each.b, call.scale, *saved))
    forced = group[0].member.call.backend
    kernels = _chosen(problems, [(arg[0], x, *arg[1:]) for arg in args], forced)
    together = _of_group("projections_bwd", problems, kernels)
    if together is not None:
        joint, kernel = together
        ones = [One(own.plan, problem, arg) for own, problem, arg in zip(kernels, problems, args, strict=True)]
        found: tuple[Tensor | None, list[tuple[Tensor | None, ...]]] = kernel.run(joint, x, ones, weights)
        return found
    dx: Tensor | None = None
    grads: list[tuple[Tensor | None, ...]] = [()] * len(group)
    for i in reversed(range(len(group))):  # the order in which autograd adds what single layers give
        own, *grads[i] = kernels[i].run(problems[i], args[i][0], x, *args[i][1:])
        dx = own if dx is None else dx.add_(own)
    return dx, grads


class Projections(torch.autograd.Function):
    """x [m, k] -> y_i [m, n_i] of several adapted linears.

    Saved: x once, and for each linear what `ops.lora.AdaptedLinear` saves; in a checkpoint also merged weights.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, *fields: Any) -> tuple[Tensor, ...]:
        """fields: those of each `Member`, one after the other."""
        group = [Member(*fields[at : at + FIELDS]) for at in range(0, len(fields), FIELDS)]
        need_x, needs = ctx.needs_input_grad[0], ctx.needs_input_grad[1:]
        outs, weights = forward(x, group, need_x and merged_lives())
        tensors: list[Any] = []
        ctx.facts, ctx.needs = [], []
        for i, (each, (_, h, mask, z)) in enumerate(zip(group, outs, strict=True)):
            need_a, need_b, need_mag, need_bias = needs[FIELDS * i : FIELDS * i + 4]
            own, facts = members.pack(each, h if need_b else None, mask, z if need_mag else None)
            tensors += own
            ctx.facts.append(facts)
            wanted = (need_a, need_b, need_mag, need_bias)
            ctx.needs.append(sum(bit for bit, need in zip(NEEDS, wanted, strict=True) if need))
        any_a = any(needs[FIELDS * i] for i in range(len(group)))
        ctx.save_for_backward(x if any_a else None, *weights, *tensors)
        ctx.set_materialize_grads(False)
        ys = tuple(out[0] for out in outs)
        if not need_x:
            ctx.mark_non_differentiable(*(y for y, need in zip(ys, ctx.needs, strict=True) if not need))
        return ys

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dys: Tensor | None) -> Any:
        """dy_i [m, n_i] -> dx, and of each a, b, magnitude and bias; a linear without dy has none."""
        count = len(dys)
        x, *rest = ctx.saved_tensors
        weights, tensors = rest[:count], rest[count:]
        need_x = ctx.needs_input_grad[0]
        present = [i for i, dy in enumerate(dys) if dy is not None and (need_x or ctx.needs[i])]
        grads: list[Tensor | None] = [None] * (FIELDS * count)
        if not present:
            return None, *grads
        group = [members.unpack(tensors[SAVED * i : SAVED * (i + 1)], ctx.facts[i]) for i in present]
        given = [dys[i].contiguous() for i in present]  # type: ignore[union-attr]
        needs = [ctx.needs[i] | NEED_DX * need_x for i in present]
        with no_autocast(given[0]):
            dx, found = backward(x, group, given, needs, [weights[i] for i in present])
        for i, kept, own in zip(present, group, found, strict=True):
            grads[FIELDS * i : FIELDS * i + 4] = kept.cast(own)
        return dx, *grads


def no_autocast(t: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Kernels choose their own precision."""
    device = t.device.type
    return torch.amp.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else contextlib.nullcontext()


def _streams(projections: Sequence[Projection], shared: bool) -> list[Projection]:
    """Each with its own dropout stream; `shared`: all with the first's, so that they drop the same."""
    if not shared:
        return [each._replace(stream=each.stream + STREAMS * i) for i, each in enumerate(projections)]
    dropping = [each for each in projections if each.dropout_p]
    if len({each.dropout_p for each in dropping}) > 1:
        found = ", ".join(str(each.dropout_p) for each in dropping)
        raise ShapeError(f"a shared dropout decision needs one dropout_p, got {found}")
    return [each._replace(stream=dropping[0].stream) if dropping else each for each in projections]


def projections(
    x: Tensor,
    group: Sequence[Projection],
    *,
    seed: int | Tensor | None = None,
    shared_dropout: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, ...]:
    """Several adapted linears over one x: y_i of each is what `lora_linear` or `qlora_linear` gives.

    Args:
        x: [..., k], float.
        group: the linears, any of them without adapter; ranks, sizes, biases, DoRA and formats may differ.
        seed: int or int64 tensor [1] of all their dropout decisions; None draws one where any drops. Projection i drops
            by stream i * 65536 + its own.
        shared_dropout: all drop by the first one's stream, the same elements.
        backend: force one; never falls back in silence.

    Returns:
        [..., n_i] of each, in the dtype of x (autocast's when that is on).

    Raises:
        ShapeError, DtypeError: what was expected and what came. UnsupportedError: why no backend can.
    """
    if not group:
        raise ShapeError("expected at least one projection, got none")
    for each in group:
        members.check(x, each)
    dtype = members.compute_dtype(x, group)
    group = _streams(group, shared_dropout)
    drop = as_seed(seed, x.device) if any(each.dropout_p for each in group) else None
    if members.watched() or not members.plain(x, *(t for each in group for t in each.tensors)):
        return tuple(members.alone(x, each, drop, backend) for each in group)
    inside = x.to(dtype)
    flat = (inside if inside.dim() == 2 else inside.reshape(-1, inside.shape[-1])).contiguous()
    ready = [members.ready(flat, each, drop, backend, train=each.trains(x)) for each in group]
    with no_autocast(flat):
        if any(each.call.flags & TRAIN for each in ready):
            ys = Projections.apply(flat, *(field for each in ready for field in each))
        else:
            ys = tuple(out[0] for out in forward(flat, ready, False)[0])
    back = [each.compute_dtype is not None and dtype is not x.dtype for each in group]
    if x.dim() != 2:
        ys = tuple(torch.ops.aten._unsafe_view(y, (*x.shape[:-1], y.shape[1])) for y in ys)
    return tuple(y.to(x.dtype) if cast else y for y, cast in zip(ys, back, strict=True))
