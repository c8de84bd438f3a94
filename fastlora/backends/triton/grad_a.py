"""The gradient of A, alone or in the pass over x that also makes h again."""

from __future__ import annotations

import torch
from torch import Tensor

from fastlora.backends.triton.launch import target
from fastlora.backends.triton.project import one_pass, walk
from fastlora.backends.triton.shrink import finish, rows_product


def grad_a(
    g: Tensor,
    x: Tensor,
    scale: float,
    *,
    bits: Tensor | None = None,
    dscale: float = 1.0,
    splits: int = 1,
    part: int | None = None,
    wide: bool | None = None,
) -> Tensor:
    """da = scale · dscale · gᵀ (mask∘x), x read once.

    Args:
        g: fp32 [m, r], or with `part` [r / part, m, part]; x: [m, k]; both contiguous.
        bits: keep mask uint8 [m, ceil(k/8)] or None.
        splits: 16-bit terms that stand for an element of g: 1, or 3 (fp32 accuracy).
        wide: force 64-bit offsets on or off.

    Returns:
        da fp32 [r, k].
    """
    (m, k), r = x.shape, g.shape[-1] * (1 if part is None else g.shape[0])
    if not m:
        return torch.zeros((r, k), dtype=torch.float32, device=x.device)
    options = {"bits": bits, "splits": splits, "part": part, "wide": wide}
    out = walk(x, r, u=g, transposed=True, right_factor=scale * dscale, **options)  # type: ignore[arg-type]
    assert out.right is not None
    finish(out.right, wide=wide)
    return out.right.out


def shrink_grad_a(
    x: Tensor, a: Tensor, g: Tensor, scale: float, *, splits: int = 1, wide: bool | None = None
) -> tuple[Tensor, Tensor]:
    """h = x aᵀ and da = scale · gᵀ x from one read of x where the partial sums are small beside it, else two.

    Args:
        x: [m, k]; a: [r, k], any float dtype; g: fp32 [m, r]; all contiguous. No dropout.
        splits: 16-bit terms that stand for an fp32 element of a or g: 1, or 3 (fp32 accuracy).
        wide: force 64-bit offsets on or off.

    Returns:
        h fp32 [m, r], da fp32 [r, k].
    """
    (m, k), r = x.shape, a.shape[0]
    if not m:
        none = torch.zeros((r, k), dtype=torch.float32, device=x.device)
        return none.new_empty((0, r)), none
    if not one_pass(target(x.device), m, k, r, x.dtype):
        h = rows_product(x, a, transposed=True, splits=splits, wide=wide)
        return h, grad_a(g, x, scale, splits=splits, wide=wide)
    out = walk(x, r, v=a, u=g, transposed=True, right_factor=scale, splits=splits, wide=wide)
    assert out.left is not None and out.right is not None
    finish(out.left, out.right, wide=wide)
    return out.left.out, out.right.out
