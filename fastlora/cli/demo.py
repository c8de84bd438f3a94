"""`fastlora demo`: the main job on real input, a real model fine-tuned on real sentences in minutes.

SmolLM2-135M's 210 linears become `QLoraLinear` (NF4, double quantization, rank 16) and learn to restore capitals and
punctuation; printed are the held-out loss and the share of sentences restored exactly, before and after. The adapter is
then saved in PEFT's format, reloaded into a fresh model, merged to bf16 and saved, with a plot and `demo.json` beside.
`--synthetic` does the same to a small random model on text that Python brings along, where nothing can be downloaded.
"""

from __future__ import annotations

import json as json_format
import sys
from pathlib import Path
from typing import Annotated

import typer

from fastlora.cli import _folder, _packages
from fastlora.errors import ConfigError

OUTPUT, SYNTHETIC_OUTPUT = Path("demo-output"), Path("demo-output-synthetic")
SEED_BITS = 62


def _check(steps: int | None, seed: int, json: str) -> None:
    """Raise ConfigError for what cannot be meant, before anything is loaded."""
    if steps is not None and steps < 1:
        raise ConfigError(f"steps must be at least 1, got {steps}")
    if seed < 0 or seed.bit_length() > SEED_BITS:
        raise ConfigError(f"seed must be in [0, 2**{SEED_BITS}), got {seed}")
    if json in ("", "-"):
        return
    if not Path(json).absolute().parent.is_dir():
        raise ConfigError(f"--json {json}: no such folder")
    if Path(json).is_dir():
        raise ConfigError(f"--json {json}: a folder, not a file")


def demo(
    steps: Annotated[
        int | None, typer.Option(help="Training steps, of one batch each (40; 100 with --synthetic).")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the split, the order and the adapters.")] = 0,
    json: Annotated[str, typer.Option("--json", metavar="FILE", help="Write the result there; - for stdout.")] = "",
    output: Annotated[
        Path | None,
        typer.Option("--output", "--out", metavar="FOLDER", help="For adapter, merged model and plot."),
    ] = None,
    synthetic: Annotated[
        bool, typer.Option("--synthetic", help="A small random model on Python's own help texts: no download.")
    ] = False,
) -> None:
    """Fine-tune SmolLM2-135M with QLoRA on real sentences, on this machine, and show what it learnt."""
    folder = output or (SYNTHETIC_OUTPUT if synthetic else OUTPUT)
    _check(steps, seed, json)
    _folder.check_folder(folder)
    if not synthetic:
        _packages.check()
    import torch
    from rich.console import Console

    from fastlora.cli import _demo_run, _restore, _synthetic

    console = Console(stderr=json == "-", highlight=False)
    torch.manual_seed(seed)
    kind = _synthetic.Synthetic if synthetic else _restore.Restoration
    steps = steps or kind.steps
    task = kind(steps, seed)
    result = _demo_run.Demo(task, steps, seed, console).run(folder)
    _demo_run.show(console, task, result, folder)
    text = json_format.dumps(result.report(), indent=2, ensure_ascii=False) + "\n"
    if json == "-":
        sys.stdout.write(text)
    elif json:
        Path(json).write_text(text, encoding="utf-8")
