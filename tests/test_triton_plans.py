"""What the cost model chooses for each device of the table, without a GPU: data in, plan out."""

from __future__ import annotations

import pytest
import torch

from fastlora import backends
from fastlora.backends.triton import predict
from fastlora.dispatch import cost
from fastlora.problem import DENSE, DORA, DROPOUT, NEED_DA, NEED_DB, NEED_DX, TRAIN, Format, Problem

backends.load()
NF4 = Format("nf4", 64, True)
GRADIENTS = NEED_DX | NEED_DA | NEED_DB


def problem(op, m, n=4096, k=4096, r=16, fmt=NF4, flags=0):
    return Problem(op, m, n, k, r, torch.bfloat16, torch.float32, fmt, flags, "cuda")


def cheapest(plans, given):
    return min(plans, key=lambda plan: predict.seconds(plan, given))


@pytest.fixture(params=["A100", "H100", "H200", "RTX 4090", "B200", "MI300X"])
def _gpu(request, monkeypatch):
    monkeypatch.setattr(cost, "device", lambda name: cost._GPUS[request.param])


@pytest.mark.usefixtures("_gpu")
class TestEveryDevice:
    @pytest.mark.parametrize("shape", [(4096, 4096), (14336, 4096), (4096, 14336)])
    def test_training_merges_without_dropout(self, shape):
        n, k = shape
        forward = problem("lora_fwd", 8192, n, k, flags=TRAIN)
        assert cheapest(["merge", "split", "dense", "fused", "skinny"], forward) == "merge"
        backward = problem("lora_bwd", 8192, n, k, flags=GRADIENTS)
        assert cheapest(["merge", "split", "dense"], backward) == "merge"

    def test_dropout_decodes_once(self):
        forward = problem("lora_fwd", 8192, flags=TRAIN | DROPOUT)
        assert cheapest(["split", "dense", "fused", "skinny"], forward) in ("split", "dense")

    @pytest.mark.parametrize("m", [1, 8])
    def test_few_tokens_decode_in_the_main_loop(self, m):
        assert cheapest(["merge", "split", "dense", "fused", "skinny"], problem("lora_fwd", m)) in ("fused", "skinny")

    def test_more_work_takes_longer(self):
        for plan in ("merge", "split", "dense"):
            small, large = (predict.seconds(plan, problem("lora_fwd", m, flags=TRAIN)) for m in (1024, 8192))
            assert small < large
        dora = problem("lora_fwd", 8192, fmt=DENSE, flags=TRAIN | DORA | DROPOUT)
        assert predict.seconds("split", dora) > 2 * cost.gemm_seconds(8192, 4096, 4096, torch.bfloat16, "cuda")


@pytest.mark.parametrize(("n", "k"), [(4096, 4096), (14336, 4096), (4096, 14336)])
def test_modelled_overhead_of_qlora_on_the_h200(n, k, monkeypatch):
    """The passes the plans make leave the model within the targets over the frozen floor."""
    monkeypatch.setattr(cost, "device", lambda name: cost._GPUS["H200"])
    floor = 2 * cost.gemm_seconds(8192, n, k, torch.bfloat16, "cuda")
    step = predict.seconds("merge", problem("lora_fwd", 8192, n, k, flags=TRAIN))
    step += predict.seconds("merge", problem("lora_bwd", 8192, n, k, flags=GRADIENTS))
    launches = 8 * cost._GPUS["H200"].launch  # host time overlaps with kernels of this size
    assert 1.0 < (step - launches) / floor < 1.16
