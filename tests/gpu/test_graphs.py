"""CUDA graphs: forward, backward and the optimizer in one capture, with fresh dropout in each replay."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fastlora

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: torch.cuda.is_available() is False"),
]
KINDS = {
    "lora": {"quantize": None},
    "qlora": {"quantize": "nf4"},
    "qdora": {"quantize": "nf4", "use_dora": True},
    "qdora shared": {"quantize": "nf4", "use_dora": True, "dora_dropout": "shared"},
}
WARM_UP, REPLAYS, ROWS, WIDTH = 3, 4, 64, 256


class Run:
    """A model, its optimizer and the static input and loss of one step."""

    def __init__(self, kind: str, p: float, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH)).to("cuda", dtype)
        options = dict(KINDS[kind])
        quantize = options.pop("quantize")
        config = fastlora.LoraConfig(
            r=8, lora_dropout=p, init_lora_weights=False, init_seed=1, target_modules=["0", "2"], **options
        )
        self.model = fastlora.convert(model, config, quantize=quantize, progress=False).train()
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-2, capturable=True)
        self.x = torch.randn(ROWS, WIDTH, device="cuda", dtype=dtype)
        self.y = torch.empty_like(self.x)

    def step(self) -> None:
        """One training step into the static output; gradients keep their memory."""
        self.optimizer.zero_grad(set_to_none=False)
        y = self.model(self.x)
        y.float().square().mean().backward()
        self.optimizer.step()
        self.y.copy_(y.detach())

    def state(self) -> list[torch.Tensor]:
        return [self.y.clone(), *(p.detach().clone() for p in self.model.parameters() if p.requires_grad)]

    def warm(self) -> None:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                self.step()
        torch.cuda.current_stream().wait_stream(side)


def captured(run: Run) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    run.warm()
    with torch.cuda.graph(graph):
        run.step()
    return graph


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("kind", list(KINDS))
def test_replays_follow_the_eager_trajectory(kind, dtype):
    eager, graphed = Run(kind, 0.0, dtype), Run(kind, 0.0, dtype)
    graphed.x.copy_(eager.x)
    eager.warm()
    graph = captured(graphed)
    for step in range(REPLAYS):
        x = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(step)).to("cuda", dtype)
        for run in (eager, graphed):
            run.x.copy_(x)
        eager.step()
        graph.replay()
        for one, other in zip(eager.state(), graphed.state(), strict=True):
            assert torch.equal(one, other), step


@pytest.mark.parametrize("kind", list(KINDS))
def test_each_replay_draws_its_own_dropout(kind):
    run = Run(kind, 0.5, torch.bfloat16)
    for group in run.optimizer.param_groups:
        group["lr"] = torch.zeros((), device="cuda")  # the parameters stay: only the mask can change the output
        group["weight_decay"] = 0.0
    graph = captured(run)
    outputs = []
    for seed in (1, 1, 2, None):
        if seed is not None:
            torch.cuda.manual_seed(seed)
        graph.replay()
        outputs.append(run.y.clone())
    assert torch.equal(outputs[0], outputs[1])  # the generator decides
    assert not torch.equal(outputs[1], outputs[2])
    assert not torch.equal(outputs[2], outputs[3])


def test_a_cold_process_can_capture_evaluation_after_one_call():
    layer = fastlora.QLoraLinear(WIDTH, WIDTH, r=8, init_lora_weights=False, device="cuda").eval()
    x = torch.randn(4, WIDTH, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        want = layer(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = layer(x)
        y.fill_(float("nan"))
        graph.replay()
    assert torch.equal(y, want)
