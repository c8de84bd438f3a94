"""The adapted linear: one autograd Function for every base, and `lora_linear` for a dense one.

y = x w^T + s drop(x) a^T b^T + bias, with DoRA's magnitude on top if one is given (`math.reference`).
The frozen weight is never differentiated; x, a, b, magnitude and bias are.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable

from fastlora import settings
from fastlora.config import DORA_DROPOUT, SEED_END
from fastlora.errors import DtypeError, ShapeError, UnsupportedError
from fastlora.math.nf4 import PackedWeight
from fastlora.ops import merged, schema
from fastlora.ops.dora import dora_weight_norm
from fastlora.ops.schema import flags_of, format_of
from fastlora.problem import DENSE, DORA, LAZY_H, NEED_DA, NEED_DB, NEED_DBIAS, NEED_DMAG, NEED_DX, SAVE_MASK, TRAIN

_PLAIN = frozenset({Tensor, nn.Parameter, type(None)})
_PARTS = 5  # tensors of a packed weight


# The static facts of one call, as the ops take them: scale, stream, p, flags, backend, on_grid.
Call = tuple[float, int, float, int, str, bool]


def _watched() -> bool:
    """Whether anything may stand between a call and an op's body: a compiler, a tracer, a mode, a profiler."""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._len_torch_function_stack() > 0
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state() is not None
        or torch._C._autograd._profiler_enabled()
    )


def _direct(x: Tensor, weight: Tensor | PackedWeight, *tensors: Tensor | None) -> bool:
    """Whether an op's body may be called without the dispatcher, which costs more than the rest of a small layer.

    Only plain tensors with data, and nothing that would have seen the op.
    """
    first = weight[0] if isinstance(weight, PackedWeight) else weight
    if type(x) not in _PLAIN or type(first) not in _PLAIN or x.is_meta or first.is_meta:
        return False
    for tensor in tensors:
        if type(tensor) not in _PLAIN:
            return False
    return not _watched()


def _forward_op(
    x: Tensor,
    weight: Tensor | PackedWeight,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    mag: Tensor | None,
    norm: Tensor | None,
    seed: Tensor | None,
    call: Call,
    keep: bool = False,
) -> Any:
    """y, h, mask, z; with `keep`, in a checkpoint, what is saved of a merged weight."""
    scale, stream, p, flags, backend, on_grid = call
    tail = (bias, a, b, scale, mag, norm, seed, stream, p, flags, backend)
    if isinstance(weight, PackedWeight):
        if _direct(x, weight, bias, a, b, mag, norm, seed):
            run = schema._run_kept if keep else schema._run
            return schema._forward(x, weight, format_of(weight, on_grid), tail, run)
        outs = torch.ops.fastlora.qlora_fwd.default(x, *weight[:7], on_grid, *tail)
        if not keep or torch.compiler.is_compiling():
            return outs
        kept = schema._forward(x, weight, format_of(weight, on_grid), tail, schema._would_keep)
        return (*outs, merged.stand_in(x, weight.shape)) if kept else outs
    if _direct(x, weight, bias, a, b, mag, norm, seed):
        return schema._forward(x, weight, DENSE, tail)
    return torch.ops.fastlora.lora_fwd.default(x, weight, *tail)


