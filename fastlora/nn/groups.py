"""Layers that read one x, found by looking and computed together: q, k and v of an attention, gate and up of an MLP.

`group` calls the model once and notes which adapted layers right below one module are given the very same tensor. From
then on the first of them that is called while that module runs computes all (`ops.projections`), the others take what
is theirs. Nothing lives longer than the module's call, so parameters, adapters and modes are read anew each time; a
layer that is called alone, with another x, twice or in another mode computes itself. If any layer of a group cannot
take the fast path, they run one by one.

No source is read and no name assumed. Groups are names that hang on the parent beside two hooks: a copy of the model
has them too, and `ungroup` takes them away.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from fastlora.errors import ConfigError, DtypeError
from fastlora.nn import gated
from fastlora.nn.adapted import AdaptedLinear
from fastlora.nn.gated import GATED
from fastlora.nn.memory import Enter
from fastlora.nn.quantized import QuantizedWeight
from fastlora.ops import member as members
from fastlora.ops.lora import autocast_dtype
from fastlora.ops.member import Projection
from fastlora.ops.projections import projections

Model = TypeVar("Model", bound=nn.Module)
# Attributes of a layer while its parent runs; of a parent, for good: `Groups`.
SCOPE, STATE = "_fastlora_scope", "_fastlora_groups"


class Groups(NamedTuple):
    """What a parent knows of its groups.

    Attributes:
        names: of the layers of each group.
        shared: whether the layers of a group drop by one mask.
    """

    names: tuple[tuple[str, ...], ...]
    shared: bool = False


# --- one call of a parent ---------------------------------------------------------------------------------------------


def _context() -> tuple[Any, ...]:
    """What must not change between a parent's start and the call of a layer: grad mode, and whose checkpoint it is."""
    hooks: Any = torch._C._autograd._top_saved_tensors_default_hooks(False)
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), None if hooks is None else hooks[0]


def _version(x: Tensor) -> int:
    return -1 if x.is_inference() else x._version


def _prepared(layer: nn.Module) -> bool:
    """Whether something may have to happen to the layer before its forward: sharded, offloaded or moved weights."""
    hooks = layer._forward_pre_hooks
    return "forward" in layer.__dict__ or (bool(hooks) and not all(type(hook) is Enter for hook in hooks.values()))


class _Round:
    """One group in one call of its parent."""

    def __init__(self, layers: list[Any], context: tuple[Any, ...], shared: bool) -> None:
        self.layers, self.context, self.shared = layers, context, shared
        self.x: Tensor | None = None
        self.version = 0
        self.autocast: torch.dtype | None = None
        self.left: dict[int, Tensor] = {}  # outputs not taken yet, by layer
        self.failed = False

    def take(self, layer: Any, x: Tensor) -> Tensor | None:
        """The layer's output for x; None where it must compute it itself."""
        y = self._take(layer, x)
        if y is None and self.shared:
            _warn_apart(self.layers)
        return y

    def _take(self, layer: Any, x: Tensor) -> Tensor | None:
        if self.failed or _context() != self.context:
            return None
        if self.x is None:
            ys = compute(self.layers, x, self.shared)
            self.failed = ys is None
            if ys is None:
                return None
            self.x, self.version, self.autocast = x, _version(x), autocast_dtype(x)
            self.left = {id(own): y for own, y in zip(self.layers, ys, strict=True)}
        elif x is not self.x or _version(x) != self.version or autocast_dtype(x) is not self.autocast:
            return None
        return self.left.pop(id(layer), None)


def projections_of(layers: Sequence[Any], x: Any) -> list[Projection] | None:
    """The layers as a group takes them for x; None where one of them cannot be in a group now."""
    if type(x) is not Tensor or x.is_inference() or any(_prepared(layer) for layer in layers):
        return None
    found: list[Projection] = []
    for layer in layers:
        one = own_projection(layer, x) if isinstance(layer, AdaptedLinear) else layer.projection(x)
        if one is None or not members.plain(*one.tensors):
            return None
        if any(t is not None and t.device != x.device for t in one.tensors):
            return None
        found.append(one)
    return None if len({one.compute_dtype for one in found}) > 1 or members.watched() else found


def compute(layers: Sequence[Any], x: Any, shared: bool = False) -> tuple[Tensor, ...] | None:
    """Their outputs for x; None where they must run one by one.

    Raises:
        ConfigError: `shared`, and they drop at different rates.
    """
    found = projections_of(layers, x)
    if found is None:
        return None
    if shared:
        _check_rates({each.dropout_p for each in found if each.dropout_p})
    return projections(x, found, shared_dropout=shared)


