"""MoE-PEFT's checkpoints of MixLoRA, LoRAMoE and MoLA as pure functions: the keys, and what its config JSON says.

Keys, after "mixlora.", "loramoe." or "mola." and "layers.{L}.":
  mlp.moe_gate.weight [E, in]   (MixLoRA: one gate for the MLP)   {block}.{proj}.moe_gate.weight [E, in]   (the others)
  {block}.{proj}.experts.{e}.lora_A.weight [r, in]   ….lora_B.weight [out, r]
  {block}.{proj}.lora_A.weight [r, in]   ….lora_B.weight [out, r]   (linears without experts: plain LoRA)
  ….lora_magnitude_vector [out] beside A and B: DoRA. MoE-PEFT neither saves nor reads it; it is PEFT's name.
Older MixLoRA files, read only: gate.weight, experts.{e}.{proj}.lora_A.weight with w1_proj (gate), w2_proj (down) and
w3_proj (up), routing strategy "mixtral".
Source: https://github.com/TUDB-Labs/MoE-PEFT, `moe_peft/model.py` as of 2.0.2; for the older files mLoRA's `model.py`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastlora.errors import StateDictError
from fastlora.io.peft import CONFIG_NAME, AdapterTensors

METHODS = {"MIXLORA": "mixlora", "LORAMOE": "loramoe", "MOLA": "mola"}  # peft_type -> prefix of the keys
PICKLE_NAME = "adapter_model.bin"
# How MoE-PEFT's keys of plain LoRA begin.
LORA_PREFIX = "base_model.model.model.layers."

_STRATEGIES = {
    "mixlora": "MIXLORA",
    "mixlora-dynamic": "MIXLORA",
    "mixlora-switch": "MIXLORA",
    "loramoe": "LORAMOE",
    "mola": "MOLA",
}
_OLD_NAMES = {"w1_proj": "gate_proj", "w2_proj": "down_proj", "w3_proj": "up_proj"}
_KEY = re.compile(r"(?P<method>\w+)\.(?P<rest>layers\.\d+\..+)")
_OLD_GATE = re.compile(r"(layers\.\d+)\.gate\.weight")
_OLD_EXPERT = re.compile(r"(layers\.\d+)\.(experts\.\d+)\.(\w+)\.(.+)")
_GATE = re.compile(r"(?P<module>.+)\.moe_gate\.weight")
_TENSOR = re.compile(
    r"(?P<module>.+?)(?:\.experts\.(?P<expert>\d+))?\.(?P<kind>lora_A|lora_B|lora_magnitude_vector)(?:\.weight)?"
)


class Experts(NamedTuple):
    """One projection's experts, stacked."""

    a: Tensor  # [E, r, in]
    b: Tensor  # [E, out, r]
    magnitude: Tensor | None = None  # [E, out]


class MoeCheckpoint(NamedTuple):
    """A whole adapter. Modules are named from their layer on: "layers.3.mlp.up_proj"."""

    method: str  # a key of METHODS
    gates: dict[str, Tensor]  # [E, in], by the MLP (MixLoRA) or by the projection
    experts: dict[str, Experts]  # by the projection
    linears: dict[str, AdapterTensors]  # without experts, by the projection


def owner(method: str, projection: str) -> str:
    """The module whose gate routes a projection's experts."""
    return projection.rpartition(".")[0] if method == "MIXLORA" else projection


# --- tensors ----------------------------------------------------------------------------------------------------------


def to_state(checkpoint: MoeCheckpoint) -> dict[str, Tensor]:
    """MoE-PEFT's keys for a checkpoint, magnitudes beside them."""
    prefix = METHODS[checkpoint.method]
    state = {f"{prefix}.{module}.moe_gate.weight": gate for module, gate in checkpoint.gates.items()}
    for module, experts in checkpoint.experts.items():
        for index, (a, b) in enumerate(zip(experts.a, experts.b, strict=True)):
            magnitude = None if experts.magnitude is None else experts.magnitude[index]
            state |= _three(f"{prefix}.{module}.experts.{index}", a, b, magnitude)
    for module, tensors in checkpoint.linears.items():
        state |= _three(f"{prefix}.{module}", tensors.a, tensors.b, tensors.magnitude)
    return state


