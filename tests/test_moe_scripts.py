"""The MixLoRA example runs as a user would start it; the benchmark's machinery works on tiny layers. Never speed."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from benchmarks import moe as bench
from benchmarks import moe_costs, moe_layers, moe_training
from benchmarks.moe_peer import Seconds
from fastlora import moe
from tests.model_tools import llama

ROOT = Path(__file__).resolve().parent.parent
NEEDS_PEER = pytest.mark.skipif(not moe_layers.PEER_PYTHON.is_file(), reason="moe-peft's environment is not set up")
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


def _example():
    spec = importlib.util.spec_from_file_location("mixlora_example", ROOT / "examples" / "mixlora.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
@pytest.mark.parametrize("options", [(), ("--dense",)], ids=["nf4", "dense"])
def test_the_example_learns_and_what_it_saves_loads(options, tmp_path):
    command = [sys.executable, str(ROOT / "examples" / "mixlora.py"), "--steps", "40", "--experts", "4", *options]
    environment = dict(os.environ, OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="", PYTHONPATH=str(ROOT))
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    losses = [float(value) for value in re.findall(r"step +\d+ +loss ([\d.]+)", done.stdout)]
    assert losses[-1] < losses[0] - 0.3
    assert "logits differ by 0.0e+00" in done.stdout
    saved = load_file(tmp_path / "mixlora-out" / "adapter_model.safetensors")
    assert len(saved) == 3 * (1 + 2 * 4 + 2 * 3 * 4)


def test_the_examples_trainer_shares_the_router_loss_out_over_accumulated_steps(tmp_path):
    """Two equal halves of an accumulated step make the update of one of them: neither loss counts twice."""
    from transformers import TrainingArguments

    example = _example()
    row = torch.arange(12).remainder(61)
    data = [{"input_ids": row, "labels": row, "attention_mask": torch.ones_like(row)}] * 2
    found = []
    for accumulated in (1, 2):
        fields = {"peft_type": "MIXLORA", "num_experts": 3, "r": 2, "init_seed": 0, "router_aux_loss_coef": 5.0}
        model = moe.convert(llama(), fields, progress=False)
        arguments = TrainingArguments(
            output_dir=tmp_path,
            max_steps=1,
            per_device_train_batch_size=1,
            gradient_accumulation_steps=accumulated,
            optim="sgd",
            learning_rate=1.0,
            max_grad_norm=0.0,
            lr_scheduler_type="constant",
            report_to=[],
            save_strategy="no",
            use_cpu=True,
            disable_tqdm=True,
        )
        before = model.model.layers[0].mlp.gate.weight.detach().clone()
        example.MixtureTrainer(model=model, args=arguments, train_dataset=data).train()
        found.append(model.model.layers[0].mlp.gate.weight.detach() - before)
    assert found[0].abs().max() > 1e-4
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-7)


@pytest.fixture(scope="module")
def counts():
    return {
        row["method"]: row for row in moe_costs.measure(moe_layers.TINY, tuple(moe_layers.methods(moe_layers.TINY)))
    }


def test_operations_are_counted(counts):
    """The reference backend masks: every one of 4 experts, for all of the 2 slots' rows, where the formula has 2."""
    sizes = moe_layers.TINY
    base, pair = 2 * 24 * 3 * 16 * 24, 2 * 24 * 2 * 3 * 3 * (16 + 24)
    mix = counts["MixLoRA"]
    assert mix["formula"]["base"] == base
    assert mix["formula"]["adapters"] == pair
    assert mix["formula"]["router"] == 2 * 24 * 16 * 4
    assert mix["issued"]["reference"]["forward"] > base + pair
    for row in counts.values():
        assert set(row["issued"]) <= set(moe_costs.BACKENDS)
        assert row["saved_bytes"] > sizes.tokens * sizes.hidden * 2
    for name in ("LoRAMoE", "MoLA"):
        assert counts[name]["issued_over_formula"]["reference"] == {"forward": 1.0, "backward": 1.0}


@pytest.mark.parametrize("name", moe_layers.methods(moe_layers.TINY))
def test_the_layer_is_what_its_weights_say(name):
    """A peer written down here: every expert for every token, weighted."""
    fields = moe_layers.methods(moe_layers.TINY)[name]
    tensors = moe_layers.tensors_for(fields, moe_layers.TINY)
    ours = moe_layers.Ours(fields, tensors)
    _, found = ours.step()
    linears = [n.removeprefix("base.") for n in tensors if n.startswith("base.")]
    assert found.keys() == {"y", "dx", "d.gate", *(f"d.{n}.lora_{x}" for n in linears for x in "AB")}
    p = (tensors["x"] @ tensors["gate"].T).softmax(-1)
    s = fields["lora_alpha"] / fields["r"]

    def projection(x, linear, expert):
        a, b = tensors[f"{linear}.lora_A"][expert], tensors[f"{linear}.lora_B"][expert]
        return x @ tensors[f"base.{linear}"].T + s * x @ a.T @ b.T

    if fields["peft_type"] != "MIXLORA":
        if fields["peft_type"] == "MOLA":
            top, chosen = p.topk(2, -1)
            p = torch.zeros_like(p).scatter(-1, chosen, top / top.sum(-1, keepdim=True))
        (linear,) = linears
        base = tensors["x"] @ tensors[f"base.{linear}"].T
        want = base + sum(p[..., e, None] * (projection(tensors["x"], linear, e) - base) for e in range(4))
        torch.testing.assert_close(found["y"], want, rtol=1e-4, atol=1e-5)
    elif name == "MixLoRA":
        top, chosen = p.topk(2, -1)
        p = torch.zeros_like(p).scatter(-1, chosen, top / top.sum(-1, keepdim=True))
        want = torch.zeros_like(tensors["x"])
        for e in range(4):
            gate, up = (projection(tensors["x"], n, e) for n in PROJECTIONS[:2])
            hidden = torch.nn.functional.silu(gate) * up
            want += p[..., e, None] * projection(hidden, "down_proj", e)
        torch.testing.assert_close(found["y"], want, rtol=1e-4, atol=1e-5)


