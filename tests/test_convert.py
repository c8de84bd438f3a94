"""convert: which modules are picked, what trains, how seeds reproduce; nothing half happens."""

from __future__ import annotations

import re
import zlib

import pytest
import torch
from torch import nn

import fastlora
from fastlora import ConfigError, LoraLinear, QLoraLinear
from fastlora.nn.adapters import AdapterLayer
from fastlora.nn.targets import adapted_layers
from tests.layer_tools import outline, same, shake, snapshot
from tests.model_tools import LINEARS, llama

peft = pytest.importorskip("peft")


def adapted(model):
    return [name for name, _ in adapted_layers(model)]


def convert(model, *args, **fields):
    fields.setdefault("quantize", None)
    return fastlora.convert(model, *args, progress=False, **fields)


# --- which modules ----------------------------------------------------------------------------------------------------

TARGETS = [
    {"target_modules": ["q_proj", "v_proj"]},
    {"target_modules": ["self_attn.q_proj", "mlp.down_proj"]},
    {"target_modules": ["model.layers.1.mlp.up_proj"]},
    {"target_modules": ["proj", "q_proj"]},
    {"target_modules": r".*\.1\.(self_attn|mlp)\.[a-z]+_proj"},
    {"target_modules": r"model\.layers\.\d\.self_attn\.[qv]_proj"},
    {"target_modules": "all-linear"},
    {"target_modules": ["q_proj", "lm_head"]},
    {"target_modules": ["q_proj", "k_proj"], "exclude_modules": ["k_proj"]},
    {"target_modules": ["q_proj", "up_proj"], "exclude_modules": ["model.layers.0.self_attn.q_proj"]},
    {"target_modules": "all-linear", "exclude_modules": r".*self_attn.*"},
    {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": 1},
    {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [0]},
    {"target_modules": ["q_proj"], "layers_to_transform": [0, 1], "layers_pattern": "layers"},
    {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": ["blocks", "layers"]},
    {"target_modules": ["q_proj", "up_proj", "lm_head"], "modules_to_save": ["lm_head"]},
    {"target_modules": "all-linear", "modules_to_save": ["mlp"]},
    {"target_modules": ["q_proj", "up_proj"], "modules_to_save": ["model.layers.0.mlp"]},
    {"target_modules": ["q_proj", "k_proj", "up_proj"], "rank_pattern": {"q_proj": 3, r"layers\.1\.mlp\.up_proj": 5}},
    {"target_modules": ["q_proj", "k_proj"], "rank_pattern": {"^q_proj": 3, "k_proj": 2}},
    {"target_modules": ["q_proj", "k_proj"], "rank_pattern": {r".*\.0\..*": 3}, "alpha_pattern": {"k_proj": 5}},
    {"target_modules": ["q_proj", "up_proj"], "alpha_pattern": {r"mlp\.up_proj": 3, "proj": 7}},
]


@pytest.mark.parametrize("fields", TARGETS, ids=str)
def test_the_same_modules_ranks_and_scales_as_peft(fields):
    """PEFT's own injection on the same model says which, with which r and which scaling."""
    theirs = peft.LoraModel(llama(), peft.LoraConfig(r=6, lora_alpha=12, **fields), "default").model
    want = {
        name: (module.r["default"], module.scaling["default"])
        for name, module in theirs.named_modules()
        if isinstance(module, peft.tuners.lora.Linear)
    }
    model = convert(llama(), r=6, lora_alpha=12, **fields)
    got = {name: (layer.lora_A["default"].shape[0], layer.scaling["default"]) for name, layer in adapted_layers(model)}
    assert got == want
    assert len(got) > 0


def test_layers_pattern_is_a_whole_name():
    """`layers` is no match for `sublayers`."""
    model = nn.ModuleDict(
        {
            kind: nn.ModuleList([nn.ModuleDict({"q": nn.Linear(4, 4)}) for _ in range(2)])
            for kind in ("sublayers", "layers")
        }
    )
    convert(model, target_modules=["q"], layers_to_transform=[1], layers_pattern="layers", r=2)
    assert adapted(model) == ["layers.1.q"]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("quantize", [None, "nf4", "fp4"])
def test_all_linear_leaves_out_the_head(tied, quantize):
    model = convert(llama(tied), r=2, quantize=quantize)
    assert sorted(adapted(model)) == sorted(LINEARS)
    kind = LoraLinear if quantize is None else QLoraLinear
    assert all(type(layer) is kind for _, layer in adapted_layers(model))
    assert type(model.lm_head) is nn.Linear
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied


def test_all_linear_leaves_out_a_classification_head():
    """A fresh head: quantizing or freezing it would be the end of it."""
    from transformers import LlamaConfig, LlamaForSequenceClassification

    config = LlamaConfig(
        vocab_size=31,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_labels=3,
        pad_token_id=0,
    )
    model = convert(LlamaForSequenceClassification(config), r=2, quantize="nf4")
    assert type(model.score) is nn.Linear
    assert len(adapted(model)) == 7


def test_tied_and_shared_linears():
    """One weight in two modules, and one module in two places: left out of all-linear, refused when named."""

    def tied_weight():
        model = nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.Linear(8, 8), "c": nn.Linear(8, 8)})
        model["b"].weight = model["a"].weight
        return model

    def shared_module():
        linear = nn.Linear(8, 8)
        return nn.ModuleDict({"a": linear, "b": linear, "c": nn.Linear(8, 8)})

    for make in (tied_weight, shared_module):
        assert adapted(convert(make(), r=2)) == ["c"]
        model = make()
        before = outline(model)
        with pytest.raises(ConfigError, match=r"cannot adapt (a|b): .*shared"):
            convert(model, r=2, target_modules=["a", "b"])
        assert outline(model) == before


