"""What each process of a small world does with a mixture cut over all of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastlora import moe
from fastlora.nn.sharded import is_sharded, whole
from tests import moe_tools


def _sharded(folder: Path) -> Any:
    from torch.distributed.fsdp import fully_shard

    model = moe.load_adapter(moe_tools.base(bias=False), folder)
    for layer in model.model.layers:
        fully_shard(layer)
    return fully_shard(model)


def save_and_load(rank: int, world: int, folder: str) -> dict[str, Tensor]:
    """Save the sharded adapter, spoil it, load it again; what it is then, whole."""
    place = Path(folder)
    model = _sharded(place / "in")
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert all(is_sharded(parameter) for parameter in trained.values())
    moe.save_adapter(model, place / "out")
    with torch.no_grad():
        for parameter in trained.values():
            parameter.zero_()
    moe.load_adapter(model, place / "out")
    return {name: whole(parameter).detach().clone() for name, parameter in trained.items()}
