"""The benchmark of grouped layers: the launch budget, and that its machinery measures what it says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import block
from benchmarks.step_beside_peft import FLOOR, OURS, PEFT

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.slow
def test_kernels_of_a_llama_layer_stay_within_their_budget():
    """25 forward and 45 backward for the seven projections and SwiGLU of QLoRA without dropout."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.block_launches"], cwd=ROOT, env=environment, capture_output=True, timeout=300
    )
    assert done.returncode == 0, done.stderr.decode()
    found = json.loads(done.stdout)
    together, single = (found["settings"][name] for name in ("QLoRA", "QLoRA, one by one"))
    for way, most in found["budget"].items():
        assert together[way]["kernels"] <= most
        assert together[way]["kernels"] < single[way]["kernels"]
        assert together[way]["by_name"]["_merge_parts_kernel"] == 2
    # The seven base products each way are among what is counted.
    assert together["forward"]["by_name"]["aten::mm"] == 7
    assert together["backward"]["by_name"]["aten::mm"] + together["backward"]["by_name"]["aten::addmm_"] == 7


def test_tiny_run(tmp_path, capsys):
    paths = ["--json", str(tmp_path / "b.json"), "--png", str(tmp_path / "b.png")]
    asked = ["--tiny", "--models", "tinyllama", "--shapes", "8x64", "--rounds", "3", "--warm", "1"]
    assert block.main([*asked, *paths]) == 0
    report = json.loads((tmp_path / "b.json").read_text())
    assert report["mode"] == "tiny" and (tmp_path / "b.png").exists()
    assert [entry["setting"] for entry in report["results"]] == list(block.SETTINGS)
    for entry in report["results"]:
        assert set(entry["seconds"]) == {OURS, PEFT, FLOOR} and entry["rounds"] == 3
        assert entry["grouped"] == 12 and entry["layers"] == 14
        kept = entry["memory"]
        assert kept["adapters"][OURS] == kept[OURS] - kept[FLOOR]
        assert kept["ratio"] <= block.MEMORY_GOAL
        assert entry["parity"]["allowed"] >= 0.02
        # Two layers of q, o 64 x 64, k, v 64 x 32, gate, up, down 64 x 128, 16 tokens; the head of 96 on 14 targets.
        assert entry["products"]["flops"] == 4 * (16 * 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128) + 14 * 96 * 64)
        assert 0 < entry["products"]["share_of_frozen"] < 1
        assert entry["bound"] == entry["seconds"][PEFT] / entry["least_seconds"]
    assert "tinyllama 8x64 bf16" in capsys.readouterr().out


def test_the_bound_of_a_step():
    def entry(frozen, ours, peft):
        seconds = {FLOOR: frozen, OURS: ours, PEFT: peft}
        return {"compute": "float32", "seconds": seconds, "products": {"flops": 100.0, "share_of_frozen": 0.8}}

    # 2 of its 10 s frozen does not multiply, the rest at 12.5 flop/s; in the other setting we do at 100 / (7 - 2) = 20.
    results, rates = [entry(10.0, 12.0, 14.0), entry(10.0, 7.0, 14.0)], {"float32": 5.0}
    block.settle(results, rates)
    assert rates["float32"] == pytest.approx(20.0)
    assert [each["least_seconds"] for each in results] == pytest.approx([7.0, 7.0])
    assert [each["bound"] for each in results] == pytest.approx([2.0, 2.0])
    rates = {"float32": 50.0}
    block.settle(results, rates)
    assert [each["bound"] for each in results] == pytest.approx([3.5, 3.5])


def test_parity_fails_where_the_models_differ():
    model = block.tinyllama(tiny=True)
    ids = torch.randint(0, 96, (256,), generator=torch.Generator().manual_seed(0))
    (batch,) = block.cut(ids, (2, 8), 1)
    ours = block.build(block.tinyllama(tiny=True), torch.float32, batch.ids)
    peft = block.steps.build_peft(model, ours, torch.float32)
    assert block.parity(ours, peft, batch, torch.float32, None)["gradients_apart"] < 1e-5
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if "lora_B" in name:
                parameter.mul_(-30)
    with pytest.raises(RuntimeError, match="parity failed"):
        block.parity(ours, peft, batch, torch.float32, None)
    with pytest.raises(RuntimeError, match="parity failed: fp32 loss 9"):
        block.parity(ours, peft, batch, torch.bfloat16, (9.0, 0.0))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--threads", "0"], "at least 1"),
        (["--rounds", "0"], "at least 1"),
        (["--warm", "-1"], "at least 0"),
        (["--tiny"], "no measurement"),
        (["--models", "gpt"], "invalid choice: 'gpt'"),
        (["--shapes", "9x9"], "invalid choice"),
        (["--settings", "int8"], "invalid choice"),
    ],
)
def test_bad_arguments(arguments, said, capsys):
    with pytest.raises(SystemExit) as stopped:
        block.main(arguments)
    assert stopped.value.code == 2 and said in capsys.readouterr().err
