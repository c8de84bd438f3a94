"""What the tests of mixed batches share: batches of four adapters and a few rows, and arguments of every grouped op."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from fastlora import testing
from fastlora.math.segments import segments
from fastlora.ops.schema import flags_of
from fastlora.problem import (
    BIAS,
    DORA,
    DROPOUT,
    NEED_DA,
    NEED_DB,
    NEED_DBIAS,
    NEED_DMAG,
    NEED_DX,
    SAVE_MASK,
    TRAIN,
)
from fastlora.testing import Case, ManyCase, many_case

OWNER = (2, 0, 4, 1, 1, 2, 4, 0, 2, 3, 1, 2)  # four adapters, 4: none
RANKS = ({"r": 3}, {"r": 8, "scale": 0.6}, {"r": 1}, {"r": 24, "scale": 2.5})
DROPPED = ({"r": 3, "p": 0.25}, {"r": 8}, {"r": 1, "p": 0.6}, {"r": 5, "p": 0.25})
MAGNITUDES = ({"r": 3, "dora": True}, {"r": 8}, {"r": 1, "dora": True, "scale": 0.5}, {"r": 5})
BOTH = (
    {"r": 3, "dora": True, "p": 0.25},
    {"r": 8, "p": 0.4},
    {"r": 2, "dora": True, "p": 0.5, "dora_dropout": "shared"},
    {"r": 5, "dora": True},
)
MIXES = {"lora": RANKS, "dropout": DROPPED, "dora": MAGNITUDES, "dora-dropout": BOTH}


def base(**changes: Any) -> Case:
    return dataclasses.replace(Case(m=len(OWNER), n=20, k=43, r=1, bias=True), **changes)


def batch(mix: str = "lora", owner: Sequence[int] = OWNER, **changes: Any) -> ManyCase:
    return many_case(base(m=len(owner), **changes), MIXES[mix], owner)


def op_samples() -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Arguments of every grouped op, as the autograd Function passes them."""
    ops = torch.ops.fastlora
    for mix, quant in (("lora", ""), ("dropout", "nf4"), ("dora-dropout", ""), ("dora", "nf4")):
        case = batch(mix, quant=quant, blocksize=32)
        many = testing.make_many(case)
        group = [[getattr(own, field) for own in many.alone] for field in ("a", "b", "mag")]
        norms = [None if mag is None else torch.rand(20) + 0.5 for mag in group[2]]
        kinds = [
            flags_of(dropout=own.p > 0, dora=own.dora, shared=own.dora_dropout == "shared") for own in case.adapters
        ]
        numbers = [[own.scale for own in case.adapters], [own.p for own in case.adapters], [1, 2, 3, 4]]
        flags = flags_of(bias=True, train=True)
        for kind in kinds:
            flags |= kind
        flags |= SAVE_MASK if flags & DROPOUT else 0
        rows, seed = segments(torch.tensor(OWNER), 4), torch.tensor([5]) if flags & DROPOUT else None
        weight = many.whole.weight
        packed = (*weight[:7], False) if quant else (weight,)
        tail = (many.whole.bias, *group, norms, *numbers, kinds, *rows, seed, flags, "")
        prefix = "q" if quant else ""
        forward = getattr(ops, f"{prefix}grouped_fwd")
        _, h, mask, z = forward(many.whole.x, *packed, *tail)
        yield f"{prefix}grouped_fwd", (many.whole.x, *packed, *tail)
        bits = NEED_DA | NEED_DB
        kinds = [kind | bits | (NEED_DMAG if kind & DORA else 0) for kind in kinds[:3]] + kinds[3:]
        needs = flags & ~(TRAIN | SAVE_MASK | BIAS) | bits | NEED_DX | NEED_DBIAS
        tail = (*group, norms, *numbers, kinds, *rows, h, mask, z, seed, needs, "")
        yield f"{prefix}grouped_bwd", (many.whole.dy, many.whole.x, *packed, *tail)
