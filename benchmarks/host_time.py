"""Host time of one adapted linear: microseconds of Python and dispatch a call, over the bare base of the same size.

    taskset -c 0 python -m benchmarks.host_time [--json FILE] [--rounds N] [--calls N]

A 64 x 64 layer, one token, one thread: the arithmetic costs next to nothing, so what a call takes beyond the bare base
is what calling it costs. The base is `nn.Linear`, under a 4-bit layer bitsandbytes' own `Linear4bit`. Everybody takes
turns of `calls` calls, in an order drawn anew each round; reported are medians of the rounds, and the medians of the
rounds' differences to the base. Before that every output is compared with the formula.

  eval   module.eval(), no gradient       train   forward only, x and the adapters ask for gradients
"""

from __future__ import annotations

import random
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import fastlora
from benchmarks import script
from benchmarks.cpu_report import describe
from benchmarks.environment import now

SCHEMA = 2
SIZE, RANK = 64, 8
DENSE, FOUR_BIT = "nn.Linear", "Linear4bit"  # the bare bases
TARGETS = {"eval": 20.0, "train": 45.0}  # microseconds over the bare base
# The rows the targets are for: an adapted linear of ours, or one of PEFT's that is accelerated.
JUDGED = ("LoraLinear", "QLoraLinear", "accelerated", "accelerated nf4")


def _base(seed: int = 0) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(SIZE, SIZE, bias=False)


def _peft(accelerated: bool, four_bit: bool = False, **fields: Any) -> nn.Module:
    import peft

    from benchmarks.adoption_runs import quantized

    model: Any = nn.ModuleDict({"q_proj": _base()})
    if four_bit:
        model = quantized(model)
    config = peft.LoraConfig(r=RANK, lora_alpha=16, target_modules=["q_proj"], **fields)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = peft.LoraModel(model, config, "default")
    if accelerated:
        fastlora.accelerate(wrapped, strict=True)
    layer: nn.Module = wrapped.model["q_proj"]
    return layer


def layers() -> dict[str, nn.Module]:
    """Everybody, by name; A and B are not zero."""
    from benchmarks.adoption_runs import quantized

    own: dict[str, Any] = {"r": RANK, "lora_alpha": 16, "init_seed": 0}
    found: dict[str, nn.Module] = {
        DENSE: _base().requires_grad_(False),
        FOUR_BIT: quantized(nn.ModuleDict({"q_proj": _base()}))["q_proj"],
        "LoraLinear": fastlora.LoraLinear.from_linear(_base(), **own),
        "LoraLinear p=0.05": fastlora.LoraLinear.from_linear(_base(), lora_dropout=0.05, **own),
        "LoraLinear DoRA": fastlora.LoraLinear.from_linear(_base(), use_dora=True, **own),
        "QLoraLinear": fastlora.QLoraLinear.from_linear(_base(), **own),
        "QLoraLinear p=0.05": fastlora.QLoraLinear.from_linear(_base(), lora_dropout=0.05, **own),
        "QLoraLinear DoRA": fastlora.QLoraLinear.from_linear(_base(), use_dora=True, **own),
        "accelerated": _peft(True),
        "accelerated p=0.05": _peft(True, lora_dropout=0.05),
        "accelerated DoRA": _peft(True, use_dora=True),
        "accelerated nf4": _peft(True, four_bit=True),
        "peft": _peft(False),
        "peft p=0.05": _peft(False, lora_dropout=0.05),
        "peft DoRA": _peft(False, use_dora=True),
        "peft nf4": _peft(False, four_bit=True),
    }
    generator = torch.Generator().manual_seed(1)
    for layer in found.values():
        for name, parameter in layer.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_(std=0.1, generator=generator)
    return found


def check(found: dict[str, nn.Module]) -> None:
    """In evaluation each one computes the formula over its dequantized base.

    Raises:
        RuntimeError: one does not.
    """
    x = torch.randn(1, SIZE)
    plain = found[DENSE].weight
    for name, layer in found.items():
        tensors = dict(layer.named_parameters())
        a = next((t for key, t in tensors.items() if "lora_A" in key), None)
        b = next((t for key, t in tensors.items() if "lora_B" in key), None)
        w = _packed_base(layer) if base_of(name) == FOUR_BIT else plain
        if a is not None and b is not None:
            w = w + 2.0 * b @ a
        if "DoRA" in name:
            magnitude = next(t for key, t in tensors.items() if "magnitude" in key)
            w = w * (magnitude / w.norm(dim=1))[:, None]
        with torch.no_grad():
            error = (layer.eval()(x) - x @ w.T).norm() / (x @ w.T).norm()
        # bitsandbytes' own evaluation computes in bf16 where the host has AVX512_BF16.
        if not error < (2.0**-7 if name in (FOUR_BIT, "peft nf4") else 1e-5):
            raise RuntimeError(f"{name} is off by {error:.1e}: no time")


