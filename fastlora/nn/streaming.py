"""A folder of 16-bit weights becomes a 4-bit adapted model one tensor at a time: the dense model is never in memory."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastlora.errors import ConfigError, DtypeError, FastloraError, StateDictError
from fastlora.nn.convert import Plan, check_target, finish, plan_of, put, with_progress

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_SHOWN = 3  # keys named in an error


def load_quantized(
    folder: str | os.PathLike[str],
    config: Any = None,
    *,
    model: nn.Module | None = None,
    quantize: str = "nf4",
    blocksize: int = 64,
    double_quant: bool = True,
    compute_dtype: torch.dtype | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    adapter_name: str = "default",
    progress: bool = True,
    **fields: Any,
) -> nn.Module:
    """`convert` for a model that is still in its folder: each linear is read, quantized and let go before the next.

    The result equals, bit for bit, `convert` of the model loaded as usual. At its peak memory holds what the result
    holds and one dense weight (with `dtype`, a second copy of it).

    Args:
        folder: with model.safetensors, or the files that model.safetensors.index.json lists.
        config, fields, quantize, blocksize, double_quant, compute_dtype, adapter_name, progress: as `convert`.
        model: with parameters on the meta device, as made under `accelerate.init_empty_weights()`; without it
            transformers builds the model that the folder's config.json names (a causal language model if none).
        dtype: of every floating-point tensor read; default: as in the files.
        device: where the result's tensors go.

    Returns:
        The model, its linears as `QLoraLinear`.

    Raises:
        ConfigError: as `convert`; a buffer without a value that no file has; transformers is needed and missing.
        StateDictError: a damaged file or index; keys missing, unexpected or of another shape. FileNotFoundError.
        ShapeError, DtypeError: a weight that cannot be quantized. The model has not changed after any of these.
    """
    if quantize not in ("nf4", "fp4"):
        raise ConfigError(f'quantize must be "nf4" or "fp4", got {quantize!r}')
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise DtypeError(f"dtype must be a floating-point torch.dtype, got {dtype!r}")
    files = Files(folder)
    model = built(files.folder, dtype) if model is None else model
    keywords: dict[str, Any] = {"quantize": quantize, "blocksize": blocksize, "double_quant": double_quant}
    plan = plan_of(model, config, fields, compute_dtype=compute_dtype, adapter_name=adapter_name, **keywords)
    for name, linear in plan.targets.items():
        if hasattr(linear.weight, "quant_state"):
            raise ConfigError(f"cannot load {name}: it is a bitsandbytes layer; load the model as usual and convert it")
    sources = sources_of(model, files)

    def read(key: str, copy: bool) -> Tensor:
        tensor = files.read(key)
        return tensor.to(device, dtype if tensor.is_floating_point() else None, copy=copy)

    layers, tensors = _read_all(model, plan, sources, read, progress)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for name, layer in layers.items():
        put(model, name, layer)
    _install(model, tensors, device)
    finish(model, plan.config)
    return model


# --- the files --------------------------------------------------------------------------------------------------------


class Facts(NamedTuple):
    """What a file's header says of a tensor; `dtype` in its words ("BF16")."""

    file: pathlib.Path
    shape: tuple[int, ...]
    dtype: str


