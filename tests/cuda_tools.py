"""The CUDA backend without a GPU: its kernels' source compiled for this machine with an emulated grid (emulate.h)."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import math
import mmap
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastlora.backends import _cuda_library, cuda
from fastlora.math.nf4 import PackedWeight

ROOT = Path(__file__).resolve().parent.parent
SOURCES = [*sorted((ROOT / "csrc" / "cuda").glob("*")), *sorted((ROOT / "csrc" / "include").glob("*"))]
FLAGS = ("-x", "c++", "-std=c++17", "-O1", "-ffp-contract=off", "-fno-math-errno", "-fPIC", "-fvisibility=hidden", "-w")
PAGE = mmap.PAGESIZE


def digest() -> str:
    """Names the state of the sources."""
    return hashlib.sha256(b"".join(path.read_bytes() for path in SOURCES)).hexdigest()[:16]


def compile_emulator(csrc: Path, path: Path) -> None:
    """csrc/cuda by g++, with the grid emulated."""
    compiler = shutil.which("g++") or pytest.skip("no g++: the CUDA kernels cannot be emulated")
    made = path.with_suffix(f".{os.getpid()}")
    command = [compiler, *FLAGS, "-shared", str(csrc / "cuda" / "api.cu"), "-o", str(made)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    made.replace(path)


@functools.cache
def opened(path: Path) -> _cuda_library.Library:
    """The emulated library in a file."""
    found, why = _cuda_library.open_library(path)
    assert found is not None, why
    return found


def emulator() -> _cuda_library.Library:
    """The emulated library, compiled once for each state of its sources."""
    folder = Path(tempfile.gettempdir()) / f"fastlora-emulated-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    path = folder / f"{digest()}.so"
    if not path.is_file():
        compile_emulator(ROOT / "csrc", path)
    return opened(path)


@contextmanager
def emulated(
    *, splits: int | None = None, descending: bool = False, library: _cuda_library.Library | None = None
) -> Iterator[_cuda_library.Library]:
    """The backend's launchers on CPU tensors.

    Args:
        splits: slices of every reduction, whatever the launcher would choose.
        descending: threads of a block run in descending order.
        library: another build of the emulator.
    """
    library = library or emulator()
    library.handle.fl_emulator_descending(ctypes.c_int64(descending))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_cuda_library, "library", lambda: library)
        if splits is not None:
            patch.setattr(cuda, "_splits", lambda like, blocks, units: splits)
        yield library


# --- memory that faults ----------------------------------------------------------------------------------------------

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


def fenced(t: Tensor, at_end: bool) -> Tensor:
    """A contiguous copy whose last (or first) byte lies at a page that must not be touched. Never freed."""
    size = t.numel() * t.element_size()
    if not size:
        return t
    inside = math.ceil(size / PAGE) * PAGE
    base = _libc.mmap(
        None, inside + 2 * PAGE, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0
    )
    for page in (base, base + PAGE + inside):
        assert _libc.mprotect(page, PAGE, 0) == 0
    start = base + PAGE + (inside - size if at_end else 0)
    memory = (ctypes.c_uint8 * size).from_address(start)
    copy = torch.frombuffer(memory, dtype=t.dtype).view(t.shape)
    copy.copy_(t)
    return copy


def fenced_weight(weight: PackedWeight, at_end: bool) -> PackedWeight:
    """`fenced`, of every part."""
    return PackedWeight._make(fenced(part, at_end) if isinstance(part, Tensor) else part for part in weight)


class Watch:
    """How often each byte of what `torch.empty` and `new_empty` hand out is written."""

    def __init__(self, library: _cuda_library.Library) -> None:
        self.handle = library.handle
        self.seen: list[tuple[Tensor, Tensor]] = []
        self.handle.fl_emulator_watch.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p]

    def add(self, t: Tensor, at_end: bool) -> Tensor:
        """A poisoned, fenced and watched tensor of the shape of t."""
        size = t.numel() * t.element_size()
        t = fenced(t.fill_(255 if t.dtype == torch.uint8 else float("nan")), at_end)
        counts = torch.zeros(size, dtype=torch.uint8)
        self.handle.fl_emulator_watch(t.data_ptr(), size, counts.data_ptr())
        self.seen.append((t, counts))
        return t

    def check(self) -> None:
        """Every byte of every output, and of every scratch plane, was written exactly once."""
        assert self.seen
        for t, counts in self.seen:
            assert bool((counts == 1).all()), (tuple(t.shape), t.dtype, counts.unique().tolist())


@contextmanager
def watched(at_end: bool = True, **options: object) -> Iterator[Watch]:
    """`emulated`, with every tensor the launchers make fenced and watched."""
    with emulated(**options) as library, pytest.MonkeyPatch.context() as patch:  # type: ignore[arg-type]
        watch, empty, new_empty = Watch(library), torch.empty, Tensor.new_empty
        patch.setattr(torch, "empty", lambda *args, **more: watch.add(empty(*args, **more), at_end))
        patch.setattr(Tensor, "new_empty", lambda t, *args, **more: watch.add(new_empty(t, *args, **more), at_end))
        try:
            yield watch
        finally:
            library.handle.fl_emulator_forget()
