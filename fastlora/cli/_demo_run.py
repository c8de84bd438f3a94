"""One run of `fastlora demo`, real or synthetic: load, adapt, measure, train, measure again, keep."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

import fastlora
from fastlora.cli import _folder, _keep
from fastlora.cli._task import Task, largest_difference, train
from fastlora.nn.output import whole_folder

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

RANK, ALPHA = 16, 32
REPORT_EVERY = 10  # steps, where there is no terminal to draw a bar on


@dataclasses.dataclass
class Result:
    """What one run of the demo found; `--json` writes it.

    Attributes:
        model, text: what was trained, on what.
        exact_counts: what "exact" is the share of. note: what one should know to read it.
        seed, steps: as given.
        layers: how many linears were adapted.
        trainable, parameters: how many values are trained, of how many.
        before, after: {"loss": held-out loss per token, "exact": share that came out exactly right}.
        losses: training loss of each step.
        seconds: of each part ("load", "convert", "evaluate", "train", "step" = the median step, "keep", "total").
        backend: the backend the layers' forward ran on.
        reload_max_abs_diff: largest logit difference between the trained model and a fresh one with the saved adapter.
        merged_loss: held-out loss of the model merged to bf16 weights.
        saved_bytes, merged_bytes: size of the adapter's folder and of the merged model's.
        samples: a few held-out examples: {"raw", "before", "after", "truth"}.
    """

    model: str
    text: str
    exact_counts: str
    note: str
    seed: int
    steps: int
    layers: int = 0
    trainable: int = 0
    parameters: int = 0
    before: dict[str, float] = dataclasses.field(default_factory=dict)
    after: dict[str, float] = dataclasses.field(default_factory=dict)
    losses: list[float] = dataclasses.field(default_factory=list)
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    samples: list[dict[str, str]] = dataclasses.field(default_factory=list)
    backend: str = ""
    reload_max_abs_diff: float = 0.0
    merged_loss: float = 0.0
    saved_bytes: int = 0
    merged_bytes: int = 0

    def report(self) -> dict[str, Any]:
        """What `demo.json` holds: the headline figures first, then everything else."""
        head = {
            "loss_before": self.before["loss"],
            "loss_after": self.after["loss"],
            "exact_before": self.before["exact"],
            "exact_after": self.after["exact"],
            "seconds_per_step": self.seconds["step"],
            "seconds_total": self.seconds["total"],
        }
        return head | dataclasses.asdict(self)


def adapt(model: nn.Module, seed: int) -> int:
    """Swap the model's linears for NF4 layers with an adapter, in place; returns how many."""
    config = fastlora.LoraConfig(r=RANK, lora_alpha=ALPHA, init_seed=seed)
    fastlora.convert(model, config, quantize="nf4", double_quant=True, progress=False)
    return sum(isinstance(module, fastlora.QLoraLinear) for module in model.modules())


def _progress(console: Console) -> Progress:
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    text = TextColumn("{task.description}")
    return Progress(
        text, BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(), console=console
    )


def backend_of(model: nn.Module) -> str:
    """The backend the first adapted layer's forward runs on, for a batch of the demo's size."""
    layer = next(module for module in model.modules() if isinstance(module, fastlora.QLoraLinear))
    chosen = next(line for line in layer.explain(tokens=512).splitlines() if line.startswith("->"))
    return chosen.split()[1]


