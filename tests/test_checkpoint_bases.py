"""Adapters on disk whose init rewrites the base: PiSSA, OLoRA and LoftQ."""

from __future__ import annotations

import json

import peft
import pytest

import fastlora
from fastlora import ConfigError, FastloraError
from tests import checkpoint_tools
from tests.checkpoint_tools import CONFIG, WEIGHTS, converted, metadata, peft_loads, peft_saves
from tests.model_tools import close, contents, llama, logits, move, unchanged

base_logits = checkpoint_tools.base_logits


@pytest.mark.parametrize("init", ["pissa", "olora"])
@pytest.mark.parametrize("scaled", [{"lora_alpha": 4}, {"lora_alpha": 10, "use_rslora": True}], ids=["s=1", "s=5"])
def test_pissa_and_olora_reload_onto_the_original_base(init, scaled, tmp_path, base_logits):
    model = move(converted(r=4, init_lora_weights=init, **scaled))
    want = logits(model)
    fastlora.save_adapter(model, tmp_path)
    assert json.loads((tmp_path / CONFIG).read_text())["init_lora_weights"] == init
    close(logits(peft_loads(tmp_path)), want, base_logits, 1e-4)
    close(logits(fastlora.load_adapter(llama(), tmp_path)), want, base_logits, 1e-4)
    own = converted(r=4, init_lora_weights=init, **scaled)
    close(logits(fastlora.load_adapter(own, tmp_path)), want, base_logits, 1e-4)


BOUNDED = {"init_lora_weights": "pissa", "init_bound": 0.1}


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_pissa_and_olora_of_peft(init, tmp_path, base_logits):
    fields = {"r": 4, "lora_alpha": 10, "init_lora_weights": init}
    want = logits(peft_saves(fields, tmp_path))
    close(logits(peft_loads(tmp_path)), want, base_logits, 1e-4)
    close(logits(fastlora.load_adapter(llama(), tmp_path)), want, base_logits, 1e-4)
    close(logits(fastlora.load_adapter(converted(**fields), tmp_path)), want, base_logits, 1e-4)


@pytest.mark.parametrize("fields", [{"init_lora_weights": "pissa_niter_1"}, BOUNDED], ids=["random", "bounded"])
def test_a_base_peft_cannot_repeat_is_right_with_us_and_refused_by_peft(fields, tmp_path, base_logits):
    """It depends on random probes or on our own clamping: PEFT would start from another base in silence."""
    model = move(converted(r=4, **fields))
    want = logits(model)
    fastlora.save_adapter(model, tmp_path)
    close(logits(fastlora.load_adapter(llama(), tmp_path)), want, base_logits, 1e-4)
    fastlora.save_adapter(fastlora.load_adapter(llama(), tmp_path), tmp_path / "again")
    assert contents(tmp_path / "again").keys() == {CONFIG, WEIGHTS}
    assert metadata(tmp_path / "again") == metadata(tmp_path)
    with pytest.raises(ValueError, match="Unknown initialization"):
        peft.PeftModel.from_pretrained(llama(), str(tmp_path))
    other = converted(r=4, **fields | {"init_seed": 1, "init_bound": 0.3})
    with unchanged(other), pytest.raises(ConfigError, match="pissa"):
        fastlora.load_adapter(other, tmp_path)


def test_randomised_pissa_of_peft_is_refused(tmp_path):
    """PEFT's random probes are nowhere in its file."""
    peft_saves({"r": 4, "lora_alpha": 4, "init_lora_weights": "pissa_niter_1"}, tmp_path)
    for model in (llama(), converted(r=4, lora_alpha=4, init_lora_weights="pissa_niter_1")):
        with unchanged(model), pytest.raises(FastloraError, match="pissa_niter_1"):
            fastlora.load_adapter(model, tmp_path)


def test_loftq_is_refused_by_peft_without_its_quantizer(tmp_path):
    fastlora.save_adapter(move(converted("nf4", r=4, init_lora_weights="loftq")), tmp_path)
    with pytest.raises((ValueError, ImportError), match="loftq|scipy"):
        peft.PeftModel.from_pretrained(llama(), str(tmp_path))


def test_a_plain_adapter_is_not_loaded_over_one_that_rewrote_the_base(tmp_path):
    fastlora.save_adapter(move(converted(r=4)), tmp_path)
    for model in (converted(r=4, init_lora_weights="olora"), converted("nf4", r=4, init_lora_weights="pissa")):
        with unchanged(model), pytest.raises(ConfigError, match="olora|pissa"):
            fastlora.load_adapter(model, tmp_path)


@pytest.mark.parametrize("init", ["pissa", "olora", "loftq"])
def test_an_adapter_of_a_rewritten_base_is_refused_by_any_other_base(init, tmp_path):
    quantize = "nf4" if init == "loftq" else None
    fastlora.save_adapter(move(converted(quantize, r=4, init_lora_weights=init)), tmp_path)
    for model in (converted(r=4), converted("nf4", r=4), converted(r=4, adapter_name="x")):
        with unchanged(model), pytest.raises(ConfigError, match=init):
            fastlora.load_adapter(model, tmp_path)


def test_olora_with_another_scale_is_another_base(tmp_path):
    """OLoRA takes s * Q R away from the base: an adapter trained with another s does not fit it."""
    fastlora.save_adapter(move(converted(r=4, lora_alpha=8, init_lora_weights="olora")), tmp_path)
    model = converted(r=4, lora_alpha=16, init_lora_weights="olora")
    with unchanged(model), pytest.raises(FastloraError, match="olora"):
        fastlora.load_adapter(model, tmp_path)


def test_loftq_into_a_plain_model_is_refused_clearly(tmp_path):
    fastlora.save_adapter(move(converted("nf4", r=4, init_lora_weights="loftq")), tmp_path)
    model = llama()
    with unchanged(model), pytest.raises(FastloraError, match="loftq"):
        fastlora.load_adapter(model, tmp_path)


@pytest.mark.parametrize("init", ["loftq", "pissa", "olora"])
def test_quantized_and_rewritten_loads_into_the_same_conversion(init, tmp_path, base_logits):
    fields = {"r": 4, "lora_alpha": 10, "init_lora_weights": init}
    model = move(converted("nf4", **fields))
    fastlora.save_adapter(model, tmp_path)
    again = fastlora.load_adapter(converted("nf4", **fields), tmp_path)
    close(logits(again), logits(model), base_logits)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_dense_rewritten_adapter_is_not_put_on_a_plain_model_twice(init, tmp_path):
    """Loading under a new name into a model whose base was rewritten already would rewrite it again."""
    fastlora.save_adapter(move(converted(r=4, init_lora_weights=init)), tmp_path)
    model = fastlora.load_adapter(llama(), tmp_path)
    with unchanged(model), pytest.raises(ConfigError, match=init):
        fastlora.load_adapter(model, tmp_path, "second")
