"""Several adapted linears over one x: what they can share is made once, the rest is each one's own plan.

Shared, among members of one rank and dropout decision:  h = drop(x) [a_1; a_2; ...]ᵀ  one pass over x
                                                         da = [s_1 g_1, s_2 g_2, ...]ᵀ drop(x)  one pass over x
                                                         dx₀ = drop'(Σ s_i g_i a_i)  one product of the joint rank
                                                         partial sums over tokens of dy, four of them a launch
and among 4-bit weights of one format: one launch that decodes or merges them all. dx is one buffer: every base product
accumulates onto it.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastlora.backends.triton import backward, expand, forward, grad_a, shrink
from fastlora.backends.triton.forward import own_drop, splits
from fastlora.backends.triton.launch import on_device, target
from fastlora.backends.triton.merge import merge
from fastlora.backends.triton.merge_parts import MOST, Part, alike, merge_parts
from fastlora.backends.triton.project import Projected
from fastlora.backends.triton.shrink import Planes, finish_all
from fastlora.math.group import One
from fastlora.math.nf4 import PackedWeight
from fastlora.problem import DORA, NEED_DA, NEED_DB, NEED_DX, Problem

_WIDEST = 256  # columns that stand for the joint rank: what a tile holds


def _stacks(keys: Sequence[Hashable], columns: Sequence[int]) -> list[list[int]]:
    """Members of one key (None: none), as many together as a tile holds; only where there are two."""
    stacks: list[list[int]] = []
    for key in dict.fromkeys(key for key in keys if key is not None):
        members = [i for i, own in enumerate(keys) if own == key]
        most = max(1, _WIDEST // columns[members[0]])
        stacks += [members[at : at + most] for at in range(0, len(members), most)]
    return [stack for stack in stacks if len(stack) > 1]


def _columns(problem: Problem, like: Tensor) -> int:
    """How many columns of a product stand for one member's ranks."""
    terms = shrink.term_count(target(like.device), problem.dtype, splits(problem))
    return problem.r * terms


def _together(parts: Sequence[Part | None], dtype: torch.dtype) -> list[Tensor | None]:
    """The dense matrices of those that one launch can make with others; None where a member makes its own."""
    made: list[Tensor | None] = [None] * len(parts)
    left = [i for i, part in enumerate(parts) if part is not None]
    while left:
        first = parts[left[0]]
        same = [i for i in left if alike([first, parts[i]])]  # type: ignore[list-item]
        left = [i for i in left if i not in same]
        for at in range(0, len(same), MOST):
            chunk = same[at : at + MOST]
            if len(chunk) > 1:
                for i, w in zip(chunk, merge_parts([parts[i] for i in chunk], dtype), strict=True):  # type: ignore[misc]
                    made[i] = w
    return made


# --- forward ----------------------------------------------------------------------------------------------------------


def _forward_part(plan: str, call: forward.Call) -> Part | None:
    if not isinstance(call.weight, PackedWeight):
        return None
    if plan != "merge":
        return Part(call.weight, call.a[:0], call.b[:, :0], 1.0)
    keep_z = call.train and call.problem.flags & DORA
    return Part(call.weight, call.a, call.b, call.scale, *((None, None) if keep_z else (call.mag, call.norm)))


def _hidden(x: Tensor, plans: Sequence[str], calls: Sequence[forward.Call]) -> list[forward.Given]:
    """h of those that share it."""
    keys: list[Hashable] = []
    for plan, call in zip(plans, calls, strict=True):
        drop = call.dropout
        wanted = call.problem.r and (plan != "merge" or call.returns_h) and not own_drop(call.problem)
        decision = None if drop is None else (drop.threshold, drop.stream, id(drop.seed), call.save_mask)
        keys.append((call.problem.r, call.a.dtype, decision) if wanted else None)
    found = [forward.Given()] * len(calls)
    for stack in _stacks(keys, [_columns(call.problem, x) for call in calls]):
        first, r = calls[stack[0]], calls[stack[0]].problem.r
        a = torch.cat([calls[i].a for i in stack])
        h, mask = shrink.shrink(
            x, a, dropout=first.dropout, save_mask=first.save_mask, splits=splits(first.problem), part=r
        )
        for place, i in enumerate(stack):
            found[i] = forward.Given((h[place], mask))
    return found


def projections_fwd(
    problem: Problem, x: Tensor, ones: Sequence[One], keep: bool
) -> tuple[list[forward.Outputs], list[Tensor | None]]:
    """What `lora_fwd` returns of each; with `keep` also the merged weights that a backward would make again."""
    if not problem.m:
        return [forward.run(one.plan, one.problem, x, *one.args) for one in ones], [None] * len(ones)
    with on_device(x):
        plans, calls = [one.plan for one in ones], [forward.make_call(one.problem, x, *one.args) for one in ones]
        given = _hidden(x, plans, calls)
        weights = _together([_forward_part(*each) for each in zip(plans, calls, strict=True)], x.dtype)
        merged = [plan == "merge" and not one.problem.flags & DORA for plan, one in zip(plans, ones, strict=True)]
        if keep:
            weights = [
                merge(call.weight, call.a, call.b, call.scale, x.dtype) if w is None and useful else w  # type: ignore[arg-type]
                for w, useful, call in zip(weights, merged, calls, strict=True)
            ]
        outs = [
            forward.PLANS[plan](call._replace(given=own._replace(weight=w)))
            for plan, call, own, w in zip(plans, calls, given, weights, strict=True)
        ]
        return outs, [w if keep and useful else None for w, useful in zip(weights, merged, strict=True)]


