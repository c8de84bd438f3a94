"""merge_folder: the folder holds what `merge_and_unload` gives, in little memory, or nothing is there."""

from __future__ import annotations

import itertools
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

import fastlora
from fastlora import ConfigError, DtypeError, ShapeError, StateDictError
from fastlora.adalora import AdaLoraConfig
from fastlora.nn import merge_folder as module
from fastlora.nn.merge_folder import merge_folder
from fastlora.nn.quantize_folder import quantize_folder
from fastlora.nn.streaming import INDEX, SINGLE
from tests.checkpoint_tools import EVERY_CASE, peft_saves
from tests.folder_tools import BESIDE, adapter_folder, load, model_folder, names, same_parameters
from tests.model_tools import contents, llama, logits, move

Q1 = "model.layers.1.self_attn.q_proj"
WEIGHTS = "adapter_model.safetensors"


def library(folder: Path, adapter: Path, dtype: torch.dtype | None = None) -> torch.nn.Module:
    return fastlora.merge_and_unload(fastlora.load_adapter(load(folder), adapter), dtype=dtype)


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """The tiny model in each form."""
    folder = tmp_path_factory.mktemp("bases")
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        model_folder(folder / str(dtype).removeprefix("torch."), dtype=dtype)
    quantize_folder(folder / "bfloat16", folder / "nf4")
    quantize_folder(folder / "float16", folder / "fp4", quantize="fp4", double_quant=False)
    return folder


# --- what comes out ---------------------------------------------------------------------------------------------------


@EVERY_CASE
def test_every_adapter_of_peft_is_merged_as_the_library_does_it(bases, tmp_path, fields):
    peft_saves(fields, tmp_path / "adapter")
    for base in ("float32", "bfloat16"):
        merge_folder(bases / base, tmp_path / "adapter", tmp_path / base)
        same_parameters(load(tmp_path / base), library(bases / base, tmp_path / "adapter"))


@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("base", ["nf4", "fp4"])
def test_a_quantized_folder_becomes_a_16_bit_one(bases, tmp_path, base, use_dora):
    pytest.importorskip("bitsandbytes")
    adapter = adapter_folder(tmp_path / "adapter", use_dora=use_dora, rank_pattern={"q_proj": 2}, use_rslora=True)
    done = merge_folder(bases / base, adapter, tmp_path / "out")
    want = library(bases / base, adapter)
    assert want.dtype == (torch.bfloat16 if base == "nf4" else torch.float16)
    same_parameters(load(tmp_path / "out"), want)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["dtype"] == str(want.dtype).removeprefix("torch.")
    assert (done.quantized, done.layers, done.ranks) == (14, 14, [2, 4])
    assert done.method == ("DoRA" if use_dora else "LoRA")


def test_quantized_layers_without_an_adapter_become_16_bit_too(bases, tmp_path):
    pytest.importorskip("bitsandbytes")
    adapter = adapter_folder(tmp_path / "adapter", target_modules=["q_proj"])
    merge_folder(bases / "nf4", adapter, tmp_path / "out")
    got, base = load(tmp_path / "out"), load(bases / "nf4")
    fastlora.convert(base, r=1, progress=False)
    for layer in (0, 1):
        weight = base.model.layers[layer].mlp.up_proj.weight.dequantize(torch.bfloat16)
        assert torch.equal(got.model.layers[layer].mlp.up_proj.weight, weight)


def test_peft_agrees(bases, tmp_path):
    adapter = adapter_folder(tmp_path / "adapter", use_dora=True)
    merge_folder(bases / "float32", adapter, tmp_path / "out")
    theirs = peft.PeftModel.from_pretrained(load(bases / "float32"), str(adapter))
    want = logits(theirs.merge_and_unload())
    moved = (want - logits(load(bases / "float32"))).abs().max()
    assert (logits(load(tmp_path / "out")) - want).abs().max() < 1e-4 * moved


@pytest.mark.parametrize("base", ["bfloat16", "nf4", "fp4"])
@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("rows", [1, 7, 24])
def test_pieces_of_a_few_rows_give_the_same(bases, tmp_path, monkeypatch, base, use_dora, rows):
    if base != "bfloat16":
        pytest.importorskip("bitsandbytes")
    adapter = adapter_folder(tmp_path / "adapter", use_dora=use_dora)
    whole = merge_folder(bases / base, adapter, tmp_path / "whole")
    monkeypatch.setattr(module, "_AT_ONCE", rows * 32)
    parts = merge_folder(bases / base, adapter, tmp_path / "parts")
    assert parts.lost == pytest.approx(whole.lost, rel=1e-4)
    # A product of few rows may sum in another order: some weights lie so near a border that they round differently.
    got, want = (dict(load(tmp_path / name).named_parameters()) for name in ("parts", "whole"))
    differ = [(got[name] != tensor).double().mean().item() for name, tensor in want.items()]
    assert max(differ) < 0.01
    step = torch.finfo(next(iter(want.values())).dtype).eps
    assert all(torch.allclose(got[name], tensor, rtol=step, atol=step / 64) for name, tensor in want.items())


