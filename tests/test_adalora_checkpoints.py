"""AdaLoRA adapters on disk, both ways: PEFT reads what we save, we read what PEFT saves, pruned or not."""

from __future__ import annotations

import copy
import dataclasses
import json

import peft
import pytest
import torch

import fastlora
from fastlora import ConfigError, StateDictError
from fastlora.adalora import AdaLoraConfig, RankAllocator, rank_pattern
from fastlora.io.peft import ADALORA_FIELDS
from tests.adalora_tools import SCHEDULE, fields, move_adapter, ours, peft_opens, random_gradients, tensors_of, theirs
from tests.checkpoint_tools import CONFIG, WEIGHTS, edit, edit_config, metadata, same_tensors, tensors
from tests.model_tools import PREFIX, close, layers_of, llama, logits, unchanged, undo_quantization

CASES = {
    "plain": {},
    "alpha not positive": {"lora_alpha": 0},
    "dropout": {"lora_dropout": 0.3},
    "bias": {"bias": "lora_only"},
    "a saved head": {"modules_to_save": ["lm_head"]},
    "other schedule": {"beta1": 0.7, "beta2": 0.6, "orth_reg_weight": 0.1, "deltaT": 2, "target_r": 2, "init_r": 5},
}
EVERY_CASE = pytest.mark.parametrize("changes", CASES.values(), ids=CASES)
PRUNED = pytest.mark.parametrize("pruned", [False, True], ids=["whole", "pruned"])
Q0 = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def base_logits():
    return logits(llama())


def allocated(model, steps=50, keep_rank_zero=True, **changes):
    """Our model after an allocation by random gradients; one layer loses every rank."""
    allocator = RankAllocator(model, AdaLoraConfig(**fields(**changes)))
    for step in range(1, steps + 1):
        gradients = random_gradients(tensors_of(model), step, spread=0.5)
        for name, tensor in tensors_of(model).items():
            tensor.grad = gradients[name] * (0.0 if keep_rank_zero and name.startswith(Q0) else 1.0)
        allocator.step(step)
    for tensor in tensors_of(model).values():
        tensor.grad = None
    return model


def allocated_by_peft(model, steps=50):
    """The same by PEFT's allocator."""
    for step in range(1, steps + 1):
        gradients = random_gradients(tensors_of(model), step, spread=0.5)
        for name, tensor in tensors_of(model).items():
            tensor.grad = gradients[name] * (0.0 if name.startswith(Q0) else 1.0)
        model.base_model.update_and_allocate(step)
    model.zero_grad()
    return model


def peft_saved(folder, pruned, model=None, **changes):
    made = move_adapter(theirs(model, **changes)).eval()
    if pruned:
        allocated_by_peft(made)
    made.save_pretrained(str(folder))
    return made


# --- PEFT reads what we save ------------------------------------------------------------------------------------------


@PRUNED
@EVERY_CASE
def test_peft_loads_our_folder_and_predicts_the_same(changes, pruned, tmp_path, base_logits):
    model = move_adapter(ours(**changes))
    if pruned:
        allocated(model, **changes)
    want = logits(model)
    fastlora.save_adapter(model, tmp_path)
    twin = peft_opens(tmp_path)
    close(logits(twin), want, base_logits)
    saved = tensors(tmp_path)
    same_tensors(peft.get_peft_model_state_dict(twin), saved)
    config = twin.peft_config["default"]
    for name, value in {**fields(), **changes}.items():
        if name == "lora_alpha" and value <= 0 and pruned:
            value = 6  # init_r, which it stands for: PEFT would put the pruned rank in its place
        if name not in ("target_modules", "modules_to_save"):
            assert getattr(config, name) == value, name
    ranks = {saved[f"{PREFIX}{name}.lora_A"].shape[0] for name in layers_of(model)}
    if pruned:
        assert ranks > {0}, "no layer without ranks, or all: the test shows less than it should"
        assert config.rank_pattern == rank_pattern(model)
    else:
        assert ranks == {model_r(changes)}
        assert config.rank_pattern is None


