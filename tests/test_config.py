"""LoraConfig: what its fields may be, and what a peft.LoraConfig means here."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fastlora
from fastlora import ConfigError, LoraConfig, LoraLinear
from tests.layer_tools import outline
from tests.model_tools import llama

peft = pytest.importorskip("peft")


# --- fields -----------------------------------------------------------------------------------------------------------

BAD_FIELDS = [
    ({"r": 0}, "r must be an integer of at least 1, got 0"),
    ({"r": -3}, "r must"),
    ({"r": 8.0}, r"r must be an integer of at least 1, got 8\.0"),
    ({"r": True}, "r must"),
    ({"r": "8"}, "r must"),
    ({"r": None}, "r must"),
    ({"lora_alpha": float("nan")}, "lora_alpha must be a finite number, got nan"),
    ({"lora_alpha": float("inf")}, "lora_alpha"),
    ({"lora_alpha": "16"}, "lora_alpha"),
    ({"lora_alpha": True}, "lora_alpha"),
    ({"lora_alpha": None}, "lora_alpha"),
    ({"lora_dropout": 1.0}, r"lora_dropout must be in \[0, 1\), got 1\.0"),
    ({"lora_dropout": -0.1}, "lora_dropout"),
    ({"lora_dropout": 2}, "lora_dropout"),
    ({"lora_dropout": float("nan")}, "lora_dropout"),
    ({"lora_dropout": "0.1"}, "lora_dropout"),
    ({"use_rslora": "yes"}, "use_rslora must be True or False, got 'yes'"),
    ({"use_dora": "no"}, "use_dora must be True or False, got 'no'"),
    ({"dora_dropout": "both"}, "dora_dropout must be one of peft, shared, got 'both'"),
    ({"bias": "some"}, "bias must be one of none, all, lora_only, got 'some'"),
    ({"bias": True}, "bias must"),
    ({"init_lora_weights": "magic"}, "unknown init_lora_weights 'magic'; known: True, False, kaiming, gaussian"),
    ({"init_lora_weights": "pissa_niter_"}, "unknown init_lora_weights"),
    ({"init_lora_weights": 3}, "unknown init_lora_weights"),
    ({"init_lora_weights": None}, "unknown init_lora_weights"),
    ({"init_lora_weights": "orthogonal", "r": 3}, "orthogonal.*even rank, got r=3"),
    ({"init_bound": 0.0}, "init_bound must be"),
    ({"init_bound": -1}, "init_bound must be"),
    ({"init_bound": float("inf")}, "init_bound must be"),
    ({"init_bound": "1"}, "init_bound must be"),
    ({"init_seed": -1}, "init_seed must be"),
    ({"init_seed": 2**63}, "init_seed must be"),
    ({"init_seed": 1.5}, "init_seed must be"),
    ({"init_seed": "1"}, "init_seed must be"),
    ({"adapter_dtype": torch.int8}, "adapter_dtype must be a floating-point torch.dtype"),
    ({"adapter_dtype": "bfloat16"}, "adapter_dtype"),
    ({"adapter_dtype": torch.complex64}, "adapter_dtype"),
    ({"target_modules": None}, "target_modules must be"),
    ({"target_modules": 5}, "target_modules must be"),
    ({"target_modules": [1]}, "target_modules must be"),
    ({"target_modules": "["}, "target_modules.*regular expression"),
    ({"exclude_modules": "("}, "exclude_modules.*regular expression"),
    ({"exclude_modules": 5}, "exclude_modules must be"),
    ({"modules_to_save": 5}, "modules_to_save must be"),
    ({"layers_to_transform": "1"}, "layers_to_transform must be"),
    ({"layers_to_transform": [1.5]}, "layers_to_transform must be"),
    ({"layers_pattern": "layers"}, "layers_pattern.*layers_to_transform"),
    ({"layers_to_transform": 1, "layers_pattern": "["}, "layers_pattern.*regular expression"),
    ({"rank_pattern": [1]}, "rank_pattern must map"),
    ({"rank_pattern": {"q": 0}}, "rank_pattern.*got 0"),
    ({"rank_pattern": {"q": "8"}}, "rank_pattern.*got '8'"),
    ({"rank_pattern": {"(": 8}}, "rank_pattern.*regular expression"),
    ({"alpha_pattern": {"q": float("nan")}}, "alpha_pattern.*got nan"),
    ({"alpha_pattern": {"q": None}}, "alpha_pattern.*got None"),
    ({"alpha_pattern": "q"}, "alpha_pattern must map"),
    ({"rank": 8}, "unknown config field 'rank'; known: r, lora_alpha, lora_dropout"),
    ({"lora_bias": True}, "unknown config field 'lora_bias'"),
]


@pytest.mark.parametrize(("fields", "words"), BAD_FIELDS, ids=str)
def test_a_bad_field_is_one_clear_error_and_changes_no_model(fields, words):
    """From every door: the config or the layer, and convert, after which the model is as it was."""
    error = TypeError if "adapter_dtype" in fields else ConfigError
    with pytest.raises(error, match=words):
        LoraLinear.from_linear(nn.Linear(8, 8), **fields)
    model = nn.ModuleDict({"q": nn.Linear(8, 8), "k": nn.Linear(8, 8)})
    before = outline(model)
    for quantize in (None, "nf4"):
        with pytest.raises(error, match=words):
            fastlora.convert(model, dict(fields), quantize=quantize, progress=False)
        assert outline(model) == before


def test_of_takes_only_what_it_knows():
    for bad in (5, "r=8", [8], object(), nn.Linear(1, 1)):
        with pytest.raises(
            TypeError, match=f"expected a LoraConfig, a dict or a peft.LoraConfig, got {type(bad).__name__}"
        ):
            LoraConfig.of(bad)
    assert LoraConfig.of() == LoraConfig()
    assert LoraConfig.of({"r": 3}, r=4).r == 4


def test_defaults_and_scaling():
    config = LoraConfig()
    assert (config.r, config.lora_alpha, config.lora_dropout, config.scaling) == (8, 16, 0.0, 2.0)
    assert (config.init_lora_weights, config.target_modules, config.bias) == ("kaiming", "all-linear", "none")
    assert config.adapter_dtype == torch.float32
    assert LoraConfig(r=9, lora_alpha=6, use_rslora=True).scaling == 2.0
    with pytest.raises(AttributeError):
        config.r = 3
    assert LoraConfig(r=4) == LoraConfig(r=4) != LoraConfig(r=5)
    with pytest.raises(ConfigError, match="r must"):
        config.replace(r=0)


def test_two_configs_share_no_mutable_default():
    assert LoraConfig().rank_pattern is not LoraConfig().rank_pattern


# --- peft.LoraConfig --------------------------------------------------------------------------------------------------


def test_a_peft_config_means_what_it_means_there():
    theirs = peft.LoraConfig(
        r=5,
        target_modules=["k_proj", "q_proj"],
        lora_dropout=0.25,
        use_dora=True,
        use_rslora=True,
        bias="lora_only",
        rank_pattern={"q_proj": 3},
        alpha_pattern={"q_proj": 7},
        layers_to_transform=[1],
        layers_pattern="layers",
        init_lora_weights="gaussian",
        modules_to_save=["lm_head"],
        exclude_modules=["o_proj"],
        task_type="CAUSAL_LM",
    )
    ours = LoraConfig.of(theirs)
    assert ours.lora_alpha == 8  # PEFT's default, not ours
    assert sorted(ours.target_modules) == ["k_proj", "q_proj"]
    for name in ("r", "lora_dropout", "use_dora", "use_rslora", "bias", "rank_pattern", "alpha_pattern"):
        assert getattr(ours, name) == getattr(theirs, name)
    assert (ours.init_lora_weights, ours.modules_to_save) == ("gaussian", ["lm_head"])
    assert sorted(ours.exclude_modules) == ["o_proj"]
    assert ours.layers_to_transform == [1] and ours.layers_pattern == "layers"
    assert LoraConfig.of(theirs, lora_alpha=32).lora_alpha == 32


@pytest.mark.parametrize(
    "fields",
    [
        {"fan_in_fan_out": True},
        {"lora_bias": True},
        {"use_qalora": True},
        {"layer_replication": [(0, 2)]},
        {"trainable_token_indices": [1]},
        {"target_parameters": ["a.b"]},
        {"alora_invocation_tokens": [1, 2]},
        {"megatron_config": {"a": 1}},
        {"ensure_weight_tying": True},
        {"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 2, "loftq_iter": 5}},
        {"init_lora_weights": "eva", "eva_config": peft.EvaConfig()},
        {"init_lora_weights": "corda", "corda_config": peft.CordaConfig() if hasattr(peft, "CordaConfig") else None},
    ],
    ids=lambda fields: ",".join(fields),
)
def test_a_peft_field_we_cannot_honour_is_refused_by_name(fields):
    if fields.get("corda_config", 0) is None:
        pytest.skip("this PEFT exports no CordaConfig")
    if "loftq_config" in fields:  # which PEFT itself makes only where scipy is installed
        theirs = peft.LoraConfig(target_modules=["q_proj"])
        theirs.init_lora_weights, theirs.loftq_config = "loftq", fields["loftq_config"]
    else:
        theirs = peft.LoraConfig(target_modules=["q_proj"], **fields)
    with pytest.raises(ConfigError) as caught:
        LoraLinear(8, 8, config=theirs)
    assert any(name in str(caught.value) for name in fields)


def test_other_peft_methods_are_refused():
    with pytest.raises((ConfigError, TypeError), match="IA3|IA³|LORA"):
        LoraConfig.of(peft.IA3Config())
    with pytest.raises(ConfigError, match="LOHA"):
        LoraConfig.of(peft.LoHaConfig())


def test_a_peft_config_without_targets_is_not_silently_all_linear():
    """PEFT looks the model's type up; for a layer it does not matter, for a model it does."""
    theirs = peft.LoraConfig()
    assert LoraLinear(8, 8, config=theirs).scaling["default"] == 1.0
    model = llama()
    before = outline(model)
    with pytest.raises(ConfigError, match="target_modules"):
        fastlora.convert(model, theirs, quantize=None, progress=False)
    assert outline(model) == before
