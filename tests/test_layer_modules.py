"""The layers as `nn.Module`s: copies, pickles, dtype and device moves, meta, repr, and bad construction."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn

import fastlora
from fastlora import ConfigError, DtypeError, LoraConfig, LoraLinear, QLoraLinear, QuantizedWeight, ShapeError
from tests.layer_tools import BACKENDS, clone_state, forced, make, near, parameters, same, shake, snapshot

KINDS = ("lora", "qlora")
PACKED = ("weight.packed", "weight.absmax", "weight.nested_absmax", "weight.nested_offset", "weight.quant_state")


def dora(kind, **fields):
    return shake(make(kind, use_dora=True, **fields))


def assert_same_function(one, two):
    x = torch.randn(3, one.in_features, dtype=one.lora_A["default"].dtype)
    same(two(x), one(x))


# --- attributes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_attributes_and_shapes_are_the_documented_ones(kind):
    layer = make(kind, 48, 40, r=3, use_dora=True)
    assert (layer.in_features, layer.out_features, layer.merged) == (48, 40, False)
    assert layer.active_adapters == ["default"]
    assert layer.lora_A["default"].shape == (3, 48)
    assert layer.lora_B["default"].shape == (40, 3)
    assert layer.lora_magnitude["default"].shape == (40,)
    assert layer.scaling["default"] == 16 / 3
    assert layer.delta_weight("default").shape == (40, 48)
    assert layer.weight_norm("default").shape == (40,)
    assert layer.weight_norm("default").dtype == torch.float32
    assert layer.dequantize().shape == (40, 48)
    assert layer.dequantize(torch.bfloat16).dtype == torch.bfloat16
    trains = {name for name, p in layer.named_parameters() if p.requires_grad}
    assert trains == {"lora_A.default", "lora_B.default", "lora_magnitude.default"}
    assert isinstance(layer.weight, QuantizedWeight if kind == "qlora" else nn.Parameter)


@pytest.mark.parametrize("kind", KINDS)
def test_state_dict_keys_are_the_documented_ones(kind):
    layer = make(kind, use_dora=True)
    layer.add_adapter("second")
    weight = PACKED if kind == "qlora" else ("weight",)
    own = {"bias", "lora_A.default", "lora_B.default", "lora_magnitude.default", "lora_A.second", "lora_B.second"}
    assert set(layer.state_dict()) == own | set(weight)
    assert set(layer.state_dict()) == {name for name, _ in layer.named_parameters()}
    assert not list(layer.buffers())


def test_a_4bit_weight_is_all_uint8_bytes_of_documented_shapes():
    layer = make("qlora", 50, 33, blocksize=32)
    shapes = {name: tuple(t.shape) for name, t in layer.weight.named_parameters()}
    blocks = -(-50 * 33 // 32)
    assert shapes["packed"] == (825, 1)
    assert shapes["absmax"] == (blocks,)
    assert shapes["nested_absmax"] == (1, 4)
    assert shapes["nested_offset"] == (1, 4)
    assert {t.dtype for t in layer.weight.parameters()} == {torch.uint8}
    assert all(t.dim() for t in layer.weight.parameters())
    plain = make("qlora", 50, 33, blocksize=32, double_quant=False)
    assert plain.weight.absmax.shape == (blocks, 4)
    assert plain.weight.nested_absmax is None
    assert plain.weight.nbytes == sum(p.numel() for p in plain.weight.parameters())
    assert not plain.weight.nested and layer.weight.nested


@pytest.mark.parametrize("kind", KINDS)
def test_repr_says_what_it_is(kind):
    layer = make(kind, r=3)
    layer.add_adapter("second", r=5)
    text = repr(layer)
    for word in (type(layer).__name__, "in_features=48", "out_features=40", "bias=True", "default: r=3", "second: r=5"):
        assert word in text
    assert ("nf4" in text and "nested" in text) == (kind == "qlora")
    assert "merged" not in text
    layer.merge()
    assert "merged=['default']" in repr(layer)


@pytest.mark.parametrize("kind", KINDS)
def test_explain_names_what_would_run(kind):
    text = make(kind, use_dora=True).explain(64)
    for word in ("lora_fwd(m=64, n=40, k=48, r=4", "lora_bwd(m=64", "dora_norm(", "reference", "->"):
        assert word in text
    assert ("nf4/32+nested" in text) == (kind == "qlora")


# --- copies -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies_are_whole_and_independent(kind, how):
    layer = dora(kind, bias=True).eval()
    layer.add_adapter("second", r=2)
    layer.bias.requires_grad_()
    if how == "deepcopy":
        twin = copy.deepcopy(layer)
    elif how == "pickle":
        twin = pickle.loads(pickle.dumps(layer))
    else:
        file = io.BytesIO()
        torch.save(layer, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    assert snapshot(twin) == snapshot(layer)
    assert_same_function(layer, twin)
    before = snapshot(layer)
    for parameter in twin.parameters():
        parameter.data.view(-1)[:1].view(torch.uint8).bitwise_xor_(255)
    twin.set_adapter("second")
    twin.scaling["default"] = 9.0
    twin.delete_adapter("default")
    assert snapshot(layer) == before
    assert snapshot(twin) != before


@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_loads_strictly(kind):
    """Loading works on a copy too: what routes it survives deepcopy and pickle."""
    layer = dora(kind)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        shake(twin, 99)
        twin.load_state_dict(layer.state_dict())
        assert snapshot(twin) == snapshot(layer)


@pytest.mark.parametrize("kind", KINDS)
def test_state_dict_survives_torch_save_with_weights_only(kind):
    layer, other = dora(kind), make(kind, use_dora=True)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    assert type(other.load_state_dict(state)).__name__ == "_IncompatibleKeys"
    assert snapshot(other) == snapshot(layer)
    assert_same_function(layer, other)


# --- moves ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.float32])
@pytest.mark.parametrize("double_quant", [False, True])
def test_dtype_moves_leave_packed_bytes_alone(dtype, double_quant):
    layer = dora("qlora", double_quant=double_quant)
    before = clone_state(layer)
    weight = layer.dequantize(torch.float32)
    for move in (lambda: layer.to(dtype), lambda: layer.to(torch.float32), layer.half, layer.float, layer.bfloat16):
        move()
        for key, value in layer.state_dict().items():
            if key.startswith("weight."):
                same(value, before[key])
    same(layer.dequantize(torch.float32), weight)
    assert layer.to(dtype).lora_A["default"].dtype == dtype
    x = torch.randn(3, 48).to(dtype)
    assert layer(x).dtype == dtype


@pytest.mark.parametrize("kind", KINDS)
def test_to_bfloat16_is_a_bfloat16_layer(kind):
    layer = dora(kind)
    weight = layer.dequantize(torch.float32)
    layer.to(torch.bfloat16)
    expected = {p.dtype for p in layer.parameters()} - {torch.uint8}
    assert expected == {torch.bfloat16}
    x = torch.randn(5, 48).bfloat16()
    y = layer(x)
    assert y.dtype == torch.bfloat16
    a, b, mag = (t.detach().double() for t in parameters(layer))
    w = (weight if kind == "qlora" else weight.bfloat16()).double()
    full = w + layer.scaling["default"] * b @ a
    want = x.double() @ (mag / full.norm(dim=1))[:, None].mul(full).T + layer.bias.double()
    near(y.detach(), want, units=2)
    y.sum().backward()
    assert {p.grad.dtype for p in parameters(layer)} == {torch.bfloat16}


@pytest.mark.parametrize("kind", KINDS)
def test_to_meta_and_empty(kind):
    layer = dora(kind)
    state = clone_state(layer)
    layer.to("meta")
    assert all(t.is_meta for t in layer.state_dict().values())
    assert {k: v.shape for k, v in layer.state_dict().items()} == {k: v.shape for k, v in state.items()}
    layer.to_empty(device="cpu")
    layer.load_state_dict(state)
    for key, value in layer.state_dict().items():
        same(value, state[key])
    assert_same_function(dora(kind), layer)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("use_dora", [False, True])
def test_built_on_meta_and_loaded_by_assignment(kind, use_dora):
    """No byte is made until the state dict brings it; the tensors given are the layer's afterwards."""
    real = shake(make(kind, use_dora=use_dora))
    empty = make(kind, use_dora=use_dora, device="meta")
    assert all(p.is_meta for p in empty.parameters())
    given = clone_state(real)
    empty.load_state_dict(given, assign=True)
    for key, value in empty.state_dict().items():
        assert not value.is_meta, key
        same(value, given[key])
        if key != "weight.quant_state":
            assert value.data_ptr() == given[key].data_ptr(), key
    assert [p.requires_grad for p in empty.parameters()] == [p.requires_grad for p in real.parameters()]
    assert_same_function(real, empty)


