"""The CPU library's grouped kernels: shapes beyond one tile, every tier, every number of threads, guard bands."""

from __future__ import annotations

import contextlib

import pytest
import torch

from fastlora import settings, testing
from fastlora.backends import _cpu_library, cpu_grouped
from fastlora.math.segments import Group, segments
from fastlora.problem import (
    DENSE,
    DORA,
    DROPOUT,
    NEED_DA,
    NEED_DB,
    NEED_DMAG,
    NEED_DX,
    TRAIN,
    Problem,
)
from fastlora.testing import Case, guarded, many_case

pytestmark = pytest.mark.skipif(bool(_cpu_library.missing()), reason="CPU library not built")
TIERS = _cpu_library.library().tiers if not _cpu_library.missing() else ()


@contextlib.contextmanager
def threads(count):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def wide_case(dtype, rows=700, **changes):
    """More rows of one adapter than any tile holds, one with a single row, one with none, ranks off every multiple."""
    options = [{"r": 17, "p": 0.2}, {"r": 1}, {"r": 33, "dora": True}, {"r": 8}, {"r": 100, "dora": True, "p": 0.3}]
    generator = torch.Generator().manual_seed(9)
    owner = torch.randint(0, 4, (rows,), generator=generator)
    owner[owner == 1] = 5  # no adapter
    owner[owner == 3] = torch.where(torch.rand(int((owner == 3).sum()), generator=generator) < 0.5, 2, 4)
    owner[7] = 1
    base = Case(m=rows, n=75, k=1100, r=1, bias=True, dtype=dtype, adapter_dtype=dtype, **changes)
    return many_case(base, options, owner.tolist())


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_many_rows_and_odd_sizes(tier, dtype):
    case = wide_case(dtype)
    assert max(case.owner.count(e) for e in range(5)) > 256
    assert case.owner.count(3) == 0
    many = testing.make_many(case)
    with settings.override(cpu_tier=tier):
        out = testing.run_many(case, many, "cpu")
    assert testing.judge_many(case, many, out) == []


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize(("n", "k"), [(1, 1), (3, 9), (65, 16), (16, 130)])
def test_small_and_odd_weights(tier, n, k):
    options = [{"r": 1}, {"r": 5, "dora": True, "p": 0.5}, {"r": 16, "p": 0.5}]
    case = many_case(Case(m=5, n=n, k=k, r=1, bias=True), options, (2, 1, 0, 3, 1))
    many = testing.make_many(case)
    with settings.override(cpu_tier=tier):
        out = testing.run_many(case, many, "cpu")
    assert testing.judge_many(case, many, out) == []


