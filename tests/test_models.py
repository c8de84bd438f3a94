"""A whole model: merge and unmerge, adapters added and switched, plain again, counted and grouped for an optimizer."""

from __future__ import annotations

import copy
import itertools
import pickle

import peft
import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM

import fastlora
from fastlora import ConfigError, DtypeError, FastloraError, LoraLinear, QLoraLinear, ShapeError
from tests.model_tools import LINEARS, close, layers_of, llama, logits, move, unchanged, undo_quantization

KINDS = pytest.mark.parametrize("quantize", [None, "nf4"])
ADAPTERS = {
    "lora": {"r": 4, "lora_alpha": 6},
    "dora": {"r": 3, "lora_alpha": 5, "use_dora": True},
    "some targets": {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "layers.1.mlp.down_proj"]},
    "bias": {"r": 4, "lora_alpha": 6, "bias": "all"},
}
EVERY_ADAPTER = pytest.mark.parametrize("fields", ADAPTERS.values(), ids=ADAPTERS)
LAST = LINEARS[-1]


def converted(quantize=None, model=None, **fields):
    return fastlora.convert(model or llama(), quantize=quantize, blocksize=32, progress=False, **fields)


def base_of(model):
    """The logits without adapters, of the weights the model has."""
    return logits(undo_quantization(llama(), model))


def two_adapters(quantize=None):
    """A model with "default" and "second" on all layers and "few" (DoRA) on q_proj, none at its start."""
    model = move(converted(quantize, r=4, lora_alpha=6))
    few = {"r": 2, "use_dora": True, "target_modules": ["q_proj"]}
    fastlora.add_adapters(model, {"second": {"r": 3, "lora_alpha": 5}, "few": few})
    for seed, name in enumerate(("second", "few")):
        fastlora.set_adapter(model, name)
        move(model, seed)
    fastlora.set_adapter(model, "default")
    return model


# --- merge and unmerge ------------------------------------------------------------------------------------------------


@KINDS
@EVERY_ADAPTER
def test_merged_logits_are_the_same_and_unmerging_restores_every_byte(fields, quantize):
    model = move(converted(quantize, **fields))
    want, base = logits(model), base_of(model)
    with unchanged(model):
        fastlora.merge(model, dtype=torch.float32)
        assert all(layer.merged for layer in layers_of(model).values())
        close(logits(model), want, base)
        fastlora.merge(model)
        close(logits(model), want, base)
        fastlora.unmerge(model)
        fastlora.unmerge(model)
    assert torch.equal(logits(model), want)


@KINDS
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", [LINEARS[0], LINEARS[6], LAST])
def test_one_layer_with_nan_leaves_all_unmerged(where, value, quantize):
    model = move(converted(quantize, r=4))
    layers_of(model)[where].lora_A["default"].data[1, 2] = value
    for act in (fastlora.merge, fastlora.merge_and_unload):
        with unchanged(model), pytest.raises(ShapeError, match="NaN or inf"):
            act(model)
    assert not any(layer.merged for layer in layers_of(model).values())


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), KeyboardInterrupt()])
def test_a_merge_that_breaks_off_leaves_all_unmerged(error, monkeypatch):
    model = move(converted(r=4))

    def broken(*_, **__):
        raise error

    monkeypatch.setattr(layers_of(model)[LAST], "merge", broken)
    with unchanged(model), pytest.raises(type(error)):
        fastlora.merge(model)
    assert not any(layer.merged for layer in layers_of(model).values())


def test_a_refused_merge_leaves_layers_merged_before_as_they_were():
    model = move(converted(r=4))
    layers = layers_of(model)
    layers[LINEARS[0]].merge()
    layers[LAST].lora_A["default"].data[0, 0] = float("nan")
    with unchanged(model), pytest.raises(ShapeError):
        fastlora.merge(model)
    assert [name for name, layer in layers.items() if layer.merged] == [LINEARS[0]]


def test_unsafe_merging_is_possible_when_asked_for():
    model = move(converted(r=4))
    layers_of(model)[LAST].lora_A["default"].data[0, 0] = float("nan")
    fastlora.merge(model, safe=False)
    assert layers_of(model)[LAST].weight.isnan().any()
    fastlora.unmerge(model)
    assert not layers_of(model)[LAST].weight.isnan().any()


