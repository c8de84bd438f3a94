"""QLoraLinear, LoraLinear and their DoRA forms beside nn.Linear, bitsandbytes' Linear4bit and PEFT's layers."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.replay import CLOCK, play

SUITE = "layers"


@pytest.mark.benchmark(timer=CLOCK.read)
def bench_layer(benchmark: Any, measured: Any, row: Any) -> None:
    """One layer on one case, in turns with all the others on it."""
    play(benchmark, row, *measured(row))
