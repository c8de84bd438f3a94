"""The backward of a batch that mixes adapters: what is added to dx, and every adapter's sums over its own rows.

A program owns some columns of one adapter's gradient and walks down a share of its rows, so that sums have a fixed
order. The gradients of all adapters stand one behind the other in one fp32 buffer.
"""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from fastlora.backends.triton.grouped_forward import low_rank_rows, tile_grouped_expand, tiles
from fastlora.backends.triton.grouped_members import (
    BASE_DROPS,
    DROPS,
    DSCALE,
    FIRST_A,
    FIRST_B,
    KIND,
    NORM,
    SCALE,
    WANT_DA,
    WANT_DB,
    WANT_DMAG,
    A,
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
from fastlora.backends.triton.launch import Target, Tile, cdiv, entry, launch, target
from fastlora.backends.triton.primitives import cast, offsets
from fastlora.backends.triton.project import _CHAIN, tile_walk
from fastlora.backends.triton.shrink import (
    Planes,
    fold,
    keep,
    make_planes,
    precision,
    product,
    rank_block,
    term_count,
    terms,
)
from fastlora.backends.triton.weight import wide as is_wide
from fastlora.math.segments import Segments

# --- the input's gradient ---------------------------------------------------------------------------------------------


@entry
def _grouped_input_kernel(
    g_ptr,
    a_ptr,
    dx_ptr,
    bits_ptr,
    dropped_ptr,
    table_ptr,
    order_ptr,
    offsets_ptr,
    m,
    k,
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
    """dx[i,j] = round(dx + dscale_e mask[i,j] (Σ_l g[i,l] a_e[l,j] + dropped[i,j])), e the adapter of row i.

    dropped: of adapters whose base product drops, else 0. A row without adapter keeps its dx.
    """
    pid = tl.program_id(0)
    blocks = tl.cdiv(k, BLOCK_N)
    e, start, end = find_tile(pid // blocks, offsets_ptr, groups, m, LANES, BLOCK_M)
    if (start >= end) | (e == groups):
        return
    rows, live = gather(order_ptr, start, end, BLOCK_M, WIDE)
    cols = pid % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    dtype: tl.constexpr = dx_ptr.dtype.element_ty
    r = rank_of(table_ptr, e, rank, groups)
    kind = number(table_ptr, e, KIND)
    a_e = factor_ptr(table_ptr, e, a_ptr, A, ALIGNED)
    delta = low_rank_rows(
        g_ptr, a_e, rows, live, cols, k, r, width, dtype, True, R, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION, WIDE
    )
    inside = live[:, None] & (cols < k)[None, :]
    where = offsets(rows, k, cols, WIDE)
    if dropped_ptr is not None:
        # [BLOCK_M, BLOCK_N]
        drops = (kind & BASE_DROPS) != 0
        delta += tl.load(
            dropped_ptr + where, mask=live[:, None] & (cols < tl.where(drops, k, 0))[None, :], other=0.0
        ).to(tl.float32)
    delta *= fraction(table_ptr, e, DSCALE)
    if bits_ptr is not None:
        bytes8 = pid % blocks * (BLOCK_N // 8) + tl.arange(0, BLOCK_N // 8)
        bits = member_bits(bits_ptr, rows, live, bytes8, (k + 7) // 8, (kind & DROPS) != 0, WIDE)
        delta = keep(delta, bits, BLOCK_M, BLOCK_N)
    # [BLOCK_M, BLOCK_N]
    dx = tl.load(dx_ptr + where, mask=inside, other=0.0).to(tl.float32)
    tl.store(dx_ptr + where, cast(dx + delta, dtype), mask=inside)


def grouped_input(
    g: Tensor,
    dx: Tensor,
    a: Tensor,
    group: Members,
    segments: Segments,
    *,
    bits: Tensor | None = None,
    dropped: Tensor | None = None,
    wide: bool | None = None,
) -> None:
    """Adds dscale mask∘(g a + dropped) of each row's adapter to dx [m, k], in place.

    Args:
        g: fp32 [m, largest rank]. a: any of the adapters' a, for its dtype.
        bits: uint8 [m, ceil(k/8)] or None; dropped: [m, k] in dx's dtype or None.
        wide: force 64-bit offsets on or off.
    """
    (m, width), k = g.shape, dx.shape[1]
    device = target(dx.device)
    tile = tile_grouped_expand(device, m, width, group.groups, dx.dtype)
    launch(
        _grouped_input_kernel,
        (tiles(m, group.groups, tile.BLOCK_M, rest=False) * cdiv(k, tile.BLOCK_N),),
        g,
        a,
        dx,
        bits,
        dropped,
        group.table,
        segments.order,
        segments.offsets,
        m,
        k,
        group.groups,
        group.same_rank,
        width,
        ALIGNED=group.aligned,
        R=rank_block(width),
        LANES=group.lanes,
        BLOCK_M=tile.BLOCK_M,
        BLOCK_N=tile.BLOCK_N,
        BLOCK_K=tile.BLOCK_K,
        PRECISION=precision(device, dx.dtype),
        WIDE=is_wide(g, dx) if wide is None else wide,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )


# --- the adapters' gradients ------------------------------------------------------------------------------------------


@entry
def _grouped_walk_kernel(
    t_ptr,
    u_ptr,
    bits_ptr,
    norms_ptr,
    z_ptr,
    right_ptr,
    dmag_ptr,
    table_ptr,
    order_ptr,
    offsets_ptr,
    m,
    n,
    rank,
    width,
    planes,
    total,
    norms,
    WANT: tl.constexpr,
    FIRST: tl.constexpr,
    FACTOR: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TERMS: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Over plane p's share of the rows i of adapter e and the columns j of one block, t masked by bits where e drops:

    right_e[p,j,l] = factor_e c_e[j] Σ_i t[i,j] u[i,l]      dmag_e[p,j] = Σ_i t[i,j] z[i,j] / norm_e[j]

    right_e is stored [n,r_e], or [r_e,n] where TRANSPOSED, from element FIRST_e n of each plane of `total` elements;
    dmag_e in its row among the `norms` of them. Each only where KIND_e wants it.
    """
    pid = tl.program_id(0)
    blocks = tl.cdiv(n, BLOCK_N)
    plane, block = pid // blocks % planes, pid % blocks
    e = pid // blocks // planes
    kind = number(table_ptr, e, KIND)
    wanted, mag_wanted = (kind & WANT) != 0, (kind & WANT_DMAG) != 0
    if not (wanted | (mag_wanted & (dmag_ptr is not None))):
        return
    first, end = tl.load(offsets_ptr + e).to(tl.int32), tl.load(offsets_ptr + e + 1).to(tl.int32)
    share = tl.cdiv(tl.cdiv(end - first, BLOCK_M), planes) * BLOCK_M
    r = rank_of(table_ptr, e, rank, e + 1)
    drops = (kind & DROPS) != 0
    cols, ranks = block * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, R)
    slab = tl.zeros([BLOCK_N, TERMS * R], tl.float32)
    # Summed over rows once, after the loop: no exchange between threads inside it.
    dmag = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    stop = tl.minimum(end, first + (plane + 1) * share)
    for start in tl.range(first + plane * share, stop, BLOCK_M, num_stages=STAGES):
        rows, live = gather(order_ptr, start, stop, BLOCK_M, WIDE)
        t = load_gathered(t_ptr, rows, live, n, cols, n, WIDE)
        if bits_ptr is not None:
            bytes8 = block * (BLOCK_N // 8) + tl.arange(0, BLOCK_N // 8)
            t = keep(t, member_bits(bits_ptr, rows, live, bytes8, (n + 7) // 8, drops, WIDE), BLOCK_M, BLOCK_N)
        if right_ptr is not None:
            u = load_gathered(u_ptr, rows, live, width, ranks, r, WIDE)
            slab = product(tl.trans(t), terms(u, t.dtype, TERMS, PRECISION), slab, PRECISION)
        if dmag_ptr is not None:
            # [BLOCK_M, BLOCK_N]
            z = load_gathered(z_ptr, rows, live, n, cols, tl.where(mag_wanted, n, 0), WIDE)
            dmag += t.to(tl.float32) * z.to(tl.float32)
    if norms_ptr is not None:
        c, norm = member_ratio(table_ptr, norms_ptr, e, cols, n)
    if right_ptr is not None:
        stored = tl.where(wanted, r, 0)
        right = fold(slab, TERMS) * fraction(table_ptr, e, FACTOR)
        if norms_ptr is not None:
            right = right * c[:, None]
        to = right_ptr + plane.to(tl.int64) * total + number(table_ptr, e, FIRST) * n
        if TRANSPOSED:
            inside = (ranks < stored)[:, None] & (cols < n)[None, :]
            tl.store(to + offsets(ranks, n, cols, WIDE), tl.trans(right), mask=inside)
        else:
            inside = (cols < n)[:, None] & (ranks < stored)[None, :]
            tl.store(to + offsets(cols, r, ranks, WIDE), right, mask=inside)
    if dmag_ptr is not None:
        row = plane.to(tl.int64) * norms + number(table_ptr, e, NORM)
        tl.store(
            dmag_ptr + row * n + cols, tl.div_rn(tl.sum(dmag, axis=0), norm), mask=cols < tl.where(mag_wanted, n, 0)
        )


def tile_grouped_walk(target: Target, r: int, dtype: torch.dtype, *, dmag: bool) -> Tile:
    """BLOCK_N columns a program, BLOCK_M rows at a time."""
    tile = tile_walk(target, r, dtype, left=False, elementwise=int(dmag))
    if target.kind != "cuda":
        return tile
    # Rows are gathered: their addresses stand in registers beside the slab (what 3.6.0 and 3.9.0 do not spill).
    rank, old = rank_block(r), target.arch < 90
    most = tile.BLOCK_N
    if dtype == torch.float32 and rank > 16:
        most = 32 if rank == 256 or (old and rank == 128) else 64
    elif old and rank == 128:
        most, tile = 64, tile._replace(BLOCK_M=16, num_stages=2)
    return tile._replace(BLOCK_M=min(32, tile.BLOCK_M) if old else tile.BLOCK_M, BLOCK_N=min(most, tile.BLOCK_N))


def planes_grouped(target: Target, m: int, n: int, groups: int, tile: Tile) -> int:
    """Over how many planes each adapter's rows are split: enough to fill the device twice, and no chain too long."""
    chain = 3 * tile.BLOCK_M if target.kind == "interpreter" else _CHAIN
    fill = 2 * target.sms // (cdiv(n, tile.BLOCK_N) * groups)
    return max(1, min(cdiv(m, tile.BLOCK_M), max(fill, cdiv(m, chain))))


def grouped_walk(
    t: Tensor,
    u: Tensor | None,
    group: Members,
    segments: Segments,
    width: int,
    *,
    down: bool,
    bits: Tensor | None = None,
    z: Tensor | None = None,
    splits: int = 1,
    wide: bool | None = None,
) -> tuple[Planes | None, Planes | None]:
    """Every adapter's da = dscale Σ gᵀ (mask∘x), or db = s Σ (c∘dy)ᵀ h and dmag = Σ dy∘z / norm, over its rows.

    Args:
        t: x [m, k], or dy [m, n]. u: g, or h; fp32 [m, width], None where no product is asked for.
        down: da, else db. bits: uint8 [m, ceil(k/8)] or None. z: [m, n], for dmag.
        splits: 16-bit terms that stand for an fp32 element of u: 1, or 3 (fp32 accuracy).
        wide: force 64-bit offsets on or off.

    Returns:
        Planes of the wanted da [r_e, k] or db [n, r_e], one behind the other in one flat tensor, and of dmag
        [adapters with DoRA, n], for `finish`; None where not asked for.
    """
    m, n = t.shape
    device = target(t.device)
    tile = tile_grouped_walk(device, width, t.dtype, dmag=z is not None)
    planes = planes_grouped(device, m, n, group.groups, tile)
    total = (group.first_a if down else group.first_b)[-1] * n
    right = None if u is None else make_planes(t, (total,), planes)
    dmag = None if z is None else make_planes(t, (len(group.doras), n), planes)
    launch(
        _grouped_walk_kernel,
        (cdiv(n, tile.BLOCK_N) * group.groups * planes,),
        t,
        u,
        bits,
        None if down else group.norms,
        z,
        None if right is None else right.planes,
        None if dmag is None else dmag.planes,
        group.table,
        segments.order,
        segments.offsets,
        m,
        n,
        group.same_rank,
        width,
        planes,
        total,
        len(group.doras),
        WANT=(WANT_DA if down else WANT_DB).value,
        FIRST=(FIRST_A if down else FIRST_B).value,
        FACTOR=(DSCALE if down else SCALE).value,
        TRANSPOSED=down,
        R=rank_block(width),
        BLOCK_M=tile.BLOCK_M,
        BLOCK_N=tile.BLOCK_N,
        TERMS=term_count(device, t.dtype, splits),
        PRECISION=precision(device, t.dtype),
        STAGES=tile.num_stages,
        WIDE=is_wide(t, u, z) if wide is None else wide,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    return right, dmag
