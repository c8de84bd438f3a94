"""A packed weight as kernels take it: pointer arguments in a fixed order, and the compile-time facts of its format."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastlora.math import nf4
from fastlora.math.nf4 import PackedWeight

INT32_END = 1 << 31


class WeightArgs(NamedTuple):
    """Arguments of a kernel that decodes: `*pointers` in order, `**constexprs` by name.

    pointers: packed uint8, absmax (fp32, or uint8 codes when nested), nested_absmax fp32 | None,
    nested_offset fp32 [1] | None, table fp32 [16], map fp32 [256] | None.
    """

    pointers: tuple[Tensor | None, ...]
    constexprs: dict[str, Any]


@functools.cache
def _table(quant_type: str, device: torch.device) -> Tensor:
    return nf4.table(quant_type, device)


@functools.cache
def _map(device: torch.device) -> Tensor:
    return nf4.dynamic_map(device)


def weight_args(weight: PackedWeight) -> WeightArgs:
    """What `primitives.decode_tile` needs of a weight, no copy but of misaligned scales."""
    device, k = weight.packed.device, weight.shape[-1] if weight.shape else 1
    nested = weight.nested_absmax is not None
    code = _table(weight.quant_type, device) if weight.code is None else nf4.as_fp32(weight.code)
    packed = weight.packed.contiguous()
    pointers = (
        packed,
        weight.absmax.contiguous() if nested else nf4.as_fp32(weight.absmax),
        None if weight.nested_absmax is None else nf4.as_fp32(weight.nested_absmax),
        None if weight.nested_offset is None else nf4.as_fp32(weight.nested_offset),
        code,
        _map(device) if nested else None,
    )
    constexprs = {
        "BLOCKSIZE": weight.blocksize,
        "IS_NESTED": nested,
        "ALIGNED": k % weight.blocksize == 0 and packed.data_ptr() % 4 == 0,
    }
    return WeightArgs(pointers, constexprs)


def wide(*tensors: Tensor | PackedWeight | None) -> bool:
    """Whether any tensor has 2^31 elements or more, so that offsets need 64 bits."""
    return any(t is not None and (t.numel if isinstance(t, PackedWeight) else t.numel()) >= INT32_END for t in tensors)