@pytest.mark.parametrize("kind", KINDS)
def test_built_on_meta_inside_a_model_and_loaded_by_assignment(kind):
    real = nn.Sequential(shake(make(kind)), nn.Linear(40, 3))
    with torch.device("meta"):
        empty = nn.Sequential(make(kind), nn.Linear(40, 3))
    assert all(p.is_meta for p in empty.parameters())
    empty.load_state_dict(clone_state(real), assign=True)
    x = torch.randn(2, 48)
    same(empty(x), real(x))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("use_dora", [False, True])
def test_a_forward_on_meta_gives_the_shape(kind, use_dora):
    """As `nn.Linear` does; tools that size models run one."""
    layer = make(kind, use_dora=use_dora, device="meta")
    y = layer(torch.empty(2, 3, 48, device="meta"))
    assert y.is_meta
    assert y.shape == (2, 3, 40)


@pytest.mark.parametrize("kind", KINDS)
def test_train_and_eval_reach_the_layer_and_from_linear_keeps_the_mode(kind):
    make_from = LoraLinear.from_linear if kind == "lora" else QLoraLinear.from_linear
    assert not make_from(nn.Linear(8, 8).eval(), r=2).training
    assert make_from(nn.Linear(8, 8), r=2).training
    model = nn.Sequential(make(kind)).eval()
    assert not model[0].training