def test_a_block_used_twice_is_adapted_once_for_both():
    block = nn.Sequential(nn.Linear(8, 8))
    model = nn.ModuleList([block, block])
    convert(model, r=2)
    assert model[0] is model[1]
    assert isinstance(model[1][0], LoraLinear)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention, self.out = nn.MultiheadAttention(16, 2, batch_first=True), nn.Linear(16, 16)

    def forward(self, x):
        return self.out(self.attention(x, x, x)[0])


def test_multihead_attention_is_left_alone():
    model, x = Attention(), torch.randn(2, 3, 16)
    want = model(x)
    convert(model, r=2)
    assert adapted(model) == ["out"]
    torch.testing.assert_close(model(x), want)
    model(x).sum().backward()
    with pytest.raises(ConfigError, match=r"cannot adapt attention.out_proj: MultiheadAttention reads out_proj.weight"):
        convert(Attention(), r=2, target_modules=["out_proj"])


class ReadsWeight(nn.Module):
    """Uses one linear as a module and another one's weight directly."""

    def __init__(self):
        super().__init__()
        self.used, self.read = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return nn.functional.linear(self.used(x), self.read.weight)


class InheritsReading(ReadsWeight):
    pass


@pytest.mark.parametrize("kind", [ReadsWeight, InheritsReading])
def test_modules_whose_weight_the_parent_reads_are_left_out(kind):
    model = nn.ModuleDict({"block": kind()})
    x = torch.randn(2, 8)
    want = model["block"](x)
    convert(model, r=2)
    assert adapted(model) == ["block.used"]
    torch.testing.assert_close(model["block"](x), want)
    with pytest.raises(ConfigError, match=rf"cannot adapt block.read: {kind.__name__} reads read.weight itself"):
        convert(nn.ModuleDict({"block": kind()}), r=2, target_modules=["read"])


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"target_modules": ["q_prj"]}, r"q_prj.*near: .*q_proj.*linear names: .*down_proj"),
        ({"target_modules": r".*\.attn\.q"}, "matched no linear layer"),
        ({"target_modules": []}, "matched no linear layer"),
        ({"target_modules": ["embed_tokens"]}, "embed_tokens, a Embedding"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "embed_tokens, a Embedding"),
        ({"target_modules": ["q_proj"], "exclude_modules": ["q_proj"]}, "matched no linear layer"),
        ({"target_modules": ["q_proj"], "layers_to_transform": [7]}, "matched no linear layer"),
        ({"modules_to_save": ["nowhere"]}, "modules_to_save.*nowhere"),
    ],
    ids=str,
)
def test_what_matches_nothing_says_so_and_changes_nothing(fields, words):
    model = llama()
    before = outline(model)
    with pytest.raises(ConfigError, match=words):
        convert(model, r=2, **fields)
    assert outline(model) == before


def test_conv1d_is_refused_by_name():
    from transformers.pytorch_utils import Conv1D

    model = nn.ModuleDict({"c_attn": Conv1D(8, 8), "q": nn.Linear(8, 8)})
    with pytest.raises(ConfigError, match="c_attn, a Conv1D"):
        convert(model, r=2, target_modules=["c_attn", "q"])


