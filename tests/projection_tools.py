"""What the tests of grouped projections and gated units share: what a forward keeps for its backward."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from fastlora.math.nf4 import PackedWeight


def _storages(thing: Any) -> Iterable[int]:
    if isinstance(thing, PackedWeight):
        yield from (part.untyped_storage().data_ptr() for part in thing if isinstance(part, Tensor))
    elif isinstance(thing, Tensor):
        yield thing.untyped_storage().data_ptr()


def saved_storages(run: Callable[[], Any], ignore: Iterable[Any] = ()) -> list[int]:
    """Bytes of each storage that `run` keeps for its backward, each once, without those of `ignore`."""
    found: dict[int, Tensor] = {}
    known = {pointer for thing in ignore for pointer in _storages(thing)}

    def keep(tensor: Tensor) -> Tensor:
        found.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = run()
    kept = [tensor.untyped_storage().nbytes() for pointer, tensor in found.items() if pointer not in known]
    del result
    return kept
