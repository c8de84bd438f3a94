"""Tools of the checkpoint tests: the cases, models of both libraries, and folders to read and damage."""

from __future__ import annotations

import json

import peft
import pytest
import safetensors
import safetensors.torch
import torch

import fastlora
from tests.model_tools import PREFIX, llama, logits, move, silent

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


@pytest.fixture(scope="module")
def targets():
    """One model of each kind to load into: after every failure it must be as it was, so that all tests can share it."""
    own = {"r": 4, "use_dora": True, "bias": "lora_only", "modules_to_save": ["lm_head"]}
    return {"plain": llama(), "converted": move(converted(**own)), "nf4": move(converted("nf4", **own))}
