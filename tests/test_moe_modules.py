"""MixLoraMLP, LoraMoeLinear and MolaLinear compute what the plain forward does, with all gradients, and are modules."""

from __future__ import annotations

import copy
import io
import itertools
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastlora
from fastlora import moe, settings
from fastlora.errors import ConfigError, DtypeError, ShapeError
from fastlora.math import philox
from fastlora.math.activations import KNOWN, by_autograd
from fastlora.ops import experts_fused, experts_mlp, experts_schema
from tests.experts_tools import (
    TOKENS,
    E,
    FusedMLP,
    GatedMLP,
    H,
    I,
    PlainMLP,
    inputs,
    judge,
    mixlora,
    op_samples,
    plugin,
    relative,
    step,
    truth,
)

STRATEGIES = {
    "top-k": {},
    "top-1": {"top_k": 1},
    "all": {"top_k": E},
    "top-p": {"routing_strategy": "mixlora-dynamic", "top_p": 0.6},
    "top-p cooled": {"routing_strategy": "mixlora-dynamic", "top_p": 0.9, "temperature": 1.5},
    "switch": {"routing_strategy": "mixlora-switch", "expert_capacity": 2},
}


def check(module, dtype=torch.float32, tokens=TOKENS):
    x, dy = inputs(module, dtype, tokens)
    judge(module, x, dy, step(module, x, dy))


# --- the function -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("strategy", list(STRATEGIES))
def test_mixlora_equals_the_plain_forward(strategy, bias, dora):
    check(mixlora(GatedMLP(bias), use_dora=dora, **STRATEGIES[strategy]))


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("mlp", [FusedMLP, PlainMLP])
@pytest.mark.parametrize("strategy", ["top-k", "switch"])
def test_other_layouts(strategy, mlp, dora):
    check(mixlora(mlp(bias=True), use_dora=dora, **STRATEGIES[strategy]))


@pytest.mark.parametrize("act", [nn.GELU(), nn.GELU(approximate="tanh"), nn.ReLU(), nn.Softplus()])
def test_other_activations(act):
    check(mixlora(GatedMLP(act=act)))


@pytest.mark.parametrize("targets", [["gate_proj"], ["down_proj"], ["up_proj", "down_proj"], {"gate_proj": True}])
def test_some_projections_without_adapters(targets):
    module = mixlora(target_modules=targets)
    assert {name for name, part in module.projections.items() if part.lora_A is not None} == set(targets)
    check(module)


def test_experts_have_their_own_rank_and_scale():
    module = mixlora(expert_lora={"r": 6, "lora_alpha": 9, "use_rslora": True})
    assert module.gate_proj.lora_A.shape == (E, 6, H)
    assert module.gate_proj.scaling == pytest.approx(9 / 6**0.5)
    check(module)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("method", ["loramoe", "mola"])
def test_plugins_equal_the_plain_forward(method, bias):
    check(plugin(method, bias=bias))


def test_mola_takes_one_expert_or_all():
    check(plugin("mola", top_k=1))
    check(plugin("mola", top_k=E))


@pytest.mark.parametrize("quantize", ["nf4", "fp4"])
@pytest.mark.parametrize("dora", [False, True])
def test_over_a_4_bit_base(quantize, dora):
    base = {"quantize": quantize, "blocksize": 32}
    check(mixlora(GatedMLP(bias=True), base=base, use_dora=dora))
    check(plugin("loramoe", base=base))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("strategy", ["top-k", "top-p", "switch"])
def test_16_bit_bases_route_in_fp32(dtype, strategy):
    module = mixlora(GatedMLP(bias=True).to(dtype), **STRATEGIES[strategy])
    x, dy = inputs(module, dtype)
    got = step(module, x, dy)
    assert got["y"].dtype == dtype and module.gate.logits.dtype == torch.float32
    judge(module, x, dy, got)
    for method in ("loramoe", "mola"):
        check(plugin(method).to(dtype), dtype)


@pytest.mark.parametrize("strategy", ["top-k", "top-p", "switch"])
def test_float64(strategy):
    check(mixlora(GatedMLP(True).double(), use_dora=True, **STRATEGIES[strategy]).double(), torch.float64)
    check(plugin("mola").double(), torch.float64)


