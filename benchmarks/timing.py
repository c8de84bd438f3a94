"""Interleaved medians: every contender is timed in turn within each round, so that drift hits all alike.

On a GPU a sample is the time between two CUDA events around a run of calls; on a CPU it is `perf_counter`. Calls
rotate through copies of the inputs that together outgrow the last-level cache several times.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.contenders import failures, reason

LATE = "time budget used up"
_CPU_CACHE = 32 << 20
_PAST_CACHE = 3  # the copies together hold this many caches
_MOST_COPIES = 32
_COLD = 20  # a first pass is hardly slower than this many warm ones


class Stats(NamedTuple):
    """Milliseconds a call."""

    median: float
    p10: float
    p90: float
    best: float
    samples: int


@dataclasses.dataclass
class Job:
    """One thing to time.

    Attributes:
        run: makes `calls` calls.
        calls: how many.
    """

    run: Callable[[], object]
    calls: int


def cache_bytes(device: torch.device) -> int:
    """Size of the last-level cache to outgrow."""
    if device.type != "cuda":
        return _CPU_CACHE
    return int(torch.cuda.get_device_properties(device).L2_cache_size)


def copies_for(call_bytes: float, device: torch.device, dry: bool) -> int:
    """How many input sets calls must rotate through; 2 in dry mode."""
    if dry:
        return 2
    return max(2, min(_MOST_COPIES, int(_PAST_CACHE * cache_bytes(device) / call_bytes) + 1))


def loop(call: Callable[[int], object], copies: int, repeat: int = 1) -> Job:
    """A job that calls every copy in turn, `repeat` times."""

    def run() -> None:
        for _ in range(repeat):
            for index in range(copies):
                call(index)

    return Job(run, copies * repeat)


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def summarize(samples: list[float]) -> Stats:
    """Median and tenths of at least one sample."""
    ordered = sorted(samples)
    last = len(ordered) - 1
    return Stats(
        statistics.median(ordered), ordered[round(0.1 * last)], ordered[round(0.9 * last)], ordered[0], len(ordered)
    )


def _sample(job: Job, device: torch.device) -> Callable[[], float]:
    """Run a job; the returned function gives its milliseconds a call once the device is synchronized."""
    if device.type == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        job.run()
        end.record()
        return lambda: float(start.elapsed_time(end)) / job.calls
    begin = time.perf_counter()
    job.run()
    spent = (time.perf_counter() - begin) * 1e3 / job.calls
    return lambda: spent


def lengthen(call: Callable[[int], object], copies: int, device: torch.device, milliseconds: float) -> Job:
    """A job long enough for the clock: at least `milliseconds`, judged from one warm pass. Warms up too."""
    job = loop(call, copies)
    for _ in range(2):
        read = _sample(job, device)
        synchronize(device)
        took = max(read() * job.calls, 1e-4)
        if took > _COLD * milliseconds:
            break  # warm it would be long enough as well
    if took > copies * milliseconds:
        return loop(call, 1)  # one call is long enough, and more samples say more than longer ones
    return loop(call, copies, max(1, min(64, round(milliseconds / took))))


def interleaved(
    jobs: dict[str, Job], device: torch.device, seconds: float, rounds: tuple[int, int], deadline: float
) -> tuple[dict[str, Stats], dict[str, str]]:
    """Time all jobs in turn, the order rotating by one each round.

    Args:
        seconds: stop after about this long (after the least number of rounds).
        rounds: least and most rounds.
        deadline: `time.monotonic` after which no new round starts.

    Returns:
        Stats of each job that ran, and the reason of each that failed or got no sample.
    """
    samples, failed = take_turns(jobs, device, seconds, rounds, deadline)
    return {name: summarize(made) for name, made in samples.items()}, failed


def take_turns(
    jobs: dict[str, Job], device: torch.device, seconds: float, rounds: tuple[int, int], deadline: float
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """As `interleaved`, but every sample itself, in the order it was taken."""
    reads: dict[str, list[Callable[[], float]]] = {name: [] for name in jobs}
    failed: dict[str, str] = {}
    begin = time.monotonic()
    for number in range(rounds[1]):
        now = time.monotonic()
        if now > deadline or (number >= rounds[0] and now - begin > seconds):
            break
        names = [name for name in jobs if name not in failed]
        turn = number % max(1, len(names))
        for name in names[turn:] + names[:turn]:
            try:
                reads[name].append(_sample(jobs[name], device))
            except failures() as error:
                failed[name] = reason(error)
        synchronize(device)
    samples = {name: [read() for read in made] for name, made in reads.items() if made and name not in failed}
    failed |= {name: LATE for name in jobs if name not in samples and name not in failed}
    return samples, failed


def in_turns(
    steps: Mapping[str, Callable[..., object]],
    inputs: Sequence[tuple[Any, ...]],
    rounds: int,
    *,
    warm: int = 1,
    least: int = 3,
    seconds: float = float("inf"),
) -> dict[str, list[float]]:
    """Seconds of steps that are long enough to be timed one by one, in turns; the order rotates by one each round.

    Args:
        steps: called with the same inputs within a round.
        inputs: of one round after the other, then again from the first.
        rounds: to take, after `warm` that are not timed.
        least: how many are taken at least; then `seconds` may end it.
    """
    names, times = list(steps), {name: [] for name in steps}
    started = time.perf_counter()
    for turn in range(-warm, rounds):
        if turn >= least and time.perf_counter() - started > seconds:
            break
        given = inputs[turn % len(inputs)]
        for name in names:
            step = steps[name]
            before = time.perf_counter()
            step(*given)
            if turn >= 0:
                times[name].append(time.perf_counter() - before)
        names.append(names.pop(0))
    return times


def ratio(one: Sequence[float], other: Sequence[float]) -> float | None:
    """The median of the rounds' ratios, one over other; None where one took no part."""
    return statistics.median(a / b for a, b in zip(one, other, strict=True)) if one else None


def capture(call: Callable[[int], Tensor], copies: int) -> tuple[Job, Tensor, Any]:
    """Record one call per copy into a CUDA graph.

    Returns:
        the job that replays it, the first copy's result (rewritten by each replay), and the graph to keep alive.

    Raises:
        RuntimeError: something in the call cannot be captured.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            for index in range(copies):
                call(index)
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        first = call(0)
        for index in range(1, copies):
            call(index)
    return Job(graph.replay, copies), first, graph