def test_pieces_of_a_quantized_weight_are_its_rows():
    """Sizes where the 256 scales of a nested block end inside a row, so that several rows go together."""
    from fastlora.math import nf4

    torch.manual_seed(0)
    for n, k, blocksize, nested in ((96, 96, 32, True), (64, 80, 64, False), (70, 130, 32, True)):
        packed = nf4.pack(torch.randn(n, k), "nf4", blocksize, nested)
        want = nf4.dequantize(packed, torch.float32)
        unit = blocksize * (256 if nested else 1)
        unit //= math.gcd(unit, k)
        borders = [*range(0, n, unit), n]
        for first, end in itertools.pairwise(borders):
            got = nf4.dequantize(module._rows_of(packed, first, end), torch.float32)
            assert torch.equal(got, want[first:end])


def test_adalora_is_merged(bases, tmp_path):
    config = AdaLoraConfig(init_r=6, target_r=3, total_step=10, init_seed=0)
    model = move(fastlora.convert(llama(), config, quantize=None, progress=False))
    adapter = fastlora.save_adapter(model, tmp_path / "adapter")
    done = merge_folder(bases / "float32", adapter, tmp_path / "out")
    assert done.method == "AdaLoRA"
    same_parameters(load(tmp_path / "out"), library(bases / "float32", adapter))


@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
def test_a_pickle_of_tensors_without_magnitudes_is_merged_as_it_loads(bases, tmp_path, use_dora):
    adapter = adapter_folder(tmp_path / "adapter", use_dora=use_dora)
    state = load_file(adapter / WEIGHTS)
    (adapter / WEIGHTS).unlink()
    torch.save({k: t for k, t in state.items() if "magnitude" not in k}, adapter / "adapter_model.bin")
    done = merge_folder(bases / "float32", adapter, tmp_path / "out")
    assert done.bare == use_dora
    got = load(tmp_path / "out")
    with pytest.warns(UserWarning, match="magnitude") if use_dora else pytest.MonkeyPatch.context():
        want = library(bases / "float32", adapter)
    same_parameters(got, want)


def test_the_dtype_asked_for_is_everywhere(bases, tmp_path):
    adapter = adapter_folder(tmp_path / "adapter", bias="all")
    merge_folder(bases / "bfloat16", adapter, tmp_path / "out", dtype=torch.float32)
    got = load(tmp_path / "out")
    assert {parameter.dtype for parameter in got.parameters()} == {torch.float32}
    want = library(bases / "bfloat16", adapter, torch.float32)
    assert torch.equal(got.model.layers[1].mlp.up_proj.weight, want.model.layers[1].mlp.up_proj.weight)


def test_files_are_cut_as_the_input_and_what_stands_beside_comes_along(bases, tmp_path):
    adapter = adapter_folder(tmp_path / "adapter")
    seen = []
    done = merge_folder(bases / "bfloat16", adapter, tmp_path / "out", advance=lambda *step: seen.append(step))
    shards = {path.name for path in (bases / "bfloat16").glob("*.safetensors*")}
    assert {path.name for path in (tmp_path / "out").glob("*.safetensors*")} == shards
    ours, theirs = (json.loads((folder / INDEX).read_text()) for folder in (tmp_path / "out", bases / "bfloat16"))
    assert ours["weight_map"] == theirs["weight_map"]
    assert set(done.copied) == BESIDE | {"config.json", "generation_config.json"}
    assert seen[-1] == (done.bytes_before, done.bytes_before)
    assert done.bytes_after == done.bytes_before


