"""Layers and models whose rows use different adapters: training them together, modes, messages, adding many at once."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import fastlora
from fastlora import LoraConfig, settings
from fastlora.errors import ConfigError, DtypeError, FastloraError, ShapeError
from fastlora.nn import adapters as adapters_module
from fastlora.nn import rows
from tests.layer_tools import make, shake, snapshot

KINDS = ("lora", "qlora")
RANKS = {"one": 4, "two": 7, "three": 16, "wide": 64}
NAMES = ["two", None, "one", "wide", "two", "three", None, "one"]


def layer_of(kind="lora", names=RANKS, **fields):
    """A layer with several adapters, each off its start, and all of them training."""
    layer = make(kind, adapter_name=next(iter(names)), **{"r": next(iter(names.values())), **fields})
    for name, rank in list(names.items())[1:]:
        layer.add_adapter(name, r=rank, lora_alpha=2 * rank, **fields)
    shake(layer)
    fastlora.train_adapters(layer, list(names))
    return layer


def data(rows=8, tokens=3, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    x, dy = (torch.randn(rows, tokens, width, generator=generator).to(dtype) for width in (48, 40))
    return x, dy


def gradients(layer, x, dy, names):
    layer.zero_grad(set_to_none=True)
    x = x.clone().requires_grad_()
    y = layer(x, adapter_names=names)
    y.backward(dy)
    grads = {name: None if p.grad is None else p.grad.clone() for name, p in layer.named_parameters()}
    return y.detach(), x.grad, grads


def assert_near(got, want, what=""):
    scale = want.double().norm()
    assert (got.double() - want.double()).norm() <= 2e-6 * scale, what


# --- training together ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("use_dora", [False, True])
def test_each_adapter_learns_what_it_would_alone(kind, use_dora):
    layer = layer_of(kind, use_dora=use_dora)
    x, dy = data()
    y, dx, grads = gradients(layer, x, dy, NAMES)
    for name in RANKS:
        mine = [row for row, own in enumerate(NAMES) if own == name]
        layer.set_adapter(name)
        layer.zero_grad(set_to_none=True)
        alone = x[mine].clone().requires_grad_()
        out = layer(alone)
        out.backward(dy[mine])
        assert_near(y[mine], out.detach(), name)
        assert_near(dx[mine], alone.grad, name)
        for group in ("lora_A", "lora_B", *(["lora_magnitude"] if use_dora else [])):
            assert_near(grads[f"{group}.{name}"], getattr(layer, group)[name].grad, f"{group} {name}")


@pytest.mark.parametrize("dropped", ["lora", "dora"])
def test_with_dropout_each_sees_its_own_mask(dropped):
    """The mask of a row is the one its adapter alone would draw for the whole batch with the same seed."""
    layer = layer_of("lora", lora_dropout=0.3, use_dora=dropped == "dora")
    x, dy = data()
    for name in RANKS:
        torch.manual_seed(5)
        y, dx, grads = gradients(layer, x, dy, NAMES)
        torch.manual_seed(5)
        mine = torch.tensor([own == name for own in NAMES])
        whole, whole_dx, whole_grads = gradients(layer, x, dy * mine[:, None, None], [name] * len(NAMES))
        assert_near(y[mine], whole[mine], name)
        assert_near(dx[mine], whole_dx[mine], name)
        for group in ("lora_A", "lora_B"):
            assert_near(grads[f"{group}.{name}"], whole_grads[f"{group}.{name}"], f"{group} {name}")


def test_sixty_four_adapters_of_all_ranks():
    names = {f"u{i}": 4 + (i * 60) // 63 for i in range(64)}
    assert set(names.values()) >= {4, 64}
    layer = layer_of("qlora", names)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(2)).tolist()
    chosen = [f"u{i}" for i in order]
    x, dy = data(64, 1)
    y, dx, grads = gradients(layer, x, dy, chosen)
    for row, name in enumerate(chosen):
        layer.set_adapter(name)
        layer.zero_grad(set_to_none=True)
        alone = x[row].clone().requires_grad_()
        out = layer(alone)
        out.backward(dy[row])
        assert_near(y[row], out.detach(), name)
        assert_near(dx[row], alone.grad, name)
        for group in ("lora_A", "lora_B"):
            assert_near(grads[f"{group}.{name}"], getattr(layer, group)[name].grad, f"{group} {name}")


def test_adapters_without_a_row_and_frozen_ones_have_no_gradient():
    layer = layer_of()
    x, dy = data(3)
    layer.lora_A["one"].requires_grad_(False)
    _, _, grads = gradients(layer, x, dy, ["one", None, "two"])
    assert {name for name, grad in grads.items() if grad is not None} == {"lora_B.one", "lora_A.two", "lora_B.two"}


def test_only_x_wants_a_gradient():
    layer = layer_of()
    fastlora.train_adapters(layer, [])
    x, dy = data()
    _, dx, grads = gradients(layer, x, dy, NAMES)
    assert dx is not None
    assert all(grad is None for grad in grads.values())


def test_adapters_of_several_dtypes_keep_their_own():
    layer = layer_of()
    exact, dx, _ = gradients(layer, *data(), NAMES)
    for name in ("two", "wide"):
        for group in (layer.lora_A, layer.lora_B):
            group[name].data = group[name].data.bfloat16()
    y, mixed_dx, grads = gradients(layer, *data(), NAMES)
    for name in RANKS:
        assert grads[f"lora_A.{name}"].dtype == layer.lora_A[name].dtype
    untouched = [row for row, own in enumerate(NAMES) if own not in ("two", "wide")]
    assert torch.equal(y[untouched], exact[untouched])
    assert torch.equal(mixed_dx[untouched], dx[untouched])
    assert (y - exact).abs().max() < 0.1


def test_a_broken_adapter_breaks_its_own_rows_alone():
    layer = layer_of()
    x, dy = data()
    y, dx, grads = gradients(layer, x, dy, NAMES)
    layer.lora_B["two"].data.fill_(float("nan"))
    broken, broken_dx, broken_grads = gradients(layer, x, dy, NAMES)
    others = [row for row, own in enumerate(NAMES) if own != "two"]
    mine = [row for row, own in enumerate(NAMES) if own == "two"]
    assert broken[mine].isnan().all()
    assert torch.equal(broken[others], y[others])
    assert torch.equal(broken_dx[others], dx[others])
    for name in ("one", "three", "wide"):
        assert torch.equal(broken_grads[f"lora_A.{name}"], grads[f"lora_A.{name}"])


@pytest.mark.parametrize("p", [0.0, 0.4])
def test_the_same_step_twice_gives_the_same_bits(p):
    layer = layer_of("qlora", lora_dropout=p)
    results = []
    for _ in range(2):
        torch.manual_seed(3)
        results.append(gradients(layer, *data(), NAMES))
    (y, dx, grads), (y2, dx2, grads2) = results
    assert torch.equal(y, y2)
    assert torch.equal(dx, dx2)
    assert all(torch.equal(grads[name], grads2[name]) for name in grads if grads[name] is not None)


# --- modes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("use_dora", [False, True])
def test_checkpointing_draws_the_same_masks(use_dora):
    layer = layer_of("qlora", lora_dropout=0.4, use_dora=use_dora)
    x, dy = data()
    torch.manual_seed(11)
    y, dx, grads = gradients(layer, x, dy, NAMES)
    layer.zero_grad(set_to_none=True)
    torch.manual_seed(11)
    again = x.clone().requires_grad_()
    out = checkpoint(lambda t: layer(t, adapter_names=NAMES), again, use_reentrant=False)
    out.backward(dy)
    assert torch.equal(out, y)
    assert torch.equal(again.grad, dx)
    for name, parameter in layer.named_parameters():
        if grads[name] is not None:
            assert torch.equal(parameter.grad, grads[name]), name


def test_low_memory_redraws_the_same_masks():
    layer = layer_of("lora", lora_dropout=0.4)
    torch.manual_seed(11)
    _, dx, grads = gradients(layer, *data(), NAMES)
    torch.manual_seed(11)
    with settings.override(low_memory=True):
        _, dx2, grads2 = gradients(layer, *data(), NAMES)
    assert torch.equal(dx, dx2)
    assert all(torch.equal(grads[name], grads2[name]) for name in grads if grads[name] is not None)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("use_dora", [False, True])
def test_autocast(kind, use_dora):
    layer = layer_of(kind, use_dora=use_dora)
    x, dy = data()
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x, adapter_names=NAMES)
        alone = {name: layer.adapter_forward(x, name) for name in (*RANKS, None)}
    assert y.dtype == torch.bfloat16
    for row, name in enumerate(NAMES):
        near = alone[name][row].float()
        assert (y[row].float() - near).abs().max() <= 4 * 2.0**-8 * near.abs().max()
        if name is None:
            assert torch.equal(y[row], alone[None][row])
    y.backward(dy.bfloat16())
    assert layer.lora_A["two"].grad.dtype == torch.float32


def test_compute_dtype_of_a_quantized_layer():
    layer = layer_of("qlora")
    layer.compute_dtype = torch.bfloat16
    x, dy = data()
    y, dx, _ = gradients(layer, x, dy, NAMES)
    assert y.dtype == dx.dtype == torch.float32
    for row in (1, 6):
        assert torch.equal(y[row], layer.adapter_forward(x, None)[row].detach())


def test_inference_mode_first_and_training_after():
    """What one batch's layers share must not be an inference tensor, which autograd could not save."""
    layer = layer_of()
    rows._kept.clear()
    x, dy = data()
    with torch.inference_mode():
        first = layer(x, adapter_names=NAMES)
    y, _, _ = gradients(layer, x, dy, NAMES)
    assert torch.equal(first, y)


