"""The op contracts: opcheck of every op, autograd, checkpointing, autocast, compile, and what is refused."""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import fastlora
from fastlora import backends, functional
from fastlora.dispatch import registry
from fastlora.errors import ConfigError, DtypeError, ShapeError, UnsupportedError
from fastlora.math import nf4, philox
from fastlora.ops import schema
from fastlora.ops.lora import draw_seed
from fastlora.problem import NEED_DA, NEED_DB, NEED_DBIAS, NEED_DMAG, NEED_DX
from tests import experts_tools
from tests.many_tools import op_samples

backends.load()
ops = torch.ops.fastlora
N, K, R, M = 6, 72, 3, 5


def _tensors(dtype=torch.float32):
    torch.manual_seed(0)
    w = torch.randn(N, K)
    packed = nf4.pack(w, "nf4", 64, True)
    a, b, mag = torch.randn(R, K), torch.randn(N, R), torch.rand(N) + 1
    x, dy, bias = torch.randn(M, K).to(dtype), torch.randn(M, N).to(dtype), torch.randn(N).to(dtype)
    return x, w.to(dtype), packed, a, b, mag, bias, dy


def _samples():
    x, w, packed, a, b, mag, bias, dy = _tensors()
    seed = torch.tensor([5])
    norm = ops.dora_norm(w, a, b, 0.5, "")
    parts = (*packed[:7], False)
    plain = nf4.pack(w, "fp4", 32, False)
    yield "quantize", (w, "nf4", 64, "")
    yield "quantize_absmax", (torch.rand(300), "")
    yield "dequantize", (*parts, (N, K), torch.bfloat16, "")
    yield "dequantize", (*plain[:7], False, (N, K), torch.float32, "")
    yield "dequantize_into", (*parts, ""), {"out": torch.empty(N, K)}
    yield "dropout_mask", (seed, 3, M, K, 0.3, "")
    yield "dora_norm", (w, a, b, 0.5, "")
    yield "qdora_norm", (*parts, a, b, 0.5, "")
    needs = NEED_DX | NEED_DA | NEED_DB | NEED_DBIAS
    for dora in (False, True):
        for p, low_memory in ((0.0, False), (0.25, False), (0.25, True)):
            vectors = (mag, norm, seed if p else None) if dora else (None, None, seed if p else None)
            flags = schema.flags_of(bias=True, dropout=p > 0, dora=dora, train=True, save_mask=not low_memory)
            tail = (bias, a, b, 0.5, *vectors, 1, p, flags, "")
            _y, h, mask, z = ops.lora_fwd(x, w, *tail)
            yield "lora_fwd", (x, w, *tail)
            yield "qlora_fwd", (x, *parts, *tail)
            yield "lora_fwd", (x, w, *tail[:-2], schema.flags_of(bias=True, dropout=p > 0, dora=dora), "")
            back = schema.flags_of(dropout=p > 0, dora=dora) | needs | (NEED_DMAG if dora else 0)
            tail = (a, b, 0.5, *vectors[:2], h, mask, z, vectors[2], 1, p, back, "")
            yield "lora_bwd", (dy, x, w, *tail)
            yield "qlora_bwd", (dy, x, *parts, *tail)


@pytest.mark.parametrize("sample", [pytest.param(s, id=f"{i}-{s[0]}") for i, s in enumerate(_samples())])
def test_opcheck(sample):
    name, args, kwargs = (*sample, {})[:3]
    overload = getattr(ops, name).default
    results = torch.library.opcheck(overload, args, kwargs)
    assert set(results.values()) == {"SUCCESS"}, results


def test_opcheck_draw_seed():
    # Its value is random by design, so only its schema and fake are checkable.
    checks = ("test_schema", "test_faketensor")
    results = torch.library.opcheck(ops.draw_seed.default, (torch.empty(1, dtype=torch.int64),), test_utils=checks)
    assert set(results.values()) == {"SUCCESS"}
    assert torch.Tag.nondeterministic_seeded in ops.draw_seed.default.tags


def test_every_op_is_checked():
    names = {name.removeprefix("fastlora::") for name in torch._C._dispatch_get_all_op_names() if "fastlora::" in name}
    samples = (*_samples(), *op_samples(), *experts_tools.op_samples())
    assert names == {sample[0] for sample in samples} | {"draw_seed"}


def _layers():
    for quantized in (False, True):
        for dora in (False, True):
            torch.manual_seed(1)
            fields = {"r": R, "use_dora": dora, "lora_dropout": 0.3}
            cls = fastlora.QLoraLinear if quantized else fastlora.LoraLinear
            layer = cls.from_linear(torch.nn.Linear(K, N), **fields)
            torch.nn.init.normal_(layer.lora_B["default"])
            yield pytest.param(layer, id=f"{cls.__name__}-{'dora' if dora else 'lora'}")


def _gradients(layer, y, x):
    leaves = [x, *(p for p in layer.parameters() if p.requires_grad)]
    return torch.autograd.grad(y, leaves, torch.ones_like(y) * 0.1)


