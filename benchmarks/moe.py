"""Mixtures of LoRA experts: what they cost, how fast they are beside moe-peft, and what they learn.

    python -m benchmarks.moe [--part counts speed training] [--json FILE] [--png FILE] [--threads N] [--tiny]

counts    operations and saved bytes of one layer with a bf16 base (`moe_costs`).
speed     forward and backward of one fp32 layer, ours and moe-peft 2.0.2's, which runs in a process of its own
          environment (`make bench-moe` sets it up) on the same weights and input. Without the same output and
          gradients there is no ratio. Steps take turns; a ratio is the median of the rounds' ratios, moe-peft's time
          over ours: above 1 fastlora is faster. Beside the wall's stands that of the processes' CPU time, which others'
          work on a shared machine is not in.
training  SmolLM2-135M on real sentences with each method (`moe_training`): losses, the experts' load, and the same
          predictions after saving and loading.

A layer is a gated MLP (MixLoRA) or one linear, H x I (LoRAMoE, MoLA). Each part has its own date in the JSON; parts
that are not asked for stay as they are.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import moe_costs, moe_training, plots, script, timing
from benchmarks.cpu_report import describe
from benchmarks.moe_layers import TINY, Ours, Peer, Sizes, methods, tensors_for
from benchmarks.moe_peer import Seconds

SCHEMA = 1
PARTS = ("counts", "speed", "training")
OURS, PEER = "fastlora", "moe-peft"
GOAL, GOALS = 2.0, ("MixLoRA", "LoRAMoE", "MoLA")
# |ours - peer| / |peer| of the output and of each gradient, fp32.
BUDGET = {"y": 2e-5, "gradient": 1e-4}
WARM, LEAST = 2, 5


def parity(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> dict[str, Any]:
    """The relative difference of the output and the largest of a gradient; "ok" within the budget."""
    if ours.keys() != theirs.keys():
        return {"ok": False, "reason": f"one lacks {', '.join(sorted(ours.keys() ^ theirs.keys()))}"}
    errors: dict[str, float] = {}
    for name, want in theirs.items():
        kind = name if name == "y" else "gradient"
        error = ((ours[name].double() - want.double()).norm() / want.double().norm()).item()
        errors[kind] = max(errors.get(kind, 0.0), error)
    return {"ok": all(errors[kind] <= BUDGET[kind] for kind in errors), "budget": BUDGET, "errors": errors}


def beside_peer(name: str, sizes: Sizes, threads: int, rounds: int, budget: float) -> dict[str, Any]:
    """One method: our seconds, the peer's, and their ratio if both compute the same."""
    fields = methods(sizes)[name]
    tensors = tensors_for(fields, sizes)
    ours = Ours(fields, tensors)
    times: dict[str, list[Seconds]] = {OURS: [], PEER: []}
    found, reason = None, None
    with tempfile.TemporaryDirectory() as scratch:
        try:
            with Peer(fields, tensors, threads, Path(scratch)) as peer:
                found = parity(ours.step()[1], peer.outputs())
                started = time.perf_counter()
                turns = [(OURS, lambda: ours.step()[0]), (PEER, peer.seconds)]
                for turn in range(-WARM, rounds):
                    if turn >= LEAST and time.perf_counter() - started > budget:
                        break
                    for who, step in turns:
                        seconds = step()
                        if turn >= 0:
                            times[who].append(seconds)
                    turns.reverse()
        except (FileNotFoundError, RuntimeError) as error:
            reason = str(error)
    same = found is not None and found["ok"]
    ratio = _ratio(times, "wall") if same else None
    return {
        "method": name,
        "seconds": {who: _median(values, "wall") for who, values in times.items()},
        "cpu_seconds": {who: _median(values, "cpu") for who, values in times.items()},
        "peer_over_fastlora": ratio,
        "peer_over_fastlora_cpu": _ratio(times, "cpu") if same else None,
        "goal_met": None if name not in GOALS or ratio is None else ratio >= GOAL,
        "rounds": len(times[OURS]),
        "parity": found,
        "reason": reason,
        "samples": times,
    }