def test_rows_are_sorted_once_a_batch_and_forgotten_in_the_end():
    layer, x = layer_of(), data()[0]
    rows._kept.clear()
    layer(x, adapter_names=NAMES)
    layer(x, adapter_names=list(NAMES))
    assert len(rows._kept) == 1
    layer(x[:, :1], adapter_names=NAMES)
    layer(x, adapter_names=[None, *NAMES[1:]])
    assert len(rows._kept) == 3
    for count in range(1, 12):
        layer(x[:, :1].expand(-1, count, -1), adapter_names=NAMES)
    assert len(rows._kept) == rows._MOST_KEPT


def test_compile_has_no_break_and_the_same_result():
    layer = layer_of("qlora", lora_dropout=0.3)
    x, dy = data()
    torch.manual_seed(4)
    y, dx, grads = gradients(layer, x, dy, NAMES)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    layer.zero_grad(set_to_none=True)
    torch.manual_seed(4)
    again = x.clone().requires_grad_()
    out = compiled(again, adapter_names=NAMES)
    out.backward(dy)
    assert torch.equal(out, y)
    assert torch.equal(again.grad, dx)
    for name, parameter in layer.named_parameters():
        if grads[name] is not None:
            assert torch.equal(parameter.grad, grads[name]), name


def test_output_may_be_changed_in_place():
    layer = layer_of(use_dora=True)
    x, dy = data()
    _, _, grads = gradients(layer, x, dy, NAMES)
    layer.zero_grad(set_to_none=True)
    y = layer(x, adapter_names=NAMES)
    y.mul_(2)
    y.backward(dy / 2)
    for name, parameter in layer.named_parameters():
        if grads[name] is not None:
            assert_near(parameter.grad, grads[name], name)


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "error", "match"),
    [
        (["nobody", *NAMES[1:]], ConfigError, "unknown adapter 'nobody'; have one, two"),
        (NAMES[1:], ShapeError, "one adapter name per row, 8, got 7"),
        ("one", ShapeError, "one adapter name per row, 8, got 'one'"),
        ([], ShapeError, "8, got 0"),
    ],
)
def test_bad_names(names, error, match):
    layer = layer_of()
    before = snapshot(layer)
    with pytest.raises(error, match=match):
        layer(data()[0], adapter_names=names)
    assert snapshot(layer) == before


