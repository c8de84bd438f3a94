"""Configs, routing and auxiliary losses: what each formula says, token by token, and what is refused."""

from __future__ import annotations

import json
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastlora import moe
from fastlora.errors import ConfigError, DtypeError, ShapeError
from fastlora.math import moe as reference
from fastlora.ops.experts import RouterLogits, product_of_terms, tf32_terms
from tests.experts_tools import E, H, inputs, mixlora, plugin

T = 60


def logits(width=2.0, tokens=T, experts=E, dtype=torch.float64):
    torch.manual_seed(0)
    return width * torch.randn(tokens, experts, dtype=dtype)


# --- routing ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 2, E])
def test_top_k_token_by_token(k):
    z = logits()
    w, experts = reference.route_top_k(z, k)
    for t in range(T):
        p = [math.exp(v) for v in z[t].tolist()]
        best = sorted(range(E), key=lambda e: -p[e])[:k]
        assert experts[t].tolist() == best
        mass = sum(p[e] for e in best)
        assert w[t].tolist() == pytest.approx([p[e] / mass for e in best], rel=1e-12)


@pytest.mark.parametrize("temperature", [0.0, 0.7, 2.0])
@pytest.mark.parametrize("top_p", [1e-9, 0.3, 0.8, 1.0])
def test_top_p_token_by_token(top_p, temperature):
    z = logits()
    w, experts = reference.route_top_p(z, top_p, temperature)
    counts = set()
    for t in range(T):
        p = F.softmax(z[t], -1)
        p = (p / temperature if temperature else p).tolist()
        before, kept = 0.0, {}
        for e in sorted(range(E), key=lambda e: -p[e]):
            if before > top_p:
                break
            kept[e] = p[e]  # the expert that crosses top_p stays
            before += p[e]
        mine = {e: v for e, v in zip(experts[t].tolist(), w[t].tolist(), strict=True) if e < E}
        assert mine.keys() == kept.keys()
        assert all(mine[e] == pytest.approx(kept[e], rel=1e-12) for e in kept)
        assert not w[t][experts[t] == E].any()
        counts.add(len(kept))
    if top_p == 0.8 and temperature < 2:  # halved, all of them together stay below top_p
        assert len(counts) > 1
        if not temperature:
            assert w.sum(-1).min() > 0.8 and w.sum(-1).max() < 1  # not renormalised


def test_top_p_of_an_even_start_keeps_all():
    _, experts = reference.route_top_p(logits(width=1e-3, experts=4), 0.8)
    assert (experts < 4).all()


@pytest.mark.parametrize("capacity", [1, 3, 100])
def test_switch_fills_each_expert_in_order_in_each_sequence(capacity):
    z, sequence = logits(), 20
    w, experts = reference.route_switch(z, capacity, sequence)
    lost = 0
    for start in range(0, T, sequence):
        taken = [0] * E
        for t in range(start, start + sequence):
            best = int(z[t].argmax())
            taken[best] += 1
            assert experts[t].item() == (best if taken[best] <= capacity else E)
            lost += taken[best] > capacity
            assert w[t].item() == pytest.approx(F.softmax(z[t], -1).max().item(), rel=1e-12)
    assert (lost == 0) == (capacity == 100)


def test_scattered_gates():
    z = logits()
    routing = reference.route_top_k(z, 2)
    gates = reference.scatter_gates(routing, E)
    assert ((gates > 0).sum(-1) == 2).all()
    assert torch.equal(gates.gather(1, routing.experts), routing.weights)
    some = reference.route_top_p(z, 0.5)
    torch.testing.assert_close(reference.scatter_gates(some, E).sum(-1), some.weights.sum(-1))


