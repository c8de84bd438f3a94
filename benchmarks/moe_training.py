"""A few dozen steps of each mixture on real text: SmolLM2-135M gives sentences their capitals and punctuation back.

The demo's model, sentences and optimizer (`fastlora.cli`); the loss has the router's loss on top. At the end the
experts' load on held-out sentences is read off the routers, the adapter is saved, loaded into a fresh model, and both
must predict the same.
"""

from __future__ import annotations

import math
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.adalora import llama
from fastlora import moe
from fastlora.cli._task import CLIP, schedule

BATCH, HELD_OUT = 4, 24
# MoLA chooses experts in every linear, seven times a layer: at 1e-3 its loss rises after the fourth step and stays
# above the start (36 steps, 2026-11).
RATES = {"MixLoRA": 1e-3, "LoRAMoE": 1e-3, "MoLA": 3e-4}
_SHARED = {"lora_dropout": 0.0, "init_seed": 0}
METHODS: dict[str, dict[str, Any]] = {
    "MixLoRA": {"peft_type": "MIXLORA", "num_experts": 8, "top_k": 2, "r": 8, "lora_alpha": 16, **_SHARED},
    "LoRAMoE": {"peft_type": "LORAMOE", "num_experts": 6, "r": 8, "lora_alpha": 16, "blc_weight": 0.01, **_SHARED},
    "MoLA": {
        "peft_type": "MOLA",
        "num_experts": 4,
        "top_k": 2,
        "r": 8,
        "lora_alpha": 16,
        "router_loss": True,
        **_SHARED,
    },
}
Batch = tuple[Tensor, Tensor, Tensor]  # ids, attention mask, labels; each [rows, length]


class RealText:
    """Batches of the demo's sentences, and its model."""

    name = "SmolLM2-135M-Instruct, real sentences"

    def __init__(self, steps: int) -> None:
        from fastlora.cli import _packages, _restore, _smollm2

        lines = _packages.text_file().read_text(encoding="utf-8").splitlines()
        train, held_out = _restore.split(_restore.usable(lines), steps * BATCH, seed=0)
        self._load = _smollm2.load
        _, tokenizer = self._load()
        pad = tokenizer.pad_token_id
        groups = _restore.batches(_restore.encode(tokenizer, train), BATCH, seed=0)
        self.train: list[Batch] = [_restore.collate(group, pad) for group in groups]
        judged = _restore.batches(_restore.encode(tokenizer, held_out[:HELD_OUT]), BATCH)
        self.held_out: list[Batch] = [_restore.collate(group, pad) for group in judged]

    def model(self) -> Any:
        """A fresh model, the same each time."""
        return self._load()[0]


class TinyText:
    """The same with two small random layers and random tokens: checks the machinery, never quality."""

    name = "tiny random Llama, random tokens"

    def __init__(self, steps: int) -> None:
        ids = torch.randint(0, 64, (4, 24), generator=torch.Generator().manual_seed(0))
        mask = torch.ones_like(ids)
        mask[0, 18:] = 0
        one = (ids, mask, ids.masked_fill(mask == 0, -100))
        self.train, self.held_out = [one] * steps, [one]

    def model(self) -> Any:
        """A fresh model, the same each time."""
        return llama(tiny=True)


def task_loss(model: Any, batch: Batch) -> Tensor:
    """Cross entropy of the labelled tokens."""
    ids, mask, labels = batch
    loss: Tensor = model(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False).loss
    return loss


def train(model: Any, batches: list[Batch], rate: float) -> tuple[list[float], list[float]]:
    """One optimizer step a batch: task losses and router losses."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    plan = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: schedule(step, len(batches)))
    model.train()
    losses, routers = [], []
    for batch in batches:
        loss = task_loss(model, batch)
        router = moe.router_loss(model, batch[1])
        (loss + router).backward()
        nn.utils.clip_grad_norm_(parameters, CLIP)
        optimizer.step()
        optimizer.zero_grad()
        plan.step()
        losses.append(loss.item())
        routers.append(router.item())
    return losses, routers


@torch.no_grad()
def judge(model: Any, batches: list[Batch]) -> float:
    """Held-out loss a token."""
    model.eval()
    total = tokens = 0.0
    for batch in batches:
        counted = int((batch[2][:, 1:] != -100).sum())
        total += task_loss(model, batch).item() * counted
        tokens += counted
    return total / tokens


@torch.no_grad()
def expert_load(model: Any, batches: list[Batch]) -> list[list[float]]:
    """The weight each expert gets, a decoder layer a row, padding left out; rows sum to 1."""
    model.eval()
    sums: dict[int, Tensor] = {}
    modules = moe.moe_modules(model)
    for ids, mask, _ in batches:
        model(input_ids=ids, attention_mask=mask, use_cache=False)
        for name, z in moe.router_logits(model).items():
            p = z.softmax(-1)
            top_k = getattr(modules[name].config, "top_k", None)
            if top_k is not None:
                weights, experts = p.topk(top_k, -1)
                p = torch.zeros_like(p).scatter_(-1, experts, weights / weights.sum(-1, keepdim=True))
            layer = modules[name].layer or 0
            sums[layer] = sums.get(layer, torch.zeros(p.shape[1])) + (p * mask.reshape(-1, 1)).sum(0)
    return [(row / row.sum()).tolist() for _, row in sorted(sums.items())]


@torch.no_grad()
def same_predictions(one: Any, other: Any, batch: Batch) -> dict[str, Any]:
    """How far the two models' logits are apart, and whether they choose the same tokens."""
    found = [m.eval()(input_ids=batch[0], attention_mask=batch[1], use_cache=False).logits for m in (one, other)]
    kept = batch[1].bool()
    return {
        "largest_difference": float((found[0] - found[1])[kept].abs().max()),
        "same_tokens": bool((found[0].argmax(-1) == found[1].argmax(-1))[kept].all()),
    }


