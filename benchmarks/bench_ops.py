"""Quantize, dequantize, dropout mask, DoRA norm and the functional linears beside bitsandbytes' and PEFT's."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.replay import CLOCK, play

SUITE = "ops"


@pytest.mark.benchmark(timer=CLOCK.read)
def bench_op(benchmark: Any, measured: Any, row: Any) -> None:
    """One op on one case, in turns with all the others on it."""
    play(benchmark, row, *measured(row))
