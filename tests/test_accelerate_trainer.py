"""transformers' Trainer on an accelerated model: no special code, the losses of PEFT's own, exact resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainerCallback, TrainingArguments

import fastlora
from tests.accelerate_tools import LINEARS, adapted, batch, llama, with_our_masks

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


@pytest.mark.parametrize("quant", ["", "nf4"])
def test_sft_trainer_losses_are_pefts(quant, tmp_path):
    """The trainer builds the PEFT model from a registered config; trl casts adapters of a 4-bit model to bf16."""
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    tokens = [row.tolist() for step in range(8) for row in batch(step)]
    table = datasets.table.InMemoryTable.from_pydict({"input_ids": tokens, "labels": tokens})
    rows = datasets.Dataset(table, fingerprint="counted")
    runs = []
    for registered in (False, True):
        config = LoraConfig(r=4, target_modules=LINEARS, task_type="CAUSAL_LM")
        arguments = trl.SFTConfig(
            output_dir=str(tmp_path / str(registered)),
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
        run = trl.SFTTrainer(
            llama(quant=quant),
            arguments,
            train_dataset=rows,
            processing_class=tokenizer(),
            peft_config=fastlora.register(config) if registered else config,
        )
        run.train()
        runs.append(losses(run))
        assert len(fastlora.report(run.model).fused) == (14 if registered else 0)
    assert runs[1] == pytest.approx(runs[0], abs=2e-2 if quant else 2e-5)
    assert runs[1][-1] < runs[1][0] - 0.5


def tokenizer() -> Any:
    """One token a word, made here: nothing is downloaded."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = {f"w{number}": number for number in range(60)} | {"<pad>": 60}
    plain = Tokenizer(WordLevel(words, unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=plain, pad_token="<pad>", eos_token="<pad>")
