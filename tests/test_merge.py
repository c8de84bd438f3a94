"""merge and unmerge: the same bytes back, the same function while merged, nothing half done."""

from __future__ import annotations

import copy
import pickle
import re
import warnings

import pytest
import torch
from torch import nn

from fastlora import ConfigError, LoraLinear, QLoraLinear, QuantizedWeight, ShapeError
from tests.layer_tools import BACKENDS, clone_state, forced, grads, make, near, parameters, same, shake, snapshot

KINDS = ("lora", "qlora")
MERGES = [("lora", False), ("qlora", False), ("qlora", True)]  # kind, requantize


@pytest.fixture(params=BACKENDS, autouse=True)
def backend(request):
    with forced(request.param):
        yield request.param


def adapted(kind, dtype=torch.float32, **fields):
    """A layer with two plain adapters and a DoRA one, none at its start."""
    layer = make(kind, dtype=dtype, r=4, bias=True, **fields)
    layer.add_adapter("second", r=3, lora_alpha=5)
    layer.add_adapter("dora", r=2, use_dora=True)
    return shake(layer)


def exact(layer, names):
    """The merged weight in float64."""
    w = layer.dequantize(torch.float32).double()
    for name in names:
        a, b, *mag = (t.detach().double() for t in parameters(layer, name))
        w = w + layer.scaling[name] * b @ a
        if mag:
            w = (mag[0] / w.norm(dim=1))[:, None] * w
    return w


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("names", [["default"], ["second"], ["default", "second"], ["dora"]], ids="+".join)
def test_merged_weight_output_and_input_gradient(kind, names):
    layer = adapted(kind).eval()
    want = exact(layer, names)
    layer.set_adapter(names)
    x, dy = torch.randn(3, 5, 48), torch.randn(3, 5, 40)
    apart, dx = grads(layer, x, dy, [])
    layer.merge(dtype=torch.float32)
    assert layer.merged
    assert isinstance(layer.weight, nn.Parameter)
    assert not layer.weight.requires_grad
    near(layer.weight.detach(), want, units=8)
    got, got_dx = grads(layer, x, dy, [])
    near(got, apart, units=16)
    near(got_dx, dx, units=16)


@pytest.mark.parametrize(("kind", "requantize"), MERGES)
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("names", [["default"], ["default", "second"], ["dora"]], ids="+".join)
def test_unmerging_gives_back_the_very_same_layer(kind, double_quant, names, requantize):
    layer = adapted(kind, **({"double_quant": double_quant} if kind == "qlora" else {}))
    layer.set_adapter(names)
    before, weight = snapshot(layer), layer.weight
    x = torch.randn(4, 48)
    y = layer(x)
    for _ in range(3):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            layer.merge(requantize=requantize)
            merged = snapshot(layer)
            layer.merge(requantize=requantize)
        assert snapshot(layer) == merged != before
        layer.unmerge()
        assert snapshot(layer) == before
        layer.unmerge()
        assert snapshot(layer) == before
    assert layer.weight is weight
    assert not layer.merged
    same(layer(x), y)


def test_merged_weight_goes_through_no_lossy_round_trip():
    """bf16, a hundred times: PEFT's subtract-again drifts."""
    layer = adapted("lora", dtype=torch.bfloat16)
    before = snapshot(layer)
    for _ in range(100):
        layer.merge()
        layer.unmerge()
    assert snapshot(layer) == before


@pytest.mark.parametrize("kind", KINDS)
def test_dtype_of_the_merged_weight(kind):
    layer = adapted(kind)
    default = torch.float32 if kind == "lora" else torch.bfloat16
    for asked, given in ((None, default), (torch.float16, torch.float16), (torch.float32, torch.float32)):
        want = exact(layer, ["default"])
        layer.merge(dtype=asked)
        assert layer.weight.dtype == given
        near(layer.weight.detach(), want, units=1 if given != torch.float32 else 8)
        y = layer(torch.randn(2, 48))
        assert y.dtype == torch.float32
        layer.unmerge()
    if kind == "qlora":
        for compute, given in ((torch.float16, torch.float16), (torch.float32, torch.bfloat16)):
            other = make("qlora", compute_dtype=compute)
            other.merge()
            assert other.weight.dtype == given


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.bool, "bfloat16", torch.complex64], ids=str)
def test_a_merged_weight_must_be_floating_point(kind, dtype):
    layer = adapted(kind)
    before = snapshot(layer)
    with pytest.raises(TypeError, match=re.escape(str(dtype))):
        layer.merge(dtype=dtype)
    assert snapshot(layer) == before


