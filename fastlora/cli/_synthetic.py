"""The demo that needs no download: a small byte-level transformer with random weights, on text Python brings along.

The frozen weights are noise, so nothing useful comes out; what shows is that the whole way works: 4-bit weights,
adapters that learn through them (of unseen text, the next byte), saving, reloading, merging.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastlora.cli._task import Score, Task
from fastlora.errors import FastloraError

BYTES, WIDTH, HEADS, INNER, BLOCKS = 256, 256, 4, 768, 3
LENGTH, BATCH, RATE, STEPS = 64, 16, 3e-3, 100
HELD_OUT, EVAL_BATCH = 64, 16
# Wide enough for logits that tell a frequent byte from a rare one; the head is frozen.
HEAD_STD, POSITION_STD = 0.1, 0.1


class Block(nn.Module):
    """Causal attention and a GELU MLP, each after an RMS norm and added to its input; x [batch, length, WIDTH]."""

    def __init__(self) -> None:
        super().__init__()
        self.attention_norm, self.mlp_norm = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.q_proj = nn.Linear(WIDTH, WIDTH, bias=False)
        self.k_proj = nn.Linear(WIDTH, WIDTH, bias=False)
        self.v_proj = nn.Linear(WIDTH, WIDTH, bias=False)
        self.o_proj = nn.Linear(WIDTH, WIDTH, bias=False)
        self.up_proj = nn.Linear(WIDTH, INNER, bias=False)
        self.down_proj = nn.Linear(INNER, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x -> x + attention(x), then + mlp."""
        normed = self.attention_norm(x)
        # [batch, heads, length, WIDTH / heads]
        q, k, v = (
            project(normed).unflatten(-1, (HEADS, -1)).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o_proj(mixed.transpose(1, 2).flatten(2))
        return x + self.down_proj(F.gelu(self.up_proj(self.mlp_norm(x))))


class ByteTransformer(nn.Module):
    """bytes [batch, length <= LENGTH] -> logits of the next byte [batch, length, 256]."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.position = nn.Embedding(BYTES, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.blocks = nn.Sequential(*(Block() for _ in range(BLOCKS)))
        self.norm, self.head = nn.RMSNorm(WIDTH), nn.Linear(WIDTH, BYTES, bias=False)
        nn.init.normal_(self.position.weight, std=POSITION_STD)
        nn.init.normal_(self.head.weight, std=HEAD_STD)

    def get_output_embeddings(self) -> nn.Linear:
        """The head, which adapters leave alone."""
        return self.head

    def forward(self, ids: Tensor) -> Tensor:
        """The logits."""
        x = self.embedding(ids) + self.position.weight[: ids.shape[1]]
        logits: Tensor = self.head(self.norm(self.blocks(x)))
        return logits


def _topics(seed: int) -> tuple[bytes, bytes, int]:
    """Python's own help texts: those to train on, those held out (a tenth), and how many there are."""
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise FastloraError(f"this Python comes without its help texts, which the demo reads: {error}") from None
    names = random.Random(seed).sample(sorted(topics), len(topics))
    cut = len(names) // 10
    held_out, train = ("\n".join(topics[name] for name in part).encode() for part in (names[:cut], names[cut:]))
    return train, held_out, len(names)


def windows(text: bytes, count: int, seed: int) -> Tensor:
    """`count` stretches of LENGTH + 1 bytes that begin anywhere, int64 [count, LENGTH + 1]."""
    data = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    starts = torch.randint(len(data) - LENGTH, (count,), generator=torch.Generator().manual_seed(seed))
    return data[starts[:, None] + torch.arange(LENGTH + 1)]


def guess(train: bytes, targets: Tensor) -> Score:
    """What knowing only how often each byte occurs would score: the least an adapter must beat."""
    counts, wanted = Counter(train), Counter(targets.flatten().tolist())
    total, held_out = len(train) + BYTES, targets.numel()
    loss = -sum(count * math.log((counts[byte] + 1) / total) for byte, count in wanted.items())
    return Score(loss / held_out, wanted[max(counts, key=lambda byte: counts[byte])] / held_out)


class Synthetic(Task):
    """The next byte of Python's help texts."""

    model_name = f"byte transformer with random weights, {BLOCKS} blocks of width {WIDTH}"
    title = "A random byte transformer learns through its adapters (QLoRA over NF4)"
    held_out = f"{HELD_OUT} held-out stretches of {LENGTH} bytes"
    unit = "byte"
    exact = "next bytes predicted exactly"
    batch, rate, steps = BATCH, RATE, STEPS

    def __init__(self, steps: int, seed: int) -> None:
        train, held_out, count = _topics(seed)
        self.text = f"{count} help topics of Python, {(len(train) + len(held_out)) / 1e3:.0f} kB"
        self.groups = list(windows(train, steps * BATCH, seed).split(BATCH))
        self._held_out = windows(held_out, HELD_OUT, seed)
        self.rounds = len(self._held_out.split(EVAL_BATCH))
        self._seed = seed
        least = guess(train, self._held_out[:, 1:])
        self.note = (
            f"Knowing only how often each byte occurs would score {least.loss:.3f} and {least.exact:.1%}. "
            "The frozen weights are random: this shows that every part works, not a useful model."
        )

    def load(self) -> nn.Module:
        """The model, drawn from the seed."""
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(self._seed)
            return ByteTransformer().eval()

    def outputs(self, model: nn.Module, batch: Tensor) -> tuple[Tensor, Tensor]:
        """Every byte but the first is a target."""
        return model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten()

    @torch.no_grad()
    def evaluate(self, model: nn.Module, done: Callable[[], None]) -> Score:
        """Mean loss, and the share of bytes that are the most likely one."""
        model.eval()
        total, right = 0.0, 0
        for batch in self._held_out.split(EVAL_BATCH):
            logits, targets = self.outputs(model, batch)
            total += F.cross_entropy(logits, targets, reduction="sum").item()
            right += int((logits.argmax(-1) == targets).sum().item())
            done()
        count = HELD_OUT * LENGTH
        return Score(total / count, right / count)

    def logits(self, model: nn.Module) -> Tensor:
        """Logits [batch, LENGTH, 256] of held-out text."""
        logits: Tensor = model(self._held_out[:BATCH, :-1])
        return logits

    def save(self, model: nn.Module, folder: Path) -> None:
        """The model in bf16 as `model.safetensors`."""
        from safetensors.torch import save_file

        folder.mkdir()
        save_file(model.to(torch.bfloat16).state_dict(), folder / "model.safetensors")
