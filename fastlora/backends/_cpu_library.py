"""Loading the compiled CPU library and calling it: plain C through ctypes, no torch headers, nothing at import.

The library is opened at its first use, after torch, so that its OpenMP runtime is the one torch brought along and both
share one pool of threads. Every call passes one record of 8-byte fields, `struct Args` of csrc/cpu/args.h: numbers, and
the addresses of tensors, of copies where they do not lie as the library reads.
"""

from __future__ import annotations

import ctypes
import functools
import pathlib
import struct
from collections.abc import Callable
from typing import TypeVar, overload

import torch
from torch import Tensor

from fastlora import settings
from fastlora.dispatch.registry import Limits
from fastlora.errors import UnsupportedError

T = TypeVar("T")
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # the numbers the library knows them by
ABI_VERSION = 4
INSTALLED = pathlib.Path(__file__).resolve().parent.parent / "_lib" / "libfastlora_cpu.so"
# Written beside the library by a build that could not make it; its text says why.
REASON_NAME = "cpu_build_failed.txt"
# Position = the number the library knows a tier by; the last one this CPU has is used unless a setting forces another.
TIERS = ("scalar", "avx2", "avx512", "avx512_bf16", "neon")
STATUS_NO_MEMORY = 1
_SINGLE = ("quantize", "quantize_absmax", "dequantize", "dropout_mask", "dora_norm", "lora_fwd", "lora_bwd")
_MIXTURES = ("mixture_fwd", "mixture_bwd", "routed_fwd", "routed_bwd")
OPS = (*_SINGLE, "grouped_mask", "grouped_fwd", "grouped_bwd", *_MIXTURES)

_RECORD = struct.Struct("=10q2d28q")
# What a mixed batch adds to the record: `struct Grouped`'s own fields, then a `struct Member` an adapter.
pack_grouped = struct.Struct("=6q").pack
pack_member = struct.Struct("=4q2d8q").pack
# `struct Args` in order, every field given: what the layers' ops call, for which `pack`'s names cost too much.
pack_fields = _RECORD.pack


class Library:
    """The opened library.

    Args:
        handle: what ctypes opened.

    Attributes:
        tiers: names of the instruction tiers this CPU can run, slowest first.
        few_tokens: tier number -> up to how many tokens it has kernels of their own for.
    """

    def __init__(self, handle: ctypes.CDLL) -> None:
        self.functions = {}
        for op in OPS:
            function = getattr(handle, f"fl_{op}")
            function.argtypes, function.restype = [ctypes.c_char_p], ctypes.c_int64
            self.functions[op] = function
        self.advise_huge = handle.fl_advise_huge
        self.advise_huge.argtypes, self.advise_huge.restype = [ctypes.c_void_p, ctypes.c_int64], None
        handle.fl_has_tier.argtypes, handle.fl_has_tier.restype = [ctypes.c_int64], ctypes.c_int64
        handle.fl_few_tokens.argtypes, handle.fl_few_tokens.restype = [ctypes.c_int64], ctypes.c_int64
        self.few_tokens = handle.fl_few_tokens
        self.tiers = tuple(name for number, name in enumerate(TIERS) if handle.fl_has_tier(number))
        self._best = TIERS.index(self.tiers[-1])

    def tier(self) -> int:
        """Number of the tier in force: the forced one, else the best.

        Raises:
            UnsupportedError: the forced tier is unknown or this CPU lacks it.
        """
        forced = settings.current.cpu_tier
        if not forced:
            return self._best
        if why := self.why_not_tier(forced):
            raise UnsupportedError(why)
        return TIERS.index(forced)

    def why_not_tier(self, name: str) -> str:
        """Why a tier cannot be forced here; "" when it can."""
        if name in self.tiers:
            return ""
        if name not in TIERS:
            return f"unknown CPU tier {name!r}; known: {', '.join(TIERS)}"
        return f"this CPU or this build lacks the forced tier {name!r}; it has: {', '.join(self.tiers)}"

    def call(self, op: str, record: bytes) -> None:
        """Run an op on a `pack`ed record.

        Raises:
            MemoryError: no scratch memory.
            UnsupportedError: the record names a tier this CPU lacks.
        """
        status = self.functions[op](record)
        if not status:
            return
        if status == STATUS_NO_MEMORY:
            raise MemoryError(f"fastlora's CPU library could not get scratch memory for {op}")
        raise UnsupportedError(f"the CPU library refused {op} (status {status})")


