"""`pytest benchmarks/ --benchmark-only`: options, one test per row, and the report at the end.

pytest-benchmark shows and stores every row. The times are those of the interleaved rounds (`arena`), played back to it
through its own timer, so that its table and our ratios come from the same measurement.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from benchmarks.arena import Arena

_BEGIN = pytest.StashKey[float]()
_ARENA = pytest.StashKey["Arena"]()
_SHOWN = pytest.StashKey[str]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Our options, beside pytest-benchmark's."""
    group = parser.getgroup("fastlora benchmarks")
    group.addoption("--threads", type=int, default=1, help="threads of torch while measuring (default 1)")
    group.addoption("--bench-budget", type=float, default=None, help="seconds; what does not fit is skipped and named")
    group.addoption("--bench-tiny", action="store_true", help="a few small cases: checks the machinery, never speed")
    group.addoption(
        "--save-results", action="store_true", help="write to benchmarks/results instead of the ignored build/bench"
    )
    group.addoption("--results-dir", type=Path, default=None, help="write there instead")


def pytest_configure(config: pytest.Config) -> None:
    """Threads before torch is imported; a narrower table of pytest-benchmark's unless one was asked for."""
    threads = config.getoption("--threads")
    if threads < 1:
        raise pytest.UsageError(f"--threads must be at least 1, got {threads}")
    if config.getoption("--save-results") and config.getoption("--bench-tiny"):
        raise pytest.UsageError("--save-results needs the real cases: leave out --bench-tiny")
    os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = str(threads)
    config.stash[_BEGIN] = time.monotonic()
    if config.getoption("benchmark_columns", None) is None:
        config.option.benchmark_columns = ["min", "median", "max", "rounds"]


def arena_of(config: pytest.Config) -> Arena:
    """The session's arena, made at its first use."""
    from benchmarks.arena import Arena, Options

    if _ARENA not in config.stash:
        given = {"tiny": config.getoption("--bench-tiny"), "threads": config.getoption("--threads")}
        if (budget := config.getoption("--bench-budget")) is not None:
            given["budget"] = budget
        config.stash[_ARENA] = Arena(Options(**given))
    return config.stash[_ARENA]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test per row of the module's suite."""
    if "row" in metafunc.fixturenames:
        rows = arena_of(metafunc.config).suites[metafunc.module.SUITE].rows()
        metafunc.parametrize("row", rows, ids=str)


@pytest.fixture
def measured(request: pytest.FixtureRequest) -> Iterator[Any]:
    """Function row -> (what was measured, its samples in seconds); skips or fails where there is no time."""
    from benchmarks import cpu_report

    arena = arena_of(request.config)

    def look(row: Any) -> tuple[dict[str, Any], list[float]]:
        found = arena.row(row)
        outcome, why = cpu_report.verdict(found)
        if outcome == "fail":
            pytest.fail(why, pytrace=False)
        if outcome == "skip":
            pytest.skip(why)
        return found, arena.samples[row]

    return look


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Write the files, whatever else went wrong."""
    from benchmarks import cpu_report

    config = session.config
    if _ARENA not in config.stash or not config.stash[_ARENA].rows:
        return
    arena = config.stash[_ARENA]
    save = config.getoption("--save-results")
    where = config.getoption("--results-dir") or cpu_report.folder(arena, save)
    report = cpu_report.assemble(arena, time.monotonic() - config.stash[_BEGIN])
    paths = cpu_report.write(report, where)
    shown = [cpu_report.table(report), "", f"{report['seconds']} s, written: {', '.join(map(str, paths))}"]
    if report["plot_reason"]:
        shown.append(f"no plot: {report['plot_reason']}")
    if save and where != cpu_report.RESULTS:
        shown.append("not saved as results: only a whole run is, and this one left out rows")
    config.stash[_SHOWN] = "\n".join(shown)


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Our table, after pytest-benchmark's."""
    if shown := terminalreporter.config.stash.get(_SHOWN, ""):
        terminalreporter.section("fastlora beside nn.Linear, bitsandbytes and PEFT")
        terminalreporter.write_line(shown)


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_machine_info(machine_info: dict[str, Any]) -> None:
    """Results are published: they name the CPU, not the host."""
    machine_info.pop("node", None)