class Files:
    """The safetensors files of a model folder; their headers are read and checked when it is made.

    Attributes:
        folder: their folder.
        facts: key -> file, shape and dtype.

    Raises:
        FileNotFoundError: no such folder, or no weights in it. StateDictError: a damaged file or index.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = pathlib.Path(folder)
        self.facts: dict[str, Facts] = {}
        listed = self._listed()
        for file in dict.fromkeys(listed.values()) if listed else [self.folder / SINGLE]:
            if not file.is_file():
                raise FileNotFoundError(f"{file.name} is missing in {self.folder}")
            with opened(file) as held:
                for key in held.keys():  # noqa: SIM118 - no mapping
                    found = held.get_slice(key)
                    self.facts[key] = Facts(file, tuple(found.get_shape()), found.get_dtype())
        for key, file in listed.items():
            if key not in self.facts or self.facts[key].file != file:
                raise StateDictError(f"{self.folder / INDEX} says that {key} is in {file.name}; it is not")

    def _listed(self) -> dict[str, pathlib.Path]:
        """Key -> file of the index; empty where a single file is all there is."""
        if not self.folder.is_dir():
            raise FileNotFoundError(f"{self.folder} is no folder")
        index = self.folder / INDEX
        if not index.is_file():
            if (self.folder / SINGLE).is_file():
                return {}
            raise FileNotFoundError(f"{self.folder} has neither {SINGLE} nor {INDEX}; pickled weights are not read")
        try:
            names = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            plain = all(isinstance(name, str) and pathlib.PurePath(name).name == name for name in names.values())
        except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
            raise StateDictError(f"{index}: expected a JSON object with weight_map: {error!r}") from None
        if not plain or not names:
            raise StateDictError(f"{index}: expected weight_map to name files of the same folder")
        return {key: self.folder / name for key, name in names.items()}

    def read(self, key: str) -> Tensor:
        """A tensor in the file's own pages; they are let go with it, since the file is opened anew for each."""
        with opened(self.facts[key].file) as held:
            tensor: Tensor = held.get_tensor(key)
        return tensor

    def rows(self, key: str, first: int, end: int) -> Tensor:
        """Some rows of a tensor of at least one dimension, as `read`."""
        with opened(self.facts[key].file) as held:
            tensor: Tensor = held.get_slice(key)[first:end]
        return tensor

    def same(self, one: str, other: str) -> bool:
        """Whether two tensors hold the same values; compared in rows, so that neither is read whole."""
        if self.facts[one].shape != self.facts[other].shape:
            return False
        with opened(self.facts[one].file) as first, opened(self.facts[other].file) as second:
            left, right = first.get_slice(one), second.get_slice(other)
            if not self.facts[one].shape or left.get_dtype() != right.get_dtype():
                return torch.equal(first.get_tensor(one), second.get_tensor(other))
            rows = self.facts[one].shape[0]
            return all(torch.equal(left[at : at + 1024], right[at : at + 1024]) for at in range(0, rows, 1024))


