"""Input makers, error budgets and poisoned memory, shared by the tests and the benchmarks.

The budget of a computed tensor against the float64 oracle, norm-wise and for the worst row:

    |out - ref| <= 1.5 |eager - ref| + u_out |ref| + 4 u_acc |p| |q|

eager is the same mathematics in plain PyTorch at the same dtypes; u is the unit roundoff of the output and of the
accumulator; p and q are the operands of the entry's last reduction. dmag multiplies dy by the z that the forward saved
in the dtype of x, as PyTorch saves activations: one more rounding, u(x) |dy z / norm| of each row, is allowed for it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlora.math import nf4, philox, reference
from fastlora.math.nf4 import PackedWeight
from fastlora.math.segments import segments
from fastlora.ops.grouped import RowAdapter, mixed_linear
from fastlora.ops.lora import lora_linear
from fastlora.ops.qlora import qlora_linear

_ROUNDOFF = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


def roundoff(dtype: torch.dtype) -> float:
    """Unit roundoff of a float dtype."""
    return _ROUNDOFF[dtype]


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """What products of `dtype` are summed in: fp64 for fp64, fp32 otherwise."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@dataclasses.dataclass(frozen=True)
class Case:
    """One adapted linear to judge: sizes, dtypes and options."""

    m: int
    n: int
    k: int
    r: int
    dtype: torch.dtype = torch.float32
    adapter_dtype: torch.dtype = torch.float32
    quant: str = ""  # "", "nf4" or "fp4"
    blocksize: int = 64
    nested: bool = False
    bias: bool = False
    p: float = 0.0
    dora: bool = False
    dora_dropout: str = "peft"
    scale: float = 1.7
    seed: int = 0

    def __str__(self) -> str:
        changed = [
            f"{field.name}={getattr(self, field.name)}"
            for field in dataclasses.fields(self)
            if getattr(self, field.name) != field.default
        ]
        return " ".join(changed).replace("torch.", "")


class Inputs(NamedTuple):
    """Tensors of a case; `weight` as the ops take it, `w` its exact float64 values."""

    x: Tensor
    weight: Tensor | PackedWeight
    w: Tensor
    a: Tensor
    b: Tensor
    bias: Tensor | None
    mag: Tensor | None
    dy: Tensor
    keep: Tensor | None


def make_inputs(case: Case, device: str = "cpu") -> Inputs:
    """Zero-mean inputs of a case; B is not zero (a zero B hides errors) and the magnitude is off its init."""
    generator = torch.Generator().manual_seed(case.seed)

    def randn(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator)

    source = torch.float32 if case.quant and case.dtype == torch.float64 else case.dtype
    dense = (randn(case.n, case.k) / case.k**0.5).to(source)
    weight: Tensor | PackedWeight = dense
    w = dense.double()
    if case.quant:
        weight = nf4.pack(dense, case.quant, case.blocksize, case.nested)
        w = nf4.dequantize(weight, torch.float32).double()
    a = (randn(case.r, case.k) / case.k**0.5).to(case.adapter_dtype)
    b = (randn(case.n, case.r) / max(1, case.r) ** 0.5).to(case.adapter_dtype)
    bias = randn(case.n).to(case.dtype) if case.bias else None
    mag = None
    if case.dora:
        norm = reference.dora_norm(w, a.double(), b.double(), case.scale)
        mag = (norm * (1 + 0.3 * randn(case.n).double())).to(case.adapter_dtype)
    x, dy = randn(case.m, case.k).to(case.dtype), randn(case.m, case.n).to(case.dtype)
    keep = None
    if case.p:
        keep = philox.unpack_bits(philox.dropout_bits(case.seed + 7, 3, case.m, case.k, case.p), case.k)
    made = Inputs(x, weight, w, a, b, bias, mag, dy, keep)
    return made if device == "cpu" else _to(made, device)


def _to(inputs: Inputs, device: str) -> Inputs:
    def move(item: Any) -> Any:
        if isinstance(item, PackedWeight):
            return item._replace(**{name: move(part) for name, part in item._asdict().items()})
        return item.to(device) if isinstance(item, Tensor) else item

    return Inputs(*(move(item) for item in inputs))


class Outputs(NamedTuple):
    """y and every gradient of one case."""

    y: Tensor
    dx: Tensor
    da: Tensor
    db: Tensor
    dmag: Tensor | None
    dbias: Tensor | None


class Truth(NamedTuple):
    """The oracle's outputs, and what the budget needs besides: z, DoRA's c and norm, and the dropped x."""

    outputs: Outputs
    z: Tensor
    c: Tensor
    norm: Tensor
    xd: Tensor


