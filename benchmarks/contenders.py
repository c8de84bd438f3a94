"""What a contender is: a name, what it computes, and how to build it for a case."""

from __future__ import annotations

import contextlib
import dataclasses
import subprocess
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.cases import Case
from benchmarks.oracle import ADAPTED, Drop, Inputs

ROLES = ("floor", "base", "peer", "ours", "plan")


class Missing(RuntimeError):
    """A contender cannot take part here; the message is the reason its row carries."""


class Observed(NamedTuple):
    """One parity forward: the output and, with dropout, the decisions behind it."""

    y: Tensor
    drop: Drop | None = None


@dataclasses.dataclass
class Built:
    """A contender ready to run: several copies over the same values, so that calls can rotate past the cache.

    Attributes:
        layers: each takes x [m, k] and returns y [m, n] (other ops ignore x).
        leaves: for each layer, its trainable tensors by the name of their gradient: "da", "db", "dmag".
        context: entered around every forward (autocast).
        observe: the parity forward of the first layer; by default a plain call without dropout.
        note: what it chose to do, for the report.
        dtype: of the x and dy it is given, where not the case's.
    """

    layers: list[Callable[[Tensor], Tensor]]
    leaves: list[dict[str, Tensor]]
    context: Callable[[], AbstractContextManager[object]] = contextlib.nullcontext
    observe: Callable[[Tensor], Observed] | None = None
    note: str = ""
    dtype: torch.dtype | None = None

    def forward(self, index: int, x: Tensor) -> Tensor:
        """y of copy `index`."""
        with self.context():
            return self.layers[index](x)

    def step(self, index: int, x: Tensor, dy: Tensor) -> tuple[Tensor, ...]:
        """Forward and backward of copy `index`: dx, then the leaves' gradients in order."""
        y = self.forward(index, x)
        return torch.autograd.grad(y, [x, *self.leaves[index].values()], dy)

    def parity(self, x: Tensor) -> Observed:
        """The forward that is compared with the truth."""
        if self.observe is None:
            return Observed(self.forward(0, x))
        with self.context():
            return self.observe(x)


@dataclasses.dataclass(frozen=True)
class Contender:
    """Someone who claims to compute a case.

    Attributes:
        name: as the report prints it.
        role: "floor" (what overhead is measured against), "base" (frozen part only), "peer", "ours", or
            "plan": ours with one strategy forced, never what the summary calls ours.
        applies: whether it is meant for the case at all; if not it gets no row.
        build: makes `copies` layers over the inputs; raises `Missing` with the reason when it cannot.
        function: which truth it is held against: the adapted layer, its frozen part, or the unquantized one.
    """

    name: str
    role: str
    applies: Callable[[Case], bool]
    build: Callable[[Case, Inputs, int], Built]
    function: str = ADAPTED


def failures() -> tuple[type[BaseException], ...]:
    """What a contender may raise without stopping the report; never KeyboardInterrupt or SystemExit."""
    known: tuple[type[BaseException], ...] = (
        ArithmeticError,
        AssertionError,
        AttributeError,
        ImportError,
        LookupError,
        NameError,
        OSError,
        RuntimeError,  # torch's errors, out of memory and NotImplementedError included
        TypeError,
        ValueError,
        subprocess.SubprocessError,  # a kernel compiler that fails
    )
    try:
        from triton.errors import TritonError
    except ImportError:
        return known
    return (*known, TritonError)


def reason(error: BaseException) -> str:
    """One line: the type and the first 300 characters of the message."""
    text = " ".join(str(error).split())[:300]
    if isinstance(error, Missing):
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
