"""What AdaLoRA costs: a training step of it beside one of our LoRA and one of PEFT's AdaLoRA.

    python -m benchmarks.adalora [--json FILE] [--png FILE] [--threads N] [--steps N] [--base dense nf4]

A Llama of four layers at SmolLM2-135M's widths with random weights. A step is forward, backward, AdamW, and for AdaLoRA
also the penalty and the rank allocator in the phase that scores and masks at every step. Everybody holds the same base
and both AdaLoRAs the same adapter: ours is saved, PEFT loads the folder. Parity comes first: unless both compute the
same loss and penalty on the same batch, nobody gets a time. Steps take turns on the same batch; reported are medians
and the median of the rounds' ratios.
"""

from __future__ import annotations

import copy
import dataclasses
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fastlora
from benchmarks import plots, script, timing
from benchmarks.step_beside_peft import Batch, Missing, _four_bit, gradients_apart, randomize, with_adapter
from fastlora.adalora import AdaLoraConfig, RankAllocator, orthogonal_penalty

SCHEMA = 1
RANK, ALPHA, RATE, VOCABULARY = 12, 16, 1e-3, 1024
TARGET, MOST_STEPS = 8, 1000
LOSS_BUDGET = 1e-3  # between two implementations of one model on one batch
LIMIT = 1.10  # AdaLoRA over LoRA, the project's target
ADALORA, LORA, PEFT = "fastlora AdaLoRA", "fastlora LoRA", "PEFT AdaLoRA"


@dataclasses.dataclass(frozen=True)
class Options:
    """What to measure.

    Attributes:
        threads: of torch. steps: rounds of each base, warm-up apart. tokens: of the one sequence in a batch.
        budget: seconds for each base's rounds; at least three are taken, whatever it says.
        bases: "dense" (fp32) and "nf4". tiny: two small layers: checks the machinery, never speed.
    """

    threads: int = 1
    steps: int = 15
    tokens: int = 512
    budget: float = 50.0
    bases: tuple[str, ...] = ("dense", "nf4")
    tiny: bool = False


def llama(tiny: bool) -> nn.Module:
    """The plain model, random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    if tiny:
        sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    else:
        sizes = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 4}
        heads = {"num_attention_heads": 9, "num_key_value_heads": 3}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, **sizes, **heads, use_cache=False)).eval()


def _adalora_config() -> AdaLoraConfig:
    return AdaLoraConfig(init_r=RANK, target_r=TARGET, lora_alpha=ALPHA, total_step=MOST_STEPS, init_seed=0)


def build(model: nn.Module, base: str, config: Any) -> nn.Module:
    """The model with our layers; E, or B, is random, so that the adapter counts from the first step."""
    quantize = None if base == "dense" else base
    fastlora.convert(model, config, quantize=quantize, progress=False)
    randomize(model, "lora_E" if isinstance(config, AdaLoraConfig) else "lora_B", 0.1)
    return model


def build_peft(model: nn.Module, ours: nn.Module, base: str) -> Any:
    """PEFT's AdaLoRA over the same base, with the same adapter."""
    return with_adapter(model if base == "dense" else _four_bit(model, ours, torch.float32), ours)


def _ours_loss(model: nn.Module, batch: Batch) -> Tensor:
    loss: Tensor = model(input_ids=batch.ids, labels=batch.labels).loss
    return loss


def _adalora_loss(model: nn.Module, batch: Batch) -> Tensor:
    return _ours_loss(model, batch) + orthogonal_penalty(model)


def trainer(
    model: nn.Module, loss_of: Callable[[Any, Batch], Tensor], allocate: Callable[[int], Any] | None
) -> Callable[[Batch], float]:
    """A full step over the parameters that ask for gradients; gives the loss."""
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=RATE, weight_decay=0.0)
    taken = 0

    def step(batch: Batch) -> float:
        nonlocal taken
        taken += 1
        loss = loss_of(model, batch)
        loss.backward()
        optimizer.step()
        if allocate is not None:
            allocate(taken)
        optimizer.zero_grad()
        return loss.item()

    return step


def parity(ours: Any, peft: Any, batch: Batch) -> dict[str, float]:
    """Loss with penalty of both AdaLoRAs on one batch, and how far their gradients are apart, norm-wise.

    Raises:
        RuntimeError: the losses differ by more than the budget, or the gradients are not of the same parameters.
    """
    found: list[tuple[float, dict[str, Tensor]]] = []
    for model, loss_of in ((ours, _adalora_loss), (peft, _ours_loss)):
        model.train()
        value = loss_of(model, batch)
        value.backward()
        grads: dict[str, Tensor] = {
            name.removeprefix("base_model.model."): parameter.grad
            for name, parameter in model.named_parameters()
            if parameter.grad is not None
        }
        found.append((value.item(), grads))
        model.zero_grad()
    (loss, own), (other_loss, other) = found
    apart = gradients_apart((loss, other_loss), own, other, LOSS_BUDGET)
    return {"loss": loss, "loss_peft": other_loss, "gradient_difference": apart}


