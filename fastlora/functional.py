"""Functions without modules: quantize, dequantize, the adapted linear and its parts (`fastlora.functional`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastlora.errors import DtypeError, ShapeError
from fastlora.math import philox
from fastlora.math.nf4 import PackedWeight
from fastlora.nn.quantized import QuantizedWeight, as_packed
from fastlora.ops import dora, qlora
from fastlora.ops.lora import as_seed, lora_linear

__all__ = ["dequantize", "dora_weight_norm", "dropout_mask", "lora_linear", "qlora_linear", "quantize"]


def quantize(w: Tensor, quant_type: str = "nf4", blocksize: int = 64, double_quant: bool = False) -> QuantizedWeight:
    """Quantize a float weight of any shape to blockwise NF4 or FP4 (QLoRA, 2305.14314, section 3).

    Args:
        w: fp32, bf16 or fp16.
        quant_type: "nf4" or "fp4".
        blocksize: weights that share one scale: 32, 64, ... 4096.
        double_quant: quantize the scales (absmax) to 8 bits too.

    Raises:
        ConfigError: unknown format. DtypeError: another dtype. ShapeError: NaN or inf in w.
    """
    return QuantizedWeight.from_float(w, quant_type, blocksize, double_quant)


def dequantize(qw: QuantizedWeight, dtype: torch.dtype | None = None, *, out: Tensor | None = None) -> Tensor:
    """The dense weight of `qw.shape`: code * absmax in fp32, rounded once to dtype (QLoRA, 2305.14314, section 3).

    Args:
        qw: what `quantize` made.
        dtype: fp32, bf16, fp16 or fp64; default: that of `out`, else `qw.dtype`.
        out: a contiguous tensor of that shape and dtype to write into.

    Raises:
        ShapeError, DtypeError: `out` does not fit.
    """
    return qw.dequantize(dtype if dtype is not None or out is None else out.dtype, out=out)


def qlora_linear(
    x: Tensor, weight: QuantizedWeight | PackedWeight, a: Tensor, b: Tensor, scale: float | Tensor, **keywords: Any
) -> Tensor:
    """y = x deq(weight)^T + scale * drop(x) a^T b^T + bias (QLoRA, 2305.14314, equation 5).

    Args:
        x: [..., k], float; the output has its dtype.
        weight: [n, k] in NF4 or FP4, as `quantize` makes it.
        a, b, scale, keywords: as `lora_linear`.

    Returns:
        [..., n].

    Raises:
        DtypeError: the weight is no 4-bit weight. And what `lora_linear` raises.
    """
    if isinstance(weight, QuantizedWeight):
        keywords.setdefault("on_grid", weight.absmax_on_grid)
    elif not isinstance(weight, PackedWeight):
        raise DtypeError(f"expected a QuantizedWeight, got {type(weight).__name__}")
    return qlora.qlora_linear(x, as_packed(weight), a, b, scale, **keywords)


def dora_weight_norm(
    weight: Tensor | QuantizedWeight | PackedWeight, a: Tensor, b: Tensor, scale: float, *, backend: str | None = None
) -> Tensor:
    """|weight + scale * b a| per output row, detached (DoRA, 2402.09353, equation 5).

    Args:
        weight: [n, k], dense in any float dtype or 4-bit.
        a, b: [r, k] and [n, r], one float dtype.
        scale: a float.
        backend: force one; never falls back in silence.

    Returns:
        fp32 [n], fp64 for a float64 weight.

    Raises:
        ShapeError, DtypeError: what was expected and what came. UnsupportedError: why no backend can.
    """
    operand = weight if isinstance(weight, (Tensor, PackedWeight)) else as_packed(weight)
    return dora.dora_weight_norm(operand, a, b, scale, backend=backend)


def dropout_mask(
    shape: Sequence[int],
    p: float,
    seed: int | Tensor,
    stream: int = 0,
    *,
    device: torch.device | str | None = None,
    backend: str | None = None,
) -> Tensor:
    """The dropout decision of an [..., k] input, bool, True = kept; the same on every device and backend.

    Philox4x32-10 (Salmon et al., 2011) of the seed, the stream, and each element's row and column.

    Args:
        shape: [..., k] of the input.
        p: share that is dropped, in [0, 1), in steps of 1 / 65536.
        seed: an int, or an int64 tensor [1].
        stream: tells the masks of one seed apart (projection * 65536 + adapter).
        device: of the mask; default: the seed's.
        backend: force one; never falls back in silence.

    Raises:
        ShapeError: p outside [0, 1), a negative size, or a seed outside [0, 2**63 - 1). DtypeError: another seed.
    """
    if not 0.0 <= p < 1.0:
        raise ShapeError(f"p must be in [0, 1), got {p}")
    if not shape or min(shape) < 0:
        raise ShapeError(f"expected a shape [..., k] of non-negative sizes, got {tuple(shape)}")
    own = seed.device if isinstance(seed, Tensor) else torch.get_default_device()
    seed = as_seed(seed, own if device is None else torch.device(device))
    rows = 1
    for size in shape[:-1]:
        rows *= size
    bits = torch.ops.fastlora.dropout_mask(seed, stream, rows, shape[-1], p, backend or "")
    return philox.unpack_bits(bits, shape[-1]).view(*shape)
