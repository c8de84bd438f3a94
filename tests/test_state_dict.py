"""State dicts: strict round trips, bitsandbytes' keys both ways, and refusals that leave the layer to the byte."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import nn

import fastlora
from fastlora import ConfigError, LoraLinear, QLoraLinear, QuantizedWeight, StateDictError
from fastlora.math import nf4
from tests.layer_tools import clone_state, make, near, same, shake, snapshot

VARIANTS = {
    "dense": ("lora", {}),
    "dense-bf16": ("lora", {"dtype": torch.bfloat16}),
    "dense-dora": ("lora", {"use_dora": True}),
    "nested": ("qlora", {}),
    "plain": ("qlora", {"double_quant": False}),
    "fp4": ("qlora", {"quant_type": "fp4", "blocksize": 128}),
    "nested-dora": ("qlora", {"use_dora": True, "adapter_dtype": torch.bfloat16}),
    "no-bias": ("qlora", {"bias": False}),
    "odd": ("qlora", {"k": 33, "n": 7}),
}


def build(variant, seed=0):
    """A layer whose every tensor depends on the seed."""
    kind, fields = VARIANTS[variant]
    fields = dict(fields)
    k, n, bias = fields.pop("k", 48), fields.pop("n", 40), fields.pop("bias", True)
    layer = make(kind, k, n, bias, **fields)
    layer.add_adapter("second", r=2)
    linear = nn.Linear(k, n, bias)
    linear.weight.data = torch.randn(n, k, generator=torch.Generator().manual_seed(seed))
    if kind == "qlora":
        fresh = QLoraLinear.from_linear(
            linear, r=1, quant_type=layer.quant_type, blocksize=layer.blocksize, double_quant=layer.double_quant
        )
        layer._put_weight(fresh.weight)
    else:
        layer.weight.data = linear.weight.data.to(layer.weight.dtype)
    if bias:
        layer.bias.data = torch.randn(n, generator=torch.Generator().manual_seed(seed)).to(layer.bias.dtype)
    return shake(layer, seed)


def with_custom_code(layer):
    """The same 4-bit layer with a table of its own, as torchao's weights have."""
    weight = layer.weight
    code = nf4.table(weight.quant_type) * 0.97
    packed = weight.pack()._replace(code=nf4.as_bytes(code))
    layer._put_weight(QuantizedWeight(packed, weight.dtype))
    return layer


# --- round trips ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("assign", [False, True])
def test_strict_round_trip(variant, assign):
    one, two = build(variant, 1), build(variant, 2)
    assert snapshot(one) != snapshot(two)
    given = clone_state(one)
    missing, unexpected = two.load_state_dict(given, strict=True, assign=assign)
    assert not missing and not unexpected
    assert snapshot(two) == snapshot(one)
    x = torch.randn(3, one.in_features, dtype=torch.bfloat16 if variant == "dense-bf16" else torch.float32)
    same(two(x), one(x))
    for value in given.values():
        value.view(-1)[:1].view(torch.uint8).bitwise_xor_(255)
    assert (snapshot(two) == snapshot(one)) == (not assign)


@pytest.mark.parametrize("variant", ["dense", "nested", "nested-dora"])
def test_parameters_stay_the_same_objects(variant):
    """An optimizer made before loading goes on working."""
    layer = build(variant, 1)
    trained = {name: p for name, p in layer.named_parameters() if p.requires_grad or name.startswith("lora")}
    layer.load_state_dict(build(variant, 2).state_dict())
    for name, parameter in trained.items():
        assert dict(layer.named_parameters())[name] is parameter


@pytest.mark.parametrize("variant", ["plain", "nested", "fp4"])
def test_a_custom_code_survives(variant):
    one, two = with_custom_code(build(variant, 1)), build(variant, 2)
    assert "weight.code_table" in one.state_dict()
    two.load_state_dict(clone_state(one))
    assert snapshot(two) == snapshot(one)
    same(two.weight.code, one.weight.code)
    near(two.dequantize(torch.float32), 0.97 * build(variant, 1).dequantize(torch.float32), units=8)
    two.load_state_dict(build(variant, 2).state_dict())
    assert snapshot(two) == snapshot(build(variant, 2))