def _median(values: list[Seconds], clock: str) -> float | None:
    return statistics.median(getattr(each, clock) for each in values) if values else None


def _ratio(times: dict[str, list[Seconds]], clock: str) -> float | None:
    """The median over rounds of the peer's time over ours."""
    theirs, ours = ([getattr(each, clock) for each in times[who]] for who in (PEER, OURS))
    return timing.ratio(theirs, ours)


def peer_bytes(name: str, sizes: Sizes) -> int | None:
    """Bytes moe-peft keeps for backward with a bf16 base; None where it cannot run."""
    fields = methods(sizes)[name]
    with tempfile.TemporaryDirectory() as scratch:
        try:
            with Peer(fields, tensors_for(fields, sizes, torch.bfloat16), 1, Path(scratch)) as peer:
                return peer.saved_bytes()
        except (FileNotFoundError, RuntimeError):
            return None


def run_part(part: str, options: argparse.Namespace, before: dict[str, Any] | None) -> dict[str, Any]:
    """One part as JSON types; `before`: what the file held of it."""
    sizes, names = TINY if options.tiny else Sizes(), tuple(methods(Sizes()))
    started, load = time.perf_counter(), describe()
    results: Any
    if part == "counts":
        results = moe_costs.measure(sizes, names)
        for row in results:
            row["peer_saved_bytes"] = peer_bytes(row["method"], sizes)
    elif part == "speed":
        results = [beside_peer(name, sizes, options.threads, options.rounds, options.budget) for name in names]
    else:
        results = moe_training.measure(options.steps, options.tiny, options.method, before and before["results"])
    if options.tiny and part != "training":
        for row in results:
            row.update({key: None for key in ("goal_met", "goals_met") if key in row})
    return {
        "layer": sizes._asdict(),
        "threads": options.threads,
        **script.facts(started, load),
        "results": results,
    }


def measure(chosen: argparse.Namespace) -> dict[str, Any]:
    """The parts that are asked for, the others as the file has them."""
    torch.set_num_threads(chosen.threads)
    report: dict[str, Any] = {}
    if chosen.json.is_file() and (chosen.method or set(chosen.part) != set(PARTS)):
        report = json.loads(chosen.json.read_text())
    report |= {
        "schema": SCHEMA,
        "mode": "tiny" if chosen.tiny else "cpu",
        "goals": {"speed": GOAL, "flops": moe_costs.MOST, "saved_bytes": moe_costs.MOST_SAVED},
    }
    for part in dict.fromkeys(chosen.part):
        report[part] = run_part(part, chosen, report.get(part))
    return report


# --- what comes out ---------------------------------------------------------------------------------------------------


def table(report: dict[str, Any]) -> str:
    """Every part in short, goals that were missed and losses named."""
    lines: list[str] = []
    if "counts" in report:
        lines.append(
            f"{'':<17}{'GFLOP fwd':>10}{'of formula':>11}{'bwd':>8}{'of formula':>11}{'saved MB':>10}{'moe-peft':>9}"
        )
        for row in report["counts"]["results"]:
            backend = "cpu" if "cpu" in row["issued"] else "reference"
            issued, over = row["issued"][backend], row["issued_over_formula"][backend]
            theirs = row["peer_saved_bytes"]
            missed = [name for name, met in (row["goals_met"] or {}).items() if met is False]
            lines.append(
                f"{row['method']:<17}{issued['forward'] / 1e9:>10.3f}{over['forward']:>11.3f}"
                f"{issued['backward'] / 1e9:>8.3f}{over['backward']:>11.3f}{row['saved_bytes'] / 1e6:>10.1f}"
                f"{'-' if theirs is None else format(theirs / 1e6, '.1f'):>9}"
                f"{'  goal missed: ' + ', '.join(missed) if missed else ''}"
            )
    if "speed" in report:
        lines += [
            "",
            f"{'':<17}{'fastlora ms':>12}{'moe-peft ms':>12}{'ratio':>7}{'of CPU time':>13}  largest differences",
        ]
        for row in report["speed"]["results"]:
            shown = "".join(
                f"{'-' if value is None else format(1e3 * value, '.1f'):>12}" for value in row["seconds"].values()
            )
            ratio, found = row["peer_over_fastlora"], row["parity"]
            wall = "-" if ratio is None else format(ratio, ".2f")
            cpu = "-" if ratio is None else format(row["peer_over_fastlora_cpu"], ".2f")
            verdict = row["reason"] or ", ".join(f"{k} {v:.1e}" for k, v in found.get("errors", {}).items())
            verdict += "" if row["reason"] or found["ok"] else "  NOT THE SAME"
            note = f"  goal missed ({GOAL:g})" if row["goal_met"] is False else ""
            note += "  SLOWER than moe-peft" if ratio is not None and ratio < 1 else ""
            lines.append(f"{row['method']:<17}{shown}{wall:>7}{cpu:>13}  {verdict}{note}")
    if "training" in report:
        lines += ["", moe_training.table(report["training"]["results"])]
    return "\n".join(lines)


