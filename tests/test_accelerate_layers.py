"""An accelerated PEFT layer computes PEFT's function: outputs, every gradient, dropout, dtypes, what it saves."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import fastlora
from fastlora import testing
from fastlora.math import philox
from fastlora.testing import Case, make_inputs
from tests.accelerate_tools import fused, judged, layer_of, next_mask, parameters, run_layer, wrap
from tests.layer_tools import near

pytestmark = pytest.mark.filterwarnings("ignore:.*kernels")
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
BASE = Case(m=9, n=48, k=64, r=4, bias=True)


def case(**changes) -> Case:
    return dataclasses.replace(BASE, **changes)


# --- values and gradients ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quant", ["", "nf4", "fp4"])
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("bias", [False, True])
def test_outputs_and_all_gradients_keep_the_error_budget(quant, dora, p, bias):
    assert judged(case(quant=quant, nested=quant == "nf4", dora=dora, p=p, bias=bias)) == []


@pytest.mark.parametrize("r", [1, 3, 5, 8, 16, 33, 64, 100])
@pytest.mark.parametrize("quant", ["", "nf4"])
def test_any_rank(r, quant):
    """Also larger than in_features."""
    assert judged(case(r=r, quant=quant, scale=0.7)) == []


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("adapter_dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("quant", ["", "nf4"])
@pytest.mark.parametrize("dora", [False, True])
def test_every_mix_of_dtypes(dtype, adapter_dtype, quant, dora):
    chosen = case(dtype=dtype, adapter_dtype=adapter_dtype, quant=quant, dora=dora, k=128)
    assert judged(chosen) == []
    inputs = make_inputs(chosen)
    layer = layer_of(chosen, inputs)
    want = layer(inputs.x)
    fastlora.accelerate(layer)
    got = layer(inputs.x)
    assert got.dtype == want.dtype == dtype
    assert fused(layer)


@pytest.mark.parametrize(("n", "k"), [(33, 17), (7, 100), (1, 64), (48, 1)])
@pytest.mark.parametrize("quant", ["", "nf4"])
def test_odd_shapes(n, k, quant):
    assert judged(case(n=n, k=k, r=3, quant=quant, p=0.2)) == []


@pytest.mark.parametrize("scale", [0.0, -1.5, 1e-4])
def test_any_scale(scale):
    assert judged(case(scale=scale)) == []


@pytest.mark.parametrize("shape", [(64,), (5, 64), (2, 3, 64), (2, 1, 3, 64), (0, 64), (2, 0, 64)])
@pytest.mark.parametrize("quant", ["", "nf4"])
def test_1d_to_4d_and_empty_x_equal_pefts(shape, quant):
    chosen = case(quant=quant)
    inputs = make_inputs(chosen)
    theirs = layer_of(chosen, inputs)
    ours = copy.deepcopy(theirs)
    fastlora.accelerate(ours)
    torch.manual_seed(0)
    x = torch.randn(shape)
    results = []
    for layer in (theirs, ours):
        own = x.clone().requires_grad_()
        y = layer(own)
        found = [t for name, t in parameters(layer).items() if t is not None and name != "bias"]
        results.append([y, *torch.autograd.grad(y.sum(), [own, *found])])
    assert fused(ours)
    for want, got in zip(*results, strict=True):
        assert got.shape == want.shape
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("quant", ["", "nf4"])
@pytest.mark.parametrize("base_bias", [False, True])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_lora_bias_is_scaled_and_gets_its_gradient(quant, base_bias, dtype):
    """y = base + s (B A x + own bias): against PEFT's layer in fp64 over the dequantized base."""
    chosen = case(quant=quant, bias=base_bias, dtype=dtype)
    inputs = make_inputs(chosen)
    ours = layer_of(chosen, inputs, lora_bias=True)
    ours.lora_B["default"].bias = nn.Parameter(torch.randn(48, generator=torch.Generator().manual_seed(3)))
    theirs = copy.deepcopy(ours)
    truth = wrap(nn.Linear(64, 48, base_bias), r=4, lora_bias=True).model["lin"].double()
    with torch.no_grad():
        truth.base_layer.weight.copy_(inputs.w)
        if base_bias:
            truth.base_layer.bias.copy_(ours.base_layer.bias)
        truth.lora_A["default"].weight.copy_(inputs.a)
        truth.lora_B["default"].weight.copy_(inputs.b)
        truth.lora_B["default"].bias.copy_(ours.lora_B["default"].bias)
    truth.scaling["default"] = chosen.scale
    fastlora.accelerate(ours)
    found = []
    for layer in (ours, truth, theirs):
        if base_bias:
            layer.base_layer.bias.requires_grad_()
        out = run_layer(layer, inputs._replace(x=inputs.x.double() if layer is truth else inputs.x))
        y = layer(inputs.x.double() if layer is truth else inputs.x)
        own = torch.autograd.grad(y, layer.lora_B["default"].bias, inputs.dy.to(y.dtype))[0]
        found.append([*(t for t in out if t is not None), own])
    assert fused(ours)
    for got, want, allowed in zip(*found, strict=True):
        near(got, want, allowed)


