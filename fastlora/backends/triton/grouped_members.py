"""What the grouped kernels know of E adapters and of the rows of each: a table on the device, and its readers.

The table holds addresses, ranks and numbers of every adapter, an int64 row each, so that no adapter is copied or
padded. It is a pure function of its key, the very values it holds, and is kept: the host writes to the device only when
a group is seen for the first time. Rows are found through `segments.order` and `segments.offsets` on the device.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastlora.backends.triton.launch import next_power_of_2
from fastlora.backends.triton.primitives import offsets
from fastlora.math import philox
from fastlora.math.segments import Group
from fastlora.problem import DORA, DROPOUT, NEED_DA, NEED_DB, NEED_DMAG, base_drops

# Columns of a table.
A = tl.constexpr(0)
B = tl.constexpr(1)
MAG = tl.constexpr(2)  # address, 0 without DoRA
MAG_TYPE = tl.constexpr(3)  # its place in MAG_TYPES
NORM = tl.constexpr(4)  # its row among the norms
RANK = tl.constexpr(5)
KIND = tl.constexpr(6)
SCALE = tl.constexpr(7)  # fp32 bits
DSCALE = tl.constexpr(8)
THRESHOLD = tl.constexpr(9)
STREAM = tl.constexpr(10)
FIRST_A = tl.constexpr(11)  # ranks before it in the stacked gradients
FIRST_B = tl.constexpr(12)
COLUMNS = tl.constexpr(16)

# Bits of the column KIND.
BASE_DROPS = tl.constexpr(1)
DROPS = tl.constexpr(2)
WANT_DA = tl.constexpr(4)
WANT_DB = tl.constexpr(8)
WANT_DMAG = tl.constexpr(16)

MAG_TYPES = (torch.float32, torch.bfloat16, torch.float16)
_TABLES = 8192  # kept tables of about a KiB: two or three for each layer and direction of a model


class Members(NamedTuple):
    """A group as the kernels take it.

    table: int64 [E + 1, COLUMNS] on the device, its last row that of rows without adapter.
    norms: fp32 [adapters with DoRA, n], or None without DoRA.
    ranks: r_e. first_a, first_b: ranks before each adapter's in the stacked da [Σ r, k] and db, of those wanted; then
    their totals. doras: the adapters with DoRA. same_rank: the rank, if all are equal. aligned: whether every address
    of a and b is a multiple of 16 bytes.
    """

    table: Tensor
    norms: Tensor | None
    ranks: Sequence[int]
    first_a: Sequence[int]
    first_b: Sequence[int]
    doras: Sequence[int]
    same_rank: int | None
    aligned: bool

    @property
    def groups(self) -> int:
        """E."""
        return len(self.ranks)

    @property
    def lanes(self) -> int:
        """What a kernel's vector over the adapters and the rest is padded to."""
        return next_power_of_2(self.groups + 1)


class _Table(NamedTuple):
    rows: Tensor
    stream: int


def _bits(values: Sequence[float]) -> list[int]:
    found: list[int] = torch.tensor(values, dtype=torch.float32).view(torch.int32).tolist()
    return found


def _first(ranks: Sequence[int], kinds: Sequence[int], bit: int) -> list[int]:
    """Ranks of the wanted adapters before each, and of all."""
    sums = [0]
    for rank, kind in zip(ranks, kinds, strict=True):
        sums.append(sums[-1] + (rank if kind & bit else 0))
    return sums


def _kind_bits(kind: int) -> int:
    wants = ((DROPOUT, DROPS), (NEED_DA, WANT_DA), (NEED_DB, WANT_DB), (NEED_DMAG, WANT_DMAG))
    return base_drops(kind) + sum(own.value for bit, own in wants if kind & bit)


