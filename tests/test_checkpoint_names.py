"""Adapters on disk: dtypes, several adapters, names, and models that are not from transformers."""

from __future__ import annotations

import peft
import pytest
import torch
from torch import nn

import fastlora
from fastlora import ConfigError, LoraLinear
from tests import checkpoint_tools
from tests.checkpoint_tools import (
    CASES,
    CONFIG,
    WEIGHTS,
    converted,
    peft_fields,
    peft_loads,
    peft_model,
    peft_saves,
    same_tensors,
    tensors,
)
from tests.model_tools import close, contents, layers_of, llama, logits, move, silent

base_logits = checkpoint_tools.base_logits
targets = checkpoint_tools.targets


@pytest.mark.parametrize("case", ["lora", "dora"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_adapters_keep_their_dtype_and_values(case, dtype, tmp_path, base_logits):
    model = move(converted(adapter_dtype=dtype, **CASES[case]))
    fastlora.save_adapter(model, tmp_path / "ours")
    assert {t.dtype for t in tensors(tmp_path / "ours").values()} == {dtype}
    close(logits(peft_loads(tmp_path / "ours")), logits(model), base_logits)
    kept = peft_loads(tmp_path / "ours", llama(dtype=dtype), autocast_adapter_dtype=False)
    kept.save_pretrained(str(tmp_path / "theirs"))
    same_tensors(tensors(tmp_path / "theirs"), tensors(tmp_path / "ours"))
    for quantize in (None, "nf4"):
        fresh = llama() if quantize is None else converted(quantize, adapter_dtype=dtype, **CASES[case])
        fastlora.load_adapter(fresh, tmp_path / "theirs")
        assert sorted(layers_of(fresh)) == sorted(layers_of(model))
        for name, layer in layers_of(fresh).items():
            assert layer.lora_A["default"].dtype == dtype
            assert torch.equal(layer.lora_A["default"], layers_of(model)[name].lora_A["default"])
        fastlora.save_adapter(fresh, tmp_path / "again")
        same_tensors(tensors(tmp_path / "again"), tensors(tmp_path / "ours"))
        if quantize is None:
            close(logits(fresh), logits(model), base_logits)


def test_a_bf16_model_predicts_as_pefts_to_bf16_rounding(tmp_path, base_logits):
    fields = CASES["both patterns"]
    model = move(converted(dtype=torch.bfloat16, adapter_dtype=torch.bfloat16, **fields))
    fastlora.save_adapter(model, tmp_path)
    truth = logits(peft_loads(tmp_path, llama(dtype=torch.bfloat16).float()))
    theirs = logits(peft_loads(tmp_path, llama(dtype=torch.bfloat16), autocast_adapter_dtype=False))
    base = logits(llama(dtype=torch.bfloat16))
    allowed = (theirs - truth).norm()
    assert (truth - base).norm() > 10 * allowed
    assert (logits(model) - truth).norm() <= 1.5 * allowed
    fresh = fastlora.load_adapter(llama(dtype=torch.bfloat16), tmp_path)
    assert torch.equal(logits(fresh), logits(model))


def test_loading_over_an_adapter_of_another_dtype_keeps_the_parameters_and_says_so_truly(tmp_path):
    """The existing parameters stay the same objects (an optimizer holds them); the config tells their real dtype."""
    fastlora.save_adapter(move(converted(adapter_dtype=torch.bfloat16, **CASES["lora"])), tmp_path)
    model = converted(**CASES["lora"])
    before = {name: layer.lora_A["default"] for name, layer in layers_of(model).items()}
    fastlora.load_adapter(model, tmp_path)
    for name, layer in layers_of(model).items():
        assert layer.lora_A["default"] is before[name]
        assert layer.adapter_configs["default"].adapter_dtype == layer.lora_A["default"].dtype


SEVERAL = {
    "second": {"r": 2, "lora_alpha": 5, "use_dora": True, "target_modules": ["q_proj", "down_proj"]},
    "third": {"r": 5, "lora_alpha": 3, "use_rslora": True, "target_modules": ["v_proj"]},
}


def test_several_adapters_lie_where_peft_looks_for_them(tmp_path, base_logits):
    model = converted(**CASES["lora"])
    fastlora.add_adapters(model, SEVERAL)
    want = {}
    for seed, name in enumerate(["default", *SEVERAL]):
        fastlora.set_adapter(model, name)
        move(model, seed)
        want[name] = logits(model)
    for name in want:
        where = fastlora.save_adapter(model, tmp_path, name)
        assert where == (tmp_path if name == "default" else tmp_path / name)
    assert sorted(contents(tmp_path)) == sorted(f"{p}{f}" for p in ("", "second/", "third/") for f in (CONFIG, WEIGHTS))
    twin = peft_loads(tmp_path)
    with silent():
        for name in SEVERAL:
            twin.load_adapter(str(tmp_path / name), name)
    for name, expected in want.items():
        twin.set_adapter(name)
        close(logits(twin), expected, base_logits)


def test_several_adapters_that_peft_saved(tmp_path, base_logits):
    theirs = peft_model(CASES["lora"])
    for name, fields in SEVERAL.items():
        theirs.add_adapter(name, peft.LoraConfig(**peft_fields(fields)))
    want = {}
    for seed, name in enumerate(["default", *SEVERAL]):
        theirs.set_adapter(name)
        move(theirs, seed)
        want[name] = logits(theirs)
    theirs.save_pretrained(str(tmp_path))
    model = llama()
    for name in want:
        fastlora.load_adapter(model, tmp_path, name)
        close(logits(model), want[name], base_logits)
    for name, expected in want.items():
        fastlora.set_adapter(model, name)
        close(logits(model), expected, base_logits)


def test_any_adapter_name_loads_any_folder(tmp_path, base_logits):
    """The name is ours to choose: it is not in the keys."""
    want = logits(peft_saves(CASES["dora"], tmp_path))
    model = fastlora.load_adapter(llama(), tmp_path, "mine")
    assert {name for layer in layers_of(model).values() for name in layer.lora_A} == {"mine"}
    close(logits(model), want, base_logits)
    assert fastlora.save_adapter(model, tmp_path / "out", "mine") == tmp_path / "out" / "mine"
    close(logits(peft_loads(tmp_path / "out" / "mine", name="theirs")), want, base_logits)
    close(logits(fastlora.load_adapter(llama(), str(tmp_path / "out" / "mine"))), want, base_logits)


def test_a_model_that_is_not_from_transformers(tmp_path):
    """Lists of sequences: the last parts of names are numbers that other kinds of module have too."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 8))

        def forward(self, x):
            return x + self.net(x)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.lin = nn.Linear(8, 8)
            self.blocks = nn.ModuleList(Block() for _ in range(3))
            self.head = nn.ModuleDict({"lin": nn.Linear(8, 4)})

        def forward(self, x):
            x = self.lin(x)
            for block in self.blocks:
                x = block(x)
            return self.head["lin"](x)

    x = torch.randn(5, 8)
    for number, targets in enumerate([["0", "2"], ["blocks.1.net.2"], ["lin"], r"lin", r"head\.lin|blocks\.0\.net\.0"]):
        asked = "lin" if targets == r"lin" else targets
        model = move(fastlora.convert(Model(), quantize=None, target_modules=asked, r=3))
        folder = fastlora.save_adapter(model, tmp_path / str(number))
        want, adapted = model(x), sorted(layers_of(model))
        with silent():
            twin = peft.PeftModel.from_pretrained(Model(), str(folder))
        assert sorted(n for n, m in twin.base_model.model.named_modules() if hasattr(m, "lora_A")) == adapted
        torch.testing.assert_close(twin(x), want, rtol=1e-5, atol=1e-5)
        fresh = fastlora.load_adapter(Model(), folder)
        assert sorted(layers_of(fresh)) == adapted
        assert torch.equal(fresh(x), want)


def test_ranks_of_names_that_end_alike_do_not_mix(tmp_path):
    """A whole name is also the ending of another: its rank must not reach the other."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.lin = nn.Linear(8, 8)
            self.b = nn.ModuleDict({"lin": nn.Linear(8, 8), "c": nn.ModuleDict({"lin": nn.Linear(8, 8)})})
            self.bxlin = nn.Linear(8, 8)

        def forward(self, x):
            return self.bxlin(self.b["c"]["lin"](self.b["lin"](self.lin(x))))

    ranks, alphas = {r"^lin": 5, r"^b\.lin": 3}, {r"^b\.lin": 4}
    config = {"r": 2, "lora_alpha": 7, "rank_pattern": ranks, "alpha_pattern": alphas}
    model = move(fastlora.convert(Model(), quantize=None, target_modules="all-linear", **config))
    assert {name: layer.adapter_configs["default"].r for name, layer in layers_of(model).items()} == {
        "lin": 5,
        "b.lin": 3,
        "b.c.lin": 2,
        "bxlin": 2,
    }
    fastlora.save_adapter(model, tmp_path)
    x = torch.randn(5, 8)
    with silent():
        twin = peft.PeftModel.from_pretrained(Model(), str(tmp_path))
    torch.testing.assert_close(twin(x), model(x), rtol=1e-5, atol=1e-5)
    assert torch.equal(fastlora.load_adapter(Model(), tmp_path)(x), model(x))


def test_layers_whose_configs_disagree_are_not_saved_as_if_they_agreed(tmp_path):
    """One file holds one rsLoRA switch: adapters made layer by layer with different ones cannot be saved truly."""
    model = nn.ModuleDict({"a": LoraLinear(8, 8, r=4), "b": LoraLinear(8, 8, r=4, use_rslora=True)})
    with pytest.raises(ConfigError, match="use_rslora"):
        fastlora.save_adapter(model, tmp_path / "x")
    model = nn.ModuleDict({"a": LoraLinear(8, 8, r=4), "b": LoraLinear(8, 8, r=4, use_dora=True)})
    with pytest.raises(ConfigError, match="use_dora"):
        fastlora.save_adapter(model, tmp_path / "x")
    assert not (tmp_path / "x").exists()