class AdaptedLinear(torch.autograd.Function):
    """x[m,k], a[r,k], b[n,r], mag[n]|None, bias[n]|None -> y[m,n]; see `math.reference` for both directions.

    Saved for the backward: x (shared with its producer), h [m,r] fp32, the dropout bits [m, ceil(k/8)] (low memory:
    only the seed), DoRA's z [m,n], and references to the parameters. z rather than y is saved so that the output may
    be modified in place. In a checkpoint also a merged weight (`ops.merged`).
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        a: Tensor,
        b: Tensor,
        mag: Tensor | None,
        bias: Tensor | None,
        weight: Tensor | PackedWeight,
        norm: Tensor | None,
        seed: Tensor | None,
        call: Call,
    ) -> Tensor:
        """One op call; saves what its twin needs."""
        need_x, need_a, need_b, need_mag, need_bias = ctx.needs_input_grad[:5]
        scale, stream, p, flags, backend, on_grid = call
        keep = need_x and not flags & DORA  # in training DoRA merges without c, its backward with it
        y, h, mask, z, *kept = _forward_op(x, weight, bias, a, b, mag, norm, seed, call, keep)
        packed = isinstance(weight, PackedWeight)
        tensors = weight[:_PARTS] if packed else (weight,)
        ctx.save_for_backward(
            x if need_a or (need_b and flags & LAZY_H) else None,
            a,
            b,
            mag,
            norm,
            h if need_b else None,
            mask,
            z if need_mag else None,
            seed,
            *tensors,
            *kept,
        )
        ctx.packing = weight[5:] if packed else None
        ctx.dtypes = None if mag is None else mag.dtype, None if bias is None else bias.dtype
        needs = NEED_DX * need_x | NEED_DA * need_a | NEED_DB * need_b | NEED_DMAG * need_mag | NEED_DBIAS * need_bias
        ctx.call = scale, stream, p, flags & ~(TRAIN | SAVE_MASK) | needs, backend, on_grid
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Any:
        """dy[m,n] -> dx, da, db, dmag, dbias, each only if its input needs it."""
        x, a, b, mag, norm, h, mask, z, seed, *tensors = ctx.saved_tensors
        scale, stream, p, flags, backend, on_grid = ctx.call
        tail = (a, b, scale, mag, norm, h, mask, z, seed, stream, p, flags, backend)
        kept = tensors.pop() if len(tensors) > _PARTS else None
        dy = dy.contiguous()
        direct = _direct(dy, tensors[0], x, a, b, mag, norm, h, mask, z, seed)
        if ctx.packing is None:
            if direct:
                grads = schema._backward(dy, x, tensors[0], DENSE, tail)
            else:
                grads = torch.ops.fastlora.lora_bwd.default(dy, x, tensors[0], *tail)
        elif direct:
            weight = PackedWeight(*tensors, *ctx.packing)
            given = kept if kept is not None and merged.real(kept) else None
            grads = schema._backward(dy, x, weight, format_of(weight, on_grid), tail, given)
        else:
            grads = torch.ops.fastlora.qlora_bwd.default(dy, x, *tensors, *ctx.packing[:2], on_grid, *tail)
        dx, da, db, dmag, dbias = grads
        mag_dtype, bias_dtype = ctx.dtypes
        if dmag is not None:
            dmag = dmag.to(mag_dtype)
        if dbias is not None:
            dbias = dbias.to(bias_dtype)
        return dx, da, db, dmag, dbias, None, None, None, None


def draw_seed(device: torch.device) -> Tensor:
    """A fresh dropout seed from torch's generator, int64 [1] on the device (no host sync)."""
    like = torch.empty((1,), dtype=torch.int64, device=device)
    if device.type != "meta" and not _watched():
        return schema._draw_seed(like)
    return torch.ops.fastlora.draw_seed(like)


def as_seed(seed: int | Tensor | None, device: torch.device) -> Tensor:
    """The seed as the ops take it, int64 [1] on the device; None draws one."""
    if seed is None:
        return draw_seed(device)
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64 or seed.numel() != 1:
            raise DtypeError(f"seed must be an int or a one-element int64 tensor, got {seed.dtype} {tuple(seed.shape)}")
        return seed.reshape(1).to(device)
    if not 0 <= seed < SEED_END:
        raise ShapeError(f"seed must be in [0, 2**63 - 1), got {seed}")
    return torch.full((1,), seed, dtype=torch.int64, device=device)  # no copy from the host: it may be captured


