"""An adapter is folded into a model's folder, a few rows of a weight at a time: the model is never in memory."""

from __future__ import annotations

import dataclasses
import functools
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastlora.errors import DtypeError, ShapeError, StateDictError
from fastlora.io import bnb, peft
from fastlora.math.nf4 import NESTED_BLOCKSIZE, PackedWeight
from fastlora.nn.adapted import AdaptedLinear
from fastlora.nn.adapter_file import AdapterFile
from fastlora.nn.linear import LoraLinear, QLoraLinear
from fastlora.nn.output import check_output, check_space, copy_others, whole_folder
from fastlora.nn.quantize_folder import CONFIG, copy_rows, read_config, write_config
from fastlora.nn.quantized import QuantizedWeight
from fastlora.nn.shards import Entry, Shards, dtype_of
from fastlora.nn.streaming import Files

# Weights merged at once, 4 MB in fp32: pieces of 16 MB left a heap in holes and took twice the memory. A layer of no
# more is merged in one piece, as `layer.merge` does it.
_AT_ONCE = 1 << 20
_NAME = "merged"
_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclasses.dataclass
class Merged:
    """What `merge_folder` did.

    Attributes:
        layers: how many weights an adapter was folded into. replaced: tensors that the adapter holds in full.
        method: "LoRA", "DoRA" or "AdaLoRA". ranks: those of the layers, each once.
        quantized: how many of the weights were 4-bit. dtypes: of the merged weights.
        rounding: |rounded - exact| / |exact| of all merged weights together (Frobenius).
        lost: |rounded - exact| / |exact - before|: rounding beside what the adapter adds; 0 if it adds nothing. It is
            noise, spread evenly: an adapter of few ranks still shows through half its own norm of it.
        worst: the layer where that is largest. worst_lost: its value.
        bytes_before, bytes_after: of all weights. files: how many weight files. copied: the other files.
        bare: DoRA without saved magnitudes, taken as the row norms of W + s B A.
    """

    layers: int
    replaced: list[str]
    method: str
    ranks: list[int]
    quantized: int
    dtypes: list[str]
    rounding: float
    lost: float
    worst: str
    worst_lost: float
    bytes_before: int
    bytes_after: int
    files: int
    copied: list[str]
    bare: bool


class _Sums(NamedTuple):
    """Squared norms over weights: the exact result, what rounding changed, what the adapter changed."""

    exact: float = 0.0
    rounded: float = 0.0
    moved: float = 0.0

    def plus(self, other: _Sums) -> _Sums:
        return _Sums(*(mine + theirs for mine, theirs in zip(self, other, strict=True)))

    @property
    def lost(self) -> float:
        return math.sqrt(self.rounded / self.moved) if self.moved else 0.0


def merge_folder(
    folder: str | os.PathLike[str],
    adapter: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
    advance: Callable[[int, int], None] | None = None,
) -> Merged:
    """Write a model's folder with an adapter folded into its weights; no model is built, nothing needs transformers.

    The values are those of `fastlora.merge_and_unload`: the sum in fp32, rounded once. A few rows of a weight are in
    memory at a time, so that the peak hardly depends on the model. The output appears whole, at the end, or not at
    all, in as many files as the input has.

    Args:
        folder: with config.json and safetensors files: float weights, or 4-bit ones in bitsandbytes' layout.
        adapter: a folder in PEFT's layout: LoRA, DoRA, rsLoRA, AdaLoRA, with rank and alpha patterns, trained biases
            and modules_to_save.
        output: the folder to make.
        dtype: of every float tensor of the result. Default: what it is; where weights are 4-bit, bitsandbytes'
            compute dtype if that has 16 bits, else bfloat16.
        overwrite: replace a model's folder that is there.
        advance: called with bytes read so far and in all.

    Raises:
        StateDictError: damaged files; an adapter that does not fit the model. ConfigError: one that cannot be merged.
        ShapeError: NaN or inf would come out; named. DtypeError: `dtype` is none. OSError: files and folders.
    """
    source, target = Path(folder), Path(output)
    if dtype is not None and dtype not in _FLOATS:
        raise DtypeError(f"expected a floating-point torch.dtype for the merged model, got {dtype!r}")
    check_output(target, [source, Path(adapter)], mark=CONFIG, overwrite=overwrite)
    merge = _Merge(Files(source), AdapterFile(adapter), read_config(source), dtype)
    with whole_folder(target) as scratch:
        shards = Shards(scratch, merge.plan)
        check_space(scratch, shards.nbytes)
        with shards:
            done = 0
            for size in merge.run(shards):
                done += size
                if advance is not None:
                    advance(done, merge.nbytes)
        copied = copy_others(source, scratch)
        write_config(scratch, merge.config)
    return merge.report(shards.nbytes, copied)


