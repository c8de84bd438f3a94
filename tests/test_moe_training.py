"""Mixtures in training: router losses under checkpointing, autocast, the compiler, DDP, transformers' Trainer."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from fastlora import moe
from fastlora.errors import ConfigError
from tests.distributed_tools import run_world
from tests.experts_tools import H, mixlora, plugin, relative
from tests.experts_workers import ddp_gradients, one_sided, share

LAYERS = {
    "mixlora": mixlora,
    "mixlora dora": functools.partial(mixlora, use_dora=True),
    "mixlora dropout": functools.partial(mixlora, lora_dropout=0.3),
    "top-p": functools.partial(mixlora, routing_strategy="mixlora-dynamic"),
    "switch": functools.partial(
        mixlora, routing_strategy="mixlora-switch", expert_capacity=3, jitter_noise=0.1, ffn_dropout=0.2
    ),
    "loramoe": functools.partial(plugin, "loramoe", blc_weight=0.1, lora_dropout=0.3),
    "mola": functools.partial(plugin, "mola", router_loss=True),
}


def step(module, run=None, seed=5, weight=100.0):
    """Output and gradients of a task loss and the router loss, which weighs enough to be seen."""
    module.zero_grad()
    torch.manual_seed(seed)
    x = torch.randn(2, 11, H, requires_grad=True)
    y = (module if run is None else run)(x)
    loss = (y.float() * torch.linspace(-1, 1, y.numel()).view_as(y)).sum() + weight * moe.router_loss(module)
    loss.backward()
    return [y.detach(), x.grad, *(p.grad for p in module.parameters() if p.requires_grad)]


# --- checkpointing ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("kind", list(LAYERS))
def test_checkpointing_changes_nothing(kind, reentrant):
    module = LAYERS[kind]()
    want = step(module)
    gate = [name for name, p in module.named_parameters() if p.requires_grad].index("gate.weight") + 2
    assert not torch.equal(want[gate], step(module, weight=0.0)[gate])  # the router loss shows
    got = step(module, lambda x: checkpoint(module, x, use_reentrant=reentrant))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    again = step(module)  # nothing waits in the module for the next step
    assert all(torch.equal(a, b) for a, b in zip(again, want, strict=True))


class Stack(nn.Module):
    """Layers, each checkpointed."""

    def __init__(self, reentrant: bool | None) -> None:
        super().__init__()
        self.layers = nn.ModuleList([mixlora(), mixlora(jitter_noise=0.1), mixlora(lora_dropout=0.2)])
        self.reentrant = reentrant

    def forward(self, x):
        for layer in self.layers:
            x = x + (layer(x) if self.reentrant is None else checkpoint(layer, x, use_reentrant=self.reentrant))
        return x


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_loss_over_several_checkpoints(reentrant):
    want = step(Stack(None))
    got = step(Stack(reentrant))
    assert torch.equal(got[0], want[0])
    for a, b in zip(got, want, strict=True):  # three gradients meet in a residual: in another order
        assert relative(a, b) < 1e-6


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("counted", [(0, 1), (1,), (0,)])
def test_several_forwards_before_one_backward(counted, reentrant):
    """Each router loss reaches the tokens it was taken of, whatever else ran."""
    module = mixlora()

    def gradients(run):
        module.zero_grad()
        total = torch.zeros(())
        for number in range(2):
            torch.manual_seed(number)
            total = total + run(torch.randn(2, 11, H, requires_grad=True)).sum()
            if number in counted:
                total = total + (number + 1) * 100 * moe.router_loss(module)
            with torch.no_grad():
                module(torch.randn(2, 11, H))  # a reference model's pass, say
        total.backward()
        return module.gate.weight.grad.clone()

    want = gradients(module)
    got = gradients(lambda x: checkpoint(module, x, use_reentrant=reentrant))
    assert relative(got, want) < 1e-5
    assert not module.gate.pending


def test_a_second_run_does_not_count_again():
    module = mixlora()
    x = torch.randn(2, 11, H, requires_grad=True)
    y = checkpoint(module, x, use_reentrant=True)
    before = moe.router_loss(module).detach()
    y.sum().backward()
    assert torch.equal(moe.router_loss(module).detach(), before)
    assert module.gate.logits.shape == (2, 11, 5)


def test_evaluation_between_steps_leaves_nothing():
    module = mixlora()
    want = step(module)
    with torch.no_grad():
        module(torch.randn(1, 3, H))
        module.eval()(torch.randn(1, 3, H))
    assert moe.router_loss(module).requires_grad is False
    assert all(torch.equal(a, b) for a, b in zip(step(module.train()), want, strict=True))


# --- autocast ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["mixlora", "mixlora dora", "top-p", "loramoe", "mola"])
def test_autocast_leaves_the_router_in_fp32(kind):
    module = LAYERS[kind]() if kind != "loramoe" else plugin("loramoe", blc_weight=0.1)
    want = step(module)
    logits = module.gate.logits.detach().clone()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = step(module)
    assert got[0].dtype == torch.bfloat16
    assert torch.equal(module.gate.logits, logits)
    for a, b in zip(got, want, strict=True):
        assert relative(a, b) < 2e-2


# --- the compiler -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", list(LAYERS))
def test_compiled_in_one_graph(kind):
    module = LAYERS[kind]()
    if kind == "switch":  # the compiler draws its own noise
        module.config = module.config.replace(jitter_noise=0.0, ffn_dropout=0.0)
    want = step(module)
    torch.compiler.reset()
    got = step(module, torch.compile(module, fullgraph=True, backend="aot_eager"))
    for a, b in zip(got, want, strict=True):
        assert relative(a, b) < 1e-5
    assert module.gate.compiled


@pytest.mark.slow
def test_compiled_for_other_numbers_of_tokens():
    module = mixlora()
    torch.compiler.reset()
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens in (5, 9):
        x = torch.randn(2, tokens, H)
        torch.testing.assert_close(compiled(x), module(x))


def test_a_lost_graph_is_an_error_not_a_silent_zero():
    module = mixlora()
    torch.compiler.reset()
    compiled = torch.compile(module, backend="aot_eager")
    x = torch.randn(2, 11, H, requires_grad=True)
    checkpoint(compiled, x, use_reentrant=True)
    with pytest.raises(ConfigError, match="use_reentrant=False"):
        moe.router_loss(module)
    checkpoint(compiled, x, use_reentrant=False)
    assert moe.router_loss(module).requires_grad


# --- several processes ------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(not dist.is_gloo_available(), reason="torch has no gloo here")
def test_ddp_with_unused_experts(tmp_path):
    found = run_world(2, tmp_path, ddp_gradients)
    want: dict[str, Any] = {}
    for rank in range(2):  # the mean of what each process would have alone
        model = one_sided()
        (model(share(rank, 2)).square().mean() + moe.router_loss(model)).backward()
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                assert parameter.grad is not None
                want[name] = want.get(name, 0) + parameter.grad / 2
    assert not want["0.gate_proj.lora_A"][[0, 2, 3, 4]].any() and want["0.gate_proj.lora_A"][1].any()
    for gradients in found:
        assert gradients.keys() == want.keys()
        for name, gradient in want.items():
            torch.testing.assert_close(gradients[name], gradient, rtol=1e-5, atol=1e-8)


# --- transformers -----------------------------------------------------------------------------------------------------


class MoeTrainer(Trainer):
    """transformers' Trainer with the router loss: the five lines of the documentation."""

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **keywords: Any) -> Any:
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **keywords)
        loss = loss + moe.router_loss(model, inputs.get("attention_mask"))
        return (loss, outputs) if return_outputs else loss


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=40, max_position_embeddings=32, pad_token_id=0, **sizes))


