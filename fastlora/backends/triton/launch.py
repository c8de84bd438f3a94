"""How a Triton kernel is launched, counted and recorded; what the launchers know of the device.

Every launch of this backend goes through `launch()`. Inside `record()` nothing runs: each launch is noted with its
real arguments (tensors may be on the meta device), so that tests count launches and the ahead-of-time compiler sees
exactly the specialisations that the launchers make, with the configurations they pin for a given device.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import triton
from triton.runtime.errors import OutOfResources

from fastlora.errors import UnsupportedError

# Up to this rank an fp32 adapter beside 16-bit data keeps fp32 accuracy: several 16-bit terms stand for each of its
# elements, which costs nothing beside the passes over x and dy. Above it, one rounding, as under autocast.
PRECISE_RANK = 32


# Arguments that change from batch to batch, from layer to layer or with the dropout rate: one binary serves all their
# values. Of the others Triton makes use when they are 1 or multiples of 16.
_PER_CALL = (
    *("m", "groups", "planes", "programs", "splits", "total", "norms", "stream", "threshold", "row_offset"),
    *(f"number{i}" for i in range(4)),
)


def entry(function: Callable[..., Any]) -> Any:
    """Decorate a kernel that is launched (`triton.jit` alone is for what kernels call)."""
    return triton.jit(function, do_not_specialize=_PER_CALL)


class Tile(NamedTuple):
    """A pinned configuration: block sizes, warps and software-pipelining depth. A block a kernel lacks is 0."""

    BLOCK_M: int = 0
    BLOCK_N: int = 0
    BLOCK_K: int = 0
    num_warps: int = 4
    num_stages: int = 2


class Target(NamedTuple):
    """The device a configuration is chosen for."""

    kind: str  # "cuda", "hip", or "interpreter"
    arch: int  # 80, 90, 100 (compute capability x 10); 942 for gfx942; 0 for the interpreter
    sms: int  # multiprocessors or compute units
    shared_memory: int  # bytes one program may use
    warp: int  # lanes of a warp


INTERPRETER = Target("interpreter", 0, 4, 1 << 20, 32)
TARGETS = {
    "sm_80": Target("cuda", 80, 108, 166912, 32),
    "sm_89": Target("cuda", 89, 128, 101376, 32),
    "sm_90": Target("cuda", 90, 132, 232448, 32),
    "sm_100": Target("cuda", 100, 148, 232448, 32),
    "gfx942": Target("hip", 942, 304, 65536, 64),
}


class Launch(NamedTuple):
    """One recorded launch: what `kernel[grid](*args, **constexprs)` would have been."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    constexprs: dict[str, Any]
    num_warps: int
    num_stages: int
    fp_fusion: bool

    @property
    def name(self) -> str:
        """The kernel's function name."""
        return self.kernel.__name__


class _Recorder(NamedTuple):
    target: Target | None
    launches: list[Launch]
    run: bool


_recorders: list[_Recorder] = []


@contextlib.contextmanager
def record(target: Target | None = None, *, run: bool = False) -> Iterator[list[Launch]]:
    """Collect the launches of a block.

    Args:
        target: pretend the device is this one (configurations are chosen for it).
        run: also run them; otherwise outputs stay unwritten and meta tensors may be used.
    """
    recorder = _Recorder(target, [], run)
    _recorders.append(recorder)
    try:
        yield recorder.launches
    finally:
        _recorders.remove(recorder)


def interpreting() -> bool:
    """Whether kernels were decorated for the interpreter (TRITON_INTERPRET=1 at start)."""
    return bool(triton.knobs.runtime.interpret)


@functools.cache
def _device_target(index: int) -> Target:
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip:
        arch = int("".join(c for c in properties.gcnArchName.split(":")[0] if c.isdigit()))
        return Target("hip", arch, properties.multi_processor_count, 65536, 64 if arch >= 900 and arch < 1000 else 32)
    arch = properties.major * 10 + properties.minor
    shared = getattr(properties, "shared_memory_per_block_optin", 101376)
    return Target("cuda", arch, properties.multi_processor_count, shared, 32)


def target(device: torch.device) -> Target:
    """What to choose configurations for: the recorder's target, the interpreter, or the tensor's device."""
    for recorder in reversed(_recorders):
        if recorder.target is not None:
            return recorder.target
    if device.type != "cuda":
        return INTERPRETER
    return _device_target(device.index if device.index is not None else torch.cuda.current_device())


def compiler_options(arch: int, num_warps: int, num_stages: int, fp_fusion: bool) -> dict[str, Any]:
    """What the compiler is told of a launch; arch: an NVIDIA GPU's compute capability x 10, else 0.

    The assembler, left to itself, moves a few values to memory where one more program then fits a multiprocessor; told
    that every register is free, it does not. Blackwell's, told so, moves more.
    """
    options = {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": fp_fusion}
    return options | ({"maxnreg": min(255, 65536 // (32 * num_warps))} if 0 < arch < 100 else {})


@functools.cache
def _arch(index: int) -> int:
    found = _device_target(index)
    return found.arch if found.kind == "cuda" else 0


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    *args: Any,
    num_warps: int = 4,
    num_stages: int = 2,
    fp_fusion: bool = True,
    **constexprs: Any,
) -> None:
    """Run `kernel` over `grid`; positional arguments first, compile-time constants by name. No program: no launch.

    `fp_fusion=False` keeps a product and a sum from being contracted, where bits are promised. The grid's first
    dimension may exceed 65535, the others may not.

    Raises:
        UnsupportedError: the kernel needs more shared memory or registers than the device has.
    """
    if 0 in grid:
        return
    if _recorders:
        note = Launch(kernel, grid, args, constexprs, num_warps, num_stages, fp_fusion)
        for recorder in _recorders:
            recorder.launches.append(note)
        if not all(recorder.run for recorder in _recorders):
            return
    run: Callable[..., Any] = kernel[grid]
    try:
        arch = 0 if interpreting() else _arch(torch.cuda.current_device())
        run(*args, **compiler_options(arch, num_warps, num_stages, fp_fusion), **constexprs)
    except OutOfResources as error:
        raise UnsupportedError(f"{kernel.__name__} does not fit this device: {error}") from error


def on_device(t: torch.Tensor) -> contextlib.AbstractContextManager[Any]:
    """Make t's device current for the launches of a block (Triton launches on the current one)."""
    if t.device.type == "cuda" and t.device.index not in (None, torch.cuda.current_device()):
        return torch.cuda.device(t.device)
    return contextlib.nullcontext()


def cdiv(a: int, b: int) -> int:
    """Ceiling of a / b."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The least power of two that is at least n (1 for n <= 1)."""
    return 1 << max(0, n - 1).bit_length()
