"""The CPU backend: every op over the compiled library (csrc/cpu), for dense and 4-bit weights.

What it computes is written in the ops' contract; how, in csrc/cpu: forward.h, backward.h, few_fwd.h and few_bwd.h (few
tokens), grouped.h (several adapters in one batch), norm.h and quantize.h. All arithmetic is fp32 inside, except that
bf16 problems use the CPU's bf16 dot products where it has them: fp32 accumulation, each operand rounded once to bf16.
Results do not depend on the number of threads, bit for bit.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import overload

import torch
from torch import Tensor

from fastlora.backends import _cpu_library
from fastlora.dispatch import cost
from fastlora.dispatch.registry import ALL_FLAGS, Kernel, Limits, register
from fastlora.errors import DtypeError
from fastlora.math import philox
from fastlora.math.nf4 import NESTED_BLOCKSIZE, PackedWeight
from fastlora.math.segments import Group, Segments
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
    base_drops,
)

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_KINDS = {"dense": 0, "nf4": 1, "fp4": 2}
_MOST_FEW = 32  # tokens; the widest tier's kernels for few of them
_HUGE = 4 << 20  # fresh tensors above this many bytes ask for huge pages

WeightFields = tuple[int, int, int, int, int, int, int, int, int]


@overload
def _f32(t: Tensor) -> Tensor: ...
@overload
def _f32(t: None) -> None: ...
def _f32(t: Tensor | None) -> Tensor | None:
    """A small operand as contiguous fp32: itself where it is that already."""
    if t is None or (t.dtype == torch.float32 and t.is_contiguous()):
        return t
    return t.float().contiguous()


def _address(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def _aligned(t: Tensor | None, keep: list[Tensor]) -> int:
    """Address of what is read in units of 4 bytes; a misaligned or strided part is copied into `keep` first."""
    if t is None:
        return 0
    address = t.data_ptr()
    if address % 4 or not t.is_contiguous():
        t = _moved(t)
        keep.append(t)
        address = t.data_ptr()
    return address


def _moved(t: Tensor) -> Tensor:
    return t.clone(memory_format=torch.contiguous_format)


def _weight(weight: Tensor | PackedWeight, keep: list[Tensor]) -> WeightFields:
    """The record's fields for a frozen weight; `keep` holds copies that must outlive the call."""
    if isinstance(weight, Tensor):
        return (0, 0, _aligned(weight, keep), 0, 0, 0, 0, 0, 0)
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
            _aligned(scales, keep),
            0,
            0,
            0,
            _aligned(code, keep),
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
        _aligned(nested_absmax, keep),
        _aligned(nested_offset, keep),
        _aligned(code, keep),
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
            dtype=_DTYPES[w.dtype],
            tier=library.tier(),
            weight=(_KINDS[quant_type], blocksize, 0, 0, 0, 0, 0, 0, 0),
            x=_aligned(w, keep),
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
            k=count, dtype=_DTYPES[dtype], tier=library.tier(), weight=_weight(weight, keep), y=out.data_ptr()
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
    a32, b32 = _f32(a), _f32(b)
    record = _cpu_library.pack(
        n=problem.n,
        k=problem.k,
        r=problem.r,
        dtype=_DTYPES[problem.dtype],
        tier=library.tier(),
        scale=float(scale),
        weight=_weight(weight, keep),
        a=_aligned(a32, keep),
        b=_aligned(b32, keep),
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
    a32, b32, bias32, mag32, norm32 = _f32(a if r else None), _f32(b if r else None), None, None, None
    places, outputs = (0, 0, 0), (y.data_ptr(), 0, 0, 0)  # of what most calls have none
    if bias is not None or dora:
        bias32 = _f32(bias)
        mag32, norm32 = (_f32(mag), _f32(norm)) if dora else (None, None)
        places = (_address(bias32), _address(mag32), _address(norm32))
    if train:
        outputs = (outputs[0], _address(h), _address(mask), _address(z))
    sizes = (m, n, k, r, _DTYPES[dtype], flags, torch.get_num_threads(), library.tier(), threshold, stream)
    operands = (x.data_ptr(), _address(a32), _address(b32), *places)
    if (operands[0] | operands[1] | operands[2] | operands[3] | operands[4] | operands[5]) % 4:
        bias, mag, norm = (None if t is None else _moved(t) for t in (bias, mag, norm))
        adapter = (_moved(a), _moved(b), scale, mag, norm)
        return lora_fwd(problem, _moved(x), weight, bias, *adapter, seed, stream, p)
    record = _cpu_library.pack_fields(
        *sizes, scale, keep_scale, _address(seed), *_weight(weight, keep), *operands, *outputs, 0, 0, 0, 0, 0, 0, 0, 0
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
    a32, b32 = _f32(a), _f32(b)
    mag32, norm32 = (_f32(mag), _f32(norm)) if dora else (None, None)
    sizes = (m, n, k, r, _DTYPES[dtype], flags, torch.get_num_threads(), library.tier(), threshold, stream)
    operands = (_address(x), _address(a32), _address(b32), 0, _address(mag32), _address(norm32))
    saved = (0, _address(h), _address(mask), _address(z), dy.data_ptr())
    if (operands[0] | operands[1] | operands[2] | operands[4] | operands[5] | saved[4]) % 4:
        x, mag, norm = (None if t is None else _moved(t) for t in (x, mag, norm))
        adapter = (_moved(a), _moved(b), scale, mag, norm)
        return lora_bwd(problem, _moved(dy), x, weight, *adapter, h, mask, z, seed, stream, p)
    outputs = (_address(dx), _address(da), _address(db), _address(dmag), _address(dbias))
    record = _cpu_library.pack_fields(
        *sizes, scale, keep_scale, 0, *_weight(weight, keep), *operands, *saved, *outputs, 0, 0
    )
    library.call("lora_bwd", record)
    if a.dtype != torch.float32:
        da, db = (None if t is None else t.to(a.dtype) for t in (da, db))
    return dx, da, db, dmag, dbias


# --- several adapters in one batch ------------------------------------------------------------------------------------


def _members(group: Group, keep: list[Tensor], outputs: Sequence[tuple[int, int, int]] | None = None) -> bytes:
    """A `struct Member` an adapter; `outputs`: addresses of da, db, dmag."""
    if group.memo is not None:
        known = [memo.get("cpu") for memo in group.memo]
        if None not in known:
            return b"".join(known)  # type: ignore[arg-type]
    records = []
    pack, none = _cpu_library.pack_member, (0, 0, 0)
    for e, (a, b, scale, kind) in enumerate(zip(group.a, group.b, group.scales, group.kinds, strict=True)):
        out = none if outputs is None else outputs[e]
        places = a.data_ptr(), b.data_ptr()
        if (places[0] | places[1]) % 4:
            places = _aligned(a, keep), _aligned(b, keep)
        if not kind & (DORA | DROPOUT):
            records.append(pack(*places, 0, 0, scale, 1.0, b.shape[1], 0, 0, 0, 0, *out))
            continue
        mag, norm = (_f32(group.mag[e]), _f32(group.norm[e])) if kind & DORA else (None, None)
        keep += [t for t in (mag, norm) if t is not None]
        drops, p = bool(kind & DROPOUT), group.ps[e]
        operands = (*places, _address(mag), _address(norm))
        dropping = (philox.threshold(p), group.streams[e], 1, base_drops(kind)) if drops else (0, 0, 0, 0)
        factors = (scale, philox.keep_scale(p) if drops else 1.0)
        records.append(pack(*operands, *factors, b.shape[1], *dropping, *out))
    if group.memo is not None and not keep and outputs is None:
        for memo, record in zip(group.memo, records, strict=True):
            memo["cpu"] = record
    return b"".join(records)


def _grouped_call(
    op: str,
    problem: Problem,
    segments: Segments,
    late: Tensor | None,
    members: bytes,
    seed: int = 0,
    x: int = 0,
    bias: int = 0,
    y: int = 0,
    h: int = 0,
    mask: int = 0,
    z: int = 0,
    dy: int = 0,
    dx: int = 0,
) -> None:
    """One call on a `struct Grouped`; addresses of `struct Args`."""
    library = _cpu_library.library()
    _, m, n, k, r, dtype, adapter_dtype, _, flags, _, groups = problem
    sizes = (m, n, k, r, _DTYPES.get(dtype, 0), flags, torch.get_num_threads(), library.tier(), 0, 0, 0.0, 1.0, seed)
    weight, rest = (0, 0, 0, 0, 0, 0, 0, 0, 0), (0, 0, 0, 0, 0, 0)
    record = _cpu_library.pack_fields(*sizes, *weight, x, 0, 0, bias, 0, 0, y, h, mask, z, dy, dx, *rest)
    order, offsets = segments.order.data_ptr(), segments.offsets.data_ptr()
    adapters = _DTYPES.get(adapter_dtype, 0)
    record += _cpu_library.pack_grouped(groups, adapters, order, offsets, 0, _address(late))
    library.call(op, record + members)


def grouped_mask(problem: Problem, segments: Segments, group: Group, seed: Tensor) -> Tensor:
    """The keep bits of every row by its own adapter's stream and p: uint8 [m, ceil(k/8)]."""
    mask = torch.zeros((problem.m, -(-problem.k // 8)), dtype=torch.uint8)
    if mask.numel():
        members = _members(group, [])
        _grouped_call("grouped_mask", problem, segments, None, members, seed=seed.data_ptr(), mask=mask.data_ptr())
    return mask


def grouped_fwd(
    problem: Problem,
    x: Tensor,
    y: Tensor,
    bias: Tensor | None,
    group: Group,
    segments: Segments,
    mask: Tensor | None,
    dropped: Tensor | None,
) -> tuple[Tensor | None, Tensor | None]:
    """Adds to y [m, n] in place; h fp32 [m, r] and z [m, n] where flags ask."""
    train = problem.flags & TRAIN
    h = x.new_zeros((problem.m, problem.r), dtype=torch.float32) if train else None
    z = torch.zeros_like(y) if train and problem.flags & DORA else None
    if problem.m:
        keep: list[Tensor] = []
        bias32 = _f32(bias)
        members = _members(group, keep)
        places = (_aligned(x, keep), _address(bias32), y.data_ptr(), _address(h), _address(mask), _address(z))
        _grouped_call("grouped_fwd", problem, segments, dropped, members, 0, *places)
    return h, z


def grouped_bwd(
    problem: Problem,
    dy: Tensor,
    x: Tensor | None,
    group: Group,
    segments: Segments,
    h: Tensor | None,
    mask: Tensor | None,
    z: Tensor | None,
    dx: Tensor | None,
    dropped_dx: Tensor | None,
) -> list[Tensor]:
    """Adds to dx [m, k] in place; da and db of a's dtype, dmag fp32, of each adapter that asks."""
    grads: list[Tensor] = []
    outputs = []
    for a, b, kind in zip(group.a, group.b, group.kinds, strict=True):
        da = torch.empty_like(a) if kind & NEED_DA else None
        db = torch.empty_like(b) if kind & NEED_DB else None
        dmag = torch.empty((problem.n,), dtype=torch.float32) if kind & NEED_DMAG else None
        grads += [t for t in (da, db, dmag) if t is not None]
        outputs.append((_address(da), _address(db), _address(dmag)))
    keep: list[Tensor] = []
    members, given = _members(group, keep, outputs), (_address(h), _address(mask), _address(z))
    places = (_aligned(x, keep), 0, 0, *given, _aligned(dy, keep), _address(dx))
    _grouped_call("grouped_bwd", problem, segments, dropped_dx, members, 0, *places)
    return grads


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


_FLOATS = frozenset(_DTYPES)
_CPU = frozenset({"cpu"})
_FORMAT = Limits(devices=_CPU, dtypes=_FLOATS, missing=_cpu_library.missing)
_ANY = Limits(devices=_CPU, missing=_cpu_library.missing)
_LAYER = Limits(
    devices=_CPU,
    dtypes=_FLOATS,
    adapter_dtypes=_FLOATS,
    formats=frozenset(_KINDS),
    flags=ALL_FLAGS & ~LAZY_H,
    missing=_cpu_library.missing,
)

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
    ("grouped_mask", grouped_mask, _ANY, _roofline, "direct"),
    ("grouped_fwd", grouped_fwd, _LAYER, _roofline, "direct"),
    ("grouped_bwd", grouped_bwd, _LAYER, _roofline, "direct"),
):
    register(Kernel(_op, "cpu", _run, _limits, _predict, _plan))