# --- backward ---------------------------------------------------------------------------------------------------------


class _Shared(NamedTuple):
    """The projections of dy and da of members that share them, by member; and their part of dx."""

    low_rank: dict[int, tuple[Projected, Tensor | None]]
    dx: Tensor | None


def _key(plan: str, call: backward.Call) -> Hashable:
    """What members must agree on to share their passes over x; None: this one's are its own."""
    problem = call.problem
    need_da, in_dx = call.needs(NEED_DA), plan == "split" and call.needs(NEED_DX)
    lazy = call.h is None and call.needs(NEED_DB)
    if not problem.r or not (need_da or in_dx) or lazy or own_drop(problem):
        return None
    return plan, problem.r, call.a.dtype, id(call.bits), call.dscale, need_da, in_dx


def _share(x: Tensor | None, stack: Sequence[int], plan: str, calls: Sequence[backward.Call]) -> _Shared:
    """One stack's projections: g of each side by side, then da and dx₀ of all at once."""
    first, dy = calls[stack[0]], calls[stack[0]].dy
    r, terms = first.problem.r, splits(first.problem)
    g = torch.empty((len(stack), first.problem.m, r), dtype=torch.float32, device=dy.device)
    outs: dict[int, Projected] = {}
    partial: list[Planes] = []
    for place, i in enumerate(stack):
        call = calls[i]
        scaled = backward.scaled_dy(call) if plan == "split" else None
        outs[i] = backward.project_all(
            call, need_g=True, scaled=scaled, g_factor=call.scale, g_out=g[place], later=partial
        )
    finish_all(partial)
    da: list[Tensor | None] = [None] * len(stack)
    if first.needs(NEED_DA):
        assert x is not None
        joint = grad_a.grad_a(g, x, 1.0, bits=first.bits, dscale=first.dscale, splits=terms, part=r)
        da = list(joint.split(r))
    dx = None
    if plan == "split" and first.needs(NEED_DX):
        a = torch.cat([calls[i].a for i in stack])
        dx = expand.expand(g, a, 1.0, dy.dtype, transposed=True, bits=first.bits, factor=first.dscale, part=r)
    low_rank = {i: (outs[i]._replace(g=None), da[place]) for place, i in enumerate(stack)}
    return _Shared(low_rank, dx)


def _backward_part(plan: str, call: backward.Call) -> Part | None:
    if not isinstance(call.weight, PackedWeight) or not call.needs(NEED_DX):
        return None
    found = backward.parts_of(plan, call)
    return Part(call.weight, *(found or (call.a[:0], call.b[:, :0], 1.0)))


def projections_bwd(
    problem: Problem, x: Tensor | None, ones: Sequence[One], weights: Sequence[Tensor | None]
) -> tuple[Tensor | None, list[tuple[Tensor | None, ...]]]:
    """dx of all, and da, db, dmag, dbias of each. `weights`: merged ones that the forward kept."""
    # Only the split plan adds onto a dx that is there already.
    plans = ["split" if one.plan == "dense" else one.plan for one in ones]
    if not problem.m:
        found = [backward.run(plan, one.problem, one.args[0], x, *one.args[1:]) for plan, one in _zip(plans, ones)]
        return found[0][0], [grads[1:] for grads in found]
    with on_device(ones[0].args[0]):
        calls = [backward.make_call(one.problem, one.args[0], x, *one.args[1:]) for one in ones]
        weights = [w if plan == "merge" else None for w, plan in _zip(weights, plans)]  # others want other weights
        own = [None if w is not None else _backward_part(*each) for w, each in _zip(weights, _zip(plans, calls))]
        made = [a if a is not None else b for a, b in _zip(weights, _together(own, problem.dtype))]
        keys = [_key(plan, call) for plan, call in _zip(plans, calls)]
        low_rank: dict[int, tuple[Projected, Tensor | None]] = {}
        dx: Tensor | None = None
        for stack in _stacks(keys, [_columns(call.problem, call.dy) for call in calls]):
            shared = _share(x, stack, plans[stack[0]], calls)
            low_rank |= shared.low_rank
            if shared.dx is not None:
                dx = shared.dx if dx is None else dx.add_(shared.dx)
        grads: list[tuple[Tensor | None, ...]] = [()] * len(ones)
        for i in reversed(range(len(ones))):
            given = backward.Given(made[i], low_rank.get(i), dx)
            out = backward.PLANS[plans[i]](calls[i]._replace(given=given))
            dx, grads[i] = out[0], out[1:]
        return dx, grads


def _zip(one: Sequence, other: Sequence) -> list[tuple]:
    return list(zip(one, other, strict=True))
