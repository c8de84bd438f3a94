"""MoE-PEFT's folders: read as it writes them, written so that nothing is lost, all or nothing."""

from __future__ import annotations

import json
import os
import subprocess
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import fastlora
from fastlora import ConfigError, FastloraError, StateDictError, moe
from fastlora.io import moe_peft
from tests import moe_tools, moe_workers
from tests.distributed_tools import run_world
from tests.model_tools import move, unchanged
from tests.moe_tools import MIXTURES, OUTPUT, close


def _logits(model):
    with torch.no_grad():
        return model.eval()(**moe_tools.batch()).logits


# --- plain adapters ---------------------------------------------------------------------------------------------------


def test_a_plain_lora_folder_of_moe_peft_loads_as_it_is(tmp_path):
    case = moe_tools.golden("lora")
    model = moe_tools.base()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fastlora.load_adapter(model, moe_tools.write(case, tmp_path, pickled=True))
    close(_logits(model), case.tensors["logits"], **OUTPUT)


@pytest.mark.parametrize("twice", [False, True], ids=["plain model", "over the adapter"])
def test_dora_magnitudes_that_moe_peft_lost_are_the_norms_and_a_warning(twice, tmp_path):
    """What moe-peft sets on loading, g = 1: the function of plain LoRA with the same A and B."""
    case = moe_tools.golden("dora")
    folder = moe_tools.write(case, tmp_path / "dora", pickled=True)
    plain = moe_tools.write(case, tmp_path / "lora", pickled=True, use_dora=False)
    model = moe_tools.base(bias=False)
    if twice:
        fastlora.load_adapter(model, moe_tools.write(case, tmp_path / "whole"))
        close(_logits(model), case.tensors["logits"], **OUTPUT)
    with pytest.warns(UserWarning, match="holds no magnitudes"):
        fastlora.load_adapter(model, folder)
    close(_logits(model), _logits(fastlora.load_adapter(moe_tools.base(bias=False), plain)), **OUTPUT)
    for name, layer in model.named_modules():
        if isinstance(layer, fastlora.LoraLinear):
            delta = layer.lora_B["default"] @ layer.lora_A["default"] * layer.scaling["default"]
            close(layer.lora_magnitude["default"], (layer.weight + delta).norm(dim=1), 1e-6, 1e-6, name)


def test_dora_without_magnitudes_is_refused_where_they_are_saved(tmp_path):
    """A safetensors folder comes from a library that saves them: a missing one is damage."""
    case = moe_tools.golden("dora")
    bare = {name: tensor for name, tensor in case.tensors.items() if "magnitude" not in name}
    model = moe_tools.base(bias=False)
    with unchanged(model), pytest.raises(StateDictError, match="magnitude is missing"):
        fastlora.load_adapter(model, moe_tools.write(case._replace(tensors=bare), tmp_path))


def test_targets_and_init_in_moe_pefts_words(tmp_path):
    case = moe_tools.golden("lora")
    targets = dict.fromkeys(case.config["target_modules"], True) | {"dense": False}
    folder = moe_tools.write(case, tmp_path, target_modules=targets, lora_init="original")
    model = fastlora.load_adapter(moe_tools.base(), folder)
    close(_logits(model), case.tensors["logits"], **OUTPUT)


# --- keys, pure -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MIXTURES)
def test_keys_round_trip(name):
    state = moe_tools.golden(name).part("adapter")
    back = moe_peft.to_state(moe_peft.from_state(state))
    assert back.keys() == state.keys()
    assert all(torch.equal(back[key], tensor) for key, tensor in state.items())


def _old_words(state):
    """A MixLoRA checkpoint as mLoRA wrote it."""
    names = {"gate_proj": "w1_proj", "down_proj": "w2_proj", "up_proj": "w3_proj"}
    made = {}
    for key, tensor in state.items():
        parts = key.split(".")
        if "moe_gate" in parts:
            key = ".".join([*parts[:3], "gate", "weight"])
        elif "experts" in parts:
            key = ".".join([*parts[:3], "experts", parts[6], names[parts[4]], *parts[7:]])
        made[key] = tensor
    return made


