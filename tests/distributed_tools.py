"""Small worlds of gloo processes on one CPU: each runs one function and leaves its result in a file."""

from __future__ import annotations

import datetime
import gc
import os
import pathlib
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

import fastlora

TIMEOUT = 60.0  # seconds after which a collective gives up: no test may hang
KINDS: dict[str, dict[str, Any]] = {
    "lora": {"quantize": None},
    "qlora": {"double_quant": True},
    "qdora": {"double_quant": False, "use_dora": True},
}


def make(kind: str, **fields: Any) -> nn.Module:
    """The same three-layer model in every process; 41 features and odd block counts cut unevenly."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(48, 96), nn.ReLU(), nn.Linear(96, 41), nn.ReLU(), nn.Linear(41, 16))
    options = {**KINDS[kind], **fields}
    format_options = {name: options.pop(name) for name in ("quantize", "double_quant") if name in options}
    config = fastlora.LoraConfig(r=4, init_lora_weights=False, init_seed=3, target_modules=["0", "2", "4"], **options)
    return fastlora.convert(model, config, progress=False, **format_options)


def batch(rows: int, step: int = 0) -> Tensor:
    """The same rows in every process."""
    return torch.randn(rows, 48, generator=torch.Generator().manual_seed(step))


def shard(model: nn.Module, mixed: bool = False) -> nn.Module:
    """FSDP2 over every layer and the root."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16) if mixed else MixedPrecisionPolicy()
    for layer in model.children():
        if any(True for _ in layer.parameters()):
            fully_shard(layer, mp_policy=policy)
    return fully_shard(model, mp_policy=policy)


def train(model: nn.Module, steps: int, rows: int, rank: int = 0, world: int = 1) -> list[float]:
    """Steps of AdamW on this process' share of each batch; the losses of the whole batch's share."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-2)
    losses = []
    for step in range(steps):
        optimizer.zero_grad()
        x = batch(rows, step).chunk(world)[rank]
        loss = model(x).float().square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def full_state(model: nn.Module) -> dict[str, Tensor]:
    """The full state dict, on process 0 only."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


def _start(rank: int, world: int, folder: str, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    os.environ["LOCAL_RANK"] = str(rank)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store-{function.__name__}-{world}",
        rank=rank,
        world_size=world,
        timeout=datetime.timedelta(seconds=TIMEOUT),
    )
    try:
        result = function(rank, world, *args)
    finally:
        gc.collect()  # sharded models are cycles: what is left of them must be gone before their group
        dist.destroy_process_group()
    torch.save(result, pathlib.Path(folder, f"result-{rank}.pt"))
    # Threads of gloo that still hold tensors abort the process if they meet the interpreter's end.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def run_world(world: int, folder: pathlib.Path, function: Callable[..., Any], *args: Any) -> list[Any]:
    """`function(rank, world, *args)` in `world` processes; their results by rank.

    Raises:
        What torch raises when a process fails; AssertionError when the world outlives twice the timeout.
    """
    context = mp.spawn(_start, (world, str(folder), function, args), nprocs=world, join=False)
    assert context is not None
    until = time.monotonic() + 2 * TIMEOUT
    while not context.join(timeout=1.0):
        if time.monotonic() > until:
            for process in context.processes:
                process.kill()
            raise AssertionError(f"{function.__name__} hung")
    return [torch.load(folder / f"result-{rank}.pt", weights_only=True) for rank in range(world)]
