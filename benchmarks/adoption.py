"""SmolLM2-135M trained by PEFT before and after `fastlora.accelerate`, from the same seed: are the losses PEFT's?

    python -m benchmarks.adoption [--json FILE] [--png FILE] [--steps N] [--kinds NAME ...] [--group]

Each kind of adapter trains four times on the same batches of the demo's text, with AdamW: PEFT's own layers on one
thread (the reference), on two threads, with a random half of every adapted output moved by one unit in its last place,
and accelerated. At every step the accelerated loss may differ from the reference by 3 times the largest difference that
PEFT's other two runs have shown up to that step. With dropout, PEFT drops by our masks and scale, since the streams of
the two differ. The loss is taken in float64, so that its own rounding hides nothing.

Adapters are fp32, and so is compute, but where a kind says bf16 (under autocast, as PEFT trains in 16 bits). What is
rounded to bf16, and how often, differs between the two; so both are also compared with PEFT's fp32 losses, which tells
who is nearer to what is meant. `--group` also groups the layers that share an input and fuses the gated MLPs: `GROUPED`
kinds, rank 16, files `grouped.json` and `grouped.png`.

The whole takes some forty minutes of one core. SmolLM2 has no biases in its linears, so `bias="all"` has nothing to
train here: tests/test_accelerate_training.py runs it on a model that has.
"""

from __future__ import annotations

import copy
import statistics
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor, nn

import fastlora
from benchmarks import adoption_runs as runs
from benchmarks import plots, script
from benchmarks.cpu_report import RESULTS
from benchmarks.step_beside_peft import IGNORE, Batch, _autocast, _real, _tiny

SCHEMA = 1
RANK, RATE, TOKENS = 8, 2e-4, 100
GROUPED_RANK = 16
# name -> (arguments of `quantized`, fields of peft.LoraConfig)
KINDS: dict[str, tuple[dict[str, Any] | None, dict[str, Any]]] = {
    "lora": (None, {}),
    "dora": (None, {"use_dora": True}),
    "nf4 nested, dropout 0.05": ({"nested": True}, {"lora_dropout": 0.05}),
    "rslora": (None, {"use_rslora": True}),
    "lora_bias": (None, {"lora_bias": True}),
    "lora, dropout 0.1": (None, {"lora_dropout": 0.1}),
    "nf4": ({"nested": False}, {}),
    "nf4 nested, dora, dropout 0.05": ({"nested": True}, {"use_dora": True, "lora_dropout": 0.05}),
}
# Without dropout: a group draws one seed where single layers draw one each.
GROUPED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "nf4 nested": ({"nested": True}, {}),
    "nf4 nested, dora": ({"nested": True}, {"use_dora": True}),
    "nf4 nested, bf16": ({"nested": True, "compute": torch.bfloat16}, {}),
}
IN_FP32 = {"nf4 nested, bf16": "nf4 nested"}


def loss_of(model: Any, batch: Batch) -> Tensor:
    """Cross-entropy per target token, in float64; the output head runs on the targets alone."""
    inner = model.get_base_model()
    with _autocast(inner.dtype):
        hidden = inner.model(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False).last_hidden_state
        wanted = batch.labels[:, 1:] != IGNORE
        logits = inner.lm_head(hidden[:, :-1][wanted])
    return nn.functional.cross_entropy(logits.double(), batch.labels[:, 1:][wanted])


def adapted(model: nn.Module, kind: str) -> Any:
    """A seeded PeftModel of a copy of the model."""
    (quant, fields), rank = (GROUPED[kind], GROUPED_RANK) if kind in GROUPED else (KINDS[kind], RANK)
    base: Any = copy.deepcopy(model)
    if quant is not None:
        base = runs.quantized(base.to(quant.get("compute", torch.float32)), **quant)
    torch.manual_seed(1)
    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=runs.LINEARS, **fields)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=UserWarning, module="peft")
        return peft.get_peft_model(base, config)


