"""Every op of the `fastlora` library: its definition, its fake and its one body.

A body builds the `Problem` from real sizes, lets the registry choose a kernel and calls it; nothing above this file
knows a backend. The ops are opaque to `torch.compile`, so the choice is made on real integers and dynamic shapes do
not recompile. What an op returns depends on static facts only (flags, formats), never on the chosen plan or on m.

Kernel.run signatures, the same for every backend (`Weight` = dense [n,k] or `PackedWeight`):
  quantize(problem, w, quant_type, blocksize) -> packed uint8 [ceil(nk/2), 1], absmax fp32 [blocks]
  quantize_absmax(problem, absmax) -> codes uint8 [blocks], nested_absmax fp32 [ceil(blocks/256)], offset fp32 [1]
  dequantize(problem, weight, dtype, out) -> [shape]
  dropout_mask(problem, seed, stream, p) -> uint8 [m, ceil(k/8)]
  dora_norm(problem, weight, a, b, scale) -> [n]
  lora_fwd(problem, x, weight, bias, a, b, scale, mag, norm, seed, stream, p) -> y, h, mask, z
  lora_bwd(problem, dy, x, weight, a, b, scale, mag, norm, h, mask, z, seed, stream, p) -> dx, da, db, dmag, dbias
  grouped_mask(problem, segments, group, seed) -> mask uint8 [m, ceil(k/8)]
  grouped_fwd(problem, x, y, bias, group, segments, mask, dropped) -> h, z; y is changed in place
  grouped_bwd(problem, dy, x, group, segments, h, mask, z, dx, dropped_dx) -> list of gradients; dx changed in place
The grouped ops add to the frozen base's y [m,n] (bias inside) and dx [m,k] what each row's own adapter contributes;
`group` and `segments` are those of `math.segments`, problem.r the largest rank, problem.groups E. Rows without adapter
keep y and dx bit for bit. For a row of adapter e (fp32, fp64 for fp64; stored once to the dtype of x; dscale, s, c of
e, keep = its row of mask where its kind drops, else 1):
  h = dscale (keep*x) a^T, fp32 [m, problem.r], 0 beyond r_e;   LoRA  y += s h b^T
  DoRA  base = y - bias, or dscale * dropped where `base_drops(kind)`;  z = base + s h b^T;  y += s h b^T + (c - 1) z
  d = c dy for DoRA, dy else;  g = s d b;  dx += dscale keep*(g a), with base_drops dx += dscale keep*(g a + dropped_dx)
  da_e = dscale sum g^T (keep*x);  db_e = s sum d^T h;  dmag_e = sum dy*z / norm (sums over the rows of e)
h, z [m,n] (dtype of x; only if some adapter is DoRA) are returned under TRAIN, 0 in other rows; dropped = (keep*x) w^T
and dropped_dx = ((c - 1) dy) w are given, [m,n] and [m,k], where some adapter's base product drops; their other rows
mean nothing. Gradients: for each adapter da, db (its dtype), dmag (fp32), those its kind has NEED_* bits for, zeros
where it has no row; x is None if no da, h if no db, z if no dmag, dx if no dx is wanted. mask is None if none drops.
r = 0 (a [0,k], b [n,0]) is the frozen linear alone. h is None under LAZY_H. In the backward x may be None when neither
da nor (where h is None) db is asked for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastlora import backends
from fastlora.config import SEED_END
from fastlora.dispatch import registry
from fastlora.errors import ShapeError
from fastlora.math.nf4 import PackedWeight
from fastlora.ops.merged import by_hooks, merged_lives
from fastlora.problem import (
    BIAS,
    DENSE,
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
    Format,
    Problem,
)

LIBRARY = torch.library.Library("fastlora", "DEF")

# The arguments that make up a 4-bit weight, in every op's signature.
_PACKED = (
    "Tensor packed, Tensor absmax, Tensor? nested_absmax, Tensor? nested_offset, Tensor? code, "
    "str quant_type, int blocksize, bool on_grid"
)
_FWD_TAIL = (
    "Tensor? bias, Tensor a, Tensor b, float scale, Tensor? mag, Tensor? norm, Tensor? seed, int stream, float p, "
    "int flags, str backend"
)
_BWD_TAIL = (
    "Tensor a, Tensor b, float scale, Tensor? mag, Tensor? norm, Tensor? h, Tensor? mask, Tensor? z, Tensor? seed, "
    "int stream, float p, int flags, str backend"
)


def op(schema: str, tags: Sequence[torch.Tag] = ()) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Define an op with the decorated function as its body on every device."""

    def decorate(body: Callable[..., Any]) -> Callable[..., Any]:
        name = schema[: schema.index("(")]
        LIBRARY.define(schema, tags=tuple(tags))
        LIBRARY.impl(name, body, "CompositeExplicitAutograd")
        return body

    return decorate


