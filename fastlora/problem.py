"""What a kernel is asked to do, as plain hashable facts: never a tensor, never a tensor's values."""

from __future__ import annotations

from typing import NamedTuple

import torch

# Bits of Problem.flags.
BIAS = 1  # a bias is added to the output
DROPOUT = 2  # p > 0: the adapter sees a dropped x
DORA = 4  # a magnitude and a norm are given
SHARED = 8  # DoRA's base term sees the dropped x's undropped twin: y = c * (x w^T + s xd a^T b^T) + bias
TRAIN = 16  # h (and the mask, and DoRA's z) are returned for the backward
NEED_DX, NEED_DA, NEED_DB, NEED_DMAG, NEED_DBIAS = 32, 64, 128, 256, 512
SAVE_MASK = 1024  # the forward returns its dropout bits (otherwise the backward redraws them)
LAZY_H = 2048  # the forward does not return h: the backward forms it from x, in the pass that forms da

FLAG_NAMES = {
    BIAS: "bias",
    DROPOUT: "dropout",
    DORA: "dora",
    SHARED: "shared",
    TRAIN: "train",
    NEED_DX: "dx",
    NEED_DA: "da",
    NEED_DB: "db",
    NEED_DMAG: "dmag",
    NEED_DBIAS: "dbias",
    SAVE_MASK: "mask",
    LAZY_H: "lazy-h",
}


def base_drops(flags: int) -> bool:
    """Whether DoRA's base product sees the dropped x ("peft" semantics with p > 0)."""
    return bool(flags & DORA and flags & DROPOUT and not flags & SHARED)


class Format(NamedTuple):
    """How the frozen weight is stored."""

    kind: str = "dense"  # "dense", "nf4" or "fp4"
    blocksize: int = 0  # elements per absmax; 0 for dense
    nested: bool = False  # absmax itself is quantized to 8 bits
    custom_code: bool = False  # a per-tensor table replaces the standard sixteen values
    on_grid: bool = False  # every absmax is a bf16 value: merging rounds small deltas away

    def __str__(self) -> str:
        if self.kind == "dense":
            return "dense"
        return f"{self.kind}/{self.blocksize}{'+nested' if self.nested else ''}{'+code' if self.custom_code else ''}"


DENSE = Format()


class Problem(NamedTuple):
    """One call of one op: x[m,k] w[n,k] a[r,k] b[n,r] -> y[m,n]."""

    # "lora_fwd", "lora_bwd", "grouped_fwd", "grouped_bwd", "grouped_mask", "dora_norm", "quantize", "quantize_absmax",
    # "dequantize", "dropout_mask", "glu_fwd", "glu_bwd", "projections_fwd", "projections_bwd", "mixture_fwd",
    # "mixture_bwd", "routed_fwd", "routed_bwd"
    op: str
    m: int  # tokens (0 where the op has none)
    n: int  # out_features
    k: int  # in_features
    r: int  # rank (0 where the op has none; of several adapters the largest)
    dtype: torch.dtype  # of x and y; for quantize the source's, for dequantize the output's
    adapter_dtype: torch.dtype  # of a and b; equal to dtype where the op has none
    format: Format
    flags: int
    device: str  # device type: "cpu", "cuda", ...
    groups: int = 0  # adapters of a batch that mixes several (the grouped ops)

    def flag_names(self) -> list[str]:
        """The set flags' names, for messages."""
        return [name for bit, name in FLAG_NAMES.items() if self.flags & bit]

    def __str__(self) -> str:
        flags = ",".join(self.flag_names()) or "-"
        dtype = str(self.dtype).removeprefix("torch.")
        rank = f"r={self.r}, groups={self.groups}" if self.groups else f"r={self.r}"
        return f"{self.op}(m={self.m}, n={self.n}, k={self.k}, {rank}, {dtype}, {self.format}, {flags}, {self.device})"


class Work(NamedTuple):
    """Arithmetic and traffic of one problem, the only place they are counted (see `dispatch.cost.work`)."""

    flops: float
    bytes: float
