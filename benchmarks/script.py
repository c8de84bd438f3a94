"""The frame of a script that measures: its options, what its report says of the run, and what becomes of the report.

A script keeps what is its own: what it measures, its table and its picture.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fastlora
from benchmarks.cpu_report import RESULTS, describe
from benchmarks.environment import now

Report = dict[str, Any]
Draw = Callable[[Report, Path], None]


def parser(name: str, doc: str | None, tiny: str = "") -> argparse.ArgumentParser:
    """With `--json`; `tiny`, what `--tiny` measures instead, also brings that option, and `--png` for the picture."""
    made = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}", description=(doc or "").split("\n")[0])
    made.add_argument("--json", type=Path, default=RESULTS / f"{name}.json")
    if tiny:
        made.add_argument("--png", type=Path, default=RESULTS / f"{name}.png")
        made.add_argument("--tiny", action="store_true", help=f"{tiny}; needs --json and --png")
    return made


def at_least(least: int) -> Callable[[str], int]:
    """The type of an option that counts something."""

    def number(text: str) -> int:
        if int(text) < least:
            raise argparse.ArgumentTypeError(f"must be at least {least}, got {text}")
        return int(text)

    return number


def facts(started: float, about: Report | None = None) -> Report:
    """How long the run took since `started` (`time.perf_counter`), when it ended and, unless given, where it ran."""
    seconds = round(time.perf_counter() - started, 1)
    return {"seconds": seconds, "finished": now(), "environment": describe() if about is None else about}


def write(report: Report, path: Path) -> None:
    """The report as JSON."""
    path.write_text(json.dumps(report, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def picture(draw: Draw, report: Report, path: Path) -> None:
    """The report's picture; without matplotlib a line says that there is none."""
    try:
        draw(report, path)
    except ImportError:
        print("no plot: matplotlib is not installed", file=sys.stderr)


def run(
    parser: argparse.ArgumentParser,
    chosen: argparse.Namespace,
    measure: Callable[[], Report],
    table: Callable[[Report], str],
    draw: Draw | None = None,
    good: Callable[[Report], bool] | None = None,
) -> int:
    """Measure, print the table, write the files.

    Args:
        parser: the script's, `chosen` what it read.
        good: whether what was found is what should be; without it anything is.

    Returns:
        the exit code: 1 for a report that is not good, and for what could not be measured, which becomes one line.

    Raises:
        SystemExit: a tiny run would write into the results.
    """
    if draw and chosen.tiny and RESULTS in (chosen.json.resolve().parent, chosen.png.resolve().parent):
        parser.error("--tiny is no measurement: say with --json and --png where its files go")
    try:
        report = measure()
    except (fastlora.FastloraError, RuntimeError, ImportError) as error:
        print(f"{parser.prog.rpartition('.')[2]}: {error}", file=sys.stderr)
        return 1
    print(table(report))
    write(report, chosen.json)
    if draw:
        picture(draw, report, chosen.png)
    return 0 if good is None or good(report) else 1
