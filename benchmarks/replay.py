"""Playing measured times back to pytest-benchmark through the timer it lets a test choose.

pytest-benchmark times one function at a time; ratios want contenders in turns. So the rounds are run first, and each
row's test hands its own samples over: `advance` moves the clock by one sample, and that is what the timer sees.
"""

from __future__ import annotations

from typing import Any


class Clock:
    """A clock that moves only when it is told to."""

    def __init__(self) -> None:
        self._now = 0.0

    def read(self) -> float:
        """Seconds."""
        return self._now

    def advance(self, seconds: float) -> None:
        """Let that much time pass."""
        self._now += seconds


CLOCK = Clock()


def play(benchmark: Any, row: Any, found: dict[str, Any], samples: list[float]) -> None:
    """Give a row's samples (seconds a call) to pytest-benchmark, one round each, grouped by case."""
    benchmark.group = f"{row.suite}: {row.case}"
    benchmark.extra_info.update(mode=found["mode"], role=found["role"], parity=found["parity"], note=found["note"])
    rest = iter([*samples, 0.0])  # one more for a profiler that asks again
    benchmark.pedantic(CLOCK.advance, setup=lambda: ((next(rest),), {}), rounds=len(samples))
