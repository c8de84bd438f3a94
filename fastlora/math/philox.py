"""Dropout as a specification: which elements are kept is a function of (seed, stream, row, column) alone.

Philox4x32-10 with

    key     = (seed low 32 bits, seed high 32 bits)
    counter = (column >> 3, row low 32 bits, row high 32 bits, stream)

Each call yields four 32-bit words, that is eight 16-bit lanes: lane j is half `j & 1` (low half first) of word
`j >> 1`, and decides column `8 * (column >> 3) + j`. An element is kept iff `lane >= threshold(p)`. The mask is
stored as bits: bit j (least significant first) of byte `[row, column >> 3]`; 1 means kept, bits beyond the last
column are 0. The scale `keep_scale(p)` is exact for the probability in force, `1 - threshold / 65536`.

So a mask does not depend on block sizes, launch order or device, and can be redrawn from its seed.

Source: J. Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastlora.config import SEED_END
from fastlora.errors import ConfigError, DtypeError, ShapeError

LANES = 1 << 16  # values of a 16-bit lane
ROUNDS = 10
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
MASK32 = 0xFFFFFFFF

# Philox calls worked on at once: a handful of int64 temporaries of this length fit the second-level cache.
_CPU_CHUNK = 1 << 14
_DEVICE_CHUNK = 1 << 22

Word = Tensor | int  # unsigned 32 bits, held in an int64 tensor or a Python int


def threshold(p: float) -> int:
    """First 16-bit lane that is kept, `min(65535, floor(p * 65536 + 0.5))`. Raises ConfigError unless 0 <= p < 1."""
    if not 0.0 <= p < 1.0:
        raise ConfigError(f"a dropout probability must be at least 0 and below 1, got {p!r}")
    return min(LANES - 1, int(p * LANES + 0.5))


def keep_scale(p: float) -> float:
    """What kept values are multiplied by: 65536 / (65536 - threshold(p))."""
    return LANES / (LANES - threshold(p))


def _product(value: Tensor, multiplier: int) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a 32 x 32 bit product. int64 holds 63 bits, so multiply by 16 bits at a time."""
    low = value * (multiplier & 0xFFFF)  # below 2^48
    high = value * (multiplier >> 16) + (low >> 16)  # below 2^49
    return high >> 16, (high & 0xFFFF) << 16 | low & 0xFFFF


def philox4x32(
    counter: tuple[Word, Word, Word, Word], key: tuple[Word, Word], device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ten rounds of Philox4x32.

    Args:
        counter: four words, each an int64 tensor or an int in [0, 2^32); they broadcast.
        key: two words, likewise.

    Returns:
        Four int64 tensors of the broadcast shape, values in [0, 2^32).
    """
    tensors = [torch.as_tensor(word, dtype=torch.int64, device=device) for word in counter]
    c0, c1, c2, c3 = torch.broadcast_tensors(*tensors)
    k0, k1 = key
    for _ in range(ROUNDS):
        high0, low0 = _product(c0, MULTIPLIERS[0])
        high1, low1 = _product(c2, MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + WEYL[0]) & MASK32, (k1 + WEYL[1]) & MASK32
    return c0, c1, c2, c3


def _key(seed: int | Tensor) -> tuple[Word, Word, torch.device | None]:
    """Key words, and the seed's device if it is a tensor. Never reads a tensor's value."""
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64:
            raise DtypeError(f"seed: expected torch.int64, got {seed.dtype}")
        if seed.numel() != 1:
            raise ShapeError(f"seed: expected one element, got shape {list(seed.shape)}")
        value = seed.reshape(())
        return value & MASK32, (value >> 32) & MASK32, seed.device
    if not 0 <= seed < SEED_END:
        raise ConfigError(f"seed must be in [0, 2^63 - 1), got {seed}")
    return seed & MASK32, seed >> 32, None


def dropout_bits(
    seed: int | Tensor,
    stream: int,
    rows: int,
    cols: int,
    p: float,
    device: torch.device | str | None = None,
    row_offset: int = 0,
) -> Tensor:
    """Draw a mask.

    Args:
        seed: int in [0, 2^63 - 1), or an int64 tensor of one element (no host sync).
        stream: number of the projection or adapter, in [0, 2^32).
        rows, cols: size of the mask.
        p: probability of dropping, in [0, 1).
        device: of the result; by default the seed's if it is a tensor, else the CPU.
        row_offset: number of the first row; rows are numbered below 2^63.

    Returns:
        uint8 [rows, ceil(cols/8)].
    """
    limit = threshold(p)
    if not 0 <= stream <= MASK32:
        raise ConfigError(f"stream must be in [0, 2^32), got {stream}")
    if rows < 0 or cols < 0 or row_offset < 0:
        raise ShapeError(f"rows, cols and row_offset must not be negative, got {rows}, {cols} and {row_offset}")
    k0, k1, home = _key(seed)
    where = torch.device(device if device is not None else home if home is not None else "cpu")
    width = (cols + 7) // 8
    bits = torch.empty((rows, width), dtype=torch.uint8, device=where)
    if not bits.numel():
        return bits
    if isinstance(k0, Tensor) and isinstance(k1, Tensor):
        k0, k1 = k0.to(where), k1.to(where)
    group = torch.arange(width, dtype=torch.int64, device=where)[None, :]
    step = max(1, (_CPU_CHUNK if where.type == "cpu" else _DEVICE_CHUNK) // width)
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        row = torch.arange(row_offset + start, row_offset + stop, dtype=torch.int64, device=where)[:, None]
        words = philox4x32((group, row & MASK32, row >> 32, stream), (k0, k1), where)
        byte = torch.zeros((stop - start, width), dtype=torch.int64, device=where)
        for index, word in enumerate(words):
            byte |= ((word & 0xFFFF) >= limit).long() << 2 * index
            byte |= ((word >> 16) >= limit).long() << 2 * index + 1
        bits[start:stop] = byte
    if cols % 8:
        bits[:, -1] &= (1 << cols % 8) - 1
    return bits


def unpack_bits(bits: Tensor, cols: int) -> Tensor:
    """uint8 [rows, ceil(cols/8)] -> bool [rows, cols], True where kept."""
    if bits.dtype != torch.uint8:
        raise DtypeError(f"bits: expected torch.uint8, got {bits.dtype}")
    if bits.dim() != 2 or bits.shape[1] != (cols + 7) // 8:
        raise ShapeError(f"bits: expected shape [rows, {(cols + 7) // 8}] for {cols} columns, got {list(bits.shape)}")
    lane = torch.arange(8, dtype=torch.uint8, device=bits.device)
    kept = (bits[:, :, None] >> lane) & 1
    return kept.view(bits.shape[0], 8 * bits.shape[1])[:, :cols].bool()


def pack_bits(mask: Tensor) -> Tensor:
    """bool [rows, cols] -> uint8 [rows, ceil(cols/8)]; the inverse of `unpack_bits`."""
    if mask.dtype != torch.bool:
        raise DtypeError(f"mask: expected torch.bool, got {mask.dtype}")
    if mask.dim() != 2:
        raise ShapeError(f"mask: expected 2 dimensions, got shape {list(mask.shape)}")
    rows, cols = mask.shape
    width = (cols + 7) // 8
    lanes = mask.new_zeros((rows, 8 * width), dtype=torch.uint8)
    lanes[:, :cols] = mask
    lanes = lanes.view(rows, width, 8)
    bits = mask.new_zeros((rows, width), dtype=torch.uint8)
    for lane in range(8):
        bits |= lanes[:, :, lane] << lane
    return bits
