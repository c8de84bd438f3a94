"""Whole training steps with grouped layers beside PEFT + bitsandbytes and the frozen dense model; memory; launches.

    python -m benchmarks.block [--json FILE] [--png FILE] [--threads N] [--models ...] [--shapes ...] [--settings ...]

SmolLM2-135M with its weights, and two layers of TinyLlama-1.1B's shape with random ones; 8 x 64 and 1 x 512 tokens, a
loss on every token; NF4 with nested scales, rank 16 on every linear but the head. Contenders take turns on the same
batch, the order rotating by one; reported are medians and the median of the rounds' ratios. Before any time comes
parity: the loss of one batch without dropout, and in fp32 the adapters' gradients. A step is forward, backward,
clipping and AdamW; the frozen model (dense, unquantized, nothing trains) goes forward and backward to its embeddings.
The forward that measures memory is everybody's warm-up; `--warm` adds rounds.

Beside every goal stands its bound: PEFT's time over the least time of a step here, which is the frozen model's products
(every linear, forward and gradient of its input) at the best rate that anybody shows, and all that the frozen model
does besides as long as torch takes for it. A free adapter over free weights would reach it, and nothing else can.

In bf16 one loss says little; both are judged by the fp32 loss (`step_beside_peft.near_fp32`).

Adapter-related memory is what a forward keeps beyond what the frozen model's keeps (each storage once, without
parameters). It is below zero where a gated MLP keeps neither activation nor product.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fastlora
from benchmarks import cpu_targets, plots, script, timing
from benchmarks import step_beside_peft as steps
from benchmarks.environment import ROOT
from benchmarks.step_beside_peft import ALPHA, FLOOR, OURS, PEFT, RANK, Batch
from fastlora.nn.memory import held

SCHEMA = 1
SHAPES = {"8x64": (8, 64), "1x512": (1, 512)}
GOALS = {("fp32", False): 1.15, ("fp32", True): 2.0, ("bf16", False): 3.0}  # PEFT's time over ours, by dtype and DoRA
# name -> (compute dtype, fields of the adapter). "shared": DoRA's dropout before both terms, which takes one product
# with the base where PEFT's takes two.
SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "fp32": ("fp32", {}),
    "fp32 p=0.05": ("fp32", {"lora_dropout": 0.05}),
    "fp32 DoRA": ("fp32", {"use_dora": True}),
    "fp32 DoRA p=0.05": ("fp32", {"use_dora": True, "lora_dropout": 0.05}),
    "fp32 DoRA p=0.05 shared": ("fp32", {"use_dora": True, "lora_dropout": 0.05, "dora_dropout": "shared"}),
    "bf16": ("bf16", {}),
    "bf16 p=0.05": ("bf16", {"lora_dropout": 0.05}),
}
MEMORY_GOAL = 0.3
MODELS = ("smollm2", "tinyllama")


# --- models and text --------------------------------------------------------------------------------------------------


def tinyllama(tiny: bool) -> nn.Module:
    """Two layers of TinyLlama-1.1B's widths (`tiny`: of much smaller ones), random."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 2048, "intermediate_size": 5632, "num_attention_heads": 32, "num_key_value_heads": 4}
    if tiny:
        sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(vocab_size=96 if tiny else 32000, num_hidden_layers=2, **sizes)
    return LlamaForCausalLM(config).eval()


def load(name: str, tiny: bool) -> tuple[nn.Module, Tensor]:
    """A model, and a line of token ids to cut batches from."""
    if name == "smollm2" and not tiny:
        model, batches = steps._real(512)
        return model, torch.cat([batch.ids[batch.mask.bool()] for batch in batches])
    model = tinyllama(tiny)
    vocabulary: int = model.config.vocab_size  # type: ignore[union-attr, assignment]
    return model, torch.randint(0, vocabulary, (4096,), generator=torch.Generator().manual_seed(1))


def cut(ids: Tensor, shape: tuple[int, int], count: int) -> list[Batch]:
    """Batches of a shape, one after the other, round and round."""
    rows, length = shape
    need = rows * length
    found = []
    for number in range(count):
        start = number * need % max(1, len(ids) - need)
        own = ids[start : start + need].reshape(rows, length)
        found.append(Batch(own, torch.ones_like(own), own.clone()))
    return found


