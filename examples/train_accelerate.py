"""QLoRA with Hugging Face accelerate's own loop: nothing in it knows fastlora but `convert` and `save_adapter`.

    accelerate launch examples/train_accelerate.py                                  # one process
    accelerate launch --multi_gpu --num_processes 2 examples/train_accelerate.py    # two GPUs, or two CPU processes
    torchrun --nproc-per-node 2 examples/train_accelerate.py                        # the same by torch's own launcher

(With --cpu accelerate would leave starting several processes to MPI; --multi_gpu is also right on a host without GPUs.)
The model is a small random one,
so that nothing is downloaded.
"""

from __future__ import annotations

import argparse

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fastlora


def train(accelerator: Accelerator, epochs: int, out: str) -> None:
    """Build, train and save."""
    torch.manual_seed(0)  # the same weights and data everywhere; accelerate cuts the batches
    model = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64))
    fastlora.convert(model, r=8, lora_dropout=0.05, init_seed=0, target_modules=["0", "2"], progress=False)
    optimizer = torch.optim.AdamW(fastlora.param_groups(model, lr=1e-2))
    x = torch.randn(256, 64)
    loader = DataLoader(TensorDataset(x, x.flip(1)), batch_size=16)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

    torch.manual_seed(1 + accelerator.process_index)  # its own dropout on each process
    for epoch in range(epochs):
        total = torch.zeros((), device=accelerator.device)
        for inputs, wanted in loader:
            with accelerator.accumulate(model):
                loss = (model(inputs) - wanted).square().mean()
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
            total += loss.detach()
        mean = accelerator.reduce(total / len(loader), reduction="mean").item()
        accelerator.print(f"epoch {epoch}: loss {mean:.4f} on {accelerator.num_processes} process(es)")

    if accelerator.is_main_process:
        print(f"saved to {fastlora.save_adapter(accelerator.unwrap_model(model), out)}")
    accelerator.wait_for_everyone()
    accelerator.free_memory()


def main() -> None:
    """Join the other processes, train, leave."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--out", default="adapter-out")
    options = parser.parse_args()

    accelerator = Accelerator(cpu=not torch.cuda.is_available(), gradient_accumulation_steps=2)
    train(accelerator, options.epochs, options.out)  # on return the model is gone, before the group it trained in
    accelerator.end_training()


if __name__ == "__main__":
    main()
