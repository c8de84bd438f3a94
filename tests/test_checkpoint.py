"""Adapters on disk: PEFT's format both ways, atomic saving, and loading that never half-changes a model."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import subprocess
import sys
import textwrap

import hypothesis
import peft
import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import strategies as st
from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn

import fastlora
from fastlora import ConfigError, FastloraError, LoraConfig, LoraLinear, QLoraLinear, StateDictError
from fastlora.io import peft as peft_format
from tests.model_tools import (
    LINEARS,
    PREFIX,
    close,
    contents,
    layers_of,
    llama,
    logits,
    move,
    silent,
    unchanged,
    undo_quantization,
)

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SOME = ["q_proj", "layers.1.mlp.down_proj"]

# What both libraries are asked for, in PEFT's words.
CASES = {
    "lora": {"r": 4, "lora_alpha": 6},
    "odd rank above k": {"r": 37, "lora_alpha": 6, "target_modules": SOME},
    "fractional alpha": {"r": 3, "lora_alpha": 2.5, "target_modules": SOME},
    "rslora": {"r": 4, "lora_alpha": 6, "use_rslora": True},
    "dora": {"r": 3, "lora_alpha": 5, "use_dora": True},
    "rslora dora": {"r": 3, "lora_alpha": 5, "use_dora": True, "use_rslora": True},
    "dropout": {"r": 4, "lora_alpha": 6, "lora_dropout": 0.3},
    "some targets": {"r": 4, "lora_alpha": 6, "target_modules": SOME},
    "regex": {"r": 4, "lora_alpha": 6, "target_modules": r".*layers\.1\..*(q|up)_proj"},
    "excluded": {"r": 4, "lora_alpha": 6, "exclude_modules": ["k_proj", "layers.0.mlp.up_proj"]},
    "some layers": {"r": 4, "lora_alpha": 6, "layers_to_transform": [1], "layers_pattern": "layers"},
    "rank pattern": {"r": 4, "lora_alpha": 6, "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.down_proj": 5}},
    "alpha pattern": {"r": 4, "lora_alpha": 6, "alpha_pattern": {"v_proj": 3, r"layers\.0.*up_proj": 11}},
    "both patterns": {
        "r": 4,
        "lora_alpha": 6,
        "use_rslora": True,
        "use_dora": True,
        "rank_pattern": {"^model.layers.0.self_attn.q_proj": 1, "q_proj": 7, "down_proj": 2},
        "alpha_pattern": {"q_proj": 1, r".*\.0\.mlp\..*": 16},
    },
    "bias all": {"r": 4, "lora_alpha": 6, "bias": "all", "target_modules": SOME},
    "bias lora_only": {"r": 4, "lora_alpha": 6, "bias": "lora_only", "target_modules": SOME},
    "bias lora_only dora": {"r": 4, "lora_alpha": 6, "bias": "lora_only", "use_dora": True},
    "modules_to_save": {"r": 4, "lora_alpha": 6, "modules_to_save": ["lm_head", "model.norm"], "target_modules": SOME},
    "modules_to_save a block": {"r": 4, "lora_alpha": 6, "modules_to_save": ["layers.1.mlp"]},
    "modules_to_save and bias": {"r": 4, "lora_alpha": 6, "modules_to_save": ["lm_head"], "bias": "lora_only"},
    "gaussian": {"r": 4, "lora_alpha": 6, "init_lora_weights": "gaussian"},
    "orthogonal": {"r": 4, "lora_alpha": 6, "init_lora_weights": "orthogonal"},
    "random": {"r": 4, "lora_alpha": 6, "init_lora_weights": False},
}
EVERY_CASE = pytest.mark.parametrize("fields", CASES.values(), ids=CASES)


@pytest.fixture(scope="module")
def base_logits():
    return logits(llama())


def converted(quantize=None, dtype=torch.float32, model=None, **fields):
    return fastlora.convert(model or llama(dtype=dtype), quantize=quantize, blocksize=32, progress=False, **fields)


def peft_fields(fields):
    return {"target_modules": ALL, "task_type": "CAUSAL_LM", **fields}


def peft_model(fields, model=None, name="default", **keywords):
    config = peft.LoraConfig(**peft_fields(fields))
    return peft.get_peft_model(model or llama(), config, adapter_name=name, **keywords).eval()


def peft_loads(folder, model=None, name="default", **keywords):
    """Plain PEFT opens the folder, without a word of complaint."""
    with silent():
        return peft.PeftModel.from_pretrained(model or llama(), str(folder), adapter_name=name, **keywords).eval()


def peft_saves(fields, folder, seed=3):
    model = move(peft_model(fields), seed)
    model.save_pretrained(str(folder))
    return model


def tensors(folder):
    return safetensors.torch.load_file(folder / WEIGHTS)


def metadata(folder):
    with safetensors.safe_open(folder / WEIGHTS, framework="pt") as file:
        return file.metadata()


def same_tensors(got, want):
    assert sorted(got) == sorted(want)
    for key, tensor in want.items():
        assert got[key].dtype == tensor.dtype, key
        assert got[key].shape == tensor.shape, key
        assert torch.equal(got[key], tensor), key


# --- PEFT reads what we save ------------------------------------------------------------------------------------------


@EVERY_CASE
def test_peft_loads_our_folder_and_predicts_the_same(fields, tmp_path, base_logits):
    model = move(converted(**fields))
    want = logits(model)
    where = fastlora.save_adapter(model, tmp_path / "adapter")
    assert where == tmp_path / "adapter"
    assert sorted(contents(where)) == [CONFIG, WEIGHTS]
    twin = peft_loads(where)
    close(logits(twin), want, base_logits)
    saved = tensors(where)
    same_tensors(peft.get_peft_model_state_dict(twin), saved)
    for name, layer in layers_of(model).items():
        assert torch.equal(saved[f"{PREFIX}{name}.lora_A.weight"], layer.lora_A["default"])
        assert torch.equal(saved[f"{PREFIX}{name}.lora_B.weight"], layer.lora_B["default"])
        if fields.get("use_dora"):
            assert torch.equal(saved[f"{PREFIX}{name}.lora_magnitude_vector"], layer.lora_magnitude["default"])
    config = twin.peft_config["default"]
    for name in ("r", "lora_dropout", "use_rslora", "use_dora", "bias", "lora_alpha"):
        if name in fields and "pattern" not in " ".join(fields):
            assert getattr(config, name) == fields[name], name
    assert config.inference_mode is True
    assert config.task_type == "CAUSAL_LM"


@EVERY_CASE
def test_our_keys_and_shapes_are_those_peft_saves(fields, tmp_path):
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    peft_model(fields).save_pretrained(str(theirs))
    fastlora.save_adapter(converted(**fields), ours)
    want, got = tensors(theirs), tensors(ours)
    assert {key: (t.shape, t.dtype) for key, t in got.items()} == {key: (t.shape, t.dtype) for key, t in want.items()}
    assert metadata(ours)["format"] == metadata(theirs)["format"] == "pt"
    known = {field.name for field in dataclasses.fields(peft.LoraConfig)}
    fields_written = json.loads((ours / CONFIG).read_text())
    assert set(fields_written) <= known
    assert list(fields_written) == sorted(fields_written)


# --- we read what PEFT saves ------------------------------------------------------------------------------------------


@EVERY_CASE
def test_we_load_pefts_folder_into_a_plain_model(fields, tmp_path, base_logits):
    want = logits(peft_saves(fields, tmp_path))
    model = llama()
    assert fastlora.load_adapter(model, tmp_path) is model
    close(logits(model), want, base_logits)
    again = tmp_path / "again"
    fastlora.save_adapter(model, again)
    same_tensors(tensors(again), tensors(tmp_path))
    assert all(type(layer) is LoraLinear for layer in layers_of(model).values())
    assert all(layer.active_adapters == ["default"] for layer in layers_of(model).values())


@EVERY_CASE
def test_we_load_pefts_folder_into_a_converted_model(fields, tmp_path, base_logits):
    want = logits(peft_saves(fields, tmp_path))
    model = move(converted(**fields), seed=8)
    fastlora.load_adapter(model, tmp_path)
    close(logits(model), want, base_logits)


@EVERY_CASE
def test_we_load_pefts_folder_into_an_nf4_model(fields, tmp_path, base_logits):
    peft_saves(fields, tmp_path)
    model = move(converted("nf4", **fields), seed=8)
    fastlora.load_adapter(model, tmp_path)
    assert all(type(layer) is QLoraLinear for layer in layers_of(model).values())
    theirs = peft.PeftModel.from_pretrained(undo_quantization(llama(), model), str(tmp_path)).eval()
    close(logits(model), logits(theirs), base_logits)


@pytest.mark.parametrize("quantize", [None, "nf4"])
@pytest.mark.parametrize("case", ["lora", "dora", "both patterns", "some targets"])
def test_a_second_adapter_loads_beside_the_first(case, quantize, tmp_path, base_logits):
    peft_saves(CASES[case], tmp_path)
    model = move(converted(quantize, r=2, lora_alpha=3))
    first = logits(model)
    theirs = peft.PeftModel.from_pretrained(undo_quantization(llama(), model), str(tmp_path)).eval()
    fastlora.load_adapter(model, tmp_path, "other")
    close(logits(model), logits(theirs), base_logits)
    fastlora.set_adapter(model, "default")
    assert torch.equal(logits(model), first)


@pytest.mark.parametrize("case", ["lora", "dora"])
def test_we_load_into_a_plain_bitsandbytes_model(case, tmp_path, base_logits):
    bnb = pytest.importorskip("bitsandbytes")
    peft_saves(CASES[case], tmp_path)
    model = llama()
    for name in LINEARS:
        parent, _, child = name.rpartition(".")
        old = model.get_submodule(name)
        new = bnb.nn.Linear4bit(old.in_features, old.out_features, True, torch.float32, quant_type="nf4")
        new.load_state_dict(old.state_dict())
        setattr(model.get_submodule(parent), child, new)
    model.to("cpu")
    fastlora.load_adapter(model, tmp_path)
    assert all(type(layer) is QLoraLinear for layer in layers_of(model).values())
    theirs = peft.PeftModel.from_pretrained(undo_quantization(llama(), model), str(tmp_path)).eval()
    close(logits(model), logits(theirs), base_logits)


@EVERY_CASE
def test_our_own_round_trip_is_exact(fields, tmp_path):
    """Saved and loaded into a plain model: every tensor, every scale and the logits, to the bit."""
    model = move(converted(**fields))
    fastlora.save_adapter(model, tmp_path)
    fresh = fastlora.load_adapter(llama(), tmp_path)
    old, new = layers_of(model), layers_of(fresh)
    assert sorted(old) == sorted(new)
    for name, layer in old.items():
        assert new[name].scaling == layer.scaling
        ours, theirs = (dataclasses.asdict(x.adapter_configs["default"]) for x in (layer, new[name]))
        bookkeeping = ("target_modules", "exclude_modules", "rank_pattern", "alpha_pattern", "layers_to_transform")
        for field in set(ours) - {*bookkeeping, "layers_pattern"}:
            assert ours[field] == theirs[field], (name, field)
    same_tensors(dict(fresh.state_dict()), dict(model.state_dict()))
    assert torch.equal(logits(fresh), logits(model))
    assert fastlora.trainable_parameters(fresh) == fastlora.trainable_parameters(model)


# --- dtypes and names -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["lora", "dora"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_adapters_keep_their_dtype_and_values(case, dtype, tmp_path, base_logits):
    model = move(converted(adapter_dtype=dtype, **CASES[case]))
    fastlora.save_adapter(model, tmp_path / "ours")
    assert {t.dtype for t in tensors(tmp_path / "ours").values()} == {dtype}
    close(logits(peft_loads(tmp_path / "ours")), logits(model), base_logits)
    kept = peft_loads(tmp_path / "ours", llama(dtype=dtype), autocast_adapter_dtype=False)
    kept.save_pretrained(str(tmp_path / "theirs"))
    same_tensors(tensors(tmp_path / "theirs"), tensors(tmp_path / "ours"))
    for quantize in (None, "nf4"):
        fresh = llama() if quantize is None else converted(quantize, adapter_dtype=dtype, **CASES[case])
        fastlora.load_adapter(fresh, tmp_path / "theirs")
        assert sorted(layers_of(fresh)) == sorted(layers_of(model))
        for name, layer in layers_of(fresh).items():
            assert layer.lora_A["default"].dtype == dtype
            assert torch.equal(layer.lora_A["default"], layers_of(model)[name].lora_A["default"])
        fastlora.save_adapter(fresh, tmp_path / "again")
        same_tensors(tensors(tmp_path / "again"), tensors(tmp_path / "ours"))
        if quantize is None:
            close(logits(fresh), logits(model), base_logits)


def test_a_bf16_model_predicts_as_pefts_to_bf16_rounding(tmp_path, base_logits):
    fields = CASES["both patterns"]
    model = move(converted(dtype=torch.bfloat16, adapter_dtype=torch.bfloat16, **fields))
    fastlora.save_adapter(model, tmp_path)
    truth = logits(peft_loads(tmp_path, llama(dtype=torch.bfloat16).float()))
    theirs = logits(peft_loads(tmp_path, llama(dtype=torch.bfloat16), autocast_adapter_dtype=False))
    base = logits(llama(dtype=torch.bfloat16))
    allowed = (theirs - truth).norm()
    assert (truth - base).norm() > 10 * allowed
    assert (logits(model) - truth).norm() <= 1.5 * allowed
    fresh = fastlora.load_adapter(llama(dtype=torch.bfloat16), tmp_path)
    assert torch.equal(logits(fresh), logits(model))


def test_loading_over_an_adapter_of_another_dtype_keeps_the_parameters_and_says_so_truly(tmp_path):
    """The existing parameters stay the same objects (an optimizer holds them); the config tells their real dtype."""
    fastlora.save_adapter(move(converted(adapter_dtype=torch.bfloat16, **CASES["lora"])), tmp_path)
    model = converted(**CASES["lora"])
    before = {name: layer.lora_A["default"] for name, layer in layers_of(model).items()}
    fastlora.load_adapter(model, tmp_path)
    for name, layer in layers_of(model).items():
        assert layer.lora_A["default"] is before[name]
        assert layer.adapter_configs["default"].adapter_dtype == layer.lora_A["default"].dtype


SEVERAL = {
    "second": {"r": 2, "lora_alpha": 5, "use_dora": True, "target_modules": ["q_proj", "down_proj"]},
    "third": {"r": 5, "lora_alpha": 3, "use_rslora": True, "target_modules": ["v_proj"]},
}


def test_several_adapters_lie_where_peft_looks_for_them(tmp_path, base_logits):
    model = converted(**CASES["lora"])
    fastlora.add_adapters(model, SEVERAL)
    want = {}
    for seed, name in enumerate(["default", *SEVERAL]):
        fastlora.set_adapter(model, name)
        move(model, seed)
        want[name] = logits(model)
    for name in want:
        where = fastlora.save_adapter(model, tmp_path, name)
        assert where == (tmp_path if name == "default" else tmp_path / name)
    assert sorted(contents(tmp_path)) == sorted(f"{p}{f}" for p in ("", "second/", "third/") for f in (CONFIG, WEIGHTS))
    twin = peft_loads(tmp_path)
    with silent():
        for name in SEVERAL:
            twin.load_adapter(str(tmp_path / name), name)
    for name, expected in want.items():
        twin.set_adapter(name)
        close(logits(twin), expected, base_logits)


def test_several_adapters_that_peft_saved(tmp_path, base_logits):
    theirs = peft_model(CASES["lora"])
    for name, fields in SEVERAL.items():
        theirs.add_adapter(name, peft.LoraConfig(**peft_fields(fields)))
    want = {}
    for seed, name in enumerate(["default", *SEVERAL]):
        theirs.set_adapter(name)
        move(theirs, seed)
        want[name] = logits(theirs)
    theirs.save_pretrained(str(tmp_path))
    model = llama()
    for name in want:
        fastlora.load_adapter(model, tmp_path, name)
        close(logits(model), want[name], base_logits)
    for name, expected in want.items():
        fastlora.set_adapter(model, name)
        close(logits(model), expected, base_logits)


def test_any_adapter_name_loads_any_folder(tmp_path, base_logits):
    """The name is ours to choose: it is not in the keys."""
    want = logits(peft_saves(CASES["dora"], tmp_path))
    model = fastlora.load_adapter(llama(), tmp_path, "mine")
    assert {name for layer in layers_of(model).values() for name in layer.lora_A} == {"mine"}
    close(logits(model), want, base_logits)
    assert fastlora.save_adapter(model, tmp_path / "out", "mine") == tmp_path / "out" / "mine"
    close(logits(peft_loads(tmp_path / "out" / "mine", name="theirs")), want, base_logits)
    close(logits(fastlora.load_adapter(llama(), str(tmp_path / "out" / "mine"))), want, base_logits)


def test_a_model_that_is_not_from_transformers(tmp_path):
    """Lists of sequences: the last parts of names are numbers that other kinds of module have too."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 8))

        def forward(self, x):
            return x + self.net(x)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.lin = nn.Linear(8, 8)
            self.blocks = nn.ModuleList(Block() for _ in range(3))
            self.head = nn.ModuleDict({"lin": nn.Linear(8, 4)})

        def forward(self, x):
            x = self.lin(x)
            for block in self.blocks:
                x = block(x)
            return self.head["lin"](x)

    x = torch.randn(5, 8)
    for number, targets in enumerate([["0", "2"], ["blocks.1.net.2"], ["lin"], r"lin", r"head\.lin|blocks\.0\.net\.0"]):
        asked = "lin" if targets == r"lin" else targets
        model = move(fastlora.convert(Model(), quantize=None, target_modules=asked, r=3))
        folder = fastlora.save_adapter(model, tmp_path / str(number))
        want, adapted = model(x), sorted(layers_of(model))
        with silent():
            twin = peft.PeftModel.from_pretrained(Model(), str(folder))
        assert sorted(n for n, m in twin.base_model.model.named_modules() if hasattr(m, "lora_A")) == adapted
        torch.testing.assert_close(twin(x), want, rtol=1e-5, atol=1e-5)
        fresh = fastlora.load_adapter(Model(), folder)
        assert sorted(layers_of(fresh)) == adapted
        assert torch.equal(fresh(x), want)


