"""The backward's projections: everything that sums a large tensor over its rows, and a low-rank product of those rows.

One kernel walks down a row range of its column block and keeps the gradient's slab in registers: g, db, dmag, dbias and
the scaled dy from one read of dy (here), da and h from one read of x (`grad_a`). Sums over rows and over column blocks
go to a few fp32 planes, added in a fixed order by one more launch.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from fastlora.backends.triton.launch import Target, Tile, cdiv, entry, launch, target
from fastlora.backends.triton.primitives import cast, offsets
from fastlora.backends.triton.shrink import (
    Planes,
    finish,
    fold,
    held_rank,
    keep,
    load_bits,
    load_factor,
    make_planes,
    precision,
    product,
    rank_block,
    ratio,
    rows_product,
    stacked,
    stages,
    term_count,
    terms,
)
from fastlora.backends.triton.weight import wide as is_wide


class Projected(NamedTuple):
    """What one pass over dy gives; None where not asked for."""

    g: Tensor | None
    db: Tensor | None
    dmag: Tensor | None
    dbias: Tensor | None
    d: Tensor | None


@entry
def _walk_kernel(
    t_ptr,
    v_ptr,
    u_ptr,
    bits_ptr,
    mag_ptr,
    norm_ptr,
    z_ptr,
    left_ptr,
    right_ptr,
    dmag_ptr,
    dbias_ptr,
    scaled_ptr,
    m,
    n,
    r,
    plane_m,
    left_factor,
    right_factor,
    TRANSPOSED: tl.constexpr,
    MINUS_ONE: tl.constexpr,
    R: tl.constexpr,
    PART: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TERMS: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Over the rows i of plane p and the columns j of block q, with c = mag / norm or 1 and t masked by bits:

    left[q,i,l]  = left_factor Σ_j t[i,j] c[j] v[j,l]      right[p,j,l] = right_factor c[j] Σ_i t[i,j] u[i,l]
    dmag[p,j]    = Σ_i t[i,j] z[i,j] / norm[j]              dbias[p,j]   = Σ_i t[i,j]
    scaled[i,j]  = round(c[j] t[i,j]), or round((c[j] - 1) t[i,j]) if MINUS_ONE

    TRANSPOSED: v is stored [r,n] and right [p,r,n]; otherwise [n,r] and [p,n,r]. u: see `shrink.stacked`.
    """
    pid = tl.program_id(0)
    blocks = tl.cdiv(n, BLOCK_N)
    plane, block = pid // blocks, pid % blocks
    cols = block * BLOCK_N + tl.arange(0, BLOCK_N)
    ranks = tl.arange(0, R)
    if mag_ptr is not None:
        c = ratio(mag_ptr, norm_ptr, cols, n)
    if left_ptr is not None:
        v = load_factor(v_ptr, cols, ranks, n, r, TRANSPOSED, WIDE)
        if mag_ptr is not None:
            v = v.to(tl.float32) * c[:, None]
        v = terms(v, t_ptr.dtype.element_ty, TERMS, PRECISION)
    slab = tl.zeros([BLOCK_N, TERMS * R], tl.float32)
    # Summed over rows once, after the loop: no exchange between threads inside it.
    dmag = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    dbias = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in tl.range(plane * plane_m, tl.minimum(m, (plane + 1) * plane_m), BLOCK_M, num_stages=STAGES):
        rows = start + tl.arange(0, BLOCK_M)
        inside = (rows < m)[:, None] & (cols < n)[None, :]
        # [BLOCK_M, BLOCK_N]
        t = tl.load(t_ptr + offsets(rows, n, cols, WIDE), mask=inside, other=0.0)
        if bits_ptr is not None:
            groups = block * (BLOCK_N // 8) + tl.arange(0, BLOCK_N // 8)
            t = keep(t, load_bits(bits_ptr, rows, groups, m, (n + 7) // 8, WIDE), BLOCK_M, BLOCK_N)
        low_rank = (rows < m)[:, None] & (ranks < r)[None, :]
        if left_ptr is not None:
            left = product(t, v, tl.zeros([BLOCK_M, TERMS * R], tl.float32), PRECISION)
            left_row = block.to(tl.int64) * m + rows if WIDE else block * m + rows
            tl.store(left_ptr + offsets(left_row, r, ranks, WIDE), fold(left, TERMS) * left_factor, mask=low_rank)
        if right_ptr is not None:
            # [BLOCK_M, R]
            u = tl.load(u_ptr + stacked(rows, ranks, m, r, PART, WIDE), mask=low_rank, other=0.0)
            slab = product(tl.trans(t), terms(u, t.dtype, TERMS, PRECISION), slab, PRECISION)
        if dmag_ptr is not None:
            # [BLOCK_M, BLOCK_N]
            z = tl.load(z_ptr + offsets(rows, n, cols, WIDE), mask=inside, other=0.0)
            dmag += t.to(tl.float32) * z.to(tl.float32)
        if dbias_ptr is not None:
            dbias += t.to(tl.float32)
        if scaled_ptr is not None:
            factor = c - 1.0 if MINUS_ONE else c
            value = cast(t.to(tl.float32) * factor[None, :], t.dtype)
            tl.store(scaled_ptr + offsets(rows, n, cols, WIDE), value, mask=inside)
    column = plane.to(tl.int64) * n + cols if WIDE else plane * n + cols
    if right_ptr is not None:
        right = fold(slab, TERMS) * right_factor
        if mag_ptr is not None:
            right = right * c[:, None]
        if TRANSPOSED:
            row = plane.to(tl.int64) * r + ranks if WIDE else plane * r + ranks
            stored = (ranks < r)[:, None] & (cols < n)[None, :]
            tl.store(right_ptr + offsets(row, n, cols, WIDE), tl.trans(right), mask=stored)
        else:
            stored = (cols < n)[:, None] & (ranks < r)[None, :]
            tl.store(right_ptr + offsets(column, r, ranks, WIDE), right, mask=stored)
    if dmag_ptr is not None:
        # [BLOCK_N]
        norm = tl.load(norm_ptr + cols, mask=cols < n, other=1.0)
        tl.store(dmag_ptr + column, tl.div_rn(tl.sum(dmag, axis=0), norm), mask=cols < n)
    if dbias_ptr is not None:
        tl.store(dbias_ptr + column, tl.sum(dbias, axis=0), mask=cols < n)


_CHAIN = 4096  # rows summed into one accumulator at most: longer chains lose accuracy


def tile_walk(target: Target, r: int, dtype: torch.dtype, *, left: bool, elementwise: int) -> Tile:
    """BLOCK_N columns a program, BLOCK_M rows at a time.

    left: also t v, whose planes want wide column blocks; elementwise: how many of dmag, dbias and scaled are made.
    """
    if target.kind == "interpreter":
        return Tile(BLOCK_M=16, BLOCK_N=32, num_warps=4, num_stages=1)
    rank, size = rank_block(r), dtype.itemsize
    block_n = 256 if left and rank == 16 and dtype == torch.bfloat16 and not elementwise else 128
    old = target.kind == "cuda" and target.arch < 90
    block_m = 64 if rank <= 64 and size == 2 and elementwise < (1 if old else 2) else 32
    if target.kind == "hip":
        block_m = 32
        block_n = 64 if rank == 256 else block_n  # the slab is in registers there
    elif old or size == 4:
        block_m, block_n = _tile_walk_crowded(rank, size, block_m, block_n, left, elementwise)
    if rank == 256 and size == 4 and target.kind == "cuda":  # and three tf32 terms of each operand; or tensor memory
        block_m, block_n = (32, 32) if target.arch >= 100 else (16, 64)
    tensors = 2 if elementwise else 1
    per_stage = block_m * (block_n * size * tensors + rank * 4)
    fixed = block_m * (block_n * size + 3 * rank * 2) + (block_n * rank * 6 if left else 0)
    # Blackwell accumulates outside the registers: four warps hold a tile, eight spill when it is masked (3.9.0).
    warps = (
        4 if target.kind == "cuda" and target.arch >= 100 and rank <= 64 and block_n == 128 and not elementwise else 8
    )
    return Tile(block_m, block_n, 0, num_warps=warps, num_stages=stages(target, per_stage, fixed, most=3))


def _tile_walk_crowded(
    rank: int, size: int, block_m: int, block_n: int, left: bool, elementwise: int
) -> tuple[int, int]:
    """(BLOCK_M, BLOCK_N) where the slab, its operands and all sums are in registers at once: before Hopper, and fp32,
    whose every operand is three tf32 terms."""
    if rank == 16 and left:
        return 32, 64 if size == 4 and elementwise else block_n
    if rank == 64 and size == 4 and elementwise:
        return 16, 128
    if rank == 128 and size == 4:
        return 16, 64
    if rank == 256 or (rank == 128 and elementwise):
        return block_m, 64
    return block_m, block_n


def planes_walk(target: Target, m: int, n: int, tile: Tile) -> int:
    """Over how many planes the rows are split: enough to fill the device twice, and no chain too long."""
    most = cdiv(m, tile.BLOCK_M)
    chain = 3 * tile.BLOCK_M if target.kind == "interpreter" else _CHAIN
    fill = 2 * target.sms // cdiv(n, tile.BLOCK_N)
    return max(1, min(most, max(fill, cdiv(m, chain))))


class Walk(NamedTuple):
    """The planes one walk fills; `finish` adds them up."""

    left: Planes | None
    right: Planes | None
    dmag: Planes | None
    dbias: Planes | None
    scaled: Tensor | None


def one_pass(target: Target, m: int, n: int, r: int, dtype: torch.dtype, *, elementwise: int = 0) -> bool:
    """Whether the partial sums of a walk with both products cost less than a second read of t."""
    crowded = target.arch < 90 or dtype.itemsize == 4  # the left product does not fit beside the slab in registers
    if target.kind == "hip" or (target.kind == "cuda" and crowded and rank_block(r) > 16):
        return False
    tile = tile_walk(target, r, dtype, left=True, elementwise=elementwise)
    planes = cdiv(n, tile.BLOCK_N) * m + planes_walk(target, m, n, tile) * n
    return r * planes * 8 < dtype.itemsize * m * n


def walk(
    t: Tensor,
    r: int,
    *,
    v: Tensor | None = None,
    u: Tensor | None = None,
    transposed: bool = False,
    left_factor: float = 1.0,
    right_factor: float = 1.0,
    bits: Tensor | None = None,
    mag: Tensor | None = None,
    norm: Tensor | None = None,
    z: Tensor | None = None,
    need_dmag: bool = False,
    need_dbias: bool = False,
    scaled: str | None = None,
    splits: int = 1,
    part: int | None = None,
    left_out: Tensor | None = None,
    wide: bool | None = None,
) -> Walk:
    """One pass over t [m, n] (m > 0): t (c∘v) where v is given, c∘tᵀu where u is, and the sums asked for.

    `part`: u is [r / part, m, part], members of so many ranks. `left_out`: where t (c∘v) goes.
    """
    m, n = t.shape
    device = target(t.device)
    elementwise = need_dmag + need_dbias + (scaled is not None)
    held = held_rank(device, r, t.dtype, splits)
    tile = tile_walk(device, held, t.dtype, left=v is not None, elementwise=elementwise)
    number = planes_walk(device, m, n, tile)
    plane_m = cdiv(cdiv(m, tile.BLOCK_M), number) * tile.BLOCK_M
    number, blocks = cdiv(m, plane_m), cdiv(n, tile.BLOCK_N)
    shape = (r, n) if transposed else (n, r)
    out = Walk(
        None if v is None else make_planes(t, (m, r), blocks, left_factor, left_out),
        None if u is None else make_planes(t, shape, number, right_factor),
        make_planes(t, (n,), number) if need_dmag else None,
        make_planes(t, (n,), number) if need_dbias else None,
        None if scaled is None else torch.empty_like(t),
    )
    pointers = [None if stack is None else stack.planes for stack in out[:4]]
    launch(
        _walk_kernel,
        (blocks * number,),
        t,
        v,
        u,
        bits,
        mag,
        norm,
        z,
        *pointers,
        out.scaled,
        m,
        n,
        r,
        plane_m,
        1.0 if out.left is None else out.left.early_factor,
        1.0 if out.right is None else out.right.early_factor,
        TRANSPOSED=transposed,
        MINUS_ONE=scaled == "e",
        R=rank_block(r),
        PART=part or 0,
        BLOCK_M=tile.BLOCK_M,
        BLOCK_N=tile.BLOCK_N,
        TERMS=term_count(device, t.dtype, splits),
        PRECISION=precision(device, t.dtype),
        STAGES=tile.num_stages,
        WIDE=is_wide(t, v, u, *pointers) if wide is None else wide,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    return out


def project(
    dy: Tensor,
    b: Tensor,
    h: Tensor | None = None,
    *,
    scale: float = 1.0,
    mag: Tensor | None = None,
    norm: Tensor | None = None,
    z: Tensor | None = None,
    need_g: bool = True,
    need_db: bool = False,
    need_dmag: bool = False,
    need_dbias: bool = False,
    scaled: str | None = None,
    splits: int = 1,
    g_factor: float = 1.0,
    g_out: Tensor | None = None,
    later: list[Planes] | None = None,
    wide: bool | None = None,
) -> Projected:
    """With d = c∘dy, c = mag / norm (d = dy without mag):

        g = g_factor d b     db = scale dᵀ h     dmag = Σ_m dy∘z / norm     dbias = Σ_m dy

    in one read of dy where the partial sums are small beside it, else in two.

    Args:
        dy: [m, n] contiguous; b: [n, r] contiguous, any float dtype; h: fp32 [m, r], for need_db.
        mag, norm: [n] or None; z: [m, n], for need_dmag.
        scaled: "d" also returns d, "e" (c-1)∘dy, rounded once to dy's dtype (both need mag).
        splits: 16-bit terms that stand for an fp32 element of b or h: 1, or 3 (fp32 accuracy).
        g_out: contiguous fp32 [m, r] that g is written to.
        later: partial sums are put there, and the caller must `finish` them before anyone reads a result.
        wide: force 64-bit offsets on or off.

    Returns:
        g fp32 [m, r], db fp32 [n, r], dmag fp32 [n], dbias fp32 [n], d [m, n]; None where not asked for.
    """
    (m, n), r = dy.shape, b.shape[1]
    if not m:
        return _project_nothing(dy, b, need_g, need_db, need_dmag, need_dbias, scaled)
    options = {"mag": mag, "norm": norm, "splits": splits, "wide": wide}
    elementwise = need_dmag + need_dbias + (scaled is not None)
    walks = need_db or elementwise > 0
    together = walks and need_g and one_pass(target(dy.device), m, n, r, dy.dtype, elementwise=elementwise)
    g = None
    if need_g and not together:
        g = rows_product(dy, b, transposed=False, factor=g_factor, out=g_out, **options)  # type: ignore[arg-type]
    if not walks:
        return Projected(g, None, None, None, None)
    out = walk(
        dy,
        r,
        v=b if together else None,
        u=h if need_db else None,
        left_factor=g_factor,
        left_out=g_out if together else None,
        right_factor=scale,
        z=z if need_dmag else None,
        need_dmag=need_dmag,
        need_dbias=need_dbias,
        scaled=scaled,
        **options,  # type: ignore[arg-type]
    )
    if later is None:
        finish(*out[:4], wide=wide)
    else:
        later += [stack for stack in out[:4] if stack is not None]
    sums = [None if stack is None else stack.out for stack in out[:4]]
    return Projected(g if out.left is None else sums[0], sums[1], sums[2], sums[3], out.scaled)


def _project_nothing(
    dy: Tensor, b: Tensor, need_g: bool, need_db: bool, need_dmag: bool, need_dbias: bool, scaled: str | None
) -> Projected:
    """The sums over no rows."""
    n, r = b.shape

    def zeros(wanted: bool, *size: int) -> Tensor | None:
        return torch.zeros(size, dtype=torch.float32, device=dy.device) if wanted else None

    d = None if scaled is None else torch.empty_like(dy)
    return Projected(zeros(need_g, 0, r), zeros(need_db, n, r), zeros(need_dmag, n), zeros(need_dbias, n), d)
