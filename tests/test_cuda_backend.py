"""The CUDA kernels without a GPU: their source, compiled for this machine with an emulated grid (tests/cuda_tools.py).

Each is judged bit for bit or by the error budget; every output and scratch byte is written exactly once, nothing is
touched outside a tensor, threads of a block run in either order.
"""

from __future__ import annotations

import ctypes
import dataclasses
import itertools
import shutil

import pytest
import torch
from torch import Tensor

from fastlora.backends import cuda
from fastlora.errors import UnsupportedError
from fastlora.math import nf4, philox
from fastlora.math.nf4 import PackedWeight
from fastlora.ops.schema import format_of
from fastlora.problem import (
    BIAS,
    DENSE,
    DORA,
    DROPOUT,
    LAZY_H,
    NEED_DX,
    SAVE_MASK,
    SHARED,
    TRAIN,
    Problem,
)
from fastlora.testing import Case, Inputs, Truth, eager, judge, make_inputs, oracle
from tests.cuda_tools import ROOT, compile_emulator, emulated, emulator, fenced, fenced_weight, opened, watched

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++: the CUDA kernels cannot be emulated")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ANY = Problem("quantize", 0, 1, 1, 0, torch.float32, torch.float32, DENSE, 0, "cpu")


def same(a: Tensor, b: Tensor) -> bool:
    """Equal bit for bit, any NaN equal to any other."""
    if not a.is_floating_point():
        return torch.equal(a, b)
    whole = {2: torch.int16, 4: torch.int32}[a.element_size()]
    return bool(((a.view(whole) == b.view(whole)) | (a.isnan() & b.isnan())).all())


# --- numbers and formats, bit for bit ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "number"), [(torch.bfloat16, 1), (torch.float16, 2)])
def test_16_bit_numbers_round_as_in_torch(dtype: torch.dtype, number: int) -> None:
    widen, narrow = emulator().handle.fl_emulator_widen, emulator().handle.fl_emulator_narrow
    widen.argtypes, widen.restype = [ctypes.c_int64, ctypes.c_int64], ctypes.c_float
    narrow.argtypes, narrow.restype = [ctypes.c_float, ctypes.c_int64], ctypes.c_int64
    every = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int16)
    got = torch.tensor([widen(bits & 0xFFFF, number) for bits in every.tolist()])
    assert same(got, every.view(dtype).float())
    exact = every.view(dtype).float()
    between = torch.randint(-(1 << 31), (1 << 31) - 1, (20000,), dtype=torch.int32).view(torch.float32)
    edges = torch.tensor([65504.0, 65519.996, 65520.0, 3.4e38, 5.96e-8, 2.98e-8, 2.99e-8, float("nan"), float("inf")])
    half = exact.double().add(torch.nextafter(exact, torch.tensor(torch.inf)).double()).div(2).float()
    values = torch.cat([exact, between, edges, -edges, half, (exact[:-1] + exact[1:]) / 2])
    codes = torch.tensor([narrow(value, number) for value in values.tolist()], dtype=torch.int32).to(torch.int16)
    assert same(codes.view(dtype), values.to(dtype))


@pytest.mark.parametrize("width", [7, 16, 32, 100, 1040])
@pytest.mark.parametrize("quant_type", nf4.QUANT_TYPES)
def test_quantize_is_bit_identical(width: int, quant_type: str) -> None:
    torch.manual_seed(width)
    for dtype, blocksize, at_end in itertools.product(DTYPES, (32, 64, 4096), (False, True)):
        w = torch.randn(5, width)
        w[1] = 0
        if width >= 32:
            w[0, 3], w[2, 9], w[3, -1] = float("nan"), float("inf"), -float("inf")
        w = fenced(w.to(dtype), at_end)
        expected = nf4.quantize_blocks(w, quant_type, blocksize)
        with watched(at_end) as watch:
            actual = cuda.quantize(ANY, w, quant_type, blocksize)
        watch.check()
        assert all(map(same, actual, expected)), (dtype, blocksize)


def test_quantize_ties() -> None:
    points = torch.cat([nf4.midpoints("nf4"), nf4.midpoints("fp4"), -nf4.midpoints("fp4"), torch.ones(3)])
    near = torch.cat([points, torch.nextafter(points, torch.ones(())), torch.nextafter(points, -torch.ones(()))])
    for scale, quant_type in itertools.product((1.0, 1e-30, 1e-38, 1e-44, 3e38), nf4.QUANT_TYPES):
        with emulated():
            actual = cuda.quantize(ANY, near * scale, quant_type, 64)
        assert all(map(same, actual, nf4.quantize_blocks(near * scale, quant_type, 64))), (scale, quant_type)


