"""The machinery of benchmarks/many_adapters.py on small layers: parity, turns, ratios, files. Never speed."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import many_adapters as bench

pytest.importorskip("peft")

TINY = bench.Options(rounds=3, sizes=(64,), compute=("fp32",), adapters=3, tiny=True)


@pytest.fixture(scope="module")
def report():
    pytest.importorskip("bitsandbytes")
    return bench.measure(TINY)


def test_every_setting_is_there_and_right(report):
    found = [(row["base"], row["mode"]) for row in report["results"]]
    assert found == [("dense", "eval"), ("dense", "train"), ("nf4", "eval"), ("nf4", "train")]
    for row in report["results"]:
        assert row["rounds"] == 3
        right = bool(row["parity"] and row["parity"]["ok"])
        assert right or row["base"] == "nf4", row  # where bitsandbytes computes in bf16, or refuses
        assert (row["peft_over_fastlora"] is not None) == right
        assert row["parity"] or "PEFT raises" in row["reason"]
    gradients = report["results"][1]["parity"]["errors"]
    assert set(gradients) == {"y", "dx", "lora_A", "lora_B"}
    json.dumps(report, allow_nan=False)


def test_a_wrong_result_gets_no_ratio():
    times = {bench.OURS: [1.0, 2.0], bench.ONE: [1.0, 1.0], bench.PEFT: [8.0, 8.0]}
    right = {"y": torch.ones(3)}
    wrong = {"y": torch.tensor([1.0, 1.0, 1.1])}
    good, bad = bench.parity(right, right, 1e-5), bench.parity(wrong, right, 1e-5)
    assert (good["ok"], bad["ok"]) == (True, False)
    assert bench.parity(right, right | {"dx": right["y"]}, 1e-5)["ok"] is False
    assert bench.entry("eval", times, good, "")["peft_over_fastlora"] == 6.0
    assert bench.entry("eval", times, good, "")["one_over_fastlora"] == 0.75
    assert bench.entry("eval", times, good, "")["goals_met"] == {bench.PEFT: True, bench.ONE: False}
    assert bench.entry("eval", times, bad, "")["peft_over_fastlora"] is None


def test_the_table_names_what_lost(report):
    times = {bench.OURS: 2.0, bench.ONE: 1.9, bench.PEFT: 1.0}
    goals = {bench.PEFT: False, bench.ONE: True}
    row = dict(report["results"][0], milliseconds=times, peft_over_fastlora=0.5, goals_met=goals)
    text = bench.table({**report, "results": [row]})
    assert "SLOWER than PEFT" in text
    assert f"goal missed against: {bench.PEFT}" in text


def test_files(report, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench, "measure", lambda options: report)
    where = ["--json", str(tmp_path / "m.json"), "--png", str(tmp_path / "m.png")]
    assert bench.main(["--tiny", *where]) == 0
    assert json.loads((tmp_path / "m.json").read_text())["mode"] == "tiny"
    assert "parity" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        bench.main(["--tiny"])
