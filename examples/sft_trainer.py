"""trl's SFTTrainer on fastlora's kernels by one word: `register` the config that the trainer builds its model from.

    python examples/sft_trainer.py           # LoRA over a toy model with random weights
    python examples/sft_trainer.py --plain   # PEFT's own layers, to compare

Needs `pip install 'fastlora[peft,transformers]' trl`.
"""

from __future__ import annotations

import argparse
import tempfile

import torch
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

import fastlora

WORDS = 128


def toy_model() -> LlamaForCausalLM:
    """Two Llama layers of width 128. A real run gives SFTTrainer the name of a model."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=WORDS, **sizes))


def toy_tokenizer() -> PreTrainedTokenizerFast:
    """One token a number."""
    words = {str(number): number for number in range(WORDS - 1)} | {"<pad>": WORDS - 1}
    plain = Tokenizer(WordLevel(words, unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=plain, pad_token="<pad>", eos_token="<pad>")


def main() -> None:
    """Train for a few steps and say what ran where."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plain", action="store_true", help="leave PEFT's layers alone")
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args()

    config = LoraConfig(r=8, lora_alpha=16, lora_dropout=0.05, target_modules="all-linear", task_type="CAUSAL_LM")
    if not options.plain:
        fastlora.register(config)  # the one line
    # Counting upwards from every start: something to learn.
    rows = [{"input_ids": [(start + step) % (WORDS - 1) for step in range(32)]} for start in range(WORDS - 1)]
    with tempfile.TemporaryDirectory() as folder:
        arguments = SFTConfig(
            output_dir=folder,
            max_steps=options.steps,
            per_device_train_batch_size=8,
            learning_rate=1e-2,
            logging_steps=5,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            bf16=False,
        )
        trainer = SFTTrainer(
            toy_model(),
            arguments,
            train_dataset=Dataset.from_list(rows),
            processing_class=toy_tokenizer(),
            peft_config=config,
        )
        trainer.train()
        print(fastlora.report(trainer.model))
        trainer.save_model(folder)  # PEFT's format: loads anywhere, with or without fastlora


if __name__ == "__main__":
    main()
