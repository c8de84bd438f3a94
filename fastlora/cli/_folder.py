"""The demo's output folder: checked before any work, filled whole or not at all.

Nothing here needs torch, so that a folder that will not do is refused at once.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

REPORT = "demo.json"
ADAPTER, MERGED, PLOT = "adapter", "merged", "loss.png"


def check_folder(folder: Path) -> None:
    """Refuse a folder that cannot be made, or that holds something else than an earlier demo.

    Raises:
        FileExistsError: it is a file, the current folder, or holds what no demo wrote.
        FileNotFoundError, PermissionError: its parent is no folder or cannot be written to.
    """
    place = folder.resolve()
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder} is a file; --output needs a folder")
    if not place.parent.is_dir():
        raise FileNotFoundError(f"{place.parent} is no folder; --output needs an existing parent")
    if place.is_dir() and any(place.iterdir()) and not (place / REPORT).is_file():
        raise FileExistsError(f"{folder} holds files that are no demo's (no {REPORT}); choose another --output")
    if place == Path.cwd() or place in Path.cwd().parents:
        raise FileExistsError(f"{folder} is the folder you are in, and would be replaced; choose another --output")
    if not os.access(place.parent, os.W_OK | os.X_OK):
        raise PermissionError(f"cannot write to {place.parent}; choose another --output")


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Ctrl-C during the block takes effect at its end; outside the main thread nothing changes."""
    usual = signal.getsignal(signal.SIGINT)
    if not callable(usual) or threading.current_thread() is not threading.main_thread():
        yield
        return
    caught: list[int] = []
    signal.signal(signal.SIGINT, lambda number, _: caught.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, usual)
        if caught:
            usual(caught[0], None)


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

    Ctrl-C may come at any time: an earlier result is then still there, whole.
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
