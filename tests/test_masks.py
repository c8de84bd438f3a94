"""One dropout decision, wherever it is made again: backward, recompute, compiler, or all three together.

With w = 0, a = I and b = I the layer's output is s * drop(x): both directions show the mask itself. From x = 1 and
dy = 1 the output is the forward's mask times the scale, and dx the backward's.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fastlora
from fastlora.math import philox
from fastlora.settings import override

SIZE, P = 40, 0.4
MODES = ["eager", "reentrant", "not reentrant", "compiled", "compiled, reentrant", "compiled, not reentrant"]


def mirror(quantized: bool) -> nn.Module:
    """A layer whose output is drop(x)."""
    base = nn.Linear(SIZE, SIZE, bias=False)
    nn.init.zeros_(base.weight)
    cls = fastlora.QLoraLinear if quantized else fastlora.LoraLinear
    layer = cls.from_linear(base, r=SIZE, lora_alpha=SIZE, lora_dropout=P, init_lora_weights=False)
    with torch.no_grad():
        layer.lora_A["default"].copy_(torch.eye(SIZE))
        layer.lora_B["default"].copy_(torch.eye(SIZE))
    return layer.train()


def masks(layer: nn.Module, mode: str, rows: int = 9) -> tuple[Tensor, Tensor]:
    """What the forward and the backward kept, bool [rows, SIZE], of one step from a fixed generator state."""
    x = torch.ones(rows, SIZE, requires_grad=True)

    def call(x: Tensor) -> Tensor:
        if "reentrant" not in mode:
            return layer(x)
        return checkpoint(layer, x, use_reentrant="not" not in mode, preserve_rng_state=True)

    run = torch.compile(call, backend="aot_eager") if "compiled" in mode else call
    torch.manual_seed(21)
    y = run(x)
    y.backward(torch.ones_like(y))
    scale = torch.tensor(philox.keep_scale(P))
    for found in (y.detach(), x.grad):
        torch.testing.assert_close(found.unique(), torch.stack((torch.zeros(()), scale)))
    return y.detach() > 0, x.grad > 0


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("low_memory", [False, True], ids=["saved bits", "redrawn"])
@pytest.mark.parametrize("quantized", [False, True], ids=["dense", "nf4"])
@pytest.mark.parametrize("mode", MODES)
def test_the_backward_uses_the_mask_of_the_forward(mode, quantized, low_memory):
    layer = mirror(quantized)
    with override(low_memory=low_memory):
        forward, backward = masks(layer, mode)
        eager, _ = masks(layer, "eager")
    assert torch.equal(forward, backward)
    assert torch.equal(forward, eager)
    assert 0.3 < 1 - forward.float().mean() < 0.5


def test_two_checkpointed_layers_under_the_compiler_keep_masks_of_their_own():
    first, second = mirror(False), mirror(True)
    x = torch.ones(9, SIZE, requires_grad=True)

    def both(x: Tensor) -> Tensor:
        return torch.cat([checkpoint(layer, x, use_reentrant=False) for layer in (first, second)], dim=1)

    seen = []
    for run in (both, torch.compile(both, backend="aot_eager")):
        torch.manual_seed(3)
        x.grad = None
        y = run(x)
        y.backward(torch.ones_like(y))
        one, two = y.detach().chunk(2, dim=1)
        assert not torch.equal(one, two)
        assert torch.equal(x.grad, one + two)  # each backward with the mask of its own forward
        seen.append(y.detach())
    assert torch.equal(*seen)