@KINDS
def test_merging_named_adapters(quantize):
    model = two_adapters(quantize)
    base = base_of(model)
    for names in (["second"], ["default", "second"], ["few"]):
        fastlora.set_adapter(model, names)
        want = logits(model)
        fastlora.set_adapter(model, "default")
        with unchanged(model):
            fastlora.merge(model, names, dtype=torch.float32)
            layers = layers_of(model)
            assert all(layer._merged_adapters == [n for n in names if n in layer.lora_A] for layer in layers.values())
            merged = logits(model) if names != ["few"] else _only_merged(model)
            close(merged, want, base)
            fastlora.unmerge(model)
    want = logits(model)
    fastlora.merge(model, "default", dtype=torch.float32)
    close(logits(model), want, base)


def _only_merged(model):
    """The logits with the layers that nothing was merged into at their base."""
    layers = [layer for layer in layers_of(model).values() if not layer.merged]
    before = [list(layer.active_adapters) for layer in layers]
    for layer in layers:
        layer.set_adapter([])
    found = logits(model)
    for layer, names in zip(layers, before, strict=True):
        layer.set_adapter(names)
    return found


@pytest.mark.parametrize("names", ["nobody", ["nobody"], ["default", "nobody"], [""], "def"])
def test_merging_an_adapter_nobody_has_is_refused(names):
    """Not passed over in silence because no layer has it."""
    model = two_adapters()
    with unchanged(model), pytest.raises(ConfigError, match="unknown adapter"):
        fastlora.merge(model, names)


def test_merging_several_with_dora_is_refused_and_changes_nothing():
    model = two_adapters()
    with unchanged(model), pytest.raises(ConfigError, match="DoRA"):
        fastlora.merge(model, ["default", "few"])


def test_merging_others_over_merged_ones_is_refused():
    model = two_adapters()
    fastlora.merge(model, ["second"])
    with unchanged(model), pytest.raises(ConfigError, match="unmerge"):
        fastlora.merge(model, ["default"])


def test_models_without_adapters_are_refused_by_name():
    for act in (
        fastlora.merge,
        fastlora.unmerge,
        fastlora.merge_and_unload,
        lambda model: fastlora.set_adapter(model, "default"),
        lambda model: fastlora.add_adapters(model, {"x": {}}),
    ):
        model = llama()
        with unchanged(model), pytest.raises(ConfigError, match="convert"):
            act(model)


def test_training_goes_on_after_unmerging():
    ids = torch.arange(14).reshape(2, 7)
    models = [move(converted(r=4)) for _ in range(2)]
    fastlora.merge(models[1])
    fastlora.unmerge(models[1])
    for model in models:
        model(input_ids=ids, labels=ids).loss.backward()
    for one, two in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert (one.grad is None) == (two.grad is None)
        assert one.grad is None or torch.equal(one.grad, two.grad)


# --- plain again ------------------------------------------------------------------------------------------------------


@EVERY_ADAPTER
@pytest.mark.parametrize("tied", [False, True], ids=["", "tied"])
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
def test_merge_and_unload_gives_the_plain_model_back(fields, tied, bias, tmp_path):
    original = llama(tied, bias)
    keys = {key: (value.shape, value.dtype) for key, value in original.state_dict().items()}
    base = logits(original)
    model = move(converted(model=original, **fields))
    want = logits(model)
    assert fastlora.merge_and_unload(model) is model
    assert not layers_of(model)
    assert all(type(model.get_submodule(name)) is nn.Linear for name in LINEARS)
    assert {key: (value.shape, value.dtype) for key, value in model.state_dict().items()} == keys
    assert list(model.state_dict()) == list(llama(tied, bias).state_dict())
    assert all(type(p) is nn.Parameter and not p.is_meta for p in model.parameters())
    assert repr(model) == repr(llama(tied, bias))
    close(logits(model), want, base)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    merged = logits(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(LlamaForCausalLM.from_pretrained(tmp_path).eval()), merged)
    fresh = llama(tied, bias, seed=5)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(logits(fresh), merged)


