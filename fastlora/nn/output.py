"""Output folders that appear whole or not at all, and what a model's folder holds besides weights. Needs no torch."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

# What asks a process to end and may be held back.
_ENDING = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
# Weights in any form, and what lists them: a folder that is made gets its own.
_WEIGHTS = (
    *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".npz"),
    *(".onnx", ".onnx_data", ".tflite", ".index.json"),
)
_SUBFOLDERS = ("additional_chat_templates",)


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Ctrl-C and requests to end take effect after the block; outside the main thread nothing changes."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    # None: installed by other code than Python, which cannot be put back.
    usual: dict[int, Any] = {number: signal.getsignal(number) for number in _ENDING}
    usual = {number: handler for number, handler in usual.items() if handler not in (None, signal.SIG_IGN)}
    caught: list[int] = []

    def remember(number: int, _: FrameType | None) -> None:
        caught.append(number)

    for number in usual:
        signal.signal(number, remember)
    try:
        yield
    finally:
        for number, handler in usual.items():
            signal.signal(number, handler)
        if caught and callable(usual[caught[0]]):
            usual[caught[0]](caught[0], None)
        elif caught:
            signal.raise_signal(caught[0])


def _put_in_place(scratch: Path, folder: Path) -> None:
    """Rename `scratch` to `folder`, whose earlier content goes; it stays if the renaming fails."""
    scratch.chmod(0o755)
    if not folder.exists():
        os.replace(scratch, folder)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{folder.name}-old-", dir=folder.parent))
    os.replace(folder, old / folder.name)
    try:
        os.replace(scratch, folder)
    except OSError:
        os.replace(old / folder.name, folder)
        old.rmdir()
        raise
    shutil.rmtree(old, ignore_errors=True)


@contextlib.contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A scratch folder that takes the place of `folder` when the block ends well, and vanishes when it does not.

    Ctrl-C may come at any time: an earlier result is then still there, whole. So may SIGTERM where it raises, as it
    does under the command line.
    """
    folder = folder.resolve()
    scratch: Path | None = None
    try:
        with undisturbed():
            scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        yield scratch
        with undisturbed():
            _put_in_place(scratch, folder)
    finally:
        if scratch is not None and scratch.exists():
            with undisturbed():
                shutil.rmtree(scratch, ignore_errors=True)


def check_output(output: Path, inputs: Sequence[Path], *, mark: str, overwrite: bool = False) -> None:
    """Refuse an output folder that cannot be made or whose making would touch something else.

    Args:
        output: where the result goes. inputs: folders that are read.
        mark: a file that every result holds: what does not is never replaced.
        overwrite: an existing result may be replaced.

    Raises:
        FileExistsError: it is a file, holds something else, is the current folder, or overlaps with an input.
        FileNotFoundError, PermissionError: its parent is no folder or cannot be written to.
    """
    place = output.resolve()
    if output.exists() and not output.is_dir():
        raise FileExistsError(f"{output} is a file; expected a folder to write to")
    if not place.parent.is_dir():
        raise FileNotFoundError(f"{place.parent} is no folder; expected an existing one to make {place.name} in")
    for source in inputs:
        other = source.resolve()
        if place == other or place in other.parents or other in place.parents:
            raise FileExistsError(f"{output} and {source}, which is read, are one folder or inside one another")
    if place == Path.cwd() or place in Path.cwd().parents:
        raise FileExistsError(f"{output} is the folder you are in, and would be replaced")
    if place.is_dir() and any(place.iterdir()):
        if not (place / mark).is_file():
            raise FileExistsError(f"{output} holds files, but no {mark}: it is no earlier result, and stays")
        if not overwrite:
            raise FileExistsError(f"{output} exists and is not empty (--overwrite, or overwrite=True, replaces it)")
    if not os.access(place.parent, os.W_OK | os.X_OK):
        raise PermissionError(f"cannot write to {place.parent}")


def check_space(folder: Path, needed: int) -> None:
    """Raise OSError unless the disk of `folder` has so many bytes left."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(f"the result takes {needed / 1e9:.1f} GB, and {folder.parent} has {free / 1e9:.1f} GB left")


def copy_others(source: Path, target: Path) -> list[str]:
    """Copy what stands beside the weights: config, tokenizer, chat templates, code, licence.

    Left out are weights in any format, hidden files, and folders other than those of chat templates.

    Returns:
        The names of the files copied.
    """
    folders = [source, *(source / name for name in _SUBFOLDERS if (source / name).is_dir())]
    copied = []
    for path in sorted(path for folder in folders for path in folder.iterdir()):
        name = path.relative_to(source)
        if path.is_file() and not path.name.startswith(".") and not path.name.endswith(_WEIGHTS):
            (target / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(path, target / name)  # the contents alone: the copy may be changed
            copied.append(str(name))
    return copied
