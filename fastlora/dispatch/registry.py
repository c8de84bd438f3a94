"""Which kernel runs a problem: reasons first, then the cheapest able one.

A backend is data plus a function: `register(Kernel(...))`. It declares its `Limits`; the sentences that say why it
cannot run a problem are written here, once, for every backend.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import torch

from fastlora import settings
from fastlora.dispatch import cost, tuning
from fastlora.dispatch.tuning import capturing
from fastlora.errors import UnsupportedError
from fastlora.problem import FLAG_NAMES, Problem

ALL_FLAGS = sum(FLAG_NAMES)


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a kernel can do; anything left at its default is unrestricted.

    Attributes:
        devices: device types it runs on.
        dtypes: dtypes of x and y.
        adapter_dtypes: dtypes of a and b.
        formats: weight kinds ("dense", "nf4", "fp4").
        flags: the `Problem.flags` bits it honours.
        max_m: largest token count.
        max_r: largest rank.
        missing: why it cannot run at all here (package absent, library not built); "" when it can.
        also: one more reason why it cannot run a problem, where the fields above cannot say it; "" when it can.
    """

    devices: frozenset[str] | None = None
    dtypes: frozenset[torch.dtype] | None = None
    adapter_dtypes: frozenset[torch.dtype] | None = None
    formats: frozenset[str] | None = None
    flags: int = ALL_FLAGS
    max_m: int | None = None
    max_r: int | None = None
    missing: Callable[[], str] = lambda: ""
    also: Callable[[Problem], str] = lambda problem: ""


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One implementation of one op by one backend (a backend may register several, told apart by `plan`).

    Attributes:
        op: name of the op, as in `Problem.op`.
        backend: name of the backend.
        run: the launcher; its arguments are fixed per op, see `ops/schema.py`.
        limits: what it can do.
        seconds: predicted time of a problem, for choosing among able kernels.
        plan: short word for the strategy, shown by `explain`.
        kept: for `lora_fwd` the same with the merged weight it has made after its outputs, for `lora_bwd` the same with
            that weight as its last argument; None where a plan makes none.
    """

    op: str
    backend: str
    run: Callable[..., Any]
    limits: Limits
    seconds: Callable[[Problem], float] = cost.roofline_seconds
    plan: str = "direct"
    kept: Callable[..., Any] | None = None


_kernels: dict[str, list[Kernel]] = {}
_selected: dict[tuple[Problem, str, settings.Settings], Kernel] = {}
_CACHE_SIZE = 4096
_HOPELESS = 4.0  # times the best prediction: not worth measuring


def register(kernel: Kernel) -> Kernel:
    """Add a kernel; called by backend modules when they are loaded."""
    _kernels.setdefault(kernel.op, []).append(kernel)
    _selected.clear()
    return kernel


def kernels(op: str | None = None) -> list[Kernel]:
    """All registered kernels, or those of one op."""
    if op is not None:
        return list(_kernels.get(op, ()))
    return [kernel for group in _kernels.values() for kernel in group]


def backends() -> list[str]:
    """Names of the registered backends, sorted."""
    return sorted({kernel.backend for kernel in kernels()})


def _names(items: Iterable[object]) -> str:
    return ", ".join(sorted(str(item).removeprefix("torch.") for item in items))


def why_not(kernel: Kernel, problem: Problem) -> list[str]:
    """The reasons why `kernel` cannot run `problem`; empty when it can."""
    limits, reasons = kernel.limits, []
    if missing := limits.missing():
        reasons.append(missing)
    for what, value, allowed in (
        ("device", problem.device, limits.devices),
        ("dtype", problem.dtype, limits.dtypes),
        ("adapter dtype", problem.adapter_dtype, limits.adapter_dtypes),
        ("weight format", problem.format.kind, limits.formats),
    ):
        if allowed is not None and value not in allowed:
            reasons.append(f"{what} must be one of {_names(allowed)}, got {_names([value])}")
    if extra := problem.flags & ~limits.flags:
        reasons.append(f"cannot do {', '.join(name for bit, name in FLAG_NAMES.items() if extra & bit)}")
    if limits.max_m is not None and problem.m > limits.max_m:
        reasons.append(f"at most {limits.max_m} tokens, got {problem.m}")
    if limits.max_r is not None and problem.r > limits.max_r:
        reasons.append(f"rank at most {limits.max_r}, got {problem.r}")
    if reason := limits.also(problem):
        reasons.append(reason)
    return reasons


def select(problem: Problem, forced: str = "", args: tuple[Any, ...] | None = None) -> Kernel:
    """The cheapest able kernel, or the forced backend's cheapest.

    Args:
        problem: what to run.
        forced: a backend's name, or "" for free choice (then the `backend` setting applies). "backend:plan" also
            forces the plan, in ops where the backend has a plan of that name.
        args: the arguments `Kernel.run` will get. Where the setting `tune` is on, able kernels are then measured on
            them, once for a problem; without them, or while a graph is captured, the prediction decides.

    Raises:
        UnsupportedError: nothing, or not the forced backend, can run it; lists the reasons per backend.
    """
    key = (problem, forced, settings.current)
    found = _selected.get(key)
    if found is None:
        if len(_selected) >= _CACHE_SIZE:
            _selected.clear()
        able = _able(problem, forced or settings.current.backend)
        found = min(able, key=lambda kernel: kernel.seconds(problem))
        if settings.current.tune and len(able) > 1:
            if args is None or capturing(problem.device):
                return found
            found = _measured(problem, able, found, args)
        _selected[key] = found
    return found


def has_own(problem: Problem, forced: str = "") -> bool:
    """Whether a kernel beyond the reference's can run a problem; of the forced backend, if one is named."""
    backend = (forced or settings.current.backend).partition(":")[0]
    return any(
        kernel.backend != "reference" and backend in ("", kernel.backend) and not why_not(kernel, problem)
        for kernel in _kernels.get(problem.op, ())
    )


