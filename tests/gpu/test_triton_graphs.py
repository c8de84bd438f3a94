"""Every Triton plan inside a CUDA graph: forward and backward, with fresh dropout in each replay."""

from __future__ import annotations

import pytest
import torch

from fastlora.functional import qlora_linear
from fastlora.math import nf4

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: torch.cuda.is_available() is False"),
]
M, N, K, R, P = 48, 256, 512, 8, 0.4
# (plan, dropout): a plan that the backward lacks leaves the choice there to the cost model.
CASES = [("merge", 0.0), ("split", P), ("dense", P), ("fused", P), ("skinny", P), ("split", 0.0), ("dense", 0.0)]


class Step:
    """A static input and what one forward and backward write."""

    def __init__(self, plan: str, p: float) -> None:
        generator = torch.Generator().manual_seed(0)

        def randn(*size: int) -> torch.Tensor:
            return torch.randn(*size, generator=generator).cuda()

        self.plan, self.p = plan, p
        self.weight = nf4.pack((randn(N, K) / K**0.5).bfloat16(), "nf4", 64, True)
        self.x = randn(M, K).bfloat16().requires_grad_()
        self.a, self.b = (randn(R, K) / K**0.5).requires_grad_(), randn(N, R).requires_grad_()
        self.out: list[torch.Tensor] = []

    def __call__(self) -> None:
        y = qlora_linear(
            self.x, self.weight, self.a, self.b, 2.0, dropout_p=self.p, backend=f"triton:{self.plan}"
        )  # the seed is drawn inside, from torch's generator
        gradients = torch.autograd.grad(y.float().square().sum(), [self.x, self.a, self.b])
        self.out = [y.detach(), *gradients]

    def values(self) -> list[torch.Tensor]:
        return [value.clone() for value in self.out]


@pytest.mark.parametrize(("plan", "p"), CASES)
def test_a_plan_is_captured_and_replayed(plan, p):
    step = Step(plan, p)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            step()  # compiles the kernels
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.manual_seed(11)
    step()
    eager = step.values()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    seen = []
    for seed in (11, 11, 12, None):
        if seed is not None:
            torch.cuda.manual_seed(seed)
        for value in step.out:
            value.fill_(float("nan"))
        graph.replay()
        seen.append(step.values())
    for one, other in zip(seen[0], seen[1], strict=True):
        assert torch.equal(one, other)  # the generator decides
    if not p:
        for one, other in zip(seen[0], eager, strict=True):
            assert torch.equal(one, other)
        return
    for before, after in ((1, 2), (2, 3)):
        assert not torch.equal(seen[before][0], seen[after][0])  # another mask: forward
        assert not torch.equal(seen[before][2], seen[after][2])  # and backward
