"""The tables of docs/benchmarks.md, made from benchmarks/results/*.json: no figure on that page is typed by hand.

A section is one JSON file. A file that is not known here still gets its section: its plot and where it is.
"""

from __future__ import annotations

import collections
import html
import json
import pathlib
import re
from collections.abc import Callable, Iterable
from typing import Any

SIDES = ("fastlora", "moe-peft")
HEADLINE = re.compile(r"q(lora|dora)-step-m(8|64|512)-4096x4096-(fp32|bf16)")
RESULTS = pathlib.Path(__file__).resolve().parent.parent / "benchmarks" / "results"


def table(head: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    """A Markdown table of figures; None becomes a dash."""
    titles = list(head)
    lines = [titles, ["---", *["---:"] * (len(titles) - 1)], *rows]
    text = "\n".join("| " + " | ".join("–" if cell is None else str(cell) for cell in line) + " |" for line in lines)
    return f'<div class="figures" markdown>\n\n{text}\n\n</div>'


def figure(value: float | None, digits: int = 3) -> str | None:
    """A number to so many significant digits, never in powers of ten."""
    if value is None:
        return None
    short = float(f"{value:.{digits}g}")
    return f"{short:,.0f}" if abs(short) >= 10 ** (digits - 1) else f"{short:.{digits}g}"


def ratio(value: float | None) -> str | None:
    """A speed-up; bold where fastlora is the slower one."""
    if value is None:
        return None
    return f"**{value:.3f}**" if 0.995 <= value < 1 else f"**{value:.2f}**" if value < 1 else f"{value:.2f}"


def yes_no(value: bool | None) -> str | None:
    """A verdict."""
    return None if value is None else "yes" if value else "**no**"


def folded(title: str, body: str) -> str:
    """A block that opens at a click."""
    indented = "\n".join(f"    {line}".rstrip() for line in body.splitlines())
    return f'??? note "{html.escape(title)}"\n\n{indented}'


def machine(found: dict[str, Any], threads: Any = None) -> str:
    """One line: what was measured on, and when."""
    place = found.get("environment") or {}
    versions = ", ".join(f"{name} {it}" for name, it in (place.get("packages") or {}).items() if it and name != "numpy")
    count = threads if threads is not None else found.get("threads")
    parts = [
        f"{place.get('cpu', '')}, {place.get('cores', '?')} cores" if place.get("cpu") else "",
        f"{count} thread{'s' if count != 1 else ''}" if count else "",
        f"kernels {place['fastlora_tier']}" if place.get("fastlora_tier") else "",
        versions,
        found.get("finished", "")[:10],
        f"commit {place['commit'][:8]}{' with changes' if place.get('dirty') else ''}" if place.get("commit") else "",
    ]
    return "*" + "; ".join(part for part in parts if part) + "*"


# --- one function a file ----------------------------------------------------------------------------------------------


def cpu(found: dict[str, Any]) -> str:
    """Ops and layers beside their peers."""
    others = ("linear", "linear-fp32", "bitsandbytes", "peft", "torch")
    compared = [value for row in found["summary"] for name in others if (value := row["speedup"].get(name))]
    slower = sum(value < 1 for value in compared)
    failed = collections.Counter(row["contender"] for row in found["rows"] if row["status"] == "parity failed")
    text = [
        f"{len(compared)} comparisons; fastlora is the slower one in {slower} of them (bold). A column is the other's "
        "time over ours; a dash means that it was not asked, or has no time because it missed the error budget"
        + (f" ({', '.join(f'{name} {count} times' for name, count in failed.items())})." if failed else "."),
    ]
    head = ["case", "ours, ms", "`nn.Linear`, same dtype", "`nn.Linear`, fp32", "bitsandbytes", "PEFT", "plain torch"]
    first: list[list[Any]] = []
    suites: dict[str, list[list[Any]]] = {}
    for row in found["summary"]:
        line = [f"`{row['case']}`", figure(row["ms"].get("fastlora"))]
        line += [ratio(row["speedup"].get(name)) for name in others]
        suites.setdefault(row["suite"], []).append(line)
        if row["suite"] == "layers" and HEADLINE.fullmatch(row["case"]):
            first.append(line[:-1])
    if first:
        text.append("QLoRA and QDoRA training steps (m tokens, out × in):\n\n" + table(head[:-1], sorted(first)))
    titles = {"layers": "Layers", "ops": "Single operations"}
    text += [folded(f"{titles.get(name, name)}: {len(rows)} cases", table(head, rows)) for name, rows in suites.items()]
    return "\n\n".join(text)


def cpu_targets(found: dict[str, Any]) -> str:
    """Promised ratios and whether they are kept."""
    text = []
    for run in found["runs"]:
        lines = run["lines"]
        judged = [line for line in lines if line["met"] is not None]
        kept = sum(line["met"] for line in judged)
        beyond = sum(
            not line["met"] and line["least"] is not None and (line["bound"] or 0) < line["least"] for line in judged
        )
        count = run["threads"]
        title = f"{count} thread{'s' if count != 1 else ''}: {kept} of {len(judged)} targets met"
        if beyond:
            title += f"; {beyond} of the missed ones lie beyond what this machine allows"
        rows = []
        for line in lines:
            goal = f"≥ {line['least']}" if line["least"] is not None else f"≤ {line['most']}" if line["most"] else None
            verdict = yes_no(line["met"]) or line["reason"]
            who = f"{line['who']} against {line['other']}"
            rows.append(
                [line["label"], f"`{line['case']}`", who, figure(line["ratio"]), goal, verdict, figure(line["bound"])]
            )
        head = ["line", "case", "who", "ratio", "target", "met", "bound"]
        text.append(folded(title, table(head, rows)))
    return "\n\n".join(text)


def step_beside_peft(found: dict[str, Any]) -> str:
    """One training step of a whole model."""
    rows = []
    for line in found["results"]:
        seconds = line["seconds"]
        rows.append(
            [
                f"{line['compute']}, dropout {line['dropout']:g}",
                *(figure(seconds.get(name)) for name in ("fastlora", "peft", "frozen")),
                ratio(line["peft_over_fastlora"]),
                ratio(line["frozen_over_fastlora"]),
            ]
        )
    batch = found["batch"]
    lead = f"{found['model']}, {batch['sequences']} sentences a batch, about {batch['tokens_median']} tokens; seconds."
    head = ["setting", "fastlora", "PEFT over bitsandbytes", "frozen model", "PEFT / ours", "frozen / ours"]
    return f"{lead}\n\n{table(head, rows)}"


def many_adapters(found: dict[str, Any]) -> str:
    """A batch that mixes adapters."""
    batch, rows = found["batch"], []
    for line in found["results"]:
        ms = line["milliseconds"]
        note = "" if line["parity"] is None or line["parity"]["ok"] else "missed the error budget"
        rows.append(
            [
                f"{line['base']}, {line['size']}², {line['compute']}, {line['mode']}",
                *(figure(ms.get(name)) for name in ("fastlora", "fastlora, one adapter", "peft")),
                ratio(line["peft_over_fastlora"]),
                f"{line['one_over_fastlora']:.2f}",
                note or ("PEFT raises" if line["reason"] else ""),
            ]
        )
    lead = f"{batch['rows']} rows, {batch['adapters']} adapters of rank {batch['r']}, one a row; milliseconds."
    head = ["layer", "mixed batch", "same rows, one adapter", "PEFT, mixed", "PEFT / ours", "one / mixed", "PEFT"]
    return f"{lead}\n\n{table(head, rows)}"


def adoption(found: dict[str, Any]) -> str:
    """Losses of a PEFT model before and after `accelerate`."""
    rows = [
        [
            line["kind"],
            line["steps"],
            line["layers_fused"],
            f"{line['largest_difference']:.1e}",
            f"{line['largest_allowed']:.1e}",
            f"{line['share_of_allowance']:.2f}",
            yes_no(line["ok"]),
        ]
        for line in found["results"]
    ]
    lead = (
        f"{found['model']} trained by PEFT's own layers and by accelerated ones, same seed, same batches. The largest "
        f"allowed difference is {found['factor']:g} times what PEFT differs from itself; the share is the worst step's."
    )
    head = ["kind", "steps", "layers", "largest difference", "largest allowed", "worst share", "within"]
    text = f"{lead}\n\n{table(head, rows)}"
    for line in found["results"]:
        if far := line.get("from_fp32"):
            ours, peft = far["accelerated"], far["peft"]
            text += (
                f"\n\n{line['kind']}, from PEFT's fp32 losses: accelerated {ours['mean']:.3f} on average and "
                f"{ours['largest']:.3f} at most, PEFT {peft['mean']:.3f} and {peft['largest']:.3f}."
            )
    return text


def block(found: dict[str, Any]) -> str:
    """Whole training steps with grouped layers, and what the adapters keep for the backward."""
    rows = []
    for line in found["results"]:
        seconds, added = line["seconds"], line["memory"]["adapters"]
        rows.append(
            [
                f"{line['model']}, {line['shape']}, {line['setting']}",
                *(figure(seconds.get(name)) for name in ("fastlora", "peft", "frozen")),
                ratio(line["peft_over_fastlora"]),
                f"≥ {line['goal']:g}",
                figure(line["bound"]),
                f"{line['fastlora_over_frozen']:.2f}",
                *(f"{added[name] / 1e6:.0f}" if name in added else None for name in ("fastlora", "peft")),
            ]
        )
    head = ["model, batch × tokens, compute", "fastlora, s", "PEFT, s", "frozen, s", "PEFT / ours", "goal"]
    text = table([*head, "bound", "ours / frozen", "adapters keep, MB", "PEFT's, MB"], rows)
    if found["launches"]:
        lines = []
        for name, ways in found["launches"]["settings"].items():
            lines.append([name, *(ways[way]["kernels"] for way in ("forward", "backward"))])
        budget = found["launches"]["budget"]
        lines.append(["goal for QLoRA", f"≤ {budget['forward']}", f"≤ {budget['backward']}"])
        text += "\n\nKernels of one layer's seven projections and its activation on a GPU, counted, not timed:\n\n"
        text += table(["setting", "forward", "backward"], lines)
    return text


def adalora(found: dict[str, Any]) -> str:
    """A step of AdaLoRA beside LoRA's and PEFT's."""
    names = ("fastlora LoRA", "fastlora AdaLoRA", "PEFT AdaLoRA")
    rows = [
        [
            line["base"],
            *(figure(line["seconds"].get(name)) for name in names),
            f"{line['adalora_over_lora']:.2f}",
            ratio(line["peft_over_adalora"]),
        ]
        for line in found["results"]
    ]
    lead = f"{found['model']}; {found['tokens']} tokens, allocating at every step; seconds a step."
    return f"{lead}\n\n{table(['base', *names, 'AdaLoRA / LoRA', 'PEFT / ours'], rows)}"


def moe(found: dict[str, Any]) -> str:
    """Mixtures of experts beside moe-peft: operations and bytes, time, training on real text."""
    text = []
    if part := found.get("speed"):
        rows = [
            [
                row["method"],
                *(figure(None if row["seconds"][name] is None else 1e3 * row["seconds"][name]) for name in SIDES),
                ratio(row["peer_over_fastlora"]),
                row["reason"] or ("" if row["parity"]["ok"] else "missed the error budget"),
            ]
            for row in part["results"]
        ]
        head = ["method", "fastlora, ms", "moe-peft, ms", "moe-peft / ours", ""]
        text += ["One layer, forward and backward.", machine(part), table(head, rows)]
    if part := found.get("counts"):
        rows = []
        for row in part["results"]:
            missed = [name for name, met in (row["goals_met"] or {}).items() if met is False]
            over = row["issued_over_formula"]["cpu" if "cpu" in row["issued"] else "reference"]
            megabytes = (None if n is None else f"{n / 1e6:.1f}" for n in (row["saved_bytes"], row["peer_saved_bytes"]))
            rows.append(
                [row["method"], f"{over['forward']:.3f}", f"{over['backward']:.3f}", *megabytes, ", ".join(missed)]
            )
        head = ["method", "operations / formula, forward", "backward", "kept, MB", "moe-peft keeps, MB", "goal missed"]
        text += ["What a layer computes and keeps, bf16; counted, not timed.", table(head, rows)]
    if part := found.get("training"):
        results = part["results"]
        rows = [
            [
                row["method"],
                figure(row["held_out_before"]),
                figure(row["held_out_after"]),
                "the same" if row["reloaded"]["same_tokens"] else "others",
            ]
            for row in results["methods"]
        ]
        head = ["method", "held-out loss before", "after", "predictions after saving and loading"]
        text += [f"{results['model']}, {results['steps']} steps.", machine(part), table(head, rows)]
    return "\n\n".join(text)


def host_time(found: dict[str, Any]) -> str:
    """Microseconds that calling a layer costs."""
    size = found["layer"]
    rows = [
        [
            line["layer"],
            line["mode"],
            line["microseconds"],
            line["base"],
            line["over_base"],
            None if line["target"] is None else f"≤ {line['target']:g}",
            yes_no(line["met"]),
        ]
        for line in found["results"]
    ]
    lead = (
        f"One {size['in']} × {size['out']} layer, {size['tokens']} token, {size['dtype']}; microseconds a call, and "
        "what of them comes on top of the bare base: `nn.Linear`, or bitsandbytes' `Linear4bit`."
    )
    head = ["layer", "mode", "a call", "base", "over it", "target", "met"]
    return lead + "\n\n" + folded(f"{len(rows)} layers", table(head, rows))


def aot(found: dict[str, Any]) -> str:
    """GPU kernels, compiled without a GPU."""
    rows = []
    for version, run in found["triton"].items():
        targets: dict[str, list[dict[str, Any]]] = {}
        for kernel in run["kernels"]:
            targets.setdefault(kernel["target"], []).append(kernel)
        for target, kernels in sorted(targets.items()):
            spills = sum(bool(kernel["spills"]) for kernel in kernels)
            shared = max(kernel["shared"] for kernel in kernels)
            failed = sum(target in str(failure) for failure in run["failures"])
            rows.append([f"Triton {version}, {target}", len(kernels), failed, spills, f"{shared / 1024:.0f} KiB"])
    return table(["compiled for", "specialisations", "failed", "that spill", "most shared memory"], rows)


def mutants(found: dict[str, Any]) -> str:
    """One-line mistakes that the tests must notice."""
    left = [each for each in found["mutants"] if each["status"] != "killed"]
    text = f"{found['killed']} of {found['of']} are noticed."
    rows = [[f"`{each['file']}`:{each['line']}", f"`{each['after']}`", each["survives"]] for each in left]
    return text + ("\n\n" + table(["survivor", "the line became", "why it may"], rows) if rows else "")


Section = Callable[[dict[str, Any]], str]
# Heading, what it is and how to measure it, by the file's name; the order is the page's.
KNOWN: dict[str, tuple[str, str, Section]] = {
    "cpu": ("Layers and operations", "`make bench`", cpu),
    "cpu_targets": (
        "The CPU backend beside its targets",
        "`make bench-targets`. The bound is the most (for a share: the least) that anybody could reach on this machine",
        cpu_targets,
    ),
    "step_beside_peft": ("A training step of a whole model", "`make bench-step`", step_beside_peft),
    "block": ("A training step with grouped layers", "`python -m benchmarks.block`", block),
    "many_adapters": ("Many adapters in one batch", "`python -m benchmarks.many_adapters`", many_adapters),
    "adoption": ("Before and after accelerate", "`python -m benchmarks.adoption`", adoption),
    "grouped": ("Before and after, grouped", "`python -m benchmarks.adoption --group`", adoption),
    "adalora": ("AdaLoRA", "`python -m benchmarks.adalora`", adalora),
    "moe": ("Mixtures of LoRA experts", "`make bench-moe`", moe),
    "host_time": ("What calling a layer costs", "`python -m benchmarks.host_time`", host_time),
    "aot": ("GPU kernels, compiled without a GPU", "`make aot`. Compiled, not run: no times", aot),
    "mutants": ("Mistakes that the tests must notice", "`make mutants`", mutants),
}


def names(folder: pathlib.Path = RESULTS) -> list[str]:
    """The result files: the known ones first, in the page's order."""
    there = {path.stem for path in (*folder.glob("*.json"), *folder.glob("*.png"))}
    return [name for name in KNOWN if name in there] + sorted(there - set(KNOWN))


def section(name: str, folder: pathlib.Path = RESULTS, images: str = "images/results") -> str:
    """One section, as Markdown.

    Raises:
        FileNotFoundError: no such result.
    """
    path, plot = folder / f"{name}.json", folder / f"{name}.png"
    heading, how, body = KNOWN.get(name, (name.replace("_", " ").capitalize(), "", None))
    parts = [f"## {heading}"]
    if path.is_file():
        found = json.loads(path.read_text(encoding="utf-8"))
        if how:
            parts.append(f"{how}.")
        parts.append(machine(found))
        if body is not None:
            parts.append(body(found))
        else:
            parts.append(f"Every figure is in `benchmarks/results/{path.name}`.")
    elif not plot.is_file():
        raise FileNotFoundError(f"no result of that name: {path}")
    if plot.is_file():
        parts.append(f"[![{heading}]({images}/{plot.name})]({images}/{plot.name})")
    return "\n\n".join(part for part in parts if part.strip("*"))


def page(folder: pathlib.Path = RESULTS) -> str:
    """All sections."""
    return "\n\n".join(section(name, folder) for name in names(folder))
