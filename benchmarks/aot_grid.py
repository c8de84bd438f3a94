"""Which launches the ahead-of-time compiler sees: every plan and op of the Triton backend, recorded on meta tensors.

The registered kernels are run as the ops would run them, inside `record(TARGETS[...])`, so that the specialisations
and the pinned tiles are the launchers' own.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fastlora import backends
from fastlora.backends.triton.launch import TARGETS, Launch, record
from fastlora.dispatch import registry
from fastlora.dispatch.registry import Kernel
from fastlora.math.group import One
from fastlora.math.nf4 import NESTED_BLOCKSIZE, PackedWeight
from fastlora.math.segments import Group, Segments
from fastlora.problem import (
    BIAS,
    DENSE,
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
    Format,
    Problem,
    base_drops,
)

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
NESTED, PLAIN = Format("nf4", 64, nested=True), Format("nf4", 64)
_GRADIENTS = NEED_DX | NEED_DA | NEED_DB
_P = 0.1
_ACTS = ("silu", "gelu", "gelu_tanh", "relu")  # a gated unit's problem names its activation by its rank
_STREAM = 1  # an adapter's second position; arguments of 1 become constants


def meta(*shape: int, dtype: torch.dtype = FP32) -> Tensor:
    """A tensor without memory."""
    return torch.empty(*shape, dtype=dtype, device="meta")


def packed(fmt: Format, n: int, k: int) -> PackedWeight:
    """A packed weight without memory."""
    blocks = -(-n * k // fmt.blocksize)
    groups = -(-blocks // NESTED_BLOCKSIZE)
    byte = torch.uint8
    return PackedWeight(
        packed=meta(-(-n * k // 2), 1, dtype=byte),
        absmax=meta(blocks, dtype=byte) if fmt.nested else meta(blocks, 4, dtype=byte),
        nested_absmax=meta(groups, 4, dtype=byte) if fmt.nested else None,
        nested_offset=meta(1, 4, dtype=byte) if fmt.nested else None,
        code=meta(16, 4, dtype=byte) if fmt.custom_code else None,
        quant_type=fmt.kind,
        blocksize=fmt.blocksize,
        shape=(n, k),
    )


def arguments(problem: Problem) -> tuple[Any, ...]:
    """Meta tensors for `Kernel.run(problem, *arguments)`, see ops/schema.py."""
    if problem.op.startswith("projections"):
        return projection_arguments(problem)
    if problem.groups:
        return grouped_arguments(problem)
    op, m, n, k, r, dtype, adapter_dtype, fmt, flags, *_ = problem
    weight = meta(n, k, dtype=dtype) if fmt.kind == "dense" else packed(fmt, n, k)
    a, b = meta(r, k, dtype=adapter_dtype), meta(n, r, dtype=adapter_dtype)
    seed = meta(1, dtype=torch.int64)
    if op == "glu_fwd":
        return meta(m, n, dtype=dtype), meta(m, n, dtype=dtype), _ACTS[r]
    if op == "glu_bwd":
        return *(meta(m, n, dtype=dtype) for _ in range(3)), _ACTS[r], bool(flags & NEED_DA)
    if op == "quantize":
        return meta(n, k, dtype=dtype), fmt.kind, fmt.blocksize
    if op == "dequantize":
        return weight, dtype, None
    if op == "dropout_mask":
        return seed, _STREAM, _P
    if op == "dora_norm":
        return weight, a, b, 2.0
    drop, dora = bool(flags & DROPOUT), bool(flags & DORA)
    mag, norm = (meta(n), meta(n)) if dora else (None, None)
    dropout = (seed if drop else None, _STREAM, _P if drop else 0.0)
    if op == "lora_fwd":
        bias = meta(n, dtype=dtype) if flags & BIAS else None
        return (meta(m, k, dtype=dtype), weight, bias, a, b, 2.0, mag, norm, *dropout)
    h = None if flags & LAZY_H else meta(m, r)
    mask = meta(m, -(-k // 8), dtype=torch.uint8) if flags & SAVE_MASK else None
    z = meta(m, n, dtype=dtype) if dora else None
    return (meta(m, n, dtype=dtype), meta(m, k, dtype=dtype), weight, a, b, 2.0, mag, norm, h, mask, z, *dropout)


def projection_arguments(problem: Problem) -> tuple[Any, ...]:
    """The same for linears over one x: the first of n features, the others of a quarter, as in attention."""
    op, m, n, k, _, dtype, _, fmt, flags, _, groups = problem
    plan = "merge" if fmt.kind != "dense" and not flags & DROPOUT else "split"
    ones = []
    for i in range(groups):
        own = Problem(op.replace("projections", "lora"), m, n if i == 0 else max(1, n // 4), *problem[3:10])
        given = arguments(own)
        ones.append(One(plan, own, given[1:] if op == "projections_fwd" else (given[0], *given[2:])))
    x = meta(m, k, dtype=dtype)
    return x, ones, False if op == "projections_fwd" else [None] * groups


def grouped_arguments(problem: Problem) -> tuple[Any, ...]:
    """The same for the grouped ops; ranks differ unless r is a power of two, DoRA's semantics where it drops."""
    op, m, n, k, r, dtype, adapter_dtype, _, flags, _, groups = problem
    ranks = [r if r & (r - 1) == 0 else max(1, r >> e % 3) for e in range(groups)]
    rows = Segments(*(meta(size, dtype=torch.int64) for size in (m, m, groups + 1)))
    dora, drop = bool(flags & DORA), bool(flags & DROPOUT)
    group = Group(
        [meta(rank, k, dtype=adapter_dtype) for rank in ranks],
        [meta(n, rank, dtype=adapter_dtype) for rank in ranks],
        [meta(n) if dora else None for _ in ranks],
        [meta(n) if dora else None for _ in ranks],
        [2.0] * groups,
        [_P * drop] * groups,
        list(range(groups)),
        [flags] * groups,
    )
    mask = meta(m, -(-k // 8), dtype=torch.uint8) if drop else None
    x, y = meta(m, k, dtype=dtype), meta(m, n, dtype=dtype)
    if op == "grouped_mask":
        return rows, group, meta(1, dtype=torch.int64)
    own_drop = base_drops(flags)
    if op == "grouped_fwd":
        bias = meta(n, dtype=dtype) if flags & BIAS else None
        return x, y, bias, group, rows, mask, meta(m, n, dtype=dtype) if own_drop else None
    dropped = meta(m, k, dtype=dtype) if own_drop else None
    return (
        y,
        x,
        group,
        rows,
        meta(m, r),
        mask,
        meta(m, n, dtype=dtype) if dora else None,
        meta(m, k, dtype=dtype),
        dropped,
    )


FULL = "sm_90"  # the target that is compiled for the whole grid


# --- the problems -----------------------------------------------------------------------------------------------------

TRAINING = (8192, 4096, 4096)
WIDE_IN = (8192, 4096, 14336)  # K > N: h is formed in the backward
FEW = ((1, 4096, 4096), (16, 4096, 4096), (64, 4096, 4096))
ODD = (1023, 1003, 999)  # nothing divides anything
FEW_ODD = (50, 20001, 999)
ONE = (1, 1, 1)  # every size becomes a constant
RANKS = (16, 64, 256)


def _linear(
    shape: tuple[int, int, int], r: int, dtype: torch.dtype, fmt: Format, flags: int = 0, adapter: torch.dtype = FP32
) -> Iterator[Problem]:
    """Forward and backward of one adapted linear."""
    m, n, k = shape
    flags |= SAVE_MASK if flags & DROPOUT else 0
    back = flags & ~BIAS | _GRADIENTS | (NEED_DMAG if flags & DORA else 0) | (NEED_DBIAS if flags & BIAS else 0)
    yield Problem("lora_fwd", m, n, k, r, dtype, adapter, fmt, flags | TRAIN, "cuda")
    yield Problem("lora_bwd", m, n, k, r, dtype, adapter, fmt, back, "cuda")


def _over_one_x(
    shape: tuple[int, int, int],
    r: int,
    count: int,
    dtype: torch.dtype,
    fmt: Format,
    flags: int = 0,
    adapter: torch.dtype = FP32,
) -> Iterator[Problem]:
    """Forward and backward of several adapted linears over one x."""
    rest = (*shape, r, dtype, adapter, fmt)
    flags |= SAVE_MASK if flags & DROPOUT else 0
    back = flags | _GRADIENTS | (NEED_DMAG if flags & DORA else 0)
    yield Problem("projections_fwd", *rest, flags | TRAIN, "cuda", count)
    yield Problem("projections_bwd", *rest, back, "cuda", count)


def _groups(full: bool) -> Iterator[Problem]:
    """Linears over one x: every target some ranks and formats, the first target more."""
    yield from _over_one_x(TRAINING, 16, 3, BF16, NESTED)
    yield from _over_one_x(TRAINING, 16, 2, FP32, NESTED)
    yield from _over_one_x(TRAINING, 32, 2, BF16, DENSE)
    yield from _over_one_x(TRAINING, 64, 3, BF16, DENSE, 0, BF16)
    if not full:
        return
    for r, count, dtype, fmt, flags in (
        (16, 4, BF16, PLAIN, 0),
        (8, 3, BF16, NESTED, DORA),
        (16, 3, FP16, NESTED, 0),
        (64, 3, FP32, DENSE, 0),
        (16, 2, BF16, DENSE, DROPOUT),
    ):
        yield from _over_one_x(TRAINING, r, count, dtype, fmt, flags)
    yield from _over_one_x(ODD, 24, 3, BF16, NESTED)
    yield from _over_one_x(ODD, 3, 3, FP32, DENSE)
    yield from _over_one_x(ONE, 1, 2, BF16, NESTED)


def _mixed(
    shape: tuple[int, int, int], r: int, groups: int, dtype: torch.dtype, flags: int = 0, adapter: torch.dtype = FP32
) -> Iterator[Problem]:
    """Forward, backward and mask of a batch that mixes adapters."""
    m, n, k = shape
    rest = (m, n, k, r, dtype, adapter, DENSE)
    yield Problem("grouped_fwd", *rest, flags | TRAIN, "cuda", groups)
    back = flags & ~BIAS | _GRADIENTS | (NEED_DMAG if flags & DORA else 0)
    yield Problem("grouped_bwd", *rest, back, "cuda", groups)
    if flags & DROPOUT:
        yield Problem("grouped_mask", *rest, flags, "cuda", groups)


def _mixes(full: bool) -> Iterator[Problem]:
    """Several adapters: every target some ranks and options, the first target more."""
    own_drop = DORA | DROPOUT
    yield from _mixed(TRAINING, 16, 4, BF16)
    for r in (48, 96):
        yield from _mixed(TRAINING, r, 4, BF16, own_drop | BIAS)
    yield from _mixed(TRAINING, 256, 4, BF16, DROPOUT)
    yield from _mixed(TRAINING, 16, 4, FP32)
    yield Problem("grouped_fwd", *FEW[1], 64, BF16, FP32, DENSE, 0, "cuda", 8)
    if not full:
        return
    for r, dtype, flags in ((64, BF16, DROPOUT), (24, BF16, DORA), (16, FP16, own_drop), (256, FP32, DORA)):
        yield from _mixed(TRAINING, r, 4, dtype, flags)
    yield from _mixed(TRAINING, 24, 64, BF16, DROPOUT, BF16)
    yield from _mixed(ODD, 24, 3, BF16, own_drop | BIAS)
    yield from _mixed(ONE, 1, 1, BF16, own_drop)


def core() -> Iterator[Problem]:
    """What every target compiles: each kernel with each option, the smallest and the largest rank."""
    own_drop, shared = DORA | DROPOUT, DORA | DROPOUT | SHARED
    for r, dtype, fmt, flags in (
        (16, BF16, NESTED, 0),
        (256, BF16, NESTED, 0),
        (16, BF16, NESTED, own_drop),
        (64, BF16, DENSE, DORA | BIAS),
        (256, BF16, DENSE, shared),
        (16, FP32, NESTED, 0),
    ):
        yield from _linear(TRAINING, r, dtype, fmt, flags)
    yield from _linear(WIDE_IN, 16, BF16, NESTED, LAZY_H)
    for shape, r, flags in ((FEW[0], 16, 0), (FEW[1], 16, DORA), (FEW[2], 64, 0)):
        yield Problem("lora_fwd", *shape, r, BF16, FP32, NESTED, flags, "cuda")
    yield from _linear(ODD, 24, BF16, NESTED, DROPOUT | BIAS)
    # What registers hold at once is most with fp32 (three tf32 terms), and where nothing is aligned.
    for shape, r, dtype, fmt, flags in (
        (TRAINING, 256, FP32, NESTED, 0),
        (ODD, 24, FP32, PLAIN, BIAS),
        (ODD, 24, BF16, DENSE, shared),
        # Both products of one walk, beside every sum over rows.
        (TRAINING, 24, BF16, NESTED, DORA | BIAS),
        (TRAINING, 24, FP32, NESTED, BIAS),
        (ODD, 1, FP32, DENSE, DORA),
        (ODD, 100, FP16, DENSE, own_drop | BIAS),
        (FEW[1], 16, BF16, NESTED, BIAS),
    ):
        yield from _linear(shape, r, dtype, fmt, flags)
    for shape, dtype in ((FEW_ODD, BF16), (FEW[2], FP32)):
        yield Problem("lora_fwd", *shape, 24, dtype, FP32, NESTED, DROPOUT | TRAIN | SAVE_MASK, "cuda")
    yield from _ops()
    yield from _mixes(full=False)
    yield from _groups(full=False)


def rest() -> Iterator[Problem]:
    """What the first target compiles besides: every rank with every dtype, every option with some rank."""
    own_drop, shared = DORA | DROPOUT, DORA | DROPOUT | SHARED
    for r, dtype in itertools.product(RANKS, (BF16, FP16, FP32)):
        yield from _linear(TRAINING, r, dtype, NESTED)
    for r in RANKS:
        yield from _linear(TRAINING, r, BF16, DENSE, BIAS)
    for r, dtype, fmt, flags in (
        (16, BF16, NESTED, DROPOUT),
        (16, BF16, NESTED, DORA),
        (64, BF16, NESTED, DROPOUT),
        (64, BF16, DENSE, own_drop | BIAS),
        (256, BF16, NESTED, DORA),
        (16, FP16, NESTED, own_drop),
        (16, FP32, NESTED, own_drop),
        (16, FP32, DENSE, shared),
    ):
        yield from _linear(TRAINING, r, dtype, fmt, flags)
    yield from _linear(TRAINING, 16, BF16, PLAIN, 0, BF16)
    yield from _linear(WIDE_IN, 256, BF16, NESTED, LAZY_H)
    for shape, r, dtype, flags in (
        *((shape, r, BF16, 0) for shape, r in itertools.product(FEW, (16, 64))),
        (FEW[0], 16, BF16, DORA),
        (FEW[1], 16, FP16, 0),
        (FEW[1], 16, FP32, 0),
        (FEW[2], 256, BF16, DORA),
    ):
        yield Problem("lora_fwd", *shape, r, dtype, FP32, NESTED, flags, "cuda")
    yield from _linear(FEW[1], 16, BF16, NESTED, shared)
    yield from _linear(ODD, 24, BF16, DENSE, DORA | DROPOUT | SHARED)
    yield from _linear(ODD, 24, FP32, PLAIN, BIAS)
    for fmt in (NESTED, DENSE):
        yield from _linear(ONE, 1, BF16, fmt, shared | BIAS)
    yield from _more_ops()
    yield from _mixes(full=True)
    yield from _groups(full=True)


def _ops() -> Iterator[Problem]:
    _, n, k = TRAINING
    for dtype, fmt in ((BF16, NESTED), (FP32, PLAIN)):
        yield Problem("dequantize", 0, n, k, 0, dtype, dtype, fmt, 0, "cuda")
    yield Problem("quantize", 0, n, k, 0, BF16, BF16, PLAIN, 0, "cuda")
    yield Problem("dropout_mask", TRAINING[0], 0, k, 0, FP32, FP32, DENSE, 0, "cuda")
    for act, dtype in ((0, BF16), (1, BF16), (0, FP32)):
        yield Problem("glu_fwd", TRAINING[0], WIDE_IN[2], 0, act, dtype, dtype, DENSE, 0, "cuda")
        yield Problem("glu_bwd", TRAINING[0], WIDE_IN[2], 0, act, dtype, dtype, DENSE, NEED_DA, "cuda")
    for r, fmt in ((16, NESTED), (256, NESTED), (16, DENSE)):
        yield Problem("dora_norm", 0, n, k, r, BF16, FP32, fmt, 0, "cuda")


def _more_ops() -> Iterator[Problem]:
    _, n, k = TRAINING
    custom, fp4 = Format("nf4", 64, custom_code=True), Format("fp4", 64)
    for dtype, fmt in ((FP16, NESTED), (BF16, PLAIN), (BF16, custom)):
        yield Problem("dequantize", 0, n, k, 0, dtype, dtype, fmt, 0, "cuda")
    yield Problem("dequantize", 0, ODD[1], ODD[2], 0, BF16, BF16, NESTED, 0, "cuda")
    for dtype, fmt in ((FP16, PLAIN), (FP32, PLAIN), (BF16, fp4)):
        yield Problem("quantize", 0, n, k, 0, dtype, dtype, fmt, 0, "cuda")
    yield Problem("dropout_mask", ODD[0], 0, ODD[2], 0, FP32, FP32, DENSE, 0, "cuda")
    for r, dtype, fmt in ((64, BF16, NESTED), (256, FP32, DENSE), (16, FP32, PLAIN)):
        yield Problem("dora_norm", 0, n, k, r, dtype, FP32, fmt, 0, "cuda")
    for act, dtype in ((2, BF16), (3, BF16), (2, FP16), (1, FP32)):
        yield Problem("glu_fwd", ODD[0], ODD[1], 0, act, dtype, dtype, DENSE, 0, "cuda")
        yield Problem("glu_bwd", ODD[0], ODD[1], 0, act, dtype, dtype, DENSE, 0, "cuda")
    yield Problem("dora_norm", 0, ODD[1], ODD[2], 24, BF16, FP32, NESTED, 0, "cuda")


def _able(kernel: Kernel, problem: Problem) -> bool:
    """Whether the plan takes the problem; that there is no GPU here does not count."""
    limits = dataclasses.replace(kernel.limits, missing=lambda: "")
    return not registry.why_not(dataclasses.replace(kernel, limits=limits), problem)


def launches(targets: list[str]) -> Iterator[tuple[str, str, Launch]]:
    """(target, "plan: problem", launch) of every plan that takes a problem of the grid, for each target."""
    backends.load()
    for name in targets:
        for problem in (*core(), *rest()) if name == FULL else core():
            for kernel in registry.kernels(problem.op):
                if kernel.backend != "triton" or not _able(kernel, problem):
                    continue
                with record(TARGETS[name]) as found:
                    kernel.run(problem, *arguments(problem))
                for launch in found:
                    yield name, f"{kernel.plan}: {problem}", launch