@pytest.mark.parametrize(
    "route",
    [
        lambda z: reference.route_top_k(z, 2)[0],
        lambda z: reference.route_top_p(z, 0.6, 1.3)[0],
        lambda z: reference.route_switch(z, 2, 5)[0],
        lambda z: reference.scatter_gates(reference.route_top_k(z, 3), E),
        lambda z: reference.balance(z, reference.route_top_k(z, 2).experts),
        lambda z: reference.balance(z, reference.route_top_p(z, 0.6).experts, normalized=True),
        reference.switch_balance,
        reference.z_loss,
        lambda z: reference.balance_constraint(F.softmax(z, -1).view(2, 5, E), torch.tensor([0, 1]), 0.3),
    ],
)
def test_gradients(route):
    z = logits(tokens=10).requires_grad_()
    assert torch.autograd.gradcheck(route, (z,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_product_that_tf32_does_not_round(dtype):
    """What runs on a GPU, where TF32 may be allowed: every operand is its own rounding to 10 bits after the first."""
    torch.manual_seed(0)
    x, gate = torch.randn(9, 33).to(dtype), torch.randn(E, 33) * 0.02
    for t in (x, gate):
        terms = tf32_terms(t)
        assert torch.equal(sum(terms[1:], terms[0]), t.float())
        for term in terms:
            mantissa = torch.frexp(term).mantissa * 2**11
            assert torch.equal(mantissa, mantissa.round())
    want = x.double() @ gate.double().T
    torch.testing.assert_close(product_of_terms(x, gate).double(), want, rtol=0, atol=4e-7 * want.abs().max().item())


def test_router_product_is_fp32_whatever_comes_in():
    torch.manual_seed(0)
    x, gate = torch.randn(7, H), torch.randn(E, H, requires_grad=True)
    small = x.bfloat16().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z = RouterLogits.apply(small, gate)
    assert z.dtype == torch.float32
    torch.testing.assert_close(z, small.detach().float() @ gate.detach().T)
    dz = torch.randn(7, E)
    z.backward(dz)
    torch.testing.assert_close(gate.grad, dz.T @ small.detach().float())
    assert small.grad.dtype == torch.bfloat16
    torch.testing.assert_close(small.grad, (dz @ gate.detach()).bfloat16())
    double = [torch.randn(4, 6, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    assert torch.autograd.gradcheck(RouterLogits.apply, double)


# --- losses -----------------------------------------------------------------------------------------------------------


def counted(z, chosen, mask):
    """E sum_j sum_e f P and the slots in use, by counting."""
    rows = [t for t in range(len(z)) if mask is None or mask.reshape(-1)[t]]
    p = F.softmax(z, -1)
    total, used = 0.0, 0.0
    for slot in range(max(map(len, chosen))):
        for e in range(E):
            f = sum(slot < len(chosen[t]) and chosen[t][slot] == e for t in rows) / len(rows)
            total += f * sum(p[t, e].item() for t in rows) / len(rows)
            used += f
    return E * total, used


MASKS = [None, torch.tensor([[1] * 20 + [0] * 10, [0] * 4 + [1] * 26])]


@pytest.mark.parametrize("mask", MASKS)
def test_balance_losses_by_counting(mask):
    z = logits()
    top = [z[t].argsort(descending=True)[:2].tolist() for t in range(T)]
    want, used = counted(z, top, mask)
    experts = reference.route_top_k(z, 2).experts
    assert used == pytest.approx(2)
    assert reference.balance(z, experts, mask).item() == pytest.approx(want, rel=1e-9)
    assert reference.balance(z, experts, mask, normalized=True).item() == pytest.approx(want / 2, rel=1e-9)
    routing = reference.route_top_p(z, 0.7)
    kept = [[e for e in row if e < E] for row in routing.experts.tolist()]
    want, used = counted(z, kept, mask)
    assert 1 < used < E
    assert reference.balance(z, routing.experts, mask).item() == pytest.approx(want, rel=1e-9)
    assert reference.balance(z, routing.experts, mask, normalized=True).item() == pytest.approx(want / used, rel=1e-9)
    want, _ = counted(z, [row[:1] for row in top], mask)
    assert reference.switch_balance(z, mask).item() == pytest.approx(want, rel=1e-9)
    rows = [t for t in range(T) if mask is None or mask.reshape(-1)[t]]
    squares = [math.log(sum(math.exp(v) for v in z[t].tolist())) ** 2 for t in rows]
    assert reference.z_loss(z, mask).item() == pytest.approx(sum(squares) / len(rows), rel=1e-9)


def test_an_even_load_gives_k_and_1():
    z = 1e-4 * torch.eye(E, dtype=torch.float64).repeat(4, 1)
    chosen = torch.stack([torch.arange(E), (torch.arange(E) + 1) % E], 1).repeat(4, 1)
    assert reference.balance(z, chosen).item() == pytest.approx(2, rel=1e-6)
    assert reference.balance(z, chosen, normalized=True).item() == pytest.approx(1, rel=1e-6)
    assert reference.switch_balance(z).item() == pytest.approx(1, rel=1e-6)
    assert reference.balance_constraint(F.softmax(0 * z, -1).view(2, 10, E)).item() == 0
    assert reference.balance_constraint(torch.rand(1, 5, 1)).item() == 0  # one entry has no variance


@pytest.mark.parametrize("types", [None, [1, 0, 1]])
@pytest.mark.parametrize("experts", [4, 5])
def test_balance_constraint_by_hand(types, experts):
    torch.manual_seed(0)
    p, alpha = F.softmax(torch.randn(3, 7, experts, dtype=torch.float64), -1), 0.25
    values = []
    for b in range(3):
        for e in range(experts):
            factor = 1.0
            if types is not None:
                preferred = (types[b] == 1 and e < experts / 2) or (types[b] == 0 and e >= experts / 2)
                factor = 1 + alpha if preferred else 1 - alpha
            values.append(factor * sum(p[b, s, e].item() for s in range(7)))
    mean = sum(values) / len(values)
    variance = sum((v - mean) ** 2 for v in values) / (len(values) - 1)
    got = reference.balance_constraint(p, None if types is None else torch.tensor(types), alpha)
    assert got.item() == pytest.approx(variance / (mean**2 + 1e-10), rel=1e-9)
    mask = torch.tensor([[1] * 7, [1] * 4 + [0] * 3, [1] * 7])
    short = reference.balance_constraint(p * mask[..., None], None)
    torch.testing.assert_close(reference.balance_constraint(p, None, 0.0, mask), short)


# --- router_loss over a model -----------------------------------------------------------------------------------------


def model_of(*modules):
    """A model of several mixtures, each seeing the same tokens; layers numbered in turn."""
    model = nn.ModuleList(modules)
    for layer, module in enumerate(modules):
        module.layer = layer
    return model


def run(model, seeds=(3, 4, 5)):
    for module, seed in zip(model, seeds, strict=False):
        torch.manual_seed(seed)
        module(torch.randn(2, 11, H))


def test_pooled_and_per_layer():
    model = model_of(*(plugin("mola", router_loss=True, router_aux_loss_coef=0.01) for _ in range(3)))
    run(model)
    z = list(moe.router_logits(model).values())
    assert list(moe.router_logits(model)) == ["0", "1", "2"] and z[0].shape == (22, E)

    def loss(z, mask=None):
        return reference.balance(z, reference.route_top_k(z, 2).experts, mask)

    torch.testing.assert_close(moe.router_loss(model), 0.01 * loss(torch.cat(z)))
    torch.testing.assert_close(moe.router_loss(model, normalized=True), 0.01 * loss(torch.cat(z)) / 2)
    torch.testing.assert_close(moe.router_loss(model, per_layer=True), 0.01 * sum(map(loss, z)))
    mask = torch.tensor([[1] * 11, [1] * 6 + [0] * 5])
    repeated = torch.cat([mask.reshape(-1)] * 3)
    torch.testing.assert_close(moe.router_loss(model, mask), 0.01 * loss(torch.cat(z), repeated))
    model[1].layer = 0  # two projections of one layer share a mean
    want = 0.01 * (loss(torch.cat(z[:2])) + loss(z[2]))
    torch.testing.assert_close(moe.router_loss(model, per_layer=True), want)


def test_mola_own_formula():
    """c sum_l E_l sum_e f_e P_e with f = counts / (T k): MoLA's own code."""
    modules = [plugin("mola", router_loss=True, num_experts=experts, top_k=k) for experts, k in ((4, 2), (6, 3))]
    model = model_of(*modules)
    run(model)
    want = 0.0
    for z, k in zip(moe.router_logits(model).values(), (2, 3), strict=True):
        p = F.softmax(z, -1)
        chosen = p.topk(k).indices
        f = torch.bincount(chosen.reshape(-1), minlength=z.shape[1]) / (len(z) * k)
        want = want + 0.001 * z.shape[1] * (f * p.mean(0)).sum()
    torch.testing.assert_close(moe.router_loss(model, per_layer=True, normalized=True), want)
    torch.testing.assert_close(moe.router_loss(model, normalized=True), want)  # no mean to share: per layer
    with pytest.raises(ConfigError, match="per_layer=True"):
        moe.router_loss(model, per_layer=False)


def test_each_method_has_its_loss():
    x, _ = inputs(mixlora())
    switch = mixlora(routing_strategy="mixlora-switch", router_aux_loss_coef=0.3, router_z_loss_coef=0.2)
    switch(x)
    z = switch.gate.logits.reshape(-1, E)
    want = 0.3 * reference.switch_balance(z) + 0.2 * reference.z_loss(z)
    torch.testing.assert_close(moe.router_loss(switch), want)
    dynamic = mixlora(routing_strategy="mixlora-dynamic", router_aux_loss_coef=0.3, temperature=1.5, top_p=0.5)
    dynamic(x)
    z = dynamic.gate.logits.reshape(-1, E)
    chosen = reference.route_top_p(z, 0.5, 1.5).experts
    torch.testing.assert_close(moe.router_loss(dynamic), 0.3 * reference.balance(z, chosen))
    model = model_of(*(plugin("loramoe", blc_weight=0.5, blc_alpha=0.2) for _ in range(2)))
    run(model)
    gates = [F.softmax(module.gate.logits, -1) for module in model]
    types = torch.tensor([1, 0])
    want = 0.5 * sum(reference.balance_constraint(p, types, 0.2) for p in gates)
    torch.testing.assert_close(moe.router_loss(model, task_types=[1, 0]), want)
    for quiet in (mixlora(router_loss=False), plugin("mola"), plugin("loramoe")):
        quiet(x)
        assert moe.router_loss(quiet).item() == 0


def test_losses_reach_the_gate():
    for module in (mixlora(), plugin("mola", router_loss=True), plugin("loramoe", blc_weight=1.0)):
        x, _ = inputs(module)
        module(x)
        moe.router_loss(module).backward()
        assert module.gate.weight.grad.norm() > 0


def test_router_loss_needs_logits_that_fit():
    module = plugin("mola", router_loss=True)
    with pytest.raises(ConfigError, match="has run yet"):
        moe.router_loss(module)
    assert moe.router_logits(module) == {}
    module(torch.randn(2, 11, H))
    with pytest.raises(ShapeError, match="22 tokens"):
        moe.router_loss(module, torch.ones(2, 12))
    blc = plugin("loramoe", blc_weight=0.1)
    blc(torch.randn(11, H))
    with pytest.raises(ShapeError, match="batch, sequence"):
        moe.router_loss(blc)
    blc(torch.randn(2, 11, H))
    with pytest.raises(ShapeError, match="one task type a sequence"):
        moe.router_loss(blc, task_types=[1, 0, 1])


# --- configs ----------------------------------------------------------------------------------------------------------

CONFIGS = [
    moe.MixLoraConfig(num_experts=8, r=16, lora_alpha=32, lora_dropout=0.05, target_modules=["gate_proj", "down_proj"]),
    moe.MixLoraConfig(num_experts=4, routing_strategy="mixlora-dynamic", top_p=0.7, temperature=0.5, act_fn="gelu"),
    moe.MixLoraConfig(num_experts=4, routing_strategy="mixlora-switch", expert_lora={"r": 2, "lora_alpha": 4}),
    moe.LoraMoeConfig(num_experts=6, blc_weight=0.1, blc_alpha=0.1, target_modules={"up_proj": True, "q_proj": False}),
    moe.MolaConfig(num_experts=[2, 4, 6, 8], top_k=2, r=[8, 8, 4, 4], router_loss=True, init_seed=7),
]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: type(config).__name__)
def test_json_in_and_out(config):
    text = config.to_json()
    assert type(config).from_json(text) == config
    values = json.loads(text)
    assert moe.config_from_dict(values) == config
    assert values["peft_type"] in ("MIXLORA", "LORAMOE", "MOLA") and "routing_strategy" in values


def test_what_moe_peft_writes_is_read():
    """Its keys and its defaults; a known peft_type decides before routing_strategy."""
    common = {"bias": "none", "r": 8, "lora_alpha": 16, "lora_dropout": 0.05, "target_modules": ["q_proj", "up_proj"]}
    top = {**common, "peft_type": "MIXLORA", "routing_strategy": "mixlora", "num_experts": 8, "top_k": 2}
    config = moe.config_from_dict(top)
    assert isinstance(config, moe.MixLoraConfig)
    assert (config.jitter_noise, config.router_init_range, config.router_aux_loss_coef) == (0.0, 0.02, 0.001)
    switch = {**common, "peft_type": "MIXLORA", "routing_strategy": "mixlora-switch", "num_experts": 8}
    config = moe.config_from_dict(switch | {"expert_capacity": 64, "sparse_step": None})
    assert (config.jitter_noise, config.router_init_range, config.router_z_loss_coef) == (0.01, 1.0, 0.001)
    mola = moe.config_from_dict({**common, "peft_type": "MOLA", "num_experts": 8, "name": "a", "task_name": "b"})
    assert isinstance(mola, moe.MolaConfig) and mola.router_loss is False and mola.router_init_range == 5.0
    untyped = moe.config_from_dict({**common, "routing_strategy": "loramoe", "num_experts": 6})
    assert isinstance(untyped, moe.LoraMoeConfig)


def test_an_expert_is_a_plain_adapter():
    config = moe.MixLoraConfig(num_experts=8, r=4, expert_lora={"lora_dropout": 0.1, "lora_init": "gaussian"})
    expert = config.expert_config()
    assert type(expert).__name__ == "LoraConfig" and not hasattr(expert, "num_experts")
    assert (expert.r, expert.lora_dropout, expert.init_lora_weights) == (4, 0.1, "gaussian")
    assert config.lora_config().lora_dropout == 0.0


WRONG = [
    (moe.MixLoraConfig, {"num_experts": 0}, "num_experts must be"),
    (moe.MixLoraConfig, {"num_experts": 2, "top_k": 3}, "top_k must be at most num_experts=2"),
    (moe.MixLoraConfig, {"num_experts": 2, "top_k": 0}, "top_k must be"),
    (moe.MixLoraConfig, {"num_experts": 2, "top_p": 0.0}, "top_p must be in"),
    (moe.MixLoraConfig, {"num_experts": 2, "top_p": 1.1, "routing_strategy": "mixlora-dynamic"}, "top_p must be in"),
    (moe.MixLoraConfig, {"num_experts": 2, "expert_capacity": 0}, "expert_capacity must be"),
    (moe.MixLoraConfig, {"num_experts": 2, "routing_strategy": "top-2"}, "routing_strategy must be one of mixlora"),
    (moe.MixLoraConfig, {"num_experts": 2, "expert_lora": {"rank": 2}}, "unknown field 'rank' in expert_lora"),
    (moe.MixLoraConfig, {"num_experts": 2, "expert_lora": {"r": 0}}, "r must be"),
    (moe.MixLoraConfig, {"num_experts": 2, "lora_init": "pissa"}, "does not fit several experts"),
    (moe.MixLoraConfig, {"num_experts": 2, "lora_init": "glorot"}, "unknown init_lora_weights"),
    (moe.MixLoraConfig, {"num_experts": 2, "lora_dropout": 1.0}, "lora_dropout must be"),
    (moe.MixLoraConfig, {"num_experts": 2, "jitter_noise": -0.1}, "jitter_noise must be"),
    (moe.MixLoraConfig, {"num_experts": 2, "router_aux_loss_coef": float("nan")}, "router_aux_loss_coef must be"),
    (moe.MixLoraConfig, {"num_experts": 2, "router_loss": 1}, "router_loss must be"),
    (moe.MixLoraConfig, {"num_experts": 2, "ffn_dropout": 1.0}, "ffn_dropout must be"),
    (moe.MixLoraConfig, {"num_experts": 2, "target_modules": "gate_proj"}, "target_modules must be"),
    (moe.MixLoraConfig, {"num_experts": 2, "target_modules": []}, "target_modules must be"),
    (moe.MixLoraConfig, {"num_experts": 2, "init_seed": -1}, "init_seed must be"),
    (moe.LoraMoeConfig, {"num_experts": 2, "use_dora": True}, "use_dora cannot be honoured"),
    (moe.LoraMoeConfig, {"num_experts": 2, "blc_alpha": 1.5}, "blc_alpha must be"),
    (moe.MolaConfig, {"num_experts": 2, "use_dora": True}, "use_dora cannot be honoured"),
    (moe.MolaConfig, {"num_experts": [4, 1], "top_k": 2}, "at most num_experts=1, got 2 in layer 1"),
    (moe.MolaConfig, {"num_experts": [4, 4], "top_k": [2]}, "one entry a layer each"),
    (moe.MolaConfig, {"num_experts": []}, "one entry a layer each"),
    (moe.MolaConfig, {"num_experts": 4, "r": [4, 0]}, "r must be"),
]


@pytest.mark.parametrize(("kind", "fields", "message"), WRONG, ids=[text for _, _, text in WRONG])
def test_wrong_configs(kind, fields, message):
    with pytest.raises(ConfigError, match=message):
        kind(**fields)
    with pytest.raises(ConfigError, match=message):
        kind.from_dict(fields)


def test_foreign_json():
    with pytest.raises(ConfigError, match="unknown config field 'top_q'"):
        moe.MixLoraConfig.from_dict({"num_experts": 2, "top_q": 1})
    with pytest.raises(ConfigError, match="missing config field 'num_experts'"):
        moe.MixLoraConfig.from_dict({"r": 2})
    with pytest.raises(ConfigError, match="expected a config of peft_type 'MOLA', got 'MIXLORA'"):
        moe.MolaConfig.from_dict({"peft_type": "MIXLORA", "num_experts": 2})
    with pytest.raises(ConfigError, match="bias must be 'none'"):
        moe.MolaConfig.from_dict({"bias": "all", "num_experts": 2})
    with pytest.raises(ConfigError, match="expected a peft_type of"):
        moe.config_from_dict({"peft_type": "LORA", "r": 2})
    for text in ("[1]", "{"):
        with pytest.raises(ConfigError, match="expected a JSON object"):
            moe.MolaConfig.from_json(text)
    with pytest.raises(DtypeError, match="expected a MixLoraConfig"):
        moe.MixLoraMLP.from_mlp(nn.Identity(), 3)


def test_layers_of_a_list():
    config = moe.MolaConfig(num_experts=[2, 4], r=[8, 4], top_k=2)
    assert config.layers == 2 and (config.for_layer(1).num_experts, config.for_layer(1).r) == (4, 4)
    assert moe.MolaConfig(num_experts=3).for_layer(17).num_experts == 3
    with pytest.raises(ConfigError, match="none for layer 2"):
        config.for_layer(2)
