"""h = dscale (mask∘x) aᵀ: values, masks, planes, and what all low-rank kernels share."""

from __future__ import annotations

import pytest
import torch

from fastlora.backends.triton import shrink as module
from fastlora.backends.triton.launch import INTERPRETER, TARGETS, cdiv, record
from fastlora.backends.triton.shrink import Dropout, combine, finish, make_planes, shrink
from fastlora.math import philox
from fastlora.testing import guarded
from tests.triton.product_tools import DTYPES, close, poisoned

P, STREAM = 0.3, 70001
SEED = torch.tensor([0x1234_5678_9ABC])

# m, k, r, dtype of x, dtype of a, splits
CASES = [
    (1, 200, 8, "bf16", "fp32", 3),  # few rows: planes over k
    (3, 33, 1, "bf16", "fp32", 1),
    (17, 100, 16, "bf16", "fp32", 3),
    (33, 3, 3, "fp16", "fp32", 3),
    (33, 70, 24, "bf16", "bf16", 1),
    (65, 33, 8, "fp16", "fp16", 1),
    (17, 65, 24, "fp16", "fp32", 1),
    (3, 200, 100, "fp32", "fp32", 1),
    (17, 1, 1, "fp32", "fp32", 1),
    (100, 8, 3, "fp32", "bf16", 1),
    (33, 64, 16, "bf16", "fp16", 3),
]


def _rounded(a: torch.Tensor, x: torch.Tensor, splits: int) -> torch.Tensor:
    """a as one 16-bit term of x's dtype, or as it is."""
    return a.to(x.dtype).float() if splits == 1 else a.float()


def _inputs(m, k, r, dtype, adapter):
    generator = torch.Generator().manual_seed(m + 7 * k + 31 * r)
    x = guarded(torch.randn(m, k, generator=generator).to(DTYPES[dtype]))
    a = guarded((torch.randn(r, k, generator=generator) / k**0.5).to(DTYPES[adapter]))
    return x, a


