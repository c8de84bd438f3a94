"""Accelerating bitsandbytes' 4-bit layers: the same bytes, no copy, and its CPU layout is never misread."""

from __future__ import annotations

import copy

import pytest
import torch

import fastlora
from fastlora import testing
from fastlora.nn import accelerate as accelerating
from fastlora.testing import Case
from tests.accelerate_tools import adapted, close, fused, layer_of, linear_4bit, llama, logits, run_layer, shake, twins

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft", "ignore::UserWarning:torch")
STORAGES = [torch.uint8, torch.bfloat16, torch.float16, torch.float32]
CASE = Case(m=5, n=64, k=128, r=4, quant="nf4", bias=True)


def repacks() -> bool:
    """Whether bitsandbytes repacks weights on this host."""
    inputs = testing.make_inputs(CASE)
    base = linear_4bit(inputs.weight, None, torch.float32).eval()
    with torch.no_grad():
        base(inputs.x)
    return getattr(base.weight.quant_state, "packing_format_for_cpu", False)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("quant", ["nf4", "fp4"])
@pytest.mark.parametrize("storage", STORAGES, ids=str)
def test_the_bytes_are_used_where_they_are(nested, quant, storage):
    case = Case(m=5, n=64, k=128, r=4, quant=quant, nested=nested)
    inputs = testing.make_inputs(case)
    layer = layer_of(case, inputs)
    layer.base_layer = linear_4bit(inputs.weight, None, torch.float32, storage)
    weight, state = layer.base_layer.weight, layer.base_layer.weight.quant_state
    at = (weight.data_ptr(), state.absmax.data_ptr(), id(weight), id(state))
    fastlora.accelerate(layer)
    out = run_layer(layer, inputs)
    assert testing.judge(case, inputs, out) == []
    adopted = layer._fastlora_adopted.packed
    assert (adopted.packed.data_ptr(), adopted.absmax.data_ptr()) == at[:2]
    assert adopted.packed.untyped_storage().data_ptr() == weight.untyped_storage().data_ptr()
    if nested:
        assert adopted.nested_absmax.data_ptr() == state.state2.absmax.data_ptr()
        assert adopted.nested_offset.data_ptr() == state.offset.data_ptr()
    assert (weight.data_ptr(), state.absmax.data_ptr(), id(layer.base_layer.weight), id(weight.quant_state)) == at
    assert weight.dtype == storage
    assert fused(layer)


def test_a_bf16_offset_and_other_converted_parts_are_read_anew_at_every_call():
    case = Case(m=5, n=64, k=128, r=4, quant="nf4", nested=True)
    inputs = testing.make_inputs(case)
    layer = layer_of(case, inputs)
    fastlora.accelerate(layer)
    state = layer.base_layer.weight.quant_state
    want = layer(inputs.x)
    state.offset = state.offset.bfloat16()
    got = layer(inputs.x)
    assert "_fastlora_adopted" not in vars(layer) or layer._fastlora_adopted.parts[5] is not state.offset
    assert 0 < (got - want).abs().max() < 1e-2
    state.offset.mul_(2)  # in place
    assert (layer(inputs.x) - got).abs().max() > 1e-2
    assert fused(layer)


def test_bytes_changed_or_replaced_are_seen():
    inputs = testing.make_inputs(CASE)
    layer = layer_of(CASE, inputs)
    theirs = copy.deepcopy(layer)
    fastlora.accelerate(layer)
    changes = [
        lambda one: one.base_layer.weight.data.bitwise_xor_(0x11),
        lambda one: one.base_layer.weight.quant_state.absmax.mul_(2),
        lambda one: setattr(one.base_layer.weight, "data", one.base_layer.weight.data.flip(0)),
        lambda one: setattr(one.base_layer.weight.quant_state, "absmax", one.base_layer.weight.quant_state.absmax / 3),
        lambda one: setattr(one, "base_layer", linear_4bit(testing.make_inputs(CASE).weight, None, torch.float32)),
        lambda one: one.to("cpu"),
    ]
    for change in changes:
        for one in (theirs, layer):
            change(one)
        torch.testing.assert_close(layer(inputs.x), theirs(inputs.x), rtol=1e-4, atol=1e-4)
        assert fused(layer)


def test_saving_and_loading_bitsandbytes_keys_goes_on():
    inputs = testing.make_inputs(CASE)
    layer = layer_of(CASE, inputs)
    before = {key: value.clone() for key, value in layer.state_dict().items()}
    fastlora.accelerate(layer)
    layer(inputs.x)
    after = layer.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[key], before[key]) for key in before)