def measure_base(base: str, options: Options) -> dict[str, Any]:
    """Everybody over one base, in one interleaved run."""
    plain = llama(options.tiny)
    ids = torch.randint(0, VOCABULARY, (1, options.tokens), generator=torch.Generator().manual_seed(1))
    batch = Batch(ids, torch.ones_like(ids), ids.clone())
    config = _adalora_config()
    adalora = build(copy.deepcopy(plain), base, config)
    lora = build(copy.deepcopy(plain), base, fastlora.LoraConfig(r=RANK, lora_alpha=ALPHA, init_seed=0))
    steps = {
        LORA: trainer(lora, _ours_loss, None),
        ADALORA: trainer(adalora, _adalora_loss, RankAllocator(adalora, config).step),
    }
    found, reason = None, ""
    try:
        peft = build_peft(copy.deepcopy(plain), adalora, base)
        found = parity(adalora, peft, batch)
        steps[PEFT] = trainer(peft, _ours_loss, peft.base_model.update_and_allocate)
    except Missing as error:
        reason = str(error)
    samples = timing.in_turns(steps, [(batch,)], options.steps, seconds=options.budget)
    return {
        "base": base,
        "rounds": len(samples[ADALORA]),
        "seconds": {name: statistics.median(values) for name, values in samples.items()},
        "adalora_over_lora": timing.ratio(samples[ADALORA], samples[LORA]),
        "peft_over_adalora": timing.ratio(samples.get(PEFT, ()), samples[ADALORA]),
        "parity": found,
        "reason": reason,
        "samples": samples,
    }


def measure(options: Options) -> dict[str, Any]:
    """Everything, as JSON types.

    Raises:
        RuntimeError: our loss is not PEFT's.
    """
    torch.set_num_threads(options.threads)
    started = time.perf_counter()
    results = [measure_base(base, options) for base in options.bases]
    sizes: Any = llama(options.tiny).config
    widths = f"{sizes.hidden_size}/{sizes.intermediate_size}"
    return {
        "schema": SCHEMA,
        "mode": "tiny" if options.tiny else "cpu",
        "model": f"Llama, {sizes.num_hidden_layers} layers of width {widths}, random",
        "adapter": {"init_r": RANK, "target_r": TARGET, "lora_alpha": ALPHA},
        "tokens": options.tokens,
        "threads": options.threads,
        "limit_adalora_over_lora": LIMIT,
        **script.facts(started),
        "results": results,
    }


def table(report: dict[str, Any]) -> str:
    """The short form, for the terminal."""
    lines = [
        f"{report['model']}; {report['tokens']} tokens, {report['threads']} thread(s), rank {RANK}",
        f"{'base':<8}{'LoRA s':>9}{'AdaLoRA s':>11}{'PEFT s':>9}{'AdaLoRA/LoRA':>14}{'PEFT/AdaLoRA':>14}"
        f"{'loss':>9}{'PEFT loss':>11}",
    ]
    for entry in report["results"]:
        cells = [entry["seconds"].get(name) for name in (LORA, ADALORA, PEFT)]
        cells += [entry["adalora_over_lora"], entry["peft_over_adalora"]]
        text = "".join(
            f"{'-' if value is None else format(value, '.3f'):>{width}}"
            for value, width in zip(cells, (9, 11, 9, 14, 14), strict=True)
        )
        found = entry["parity"]
        losses = "" if found is None else f"{found['loss']:>9.4f}{found['loss_peft']:>11.4f}"
        lines.append(f"{entry['base']:<8}{text}{losses}{'  ' + entry['reason'] if entry['reason'] else ''}")
    return "\n".join(lines)


def draw(report: dict[str, Any], path: Path) -> None:
    """Seconds a step as bars, one group a base."""
    figure = plots.figure(6.4, 3.6, 130)
    axes = figure.add_subplot()
    for place, (name, colour) in enumerate(((PEFT, "#9db4c8"), (ADALORA, "#2e7d32"), (LORA, "#a5d6a7"))):
        values = [entry["seconds"].get(name) for entry in report["results"]]
        plots.bars(axes, (place, 3), values, ".3f", size=8, color=colour, label=name)
    axes.set_xticks(range(len(report["results"])), [entry["base"] for entry in report["results"]])
    axes.set_ylabel("seconds a training step")
    axes.set_title(
        f"{plots.caution(report)}{report['model']}\n{plots.machine(report)}, {report['tokens']} tokens",
        fontsize=9,
        loc="left",
    )
    axes.margins(y=0.2)
    axes.legend(frameon=False, fontsize=8, ncols=3, loc="upper left")
    figure.savefig(path)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, write."""
    parser = script.parser("adalora", __doc__, tiny="a small model")
    parser.add_argument("--threads", type=script.at_least(1), default=Options.threads)
    parser.add_argument("--steps", type=script.at_least(1), default=Options.steps, help="rounds of each base")
    parser.add_argument("--tokens", type=script.at_least(1), default=Options.tokens)
    parser.add_argument("--budget", type=float, default=Options.budget, help="seconds for each base's rounds")
    parser.add_argument("--base", choices=Options.bases, nargs="+", default=Options.bases)
    chosen = parser.parse_args(arguments)
    bases = tuple(dict.fromkeys(chosen.base))
    options = Options(chosen.threads, chosen.steps, chosen.tokens, chosen.budget, bases, chosen.tiny)
    return script.run(parser, chosen, lambda: measure(options), table, draw)


if __name__ == "__main__":
    sys.exit(main())
