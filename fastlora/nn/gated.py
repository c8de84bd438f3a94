"""Gated MLPs, down(act(gate(x)) * up(x)), found by trying and run as two Functions: both projections of x, the rest.

A module counts as one if all it has are three adapted layers and at most one module without parameters, and if its
output is that expression to the bit: for the example and for random numbers, in both modes. It becomes a subclass of
its own class; whatever its layers cannot do together runs the class's own forward. Saved are x, gate(x) and up(x);
neither the activation nor the product (`ops.glu`).
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastlora.errors import ConfigError
from fastlora.math.gated import NAMES
from fastlora.ops.glu import eager, glu, glu_linear
from fastlora.ops.member import watched

GATED = "_fastlora_gated"  # attribute of a module
_TOKENS = 8  # rows a module is tried with


class Names(NamedTuple):
    """The layers of a gated MLP by name, and its activation (`math.gated`)."""

    gate: str
    up: str
    down: str
    act: str


class _Gated:
    """What is put before a gated MLP's class."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The class's own function; by two Functions where all layers can."""
        y = _fused(self, args) if not kwargs else None
        return super().forward(*args, **kwargs) if y is None else y  # type: ignore[misc]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _blank, (own_class(type(self)),), self.__dict__.copy()


@functools.cache
def _subclass(cls: type) -> type:
    return type(cls.__name__, (_Gated, cls), {"__module__": cls.__module__, "__qualname__": cls.__qualname__})


def _blank(cls: type) -> Any:
    made: Any = _subclass(cls)
    return made.__new__(made)


def own_class(cls: type) -> type:
    """The class that a gated MLP had."""
    return cls.__mro__[cls.__mro__.index(_Gated) + 1]


def _fused(module: Any, args: tuple[Any, ...]) -> Tensor | None:
    """The output for one positional x, or None where the module's own forward must make it."""
    from fastlora.nn import groups

    names: Names | None = module.__dict__.get(GATED)
    if names is None or len(args) != 1 or watched() or any(_overheard(child) for child in module._modules.values()):
        return None
    gate, up, down = (module._modules.get(name) for name in names[:3])
    if not all(groups.groupable(layer) for layer in (gate, up, down)):
        return None
    made = groups.compute([gate, up], args[0], groups.shares_masks(module))
    if made is None:
        return None
    first, second = made
    own = groups.projections_of([down], first)
    if own is None:
        y: Tensor = down(glu(first, second, names.act))
        return y
    return glu_linear(first, second, own[0], names.act)


def _overheard(child: nn.Module | None) -> bool:
    """Whether a hook on a layer would miss its call."""
    return child is not None and bool(child._forward_hooks or child._backward_hooks or child._backward_pre_hooks)


# --- finding ----------------------------------------------------------------------------------------------------------


def find(parent: nn.Module, layers: Sequence[str], x: Any) -> Names | None:
    """What makes `parent` a gated MLP; None if it is none.

    Args:
        parent: a module whose adapted layers are called `layers`.
        x: what it was called with, the one thing.
    """
    others = [child for name, child in parent._modules.items() if name not in layers and child is not None]
    if len(layers) != 3 or len(others) > 1 or not isinstance(x, Tensor) or not x.is_floating_point():
        return None
    if parent._parameters or parent._buffers or any(True for other in others for _ in other.state_dict()):
        return None
    orders = itertools.permutations(layers)
    left = [Names(gate, up, down, act) for gate, up, down in orders for act in NAMES]
    x = x.narrow(-2, 0, min(x.shape[-2], _TOKENS)) if x.dim() > 1 else x  # enough to tell, whatever was called
    x = x[:1] if x.dim() > 2 else x
    modes = {module: module.training for module in parent.modules()}
    generator = torch.Generator().manual_seed(0)
    draw = torch.randn(x.shape, generator=generator).to(x)
    try:
        parent.eval()
        with torch.random.fork_rng(), torch.no_grad():
            for given, training in itertools.product((x, draw), (False, True)):
                for module in (parent, *others):
                    module.training = training  # of the layers alone dropout is switched off
                y = parent(given)
                made: dict[str, Tensor] = {}
                left = [names for names in left if _is(parent, names, given, y, made)]
    finally:
        for module, mode in modes.items():
            module.training = mode
    return left[0] if left else None


def _is(parent: Any, names: Names, x: Tensor, y: Any, made: dict[str, Tensor]) -> bool:
    """Whether y is the expression of x by these names; `made` keeps what layers give for x."""
    gate, up, down = (parent.get_submodule(name) for name in names[:3])
    sizes = [(layer.in_features, layer.out_features) for layer in (gate, up, down)]
    if sizes[0] != sizes[1] or sizes[0][0] != x.shape[-1] or sizes[2][0] != sizes[0][1]:
        return False
    for name, layer in ((names.gate, gate), (names.up, up)):
        if name not in made:
            made[name] = layer(x)
    return isinstance(y, Tensor) and torch.equal(y, down(eager(made[names.gate], made[names.up], names.act)))


def fuse(parent: nn.Module, names: Names) -> None:
    """Make a found MLP run fused."""
    parent.__dict__[GATED] = names
    cls: Any = type(parent)
    parent.__class__ = _subclass(cls)


def restore(module: nn.Module) -> None:
    """Give a module its class back, if `fuse` has changed it.

    Raises:
        ConfigError: it has been given another one since.
    """
    if module.__dict__.get(GATED) is None:
        return
    own = own_class(type(module))
    if type(module) is not _subclass(own):
        raise ConfigError(f"{type(module).__name__} was derived from a grouped module: undo that first")
    module.__class__ = own
    del module.__dict__[GATED]
