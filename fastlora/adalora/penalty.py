"""The penalty that keeps AdaLoRA's A and B near orthogonal."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastlora.adalora.triplets import find
from fastlora.errors import ConfigError


def orthogonal_penalty(
    model: nn.Module, adapter_name: str | None = None, *, weight: float | None = None, squared: bool = False
) -> Tensor:
    """weight * mean over every A and B of |A A^T - I|, |B^T B - I| (Frobenius norms); add it to the loss.

    This is PEFT's form. The paper's (2303.10512, equation 4) sums the squared norms instead: `squared=True`.
    Matrices of one shape are taken together, so that a model costs a few products, not a few for each layer.

    Args:
        model: with AdaLoRA layers.
        adapter_name: None takes the one that trains.
        weight: default: the config's orth_reg_weight.

    Returns:
        A 0-dim tensor in at least fp32, on the first layer's device.

    Raises:
        ConfigError: no such adapter, without a name none or several that train, or a negative weight.
    """
    _, found = find(model, adapter_name)
    weight = found[0].config.orth_reg_weight if weight is None else weight
    if not weight >= 0:
        raise ConfigError(f"expected a weight of at least 0, got {weight}")
    alike: dict[tuple[torch.device, torch.dtype, torch.Size], list[Tensor]] = {}
    for entry in found:
        for matrix in (entry.a, entry.b.T):  # both [r, width]
            alike.setdefault((matrix.device, matrix.dtype, matrix.shape), []).append(matrix)
    norms = []
    for matrices in alike.values():
        stack = torch.stack(matrices)  # [l, r, width]
        with torch.amp.autocast(stack.device.type, enabled=False):
            stack = stack.to(torch.promote_types(stack.dtype, torch.float32))
            off = stack @ stack.mT - torch.eye(stack.shape[1], dtype=stack.dtype, device=stack.device)
            norm = off.square().sum((1, 2)) if squared else torch.linalg.matrix_norm(off)
            norms.append(norm.to(found[0].a.device))
    total = torch.cat(norms)
    return weight * (total.sum() if squared else total.mean())
