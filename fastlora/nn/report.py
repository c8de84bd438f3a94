"""What runs where: each adapted layer of a model, PEFT's or ours, and why some are left to PEFT."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastlora import settings
from fastlora.errors import ConfigError, DtypeError
from fastlora.nn.adapted import AdaptedLinear
from fastlora.nn.gated import GATED
from fastlora.nn.groups import groups_of, masks_of
from fastlora.nn.memory import held
from fastlora.nn.quantized import QuantizedWeight

FUSED, LEFT = "fused", "PEFT"


class LayerReport(NamedTuple):
    """One adapted layer.

    Attributes:
        name: of the layer in the model.
        kind: of adapter and base, as "DoRA over nf4".
        path: "fused" (our kernels) or "PEFT" (PEFT's own forward).
        why: why it is left to PEFT, now or at its last call; "" where it is not.
        saved: bytes a token kept for the backward besides x; None where PEFT's forward runs.
        group: names of the layers it is computed with (`fastlora.group`), itself among them; () for none.
        held: bytes its forward has kept, measured; None unless an example was given.
        mask: names of the layers that drop by one mask (`shared_dropout`), itself among them; () where it has its own.
    """

    name: str
    kind: str
    path: str
    why: str
    saved: int | None
    group: tuple[str, ...] = ()
    held: int | None = None
    mask: tuple[str, ...] = ()


class Report(tuple[LayerReport, ...]):
    """The rows of `report`; prints as a table.

    Attributes:
        memory: whether the table shows the bytes saved for the backward.
        rest: bytes kept outside the adapted layers, where it was measured.
    """

    memory: bool = False
    rest: int | None = None

    @property
    def fused(self) -> list[str]:
        """Names of the layers on our kernels."""
        return [row.name for row in self if row.path == FUSED]

    @property
    def left(self) -> dict[str, str]:
        """Name -> reason of the layers left to PEFT."""
        return {row.name: row.why for row in self if row.path == LEFT}

    def __str__(self) -> str:
        head = ("layer", "adapter", "runs", *(name for name, shown in self._optional() if shown), "why")
        lines = [head, *(self._cells(row) for row in self)]
        widths = [max(len(line[column]) for line in lines) for column in range(len(head) - 1)]
        table = ["  ".join([*map(str.ljust, line, widths), line[-1]]).rstrip() for line in lines]
        last = f"{len(self.fused)} of {len(self)} layers fused"
        if self.rest is not None:
            last += f"; {sum(row.held or 0 for row in self)} B held by them, {self.rest} B by the rest of the model"
        return "\n".join([*table, last])

    def _optional(self) -> tuple[tuple[str, bool], ...]:
        return (
            ("with", any(row.group for row in self)),
            ("saved/token", self.memory),
            ("held", self.rest is not None),
        )

    def _cells(self, row: LayerReport) -> tuple[str, ...]:
        alike: list[str] = []
        others: list[str] = []
        for name in row.group:
            if name != row.name:
                (alike if name in row.mask else others).append(name.rpartition(".")[2])
        together = ", ".join(([f"{', '.join(alike)} (one mask)"] if alike else []) + others)
        cells = (together or "-", "-" if row.saved is None else f"{row.saved} B", f"{row.held} B")
        shown = (cell for cell, (_, wanted) in zip(cells, self._optional(), strict=True) if wanted)
        return (row.name or "(itself)", row.kind, row.path, *shown, row.why)


def saved_bytes(k: int, n: int, r: int, *, dropout: bool, dora: bool, dtype: torch.dtype) -> int:
    """Bytes a token kept for the backward besides x: h in fp32, the dropout bits, DoRA's z in the dtype of x."""
    mask = (k + 7) // 8 if dropout and not settings.current.low_memory else 0
    return 4 * r + mask + (n * dtype.itemsize if dora else 0)


def report(model: nn.Module, memory: Any = False) -> Report:
    """Each adapted layer of a model: on our kernels and with which others, or left to PEFT and why.

    Args:
        model: with layers of `convert`, or of PEFT (accelerated or not).
        memory: also show what a training step keeps for the backward. True: bytes a token besides x, from the layers'
            sizes. An example of the model's input (a tensor, a tuple, or a dict of keywords) besides calls the model
            with it, in its present mode, and measures the bytes kept by each layer, x among them unless somebody kept
            it before; of layers computed together the first has all.

    Returns:
        A `Report`: a tuple of `LayerReport` that prints as a table.

    Raises:
        ConfigError: no adapted layers. DtypeError: `memory` is none of these.
    """
    if not isinstance(memory, (bool, Tensor, tuple, dict)):
        raise DtypeError(f"memory must be True, False or an example input, got {type(memory).__name__}")
    rows = list(_own(model))
    if sys.modules.get("peft") is not None:  # a model of PEFT's has imported it
        rows += _of_peft(model)
    if not rows:
        raise ConfigError(f"{type(model).__name__} has no adapted layers, neither PEFT's nor fastlora's")
    together, masks = groups_of(model), masks_of(model)
    rows = [row._replace(group=together.get(row.name, ()), mask=masks.get(row.name, ())) for row in rows]
    rest = None
    if not isinstance(memory, bool):
        rows, rest = _measured(model, rows, memory)
    found = Report(rows)
    found.memory, found.rest = memory is not False, rest
    return found


def _measured(model: nn.Module, rows: list[LayerReport], example: Any) -> tuple[list[LayerReport], int]:
    """The rows with the bytes their layers kept in a call of the model, and those kept elsewhere."""
    args: tuple[Any, ...] = () if isinstance(example, dict) else example if isinstance(example, tuple) else (example,)
    kwargs: dict[str, Any] = example if isinstance(example, dict) else {}
    layers = {row.name: model.get_submodule(row.name) for row in rows}
    for row in rows:  # the layers of a gated MLP are not called: the first stands for all
        parent = model.get_submodule(row.name.rpartition(".")[0])
        if row.group and GATED in parent.__dict__ and row.name in row.group:
            del layers[row.name]
            layers[row.group[0]] = parent
    found = held(model, layers, lambda: model(*args, **kwargs))
    return [row._replace(held=found.layers.get(row.name, 0)) for row in rows], found.rest


def _own(model: nn.Module) -> Iterator[LayerReport]:
    for name, layer in model.named_modules():
        if not isinstance(layer, AdaptedLinear):
            continue
        base = layer._base()
        if isinstance(base, QuantizedWeight):
            kind, dtype = base.quant_type, layer.compute_dtype or torch.float32
        else:
            kind, dtype = _short(base.dtype), base.dtype
        active = layer.active_adapters
        config = layer.adapter_configs[active[0]] if active else None
        dora, saved = bool(config and config.use_dora), 0
        if config is not None and not layer.merged:
            sizes = (layer.in_features, layer.out_features, config.r)
            saved = saved_bytes(*sizes, dropout=config.lora_dropout > 0, dora=dora, dtype=dtype)
        method = "AdaLoRA" if active and active[0] in layer.lora_E else "DoRA" if dora else "LoRA"
        yield LayerReport(name, f"{method} over {kind}", FUSED, "", saved)


def _of_peft(model: nn.Module) -> Iterator[LayerReport]:
    from fastlora.nn import accelerate

    for name, layer in accelerate.tuner_layers(model):
        ours = accelerate.is_ours(layer)
        why, remembered = accelerate.why_left(layer), getattr(layer, accelerate.layers().LEFT, "")
        if not why and remembered:
            why = f"at its last call {remembered}"
        if not ours and accelerate.swappable(layer):
            why = "not accelerated: call fastlora.accelerate(model)"
        kind, saved = _peft_kind(layer, fused=not why)
        yield LayerReport(name, kind, LEFT if why else FUSED, why, saved)


def _peft_kind(layer: Any, fused: bool) -> tuple[str, int | None]:
    base = layer.get_base_layer()
    weight: Any = getattr(base, "weight", None)
    adapter = next((name for name in layer.active_adapters if name in getattr(layer, "lora_A", ())), None)
    dora = adapter is not None and adapter in getattr(layer, "lora_magnitude_vector", {})
    if type(weight).__name__ == "Params4bit":
        kind, dtype = weight.quant_type, base.compute_dtype or torch.float32
    else:
        dtype = weight.dtype if isinstance(weight, torch.Tensor) else torch.float32
        kind = _short(dtype) if type(base) is nn.Linear else type(base).__name__
    saved = None
    if fused and adapter is not None:
        drop = getattr(layer.lora_dropout[adapter], "p", 0.0) > 0
        r = layer.lora_A[adapter].weight.shape[0]
        saved = saved_bytes(layer.in_features, layer.out_features, r, dropout=drop, dora=dora, dtype=dtype)
    method = "AdaLoRA" if hasattr(layer, "lora_E") else "DoRA" if dora else "LoRA"
    return f"{method} over {kind}", saved


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
