"""What `fastlora bench` measures: the machine's roof, and where our layers and the frozen one stand under it."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastlora.dispatch import cost, tuning
from fastlora.problem import DENSE, DORA, NEED_DA, NEED_DB, NEED_DMAG, NEED_DX, TRAIN, Format, Problem
from fastlora.testing import Case, judge, make_inputs, run

TOKENS = (1, 8, 64, 512)
RANK = 16
FROZEN, LORA, QLORA, QDORA = "frozen linear", "LoRA", "QLoRA (NF4)", "QDoRA (NF4)"
KINDS = (FROZEN, LORA, QLORA, QDORA)
_COPY = 256 << 20  # bytes: far more than any cache
_MATRIX = 2048
_RUNS = 7  # `tuning.seconds_of` calls its function about so often, if a call takes long


@dataclasses.dataclass
class Roof:
    """What the machine can do: the best that was seen in this run, by a plain operation or by any layer.

    Attributes:
        bytes_per_second: read plus written; a copy, a sum. flops_per_second: of products; a large square one.
    """

    bytes_per_second: float
    flops_per_second: float


@dataclasses.dataclass
class Point:
    """One layer at one number of tokens, forward and backward.

    Attributes:
        flops, bytes: what the problem needs at least (`dispatch.cost.work`).
        seconds: of forward and backward; None where it was not timed: `why` says so.
    """

    kind: str
    tokens: int
    flops: float
    bytes: float
    seconds: float | None
    why: str = ""


def roof(device: str, dtype: torch.dtype) -> Roof:
    """The rates of plain operations."""
    source = torch.ones(_COPY // 4, device=device)
    target = torch.empty_like(source)
    copy = 2 * source.nbytes / tuning.seconds_of(lambda: target.copy_(source), device)
    read = source.nbytes / tuning.seconds_of(source.sum, device)
    x, w = (torch.randn(_MATRIX, _MATRIX, device=device).to(dtype) for _ in range(2))
    product = tuning.seconds_of(lambda: x @ w.T, device)
    return Roof(max(copy, read), 2 * _MATRIX**3 / product)


def raised(top: Roof, found: list[Point]) -> Roof:
    """The roof, raised to what layers reached: no library's product is the limit of a machine."""
    timed = [(point, point.seconds) for point in found if point.seconds]
    moved = [point.bytes / seconds for point, seconds in timed]
    flops = [point.flops / seconds for point, seconds in timed]
    return Roof(max(top.bytes_per_second, *moved), max(top.flops_per_second, *flops)) if timed else top


def _work(kind: str, m: int, size: int, dtype: torch.dtype, device: str) -> tuple[float, float]:
    """Fewest flops and bytes of forward and backward."""
    fmt = Format("nf4", 64, nested=True) if kind in (QLORA, QDORA) else DENSE
    r, dora = 0 if kind == FROZEN else RANK, DORA if kind == QDORA else 0
    needs = NEED_DX | (0 if kind == FROZEN else NEED_DA | NEED_DB) | (NEED_DMAG if dora else 0)
    common = (m, size, size, r, dtype, torch.float32, fmt)
    todo = [cost.work(Problem("lora_fwd", *common, dora | (TRAIN if r else 0), device))]
    todo.append(cost.work(Problem("lora_bwd", *common, dora | needs, device)))
    if dora:
        todo.append(cost.work(Problem("dora_norm", *common, dora, device)))
    return sum(each.flops for each in todo), sum(each.bytes for each in todo)


def _case(kind: str, m: int, size: int, dtype: torch.dtype) -> Case:
    quant = "nf4" if kind in (QLORA, QDORA) else ""
    return Case(m, size, size, RANK, dtype=dtype, quant=quant, nested=bool(quant), dora=kind == QDORA)


def _layer(kind: str, size: int, dtype: torch.dtype, device: str) -> nn.Module:
    from fastlora.cli.tune import layer_of

    if kind == FROZEN:
        return nn.Linear(size, size, bias=False, device=device, dtype=dtype).requires_grad_(False)
    return layer_of(size, size, RANK, dtype, "nf4" if kind != LORA else "", device, use_dora=kind == QDORA)


def _step(layer: nn.Module, x: Tensor, dy: Tensor) -> Callable[[], object]:
    leaves = [x, *(parameter for parameter in layer.parameters() if parameter.requires_grad)]
    return lambda: torch.autograd.grad(layer(x), leaves, dy)