def fake(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register the decorated function as the op's shape-only twin."""
    return torch.library.register_fake(f"fastlora::{name}", lib=LIBRARY)


def format_of(weight: PackedWeight, on_grid: bool) -> Format:
    """The static facts of a packed weight."""
    return Format(
        weight.quant_type, weight.blocksize, weight.nested_absmax is not None, weight.code is not None, on_grid
    )


def _run(problem: Problem, backend: str, *args: Any) -> Any:
    """Choose and call; autocast must not touch what happens inside an op."""
    backends.load()
    trial = None if problem.groups else args  # a grouped kernel adds in place: measuring it would add again
    if torch.is_autocast_enabled(problem.device):
        with torch.amp.autocast(problem.device, enabled=False):
            return registry.select(problem, backend, trial).run(problem, *args)
    return registry.select(problem, backend, trial).run(problem, *args)


def _run_kept(problem: Problem, backend: str, *args: Any) -> Any:
    """`_run` of a forward in training; after its outputs the merged weight, where it made one that should live."""
    backends.load()
    if torch.is_autocast_enabled(problem.device):
        with torch.amp.autocast(problem.device, enabled=False):
            return _run_kept(problem, backend, *args)
    kernel = registry.select(problem, backend, args)
    if kernel.kept is not None and merged_lives():
        return kernel.kept(problem, *args)
    return kernel.run(problem, *args)


def _would_keep(problem: Problem, backend: str, *args: Any) -> bool:
    """Whether `_run_kept` would return a merged weight to a checkpoint that compares what is saved."""
    return bool(by_hooks()) and merged_lives() and registry.select(problem, backend).kept is not None


def _run_given(problem: Problem, backend: str, *args: Any) -> Any:
    """`_run` of a backward; the last argument is a merged weight, which only a plan that makes one has use for."""
    backends.load()
    with torch.amp.autocast(problem.device, enabled=False):
        kernel = registry.select(problem, backend, args[:-1])
        return kernel.run(problem, *args[:-1]) if kernel.kept is None else kernel.kept(problem, *args)


def _check_scale(scale: float) -> None:
    """Here, where it is a real number, not where a compiler might trace it."""
    if not math.isfinite(scale):
        raise ShapeError(f"scale must be finite, got {scale}")


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _mask_like(x: Tensor) -> Tensor:
    return x.new_empty((x.shape[0], (x.shape[1] + 7) // 8), dtype=torch.uint8)


# --- the 4-bit format -------------------------------------------------------------------------------------------------


def _weight_problem(op: str, like: Tensor, shape: Sequence[int], dtype: torch.dtype, fmt: Format) -> Problem:
    rows = shape[0] if shape else 1
    columns = 1
    for size in shape[1:]:
        columns *= size
    return Problem(op, 0, rows, columns, 0, dtype, dtype, fmt, 0, like.device.type)


@op("quantize(Tensor w, str quant_type, int blocksize, str backend) -> (Tensor, Tensor)")
def _quantize(w: Tensor, quant_type: str, blocksize: int, backend: str) -> tuple[Tensor, Tensor]:
    problem = _weight_problem("quantize", w, w.shape, w.dtype, Format(quant_type, blocksize))
    return _run(problem, backend, w.contiguous(), quant_type, blocksize)


@fake("quantize")
def _(w: Tensor, quant_type: str, blocksize: int, backend: str) -> tuple[Tensor, Tensor]:
    packed = w.new_empty(((w.numel() + 1) // 2, 1), dtype=torch.uint8)
    return packed, w.new_empty(((w.numel() + blocksize - 1) // blocksize,), dtype=torch.float32)


@op("quantize_absmax(Tensor absmax, str backend) -> (Tensor, Tensor, Tensor)")
def _quantize_absmax(absmax: Tensor, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    problem = _weight_problem("quantize_absmax", absmax, absmax.shape, absmax.dtype, Format("nf4", 256))
    return _run(problem, backend, absmax.contiguous())


@fake("quantize_absmax")
def _(absmax: Tensor, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    blocks = absmax.numel()
    codes = absmax.new_empty((blocks,), dtype=torch.uint8)
    return codes, absmax.new_empty(((blocks + 255) // 256,)), absmax.new_empty((1,))


@op(f"dequantize({_PACKED}, SymInt[] shape, ScalarType dtype, str backend) -> Tensor")
def _dequantize(*args: Any) -> Tensor:
    *parts, on_grid, shape, dtype, backend = args
    weight = PackedWeight._make((*parts, tuple(shape)))
    problem = _weight_problem("dequantize", weight.packed, shape, dtype, format_of(weight, on_grid))
    return _run(problem, backend, weight, dtype, None)


@fake("dequantize")
def _(*args: Any) -> Tensor:
    packed, shape, dtype = args[0], args[-3], args[-2]
    return packed.new_empty(shape, dtype=dtype)


@op(f"dequantize_into({_PACKED}, str backend, *, Tensor(a!) out) -> ()")
def _dequantize_into(*args: Any, out: Tensor) -> None:
    *parts, on_grid, backend = args
    weight = PackedWeight._make((*parts, tuple(out.shape)))
    problem = _weight_problem("dequantize", weight.packed, out.shape, out.dtype, format_of(weight, on_grid))
    _run(problem, backend, weight, out.dtype, out)


@fake("dequantize_into")
def _(*args: Any, out: Tensor) -> None:
    return None


# --- dropout ----------------------------------------------------------------------------------------------------------


# `like` is an uninitialised int64 [1]: the compiler merges equal calls of an op it does not know to be random, so that
# two layers would get one seed, but it never merges two `torch.empty`.
@op("draw_seed(Tensor like) -> Tensor", tags=(torch.Tag.nondeterministic_seeded,))
def _draw_seed(like: Tensor) -> Tensor:
    return torch.randint(0, SEED_END, (1,), dtype=torch.int64, device=like.device)


@fake("draw_seed")
def _(like: Tensor) -> Tensor:
    return torch.empty_like(like)


@op("dropout_mask(Tensor seed, int stream, SymInt rows, SymInt cols, float p, str backend) -> Tensor")
def _dropout_mask(seed: Tensor, stream: int, rows: int, cols: int, p: float, backend: str) -> Tensor:
    dtype = torch.float32
    problem = Problem("dropout_mask", rows, 0, cols, 0, dtype, dtype, DENSE, DROPOUT, seed.device.type)
    return _run(problem, backend, seed, stream, p)


@fake("dropout_mask")
def _(seed: Tensor, stream: int, rows: int, cols: int, p: float, backend: str) -> Tensor:
    return seed.new_empty((rows, (cols + 7) // 8), dtype=torch.uint8)


# --- DoRA's norm ------------------------------------------------------------------------------------------------------


def _norm(weight: Tensor | PackedWeight, fmt: Format, a: Tensor, b: Tensor, scale: float, backend: str) -> Tensor:
    dtype = weight.dtype if isinstance(weight, Tensor) else a.dtype
    _check_scale(scale)
    problem = Problem("dora_norm", 0, b.shape[0], a.shape[1], a.shape[0], dtype, a.dtype, fmt, DORA, a.device.type)
    return _run(problem, backend, weight, a, b, scale)


@op("dora_norm(Tensor w, Tensor a, Tensor b, float scale, str backend) -> Tensor")
def _dora_norm(w: Tensor, a: Tensor, b: Tensor, scale: float, backend: str) -> Tensor:
    return _norm(w, DENSE, a, b, scale, backend)


@fake("dora_norm")
def _(w: Tensor, a: Tensor, b: Tensor, scale: float, backend: str) -> Tensor:
    return a.new_empty((b.shape[0],), dtype=_accumulator(w.dtype))


@op(f"qdora_norm({_PACKED}, Tensor a, Tensor b, float scale, str backend) -> Tensor")
def _qdora_norm(*args: Any) -> Tensor:
    *parts, on_grid, a, b, scale, backend = args
    weight = PackedWeight._make((*parts, (b.shape[0], a.shape[1])))
    return _norm(weight, format_of(weight, on_grid), a, b, scale, backend)


@fake("qdora_norm")
def _(*args: Any) -> Tensor:
    a, b = args[-4], args[-3]
    return a.new_empty((b.shape[0],), dtype=_accumulator(a.dtype))


# --- the adapted linear -----------------------------------------------------------------------------------------------


def _forward(
    x: Tensor,
    weight: Tensor | PackedWeight,
    fmt: Format,
    tail: Sequence[Any],
    run: Callable[..., Any] = _run,
) -> Any:
    """y, h, mask, z; or what another `run` returns."""
    bias, a, b, scale, mag, norm, seed, stream, p, flags, backend = tail
    (m, k), (n, r) = x.shape, b.shape
    _check_scale(scale)
    device = "cpu" if x.is_cpu else x.device.type  # the first is four times as quick to ask
    problem = Problem("lora_fwd", m, n, k, r, x.dtype, a.dtype, fmt, flags, device)
    return run(problem, backend, x, weight, bias, a, b, scale, mag, norm, seed, stream, p)


def _fake_forward(x: Tensor, tail: Sequence[Any]) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    b, flags = tail[2], tail[-2]
    y = x.new_empty((x.shape[0], b.shape[0]))
    if not flags & TRAIN:
        return y, None, None, None
    h = None if flags & LAZY_H else x.new_empty((x.shape[0], b.shape[1]), dtype=_accumulator(x.dtype))
    return y, h, _mask_like(x) if flags & SAVE_MASK else None, torch.empty_like(y) if flags & DORA else None


@op(f"lora_fwd(Tensor x, Tensor w, {_FWD_TAIL}) -> (Tensor, Tensor?, Tensor?, Tensor?)")
def _lora_fwd(x: Tensor, w: Tensor, *tail: Any) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    return _forward(x, w, DENSE, tail)


@fake("lora_fwd")
def _(x: Tensor, w: Tensor, *tail: Any) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    return _fake_forward(x, tail)


@op(f"qlora_fwd(Tensor x, {_PACKED}, {_FWD_TAIL}) -> (Tensor, Tensor?, Tensor?, Tensor?)")
def _qlora_fwd(x: Tensor, *args: Any) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    tail = args[8:]
    weight = PackedWeight._make((*args[:7], (tail[2].shape[0], x.shape[1])))
    return _forward(x, weight, format_of(weight, args[7]), tail)


@fake("qlora_fwd")
def _(x: Tensor, *args: Any) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    return _fake_forward(x, args[8:])


def _backward(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor | PackedWeight,
    fmt: Format,
    tail: Sequence[Any],
    merged: Tensor | None = None,
) -> tuple[Tensor | None, ...]:
    a, b, scale, mag, norm, h, mask, z, seed, stream, p, flags, backend = tail
    (m, n), (r, k) = dy.shape, a.shape
    problem = Problem("lora_bwd", m, n, k, r, dy.dtype, a.dtype, fmt, flags, dy.device.type)
    args = (dy, x, weight, a, b, scale, mag, norm, h, mask, z, seed, stream, p)
    return _run(problem, backend, *args) if merged is None else _run_given(problem, backend, *args, merged)


def _fake_backward(dy: Tensor, tail: Sequence[Any]) -> tuple[Tensor | None, ...]:
    a, b, flags = tail[0], tail[1], tail[-2]
    sums = dy.new_empty((dy.shape[1],), dtype=_accumulator(dy.dtype))
    return (
        dy.new_empty((dy.shape[0], a.shape[1])) if flags & NEED_DX else None,
        torch.empty_like(a) if flags & NEED_DA else None,
        torch.empty_like(b) if flags & NEED_DB else None,
        torch.empty_like(sums) if flags & NEED_DMAG else None,
        torch.empty_like(sums) if flags & NEED_DBIAS else None,
    )


_BWD_RETURNS = "(Tensor?, Tensor?, Tensor?, Tensor?, Tensor?)"


@op(f"lora_bwd(Tensor dy, Tensor? x, Tensor w, {_BWD_TAIL}) -> {_BWD_RETURNS}")
def _lora_bwd(dy: Tensor, x: Tensor | None, w: Tensor, *tail: Any) -> tuple[Tensor | None, ...]:
    return _backward(dy, x, w, DENSE, tail)


@fake("lora_bwd")
def _(dy: Tensor, x: Tensor | None, w: Tensor, *tail: Any) -> tuple[Tensor | None, ...]:
    return _fake_backward(dy, tail)


@op(f"qlora_bwd(Tensor dy, Tensor? x, {_PACKED}, {_BWD_TAIL}) -> {_BWD_RETURNS}")
def _qlora_bwd(dy: Tensor, x: Tensor | None, *args: Any) -> tuple[Tensor | None, ...]:
    tail = args[8:]
    weight = PackedWeight._make((*args[:7], (dy.shape[1], tail[0].shape[1])))
    return _backward(dy, x, weight, format_of(weight, args[7]), tail)


@fake("qlora_bwd")
def _(dy: Tensor, x: Tensor | None, *args: Any) -> tuple[Tensor | None, ...]:
    return _fake_backward(dy, args[8:])


def flags_of(
    *,
    bias: bool = False,
    dropout: bool = False,
    dora: bool = False,
    shared: bool = False,
    train: bool = False,
    save_mask: bool = False,
    lazy_h: bool = False,
) -> int:
    """The forward's `Problem.flags`."""
    return (
        BIAS * bias
        | DROPOUT * dropout
        | DORA * dora
        | SHARED * (dora and dropout and shared)
        | TRAIN * train
        | SAVE_MASK * (train and dropout and save_mask)
        | LAZY_H * (train and lazy_h)
    )
