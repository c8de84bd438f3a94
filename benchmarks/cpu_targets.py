"""The CPU backend beside its targets: every promised ratio, from one interleaved run each, with what bounds it.

    python -m benchmarks.cpu_targets [--threads 1 2] [--only WORD ...] [--save-results] [--tiny]

A line names a case, who is compared and the ratio promised. Everybody on a line runs in turn within each round and is
held to the float64 truth first: no ratio for one who fails it. Where a target is missed, the line's bound says whether
it could be met at all: the other's time over the least time this machine needs, which is the products at the best rate
that anybody reached in this run in the case's dtype, or one read of the packed weight at the measured read bandwidth,
whichever is longer; for (de)quantizing, one read and one write at the measured bandwidths of both.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import ctypes
import dataclasses
import functools
import gc
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import plots, script, timing
from benchmarks.arena import _calls, _copies, blank_row
from benchmarks.cases import Case
from benchmarks.contenders import Built, Contender
from benchmarks.cpu_report import RESULTS, SCRATCH, describe
from benchmarks.measure import Entry, Plan, admit
from benchmarks.oracle import BASE, Inputs, Oracle, make_inputs
from benchmarks.ours import _build_function, _quantized, function, ours
from benchmarks.peers import bnb_function, cpu_peers, peers
from benchmarks.suites import BF16, FP32, TINY, WIDE, Suite, _linear, _op
from fastlora import functional

CPU = torch.device("cpu")
DENSE_SHAPE = (2048, 2048)
SMALL = ((576, 576), (1536, 576), (576, 1536))  # SmolLM2-135M's, reported without a target
LEAST_ROUNDS, MOST_ROUNDS, SECONDS = 7, 40, 3.0


@dataclasses.dataclass(frozen=True)
class Goal:
    """One promised ratio.

    Attributes:
        label: the line.
        case: what runs.
        who, other: contenders; the ratio is other's time over who's, above 1 is faster.
        least: the ratio to reach; for a share (`most`) instead who's time over other's may be at most this.
        most: see least.
        other_case: of the other, where it computes another case.
    """

    label: str
    case: Case
    who: str
    other: str
    least: float | None = None
    most: float | None = None
    other_case: Case | None = None


def _frozen_base(case: Case, inputs: Inputs, copies: int) -> Built:
    """Our op without an adapter (rank 0)."""
    none = dataclasses.replace(inputs, a=inputs.a[:0], b=inputs.b[:, :0])
    built = _build_function(case, none, copies)
    return Built(built.layers, [{} for _ in range(copies)])


def _into_out(case: Case, inputs: Inputs, copies: int) -> Built:
    """Our dequantize into a buffer that is used again."""
    weights = [_quantized(case, inputs) for _ in range(copies)]
    outs = [torch.empty(case.n, case.k, dtype=case.dtype) for _ in range(copies)]

    def call(weight: Any, out: Tensor, _: Tensor) -> Tensor:
        return functional.dequantize(weight, case.dtype, out=out)

    calls = [functools.partial(call, weight, out) for weight, out in zip(weights, outs, strict=True)]
    return Built(list(calls), [{} for _ in range(copies)])


def contenders() -> dict[str, list[Contender]]:
    """Everybody by name; of one name the one that applies to a case runs."""
    floor = next(one for one in peers() if one.role == "floor")
    everyone = [dataclasses.replace(floor, name="nn.Linear")]
    everyone += [dataclasses.replace(one, name=one.name.replace("linear", "nn.Linear")) for one in cpu_peers()]
    layer = next(one for one in peers() if one.name == "bitsandbytes" and one.role == "base")
    everyone += [dataclasses.replace(layer, name="bitsandbytes layer"), bnb_function()]
    everyone += [one for one in peers() if one.role == "peer"]
    everyone += [one for one in ours() if one.name == "fastlora"]
    everyone += [dataclasses.replace(function(), name="fastlora function")]
    everyone += [
        Contender(
            "fastlora, no adapter", "ours", lambda case: case.op == "linear" and bool(case.quant), _frozen_base, BASE
        ),
        Contender("fastlora, out=", "ours", lambda case: case.op == "dequantize", _into_out),
    ]
    found: dict[str, list[Contender]] = {}
    for one in everyone:
        found.setdefault(one.name, []).append(one)
    return found


def _forward_goals() -> Iterator[Goal]:
    least = {1: (20, 14), 8: (9, 6), 64: (2.5, 4), 512: (1.2, 4.3)}
    for m, bounds in least.items():
        for dtype, bound in zip((FP32, BF16), bounds, strict=True):
            case = _linear("qlora", "forward", m, dtype)
            yield Goal(f"NF4 forward M={m}", case, "fastlora, no adapter", "bitsandbytes", bound)
            yield Goal(f"NF4 forward M={m}", case, "fastlora", "bitsandbytes layer")
    yield Goal("NF4 forward M=1", _linear("qlora", "forward", 1, FP32), "fastlora, no adapter", "nn.Linear", 3)
    for m, before in ((16, 1.16), (32, 0.93)):
        case = _linear("qlora", "forward", m, FP32)
        yield Goal(f"NF4 forward M={m}", case, "fastlora, no adapter", "nn.Linear", round(1.5 * before, 2))
    for m, dtype, bound in ((1, FP32, None), (1, BF16, 10), (64, FP32, 3), (64, BF16, 3)):
        case = _linear("qlora", "forward", m, dtype, WIDE)
        yield Goal(f"NF4 forward M={m}", case, "fastlora, no adapter", "bitsandbytes", bound)


def _step_goals() -> Iterator[Goal]:
    for p, bf16, fp32 in ((0.0, 4.5, (7, 2.6, 1.22)), (0.05, 4, (6.5, 2.5, 1.30))):
        for m, bound in zip((8, 64, 512), fp32, strict=True):
            label = f"QLoRA step M={m} p={p:g}"
            yield Goal(label, _linear("qlora", "step", m, FP32, p=p), "fastlora", "peft", bound)
            yield Goal(label, _linear("qlora", "step", m, BF16, p=p), "fastlora", "peft", bf16)
        case = _linear("qlora", "step", 512, FP32, p=p)
        yield Goal(f"QLoRA step M=512 p={p:g}", case, "fastlora", "nn.Linear", most=1.13 if p else 1.10)
    qdora, qlora = _linear("qdora", "step", 512, FP32), _linear("qlora", "step", 512, FP32)
    yield Goal("QDoRA step p=0", qdora, "fastlora", "peft", 2.5)
    yield Goal("QDoRA step p=0 beside our QLoRA", qdora, "fastlora", "fastlora", most=1.10, other_case=qlora)
    dropped = _linear("qdora", "step", 512, FP32, p=0.05)
    yield Goal("QDoRA step p=0.05 (peft)", dropped, "fastlora", "peft", 1.8)
    shared = dataclasses.replace(dropped, name=dropped.name + "-shared", dora_dropout="shared")
    yield Goal("QDoRA step p=0.05 (shared)", shared, "fastlora", "peft", 3, other_case=dropped)
    for kind, most in (("lora", 1.06), ("dora", 1.10)):
        case = _linear(kind, "step", 512, FP32, DENSE_SHAPE)
        yield Goal(f"dense {kind} step", case, "fastlora", "nn.Linear", most=most)
        yield Goal(f"dense {kind} step", case, "fastlora", "peft")
    for kind in ("lora", "qlora"):
        for m in (64, 512):
            case = _linear(kind, "step", m, BF16)
            yield Goal(f"{kind} step M={m} bf16", case, "fastlora", "nn.Linear")
    for shape in SMALL:
        for dtype in (FP32, BF16):
            case = _linear("qlora", "step", 512, dtype, shape)
            yield Goal("SmolLM2 QLoRA step M=512", case, "fastlora", "peft")
            yield Goal("SmolLM2 QLoRA step M=512", case, "fastlora", "nn.Linear")


def _weight_goals() -> Iterator[Goal]:
    yield Goal("quantize", _op("quantize", BF16, nested=False), "fastlora", "bitsandbytes", 60)
    yield Goal("quantize", _op("quantize", FP32, nested=False), "fastlora", "bitsandbytes", 60)
    case = _op("dequantize", BF16)
    yield Goal("dequantize into out=", case, "fastlora, out=", "bitsandbytes", 9)
    yield Goal("dequantize, fresh", case, "fastlora", "bitsandbytes", 1.1)


def goals(tiny: bool) -> list[Goal]:
    """Every line; tiny: three of small shapes through the same code."""
    if tiny:
        qlora, qdora = (_linear(kind, "step", 24, FP32, TINY, r=4) for kind in ("qlora", "qdora"))
        return [
            Goal(
                "NF4 forward", _linear("qlora", "forward", 1, FP32, TINY, r=4), "fastlora, no adapter", "nn.Linear", 1
            ),
            Goal("QLoRA step", qlora, "fastlora", "nn.Linear", most=1.1),
            Goal("QDoRA beside QLoRA", qdora, "fastlora", "fastlora", most=1.1, other_case=qlora),
            Goal("dequantize into out=", _op("dequantize", BF16, TINY), "fastlora, out=", "fastlora", 1),
        ]
    return [*_forward_goals(), *_step_goals(), *_weight_goals()]


# --- running ----------------------------------------------------------------------------------------------------------


Key = tuple[str, str]  # a case's name and a contender's


class Race:
    """Everybody who is compared on one case, in turn, each admitted by parity first."""

    def __init__(self, threads: int, tiny: bool) -> None:
        self.threads, self.tiny = threads, tiny
        self.people = contenders()

    def run(self, entrants: list[tuple[Case, str]]) -> dict[Key, dict[str, Any]]:
        """Times in ms (or the reason why not) of each."""
        plan = Plan(CPU, self.tiny, 1, time.monotonic() + 600, SECONDS)
        rows: dict[Key, dict[str, Any]] = {}
        jobs: dict[str, timing.Job] = {}
        torch.set_num_threads(self.threads)
        for case, name in entrants:
            one = next((each for each in self.people[name] if each.applies(case)), None)
            if one is None:
                rows[case.name, name] = {"status": "missing", "reason": f"{name} does not apply"}
                continue
            entry = Entry(one, blank_row(Suite("targets", 1.0, (case,), (one,)), case, one))
            inputs = make_inputs(case, CPU, 1)
            admit(case, entry, Oracle(case, inputs), inputs, _copies(case, one, plan), plan)
            rows[case.name, name] = entry.row
            for _, call in _calls(case, inputs, [entry]):
                jobs[f"{case.name}|{name}"] = call()
        gc.collect()
        rounds = (2, 3) if self.tiny else (LEAST_ROUNDS, MOST_ROUNDS)
        samples, failed = timing.take_turns(jobs, CPU, SECONDS, rounds, plan.deadline)
        for key, row in rows.items():
            joined = "|".join(key)
            row["samples"] = samples.get(joined, [])
            if joined in failed:
                row |= {"status": "failed", "reason": failed[joined]}
        return rows


def machine(threads: int, tiny: bool) -> dict[str, float]:
    """The best rates seen here: products of each dtype in flop/s, reading and writing memory in bytes/s."""
    torch.set_num_threads(threads)
    size, rounds = (128, 2) if tiny else (2048, 5)
    found = {}
    for name, dtype in (("float32", FP32), ("bfloat16", BF16)):
        one, other = torch.randn(size, size).to(dtype), torch.randn(size, size).to(dtype)
        found[name] = 2 * size**3 / _best(lambda one=one, other=other: one @ other.T, rounds)
    big = torch.ones((1 << 12) if tiny else (1 << 26), dtype=torch.int32)
    found["read"] = big.nbytes / _best(lambda: big.max(), rounds)
    found["write"] = big.nbytes / _best(lambda: _fill(big, threads), rounds)
    return found


def _fill(big: Tensor, threads: int) -> None:
    """Every byte, by the C library's memset, which writes past the caches; a part a thread (it lets go of the GIL)."""
    part = big.nbytes // threads
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        list(pool.map(lambda i: ctypes.memset(big.data_ptr() + i * part, 1, part), range(threads)))