@pytest.mark.parametrize("strategy", ["top-k", "top-p", "switch"])
@pytest.mark.parametrize("dora", [False, True])
def test_chunks_change_nothing_but_rounding(strategy, dora, monkeypatch):
    module = mixlora(GatedMLP(True), use_dora=dora, **STRATEGIES[strategy])
    x, dy = inputs(module, tokens=(3, 100))
    monkeypatch.setattr(experts_mlp, "_whole", lambda *args: None)
    whole = step(module, x, dy)
    monkeypatch.setattr(experts_mlp, "_CHUNK_BYTES", 1)
    calls = []
    real = experts_mlp._add
    monkeypatch.setattr(experts_mlp, "_add", lambda *args: calls.append(len(args[1])) or real(*args))
    cut = step(module, x, dy)
    assert len(calls) > 10  # five chunks of 64 tokens, in both directions
    judge(module, x, dy, cut)
    for name, value in whole.items():
        assert relative(cut[name], value) < 2e-6, name


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_every_backend(backend):
    with settings.override(backend=backend):
        check(mixlora(use_dora=True))
        check(plugin("mola"))


def test_one_token_no_token_and_two_dimensions():
    for module in (mixlora(), mixlora(**STRATEGIES["top-p"]), mixlora(**STRATEGIES["switch"]), plugin("mola")):
        for tokens in ((1, 1), (7,)):
            x, dy = inputs(module, tokens=tokens)
            got = step(module, x, dy)
            want = truth(module, x, dy)
            for name in ("y", "dx"):
                assert relative(got[name], want[name]) < 1e-5
        for tokens in ((0,), (2, 0)):
            x, dy = inputs(module, tokens=tokens)
            got = step(module, x, dy)
            assert got["y"].shape == dy.shape and got["dx"].shape == x.shape
            assert all(not got[name].any() for name in got if name not in ("y", "dx"))


@pytest.mark.parametrize("name", list(KNOWN))
def test_activations_know_their_derivatives(name):
    functions = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"), "relu": F.relu}
    z, d = torch.randn(2, 50, dtype=torch.float64)
    ours, plain = KNOWN[name], by_autograd(functions[name])
    assert torch.equal(ours.forward(z, torch.empty_like(z)), functions[name](z))
    want = plain.backward(d, z, torch.empty_like(z))
    torch.testing.assert_close(ours.backward(d, z, torch.empty_like(z)), want, rtol=1e-12, atol=0)
    again = z.clone()
    assert torch.equal(ours.backward(d, again, again), ours.backward(d, z, torch.empty_like(z)))  # in place


# --- dropout ----------------------------------------------------------------------------------------------------------


def spied_masks(monkeypatch):
    """The dropout bits of every linear of the next forwards, unpacked."""
    masks = []
    real = experts_schema.experts_mask

    def spy(seed, a, *rest):
        bits = real(seed, a, *rest)
        masks.append(philox.unpack_bits(bits, a.shape[2]))
        return bits

    monkeypatch.setattr(experts_schema, "experts_mask", spy)
    return masks


@pytest.mark.parametrize("low_memory", [False, True])
@pytest.mark.parametrize("dora", [False, True])
def test_dropout_of_experts_is_replayed_in_the_backward(dora, low_memory, monkeypatch):
    module = mixlora(GatedMLP(True), use_dora=dora, lora_dropout=0.4)
    x, dy = inputs(module, tokens=(3, 70))
    monkeypatch.setattr(experts_mlp, "_CHUNK_BYTES", 1)  # several chunks
    masks = spied_masks(monkeypatch)
    with settings.override(low_memory=low_memory):
        got = step(module, x, dy)
    assert len(masks) == (6 if low_memory else 3)
    judge(module, x, dy, got, keeps=masks[:3])
    for mask in masks[:3]:
        assert 0.55 < mask.float().mean() < 0.65
    # Every slot of a token, and every projection, has a mask of its own.
    first, second = masks[0].view(-1, 2, H).unbind(1)
    assert (first != second).float().mean() > 0.3 and (masks[0] != masks[1]).float().mean() > 0.3


@pytest.mark.parametrize("method", ["loramoe", "mola"])
def test_dropout_of_plugins_is_one_mask_for_all_experts(method, monkeypatch):
    module = plugin(method, lora_dropout=0.4)
    x, dy = inputs(module)
    seed = torch.tensor([11])
    monkeypatch.setattr("fastlora.moe.plugin.draw_seed", lambda device: seed)
    got = step(module, x, dy)
    keep = fastlora.functional.dropout_mask((x.shape[0] * x.shape[1], H), 0.4, seed)
    judge(module, x, dy, got, keeps=[keep])


