"""Adapters on disk, both ways: PEFT reads what we save, we read what PEFT saves, and both predict the same."""

from __future__ import annotations

import dataclasses
import json

import peft
import pytest
import torch

import fastlora
from fastlora import LoraLinear, QLoraLinear
from tests import checkpoint_tools
from tests.checkpoint_tools import (
    CASES,
    CONFIG,
    EVERY_CASE,
    WEIGHTS,
    converted,
    metadata,
    peft_loads,
    peft_model,
    peft_saves,
    same_tensors,
    tensors,
)
from tests.model_tools import LINEARS, PREFIX, close, contents, layers_of, llama, logits, move, undo_quantization

base_logits = checkpoint_tools.base_logits
targets = checkpoint_tools.targets


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
