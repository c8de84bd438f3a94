"""Several adapters in one batch: values by budget, masks, untouched rows, what is read and written, launches."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import torch
import triton
import triton.language as tl

from fastlora import backends, testing
from fastlora.backends import reference
from fastlora.backends.triton import grouped, grouped_backward, grouped_forward, grouped_members
from fastlora.backends.triton.grouped_members import find_tile, members
from fastlora.backends.triton.launch import INTERPRETER, PRECISE_RANK, TARGETS, cdiv, next_power_of_2, record
from fastlora.dispatch import registry
from fastlora.math import philox
from fastlora.math.segments import Group, dropout_bits, segments
from fastlora.ops import grouped_schema
from fastlora.ops.schema import flags_of
from fastlora.problem import BIAS, DENSE, DORA, DROPOUT, NEED_DA, NEED_DB, NEED_DMAG, NEED_DX, TRAIN, Problem
from fastlora.testing import Case, guarded, many_case
from tests.triton.product_tools import DTYPES, poisoned

backends.load()

# Adapters by what they do; the fourth has no rows, and row owners say 6, or the number of adapters, for none.
EVERY = (
    {"r": 3},
    {"r": 8, "p": 0.4, "scale": 0.6},
    {"r": 64, "dora": True},
    {"r": 5, "dora": True, "p": 0.3},
    {"r": 1, "dora": True, "p": 0.25, "scale": 2.5},
    {"r": 24, "dora": True, "p": 0.5, "dora_dropout": "shared"},
)
LORA = ({"r": 16}, {"r": 16, "scale": 0.5}, {"r": 16})  # one rank
DROPPED = ({"r": 4, "p": 0.3}, {"r": 31}, {"r": 2, "p": 0.6})
MIXES = {"every": EVERY, "lora": LORA, "dropped": DROPPED}
M = 50  # more than the 48 that one chain sums in the interpreter


def owners(count: int, m: int = M, without: int = 3) -> tuple[int, ...]:
    """Adapters and rows without one in a random order: the first has most rows, number `without` none."""
    drawn = torch.randint(0, 2 * count, (m,), generator=torch.Generator().manual_seed(count + m))
    mixed = torch.where(drawn > count, 0, drawn)
    return tuple(torch.where(mixed == without, count, mixed).tolist())


def case_of(mix: str, m: int = M, **changes) -> testing.ManyCase:
    base = dataclasses.replace(Case(m=m, n=37, k=43, r=1, bias=mix != "lora"), **changes)
    return many_case(base, MIXES[mix], owners(len(MIXES[mix]), m))


@pytest.fixture
def ours(monkeypatch):
    """The grouped ops by this backend, the base by whatever is asked for."""
    run = grouped_schema._run
    monkeypatch.setattr(grouped_schema, "_run", lambda problem, backend, *args: run(problem, "triton", *args))


def judged(case: testing.ManyCase, many: testing.Many, backend: str) -> list[str]:
    """Violations of the budget; above PRECISE_RANK an fp32 adapter beside 16-bit data is rounded, as under autocast."""
    rounded = case.base.dtype != torch.float32 and max(own.r for own in case.adapters) > PRECISE_RANK
    return testing.judge_many(case, many, testing.run_many(case, many, backend), autocast=rounded)


# --- one call of the kernels, every tensor between guard bands --------------------------------------------------------


class Call:
    """The arguments of both ops for the mix `every`, as `ops.schema` gives them."""

    def __init__(self, dtype=torch.float32, adapter=torch.float32, m=M, n=37, k=43, ranks=None, mag=None):
        generator = torch.Generator().manual_seed(m + 7 * n + 31 * k)
        self.guards = []

        def keep(t):
            self.guards.append(guarded(t))
            return self.guards[-1].tensor

        def randn(*size):
            return torch.randn(*size, generator=generator)

        self.own = EVERY
        ranks = [own["r"] for own in EVERY] if ranks is None else ranks
        self.owner = torch.tensor(owners(6, m), dtype=torch.int64)
        self.rows = type(segments(self.owner, 6))(*map(keep, segments(self.owner, 6)))
        needs = NEED_DA | NEED_DB
        kinds = [
            flags_of(dropout="p" in own, dora="dora" in own, shared="dora_dropout" in own)
            | needs
            | NEED_DMAG * ("dora" in own)
            for own in EVERY
        ]
        mags = mag or [torch.float32] * 6
        self.group = Group(
            [keep((randn(r, k) / k**0.5).to(adapter)) for r in ranks],
            [keep((randn(n, r) / r**0.5).to(adapter)) for r in ranks],
            [
                keep((1 + 0.3 * randn(n)).to(kind)) if "dora" in own else None
                for own, kind in zip(EVERY, mags, strict=True)
            ],
            [keep(0.5 + randn(n).abs()) if "dora" in own else None for own in EVERY],
            [own.get("scale", 1.3) for own in EVERY],
            [own.get("p", 0.0) for own in EVERY],
            [3 * e + 1 for e in range(6)],
            kinds,
        )
        seed = torch.tensor([2**40 + 3])
        self.mask = keep(dropout_bits(seed, self.owner, self.group.streams, self.group.ps, k))
        self.x, self.y, self.dropped = (keep(randn(m, size).to(dtype)) for size in (k, n, n))
        self.dy, self.dx, self.dropped_dx = (keep(randn(m, size).to(dtype)) for size in (n, k, k))
        self.bias, self.h, self.z = keep(randn(n)), keep(randn(m, max(ranks))), keep(randn(m, n).to(dtype))
        for e, r in enumerate(ranks):
            self.h[self.owner == e, r:] = 0
        flags = DORA | DROPOUT
        sizes = (m, n, k, max(ranks), dtype, adapter, DENSE)
        self.forward = Problem("grouped_fwd", *sizes, flags | BIAS | TRAIN, "cpu", 6)
        self.backward = Problem("grouped_bwd", *sizes, flags | needs | NEED_DX | NEED_DMAG, "cpu", 6)

    def fwd(self, run, mask=True):
        y = guarded(self.y)
        args = (self.x, y.tensor, self.bias, self.group, self.rows, self.mask if mask else None, self.dropped)
        h, z = run(self.forward, *args)
        assert y.intact()
        return y.tensor, h, z

    def bwd(self, run, mask=True):
        dx, bits = guarded(self.dx), self.mask if mask else None
        rest = (self.h, bits, self.z, dx.tensor, self.dropped_dx)
        grads = run(self.backward, self.dy, self.x, self.group, self.rows, *rest)
        assert dx.intact()
        return [dx.tensor, *grads]

    def intact(self):
        return all(guard.intact() for guard in self.guards)


def same(one, other):
    assert len(one) == len(other)
    return all((a is None and b is None) or torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize(
    ("dtype", "adapter", "near"), [("fp32", "fp32", 1e-4), ("bf16", "fp32", 0.06), ("fp16", "bf16", 0.02)]
)
def test_guards_poison_repeats_and_wide(dtype, adapter, near, monkeypatch):
    call = Call(DTYPES[dtype], DTYPES[adapter])
    with poisoned(monkeypatch) as made:
        forward, backward = call.fwd(grouped.grouped_fwd), call.bwd(grouped.grouped_bwd)
        monkeypatch.setattr(grouped_forward, "is_wide", lambda *tensors: True)
        monkeypatch.setattr(grouped_backward, "is_wide", lambda *tensors: True)
        assert same(call.fwd(grouped.grouped_fwd), forward) and same(call.bwd(grouped.grouped_bwd), backward)
    assert call.intact() and all(guard.intact() for guard in made) and len(made) > 10
    for got, want in (
        *zip(forward, call.fwd(reference.grouped_fwd), strict=True),
        *zip(backward, call.bwd(reference.grouped_bwd), strict=True),
    ):
        assert got.dtype == want.dtype
        torch.testing.assert_close(got, want, rtol=near, atol=near * 4)
    none = call.owner == 6
    assert torch.equal(forward[0][none], call.y[none]) and torch.equal(backward[0][none], call.dx[none])
    assert not forward[1][none].any() and not forward[2][none].any()
    assert not forward[1][call.owner == 0, 3:].any() and not forward[2][call.owner == 1].any()
    assert forward[1][call.owner == 0, :3].all() and forward[2][call.owner == 2].all()


def test_a_kind_that_does_not_drop_ignores_the_mask():
    call = Call(m=20)
    call.mask[:] = 0
    call.group = call.group._replace(kinds=[kind & ~DROPOUT for kind in call.group.kinds])
    assert same(call.fwd(grouped.grouped_fwd), call.fwd(grouped.grouped_fwd, mask=False))
    assert same(call.bwd(grouped.grouped_bwd), call.bwd(grouped.grouped_bwd, mask=False))


def test_only_what_is_asked_for(monkeypatch):
    call = Call()
    whole = call.bwd(grouped.grouped_bwd)
    wanted = [NEED_DA, NEED_DB, NEED_DB | NEED_DMAG, 0, NEED_DMAG, NEED_DA]
    bits = (NEED_DA, NEED_DB, NEED_DMAG)
    every = [(e, bit) for e, kind in enumerate(call.group.kinds) for bit in bits if kind & bit]
    kinds = [kind & ~sum(bits) | want for kind, want in zip(call.group.kinds, wanted, strict=True)]
    call.group = call.group._replace(kinds=kinds)
    with poisoned(monkeypatch) as made:
        dx, *grads = call.bwd(grouped.grouped_bwd)
    assert all(guard.intact() for guard in made)
    assert torch.equal(dx, whole[0])
    assert same(grads, [grad for (e, bit), grad in zip(every, whole[1:], strict=True) if wanted[e] & bit])
    rest = (call.dy, None, call.group, call.rows, None, call.mask, None)
    call.group = call.group._replace(kinds=[kind & ~sum(bits) for kind in kinds])
    assert grouped.grouped_bwd(call.backward, *rest[:2], call.group, *rest[3:], None, None) == []


@pytest.mark.parametrize("mag", [torch.bfloat16, torch.float16])
def test_magnitudes_of_several_dtypes(mag):
    call = Call(ranks=[4] * 6, mag=[torch.float32, mag, torch.float32, mag, mag, torch.float32])
    for got, want in zip(call.fwd(grouped.grouped_fwd), call.fwd(reference.grouped_fwd), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_nan_stays_in_its_row_and_its_adapter():
    call = Call(m=40)
    clean, (dx, *grads) = call.fwd(grouped.grouped_fwd), call.bwd(grouped.grouped_bwd)
    row = int((call.owner == 0).nonzero()[0])
    call.x[row, 40] = call.dy[row, 30] = float("nan")
    y, h, z = call.fwd(grouped.grouped_fwd)
    others = [i for i in range(40) if i != row]
    assert y[row].isnan().all() and h[row, :3].isnan().all() and not h[row, 3:].any() and not z[row].any()
    assert same([t[others] for t in (y, h, z)], [t[others] for t in clean])
    again, da, db, *rest = call.bwd(grouped.grouped_bwd)
    assert again[row].isnan().all() and da[:, 40].isnan().all() and db[30].isnan().all()
    assert torch.equal(again[others], dx[others]) and same(rest, grads[2:])
    call.mask[int((call.owner == 1).nonzero()[0])] = 0  # all dropped
    call.x[int((call.owner == 1).nonzero()[0])] = float("nan")
    assert call.fwd(grouped.grouped_fwd)[0][call.owner == 1].isfinite().all()


# --- the ops against the oracle ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mix", "dtype", "adapter", "quant"),
    [
        ("every", "bf16", "fp32", ""),
        ("every", "bf16", "bf16", "nf4"),
        ("every", "fp16", "fp32", "nf4"),
        ("every", "fp32", "fp32", ""),
        ("lora", "bf16", "fp32", "nf4"),
        ("lora", "fp16", "fp16", ""),
        ("dropped", "bf16", "fp32", ""),
        ("dropped", "fp16", "fp32", ""),
    ],
)
def test_within_budget(mix, dtype, adapter, quant, ours):
    case = case_of(mix, dtype=DTYPES[dtype], adapter_dtype=DTYPES[adapter], quant=quant, blocksize=32, nested=True)
    many = testing.make_many(case)
    assert judged(case, many, "reference") == []


@pytest.mark.parametrize(("m", "n", "k"), [(1, 1, 1), (1, 33, 64), (17, 3, 8)])
def test_small_sizes(m, n, k, ours):
    base = Case(m=m, n=n, k=k, r=1, bias=True, dtype=torch.bfloat16)
    case = many_case(base, EVERY, owners(6, m))
    many = testing.make_many(case)
    assert judged(case, many, "reference") == []


def test_no_rows(ours):
    case = many_case(Case(m=0, n=5, k=7, r=1, bias=True), EVERY, ())
    many = testing.make_many(case)
    out = testing.run_many(case, many, "reference")
    assert out.y.shape == (0, 5) and out.dx.shape == (0, 7)
    assert not any(t.any() for own in out.adapters for t in own if t is not None)
    assert [None if t is None else t.shape for t in out.adapters[2]] == [(64, 7), (5, 64), (5,)]


def test_all_by_this_backend():
    """Masks, base and norms too, dispatched by name."""
    case = case_of("every", m=12, dtype=torch.bfloat16, quant="nf4", blocksize=32)
    many = testing.make_many(case)
    assert judged(case, many, "triton") == []


@pytest.mark.parametrize("mix", ["lora", "every"])
def test_permuting_rows_permutes_outputs(mix, ours):
    """Within what the base's rows depend on their place."""
    case = case_of(mix, m=30)
    # A mask is drawn by the row's number.
    case = dataclasses.replace(case, adapters=tuple(dataclasses.replace(own, p=0.0) for own in case.adapters))
    many = testing.make_many(case)
    out = testing.run_many(case, many, "reference")
    mixed = torch.randperm(30, generator=torch.Generator().manual_seed(3))
    moved = dataclasses.replace(case, owner=tuple(case.owner[i] for i in mixed))
    whole = many.whole._replace(x=many.whole.x[mixed], dy=many.whole.dy[mixed])
    again = testing.run_many(moved, many._replace(whole=whole), "reference")
    near = {"rtol": 0, "atol": 5e-5}
    torch.testing.assert_close(again.y, out.y[mixed], **near)
    torch.testing.assert_close(again.dx, out.dx[mixed], **near)
    for mine, theirs in zip(again.adapters, out.adapters, strict=True):
        for one, other in zip(mine, theirs, strict=True):
            assert (one is None) == (other is None)
            if one is not None:
                torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


