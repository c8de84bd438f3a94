"""Compiles every Triton kernel for GPUs this machine need not have: `python -m benchmarks.aot [--targets ...]`.

Walks the grid of `aot_grid` (every plan and op, recorded on meta tensors), compiles each distinct specialisation with
the installed Triton, and fails on a spill, on a 16-bit product without matrix instructions, on more shared memory
than the target has, on a kernel that is nothing but a trap, and on whatever does not compile. Figures are kept in
build/aot/ under the hash of the sources, the specialisation and Triton's version; `--changed` also believes the
committed benchmarks/results/aot.json, so that only what changed since is compiled. Python must not run under
TRITON_INTERPRET.
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import dataclasses
import json
import multiprocessing
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterable
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import torch
import triton
from triton.compiler.errors import CompilationError
from triton.runtime.errors import TritonError

from benchmarks.aot_compile import (
    GPUS,
    READER,
    Compiled,
    Specialisation,
    compile_launch,
    compile_specialisation,
    specialise,
)
from fastlora.backends.triton.launch import TARGETS

__all__ = ["GPUS", "Compiled", "compile_launch", "faults", "main"]

ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / "build/aot"
RESULTS = ROOT / "benchmarks/results/aot.json"
DEFAULT_TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
_LEAST = 16  # instructions; Triton puts a trap in place of a kernel that runs out of Blackwell's tensor memory
# What a compiler that cannot compile raises: Triton's own errors, a failed pass (RuntimeError), a failed assembler.
_COMPILER_ERRORS = (
    CompilationError,
    TritonError,
    RuntimeError,
    ValueError,
    TypeError,
    IndexError,
    NotImplementedError,
    AssertionError,
    subprocess.SubprocessError,
)


@dataclasses.dataclass
class Entry:
    """One distinct specialisation: where it comes from, and what became of it."""

    what: Specialisation
    used_by: str  # the first plan and problem that launched it
    record: dict[str, Any] | None = None
    error: str = ""
    source: str = "compiled"  # or "cache", "recorded"


def faults(record: dict[str, Any]) -> list[str]:
    """What the gate refuses in one compiled kernel (a `Compiled.record()`), in words; empty when it passes."""
    found = []
    if record["spills"]:
        found.append(f"{record['spills']} spills")
    if record["half"] and not sum(record["matrix"].values()):
        found.append("16-bit product without matrix instructions")
    if record["instructions"] < _LEAST:
        found.append("nothing but a trap: more tensor memory than the target has")
    limit = TARGETS[record["target"]].shared_memory
    if record["shared"] > limit:
        found.append(f"{record['shared']} bytes of shared memory, the target has {limit}")
    return found


def decoded_elements(record: dict[str, Any]) -> int:
    """Weights one pass of the main loop decodes: the tile's N x K elements, or 0 in a kernel that does not decode.

    A kernel decodes when it takes codes and their table; its tile is BLOCK_N x BLOCK_K, or BLOCK_N words of PER.
    """
    words = dict(word.split("=", 1) for word in record["specialisation"].split() if "=" in word)
    if words.get("BLOCKSIZE", "0") == "0" or "table_ptr:" not in record["specialisation"]:
        return 0
    elements = 1
    for name in ("BLOCK_N", "BLOCK_K", "PER"):
        elements *= int(words.get(name, 1))
    return elements


def per_element(record: dict[str, Any]) -> float | None:
    """Thread instructions a decoded weight, as `Compiled.per_element` counts them; None in other kernels."""
    if "per_element" in record:  # a committed record: it has no specialisation to tell from
        return record["per_element"]
    elements = decoded_elements(record)
    if not elements:
        return None
    count = record["loop"] or record["instructions"]
    return round(count * record["warps"] * record["warp"] / elements, 2)


# --- the work ---------------------------------------------------------------------------------------------------------


def collect(targets: list[str], only: str = "") -> dict[str, Entry]:
    """Every distinct specialisation of the grid, by key."""
    from benchmarks import aot_grid

    found: dict[str, Entry] = {}
    for target, used_by, launch in aot_grid.launches(targets):
        if only and only not in launch.name:
            continue
        what = specialise(launch, target)
        if what.key not in found:
            found[what.key] = Entry(what, used_by)
    return found


def known(recorded: bool) -> dict[str, tuple[str, dict[str, Any]]]:
    """Figures from earlier runs, by key: the cache's, and the committed file's where asked for."""
    found: dict[str, tuple[str, dict[str, Any]]] = {}
    if recorded and RESULTS.exists():
        runs = json.loads(RESULTS.read_text())["triton"]
        for run in runs.values():
            found |= {record["key"]: ("recorded", record) for record in run["kernels"]}
    for file in CACHE.glob("*.json"):
        try:
            found[file.stem] = ("cache", json.loads(file.read_text()))
        except ValueError:
            file.unlink(missing_ok=True)
    return found


_entries: list[Entry] = []  # a forked worker finds its work here: kernels cannot be sent to it


def _quiet() -> None:
    """What the compiler prints in a worker, a failed pass its whole module, goes to a file."""
    with (CACHE / "compiler.log").open("a") as log:
        os.dup2(log.fileno(), 2)


def _compile(index: int) -> dict[str, Any] | str:
    try:
        return compile_specialisation(_entries[index].what).record()
    except _COMPILER_ERRORS as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _compile_all(indices: list[int], jobs: int) -> Iterable[tuple[int, dict[str, Any] | str]]:
    """Results as they come. A compiler that takes its process down is found by giving each its own."""
    context = multiprocessing.get_context("fork")
    left = set(indices)
    try:
        with concurrent.futures.ProcessPoolExecutor(jobs, context, _quiet) as pool:
            futures = {pool.submit(_compile, index): index for index in indices}
            for future in concurrent.futures.as_completed(futures):
                result = future.result()
                left.discard(futures[future])
                yield futures[future], result
    except BrokenProcessPool:
        for index in sorted(left):
            try:
                with concurrent.futures.ProcessPoolExecutor(1, context, _quiet) as pool:
                    yield index, pool.submit(_compile, index).result()
            except BrokenProcessPool:
                yield index, "the compiler took its process down"


def fill(entries: dict[str, Entry], jobs: int, recorded: bool) -> None:
    """Give every entry its record or its error, from what is known or by compiling."""
    earlier = known(recorded)
    waiting: list[str] = []
    for key, entry in entries.items():
        if key in earlier:
            entry.source, entry.record = earlier[key]
        else:
            waiting.append(key)
    if not waiting:
        return
    CACHE.mkdir(parents=True, exist_ok=True)
    _entries[:] = [entries[key] for key in waiting]
    for done, (index, result) in enumerate(_compile_all(list(range(len(waiting))), jobs), 1):
        entry = _entries[index]
        if isinstance(result, str):
            entry.error = result
        else:
            entry.record = result
            file = CACHE / f"{waiting[index]}.json"
            partial = file.with_suffix(f".{os.getpid()}")
            partial.write_text(json.dumps(result))
            partial.replace(file)
        if done % 50 == 0:
            print(f"{done} of {len(waiting)} compiled", file=sys.stderr, flush=True)


# --- what is told -----------------------------------------------------------------------------------------------------


def summary(entries: Iterable[Entry]) -> list[dict[str, Any]]:
    """One row a kernel and target: how many specialisations, and the extremes of their figures."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = collections.defaultdict(list)
    for entry in entries:
        if entry.record is not None:
            groups[entry.record["kernel"], entry.record["target"]].append(entry.record)
    rows = []
    for (kernel, target), records in sorted(groups.items()):
        costs = [cost for record in records if (cost := per_element(record)) is not None]
        rows.append(
            {
                "kernel": kernel,
                "target": target,
                "count": len(records),
                "registers": max(record["registers"] for record in records),
                "spills": max(record["spills"] for record in records),
                "shared": max(record["shared"] for record in records),
                "matrix": "/".join(sorted({name for record in records for name in record["matrix"]})),
                "instructions": max(record["instructions"] for record in records),
                "per_element": [min(costs), max(costs)] if costs else None,
            }
        )
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    """The summary as a table; register and instruction counts are the largest of the kernel's specialisations."""
    print(
        f"{'kernel':30} {'target':7} {'n':>4} {'regs':>5} {'spill':>5} {'shared':>7} {'instr':>6} per decoded  matrix"
    )
    for row in rows:
        cost = "" if row["per_element"] is None else "{:.1f}-{:.1f}".format(*row["per_element"])
        print(
            f"{row['kernel']:30} {row['target']:7} {row['count']:4} {row['registers']:5} {row['spills']:5} "
            f"{row['shared']:7} {row['instructions']:6} {cost:>11}  {row['matrix']}"
        )


