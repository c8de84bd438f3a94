"""Adapter initialisation: every draw against its formula, every factorisation against the weight and against PEFT."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fastlora.errors import ConfigError, DtypeError, ShapeError
from fastlora.math import nf4
from fastlora.math.init import KNOWN, AdapterInit, canonical, changes_base, init_adapter

K, N, R = 384, 640, 32
STD = {
    "kaiming": 1 / math.sqrt(3 * K),
    "gaussian": 1 / R,
    "normal": 0.02,
    "standard_normal": 1.0,
    "he": 1 / math.sqrt(K),
    "xavier": math.sqrt(2 / (K + R)),
    "normalized": 1 / math.sqrt(R),
}


def normal_cdf(x: np.ndarray) -> np.ndarray:
    return np.array([0.5 * math.erfc(-value / math.sqrt(2)) for value in x])


def kolmogorov_smirnov(sample: Tensor, cdf) -> float:
    """sqrt(n) times the largest distance of the empirical distribution; above 1.95 with probability 1e-3."""
    x = np.sort(sample.double().numpy().ravel())
    values, steps = cdf(x), np.arange(x.size + 1) / x.size
    return math.sqrt(x.size) * max(np.abs(values - steps[:-1]).max(), np.abs(values - steps[1:]).max())


def uniform_cdf(limit: float):
    return lambda x: np.clip((x + limit) / (2 * limit), 0, 1)


def spectrum_weight(n: int, k: int, seed: int = 0, decay: float = 0.8) -> Tensor:
    """A weight with singular values 4 decay^i, all told apart, and random singular vectors."""
    generator = torch.Generator().manual_seed(seed)
    u, _ = torch.linalg.qr(torch.randn(n, min(n, k), generator=generator, dtype=torch.float64))
    v, _ = torch.linalg.qr(torch.randn(k, min(n, k), generator=generator, dtype=torch.float64))
    return (u * (4 * decay ** torch.arange(min(n, k), dtype=torch.float64)) @ v.T).float()


def through_nf4(w: Tensor) -> Tensor:
    return nf4.dequantize(nf4.pack(w), torch.float32)


def product(started: AdapterInit, scaling: float) -> Tensor:
    return scaling * (started.b.double() @ started.a.double())


# --- drawn ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", STD)
def test_draws_follow_their_formula(name):
    started = init_adapter(name, R, K, N, seed=1)
    assert (started.a.shape, started.b.shape) == ((R, K), (N, R))
    assert started.a.dtype == started.b.dtype == torch.float32
    assert started.base is None
    assert not started.b.any()
    std, count = STD[name], R * K
    # The standard deviation of a sample's one: std / sqrt(2 n) of a normal, less of a uniform.
    assert started.a.std().item() == pytest.approx(std, rel=5 / math.sqrt(2 * count))
    assert abs(started.a.mean().item()) < 5 * std / math.sqrt(count)
    if name == "kaiming":
        limit = 1 / math.sqrt(K)
        assert started.a.abs().max() <= limit
        assert started.a.abs().max() > 0.999 * limit
        distance = kolmogorov_smirnov(started.a, uniform_cdf(limit))
    else:
        distance = kolmogorov_smirnov(started.a / std, normal_cdf)
    print(f"{name}: std {started.a.std().item():.5f} of {std:.5f}, Kolmogorov-Smirnov {distance:.2f}")
    assert distance < 1.95


def test_normalized_keeps_the_norm_and_the_others_do_not():
    x = torch.randn(2000, K, generator=torch.Generator().manual_seed(2))
    for name, expected in (("normalized", 1.0), ("gaussian", 1 / R), ("kaiming", R / (3 * K)), ("he", R / K)):
        a = init_adapter(name, R, K, N, seed=3).a
        assert ((x @ a.T).square().sum() / x.square().sum()).item() == pytest.approx(expected, rel=0.05), name


def test_random_fills_both_factors():
    started = init_adapter(False, R, K, N, seed=4)
    assert started.strategy == "random"
    assert kolmogorov_smirnov(started.a, uniform_cdf(1 / math.sqrt(K))) < 1.95
    assert kolmogorov_smirnov(started.b, uniform_cdf(1 / math.sqrt(R))) < 1.95


def test_orthogonal_has_two_factors_and_no_product():
    started = init_adapter("orthogonal", R, K, N, seed=5)
    a, b = started.a.double(), started.b.double()
    print(f"orthogonal: max|b a| {(b @ a).abs().max():.1e} of |b| |a| {b.norm() * a.norm():.2f}")
    assert (b @ a).abs().max() < 1e-7
    for factor, count in ((a, R * K), (b, R * N)):
        # Each entry has variance (1/100) * (r/2)/r on average over the rows of an orthogonal matrix.
        assert factor.norm().item() == pytest.approx(math.sqrt(count / 200), rel=0.02)
        assert torch.linalg.matrix_rank(factor, rtol=1e-5) == R // 2
    with pytest.raises(ConfigError, match="even rank, got r=3"):
        init_adapter("orthogonal", 3, K, N, seed=5)


@pytest.mark.parametrize("strategy", ["kaiming", "gaussian", "orthogonal", "random", "pissa_niter_2"])
def test_the_seed_decides_and_nothing_else_does(strategy):
    weight = spectrum_weight(20, 30)
    torch.manual_seed(1)
    first = init_adapter(strategy, 4, 30, 20, weight=weight, seed=6)
    before = torch.get_rng_state()
    again = init_adapter(strategy, 4, 30, 20, weight=weight, seed=6)
    assert torch.equal(torch.get_rng_state(), before), "the global generator is the user's"
    assert torch.equal(first.a, again.a)
    assert torch.equal(first.b, again.b)
    assert first.seed == 6
    with torch.device("meta"):  # a default device must not redirect the draws
        assert torch.equal(init_adapter(strategy, 4, 30, 20, weight=weight, seed=6).a, first.a)
    other = init_adapter(strategy, 4, 30, 20, weight=weight, seed=7)
    assert not torch.equal(first.a, other.a)


@pytest.mark.parametrize("strategy", ["kaiming", "standard_normal", "random", "pissa", "olora", "loftq"])
def test_bound_clamps_a(strategy):
    weight = spectrum_weight(20, 30)
    free = init_adapter(strategy, 4, 30, 20, weight=weight, seed=8, requantize=through_nf4)
    bound = 0.5 * free.a.abs().max().item()
    tight = init_adapter(strategy, 4, 30, 20, weight=weight, seed=8, bound=bound, requantize=through_nf4)
    assert torch.equal(tight.a, free.a.clamp(-bound, bound))
    if strategy in ("pissa", "olora"):
        assert tight.base is not None
        assert torch.allclose(tight.base.double() + product(tight, 1.0), weight.double(), atol=1e-6)


# --- factored ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scaling", [1.0, 2.0, 0.25])
@pytest.mark.parametrize(("n", "k"), [(48, 80), (80, 48), (50, 50)])
@pytest.mark.parametrize("strategy", ["pissa", "pissa_niter_0", "pissa_niter_4", "olora"])
def test_base_and_adapter_make_the_weight(strategy, n, k, scaling):
    weight = spectrum_weight(n, k)
    started = init_adapter(strategy, 6, k, n, weight=weight, scaling=scaling, seed=9)
    assert (started.a.shape, started.b.shape) == ((6, k), (n, 6))
    assert started.a.is_contiguous()
    assert started.b.is_contiguous()
    assert started.base is not None
    assert started.base.dtype == torch.float32
    assert (started.base.double() + product(started, scaling) - weight.double()).abs().max() < 2e-6
    assert product(started, scaling).norm() > 0.2 * weight.norm()


@pytest.mark.parametrize("scaling", [1.0, 2.0])
def test_pissa_holds_the_leading_part(scaling):
    weight = spectrum_weight(48, 80)
    singular = torch.linalg.svdvals(weight.double())
    best = singular[6:].norm()
    for strategy, slack in (("pissa", 1e-6), ("pissa_niter_8", 1e-3), ("pissa_niter_0", 1.0)):
        started = init_adapter(strategy, 6, 80, 48, weight=weight, scaling=scaling, seed=10)
        assert started.base is not None
        rest = started.base.double().norm()
        assert best * (1 - 1e-6) <= rest <= best * (1 + slack), strategy
        if strategy == "pissa":  # equal parts: a a^T = b^T b = S / s
            expected = torch.diag(singular[:6] / scaling)
            assert torch.allclose(started.a.double() @ started.a.double().T, expected, atol=1e-5)
            assert torch.allclose(started.b.double().T @ started.b.double(), expected, atol=1e-5)


def test_power_iterations_help():
    weight = spectrum_weight(100, 100, decay=0.97)
    rest = []
    for steps in (0, 1, 4):
        base = init_adapter(f"pissa_niter_{steps}", 8, 100, 100, weight=weight, seed=11).base
        assert base is not None
        rest.append(base.norm().item())
    assert rest[0] > rest[1] > rest[2]


def test_olora_is_the_head_of_q_and_r():
    weight = spectrum_weight(48, 80)
    started = init_adapter("olora", 6, 80, 48, weight=weight, scaling=3.0, seed=12)
    assert torch.allclose(started.b.T @ started.b, torch.eye(6), atol=1e-5)
    assert torch.allclose(started.b @ started.a[:, :6], weight[:, :6], atol=1e-5)  # Q R reproduces the first columns
    assert (started.a[:, :6].tril(-1).abs() < 1e-6).all()
    assert (started.a.diagonal() > 0).all()


@pytest.mark.parametrize("scaling", [1.0, 2.0])
def test_loftq_repairs_what_quantizing_loses(scaling):
    weight = torch.randn(96, 128, generator=torch.Generator().manual_seed(13))
    plain = (through_nf4(weight) - weight).norm()
    errors = []
    for iterations in (1, 2, 5):
        started = init_adapter(
            "loftq", 16, 128, 96, weight=weight, scaling=scaling, seed=14, requantize=through_nf4, iterations=iterations
        )
        assert started.base is not None
        errors.append((through_nf4(started.base) + product(started, scaling) - weight).norm().item())
    print(f"loftq at s={scaling}: error {plain:.3f} quantized, {', '.join(f'{e:.3f}' for e in errors)} repaired")
    # The best rank-16 repair of the first residual is known.
    tail = torch.linalg.svdvals((weight - through_nf4(weight)).double())[16:].norm().item()
    assert errors[0] == pytest.approx(tail, rel=1e-5)
    assert errors[0] < 0.9 * plain
    assert errors[2] < errors[1] < errors[0]


def test_loftq_quantizes_the_weight_itself_at_first():
    weight = spectrum_weight(20, 64)
    started = init_adapter("loftq", 4, 64, 20, weight=weight.bfloat16(), seed=15, requantize=through_nf4)
    assert started.base is not None
    assert torch.equal(started.base, weight.bfloat16().float())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_weights_of_other_float_types(dtype):
    weight = spectrum_weight(20, 30).to(dtype)
    kept = weight.clone()
    started = init_adapter("pissa", 4, 30, 20, weight=weight, seed=16)
    assert started.a.dtype == torch.float32
    assert started.base is not None
    assert started.base.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.equal(weight, kept)
    tolerance = 1e-14 if dtype == torch.float64 else 2e-6  # what a and b lose in fp32, the base holds
    assert (started.base.double() + product(started, 1.0) - weight.double()).abs().max() < tolerance


def test_rank_deficient_and_zero_weights():
    for weight in (torch.zeros(20, 30), spectrum_weight(20, 30)[:, :1] @ torch.ones(1, 30)):
        for strategy in ("pissa", "pissa_niter_1", "olora"):
            started = init_adapter(strategy, 4, 30, 20, weight=weight, seed=17)
            assert started.base is not None
            assert started.a.isfinite().all()
            assert started.b.isfinite().all()
            assert torch.allclose(started.base, torch.zeros(20, 30), atol=1e-5)


# --- PEFT -------------------------------------------------------------------------------------------------------------


def by_peft(strategy, r: int, n: int, k: int, alpha: int, weight: Tensor | None = None, seed: int = 0):
    """Weight before, base after, a, b."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(k, n, bias=False))
    if weight is not None:
        model[0].weight.data = weight.clone()
    before = model[0].weight.detach().clone()
    config = peft.LoraConfig(r=r, lora_alpha=alpha, init_lora_weights=strategy, target_modules=["0"])
    layer = peft.get_peft_model(model, config).base_model.model[0]
    parts = (layer.base_layer.weight, layer.lora_A["default"].weight, layer.lora_B["default"].weight)
    return before, *(part.detach() for part in parts)


