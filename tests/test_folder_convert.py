"""convert_adapter: every layout holds the same tensors, its own library reads it, and nothing is half-written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import fastlora
from fastlora import ConfigError, StateDictError, moe
from fastlora.adalora import AdaLoraConfig
from fastlora.io import plain
from fastlora.nn.adapter_layouts import LAYOUTS, convert_adapter
from tests.checkpoint_tools import EVERY_CASE, peft_loads, peft_saves, same_tensors
from tests.folder_tools import adapter_folder, names
from tests.model_tools import contents, llama, logits, move

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
MIXTURES = {
    "mixlora": moe.MixLoraConfig(num_experts=3, r=4, lora_alpha=8, target_modules=["up_proj", "down_proj", "q_proj"]),
    "loramoe": moe.LoraMoeConfig(num_experts=2, r=4, lora_alpha=8, target_modules=["up_proj", "v_proj"]),
    "mola": moe.MolaConfig(num_experts=3, r=4, lora_alpha=8, target_modules=["gate_proj", "q_proj"]),
}


def mixture_folder(folder: Path, config) -> Path:
    model = llama(bias=False)
    moe.convert(model, config)
    return moe.save_adapter(move(model), folder)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    files = [path for path in folder.iterdir() if path.suffix in (".safetensors", ".bin")]
    assert len(files) == 1
    return torch.load(files[0], weights_only=True) if files[0].suffix == ".bin" else load_file(files[0])


@EVERY_CASE
def test_pefts_adapters_come_back_from_plain(tmp_path, fields):
    peft_saves(fields, tmp_path / "a")
    there = convert_adapter(tmp_path / "a", tmp_path / "b", "plain")
    back = convert_adapter(tmp_path / "b", tmp_path / "c", "peft")
    assert (there.source, there.layout, back.source, back.layout) == ("peft", "plain", "plain", "peft")
    same_tensors(tensors(tmp_path / "c"), tensors(tmp_path / "a"))
    assert json.loads((tmp_path / "c" / CONFIG).read_text()) == json.loads((tmp_path / "a" / CONFIG).read_text())
    assert there.nbytes == sum(tensor.nbytes for tensor in tensors(tmp_path / "a").values())


@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
def test_plain_keys_are_those_of_the_adapted_model(tmp_path, use_dora):
    fields = {"r": 4, "use_dora": use_dora, "bias": "lora_only"}
    model = move(fastlora.convert(llama(), quantize=None, progress=False, **fields))
    convert_adapter(fastlora.save_adapter(model, tmp_path / "a"), tmp_path / "b", "plain")
    state = load_file(tmp_path / "b" / plain.WEIGHTS_NAME)
    fresh = fastlora.convert(llama(), quantize=None, progress=False, **fields)
    unexpected = fresh.load_state_dict(state, strict=False).unexpected_keys
    assert unexpected == []
    assert torch.equal(logits(fresh), logits(model))


def test_adalora_comes_back_pruned_as_it_was(tmp_path):
    config = AdaLoraConfig(init_r=6, target_r=3, total_step=10, init_seed=0)
    model = move(fastlora.convert(llama(), config, quantize=None, progress=False))
    for _, layer in fastlora.nn.targets.adapted_layers(model):
        layer.rank_masks["default"] = torch.tensor([True, False, True, True, False, True])
    fastlora.save_adapter(model, tmp_path / "a")
    assert convert_adapter(tmp_path / "a", tmp_path / "b", "plain").method == "AdaLoRA"
    convert_adapter(tmp_path / "b", tmp_path / "c", "peft")
    same_tensors(tensors(tmp_path / "c"), tensors(tmp_path / "a"))
    want, got = (logits(fastlora.load_adapter(llama(), tmp_path / name)) for name in ("a", "c"))
    assert torch.equal(want, got)


def test_moe_peft_gets_a_pickle_of_tensors_and_its_own_fields(tmp_path):
    adapter = adapter_folder(tmp_path / "a", lora_alpha=6.0, lora_dropout=0.0, use_rslora=True)
    done = convert_adapter(adapter, tmp_path / "b", "moe-peft")
    assert names(tmp_path / "b") == [CONFIG, "adapter_model.bin"]
    same_tensors(tensors(tmp_path / "b"), tensors(adapter))
    fields = json.loads((tmp_path / "b" / CONFIG).read_text())
    # `LoraConfig.check` of MoE-PEFT 2.0.2 asserts these types.
    assert [type(fields[name]) for name in ("r", "lora_alpha", "lora_dropout", "use_rslora")] == [int, int, float, bool]
    assert set(fields["target_modules"]) == {
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    }
    assert (done.method, done.notes) == ("LoRA", ["MoE-PEFT needs a dropout above 0: 1e-12 stands for none"])
    assert fields["lora_dropout"] == 1e-12
    back = convert_adapter(tmp_path / "b", tmp_path / "c", "peft")
    assert back.source == "moe-peft"
    assert json.loads((tmp_path / "c" / CONFIG).read_text())["lora_dropout"] == 0.0
    want = logits(fastlora.load_adapter(llama(), adapter))
    assert torch.equal(logits(fastlora.load_adapter(llama(), tmp_path / "c")), want)
    theirs = logits(peft_loads(tmp_path / "c"))
    assert torch.allclose(theirs, want, atol=1e-4)


def test_what_moe_peft_will_not_read_is_said(tmp_path):
    adapter = adapter_folder(tmp_path / "a", use_dora=True)
    done = convert_adapter(adapter, tmp_path / "b", "moe-peft")
    assert "magnitudes" in done.notes[0]
    same_tensors(tensors(tmp_path / "b"), tensors(adapter))


@pytest.mark.parametrize("config", MIXTURES.values(), ids=MIXTURES)
def test_mixtures_go_round(tmp_path, config):
    adapter = mixture_folder(tmp_path / "a", config)
    for source, layout in (("a", "plain"), ("plain", "moe-peft"), ("moe-peft", "moe-peft2")):
        done = convert_adapter(tmp_path / source, tmp_path / layout, layout.removesuffix("2"))
        assert done.method == {"MIXLORA": "MixLoRA", "LORAMOE": "LoRAMoE", "MOLA": "MoLA"}[config.peft_type]
    for name in ("moe-peft", "moe-peft2"):
        assert (tmp_path / name / "adapter_model.bin").is_file()
        same_tensors(tensors(tmp_path / name), tensors(adapter))
    model = llama(bias=False)
    moe.convert(model, config)
    state = load_file(tmp_path / "plain" / plain.WEIGHTS_NAME)
    assert set(state) <= set(model.state_dict())
    model.load_state_dict(state, strict=False)
    again = moe.load_adapter(llama(bias=False), tmp_path / "moe-peft")
    assert torch.equal(logits(model), logits(again))


def test_what_stands_beside_comes_along(tmp_path):
    adapter = adapter_folder(tmp_path / "a")
    (adapter / "tokenizer.json").write_text("{}")
    (adapter / "optimizer.pt").write_bytes(b"x")
    assert convert_adapter(adapter, tmp_path / "b", "plain").copied == ["tokenizer.json"]
    assert names(tmp_path / "b") == sorted([CONFIG, plain.WEIGHTS_NAME, "tokenizer.json"])


# --- what is refused --------------------------------------------------------------------------------------------------


def edit(folder: Path, **fields) -> None:
    path = folder / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def bare(folder: Path) -> None:
    state = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    torch.save({key: t for key, t in state.items() if "magnitude" not in key}, folder / "adapter_model.bin")


REFUSED = {
    "rank pattern": ({"rank_pattern": {"q_proj": 2}}, "moe-peft", ConfigError, "rank_pattern"),
    "alpha pattern": ({"alpha_pattern": {"q_proj": 3}}, "moe-peft", ConfigError, "alpha_pattern"),
    "half an alpha": ({"lora_alpha": 2.5}, "moe-peft", ConfigError, "lora_alpha=2.5"),
    "biases": ({"bias": "lora_only"}, "moe-peft", ConfigError, "its own model.layers.0"),
    "some layers": ({"layers_to_transform": [1]}, "moe-peft", None, ""),
    "uneven layers": (
        {"target_modules": ["q_proj", "layers.1.mlp.down_proj"]},
        "moe-peft",
        ConfigError,
        "layer 1 differs",
    ),
    "a word": ({}, "onnx", ConfigError, "known: peft, moe-peft, plain"),
}


@pytest.mark.parametrize(("fields", "layout", "error", "said"), REFUSED.values(), ids=REFUSED)
def test_what_a_layout_cannot_hold_is_refused(tmp_path, fields, layout, error, said):
    adapter = adapter_folder(tmp_path / "a", **fields)
    if error is None:
        convert_adapter(adapter, tmp_path / "b", layout)
        return
    with pytest.raises(error, match=said):
        convert_adapter(adapter, tmp_path / "b", layout)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_mixtures_have_no_place_in_pefts_layout(tmp_path):
    adapter = mixture_folder(tmp_path / "a", MIXTURES["mola"])
    with pytest.raises(ConfigError, match="PEFT has no layout for MoLA"):
        convert_adapter(adapter, tmp_path / "b", "peft")


def test_magnitudes_are_not_invented(tmp_path):
    adapter = adapter_folder(tmp_path / "a", use_dora=True)
    bare(adapter)
    with pytest.raises(ConfigError, match="no DoRA magnitudes"):
        convert_adapter(adapter, tmp_path / "b", "peft")


DAMAGES = {
    "no config": (lambda f: (f / CONFIG).unlink(), FileNotFoundError, "no adapter_config.json"),
    "no weights": (lambda f: (f / plain.WEIGHTS_NAME).unlink(), FileNotFoundError, "no adapter_model"),
    "no JSON": (lambda f: (f / CONFIG).write_text("["), StateDictError, "no JSON"),
    "another method": (lambda f: edit(f, peft_type="LOHA"), StateDictError, "LOHA"),
    "cut short": (lambda f: (f / plain.WEIGHTS_NAME).write_bytes(b"x" * 50), StateDictError, "damaged"),
}


@pytest.mark.parametrize(("damage", "error", "said"), DAMAGES.values(), ids=DAMAGES)
def test_damaged_plain_folders(tmp_path, damage, error, said):
    convert_adapter(adapter_folder(tmp_path / "a"), tmp_path / "b", "plain")
    convert_adapter(tmp_path / "a", tmp_path / "c", "peft")
    damage(tmp_path / "b")
    before = contents(tmp_path)
    with pytest.raises(error, match=said):
        convert_adapter(tmp_path / "b", tmp_path / "c", "peft", overwrite=True)
    assert contents(tmp_path) == before


Q = "m.q_proj"
BROKEN = {
    "half": ({f"{Q}.lora_A.default": torch.zeros(2, 3)}, "lora_B is missing"),
    "shapes": ({f"{Q}.lora_A.default": torch.zeros(2, 3), f"{Q}.lora_B.default": torch.zeros(3, 4)}, "expected lora_A"),
    "two": ({f"{Q}.lora_A.x": torch.zeros(2, 3), f"{Q}.lora_B.y": torch.zeros(3, 2)}, "one adapter, got x, y"),
    "none": ({"bias": torch.zeros(3)}, "one adapter, got none"),
}


@pytest.mark.parametrize(("state", "said"), BROKEN.values(), ids=BROKEN)
def test_plain_states_that_are_none(state, said):
    with pytest.raises(StateDictError, match=said):
        plain.from_state(state)


def test_broken_plain_mixtures(tmp_path):
    mixture_folder(tmp_path / "a", MIXTURES["mixlora"])
    convert_adapter(tmp_path / "a", tmp_path / "b", "plain")
    path = tmp_path / "b" / plain.WEIGHTS_NAME
    good = load_file(path)
    gone = {"mlp.up_proj.lora_B": "incomplete", "mlp.gate.weight": "gate", "self_attn.q_proj.lora_A.default": "lora_A"}
    for key, said in gone.items():
        save_file({name: t for name, t in good.items() if name != f"model.layers.0.{key}"}, path)
        with pytest.raises(StateDictError, match=said):
            convert_adapter(tmp_path / "b", tmp_path / "c", "moe-peft")
    save_file(good | {"lm_head.weight": torch.zeros(2, 2)}, path)
    with pytest.raises(StateDictError, match="no key of a mixture"):
        convert_adapter(tmp_path / "b", tmp_path / "c", "moe-peft")
    assert sorted(item.name for item in tmp_path.iterdir()) == ["a", "b"]
    assert set(LAYOUTS) == {"peft", "moe-peft", "plain"}
