"""Reading the pages of docs/, and loading the scripts beside them."""

from __future__ import annotations

import importlib.util
import pathlib
import re
import types
from typing import NamedTuple

_FENCE = re.compile(r"^```(\w*)([^\n]*)\n(.*?)^```[ \t]*$", re.DOTALL | re.MULTILINE)


class Block(NamedTuple):
    """One fenced block: its language, what follows it on that line, its text and where it stands."""

    language: str
    options: str
    text: str
    where: str


def blocks(path: pathlib.Path) -> list[Block]:
    """The fenced blocks of a page."""
    text = path.read_text(encoding="utf-8")
    return [
        Block(match[1], match[2].strip(), match[3], f"{path.name}:{text.count(chr(10), 0, match.start()) + 1}")
        for match in _FENCE.finditer(text)
    ]


def load(path: pathlib.Path) -> types.ModuleType:
    """A script as a module of its own name."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