@pytest.mark.parametrize("strategy", ["pissa", "olora", "pissa_niter_16"])
def test_factorisations_are_those_of_peft_up_to_sign(strategy):
    weight = spectrum_weight(48, 64, decay=0.6)  # 16 power iterations then separate the leading part to 0.6^33
    _, base, a, b = by_peft(strategy, 8, 48, 64, 16, weight)
    ours = init_adapter(strategy, 8, 64, 48, weight=weight, scaling=2.0, seed=18)
    assert torch.allclose(ours.a.abs(), a.abs(), atol=1e-4)
    assert torch.allclose(ours.b.abs(), b.abs(), atol=1e-4)
    assert ours.base is not None
    assert torch.allclose(ours.base, base, atol=1e-5)


@pytest.mark.parametrize("strategy", [True, "gaussian", False, "orthogonal"])
def test_draws_are_distributed_as_in_peft(strategy):
    """Two-sample Kolmogorov-Smirnov: above 1.95 with probability 1e-3."""
    _, _, *theirs = by_peft(strategy, R, N, K, 16)
    ours = init_adapter(strategy, R, K, N, seed=19)
    for mine, other in zip((ours.a, ours.b), theirs, strict=True):
        assert mine.shape == other.shape
        if not other.any():
            assert not mine.any()
            continue
        x, y = np.sort(mine.numpy().ravel()), np.sort(other.numpy().ravel())
        grid = np.concatenate([x, y])
        gap = np.abs(np.searchsorted(x, grid, "right") - np.searchsorted(y, grid, "right")).max() / x.size
        assert gap * math.sqrt(x.size / 2) < 1.95


