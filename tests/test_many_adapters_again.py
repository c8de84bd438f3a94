"""A layer asked for the same adapters again looks at them only once more, and notices whatever became of them."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import fastlora
from fastlora.errors import ConfigError, ShapeError
from fastlora.nn import rows

NAMES = ["a", "b", None, "c", "a", "b"]
K, N = 40, 24


def layer_of(kind="lora", dtype=torch.float32, **changes):
    torch.manual_seed(0)
    linear = nn.Linear(K, N).to(dtype)
    config = fastlora.LoraConfig(r=4, adapter_dtype=dtype, init_seed=0, **changes)
    make = fastlora.QLoraLinear if kind == "qlora" else fastlora.LoraLinear
    layer = make.from_linear(linear, config, adapter_name="a")
    fastlora.add_adapters(layer, {"b": config.replace(r=16), "c": config.replace(lora_alpha=3)})
    for parameter in layer.lora_B.values():
        parameter.data.normal_()
    return layer.eval()


def fresh(layer, x, names=NAMES):
    """What the layer says when it remembers nothing."""
    layer.__dict__.pop(rows._PLAIN, None)
    return layer(x, adapter_names=names)


def data(dtype=torch.float32):
    torch.manual_seed(1)
    return torch.randn(len(NAMES), K).to(dtype)


@pytest.fixture
def again(monkeypatch):
    """For every call, whether it was answered from memory."""
    found = []
    real = rows._again

    def spy(*args):
        y = real(*args)
        found.append(y is not None)
        return y

    monkeypatch.setattr(rows, "_again", spy)
    return found


@pytest.mark.parametrize("kind", ["lora", "qlora"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_second_answer_is_the_first_bit_for_bit(kind, dtype, again):
    layer, x = layer_of(kind, dtype), data(dtype)
    with torch.no_grad():
        first = layer(x, adapter_names=NAMES)
        second = layer(x, adapter_names=list(NAMES))
        more = layer(x[:, None].expand(-1, 3, -1), adapter_names=NAMES)
        with torch.inference_mode():
            third = layer(x, adapter_names=NAMES)
    assert again == [False, True, True, True]
    assert torch.equal(first, second) and torch.equal(first, third) and first.dtype == second.dtype == dtype
    assert more.shape == (len(NAMES), 3, N) and torch.allclose(more[:, 1].float(), first.float(), rtol=1e-2, atol=1e-2)
    assert torch.equal(first, layer(x, adapter_names=NAMES).detach())  # with gradients it is not asked
    assert again[-1] is False


def test_adapters_are_known_one_by_one_whatever_the_batch(again):
    layer, x = layer_of(), data()
    with torch.no_grad():
        layer(x, adapter_names=NAMES)
        layer(x, adapter_names=[None] * len(NAMES))
        for names in (["c"] * 6, ["b", None, "a", "a", "b", None], NAMES):
            got = layer(x, adapter_names=names)
            assert again[-1] and torch.equal(got, fresh(layer, x, names))
            layer(x, adapter_names=NAMES)
        layer.delete_adapter("c")
        layer(x, adapter_names=["a", "b"] * 3)
        layer.lora_A["a"].data = layer.lora_A["a"].data.clone()
        layer(x, adapter_names=["a", "b"] * 3)
    assert set(layer.__dict__[rows._PLAIN]) == {"a", "b"}


def test_compiled_code_does_not_see_the_memory():
    layer, x = layer_of(), data()
    with torch.no_grad():
        want = [layer(x, adapter_names=NAMES) for _ in range(2)][1]
        compiled = torch.compile(lambda x: layer(x, adapter_names=NAMES), fullgraph=True, backend="eager")
        assert torch.equal(compiled(x), want)


CHANGES = {
    "in place": lambda layer: layer.lora_A["a"].data.mul_(2),
    "new data": lambda layer: setattr(layer.lora_B["b"], "data", torch.randn(N, 16)),
    "new parameter": lambda layer: layer.lora_A.__setitem__("c", nn.Parameter(torch.randn(4, K))),
    "another rank": lambda layer: (
        setattr(layer.lora_A["a"], "data", torch.randn(2, K)),
        setattr(layer.lora_B["a"], "data", torch.randn(N, 2)),
    ),
    "not contiguous": lambda layer: setattr(layer.lora_A["b"], "data", torch.randn(K, 16).T),
    "scaling": lambda layer: layer.scaling.__setitem__("c", 7.0),
    "bias": lambda layer: setattr(layer, "bias", nn.Parameter(torch.randn(N))),
    "weight": lambda layer: layer.weight.data.add_(1),
    "removed": lambda layer: (layer.delete_adapter("c"), layer.add_adapter("c", fastlora.LoraConfig(r=2, init_seed=9))),
}


@pytest.mark.parametrize("change", list(CHANGES))
def test_what_has_changed_counts(change):
    layer, x = layer_of(), data()
    with torch.no_grad():
        before = [layer(x, adapter_names=NAMES) for _ in range(2)][1]
        CHANGES[change](layer)
        if change == "removed":
            layer.lora_B["c"].data.normal_()
        got = layer(x, adapter_names=NAMES)
        assert torch.equal(got, fresh(layer, x)) and not torch.equal(got, before)


def test_errors_stay_errors():
    layer, x = layer_of(), data()
    with torch.no_grad():
        for _ in range(2):
            layer(x, adapter_names=NAMES)
        with pytest.raises(ShapeError):
            layer(x[:, :5], adapter_names=NAMES)
        with pytest.raises(ShapeError):
            layer(x[:2], adapter_names=NAMES)
        layer.lora_A["a"].data = torch.randn(4, K + 1)
        with pytest.raises(ShapeError, match="adapter a"):
            layer(x, adapter_names=NAMES)
        del layer.lora_A["a"]
        with pytest.raises(ConfigError):
            layer(x, adapter_names=NAMES)


def test_training_dropout_and_dora_are_not_remembered(again):
    layer, x = layer_of(lora_dropout=0.5), data()
    with torch.no_grad():
        evals = [layer(x, adapter_names=NAMES) for _ in range(2)]
        layer.train()
        drops = [layer(x, adapter_names=NAMES) for _ in range(2)]
        assert again == [False, True, False, False]
        assert torch.equal(*evals) and not torch.equal(*drops)
        other = layer_of(use_dora=True)
        assert torch.equal(*(other(x, adapter_names=NAMES) for _ in range(2)))
    assert again[4:] == [False, False]


def test_moves_copies_pickles_and_disabled_adapters():
    layer, x = layer_of(), data()
    with torch.no_grad():
        for _ in range(2):
            want = layer(x, adapter_names=NAMES)
        for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            assert torch.equal(twin(x, adapter_names=NAMES), want)
            twin.lora_A["a"].data.zero_()
            assert not torch.equal(twin(x, adapter_names=NAMES), want)
        assert torch.equal(layer(x, adapter_names=NAMES), want)
        half = layer.to(torch.bfloat16)(x.bfloat16(), adapter_names=NAMES)
        assert half.dtype == torch.bfloat16 and torch.equal(half, fresh(layer, x.bfloat16()))
        layer.float()
        layer(x, adapter_names=NAMES)
        with layer.disable_adapters():
            assert torch.equal(layer(x, adapter_names=NAMES), layer(x))