class Demo:
    """One run: loads, adapts, measures, trains, measures again; fills `result` as it goes."""

    def __init__(self, task: Task, steps: int, seed: int, console: Console) -> None:
        self.task, self.console = task, console
        self.result = Result(task.model_name, task.text, task.exact, task.note, seed, steps)
        self.started = time.perf_counter()

    def timed(self, name: str, since: float) -> float:
        """Add the seconds since `since` to the part `name`; returns them."""
        seconds = time.perf_counter() - since
        self.result.seconds[name] = self.result.seconds.get(name, 0.0) + seconds
        return seconds

    def prepare(self) -> None:
        """Load the model, swap its layers."""
        result, since = self.result, time.perf_counter()
        self.model = self.task.load()
        seconds = self.timed("load", since)
        self.console.print(f"loaded {result.model} and {result.text} in {seconds:.1f} s")

        since = time.perf_counter()
        result.layers = adapt(self.model, result.seed)
        result.trainable, result.parameters = fastlora.trainable_parameters(self.model)
        result.backend = backend_of(self.model)
        seconds = self.timed("convert", since)
        self.console.print(
            f"{result.layers} linears are now QLoraLinear (NF4, double quantization, rank {RANK}) in {seconds:.1f} s; "
            f"{result.trainable:,} values to train; backend {result.backend}"
        )

    def measure(self, when: str) -> tuple[dict[str, float], list[str]]:
        """The held-out score, and what the model writes for a few examples."""
        since = time.perf_counter()
        with _progress(self.console) as progress:
            bar = progress.add_task(f"held out, {when}", total=self.task.rounds)
            score = self.task.evaluate(self.model, lambda: progress.advance(bar))
        self.timed("evaluate", since)
        since = time.perf_counter()
        texts = self.task.write(self.model)
        self.timed("samples", since)
        return score._asdict(), texts

    def fit(self) -> None:
        """Train, with the loss on the bar."""
        result, task = self.result, self.task
        since, before, durations = time.perf_counter(), time.perf_counter(), []
        with _progress(self.console) as progress:
            bar = progress.add_task("training", total=result.steps)
            for loss in train(self.model, task.groups, task.rate, task.outputs):
                now = time.perf_counter()
                durations.append(now - before)
                before = now
                result.losses.append(loss)
                progress.update(bar, advance=1, description=f"training, loss {loss:.3f}")
                if not self.console.is_terminal and len(durations) % REPORT_EVERY == 0:
                    self.console.print(f"step {len(durations)} of {result.steps}, loss {loss:.3f}")
        self.timed("train", since)
        result.seconds["step"] = sorted(durations)[len(durations) // 2]

    def keep(self, folder: Path) -> None:
        """Save the adapter, load it into a fresh model and compare, merge to bf16, save, draw; all into `folder`."""
        since, result, task = time.perf_counter(), self.result, self.task
        adapter = fastlora.save_adapter(self.model, folder / _folder.ADAPTER)
        result.saved_bytes = _keep.folder_bytes(adapter)
        fresh = task.load()
        adapt(fresh, result.seed + 1)  # another start: every adapter value must come from the file
        fastlora.load_adapter(fresh, adapter)
        result.reload_max_abs_diff = largest_difference(task, self.model, fresh)
        del fresh

        merged = fastlora.merge_and_unload(self.model, dtype=torch.bfloat16)
        task.save(merged, folder / _folder.MERGED)
        result.merged_bytes = _keep.folder_bytes(folder / _folder.MERGED)
        # The bf16 weights, exactly, in fp32 arithmetic: what merging did, without what a CPU's bf16 products do.
        result.merged_loss = task.evaluate(merged.float(), lambda: None).loss
        before, after = result.before["loss"], result.after["loss"]
        _keep.draw_losses(folder / _folder.PLOT, result.losses, before, after, task.title, task.unit)
        self.timed("keep", since)
        self.timed("total", self.started)
        _keep.write_report(folder / _folder.REPORT, result.report())

    def run(self, folder: Path) -> Result:
        """All of it; what is kept ends up in `folder`, whole or not at all."""
        task, result = self.task, self.result
        self.prepare()
        result.before, before = self.measure("before")
        self.fit()
        result.after, after = self.measure("after")
        result.samples = [
            {"raw": raw, "before": first, "after": second, "truth": truth}
            for raw, first, second, truth in zip(task.raws, before, after, task.truths, strict=True)
        ]
        with self.console.status("saving, reloading, merging"), whole_folder(folder) as scratch:
            self.keep(scratch)
        return result


def show(console: Console, task: Task, result: Result, folder: Path) -> None:
    """Print what a run found."""
    from rich.markup import escape
    from rich.table import Table

    table = Table("", "before", f"after {result.steps} steps", title=task.held_out, title_justify="left")
    table.add_row(f"loss per {task.unit}", f"{result.before['loss']:.3f}", f"{result.after['loss']:.3f}")
    table.add_row(task.exact, f"{result.before['exact']:.1%}", f"{result.after['exact']:.1%}")
    console.print(table)
    if task.note:
        console.print(task.note)
    for sample in result.samples:
        console.print(f"[dim]raw   [/dim] {escape(sample['raw'])}")
        console.print(f"[dim]before[/dim] {escape(sample['before'][:100])}")
        colour = "green" if sample["after"] == sample["truth"] else "yellow"
        console.print(f"[dim]after [/dim] [{colour}]{escape(sample['after'][:100])}[/{colour}]")
        console.print(f"[dim]truth [/dim] {escape(sample['truth'])}\n")
    plot = ", plot" if (folder / _folder.PLOT).is_file() else " (no plot: matplotlib is not installed)"
    megabytes = f"{result.saved_bytes / 1e6:.0f} MB and {result.merged_bytes / 1e6:.0f} MB"
    console.print(
        f"kept in [bold]{escape(str(folder))}[/bold]: adapter (PEFT's format) and merged model, {megabytes}{plot}, "
        f"{_folder.REPORT}"
    )
    console.print(
        f"reloaded into a fresh model: logits differ by at most {result.reload_max_abs_diff:.1e}; "
        f"merged to bf16: loss {result.merged_loss:.3f}"
    )
    seconds = result.seconds
    console.print(
        f"{seconds['step']:.2f} s a step (batch {task.batch}, {torch.get_num_threads()} threads); "
        f"training {seconds['train']:.0f} s, all {seconds['total']:.0f} s"
    )
