"""PNG plots of a report; without matplotlib there are none and the report says so."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

_COLOURS = {
    "floor": "#9e9e9e",
    "bitsandbytes": "#bcaaa4",
    "peft": "#90caf9",
    "peft-16bit": "#1976d2",
    "unsloth": "#ffb74d",
    "fastlora": "#2e7d32",
    "fastlora-16bit": "#81c784",
}

# Whom the CPU plot shows, as cpu_report names them.
_AGAINST = {
    "linear-fp32": ("over nn.Linear fp32", "#9e9e9e"),
    "bitsandbytes": ("over bitsandbytes", "#bcaaa4"),
    "peft": ("over PEFT (its faster setting)", "#1976d2"),
}


def figure(width: float, height: float, dpi: int) -> Any:
    """An empty figure of so many inches, which no display is needed for.

    Raises:
        ImportError: matplotlib cannot be imported.
    """
    from matplotlib import figure as figures

    return figures.Figure(figsize=(width, height), dpi=dpi, layout="constrained")


def caution(report: dict[str, Any]) -> str:
    """What the title of a tiny run's picture begins with."""
    return "TINY, not a measurement: " if report["mode"] == "tiny" else ""


def machine(report: dict[str, Any]) -> str:
    """Where its times were taken."""
    return f"{report['environment']['cpu']}, {report['threads']} thread(s)"


def bars(
    axes: Any,
    at: tuple[int, int],
    values: Sequence[float | None],
    form: str = ".2f",
    size: int = 7,
    lying: bool = False,
    **looks: str,
) -> None:
    """One of several series of bars side by side, a group an index, their values at the end; "-" where there is none.

    Args:
        at: which of the series this is, and how many there are.
        form, size: of the values. lying: from left to right. looks: label and color.
    """
    (place, count), pitch = at, 0.81 / at[1]
    spots = [group + pitch * (place - (count - 1) / 2) for group in range(len(values))]
    drawn = (axes.barh if lying else axes.bar)(spots, [value or 0.0 for value in values], 0.92 * pitch, **looks)
    axes.bar_label(drawn, ["-" if value is None else format(value, form) for value in values], fontsize=size, padding=2)
    axes.spines[["top", "right"]].set_visible(False)


def draw(report: dict[str, Any], folder: Path) -> tuple[list[str], str | None]:
    """Write the plots.

    Returns:
        their file names, and the reason when there are none.
    """
    cases = {case["name"]: case for case in report["cases"]}
    training = [name for name, case in cases.items() if case["op"] == "linear" and case["train"]]
    decoding = [name for name, case in cases.items() if case["op"] == "linear" and not case["train"]]
    mode = "graph_forward_ms" if report["mode"] == "gpu" else "forward_ms"
    pictures = {
        "training.png": (training, _ratios(report, training, "step_ms"), "forward + backward over the frozen floor"),
        "decode.png": (decoding, _ratios(report, decoding, mode), "forward over a dense nn.Linear"),
        "memory.png": (training, _bytes(report, training), "bytes kept for the backward, MiB"),
    }
    written = []
    for name, (labels, series, title) in pictures.items():
        if not any(value is not None for values in series.values() for value in values):
            continue
        try:
            _bars(report, cases, labels, series, title).savefig(folder / name)
        except ImportError as error:
            return [], f"matplotlib cannot be imported: {error}"
        written.append(name)
    return written, None if written else "no number to plot"


def draw_speedups(report: dict[str, Any], path: Path) -> str | None:
    """The CPU benchmarks: our speed-up over nn.Linear in fp32, bitsandbytes and PEFT, one panel a dtype.

    Returns:
        why there is no picture, None when it was written.
    """
    panels = {dtype: _speedups(report, dtype) for dtype in ("fp32", "bf16")}
    panels = {dtype: entries for dtype, entries in panels.items() if entries}
    if not panels:
        return "no number to plot"
    tallest = max(len(entries) for entries in panels.values())
    try:
        whole = figure(7.5 * len(panels), 1.6 + 0.42 * tallest, 100)
    except ImportError as error:
        return f"matplotlib cannot be imported: {error}"
    grid = whole.subplots(1, len(panels), squeeze=False)
    for axes, (dtype, entries) in zip(grid[0], panels.items(), strict=True):
        _speedup_bars(axes, dtype, entries)
    about = report["environment"]
    bf16 = "native bf16" if about["native_bf16"] else "no native bf16"
    whole.suptitle(
        f"{caution(report)}speed-up of fastlora (right of 1: fastlora is faster)\n"
        f"{about['cpu']}, {about['torch_tier']}, {bf16}, {report['threads']} thread(s), torch "
        f"{about['packages']['torch']}",
        fontsize=11,
    )
    handles, labels = grid[0][0].get_legend_handles_labels()
    whole.legend(handles, labels, fontsize=9, loc="outside lower center", ncols=len(labels))
    whole.savefig(path)
    return None


