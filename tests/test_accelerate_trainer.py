"""transformers' Trainer on an accelerated model: no special code, the losses of PEFT's own, exact resume."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainerCallback, TrainingArguments

import fastlora
from benchmarks.adoption_runs import with_our_masks
from tests.accelerate_tools import LINEARS, adapted, batch, llama

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft", "ignore::UserWarning:torch")


class Stop(TrainerCallback):
    """Ends the run after some steps, as an interrupted one."""

    def __init__(self, after: int) -> None:
        self.after = after

    def on_step_end(self, args: Any, state: Any, control: Any, **keywords: Any) -> None:
        control.should_training_stop = state.global_step >= self.after


def trainer(model: Any, folder: Path, stop: int | None = None, **fields: Any) -> Trainer:
    rows = [{"input_ids": row, "labels": row} for step in range(8) for row in batch(step)]
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=8,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        logging_steps=1,
        save_strategy="steps",
        save_steps=4,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        seed=3,
        **fields,
    )
    callbacks = [Stop(stop)] if stop else []
    return Trainer(model, arguments, train_dataset=rows, callbacks=callbacks)  # type: ignore[arg-type]


def losses(run: Trainer) -> list[float]:
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


def tensors(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("quant", ["", "nf4"])
@pytest.mark.parametrize("fields", [{}, {"gradient_checkpointing": True, "bf16": True}], ids=["plain", "bf16"])
def test_the_losses_are_pefts(quant, fields, tmp_path):
    """Under bf16 autocast both round everything to 8 bits, each in its own order."""
    runs = []
    for accelerated in (False, True):
        model = adapted(llama(quant=quant), lora_dropout=0.1)
        model = fastlora.accelerate(model) if accelerated else with_our_masks(model)
        run = trainer(model, tmp_path / str(accelerated), **fields)
        run.train()
        runs.append(losses(run))
    assert fastlora.report(model).left == {}
    assert len(runs[1]) == 8
    assert runs[1] == pytest.approx(runs[0], abs=2e-2 if fields else 2e-5)
    assert runs[1][-1] < runs[1][0] - 0.5


@pytest.mark.parametrize("quant", ["", "nf4"])
def test_a_resumed_run_goes_on_as_if_uninterrupted(quant, tmp_path):
    """Dropout included: bit for bit. The checkpoint holds the adapter only."""

    def model() -> Any:
        return fastlora.accelerate(adapted(llama(quant=quant), lora_dropout=0.1, use_dora=True))

    whole = trainer(model(), tmp_path / "whole")
    whole.train()
    first = trainer(model(), tmp_path / "parts", stop=4)
    first.train()
    saved = tmp_path / "parts" / "checkpoint-4"
    assert (saved / "adapter_model.safetensors").exists()
    assert not (saved / "model.safetensors").exists()
    second = trainer(model(), tmp_path / "parts")
    second.train(resume_from_checkpoint=str(saved))
    assert losses(first) == losses(whole)[:4]
    assert losses(second) == losses(whole)
    want, got = tensors(whole.model), tensors(second.model)
    assert want.keys() == got.keys()
    assert all(torch.equal(want[name], got[name]) for name in want)


def test_a_registered_config_trains(tmp_path):
    """The model is built after `register`, as SFTTrainer(peft_config=...) does."""
    config = fastlora.register(LoraConfig(r=4, target_modules=LINEARS))
    run = trainer(get_peft_model(llama(), config), tmp_path)
    run.train()
    assert len(fastlora.report(run.model).fused) == 14
    assert losses(run)[-1] < losses(run)[0] - 0.5


# --- trl's SFTTrainer -------------------------------------------------------------------------------------------------


def sft(config: LoraConfig, folder: Path, quant: str = "", stop: int | None = None) -> Trainer:
    """The trainer builds the PEFT model itself, from the config."""
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    tokens = [row.tolist() for step in range(8) for row in batch(step)]
    table = datasets.table.InMemoryTable.from_pydict({"input_ids": tokens, "labels": tokens})
    arguments = trl.SFTConfig(
        output_dir=str(folder),
        max_steps=8,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        logging_steps=1,
        save_steps=4,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        bf16=False,
        seed=3,
        dataset_kwargs={"skip_prepare_dataset": True},
    )
    torch.manual_seed(1)
    run: Trainer = trl.SFTTrainer(
        llama(quant=quant),
        arguments,
        train_dataset=datasets.Dataset(table, fingerprint="counted"),
        processing_class=tokenizer(),
        peft_config=config,
        callbacks=[Stop(stop)] if stop else [],
    )
    return run


@pytest.mark.parametrize("quant", ["", "nf4"])
def test_sft_trainer_losses_are_pefts(quant, tmp_path):
    """From a registered config; trl casts the adapters of a 4-bit model to bf16."""
    runs = []
    for registered in (False, True):
        config = LoraConfig(r=4, target_modules=LINEARS, task_type="CAUSAL_LM")
        run = sft(fastlora.register(config) if registered else config, tmp_path / str(registered), quant)
        run.train()
        runs.append(losses(run))
        assert len(fastlora.report(run.model).fused) == (14 if registered else 0)
    assert runs[1] == pytest.approx(runs[0], abs=2e-2 if quant else 2e-5)
    assert runs[1][-1] < runs[1][0] - 0.5


@pytest.mark.parametrize("quant", ["", "nf4"])
def test_a_resumed_sft_run_goes_on_as_if_uninterrupted(quant, tmp_path):
    """Dropout included: bit for bit, from a checkpoint that holds the adapter only.

    Over a 4-bit base trl trains bf16 adapters, and PEFT's loader raises them to fp32 when a run resumes, so that plain
    PEFT's losses too differ in the fourth digit. Kept in fp32 throughout, they do not.
    """

    def trained(name: str, stop: int | None = None, resume: Path | None = None) -> Trainer:
        config = LoraConfig(r=4, target_modules=LINEARS, task_type="CAUSAL_LM", lora_dropout=0.1)
        run = sft(fastlora.register(config), tmp_path / name, quant, stop)
        for parameter in run.model.parameters():
            parameter.data = parameter.data.float() if parameter.requires_grad else parameter.data
        run.train(resume_from_checkpoint=None if resume is None else str(resume))
        return run

    whole, first = trained("whole"), trained("parts", stop=4)
    saved = tmp_path / "parts" / "checkpoint-4"
    assert not (saved / "model.safetensors").exists()
    second = trained("parts", resume=saved)
    assert len(fastlora.report(second.model).fused) == 14
    assert losses(first) == losses(whole)[:4]
    assert losses(second) == losses(whole)
    assert losses(whole)[-1] < losses(whole)[0] - 0.5
    want, got = tensors(whole.model), tensors(second.model)
    assert want.keys() == got.keys()
    assert all(torch.equal(want[name], got[name]) for name in want)


def test_the_sft_example_runs():
    pytest.importorskip("trl")
    pytest.importorskip("datasets")
    root = Path(__file__).resolve().parent.parent
    command = [sys.executable, str(root / "examples" / "sft_trainer.py"), "--steps", "10"]
    environment = dict(os.environ, PYTHONPATH=str(root), HF_HUB_OFFLINE="1")
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "14 of 14 layers fused" in done.stdout


def tokenizer() -> Any:
    """One token a word, made here: nothing is downloaded."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = {f"w{number}": number for number in range(60)} | {"<pad>": 60}
    plain = Tokenizer(WordLevel(words, unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=plain, pad_token="<pad>", eos_token="<pad>")