def test_ranks_of_names_that_end_alike_do_not_mix(tmp_path):
    """A whole name is also the ending of another: its rank must not reach the other."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.lin = nn.Linear(8, 8)
            self.b = nn.ModuleDict({"lin": nn.Linear(8, 8), "c": nn.ModuleDict({"lin": nn.Linear(8, 8)})})
            self.bxlin = nn.Linear(8, 8)

        def forward(self, x):
            return self.bxlin(self.b["c"]["lin"](self.b["lin"](self.lin(x))))

    ranks, alphas = {r"^lin": 5, r"^b\.lin": 3}, {r"^b\.lin": 4}
    config = {"r": 2, "lora_alpha": 7, "rank_pattern": ranks, "alpha_pattern": alphas}
    model = move(fastlora.convert(Model(), quantize=None, target_modules="all-linear", **config))
    assert {name: layer.adapter_configs["default"].r for name, layer in layers_of(model).items()} == {
        "lin": 5,
        "b.lin": 3,
        "b.c.lin": 2,
        "bxlin": 2,
    }
    fastlora.save_adapter(model, tmp_path)
    x = torch.randn(5, 8)
    with silent():
        twin = peft.PeftModel.from_pretrained(Model(), str(tmp_path))
    torch.testing.assert_close(twin(x), model(x), rtol=1e-5, atol=1e-5)
    assert torch.equal(fastlora.load_adapter(Model(), tmp_path)(x), model(x))


def test_layers_whose_configs_disagree_are_not_saved_as_if_they_agreed(tmp_path):
    """One file holds one rsLoRA switch: adapters made layer by layer with different ones cannot be saved truly."""
    model = nn.ModuleDict({"a": LoraLinear(8, 8, r=4), "b": LoraLinear(8, 8, r=4, use_rslora=True)})
    with pytest.raises(ConfigError, match="use_rslora"):
        fastlora.save_adapter(model, tmp_path / "x")
    model = nn.ModuleDict({"a": LoraLinear(8, 8, r=4), "b": LoraLinear(8, 8, r=4, use_dora=True)})
    with pytest.raises(ConfigError, match="use_dora"):
        fastlora.save_adapter(model, tmp_path / "x")
    assert not (tmp_path / "x").exists()


# --- what goes into the two files -------------------------------------------------------------------------------------


OWN_INITS = (True, "kaiming", "original", "normal", "standard_normal", "he", "xavier", "normalized")


@pytest.mark.parametrize("init", OWN_INITS)
def test_inits_peft_does_not_know_travel_in_the_metadata(init, tmp_path, base_logits):
    model = move(converted(r=4, init_lora_weights=init, init_seed=77, init_bound=0.5))
    fastlora.save_adapter(model, tmp_path)
    own = json.loads(metadata(tmp_path)["fastlora"])
    assert own["init_lora_weights"] == init
    assert own["init_seed"] == 77
    assert own["init_bound"] == 0.5
    assert json.loads((tmp_path / CONFIG).read_text())["init_lora_weights"] is True
    close(logits(peft_loads(tmp_path)), logits(model), base_logits)
    fresh = fastlora.load_adapter(llama(), tmp_path)
    config = layers_of(fresh)[LINEARS[0]].adapter_configs["default"]
    assert (config.init_lora_weights, config.init_bound) == (init, 0.5)
    fastlora.save_adapter(fresh, tmp_path / "again")
    assert metadata(tmp_path / "again") == metadata(tmp_path)


def test_a_drawn_seed_is_recorded_and_draws_the_same_again(tmp_path):
    model = converted(r=4, init_lora_weights="he")
    fastlora.save_adapter(model, tmp_path)
    seed = json.loads(metadata(tmp_path)["fastlora"])["init_seed"]
    assert isinstance(seed, int)
    again = converted(r=4, init_lora_weights="he", init_seed=seed)
    same_tensors(dict(again.state_dict()), dict(model.state_dict()))


def test_dora_dropout_survives(tmp_path):
    model = move(converted(r=4, use_dora=True, lora_dropout=0.25, dora_dropout="shared"))
    fastlora.save_adapter(model, tmp_path)
    config = layers_of(fastlora.load_adapter(llama(), tmp_path))[LINEARS[0]].adapter_configs["default"]
    assert (config.dora_dropout, config.lora_dropout) == ("shared", 0.25)


def test_an_old_peft_file_without_lora_alpha_means_8(tmp_path, base_logits):
    peft_saves({"r": 4, "lora_alpha": 8}, tmp_path)
    least = {"peft_type": "LORA", "target_modules": ALL, "r": 4}
    (tmp_path / CONFIG).write_text(json.dumps(least))
    want = logits(peft.PeftModel.from_pretrained(llama(), str(tmp_path)))
    model = fastlora.load_adapter(llama(), tmp_path)
    assert {layer.scaling["default"] for layer in layers_of(model).values()} == {2.0}
    close(logits(model), want, base_logits)


def test_a_magnitude_with_and_without_weight(tmp_path, base_logits):
    want = logits(peft_saves(CASES["dora"], tmp_path))
    state = tensors(tmp_path)
    renamed = {k + ".weight" if k.endswith("magnitude_vector") else k: v for k, v in state.items()}
    assert renamed.keys() != state.keys()
    safetensors.torch.save_file(renamed, tmp_path / WEIGHTS)
    assert metadata(tmp_path) is None
    close(logits(fastlora.load_adapter(llama(), tmp_path)), want, base_logits)


def test_tied_modules_to_save_are_saved_twice_not_refused(tmp_path, base_logits):
    """safetensors refuses shared memory; PEFT keeps both modules."""
    fields = {"r": 4, "modules_to_save": ["lm_head", "embed_tokens"], "target_modules": ["q_proj"]}
    model = move(converted(model=llama(tied=True), **fields))
    fastlora.save_adapter(model, tmp_path)
    saved = tensors(tmp_path)
    assert torch.equal(saved[PREFIX + "lm_head.weight"], saved[PREFIX + "model.embed_tokens.weight"])
    close(logits(fastlora.load_adapter(llama(tied=True), tmp_path)), logits(model), logits(llama(tied=True)))
    twin = peft.PeftModel.from_pretrained(llama(tied=True), str(tmp_path)).eval()
    close(logits(twin), logits(model), logits(llama(tied=True)))


def test_one_of_two_tied_modules_to_save_is_refused_or_right(tmp_path):
    """PEFT gives lm_head a copy of its own; training the shared weight would train the embedding too, unsaved."""
    try:
        model = converted(model=llama(tied=True), r=4, modules_to_save=["lm_head"], target_modules=["q_proj"])
    except ConfigError as error:
        assert "lm_head" in str(error)  # noqa: PT017 (either way is right)
        return
    move(model)
    fastlora.save_adapter(model, tmp_path)
    twin = peft.PeftModel.from_pretrained(llama(tied=True), str(tmp_path)).eval()
    close(logits(twin), logits(model), logits(llama(tied=True)))


def test_modules_to_save_with_buffers(tmp_path):
    """A trained module's statistics are part of it."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.lin, self.norm = nn.Linear(8, 8), nn.BatchNorm1d(8)

        def forward(self, x):
            return self.norm(self.lin(x))

    model = fastlora.convert(Model(), quantize=None, r=2, target_modules=["lin"], modules_to_save=["norm"])
    move(model)
    model.train()(torch.randn(16, 8) * 3 + 1)
    model.eval()
    fastlora.save_adapter(model, tmp_path)
    x = torch.randn(4, 8)
    fresh = fastlora.load_adapter(Model().eval(), tmp_path)
    assert torch.equal(fresh(x), model(x))
    twin = peft.PeftModel.from_pretrained(Model(), str(tmp_path)).eval()
    torch.testing.assert_close(twin(x), model(x), rtol=1e-5, atol=1e-5)


