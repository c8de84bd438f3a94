"""The CUDA backend: 4-bit weights and few tokens, over the compiled library (csrc/cuda).

What it computes is written in the ops' contract; how, in csrc/cuda: format.h (dequantize, merge, DoRA's norm, quantize,
dropout bits), skinny.h and finish.h (the forward of up to 64 tokens: two launches, adapter included), transposed.h (dx
of up to 16). No GPU has timed it yet, so nothing chooses it by itself: `backend="cuda"` does.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlora import settings
from fastlora.backends import _cuda_library
from fastlora.dispatch import cost
from fastlora.dispatch.registry import Kernel, Limits, register
from fastlora.errors import DtypeError
from fastlora.math import nf4, philox
from fastlora.math.nf4 import PackedWeight
from fastlora.problem import BIAS, DORA, DROPOUT, LAZY_H, NEED_DX, SAVE_MASK, SHARED, TRAIN, Problem

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_KINDS = {"nf4": 1, "fp4": 2}
SKINNY_TOKENS = 64
DX_TOKENS = 16  # its products run without tensor cores
# csrc/cuda: rows of w (columns of k) a block, columns (rows) a slice is a multiple of.
_FORWARD_ROWS, _FORWARD_UNIT = 64, 256
_DX_COLUMNS, _DX_UNIT = 256, 64
_PROGRAMS = 4  # blocks a multiprocessor should get, so that one decodes while others wait for memory

WeightFields = tuple[int, int, int, int, int, int, int, int]


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


def _address(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def _f32(t: Tensor | None, keep: list[Tensor]) -> int:
    """Address of the fp32 values behind a part kept as bytes; a misaligned one is copied into `keep`."""
    if t is None:
        return 0
    values = nf4.as_fp32(t)
    keep.append(values)
    return values.data_ptr()


def _weight(weight: PackedWeight, keep: list[Tensor]) -> WeightFields:
    """The record's fields for a packed weight; `keep` holds what must outlive the call."""
    packed, scales = weight.packed.contiguous(), weight.absmax
    nested = weight.nested_absmax is not None
    if nested:
        scales = scales.contiguous()
    keep += [packed, scales]
    return (
        _KINDS[weight.quant_type],
        weight.blocksize,
        packed.data_ptr(),
        0 if nested else _f32(scales, keep),
        scales.data_ptr() if nested else 0,
        _f32(weight.nested_absmax, keep),
        _f32(weight.nested_offset, keep),
        _f32(weight.code, keep),
    )


def _call(op: str, like: Tensor, **fields: Any) -> None:
    """Start an op on the current stream of the device of `like`."""
    library = _cuda_library.library()
    if not like.is_cuda:  # the emulated library of the tests
        library.call(op, _cuda_library.pack(**fields))
        return
    index = like.get_device()
    stream = torch.cuda.current_stream(index).cuda_stream
    away = index != torch.cuda.current_device()
    with torch.cuda.device(index) if away else contextlib.nullcontext():
        library.call(op, _cuda_library.pack(device=index, stream=stream, **fields))