def test_a_frozen_model_stays_frozen_through_requires_grad():
    """`model.requires_grad_(True)` on a 4-bit layer cannot make bytes trainable; torch says so itself."""
    layer = make("qlora")
    layer.requires_grad_(False)
    assert not any(p.requires_grad for p in layer.parameters())
    layer.set_adapter("default")
    assert layer.lora_A["default"].requires_grad


# --- adopting a linear ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_from_linear_adopts_without_copy(bias, dtype):
    linear = nn.Linear(48, 40, bias, dtype=dtype)
    pointer, x = linear.weight.data_ptr(), torch.randn(4, 48).to(dtype)
    own = linear(x).detach()
    want = nn.functional.linear(x.double(), linear.weight.double(), None if not bias else linear.bias.double()).detach()
    layer = LoraLinear.from_linear(linear, r=3)
    assert layer.weight.data_ptr() == pointer
    assert (layer.bias is not None) == bias
    if bias:
        assert layer.bias.data_ptr() == linear.bias.data_ptr()
    assert not layer.weight.requires_grad
    near(layer(x).detach(), want, own, units=2)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("blocksize", [32, 256, 4096])
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_quantizing_a_linear_keeps_its_weights_within_the_formats_bound(quant_type, blocksize, double_quant, dtype):
    linear = nn.Linear(100, 33, dtype=dtype)
    weight = linear.weight.detach().float().clone()
    layer = QLoraLinear.from_linear(linear, r=2, quant_type=quant_type, blocksize=blocksize, double_quant=double_quant)
    assert layer.weight.dtype == dtype
    assert (layer.quant_type, layer.blocksize, layer.double_quant) == (quant_type, blocksize, double_quant)
    error = (layer.dequantize(torch.float32) - weight).abs().max() / weight.abs().max()
    assert error < (0.16 if quant_type == "nf4" else 0.18)
    qw = fastlora.functional.quantize(weight.to(dtype), quant_type, blocksize, double_quant)
    same(layer.dequantize(), fastlora.functional.dequantize(qw))
    assert layer.weight.absmax_on_grid == (not double_quant and dtype == torch.bfloat16)