def _check(x: Tensor, n: int, k: int, a: Tensor, b: Tensor, bias: Tensor | None, mag: Tensor | None, p: float) -> None:
    shape, of_a, of_b, dtype = x.shape, a.shape, b.shape, a.dtype  # each asked once: this runs at every call
    if not shape or shape[-1] != k:
        raise ShapeError(f"expected x with last dimension in_features={k}, got shape {tuple(shape)}")
    if len(of_a) != 2 or len(of_b) != 2 or of_a[1] != k or of_b[0] != n or of_a[0] != of_b[1]:
        raise ShapeError(
            f"expected a [r, {k}] and b [{n}, r] for a weight of shape ({n}, {k}), got {tuple(of_a)} and {tuple(of_b)}"
        )
    if b.dtype is not dtype or not (dtype.is_floating_point and x.dtype.is_floating_point):
        raise DtypeError(
            f"expected floating-point x and a, b of one floating dtype, got x {x.dtype}, a {dtype}, b {b.dtype}"
        )
    if bias is not None and bias.shape != (n,):
        raise ShapeError(f"expected bias of shape ({n},), got {tuple(bias.shape)}")
    if mag is not None and mag.shape != (n,):
        raise ShapeError(f"expected magnitude of shape ({n},), got {tuple(mag.shape)}")
    if not 0.0 <= p < 1.0:
        raise ShapeError(f"dropout_p must be in [0, 1), got {p}")


def _check_devices(x: Tensor, *tensors: Tensor | None) -> None:
    device = x.device
    for tensor in tensors:
        if tensor is not None and tensor.device != device:
            raise DtypeError(f"expected every tensor on the device of x, {device}, got one on {tensor.device}")


def _refuse_tangents(*tensors: Tensor | None) -> None:
    """An op without a forward-mode rule would drop tangents in silence where nothing asks for a gradient."""
    for tensor in tensors:
        if tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None:
            raise UnsupportedError("forward-mode differentiation (torch.func.jvp, forward_ad) is not supported")


def adapted_linear(
    x: Tensor,
    weight: Tensor | PackedWeight,
    a: Tensor,
    b: Tensor,
    scale: float | Tensor,
    bias: Tensor | None,
    dropout_p: float,
    seed: int | Tensor | None,
    stream: int,
    magnitude: Tensor | None,
    dora_dropout: str,
    backend: str | None,
    on_grid: bool = False,
    norm_weight: Tensor | None = None,
) -> Tensor:
    """What every adapted linear shares: validate once, flatten x to [m, k], draw the seed, call.

    Arguments as `lora_linear`'s and `qlora_linear`'s, by position, because naming them costs time at every call.
    `norm_weight` is the weight DoRA's norm is taken of, where `weight` is a cast of it.
    """
    n, k = weight.shape
    _check(x, n, k, a, b, bias, magnitude, dropout_p)
    _check_devices(x, weight[0] if isinstance(weight, PackedWeight) else weight, a, b, bias, magnitude)
    if dora_dropout not in DORA_DROPOUT:
        raise ShapeError(f"dora_dropout must be one of {', '.join(DORA_DROPOUT)}, got {dora_dropout!r}")
    if isinstance(scale, Tensor):  # a scale that lives on the device folds into b, in fp32 so that it is not rounded
        b, scale = b.to(torch.promote_types(b.dtype, torch.float32)) * scale, 1.0
        a = a.to(b.dtype)
    if forward_ad._current_level >= 0:
        _refuse_tangents(x, a, b, bias, magnitude)
    a, b = a.contiguous(), b.contiguous()
    flat = x.dim() == 2
    x2d = (x if flat else x.reshape(-1, k)).contiguous()
    dropout = dropout_p > 0.0
    seed_tensor = as_seed(seed, x.device) if dropout else None
    norm = None
    if magnitude is not None:
        norm = dora_weight_norm(weight if norm_weight is None else norm_weight, a, b, scale, backend=backend)
    train = torch.is_grad_enabled() and (
        a.requires_grad
        or b.requires_grad
        or x.requires_grad
        or (bias is not None and bias.requires_grad)
        or (magnitude is not None and magnitude.requires_grad)
    )
    flags = flags_of(
        bias=bias is not None,
        dropout=dropout,
        dora=magnitude is not None,
        shared=dora_dropout == "shared",
        train=train,
        save_mask=not settings.current.low_memory,
        # On a GPU a merged forward needs no h; where x is wider than y, one later pass over x makes h and da.
        lazy_h=k > n and not dropout and isinstance(weight, PackedWeight) and x.device.type == "cuda",
    )
    call = float(scale), stream, float(dropout_p), flags, backend or "", on_grid
    if train:
        y = AdaptedLinear.apply(x2d, a, b, magnitude, bias, weight, norm, seed_tensor, call)
    else:
        y = _forward_op(x2d, weight, bias, a, b, magnitude, norm, seed_tensor, call)[0]
    # Not `view`: an output that autograd takes for a view of another could not be modified in place by everyone.
    return y if flat else torch.ops.aten._unsafe_view(y, (*x.shape[:-1], n))


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """Autocast's dtype for the device of x where it is on (it leaves float64 alone), else None."""
    device = "cpu" if x.is_cpu else x.device.type
    if device == "meta" or not torch.is_autocast_enabled(device) or x.dtype == torch.float64:
        return None
    return torch.get_autocast_dtype(device)


