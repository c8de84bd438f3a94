"""`fastlora env`: versions, devices and which backends are built, or why not."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json as json_format
import platform
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import fastlora

if TYPE_CHECKING:
    from fastlora.dispatch.registry import Kernel

PACKAGES = ("torch", "triton", "bitsandbytes", "peft", "transformers", "safetensors", "numpy")
# The instruction sets that decide how fast the CPU kernels can be.
CPU_FLAGS = (
    *("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512_vnni", "avx512_bf16", "avx512_fp16"),
    *("amx_tile", "amx_bf16", "asimd", "bf16", "sve"),
)


def versions() -> dict[str, str | None]:
    """Installed version of each package that matters, None where absent; nothing is imported to find out."""
    found: dict[str, str | None] = {"fastlora": fastlora.__version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def _cpu_facts() -> tuple[str, list[str]]:
    """Model name and known flags of the CPU; empty where the system does not say."""
    path = Path("/proc/cpuinfo")
    if not path.is_file():
        return platform.processor() or platform.machine(), []
    facts: dict[str, str] = {}
    for line in path.read_text(errors="replace").splitlines():
        key, _, value = line.partition(":")
        facts.setdefault(key.strip().lower(), value.strip())
    flags = set((facts.get("flags") or facts.get("features") or "").split())
    return facts.get("model name") or platform.machine(), [flag for flag in CPU_FLAGS if flag in flags]


def devices() -> dict[str, Any]:
    """The CPU (name, flags, torch's own instruction tier, threads) and every GPU."""
    import torch

    name, flags = _cpu_facts()
    cpu = {
        "name": name,
        "flags": flags,
        "torch_tier": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
    }
    gpus: list[dict[str, Any]] = []
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            gpu = torch.cuda.get_device_properties(index)
            capability = f"{gpu.major}.{gpu.minor}"
            gpus.append({"name": gpu.name, "capability": capability, "memory_gib": round(gpu.total_memory / 2**30, 1)})
    return {"cpu": cpu, "gpus": gpus}


def _described(kernel: Kernel) -> str:
    """What a backend's module says about itself here, if it has a function `describe() -> str`."""
    module = sys.modules.get(getattr(kernel.run, "__module__", ""))
    describe = getattr(module, "describe", None)
    return describe() if describe is not None else ""


def backend_facts() -> dict[str, dict[str, Any]]:
    """For each backend: whether anything of it can run here, the ops it has, and why not."""
    from fastlora import backends
    from fastlora.dispatch import registry

    backends.load()
    found: dict[str, dict[str, Any]] = {}
    for name in registry.backends():
        kernels = [kernel for kernel in registry.kernels() if kernel.backend == name]
        reasons = [kernel.limits.missing() for kernel in kernels]
        found[name] = {
            "usable": not all(reasons),
            "ops": sorted({kernel.op for kernel, reason in zip(kernels, reasons, strict=True) if not reason}),
            "devices": sorted({device for kernel in kernels for device in kernel.limits.devices or ("any",)}),
            "about": _described(kernels[0]) if not all(reasons) else "",
            "missing": sorted({reason for reason in reasons if reason}),
        }
    return found


def facts() -> dict[str, Any]:
    """Everything `fastlora env` shows, ready for JSON."""
    from fastlora import settings

    return {
        "system": {"platform": platform.platform(), "machine": platform.machine(), "executable": sys.executable},
        "versions": versions(),
        "devices": devices(),
        "backends": backend_facts(),
        "settings": dataclasses.asdict(settings.current),
    }


def _show(found: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    table = Table("package", "version", title=found["system"]["platform"], title_justify="left")
    for name, version in found["versions"].items():
        table.add_row(name, version or "[dim]not installed[/dim]")
    console.print(table)

    cpu = found["devices"]["cpu"]
    table = Table("device", "name", "what it can do")
    tier = f"{cpu['threads']} threads, {cpu['torch_tier']} in torch; {' '.join(cpu['flags'])}"
    table.add_row("cpu", cpu["name"], tier)
    for index, gpu in enumerate(found["devices"]["gpus"]):
        table.add_row(f"cuda:{index}", gpu["name"], f"capability {gpu['capability']}, {gpu['memory_gib']} GiB")
    if not found["devices"]["gpus"]:
        table.add_row("cuda", "[dim]none[/dim]", "")
    console.print(table)

    table = Table("backend", "here", "devices", "ops, or why not")
    for name, backend in found["backends"].items():
        about = f"{backend['about']}; " if backend["about"] else ""
        text = about + ", ".join(backend["ops"]) if backend["usable"] else "; ".join(backend["missing"])
        usable = "[green]yes[/green]" if backend["usable"] else "[red]no[/red]"
        table.add_row(name, usable, ", ".join(backend["devices"]), text)
    console.print(table)

    chosen = ", ".join(f"{name}={value!r}" for name, value in found["settings"].items())
    console.print(f"settings: {chosen}", highlight=False)


def env(json: Annotated[bool, typer.Option("--json", help="Machine-readable output.")] = False) -> None:
    """Versions, devices, and which backends are built and why not."""
    found = facts()
    if json:
        print(json_format.dumps(found, indent=2))
    else:
        _show(found)