def test_saving_while_merged_or_disabled_saves_the_adapter(tmp_path):
    model = move(converted(**CASES["dora"]))
    fastlora.save_adapter(model, tmp_path / "apart")
    fastlora.merge(model)
    fastlora.save_adapter(model, tmp_path / "merged")
    fastlora.unmerge(model)
    with contextlib.ExitStack() as stack:
        for layer in layers_of(model).values():
            stack.enter_context(layer.disable_adapters())
        fastlora.save_adapter(model, tmp_path / "disabled")
    for name in ("merged", "disabled"):
        same_folder(tmp_path / name, tmp_path / "apart")


def same_folder(got, want):
    """The same config, tensors and metadata; safetensors orders its metadata at random."""
    assert (got / CONFIG).read_text() == (want / CONFIG).read_text()
    same_tensors(tensors(got), tensors(want))
    assert metadata(got) == metadata(want)


def test_saving_the_same_twice_gives_the_same(tmp_path):
    model = move(converted(**CASES["both patterns"]))
    fastlora.save_adapter(model, tmp_path / "one")
    fastlora.save_adapter(model, tmp_path / "two")
    same_folder(tmp_path / "one", tmp_path / "two")


def test_both_files_have_the_usual_permissions(tmp_path):
    fastlora.save_adapter(converted(r=2), tmp_path)
    (tmp_path / "usual").write_text("")
    assert len({path.stat().st_mode for path in tmp_path.iterdir()}) == 1


