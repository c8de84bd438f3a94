"""The mask kernel: the bits of math.philox."""

from __future__ import annotations

import pytest
import torch

from fastlora.backends.triton import dropout
from fastlora.backends.triton.launch import record
from fastlora.math import philox
from tests.triton.adapted import guard_outputs

CPU = torch.device("cpu")


def seed(value: int) -> torch.Tensor:
    return torch.tensor([value])


@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (3, 7), (17, 8), (33, 133), (5, 300)])
@pytest.mark.parametrize("p", [0.0, 1e-5, 0.1, 0.999])
def test_bits(rows, cols, p):
    out = dropout.dropout_mask(seed(12345678912345), 3, rows, cols, p, CPU)
    assert torch.equal(out, philox.dropout_bits(12345678912345, 3, rows, cols, p))


@pytest.mark.parametrize("stream", [0, 1, 2**31 - 1, 2**31, 2**32 - 1])
@pytest.mark.parametrize("value", [0, 2**32 - 1, 2**32, 2**63 - 2])
def test_streams_and_seeds(stream, value):
    assert torch.equal(
        dropout.dropout_mask(seed(value), stream, 3, 20, 0.5, CPU), philox.dropout_bits(value, stream, 3, 20, 0.5)
    )


@pytest.mark.parametrize("row_offset", [1, 16, 2**31 - 2, 2**32 - 5, 2**40])
def test_rows_are_numbered_from_the_offset(row_offset):
    out = dropout.dropout_mask(seed(5), 1, 18, 20, 0.3, CPU, row_offset)
    assert torch.equal(out, philox.dropout_bits(5, 1, 18, 20, 0.3, None, row_offset))


@pytest.mark.parametrize("column", range(8))
def test_a_lane_at_the_threshold_is_kept(column):
    words = philox.philox4x32((0, 0, 0, 3), (77, 0))
    lane = int(words[column // 2]) >> 16 * (column % 2) & 0xFFFF
    for limit, kept in ((lane, 1), (lane + 1, 0)):
        out = dropout.dropout_mask(seed(77), 3, 1, 8, limit / 65536, CPU)
        assert int(out) >> column & 1 == kept


@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (17, 130), (16, 128)])
def test_stays_inside(rows, cols, monkeypatch):
    bands = guard_outputs(monkeypatch)
    out = dropout.dropout_mask(seed(9), 2, rows, cols, 0.25, CPU)
    assert len(bands) == 1 and bands[0].tensor is out and bands[0].intact()


def test_wide_offsets_and_one_launch():
    with record(run=True) as launches:
        wide = dropout.dropout_mask(seed(9), 2, 20, 133, 0.25, CPU, wide=True)
    assert torch.equal(wide, philox.dropout_bits(9, 2, 20, 133, 0.25)) and len(launches) == 1
    assert launches[0].constexprs["WIDE"]


def test_nothing_to_draw():
    with record(run=True) as launches:
        assert dropout.dropout_mask(seed(9), 2, 0, 133, 0.25, CPU).shape == (0, 17)
    assert not launches
