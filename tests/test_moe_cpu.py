"""The CPU library's kernels of mixtures: odd sizes, every tier and dtype, any number of threads, guard bands."""

from __future__ import annotations

import itertools

import pytest
import torch

from fastlora import settings
from fastlora.backends import _cpu_library, cpu_mixture, reference_mixture
from fastlora.dispatch import registry
from fastlora.math.activations import activation
from fastlora.math.segments import GatedExperts, segments
from fastlora.ops import experts_fused
from fastlora.problem import DENSE, Problem
from fastlora.testing import guarded
from tests.experts_tools import E, GatedMLP, inputs, judge, mixlora, plugin, relative, step

pytestmark = pytest.mark.skipif(bool(_cpu_library.missing()), reason="CPU library not built")
TIERS = _cpu_library.library().tiers if not _cpu_library.missing() else ()
ACTS = tuple(cpu_mixture.ACTS)


class Drawn:
    """One problem: an expert without rows, rows without expert, ranks off every multiple."""

    def __init__(self, dtype=torch.float32, adapter=torch.float32, sizes=(70, 45, 150, 33), ranks=(5, 17, 9), slots=2):
        generator = torch.Generator().manual_seed(0)

        def randn(*shape, of=dtype, scale=1.0):
            return (scale * torch.randn(*shape, generator=generator)).to(of)

        self.tokens, self.k, self.n, self.out = sizes
        self.experts, self.slots = 4, slots
        index = torch.rand(self.tokens, self.experts + 1, generator=generator).argsort(1)[:, :slots]
        self.index = torch.where(index == 2, self.experts, index)  # expert 2 has no rows
        self.w = torch.rand(self.tokens, slots, generator=generator) * (self.index < self.experts)
        self.x, self.dy = randn(self.tokens, self.k), randn(self.tokens, self.out)
        self.c1, self.c3, self.d = (randn(self.tokens, self.n) for _ in range(3))
        shapes = ((self.k, self.n), (self.k, self.n), (self.n, self.out))
        self.sides = [
            (
                randn(self.experts, r, wide, of=adapter, scale=wide**-0.5),
                randn(self.experts, out, r, of=adapter, scale=r**-0.5),
                0.5 + place,
            )
            if r
            else None
            for place, (r, (wide, out)) in enumerate(zip(ranks, shapes, strict=True))
        ]
        self.rank = max(ranks)
        self.adapter, self.dtype = adapter, dtype

    def problem(self, op):
        sizes = (self.tokens * self.slots, self.n, self.k, self.rank, self.dtype, self.adapter)
        return Problem(op, *sizes, DENSE, 0, "cpu", self.experts)

    def kernels(self, act="silu", place=lambda t: t, backend=cpu_mixture):
        """Everything the two kernels give, by name."""
        rows = segments(self.index.reshape(-1), self.experts)
        sides = [None if s is None else (place(s[0]), place(s[1]), s[2]) for s in self.sides]
        x, w, dy, c1, c3, d = (place(t) for t in (self.x, self.w, self.dy, self.c1, self.c3, self.d))
        given = GatedExperts(x, w, rows, act, (c1, c3), sides)
        hidden, y, hs = backend.mixture_fwd(self.problem("mixture_fwd"), given, self.out, True)
        found = {"hidden": hidden, "y": y}
        needs = [(True, True)] * 3
        back = backend.mixture_bwd(self.problem("mixture_bwd"), dy, given, d, hs, needs, True, True)
        found |= dict(zip(("d_gate", "d_up", "dx", "dw"), back[:4], strict=True))
        for name, h, pair in zip(("gate", "up", "down"), hs, back[4], strict=True):
            found |= {f"{name} {what}": t for what, t in zip(("h", "da", "db"), (h, *pair), strict=True)}
        return found

    def truth(self, act="silu"):
        """The same by autograd in fp64, expert by expert."""
        leaves = {
            name: t.double().requires_grad_()
            for name, t in (("x", self.x), ("w", self.w), ("d_gate", self.c1), ("d_up", self.c3))
        }
        matrices = [
            None if s is None else [s[0].double().requires_grad_(), s[1].double().requires_grad_()] for s in self.sides
        ]
        d, dy = self.d.double(), self.dy.double()
        hidden = torch.zeros(self.tokens, self.n, dtype=torch.float64)
        y = torch.zeros(self.tokens, self.out, dtype=torch.float64)
        hs = [None if s is None else torch.zeros(self.tokens, self.slots, s[0].shape[1]) for s in self.sides]

        def delta(place, v, e, at):
            if matrices[place] is None:
                return 0.0
            a, b = matrices[place]
            h = v @ a[e].T
            hs[place][at] = h.detach().float()
            return self.sides[place][2] * h @ b[e].T

        for e, slot in itertools.product(range(self.experts), range(self.slots)):
            (tokens,) = torch.where(self.index[:, slot] == e)
            v, at, weight = leaves["x"][tokens], (tokens, slot), leaves["w"][tokens, slot, None]
            gate = leaves["d_gate"][tokens] + delta(0, v, e, at)
            u = activated(act, gate) * (leaves["d_up"][tokens] + delta(1, v, e, at))
            hidden = hidden.index_add(0, tokens, weight * u)
            last = delta(2, u, e, at)
            if isinstance(last, torch.Tensor):
                y = y.index_add(0, tokens, weight * last)
        ((hidden * d).sum() + (y * dy).sum()).backward()
        found = {"hidden": hidden, "y": y, "dx": leaves["x"].grad, "dw": leaves["w"].grad}
        found |= {name: leaves[name].grad for name in ("d_gate", "d_up")}
        for name, h, pair in zip(("gate", "up", "down"), hs, matrices, strict=True):
            found[f"{name} h"] = None if h is None else h.flatten(0, 1)
            for what, at in (("da", 0), ("db", 1)):
                found[f"{name} {what}"] = None if pair is None else pair[at].grad
        return {name: t if t is None else t.detach() for name, t in found.items()}