def test_saving_changes_nothing_in_the_model(tmp_path):
    model = move(converted("nf4", **CASES["bias all"]))
    with unchanged(model):
        fastlora.save_adapter(model, tmp_path)


def test_the_name_of_the_base_model_is_kept(tmp_path):
    model = converted(r=2)
    model.config._name_or_path = "somebody/some-model"
    fastlora.save_adapter(model, tmp_path)
    assert json.loads((tmp_path / CONFIG).read_text())["base_model_name_or_path"] == "somebody/some-model"


# --- inits that rewrite the base --------------------------------------------------------------------------------------


@pytest.mark.parametrize("init", ["pissa", "olora"])
@pytest.mark.parametrize("scaled", [{"lora_alpha": 4}, {"lora_alpha": 10, "use_rslora": True}], ids=["s=1", "s=5"])
def test_pissa_and_olora_reload_onto_the_original_base(init, scaled, tmp_path, base_logits):
    model = move(converted(r=4, init_lora_weights=init, **scaled))
    want = logits(model)
    fastlora.save_adapter(model, tmp_path)
    assert json.loads((tmp_path / CONFIG).read_text())["init_lora_weights"] == init
    close(logits(peft_loads(tmp_path)), want, base_logits, 1e-4)
    close(logits(fastlora.load_adapter(llama(), tmp_path)), want, base_logits, 1e-4)
    own = converted(r=4, init_lora_weights=init, **scaled)
    close(logits(fastlora.load_adapter(own, tmp_path)), want, base_logits, 1e-4)


BOUNDED = {"init_lora_weights": "pissa", "init_bound": 0.1}


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_pissa_and_olora_of_peft(init, tmp_path, base_logits):
    fields = {"r": 4, "lora_alpha": 10, "init_lora_weights": init}
    want = logits(peft_saves(fields, tmp_path))
    close(logits(peft_loads(tmp_path)), want, base_logits, 1e-4)
    close(logits(fastlora.load_adapter(llama(), tmp_path)), want, base_logits, 1e-4)
    close(logits(fastlora.load_adapter(converted(**fields), tmp_path)), want, base_logits, 1e-4)


@pytest.mark.parametrize("fields", [{"init_lora_weights": "pissa_niter_1"}, BOUNDED], ids=["random", "bounded"])
def test_a_base_peft_cannot_repeat_is_right_with_us_and_refused_by_peft(fields, tmp_path, base_logits):
    """It depends on random probes or on our own clamping: PEFT would start from another base in silence."""
    model = move(converted(r=4, **fields))
    want = logits(model)
    fastlora.save_adapter(model, tmp_path)
    close(logits(fastlora.load_adapter(llama(), tmp_path)), want, base_logits, 1e-4)
    fastlora.save_adapter(fastlora.load_adapter(llama(), tmp_path), tmp_path / "again")
    assert contents(tmp_path / "again").keys() == {CONFIG, WEIGHTS}
    assert metadata(tmp_path / "again") == metadata(tmp_path)
    with pytest.raises(ValueError, match="Unknown initialization"):
        peft.PeftModel.from_pretrained(llama(), str(tmp_path))
    other = converted(r=4, **fields | {"init_seed": 1, "init_bound": 0.3})
    with unchanged(other), pytest.raises(ConfigError, match="pissa"):
        fastlora.load_adapter(other, tmp_path)


def test_randomised_pissa_of_peft_is_refused(tmp_path):
    """PEFT's random probes are nowhere in its file."""
    peft_saves({"r": 4, "lora_alpha": 4, "init_lora_weights": "pissa_niter_1"}, tmp_path)
    for model in (llama(), converted(r=4, lora_alpha=4, init_lora_weights="pissa_niter_1")):
        with unchanged(model), pytest.raises(FastloraError, match="pissa_niter_1"):
            fastlora.load_adapter(model, tmp_path)


def test_loftq_is_refused_by_peft_without_its_quantizer(tmp_path):
    fastlora.save_adapter(move(converted("nf4", r=4, init_lora_weights="loftq")), tmp_path)
    with pytest.raises((ValueError, ImportError), match="loftq|scipy"):
        peft.PeftModel.from_pretrained(llama(), str(tmp_path))


def test_a_plain_adapter_is_not_loaded_over_one_that_rewrote_the_base(tmp_path):
    fastlora.save_adapter(move(converted(r=4)), tmp_path)
    for model in (converted(r=4, init_lora_weights="olora"), converted("nf4", r=4, init_lora_weights="pissa")):
        with unchanged(model), pytest.raises(ConfigError, match="olora|pissa"):
            fastlora.load_adapter(model, tmp_path)


@pytest.mark.parametrize("init", ["pissa", "olora", "loftq"])
def test_an_adapter_of_a_rewritten_base_is_refused_by_any_other_base(init, tmp_path):
    quantize = "nf4" if init == "loftq" else None
    fastlora.save_adapter(move(converted(quantize, r=4, init_lora_weights=init)), tmp_path)
    for model in (converted(r=4), converted("nf4", r=4), converted(r=4, adapter_name="x")):
        with unchanged(model), pytest.raises(ConfigError, match=init):
            fastlora.load_adapter(model, tmp_path)