def _splits(like: Tensor, blocks: int, units: int) -> int:
    """Slices of a reduction: enough blocks for the device, none empty."""
    processors = torch.cuda.get_device_properties(like.device).multi_processor_count if like.is_cuda else 1
    wanted = max(1, _PROGRAMS * processors // max(1, blocks))
    return _cdiv(units, _cdiv(units, min(wanted, units))) if units else 1


# --- format ops -------------------------------------------------------------------------------------------------------


def quantize(problem: Problem, w: Tensor, quant_type: str, blocksize: int) -> tuple[Tensor, Tensor]:
    """w fp32/bf16/fp16, any shape -> packed uint8 [ceil(numel/2), 1], absmax fp32 [blocks]; bits of math.nf4."""
    count = w.numel()
    packed = torch.empty(((count + 1) // 2, 1), dtype=torch.uint8, device=w.device)
    absmax = torch.empty((_cdiv(count, blocksize),), dtype=torch.float32, device=w.device)
    if count:
        fields = {"k": count, "dtype": _DTYPES[w.dtype], "weight": (_KINDS[quant_type], blocksize, 0, 0, 0, 0, 0, 0)}
        fields |= {"x": w.data_ptr(), "out_bytes": packed.data_ptr(), "out_scales": absmax.data_ptr()}
        _call("quantize", w, **fields)
    return packed, absmax


def quantize_absmax(problem: Problem, absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """absmax fp32 [blocks] -> codes uint8 [blocks], nested_absmax fp32 [ceil(blocks/256)], offset fp32 [1]."""
    scales, count, device = absmax.contiguous(), absmax.numel(), absmax.device
    codes = torch.empty((count,), dtype=torch.uint8, device=device)
    nested = torch.empty((_cdiv(count, nf4.NESTED_BLOCKSIZE),), dtype=torch.float32, device=device)
    if not count:
        return codes, nested, torch.zeros(1, device=device)
    offset = scales.mean(dtype=torch.float64).float().reshape(1)  # as in math.nf4
    fields = {"k": count, "weight": (0, 0, 0, 0, 0, 0, offset.data_ptr(), 0), "x": scales.data_ptr()}
    _call("quantize_absmax", scales, **fields, out_bytes=codes.data_ptr(), out_scales=nested.data_ptr())
    return codes, nested, offset


def dequantize(problem: Problem, weight: PackedWeight, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """Decode a weight of any shape to fp32, bf16 or fp16: fp32 code * absmax, rounded once. Bits of math.nf4."""
    nf4.check_packed(weight)
    if out is not None and not out.is_contiguous():
        return out.copy_(dequantize(problem, weight, dtype))
    if out is None:
        out = torch.empty(weight.shape, dtype=dtype, device=weight.packed.device)
    if weight.numel:
        keep: list[Tensor] = []
        fields = {"k": weight.numel, "dtype": _DTYPES[dtype], "weight": _weight(weight, keep), "y": out.data_ptr()}
        _call("dequantize", out, **fields)
    return out


def dropout_mask(problem: Problem, seed: Tensor, stream: int, p: float) -> Tensor:
    """The keep bits of seed int64 [1] for x [m, k]: uint8 [m, ceil(k/8)]. Bits of math.philox."""
    mask = torch.empty((problem.m, _cdiv(problem.k, 8)), dtype=torch.uint8, device=seed.device)
    if mask.numel():
        fields = {"m": problem.m, "k": problem.k, "threshold": philox.threshold(p), "stream_number": stream}
        _call("dropout_mask", seed, **fields, seed=seed.data_ptr(), out_bytes=mask.data_ptr())
    return mask


# --- adapter ops ------------------------------------------------------------------------------------------------------


def _adapter_fields(
    problem: Problem, a: Tensor, b: Tensor, scale: float, mag: Tensor | None, norm: Tensor | None
) -> dict[str, Any]:
    fields = {"m": problem.m, "n": problem.n, "k": problem.k, "r": problem.r, "dtype": _DTYPES[problem.dtype]}
    fields |= {"adapter_dtype": _DTYPES[problem.adapter_dtype], "a": a.data_ptr(), "b": b.data_ptr()}
    if problem.flags & DORA and mag is not None and norm is not None:
        fields |= {"mag": mag.data_ptr(), "mag_dtype": _DTYPES[mag.dtype], "norm": norm.data_ptr()}
    return fields | {"scale": float(scale)}


def dora_norm(problem: Problem, weight: PackedWeight, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """||w + s b a|| of each row: fp32 [n]."""
    norm = torch.empty((problem.n,), dtype=torch.float32, device=a.device)
    if problem.n:
        keep: list[Tensor] = []
        fields = _adapter_fields(problem, a, b, scale, None, None)
        _call("norm", norm, **fields, weight=_weight(weight, keep), out_scales=norm.data_ptr())
    return norm


def merged_weight(
    problem: Problem,
    weight: PackedWeight,
    a: Tensor,
    b: Tensor,
    scale: float,
    mag: Tensor | None = None,
    norm: Tensor | None = None,
) -> Tensor:
    """c * (w + scale b a) [n, k] in the dtype of x: added in fp32, rounded once; c = mag / norm with DoRA."""
    out = torch.empty((problem.n, problem.k), dtype=problem.dtype, device=weight.packed.device)
    if out.numel():
        keep: list[Tensor] = []
        fields = _adapter_fields(problem, a, b, scale, mag, norm)
        _call("merge", out, **fields, weight=_weight(weight, keep), y=out.data_ptr())
    return out


def merge(
    problem: Problem,
    x: Tensor,
    weight: PackedWeight,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    scale: float,
    mag: Tensor | None,
    norm: Tensor | None,
    seed: Tensor | None,
    stream: int,
    p: float,
) -> tuple[Tensor, None, None, None]:
    """The forward of an evaluation by one merged weight and one library product."""
    w = merged_weight(problem, weight, a, b, scale, mag, norm)
    return F.linear(x, w, None if bias is None else bias.to(x.dtype)), None, None, None


def lora_fwd(
    problem: Problem,
    x: Tensor,
    weight: PackedWeight,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    scale: float,
    mag: Tensor | None,
    norm: Tensor | None,
    seed: Tensor | None,
    stream: int,
    p: float,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """x [m, k] -> y [m, n] of x's dtype, and h fp32 [m, r], mask uint8 [m, ceil(k/8)], z [m, n] where flags ask."""
    if problem.flags & DROPOUT and seed is None:
        raise DtypeError("dropout needs an int64 seed tensor, got None")
    m, n, k, r, flags = problem.m, problem.n, problem.k, problem.r, problem.flags
    y = x.new_empty((m, n))
    h = x.new_empty((m, r), dtype=torch.float32) if flags & (TRAIN | LAZY_H) == TRAIN else None
    mask = None
    if flags & TRAIN and flags & SAVE_MASK:
        made = r and m and n  # by the kernel that drops x: without an adapter there is none
        assert seed is not None
        mask = x.new_empty((m, _cdiv(k, 8)), dtype=torch.uint8) if made else dropout_mask(problem, seed, stream, p)
    z = x.new_empty((m, n)) if flags & TRAIN and flags & DORA else None
    if not m or not n:
        return y, h, mask, z
    splits = _splits(x, _cdiv(n, _FORWARD_ROWS), _cdiv(k, _FORWARD_UNIT))
    planes = torch.empty((splits, m, n + r), dtype=torch.float32, device=x.device)
    keep: list[Tensor] = []
    fields = _adapter_fields(problem, a, b, scale, mag, norm) | {"weight": _weight(weight, keep), "splits": splits}
    fields |= {"x": x.data_ptr(), "y": y.data_ptr(), "z": _address(z), "h": _address(h) if r else 0}
    fields |= {"planes": planes.data_ptr(), "adapter_planes": planes.data_ptr() + 4 * splits * m * n}
    if bias is not None:
        fields |= {"bias": bias.data_ptr(), "bias_dtype": _DTYPES[bias.dtype]}
    if flags & DROPOUT and r:
        fields |= {"seed": _address(seed), "stream_number": stream, "threshold": philox.threshold(p)}
        fields |= {"out_bytes": _address(mask)}
    _call("forward", x, **fields)
    return y, h, mask, z


def lora_bwd(
    problem: Problem,
    dy: Tensor,
    x: Tensor | None,
    weight: PackedWeight,
    a: Tensor,
    b: Tensor,
    scale: float,
    mag: Tensor | None,
    norm: Tensor | None,
    h: Tensor | None,
    mask: Tensor | None,
    z: Tensor | None,
    seed: Tensor | None,
    stream: int,
    p: float,
) -> tuple[Tensor | None, None, None, None, None]:
    """dy [m, n] -> dx [m, k] of x's dtype; the adapter's own gradients are other backends'."""
    m, n, k, r = problem.m, problem.n, problem.k, problem.r
    if not problem.flags & NEED_DX:
        return None, None, None, None, None
    dx = dy.new_empty((m, k))
    if m and k:
        splits = _splits(dy, _cdiv(k, _DX_COLUMNS), _cdiv(n, _DX_UNIT))
        planes = torch.empty((splits, m, k + r), dtype=torch.float32, device=dy.device)
        keep: list[Tensor] = []
        fields = _adapter_fields(problem, a, b, scale, mag, norm) | {"weight": _weight(weight, keep), "splits": splits}
        fields |= {"x": dy.data_ptr(), "y": dx.data_ptr(), "planes": planes.data_ptr()}
        fields |= {"adapter_planes": planes.data_ptr() + 4 * splits * m * k}
        _call("dx", dy, **fields)
    return dx, None, None, None, None


# --- what it can do ---------------------------------------------------------------------------------------------------


def describe() -> str:
    """The architectures the library was built for, for `fastlora env`."""
    return f"built for sm_{', '.join(_cuda_library.library().arches)}; chosen only by name until it has been timed"


def _own_drop(problem: Problem) -> str:
    if problem.flags & (DORA | DROPOUT | SHARED) == DORA | DROPOUT:
        return "DoRA with its own dropout needs two base products"
    return ""


def _missing_merge() -> str:
    return _cuda_library.missing() or ("" if settings.current.merge else "merging is off (FASTLORA_MERGE=0)")


def _unmeasured(problem: Problem) -> float:
    """Behind every other backend: a prediction nobody has held against a GPU must not take work from one that was."""
    return 1.0 + cost.roofline_seconds(problem)


_FLOATS = frozenset(_DTYPES)
_CUDA = frozenset({"cuda"})
_QUANTIZED = frozenset(_KINDS)
_FORMAT = Limits(devices=_CUDA, dtypes=_FLOATS, missing=_cuda_library.missing)


def _layer(flags: int, max_m: int | None = None, **more: Any) -> Limits:
    more = {"missing": _cuda_library.missing} | more
    return Limits(_CUDA, _FLOATS, _FLOATS, _QUANTIZED, flags, max_m, **more)


_SKINNY = _layer(BIAS | DROPOUT | DORA | SHARED | TRAIN | SAVE_MASK | LAZY_H, SKINNY_TOKENS, also=_own_drop)
_MERGE = _layer(BIAS | DORA, missing=_missing_merge)
_NORM = _layer(DORA)
_DX = _layer(BIAS | DORA | NEED_DX | LAZY_H, DX_TOKENS)

for _op, _run, _limits, _plan in (
    ("quantize", quantize, _FORMAT, "direct"),
    ("quantize_absmax", quantize_absmax, _FORMAT, "direct"),
    ("dequantize", dequantize, _FORMAT, "direct"),
    ("dropout_mask", dropout_mask, _FORMAT, "direct"),
    ("dora_norm", dora_norm, _NORM, "direct"),
    ("lora_fwd", lora_fwd, _SKINNY, "skinny"),
    ("lora_fwd", merge, _MERGE, "merge"),
    ("lora_bwd", lora_bwd, _DX, "skinny"),
):
    register(Kernel(_op, "cuda", _run, _limits, _unmeasured, _plan))