def oracle(case: Case, inputs: Inputs) -> Truth:
    """The float64 truth (`math.reference`), from the values the kernels see."""
    adapter = reference.Adapter(inputs.a.double(), inputs.b.double(), case.scale)
    if inputs.mag is not None:
        norm = reference.dora_norm(inputs.w, adapter.a, adapter.b, case.scale)
        adapter = adapter._replace(mag=inputs.mag.double(), norm=norm)
    dropout = None
    if inputs.keep is not None:
        dropout = reference.Dropout(inputs.keep, philox.keep_scale(case.p), case.dora_dropout)
    bias = None if inputs.bias is None else inputs.bias.double()
    x, dy = inputs.x.double(), inputs.dy.double()
    y, _, z = reference.forward(x, inputs.w, adapter, bias, dropout)
    grads = reference.backward(dy, x, inputs.w, adapter, dropout)
    outputs = Outputs(y, grads.dx, grads.da, grads.db, grads.dmag, grads.dbias if case.bias else None)
    c = norm = torch.ones_like(inputs.w[:, 0])
    if adapter.mag is not None and adapter.norm is not None:
        norm = adapter.norm
        c = adapter.mag / norm
    return Truth(outputs, z, c, norm, reference.drop(x, dropout))


def eager(case: Case, inputs: Inputs, autocast: bool = False) -> Outputs:
    """The same mathematics in plain PyTorch at the case's dtypes, gradients by autograd: the budget's allowance.

    Where adapters are wider than x, x is widened for them (as PEFT does), or with `autocast` they are rounded to the
    dtype of x (as autocast does).
    """
    given = (inputs.x, inputs.a, inputs.b, inputs.mag, inputs.bias)
    leaves = [None if t is None else t.clone().requires_grad_() for t in given]
    x, a, b, mag, bias = leaves
    assert x is not None and a is not None and b is not None
    w = inputs.w.to(case.dtype)
    xd = x if inputs.keep is None else x * inputs.keep * philox.keep_scale(case.p)
    narrow = case.dtype if autocast else a.dtype
    delta = F.linear(F.linear(xd.to(narrow), a.to(narrow)), b.to(narrow)) * case.scale
    base = F.linear(x, w)
    if mag is None:
        y = base + delta
    else:
        wide = torch.promote_types(case.dtype, a.dtype)
        norm = torch.linalg.norm(w.to(wide) + case.scale * (b @ a).detach().to(wide), dim=1).to(wide)
        c = mag / norm
        if inputs.keep is None or case.dora_dropout == "shared":
            y = c * (base + delta)
        else:
            y = base + (c - 1) * F.linear(xd, w) + c * delta
    y = y.to(case.dtype) if bias is None else (y + bias).to(case.dtype)
    wanted = [leaf for leaf in leaves if leaf is not None]
    grads = iter(torch.autograd.grad(y, wanted, inputs.dy))
    dx, da, db, dmag, dbias = (None if leaf is None else next(grads) for leaf in leaves)
    assert dx is not None and da is not None and db is not None
    return Outputs(y.detach(), dx, da, db, dmag, dbias)


def _rows(t: Tensor) -> Tensor:
    return t.reshape(t.shape[0], -1) if t.dim() > 1 else t.reshape(-1, 1)


def judge(case: Case, inputs: Inputs, out: Outputs, truth: Truth | None = None, *, autocast: bool = False) -> list[str]:
    """Every violation of the budget, in words; empty when all is within it. `autocast`: see `eager`."""
    truth = truth or oracle(case, inputs)
    allowance = eager(case, inputs, autocast)
    x, dy, a, b = inputs.x.double(), inputs.dy.double(), inputs.a.double(), inputs.b.double()
    d, xd = dy * truth.c, truth.xd
    operands = {
        "y": (torch.maximum(x.abs(), xd.abs()), (inputs.w * truth.c[:, None]).T),
        "dx": (d, inputs.w),
        "da": ((case.scale * (d @ b)).T, xd),
        "db": (d.T, case.scale * (xd @ a.T)),
        "dmag": (dy.T, truth.z / truth.norm),
        "dbias": (dy.T, torch.ones(case.m, 1, dtype=torch.float64, device=dy.device)),
    }
    saved = {"dmag": roundoff(case.dtype) * (dy * truth.z / truth.norm).norm(dim=0)[:, None]}
    problems = []
    for name, ref in truth.outputs._asdict().items():
        got = getattr(out, name)
        if ref is None:
            if got is not None:
                problems.append(f"{name}: expected None")
            continue
        problems += _judge_one(name, got, ref, getattr(allowance, name), operands[name], saved.get(name), case)
    return problems


