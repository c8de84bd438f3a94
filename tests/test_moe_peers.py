"""Outputs, all gradients, router logits and auxiliary losses are moe-peft 2.0.2's, in fp32 without dropout."""

from __future__ import annotations

import pytest
import torch

import fastlora
from fastlora import moe
from tests import moe_tools
from tests.moe_tools import AUXILIARY, GRADIENT, MIXTURES, OUTPUT, all_close, close

# moe-peft's losses of these strategies take no mask.
IGNORES_PADDING = ("mixlora-dynamic", "mixlora-switch")


def _peer_order(name):
    """moe-peft goes through a layer's linears in an order of its own."""
    order = ("q_proj", "k_proj", "v_proj", "o_proj", "mlp", "gate_proj", "down_proj", "up_proj")
    parts = name.split(".")
    return int(parts[2]), order.index(parts[-1])


def _trainable(model):
    return model.train()  # moe-peft's switch block has its formula in training mode only; p = 1e-12 drops nothing


def _embeddings(model):
    return model.get_input_embeddings().weight.requires_grad_(True)


def _embedding_grads(model):
    weight = model.get_input_embeddings().weight
    gradient = weight.grad
    weight.requires_grad_(False)
    return gradient


@pytest.mark.parametrize("name", ["lora", "dora"])
def test_plain_adapters(name, tmp_path):
    case = moe_tools.golden(name)
    model = moe_tools.base(moe_tools.bias_of(case))
    fastlora.load_adapter(model, moe_tools.write(case, tmp_path))
    _embeddings(_trainable(model))
    out = model(**moe_tools.batch())
    out.loss.backward()
    close(out.logits, case.tensors["logits"], **OUTPUT)
    close(out.loss, case.tensors["loss"], **OUTPUT)
    close(_embedding_grads(model), case.tensors["embeddings_grad"], **GRADIENT)
    all_close(moe_tools.in_peer_words(model, case.prefix, moe_tools.grad_of), case.part("grad"), **GRADIENT)


@pytest.mark.parametrize("name", MIXTURES)
def test_mixtures(name, tmp_path):
    case = moe_tools.golden(name)
    model = moe_tools.base(moe_tools.bias_of(case))
    moe.load_adapter(model, moe_tools.write(case, tmp_path))
    _embeddings(_trainable(model))
    batch = moe_tools.batch()
    out = model(**batch)
    close(out.logits, case.tensors["logits"], **OUTPUT)
    close(out.loss, case.tensors["loss"], **OUTPUT)
    logits = moe.router_logits(model)
    close(
        torch.cat([logits[name] for name in sorted(logits, key=_peer_order)]), case.tensors["router_logits"], **OUTPUT
    )
    total = out.loss
    if "aux_loss" in case.tensors:
        masked = case.config.get("routing_strategy") not in IGNORES_PADDING
        auxiliary = moe.router_loss(model, batch["attention_mask"] if masked else None)
        close(auxiliary, case.tensors["aux_loss"], **AUXILIARY)
        gates = {n: p for n, p in model.named_parameters() if n.endswith("gate.weight")}
        grads = torch.autograd.grad(auxiliary, list(gates.values()), retain_graph=True)
        for (gate, _), grad in zip(gates.items(), grads, strict=True):
            key = f"{case.prefix}.{gate.removeprefix('model.').removesuffix('.gate.weight')}.moe_gate.weight"
            close(grad, case.tensors[f"aux_grad.{key}"], **GRADIENT, what=key)
        total = total + auxiliary
    total.backward()
    close(_embedding_grads(model), case.tensors["embeddings_grad"], **GRADIENT)
    all_close(moe_tools.in_peer_words(model, case.prefix, moe_tools.grad_of), case.part("grad"), **GRADIENT)


def _model(name, folder, **changes):
    case = moe_tools.golden(name)
    model = moe_tools.base(moe_tools.bias_of(case))
    moe.load_adapter(model, moe_tools.write(case, folder, **changes))
    model.train()(**moe_tools.batch())
    return model, case


def test_loramoe_constraint_is_its_formula(tmp_path):
    """Squared coefficient of variation of each linear's expert loads, task by task; moe-peft has no such loss."""
    alpha, weight, types = 0.2, 0.7, [1, 0]
    model, case = _model("loramoe", tmp_path, blc_alpha=alpha, blc_weight=weight)
    gates = case.tensors["router_logits"].softmax(-1).reshape(2 * 3, 2, 10, 4)  # linears, batch, tokens, experts
    want = 0.0
    for linear in gates:
        loads = []
        for row, kind in enumerate(types):
            for expert in range(4):
                preferred = (kind == 1) == (expert < 2)
                loads.append(linear[row, :, expert].sum().item() * (1 + alpha if preferred else 1 - alpha))
        mean = sum(loads) / len(loads)
        variance = sum((load - mean) ** 2 for load in loads) / (len(loads) - 1)
        want += weight * variance / (mean**2 + 1e-10)
    found = moe.router_loss(model, task_types=torch.tensor(types))
    close(found, torch.tensor(want), **AUXILIARY)
    grads = torch.autograd.grad(found, [p for n, p in model.named_parameters() if n.endswith("gate.weight")])
    assert all(bool(grad.any()) for grad in grads)


def test_molas_own_loss_is_its_formula(tmp_path):
    """c sum_l E sum_e f_e P_e over each layer's linears taken together, f counting all k choices."""
    model, case = _model("mola", tmp_path, top_k=2)
    probabilities = case.tensors["router_logits"].softmax(-1).reshape(2, 7 * 20, 4)
    want = 0.0
    for layer in probabilities:
        counts = [0] * 4
        for token in layer:
            for expert in sorted(range(4), key=lambda e, t=token: -t[e].item())[:2]:
                counts[expert] += 1
        share = [count / (layer.shape[0] * 2) for count in counts]
        want += 0.05 * 4 * sum(f * p for f, p in zip(share, layer.mean(0).tolist(), strict=True))
    close(moe.router_loss(model, per_layer=True, normalized=True), torch.tensor(want), **AUXILIARY)
    pooled = moe.router_loss(model, moe_tools.batch()["attention_mask"], per_layer=False)
    close(pooled, case.tensors["aux_loss"], **AUXILIARY)
