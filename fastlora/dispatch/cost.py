"""Predicted time: one formula for work, one table of devices, one roofline."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch

from fastlora.problem import DORA, DROPOUT, NEED_DA, NEED_DB, NEED_DX, SHARED, TRAIN, Format, Problem, Work


@dataclasses.dataclass(frozen=True)
class Device:
    """Sustained rates of one device.

    Attributes:
        name: as `explain` prints it.
        flops_16: bf16/fp16 matrix rate with fp32 sums, flop/s.
        flops_32: fp32 matrix rate, every bit kept, flop/s.
        bandwidth: bytes read plus written per second.
        launch: seconds one kernel launch costs.
        flops_tf32: rate of fp32 operands rounded to 10 bits, flop/s; 0 where there is no such thing.
        host: a CPU, whose 16-bit products are decoded to fp32 ones.
    """

    name: str
    flops_16: float
    flops_32: float
    bandwidth: float
    launch: float
    flops_tf32: float = 0.0
    host: bool = False


# Per core, an AVX-512 server core of 2023-2026: reference points, only their ratios matter for choosing.
_CPU_CORE = Device("cpu core", flops_16=30e9, flops_32=110e9, bandwidth=13e9, launch=2e-6)
# Sustained figures, about three quarters of the datasheet's dense peak (RTX 4090, MI300X: what their libraries reach);
# H200's 16-bit rate and bandwidth were measured through PyTorch 2.11, 2026-10. A longer name stands before a shorter.
_GPUS = {
    "A100": Device("A100", 260e12, 17e12, 1.7e12, 4e-6, 125e12),
    "H100 PCIe": Device("H100 PCIe", 500e12, 40e12, 1.75e12, 4e-6, 250e12),
    "H100": Device("H100", 700e12, 50e12, 3.0e12, 4e-6, 380e12),
    "H200": Device("H200", 790e12, 50e12, 4.3e12, 4e-6, 410e12),
    "RTX 4090": Device("RTX 4090", 150e12, 65e12, 0.9e12, 4e-6, 75e12),
    "B200": Device("B200", 1500e12, 60e12, 7.0e12, 4e-6, 750e12),
    "MI300X": Device("MI300X", 600e12, 100e12, 4.0e12, 6e-6),
}
# Any other GPU, by compute capability: dense flop a clock and multiprocessor, 16-bit and fp32 (vendors' white papers;
# GeForce parts halve the 16-bit rate of their server twins, which is taken for both).
_PER_CLOCK = {70: (1024, 128), 75: (512, 128), 80: (2048, 128), 86: (512, 256), 89: (512, 256), 90: (4096, 256)}
_PER_CLOCK |= {100: (8192, 256), 103: (8192, 256), 120: (512, 256)}
_PER_CLOCK_AMD = {"gfx908": (1024, 256), "gfx90a": (1024, 256), "gfx942": (2048, 256), "gfx950": (4096, 256)}
_SUSTAINED = 0.75  # of the datasheet's peak


def weight_bytes(fmt: Format, n: int, k: int, itemsize: int) -> float:
    """Bytes one read of the frozen weight moves."""
    if fmt.kind == "dense":
        return n * k * itemsize
    scale_bytes = (1 + 4 / 256) if fmt.nested else 4
    return n * k * (0.5 + scale_bytes / fmt.blocksize)


def base_gemms(problem: Problem) -> int:
    """How many products with the frozen weight the problem needs (DoRA's "peft" dropout doubles them)."""
    twice = problem.flags & DORA and problem.flags & DROPOUT and not problem.flags & SHARED
    if problem.op == "lora_bwd" and not problem.flags & NEED_DX:
        return 0
    return 2 if twice else 1


def work(problem: Problem) -> Work:
    """Fewest flops and bytes of a problem: every input read once, every output written once."""
    _, m, n, k, r, dtype, adapter_dtype, fmt, flags, _, groups = problem
    size, asize = dtype.itemsize, adapter_dtype.itemsize
    w = weight_bytes(fmt, n, k, size)
    adapters = r * (n + k) * asize
    mask = m * k / 8 if flags & DROPOUT else 0
    if problem.op == "lora_fwd":
        saved = (m * n * size if flags & DORA else 0) + 4 * m * r if flags & TRAIN else 0
        flops = 2 * m * n * k * base_gemms(problem) + 2 * m * r * (n + k)
        return Work(flops, w + adapters + m * (k + n) * size + mask + saved)
    if problem.op == "lora_bwd":
        products = bool(flags & NEED_DX) * k + bool(flags & NEED_DA) * k + bool(flags & NEED_DB) * n + n
        flops = 2 * m * n * k * base_gemms(problem) + 2 * m * r * products
        return Work(flops, (w if flags & NEED_DX else 0) + 2 * adapters + m * (2 * k + n) * size + mask)
    if problem.op in ("grouped_fwd", "grouped_bwd"):  # the deltas alone: every adapter moves once, rows once
        passes = 1 if problem.op == "grouped_fwd" else 2
        return Work(2 * m * r * (n + k) * passes, (groups * adapters + m * (k + 2 * n) * size + mask) * passes)
    if problem.op in ("glu_fwd", "glu_bwd"):
        return Work(20 * m * n, (3 if problem.op == "glu_fwd" else 6) * m * n * size)
    if problem.op in ("routed_fwd", "routed_bwd"):
        linears = 1 if problem.op == "routed_fwd" else 2
        return Work(2 * m * r * linears * (n + k), linears * (groups * adapters + m * (k + n) * size))
    if problem.op in ("mixture_fwd", "mixture_bwd"):  # W2's output is taken to be as wide as x; no [m, n] moves
        linears, again = (3, 0) if problem.op == "mixture_fwd" else (6, 2 * n)
        flops = 2 * m * r * (linears * (n + k) + again)
        return Work(flops, linears * groups * adapters + linears * m * (k + n) * size)
    if problem.op == "dora_norm":
        return Work(2 * n * k * r + 3 * n * k, w + adapters + 4 * n)
    if problem.op == "quantize":
        return Work(20 * n * k, n * k * size + weight_bytes(fmt, n, k, size))
    if problem.op == "dequantize":
        return Work(2 * n * k, n * k * size + w)
    return Work(10 * m * k, m * k / 8 + n * k)


def device(name: str) -> Device:
    """The rates of a device: "cpu", "cuda" (the current one), "cuda:1" ...; a GPU not in the table is asked."""
    kind, _, index = name.partition(":")
    if kind != "cuda" or not torch.cuda.is_available():
        return _host(kind, max(1, torch.get_num_threads()))
    return _gpu(int(index) if index else torch.cuda.current_device())


@functools.cache
def _host(kind: str, cores: int) -> Device:
    core = _CPU_CORE
    rates = core.flops_16 * cores, core.flops_32 * cores, core.bandwidth * cores
    return Device(f"{kind} x{cores}", *rates, core.launch, host=True)


@functools.cache
def _gpu(index: int) -> Device:
    properties = torch.cuda.get_device_properties(index)
    for name, entry in _GPUS.items():
        if name in properties.name:
            return entry
    return _unknown(properties)


def _unknown(properties: Any) -> Device:
    """Rates from what the driver says: units x clock x flop a clock; twice the memory clock x bus width.

    Older PyTorch does not tell the clocks (kHz) or the bus (bits): a present mid-range card's stand for them.
    """
    gcn = getattr(properties, "gcnArchName", "").split(":")[0]
    amd = gcn.startswith("gfx")
    capability = properties.major * 10 + properties.minor
    known = max((each for each in _PER_CLOCK if each <= capability), default=70)
    half, full = _PER_CLOCK_AMD.get(gcn, (512, 256)) if amd else _PER_CLOCK[known]
    clock = (getattr(properties, "clock_rate", 0) or 1.7e6) * 1e3
    memory = (getattr(properties, "memory_clock_rate", 0) or 8e6) * 1e3
    width = (getattr(properties, "memory_bus_width", 0) or 384) / 8
    units = properties.multi_processor_count * clock * _SUSTAINED
    tf32 = 0.0 if amd or capability < 80 else half / 2 * units
    bandwidth = 2 * memory * width * 0.85
    return Device(properties.name, half * units, full * units, bandwidth, 6e-6 if amd else 4e-6, tf32)


# --- building blocks of a plan's prediction ---------------------------------------------------------------------------


def matrix_rate(dtype: torch.dtype, device_name: str, *, own: bool = False) -> float:
    """flop/s of products of `dtype` with fp32 accuracy.

    Args:
        own: by our kernels, which make an fp32 product of three tf32 ones where that is faster; the library, at
            PyTorch's default precision, does not.
    """
    on = device(device_name)
    if dtype.itemsize <= 2 and not on.host:
        return on.flops_16
    rate = max(on.flops_32, on.flops_tf32 / 3) if own else on.flops_32
    return rate if dtype.itemsize <= 4 else on.flops_32 / 2


def gemm_seconds(m: int, n: int, k: int, dtype: torch.dtype, device_name: str, *, own: bool = False) -> float:
    """One [m,k] x [k,n] product: bound by arithmetic or by reading both operands and writing the result once."""
    moved = (m * k + k * n + m * n) * dtype.itemsize
    return max(2 * m * n * k / matrix_rate(dtype, device_name, own=own), moved / device(device_name).bandwidth)


def pass_seconds(moved: float, device_name: str) -> float:
    """Moving so many bytes, read plus written."""
    return moved / device(device_name).bandwidth


def launches_seconds(count: float, device_name: str) -> float:
    """What starting so many kernels costs."""
    return count * device(device_name).launch


def roofline_seconds(problem: Problem) -> float:
    """max(flops / rate, bytes / bandwidth) + one launch."""
    todo, on = work(problem), problem.device
    return max(todo.flops / matrix_rate(problem.dtype, on), pass_seconds(todo.bytes, on)) + launches_seconds(1, on)
