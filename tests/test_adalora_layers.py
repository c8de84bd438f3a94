"""Layers with AdaLoRA adapters: the function and its gradients are PEFT's, and all else a layer does holds for them."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import peft
import pytest
import torch
from torch import nn

import fastlora
from fastlora import ConfigError, LoraConfig, LoraLinear, QLoraLinear
from fastlora.adalora import AdaLoraConfig
from fastlora.math import philox
from fastlora.ops.lora import draw_seed
from tests.adalora_tools import fields, move_adapter, ours, tensors_of
from tests.layer_tools import BACKENDS, forced, grads, make, near, same, snapshot
from tests.model_tools import layers_of, llama, logits, unchanged

KINDS = pytest.mark.parametrize("kind", ["lora", "qlora"])
CONFIG = AdaLoraConfig(init_r=6, target_r=3, lora_alpha=5, total_step=50, init_seed=1)


def shaken(kind: str, config: AdaLoraConfig = CONFIG, **keywords: Any) -> Any:
    """A layer whose adapter's effect is as large as the base's; one E is zero."""
    layer = make(kind, config=config, **keywords, r=config.r)
    return shake(layer, "default")


@torch.no_grad()
def shake(layer: Any, name: str, seed: int = 5) -> Any:
    generator = torch.Generator().manual_seed(seed)
    for group, size in ((layer.lora_A, layer.in_features), (layer.lora_B, 6), (layer.lora_E, 1)):
        group[name].copy_(torch.randn(group[name].shape, generator=generator) * size**-0.5)
    layer.lora_E[name][2] = 0.0
    return layer


class Twin:
    """PEFT's SVDLinear with the very same numbers."""

    def __init__(self, layer: Any, dtype: torch.dtype, adapter_dtype: torch.dtype) -> None:
        config = layer.adapter_configs["default"]
        linear = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None)
        linear.weight.data = layer.dequantize(torch.float32).to(dtype)
        if layer.bias is not None:
            linear.bias.data = layer.bias.detach().to(dtype)
        theirs = peft.AdaLoraConfig(
            init_r=config.init_r,
            target_r=config.target_r,
            lora_alpha=config.lora_alpha,
            total_step=config.total_step,
            target_modules=["lin"],
        )
        self.layer = peft.get_peft_model(nn.ModuleDict({"lin": linear}), theirs).base_model.model["lin"]
        for part in ("lora_A", "lora_E", "lora_B"):
            getattr(self.layer, part)["default"].data = (
                getattr(layer, part)["default"].detach().to(adapter_dtype).clone()
            )

    def parameters(self) -> list[Any]:
        return [getattr(self.layer, part)["default"] for part in ("lora_A", "lora_E", "lora_B")]


def parameters(layer: Any) -> list[Any]:
    return [layer.lora_A["default"], layer.lora_E["default"], layer.lora_B["default"]]


# --- forward and backward ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("alpha", [5, 0.7, 0, -3])
@KINDS
def test_output_and_gradients_are_pefts(kind, alpha, backend):
    layer = shaken(kind, CONFIG.replace(lora_alpha=alpha))
    x, dy = torch.randn(9, 48), torch.randn(9, 40)
    exact, peer = Twin(layer, torch.float64, torch.float64), Twin(layer, torch.float32, torch.float32)
    with forced(backend):
        got = grads(layer, x, dy, parameters(layer))
    want = grads(exact.layer, x.double(), dy.double(), exact.parameters())
    allowed = grads(peer.layer, x, dy, peer.parameters())
    for what, mine, truth, other in zip(("y", "dx", "da", "de", "db"), got, want, allowed, strict=True):
        near(mine, truth, other, units=4.0, what=what)
    assert (want[0] - exact.layer.base_layer(x.double())).norm() > 0.1 * want[0].norm()  # the adapter counts


