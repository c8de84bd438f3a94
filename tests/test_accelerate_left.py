"""What is left to PEFT: why, said once, by name; bad input; `report` and `register`."""

from __future__ import annotations

import copy
import subprocess
import sys
import warnings

import bitsandbytes
import peft
import pytest
import torch
from peft.tuners.lora.awq import AwqLoraLinear
from peft.tuners.lora.gptq import GPTQLoraLinear
from torch import nn
from transformers.pytorch_utils import Conv1D

import fastlora
from fastlora import ConfigError, DtypeError, testing
from fastlora.nn import accelerate as accelerating
from fastlora.testing import Case
from tests.accelerate_tools import adapted, batch, close, layer_of, llama, logits, shake, train, twins, wrap
from tests.model_tools import silent

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft", "ignore::UserWarning:torch")


def told(call) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return [str(w.message) for w in caught if "left to PEFT" in str(w.message)]


# --- bases ------------------------------------------------------------------------------------------------------------


def over(wrapper, base):
    """PEFT's layer for another quantizer, over a stand-in of its base."""
    config = peft.LoraConfig(r=2, target_modules=["lin"])
    extra = {"use_dora": False, "use_rslora": False} if wrapper is GPTQLoraLinear else {}
    return nn.ModuleDict({"lin": wrapper(base, "default", config=config, r=2, lora_alpha=2, **extra)})


class QuantLinear(nn.Linear):
    """A stand-in for a GPTQ base."""


class WQLinear_GEMM(nn.Linear):
    """A stand-in for an AWQ base."""


def eight_bit():
    model = nn.ModuleDict({"lin": bitsandbytes.nn.Linear8bitLt(8, 8, has_fp16_weights=False)})
    model.is_loaded_in_8bit = True
    return peft.LoraModel(model, peft.LoraConfig(r=2, target_modules=["lin"]), "default")


def fp64():
    return wrap(nn.Linear(8, 8).double(), r=2).double()


def trained_base():
    model = wrap(nn.Linear(8, 8), r=2)
    model.model["lin"].base_layer.weight.requires_grad_()
    return model


BASES = {
    "Linear8bitLt": (eight_bit, "bnb.Linear8bitLt over Linear8bitLt has no fused path"),
    "GPTQ": (lambda: over(GPTQLoraLinear, QuantLinear(8, 8)), "gptq.GPTQLoraLinear over QuantLinear has no fused path"),
    "AWQ": (lambda: over(AwqLoraLinear, WQLinear_GEMM(8, 8)), "awq.AwqLoraLinear over WQLinear_GEMM has no fused path"),
    "Conv1D": (lambda: wrap(Conv1D(8, 8), r=2, fan_in_fan_out=True), "fan_in_fan_out=True: the Conv1D base"),
    "Conv2d": (lambda: wrap(nn.Conv2d(3, 4, 3), r=2), "layer.Conv2d over Conv2d has no fused path"),
    "Embedding": (lambda: wrap(nn.Embedding(9, 8), r=2), "layer.Embedding over Embedding has no fused path"),
    "fp64": (fp64, "not plain float parameters"),
    "trained": (trained_base, "the base weight trains"),
}


@pytest.mark.parametrize("name", BASES)
def test_bases_we_do_not_run_are_refused_by_name(name):
    make, reason = BASES[name]
    model = make()
    layer = dict(accelerating.tuner_layers(model)).popitem()[1]
    kind = type(layer)
    with pytest.raises(ConfigError, match=r"cannot accelerate every layer: .*" + reason):
        fastlora.accelerate(model, strict=True)
    assert type(layer) is kind
    with pytest.warns(UserWarning, match="left to PEFT: .*" + reason):
        fastlora.accelerate(model)
    assert reason in fastlora.report(model)[0].why


def test_a_4bit_base_in_pefts_dense_wrapper():
    """PEFT picks the wrong wrapper when the model lacks is_loaded_in_4bit, and would merge into packed bytes."""
    model = llama(quant="nf4")
    model.is_loaded_in_4bit = False
    config = peft.LoraConfig(r=2, target_modules=["q_proj"])
    with pytest.warns(UserWarning, match="lacks is_loaded_in_4bit=True"):
        fastlora.accelerate(peft.get_peft_model(copy.deepcopy(model), config))
    with pytest.warns(UserWarning, match="lacks is_loaded_in_4bit=True"):
        peft.get_peft_model(model, fastlora.register(config))