# --- one mask for all -------------------------------------------------------------------------------------------------


def _rates(layer: Any) -> list[float]:
    """dropout_p of the adapters in force."""
    if layer.merged:
        return []
    if not isinstance(layer, AdaptedLinear):
        found: list[float] = layer.dropout_rates()
        return found
    return [] if layer._disabled else [layer.adapter_configs[name].lora_dropout for name in layer.active_adapters]


def _check_rates(rates: set[float], where: str = "layers") -> None:
    if len(rates) > 1:
        raise ConfigError(
            f"shared_dropout needs one dropout_p in a group, got {', '.join(map(str, sorted(rates)))} of {where}: give "
            "their adapters one, or group them without it"
        )


def _warn_apart(layers: Sequence[Any]) -> None:
    if any(layer.training and any(_rates(layer)) for layer in layers):
        warnings.warn(
            "layers grouped with shared_dropout=True were computed one by one (merged, disabled or several adapters, "
            "hooks, another x or gradient mode): each dropped by a mask of its own",
            stacklevel=2,
        )


class Scope:
    """A parent's call."""

    def __init__(self, parent: nn.Module, groups: Groups) -> None:
        self.rounds: dict[int, _Round] = {}
        self.layers: list[nn.Module] = []
        context, children = _context(), parent._modules
        for names in groups.names:
            layers: list[Any] = [children.get(name) for name in names]
            if all(layer is not None and groupable(layer) for layer in layers):
                one = _Round(layers, context, groups.shared)
                self.rounds |= {id(layer): one for layer in layers}
                self.layers += layers

    def output(self, layer: nn.Module, x: Tensor) -> Tensor | None:
        """The layer's output by its group; None where it must compute it itself."""
        if torch.compiler.is_compiling():
            return None
        one = self.rounds.get(id(layer))
        return None if one is None else one.take(layer, x)


def _open(parent: nn.Module, args: Any) -> None:
    groups = parent.__dict__.get(STATE)
    if groups is None or torch.compiler.is_compiling():
        return
    scope = Scope(parent, groups)
    for layer in scope.layers:
        layer.__dict__[SCOPE] = scope


def _close(parent: nn.Module, args: Any, output: Any) -> None:
    if torch.compiler.is_compiling():
        return
    for child in parent._modules.values():
        if child is not None:
            child.__dict__.pop(SCOPE, None)


# --- the layers -------------------------------------------------------------------------------------------------------