def _three(stem: str, a: Tensor, b: Tensor, magnitude: Tensor | None) -> dict[str, Tensor]:
    state = {f"{stem}.lora_A.weight": a, f"{stem}.lora_B.weight": b}
    return state if magnitude is None else state | {f"{stem}.lora_magnitude_vector": magnitude}


def is_moe_state(keys: Iterable[str]) -> bool:
    """Whether the keys are a mixture's, of any method."""
    return any(key.partition(".")[0] in METHODS.values() for key in keys)


def from_state(state: Mapping[str, Tensor]) -> MoeCheckpoint:
    """The inverse of `to_state`; reads older MixLoRA files too.

    Raises:
        StateDictError: a foreign key, keys of two methods, an expert or a gate missing, shapes that do not go together.
    """
    methods: set[str] = set()
    gates: dict[str, Tensor] = {}
    parts: dict[tuple[str, int | None], dict[str, Tensor]] = {}
    for key, tensor in state.items():
        found = _KEY.fullmatch(key)
        if found is None or found["method"] not in METHODS.values():
            raise StateDictError(f"{key!r} is no key of MixLoRA, LoRAMoE or MoLA: not such a checkpoint, or not whole")
        methods.add(found["method"])
        rest = _modern(found["rest"])
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            raise StateDictError(
                f"{key}: expected a floating-point tensor, got {getattr(tensor, 'dtype', type(tensor))}"
            )
        if gate := _GATE.fullmatch(rest):
            gates[gate["module"]] = tensor
        elif part := _TENSOR.fullmatch(rest):
            expert = None if part["expert"] is None else int(part["expert"])
            parts.setdefault((part["module"], expert), {})[part["kind"]] = tensor
        else:
            raise StateDictError(f"cannot read {key!r}: only gates, lora_A, lora_B and lora_magnitude_vector are known")
    if len(methods) != 1:
        raise StateDictError(f"expected the keys of one method, got {' and '.join(sorted(methods)) or 'none'}")
    method = next(name for name, prefix in METHODS.items() if prefix in methods)
    joined = {place: _joined(place, tensors) for place, tensors in parts.items()}
    linears = {module: tensors for (module, expert), tensors in joined.items() if expert is None}
    checkpoint = MoeCheckpoint(method, gates, _stacked(joined), linears)
    _check(checkpoint)
    return checkpoint


def _modern(rest: str) -> str:
    """A key without its method, in today's words."""
    if old := _OLD_GATE.fullmatch(rest):
        return f"{old[1]}.mlp.moe_gate.weight"
    if old := _OLD_EXPERT.fullmatch(rest):
        return f"{old[1]}.mlp.{_OLD_NAMES.get(old[3], old[3])}.{old[2]}.{old[4]}"
    return rest


def _joined(place: tuple[str, int | None], found: dict[str, Tensor]) -> AdapterTensors:
    name = place[0] if place[1] is None else f"{place[0]}.experts.{place[1]}"
    for kind in ("lora_A", "lora_B"):
        if kind not in found:
            raise StateDictError(f"the adapter of {name} is incomplete: {kind} is missing")
    a, b, magnitude = found["lora_A"], found["lora_B"], found.get("lora_magnitude_vector")
    if a.dim() != 2 or b.dim() != 2 or b.shape[1] != a.shape[0]:
        raise StateDictError(
            f"{name}: expected lora_A [r, in] and lora_B [out, r], got {tuple(a.shape)} and {tuple(b.shape)}"
        )
    if magnitude is not None and tuple(magnitude.shape) != (b.shape[0],):
        raise StateDictError(f"{name}: expected a magnitude [{b.shape[0]}], got {tuple(magnitude.shape)}")
    return AdapterTensors(a, b, magnitude)


