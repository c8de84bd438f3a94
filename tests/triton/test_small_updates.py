"""A merged weight is rounded to 16 bits: small adapters, and a training run that starts at B = 0, must survive that.

The merge kernel runs in the interpreter with one large tile, so that there are enough elements for a statistic.
"""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor

from fastlora.backends.triton import merge
from fastlora.backends.triton.launch import Tile
from fastlora.math import nf4
from fastlora.math.nf4 import PackedWeight

SCALE = 2.0


@pytest.fixture(autouse=True)
def _large_tiles(monkeypatch):
    monkeypatch.setattr(merge, "tile_merge", lambda *_: Tile(BLOCK_N=512, BLOCK_K=512))


# --- slope: how much of an adapter's effect is left -------------------------------------------------------------------


@functools.cache
def packed(n: int, k: int, source: torch.dtype, nested: bool, blocksize: int, seed: int) -> tuple[Tensor, PackedWeight]:
    w = (torch.randn(n, k, generator=torch.Generator().manual_seed(seed)) / k**0.5).to(source)
    return w, nf4.pack(w, "nf4", blocksize, nested)


def slope(source: torch.dtype, nested: bool, blocksize: int, relative: float, seed: int) -> float:
    """Regression of what the adapter changes in the rounded weight on what it should; 1: unbiased, 0: swallowed.

    `relative`: the size of s b a over the weight's.
    """
    n, k, r = 1024, 1024, 8
    w, weight = packed(n, k, source, nested, blocksize, seed)
    generator = torch.Generator().manual_seed(seed + 100)
    a = relative / SCALE * torch.randn(r, k, generator=generator) / k**0.5
    b = torch.randn(n, r, generator=generator) / r**0.5
    out = merge.merge(weight, a, b, SCALE, torch.bfloat16).double()
    delta = SCALE * (b.double() @ a.double())
    assert delta.norm() / w.double().norm() == pytest.approx(relative, rel=0.2)
    change = out - nf4.dequantize(weight, torch.bfloat16).double()
    return float((change * delta).sum() / (delta * delta).sum())


def mean_slope(*case: object) -> float:
    """Over two draws of a million weights: spread 0.01 at 1e-4."""
    return sum(slope(*case, seed) for seed in (0, 1)) / 2  # type: ignore[arg-type]


@pytest.mark.parametrize("relative", [1e-4, 1e-3, 1e-1])
@pytest.mark.parametrize(
    ("source", "nested"), [(torch.bfloat16, True), (torch.float32, True), (torch.float32, False)], ids=str
)
def test_the_effect_is_unbiased_where_scales_are_off_the_grid(source, nested, relative):
    assert 0.9 <= mean_slope(source, nested, 64, relative) <= 1.1


@pytest.mark.parametrize(("relative", "least"), [(1e-4, 0.85), (3e-4, 0.92), (1e-3, 0.92), (1e-1, 0.92)])
def test_most_of_the_effect_is_left_where_scales_are_on_the_grid(relative, least):
    """Plain NF4 of a bf16 weight: many of its values are bf16 numbers, from which a small step rounds back."""
    assert least <= mean_slope(torch.bfloat16, False, 64, relative) <= 1.1


def test_a_16_bit_weight_swallows_what_a_packed_one_keeps():
    """Why no plan merges a dense 16-bit base: the same measure, of rounding to nearest into weights on the grid."""
    generator = torch.Generator().manual_seed(0)
    w = (torch.randn(1024, 1024, generator=generator) / 32).bfloat16()
    delta = 1e-4 * torch.randn(1024, 1024, generator=generator) / 32
    change = (w.float() + delta).bfloat16().double() - w.double()
    assert float((change * delta).sum() / (delta.double() ** 2).sum()) < 0.2


# --- a run from B = 0 at a small learning rate ------------------------------------------------------------------------

STEPS, RATE = 300, 1e-5
M, N, K, R = 32, 64, 128, 4


def problem() -> tuple[PackedWeight, Tensor, Tensor, Tensor]:
    """A nested NF4 weight, A at its start, and inputs and targets [STEPS, M, ...] of a teacher with another weight."""
    generator = torch.Generator().manual_seed(3)

    def randn(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator)

    w = (randn(N, K) / K**0.5).bfloat16()
    weight = nf4.pack(w, "nf4", 64, True)
    x = randn(STEPS, M, K).bfloat16()
    teacher = w.float() + 0.5 * (randn(N, R) / R**0.5) @ (randn(R, K) / K**0.5)
    return weight, randn(R, K) / K**0.5, x, x.float() @ teacher.T


class Adam:
    """AdamW without decay, in fp32."""

    def __init__(self, *parameters: Tensor) -> None:
        self.parameters = parameters
        self.optimizer = torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.0)

    def step(self, *gradients: Tensor) -> None:
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient
        self.optimizer.step()


def rounded_merge(w: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """What the merge kernel computes: the sum in fp32, rounded once."""
    return (w + SCALE * (b @ a)).bfloat16()


def trajectory(merged: bool) -> list[tuple[Tensor, Tensor]]:
    """(A_t, B_t) after every step: all in fp32, or with x, dy and w_eff in bf16 as the merge plan has them."""
    weight, start, x, target = problem()
    w = nf4.dequantize(weight, torch.float32)
    a, b = start.clone().requires_grad_(), torch.zeros(N, R, requires_grad=True)
    adam, seen = Adam(a, b), []
    for step in range(STEPS):
        xs = x[step].float()
        with torch.no_grad():
            if merged:
                y = (xs @ rounded_merge(w, a, b).float().T).bfloat16().float()
                dy = ((y - target[step]) / M).bfloat16().float()
            else:
                y = xs @ w.T + SCALE * (xs @ a.T) @ b.T
                dy = (y - target[step]) / M
            da, db = SCALE * (dy @ b).T @ xs, SCALE * dy.T @ (xs @ a.T)
        adam.step(da, db)
        seen.append((a.detach().clone(), b.detach().clone()))
    return seen


def cosine(one: Tensor, other: Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(one.double().flatten(), other.double().flatten(), dim=0))


def test_a_run_from_zero_b_follows_the_fp32_trajectory():
    weight, start, _, _ = problem()
    w = nf4.dequantize(weight, torch.float32)
    merged, exact = trajectory(True), trajectory(False)
    for step in (0, 9, 99, STEPS - 1):
        (a, b), (a_exact, b_exact) = merged[step], exact[step]
        assert cosine(b, b_exact) > 0.99, step
        if step:  # the first step has no gradient of A: B was zero
            assert cosine(a - start, a_exact - start) > 0.99, step
        # The run's merge is the kernel's, but for a few sums within the kernel's error of b a (2^-16) of a tie.
        kernel, ours = merge.merge(weight, a, b, SCALE, torch.bfloat16), rounded_merge(w, a, b)
        torch.testing.assert_close(kernel, ours, rtol=2**-7, atol=0.0)
        assert (kernel != ours).float().mean() < 5e-3, step
    assert exact[-1][1].norm() > 50 * exact[0][1].norm()  # it went somewhere
