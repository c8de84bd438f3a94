"""Mixtures of experts through the Triton kernels: the modules of `fastlora.moe` with every op forced to them."""

from __future__ import annotations

import pytest
import torch

from fastlora import settings
from tests.experts_tools import GatedMLP, inputs, mixlora, plugin, relative, step, truth

CASES = {
    "lora": {},
    "dora": {"use_dora": True},
    "top-p": {"routing_strategy": "mixlora-dynamic", "top_p": 0.6},
    "switch": {"routing_strategy": "mixlora-switch", "expert_capacity": 2},
}


@pytest.mark.parametrize("case", list(CASES))
def test_mixlora(case):
    base = {"quantize": "nf4", "blocksize": 32} if case in ("lora", "switch") else {}
    module = mixlora(GatedMLP(True), base=base, **CASES[case])
    x, dy = inputs(module, tokens=(1, 9))
    with settings.override(backend="triton"):
        got = step(module, x, dy)
    for name, want in truth(module, x, dy).items():
        assert relative(got[name], want) < 2e-6, name


def test_dropout_draws_the_same_bits():
    module = mixlora(lora_dropout=0.4, use_dora=True)
    x, dy = inputs(module, tokens=(1, 9))
    found = []
    for backend in ("reference", "triton"):
        torch.manual_seed(1)
        with settings.override(backend=backend):
            found.append(step(module, x, dy))
    for name, want in found[0].items():
        assert relative(found[1][name], want) < 4e-6, name


def test_plugins():
    for method in ("loramoe", "mola"):
        module = plugin(method, base={"quantize": "nf4", "blocksize": 32})
        x, dy = inputs(module, tokens=(1, 9))
        with settings.override(backend="triton"):
            got = step(module, x, dy)
        for name, want in truth(module, x, dy).items():
            assert relative(got[name], want) < 2e-6, name