def _stacked(joined: Mapping[tuple[str, int | None], AdapterTensors]) -> dict[str, Experts]:
    """The experts of each projection in one tensor a kind."""
    rows: dict[str, dict[int, AdapterTensors]] = {}
    for (module, expert), tensors in joined.items():
        if expert is not None:
            rows.setdefault(module, {})[expert] = tensors
    made = {}
    for module, experts in rows.items():
        if missing := sorted(set(range(max(experts) + 1)) - set(experts)):
            raise StateDictError(f"expert {missing[0]} of {module} is missing: the checkpoint has {sorted(experts)}")
        ordered = [experts[index] for index in range(len(experts))]
        shapes = {(tuple(one.a.shape), tuple(one.b.shape), one.magnitude is None) for one in ordered}
        if len(shapes) > 1:
            raise StateDictError(f"the experts of {module} differ in shape, or only some have magnitudes")
        magnitudes = [one.magnitude for one in ordered if one.magnitude is not None]
        made[module] = Experts(
            torch.stack([one.a for one in ordered]),
            torch.stack([one.b for one in ordered]),
            torch.stack(magnitudes) if magnitudes else None,
        )
    return made


def _check(checkpoint: MoeCheckpoint) -> None:
    """Every expert has a gate, every gate experts, and they go together."""
    routed = {owner(checkpoint.method, module): module for module in checkpoint.experts}
    for module, projection in routed.items():
        if module not in checkpoint.gates:
            raise StateDictError(f"the gate of {module} is missing: nothing routes the experts of {projection}")
    for module, gate in checkpoint.gates.items():
        if module not in routed:
            raise StateDictError(f"{module} has a gate and no experts: they are missing")
        if gate.dim() != 2:
            raise StateDictError(f"{module}: expected a gate [E, in], got {tuple(gate.shape)}")
    for projection, experts in checkpoint.experts.items():
        gate = checkpoint.gates[owner(checkpoint.method, projection)]
        if experts.a.shape[0] != gate.shape[0]:
            raise StateDictError(
                f"{projection}: expected the {gate.shape[0]} experts its gate has, got {experts.a.shape[0]}"
            )


# --- config -----------------------------------------------------------------------------------------------------------


def fields_from_json(text: str) -> dict[str, Any]:
    """The fields of adapter_config.json in today's words: `peft_type` is set, `target_modules` a list.

    A known peft_type decides the method; without one the routing strategy does, as in MoE-PEFT.

    Raises:
        StateDictError: not JSON, or of no method we know.
    """
    try:
        fields = json.loads(text)
    except json.JSONDecodeError as error:
        raise StateDictError(f"{CONFIG_NAME} is not JSON: {error}") from None
    if not isinstance(fields, dict):
        raise StateDictError(f"expected an object in {CONFIG_NAME}, got {type(fields).__name__}")
    if fields.get("routing_strategy") == "mixtral":
        fields["routing_strategy"] = "mixlora"
    kind, strategy = fields.get("peft_type"), fields.get("routing_strategy")
    if kind not in METHODS:
        kind = _STRATEGIES.get(strategy) if kind is None and isinstance(strategy, str) else None
    if kind is None:
        raise StateDictError(
            f"expected peft_type {', '.join(METHODS)} in {CONFIG_NAME}, or a routing_strategy of them, got "
            f"{fields.get('peft_type')!r} and {strategy!r}"
        )
    if strategy is not None and _STRATEGIES.get(strategy) != kind:
        raise StateDictError(f"{CONFIG_NAME}: routing_strategy {strategy!r} is none of {kind}'s")
    targets = fields.get("target_modules")
    if isinstance(targets, Mapping):
        targets = [name for name, wanted in targets.items() if wanted]
    if isinstance(targets, list):
        fields["target_modules"] = [_OLD_NAMES.get(name, name) for name in targets]
    return fields | {"peft_type": kind}
