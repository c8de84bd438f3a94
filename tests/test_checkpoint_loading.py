"""load_adapter: fields and models it must refuse, and what loading leaves as it was."""

from __future__ import annotations

import dataclasses
import os
import shutil

import peft
import pytest
import torch
from torch import nn

import fastlora
from fastlora import ConfigError, FastloraError, LoraConfig, StateDictError
from tests import checkpoint_tools
from tests.checkpoint_tools import CASES, SOME, WEIGHTS, converted, edit_config, peft_saves, tensors
from tests.model_tools import close, layers_of, llama, logits, move, unchanged

base_logits = checkpoint_tools.base_logits
good = checkpoint_tools.good
targets = checkpoint_tools.targets


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


def test_a_pickle_never_runs_code(good, tmp_path, monkeypatch):
    """Beside good weights it is not opened; alone it is read as tensors and nothing else."""
    folder = tmp_path / "both"
    shutil.copytree(good, folder)

    class Bomb:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "exploded"),))

    torch.save(Bomb(), folder / "adapter_model.bin")
    with monkeypatch.context() as patch:
        patch.setattr(torch, "load", None)
        fastlora.load_adapter(llama(), folder)
    (folder / WEIGHTS).unlink()
    model = llama()
    with unchanged(model), pytest.raises(StateDictError, match=r"adapter_model\.bin is not .* nothing else"):
        fastlora.load_adapter(model, folder)
    assert not (tmp_path / "exploded").exists()


def test_a_pickle_of_tensors_loads_as_its_safetensors_do(good, tmp_path):
    folder = tmp_path / "old"
    shutil.copytree(good, folder)
    torch.save(tensors(folder), folder / "adapter_model.bin")
    (folder / WEIGHTS).unlink()
    new, old = fastlora.load_adapter(llama(), good), fastlora.load_adapter(llama(), folder)
    assert torch.equal(logits(new), logits(old))


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