@pytest.mark.parametrize(
    "pair", [("nested", "plain"), ("plain", "nested"), ("fp4", "nested"), ("nested", "fp4")], ids="->".join
)
def test_the_format_is_the_state_dicts(pair):
    """A checkpoint of another 4-bit format brings its format along."""
    source, target = build(pair[0], 1), build(pair[1], 2)
    target.load_state_dict(clone_state(source))
    same(target.dequantize(torch.float32), source.dequantize(torch.float32))
    assert target.weight.pack()[5:] == source.weight.pack()[5:]
    assert target.weight.nested == source.weight.nested
    assert set(target.state_dict()) == set(source.state_dict())


@pytest.mark.parametrize("variant", VARIANTS)
def test_safetensors_round_trip(variant, tmp_path):
    from safetensors.torch import load_file, load_model, save_file, save_model

    one, two, three = build(variant, 1), build(variant, 2), build(variant, 3)
    save_file(one.state_dict(), tmp_path / "layer.safetensors")
    two.load_state_dict(load_file(tmp_path / "layer.safetensors"))
    assert snapshot(two) == snapshot(one)
    save_model(one, tmp_path / "model.safetensors")
    load_model(three, tmp_path / "model.safetensors")
    assert snapshot(three) == snapshot(one)


@pytest.mark.parametrize("variant", ["dense", "nested", "nested-dora", "odd"])
def test_inside_a_model(variant):
    def model(seed):
        torch.manual_seed(seed)
        layer = build(variant, seed)
        return nn.Sequential(nn.Linear(4, layer.in_features), nn.ModuleDict({"deep": layer}))

    one, two = model(1), model(2)
    missing, unexpected = two.load_state_dict(clone_state(one))
    assert not missing and not unexpected
    assert snapshot(two) == snapshot(one)
    state = clone_state(one)
    del state["1.deep.lora_A.second"], state["1.deep.lora_B.second"]
    state["1.deep.lora_A.third"] = torch.zeros(1)
    with pytest.raises(RuntimeError, match=r"1\.deep\.lora_A\.second") as caught:
        two.load_state_dict(state)
    assert "1.deep.lora_A.third" in str(caught.value)
    missing, unexpected = two.load_state_dict(state, strict=False)
    assert sorted(missing) == ["1.deep.lora_A.second", "1.deep.lora_B.second"]
    assert unexpected == ["1.deep.lora_A.third"]


@pytest.mark.parametrize("variant", ["dense-dora", "nested-dora"])
def test_adapter_keys_alone(variant):
    """strict=False with only the adapters: they load, the base stays; strict refuses and changes nothing."""
    one, two = build(variant, 1), build(variant, 2)
    before = snapshot(two)
    adapters = {key: value for key, value in clone_state(one).items() if key.startswith("lora")}
    with pytest.raises(StateDictError, match=r"missing keys \['weight"):
        two.load_state_dict(adapters)
    assert snapshot(two) == before
    missing, unexpected = two.load_state_dict(adapters, strict=False)
    assert not unexpected
    assert {key.split(".")[0] for key in missing} == {"weight", "bias"}
    for key, value in two.state_dict().items():
        if key.startswith("lora"):
            same(value, one.state_dict()[key])
    assert {k: v for k, v in snapshot(two).items() if k.startswith(("weight", "bias"))} == {
        k: v for k, v in before.items() if k.startswith(("weight", "bias"))
    }
    base = {key: value for key, value in clone_state(one).items() if not key.startswith("lora")}
    two.load_state_dict(base, strict=False)
    assert snapshot(two) == snapshot(one)


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("lost", ["lora_A.default", "lora_B.default", "lora_magnitude.default", "lora_A.second"])
@pytest.mark.parametrize("inside", [False, True])
def test_half_an_adapter_is_refused(strict, lost, inside):
    layer = build("nested-dora", 2)
    state = clone_state(build("nested-dora", 1))
    del state[lost]
    before = snapshot(layer)
    target = layer
    if inside:
        target, state = nn.Sequential(layer), {f"0.{key}": value for key, value in state.items()}
    with pytest.raises(RuntimeError, match=f"adapter '{lost.split('.')[1]}' is incomplete: missing {lost}"):
        target.load_state_dict(state, strict=strict)
    assert snapshot(layer) == before


