"""MixLoRA under transformers' Trainer: a small byte-level Llama learns Python's own help texts.

    python examples/mixlora.py                  # over NF4, saves ./mixlora-out
    python examples/mixlora.py --steps 200 --experts 4 --dense

The frozen weights are random, so the text it learns is no use; what shows is the method. A real run would take a
pretrained model and keep everything else. Needs `pip install 'fastlora[transformers]'`.
"""

from __future__ import annotations

import argparse
import tempfile
from pydoc_data.topics import topics
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import fastlora
from fastlora import moe

LENGTH, BATCH = 96, 8


class MixtureTrainer(Trainer):
    """Trainer that adds the routers' loss, shared out over the steps whose gradients are accumulated."""

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The task's loss and the routers'."""
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        share = 1 if num_items_in_batch is None else self.current_gradient_accumulation_steps
        loss = loss + moe.router_loss(model, inputs.get("attention_mask")) / share
        return (loss, outputs) if return_outputs else loss


def stretches(text: bytes, count: int) -> list[dict[str, torch.Tensor]]:
    """Random stretches of the text, as Trainer wants them."""
    data = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    starts = torch.randint(len(data) - LENGTH, (count,), generator=torch.Generator().manual_seed(0))
    rows = data[starts[:, None] + torch.arange(LENGTH)]
    return [{"input_ids": row, "labels": row, "attention_mask": torch.ones_like(row)} for row in rows]


def main() -> None:
    """Train, print the losses and how busy the experts are, save, load."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--dense", action="store_true", help="leave the base in fp32")
    parser.add_argument("--out", default="mixlora-out")
    options = parser.parse_args()

    def fresh() -> LlamaForCausalLM:
        torch.manual_seed(0)
        sizes = {"hidden_size": 192, "intermediate_size": 384, "num_hidden_layers": 3, "num_attention_heads": 4}
        return LlamaForCausalLM(LlamaConfig(vocab_size=256, initializer_range=0.06, **sizes))

    config = moe.MixLoraConfig(
        num_experts=options.experts, top_k=2, r=8, lora_alpha=16, router_aux_loss_coef=0.05, init_seed=0
    )
    quantize = None if options.dense else "nf4"
    model = moe.convert(fresh(), config, quantize=quantize, progress=False)
    fastlora.print_trainable_parameters(model)

    text = "\n".join(topics[name] for name in sorted(topics)).encode()
    data: Any = stretches(text, options.steps * BATCH)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=options.steps,
            per_device_train_batch_size=BATCH,
            learning_rate=5e-3,
            logging_steps=20,
            report_to=[],
            save_strategy="no",
            use_cpu=not torch.cuda.is_available(),
            disable_tqdm=True,
        )
        trainer = MixtureTrainer(model=model, args=arguments, train_dataset=data)
        trainer.train()
    for entry in trainer.state.log_history:
        if "loss" in entry:
            print(f"step {entry['step']:4d}  loss {entry['loss']:.3f}")

    model.eval()
    ids = torch.stack([row["input_ids"] for row in data[:BATCH]]).to(model.device)
    want = model(input_ids=ids).logits
    for name, logits in moe.router_logits(model).items():
        chosen = logits.topk(2, -1).indices.flatten().bincount(minlength=options.experts) / (2 * len(logits))
        print(f"{name:<20} tokens an expert: {' '.join(f'{share:4.0%}' for share in chosen.tolist())}")

    path = moe.save_adapter(model, options.out)
    again = moe.convert(fresh(), config, quantize=quantize, progress=False).to(model.device)
    difference = (moe.load_adapter(again, path).eval()(input_ids=ids).logits - want).abs().max()
    print(f"saved to {path} in MoE-PEFT's layout; loaded again, logits differ by {difference:.1e}")


if __name__ == "__main__":
    main()