def _speedups(report: dict[str, Any], dtype: str) -> list[tuple[str, dict[str, float]]]:
    """Label and known speed-ups of every case of a dtype that has any."""
    found = []
    for entry in report["summary"]:
        label = f"{entry['suite']}: {entry['case']}"
        known = {name: entry["speedup"][name] for name in _AGAINST if entry["speedup"][name] is not None}
        if label.endswith(f"-{dtype}") and known:
            found.append((label.removesuffix(f"-{dtype}"), known))
    return found


def _speedup_bars(axes: Any, dtype: str, entries: list[tuple[str, dict[str, float]]]) -> None:
    width = 0.8 / len(_AGAINST)
    for index, (name, (label, colour)) in enumerate(_AGAINST.items()):
        spots = [group - 0.4 + (index + 0.5) * width for group, (_, known) in enumerate(entries) if name in known]
        values = [known[name] for _, known in entries if name in known]
        # Bars start at 1: on a logarithmic axis a loss reaches left as far as the equal gain reaches right.
        axes.barh(spots, [value - 1 for value in values], width, left=1, label=label, color=colour)
        for spot, value in zip(spots, values, strict=True):
            side = "left" if value >= 1 else "right"
            axes.annotate(
                f"{value:.2f}" if value < 10 else f"{value:.0f}",
                (value, spot),
                xytext=(2 if value >= 1 else -2, 0),
                textcoords="offset points",
                ha=side,
                va="center",
                fontsize=6,
            )
    axes.set_xscale("log")
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(entries)), [label for label, _ in entries], fontsize=7)
    axes.set_ylim(len(entries) - 0.4, -0.6)
    axes.margins(x=0.12)
    axes.set_title(dtype, fontsize=10)
    axes.set_xlabel("other's median time / ours (log scale)")


def _names(report: dict[str, Any], labels: list[str]) -> list[str]:
    rows = [row for row in report["rows"] if row["case"] in labels and row["role"] != "plan"]
    return list(dict.fromkeys(row["contender"] for row in rows))


def _ratios(report: dict[str, Any], labels: list[str], mode: str) -> dict[str, list[float | None]]:
    found = {entry["case"]: entry["judged_on"].get(mode, {}).get("ratio_to_floor", {}) for entry in report["summary"]}
    return {name: [found[label].get(name) for label in labels] for name in _names(report, labels)}


def _bytes(report: dict[str, Any], labels: list[str]) -> dict[str, list[float | None]]:
    found = {(row["case"], row["contender"]): row["saved_bytes"] for row in report["rows"]}
    series: dict[str, list[float | None]] = {}
    for name in _names(report, labels):
        values = [found.get((label, name)) for label in labels]
        series[name] = [None if value is None else value / 2**20 for value in values]
    return series


def _bars(
    report: dict[str, Any],
    cases: dict[str, Any],
    labels: list[str],
    series: dict[str, list[float | None]],
    title: str,
) -> Any:
    """Grouped bars, one group a case; our targets as ticks where the plot shows ratios."""
    whole = figure(max(7.0, 1.5 * len(labels) + 2), 5.0, 110)
    axes = whole.add_subplot()
    width = 0.8 / max(1, len(series))
    for index, (name, values) in enumerate(series.items()):
        spots = [group - 0.4 + (index + 0.5) * width for group in range(len(labels))]
        axes.bar(spots, [value or 0.0 for value in values], width, label=name, color=_COLOURS.get(name))
    if "over" in title:
        axes.axhline(1.0, color="black", linewidth=0.8)
        axes.set_ylabel("time / floor time (lower is better)")
        for group, label in enumerate(labels):
            target = cases[label]["target"]
            if target:
                bound = target["bound"] if target["metric"] == "ratio_to_floor" else 1 / target["bound"]
                axes.hlines(bound, group - 0.45, group + 0.45, color="red", linestyle="dotted")
    gpu = (report["environment"]["gpu"] or {}).get("name", "CPU")
    dry = "DRY RUN, tiny shapes, not a measurement: " if report["mode"] == "dry" else ""
    axes.set_title(f"{dry}{title}\n{gpu}, torch {report['environment']['packages']['torch']}", fontsize=10)
    axes.set_xticks(range(len(labels)), labels, rotation=25, ha="right", fontsize=8)
    axes.legend(fontsize=8, ncols=2)
    return whole
