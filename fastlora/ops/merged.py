"""Merged weights that a checkpoint's second forward makes and its backward, which follows at once, needs again.

A checkpoint that recomputes through saved-tensor hooks compares what both of its forwards save, so what is saved must
not depend on who looks on: where an op hides its merged weight, a tensor of the same shape without bytes stands for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastlora import settings


def by_hooks() -> bool | None:
    """Whether the saved-tensor hooks in force are a checkpoint's; None where there are no hooks."""
    hooks: Any = torch._C._autograd._top_saved_tensors_default_hooks(False)
    return None if hooks is None else getattr(hooks[0], "__module__", "") == "torch.utils.checkpoint"


def merged_lives() -> bool:
    """Whether a merged weight made now should live until the backward: it is a checkpoint that runs the forward again.

    One that recomputes through saved-tensor hooks wants the same tensors saved both times, and throws the first away.
    """
    if settings.current.low_memory:
        return False
    hooks = by_hooks()
    return bool(torch._C._current_graph_task_id() != -1) if hooks is None else hooks


def stand_in(like: Tensor, shape: Sequence[int]) -> Tensor:
    """What is saved in place of a merged weight: its shape and dtype, one element of memory."""
    return like.new_empty((1,)).as_strided(tuple(shape), (0,) * len(shape))


def real(merged: Tensor) -> bool:
    """Whether it is a merged weight and no stand-in."""
    return merged.stride(0) != 0