def grouped(layer: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> Tensor | None:
    """The layer's output by its group, while its parent runs; None where it must compute it itself."""
    scope: Scope = layer.__dict__[SCOPE]
    return None if args or kwargs else scope.output(layer, x)


def projection_of(
    x: Tensor,
    weight: Any,
    a: Tensor,
    b: Tensor,
    scale: float | Tensor,
    bias: Tensor | None,
    p: float,
    seed: None,
    stream: int,
    magnitude: Tensor | None,
    dora_dropout: str,
    backend: None,
    on_grid: bool = False,
    compute_dtype: torch.dtype | None = None,
) -> Projection:
    """What `ops.lora.dense_linear` and `ops.qlora.packed_linear` take, as a group takes it."""
    return Projection(weight, a, b, scale, bias, magnitude, p, stream, dora_dropout, on_grid, compute_dtype)


def own_projection(layer: AdaptedLinear, x: Tensor) -> Projection | None:
    """One of our layers as a group takes it; None where it is merged or several adapters are active."""
    names = [] if layer._disabled else layer.active_adapters
    if (layer.merged and not layer._disabled) or len(names) > 1:
        return None
    base = layer._base()
    packed = isinstance(base, QuantizedWeight)
    weight, on_grid = (base.pack(), base.absmax_on_grid) if packed else (base, False)
    plain = Projection(weight, bias=layer.bias, on_grid=on_grid, compute_dtype=layer.compute_dtype if packed else None)
    if not packed and (weight.requires_grad or (weight.dtype != x.dtype and autocast_dtype(x) is None)):
        return None
    if not names:
        return plain
    name, config = names[0], layer.adapter_configs[names[0]]
    return plain._replace(
        a=layer.effective_a(name),
        b=layer.lora_B[name],
        scale=layer.scaling[name],
        magnitude=layer.lora_magnitude._parameters.get(name),
        dropout_p=config.lora_dropout if layer.training else 0.0,
        stream=layer.stream(name),
        dora_dropout=config.dora_dropout,
    )


def groupable(layer: Any) -> bool:
    """Whether it is an adapted layer of ours."""
    return isinstance(layer, AdaptedLinear) or hasattr(type(layer), "projection")


# --- a model's groups -------------------------------------------------------------------------------------------------


class _Watch:
    """Hooks that note, in every call of a parent, which x each of its layers is given."""

    def __init__(self, parent: nn.Module) -> None:
        self.names = {id(child): name for name, child in parent._modules.items() if child is not None}
        self.layers = [child for child in parent._modules.values() if child is not None and groupable(child)]
        self.seen: list[tuple[str, Any, int]] = []
        self.found: list[set[tuple[str, ...]]] = []
        self.example: Any = None  # what the parent was called with, if that is one thing
        self.handles = [layer.register_forward_pre_hook(self._note, with_kwargs=True) for layer in self.layers]
        self.handles.append(parent.register_forward_pre_hook(self._start, with_kwargs=True))
        self.handles.append(parent.register_forward_hook(self._end))

    def _start(self, parent: nn.Module, args: Any, kwargs: Any) -> None:
        self.seen = []
        self.example = args[0].clone() if len(args) == 1 and not kwargs and isinstance(args[0], Tensor) else None

    def _note(self, layer: nn.Module, args: Any, kwargs: Any) -> None:
        x = args[0] if args else next(iter(kwargs.values()), None)
        if isinstance(x, Tensor):
            self.seen.append((self.names[id(layer)], x, _version(x)))

    def _end(self, parent: nn.Module, args: Any, output: Any) -> None:
        called = [name for name, *_ in self.seen]
        inputs: dict[tuple[int, int], list[str]] = {}
        for name in self.names.values():  # in the parent's own order
            if called.count(name) == 1:
                _, x, version = self.seen[called.index(name)]
                inputs.setdefault((id(x), version), []).append(name)
        self.found.append({tuple(names) for names in inputs.values() if len(names) > 1})

    def remove(self) -> None:
        """Take the hooks away."""
        for handle in self.handles:
            handle.remove()

    def groups(self) -> tuple[tuple[str, ...], ...]:
        """The groups that every call has shown."""
        self.remove()
        self.seen = []
        return tuple(sorted(set.intersection(*self.found))) if self.found else ()


def _parents(model: nn.Module) -> Iterator[nn.Module]:
    """Modules with two or more adapted layers of ours right below them."""
    for module in model.modules():
        below = [child for child in module._modules.values() if child is not None and groupable(child)]
        if len(below) > 1 and not groupable(module):
            yield module


def _example(model: nn.Module) -> dict[str, Tensor]:
    """The inputs transformers keeps for trying a model out, on its device."""
    inner: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    found = getattr(inner, "dummy_inputs", None)
    if not isinstance(found, dict):
        raise ConfigError(
            f"{type(inner).__name__} has no dummy_inputs to try it with: call fastlora.group(model, *inputs) with an "
            "example"
        )
    device = next(inner.parameters()).device
    return {name: value.to(device) for name, value in found.items() if isinstance(value, Tensor)}


def group(model: Model, *args: Any, shared_dropout: bool = False, **kwargs: Any) -> Model:
    """Let adapted layers that read one input be computed together: q, k and v; gate and up, with the activation.

    For layers of `convert`, and for PEFT's that `accelerate` has taken in. Which layers read one tensor is found by
    calling the model once, without gradients and with the random state put back; nothing about names is assumed. A
    module that turns out to be down(act(gate(x)) * up(x)), to the bit, also keeps neither act(gate(x)) nor the product
    for the backward, which makes them again.
    Outputs and gradients are those of the single layers, but that dx is added in one buffer, and that a group draws one
    dropout seed: a seeded run with dropout has other masks. Whatever a layer cannot do in a group (merged or disabled
    adapters, several of them, weights that a hook prepares, torch.compile) it does by itself. Calling it again finds
    the groups anew.

    Args:
        model: any module that holds such layers.
        args, kwargs: an example of what its forward takes; by default what transformers keeps for its models.
        shared_dropout: the layers of a group drop the same elements of their input, where PEFT drops for each anew; on
            a GPU they then share their passes over x as without dropout. A layer that computes itself drops by itself,
            and a warning says so (under torch.compile, and in mixed batches, nothing does). Rates that come to differ
            later, as by another adapter, are a ConfigError of the next forward in training.

    Returns:
        The same model.

    Raises:
        ConfigError: no module holds two adapted layers, no two of them read one tensor, no example is at hand, or with
            `shared_dropout` the adapters of a group differ in their dropout_p; the model has no groups then.
    """
    ungroup(model)
    parents = list(_parents(model))
    if not parents:
        raise ConfigError(f"{type(model).__name__} has no module with two adapted layers to group")
    given = kwargs if args or kwargs else _example(model)
    watches = [_Watch(parent) for parent in parents]
    try:
        with torch.random.fork_rng(), torch.no_grad():
            model(*args, **given)
    finally:
        found = [watch.groups() for watch in watches]
    if not any(found):
        raise ConfigError(f"no two adapted layers of {type(model).__name__} read one tensor in that call")
    if shared_dropout:
        for parent, groups in zip(parents, found, strict=True):
            for together in groups:
                rates = {rate for name in together for rate in _rates(parent.get_submodule(name))}
                _check_rates(rates, f"{', '.join(together)} in a {type(parent).__name__}")
    for parent, watch, groups in zip(parents, watches, found, strict=True):
        if groups:
            names = gated.find(parent, [watch.names[id(layer)] for layer in watch.layers], watch.example)
            parent.register_forward_pre_hook(_open)
            parent.register_forward_hook(_close, always_call=True)
            parent.__dict__[STATE] = Groups(groups, shared_dropout)
            if names is not None and set(names[:2]) in map(set, groups):
                gated.fuse(parent, names)
    return model


def check_asked(asked: Any, shared_dropout: bool) -> None:
    """Raise ConfigError where `shared_dropout` is given to `convert` or `accelerate` without groups."""
    if shared_dropout and asked is False:
        raise ConfigError("shared_dropout=True is about groups: ask for group as well (True, or an example input)")


def group_if_asked(model: nn.Module, asked: Any, shared_dropout: bool) -> None:
    """`group` by what `convert` and `accelerate` take: False, True, or an example: a tensor, a tuple or a dict.

    Raises:
        ConfigError: as `group`. DtypeError: anything else was given.
    """
    if asked is False:
        return
    if asked is True:
        group(model, shared_dropout=shared_dropout)
    elif isinstance(asked, dict):
        group(model, shared_dropout=shared_dropout, **asked)
    elif isinstance(asked, (tuple, Tensor)):
        group(model, *(asked if isinstance(asked, tuple) else (asked,)), shared_dropout=shared_dropout)
    else:
        raise DtypeError(f"group must be True, False or an example input, got {type(asked).__name__}")


def ungroup(model: Model) -> Model:
    """Take away what `group` added: every layer computes itself. A model without groups stays as it is.

    Returns:
        The same model.

    Raises:
        ConfigError: a module has been given another class since.
    """
    for parent in model.modules():
        gated.restore(parent)
        if parent.__dict__.pop(STATE, None) is None:
            continue
        for hooks, own in ((parent._forward_pre_hooks, _open), (parent._forward_hooks, _close)):
            for key in [key for key, hook in hooks.items() if hook is own]:
                del hooks[key]
                parent._forward_hooks_always_called.pop(key, None)
    return model


def groups_of(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Full name of each layer that is in a group -> full names of the group's layers."""
    found: dict[str, tuple[str, ...]] = {}
    for name, module in model.named_modules():
        mlp = module.__dict__.get(GATED)
        for names in _groups(module).names:
            if mlp is not None and set(names) == set(mlp[:2]):
                names = (*names, mlp.down)
            full = _full(name, names)
            found |= dict.fromkeys(full, full)
    return found


def masks_of(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Full name of each layer whose group has one mask -> full names of the layers that drop by it."""
    found: dict[str, tuple[str, ...]] = {}
    for name, module in model.named_modules():
        for names in _groups(module).names if shares_masks(module) else ():
            full = _full(name, names)
            found |= dict.fromkeys(full, full)
    return found


def shares_masks(parent: nn.Module) -> bool:
    """Whether the layers of each of its groups drop by one mask."""
    return _groups(parent).shared


def _groups(parent: nn.Module) -> Groups:
    found: Groups = parent.__dict__.get(STATE, Groups(()))
    return found


def _full(parent: str, names: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(f"{parent}.{own}" if parent else own for own in names)