@pytest.mark.parametrize("blocks", [0, 1, 255, 256, 257, 1000])
def test_nested_scales_are_bit_identical(blocks: int) -> None:
    torch.manual_seed(blocks)
    absmax = torch.rand(blocks)
    if blocks == 1000:
        absmax[:256] = absmax[:256].mean()
    expected = nf4.quantize_absmax(absmax)
    with watched() as watch:
        actual = cuda.quantize_absmax(ANY, fenced(absmax, True))
    assert not blocks or watch.check() is None
    assert all(map(same, actual, expected))
    broken = torch.tensor([1.0, float("nan"), 2.0])
    with emulated():
        assert all(map(same, cuda.quantize_absmax(ANY, broken), nf4.quantize_absmax(broken)))


def packed(w: Tensor, kind: str, blocksize: int) -> PackedWeight:
    """A weight in one of the formats: nf4, nested, fp4, or with a table of its own."""
    weight = nf4.pack(w, "fp4" if kind == "fp4" else "nf4", blocksize, kind == "nested")
    return weight._replace(code=nf4.as_bytes(torch.linspace(-2, 2, 16))) if kind == "code" else weight


@pytest.mark.parametrize("width", [7, 16, 64, 100, 1040, 4304])
@pytest.mark.parametrize("kind", ["nf4", "nested", "fp4", "code"])
def test_dequantize_is_bit_identical(width: int, kind: str) -> None:
    torch.manual_seed(width)
    for dtype, blocksize, at_end in itertools.product(DTYPES, (32, 64, 4096), (False, True)):
        weight = packed(torch.randn(5, width), kind, blocksize)
        expected = nf4.dequantize(weight, dtype)
        with watched(at_end) as watch:
            actual = cuda.dequantize(ANY, fenced_weight(weight, at_end), dtype)
        watch.check()
        assert same(actual, expected), (dtype, blocksize)
        out = torch.empty(5 * width + 1, dtype=dtype)[1:].view(5, width)  # on no vector's border
        with emulated():
            assert cuda.dequantize(ANY, weight, dtype, out) is out
        assert same(out, expected)


def test_dequantize_large() -> None:
    weight = nf4.pack(torch.randn(3, 20011), "nf4", 64, True)  # several programs, the last one partial
    with emulated():
        assert same(cuda.dequantize(ANY, weight, torch.bfloat16), nf4.dequantize(weight, torch.bfloat16))


def test_misaligned_parts() -> None:
    weight = nf4.pack(torch.randn(6, 64), "nf4", 32, True)

    def shift(t: Tensor) -> Tensor:
        return torch.cat([torch.zeros(1, dtype=torch.uint8), t.flatten()])[1:].view(t.shape)

    moved = weight._replace(**{name: shift(getattr(weight, name)) for name in weight._fields[:4]})
    with emulated():
        assert same(cuda.dequantize(ANY, moved, torch.float32), nf4.dequantize(weight, torch.float32))


@pytest.mark.parametrize("p", [0.0, 0.05, 0.5, 0.99999])
def test_dropout_mask_is_the_specification(p: float) -> None:
    for (m, k), seed, stream in itertools.product(((1, 1), (3, 77), (40, 200)), (0, 2**63 - 2), (0, 65537)):
        with watched() as watch:
            actual = cuda.dropout_mask(ANY._replace(m=m, k=k), torch.tensor([seed]), stream, p)
        watch.check()
        assert torch.equal(actual, philox.dropout_bits(seed, stream, m, k, p)), (m, k, seed, stream)


# --- the adapted linear against the fp64 oracle -----------------------------------------------------------------------


def problem_of(op: str, case: Case, inputs: Inputs, flags: int) -> Problem:
    assert isinstance(inputs.weight, PackedWeight)
    flags |= DORA if case.dora else 0
    fmt = format_of(inputs.weight, False)
    return Problem(op, case.m, case.n, case.k, case.r, case.dtype, case.adapter_dtype, fmt, flags, "cpu")