def test_older_mixlora_keys_are_read():
    state = moe_tools.golden("mixlora").part("adapter")
    old = _old_words(state)
    assert "mixlora.layers.1.gate.weight" in old
    assert "mixlora.layers.0.experts.3.w2_proj.lora_A.weight" in old
    back = moe_peft.to_state(moe_peft.from_state(old))
    assert back.keys() == state.keys()
    assert all(torch.equal(back[key], tensor) for key, tensor in state.items())


GATE, EXPERT = "mixlora.layers.1.mlp.moe_gate.weight", "mixlora.layers.0.mlp.up_proj.experts"
BAD_STATES = {
    "a missing gate": (lambda s: s.pop(GATE), "the gate of layers.1.mlp is missing"),
    "a missing expert": (
        lambda s: [s.pop(f"{EXPERT}.1.lora_{x}.weight") for x in "AB"],
        "expert 1 of layers.0.mlp.up_proj is missing",
    ),
    "the last expert missing": (
        lambda s: [s.pop(f"{EXPERT}.3.lora_{x}.weight") for x in "AB"],
        "layers.0.mlp.up_proj: expected the 4 experts",
    ),
    "half an expert": (lambda s: s.pop(f"{EXPERT}.2.lora_B.weight"), "up_proj.experts.2 is incomplete: lora_B"),
    "no expert": (
        lambda s: [s.pop(key) for key in list(s) if ".0.mlp." in key and "expert" in key],
        "layers.0.mlp has a gate and no experts",
    ),
    "an expert of another rank": (
        lambda s: s.update(
            {f"{EXPERT}.2.lora_A.weight": torch.ones(5, 16), f"{EXPERT}.2.lora_B.weight": torch.ones(20, 5)}
        ),
        "the experts of layers.0.mlp.up_proj differ",
    ),
    "magnitudes of some": (
        lambda s: s.update({f"{EXPERT}.2.lora_magnitude_vector": torch.ones(20)}),
        "only some have magnitudes",
    ),
    "A and B apart": (
        lambda s: s.update({f"{EXPERT}.2.lora_A.weight": torch.ones(5, 16)}),
        r"experts.2: expected lora_A \[r, in\]",
    ),
    "integers": (lambda s: s.update({GATE: torch.ones(4, 16, dtype=torch.int64)}), "floating-point"),
    "a gate of one dimension": (lambda s: s.update({GATE: torch.ones(16)}), r"expected a gate \[E, in\]"),
    "a foreign key": (lambda s: s.update({"model.norm.weight": torch.ones(16)}), "is no key of MixLoRA"),
    "a classification head": (lambda s: s.update({"classifier": torch.ones(2, 16)}), "'classifier' is no key"),
    "two methods": (lambda s: s.update({"mola.layers.0.mlp.up_proj.moe_gate.weight": torch.ones(4, 16)}), "one method"),
    "an unknown part": (lambda s: s.update({f"{EXPERT}.0.lora_C.weight": torch.ones(3)}), "cannot read"),
    "nothing": (lambda s: s.clear(), "got none"),
}


@pytest.mark.parametrize(("damage", "message"), BAD_STATES.values(), ids=BAD_STATES)
def test_damaged_keys_are_one_clear_error(damage, message):
    state = moe_tools.golden("mixlora").part("adapter")
    damage(state)
    with pytest.raises(StateDictError, match=message):
        moe_peft.from_state(state)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        ("[]", "expected an object"),
        ('{"peft_type": "LOHA"}', "expected peft_type MIXLORA"),
        ('{"peft_type": "LORA", "num_experts": 4}', "expected peft_type MIXLORA"),
        ('{"routing_strategy": "soft"}', "routing_strategy"),
        ('{"peft_type": "MOLA", "routing_strategy": "mixlora"}', "none of MOLA's"),
    ],
)
def test_configs_of_no_method(text, message):
    with pytest.raises(StateDictError, match=message):
        moe_peft.fields_from_json(text)


def test_the_method_comes_from_the_type_or_the_strategy():
    fields = moe_peft.fields_from_json(
        '{"routing_strategy": "mixtral", "target_modules": {"w1_proj": true, "q": false}}'
    )
    assert (fields["peft_type"], fields["routing_strategy"]) == ("MIXLORA", "mixlora")
    assert fields["target_modules"] == ["gate_proj"]
    assert moe_peft.fields_from_json('{"routing_strategy": "loramoe"}')["peft_type"] == "LORAMOE"


