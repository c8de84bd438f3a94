"""One dropout mask for the layers of a group, asked for: in models of ours and of PEFT's, and what becomes of it."""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Iterator
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fastlora
from fastlora.errors import ConfigError
from fastlora.math import philox
from fastlora.nn import gated
from fastlora.nn.groups import groups_of, masks_of
from tests.model_tools import llama, tokens

WIDTH, P, NAMES = 32, 0.4, ("q", "k", "v")


class Three(nn.Module):
    """Three linears over one x."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        for name in NAMES:
            self.add_module(name, nn.Linear(WIDTH, WIDTH, bias=name == "k"))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(getattr(self, name)(x) for name in NAMES)


def own(quantize: str | None = None, shared: bool = True, **fields: Any) -> Any:
    fields = {"r": 4, "lora_dropout": P, "target_modules": list(NAMES), "init_lora_weights": False} | fields
    given = {"quantize": quantize, "blocksize": 32, "progress": False}
    example = torch.randn(2, WIDTH)
    return fastlora.convert(Three(), **given, group=example, shared_dropout=shared, **fields).train()


def of_peft(shared: bool = True, **fields: Any) -> Any:
    fields = {"r": 4, "lora_dropout": P, "target_modules": list(NAMES), "init_lora_weights": False} | fields
    model = peft.get_peft_model(Three(), peft.LoraConfig(**fields))
    return fastlora.accelerate(model, group=torch.randn(2, WIDTH), shared_dropout=shared).train()


def layers(model: Any) -> Iterator[Any]:
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return (getattr(inner, name) for name in NAMES)


def factors(layer: Any) -> tuple[Tensor, Tensor]:
    """A and B of the adapter in force."""
    name = layer.active_adapters[0]
    a, b = layer.lora_A[name], layer.lora_B[name]
    return (a.weight, b.weight) if isinstance(a, nn.Module) else (layer.effective_a(name), b)


def base(layer: Any) -> tuple[Tensor, Tensor | None]:
    if hasattr(layer, "get_base_layer"):
        return layer.get_base_layer().weight, layer.get_base_layer().bias
    return layer.dequantize(), layer.bias


def masks(model: Any, x: Tensor | None = None) -> list[Tensor]:
    """Which elements of x each layer keeps: its adapter passes them on, and nothing else does."""
    x = torch.ones(5, WIDTH) if x is None else x
    with torch.no_grad():
        for layer in layers(model):
            for factor in factors(layer):
                factor.copy_(torch.eye(WIDTH))
            for tensor in base(layer):
                if tensor is not None:
                    tensor.zero_()
    return [y != 0 for y in model(x)]


@pytest.mark.parametrize("make", [own, of_peft])
def test_masks_are_one_where_asked_for_and_others_else(make):
    for shared in (True, False):
        kept = masks(make(shared=shared, r=WIDTH))
        assert all(0 < mask.sum() < mask.numel() for mask in kept)
        assert [torch.equal(mask, kept[0]) for mask in kept] == ([True] * 3 if shared else [True, False, False])


def reference(layer: Any, x: Tensor, keep: Tensor) -> Tensor:
    """The layer by PyTorch's operations, in float64; A and B its own parameters."""
    (w, bias), (a, b) = base(layer), factors(layer)
    name = layer.active_adapters[0]
    w, a, b = w.double(), a.double(), b.double()
    low_rank = layer.scaling[name] * (x * keep * philox.keep_scale(P)) @ a.T @ b.T
    return x @ w.T + low_rank + (0.0 if bias is None else bias.double())


def drawn(rows: int, stream: int = 0) -> Tensor:
    """The mask that a group draws next."""
    seed = int(torch.randint(0, 2**63 - 1, (1,), dtype=torch.int64))
    return philox.unpack_bits(philox.dropout_bits(seed, stream, rows, WIDTH, P), WIDTH)


MODELS = {
    "dense": lambda: own(),
    "nf4": lambda: own("nf4"),
    "ranks": lambda: own(rank_pattern={"k": 7}),
    "peft": lambda: of_peft(),
    "peft-rslora": lambda: of_peft(use_rslora=True, rank_pattern={"v": 2}),
}


