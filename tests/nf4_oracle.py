"""The 4-bit format once more, flat and in numpy: what the tests of nf4 compare with. Shares no code with fastlora."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fastlora.math.nf4 import PackedWeight, as_bytes

# fmt: off
NF4 = np.array(
    [-1, -.6961928009986877, -.5250730514526367, -.39491748809814453, -.28444138169288635, -.18477343022823334,
     -.09105003625154495, 0, .07958029955625534, .16093020141124725, .24611230194568634, .33791524171829224,
     .44070982933044434, .5626170039176941, .7229568362236023, 1],
    dtype=np.float32,
)
# fmt: on
_MAGNITUDES = np.array([0, 0.0625, 8, 12, 4, 6, 2, 3], dtype=np.float32) / np.float32(12)
CODES = {"nf4": NF4, "fp4": np.concatenate([_MAGNITUDES, -_MAGNITUDES])}


def oracle_codes(flat: np.ndarray, absmax: np.ndarray, quant_type: str, blocksize: int) -> np.ndarray:
    """fp32 [n] -> code of each element."""
    with np.errstate(all="ignore"):
        inv = np.float32(1) / np.maximum(absmax, np.float32(1e-38))
        x = flat * np.repeat(inv, blocksize)[: flat.size]
    table = CODES[quant_type]
    if quant_type == "nf4":
        middles = (table[:-1] + table[1:]) / np.float32(2)
        return np.searchsorted(middles, np.clip(x, -1, 1), side="left")
    order = np.argsort(table[:8])
    middles = (table[order][:-1] + table[order][1:]) / np.float32(2)
    return order[np.searchsorted(middles, np.clip(np.abs(x), 0, 1), side="left")] + 8 * (x < 0)


def oracle_absmax(flat: np.ndarray, blocksize: int) -> np.ndarray:
    return np.array([np.abs(flat[i : i + blocksize]).max() for i in range(0, flat.size, blocksize)], dtype=np.float32)


def oracle_unpack(packed: Tensor, count: int) -> np.ndarray:
    data = packed.numpy().ravel()
    return np.stack([data >> 4, data & 15], axis=1).ravel()[:count]


def oracle_values(packed: Tensor, absmax: Tensor, quant_type: str, blocksize: int, count: int) -> Tensor:
    """The fp32 values, before the one rounding."""
    values = CODES[quant_type][oracle_unpack(packed, count)]
    with np.errstate(invalid="ignore"):
        return torch.from_numpy(values * np.repeat(absmax.numpy(), blocksize)[:count])


def random_packed(shape: tuple[int, ...], quant_type: str = "nf4", blocksize: int = 64) -> PackedWeight:
    """Every code and many magnitudes of scales, without quantizing."""
    generator = torch.Generator().manual_seed(len(shape) + blocksize)
    count = int(np.prod(shape))
    packed = torch.randint(0, 256, ((count + 1) // 2, 1), dtype=torch.uint8, generator=generator)
    blocks = -(-count // blocksize)
    absmax = (
        torch.rand(blocks, generator=generator) * 10 ** torch.randint(-3, 3, (blocks,), generator=generator).float()
    )
    return PackedWeight(packed, as_bytes(absmax), None, None, None, quant_type, blocksize, shape)


def same(actual: Tensor, expected: Tensor) -> bool:
    """Equal, NaN where NaN."""
    return actual.dtype == expected.dtype and bool(((actual == expected) | (actual.isnan() & expected.isnan())).all())
