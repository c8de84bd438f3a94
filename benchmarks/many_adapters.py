"""A batch that mixes adapters: fastlora's grouped kernels beside PEFT's mixed-batch loop and beside one adapter.

    python -m benchmarks.many_adapters [--json FILE] [--png FILE] [--threads N] [--rounds N] [--budget S] [--tiny]

One linear layer, 16 adapters of rank 16, 16 rows. In eval: every row its own adapter, by us and by PEFT
(`adapter_names`, bitsandbytes under it for NF4), and by us the same rows through one adapter. Then a training step,
forward and backward with the gradients of x and of all adapters; PEFT refuses `adapter_names` in training mode, so its
layer is asked directly, in eval mode with gradients on. Everybody holds the same weight bytes and the same adapters.

Parity comes first: without the same outputs (and gradients) there is no ratio. Contenders take turns, the order
rotates, and a ratio is the median of the rounds' ratios: above 1 fastlora is faster, below 1 slower. The frozen base
bounds the ratio of whole times; "added" compares what the adapters add to it, PEFT's over ours.
"""

from __future__ import annotations

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

SCHEMA = 1
RANK = 16
OURS, ONE, PEFT, BASE = "fastlora", "fastlora, one adapter", "peft", "frozen base"
COMPUTE = {"fp32": torch.float32, "bf16": torch.bfloat16}
# |ours - peft| / |peft|: two orders of summing, each in its dtype. On a CPU with AVX512_BF16 bitsandbytes rounds x to
# bf16 whatever is asked for: its fp32 rows fail, keep their time and get no ratio.
BUDGET = {"fp32": 2e-5, "bf16": 2e-2}
GOALS = {PEFT: 4.0, ONE: 1 / 1.15}  # in eval


@dataclasses.dataclass(frozen=True)
class Options:
    """What to measure.

    Attributes:
        threads: of torch. rounds: of each setting at most, warm-up apart. budget: seconds for a setting's rounds; at
            least five rounds are taken, whatever it says.
        sizes: in and out features. adapters: how many, each with one row.
    """

    threads: int = 1
    rounds: int = 40
    budget: float = 2.0
    sizes: tuple[int, ...] = (576, 2048, 4096)
    bases: tuple[str, ...] = ("dense", "nf4")
    compute: tuple[str, ...] = tuple(COMPUTE)
    adapters: int = 16
    tiny: bool = False


Step = Callable[[Tensor, Tensor], dict[str, Tensor]]


# --- contenders -------------------------------------------------------------------------------------------------------


def _names(count: int) -> list[str]:
    return [f"user{i}" for i in range(count)]


def build_ours(size: int, base: str, dtype: torch.dtype, count: int) -> Any:
    """Our layer with its adapters; B is random, so that every adapter counts."""
    torch.manual_seed(0)
    linear = nn.Linear(size, size, bias=False).to(dtype)
    first, *rest = _names(count)
    config = fastlora.LoraConfig(r=RANK, lora_alpha=RANK, adapter_dtype=dtype, init_seed=0)
    if base == "nf4":
        layer: Any = fastlora.QLoraLinear.from_linear(linear, config, adapter_name=first, compute_dtype=dtype)
    else:
        layer = fastlora.LoraLinear.from_linear(linear, config, adapter_name=first)
    fastlora.add_adapters(layer, {name: config.replace(init_seed=i + 1) for i, name in enumerate(rest)})
    for parameter in layer.lora_B.values():
        parameter.data.normal_(0, RANK**-0.5)
    return layer


def build_peft(ours: Any, size: int, base: str, dtype: torch.dtype) -> Any:
    """PEFT's layer over the same bytes, with the same adapters."""
    import peft

    holder = nn.Sequential(nn.Linear(size, size, bias=False, device="meta"))
    if base == "nf4":
        import bitsandbytes

        options = {"compress_statistics": True, "quant_type": "nf4", "device": "meta"}
        holder[0] = bitsandbytes.nn.Linear4bit(size, size, bias=False, compute_dtype=dtype, **options)
        holder[0].weight = ours.weight.to_bnb()
        holder.is_loaded_in_4bit = True
    else:
        holder[0].weight = nn.Parameter(ours.weight.data, requires_grad=False)
    names = list(ours.lora_A)
    config = peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["0"])
    model = peft.get_peft_model(holder, config, adapter_name=names[0], autocast_adapter_dtype=False)
    for name in names[1:]:
        model.add_adapter(name, config, autocast_adapter_dtype=False)
    layer = model.base_model.model[0]
    for name in names:
        layer.lora_A[name].weight = nn.Parameter(ours.lora_A[name].data)
        layer.lora_B[name].weight = nn.Parameter(ours.lora_B[name].data)
    return layer.eval()