@pytest.mark.parametrize("name", list(MODELS))
def test_outputs_and_gradients_are_the_composed_ones(name):
    model = MODELS[name]()
    x = torch.randn(6, WIDTH, requires_grad=True)
    weights = [torch.randn(6, WIDTH) for _ in NAMES]
    leaves = [x, *(factor for layer in layers(model) for factor in factors(layer))]
    torch.manual_seed(3)
    ys = model(x)
    got = torch.autograd.grad(ys, leaves, weights)
    torch.manual_seed(3)
    keep = drawn(6).double()
    want_ys = [reference(layer, x.double(), keep) for layer in layers(model)]
    want = torch.autograd.grad(want_ys, leaves, [weight.double() for weight in weights])
    for one, other in zip((*ys, *got), (*want_ys, *want), strict=True):
        assert (one.double() - other).norm() <= 1e-5 * other.norm()
    other = reference(next(layers(model)), x.double(), torch.roll(keep, 1, 1))
    assert (ys[0].double() - other).norm() > 1e-2 * other.norm()  # another mask is seen


class Mlp(nn.Module):
    """A gated MLP."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        for name in NAMES:
            self.add_module(name, nn.Linear(WIDTH, WIDTH, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        return self.v(nn.functional.silu(self.q(x)) * self.k(x))


def test_gate_and_up_of_a_gated_mlp_share_and_down_drops_by_itself():
    fields = {"r": 4, "lora_dropout": P, "target_modules": list(NAMES), "init_lora_weights": False}
    example = torch.randn(2, WIDTH)
    model: Any = fastlora.convert(Mlp(), quantize=None, progress=False, group=example, shared_dropout=True, **fields)
    assert gated.GATED in model.train().__dict__
    x = torch.randn(6, WIDTH, requires_grad=True)
    leaves = [x, *(factor for layer in layers(model) for factor in factors(layer))]
    torch.manual_seed(3)
    got = torch.autograd.grad(model(x).square().sum(), leaves)
    torch.manual_seed(3)
    keep, of_down = drawn(6).double(), drawn(6).double()
    gate, up, down = layers(model)
    hidden = nn.functional.silu(reference(gate, x.double(), keep)) * reference(up, x.double(), keep)
    want = torch.autograd.grad(reference(down, hidden, of_down).square().sum(), leaves)
    for one, other in zip(got, want, strict=True):
        assert (one.double() - other).norm() <= 1e-5 * other.norm()
    assert masks_of(model) == {"q": ("q", "k"), "k": ("q", "k")}
    rows = {row.name: row for row in fastlora.report(model)}
    assert rows["q"].mask == ("q", "k") and rows["v"].mask == () and rows["v"].group == NAMES
    lines = str(fastlora.report(model)).splitlines()
    assert "k (one mask), v" in lines[1] and "q, k" in lines[3] and "mask" not in lines[3]


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_repeats_the_mask(reentrant):
    model = own()
    x = torch.randn(6, WIDTH, requires_grad=True)
    torch.manual_seed(5)
    (want,) = torch.autograd.grad(torch.cat(model(x)).square().sum(), x)
    torch.manual_seed(5)
    torch.cat(checkpoint(model, x, use_reentrant=reentrant)).square().sum().backward()
    assert torch.equal(x.grad, want)


# --- where it is kept -------------------------------------------------------------------------------------------------


def step(model: nn.Module) -> float:
    torch.manual_seed(1)
    return model(input_ids=tokens(), labels=tokens()).loss.item()


def of_llama(shared: bool, **fields: Any) -> nn.Module:
    model = llama()
    fields = {"r": 4, "lora_dropout": P, "init_lora_weights": False, "init_seed": 0} | fields
    return fastlora.convert(model, progress=False, group=True, shared_dropout=shared, **fields).train()


def test_copies_pickles_and_another_call_of_group():
    model = of_llama(True)
    want, plain = step(model), step(of_llama(False))
    assert want != plain
    stored = io.BytesIO()
    torch.save(model, stored)
    stored.seek(0)
    for other in (copy.deepcopy(model), torch.load(stored, weights_only=False)):
        assert masks_of(other) == masks_of(model) != {} and step(other) == want
    fastlora.group(model)
    assert masks_of(model) == {} and groups_of(model) and step(model) == plain
    fastlora.group(model, {"input_ids": tokens()}["input_ids"], shared_dropout=True)
    assert step(model) == want
    assert masks_of(fastlora.ungroup(model)) == {} == groups_of(model)


def test_the_report_says_so():
    model = of_llama(True)
    first = "model.layers.0.self_attn."
    rows = {row.name: row for row in fastlora.report(model)}
    assert rows[first + "k_proj"].mask == rows[first + "k_proj"].group == groups_of(model)[first + "q_proj"]
    assert rows[first + "o_proj"].mask == ()
    line = next(line for line in str(fastlora.report(model)).splitlines() if line.startswith(first + "k_proj"))
    assert "q_proj, v_proj (one mask)" in line
    assert "mask" not in str(fastlora.report(of_llama(False)))


def test_a_model_of_pefts_by_accelerate_and_undone():
    model = peft.get_peft_model(llama(), peft.LoraConfig(r=4, lora_dropout=P, target_modules="all-linear")).train()
    fastlora.accelerate(model, group={"input_ids": tokens()}, shared_dropout=True)
    assert len(masks_of(model)) == 10  # q, k, v, gate, up of two layers
    assert "(one mask)" in str(fastlora.report(model))
    step(model)
    assert masks_of(fastlora.decelerate(model)) == {}


# --- what is refused, and what is said --------------------------------------------------------------------------------


def test_without_groups_it_is_refused_and_nothing_changes():
    model = Three()
    with pytest.raises(ConfigError, match="ask for group as well"):
        fastlora.convert(model, r=2, target_modules=list(NAMES), progress=False, shared_dropout=True)
    assert type(model.q) is nn.Linear and model.q.weight.requires_grad
    wrapped: Any = peft.get_peft_model(Three(), peft.LoraConfig(r=2, target_modules=list(NAMES)))
    kind = type(wrapped.get_base_model().q)
    with pytest.raises(ConfigError, match="ask for group as well"):
        fastlora.accelerate(wrapped, shared_dropout=True)
    assert type(wrapped.get_base_model().q) is kind


def set_rate(layer: Any, rate: float) -> None:
    if hasattr(layer, "get_base_layer"):
        layer.lora_dropout["default"] = nn.Dropout(rate) if rate else nn.Identity()
    else:
        layer.adapter_configs["default"] = layer.adapter_configs["default"].replace(lora_dropout=rate)


@pytest.mark.parametrize("rate", [0.0, 0.1])
@pytest.mark.parametrize("make", [own, of_peft])
def test_rates_that_differ_are_refused(make, rate):
    model = fastlora.ungroup(make(shared=False))
    _, second, _ = layers(model)
    set_rate(second, rate)
    with pytest.raises(ConfigError, match=rf"one dropout_p in a group, got {rate}, {P} of q, k, v in a Three"):
        fastlora.group(model, torch.randn(2, WIDTH), shared_dropout=True)
    assert groups_of(model) == {} and not any(module._forward_pre_hooks for module in model.modules())
    fastlora.group(model, torch.randn(2, WIDTH))


@pytest.mark.parametrize("make", [own, of_peft])
def test_rates_that_come_to_differ_are_an_error_of_the_next_forward_in_training(make):
    model, x = make(), torch.randn(2, WIDTH)
    first, second, _ = layers(model)
    set_rate(second, 0.1)
    with pytest.raises(ConfigError, match=rf"one dropout_p in a group, got 0.1, {P} of layers"):
        model(x)
    model.eval()(x)
    model.train()
    set_rate(second, 0.0)  # a layer that does not drop takes no part
    model(x)
    set_rate(second, P)
    assert not any("_fastlora_scope" in layer.__dict__ for layer in (first, second))
    model(x)


@pytest.mark.parametrize("make", [own, of_peft])
def test_layers_computed_one_by_one_drop_by_themselves_and_it_is_said(make):
    model = make(r=WIDTH)
    assert len({int(mask.sum()) for mask in masks(model)}) == 1
    first, second, third = layers(model)
    handle = second.register_forward_pre_hook(lambda *_: None)  # something may happen to its weights before it runs
    with pytest.warns(UserWarning, match="each dropped by a mask of its own"):
        kept = [y != 0 for y in model(torch.ones(5, WIDTH))]
    assert not torch.equal(kept[0], kept[1])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.eval()(torch.ones(5, WIDTH))
        model.train()
        handle.remove()
        model(torch.ones(5, WIDTH))
        for layer in (first, second, third):
            set_rate(layer, 0.0)
        second.register_forward_pre_hook(lambda *_: None)
        model(torch.ones(5, WIDTH))


@pytest.mark.parametrize("make", [own, of_peft])
def test_merged_layers_are_said_only_where_another_drops(make):
    model = make()
    first, *others = layers(model)
    first.merge()
    with pytest.warns(UserWarning, match="each dropped by a mask of its own"):
        model(torch.randn(2, WIDTH))
    for layer in others:
        layer.merge()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(torch.randn(2, WIDTH))


def test_compiled_layers_drop_by_themselves():
    model = own(r=WIDTH)
    masks(model)
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="layers grouped")
        kept = [y != 0 for y in torch.compile(model, backend="aot_eager", fullgraph=True)(torch.ones(5, WIDTH))]
    assert not torch.equal(kept[0], kept[1])
