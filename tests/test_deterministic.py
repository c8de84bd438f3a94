"""`torch.use_deterministic_algorithms`: nothing refuses, nothing reads memory it did not write."""

from __future__ import annotations

import pytest
import torch

import fastlora
from tests.test_replay import KINDS, build


@pytest.fixture
def deterministic():
    """Errors for nondeterministic ops, and NaN in every buffer that `torch.empty` gives out."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def step(kind: str, rows: int) -> list[torch.Tensor]:
    layer = build(kind)
    x = torch.randn(rows, 32, generator=torch.Generator().manual_seed(2)).requires_grad_()
    torch.manual_seed(3)
    y = layer(x)
    y.square().sum().backward()
    return [y.detach(), x.grad, *(p.grad for p in layer.parameters() if p.grad is not None)]


@pytest.mark.parametrize("rows", [1, 7, 40])
@pytest.mark.parametrize("kind", list(KINDS))
def test_a_training_step_is_the_same_with_poisoned_buffers(kind, rows, request):
    want = step(kind, rows)
    request.getfixturevalue("deterministic")
    for _ in range(2):
        got = step(kind, rows)
        for one, other in zip(got, want, strict=True):
            assert torch.equal(one, other)
            assert one.isfinite().all()


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("double_quant", [False, True])
def test_quantize_merge_and_back(double_quant):
    layer = fastlora.QLoraLinear(33, 17, r=4, double_quant=double_quant, init_lora_weights=False)
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    layer.merge()
    assert layer.weight.isfinite().all()
    layer.unmerge()
    for name, value in layer.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert (
        fastlora.functional.dora_weight_norm(torch.randn(5, 7), torch.randn(2, 7), torch.randn(5, 2), 0.5)
        .isfinite()
        .all()
    )
