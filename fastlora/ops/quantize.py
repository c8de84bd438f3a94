"""4-bit quantization and its inverse as public functions on plain tensors (`reference`: `math.nf4`)."""

from __future__ import annotations

import torch
from torch import Tensor

from fastlora.errors import DtypeError, ShapeError
from fastlora.math import nf4
from fastlora.math.nf4 import PackedWeight
from fastlora.ops import schema  # noqa: F401  (defines the ops)

SOURCE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def quantize(
    w: Tensor, quant_type: str = "nf4", blocksize: int = 64, double_quant: bool = False, *, backend: str | None = None
) -> PackedWeight:
    """Quantize w (any shape; fp32, bf16 or fp16) to blockwise NF4 or FP4 (QLoRA, 2305.14314, sections 3 and 4).

    Raises:
        DtypeError: another dtype. ConfigError: unknown quant_type or blocksize.
    """
    if w.dtype not in SOURCE_DTYPES:
        raise DtypeError(f"expected a float32, bfloat16 or float16 weight to quantize, got {w.dtype}")
    nf4.check_format(quant_type, blocksize)
    packed, absmax = torch.ops.fastlora.quantize(w.detach(), quant_type, blocksize, backend or "")
    if not double_quant:
        return PackedWeight(packed, nf4.as_bytes(absmax), None, None, None, quant_type, blocksize, tuple(w.shape))
    codes, nested, offset = torch.ops.fastlora.quantize_absmax(absmax, backend or "")
    parts = (packed, codes, nf4.as_bytes(nested), nf4.as_bytes(offset), None)
    return PackedWeight(*parts, quant_type=quant_type, blocksize=blocksize, shape=tuple(w.shape))


def dequantize(
    weight: PackedWeight, dtype: torch.dtype, *, out: Tensor | None = None, backend: str | None = None
) -> Tensor:
    """code[i] * absmax in fp32, rounded once to dtype (fp32, bf16, fp16 or fp64); shape `weight.shape`.

    Raises:
        ShapeError, DtypeError: `out` does not fit.
    """
    parts = (*weight[:7], False)
    if out is None:
        return torch.ops.fastlora.dequantize(*parts, weight.shape, dtype, backend or "")
    if tuple(out.shape) != tuple(weight.shape) or not out.is_contiguous():
        raise ShapeError(f"out must be contiguous with shape {tuple(weight.shape)}, got {tuple(out.shape)}")
    if out.dtype != dtype:
        raise DtypeError(f"out must be {dtype}, got {out.dtype}")
    torch.ops.fastlora.dequantize_into(*parts, backend or "", out=out)
    return out
