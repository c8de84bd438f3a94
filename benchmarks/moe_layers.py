"""One layer of each mixture for the benchmark: the same weights for us and, in a process of its own, for moe-peft."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from benchmarks.environment import ROOT
from benchmarks.moe_peer import P, Seconds, grad
from fastlora import moe

PEER_PYTHON = ROOT / "build" / "moe-venv" / "bin" / "python"
MLP = ("gate_proj", "up_proj", "down_proj")


class Sizes(NamedTuple):
    """Of one layer and its input."""

    hidden: int = 512
    width: int = 1376
    sequences: int = 4
    length: int = 256
    experts: int = 8
    top_k: int = 2
    rank: int = 16

    @property
    def tokens(self) -> int:
        """Rows of the input."""
        return self.sequences * self.length


TINY = Sizes(16, 24, 2, 12, 4, 2, 3)


def methods(sizes: Sizes) -> dict[str, dict[str, Any]]:
    """Every method's config in MoE-PEFT's words, dropout apart."""
    shared = {"r": sizes.rank, "lora_alpha": 2 * sizes.rank, "num_experts": sizes.experts}
    mix = {**shared, "peft_type": "MIXLORA", "jitter_noise": 0.0, "target_modules": list(MLP)}
    capacity = max(1, sizes.length * 5 // (4 * sizes.experts))  # a factor of 1.25
    return {
        "MixLoRA": {**mix, "routing_strategy": "mixlora", "top_k": sizes.top_k},
        "MixLoRA dynamic": {**mix, "routing_strategy": "mixlora-dynamic", "top_p": 0.7},
        "MixLoRA switch": {**mix, "routing_strategy": "mixlora-switch", "expert_capacity": capacity},
        "LoRAMoE": {**shared, "peft_type": "LORAMOE", "target_modules": ["up_proj"]},
        "MoLA": {**shared, "peft_type": "MOLA", "top_k": sizes.top_k, "target_modules": ["up_proj"]},
        "MoLA attention": {**shared, "peft_type": "MOLA", "top_k": sizes.top_k, "target_modules": ["q_proj"]},
    }


def shapes(fields: dict[str, Any], sizes: Sizes) -> dict[str, tuple[int, int]]:
    """(out, in) of the linears the method works on: a gated MLP, or the one it names."""
    every = {
        "gate_proj": (sizes.width, sizes.hidden),
        "up_proj": (sizes.width, sizes.hidden),
        "down_proj": (sizes.hidden, sizes.width),
        "q_proj": (sizes.hidden, sizes.hidden),
    }
    return {name: every[name] for name in fields["target_modules"]}


def tensors_for(fields: dict[str, Any], sizes: Sizes, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Weights, input and upstream gradient, the names as `moe_peer.build_layer` wants them; nothing is at its init."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    made: dict[str, Tensor] = {"gate": randn(sizes.experts, sizes.hidden) * sizes.hidden**-0.5}
    linears = shapes(fields, sizes)
    for name, (rows, columns) in linears.items():
        made[f"base.{name}"] = (randn(rows, columns) * columns**-0.5).to(dtype)
        made[f"{name}.lora_A"] = randn(sizes.experts, sizes.rank, columns) * columns**-0.5
        made[f"{name}.lora_B"] = randn(sizes.experts, rows, sizes.rank) * (0.3 * sizes.rank**-0.5)
    out = next(reversed(linears.values()))[0]
    made["x"] = randn(sizes.sequences, sizes.length, sizes.hidden).to(dtype)
    made["dy"] = randn(sizes.sequences, sizes.length, out).to(dtype)
    return made


class GatedMLP(nn.Module):
    """What transformers' Llama has between its norms, weights taken as they are."""

    def __init__(self, weights: dict[str, Tensor]) -> None:
        super().__init__()
        for name, weight in weights.items():
            setattr(self, name, _linear(weight))
        self.act_fn = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        """down(act(gate(x)) * up(x))."""
        parts: Any = self
        y: Tensor = parts.down_proj(parts.act_fn(parts.gate_proj(x)) * parts.up_proj(x))
        return y


