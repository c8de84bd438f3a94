"""bitsandbytes' 4-bit layout: its state-dict keys and its `QuantState`, read and written without importing it.

Keys, after the weight's own name (https://github.com/bitsandbytes-foundation/bitsandbytes, `QuantState.as_dict`):
  ""                                uint8 [ceil(n/2), 1], or a bit view of it in another dtype
  "absmax"                          fp32 [blocks], or uint8 [blocks] when nested
  "quant_map"                       fp32 [16]
  "nested_absmax"                   fp32 [ceil(blocks/256)]          (nested only)
  "nested_quant_map"                fp32 [256]                       (nested only)
  "quant_state.bitsandbytes__nf4"   uint8, JSON: quant_type, blocksize, dtype, shape, nested_* (or ...__fp4)
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fastlora.errors import DtypeError, FastloraError, ShapeError, StateDictError
from fastlora.math import nf4
from fastlora.math.nf4 import PackedWeight

STATE_KEY = "quant_state.bitsandbytes__"
_KEYS = frozenset({"", "absmax", "quant_map", "nested_absmax", "nested_quant_map"})


def read_json(entry: Any, key: str) -> dict[str, Any]:
    """The JSON object whose UTF-8 bytes a state-dict entry holds.

    Raises:
        StateDictError: anything else; names `key`.
    """
    if not isinstance(entry, Tensor) or entry.dtype != torch.uint8 or entry.dim() != 1 or entry.is_meta:
        have = f"{entry.dtype} {tuple(entry.shape)}" if isinstance(entry, Tensor) else type(entry).__name__
        raise StateDictError(f"{key}: expected JSON as uint8 [bytes] with data, got {have}")
    try:
        facts = json.loads(bytes(entry.tolist()).decode("utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise StateDictError(f"{key} does not hold JSON: {error}") from None
    if not isinstance(facts, dict):
        raise StateDictError(f"{key}: expected a JSON object, got {type(facts).__name__}")
    return facts


def read_facts(facts: Mapping[str, Any], key: str) -> tuple[str, int, tuple[int, ...], torch.dtype]:
    """quant_type, blocksize, shape and dtype out of `read_json`'s object, checked.

    Raises:
        StateDictError: one is missing or cannot be; names `key`.
    """
    quant_type, blocksize, shape = facts.get("quant_type"), facts.get("blocksize"), facts.get("shape")
    if not isinstance(shape, list) or not all(isinstance(size, int) and size >= 0 for size in shape):
        raise StateDictError(f"{key}: expected shape as a list of sizes, got {shape!r}")
    dtype = getattr(torch, str(facts.get("dtype")), None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise StateDictError(f"{key}: expected the name of a floating-point dtype, got {facts.get('dtype')!r}")
    if not isinstance(quant_type, str) or not isinstance(blocksize, int):
        raise StateDictError(f"{key}: expected quant_type and blocksize, got {quant_type!r} and {blocksize!r}")
    try:
        nf4.check_format(quant_type, blocksize)
    except FastloraError as error:
        raise StateDictError(f"{key}: {error}") from None
    return quant_type, blocksize, tuple(shape), dtype


def packed_bytes(data: Tensor, numel: int) -> Tensor:
    """The uint8 [ceil(numel/2), 1] view of packed data held in any storage dtype; no copy, never a cast.

    Raises:
        ShapeError: the words do not hold exactly ceil(numel/2) bytes.
    """
    if not data.is_contiguous():
        raise ShapeError(
            f"expected contiguous packed weight bytes, got strides {data.stride()} for {tuple(data.shape)}"
        )
    data = data.detach()
    flat = data.reshape(-1)
    as_bytes = flat if flat.dtype == torch.uint8 else flat.view(torch.uint8)
    if as_bytes.numel() != (numel + 1) // 2:
        raise ShapeError(
            f"expected {(numel + 1) // 2} packed bytes for {numel} weights, got {as_bytes.numel()} "
            f"({tuple(data.shape)} {data.dtype}): the data is truncated or padded to whole storage words"
        )
    return as_bytes.view(-1, 1)


def _scalar_bytes(value: Any, device: torch.device) -> Tensor:
    offset = torch.as_tensor(value, device=device).to(torch.float32).reshape(1)
    return nf4.as_bytes(offset)


def _packed(
    data: Tensor, absmax: Tensor, code: Tensor, quant_type: str, blocksize: int, shape: tuple[int, ...], nested: Any
) -> PackedWeight:
    """Assemble and check; `nested` is None or (absmax2, offset, map, blocksize2)."""
    nf4.check_format(quant_type, blocksize)
    numel = math.prod(shape)
    blocks = (numel + blocksize - 1) // blocksize
    if absmax.numel() != blocks:
        raise ShapeError(
            f"expected {blocks} absmax values for shape {shape}, blocksize {blocksize}, got {absmax.numel()}"
        )
    if code.numel() != 16:
        raise ShapeError(f"expected a table of 16 values, got {tuple(code.shape)}")
    table = nf4.table(quant_type, device=code.device)
    custom = None if torch.equal(code.detach().float(), table) else nf4.as_bytes(code.detach().float())
    parts: tuple[Tensor, Tensor | None, Tensor | None]
    if nested is None:
        if absmax.dtype == torch.uint8:
            raise DtypeError("absmax is uint8 (nested) but nested_absmax is missing")
        parts = (nf4.as_bytes(absmax.detach().float().reshape(-1)), None, None)
    else:
        absmax2, offset, codes, blocksize2 = nested
        if absmax.dtype != torch.uint8:
            raise DtypeError(f"expected uint8 absmax with nested statistics, got {absmax.dtype}")
        if blocksize2 != nf4.NESTED_BLOCKSIZE:
            raise ShapeError(f"expected nested blocksize {nf4.NESTED_BLOCKSIZE}, got {blocksize2}")
        if absmax2.numel() != (blocks + blocksize2 - 1) // blocksize2:
            raise ShapeError(f"expected {(blocks + 255) // 256} nested absmax values, got {absmax2.numel()}")
        if not torch.equal(codes.float(), nf4.dynamic_map(device=codes.device)):
            raise DtypeError("nested_quant_map is not bitsandbytes' dynamic map: unknown nested format")
        parts = (
            absmax.detach().reshape(-1),
            nf4.as_bytes(absmax2.detach().float().reshape(-1)),
            _scalar_bytes(offset, absmax.device),
        )
    return PackedWeight._make((packed_bytes(data, numel), *parts, custom, quant_type, blocksize, tuple(shape)))


def from_quant_state(data: Tensor, state: Any) -> tuple[PackedWeight, torch.dtype]:
    """A `bitsandbytes.functional.QuantState` and its packed data, shared without a copy; and its source dtype.

    Raises:
        DtypeError: the CPU-packed layout (bitsandbytes rewrites weights in an eval forward on AVX512_BF16 hosts).
        ShapeError: sizes that do not fit one another.
    """
    if getattr(state, "packing_format_for_cpu", False):
        raise DtypeError(
            "this bitsandbytes weight was repacked for its CPU kernel (an eval forward on an AVX512_BF16 host): "
            "its canonical bytes are gone; adopt the layer before its first eval forward"
        )
    nested = None
    if state.state2 is not None:
        nested = (state.state2.absmax, state.offset, state.state2.code, state.state2.blocksize)
    shape = tuple(int(size) for size in state.shape)
    packed = _packed(data, state.absmax, state.code, state.quant_type, state.blocksize, shape, nested)
    return packed, state.dtype


def from_state(entries: Mapping[str, Tensor]) -> tuple[PackedWeight, torch.dtype]:
    """The same from state-dict entries keyed as in the module's docstring; the caller's dict is left alone.

    Raises:
        StateDictError: keys missing, foreign, or sizes that do not fit.
    """
    state_keys = [key for key in entries if key.startswith(STATE_KEY)]
    if len(state_keys) != 1:
        raise StateDictError(f"expected one key {STATE_KEY}nf4 or {STATE_KEY}fp4, got {sorted(entries)}")
    if unknown := sorted(set(entries) - {*_KEYS, state_keys[0]}):
        raise StateDictError(f"unexpected {unknown[0]!r} beside {state_keys[0]}")
    facts = read_json(entries[state_keys[0]], state_keys[0])
    quant_type, blocksize, shape, dtype = read_facts(facts, state_keys[0])
    try:
        nested = None
        if "nested_offset" in facts:
            absmax2, codes = entries["nested_absmax"], entries["nested_quant_map"]
            nested = (absmax2, float(facts["nested_offset"]), codes, facts["nested_blocksize"])
        packed = _packed(entries[""], entries["absmax"], entries["quant_map"], quant_type, blocksize, shape, nested)
    except KeyError as error:
        raise StateDictError(f"bitsandbytes state has no {error.args[0]!r}; got {sorted(entries)}") from None
    except (AttributeError, TypeError, ValueError) as error:  # fastlora's own errors are ValueErrors too
        raise StateDictError(f"not a bitsandbytes weight ({state_keys[0]}): {error}") from None
    return packed, dtype


def to_state(weight: PackedWeight, dtype: torch.dtype) -> dict[str, Tensor]:
    """State-dict entries that `bitsandbytes` (`Params4bit.from_prequantized`) reads; tensors share memory with ours."""
    device = weight.packed.device
    facts: dict[str, Any] = {
        "quant_type": weight.quant_type,
        "blocksize": weight.blocksize,
        "dtype": str(dtype).removeprefix("torch."),
        "shape": list(weight.shape),
    }
    code = nf4.table(weight.quant_type, device=device) if weight.code is None else nf4.as_fp32(weight.code)
    entries = {"": weight.packed, "quant_map": code}
    if weight.nested_absmax is None or weight.nested_offset is None:
        entries["absmax"] = nf4.as_fp32(weight.absmax)
    else:
        entries["absmax"] = weight.absmax
        entries["nested_absmax"] = nf4.as_fp32(weight.nested_absmax)
        entries["nested_quant_map"] = nf4.dynamic_map(device=device).clone()
        facts["nested_blocksize"] = nf4.NESTED_BLOCKSIZE
        facts["nested_dtype"] = "float32"
        facts["nested_offset"] = nf4.as_fp32(weight.nested_offset).item()
    text = json.dumps(facts).encode("utf-8")
    entries[f"{STATE_KEY}{weight.quant_type}"] = torch.tensor(list(text), dtype=torch.uint8, device=device)
    return entries
