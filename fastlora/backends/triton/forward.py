"""The forward plans: which kernels make up y = c ∘ (x wᵀ + s drop(x) aᵀ bᵀ) + bias, for every base and option.

    merge       quantized base, p = 0: w_eff = c ∘ (deq(w) + s b a) in one kernel, one library product
    split       any base, any p: h = drop(x) aᵀ;  y = s h bᵀ + bias;  y += x wᵀ accumulated in place
    dense       own product over the dense (or once decoded) weight, adapter, c and bias in its epilogue
    fused       one kernel, decoding inside its main loop: few tokens
    skinny      split over k, decoding inside: very few tokens

Every plan returns (y, h, mask, z) as `ops/schema.py` asks: h unless LAZY_H, mask where SAVE_MASK, z for DoRA.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastlora.backends.triton import compose, expand, shrink
from fastlora.backends.triton import dense as dense_kernels
from fastlora.backends.triton import fused as fused_kernels
from fastlora.backends.triton import skinny as skinny_kernels
from fastlora.backends.triton import weight as weights
from fastlora.backends.triton.dropout import dropout_mask
from fastlora.backends.triton.launch import PRECISE_RANK, on_device
from fastlora.backends.triton.merge import merge as merged_weight
from fastlora.backends.triton.quantize import dequantize
from fastlora.backends.triton.shrink import Dropout
from fastlora.math import philox
from fastlora.math.nf4 import PackedWeight
from fastlora.problem import DORA, DROPOUT, LAZY_H, SAVE_MASK, SHARED, TRAIN, Problem

Weight = Tensor | PackedWeight
Outputs = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]


class Given(NamedTuple):
    """What a group of projections has made for one of them."""

    hidden: tuple[Tensor, Tensor | None] | None = None  # h and the dropout bits
    weight: Tensor | None = None  # merged, or decoded, as the plan wants it


class Call(NamedTuple):
    """The arguments of one forward, as every plan takes them."""

    problem: Problem
    x: Tensor
    weight: Weight
    bias: Tensor | None
    a: Tensor
    b: Tensor
    scale: float
    mag: Tensor | None
    norm: Tensor | None
    dropout: Dropout | None
    p: float
    given: Given = Given()

    @property
    def train(self) -> bool:
        """Whether the backward's needs are returned."""
        return bool(self.problem.flags & TRAIN)

    @property
    def returns_h(self) -> bool:
        """Whether h is returned (a lazy backward forms it itself)."""
        return self.problem.flags & (TRAIN | LAZY_H) == TRAIN

    @property
    def save_mask(self) -> bool:
        """Whether the dropout bits are returned."""
        return bool(self.problem.flags & SAVE_MASK)


def splits(problem: Problem) -> int:
    """How many 16-bit terms stand for an fp32 adapter beside a 16-bit x: three (fp32 accuracy) while that is free."""
    precise = problem.adapter_dtype == torch.float32 and problem.dtype.itemsize == 2
    return 3 if precise and problem.r <= PRECISE_RANK else 1


def own_drop(problem: Problem) -> bool:
    """DoRA in PEFT's dropout semantics: the base sees both x and the dropped x."""
    return problem.flags & (DORA | DROPOUT | SHARED) == DORA | DROPOUT


def decoded(weight: Weight, dtype: torch.dtype) -> Tensor:
    """The frozen weight as a dense matrix."""
    return dequantize(weight, dtype) if isinstance(weight, PackedWeight) else weight


def make_dropout(problem: Problem, seed: Tensor | None, bits: Tensor | None, stream: int, p: float) -> Dropout | None:
    """The dropout decision as kernels take it, or None."""
    if not problem.flags & DROPOUT:
        return None
    return Dropout(philox.threshold(p), philox.keep_scale(p), stream, seed, bits)


def _hidden(call: Call) -> tuple[Tensor, Tensor | None]:
    """h = drop(x) aᵀ and, where asked for, the dropout bits."""
    problem = call.problem
    if call.given.hidden is not None:
        return call.given.hidden
    if not problem.r:
        return call.x.new_empty((problem.m, 0), dtype=torch.float32), _bits(call) if call.save_mask else None
    given = call.dropout is not None and call.dropout.bits is not None
    return shrink.shrink(
        call.x, call.a, dropout=call.dropout, save_mask=call.save_mask and not given, splits=splits(problem)
    )


def _bits(call: Call) -> Tensor:
    """The dropout bits alone."""
    problem, dropout = call.problem, call.dropout
    assert dropout is not None and dropout.seed is not None
    return dropout_mask(dropout.seed, dropout.stream, problem.m, problem.k, call.p, call.x.device)


