"""The AdaLoRA example runs as a user would start it; the benchmark's machinery works on a tiny model. Never speed."""

from __future__ import annotations

import copy
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from benchmarks import adalora as bench

pytest.importorskip("peft")
pytest.importorskip("bitsandbytes")

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.slow
@pytest.mark.parametrize("options", [(), ("--dense",)], ids=["nf4", "dense"])
def test_the_example_learns_and_saves_what_its_budget_left(options, tmp_path):
    command = [sys.executable, str(ROOT / "examples" / "adalora.py"), "--steps", "60", *options]
    environment = dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT))
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    losses = [float(value) for value in re.findall(r"loss ([\d.]+)", done.stdout)]
    assert losses[-1] < losses[0] - 1
    assert "budget 126 of 252 ranks" in done.stdout
    saved = load_file(tmp_path / "adalora-out" / "adapter_model.safetensors")
    assert sum(tensor.shape[0] for name, tensor in saved.items() if name.endswith("lora_E")) == 126


@pytest.fixture(scope="module")
def report():
    return bench.measure(bench.Options(steps=3, tokens=48, tiny=True))


def test_every_base_has_times_ratios_and_pefts_loss(report, tmp_path):
    assert [entry["base"] for entry in report["results"]] == ["dense", "nf4"]
    for entry in report["results"]:
        samples = entry["samples"]
        assert {name: len(values) for name, values in samples.items()} == dict.fromkeys(
            (bench.LORA, bench.ADALORA, bench.PEFT), 3
        )
        ratios = [b / a for a, b in zip(samples[bench.LORA], samples[bench.ADALORA], strict=True)]
        assert entry["adalora_over_lora"] == sorted(ratios)[1]
        assert entry["parity"]["loss"] == pytest.approx(entry["parity"]["loss_peft"], abs=1e-5)
        assert entry["parity"]["gradient_difference"] < 1e-4
    assert "8.6" in bench.table(report)
    bench.draw(report, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    json.dumps(report, allow_nan=False)


def test_another_adapter_fails_parity():
    plain = bench.llama(tiny=True)
    ours = bench.build(copy.deepcopy(plain), "dense", bench._adalora_config())
    peft = bench.build_peft(copy.deepcopy(plain), ours, "dense")
    ids = torch.arange(40)[None]
    batch = bench.Batch(ids, torch.ones_like(ids), ids)
    bench.parity(ours, peft, batch)
    for name, parameter in peft.named_parameters():
        if "lora_E" in name:
            parameter.data.mul_(-20)
    with pytest.raises(RuntimeError, match="parity failed"):
        bench.parity(ours, peft, batch)


def test_a_tiny_run_does_not_overwrite_results(capsys):
    with pytest.raises(SystemExit):
        bench.main(["--tiny"])
    assert "no measurement" in capsys.readouterr().err
