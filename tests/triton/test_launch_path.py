"""The way of a call: how many kernels it launches, no value read on the host, nothing copied between devices."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastlora import backends
from fastlora.backends.triton import predict
from fastlora.backends.triton import weight as weights
from fastlora.backends.triton.launch import TARGETS, record
from fastlora.backends.triton.skinny import code_words
from fastlora.dispatch import cost, registry
from fastlora.dispatch.registry import Kernel
from fastlora.math import nf4
from fastlora.math.nf4 import PackedWeight
from fastlora.problem import (
    BIAS,
    DENSE,
    DORA,
    DROPOUT,
    LAZY_H,
    NEED_DA,
    NEED_DB,
    NEED_DBIAS,
    NEED_DMAG,
    NEED_DX,
    SAVE_MASK,
    SHARED,
    TRAIN,
    Format,
    Problem,
)

backends.load()
NF4 = Format("nf4", 64, nested=True)
GRADIENTS = NEED_DX | NEED_DA | NEED_DB
BF16, FP32 = torch.bfloat16, torch.float32


def meta(*shape: int, dtype: torch.dtype = FP32) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def weight_of(problem: Problem) -> torch.Tensor | PackedWeight:
    n, k, fmt = problem.n, problem.k, problem.format
    if fmt.kind == "dense":
        return meta(n, k, dtype=problem.dtype)
    blocks = -(-n * k // fmt.blocksize)
    scales: Any = (meta(blocks, 4, dtype=torch.uint8), None, None)
    if fmt.nested:
        scales = (
            meta(blocks, dtype=torch.uint8),
            meta(-(-blocks // 256), 4, dtype=torch.uint8),
            meta(1, 4, dtype=torch.uint8),
        )
    return PackedWeight(meta(-(-n * k // 2), 1, dtype=torch.uint8), *scales, None, fmt.kind, fmt.blocksize, (n, k))


def arguments(problem: Problem) -> tuple[Any, ...]:
    """What `Kernel.run` takes, on the meta device: a value that is read there raises."""
    _, m, n, k, r, dtype, adapter, _, flags, *_ = problem
    a, b = meta(r, k, dtype=adapter), meta(n, r, dtype=adapter)
    mag, norm = (meta(n), meta(n)) if flags & DORA else (None, None)
    seed = (meta(1, dtype=torch.int64), 1, 0.1) if flags & DROPOUT else (None, 1, 0.0)
    if problem.op == "lora_fwd":
        bias = meta(n, dtype=dtype) if flags & BIAS else None
        return (meta(m, k, dtype=dtype), weight_of(problem), bias, a, b, 2.0, mag, norm, *seed)
    h = None if flags & LAZY_H else meta(m, r)
    mask = meta(m, -(-k // 8), dtype=torch.uint8) if flags & SAVE_MASK else None
    z = meta(m, n, dtype=dtype) if flags & DORA else None
    x, dy = meta(m, k, dtype=dtype), meta(m, n, dtype=dtype)
    return (dy, x, weight_of(problem), a, b, 2.0, mag, norm, h, mask, z, *seed)


# aten ops that launch nothing: they only name memory.
_FREE = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "view", "_unsafe_view", "reshape"}
_FREE |= {
    "slice",
    "transpose",
    "permute",
    "t",
    "detach",
    "expand",
    "alias",
    "as_strided",
    "unsqueeze",
    "squeeze",
    "select",
}
_READS = {"_local_scalar_dense", "item", "nonzero", "equal", "is_nonzero", "unique", "masked_select"}


class Ops(TorchDispatchMode):
    """Notes every aten op: its name, and whether its tensors lie on more than one device."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.mixed: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.names.append(func.name().removeprefix("aten::").split(".")[0])
        leaves = [leaf for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, torch.Tensor)]
        if len({leaf.device.type for leaf in leaves}) > 1:
            self.mixed.append(func.name())
        return out

    @property
    def launches(self) -> int:
        """How many of them launch a kernel."""
        return sum(name not in _FREE for name in self.names)


def able(op: str, problem: Problem) -> list[Kernel]:
    """The Triton kernels of an op that take a problem, whatever this machine lacks."""
    found = []
    for kernel in registry.kernels(op):
        limits = dataclasses.replace(kernel.limits, missing=lambda: "")
        if kernel.backend == "triton" and not registry.why_not(dataclasses.replace(kernel, limits=limits), problem):
            found.append(kernel)
    return found


def trace(kernel: Kernel, problem: Problem, target: str = "sm_90") -> tuple[int, Ops]:
    """Kernels one call launches, ours and the library's; and its aten ops."""
    args = arguments(problem)
    with record(TARGETS[target]) as launches, Ops() as ops:
        kernel.run(problem, *args)
    return len(launches) + ops.launches, ops


# --- how many kernels -------------------------------------------------------------------------------------------------


def step(n: int, k: int, flags: int) -> tuple[Problem, Problem]:
    lazy = LAZY_H if k > n and not flags & DROPOUT else 0
    flags |= lazy | (SAVE_MASK if flags & DROPOUT else 0)
    needs = GRADIENTS | (NEED_DMAG if flags & DORA else 0)
    forward = Problem("lora_fwd", 8192, n, k, 16, BF16, FP32, NF4, flags | TRAIN, "cuda")
    return forward, forward._replace(op="lora_bwd", flags=flags | needs)


