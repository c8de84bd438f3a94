"""What the demo keeps: sizes, differences, the plot, the report."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastlora.errors import FastloraError

_INK, _TRAINING, _HELD_OUT = "#3c4043", "#2e7d32", "#c62828"
_SMOOTHING = 5  # steps in the running mean of the training loss


def folder_bytes(folder: Path) -> int:
    """Size of all files in it."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _running_mean(values: Sequence[float], width: int) -> list[float]:
    """The mean of each value and up to `width` - 1 before it."""
    windows = (values[max(0, end - width) : end] for end in range(1, len(values) + 1))
    return [sum(window) / len(window) for window in windows]


def draw_losses(path: Path, losses: Sequence[float], before: float, after: float, title: str, unit: str) -> bool:
    """The training loss of each step with the held-out loss before and after, as a PNG; False without matplotlib.

    Args:
        path: of the PNG.
        losses: one a step.
        before, after: held-out loss, drawn at step 0 and after the last step.
        title: of the picture. unit: what a loss is counted by.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(7.2, 4.2), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    steps = range(1, len(losses) + 1)
    axes.plot(steps, losses, color=_TRAINING, alpha=0.3, linewidth=1.2, label="training, each batch")
    mean = _running_mean(losses, _SMOOTHING)
    axes.plot(steps, mean, color=_TRAINING, linewidth=2.2, label=f"training, mean of {_SMOOTHING} steps")
    axes.plot([0, len(losses)], [before, after], "o", color=_HELD_OUT, markersize=7, zorder=3, label="held out")
    for step, value, side in ((0, before, "left"), (len(losses), after, "right")):
        axes.annotate(
            f"{value:.2f}",
            (step, value),
            xytext=(0, 9),
            textcoords="offset points",
            ha=side,
            color=_HELD_OUT,
            fontweight="bold",
        )
    axes.set_title(title, loc="left", color=_INK, fontsize=11, fontweight="bold", pad=12)
    axes.set_xlabel("optimizer step", color=_INK)
    axes.set_ylabel(f"loss per {unit}", color=_INK)
    axes.set_ylim(0, 1.12 * max(before, after, *losses))
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=_INK)
    axes.grid(axis="y", alpha=0.25)
    axes.legend(frameon=False, labelcolor=_INK)
    figure.savefig(path)
    return True


def write_report(path: Path, report: dict[str, Any]) -> None:
    """The result as JSON.

    Raises:
        FastloraError: a number in it is not finite.
    """
    try:
        text = json.dumps(report, indent=2, ensure_ascii=False, allow_nan=False)
    except ValueError as error:
        raise FastloraError(f"the demo's result holds a number that is not finite: {error}") from None
    path.write_text(text + "\n", encoding="utf-8")