def draw(report: dict[str, Any], path: Path) -> None:
    """Times as bars, and the training's losses and experts' load."""
    figure = plots.figure(9.6, 6.4, 120)
    grid = figure.add_gridspec(2, 6)
    if "speed" in report:
        _draw_speed(figure.add_subplot(grid[0, :3]), report["speed"])
    if "training" in report:
        moe_training.draw_losses(figure.add_subplot(grid[0, 3:]), report["training"]["results"])
        for at, row in enumerate(report["training"]["results"]["methods"]):
            moe_training.draw_load(figure.add_subplot(grid[1, 2 * at : 2 * at + 2]), row)
    if report["mode"] == "tiny":
        figure.suptitle("TINY LAYERS, not a measurement", fontsize=10)
    figure.savefig(path)


def _draw_speed(axes: Any, part: dict[str, Any]) -> None:
    rows = part["results"]
    for place, (name, colour) in enumerate(((PEER, "#9db4c8"), (OURS, "#2e7d32"))):
        spots = [group + 0.38 * (place - 0.5) for group in range(len(rows))]
        values = [1e3 * (row["seconds"][name] or 0.0) for row in rows]
        bars = axes.bar(spots, values, 0.36, color=colour, label=name if name == OURS else f"{PEER} 2.0.2")
        labels = [f"{value:.0f}" if value else "-" for value in values]
        if name == OURS:
            ratios = [row["peer_over_fastlora"] for row in rows]
            labels = [f"{text}\n{r:.1f}x" if r else text for text, r in zip(labels, ratios, strict=True)]
        axes.bar_label(bars, labels, fontsize=7, padding=1)
    axes.set_xticks(range(len(rows)), [row["method"].replace(" ", "\n") for row in rows], fontsize=7)
    axes.set_ylabel("ms, forward + backward", fontsize=8)
    layer = part["layer"]
    axes.set_title(
        f"one fp32 layer {layer['hidden']} x {layer['width']}, {layer['sequences'] * layer['length']} tokens, "
        f"{layer['experts']} experts of rank {layer['rank']}\n"
        f"{plots.machine(part)}",
        fontsize=7,
        loc="left",
    )
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(y=0.2)
    axes.legend(frameon=False, fontsize=7)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, write."""
    parser = script.parser("moe", __doc__, tiny="small layers")
    parser.add_argument("--part", choices=PARTS, nargs="+", default=PARTS)
    parser.add_argument("--threads", type=script.at_least(1), default=1)
    parser.add_argument("--rounds", type=script.at_least(1), default=25, help="of each method at most")
    parser.add_argument("--budget", type=float, default=8.0, help="seconds for one method's rounds")
    parser.add_argument("--steps", type=script.at_least(1), default=36, help="of training with each method")
    parser.add_argument(
        "--method", choices=tuple(moe_training.METHODS), nargs="+", default=(), help="train only these again"
    )
    chosen = parser.parse_args(arguments)
    return script.run(parser, chosen, lambda: measure(chosen), table, draw)


if __name__ == "__main__":
    sys.exit(main())
