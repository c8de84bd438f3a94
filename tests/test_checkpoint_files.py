"""What save_adapter writes into its two files, and what does not change it."""

from __future__ import annotations

import contextlib
import json

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
from fastlora import ConfigError
from fastlora.io import peft as peft_format
from tests import checkpoint_tools
from tests.checkpoint_tools import (
    ALL,
    CASES,
    CONFIG,
    WEIGHTS,
    converted,
    metadata,
    peft_loads,
    peft_saves,
    same_tensors,
    tensors,
)
from tests.model_tools import LINEARS, PREFIX, close, layers_of, llama, logits, move, unchanged

base_logits = checkpoint_tools.base_logits
targets = checkpoint_tools.targets


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