def test_adalora_is_left_to_peft():
    config = peft.AdaLoraConfig(init_r=4, target_r=2, total_step=20, tinit=2, tfinal=2, target_modules=["q_proj"])
    model = peft.get_peft_model(llama(), config)
    want = logits(model)
    with pytest.warns(UserWarning, match=r"left to PEFT: PEFT's layer\.SVDLinear over Linear has no fused path"):
        fastlora.accelerate(model)
    assert torch.equal(logits(model), want)
    report = fastlora.report(model)
    assert (len(report.left), report[0].kind) == (2, "AdaLoRA over float32")
    train(model, 2)


# --- fields and variants ----------------------------------------------------------------------------------------------


IGNORED = [
    ("", {"use_qalora": True, "qalora_group_size": 8}, "use_qalora"),
    ("nf4", {"use_qalora": True, "qalora_group_size": 8}, "use_qalora"),
    ("nf4", {"kasa_config": peft.KasaConfig()}, "kasa_config"),
    ("nf4", {"monteclora_config": peft.MontecloraConfig()}, "monteclora_config"),
    ("nf4", {"use_bdlora": peft.tuners.lora.config.BdLoraConfig(nblocks=2)}, "use_bdlora"),
]


@pytest.mark.parametrize(("quant", "fields", "name"), IGNORED, ids=lambda v: v if isinstance(v, str) else "")
def test_fields_peft_ignores_in_silence_are_named(quant, fields, name):
    def config():
        return peft.LoraConfig(r=4, target_modules=["q_proj"], **fields)

    model = peft.get_peft_model(llama(quant=quant), config())
    text = f"PEFT ignores {name} on"
    with pytest.raises(ConfigError, match=text):
        fastlora.accelerate(model, strict=True)
    with pytest.warns(UserWarning, match=text):
        fastlora.accelerate(model)
    assert all(text in why for why in fastlora.report(model).left.values())
    assert len(fastlora.report(model).left) == 2
    with pytest.warns(UserWarning, match=text):
        model = peft.get_peft_model(llama(quant=quant), fastlora.register(config()))
    assert len(fastlora.report(model).left) == 2
    if name == "kasa_config":  # PEFT refuses to mix it with others
        return
    model.add_adapter("plain", peft.LoraConfig(r=4, target_modules=["q_proj"]))
    model.set_adapter("plain")
    assert fastlora.report(model).left == {}
    model.add_adapter("late", config())  # after accelerating: noted too
    model.set_adapter("late")
    assert len(fastlora.report(model).left) == 2


def test_lora_ga_on_a_4bit_base_is_named():
    """PEFT falls back to its default init there and says nothing."""
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights="lora_ga")
    model = peft.get_peft_model(llama(quant="nf4"), config)
    text = 'PEFT ignores init_lora_weights="lora_ga" on a 4-bit base'
    with pytest.warns(UserWarning, match=text):
        fastlora.accelerate(model)
    assert len(fastlora.report(model).left) == 2


def variants():
    return {
        "ALoraLinear": {"alora_invocation_tokens": [1, 2], "task_type": "CAUSAL_LM"},
        "KasaLinear": {"kasa_config": peft.KasaConfig()},
        "MontecloraLinear": {"monteclora_config": peft.MontecloraConfig()},
        "BdLoraLinear": {"use_bdlora": peft.tuners.lora.config.BdLoraConfig(nblocks=2, target_modules_bd_a=["q_proj"])},
        "VeloraLinear": {"velora_config": peft.VeloraConfig()},
        "MiCALinear": {"init_lora_weights": "mica"},
    }


@pytest.mark.parametrize("name", variants())
def test_other_variants_are_left_to_peft_by_name(name):
    fields = variants()[name]
    model = adapted(llama(), target_modules=["q_proj"], **fields).eval()
    want = logits(model)
    with pytest.warns(UserWarning, match=f"the variant {name} has no fused path"):
        fastlora.accelerate(model)
    assert torch.equal(logits(model), want)
    assert set(fastlora.report(model).left.values()) == {f"the variant {name} has no fused path"}