@NEEDS_PEER
@pytest.mark.slow
def test_moe_peft_beside_us(tmp_path):
    row = bench.beside_peer("MixLoRA", moe_layers.TINY, threads=1, rounds=5, budget=0.1)
    assert row["parity"]["ok"], row
    assert row["rounds"] == 5
    pairs = list(zip(row["samples"]["fastlora"], row["samples"]["moe-peft"], strict=True))
    assert row["peer_over_fastlora"] == sorted(theirs.wall / ours.wall for ours, theirs in pairs)[2]
    assert row["peer_over_fastlora_cpu"] == sorted(theirs.cpu / ours.cpu for ours, theirs in pairs)[2]
    fields = moe_layers.methods(moe_layers.TINY)["LoRAMoE"]
    with (
        pytest.raises(RuntimeError, match="process ended: .*num_experts"),
        moe_layers.Peer({k: v for k, v in fields.items() if k != "num_experts"}, {"x": torch.ones(1)}, 1, tmp_path),
    ):
        pass


def test_other_results_get_no_ratio(monkeypatch):
    """Neither without the peer's environment nor with a peer that computes something else."""
    missing = ROOT / "build" / "no-such-venv" / "python"
    monkeypatch.setattr(moe_layers, "PEER_PYTHON", missing)
    row = bench.beside_peer("MoLA", moe_layers.TINY, threads=1, rounds=2, budget=0.1)
    assert row["peer_over_fastlora"] is None
    assert "make bench-moe" in row["reason"]
    assert bench.peer_bytes("MoLA", moe_layers.TINY) is None

    class Other:
        def __init__(self, fields, tensors, *_):
            self.ours = moe_layers.Ours(fields, tensors)

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def outputs(self):
            return {name: tensor * 1.001 for name, tensor in self.ours.step()[1].items()}

        def seconds(self):
            return Seconds(1e-9, 1e-9)

    monkeypatch.setattr(bench, "Peer", Other)
    row = bench.beside_peer("MoLA", moe_layers.TINY, threads=1, rounds=2, budget=0.1)
    assert row["parity"]["ok"] is False
    assert (row["peer_over_fastlora"], row["goal_met"]) == (None, None)


def test_training_on_a_tiny_model_and_the_report(counts, tmp_path):
    results = moe_training.measure(steps=8, tiny=True)
    assert [row["method"] for row in results["methods"]] == ["MixLoRA", "LoRAMoE", "MoLA"]
    for row in results["methods"]:
        assert moe_training.falls(row)
        assert row["losses"][-1] < row["losses"][0]
        assert row["reloaded"] == {"largest_difference": 0.0, "same_tokens": True}
        assert [sum(layer) for layer in row["load"]] == pytest.approx([1.0, 1.0])
        assert all(loss > 0 for loss in row["router_losses"])
    for row in counts.values():
        row["peer_saved_bytes"] = None
    report = {"mode": "tiny", "counts": {"results": list(counts.values())}, "training": {"results": results}}
    text = bench.table(report)
    assert text.count("same tokens") == 3
    bench.draw(report, tmp_path / "moe.png")
    assert (tmp_path / "moe.png").read_bytes().startswith(b"\x89PNG")
    json.dumps(report, allow_nan=False)


def test_parts_that_are_not_asked_for_stay_as_they_are(tmp_path, monkeypatch):
    seen = []

    def run_part(part, options, before):
        seen.append((part, before))
        return {"results": [part]}

    monkeypatch.setattr(bench, "run_part", run_part)
    monkeypatch.setattr(bench, "table", lambda report: "")
    monkeypatch.setattr(bench, "draw", lambda report, path: None)
    path = tmp_path / "moe.json"
    path.write_text(json.dumps({"speed": {"results": "old"}, "counts": {"results": "older"}}))
    files = ["--json", str(path), "--png", str(tmp_path / "moe.png")]
    assert bench.main([*files, "--tiny", "--part", "counts"]) == 0
    report = json.loads(path.read_text())
    assert (report["speed"], report["counts"]) == ({"results": "old"}, {"results": ["counts"]})
    assert report["mode"] == "tiny" and set(report["goals"]) == {"speed", "flops", "saved_bytes"}
    assert bench.main([*files, "--tiny"]) == 0  # all parts: nothing of the file is read
    assert seen == [("counts", {"results": "older"}), *((part, None) for part in bench.PARTS)]


def test_a_tiny_run_does_not_overwrite_results(capsys):
    with pytest.raises(SystemExit):
        bench.main(["--tiny"])
    assert "no measurement" in capsys.readouterr().err
