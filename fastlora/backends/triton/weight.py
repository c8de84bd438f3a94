"""A packed weight as kernels take it: pointer arguments in a fixed order, and the compile-time facts of its format."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastlora.errors import DtypeError
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


_made: dict[Hashable, Tensor] = {}


def made_once(what: Hashable, device: torch.device, make: Callable[[], Tensor]) -> Tensor:
    """A constant tensor, made on the device at its first use and kept.

    A graph that is being captured must not give its memory away: only a replay fills it, and another graph would not.
    There the constant is made again, by launches of the graph's own.
    """
    key = (what, device)
    found = _made.get(key)
    if found is None:
        found = make()
        if device.type == "cuda":
            if torch.cuda.is_current_stream_capturing():
                return found
            torch.cuda.current_stream(device).synchronize()  # the next to use it may be another stream
        _made[key] = found
    return found


def filled(host: Tensor, device: torch.device) -> Tensor:
    """The fp32 values of a CPU tensor on a device, by launches alone: no capture allows a copy from the host."""
    if device.type == "cpu":
        return host
    return torch.stack([torch.full((), value, dtype=torch.float32, device=device) for value in host.tolist()])


def table(quant_type: str, device: torch.device) -> Tensor:
    """The sixteen values of a 4-bit type, fp32."""
    return made_once(quant_type, device, lambda: filled(nf4.table(quant_type), device))


def _map(device: torch.device) -> Tensor:
    return made_once("map", device, lambda: filled(nf4.dynamic_map(), device))


def check(weight: PackedWeight) -> None:
    """Refuse a weight whose parts are not as long as its shape and blocksize say: kernels read without looking.

    Raises:
        ShapeError, DtypeError: expected and actual, see `nf4.check_packed`.
    """
    blocks = -(-weight.numel // weight.blocksize)
    nested = weight.nested_absmax
    if (
        weight.packed.numel() != (weight.numel + 1) // 2
        or weight.absmax.numel() != (blocks if nested is not None else 4 * blocks)
        or (nested is not None and nested.numel() != 4 * -(-blocks // nf4.NESTED_BLOCKSIZE))
        or (nested is None) != (weight.nested_offset is None)
    ):
        nf4.check_packed(weight)
    device = weight.packed.device
    for part in weight[1:5]:
        if isinstance(part, Tensor) and part.device != device:
            raise DtypeError(f"expected every part of the weight on {device}, got one on {part.device}")


def weight_args(weight: PackedWeight) -> WeightArgs:
    """What `primitives.decode_tile` needs of a weight, no copy but of misaligned scales."""
    device, k = weight.packed.device, weight.shape[-1] if weight.shape else 1
    nested = weight.nested_absmax is not None
    code = table(weight.quant_type, device) if weight.code is None else nf4.as_fp32(weight.code)
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
