"""What the numbers were taken on: versions, device, clocks, source."""

from __future__ import annotations

import hashlib
import importlib.metadata
import platform
import subprocess
import time
from pathlib import Path

import torch

from benchmarks.contenders import failures, reason

ROOT = Path(__file__).resolve().parent.parent
_PACKAGES = ("torch", "triton", "peft", "bitsandbytes", "transformers", "unsloth", "numpy")
_SMI = "name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.draw,temperature.gpu,memory.total"


def _output(command: list[str]) -> str | None:
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        pass
    # A package carried as a bare folder has no metadata; ask it only if it is already imported or cheap to.
    if package == "bitsandbytes":
        try:
            import bitsandbytes
        except (ImportError, OSError, RuntimeError):
            return None
        return str(getattr(bitsandbytes, "__version__", "unknown"))
    return None


def now() -> str:
    """The time, as reports give it."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def source_hash() -> str:
    """SHA-256 over the names and bytes of the package, its native sources and the benchmarks."""
    digest = hashlib.sha256()
    for folder, patterns in (("fastlora", ("*.py",)), ("csrc", ("*.c*", "*.h")), ("benchmarks", ("*.py",))):
        for path in sorted({found for pattern in patterns for found in (ROOT / folder).rglob(pattern)}):
            digest.update(str(path.relative_to(ROOT)).encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()


def gpu_state() -> dict[str, str] | None:
    """Name, driver, clocks, power and temperature as the driver's tool prints them; None without it."""
    line = _output(["nvidia-smi", f"--query-gpu={_SMI}", "--format=csv,noheader"])
    if not line:
        return None
    return dict(zip(_SMI.split(","), (part.strip() for part in line.splitlines()[0].split(",")), strict=False))


def backends() -> dict[str, str]:
    """Our backends, each with "" or the reason why it cannot run here."""
    try:
        from fastlora import backends as package
        from fastlora.dispatch import registry

        package.load()
    except failures() as error:
        return {"fastlora": reason(error)}
    found: dict[str, str] = {}
    for kernel in registry.kernels():
        missing = kernel.limits.missing()
        found[kernel.backend] = found.get(kernel.backend, missing) and missing  # one able kernel is enough
    return found


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def describe() -> dict[str, object]:
    """Everything, as JSON types."""
    commit = _output(["git", "rev-parse", "--verify", "HEAD"])
    status = _output(["git", "status", "--porcelain"]) if commit else None
    device: dict[str, object] | None = None
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        device = {
            "name": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "l2_bytes": properties.L2_cache_size,
        }
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _processor(),
        "threads": torch.get_num_threads(),
        "packages": {package: _version(package) for package in _PACKAGES},
        "cuda": torch.version.cuda,
        "gpu": device,
        "gpu_state": gpu_state(),
        "backends": backends(),
        "commit": commit,
        "dirty": bool(status) if status is not None else None,
        "source_sha256": source_hash(),
    }
