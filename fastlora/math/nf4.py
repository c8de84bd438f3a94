"""The 4-bit codebooks and format (NF4, FP4, nested scales), in plain torch on any device. There is no second copy.

A weight of any shape is flattened row-major and cut into blocks of `blocksize` elements (the last may be partial):

    absmax = max|w| over the block (fp32)          inv  = 1 / max(absmax, 1e-38)
    code   = search(clamp(w * inv, -1, 1))         w'   = table[code] * absmax (fp32), rounded once to the output type

`search` counts the midpoints strictly below its argument, so a tie takes the lower code; NaN takes the highest one.
FP4 searches |x| the same way and sets bit 3 where `x < 0`. Element 2i is the high nibble of byte i; the pad nibble of
an odd count encodes 0.

Nested ("double") quantization stores absmax in 8 bits: `offset = mean(absmax)` (summed in fp64, rounded to fp32),
groups of 256, `absmax2 = max|absmax - offset|`, then the nearest entry of the dynamic map to
`(absmax - offset) * (1 / max(absmax2, 1e-38))`. It reads back as `round(map[u8] * absmax2) + offset`: two roundings,
no fused multiply-add.

NaN and infinities do not raise here; they behave as in bitsandbytes on a CPU. A block that holds NaN is NaN
throughout; one that holds an infinity has absmax inf, reads +inf where |w| was infinite and NaN elsewhere. A block of
zeros has absmax 0 and reads back +0.

Sources: T. Dettmers et al., "QLoRA" (2023), section 3; T. Dettmers et al., "8-bit Optimizers via Block-wise
Quantization" (2021) for the dynamic map. Codes, order and layout are those of bitsandbytes.
"""

from __future__ import annotations

from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from fastlora.errors import ConfigError, DtypeError, ShapeError

QUANT_TYPES = ("nf4", "fp4")
BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
NESTED_BLOCKSIZE = 256
SOURCE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OUTPUT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

# The smallest divisor: keeps 1/absmax finite for blocks of zeros and denormals.
TINY = 1e-38


def _bits(words: str) -> tuple[int, ...]:
    """Hex fp32 patterns as signed 32-bit integers, which is what torch can hold."""
    values = (int(word, 16) for word in words.split())
    return tuple(value - (1 << 32) if value >= 1 << 31 else value for value in values)


# Bit patterns of fp32 numbers: decimals would leave the last bit to each reader's parser.
NF4_BITS = _bits(
    "bf800000 bf3239b1 bf066b30 beca32a0 be91a24d be3d353f bdba7871 00000000 "
    "3da2faff 3e24cae3 3e7c04dd 3ead033a 3ee1a4b8 3f1007ab 3f3913b3 3f800000"
)
NF4_MID_BITS = _bits(
    "bf591cd8 bf1c5270 beeb8480 beadea76 be703cec be0d38bc bd3a7871 3d22faff "
    "3df64862 3e5067e0 3e9582d4 3ec753f9 3f006d04 3f248daf 3f5c89da"
)
# Bit 3 is the sign; index 8 is +0 as in bitsandbytes' code tensor.
FP4_BITS = _bits(
    "00000000 3baaaaab 3f2aaaab 3f800000 3eaaaaab 3f000000 3e2aaaab 3e800000 "
    "00000000 bbaaaaab bf2aaaab bf800000 beaaaaab bf000000 be2aaaab be800000"
)
FP4_MID_BITS = _bits("3b2aaaab 3db00000 3e555556 3e955556 3ed55556 3f155556 3f555556")  # between ordered magnitudes
FP4_ORDER = (0, 1, 6, 7, 4, 5, 2, 3)  # magnitude codes, smallest value first