# --- contenders -------------------------------------------------------------------------------------------------------


def build(model: nn.Module, compute: torch.dtype, example: Tensor, **fields: Any) -> nn.Module:
    """The model converted, with a random B, and grouped."""
    model = steps.build_ours(model, compute, **fields)
    fastlora.group(model, example[:1, :8])
    return model


def parity(ours: nn.Module, peft: nn.Module, batch: Batch, compute: torch.dtype, fp32: Any) -> dict[str, Any]:
    """Losses, in fp32 also gradients, and what they were held to.

    Raises:
        RuntimeError: too far apart.
    """
    if compute == torch.float32:
        return _fp32_parity(ours, peft, batch)
    losses = [steps.plain_loss(steps.undropped(model), batch, compute) for model in (ours, peft)]
    for model in (ours, peft):
        model.train()
    return {"loss": losses[0], "loss_peft": losses[1]} | steps.near_fp32(losses, fp32)


def _fp32_parity(ours: nn.Module, peft: nn.Module, batch: Batch) -> dict[str, Any]:
    losses, grads = [], []
    for model in (ours, peft):
        loss, found = steps._gradients(model, batch, torch.float32)
        losses.append(loss)
        grads.append({name.replace("magnitude_vector", "magnitude"): grad for name, grad in found.items()})
        model.train()
    loss, other_loss = losses
    apart = steps.gradients_apart((loss, other_loss), *grads, steps.LOSS_BUDGET)
    return {"loss": loss, "loss_peft": other_loss, "allowed": steps.LOSS_BUDGET, "gradients_apart": apart}


def memory(contenders: dict[str, nn.Module], batch: Batch, compute: torch.dtype) -> dict[str, Any]:
    """Bytes that a forward of each contender keeps, and what the adapters add to the frozen model's."""
    found: dict[str, Any] = {}
    for name, model in contenders.items():
        inputs = {}
        if name == FLOOR:
            inputs["inputs_embeds"] = model.get_input_embeddings()(batch.ids).detach().requires_grad_()  # type: ignore[operator]

        def run(model: nn.Module = model, inputs: dict[str, Tensor] = inputs) -> Tensor:
            with steps._autocast(compute):
                return steps.loss_of(model, batch, **inputs)

        found[name] = held(model, {}, run).total
    added = {name: found[name] - found[FLOOR] for name in (OURS, PEFT) if name in found}
    found["adapters"] = added
    found["ratio"] = added[OURS] / added[PEFT] if added.get(PEFT, 0) > 0 else None
    return found


def flops(model: nn.Module, batch: Batch) -> float:
    """Floating-point operations of all linears, forward and gradient of their inputs."""
    found = 0.0
    head = model.get_output_embeddings()  # type: ignore[operator]
    for module in model.modules():
        if isinstance(module, nn.Linear):
            tokens = int((batch.labels[:, 1:] != steps.IGNORE).sum()) if module is head else batch.ids.numel()
            found += 4.0 * tokens * module.weight.numel()
    return found