def test_olora_with_another_scale_is_another_base(tmp_path):
    """OLoRA takes s * Q R away from the base: an adapter trained with another s does not fit it."""
    fastlora.save_adapter(move(converted(r=4, lora_alpha=8, init_lora_weights="olora")), tmp_path)
    model = converted(r=4, lora_alpha=16, init_lora_weights="olora")
    with unchanged(model), pytest.raises(FastloraError, match="olora"):
        fastlora.load_adapter(model, tmp_path)


def test_loftq_into_a_plain_model_is_refused_clearly(tmp_path):
    fastlora.save_adapter(move(converted("nf4", r=4, init_lora_weights="loftq")), tmp_path)
    model = llama()
    with unchanged(model), pytest.raises(FastloraError, match="loftq"):
        fastlora.load_adapter(model, tmp_path)


@pytest.mark.parametrize("init", ["loftq", "pissa", "olora"])
def test_quantized_and_rewritten_loads_into_the_same_conversion(init, tmp_path, base_logits):
    fields = {"r": 4, "lora_alpha": 10, "init_lora_weights": init}
    model = move(converted("nf4", **fields))
    fastlora.save_adapter(model, tmp_path)
    again = fastlora.load_adapter(converted("nf4", **fields), tmp_path)
    close(logits(again), logits(model), base_logits)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_dense_rewritten_adapter_is_not_put_on_a_plain_model_twice(init, tmp_path):
    """Loading under a new name into a model whose base was rewritten already would rewrite it again."""
    fastlora.save_adapter(move(converted(r=4, init_lora_weights=init)), tmp_path)
    model = fastlora.load_adapter(llama(), tmp_path)
    with unchanged(model), pytest.raises(ConfigError, match=init):
        fastlora.load_adapter(model, tmp_path, "second")


# --- target_modules ---------------------------------------------------------------------------------------------------

_PARTS = st.sampled_from(["a", "b", "lin", "0", "1", "x.lin", "q+", "a.b"])
_NAMES = st.lists(_PARTS, min_size=1, max_size=3).map(".".join)


@hypothesis.settings(derandomize=True, max_examples=150, deadline=None)
@hypothesis.given(st.lists(_NAMES, min_size=1, max_size=9, unique=True), st.data())
def test_minimal_targets_pick_exactly_the_adapted_by_pefts_rule(names, data):
    adapted = data.draw(st.lists(st.sampled_from(names), min_size=1, unique=True))
    targets = peft_format.minimal_targets(adapted, names)
    if isinstance(targets, str):  # only where no list of names can do it
        rest = set(names) - set(adapted)
        assert any(other.endswith("." + name) for name in adapted for other in rest)
    config = peft.LoraConfig(target_modules=targets)
    assert {name for name in names if check_target_module_exists(config, name)} == set(adapted)
    if set(adapted) == set(names):
        assert set(targets) == {name.rpartition(".")[2] for name in names}


def test_minimal_targets_of_a_llama_are_short(tmp_path):
    fastlora.save_adapter(converted(r=2), tmp_path)
    assert json.loads((tmp_path / CONFIG).read_text())["target_modules"] == sorted(ALL)


# --- saving: over what is there, into what cannot be written ----------------------------------------------------------


def two_adapters():
    """The same model with an adapter, and with a larger one of another kind."""
    return move(converted(**CASES["lora"])), move(converted(r=7, use_dora=True), seed=5)


def test_saving_over_an_adapter_replaces_it(tmp_path, base_logits):
    old, new = two_adapters()
    fastlora.save_adapter(old, tmp_path)
    (tmp_path / "README.md").write_text("mine")
    fastlora.save_adapter(new, tmp_path)
    assert sorted(contents(tmp_path)) == ["README.md", CONFIG, WEIGHTS]
    close(logits(peft_loads(tmp_path)), logits(new), base_logits)
    assert (tmp_path / "README.md").read_text() == "mine"


def test_saving_over_pefts_adapter_replaces_it(tmp_path, base_logits):
    peft_saves(CASES["lora"], tmp_path)
    _, new = two_adapters()
    fastlora.save_adapter(new, tmp_path)
    close(logits(peft_loads(tmp_path)), logits(new), base_logits)


def test_a_loaded_adapter_saves_over_its_own_file(tmp_path, base_logits):
    """The tensors must not depend on the file they came from."""
    old, _ = two_adapters()
    fastlora.save_adapter(old, tmp_path)
    model = fastlora.load_adapter(llama(), tmp_path)
    before = contents(tmp_path)
    fastlora.save_adapter(model, tmp_path)
    fastlora.save_adapter(model, tmp_path)
    assert contents(tmp_path).keys() == before.keys()
    close(logits(peft_loads(tmp_path)), logits(old), base_logits)


class Boom(OSError):
    pass


def _raise_on(call_number, real):
    calls = []

    def fake(*args, **kwargs):
        calls.append(args)
        if len(calls) == call_number:
            raise Boom("disk on fire")
        return real(*args, **kwargs)

    return fake


def _half_file(*args, **kwargs):
    path = args[1] if len(args) > 1 else kwargs["filename"]
    with open(path, "wb") as file:
        file.write(b"\x10\0\0\0\0\0\0\0{half")
    raise Boom("disk on fire")


FAILURES = {
    "save_file": lambda patch: patch.setattr(safetensors.torch, "save_file", _half_file),
    "first replace": lambda patch: patch.setattr(os, "replace", _raise_on(1, os.replace)),
    "second replace": lambda patch: patch.setattr(os, "replace", _raise_on(2, os.replace)),
    "config": lambda patch: patch.setattr("pathlib.Path.write_text", _raise_on(1, None)),
}


@pytest.mark.parametrize("failure", FAILURES.values(), ids=FAILURES)
@pytest.mark.parametrize("name", ["default", "other"])
def test_a_failed_save_leaves_the_old_adapter_and_no_litter(failure, name, tmp_path, monkeypatch):
    old = move(converted(adapter_name=name, **CASES["lora"]))
    new = move(converted(adapter_name=name, r=7, use_dora=True), seed=5)
    fastlora.save_adapter(old, tmp_path, name)
    before = contents(tmp_path)
    with monkeypatch.context() as patch:
        failure(patch)
        with pytest.raises(Boom):
            fastlora.save_adapter(new, tmp_path, name)
    assert contents(tmp_path) == before
    assert sorted(p.name for p in tmp_path.rglob("*") if p.is_dir()) == ([] if name == "default" else [name])
    fastlora.load_adapter(llama(), tmp_path, name)
    fastlora.save_adapter(new, tmp_path, name)
    peft_loads(tmp_path if name == "default" else tmp_path / name)


@pytest.mark.parametrize("failure", FAILURES.values(), ids=FAILURES)
def test_a_failed_first_save_leaves_nothing(failure, tmp_path, monkeypatch):
    model = converted(**CASES["lora"])
    with monkeypatch.context() as patch:
        failure(patch)
        with pytest.raises(Boom):
            fastlora.save_adapter(model, tmp_path / "new")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("when", ["save_file", "second replace"])
def test_an_interrupted_save_is_as_harmless(when, tmp_path, monkeypatch):
    """Ctrl-C is not an Exception."""
    old, new = two_adapters()
    fastlora.save_adapter(old, tmp_path)
    before = contents(tmp_path)
    real, calls = os.replace, []

    def interrupted(*args, **kwargs):
        calls.append(args)
        if when == "save_file" or len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    target = safetensors.torch if when == "save_file" else os
    with monkeypatch.context() as patch:
        patch.setattr(target, when if when == "save_file" else "replace", interrupted)
        with pytest.raises(KeyboardInterrupt):
            fastlora.save_adapter(new, tmp_path)
    assert contents(tmp_path) == before
    assert [p for p in tmp_path.rglob("*") if p.is_dir()] == []


def test_a_killed_save_leaves_the_old_adapter(tmp_path):
    """The process dies with half of the new file on disk; the next save works as ever."""
    script = """
        import os, sys, safetensors.torch, fastlora
        from torch import nn
        def die(state, path, **_):
            open(path, "wb").write(b"half")
            os._exit(9)
        safetensors.torch.save_file = die
        fastlora.save_adapter(nn.ModuleDict({"lin": fastlora.LoraLinear(8, 8, r=3)}), sys.argv[1])
    """
    model = nn.ModuleDict({"lin": LoraLinear(8, 8, r=2, init_lora_weights=False)})
    fastlora.save_adapter(model, tmp_path)
    before = contents(tmp_path)
    assert _process(script, tmp_path).returncode == 9
    after = contents(tmp_path)
    assert {key: after[key] for key in before} == before
    fresh = fastlora.load_adapter(nn.ModuleDict({"lin": nn.Linear(8, 8)}), tmp_path)
    assert torch.equal(fresh["lin"].lora_B["default"], model["lin"].lora_B["default"])
    fastlora.save_adapter(fresh, tmp_path)