@KINDS
def test_the_scale_is_pefts_and_a_percent_off_is_seen(kind):
    layer = shaken(kind)
    x, dy = torch.randn(9, 48), torch.randn(9, 40)
    exact = Twin(layer, torch.float64, torch.float64)
    want = grads(exact.layer, x.double(), dy.double(), exact.parameters())
    assert layer.scaling["default"] == 5 / (6 + 1e-5)
    layer.scaling["default"] *= 1.01
    got = grads(layer, x, dy, parameters(layer))
    for mine, truth in zip(got, want, strict=True):
        with pytest.raises(AssertionError, match="error"):
            near(mine, truth, None, units=4.0)


@KINDS
def test_bf16_activations_with_fp32_adapters_and_under_autocast(kind):
    layer = shaken(kind, dtype=torch.bfloat16)
    x, dy = torch.randn(9, 48).bfloat16(), torch.randn(9, 40).bfloat16()
    exact, peer = Twin(layer, torch.float64, torch.float64), Twin(layer, torch.bfloat16, torch.float32)
    want = grads(exact.layer, x.double(), dy.double(), exact.parameters())
    allowed = grads(peer.layer, x, dy, peer.parameters())
    got = grads(layer, x, dy, parameters(layer))
    assert [t.dtype for t in got] == [torch.bfloat16] * 2 + [torch.float32] * 3
    for mine, truth, other in zip(got, want, allowed, strict=True):
        near(mine, truth, other)
    full = shaken(kind)
    with torch.autocast("cpu", torch.bfloat16):
        y = full(x.float())
    assert y.dtype == torch.bfloat16
    near(y.detach(), full(x.float()).detach().double(), None, units=3.0)


@KINDS
def test_at_the_start_the_output_is_the_disabled_layers_bit_for_bit(kind):
    layer = make(kind, config=CONFIG, r=6)
    x = torch.randn(7, 48)
    y = layer(x)
    with layer.disable_adapters():
        same(layer(x), y)
    y.sum().backward()
    # E is zero, A and B are not: only E learns from the first step.
    assert layer.lora_E["default"].grad.abs().sum() > 0
    assert layer.lora_A["default"].grad.abs().sum() == layer.lora_B["default"].grad.abs().sum() == 0
    assert 0.015 < layer.lora_A["default"].std() < 0.025 > layer.lora_B["default"].std() > 0.015


@KINDS
def test_dropout_is_on_the_adapters_input_alone(kind):
    layer = shaken(kind, CONFIG.replace(lora_dropout=0.4))
    x = torch.randn(9, 48)
    torch.manual_seed(11)
    got = layer(x)
    torch.manual_seed(11)
    seed = draw_seed(x.device)
    bits = torch.ops.fastlora.dropout_mask(seed, 0, 9, 48, 0.4, "")
    dropped = x * philox.unpack_bits(bits, 48) * philox.keep_scale(0.4)
    with layer.disable_adapters():
        base = layer(x)
    near(got.detach(), (base + dropped @ layer.delta_weight("default").T).detach().double(), None, units=8.0)
    layer.eval()
    near(layer(x).detach(), (base + x @ layer.delta_weight("default").T).detach().double(), None, units=8.0)


@pytest.mark.parametrize("backend", BACKENDS)
@KINDS
def test_a_layer_without_ranks_is_the_base_and_trains_nothing(kind, backend):
    layer = make(kind, r=2)
    layer.delete_adapter("default")
    layer.add_adapter("none", CONFIG.replace(r=0), (torch.empty(0, 48), torch.empty(40, 0), torch.empty(0, 1)))
    x = torch.randn(3, 48, requires_grad=True)
    with forced(backend):
        y = layer(x)
        y.sum().backward()
    with layer.disable_adapters(), forced(backend):
        same(layer(x), y)
    assert x.grad.abs().sum() > 0
    assert [parameter.shape for parameter in layer.parameters() if parameter.requires_grad] == [
        (0, 48),
        (40, 0),
        (0, 1),
    ]
    assert layer.delta_weight("none").abs().sum() == 0
    layer.merge()


