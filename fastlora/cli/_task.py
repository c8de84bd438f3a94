"""What a demo trains on, and how: the part that the real task and the made-up one share."""

from __future__ import annotations

import abc
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

WARMUP, FLOOR = 5, 0.1
# The first gradients are ten times the later ones; unclipped they stay in Adam's second moment and shorten every step
# after them (held-out loss 0.27 instead of 0.25 at seed 1, 0.30 instead of 0.29 at seed 0; 2026-11).
CLIP = 1.0


class Score(NamedTuple):
    """Held-out loss per token, and the share of what was got exactly right (`Task.exact` says of what)."""

    loss: float
    exact: float


class Task(abc.ABC):
    """A model, text to train it on and text to judge it by.

    Attributes:
        model_name, title: of the model, and of the plot.
        text: what was read, in a few words.
        held_out, unit, exact: what is judged, what the loss is counted by, and what `Score.exact` is a share of.
        note: what one should know to read the score; may be empty.
        batch: examples in a batch. rate: the largest learning rate. steps: how many, unless told.
        groups: the training batches. rounds: how often `evaluate` calls `done`.
        raws, truths: a few held-out examples, as the model gets them and as they should come out; may be empty.
    """

    model_name: str
    title: str
    text: str
    held_out: str
    unit: str
    exact: str
    note: str = ""
    batch: int
    rate: float
    steps: int
    groups: Sequence[Any]
    rounds: int
    raws: Sequence[str] = ()
    truths: Sequence[str] = ()

    @abc.abstractmethod
    def load(self) -> nn.Module:
        """The fp32 model before any training; the same weights each time."""

    @abc.abstractmethod
    def outputs(self, model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
        """Logits [targets, vocabulary] and target tokens [targets] of a training batch."""

    @abc.abstractmethod
    def evaluate(self, model: nn.Module, done: Callable[[], None]) -> Score:
        """Judge the model on what was held out; `done` is called after each batch."""

    @abc.abstractmethod
    def logits(self, model: nn.Module) -> Tensor:
        """The model's logits for some held-out examples."""

    def write(self, model: nn.Module) -> list[str]:
        """What the model makes of each of `raws`, decoded greedily; one line each."""
        return []

    @abc.abstractmethod
    def save(self, model: nn.Module, folder: Path) -> None:
        """Write the merged bf16 model."""


def schedule(step: int, steps: int) -> float:
    """Factor of the learning rate: 5 warm-up steps, then a cosine down to a tenth."""
    if step < WARMUP:
        return (step + 1) / WARMUP
    progress = (step - WARMUP) / max(1, steps - WARMUP)
    return FLOOR + (1 - FLOOR) * 0.5 * (1 + math.cos(math.pi * progress))


def train(
    model: nn.Module,
    groups: Sequence[Any],
    rate: float,
    outputs: Callable[[nn.Module, Any], tuple[Tensor, Tensor]],
) -> Iterator[float]:
    """One optimizer step a batch, over the parameters that ask for gradients; yields each step's loss.

    Args:
        model: what to train.
        groups: the batches.
        rate: largest learning rate.
        outputs: `Task.outputs`.

    Raises:
        ValueError: nothing to train, or the loss is no longer a number.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: schedule(step, len(groups)))
    model.train()
    for group in groups:
        loss = nn.functional.cross_entropy(*outputs(model, group))
        if not torch.isfinite(loss):
            raise ValueError(f"the loss became {loss.item()}: training diverged")
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, CLIP)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        yield loss.item()


@torch.no_grad()
def largest_difference(task: Task, one: nn.Module, other: nn.Module) -> float:
    """Largest absolute difference of the two models' logits on held-out examples."""
    first, second = (task.logits(model.eval()) for model in (one, other))
    return (first - second).abs().max().item()
