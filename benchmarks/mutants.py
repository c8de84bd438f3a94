"""Breaks kernels one line at a time and asks whether the tests notice: `python -m benchmarks.mutants`.

Each mutant of `mutant_list` is applied to a temporary copy of the package, never to the working tree, and its named
interpreter tests run there with a time-out: it is killed if they fail. At least 95 % must be killed, and a survivor
must be explained in the list. Writes benchmarks/results/mutants.json, one record a mutant. Five of them, other ones
each day, run with the test suite.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import dataclasses
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks/results/mutants.json"
KERNELS = "fastlora/backends/triton"
REQUIRED = 0.95  # of the mutants that nobody explains
_COPIED = ("fastlora", "tests/triton", "tests/conftest.py", "tests/projection_tools.py", "pyproject.toml")
_TIMEOUT = 240.0


@dataclasses.dataclass(frozen=True)
class Mutant:
    """One changed line.

    Attributes:
        file: below fastlora/backends/triton.
        old: text that occurs exactly once in the file; lines around the changed one may stand in it.
        new: what replaces it; differs from `old` in one line.
        tests: pytest arguments, files below tests/triton first, then options such as "-k"; run with -x.
        survives: why no test can notice, where that is so; "" otherwise.
    """

    file: str
    old: str
    new: str
    tests: tuple[str, ...]
    survives: str = ""


@dataclasses.dataclass
class Outcome:
    """What became of one mutant, or of a run of the unchanged tests."""

    status: str  # "killed", "survived", "time-out", "invalid"
    killed_by: str = ""
    seconds: float = 0.0
    output: str = ""


class BadMutant(ValueError):
    """The list does not fit the source."""


def apply(source: str, mutant: Mutant) -> tuple[str, int]:
    """The changed source, and the changed line's number (from 1).

    Raises:
        BadMutant: `old` does not occur exactly once, more than one line changes, none does, or it is no Python.
    """
    count = source.count(mutant.old)
    if count != 1:
        raise BadMutant(f"{mutant.file}: {mutant.old!r} occurs {count} times, expected once")
    changed = source.replace(mutant.old, mutant.new)
    before, after = source.splitlines(), changed.splitlines()
    if len(before) != len(after):
        raise BadMutant(f"{mutant.file}: {mutant.old!r} -> {mutant.new!r} changes the number of lines")
    lines = [number for number, (a, b) in enumerate(zip(before, after, strict=True), 1) if a != b]
    if len(lines) != 1:
        raise BadMutant(f"{mutant.file}: {mutant.old!r} -> {mutant.new!r} changes {len(lines)} lines, expected one")
    try:
        same = ast.dump(ast.parse(source)) == ast.dump(ast.parse(changed))
    except SyntaxError as error:
        raise BadMutant(f"{mutant.file}: {mutant.new!r} is no Python: {error}") from error
    if same:
        raise BadMutant(f"{mutant.file}: {mutant.old!r} -> {mutant.new!r} changes only layout or a comment")
    return changed, lines[0]


@contextlib.contextmanager
def checkout(root: Path = ROOT) -> Iterator[Path]:
    """A temporary copy of what the tests need."""
    with tempfile.TemporaryDirectory(prefix="fastlora-mutant-") as folder:
        copy = Path(folder)
        for name in _COPIED:
            source, target = root / name, copy / name
            target.parent.mkdir(parents=True, exist_ok=True)
            if source.is_dir():
                shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
            elif source.exists():
                shutil.copy2(source, target)
        yield copy


def run_tests(copy: Path, tests: Sequence[str], timeout: float = _TIMEOUT) -> Outcome:
    """The tests on a copy, until the first failure.

    Raises:
        RuntimeError: the tests would import another fastlora than the copy's.
    """
    files = [f"tests/triton/{name}" if name.startswith("test_") else name for name in tests]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:xdist", "-p", "no:cacheprovider", *files]
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"}
    environment.pop("PYTEST_ADDOPTS", None)
    begin = time.perf_counter()
    try:
        done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired:
        return Outcome("time-out", f"no end within {timeout:.0f} s", time.perf_counter() - begin)
    output = done.stdout + done.stderr
    seconds = time.perf_counter() - begin
    failure = re.search(r"^FAILED (\S+)", output, re.MULTILINE)
    if done.returncode == 1 and failure:
        return Outcome("killed", failure[1].removeprefix("tests/triton/"), seconds, output)
    if done.returncode < 0:  # it wrote or read where nothing is mapped
        return Outcome("killed", f"the process, by signal {-done.returncode}", seconds, output)
    passed = re.search(r"(\d+) passed", output)
    if done.returncode == 0 and passed:
        return Outcome("survived", "", seconds, output)
    return Outcome("invalid", f"pytest ended with {done.returncode} and ran nothing to its end", seconds, output)


def imported_from(copy: Path) -> Path:
    """Where the copy's tests get fastlora from: it must be the copy, not an installed one."""
    environment = os.environ | {"PYTHONPATH": str(copy)}
    script = "import importlib.util; print(importlib.util.find_spec('fastlora').origin)"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=copy, env=environment, capture_output=True, text=True, check=True
    )
    return Path(done.stdout.strip())


