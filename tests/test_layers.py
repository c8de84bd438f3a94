"""The layers' numbers: against PEFT's own layers in float64, row by row, adapter by adapter, and at B = 0."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from fastlora import ConfigError, LoraLinear, ShapeError
from fastlora.math import philox
from tests.layer_tools import BACKENDS, Twin, forced, grads, make, near, parameters, same, shake

KINDS = ("lora", "qlora")
pytest.importorskip("peft")


@pytest.fixture(params=BACKENDS, autouse=True)
def backend(request):
    """Every test runs with all ops forced to each backend in turn."""
    with forced(request.param):
        yield request.param


def compare(layer, x, dy, dtype=None, units=2.0):
    """y, dx, dA, dB, dmag and dbias against PEFT in float64, allowing PEFT's own error at the layer's dtypes."""
    dtype = dtype or x.dtype
    adapter_dtype = layer.lora_A["default"].dtype
    truth, peer = Twin(layer, torch.float64), Twin(layer, dtype, adapter_dtype)
    ours, theirs, exact = parameters(layer), peer.parameters(), truth.parameters()
    names = ["y", "dx", "dA", "dB", "dmag"][: 2 + len(ours)]
    if layer.bias is not None and layer.bias.requires_grad:
        names.append("dbias")
        ours = [*ours, layer.bias]
        theirs, exact = [*theirs, peer.layer.base_layer.bias], [*exact, truth.layer.base_layer.bias]
    got = grads(layer, x, dy, ours)
    want = grads(truth.layer, x.double(), dy.double(), exact)
    allowed = grads(peer.layer, x, dy, theirs)
    assert got[0].dtype == x.dtype
    for name, mine, right, peers in zip(names, got, want, allowed, strict=True):
        near(mine, right, peers, units, name)


# --- against PEFT -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(48,), (1, 48), (7, 48), (3, 5, 48), (2, 1, 3, 48)], ids=str)
def test_peft_parity_by_shape(kind, shape):
    layer = shake(make(kind))
    compare(layer, torch.randn(shape), torch.randn(*shape[:-1], 40))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(0, 48), (3, 0, 48), (0, 2, 48)], ids=str)
@pytest.mark.parametrize("fields", [{}, {"use_dora": True, "lora_dropout": 0.5}], ids=["lora", "dora+dropout"])
def test_empty_input_gives_empty_output_and_zero_gradients(kind, shape, fields):
    layer = shake(make(kind, **fields))
    layer.bias.requires_grad_()
    x = torch.randn(shape, requires_grad=True)
    y = layer(x)
    assert y.shape == (*shape[:-1], 40)
    y.sum().backward()
    assert x.grad.shape == x.shape
    for parameter in (*parameters(layer), layer.bias):
        assert parameter.grad.shape == parameter.shape
        assert not parameter.grad.any()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("r", [1, 3, 5, 8, 33, 70])
def test_peft_parity_by_rank(kind, r):
    """70 exceeds both sides of the weight."""
    layer = shake(make(kind, 48, 40, r=r))
    compare(layer, torch.randn(9, 48), torch.randn(9, 40))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sizes", [(1, 1), (1, 17), (33, 1), (31, 19)], ids=str)
def test_peft_parity_at_odd_features(kind, sizes):
    k, n = sizes
    layer = shake(make(kind, k, n, r=3))
    compare(layer, torch.randn(6, k), torch.randn(6, n))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("use_dora", [False, True])
def test_peft_parity_by_option(kind, bias, use_rslora, use_dora):
    """s = 11/5 or 11/√5: not a power of two. A trained bias gets Σ dy, and DoRA never scales it."""
    layer = make(kind, bias=bias, r=5, lora_alpha=11, use_rslora=use_rslora, use_dora=use_dora)
    assert layer.scaling["default"] == pytest.approx(11 / 5**0.5 if use_rslora else 11 / 5)
    if bias:
        layer.bias.requires_grad_()
    compare(shake(layer), torch.randn(2, 6, 48), torch.randn(2, 6, 40))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("use_dora", [False, True])
def test_peft_parity_by_dtype(kind, dtype, adapter_dtype, use_dora):
    """Every mix: the output has x's dtype, each gradient its parameter's."""
    layer = make(kind, dtype=dtype, adapter_dtype=adapter_dtype, use_dora=use_dora)
    layer = shake(layer)
    x, dy = torch.randn(11, 48).to(dtype), torch.randn(11, 40).to(dtype)
    compare(layer, x, dy, dtype)
    for parameter, gradient in zip(parameters(layer), grads(layer, x, dy, parameters(layer))[2:], strict=True):
        assert gradient.dtype == parameter.dtype == adapter_dtype


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.bfloat16])
def test_peft_parity_under_cpu_autocast(kind, use_dora, adapter_dtype):
    """fp32 base and x under bf16 autocast: bf16 out, fp32 x gradient, the adapters' gradients in their own dtype."""
    layer = shake(make(kind, adapter_dtype=adapter_dtype, use_dora=use_dora))
    truth, peer = Twin(layer, torch.float64), Twin(layer, torch.float32, adapter_dtype)
    x, dy = torch.randn(4, 5, 48), torch.randn(4, 5, 40).bfloat16()

    def autocast(run):
        def call(x):
            with torch.autocast("cpu", torch.bfloat16):
                return run(x)

        return call

    got = grads(autocast(layer), x, dy, parameters(layer))
    allowed = grads(autocast(peer.layer), x, dy, peer.parameters())
    want = grads(truth.layer, x.double(), dy.double(), truth.parameters())
    assert got[0].dtype == torch.bfloat16
    assert got[1].dtype == torch.float32
    for name, mine, right, peers in zip(("y", "dx", "dA", "dB", "dmag"), got, want, allowed, strict=False):
        near(mine.bfloat16() if name == "dx" else mine, right, peers, 2.0, name)


