"""Dropout masks: Philox against its published vectors, and the mask against ten lines of Python integers."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastlora.errors import ConfigError, DtypeError, ShapeError
from fastlora.math import philox

ONES = 0xFFFFFFFF
# The known answers of Random123's kat_vectors for philox4x32, 10 rounds.
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((ONES,) * 4, (ONES,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def philox_integers(c: tuple[int, ...], k: tuple[int, ...]) -> tuple[int, ...]:
    """Philox4x32-10 in Python's unbounded integers."""
    c0, c1, c2, c3 = c
    for i in range(10):
        k0, k1 = (k[0] + i * 0x9E3779B9) % 2**32, (k[1] + i * 0xBB67AE85) % 2**32
        left, right = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = right // 2**32 ^ c1 ^ k0, right % 2**32, left // 2**32 ^ c3 ^ k1, left % 2**32
    return c0, c1, c2, c3


def kept(seed: int, stream: int, row: int, column: int, p: float) -> bool:
    """The specification, one element at a time."""
    words = philox_integers((column // 8, row % 2**32, row // 2**32, stream), (seed % 2**32, seed // 2**32))
    lane = column % 8
    half = words[lane // 2] >> 16 if lane % 2 else words[lane // 2] & 0xFFFF
    return half >= min(65535, math.floor(p * 65536 + 0.5))


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_known_answers(counter, key, expected):
    assert tuple(word.item() for word in philox.philox4x32(counter, key)) == expected
    assert philox_integers(counter, key) == expected


@settings(derandomize=True, deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**63 - 2),
    stream=st.sampled_from([0, 1, 65536, ONES]),
    rows=st.integers(0, 5),
    cols=st.integers(0, 40),
    row_offset=st.sampled_from([0, 1, 2**32 - 3, 2**32, 2**40 + 7, 2**62]),
    p=st.sampled_from([0.0, 1e-6, 0.05, 0.1, 0.5, 0.9, 0.99999, 0.9999999]),
)
def test_mask_is_the_specification(seed, stream, rows, cols, row_offset, p):
    bits = philox.dropout_bits(seed, stream, rows, cols, p, row_offset=row_offset)
    assert bits.shape == (rows, (cols + 7) // 8)
    assert bits.dtype == torch.uint8
    expected = [[kept(seed, stream, row_offset + row, column, p) for column in range(cols)] for row in range(rows)]
    assert torch.equal(philox.unpack_bits(bits, cols), torch.tensor(expected, dtype=torch.bool).reshape(rows, cols))
    # Bit j, least significant first, of byte column >> 3; nothing beyond the last column.
    flat = [sum(kept << (column % 8) for column, kept in enumerate(row) if column // 8 == byte)
            for row in expected for byte in range((cols + 7) // 8)]  # fmt: skip
    assert bits.flatten().tolist() == flat
    assert torch.equal(philox.dropout_bits(torch.tensor([seed]), stream, rows, cols, p, row_offset=row_offset), bits)


def test_chunks_do_not_show(monkeypatch):
    whole = philox.dropout_bits(7, 3, 50, 100, 0.3, row_offset=2**32 - 20)
    monkeypatch.setattr(philox, "_CPU_CHUNK", 30)
    assert torch.equal(philox.dropout_bits(7, 3, 50, 100, 0.3, row_offset=2**32 - 20), whole)


def test_rows_do_not_depend_on_where_drawing_starts():
    whole = philox.dropout_bits(7, 3, 50, 100, 0.3)
    assert torch.equal(philox.dropout_bits(7, 3, 20, 100, 0.3, row_offset=30), whole[30:])
    assert torch.equal(philox.dropout_bits(7, 3, 50, 64, 0.3), whole[:, :8])


def test_a_tensor_seed_is_never_read():
    """On a meta tensor reading a value raises."""
    bits = philox.dropout_bits(torch.empty(1, dtype=torch.int64, device="meta"), 0, 10, 17, 0.1)
    assert bits.shape == (10, 3)
    assert bits.device.type == "meta"


@pytest.mark.parametrize("p", [0.05, 0.1, 0.5, 0.9])
def test_rate_and_independence(p):
    """2^20 elements: rate within 5 sigma, and neighbours in row, column, stream and seed uncorrelated."""
    size = 1024
    mask = philox.unpack_bits(philox.dropout_bits(11, 0, size, size, p), size).double()
    keep = 1 - philox.threshold(p) / 65536
    sigma = math.sqrt(keep * (1 - keep) / size**2)
    assert abs(mask.mean().item() - keep) < 5 * sigma
    centred = (mask - keep) / math.sqrt(keep * (1 - keep))
    others = [centred.roll(1, 0), centred.roll(1, 1), centred.roll(8, 1)]
    for seed, stream in ((11, 1), (11, 65536), (12, 0), (11 + 2**32, 0)):
        other = philox.unpack_bits(philox.dropout_bits(seed, stream, size, size, p), size).double()
        others.append((other - keep) / math.sqrt(keep * (1 - keep)))
    worst = max(abs((centred * other).mean().item()) * size for other in others)
    print(f"p={p}: rate off by {(mask.mean().item() - keep) / sigma:+.2f} sigma, worst correlation {worst:.2f} sigma")
    assert worst < 5


def test_nothing_is_dropped_at_zero():
    """A lane equal to the threshold is kept: among 2^19 lanes of either half some are 0."""
    assert (philox.dropout_bits(13, 0, 1024, 1024, 0.0) == 255).all()


def test_the_scale_makes_the_mean_one():
    for p in (0.0, 1e-6, 1 / 3, 0.1, 0.5, 0.999999):
        keep = sum(lane >= philox.threshold(p) for lane in range(65536)) / 65536
        assert philox.keep_scale(p) * keep == pytest.approx(1, abs=1e-15)
    assert philox.threshold(0.0) == 0
    assert philox.keep_scale(0.0) == 1.0
    assert philox.threshold(0.1) == 6554
    assert philox.threshold(0.9999999) == 65535
    assert philox.threshold(0.5 / 65536) == 1  # half rounds up


@pytest.mark.parametrize("cols", [0, 1, 7, 8, 9, 64, 65])
def test_bits_round_trip(cols):
    mask = torch.rand(6, cols, generator=torch.Generator().manual_seed(cols)) < 0.5
    bits = philox.pack_bits(mask)
    assert bits.shape == (6, (cols + 7) // 8)
    assert torch.equal(philox.unpack_bits(bits, cols), mask)
    weights = 2 ** torch.arange(8)
    if cols >= 8:
        assert torch.equal(bits[:, 0].long(), (mask[:, :8].long() * weights).sum(1))
    assert torch.equal(philox.pack_bits(mask.t().contiguous().t()), bits)


@pytest.mark.parametrize("p", [-0.1, 1.0, 1.5, math.nan])
def test_impossible_probabilities_are_refused(p):
    with pytest.raises(ConfigError, match="at least 0 and below 1"):
        philox.dropout_bits(0, 0, 1, 1, p)


def test_wrong_arguments_are_refused():
    for seed in (-1, 2**63 - 1):
        with pytest.raises(ConfigError, match=f"got {seed}"):
            philox.dropout_bits(seed, 0, 1, 1, 0.1)
    with pytest.raises(ConfigError, match=f"got {2**32}"):
        philox.dropout_bits(0, 2**32, 1, 1, 0.1)
    with pytest.raises(DtypeError, match=r"expected torch\.int64, got torch\.int32"):
        philox.dropout_bits(torch.zeros(1, dtype=torch.int32), 0, 1, 1, 0.1)
    with pytest.raises(ShapeError, match=r"one element, got shape \[2\]"):
        philox.dropout_bits(torch.zeros(2, dtype=torch.int64), 0, 1, 1, 0.1)
    with pytest.raises(ShapeError, match="must not be negative"):
        philox.dropout_bits(0, 0, -1, 1, 0.1)
    with pytest.raises(ShapeError, match=r"\[rows, 2\] for 9 columns, got \[3, 1\]"):
        philox.unpack_bits(torch.zeros(3, 1, dtype=torch.uint8), 9)
    with pytest.raises(DtypeError, match=r"got torch\.bool"):
        philox.unpack_bits(torch.zeros(3, 1, dtype=torch.bool), 8)
    with pytest.raises(DtypeError, match=r"expected torch\.bool"):
        philox.pack_bits(torch.zeros(3, 1))
    with pytest.raises(ShapeError, match="2 dimensions"):
        philox.pack_bits(torch.zeros(3, dtype=torch.bool))
