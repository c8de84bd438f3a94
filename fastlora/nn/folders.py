"""An adapter's folder: adapter_config.json and adapter_model.safetensors, read and written whole or not at all."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pathlib
import pickle
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastlora.errors import StateDictError
from fastlora.io.moe_peft import PICKLE_NAME
from fastlora.io.peft import CONFIG_NAME, WEIGHTS_NAME

NO_MAGNITUDES = (
    "the adapter is DoRA and holds no magnitudes (MoE-PEFT does not save them): they are now the row norms of "
    "W + s B A, as MoE-PEFT sets them on loading; what training made of them is lost"
)


class Files(NamedTuple):
    """What a folder holds."""

    state: dict[str, Tensor]
    metadata: dict[str, str]
    config: str  # the JSON's text
    pickled: bool  # there is no safetensors file


def place(folder: str | os.PathLike[str], adapter_name: str) -> pathlib.Path:
    """PEFT's layout: "default" in the folder itself, another adapter in a folder of its name inside it."""
    path = pathlib.Path(folder)
    return path if adapter_name == "default" else path / adapter_name


def find(folder: str | os.PathLike[str], adapter_name: str) -> pathlib.Path:
    """Where to read: `place`, or the folder itself where that holds the files."""
    inside = place(folder, adapter_name)
    return inside if (inside / CONFIG_NAME).is_file() else pathlib.Path(folder)


def about(model: nn.Module) -> tuple[str | None, str | None]:
    """The base model's name and PEFT's word for its task, as far as they are known."""
    base = getattr(getattr(model, "config", None), "_name_or_path", None) or None
    return base, "CAUSAL_LM" if type(model).__name__.endswith("ForCausalLM") else None


def read(folder: pathlib.Path) -> Files:
    """Both files; adapter_model.bin, as MoE-PEFT and old PEFTs write it, where there is no safetensors file.

    Raises:
        FileNotFoundError: one is missing. StateDictError: not whole, not of its format, or a pickle of more than
        tensors, which is not executed.
    """
    config_path, weights, pickled = folder / CONFIG_NAME, folder / WEIGHTS_NAME, folder / PICKLE_NAME
    if not config_path.is_file():
        raise FileNotFoundError(f"no {CONFIG_NAME} in {folder}")
    if weights.is_file():
        state, metadata = _read_safetensors(weights)
    elif pickled.is_file():
        state, metadata = _read_pickle(pickled), {}
    else:
        raise FileNotFoundError(f"no {WEIGHTS_NAME} in {folder}")
    try:
        text = config_path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise StateDictError(f"{config_path} is not text: {error}") from None
    return Files(state, metadata, text, not weights.is_file())


def _read_safetensors(path: pathlib.Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            return {key: file.get_tensor(key) for key in file.keys()}, metadata  # noqa: SIM118 (not a dict)
    except SafetensorError as error:
        raise StateDictError(f"{path} is not a complete safetensors file: {error}") from None


def _read_pickle(path: pathlib.Path) -> dict[str, Tensor]:
    data = io.BytesIO(path.read_bytes())  # so that an OSError below is of the content, not of the file
    try:
        state = torch.load(data, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, LookupError, OSError) as error:
        why = str(error).strip().partition("\n")[0]
        raise StateDictError(f"{path} is not a complete pickle of tensors and nothing else: {why}") from None
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise StateDictError(f"{path} holds something other than tensors by name")
    return {str(key): value.detach() for key, value in state.items()}


def write(target: pathlib.Path, state: Mapping[str, Tensor], metadata: dict[str, str], config: str) -> pathlib.Path:
    """Write both files beside their places and move them there whole; what was there is replaced.

    Raises:
        FileExistsError: files of these names that are no adapter's; they stay. OSError: the folder cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    _refuse_foreign_files(target)
    apart = _apart(state)
    with _made(target), tempfile.TemporaryDirectory(prefix=".saving-", dir=target) as scratch:
        weights, settings = pathlib.Path(scratch, WEIGHTS_NAME), pathlib.Path(scratch, CONFIG_NAME)
        try:
            save_file(apart, weights, metadata=metadata)
        except SafetensorError as error:
            raise OSError(f"cannot write {target / WEIGHTS_NAME}: {error}") from None
        settings.write_text(config, encoding="utf-8")
        weights.chmod(settings.stat().st_mode)  # safetensors writes for the owner alone, whatever the umask
        _put_in_place([weights, settings], target)
    return target


def _apart(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous CPU tensors that share no memory, as safetensors wants them."""
    seen: set[int] = set()
    made = {}
    for key, value in state.items():
        tensor = value.detach().contiguous().cpu()
        if tensor.untyped_storage().data_ptr() in seen:
            tensor = tensor.clone()
        seen.add(tensor.untyped_storage().data_ptr())
        made[key] = tensor
    return made


@contextlib.contextmanager
def _made(folder: pathlib.Path) -> Iterator[None]:
    """Make a folder; if the block fails or is interrupted, what had to be made is gone again."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    with contextlib.ExitStack() as undo:
        for path in reversed(missing):
            undo.callback(_remove_if_empty, path)
        folder.mkdir(parents=True, exist_ok=True)
        yield
        undo.pop_all()


def _remove_if_empty(folder: pathlib.Path) -> None:
    with contextlib.suppress(OSError):
        folder.rmdir()


def _put_in_place(files: list[pathlib.Path], target: pathlib.Path) -> None:
    """Move each file over the one of its name in `target`; if one cannot be moved, the old ones come back."""
    with contextlib.ExitStack() as undo:
        for file in files:
            home, old = target / file.name, file.with_name("old-" + file.name)
            if home.exists():
                try:
                    os.link(home, old)
                except OSError:  # no hard links here
                    shutil.copy2(home, old)
                undo.callback(os.replace, old, home)
            else:
                undo.callback(home.unlink, missing_ok=True)
            os.replace(file, home)
        undo.pop_all()


def _refuse_foreign_files(target: pathlib.Path) -> None:
    if target.exists() and not target.is_dir():
        raise FileExistsError(f"{target} is a file; expected a folder to save the adapter in")
    config, weights = target / CONFIG_NAME, target / WEIGHTS_NAME
    ours = False
    with contextlib.suppress(OSError, json.JSONDecodeError, UnicodeDecodeError):
        found = json.loads(config.read_text(encoding="utf-8"))
        ours = isinstance(found, dict) and "peft_type" in found
    if not ours:
        for path in (config, weights):
            if path.exists():
                raise FileExistsError(f"{path} exists and is no adapter's; move it away or save elsewhere")
    elif weights.is_dir():
        raise FileExistsError(f"{weights} is a folder; move it away or save elsewhere")