def _process(script, *args):
    """A fresh Python runs the script."""
    command = [sys.executable, "-c", textwrap.dedent(script), *map(str, args)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run(command, env=environment, capture_output=True, timeout=120, check=False, text=True)


FOREIGN_CONFIGS = {
    "another tool's": '{"model_type": "llama"}',
    "a list": '["peft_type"]',
    "a string": '"peft_type"',
    "not JSON": "{half",
    "empty": "",
    "not text": b"\xff\xfe\x00peft_type",
}


@pytest.mark.parametrize("text", FOREIGN_CONFIGS.values(), ids=FOREIGN_CONFIGS)
@pytest.mark.parametrize("with_weights", [True, False])
def test_files_that_are_no_adapters_are_refused_and_stay(text, with_weights, tmp_path):
    (tmp_path / CONFIG).write_bytes(text if isinstance(text, bytes) else text.encode())
    if with_weights:
        (tmp_path / WEIGHTS).write_bytes(b"precious")
    before = contents(tmp_path)
    with pytest.raises(FileExistsError, match=CONFIG):
        fastlora.save_adapter(converted(r=2), tmp_path)
    assert contents(tmp_path) == before
    assert len(list(tmp_path.iterdir())) == len(before)


def test_weights_without_a_config_are_refused_and_stay(tmp_path):
    (tmp_path / "other").mkdir()
    for path, name in ((tmp_path / WEIGHTS, "default"), (tmp_path / "other" / WEIGHTS, "other")):
        path.write_bytes(b"precious")
        before = contents(tmp_path)
        with pytest.raises(FileExistsError, match=WEIGHTS):
            fastlora.save_adapter(converted(r=2, adapter_name=name), tmp_path, name)
        assert contents(tmp_path) == before


def test_folders_of_those_names_are_refused_and_stay(tmp_path):
    for name in (CONFIG, WEIGHTS):
        folder = tmp_path / name[:9] / name
        folder.mkdir(parents=True)
        (folder / "precious").write_text("yes")
        with pytest.raises(OSError, match=name):
            fastlora.save_adapter(converted(r=2), folder.parent)
        assert sorted(contents(folder.parent)) == [f"{name}/precious"]
    old, new = two_adapters()
    fastlora.save_adapter(old, tmp_path / "ours")
    (tmp_path / "ours" / WEIGHTS).unlink()
    (tmp_path / "ours" / WEIGHTS).mkdir()
    before = contents(tmp_path / "ours")
    with pytest.raises(OSError, match=WEIGHTS):
        fastlora.save_adapter(new, tmp_path / "ours")
    assert contents(tmp_path / "ours") == before


@pytest.mark.parametrize("below", ["", "sub", "sub/deeper"])
@pytest.mark.parametrize("name", ["default", "other"])
def test_a_file_in_place_of_the_folder(below, name, tmp_path):
    file = tmp_path / "file"
    file.write_text("precious")
    with pytest.raises(OSError, match="file"):
        fastlora.save_adapter(converted(r=2, adapter_name=name), file / below, name)
    assert contents(tmp_path) == {"file": b"precious"}


def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    """As root permissions do not bind, so the refusal is played."""

    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied", str(tmp_path))

    old, new = two_adapters()
    fastlora.save_adapter(old, tmp_path)
    before = contents(tmp_path)
    for target in ("tempfile.mkdtemp", "os.mkdir"):
        with monkeypatch.context() as patch:
            patch.setattr(target, refuse)
            with pytest.raises(PermissionError):
                fastlora.save_adapter(new, tmp_path)
    assert contents(tmp_path) == before
    with monkeypatch.context() as patch:
        patch.setattr("os.mkdir", refuse)
        with pytest.raises(PermissionError):
            fastlora.save_adapter(new, tmp_path / "sub")
    assert contents(tmp_path) == before


def test_a_full_disk_is_an_os_error(tmp_path):
    """A real one: the process may write only 4 kB to a file."""
    script = """
        import resource, signal, sys, fastlora
        from torch import nn
        model = nn.ModuleDict({"lin": fastlora.LoraLinear(512, 512, r=8)})
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        try:
            fastlora.save_adapter(model, sys.argv[1])
        except OSError:
            sys.exit(7)
    """
    done = _process(script, tmp_path / "new")
    assert done.returncode == 7, done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["nobody", "", "a.b"])
def test_saving_an_adapter_nobody_has(name, tmp_path):
    with pytest.raises(ConfigError, match="default"):
        fastlora.save_adapter(converted(r=2), tmp_path / "x", name)
    with pytest.raises(ConfigError, match="none"):
        fastlora.save_adapter(llama(), tmp_path / "x", name)
    assert not (tmp_path / "x").exists()


# --- loading: what is not right changes nothing -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """PEFT's folder of a DoRA adapter with biases and a saved head: something of everything."""
    folder = tmp_path_factory.mktemp("good")
    peft_saves({"r": 4, "use_dora": True, "bias": "lora_only", "modules_to_save": ["lm_head"]}, folder)
    return folder


def edit(folder, change):
    state = tensors(folder)
    change(state)
    safetensors.torch.save_file(state, folder / WEIGHTS)


def edit_config(folder, **fields):
    values = json.loads((folder / CONFIG).read_text()) | fields
    (folder / CONFIG).write_text(json.dumps(values))


Q1 = f"{PREFIX}model.layers.1.self_attn.q_proj"
UP = f"{PREFIX}model.layers.1.mlp.up_proj"  # among the last that are loaded


def _cut(folder, size):
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[: int(len(data) * size)])


def _move_key(state, old, new):
    state[new] = state.pop(old)


def _foreign_weights(folder):
    safetensors.torch.save_file({"model.layers.0.weight": torch.zeros(3)}, folder / WEIGHTS)


def _pickle_only(folder):
    torch.save(tensors(folder), folder / "adapter_model.bin")
    (folder / WEIGHTS).unlink()


def _rewrite_metadata(folder, text):
    safetensors.torch.save_file(tensors(folder), folder / WEIGHTS, metadata={"format": "pt", "fastlora": text})


