"""The CPU backend: the formats and a layer with one adapter, over the compiled library (csrc/cpu).

What it computes is written in the ops' contract; how, in csrc/cpu: forward.h, backward.h, few_fwd.h and few_bwd.h (few
tokens), norm.h and quantize.h. All arithmetic is fp32 inside, except that bf16 problems use the CPU's bf16 dot products
where it has them: fp32 accumulation, each operand rounded once to bf16. Results do not depend on the number of threads,
bit for bit.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from fastlora.backends import _cpu_library
from fastlora.backends._cpu_library import ADAPTED, DTYPES, address, aligned, f32, moved
from fastlora.dispatch import cost
from fastlora.dispatch.registry import ALL_FLAGS, Kernel, register
from fastlora.errors import DtypeError
from fastlora.math import philox
from fastlora.math.nf4 import NESTED_BLOCKSIZE, PackedWeight
from fastlora.problem import (
    DORA,
    DROPOUT,
    LAZY_H,
    NEED_DA,
    NEED_DB,
    NEED_DBIAS,
    NEED_DMAG,
    NEED_DX,
    SAVE_MASK,
    SHARED,
    TRAIN,
    Problem,
)

_KINDS = {"dense": 0, "nf4": 1, "fp4": 2}
_MOST_FEW = 32  # tokens; the widest tier's kernels for few of them
_HUGE = 4 << 20  # fresh tensors above this many bytes ask for huge pages

WeightFields = tuple[int, int, int, int, int, int, int, int, int]


def _weight(weight: Tensor | PackedWeight, keep: list[Tensor]) -> WeightFields:
    """The record's fields for a frozen weight; `keep` holds copies that must outlive the call."""
    if isinstance(weight, Tensor):
        return (0, 0, aligned(weight, keep), 0, 0, 0, 0, 0, 0)
    packed, scales, nested_absmax, nested_offset, code, quant_type, blocksize, _ = weight
    if not packed.is_contiguous():
        packed = packed.contiguous()
        keep.append(packed)
    if nested_absmax is None:
        return (
            _KINDS[quant_type],
            blocksize,
            0,
            packed.data_ptr(),
            aligned(scales, keep),
            0,
            0,
            0,
            aligned(code, keep),
        )
    if not scales.is_contiguous():
        scales = scales.contiguous()
        keep.append(scales)
    return (
        _KINDS[quant_type],
        blocksize,
        0,
        packed.data_ptr(),
        0,
        scales.data_ptr(),
        aligned(nested_absmax, keep),
        aligned(nested_offset, keep),
        aligned(code, keep),
    )


# --- format ops -------------------------------------------------------------------------------------------------------