def test_compute_dtype_wins_over_the_dtype_of_x_and_the_result_comes_back():
    layer = shake(make("qlora", compute_dtype=torch.bfloat16))
    plain = shake(make("qlora"))
    x = torch.randn(5, 48)
    y = layer(x)
    assert y.dtype == torch.float32
    same(y, plain(x.bfloat16()).float())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("use_dora", [False, True])
def test_strided_x_and_expanded_dy(kind, use_dora):
    """A transposed, a sliced and a broadcast x, and dy of stride 0, give what contiguous copies give."""
    layer = shake(make(kind, use_dora=use_dora))
    wide = torch.randn(6, 96, 4)
    views = [
        wide[:, ::2, 1].unsqueeze(0).expand(3, 6, 48),
        wide.permute(2, 0, 1)[:, :, 48:],
        torch.randn(48, 5).T,
        torch.randn(1, 48).expand(7, 48),
    ]
    for x in views:
        assert not x.is_contiguous()
        dy = torch.randn(40).expand(*x.shape[:-1], 40)
        got = grads(layer, x, dy, parameters(layer))
        for mine, want in zip(got, grads(layer, x.contiguous(), dy.contiguous(), parameters(layer)), strict=True):
            same(mine, want)


def test_parameters_that_are_transposed_views():
    layer = shake(make("lora"))
    x, dy = torch.randn(5, 48), torch.randn(5, 40)
    want = grads(layer, x, dy, parameters(layer))
    for name in ("lora_A", "lora_B"):
        group = getattr(layer, name)
        group["default"] = nn.Parameter(group["default"].detach().T.contiguous().T)
        assert not group["default"].is_contiguous()
    for mine, right in zip(grads(layer, x, dy, parameters(layer)), want, strict=True):
        near(mine, right, units=4)


