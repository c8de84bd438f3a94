"""One case on the CPU: build, parity, then everybody who passed in turns, A B C A B C.

Each case runs once a session, whichever of its rows is asked for first; all ratios come from those rounds.
"""

from __future__ import annotations

import dataclasses
import gc
import time
from collections.abc import Iterator
from typing import Any

import torch

from benchmarks import timing
from benchmarks.cases import Case
from benchmarks.contenders import Contender, Missing, failures, reason
from benchmarks.measure import Entry, Plan, Sets, admit, timed_calls
from benchmarks.oracle import Inputs, Oracle, Weights, make_inputs, make_weights
from benchmarks.suites import Row, Suite, suites

CPU = torch.device("cpu")
# From this many tokens on the arithmetic dominates and where the weight comes from does not show.
_COMPUTE_BOUND = 64
_SAMPLE = 20.0  # ms: many times what waking threads and refilling caches after somebody else's turn takes
_LONG = 1e9  # multiplications: parity has warmed such a call up, and one of it is enough for the clock


@dataclasses.dataclass(frozen=True)
class Options:
    """What was asked for.

    Attributes:
        tiny: small cases, few samples: checks the machinery.
        threads: of torch while measuring.
        budget: seconds for everything; the rest is reported as skipped.
        case_seconds: timing time of one case (the least number of rounds comes first).
        seed: of the inputs.
    """

    tiny: bool = False
    threads: int = 1
    budget: float = 250.0
    case_seconds: float = 1.2
    seed: int = 1

    @property
    def rounds(self) -> tuple[int, int]:
        """Least and most rounds of a case."""
        return (2, 3) if self.tiny else (3, 50)


def blank_row(suite: Suite, case: Case, contender: Contender) -> dict[str, Any]:
    """A row with nothing measured; every row has exactly these keys."""
    return {
        "suite": suite.name,
        "case": case.name,
        "mode": "step" if case.train and case.op == "linear" else "forward",
        "contender": contender.name,
        "role": contender.role,
        "status": "ok",
        "reason": None,
        "parity": None,
        "time_ms": None,
        "note": "",
    }


class Arena:
    """Runs cases when one of their rows is first asked for, and keeps what came of them.

    Attributes:
        options: see `Options`.
        suites: name -> suite.
        rows: what has been measured, in order.
        samples: seconds of every timed call, for rows that were timed.
    """

    def __init__(self, options: Options, suites_: dict[str, Suite] | None = None) -> None:
        self.options = options
        self.suites = suites_ or suites(options.tiny)
        self.rows: dict[Row, dict[str, Any]] = {}
        self.samples: dict[Row, list[float]] = {}
        self._weights: dict[tuple[object, ...], Weights] = {}
        self._begin: float | None = None

    @property
    def complete(self) -> bool:
        """Whether every case has been run (or skipped for want of time)."""
        return all(row in self.rows for suite in self.suites.values() for row in suite.rows())

    def row(self, row: Row) -> dict[str, Any]:
        """The row, its whole case measured first if it has not been.

        Raises:
            KeyError: no such suite, case or contender.
        """
        if row not in self.rows:
            suite = self.suites[row.suite]
            self._run(suite, next(case for case in suite.cases if case.name == row.case))
        return self.rows[row]

    def run(self) -> None:
        """Everything."""
        for suite in self.suites.values():
            for row in suite.rows():
                self.row(row)

    def _deadline(self, suite: Suite) -> float:
        if self._begin is None:
            self._begin = time.monotonic()
        return self._begin + suite.share * self.options.budget

    def _inputs(self, case: Case) -> Inputs:
        key = (case.n, case.k, case.dtype, case.quant, case.nested)
        if key not in self._weights:
            self._weights[key] = make_weights(case, CPU, self.options.seed)
        return make_inputs(case, CPU, self.options.seed, self._weights[key])

    def _run(self, suite: Suite, case: Case) -> None:
        entries = [Entry(one, blank_row(suite, case, one)) for one in suite.entrants(case)]
        plan = Plan(CPU, self.options.tiny, self.options.seed, self._deadline(suite), self.options.case_seconds)
        before = torch.get_num_threads()
        torch.set_num_threads(self.options.threads)
        try:
            if plan.late:
                for entry in entries:
                    entry.drop("skipped", timing.LATE)
            else:
                self._race(suite, case, entries, plan)
        finally:
            torch.set_num_threads(before)
        for entry in entries:
            self.rows[Row(suite.name, case.name, entry.contender.name)] = entry.row

    def _race(self, suite: Suite, case: Case, entries: list[Entry], plan: Plan) -> None:
        try:
            inputs = self._inputs(case)
            oracle = Oracle(case, inputs)
        except (*failures(), Missing) as error:
            for entry in entries:
                entry.drop("failed", f"inputs or reference: {reason(error)}")
            return
        for entry in entries:
            admit(case, entry, oracle, inputs, _copies(case, entry.contender, plan), plan)
        jobs: dict[str, timing.Job] = {}
        for entry, call in _calls(case, inputs, entries):
            try:
                jobs[entry.contender.name] = call()
            except failures() as error:
                entry.drop("failed", reason(error))
        gc.collect()
        gc.disable()
        try:
            samples, failed = timing.take_turns(jobs, CPU, plan.case_seconds, self.options.rounds, plan.deadline)
        finally:
            gc.enable()
        for entry in entries:
            name = entry.contender.name
            if name in samples:
                entry.row["time_ms"] = timing.summarize(samples[name])._asdict()
                self.samples[Row(suite.name, case.name, name)] = [sample * 1e-3 for sample in samples[name]]
            elif name in failed:
                entry.drop("skipped" if failed[name] == timing.LATE else "failed", failed[name])


def _copies(case: Case, contender: Contender, plan: Plan) -> int:
    """How many weights the calls of one sample go through, each once: a model's layers, one after another.

    A call that waits for memory gets enough of them to outgrow the last-level cache, so that a sample is neither one
    first call after somebody else's nor a read from the cache.
    """
    own = case
    if contender.role == "floor":
        own = dataclasses.replace(case, quant="", dtype=torch.float32 if "fp32" in contender.name else case.dtype)
    if case.m >= _COMPUTE_BOUND and not plan.dry:
        return 1
    return timing.copies_for(own.call_bytes, plan.device, plan.dry)


def _calls(case: Case, inputs: Inputs, entries: list[Entry]) -> Iterator[tuple[Entry, Any]]:
    """For everybody still in the race, a function that warms up and returns the job to time."""
    for entry in entries:
        if entry.built is None:
            continue
        copies = len(entry.built.layers)
        sets = Sets(case, inputs, copies, entry.built.dtype)
        call = timed_calls(case, entry.built, sets)[entry.row["mode"]]
        if case.m * case.n * case.k >= _LONG:
            yield entry, lambda call=call, copies=copies: timing.loop(call, copies)
        else:
            yield entry, lambda call=call, copies=copies: timing.lengthen(call, copies, CPU, _SAMPLE)