# --- inputs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("x", "compute", "adapter", "ours"),
    [
        (torch.float32, torch.float32, torch.float32, True),
        (torch.bfloat16, torch.float32, torch.float32, True),
        (torch.bfloat16, torch.bfloat16, torch.float32, True),
        (torch.float32, torch.bfloat16, torch.bfloat16, True),
        (torch.float32, torch.bfloat16, torch.float32, False),
        (torch.float16, torch.bfloat16, torch.float32, False),
    ],
    ids=str,
)
def test_a_compute_dtype_that_would_round_the_adapter_is_left_to_peft(x, compute, adapter, ours):
    case = Case(m=5, n=32, k=64, r=4, dtype=torch.float32, adapter_dtype=adapter, quant="nf4")
    inputs = testing.make_inputs(case)
    layer = layer_of(case, inputs)
    layer.base_layer.compute_dtype = compute
    given = inputs.x.to(x)
    want = layer(given)
    fastlora.accelerate(layer)
    got = layer(given)
    assert got.dtype == want.dtype == x
    assert bool(fastlora.report(layer).left) == (not ours)
    if ours:
        assert (got.float() - want.float()).norm() < 2e-2 * want.float().norm()
    else:
        assert torch.equal(got, want)
        assert "PEFT computes the adapter in torch.float32" in fastlora.report(layer)[0].why


def test_without_a_compute_dtype_the_first_input_decides():
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        case = Case(m=5, n=32, k=64, r=4, quant="nf4")
        inputs = testing.make_inputs(case)
        layer = layer_of(case, inputs)
        layer.base_layer.compute_dtype, layer.base_layer.compute_type_is_set = None, False
        theirs = copy.deepcopy(layer)
        fastlora.accelerate(layer)
        want, got = theirs(inputs.x.to(dtype)), layer(inputs.x.to(dtype))
        assert got.dtype == want.dtype == dtype
        assert layer.base_layer.compute_dtype == theirs.base_layer.compute_dtype
        assert layer.base_layer.compute_type_is_set


def test_integers_and_mixed_dtypes_raise_as_peft_does():
    theirs, ours = twins(lambda: wrap(nn.Linear(8, 8), r=2))
    for x in (torch.ones(2, 8, dtype=torch.long), torch.ones(2, 8, dtype=torch.bfloat16)):
        for model in (theirs, ours):
            with pytest.raises(RuntimeError, match="dtype"):
                model.model["lin"](x)
    with pytest.raises(ValueError, match="in_features=8"):
        ours.model["lin"](torch.ones(2, 9))


# --- accelerate, decelerate, register, report -------------------------------------------------------------------------


def test_models_without_peft_layers_and_other_objects_are_refused():
    with pytest.raises(ConfigError, match="Linear has no PEFT adapter layers"):
        fastlora.accelerate(nn.Linear(2, 2))
    with pytest.raises(ConfigError, match="no adapted layers, neither PEFT's nor fastlora's"):
        fastlora.report(nn.Linear(2, 2))
    with pytest.raises(DtypeError, match=r"expected a peft\.LoraConfig, got dict"):
        fastlora.register({"r": 8})
    with pytest.raises(ConfigError, match="AdaLoraConfig"):
        fastlora.register(peft.AdaLoraConfig(total_step=10))
    assert fastlora.decelerate(nn.Linear(2, 2)) is not None


def test_it_is_silent_where_everything_is_fused():
    model = adapted(llama(), use_dora=True, lora_dropout=0.1)
    with silent():
        fastlora.accelerate(model)
        train(model, 1)
        with model.disable_adapter():
            logits(model)


