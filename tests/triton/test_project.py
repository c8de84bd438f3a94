"""g, db, dmag, dbias and the scaled dy, from one read of dy or two."""

from __future__ import annotations

import pytest
import torch

from fastlora.backends.triton import project as module
from fastlora.backends.triton.launch import INTERPRETER, TARGETS, cdiv, record
from fastlora.backends.triton.project import project
from fastlora.backends.triton.shrink import rank_block
from fastlora.testing import guarded
from tests.triton.product_tools import DTYPES, close, poisoned

# m, n, r, dtype of dy, dtype of b, splits, what is asked for
CASES = [
    (1, 100, 8, "bf16", "fp32", 3, "g db"),
    (65, 70, 1, "bf16", "fp32", 3, "g db dbias"),
    (33, 33, 16, "bf16", "bf16", 1, "g db"),
    (17, 65, 24, "bf16", "fp32", 3, "g"),
    (17, 3, 100, "bf16", "fp32", 1, "g db dora"),
    (100, 40, 3, "bf16", "fp32", 3, "g db dora dmag dbias d"),
    (33, 33, 3, "bf16", "fp32", 1, "g db dora dmag e"),
    (33, 70, 8, "bf16", "fp32", 1, "g dora"),
    (65, 33, 8, "bf16", "fp32", 1, "db dbias"),
    (65, 33, 3, "bf16", "fp32", 1, "dora dmag"),
    (33, 65, 8, "fp16", "fp32", 3, "g db dora dmag d"),
    (17, 33, 24, "fp16", "fp16", 1, "g db e dora"),
    (65, 40, 1, "fp32", "fp32", 1, "g db dbias"),
    (33, 33, 24, "fp32", "fp32", 1, "g db dora dmag dbias e"),
    (3, 1, 3, "fp32", "bf16", 1, "g db"),
]


def _inputs(m, n, r, dtype, adapter):
    generator = torch.Generator().manual_seed(m + 7 * n + 31 * r)

    def randn(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator)

    kind = DTYPES[dtype]
    made = {
        "dy": randn(m, n).to(kind),
        "b": randn(n, r).to(DTYPES[adapter]),
        "h": randn(m, r),
        "mag": (1 + 0.3 * randn(n)).to(DTYPES[adapter]),
        "norm": 0.5 + randn(n).abs(),
        "z": randn(m, n).to(kind),
    }
    return {name: guarded(t) for name, t in made.items()}


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_project(case, together, monkeypatch):
    m, n, r, dtype, adapter, splits, asked = case
    names = asked.split()
    walks = bool({"db", "dmag", "dbias", "d", "e"} & set(names))
    if together and not ("g" in names and walks):
        pytest.skip("one walk either way")
    guards = _inputs(m, n, r, dtype, adapter)
    dy, b, h, mag, norm, z = (guards[name].tensor for name in ("dy", "b", "h", "mag", "norm", "z"))
    monkeypatch.setattr(module, "one_pass", lambda *args, **options: together)
    options = {
        "scale": 1.7,
        "mag": mag if "dora" in names else None,
        "norm": norm if "dora" in names else None,
        "z": z if "dmag" in names else None,
        "need_g": "g" in names,
        "need_db": "db" in names,
        "need_dmag": "dmag" in names,
        "need_dbias": "dbias" in names,
        "scaled": {"d", "e"}.intersection(names).pop() if {"d", "e"} & set(names) else None,
        "splits": splits,
    }
    hidden = h if "db" in names else None
    with poisoned(monkeypatch) as made, record(run=True) as launches:
        out = project(dy, b, hidden, **options)
    reads = [launch.name for launch in launches if launch.name != "_finish_kernel"]
    assert reads == ["_rows_kernel"] * ("g" in names and not together) + ["_walk_kernel"] * walks
    again = project(dy, b, hidden, **options, wide=True)
    for first, second in zip(out, again, strict=True):
        assert (first is None) == (second is None) and (first is None or torch.equal(first, second))
    assert all(guard.intact() for guard in [*guards.values(), *made])
    for name, got in zip(("g", "db", "dmag", "dbias"), out, strict=False):
        assert (got is not None) == (name in names) and (got is None or got.dtype == torch.float32)

    c = mag.double() / norm.double() if "dora" in names else torch.ones(n, dtype=torch.float64)
    d = dy.double() * c
    one = splits == 1
    if out.g is not None:
        folded = b.float() * c.float()[:, None]
        eager = dy.float() @ (folded.to(dy.dtype).float() if one else folded)
        close("g", out.g, d @ b.double(), eager, d, b.double())
    if out.db is not None:
        small = h.to(dy.dtype).float() if one else h
        eager = 1.7 * c.float()[:, None] * (dy.float().T @ small)
        close("db", out.db, 1.7 * d.T @ h.double(), eager, 1.7 * d.T, h.double())
    if out.dmag is not None:
        ref = (dy.double() * z.double()).sum(0) / norm.double()
        eager = (dy.float() * z.float()).sum(0) / norm
        close("dmag", out.dmag[:, None], ref[:, None], eager[:, None], dy.double().T, z.double() / norm.double())
    if out.dbias is not None:
        ref = dy.double().sum(0)[:, None]
        close("dbias", out.dbias[:, None], ref, dy.float().sum(0)[:, None], dy.double().T, torch.ones(m, 1))
    if options["scaled"] is not None:
        factor = mag.float() / norm - (1.0 if "e" in names else 0.0)
        assert out.d is not None and torch.equal(out.d, (dy.float() * factor).to(dy.dtype))
    else:
        assert out.d is None


