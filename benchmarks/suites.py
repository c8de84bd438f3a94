"""What the CPU benchmarks run: two suites of cases, and who takes part in each.

One `Case` line brings a shape, a dtype or an option into the table, the plot and the JSON.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import NamedTuple

import torch

from benchmarks.cases import Case
from benchmarks.contenders import Contender
from benchmarks.ours import function, ours
from benchmarks.peers import bnb_function, cpu_peers, peers

FP32, BF16 = torch.float32, torch.bfloat16
BOTH = (FP32, BF16)
SQUARE = (4096, 4096)
WIDE = (5632, 2048)  # (out, in)
SMOLLM2 = ((576, 576), (1536, 576), (576, 1536))
TINY = (96, 64)
_SHORT = {FP32: "fp32", BF16: "bf16"}


class Row(NamedTuple):
    """One row of the results: one contender on one case."""

    suite: str
    case: str
    contender: str

    def __str__(self) -> str:
        return f"{self.case}-{self.contender}"


@dataclasses.dataclass(frozen=True)
class Suite:
    """Cases and contenders of one `bench_*.py`.

    Attributes:
        name: of the suite.
        share: part of the time budget; what an earlier suite leaves over is added.
        cases: most important first; what the budget does not cover is reported as skipped.
        contenders: whoever may apply.
    """

    name: str
    share: float
    cases: tuple[Case, ...]
    contenders: tuple[Contender, ...]

    def entrants(self, case: Case) -> list[Contender]:
        """Who runs a case."""
        return [one for one in self.contenders if one.applies(case)]

    def rows(self) -> list[Row]:
        """Every row, grouped by case."""
        return [Row(self.name, case.name, one.name) for case in self.cases for one in self.entrants(case)]


def _linear(
    kind: str, mode: str, m: int, dtype: torch.dtype, shape: tuple[int, int] = SQUARE, p: float = 0.0, r: int = 16
) -> Case:
    """kind: lora, qlora, dora or qdora; mode: "forward" (eval, no gradients) or "step" (forward and backward)."""
    n, k = shape
    drop = f"-p{p:g}" if p else ""
    return Case(
        name=f"{kind}-{mode}{drop}-m{m}-{n}x{k}-{_SHORT[dtype]}",
        op="linear",
        n=n,
        k=k,
        m=m,
        r=r,
        dtype=dtype,
        quant="nf4" if kind.startswith("q") else "",
        p=p,
        dora=kind.endswith("dora"),
        train=mode == "step",
    )


def _op(op: str, dtype: torch.dtype, shape: tuple[int, int] = SQUARE, *, m: int = 0, nested: bool = True) -> Case:
    n, k = shape
    mask = op == "dropout_mask"
    name = f"{op}-m{m}-{k}" if mask else f"{op}{'-nested' if nested else ''}-{n}x{k}-{_SHORT[dtype]}"
    return Case(
        name, op, n, k, m=m, dtype=dtype, quant="nf4", p=0.05 if mask else 0.0, dora=op == "dora_norm", nested=nested
    )


def _layer_cases() -> Iterable[Case]:
    for m in (8, 512, 1, 64):
        for dtype in BOTH:
            yield _linear("qlora", "step", m, dtype)
            yield _linear("qlora", "forward", m, dtype)
    for dtype in BOTH:
        yield _linear("qlora", "step", 64, dtype, p=0.05)
        yield _linear("qdora", "step", 64, dtype)
        yield _linear("lora", "step", 64, dtype)
        yield _linear("dora", "step", 64, dtype)
        for shape in SMOLLM2:
            yield _linear("qlora", "step", 512, dtype, shape)
        yield _linear("qlora", "forward", 1, dtype, WIDE)
        yield _linear("qlora", "step", 64, dtype, WIDE)
    for dtype in BOTH:
        yield _linear("qlora", "step", 512, dtype, p=0.05)
        yield _linear("qlora", "step", 512, dtype, SMOLLM2[1], p=0.05)
        yield _linear("lora", "step", 512, dtype, SMOLLM2[1])
        yield _linear("lora", "step", 64, dtype, p=0.05)
        yield _linear("qdora", "step", 64, dtype, p=0.05)
        yield _linear("lora", "forward", 1, dtype)
        yield _linear("qlora", "step", 512, dtype, WIDE)


def _op_cases() -> Iterable[Case]:
    for dtype in BOTH:
        yield _op("quantize", dtype, nested=False)
        yield _op("dequantize", dtype)
    yield _op("quantize", BF16)
    yield _op("dropout_mask", FP32, m=512)
    yield _op("dora_norm", FP32)
    for dtype in BOTH:
        yield _linear("qlora", "step", 8, dtype)
        yield _linear("qlora", "forward", 8, dtype)
        yield _linear("qlora", "step", 8, dtype, p=0.05)
    yield _linear("lora", "step", 8, FP32)
    yield _linear("qdora", "step", 8, BF16)
    yield _op("quantize", BF16, SMOLLM2[1], nested=False)
    yield _op("dequantize", BF16, SMOLLM2[1])


def _tiny_layer_cases() -> Iterable[Case]:
    yield _linear("qlora", "forward", 1, FP32, TINY, r=4)
    yield _linear("qlora", "step", 24, BF16, TINY, p=0.05, r=4)
    yield _linear("dora", "step", 24, FP32, TINY, r=4)


def _tiny_op_cases() -> Iterable[Case]:
    yield _op("quantize", FP32, TINY)
    yield _op("dequantize", BF16, TINY)
    yield dataclasses.replace(_op("dora_norm", FP32, TINY), r=4)
    yield _op("dropout_mask", FP32, TINY, m=64)
    yield _linear("lora", "step", 24, FP32, TINY, r=4)


def suites(tiny: bool = False) -> dict[str, Suite]:
    """Both suites, in the order they run.

    Args:
        tiny: a few small cases through the same code, in seconds; they check the machinery, never speed.
    """
    everyone = [one for one in peers() if one.name != "unsloth"]  # it needs a GPU
    floor = next(one for one in everyone if one.role == "floor")
    bnb = next(one for one in everyone if one.role == "base")
    others = (one for one in everyone if one.role == "peer")
    mine = [one for one in ours() if one.name == "fastlora"]  # fp32 adapters, our default
    shared = (dataclasses.replace(floor, name="linear"), *cpu_peers(), *others)
    layers = tuple(_tiny_layer_cases() if tiny else _layer_cases())
    ops = tuple(_tiny_op_cases() if tiny else _op_cases())
    weight_ops = [one for one in mine if not one.applies(layers[0])]
    return {
        "layers": Suite("layers", 0.82, layers, (*shared, bnb, *mine)),
        "ops": Suite("ops", 1.0, ops, (*shared, bnb_function(), function(), *weight_ops)),
    }
