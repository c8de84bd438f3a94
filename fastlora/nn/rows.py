"""One adapter a row, through the grouped kernels; and several adapters on every row, as plain deltas."""

from __future__ import annotations

import collections
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode

from fastlora.errors import ConfigError, ShapeError
from fastlora.math import philox
from fastlora.math.segments import Segments, segments
from fastlora.ops.grouped import Plain, RowAdapter, mixed_linear, plain_again, plain_of, plain_signature
from fastlora.ops.lora import _watched, autocast_dtype, draw_seed

if TYPE_CHECKING:
    from fastlora.nn.adapted import AdaptedLinear


# --- several adapters on every row ------------------------------------------------------------------------------------


def _delta(layer: AdaptedLinear, x: Tensor, keep: Tensor | None, name: str) -> Tensor:
    """scaling * drop(x) A^T B^T in at least fp32; x [m, in] -> [m, out]."""
    a, b, config = layer.effective_a(name), layer.lora_B[name], layer.adapter_configs[name]
    dtype = torch.promote_types(torch.promote_types(x.dtype, a.dtype), torch.float32)
    xd = x.to(dtype)
    if keep is not None:
        xd = xd * keep * philox.keep_scale(config.lora_dropout)
    return layer.scaling[name] * ((xd @ a.to(dtype).T) @ b.to(dtype).T)


def _keep(layer: AdaptedLinear, name: str, tokens: int, seed: Tensor | None) -> Tensor | None:
    """The dropout decision of every token row for one adapter, bool [tokens, in]; None when nothing is dropped."""
    p = layer.adapter_configs[name].lora_dropout
    if seed is None or p == 0.0:
        return None
    bits = torch.ops.fastlora.dropout_mask(seed, layer.stream(name), tokens, layer.in_features, p, "")
    return philox.unpack_bits(bits, layer.in_features)


def add_deltas(layer: AdaptedLinear, x: Tensor, y: Tensor, names: Sequence[str]) -> Tensor:
    """y plus the contribution of each active adapter, summed in fp32 and rounded once to the dtype of y."""
    flat = x.reshape(-1, layer.in_features)
    dropping = layer.training and any(layer.adapter_configs[name].lora_dropout for name in names)
    seed = draw_seed(x.device) if dropping else None
    total = y.reshape(-1, layer.out_features).to(torch.promote_types(y.dtype, torch.float32))
    with torch.amp.autocast(x.device.type, enabled=False):
        for name in names:
            total = total + _delta(layer, flat, _keep(layer, name, flat.shape[0], seed), name)
    return total.to(y.dtype).view(y.shape)


# --- one adapter a row ------------------------------------------------------------------------------------------------


class _Kept(NamedTuple):
    """The rows of one batch as every layer of a model needs them; `source` is read by the copy to the device."""

    rows: Segments
    source: Tensor
    ready: Any  # a CUDA event; None elsewhere
    stream: int


# A model's layers see the same batch one after another. Keyed by names, tokens a row, and device; the oldest goes.
_kept: collections.OrderedDict[Any, _Kept] = collections.OrderedDict()
_MOST_KEPT = 8
_captured: list[Tensor] = []  # sources that a CUDA graph's copies read again at every replay


def _sorted_rows(adapter_names: Sequence[str | None], tokens: int, device: torch.device) -> tuple[Segments, Tensor]:
    """Segments of rows * tokens from one small copy to the device, which nobody waits for; and what it copies."""
    number: dict[str | None, int] = {}
    for name in adapter_names:
        if name is not None:
            number.setdefault(name, len(number))
    groups = len(number)
    source = torch.tensor([number.get(name, groups) for name in adapter_names], dtype=torch.int64)
    if device.type == "cuda":
        source = source.pin_memory()
    owner = source.to(device, non_blocking=True)
    return segments(owner[:, None].expand(-1, tokens).reshape(-1), groups), source


def _rows_of(adapter_names: Sequence[str | None], tokens: int, device: torch.device) -> Segments:
    """`_sorted_rows`, remembered for the next layer."""
    if torch.compiler.is_compiling() or _get_current_dispatch_mode() is not None:
        return _sorted_rows(adapter_names, tokens, device)[0]
    cuda = device.type == "cuda"
    capturing = cuda and torch.cuda.is_current_stream_capturing()
    here = torch.cuda.current_stream(device) if cuda else None
    stream = here.cuda_stream if here is not None else 0
    key = (tuple(adapter_names), tokens, device)
    found = _kept.get(key)
    if found is not None:
        # A capture cannot ask; the rows were made in its warm-up then, which ends with a wait.
        if here is not None and stream != found.stream and not capturing:
            here.wait_event(found.ready)
            for tensor in found.rows:
                tensor.record_stream(here)
        return found.rows
    # Not as inference tensors, should this be inference: a later training step may save them.
    with torch.inference_mode(False), torch.no_grad():
        rows, source = _sorted_rows(adapter_names, tokens, device)
    if capturing:
        _captured.append(source)
        return rows
    _kept[key] = _Kept(rows, source, here.record_event() if here is not None else None, stream)
    while len(_kept) > _MOST_KEPT:
        _kept.popitem(last=False)
    return rows