@pytest.mark.parametrize("make", [lambda **f: mixlora(**f), lambda **f: plugin("loramoe", **f)])
def test_dropout_obeys_training(make):
    module, plain = make(lora_dropout=0.5), make()
    x, _ = inputs(module)
    assert not torch.equal(module(x), module(x))
    assert torch.equal(module.eval()(x), module(x))
    assert torch.equal(module(x), plain.eval()(x))


# --- cost -------------------------------------------------------------------------------------------------------------


def saved_bytes(module, x):
    seen = {}

    def pack(tensor):
        if not isinstance(tensor, nn.Parameter):
            seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = module(x)
    return sum(seen.values()), y


def test_saved_memory_is_x_c1_c3_and_what_is_as_wide_as_a_rank():
    torch.manual_seed(0)
    config = moe.MixLoraConfig(num_experts=8, top_k=2, r=16, lora_alpha=32)
    module = moe.MixLoraMLP.from_mlp(GatedMLP(h=512, i=1376).bfloat16(), config)
    saved, _ = saved_bytes(module, torch.randn(1024, 512, dtype=torch.bfloat16, requires_grad=True))
    formula = 2 * 1024 * (512 + 2 * 1376)
    assert formula < saved < 1.1 * formula
    assert saved <= 12e6


def test_the_base_is_multiplied_three_times_for_any_k(monkeypatch):
    rows = []
    for where in ("base_forward", "base_backward"):
        real = getattr(experts_mlp, where)
        for place in (experts_mlp, experts_fused):
            monkeypatch.setattr(
                place, where, lambda x, *rest, real=real, **kw: rows.append(len(x)) or real(x, *rest, **kw)
            )
    for top_k in (1, 2, 4):
        rows.clear()
        module = mixlora(top_k=top_k)
        x, dy = inputs(module)
        step(module, x, dy)
        assert rows == [22] * 6
    rows.clear()
    module = mixlora(use_dora=True)  # DoRA on the last projection: a product for each row
    x, dy = inputs(module)
    step(module, x, dy)
    assert sorted(rows) == [22] * 4 + [44] * 2


# --- modules ----------------------------------------------------------------------------------------------------------

MAKERS = {
    "mixlora": lambda: mixlora(use_dora=True),
    "mixlora nf4": lambda: mixlora(base={"quantize": "nf4"}),
    "loramoe": lambda: plugin("loramoe"),
    "mola nf4": lambda: plugin("mola", base={"quantize": "nf4", "double_quant": False}),
}


@pytest.mark.parametrize("kind", list(MAKERS))
def test_copies_pickles_and_state_dicts(kind):
    module = MAKERS[kind]()
    x, dy = inputs(module)
    want = step(module, x, dy)  # leaves router logits with a graph behind
    buffer = io.BytesIO()
    torch.save(module.state_dict(), buffer)
    buffer.seek(0)
    fresh = MAKERS[kind]()
    for parameter in fresh.parameters():
        if parameter.is_floating_point():
            torch.nn.init.zeros_(parameter)
    fresh.load_state_dict(torch.load(buffer, weights_only=True))
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), fresh):
        got = step(other, x, dy)
        assert all(torch.equal(got[name], want[name]) for name in want)


def test_names_and_shapes():
    module = mixlora(use_dora=True)
    shapes = {name: tuple(p.shape) for name, p in module.named_parameters() if p.requires_grad}
    assert shapes == {
        "gate_proj.lora_A": (E, 3, H),
        "gate_proj.lora_B": (E, I, 3),
        "gate_proj.lora_magnitude": (E, I),
        "up_proj.lora_A": (E, 3, H),
        "up_proj.lora_B": (E, I, 3),
        "up_proj.lora_magnitude": (E, I),
        "down_proj.lora_A": (E, 3, I),
        "down_proj.lora_B": (E, H, 3),
        "down_proj.lora_magnitude": (E, H),
        "gate.weight": (E, H),
    }
    assert {n: tuple(p.shape) for n, p in plugin("mola").named_parameters() if p.requires_grad} == {
        "lora_A": (E, 3, H),
        "lora_B": (E, I, 3),
        "gate.weight": (E, H),
    }


