"""bitsandbytes' own objects: adopted without copying or requantizing, written so that it reads them, or refused."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn

import fastlora
from fastlora import DtypeError, QLoraLinear, QuantizedWeight, ShapeError, StateDictError
from tests.layer_tools import make, near, same, shake, snapshot

bnb = pytest.importorskip("bitsandbytes")

STORAGES = [torch.uint8, torch.bfloat16, torch.float16, torch.float32]


def dequantized(weight):
    """A 4-bit weight read by its documented layout.

    Not by bitsandbytes: on a CPU it misreads weights whose rows are not whole blocks.
    """
    state = weight.quant_state
    stored = weight.data.contiguous().view(-1).view(torch.uint8)
    numel, absmax = state.shape.numel(), state.absmax
    if state.nested:
        absmax = state.state2.code[absmax.long()] * state.state2.absmax.repeat_interleave(256)[: absmax.numel()]
        absmax = absmax + state.offset
    codes = torch.stack([stored >> 4, stored & 15], 1).view(-1)[:numel].long()
    values = state.code[codes] * absmax.repeat_interleave(state.blocksize)[:numel]
    return values.to(state.dtype).view(state.shape)


def linear4bit(
    k=64, n=48, *, quant_type="nf4", nested=True, storage=torch.uint8, source=torch.float32, bias=True, compute=None
):
    """A quantized Linear4bit whose source was `source`."""
    torch.manual_seed(5)
    layer = bnb.nn.Linear4bit(
        k, n, bias, compute_dtype=compute, compress_statistics=nested, quant_type=quant_type, quant_storage=storage
    )
    layer.weight.data = torch.randn(n, k).to(source)
    return layer.to("cpu")


def pointers(weight):
    """Where a QuantizedWeight's bytes are."""
    return {name: p.data_ptr() for name, p in weight.named_parameters() if name != "quant_state"}


# --- adopting ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("storage", STORAGES, ids=str)
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_a_linear4bit_is_adopted_without_copy(storage, nested, source, quant_type):
    theirs = linear4bit(storage=storage, nested=nested, source=source, quant_type=quant_type)
    want, state = dequantized(theirs.weight), theirs.weight.quant_state
    ours = QLoraLinear.from_linear(theirs, r=3)
    at = pointers(ours.weight)
    assert at["packed"] == theirs.weight.data_ptr()
    assert at["absmax"] == state.absmax.data_ptr()
    if nested:
        assert at["nested_absmax"] == state.state2.absmax.data_ptr()
    assert ours.bias.data_ptr() == theirs.bias.data_ptr()
    assert (ours.weight.quant_type, ours.weight.blocksize, ours.weight.nested) == (quant_type, 64, nested)
    assert ours.weight.dtype == source
    assert ours.weight.code_table is None
    assert not ours.bias.requires_grad
    got = ours.dequantize()
    assert got.dtype == source
    same(got, want)
    same(got, bnb.functional.dequantize_4bit(theirs.weight.data, state))


@pytest.mark.parametrize("storage", STORAGES, ids=str)
def test_outputs_and_gradients_are_those_of_the_dequantized_weight(storage):
    """The same whatever the bytes are stored as."""
    theirs = linear4bit(storage=storage)
    w, bias = dequantized(theirs.weight), theirs.bias.detach()
    layer = shake(QLoraLinear.from_linear(theirs, r=3))
    x = torch.randn(5, 64, requires_grad=True)
    y = layer(x)
    a, b = (t["default"].detach().double() for t in (layer.lora_A, layer.lora_B))
    full = w.double() + layer.scaling["default"] * b @ a
    near(y.detach(), x.detach().double() @ full.T + bias, units=8)
    y.backward(torch.ones_like(y))
    near(x.grad, torch.ones(5, 48, dtype=torch.float64) @ full, units=8)


