"""A PEFT model under transformers' Trainer, on fastlora's kernels by one line.

    python examples/peft_trainer.py                # LoRA over fp32, a toy model with random weights
    python examples/peft_trainer.py --four-bit     # QLoRA over bitsandbytes' NF4
    python examples/peft_trainer.py --dora --plain # PEFT's own layers, to compare

Needs `pip install 'fastlora[peft,transformers]'`.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from typing import Any

import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import fastlora


def toy_model(four_bit: bool) -> Any:
    """Four Llama layers of width 256. A real run would call `AutoModelForCausalLM.from_pretrained` here."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512, hidden_size=256, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4
    )
    model = LlamaForCausalLM(config)
    if four_bit:
        from bitsandbytes.nn import Linear4bit

        # What from_pretrained(quantization_config=BitsAndBytesConfig(load_in_4bit=True)) does while loading.
        for layer in model.model.layers:
            for parent in (layer.self_attn, layer.mlp):
                for name, linear in list(parent.named_children()):
                    if isinstance(linear, torch.nn.Linear):
                        sizes = (linear.in_features, linear.out_features)
                        quantized = Linear4bit(*sizes, bias=False, compute_dtype=torch.float32, quant_type="nf4")
                        quantized.load_state_dict(linear.state_dict())
                        setattr(parent, name, quantized.to(linear.weight.device))
        model.is_loaded_in_4bit = True
        model = prepare_model_for_kbit_training(model)
    return model


def main() -> None:
    """Train for a few steps and say what ran where."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--four-bit", action="store_true", help="bitsandbytes NF4 base")
    parser.add_argument("--dora", action="store_true", help="DoRA instead of LoRA")
    parser.add_argument("--plain", action="store_true", help="leave PEFT's layers alone")
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args()

    config = LoraConfig(r=8, lora_alpha=16, lora_dropout=0.05, use_dora=options.dora, target_modules="all-linear")
    model = get_peft_model(toy_model(options.four_bit), config)
    if not options.plain:
        fastlora.accelerate(model)  # the one line
    model.print_trainable_parameters()
    print(fastlora.report(model, memory=True))

    # Counting upwards from every start: something to learn.
    rows = [(torch.arange(64) + start) % 512 for start in range(0, 512, 4)]
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=options.steps,
            per_device_train_batch_size=8,
            learning_rate=1e-2,
            logging_steps=5,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        dataset = [{"input_ids": row, "labels": row} for row in rows]
        trainer = Trainer(model, arguments, train_dataset=dataset)  # type: ignore[arg-type]
        start = time.perf_counter()
        trainer.train()
        print(f"{options.steps} steps in {time.perf_counter() - start:.1f} s")
        model.save_pretrained(folder)  # PEFT's format: loads anywhere, with or without fastlora


if __name__ == "__main__":
    main()
