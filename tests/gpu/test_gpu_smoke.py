"""The layers on a GPU, through whichever backend is selected, by the error budget of the CPU tests.

`benchmarks.measure.check` builds the layer, runs forward and backward and compares them with a float64 oracle made by
autograd on the device itself; dropout is checked through the specified mask of the seed the layer drew.
"""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch

from benchmarks import measure, timing
from benchmarks.cases import Case
from benchmarks.contenders import Built
from benchmarks.oracle import make_inputs
from benchmarks.ours import ours
from fastlora import testing

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: torch.cuda.is_available() is False"),
]
DEVICE = torch.device("cuda")

ODD = Case("odd", "linear", n=200, k=136, m=65, r=8)  # k is no multiple of NF4's block, m of no tile
LARGE = Case("large", "linear", n=768, k=512, m=384, r=16)


def _variants(base: Case) -> list[Case]:
    kinds = itertools.product(
        ("", "nf4"), (torch.bfloat16, torch.float16, torch.float32), (0.0, 0.1), (False, True), (True, False)
    )
    return [
        dataclasses.replace(base, quant=quant, dtype=dtype, p=p, dora=dora, train=train)
        for quant, dtype, p, dora, train in kinds
        if train or p == 0  # eval has no dropout
    ]


# New shapes and dtypes may mean new kernels to compile: only the odd shape walks every dtype.
CASES = [
    *_variants(ODD),
    *(case for case in _variants(LARGE) if case.dtype == torch.bfloat16),
    *(case for case in _variants(dataclasses.replace(ODD, m=1)) if case.dtype == torch.bfloat16 and not case.train),
]


def _name(case: Case) -> str:
    dtype = str(case.dtype).removeprefix("torch.")
    mode = "train" if case.train else "eval"
    return f"{case.quant or 'dense'}-{dtype}-p{case.p}-{'dora' if case.dora else 'lora'}-m{case.m}-{mode}"


@pytest.mark.parametrize("case", CASES, ids=_name)
def test_layer_within_budget(case):
    for contender in ours():
        if contender.applies(case):
            row = measure.check(case, contender, DEVICE)
            assert row["status"] == "ok", (contender.name, row["reason"], row["parity"])


@pytest.mark.parametrize("op", ["dequantize", "dora_norm"])
@pytest.mark.parametrize("shape", [(200, 136), (768, 512)])
def test_weight_ops_within_budget(op, shape):
    case = Case(op, op, *shape, r=8, dora=op == "dora_norm")
    (contender,) = (one for one in ours() if one.applies(case))
    row = measure.check(case, contender, DEVICE)
    assert row["status"] == "ok", (row["reason"], row["parity"])


@pytest.mark.parametrize(
    "case",
    [
        testing.Case(33, 64, 80, 8, torch.bfloat16, quant="nf4", nested=True, bias=True, p=0.1),
        testing.Case(33, 64, 80, 8, torch.float16, quant="fp4", blocksize=32, bias=True),
        testing.Case(17, 97, 100, 3, torch.float32, bias=True, p=0.5, dora=True, dora_dropout="shared"),
        testing.Case(17, 97, 100, 24, torch.bfloat16, torch.bfloat16, bias=True, p=0.5, dora=True),
        testing.Case(8, 31, 129, 1, torch.float64, torch.float64, quant="nf4", dora=True),
        testing.Case(0, 16, 16, 2, torch.float32, bias=True),
    ],
    ids=str,
)
def test_functions_within_budget(case):
    inputs = testing.make_inputs(case, DEVICE.type)
    assert testing.judge(case, inputs, testing.run(case, inputs)) == []


def _built(case: Case) -> tuple[Built, torch.Tensor, torch.Tensor]:
    inputs = make_inputs(case, DEVICE, seed=3)
    (contender,) = (one for one in ours() if one.name == "fastlora" and one.applies(case))
    return contender.build(case, inputs, 1), inputs.x.requires_grad_(case.train), inputs.dy


@pytest.mark.parametrize("quant", ["", "nf4"])
@pytest.mark.parametrize(("p", "dora"), [(0.0, False), (0.1, True)])
def test_two_runs_agree_to_the_bit(quant, p, dora):
    built, x, dy = _built(dataclasses.replace(LARGE, quant=quant, p=p, dora=dora))
    runs = []
    for _ in range(2):
        torch.manual_seed(5)
        runs.append(built.step(0, x, dy))
    assert all(torch.equal(first, second) for first, second in zip(*runs, strict=True))


@pytest.mark.parametrize("quant", ["", "nf4"])
def test_a_side_stream_gives_the_same_bits(quant):
    built, x, dy = _built(dataclasses.replace(LARGE, quant=quant))
    expected = built.step(0, x, dy)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        got = built.step(0, x, dy)
    torch.cuda.current_stream().wait_stream(side)
    assert all(torch.equal(first, second) for first, second in zip(got, expected, strict=True))


@pytest.mark.parametrize("quant", ["", "nf4"])
@pytest.mark.parametrize("m", [1, 16])
def test_a_captured_graph_replays_the_eager_result(quant, m):
    case = dataclasses.replace(LARGE, quant=quant, m=m, train=False)
    built, x, _ = _built(case)
    with torch.no_grad():
        expected = built.forward(0, x)
        job, replayed, _graph = timing.capture(lambda _: built.forward(0, x), 1)
    replayed.fill_(float("nan"))
    job.run()
    torch.cuda.synchronize()
    assert torch.equal(replayed, expected)