# --- refusals ---------------------------------------------------------------------------------------------------------


def edit_json(key, change):
    def edit(state):
        facts = json.loads(bytes(state[key].tolist()))
        facts = change(facts)
        state[key] = torch.tensor(list(json.dumps(facts).encode()), dtype=torch.uint8)

    return edit


def put(key, change):
    def edit(state):
        state[key] = change(state[key])

    return edit


def drop(*keys):
    def edit(state):
        for key in keys:
            del state[key]

    return edit


def set_fact(name, value):
    return lambda facts: {**facts, name: value}


def wrong_entries(key):
    """Damage to one floating-point tensor."""
    return {
        f"{key} missing": drop(key),
        f"{key} short": put(key, lambda t: t[:-1]),
        f"{key} flat": put(key, lambda t: t.reshape(-1, 1, 1)),
        f"{key} int": put(key, lambda t: t.to(torch.int32)),
        f"{key} complex": put(key, lambda t: t.to(torch.complex64)),
        f"{key} a list": put(key, lambda t: t.tolist()),
        f"{key} None": put(key, lambda t: None),
        f"{key} meta": put(key, lambda t: t.to("meta")),
    }


DENSE_DAMAGE = {
    **wrong_entries("weight"),
    **wrong_entries("bias"),
    **wrong_entries("lora_A.default"),
    **wrong_entries("lora_magnitude.default"),
    "a foreign key": lambda state: state.update({"gamma": torch.zeros(3)}),
    "another adapter": lambda state: state.update({"lora_A.third": torch.zeros(3)}),
    "nothing": lambda state: state.clear(),
    "4-bit keys": lambda state: state.update(
        {f"weight.{k}": v for k, v in build("nested").weight.state_dict().items()} | {"weight": state.pop("weight")}
    ),
    "only 4-bit keys": lambda state: state.update(
        [(f"weight.{k}", v) for k, v in build("nested").weight.state_dict().items()]
        + [("bias", state.pop("weight")[:, 0])]
    ),
}
STATE = "weight.quant_state"
OWN_DAMAGE = {
    **{f"{key} missing": drop(f"weight.{key}") for key in ("packed", "absmax", "nested_absmax", "nested_offset")},
    "quant_state missing": drop(STATE),
    "both nested parts missing": drop("weight.nested_absmax", "weight.nested_offset"),
    "packed truncated": put("weight.packed", lambda t: t[:-1]),
    "packed flat": put("weight.packed", lambda t: t.flatten()),
    "packed float": put("weight.packed", lambda t: t.float()),
    "packed int8": put("weight.packed", lambda t: t.view(torch.int8)),
    "packed a list": put("weight.packed", lambda t: t.tolist()),
    "packed meta": put("weight.packed", lambda t: t.to("meta")),
    "absmax meta": put("weight.absmax", lambda t: t.to("meta")),
    "absmax truncated": put("weight.absmax", lambda t: t[:-1]),
    "absmax float": put("weight.absmax", lambda t: t.float()),
    "nested_absmax long": put("weight.nested_absmax", lambda t: torch.cat([t, t])),
    "offset as fp32": put("weight.nested_offset", lambda t: t.view(torch.float32)),
    "offset empty": put("weight.nested_offset", lambda t: t[:0]),
    "code of 15": lambda state: state.update({"weight.code_table": torch.zeros(15, 4, dtype=torch.uint8)}),
    "an unknown part": lambda state: state.update({"weight.zero_point": torch.zeros(1, dtype=torch.uint8)}),
    "a dense weight too": lambda state: state.update({"weight": torch.zeros(40, 48)}),
    "state truncated": put(STATE, lambda t: t[:20]),
    "state empty": put(STATE, lambda t: t[:0]),
    "state of zeros": put(STATE, torch.zeros_like),
    "state not UTF-8": put(STATE, lambda t: torch.full_like(t, 255)),
    "state of large numbers": put(STATE, lambda t: t.to(torch.int64) + 1000),
    "state negative": put(STATE, lambda t: -t.to(torch.int64)),
    "state float": put(STATE, lambda t: t.float()),
    "state 0-d": put(STATE, lambda t: t[0]),
    "state 2-d": put(STATE, lambda t: t.reshape(2, -1)),
    "state meta": put(STATE, lambda t: t.to("meta")),
    "state a list": edit_json(STATE, lambda facts: [1, 2]),
    "state a number": edit_json(STATE, lambda facts: 7),
    "state null": edit_json(STATE, lambda facts: None),
    "no shape": edit_json(STATE, lambda facts: {k: v for k, v in facts.items() if k != "shape"}),
    "transposed shape": edit_json(STATE, set_fact("shape", [48, 40])),
    "flat shape": edit_json(STATE, set_fact("shape", [1920])),
    "shape of words": edit_json(STATE, set_fact("shape", ["40", "48"])),
    "shape a word": edit_json(STATE, set_fact("shape", "ab")),
    "shape of floats": edit_json(STATE, set_fact("shape", [40.0, 48.0])),
    "shape negative": edit_json(STATE, set_fact("shape", [-40, -48])),
    "shape null": edit_json(STATE, set_fact("shape", None)),
    "nf5": edit_json(STATE, set_fact("quant_type", "nf5")),
    "quant_type null": edit_json(STATE, set_fact("quant_type", None)),
    "blocksize 63": edit_json(STATE, set_fact("blocksize", 63)),
    "blocksize 0": edit_json(STATE, set_fact("blocksize", 0)),
    "blocksize a word": edit_json(STATE, set_fact("blocksize", "64")),
    "blocksize float": edit_json(STATE, set_fact("blocksize", 32.0)),
    "other blocksize": edit_json(STATE, set_fact("blocksize", 64)),
    "unknown dtype": edit_json(STATE, set_fact("dtype", "float12")),
    "dtype a module": edit_json(STATE, set_fact("dtype", "nn")),
    "dtype a function": edit_json(STATE, set_fact("dtype", "load")),
    "dtype int8": edit_json(STATE, set_fact("dtype", "int8")),
    "dtype a number": edit_json(STATE, set_fact("dtype", 32)),
}