def _judge_one(
    name: str,
    got: Tensor | None,
    ref: Tensor,
    allowed: Tensor,
    operands: tuple[Tensor, Tensor],
    saved: Tensor | None,
    case: Case,
) -> list[str]:
    if got is None or got.shape != ref.shape or got.dtype != allowed.dtype:
        have = None if got is None else (tuple(got.shape), got.dtype)
        return [f"{name}: expected {tuple(ref.shape)} {allowed.dtype}, got {have}"]
    if ref.numel() == 0:
        return []
    if not got.isfinite().all():
        return [f"{name}: not finite"]
    u_out, u_acc = roundoff(got.dtype), roundoff(accumulator(case.dtype))
    p, q = operands
    error, slack = _rows(got.double() - ref), _rows(allowed.double() - ref)
    extra = torch.zeros_like(error[:, :1]) if saved is None else saved
    whole = 1.5 * slack.norm() + u_out * ref.norm() + 4 * u_acc * p.norm() * q.norm() + extra.norm()
    problems = []
    if error.norm() > whole:
        problems.append(f"{name}: error {error.norm():.3e} over budget {whole:.3e} (norm-wise) for {case}")
    # Norms of single rows vary: the eager error of the worst row stands for the allowance of each.
    rows = (
        1.5 * slack.norm(dim=1).max()
        + u_out * _rows(ref).norm(dim=1)
        + 4 * u_acc * _row_norms(p) * q.norm()
        + extra.norm(dim=1)
    )
    worst = (error.norm(dim=1) / rows.clamp_min(1e-300)).max()
    if worst > 1:
        problems.append(f"{name}: worst row {worst:.2f} times its budget for {case}")
    return problems


def _row_norms(p: Tensor) -> Tensor:
    return p.reshape(p.shape[0], -1).norm(dim=1)


class Guarded(NamedTuple):
    """A tensor inside a larger buffer whose surroundings are NaN (0xFF for integers)."""

    tensor: Tensor
    buffer: Tensor
    pad: int

    def intact(self) -> bool:
        """Whether nothing was written outside the tensor."""
        bands = torch.cat([self.buffer[: self.pad], self.buffer[-self.pad :]])
        return bool(bands.isnan().all()) if bands.is_floating_point() else bool((bands == 255).all())


def guarded(t: Tensor, pad: int = 64) -> Guarded:
    """A contiguous copy of t with poisoned guard bands around it."""
    buffer = torch.empty(t.numel() + 2 * pad, dtype=t.dtype, device=t.device)
    buffer.fill_(float("nan") if t.is_floating_point() else 255)
    inside = buffer[pad : pad + t.numel()].view(t.shape)
    inside.copy_(t)
    return Guarded(inside, buffer, pad)


def run(case: Case, inputs: Inputs, backend: str | None = None) -> Outputs:
    """The case through the public functions, gradients by autograd."""
    given = (inputs.x, inputs.a, inputs.b, inputs.mag, inputs.bias)
    leaves = [None if t is None else t.clone().requires_grad_() for t in given]
    x, a, b, mag, bias = leaves
    assert x is not None and a is not None and b is not None
    keywords = {
        "bias": bias,
        "magnitude": mag,
        "dropout_p": case.p,
        "seed": case.seed + 7 if case.p else None,
        "stream": 3,
        "dora_dropout": case.dora_dropout,
        "backend": backend,
    }
    linear = qlora_linear if isinstance(inputs.weight, PackedWeight) else lora_linear
    y = linear(x, inputs.weight, a, b, case.scale, **keywords)  # type: ignore[arg-type]
    wanted = [leaf for leaf in leaves if leaf is not None]
    grads = iter(torch.autograd.grad(y, wanted, inputs.dy))
    dx, da, db, dmag, dbias = (None if leaf is None else next(grads) for leaf in leaves)
    assert dx is not None and da is not None and db is not None
    return Outputs(y.detach(), dx, da, db, dmag, dbias)


# --- several adapters in one batch ------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class ManyCase:
    """A batch that mixes adapters over one base.

    Attributes:
        base: sizes, dtypes, weight format, bias and seed of the batch (its adapter is not used).
        adapters: r, p, dora, dora_dropout, scale and adapter_dtype of each; the rest is the base's.
        owner: the adapter of each row, len(adapters) for none.
    """

    base: Case
    adapters: tuple[Case, ...]
    owner: tuple[int, ...]

    def rows(self, adapter: int) -> Tensor:
        """The rows of one adapter, or of none."""
        return torch.tensor([row for row, own in enumerate(self.owner) if own == adapter], dtype=torch.int64)

    def alone(self, adapter: int) -> Case:
        """The case of one adapter's rows by themselves."""
        own = self.adapters[adapter]
        options = {field: getattr(own, field) for field in ("r", "p", "dora", "dora_dropout", "scale", "adapter_dtype")}
        return dataclasses.replace(self.base, m=len(self.rows(adapter)), **options)


