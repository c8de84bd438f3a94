"""The backend that runs everywhere: plain PyTorch, one fp32 (fp64 for fp64) evaluation of `math.reference`.

It is what a host without a compiler or a kernel falls back to, so it avoids needless copies, but its first duty is to
be right. Outputs are rounded once, to the dtype of x.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastlora.dispatch import cost
from fastlora.dispatch.registry import Kernel, Limits, register
from fastlora.math import nf4, philox, reference
from fastlora.math.nf4 import PackedWeight
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

Weight = Tensor | PackedWeight


def _working_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _dense(weight: Weight, dtype: torch.dtype) -> Tensor:
    return nf4.dequantize(weight, dtype) if isinstance(weight, PackedWeight) else weight.to(dtype)


def _adapter(
    a: Tensor, b: Tensor, scale: float, mag: Tensor | None, norm: Tensor | None, dtype: torch.dtype
) -> reference.Adapter:
    return reference.in_dtype(reference.Adapter(a, b, scale, mag, norm), dtype)


def _dropout(problem: Problem, mask: Tensor | None, p: float) -> reference.Dropout | None:
    if mask is None:
        return None
    semantics = "shared" if problem.flags & SHARED else "peft"
    return reference.Dropout(philox.unpack_bits(mask, problem.k), philox.keep_scale(p), semantics)


def dropout_mask(problem: Problem, seed: Tensor, stream: int, p: float) -> Tensor:
    """Bits [m, ceil(k/8)] of the dropout specification (`math.philox`)."""
    return philox.dropout_bits(seed, stream, problem.m, problem.k, p, device=seed.device)


def lora_fwd(
    problem: Problem,
    x: Tensor,
    weight: Weight,
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
    """`math.reference.forward` in fp32 or fp64."""
    dtype, flags = _working_dtype(problem.dtype), problem.flags
    mask = None
    if flags & DROPOUT:
        assert seed is not None
        mask = dropout_mask(problem, seed, stream, p)
    out = reference.forward(
        x.to(dtype),
        _dense(weight, dtype),
        _adapter(a, b, scale, mag, norm, dtype),
        None if bias is None else bias.to(dtype),
        _dropout(problem, mask, p),
    )
    train = flags & TRAIN
    return (
        out.y.to(problem.dtype),
        out.h if train and not flags & LAZY_H else None,
        mask if train and flags & SAVE_MASK else None,
        out.z.to(problem.dtype) if train and flags & DORA else None,
    )


def lora_bwd(
    problem: Problem,
    dy: Tensor,
    x: Tensor | None,
    weight: Weight,
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
) -> tuple[Tensor | None, ...]:
    """The equations of `math.reference.backward`, each only if its gradient is asked for."""
    dtype, flags = _working_dtype(problem.dtype), problem.flags
    if flags & DROPOUT and mask is None:
        assert seed is not None
        mask = dropout_mask(problem, seed, stream, p)
    dropout = _dropout(problem, mask, p)
    dy, d = dy.to(dtype), dy.to(dtype)
    adapter = _adapter(a, b, scale, mag, norm, dtype)
    if adapter.mag is not None and adapter.norm is not None:
        d = dy * (adapter.mag / adapter.norm)
    g = d @ adapter.b
    dx = da = db = dmag = dbias = None
    if flags & NEED_DX:
        delta = scale * (g @ adapter.a)
        w = _dense(weight, dtype)
        if flags & DORA and flags & DROPOUT and not flags & SHARED:
            dx = dy @ w + reference.drop((d - dy) @ w + delta, dropout)
        else:
            dx = (d @ w).add_(reference.drop(delta, dropout))
        dx = dx.to(problem.dtype)
    if flags & NEED_DA:
        assert x is not None
        da = (scale * (g.T @ reference.drop(x.to(dtype), dropout))).to(a.dtype)
    if flags & NEED_DB:
        if h is None:
            assert x is not None
            h = reference.drop(x.to(dtype), dropout) @ adapter.a.T
        db = (scale * (d.T @ h)).to(b.dtype)
    if flags & NEED_DMAG:
        assert z is not None and adapter.norm is not None
        dmag = (dy * z.to(dtype)).sum(0) / adapter.norm
    if flags & NEED_DBIAS:
        dbias = dy.sum(0)
    return dx, da, db, dmag, dbias


def dora_norm(problem: Problem, weight: Weight, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """|w + s b a| per row, fp32 (fp64 for fp64)."""
    dtype = _working_dtype(problem.dtype)
    return reference.dora_norm(_dense(weight, dtype), a.to(dtype), b.to(dtype), scale)


def quantize(problem: Problem, w: Tensor, quant_type: str, blocksize: int) -> tuple[Tensor, Tensor]:
    """`math.nf4.quantize_blocks`."""
    return nf4.quantize_blocks(w, quant_type, blocksize)


def quantize_absmax(problem: Problem, absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`math.nf4.quantize_absmax`."""
    return nf4.quantize_absmax(absmax)


def dequantize(problem: Problem, weight: PackedWeight, dtype: torch.dtype, out: Tensor | None) -> Tensor:
    """`math.nf4.dequantize`."""
    return nf4.dequantize(weight, dtype, out)


def _seconds(problem: Problem) -> float:
    """Unfused and through fp32 copies: about three times the roofline, and ten small launches."""
    return 3 * cost.roofline_seconds(problem) + 10 * cost.device(problem.device).launch


for _run in (lora_fwd, lora_bwd, dora_norm, quantize, quantize_absmax, dequantize, dropout_mask):
    register(Kernel(op=_run.__name__, backend="reference", run=_run, limits=Limits(), seconds=_seconds, plan="torch"))
