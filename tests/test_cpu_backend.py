"""The CPU library: every instruction tier this machine has, against math.nf4 and math.philox bit for bit and against
the fp64 oracle within rounding."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from fastlora import settings
from fastlora.backends import _cpu_library, cpu
from fastlora.math import nf4, philox, reference
from fastlora.math.nf4 import PackedWeight
from fastlora.problem import (
    BIAS,
    DENSE,
    DORA,
    DROPOUT,
    NEED_DA,
    NEED_DB,
    NEED_DBIAS,
    NEED_DMAG,
    NEED_DX,
    SAVE_MASK,
    SHARED,
    TRAIN,
    Format,
    Problem,
)

FOUND, WHY = _cpu_library.loaded()
pytestmark = pytest.mark.skipif(FOUND is None, reason=WHY or "built")
TIERS = FOUND.tiers if FOUND is not None else ()
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WIDTHS = (7, 16, 32, 48, 80, 96, 100, 1040, 4304)
ALL_NEEDS = NEED_DX | NEED_DA | NEED_DB | NEED_DMAG | NEED_DBIAS
UNIT = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


@pytest.fixture(params=TIERS)
def tier(request: pytest.FixtureRequest) -> Iterator[str]:
    with settings.override(cpu_tier=request.param):
        yield request.param


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """These problems are tiny: on a busy machine a second thread would only wait. Tests of threads ask for more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def same(a: Tensor, b: Tensor) -> bool:
    """Equal bit for bit, any NaN equal to any other, +0 and -0 apart."""
    if not a.is_floating_point():
        return torch.equal(a, b)
    whole = {2: torch.int16, 4: torch.int32}[a.element_size()]
    return bool(((a.view(whole) == b.view(whole)) | (a.isnan() & b.isnan())).all())


def any_problem(op: str = "quantize") -> Problem:
    return Problem(op, 0, 1, 1, 0, torch.float32, torch.float32, DENSE, 0, "cpu")