@pytest.mark.parametrize(("kind", "requantize"), MERGES)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("where", ["lora_A.default", "lora_B.default", "lora_magnitude.dora"])
def test_safe_merging_refuses_nan_and_leaves_the_layer_whole(kind, value, where, requantize):
    layer = adapted(kind)
    group, name = where.split(".")
    getattr(layer, group)[name].data.view(-1)[3] = value
    layer.set_adapter(name)
    before = snapshot(layer)
    with pytest.raises(ShapeError, match=f"merging {name}.*NaN or inf"):
        layer.merge(requantize=requantize)
    assert snapshot(layer) == before
    assert not layer.merged
    if not requantize:
        layer.merge(safe=False)
        assert not layer.weight.isfinite().all()
        layer.unmerge()
        assert snapshot(layer) == before


@pytest.mark.parametrize("kind", KINDS)
def test_safe_merging_refuses_what_overflows_the_merged_dtype(kind):
    layer = adapted(kind)
    layer.lora_B["default"].data.fill_(1e5)
    before = snapshot(layer)
    with pytest.raises(ShapeError, match="NaN or inf"):
        layer.merge(dtype=torch.float16)
    assert snapshot(layer) == before
    layer.merge(dtype=torch.bfloat16)
    assert layer.weight.isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_merged_state_dict_holds_the_merged_weight_and_no_other_base(kind):
    layer = adapted(kind)
    before = set(layer.state_dict())
    layer.merge()
    state = layer.state_dict()
    assert set(state) == {key for key in before if not key.startswith("weight")} | {"weight"}
    same(state["weight"], layer.weight.detach())
    assert set(dict(layer.named_parameters())) == set(state)
    plain = nn.Linear(48, 40, dtype=state["weight"].dtype)
    plain.load_state_dict({"weight": state["weight"], "bias": state["bias"].to(plain.bias.dtype)})
    x = torch.randn(3, 48).to(plain.weight.dtype)
    near(plain(x).detach(), layer(x).detach(), units=2)
    layer.unmerge()
    assert set(layer.state_dict()) == before


@pytest.mark.parametrize("kind", KINDS)
def test_merged_state_dict_loads_into_a_merged_twin(kind):
    layer, twin = adapted(kind), adapted(kind)
    shake(twin, 55)
    layer.merge()
    twin.merge()
    twin.load_state_dict(clone_state(layer))
    x = torch.randn(3, 48)
    same(twin(x), layer(x))


@pytest.mark.parametrize("kind", KINDS)
def test_moves_while_merged_reach_the_kept_weight_too(kind):
    layer, moved = adapted(kind), adapted(kind)
    layer.to(torch.bfloat16)
    moved.merge(dtype=torch.float32)
    moved.to(torch.bfloat16)
    assert moved.weight.dtype == torch.bfloat16
    x = torch.randn(3, 48).bfloat16()
    assert moved(x).dtype == torch.bfloat16
    moved.unmerge()
    assert snapshot(moved) == snapshot(layer)
    moved.merge()
    moved.to("meta")
    assert moved.weight.is_meta
    moved.unmerge()
    assert all(t.is_meta for t in moved.state_dict().values())
    assert set(moved.state_dict()) == set(layer.state_dict())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_made_while_merged_are_independent(kind, how):
    layer = adapted(kind)
    before = snapshot(layer)
    layer.merge()
    merged = snapshot(layer)
    twin = copy.deepcopy(layer) if how == "deepcopy" else pickle.loads(pickle.dumps(layer))
    assert snapshot(twin) == merged
    assert twin.weight.data_ptr() != layer.weight.data_ptr()
    twin.unmerge()
    assert snapshot(twin) == before
    assert snapshot(layer) == merged
    for parameter in twin.parameters():
        parameter.data.view(-1).view(torch.uint8).bitwise_xor_(255)
    layer.unmerge()
    assert snapshot(layer) == before
    same(layer.weight_norm("dora"), adapted(kind).weight_norm("dora"))