def test_from_linear_that_fails_leaves_the_linear_as_it_was():
    class Odd(nn.Linear):
        pass

    bad = nn.Linear(8, 8)
    bad.weight.data[3, 3] = torch.nan
    cases = [
        (QLoraLinear, bad, {}, ShapeError, "NaN or inf: 1 of 1 blocks, first 0"),
        (QLoraLinear, nn.Linear(8, 8).double(), {}, TypeError, "float64"),
        (QLoraLinear, nn.Linear(8, 8), {"blocksize": 100}, ConfigError, "blocksize must be one of 32, 64"),
        (QLoraLinear, nn.Linear(8, 8), {"quant_type": "int4"}, ConfigError, "quant_type must be one of nf4, fp4"),
        (QLoraLinear, nn.Linear(8, 8), {"compute_dtype": torch.int8}, DtypeError, "compute_dtype"),
        (QLoraLinear, Odd(8, 8), {"r": 3, "init_lora_weights": "orthogonal"}, ConfigError, "even rank"),
        (LoraLinear, Odd(8, 8), {"r": 9, "init_lora_weights": "pissa"}, ShapeError, "at most min"),
        (LoraLinear, Odd(8, 8), {"r": 2, "init_lora_weights": "magic"}, ConfigError, "unknown init_lora_weights"),
        (LoraLinear, Odd(8, 8), {"adapter_name": "a.b"}, ConfigError, "without dots"),
        (LoraLinear, Odd(8, 8), {"adapter_name": "items"}, ConfigError, "attribute"),
        (LoraLinear, Odd(8, 8), {"rank": 3}, ConfigError, "unknown config field 'rank'; known: r, lora_alpha"),
    ]
    for kind, linear, fields, error, words in cases:
        linear.bias.data.zero_()
        before = snapshot(linear)
        with pytest.raises(error, match=words):
            kind.from_linear(linear, **fields)
        assert snapshot(linear) == before, words


@pytest.mark.parametrize(
    "other",
    [nn.Conv1d(4, 4, 1), nn.Embedding(4, 4), nn.LayerNorm(4), LoraLinear(4, 4, r=1), None, torch.randn(4, 4)],
    ids=lambda o: type(o).__name__,
)
@pytest.mark.parametrize("kind", [LoraLinear, QLoraLinear])
def test_only_linears_are_adopted(kind, other):
    with pytest.raises(TypeError, match=f"expected an nn.Linear, got {type(other).__name__}"):
        kind.from_linear(other)


def test_weights_of_other_quantizers_are_refused_by_name():
    linear = nn.Linear(8, 8)
    linear.weight = nn.Parameter(torch.zeros(8, 8, dtype=torch.int8), requires_grad=False)
    for kind in (LoraLinear, QLoraLinear):
        with pytest.raises(TypeError, match="int8.*8-bit, GPTQ, AWQ and HQQ"):
            kind.from_linear(linear)


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"in_features": 0}, ShapeError),
        ({"out_features": -1}, ShapeError),
        ({"dtype": torch.int64}, TypeError),
        ({"dtype": "float32"}, TypeError),
        ({"r": 0}, ConfigError),
        ({"lora_dropout": 1.0}, ConfigError),
        ({"config": 5}, TypeError),
        ({"bias": "lora_only"}, TypeError),
        ({"config": {"r": 0}}, ConfigError),
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", KINDS)
def test_bad_construction(kind, fields, error):
    if kind == "qlora" and "dtype" in fields:
        pytest.skip("QLoraLinear takes no dtype")
    sizes = {"in_features": 8, "out_features": 8, **fields}
    with pytest.raises(error):
        (LoraLinear if kind == "lora" else QLoraLinear)(**sizes)


def test_config_may_be_given_in_any_form():
    config = LoraConfig(r=3, lora_alpha=5, use_rslora=True)
    for form in (config, {"r": 3, "lora_alpha": 5, "use_rslora": True}):
        layer = LoraLinear(8, 8, config=form)
        assert layer.adapter_configs["default"] == config
        assert layer.scaling["default"] == 5 / 3**0.5
    assert LoraLinear(8, 8, config=config, r=4).adapter_configs["default"] == config.replace(r=4)


# --- starting adapters ------------------------------------------------------------------------------------------------

ZERO_B = ["kaiming", "original", "gaussian", "normal", "standard_normal", "he", "xavier", "normalized", True]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("init", [*ZERO_B, "orthogonal", "pissa", "pissa_niter_4", "olora", "loftq"], ids=str)
def test_every_init_starts_at_the_models_own_function(kind, init):
    """B = 0: bit for bit. Those that rewrite the base: to rounding; on a 4-bit base, no worse than without them."""
    linear = nn.Linear(64, 48)
    linear.weight.data = torch.randn(48, 64, generator=torch.Generator().manual_seed(1)) / 8
    w, bias = linear.weight.detach().clone(), linear.bias.detach().clone()
    plain = QLoraLinear.from_linear(copy.deepcopy(linear), r=8)
    cls = LoraLinear if kind == "lora" else QLoraLinear
    if kind == "lora" and init == "loftq":
        # LoftQ repairs what quantizing loses: a dense base loses nothing.
        with pytest.raises(ConfigError, match="loftq"):
            cls.from_linear(linear, r=8, init_lora_weights=init)
        same(linear.weight.detach(), w)
        return
    layer = cls.from_linear(linear, r=8, init_lora_weights=init, init_seed=3)
    x = torch.randn(5, 64)
    assert layer.init_record["default"].seed == 3
    if init in ZERO_B:
        assert layer.lora_A["default"].any()
        assert not layer.lora_B["default"].any()
        with layer.disable_adapters():
            same(layer(x), layer(x))
        return
    assert layer.lora_A["default"].any() and layer.lora_B["default"].any()
    want = x.double() @ w.double().T + bias
    error = (layer(x) - want).norm() / want.norm()
    if kind == "lora":
        assert error < 1e-5
    elif init == "orthogonal":
        near(layer(x), plain(x), units=64)
    else:
        base_error = (plain(x) - want).norm() / want.norm()
        assert base_error > 0.01
        assert error < base_error * {"loftq": 0.95, "olora": 1.5}.get(init, 1.0)  # olora leaves a larger residual


