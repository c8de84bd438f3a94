"""The pinned tiles of the products over a dense weight, and which one a device and an output get."""

from __future__ import annotations

import torch

from fastlora.backends.triton.launch import Target, Tile, cdiv

# Candidates from large to small, each with its speed per element relative to the largest one.
_HALF = {
    "sm_80": ((Tile(128, 128, 32, 8, 4), 1.0), (Tile(64, 128, 32, 4, 4), 0.8), (Tile(64, 64, 64, 4, 3), 0.6)),
    "sm_89": ((Tile(128, 128, 32, 8, 3), 1.0), (Tile(64, 64, 64, 4, 3), 0.7)),
    "sm_90": (
        (Tile(128, 256, 64, 8, 3), 1.0),
        (Tile(128, 128, 64, 4, 4), 0.85),
        (Tile(64, 128, 64, 4, 4), 0.7),
        (Tile(64, 64, 64, 4, 4), 0.5),
    ),
    "sm_100": (
        (Tile(128, 256, 64, 8, 3), 1.0),
        (Tile(128, 128, 64, 8, 4), 0.8),
        (Tile(64, 128, 64, 4, 4), 0.6),
        (Tile(64, 64, 64, 4, 3), 0.4),
    ),
    "gfx942": ((Tile(128, 128, 32, 8, 2), 1.0), (Tile(64, 128, 64, 4, 2), 0.8), (Tile(64, 64, 64, 4, 2), 0.5)),
}
_SINGLE = {
    "sm_80": ((Tile(64, 128, 32, 8, 3), 1.0), (Tile(64, 64, 32, 8, 3), 0.8)),
    "sm_89": ((Tile(64, 128, 32, 8, 2), 1.0), (Tile(64, 64, 32, 4, 2), 0.8)),
    "sm_90": ((Tile(128, 128, 32, 8, 3), 1.0), (Tile(64, 64, 32, 4, 3), 0.7)),
    "sm_100": ((Tile(128, 64, 32, 8, 2), 1.0), (Tile(64, 64, 32, 4, 3), 0.8)),  # three products in tensor memory
    "gfx942": ((Tile(128, 128, 32, 4, 2), 1.0), (Tile(64, 64, 32, 4, 2), 0.7)),
}
# Rows that no asynchronous copy can read: registers hold the tiles in flight, fewer beside much else.
_UNALIGNED, _UNALIGNED_HEAVY, _UNALIGNED_MOST = (
    Tile(128, 128, 32, 8, 3),
    Tile(128, 64, 32, 8, 3),
    Tile(64, 64, 32, 8, 3),
)
_INTERPRETED = Tile(16, 32, 32, 1, 1)
# Two outputs, each with its bias, factor and low-rank term, leave room for fewer stages or smaller tiles.
_TWO_OUTPUTS = {
    "sm_90": ((Tile(128, 256, 64, 8, 2), 1.0), (Tile(64, 128, 64, 4, 4), 0.75), (Tile(64, 64, 64, 4, 4), 0.55)),
    "sm_100": ((Tile(64, 128, 64, 4, 4), 1.0), (Tile(64, 64, 64, 4, 3), 0.65)),
}


def family(at: Target) -> str:
    """The table's row that serves a device: its own, or the nearest older one."""
    if at.kind == "hip":
        return "gfx942"
    for name in ("sm_100", "sm_90", "sm_89", "sm_80"):
        if at.arch >= int(name[3:]):
            return "sm_89" if name == "sm_100" and at.arch >= 120 else name  # 12x: consumer parts, small shared memory
    return "sm_80"


def tile_linear(
    at: Target,
    m: int,
    columns: int,
    dtype: torch.dtype,
    tma: bool,
    *,
    masked: bool = False,
    scaled: bool = False,
    two: bool = False,
) -> Tile:
    """The tile of an [m, columns] output that wastes least in its last wave.

    Independent of the rank, so that a layer with B = 0 sums exactly as the frozen one does. A heavy epilogue (`masked`,
    or `two` outputs) does not fit the registers beside the largest tile, but for sm_90; an operand `scaled` on its way
    does not fit Blackwell's tensor memory.
    """
    if at.kind == "interpreter":
        return _INTERPRETED
    blackwell = at.kind == "cuda" and at.arch >= 100
    table, heavy = _SINGLE if dtype == torch.float32 else _HALF, masked or two or (scaled and blackwell)
    if at.kind == "cuda" and at.arch >= 90 and not tma:
        if two and blackwell and dtype == torch.float32:
            return _UNALIGNED_MOST
        return _UNALIGNED_HEAVY if heavy or dtype == torch.float32 else _UNALIGNED

    def seconds(item: tuple[Tile, float]) -> float:
        tile, speed = item
        waves = cdiv(cdiv(m, tile.BLOCK_M) * cdiv(columns, tile.BLOCK_N), at.sms)
        return waves * tile.BLOCK_M * tile.BLOCK_N / speed

    candidates = table[family(at)][1:] if heavy and at.arch != 90 else table[family(at)]
    if two and dtype != torch.float32:
        candidates = _TWO_OUTPUTS.get(family(at), candidates)
    return min(candidates, key=seconds)[0]