# --- masks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cols", [1, 8, 75, 300])
@pytest.mark.parametrize("wide", [False, True])
def test_masks_are_the_specification(cols, wide, monkeypatch):
    seed, streams, ps = guarded(torch.tensor([2**62 + 12345])), [4, 0, 2**32 - 1, 65536], [0.25, 0.0, 0.9, 0.5]
    owner = torch.tensor(owners(4, 50, without=9), dtype=torch.int64)
    rows = segments(owner, 4)._replace(owner=guarded(owner).tensor)
    one = torch.zeros(1, cols), torch.zeros(1, 1)
    group = Group([one[0]] * 4, [one[1]] * 4, [None] * 4, [None] * 4, [1.0] * 4, ps, streams, [DROPOUT] * 4)
    held = members(group, owner.device)
    with poisoned(monkeypatch) as made:
        got = grouped_forward.grouped_mask(seed.tensor, held, rows, cols, wide=wide)
    assert torch.equal(got, dropout_bits(seed.tensor, owner, streams, ps, cols))
    assert all(guard.intact() for guard in made) and not got[owner == 4].any()


# --- tiles, tables, launches ------------------------------------------------------------------------------------------


@triton.jit
def _tiles_kernel(out_ptr, offsets_ptr, groups, m, LANES: tl.constexpr, BLOCK_M: tl.constexpr):
    pid = tl.program_id(0)
    e, start, end = find_tile(pid, offsets_ptr, groups, m, LANES, BLOCK_M)
    tl.store(out_ptr + 3 * pid, e)
    tl.store(out_ptr + 3 * pid + 1, start)
    tl.store(out_ptr + 3 * pid + 2, end)


