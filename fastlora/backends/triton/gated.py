"""The gated unit act(gate) * up between two projections and the next, one pass each way.

forward   product = act(gate) * up
backward  dgate = d * up * act'(gate),  dup = d * act(gate),  and product again for the next layer's gradient of A
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastlora.backends.triton.launch import Target, Tile, cdiv, entry, launch, on_device, target
from fastlora.backends.triton.primitives import cast
from fastlora.math import gated
from fastlora.problem import Problem

_SCALE, _CUBE = tl.constexpr(gated.TANH_SCALE), tl.constexpr(gated.TANH_CUBE)
_ROOT_HALF, _DENSITY = tl.constexpr(0.7071067811865476), tl.constexpr(0.3989422804014327)  # sqrt(1/2), 1/sqrt(2 pi)


@triton.jit
def _act(z, ACT: tl.constexpr):
    """act(z) and act'(z) in fp32."""
    if ACT == "silu":
        s = tl.sigmoid(z)
        value, slope = z * s, s * (1.0 + z * (1.0 - s))
    elif ACT == "gelu":
        below = 0.5 + 0.5 * tl.erf(z * _ROOT_HALF)
        value, slope = z * below, below + z * tl.exp(-0.5 * z * z) * _DENSITY
    elif ACT == "gelu_tanh":
        half = tl.sigmoid((z + z * z * z * _CUBE) * (2.0 * _SCALE))  # (1 + tanh(u)) / 2
        value = z * half
        slope = half + z * half * (1.0 - half) * (1.0 + z * z * (3.0 * _CUBE)) * (2.0 * _SCALE)
    else:
        value, slope = tl.where(z < 0, 0.0, z), tl.where(z > 0, 1.0, 0.0)
    return value, slope


@entry
def _gated_kernel(gate_ptr, up_ptr, out_ptr, m, n, ACT: tl.constexpr, BLOCK: tl.constexpr):
    """out[i] = round(act(gate[i]) up[i]), i < m n."""
    start = tl.program_id(0).to(tl.int64) * BLOCK  # offsets from here are 32-bit
    where = tl.arange(0, BLOCK)
    inside = where < tl.cast(m, tl.int64) * n - start  # n, a layer's width, tells how far loads may reach at once
    # [BLOCK]
    gate = cast(tl.load(gate_ptr + start + where, mask=inside, other=0.0), tl.float32)
    up = cast(tl.load(up_ptr + start + where, mask=inside, other=0.0), tl.float32)
    value, _ = _act(gate, ACT)
    tl.store(out_ptr + start + where, cast(value * up, out_ptr.dtype.element_ty), mask=inside)


@entry
def _gated_backward_kernel(
    d_ptr, gate_ptr, up_ptr, dgate_ptr, dup_ptr, product_ptr, m, n, ACT: tl.constexpr, BLOCK: tl.constexpr
):
    """dgate = round(d up act'(gate)), dup = round(d act(gate)), product = round(act(gate) up) where asked for."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    where = tl.arange(0, BLOCK)
    inside = where < tl.cast(m, tl.int64) * n - start
    # [BLOCK]
    d = cast(tl.load(d_ptr + start + where, mask=inside, other=0.0), tl.float32)
    gate = cast(tl.load(gate_ptr + start + where, mask=inside, other=0.0), tl.float32)
    up = cast(tl.load(up_ptr + start + where, mask=inside, other=0.0), tl.float32)
    value, slope = _act(gate, ACT)
    dtype: tl.constexpr = dgate_ptr.dtype.element_ty
    tl.store(dgate_ptr + start + where, cast(d * up * slope, dtype), mask=inside)
    tl.store(dup_ptr + start + where, cast(d * value, dtype), mask=inside)
    if product_ptr is not None:
        tl.store(product_ptr + start + where, cast(value * up, dtype), mask=inside)


def tile_gated(target: Target) -> Tile:
    """BLOCK_N elements a program."""
    return Tile(BLOCK_N=64 if target.kind == "interpreter" else 2048, num_warps=8, num_stages=1)


def glu_fwd(problem: Problem, gate: Tensor, up: Tensor, act: str) -> Tensor:
    """gate, up contiguous of one shape -> act(gate) * up, rounded once."""
    out = torch.empty_like(gate)
    tile = tile_gated(target(gate.device))
    with on_device(gate):
        launch(
            _gated_kernel,
            (cdiv(gate.numel(), tile.BLOCK_N),),
            gate,
            up,
            out,
            *gate.shape,
            ACT=act,
            BLOCK=tile.BLOCK_N,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )
    return out


def glu_bwd(
    problem: Problem, d: Tensor, gate: Tensor, up: Tensor, act: str, need_product: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """d, gate, up contiguous of one shape -> dgate, dup, and the product again where asked for."""
    dgate, dup = torch.empty_like(gate), torch.empty_like(up)
    product = torch.empty_like(gate) if need_product else None
    tile = tile_gated(target(gate.device))
    with on_device(gate):
        launch(
            _gated_backward_kernel,
            (cdiv(gate.numel(), tile.BLOCK_N),),
            d,
            gate,
            up,
            dgate,
            dup,
            product,
            *gate.shape,
            ACT=act,
            BLOCK=tile.BLOCK_N,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )
    return dgate, dup, product
