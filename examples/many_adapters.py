"""Several adapters on one frozen model, trained and served in mixed batches: every row says which one it uses.

    python examples/many_adapters.py             # three tasks over one NF4 base, saves ./adapters-out/<task>

Each task wants another thing of the same input; its adapter has its own rank, and one of them is DoRA. A small random
network stands for the model; transformers models work alike (`layer(x, adapter_names=[...])` is all a layer needs).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from torch import Tensor, nn

import fastlora

TASKS = {"reverse": lambda x: x.flip(1), "negate": lambda x: -x, "shift": lambda x: x.roll(1, dims=1)}
CONFIGS = {
    "reverse": fastlora.LoraConfig(r=16, lora_alpha=32, init_seed=0),
    "negate": fastlora.LoraConfig(r=8, lora_alpha=16, init_seed=1),
    "shift": fastlora.LoraConfig(r=16, lora_alpha=32, use_dora=True, init_seed=2),
}
WIDTH, ROWS = 48, 16


class Network(nn.Module):
    """One hidden layer; x [rows, WIDTH] -> [rows, WIDTH]."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 192), nn.Linear(192, WIDTH)

    def forward(self, x: Tensor, names: Sequence[str | None]) -> Tensor:
        """One adapter name, or None for the base alone, for each row."""
        return self.down(nn.functional.silu(self.up(x, adapter_names=names)), adapter_names=names)


def batch() -> tuple[Tensor, list[str], Tensor]:
    """Rows of all tasks mixed: inputs, whose they are, what is wanted."""
    x = torch.randn(ROWS * len(TASKS), WIDTH)
    names = [list(TASKS)[row % len(TASKS)] for row in range(len(x))]
    return x, names, torch.cat([TASKS[name](x[row : row + 1]) for row, name in enumerate(names)])


def errors(model: Network) -> dict[str, float]:
    """Mean squared error of each task."""
    x, names, wanted = batch()
    with torch.no_grad():
        squares = (model.eval()(x, names) - wanted).square().mean(1)
    return {task: squares[[name == task for name in names]].mean().item() for task in TASKS}


def main() -> None:
    """Add the adapters, train them together, save each, serve them in one batch."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--out", default="adapters-out")
    options = parser.parse_args()

    torch.manual_seed(0)
    model = Network()
    first, *others = CONFIGS
    fastlora.convert(model, CONFIGS[first], adapter_name=first, progress=False)
    fastlora.add_adapters(model, {name: CONFIGS[name] for name in others})
    fastlora.train_adapters(model, list(CONFIGS))  # all of them learn in one batch
    optimizer = torch.optim.AdamW(fastlora.param_groups(model, lr=5e-3))

    start = errors(model)
    for step in range(options.steps):
        x, names, wanted = batch()
        loss = (model.train()(x, names) - wanted).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 0:
            print(f"step {step:3d}: loss {loss.item():.4f}")
    for task, error in errors(model).items():
        print(f"{task:<8} error {start[task]:.3f} -> {error:.3f}")

    for name in CONFIGS:
        print(f"saved {fastlora.save_adapter(model, options.out, name)}")
    x = torch.randn(4, WIDTH)
    mixed = model.eval()(x, ["reverse", None, "shift", "negate"])  # None: the frozen model
    alone = torch.cat(
        [model(x[row : row + 1], [name]) for row, name in enumerate(["reverse", None, "shift", "negate"])]
    )
    print(f"one mixed batch and four single rows differ by {(mixed - alone).abs().max().item():.1e}")


if __name__ == "__main__":
    main()