def activated(act, v):
    return torch.nn.functional.silu(v) if act == "silu" else torch.nn.functional.gelu(v, approximate="tanh")


def compare(got, want, adapter=torch.float32):
    assert got.keys() == want.keys()
    for name, expected in want.items():
        if expected is None:
            assert got[name] is None, name
            continue
        # 16-bit x and bases are exact here, and all sums fp32; gradients are rounded once.
        rounded = name.endswith(("da", "db")) and adapter != torch.float32
        budget = 5e-3 if rounded else 3e-6
        assert relative(got[name].double(), expected.double()) < budget, name


DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize(("dtype", "adapter"), [(t, t) for t in DTYPES] + [(torch.bfloat16, torch.float32)])
def test_every_tier_computes_the_equations(tier, act, dtype, adapter):
    drawn = Drawn(dtype, adapter)
    want = drawn.truth(act)
    compare(drawn.kernels(act, backend=reference_mixture), want, adapter)
    with settings.override(cpu_tier=tier):
        compare(drawn.kernels(act), want, adapter)


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("ranks", [(0, 4, 16), (16, 0, 0), (16, 16, 0), (33, 1, 64)])
@pytest.mark.parametrize("sizes", [(3, 7, 5, 4), (130, 256, 300, 256)])
def test_ranks_and_sizes(tier, ranks, sizes):
    drawn = Drawn(sizes=sizes, ranks=ranks, slots=3)
    with settings.override(cpu_tier=tier):
        compare(drawn.kernels(), drawn.truth())


@pytest.mark.parametrize("tier", TIERS)
def test_wide_hidden_rows_have_more_blocks_than_parts(tier):
    drawn = Drawn(sizes=(9, 20, 128 * 33 + 5, 30))
    with settings.override(cpu_tier=tier):
        compare(drawn.kernels(), drawn.truth())


@pytest.mark.parametrize("tier", TIERS)
def test_nothing_before_or_behind_an_operand_counts(tier):
    drawn = Drawn()
    with settings.override(cpu_tier=tier):
        for name, value in drawn.kernels(place=lambda t: guarded(t).tensor).items():
            assert value.isfinite().all(), name
            assert value.equal(drawn.kernels()[name]), name


def test_results_do_not_depend_on_threads():
    drawn = Drawn(sizes=(300, 512, 1376, 512), ranks=(16, 16, 16))
    before = torch.get_num_threads()
    found = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(drawn.kernels())
    finally:
        torch.set_num_threads(before)
    for name, value in found[0].items():
        assert value.equal(found[1][name]) and value.equal(found[2][name]), name


def test_large_and_missing_numbers_pass_the_activation():
    gate = torch.tensor([[-1e30, -200.0, -87.5, 0.0, 88.5, 200.0, 1e30, float("nan")]])
    w, rows, ones = torch.ones(1, 1), segments(torch.zeros(1, dtype=torch.int64), 1), torch.ones(1, 8)
    problem = Problem("mixture_fwd", 1, 8, 2, 1, torch.float32, torch.float32, DENSE, 0, "cpu", 1)
    side = (torch.zeros(1, 1, 2), torch.zeros(1, 8, 1), 1.0)
    for act in ACTS:
        given = GatedExperts(torch.ones(1, 2), w, rows, act, (gate, ones), (side, None, None))
        hidden, _, hs = cpu_mixture.mixture_fwd(problem, given, 2, False)
        assert hs == [None] * 3
        want = activation(act).forward(gate, torch.empty_like(gate))
        torch.testing.assert_close(hidden, want, rtol=2e-6, atol=1e-30, equal_nan=True)


# --- one linear -------------------------------------------------------------------------------------------------------