@functools.lru_cache(maxsize=_TABLES)
def _table(
    addresses: tuple[int, ...],
    mag_types: tuple[int, ...],
    ranks: tuple[int, ...],
    scales: tuple[float, ...],
    ps: tuple[float, ...],
    streams: tuple[int, ...],
    kinds: tuple[int, ...],
    device: torch.device,
) -> _Table:
    """The one write to the device: it waits for the copy, so that any stream may read the table afterwards."""
    count = len(ranks)
    a, b, mag = addresses[:count], addresses[count : 2 * count], addresses[2 * count :]
    doras = [sum(bool(kind & DORA) for kind in kinds[:e]) for e in range(count)]
    firsts = _first(ranks, kinds, NEED_DA)[:-1], _first(ranks, kinds, NEED_DB)[:-1]
    dscales = _bits([philox.keep_scale(p) if kind & DROPOUT else 1.0 for p, kind in zip(ps, kinds, strict=True)])
    limits, own = [philox.threshold(p) for p in ps], [_kind_bits(kind) for kind in kinds]
    columns = (a, b, mag, mag_types, doras, ranks, own, _bits(scales), dscales, limits, streams, *firsts)
    values = [[*row, *[0] * (COLUMNS.value - len(columns))] for row in zip(*columns, strict=True)]
    none = [0] * COLUMNS.value
    none[THRESHOLD.value] = philox.LANES  # a row without adapter keeps nothing
    values.append(none)
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    return _Table(torch.tensor(values, dtype=torch.int64).to(device), stream)


# Tables that a captured graph reads live as long as the process: a replay does not ask for them.
_captured: dict[int, Tensor] = {}


def _hold(table: _Table) -> Tensor:
    """The table, which must outlive the kernels about to read it, even where the cache lets it go."""
    rows = table.rows
    if rows.device.type == "cuda":
        if torch.cuda.is_current_stream_capturing():
            _captured[rows.data_ptr()] = rows
        elif torch.cuda.current_stream(rows.device).cuda_stream != table.stream:
            rows.record_stream(torch.cuda.current_stream(rows.device))
    return rows


def members(group: Group, device: torch.device) -> Members:
    """The group's table, written to the device at its first sight (not while a CUDA graph is captured)."""
    ranks, doras = tuple(group.ranks), [e for e, kind in enumerate(group.kinds) if kind & DORA]
    factors = tuple(t.data_ptr() for t in (*group.a, *group.b))
    mags = tuple(0 if mag is None else mag.data_ptr() for mag in group.mag)
    types = tuple(0 if mag is None else MAG_TYPES.index(mag.dtype) for mag in group.mag)
    numbers = (ranks, tuple(group.scales), tuple(group.ps), tuple(group.streams), tuple(group.kinds))
    table = _table(factors + mags, types, *numbers, device)
    norms = [norm for norm in group.norm if norm is not None]
    return Members(
        _hold(table),
        torch.stack(norms) if len(norms) > 1 else norms[0][None] if norms else None,
        ranks,
        _first(ranks, group.kinds, NEED_DA),
        _first(ranks, group.kinds, NEED_DB),
        doras,
        ranks[0] if len(set(ranks)) == 1 else None,
        all(address % 16 == 0 for address in factors),
    )


# --- device functions -------------------------------------------------------------------------------------------------


@triton.jit
def number(table_ptr, e, COLUMN: tl.constexpr):
    """An integer of adapter e, int64."""
    return tl.load(table_ptr + e * COLUMNS + COLUMN)


@triton.jit
def fraction(table_ptr, e, COLUMN: tl.constexpr):
    """An fp32 number of adapter e."""
    return number(table_ptr, e, COLUMN).to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def rank_of(table_ptr, e, rank, groups):
    """r_e, 0 for the rest; `rank` where all adapters share one, so that the compiler knows what divides it."""
    if rank is not None:
        return tl.where(e < groups, rank, 0)
    return number(table_ptr, e, RANK).to(tl.int32)


