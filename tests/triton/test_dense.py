"""The dense product kernels, forward and backward: budgets, guard bands, paths that must agree to the bit."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fastlora.backends.triton import dense
from fastlora.backends.triton.launch import TARGETS, record
from tests.triton.pairwise import pairwise
from tests.triton.product_tools import DTYPES, Layer, check_forward, close, make_layer, poisoned

# Rows of a multiple of 16 bytes are read by descriptor (64, 96, 40), others by pointer.
SHAPES = [(1, 33, 17), (3, 64, 96), (17, 100, 33), (40, 31, 130), (33, 96, 64), (100, 40, 40)]
OPTIONS = {
    "dtype": list(DTYPES),
    "adapter": list(DTYPES),
    "shape": SHAPES,
    "r": [0, 1, 3, 8, 16, 24, 100],
    "dora": [False, True],
    "bias": [False, True],
    "extra": [False, True],  # z in the forward, the mask in the backward
}
CASES = pairwise(OPTIONS, lambda choice: choice["adapter"] in ("fp32", choice["dtype"]))


def layer_of(choice: dict, **changed: object) -> Layer:
    m, n, k = choice["shape"]
    options = {key: choice[key] for key in ("dora", "bias")} | {"adapter": DTYPES[choice["adapter"]]} | changed
    return make_layer(m, n, k, choice["r"], DTYPES[choice["dtype"]], **options)


def forward(layer: Layer, need_z: bool = False, wide: bool | None = None, **changed: object):
    some = layer.b.shape[1] > 0
    arguments = {"mag": layer.mag, "norm": layer.norm, "bias": layer.bias} | changed
    h, b = (layer.h, layer.b) if some else (None, None)
    return dense.linear(layer.x, layer.w, h, b, layer.scale, **arguments, need_z=need_z, wide=wide)


def name_of(choice: dict) -> str:
    return "-".join(str(value).replace(" ", "") for value in choice.values())


@pytest.mark.parametrize("choice", CASES, ids=name_of)
def test_forward(choice, monkeypatch):
    layer = layer_of(choice)
    with poisoned(monkeypatch) as made, record(run=True) as launches:
        y, z = forward(layer, need_z=choice["extra"])
    assert len(launches) == 1
    assert (z is not None) == choice["extra"]
    check_forward(layer, y, z)
    assert layer.intact()
    assert all(guard.intact() for guard in made)


def backward(layer: Layer, dy: torch.Tensor, g: torch.Tensor, masked: bool, wide: bool | None = None):
    g_, a = (g, layer.a) if g.shape[1] else (None, None)
    arguments = {"bits": layer.bits, "dscale": layer.dscale} if masked else {}
    return dense.linear_dx(dy, layer.w, g_, a, layer.scale, mag=layer.mag, norm=layer.norm, **arguments, wide=wide)


def upstream(layer: Layer) -> tuple[torch.Tensor, torch.Tensor]:
    """dy [m,n] and g = (c ∘ dy) b, fp32 [m,r]."""
    (m, _), n = layer.x.shape, layer.b.shape[0]
    dy = torch.randn(m, n, generator=torch.Generator().manual_seed(m + n)).to(layer.x.dtype)
    return dy, (dy.double() * layer.factor @ layer.b.double()).float()


@pytest.mark.parametrize("choice", CASES, ids=name_of)
def test_backward(choice, monkeypatch):
    layer = layer_of(choice)
    dy, g = upstream(layer)
    with poisoned(monkeypatch) as made, record(run=True) as launches:
        dx = backward(layer, dy, g, choice["extra"])
    assert len(launches) == 1
    drop = layer.keep.double() * layer.dscale if choice["extra"] else 1.0
    d, w = dy.double() * layer.factor, layer.w.double()
    ref = d @ w + layer.scale * drop * (g.double() @ layer.a.double())
    scaled = (dy * layer.factor.to(dy.dtype)) if layer.mag is not None else dy
    small = layer.scale * (g.to(layer.a.dtype) @ layer.a)
    eager = (F.linear(scaled, layer.w.T) + (small.float() * drop)).to(dy.dtype)
    close("dx", dx, ref, eager, d, w)
    assert layer.intact()
    assert all(guard.intact() for guard in made)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_the_paths_by_descriptor_by_pointer_and_with_wide_offsets_agree_to_the_bit(dtype):
    layer = make_layer(40, 96, 64, 24, dtype, dora=True, bias=True)
    dy, g = upstream(layer)
    with record(run=True) as launches:
        results = [(*forward(layer, True, wide), backward(layer, dy, g, True, wide)) for wide in (None, False, True)]
    assert [launch.constexprs["TMA"] for launch in launches] == [True, True, True, True, False, False]
    assert [launch.constexprs["WIDE"] for launch in launches] == [False] * 4 + [True] * 2
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_b_of_zeros_gives_the_frozen_layer_to_the_bit(dtype):
    layer = make_layer(33, 40, 48, 8, dtype)
    frozen, _ = dense.linear(layer.x, layer.w)
    zero, _ = forward(layer._replace(b=torch.zeros_like(layer.b)))
    assert torch.equal(frozen, zero)


@pytest.mark.parametrize("k", [64, 33])
def test_nan_stays_in_its_row(k):
    layer = make_layer(20, 33, k, 8, torch.bfloat16)
    clean, _ = forward(layer)
    layer.x[5, 3] = float("nan")
    y, _ = forward(layer)
    assert y[5].isnan().all()
    rest = torch.arange(20) != 5
    assert torch.equal(y[rest], clean[rest])


def test_empty_batches():
    layer = make_layer(0, 8, 16, 2, torch.float32, dora=True)
    with record(run=True) as launches:
        y, z = forward(layer, need_z=True)
        dx = backward(layer, torch.empty(0, 8), torch.empty(0, 2), True)
    assert y.shape == z.shape == (0, 8)
    assert dx.shape == (0, 16)
    assert not launches


def test_every_output_tile_is_walked_once():
    """More tiles than programs, a last group that is not full: the walk must be a permutation."""
    layer = make_layer(16 * 9 + 1, 70, 16, 1, torch.float32)
    with record(run=True) as launches:
        y, _ = forward(layer)
    assert launches[0].grid == (4,)
    check_forward(layer, y, None)


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_tiles_fit_the_device(name, dtype):
    at = TARGETS[name]
    for m, n in [(1, 128), (64, 4096), (512, 4096), (8192, 14336)]:
        for tma in (False, True):
            for masked, two in ((False, False), (True, False), (False, True)):
                tile = dense.tile_linear(at, m, n, dtype, tma, masked=masked, two=two)
                stage = (tile.BLOCK_M + tile.BLOCK_N) * tile.BLOCK_K * dtype.itemsize
                stages = tile.num_stages if at.kind == "cuda" else 1
                assert stage * stages <= at.shared_memory
    few, many = dense.tile_linear(at, 64, 4096, dtype, True), dense.tile_linear(at, 8192, 4096, dtype, True)
    assert few.BLOCK_M * few.BLOCK_N < many.BLOCK_M * many.BLOCK_N


def test_descriptors_only_where_the_device_and_the_rows_allow_them():
    x = torch.empty(4, 64, dtype=torch.bfloat16)
    assert dense.by_descriptor(TARGETS["sm_90"], x)
    assert dense.by_descriptor(TARGETS["sm_100"], x)
    for name in ("sm_80", "sm_89", "gfx942"):
        assert not dense.by_descriptor(TARGETS[name], x)
    assert not dense.by_descriptor(TARGETS["sm_90"], x, torch.empty(4, 60, dtype=torch.bfloat16))
    assert dense.by_descriptor(TARGETS["sm_90"], torch.empty(4, 60))
    assert not dense.by_descriptor(TARGETS["sm_90"], torch.empty(4 * 64 + 1, dtype=torch.bfloat16)[1:].view(4, 64))