def fence(inputs: Inputs, at_end: bool) -> Inputs:
    assert isinstance(inputs.weight, PackedWeight)
    small = {
        name: fenced(t, at_end)
        for name in ("x", "a", "b", "bias", "mag", "dy")
        if (t := getattr(inputs, name)) is not None
    }
    return inputs._replace(weight=fenced_weight(inputs.weight, at_end), **small)


def forward(case: Case, inputs: Inputs, truth: Truth, flags: int) -> tuple[Tensor | None, ...]:
    flags |= BIAS if case.bias else 0
    flags |= (DROPOUT | SAVE_MASK if case.p else 0) | (SHARED if case.dora and case.p else 0)
    norm = truth.norm.float() if case.dora else None
    seed = torch.tensor([case.seed + 7]) if case.p else None
    adapter = (inputs.a, inputs.b, case.scale, inputs.mag, norm, seed, 3, case.p)
    return cuda.lora_fwd(problem_of("lora_fwd", case, inputs, flags), inputs.x, inputs.weight, inputs.bias, *adapter)


# tokens around every tile (8, 16, 32, 64); columns odd, below and beyond a step (64) and a chunk (256); rows of w that
# no block of 64 (or warp of 16) fills; ranks around 4, 16 and 32
SHAPES = [
    *((1, 1, 1, 1), (1, 70, 128, 3), (2, 5, 33, 2), (3, 16, 96, 8), (7, 65, 256, 17), (8, 64, 64, 4), (9, 33, 320, 24)),
    *((16, 48, 512, 16), (17, 97, 576, 5), (33, 31, 320, 33), (40, 20, 300, 6), (64, 130, 640, 1), (5, 9, 1100, 0)),
    *((2, 20, 2368, 2), (12, 20, 1216, 2)),  # more columns than lie in shared memory at once, in one slice
]
OPTIONS = [
    {},
    {"bias": True, "nested": True, "blocksize": 32, "adapter_dtype": torch.bfloat16},
    {"dora": True, "bias": True, "nested": True, "quant": "fp4", "blocksize": 128},
    {"p": 0.3, "nested": True, "adapter_dtype": torch.float16},
    {"p": 0.3, "dora": True, "dora_dropout": "shared", "blocksize": 256},
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    for number, options in enumerate(OPTIONS):
        case = dataclasses.replace(Case(*shape, dtype=dtype, quant="nf4", seed=number), **options)
        if case.dora and not case.r:
            continue
        inputs = make_inputs(case)
        truth = oracle(case, inputs)
        results = []
        for at_end, splits in ((True, 1), (False, 3)):
            with watched(at_end, splits=splits, descending=not at_end) as watch:
                got = forward(case, fence(inputs, at_end), truth, TRAIN)
            watch.check()
            y, h, mask, z = got
            assert y is not None and h is not None
            expected = eager(case, inputs)
            assert not judge(case, inputs, expected._replace(y=y), truth, autocast=False), (case, splits)
            exact = truth.xd @ inputs.a.double().T
            bound = 4 * 2.0**-24 * truth.xd.norm(dim=1, keepdim=True) * inputs.a.double().norm(dim=1)
            assert bool(((h - exact).abs() <= bound).all()), (case, splits)
            if case.p:
                assert mask is not None
                assert torch.equal(mask, philox.dropout_bits(case.seed + 7, 3, case.m, case.k, case.p))
            if case.dora:
                assert z is not None
                zs = dataclasses.replace(case, dora=False, bias=False)
                plain = inputs._replace(mag=None, bias=None)
                assert not judge(zs, plain, eager(zs, plain)._replace(y=z), oracle(zs, plain)), (case, splits)
            results.append(y)
        with emulated(splits=3):
            again = forward(case, inputs, truth, 0)
        assert same(results[1], again[0]) and again[1:] == (None, None, None)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_operands_on_any_border(dtype: torch.dtype) -> None:
    """x, a, b and the packed bytes start where no vector may: the same problem, other addresses."""
    case = Case(9, 40, 128, 8, dtype=dtype, adapter_dtype=dtype, quant="nf4", nested=True)
    inputs = make_inputs(case)
    truth = oracle(case, inputs)

    def shift(t: Tensor) -> Tensor:
        return torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape)

    assert isinstance(inputs.weight, PackedWeight)
    moved = inputs._replace(**{name: shift(getattr(inputs, name)) for name in ("x", "a", "b", "dy")})
    moved = moved._replace(weight=inputs.weight._replace(packed=shift(inputs.weight.packed)))
    adapter = (moved.a, moved.b, case.scale, None, None)
    with emulated(splits=1):
        y = forward(case, moved, truth, 0)[0]
        problem = problem_of("lora_bwd", case, moved, NEED_DX)
        dx = cuda.lora_bwd(problem, moved.dy, None, moved.weight, *adapter, *[None] * 4, 0, 0.0)[0]  # type: ignore[arg-type]
        merged = cuda.merged_weight(problem, moved.weight, *adapter[:3])  # type: ignore[arg-type]
        assert same(merged, cuda.merged_weight(problem, inputs.weight, inputs.a, inputs.b, case.scale))
    assert not judge(case, inputs, eager(case, inputs)._replace(y=y, dx=dx), truth)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_zero_b_is_the_frozen_layer(dtype: torch.dtype) -> None:
    for m, k in ((3, 256), (20, 100)):
        case = Case(m, 33, k, 8, dtype=dtype, quant="nf4", nested=True, bias=True)
        inputs = make_inputs(case)
        inputs = inputs._replace(b=torch.zeros_like(inputs.b))
        frozen = inputs._replace(a=inputs.a[:0], b=inputs.b[:, :0])
        with emulated(splits=2):
            y = forward(case, inputs, oracle(case, inputs), 0)[0]
            bare = dataclasses.replace(case, r=0)
            assert same(y, forward(bare, frozen, oracle(bare, frozen), 0)[0])  # type: ignore[arg-type]