def _row_adapters(layer: AdaptedLinear, names: Sequence[str]) -> list[RowAdapter]:
    """Every adapter of the batch; a module's attributes are slow to find, so each is looked up once.

    Raises:
        ConfigError: unknown name.
    """
    lora_a, lora_b = layer.lora_A._parameters, layer.lora_B._parameters
    factors, magnitudes = layer.lora_E._parameters, layer.lora_magnitude._parameters
    configs, scaling, training = layer.adapter_configs, layer.scaling, layer.training
    found = []
    for name in names:
        if name not in lora_a:
            layer._known(name)
        config = configs[name]
        a = layer.effective_a(name) if name in factors else lora_a[name]
        p = config.lora_dropout if training else 0.0
        own = (a, lora_b[name], scaling[name], magnitudes.get(name), p, layer.stream(name) if p else 0)
        found.append(RowAdapter(*own, config.dora_dropout, name))  # type: ignore[arg-type]
    return found


_PLAIN = "_plain_rows"  # where a layer's `__dict__` holds the `Plain` of each adapter it has served; no tensors


def _again(layer: AdaptedLinear, x: Tensor, adapter_names: Sequence[str | None]) -> Tensor | None:
    """`forward` for adapters that have not changed since their last time, without gradients and on a CPU; or None."""
    known: dict[str, Plain] | None = layer.__dict__.get(_PLAIN)
    if not known or torch.is_grad_enabled() or layer.training or layer._disabled:
        return None
    if layer.lora_E._parameters or layer.lora_magnitude._parameters:
        return None
    if type(x) is not Tensor or not x.is_cpu or torch.is_autocast_enabled("cpu"):
        return None
    lora_a, lora_b, scaling = layer.lora_A._parameters, layer.lora_B._parameters, layer.scaling
    all_a, all_b, scales, plain = [], [], [], []
    for name in dict.fromkeys(adapter_names):
        if name is None:
            continue
        a, b, found = lora_a.get(name), lora_b.get(name), known.get(name)
        if found is None or type(a) is not nn.Parameter or type(b) is not nn.Parameter:
            return None
        scale = scaling[name]
        if plain_signature(a, b, scale) != found.signature:
            return None
        all_a.append(a)
        all_b.append(b)
        scales.append(scale)
        plain.append(found)
    if not plain:
        return None
    shape, compute = x.shape, layer.compute_dtype
    rows = _rows_of(adapter_names, math.prod(shape[1:-1]), x.device)
    flat = x if len(shape) == 2 else x.reshape(-1, shape[-1])
    operand = flat if compute is None or compute is x.dtype else flat.to(compute)
    weight = layer._base_operand()
    y = plain_again(operand, weight, all_a, all_b, scales, plain, rows, layer.bias, layer._on_grid())
    if y is None:
        return None
    y = y if y.dtype is x.dtype else y.to(x.dtype)
    return y if len(shape) == 2 else torch.ops.aten._unsafe_view(y, (*shape[:-1], layer.out_features))


def _remember(layer: AdaptedLinear, adapters: Sequence[RowAdapter]) -> None:
    """What `_again` will know of these, and of earlier ones that are still there."""
    known = {name: each for name, each in layer.__dict__.get(_PLAIN, {}).items() if name in layer.lora_A._parameters}
    known |= {each.name: plain for each in adapters if (plain := plain_of(each)) is not None}
    layer.__dict__[_PLAIN] = known


def forward(layer: AdaptedLinear, x: Tensor, adapter_names: Sequence[str | None]) -> Tensor:
    """One adapter, or None, per row of the batch (the first dimension of x).

    A row without adapter gets the base output, bit for bit. Every adapter named is used, active or not; those that
    require a gradient get it.

    Raises:
        ConfigError: unknown name, or adapters are merged. ShapeError: not one name per row.
    """
    if layer.merged:
        raise ConfigError(
            f"adapter_names needs an unmerged layer; {', '.join(layer._merged_adapters)} merged: unmerge()"
        )
    if x.dim() < 2 or isinstance(adapter_names, str) or len(adapter_names) != x.shape[0]:
        got = repr(adapter_names) if isinstance(adapter_names, str) else len(adapter_names)
        raise ShapeError(f"expected one adapter name per row, {x.shape[0] if x.dim() > 1 else 1}, got {got}")
    if not torch.compiler.is_compiling() and (y := _again(layer, x, adapter_names)) is not None:
        return y
    chosen = list(dict.fromkeys(name for name in adapter_names if name is not None))
    adapters = _row_adapters(layer, chosen)
    if layer._disabled or not chosen:
        return layer.adapter_forward(x, None)
    k = layer.in_features
    if x.shape[-1] != k:
        raise ShapeError(f"expected x with last dimension in_features={k}, got shape {tuple(x.shape)}")
    cast = autocast_dtype(x)
    operand = x.to(layer.compute_dtype or cast or x.dtype)
    weight = layer._base_operand()
    tokens = 1
    for size in x.shape[1:-1]:
        tokens *= size
    y = mixed_linear(
        operand.reshape(-1, k),
        weight.to(cast) if isinstance(weight, Tensor) and cast is not None else weight,
        adapters,
        _rows_of(adapter_names, tokens, x.device),
        bias=layer.bias,
        on_grid=layer._on_grid(),
        norm_weight=weight,
    )
    if x.is_cpu and not torch.is_grad_enabled() and not layer.training and not _watched():
        _remember(layer, adapters)
    y = y if layer.compute_dtype is None else y.to(x.dtype)
    return y if x.dim() == 2 else torch.ops.aten._unsafe_view(y, (*x.shape[:-1], layer.out_features))
