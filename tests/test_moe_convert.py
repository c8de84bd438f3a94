"""Mixtures in transformers models: found by structure, right from the start, refused with the model unchanged."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GemmaConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PhiConfig,
    Qwen2Config,
    Qwen3Config,
)

import fastlora
from fastlora import moe
from fastlora.errors import ConfigError, DtypeError
from fastlora.nn.linear import LoraLinear, QLoraLinear
from tests.experts_tools import scramble

SIZES = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES = {
    "llama": LlamaConfig(**SIZES),
    "mistral": MistralConfig(**SIZES),
    "qwen2": Qwen2Config(**SIZES),
    "qwen3": Qwen3Config(**SIZES, head_dim=8),
    "gemma": GemmaConfig(**SIZES, head_dim=8),
    "gemma2": Gemma2Config(**SIZES, head_dim=8),
    "phi3": Phi3Config(**SIZES),
    "phi": PhiConfig(**SIZES),
}
METHODS = {
    "mixlora": moe.MixLoraConfig(num_experts=4, r=4, init_seed=2),
    "loramoe": moe.LoraMoeConfig(num_experts=3, r=4, blc_weight=0.1, init_seed=2),
    "mola": moe.MolaConfig(num_experts=[2, 3, 4], r=[4, 2, 3], top_k=2, router_loss=True, init_seed=2),
}
PROJECTIONS = {"phi3": (("qkv_proj", "o_proj"), ("gate_up_proj", "down_proj"))}
PROJECTIONS["phi"] = (("q_proj", "k_proj", "v_proj", "dense"), ("fc1", "fc2"))


def model_of(family="llama", **changes):
    torch.manual_seed(0)
    config = copy.deepcopy(FAMILIES[family])
    for name, value in changes.items():
        setattr(config, name, value)
    return AutoModelForCausalLM.from_config(config).eval()


def batch():
    torch.manual_seed(1)
    ids = torch.randint(3, 50, (2, 9))
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def fingerprint(model):
    return {name: (type(module).__name__, id(module)) for name, module in model.named_modules()}, {
        name: (p.requires_grad, p.dtype, p.detach().clone()) for name, p in model.named_parameters()
    }


def same(one, two):
    modules, parameters = one
    assert modules == two[0]
    assert parameters.keys() == two[1].keys()
    for name, (trains, dtype, value) in parameters.items():
        assert (trains, dtype) == two[1][name][:2] and torch.equal(value, two[1][name][2]), name


@pytest.mark.parametrize("method", list(METHODS))
@pytest.mark.parametrize("family", list(FAMILIES))
def test_every_family_and_method(family, method):
    model = model_of(family)
    want = model(**batch()).logits
    assert moe.convert(model, METHODS[method], progress=False) is model
    attention, mlp = PROJECTIONS.get(
        family, (("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj"))
    )
    for layer in model.model.layers:
        kinds = {name: type(getattr(layer.self_attn, name)) for name in attention}
        if method == "mixlora":
            assert type(layer.mlp) is moe.MixLoraMLP and tuple(layer.mlp.projections) == mlp
        else:
            kind = moe.LoraMoeLinear if method == "loramoe" else moe.MolaLinear
            assert all(type(getattr(layer.mlp, name)) is kind for name in mlp)
        assert set(kinds.values()) == {moe.MolaLinear if method == "mola" else LoraLinear}
    out = model(**batch())
    keep = batch()["attention_mask"].bool()
    torch.testing.assert_close(out.logits[keep], want[keep], rtol=1e-4, atol=1e-5)
    scramble(model.train())
    out = model(**batch())
    auxiliary = moe.router_loss(model, batch()["attention_mask"])
    assert auxiliary.item() > 0
    (out.loss + auxiliary).backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name
            assert "lora_" in name or name.endswith("gate.weight")
    model(input_ids=batch()["input_ids"][:, :1], use_cache=True)  # one token at a time


def test_layers_get_their_own_numbers():
    model = moe.convert(model_of(), METHODS["mola"], progress=False)
    for index, (experts, r) in enumerate(((2, 4), (3, 2), (4, 3))):
        for module in moe.moe_modules(model.model.layers[index]).values():
            assert module.layer == index
            assert module.lora_A.shape[:2] == (experts, r) and module.gate.weight.shape[0] == experts
            assert module.model_config == METHODS["mola"]
    assert fastlora.trainable_parameters(model)[0] == sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("method", list(METHODS))
def test_a_seed_gives_the_same_start_in_each_layer_its_own(method):
    models = [moe.convert(model_of(), METHODS[method], progress=False) for _ in range(2)]
    states = [dict(model.named_parameters()) for model in models]
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name])
    gates = [p for name, p in states[0].items() if name.endswith("gate.weight")]
    assert all(not torch.equal(a[:2], b[:2]) for a, b in itertools.pairwise(gates) if a.shape == b.shape)


@pytest.mark.parametrize("method", list(METHODS))
def test_over_nf4(method):
    model = model_of()
    want = model(**batch()).logits
    moe.convert(model, METHODS[method], quantize="nf4", progress=False)
    layer = model.model.layers[1]
    assert isinstance(layer.mlp.gate_proj.weight, fastlora.QuantizedWeight)
    assert isinstance(layer.self_attn.q_proj.weight, fastlora.QuantizedWeight)
    if method != "mola":
        assert isinstance(layer.self_attn.q_proj, QLoraLinear)
    out = model(**batch())
    assert 0.001 < (out.logits - want).norm() / want.norm() < 0.3
    scramble(model.train())
    model(**batch()).loss.backward()
    state = copy.deepcopy(model.state_dict())
    again = moe.convert(model_of(), METHODS[method].replace(init_seed=9), quantize="nf4", progress=False)
    again.load_state_dict(state)
    assert torch.equal(again.train()(**batch()).logits, model(**batch()).logits)


def test_over_bitsandbytes_bytes():
    bnb = pytest.importorskip("bitsandbytes")
    model = model_of()
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and "layers" in name:
            four = bnb.nn.Linear4bit(module.in_features, module.out_features, False, torch.float32, quant_type="nf4")
            four.weight = bnb.nn.Params4bit(module.weight.data, requires_grad=False, quant_type="nf4")
            model.set_submodule(name, four.to("cpu"))
    held = model.model.layers[0].mlp.up_proj.weight.data_ptr()
    moe.convert(model, METHODS["mixlora"], progress=False)
    part = model.model.layers[0].mlp.up_proj
    assert part.weight.packed.data_ptr() == held
    assert isinstance(model.model.layers[0].self_attn.q_proj, QLoraLinear)
    scramble(model.train())
    model(**batch()).loss.backward()
    assert part.lora_A.grad.norm() > 0


@pytest.mark.parametrize("method", list(METHODS))
def test_target_modules(method):
    targets = {"gate_proj": True, "down_proj": True, "q_proj": True, "k_proj": False}
    config = METHODS[method].replace(target_modules=targets)
    model = moe.convert(model_of(), config, progress=False)
    layer = model.model.layers[0]
    assert type(layer.self_attn.k_proj) is nn.Linear and type(layer.self_attn.q_proj) is not nn.Linear
    if method == "mixlora":
        assert layer.mlp.up_proj.lora_A is None and layer.mlp.gate_proj.lora_A is not None
    else:
        assert type(layer.mlp.up_proj) is nn.Linear
    model.train()(**batch()).loss.backward()


def test_the_head_stays():
    model = moe.convert(model_of(), METHODS["mola"], progress=False)
    assert type(model.lm_head) is nn.Linear and not model.lm_head.weight.requires_grad
    tied = moe.convert(model_of("gemma"), METHODS["mola"], progress=False)
    assert type(tied.lm_head) is nn.Linear


def test_a_dict_of_moe_peft():
    values = {"peft_type": "MIXLORA", "routing_strategy": "mixlora", "num_experts": 4, "r": 4, "lora_alpha": 8}
    values |= {"lora_dropout": 0.1, "target_modules": ["q_proj", "up_proj"], "bias": "none"}
    model = moe.convert(model_of(), values, progress=False)
    assert model.model.layers[0].mlp.config.num_experts == 4
    assert model.model.layers[0].mlp.up_proj.dropout == 0.1


class Odd(nn.Module):
    """The names of a gated MLP, another function."""

    def __init__(self):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = nn.Linear(8, 12), nn.Linear(8, 12), nn.Linear(12, 8)
        self.act_fn = nn.SiLU()

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) + self.up_proj(x))


REFUSED = [
    ("mixlora", {"target_modules": ["q_proj", "gat_proj"]}, ConfigError, "no linear is named 'gat_proj'"),
    ("mola", {"target_modules": ["lm_head"]}, ConfigError, "no linear is named 'lm_head'"),
    ("mixlora", {"target_modules": ["q_proj"]}, ConfigError, "names no linear of an MLP"),
    ("loramoe", {"target_modules": ["q_proj"]}, ConfigError, "names no linear of an MLP"),
    ("mola", {"num_experts": [2, 4], "top_k": 1, "r": 4}, ConfigError, "need 3 entries, one a decoder layer, got 2"),
    ("mixlora", {"act_fn": "siluu"}, ConfigError, "not an activation"),
]


@pytest.mark.parametrize(("method", "fields", "error", "message"), REFUSED, ids=[case[3] for case in REFUSED])
def test_refused_with_the_model_unchanged(method, fields, error, message):
    model = model_of()
    before = fingerprint(model)
    with pytest.raises(error, match=message):
        moe.convert(model, METHODS[method].replace(**fields), progress=False)
    same(before, fingerprint(model))


def test_other_models_and_arguments_are_refused():
    model = model_of()
    before = fingerprint(model)
    with pytest.raises(ConfigError, match="quantize must be"):
        moe.convert(model, METHODS["mixlora"], quantize="int8")
    with pytest.raises(DtypeError, match="expected a MixLoraConfig"):
        moe.convert(model, fastlora.LoraConfig())
    with pytest.raises(ConfigError, match="expected a peft_type of"):
        moe.convert(model, {"peft_type": "LORA"})
    with pytest.raises(ConfigError, match="adapter name"):
        moe.convert(model, METHODS["mixlora"], adapter_name="a.b")
    model.model.layers[2].mlp.up_proj.weight.data[0, 0] = float("inf")
    with pytest.raises(ValueError, match="NaN or inf"):
        moe.convert(model, METHODS["mola"], quantize="nf4")
    model.model.layers[2].mlp.up_proj.weight.data[0, 0] = before[1]["model.layers.2.mlp.up_proj.weight"][2][0, 0]
    same(before, fingerprint(model))
    gpt = AutoModelForCausalLM.from_config(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=20))
    with pytest.raises(ConfigError, match="has no gated MLP"):
        moe.convert(gpt, METHODS["mixlora"])
    odd = nn.Sequential(Odd())
    with pytest.raises(ConfigError, match="computes something else"):
        moe.convert(odd, METHODS["mixlora"])
    assert all(p.requires_grad for p in odd.parameters())


def test_converting_twice_is_refused():
    for method in METHODS:
        model = moe.convert(model_of(), METHODS[method], progress=False)
        before = fingerprint(model)
        with pytest.raises(ConfigError, match="has no gated MLP|already"):
            moe.convert(model, METHODS[method], progress=False)
        same(before, fingerprint(model))