def _measured(problem: Problem, able: list[Kernel], predicted: Kernel, args: tuple[Any, ...]) -> Kernel:
    """The fastest of the kernels whose prediction is not hopeless, measured now or remembered from an earlier run."""
    limit = _HOPELESS * predicted.seconds(problem)
    names = {f"{each.backend}:{each.plan}": each for each in able if each.seconds(problem) <= limit}
    key = tuning.key_of(problem)
    default = f"{predicted.backend}:{predicted.plan}"
    return names[
        tuning.tuner.choose(
            key,
            list(names),
            lambda name: tuning.seconds_of(lambda: names[name].run(problem, *args), problem.device),
            default=default,
        )
    ]


def _able(problem: Problem, forced: str) -> list[Kernel]:
    """The kernels that can run a problem, at least one; UnsupportedError with every reason where there is none."""
    forced, _, plan = forced.partition(":")
    reasons: dict[str, list[str]] = {}
    able: list[Kernel] = []
    candidates = [kernel for kernel in _kernels.get(problem.op, ()) if not forced or kernel.backend == forced]
    if any(kernel.plan == plan for kernel in candidates):
        candidates = [kernel for kernel in candidates if kernel.plan == plan]
    for kernel in candidates:
        why = why_not(kernel, problem)
        if why:
            reasons.setdefault(kernel.backend, []).extend(why)
        else:
            able.append(kernel)
    if able:
        return able
    if forced and forced not in backends():
        raise UnsupportedError(f"unknown backend {forced!r} for {problem}; known: {', '.join(backends())}")
    if forced and not reasons:
        reasons[forced] = [f"has no kernel for {problem.op}"]
    what = f"backend {forced!r}" if forced else "no backend"
    raise UnsupportedError(f"{what} cannot run {problem}" if forced else f"{what} can run {problem}", reasons)


def explain(problem: Problem, forced: str = "") -> str:
    """The table `select` decides from: every kernel of the op, its predicted time or why it cannot run."""
    rows = []
    chosen: Kernel | None
    try:
        chosen = select(problem, forced)
    except UnsupportedError:
        chosen = None
    for kernel in _kernels.get(problem.op, ()):
        why = why_not(kernel, problem)
        verdict = "; ".join(why) if why else f"{kernel.seconds(problem) * 1e6:.1f} us predicted"
        mark = "->" if kernel is chosen else "  "
        rows.append(f"{mark} {kernel.backend:<10} {kernel.plan:<10} {verdict}")
    return "\n".join([str(problem), *rows])
