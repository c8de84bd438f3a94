"""Loading the compiled CUDA library and calling it: plain C through ctypes, no torch headers, nothing at import.

The library links CUDA's runtime statically and is handed the device and the stream, so that one file serves every
version of PyTorch. Every call passes one record of 8-byte fields, `struct Args` of csrc/cuda/args.h.
"""

from __future__ import annotations

import ctypes
import functools
import pathlib
import struct

import torch

from fastlora.backends._cpu_library import open_shared
from fastlora.errors import UnsupportedError

ABI_VERSION = 1
INSTALLED = pathlib.Path(__file__).resolve().parent.parent / "_lib" / "libfastlora_cuda.so"
# Written beside the library by a build that could not make it; its text says why.
REASON_NAME = "cuda_build_failed.txt"
OPS = ("quantize", "quantize_absmax", "dequantize", "dropout_mask", "norm", "merge", "forward", "dx")

_INVALID_DEVICE = 101  # cudaErrorInvalidDevice
_RECORD = struct.Struct("=11qd24q")


class Library:
    """The opened library.

    Args:
        handle: what ctypes opened.

    Attributes:
        arches: what it was compiled for, such as ("80", "90a", "100", "100ptx"); empty in the tests' emulator.
    """

    def __init__(self, handle: ctypes.CDLL) -> None:
        self.handle = handle
        self.functions = {}
        for op in OPS:
            function = getattr(handle, f"fl_cuda_{op}")
            function.argtypes, function.restype = [ctypes.c_char_p], ctypes.c_int64
            self.functions[op] = function
        self._error = handle.fl_cuda_error
        self._error.argtypes, self._error.restype = [ctypes.c_int64], ctypes.c_char_p
        handle.fl_cuda_arches.restype = ctypes.c_char_p
        self.arches = tuple(name for name in handle.fl_cuda_arches().decode().split(",") if name)

    def why_not_device(self, major: int, minor: int) -> str:
        """Why the library cannot run on a GPU of this compute capability; "" when it can.

        Machine code runs on its own generation, from its minor number on ("90a": on 9.0 alone); PTX on any later one.
        """
        capability = 10 * major + minor
        for name in self.arches:
            number = int(name.rstrip("aptx"))
            if name.endswith("ptx"):
                runs = capability >= number
            else:
                runs = capability == number if name.endswith("a") else number <= capability < (number // 10 + 1) * 10
            if runs:
                return ""
        built = ", ".join(self.arches)
        return f"CUDA library was built for sm_{built}, this GPU is sm_{capability}: rebuild with FASTLORA_BUILD=cuda"

    def why_not_driver(self) -> str:
        """Why the runtime linked into the library cannot work with this driver, as where it is older; "" when it can.

        A device that cannot exist is asked for: a runtime that works says just that.
        """
        status = self.functions["quantize"](pack(device=-1))
        return "" if status in (0, _INVALID_DEVICE) else f"CUDA library: {self._error(status).decode()} ({status})"

    def call(self, op: str, record: bytes) -> None:
        """Start an op's kernels on a `pack`ed record.

        Raises:
            UnsupportedError: CUDA refused; the message is its own.
        """
        if status := self.functions[op](record):
            raise UnsupportedError(f"the CUDA library could not run {op}: {self._error(status).decode()} ({status})")


def open_library(path: pathlib.Path = INSTALLED) -> tuple[Library | None, str]:
    """The library in a file, or None and the reason why it cannot be used. Never raises."""
    missing = "install from source with nvcc present" if path == INSTALLED else f"no file {path}"
    return open_shared(path, "CUDA", REASON_NAME, missing, "fl_cuda", (ABI_VERSION, _RECORD.size), Library)


@functools.cache
def loaded() -> tuple[Library | None, str]:
    """`open_library` of this installation, once a process."""
    return open_library()


@functools.cache
def missing() -> str:
    """Why the CUDA library cannot run here, "" when it can: it is asked of every GPU that torch sees."""
    found, why = loaded()
    if found is None:
        return why
    if not torch.cuda.is_available():
        return "no GPU that torch can use"
    if torch.version.cuda is None:
        return "torch's GPU is not NVIDIA's"
    if why := found.why_not_driver():
        return why
    reasons = [
        found.why_not_device(*torch.cuda.get_device_capability(index)) for index in range(torch.cuda.device_count())
    ]
    return next((reason for reason in reasons if reason), "")


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
    device: int = 0,
    stream: int = 0,
    m: int = 0,
    n: int = 0,
    k: int = 0,
    r: int = 0,
    dtype: int = 0,
    adapter_dtype: int = 0,
    bias_dtype: int = 0,
    mag_dtype: int = 0,
    splits: int = 1,
    scale: float = 0.0,
    threshold: int = 0,
    stream_number: int = 0,
    seed: int = 0,
    weight: tuple[int, int, int, int, int, int, int, int] = (0,) * 8,
    x: int = 0,
    a: int = 0,
    b: int = 0,
    bias: int = 0,
    mag: int = 0,
    norm: int = 0,
    y: int = 0,
    z: int = 0,
    h: int = 0,
    planes: int = 0,
    adapter_planes: int = 0,
    out_bytes: int = 0,
    out_scales: int = 0,
) -> bytes:
    """`struct Args`: integers, one float, addresses (0 for an absent tensor).

    Args:
        weight: kind, blocksize; addresses: packed, absmax, absmax_codes, nested_absmax, nested_offset, code.
    """
    return _RECORD.pack(
        *(device, stream, m, n, k, r, dtype, adapter_dtype, bias_dtype, mag_dtype, splits, scale),
        *(threshold, stream_number, seed),
        *weight,
        *(x, a, b, bias, mag, norm, y, z, h, planes, adapter_planes, out_bytes, out_scales),
    )