@pytest.mark.parametrize("fields", [ADAPTERS["lora"], ADAPTERS["dora"]], ids=["lora", "dora"])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_merge_and_unload_of_nf4(fields, dtype):
    """16-bit by default; nothing of the 4-bit format is left."""
    model = move(converted("nf4", **fields))
    want, base = logits(model), base_of(model)
    fastlora.merge_and_unload(model, dtype=dtype)
    linears = [model.get_submodule(name) for name in LINEARS]
    assert all(type(linear) is nn.Linear for linear in linears)
    assert {linear.weight.dtype for linear in linears} == {dtype or torch.bfloat16}
    assert {linear.bias.dtype for linear in linears} == {dtype or torch.bfloat16}
    assert model.state_dict().keys() == llama().state_dict().keys()
    exact = {None: 4e-2, torch.bfloat16: 4e-2, torch.float16: 5e-3, torch.float32: 2e-5}[dtype]
    got = logits(model.float())
    assert (got - want).norm() <= exact * want.norm()
    assert (want - base).norm() > 5 * exact * want.norm()


def test_merge_and_unload_of_a_bf16_nf4_model_runs_as_it_is():
    model = move(converted("nf4", model=llama(dtype=torch.bfloat16), r=4))
    want = logits(model)
    fastlora.merge_and_unload(model)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert (logits(model) - want).norm() <= 4e-2 * want.norm()


@KINDS
def test_the_dtype_asked_for_wins_over_an_earlier_merge(quantize):
    model = move(converted(quantize, r=4))
    want, base = logits(model), base_of(model)
    fastlora.merge(model, dtype=torch.bfloat16)
    fastlora.merge_and_unload(model, dtype=torch.float32)
    assert {model.get_submodule(name).weight.dtype for name in LINEARS} == {torch.float32}
    assert (logits(model) - want).norm() <= 4e-2 * want.norm() < 0.5 * (want - base).norm()  # rounded once to bf16


def test_merge_and_unload_after_requantizing():
    model = move(converted("nf4", r=4))
    with pytest.warns(UserWarning, match="requantizing"):
        fastlora.merge(model, requantize=True)
    want = logits(model)
    fastlora.merge_and_unload(model, dtype=torch.float32)
    assert all(type(model.get_submodule(name)) is nn.Linear for name in LINEARS)
    close(logits(model), want, None)


@KINDS
def test_merge_and_unload_with_nothing_active_gives_the_base(quantize):
    model = move(converted(quantize, r=4))
    base = base_of(model)
    fastlora.set_adapter(model, [])
    fastlora.merge_and_unload(model, dtype=torch.float32)
    assert all(type(model.get_submodule(name)) is nn.Linear for name in LINEARS)
    close(logits(model), base, None)


def test_layers_nothing_is_merged_into_become_16_bit_too():
    """One dtype for the whole model, whichever layers the active adapter is on."""
    model = two_adapters("nf4")
    fastlora.set_adapter(model, "few")
    fastlora.merge_and_unload(model)
    assert {model.get_submodule(name).weight.dtype for name in LINEARS} == {torch.bfloat16}


def test_merge_and_unload_takes_the_active_adapters():
    model = two_adapters()
    fastlora.set_adapter(model, ["default", "second"])
    want = logits(model)
    fastlora.merge_and_unload(model)
    close(logits(model), want, logits(llama()))


def test_merge_and_unload_keeps_modes_and_biases_own_parameters():
    model = move(converted(r=4, bias="lora_only")).train()
    model.model.layers[0].eval()
    biases = {name: model.get_submodule(name).bias for name in LINEARS}
    fastlora.merge_and_unload(model)
    for name in LINEARS:
        linear = model.get_submodule(name)
        assert linear.training == ("layers.1" in name)
        assert linear.bias is biases[name]


@KINDS
def test_merge_and_unload_of_a_bare_layer(quantize):
    """The model may itself be the adapted layer: then the plain layer is the result."""
    torch.manual_seed(0)
    layer = QLoraLinear(32, 16, r=4) if quantize else LoraLinear(32, 16, r=4)
    move(layer)
    x = torch.randn(5, 32)
    want = layer(x)
    plain = fastlora.merge_and_unload(layer, dtype=torch.float32)
    assert type(plain) is nn.Linear
    torch.testing.assert_close(plain(x), want, rtol=1e-4, atol=1e-5)


def test_an_unloaded_model_can_be_converted_again():
    model = fastlora.merge_and_unload(move(converted(r=4)))
    want = logits(model)
    again = converted(model=model, r=2)
    close(logits(again), want, None)
    assert len(layers_of(again)) == len(LINEARS)


# --- adding and switching ---------------------------------------------------------------------------------------------