def describe(entry: Entry) -> str:
    """One specialisation, for a message."""
    return f"{entry.what.name} on {entry.what.target} ({entry.what.tile}), {entry.used_by}"


def write(path: Path, entries: dict[str, Entry], seconds: float) -> None:
    """Put this Triton's figures into the file, beside those of other versions."""
    document: dict[str, Any] = {"schema": 1, "triton": {}}
    if path.exists():
        document = json.loads(path.read_text())
    kernels = [
        {"key": key, **_short(entry.record), "per_element": per_element(entry.record), "used_by": entry.used_by}
        for key, entry in sorted(entries.items(), key=lambda item: (item[1].what.name, item[1].what.target))
        if entry.record is not None
    ]
    document["triton"][triton.__version__] = {
        "environment": {"torch": torch.__version__, "python": platform.python_version(), "readers": READER},
        "seconds": round(seconds, 1),
        "failures": [
            {"what": describe(entry), "why": [entry.error] if entry.error else faults(entry.record or {})}
            for entry in failed(entries)
        ],
        "kernels": kernels,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(_lines(document))


def _short(record: dict[str, Any]) -> dict[str, Any]:
    """A record without what the key stands for and no figure is computed from."""
    return {name: value for name, value in record.items() if name not in ("specialisation", "dots", "seconds")}


def _lines(document: dict[str, Any]) -> str:
    """JSON with one kernel a line, so that a change of one is a change of one line."""
    marks: dict[str, str] = {}

    def mark(record: dict[str, Any]) -> str:
        name = f"@{len(marks)}@"
        marks[f'"{name}"'] = json.dumps(record)
        return name

    runs = {
        version: run | {"kernels": [mark(record) for record in run["kernels"]]}
        for version, run in sorted(document["triton"].items())
    }
    text = json.dumps(document | {"triton": runs}, indent=1)
    return (
        "\n".join(
            line.replace(found, marks[found]) if (found := line.strip().rstrip(",")) in marks else line
            for line in text.splitlines()
        )
        + "\n"
    )


def failed(entries: dict[str, Entry]) -> list[Entry]:
    """What did not compile or does not pass the gate."""
    return [each for each in entries.values() if each.error or faults(each.record or {})]


def main(argv: list[str] | None = None) -> int:
    """Exit status 1 where anything fails, 2 where nothing was found."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.aot", description=__doc__.splitlines()[0])
    parser.add_argument("--targets", nargs="+", choices=list(GPUS), default=list(DEFAULT_TARGETS))
    parser.add_argument("--changed", action="store_true", help="believe the committed figures; write no file")
    parser.add_argument("--only", default="", help="kernels whose name contains this; writes no file")
    parser.add_argument("--json", type=Path, help=f"where figures go (default {RESULTS.relative_to(ROOT)})")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="compilers at a time")
    parser.add_argument("--verbose", action="store_true", help="one row a specialisation")
    options = parser.parse_args(argv)
    begin = time.perf_counter()
    entries = collect(options.targets, options.only)
    recording = time.perf_counter() - begin
    if not entries:
        print("no kernel matches")
        return 2
    fill(entries, options.jobs, options.changed)
    seconds = time.perf_counter() - begin
    if options.verbose:
        for entry in entries.values():
            if entry.record is not None:
                print(json.dumps(entry.record | {"per_element": per_element(entry.record)}))
    show(summary(entries.values()))
    bad = failed(entries)
    for entry in bad:
        print(f"FAILED {describe(entry)}: {entry.error or '; '.join(faults(entry.record or {}))}")
    counts = collections.Counter(entry.source for entry in entries.values())
    told = ", ".join(f"{count} {source}" for source, count in sorted(counts.items()))
    print(
        f"triton {triton.__version__}: {len(entries)} specialisations ({told}), {len(bad)} failed, "
        f"{seconds:.0f} s ({recording:.0f} s to record)"
    )
    complete = not options.changed and not options.only and set(options.targets) >= set(DEFAULT_TARGETS)
    if options.json is not None or complete:
        write(options.json or RESULTS, entries, seconds)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