def test_a_new_mixture_is_its_base():
    torch.manual_seed(0)
    mlp, x = GatedMLP(True), torch.randn(2, 5, H)
    want = mlp(x)
    config = moe.MixLoraConfig(num_experts=E, r=4, use_dora=True)
    module = moe.MixLoraMLP.from_mlp(mlp, config)
    assert module.gate_proj.weight is mlp.gate_proj.weight and not mlp.gate_proj.weight.requires_grad
    torch.testing.assert_close(module(x), want, rtol=1e-5, atol=1e-6)
    linear = nn.Linear(H, I)
    for kind, made in ((moe.LoraMoeLinear, moe.LoraMoeConfig), (moe.MolaLinear, moe.MolaConfig)):
        torch.testing.assert_close(kind.from_linear(linear, made(num_experts=3))(x), linear(x), rtol=1e-5, atol=1e-6)


def test_starts_are_as_specified_and_seeded():
    torch.manual_seed(0)
    mlp = GatedMLP(h=400, i=300)
    fields = {"num_experts": 64, "r": 8, "init_seed": 5}

    def gates(**more):
        return moe.MixLoraMLP.from_mlp(mlp, moe.MixLoraConfig(**fields, **more)).gate.weight.detach()

    assert gates().std() == pytest.approx(0.02, rel=0.05)
    assert gates(routing_strategy="mixlora-switch").std() == pytest.approx(1.0, rel=0.05)
    assert gates(router_init_range=0.3).std() == pytest.approx(0.3, rel=0.05)
    for kind, config in ((moe.LoraMoeLinear, moe.LoraMoeConfig), (moe.MolaLinear, moe.MolaConfig)):
        made = kind.from_linear(nn.Linear(400, 10), config(**fields))
        assert made.gate.weight.detach().abs().max() == pytest.approx(400**-0.5, rel=0.01)
        assert made.lora_A.detach().abs().max() == pytest.approx(400**-0.5, rel=0.01) and not made.lora_B.any()
    one, two = (moe.MixLoraMLP.from_mlp(GatedMLP(), moe.MixLoraConfig(num_experts=3, init_seed=s)) for s in (1, 2))
    same = moe.MixLoraMLP.from_mlp(GatedMLP(), moe.MixLoraConfig(num_experts=3, init_seed=1))
    for name in ("gate_proj.lora_A", "down_proj.lora_A", "gate.weight"):
        assert torch.equal(one.get_parameter(name), same.get_parameter(name))
        assert not torch.equal(one.get_parameter(name), two.get_parameter(name))
    assert not torch.equal(one.gate_proj.lora_A[0], one.gate_proj.lora_A[1])
    drawn = moe.MixLoraMLP.from_mlp(GatedMLP(), moe.MixLoraConfig(num_experts=3))
    assert drawn.config.init_seed is not None  # recorded


def test_the_gate_stays_in_fp32():
    module = mixlora()
    before = module.gate.weight.detach().clone()
    module.to(torch.bfloat16)
    assert module.gate.weight.dtype == torch.float32 and torch.equal(module.gate.weight, before)
    assert module.gate_proj.weight.dtype == module.gate_proj.lora_A.dtype == torch.bfloat16
    assert module.half().gate.weight.dtype == torch.float32
    assert module.double().gate.weight.dtype == torch.float64


def test_meta_device():
    with torch.device("meta"):
        mlp, linear = GatedMLP(), nn.Linear(H, I)
    module = moe.MixLoraMLP.from_mlp(mlp, moe.MixLoraConfig(num_experts=3, use_dora=True))
    other = moe.MolaLinear.from_linear(linear, moe.MolaConfig(num_experts=3))
    assert all(p.is_meta for p in itertools.chain(module.parameters(), other.parameters()))


def test_unused_experts_get_zero_gradients():
    module = mixlora(top_k=1)
    with torch.no_grad():
        module.gate.weight.zero_()
        module.gate.weight[2] = 1.0
    x, dy = inputs(module)
    got = step(module, x.abs(), dy)  # every token goes to expert 2
    for name in ("gate_proj.lora_A", "gate_proj.lora_B", "down_proj.lora_A", "down_proj.lora_B"):
        assert got[name][2].any() and not got[name][[0, 1, 3, 4]].any()