def _cut_short(path: pathlib.Path) -> str:
    """Why an ELF file must not be opened: part of it lies beyond its end, where the loader would be killed; or "".

    Source: System V ABI, "ELF Header" and "Program Header"; 64-bit, little-endian. Other files are left to the loader.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        header = file.read(64)
        if len(header) < 64 or header[:6] != b"\x7fELF\x02\x01":
            return ""
        (table,), (entry, count) = struct.unpack_from("<Q", header, 32), struct.unpack_from("<HH", header, 54)
        file.seek(table)
        segments = file.read(entry * count)
    ends = [table + entry * count]
    for at in range(0, len(segments) - 55, max(entry, 56)):
        offset, length = struct.unpack_from("<Q", segments, at + 8)[0], struct.unpack_from("<Q", segments, at + 32)[0]
        ends.append(offset + length)
    return f"the file is cut short: {size} of {max(ends)} bytes" if max(ends) > size else ""


def open_shared(
    path: pathlib.Path,
    name: str,
    reason: str,
    missing: str,
    prefix: str,
    interface: tuple[int, int],
    make: Callable[[ctypes.CDLL], T],
) -> tuple[T | None, str]:
    """What `make` makes of the shared library in a file, or None and the reason why it cannot be used. Never raises.

    Args:
        name: "CPU" or "CUDA", for messages.
        reason: the file beside it in which a failed build said why. missing: why, where there is none.
        prefix: of its C functions. interface: the ABI version and the bytes of its record that this package has.
    """
    if not path.is_file():
        failed = path.parent / reason
        why = failed.read_text(encoding="utf-8").strip() if failed.is_file() else ""
        return None, f"{name} library not built ({why or missing})"
    try:
        if why := _cut_short(path):
            return None, f"{name} library cannot be loaded ({why})"
        handle = ctypes.CDLL(str(path))
        questions = [getattr(handle, f"{prefix}_{what}") for what in ("abi_version", "args_bytes")]
        for question in questions:
            question.restype = ctypes.c_int64
        found = tuple(question() for question in questions)
        if found != interface:
            have, want = (".".join(map(str, each)) for each in (found, interface))
            return None, f"{name} library has interface {have}, this package needs {want}: rebuild"
        return make(handle), ""
    except (OSError, AttributeError) as error:
        return None, f"{name} library cannot be loaded ({error})"


def open_library(path: pathlib.Path = INSTALLED) -> tuple[Library | None, str]:
    """The library in a file, or None and the reason why it cannot be used. Never raises."""
    missing = "install from source with a C++ compiler present" if path == INSTALLED else f"no file {path}"
    return open_shared(path, "CPU", REASON_NAME, missing, "fl", (ABI_VERSION, _RECORD.size), Library)


@functools.cache
def _opened(path: str) -> tuple[Library | None, str]:
    return open_library(pathlib.Path(path) if path else INSTALLED)


def loaded() -> tuple[Library | None, str]:
    """`open_library` of this installation, or of the file the settings name; each once a process."""
    return _opened(settings.current.cpu_library)


def missing() -> str:
    """Why the CPU library cannot run here under the settings in force; "" when it can."""
    found, why = loaded()
    if found is None:
        return why
    forced = settings.current.cpu_tier
    return found.why_not_tier(forced) if forced else ""


# What every op on a layer's tensors asks for.
ADAPTED = Limits(
    devices=frozenset({"cpu"}), dtypes=frozenset(DTYPES), adapter_dtypes=frozenset(DTYPES), missing=missing
)


def library() -> Library:
    """The loaded library.

    Raises:
        UnsupportedError: there is none; the message says why.
    """
    found, why = loaded()
    if found is None:
        raise UnsupportedError(why)
    return found


def pack(
    *,
    m: int = 0,
    n: int = 0,
    k: int = 0,
    r: int = 0,
    dtype: int = 0,
    flags: int = 0,
    tier: int = 0,
    threshold: int = 0,
    stream: int = 0,
    scale: float = 0.0,
    keep_scale: float = 1.0,
    seed: int = 0,
    weight: tuple[int, int, int, int, int, int, int, int, int] = (0,) * 9,
    x: int = 0,
    a: int = 0,
    b: int = 0,
    bias: int = 0,
    mag: int = 0,
    norm: int = 0,
    y: int = 0,
    h: int = 0,
    mask: int = 0,
    z: int = 0,
    dy: int = 0,
    dx: int = 0,
    da: int = 0,
    db: int = 0,
    dmag: int = 0,
    dbias: int = 0,
    out_bytes: int = 0,
    out_scales: int = 0,
) -> bytes:
    """`struct Args`: integers, two floats, addresses (0 for an absent tensor).

    Args:
        weight: kind, blocksize; addresses: dense, packed, absmax, absmax_codes, nested_absmax, nested_offset, code.
    """
    threads = torch.get_num_threads()
    return _RECORD.pack(
        *(m, n, k, r, dtype, flags, threads, tier, threshold, stream, scale, keep_scale, seed),
        *weight,
        *(x, a, b, bias, mag, norm, y, h, mask, z, dy, dx, da, db, dmag, dbias, out_bytes, out_scales),
    )


# --- what a record holds of a tensor ----------------------------------------------------------------------------------


@overload
def f32(t: Tensor) -> Tensor: ...
@overload
def f32(t: None) -> None: ...
def f32(t: Tensor | None) -> Tensor | None:
    """A small operand as contiguous fp32: itself where it is that already."""
    if t is None or (t.dtype == torch.float32 and t.is_contiguous()):
        return t
    return t.float().contiguous()


def address(t: Tensor | None) -> int:
    """Where it lies, 0 for an absent one."""
    return 0 if t is None else t.data_ptr()


def aligned(t: Tensor | None, keep: list[Tensor]) -> int:
    """Address of what is read in units of 4 bytes; a misaligned or strided part is copied into `keep` first."""
    if t is None:
        return 0
    place = t.data_ptr()
    if place % 4 or not t.is_contiguous():
        t = moved(t)
        keep.append(t)
        place = t.data_ptr()
    return place


def moved(t: Tensor) -> Tensor:
    """A contiguous copy, which begins where the library can read."""
    return t.clone(memory_format=torch.contiguous_format)
