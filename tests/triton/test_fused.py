"""The one-kernel plan: y, h, the dropout bits and z of every weight format, by budget; guard bands; repeatability."""

from __future__ import annotations

import pytest
import torch

from fastlora.backends.triton import fused
from fastlora.backends.triton.launch import TARGETS, record
from fastlora.backends.triton.shrink import Dropout
from fastlora.math import nf4, philox
from fastlora.testing import roundoff
from tests.triton.pairwise import pairwise
from tests.triton.product_tools import DTYPES, STREAM, Layer, check_forward, close, make_layer, poisoned

SHAPES = [(1, 33, 64), (3, 40, 192), (17, 31, 128), (33, 70, 66), (5, 9, 101), (2, 64, 256)]
OPTIONS = {
    "dtype": list(DTYPES),
    "adapter": list(DTYPES),
    "shape": SHAPES,
    "quant": ["nf4", "nf4 nested", "fp4"],
    "blocksize": [32, 64, 128],
    "r": [0, 1, 8, 24, 100],
    "drop": ["", "seed", "seed saved", "bits", "bits saved"],
    "dora": [False, True],
    "bias": [False, True],
    "need_h": [False, True],
    "need_z": [False, True],
}
CASES = pairwise(OPTIONS, lambda choice: choice["adapter"] in ("fp32", choice["dtype"]))
P = 0.3


def layer_of(choice: dict) -> Layer:
    options = {key: choice[key] for key in ("quant", "blocksize", "dora", "bias")}
    return make_layer(
        *choice["shape"], choice["r"], DTYPES[choice["dtype"]], adapter=DTYPES[choice["adapter"]], p=P, **options
    )


def dropout_of(layer: Layer, drop: str) -> Dropout | None:
    if not drop:
        return None
    bits, seed = (layer.bits, None) if "bits" in drop else (None, layer.seed)
    return Dropout(philox.threshold(P), layer.dscale, STREAM, seed, bits)


def run(layer: Layer, drop: str = "", **needs: object):
    beside = {"mag": layer.mag, "norm": layer.norm, "bias": layer.bias}
    saved = {"dropout": dropout_of(layer, drop), "save_mask": "saved" in drop}
    return fused.fused(layer.x, layer.packed, layer.a, layer.b, layer.scale, **beside, **saved, **needs)


def hidden(layer: Layer, drop: str) -> torch.Tensor:
    """h in float64."""
    keep = layer.keep * layer.dscale if drop else 1.0
    return (layer.x.double() * keep) @ layer.a.double().T


def name_of(choice: dict) -> str:
    return "-".join(str(value).replace(" ", "") for value in choice.values())


@pytest.mark.parametrize("choice", CASES, ids=name_of)
def test_everything(choice, monkeypatch):
    layer, drop = layer_of(choice), choice["drop"]
    with poisoned(monkeypatch) as made, record(run=True) as launches:
        y, h, mask, z = run(layer, drop, need_h=choice["need_h"], need_z=choice["need_z"])
    assert len(launches) == 1
    assert (h is not None, z is not None) == (choice["need_h"], choice["need_z"])
    truth = hidden(layer, drop)
    check_forward(layer, y, z, truth)
    if h is not None:
        assert h.dtype == torch.float32
        xd = layer.x.double() * (layer.keep * layer.dscale if drop else 1.0)
        # fp32 a of a low rank: h as exact as fp32; otherwise a is rounded once to x's dtype.
        exact = layer.a.dtype == torch.float32 and (layer.x.dtype == torch.float32 or choice["r"] <= 32)
        a = layer.a if exact else layer.a.to(layer.x.dtype)
        slack = (
            0 if exact else roundoff(layer.x.dtype) * xd.abs() @ layer.a.double().abs().T / choice["shape"][2] ** 0.5
        )
        close("h", h, truth, (xd @ a.double().T) + slack, xd, layer.a.double())
    assert (mask is not None) == ("saved" in drop)
    if mask is not None:
        assert torch.equal(mask, layer.bits)
    assert layer.intact()
    assert all(guard.intact() for guard in made)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("k", [192, 101])
def test_wide_offsets_a_second_run_and_the_saved_bits_give_the_same_bits(dtype, k):
    layer = make_layer(18, 40, k, 8, dtype, quant="nf4 nested", dora=True, p=P)
    first = run(layer, "seed saved", need_h=True, need_z=True)
    for drop, wide in [("seed saved", None), ("seed saved", True), ("bits saved", None)]:
        again = run(layer, drop, need_h=True, need_z=True, wide=wide)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_b_of_zeros_gives_the_frozen_layer_to_the_bit():
    layer = make_layer(5, 40, 192, 8, torch.bfloat16, quant="nf4 nested")
    zero = run(layer._replace(b=torch.zeros_like(layer.b)), "seed")[0]
    frozen = run(layer._replace(a=layer.a[:0], b=layer.b[:, :0].contiguous()))[0]
    assert torch.equal(frozen, zero)


@pytest.mark.parametrize("drop", ["", "seed"])
def test_nan_stays_in_its_row(drop):
    layer = make_layer(20, 33, 128, 8, torch.bfloat16, quant="nf4", p=P)
    clean = run(layer, drop, need_h=True)
    layer.x[5, 3] = float("nan")
    y, h, _, _ = run(layer, drop, need_h=True)
    assert y[5].isnan().all()
    rest = torch.arange(20) != 5
    assert torch.equal(y[rest], clean[0][rest])
    assert torch.equal(h[rest], clean[1][rest])


def test_what_is_dropped_does_not_reach_h():
    layer = make_layer(6, 33, 128, 8, torch.float32, quant="nf4", p=P)
    row, col = (~layer.keep).nonzero()[0].tolist()
    before = run(layer, "seed", need_h=True)[1]
    layer.x[row, col] = float("inf")
    assert torch.equal(run(layer, "seed", need_h=True)[1], before)


def test_empty_batches():
    layer = make_layer(0, 8, 64, 2, torch.float32, quant="nf4")
    with record(run=True) as launches:
        y, h, mask, z = run(layer, "seed saved", need_h=True, need_z=True)
    assert (y.shape, h.shape, mask.shape, z.shape) == ((0, 8), (0, 2), (0, 8), (0, 8))
    assert not launches


def test_a_table_of_its_own_is_used():
    layer = make_layer(3, 33, 128, 4, torch.bfloat16, quant="nf4")
    packed = layer.packed._replace(code=nf4.as_bytes(nf4.table("nf4").flip(0) * 0.9))
    layer = layer._replace(packed=packed, w=nf4.dequantize(packed, torch.float32))
    check_forward(layer, run(layer)[0], None, hidden(layer, ""))


@pytest.mark.parametrize("name", TARGETS)
def test_tiles_hold_the_accumulators(name):
    """Both accumulators in at most 160 registers a thread."""
    at = TARGETS[name]
    for m in (1, 16, 64, 128):
        for rank in (16, 64, 128, 256):
            tile = fused.tile_fused(at, m, 14336, rank, torch.bfloat16)
            numbers = tile.BLOCK_M * (tile.BLOCK_N + rank)
            assert numbers <= 160 * at.warp * tile.num_warps