def many_case(base: Case, options: Sequence[dict[str, Any]], owner: Sequence[int]) -> ManyCase:
    """A ManyCase from what is special about each adapter."""
    return ManyCase(base, tuple(dataclasses.replace(base, **own) for own in options), tuple(owner))


class Many(NamedTuple):
    """Tensors of a ManyCase: the batch's, and for each adapter the `Inputs` of its rows alone."""

    whole: Inputs
    alone: list[Inputs]


class ManyOutputs(NamedTuple):
    """y, dx and dbias of a mixed batch; da, db, dmag of each adapter."""

    y: Tensor
    dx: Tensor
    dbias: Tensor | None
    adapters: list[tuple[Tensor, Tensor, Tensor | None]]


def _stream(adapter: int) -> int:
    return 3 * adapter + 1


def make_many(case: ManyCase) -> Many:
    """Inputs of a mixed batch; each adapter's share holds the very values of its rows, dropout decision included."""
    whole = make_inputs(dataclasses.replace(case.base, r=1, p=0.0, dora=False))
    alone = []
    for number in range(len(case.adapters)):
        own, rows = case.alone(number), case.rows(number)
        drawn = make_inputs(dataclasses.replace(own, m=1, dora=False, p=0.0, seed=case.base.seed + 100 + number))
        keep = mag = None
        if own.p:
            bits = philox.dropout_bits(own.seed + 7, _stream(number), case.base.m, own.k, own.p)
            keep = philox.unpack_bits(bits, own.k)[rows]
        if own.dora:
            norm = reference.dora_norm(whole.w, drawn.a.double(), drawn.b.double(), own.scale)
            mag = (norm * torch.linspace(0.5, 1.5, own.n, dtype=torch.float64)).to(own.adapter_dtype)
        shared = (whole.weight, whole.w, drawn.a, drawn.b, whole.bias, mag)
        alone.append(Inputs(whole.x[rows], *shared, whole.dy[rows], keep))
    return Many(whole, alone)


def run_many(case: ManyCase, many: Many, backend: str | None = None) -> ManyOutputs:
    """The mixed batch through `ops.grouped.mixed_linear`, gradients by autograd."""
    x = many.whole.x.clone().requires_grad_()
    bias = None if many.whole.bias is None else many.whole.bias.clone().requires_grad_()
    leaves: list[list[Tensor | None]] = [
        [None if t is None else t.clone().requires_grad_() for t in (own.a, own.b, own.mag)] for own in many.alone
    ]
    adapters = []
    for number, ((a, b, mag), own) in enumerate(zip(leaves, case.adapters, strict=True)):
        assert a is not None and b is not None
        adapters.append(RowAdapter(a, b, own.scale, mag, own.p, _stream(number), own.dora_dropout))
    rows = segments(torch.tensor(case.owner, dtype=torch.int64), len(adapters))
    seed = case.base.seed + 7
    y = mixed_linear(x, many.whole.weight, adapters, rows, bias=bias, seed=seed, backend=backend)
    wanted = [x, *(t for t in (bias, *(t for own in leaves for t in own)) if t is not None)]
    grads = dict(zip(map(id, wanted), torch.autograd.grad(y, wanted, many.whole.dy), strict=True))
    sets = [(grads[id(a)], grads[id(b)], None if mag is None else grads[id(mag)]) for a, b, mag in leaves]
    return ManyOutputs(y.detach(), grads[id(x)], None if bias is None else grads[id(bias)], sets)


def judge_many(case: ManyCase, many: Many, out: ManyOutputs, *, autocast: bool = False) -> list[str]:
    """Every violation of the budget, in words: each adapter's rows and gradients as if it had run alone (`judge`)."""
    problems = []
    for number, inputs in enumerate(many.alone):
        own, rows = case.alone(number), case.rows(number)
        dbias = None if inputs.bias is None else inputs.dy.double().sum(0).to(inputs.bias.dtype)  # of all rows: below
        mine = Outputs(out.y[rows], out.dx[rows], *out.adapters[number], dbias)
        if not len(rows):
            problems += [f"{number}: not zero" for t in out.adapters[number] if t is not None and t.any()]
            continue
        problems += [f"adapter {number}: {text}" for text in judge(own, inputs, mine, autocast=autocast)]
    if out.dbias is not None:
        dy = many.whole.dy
        slack = (roundoff(out.dbias.dtype) * dy.double().sum(0)).norm() + 4 * 2.0**-24 * dy.norm() * case.base.m**0.5
        if (out.dbias.double() - dy.double().sum(0)).norm() > slack:
            problems.append("dbias: over budget")
    return problems
