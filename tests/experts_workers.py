"""What the processes of test_moe_training.py do."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from fastlora import moe
from tests.experts_tools import H, mixlora, plugin


def one_sided() -> nn.Module:
    """A mixture whose tokens all go to one expert."""
    model = nn.Sequential(mixlora(top_k=1), plugin("mola", top_k=1, router_loss=True))
    with torch.no_grad():
        for module in model:
            module.gate.weight.zero_()
            module.gate.weight[1] = 1.0
    return model


def share(rank: int, world: int) -> torch.Tensor:
    return torch.rand(4, 6, H, generator=torch.Generator().manual_seed(0)).chunk(world)[rank]


def ddp_gradients(rank: int, world: int) -> dict[str, torch.Tensor]:
    """Two steps, so that a parameter without gradient would stop the second one."""
    wrapped = DistributedDataParallel(one_sided())
    for _ in range(2):
        wrapped.zero_grad()
        (wrapped(share(rank, world)).square().mean() + moe.router_loss(wrapped)).backward()
    return {name: p.grad for name, p in wrapped.module.named_parameters() if p.grad is not None}