# --- everything else a layer does -------------------------------------------------------------------------------------


@KINDS
def test_delta_merge_and_unmerge(kind):
    layer = shaken(kind)
    a, e, b = (parameter.detach().double() for parameter in parameters(layer))
    near(layer.delta_weight("default"), 5 / (6 + 1e-5) * b @ (a * e), None, units=4.0)
    x = torch.randn(9, 48)
    want, before = layer(x).detach(), snapshot(layer)
    layer.merge(dtype=torch.float32)
    near(layer(x).detach(), want.double(), None, units=16.0)
    layer.unmerge()
    assert snapshot(layer) == before


@KINDS
def test_state_dict_deepcopy_pickle_and_assignment(kind):
    layer = shaken(kind)
    state = copy.deepcopy(layer.state_dict())
    assert {"lora_A.default", "lora_E.default", "lora_B.default"} <= set(state)
    x = torch.randn(4, 48)
    want = layer(x)
    other = make(kind, config=CONFIG, r=6)
    assert not torch.equal(other(x), want)
    other.load_state_dict(state)
    same(other(x), want)
    same(copy.deepcopy(layer)(x), want)
    same(pickle.loads(pickle.dumps(layer))(x), want)
    with torch.device("meta"):
        empty = make(kind, config=CONFIG, r=6)
    empty.load_state_dict(state, assign=True)
    same(empty(x), want)
    half = {key: value for key, value in state.items() if "lora_E" not in key}
    with pytest.raises(fastlora.StateDictError, match=r"missing lora_E.default"):
        other.load_state_dict(half)


@KINDS
def test_several_adapters_switch_freeze_and_go(kind):
    layer = shaken(kind)
    layer.add_adapter("lora", r=3, init_lora_weights=False, lora_alpha=2)
    layer.add_adapter("second", CONFIG.replace(init_r=4, lora_alpha=9))
    with torch.no_grad():
        for parameter in (layer.lora_E["second"], layer.lora_A["second"], layer.lora_B["second"]):
            parameter.normal_(std=0.5)
    trains = {name: parameter.requires_grad for name, parameter in layer.named_parameters() if "lora_" in name}
    assert {name for name, on in trains.items() if on} == {"lora_A.default", "lora_E.default", "lora_B.default"}
    x = torch.randn(6, 48)
    with layer.disable_adapters():
        base = layer(x)
    deltas = {name: x @ layer.delta_weight(name).T for name in layer.lora_A}
    for names in (["default"], ["second"], ["lora"], ["default", "second"], ["second", "lora"], list(deltas)):
        layer.set_adapter(names)
        want = base.double() + sum(deltas[name].double() for name in names)
        near(layer(x).detach(), want.detach(), None, units=16.0, what=str(names))
    rows = ["default", None, "lora", "second", "default", "second"]
    y = layer(x, adapter_names=rows)
    for row, name in enumerate(rows):
        want = base[row] if name is None else base[row] + deltas[name][row]
        near(y[row].detach(), want.detach().double(), None, units=16.0, what=f"row {row}")
    layer.set_adapter(["default", "second"])
    layer.zero_grad()
    layer(x, adapter_names=["second"] * 6).sum().backward()
    assert layer.lora_E["second"].grad.abs().sum() > 0
    assert layer.lora_E["default"].grad is None or layer.lora_E["default"].grad.abs().sum() == 0
    layer.rank_masks["default"] = torch.ones(6, dtype=torch.bool)
    layer.delete_adapter("default")
    assert "default" not in layer.lora_E
    assert layer.active_adapters == ["second"]
    layer.add_adapter("default", CONFIG)
    assert layer.kept_triplets("default") is None


@KINDS
def test_explain_and_repr_name_the_rank(kind):
    layer = shaken(kind)
    assert "r=6" in layer.explain(512)
    assert "default: r=6" in repr(layer)


