"""The roof, measured in the same run: copy bandwidth, matrix rate at the cases' shapes, cost of a launch."""

from __future__ import annotations

import time

import torch

from benchmarks.cases import Case
from benchmarks.timing import Job, Stats, copies_for, interleaved, lengthen, summarize, synchronize


def _time(job: Job, device: torch.device, dry: bool, deadline: float) -> Stats | None:
    stats, _ = interleaved({"it": job}, device, 0.05 if dry else 0.4, (2, 40), deadline)
    return stats.get("it")


def copy_rate(device: torch.device, dry: bool, deadline: float) -> dict[str, object]:
    """Bytes read plus written per second of a device-to-device copy far larger than the cache."""
    size = (4 << 20) if dry else (2 << 30)
    source = torch.randint(0, 255, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    stats = _time(lengthen(lambda _: target.copy_(source), 1, device, 1.0), device, dry, deadline)
    rate = 2 * size / (stats.median * 1e-3) if stats else None
    return {"bytes": size, "ms": stats._asdict() if stats else None, "bytes_per_second": rate}


def matrix_rates(cases: list[Case], device: torch.device, dry: bool, deadline: float) -> list[dict[str, object]]:
    """The library product's rate for x w^T and dy w at each training shape, on random data."""
    rows: list[dict[str, object]] = []
    seen: set[tuple[object, ...]] = set()
    for case in cases:
        key = (case.m, case.n, case.k, case.dtype)
        if case.op != "linear" or not case.train or key in seen:
            continue
        seen.add(key)
        for direction, inner, outer in (("x w^T", case.k, case.n), ("dy w", case.n, case.k)):
            copies = copies_for(case.call_bytes, device, dry)
            left = [torch.randn(case.m, inner, device=device).to(case.dtype) for _ in range(copies)]
            right = torch.randn(outer, inner, device=device).to(case.dtype).t()
            if direction == "dy w":
                right = right.contiguous()

            def product(index: int, left: list[torch.Tensor] = left, right: torch.Tensor = right) -> torch.Tensor:
                return left[index] @ right

            stats = _time(lengthen(product, copies, device, 1.0), device, dry, deadline)
            rows.append(
                {
                    "product": direction,
                    "m": case.m,
                    "n": case.n,
                    "k": case.k,
                    "dtype": str(case.dtype).removeprefix("torch."),
                    "ms": stats._asdict() if stats else None,
                    "flops_per_second": 2 * case.m * case.n * case.k / (stats.median * 1e-3) if stats else None,
                }
            )
    return rows


def launch_cost(device: torch.device, dry: bool, deadline: float) -> dict[str, object]:
    """Microseconds of a call that does next to nothing: on the host, and (CUDA) as a node of a replayed graph."""
    tiny = torch.zeros(32, device=device)
    count = 50 if dry else 500
    samples = []
    for _ in range(5 if dry else 20):
        synchronize(device)
        begin = time.perf_counter()
        for _ in range(count):
            tiny.add_(1.0)
        samples.append((time.perf_counter() - begin) * 1e6 / count)
        synchronize(device)
    node = None
    if device.type == "cuda":
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(count):
                tiny.add_(1.0)
        stats = _time(Job(graph.replay, count), device, dry, deadline)
        node = stats.median * 1e3 if stats else None
    return {"host_us": summarize(samples).median, "graph_node_us": node}


def measure(cases: list[Case], device: torch.device, dry: bool, deadline: float) -> dict[str, object]:
    """All three."""
    return {
        "copy": copy_rate(device, dry, deadline),
        "matrix": matrix_rates(cases, device, dry, deadline),
        "launch": launch_cost(device, dry, deadline),
    }
