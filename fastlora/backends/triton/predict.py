"""Predicted seconds of each plan, for choosing among able ones: products, large passes and launches.

X is one pass over an [m, k] tensor, Y over an [m, n] one, W over the decoded weight. The rates come from
`dispatch.cost`; the interpreter is never chosen for its speed.
"""

from __future__ import annotations

from typing import NamedTuple

from fastlora.dispatch import cost
from fastlora.problem import (
    DORA,
    DROPOUT,
    LAZY_H,
    NEED_DA,
    NEED_DB,
    NEED_DMAG,
    NEED_DX,
    SHARED,
    TRAIN,
    Problem,
)

_OWN_GEMM = 1.06  # an own product's time over the library's
_MAIN_LOOP_DECODE = 3.0  # a product's arithmetic with the decoding inside its main loop, over the product alone
_INTERPRETED = 1.0  # seconds: the interpreter is never chosen for its speed


class Passes(NamedTuple):
    """What a plan does beyond its base products."""

    gemms: float  # base products by the library
    own: float  # base products by our kernels over a dense weight
    in_loop: bool  # one base product by our kernels that decodes in its main loop
    x: float  # passes over [m, k]
    y: float  # passes over [m, n]
    packed: float  # reads of the weight as stored
    decoded: float  # passes over the weight in the dtype of x
    launches: int


def _forward(plan: str, problem: Problem) -> Passes:
    flags = problem.flags
    quantized, dora, train = problem.format.kind != "dense", bool(flags & DORA), bool(flags & TRAIN)
    r, drop = bool(problem.r), bool(flags & DROPOUT)
    decode = 1 if quantized else 0
    h = float(r)
    if plan == "merge":
        keep_z = train and dora
        h = float(train and r and not flags & LAZY_H)
        return Passes(1, 0, False, h, 2.0 * keep_z, 1, 1, 2 + int(h) + keep_z)
    if plan == "split":
        if flags & (DORA | DROPOUT | SHARED) == DORA | DROPOUT:
            return Passes(2, 0, False, h + 2, 4, decode, decode, 6 + decode)
        return Passes(1, 0, False, h, 2 * r + 2.0 * dora, decode, decode, 2 * r + 1 + decode + dora)
    if plan == "dense":
        return Passes(0, 1, False, h, float(train and dora), decode, decode, 1 + r + decode)
    if plan == "fused":
        return Passes(0, 0, True, 0.1 * drop, float(train and dora), 1, 0, 1)
    return Passes(0, 0, True, h, 1 + float(train and dora), 1, 0, 2 + r)


def _backward(plan: str, problem: Problem) -> Passes:
    flags = problem.flags
    quantized, dora = problem.format.kind != "dense", bool(flags & DORA)
    need_dx, need_da, r = bool(flags & NEED_DX), bool(flags & NEED_DA), bool(problem.r)
    decode = float(quantized and need_dx)
    low_rank = r * (1 + need_da)  # launches
    x, y = float(need_da and r), 1.0 + bool(flags & LAZY_H) + dora
    if plan == "merge":
        return Passes(float(need_dx), 0, False, x, y, decode, decode, low_rank + 2 * need_dx)
    if plan == "split":
        if flags & (DORA | DROPOUT | SHARED) == DORA | DROPOUT:
            return Passes(2.0 * need_dx, 0, False, x + 4 * need_dx, y + 1, decode, decode, low_rank + 5)
        extra = float(dora and not quantized and need_dx)
        return Passes(
            float(need_dx),
            0,
            False,
            x + 2 * need_dx * r,
            y + extra,
            decode,
            decode,
            low_rank + int(decode) + 2 * need_dx,
        )
    return Passes(0, float(need_dx), False, x, y, decode, decode, low_rank + int(decode) + need_dx)


def seconds(plan: str, problem: Problem) -> float:
    """What a plan of lora_fwd or lora_bwd should take."""
    if problem.device == "cpu":
        return _INTERPRETED
    passes = (_forward if problem.op == "lora_fwd" else _backward)(plan, problem)
    _, m, n, k, r, dtype, _, fmt, _, device, _ = problem
    size, stored = dtype.itemsize, cost.weight_bytes(fmt, n, k, dtype.itemsize)
    moved = passes.x * m * k * size + passes.y * m * n * size + passes.decoded * n * k * size
    total = passes.gemms * cost.gemm_seconds(m, n, k, dtype, device)
    if passes.in_loop:  # the product reads the packed weight itself
        arithmetic = _MAIN_LOOP_DECODE * 2 * m * n * k / cost.matrix_rate(dtype, device, own=True)
        total += max(arithmetic, cost.pass_seconds(stored + m * (n + k) * size, device))
    else:
        total += passes.own * _OWN_GEMM * cost.gemm_seconds(m, n, k, dtype, device, own=True)
        moved += passes.packed * stored
    adapter = 2 * m * r * (n + k) / cost.matrix_rate(dtype, device, own=True)
    return total + adapter + cost.pass_seconds(moved, device) + cost.launches_seconds(passes.launches, device)


def direct(problem: Problem) -> float:
    """An op of one kernel: the roofline."""
    return _INTERPRETED if problem.device == "cpu" else cost.roofline_seconds(problem)


_GROUPED_PADDING = 1.2  # rows of tiles that an adapter's last rows leave empty


def grouped(problem: Problem) -> float:
    """Several adapters in one batch: each pass over the rows, every adapter's factors once, gathered in tiles."""
    if problem.device == "cpu":
        return _INTERPRETED
    if problem.op == "grouped_mask":
        return direct(problem)
    _, m, n, k, r, dtype, adapter_dtype, _, flags, device, groups = problem
    dora, drop = bool(flags & DORA), bool(flags & DROPOUT)
    if problem.op == "grouped_fwd":  # x; y in and out; z; the dropped base product
        x, y, factors, launches = 1.0, 2.0 + dora * bool(flags & TRAIN) + dora * drop, 1.0, 2
        products = n + k
    else:  # dy for g and for db, x for da, dx in and out
        need_dx, need_da = bool(flags & NEED_DX), bool(flags & NEED_DA)
        sums = bool(flags & (NEED_DB | NEED_DMAG))
        x = need_da + 2.0 * need_dx
        y = float(need_dx or need_da) + sums + bool(flags & NEED_DMAG)
        factors, launches = 2.0, (need_dx or need_da) + need_dx + need_da + sums + 1
        products = k * (need_dx + need_da) + n * ((need_dx or need_da) + sums)
    rows = x * m * k + y * m * n
    moved = rows * dtype.itemsize + drop * m * k / 8 + factors * groups * r * (n + k) * adapter_dtype.itemsize
    flops = 2 * _GROUPED_PADDING * m * r * products
    arithmetic = flops / cost.matrix_rate(dtype, device, own=True)
    return max(arithmetic, cost.pass_seconds(moved, device)) + cost.launches_seconds(launches, device)