def one_method(name: str, text: Any) -> dict[str, Any]:
    """Train, judge, save, load."""
    torch.manual_seed(0)
    model = moe.convert(text.model(), METHODS[name], progress=False)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    before, start_load = judge(model, text.held_out), expert_load(model, text.held_out)
    losses, routers = train(model, text.train, RATES[name])
    with tempfile.TemporaryDirectory() as folder:
        moe.save_adapter(model, folder)
        reloaded = moe.load_adapter(text.model(), folder)
    return {
        "method": name,
        "config": METHODS[name],
        "learning_rate": RATES[name],
        "trainable": trained,
        "held_out_before": before,
        "held_out_after": judge(model, text.held_out),
        "losses": losses,
        "router_losses": routers,
        "load_before": start_load,
        "load": expert_load(model, text.held_out),
        "reloaded": same_predictions(model, reloaded, text.held_out[0]),
    }


def measure(steps: int, tiny: bool, only: Sequence[str] = (), before: dict[str, Any] | None = None) -> dict[str, Any]:
    """All three methods, as JSON types; or `only` some, the others from `before`, a report of as many steps."""
    text: Any = TinyText(steps) if tiny else RealText(steps)
    tokens = [int(mask.sum()) for _, mask, _ in text.train]
    known = {row["method"]: row for row in before["methods"]} if before and before["steps"] == steps else {}
    found = []
    for name in METHODS:
        if only and name not in only and name in known:
            found.append(known[name])
            continue
        found.append(one_method(name, text))
        if not tiny:  # minutes each
            print(f"{name}: held-out loss {found[-1]['held_out_after']:.3f} after {steps} steps", file=sys.stderr)
    return {
        "model": text.name,
        "steps": steps,
        "tokens_a_step": sum(tokens) / len(tokens),
        "held_out_sentences": sum(len(ids) for ids, _, _ in text.held_out),
        "methods": found,
    }


# --- what comes out ---------------------------------------------------------------------------------------------------


def spread(load: list[list[float]]) -> float:
    """The mean over layers of the busiest expert's share, times the number of experts: 1 is an even load."""
    return sum(max(row) * len(row) for row in load) / len(load)


def table(results: dict[str, Any]) -> str:
    """One line a method."""
    lines = [
        f"{results['model']}, {results['steps']} steps of {results['tokens_a_step']:.0f} tokens",
        f"{'':<9}{'held-out loss':>22}{'training loss':>18}{'busiest expert':>16}  reloaded",
    ]
    for row in results["methods"]:
        third = max(1, len(row["losses"]) // 3)
        first, last = (sum(part) / third for part in (row["losses"][:third], row["losses"][-third:]))
        fell = row["held_out_after"] < row["held_out_before"] and last < first
        same = row["reloaded"]
        lines.append(
            f"{row['method']:<9}{row['held_out_before']:>12.3f} ->{row['held_out_after']:>7.3f}"
            f"{first:>9.3f} ->{last:>6.3f}{spread(row['load']):>15.2f}x"
            f"  {'same tokens' if same['same_tokens'] else 'OTHER TOKENS'}, {same['largest_difference']:.1e}"
            f"{'' if fell else '  LOSS DID NOT FALL'}"
        )
    return "\n".join(lines)


def draw_losses(axes: Any, results: dict[str, Any]) -> None:
    """Training loss by step, all methods."""
    for row, colour in zip(results["methods"], ("#2e7d32", "#1565c0", "#ef6c00"), strict=True):
        axes.plot(range(1, len(row["losses"]) + 1), row["losses"], color=colour, lw=1.3, label=row["method"])
        axes.plot([0, len(row["losses"])], [row["held_out_before"], row["held_out_after"]], "o", color=colour, ms=3)
    axes.set_xlabel("step", fontsize=8)
    axes.set_ylabel("loss a target token", fontsize=8)
    axes.set_title(f"{results['model']} (dots: held out)", fontsize=7, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=7)


def draw_load(axes: Any, row: dict[str, Any]) -> None:
    """The experts' share in each layer after training; even is 1."""
    even = [[share * len(layer) for share in layer] for layer in row["load"]]
    image = axes.imshow(even, aspect="auto", cmap="RdBu_r", vmin=0.0, vmax=2.0, interpolation="nearest")
    axes.set_xlabel("expert", fontsize=8)
    axes.set_ylabel("layer", fontsize=8)
    axes.set_xticks(range(len(even[0])))
    axes.set_title(f"{row['method']}: load, even = 1 (busiest {spread(row['load']):.2f})", fontsize=7, loc="left")
    bar = axes.figure.colorbar(image, ax=axes, fraction=0.05)
    bar.ax.tick_params(labelsize=6)


def falls(row: dict[str, Any]) -> bool:
    """Whether both losses fell, finitely."""
    return math.isfinite(row["losses"][-1]) and row["held_out_after"] < row["held_out_before"]