@KINDS
def test_added_adapters_wait_and_start_at_the_base(quantize):
    model = converted(quantize, r=4)
    base = logits(model)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    move(model)
    want = logits(model)
    fastlora.add_adapters(model, {"a": {"r": 2}, "b": {"r": 3, "use_dora": True, "target_modules": ["q_proj"]}})
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trainable
    assert torch.equal(logits(model), want)
    for name in ("a", "b"):
        fastlora.set_adapter(model, name)
        close(logits(model), base, None)
        own = {n for n, p in model.named_parameters() if p.requires_grad}
        assert own
        assert all(n.endswith(f".{name}") for n in own)
    assert {n for n, layer in layers_of(model).items() if "b" in layer.lora_A} == {x for x in LINEARS if "q_proj" in x}
    fastlora.set_adapter(model, "default")
    assert torch.equal(logits(model), want)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trainable


def test_added_adapters_follow_patterns_seeds_and_exclusions():
    one, two = converted(r=2), converted(r=2)
    config = {
        "r": 4,
        "rank_pattern": {"q_proj": 3},
        "alpha_pattern": {"v_proj": 5},
        "exclude_modules": ["down_proj"],
        "init_seed": 11,
        "init_lora_weights": "he",
    }
    for model in (one, two):
        fastlora.add_adapters(model, {"x": config})
    layers, twins = layers_of(one), layers_of(two)
    drawn = [layer.lora_A["x"] for name, layer in layers.items() if "x" in layer.lora_A]
    assert len(drawn) == len(LINEARS) - 2
    for name, layer in layers.items():
        assert ("x" in layer.lora_A) == ("down_proj" not in name)
        if "x" in layer.lora_A:
            assert layer.lora_A["x"].shape[0] == (3 if "q_proj" in name else 4)
            assert layer.scaling["x"] == (5 / 4 if "v_proj" in name else 16 / layer.lora_A["x"].shape[0])
            assert torch.equal(layer.lora_A["x"], twins[name].lora_A["x"])
    for a, b in itertools.combinations([a for a in drawn if a.shape == (4, 32)], 2):
        assert not torch.equal(a, b)


REFUSED = {
    "taken name": ({"default": {}}, "exists already"),
    "second of two taken": ({"fine": {}, "default": {}}, "exists already"),
    "impossible name": ({"fine": {}, "a.b": {}}, "adapter name"),
    "matches nothing": ({"fine": {}, "x": {"target_modules": ["qq_proj"]}}, "qq_proj"),
    "all excluded": ({"fine": {}, "x": {"exclude_modules": r".*"}}, "x"),
    "unknown field": ({"fine": {}, "x": {"rank": 3}}, "rank"),
    "unknown init": ({"fine": {}, "x": {"init_lora_weights": "mystery"}}, "mystery"),
    "rewrites the base": ({"fine": {}, "x": {"init_lora_weights": "pissa"}}, "pissa"),
    "odd orthogonal": ({"fine": {}, "x": {"r": 3, "init_lora_weights": "orthogonal"}}, "orthogonal"),
    "odd orthogonal by pattern": (
        {"fine": {}, "x": {"r": 4, "rank_pattern": {"layers.1.mlp.down_proj": 3}, "init_lora_weights": "orthogonal"}},
        "orthogonal",
    ),
    "rank of 0 by pattern": ({"fine": {}, "x": {"rank_pattern": {"layers.1.mlp.down_proj": 0}}}, "r must|rank_pattern"),
    "bias of its own": ({"fine": {}, "x": {"bias": "all"}}, "bias"),
    "modules of its own": ({"fine": {}, "x": {"modules_to_save": ["lm_head"]}}, "modules_to_save"),
}


@pytest.mark.parametrize(("configs", "words"), REFUSED.values(), ids=REFUSED)
def test_a_refused_config_adds_no_adapter_at_all(configs, words):
    model = converted(r=2)
    with unchanged(model), pytest.raises(ConfigError, match=words):
        fastlora.add_adapters(model, configs)


def test_switching_to_what_is_not_there_or_cannot_be_changes_nothing():
    model = two_adapters()
    for names, words in (("nobody", "nobody"), (["default", "nobody"], "nobody"), (["default", "few"], "DoRA")):
        with unchanged(model), pytest.raises(ConfigError, match=words):
            fastlora.set_adapter(model, names)