METHODS = {
    "mixlora": moe.MixLoraConfig(num_experts=4, r=4, router_aux_loss_coef=0.01, init_seed=1),
    "loramoe": moe.LoraMoeConfig(num_experts=3, r=4, blc_weight=0.01, init_seed=1),
    "mola": moe.MolaConfig(num_experts=[2, 4], r=4, router_loss=True, init_seed=1),
}


def trained(method: str, folder: Any, steps: int = 12, **fields: Any) -> Any:
    model = moe.convert(llama(), METHODS[method], progress=False)
    generator = torch.Generator().manual_seed(1)
    starts = torch.randint(3, 40, (32, 1), generator=generator)
    ids = 3 + (starts + torch.arange(12)) % 37  # counting: soon learned
    rows = [{"input_ids": row, "labels": row, "attention_mask": torch.ones_like(row)} for row in ids]
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=8,
        learning_rate=2e-2,
        logging_steps=1,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        save_strategy="no",
        seed=3,
        **fields,
    )
    run = MoeTrainer(model, arguments, train_dataset=rows)
    run.train()
    return model, [entry["loss"] for entry in run.state.log_history if "loss" in entry]


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("method", list(METHODS))
def test_trainer(method, tmp_path):
    model, losses = trained(method, tmp_path)
    assert losses[-1] < losses[0] - 0.3
    gate = next(p for name, p in model.named_parameters() if name.endswith("gate.weight"))
    start = next(
        p
        for n, p in moe.convert(llama(), METHODS[method], progress=False).named_parameters()
        if n.endswith("gate.weight")
    )
    assert not torch.equal(gate, start)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("reentrant", [False, True])
def test_trainer_with_checkpointing_and_accumulation(reentrant, tmp_path):
    fields = {"gradient_accumulation_steps": 2}
    _, want = trained("mixlora", tmp_path / "plain", 4, **fields)
    fields |= {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    _, got = trained("mixlora", tmp_path / "checkpointed", 4, **fields)
    assert got == pytest.approx(want, rel=1e-5)


def test_the_router_loss_evens_the_load():
    module = mixlora(router_aux_loss_coef=1.0)
    x = torch.randn(4, 16, H, generator=torch.Generator().manual_seed(0)) + 0.5
    with torch.no_grad():
        module.gate.weight[:2] += 0.2  # two experts take nearly all
    optimizer = torch.optim.Adam([module.gate.weight], lr=2e-2)
    values = []
    for _ in range(30):
        optimizer.zero_grad()
        module(x)
        loss = moe.router_loss(module, normalized=True)
        loss.backward()
        optimizer.step()
        values.append(loss.item())
    assert values[0] > 1.5 and values[-1] < 1.3
