"""QuantizedWeight: a frozen 4-bit weight as an `nn.Module` whose bytes survive everything modules go through."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastlora.errors import DtypeError, ShapeError, StateDictError
from fastlora.io import bnb
from fastlora.math import nf4
from fastlora.math.nf4 import PackedWeight
from fastlora.nn.sharded import fill, is_sharded, whole
from fastlora.ops import quantize as ops

_STATE_BYTES = 256  # quant_state is padded to a fixed length so that any checkpoint loads in place
PARTS = ("packed", "absmax", "nested_absmax", "nested_offset", "code_table")


def _frozen(tensor: Tensor | None) -> nn.Parameter | None:
    return None if tensor is None else nn.Parameter(tensor.detach(), requires_grad=False)


class QuantizedWeight(nn.Module):
    """A blockwise NF4 or FP4 weight (QLoRA, 2305.14314, section 3), optionally with doubly quantized absmax.

    Every part is a uint8 `Parameter(requires_grad=False)`: fp32 parts are held as their bytes, so neither `.to(dtype)`
    nor FSDP2's mixed precision ever casts them, and DDP does not broadcast them in each forward.

    Attributes:
        packed: uint8 [ceil(numel/2), 1]; element 2i is the high nibble of byte i.
        absmax: uint8 [blocks, 4], the bytes of fp32; or uint8 [blocks], 8-bit codes, when nested.
        nested_absmax: uint8 [ceil(blocks/256), 4], the bytes of fp32; or None.
        nested_offset: uint8 [1, 4], the bytes of fp32; or None.
        code_table: uint8 [16, 4], a per-tensor table's bytes; None for the standard table (see `code`).
        quant_state: uint8 [256], the static facts as JSON.
        shape: of the dense weight.
        blocksize: weights that share one scale.
        quant_type: "nf4" or "fp4".
        dtype: what `dequantize()` gives.
        absmax_on_grid: every absmax is a bf16 value (a merge into it would swallow small deltas).
    """

    packed: nn.Parameter
    absmax: nn.Parameter
    nested_absmax: nn.Parameter | None
    nested_offset: nn.Parameter | None
    code_table: nn.Parameter | None
    quant_state: nn.Parameter

    def __init__(self, weight: PackedWeight, dtype: torch.dtype = torch.float32, absmax_on_grid: bool | None = None):
        super().__init__()
        self._adopt(weight, dtype, absmax_on_grid)

    def _adopt(self, weight: PackedWeight, dtype: torch.dtype, absmax_on_grid: bool | None) -> None:
        for name, tensor in zip(PARTS, weight[:5], strict=True):
            self.register_parameter(name, _frozen(tensor))
        self.shape = torch.Size(weight.shape)
        self.blocksize, self.quant_type, self.dtype = weight.blocksize, weight.quant_type, dtype
        if absmax_on_grid is None:
            nested_or_meta = weight.nested_absmax is not None or weight.absmax.is_meta
            absmax_on_grid = False if nested_or_meta else nf4.absmax_on_grid(nf4.as_fp32(weight.absmax))
        self.absmax_on_grid = absmax_on_grid
        state = json.dumps(self._facts()).encode("utf-8").ljust(_STATE_BYTES)
        self.register_parameter("quant_state", _frozen(torch.tensor(list(state), dtype=torch.uint8, device="cpu")))
        if weight.packed.device.type != "cpu":
            self.quant_state = nn.Parameter(self.quant_state.to(weight.packed.device), requires_grad=False)

    def _facts(self) -> dict[str, Any]:
        return {
            "quant_type": self.quant_type,
            "blocksize": self.blocksize,
            "dtype": str(self.dtype).removeprefix("torch."),
            "shape": list(self.shape),
            "absmax_on_grid": self.absmax_on_grid,
        }

    # --- making one ---------------------------------------------------------------------------------------------------

    @classmethod
    def from_float(
        cls, w: Tensor, quant_type: str = "nf4", blocksize: int = 64, double_quant: bool = False
    ) -> QuantizedWeight:
        """Quantize a float weight (fp32, bf16 or fp16; any shape, any device; on meta only the shapes).

        Args:
            w: the weight.
            quant_type: "nf4" or "fp4".
            blocksize: weights that share one scale, a power of two in 32 ... 4096.
            double_quant: quantize the scales to 8 bits too.

        Raises:
            ConfigError: unknown format. DtypeError: not one of the three dtypes.
            ShapeError: NaN or inf in the weight: how many blocks, and which is the first.
        """
        weight = ops.quantize(w, quant_type, blocksize, double_quant)
        if not w.is_meta and not double_quant:
            _check_finite(nf4.as_fp32(weight.absmax))
        elif not w.is_meta:
            assert weight.nested_offset is not None
            if not nf4.as_fp32(weight.nested_offset).isfinite().item():
                _check_finite(nf4.as_fp32(ops.quantize(w, quant_type, blocksize).absmax))
        return cls(weight, w.dtype)

    @classmethod
    def empty(
        cls,
        shape: tuple[int, ...],
        quant_type: str = "nf4",
        blocksize: int = 64,
        double_quant: bool = False,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> QuantizedWeight:
        """One of the given format with zero bytes, to load into.

        Args:
            shape: of the dense weight.
            quant_type, blocksize, double_quant: the format, as in `from_float`.
            dtype: what `dequantize()` will give.
            device: of the bytes.

        Raises:
            ConfigError: unknown format.
        """
        nf4.check_format(quant_type, blocksize)
        numel = math.prod(shape)
        blocks = (numel + blocksize - 1) // blocksize

        def part(*size: int) -> Tensor:
            return torch.zeros(size, dtype=torch.uint8, device=device)

        nested = (part((blocks + 255) // 256, 4), part(1, 4)) if double_quant else (None, None)
        absmax = part(blocks) if double_quant else part(blocks, 4)
        packed = part((numel + 1) // 2, 1)
        weight = PackedWeight(packed, absmax, nested[0], nested[1], None, quant_type, blocksize, shape)
        return cls(weight, dtype)

    @classmethod
    def from_bnb(cls, source: Any) -> QuantizedWeight:
        """Adopt a `bitsandbytes` `Linear4bit`, `Params4bit` or `(data, QuantState)`: same bytes, no copy.

        Args:
            source: one of these; one that bitsandbytes has not quantized yet is quantized here.

        Raises:
            DtypeError: not one of these, or repacked for bitsandbytes' CPU kernel.
        """
        if isinstance(source, tuple):
            data, state = source
        else:
            data = getattr(source, "weight", source)
            state = getattr(data, "quant_state", None) or getattr(source, "quant_state", None)
            if state is None and getattr(data, "bnb_quantized", None) is False and data.is_floating_point():
                # bitsandbytes quantizes on the first .to(device); this one was never moved.
                return cls.from_float(data.detach(), data.quant_type, data.blocksize, data.compress_statistics)
        if state is None:
            raise DtypeError(
                f"expected a bitsandbytes Linear4bit, Params4bit or QuantState, got {type(source).__name__}"
            )
        return cls(*bnb.from_quant_state(data, state))

    @classmethod
    def from_torchao(cls, source: Any) -> QuantizedWeight:
        """Take over a torchao `NF4Tensor`: exact codes, its table as `code_table`, its scales expanded to fp32.

        Args:
            source: the tensor, of any shape.

        Raises:
            DtypeError: something else.
        """
        needed = (
            "quantized_data",
            "quantized_scalers",
            "quantization_factor",
            "scaler_block_size",
            "nf4",
            "block_size",
        )
        if missing := [name for name in needed if not hasattr(source, name)]:
            raise DtypeError(f"expected a torchao NF4Tensor, got {type(source).__name__} without {missing[0]}")
        scalers = (source.quantized_scalers, source.quantization_factor, source.scaler_block_size)
        absmax = source.dequantize_scalers(*scalers).reshape(-1).float().contiguous()
        code = nf4.as_bytes(source.nf4.float().contiguous())
        packed = source.quantized_data.reshape(-1, 1).contiguous()
        shape = tuple(source.shape)
        weight = PackedWeight(packed, nf4.as_bytes(absmax), None, None, code, "nf4", source.block_size, shape)
        return cls(weight, source.dtype)

    def to_bnb(self) -> Any:
        """A `bitsandbytes.nn.Params4bit` that shares these bytes (needs bitsandbytes)."""
        from bitsandbytes.nn import Params4bit

        entries = bnb.to_state(self.pack(), self.dtype)
        data = entries.pop("")
        return Params4bit.from_prequantized(data, entries, requires_grad=False, device=str(data.device))

    # --- using it -----------------------------------------------------------------------------------------------------

    def pack(self) -> PackedWeight:
        """The tensors and facts as the ops take them."""
        part = self._parameters
        return PackedWeight(
            part["packed"],  # type: ignore[arg-type]
            part["absmax"],  # type: ignore[arg-type]
            part["nested_absmax"],
            part["nested_offset"],
            part["code_table"],
            self.quant_type,
            self.blocksize,
            self.shape,
        )

    @property
    def code(self) -> Tensor:
        """The sixteen values, fp32 [16]."""
        if self.code_table is None:
            return nf4.table(self.quant_type, device=self.packed.device)
        return nf4.as_fp32(self.code_table)

    @property
    def nested(self) -> bool:
        """Whether absmax itself is quantized."""
        return self.nested_absmax is not None

    @property
    def nbytes(self) -> int:
        """Bytes of all parts."""
        return sum(parameter.nbytes for parameter in self.parameters())

    @property
    def device(self) -> torch.device:
        """Where the bytes are."""
        return self.packed.device

    def dequantize(self, dtype: torch.dtype | None = None, *, out: Tensor | None = None) -> Tensor:
        """The dense weight of `self.shape`, code * absmax in fp32 rounded once to dtype (default: the source dtype).

        Args:
            out: a contiguous tensor of that shape and dtype to write into.

        Raises:
            ShapeError, DtypeError: `out` does not fit.
        """
        return ops.dequantize(self.pack(), dtype or self.dtype, out=out)

    def forward(self, *args: Any) -> Tensor:
        """Not callable: a weight is used through a layer or `fastlora.functional.qlora_linear`.

        Raises:
            DtypeError: always.
        """
        raise DtypeError("a QuantizedWeight is not called; use its layer or fastlora.functional.qlora_linear")

    def extra_repr(self) -> str:
        """Shape and format, for `repr`."""
        nested = ", nested" if self.nested else ""
        return f"shape={tuple(self.shape)}, {self.quant_type}, blocksize={self.blocksize}{nested}, dtype={self.dtype}"

    # --- loading ------------------------------------------------------------------------------------------------------

    def read(self, entries: Mapping[str, Tensor], assign: bool = False) -> Callable[[], None]:
        """Check state-dict entries (ours or bitsandbytes', keyed after the weight's name) and return how to load them.

        Nothing changes until the returned function is called. `assign` takes the tensors themselves, without a copy.

        Raises:
            StateDictError: truncated, foreign or mis-shaped entries.
        """
        if any(key.startswith(bnb.STATE_KEY) for key in entries):
            weight, dtype = bnb.from_state(entries)
            on_grid = None
        else:
            weight, dtype, on_grid = _from_own_state(entries)
        if tuple(weight.shape) != tuple(self.shape):
            raise StateDictError(f"expected a weight of shape {tuple(self.shape)}, got {tuple(weight.shape)}")
        if is_sharded(self.packed) or is_sharded(weight.packed):
            return self._read_sharded(weight, dtype, entries if assign else None)
        if assign:
            return lambda: self._adopt(weight, dtype, on_grid)
        if not self.packed.is_meta and any(t is not None and t.is_meta for t in weight[:5]):
            raise StateDictError("expected tensors with data, got meta tensors")
        # A weight on meta has nothing to copy into: it takes the bytes where they are.
        device = weight.packed.device if self.packed.is_meta else self.packed.device
        parts = zip(PARTS, weight[:5], strict=True)
        moved: Any = {part: None if t is None else t.detach().to(device, copy=True) for part, t in parts}
        moved["code"] = moved.pop("code_table")
        return lambda: self._adopt(weight._replace(**moved), dtype, on_grid)

    def _read_sharded(
        self, weight: PackedWeight, dtype: torch.dtype, assigned: Mapping[str, Tensor] | None
    ) -> Callable[[], None]:
        """How to load a weight that is cut over processes: in place, so its format must be the one it has."""
        have, want = self.pack(), weight
        facts = [(w.quant_type, w.blocksize, *(part is not None for part in w[:5])) for w in (have, want)]
        if facts[0] != facts[1] or dtype != self.dtype:
            raise StateDictError(
                f"a weight cut over processes is loaded in place: expected {self.extra_repr()}, got "
                f"{want.quant_type}, blocksize={want.blocksize}, nested={want.nested}, dtype={dtype}"
            )
        parts = [(name, part) for name, part in zip(PARTS, weight[:5], strict=True) if part is not None]

        def load() -> None:
            for name, part in parts:
                parameter = self._parameters[name]
                assert parameter is not None
                if assigned is not None and is_sharded(part):
                    self.register_parameter(name, nn.Parameter(part.detach(), requires_grad=False))
                else:
                    fill(parameter, part)
            if assigned is not None and is_sharded(assigned.get("quant_state")):
                self.quant_state = nn.Parameter(assigned["quant_state"].detach(), requires_grad=False)

        return load

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        if getattr(self, "_loaded_by_layer", False):
            return
        entries = {key.removeprefix(prefix): value for key, value in state_dict.items() if key.startswith(prefix)}
        try:
            self.read(entries, bool(local_metadata.get("assign_to_params_buffers", False)))()
        except StateDictError as error:
            error_msgs.append(f"{prefix.rstrip('.') or 'weight'}: {error}")


def _check_finite(absmax: Tensor) -> None:
    bad = (~absmax.isfinite()).nonzero().flatten()
    if bad.numel():
        raise ShapeError(
            f"cannot quantize a weight with NaN or inf: {bad.numel()} of {absmax.numel()} blocks, first {bad[0].item()}"
        )


def _from_own_state(entries: Mapping[str, Tensor]) -> tuple[PackedWeight, torch.dtype, bool]:
    required = ("packed", "absmax", "quant_state")
    if missing := [name for name in required if name not in entries]:
        raise StateDictError(f"missing {missing[0]!r}; expected {', '.join(required)}, got {sorted(entries) or 'none'}")
    if unknown := sorted(set(entries) - {*PARTS, "quant_state"}):
        raise StateDictError(f"unexpected {unknown[0]!r}; known: {', '.join(PARTS)}, quant_state")
    facts = bnb.read_json(whole(entries["quant_state"]), "quant_state")
    quant_type, blocksize, shape, dtype = bnb.read_facts(facts, "quant_state")
    numel = math.prod(shape)
    blocks = (numel + blocksize - 1) // blocksize
    nested = "nested_absmax" in entries
    if nested != ("nested_offset" in entries):
        raise StateDictError("expected both nested_absmax and nested_offset, or neither")
    sizes: dict[str, tuple[int, ...]] = {
        "packed": ((numel + 1) // 2, 1),
        "absmax": (blocks,) if nested else (blocks, 4),
        "nested_absmax": ((blocks + 255) // 256, 4),
        "nested_offset": (1, 4),
        "code_table": (16, 4),
    }
    for name, size in sizes.items():
        tensor = entries.get(name)
        if tensor is not None and (tensor.dtype != torch.uint8 or tuple(tensor.shape) != size):
            raise StateDictError(f"expected {name} as uint8 {size}, got {tensor.dtype} {tuple(tensor.shape)}")
    parts: Any = [entries.get(name) for name in PARTS]
    weight = PackedWeight._make((*parts, quant_type, blocksize, shape))
    return weight, dtype, bool(facts.get("absmax_on_grid", False))


def as_packed(weight: QuantizedWeight | PackedWeight) -> PackedWeight:
    """The op-level view of either form."""
    return weight.pack() if isinstance(weight, QuantizedWeight) else weight