def test_false_gives_a_random_a_and_b():
    layer = make("lora", init_lora_weights=False)
    assert layer.lora_A["default"].any() and layer.lora_B["default"].any()
    assert layer.init_record["default"].strategy == "random"


@pytest.mark.parametrize("init", ["pissa", "olora", "loftq"])
def test_an_init_that_rewrites_the_base_wants_to_be_first_and_to_see_the_floats(init):
    layer = make("lora", r=4)
    before = snapshot(layer)
    with pytest.raises(ConfigError, match="rewrites the base that default already adapts"):
        layer.add_adapter("second", init_lora_weights=init)
    assert snapshot(layer) == before
    quantized = make("qlora", r=4)
    quantized.delete_adapter("default")
    before = snapshot(quantized)
    with pytest.raises(ConfigError, match="unquantized weight"):
        quantized.add_adapter("second", init_lora_weights=init)
    assert snapshot(quantized) == before


@pytest.mark.parametrize("kind", KINDS)
def test_seeds_reproduce_and_are_recorded(kind):
    one, two = make(kind, init_seed=11), make(kind, init_seed=11)
    other = make(kind, init_seed=12)
    same(one.lora_A["default"], two.lora_A["default"])
    assert not torch.equal(one.lora_A["default"], other.lora_A["default"])
    assert one.init_record["default"] == ("kaiming", 11)
    torch.manual_seed(0)
    drawn = LoraLinear(8, 8, r=2)
    drawn.add_adapter("second", r=2)
    seeds = [drawn.init_record[name].seed for name in ("default", "second")]
    assert seeds[0] != seeds[1]
    again = LoraLinear(8, 8, r=2, init_seed=seeds[0])
    same(again.lora_A["default"], drawn.lora_A["default"])
    torch.manual_seed(0)
    same(LoraLinear(8, 8, r=2).lora_A["default"], drawn.lora_A["default"])


def test_init_bound_clamps_a():
    layer = make("lora", init_lora_weights="standard_normal", init_bound=0.25, r=8)
    assert layer.lora_A["default"].abs().max() == 0.25
    free = make("lora", init_lora_weights="standard_normal", r=8)
    assert free.lora_A["default"].abs().max() > 1


@pytest.mark.parametrize("kind", KINDS)
def test_reset_parameters(kind):
    """With a seed: the very start again, magnitude included. Without: a fresh, recorded draw. In place either way."""
    layer = make(kind, use_dora=True, init_seed=5)
    start, objects = clone_state(layer), dict(layer.named_parameters())
    shake(layer)
    assert not torch.equal(layer.lora_B["default"], start["lora_B.default"])
    layer.reset_parameters("default")
    for key, value in layer.state_dict().items():
        same(value, start[key])
    assert all(objects[name] is parameter for name, parameter in layer.named_parameters())
    layer.add_adapter("free", r=2)
    seed, a = layer.init_record["free"].seed, layer.lora_A["free"].detach().clone()
    layer.reset_parameters("free")
    assert layer.init_record["free"].seed != seed
    assert not torch.equal(layer.lora_A["free"], a)
    with pytest.raises(ConfigError, match="unknown adapter 'nobody'"):
        layer.reset_parameters("nobody")
    rewritten = LoraLinear(8, 8, r=2, init_lora_weights="pissa")
    before = snapshot(rewritten)
    with pytest.raises(ConfigError, match="pissa"):
        rewritten.reset_parameters("default")
    assert snapshot(rewritten) == before


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("use_dora", [False, True])
def test_add_adapter_from_pretrained_tensors(kind, use_dora):
    layer = make(kind)
    a, b = torch.randn(3, 48, dtype=torch.bfloat16).T.contiguous().T, torch.randn(40, 3, dtype=torch.float64)
    layer.add_adapter("given", r=3, lora_alpha=6, use_dora=use_dora, tensors=(a, b))
    same(layer.lora_A["given"].detach(), a.float())
    same(layer.lora_B["given"].detach(), b.float())
    assert layer.init_record["given"].strategy == "tensors"
    assert layer.active_adapters == ["default"]
    assert not layer.lora_A["given"].requires_grad
    near(layer.delta_weight("given"), 2 * b @ a.double(), units=16)
    if use_dora:
        full = layer.dequantize(torch.float32).double() + 2 * b.float() @ a.float()
        near(layer.lora_magnitude["given"].detach(), full.norm(dim=1), units=16)
    a.zero_()
    assert layer.lora_A["given"].any()