# --- several adapters -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_several_active_adapters_sum_as_in_peft(kind):
    layer = make(kind, r=4, lora_alpha=11)
    layer.add_adapter("second", r=3, use_rslora=True)
    layer.add_adapter("third", r=1)
    shake(layer).set_adapter(["third", "default"])
    truth, peer = Twin(layer, torch.float64), Twin(layer, torch.float32)
    x, dy = torch.randn(7, 48), torch.randn(7, 40)
    ours = [*parameters(layer), *parameters(layer, "third")]
    exact, theirs = ([*t.parameters(), *t.parameters("third")] for t in (truth, peer))
    got, allowed = grads(layer, x, dy, ours), grads(peer.layer, x, dy, theirs)
    for mine, right, peers in zip(got, grads(truth.layer, x.double(), dy.double(), exact), allowed, strict=True):
        near(mine, right, peers)
    assert not any(p.requires_grad for p in parameters(layer, "second"))


@pytest.mark.parametrize("kind", KINDS)
def test_switching_adapters_is_never_silently_the_first(kind):
    layer = make(kind)
    layer.add_adapter("second", r=7, use_dora=True)
    shake(layer)
    x = torch.randn(3, 48)
    first = layer(x)
    for name in ("second", "default"):
        layer.set_adapter(name)
        near(layer(x).detach(), Twin(layer, torch.float64).layer(x.double()).detach(), units=8)
    same(layer(x), first)
    layer.set_adapter("second")
    assert not torch.allclose(layer(x), first, atol=0.1)


@pytest.mark.parametrize("kind", KINDS)
def test_set_adapter_and_disabling_restore_output_and_requires_grad(kind):
    layer = make(kind)
    layer.add_adapter("second", r=2)
    shake(layer)
    x = torch.randn(3, 48)
    before, flags = layer(x), {n: p.requires_grad for n, p in layer.named_parameters()}
    assert flags["lora_A.default"] and not flags["lora_A.second"]
    layer.set_adapter("second")
    layer.set_adapter("default")
    with layer.disable_adapters():
        with layer.disable_adapters():
            base = layer(x)
        same(layer(x), base)
    near(base, nn.functional.linear(x, layer.dequantize(torch.float32), layer.bias), units=8)
    with pytest.raises(ValueError, match="stop"), layer.disable_adapters():
        raise ValueError("stop")
    same(layer(x), before)
    assert {n: p.requires_grad for n, p in layer.named_parameters()} == flags


def test_set_adapter_refuses_what_it_cannot_do_and_changes_nothing():
    layer = make("lora")
    layer.add_adapter("dora", use_dora=True)
    layer.set_adapter("dora")
    for bad, words in ((["default", "dora"], "DoRA"), ("nobody", "unknown adapter 'nobody'; have default, dora")):
        with pytest.raises(ConfigError, match=words):
            layer.set_adapter(bad)
        assert layer.active_adapters == ["dora"]
        assert layer.lora_A["dora"].requires_grad
        assert not layer.lora_A["default"].requires_grad


def test_delete_adapter():
    layer = make("qlora")
    layer.add_adapter("second", use_dora=True)
    shake(layer)
    x = torch.randn(3, 48)
    layer.set_adapter("second")
    second = layer(x)
    layer.delete_adapter("default")
    same(layer(x), second)
    layer.delete_adapter("second")
    assert [k for k in layer.state_dict() if k.startswith("lora")] == []
    with layer.disable_adapters():
        base = layer(x)
    same(layer(x), base)
    with pytest.raises(ConfigError, match="unknown adapter"):
        layer.delete_adapter("second")


# --- one adapter per row ----------------------------------------------------------------------------------------------


def mixed(kind, **fields):
    layer = make(kind, r=4, **fields)
    layer.add_adapter("b", r=3, lora_alpha=5, **fields)
    layer.add_adapter("dora", r=2, use_dora=True, **fields)
    return shake(layer)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [(), (3,), (2, 2)], ids=str)