def test_orthogonal_of_peft_has_no_product_either():
    _, _, a, b = by_peft("orthogonal", 8, 48, 64, 16)
    assert (b.double() @ a.double()).abs().max() < 1e-6
    assert a.norm() * b.norm() > 1


# --- names and refusals -----------------------------------------------------------------------------------------------


def test_names():
    assert canonical(True) == canonical("original") == canonical("Kaiming") == "kaiming"
    assert canonical(False) == "random"
    assert canonical("pissa_niter_16") == "pissa_niter_16"
    for name in KNOWN:
        concrete = name.replace("_N", "_2")
        started = init_adapter(concrete, 2, 64, 4, weight=spectrum_weight(4, 64), seed=0, requantize=through_nf4)
        assert started.strategy == canonical(concrete)
        assert (started.base is not None) == changes_base(concrete)
        assert canonical(started.strategy) == started.strategy
    for name in ("kaming", "pissa_niter_", "pissa_niter_x", "pissa_niter_N", "", None, 3):
        with pytest.raises(ConfigError, match=r"known: True, False, kaiming, .*pissa_niter_N, olora, loftq"):
            canonical(name)


@pytest.mark.parametrize("strategy", ["pissa", "pissa_niter_2", "olora", "loftq"])
def test_factorisations_say_what_they_need(strategy):
    with pytest.raises(ConfigError, match=f"'{strategy}' factors the float weight"):
        init_adapter(strategy, 2, 6, 4, seed=0)
    with pytest.raises(DtypeError, match=r"float weight, got torch\.uint8"):
        init_adapter(strategy, 2, 6, 4, weight=torch.zeros(4, 6, dtype=torch.uint8), seed=0)
    with pytest.raises(ShapeError, match=r"shape \[4, 6\], got \[6, 4\]"):
        init_adapter(strategy, 2, 6, 4, weight=torch.zeros(6, 4), seed=0)
    with pytest.raises(ShapeError, match=r"min\(out, in\) = 4, got 5"):
        init_adapter(strategy, 5, 6, 4, weight=torch.zeros(4, 6), seed=0)
    with pytest.raises(ConfigError, match="positive scaling, got 0"):
        init_adapter(strategy, 2, 6, 4, weight=torch.zeros(4, 6), scaling=0.0, seed=0)


def test_other_arguments_out_of_range():
    with pytest.raises(ConfigError, match="base that gets quantized"):
        init_adapter("loftq", 2, 6, 4, weight=torch.ones(4, 6), seed=0)
    with pytest.raises(ConfigError, match="at least 1 iteration, got 0"):
        init_adapter("loftq", 2, 6, 4, weight=torch.ones(4, 6), seed=0, requantize=through_nf4, iterations=0)
    for sizes in ((0, 6, 4), (2, 0, 4), (2, 6, 0)):
        with pytest.raises(ShapeError, match="at least 1"):
            init_adapter("kaiming", *sizes, seed=0)
    for bound in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ConfigError, match="init_bound"):
            init_adapter("kaiming", 2, 6, 4, bound=bound, seed=0)
    with pytest.raises(ConfigError, match="init_seed"):
        init_adapter("kaiming", 2, 6, 4, seed=-1)
