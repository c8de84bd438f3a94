"""The ops beside the adapted linear, as the registry calls them: problem first, tensors after."""

from __future__ import annotations

import torch
from torch import Tensor

from fastlora.backends.triton import dropout, norm
from fastlora.backends.triton import quantize as quantize_kernels
from fastlora.backends.triton.launch import on_device
from fastlora.backends.triton.weight import check
from fastlora.math.nf4 import PackedWeight
from fastlora.problem import Problem


def quantize(problem: Problem, w: Tensor, quant_type: str, blocksize: int) -> tuple[Tensor, Tensor]:
    """w of any shape -> packed uint8 [ceil(numel/2), 1], absmax fp32 [blocks]; bits of math.nf4."""
    with on_device(w):
        return quantize_kernels.quantize(w, quant_type, blocksize)


def dequantize(problem: Problem, weight: PackedWeight, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """The dense weight, rounded once to `dtype`; into `out` where given. Bits of math.nf4."""
    check(weight)
    with on_device(weight.packed):
        if out is not None and not out.is_contiguous():
            return out.copy_(quantize_kernels.dequantize(weight, dtype))
        return quantize_kernels.dequantize(weight, dtype, out)


def dropout_mask(problem: Problem, seed: Tensor, stream: int, p: float) -> Tensor:
    """uint8 [m, ceil(k/8)]; bits of math.philox."""
    with on_device(seed):
        return dropout.dropout_mask(seed, stream, problem.m, problem.k, p, seed.device)


def dora_norm(problem: Problem, weight: Tensor | PackedWeight, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """|w + s b a| of each row, fp32 [n]."""
    if isinstance(weight, PackedWeight):
        check(weight)
    with on_device(a):
        return norm.dora_norm(weight, a, b, scale)
