"""The examples run as a user would start them, and what they save loads again."""

from __future__ import annotations

import os
import pathlib
import re
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

EXAMPLES = pathlib.Path(__file__).resolve().parent.parent / "examples"
BIN = pathlib.Path(sys.executable).parent
ACCELERATE = [str(BIN / "accelerate"), "launch", "--num_machines", "1", "--mixed_precision", "no"]
ACCELERATE += ["--dynamo_backend", "no", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
PLAIN = [sys.executable]

# Elsewhere: sft_trainer.py in test_accelerate_trainer.py, adalora.py in test_adalora_scripts.py.
pytestmark = pytest.mark.slow
distributed = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="torch has no gloo here")


def run(command: list[str], script: str, folder: pathlib.Path, *options: str) -> str:
    """Start it in an empty folder; what it printed."""
    environment = dict(os.environ, OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="", PYTHONPATH=str(EXAMPLES.parent))
    done = subprocess.run(
        [*command, str(EXAMPLES / script), *options],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def losses(printed: str) -> list[float]:
    return [float(value) for value in re.findall(r"loss ([\d.]+)", printed)]


@pytest.mark.parametrize("options", [(), ("--dora", "--dense")], ids=["qlora", "dora"])
def test_plain_loop(options, tmp_path):
    printed = run(PLAIN, "plain_loop.py", tmp_path, "--steps", "60", *options)
    found = losses(printed)
    assert found[-1] < 0.85 * found[0]
    loaded, merged = (float(value) for value in re.findall(r"differ by ([\d.e+-]+)", printed))
    assert loaded == 0.0
    assert merged < 1e-5
    saved = load_file(tmp_path / "adapter-out" / "adapter_model.safetensors")
    assert len(saved) == 3 * (2 + ("--dora" in options))


def test_many_adapters(tmp_path):
    printed = run(PLAIN, "many_adapters.py", tmp_path, "--steps", "100")
    errors = re.findall(r"error ([\d.]+) -> ([\d.]+)", printed)
    assert len(errors) == 3
    assert all(float(after) < 0.95 * float(before) for before, after in errors)
    assert float(re.findall(r"differ by ([\d.e+-]+)", printed)[0]) < 1e-5
    saved = {path.name for path in (tmp_path / "adapters-out").iterdir()}
    assert saved == {"reverse", "negate", "shift"}


@pytest.mark.parametrize("options", [("--four-bit",), ("--dora",), ("--plain",)], ids=" ".join)
def test_peft_trainer(options, tmp_path):
    for package in ("peft", "transformers", "bitsandbytes"):
        pytest.importorskip(package)
    printed = run(PLAIN, "peft_trainer.py", tmp_path, "--steps", "15", *options)
    assert ("28 of 28 layers fused" in printed) == ("--plain" not in options)
    found = [float(value) for value in re.findall(r"'loss': '?([\d.]+)", printed)]
    assert len(found) == 3
    assert found[-1] < found[0] - 0.1


@distributed
@pytest.mark.parametrize(
    ("command", "options"), [(TORCHRUN, ()), (ACCELERATE, ("--ddp",))], ids=["torchrun-fsdp2", "accelerate-ddp"]
)
def test_train_fsdp2(command, options, tmp_path):
    if command is ACCELERATE:
        pytest.importorskip("accelerate")
    printed = run(command, "train_fsdp2.py", tmp_path, "--steps", "40", *options)
    found = losses(printed)
    assert "of 2" in printed
    assert found[-1] < found[0]
    saved = load_file(tmp_path / "adapter-out" / "adapter_model.safetensors")
    assert len(saved) == 8 * 3  # eight linear layers: A, B and the magnitude


@distributed
@pytest.mark.parametrize("command", [PLAIN, ACCELERATE], ids=["python", "accelerate"])
def test_train_accelerate(command, tmp_path):
    pytest.importorskip("accelerate")
    printed = run(command, "train_accelerate.py", tmp_path)
    found = losses(printed)
    assert f"on {1 if command is PLAIN else 2} process(es)" in printed
    assert found[-1] < 0.8 * found[0]
    assert len(load_file(tmp_path / "adapter-out" / "adapter_model.safetensors")) == 2 * 2