def evaluator(layer: Any, names: Sequence[str | None] | None) -> Step:
    """One forward; names None: the active adapter."""
    keywords = {} if names is None else {"adapter_names": names}

    def step(x: Tensor, dy: Tensor) -> dict[str, Tensor]:
        with torch.no_grad():
            return {"y": layer(x, **keywords)}

    return step


def trainer(layer: Any, names: list[str] | None, matrices: dict[str, nn.Parameter]) -> Step:
    """Forward and backward: gradients of x and of the adapters' matrices, freed before the next step."""
    keywords = {} if names is None else {"adapter_names": names}

    def step(x: Tensor, dy: Tensor) -> dict[str, Tensor]:
        for parameter in matrices.values():
            parameter.grad = None
        x = x.clone().requires_grad_()
        y = layer(x, **keywords)
        y.backward(dy)
        found = {name: p.grad for name, p in matrices.items() if p.grad is not None}
        return {"y": y.detach(), **({} if x.grad is None else {"dx": x.grad}), **found}

    return step


def _matrices(layer: Any, names: Sequence[str]) -> dict[str, nn.Parameter]:
    found = {}
    for kind in ("lora_A", "lora_B"):
        for name in names:
            entry = getattr(layer, kind)[name]
            found[f"{kind}.{name}"] = entry if isinstance(entry, nn.Parameter) else entry.weight
            found[f"{kind}.{name}"].requires_grad_()
    return found


# --- measuring --------------------------------------------------------------------------------------------------------


def parity(ours: dict[str, Tensor], theirs: dict[str, Tensor], budget: float) -> dict[str, Any]:
    """The largest relative difference of y, dx, and of all gradients of one kind; "ok" within the budget."""
    if ours.keys() != theirs.keys():
        return {"ok": False, "reason": f"one lacks {', '.join(sorted(ours.keys() ^ theirs.keys()))}"}
    errors: dict[str, float] = {}
    for name, want in theirs.items():
        kind = name.partition(".")[0]
        error = ((ours[name].double() - want.double()).norm() / want.double().norm()).item()
        errors[kind] = max(errors.get(kind, 0.0), error)
    return {"ok": all(error <= budget for error in errors.values()), "budget": budget, "errors": errors}


def entry(mode: str, times: dict[str, list[float]], found: dict[str, Any] | None, reason: str) -> dict[str, Any]:
    """One mode's numbers; no ratio over PEFT without parity."""
    own = times[OURS]

    def over(name: str) -> float | None:
        if not times.get(name) or (name == PEFT and not (found and found["ok"])):
            return None
        return timing.ratio(times[name], own)

    ratios = {name: over(name) for name in (PEFT, ONE)}
    goals = {name: None if ratios[name] is None else ratios[name] >= goal for name, goal in GOALS.items()}
    return {
        "mode": mode,
        "rounds": len(own),
        "milliseconds": {name: 1e3 * statistics.median(values) for name, values in times.items()},
        "peft_over_fastlora": ratios[PEFT],
        "one_over_fastlora": ratios[ONE],
        "added_by_peft_over_added_by_fastlora": _added(times, ratios[PEFT] is not None),
        "goals_met": goals if mode == "eval" else None,
        "parity": found,
        "reason": reason or None,
        "samples": times,
    }


def _added(times: dict[str, list[float]], comparable: bool) -> float | None:
    """What the adapters add to our frozen layer, PEFT's over ours: the base itself bounds the ratio of whole times."""
    if BASE not in times or not comparable:
        return None
    base, own, theirs = (statistics.median(times[name]) for name in (BASE, OURS, PEFT))
    return (theirs - base) / (own - base) if own > base else None


def setting(size: int, base: str, compute: str, options: Options) -> list[dict[str, Any]]:
    """Eval and a training step of one layer."""
    dtype, names = COMPUTE[compute], _names(options.adapters)
    ours = build_ours(size, base, dtype, options.adapters)
    theirs, reason = None, ""
    try:
        theirs = build_peft(ours, size, base, dtype)
    except ImportError as error:
        reason = f"cannot be imported: {error.name}"
    generator = torch.Generator().manual_seed(1)
    x, dy = (torch.randn(options.adapters, size, generator=generator).to(dtype) for _ in range(2))
    results = []
    for mode in ("eval", "train"):
        steps: dict[str, Step] = {}
        ours.train(mode == "train")
        if mode == "eval":
            steps[OURS], steps[ONE] = evaluator(ours, names), evaluator(ours, None)
            steps[BASE] = evaluator(ours, [None] * len(names))
            if theirs is not None:
                steps[PEFT] = evaluator(theirs, names)
        else:
            fastlora.train_adapters(ours, names)
            steps[OURS] = trainer(ours, names, _matrices(ours, names))
            steps[ONE] = trainer(ours, None, _matrices(ours, names[:1]))
            if theirs is not None:
                steps[PEFT] = trainer(theirs, names, _matrices(theirs, names))
        found = None
        why = reason
        if PEFT in steps:
            try:
                found = parity(steps[OURS](x, dy), steps[PEFT](x, dy), BUDGET[compute])
            except RuntimeError as error:  # what it cannot do is a result too
                why = f"PEFT raises: {str(error).splitlines()[0]}"
                del steps[PEFT]
        times = timing.in_turns(steps, [(x, dy)], options.rounds, warm=2, least=5, seconds=options.budget)
        about = {"base": base, "size": size, "compute": compute}
        results.append(about | entry(mode, times, found, why))
    return results