@KINDS
def test_reset_draws_the_start_again(kind):
    layer = make(kind, config=CONFIG, r=6)
    start = [parameter.detach().clone() for parameter in parameters(layer)]
    shake(layer, "default")
    layer.rank_masks["default"] = torch.zeros(6, dtype=torch.bool)
    layer.reset_parameters("default")
    for parameter, first in zip(parameters(layer), start, strict=True):
        same(parameter.detach(), first)
    assert layer.kept_triplets("default") is None


@pytest.mark.parametrize("kind", ["lora", "qlora"])
def test_compiled_without_a_graph_break(kind):
    layer = shaken(kind)
    x = torch.randn(4, 48)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    near(compiled(x).detach(), layer(x).detach().double(), None)


def test_the_start_with_other_fields():
    random = LoraLinear(48, 40, config=CONFIG.replace(init_lora_weights=False))
    assert random.lora_E["default"].abs().min() > 0
    assert random.lora_A["default"].std() > 0.8 < random.lora_B["default"].std()
    bounded = LoraLinear(48, 40, config=CONFIG.replace(init_bound=0.01))
    assert bounded.lora_A["default"].abs().max() <= 0.01 < bounded.lora_B["default"].abs().max()
    half = LoraLinear(48, 40, config=CONFIG.replace(adapter_dtype=torch.bfloat16))
    assert {parameter.dtype for parameter in parameters(half)} == {torch.bfloat16}
    same(half.lora_A["default"].detach(), LoraLinear(48, 40, config=CONFIG).lora_A["default"].detach().bfloat16())


# --- models -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_convert_gives_every_layer_its_own_draw(quantize):
    model = ours(quantize=quantize)
    found = layers_of(model)
    assert len(found) == 6
    assert all(type(layer) is (LoraLinear if quantize is None else QLoraLinear) for layer in found.values())
    q, k = (found[f"model.layers.{i}.self_attn.q_proj"] for i in range(2))
    assert not torch.equal(q.lora_A["default"], k.lora_A["default"])
    again = ours(quantize=quantize)
    for name, tensor in tensors_of(model).items():
        same(tensor.detach(), tensors_of(again)[name].detach())
    trainable, _ = fastlora.trainable_parameters(model)
    assert trainable == sum(tensor.numel() for tensor in tensors_of(model).values())


def test_convert_takes_pefts_config_and_accepts_a_mapping():
    theirs = peft.AdaLoraConfig(**fields())
    model = fastlora.convert(llama(), theirs, quantize=None)
    made = next(iter(layers_of(model).values())).adapter_configs["default"]
    assert isinstance(made, AdaLoraConfig)
    assert {name: getattr(made, name) for name in fields() if name != "target_modules"} == {
        name: value for name, value in fields().items() if name != "target_modules"
    }
    assert AdaLoraConfig.of(fields()) == AdaLoraConfig(**fields())
    assert LoraConfig.of(theirs).init_r == 6


def test_merge_and_unload():
    model = move_adapter(ours())
    want = logits(model)
    plain = fastlora.merge_and_unload(model)
    assert (logits(plain) - want).abs().max() <= 2e-5 * want.abs().max()


# --- refused ----------------------------------------------------------------------------------------------------------

