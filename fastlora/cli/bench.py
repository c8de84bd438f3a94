"""`fastlora bench`: in less than a minute, what this machine can do and how near our layers come to it."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from fastlora.cli import _work
from fastlora.cli.explain import DEVICES, DTYPES, dtype_of, one_of
from fastlora.errors import ConfigError

PICTURE = Path("fastlora-bench.png")
SECONDS = 45.0


def bench(
    size: Annotated[int, typer.Option(help="Of the square layers.")] = 4096,
    dtype: Annotated[str, typer.Option(help="bf16, fp16 or fp32; bf16 on a GPU and fp32 on a CPU without.")] = "",
    device: Annotated[str, typer.Option(help="cpu or cuda; what this machine has without.")] = "",
    output: Annotated[Path, typer.Option("--output", "--out", metavar="PNG", help="The picture.")] = PICTURE,
    json: Annotated[bool, typer.Option("--json", help="Machine-readable output.")] = False,
) -> None:
    """Time our layers and the frozen linear under this machine's roofline, in less than a minute; draws a picture."""
    if size < 64 or size % 64:
        raise ConfigError(f"size must be a multiple of 64, got {size}")
    if dtype:
        one_of("dtype", dtype, [name for name in DTYPES if name != "fp64"])
    if device:
        one_of("device", device, DEVICES)
    if output.is_dir() or not output.absolute().parent.is_dir():
        raise ConfigError(f"--output {output}: expected a file in a folder that exists")
    if not os.access(output.absolute().parent, os.W_OK):
        raise PermissionError(f"cannot write to {output.absolute().parent}")
    began = time.perf_counter()
    import torch

    from fastlora.cli import _roofline

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("no GPU here; --device cpu measures the CPU")
    kind = dtype_of(dtype or ("bf16" if device == "cuda" else "fp32"))
    with _work.console().status("measuring the roof") as status:
        top = _roofline.roof(device, kind)
        found = []
        for point in _roofline.points(size, kind, device, began + SECONDS):
            found.append(point)
            status.update(f"{point.kind}, {point.tokens} tokens")
    top = _roofline.raised(top, found)
    where = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {_threads(torch.get_num_threads())}"
    short = str(kind).removeprefix("torch.")
    drawn = _roofline.draw(output, found, top, f"{size} x {size} layers in {short} ({where})")
    facts: dict[str, Any] = {"device": where, "dtype": short, "size": size} | _roofline.facts(found, top)
    facts |= {"picture": str(output) if drawn else None, "seconds": round(time.perf_counter() - began, 1)}
    if json:
        _work.print_json(facts)
    else:
        _show(facts)


def _threads(count: int) -> str:
    return f"{count} thread{'' if count == 1 else 's'}"


def _show(facts: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    roof = facts["roof"]
    rates = f"{roof['flops_per_second'] / 1e9:.0f} Gflop/s, {roof['bytes_per_second'] / 1e9:.1f} GB/s"
    console.print(f"{facts['size']} x {facts['size']}, rank 16, {facts['dtype']}, {facts['device']}; roof {rates}")
    table = Table("layer", "tokens", "forward + backward", "Gflop/s", "of the roof")
    for point in facts["points"]:
        if point["seconds"] is None:
            table.add_row(point["kind"], str(point["tokens"]), point["why"], "", "")
            continue
        spent = point["seconds"]
        cells = f"{1e3 * spent:.2f} ms", f"{point['flops'] / spent / 1e9:.1f}", f"{point['roof_seconds'] / spent:.0%}"
        table.add_row(point["kind"], str(point["tokens"]), *cells)
    console.print(table)
    picture = facts["picture"] or "no picture: matplotlib is not installed"
    console.print(f"{picture}; {facts['seconds']:.0f} s", soft_wrap=True)
