"""The README's picture, redrawn from the committed results: the idea on the left, what was measured on the right.

    python -m benchmarks.picture [--out FILE]

The bars are times of one training step over that of a frozen `nn.Linear` (or model) of the same dtype, from
`results/cpu.json` and, where it exists, `results/step_beside_peft.json`; no number stands in this file.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import plots
from benchmarks.cpu_report import RESULTS, ROOT

OUT = ROOT / "docs" / "images" / "fused_layer.png"
INK, FAINT, GREEN, GREEN_FILL, GREY = "#263238", "#90a4ae", "#2e7d32", "#e8f5e9", "#78909c"
GREY_FILL, PEFT_FILL = "#f3f5f7", "#b0bec5"
# The layer cases shown, in this order, with their names on the axis; a dtype follows each.
LAYERS = (
    ("qlora-step-m8-4096x4096", "QLoRA, 8 tokens"),
    ("qlora-step-m64-4096x4096", "QLoRA, 64 tokens"),
    ("qlora-step-m512-4096x4096", "QLoRA, 512 tokens"),
    ("qdora-step-m64-4096x4096", "QDoRA, 64 tokens"),
)


class Bar(NamedTuple):
    """One group of bars: times over the frozen layer's."""

    name: str
    ours: float
    peft: float


def layer_bars(report: dict[str, Any], dtype: str) -> list[Bar]:
    """The layers' steps of a dtype; a case without all three times is left out."""
    found = {entry["case"]: entry for entry in report["summary"] if entry["suite"] == "layers"}
    bars = []
    for case, name in LAYERS:
        over = found.get(f"{case}-{dtype}", {"speedup": {}})["speedup"]
        frozen, peft = over.get("linear"), over.get("peft")
        if frozen and peft:
            bars.append(Bar(f"{name}, {dtype}", 1 / frozen, peft / frozen))
    return bars


def model_bars(report: dict[str, Any]) -> list[Bar]:
    """Whole steps of SmolLM2-135M."""
    return [
        Bar(
            f"SmolLM2-135M, {entry['compute']}, {report['threads']} thread(s), p={entry['dropout']}",
            times["fastlora"] / times["frozen"],
            times["peft"] / times["frozen"],
        )
        for entry in report["results"]
        if entry["dropout"] > 0 and all((times := entry["seconds"]).values())
    ]


def _box(axes: Any, x: float, y: float, width: float, height: float, text: str, **look: Any) -> None:
    from matplotlib.patches import FancyBboxPatch

    size, weight = look.pop("size", 8.6), look.pop("weight", "normal")
    colour = look.pop("ink", INK)
    patch = FancyBboxPatch((x, y), width, height, boxstyle="round,pad=0,rounding_size=0.12", linewidth=1.2, **look)
    axes.add_patch(patch)
    axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=size, color=colour, weight=weight)


def _arrow(axes: Any, start: tuple[float, float], end: tuple[float, float], colour: str = INK) -> None:
    look = {"arrowstyle": "-|>", "color": colour, "linewidth": 1.1, "shrinkA": 0, "shrinkB": 0, "mutation_scale": 9}
    axes.annotate("", xy=end, xytext=start, arrowprops=look)


def _chain(axes: Any) -> None:
    """What runs without fusion: a kernel a box, a tensor through memory at each arrow."""
    look = {"facecolor": GREY_FILL, "edgecolor": GREY}
    axes.text(0, 9.6, "A chain of operations", fontsize=11, weight="bold", color=INK)
    axes.text(
        0, 9.1, "each reads and writes whole tensors; W is decoded to memory, every time", fontsize=8.4, color=GREY
    )
    axes.text(0.25, 7.2, "x", fontsize=13, style="italic", ha="center", va="center", color=INK)
    _box(axes, 1.2, 7.7, 2.0, 0.75, "decode W\nto 16 or 32 bits", size=7.8, **look)
    _box(axes, 4.1, 7.7, 1.7, 0.75, "· Wᵀ", **look)
    _box(axes, 1.2, 6.1, 1.7, 0.75, "dropout", **look)
    _box(axes, 3.5, 6.1, 1.0, 0.75, "· aᵀ", **look)
    _box(axes, 5.1, 6.1, 1.0, 0.75, "· bᵀ", **look)
    _box(axes, 6.7, 6.1, 1.0, 0.75, "· s", **look)
    _box(axes, 7.5, 7.7, 0.9, 0.75, "+", size=12, **look)
    axes.text(9.75, 8.07, "y", fontsize=13, style="italic", ha="center", va="center", color=INK)
    for start, end in (
        ((3.2, 8.07), (4.1, 8.07)),
        ((5.8, 8.07), (7.5, 8.07)),
        ((8.4, 8.07), (9.5, 8.07)),
        ((0.5, 7.1), (1.2, 6.6)),
        ((2.9, 6.47), (3.5, 6.47)),
        ((4.5, 6.47), (5.1, 6.47)),
        ((6.1, 6.47), (6.7, 6.47)),
        ((7.5, 6.85), (7.85, 7.7)),
    ):
        _arrow(axes, start, end, GREY)
    axes.plot([0.5, 0.85, 3.45, 3.75], [7.35, 7.42, 7.42, 7.75], color=GREY, linewidth=1.1)
    _arrow(axes, (3.75, 7.75), (4.1, 7.95), GREY)