def compare(model: nn.Module, batches: list[Batch], kind: str, group: bool = False) -> dict[str, Any]:
    """The four runs of one kind, and the verdict.

    Raises:
        RuntimeError: a layer was left to PEFT, or PEFT's own runs are the same to the bit, so that they say nothing.
    """
    started = time.perf_counter()
    with runs.threads(1):
        want = runs.losses(runs.with_our_masks(adapted(model, kind)), batches, loss_of, RATE, f"{kind}: PEFT")
        moved = runs.with_our_masks(adapted(model, kind))
        with runs.nudged(moved):
            nudge = runs.losses(moved, batches, loss_of, RATE, f"{kind}: PEFT, moved")
        ours = fastlora.accelerate(adapted(model, kind), strict=True, group=batches[0].ids if group else False)
        got = runs.losses(ours, batches, loss_of, RATE, f"{kind}: accelerated")
        report = fastlora.report(ours)
    if report.left:
        raise RuntimeError(f"{kind}: left to PEFT: {report.left}")
    with runs.threads(2):
        two = runs.losses(runs.with_our_masks(adapted(model, kind)), batches, loss_of, RATE, f"{kind}: 2 threads")
    allowed, found = runs.allowance(want, two, nudge), runs.distances(want, got)
    if allowed[-1] == 0.0:
        raise RuntimeError(f"{kind}: PEFT's three runs are equal to the bit: no measure")
    return {
        "kind": kind,
        "steps": len(batches),
        "layers_fused": len(report.fused),
        "layers_grouped": sum(bool(row.group) for row in report),
        "ok": all(difference <= most for difference, most in zip(found, allowed, strict=True)),
        "largest_difference": max(found),
        "largest_allowed": allowed[-1],
        "peft_two_threads": runs.apart(want, two),
        "peft_nudged": runs.apart(want, nudge),
        "share_of_allowance": max(d / most for d, most in zip(found, allowed, strict=True) if most),
        "seconds": round(time.perf_counter() - started, 1),
        "losses": {"peft": want, "accelerated": got, "peft_two_threads": two, "peft_nudged": nudge},
        "allowed": allowed,
    }


def add_distance_from_fp32(results: list[dict[str, Any]]) -> None:
    """To each kind in bf16: how far its runs, and PEFT's, are from PEFT's losses in fp32 (mean and largest)."""
    by_kind = {entry["kind"]: entry["losses"] for entry in results}
    for entry in results:
        exact = by_kind.get(IN_FP32.get(entry["kind"], ""))
        if exact is not None:
            far = {name: runs.distances(exact["peft"], entry["losses"][name]) for name in ("accelerated", "peft")}
            entry["from_fp32"] = {name: {"mean": statistics.mean(d), "largest": max(d)} for name, d in far.items()}


def measure(kinds: Sequence[str], steps: int, tiny: bool, group: bool = False) -> dict[str, Any]:
    """Everything, as JSON types; says on stderr how far it is."""
    started = time.perf_counter()
    model, batches = _tiny() if tiny else _real(TOKENS)
    results, rank = [], GROUPED_RANK if group else RANK
    for kind in kinds:
        results.append(compare(model, [batches[step % len(batches)] for step in range(steps)], kind, group))
        print(f"{kind}: {results[-1]['seconds']} s", file=sys.stderr, flush=True)
    add_distance_from_fp32(results)
    return {
        "schema": SCHEMA,
        "mode": "tiny" if tiny else "cpu",
        "model": "two small random layers" if tiny else "SmolLM2-135M",
        "base_bias": "none: the model's linears have no bias",
        "adapter": {"r": rank, "lora_alpha": 2 * rank, "lr": RATE, "optimizer": "AdamW"},
        "batch": {"sequences": batches[0].ids.shape[0], "tokens": [batch.ids.numel() for batch in batches[:steps]]},
        "factor": runs.FACTOR,
        **script.facts(started),
        "results": results,
    }


