"""The whole-model step benchmark's machinery on a tiny model: parity, turns, ratios, files. Never speed."""

from __future__ import annotations

import copy
import json

import pytest
import torch

from benchmarks import picture
from benchmarks import step_beside_peft as bench
from benchmarks.cpu_report import RESULTS

pytest.importorskip("transformers")
pytest.importorskip("peft")
pytest.importorskip("bitsandbytes")

TINY = bench.Options(steps=3, tiny=True)


@pytest.fixture(scope="module")
def model_and_batches():
    return bench._tiny()


@pytest.fixture(scope="module")
def report():
    return bench.measure(TINY)


def test_every_setting_has_times_and_ratios_of_its_own_samples(report):
    assert [(entry["compute"], entry["dropout"]) for entry in report["results"]] == [
        (compute, p) for compute in ("fp32", "bf16") for p in bench.DROPOUTS
    ]
    for entry in report["results"]:
        ours, theirs = entry["samples"]["fastlora"], entry["samples"]["peft"]
        assert len(ours) == len(theirs) == entry["rounds"] == TINY.steps
        assert sorted(ours)[1] == entry["seconds"]["fastlora"] > 0
        assert entry["peft_over_fastlora"] == sorted(b / a for a, b in zip(ours, theirs, strict=True))[1]
    assert report["adapter"]["layers"] == 14


def test_fp32_losses_and_gradients_are_pefts(report):
    found = report["results"][0]["parity"]
    assert found["loss"] == pytest.approx(found["loss_peft"], abs=1e-4)
    assert found["gradient_difference"] < 1e-4
    assert found["adapters"] == 2 * 14


@pytest.mark.parametrize("p", [0.0, 0.5])
def test_another_adapter_fails_parity(model_and_batches, p):
    model, batches = model_and_batches
    ours = bench.build_ours(copy.deepcopy(model), torch.float32, lora_dropout=p)
    peft = bench.build_peft(copy.deepcopy(model), ours, torch.float32)
    bench.parity(ours, peft, batches[0], torch.float32)
    for name, parameter in peft.named_parameters():
        if "lora_B" in name:
            parameter.data.mul_(-20)
    with pytest.raises(RuntimeError, match="parity failed"):
        bench.parity(ours, peft, batches[0], torch.float32)


def test_a_step_trains_the_adapter_and_nothing_else(model_and_batches):
    model, batches = model_and_batches
    ours = bench.build_ours(copy.deepcopy(model), torch.float32)
    before = {name: value.clone() for name, value in ours.state_dict().items()}
    step = bench.trainer(ours, torch.float32)
    losses = [step(batches[0]) for _ in range(20)]
    assert losses[-1] < losses[0]
    changed = {name for name, value in ours.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {name for name in before if ".lora_" in name}


def test_files_and_table(tmp_path, capsys):
    files = [tmp_path / "out.json", tmp_path / "out.png"]
    arguments = ["--tiny", "--steps", "1", "--compute", "fp32", "--dropout", "0.1"]
    assert bench.main([*arguments, "--json", str(files[0]), "--png", str(files[1])]) == 0
    report = json.loads(files[0].read_text())
    assert report["mode"] == "tiny"
    assert [entry["dropout"] for entry in report["results"]] == [0.1]
    assert files[1].read_bytes().startswith(b"\x89PNG")
    assert "parity fp32" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["--tiny"], ["--steps", "0"], ["--dropout", "1"], ["--compute", "int8"]])
def test_bad_arguments_are_refused(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        bench.main(arguments)
    assert stopped.value.code == 2
    assert "error" in capsys.readouterr().err


def test_results_say_what_they_were_measured_on():
    path = RESULTS / "step_beside_peft.json"
    if not path.is_file():
        pytest.skip("not measured yet")
    report = json.loads(path.read_text())
    assert (report["schema"], report["mode"], report["model"]) == (bench.SCHEMA, "cpu", "SmolLM2-135M")
    assert report["adapter"]["layers"] == 210
    for entry in report["results"]:
        assert abs(entry["parity"]["loss"] - entry["parity"]["loss_peft"]) <= bench.LOSS_BUDGET


def test_bf16_losses_are_held_to_the_fp32_one():
    assert bench.near_fp32([2.05, 1.97], (2.0, 0.02))["allowed"] == pytest.approx(0.06)
    assert bench.near_fp32([2.019], (2.0, 0.0))["allowed"] == bench.LEAST
    for losses in ([2.07, 2.0], [2.0, 1.93], [float("nan"), 2.0]):
        with pytest.raises(RuntimeError, match="parity failed: fp32 loss 2.0000"):
            bench.near_fp32(losses, (2.0, 0.02))


# --- the README's picture ---------------------------------------------------------------------------------------------


def test_picture_shows_what_the_results_hold(report, tmp_path):
    layers = json.loads((RESULTS / "cpu.json").read_text())
    for dtype in ("fp32", "bf16"):
        bars = picture.layer_bars(layers, dtype)
        assert len(bars) == len(picture.LAYERS)
        for bar, (case, _) in zip(bars, picture.LAYERS, strict=True):
            known = {(entry["suite"], entry["case"]): entry for entry in layers["summary"]}[
                ("layers", f"{case}-{dtype}")
            ]
            times = known["ms"]
            assert bar.ours == pytest.approx(times["fastlora"] / times["linear"], rel=2e-3)
            assert bar.peft == pytest.approx(times[known["best_peft"]] / times["linear"], rel=5e-3)
    names = [bar.name.split(", ")[:2] for bar in picture.model_bars(report)]
    assert names == [["SmolLM2-135M", "fp32"], ["SmolLM2-135M", "bf16"]]
    picture.draw(layers, report, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