def _fused(axes: Any) -> None:
    """The one operation, and what it keeps for the backward."""
    axes.text(0, 4.85, "fastlora: one operation forward, one backward", fontsize=11, weight="bold", color=GREEN)
    axes.text(0, 4.35, "W stays in 4 bits; a tile is decoded where it is multiplied", fontsize=8.4, color=GREY)
    axes.text(0.25, 2.3, "x", fontsize=13, style="italic", ha="center", va="center", color=INK)
    axes.text(9.75, 2.3, "y", fontsize=13, style="italic", ha="center", va="center", color=INK)
    _box(axes, 1.2, 0.75, 7.3, 3.2, "", facecolor=GREEN_FILL, edgecolor=GREEN)
    inner = {"facecolor": "white", "edgecolor": GREEN}
    _box(axes, 1.55, 2.6, 3.9, 0.95, "x · decode(W tile)ᵀ", **inner)
    _box(axes, 1.55, 1.15, 3.9, 0.95, "h = dropout(x) · aᵀ", **inner)
    _box(axes, 6.0, 1.15, 2.15, 2.4, "+  s · h · bᵀ\n+  bias\n(· m / ‖W'‖\nfor DoRA)", size=8.6, **inner)
    for start, end in (
        ((0.5, 2.3), (1.2, 2.3)),
        ((5.45, 3.07), (6.0, 3.07)),
        ((5.45, 1.62), (6.0, 1.62)),
        ((8.5, 2.3), (9.5, 2.3)),
    ):
        _arrow(axes, start, end, GREEN)
    kept = "kept for the backward: x, h (r values a token), the dropout bits"
    axes.text(1.2, 0.35, kept, fontsize=8.0, color=GREY, va="center")


def _bars(axes: Any, groups: Sequence[Sequence[Bar]], title: str, about: str) -> None:
    """Groups from top to bottom, a little room between them."""
    widest = max(bar.peft for group in groups for bar in group)
    places: dict[float, str] = {}
    place = 0.0
    for group in groups:
        for bar in group:
            places[place] = bar.name
            for offset, value, colour in ((-0.19, bar.peft, PEFT_FILL), (0.19, bar.ours, GREEN)):
                axes.barh(place + offset, value, 0.36, color=colour)
                # Right of the frozen layer's line where the bar ends before it.
                spot = max(value, 1.0)
                weight = "bold" if colour == GREEN else "normal"
                text = f"{value:.2f}"
                axes.text(spot + 0.01 * widest, place + offset, text, va="center", fontsize=8, color=INK, weight=weight)
            place += 1
        place += 0.35
    axes.axvline(1, color=INK, linewidth=1, linestyle=(0, (3, 2)))
    axes.set_yticks(list(places), list(places.values()), fontsize=8.6, color=INK)
    axes.set_ylim(place - 0.75, -0.95)
    axes.text(1 + 0.012 * widest, -0.7, "1 = frozen layer, same dtype", fontsize=7.8, color=INK, va="center")
    axes.set_xlim(0, 1.1 * widest)
    axes.set_title(title, loc="left", fontsize=11, weight="bold", color=INK, pad=20)
    axes.text(0, 1.02, about, transform=axes.transAxes, fontsize=8.4, color=GREY)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(FAINT)
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", colors=FAINT, labelsize=8)
    from matplotlib.patches import Patch

    handles = [Patch(color=PEFT_FILL), Patch(color=GREEN)]
    labels = ["PEFT over bitsandbytes", "fastlora"]
    axes.legend(
        handles, labels, frameon=False, fontsize=8.8, labelcolor=INK, loc="upper right", bbox_to_anchor=(1, 0.95)
    )


def draw(layers: dict[str, Any], model: dict[str, Any] | None, path: Path) -> None:
    """Write the picture."""
    figure = plots.figure(12.6, 5.0, 150)
    left, right = figure.subplots(1, 2, width_ratios=(1.06, 1))
    left.set(xlim=(-0.1, 10.1), ylim=(0, 9.9))
    left.axis("off")
    _chain(left)
    _fused(left)
    groups = [layer_bars(layers, "fp32"), layer_bars(layers, "bf16"), model_bars(model) if model else []]
    threads = "one thread" if layers["threads"] == 1 else f"{layers['threads']} threads"
    about = layers["environment"]
    where = (
        f"{about['cpu']}, {about['torch_tier']}, {threads}, torch {about['packages']['torch']}; 4096 × 4096, rank 16"
    )
    _bars(right, [group for group in groups if group], "Time of a training step (shorter is better)", where)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, facecolor="white")


def main(arguments: Sequence[str] | None = None) -> int:
    """Read the results, write the picture."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.picture", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=OUT)
    chosen = parser.parse_args(arguments)
    layers, model = RESULTS / "cpu.json", RESULTS / "step_beside_peft.json"
    if not layers.is_file():
        print(f"picture: {layers} is missing: run make bench ARGS=--save-results first", file=sys.stderr)
        return 1
    try:
        draw(json.loads(layers.read_text()), json.loads(model.read_text()) if model.is_file() else None, chosen.out)
    except ImportError as error:
        print(f"picture: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