def table(report: dict[str, Any]) -> str:
    """The short form, for the terminal."""
    lines = [f"{'':<32}{'steps':>6}{'loss':>18}{'difference':>12}{'2 threads':>12}{'1 ulp':>12}{'of allowed':>12}"]
    for entry in report["results"]:
        losses = entry["losses"]["accelerated"]
        numbers = [entry[name] for name in ("largest_difference", "peft_two_threads", "peft_nudged")]
        cells = "".join(f"{number:>12.1e}" for number in numbers)
        verdict = "" if entry["ok"] else "  TOO FAR"
        fell = f"{losses[0]:.3f} to {losses[-1]:.3f}"
        lines.append(
            f"{entry['kind']:<32}{entry['steps']:>6}{fell:>18}{cells}{entry['share_of_allowance']:>12.2f}{verdict}"
        )
        if far := entry.get("from_fp32"):
            told = "; ".join(f"{name} {d['mean']:.3f}, {d['largest']:.3f}" for name, d in far.items())
            lines.append(f"  from PEFT's fp32 losses, mean and largest: {told}")
    return "\n".join(lines)


def draw(report: dict[str, Any], path: Path) -> None:
    """Both loss curves above, their difference and the allowance below, a column a kind."""
    results = report["results"]
    columns = min(4, len(results))
    rows = -(-len(results) // columns)
    figure = plots.figure(max(9.0, 3.1 * columns), 4.4 * rows, 110)
    grid = figure.add_gridspec(2 * rows, columns)
    for place, entry in enumerate(results):
        row, column = divmod(place, columns)
        steps, curves = range(1, entry["steps"] + 1), entry["losses"]
        above = figure.add_subplot(grid[2 * row, column])
        above.plot(steps, curves["peft"], color="#9db4c8", linewidth=4, label="PEFT")
        above.plot(steps, curves["accelerated"], color="#2e7d32", linewidth=1.2, label="accelerated")
        above.set_title(entry["kind"] + ("" if entry["ok"] else ": TOO FAR"), fontsize=9, loc="left")
        below = figure.add_subplot(grid[2 * row + 1, column], sharex=above)
        found = runs.distances(curves["peft"], curves["accelerated"])
        below.plot(steps, found, color="#2e7d32", linewidth=1.2, label="|accelerated - PEFT|")
        below.plot(steps, entry["allowed"], color="#c0392b", linewidth=1.2, linestyle="--", label="allowed")
        below.set_yscale("symlog", linthresh=1e-8)
        below.set_xlabel("step", fontsize=8)
        for axes, label in ((above, "loss"), (below, "difference")):
            axes.spines[["top", "right"]].set_visible(False)
            axes.tick_params(labelsize=8)
            if column == 0:
                axes.set_ylabel(label, fontsize=8)
            if place == 0:
                axes.legend(frameon=False, fontsize=8)
    figure.suptitle(
        f"{plots.caution(report)}{report['model']} before and after accelerate\nallowed: {report['factor']:.0f} x "
        "PEFT's largest distance from itself (2 threads, or half of the outputs moved by 1 ulp) so far",
        fontsize=10,
    )
    figure.savefig(path)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, print, write; 1 if any kind is too far from PEFT."""
    parser = script.parser("adoption", __doc__, tiny="a made-up small model")
    parser.add_argument("--steps", type=script.at_least(1), help="of each run; default 50, grouped 100")
    parser.add_argument("--kinds", choices=(*KINDS, *GROUPED), nargs="+", help="default: all")
    parser.add_argument("--group", action="store_true", help="group layers, kinds without dropout")
    chosen = parser.parse_args(arguments)
    known, steps = (GROUPED, 100) if chosen.group else (KINDS, 50)
    if chosen.group:  # into files of its own
        parser.set_defaults(json=RESULTS / "grouped.json", png=RESULTS / "grouped.png")
        chosen = parser.parse_args(arguments)
    kinds = tuple(dict.fromkeys(chosen.kinds or known))
    if wrong := [kind for kind in kinds if kind not in known]:
        way = "with --group" if chosen.group else "without --group"
        parser.error(f"{way} the kinds are {', '.join(known)}; got {wrong[0]}")
    return script.run(
        parser,
        chosen,
        lambda: measure(kinds, chosen.steps or steps, chosen.tiny, chosen.group),
        table,
        draw,
        lambda report: all(entry["ok"] for entry in report["results"]),
    )


if __name__ == "__main__":
    sys.exit(main())