def test_layers_without_the_adapter_compute_their_base():
    model = two_adapters()
    fastlora.set_adapter(model, "few")
    for name, layer in layers_of(model).items():
        assert layer.active_adapters == (["few"] if "q_proj" in name else [])
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trainable
    assert all(name.endswith(".few") for name in trainable)


@KINDS
def test_several_active_adapters_equal_pefts(quantize, tmp_path):
    model = two_adapters(quantize)
    for name in ("default", "second"):
        fastlora.save_adapter(model, tmp_path, name)
    theirs = peft.PeftModel.from_pretrained(undo_quantization(llama(), model), str(tmp_path)).eval()
    theirs.load_adapter(str(tmp_path / "second"), "second")
    fastlora.set_adapter(model, ["default", "second"])
    theirs.base_model.set_adapter(["default", "second"])
    close(logits(model), logits(theirs), base_of(model))


@KINDS
def test_copies_and_pickles_of_a_model(quantize):
    model = two_adapters(quantize)
    want = logits(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(twin), want)
        fastlora.set_adapter(twin, "second")
        move(twin, 9)
        fastlora.merge(twin)
        assert torch.equal(logits(model), want)


# --- convert: all or nothing ------------------------------------------------------------------------------------------


def _spoil_last(model):
    model.get_submodule(LAST).weight.data[3, 4] = float("nan")


CONVERSIONS = {
    "near name": (None, {"target_modules": ["q_prj"]}, ConfigError, "q_proj"),
    "NaN to quantize": (_spoil_last, {"quantize": "nf4"}, ShapeError, LAST),
    "NaN to factor": (_spoil_last, {"init_lora_weights": "pissa"}, FastloraError, LAST),
    "NaN to factor and quantize": (_spoil_last, {"init_lora_weights": "loftq", "quantize": "nf4"}, FastloraError, LAST),
    "rank above k to factor": (
        None,
        {"init_lora_weights": "olora", "rank_pattern": {LAST: 33}},
        ShapeError,
        LAST,
    ),
    "odd orthogonal": (
        None,
        {"r": 4, "init_lora_weights": "orthogonal", "rank_pattern": {LAST: 3}},
        ConfigError,
        "r=3",
    ),
    "loftq of a dense base": (None, {"init_lora_weights": "loftq"}, ConfigError, "loftq"),
    "rank of 0": (None, {"rank_pattern": {LAST: 0}}, ConfigError, "r must|rank_pattern"),
    "blocksize": (None, {"quantize": "nf4", "blocksize": 48}, FastloraError, "48"),
    "compute dtype": (None, {"quantize": "nf4", "compute_dtype": torch.int8}, DtypeError, "int8"),
    "adapter name": (None, {"adapter_name": "a.b"}, ConfigError, "adapter name"),
    "quantize": (None, {"quantize": "int8"}, ConfigError, "int8"),
    "module to save": (None, {"modules_to_save": ["lm_hed"]}, ConfigError, "lm_hed"),
    "unknown field": (None, {"rank": 4}, ConfigError, "rank"),
}


@pytest.mark.parametrize(("spoil", "fields", "error", "words"), CONVERSIONS.values(), ids=CONVERSIONS)
def test_a_refused_conversion_leaves_the_model_as_it_was(spoil, fields, error, words):
    model = llama()
    if spoil:
        spoil(model)
    with unchanged(model), pytest.raises(error, match=words):
        fastlora.convert(model, **{"quantize": None, "blocksize": 32, "progress": False, **fields})


def test_a_linear_in_two_places_is_adapted_in_both_or_refused():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(8, 8)
            self.b = self.a

        def forward(self, x):
            return self.b(self.a(x))

    for targets in (["a"], ["b"], ["a", "b"]):
        model = Shared()
        try:
            fastlora.convert(model, quantize=None, target_modules=targets, r=2)
        except ConfigError as error:
            assert "a" in str(error) or "b" in str(error)  # noqa: PT017 (either way is right)
            assert type(model.a) is nn.Linear
        else:
            assert model.a is model.b


# --- counting and grouping --------------------------------------------------------------------------------------------

COUNTED = {
    **ADAPTERS,
    "lora_only": {"r": 4, "bias": "lora_only", "target_modules": ["q_proj"]},
    "patterns": {"r": 4, "rank_pattern": {"q_proj": 9}},
    "modules_to_save": {"r": 4, "modules_to_save": ["lm_head"]},
}


