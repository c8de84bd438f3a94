"""AdaLoRA on real text: a small byte-level Llama learns Python's own help texts, and its ranks go where they matter.

    python examples/adalora.py                  # over NF4, saves ./adalora-out
    python examples/adalora.py --steps 300 --dense

The frozen weights are random, so the text it learns is no use; what shows is the method. A real run would take a
pretrained model and keep everything else. Needs `pip install 'fastlora[transformers]'`; plain PEFT opens what it saves.
"""

from __future__ import annotations

import argparse
from pydoc_data.topics import topics

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import fastlora
from fastlora.adalora import AdaLoraConfig, RankAllocator, orthogonal_penalty, rank_pattern

LENGTH, BATCH = 96, 8


def batches(text: bytes, count: int) -> torch.Tensor:
    """Random stretches of the text, [count, BATCH, LENGTH]."""
    data = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    starts = torch.randint(len(data) - LENGTH, (count, BATCH), generator=torch.Generator().manual_seed(0))
    return data[starts[..., None] + torch.arange(LENGTH)]


def main() -> None:
    """Train, print loss and budget, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--dense", action="store_true", help="leave the base in fp32")
    parser.add_argument("--out", default="adalora-out")
    options = parser.parse_args()

    torch.manual_seed(0)
    sizes = {"hidden_size": 192, "intermediate_size": 384, "num_hidden_layers": 3, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=256, initializer_range=0.06, **sizes))
    config = AdaLoraConfig(
        init_r=12,
        target_r=6,
        tinit=options.steps // 8,
        tfinal=options.steps // 4,
        total_step=options.steps,
        init_seed=0,
    )
    fastlora.convert(model, config, quantize=None if options.dense else "nf4", progress=False)
    fastlora.print_trainable_parameters(model)
    optimizer = torch.optim.AdamW(fastlora.param_groups(model, lr=5e-3))
    allocator = RankAllocator(model, config)

    text = "\n".join(topics[name] for name in sorted(topics)).encode()
    model.train()
    for step, ids in enumerate(batches(text, options.steps), start=1):
        loss = model(input_ids=ids, labels=ids).loss
        (loss + orthogonal_penalty(model)).backward()
        optimizer.step()
        budget = allocator.step(step)  # after the optimizer, before the gradients are cleared
        optimizer.zero_grad()
        if step == 1 or step % 20 == 0 or step == options.steps:
            print(f"step {step:4d}  loss {loss.item():.3f}  budget {budget} of {allocator.initial_budget} ranks")

    ranks: dict[str, list[int]] = {}
    for name, kept in rank_pattern(model).items():
        ranks.setdefault(name.split(".")[-2], []).append(sum(kept))
    for name, layers in ranks.items():
        print(f"{name:<10} ranks by layer: {' '.join(f'{rank:2d}' for rank in layers)}")
    print(f"saved to {fastlora.save_adapter(model, options.out)}: only the ranks that are left, in PEFT's format")


if __name__ == "__main__":
    main()