def try_mutant(mutant: Mutant, root: Path = ROOT, timeout: float = _TIMEOUT) -> tuple[Outcome, int]:
    """Break a copy and run the mutant's tests on it; the outcome and the line's number.

    Raises:
        BadMutant: see `apply`; also if the copy's tests would import another fastlora.
    """
    with checkout(root) as copy:
        if not imported_from(copy).is_relative_to(copy):
            raise BadMutant(f"the tests would import {imported_from(copy)}, not the copy")
        file = copy / KERNELS / mutant.file
        if not file.exists():
            raise BadMutant(f"{mutant.file}: no such file below {KERNELS}")
        changed, line = apply(file.read_text(), mutant)
        file.write_text(changed)
        return run_tests(copy, mutant.tests, timeout), line


def rotate(mutants: Sequence[Mutant], turn: int, count: int = 5) -> list[Mutant]:
    """`count` mutants for this turn; successive turns walk the whole list."""
    if not mutants:
        return []
    return [mutants[(turn * count + step) % len(mutants)] for step in range(min(count, len(mutants)))]


def turn(root: Path = ROOT) -> int:
    """The number of commits; without git, the day of the year."""
    command = ["git", "rev-list", "--count", "HEAD"]
    with contextlib.suppress(OSError, subprocess.SubprocessError, ValueError):
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True, timeout=20)
        return int(done.stdout)
    return time.gmtime().tm_yday


# --- the whole list ---------------------------------------------------------------------------------------------------


def baseline(mutants: Sequence[Mutant]) -> dict[tuple[str, ...], Outcome]:
    """The unchanged tests of every mutant: they must pass, and their time bounds the mutants'."""
    found: dict[tuple[str, ...], Outcome] = {}
    with checkout() as copy:
        for tests in dict.fromkeys(mutant.tests for mutant in mutants):
            found[tests] = run_tests(copy, tests)
            print(f"unchanged: {' '.join(tests)}: {found[tests].status}, {found[tests].seconds:.1f} s", flush=True)
    return found


def record(mutant: Mutant, outcome: Outcome, line: int) -> dict[str, Any]:
    """One mutant, as JSON types."""
    first, second = mutant.old.splitlines(), mutant.new.splitlines()
    pairs = [(a.strip(), b.strip()) for a, b in zip(first, second, strict=True) if a != b]
    return {
        "file": mutant.file,
        "line": line,
        "before": pairs[0][0],
        "after": pairs[0][1],
        "tests": list(mutant.tests),
        "status": outcome.status,
        "killed_by": outcome.killed_by,
        "seconds": round(outcome.seconds, 1),
        "survives": mutant.survives,
    }


