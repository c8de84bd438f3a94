"""What the commands that work on folders share: a bar of bytes, their words, the memory they took, the way out."""

from __future__ import annotations

import contextlib
import json as json_format
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

_MEMORY = Path("/proc/self/status")


def console() -> Console:
    """For what people read; the result of `--json` alone goes to stdout."""
    from rich.console import Console

    return Console(stderr=True, highlight=False)


@contextlib.contextmanager
def bytes_bar(what: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr; what it gives is called with bytes done and in all. Without a terminal nothing is drawn."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    out = console()
    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn()
    looks: dict[str, Any] = {"console": out, "transient": True, "disable": not out.is_terminal}
    with Progress(*columns, TimeRemainingColumn(), **looks) as progress:
        bar = progress.add_task(what, total=None)
        yield lambda done, total: progress.update(bar, completed=done, total=total)


def peak_memory() -> int:
    """The most bytes this process has had resident; 0 where the system does not say."""
    if _MEMORY.is_file():
        for line in _MEMORY.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return 0


class Clock:
    """Seconds since it was made, and the memory taken."""

    def __init__(self) -> None:
        self._began = time.perf_counter()

    def facts(self) -> dict[str, Any]:
        """For `--json`."""
        return {"seconds": round(time.perf_counter() - self._began, 3), "peak_memory_bytes": peak_memory()}

    def __str__(self) -> str:
        facts = self.facts()
        memory = f", peak memory {size(facts['peak_memory_bytes'])}" if facts["peak_memory_bytes"] else ""
        return f"{facts['seconds']:.1f} s{memory}"


def size(count: float) -> str:
    """Bytes as people say them."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= factor:
            return f"{count / factor:.3g} {unit}" if count < 999.5 * factor else f"{count / factor:.0f} {unit}"
    return f"{count:.0f} bytes"


def files(count: int) -> str:
    """How many files."""
    return f"{count} file{'' if count == 1 else 's'}"


def counted(values: Sequence[object]) -> str:
    """A few values in a row."""
    return ", ".join(map(str, values))


def print_json(facts: dict[str, Any]) -> None:
    """A result on stdout."""
    print(json_format.dumps(facts, indent=2, ensure_ascii=False))