def quantize(problem: Problem, w: Tensor, quant_type: str, blocksize: int) -> tuple[Tensor, Tensor]:
    """w fp32/bf16/fp16, any shape -> packed uint8 [ceil(numel/2), 1], absmax fp32 [blocks]; bits of math.nf4."""
    library = _cpu_library.library()
    keep: list[Tensor] = []
    count = w.numel()
    packed = torch.empty(((count + 1) // 2, 1), dtype=torch.uint8)
    absmax = torch.empty((-(-count // blocksize),), dtype=torch.float32)
    if packed.numel() >= _HUGE:  # read at every call from now on, for a few tokens as fast as memory allows
        library.advise_huge(packed.data_ptr(), packed.numel())
    if count:
        record = _cpu_library.pack(
            k=count,
            dtype=DTYPES[w.dtype],
            tier=library.tier(),
            weight=(_KINDS[quant_type], blocksize, 0, 0, 0, 0, 0, 0, 0),
            x=aligned(w, keep),
            out_bytes=packed.data_ptr(),
            out_scales=absmax.data_ptr(),
        )
        library.call("quantize", record)
    return packed, absmax


def quantize_absmax(problem: Problem, absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """absmax fp32 [blocks] -> codes uint8 [blocks], nested_absmax fp32 [ceil(blocks/256)], offset fp32 [1]."""
    library = _cpu_library.library()
    scales, count = absmax.contiguous(), absmax.numel()
    codes = torch.empty((count,), dtype=torch.uint8)
    nested = torch.empty((-(-count // NESTED_BLOCKSIZE),), dtype=torch.float32)
    if not count:
        return codes, nested, torch.zeros(1)
    offset = scales.mean(dtype=torch.float64).float().reshape(1)  # as in math.nf4
    record = _cpu_library.pack(
        k=count,
        tier=library.tier(),
        weight=(0, 0, 0, 0, 0, 0, 0, offset.data_ptr(), 0),
        x=scales.data_ptr(),
        out_bytes=codes.data_ptr(),
        out_scales=nested.data_ptr(),
    )
    library.call("quantize_absmax", record)
    return codes, nested, offset


def dequantize(problem: Problem, weight: PackedWeight, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """Decode a weight of any shape to fp32, bf16 or fp16: fp32 code * absmax, rounded once. Bits of math.nf4."""
    library = _cpu_library.library()
    if out is not None and (out.data_ptr() % 4 or not out.is_contiguous()):
        return out.copy_(dequantize(problem, weight, dtype))
    count = weight.numel
    if out is None:
        out = torch.empty(weight.shape, dtype=dtype)
        if (size := count * dtype.itemsize) >= _HUGE:
            library.advise_huge(out.data_ptr(), size)
    if count:
        keep: list[Tensor] = []
        record = _cpu_library.pack(
            k=count, dtype=DTYPES[dtype], tier=library.tier(), weight=_weight(weight, keep), y=out.data_ptr()
        )
        library.call("dequantize", record)
    return out


def dropout_mask(problem: Problem, seed: Tensor, stream: int, p: float) -> Tensor:
    """The keep bits of seed int64 [1] for x [m, k]: uint8 [m, ceil(k/8)]. Bits of math.philox."""
    library = _cpu_library.library()
    mask = torch.empty((problem.m, -(-problem.k // 8)), dtype=torch.uint8)
    if mask.numel():
        record = _cpu_library.pack(
            m=problem.m,
            k=problem.k,
            tier=library.tier(),
            threshold=philox.threshold(p),
            stream=stream,
            seed=seed.data_ptr(),
            mask=mask.data_ptr(),
        )
        library.call("dropout_mask", record)
    return mask


# --- adapter ops ------------------------------------------------------------------------------------------------------


def dora_norm(problem: Problem, weight: Tensor | PackedWeight, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """||w + s b a|| of each row: fp32 [n]."""
    library = _cpu_library.library()
    keep: list[Tensor] = []
    norm = torch.empty((problem.n,), dtype=torch.float32)
    a32, b32 = f32(a), f32(b)
    record = _cpu_library.pack(
        n=problem.n,
        k=problem.k,
        r=problem.r,
        dtype=DTYPES[problem.dtype],
        tier=library.tier(),
        scale=float(scale),
        weight=_weight(weight, keep),
        a=aligned(a32, keep),
        b=aligned(b32, keep),
        out_scales=norm.data_ptr(),
    )
    library.call("dora_norm", record)
    return norm


def _dropout(problem: Problem, seed: Tensor | None, p: float) -> tuple[int, float]:
    """Threshold and scale of the dropout decision; (0, 1.0) without dropout."""
    if not problem.flags & DROPOUT:
        return 0, 1.0
    if seed is None:
        raise DtypeError("dropout needs an int64 seed tensor, got None")
    return philox.threshold(p), philox.keep_scale(p)


def lora_fwd(
    problem: Problem,
    x: Tensor,
    weight: Tensor | PackedWeight,
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
    library = _cpu_library.library()
    _, m, n, k, r, dtype, _, _, flags, _, _ = problem
    train, dora = flags & TRAIN, flags & DORA
    threshold, keep_scale = _dropout(problem, seed, p)
    y = x.new_empty(m, n)  # sizes one by one: a tuple of them takes torch twice as long to read
    h = x.new_empty(m, r, dtype=torch.float32) if train else None
    mask = None
    if train and flags & DROPOUT and flags & SAVE_MASK:
        mask = x.new_empty(m, -(-k // 8), dtype=torch.uint8)
    z = x.new_empty(m, n) if train and dora else None
    if not m:
        return y, h, mask, z
    keep: list[Tensor] = []
    a32, b32, bias32, mag32, norm32 = f32(a if r else None), f32(b if r else None), None, None, None
    places, outputs = (0, 0, 0), (y.data_ptr(), 0, 0, 0)  # of what most calls have none
    if bias is not None or dora:
        bias32 = f32(bias)
        mag32, norm32 = (f32(mag), f32(norm)) if dora else (None, None)
        places = (address(bias32), address(mag32), address(norm32))
    if train:
        outputs = (outputs[0], address(h), address(mask), address(z))
    sizes = (m, n, k, r, DTYPES[dtype], flags, torch.get_num_threads(), library.tier(), threshold, stream)
    operands = (x.data_ptr(), address(a32), address(b32), *places)
    if (operands[0] | operands[1] | operands[2] | operands[3] | operands[4] | operands[5]) % 4:
        bias, mag, norm = (None if t is None else moved(t) for t in (bias, mag, norm))
        adapter = (moved(a), moved(b), scale, mag, norm)
        return lora_fwd(problem, moved(x), weight, bias, *adapter, seed, stream, p)
    record = _cpu_library.pack_fields(
        *sizes, scale, keep_scale, address(seed), *_weight(weight, keep), *operands, *outputs, 0, 0, 0, 0, 0, 0, 0, 0
    )
    library.call("lora_fwd", record)
    return y, h, mask, z


def lora_bwd(
    problem: Problem,
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor | PackedWeight,
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
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """dy [m, n] -> dx [m, k] of x's dtype, da and db of a's dtype, dmag and dbias fp32 [n]; None where not needed."""
    library = _cpu_library.library()
    _, m, n, k, r, dtype, _, _, flags, _, _ = problem
    dora = flags & DORA
    threshold, keep_scale = _dropout(problem, seed, p)
    if flags & DROPOUT and mask is None and flags & (NEED_DX | NEED_DA) and seed is not None:
        mask = dropout_mask(problem, seed, stream, p)
    dx = dy.new_empty(m, k) if flags & NEED_DX else None
    da = dy.new_empty(r, k, dtype=torch.float32) if flags & NEED_DA else None
    db = dy.new_empty(n, r, dtype=torch.float32) if flags & NEED_DB else None
    dmag = dy.new_empty(n, dtype=torch.float32) if flags & NEED_DMAG else None
    dbias = dy.new_empty(n, dtype=torch.float32) if flags & NEED_DBIAS else None
    keep: list[Tensor] = []
    a32, b32 = f32(a), f32(b)
    mag32, norm32 = (f32(mag), f32(norm)) if dora else (None, None)
    sizes = (m, n, k, r, DTYPES[dtype], flags, torch.get_num_threads(), library.tier(), threshold, stream)
    operands = (address(x), address(a32), address(b32), 0, address(mag32), address(norm32))
    saved = (0, address(h), address(mask), address(z), dy.data_ptr())
    if (operands[0] | operands[1] | operands[2] | operands[4] | operands[5] | saved[4]) % 4:
        x, mag, norm = (None if t is None else moved(t) for t in (x, mag, norm))
        adapter = (moved(a), moved(b), scale, mag, norm)
        return lora_bwd(problem, moved(dy), x, weight, *adapter, h, mask, z, seed, stream, p)
    outputs = (address(dx), address(da), address(db), address(dmag), address(dbias))
    record = _cpu_library.pack_fields(
        *sizes, scale, keep_scale, 0, *_weight(weight, keep), *operands, *saved, *outputs, 0, 0
    )
    library.call("lora_bwd", record)
    if a.dtype != torch.float32:
        da, db = (None if t is None else t.to(a.dtype) for t in (da, db))
    return dx, da, db, dmag, dbias


def describe() -> str:
    """The instruction tier in force and those this CPU has, for `fastlora env`."""
    library = _cpu_library.library()
    amx = "; the CPU has AMX, which no kernel uses" if torch.cpu._is_amx_tile_supported() else ""
    return f"tier {_cpu_library.TIERS[library.tier()]} (has {', '.join(library.tiers)}){amx}"


# Picoseconds a weight on one core of an AMD Zen 4 (2026-11): decoding and reading it once, and each token it meets.
_FEW_COST = {torch.float32: (30.0, 21.0), torch.float16: (30.0, 21.0), torch.bfloat16: (30.0, 12.0)}
_TILED_COST = {torch.float32: (150.0, 20.0), torch.float16: (150.0, 20.0), torch.bfloat16: (150.0, 9.0)}


def _seconds(problem: Problem, costs: dict[torch.dtype, tuple[float, float]]) -> float:
    once, token = costs.get(problem.dtype, costs[torch.float32])
    tokens = problem.m * cost.base_gemms(problem)
    busy = (once + token * tokens) * 1e-12 * problem.n * problem.k if tokens else 0.0
    return max(busy / torch.get_num_threads(), cost.roofline_seconds(problem))


def _tiled_seconds(problem: Problem) -> float:
    return _seconds(problem, _TILED_COST)


def _few_seconds(problem: Problem) -> float:
    """The library itself chooses by the number of tokens: beyond it this plan must not look the better one."""
    library = _cpu_library.library()
    twice = problem.flags & DORA and problem.flags & DROPOUT and not problem.flags & SHARED
    fits = problem.m * (2 if twice else 1) <= library.few_tokens(library.tier())
    return _seconds(problem, _FEW_COST) if fits else 2 * _tiled_seconds(problem)


_ANY = dataclasses.replace(ADAPTED, dtypes=None, adapter_dtypes=None)
_FORMAT = dataclasses.replace(ADAPTED, adapter_dtypes=None)
_LAYER = dataclasses.replace(ADAPTED, formats=frozenset(_KINDS), flags=ALL_FLAGS & ~LAZY_H)
_FEW = dataclasses.replace(_LAYER, max_m=_MOST_FEW)
_roofline = cost.roofline_seconds

# "few" and "tiled" are one launcher: the plans name what the library will do.
for _op, _run, _limits, _predict, _plan in (
    ("quantize", quantize, _FORMAT, _roofline, "direct"),
    ("quantize_absmax", quantize_absmax, _ANY, _roofline, "direct"),
    ("dequantize", dequantize, _FORMAT, _roofline, "direct"),
    ("dropout_mask", dropout_mask, _ANY, _roofline, "direct"),
    ("dora_norm", dora_norm, _LAYER, _roofline, "direct"),
    ("lora_fwd", lora_fwd, _FEW, _few_seconds, "few"),
    ("lora_bwd", lora_bwd, _FEW, _few_seconds, "few"),
    ("lora_fwd", lora_fwd, _LAYER, _tiled_seconds, "tiled"),
    ("lora_bwd", lora_bwd, _LAYER, _tiled_seconds, "tiled"),
):
    register(Kernel(_op, "cpu", _run, _limits, _predict, _plan))