def routed(drawn, place=lambda t: t, backend=cpu_mixture):
    a, b = (place(t) for t in drawn.sides[0][:2])
    x, w, dy = place(drawn.x), place(drawn.w), place(drawn.d)
    rows, side = segments(drawn.index.reshape(-1), drawn.experts), (a, b, drawn.sides[0][2])
    y, dx = torch.ones(drawn.tokens, drawn.n), torch.ones(drawn.tokens, drawn.k)
    h = backend.routed_fwd(drawn.problem("routed_fwd"), x, w, rows, side, y, True)
    problem = drawn.problem("routed_bwd")
    dw, da, db = backend.routed_bwd(problem, dy, x, w, rows, side, h, dx, (True, True, True))
    return {"y": y, "h": h, "dx": dx, "dw": dw, "da": da, "db": db}


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize(("dtype", "adapter"), [(t, t) for t in DTYPES] + [(torch.bfloat16, torch.float32)])
def test_one_linear(tier, dtype, adapter):
    drawn = Drawn(dtype, adapter)
    a, b, scale = drawn.sides[0]
    x, w, a, b = (t.double().requires_grad_() for t in (drawn.x, drawn.w, a, b))
    y, h = torch.ones(drawn.tokens, drawn.n, dtype=torch.float64), torch.zeros(drawn.tokens, drawn.slots, a.shape[1])
    for e, slot in itertools.product(range(drawn.experts), range(drawn.slots)):
        (tokens,) = torch.where(drawn.index[:, slot] == e)
        ranks = x[tokens] @ a[e].T
        h[tokens, slot] = ranks.detach().float()
        y = y.index_add(0, tokens, scale * w[tokens, slot, None] * ranks @ b[e].T)
    y.backward(drawn.d.double())
    want = {"y": y.detach(), "h": h.flatten(0, 1), "dx": x.grad + 1, "dw": w.grad, "da": a.grad, "db": b.grad}
    compare(routed(drawn, backend=reference_mixture), want, adapter)
    with settings.override(cpu_tier=tier):
        got = routed(drawn)
        compare(got, want, adapter)
        for name, value in routed(drawn, lambda t: guarded(t).tensor).items():
            assert value.equal(got[name]), name


# --- the layers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", ["mixlora", "mola"])
def test_layers_take_the_kernels_and_agree_with_what_they_replace(method, dtype, monkeypatch):
    module = (mixlora(GatedMLP(True)) if method == "mixlora" else plugin("mola")).to(dtype)
    x, dy = inputs(module, dtype, (3, 50))
    ran = []
    real = _cpu_library.Library.call
    monkeypatch.setattr(_cpu_library.Library, "call", lambda self, op, record: ran.append(op) or real(self, op, record))
    got = step(module, x, dy)
    kernel = "mixture" if method == "mixlora" else "routed"
    assert [op for op in ran if not op.startswith("lora_")] == [f"{kernel}_fwd", f"{kernel}_bwd"]
    judge(module, x, dy, got)
    monkeypatch.setattr(registry, "has_own", lambda *args: False)
    for name, value in step(module, x, dy).items():
        assert relative(got[name], value) < (2e-6 if dtype == torch.float32 else 2e-2), name


@pytest.mark.parametrize("frozen", ["x", "gate", "lora_A", "lora_B", "all but the gate"])
def test_only_what_is_needed(frozen):
    for module in (mixlora(), plugin("mola")):
        for name, parameter in module.named_parameters():
            trained = name.startswith("gate.") or "lora" in name
            stays = frozen in name if frozen != "all but the gate" else "lora" in name
            parameter.requires_grad_(trained and not stays)
        x, dy = inputs(module)
        x = x.detach().requires_grad_(frozen != "x")
        y = module(x)
        y.backward(dy)
        assert (x.grad is None) == (frozen == "x")
        for name, parameter in module.named_parameters():
            assert (parameter.grad is not None) == parameter.requires_grad, name


def test_what_the_kernels_do_not_take_is_composed():
    x, w, index = torch.randn(6, 40), torch.rand(6, 2), torch.zeros(6, 2, dtype=torch.int64)
    module = mixlora()
    layers = [part.frozen(torch.float32) for part in module.projections.values()]
    tensors = [t for part in module.projections.values() for t in part.adapters()]

    def found(act="silu", seed=None, weights=w, given=tensors):
        return experts_fused.mixture_of(x, weights, index, seed, layers, given, act) is not None

    assert found()
    assert not found(act="relu") and not found(act=torch.sin)
    assert not found(seed=torch.zeros(1, dtype=torch.int64))
    assert not found(weights=w.double()) and not found(given=[None] * 9)
    assert not found(given=[*tensors[:2], torch.ones(E, 56), *tensors[3:]])
    with settings.override(backend="reference"):
        assert not found()
