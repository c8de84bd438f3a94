"""Inputs and the fp64 truth every contender is held against before it is timed.

The function, by autograd over plain torch (nothing here comes from an optimised path):

    LoRA             y = x w^T + s xd a^T b^T                 xd = keep_scale * mask * x
    DoRA, p = 0      y = c (x w^T + s x a^T b^T)              c = mag / |w + s b a|_row, the norm a constant
    DoRA, p > 0      y = x w^T + (c - 1)(xd w^T) + c (s xd a^T b^T), or shared: y = c (x w^T + s xd a^T b^T)

Gate, norm-wise (our own rows also for the worst row of each entry), relative to the truth:

    error <= 1.5 error(the same maths in eager PyTorch at the case's dtypes) + u_out + 4 u_acc |p| |q| / |truth|

u: unit roundoff of the output and the accumulation type; p, q: the operands of the entry's last reduction.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Hashable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.cases import Case

ADAPTED, BASE, DENSE = "adapted", "base", "dense"  # the whole layer; its frozen part; the unquantized frozen part
PACKED = "packed"  # key of the reference's NF4 bytes in `Weights.kept`
RANDOM = "random"  # some dropout decision, not the specified one
OUTPUTS = {"dequantize": "w", "quantize": "w", "dora_norm": "norm", "dropout_mask": "mask"}  # of every op but "linear"
_SAME_CODES = 0.01  # share of the quantization error by which a peer's values may differ from the reference's
MASK_SEED = 20260102
_ROWS = 2048  # rows per fp64 chunk: bounds the saved tensors, 0.5 GB for the widest case


class Drop(NamedTuple):
    """One dropout decision as the contender reported it."""

    mask: Tensor  # bool [m, k], True means kept
    keep_scale: float  # what the kept values were multiplied with


@dataclasses.dataclass
class Weights:
    """The frozen weight of a case, shared by all cases with the same shape, dtype and format.

    Attributes:
        w: [n, k] in the case's dtype: what gets quantized.
        base: [n, k] fp32, the values the frozen layer stands for (w, or its NF4 image).
        kept: what somebody derived from them and may want again: a peer's quantized layer, the truth of the base.
    """

    w: Tensor
    base: Tensor
    kept: dict[Hashable, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class Inputs:
    """Tensors of one case; a, b hold 16-bit values in fp32 so that every adapter dtype computes one function.

    Attributes:
        x: [m, k] in the case's dtype.
        dy: [m, n], likewise.
        w, base, kept: the frozen weight, see `Weights`.
        a, b: [r, k], [n, r] fp32.
        mag, norm: [n] fp32 and fp64, for DoRA.
    """

    x: Tensor
    dy: Tensor
    w: Tensor
    base: Tensor
    a: Tensor
    b: Tensor
    mag: Tensor | None
    norm: Tensor | None
    kept: dict[Hashable, Any] = dataclasses.field(default_factory=dict)


def make_weights(case: Case, device: torch.device, seed: int) -> Weights:
    """The zero-mean frozen weight of a case.

    Raises:
        ImportError: a quantized case, and the reference quantizer cannot be imported.
    """
    generator = torch.Generator(device=device).manual_seed(seed)
    w = (torch.randn(case.n, case.k, device=device, generator=generator) * case.k**-0.5).to(case.dtype)
    if not case.quant:
        return Weights(w, w.float())
    from fastlora.math import nf4

    packed = nf4.pack(w, "nf4", 64, case.nested)
    return Weights(w, nf4.dequantize(packed, torch.float32), {PACKED: packed})


def make_inputs(case: Case, device: torch.device, seed: int, weights: Weights | None = None) -> Inputs:
    """Fresh zero-mean inputs; the adapter contributes about half as much as the base, so its loss is seen.

    Args:
        weights: of an earlier case with the same shape, dtype, format and seed.

    Raises:
        ImportError: a quantized case, and the reference quantizer cannot be imported.
    """
    weights = weights or make_weights(case, device, seed)
    w, base = weights.w, weights.base
    generator = torch.Generator(device=device).manual_seed(seed + 1)

    def draw(*shape: int, std: float, dtype: torch.dtype = torch.float32) -> Tensor:
        return (torch.randn(*shape, device=device, generator=generator) * std).to(dtype)

    coarse = torch.bfloat16 if case.dtype == torch.float32 else case.dtype
    # First what all cases over one weight have in common, so that the truth of its base can be kept.
    x = draw(max(case.m, 1), case.k, std=1.0, dtype=case.dtype)
    dy = draw(max(case.m, 1), case.n, std=1.0, dtype=case.dtype)
    a = draw(case.r, case.k, std=case.k**-0.5, dtype=coarse).float()
    b = draw(case.n, case.r, std=0.5 / (case.scale * case.r**0.5), dtype=coarse).float()
    mag = norm = None
    if case.dora:
        norm = (base.double() + case.scale * (b.double() @ a.double())).norm(dim=1)
        spread = torch.rand(case.n, device=device, generator=generator) * 0.45 + 0.8
        mag = (norm * spread).float()
    return Inputs(
        x=x,
        dy=dy,
        w=w,
        base=base,
        a=a,
        b=b,
        mag=mag,
        norm=norm,
        kept=weights.kept,
    )


def _function(
    x: Tensor,
    w: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    c: Tensor | None,
    scale: float,
    drop: Drop | None,
    shared: bool,
) -> Tensor:
    base = x @ w.t()
    if a is None or b is None:
        return base
    xd = x if drop is None else (x * drop.mask) * drop.keep_scale
    delta = scale * ((xd @ a.t()) @ b.t())
    if c is None:
        return base + delta
    if drop is None or shared:
        return c * (base + delta)
    return base + (c - 1) * (xd @ w.t()) + c * delta


class _Known(NamedTuple):
    truth: dict[str, Tensor]  # fp64
    eager: dict[str, float]  # |eager - truth|
    eager_row: dict[str, float]  # the largest row of it


class Oracle:
    """Truth and allowance of one case; without dropout both are computed once and kept with the weight."""

    def __init__(self, case: Case, inputs: Inputs) -> None:
        self.case = case
        self.inputs = inputs

    def judge(
        self, outputs: dict[str, Tensor], function: str, drop: Drop | None = None, *, strict: bool = False
    ) -> dict[str, dict[str, float | bool | None]]:
        """Each entry's error and allowance, relative to the truth, and the worst row as a share of its allowance.

        Args:
            outputs: "y" and, when training, "dx", "da", "db", "dmag"; or the one entry of another op.
            function: ADAPTED, BASE or DENSE.
            drop: the decisions the contender drew; None without dropout.
            strict: the worst row counts as well, and decoding must be exact to the bit.
        """
        verdict: dict[str, dict[str, float | bool | None]] = {}
        if self.case.op == "dropout_mask":
            exact = function == RANDOM or torch.equal(outputs["mask"], self._mask())
            return {"mask": {"ok": exact, "error": None, "allowed": None, "worst_row": None}}
        known = self._truth(function, drop)
        for name, expected in known.truth.items():
            got = outputs.get(name)
            if got is None or got.shape != expected.shape:
                verdict[name] = {"ok": False, "error": None, "allowed": None, "worst_row": None}
                continue
            error, size = row_norms(got.detach().double() - expected), row_norms(expected)
            total = float(size.norm()) + 1e-300
            unit, slack = unit_roundoff(got.dtype), self._accumulation(name, drop.keep_scale if drop else 1.0)
            allowed = 1.5 * known.eager[name] + unit * total + slack
            if self.case.op == "quantize":  # another mean of the absmax values is another valid choice of codes
                allowed += _SAME_CODES * float((self.inputs.base - self.inputs.w.float()).norm())
            # Norms of single rows vary: the eager error of the worst row stands for the allowance of each.
            row_allowed = 1.5 * known.eager_row[name] + unit * size + slack / len(size) ** 0.5
            whole, worst = float(error.norm()), float((error / row_allowed.clamp_min(1e-300)).max())
            verdict[name] = {
                "ok": bool(whole <= allowed and (worst <= 1 or not strict)),  # False for NaN
                "error": _finite(whole / total),
                "allowed": allowed / total,
                "worst_row": _finite(worst),
            }
            if self.case.op in ("quantize", "dequantize"):
                exact = torch.equal(got, self.inputs.base.to(got.dtype))
                verdict[name] |= {"exact": exact, "ok": verdict[name]["ok"] and (exact or not strict)}
        return verdict

    def _truth(self, function: str, drop: Drop | None) -> _Known:
        case, kept = self.case, self.inputs.kept
        adapter = (case.r, case.dora) if function == ADAPTED else ()
        key = (case.op, function, case.m, *adapter)
        if drop is None and (key, case.train) in kept:
            return kept[key, case.train]
        if drop is None and (key, True) in kept:  # the step's truth has the forward's in it
            return _Known(*({"y": part["y"]} for part in kept[key, True]))
        if self.case.op == "linear":
            truth = self._run(function, torch.float64, drop)
            eager = self._run(function, self.case.dtype, drop)
        else:
            truth, eager = self._other()
        rows = {name: row_norms(value.double() - truth[name]) for name, value in eager.items()}
        known = _Known(
            truth,
            {name: float(norms.norm()) for name, norms in rows.items()},
            {name: float(norms.max()) for name, norms in rows.items()},
        )
        if drop is None:
            kept[key, case.train] = known
        return known

    def _run(self, function: str, dtype: torch.dtype, drop: Drop | None) -> dict[str, Tensor]:
        case, given = self.case, self.inputs
        exact, shared = dtype == torch.float64, case.dora_dropout == "shared"
        w = (given.w if function == DENSE else given.base).to(dtype)
        leaves: dict[str, Tensor] = {}
        if function == ADAPTED:
            leaves = {"da": given.a.to(dtype), "db": given.b.to(dtype)}
            if given.mag is not None:
                leaves["dmag"] = given.mag.to(torch.float64 if exact else torch.float32)
        leaves = {name: leaf.detach().clone().requires_grad_(case.train) for name, leaf in leaves.items()}
        parts: list[dict[str, Tensor]] = []
        rows = _ROWS if exact else given.x.shape[0]
        for start in range(0, given.x.shape[0], rows):
            cut = slice(start, start + rows)
            x = given.x[cut].to(dtype).requires_grad_(case.train)
            c = None
            if "dmag" in leaves and given.norm is not None:
                c = leaves["dmag"] / given.norm.to(leaves["dmag"].dtype)
            some = None if drop is None else Drop(drop.mask[cut], drop.keep_scale)
            y = _function(x, w, leaves.get("da"), leaves.get("db"), c, case.scale, some, shared).to(dtype)
            part = {"y": y.detach()}
            if case.train:
                grads = torch.autograd.grad(y, [x, *leaves.values()], given.dy[cut].to(dtype))
                part |= dict(zip(["dx", *leaves], grads, strict=True))
            parts.append(part)
        if len(parts) == 1:
            return parts[0]
        return {
            name: torch.cat([part[name] for part in parts])
            if name in ("y", "dx")
            else torch.stack([part[name] for part in parts]).sum(0)
            for name in parts[0]
        }

    def _other(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        case, given = self.case, self.inputs
        if case.op in ("quantize", "dequantize"):  # what quantize made is judged by its fp32 values
            stored = given.base.to(case.dtype) if case.op == "dequantize" else given.base
            return {"w": given.base.double()}, {"w": stored}
        truth = (given.base.double() + case.scale * (given.b.double() @ given.a.double())).norm(dim=1)
        stored = given.base.to(case.dtype).float()  # what eager code gets from a 4-bit weight
        return {"norm": truth}, {"norm": (stored + case.scale * (given.b @ given.a)).norm(dim=1)}

    def _mask(self) -> Tensor:
        """The specified dropout decision, bool [m, k]."""
        from fastlora.math import philox

        case = self.case
        return philox.unpack_bits(philox.dropout_bits(MASK_SEED, 0, case.m, case.k, case.p), case.k)

    def _accumulation(self, name: str, keep_scale: float) -> float:
        """4 u_acc |p| |q|, u_acc of fp32."""
        given, s, norm = self.inputs, self.case.scale * keep_scale, torch.linalg.vector_norm
        if self.case.op != "linear":
            return 4 * 2**-24 * float(norm(given.base))
        x, dy, w = given.x.float(), given.dy.float(), given.base
        product = {
            "y": lambda: norm(x) * norm(w),
            "dx": lambda: norm(dy) * norm(w),
            "da": lambda: s * norm(dy @ given.b) * norm(x),
            "db": lambda: s * norm(dy) * norm(x @ given.a.t()),
            "dmag": lambda: norm(dy) * norm(x) * norm(w) / norm(given.norm if given.norm is not None else w),
        }[name]
        return 4 * 2**-24 * float(product())


def row_norms(t: Tensor) -> Tensor:
    """Norm of each row; a vector's elements are its rows."""
    return torch.linalg.vector_norm(t.reshape(t.shape[0], -1), dim=1)


def unit_roundoff(dtype: torch.dtype) -> float:
    """Half the spacing of 1.0."""
    return torch.finfo(dtype).eps / 2


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
