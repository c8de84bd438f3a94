"""Several adapted linears over one x, as the kernels of a group take them."""

from __future__ import annotations

from typing import Any, NamedTuple

from fastlora.problem import Problem


class One(NamedTuple):
    """One linear of a group.

    Attributes:
        plan: of the kernel that was chosen for it by itself.
        problem: its own, `lora_fwd` or `lora_bwd`.
        args: its op's arguments (`ops.schema`) without x; in the backward dy comes first.
    """

    plan: str
    problem: Problem
    args: tuple[Any, ...]