@triton.jit
def factor_ptr(table_ptr, e, like_ptr, COLUMN: tl.constexpr, ALIGNED: tl.constexpr):
    """Where a or b of adapter e begins; like_ptr: one of their dtype."""
    ptr = number(table_ptr, e, COLUMN).to(tl.pointer_type(like_ptr.dtype.element_ty))
    if ALIGNED:
        ptr = tl.multiple_of(ptr, 16)
    return ptr


@triton.jit
def find_tile(tile, offsets_ptr, groups, m, LANES: tl.constexpr, BLOCK_M: tl.constexpr):
    """The adapter of a tile of sorted rows, its first row and the end of its adapter's; no rows: a surplus tile.

    The tiles of adapter e begin at number offsets[e] // BLOCK_M + e, which leaves room for all its rows whatever the
    offsets are: m // BLOCK_M + E tiles do, one more for the rest, the rows without adapter, as number E.
    """
    lane = tl.arange(0, LANES)
    # [LANES]
    begin = tl.load(offsets_ptr + lane, mask=lane <= groups, other=0).to(tl.int32)
    before = (lane <= groups) & (begin // BLOCK_M + lane <= tile)
    e = tl.sum(before.to(tl.int32), axis=0) - 1
    first = tl.load(offsets_ptr + e).to(tl.int32)
    end = tl.where(e < groups, tl.load(offsets_ptr + tl.minimum(e + 1, groups)).to(tl.int32), m)
    return e, first + (tile - (first // BLOCK_M + e)) * BLOCK_M, end


@triton.jit
def gather(order_ptr, start, end, BLOCK_M: tl.constexpr, WIDE: tl.constexpr):
    """BLOCK_M rows of sorted position start, and which of them exist; 64-bit where WIDE."""
    position = start + tl.arange(0, BLOCK_M)
    live = position < end
    # [BLOCK_M]
    rows = tl.load(order_ptr + position, mask=live, other=0)
    if not WIDE:
        rows = rows.to(tl.int32)
    return rows, live


@triton.jit
def load_gathered(t_ptr, rows, live, stride, cols, width, WIDE: tl.constexpr):
    """[rows, cols] of a tensor of row stride `stride`, 0 outside."""
    inside = live[:, None] & (cols < width)[None, :]
    # [BLOCK_M, cols]
    return tl.load(t_ptr + offsets(rows, stride, cols, WIDE), mask=inside, other=0.0)


@triton.jit
def member_bits(bits_ptr, rows, live, groups8, bytes_per_row, drops, WIDE: tl.constexpr):
    """uint8 [rows, groups8] of a mask; every bit set where the adapter does not drop."""
    inside = live[:, None] & (groups8 < tl.where(drops, bytes_per_row, 0))[None, :]
    # [BLOCK_M, groups8]
    return tl.load(bits_ptr + offsets(rows, bytes_per_row, groups8, WIDE), mask=inside, other=255)


@triton.jit
def member_ratio(table_ptr, norms_ptr, e, cols, n):
    """c = mag / norm of adapter e, fp32, rounded as IEEE; 1 without DoRA and outside; and the norm."""
    address, kind = number(table_ptr, e, MAG), number(table_ptr, e, MAG_TYPE)
    width = tl.where(address != 0, n, 0)
    # [cols]; one of three loads reads.
    mag = tl.load(address.to(tl.pointer_type(tl.float32)) + cols, mask=cols < tl.where(kind == 0, width, 0), other=0.0)
    half = tl.load(
        address.to(tl.pointer_type(tl.bfloat16)) + cols, mask=cols < tl.where(kind == 1, width, 0), other=0.0
    )
    mag += half.to(tl.float32)
    half = tl.load(address.to(tl.pointer_type(tl.float16)) + cols, mask=cols < tl.where(kind == 2, width, 0), other=0.0)
    mag += half.to(tl.float32)
    norm = tl.load(norms_ptr + number(table_ptr, e, NORM) * n + cols, mask=cols < width, other=1.0)
    return tl.where(cols < width, tl.div_rn(mag, norm), 1.0), norm
