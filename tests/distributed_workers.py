"""What the processes of test_distributed.py do. Each function takes (rank, world, ...) and returns plain data."""

from __future__ import annotations

import os
import pathlib
import time
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.nn.parallel import DistributedDataParallel

import fastlora
from fastlora.errors import FastloraError
from tests.distributed_tools import KINDS, batch, full_state, make, shard, train

ROWS = 12


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def ddp_gradients(rank: int, world: int) -> dict[str, dict[str, Tensor]]:
    """One backward of each kind of layer under DDP."""
    found = {}
    for kind in KINDS:
        wrapped = DistributedDataParallel(make(kind))
        wrapped(batch(ROWS).chunk(world)[rank]).square().mean().backward()
        found[kind] = gradients(wrapped.module)
    return found


def fsdp_training(rank: int, world: int, folder: str) -> dict[str, Any]:
    """Train, look at the full state and the outputs, save the adapter: full precision and mixed."""
    found: dict[str, Any] = {}
    for kind in KINDS:
        for mixed in (False, True):
            model = shard(make(kind), mixed)
            losses = train(model, 4, ROWS, rank, world)
            with torch.no_grad():
                y = model(batch(ROWS, 99)).float()
            state = full_state(model)
            saved = f"{folder}/{kind}-{mixed}"
            fastlora.save_adapter(model, saved)
            found[f"{kind}-{mixed}"] = {"losses": losses, "y": y, "state": state, "saved": saved}
    return found


def checkpoint_save(rank: int, world: int, path: str) -> Tensor:
    """Train, save sharded, return the outputs."""
    model = shard(make("qdora"))
    train(model, 3, ROWS, rank, world)
    dcp.save(get_model_state_dict(model), checkpoint_id=path)
    with torch.no_grad():
        return model(batch(ROWS, 99))


def checkpoint_load(rank: int, world: int, path: str) -> Tensor:
    """Load the sharded checkpoint into this world's cut, return the outputs."""
    model = shard(make("qdora"))
    state = get_model_state_dict(model)
    dcp.load(state, checkpoint_id=path)
    set_model_state_dict(model, state)
    with torch.no_grad():
        return model(batch(ROWS, 99))


def load_fails(rank: int, world: int, path: str) -> str:
    """The message this process gets from a checkpoint that lacks a part."""
    model = shard(make("qdora"))
    state = get_model_state_dict(model)
    try:
        dcp.load(state, checkpoint_id=path)
    except dcp.CheckpointException as error:
        return str(error)
    return ""


def adapter_absent_on_one(rank: int, world: int, folder: str) -> str:
    """The message this process gets when process 1 lacks the adapter that is saved."""
    model = make("qlora")
    for index in (0, 2):
        model[index].add_adapter("extra", r=2)
    model = shard(model)
    if rank == 1:
        model[2].delete_adapter("extra")
    try:
        fastlora.save_adapter(model, folder, "extra")
    except FastloraError as error:
        return str(error)
    return ""


def killed_while_saving(rank: int, world: int, folder: str) -> str:
    """Process 1 dies between the gathers of a save; what process 0 is told."""
    model = shard(make("qlora"))
    fastlora.save_adapter(model, folder)
    train(model, 1, ROWS, rank, world)
    if rank == 1:
        from fastlora.nn import checkpoint

        def die(*_: Any) -> Any:
            os._exit(17)

        checkpoint.whole = die
    try:
        fastlora.save_adapter(model, folder)
    except RuntimeError as error:
        with open(f"{folder}/message", "w", encoding="utf-8") as file:
            file.write(str(error))
        raise
    return ""


def mixed_trainable_dtypes(rank: int, world: int) -> str:
    """The message for trainable parameters of two dtypes in one sharded layer."""
    model = make("qlora")
    model[0].lora_B["default"].data = model[0].lora_B["default"].data.bfloat16()
    model[0].lora_A["default"].data = model[0].lora_A["default"].data.bfloat16()
    model[0].bias.requires_grad_(True)
    sharded = shard(model)
    try:
        sharded(batch(ROWS)).square().mean().backward()
    except (AssertionError, RuntimeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def refusals(rank: int, world: int) -> dict[str, bool]:
    """Merging and adding an adapter on a sharded layer: whether each is refused with the reason."""
    model = shard(make("qlora"))
    found = {}
    for name, act in (("merge", lambda: fastlora.merge(model)), ("add", lambda: model[0].add_adapter("new", r=2))):
        try:
            act()
        except FastloraError as error:
            found[name] = "cut over processes" in str(error)
    return found


def everything(rank: int, world: int, folder: str) -> dict[str, Any]:
    """All that needs no process to die, in one world: starting processes costs more than what they do."""
    saved, broken = pathlib.Path(folder, "saved"), pathlib.Path(folder, "broken")
    found: dict[str, Any] = {
        "ddp": ddp_gradients(rank, world),
        "fsdp": fsdp_training(rank, world, folder),
        "saved": checkpoint_save(rank, world, str(saved)),
        "refusals": refusals(rank, world),
        "absent": adapter_absent_on_one(rank, world, f"{folder}/absent"),
    }
    if rank == 0:
        broken.mkdir()
        for file in saved.iterdir():
            if not file.name.startswith("__1_"):
                (broken / file.name).write_bytes(file.read_bytes())
    dist.barrier()
    started = time.monotonic()
    found["missing"] = load_fails(rank, world, str(broken))
    found["missing_seconds"] = time.monotonic() - started
    found["dtypes"] = mixed_trainable_dtypes(rank, world)  # last: it stops between two collectives
    return found