def test_a_converted_model_is_not_converted_again():
    model = convert(llama(), r=2)
    before = outline(model)
    with pytest.raises(ConfigError, match="matched"):
        convert(model, r=2)
    with pytest.raises(ConfigError, match="matched"):
        convert(model, r=2, target_modules=["q_proj"])
    assert outline(model) == before


# --- nothing half done ------------------------------------------------------------------------------------------------


def nan_last():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[1].weight.data[0, 0] = torch.nan
    return model


def double_last():
    return nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8).double())


def int_last():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[1].weight = nn.Parameter(torch.zeros(8, 8, dtype=torch.int8), requires_grad=False)
    return model


def narrow_last():
    return nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 3))


@pytest.mark.parametrize(
    ("make", "fields", "words"),
    [
        (nan_last, {"quantize": "nf4"}, "NaN or inf"),
        (nan_last, {"quantize": "nf4", "double_quant": False}, "NaN or inf"),
        (double_last, {"quantize": "nf4"}, "float64"),
        (int_last, {}, "int8"),
        (int_last, {"quantize": "nf4"}, "int8"),
        (narrow_last, {"init_lora_weights": "pissa", "r": 4}, "at most"),
        (narrow_last, {"init_lora_weights": "olora", "r": 4, "quantize": "nf4"}, "at most"),
        (narrow_last, {"init_lora_weights": "orthogonal", "r": 4, "rank_pattern": {"1": 3}}, "even rank"),
        (narrow_last, {"init_lora_weights": "loftq"}, "loftq"),
        (narrow_last, {"adapter_name": "a.b"}, "dots"),
        (narrow_last, {"adapter_name": ""}, "non-empty"),
        (narrow_last, {"adapter_name": "keys"}, "attribute"),
        (narrow_last, {"quantize": "int4"}, 'quantize must be "nf4", "fp4" or None, got \'int4\''),
        (narrow_last, {"quantize": True}, "quantize must be"),
        (narrow_last, {"quantize": "nf4", "blocksize": 60}, "blocksize must be one of 32, 64"),
        (narrow_last, {"quantize": "nf4", "compute_dtype": torch.int8}, "compute_dtype"),
        (narrow_last, {"quantize": "nf4", "compute_dtype": "bf16"}, "compute_dtype"),
        (narrow_last, {"unknown": 1}, "unknown config field 'unknown'"),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_a_convert_that_fails_has_changed_nothing(make, fields, words):
    model = make()
    before = outline(model)
    with pytest.raises((ValueError, TypeError), match=words) as caught:
        convert(model, **fields)
    assert isinstance(caught.value, fastlora.FastloraError)
    assert outline(model) == before


# --- what trains ------------------------------------------------------------------------------------------------------


def trains(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("quantize", [None, "nf4"])
@pytest.mark.parametrize("bias", ["none", "all", "lora_only"])
def test_what_trains_is_what_peft_trains(quantize, bias):
    """Biases all, those of adapted layers, or none; the base frozen; compared by name with PEFT."""
    fields = {"r": 2, "target_modules": ["q_proj", "up_proj"], "bias": bias, "use_dora": True}
    theirs = peft.LoraModel(llama(), peft.LoraConfig(**fields), "default").model
    want = set()
    for name in trains(theirs):
        name = re.sub(r"\.base_layer", "", name)
        name = name.replace("lora_magnitude_vector.default.weight", "lora_magnitude.default")
        want.add(re.sub(r"(lora_[AB]\.default)\.weight", r"\1", name))
    model = convert(llama(), quantize=quantize, **fields)
    assert trains(model) == want
    assert any(name.endswith("bias") for name in want) == (bias != "none")


def test_bias_all_means_every_bias_of_the_model():
    """By PEFT's rule a bias is a parameter of that very name, not `in_proj_bias`."""
    fields = {"r": 2, "target_modules": ["out"], "bias": "all"}
    theirs = peft.LoraModel(Attention(), peft.LoraConfig(**fields), "default").model
    model = convert(Attention(), **fields)
    want = {name.replace(".base_layer", "") for name in trains(theirs) if "lora" not in name}
    assert {name for name in trains(model) if "lora" not in name} == want
    assert want == {"attention.out_proj.bias", "out.bias"}


@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_modules_to_save_train_in_full(quantize):
    model = convert(llama(), r=2, quantize=quantize, modules_to_save=["lm_head", "norm", "layers.1.mlp"])
    extra = {name for name in trains(model) if "lora" not in name}
    assert {name.split(".weight")[0].split(".bias")[0] for name in extra} == {
        "lm_head",
        "model.norm",
        *(f"model.layers.1.mlp.{part}_proj" for part in ("gate", "up", "down")),
    }
    assert adapted(model) == [name for name in LINEARS if "layers.1.mlp" not in name]
    model(input_ids=torch.arange(4)[None]).logits.sum().backward()
    assert model.lm_head.weight.grad is not None
    assert model.model.layers[1].mlp.up_proj.weight.grad is not None


def test_everything_else_is_frozen_even_where_nothing_was():
    model = convert(llama(), r=2, target_modules=["q_proj"])
    assert trains(model) == {f"model.layers.{i}.self_attn.q_proj.lora_{part}.default" for i in (0, 1) for part in "AB"}


@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_trainable_parameters_counts_weights_not_bytes(quantize, capsys):
    plain = llama()
    total = sum(p.numel() for p in plain.parameters())
    model = convert(plain, r=3, quantize=quantize, target_modules=["q_proj", "down_proj"])
    added = 2 * (3 * (32 + 32) + 3 * (64 + 32))
    assert fastlora.trainable_parameters(model) == (added, total + added)
    fastlora.print_trainable_parameters(model)
    text = capsys.readouterr().out
    assert f"{added:,}" in text and f"{total + added:,}" in text and f"{100 * added / (total + added):.2f}" in text


def test_the_function_is_unchanged_at_the_start_and_training_lowers_the_loss():
    model = llama()
    ids = torch.arange(20).reshape(2, 10)
    want = model(input_ids=ids).logits.detach()
    convert(model, r=4, lora_dropout=0.1)
    torch.testing.assert_close(model(input_ids=ids).logits, want, atol=1e-5, rtol=1e-5)
    optimizer = torch.optim.AdamW(fastlora.param_groups(model, 1e-2), foreach=True)
    model.train()
    losses = []
    for _ in range(15):
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


# --- seeds ------------------------------------------------------------------------------------------------------------


def starts(model):
    return {name: layer.lora_A["default"].detach().clone() for name, layer in adapted_layers(model)}


def test_seeds_reproduce_across_models_and_differ_between_layers():
    one, two = (starts(convert(llama(), r=4, init_seed=7)) for _ in range(2))
    other = starts(convert(llama(), r=4, init_seed=8))
    for name, a in one.items():
        same(two[name], a)
        assert not torch.equal(other[name], a)
    equal = [n for n in one for o in one if n < o and one[n].shape == one[o].shape and torch.equal(one[n], one[o])]
    assert equal == []


def test_a_layers_start_does_not_depend_on_which_others_are_adapted():
    some = starts(convert(llama(), r=4, init_seed=7, target_modules=["v_proj"]))
    every = starts(convert(llama(), r=4, init_seed=7, quantize="nf4"))
    for name, a in some.items():
        same(every[name], a)


def test_a_drawn_seed_is_recorded_and_enough_to_repeat():
    torch.manual_seed(3)
    model = convert(llama(), r=4)
    for _, layer in adapted_layers(model):
        record = layer.init_record["default"]
        again = LoraLinear(layer.in_features, layer.out_features, r=4, init_seed=record.seed)
        same(again.lora_A["default"], layer.lora_A["default"])
        assert record.strategy == "kaiming"
    torch.manual_seed(3)
    for name, a in starts(convert(llama(), r=4)).items():
        same(a, starts(model)[name])
    assert not torch.equal(next(iter(starts(convert(llama(), r=4)).values())), next(iter(starts(model).values())))


def test_seeds_are_the_same_in_every_process_and_release():
    """A layer's seed is the config's plus the CRC-32 of its name: no hash of Python's that changes from run to run."""
    model = convert(nn.ModuleDict({"block": nn.Sequential(nn.Linear(8, 8))}), r=2, init_seed=5)
    assert model["block"][0].init_record["default"].seed == 5 + zlib.crc32(b"block.0")
    near_end = convert(nn.ModuleDict({"block": nn.Sequential(nn.Linear(8, 8))}), r=2, init_seed=2**63 - 2)
    assert near_end["block"][0].init_record["default"].seed == zlib.crc32(b"block.0") - 1


# --- optimizer groups, adapters of a model ----------------------------------------------------------------------------


def test_param_groups():
    model = convert(llama(), r=2, use_dora=True, bias="lora_only", target_modules=["q_proj"])
    slow, fast = fastlora.param_groups(model, 1e-3, loraplus_lr_ratio=16, weight_decay=0.1)
    names = {id(p): name for name, p in model.named_parameters()}
    assert (slow["lr"], fast["lr"]) == (1e-3, 16e-3)
    assert slow["weight_decay"] == fast["weight_decay"] == 0.1
    assert all("lora_B" in names[id(p)] or "magnitude" in names[id(p)] for p in fast["params"])
    assert all("lora_A" in names[id(p)] or "bias" in names[id(p)] for p in slow["params"])
    assert {names[id(p)] for group in (slow, fast) for p in group["params"]} == trains(model)
    torch.optim.AdamW([slow, fast])
    for bad in ({"lr": 0.0}, {"lr": -1e-3}, {"lr": float("nan")}, {"lr": 1e-3, "loraplus_lr_ratio": 0.5}):
        with pytest.raises(ConfigError, match="expected lr > 0"):
            fastlora.param_groups(model, **bad)
    model.requires_grad_(False)
    with pytest.raises(ConfigError, match="nothing to train"):
        fastlora.param_groups(model, 1e-3)


def test_set_adapter_of_a_model_is_all_or_nothing():
    model = convert(llama(), r=2, target_modules=["q_proj", "up_proj"])
    layers = [layer for _, layer in adapted_layers(model)]
    for layer in layers:
        layer.add_adapter("plain", r=2)
    layers[-1].delete_adapter("plain")
    layers[-1].add_adapter("plain", r=2, use_dora=True)
    before = snapshot(model)
    with pytest.raises(ConfigError, match="DoRA"):
        fastlora.set_adapter(model, ["default", "plain"])
    assert snapshot(model) == before
    with pytest.raises(ConfigError, match="unknown adapter 'nobody'"):
        fastlora.set_adapter(model, "nobody")
    layers[-1].merge()
    before = snapshot(model)
    with pytest.raises(ConfigError, match="unmerge"):
        fastlora.set_adapter(model, "plain")
    assert snapshot(model) == before
    layers[-1].unmerge()
    fastlora.set_adapter(model, "plain")
    assert all(layer.active_adapters == ["plain"] for layer in layers)
    assert all("plain" in name for name in trains(model))
    with pytest.raises(ConfigError, match="no adapted layers"):
        fastlora.set_adapter(nn.Linear(2, 2), "default")


@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_model_level_merge_and_unmerge(quantize):
    model = convert(llama(), r=2, quantize=quantize, target_modules=["q_proj", "up_proj"])
    for _, layer in adapted_layers(model):
        shake(layer)
    ids = torch.arange(6)[None]
    before, want = snapshot(model), model(input_ids=ids).logits
    fastlora.merge(model)
    assert all(layer.merged for _, layer in adapted_layers(model))
    tolerance = {"atol": 1e-4, "rtol": 1e-4} if quantize is None else {"atol": 0.2, "rtol": 0.05}
    torch.testing.assert_close(model(input_ids=ids).logits, want, **tolerance)
    fastlora.unmerge(model)
    assert snapshot(model) == before
    plain = fastlora.merge_and_unload(model, dtype=torch.float32)
    tolerance = {"atol": 1e-4, "rtol": 1e-4}
    assert not any(isinstance(module, AdapterLayer) for module in plain.modules())
    torch.testing.assert_close(plain(input_ids=ids).logits.float(), want, **tolerance)


def test_transformers_forgets_its_own_quantizer():
    """The marks by which Trainer and save_pretrained would treat the weights as transformers' own are cleared."""
    model = llama()
    model.is_quantized, model.is_loaded_in_4bit, model.hf_quantizer = True, True, object()
    model.config.quantization_config = {"load_in_4bit": True}
    convert(model, r=2, quantize="nf4")
    assert not model.is_quantized
    assert not model.is_loaded_in_4bit
    assert model.hf_quantizer is None
    assert getattr(model.config, "quantization_config", None) is None


def test_progress_bar_and_its_absence(capsys):
    fastlora.convert(llama(), r=2)
    assert "14/14" in capsys.readouterr().err
    fastlora.convert(llama(), r=2, progress=False)
    assert capsys.readouterr().err == ""