def _linear(weight: Tensor) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return linear


def build(fields: dict[str, Any], tensors: dict[str, Tensor]) -> nn.Module:
    """Our module of the method with these weights, in training mode."""
    weights = {name.removeprefix("base."): t for name, t in tensors.items() if name.startswith("base.")}
    config = moe.config_from_dict(fields)
    if fields["peft_type"] == "MIXLORA":
        module: Any = moe.MixLoraMLP.from_mlp(GatedMLP(weights), config)
        owners = {name: getattr(module, name) for name in weights}
    else:
        (weight,) = weights.values()
        kind: Any = moe.LoraMoeLinear if fields["peft_type"] == "LORAMOE" else moe.MolaLinear
        module = kind.from_linear(_linear(weight), config)
        owners = dict.fromkeys(weights, module)
    with torch.no_grad():
        module.gate.weight.copy_(tensors["gate"])
        for name, owner in owners.items():
            owner.lora_A.copy_(tensors[f"{name}.lora_A"])
            owner.lora_B.copy_(tensors[f"{name}.lora_B"])
    return module.train()


class Ours:
    """Takes the same steps as `moe_peer.Contender`."""

    def __init__(self, fields: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        self.module = build(fields, tensors)
        self.x, self.dy = tensors["x"], tensors["dy"]
        (only,) = [n.removeprefix("base.") for n in tensors if n.startswith("base.")][-1:]
        self.only = only

    def step(self) -> tuple[Seconds, dict[str, Tensor]]:
        """Forward and backward with all gradients: time and tensors."""
        for parameter in self.module.parameters():
            parameter.grad = None
        x = self.x.clone().requires_grad_()
        started = Seconds.now()
        y = self.module(x)
        y.backward(self.dy)
        seconds = started.since()
        assert x.grad is not None
        found = {"y": y.detach(), "dx": x.grad}
        for name, parameter in self.module.named_parameters():
            if parameter.requires_grad:
                found[f"d.{self._peer_name(name)}"] = grad(parameter)
        return seconds, found

    def _peer_name(self, name: str) -> str:
        """A parameter's name as the peer's answers have it."""
        if name == "gate.weight":
            return "gate"
        return name if "." in name else f"{self.only}.{name}"


class Peer:
    """moe-peft's layer in its own process; use as a context.

    Raises:
        FileNotFoundError: its environment is not there. RuntimeError: it died; with what it said last.
    """

    def __init__(self, fields: dict[str, Any], tensors: dict[str, Tensor], threads: int, scratch: Path) -> None:
        if not PEER_PYTHON.is_file():
            raise FileNotFoundError("moe-peft's environment is not set up (make bench-moe does that)")
        self._scratch, self._log = scratch, (scratch / "peer.log").open("w+")
        save_file({name: t.contiguous() for name, t in tensors.items()}, scratch / "weights.safetensors")
        self._process = subprocess.Popen(
            [str(PEER_PYTHON), "-m", "benchmarks.moe_peer"],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )
        try:
            config = {**fields, "lora_dropout": P}
            self._ask("build", fields=config, tensors=str(scratch / "weights.safetensors"), threads=threads)
        except RuntimeError:
            self.__exit__()
            raise

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *error: object) -> None:
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._log):
            if stream is not None:
                stream.close()

    def _ask(self, what: str, **more: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps({"do": what, **more}) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # it died; what it said follows
        line = self._process.stdout.readline()
        if not line:
            self._log.seek(0)
            said = self._log.read().strip().splitlines()
            raise RuntimeError(f"moe-peft's process ended: {said[-1] if said else 'no word why'}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def seconds(self) -> Seconds:
        """One forward and backward, by its own clocks."""
        return Seconds(*self._ask("step")["seconds"])

    def outputs(self) -> dict[str, Tensor]:
        """Output and gradients of a step."""
        path = self._scratch / "outputs.safetensors"
        self._ask("save", to=str(path))
        return load_file(path)

    def saved_bytes(self) -> int:
        """Bytes one forward keeps."""
        found: int = self._ask("saved bytes")["bytes"]
        return found
