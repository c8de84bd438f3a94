"""The GPU report: `python -m benchmarks.gpu_report [--dry] [--out DIR] [--budget SECONDS] [--only PATTERN ...]`.

Measures, in one run on one GPU and within the budget: the roof, the frozen floor, the peers and our layers, parity
first. Writes `report.json` and PNG plots. A contender whose parity failed has no time anywhere in it; losses,
missing contenders and what the budget left out are rows as well. `--dry` walks the same code on a CPU, tiny.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import json
import queue
import re
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import IO, Any

import torch

from benchmarks import environment, measure, plots, worker
from benchmarks.cases import METRICS, Case, grid
from benchmarks.contenders import Contender
from benchmarks.environment import ROOT

SCHEMA = 1
BUDGET = 480.0
_OVERTIME = 30.0  # past the budget a case may take to finish before its process is ended
SILENCE = 150.0  # without a word for this long, a kernel is taken to hang
_RESTARTS = 12
WORKER = ["-m", "benchmarks.worker"]
_TEST_SHARE = 0.2  # of the budget, for the GPU tests
_NO_TIME = "time budget used up"


@dataclasses.dataclass
class Options:
    """What was asked for; see the command line's help."""

    dry: bool = False
    out: Path | None = None
    budget: float = BUDGET
    only: list[str] = dataclasses.field(default_factory=list)
    contenders: list[str] = dataclasses.field(default_factory=list)
    seed: int = 1
    tests: bool = True

    @property
    def folder(self) -> Path:
        """Where the files go; a dry run's stay out of the committed results."""
        if self.out is not None:
            return self.out
        return ROOT / ("build/dry_report" if self.dry else "benchmarks/results")


# --- the worker's side of the conversation ----------------------------------------------------------------------------


class Collector:
    """Turns events into rows, the roof, and a reason for every pair that took its process down."""

    def __init__(self) -> None:
        self.rows: dict[tuple[str, str], dict[str, Any]] = {}
        self.roof: dict[str, Any] | None = None
        self.roof_reason: str | None = None
        self.barred: dict[tuple[str, str, str], str] = {}
        self.dead: dict[str, str] = {}  # cases that died without a contender to blame
        self.at: tuple[str, str, str] | None = None  # case, contender ("" for none), stage
        self.lost = ""
        self.ended = False

    def __call__(self, event: dict[str, Any]) -> None:
        """Take one event in."""
        kind = event["event"]
        if kind == "row":
            row = event["row"]
            self.rows[row["case"], row["contender"]] = row
        elif kind == "roof":
            self.roof = event["roof"]
        elif kind == "roof failed":
            self.roof_reason = event["reason"]
        elif kind == "case":
            if self.at is None or self.at[0] != event["case"]:
                print(event["case"], file=sys.stderr, flush=True)
            self.at = (event["case"], "", "")
        elif kind == "at":
            self.at = (event["case"], event["contender"], event["stage"])
        elif kind == "lost":
            self.lost = event["reason"]
        elif kind == "end":
            self.ended = True

    def remaining(self, cases: list[Case]) -> list[str]:
        """Cases that have no rows yet and did not kill their process."""
        done = {case for case, _ in self.rows} | set(self.dead)
        return [case.name for case in cases if case.name not in done]

    def blame(self, why: str, cases: list[Case]) -> None:
        """The process ended at the last place it named: never go there again."""
        if self.at is None and self.roof is None and self.roof_reason is None:
            self.roof_reason = why
        elif self.at is None:  # it cannot even start
            self.dead |= dict.fromkeys(self.remaining(cases), why)
        elif not self.at[1] or self.at in self.barred:
            self.dead[self.at[0]] = why
        else:
            self.barred[self.at] = why
        self.at, self.lost = None, ""


def _ask(options: Options, cases: list[Case], collector: Collector, left: float) -> str:
    """The worker's argument for what is still to do."""
    return json.dumps(
        {
            "dry": options.dry,
            "device": "cpu" if options.dry else "cuda",
            "cases": collector.remaining(cases),
            "contenders": options.contenders,
            "seed": options.seed,
            "until": time.time() + left,
            "barred": [[*place, why] for place, why in collector.barred.items()],
            "roof": collector.roof is None and collector.roof_reason is None,
        }
    )