def _best(call: Any, rounds: int) -> float:
    call()
    spent = []
    for _ in range(rounds):
        begin = time.perf_counter()
        call()
        spent.append(time.perf_counter() - begin)
    return min(spent)


def products(case: Case) -> float:
    """Floating-point operations of the case's products with the weight."""
    return 2.0 * case.m * case.n * case.k * (2 if case.train else 1) * case.base_products


def least_seconds(case: Case, rates: dict[str, float]) -> float:
    """What the case costs at the machine's best rates: its products with the weight, or one read of it."""
    if case.op != "linear":
        dense = case.n * case.k * case.dtype.itemsize
        read, written = (dense, case.weight_bytes) if case.op == "quantize" else (case.weight_bytes, dense)
        return read / rates["read"] + written / rates["write"]
    bytes_ = case.weight_bytes * (2 if case.train else 1)
    return max(products(case) / rates[_kind(case)], bytes_ / rates["read"])


def _kind(case: Case) -> str:
    return str(case.dtype).removeprefix("torch.")


def settle(lines: list[dict[str, Any]], cases: dict[str, Case], rates: dict[str, float]) -> None:
    """Raise the rates to the best that any line shows, then give every line its bound."""
    timed = [(line, cases[line["case"]]) for line in lines if line["ratio"] is not None]
    for line, case in timed:
        if case.op == "linear":
            rates[_kind(case)] = max(rates[_kind(case)], products(case) / (line["ms"][line["who"]] * 1e-3))
    for line, case in timed:
        own, other = (line["ms"][line[name]] * 1e-3 for name in ("who", "other"))
        least = min(own, least_seconds(case, rates))  # what was reached can be reached
        line["bound"] = least / other if line["most"] is not None else other / least


