"""A measured choice among candidates, remembered in a file: opt-in, the prediction of `cost` decides otherwise.

Nothing here runs unless the setting `tune` is on (FASTLORA_TUNE=1). What was measured is kept under the hash of the
kernels' source, Triton's version, the device and the rounded shape, so that a new version of any of them measures
again. The file is shared by every process of a user: it is read once, merged with what others wrote on every write,
replaced atomically, and a broken one costs a warning and is written anew.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import json
import os
import statistics
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fastlora import settings
from fastlora.errors import UnsupportedError
from fastlora.problem import Problem

_SCHEMA = 1
_ROUNDS = 5  # the median of so many is a candidate's time
_ROUND = 1e-3  # seconds a round lasts at least


class TuneKey(NamedTuple):
    """What a measurement is valid for.

    `source` is `source_hash` of what was measured, `triton` its compiler's version, `device` the device's full name,
    `what` everything static (op, dtypes, format, flags), and `shape` the sizes, see `bucket`.
    """

    source: str
    triton: str
    device: str
    what: str
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return "|".join([self.source, self.triton, self.device, self.what, "x".join(map(str, self.shape))])


def bucket(m: int, *rest: int) -> tuple[int, ...]:
    """The shape of a key: m rounded up to a power of two (0 stays), the other sizes as they are."""
    return (1 << max(0, m - 1).bit_length() if m else 0, *rest)


def source_hash(*paths: Path) -> str:
    """Hash of the names and bytes of files, and of the Python files in folders."""
    digest = hashlib.sha256()
    for path in paths:
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            digest.update(file.name.encode())
            digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


@functools.cache
def _code() -> str:
    """Hash of all that a candidate's time depends on in this package."""
    package = Path(__file__).resolve().parent.parent
    return source_hash(package / "backends", *sorted((package / "_lib").glob("*.so")))


@functools.cache
def _compiler() -> str:
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return "none"


def _device(kind: str) -> str:
    if kind == "cuda":
        return torch.cuda.get_device_name()
    tier = settings.current.cpu_tier or torch.backends.cpu.get_cpu_capability()
    return f"{kind} {tier} x{torch.get_num_threads()}"


def key_of(problem: Problem) -> TuneKey:
    """What a measurement of the kernels of a problem is valid for."""
    op, m, n, k, r, dtype, adapter_dtype, fmt, flags, device, _ = problem
    what = f"{op} {dtype} {adapter_dtype} {fmt} {flags}".replace("torch.", "")
    return TuneKey(_code(), _compiler(), _device(device), what, bucket(m, n, k, r))


def capturing(kind: str) -> bool:
    """Whether the current stream records a graph: then nothing may be measured."""
    return kind == "cuda" and torch.cuda.is_current_stream_capturing()


def seconds_of(run: Callable[[], object], kind: str) -> float:
    """Median seconds of a call on a device kind, after one that may compile; inf where it cannot run.

    Memory that does not suffice and kernels that do not fit the device are such failures; anything else is raised.
    """
    wait = torch.cuda.synchronize if kind == "cuda" else _nothing

    def spent(count: int) -> float:
        wait()
        begin = time.perf_counter()
        for _ in range(count):
            run()
        wait()
        return (time.perf_counter() - begin) / count

    try:
        run()
        count = max(1, int(_ROUND / max(spent(1), 1e-6)))
        return statistics.median(spent(count) for _ in range(_ROUNDS))
    except (torch.OutOfMemoryError, MemoryError, UnsupportedError):
        return float("inf")


def _nothing() -> None:
    """A CPU's call has ended when it returns."""


def default_path() -> Path:
    """The `tune_cache` setting, or fastlora/tuning.json in the user's cache folder (~/.cache)."""
    if settings.current.tune_cache:
        return Path(settings.current.tune_cache)
    return Path.home() / ".cache" / "fastlora" / "tuning.json"


class Tuner:
    """Choices measured once and remembered.

    Args:
        path: the file; None: what the settings say when it is first needed.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._path = path
        self._known: dict[str, str] | None = None
        self._lock = threading.RLock()  # a measured kernel may choose another
        self._warned = False

    @property
    def path(self) -> Path:
        """The file."""
        return self._path or default_path()

    def choose(
        self, key: TuneKey, candidates: Sequence[str], measure: Callable[[str], float], *, default: str | None = None
    ) -> str:
        """The fastest candidate for a key: remembered, or measured now and remembered.

        Args:
            key: what the choice is for.
            candidates: names; at least one.
            measure: seconds of one, at the sizes in hand; a failure to run is float("inf").
            default: what is returned, unmeasured, where tuning is off (the first candidate if None).

        A remembered name that is no longer a candidate is measured anew. Two processes that tune the same key at the
        same time both measure; the later write stays.
        """
        if not candidates:
            raise ValueError("candidates must not be empty")
        if not settings.current.tune:
            return candidates[0] if default is None else default
        name = str(key)
        with self._lock:
            if self._known is None:
                self._known = self._read()
            found = self._known.get(name)
            if found is not None and found in candidates:
                return found
            seconds = {candidate: measure(candidate) for candidate in candidates}
            best = min(candidates, key=seconds.__getitem__)
            if seconds[best] == float("inf"):  # nothing ran: no reason to remember
                return candidates[0] if default is None else default
            self._known[name] = best
            ran = {candidate: value for candidate, value in seconds.items() if value < float("inf")}
            self._write({name: {"choice": best, "seconds": ran}})
            return best

    # --- the file -----------------------------------------------------------------------------------------------------

    def _read(self) -> dict[str, str]:
        return {name: entry["choice"] for name, entry in self._entries().items()}

    def _entries(self) -> dict[str, Any]:
        """The file's entries; none, with one warning, where it cannot be understood."""
        try:
            text = self.path.read_text()
        except FileNotFoundError:
            return {}
        except (OSError, UnicodeDecodeError) as error:
            return self._ignored(str(error))
        try:
            document = json.loads(text)
        except ValueError as error:
            return self._ignored(str(error))
        if not isinstance(document, dict) or not isinstance(document.get("choices"), dict):
            return self._ignored("it does not hold choices")
        if document.get("schema") != _SCHEMA:
            return {}  # another version's: not broken, and written anew
        return {
            name: entry
            for name, entry in document["choices"].items()
            if isinstance(entry, dict) and isinstance(entry.get("choice"), str)
        }

    def _ignored(self, why: str) -> dict[str, Any]:
        if not self._warned:
            self._warned = True
            warnings.warn(f"tuning cache {self.path} is ignored and will be written anew: {why}", stacklevel=4)
        return {}

    def _write(self, new: dict[str, Any]) -> None:
        """Merge into the file under its lock; a file that cannot be written costs a warning, not the choice."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with _locked(self.path.with_suffix(".lock")):
                merged = self._entries() | new
                if self._known is not None:
                    for name, entry in merged.items():
                        self._known.setdefault(name, entry["choice"])
                _replace(self.path, json.dumps({"schema": _SCHEMA, "choices": merged}, indent=1, sort_keys=True))
        except OSError as error:
            if not self._warned:
                self._warned = True
                warnings.warn(f"tuning cache {self.path} cannot be written: {error}", stacklevel=3)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    import fcntl  # no such module on Windows, where everything else here works

    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # released when the file closes, whatever happens
        yield


def _replace(path: Path, text: str) -> None:
    """Readers see the old file or the new one, never half."""
    handle, partial = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w") as file:
            file.write(text)
        os.replace(partial, path)
    except OSError:
        Path(partial).unlink(missing_ok=True)
        raise


tuner = Tuner()
