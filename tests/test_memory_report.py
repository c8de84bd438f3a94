"""Counting what a forward keeps leaves nothing behind."""

from __future__ import annotations

import gc

import torch
from torch import nn

from fastlora.nn.memory import held


def test_what_was_counted_is_freed():
    model = nn.Sequential(nn.Linear(512, 300), nn.Sigmoid(), nn.Linear(300, 300), nn.Tanh())  # both keep their output
    x = torch.randn(7, 512)

    def left() -> int:
        gc.collect()
        return sum(type(each) is torch.Tensor and each.shape == (7, 300) for each in gc.get_objects())

    before = left()
    found = held(model, {"first": model[0]}, lambda: model(x))
    assert found.layers["first"] == 7 * 512 * 4  # x
    assert found.rest == 2 * 7 * 300 * 4
    assert left() == before


def test_a_backward_inside_is_right():
    model = nn.Sequential(nn.Linear(8, 8), nn.Sigmoid())
    x = torch.randn(3, 8)
    model(x).sum().backward()
    want = model[0].weight.grad.clone()
    model.zero_grad()
    held(model, {}, lambda: model(x).sum().backward())
    assert torch.equal(model[0].weight.grad, want)