def model_r(changes):
    return {**SCHEDULE, **changes}["init_r"]


@PRUNED
@EVERY_CASE
def test_our_keys_and_shapes_are_those_peft_saves(changes, pruned, tmp_path):
    one, two = tmp_path / "theirs", tmp_path / "ours"
    peft_saved(one, pruned, **changes)
    model = move_adapter(ours(**changes))
    if pruned:
        allocated(model, **changes)
    fastlora.save_adapter(model, two)
    want, got = tensors(one), tensors(two)
    assert {key: t.dtype for key, t in got.items()} == {key: t.dtype for key, t in want.items()}
    assert {key: t.shape for key, t in got.items()} == {key: t.shape for key, t in want.items()}
    assert metadata(two)["format"] == "pt"
    written, known = json.loads((two / CONFIG).read_text()), json.loads((one / CONFIG).read_text())
    assert set(written) <= {field.name for field in dataclasses.fields(peft.AdaLoraConfig)}
    assert written["peft_type"] == "ADALORA"
    assert written["rank_pattern"] == known["rank_pattern"]


# --- we read what PEFT saves ------------------------------------------------------------------------------------------


@PRUNED
@EVERY_CASE
def test_we_load_pefts_folder_into_a_plain_model(changes, pruned, tmp_path, base_logits):
    want = logits(peft_saved(tmp_path, pruned, **changes))
    model = llama()
    fastlora.load_adapter(model, tmp_path)
    close(logits(model), want, base_logits)
    found = layers_of(model)
    # Pruned layers hold what is left, at the scale of before.
    assert all(len(layer.lora_E["default"]) == layer.adapter_configs["default"].r for layer in found.values())
    assert len({layer.scaling["default"] for layer in found.values()}) == 1
    if pruned:
        assert len(found[Q0].lora_E["default"]) == 0
    again = tmp_path / "again"
    fastlora.save_adapter(model, again)
    same_tensors(tensors(again), tensors(tmp_path))
    before, after = (json.loads((folder / CONFIG).read_text()) for folder in (tmp_path, again))
    same = [*SCHEDULE, "rank_pattern", "orth_reg_weight", *(["lora_alpha"] if before["lora_alpha"] > 0 else [])]
    assert {key: before[key] for key in same} == {key: after[key] for key in same}


@PRUNED
@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_we_load_pefts_folder_into_a_converted_model(quantize, pruned, tmp_path, base_logits):
    peft_saved(tmp_path, pruned)
    model = move_adapter(ours(quantize=quantize), seed=8)
    masks = json.loads((tmp_path / CONFIG).read_text())["rank_pattern"] or {}
    gaps = [mask for mask in masks.values() if mask != sorted(mask, reverse=True)]
    assert gaps or not pruned, "the kept triplets all come first: their places would not show"
    kept = {name: id(tensor) for name, tensor in tensors_of(model).items()}
    fastlora.load_adapter(model, tmp_path)
    twin = peft_opens(tmp_path, undo_quantization(llama(), model))
    close(logits(model), logits(twin), base_logits)
    assert {name: id(tensor) for name, tensor in tensors_of(model).items()} == kept  # an optimizer may hold them
    assert all(len(layer.lora_E["default"]) == 6 for layer in layers_of(model).values())
    again = tmp_path / "again"
    fastlora.save_adapter(model, again)
    same_tensors(tensors(again), tensors(tmp_path))


