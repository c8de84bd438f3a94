"""The forward of a batch that mixes adapters: masks, h of every row, and what is added to the frozen base's output.

Rows are visited sorted by adapter, a tile of one adapter a program, and gathered and stored where they stand.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastlora.backends.triton.dropout import tile_mask
from fastlora.backends.triton.expand import tile_expand
from fastlora.backends.triton.grouped_members import (
    BASE_DROPS,
    DROPS,
    DSCALE,
    KIND,
    MAG,
    SCALE,
    STREAM,
    THRESHOLD,
    A,
    B,
    Members,
    factor_ptr,
    find_tile,
    fraction,
    gather,
    load_gathered,
    member_bits,
    member_ratio,
    number,
    rank_of,
)
from fastlora.backends.triton.launch import Target, Tile, cdiv, entry, launch, next_power_of_2, target
from fastlora.backends.triton.primitives import cast, dot, draw_bits, offsets
from fastlora.backends.triton.shrink import (
    finish,
    fold,
    keep,
    load_factor,
    make_planes,
    planes_rows,
    precision,
    product,
    rank_block,
    round_tf32,
    term_count,
    terms,
    tile_rows,
)
from fastlora.backends.triton.weight import wide as is_wide
from fastlora.math.segments import Segments


def cut_rows(tile: Tile, target: Target, m: int, groups: int) -> Tile:
    """No taller a tile than an adapter's share of the rows: what is beyond is padding."""
    if target.kind == "interpreter":
        return tile
    least = 32 if target.kind == "hip" else 16
    rows = min(tile.BLOCK_M, max(least, next_power_of_2(cdiv(m, groups))))
    return tile._replace(BLOCK_M=rows, num_warps=4 if rows < min(64, tile.BLOCK_M) else tile.num_warps)


def tiles(m: int, groups: int, block_m: int, *, rest: bool) -> int:
    """How many tiles `find_tile` numbers; rest: those of rows without adapter too."""
    return m // block_m + groups + rest


# --- masks ------------------------------------------------------------------------------------------------------------


