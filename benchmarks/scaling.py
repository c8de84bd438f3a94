"""Bytes a training step sends per process, on paper: `python -m benchmarks.scaling` prints docs/scaling.md's table.

Ring collectives over P processes: an all-gather or a reduce-scatter of S bytes sends (P-1)/P S per process, an
all-reduce twice that. FSDP2 gathers every parameter in the forward and again in the backward and reduce-scatters the
gradients of what trains; DDP all-reduces those gradients.
"""

from __future__ import annotations

from typing import NamedTuple

NF4_BYTES = 0.5 + (1 + 4 / 256) / 64  # a weight in NF4, blocks of 64, scales doubly quantized


class Model(NamedTuple):
    """The sizes of a Llama-like model that decide what is sent."""

    name: str
    layers: int
    hidden: int
    kv: int
    ffn: int
    vocabulary: int

    def linears(self) -> list[tuple[int, int]]:
        """[in, out] of the seven linear layers of a block."""
        h, kv, f = self.hidden, self.kv, self.ffn
        return [(h, h), (h, kv), (h, kv), (h, h), (h, f), (h, f), (f, h)]

    def linear_parameters(self) -> int:
        """Weights that are quantized and adapted."""
        return self.layers * sum(k * n for k, n in self.linears())

    def other_parameters(self) -> int:
        """Embedding, head and norms, kept in 16 bits."""
        return 2 * self.vocabulary * self.hidden + (2 * self.layers + 1) * self.hidden

    def adapter_parameters(self, r: int) -> int:
        """A and B on every linear layer."""
        return self.layers * sum(r * (k + n) for k, n in self.linears())


MODELS = (
    Model("8B", 32, 4096, 1024, 14336, 128256),
    Model("70B", 80, 8192, 1024, 28672, 128256),
)


def sent(model: Model, how: str, r: int = 16) -> float:
    """Bytes sent per process and step for very many processes ((P-1)/P = 1)."""
    everything = 2.0 * (model.linear_parameters() + model.other_parameters())  # bf16
    adapters = 4.0 * model.adapter_parameters(r)  # fp32, so are their gradients
    frozen = NF4_BYTES * model.linear_parameters() + 2.0 * model.other_parameters()
    return {
        "full, DDP": 2 * everything,
        "full, FSDP2": 3 * everything,
        "QLoRA, DDP": 2 * adapters,
        "QLoRA, FSDP2": 2 * (frozen + adapters) + adapters,
    }[how]


def table() -> str:
    """The table, as Markdown."""
    lines = ["| model | fine-tuning | sent per process and step | against full, FSDP2 |", "|---|---|---|---|"]
    for model in MODELS:
        whole = sent(model, "full, FSDP2")
        for how in ("full, DDP", "full, FSDP2", "QLoRA, DDP", "QLoRA, FSDP2"):
            amount = sent(model, how)
            lines.append(f"| {model.name} | {how} | {amount / 1e9:.2f} GB | {whole / amount:.1f}x less |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