def _forward(stream: IO[str], last: collections.deque[str]) -> None:
    """Pass the worker's errors on, without the profiler's chatter, and remember the last ones."""
    for line in stream:
        if not line.startswith("USDT:"):
            last.append(line.strip())
            sys.stderr.write(line)


def _listen(process: subprocess.Popen[str], collector: Collector, end: float) -> str:
    """Feed the collector until the process ends; returns why it had to be ended, or ""."""
    lines: queue.Queue[str | None] = queue.Queue()

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            lines.put(line)
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    while True:
        wait = min(SILENCE, end - time.monotonic())
        try:
            line = lines.get(timeout=max(wait, 0.01))
        except queue.Empty:
            process.kill()
            return _NO_TIME if wait < SILENCE else f"no answer for {SILENCE:.0f} s, taken to hang"
        if line is None:
            return ""
        if line.startswith(worker.MARK):
            collector(json.loads(line.removeprefix(worker.MARK)))
        else:
            sys.stderr.write(line)


def _drive(options: Options, cases: list[Case], collector: Collector, deadline: float) -> None:
    """Run workers until everything is measured, the budget is used up, or restarts run out."""
    for _ in range(_RESTARTS):
        left = deadline - time.monotonic()
        if left <= 0 or not collector.remaining(cases):
            return
        command = [sys.executable, *WORKER, _ask(options, cases, collector, left)]
        last: collections.deque[str] = collections.deque(maxlen=5)
        pipe = subprocess.PIPE
        with subprocess.Popen(command, cwd=ROOT, text=True, errors="replace", stdout=pipe, stderr=pipe) as process:
            assert process.stderr is not None
            errors = threading.Thread(target=_forward, args=(process.stderr, last), daemon=True)
            errors.start()
            ended = _listen(process, collector, deadline + _OVERTIME)
            code = process.wait()
            errors.join(timeout=2)
        if collector.ended or ended == _NO_TIME:
            return
        why = ended or collector.lost or f"its process ended with status {code}: {' '.join(last)[-300:]}"
        collector.blame(why, cases)


# --- GPU tests --------------------------------------------------------------------------------------------------------


def run_tests(seconds: float) -> dict[str, Any]:
    """`pytest tests/gpu -q`, bounded; its outcome and the end of its output."""
    command = [sys.executable, "-m", "pytest", "tests/gpu", "-q", "-m", "gpu", "--no-header", "-p", "no:cacheprovider"]
    begin = time.monotonic()
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=seconds, check=False)
        code, output = done.returncode, done.stdout + done.stderr
    except subprocess.TimeoutExpired as error:
        code, output = None, (error.stdout or b"").decode(errors="replace") if error.stdout else ""
    except OSError as error:
        code, output = None, str(error)
    counts = {word: int(number) for number, word in re.findall(r"(\d+) (passed|failed|skipped|error)", output)}
    return {
        "status": "passed" if code == 0 else "timed out" if code is None else "failed",
        "exit": code,
        "counts": counts,
        "seconds": round(time.monotonic() - begin, 1),
        "tail": output[-2000:],
    }


# --- assembling -------------------------------------------------------------------------------------------------------


def _median(row: dict[str, Any] | None, mode: str) -> float | None:
    value = row[mode] if row and row["status"] == "ok" else None
    return value["median"] if value else None


def _modes(case: Case) -> list[str]:
    """The row keys a case is judged on, eager then graph."""
    return ["step_ms", "graph_step_ms"] if case.train and case.op == "linear" else ["forward_ms", "graph_forward_ms"]