@entry
def _grouped_mask_kernel(
    seed_ptr,
    out_ptr,
    table_ptr,
    owner_ptr,
    m,
    k,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WIDE: tl.constexpr,
):
    """out[i, g] = the eight keep bits of row i, columns 8g .. 8g + 7, by the stream and threshold of its adapter."""
    pid = tl.program_id(0)
    width = tl.cdiv(k, 8)
    blocks = tl.cdiv(width, BLOCK_K)
    rows = (pid // blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    groups = (pid % blocks) * BLOCK_K + tl.arange(0, BLOCK_K)
    # [BLOCK_M]
    owner = tl.load(owner_ptr + rows, mask=rows < m, other=0)
    stream, threshold = number(table_ptr, owner, STREAM), number(table_ptr, owner, THRESHOLD)
    bits = draw_bits(seed_ptr, stream[:, None], threshold[:, None], rows.to(tl.int64), groups, k)
    # [BLOCK_M, BLOCK_K]
    tl.store(out_ptr + offsets(rows, width, groups, WIDE), bits, mask=(rows < m)[:, None] & (groups < width)[None, :])


def grouped_mask(seed: Tensor, group: Members, segments: Segments, cols: int, *, wide: bool | None = None) -> Tensor:
    """Bits of `math.segments.dropout_bits`: uint8 [m, ceil(cols/8)]; wide: force 64-bit offsets on or off."""
    rows, width = segments.owner.shape[0], cdiv(cols, 8)
    out = torch.empty((rows, width), dtype=torch.uint8, device=seed.device)
    tile = tile_mask(target(seed.device))
    launch(
        _grouped_mask_kernel,
        (cdiv(rows, tile.BLOCK_M) * cdiv(width, tile.BLOCK_K),),
        seed,
        out,
        group.table,
        segments.owner,
        rows,
        cols,
        num_warps=tile.num_warps,
        BLOCK_M=tile.BLOCK_M,
        BLOCK_K=tile.BLOCK_K,
        WIDE=is_wide(out) if wide is None else wide,
    )
    return out


# --- rows: h and g ----------------------------------------------------------------------------------------------------


@entry
def _grouped_rows_kernel(
    t_ptr,
    v_ptr,
    out_ptr,
    bits_ptr,
    norms_ptr,
    table_ptr,
    order_ptr,
    offsets_ptr,
    m,
    n,
    groups,
    rank,
    width,
    planes,
    plane_n,
    FACTOR: tl.constexpr,
    COLUMN: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    ALIGNED: tl.constexpr,
    R: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TERMS: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
    WIDE: tl.constexpr,
):
    """out[p,i,l] = factor_e Σ_j mask[i,j] t[i,j] c_e[j] v_e[j,l] over plane p's columns j, e the adapter of row i.

    v_e: [n,r_e], or [r_e,n] where TRANSPOSED; 0 for l >= r_e and in rows without adapter. mask: 1 where e drops not.
    """
    pid = tl.program_id(0)
    tile, plane = pid // planes, pid % planes
    e, start, end = find_tile(tile, offsets_ptr, groups, m, LANES, BLOCK_M)
    if start >= end:
        return
    rows, live = gather(order_ptr, start, end, BLOCK_M, WIDE)
    ranks = tl.arange(0, R)
    r = rank_of(table_ptr, e, rank, groups)
    v_e = factor_ptr(table_ptr, e, v_ptr, COLUMN, ALIGNED)
    drops = (number(table_ptr, e, KIND) & DROPS) != 0
    last = tl.where(e < groups, tl.minimum(n, (plane + 1) * plane_n), 0)
    acc = tl.zeros([BLOCK_M, TERMS * R], tl.float32)
    for begin in tl.range(plane * plane_n, last, BLOCK_K, num_stages=STAGES):
        cols = begin + tl.arange(0, BLOCK_K)
        t = load_gathered(t_ptr, rows, live, n, cols, n, WIDE)
        v = load_factor(v_e, cols, ranks, n, r, TRANSPOSED, WIDE)
        if norms_ptr is not None:
            c, _ = member_ratio(table_ptr, norms_ptr, e, cols, n)
            v = v.to(tl.float32) * c[:, None]
        if bits_ptr is not None:
            bytes8 = begin // 8 + tl.arange(0, BLOCK_K // 8)
            bits = member_bits(bits_ptr, rows, live, bytes8, (n + 7) // 8, drops, WIDE)
            t = keep(t, bits, BLOCK_M, BLOCK_K)
        acc = product(t, terms(v, t.dtype, TERMS, PRECISION), acc, PRECISION)
    # Beyond the rank 0, even where t is NaN.
    out = tl.where((ranks < r)[None, :], fold(acc, TERMS) * fraction(table_ptr, e, FACTOR), 0.0)
    row = plane.to(tl.int64) * m + rows if WIDE else plane * m + rows
    tl.store(out_ptr + offsets(row, width, ranks, WIDE), out, mask=live[:, None] & (ranks < width)[None, :])


def tile_grouped_rows(target: Target, m: int, n: int, r: int, groups: int, dtype: torch.dtype) -> Tile:
    """BLOCK_M rows of one adapter by BLOCK_K columns at a time."""
    tile = cut_rows(tile_rows(target, m, r, dtype), target, m, groups)
    if target.kind == "interpreter":
        return tile
    rank = rank_block(r)
    if target.kind == "cuda" and dtype == torch.float32:  # DoRA's factor beside three tf32 terms
        tile = tile._replace(BLOCK_K=min(tile.BLOCK_K, 16 if rank == 256 else 32))
    if target.kind == "cuda" and rank >= 128:
        tile = tile._replace(BLOCK_M=min(tile.BLOCK_M, 64))
    return tile._replace(BLOCK_K=min(tile.BLOCK_K, max(16, next_power_of_2(n))))


def grouped_rows(
    t: Tensor,
    v: Tensor,
    group: Members,
    segments: Segments,
    width: int,
    *,
    down: bool,
    bits: Tensor | None = None,
    splits: int = 1,
    wide: bool | None = None,
) -> Tensor:
    """h = dscale (mask∘t) aᵀ of each row's adapter, or g = s (c∘t) b: fp32 [m, width], from one read of t [m, n].

    Args:
        v: any of the adapters' a or b, for its dtype.
        width: the largest rank. down: h, else g. bits: uint8 [m, ceil(n/8)] or None.
        splits: 16-bit terms that stand for an fp32 element of a or b: 1, or 3 (fp32 accuracy).
        wide: force 64-bit offsets on or off.
    """
    m, n = t.shape
    device = target(t.device)
    tile = tile_grouped_rows(device, m, n, width, group.groups, t.dtype)
    count = tiles(m, group.groups, tile.BLOCK_M, rest=True)
    # About as many tiles have rows: all full, or one an adapter.
    planes = planes_rows(device, max(cdiv(m, tile.BLOCK_M), min(m, group.groups)) * tile.BLOCK_M, n, tile)
    plane_n = cdiv(cdiv(n, tile.BLOCK_K), planes) * tile.BLOCK_K
    planes = cdiv(n, plane_n)
    stack = make_planes(t, (m, width), planes)
    wide = is_wide(t, stack.planes) if wide is None else wide
    launch(
        _grouped_rows_kernel,
        (count * planes,),
        t,
        v,
        stack.planes,
        bits,
        None if down else group.norms,
        group.table,
        segments.order,
        segments.offsets,
        m,
        n,
        group.groups,
        group.same_rank,
        width,
        planes,
        plane_n,
        FACTOR=(DSCALE if down else SCALE).value,
        COLUMN=(A if down else B).value,
        TRANSPOSED=down,
        ALIGNED=group.aligned,
        R=rank_block(width),
        LANES=group.lanes,
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


# --- the output -------------------------------------------------------------------------------------------------------


@triton.jit
def low_rank_rows(
    h_ptr,
    v_ptr,
    rows,
    live,
    cols,
    n,
    r,
    width,
    dtype: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
):
    """(h vᵀ)[rows, cols] in fp32; v is stored [n,r], or [r,n]. For a bf16 result both are rounded to bf16 once."""
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for begin in range(0, R, BLOCK_K):
        ranks = begin + tl.arange(0, BLOCK_K)
        h = load_gathered(h_ptr, rows, live, width, ranks, r, WIDE)
        v = tl.trans(load_factor(v_ptr, cols, ranks, n, r, TRANSPOSED, WIDE).to(tl.float32))
        if dtype == tl.bfloat16:
            acc = dot(cast(h, tl.bfloat16), cast(v, tl.bfloat16), acc, PRECISION)
        elif PRECISION == "tf32":
            acc = dot(round_tf32(h), round_tf32(v), acc, PRECISION)
        else:
            acc = dot(h, v, acc, PRECISION)
    return acc


@entry
def _grouped_expand_kernel(
    h_ptr,
    b_ptr,
    y_ptr,
    z_ptr,
    bias_ptr,
    dropped_ptr,
    norms_ptr,
    table_ptr,
    order_ptr,
    offsets_ptr,
    m,
    n,
    groups,
    rank,
    width,
    ALIGNED: tl.constexpr,
    R: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
):
    """With delta = s_e Σ_l h[i,l] b_e[j,l], e the adapter of row i; everything of element [i,j], rounded once:

    LoRA  y += delta
    DoRA  base = y - bias, or dscale_e dropped where the base drops;  z = base + delta;  y += delta + (c_e - 1) z

    z: 0 in the other rows. A row without adapter keeps its y.
    """
    pid = tl.program_id(0)
    blocks = tl.cdiv(n, BLOCK_N)
    e, start, end = find_tile(pid // blocks, offsets_ptr, groups, m, LANES, BLOCK_M)
    if start >= end:
        return
    rows, live = gather(order_ptr, start, end, BLOCK_M, WIDE)
    cols = pid % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    dtype: tl.constexpr = y_ptr.dtype.element_ty
    r = rank_of(table_ptr, e, rank, groups)
    b_e = factor_ptr(table_ptr, e, b_ptr, B, ALIGNED)
    delta = low_rank_rows(
        h_ptr, b_e, rows, live, cols, n, r, width, dtype, False, R, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION, WIDE
    )
    delta *= fraction(table_ptr, e, SCALE)
    inside = live[:, None] & (cols < n)[None, :]
    where = offsets(rows, n, cols, WIDE)
    # [BLOCK_M, BLOCK_N]
    y = tl.load(y_ptr + where, mask=inside, other=0.0).to(tl.float32)
    out = y + delta
    if norms_ptr is not None:
        is_dora = number(table_ptr, e, MAG) != 0
        z = y
        if bias_ptr is not None:
            # [BLOCK_N]
            z -= tl.load(bias_ptr + cols, mask=cols < n, other=0.0).to(tl.float32)[None, :]
        if dropped_ptr is not None:
            drops = (number(table_ptr, e, KIND) & BASE_DROPS) != 0
            # [BLOCK_M, BLOCK_N]
            dropped = tl.load(
                dropped_ptr + where, mask=live[:, None] & (cols < tl.where(drops, n, 0))[None, :], other=0.0
            ).to(tl.float32)
            z = tl.where(drops, dropped * fraction(table_ptr, e, DSCALE), z)
        z += delta
        c, _ = member_ratio(table_ptr, norms_ptr, e, cols, n)
        out = tl.where(is_dora, out + (c - 1.0)[None, :] * z, out)
        if z_ptr is not None:
            tl.store(z_ptr + where, cast(tl.where(is_dora, z, 0.0), dtype), mask=inside)
    tl.store(y_ptr + where, cast(out, dtype), mask=live[:, None] & (cols < tl.where(e < groups, n, 0))[None, :])


def tile_grouped_expand(target: Target, m: int, r: int, groups: int, dtype: torch.dtype, *, dora: bool = False) -> Tile:
    """BLOCK_M rows of one adapter by BLOCK_N columns, BLOCK_K ranks at a time; for y and for dx.

    Smaller than `tile_expand`'s: the output is read as well, and what DoRA needs beside it.
    """
    tile = tile_expand(target, m, r, dtype)
    if target.kind == "interpreter" or tile.BLOCK_M <= 32:
        return cut_rows(tile, target, m, groups)
    warps = 4 if target.kind == "hip" else 8
    return cut_rows(tile._replace(BLOCK_M=64, BLOCK_N=64 if dora else 128, num_warps=warps), target, m, groups)


def grouped_expand(
    h: Tensor,
    y: Tensor,
    b: Tensor,
    group: Members,
    segments: Segments,
    *,
    bias: Tensor | None = None,
    dropped: Tensor | None = None,
    need_z: bool = False,
    wide: bool | None = None,
) -> Tensor | None:
    """Adds to y [m, n], in place, what each row's adapter contributes; see `ops.schema` for the equation.

    Args:
        h: fp32 [m, largest rank]. b: any of the adapters' b, for its dtype.
        bias: [n] of any float dtype, contained in y; dropped: [m, n] in y's dtype; both for DoRA only.
        need_z: also return z. wide: force 64-bit offsets on or off.

    Returns:
        z [m, n] of y's dtype, or None.
    """
    (m, width), n = h.shape, y.shape[1]
    z = torch.empty((m, n), dtype=y.dtype, device=y.device) if need_z else None
    device = target(y.device)
    tile = tile_grouped_expand(device, m, width, group.groups, y.dtype, dora=group.norms is not None)
    launch(
        _grouped_expand_kernel,
        (tiles(m, group.groups, tile.BLOCK_M, rest=need_z) * cdiv(n, tile.BLOCK_N),),
        h,
        b,
        y,
        z,
        bias if group.norms is not None else None,
        dropped,
        group.norms,
        group.table,
        segments.order,
        segments.offsets,
        m,
        n,
        group.groups,
        group.same_rank,
        width,
        ALIGNED=group.aligned,
        R=rank_block(width),
        LANES=group.lanes,
        BLOCK_M=tile.BLOCK_M,
        BLOCK_N=tile.BLOCK_N,
        BLOCK_K=tile.BLOCK_K,
        PRECISION=precision(device, y.dtype),
        WIDE=is_wide(h, y) if wide is None else wide,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    return z
