"""Kernels for tests/test_aot.py, run as a script without TRITON_INTERPRET: prints one JSON record a line.

Good ones are the package's own; bad ones are bad on purpose, so that the gate is seen to refuse real code.
"""

from __future__ import annotations

import json
import sys

import torch
import triton
import triton.language as tl

from benchmarks.aot_compile import compile_launch, specialise
from fastlora.backends.triton.launch import TARGETS, launch, record


@triton.jit
def product_kernel(x_ptr, w_ptr, y_ptr, n, k, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, WIDEN: tl.constexpr):
    """y = x wᵀ for one square block; WIDEN multiplies as fp32, where no matrix instruction helps."""
    rows, cols = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_K)
    acc = tl.zeros([BLOCK_M, BLOCK_M], tl.float32)
    for start in range(0, k, BLOCK_K):
        x = tl.load(x_ptr + rows[:, None] * k + start + cols[None, :])
        w = tl.load(w_ptr + rows[:, None] * k + start + cols[None, :])
        if WIDEN:
            acc = tl.dot(x.to(tl.float32), tl.trans(w).to(tl.float32), acc, input_precision="ieee")
        else:
            acc = tl.dot(x, tl.trans(w), acc)
    tl.store(y_ptr + rows[:, None] * n + rows[None, :], acc.to(tl.bfloat16))


@triton.jit
def scale_kernel(x_ptr, n, factor, other_ptr, BLOCK: tl.constexpr):
    """x *= factor, += other where given."""
    where = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + where, mask=where < n) * factor
    if other_ptr is not None:
        x += tl.load(other_ptr + where, mask=where < n)
    tl.store(x_ptr + where, x, mask=where < n)


@triton.jit
def hold_kernel(x_ptr, BLOCK: tl.constexpr):
    """x *= Σ x: every value waits in a register for the sum."""
    x = tl.load(x_ptr + tl.arange(0, BLOCK))
    tl.store(x_ptr + tl.arange(0, BLOCK), x * tl.sum(x, axis=0))


def _meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def _product(block: int, depth: int, stages: int, widen: bool = False, warps: int = 4) -> None:
    x, w, y = (_meta(block, 4096) for _ in range(3))
    sizes = {"BLOCK_M": block, "BLOCK_K": depth, "WIDEN": widen}
    launch(product_kernel, (1,), x, w, y, 4096, 4096, num_warps=warps, num_stages=stages, **sizes)


def good() -> None:
    """A product, and the package's down- and up-projection."""
    from fastlora.backends.triton.expand import expand
    from fastlora.backends.triton.shrink import shrink

    _product(64, 64, 2)
    h, _ = shrink(_meta(4096, 4096), _meta(16, 4096, dtype=torch.float32))
    expand(h, _meta(4096, 16, dtype=torch.float32), 2.0, torch.bfloat16)


def bad() -> None:
    """No matrix instructions; registers spilled; more shared memory than there is."""
    _product(32, 32, 2, widen=True)
    launch(hold_kernel, (1,), _meta(16384, dtype=torch.float32), BLOCK=16384, num_warps=1)
    _product(128, 256, 4, warps=8)


def specialisations() -> None:
    """Arguments the JIT treats in different ways."""
    x = _meta(4096, dtype=torch.float32)
    launch(scale_kernel, (1,), x, 1, 0.5, None, BLOCK=64)
    launch(scale_kernel, (1,), x, 17, 0.5, x[1:], BLOCK=64)
    launch(scale_kernel, (1,), x, 1 << 40, 1.0, x[4:], BLOCK=64)


def main(what: str, *targets: str) -> None:
    """Record, compile, print."""
    for target in targets:
        with record(TARGETS[target]) as launches:
            globals()[what]()
        for each in launches:
            if what == "specialisations":
                made = specialise(each, target)
                print(json.dumps({"text": made.text, "source": made.source, "key": made.key}))
            else:
                print(json.dumps(compile_launch(each, target).record()))


if __name__ == "__main__":
    main(*sys.argv[1:])