class _Merge:
    """One merge: what is made from what, checked; then carried out."""

    def __init__(self, files: Files, adapter: AdapterFile, config: dict[str, Any], dtype: torch.dtype | None) -> None:
        adapter.refuse_rewritten_base()
        self.files, self.adapter = files, adapter
        self.weights = {f"{name}.weight": name for name in adapter.checkpoint.adapters}
        self.parts = _quantized_parts(files)
        if dtype is None and self.parts:
            dtype = _sixteen(config)
        self.dtype = dtype
        self.config = {key: value for key, value in config.items() if key != "quantization_config"}
        if dtype is not None:
            word = "torch_dtype" if "torch_dtype" in config and "dtype" not in config else "dtype"
            self.config[word] = str(dtype).removeprefix("torch.")
        self.shapes = {key: self._shape(key) for key in files.facts if "." not in self._part(key)}
        self._check()
        self.plan: dict[str, dict[str, Entry]] = {}
        for key, shape in self.shapes.items():
            self.plan.setdefault(files.facts[key].file.name, {})[key] = Entry(self._dtype(key), shape)
        self.nbytes = sum(_nbytes(files, key) for key in files.facts)
        self.total, self.worst, self.worst_lost = _Sums(), "", 0.0

    def _part(self, key: str) -> str:
        """Something with a dot for the parts of a quantized weight other than its bytes."""
        owner = next((owner for owner in (key.rsplit(".", 1)[0], key.rsplit(".", 2)[0]) if owner in self.parts), None)
        return "" if owner is None else f".{owner}"

    def _shape(self, key: str) -> tuple[int, ...]:
        if key not in self.parts:
            return self.files.facts[key].shape
        state = next(part for part in self.parts[key] if part.startswith(bnb.STATE_KEY))
        facts = bnb.read_json(self.files.read(f"{key}.{state}"), f"{key}.{state}")
        return bnb.read_facts(facts, key)[2]

    def _dtype(self, key: str) -> torch.dtype:
        """What a tensor of the result has."""
        if key in self.parts:
            assert self.dtype is not None
            return self.dtype
        own = dtype_of(self.files.facts[key].dtype, key)
        return self.dtype if self.dtype is not None and own in _FLOATS else own

    def _check(self) -> None:
        for key, name in self.weights.items():
            tensors = self.adapter.checkpoint.adapters[name]
            if key not in self.shapes:
                raise StateDictError(f"the adapter has {name}, and {self.files.folder} has no {key}")
            if key not in self.parts and dtype_of(self.files.facts[key].dtype, key) not in _FLOATS:
                raise StateDictError(
                    f"cannot merge into {key}: expected a float weight, or bitsandbytes' 4-bit layout, got "
                    f"{self.files.facts[key].dtype}"
                )
            fits = (tensors.b.shape[0], tensors.a.shape[1])
            if self.shapes[key] != fits:
                raise StateDictError(f"{name}: the adapter fits a weight {fits}, the model has {self.shapes[key]}")
        for key, tensor in self.adapter.checkpoint.others.items():
            if key not in self.shapes:
                raise StateDictError(
                    f"the adapter holds its own {key}, and {self.files.folder} has none (is it tied to another?)"
                )
            if key in self.parts or self.shapes[key] != tuple(tensor.shape) or key in self.weights:
                raise StateDictError(f"the adapter's own {key} {tuple(tensor.shape)} cannot replace the model's")

    def run(self, shards: Shards) -> Iterator[int]:
        """Write every tensor; yields the bytes read for each piece."""
        for key in self.shapes:
            if key in self.weights:
                yield from self._merge(key, shards)
            elif key in self.parts:  # 4-bit, without an adapter
                for first, layer in self._pieces(key):
                    shards.write(key, self._rounded(key, layer.dequantize(torch.float32)), first)
                    yield _share(self, key, layer)
            elif key in self.adapter.checkpoint.others:
                value = self.adapter.read(self.adapter.checkpoint.others[key])
                shards.write(key, self._rounded(key, value))
                yield _nbytes(self.files, key)
            else:
                yield from copy_rows(self.files, key, functools.partial(self._copy, shards, key))

    def _copy(self, shards: Shards, key: str, rows: Tensor, first: int) -> None:
        """Rows without an adapter; NaN in what the model never uses is the model's own affair."""
        shards.write(key, rows.to(self._dtype(key)), first)

    def _merge(self, key: str, shards: Shards) -> Iterator[int]:
        name, sums = self.weights[key], _Sums()
        tensors = self.adapter.tensors(name)
        for first, layer in self._pieces(key):
            self._adapt(layer, name, tensors, first)
            before, exact = layer.dequantize(torch.float32), layer.merged_weight([_NAME])
            rounded = self._rounded(key, exact)
            sums = sums.plus(_Sums(_square(exact), _square(rounded.to(exact.dtype) - exact), _square(exact - before)))
            shards.write(key, rounded, first)
            yield _share(self, key, layer)
        self.total = self.total.plus(sums)
        if sums.lost >= self.worst_lost:
            self.worst, self.worst_lost = name, sums.lost

    def _adapt(self, layer: AdaptedLinear, name: str, tensors: peft.AdapterTensors, first: int) -> None:
        """Put the adapter on a layer that holds the rows from `first` on."""
        rows = slice(first, first + layer.out_features)
        a, b = tensors.a, tensors.b[rows]
        layer.add_adapter(_NAME, self.adapter.configs[name], (a, b) if tensors.e is None else (a, b, tensors.e))
        if tensors.magnitude is not None:
            magnitude = layer.lora_magnitude[_NAME]
            magnitude.data = tensors.magnitude.reshape(-1)[rows].to(magnitude.dtype)
        elif self.adapter.bare:
            magnitude = layer.lora_magnitude[_NAME]
            magnitude.data = layer.weight_norm(_NAME).to(magnitude.dtype)

    def _pieces(self, key: str) -> Iterator[tuple[int, AdaptedLinear]]:
        """The weight as layers without an adapter, a few rows each, with the first row's index."""
        n, k = self.shapes[key]
        quantized = self._packed(key) if key in self.parts else None
        step = n if n * k <= _AT_ONCE else max(1, _AT_ONCE // k)
        if quantized is not None and step < n:
            unit = quantized.blocksize * (NESTED_BLOCKSIZE if quantized.nested else 1)
            unit //= math.gcd(unit, k)  # so many rows are whole blocks
            step = max(unit, step // unit * unit)
        for first in range(0, n, step):
            end = min(first + step, n)
            if quantized is None:
                yield first, _dense(self.files.rows(key, first, end))
            else:
                yield first, _four_bit(_rows_of(quantized, first, end))

    def _packed(self, key: str) -> PackedWeight:
        entries = {part: self.files.read(f"{key}.{part}" if part else key) for part in self.parts[key]}
        try:
            return bnb.from_state(entries)[0]
        except StateDictError as error:
            raise StateDictError(f"{key}: {error}") from None

    def _rounded(self, key: str, exact: Tensor) -> Tensor:
        """In the dtype of the result.

        Raises:
            ShapeError: NaN or inf.
        """
        rounded = exact.to(self._dtype(key))
        if rounded.is_floating_point() and not rounded.isfinite().all():
            why = "" if exact.isfinite().all() else ": the model or the adapter holds some"
            why = why or f": too large for {str(rounded.dtype).removeprefix('torch.')}"
            raise ShapeError(f"merging gives NaN or inf in {key}{why}; nothing was written")
        return rounded

    def report(self, nbytes: int, copied: list[str]) -> Merged:
        """What was done."""
        configs, config = self.adapter.configs.values(), self.adapter.config
        plain = "DoRA" if config.use_dora else "LoRA"
        return Merged(
            layers=len(self.weights),
            replaced=sorted(self.adapter.checkpoint.others),
            method=plain if not hasattr(config, "init_r") else "AdaLoRA",
            ranks=sorted({each.r for each in configs}),
            quantized=sum(key in self.parts for key in self.weights),
            dtypes=sorted({str(self._dtype(key)).removeprefix("torch.") for key in self.weights}),
            rounding=math.sqrt(self.total.rounded / self.total.exact) if self.total.exact else 0.0,
            lost=self.total.lost,
            worst=self.worst,
            worst_lost=self.worst_lost,
            bytes_before=self.nbytes,
            bytes_after=nbytes,
            files=len(self.plan),
            copied=copied,
            bare=self.adapter.bare,
        )


def _nbytes(files: Files, key: str) -> int:
    return math.prod(files.facts[key].shape) * dtype_of(files.facts[key].dtype, key).itemsize


def _share(merge: _Merge, key: str, layer: AdaptedLinear) -> int:
    """The bytes of the input that some rows stand for."""
    parts = merge.parts.get(key, [""])
    whole = sum(_nbytes(merge.files, f"{key}.{part}" if part else key) for part in parts)
    return whole * layer.out_features // max(1, merge.shapes[key][0])


def _square(x: Tensor) -> float:
    return float(torch.linalg.vector_norm(x, dtype=torch.float64).item() ** 2)


def _quantized_parts(files: Files) -> dict[str, list[str]]:
    """Weight -> the parts it is stored in, of the weights in bitsandbytes' layout."""
    marks = [key for key in files.facts if f".{bnb.STATE_KEY}" in key]
    weights = {key.partition(f".{bnb.STATE_KEY}")[0] for key in marks}
    parts: dict[str, list[str]] = {key: [""] for key in weights}
    for key in files.facts:
        for depth in (1, 2):
            owner = key.rsplit(".", depth)[0]
            if owner in weights and owner != key:
                parts[owner].append(key.removeprefix(f"{owner}."))
    for key in weights:
        if key not in files.facts:
            raise StateDictError(f"{key} has a quant_state in {files.folder} and no bytes")
    return parts


def _sixteen(config: dict[str, Any]) -> torch.dtype:
    """The 16-bit dtype a model with 4-bit weights becomes."""
    quantization = config.get("quantization_config")
    word = quantization.get("bnb_4bit_compute_dtype") if isinstance(quantization, dict) else None
    return torch.float16 if str(word).removeprefix("torch.") == "float16" else torch.bfloat16


def _dense(rows: Tensor) -> LoraLinear:
    layer = LoraLinear.__new__(LoraLinear)
    AdaptedLinear.__init__(layer, rows.shape[1], rows.shape[0])
    layer.weight, layer.bias = torch.nn.Parameter(rows, requires_grad=False), None
    return layer


def _four_bit(packed: PackedWeight) -> QLoraLinear:
    layer = QLoraLinear.__new__(QLoraLinear)
    AdaptedLinear.__init__(layer, packed.shape[1], packed.shape[0])
    layer.weight, layer.bias = QuantizedWeight(packed), None
    return layer


def _rows_of(weight: PackedWeight, first: int, end: int) -> PackedWeight:
    """Some rows, beginning and ending on the border of a block (of 256 scales, if those are quantized)."""
    n, k = weight.shape
    if (first, end) == (0, n):
        return weight
    blocks = slice(first * k // weight.blocksize, -(-end * k // weight.blocksize))
    nested = weight.nested_absmax
    if nested is not None:
        nested = nested[blocks.start // NESTED_BLOCKSIZE : -(-blocks.stop // NESTED_BLOCKSIZE)]
    packed = weight.packed[first * k // 2 : -(-end * k // 2)]
    return weight._replace(packed=packed, absmax=weight.absmax[blocks], nested_absmax=nested, shape=(end - first, k))
