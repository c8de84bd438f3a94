"""The commands as a user starts them: what they print, what they leave, and one clear line where they cannot."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastlora
from fastlora.cli import _roofline, bench, main, tune
from fastlora.dispatch import tuning
from tests.folder_tools import adapter_folder, load, model_folder, same_parameters
from tests.model_tools import contents

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with a model and an adapter, and the user in it."""
    model_folder(tmp_path / "model", beside=False)
    adapter_folder(tmp_path / "adapter", use_dora=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def ran(capsys, *arguments: str) -> str:
    assert main.run(arguments) == 0, capsys.readouterr().err
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return captured.out


def refused(capsys, *arguments: str, code: int = 1) -> str:
    assert main.run(arguments) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("fastlora: ")
    assert captured.err.count("\n") == 1
    return captured.err


def found(capsys, *arguments: str) -> dict:
    return json.loads(ran(capsys, *arguments, "--json"))


# --- quantize, merge, convert -----------------------------------------------------------------------------------------


def test_quantize_then_merge(place, capsys):
    pytest.importorskip("bitsandbytes")
    said = ran(capsys, "quantize", "model", "small")
    assert "14 linears in nf4, lm_head left as they were" in said
    assert "kept in small, with config.json, generation_config.json" in said
    said = ran(capsys, "merge", "small", "adapter", "merged")
    assert "DoRA of rank 4 merged into 14 layers, 14 of them 4-bit; now bfloat16" in said
    assert "rounding changed the merged weights by" in said
    want = fastlora.merge_and_unload(fastlora.load_adapter(load(place / "small"), "adapter"))
    same_parameters(load(place / "merged"), want)
    assert sorted(path.name for path in place.iterdir()) == ["adapter", "merged", "model", "small"]


def test_json_says_the_same(place, capsys):
    pytest.importorskip("bitsandbytes")
    small = found(capsys, "quantize", "model", "small", "--quant", "fp4", "--no-double-quant", "--exclude", "v_proj")
    assert (small["layers"], small["output"]) == (12, "small")
    assert {"lm_head", "model.layers.1.self_attn.v_proj"} <= set(small["kept"])
    merged = found(capsys, "merge", "small", "adapter", "merged", "--dtype", "fp16")
    assert (merged["layers"], merged["quantized"], merged["dtypes"]) == (14, 12, ["float16"])
    assert 0 < merged["rounding"] < merged["lost"] < merged["worst_lost"] < 1
    assert merged["seconds"] > 0
    if Path("/proc/self/status").is_file():
        assert merged["peak_memory_bytes"] > 50e6
    plain = found(capsys, "convert", "adapter", "plain", "--to", "plain")
    assert (plain["method"], plain["source"], plain["tensors"]) == ("DoRA", "peft", 42)


def test_a_faint_adapter_is_warned_about(place, capsys):
    model = fastlora.load_adapter(load(place / "model").float(), "adapter")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.mul_(1e-4)
            if "lora_magnitude" in name:
                parameter.copy_(model.get_submodule(name.partition(".lora_magnitude")[0]).weight_norm("default"))
    fastlora.save_adapter(model, "faint")
    said = ran(capsys, "merge", "model", "faint", "merged")
    assert "the adapter is hardly more than that rounding: --dtype fp32 keeps it" in said
    assert "hardly more" not in ran(capsys, "merge", "model", "faint", "wide", "--dtype", "fp32")


def test_convert_says_what_is_lost(place, capsys):
    said = ran(capsys, "convert", "adapter", "moe", "--to", "moe-peft")
    assert "DoRA from peft to moe-peft: 42 tensors of 14 modules" in said
    assert "note: MoE-PEFT does not read DoRA's magnitudes" in said
    assert "kept in moe: adapter_model.bin, adapter_config.json" in said


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["quantize", "nowhere", "out"], "nowhere is no folder"),
        (["quantize", "adapter", "out"], "has neither model.safetensors"),
        (["quantize", "model", "model"], "one folder or inside one another"),
        (["quantize", "model", "adapter"], "holds files, but no config.json"),
        (["quantize", "model", "out", "--quant", "int8"], "'int8'; known: nf4, fp4"),
        (["quantize", "model", "out", "--blocksize", "100"], "100"),
        (["quantize", "model", "out", "--compute-dtype", "int4"], "'int4'; known: bf16"),
        (["quantize", "model", "no/such"], "expected an existing one"),
        (["merge", "model", "nowhere", "out"], "nowhere is no folder"),
        (["merge", "adapter", "model", "out"], "has neither model.safetensors"),
        (["merge", "model", "model", "out"], "no adapter_config.json in model"),
        (["merge", "model", "adapter", "out", "--dtype", "int4"], "'int4'; known: bf16"),
        (["convert", "nowhere", "out"], "nowhere is no folder"),
        (["convert", "model", "out"], "no adapter_config.json in model"),
        (["convert", "adapter", "out", "--to", "onnx"], "'onnx'; known: peft, moe-peft, plain"),
        (["tune", "-n", "0", "-k", "8"], "n must be at least 1, got 0"),
        (["tune", "-n", "8", "-k", "8", "-m", "0"], "m must be at least 1, got 0"),
        (["tune", "-n", "8", "-k", "8", "--dropout", "1"], "dropout must be in [0, 1), got 1.0"),
        (["bench", "--size", "100"], "multiple of 64, got 100"),
        (["bench", "--dtype", "fp64"], "'fp64'; known: bf16, fp16, fp32"),
        (["bench", "--output", "no/such.png"], "in a folder that exists"),
        (["bench", "--output", "model"], "expected a file"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_errors_are_one_line_and_leave_nothing(place, capsys, arguments, said):
    before = contents(place)
    assert said in refused(capsys, *arguments)
    assert contents(place) == before
    assert sorted(path.name for path in place.iterdir()) == ["adapter", "model"]


@pytest.mark.parametrize("arguments", [["quantize", "model"], ["merge", "model", "adapter"], ["convert"], ["tune"]])
def test_what_is_missing_is_wrong_usage(place, capsys, arguments):
    assert "see fastlora --help" in refused(capsys, *arguments, code=2)


def test_an_earlier_result_is_replaced_only_when_asked(place, capsys):
    ran(capsys, "merge", "model", "adapter", "merged")
    before = contents(place / "merged")
    assert "--overwrite" in refused(capsys, "merge", "model", "adapter", "merged", "--dtype", "fp32")
    assert contents(place / "merged") == before
    ran(capsys, "merge", "model", "adapter", "merged", "--dtype", "fp32", "--overwrite")
    assert contents(place / "merged") != before


def test_nothing_heavy_is_imported_to_refuse():
    code = """
import sys
from fastlora.cli import main
for line in ("quantize --help", "merge --help", "merge a b c", "quantize a b", "convert a b", "bench --size 3"):
    assert main.run(line.split()) in (0, 1)
    assert "torch" not in sys.modules, line
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.returncode == 0, done.stderr


# --- tune -------------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_tune_without_a_gpu_says_so(capsys):
    said = refused(capsys, "tune", "-n", "64", "-k", "64")
    assert "no GPU here" in said and "--device cpu" in said


def test_tune_measures_remembers_and_knows_again(tmp_path, monkeypatch, capsys):
    """On the CPU, with no candidate left out as hopeless: the compiled plans and the reference."""
    from fastlora import backends, settings
    from fastlora.dispatch import registry

    backends.load()
    if not any(kernel.backend == "cpu" and not kernel.limits.missing() for kernel in registry.kernels("lora_fwd")):
        pytest.skip("the CPU library is not built")
    monkeypatch.setattr(registry, "_HOPELESS", 1e9)
    monkeypatch.setattr(registry, "_selected", {})
    monkeypatch.setattr(tuning, "tuner", tuning.Tuner())
    cache = tmp_path / "tuning.json"
    command = ["tune", "-n", "64", "-k", "96", "-r", "4", "-m", "8", "-m", "32", "--quant", "nf4", "--device", "cpu"]
    command += ["--dtype", "fp32"]
    with settings.override(tune_cache=str(cache)):
        first = found(capsys, *command)
        assert first["file"] == str(cache) and cache.is_file()
        again = found(capsys, *command)
        said = ran(capsys, *command)
    rows = first["choices"]
    assert rows and all(row["new"] for row in rows)
    assert {row["m"] for row in rows} == {8, 32}
    assert {row["what"].split()[0] for row in rows} >= {"lora_fwd", "lora_bwd"}
    for row in rows:
        assert len(row["seconds"]) >= 2
        assert row["choice"] == min(row["seconds"], key=row["seconds"].get)
    assert [row | {"new": True} for row in again["choices"]] == rows
    assert not any(row["new"] for row in again["choices"])
    assert "known before" in said and "FASTLORA_TUNE=1" in said


def test_a_broken_tuning_file_is_no_obstacle(tmp_path, monkeypatch):
    from fastlora import settings

    for text in ("{", "[]", '{"choices": 3}', "null"):
        (tmp_path / "t.json").write_text(text)
        monkeypatch.setattr(tuning, "tuner", tuning.Tuner())
        with settings.override(tune_cache=str(tmp_path / "t.json")):
            assert tune.remembered() == {}


# --- bench ------------------------------------------------------------------------------------------------------------


def test_bench_draws_what_it_measures(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(_roofline, "_COPY", 1 << 20)
    monkeypatch.setattr(_roofline, "_MATRIX", 64)
    monkeypatch.setattr(_roofline, "TOKENS", (1, 8, 64))
    facts = found(capsys, "bench", "--size", "128", "--device", "cpu", "--output", str(tmp_path / "x.png"))
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
    assert facts["picture"] == str(tmp_path / "x.png")
    points = facts["points"]
    assert [point["kind"] for point in points] == [*_roofline.KINDS] * 3
    for point in points:
        assert point["seconds"] > 0, point
        # The roof is the best anybody reached, so nobody stands above it.
        assert point["seconds"] >= 0.999 * point["roof_seconds"], point
    frozen = next(point for point in points if point["kind"] == _roofline.FROZEN and point["tokens"] == 64)
    assert frozen["flops"] == 2 * 2 * 64 * 128 * 128
    said = ran(capsys, "bench", "--size", "128", "--device", "cpu", "--output", str(tmp_path / "x.png"))
    assert "QLoRA (NF4)" in said and "of the roof" in said


def test_bench_shows_no_time_for_a_wrong_result(monkeypatch):
    monkeypatch.setattr(_roofline, "judge", lambda *_: ["y: too far off"])
    monkeypatch.setattr(_roofline, "TOKENS", (1, 8))
    rows = list(_roofline.points(128, torch.float32, "cpu", float("inf")))
    for point in rows:
        assert (point.seconds is None) == (point.kind != _roofline.FROZEN), point
        assert point.kind == _roofline.FROZEN or "error budget: y: too far off" in point.why


def test_bench_ends_in_time():
    rows = list(_roofline.points(128, torch.float32, "cpu", 0.0))
    assert {point.why for point in rows} == {"no time left"}
    assert bench.SECONDS < 60


# --- the shell --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion(shell):
    environment = dict(os.environ, _FASTLORA_COMPLETE=f"complete_{shell}", PYTHONPATH=str(ROOT))
    environment |= {"COMP_WORDS": "fastlora q", "COMP_CWORD": "1", "_TYPER_COMPLETE_ARGS": "fastlora q"}
    environment |= {"_TYPER_COMPLETE_FISH_ACTION": "get-args", "TERM": "dumb"}
    command = [sys.executable, "-m", "fastlora"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert "quantize" in done.stdout, (done.stdout, done.stderr)
    assert "merge" not in done.stdout
    assert done.stderr == ""


def test_the_completion_script_is_shown():
    environment = dict(os.environ, _TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION="1", PYTHONPATH=str(ROOT))
    command = [sys.executable, "-m", "fastlora", "--show-completion", "bash"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0
    assert "_FASTLORA_COMPLETE=complete_bash" in done.stdout


def test_no_name_is_left_out():
    commands = {command.name for command in main.app.registered_commands}
    assert commands == {"demo", "env", "explain", "tune", "bench", "quantize", "merge", "convert"}