def test_the_base_bias_is_never_cast_in_place():
    """bitsandbytes casts it to the compute dtype for good."""
    inputs = testing.make_inputs(CASE)
    layer = layer_of(CASE, inputs)
    fastlora.accelerate(layer)
    layer.base_layer.compute_dtype = torch.bfloat16
    layer(inputs.x.bfloat16())
    assert fused(layer)
    assert layer.base_layer.bias.dtype == torch.float32


# --- the CPU-packed layout --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nested", [False, True])
def test_evaluation_does_not_repack(nested):
    """On AVX512_BF16 hosts bitsandbytes rewrites the weight in an eval forward and training then has zero gradients."""
    model = fastlora.accelerate(shake(adapted(llama(quant="nf4", nested=nested))))
    states = {name: layer.base_layer.weight.quant_state for name, layer in accelerating.tuner_layers(model)}
    want = logits(model.train())
    model.eval()
    assert torch.equal(logits(model), want)
    with model.disable_adapter():
        logits(model)
    with torch.no_grad():
        model(input_ids=torch.ones(2, 3, dtype=torch.long), adapter_names=["default", "__base__"])
    assert not any(getattr(state, "packing_format_for_cpu", False) for state in states.values())
    assert torch.equal(logits(model), want)
    assert fastlora.report(model).left == {}
    layer = dict(accelerating.tuner_layers(model)).popitem()[1]
    assert layer.base_layer.support_avx512bf16_for_cpu == repacks()


@pytest.mark.skipif(not repacks(), reason="bitsandbytes repacks on AVX512_BF16 hosts only")
@pytest.mark.parametrize("nested", [False, True])
def test_a_repacked_weight_is_refused_not_misread(nested):
    theirs, ours = (shake(adapted(llama(quant="nf4", nested=nested))).eval() for _ in range(2))
    want = logits(theirs)
    logits(ours)
    with pytest.warns(UserWarning, match="repacked the base weight for its CPU kernel"):
        fastlora.accelerate(ours)
    assert torch.equal(logits(ours), want)
    assert len(fastlora.report(ours).left) == 14
    # Saving makes bitsandbytes undo it (with rounded scales): a nested weight can then be read again.
    ours.state_dict()
    if nested:
        ours.train()
        close(logits(ours), logits(theirs.train()), 2e-2)
        assert fastlora.report(ours).left == {}
    else:
        assert len(fastlora.report(ours).left) in (0, 14)


def test_a_layout_that_says_it_is_packed_is_refused_on_any_host():
    inputs = testing.make_inputs(CASE)
    layer = layer_of(CASE, inputs)
    fastlora.accelerate(layer)
    layer(inputs.x)
    layer.base_layer.weight.quant_state.packing_format_for_cpu = True
    assert "repacked" in fastlora.report(layer)[0].why


@pytest.mark.parametrize("what", ["no state", "truncated", "another nested map"])
def test_broken_weights_are_left_to_bitsandbytes(what):
    said = {"no state": "not quantized", "truncated": "truncated"}.get(what, "dynamic map")
    case = Case(m=5, n=64, k=128, r=4, quant="nf4", nested=True)
    inputs = testing.make_inputs(case)
    layer = layer_of(case, inputs)
    weight = layer.base_layer.weight
    if what == "no state":
        weight.quant_state = layer.base_layer.quant_state = None
    elif what == "truncated":
        weight.data = weight.data[:-3].clone()
    else:
        weight.quant_state.state2.code = weight.quant_state.state2.code * 2
    with pytest.warns(UserWarning, match=said):
        fastlora.accelerate(layer)


def test_odd_rows_are_right_where_bitsandbytes_is_not():
    """K = 48 is not a multiple of the blocksize: bitsandbytes' CPU path misreads such weights."""
    case = Case(m=5, n=32, k=48, r=4, quant="nf4")
    inputs = testing.make_inputs(case)
    layer = layer_of(case, inputs)
    fastlora.accelerate(layer)
    assert testing.judge(case, inputs, run_layer(layer, inputs)) == []


def test_deepcopy_of_the_model_before_and_after():
    theirs, ours = twins(lambda: shake(adapted(llama(quant="fp4", nested=False))).train())
    close(logits(ours), logits(theirs))
    again = copy.deepcopy(ours)
    close(logits(again), logits(theirs))
    assert fastlora.report(again).left == {}