# The 127 positive entries below 1 of the signed dynamic map; the negative ones mirror them, and 0 and 1 complete it.
# For e = 0..6 they are 10^(e-6) times the means of 2^e equal cells of [0.1, 1], evaluated in fp32 step by step, so
# that the last bits cannot be had from a better formula.
_DYNAMIC_BITS = _bits(
    "3513a3b7 365a1a94 370205ff 37b24206 38378034 388aefb3 38ba1f4b 3923d70b 398ce705 39c7e283 3a016f01 "
    "3a1eecc1 3a3c6a80 3a59e83e 3a7765ff 3aa7ef9d 3af1a9fc 3b1db22d 3b428f5c 3b676c8a 3b8624dd 3b989374 "
    "3bab020d 3bbd70a4 3bcfdf3b 3be24dd3 3bf4bc6a 3c039581 3c0ccccd 3c160418 3c1f3b64 3c3ae148 3c68f5c3 "
    "3c8b851f 3ca28f5d 3cb9999a 3cd0a3d7 3ce7ae15 3cfeb852 3d0ae148 3d166667 3d21eb85 3d2d70a3 3d38f5c3 "
    "3d447ae1 3d500000 3d5b851f 3d670a3d 3d728f5d 3d7e147b 3d84cccd 3d8a8f5d 3d9051eb 3d96147b 3d9bd70a "
    "3da1999a 3da75c2a 3dad1eb8 3db2e148 3db8a3d7 3dbe6667 3dc428f7 3dc9eb85 3ddb3334 3df80000 3e0a6666 "
    "3e18cccd 3e273333 3e35999a 3e440000 3e526666 3e60cccd 3e6f3333 3e7d9999 3e860000 3e8d3334 3e946666 "
    "3e9b999a 3ea2cccc 3eaa0000 3eb13333 3eb86666 3ebf999a 3ec6cccc 3ece0000 3ed53333 3edc6666 3ee3999a "
    "3eeacccc 3ef20000 3ef93332 3f003333 3f03cccc 3f076666 3f0b0000 3f0e999a 3f123334 3f15cccd 3f196666 "
    "3f1d0000 3f20999a 3f243334 3f27cccd 3f2b6666 3f2f0000 3f32999a 3f363334 3f39cccd 3f3d6666 3f410000 "
    "3f44999a 3f483333 3f4bcccd 3f4f6666 3f530000 3f56999a 3f5a3333 3f5dcccd 3f616666 3f650000 3f68999a "
    "3f6c3333 3f6fcccd 3f736666 3f770000 3f7a999a 3f7e3333"
)

# Elements worked on at once. On a CPU the temporaries then stay in the second-level cache; elsewhere fewer, larger
# launches are better. Multiples of every blocksize.
_CPU_CHUNK = 1 << 18
_DEVICE_CHUNK = 1 << 24


