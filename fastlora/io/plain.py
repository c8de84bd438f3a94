"""An adapter under the names its tensors have in the adapted model itself, as pure functions.

These are the keys of `model.state_dict()`, so that `model.load_state_dict(tensors, strict=False)` takes them:
  {module}.lora_A.{adapter} [r, in]   .lora_B.{adapter} [out, r]
  {module}.lora_E.{adapter} [r, 1] (AdaLoRA)   .lora_magnitude.{adapter} [out] (DoRA)
and of a mixture of experts, whose modules all lie under "model.":
  {module}.gate.weight [E, in]   {projection}.lora_A [E, r, in]   .lora_B [E, out, r]   .lora_magnitude [E, out]
What an adapter trains besides (biases, modules_to_save) has its parameter's own name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from fastlora.errors import StateDictError
from fastlora.io.moe_peft import Experts, MoeCheckpoint
from fastlora.io.peft import AdapterTensors, Checkpoint

WEIGHTS_NAME = "adapter.safetensors"  # not PEFT's name: PEFT would load foreign keys as an adapter that does nothing
MODEL = "model."
_KINDS = {"lora_A": "a", "lora_B": "b", "lora_magnitude": "magnitude", "lora_E": "e"}
_KEY = re.compile(rf"(?P<module>.+)\.(?P<kind>{'|'.join(_KINDS)})\.(?P<adapter>[^.]+)")
_STACKED = re.compile(r"(?P<module>.+)\.(?P<kind>lora_A|lora_B|lora_magnitude)")
_GATE = re.compile(r"(?P<module>.+)\.gate\.weight")


def to_state(checkpoint: Checkpoint, adapter_name: str = "default") -> dict[str, Tensor]:
    """The model's own keys for a checkpoint."""
    state = dict(checkpoint.others)
    for module, tensors in checkpoint.adapters.items():
        for kind, field in _KINDS.items():
            tensor = getattr(tensors, field)
            if tensor is not None:
                state[f"{module}.{kind}.{adapter_name}"] = tensor
    return state


def from_state(state: Mapping[str, Tensor]) -> Checkpoint:
    """The inverse of `to_state`, of one adapter.

    Raises:
        StateDictError: no adapter, half of one, or several.
    """
    parts: dict[str, dict[str, Tensor]] = {}
    others: dict[str, Tensor] = {}
    names: set[str] = set()
    for key, tensor in state.items():
        found = _KEY.fullmatch(key)
        if found is None:
            others[key] = tensor
            continue
        names.add(found["adapter"])
        parts.setdefault(found["module"], {})[_KINDS[found["kind"]]] = tensor
    if len(names) != 1:
        raise StateDictError(f"expected the tensors of one adapter, got {', '.join(sorted(names)) or 'none'}")
    return Checkpoint({module: _joined(module, found) for module, found in parts.items()}, others)


def _joined(module: str, found: Mapping[str, Tensor]) -> AdapterTensors:
    for kind, field in _KINDS.items():
        if field in ("a", "b") and field not in found:
            raise StateDictError(f"the adapter of {module} is incomplete: {kind} is missing")
    a, b = found["a"], found["b"]
    if a.dim() != 2 or b.dim() != 2 or a.shape[0] != b.shape[1]:
        raise StateDictError(
            f"{module}: expected lora_A [r, in] and lora_B [out, r], got {tuple(a.shape)} and {tuple(b.shape)}"
        )
    return AdapterTensors(a, b, found.get("magnitude"), found.get("e"))


def moe_to_state(checkpoint: MoeCheckpoint, adapter_name: str = "default") -> dict[str, Tensor]:
    """The model's own keys for a mixture of experts."""
    linears = {f"{MODEL}{module}": tensors for module, tensors in checkpoint.linears.items()}
    state = to_state(Checkpoint(linears, {}), adapter_name)
    state |= {f"{MODEL}{module}.gate.weight": gate for module, gate in checkpoint.gates.items()}
    for module, experts in checkpoint.experts.items():
        state |= {f"{MODEL}{module}.lora_A": experts.a, f"{MODEL}{module}.lora_B": experts.b}
        if experts.magnitude is not None:
            state[f"{MODEL}{module}.lora_magnitude"] = experts.magnitude
    return state


def moe_from_state(state: Mapping[str, Tensor], method: str) -> MoeCheckpoint:
    """The inverse of `moe_to_state`; `moe_peft.to_state` and `from_state` check what it holds.

    Args:
        method: a key of `moe_peft.METHODS`.

    Raises:
        StateDictError: a foreign key, or half an expert.
    """
    gates: dict[str, Tensor] = {}
    stacked: dict[str, dict[str, Tensor]] = {}
    plain: dict[str, Tensor] = {}
    for key, tensor in state.items():
        name = key.removeprefix(MODEL)
        if gate := _GATE.fullmatch(name):
            gates[gate["module"]] = tensor
        elif _KEY.fullmatch(name):
            plain[name] = tensor
        elif part := _STACKED.fullmatch(name):
            stacked.setdefault(part["module"], {})[part["kind"]] = tensor
        else:
            raise StateDictError(f"{key!r} is no key of a mixture of experts")
    experts = {}
    for module, found in stacked.items():
        if missing := {"lora_A", "lora_B"} - set(found):
            raise StateDictError(f"the experts of {module} are incomplete: {missing.pop()} is missing")
        experts[module] = Experts(found["lora_A"], found["lora_B"], found.get("lora_magnitude"))
    return MoeCheckpoint(method, gates, experts, from_state(plain).adapters if plain else {})
