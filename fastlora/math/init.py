"""How adapters start: y = x w^T + s * (x a^T) b^T with a [r, k], b [n, r] for a weight w [n, k].

| strategy | a | b | weight |
|---|---|---|---|
| kaiming (True, original) | uniform in +-1/sqrt(k): kaiming-uniform with slope sqrt(5) | 0 | |
| gaussian | normal, std 1/r | 0 | |
| normal | normal, std 0.02 | 0 | |
| standard_normal | normal, std 1 | 0 | |
| he | normal, std 1/sqrt(k) | 0 | |
| xavier | normal, std sqrt(2/(k + r)) | 0 | |
| normalized | normal, std 1/sqrt(r): E|a x|^2 = |x|^2 | 0 | |
| orthogonal | rows from one half of an orthogonal basis of R^r | from the other half: b a = 0 | |
| random (False) | uniform in +-1/sqrt(k) | uniform in +-1/sqrt(r) | |
| pissa, pissa_niter_N | sqrt(S/s) V^T, leading r of w = U S V^T | U sqrt(S/s) | w - s b a |
| olora | the r first rows of R in w = Q R | the r first columns of Q | w - s b a |
| loftq | as pissa, but of w - quantized(w) | as pissa | the tensor to quantize |

`pissa_niter_N` finds the leading part with random probes and N power iterations. Draws are fp32, from a CPU generator
seeded with the given seed: the same on every device. Matrix factors have their signs fixed, so that devices agree on
them to rounding.

Sources: PEFT's `LoraConfig.init_lora_weights`, whose names these are where it has them; E. Hu et al., "LoRA" (2021);
F. Meng et al., "PiSSA" (2024); K. Büyükakyüz, "OLoRA" (2024); Y. Li et al., "LoftQ" (2023);
N. Halko et al., "Finding structure with randomness" (2011), algorithms 4.4 and 5.1.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fastlora.config import SEED_END
from fastlora.errors import ConfigError, DtypeError, ShapeError

ALIASES = {"original": "kaiming"}
DRAWN = ("kaiming", "gaussian", "normal", "standard_normal", "he", "xavier", "normalized")  # b = 0
FACTORED = ("pissa", "pissa_niter_N", "olora", "loftq")  # from the weight, and change it
KNOWN = (*DRAWN, *ALIASES, "orthogonal", "random", *FACTORED)

_NITER = re.compile(r"pissa_niter_(\d+)")

Requantize = Callable[[Tensor], Tensor]


class AdapterInit(NamedTuple):
    """A started adapter."""

    a: Tensor  # fp32 [r, in_features]
    b: Tensor  # fp32 [out_features, r]
    base: Tensor | None  # the changed weight [out, in], fp32 (fp64 of an fp64 weight); None: the weight stays
    strategy: str  # canonical name, to be recorded
    seed: int  # of the draws, to be recorded


def canonical(strategy: str | bool) -> str:
    """The one name of a strategy: True -> "kaiming", False -> "random". Raises ConfigError for an unknown one."""
    if isinstance(strategy, bool):
        return "kaiming" if strategy else "random"
    if isinstance(strategy, str):
        name = strategy.lower()
        name = ALIASES.get(name, name)
        if _NITER.fullmatch(name) or (name in KNOWN):
            return name
    raise ConfigError(f"unknown init_lora_weights {strategy!r}; known: True, False, {', '.join(KNOWN)}")


def changes_base(strategy: str | bool) -> bool:
    """Whether a strategy needs the float weight and replaces it: its adapter fits only the changed weight."""
    name = canonical(strategy)
    return name in FACTORED or _NITER.fullmatch(name) is not None


def init_adapter(
    strategy: str | bool,
    r: int,
    in_features: int,
    out_features: int,
    *,
    weight: Tensor | None = None,
    scaling: float = 1.0,
    bound: float | None = None,
    seed: int,
    requantize: Requantize | None = None,
    iterations: int = 1,
) -> AdapterInit:
    """Start one adapter.

    Args:
        strategy: see the table above.
        weight: float [out_features, in_features]; needed by pissa, olora and loftq, otherwise unused.
        scaling: s, which pissa, olora and loftq take into account.
        bound: clamp a to [-bound, bound]; the changed weight accounts for it. With "orthogonal", b a is then not 0.
        seed: of a CPU generator, in [0, 2^63 - 1).
        requantize: float [n, k] -> what is left after quantizing and decoding it; needed by loftq.
        iterations: of loftq.

    Returns:
        a and b on the weight's device if it is used, else on the CPU.

    Raises:
        ConfigError: unknown strategy, or something it needs is missing or out of range.
        ShapeError: a size below 1, a rank above min(n, k) for a factorisation, or a weight of another shape.
        DtypeError: a weight that is not floating point.
    """
    name = canonical(strategy)
    if r < 1 or in_features < 1 or out_features < 1:
        raise ShapeError(f"r, in_features and out_features must be at least 1, got {r}, {in_features}, {out_features}")
    if bound is not None and not 0 < bound < math.inf:
        raise ConfigError(f"init_bound must be None or a positive number, got {bound!r}")
    if not 0 <= seed < SEED_END:
        raise ConfigError(f"init_seed must be in [0, 2^63 - 1), got {seed}")
    generator = torch.Generator(device="cpu").manual_seed(seed)
    if changes_base(name):
        w = _float_weight(name, weight, r, out_features, in_features)
        if not (math.isfinite(scaling) and scaling > 0):
            raise ConfigError(f"{name!r} needs a positive scaling, got {scaling!r}")
        if name == "loftq":
            a, b, base = _loftq(w, r, scaling, bound, requantize, iterations)
        else:
            a, b = _olora(w, r) if name == "olora" else _pissa(name, w, r, scaling, generator)
            a = _clamp(a, bound)
            base = _without(w, a, b, scaling)
        return AdapterInit(a, b, base, name, seed)
    if name == "orthogonal":
        a, b = _orthogonal(r, in_features, out_features, generator)
    else:
        a, b = _draw(name, r, in_features, out_features, generator)
    return AdapterInit(_clamp(a, bound), b, None, name, seed)


def _clamp(a: Tensor, bound: float | None) -> Tensor:
    return a if bound is None else a.clamp(-bound, bound)


# --- drawn ------------------------------------------------------------------------------------------------------------


def _normal(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    return torch.randn((rows, columns), generator=generator, dtype=torch.float32, device="cpu")


def _uniform(rows: int, columns: int, limit: float, generator: torch.Generator) -> Tensor:
    unit = torch.rand((rows, columns), generator=generator, dtype=torch.float32, device="cpu")
    return unit.mul_(2 * limit).sub_(limit)


def _draw(name: str, r: int, k: int, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """a [r, k] at random, b [n, r] zero (random for "random")."""
    b = torch.zeros((n, r), dtype=torch.float32, device="cpu")
    if name == "kaiming":
        return _uniform(r, k, 1 / math.sqrt(k), generator), b
    if name == "random":
        a = _uniform(r, k, 1 / math.sqrt(k), generator)
        return a, _uniform(n, r, 1 / math.sqrt(r), generator)
    std = {
        "gaussian": 1 / r,
        "normal": 0.02,
        "standard_normal": 1.0,
        "he": 1 / math.sqrt(k),
        "xavier": math.sqrt(2 / (k + r)),
        "normalized": 1 / math.sqrt(r),
    }[name]
    return _normal(r, k, generator).mul_(std), b


def _orthogonal(r: int, k: int, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Random combinations of the even rows of an orthogonal [r, r] matrix in a, of the odd rows in b; both / 10.

    The rows are orthogonal to one another, so b a = 0: neither factor is zero, and the model's function is unchanged.
    """
    if r % 2:
        raise ConfigError(f"'orthogonal' needs an even rank, got r={r}")
    q, _ = torch.linalg.qr(_normal(r, r, generator))
    a = q[0::2].T @ _normal(r // 2, k, generator)
    b = _normal(n, r // 2, generator) @ q[1::2]
    return a.div_(10), b.div_(10)


# --- factored ---------------------------------------------------------------------------------------------------------


def _float_weight(name: str, weight: Tensor | None, r: int, n: int, k: int) -> Tensor:
    """The weight in the precision the factorisation works in: fp32, or fp64 of an fp64 weight."""
    if weight is None:
        raise ConfigError(
            f"{name!r} factors the float weight, which is not there (already quantized?): start from a float layer "
            "and quantize after it, or choose an initialisation that does not look at the weight"
        )
    if not weight.dtype.is_floating_point:
        raise DtypeError(f"{name!r} expects a float weight, got {weight.dtype}")
    if tuple(weight.shape) != (n, k):
        raise ShapeError(f"{name!r}: expected a weight of shape [{n}, {k}], got {list(weight.shape)}")
    if r > min(n, k):
        raise ShapeError(f"{name!r}: expected r at most min(out, in) = {min(n, k)}, got {r}")
    return weight.detach().to(torch.float64 if weight.dtype == torch.float64 else torch.float32)


def _without(w: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """w - s b a, for the fp32 a and b that the adapter will hold."""
    return torch.addmm(w, b.to(w.dtype), a.to(w.dtype), alpha=-scaling)


def _split(u: Tensor, s: Tensor, vh: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """u [n, r] s [r] vh [r, k] -> a, b with scaling * b a = u s vh, equal parts, the largest |vh| of a row positive."""
    largest = vh.abs().argmax(dim=1, keepdim=True)
    root = (s / scaling).sqrt() * vh.gather(1, largest).squeeze(1).sign()
    return (root[:, None] * vh).float().contiguous(), (u * root).float().contiguous()


def _leading(w: Tensor, r: int) -> tuple[Tensor, Tensor, Tensor]:
    u, s, vh = torch.linalg.svd(w, full_matrices=False)
    return u[:, :r], s[:r], vh[:r]


def _leading_randomised(w: Tensor, r: int, steps: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Range of w from r random probes and `steps` power iterations, then an exact factorisation inside it."""
    if w.shape[0] < w.shape[1]:
        v, s, uh = _leading_randomised(w.T, r, steps, generator)
        return uh.T, s, v.T
    probes = _normal(w.shape[1], r, generator).to(w)
    q, _ = torch.linalg.qr(w @ probes)
    for _ in range(steps):
        q, _ = torch.linalg.qr(w.T @ q)
        q, _ = torch.linalg.qr(w @ q)
    u, s, vh = torch.linalg.svd(q.T @ w, full_matrices=False)
    return q @ u, s, vh


def _pissa(name: str, w: Tensor, r: int, scaling: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    match = _NITER.fullmatch(name)
    factors = _leading_randomised(w, r, int(match[1]), generator) if match else _leading(w, r)
    return _split(*factors, scaling)


def _olora(w: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """w = Q R: a = R[:r], b = Q[:, :r], with R's diagonal positive. The scale is not divided out, as in PEFT."""
    q, upper = torch.linalg.qr(w)
    sign = torch.where(upper.diagonal()[:r] < 0, -1.0, 1.0).to(w)
    return (upper[:r] * sign[:, None]).float().contiguous(), (q[:, :r] * sign).float().contiguous()


def _loftq(
    w: Tensor, r: int, scaling: float, bound: float | None, requantize: Requantize | None, iterations: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Alternate: quantize what the adapter does not hold, let the adapter hold what quantizing lost.

    The scale is divided out, so that quantized(base) + s b a is what approximates w. (PEFT leaves it in, and is close
    to w only where s = 1.)
    """
    if requantize is None:
        raise ConfigError("'loftq' needs a base that gets quantized: it repairs what quantizing loses")
    if iterations < 1:
        raise ConfigError(f"'loftq' needs at least 1 iteration, got {iterations}")
    base = w
    for step in range(iterations):
        a, b = _split(*_leading(w - requantize(base).to(w), r), scaling)
        a = _clamp(a, bound)
        if step + 1 < iterations:
            base = _without(w, a, b, scaling)
    return a, b, base