def test_forward_returns_what_is_asked_for() -> None:
    case = Case(3, 8, 64, 4, quant="nf4")
    inputs = make_inputs(case)
    with emulated():
        assert forward(case, inputs, oracle(case, inputs), TRAIN | LAZY_H)[1] is None
        empty = dataclasses.replace(case, m=0)
        y, h, mask, z = forward(empty, make_inputs(empty), oracle(empty, make_inputs(empty)), TRAIN)
    assert y is not None and y.shape == (0, 8) and h is not None and h.shape == (0, 4) and mask is None and z is None


DX_SHAPES = [
    (1, 1, 1, 1),
    (1, 70, 128, 3),
    (3, 130, 33, 2),
    (8, 64, 264, 17),
    (9, 65, 300, 33),
    (16, 200, 520, 8),
    (5, 9, 70, 0),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", DX_SHAPES, ids=str)
def test_dx(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    for number, options in enumerate(OPTIONS[:3]):
        case = dataclasses.replace(Case(*shape, dtype=dtype, quant="nf4", seed=number), **options)
        if case.dora and not case.r:
            continue
        inputs = make_inputs(case)
        truth = oracle(case, inputs)
        norm = truth.norm.float() if case.dora else None
        problem = problem_of("lora_bwd", case, inputs, NEED_DX)
        for at_end, splits in ((True, 1), (False, 3)):
            held = fence(inputs, at_end)
            adapter = (held.a, held.b, case.scale, held.mag, norm)
            with watched(at_end, splits=splits, descending=not at_end) as watch:
                dx = cuda.lora_bwd(problem, held.dy, None, held.weight, *adapter, *[None] * 4, 0, 0.0)[0]
            watch.check()
            assert not judge(case, inputs, eager(case, inputs)._replace(dx=dx), truth), (case, splits)


@pytest.mark.parametrize("shape", [(1, 1, 1), (33, 130, 3), (40, 264, 16), (65, 100, 33), (32, 128, 0)], ids=str)
def test_merge(shape: tuple[int, int, int]) -> None:
    n, k, r = shape
    for dtype, (number, options) in itertools.product(DTYPES, enumerate(OPTIONS[:3])):
        case = dataclasses.replace(Case(4, n, k, r, dtype=dtype, quant="nf4", seed=number), **options)
        if case.dora and not r:
            continue
        inputs = make_inputs(case)
        truth = oracle(case, inputs)
        norm = truth.norm.float() if case.dora else None
        problem = problem_of("lora_fwd", case, inputs, 0)
        exact = truth.c[:, None] * (inputs.w + case.scale * inputs.b.double() @ inputs.a.double())
        sizes = truth.c[:, None] * (inputs.w.abs() + case.scale * inputs.b.double().abs() @ inputs.a.double().abs())
        u = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}[dtype]
        tiny = 2.0**-25 if dtype == torch.float16 else 0.0  # half the step of its subnormal numbers
        for at_end in (False, True):
            held = fence(inputs, at_end)
            with watched(at_end, descending=at_end) as watch:
                w = cuda.merged_weight(problem, held.weight, held.a, held.b, case.scale, held.mag, norm)
            watch.check()
            assert bool(((w - exact).abs() <= u * exact.abs() + (r + 4) * 2.0**-24 * sizes + tiny).all()), case
        if not r:
            assert same(w, nf4.dequantize(inputs.weight, dtype))
        with emulated():
            adapter = (inputs.a, inputs.b, case.scale, inputs.mag, norm, None, 0, 0.0)
            y = cuda.merge(problem, inputs.x, inputs.weight, inputs.bias, *adapter)[0]
        assert not judge(case, inputs, eager(case, inputs)._replace(y=y), truth), case


@pytest.mark.parametrize("shape", [(1, 1, 1), (33, 130, 3), (40, 264, 16), (65, 100, 33), (32, 1200, 0)], ids=str)
def test_norm(shape: tuple[int, int, int]) -> None:
    n, k, r = shape
    for number, options in enumerate(OPTIONS[:3]):
        case = dataclasses.replace(Case(4, n, k, r, quant="nf4", seed=number), **options)
        inputs = make_inputs(dataclasses.replace(case, dora=False))
        exact = (inputs.w + case.scale * inputs.b.double() @ inputs.a.double()).norm(dim=1)
        # of every summand before it is squared: r + 3 roundings of magnitudes that may cancel
        terms = (inputs.w.abs() + case.scale * inputs.b.double().abs() @ inputs.a.double().abs()).norm(dim=1)
        problem = problem_of("dora_norm", case, inputs, 0)
        for at_end in (False, True):
            held = fence(inputs, at_end)
            with watched(at_end, descending=at_end) as watch:
                norm = cuda.dora_norm(problem, held.weight, held.a, held.b, case.scale)
            watch.check()
            assert bool(((norm - exact).abs() <= 2.0**-24 * ((r + 4) * terms + 8 * exact)).all()), case


# --- the emulator notices ---------------------------------------------------------------------------------------------

_STAGED = "stage_x<TILES>(args, span, slice.end, shared);"
_REDUCED = "        }\n        barrier();\n    }\n    for"
_PLANES = "token < args.m && col < args.k)\n            store"
MUTANTS = {
    "a barrier is missing": ("skinny.h", f"{_STAGED}\n        barrier();", _STAGED),
    "a row beyond n is read": ("skinny.h", "min64(row0 + 8, last)", "(row0 + 8)"),
    "a token beyond m is stored": ("skinny.h", "row < args.n && token < args.m", "row < args.n"),
    "h is written by every block": ("finish.h", "if (args.h && !blockIdx.x)", "if (args.h)"),
    "a scale is another step's": ("skinny.h", "4 * g + step", "4 * g"),
    "warps' sums race": ("transposed.h", _REDUCED, _REDUCED.replace("        barrier();\n", "")),
    "a column beyond k is stored": ("transposed.h", _PLANES, _PLANES.replace(" && col < args.k", "")),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_noticed(name: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    file, line, broken = MUTANTS[name]
    folder = tmp_path_factory.mktemp("mutant")
    shutil.copytree(ROOT / "csrc", folder / "csrc")
    source = folder / "csrc" / "cuda" / file
    text = source.read_text()
    assert text.count(line) >= 1
    source.write_text(text.replace(line, broken))
    compile_emulator(folder / "csrc", folder / "emulated.so")
    library = opened(folder / "emulated.so")
    case = Case(9, 70, 576, 5, dtype=torch.bfloat16, quant="nf4", nested=True)
    inputs = make_inputs(case)
    truth = oracle(case, inputs)
    noticed = []
    for at_end, splits in ((True, 1), (False, 2)):
        held = fence(inputs, at_end)
        try:
            with watched(at_end, splits=splits, descending=not at_end, library=library) as watch:
                y = forward(case, held, truth, TRAIN)[0]
                problem = problem_of("lora_bwd", case, inputs, NEED_DX)
                adapter = (held.a, held.b, case.scale, None, None)
                dx = cuda.lora_bwd(problem, held.dy, None, held.weight, *adapter, *[None] * 4, 0, 0.0)[0]
            watch.check()
            noticed += judge(case, inputs, eager(case, inputs)._replace(y=y, dx=dx), truth)
        except (UnsupportedError, AssertionError) as error:
            noticed.append(str(error))
    assert noticed, name
