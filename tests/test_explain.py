"""What a layer explains is what a training step asks of the dispatcher, for one adapter and for a mixed batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import fastlora
from fastlora.dispatch import registry
from fastlora.errors import ConfigError
from fastlora.nn import explain
from fastlora.problem import Problem


@pytest.fixture
def asked(monkeypatch) -> list[Problem]:
    """The problems the dispatcher is asked for, in order."""
    seen: list[Problem] = []
    select = registry.select
    monkeypatch.setattr(registry, "select", lambda problem, *rest: seen.append(problem) or select(problem, *rest))
    return seen


def layer_of(quantize: bool, bias: bool, **fields: Any) -> Any:
    linear = nn.Linear(64, 32, bias=bias).requires_grad_(False)
    kind = fastlora.QLoraLinear if quantize else fastlora.LoraLinear
    layer = kind.from_linear(linear, **({"r": 4} | fields))
    layer.add_adapter("other", fastlora.LoraConfig(r=8))
    layer.add_adapter("third", fastlora.LoraConfig(r=8, use_dora=True))
    for name, parameter in layer.named_parameters():
        parameter.requires_grad_("lora" in name)
    return layer.train()


LAYERS = {
    "nf4": lambda: layer_of(True, True),
    "nf4-dora": lambda: layer_of(True, False, use_dora=True),
    "nf4-drops": lambda: layer_of(True, True, lora_dropout=0.1),
    "dense-drops": lambda: layer_of(False, False, lora_dropout=0.1),
    "dense-dora-drops": lambda: layer_of(False, True, lora_dropout=0.1, use_dora=True),
    "shared": lambda: layer_of(True, True, lora_dropout=0.1, use_dora=True, dora_dropout="shared"),
}


@pytest.mark.parametrize("names", [None, ["default", "other"], ["other", "default", "third"]], ids=str)
@pytest.mark.parametrize("name", list(LAYERS))
def test_what_is_explained_is_what_is_asked(name, names, asked):
    layer = LAYERS[name]()
    asked.clear()
    x = torch.randn(8, 64, requires_grad=True)
    rows = None if names is None else [*names, None] * 2
    y = layer(x) if rows is None else layer(x[: len(rows)], adapter_names=rows)
    y.sum().backward()
    tokens = y.shape[0]
    said = explain.single(layer, tokens, x.dtype)
    if names is not None:
        said = explain.mixed(layer, tokens, x.dtype, names)
    assert len(said) == len(set(said)) and set(said) == set(asked)
    text = layer.explain(tokens, adapter_names=names)
    assert all(str(problem) in text for problem in asked) and text.count("->") == len(said)


def test_an_unknown_adapter():
    with pytest.raises(ConfigError, match="nobody"):
        LAYERS["nf4"]().explain(8, adapter_names=["default", "nobody"])