@pytest.mark.parametrize(("k", "n"), [(300, 400), (100, 7), (31, 2), (17, 33), (64, 1), (2, 2)])
@pytest.mark.parametrize("nested", [True, False])
def test_odd_shapes(k, n, nested):
    """Partial last blocks, and an odd number of weights (17 x 33)."""
    theirs = linear4bit(k, n, nested=nested)
    ours = QLoraLinear.from_linear(theirs, r=1)
    assert tuple(ours.weight.shape) == (n, k)
    flat = fastlora.functional.quantize(torch.randn(n, k), "nf4", 64, nested)
    assert [p.shape for p in flat.parameters()] == [p.shape for p in ours.weight.parameters()]
    same(ours.dequantize(torch.float32), dequantized(theirs.weight))
    assert ours(torch.randn(2, k)).shape == (2, n)


@pytest.mark.parametrize("blocksize", [32, 128, 4096])
def test_blocksizes_from_a_quant_state(blocksize):
    data, state = bnb.functional.quantize_4bit(
        torch.randn(33, 100), blocksize=blocksize, quant_type="nf4", compress_statistics=True
    )
    ours = QuantizedWeight.from_bnb((data, state))
    assert ours.blocksize == blocksize
    theirs = bnb.nn.Params4bit(data, quant_state=state, requires_grad=False)
    same(ours.dequantize(), dequantized(theirs))


@pytest.mark.parametrize("nested", [True, False])
def test_every_form_of_the_same_weight(nested):
    theirs = linear4bit(nested=nested)
    forms = [theirs, theirs.weight, (theirs.weight.data, theirs.weight.quant_state)]
    for form in forms:
        same(QuantizedWeight.from_bnb(form).dequantize(), dequantized(theirs.weight))


def test_the_layer_keeps_compute_dtype_and_mode_and_takes_ours_first():
    assert QLoraLinear.from_linear(linear4bit(compute=torch.bfloat16)).compute_dtype == torch.bfloat16
    assert QLoraLinear.from_linear(linear4bit()).compute_dtype is None
    own = QLoraLinear.from_linear(linear4bit(compute=torch.bfloat16), compute_dtype=torch.float16)
    assert own.compute_dtype == torch.float16
    assert not QLoraLinear.from_linear(linear4bit().eval()).training


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_one_that_never_moved_is_quantized_as_bitsandbytes_would(nested, source, quant_type):
    """bitsandbytes quantizes on the first .to(device); until then the weight is float.

    Its FP4 resolves ties otherwise, and its nested offset is an fp32 sum: values then, not bytes.
    """
    torch.manual_seed(3)
    theirs = bnb.nn.Linear4bit(64, 48, compress_statistics=nested, quant_type=quant_type)
    theirs.weight.data = theirs.weight.data.to(source)
    assert theirs.weight.quant_state is None
    ours = QLoraLinear.from_linear(theirs, r=2)
    moved = copy.deepcopy(theirs).to("cpu").weight
    if quant_type == "nf4":
        same(ours.weight.packed.detach(), moved.data)
    near(ours.dequantize(), dequantized(moved), units=2 if quant_type == "nf4" else 4)
    assert (ours.weight.quant_type, ours.weight.nested, ours.weight.dtype) == (quant_type, nested, source)


def repacked():
    """A Linear4bit after an eval forward without gradients on a CPU: bitsandbytes may have rewritten its bytes."""
    theirs = linear4bit(128, 128, source=torch.bfloat16, compute=torch.bfloat16).eval()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs(torch.randn(3, 128, dtype=torch.bfloat16))
    return theirs


def test_the_layout_packed_for_bitsandbytes_cpu_kernel_is_refused():
    theirs = repacked()
    if not getattr(theirs.weight.quant_state, "packing_format_for_cpu", False):
        # No AVX512_BF16 here, so bitsandbytes keeps its bytes; its mark is what we go by.
        theirs.weight.quant_state.packing_format_for_cpu = True
    before = snapshot(nn.ParameterDict({"bias": theirs.bias}))
    with pytest.raises(DtypeError, match=r"repacked for its CPU kernel.*before its first eval forward"):
        QLoraLinear.from_linear(theirs, r=2)
    assert snapshot(nn.ParameterDict({"bias": theirs.bias})) == before
    with pytest.raises(DtypeError, match="repacked"):
        QuantizedWeight.from_bnb(theirs)