@pytest.mark.parametrize("kind", KINDS)
def test_disabling_works_while_merged(kind):
    layer = adapted(kind)
    x = torch.randn(3, 48)
    with layer.disable_adapters():
        base = layer(x)
    layer.merge()
    merged = layer(x)
    with layer.disable_adapters():
        same(layer(x), base)
    same(layer(x), merged)
    assert not torch.allclose(merged, base, atol=0.1)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_asked_of_a_merged_layer_that_it_cannot_do_is_refused(kind):
    """Never silently the merged adapter: naming others raises, and so does switching to or deleting others."""
    layer = adapted(kind)
    layer.merge()
    before = snapshot(layer)
    x = torch.randn(2, 48)
    with pytest.raises(ConfigError, match=r"default merged already; unmerge"):
        layer.merge(adapter_names=["second"])
    with pytest.raises(ConfigError, match=r"default merged: unmerge\(\)"):
        layer(x, adapter_names=["second", None])
    with pytest.raises(ConfigError, match="unmerge"):
        layer.set_adapter("second")
    with pytest.raises(ConfigError, match="unmerge"):
        layer.delete_adapter("default")
    assert snapshot(layer) == before
    layer.set_adapter("default")
    layer.merge(adapter_names=["default"])
    assert snapshot(layer) == before


@pytest.mark.parametrize("kind", KINDS)
def test_adding_an_adapter_while_merged_sees_the_unmerged_base(kind):
    layer, other = adapted(kind), adapted(kind)
    layer.merge()
    for one in (layer, other):
        one.add_adapter("late", r=2, use_dora=True, init_seed=4)
    assert layer.merged
    layer.unmerge()
    assert snapshot(layer) == snapshot(other)


@pytest.mark.parametrize("kind", KINDS)
def test_merging_bad_input_changes_nothing(kind):
    layer = adapted(kind)
    before = snapshot(layer)
    with pytest.raises(ConfigError, match="unknown adapter 'nobody'"):
        layer.merge(adapter_names=["nobody"])
    with pytest.raises(ConfigError, match="DoRA depend on their order; got second, dora"):
        layer.merge(adapter_names=["second", "dora"])
    if kind == "lora":
        with pytest.raises(ConfigError, match="requantize=True needs a quantized base"):
            layer.merge(requantize=True)
    else:
        with pytest.raises(ConfigError, match="4-bit format, dtype=torch.float32 into that: give one"):
            layer.merge(requantize=True, dtype=torch.float32)
    assert snapshot(layer) == before


@pytest.mark.parametrize("kind", KINDS)
def test_naming_an_adapter_twice_or_alone_merges_it_once(kind):
    layer = adapted(kind)
    want = exact(layer, ["second"])
    for names in (["second", "second"], "second"):
        layer.merge(adapter_names=names, dtype=torch.float32)
        near(layer.weight.detach(), want, units=8, what=str(names))
        layer.unmerge()