def test_the_rounding_that_is_reported_is_the_rounding(bases, tmp_path):
    adapter = adapter_folder(tmp_path / "adapter", use_dora=True, target_modules=["q_proj", "up_proj"])
    done = merge_folder(bases / "bfloat16", adapter, tmp_path / "out")
    exact, got, base = (
        library(bases / "bfloat16", adapter, torch.float32),
        load(tmp_path / "out"),
        load(bases / "bfloat16"),
    )
    layers = [f"model.layers.{i}.{part}.weight" for i in (0, 1) for part in ("self_attn.q_proj", "mlp.up_proj")]
    sums = []
    for name in layers:
        e, g, b = (model.get_parameter(name).double() for model in (exact, got, base))
        sums.append([(g - e).square().sum().item(), e.square().sum().item(), (e - b).square().sum().item()])
    rounded, size, moved = (sum(column) for column in zip(*sums, strict=True))
    assert done.layers == 4
    assert done.rounding == pytest.approx(math.sqrt(rounded / size), rel=1e-4)
    assert done.lost == pytest.approx(math.sqrt(rounded / moved), rel=1e-4)
    worst = [math.sqrt(r / m) for r, _, m in sums]
    assert done.worst_lost == pytest.approx(max(worst), rel=1e-4)
    assert f"{done.worst}.weight" == layers[worst.index(max(worst))]
    assert 1e-4 < done.rounding < 2**-8


def test_an_adapter_that_does_nothing_loses_nothing(bases, tmp_path):
    model = fastlora.convert(llama(), r=2, quantize=None, progress=False)  # B is zero
    adapter = fastlora.save_adapter(model, tmp_path / "adapter")
    done = merge_folder(bases / "bfloat16", adapter, tmp_path / "out")
    assert (done.lost, done.worst_lost, done.rounding) == (0.0, 0.0, 0.0)
    same_parameters(load(tmp_path / "out"), load(bases / "bfloat16"))


# --- what is refused --------------------------------------------------------------------------------------------------


def spoil(file: Path, change) -> None:
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def key_of(part: str) -> str:
    return f"base_model.model.{Q1}.{part}"


def put(key: str, row: int, value: float):
    def change(tensors):
        tensors[key][row, 0] = value

    return change


def edit_json(file: Path, **fields) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def renamed(tensors) -> None:
    for key in [key for key in tensors if Q1 in key]:
        tensors[key.replace("layers.1", "layers.7")] = tensors.pop(key)


def cut_a(tensors) -> None:
    tensors[key_of("lora_A.weight")] = tensors[key_of("lora_A.weight")][:, :-1].contiguous()


def pissa(model: Path, adapter: Path) -> None:
    spoil(adapter / WEIGHTS, lambda tensors: None)  # without our metadata, which knows better
    edit_json(adapter / "adapter_config.json", init_lora_weights="pissa")


def moe(tensors) -> None:
    tensors["mixlora.layers.0.mlp.moe_gate.weight"] = torch.zeros(2, 32)


FAULTS = {
    "NaN in B": (
        lambda m, a: spoil(a / WEIGHTS, put(key_of("lora_B.weight"), 3, math.nan)),
        ShapeError,
        f"{Q1}.weight",
    ),
    "inf in A": (lambda m, a: spoil(a / WEIGHTS, put(key_of("lora_A.weight"), 1, math.inf)), ShapeError, "NaN or inf"),
    "NaN in W": (lambda m, a: spoil(m / SINGLE, put(f"{Q1}.weight", 5, math.nan)), ShapeError, "holds some"),
    "no such layer": (lambda m, a: spoil(a / WEIGHTS, renamed), StateDictError, "has no model.layers.7"),
    "another width": (lambda m, a: spoil(a / WEIGHTS, cut_a), StateDictError, r"fits a weight \(32, 31\)"),
    "another rank": (lambda m, a: edit_json(a / "adapter_config.json", r=5), StateDictError, "expected rank 5"),
    "half an adapter": (
        lambda m, a: spoil(a / WEIGHTS, lambda t: t.pop(key_of("lora_B.weight"))),
        StateDictError,
        "lora_B",
    ),
    "no magnitudes": (lambda m, a: edit_json(a / "adapter_config.json", use_dora=True), StateDictError, "missing"),
    "experts": (lambda m, a: spoil(a / WEIGHTS, moe), StateDictError, "mixture of experts"),
    "cut short": (lambda m, a: os.truncate(a / WEIGHTS, 5000), StateDictError, "damaged"),
    "model cut short": (lambda m, a: os.truncate(m / SINGLE, 9000), StateDictError, "damaged"),
    "no adapter": (lambda m, a: (a / "adapter_config.json").unlink(), FileNotFoundError, "no adapter_config.json"),
    "no weights": (lambda m, a: (a / WEIGHTS).unlink(), FileNotFoundError, f"no {WEIGHTS}"),
    "no model": (lambda m, a: shutil.rmtree(m), FileNotFoundError, "is no folder"),
    "pissa": (pissa, ConfigError, "'pissa' rewrote"),
    "unknown field": (lambda m, a: edit_json(a / "adapter_config.json", use_qalora=True), ConfigError, "use_qalora"),
}