def judge(goal: Goal, rows: dict[Key, dict[str, Any]]) -> dict[str, Any]:
    """One line of the result, its bound still open."""
    mine = rows[goal.case.name, goal.who]
    theirs = rows[(goal.other_case or goal.case).name, goal.other]
    line: dict[str, Any] = {
        "label": goal.label,
        "case": goal.case.name,
        "who": goal.who,
        "other": goal.other if goal.other_case is None else f"{goal.other} ({goal.other_case.name})",
        "least": goal.least,
        "most": goal.most,
        "ratio": None,
        "met": None,
        "bound": None,
        "reason": next((f"{row['reason']}" for row in (mine, theirs) if row["status"] != "ok"), None),
        "parity": {goal.who: mine.get("parity"), goal.other: theirs.get("parity")},
    }
    if not mine.get("samples") or not theirs.get("samples"):
        return line
    own, other = statistics.median(mine["samples"]), statistics.median(theirs["samples"])
    line["ms"] = {goal.who: own, line["other"]: other}
    if goal.most is not None:
        line |= {"ratio": own / other, "met": own / other <= goal.most}
    else:
        line |= {"ratio": other / own, "met": None if goal.least is None else other / own >= goal.least}
    return line


def measure(threads: int, tiny: bool, only: list[str]) -> dict[str, Any]:
    """Every line with one number of threads."""
    chosen = [
        goal for goal in goals(tiny) if not only or any(word in f"{goal.label} {goal.case.name}" for word in only)
    ]
    race, lines = Race(threads, tiny), []
    rates = machine(threads, tiny)
    by_case: dict[str, list[Goal]] = {}
    for goal in chosen:
        by_case.setdefault(goal.case.name, []).append(goal)
    for number, members in enumerate(by_case.values(), 1):
        entrants: list[tuple[Case, str]] = []
        for goal in members:
            for pair in ((goal.case, goal.who), (goal.other_case or goal.case, goal.other)):
                if pair not in entrants:
                    entrants.append(pair)
        print(f"\r{number}/{len(by_case)} {members[0].case.name:<44}", end="", file=sys.stderr, flush=True)
        rows = race.run(entrants)
        lines += [judge(goal, rows) for goal in members]
    print(f"\r{'':<60}\r", end="", file=sys.stderr)
    settle(lines, {goal.case.name: goal.case for goal in chosen}, rates)
    return {"threads": threads, "rates": rates, "lines": lines}