@pytest.mark.parametrize("kind", KINDS)
def test_merging_no_adapters_does_nothing(kind):
    layer = adapted(kind)
    layer.set_adapter([])
    before = snapshot(layer)
    layer.merge()
    assert snapshot(layer) == before
    assert not layer.merged


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("name", ["default", "dora"])
def test_requantizing_warns_with_the_error_it_measured(double_quant, name):
    layer = adapted("qlora", double_quant=double_quant)
    base, want = layer.dequantize(torch.float32), exact(layer, [name])
    layer.set_adapter(name)
    with pytest.warns(UserWarning, match=f"requantizing after merging {name}") as caught:
        layer.merge(requantize=True)
    assert isinstance(layer.weight, QuantizedWeight)
    assert (layer.weight.quant_type, layer.weight.blocksize, layer.weight.nested) == ("nf4", 32, double_quant)
    got = layer.dequantize(torch.float32)
    measured = ((got - want).norm() / (want - base).norm()).item()
    said = float(re.search(r"by (\S+) times", str(caught[0].message)).group(1))
    assert said == pytest.approx(measured, abs=0.011)
    assert 0.01 < said < 1
    x = torch.randn(3, 48)
    near(layer(x).detach(), x.double() @ got.double().T + layer.bias.double(), units=16)
    with layer.disable_adapters():
        near(layer(x).detach(), x.double() @ base.double().T + layer.bias.double(), units=16)


def test_requantizing_a_tiny_adapter_says_that_it_is_lost():
    layer = shake(make("qlora", double_quant=False))
    layer.lora_B["default"].data.mul_(1e-4)
    with pytest.warns(UserWarning, match="requantizing") as caught:
        layer.merge(requantize=True)
    assert float(re.search(r"by (\S+) times", str(caught[0].message)).group(1)) > 0.9


def test_a_plain_merge_of_a_quantized_layer_does_not_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        shake(make("qlora")).merge()


@pytest.mark.parametrize(
    ("double_quant", "source"), [(True, torch.bfloat16), (False, torch.float32), (False, torch.bfloat16)], ids=str
)
def test_merging_keeps_small_deltas(double_quant, source):
    """Slope of the merged bf16 weight's change on the delta: within [0.9, 1.1] where absmax is off bf16's grid.

    On the grid rounding swallows more of the smallest ones.
    """
    for relative in (1e-4, 3e-4, 1e-3, 1e-2, 1e-1):
        slope = merged_slope(relative, double_quant, source)
        on_grid = not double_quant and source == torch.bfloat16
        low = (0.85 if relative < 3e-4 else 0.92) if on_grid else 0.9
        assert low < slope < 1.1, relative


def merged_slope(relative, double_quant, source):
    torch.manual_seed(0)
    linear = nn.Linear(512, 512, bias=False, dtype=source)
    linear.weight.data = (0.02 * torch.randn(512, 512)).to(source)
    layer = QLoraLinear.from_linear(linear, r=8, double_quant=double_quant)
    assert layer.weight.absmax_on_grid == (not double_quant and source == torch.bfloat16)
    shake(layer)
    base = layer.dequantize(torch.float32)
    layer.lora_B["default"].data.mul_(relative * base.norm() / layer.delta_weight("default").norm())
    delta = layer.delta_weight("default")
    layer.merge()
    change = layer.weight.detach().float() - base.bfloat16().float()
    return (change * delta).sum() / delta.square().sum()


@pytest.mark.parametrize("kind", KINDS)
def test_merging_inside_a_model_and_training_on(kind):
    """Merged forwards train biases and inputs; after unmerging training goes on where it was."""
    layer = adapted(kind)
    layer.bias.requires_grad_()
    model = nn.Sequential(nn.Linear(48, 48), layer)
    x = torch.randn(4, 48)
    layer.merge()
    model(x).sum().backward()
    near(layer.bias.grad, torch.full((40,), 4.0), units=4)
    assert model[0].weight.grad.abs().sum() > 0
    assert layer.lora_A["default"].grad is None
    layer.unmerge()
    model(x).sum().backward()
    assert layer.lora_A["default"].grad.abs().sum() > 0


def test_merging_float64_stays_exact():
    layer = shake(make("lora", dtype=torch.float64, adapter_dtype=torch.float64))
    want = exact_dense(layer)
    with forced("reference"):
        layer.merge()
    assert layer.weight.dtype == torch.float64
    assert (layer.weight - want).abs().max() < 1e-14


def exact_dense(layer: LoraLinear) -> torch.Tensor:
    a, b = (t.detach() for t in parameters(layer))
    return layer.weight.detach() + layer.scaling["default"] * b @ a