def test_adapter_names_equal_one_adapter_at_a_time(kind, dtype, tokens):
    layer = mixed(kind) if kind == "qlora" else mixed(kind, adapter_dtype=dtype).to(dtype)
    x = torch.randn(6, *tokens, 48).to(dtype)
    names = ["b", None, "default", "dora", "b", None]
    y = layer(x, adapter_names=names)
    assert y.dtype == dtype
    alone = {}
    with layer.disable_adapters():
        alone[None] = layer(x)
    for name in ("default", "b", "dora"):
        layer.set_adapter(name)
        alone[name] = layer(x)
    for row, name in enumerate(names):
        if name is None:
            same(y[row], alone[None][row])
        else:
            near(y[row], alone[name][row], units=4, what=str(name))
    order = torch.tensor([4, 2, 5, 0, 3, 1])
    same(layer(x[order], adapter_names=[names[i] for i in order]), y[order])


def test_adapter_names_gradients_reach_only_the_rows_own_adapter():
    layer = mixed("lora")
    layer.set_adapter(["default", "b"])
    for parameter in parameters(layer, "dora"):
        parameter.requires_grad_()
    x = torch.randn(5, 2, 48, requires_grad=True)
    dy = torch.randn(5, 2, 40)
    names = ["b", None, "dora", "b", "default"]
    layer(x, adapter_names=names).backward(dy)
    got = {name: [p.grad for p in parameters(layer, name)] for name in ("default", "b", "dora")}
    for name in ("default", "b", "dora"):
        rows = [row for row, own in enumerate(names) if own == name]
        layer.set_adapter(name)
        _, dx, *want = grads(layer, x[rows], dy[rows], parameters(layer, name))
        for mine, right in zip(got[name], want, strict=True):
            near(mine, right, units=8, what=name)
        near(x.grad[rows], dx, units=8, what=f"dx {name}")
    near(x.grad[1], dy[1] @ layer.weight, units=8, what="dx of the base row")


@pytest.mark.parametrize("names", [["default", None], [None, "default", None]])
def test_adapter_names_on_rows_without_tokens(names):
    layer = mixed("lora")
    assert layer(torch.randn(len(names), 0, 48), adapter_names=names).shape == (len(names), 0, 40)


def test_adapter_names_bad_input():
    layer = mixed("lora")
    x = torch.randn(2, 48)
    with pytest.raises(ConfigError, match="unknown adapter 'nobody'"):
        layer(x, adapter_names=["nobody", None])
    with pytest.raises(ShapeError, match="one adapter name per row, 2, got 1"):
        layer(x, adapter_names=["b"])
    with pytest.raises(ShapeError, match="per row"):
        layer(x[0], adapter_names=["b"])
    with layer.disable_adapters():
        base = layer(x)
        same(layer(x, adapter_names=["b", "dora"]), base)
    same(layer(x, adapter_names=[None, None]), base)


def test_adapter_names_with_different_dropout_in_one_batch():
    """Rows of one adapter see its p; a row whose adapter has p = 0 is exact."""
    layer = make("lora", r=4)
    layer.add_adapter("dropped", r=4, lora_dropout=0.9)
    shake(layer)
    x = torch.randn(4, 48)
    names = ["default", "dropped", None, "dropped"]
    y, again = layer(x, adapter_names=names), layer(x, adapter_names=names)
    same(y[[0, 2]], again[[0, 2]])
    assert not torch.equal(y[[1, 3]], again[[1, 3]])
    layer.eval()
    exact = layer(x, adapter_names=names)
    near(y[0], exact[0], units=4)
    assert not torch.allclose(y[[1, 3]], exact[[1, 3]], atol=0.1)


# --- B = 0 ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("p", [0.0, 0.9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sizes", [(48, 40), (100, 33)], ids=str)
def test_at_the_start_the_output_is_the_disabled_layers_bit_for_bit(kind, use_dora, p, dtype, sizes):
    """Training and eval: dropout touches the adapter's branch only, DoRA's c is exactly 1."""
    k, n = sizes
    layer = make(kind, k, n, dtype=dtype, use_dora=use_dora, lora_dropout=p, r=5)
    for m in (1, 5, 33):
        x = torch.randn(m, k).to(dtype)
        for module in (layer.train(), layer.eval()):
            y = module(x)
            with module.disable_adapters():
                base = module(x)
            same(y, base)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("use_dora", [False, True])