def _linear(x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
    """x wᵀ + bias by the library."""
    return torch.nn.functional.linear(x, w, None if bias is None else bias.to(x.dtype))


def merge(call: Call) -> Outputs:
    """y = x w_effᵀ + bias; in DoRA's training z = x (w + s b a)ᵀ and y = c ∘ z + bias."""
    problem, x = call.problem, call.x
    assert isinstance(call.weight, PackedWeight)
    keep_z = call.train and problem.flags & DORA
    mag, norm = (None, None) if keep_z else (call.mag, call.norm)
    w = call.given.weight
    if w is None:
        w = merged_weight(call.weight, call.a, call.b, call.scale, x.dtype, mag=mag, norm=norm)
    h = None
    if call.returns_h:
        h, _ = _hidden(call)
    if not keep_z:
        return _linear(x, w, call.bias), h, None, None
    z = _linear(x, w, None)
    return compose.columns(z, call.mag, call.norm, call.bias), h, None, z


def split(call: Call) -> Outputs:
    """The adapter's small term first, so that it alone is rounded twice; the base product accumulates onto it."""
    problem, x = call.problem, call.x
    dora = problem.flags & DORA
    w = decoded(call.weight, x.dtype) if call.given.weight is None else call.given.weight
    if own_drop(problem):
        return _split_own_drop(call, w)
    h, mask = _hidden(call)
    bias = None if dora else call.bias
    if problem.r:
        y = expand.expand(h, call.b, call.scale, x.dtype, bias=bias)
        y.addmm_(x, w.t())
    else:
        y = _linear(x, w, bias)
    z = None
    if dora:
        z = y
        y = compose.columns(z, call.mag, call.norm, call.bias, out=None if call.train else z)
    return y, h if call.returns_h else None, mask if call.save_mask else None, z if call.train else None


def _split_own_drop(call: Call, w: Tensor) -> Outputs:
    """Two base products, then one pass: y = u + (c-1)∘v + c∘(s h bᵀ) + bias with u = x wᵀ, v = xd wᵀ."""
    assert call.dropout is not None
    assert call.mag is not None and call.norm is not None
    bits = _bits(call)
    h, _ = _hidden(call._replace(dropout=call.dropout._replace(bits=bits)))
    u = _linear(call.x, w, None)
    v = _linear(compose.mask_rows(call.x, bits), w, None)
    y, z = compose.compose(
        u, v, h, call.b, call.scale, call.mag, call.norm, call.bias, call.dropout.dscale, need_z=call.train
    )
    return y, h if call.returns_h else None, bits if call.save_mask else None, z


def dense(call: Call) -> Outputs:
    """One own product: y = c ∘ (x wᵀ + s h bᵀ) + bias in its epilogue."""
    problem = call.problem
    h, mask = _hidden(call)
    y, z = dense_kernels.linear(
        call.x,
        decoded(call.weight, call.x.dtype) if call.given.weight is None else call.given.weight,
        h if problem.r else None,
        call.b if problem.r else None,
        call.scale,
        mag=call.mag,
        norm=call.norm,
        bias=call.bias,
        need_z=bool(call.train and problem.flags & DORA),
    )
    return y, h if call.returns_h else None, mask if call.save_mask else None, z


def fused(call: Call) -> Outputs:
    """One kernel for everything."""
    assert isinstance(call.weight, PackedWeight)
    y, h, mask, z = fused_kernels.fused(
        call.x,
        call.weight,
        call.a,
        call.b,
        call.scale,
        dropout=call.dropout,
        mag=call.mag,
        norm=call.norm,
        bias=call.bias,
        need_h=call.returns_h,
        save_mask=call.save_mask,
        need_z=bool(call.train and call.problem.flags & DORA),
    )
    return y, h, mask, z


def skinny(call: Call) -> Outputs:
    """h, then the base product split over k with the adapter in the finishing kernel."""
    assert isinstance(call.weight, PackedWeight)
    h, mask = _hidden(call)
    y, z = skinny_kernels.skinny(
        call.x,
        call.weight,
        h if call.problem.r else None,
        call.b if call.problem.r else None,
        call.scale,
        mag=call.mag,
        norm=call.norm,
        bias=call.bias,
        need_z=bool(call.train and call.problem.flags & DORA),
    )
    return y, h if call.returns_h else None, mask if call.save_mask else None, z


PLANS = {"merge": merge, "split": split, "dense": dense, "fused": fused, "skinny": skinny}


def _empty(problem: Problem, x: Tensor) -> Outputs:
    """The outputs for no tokens."""
    y, flags = x.new_empty((0, problem.n)), problem.flags
    return (
        y,
        x.new_empty((0, problem.r), dtype=torch.float32) if flags & (TRAIN | LAZY_H) == TRAIN else None,
        x.new_empty((0, -(-problem.k // 8)), dtype=torch.uint8) if flags & SAVE_MASK else None,
        torch.empty_like(y) if flags & TRAIN and flags & DORA else None,
    )


def run(
    plan: str,
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
) -> Outputs:
    """The op `lora_fwd` by one plan."""
    if not problem.m:
        return _empty(problem, x)
    with on_device(x):
        return PLANS[plan](make_call(problem, x, weight, bias, a, b, scale, mag, norm, seed, stream, p))


def merge_kept(problem: Problem, x: Tensor, *args: Any) -> tuple[Tensor | None, ...]:
    """`lora_fwd` without DoRA by the merge plan, and after its outputs the merged weight, for the backward."""
    with on_device(x):
        call = make_call(problem, x, *args)
        assert isinstance(call.weight, PackedWeight)
        w = merged_weight(call.weight, call.a, call.b, call.scale, x.dtype)
        return *(merge(call._replace(given=Given(weight=w))) if problem.m else _empty(problem, x)), w


def make_call(
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
) -> Call:
    """The op's arguments as the plans take them, the weight checked."""
    if isinstance(weight, PackedWeight):
        weights.check(weight)
    dora = problem.flags & DORA
    return Call(
        problem,
        x,
        weight,
        bias,
        a,
        b,
        scale,
        mag if dora else None,
        norm if dora else None,
        make_dropout(problem, seed, None, stream, p),
        p,
    )
