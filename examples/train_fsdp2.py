"""QLoRA over several processes with torch's own engine: FSDP2 by default, DDP with --ddp.

    torchrun --nproc-per-node 2 examples/train_fsdp2.py
    accelerate launch --multi_gpu --num_processes 2 examples/train_fsdp2.py --ddp

Runs on GPUs (nccl) where there are any, else on CPUs (gloo). The model is a small random one, so that nothing is
downloaded; put your own in its place. The adapter is saved in PEFT's format by all processes together.
"""

from __future__ import annotations

import argparse
import gc

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import fastlora


def block(width: int) -> nn.Module:
    """One feed-forward block."""
    return nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))


def train(options: argparse.Namespace, gpu: bool) -> None:
    """Build, train a few steps and save."""
    rank, world = dist.get_rank(), dist.get_world_size()
    device = torch.device("cuda", rank % torch.cuda.device_count()) if gpu else torch.device("cpu")

    torch.manual_seed(0)  # the same weights everywhere
    model: nn.Module = nn.Sequential(*(block(64) for _ in range(4))).to(device)
    fastlora.convert(model, r=8, use_dora=True, lora_dropout=0.05, init_seed=0, target_modules=r".*\.[02]")
    if options.ddp:
        model = DistributedDataParallel(model)
    else:
        for layer in model.children():
            fully_shard(layer)  # packed bytes are sharded as bytes and never cast
        fully_shard(model)

    optimizer = torch.optim.AdamW(fastlora.param_groups(model, lr=1e-2, loraplus_lr_ratio=4.0))
    torch.manual_seed(1 + rank)  # its own data and its own dropout on each process
    for step in range(options.steps):
        x = torch.randn(16, 64, device=device)
        loss = (model(x) - x.flip(1)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if rank == 0 and step % 5 == 0:
            print(f"step {step}: loss {loss.item():.4f} on process 0 of {world}")

    inner = model.module if options.ddp else model
    if not options.ddp or rank == 0:  # sharded: together; replicated: one is enough
        print(f"process {rank}: saved to {fastlora.save_adapter(inner, options.out)}")
    dist.barrier()


def main() -> None:
    """Join the other processes, train, leave."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ddp", action="store_true", help="replicate the model instead of sharding it")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--out", default="adapter-out")
    options = parser.parse_args()

    gpu = torch.cuda.is_available()
    dist.init_process_group("nccl" if gpu else "gloo")
    train(options, gpu)  # a function of its own: the model must be gone before the group it communicates through
    gc.collect()  # and so must the cycles that a sharded model consists of
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