@pytest.mark.parametrize(("fault", "error", "said"), FAULTS.values(), ids=FAULTS)
@pytest.mark.parametrize("earlier", [False, True], ids=["", "over an earlier result"])
def test_nothing_appears_when_it_fails(tmp_path, fault, error, said, earlier):
    model_folder(tmp_path / "in", None)
    adapter = adapter_folder(tmp_path / "adapter")
    if earlier:
        merge_folder(tmp_path / "in", adapter, tmp_path / "out")
    fault(tmp_path / "in", adapter)
    before = names(tmp_path), contents(tmp_path)
    with pytest.raises(error, match=said):
        merge_folder(tmp_path / "in", adapter, tmp_path / "out", overwrite=earlier)
    assert (names(tmp_path), contents(tmp_path)) == before


def test_an_adapter_of_another_name_is_found_by_the_error(tmp_path):
    """PEFT puts adapters that are not called "default" into a folder of their name."""
    model_folder(tmp_path / "in", None)
    adapter_folder(tmp_path / "adapters" / "french")
    with pytest.raises(FileNotFoundError, match=r"no adapter_config\.json in .*; there is one in .*adapters/french$"):
        merge_folder(tmp_path / "in", tmp_path / "adapters", tmp_path / "out")


def test_what_fp16_cannot_hold_is_refused(bases, tmp_path):
    adapter = adapter_folder(tmp_path / "adapter")
    spoil(adapter / WEIGHTS, lambda t: t[key_of("lora_B.weight")].mul_(1e6))
    with pytest.raises(ShapeError, match="too large for float16"):
        merge_folder(bases / "bfloat16", adapter, tmp_path / "out", dtype=torch.float16)
    merge_folder(bases / "bfloat16", adapter, tmp_path / "out")
    with pytest.raises(DtypeError, match="floating-point"):
        merge_folder(bases / "bfloat16", adapter, tmp_path / "other", dtype=torch.int8)


def test_a_head_that_is_tied_is_not_untied_in_silence(tmp_path):
    model_folder(tmp_path / "in", None, tied=True)
    adapter = adapter_folder(tmp_path / "adapter", modules_to_save=["lm_head"])
    with pytest.raises(StateDictError, match=r"its own lm_head\.weight, and .* has none"):
        merge_folder(tmp_path / "in", adapter, tmp_path / "out")


@pytest.mark.parametrize("place", ["in", "adapter", "adapter/out"])
def test_the_inputs_are_never_the_output(tmp_path, place):
    model_folder(tmp_path / "in", None)
    adapter = adapter_folder(tmp_path / "adapter")
    before = contents(tmp_path)
    with pytest.raises(FileExistsError, match="one folder or inside one another"):
        merge_folder(tmp_path / "in", adapter, tmp_path / place, overwrite=True)
    assert contents(tmp_path) == before


# --- memory -----------------------------------------------------------------------------------------------------------

MEASURE = """
import re, sys, torch
from pathlib import Path
def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024
before = peak()
from fastlora.nn.merge_folder import merge_folder
merge_folder(*sys.argv[1:4])
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="the system does not say how much memory is taken")
@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
def test_memory_does_not_grow_with_the_model(tmp_path, use_dora):
    """One layer of 8192 x 20480 in bf16 (336 MB) and an embedding of the same size."""
    n, k, r = 8192, 20480, 16
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "config.json").write_text('{"dtype": "bfloat16"}')
    weight = torch.full((n, k), 0.5, dtype=torch.bfloat16)
    save_file({"m.up.weight": weight, "m.embed.weight": weight.clone()}, tmp_path / "in" / SINGLE)
    adapter = {"lora_A.weight": torch.ones(r, k) / 64, "lora_B.weight": torch.ones(n, r)}
    if use_dora:
        adapter["lora_magnitude_vector"] = torch.ones(n)
    (tmp_path / "adapter").mkdir()
    save_file({f"base_model.model.m.up.{key}": t for key, t in adapter.items()}, tmp_path / "adapter" / WEIGHTS)
    fields = {"peft_type": "LORA", "r": r, "lora_alpha": r, "use_dora": use_dora, "target_modules": ["up"]}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(fields))
    command = [sys.executable, "-c", MEASURE, *(str(tmp_path / name) for name in ("in", "adapter", "out"))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    layer = weight.nbytes
    # The goal is 1.5 layers and 300 MB; a merge in pieces takes 50 to 110 MB, whatever the layer.
    assert int(done.stdout) < layer * 2 // 3 < 1.5 * layer + 300e6
    got = load_file(tmp_path / "out" / SINGLE)["m.up.weight"]
    want = 0.5 + r / 64 if not use_dora else 1 / math.sqrt(k)
    assert torch.allclose(got.float(), torch.tensor(want), rtol=2**-8)