@pytest.mark.parametrize("layer", list(_layers()))
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint_recompute_draws_the_same_mask(layer, reentrant):
    x = torch.randn(4, K, requires_grad=True)
    torch.manual_seed(3)
    y = layer(x)
    y.backward(torch.ones_like(y))
    plain = [x.grad.clone(), *(p.grad.clone() for p in layer.parameters() if p.grad is not None)]
    x.grad = None
    layer.zero_grad()
    torch.manual_seed(3)
    again = checkpoint(layer, x, use_reentrant=reentrant)
    assert torch.equal(again, y)
    again.backward(torch.ones_like(y))
    grads = [x.grad, *(p.grad for p in layer.parameters() if p.grad is not None)]
    assert len(grads) == len(plain)
    for got, want in zip(grads, plain, strict=True):
        assert torch.equal(got, want)
    layer.zero_grad()


@pytest.mark.parametrize("layer", list(_layers()))
def test_training_is_random_eval_is_not(layer):
    x = torch.randn(40, K)
    assert not torch.equal(layer(x), layer(x))
    torch.manual_seed(0)
    first = layer(x)
    torch.manual_seed(0)
    assert torch.equal(layer(x), first)
    layer.eval()
    assert torch.equal(layer(x), layer(x))
    layer.train()


@pytest.mark.parametrize("layer", list(_layers()))
def test_compile_fullgraph_equals_eager(layer):
    x = torch.randn(4, K, requires_grad=True)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    torch.manual_seed(2)
    want = layer(x)
    torch.manual_seed(2)
    got = compiled(x)
    assert torch.equal(got, want)  # the same seed, so the same mask
    for a, b in zip(_gradients(layer, got, x), _gradients(layer, want, x), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("low_memory", [False, True])
def test_low_memory_keeps_only_the_seed(low_memory):
    layer = fastlora.LoraLinear(K, N, r=R, lora_dropout=0.3)
    torch.nn.init.normal_(layer.lora_B["default"])
    x = torch.randn(64, K, requires_grad=True)
    saved = []

    def pack(t):
        saved.append(t)
        return t

    with fastlora.settings.override(low_memory=low_memory):
        torch.manual_seed(1)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            y = layer(x)
        masks = [t for t in saved if t.dtype == torch.uint8]
        assert len(masks) == (0 if low_memory else 1)
        h = [t for t in saved if t.shape == (64, R)]
        assert len(h) == 1  # besides x and parameters: h, and the mask or the seed
        known = {id(p) for p in layer.parameters()} | {x.data_ptr()}
        extra = [t for t in saved if id(t) not in known and t.data_ptr() not in known]
        params = {p.data_ptr() for p in layer.parameters()}
        extra_bytes = sum(t.nbytes for t in extra if t.data_ptr() not in params)
        assert extra_bytes <= 64 * (4 * R + (0 if low_memory else (K + 7) // 8)) + 8
        grads = _gradients(layer, y, x)
    torch.manual_seed(1)
    for got, want in zip(grads, _gradients(layer, layer(x), x), strict=True):
        assert torch.equal(got, want)


def test_double_backward_and_torch_func_are_refused():
    layer = fastlora.LoraLinear(K, N, r=R)
    torch.nn.init.normal_(layer.lora_B["default"])
    x = torch.randn(2, K, requires_grad=True)
    (dx,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()
    with pytest.raises(RuntimeError):
        torch.func.vmap(torch.func.grad(lambda v: layer(v).sum()))(torch.randn(3, K))
    with torch.no_grad(), pytest.raises(RuntimeError, match="[Bb]atching"):
        torch.func.vmap(layer)(torch.randn(3, K))


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("quantized", [False, True])
def test_forward_mode_is_refused_never_zero(frozen, quantized):
    layer = (fastlora.QLoraLinear if quantized else fastlora.LoraLinear)(K, N, r=R)
    if frozen:
        layer.requires_grad_(False)
    x = torch.randn(2, K)
    with pytest.raises(UnsupportedError, match="forward-mode"):
        torch.func.jvp(layer, (x,), (torch.ones_like(x),))
    with torch.autograd.forward_ad.dual_level(), torch.no_grad():
        with pytest.raises(UnsupportedError, match="forward-mode"):
            layer(torch.autograd.forward_ad.make_dual(x, x))
        assert layer(x).shape == (2, N)  # without a tangent it runs


def test_autocast_uses_its_dtype_and_returns_x_gradients_in_fp32():
    layer = fastlora.QLoraLinear.from_linear(torch.nn.Linear(K, N), r=R)
    torch.nn.init.normal_(layer.lora_B["default"])
    x = torch.randn(4, K, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert x.grad.dtype == torch.float32
    assert layer.lora_A["default"].grad.dtype == torch.float32
    torch.testing.assert_close(y.float(), layer(x), rtol=2e-2, atol=5e-2)


def test_output_may_be_changed_in_place():
    for dora in (False, True):
        layer = fastlora.LoraLinear(K, N, r=R, use_dora=dora)
        x = torch.randn(4, K, requires_grad=True)
        layer(x).relu_().sum().backward()
        assert x.grad is not None


def test_draw_seed_follows_torchs_generator():
    torch.manual_seed(0)
    first = draw_seed(torch.device("cpu"))
    second = draw_seed(torch.device("cpu"))
    torch.manual_seed(0)
    assert torch.equal(draw_seed(torch.device("cpu")), first)
    assert not torch.equal(first, second)
    assert first.dtype == torch.int64 and first.shape == (1,) and first.item() >= 0


def test_tensor_scale_is_differentiable_and_equals_the_float():
    x, w, _, a, b, _, bias, _ = _tensors()
    scale = torch.tensor(0.7, requires_grad=True)
    y = functional.lora_linear(x, w, a, b, scale, bias=bias)
    torch.testing.assert_close(y, functional.lora_linear(x, w, a, b, 0.7, bias=bias))
    (ds,) = torch.autograd.grad(y.sum(), scale)
    torch.testing.assert_close(ds, (x @ a.T @ b.T).sum())


def test_bad_input_names_expected_and_actual():
    x, w, _packed, a, b, mag, bias, _ = _tensors()
    f = functional.lora_linear
    for error, words, call in (
        (ShapeError, "in_features=72", lambda: f(x[:, :-1], w, a, b, 1.0)),
        (ShapeError, r"\(3, 71\)", lambda: f(x, w, a[:, :-1], b, 1.0)),
        (ShapeError, r"\(6, 2\)", lambda: f(x, w, a, b[:, :-1], 1.0)),
        (ShapeError, "bias", lambda: f(x, w, a, b, 1.0, bias=bias[:-1])),
        (ShapeError, "magnitude", lambda: f(x, w, a, b, 1.0, magnitude=mag[:-1])),
        (ShapeError, r"\[0, 1\)", lambda: f(x, w, a, b, 1.0, dropout_p=1.0)),
        (ShapeError, "seed", lambda: f(x, w, a, b, 1.0, dropout_p=0.1, seed=-1)),
        (DtypeError, "seed", lambda: f(x, w, a, b, 1.0, dropout_p=0.1, seed=torch.ones(1))),
        (ShapeError, "dora_dropout", lambda: f(x, w, a, b, 1.0, dora_dropout="both")),
        (DtypeError, "bfloat16", lambda: f(x, w.bfloat16(), a, b, 1.0)),
        (DtypeError, "int64", lambda: f(x.long(), w, a, b, 1.0)),
        (DtypeError, "one floating dtype", lambda: f(x, w, a, b.half(), 1.0)),
        (DtypeError, "frozen", lambda: f(x, w.clone().requires_grad_(), a, b, 1.0)),
        (DtypeError, "meta", lambda: f(x, w, a.to("meta"), b, 1.0)),
        (ShapeError, r"\[n, k\]", lambda: f(x, w[0], a, b, 1.0)),
        (DtypeError, "QuantizedWeight", lambda: functional.qlora_linear(x, w, a, b, 1.0)),
        (DtypeError, "float64", lambda: functional.quantize(w.double())),
        (ConfigError, "nf5", lambda: functional.quantize(w, "nf5")),
        (ConfigError, "48", lambda: functional.quantize(w, blocksize=48)),
        (ShapeError, "NaN or inf", lambda: functional.quantize(w / 0)),
        (ShapeError, "NaN or inf", lambda: functional.quantize(w / 0, double_quant=True)),
        (ShapeError, "out must", lambda: functional.dequantize(functional.quantize(w), out=torch.empty(2))),
    ):
        with pytest.raises(error, match=words) as caught:
            call()
        assert isinstance(caught.value, (ValueError, TypeError))


def test_a_forced_backend_runs_or_says_why():
    x, w, _, a, b, _, _, _ = _tensors()
    with pytest.raises(UnsupportedError, match=r"unknown backend 'abacus'.*reference"):
        functional.lora_linear(x, w, a, b, 1.0, backend="abacus")
    with fastlora.settings.override(backend="abacus"), pytest.raises(UnsupportedError):
        functional.lora_linear(x, w, a, b, 1.0)
    if "cpu" in registry.backends():
        with pytest.raises(UnsupportedError, match="float64"):
            functional.lora_linear(x.double(), w.double(), a, b, 1.0, backend="cpu")


def test_empty_batch_trains():
    for quantized in (False, True):
        cls = fastlora.QLoraLinear if quantized else fastlora.LoraLinear
        layer = cls(K, N, r=R, use_dora=True, lora_dropout=0.1)
        x = torch.randn(2, 0, K, requires_grad=True)
        y = layer(x)
        assert y.shape == (2, 0, N)
        y.sum().backward()
        assert x.grad.shape == x.shape
        assert layer.lora_A["default"].grad.abs().sum() == 0


def test_dropout_mask_function_and_errors():
    keep = functional.dropout_mask((200, 3, 70), 0.3, 9, 2)
    assert keep.shape == (200, 3, 70) and keep.dtype == torch.bool
    assert abs(keep.float().mean().item() - (1 - philox.threshold(0.3) / 65536)) < 0.02
    with pytest.raises(ShapeError):
        functional.dropout_mask((3, 4), 1.0, 0)
    with pytest.raises(ShapeError):
        functional.dropout_mask((3, 4), 0.1, -5)