def test_a_trained_base_bias_gets_the_sum_of_dy_and_dora_leaves_it_unscaled():
    for dora in (False, True):
        inputs = make_inputs(case(dora=dora))
        layer = layer_of(case(dora=dora), inputs)
        fastlora.accelerate(layer)
        out = run_layer(layer, inputs)
        torch.testing.assert_close(out.dbias, inputs.dy.sum(0), rtol=1e-6, atol=1e-6)
        with torch.no_grad():
            before = layer(inputs.x)
            layer.base_layer.bias += 1
            torch.testing.assert_close(layer(inputs.x) - before, torch.ones_like(before), rtol=1e-5, atol=1e-5)


def test_doras_norm_is_a_constant_of_the_gradient():
    """dA of the budget is that of a detached norm: with the norm differentiated it is another one, and judged so."""
    chosen = case(dora=True, bias=False)
    inputs = make_inputs(chosen)
    out = run_layer(swapped(chosen, inputs), inputs)
    a = inputs.a.clone().requires_grad_()
    whole = inputs.w.float() + chosen.scale * inputs.b @ a
    y = inputs.x @ (inputs.mag[:, None] * whole / whole.norm(dim=1, keepdim=True)).T
    attached = torch.autograd.grad(y, a, inputs.dy)[0]
    assert testing.judge(chosen, inputs, out) == []
    assert testing.judge(chosen, inputs, out._replace(da=attached)) != []


def swapped(chosen: Case, inputs):
    layer = layer_of(chosen, inputs)
    fastlora.accelerate(layer)
    return layer


# --- dropout ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("quant", ["", "nf4"])
def test_evaluation_ignores_dropout(dora, quant):
    inputs = make_inputs(case(dora=dora, quant=quant, p=0.5))
    layer = swapped(case(dora=dora, quant=quant, p=0.5), inputs).eval()
    plain = swapped(case(dora=dora, quant=quant), inputs._replace(keep=None)).eval()
    with torch.no_grad():
        assert torch.equal(layer(inputs.x), plain(inputs.x))


@pytest.mark.parametrize("dora", [False, True])
def test_dropout_repeats_under_a_seed_and_differs_between_calls(dora):
    inputs = make_inputs(case(dora=dora, p=0.5))
    layer = swapped(case(dora=dora, p=0.5), inputs)
    torch.manual_seed(3)
    first, second = layer(inputs.x), layer(inputs.x)
    torch.manual_seed(3)
    assert torch.equal(layer(inputs.x), first)
    assert not torch.equal(first, second)


def test_dropout_has_the_right_rate_and_mean():
    """One-hot rows of A and B show the mask; PEFT's dropout keeps as many and as much."""
    k, p = 4096, 0.3
    chosen = Case(m=64, n=1, k=k, r=1, p=p, scale=1.0)
    inputs = make_inputs(chosen)
    layer = swapped(chosen, inputs)
    with torch.no_grad():
        layer.base_layer.weight.zero_()
        layer.lora_A["default"].weight.fill_(1.0)
        layer.lora_B["default"].weight.fill_(1.0)
    kept = layer(torch.ones(64, k)).double() / philox.keep_scale(p)
    rate = kept.mean() / k
    deviation = (p * (1 - p) / (64 * k)) ** 0.5
    assert abs(rate - (1 - p)) < 5 * deviation
    assert abs(philox.keep_scale(p) - 1 / (1 - p)) < 2e-5


def test_dora_dropout_is_right_in_the_mean():
    chosen = case(dora=True, p=0.4, bias=False, m=2)
    inputs = make_inputs(chosen)
    layer = swapped(chosen, inputs)
    with torch.no_grad():
        draws = torch.stack([layer(inputs.x) for _ in range(1500)]).double()
        mean, spread = draws.mean(0), draws.std(0) / 1500**0.5
        want = layer.eval()(inputs.x).double()
    assert ((mean - want).abs() < 6 * spread + 1e-6).all()
    assert draws.std(0).min() > 0


