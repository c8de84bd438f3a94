"""The only reader of the process environment: few settings, each documented in the README.

`with settings.override(backend="reference"): ...` changes one for a block; the environment gives the start values.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator

from fastlora.errors import ConfigError


@dataclasses.dataclass(frozen=True, eq=False)  # told apart by identity: part of a key that every call looks up
class Settings:
    """The values in force.

    Attributes:
        backend: force one backend for every op ("" lets the cost model choose); FASTLORA_BACKEND.
        cpu_tier: force an instruction tier of the CPU library, "avx512_bf16", "avx512", "avx2", "neon" or "scalar";
            FASTLORA_CPU_TIER.
        cpu_library: the file of another build of the CPU library, such as one with sanitizers; FASTLORA_CPU_LIBRARY.
        low_memory: keep only the dropout seed and redraw the mask in the backward; keep no merged weight from a
            checkpoint's second forward; FASTLORA_LOW_MEMORY=1.
        merge: allow plans that merge the adapter into the dequantized weight; FASTLORA_MERGE=0 forbids them.
        triton_interpret: Triton kernels run in its interpreter, on CPU tensors; TRITON_INTERPRET=1 at the start.
        tune: measure the able kernels of a new problem once and remember the fastest; FASTLORA_TUNE=1.
        tune_cache: the file that remembers; FASTLORA_TUNE_CACHE ("": fastlora/tuning.json in the user's cache folder).
    """

    backend: str = ""
    cpu_tier: str = ""
    cpu_library: str = ""
    low_memory: bool = False
    merge: bool = True
    triton_interpret: bool = False
    tune: bool = False
    tune_cache: str = ""


def _flag(name: str, default: bool) -> bool:
    value = os.environ.get(name, "")
    if value == "":
        return default
    if value not in ("0", "1"):
        raise ConfigError(f"{name} must be 0 or 1, got {value!r}")
    return value == "1"


def _from_environment() -> Settings:
    return Settings(
        backend=os.environ.get("FASTLORA_BACKEND", ""),
        cpu_tier=os.environ.get("FASTLORA_CPU_TIER", ""),
        cpu_library=os.environ.get("FASTLORA_CPU_LIBRARY", ""),
        low_memory=_flag("FASTLORA_LOW_MEMORY", False),
        merge=_flag("FASTLORA_MERGE", True),
        triton_interpret=_flag("TRITON_INTERPRET", False),
        tune=_flag("FASTLORA_TUNE", False),
        tune_cache=os.environ.get("FASTLORA_TUNE_CACHE", ""),
    )


current: Settings = _from_environment()


@contextlib.contextmanager
def override(**changes: object) -> Iterator[Settings]:
    """Change settings for a block.

    Raises:
        ConfigError: an unknown setting.
    """
    global current
    known = {field.name for field in dataclasses.fields(Settings)}
    if unknown := sorted(set(changes) - known):
        raise ConfigError(f"unknown setting {unknown[0]!r}; known: {', '.join(sorted(known))}")
    before = current
    current = dataclasses.replace(before, **changes)  # type: ignore[arg-type]
    try:
        yield current
    finally:
        current = before