def test_adopting_leaves_bitsandbytes_layer_usable():
    theirs = linear4bit(bias=False)
    x = torch.randn(3, 64)
    want = x @ dequantized(theirs.weight).T
    ours = QLoraLinear.from_linear(theirs, r=2)
    near(theirs(x).detach(), want.double(), units=16)
    near(ours(x).detach(), want.double(), units=16)


def test_what_is_not_a_4bit_weight_is_refused():
    for source in (nn.Linear(4, 4), torch.randn(4, 4), None, bnb.nn.Params4bit(torch.zeros(2, 1, dtype=torch.uint8))):
        with pytest.raises(DtypeError, match="expected a bitsandbytes Linear4bit, Params4bit or QuantState"):
            QuantizedWeight.from_bnb(source)
    with pytest.raises(DtypeError, match=r"8-bit, GPTQ"):
        QLoraLinear.from_linear(bnb.nn.Linear8bitLt(16, 16, has_fp16_weights=False).to("cpu"))


def test_a_state_that_does_not_fit_its_data_is_refused():
    theirs = linear4bit()
    weight, state = theirs.weight.data, theirs.weight.quant_state
    with pytest.raises(ShapeError, match="expected 1536 packed bytes for 3072 weights, got 1535"):
        QuantizedWeight.from_bnb((weight[:-1], state))
    with pytest.raises(ShapeError, match="contiguous"):
        QuantizedWeight.from_bnb((weight.repeat(1, 2)[:, :1], state))
    short = copy.deepcopy(state)
    short.absmax = short.absmax[:-1]
    with pytest.raises(ShapeError, match="expected 48 absmax values.*got 47"):
        QuantizedWeight.from_bnb((weight, short))
    other = copy.deepcopy(theirs)
    other.in_features = 32
    with pytest.raises(ShapeError, match=r"shape \(48, 32\), got \(48, 64\)"):
        QLoraLinear.from_linear(other)


# --- keys both ways ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("storage", STORAGES, ids=str)
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("inside", [False, True])
def test_its_state_dict_loads_strictly(storage, nested, quant_type, inside):
    """With the adapters' keys added, since strict means strict."""
    theirs = linear4bit(storage=storage, nested=nested, quant_type=quant_type, source=torch.bfloat16)
    ours = make("qlora", 64, 48, blocksize=64)
    state = dict(theirs.state_dict())
    kept = {key: value.clone() for key, value in state.items()}
    state.update({key: value for key, value in ours.state_dict().items() if key.startswith("lora")})
    if inside:
        nn.Sequential(ours).load_state_dict({f"0.{key}": value for key, value in state.items()})
    else:
        ours.load_state_dict(state)
    same(ours.dequantize(), dequantized(theirs.weight))
    same(ours.bias.detach(), theirs.bias.detach())
    assert ours.weight.dtype == torch.bfloat16
    for key, value in kept.items():
        same(theirs.state_dict()[key].view(torch.uint8), value.view(torch.uint8))
    assert ours.weight.packed.data_ptr() != theirs.weight.data_ptr()


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("sizes", [(64, 48), (300, 40), (17, 33)], ids=str)
def test_our_keys_make_its_params4bit(nested, quant_type, sizes):
    k, n = sizes
    ours = make("qlora", k, n, blocksize=64, double_quant=nested, quant_type=quant_type)
    state = {key.removeprefix("0."): value for key, value in fastlora.bnb_state_dict(nn.Sequential(ours)).items()}
    stats = {key.removeprefix("weight."): value for key, value in state.items() if key.startswith("weight.")}
    theirs = bnb.nn.Params4bit.from_prequantized(state["weight"], dict(stats), device="cpu")
    same(dequantized(theirs), ours.dequantize(theirs.quant_state.dtype))
    assert theirs.quant_state.nested == nested
    assert set(stats) == set(linear4bit(k, n, nested=nested, quant_type=quant_type).weight.quant_state.as_dict(True))


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_to_bnb_and_back(nested, quant_type, dtype):
    weight = fastlora.functional.quantize(torch.randn(48, 256).to(dtype), quant_type, 128, nested)
    theirs = weight.to_bnb()
    assert isinstance(theirs, bnb.nn.Params4bit)
    assert theirs.data_ptr() == weight.packed.data_ptr()
    assert theirs.quant_state.dtype == dtype
    assert not theirs.requires_grad
    same(dequantized(theirs), weight.dequantize())
    same(bnb.functional.dequantize_4bit(theirs.data, theirs.quant_state), weight.dequantize())
    assert snapshot(QuantizedWeight.from_bnb(theirs)) == snapshot(weight)