def test_an_adapter_that_does_not_fit_is_named():
    layer = layer_of()
    x = data()[0]
    layer.lora_A["three"] = nn.Parameter(layer.lora_A["three"].data.to("meta"))
    with pytest.raises(
        DtypeError, match="adapter three: expected every tensor on the device of x, cpu, got one on meta"
    ):
        layer(x, adapter_names=NAMES)
    layer.lora_A["three"] = nn.Parameter(torch.zeros(16, 48, dtype=torch.float64))
    with pytest.raises(DtypeError, match="adapter three: .*one floating dtype"):
        layer(x, adapter_names=NAMES)
    with pytest.raises(ShapeError, match="in_features=48"):
        layer(x[..., :5], adapter_names=NAMES)


# --- adding many, training many ---------------------------------------------------------------------------------------


def model_of():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(48, 40), nn.ReLU(), nn.Linear(40, 48))
    return fastlora.convert(model, LoraConfig(r=4), progress=False)


def test_add_adapters_adds_all_or_nothing(monkeypatch):
    model = model_of()
    before = snapshot(model)
    real = adapters_module.AdapterLayer.add_adapter
    calls = []

    def failing(self, name, *args, **kwargs):
        calls.append(name)
        if len(calls) == 4:
            raise MemoryError("no room for one more")
        return real(self, name, *args, **kwargs)

    monkeypatch.setattr(adapters_module.AdapterLayer, "add_adapter", failing)
    with pytest.raises(MemoryError):
        fastlora.add_adapters(model, {f"u{i}": LoraConfig(r=3) for i in range(4)})
    assert len(calls) == 4
    assert snapshot(model) == before
    monkeypatch.undo()
    fastlora.add_adapters(model, {f"u{i}": {"r": 2 + i, "use_dora": i == 1} for i in range(4)})
    assert list(model[0].lora_A) == ["default", "u0", "u1", "u2", "u3"]
    assert [model[2].lora_B[f"u{i}"].shape[1] for i in range(4)] == [2, 3, 4, 5]
    after = snapshot(model)
    bad = {"new": LoraConfig(r=2), "u1": LoraConfig(r=2)}
    with pytest.raises(FastloraError, match="'u1' exists already"):
        fastlora.add_adapters(model, bad)
    assert snapshot(model) == after