def poisoned(rows: int, width: int, dtype: torch.dtype) -> Tensor:
    """Random rows with a zero block, and where there is room a NaN and both infinities."""
    w = torch.randn(rows, width)
    w[1] = 0
    if width >= 48:
        w[0, 3] = float("nan")
        w[2, width // 2], w[2, -1] = float("inf"), -float("inf")
    return w.to(dtype)


# --- format ops -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("quant_type", nf4.QUANT_TYPES)
def test_quantize_is_bit_identical(tier: str, width: int, quant_type: str) -> None:
    torch.manual_seed(width)
    for dtype, blocksize in itertools.product(DTYPES, (32, 64, 256, 4096)):
        w = poisoned(5, width, dtype)
        expected = nf4.quantize_blocks(w, quant_type, blocksize)
        actual = cpu.quantize(any_problem(), w, quant_type, blocksize)
        assert torch.equal(actual[0], expected[0]), (dtype, blocksize)
        assert same(actual[1], expected[1]), (dtype, blocksize)


def test_quantize_ties_and_tiny_values(tier: str) -> None:
    points = torch.cat([nf4.midpoints("nf4"), nf4.midpoints("fp4"), -nf4.midpoints("fp4"), torch.ones(3)])
    near = torch.cat([points, torch.nextafter(points, torch.ones(())), torch.nextafter(points, -torch.ones(()))])
    for scale, quant_type in itertools.product((1.0, 1e-30, 1e-38, 1e-44, 3e38), nf4.QUANT_TYPES):
        w = near * scale
        expected, actual = nf4.quantize_blocks(w, quant_type, 64), cpu.quantize(any_problem(), w, quant_type, 64)
        assert torch.equal(actual[0], expected[0]), (scale, quant_type)
        assert same(actual[1], expected[1]), (scale, quant_type)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("quant_type", nf4.QUANT_TYPES)
def test_dequantize_is_bit_identical(tier: str, width: int, quant_type: str) -> None:
    torch.manual_seed(width)
    for source, blocksize, nested in itertools.product(DTYPES, (32, 64, 4096), (False, True)):
        w = torch.randn(5, width).to(source) if nested else poisoned(5, width, source)
        weight = nf4.pack(w, quant_type, blocksize, nested)
        absmax = nf4.expand_absmax(weight).repeat_interleave(blocksize)[: weight.numel].view(weight.shape)
        data = weight.packed.view(-1).int()
        codes = torch.stack([data >> 4, data & 15], 1).view(-1)[: weight.numel].view(weight.shape)
        by_definition = nf4.table(quant_type)[codes] * absmax
        for dtype in DTYPES:
            actual = cpu.dequantize(any_problem(), weight, dtype)
            assert same(actual, by_definition.to(dtype)), (source, blocksize, nested, dtype)
            assert same(actual, nf4.dequantize(weight, dtype)), (source, blocksize, nested, dtype)


def test_dequantize_overflow_subnormals_out_and_code(tier: str) -> None:
    w = torch.randn(3, 80) * torch.tensor([[1e-6], [1.0], [1e6]])
    weight = nf4.pack(w, "nf4", 32)
    other = weight._replace(code=nf4.as_bytes(torch.linspace(-2, 2, 16)))
    for dtype, packed in itertools.product(DTYPES, (weight, other)):
        expected = nf4.dequantize(packed, dtype)
        out = torch.full((3, 80), float("nan"), dtype=dtype)
        assert cpu.dequantize(any_problem(), packed, dtype, out) is out
        assert same(out, expected)
        strided = torch.full((80, 3), float("nan"), dtype=dtype).t()
        assert same(cpu.dequantize(any_problem(), packed, dtype, strided).contiguous(), expected)


def test_large_outputs_are_streamed_right(tier: str) -> None:
    w = torch.randn(1, (4 << 20) + 99)
    for nested, dtype in ((False, torch.float32), (True, torch.bfloat16)):
        weight = nf4.pack(w, "nf4", 64, nested)
        assert same(cpu.dequantize(any_problem(), weight, dtype), nf4.dequantize(weight, dtype))


def test_misaligned_parts(tier: str) -> None:
    weight = nf4.pack(torch.randn(6, 100), "nf4", 32, True)

    def shift(t: Tensor | None) -> Tensor | None:
        if t is None:
            return None
        return torch.cat([torch.zeros(1, dtype=torch.uint8), t.flatten()])[1:].view(t.shape)

    moved = weight._replace(**{name: shift(getattr(weight, name)) for name in weight._fields[:4]})
    assert same(cpu.dequantize(any_problem(), moved, torch.float32), nf4.dequantize(weight, torch.float32))


@pytest.mark.parametrize("blocks", [0, 1, 255, 256, 257, 5000])
def test_nested_scales_are_bit_identical(tier: str, blocks: int) -> None:
    torch.manual_seed(blocks)
    absmax = torch.rand(blocks)
    if blocks == 5000:
        absmax[:256] = absmax.mean()
    expected, actual = nf4.quantize_absmax(absmax), cpu.quantize_absmax(any_problem(), absmax)
    assert all(same(a, e) for a, e in zip(actual, expected, strict=True))


@pytest.mark.parametrize("p", [0.0, 0.05, 0.5, 0.99999])
def test_dropout_mask_is_the_specification(tier: str, p: float) -> None:
    for (m, k), seed, stream in itertools.product(((1, 1), (3, 77), (40, 200)), (0, 2**63 - 2), (0, 65537)):
        problem = any_problem("dropout_mask")._replace(m=m, k=k)
        actual = cpu.dropout_mask(problem, torch.tensor([seed]), stream, p)
        assert torch.equal(actual, philox.dropout_bits(seed, stream, m, k, p)), (m, k, seed, stream)


# --- adapter ops against the fp64 oracle ------------------------------------------------------------------------------

FORMATS = ("dense", "nf4", "nested", "fp4", "code")
# dropout, dora, shared
MODES = {
    "lora": 0,
    "drop": DROPOUT | SAVE_MASK,
    "redrawn": DROPOUT,
    "dora": DORA,
    "dora-peft": DORA | DROPOUT | SAVE_MASK,
    "dora-shared": DORA | DROPOUT | SHARED | SAVE_MASK,
}


class Case:
    """Random operands of one problem, and the fp64 truth."""

    def __init__(
        self,
        m: int,
        n: int,
        k: int,
        r: int,
        dtype: torch.dtype,
        fmt: str,
        flags: int,
        adapter: torch.dtype,
        blocksize: int = 32,
    ) -> None:
        self.x, self.dy = torch.randn(m, k).to(dtype), torch.randn(m, n).to(dtype)
        dense = (torch.randn(n, k) / k**0.5).to(dtype)
        self.weight: Tensor | PackedWeight = dense
        if fmt != "dense":
            self.weight = nf4.pack(dense, "fp4" if fmt == "fp4" else "nf4", blocksize, fmt == "nested")
            if fmt == "code":
                self.weight = self.weight._replace(code=nf4.as_bytes(nf4.table("nf4") * 1.5))
            self.w = nf4.dequantize(self.weight, torch.float32).double()
        else:
            self.w = dense.double()
        self.a, self.b = (torch.randn(r, k) / k**0.5).to(adapter), torch.randn(n, r).to(adapter)
        self.scale, self.p, self.stream = 0.75, 0.3, 3
        self.seed = torch.tensor([1234567890123]) if flags & DROPOUT else None
        self.bias = torch.randn(n) if flags & BIAS else None
        truth = (self.w, self.a.double(), self.b.double(), self.scale)
        self.norm = reference.dora_norm(*truth).float() if flags & DORA else None
        self.mag = torch.rand(n) + 0.5 if flags & DORA else None
        kind = {"dense": "dense", "fp4": "fp4"}.get(fmt, "nf4")
        form = DENSE if kind == "dense" else Format(kind, blocksize, fmt == "nested", fmt == "code")
        self.problem = Problem("lora_fwd", m, n, k, r, dtype, adapter, form, flags, "cpu")

    def dropout(self) -> reference.Dropout | None:
        problem = self.problem
        if not problem.flags & DROPOUT:
            return None
        bits = philox.dropout_bits(int(self.seed.item()), self.stream, problem.m, problem.k, self.p)
        shared = "shared" if problem.flags & SHARED else "peft"
        return reference.Dropout(philox.unpack_bits(bits, problem.k), philox.keep_scale(self.p), shared)

    def adapter(self) -> reference.Adapter:
        return reference.in_dtype(reference.Adapter(self.a, self.b, self.scale, self.mag, self.norm), torch.float64)

    def forward(self) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        dropout = (self.seed, self.stream, self.p)
        return cpu.lora_fwd(
            self.problem, self.x, self.weight, self.bias, self.a, self.b, self.scale, self.mag, self.norm, *dropout
        )

    def backward(
        self, h: Tensor | None, mask: Tensor | None, z: Tensor | None, flags: int | None = None
    ) -> tuple[Tensor | None, ...]:
        problem = self.problem._replace(op="lora_bwd", flags=self.problem.flags if flags is None else flags)
        saved = (h, mask, z, self.seed, self.stream, self.p)
        operands = (self.a, self.b, self.scale, self.mag, self.norm)
        return cpu.lora_bwd(problem, self.dy, self.x, self.weight, *operands, *saved)

    def truth(self) -> tuple[reference.Forward, reference.Gradients]:
        bias = None if self.bias is None else self.bias.double()
        drop, adapter = self.dropout(), self.adapter()
        forward = reference.forward(self.x.double(), self.w, adapter, bias, drop)
        return forward, reference.backward(self.dy.double(), self.x.double(), self.w, adapter, drop)


def close(name: str, actual: Tensor | None, expected: Tensor, budget: float) -> None:
    """Norm-wise relative error, overall and of the worst row (rows may cancel: they get four times as much)."""
    assert actual is not None, name
    assert actual.shape == expected.shape, name
    if not actual.numel():
        return
    error = actual.double() - expected
    size = expected.norm().item()
    assert error.norm().item() <= budget * size, (name, error.norm().item() / size, budget)
    rows = error.reshape(error.shape[0], -1).norm(dim=1).max().item()
    typical = size / error.shape[0] ** 0.5
    assert rows <= 4 * budget * typical, (name, rows / typical, budget)


def budgets(dtype: torch.dtype, adapter: torch.dtype, tier: str) -> dict[str, float]:
    """Rounding of the outputs, plus fp32 sums; with bf16 dot products also the rounding of the weight and of c o dy."""
    exact = 2e-6
    base = exact + UNIT[dtype]
    if dtype == torch.bfloat16 and tier == "avx512_bf16":
        base = 1.25 * UNIT[dtype]
    small = exact + (UNIT[adapter] if adapter != torch.float32 else 0)
    return {"y": base, "h": exact, "z": base, "dx": base, "da": small, "db": small, "dmag": base, "dbias": exact}


def check(case: Case, tier: str) -> None:
    flags, limits = case.problem.flags, budgets(case.problem.dtype, case.problem.adapter_dtype, tier)
    forward, gradients = case.truth()
    y, h, mask, z = case.forward()
    assert y.dtype == case.problem.dtype
    close("y", y, forward.y, limits["y"])
    assert (h is not None, z is not None) == (bool(flags & TRAIN), bool(flags & TRAIN and flags & DORA))
    assert (mask is not None) == bool(flags & TRAIN and flags & DROPOUT and flags & SAVE_MASK)
    if not flags & TRAIN:
        return
    close("h", h, forward.h, limits["h"])
    if z is not None:
        close("z", z, forward.z, limits["z"])
    dx, da, db, dmag, dbias = case.backward(h, mask, z)
    for name, need, actual, expected in (
        ("dx", NEED_DX, dx, gradients.dx),
        ("da", NEED_DA, da, gradients.da),
        ("db", NEED_DB, db, gradients.db),
        ("dmag", NEED_DMAG, dmag, gradients.dmag),
        ("dbias", NEED_DBIAS, dbias, gradients.dbias),
    ):
        if flags & need and expected is not None:
            close(name, actual, expected, limits[name])
        else:
            assert actual is None, name


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_the_oracle(tier: str, mode: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    needs = ALL_NEEDS if MODES[mode] & DORA else ALL_NEEDS & ~NEED_DMAG
    sizes = ((1, 33, 64, 8), (2, 40, 96, 1), (5, 37, 75, 3), (16, 128, 128, 16), (33, 50, 100, 24), (130, 101, 80, 100))
    for (m, n, k, r), fmt in itertools.product(sizes, FORMATS):
        check(Case(m, n, k, r, dtype, fmt, MODES[mode] | TRAIN | BIAS | needs, torch.float32), tier)


def test_more_tiles_chunks_and_long_sums(tier: str) -> None:
    torch.manual_seed(1)
    for dtype, fmt, mode in (
        (torch.float32, "nested", "dora-peft"),
        (torch.bfloat16, "nf4", "drop"),
        (torch.bfloat16, "dense", "dora-peft"),
    ):
        flags = MODES[mode] | TRAIN | ALL_NEEDS & ~(0 if MODES[mode] & DORA else NEED_DMAG)
        check(Case(1061, 401, 611, 16, dtype, fmt, flags, torch.float32), tier)
        check(Case(17, 203, 1100, 5, dtype, fmt, flags, torch.float32), tier)


def test_edges_of_panels_and_groups_of_tokens(tier: str) -> None:
    """Every remainder of the register block's rows and lanes, of whole and of broken 4-bit blocks."""
    torch.manual_seed(6)
    needs = ALL_NEEDS & ~NEED_DMAG
    for dtype, fmt in ((torch.float32, "nested"), (torch.bfloat16, "fp4"), (torch.bfloat16, "dense")):
        for m in (10, 11, 12, 13, 14, 15, 23, 25):
            check(Case(m, 64 + 16 * (m % 4) + m, 128, 8, dtype, fmt, TRAIN | needs, torch.float32), tier)
            check(Case(m, 96, 32 * (m % 7 + 1), 17, dtype, fmt, MODES["drop"] | TRAIN | needs, torch.float32), tier)
    for dtype in DTYPES:  # tiles that end inside a depth block, rows of one cache set, odd rows
        check(Case(70, 1024, 1024, 16, dtype, "nf4", TRAIN | needs, torch.float32), tier)
        check(Case(31, 129, 520, 33, dtype, "dense", MODES["drop"] | TRAIN | needs, torch.float32), tier)


def test_small_batches_of_wide_layers(tier: str) -> None:
    torch.manual_seed(2)
    for m, dtype, fmt in itertools.product(range(1, 18), DTYPES, ("dense", "nested", "fp4")):
        check(Case(m, 67, 1024, 17, dtype, fmt, BIAS, torch.float32), tier)
        check(Case(m, 67, 1024, 16, dtype, fmt, DORA | TRAIN, torch.float32), tier)


@pytest.mark.parametrize("adapter", DTYPES, ids=str)
def test_adapter_dtypes_and_needs(tier: str, adapter: torch.dtype) -> None:
    torch.manual_seed(3)
    needs = (0, NEED_DX, NEED_DA, NEED_DB, NEED_DMAG, NEED_DBIAS, NEED_DA | NEED_DB, ALL_NEEDS)
    for dtype, need, mode in itertools.product(DTYPES, needs, ("dora-peft", "drop")):
        if mode == "drop":
            need &= ~NEED_DMAG
        check(Case(9, 30, 64, 4, dtype, "nf4", MODES[mode] | TRAIN | need, adapter), tier)
        check(Case(9, 30, 64, 4, dtype, "nf4", MODES[mode] & ~SAVE_MASK | need, adapter), tier)


def test_no_tokens(tier: str) -> None:
    for mode, dtype in itertools.product(MODES.values(), DTYPES):
        needs = ALL_NEEDS if mode & DORA else ALL_NEEDS & ~NEED_DMAG
        case = Case(0, 24, 64, 8, dtype, "nf4", mode | TRAIN | needs, torch.float32)
        y, h, mask, z = case.forward()
        assert y.shape == (0, 24)
        dx, *others = case.backward(h, mask, z)
        assert dx is not None and dx.shape == (0, 64)
        assert all(t is None or not t.any() for t in others)


def test_a_zero_b_leaves_the_base_untouched(tier: str) -> None:
    for m, dtype in itertools.product((1, 8, 40), DTYPES):
        case = Case(m, 96, 128, 8, dtype, "nf4", 0, torch.float32)
        case.b = torch.zeros_like(case.b)
        with_adapter = case.forward()[0]
        case.a = torch.zeros_like(case.a)
        assert torch.equal(with_adapter, case.forward()[0])


@pytest.mark.parametrize("fmt", FORMATS)
def test_dora_norm(tier: str, fmt: str) -> None:
    torch.manual_seed(4)
    for (n, k, r), dtype in itertools.product(((5, 33, 1), (101, 600, 7), (200, 64, 16)), DTYPES):
        case = Case(1, n, k, r, dtype, fmt, DORA, torch.float32)
        problem = case.problem._replace(op="dora_norm")
        norm = cpu.dora_norm(problem, case.weight, case.a, case.b, case.scale)
        expected = reference.dora_norm(case.w, case.a.double(), case.b.double(), case.scale)
        torch.testing.assert_close(norm.double(), expected, rtol=2e-6, atol=0)


@pytest.mark.parametrize(("n", "k", "r", "scale"), [(192, 576, 8, 2.0), (37, 999, 24, 1.3), (128, 1536, 16, 0.5)])
def test_dora_norm_is_rounded_as_torch_rounds_it(tier: str, n: int, k: int, r: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(n)
    w, a, b = (torch.randn(size, generator=generator) * 0.1 for size in ((n, k), (r, k), (n, r)))
    product = torch.zeros(n, k)
    for i in range(r):  # one term after the other, as a matrix product of few terms adds them
        term = b[:, i : i + 1].double() * a[i].double()
        product = (product.double() + (term.float() if tier == "scalar" else term)).float()  # scalar has no fma
    problem = Problem("dora_norm", 0, n, k, r, torch.float32, torch.float32, DENSE, 0, "cpu")
    found = cpu.dora_norm(problem, w, a, b, scale)
    assert same(found, torch.linalg.norm(w + scale * product, dim=1))
