"""What came out of the CPU benchmarks: JSON, a table for the terminal, one plot.

A ratio is the other's median time over ours from the same interleaved rounds: above 1 fastlora is faster, below 1 it
is slower and the row says so. Whoever failed parity has no ratio, and nobody has one against it.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from benchmarks import environment, plots
from benchmarks.arena import Arena
from benchmarks.environment import ROOT

SCHEMA = 1
RESULTS = ROOT / "benchmarks" / "results"
SCRATCH = ROOT / "build" / "bench"
COLUMNS = ("linear-fp32", "linear", "bitsandbytes", "peft", "torch")
# With one of these a bfloat16 matmul is fast; without, torch emulates it and beating it says little.
BF16_FLAGS = ("avx512_bf16", "amx_bf16", "bf16")


def describe() -> dict[str, Any]:
    """The machine and the software, without names of hosts, users or folders."""
    from fastlora.backends import _cpu_library
    from fastlora.cli.env import devices

    known = environment.describe()
    cpu = devices()["cpu"]
    library, why = _cpu_library.loaded()
    return {name: known[name] for name in ("python", "system", "packages", "commit", "dirty", "source_sha256")} | {
        "cpu": cpu["name"],
        "cores": os.cpu_count(),
        "flags": cpu["flags"],
        "torch_tier": cpu["torch_tier"],
        "fastlora_tier": _cpu_library.TIERS[library.tier()] if library else None,
        "fastlora_tier_reason": why or None,
        "native_bf16": any(flag in cpu["flags"] for flag in BF16_FLAGS),
        "load_average": [round(value, 2) for value in os.getloadavg()],
    }


def summarize(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """One case: everybody's milliseconds and our speed-up over each; null where either has no time."""
    times = {row["contender"]: row["time_ms"]["median"] for row in rows if row["time_ms"]}
    own = times.get("fastlora")
    variants = [name for name in times if name.startswith("peft")]
    best = min(variants, key=lambda name: times[name], default=None)
    over: dict[str, float | None] = dict.fromkeys(COLUMNS)
    if own:
        over |= {name: round(time / own, 3) for name, time in times.items() if name in COLUMNS}
        over["peft"] = round(times[best] / own, 3) if best else None
        if any(row["case"].endswith("-fp32") for row in rows):
            over["linear-fp32"] = over["linear"]
    return {
        "suite": rows[0]["suite"],
        "case": rows[0]["case"],
        "mode": rows[0]["mode"],
        "ms": {row["contender"]: times.get(row["contender"]) for row in rows},
        "best_peft": best,
        "speedup": over,
        "slower_than": [name for name, value in over.items() if value is not None and value < 1],
    }


def assemble(arena: Arena, seconds: float) -> dict[str, Any]:
    """The whole report as JSON types; only cases that were asked for are in it."""
    options = arena.options
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in arena.rows.values():
        groups.setdefault((row["suite"], row["case"]), []).append(row)
    return {
        "schema": SCHEMA,
        "mode": "tiny" if options.tiny else "cpu",
        "threads": options.threads,
        "budget_seconds": options.budget,
        "complete": arena.complete,
        "seconds": round(seconds, 1),
        "finished": environment.now(),
        "environment": describe(),
        "cases": [
            {"suite": suite.name} | case.describe()
            for suite in arena.suites.values()
            for case in suite.cases
            if (suite.name, case.name) in groups
        ],
        "rows": list(arena.rows.values()),
        "summary": [summarize(rows) for rows in groups.values()],
        "plot": None,
        "plot_reason": None,
    }


def folder(arena: Arena, save: bool) -> Path:
    """Where the files go: the committed results only for a whole run of the real cases."""
    return RESULTS if save and arena.complete and not arena.options.tiny else SCRATCH


def write(report: dict[str, Any], where: Path) -> list[Path]:
    """cpu.json, and cpu.png where matplotlib can be imported."""
    where.mkdir(parents=True, exist_ok=True)
    report["plot_reason"] = plots.draw_speedups(report, where / "cpu.png")
    report["plot"] = None if report["plot_reason"] else "cpu.png"
    path = where / "cpu.json"
    text = json.dumps(report, indent=1, allow_nan=False)
    for known, short in ((ROOT, "."), (Path.home(), "~")):  # reasons may quote paths
        text = text.replace(json.dumps(str(known))[1:-1], short) if len(known.parts) > 1 else text
    path.write_text(text + "\n")
    return [path, where / "cpu.png"] if report["plot"] else [path]


def table(report: dict[str, Any]) -> str:
    """The short form: our time and our speed-up over each of the others, reasons below."""
    if not report["rows"]:
        return ""
    about = report["environment"]
    tier = f"torch {about['torch_tier']}, fastlora {about['fastlora_tier'] or 'without its CPU library'}"
    bf16 = "native" if about["native_bf16"] else "emulated by torch"
    lines = [
        f"{about['cpu']}: {tier}, bf16 products {bf16}, {report['threads']} thread(s), load {about['load_average'][0]}",
        "speed-up of fastlora = other's median / ours, same interleaved rounds; below 1.00 fastlora is slower (*)",
    ]
    if report["mode"] == "tiny":
        lines.append("TINY CASES: they check the machinery and are not a measurement")
    for suite in dict.fromkeys(entry["suite"] for entry in report["summary"]):
        heads = "".join(f"{name:>14}" for name in COLUMNS)
        lines += ["", f"{suite:<44}{'fastlora ms':>12}{heads}"]
        lines += [_line(entry) for entry in report["summary"] if entry["suite"] == suite]
    return "\n".join([*lines, "", *_losses(report), *_reasons(report)])


def _line(entry: dict[str, Any]) -> str:
    own = entry["ms"].get("fastlora")
    cells = []
    for name in COLUMNS:
        value = entry["speedup"][name]
        cells.append(f"{'-':>13} " if value is None else f"{value:>13.2f}{'*' if value < 1 else ' '}")
    shown = f"{own:>12.3f}" if own is not None else f"{'-':>12}"
    return f"  {entry['case']:<42}{shown}{''.join(cells)}"


def _losses(report: dict[str, Any]) -> list[str]:
    pairs = [value for entry in report["summary"] for value in entry["speedup"].values() if value is not None]
    slower = sum(value < 1 for value in pairs)
    return [f"fastlora is slower in {slower} of {len(pairs)} comparisons"]


def _reasons(report: dict[str, Any]) -> list[str]:
    found: dict[str, list[str]] = {}
    for row in report["rows"]:
        if row["status"] != "ok":
            found.setdefault(f"{row['contender']} {row['status']}: {row['reason']}", []).append(row["case"])
    return [f"{why}  [{_some(cases)}]" for why, cases in found.items()]


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if names[3:] else "")


def verdict(row: dict[str, Any]) -> tuple[str, str]:
    """What a row's test should do: "pass", "skip" or "fail", and why. Only our own errors are failures."""
    if row["status"] == "ok":
        return "pass", ""
    outcome = "fail" if row["role"] == "ours" and row["status"] in ("failed", "parity failed") else "skip"
    return outcome, f"{row['status']}: {row['reason']}"