# --- showing ----------------------------------------------------------------------------------------------------------


def table(run: dict[str, Any]) -> str:
    """The lines of one run, as text."""
    rates = run["rates"]
    text = [
        f"{run['threads']} thread(s); best rates here: fp32 {rates['float32'] / 1e9:.0f} and bf16 "
        f"{rates['bfloat16'] / 1e9:.0f} Gflop/s, reading {rates['read'] / 1e9:.1f} and writing "
        f"{rates['write'] / 1e9:.1f} GB/s",
        f"{'':<32}{'case':<38}{'against':<38}{'ratio':>7}{'target':>8}{'bound':>7}",
    ]
    for line in run["lines"]:
        if line["ratio"] is None:
            text.append(f"{line['label']:<32}{line['case']:<38}{line['other']:<38}  no ratio: {line['reason']}")
            continue
        target = "" if line["met"] is None else f"<={line['most']}" if line["most"] else f">={line['least']}"
        mark = {True: "", False: "  MISSED", None: ""}[line["met"]]
        text.append(
            f"{line['label']:<32}{line['case']:<38}{line['other']:<38}{line['ratio']:>7.2f}{target:>8}"
            f"{line['bound']:>7.2f}{mark}"
        )
    return "\n".join(text)


def _short(line: dict[str, Any]) -> str:
    """What a line is called in the plot: its label, shape and dtype, and who it is compared with."""
    case = line["case"].removesuffix("-shared").split("-")
    return f"{line['label']}, {' '.join(case[-2:])} / {line['other'].split(' (')[0]}"


