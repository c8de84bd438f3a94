"""torch.compile takes an accelerated layer as one graph; a new scale or a padded rank does not recompile it."""

from __future__ import annotations

import pytest
import torch

import fastlora
from fastlora import testing
from fastlora.testing import Case
from tests.accelerate_tools import fused, layer_of, run_layer

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def made(**fields):
    case = Case(**({"m": 6, "n": 48, "k": 64, "r": 4, "bias": True} | fields))
    inputs = testing.make_inputs(case)
    layer = layer_of(case, inputs)
    return fastlora.accelerate(layer), inputs


@pytest.mark.parametrize("quant", ["", "nf4"])
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("p", [0.0, 0.2])
def test_one_graph_with_the_same_bits(quant, dora, p):
    layer, inputs = made(quant=quant, nested=bool(quant), dora=dora, p=p)
    torch.manual_seed(3)
    want = run_layer(layer, inputs)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")

    class Both:
        def __getattr__(self, name):
            return getattr(layer, name)

        def __call__(self, x):
            return compiled(x)

    torch.manual_seed(3)
    got = run_layer(Both(), inputs)
    for one, other in zip(want, got, strict=True):
        assert (one is None) == (other is None)
        assert one is None or torch.equal(one, other)
    assert fused(layer)


def counted(layer):
    """The compiled layer and how often it was compiled."""
    times = []

    def backend(graph, example):
        times.append(1)
        return graph.forward

    return torch.compile(layer, fullgraph=True, backend=backend), times


@pytest.mark.parametrize("quant", ["", "nf4"])
def test_a_tensor_scale_and_a_padded_rank_do_not_recompile(quant):
    layer, inputs = made(quant=quant)
    layer.scaling["default"] = torch.tensor(1.5)
    compiled, times = counted(layer)
    with torch.no_grad():
        first = compiled(inputs.x)
        assert torch.equal(first, layer(inputs.x))
        layer.scaling["default"].fill_(0.5)
        layer.lora_A["default"].weight.data[2:] = 0  # another adapter of rank 2, padded
        layer.lora_B["default"].weight.data = torch.randn_like(layer.lora_B["default"].weight)
        second = compiled(inputs.x)
        assert torch.equal(second, layer(inputs.x))
    assert not torch.equal(first, second)
    assert len(times) == 1


@pytest.mark.parametrize("quant", ["", "nf4"])
@pytest.mark.parametrize("how", ["object", "data", "in place"])
def test_a_replaced_base_weight_is_seen(quant, how):
    layer, inputs = made(quant=quant)
    other, _ = made(quant=quant, seed=5)
    compiled, _ = counted(layer)
    with torch.no_grad():
        first = compiled(inputs.x)
        if how == "object":
            layer.base_layer.weight = other.base_layer.weight
        elif how == "data":
            layer.base_layer.weight.data = layer.base_layer.weight.data.flip(0)
        else:
            layer.base_layer.weight.data.copy_(layer.base_layer.weight.data.flip(0))
        torch.testing.assert_close(compiled(inputs.x), layer(inputs.x))
        assert (layer(inputs.x) - first).abs().max() > 0.1


def test_switching_adapters_off_is_seen():
    layer, inputs = made()
    compiled, _ = counted(layer)
    with torch.no_grad():
        compiled(inputs.x)
        layer.enable_adapters(False)
        torch.testing.assert_close(compiled(inputs.x), layer.base_layer(inputs.x))
        layer.enable_adapters(True)
        torch.testing.assert_close(compiled(inputs.x), layer(inputs.x))
