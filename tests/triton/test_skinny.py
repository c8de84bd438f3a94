"""The skinny kernels: budgets for every weight format, the permutations that decode, guard bands, repeatability."""

from __future__ import annotations

import re

import pytest
import torch

from fastlora.backends.triton import skinny
from fastlora.backends.triton.launch import TARGETS, record
from fastlora.math import nf4
from tests.triton.pairwise import pairwise
from tests.triton.product_tools import DTYPES, Layer, check_forward, make_layer, poisoned

# k a multiple of the blocksize, or not; one step of k or several; odd everything.
SHAPES = [(1, 33, 64), (3, 40, 320), (17, 31, 192), (33, 70, 130), (16, 5, 101), (2, 100, 256)]
OPTIONS = {
    "dtype": list(DTYPES),
    "adapter": list(DTYPES),
    "shape": SHAPES,
    "quant": ["nf4", "nf4 nested", "fp4", "fp4 nested"],
    "blocksize": [32, 64, 128, 256],
    "r": [0, 1, 3, 8, 24, 100],
    "dora": [False, True],
    "bias": [False, True],
    "need_z": [False, True],
}
CASES = pairwise(OPTIONS, lambda choice: choice["adapter"] in ("fp32", choice["dtype"]))


def layer_of(choice: dict) -> Layer:
    options = {key: choice[key] for key in ("quant", "blocksize", "dora", "bias")}
    return make_layer(
        *choice["shape"], choice["r"], DTYPES[choice["dtype"]], adapter=DTYPES[choice["adapter"]], **options
    )


def run(layer: Layer, need_z: bool = False, wide: bool | None = None):
    h, b = (layer.h, layer.b) if layer.b.shape[1] else (None, None)
    beside = {"mag": layer.mag, "norm": layer.norm, "bias": layer.bias}
    return skinny.skinny(layer.x, layer.packed, h, b, layer.scale, **beside, need_z=need_z, wide=wide)


def name_of(choice: dict) -> str:
    return "-".join(str(value).replace(" ", "") for value in choice.values())


@pytest.mark.parametrize("choice", CASES, ids=name_of)
def test_forward(choice, monkeypatch):
    layer = layer_of(choice)
    with poisoned(monkeypatch) as made, record(run=True) as launches:
        y, z = run(layer, choice["need_z"])
    assert len(launches) == 2
    assert (z is not None) == choice["need_z"]
    check_forward(layer, y, z)
    assert layer.intact()
    assert all(guard.intact() for guard in made)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("k", [192, 101])
def test_wide_offsets_and_a_second_run_give_the_same_bits(dtype, k):
    layer = make_layer(18, 40, k, 8, dtype, quant="nf4 nested", dora=True)
    first = run(layer, True)
    for wide in (None, True):
        assert all(torch.equal(a, b) for a, b in zip(first, run(layer, True, wide), strict=True))


def test_b_of_zeros_gives_the_frozen_layer_to_the_bit():
    layer = make_layer(5, 40, 192, 8, torch.bfloat16, quant="nf4 nested")
    frozen, _ = skinny.skinny(layer.x, layer.packed, None, None, 1.0)
    zero, _ = run(layer._replace(b=torch.zeros_like(layer.b)))
    assert torch.equal(frozen, zero)


@pytest.mark.parametrize("k", [192, 101])
def test_nan_stays_in_its_row(k):
    layer = make_layer(20, 33, k, 8, torch.bfloat16, quant="nf4")
    clean, _ = run(layer)
    layer.x[5, 3] = float("nan")
    y, _ = run(layer)
    assert y[5].isnan().all()
    rest = torch.arange(20) != 5
    assert torch.equal(y[rest], clean[rest])


def test_empty_batches():
    layer = make_layer(0, 8, 64, 2, torch.float32, quant="nf4", dora=True)
    with record(run=True) as launches:
        y, z = run(layer, True)
    assert y.shape == z.shape == (0, 8)
    assert not launches