def test_at_the_start_under_autocast_too(kind, use_dora):
    layer = make(kind, use_dora=use_dora)
    x = torch.randn(9, 48)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        with layer.disable_adapters():
            base = layer(x)
    same(y, base)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("use_dora", [False, True])
def test_eval_ignores_dropout(kind, use_dora):
    layer = shake(make(kind, lora_dropout=0.7, use_dora=use_dora)).eval()
    compare(layer, torch.randn(5, 48), torch.randn(5, 40))
    x = torch.randn(5, 48)
    same(layer(x), layer(x))
    layer.train()
    assert not torch.equal(layer(x), layer(x))
    nn.Sequential(layer).eval()
    same(layer(x), layer(x))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fields", [{}, {"use_dora": True}, {"use_dora": True, "dora_dropout": "shared"}], ids=str)
def test_training_dropout_is_exact_given_the_mask(kind, fields):
    """One mask serves y, dx, dA, dB and dmag: the layer equals plain autograd with the mask its own seed draws."""
    p = 0.4
    layer = shake(make(kind, lora_dropout=p, bias=True, **fields))
    x, dy = torch.randn(9, 48), torch.randn(9, 40)
    torch.manual_seed(99)
    got = grads(layer, x, dy, parameters(layer))
    torch.manual_seed(99)
    seed = torch.ops.fastlora.draw_seed(torch.empty(1, dtype=torch.int64))
    keep = philox.unpack_bits(philox.dropout_bits(seed, layer.stream("default"), 9, 48, p), 48)
    assert 0.4 < keep.float().mean() < 0.8
    w, bias, s = layer.dequantize(torch.float32).double(), layer.bias.detach().double(), layer.scaling["default"]
    leaves = [t.detach().double().requires_grad_() for t in parameters(layer)]

    def exact(x):
        xd = x * keep * philox.keep_scale(p)
        delta = s * (xd @ leaves[0].T) @ leaves[1].T
        if not fields:
            return x @ w.T + delta + bias
        norm = (w + s * leaves[1] @ leaves[0]).norm(dim=1).detach()
        c = leaves[2] / norm
        if "dora_dropout" in fields:
            return c * (x @ w.T + delta) + bias
        return x @ w.T + (c - 1) * (xd @ w.T) + c * delta + bias

    for name, mine, right in zip(
        ("y", "dx", "dA", "dB", "dmag"), got, grads(exact, x.double(), dy.double(), leaves), strict=False
    ):
        near(mine, right, units=16, what=name)


@pytest.mark.parametrize("kind", KINDS)
def test_dropout_repeats_under_a_seed_and_has_the_right_rate(kind):
    """A = identity-like rows read the mask back: the rate within 5 sigma, kept entries scaled by 1/(1-p)."""
    p, k, m = 0.3, 64, 500
    layer = make(kind, k, k, bias=False, r=k, lora_alpha=k, lora_dropout=p)
    layer.lora_A["default"].data = torch.eye(k)
    layer.lora_B["default"].data = torch.eye(k)
    x = torch.ones(m, k)
    torch.manual_seed(5)
    y = layer(x)
    torch.manual_seed(5)
    same(layer(x), y)
    assert not torch.equal(layer(x), y)
    with layer.disable_adapters():
        delta = y - layer(x)
    kept = delta > 0.5
    assert abs(kept.double().mean() - (1 - p)) < 5 * (p * (1 - p) / (m * k)) ** 0.5
    near(delta[kept], torch.full((int(kept.sum()),), philox.keep_scale(p)), units=16)
    assert delta[~kept].abs().max() < 1e-5


