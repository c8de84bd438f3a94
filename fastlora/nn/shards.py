"""Writes safetensors files piece by piece: the header first, then any rows of any tensor in any order.

Layout (https://huggingface.co/docs/safetensors): the header's length as u64, little-endian; the header, JSON of name ->
{dtype, shape, data_offsets}, padded with spaces to a multiple of 8; the tensors, row-major, without gaps.
"""

from __future__ import annotations

import ctypes
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any, NamedTuple

import torch
from torch import Tensor

from fastlora.errors import ShapeError, StateDictError
from fastlora.nn.streaming import INDEX

# What safetensors calls the dtypes that fill whole bytes.
_NAMES = {
    "F64": "float64",
    "I64": "int64",
    "U64": "uint64",
    "C64": "complex64",
    "F32": "float32",
    "I32": "int32",
    "U32": "uint32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I16": "int16",
    "U16": "uint16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0fnu",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}
DTYPES: dict[str, torch.dtype] = {short: getattr(torch, long) for short, long in _NAMES.items() if hasattr(torch, long)}
_SHORT = {dtype: short for short, dtype in DTYPES.items()}


class Entry(NamedTuple):
    """A tensor that will be written."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of its data."""
        return math.prod(self.shape) * self.dtype.itemsize


def dtype_of(short: str, key: str) -> torch.dtype:
    """The dtype a safetensors header names.

    Raises:
        StateDictError: one that torch does not have, or whose elements are not whole bytes.
    """
    if short not in DTYPES:
        raise StateDictError(f"{key} has dtype {short}, which cannot be copied")
    return DTYPES[short]


class Shard:
    """One file being written.

    Args:
        path: of the file.
        entries: name -> dtype and shape of all its tensors.
    """

    def __init__(self, path: Path, entries: Mapping[str, Entry]) -> None:
        self.entries = dict(entries)
        self.path = path
        # Wide elements first, as safetensors itself orders them: every tensor is then aligned to its elements.
        order = sorted(self.entries, key=lambda name: (-self.entries[name].dtype.itemsize, name))
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        self._offsets: dict[str, int] = {}
        at = 0
        for name in order:
            entry = self.entries[name]
            self._offsets[name], end = at, at + entry.nbytes
            header[name] = {"dtype": _SHORT[entry.dtype], "shape": list(entry.shape), "data_offsets": [at, end]}
            at = end
        text = json.dumps(header, separators=(",", ":")).encode("utf-8")
        text += b" " * (-len(text) % 8)
        self._start = 8 + len(text)
        self._missing = {name: entry.nbytes for name, entry in self.entries.items()}
        self._file: IO[bytes] = path.open("wb")
        self._file.write(len(text).to_bytes(8, "little") + text)

    def write(self, name: str, rows: Tensor, first: int = 0) -> None:
        """Write a tensor, or consecutive rows of it beginning with row `first`.

        Raises:
            ShapeError: not what was announced.
        """
        entry = self.entries[name]
        whole = tuple(rows.shape) == entry.shape and first == 0
        part = rows.dim() > 0 and rows.shape[1:] == entry.shape[1:] and first + rows.shape[0] <= entry.shape[0]
        if rows.dtype != entry.dtype or not (whole or part):
            raise ShapeError(
                f"{name}: expected {entry.dtype} {entry.shape}, got {rows.dtype} {tuple(rows.shape)} from row {first}"
            )
        rows = rows.detach().cpu().contiguous()
        row = 0 if whole else math.prod(entry.shape[1:]) * entry.dtype.itemsize
        self._file.seek(self._start + self._offsets[name] + first * row)
        if rows.nbytes:
            self._file.write((ctypes.c_char * rows.nbytes).from_address(rows.data_ptr()))
        self._missing[name] -= rows.nbytes

    def close(self) -> None:
        """Bring the data to the disk.

        Raises:
            ShapeError: some tensor was not written in full.
        """
        if left := [name for name, missing in self._missing.items() if missing]:
            self.abandon()
            raise ShapeError(f"{self.path.name}: {left[0]} was not written in full")
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()

    def abandon(self) -> None:
        """Close the file as it is."""
        self._file.close()


class Shards:
    """The safetensors files of a model folder being written; as a context manager it closes them.

    Args:
        folder: their folder, which exists.
        files: file name -> the tensors of that file. More than one file get an index.
    """

    def __init__(self, folder: Path, files: Mapping[str, Mapping[str, Entry]]) -> None:
        self._homes = {name: file for file, entries in files.items() for name in entries}
        self.nbytes = sum(entry.nbytes for entries in files.values() for entry in entries.values())
        self._open: dict[str, Shard] = {}
        self._folder, self._files = folder, {file: dict(entries) for file, entries in files.items()}

    def __enter__(self) -> Shards:
        for file, entries in self._files.items():
            self._open[file] = Shard(self._folder / file, entries)
        return self

    def write(self, name: str, rows: Tensor, first: int = 0) -> None:
        """As `Shard.write`, into the file that holds the tensor."""
        self._open[self._homes[name]].write(name, rows, first)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for shard in self._open.values():
            if kind is None:
                shard.close()
            else:
                shard.abandon()
        if kind is None and len(self._files) > 1:
            index = {"metadata": {"total_size": self.nbytes}, "weight_map": dict(sorted(self._homes.items()))}
            (self._folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
