"""torch.compile of every kind of layer: one graph, few compilations, the eager result and the eager mask."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

import fastlora

KINDS = {
    "lora": lambda: fastlora.LoraLinear(32, 48, r=4, lora_dropout=0.2, init_lora_weights=False),
    "dora": lambda: fastlora.LoraLinear(32, 48, r=4, use_dora=True, init_lora_weights=False),
    "qlora": lambda: fastlora.QLoraLinear(32, 48, r=4, lora_dropout=0.2, init_lora_weights=False),
    "qlora fp4": lambda: fastlora.QLoraLinear(32, 48, r=4, quant_type="fp4", double_quant=False, bias=False),
    "qdora": lambda: fastlora.QLoraLinear(32, 48, r=4, use_dora=True, lora_dropout=0.2, init_lora_weights=False),
    "qdora shared": lambda: fastlora.QLoraLinear(
        32, 48, r=4, use_dora=True, lora_dropout=0.2, dora_dropout="shared", init_lora_weights=False
    ),
}
SIZES = [(2, 8), (3, 8), (2, 16), (5, 7), (1, 9)]


def step(model: nn.Module, layer: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Output and gradients of one training step from a fixed generator state."""
    layer.zero_grad()
    x = x.clone().requires_grad_()
    torch.manual_seed(11)
    y = model(x)
    y.square().sum().backward()
    found = {"y": y.detach(), "dx": x.grad}
    return found | {name: p.grad.clone() for name, p in layer.named_parameters() if p.grad is not None}


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("kind", list(KINDS))
def test_no_graph_break(kind):
    layer = KINDS[kind]().train()
    explained = torch._dynamo.explain(layer)(torch.randn(3, 32))
    assert explained.graph_break_count == 0, explained.break_reasons
    assert explained.graph_count == 1


@pytest.mark.parametrize("kind", list(KINDS))
def test_changing_batch_and_sequence_compile_at_most_twice(kind):
    torch.manual_seed(0)
    layer = KINDS[kind]().train()
    counters.clear()
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for batch, sequence in SIZES:
        x = torch.randn(batch, sequence, 32)
        want, got = step(layer, layer, x), step(compiled, layer, x)
        assert got.keys() == want.keys()
        for name, value in want.items():
            assert torch.equal(got[name], value), (name, batch, sequence)
    # A size of one is a kind of its own to the compiler, any other is not.
    assert 1 <= counters["stats"]["unique_graphs"] <= 2


@pytest.mark.parametrize("kind", ["qlora", "qdora"])
def test_training_and_evaluation_of_one_compiled_layer(kind):
    layer = KINDS[kind]()
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    x = torch.randn(2, 8, 32)
    for training in (True, False, True):
        layer.train(training)
        with torch.set_grad_enabled(training):
            torch.manual_seed(5)
            want = layer(x)
            torch.manual_seed(5)
            assert torch.equal(compiled(x), want)


def test_a_converted_model_compiles_as_one_graph():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 48), nn.GELU(), nn.Linear(48, 32))
    fastlora.convert(model, fastlora.LoraConfig(r=4, target_modules=["0", "2"], lora_dropout=0.1), progress=False)
    model.train()
    x = torch.randn(4, 32)
    assert torch._dynamo.explain(model)(x).graph_count == 1
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    want, got = step(model, model, x), step(compiled, model, x)
    for name, value in want.items():
        assert torch.equal(got[name], value), name


def test_equal_calls_in_one_graph_draw_masks_of_their_own():
    """A compiler that merged the two seeds would drop the same elements twice."""
    layer = fastlora.LoraLinear(32, 48, r=4, lora_dropout=0.5, init_lora_weights=False).train()

    def twice(x):
        return layer(x) - layer(x)

    x = torch.randn(8, 32)
    compiled = torch.compile(twice, fullgraph=True, backend="aot_eager")
    torch.manual_seed(4)
    want = twice(x)
    torch.manual_seed(4)
    assert torch.equal(compiled(x), want)
    assert want.abs().max() > 0.1


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_the_default_compiler(mode):
    """Inductor around the opaque ops: equal to eager, also in reduce-overhead mode."""
    torch.manual_seed(0)
    layer = KINDS["qdora"]().train()
    compiled = torch.compile(layer, fullgraph=True, mode=mode)
    x = torch.randn(4, 32)
    for _ in range(2):
        want, got = step(layer, layer, x), step(compiled, layer, x)
        for name, value in want.items():
            torch.testing.assert_close(got[name], value, rtol=1e-6, atol=1e-6)