# --- frozen, accumulated, in place ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("frozen", ["x", "A", "B", "magnitude", "x A", "A B", "x B magnitude", "x A B"])
def test_frozen_inputs_get_none_and_the_others_the_same_as_ever(kind, frozen):
    layer = shake(make(kind, use_dora=True))
    layer.bias.requires_grad_()
    tensors = {"A": layer.lora_A["default"], "B": layer.lora_B["default"], "magnitude": layer.lora_magnitude["default"]}
    x, dy = torch.randn(6, 48, requires_grad=True), torch.randn(6, 40)
    layer(x).backward(dy)
    everything = {**tensors, "x": x, "bias": layer.bias}
    want = {name: t.grad for name, t in everything.items()}
    for name, t in everything.items():
        t.grad = None
        t.requires_grad_(name not in frozen.split())
    layer(x).backward(dy)
    for name, t in everything.items():
        if name in frozen.split():
            assert t.grad is None, name
        else:
            same(t.grad, want[name])


def test_nothing_to_train_builds_no_graph():
    layer = make("lora").requires_grad_(False)
    assert not layer(torch.randn(2, 48)).requires_grad
    assert layer(torch.randn(2, 48, requires_grad=True)).requires_grad


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_accumulate_and_repeat(kind):
    layer = shake(make(kind, use_dora=True))
    batches = [(torch.randn(4, 48), torch.randn(4, 40)) for _ in range(3)]
    single = [grads(layer, x, dy, parameters(layer))[2:] for x, dy in batches]
    for x, dy in batches:
        layer(x).backward(dy)
    for parameter, parts in zip(parameters(layer), zip(*single, strict=True), strict=True):
        same(parameter.grad, parts[0] + parts[1] + parts[2])
    x = batches[0][0].clone().requires_grad_()
    y = layer(x)
    first = torch.autograd.grad(y.sum(), [x, *parameters(layer)], retain_graph=True)
    for one, two in zip(first, torch.autograd.grad(y.sum(), [x, *parameters(layer)]), strict=True):
        same(one, two)