def draw(report: dict[str, Any], path: Path) -> None:
    """Each target line's ratio as a share of its target, one bar a number of threads."""
    runs = report["runs"]
    labels = [_short(line) for line in runs[0]["lines"] if line["met"] is not None]
    figure = plots.figure(10, 0.3 * len(labels) + 1.6, 110)
    axes = figure.add_subplot()
    height = 0.8 / len(runs)
    for number, run in enumerate(runs):
        lines = [line for line in run["lines"] if line["least"] or line["most"]]
        shares = {}
        for line in lines:
            if line["ratio"] is not None:
                shares[_short(line)] = line["most"] / line["ratio"] if line["most"] else line["ratio"] / line["least"]
        rows = [index + number * height for index, label in enumerate(labels) if label in shares]
        values = [min(4.0, shares[label]) for label in labels if label in shares]
        axes.barh(rows, values, height, label=f"{run['threads']} thread(s)")
    axes.axvline(1.0, color="black", linewidth=1)
    axes.set_yticks([index + 0.4 - height / 2 for index in range(len(labels))], labels, fontsize=7)
    axes.set_ylim(len(labels), -0.3)
    axes.set_xlabel("share of the target reached (cut at 4)")
    axes.set_title(f"CPU backend beside its targets: {report['environment']['cpu']}", fontsize=9)
    axes.legend(fontsize=8)
    figure.savefig(path)


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="numbers of threads to measure with")
    parser.add_argument("--only", nargs="+", default=[], help="lines whose label or case contains one of these")
    parser.add_argument("--save-results", action="store_true", help="into benchmarks/results")
    parser.add_argument("--tiny", action="store_true", help="small shapes: checks the machinery, never speed")
    options = parser.parse_args(arguments)
    runs = []
    for threads in options.threads:
        runs.append(measure(threads, options.tiny, options.only))
        print(table(runs[-1]), end="\n\n", flush=True)
    report = {"schema": 1, "tiny": options.tiny, "environment": describe(), "runs": runs}
    where = RESULTS if options.save_results and not options.tiny else SCRATCH
    where.mkdir(parents=True, exist_ok=True)
    script.write(report, where / "cpu_targets.json")
    if any(line["ratio"] is not None and (line["least"] or line["most"]) for line in runs[0]["lines"]):
        script.picture(draw, report, where / "cpu_targets.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