def points(size: int, dtype: torch.dtype, device: str, until: float) -> Iterator[Point]:
    """Every kind at every number of tokens, small ones first; what would not end before `until` is left out.

    Args:
        size: of the square layers.
        until: `time.perf_counter()`.
    """
    layers = {kind: _layer(kind, size, dtype, device) for kind in KINDS}
    last: dict[str, float] = {}
    for m in TOKENS:
        for kind, layer in layers.items():
            flops, moved = _work(kind, m, size, dtype, device)
            grown = m / max(1, m // 8)
            if time.perf_counter() + _RUNS * grown * last.get(kind, 0.0) > until:
                yield Point(kind, m, flops, moved, None, "no time left")
                continue
            if kind != FROZEN:
                # On a smaller layer, which the same plans run: the float64 truth of a large one takes long.
                case = _case(kind, m, max(64, size // 16), dtype)
                inputs = make_inputs(case, device)
                if wrong := judge(case, inputs, run(case, inputs)):
                    yield Point(kind, m, flops, moved, None, f"not within the error budget: {wrong[0]}")
                    continue
            x = torch.randn(m, size, device=device).to(dtype).requires_grad_()
            seconds = tuning.seconds_of(_step(layer, x, torch.randn(m, size, device=device).to(dtype)), device)
            last[kind] = seconds
            yield Point(kind, m, flops, moved, seconds)


# --- the picture ------------------------------------------------------------------------------------------------------

_INK = "#3c4043"
_LOOKS = {FROZEN: ("#5f6368", "s"), LORA: ("#1565c0", "o"), QLORA: ("#2e7d32", "D"), QDORA: ("#c62828", "^")}


def draw(path: Path, found: list[Point], top: Roof, title: str) -> bool:
    """Flop/s over flops a byte, both logarithmic, under the two roofs; False without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
    except ImportError:
        return False
    figure = Figure(figsize=(8.0, 5.0), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    timed = [point for point in found if point.seconds]
    intensities = [point.flops / point.bytes for point in timed] + [top.flops_per_second / top.bytes_per_second]
    low, high = min(intensities) / 2, max(intensities) * 2
    ridge = top.flops_per_second / top.bytes_per_second
    edges = [low, ridge, high]
    limit = [min(top.flops_per_second, x * top.bytes_per_second) / 1e9 for x in edges]
    axes.plot(edges, limit, color=_INK, linewidth=1.6, zorder=1)
    axes.fill_between(edges, limit, color=_INK, alpha=0.05, zorder=0)
    for kind, (colour, marker) in _LOOKS.items():
        own = [point for point in timed if point.kind == kind]
        xs = [point.flops / point.bytes for point in own]
        ys = [point.flops / (point.seconds or 1.0) / 1e9 for point in own]
        axes.plot(xs, ys, marker=marker, color=colour, label=kind, linewidth=0.8, markersize=6, alpha=0.9)
        for point, x, y in zip(own, xs, ys, strict=True):
            if kind in (FROZEN, QLORA):
                axes.annotate(str(point.tokens), (x, y), xytext=(0, -13), textcoords="offset points", ha="center",
                              fontsize=7, color=colour)  # fmt: skip
    axes.set_xscale("log")
    axes.set_yscale("log")
    for axis, steps in ((axes.xaxis, (1.0,)), (axes.yaxis, (1.0, 2.0, 5.0))):
        axis.set_major_locator(LogLocator(subs=steps))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_formatter(NullFormatter())
    axes.set_xlim(low, high)
    axes.set_xlabel("flops a byte that must be moved", color=_INK)
    axes.set_ylabel("Gflop/s, forward and backward", color=_INK)
    axes.set_title(title, loc="left", color=_INK, fontsize=11, fontweight="bold", pad=12)
    axes.text(0.99, 0.03, f"roof: {top.flops_per_second / 1e9:.0f} Gflop/s, {top.bytes_per_second / 1e9:.0f} GB/s; "
              "numbers: tokens", transform=axes.transAxes, ha="right", fontsize=8, color=_INK)  # fmt: skip
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=_INK)
    axes.grid(which="major", alpha=0.25)
    axes.legend(frameon=False, labelcolor=_INK, loc="upper left")
    figure.savefig(path)
    return True


def facts(found: list[Point], top: Roof) -> dict[str, Any]:
    """For `--json`: every point beside the time its roof allows."""
    rows = []
    for point in found:
        least = max(point.flops / top.flops_per_second, point.bytes / top.bytes_per_second)
        rows.append(dataclasses.asdict(point) | {"roof_seconds": least})
    return {"roof": dataclasses.asdict(top), "points": rows}
