"""Training runs of a PEFT model before and after `fastlora.accelerate`, and how far PEFT is from itself.

Two runs of one model from one seed differ where sums are taken in another order. How far, PEFT says itself: run with
another number of threads, and with a random half of every adapted output moved by one unit in its last place.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from fastlora import functional
from fastlora.math import philox
from fastlora.nn import accelerate as accelerating
from fastlora.ops.lora import draw_seed

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
FACTOR = 3.0  # how many times PEFT's distance from itself an accelerated run may be away from it


class Masked(nn.Dropout):
    """Dropout with our masks and our scale, drawn as an accelerated layer draws them; for PEFT's side of a run."""

    def forward(self, input: Tensor) -> Tensor:
        """x, or what is left of it."""
        if not self.training or not self.p:
            return input
        keep = functional.dropout_mask(input.shape, self.p, draw_seed(input.device))
        return input * keep * philox.keep_scale(self.p)


def with_our_masks(model: nn.Module) -> nn.Module:
    """PEFT's model, dropping what ours would drop."""
    for _, layer in accelerating.tuner_layers(model):
        for name, drop in list(layer.lora_dropout.items()):  # type: ignore[union-attr, operator]
            if isinstance(drop, nn.Dropout):
                layer.lora_dropout[name] = Masked(drop.p)  # type: ignore[union-attr, index, operator]
    return model


@contextlib.contextmanager
def nudged(model: nn.Module, seed: int = 5) -> Iterator[None]:
    """Within the block a random half of every adapted output is moved by one unit in its last place."""
    generator = torch.Generator().manual_seed(seed)

    def nudge(module: nn.Module, args: Any, y: Tensor) -> Tensor:
        draw = torch.rand(y.shape, generator=generator)
        target = torch.where(draw < 0.25, torch.inf, -torch.inf).to(y.dtype)
        moved = torch.where(draw < 0.5, torch.nextafter(y.detach(), target), y.detach())
        return y + (moved - y.detach())

    handles = [layer.register_forward_hook(nudge) for _, layer in accelerating.tuner_layers(model)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """Within the block torch computes with so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def quantized(model: Any, quant: str = "nf4", nested: bool = True, compute: torch.dtype = torch.float32) -> Any:
    """The model with bitsandbytes' 4-bit linears, as transformers would have loaded it."""
    import bitsandbytes

    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] in LINEARS:
            new = bitsandbytes.nn.Linear4bit(
                module.in_features,
                module.out_features,
                module.bias is not None,
                compute_dtype=compute,
                compress_statistics=nested,
                quant_type=quant,
            )
            new.load_state_dict(module.state_dict())
            parent = model.get_submodule(name.rpartition(".")[0])
            setattr(parent, name.rpartition(".")[2], new.to("cpu"))
    model.is_loaded_in_4bit = True
    return model.eval()


def losses(
    model: nn.Module, batches: Iterable[Any], loss_of: Callable[[Any, Any], Tensor], lr: float, label: str = ""
) -> list[float]:
    """The loss of every step of a seeded AdamW run, one step a batch; a label shows progress on a terminal."""
    torch.manual_seed(2)
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    found = []
    for batch in tqdm(batches, label, disable=None if label else True, leave=False, unit="step"):
        loss = loss_of(model, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


def distances(one: Sequence[float], other: Sequence[float]) -> list[float]:
    """|a - b| at every step."""
    return [abs(a - b) for a, b in zip(one, other, strict=True)]


def apart(one: Sequence[float], other: Sequence[float]) -> float:
    """The largest difference at any step."""
    return max(distances(one, other))


def allowance(want: Sequence[float], *others: Sequence[float]) -> list[float]:
    """At every step `FACTOR` times the largest difference so far between PEFT's run and PEFT's other runs."""
    largest = [max(step) for step in zip(*(distances(want, other) for other in others), strict=True)]
    return [FACTOR * value for value in itertools.accumulate(largest, max)]