def share_of_products(step: Any, batch: Batch) -> float:
    """How much of a step torch spends in matrix products."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
        step(batch)
    spent = {event.key: event.self_cpu_time_total for event in seen.key_averages()}
    return sum(spent.get(name, 0.0) for name in ("aten::mm", "aten::addmm", "aten::bmm")) / sum(spent.values())


def settle(results: list[dict[str, Any]], rates: dict[str, float]) -> None:
    """Raise the rates to the best that anybody shows in any setting, then give every setting its bound.

    The rest of a step is what the frozen model does beside its products; what a contender takes beyond that is taken
    for its products.
    """
    for entry in results:
        kind, frozen = entry["compute"], entry["seconds"][FLOOR]
        entry["rest_seconds"] = rest = frozen * (1 - entry["products"]["share_of_frozen"])
        for name in (FLOOR, OURS):
            spent = max(entry["seconds"][name] - rest, 0.25 * frozen)  # never from the noise of a tiny run
            rates[kind] = max(rates[kind], entry["products"]["flops"] / spent)
    for entry in results:
        least = entry["least_seconds"] = entry["products"]["flops"] / rates[entry["compute"]] + entry["rest_seconds"]
        entry["bound"] = entry["seconds"][PEFT] / least if PEFT in entry["seconds"] else None


def setting(
    name: str, model: nn.Module, batches: list[Batch], fp32: Any, options: argparse.Namespace
) -> dict[str, Any]:
    """One compute dtype and method on one model and shape."""
    kind, fields = SETTINGS[name]
    compute = steps.COMPUTE[kind]
    ours = build(copy.deepcopy(model), compute, batches[0].ids, **fields)
    floor = copy.deepcopy(model).to(compute)
    contenders, reasons = {OURS: ours}, {}
    found = None
    try:
        contenders[PEFT] = steps.build_peft(copy.deepcopy(model), ours, compute)
    except steps.Missing as error:
        reasons[PEFT] = str(error)
    else:
        found = parity(ours, contenders[PEFT], batches[0], compute, fp32)
    trainers = {each: steps.trainer(own, compute) for each, own in contenders.items()}
    trainers[FLOOR] = steps.frozen(floor, compute)
    kept = memory(contenders | {FLOOR: floor}, batches[0], compute)
    times = timing.in_turns(trainers, [(batch,) for batch in batches], options.rounds, warm=options.warm)
    seconds = {each: statistics.median(values) for each, values in times.items()}
    work, share = flops(floor, batches[0]), share_of_products(trainers[FLOOR], batches[0])
    frozen_over_ours = timing.ratio(times[FLOOR], times[OURS])
    report = fastlora.report(ours)
    return {
        "setting": name,
        "compute": str(compute).removeprefix("torch."),
        "seconds": seconds,
        "peft_over_fastlora": timing.ratio(times.get(PEFT, ()), times[OURS]),
        "goal": GOALS[kind, fields.get("use_dora", False)],
        "products": {"flops": work, "share_of_frozen": share},
        "fastlora_over_frozen": 1 / frozen_over_ours,  # type: ignore[operator]
        "rounds": len(times[OURS]),
        "grouped": sum(bool(row.group) for row in report),
        "layers": len(report),
        "parity": found,
        "memory": kept,
        "reasons": reasons,
        "samples": times,
    }


def launches() -> dict[str, Any]:
    """`benchmarks.block_launches` in a process in which kernels are interpreted."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.block_launches"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    if done.returncode:
        raise RuntimeError(f"benchmarks.block_launches failed: {done.stderr.strip().splitlines()[-1:]}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def measure(chosen: argparse.Namespace) -> dict[str, Any]:
    """Everything, as JSON types; says on stderr how far it is."""
    torch.set_num_threads(chosen.threads)
    started, results, rates = time.perf_counter(), [], cpu_targets.machine(chosen.threads, chosen.tiny)
    for name in chosen.models:
        model, ids = load(name, chosen.tiny)
        for shape in chosen.shapes:
            batches = cut(ids, (2, 8) if chosen.tiny else SHAPES[shape], chosen.rounds + 1)
            fp32 = None
            if any(SETTINGS[each][0] == "bf16" for each in chosen.settings):
                judge = build(copy.deepcopy(model), torch.float32, batches[0].ids).train()
                fp32 = steps.sensitivity(judge, batches[0])
                del judge
            for each in chosen.settings:
                entry = setting(each, model, batches, fp32, chosen)
                results.append({"model": name, "shape": shape} | entry)
                print(f"{name} {shape} {each}: {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)
    settle(results, rates)
    return {
        "schema": SCHEMA,
        "mode": "tiny" if chosen.tiny else "cpu",
        "threads": chosen.threads,
        "adapter": {"r": RANK, "lora_alpha": ALPHA},
        "rates": {name: rates[name] for name in ("float32", "bfloat16")},
        "launches": None if chosen.tiny else launches(),
        **script.facts(started),
        "results": results,
    }


# --- what comes out ---------------------------------------------------------------------------------------------------


def _number(value: float | None, form: str = ".2f") -> str:
    return "-" if value is None else format(value, form)


def table(report: dict[str, Any]) -> str:
    """The short form, for the terminal."""
    head = (
        "",
        "ours s",
        "peft s",
        "frozen s",
        "peft/ours",
        "goal",
        "bound",
        "ours/frozen",
        "adapters' MB",
        "PEFT's",
        "ratio",
    )
    rates = ", ".join(f"{name} {rate / 1e9:.0f}" for name, rate in report["rates"].items())
    lines = [f"{report['threads']} thread(s); products at best, Gflop/s: {rates}"]
    lines.append(f"{head[0]:<36}" + "".join(f"{cell:>13}" for cell in head[1:]))
    for entry in report["results"]:
        seconds, added = entry["seconds"], entry["memory"]["adapters"]
        cells = [_number(seconds.get(name)) for name in (OURS, PEFT, FLOOR)]
        cells += [_number(entry[name]) for name in ("peft_over_fastlora", "goal", "bound", "fastlora_over_frozen")]
        cells += [_number(None if name not in added else added[name] / 1e6, ".1f") for name in (OURS, PEFT)]
        cells.append(_number(entry["memory"]["ratio"]))
        name = f"{entry['model']} {entry['shape']} {entry['setting']}"
        lines.append(f"{name:<36}" + "".join(f"{cell:>13}" for cell in cells))
        if entry["parity"]:
            lines.append("  " + ", ".join(f"{key} {_number(value, '.3g')}" for key, value in entry["parity"].items()))
        lines += [f"  no {other}: {why}" for other, why in entry["reasons"].items()]
    if report["launches"]:
        budget = report["launches"]["budget"]
        for name, ways in report["launches"]["settings"].items():
            both = " + ".join(str(ways[way]["kernels"]) for way in ("forward", "backward"))
            lines.append(f"kernels of a layer, {name}: {both}")
        lines.append(f"budget for QLoRA: {budget['forward']} + {budget['backward']}")
    return "\n".join(lines)


def draw(report: dict[str, Any], path: Path) -> None:
    """Seconds a step and the adapters' memory as bars."""
    results = report["results"]
    figure = plots.figure(12, 1.6 + 0.46 * len(results), 110)
    looks = (
        (PEFT, "PEFT + bitsandbytes", "#9db4c8"),
        (OURS, "fastlora, grouped", "#2e7d32"),
        (FLOOR, "frozen dense model", "#d7d7d7"),
    )
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    for place, (name, label, colour) in enumerate(looks):
        at = (place, len(looks))
        plots.bars(left, at, [entry["seconds"].get(name) for entry in results], lying=True, color=colour, label=label)
        if name != FLOOR:
            kept = [entry["memory"]["adapters"].get(name, 0) / 1e6 for entry in results]
            plots.bars(right, at, kept, ".0f", lying=True, color=colour, label=label)
    left.set_yticks(range(len(results)), [f"{e['model']} {e['shape']}, {e['setting']}" for e in results], fontsize=8)
    left.invert_yaxis()
    left.set_xlabel("seconds a step")
    right.set_xlabel("kept for the backward beyond the frozen model's, MB")
    for axes in (left, right):
        axes.margins(x=0.1, y=0.01)
    left.legend(frameon=False, fontsize=9)
    left.set_title(
        f"{plots.caution(report)}one training step, NF4, rank {RANK}; {plots.machine(report)}",
        fontsize=10,
        loc="left",
    )
    figure.savefig(path)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, write."""
    parser = script.parser("block", __doc__, tiny="made-up small models")
    parser.add_argument("--threads", type=script.at_least(1), default=1)
    parser.add_argument("--rounds", type=script.at_least(1), default=3, help="of each setting")
    parser.add_argument("--warm", type=script.at_least(0), default=0, help="rounds before those")
    parser.add_argument("--models", choices=MODELS, nargs="+", default=MODELS)
    parser.add_argument("--shapes", choices=tuple(SHAPES), nargs="+", default=tuple(SHAPES))
    parser.add_argument("--settings", choices=tuple(SETTINGS), nargs="+", default=tuple(SETTINGS))
    chosen = parser.parse_args(arguments)
    return script.run(parser, chosen, lambda: measure(chosen), table, draw)


if __name__ == "__main__":
    sys.exit(main())