def test_double_backward_raises_rather_than_lies():
    layer = shake(make("lora"))
    x = torch.randn(3, 48, requires_grad=True)
    (dx,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fields", [{}, {"use_dora": True}, {"lora_dropout": 0.5}], ids=str)
def test_no_grad_and_inference_mode_then_training(kind, fields):
    layer = shake(make(kind, **fields)).eval()
    x, dy = torch.randn(6, 48), torch.randn(6, 40)
    want = grads(layer, x, dy, parameters(layer))
    with torch.no_grad():
        same(layer(x), want[0])
        assert not layer(x).requires_grad
    with torch.inference_mode():
        same(layer(x).clone(), want[0])
    for mine, right in zip(grads(layer, x, dy, parameters(layer)), want, strict=True):
        same(mine, right)
    layer.train()
    torch.manual_seed(3)
    with torch.no_grad():
        y = layer(x)
    torch.manual_seed(3)
    same(grads(layer, x, dy, parameters(layer))[0], y)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("use_dora", [False, True])
def test_x_and_parameters_are_never_written(kind, use_dora):
    layer = shake(make(kind, use_dora=use_dora, lora_dropout=0.5))
    x = torch.randn(5, 48, requires_grad=True)
    kept = [(t, t.detach().clone(), t._version) for t in (x, *layer.parameters())]
    dy = torch.randn(5, 40)
    dy_before = dy.clone()
    layer(x).backward(dy)
    same(dy, dy_before)
    for tensor, value, version in kept:
        same(tensor.detach(), value)
        assert tensor._version == version


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("use_dora", [False, True])
def test_the_output_may_be_modified_in_place(kind, use_dora):
    layer = shake(make(kind, use_dora=use_dora))
    x, dy = torch.randn(5, 48), torch.randn(5, 40)
    want = grads(lambda x: torch.relu(layer(x) + 1), x, dy, parameters(layer))
    for mine, right in zip(grads(lambda x: layer(x).add_(1).relu_(), x, dy, parameters(layer)), want, strict=True):
        same(mine, right)


@pytest.mark.parametrize("kind", KINDS)
def test_scale_zero_and_rescaling_act_on_the_next_call(kind):
    layer = shake(make(kind, lora_alpha=0))
    x, dy = torch.randn(5, 48), torch.randn(5, 40)
    y, dx, da, db = grads(layer, x, dy, parameters(layer))
    with layer.disable_adapters():
        base, base_dx = grads(layer, x, dy, [])
    same(y, base)
    near(dx, base_dx, units=2)
    assert not da.any() and not db.any()
    layer.scaling["default"] = 1.5
    twin = Twin(layer, torch.float64)
    twin.layer.scaling["default"] = 1.5
    near(layer(x).detach(), twin.layer(x.double()).detach(), units=8)


@pytest.mark.parametrize("kind", KINDS)
def test_parameters_changed_in_any_way_are_seen_by_the_next_forward(kind):
    """DoRA's norm follows every way of updating A and B, whether or not it bumps the tensors' version."""
    layer = shake(make(kind, use_dora=True))
    x, dy = torch.randn(6, 48), torch.randn(6, 40)

    def check():
        near(layer(x).detach(), Twin(layer, torch.float64).layer(x.double()).detach(), units=16)

    def optimizer(**options):
        step = torch.optim.AdamW(parameters(layer), lr=0.3, **options)
        layer(x).backward(dy)
        step.step()

    def assign():
        layer.lora_A["default"].data = torch.randn(4, 48)

    def write():
        layer.lora_B["default"].data.mul_(3)

    def replace():
        layer.lora_A["default"] = nn.Parameter(torch.randn(4, 48))

    def load():
        state = {key: torch.randn(40, 4) if "lora_B" in key else value for key, value in layer.state_dict().items()}
        layer.load_state_dict(state)

    for change in (lambda: optimizer(fused=True), lambda: optimizer(foreach=True), assign, write, replace, load):
        before = layer(x).detach()
        change()
        assert not torch.allclose(layer(x), before, atol=1e-2)
        check()


def test_dora_with_a_tiny_change_of_magnitude_passes_it_on():
    """c - 1 of 3e-4 reaches a bf16 layer's output to at least 95 percent: c is not rounded to bf16."""
    layer = make("lora", 256, 64, bias=False, dtype=torch.bfloat16, use_dora=True)
    x = torch.randn(512, 256).bfloat16()
    with layer.disable_adapters():
        base = layer(x).double()
    layer.lora_magnitude["default"].data.mul_(1 + 3e-4)
    change = layer(x).double() - base
    passed = (change * base).sum() / (3e-4 * base.square().sum())
    assert 0.95 < passed < 1.05


@pytest.mark.parametrize(
    ("x", "error", "words"),
    [
        (torch.randn(3, 47), ShapeError, r"in_features=48, got shape \(3, 47\)"),
        (torch.randn(()), ShapeError, "in_features=48"),
        (torch.ones(3, 48, dtype=torch.int64), TypeError, "int64"),
        (torch.randn(3, 48, dtype=torch.float64), TypeError, "float64"),
        (torch.randn(3, 48, device="meta"), TypeError, "device"),
    ],
    ids=["features", "0-d", "int", "float64", "meta"],
)
def test_bad_x_is_one_clear_error(x, error, words):
    with pytest.raises(error, match=words):
        make("lora")(x)


@pytest.mark.parametrize("kind", KINDS)
def test_functions_agree_with_the_layer(kind):
    from fastlora import functional

    layer = shake(make(kind, use_dora=True))
    x = torch.randn(4, 48)
    run = functional.lora_linear if kind == "lora" else functional.qlora_linear
    a, b, mag = parameters(layer)
    same(run(x, layer.weight, a, b, layer.scaling["default"], bias=layer.bias, magnitude=mag), layer(x))
    norm = functional.dora_weight_norm(layer.weight, a, b, layer.scaling["default"])
    same(norm, layer.weight_norm("default"))
    near(norm, (layer.dequantize(torch.float32).double() + layer.delta_weight("default")).norm(dim=1), units=16)


def test_layers_do_not_share_anything_by_copying():
    layer = shake(make("lora"))
    other = copy.deepcopy(layer)
    x = torch.randn(3, 48)
    other.lora_B["default"].data.zero_()
    assert not torch.equal(layer(x), other(x))
    assert isinstance(other, LoraLinear)