def lora_linear(
    x: Tensor,
    weight: Tensor,
    a: Tensor,
    b: Tensor,
    scale: float | Tensor,
    *,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    stream: int = 0,
    magnitude: Tensor | None = None,
    dora_dropout: str = "peft",
    backend: str | None = None,
) -> Tensor:
    """y = x w^T + scale * drop(x) a^T b^T + bias (LoRA, 2106.09685), with `magnitude` DoRA (2402.09353).

    Args:
        x: [..., k], float; the output has its dtype (autocast's when that is on).
        weight: [n, k] frozen, dtype of x.
        a, b: [r, k] and [n, r], one float dtype (their gradients have it).
        scale: a float, or a 0-dim tensor (differentiable, no host sync).
        bias: [n], never scaled by DoRA.
        dropout_p: in [0, 1), on the adapter's input.
        seed: int or int64 tensor [1]; None draws one from torch's generator when dropout_p > 0.
        stream: dropout stream number (projection * 65536 + adapter).
        magnitude: [n]; makes this DoRA.
        dora_dropout: "peft" (PEFT's training semantics) or "shared" (one base product).
        backend: force one; never falls back in silence.

    Returns:
        [..., n].

    Raises:
        ShapeError, DtypeError: what was expected and what came. UnsupportedError: why no backend can.
    """
    if weight.dim() != 2:
        raise ShapeError(f"expected a weight of shape [n, k], got {tuple(weight.shape)}")
    if weight.requires_grad:
        raise DtypeError("the base weight is frozen: expected weight.requires_grad=False, got True")
    return dense_linear(x, weight, a, b, scale, bias, dropout_p, seed, stream, magnitude, dora_dropout, backend)


def dense_linear(
    x: Tensor,
    weight: Tensor,
    a: Tensor,
    b: Tensor,
    scale: float | Tensor,
    bias: Tensor | None,
    dropout_p: float,
    seed: int | Tensor | None,
    stream: int,
    magnitude: Tensor | None,
    dora_dropout: str,
    backend: str | None,
) -> Tensor:
    """`lora_linear` by position, for a weight that is known to be frozen and [n, k]."""
    rest = (a, b, scale, bias, dropout_p, seed, stream, magnitude, dora_dropout, backend, False)
    dtype = autocast_dtype(x)
    if dtype is not None:
        return adapted_linear(x.to(dtype), weight.to(dtype), *rest, weight)
    if weight.dtype is not x.dtype:
        raise DtypeError(f"expected x and weight of one dtype, got x {x.dtype} and weight {weight.dtype}")
    return adapted_linear(x, weight, *rest)
