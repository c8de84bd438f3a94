"""The short way of an eager call: the op's body without the dispatcher, the same bits, unless something looks on."""

from __future__ import annotations

import json

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fastlora
from benchmarks import host_time
from fastlora.ops import lora
from tests.layer_tools import make


class Seen(TorchDispatchMode):
    """Which of our ops passed the dispatcher."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "fastlora":
            self.names.append(func._schema.name.partition("::")[2])
        return func(*args, **(kwargs or {}))


@pytest.fixture
def short(monkeypatch):
    """Whether each call took the short way."""
    direct, found = lora._direct, []
    monkeypatch.setattr(lora, "_direct", lambda *args: found.append(direct(*args)) or found[-1])
    return found


def step(layer, x):
    torch.manual_seed(3)
    y = layer(x)
    parameters = [p for p in layer.parameters() if p.requires_grad]
    return [y.detach(), *torch.autograd.grad(y, [x, *parameters], torch.ones_like(y))]


@pytest.mark.parametrize("kind", ["lora", "qlora"])
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_both_ways_give_the_same_bits(kind, dora, p):
    layer = make(kind, use_dora=dora, lora_dropout=p).train()
    x = torch.randn(5, layer.in_features, requires_grad=True)
    want = step(layer, x)
    with Seen() as seen:
        got = step(layer, x)
    prefix = "q" if kind == "qlora" else ""
    norm = [f"{prefix}dora_norm"] if dora else []
    assert seen.names == (["draw_seed"] if p else []) + norm + [f"{prefix}lora_fwd", f"{prefix}lora_bwd"]
    assert all(torch.equal(one, other) for one, other in zip(want, got, strict=True))


def test_a_plain_call_takes_the_short_way(short):
    layer = make("qlora", lora_dropout=0.2).train()
    step(layer, torch.randn(3, layer.in_features, requires_grad=True))
    with torch.no_grad():
        layer.eval()(torch.randn(3, layer.in_features))
    assert short == [True, True, True]  # forward, backward, evaluation


class Subclass(torch.Tensor):
    """What a library might pass."""


def under(name, layer, x):
    if name == "dispatch mode":
        with Seen():
            return layer(x)
    if name == "function mode":
        with torch.device("cpu"):
            return layer(x)
    if name == "profiler":
        with torch.profiler.profile() as profile:
            y = layer(x)
        assert any("fastlora::lora_fwd" in event.name for event in profile.events())
        return y
    if name == "subclass":
        return layer(x.as_subclass(Subclass))
    layer.to("meta")
    return layer(x.to("meta"))


@pytest.mark.parametrize("name", ["dispatch mode", "function mode", "profiler", "subclass", "meta"])
def test_whatever_could_see_the_op_still_does(name, short):
    layer = make("lora").eval()
    with torch.no_grad():
        y = under(name, layer, torch.randn(2, layer.in_features))
    assert y.shape == (2, layer.out_features)
    assert short == [False]


def test_a_compiled_layer_holds_the_op():
    from torch._dynamo.testing import EagerAndRecordGraphs

    backend = EagerAndRecordGraphs()
    layer = make("lora").eval()
    with torch.no_grad():
        torch.compile(layer, backend=backend, fullgraph=True)(torch.randn(2, layer.in_features))
    assert "fastlora.lora_fwd" in backend.graphs[0].print_readable(print_output=False)


def test_a_seed_is_the_same_either_way():
    torch.manual_seed(0)
    want = lora.draw_seed(torch.device("cpu"))
    torch.manual_seed(0)
    with Seen() as seen:
        got = lora.draw_seed(torch.device("cpu"))
    assert seen.names == ["draw_seed"]
    assert torch.equal(want, got)


# --- the benchmark ----------------------------------------------------------------------------------------------------


def test_the_host_times_are_of_right_layers(tmp_path, capsys):
    pytest.importorskip("peft")
    pytest.importorskip("bitsandbytes")
    file = tmp_path / "host.json"
    assert host_time.main(["--json", str(file), "--rounds", "1", "--calls", "1"]) == 0
    rows = json.loads(file.read_text())["results"]
    assert {row["mode"] for row in rows} == {"eval", "train"}
    assert {row["layer"] for row in rows if row["target"] is not None} == set(host_time.JUDGED)
    assert "LoraLinear" in capsys.readouterr().out


def test_a_wrong_layer_has_no_time():
    found = host_time.layers()
    found["LoraLinear"].scaling["default"] *= 1.01
    with pytest.raises(RuntimeError, match="LoraLinear is off"):
        host_time.check(found)
    assert isinstance(found["LoraLinear"], fastlora.LoraLinear)