@pytest.mark.parametrize("mode", ["plain", "bits", "seed"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_h_and_mask(case, mode, monkeypatch):
    m, k, r, dtype, adapter, splits = case
    x, a = _inputs(m, k, r, dtype, adapter)
    bits, seed = guarded(philox.dropout_bits(SEED, STREAM, m, k, P)), guarded(SEED)
    drawn = Dropout(philox.threshold(P), philox.keep_scale(P), STREAM, seed.tensor, None)
    dropout = {"plain": None, "bits": drawn._replace(seed=None, bits=bits.tensor)}.get(mode, drawn)
    options = {"dropout": dropout, "save_mask": mode == "seed" and k != 64, "splits": splits}
    with poisoned(monkeypatch) as made:
        h, mask = shrink(x.tensor, a.tensor, **options)
        again, _ = shrink(x.tensor, a.tensor, **options)
        wide, wide_mask = shrink(x.tensor, a.tensor, wide=True, **options)
    assert all(guard.intact() for guard in [x, a, bits, seed, *made])
    assert h.dtype == torch.float32 and torch.equal(h, again) and torch.equal(h, wide)
    kept = x.tensor.double()
    if dropout is not None:
        kept = kept * philox.unpack_bits(bits.tensor, k) * dropout.dscale
    eager = kept.float() @ _rounded(a.tensor, x.tensor, splits).T
    close("h", h, kept @ a.tensor.double().T, eager, kept, a.tensor.double().T)
    if options["save_mask"]:
        assert mask is not None and wide_mask is not None
        assert torch.equal(mask, bits.tensor) and torch.equal(wide_mask, bits.tensor)
    else:
        assert mask is None


def test_given_bits_win_over_a_seed_and_are_the_mask_that_is_saved():
    x, a = torch.randn(5, 20), torch.randn(4, 20)
    bits = philox.dropout_bits(SEED, STREAM, 5, 20, P)
    h, mask = shrink(x, a, dropout=Dropout(60000, 2.0, 0, SEED, bits), save_mask=True)
    assert mask is bits
    want = 2 * (x * philox.unpack_bits(bits, 20)) @ a.T
    torch.testing.assert_close(h, want)


@pytest.mark.parametrize("stream", [1, 2**32 - 1])
def test_streams_that_the_compiler_treats_specially(stream):
    x, a = torch.randn(3, 70), torch.randn(1, 70)
    _, mask = shrink(x, a, dropout=Dropout(philox.threshold(P), 1.0, stream, SEED, None), save_mask=True)
    assert mask is not None and torch.equal(mask, philox.dropout_bits(SEED, stream, 3, 70, P))


def test_no_token():
    h, mask = shrink(torch.empty(0, 24), torch.randn(3, 24), dropout=Dropout(9, 1.0, 0, SEED, None), save_mask=True)
    assert h.shape == (0, 3) and mask is not None and mask.shape == (0, 3)


@pytest.mark.parametrize(("dtype", "splits"), [("bf16", 3), ("bf16", 1), ("fp16", 1), ("fp32", 1)])
def test_nan_stays_in_its_row_and_dropped_nan_is_gone(dtype, splits):
    x, a = torch.randn(20, 70).to(DTYPES[dtype]), torch.randn(3, 70)
    clean, _ = shrink(x, a, splits=splits)
    x[7, 69] = float("nan")
    h, _ = shrink(x, a, splits=splits)
    assert h[7].isnan().all() and torch.equal(h[[*range(7), *range(8, 20)]], clean[[*range(7), *range(8, 20)]])
    keep = torch.ones(20, 70, dtype=torch.bool)
    keep[7, 69] = False
    h, _ = shrink(x, a, dropout=Dropout(0, 1.0, 0, None, philox.pack_bits(keep)), splits=splits)
    assert h.isfinite().all()


@pytest.mark.parametrize("splits", [1, 3])
def test_nan_and_infinity_in_the_small_operand_do_not_vanish(splits):
    x, a = torch.ones(2, 33).bfloat16(), torch.ones(3, 33)
    a[0, 32], a[1, 5] = float("nan"), float("inf")
    h, _ = shrink(x, a, splits=splits)
    assert not h[:, :2].isfinite().any() and h[:, 2].eq(33).all()
    h, _ = shrink(x.half(), a)  # rounded to tf32 by hand
    assert h[:, 0].isnan().all() and h[:, 1].isinf().all()
    odd = torch.tensor([0x7FFFFFFF], dtype=torch.int32).view(torch.float32).expand(1, 33).contiguous()
    assert shrink(x.half(), odd)[0].isnan().all()


def test_fp16_products_neither_underflow_nor_overflow():
    """Scales at which a cast to fp16 would give zeros or infinities."""
    x = torch.randn(17, 40).half()
    for scale in (1e-9, 1e6):
        a = torch.randn(5, 40) * scale
        close("h", shrink(x, a)[0], x.double() @ a.double().T, x.float() @ (a / scale).half().float().T * scale, x, a)


def test_columns_are_split_only_where_rows_are_few():
    a = torch.randn(3, 300)
    with record(run=True) as launches:
        shrink(torch.randn(100, 300), a)
    assert [launch.name for launch in launches] == ["_rows_kernel"]
    with record(run=True) as launches:
        shrink(torch.randn(3, 300), a)
    assert [launch.name for launch in launches] == ["_rows_kernel", "_finish_kernel"]
    assert launches[0].grid == (4,)  # one row block, four planes for the four processors


@pytest.mark.parametrize("count", [1, 2, 8, 11])
def test_planes_are_summed(count):
    planes = guarded(torch.randn(count, 5, 67))
    got = combine(planes.tensor, 1.5)
    torch.testing.assert_close(got, 1.5 * planes.tensor.double().sum(0).float())
    assert torch.equal(got, combine(planes.tensor, 1.5)) and planes.intact()


@pytest.mark.parametrize("wide", [False, True])
def test_stacks_of_planes_in_one_launch(wide, monkeypatch):
    shapes, numbers = [(300, 2), (1,), (5, 77), (257,)], [3, 2, 9, 1]
    with poisoned(monkeypatch) as made:
        stacks = [
            make_planes(torch.empty(0), shape, number, factor)
            for shape, number, factor in zip(shapes, numbers, (1.0, -2.0, 0.5, 3.0), strict=True)
        ]
        for stack in stacks:
            stack.planes.copy_(torch.randn(stack.planes.shape))
        with record(run=True) as launches:
            finish(*stacks, None, wide=wide)
    assert len(launches) == 1 and all(guard.intact() for guard in made)
    for stack in stacks[:3]:
        torch.testing.assert_close(stack.out, stack.factor * stack.planes.double().sum(0).float())
        assert stack.early_factor == 1.0
    assert stacks[3].planes is stacks[3].out and stacks[3].early_factor == 3.0


def test_nothing_to_sum_is_no_launch():
    with record() as launches:
        finish(None, make_planes(torch.empty(0), (5,), 1))
    assert not launches


@pytest.mark.parametrize("name", ["interpreter", *TARGETS])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_tiles_fit_the_device(name, dtype):
    device = INTERPRETER if name == "interpreter" else TARGETS[name]
    for r in (1, 16, 24, 64, 100, 256):
        for m in (1, 64, 1000, 8192, 100_000):
            tile = module.tile_rows(device, m, r, dtype)
            assert tile.BLOCK_K % 16 == 0 and tile.BLOCK_M >= 16 and tile.num_warps in (4, 8)
            rank = module.rank_block(r)
            assert rank >= max(r, 16) and rank & (rank - 1) == 0
            stage = tile.BLOCK_K * (tile.BLOCK_M * dtype.itemsize + rank * 4)
            if device.kind == "cuda":
                assert tile.num_stages >= 2 and tile.num_stages * stage <= device.shared_memory
            planes = module.planes_rows(device, m, 4096, tile)
            assert 1 <= planes <= 32 and cdiv(m, tile.BLOCK_M) * planes <= max(device.sms, cdiv(m, tile.BLOCK_M))


def test_precision_of_products():
    for name, device in TARGETS.items():
        amd = name == "gfx942"
        assert module.precision(device, torch.float32) == ("ieee" if amd else "tf32x3")
        assert module.precision(device, torch.float16) == ("ieee" if amd else "tf32")
        for dtype, terms in ((torch.bfloat16, 4), (torch.float16, 1 if amd else 2), (torch.float32, 1)):
            assert module.term_count(device, dtype, 3) == terms and module.term_count(device, dtype, 1) == 1