def summarize(case: Case, rows: list[dict[str, Any]], copy_rate: float | None, judge: bool = True) -> dict[str, Any]:
    """One case's verdict: every contender's ratio to the floor, the best peer, ours, and whether the target is met.

    Ratios are time over floor time (below 1 is faster); null wherever either time is missing.

    Args:
        judge: compare with the target (not in a dry run: the targets are for a GPU).
    """
    verdict: dict[str, Any] = {"case": case.name, "judged_on": {}, "target": case.describe()["target"]}
    floor = next((row for row in rows if row["role"] == "floor"), None)
    for mode in _modes(case):
        base = _median(floor, mode)
        times = {row["contender"]: _median(row, mode) for row in rows}
        peers = {row["contender"] for row in rows if row["role"] == "peer"}
        ran = {name: time for name, time in times.items() if time is not None}
        best = min((name for name in ran if name in peers), key=lambda name: ran[name], default=None)
        mine = min((row for row in rows if row["role"] == "ours"), key=lambda r: _median(r, mode) or 1e30, default=None)
        own = _median(mine, mode)
        adapted = {row["contender"] for row in rows if row["role"] in ("peer", "ours", "plan")}
        share = {name: case.base_products if name in adapted else 1 for name in times}
        verdict["judged_on"][mode] = {
            "floor_ms": base,
            "ratio_to_floor": {
                name: round(time / (base * share[name]), 4) if base and time else None for name, time in times.items()
            },
            "best_peer": best,
            "ours": mine["contender"] if mine and own else None,
            "ours_ms": own,
            "speedup_over_best_peer": round(ran[best] / own, 4) if best and own else None,
            "metrics": _metrics(case, own, base, copy_rate),
        }
    verdict["met"] = _met(case, verdict) if rows and judge else None
    return verdict


def _metrics(case: Case, own: float | None, base: float | None, copy_rate: float | None) -> dict[str, float | None]:
    if own is None:
        return dict.fromkeys(METRICS)
    return {
        "ratio_to_floor": own / (base * case.base_products) if base else None,
        "speedup": base / own if base else None,
        "share_of_copy": case.call_bytes / (own * 1e-3) / copy_rate if copy_rate else None,
        "microseconds": own * 1e3,
    }


def _met(case: Case, verdict: dict[str, Any]) -> bool | None:
    """Whether our number reaches its target; None without a target or without a number."""
    if case.target is None:
        return None
    eager, graph = _modes(case)
    value = verdict["judged_on"][graph if case.target.graph else eager]["metrics"][case.target.metric]
    if value is None:
        return None
    below = METRICS[case.target.metric] == "below"
    return bool(value <= case.target.bound if below else value >= case.target.bound)


def assemble(options: Options, cases: list[Case], contenders: list[Contender], collector: Collector) -> dict[str, Any]:
    """Everything but the environment: rows for every pair, whatever became of it, and the summary."""
    rows: list[dict[str, Any]] = []
    for case in cases:
        for one in contenders:
            if not one.applies(case):
                continue
            row = collector.rows.get((case.name, one.name))
            if row is None:
                why = collector.barred.get((case.name, one.name, "eager")) or collector.dead.get(case.name)
                row = measure.blank_row(case, one, "failed" if why else "skipped", why or _NO_TIME)
            rows.append(row)
    rate = ((collector.roof or {}).get("copy") or {}).get("bytes_per_second")
    return {
        "schema": SCHEMA,
        "mode": "dry" if options.dry else "gpu",
        "budget_seconds": options.budget,
        "roof": collector.roof or None,
        "roof_reason": collector.roof_reason or (None if collector.roof else _NO_TIME),
        "cases": [case.describe() for case in cases],
        "rows": rows,
        "summary": [
            summarize(case, [row for row in rows if row["case"] == case.name], rate, judge=not options.dry)
            for case in cases
        ],
    }