@contextlib.contextmanager
def opened(file: pathlib.Path) -> Iterator[Any]:
    """`safetensors.safe_open` whose errors are a StateDictError that names the file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "pt") as held:
            yield held
    except SafetensorError as error:
        raise StateDictError(f"{file} is damaged, or no safetensors file: {error}") from None


# --- the model --------------------------------------------------------------------------------------------------------


def built(folder: pathlib.Path, dtype: torch.dtype | None) -> nn.Module:
    """The model of a config.json, its parameters on meta and its buffers not.

    Its class is the one that `architectures` names, else that of the causal language model of its type.
    """
    try:
        import transformers
        from accelerate import init_empty_weights
        from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig
    except ImportError as error:
        raise ConfigError(
            f"building the model of {folder} needs transformers and accelerate ({error}): pip install "
            "'fastlora[peft,transformers]', or pass model="
        ) from None
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    if getattr(config, "quantization_config", None) is not None:
        raise ConfigError(f"{folder} holds a model that is quantized already: load it as usual and convert it")
    kind = getattr(transformers, next(iter(config.architectures or ()), ""), None)
    known = isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)
    make: Any = kind._from_config if known else AutoModelForCausalLM.from_config  # type: ignore[union-attr]
    with init_empty_weights(include_buffers=False):
        model = make(config, dtype=dtype or config.dtype)
    model.tie_weights()
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
    made: nn.Module = model.eval()
    return made


def sources_of(model: nn.Module, files: Files) -> dict[int, str]:
    """The key each of the model's tensors is read from, by the tensor's id; tied ones share one.

    Raises:
        StateDictError: keys missing or unexpected, shapes that differ, tied tensors of different values.
        ConfigError: a buffer on meta that is in no checkpoint.
    """
    state = model.state_dict(keep_vars=True)
    for name, buffer in model.named_buffers():
        if buffer.is_meta and name not in state:
            raise ConfigError(
                f"the buffer {name} is on the meta device and no checkpoint has it: build the model under "
                "accelerate.init_empty_weights(), which leaves buffers alone"
            )
    groups: dict[int, list[str]] = {}
    for name, tensor in state.items():
        groups.setdefault(id(tensor), []).append(name)
    missing, found = [], {}
    for own, names in groups.items():
        present = [name for name in names if name in files.facts]
        if not present:
            missing.append(names[0])
            continue
        found[own] = present[0]
        for name in present:
            want, have = tuple(state[name].shape), files.facts[name].shape
            if want != have:
                raise StateDictError(f"{name}: expected shape {want}, got {have} in {files.facts[name].file.name}")
            if name != present[0] and not files.same(present[0], name):
                raise StateDictError(f"{present[0]} and {name} are one tensor in the model and differ in the files")
    ignored = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    unexpected = [
        key for key in files.facts if key not in state and not any(re.search(pattern, key) for pattern in ignored)
    ]
    if missing or unexpected:
        hint = "; is a tie_weights() missing?" if missing and hasattr(model, "tie_weights") else ""
        raise StateDictError(
            f"{files.folder} does not fit {type(model).__name__}: missing keys {_some(missing)}, "
            f"unexpected keys {_some(unexpected)}{hint}"
        )
    return found


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:_SHOWN]) or "none"
    return shown if len(names) <= _SHOWN else f"{shown} and {len(names) - _SHOWN} more"


def _read_all(
    model: nn.Module, plan: Plan, sources: Mapping[int, str], read: Callable[[str, bool], Tensor], progress: bool
) -> tuple[dict[str, nn.Module], dict[int, Tensor]]:
    """The adapted layers by name, and the other tensors by the id of those they replace; the model is left alone."""
    mine = {id(parameter) for linear in plan.targets.values() for parameter in linear.parameters(recurse=False)}
    others = {own: key for own, key in sources.items() if own not in mine}
    layers: dict[str, nn.Module] = {}
    tensors: dict[int, Tensor] = {}
    keys = {key: own for own, key in others.items()}
    for name in with_progress([*plan.targets, *keys], "quantize", progress):
        if name in keys:
            tensors[keys[name]] = read(name, True)
            continue
        linear: Any = plan.targets[name]
        plain = nn.Linear(linear.in_features, linear.out_features, bias=False, device="meta").train(linear.training)
        # Quantized from the file's pages: buffers of this size, made and freed in turn, would fragment the heap.
        plain.weight = nn.Parameter(read(sources[id(linear.weight)], False), requires_grad=False)
        if linear.bias is not None:
            plain.bias = nn.Parameter(read(sources[id(linear.bias)], True), requires_grad=False)
        check_target(name, plain, plan.configs[name], "nf4")
        try:
            layers[name] = plan.make[name](plain, plan.configs[name])
        except FastloraError as error:
            raise type(error)(f"{name}: {error}") from None
    return layers, tensors


def _install(model: nn.Module, tensors: Mapping[int, Tensor], device: torch.device | str) -> None:
    """Put the tensors read in place of those they stand for; tied ones stay one object."""
    replaced = [*model.parameters(), *model.buffers()]  # alive to the end, so that no new tensor takes an id of theirs
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and id(parameter) in tensors:
                own = id(parameter)
                made.setdefault(own, nn.Parameter(tensors[own], requires_grad=False))
                module._parameters[name] = made[own]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = tensors[id(buffer)] if id(buffer) in tensors else buffer.to(device)
    del replaced