def _memory(mutant: Mutant) -> Path:
    """Where the outcome for this mutant of this source, judged by these tests, is kept."""
    texts = [repr(mutant), (ROOT / KERNELS / mutant.file).read_text()]
    texts += [(ROOT / "tests/triton" / name).read_text() for name in mutant.tests if name.startswith("test_")]
    return ROOT / "build/mutants" / f"{hashlib.sha256(''.join(texts).encode()).hexdigest()[:24]}.json"


def verdict(records: Sequence[dict[str, Any]], required: float = REQUIRED) -> list[str]:
    """Why the run fails, in words; empty when it passes."""
    killed = [each for each in records if each["status"] in ("killed", "time-out")]
    reasons = [
        f"{each['file']}:{each['line']} {each['before']} -> {each['after']}: {each['status']} {each['killed_by']}"
        for each in records
        if each["status"] == "invalid" or (each["status"] == "survived" and not each["survives"])
    ]
    if len(killed) < required * len(records):
        reasons.append(f"{len(killed)} of {len(records)} killed, required {required:.0%}")
    return reasons


def main(argv: list[str] | None = None) -> int:
    """Exit status 1 where a mutant survives unexplained, or too many do; 2 where the list or the tests are broken."""
    from benchmarks.mutant_list import MUTANTS

    parser = argparse.ArgumentParser(prog="python -m benchmarks.mutants", description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="mutants whose file or text contains this; writes no file")
    parser.add_argument("--turn", type=int, help="only the five of this turn; writes no file")
    parser.add_argument("--no-baseline", action="store_true", help="the unchanged tests are known to pass")
    parser.add_argument("--known", action="store_true", help="believe outcomes of the same file, mutant and tests")
    parser.add_argument("--json", type=Path, help=f"where records go (default {RESULTS.relative_to(ROOT)})")
    options = parser.parse_args(argv)
    chosen = [each for each in MUTANTS if options.only in f"{each.file} {each.old} {each.new}"]
    if options.turn is not None:
        chosen = rotate(chosen, options.turn)
    begin = time.perf_counter()
    broken = False
    for mutant in chosen:
        try:
            apply((ROOT / KERNELS / mutant.file).read_text(), mutant)
        except (BadMutant, OSError) as error:
            broken = True
            print(f"error: {error}")
    if broken:
        return 2
    todo = [each for each in chosen if not (options.known and _memory(each).exists())]
    normal = {} if options.no_baseline else baseline(todo)
    if any(outcome.status != "survived" for outcome in normal.values()):
        print("error: the unchanged tests do not pass")
        return 2
    records = []
    for mutant in chosen:
        memory = _memory(mutant)
        if options.known and memory.exists():
            records.append(json.loads(memory.read_text()))
            continue
        usual = normal.get(mutant.tests)
        outcome, line = try_mutant(mutant, timeout=max(60.0, 4 * usual.seconds) if usual else _TIMEOUT)
        records.append(record(mutant, outcome, line))
        if outcome.status in ("killed", "survived"):
            memory.parent.mkdir(parents=True, exist_ok=True)
            memory.write_text(json.dumps(records[-1]))
        last = records[-1]
        print(f"{last['status']:8} {last['seconds']:6.1f} s  {mutant.file}:{line}  {last['before'][:70]}", flush=True)
    reasons = verdict(records)
    for reason in reasons:
        print(reason)
    killed = sum(each["status"] in ("killed", "time-out") for each in records)
    print(f"{killed} of {len(records)} mutants killed, {time.perf_counter() - begin:.0f} s")
    if options.json is not None or (not options.only and options.turn is None):
        path = options.json or RESULTS
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = ",\n  ".join(json.dumps(each) for each in records)
        path.write_text(f'{{"killed": {killed}, "of": {len(records)}, "mutants": [\n  {lines}\n]}}\n')
    return 1 if reasons else 0


if __name__ == "__main__":
    sys.exit(main())