def test_one_mask_serves_forward_da_db_and_dx():
    """A wrong mask in any single one breaks the budget."""
    chosen = case(p=0.5)
    inputs = make_inputs(chosen)
    layer = swapped(chosen, inputs)
    right = inputs._replace(keep=next_mask((chosen.m, chosen.k), 0.5))
    out = run_layer(layer, right)
    assert testing.judge(chosen, right, out) == []
    other = run_layer(layer, right)  # drawn anew: another mask in every part
    for name in ("y", "dx", "da", "db"):
        assert testing.judge(chosen, right, out._replace(**{name: getattr(other, name)})) != []


@pytest.mark.parametrize("mutant", ["scale", "-da", "db/s", "dx=0", "no dropout"])
def test_the_budget_catches(mutant):
    chosen = case(p=0.5, scale=1.7)
    inputs = make_inputs(chosen)
    layer = swapped(chosen, inputs)
    right = inputs._replace(keep=next_mask((chosen.m, chosen.k), 0.5))
    if mutant == "scale":
        layer.scaling["default"] *= 1.02
    if mutant == "no dropout":
        layer.lora_dropout["default"].eval()
    out = run_layer(layer, right)
    changes = {"-da": {"da": -out.da}, "db/s": {"db": out.db / 1.7}, "dx=0": {"dx": out.dx * 0}}
    assert testing.judge(chosen, right, out._replace(**changes.get(mutant, {}))) != []


def test_a_dropout_set_apart_from_its_layer_decides_for_lora():
    """PEFT asks the dropout module, not the layer: Monte-Carlo dropout in evaluation."""
    inputs = make_inputs(case(p=0.5))
    layer = swapped(case(p=0.5), inputs).eval()
    layer.lora_dropout["default"].train()
    keep = next_mask((9, 64), 0.5)
    y = run_layer(layer, inputs).y
    assert fused(layer)
    assert testing.judge(case(p=0.5), inputs._replace(keep=keep), run_again(layer, inputs, keep, y)) == []


def run_again(layer, inputs, keep, y):
    torch.manual_seed(11)
    keep.copy_(next_mask(tuple(keep.shape), 0.5))
    return run_layer(layer, inputs)


# --- autograd ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("quant", ["", "nf4"])
@pytest.mark.parametrize("dora", [False, True])
def test_checkpointing_gives_the_same_gradients_bit_for_bit(use_reentrant, quant, dora):
    chosen = case(dora=dora, quant=quant, p=0.4)
    inputs = make_inputs(chosen)
    layer = swapped(chosen, inputs)
    torch.manual_seed(5)
    want = run_layer(layer, inputs)
    torch.manual_seed(5)
    x = inputs.x.clone().requires_grad_()
    y = checkpoint(layer, x, use_reentrant=use_reentrant)
    y.backward(inputs.dy)
    found = parameters(layer)
    got = [y.detach(), x.grad, *(None if t is None else t.grad for t in found.values())]
    for one, other in zip(want, got, strict=True):
        assert (one is None) == (other is None)
        assert one is None or torch.equal(one, other)


@pytest.mark.parametrize("quant", ["", "nf4"])
@pytest.mark.parametrize("frozen", ["x", "a", "b", "mag"])
def test_what_is_frozen_gets_no_gradient_and_the_rest_the_right_one(quant, frozen):
    chosen = case(dora=True, quant=quant, p=0.2, bias=False)
    inputs = make_inputs(chosen)
    layer = swapped(chosen, inputs)
    torch.manual_seed(1)
    want = run_layer(layer, inputs)._asdict()
    found = parameters(layer)
    x = inputs.x.clone().requires_grad_(frozen != "x")
    if frozen != "x":
        found[frozen].requires_grad_(False)
    torch.manual_seed(1)
    layer(x).backward(inputs.dy)
    for name, t in {"x": x, "a": found["a"], "b": found["b"], "mag": found["mag"]}.items():
        assert (t.grad is None) == (name == frozen)
        assert t.grad is None or torch.equal(t.grad, want[f"d{name}"])


def test_strided_x_expanded_dy_and_views_for_a_and_b():
    """Tied adapters are transposed views of an embedding's."""
    inputs = make_inputs(case())
    layer = swapped(case(), inputs)
    want = run_layer(layer, inputs._replace(dy=inputs.dy[:1].expand(9, 48).contiguous()))
    for module in (layer.lora_A["default"], layer.lora_B["default"]):
        stored = nn.Parameter(module.weight.detach().T.contiguous())
        module.weight = nn.Parameter(stored.T)
        assert not module.weight.is_contiguous()
    wide = torch.randn(9, 128)
    wide[:, ::2] = inputs.x
    x = wide[:, ::2].requires_grad_()
    before = x.detach().clone()
    y = layer(x)
    y.backward(inputs.dy[:1].expand(9, 48))
    assert fused(layer)
    for got, expected in ((y, want.y), (x.grad, want.dx), (layer.lora_A["default"].weight.grad, want.da)):
        assert torch.equal(got, expected)
    assert torch.equal(x.detach(), before)


