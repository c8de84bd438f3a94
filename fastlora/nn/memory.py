"""What a forward keeps for its backward, measured: bytes by layer, each storage once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Held(NamedTuple):
    """Bytes kept.

    Attributes:
        layers: by layer: what its forward kept and nobody had kept before. Of layers that are computed together the
            first that is called has all.
        rest: by everything else.
    """

    layers: dict[str, int]
    rest: int

    @property
    def total(self) -> int:
        """All of it."""
        return sum(self.layers.values()) + self.rest


class Enter:
    """A hook that notes that a layer's forward begins; it touches nothing."""

    def __init__(self, inside: list[str], name: str) -> None:
        self.inside, self.name = inside, name

    def __call__(self, layer: nn.Module, args: Any) -> None:
        """The layer's name is now the innermost."""
        self.inside.append(self.name)


def held(model: nn.Module, layers: Mapping[str, nn.Module], run: Callable[[], Any]) -> Held:
    """Call `run`, and count what autograd keeps; parameters and buffers, which are there anyway, do not count.

    Args:
        model: whose parameters and buffers these are.
        layers: by name, the modules whose share is told.
        run: calls the model; its random numbers are put back afterwards.
    """
    known = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers()) if _real(tensor)}
    counted = dict.fromkeys(layers, 0)
    inside: list[str] = []
    alive: list[Tensor] = []  # so that no storage is freed and another has its address
    rest = 0

    def keep(tensor: Tensor) -> Tensor:
        nonlocal rest
        storage = tensor.untyped_storage()
        if _real(tensor) and storage.data_ptr() not in known:
            known.add(storage.data_ptr())
            alive.append(tensor.detach())
            if inside:
                counted[inside[-1]] += storage.nbytes()
            else:
                rest += storage.nbytes()
        return tensor.detach()  # an operation that kept its own output, gradient and all, would never be freed

    handles = []
    for name, layer in layers.items():
        handles.append(layer.register_forward_pre_hook(Enter(inside, name)))
        handles.append(layer.register_forward_hook(lambda *_: inside.pop() and None, always_call=True))
    try:
        with (
            torch.random.fork_rng(),
            torch.enable_grad(),
            torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        ):
            result = run()
    finally:
        for handle in handles:
            handle.remove()
    del result
    return Held(counted, rest)


def _real(tensor: Tensor) -> bool:
    """Whether it has bytes of its own to count."""
    return not tensor.is_meta and tensor.layout is torch.strided and type(tensor) in _ORDINARY


_ORDINARY = (Tensor, nn.Parameter)