@PRUNED
def test_a_second_adapter_loads_beside_a_lora(pruned, tmp_path, base_logits):
    twin_logits = logits(peft_saved(tmp_path, pruned))
    model = fastlora.convert(llama(), r=3, target_modules=["q_proj", "down_proj", "k_proj"], quantize=None)
    with torch.no_grad():
        for layer in layers_of(model).values():
            layer.lora_B["default"].normal_()
    first = logits(model)
    fastlora.load_adapter(model, tmp_path, "ada")
    close(logits(model), twin_logits, base_logits)
    fastlora.set_adapter(model, "default")
    assert torch.equal(logits(model), first)
    fastlora.set_adapter(model, "ada")
    fastlora.load_adapter(model, tmp_path, "ada")  # over itself, pruned over pruned
    close(logits(model), twin_logits, base_logits)


def test_pefts_save_in_the_middle_drops_what_has_come_back_and_ours_does_not(tmp_path, base_logits):
    """Between two allocations the optimizer moves pruned E off zero; PEFT's file is then not its model."""
    model = allocated(move_adapter(ours()), steps=33)
    name = next(name for name, kept in rank_pattern(model).items() if not all(kept))
    row = rank_pattern(model)[name].index(False)
    with torch.no_grad():
        tensors_of(model)[name][row] = 5.0
    fastlora.save_adapter(model, tmp_path)
    assert json.loads((tmp_path / CONFIG).read_text())["rank_pattern"][name][row] is True
    close(logits(peft_opens(tmp_path)), logits(model), base_logits)


def test_saving_leaves_the_model_alone_and_the_run_can_go_on(tmp_path):
    model = allocated(move_adapter(ours()), steps=30)
    with unchanged(model):
        fastlora.save_adapter(model, tmp_path)
    assert all(len(layer.lora_E["default"]) == 6 for layer in layers_of(model).values())


def test_the_init_and_its_seed_travel(tmp_path):
    model = ours(init_bound=0.03)
    fastlora.save_adapter(model, tmp_path)
    again = fastlora.load_adapter(llama(), tmp_path)
    config = layers_of(again)[Q0].adapter_configs["default"]
    assert (config.init_lora_weights, config.init_bound) == (True, 0.03)
    assert config.init_seed == layers_of(model)[Q0].adapter_configs["default"].init_seed


# --- bad folders ------------------------------------------------------------------------------------------------------


def _change(name, change):
    def apply(folder):
        edit(folder, lambda state: state.update({f"{PREFIX}{name}": change(state[f"{PREFIX}{name}"])}))

    return apply


def _pattern(change):
    def apply(folder):
        pattern = json.loads((folder / CONFIG).read_text())["rank_pattern"]
        edit_config(folder, rank_pattern=change(copy.deepcopy(pattern)))

    return apply