def refused(layer, state, inside):
    """Loading raises a StateDictError (a RuntimeError, from a whole model) and leaves everything as it was."""
    before = snapshot(layer)
    if inside:
        with pytest.raises(RuntimeError, match="Error.* in loading state_dict"):
            nn.Sequential(layer).load_state_dict({f"0.{key}": value for key, value in state.items()})
    else:
        with pytest.raises(StateDictError) as caught:
            layer.load_state_dict(state)
        assert isinstance(caught.value, RuntimeError)
        assert isinstance(caught.value, fastlora.FastloraError)
        assert str(caught.value)
    assert snapshot(layer) == before


@pytest.mark.parametrize("damage", DENSE_DAMAGE)
def test_a_damaged_dense_state_dict_leaves_the_layer_whole(damage):
    state = clone_state(build("dense-dora", 1))
    DENSE_DAMAGE[damage](state)
    refused(build("dense-dora", 2), state, inside=False)


@pytest.mark.parametrize("damage", OWN_DAMAGE)
@pytest.mark.parametrize("inside", [False, True])
def test_a_damaged_4bit_state_dict_leaves_the_layer_whole(damage, inside):
    state = clone_state(build("nested", 1))
    OWN_DAMAGE[damage](state)
    refused(build("nested", 2), state, inside)