@pytest.mark.parametrize("seed", range(6))
def test_tiles_cover_every_row_once(seed):
    generator = torch.Generator().manual_seed(seed)
    groups, m, block = [(1, 5, 4), (3, 0, 4), (5, 64, 16), (7, 61, 8), (8, 3, 4), (2, 100, 16)][seed]
    owner = torch.randint(0, groups + 1, (m,), generator=generator)
    owner[owner == groups // 2] = groups  # an adapter without rows
    offsets = segments(owner, groups).offsets
    count = grouped_forward.tiles(m, groups, block, rest=True)
    out = torch.full((count, 3), -1, dtype=torch.int32)
    _tiles_kernel[(count,)](out, guarded(offsets).tensor, groups, m, next_power_of_2(groups + 1), block)
    seen = []
    for e, start, end in out.tolist():
        assert end == (m if e == groups else offsets[e + 1])
        seen += [(e, position) for position in range(start, min(start + block, end))]
    ordered = owner.sort(stable=True).values.tolist()
    assert sorted(seen, key=lambda pair: pair[1]) == [(own, position) for position, own in enumerate(ordered)]
    without_rest = grouped_forward.tiles(m, groups, block, rest=False)
    assert all(e == groups or start >= end for e, start, end in out[without_rest:].tolist())


def test_a_table_is_written_once_and_follows_every_value():
    call = Call(m=5)
    device = call.x.device
    first = members(call.group, device).table
    assert members(call.group, device).table is first
    group = call.group
    for change in (
        {"scales": [2.0, *group.scales[1:]]},
        {"ps": [0.5, *group.ps[1:]]},
        {"streams": [9, *group.streams[1:]]},
        {"kinds": [0, *group.kinds[1:]]},
        {"a": [group.a[0].clone(), *group.a[1:]]},
        {"mag": [*group.mag[:5], group.mag[5].clone()]},
    ):
        other = members(group._replace(**change), device).table
        assert other is not first and (other != first).any()
    assert members(group, device).table is first
    assert grouped_members._table.cache_info().maxsize == grouped_members._TABLES


class _Rows:
    """A table on a GPU, as far as `_hold` looks."""

    device = torch.device("cuda", 0)

    def __init__(self):
        self.recorded = []

    def data_ptr(self):
        return id(self)

    def record_stream(self, stream):
        self.recorded.append(stream.cuda_stream)


@pytest.mark.parametrize(("capturing", "stream"), [(True, 7), (False, 7), (False, 5)])
def test_a_table_outlives_its_readers(capturing, stream, monkeypatch):
    """Kept for good once a graph was captured with it; its memory not given away under another stream's kernels."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=stream))
    monkeypatch.setattr(grouped_members, "_captured", {})
    rows = _Rows()
    assert grouped_members._hold(grouped_members._Table(rows, 5)) is rows
    assert list(grouped_members._captured.values()) == [rows] * capturing
    assert rows.recorded == ([7] if stream == 7 and not capturing else [])


def launched(call: Call) -> tuple[list, list]:
    """The launches of a forward and of a backward; nothing runs."""
    with record() as forward:
        call.fwd(grouped.grouped_fwd)
    with record() as backward:
        call.bwd(grouped.grouped_bwd)
    return forward, backward


def names(launches: list) -> list[str]:
    return [launch.name for launch in launches]


def test_launches():
    """Two forward and at most five backward, beside the mask's one and the library's copy out of the common buffer."""
    rows, walk = "_grouped_rows_kernel", "_grouped_walk_kernel"
    forward, backward = launched(Call(m=200, k=75))
    assert names(forward) == [rows, "_grouped_expand_kernel"]
    assert names(backward) == [rows, "_grouped_input_kernel", walk, walk, "_finish_kernel"]
    assert [launch.grid for launch in backward[2:4]] == [(3 * 6 * 5,), (2 * 6 * 5,)]  # blocks, adapters, planes
    forward, backward = launched(Call(m=9))
    assert names(forward) == [rows, "_grouped_expand_kernel"]
    assert names(backward) == [rows, "_grouped_input_kernel", walk, walk]
    assert launched(Call(m=0)) == ([], [])


def test_few_rows_are_split_over_columns():
    generator = torch.Generator().manual_seed(1)
    x, a, b = (torch.randn(*size, generator=generator) for size in ((3, 300), (4, 300), (20, 4)))
    owner = torch.tensor([0, 0, 1])
    rows, y = segments(owner, 1), torch.randn(3, 20, generator=generator)
    group = Group([a], [b], [None], [None], [1.5], [0.0], [0], [0])
    problem = Problem("grouped_fwd", 3, 20, 300, 4, torch.float32, torch.float32, DENSE, TRAIN, "cpu", 1)
    want, got = y.clone(), y.clone()
    h, _ = reference.grouped_fwd(problem, x, want, None, group, rows, None, None)
    with record(run=True) as launches:
        mine, none = grouped.grouped_fwd(problem, x, got, None, group, rows, None, None)
    assert names(launches) == ["_grouped_rows_kernel", "_finish_kernel", "_grouped_expand_kernel"]
    torch.testing.assert_close(mine, h)
    assert none is None
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("name", ["interpreter", *TARGETS])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_tiles_fit_the_device(name, dtype):
    device = INTERPRETER if name == "interpreter" else TARGETS[name]
    for r in (1, 16, 64, 256):
        for m, groups in ((1, 1), (64, 8), (8192, 4), (8192, 64), (100_000, 1)):
            for tile in (
                grouped_forward.tile_grouped_rows(device, m, 4096, r, groups, dtype),
                grouped_forward.tile_grouped_expand(device, m, r, groups, dtype),
            ):
                assert 16 <= tile.BLOCK_M <= max(32, next_power_of_2(cdiv(m, groups))) and tile.num_warps in (4, 8)
            tile = grouped_backward.tile_grouped_walk(device, r, dtype, dmag=False)
            planes = grouped_backward.planes_grouped(device, m, 4096, groups, tile)
            assert 1 <= planes <= cdiv(m, tile.BLOCK_M)
            assert device is INTERPRETER or cdiv(m, planes) <= 4096
            blocks = cdiv(4096, tile.BLOCK_N) * groups
            assert planes == 1 or planes <= max(
                cdiv(m, 4096 if device is not INTERPRETER else 48), 2 * device.sms / blocks
            )


@pytest.mark.parametrize("op", ["grouped_fwd", "grouped_bwd", "grouped_mask"])
def test_chosen_on_a_gpu(op):
    needs = NEED_DX | NEED_DA | NEED_DB
    for m, groups, flags in ((1, 1, 0), (64, 8, 0), (8192, 4, DROPOUT), (8192, 64, DORA)):
        flags |= needs if op == "grouped_bwd" else TRAIN
        sizes = (m, 4096, 4096, 16, torch.bfloat16, torch.float32, DENSE)
        problem = Problem(op, *sizes, flags, "cuda", groups)
        able = []
        for kernel in registry.kernels(op):
            limits = dataclasses.replace(kernel.limits, missing=lambda: "")
            if not registry.why_not(dataclasses.replace(kernel, limits=limits), problem):
                able.append(kernel)
        assert min(able, key=lambda kernel: kernel.seconds(problem)).backend == "triton"
    wide = Problem(op, 8, 8, 8, 512, torch.bfloat16, torch.float32, DENSE, 0, "cuda", 2)
    mine = next(kernel for kernel in registry.kernels(op) if kernel.backend == "triton")
    assert any("rank at most 256" in why for why in registry.why_not(mine, wide))


def test_gradients_share_no_memory():
    call = Call(m=9)
    grads = call.bwd(grouped.grouped_bwd)[1:]
    assert len({grad.untyped_storage().data_ptr() for grad in grads}) == len(grads) == 16
    assert philox.threshold(0.0) == 0
