"""Parameters cut over processes (DTensor, as FSDP2's `fully_shard` leaves them): what saving and loading asks of them.

Nothing here imports torch.distributed before a sharded tensor is met.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastlora.errors import ConfigError


def is_sharded(tensor: Any) -> bool:
    """Whether it is a DTensor."""
    return hasattr(tensor, "device_mesh")


def any_sharded(model: nn.Module) -> bool:
    """Whether some parameter of the model is cut over processes."""
    return any(is_sharded(parameter) for parameter in model.parameters())


def whole(tensor: Tensor) -> Tensor:
    """The full tensor on every process (a collective for a sharded one)."""
    sharded: Any = tensor
    return sharded.full_tensor() if is_sharded(tensor) else tensor


def cut_like(value: Tensor, parameter: Tensor) -> Tensor:
    """A full value cut as `parameter` is (no communication: every process holds it); anything else as it came."""
    if not is_sharded(parameter) or is_sharded(value):
        return value
    from torch.distributed.tensor import distribute_tensor

    layout: Any = parameter
    return distribute_tensor(value.to(layout.device), layout.device_mesh, layout.placements, src_data_rank=None)


def refuse_sharded(tensor: Any, what: str) -> None:
    """Raise ConfigError where an operation needs the full weight."""
    if is_sharded(tensor):
        raise ConfigError(
            f"{what} needs the full weight, and it is cut over processes: do it before fully_shard, or on a model "
            "loaded from the full state dict"
        )


def agree(facts: Any, error: Exception | None = None) -> None:
    """Raise on every process where one failed or has other facts; a collective that every process must reach.

    Args:
        facts: what must be equal everywhere (picklable).
        error: what went wrong on this process, if anything did.
    """
    import torch.distributed as dist

    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, (facts, None if error is None else str(error)))
    if error is not None:
        raise error
    for rank, (_, message) in enumerate(gathered):
        if message is not None:
            raise ConfigError(f"process {rank} failed: {message}")
    for rank, (theirs, _) in enumerate(gathered):
        if theirs != gathered[0][0]:
            raise ConfigError(
                f"processes disagree: process 0 has {_short(gathered[0][0])}, {rank} has {_short(theirs)}"
            )


def _short(facts: Any) -> str:
    text = str(facts)
    return text if len(text) <= 200 else text[:197] + "..."


def on_first(work: Callable[[], Any]) -> Any:
    """Run `work` on process 0 while the others wait; its result, or its failure, on every process."""
    import torch.distributed as dist

    box: list[Any] = [None, None]
    failure: Exception | None = None
    if dist.get_rank() == 0:
        try:
            box[0] = work()
        except (OSError, ValueError, RuntimeError) as error:
            failure = error
            box[1] = f"{type(error).__name__}: {error}"
    dist.broadcast_object_list(box, src=0)
    if failure is not None:
        raise failure
    if box[1] is not None:
        raise ConfigError(f"process 0 failed: {box[1]}")
    return box[0]


@torch.no_grad()
def fill(parameter: Tensor, value: Tensor) -> None:
    """Copy a full or equally cut value into a parameter in place."""
    parameter.copy_(cut_like(value, parameter))