def test_a_table_of_its_own_is_used():
    layer = make_layer(3, 33, 128, 4, torch.bfloat16, quant="nf4")
    own = nf4.table("nf4").flip(0) * 0.9
    packed = layer.packed._replace(code=nf4.as_bytes(own))
    layer = layer._replace(packed=packed, w=nf4.dequantize(packed, torch.float32))
    y, _ = run(layer)
    check_forward(layer, y, None)


@pytest.mark.parametrize("name", TARGETS)
def test_slices_cover_k_and_fill_the_device(name):
    at = TARGETS[name]
    for n, k in [(14336, 4096), (4096, 4096), (4096, 14336), (33, 64), (1, 1)]:
        for m in (1, 17, 64):
            tile = skinny.tile_skinny(at, m, torch.bfloat16)
            splits = skinny.splits_of(at, n, k, tile)
            steps = -(-k // tile.BLOCK_K)
            each = -(-steps // splits)
            assert each * splits >= steps
            assert each * (splits - 1) < steps  # no slice without work
            if steps >= 16:
                assert splits * -(-n // tile.BLOCK_N) >= at.sms


# --- the permutations: no interpreter runs PTX, so its few instructions are evaluated here --------------------------


def prmt(a: int, b: int, selector: int) -> int:
    """PTX ISA, `prmt.b32` in its default mode: bit 3 of a selector nibble replicates the chosen byte's sign."""
    pool = [(a | b << 32) >> 8 * i & 0xFF for i in range(8)]
    out = 0
    for i in range(4):
        nibble = selector >> 4 * i & 0xF
        byte = pool[nibble & 7]
        out |= (0xFF * (byte >> 7) if nibble & 8 else byte) << 8 * i
    return out


def evaluate(text: str, inputs: dict[str, int]) -> dict[str, int]:
    """The registers after the instructions of a PTX block."""
    values = dict(inputs)
    steps = {
        "and": lambda a, b: a & b,
        "or": lambda a, b: a | b,
        "shr": lambda a, b: a >> b,
        "prmt": prmt,
    }
    for line in text.strip("{} ").split(";"):
        if not line.strip() or ".reg" in line:
            continue
        op, out, *given = re.split(r"[\s,]+", line.strip())
        values[out] = steps[op.split(".")[0]](*(values[v] if v in values else int(v, 0) for v in given))
    return values


@pytest.mark.parametrize("quant_type", nf4.QUANT_TYPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_permutations_decode_every_byte_in_every_place(quant_type, dtype):
    words = skinny.code_words(quant_type, dtype, torch.device("cpu"))
    assert words.shape == (8, 32)
    assert torch.equal(words, words[:, :1].expand(8, 32))
    given = {f"${5 + 4 * i + j}": int(words[i, 0]) & 0xFFFFFFFF for i in range(8) for j in range(4)}
    bits = [v & 0xFFFF for v in nf4.table(quant_type).to(dtype).view(torch.int16).tolist()]
    for byte in range(256):
        packed = [byte, 255 - byte, byte * 7 & 0xFF, byte ^ 0x5A]
        word = sum(value << 8 * i for i, value in enumerate(packed))
        out = evaluate(skinny.DECODE_ASM.value, given | {"$4": word})
        high, low = out["$0"] | out["$1"] << 32, out["$2"] | out["$3"] << 32
        assert [high >> 16 * i & 0xFFFF for i in range(4)] == [bits[value >> 4] for value in packed]
        assert [low >> 16 * i & 0xFFFF for i in range(4)] == [bits[value & 15] for value in packed]


def test_only_cuda_and_16_bits_and_standard_tables_are_permuted():
    weight = make_layer(1, 4, 64, 1, torch.float32, quant="nf4").packed
    assert skinny.words_for(TARGETS["sm_90"], weight, torch.bfloat16) is not None
    assert skinny.words_for(TARGETS["sm_90"], weight, torch.float32) is None
    assert skinny.words_for(TARGETS["gfx942"], weight, torch.bfloat16) is None
    own = weight._replace(code=nf4.as_bytes(nf4.table("nf4")))
    assert skinny.words_for(TARGETS["sm_90"], own, torch.bfloat16) is None