class PackedWeight(NamedTuple):
    """A quantized weight. fp32 parts are kept as bytes so that no `.to(dtype)` or sharding ever casts them."""

    packed: Tensor  # uint8 [ceil(numel/2), 1]; element 2i is the high nibble of byte i
    absmax: Tensor  # plain: uint8 [blocks, 4], the bytes of fp32; nested: uint8 [blocks], dynamic-map indices
    nested_absmax: Tensor | None  # uint8 [ceil(blocks/256), 4], bytes of fp32; None when absmax is plain
    nested_offset: Tensor | None  # uint8 [1, 4], bytes of fp32
    code: Tensor | None  # uint8 [16, 4], bytes of fp32: this tensor's own table; None for the standard one
    quant_type: str  # "nf4" or "fp4"
    blocksize: int
    shape: tuple[int, ...]  # of the dense weight

    @property
    def numel(self) -> int:
        """Elements of the dense weight."""
        return prod(self.shape)

    @property
    def blocks(self) -> int:
        """Number of scales."""
        return -(-self.numel // self.blocksize)

    @property
    def nested(self) -> bool:
        """Whether the scales themselves are 8-bit codes."""
        return self.nested_absmax is not None


# --- bytes and tables -------------------------------------------------------------------------------------------------


def as_bytes(t: Tensor) -> Tensor:
    """fp32 [...] -> uint8 [..., 4], the same memory where `t` is contiguous. Raises DtypeError for other dtypes."""
    if t.dtype != torch.float32:
        raise DtypeError(f"as_bytes expects torch.float32, got {t.dtype}")
    return t.contiguous().unsqueeze(-1).view(torch.uint8)


def as_fp32(t: Tensor) -> Tensor:
    """uint8 [..., 4] -> fp32 [...], the same memory where its layout allows. Raises DtypeError, ShapeError."""
    if t.dtype != torch.uint8:
        raise DtypeError(f"as_fp32 expects torch.uint8, got {t.dtype}")
    if t.dim() == 0 or t.shape[-1] != 4:
        raise ShapeError(f"as_fp32 expects a last dimension of 4 bytes, got shape {tuple(t.shape)}")
    if not t.is_contiguous() or t.storage_offset() % 4:  # fp32 views must start on a whole element
        t = t.clone(memory_format=torch.contiguous_format)
    return t.view(torch.float32).squeeze(-1)


def _tensor(bits: tuple[int, ...], device: torch.device | str | None) -> Tensor:
    # Built anew at each call: a cached one could be a fake tensor, or live on a device that is gone.
    return torch.tensor(bits, dtype=torch.int32, device=device if device is not None else "cpu").view(torch.float32)


def table(quant_type: str, device: torch.device | str | None = None) -> Tensor:
    """The sixteen values of a code, fp32 [16], on `device` (CPU by default)."""
    check_format(quant_type)
    return _tensor(NF4_BITS if quant_type == "nf4" else FP4_BITS, device)


def midpoints(quant_type: str, device: torch.device | str | None = None) -> Tensor:
    """Decision points, ascending: fp32 [15] between NF4's values, fp32 [7] between FP4's ordered magnitudes."""
    check_format(quant_type)
    return _tensor(NF4_MID_BITS if quant_type == "nf4" else FP4_MID_BITS, device)


def dynamic_map(device: torch.device | str | None = None) -> Tensor:
    """The signed 8-bit dynamic map, ascending, fp32 [256], zero at index 127."""
    negative = tuple(bits - (1 << 31) for bits in reversed(_DYNAMIC_BITS))
    return _tensor(negative + (0,) + _DYNAMIC_BITS + (0x3F800000,), device)


def dynamic_midpoints(device: torch.device | str | None = None) -> Tensor:
    """Decision points of the dynamic map, fp32 [255]: the exact middle of each pair, rounded towards -inf.

    For an fp32 x, `x > rounded down middle` holds exactly when x is nearer to the upper entry: the search is the
    true nearest one, and an exact tie takes the lower index.
    """
    entries = dynamic_map().double()
    exact = (entries[:-1] + entries[1:]) / 2  # 25 bits at most: exact in fp64
    near = exact.float()
    below = torch.nextafter(near, torch.full_like(near, -torch.inf))
    return torch.where(near.double() > exact, below, near).to(device if device is not None else "cpu")


def absmax_on_grid(absmax: Tensor) -> bool:
    """Whether every finite scale in `absmax` (fp32) is a bf16 value, as after quantizing a bf16 weight.

    Merging a small adapter into such a weight rounds part of it away. Reads the tensor's values: one host sync.
    """
    if absmax.dtype != torch.float32:
        raise DtypeError(f"absmax_on_grid expects torch.float32, got {absmax.dtype}")
    return bool(((absmax == absmax.bfloat16().float()) | ~absmax.isfinite()).all())


# --- checks -----------------------------------------------------------------------------------------------------------


def check_format(quant_type: str, blocksize: int = 64) -> None:
    """Raises ConfigError unless both are known."""
    if quant_type not in QUANT_TYPES:
        raise ConfigError(f"quant_type must be one of {', '.join(QUANT_TYPES)}, got {quant_type!r}")
    if blocksize not in BLOCKSIZES:
        raise ConfigError(f"blocksize must be one of {', '.join(map(str, BLOCKSIZES))}, got {blocksize!r}")


def _check_part(name: str, part: Tensor | None, shape: tuple[int, ...]) -> None:
    if part is None:
        raise ShapeError(f"{name}: expected uint8 {list(shape)}, got None")
    if part.dtype != torch.uint8:
        raise DtypeError(f"{name}: expected torch.uint8, got {part.dtype}")
    if tuple(part.shape) != shape:
        raise ShapeError(f"{name}: expected shape {list(shape)}, got {list(part.shape)}")


def check_absmax(weight: PackedWeight) -> None:
    """Raises unless the scales of `weight` have the shapes and dtypes its `shape` and `blocksize` call for."""
    check_format(weight.quant_type, weight.blocksize)
    if weight.nested_absmax is None:
        _check_part("absmax", weight.absmax, (weight.blocks, 4))
        if weight.nested_offset is not None:
            raise ShapeError("nested_offset: expected None beside plain scales (nested_absmax is None), got a tensor")
        return
    _check_part("absmax", weight.absmax, (weight.blocks,))
    _check_part("nested_absmax", weight.nested_absmax, (-(-weight.blocks // NESTED_BLOCKSIZE), 4))
    _check_part("nested_offset", weight.nested_offset, (1, 4))


def check_packed(weight: PackedWeight) -> None:
    """Raises ConfigError, DtypeError or ShapeError, with expected and actual, unless `weight` is consistent."""
    check_absmax(weight)
    _check_part("packed", weight.packed, ((weight.numel + 1) // 2, 1))
    if weight.code is not None:
        _check_part("code", weight.code, (16, 4))


# --- quantize ---------------------------------------------------------------------------------------------------------


def _chunk(device: torch.device) -> int:
    return _CPU_CHUNK if device.type == "cpu" else _DEVICE_CHUNK


def _count_below(x: Tensor, points: Tensor) -> Tensor:
    """How many of the ascending `points` are strictly below each x; NaN counts them all. fp32 [...] -> uint8 [...]."""
    if x.device.type != "cpu":
        return torch.bucketize(x, points, out_int32=True).to(torch.uint8)
    # Vectorised compares beat torch's scalar binary search 2.5 times on a CPU. "not <=" rather than ">" for NaN.
    count = torch.full(x.shape, points.numel(), dtype=torch.uint8, device=x.device)
    at_most = torch.empty(x.shape, dtype=torch.bool, device=x.device)
    for point in points.tolist():
        torch.le(x, point, out=at_most)
        count.sub_(at_most.view(torch.uint8))
    return count


def _search(x: Tensor, quant_type: str) -> Tensor:
    """Code of each normalised x: fp32 [...] in [-1, 1] or NaN -> uint8 [...] in 0..15."""
    points = midpoints(quant_type, x.device)
    if quant_type == "nf4":
        return _count_below(x, points)
    magnitude = _count_below(x.abs(), points)
    order = torch.tensor(FP4_ORDER, dtype=torch.uint8, device=x.device)
    return order.index_select(0, magnitude.flatten().int()).view(x.shape) | (x < 0).to(torch.uint8).mul_(8)


def _quantize_rows(rows: Tensor, quant_type: str, absmax: Tensor, packed: Tensor) -> None:
    """Whole blocks, or one partial block: rows [blocks, elements] -> absmax fp32 [blocks], packed uint8 [bytes]."""
    x = rows.float()
    torch.amax(x.abs(), dim=1, out=absmax)
    inv = absmax.clamp(min=TINY).reciprocal_()
    codes = _search((x * inv[:, None]).clamp_(-1, 1), quant_type).flatten()
    high, low = codes[0::2], codes[1::2]
    torch.bitwise_left_shift(high, 4, out=packed)
    packed[: low.numel()] |= low
    if high.numel() > low.numel():
        packed[-1:] |= 7 if quant_type == "nf4" else 0


def quantize_blocks(w: Tensor, quant_type: str = "nf4", blocksize: int = 64) -> tuple[Tensor, Tensor]:
    """Quantize a weight of any shape.

    Args:
        w: fp32, bf16 or fp16, flattened row-major (copied first if not contiguous).

    Returns:
        packed uint8 [ceil(numel/2), 1] and absmax fp32 [ceil(numel/blocksize)], on w's device.

    Raises:
        ConfigError, DtypeError. NaN and inf do not raise: check `absmax.isfinite()`.
    """
    check_format(quant_type, blocksize)
    if w.dtype not in SOURCE_DTYPES:
        names = ", ".join(str(dtype) for dtype in SOURCE_DTYPES)
        raise DtypeError(f"only {names} can be quantized, got {w.dtype}")
    flat = w.detach().reshape(-1)
    count = flat.numel()
    packed = torch.empty(((count + 1) // 2, 1), dtype=torch.uint8, device=w.device)
    absmax = torch.empty((-(-count // blocksize),), dtype=torch.float32, device=w.device)
    whole, step = count - count % blocksize, _chunk(w.device)
    spans = [(start, min(start + step, whole), blocksize) for start in range(0, whole, step)]
    if whole < count:
        spans.append((whole, count, count - whole))
    for start, stop, row in spans:
        scales = absmax[start // blocksize : -(-stop // blocksize)]
        _quantize_rows(flat[start:stop].view(-1, row), quant_type, scales, packed[start // 2 : (stop + 1) // 2, 0])
    return packed, absmax


def quantize_absmax(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Nested quantization of the scales.

    Args:
        absmax: fp32 [blocks].

    Returns:
        codes uint8 [blocks], nested_absmax fp32 [ceil(blocks/256)], offset fp32 [1].
    """
    if absmax.dtype != torch.float32:
        raise DtypeError(f"absmax: expected torch.float32, got {absmax.dtype}")
    if absmax.dim() != 1:
        raise ShapeError(f"absmax: expected 1 dimension, got shape {list(absmax.shape)}")
    blocks = absmax.numel()
    groups = -(-blocks // NESTED_BLOCKSIZE)
    if not blocks:
        return absmax.new_empty(0, dtype=torch.uint8), absmax.new_empty(0), absmax.new_zeros(1)
    # fp64: any order of summation then gives the same fp32 offset, so backends can agree on it.
    offset = absmax.mean(dtype=torch.float64).float().reshape(1)
    centred = absmax.new_zeros(groups * NESTED_BLOCKSIZE)  # padding adds |0| to a maximum: no effect
    torch.sub(absmax, offset, out=centred[:blocks])
    centred = centred.view(groups, NESTED_BLOCKSIZE)
    nested_absmax = centred.abs().amax(dim=1)
    centred.mul_(nested_absmax.clamp(min=TINY).reciprocal_()[:, None])
    points = dynamic_midpoints(absmax.device)
    codes = torch.bucketize(centred.view(-1)[:blocks], points, out_int32=True).to(torch.uint8)
    return codes, nested_absmax, offset


def pack(w: Tensor, quant_type: str = "nf4", blocksize: int = 64, double_quant: bool = False) -> PackedWeight:
    """`quantize_blocks`, and `quantize_absmax` where asked for, as one PackedWeight."""
    packed, absmax = quantize_blocks(w, quant_type, blocksize)
    if not double_quant:
        return PackedWeight(packed, as_bytes(absmax), None, None, None, quant_type, blocksize, tuple(w.shape))
    codes, nested_absmax, offset = quantize_absmax(absmax)
    nested = (codes, as_bytes(nested_absmax), as_bytes(offset))
    return PackedWeight(packed, *nested, None, quant_type, blocksize, tuple(w.shape))


# --- dequantize -------------------------------------------------------------------------------------------------------


def expand_absmax(weight: PackedWeight) -> Tensor:
    """The scales of a weight as fp32 [blocks]: a view of plain ones, computed from nested ones."""
    check_absmax(weight)
    if weight.nested_absmax is None or weight.nested_offset is None:
        return as_fp32(weight.absmax)
    scales = dynamic_map(weight.absmax.device).index_select(0, weight.absmax.int())
    per_block = as_fp32(weight.nested_absmax).repeat_interleave(NESTED_BLOCKSIZE)[: scales.numel()]
    return scales.mul_(per_block).add_(as_fp32(weight.nested_offset))  # two ops: two roundings


def _pair_table(weight: PackedWeight) -> Tensor:
    """Both values of each possible byte, as one 8-byte entry, so that one gather decodes two elements: int64 [256]."""
    device = weight.packed.device
    values = table(weight.quant_type, device) if weight.code is None else as_fp32(weight.code)
    pairs = torch.empty((16, 16, 2), dtype=torch.float32, device=device)
    pairs[:, :, 0], pairs[:, :, 1] = values[:, None], values[None, :]
    return pairs.view(torch.int64).view(256)


def dequantize(weight: PackedWeight, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """Decode a weight: fp32(code) * absmax, rounded once (to nearest even) to `dtype`.

    Args:
        dtype: fp32, bf16, fp16, or fp64 (the fp32 product, cast up).
        out: written and returned if given; shape `weight.shape`, dtype `dtype`, the weight's device.

    Raises:
        ConfigError, DtypeError, ShapeError: an inconsistent weight, dtype or `out`.
    """
    check_packed(weight)
    if dtype not in OUTPUT_DTYPES:
        names = ", ".join(str(known) for known in OUTPUT_DTYPES)
        raise DtypeError(f"a weight decodes to {names}, got {dtype}")
    device = weight.packed.device
    if out is None:
        out = torch.empty(weight.shape, dtype=dtype, device=device)
    elif tuple(out.shape) != tuple(weight.shape):
        raise ShapeError(f"out: expected shape {list(weight.shape)}, got {list(out.shape)}")
    elif out.dtype != dtype or out.device != device:
        raise DtypeError(f"out: expected {dtype} on {device}, got {out.dtype} on {out.device}")
    if not out.is_contiguous():
        return out.copy_(dequantize(weight, dtype))
    absmax, pairs = expand_absmax(weight), _pair_table(weight)
    flat, data = out.detach().view(-1), weight.packed.view(-1)
    count, size = weight.numel, weight.blocksize
    whole, step = count - count % size, 2 * _chunk(device)
    for start in range(0, count, step):
        stop = min(start + step, count)
        values = pairs.index_select(0, data[start // 2 : (stop + 1) // 2].int()).view(torch.float32)
        full = min(stop, whole)
        blocks = absmax[start // size : full // size, None]
        torch.mul(values[: full - start].view(-1, size), blocks, out=flat[start:full].view(-1, size))
        if full < stop:
            torch.mul(values[full - start : stop - start], absmax[-1], out=flat[full:stop])
    return out
