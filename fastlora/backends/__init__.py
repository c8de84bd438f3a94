"""Plug-ins that run the ops; nobody imports one by name: `load()` finds and registers them all."""

from __future__ import annotations

import functools
import importlib
import pkgutil


@functools.cache
def load() -> None:
    """Import every backend module once; each registers its kernels and must import without its device present."""
    for module in pkgutil.iter_modules(__path__):
        if not module.name.startswith("_"):
            importlib.import_module(f"{__name__}.{module.name}")
