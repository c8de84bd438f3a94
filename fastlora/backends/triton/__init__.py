"""The Triton backend: LoRA, QLoRA and DoRA on NVIDIA and AMD GPUs, or anywhere under Triton's interpreter.

Importing this package does not import triton; the first launch does. Kernels live one family a file; `forward` and
`backward` say which of them make up a plan; here each plan is registered with what it can do and what it should cost.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch

from fastlora import settings
from fastlora.backends.triton import predict
from fastlora.dispatch.registry import ALL_FLAGS, Kernel, Limits, register
from fastlora.problem import DORA, DROPOUT, SHARED, Problem

_FLOATS = frozenset({torch.float32, torch.bfloat16, torch.float16})
_QUANTIZED = frozenset({"nf4", "fp4"})
_DEVICES = frozenset({"cuda", "cpu"} if settings.current.triton_interpret else {"cuda"})
MAX_RANK = 256
FUSED_TOKENS = 128  # decoding inside the main loop pays while it is bound by memory
SKINNY_TOKENS = 64


@functools.cache
def missing() -> str:
    """Why the backend cannot run here at all, or ""."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if not settings.current.triton_interpret and not torch.cuda.is_available():
        return "no GPU that torch can use (TRITON_INTERPRET=1 runs the kernels in Triton's interpreter)"
    return ""


def _missing_merge() -> str:
    return missing() or ("" if settings.current.merge else "merging is off (FASTLORA_MERGE=0)")


def _own_drop(problem: Problem) -> str:
    """The plans with a single base product cannot do DoRA in PEFT's dropout semantics."""
    if problem.flags & (DORA | DROPOUT | SHARED) == DORA | DROPOUT:
        return "DoRA with its own dropout needs two base products"
    return ""


@functools.cache
def _function(module: str, name: str) -> Callable[..., Any]:
    return getattr(importlib.import_module(f"{__name__}.{module}"), name)


def _plan(module: str, plan: str) -> Callable[..., Any]:
    """The op by one plan; its module, and with it triton, is imported on the first call."""

    def run(problem: Problem, *args: Any) -> Any:
        return _function(module, "run")(plan, problem, *args)

    return run


def _of(module: str, name: str) -> Callable[..., Any]:
    """An op of one plan; its module is imported on the first call."""

    def run(*args: Any) -> Any:
        return _function(module, name)(*args)

    return run


_ALL = Limits(devices=_DEVICES, dtypes=_FLOATS, adapter_dtypes=_FLOATS, max_r=MAX_RANK, missing=missing)
_MERGE = Limits(
    devices=_DEVICES,
    dtypes=_FLOATS,
    adapter_dtypes=_FLOATS,
    formats=_QUANTIZED,
    flags=ALL_FLAGS & ~DROPOUT & ~SHARED,
    max_r=MAX_RANK,
    missing=_missing_merge,
)
_DENSE = Limits(
    devices=_DEVICES,
    dtypes=_FLOATS,
    adapter_dtypes=_FLOATS,
    max_r=MAX_RANK,
    missing=missing,
    also=_own_drop,
)
_FUSED = Limits(
    devices=_DEVICES,
    dtypes=_FLOATS,
    adapter_dtypes=_FLOATS,
    formats=_QUANTIZED,
    max_m=FUSED_TOKENS,
    max_r=MAX_RANK,
    missing=missing,
    also=_own_drop,
)
_SKINNY = Limits(
    devices=_DEVICES,
    dtypes=_FLOATS,
    adapter_dtypes=_FLOATS,
    formats=_QUANTIZED,
    max_m=SKINNY_TOKENS,
    max_r=MAX_RANK,
    missing=missing,
    also=_own_drop,
)

for _op, _module, _plans in (
    ("lora_fwd", "forward", {"merge": _MERGE, "split": _ALL, "dense": _DENSE, "fused": _FUSED, "skinny": _SKINNY}),
    ("lora_bwd", "backward", {"merge": _MERGE, "split": _ALL, "dense": _DENSE}),
):
    for _name, _limits in _plans.items():
        _seconds = functools.partial(predict.seconds, _name)
        _kept = _of(_module, "merge_kept") if _name == "merge" else None
        register(Kernel(_op, "triton", _plan(_module, _name), _limits, _seconds, _name, _kept))

for _name in ("grouped_fwd", "grouped_bwd", "grouped_mask"):
    register(Kernel(_name, "triton", _of("grouped", _name), _ALL, predict.grouped, "grouped"))

for _name in ("projections_fwd", "projections_bwd"):
    register(Kernel(_name, "triton", _of("projections", _name), _ALL, predict.direct, "group"))

for _name in ("glu_fwd", "glu_bwd"):
    register(Kernel(_name, "triton", _of("gated", _name), _ALL, predict.direct, "gated"))

_FORMAT = Limits(devices=_DEVICES, dtypes=_FLOATS, max_r=MAX_RANK, missing=missing)
for _name in ("quantize", "dequantize", "dropout_mask", "dora_norm"):
    register(Kernel(_name, "triton", _of("formats", _name), _FORMAT, predict.direct))