def test_strict_keeps_layers_that_were_accelerated_before():
    model = nn.ModuleDict({"a": wrap(nn.Linear(8, 8), r=2)})
    fastlora.accelerate(model)
    model["b"] = wrap(nn.Conv2d(3, 3, 3), r=2)
    model["c"] = wrap(nn.Linear(8, 8), r=2)
    with pytest.raises(ConfigError, match=r"b\.model\.lin"):
        fastlora.accelerate(model, strict=True)
    kinds = {name: accelerating.is_ours(layer) for name, layer in accelerating.tuner_layers(model)}
    assert kinds == {"a.model.lin": True, "b.model.lin": False, "c.model.lin": False}


def test_many_layers_of_one_reason_are_one_line():
    said = told(lambda: fastlora.accelerate(adapted(llama(), init_lora_weights="mica")))
    assert len(said) == 1
    assert "and 12 more" in said[0]


def test_a_registered_config_covers_dense_and_4bit_and_leaves_the_rest():
    for quant in ("", "nf4"):
        config = fastlora.register(peft.LoraConfig(r=4, target_modules=["q_proj", "embed_tokens"]))
        model = peft.get_peft_model(llama(quant=quant), copy.deepcopy(config))
        assert len(fastlora.report(model).fused) == 2
        assert list(fastlora.report(model).left) == ["base_model.model.model.embed_tokens"]
        fastlora.decelerate(model)
        assert fastlora.report(model).fused == []
    config = fastlora.register(
        peft.LoraConfig(r=4, target_parameters=["mlp.up_proj.weight"], target_modules=["q_proj"])
    )
    assert len(fastlora.report(peft.get_peft_model(llama(bias=False), config)).fused) == 2


def test_a_device_hook_on_the_layer_is_reported():
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    theirs, ours = twins(lambda: shake(adapted(llama())))
    layers = [dict(accelerating.tuner_layers(m)).popitem()[1] for m in (theirs, ours)]
    for layer in layers:
        add_hook_to_module(layer.base_layer, AlignDevicesHook(execution_device="cpu"))
    close(logits(ours), logits(theirs))
    assert ["sits on base_layer" in why for why in fastlora.report(ours).left.values()] == [True]
    add_hook_to_module(layers[1], AlignDevicesHook(execution_device="cpu"))
    assert ["a device hook has replaced" in why for why in fastlora.report(ours).left.values()] == [True]


def test_a_class_derived_from_ours_runs_but_is_not_taken_back():
    """As FSDP2 derives one."""
    model = fastlora.accelerate(wrap(nn.Linear(8, 8), r=2))
    layer = model.model["lin"]
    layer.__class__ = type("FSDPLinear", (type(layer),), {})
    assert fastlora.report(model).left == {}
    with pytest.raises(ConfigError, match="FSDPLinear was derived"):
        fastlora.decelerate(model)


def test_the_report_of_own_and_peft_layers():
    from tests.layer_tools import make

    both = nn.ModuleDict({"own": make("qlora", use_dora=True), "theirs": wrap(nn.Linear(64, 32), r=4)})
    text = str(fastlora.report(both))
    assert "not accelerated: call fastlora.accelerate(model)" in text
    assert "1 of 2 layers fused" in text
    fastlora.accelerate(both)
    report = fastlora.report(both, memory=True)
    assert [(row.name, row.kind, row.path) for row in report] == [
        ("own", "DoRA over nf4", "fused"),
        ("theirs.model.lin", "LoRA over float32", "fused"),
    ]
    assert "saved/token" in str(report)
    assert "16 B" in str(report)
    assert "2 of 2 layers fused" in str(report)


def test_peft_is_only_needed_when_used():
    code = """
import sys, torch
sys.modules["peft"] = None
import fastlora
layer = fastlora.LoraLinear(8, 8)
print(len(fastlora.report(layer)))
try:
    fastlora.accelerate(layer)
except fastlora.ConfigError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    said = "PEFT models need the peft package: pip install 'fastlora[peft]'"
    assert done.stdout.splitlines() == ["1", said], done.stderr


def test_a_batch_of_one_reason_at_a_time():
    """The report shows the reason of the last call, not of one before."""
    ours = fastlora.accelerate(shake(adapted(llama()))).eval()
    with torch.no_grad():
        ours(input_ids=batch(), adapter_names=["default"] * 2)
    ours.merge_adapter()
    assert set(fastlora.report(ours).left.values()) == {"its adapters are merged into the base weight"}
