"""The elementwise passes: DoRA's columns, its own dropout's composition, masks."""

from __future__ import annotations

import pytest
import torch

from fastlora.backends.triton.compose import columns, compose, mask_rows, masked_add
from fastlora.backends.triton.launch import record
from fastlora.backends.triton.shrink import Dropout
from fastlora.math import philox
from fastlora.testing import guarded
from tests.triton.product_tools import DTYPES, close, poisoned

SIZES = [(1, 100), (3, 33), (17, 1), (33, 65)]


def _randn(*size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize(("m", "n"), SIZES)
def test_columns(m, n, dtype, monkeypatch):
    z, bias = guarded(_randn(m, n).to(dtype)), guarded(_randn(n, seed=1))
    mag, norm = guarded((1 + 0.3 * _randn(n, seed=2)).to(dtype)), guarded(0.5 + _randn(n, seed=3).abs())
    c = mag.tensor.double() / norm.tensor.double()
    for options in ((mag.tensor, norm.tensor, bias.tensor), (mag.tensor, norm.tensor, None), (None, None, bias.tensor)):
        with poisoned(monkeypatch) as made:
            y = columns(z.tensor, *options)
            assert torch.equal(y, columns(z.tensor, *options, wide=True))
        inside = z.tensor.clone()
        assert columns(inside, *options, out=inside) is inside and torch.equal(inside, y)
        assert all(guard.intact() for guard in [z, mag, norm, bias, *made])
        factor = torch.ones_like(c) if options[0] is None else c
        ref = z.tensor.double() * factor + (0.0 if options[2] is None else bias.tensor.double())
        eager = (z.tensor.float() * factor.float() + (0.0 if options[2] is None else bias.tensor)).to(dtype)
        assert y.dtype == dtype
        close("y", y, ref, eager, torch.zeros(m, 1), torch.zeros(1, 1))


def test_a_factor_of_one_changes_no_bit():
    z, mag = _randn(17, 40).bfloat16(), 0.1 + _randn(40, seed=1).abs()
    assert torch.equal(columns(z, mag, mag, None), z)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize(("m", "n"), SIZES)
def test_masks(m, n, dtype, monkeypatch):
    p, stream, seed = 0.3, 70001, guarded(torch.tensor([987654321]))
    x, bits = guarded(_randn(m, n).to(dtype)), guarded(philox.dropout_bits(seed.tensor, stream, m, n, p))
    keep = philox.unpack_bits(bits.tensor, n)
    drawn = Dropout(philox.threshold(p), philox.keep_scale(p), stream, seed.tensor, None)
    given = drawn._replace(seed=None, bits=bits.tensor)
    zero = torch.zeros((), dtype=dtype)
    with poisoned(monkeypatch) as made:
        for decision in (bits.tensor, drawn, given):
            for wide in (False, True):
                assert torch.equal(mask_rows(x.tensor, decision, wide=wide), torch.where(keep, x.tensor, zero))
    want = torch.where(keep, (x.tensor.float() * 1.3).to(dtype), zero)
    for decision in (bits.tensor, drawn):
        inside = guarded(x.tensor)
        assert masked_add(inside.tensor, decision, 1.3, inside.tensor) is inside.tensor
        assert torch.equal(inside.tensor, want) and inside.intact()
    assert all(guard.intact() for guard in [x, bits, seed, *made])


def test_dropped_nan_is_gone():
    x = torch.full((2, 9), float("nan"))
    bits = torch.zeros(2, 2, dtype=torch.uint8)
    assert not mask_rows(x, bits).any() and not masked_add(x, bits, 2.0, x).any()


# m, n, r, dtype, dtype of b, bias, need_z
COMPOSED = [
    (1, 100, 8, "bf16", "fp32", True, True),
    (17, 33, 16, "bf16", "bf16", False, True),
    (33, 65, 3, "bf16", "fp32", False, False),
    (17, 33, 0, "bf16", "fp32", True, True),
    (33, 3, 24, "fp16", "fp32", True, True),
    (17, 40, 100, "fp32", "fp32", False, True),
    (33, 33, 1, "fp32", "fp32", True, False),
]


@pytest.mark.parametrize("case", COMPOSED, ids=lambda case: "-".join(map(str, case)))
def test_compose(case, monkeypatch):
    m, n, r, dtype, adapter, has_bias, need_z = case
    kind, scale, dscale = DTYPES[dtype], 1.7, 1.3
    u, v = guarded(_randn(m, n).to(kind)), guarded(_randn(m, n, seed=1).to(kind))
    h, b = guarded(_randn(m, r, seed=2)), guarded(_randn(n, r, seed=3).to(DTYPES[adapter]))
    mag, norm = guarded(1 + 0.3 * _randn(n, seed=4)), guarded(0.5 + _randn(n, seed=5).abs())
    bias = guarded(_randn(n, seed=6).to(kind))
    plus = bias.tensor if has_bias else None

    def formula(dtype: torch.dtype, h: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        c = mag.tensor.to(dtype) / norm.tensor.to(dtype)
        delta, dropped = scale * (h.to(dtype) @ b.to(dtype).T), dscale * v.tensor.to(dtype)
        y = u.tensor.to(dtype) + (c - 1) * dropped + c * delta + (bias.tensor.to(dtype) if has_bias else 0.0)
        return y, dropped + delta

    ref = formula(torch.float64, h.tensor, b.tensor)
    eager = [t.to(kind) for t in formula(torch.float32, h.tensor.to(kind), b.tensor.to(kind))]
    old = u.tensor.clone(), v.tensor.clone()
    results = []
    for wide in (False, True):
        u.tensor.copy_(old[0])
        v.tensor.copy_(old[1])
        y, z = compose(
            u.tensor,
            v.tensor,
            h.tensor,
            b.tensor,
            scale,
            mag.tensor,
            norm.tensor,
            plus,
            dscale,
            need_z=need_z,
            wide=wide,
        )
        assert y is u.tensor and (z is v.tensor if need_z else z is None)
        results.append((y.clone(), v.tensor.clone()))
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])
    assert all(guard.intact() for guard in (u, v, h, b, mag, norm, bias))
    close("y", results[0][0], ref[0], eager[0], scale * h.tensor.double(), 2 * b.tensor.double())
    if need_z:
        close("z", results[0][1], ref[1], eager[1], scale * h.tensor.double(), 2 * b.tensor.double())
    else:
        assert torch.equal(results[0][1], old[1])


def test_zero_b_and_a_factor_of_one_leave_the_base_output_as_it_is():
    u, v, mag = _randn(17, 40).bfloat16(), _randn(17, 40, seed=1).bfloat16(), 0.1 + _randn(40, seed=2).abs()
    y, _ = compose(u.clone(), v, _randn(17, 3), torch.zeros(40, 3), 2.0, mag, mag, None, 1.3, need_z=False)
    assert torch.equal(y, u)


def test_no_token_is_no_launch():
    none, vector = torch.empty(0, 9), torch.ones(9)
    with record(run=True) as launches:
        columns(none, vector, vector, None)
        mask_rows(none, torch.empty(0, 2, dtype=torch.uint8))
        compose(none, none.clone(), torch.empty(0, 2), torch.ones(9, 2), 1.0, vector, vector, None, 1.0, need_z=True)
    assert not launches
