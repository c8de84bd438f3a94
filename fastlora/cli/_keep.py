"""What the demo does after training: save the adapter, reload it into a fresh model, merge, save, draw.

Everything is written into a scratch folder beside the wanted one and moved there whole at the end, so that an
interrupted run leaves nothing half-written and an earlier result in place.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fastlora.errors import FastloraError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

REPORT = "demo.json"
ADAPTER, MERGED, PLOT = "adapter", "merged", "loss.png"


def check_folder(folder: Path) -> None:
    """Refuse a folder that holds something else than an earlier demo.

    Raises:
        FileExistsError: it does. FileNotFoundError: its parent does not exist.
    """
    if not folder.absolute().parent.is_dir():
        raise FileNotFoundError(f"{folder.absolute().parent} is no folder; --output needs an existing parent")
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder} is a file; --output needs a folder")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / REPORT).is_file():
        raise FileExistsError(f"{folder} holds files that are no demo's (no {REPORT}); choose another --output")


@contextlib.contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A scratch folder that takes the place of `folder` when the block ends well, and vanishes when it does not."""
    folder = folder.absolute()
    scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        yield scratch
        scratch.chmod(0o755)
        if folder.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{folder.name}-old-", dir=folder.parent))
            os.replace(folder, old / folder.name)
            os.replace(scratch, folder)
            shutil.rmtree(old)
        else:
            os.replace(scratch, folder)
    finally:
        if scratch.exists():
            shutil.rmtree(scratch, ignore_errors=True)


@torch.no_grad()
def largest_difference(one: PreTrainedModel, other: PreTrainedModel, ids: torch.Tensor) -> float:
    """Largest absolute difference of the two models' logits for ids [batch, length]."""
    first, second = (model.eval()(input_ids=ids, use_cache=False).logits for model in (one, other))
    return (first - second).abs().max().item()


def save_merged(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """The model in bf16 with its tokenizer, as `from_pretrained` reads them."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def folder_bytes(folder: Path) -> int:
    """Size of all files in it."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def draw_losses(path: Path, losses: Sequence[float], before: float, after: float) -> bool:
    """The training loss of each step with the held-out loss before and after, as a PNG; False without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(7, 4), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.plot(range(1, len(losses) + 1), losses, color="#1f77b4", label="training, each batch")
    axes.scatter([0, len(losses)], [before, after], color="#d62728", zorder=3, label="held out")
    for step, value in ((0, before), (len(losses), after)):
        axes.annotate(f"{value:.2f}", (step, value), xytext=(6, 6), textcoords="offset points", color="#d62728")
    axes.set(xlabel="step", ylabel="loss per target token", title="Restoring capitals and punctuation, QLoRA on NF4")
    axes.margins(x=0.08, y=0.12)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
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
