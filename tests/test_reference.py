"""The oracle itself: its hand-written backward against finite differences and autograd, in float64."""

from __future__ import annotations

import pytest
import torch

from fastlora.math import reference
from fastlora.math.reference import Adapter, Dropout

M, N, K, R, SCALE = 4, 5, 6, 2, 1.3


class Oracle(torch.autograd.Function):
    """reference.forward with reference.backward; the DoRA norm is passed in as a constant."""

    @staticmethod
    def forward(ctx, x, a, b, mag, bias, w, norm, dropout):
        ctx.save_for_backward(x, a, b, mag, w, norm)
        ctx.dropout = dropout
        return reference.forward(x, w, Adapter(a, b, SCALE, mag, norm), bias, dropout).y

    @staticmethod
    def backward(ctx, dy):
        x, a, b, mag, w, norm = ctx.saved_tensors
        grads = reference.backward(dy, x, w, Adapter(a, b, SCALE, mag, norm), ctx.dropout)
        return grads.dx, grads.da, grads.db, grads.dmag, grads.dbias, None, None, None


def _inputs(dora):
    torch.manual_seed(0)
    x, a, b = torch.randn(M, K), torch.randn(R, K), torch.randn(N, R)
    w, bias = torch.randn(N, K), torch.randn(N)
    x, a, b, w, bias = (t.double().requires_grad_(t is not w) for t in (x, a, b, w, bias))
    w = w.detach()
    norm = reference.dora_norm(w, a.detach(), b.detach(), SCALE) if dora else None
    mag = (norm * torch.linspace(0.5, 2, N)).requires_grad_() if dora else None
    return x, a, b, mag, bias, w, norm


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("dropout", ["none", "peft", "shared"])
def test_gradcheck(dora, dropout):
    x, a, b, mag, bias, w, norm = _inputs(dora)
    keep = torch.rand(M, K) > 0.3
    drop = None if dropout == "none" else Dropout(keep, 1 / 0.7, dropout)
    assert torch.autograd.gradcheck(lambda *t: Oracle.apply(*t, w, norm, drop), (x, a, b, mag, bias))


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("dropout", ["none", "peft", "shared"])
def test_backward_equals_autograd_of_forward(dora, dropout):
    x, a, b, mag, bias, w, norm = _inputs(dora)
    drop = None if dropout == "none" else Dropout(torch.rand(M, K) > 0.3, 1 / 0.7, dropout)
    out = reference.forward(x, w, Adapter(a, b, SCALE, mag, norm), bias, drop)
    dy = torch.randn_like(out.y)
    wanted = [t for t in (x, a, b, mag, bias) if t is not None]
    auto = torch.autograd.grad(out.y, wanted, dy)
    grads = reference.backward(dy, x, w, Adapter(a, b, SCALE, mag, norm), drop)
    mine = [g for g in grads if g is not None]
    assert len(mine) == len(auto)
    for got, want in zip(mine, auto, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_dora_semantics():
    x, a, b, mag, bias, w, norm = _inputs(True)
    adapter = Adapter(a, b, SCALE, mag, norm)
    keep_all = torch.ones(M, K, dtype=torch.bool)
    plain = reference.forward(x, w, adapter, bias).y
    for semantics in ("peft", "shared"):  # nothing dropped: both agree
        torch.testing.assert_close(reference.forward(x, w, adapter, bias, Dropout(keep_all, 1.0, semantics)).y, plain)
    torch.testing.assert_close(plain, x @ reference.merged_weight(w, adapter).T + bias)
    # The bias is never scaled by c, and mag = norm gives plain LoRA.
    at_init = Adapter(a, b, SCALE, norm, norm)
    torch.testing.assert_close(
        reference.forward(x, w, at_init, bias).y, reference.forward(x, w, Adapter(a, b, SCALE), bias).y
    )
    keep = torch.rand(M, K) > 0.5
    peft = reference.forward(x, w, adapter, bias, Dropout(keep, 2.0, "peft")).y
    shared = reference.forward(x, w, adapter, bias, Dropout(keep, 2.0, "shared")).y
    assert (peft - shared).abs().max() > 1e-3


def test_reference_keeps_every_float_dtype():
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        x, a, b, _, bias, w, _ = (None if t is None else t.detach().to(dtype) for t in _inputs(False))
        out = reference.forward(x, w, Adapter(a, b, SCALE), bias)
        assert {t.dtype for t in out} == {dtype}