# --- whole models -----------------------------------------------------------------------------------------------------


def _loaded(name, folder, **changes):
    case = moe_tools.golden(name)
    model = moe_tools.base(moe_tools.bias_of(case))
    return moe.load_adapter(model, moe_tools.write(case, folder, **changes)), case


@pytest.mark.parametrize("name", MIXTURES)
def test_save_load_gives_the_same_model_and_the_same_files(name, tmp_path):
    model, case = _loaded(name, tmp_path / "theirs")
    folder = moe.save_adapter(model, tmp_path / "ours")
    assert sorted(path.name for path in folder.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    saved = load_file(folder / "adapter_model.safetensors")
    state = case.part("adapter")
    assert saved.keys() == state.keys()
    assert all(torch.equal(saved[key], tensor) for key, tensor in state.items())
    again = moe.load_adapter(moe_tools.base(moe_tools.bias_of(case)), folder)
    assert torch.equal(_logits(again), _logits(model))
    assert moe.save_adapter(again, tmp_path / "twice") == tmp_path / "twice"
    for file in folder.iterdir():
        assert file.read_bytes() == (tmp_path / "twice" / file.name).read_bytes()


@pytest.mark.parametrize("name", [name for name in MIXTURES if name not in ("mixlora_dora", "mixlora_dynamic_own")])
def test_moe_pefts_own_folder_loads(name, tmp_path):
    """The pickle and the config that it leaves: without what its export forgets, the function is the same."""
    case = moe_tools.golden(name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = moe.load_adapter(moe_tools.base(), moe_tools.write(case, tmp_path, pickled=True))
    close(_logits(model.train()), _logits(_loaded(name, tmp_path / "whole")[0]), **OUTPUT)


def test_moe_pefts_dora_experts_get_their_norms_and_a_warning(tmp_path):
    case = moe_tools.golden("mixlora_dora")
    model = moe_tools.base(bias=False)
    with pytest.warns(UserWarning, match="holds no magnitudes"):
        moe.load_adapter(model, moe_tools.write(case, tmp_path, pickled=True))
    part = model.model.layers[1].mlp.up_proj
    for expert in range(4):
        merged = part.weight + part.scaling * part.lora_B[expert] @ part.lora_A[expert]
        close(part.lora_magnitude[expert], merged.norm(dim=1), 1e-6, 1e-6)


def test_older_mixlora_folders_load(tmp_path):
    case = moe_tools.golden("mixlora")
    old = {f"adapter.{key}": tensor for key, tensor in _old_words(case.part("adapter")).items()}
    targets = {"q_proj": True, "k_proj": True, "v_proj": True, "o_proj": True}
    targets |= {"w1_proj": True, "w2_proj": True, "w3_proj": True}
    folder = moe_tools.write(
        case._replace(tensors=old), tmp_path, pickled=True, routing_strategy="mixtral", target_modules=targets
    )
    model = moe.load_adapter(moe_tools.base(), folder)
    close(_logits(model), _logits(_loaded("mixlora", tmp_path / "new")[0]), **OUTPUT)


PEER = Path(__file__).resolve().parent.parent / "build" / "moe-venv" / "bin" / "python"


@pytest.mark.slow
@pytest.mark.skipif(not PEER.is_file(), reason="moe-peft's environment is not set up")
@pytest.mark.parametrize("name", MIXTURES)
def test_moe_peft_opens_what_is_saved_here(name, tmp_path):
    """Its own loader of configs and tensors; magnitudes, for which it has no key, are put in beside it."""
    folder = moe.save_adapter(_loaded(name, tmp_path / "in")[0], tmp_path / "out")
    command = [str(PEER), "-m", "benchmarks.moe_goldens", str(moe_tools.DATA), "--read", str(folder), name]
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert float(done.stdout) < 2e-6


FORGOTTEN = {
    "mixlora": {"lora_init": "gaussian", "router_init_range": 0.5, "router_aux_loss_coef": 0.3, "router_loss": False},
    "mixlora_switch": {"router_z_loss_coef": 0.2, "ffn_dropout": 0.1, "jitter_noise": 0.05},
    "loramoe": {"blc_alpha": 0.2, "blc_weight": 0.3, "router_init_range": 2.0},
    "mola": {"router_aux_loss_coef": 0.3, "router_loss": True, "init_seed": 11},
}


@pytest.mark.parametrize(("name", "fields"), FORGOTTEN.items(), ids=FORGOTTEN)
def test_what_moe_pefts_export_forgets_is_saved(name, fields, tmp_path):
    model, _ = _loaded(name, tmp_path / "in", **fields)
    written = json.loads((moe.save_adapter(model, tmp_path / "out") / "adapter_config.json").read_text())
    assert {key: written[key] for key in fields} == fields
    back = moe.load_adapter(moe_tools.base(), tmp_path / "out")
    config = next(iter(moe.moe_modules(back).values())).model_config
    assert {key: getattr(config, key) for key in fields} == fields


def test_a_converted_models_init_and_seed_are_saved(tmp_path):
    model = moe.convert(
        moe_tools.base(), {"peft_type": "MOLA", "num_experts": 3, "r": 2, "init_seed": 5}, progress=False
    )
    fields = json.loads((moe.save_adapter(model, tmp_path) / "adapter_config.json").read_text())
    assert (fields["init_seed"], fields["lora_init"]) == (5, "original")
    assert torch.equal(_logits(moe.load_adapter(moe_tools.base(), tmp_path)), _logits(model))


def test_lists_for_each_layer_round_trip(tmp_path):
    fields = {"peft_type": "MOLA", "num_experts": [2, 4], "top_k": [1, 3], "r": [2, 3]}
    model = moe.convert(moe_tools.base(), fields, progress=False)
    move(model)
    written = json.loads((moe.save_adapter(model, tmp_path) / "adapter_config.json").read_text())
    assert [written[key] for key in ("num_experts", "top_k", "r")] == [[2, 4], [1, 3], [2, 3]]
    assert torch.equal(_logits(moe.load_adapter(moe_tools.base(), tmp_path)), _logits(model))


def test_into_a_model_that_has_it_the_parameters_stay_the_same_objects(tmp_path):
    model, _ = _loaded("mixlora", tmp_path / "in")
    want = _logits(model)
    before = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    folder = moe.save_adapter(model, tmp_path / "out")
    move(model)
    assert (_logits(model) - want).abs().max() > 0.01
    moe.load_adapter(model, folder)
    assert torch.equal(_logits(model), want)
    after = dict(model.named_parameters())
    assert all(after[name] is parameter for name, parameter in before.items())


def test_another_adapter_name_has_a_folder_of_its_own(tmp_path):
    case = moe_tools.golden("mixlora")
    model = moe_tools.base()
    moe.load_adapter(model, moe_tools.write(case, tmp_path / "one"), adapter_name="one")
    assert list(model.model.layers[0].self_attn.q_proj.lora_A) == ["one"]
    folder = moe.save_adapter(model, tmp_path / "out", "one")
    assert folder == tmp_path / "out" / "one"
    again = moe.load_adapter(moe_tools.base(), tmp_path / "out", "one")
    assert torch.equal(_logits(again), _logits(model))


def test_nf4_base(tmp_path):
    fields = {"peft_type": "MIXLORA", "num_experts": 3, "r": 2, "init_seed": 5}
    model = moe.convert(moe_tools.base(), fields, quantize="nf4", blocksize=32, progress=False)
    move(model)
    moe.save_adapter(model, tmp_path)
    again = moe.convert(moe_tools.base(), fields, quantize="nf4", blocksize=32, progress=False)
    moe.load_adapter(again, tmp_path)
    assert torch.equal(_logits(again), _logits(model))


BAD_FOLDERS = {
    "more experts": ({"num_experts": 5}, StateDictError, r"gate: expected \[5, 16\], the checkpoint has \[4, 16\]"),
    "another rank": ({"r": 4}, StateDictError, r"lora_A: expected \[4, 4, 16\]"),
    "magnitudes wanted": ({"use_dora": True}, StateDictError, "the magnitudes are missing"),
    "top_k above the experts": ({"top_k": 9}, ConfigError, "top_k"),
    "top_p outside": ({"routing_strategy": "mixlora-dynamic", "top_p": 1.5}, ConfigError, "top_p"),
    "no room": ({"routing_strategy": "mixlora-switch", "expert_capacity": 0}, ConfigError, "expert_capacity"),
    "an unknown strategy": ({"routing_strategy": "mixlora-soft"}, StateDictError, "mixlora-soft"),
    "an unknown field": ({"use_magic": True}, ConfigError, "use_magic"),
    "no experts given": ({"num_experts": None}, ConfigError, "num_experts"),
    "a bias": ({"bias": "all"}, ConfigError, "bias"),
}
BAD_TENSORS = {
    "the MLP of another width": (
        lambda s: s.update({f"{EXPERT}.{e}.lora_B.weight": torch.ones(21, 3) for e in range(4)}),
        r"up_proj.lora_B: expected \[4, 20, 3\]",
    ),
    "a layer too many": (
        lambda s: s.update({key.replace("layers.1", "layers.2"): s[key].clone() for key in list(s)}),
        "layers.2.mlp, where this model has none",
    ),
    "a layer missing": (
        lambda s: [s.pop(key) for key in list(s) if "layers.1" in key],
        "no gate for layers.1.mlp",
    ),
    "an attention adapter missing": (
        lambda s: [s.pop(f"mixlora.layers.0.self_attn.q_proj.lora_{x}.weight") for x in "AB"],
        "no plain adapter for layers.0.self_attn.q_proj",
    ),
    "an attention adapter of another width": (
        lambda s: s.update({"mixlora.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(3, 99)}),
        "q_proj: expected an adapter for",
    ),
    "experts of one projection missing": (
        lambda s: [s.pop(key) for key in list(s) if key.startswith(EXPERT)],
        "no experts for layers.0.mlp.up_proj",
    ),
}


@pytest.mark.parametrize("into", ["plain", "converted"])
@pytest.mark.parametrize(("changes", "error", "message"), BAD_FOLDERS.values(), ids=BAD_FOLDERS)
def test_a_config_that_does_not_fit_changes_nothing(changes, error, message, into, tmp_path):
    model = _loaded("mixlora", tmp_path / "good")[0] if into == "converted" else moe_tools.base()
    folder = moe_tools.write(moe_tools.golden("mixlora"), tmp_path / "bad", **changes)
    with unchanged(model), pytest.raises(error if into == "plain" else FastloraError) as caught:
        moe.load_adapter(model, folder)
    if into == "plain":
        caught.match(message)
    _logits(model)


@pytest.mark.parametrize("into", ["plain", "converted"])
@pytest.mark.parametrize(("damage", "message"), BAD_TENSORS.values(), ids=BAD_TENSORS)
def test_tensors_that_do_not_fit_change_nothing(damage, message, into, tmp_path):
    model = _loaded("mixlora", tmp_path / "good")[0] if into == "converted" else moe_tools.base()
    case = moe_tools.golden("mixlora")
    state = case.part("adapter")
    damage(state)
    bad = case._replace(tensors={f"adapter.{key}": tensor for key, tensor in state.items()})
    with unchanged(model), pytest.raises(StateDictError, match=message):
        moe.load_adapter(model, moe_tools.write(bad, tmp_path / "bad"))
    assert bool(moe.moe_modules(model)) == (into == "converted")
    _logits(model)


def test_config_and_tensors_of_two_methods_or_two_sets_of_modules(tmp_path):
    case, model = moe_tools.golden("mixlora"), moe_tools.base()
    other = moe_tools.write(case._replace(config=moe_tools.golden("mola").config), tmp_path / "mola")
    fewer = moe_tools.write(case, tmp_path / "fewer", target_modules=["gate_proj", "up_proj"])
    with unchanged(model):
        with pytest.raises(StateDictError, match="is of mola, the tensors of mixlora"):
            moe.load_adapter(model, other)
        with pytest.raises(StateDictError, match=r"down_proj, where this model has none"):
            moe.load_adapter(model, fewer)


def test_another_method_or_function_does_not_go_over_a_mixture(tmp_path):
    model, _ = _loaded("mixlora", tmp_path / "mixlora")
    others = [
        (moe_tools.write(moe_tools.golden("loramoe"), tmp_path / "a"), "the model has mixlora, the checkpoint loramoe"),
        (moe_tools.write(moe_tools.golden("mixlora"), tmp_path / "b", top_k=1), "top_k=2, the checkpoint has 1"),
        (moe_tools.write(moe_tools.golden("mixlora"), tmp_path / "c", lora_alpha=9), "lora_alpha=5"),
        (moe_tools.write(moe_tools.golden("mixlora_switch"), tmp_path / "d"), "routing_strategy='mixlora'"),
    ]
    for folder, message in others:
        with unchanged(model), pytest.raises(ConfigError, match=message):
            moe.load_adapter(model, folder)
    # What only training looks at may differ.
    folder = moe_tools.write(moe_tools.golden("mixlora"), tmp_path / "e", router_aux_loss_coef=1.0, top_p=0.5)
    moe.load_adapter(model, folder)


def test_each_library_half_names_the_other(tmp_path):
    """The plain functions do not write or read half a mixture in silence, nor these a plain adapter."""
    model, _ = _loaded("loramoe", tmp_path / "in")
    with pytest.raises(ConfigError, match=r"fastlora\.moe\.save_adapter"):
        fastlora.save_adapter(model, tmp_path / "out")
    with pytest.raises(StateDictError, match=r"fastlora\.moe\.load_adapter"):
        fastlora.load_adapter(moe_tools.base(), tmp_path / "in")
    with pytest.raises(ConfigError, match="no mixture"):
        moe.save_adapter(moe_tools.base(), tmp_path / "out")
    with pytest.raises(StateDictError, match="MIXLORA"):
        moe.load_adapter(moe_tools.base(), moe_tools.write(moe_tools.golden("lora"), tmp_path / "plain"))
    assert not (tmp_path / "out").exists()


def test_a_failed_save_leaves_the_old_files(tmp_path, monkeypatch):
    model, _ = _loaded("mixlora", tmp_path / "in")
    folder = moe.save_adapter(model, tmp_path / "out")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    move(model)

    def full(*_arguments, **_keywords):
        raise OSError("no space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(OSError, match="no space"):
        moe.save_adapter(model, folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_adapters_beside_the_experts_must_be_what_the_config_says(tmp_path):
    model, _ = _loaded("mixlora", tmp_path / "in")
    layer = model.model.layers[0].self_attn.q_proj
    layer.delete_adapter("default")
    layer.add_adapter("default", fastlora.LoraConfig(r=7))
    with pytest.raises(ConfigError, match=r"q_proj has r=7, the mixture 3"):
        moe.save_adapter(model, tmp_path / "out")


def test_a_pickle_of_experts_never_runs_code(tmp_path):
    case = moe_tools.golden("mixlora")
    folder = moe_tools.write(case, tmp_path / "in", pickled=True)

    class Bomb:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "exploded"),))

    torch.save({"mixlora.layers.0.mlp.moe_gate.weight": Bomb()}, folder / "adapter_model.bin")
    model = moe_tools.base()
    with unchanged(model), pytest.raises(StateDictError, match="nothing else"):
        moe.load_adapter(model, folder)
    assert not (tmp_path / "exploded").exists()


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="torch has no gloo here")
def test_a_mixture_cut_over_processes_saves_and_loads_whole(tmp_path):
    """FSDP2: all gather, the first process writes; every process fills its own part."""
    case = moe_tools.golden("mixlora_dora")
    moe_tools.write(case, tmp_path / "in")
    found = run_world(2, tmp_path, moe_workers.save_and_load, str(tmp_path))
    saved, state = load_file(tmp_path / "out" / "adapter_model.safetensors"), case.part("adapter")
    assert saved.keys() == state.keys()
    assert all(torch.equal(saved[key], tensor) for key, tensor in state.items())
    alone = moe.load_adapter(moe_tools.base(bias=False), tmp_path / "in")
    for name, parameter in alone.named_parameters():
        if parameter.requires_grad:
            assert all(torch.equal(each[name], parameter) for each in found), name
