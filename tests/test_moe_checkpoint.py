"""MoE-PEFT's folders: read as it writes them, written so that nothing is lost, all or nothing."""

from __future__ import annotations

import warnings

import pytest
import torch

import fastlora
from fastlora import StateDictError
from fastlora.io import moe_peft
from tests import moe_tools
from tests.model_tools import unchanged
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