def tensors_of(out):
    return [out.y, out.dx, out.dbias, *(t for own in out.adapters for t in own if t is not None)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_number_of_threads_gives_the_same_bits(dtype):
    case = wide_case(dtype)
    many = testing.make_many(case)
    results = []
    for count in (1, 2, 5):
        with threads(count):
            results.append(tensors_of(testing.run_many(case, many, "cpu")))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("tier", TIERS)
def test_a_row_does_not_depend_on_its_neighbours(tier):
    """Any part of a batch gets the same bits: tiles of tokens share reads, never sums."""
    many = testing.make_many(wide_case(torch.float32))
    owner = torch.tensor(wide_case(torch.float32).owner)
    ranks = [own.b.shape[1] for own in many.alone]
    group = Group([own.a for own in many.alone], [own.b for own in many.alone], *[[None] * 5] * 2, *[[1.0] * 5] * 4)
    group = group._replace(ps=[0.0] * 5, streams=[0] * 5, kinds=[0] * 5)

    def deltas(some):
        sizes = (len(some), 75, 1100, max(ranks), torch.float32, torch.float32, DENSE)
        y, dx, rows = torch.zeros(len(some), 75), torch.zeros(len(some), 1100), segments(owner[some], 5)
        x, dy = many.whole.x[some], many.whole.dy[some]
        cpu_grouped.grouped_fwd(Problem("grouped_fwd", *sizes, 0, "cpu", 5), x, y, None, group, rows, None, None)
        problem = Problem("grouped_bwd", *sizes, NEED_DX, "cpu", 5)
        cpu_grouped.grouped_bwd(problem, dy, x, group, rows, None, None, None, dx, None)
        return y, dx

    with settings.override(cpu_tier=tier):
        y, dx = deltas(torch.arange(700))
        for some in (torch.arange(0, 700, 3), torch.arange(5), torch.randperm(700)):
            part_y, part_dx = deltas(some)
            assert torch.equal(part_y, y[some])
            assert torch.equal(part_dx, dx[some])
    assert y.abs().sum() > 0


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_guard_bands(tier, dtype):
    """Inputs lie between NaN, what is changed in place lies between NaN: nothing is read or written outside."""
    generator = torch.Generator().manual_seed(0)
    m, n, k, ranks = 9, 37, 75, (3, 16, 1)

    def randn(*size):
        return torch.randn(*size, generator=generator).to(dtype)

    a, b = [randn(r, k) for r in ranks], [randn(n, r) for r in ranks]
    mag, norm = (randn(n).float().abs() + 0.5 for _ in range(2))
    x, y, dy, dx, late, late_dx = randn(m, k), randn(m, n), randn(m, n), randn(m, k), randn(m, n), randn(m, k)
    rows = segments(torch.tensor([1, 0, 3, 2, 1, 1, 0, 3, 2]), 3)
    needs = NEED_DA | NEED_DB
    kinds = [DORA | DROPOUT | NEED_DMAG | needs, needs, DROPOUT | needs]
    flags = DORA | DROPOUT | TRAIN
    seed = torch.tensor([3])

    def run(wrap):
        made = []

        def put(t):
            made.append(wrap(t))
            return made[-1].tensor if wrap is guarded else made[-1]

        group = Group(
            [put(t) for t in a],
            [put(t) for t in b],
            [put(mag), None, None],
            [put(norm), None, None],
            [0.7, 1.0, 2.0],
            [0.3, 0.0, 0.5],
            [4, 5, 6],
            kinds,
        )
        sizes = (m, n, k, 16, dtype, dtype, DENSE, flags, "cpu", 3)
        mask = put(cpu_grouped.grouped_mask(Problem("grouped_mask", *sizes), rows, group, seed))
        out, dx_out = put(y.clone()), put(dx.clone())
        forward = Problem("grouped_fwd", *sizes)
        h, z = cpu_grouped.grouped_fwd(
            forward, put(x), out, put(randn(n).float() * 0 + 1), group, rows, mask, put(late)
        )
        backward = Problem("grouped_bwd", *sizes[:7], flags | needs | NEED_DX, "cpu", 3)
        grads = cpu_grouped.grouped_bwd(
            backward, put(dy), put(x), group, rows, put(h), mask, put(z), dx_out, put(late_dx)
        )
        if wrap is guarded:
            assert all(each.intact() for each in made)
        return [mask, out, h, z, dx_out, *grads]

    with settings.override(cpu_tier=tier):
        plain, inside = run(lambda t: t.clone()), run(guarded)
    for got, want in zip(inside, plain, strict=True):
        assert torch.equal(got, want)
        assert not got.is_floating_point() or got.isfinite().all()


def test_masks_equal_the_reference_bit_for_bit():
    from fastlora.math.segments import dropout_bits

    owner = torch.tensor([1, 0, 3, 2, 1, 1, 0, 3, 2])
    group = Group([], [], [], [], [1.0] * 3, [0.3, 0.0, 0.5], [4, 5, 70000], [DROPOUT, 0, DROPOUT])
    group = group._replace(a=[torch.zeros(1, 43)] * 3, b=[torch.zeros(2, 1)] * 3)
    problem = Problem("grouped_mask", 9, 2, 43, 1, torch.float32, torch.float32, DENSE, DROPOUT, "cpu", 3)
    seed = torch.tensor([2**41 + 9])
    for tier in TIERS:
        with settings.override(cpu_tier=tier):
            bits = cpu_grouped.grouped_mask(problem, segments(owner, 3), group, seed)
        assert torch.equal(bits, dropout_bits(seed, owner, group.streams, group.ps, 43))


def test_rank_zero_adds_nothing():
    """What AdaLoRA may prune an adapter to."""
    case = many_case(Case(m=4, n=20, k=43, r=1), [{"r": 0}, {"r": 3}], (0, 1, 2, 0))
    many = testing.make_many(case)
    out = testing.run_many(case, many, "cpu")
    none = testing.run_many(testing.ManyCase(case.base, case.adapters, (2, 2, 2, 2)), many, "cpu")
    assert torch.equal(out.y[[0, 2, 3]], none.y[[0, 2, 3]])
    assert torch.equal(out.dx[[0, 2, 3]], none.dx[[0, 2, 3]])
    assert not torch.equal(out.y[1], none.y[1])
