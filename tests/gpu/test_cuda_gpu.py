"""The CUDA library on a GPU: the emulator's cases, bits across devices, repeats, streams and graphs, launches."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch

from fastlora.backends import _cuda_library, cuda
from fastlora.functional import qlora_linear
from fastlora.math import nf4, philox
from fastlora.problem import DENSE, NEED_DX, Problem
from fastlora.testing import Case, Inputs, eager, judge, make_inputs, oracle
from tests.test_cuda_backend import DX_SHAPES, OPTIONS, SHAPES, packed, problem_of, same

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(bool(_cuda_library.missing()), reason=_cuda_library.missing() or "usable"),
]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ANY = Problem("quantize", 0, 1, 1, 0, torch.float32, torch.float32, DENSE, 0, "cuda")
# what a model has: several blocks, slices and tokens' tiles at once
LARGE = [(1, 4096, 4096, 16), (16, 4096, 4096, 16), (64, 2048, 4096, 64), (5, 14336, 4096, 16), (8, 4096, 14336, 16)]


def evaluated(case: Case, inputs: Inputs, plan: str = "skinny") -> torch.Tensor:
    """y through the public function, the backend by name."""
    seed = case.seed + 7 if case.p else None
    with torch.no_grad():
        return qlora_linear(
            inputs.x,
            inputs.weight,  # type: ignore[arg-type]
            inputs.a,
            inputs.b,
            case.scale,
            bias=inputs.bias,
            magnitude=inputs.mag,
            dropout_p=case.p,
            seed=seed,
            stream=3,
            dora_dropout=case.dora_dropout,
            backend=f"cuda:{plan}",
        )


def held_to_budget(case: Case, plan: str) -> None:
    inputs = make_inputs(case, "cuda")
    truth = oracle(case, inputs)
    got = eager(case, inputs)._replace(y=evaluated(case, inputs, plan))
    assert judge(case, inputs, got, truth) == []


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, *LARGE], ids=str)
def test_skinny_forward(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    for number, options in enumerate(OPTIONS[: 2 if shape in LARGE else None]):
        case = dataclasses.replace(Case(*shape, dtype=dtype, quant="nf4", seed=number), **options)
        if case.r or not case.dora:
            held_to_budget(case, "skinny")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(4, 33, 130, 3), (4, 40, 264, 16), (70, 512, 1024, 64), (4, 32, 128, 0)], ids=str)
def test_merge(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    for number, options in enumerate(OPTIONS[:3]):
        case = dataclasses.replace(Case(*shape, dtype=dtype, quant="nf4", seed=number), **options)
        if case.r or not case.dora:
            held_to_budget(case, "merge")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [*DX_SHAPES, (16, 4096, 4096, 16)], ids=str)
def test_dx(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    case = Case(*shape, dtype=dtype, quant="nf4", nested=True)
    inputs = make_inputs(case, "cuda")
    problem = problem_of("lora_bwd", case, inputs, NEED_DX)._replace(device="cuda")
    adapter = (inputs.a, inputs.b, case.scale, None, None)
    runs = [cuda.lora_bwd(problem, inputs.dy, None, inputs.weight, *adapter, *[None] * 4, 0, 0.0)[0] for _ in range(2)]  # type: ignore[arg-type]
    assert runs[0] is not None and runs[1] is not None
    assert same(runs[0], runs[1])
    assert judge(case, inputs, eager(case, inputs)._replace(dx=runs[0]), oracle(case, inputs)) == []


@pytest.mark.parametrize("width", [7, 64, 100, 4304])
def test_bits_are_the_specification(width: int) -> None:
    torch.manual_seed(width)
    for dtype, quant_type in itertools.product(DTYPES, nf4.QUANT_TYPES):
        w = torch.randn(65, width).to(dtype)
        w[1] = 0
        got = cuda.quantize(ANY, w.cuda(), quant_type, 64)
        assert all(same(a.cpu(), b) for a, b in zip(got, nf4.quantize_blocks(w, quant_type, 64), strict=True))
    for kind, dtype in itertools.product(("nf4", "nested", "fp4", "code"), DTYPES):
        weight = packed(torch.randn(65, width), kind, 64)
        moved = weight._replace(**{f: t.cuda() for f, t in weight._asdict().items() if isinstance(t, torch.Tensor)})
        assert same(cuda.dequantize(ANY, moved, dtype).cpu(), nf4.dequantize(weight, dtype)), (kind, dtype)
    absmax = torch.rand(1000)
    nested = cuda.quantize_absmax(ANY, absmax.cuda())
    assert all(same(a.cpu(), b) for a, b in zip(nested, nf4.quantize_absmax(absmax), strict=True))
    bits = cuda.dropout_mask(ANY._replace(m=33, k=width), torch.tensor([2**40 + 5], device="cuda"), 65537, 0.3)
    assert torch.equal(bits.cpu(), philox.dropout_bits(2**40 + 5, 65537, 33, width, 0.3))


@pytest.mark.parametrize("m", [1, 16, 64])
def test_streams_graphs_and_repeats_give_the_same_bits(m: int) -> None:
    case = Case(m, 512, 1024, 16, dtype=torch.bfloat16, quant="nf4", nested=True, bias=True)
    inputs = make_inputs(case, "cuda")
    expected = evaluated(case, inputs)
    assert same(evaluated(case, inputs), expected)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        aside = evaluated(case, inputs)
    torch.cuda.current_stream().wait_stream(side)
    assert same(aside, expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = evaluated(case, inputs)
    replayed.fill_(float("nan"))
    graph.replay()
    torch.cuda.synchronize()
    assert same(replayed, expected)


def test_an_adapted_layer_is_two_kernels() -> None:
    case = Case(4, 512, 1024, 16, dtype=torch.bfloat16, quant="nf4", nested=True, bias=True)
    inputs = make_inputs(case, "cuda")
    evaluated(case, inputs)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        evaluated(case, inputs)
        torch.cuda.synchronize()
    kernels = [
        event.key for event in profile.key_averages() for _ in range(event.count) if event.self_device_time_total
    ]
    assert len(kernels) == 2, kernels
