"""Predicted time: one formula for work, one table of devices, one roofline."""

from __future__ import annotations

import dataclasses
import functools

import torch

from fastlora.problem import DORA, DROPOUT, NEED_DA, NEED_DB, NEED_DX, SHARED, TRAIN, Format, Problem, Work


@dataclasses.dataclass(frozen=True)
class Device:
    """Sustained rates of one device.

    Attributes:
        name: as `explain` prints it.
        flops_16: bf16/fp16 matrix rate, flop/s.
        flops_32: fp32 matrix rate, flop/s.
        bandwidth: bytes read plus written per second.
        launch: seconds one kernel launch costs.
    """

    name: str
    flops_16: float
    flops_32: float
    bandwidth: float
    launch: float


# Per core, an AVX-512 server core of 2023-2026: reference points, only their ratios matter for choosing.
_CPU_CORE = Device("cpu core", flops_16=30e9, flops_32=110e9, bandwidth=13e9, launch=2e-6)
# Sustained figures (not datasheet peaks); H200 measured through PyTorch 2.11, 2026-10.
_GPUS = {
    "A100": Device("A100", 260e12, 19e12, 1.7e12, 4e-6),
    "H100": Device("H100", 700e12, 50e12, 3.0e12, 4e-6),
    "H200": Device("H200", 790e12, 50e12, 4.3e12, 4e-6),
    "RTX 4090": Device("RTX 4090", 150e12, 70e12, 0.9e12, 4e-6),
    "B200": Device("B200", 1500e12, 70e12, 7.0e12, 4e-6),
    "MI300X": Device("MI300X", 600e12, 80e12, 4.0e12, 6e-6),
}


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
    _, m, n, k, r, dtype, adapter_dtype, fmt, flags, _ = problem
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
    if problem.op == "dora_norm":
        return Work(2 * n * k * r + 3 * n * k, w + adapters + 4 * n)
    if problem.op == "quantize":
        return Work(20 * n * k, n * k * size + weight_bytes(fmt, n, k, size))
    if problem.op == "dequantize":
        return Work(2 * n * k, n * k * size + w)
    return Work(10 * m * k, m * k / 8 + n * k)


@functools.cache
def device(kind: str) -> Device:
    """The device table's entry for a device type; an unknown GPU is described by its own properties."""
    if kind != "cuda" or not torch.cuda.is_available():
        cores = max(1, torch.get_num_threads())
        core = _CPU_CORE
        return Device(f"{kind} x{cores}", core.flops_16 * cores, core.flops_32 * cores, core.bandwidth * cores, 2e-6)
    properties = torch.cuda.get_device_properties(0)
    for name, entry in _GPUS.items():
        if name in properties.name:
            return entry
    scale = properties.multi_processor_count / 132
    return Device(properties.name, 500e12 * scale, 40e12 * scale, 2e12 * scale, 5e-6)


def roofline_seconds(problem: Problem) -> float:
    """max(flops / rate, bytes / bandwidth) + one launch."""
    on = device(problem.device)
    todo = work(problem)
    rate = on.flops_32 if problem.dtype.itemsize >= 4 or problem.device == "cpu" else on.flops_16
    return max(todo.flops / rate, todo.bytes / on.bandwidth) + on.launch
