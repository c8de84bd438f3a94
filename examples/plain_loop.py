"""QLoRA in a training loop of one's own: swap the layers, train, save, merge. Nothing but torch and fastlora.

    python examples/plain_loop.py                 # QLoRA over NF4, saves ./adapter-out
    python examples/plain_loop.py --dora --dense

A small network with random weights learns to reverse its input; a real run would put a pretrained model in its place.
"""

from __future__ import annotations

import argparse

import torch
from torch import nn

import fastlora


def network() -> nn.Module:
    """Two hidden layers; the same weights each time."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 256), nn.GELU(), nn.Linear(256, 64))


def main() -> None:
    """Train, evaluate, save, load elsewhere, merge."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--dora", action="store_true", help="DoRA instead of LoRA")
    parser.add_argument("--dense", action="store_true", help="leave the base in fp32")
    parser.add_argument("--out", default="adapter-out")
    options = parser.parse_args()

    quantize = None if options.dense else "nf4"
    config = fastlora.LoraConfig(r=16, lora_alpha=32, lora_dropout=0.05, use_dora=options.dora, init_seed=0)
    model = fastlora.convert(network(), config, quantize=quantize)  # freezes all but the adapters
    fastlora.print_trainable_parameters(model)
    optimizer = torch.optim.AdamW(fastlora.param_groups(model, lr=3e-3, loraplus_lr_ratio=4.0))
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.steps)

    model.train()
    for step in range(options.steps):
        x = torch.randn(64, 64)
        loss = (model(x) - x.flip(1)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        if step % 20 == 0 or step == options.steps - 1:
            print(f"step {step:3d}: loss {loss.item():.4f}")

    print(f"saved to {fastlora.save_adapter(model, options.out)} (PEFT's format)")
    model.eval()
    x = torch.randn(8, 64)
    with torch.no_grad():
        fresh = fastlora.convert(network(), config.replace(init_seed=1), quantize=quantize)
        fastlora.load_adapter(fresh, options.out)
        print(f"loaded into a fresh model: outputs differ by {(fresh.eval()(x) - model(x)).abs().max().item():.1e}")
        before = model(x)
        merged = fastlora.merge_and_unload(model, dtype=torch.float32)  # plain nn.Linear again
        print(f"merged: outputs differ by {(merged(x) - before).abs().max().item():.1e}")


if __name__ == "__main__":
    main()