def test_two_inits_that_rewrite_one_base_are_refused_before_anything_changes():
    model = model_of()
    for layer in (model[0], model[2]):
        layer.delete_adapter("default")
    before = snapshot(model)
    with pytest.raises(ConfigError, match="rewrites the base"):
        fastlora.add_adapters(model, {name: LoraConfig(r=2, init_lora_weights="pissa") for name in ("a", "b")})
    assert snapshot(model) == before


def test_train_adapters_lets_several_dora_adapters_learn():
    model = model_of()
    fastlora.add_adapters(model, {name: {"r": 2, "use_dora": True} for name in ("a", "b", "c")})
    with pytest.raises(ConfigError, match="DoRA"):
        fastlora.set_adapter(model, ["a", "b"])
    fastlora.train_adapters(model, ["a", "b"])
    assert model[0].active_adapters == ["default"]
    training = {name.rpartition(".")[2] for name, p in model.named_parameters() if p.requires_grad}
    assert training == {"a", "b"}
    before = snapshot(model)
    with pytest.raises(ConfigError, match="unknown adapter 'zzz'"):
        fastlora.train_adapters(model, ["a", "zzz"])
    assert snapshot(model) == before
    names = ["a", "b", None, "a"]
    twin = copy.deepcopy(model)
    x = torch.randn(4, 48)
    model[2](torch.relu(model[0](x, adapter_names=names)), adapter_names=names).square().sum().backward()
    for layer in (model[0], model[2]):
        assert layer.lora_magnitude["a"].grad is not None
        assert layer.lora_B["b"].grad.abs().sum() > 0
        assert layer.lora_A["c"].grad is None
    only = [0, 3]
    for module in (twin[0], twin[2]):
        module.set_adapter("a")
    twin[2](torch.relu(twin[0](x[only]))).square().sum().backward()
    assert_near(model[2].lora_B["a"].grad, twin[2].lora_B["a"].grad)
    assert_near(model[0].lora_B["a"].grad, twin[0].lora_B["a"].grad)


def test_adalora_rows():
    layer = make("lora", adapter_name="plain", r=3)
    layer.add_adapter("ada", fastlora.adalora.AdaLoraConfig(init_r=4, target_r=2, total_step=10))
    shake(layer)
    layer.lora_E["ada"].data.normal_()
    fastlora.train_adapters(layer, ["plain", "ada"])
    x, dy = data(3)
    y, _, grads = gradients(layer, x, dy, ["ada", None, "plain"])
    layer.set_adapter("ada")
    layer.zero_grad(set_to_none=True)
    out = layer(x[:1])
    out.backward(dy[:1])
    assert_near(y[:1], out.detach())
    for group in ("lora_A", "lora_B", "lora_E"):
        assert_near(grads[f"{group}.ada"], getattr(layer, group)["ada"].grad, group)