def test_gradients_accumulate_and_inference_works():
    inputs = make_inputs(case())
    layer = swapped(case(), inputs)
    a = layer.lora_A["default"].weight
    for _ in range(2):
        layer(inputs.x).backward(inputs.dy)
    torch.testing.assert_close(a.grad, 2 * run_layer(layer, inputs).da)
    with torch.no_grad():
        want = layer(inputs.x)
    with torch.inference_mode():
        assert torch.equal(layer(inputs.x), want)
    assert torch.equal(inputs.x, make_inputs(case()).x)


def test_double_backward_raises_and_torch_func_is_left_to_peft():
    inputs = make_inputs(case())
    layer = swapped(case(), inputs)
    x = inputs.x.clone().requires_grad_()
    (dx,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError):
        dx.sum().backward()
    jacobian = torch.func.vmap(torch.func.grad(lambda row: layer(row).sum()))(inputs.x)
    assert "torch.func" in layer._fastlora_left
    torch.testing.assert_close(jacobian[0], torch.autograd.grad(layer(x[0]).sum(), x)[0][0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
@pytest.mark.parametrize("quant", ["", "nf4"])
@pytest.mark.parametrize("dora", [False, True])
def test_autocast_gives_pefts_dtype_and_is_closer_to_the_truth(dtype, quant, dora):
    chosen = case(quant=quant, dora=dora)
    inputs = make_inputs(chosen)
    theirs = layer_of(chosen, inputs)
    layer = copy.deepcopy(theirs)
    fastlora.accelerate(layer)
    truth = testing.oracle(chosen, inputs).outputs
    with torch.autocast("cpu", dtype):
        want, got = run_layer(theirs, inputs), run_layer(layer, inputs)
    assert fused(layer)
    for name in ("y", "dx", "da", "db", *(["dmag"] if dora else [])):
        near(getattr(got, name).float(), getattr(truth, name), getattr(want, name), what=name)
        assert getattr(got, name).dtype == getattr(want, name).dtype


# --- what a step keeps ------------------------------------------------------------------------------------------------


def saved_bytes(layer, x) -> int:
    """Bytes autograd keeps besides x, parameters and a 4-bit base's own scales."""
    state = getattr(layer.base_layer.weight, "quant_state", None)
    scales = [] if state is None else [state.absmax, state.offset, state.state2 and state.state2.absmax]
    known = {t.untyped_storage().data_ptr() for t in (x, *layer.parameters(), *scales) if t is not None}
    kept: dict[int, int] = {}

    def pack(t):
        storage = t.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = layer(x)
    del y
    return sum(kept.values())


@pytest.mark.parametrize("quant", ["", "nf4"])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_extra_memory_a_token(quant, dtype, dora, p):
    """4 r + ceil(k / 8) bytes (4 r at p = 0), plus one y for DoRA; PEFT keeps more; `report` says the same."""
    tokens, k, n, r = 96, 100, 72, 4
    chosen = Case(m=tokens, n=n, k=k, r=r, dtype=dtype, quant=quant, dora=dora, p=p)
    inputs = make_inputs(chosen)
    layer = layer_of(chosen, inputs)
    x = inputs.x.requires_grad_()
    theirs = saved_bytes(layer, x)
    fastlora.accelerate(layer)
    ours = saved_bytes(layer, x)
    budget = 4 * r + (-(-k // 8) if p else 0) + (n * dtype.itemsize if dora else 0)
    per_layer = 4 * n if dora else 0  # the norm, once a layer
    assert ours - per_layer - (8 if p else 0) <= budget * tokens  # and the seed
    row = fastlora.report(layer, memory=True)[0]
    assert row.saved == budget
    assert ours < theirs or (not p and not dora and dtype == F32)


def test_autocast_saves_no_fp32_copy_of_x():
    """bf16 x, h and the bf16 weight; PEFT keeps x in fp32 for A besides."""
    tokens, n, k, r = 96, 48, 128, 4
    inputs = make_inputs(Case(m=tokens, n=n, k=k, r=r))
    layer = layer_of(Case(m=tokens, n=n, k=k, r=r), inputs)
    fastlora.accelerate(layer)
    with torch.autocast("cpu", BF16):
        assert saved_bytes(layer, inputs.x.requires_grad_()) <= 2 * n * k + tokens * (2 * k + 4 * r)
