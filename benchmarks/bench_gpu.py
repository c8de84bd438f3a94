"""The GPU kernels beside the frozen floor, bitsandbytes and PEFT, each plan of the Triton backend by itself.

A case is measured once, everybody in turns (`measure.run_case`, as in the GPU report); each row's test then hands its
median to pytest-benchmark as one round, so that the table of a case shows everybody as a multiple of the fastest.
`extra_info` holds the quantiles, parity and the ratio to the floor. Without a GPU every row is skipped;
`--bench-tiny` runs a few small cases on the CPU to check the machinery.
"""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch

from benchmarks import cpu_report, measure, timing
from benchmarks.cases import Case, grid
from benchmarks.contenders import Contender
from benchmarks.replay import CLOCK
from benchmarks.worker import all_contenders, one_thread

BUDGET = 250.0  # seconds for everything, unless --bench-budget says otherwise
_NO_GPU = "needs a GPU: torch.cuda.is_available() is False (--bench-tiny checks the machinery without one)"


class Measured:
    """The rows of each case, measured when one of them is first asked for."""

    def __init__(self, tiny: bool, budget: float) -> None:
        device = torch.device("cpu" if tiny else "cuda")
        seconds = 0.05 if tiny else 1.0
        self.plan = measure.Plan(device, tiny, 1, time.monotonic() + budget, seconds)
        self.rows: dict[str, dict[str, dict[str, Any]]] = {}

    def row(self, case: Case, contender: Contender) -> dict[str, Any]:
        """What came of one contender on one case."""
        if case.name not in self.rows:
            found: dict[str, dict[str, Any]] = {}
            self.rows[case.name] = found
            if self.plan.late:
                blank = [measure.blank_row(case, one, "skipped", timing.LATE) for one in entrants(case)]
                found.update({row["contender"]: row for row in blank})
            else:
                with one_thread(self.plan.dry):
                    measure.run_case(case, entrants(case), self.plan, lambda event: _keep(found, event))
        return self.rows[case.name][contender.name]


def _keep(found: dict[str, dict[str, Any]], event: dict[str, Any]) -> None:
    if event["event"] == "row":
        found[event["row"]["contender"]] = event["row"]


def entrants(case: Case) -> list[Contender]:
    """Who runs a case."""
    return [one for one in all_contenders() if one.applies(case)]


def over_floor(case: Case, rows: dict[str, dict[str, Any]], row: dict[str, Any], mode: str) -> float | None:
    """The row's time over the frozen floor's; None where there is no floor, or it failed."""
    floor = next((one for one in rows.values() if one["role"] == "floor" and one[mode]), None)
    return row[mode]["median"] / (floor[mode]["median"] * case.base_products) if floor and row[mode] else None


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test a case and contender."""
    pairs = [(case, one) for case in grid(metafunc.config.getoption("--bench-tiny")) for one in entrants(case)]
    names = [f"{case.name}-{one.name}" for case, one in pairs]
    metafunc.parametrize(("case", "contender"), pairs, ids=names)


@pytest.fixture(scope="module")
def measured(pytestconfig: pytest.Config) -> Measured:
    """All rows of this run."""
    tiny = pytestconfig.getoption("--bench-tiny")
    if not tiny and not torch.cuda.is_available():
        pytest.skip(_NO_GPU)
    return Measured(tiny, pytestconfig.getoption("--bench-budget") or BUDGET)


@pytest.mark.benchmark(timer=CLOCK.read)
def bench_gpu(benchmark: Any, measured: Measured, case: Case, contender: Contender) -> None:
    """One contender on one case: the step where the case trains, else the forward."""
    row = measured.row(case, contender)
    outcome, why = cpu_report.verdict(row)
    if outcome == "fail":
        pytest.fail(why, pytrace=False)
    mode = "step_ms" if row["step_ms"] else "forward_ms"
    if outcome == "skip" or row[mode] is None:
        pytest.skip(why or str(row["reason"]))
    ratio = over_floor(case, measured.rows[case.name], row, mode)
    benchmark.group = f"gpu: {case.name} ({mode.removesuffix('_ms')})"
    benchmark.extra_info.update(row[mode], role=row["role"], parity=row["parity"], over_floor=ratio, note=row["note"])
    rest = iter([row[mode]["median"] * 1e-3, 0.0])
    benchmark.pedantic(CLOCK.advance, setup=lambda: ((next(rest),), {}), rounds=1)