K1 = "model.layers.1.self_attn.k_proj"
BAD = {
    "no E": (lambda f: edit(f, lambda s: s.pop(f"{PREFIX}{K1}.lora_E")), StateDictError, "lora_E is missing"),
    "no A": (lambda f: edit(f, lambda s: s.pop(f"{PREFIX}{K1}.lora_A")), StateDictError, "lora_A is missing"),
    "flat E": (_change(f"{K1}.lora_E", lambda e: e[:, 0].clone()), StateDictError, r"lora_E \[\d, 1\], got \(\d,\)"),
    "integer E": (_change(f"{K1}.lora_E", lambda e: e.int()), StateDictError, "floating-point"),
    "both kinds": (
        lambda f: edit(f, lambda s: s.update({f"{PREFIX}{K1}.lora_A.weight": torch.zeros(2, 2)})),
        StateDictError,
        "both LoRA and AdaLoRA",
    ),
    "mask too short": (_pattern(lambda p: {**p, f"{K1}.lora_E": [True] * 3}), StateDictError, "keeps 3 of 3 ranks"),
    "mask of another rank": (
        _pattern(lambda p: {**p, f"{K1}.lora_E": [False] * 6}),
        StateDictError,
        r"rank_pattern of .*k_proj keeps 0 of 6 ranks; expected [1-6] of init_r=6",
    ),
    "mask of numbers": (_pattern(lambda p: {**p, f"{K1}.lora_E": [1] * 6}), StateDictError, "to booleans"),
    "mask of nothing": (_pattern(lambda p: {**p, "nowhere.lora_E": [True] * 6}), StateDictError, "nowhere"),
    "mask missing": (
        _pattern(lambda p: {name: mask for name, mask in p.items() if K1 not in name}),
        StateDictError,
        "entry missing",
    ),
    "pattern of another name": (_pattern(lambda p: {**p, K1: [True] * 6}), StateDictError, "lora_E"),
    "a list": (_pattern(lambda p: [True]), StateDictError, "map modules to booleans"),
    "no pattern": (_pattern(lambda p: None), StateDictError, "expected rank 6 from"),
    "init_r": (lambda f: edit_config(f, init_r=7), StateDictError, "init_r=7"),
    "LoRA by name": (lambda f: edit_config(f, peft_type="LORA", rank_pattern=None), ConfigError, "beta1"),
    "LoRA": (
        lambda f: edit_config(
            f, **{"peft_type": "LORA", "r": 6, "rank_pattern": None, **dict.fromkeys(ADALORA_FIELDS)}
        ),
        StateDictError,
        "lora_E is present|expected rank",
    ),
    "another method": (lambda f: edit_config(f, peft_type="LOHA"), StateDictError, '"LORA" or "ADALORA".*LOHA'),
    "DoRA": (lambda f: edit_config(f, use_dora=True), ConfigError, "use_dora"),
    "schedule": (lambda f: edit_config(f, tinit=45), ConfigError, "total_step"),
    "no total_step": (lambda f: edit_config(f, total_step=None), ConfigError, "total_step .* not given"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_folder_changes_nothing(case, tmp_path, targets):
    peft_saved(tmp_path, pruned=True)
    spoil, error, words = BAD[case]
    spoil(tmp_path)
    for model in targets:
        with unchanged(model), pytest.raises(error, match=words):
            fastlora.load_adapter(model, tmp_path)


@pytest.fixture(scope="module")
def targets():
    return [llama(), move_adapter(ours()), move_adapter(ours(quantize="nf4"))]


def test_an_adapter_of_another_kind_in_the_place_is_refused(tmp_path):
    peft_saved(tmp_path, pruned=True)
    lora = fastlora.convert(llama(), r=6, target_modules=fields()["target_modules"], quantize=None)
    other = ours(init_r=7)
    for model, words in [
        (lora, "r=6, use_dora=False; the checkpoint has r=. of init_r=6, AdaLoRA"),
        (other, "init_r=7"),
    ]:
        with unchanged(model), pytest.raises(ConfigError, match=words):
            fastlora.load_adapter(model, tmp_path)
    fastlora.save_adapter(lora, tmp_path / "lora")
    model = ours()
    with unchanged(model), pytest.raises(ConfigError, match="r=6 of init_r=6, AdaLoRA; the checkpoint has r=6"):
        fastlora.load_adapter(model, tmp_path / "lora")


def test_one_name_for_two_methods_is_not_saved(tmp_path):
    model = ours()
    layer = layers_of(model)[K1]
    layer.delete_adapter("default")
    layer.add_adapter("default", r=6)
    with pytest.raises(ConfigError, match="LoRA in some layers and AdaLoRA in others"):
        fastlora.save_adapter(model, tmp_path / "x")
    layer.delete_adapter("default")
    layer.add_adapter("default", AdaLoraConfig(**fields(lora_alpha=3)))
    with pytest.raises(ConfigError, match="different lora_alpha"):
        fastlora.save_adapter(model, tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_a_pruned_adapter_is_not_allocated_again(tmp_path):
    peft_saved(tmp_path, pruned=True)
    model = fastlora.load_adapter(llama(), tmp_path)
    with pytest.raises(ConfigError, match="was loaded with 0 of 6 ranks: its allocation is over"):
        RankAllocator(model, AdaLoraConfig(**fields()))
    assert WEIGHTS in {path.name for path in tmp_path.iterdir()}
