"""Models that accelerate's hooks dispatched: converted, accelerated right; offloaded ones refused or left by name."""

from __future__ import annotations

import copy

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from accelerate.hooks import AlignDevicesHook, add_hook_to_module

import fastlora
from fastlora import ConfigError
from tests.accelerate_tools import adapted, close, llama, logits, shake

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft", "ignore:.*kernels", "ignore::FutureWarning")


@pytest.mark.parametrize("quant", ["", "nf4"])
@pytest.mark.parametrize("first", ["dispatched", "accelerated"])
def test_a_dispatched_peft_model_runs_on_our_kernels(quant, first):
    """What `device_map={"": device}` does: one device, no hooks."""
    plain = fastlora.accelerate(shake(adapted(llama(quant=quant))).eval())
    ours = shake(adapted(llama(quant=quant))).eval()
    if first == "accelerated":
        fastlora.accelerate(ours)
    ours = fastlora.accelerate(dispatch_model(ours, {"": "cpu"}))
    report = fastlora.report(ours)
    assert (len(report.fused), report.left) == (14, {})
    assert torch.equal(logits(ours), logits(plain))


def test_hooks_on_every_module_leave_it_to_peft_and_say_so():
    theirs = shake(adapted(llama())).eval()
    ours = dispatch_model(copy.deepcopy(theirs), {"": "cpu"}, force_hooks=True)
    with pytest.warns(UserWarning, match="left to PEFT: .*hook"):
        fastlora.accelerate(ours)
    assert ["hook" in why for why in fastlora.report(ours).left.values()] == [True] * 14
    assert torch.equal(logits(ours), logits(theirs))


@pytest.mark.parametrize("hooks", [False, True])
def test_a_dispatched_model_converts(hooks):
    fields = {"r": 4, "init_seed": 1, "progress": False}
    want = fastlora.convert(llama(), **fields)
    got = fastlora.convert(dispatch_model(llama(), {"": "cpu"}, force_hooks=hooks), **fields)
    assert torch.equal(logits(got), logits(want))


def test_a_layers_own_device_hook_goes_on():
    model = llama()
    linear = model.model.layers[0].self_attn.q_proj
    hook = AlignDevicesHook(execution_device="cpu", io_same_device=True)
    add_hook_to_module(linear, hook)
    fastlora.convert(model, r=4, init_seed=1, progress=False)
    layer = model.model.layers[0].self_attn.q_proj
    assert isinstance(layer, fastlora.QLoraLinear)
    assert layer._hf_hook is hook
    assert not hasattr(model.model.layers[0].self_attn.k_proj, "_hf_hook")
    assert torch.equal(logits(model), logits(fastlora.convert(llama(), r=4, init_seed=1, progress=False)))


def offloaded(model, where, folder):
    return cpu_offload(model) if where == "cpu" else disk_offload(model, str(folder))


@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_an_offloaded_model_is_refused_by_name_and_stays_as_it_was(where, tmp_path):
    want = logits(llama())
    model = offloaded(llama(), where, tmp_path)
    with pytest.raises(ConfigError, match=r"cannot adapt model\.layers\.0\.self_attn\.q_proj: .*offloaded"):
        fastlora.convert(model, r=4, progress=False)
    assert torch.equal(logits(model), want)
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_an_offloaded_peft_model_is_left_to_peft_by_name(where, tmp_path):
    theirs = shake(adapted(llama())).eval()
    want = logits(theirs)
    model = offloaded(theirs, where, tmp_path)
    with pytest.raises(ConfigError, match="cannot accelerate every layer: a hook, or a replaced forward, sits on"):
        fastlora.accelerate(model, strict=True)
    with pytest.warns(UserWarning, match="left to PEFT: .*hook"):
        fastlora.accelerate(model)
    assert len(fastlora.report(model).left) == 14
    close(logits(model), want)