def measure(options: Options) -> dict[str, Any]:
    """Everything, as JSON types."""
    torch.set_num_threads(options.threads)
    started = time.perf_counter()
    results = [
        row
        for size in options.sizes
        for base in options.bases
        for compute in options.compute
        for row in setting(size, base, compute, options)
    ]
    return {
        "schema": SCHEMA,
        "mode": "tiny" if options.tiny else "cpu",
        "batch": {"rows": options.adapters, "adapters": options.adapters, "r": RANK},
        "adapter_dtype": "that of the activations",
        "goals": {"peft_over_fastlora": GOALS[PEFT], "one_over_fastlora": round(GOALS[ONE], 4)},
        "threads": options.threads,
        **script.facts(started),
        "results": results,
    }


# --- what comes out ---------------------------------------------------------------------------------------------------


def table(report: dict[str, Any]) -> str:
    """One line a setting, losses named."""
    lines = [f"{'layer':<24} {'mode':<6} {'fastlora':>9} {'one':>9} {'peft':>9}   peft/ours  added  ours/one  parity"]
    for row in report["results"]:
        times, over, one = row["milliseconds"], row["peft_over_fastlora"], row["one_over_fastlora"]
        layer = f"{row['size']} {row['base']} {row['compute']}"
        shown = [f"{times[name]:9.2f}" if name in times else f"{'-':>9}" for name in (OURS, ONE, PEFT)]
        found = row["parity"]
        verdict = row["reason"] if found is None else f"{max(found.get('errors', {'': 1.0}).values()):.1e}"
        verdict += "" if found is None or found["ok"] else " FAILED"
        missed = [name for name, met in (row["goals_met"] or {}).items() if met is False]
        note = f"  goal missed against: {'; '.join(missed)}" if missed else ""
        slower = times.get(PEFT, times[OURS]) < times[OURS]
        note += "  SLOWER than PEFT" if slower else ""
        ratio = f"{over:9.2f}" if over else f"{'-':>9}"
        more = row["added_by_peft_over_added_by_fastlora"]
        added = f"{more:5.1f}" if more else f"{'-':>5}"
        lines.append(
            f"{layer:<24} {row['mode']:<6} {' '.join(shown)}   {ratio}  {added}  {1 / one:8.2f}  {verdict}{note}"
        )
    return "\n".join(lines)


def draw(report: dict[str, Any], path: Path) -> None:
    """Milliseconds as bars, one panel a mode."""
    figure = plots.figure(9.6, 6.2, 120)
    looks = ((PEFT, "PEFT, adapter_names", "#9db4c8"), (OURS, "fastlora, adapter_names", "#2e7d32"))
    looks += ((ONE, "fastlora, one adapter for all rows", "#d7d7d7"),)
    for axes, mode in zip(figure.subplots(2, 1), ("eval", "train"), strict=True):
        rows = [row for row in report["results"] if row["mode"] == mode]
        for place, (name, label, colour) in enumerate(looks):
            values = [row["milliseconds"].get(name) for row in rows]
            plots.bars(axes, (place, len(looks)), values, ".1f", color=colour, label=label)
        axes.set_yscale("log")
        axes.margins(y=0.2)
        axes.set_xticks(
            range(len(rows)), [f"{row['size']}\n{row['base']} {row['compute']}" for row in rows], fontsize=8
        )
        axes.set_ylabel(f"ms, {'forward' if mode == 'eval' else 'forward + backward'}")
    batch = report["batch"]
    figure.suptitle(
        f"{plots.caution(report)}{batch['adapters']} adapters of rank {batch['r']}, one row each, one linear layer\n"
        f"{plots.machine(report)}",
        fontsize=10,
    )
    figure.axes[0].legend(frameon=False, fontsize=8, ncols=3)
    figure.savefig(path)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, write."""
    parser = script.parser("many_adapters", __doc__, tiny="small layers")
    parser.add_argument("--threads", type=script.at_least(1), default=Options.threads)
    parser.add_argument("--rounds", type=script.at_least(1), default=Options.rounds)
    parser.add_argument("--budget", type=float, default=Options.budget, help="seconds for one setting's rounds")
    chosen = parser.parse_args(arguments)
    sizes = (64, 128) if chosen.tiny else Options.sizes
    options = Options(chosen.threads, chosen.rounds, chosen.budget, sizes, tiny=chosen.tiny)
    return script.run(parser, chosen, lambda: measure(options), table, draw)


if __name__ == "__main__":
    sys.exit(main())