@pytest.mark.parametrize("fields", COUNTED.values(), ids=COUNTED)
def test_parameter_counts_are_pefts(fields):
    targets = {"target_modules": [name.rpartition(".")[2] for name in LINEARS[:7]], **fields}
    theirs = peft.get_peft_model(llama(), peft.LoraConfig(**targets))
    trainable, total = theirs.get_nb_trainable_parameters()
    if "modules_to_save" in fields:
        total -= llama().lm_head.weight.numel()  # PEFT keeps the original beside the copy
    assert fastlora.trainable_parameters(converted(**fields)) == (trainable, total)
    assert fastlora.trainable_parameters(converted("nf4", **fields)) == (trainable, total)


def test_counts_of_tied_and_plain_models():
    plain = llama(tied=True)
    numel = sum(p.numel() for p in plain.parameters())
    assert fastlora.trainable_parameters(plain) == (numel, numel)
    trainable, total = fastlora.trainable_parameters(converted(model=plain, r=4))
    assert total == numel + trainable
    assert fastlora.trainable_parameters(nn.ReLU()) == (0, 0)


def test_the_printed_line_has_the_numbers(capsys):
    model = converted("nf4", r=4)
    fastlora.print_trainable_parameters(model)
    printed = capsys.readouterr().out
    trainable, total = fastlora.trainable_parameters(model)
    assert printed.count("\n") == 1
    assert f"{trainable:,}" in printed
    assert f"{total:,}" in printed
    assert f"{100 * trainable / total:.2f}" in printed
    fastlora.print_trainable_parameters(nn.ReLU())
    assert "0" in capsys.readouterr().out


def test_param_groups_hold_every_trainable_parameter_once():
    model = converted(r=4, use_dora=True, bias="all", modules_to_save=["lm_head"])
    groups = fastlora.param_groups(model, 1e-3, loraplus_lr_ratio=16.0, weight_decay=0.1)
    found = [id(p) for group in groups for p in group["params"]]
    assert len(found) == len(set(found))
    assert set(found) == {id(p) for p in model.parameters() if p.requires_grad}
    rates = {id(p): group["lr"] for group in groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            fast = ".lora_B." in name or ".lora_magnitude." in name
            assert rates[id(parameter)] == pytest.approx(1.6e-2 if fast else 1e-3), name
    assert {group["weight_decay"] for group in groups} == {0.1}


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW, torch.optim.Adagrad])
def test_param_groups_suit_any_optimizer_and_b_moves_faster(optimizer):
    model = move(converted(r=4))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    made = optimizer(fastlora.param_groups(model, 1e-3, loraplus_lr_ratio=8.0))
    ids = torch.arange(14).reshape(2, 7)
    model(input_ids=ids, labels=ids).loss.backward()
    made.step()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) == (not parameter.requires_grad), name
    assert {group["lr"] for group in made.param_groups} == {1e-3, 8e-3}


def test_param_groups_follow_the_active_adapter():
    model = two_adapters()
    fastlora.set_adapter(model, "second")
    own = {id(p) for name, p in model.named_parameters() if name.endswith(".second")}
    assert {id(p) for group in fastlora.param_groups(model, 1e-3) for p in group["params"]} == own


@pytest.mark.parametrize(
    ("lr", "ratio"),
    [(0.0, 1.0), (-1e-3, 1.0), (1e-3, 0.5), (1e-3, 0.0), (float("nan"), 1.0), (1e-3, float("nan")), (float("inf"), 1)],
)
def test_param_groups_refuse_bad_rates(lr, ratio):
    with pytest.raises(ConfigError, match="lr"):
        fastlora.param_groups(converted(r=2), lr, ratio)


def test_param_groups_of_a_frozen_model_are_refused():
    model = converted(r=2)
    model.requires_grad_(False)
    with pytest.raises(ConfigError, match="nothing to train"):
        fastlora.param_groups(model, 1e-3)


def test_merge_and_unload_of_an_fp32_nf4_model_runs_in_16_bits():
    """The plain model's parameters share one dtype; buffers (rotary tables) keep theirs."""
    model = converted(quantize="nf4", r=4)
    buffers = {name: buffer.dtype for name, buffer in model.named_buffers()}
    fastlora.merge_and_unload(model)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert {name: buffer.dtype for name, buffer in model.named_buffers()} == buffers
    assert model(torch.zeros(1, 4, dtype=torch.long)).logits.isfinite().all()
