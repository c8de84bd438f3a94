"""`fastlora explain`: which kernel would run a problem, at what predicted time, and why the others would not."""

from __future__ import annotations

import json as json_format
from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fastlora.errors import ConfigError, UnsupportedError

if TYPE_CHECKING:
    import torch

    from fastlora.problem import Problem

DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "fp64": "float64"}
QUANTS = ("nf4", "fp4")
DEVICES = ("cpu", "cuda")
DEFAULT_BLOCKSIZE = 64


def one_of(what: str, value: str, known: Iterable[str]) -> None:
    """Raise ConfigError, listing the known ones, unless `value` is one of them."""
    if value not in known:
        raise ConfigError(f"unknown {what} {value!r}; known: {', '.join(known)}")


def check(sizes: dict[str, int], dtype: str, adapter_dtype: str, quant: str, device: str) -> None:
    """Raise ConfigError for a size below one or an unknown word; loads nothing, so that it answers at once."""
    for name, size in sizes.items():
        if size < 1:
            raise ConfigError(f"{name} must be at least 1, got {size}")
    for word in (dtype, adapter_dtype):
        if word not in DTYPES.values():
            one_of("dtype", word, DTYPES)
    if quant:
        one_of("quant", quant, QUANTS)
    if device:
        one_of("device", device, DEVICES)


def dtype_of(name: str) -> torch.dtype:
    """The dtype of a short name, "bf16", or of torch's own, "bfloat16"."""
    import torch

    dtype: torch.dtype = getattr(torch, DTYPES.get(name, name))
    return dtype


def build(
    m: int,
    n: int,
    k: int,
    r: int,
    dtype: torch.dtype,
    adapter_dtype: torch.dtype,
    quant: str,
    device: str,
    **wanted: bool,
) -> Problem:
    """The `Problem` a layer would pose.

    Args:
        m, n, k, r: tokens, out_features, in_features, rank.
        dtype: of x and y.
        adapter_dtype: of a and b.
        quant: "" for a dense weight, else "nf4" or "fp4" (blocks of 64, double quantization).
        device: a device type.
        wanted: `dropout`, `dora`, `train`, `backward`.
    """
    from fastlora import settings
    from fastlora.problem import (
        DENSE,
        DORA,
        DROPOUT,
        NEED_DA,
        NEED_DB,
        NEED_DMAG,
        NEED_DX,
        SAVE_MASK,
        TRAIN,
        Format,
        Problem,
    )

    flags = (DROPOUT if wanted["dropout"] else 0) | (DORA if wanted["dora"] else 0)
    if wanted["backward"]:
        flags |= NEED_DX | NEED_DA | NEED_DB | (NEED_DMAG if wanted["dora"] else 0)
    elif wanted["train"]:
        flags |= TRAIN
    if wanted["dropout"] and not settings.current.low_memory:
        flags |= SAVE_MASK
    fmt = Format(quant, DEFAULT_BLOCKSIZE, nested=True) if quant else DENSE
    op = "lora_bwd" if wanted["backward"] else "lora_fwd"
    return Problem(op, m, n, k, r, dtype, adapter_dtype, fmt, flags, device)


def rows(problem: Problem) -> list[dict[str, Any]]:
    """One row a kernel of the op: predicted seconds or reasons, and which one is chosen."""
    from fastlora.dispatch import registry

    try:
        chosen: registry.Kernel | None = registry.select(problem)
    except UnsupportedError:
        chosen = None
    found = []
    for kernel in registry.kernels(problem.op):
        reasons = registry.why_not(kernel, problem)
        seconds = None if reasons else kernel.seconds(problem)
        facts = {"backend": kernel.backend, "plan": kernel.plan, "chosen": kernel is chosen}
        found.append({**facts, "seconds": seconds, "reasons": reasons})
    return found


def explain(
    m: Annotated[int, typer.Option("-m", help="Tokens.")],
    n: Annotated[int, typer.Option("-n", help="Output features.")],
    k: Annotated[int, typer.Option("-k", help="Input features.")],
    r: Annotated[int, typer.Option("-r", help="Rank of the adapter.")] = 16,
    dropout: Annotated[bool, typer.Option(help="With dropout on the adapter's input.")] = False,
    dora: Annotated[bool, typer.Option(help="With DoRA's magnitude.")] = False,
    quant: Annotated[str, typer.Option(help="nf4 or fp4; a dense weight without.")] = "",
    dtype: Annotated[str, typer.Option(help="Of the activations: bf16, fp16, fp32, fp64.")] = "bf16",
    adapter_dtype: Annotated[str, typer.Option(help="Of A and B.")] = "fp32",
    device: Annotated[str, typer.Option(help="cpu or cuda; what this machine has without.")] = "",
    train: Annotated[bool, typer.Option(help="Keep what the backward needs.")] = True,
    backward: Annotated[bool, typer.Option("--backward", help="The backward instead of the forward.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Machine-readable output.")] = False,
) -> None:
    """Which kernel would run a layer of this size, and why not the others."""
    check({"m": m, "n": n, "k": k, "r": r}, dtype, adapter_dtype, quant, device)
    import torch

    from fastlora import backends, settings
    from fastlora.dispatch import registry

    backends.load()
    if settings.current.backend:
        one_of("backend", settings.current.backend, registry.backends())
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    wanted = {"dropout": dropout, "dora": dora, "train": train, "backward": backward}
    problem = build(m, n, k, r, dtype_of(dtype), dtype_of(adapter_dtype), quant, device, **wanted)
    if json:
        print(json_format.dumps({"problem": str(problem), "kernels": rows(problem)}, indent=2))
    else:
        print(registry.explain(problem))