@pytest.fixture
def h200(monkeypatch):
    monkeypatch.setattr(cost, "device", lambda name: cost._GPUS["H200"])


# (forward, backward) at most, DoRA's norm left out: an op of its own, one kernel.
COUNTS = {"QLoRA": (0, 3, 6), "QLoRA p>0": (DROPOUT, 5, 7), "QDoRA": (DORA, 4, 7)}


@pytest.mark.usefixtures("h200")
@pytest.mark.parametrize(("n", "k"), [(4096, 4096), (14336, 4096), (4096, 14336)])
@pytest.mark.parametrize("what", COUNTS)
def test_kernels_of_a_training_step(what, n, k):
    """Of the plans that the cost model takes on an H200."""
    flags, *most = COUNTS[what]
    later = int(k > n and not flags & DROPOUT)  # h is made in the backward: one kernel less before, one more there
    for problem, limit, moved in zip(step(n, k, flags), most, (-later, later), strict=True):
        kernel = min(able(problem.op, problem), key=lambda each: predict.seconds(each.plan, problem))
        trace(kernel, problem)  # the first call makes constants
        count, ops = trace(kernel, problem)
        assert 1 < count <= limit + moved, (problem.op, kernel.plan, ops.names)


def test_the_norm_is_one_kernel():
    problem = Problem("dora_norm", 0, 4096, 4096, 16, BF16, FP32, NF4, DORA, "cuda")
    (kernel,) = able("dora_norm", problem)
    with record(TARGETS["sm_90"]) as launches, Ops() as ops:
        kernel.run(problem, weight_of(problem), meta(16, 4096), meta(4096, 16), 2.0)
    assert len(launches) + ops.launches == 1


# --- what a captured graph does not allow -----------------------------------------------------------------------------

FLAGS = [0, BIAS, DROPOUT, DORA, DORA | DROPOUT, DORA | DROPOUT | SHARED]
FORMATS = [NF4, Format("fp4", 64), DENSE]


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
@pytest.mark.parametrize("m", [1, 40, 300])
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_no_plan_reads_a_value_or_copies_between_devices(dtype, m, target, monkeypatch):
    """On the meta device, where a value cannot be read, from the very first call on: constants are made there too."""
    monkeypatch.setattr(weights, "_made", {})
    plans = set()
    for flags, fmt, save in itertools.product(FLAGS, FORMATS, (True, False)):
        saved = SAVE_MASK if flags & DROPOUT and save else 0
        needs = GRADIENTS | (NEED_DMAG if flags & DORA else 0) | (NEED_DBIAS if flags & BIAS else 0)
        forward = Problem("lora_fwd", m, 96, 130, 8, dtype, FP32, fmt, flags | saved | TRAIN, "cuda")
        backward = forward._replace(op="lora_bwd", flags=flags & ~BIAS | saved | needs)
        for problem in (forward, backward):
            for kernel in able(problem.op, problem):
                count, ops = trace(kernel, problem, target)
                assert count and not ops.mixed and _READS.isdisjoint(ops.names), (kernel.plan, problem)
                plans.add((problem.op, kernel.plan))
    assert len(plans) == (8 if m <= 40 else 6)


def test_constants_are_made_on_the_device_and_exact():
    """By launches alone, as a capture needs; the values are those of the format's tables."""
    host = torch.cat([nf4.table("nf4"), nf4.table("fp4"), nf4.dynamic_map()])
    filled = torch.stack([torch.full((), value, dtype=FP32) for value in host.tolist()])  # as `filled` on a GPU
    assert torch.equal(filled.view(torch.int32), host.view(torch.int32))
    made = weights.filled(host, torch.device("meta"))
    assert made.shape == host.shape and made.device.type == "meta" and made.dtype == FP32


class _Stream:
    waits = 0

    def synchronize(self) -> None:
        _Stream.waits += 1


def test_a_capture_keeps_no_constant(monkeypatch):
    """Memory of a graph that is being captured is filled by its replays only: the next caller must not get it."""
    capturing = [True]
    monkeypatch.setattr(weights, "_made", {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing[0])
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: _Stream())
    device, made = torch.device("cuda", 0), []

    def make() -> torch.Tensor:
        made.append(torch.zeros(1))
        return made[-1]

    assert weights.made_once("what", device, make) is not weights.made_once("what", device, make)
    assert _Stream.waits == 0
    capturing[0] = False
    kept = weights.made_once("what", device, make)
    assert _Stream.waits == 1 and len(made) == 3  # once made, another stream may use it
    capturing[0] = True
    assert weights.made_once("what", device, make) is kept and len(made) == 3 and _Stream.waits == 1


def test_constants_of_two_kinds_are_two():
    cpu = torch.device("cpu")
    assert torch.equal(weights.table("nf4", cpu), nf4.table("nf4"))
    assert torch.equal(weights.table("fp4", cpu), nf4.table("fp4"))
    assert not torch.equal(code_words("nf4", BF16, cpu), code_words("nf4", torch.float16, cpu))
    assert code_words("nf4", BF16, cpu) is code_words("nf4", BF16, cpu)
