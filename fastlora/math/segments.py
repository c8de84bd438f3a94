"""Rows grouped by the adapter they belong to: a stable sort on the device, no host sync, no padding.

A batch that mixes adapters, and the tokens of a mixture of experts, are both "rows, each with one number in 0 .. E":
the adapter's, or E for a row without one. A dense layer is the case E = 1 in which every row has number 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastlora.errors import DtypeError, ShapeError
from fastlora.math import philox


class Segments(NamedTuple):
    """Which rows belong to which of E adapters; int64, on one device.

    Attributes:
        owner: [m], the adapter of each row, E where it has none.
        order: [m], the rows sorted by adapter, in their original order within one; rows without adapter come last.
        offsets: [E + 1]; the rows of adapter e are order[offsets[e]:offsets[e + 1]].
    """

    owner: Tensor
    order: Tensor
    offsets: Tensor

    @property
    def groups(self) -> int:
        """E."""
        return self.offsets.shape[0] - 1


class Group(NamedTuple):
    """E adapters side by side, as the grouped kernels take them; every sequence has E entries.

    Attributes:
        a, b: [r_e, k] and [n, r_e], contiguous, one float dtype; ranks may differ.
        mag, norm: [n] each for DoRA, else None.
        scales, ps: s_e and the dropout probability p_e.
        streams: dropout stream numbers.
        kinds: per adapter the `problem` bits that hold for it: DROPOUT, DORA, SHARED; in the backward also NEED_DA,
            NEED_DB, NEED_DMAG.
        memo: what a backend found out about each adapter, for the next group it is in; None where nobody keeps it.
    """

    a: Sequence[Tensor]
    b: Sequence[Tensor]
    mag: Sequence[Tensor | None]
    norm: Sequence[Tensor | None]
    scales: Sequence[float]
    ps: Sequence[float]
    streams: Sequence[int]
    kinds: Sequence[int]
    memo: Sequence[dict[str, Any]] | None = None

    @property
    def ranks(self) -> list[int]:
        """r_e."""
        return [b.shape[1] for b in self.b]


Side = tuple[Tensor, Tensor, float]  # one linear's experts: a [E, r, in], b [E, out, r], the scale


class GatedExperts(NamedTuple):
    """A mixture of E experts over a gated MLP, as its kernels take it both ways; T tokens, S slots.

    Attributes:
        x, w: [T, k] and the slots' weights fp32 [T, S].
        rows: the T S slots by expert.
        act: name of the activation.
        bases: c1 and c3 [T, n], what the frozen gate and up make of x.
        sides: of gate, up and W2; None where a linear has no adapters.
    """

    x: Tensor
    w: Tensor
    rows: Segments
    act: str
    bases: Sequence[Tensor]
    sides: Sequence[Side | None]


def segments(index: Tensor, groups: int) -> Segments:
    """Sort rows by adapter.

    Args:
        index: int64 [m], each in 0 .. groups (groups: no adapter). The values are not checked: that would read them.
        groups: E, at least 1.

    Raises:
        DtypeError, ShapeError: what was expected and what came.
    """
    if index.dtype != torch.int64:
        raise DtypeError(f"expected an int64 adapter index, got {index.dtype}")
    if index.dim() != 1 or groups < 1:
        raise ShapeError(f"expected an adapter index of shape [m] and groups >= 1, got {list(index.shape)}, {groups}")
    ordered, order = torch.sort(index, stable=True)
    edges = torch.arange(groups + 1, dtype=torch.int64, device=index.device)
    return Segments(index, order, torch.searchsorted(ordered, edges))


def dropout_bits(seed: Tensor, owner: Tensor, streams: Sequence[int], ps: Sequence[float], cols: int) -> Tensor:
    """The dropout decision of `philox`, each row with its own adapter's stream and probability.

    Args:
        seed: int64 [1]. owner: as in `Segments`. streams, ps: one an adapter. cols: k.

    Returns:
        uint8 [m, ceil(k/8)]: row i is row i of `philox.dropout_bits(seed, streams[e], m, k, ps[e])` with e = owner[i];
        0 where the row has no adapter.
    """
    where, rows, width = owner.device, owner.shape[0], (cols + 7) // 8
    # An adapter that drops nothing keeps every lane; a row without one keeps none (no 16-bit lane reaches 2^16).
    limits = torch.tensor([*map(philox.threshold, ps), philox.LANES], dtype=torch.int64).to(where)[owner][:, None]
    stream = torch.tensor([*streams, 0], dtype=torch.int64).to(where)[owner][:, None]
    row = torch.arange(rows, dtype=torch.int64, device=where)[:, None]
    column = torch.arange(width, dtype=torch.int64, device=where)[None, :]
    key = seed.to(where).reshape(())
    counter = (column, row & philox.MASK32, row >> 32, stream)
    words = philox.philox4x32(counter, (key & philox.MASK32, (key >> 32) & philox.MASK32), where)
    byte = torch.zeros((rows, width), dtype=torch.int64, device=where)
    for number, word in enumerate(words):
        byte |= ((word & 0xFFFF) >= limits).long() << 2 * number
        byte |= ((word >> 16) >= limits).long() << 2 * number + 1
    bits = byte.to(torch.uint8)
    if cols % 8 and width:
        bits[:, -1] &= (1 << cols % 8) - 1
    return bits