def generate(options: Options, contenders: list[Contender] | None = None) -> dict[str, Any]:
    """Measure and write the files.

    Args:
        contenders: instead of the usual ones; then everything runs in this process.

    Returns:
        the report as written to `report.json`.

    Raises:
        ValueError: an unknown case or contender. RuntimeError: no GPU, and not a dry run.
    """
    if not options.dry and not torch.cuda.is_available():
        raise RuntimeError("no CUDA device here; --dry walks the same code on a CPU")
    begin = time.monotonic()
    deadline = begin + options.budget
    cases = grid(options.dry, options.only)
    taking_part = contenders if contenders is not None else worker.all_contenders(options.contenders)
    head = {"environment": environment.describe(), "started": environment.now()}
    tests: dict[str, Any] = {"status": "not run", "reason": "they need a GPU" if options.dry else "not asked for"}
    if options.tests and not options.dry and options.budget > 0:
        tests = run_tests(_TEST_SHARE * options.budget)
    collector = Collector()
    if contenders is None:
        _drive(options, cases, collector, deadline)
    else:
        device = torch.device("cpu" if options.dry else "cuda")
        plan = measure.Plan(device, options.dry, options.seed, deadline, 0.05 if options.dry else 1.0)
        with worker.one_thread(options.dry):
            worker.run(cases, contenders, plan, collector, roof=True)
    report = head | {"gpu_tests": tests} | assemble(options, cases, taking_part, collector)
    report["gpu_state_after"] = environment.gpu_state()
    report["seconds"] = round(time.monotonic() - begin, 1)
    _write(report, options.folder)
    return report


def _write(report: dict[str, Any], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "report.json"
    report["plots"] = []
    path.write_text(json.dumps(report, indent=1, allow_nan=False) + "\n")  # before plotting can go wrong
    report["plots"], report["plots_reason"] = plots.draw(report, folder)
    path.write_text(json.dumps(report, indent=1, allow_nan=False) + "\n")


def table(report: dict[str, Any]) -> str:
    """The short form for a terminal: milliseconds and ratios, or the reason for their absence."""
    dry = "DRY RUN on a CPU: not a measurement\n" if report["mode"] == "dry" else ""
    roof = report["roof"] or {}
    rate = (roof.get("copy") or {}).get("bytes_per_second")
    lines = [f"{dry}copy {rate / 1e12:.2f} TB/s" if rate else f"{dry}roof: {report['roof_reason']}"]
    lines.append(f"gpu tests: {report['gpu_tests']['status']}")
    ratios = {entry["case"]: entry for entry in report["summary"]}
    for row in report["rows"]:
        eager, graph = ("step_ms", "graph_step_ms") if row["step_ms"] else ("forward_ms", "graph_forward_ms")
        shown = [f"{row['case']:<28} {row['contender']:<15}"]
        if row["status"] != "ok":
            lines.append(f"{shown[0]} {row['status']}: {row['reason']}"[:160])
            continue
        ratio = ratios[row["case"]]["judged_on"].get(eager, {}).get("ratio_to_floor", {}).get(row["contender"])
        for label, key in (("", eager), ("graph ", graph)):
            value = row[key]
            shown.append(f"{label}{value['median']:9.4f} ms" if value else f"{label}{'-':>9}   ")
        shown.append(f"x{ratio:.3f} floor" if ratio else "")
        lines.append(" ".join(shown))
    if report["mode"] == "dry":
        return "\n".join(lines)
    verdicts = {True: "met", False: "MISSED", None: "no number"}
    lines += [f"target {entry['case']}: {verdicts[entry['met']]}" for entry in report["summary"] if entry["target"]]
    return "\n".join(lines)


def parse(arguments: list[str] | None = None) -> Options:
    """Options from the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_report", description=__doc__)
    parser.add_argument("--dry", action="store_true", help="tiny shapes on the CPU, the whole code path")
    parser.add_argument("--out", type=Path, help="folder for the files (default benchmarks/results)")
    parser.add_argument("--budget", type=float, default=BUDGET, help="seconds; what does not fit is listed as skipped")
    parser.add_argument("--only", nargs="+", default=[], metavar="CASE", help="case names, parts of them or patterns")
    parser.add_argument("--contenders", nargs="+", default=[], metavar="NAME", help="only these contenders")
    parser.add_argument("--seed", type=int, default=1, help="of the inputs")
    parser.add_argument("--no-tests", dest="tests", action="store_false", help="leave out tests/gpu")
    return Options(**vars(parser.parse_args(arguments)))


def main(arguments: list[str] | None = None) -> int:
    """The command; 0 when a report was written, 2 when it could not start."""
    options = parse(arguments)
    try:
        report = generate(options)
    except (ValueError, RuntimeError) as error:
        print(f"gpu_report: {error}", file=sys.stderr)
        return 2
    print(table(report))
    print(f"{report['seconds']} s, written to {options.folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
