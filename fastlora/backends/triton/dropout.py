"""Dropout masks as bits: the specification of math/philox.py."""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from fastlora.backends.triton.launch import Target, Tile, cdiv, entry, launch, target
from fastlora.backends.triton.primitives import draw_bits, offsets
from fastlora.backends.triton.weight import INT32_END
from fastlora.math import philox


@entry
def _mask_kernel(
    seed_ptr,
    out_ptr,
    stream,
    threshold,
    row_offset,
    m,
    k,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WIDE: tl.constexpr,
):
    """out[i, g] = the eight keep bits of row row_offset + i, columns 8g .. 8g + 7."""
    pid = tl.program_id(0)
    width = tl.cdiv(k, 8)
    blocks = tl.cdiv(width, BLOCK_K)
    rows = (pid // blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    groups = (pid % blocks) * BLOCK_K + tl.arange(0, BLOCK_K)
    bits = draw_bits(seed_ptr, stream, threshold, rows.to(tl.int64) + row_offset, groups, k)
    # [BLOCK_M, BLOCK_K]
    tl.store(out_ptr + offsets(rows, width, groups, WIDE), bits, mask=(rows < m)[:, None] & (groups < width)[None, :])


def tile_mask(target: Target) -> Tile:
    """BLOCK_M rows by BLOCK_K bytes."""
    if target.kind == "interpreter":
        return Tile(BLOCK_M=16, BLOCK_K=16)
    return Tile(BLOCK_M=4, BLOCK_K=128, num_warps=4)


def dropout_mask(
    seed: Tensor,
    stream: int,
    rows: int,
    cols: int,
    p: float,
    device: torch.device,
    row_offset: int = 0,
    *,
    wide: bool | None = None,
) -> Tensor:
    """Bits of `math.philox.dropout_bits`: uint8 [rows, ceil(cols/8)].

    Args:
        seed: int64 [1] on `device`.
        stream: in [0, 2^32).
        row_offset: number of the first row.
        wide: force 64-bit offsets.
    """
    width = cdiv(cols, 8)
    out = torch.empty((rows, width), dtype=torch.uint8, device=device)
    tile = tile_mask(target(device))
    launch(
        _mask_kernel,
        (cdiv(rows, tile.BLOCK_M) * cdiv(width, tile.BLOCK_K),),
        seed,
        out,
        stream,
        philox.threshold(p),
        row_offset,
        rows,
        cols,
        num_warps=tile.num_warps,
        BLOCK_M=tile.BLOCK_M,
        BLOCK_K=tile.BLOCK_K,
        WIDE=(rows + tile.BLOCK_M) * width >= INT32_END if wide is None else wide,
    )
    return out
