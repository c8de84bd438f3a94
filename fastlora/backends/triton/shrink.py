"""The down-projection: h = drop(x) aᵀ from one pass over x, dropout drawn inside; and what the low-rank kernels share.

A low-rank product multiplies a large tensor, exact in its 16-bit dtype, with a small one in fp32. The small operand is
rounded once, or split into terms that add up to it (fp32 accuracy on 16-bit tensor cores). Beside fp16 data the small
operand becomes tf32, as fine as fp16 and with the range of fp32: gradients neither underflow nor overflow.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastlora.backends.triton.launch import (
    PRECISE_RANK,
    Target,
    Tile,
    cdiv,
    entry,
    launch,
    next_power_of_2,
    target,
)
from fastlora.backends.triton.primitives import cast, dot, draw_bits, offsets
from fastlora.backends.triton.weight import wide as is_wide


class Dropout(NamedTuple):
    """A dropout decision: keep iff a lane drawn from (seed, stream) is at least `threshold`, or iff its bit is set.

    dscale: what kept values are multiplied by; seed: int64 [1]; bits: uint8 [m, ceil(k/8)], read instead of drawn.
    """

    threshold: int
    dscale: float
    stream: int
    seed: Tensor | None
    bits: Tensor | None


# --- device functions -------------------------------------------------------------------------------------------------


@triton.jit
def round_tf32(v):
    """fp32 v to the nearest tf32 value: the tensor cores alone would cut the low bits off. NaN stays NaN."""
    bits = v.to(tl.uint32, bitcast=True)
    return tl.where(v == v, ((bits + 0x1000) & 0xFFFFE000).to(tl.float32, bitcast=True), v)


@triton.jit
def upper_half(v):
    """fp32 v cut off to bf16."""
    return (v.to(tl.uint32, bitcast=True) >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)


@triton.jit
def terms(v, dtype: tl.constexpr, TERMS: tl.constexpr, PRECISION: tl.constexpr):
    """v [j,l] as the right factor of a product with a tensor of `dtype`: [j, TERMS l].

    Several columns for every column of v add up to it, so that one product, which reads its large operand once, makes
    them all: 4 of bf16 (high, middle, low and zero), or 2 of tf32. TERMS 1: rounded once, or kept in fp32.
    """
    if v.dtype == dtype and TERMS == 1:
        out = v
    elif dtype == tl.bfloat16:
        out = cast(v.to(tl.float32), tl.bfloat16)
        if TERMS == 4:
            # Eight bits of the 24 each, cut off rather than rounded: exact, and no conversion instructions.
            first = v.to(tl.float32)
            second = first - upper_half(first).to(tl.float32)
            third = second - upper_half(second).to(tl.float32)
            four = tl.join(tl.join(first, second), tl.join(third, tl.zeros_like(third)))
            # Cut after the reshape: Triton 3.9.0 fails on some reshapes that are themselves an operand of a product.
            out = upper_half(tl.reshape(four, v.shape[0], 4 * v.shape[1]))
    elif PRECISION == "tf32":
        out = v.to(tl.float32)
        if TERMS == 2:
            out = tl.reshape(tl.join(out, out - round_tf32(out)), v.shape[0], 2 * v.shape[1])
        out = round_tf32(out)
    else:
        out = v.to(tl.float32)
    return out


@triton.jit
def product(x, v, acc, PRECISION: tl.constexpr):
    """acc + x v in fp32; x [i,j] as it was loaded, v [j,l] of `terms`."""
    return dot(x.to(v.dtype), v, acc, PRECISION)


@triton.jit
def fold(acc, TERMS: tl.constexpr):
    """The sum of each column's terms: [i, TERMS l] -> [i, l]."""
    if TERMS != 1:
        acc = tl.sum(tl.reshape(acc, acc.shape[0], acc.shape[1] // TERMS, TERMS), axis=2)
    return acc


@triton.jit
def keep(t, bits, ROWS: tl.constexpr, COLS: tl.constexpr):
    """mask ∘ t; bits uint8 [ROWS, COLS/8]. What is dropped is 0, whatever it was.

    A test of a 32-bit word is one instruction, of a byte several: `expand_bits` costs twice as much here.
    """
    lane = 1 << tl.arange(0, 8)
    kept = (bits.to(tl.int32)[:, :, None] & lane[None, None, :]) != 0
    return tl.where(kept.reshape(ROWS, COLS), t, 0.0).to(t.dtype)


@triton.jit
def load_bits(bits_ptr, rows, groups, m, bytes_per_row, WIDE: tl.constexpr):
    """uint8 [rows, groups] of a mask, 0 outside."""
    inside = (rows < m)[:, None] & (groups < bytes_per_row)[None, :]
    # [rows, groups]
    return tl.load(bits_ptr + offsets(rows, bytes_per_row, groups, WIDE), mask=inside, other=0)


@triton.jit
def load_factor(v_ptr, cols, ranks, n, r, TRANSPOSED: tl.constexpr, WIDE: tl.constexpr):
    """[cols, ranks] of a factor stored [n,r], or [r,n] where TRANSPOSED; 0 outside."""
    if TRANSPOSED:
        # [ranks, cols]
        inside = (ranks < r)[:, None] & (cols < n)[None, :]
        return tl.trans(tl.load(v_ptr + offsets(ranks, n, cols, WIDE), mask=inside, other=0.0))
    # [cols, ranks]
    inside = (cols < n)[:, None] & (ranks < r)[None, :]
    return tl.load(v_ptr + offsets(cols, r, ranks, WIDE), mask=inside, other=0.0)


@triton.jit
def ratio(mag_ptr, norm_ptr, cols, n):
    """c = mag / norm of the columns, fp32, rounded as IEEE; 0 outside."""
    # [cols]
    mag = tl.load(mag_ptr + cols, mask=cols < n, other=0.0).to(tl.float32)
    return tl.div_rn(mag, tl.load(norm_ptr + cols, mask=cols < n, other=1.0))


@triton.jit
def stacked(rows, ranks, m, r, PART: tl.constexpr, WIDE: tl.constexpr):
    """Offsets in a low-rank matrix [m,r]; with PART in members of so many ranks, [m,PART] one after the other."""
    if PART == 0:
        return offsets(rows, r, ranks, WIDE)
    else:
        member, rank = ranks // PART, ranks % PART
        if WIDE:
            return rows.to(tl.int64)[:, None] * PART + (member.to(tl.int64) * m * PART + rank)[None, :]
        else:
            return rows[:, None] * PART + (member * m * PART + rank)[None, :]


# --- sums over planes -------------------------------------------------------------------------------------------------

_GROUP = tl.constexpr(8)  # planes whose loads are in flight together
_STACKS = 4  # what one launch sums


@triton.jit
def _sum_planes(pid, planes_ptr, out_ptr, count, planes, factor, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    where = pid * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros([BLOCK], tl.float32)
    for first in range(0, planes, _GROUP):
        plane = first + tl.arange(0, _GROUP)
        inside = (plane < planes)[:, None] & (where < count)[None, :]
        # [_GROUP, BLOCK]
        acc += tl.sum(tl.load(planes_ptr + offsets(plane, count, where, WIDE), mask=inside, other=0.0), axis=0)
    tl.store(out_ptr + where, acc * factor, mask=where < count)


@entry
def _finish_kernel(
    planes0,
    out0,
    count0,
    number0,
    factor0,
    planes1,
    out1,
    count1,
    number1,
    factor1,
    planes2,
    out2,
    count2,
    number2,
    factor2,
    planes3,
    out3,
    count3,
    number3,
    factor3,
    BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
):
    """out_i = factor_i Σ_p planes_i[p], in a fixed order, for up to four independent stacks of planes."""
    pid = tl.program_id(0)
    blocks = tl.cdiv(count0, BLOCK)
    if pid < blocks:
        _sum_planes(pid, planes0, out0, count0, number0, factor0, BLOCK, WIDE)
    if planes1 is not None:
        pid -= blocks
        blocks = tl.cdiv(count1, BLOCK)
        if (pid >= 0) & (pid < blocks):
            _sum_planes(pid, planes1, out1, count1, number1, factor1, BLOCK, WIDE)
    if planes2 is not None:
        pid -= blocks
        blocks = tl.cdiv(count2, BLOCK)
        if (pid >= 0) & (pid < blocks):
            _sum_planes(pid, planes2, out2, count2, number2, factor2, BLOCK, WIDE)
    if planes3 is not None:
        pid -= blocks
        blocks = tl.cdiv(count3, BLOCK)
        if (pid >= 0) & (pid < blocks):
            _sum_planes(pid, planes3, out3, count3, number3, factor3, BLOCK, WIDE)


class Planes(NamedTuple):
    """Partial sums on their way into `out`: planes fp32 [p, *out.shape], or `out` itself where there is one plane."""

    planes: Tensor
    out: Tensor
    factor: float

    @property
    def number(self) -> int:
        """How many planes there are."""
        return 1 if self.planes is self.out else self.planes.shape[0]

    @property
    def early_factor(self) -> float:
        """What the kernel that fills the planes multiplies by: the factor, unless the sum over planes does."""
        return self.factor if self.number == 1 else 1.0


def make_planes(
    like: Tensor, shape: tuple[int, ...], number: int, factor: float = 1.0, out: Tensor | None = None
) -> Planes:
    """Room for `number` partial sums of an fp32 result on like's device, which goes into `out` if given."""
    out = torch.empty(shape, dtype=torch.float32, device=like.device) if out is None else out
    planes = out if number == 1 else torch.empty((number, *shape), dtype=torch.float32, device=like.device)
    return Planes(planes, out, factor)


def tile_finish(target: Target) -> Tile:
    """Elements of one program (BLOCK_N): one 128-bit load a thread and plane."""
    return Tile(BLOCK_N=256 if target.kind == "interpreter" else 4 * 4 * target.warp, num_warps=4, num_stages=1)


def finish(*stacks: Planes | None, wide: bool | None = None) -> None:
    """Sum every stack that has several planes, all in one launch (none: no launch). At most four stacks."""
    todo = [stack for stack in stacks if stack is not None and stack.number > 1]
    if not todo:
        return
    tile = tile_finish(target(todo[0].out.device))
    args: list[Tensor | int | float | None] = []
    for stack in todo:
        args += [stack.planes, stack.out, stack.out.numel(), stack.number, stack.factor]
    args += [None] * (5 * _STACKS - len(args))
    launch(
        _finish_kernel,
        (sum(cdiv(stack.out.numel(), tile.BLOCK_N) for stack in todo),),
        *args,
        BLOCK=tile.BLOCK_N,
        WIDE=is_wide(*(stack.planes for stack in todo)) if wide is None else wide,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )


def finish_all(stacks: Sequence[Planes]) -> None:
    """`finish` of any number of stacks, in as few launches as it takes."""
    todo = [stack for stack in stacks if stack.number > 1]
    for at in range(0, len(todo), _STACKS):
        finish(*todo[at : at + _STACKS])


def combine(planes: Tensor, factor: float = 1.0) -> Tensor:
    """factor · Σ over the first axis of fp32 [p, …], in a fixed order."""
    stack = Planes(planes, torch.empty(planes.shape[1:], dtype=torch.float32, device=planes.device), factor)
    if planes.shape[0] == 1:
        return planes[0] * factor
    finish(stack)
    return stack.out


# --- rows: one pass over t, a row block a program ---------------------------------------------------------------------


@entry
def _rows_kernel(
    t_ptr,
    v_ptr,
    out_ptr,
    bits_ptr,
    seed_ptr,
    saved_ptr,
    mag_ptr,
    norm_ptr,
    m,
    n,
    r,
    planes,
    plane_n,
    stream,
    threshold,
    factor,
    TRANSPOSED: tl.constexpr,
    R: tl.constexpr,
    PART: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TERMS: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
    WIDE: tl.constexpr,
):
    """out[p,i,l] = factor Σ_j mask[i,j] t[i,j] c[j] v[j,l] over plane p's columns j; v is stored [n,r], or [r,n].

    mask: all ones, read from bits, or drawn from seed (and saved); c = mag / norm or 1. out: see `stacked`.
    """
    pid = tl.program_id(0)
    block, plane = pid // planes, pid % planes
    rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
    ranks = tl.arange(0, R)
    bytes_per_row = (n + 7) // 8
    acc = tl.zeros([BLOCK_M, TERMS * R], tl.float32)
    for start in tl.range(plane * plane_n, tl.minimum(n, (plane + 1) * plane_n), BLOCK_K, num_stages=STAGES):
        cols = start + tl.arange(0, BLOCK_K)
        # [BLOCK_M, BLOCK_K]
        t = tl.load(t_ptr + offsets(rows, n, cols, WIDE), mask=(rows < m)[:, None] & (cols < n)[None, :], other=0.0)
        v = load_factor(v_ptr, cols, ranks, n, r, TRANSPOSED, WIDE)
        if mag_ptr is not None:
            v = v.to(tl.float32) * ratio(mag_ptr, norm_ptr, cols, n)[:, None]
        groups = start // 8 + tl.arange(0, BLOCK_K // 8)
        if bits_ptr is not None:
            t = keep(t, load_bits(bits_ptr, rows, groups, m, bytes_per_row, WIDE), BLOCK_M, BLOCK_K)
        if seed_ptr is not None:
            bits = draw_bits(seed_ptr, stream, threshold, rows, groups, n)
            if saved_ptr is not None:
                where = saved_ptr + offsets(rows, bytes_per_row, groups, WIDE)
                tl.store(where, bits, mask=(rows < m)[:, None] & (groups < bytes_per_row)[None, :])
            t = keep(t, bits, BLOCK_M, BLOCK_K)
        acc = product(t, terms(v, t.dtype, TERMS, PRECISION), acc, PRECISION)
    out_ptr += (plane.to(tl.int64) if WIDE else plane) * m * r
    inside = (rows < m)[:, None] & (ranks < r)[None, :]
    tl.store(out_ptr + stacked(rows, ranks, m, r, PART, WIDE), fold(acc, TERMS) * factor, mask=inside)


def rank_block(r: int) -> int:
    """The padded rank: a power of two, at least what a matrix instruction takes."""
    return max(16, next_power_of_2(r))


def precision(target: Target, dtype: torch.dtype) -> str:
    """How fp32 operands are multiplied: to fp32 accuracy, or, where they hold fp16 values or `terms`, as tf32."""
    if dtype == torch.float16 and target.kind != "hip":
        return "tf32"
    return "tf32x3" if target.kind == "cuda" else "ieee"


def term_count(target: Target, dtype: torch.dtype, splits: int) -> int:
    """How many columns stand for one of the small factor: three bf16 terms and a zero, two tf32 ones, or one."""
    if splits == 1 or dtype == torch.float32 or (dtype == torch.float16 and precision(target, dtype) != "tf32"):
        return 1
    return 4 if dtype == torch.bfloat16 else 2


def stages(target: Target, bytes_per_stage: int, fixed: int, most: int = 4) -> int:
    """The deepest pipeline whose buffers fit beside `fixed` bytes of shared memory."""
    if target.kind != "cuda":
        return 2
    return max(2, min(most, (target.shared_memory - fixed) // bytes_per_stage))


# Row blocks, largest first: the first that fills the device wins. A large rank wants tall blocks: each reads all of v.
_ROW_BLOCKS = (128, 64, 32, 16)


def tile_rows(target: Target, m: int, r: int, dtype: torch.dtype) -> Tile:
    """BLOCK_M rows by BLOCK_K columns at a time."""
    if target.kind == "interpreter":
        return Tile(BLOCK_M=16, BLOCK_K=32, num_warps=4, num_stages=1)
    rank, size = rank_block(r), dtype.itemsize
    fill = 0.75 if rank <= 32 else 0.375
    block_m = next((rows for rows in _ROW_BLOCKS if cdiv(m, rows) >= fill * target.sms), 16)
    block_m = max(block_m, 32 if target.kind == "hip" else 16)
    block_k = {16: 128, 32: 128, 64: 64, 128: 64, 256: 32}[rank]
    if size == 4 or target.kind == "hip":
        block_k = max(32, block_k // (4 if rank == 32 and target.kind == "cuda" and target.arch >= 100 else 2))
    if rank == 256 or (
        target.kind == "cuda" and ((target.arch < 90 and rank > 64) or (target.arch >= 100 and rank > 32))
    ):
        block_m = min(block_m, 64)  # taller tiles spill (3.9.0)
    if rank == 256 and size == 4 and target.kind == "cuda":
        block_m = min(block_m, 32)  # three tf32 terms of each operand
    if block_m == 16 and target.kind == "cuda" and dtype != torch.bfloat16:
        # v's terms are most of what a program of few rows holds.
        block_k = block_k // 2 if rank <= 64 else min(block_k, 32)
    few_wide = block_m == 16 and rank == 128 and target.kind == "cuda" and target.arch >= 100
    warps = 8 if block_m >= 64 or (rank == 256 and size == 4) or few_wide else 4  # else they spill (3.6.0)
    per_stage = block_k * (block_m * size + rank * 4)
    fixed = block_k * (block_m * size + 3 * rank * 2)
    return Tile(BLOCK_M=block_m, BLOCK_K=block_k, num_warps=warps, num_stages=stages(target, per_stage, fixed))


def held_rank(device: Target, r: int, dtype: torch.dtype, splits: int) -> int:
    """The rank whose tiles hold as many columns: terms that stand for a rank above `PRECISE_RANK` count as ranks."""
    return r if r <= PRECISE_RANK else rank_block(r) * term_count(device, dtype, splits)


def planes_rows(target: Target, m: int, n: int, tile: Tile) -> int:
    """Over how many planes the columns are split: several only where the row blocks leave the device idle."""
    blocks = max(1, cdiv(m, tile.BLOCK_M))
    if 3 * blocks >= target.sms:
        return 1
    return max(1, min(target.sms // blocks, cdiv(n, 2 * tile.BLOCK_K), 32))


def rows_product(
    t: Tensor,
    v: Tensor,
    *,
    transposed: bool,
    factor: float = 1.0,
    dropout: Dropout | None = None,
    saved: Tensor | None = None,
    mag: Tensor | None = None,
    norm: Tensor | None = None,
    splits: int = 1,
    part: int | None = None,
    out: Tensor | None = None,
    wide: bool | None = None,
) -> Tensor:
    """factor · (mask∘t) (c∘v): fp32 [m, r] from one read of t [m, n]; v [n, r], or [r, n] where transposed.

    `part`: v holds members of so many ranks, and the result is [r / part, m, part], a matrix for each.
    """
    m, n = t.shape
    r = v.shape[0 if transposed else 1]
    device = target(t.device)
    tile = tile_rows(device, m, held_rank(device, r, t.dtype, splits), t.dtype)
    number = planes_rows(device, m, n, tile)
    plane_n = cdiv(cdiv(n, tile.BLOCK_K), number) * tile.BLOCK_K
    number = cdiv(n, plane_n)
    shape = (m, r) if part is None else (r // part, m, part)
    stack = make_planes(t, shape, number, factor, out)
    if not m:
        return stack.out
    bits = None if dropout is None else dropout.bits
    seed = None if dropout is None or bits is not None else dropout.seed
    wide = is_wide(t, v, stack.planes) if wide is None else wide
    launch(
        _rows_kernel,
        (cdiv(m, tile.BLOCK_M) * number,),
        t,
        v,
        stack.planes,
        bits,
        seed,
        saved,
        mag,
        norm,
        m,
        n,
        r,
        number,
        plane_n,
        0 if dropout is None else dropout.stream,
        0 if dropout is None else dropout.threshold,
        stack.early_factor,
        TRANSPOSED=transposed,
        R=rank_block(r),
        PART=part or 0,
        BLOCK_M=tile.BLOCK_M,
        BLOCK_K=tile.BLOCK_K,
        TERMS=term_count(device, t.dtype, splits),
        PRECISION=precision(device, t.dtype),
        STAGES=tile.num_stages,
        WIDE=wide,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    finish(stack, wide=wide)
    return stack.out


def shrink(
    x: Tensor,
    a: Tensor,
    *,
    dropout: Dropout | None = None,
    save_mask: bool = False,
    splits: int = 1,
    part: int | None = None,
    wide: bool | None = None,
) -> tuple[Tensor, Tensor | None]:
    """h = dscale (mask∘x) aᵀ, x read once.

    Args:
        x: [m, k] contiguous; a: [r, k] contiguous, any float dtype.
        dropout: its bits are read, or drawn inside from its seed; None keeps everything.
        save_mask: also return the bits.
        splits: 16-bit terms that stand for an element of an fp32 a: 1, or 3 (fp32 accuracy).
        part: a holds members of so many ranks, one after the other.
        wide: force 64-bit offsets on or off.

    Returns:
        h fp32 [m, r], or [r / part, m, part]; the bits uint8 [m, ceil(k/8)] or None.
    """
    saved = None
    if save_mask and dropout is not None and dropout.bits is None:
        saved = torch.empty((x.shape[0], cdiv(x.shape[1], 8)), dtype=torch.uint8, device=x.device)
    factor = 1.0 if dropout is None else dropout.dscale
    options = {"dropout": dropout, "saved": saved, "splits": splits, "part": part, "wide": wide}
    h = rows_product(x, a, transposed=True, factor=factor, **options)  # type: ignore[arg-type]
    if save_mask and dropout is not None and dropout.bits is not None:
        saved = dropout.bits
    return h, saved