BAD = [
    ({"target_r": 7}, "target_r must be at most init_r=6, got 7"),
    ({"total_step": 0}, "total_step must be .* it was not given"),
    ({"total_step": None}, "total_step must be .* it was not given"),
    ({"total_step": 2.5}, "total_step must be .* got 2.5"),
    ({"total_step": -3}, "total_step must be .* got -3"),
    ({"tinit": 30, "tfinal": 20}, "tinit=30 and tfinal=20 must sum to less than total_step=50"),
    ({"tinit": -1}, "tinit must be an integer of at least 0, got -1"),
    ({"tfinal": -1}, "tfinal must be an integer of at least 0, got -1"),
    ({"deltaT": 0}, "deltaT must be an integer of at least 1, got 0"),
    ({"init_r": 0}, "init_r must be an integer of at least 1, got 0"),
    ({"init_r": True}, "init_r must be an integer"),
    ({"target_r": -2}, "target_r must be an integer of at least 1, got -2"),
    ({"beta1": 1.0}, r"beta1 must be in \(0, 1\), got 1.0"),
    ({"beta2": 0}, r"beta2 must be in \(0, 1\), got 0"),
    ({"beta2": "x"}, r"beta2 must be in \(0, 1\), got 'x'"),
    ({"orth_reg_weight": -0.1}, "orth_reg_weight must be .* got -0.1"),
    ({"orth_reg_weight": float("nan")}, "orth_reg_weight must be"),
    ({"use_dora": True}, "AdaLoRA has no use_dora"),
    ({"use_rslora": True}, "AdaLoRA has no use_rslora"),
    ({"rank_pattern": {"q_proj": 4}}, "AdaLoRA has no rank_pattern"),
    ({"alpha_pattern": {"q_proj": 4}}, "AdaLoRA has no alpha_pattern"),
    ({"init_lora_weights": "pissa"}, "init_lora_weights of AdaLoRA must be True or False, got 'pissa'"),
    ({"r": 7}, "r is the rank a layer holds, 0 ... init_r=6, got 7"),
    ({"lora_dropout": 1.5}, "lora_dropout"),
]


@pytest.mark.parametrize(("changes", "words"), BAD, ids=[str(changes) for changes, _ in BAD])
def test_bad_fields(changes, words):
    with pytest.raises(ConfigError, match=words):
        AdaLoraConfig(**{"init_r": 6, "target_r": 3, "total_step": 50, **changes})


def test_what_does_not_fit_changes_nothing():
    model, config = llama(), AdaLoraConfig(**fields())
    with unchanged(model), pytest.raises(ConfigError, match="starts with init_r=6, got r=4"):
        fastlora.convert(model, config.replace(r=4))
    layer = make("lora", config=CONFIG, r=6)
    a, b, e = torch.zeros(6, 48), torch.zeros(40, 6), torch.zeros(6, 1)
    before = snapshot(layer)
    for tensors, error, words in [
        ((a, b), TypeError, "triple"),
        ((a, b, e[:, 0]), ValueError, r"e \(6, 1\), got .* and \(6,\)"),
        ((a, b, e.int()), TypeError, "floating-point a and b and e"),
        ((a[:3], b, e), ValueError, r"expected a \(6, 48\)"),
    ]:
        with pytest.raises(error, match=words):
            layer.add_adapter("new", CONFIG, tensors)
    with pytest.raises(ConfigError, match="starts with init_r=6, got r=3"):
        layer.add_adapter("new", CONFIG.replace(r=3))
    with pytest.raises(ConfigError, match="unknown config field 'init_r'"):
        layer.add_adapter("new", init_r=4)
    assert snapshot(layer) == before
    with pytest.raises(TypeError):
        AdaLoraConfig(
            8, 16, 0.0, False, False, True, None, None, "peft", torch.float32, [], None, {}, {}, 1, [], [], "x", 4
        )


def test_a_config_keeps_its_kind_and_its_rank():
    config = AdaLoraConfig(**fields())
    assert (config.r, config.replace(init_r=9).r, config.replace(r=2).replace(lora_alpha=1).r) == (6, 9, 2)
    assert type(LoraConfig.of(config, lora_alpha=3)) is AdaLoraConfig
    assert LoraConfig.of(config, init_r=5).r == 5
    with pytest.raises(TypeError, match="expected a config of AdaLoraConfig, got LoraConfig"):
        AdaLoraConfig.of(LoraConfig())
    with pytest.raises(ConfigError, match="rank_pattern"):
        LoraConfig.of(peft.AdaLoraConfig(total_step=9, rank_pattern={"a.lora_E": [True]}))
    with pytest.raises(ConfigError, match="got 'gaussian'"):
        LoraConfig.of(peft.AdaLoraConfig(total_step=9, init_lora_weights="gaussian"))