def _packed_base(layer: Any) -> Tensor:
    if isinstance(layer, fastlora.QLoraLinear):
        return layer.dequantize(torch.float32)
    return fastlora.QuantizedWeight.from_bnb(getattr(layer, "base_layer", layer)).dequantize(torch.float32)


def base_of(name: str) -> str:
    """The bare base of a row."""
    return FOUR_BIT if name == FOUR_BIT or "nf4" in name or name.startswith("Q") else DENSE


def take_turns(steps: dict[str, Callable[[], Any]], rounds: int, calls: int) -> dict[str, list[float]]:
    """Microseconds a call of each, one entry a round; who comes after whom is drawn anew each round.

    A fixed order would give each one the caches and the clock that the same neighbour leaves behind.
    """
    names, times, draw = list(steps), {name: [] for name in steps}, random.Random(0)
    for turn in range(-2, rounds):
        draw.shuffle(names)
        for name in names:
            step = steps[name]
            begin = time.perf_counter()
            for _ in range(calls):
                step()
            if turn >= 0:
                times[name].append((time.perf_counter() - begin) / calls * 1e6)
    return times


def mode(found: dict[str, nn.Module], name: str, rounds: int, calls: int) -> list[dict[str, Any]]:
    """The rows of "eval" or "train"."""
    x = torch.randn(1, SIZE, requires_grad=name == "train")
    for layer in found.values():
        layer.train(name == "train")
    with torch.set_grad_enabled(name == "train"):
        steps = {who: (lambda layer=layer: layer(x)) for who, layer in found.items()}
        times = take_turns(steps, rounds, calls)
    rows = []
    for who, values in times.items():
        over, over_linear = (
            statistics.median(mine - floor for mine, floor in zip(values, times[base], strict=True))
            for base in (base_of(who), DENSE)
        )
        target = TARGETS[name] if who in JUDGED else None
        rows.append(
            {
                "mode": name,
                "layer": who,
                "microseconds": round(statistics.median(values), 2),
                "least": round(min(values), 2),
                "base": base_of(who),
                "over_base": round(over, 2),
                "over_linear": round(over_linear, 2),
                "target": target,
                "met": None if target is None else over <= target,
            }
        )
    return rows


def measure(rounds: int, calls: int) -> dict[str, Any]:
    """Everything, as JSON types."""
    torch.set_num_threads(1)
    found = layers()
    check(found)
    results = [row for name in TARGETS for row in mode(found, name, rounds, calls)]
    return {
        "schema": SCHEMA,
        "layer": {"in": SIZE, "out": SIZE, "r": RANK, "tokens": 1, "dtype": "float32"},
        "rounds": rounds,
        "calls": calls,
        "finished": now(),
        "environment": describe(),
        "results": results,
    }


def table(report: dict[str, Any]) -> str:
    """The short form, for the terminal."""
    lines = [f"{'':<7}{'':<22}{'us a call':>11}{'over base':>11}{'over linear':>13}{'target':>9}"]
    for row in report["results"]:
        target = "" if row["target"] is None else f"{row['target']:.0f} {'met' if row['met'] else 'missed'}"
        lines.append(
            f"{row['mode']:<7}{row['layer']:<22}{row['microseconds']:>11.1f}{row['over_base']:>11.1f}"
            f"{row['over_linear']:>13.1f}   {target}"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, write."""
    parser = script.parser("host_time", __doc__)
    parser.add_argument("--rounds", type=script.at_least(1), default=60)
    parser.add_argument("--calls", type=script.at_least(1), default=100, help="of each a round")
    chosen = parser.parse_args(arguments)
    return script.run(parser, chosen, lambda: measure(chosen.rounds, chosen.calls), table)


if __name__ == "__main__":
    sys.exit(main())