BAD = {
    # files
    "no folder": (lambda d: shutil.rmtree(d), FileNotFoundError, CONFIG),
    "no config": (lambda d: (d / CONFIG).unlink(), FileNotFoundError, CONFIG),
    "no weights": (lambda d: (d / WEIGHTS).unlink(), FileNotFoundError, WEIGHTS),
    "pickle": (_pickle_only, FileNotFoundError, "pickle"),
    "empty weights": (lambda d: (d / WEIGHTS).write_bytes(b""), StateDictError, WEIGHTS),
    "truncated in the header": (lambda d: _cut(d, 0.01), StateDictError, WEIGHTS),
    "truncated in the middle": (lambda d: _cut(d, 0.5), StateDictError, WEIGHTS),
    "truncated by a byte": (lambda d: _cut(d, 0.99999), StateDictError, WEIGHTS),
    "text in place of weights": (lambda d: (d / WEIGHTS).write_text("<html>not found"), StateDictError, WEIGHTS),
    "a pickle named safetensors": (
        lambda d: torch.save({"a": torch.zeros(3)}, d / WEIGHTS),
        StateDictError,
        WEIGHTS,
    ),
    "a pointer to large storage": (
        lambda d: (d / WEIGHTS).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"),
        StateDictError,
        WEIGHTS,
    ),
    "config half written": (lambda d: (d / CONFIG).write_text('{"peft_type": "LO'), StateDictError, "JSON"),
    "config empty": (lambda d: (d / CONFIG).write_text(""), StateDictError, "JSON"),
    "config not text": (lambda d: (d / CONFIG).write_bytes(b"\xff\xfe\x00"), StateDictError, CONFIG),
    "config a list": (lambda d: (d / CONFIG).write_text("[]"), StateDictError, "LORA"),
    "config of a model": (lambda d: (d / CONFIG).write_text('{"model_type": "llama"}'), StateDictError, "LORA"),
    "AdaLoRA": (lambda d: edit_config(d, peft_type="ADALORA"), StateDictError, "ADALORA"),
    "LoHa": (lambda d: edit_config(d, peft_type="LOHA"), StateDictError, "LOHA"),
    "metadata not JSON": (lambda d: _rewrite_metadata(d, "{half"), StateDictError, "fastlora"),
    "metadata a list": (lambda d: _rewrite_metadata(d, "[1]"), StateDictError, "fastlora"),
    "metadata of other types": (lambda d: _rewrite_metadata(d, '{"init_seed": "x"}'), FastloraError, "init_seed"),
    # keys
    "foreign keys": (_foreign_weights, StateDictError, "model.layers.0.weight"),
    "one foreign key": (
        lambda d: edit(d, lambda s: _move_key(s, f"{UP}.lora_A.weight", "up.lora_A.weight")),
        StateDictError,
        "up.lora_A",
    ),
    "no A": (lambda d: edit(d, lambda s: s.pop(f"{UP}.lora_A.weight")), StateDictError, "lora_A"),
    "no B": (lambda d: edit(d, lambda s: s.pop(f"{UP}.lora_B.weight")), StateDictError, "lora_B"),
    "no magnitude": (lambda d: edit(d, lambda s: s.pop(f"{UP}.lora_magnitude_vector")), StateDictError, "magnitude"),
    "only a magnitude": (
        lambda d: edit(d, lambda s: s.update({f"{PREFIX}lm_head.lora_magnitude_vector": torch.ones(61)})),
        StateDictError,
        "lm_head",
    ),
    "a magnitude too many": (lambda d: edit_config(d, use_dora=False), StateDictError, "use_dora"),
    "an embedding's adapter": (
        lambda d: edit(d, lambda s: s.update({f"{PREFIX}model.embed_tokens.lora_embedding_A": torch.ones(4, 61)})),
        StateDictError,
        "lora_embedding_A",
    ),
    "a bias of B": (
        lambda d: edit(d, lambda s: s.update({f"{UP}.lora_B.bias": torch.ones(64)})),
        StateDictError,
        "lora_B.bias",
    ),
    "no adapter at all": (
        lambda d: safetensors.torch.save_file({f"{PREFIX}lm_head.weight": torch.zeros(61, 32)}, d / WEIGHTS),
        StateDictError,
        "lora_A",
    ),
    "another model's": (
        lambda d: edit(d, lambda s: [_move_key(s, k, k.replace("layers.1.", "layers.7.")) for k in list(s)]),
        StateDictError,
        "layers.7",
    ),
    "an adapter on a norm": (
        lambda d: edit(
            d,
            lambda s: s.update(
                {
                    f"{PREFIX}model.norm.lora_A.weight": torch.ones(4, 32),
                    f"{PREFIX}model.norm.lora_B.weight": torch.ones(32, 4),
                    f"{PREFIX}model.norm.lora_magnitude_vector": torch.ones(32),
                }
            ),
        ),
        StateDictError,
        "model.norm",
    ),
    "a parameter of nobody": (
        lambda d: edit(d, lambda s: s.update({f"{PREFIX}model.nobody.weight": torch.ones(4)})),
        StateDictError,
        "nobody",
    ),
    # shapes and dtypes
    "A too wide": (
        lambda d: edit(d, lambda s: s.update({f"{UP}.lora_A.weight": torch.ones(4, 33)})),
        StateDictError,
        "up_proj",
    ),
    "B too tall": (
        lambda d: edit(d, lambda s: s.update({f"{UP}.lora_B.weight": torch.ones(65, 4)})),
        StateDictError,
        "up_proj",
    ),
    "A and B of different ranks": (
        lambda d: edit(d, lambda s: s.update({f"{UP}.lora_A.weight": torch.ones(5, 32)})),
        StateDictError,
        "up_proj",
    ),
    "both of another rank": (
        lambda d: edit(
            d, lambda s: s.update({f"{UP}.lora_A.weight": torch.ones(5, 32), f"{UP}.lora_B.weight": torch.ones(64, 5)})
        ),
        StateDictError,
        "up_proj",
    ),
    "A of rank 0": (
        lambda d: edit(
            d, lambda s: s.update({f"{UP}.lora_A.weight": torch.ones(0, 32), f"{UP}.lora_B.weight": torch.ones(64, 0)})
        ),
        StateDictError,
        "up_proj",
    ),
    "A of one dimension": (
        lambda d: edit(d, lambda s: s.update({f"{UP}.lora_A.weight": torch.ones(128)})),
        StateDictError,
        "up_proj",
    ),
    "A of three dimensions": (
        lambda d: edit(d, lambda s: s.update({f"{UP}.lora_A.weight": torch.ones(4, 32, 1)})),
        StateDictError,
        "up_proj",
    ),
    "a magnitude of another size": (
        lambda d: edit(d, lambda s: s.update({f"{UP}.lora_magnitude_vector": torch.ones(63)})),
        StateDictError,
        "magnitude",
    ),
    "a bias of another size": (
        lambda d: edit(d, lambda s: s.update({f"{UP}.base_layer.bias": torch.ones(63)})),
        StateDictError,
        "up_proj.bias",
    ),
    "a head of another vocabulary": (
        lambda d: edit(d, lambda s: s.update({f"{PREFIX}lm_head.weight": torch.ones(62, 32)})),
        StateDictError,
        "lm_head",
    ),
    "integers in A": (
        lambda d: edit(d, lambda s: s.update({f"{UP}.lora_A.weight": torch.ones(4, 32, dtype=torch.int8)})),
        FastloraError,
        "up_proj",
    ),
    "integers in B of the first": (
        lambda d: edit(d, lambda s: s.update({f"{Q1}.lora_B.weight": torch.ones(32, 4, dtype=torch.int64)})),
        FastloraError,
        "q_proj",
    ),
    "integers in a magnitude": (
        lambda d: edit(d, lambda s: s.update({f"{UP}.lora_magnitude_vector": torch.ones(64, dtype=torch.int32)})),
        FastloraError,
        "up_proj",
    ),
    "integers in the head": (
        lambda d: edit(d, lambda s: s.update({f"{PREFIX}lm_head.weight": torch.ones(61, 32, dtype=torch.int32)})),
        FastloraError,
        "lm_head",
    ),
    # config values
    "another rank in the config": (lambda d: edit_config(d, r=5), StateDictError, "rank 5"),
    "a rank of 0": (lambda d: edit_config(d, r=0), ConfigError, "r must"),
    "a rank of text": (lambda d: edit_config(d, r="4"), ConfigError, "r must"),
    "an alpha of text": (lambda d: edit_config(d, lora_alpha="16"), ConfigError, "lora_alpha"),
    "a dropout of 1": (lambda d: edit_config(d, lora_dropout=1.0), ConfigError, "lora_dropout"),
    "a bias of nobody": (lambda d: edit_config(d, bias="some"), ConfigError, "bias"),
    "a rank pattern that is a list": (lambda d: edit_config(d, rank_pattern=["q"]), ConfigError, "rank_pattern"),
    "a rank pattern of text": (
        lambda d: edit_config(d, rank_pattern={"up_proj": "x"}),
        FastloraError,
        "up_proj|r must",
    ),
    "an alpha pattern of text": (
        lambda d: edit_config(d, alpha_pattern={"up_proj": "x"}),
        FastloraError,
        "up_proj|lora_alpha",
    ),
    "a rank pattern that is no regex": (lambda d: edit_config(d, rank_pattern={"(": 2}), FastloraError, "rank_pattern"),
    "an unknown init": (lambda d: edit_config(d, init_lora_weights="mystery"), ConfigError, "mystery"),
    "EVA": (lambda d: edit_config(d, init_lora_weights="eva"), ConfigError, "eva"),
    "CorDA": (lambda d: edit_config(d, init_lora_weights="corda"), ConfigError, "corda"),
}


@pytest.fixture(scope="module")
def targets():
    """One model of each kind to load into: after every failure it must be as it was, so that all tests can share it."""
    own = {"r": 4, "use_dora": True, "bias": "lora_only", "modules_to_save": ["lm_head"]}
    return {"plain": llama(), "converted": move(converted(**own)), "nf4": move(converted("nf4", **own))}


