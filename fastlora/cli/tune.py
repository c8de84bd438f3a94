"""`fastlora tune`: measure the kernels that could run a layer, once, and remember the fastest for this device."""

from __future__ import annotations

import json as json_format
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fastlora.cli import _work
from fastlora.cli.explain import DEFAULT_BLOCKSIZE, DTYPES, build, check, dtype_of
from fastlora.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from fastlora.nn.adapted import AdaptedLinear

TOKENS = (1, 16, 64, 512, 4096)
NO_GPU = (
    "no GPU here, and tuning is for GPU kernels: a CPU has few plans, between which the prediction chooses well "
    "(--device cpu measures them all the same)"
)


def remembered() -> dict[str, Any]:
    """What the tuning file holds: key -> {"choice", "seconds" of each candidate}; empty where there is none."""
    from fastlora.dispatch import tuning

    try:
        choices = json_format.loads(tuning.tuner.path.read_text())["choices"]
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return {}
    return choices if isinstance(choices, dict) else {}


def layer_of(n: int, k: int, r: int, dtype: torch.dtype, quant: str, device: str, **options: Any) -> AdaptedLinear:
    """A layer with random weights."""
    import torch

    from fastlora.config import LoraConfig
    from fastlora.nn.linear import LoraLinear, QLoraLinear

    config = LoraConfig(r=r, lora_alpha=2 * r, init_seed=0, **options)
    if quant:
        return QLoraLinear(
            k, n, bias=False, quant_type=quant, blocksize=DEFAULT_BLOCKSIZE, config=config, device=torch.device(device)
        )
    return LoraLinear(k, n, bias=False, config=config, dtype=dtype, device=torch.device(device))


def exercise(layer: AdaptedLinear, m: int, dtype: torch.dtype, device: str) -> None:
    """One evaluation and one training step of m tokens: every kernel that such a layer needs is chosen."""
    import torch

    x = torch.randn(m, layer.in_features, device=device, dtype=dtype, requires_grad=True)
    with torch.no_grad():
        layer.eval()(x)
    layer.train()(x).sum().backward()


def _rows(before: dict[str, Any], after: dict[str, Any], sizes: list[tuple[int, ...]], device: str) -> Iterator[Any]:
    """The remembered choices of these sizes on this device, in the order of the sizes."""
    import torch

    from fastlora.dispatch import tuning

    for m, n, k, r in sizes:
        known = tuning.key_of(build(m, n, k, r, torch.float32, torch.float32, "", device, **NOTHING))
        head = f"{known.source}|{known.triton}|{known.device}|"
        shapes = {"x".join(map(str, tuning.bucket(*shape))) for shape in ((m, n, k, r), (0, n, k, r))}
        for key, entry in after.items():
            what, _, shape = key.removeprefix(head).rpartition("|")
            if key.startswith(head) and shape in shapes:
                yield {"m": m, "what": _named(what), "new": before.get(key) != entry, **entry}


def _named(what: str) -> str:
    """A key's static part with the flags as words."""
    from fastlora.problem import FLAG_NAMES

    head, _, flags = what.rpartition(" ")
    return f"{head} {','.join(name for bit, name in FLAG_NAMES.items() if int(flags) & bit) or 'eval'}"


NOTHING = {"dropout": False, "dora": False, "train": False, "backward": False}


def tune(
    n: Annotated[int, typer.Option("-n", help="Output features.")],
    k: Annotated[int, typer.Option("-k", help="Input features.")],
    m: Annotated[list[int] | None, typer.Option("-m", help="Tokens; may be repeated (1, 16, 64, 512, 4096).")] = None,
    r: Annotated[int, typer.Option("-r", help="Rank of the adapter.")] = 16,
    dropout: Annotated[float, typer.Option(help="Of the adapter's input.")] = 0.0,
    dora: Annotated[bool, typer.Option(help="With DoRA's magnitude.")] = False,
    quant: Annotated[str, typer.Option(help="nf4 or fp4; a dense weight without.")] = "",
    dtype: Annotated[str, typer.Option(help="Of the activations: bf16, fp16, fp32.")] = "bf16",
    device: Annotated[str, typer.Option(help="cuda, or cpu to measure there all the same.")] = "cuda",
    json: Annotated[bool, typer.Option("--json", help="Machine-readable output.")] = False,
) -> None:
    """Measure the kernels for a layer of this size and remember the fastest; FASTLORA_TUNE=1 makes runs use it."""
    tokens = list(m or TOKENS)
    check({"n": n, "k": k, "r": r, "m": min(tokens)}, dtype, "fp32", quant, device)
    if not 0.0 <= dropout < 1.0:
        raise ConfigError(f"dropout must be in [0, 1), got {dropout}")
    if dtype not in DTYPES:
        raise ConfigError(f"unknown dtype {dtype!r}; known: {', '.join(DTYPES)}")
    import torch

    from fastlora import settings
    from fastlora.dispatch import tuning

    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError(NO_GPU)
    began, before = time.perf_counter(), remembered()
    layer = layer_of(n, k, r, dtype_of(dtype), quant, device, use_dora=dora, lora_dropout=dropout)
    with settings.override(tune=True), _work.console().status("measuring"):
        for each in tokens:
            exercise(layer, each, dtype_of(dtype), device)
    seconds = time.perf_counter() - began
    rows = list(_rows(before, remembered(), [(each, n, k, r) for each in tokens], device))
    if json:
        _work.print_json({"file": str(tuning.tuner.path), "seconds": seconds, "choices": rows})
        return
    _show(rows, seconds, str(tuning.tuner.path))


def _show(rows: list[dict[str, Any]], seconds: float, path: str) -> None:
    for row in rows:
        ran = sorted(row["seconds"].items(), key=lambda item: item[1])
        times = ", ".join(f"{name} {1e6 * spent:.0f} us" for name, spent in ran)
        print(f"m={row['m']:<6} {row['what']}: {row['choice']} ({times}){'' if row['new'] else ', known before'}")
    new = sum(row["new"] for row in rows)
    if not rows:
        print("nothing to choose: for each op one kernel can run, or is predicted far ahead of the others")
    print(f"{new} measured in {seconds:.1f} s, {len(rows) - new} known before; kept in {path}")
    print("FASTLORA_TUNE=1 makes training and serving use what is kept")