def test_a_model_saved_in_its_keys_reads_back_through_safetensors(tmp_path):
    from safetensors.torch import load_file, save_file

    theirs = nn.Sequential(linear4bit(64, 64), nn.ReLU(), linear4bit(64, 16))
    save_file(theirs.state_dict(), tmp_path / "theirs.safetensors")
    ours = nn.Sequential(make("qlora", 64, 64), nn.ReLU(), make("qlora", 64, 16))
    missing, unexpected = ours.load_state_dict(load_file(tmp_path / "theirs.safetensors"), strict=False)
    assert not unexpected
    assert all(".lora_" in key for key in missing)
    x = torch.randn(3, 64)
    near(ours(x).detach(), theirs(x).detach().double(), units=32)


@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float32], ids=str)
def test_packed_bits_that_were_cast_numerically_are_refused(storage):
    """`.to(float16)` on a bf16-stored weight converts its bits; what is left has another size or is not the weight."""
    state = dict(linear4bit(storage=storage).state_dict())
    ours = make("qlora", 64, 48, blocksize=64)
    before = snapshot(ours)
    state["weight"] = state["weight"].to(torch.float64)
    with pytest.raises(StateDictError, match="packed bytes"):
        ours.load_state_dict(state, strict=False)
    assert snapshot(ours) == before


def test_convert_takes_a_models_linear4bits_over():
    torch.manual_seed(0)
    model = nn.Sequential(linear4bit(), nn.ReLU(), nn.Linear(48, 8))
    x = torch.randn(3, 64)
    want, at = model(x).detach(), model[0].weight.data_ptr()
    fastlora.convert(model, r=2, quantize=None, progress=False)
    assert [type(m).__name__ for m in model] == ["QLoraLinear", "ReLU", "LoraLinear"]
    assert model[0].weight.packed.data_ptr() == at
    near(model(x).detach(), want.double(), units=32)


def test_convert_refuses_8bit_and_repacked_layers_and_changes_nothing():
    eight = bnb.nn.Linear8bitLt(16, 16, has_fp16_weights=False).to("cpu")
    for bad, words in ((eight, "Linear8bitLt"), (repacked(), "repacked")):
        if words == "repacked" and not getattr(bad.weight.quant_state, "packing_format_for_cpu", False):
            bad.weight.quant_state.packing_format_for_cpu = True
        model = nn.ModuleDict({"first": nn.Linear(8, 8), "bad": bad})
        kinds, flags = [type(m) for m in model.modules()], [p.requires_grad for p in model.parameters()]
        with pytest.raises((fastlora.ConfigError, DtypeError), match=words):
            fastlora.convert(model, r=2, target_modules=["first", "bad"], progress=False)
        assert [type(m) for m in model.modules()] == kinds
        assert [p.requires_grad for p in model.parameters()] == flags


def test_peft_agrees_on_a_4bit_layer():
    """peft's own Linear4bit over the same bytes; fp32, so that its double rounding does not show."""
    peft = pytest.importorskip("peft")
    theirs = linear4bit(compute=torch.float32)
    ours = shake(QLoraLinear.from_linear(copy.deepcopy(theirs), r=4, lora_alpha=11))
    model = nn.ModuleDict({"lin": theirs})
    model.is_loaded_in_4bit = True
    wrapped = peft.LoraModel(model, peft.LoraConfig(r=4, lora_alpha=11, target_modules=["lin"]), "default")
    layer = wrapped.model["lin"]
    assert type(layer).__name__ == "Linear4bit"
    layer.lora_A["default"].weight.data = ours.lora_A["default"].detach().clone()
    layer.lora_B["default"].weight.data = ours.lora_B["default"].detach().clone()
    x = torch.randn(5, 64)
    near(ours(x).detach(), layer(x).detach().double(), units=32)