@pytest.mark.parametrize("variant", ["plain", "nested"])
@pytest.mark.parametrize("cut", [0, 1, 2, 3, 4, 5, 6, 7])
def test_every_truncation_is_refused(variant, cut):
    state = clone_state(build(variant, 1))
    keys = list(state)
    if cut >= len(keys):
        pytest.skip("the state dict is shorter")
    refused(build(variant, 2), {key: state[key] for key in keys[:cut]}, inside=False)


def test_a_layer_of_other_features_is_refused():
    for variant in ("dense", "nested"):
        kind, _ = VARIANTS[variant]
        refused(build(variant), clone_state(shake(make(kind, 40, 48))), inside=False)
        refused(build(variant), clone_state(shake(make(kind, 48, 40, r=5))), inside=False)
    refused(build("dense"), nn.Conv1d(3, 4, 2).state_dict(), inside=False)
    refused(build("nested"), nn.Conv1d(3, 4, 2).state_dict(), inside=False)


@pytest.mark.parametrize("tie", [torch.nan, torch.inf])
def test_a_float_weight_with_nan_is_refused_by_a_quantized_layer(tie):
    state = clone_state(build("dense", 1))
    state["weight"][3, 3] = tie
    refused(build("nested", 2), state, inside=False)


@pytest.mark.parametrize("variant", ["nested", "plain", "fp4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_float_weight_into_a_quantized_layer_is_quantized_there(variant, dtype):
    layer = build(variant, 2)
    weight = torch.randn(40, 48).to(dtype)
    state = clone_state(layer)
    state = {"weight": weight, **{key: value for key, value in state.items() if not key.startswith("weight.")}}
    layer.load_state_dict(state)
    own = fastlora.functional.quantize(weight, layer.quant_type, layer.blocksize, layer.double_quant)
    same(layer.dequantize(), own.dequantize())
    assert layer.weight.dtype == dtype
    refused(layer, {**state, "weight": weight.T.contiguous()}, inside=False)
    refused(layer, {**state, "weight": weight.double()}, inside=False)


def test_a_plain_linear_loads_into_both_layers_without_strictness():
    linear = nn.Linear(48, 40)
    for variant in ("dense", "nested"):
        layer = build(variant)
        missing, unexpected = layer.load_state_dict(linear.state_dict(), strict=False)
        assert not unexpected
        assert all(key.startswith("lora") for key in missing)
        same(layer.bias.detach(), linear.bias.detach())


def test_requires_grad_survives_loading():
    layer = build("nested-dora", 1)
    layer.bias.requires_grad_()
    layer.lora_A["default"].requires_grad_(False)
    flags = {name: p.requires_grad for name, p in layer.named_parameters()}
    for assign in (False, True):
        layer.load_state_dict(clone_state(build("nested-dora", 2)), assign=assign)
        assert {name: p.requires_grad for name, p in layer.named_parameters()} == flags


# --- bitsandbytes' keys without bitsandbytes --------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["plain", "nested", "fp4", "odd", "no-bias"])
def test_bnb_keys_out_and_in(variant):
    one, two = build(variant, 1), build(variant, 2)
    state = fastlora.bnb_state_dict(one)
    assert "weight.packed" not in state and "weight.quant_state" not in state
    assert state["weight"].data_ptr() == one.weight.packed.data_ptr()
    two.load_state_dict(state)
    assert snapshot(two) == snapshot(one)


@pytest.mark.parametrize("variant", ["plain", "fp4"])
def test_a_custom_code_goes_through_bnb_keys(variant):
    one, two = with_custom_code(build(variant, 1)), build(variant, 2)
    two.load_state_dict(fastlora.bnb_state_dict(one))
    assert snapshot(two) == snapshot(one)


def test_bnb_state_dict_of_a_model_renames_only_4bit_weights():
    model = nn.ModuleDict({"a": build("nested"), "b": build("dense"), "c": nn.LayerNorm(3)})
    own, theirs = model.state_dict(), fastlora.bnb_state_dict(model)
    kept = {key for key in own if not key.startswith("a.weight.")}
    assert kept <= set(theirs)
    assert {key for key in theirs if key not in kept} == {
        "a.weight",
        "a.weight.absmax",
        "a.weight.quant_map",
        "a.weight.nested_absmax",
        "a.weight.nested_quant_map",
        "a.weight.quant_state.bitsandbytes__nf4",
    }
    weight, other = build("nested", 1).weight, build("nested", 2).weight
    other.__dict__.pop("_loaded_by_layer")
    other.load_state_dict(fastlora.bnb_state_dict(weight))
    same(other.dequantize(), weight.dequantize())


BNB = "weight.quant_state.bitsandbytes__nf4"
BNB_DAMAGE = {
    **{
        f"{key} missing": drop(key)
        for key in (
            "weight",
            "weight.absmax",
            "weight.quant_map",
            "weight.nested_absmax",
            "weight.nested_quant_map",
            BNB,
        )
    },
    "data truncated": put("weight", lambda t: t[:-1]),
    "data padded": put("weight", lambda t: torch.cat([t, t[:1]])),
    "data a list": put("weight", lambda t: t.tolist()),
    "data meta": put("weight", lambda t: t.to("meta")),
    "absmax short": put("weight.absmax", lambda t: t[:-1]),
    "absmax float beside nested": put("weight.absmax", lambda t: t.float()),
    "nested_absmax long": put("weight.nested_absmax", lambda t: torch.cat([t, t])),
    "quant_map of 15": put("weight.quant_map", lambda t: t[:15]),
    "nested map of 255": put("weight.nested_quant_map", lambda t: t[:255]),
    "another nested map": put("weight.nested_quant_map", lambda t: t * 0.5),
    "two states": lambda state: state.update({BNB.replace("nf4", "fp4"): state[BNB]}),
    "json truncated": put(BNB, lambda t: t[:-5]),
    "json of large numbers": put(BNB, lambda t: t.to(torch.int64) + 1000),
    "json float": put(BNB, lambda t: t.float()),
    "json 0-d": put(BNB, lambda t: t[0]),
    "json a list": edit_json(BNB, lambda facts: [1]),
    "no shape": edit_json(BNB, lambda facts: {k: v for k, v in facts.items() if k != "shape"}),
    "shape of words": edit_json(BNB, set_fact("shape", ["a", "b"])),
    "shape null": edit_json(BNB, set_fact("shape", None)),
    "transposed": edit_json(BNB, set_fact("shape", [48, 40])),
    "blocksize 48": edit_json(BNB, set_fact("blocksize", 48)),
    "blocksize a word": edit_json(BNB, set_fact("blocksize", "32")),
    "nested blocksize 128": edit_json(BNB, set_fact("nested_blocksize", 128)),
    "offset a word": edit_json(BNB, set_fact("nested_offset", "x")),
    "offset null": edit_json(BNB, set_fact("nested_offset", None)),
    "no offset": edit_json(BNB, lambda facts: {k: v for k, v in facts.items() if k != "nested_offset"}),
    "dtype a module": edit_json(BNB, set_fact("dtype", "nn")),
    "dtype unknown": edit_json(BNB, set_fact("dtype", "float12")),
    "int8": edit_json(BNB, set_fact("quant_type", "int8")),
    "our keys mixed in": lambda state: state.update({"weight.packed": torch.zeros(960, 1, dtype=torch.uint8)}),
}


@pytest.mark.parametrize("damage", BNB_DAMAGE)
@pytest.mark.parametrize("inside", [False, True])
def test_damaged_bnb_keys_leave_the_layer_whole(damage, inside):
    state = {key: value.clone() for key, value in fastlora.bnb_state_dict(build("nested", 1)).items()}
    BNB_DAMAGE[damage](state)
    refused(build("nested", 2), state, inside)


# --- a weight by itself -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("double_quant", [False, True])
def test_a_quantized_weight_alone_round_trips(double_quant):
    one = fastlora.functional.quantize(torch.randn(33, 7), "nf4", 32, double_quant)
    two = QuantizedWeight.empty((33, 7), "nf4", 32, double_quant)
    two.load_state_dict(one.state_dict())
    assert snapshot(two) == snapshot(one)
    three = copy.deepcopy(two)
    with pytest.raises(RuntimeError, match="missing 'absmax'"):
        three.load_state_dict({key: value for key, value in one.state_dict().items() if key != "absmax"})
    assert snapshot(three) == snapshot(one)
    with pytest.raises(RuntimeError, match=r"expected a weight of shape \(7, 33\), got \(33, 7\)"):
        QuantizedWeight.empty((7, 33), "nf4", 32, double_quant).load_state_dict(one.state_dict())
    meta = QuantizedWeight.empty((33, 7), "nf4", 32, double_quant, device="meta")
    assert meta.packed.is_meta
    meta.load_state_dict(one.state_dict(), assign=True)
    assert snapshot(meta) == snapshot(one)


class NF4Tensor:
    """Stand-in for torchao's NF4Tensor (torchao is not installed): the attributes `from_torchao` reads."""

    def __init__(self, w, block_size=64, scaler_block_size=256):
        self.shape, self.dtype, self.block_size, self.scaler_block_size = (
            w.shape,
            w.dtype,
            block_size,
            scaler_block_size,
        )
        blocks = w.flatten().view(-1, block_size)
        absmax = blocks.abs().amax(1)
        self.mean = absmax.mean()
        groups = (absmax - self.mean).view(-1, scaler_block_size)
        self.quantization_factor = 128 / groups.abs().amax(1).clamp_min(1e-12)
        scaled = (groups * self.quantization_factor[:, None]).round().clamp(-128, 127)
        self.quantized_scalers = scaled.to(torch.int8).flatten()
        self.nf4 = (nf4.table("nf4") * 10000).round().div(10000).to(w.dtype)
        distance = (blocks / absmax[:, None]).unsqueeze(-1) - self.nf4
        codes = distance.abs().argmin(-1).flatten()
        self.quantized_data = (codes[0::2] << 4 | codes[1::2]).to(torch.uint8)
        self.codes = codes

    def dequantize_scalers(self, scalers, factor, block):
        return (scalers.view(-1, block) / factor[:, None]).flatten().to(self.dtype) + self.mean

    def exact(self):
        scale = self.dequantize_scalers(self.quantized_scalers, self.quantization_factor, self.scaler_block_size)
        return (self.nf4[self.codes].view(-1, self.block_size) * scale[:, None]).view(self.shape)


def test_from_torchao_takes_codes_table_and_scales():
    theirs = NF4Tensor(torch.randn(128, 128))
    ours = QuantizedWeight.from_torchao(theirs)
    same(ours.dequantize(), theirs.exact())
    assert ours.shape == (128, 128)
    assert ours.code_table is not None
    assert ours.packed.data_ptr() == theirs.quantized_data.data_ptr()
    same(ours.code, theirs.nf4)
    with pytest.raises(TypeError, match="expected a torchao NF4Tensor, got Tensor without quantized_data"):
        QuantizedWeight.from_torchao(torch.randn(4, 4))


def test_empty_layer_types_still_say_what_they_want():
    with pytest.raises(ConfigError, match="blocksize"):
        QuantizedWeight.empty((4, 4), "nf4", 5)
    with pytest.raises(TypeError, match="not called"):
        fastlora.functional.quantize(torch.randn(4, 4))(torch.randn(4))
    assert isinstance(LoraLinear(4, 4, r=1).weight, nn.Parameter)