def test_one_pass_is_chosen_by_size():
    def launches(m, n, r):
        with record(run=True) as made:
            project(torch.randn(m, n).bfloat16(), torch.randn(n, r), torch.randn(m, r), need_db=True)
        return [launch.name for launch in made]

    assert launches(65, 100, 1) == ["_walk_kernel", "_finish_kernel"]
    assert launches(65, 100, 24) == ["_rows_kernel", "_walk_kernel", "_finish_kernel"]


def test_no_token():
    dy, b, z = torch.empty(0, 9), torch.randn(9, 3), torch.empty(0, 9)
    out = project(dy, b, torch.empty(0, 3), z=z, need_db=True, need_dmag=True, need_dbias=True, scaled="d")
    assert out.g is not None and out.g.shape == (0, 3) and out.d is not None and out.d.shape == (0, 9)
    assert torch.equal(out.db, torch.zeros(9, 3))
    assert torch.equal(out.dmag, torch.zeros(9)) and torch.equal(out.dbias, torch.zeros(9))


def test_rank_zero_still_sums():
    dy = torch.randn(33, 20)
    out = project(dy, torch.empty(20, 0), need_g=False, need_dbias=True)
    torch.testing.assert_close(out.dbias, dy.sum(0))


def test_nan_stays_in_its_row_of_g_and_its_column_of_db():
    dy, b, h = torch.randn(20, 40), torch.randn(40, 1), torch.randn(20, 1)
    dy[7, 33] = float("nan")
    out = project(dy, b, h, need_db=True)
    assert out.g is not None and out.db is not None
    assert out.g[7].isnan().all() and out.g[[*range(7), *range(8, 20)]].isfinite().all()
    assert out.db[33].isnan().all() and out.db[[*range(33), *range(34, 40)]].isfinite().all()


@pytest.mark.parametrize("name", ["interpreter", *TARGETS])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_tiles_fit_the_device_and_chains_are_short(name, dtype):
    device = INTERPRETER if name == "interpreter" else TARGETS[name]
    for r in (1, 16, 24, 64, 100, 256):
        for left in (False, True):
            for elementwise in (0, 1, 3):
                tile = module.tile_walk(device, r, dtype, left=left, elementwise=elementwise)
                assert tile.BLOCK_N % 8 == 0 and tile.BLOCK_M >= 16
                stage = tile.BLOCK_M * (tile.BLOCK_N * dtype.itemsize + rank_block(r) * 4)
                if device.kind == "cuda":
                    assert tile.num_stages >= 2 and 2 * stage <= device.shared_memory
                for m in (1, 100, 8192, 200_000):
                    planes = module.planes_walk(device, m, 4096, tile)
                    assert 1 <= planes <= cdiv(m, tile.BLOCK_M)
                    if device.kind != "interpreter":
                        assert cdiv(m, planes) <= 4096