def test_add_adapter_bad_input_changes_nothing():
    layer = make("lora", r=4)
    a, b = torch.randn(3, 48), torch.randn(40, 3)
    cases = [
        ({"name": "x", "tensors": (a, b)}, ShapeError, r"expected a \(8, 48\) and b \(40, 8\), got \(3, 48\)"),
        ({"name": "x", "r": 3, "tensors": (b, a)}, ShapeError, r"got \(40, 3\) and \(3, 48\)"),
        ({"name": "x", "r": 3, "tensors": (a.T, b)}, ShapeError, "expected a"),
        ({"name": "x", "r": 3, "tensors": (a,)}, TypeError, "pair"),
        ({"name": "x", "r": 3, "tensors": (a, None)}, TypeError, "pair"),
        ({"name": "x", "r": 3, "tensors": (a.int(), b)}, TypeError, "floating-point"),
        ({"name": "default"}, ConfigError, "exists already"),
        ({"name": ""}, ConfigError, "non-empty"),
        ({"name": "a.b"}, ConfigError, "dots"),
        ({"name": 3}, ConfigError, "non-empty string"),
        ({"name": "x", "r": -1}, ConfigError, "r must be an integer of at least 1, got -1"),
        ({"name": "x", "lora_dropout": -0.1}, ConfigError, r"lora_dropout must be in \[0, 1\)"),
        ({"name": "x", "init_lora_weights": "nope"}, ConfigError, "known: True, False, kaiming, gaussian"),
        ({"name": "x", "r": 3, "init_lora_weights": "orthogonal"}, ConfigError, "even rank"),
        ({"name": "x", "config": "r=3"}, TypeError, "expected a LoraConfig, a dict or a peft.LoraConfig, got str"),
    ]
    before = snapshot(layer)
    for arguments, error, words in cases:
        with pytest.raises(error, match=words):
            layer.add_adapter(**arguments)
        assert snapshot(layer) == before, words


def test_adding_an_adapter_leaves_the_users_own_freezing_alone():
    """A was frozen by hand; a later adapter must not thaw it."""
    layer = make("lora")
    layer.lora_A["default"].requires_grad_(False)
    layer.add_adapter("second")
    assert not layer.lora_A["default"].requires_grad
    assert layer.lora_B["default"].requires_grad
    assert not layer.lora_A["second"].requires_grad


@pytest.mark.parametrize("name", BACKENDS)
def test_every_backend_gives_the_layer_the_same_bytes(name):
    """Quantizing under another backend changes nothing that is stored."""
    linear = nn.Linear(100, 33)
    with forced("reference"):
        want = snapshot(QLoraLinear.from_linear(copy.deepcopy(linear), r=2, init_seed=1))
    with forced(name):
        assert snapshot(QLoraLinear.from_linear(copy.deepcopy(linear), r=2, init_seed=1)) == want


def test_a_forced_backend_that_cannot_run_says_why():
    layer = make("lora")
    with forced("nowhere"), pytest.raises(fastlora.UnsupportedError, match="unknown backend 'nowhere'"):
        layer(torch.randn(2, 48))
    if "cpu" in BACKENDS:
        wide = make("lora", dtype=torch.float64)
        with forced("cpu"), pytest.raises(fastlora.UnsupportedError, match=r"(?s)cannot run lora_fwd.*got float64"):
            wide(torch.randn(2, 48).double())
        assert wide(torch.randn(2, 48).double()).dtype == torch.float64
