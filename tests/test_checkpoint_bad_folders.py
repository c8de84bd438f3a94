"""load_adapter and every kind of damaged or foreign folder: one clear error, nothing changed."""

from __future__ import annotations

import shutil

import pytest
import safetensors
import safetensors.torch
import torch

import fastlora
from fastlora import ConfigError, FastloraError, StateDictError
from tests import checkpoint_tools
from tests.checkpoint_tools import CONFIG, Q1, UP, WEIGHTS, edit, edit_config, tensors
from tests.model_tools import PREFIX, contents, unchanged

good = checkpoint_tools.good
targets = checkpoint_tools.targets


def _cut(folder, size):
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[: int(len(data) * size)])


def _move_key(state, old, new):
    state[new] = state.pop(old)


def _foreign_weights(folder):
    safetensors.torch.save_file({"model.layers.0.weight": torch.zeros(3)}, folder / WEIGHTS)


def _pickle_only(folder, change=lambda data: data):
    torch.save(tensors(folder), folder / "adapter_model.bin")
    (folder / "adapter_model.bin").write_bytes(change((folder / "adapter_model.bin").read_bytes()))
    (folder / WEIGHTS).unlink()


def _rewrite_metadata(folder, text):
    safetensors.torch.save_file(tensors(folder), folder / WEIGHTS, metadata={"format": "pt", "fastlora": text})


BAD = {
    # files
    "no folder": (lambda d: shutil.rmtree(d), FileNotFoundError, CONFIG),
    "no config": (lambda d: (d / CONFIG).unlink(), FileNotFoundError, CONFIG),
    "no weights": (lambda d: (d / WEIGHTS).unlink(), FileNotFoundError, WEIGHTS),
    "truncated pickle": (
        lambda d: _pickle_only(d, lambda data: data[: len(data) // 2]),
        StateDictError,
        "adapter_model.bin",
    ),
    "empty pickle": (lambda d: _pickle_only(d, lambda data: b""), StateDictError, "adapter_model.bin"),
    "text in place of a pickle": (lambda d: _pickle_only(d, lambda data: b"<html>"), StateDictError, "pickle"),
    "a pickle of a list": (
        lambda d: ((d / WEIGHTS).unlink(), torch.save([1], d / "adapter_model.bin")),
        StateDictError,
        "tensors by name",
    ),
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
    "AdaLoRA by name alone": (lambda d: edit_config(d, peft_type="ADALORA"), ConfigError, "total_step"),
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