@pytest.mark.parametrize("into", ["plain", "converted", "nf4"])
@pytest.mark.parametrize("damage", BAD.values(), ids=BAD)
def test_a_bad_folder_is_one_clear_error_and_changes_nothing(damage, into, good, targets, tmp_path):
    break_it, error, words = damage
    folder = tmp_path / "bad"
    shutil.copytree(good, folder)
    break_it(folder)
    model = targets[into]
    before = contents(folder) if folder.exists() else None
    with unchanged(model), pytest.raises(error, match=words) as caught:
        fastlora.load_adapter(model, folder)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500
    assert (contents(folder) if folder.exists() else None) == before


UNSUPPORTED = {
    "fan_in_fan_out": True,
    "lora_bias": True,
    "use_qalora": True,
    "ensure_weight_tying": True,
    "alora_invocation_tokens": [1, 2],
    "arrow_config": {"top_k": 2},
    "corda_config": {"corda_method": "ipm"},
    "eva_config": {"rho": 2.0},
    "kasa_config": {"beta": 1.0},
    "layer_replication": [[0, 2], [1, 2]],
    "lora_ga_config": {"direction": "x"},
    "megatron_config": {"tensor_model_parallel_size": 2},
    "monteclora_config": {"n": 2},
    "target_parameters": ["experts.down_proj"],
    "trainable_token_indices": [1, 2],
    "use_bdlora": {"nblocks": 2},
    "velora_config": {"rank": 2},
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_a_field_we_cannot_honour_is_named(name, good, targets, tmp_path):
    folder = tmp_path / "bad"
    shutil.copytree(good, folder)
    edit_config(folder, **{name: UNSUPPORTED[name]})
    for model in targets.values():
        with unchanged(model), pytest.raises(ConfigError, match=name):
            fastlora.load_adapter(model, folder)


def test_every_field_of_pefts_config_is_accounted_for():
    """A field PEFT adds is either ours, named as unsupported, or known to say nothing about the mathematics."""
    from fastlora.config import PEFT_BOOKKEEPING

    ours = {field.name for field in dataclasses.fields(LoraConfig)}
    harmless = {*PEFT_BOOKKEEPING, "megatron_core", "qalora_group_size"}
    theirs = {field.name for field in dataclasses.fields(peft.LoraConfig)}
    assert theirs - ours - harmless == set(UNSUPPORTED) & theirs


def test_a_field_from_the_future_is_not_passed_over_in_silence(good, tmp_path):
    """Set to something that may matter it is refused; at a value that switches nothing on it is let through."""
    folder = tmp_path / "new"
    shutil.copytree(good, folder)
    edit_config(folder, use_magic=False, magic_config=None, magic_list=[], magic_map={})
    fastlora.load_adapter(llama(), folder)
    edit_config(folder, use_magic=True)
    model = llama()
    with unchanged(model), pytest.raises(ConfigError, match="use_magic"):
        fastlora.load_adapter(model, folder)


def test_a_pickle_is_never_opened(good, tmp_path, monkeypatch):
    """Beside good weights it is passed over; alone it is named, and not read in either case."""
    folder = tmp_path / "both"
    shutil.copytree(good, folder)

    class Bomb:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "exploded"),))

    torch.save(Bomb(), folder / "adapter_model.bin")
    monkeypatch.setattr(torch, "load", None)
    fastlora.load_adapter(llama(), folder)
    (folder / WEIGHTS).unlink()
    with pytest.raises(FileNotFoundError, match=r"adapter_model\.bin is a pickle"):
        fastlora.load_adapter(llama(), folder)
    assert not (tmp_path / "exploded").exists()


def test_a_path_that_is_a_file(good, targets):
    model = targets["plain"]
    with unchanged(model), pytest.raises(OSError, match="adapter"):
        fastlora.load_adapter(model, good / WEIGHTS)


@pytest.mark.parametrize("name", ["a.b", "", "keys"])
@pytest.mark.parametrize("into", ["plain", "converted"])
def test_an_impossible_adapter_name_changes_nothing(name, into, good, targets):
    model = targets[into]
    with unchanged(model), pytest.raises(ConfigError, match="adapter name"):
        fastlora.load_adapter(model, good, name)


def test_models_the_adapter_does_not_fit(good, tmp_path):
    lora = tmp_path / "lora"
    fastlora.save_adapter(move(converted(**CASES["lora"])), lora)
    smaller = llama()
    smaller.model.layers = smaller.model.layers[:1]
    merged = move(converted(r=4))
    fastlora.merge(merged)
    for model, folder, error, words in (
        (smaller, lora, StateDictError, r"layers\.1"),
        (llama(bias=False), good, StateDictError, "bias"),
        (converted(r=4, target_modules=["q_proj"]), lora, StateDictError, "converted"),
        (converted(r=5), lora, ConfigError, "r=5"),
        (converted(r=4, use_dora=True), lora, ConfigError, "use_dora"),
        (converted(r=4), good, ConfigError, "use_dora"),
        (merged, lora, ConfigError, "merged"),
        (nn.Sequential(nn.Linear(3, 3)), lora, StateDictError, "does not have"),
        (nn.ReLU(), lora, StateDictError, "does not have"),
    ):
        with unchanged(model), pytest.raises(error, match=words):
            fastlora.load_adapter(model, folder)


def test_an_adapter_for_some_layers_is_not_loaded_over_one_for_all(tmp_path):
    """The others would go on with the old adapter's tensors."""
    fastlora.save_adapter(move(converted(r=4, target_modules=SOME)), tmp_path)
    model = move(converted(r=4))
    with unchanged(model), pytest.raises(StateDictError, match="another name"):
        fastlora.load_adapter(model, tmp_path)


def test_a_tied_head_is_refused_without_changing_anything(tmp_path):
    untied = converted(r=4, target_modules=["lm_head", "q_proj"])
    fastlora.save_adapter(move(untied), tmp_path)
    model = llama(tied=True)
    with unchanged(model), pytest.raises(FastloraError, match="lm_head"):
        fastlora.load_adapter(model, tmp_path)


def test_a_second_adapter_does_not_overwrite_what_the_first_one_shares(good):
    """Biases and whole modules exist once: another adapter's would silently change the first one's function."""
    model = move(converted(r=4))
    with unchanged(model), pytest.raises(ConfigError, match="bias|modules_to_save"):
        fastlora.load_adapter(model, good, "second")


def test_loading_keeps_the_mode_and_what_else_the_model_has(tmp_path):
    fastlora.save_adapter(move(converted(**CASES["dropout"])), tmp_path)
    model = llama().train()
    model.model.layers[0].eval()
    fastlora.load_adapter(model, tmp_path)
    for name, layer in layers_of(model).items():
        assert layer.training == ("layers.1" in name)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable
    assert all("lora_" in name for name in trainable)


def test_loading_over_an_adapter_keeps_its_parameter_objects_and_takes_the_scale(tmp_path, base_logits):
    want = logits(peft_saves({"r": 4, "lora_alpha": 3, "use_rslora": True}, tmp_path))
    model = converted(r=4, lora_alpha=16)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    fastlora.load_adapter(model, tmp_path)
    assert {id(p) for p in model.parameters() if p.requires_grad} == held
    assert {layer.scaling["default"] for layer in layers_of(model).values()} == {1.5}
    close(logits(model), want, base_logits)


def test_training_on_after_loading_equals_training_on_in_peft(tmp_path):
    """The loaded adapter is the same starting point: one SGD step gives the same parameters."""
    theirs = peft_saves(CASES["dora"], tmp_path)
    ours = fastlora.load_adapter(llama(), tmp_path)
    ids = torch.arange(14).reshape(2, 7)
    for model in (theirs, ours):
        model.train()
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    theirs.save_pretrained(str(tmp_path / "theirs"))
    fastlora.save_adapter(ours, tmp_path / "ours")
    got, want, start = tensors(tmp_path / "ours"), tensors(tmp_path / "theirs"), tensors(tmp_path)
    assert got.keys() == want.keys()
    for key, tensor in want.items():
        step = (tensor - start[key]).norm()
        assert step > 0, key
        assert (got[key] - tensor).norm() <= 1e-4 * step + 1e-6 * tensor.norm(), key