def test_inference_mode_first():
    module = mixlora()
    x, dy = inputs(module)
    with torch.inference_mode():
        module(x)
    judge(module, x, dy, step(module, x, dy))


def test_frozen_adapters_take_part():
    module = mixlora()
    x, _ = inputs(module)
    want = module(x)
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    assert torch.equal(module(x), want)


def test_jitter_is_out_of_place_and_for_training_alone():
    for strategy in ("top-k", "switch"):
        module = mixlora(**{**STRATEGIES[strategy], "jitter_noise": 0.3})
        x, _ = inputs(module)
        before = x.clone()
        noisy = module(x)
        assert torch.equal(x, before)
        still = module.eval()(x)
        assert torch.equal(module(x), still) and not torch.equal(noisy, still)


def test_ffn_dropout_of_switch():
    module = mixlora(**STRATEGIES["switch"], ffn_dropout=0.5)
    x, _ = inputs(module)
    assert 0.4 < (module(x) == 0).float().mean() < 0.6
    assert (module.eval()(x) != 0).all()


# --- what does not fit ------------------------------------------------------------------------------------------------


def test_wrong_inputs():
    module = mixlora()
    with pytest.raises(ShapeError, match="last dimension 40"):
        module(torch.randn(2, 3, 41))
    with pytest.raises(DtypeError, match="one dtype"):
        module(torch.randn(2, 3, H, dtype=torch.bfloat16))
    with pytest.raises(DtypeError, match="not called"):
        module.gate_proj(torch.randn(2, H))
    with pytest.raises(ShapeError, match="last dimension 40"):
        plugin("mola")(torch.randn(3, 4))


def test_wrong_modules():
    config = moe.MixLoraConfig(num_experts=2)
    with pytest.raises(ConfigError, match="Linear is no MLP"):
        moe.MixLoraMLP.from_mlp(nn.Linear(3, 4), config)
    mlp = GatedMLP()
    del mlp.act_fn
    with pytest.raises(ConfigError, match="has no activation"):
        moe.MixLoraMLP.from_mlp(mlp, config)
    with pytest.raises(ConfigError, match="not an activation"):
        moe.MixLoraMLP.from_mlp(GatedMLP(), config.replace(act_fn="siluu"))
    with pytest.raises(ConfigError, match="names no linear of the MLP"):
        moe.MixLoraMLP.from_mlp(GatedMLP(), config.replace(target_modules=["q_proj"]))
    with pytest.raises(DtypeError, match=r"expected an nn\.Linear"):
        moe.MolaLinear.from_linear(nn.Bilinear(2, 3, 4), moe.MolaConfig(num_experts=2))
    with pytest.raises(DtypeError, match="expected a MolaConfig"):
        moe.MolaLinear.from_linear(nn.Linear(2, 3), moe.LoraMoeConfig(num_experts=2))
    with pytest.raises(ConfigError, match="quantize must be"):
        moe.LoraMoeLinear.from_linear(nn.Linear(2, 3), moe.LoraMoeConfig(num_experts=2), quantize="nf5")
    with pytest.raises(ConfigError, match="a model's layers"):
        moe.MolaLinear.from_linear(nn.Linear(2, 3), moe.MolaConfig(num_experts=[2, 4]))
    broken = nn.Linear(4, 4)
    broken.weight.data[1, 1] = float("nan")
    with pytest.raises(ShapeError, match="NaN"):
        moe.LoraMoeLinear.from_linear(broken, moe.LoraMoeConfig(num_experts=2), quantize="nf4")
    assert broken.weight.requires_grad  # unchanged


class Scaled(GatedMLP):
    """The names of a gated MLP, another function."""

    def forward(self, x):
        return 2 * super().forward(x)


def test_another_function_under_the_same_names_is_refused():
    mlp = Scaled()
    with pytest.raises(ConfigError, match="computes something else"):
        moe.MixLoraMLP.from_mlp(mlp, moe.MixLoraConfig(num_experts=2))
    assert mlp.gate_proj.weight.requires_grad and mlp.training


# --- ops --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sample", [pytest.param(s, id=f"{i}-{s[0]}") for i, s in enumerate(op_samples())])
def test_opcheck(sample):
    name, args = sample
    results = torch.library.opcheck(getattr(torch.ops.fastlora, name).default, args)
    assert set(results.values()) == {"SUCCESS"}, results
