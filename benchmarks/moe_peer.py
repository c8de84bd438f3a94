"""moe-peft 2.0.2 at work: its layers under our weights. Runs in an environment of its own, without fastlora.

    make build/moe-venv/.ready

Adapters come and go under the keys of its own checkpoints, magnitudes as `….lora_magnitude_vector` (it saves none).
Its dropout must be positive; 1e-12 rounds to a factor of 1 in fp32 and drops nothing.

As a program it is a contender: one JSON request a line on stdin ("build", "step", "save"), one answer a line on stdout.
"""

from __future__ import annotations

import importlib
import json
import sys
import time
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

P = 1e-12
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
NAME = "adapter"
PREFIX = {"LORA": "base_model.model.model", "MIXLORA": "mixlora", "LORAMOE": "loramoe", "MOLA": "mola"}


def moe_peft(part: str = "") -> Any:
    """The package or a module of it; its evaluation tasks want two more packages, which nothing here uses."""
    importlib.import_module("transformers")  # first: it looks for them too
    for absent in ("datasets", "evaluate"):
        sys.modules.setdefault(absent, types.ModuleType(absent))
    return importlib.import_module(f"moe_peft{part}")


# --- a whole model ----------------------------------------------------------------------------------------------------


def llama(sizes: Mapping[str, Any], base: Mapping[str, Tensor]) -> Any:
    """A transformers Llama of these sizes with these weights, biases where they hold some, as the peer's model."""
    from transformers import LlamaConfig, LlamaForCausalLM

    biased = any(name.endswith("bias") for name in base)
    config = LlamaConfig(attention_bias=biased, mlp_bias=biased, attn_implementation="eager", **sizes)
    plain = LlamaForCausalLM(config)
    plain.load_state_dict(dict(base))
    return moe_peft().LLMModel(moe_peft(".models").from_pretrained(plain, attn_impl="eager", device="cpu"))


def adopt(model: Any, fields: Mapping[str, Any], state: Mapping[str, Tensor] | None = None) -> Any:
    """Give the model an adapter of this config, with these tensors under the peer's keys; returns the peer's config."""
    config = moe_peft(".adapters").lora_config_factory({"name": NAME, **fields})
    config.adapter_name = NAME
    config.task_name = "casual"
    model.init_adapter(config, None if state is None else dict(state))
    for key, lora in loras(model, config):
        if state is not None and lora.use_dora_:
            with torch.no_grad():
                lora.magnitude_vector_.copy_(state[f"{key}.lora_magnitude_vector"])
    return config


def loras(model: Any, config: Any) -> Iterator[tuple[str, Any]]:
    """Every LoRA of the adapter by the key its tensors have in a checkpoint."""
    prefix = PREFIX[config.export()["peft_type"]]
    for index, layer in enumerate(model.model_.layers_):
        for place, found in zip(("self_attn", "mlp"), layer.state_dict(), strict=True):
            for projection, linear in found.items():
                key = f"{prefix}.layers.{index}.{place}.{projection}"
                for name, lora in linear.loras_.items():
                    expert = name.removeprefix(f"moe.{NAME}.")
                    yield (key if name == NAME else f"{key}.{expert}"), lora


def gates(model: Any, config: Any) -> Iterator[tuple[str, nn.Parameter]]:
    """Every gate's weight by its key."""
    prefix = PREFIX[config.export()["peft_type"]]
    for index, layer in enumerate(model.model_.layers_):
        if NAME in layer.mlp_.moes_:
            yield f"{prefix}.layers.{index}.mlp.moe_gate.weight", layer.mlp_.moes_[NAME].gate_.weight
        for place, found in zip(("self_attn", "mlp"), layer.state_dict(), strict=True):
            for projection, linear in found.items():
                if NAME in linear.moes_:
                    key = f"{prefix}.layers.{index}.{place}.{projection}.moe_gate.weight"
                    yield key, linear.moes_[NAME].gate_.weight


def parameters(model: Any, config: Any) -> dict[str, nn.Parameter]:
    """All that trains, by key."""
    found = dict(gates(model, config))
    for key, lora in loras(model, config):
        found |= {f"{key}.lora_A.weight": lora.lora_a_.weight, f"{key}.lora_B.weight": lora.lora_b_.weight}
        if lora.use_dora_:
            found[f"{key}.lora_magnitude_vector"] = lora.magnitude_vector_
    return found


def run(model: Any, ids: Tensor, mask: Tensor, labels: Tensor) -> Any:
    """One forward in training mode: `.logits`, `.loss`, `.aux_loss`, `.router_logits`."""
    package = moe_peft()
    rows = package.LLMBatchConfig(adapter_name_=NAME, batch_start_idx_=0, batch_end_idx_=ids.shape[0])
    asked = package.LLMModelInput(
        batch_configs_=[rows], batch_tokens_=ids, batch_masks_=mask, batch_labels_=labels, inference_mode_=False
    )
    return model.forward(asked)[0]


# --- one layer, timed -------------------------------------------------------------------------------------------------


class Layer(NamedTuple):
    """One layer of the peer's: its forward, what trains in it by name, and its frozen weights."""

    forward: Callable[[Tensor], Tensor]
    trained: dict[str, nn.Parameter]
    frozen: list[Tensor]


def build_layer(fields: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Layer:
    """A layer with these weights.

    The weights lie under "base.{projection}", the gate under "gate", stacked experts under "{projection}.lora_A" and
    "{projection}.lora_B", as our modules hold them. MixLoRA takes gate_proj, up_proj and down_proj, a plugin method
    one projection.
    """
    package = moe_peft()
    adapters, common = moe_peft(".adapters"), moe_peft(".common")
    config = adapters.lora_config_factory({"name": NAME, **fields})
    config.adapter_name = NAME
    if fields["peft_type"] == "MIXLORA":
        config.act_fn_ = "silu"
    linears: dict[str, Any] = {}
    trained: dict[str, nn.Parameter] = {}
    frozen: list[Tensor] = []
    projections = [name.removeprefix("base.") for name in tensors if name.startswith("base.")]
    dtype = tensors[f"base.{projections[0]}"].dtype
    for name in projections:
        weight = tensors[f"base.{name}"]
        plain = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=dtype)
        plain.weight.data.copy_(weight)
        frozen.append(plain.weight)
        if fields["peft_type"] != "MIXLORA":
            linears[name] = common.Linear(plain, "cpu")
        else:
            linears[name] = plain
    if fields["peft_type"] == "MIXLORA":
        sizes = types.SimpleNamespace(device_="cpu", hidden_act_="silu")
        mlp = moe_peft(".models.modeling_llama").LlamaMLP(
            linears["gate_proj"], linears["down_proj"], linears["up_proj"], sizes
        )
        linears = mlp.state_dict()
    for name, linear in linears.items():
        for expert in range(fields["num_experts"]):
            a, b = tensors[f"{name}.lora_A"][expert], tensors[f"{name}.lora_B"][expert]
            linear.init_lora_weight(config.expert_config(expert), (a, b))
            lora = linear.loras_[f"moe.{NAME}.experts.{expert}"]
            trained |= {f"{name}.lora_A.{expert}": lora.lora_a_.weight, f"{name}.lora_B.{expert}": lora.lora_b_.weight}
    block = adapters.moe_layer_factory(tensors["gate"].shape[1], "cpu", config, tensors["gate"])
    trained["gate"] = block.gate_.weight

    def arguments(x: Tensor) -> Any:
        rows = package.LLMBatchConfig(adapter_name_=NAME, batch_start_idx_=0, batch_end_idx_=x.shape[0])
        return package.LLMModelInput(batch_configs_=[rows], inference_mode_=False)

    if fields["peft_type"] == "MIXLORA":
        feed = common.FeedForward(mlp)
        feed.moes_[NAME] = block
        return Layer(lambda x: feed.forward(x, arguments(x))[0], trained, frozen)
    (only,) = linears.values()
    only.moes_[NAME] = block
    return Layer(lambda x: only.forward(x, arguments(x)), trained, frozen)


class Seconds(NamedTuple):
    """By the wall, and of this process's CPU: on a shared machine others' work is in the first alone."""

    wall: float
    cpu: float

    @classmethod
    def now(cls) -> Seconds:
        """A start."""
        return cls(time.perf_counter(), time.process_time())

    def since(self) -> Seconds:
        """From this start to now."""
        return Seconds(time.perf_counter() - self.wall, time.process_time() - self.cpu)


class Contender:
    """One layer that takes steps when asked."""

    def __init__(self, fields: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        self.layer = build_layer(fields, tensors)
        self.trained = self.layer.trained
        self.x, self.dy = tensors["x"], tensors["dy"]

    def step(self) -> tuple[Seconds, dict[str, Tensor]]:
        """Forward and backward with all gradients: time and tensors, stacked as our modules hold them."""
        for parameter in self.trained.values():
            parameter.grad = None
        x = self.x.clone().requires_grad_()
        started = Seconds.now()
        y = self.layer.forward(x)
        y.backward(self.dy)
        seconds = started.since()
        assert x.grad is not None
        found: dict[str, Tensor] = {"y": y.detach(), "dx": x.grad, "d.gate": grad(self.trained["gate"])}
        for stem in dict.fromkeys(name.rpartition(".")[0] for name in self.trained if name != "gate"):
            experts = sum(name.startswith(f"{stem}.") for name in self.trained)
            found[f"d.{stem}"] = torch.stack([grad(self.trained[f"{stem}.{e}"]) for e in range(experts)])
        return seconds, found


def grad(parameter: nn.Parameter) -> Tensor:
    """Its gradient; that of an expert nobody chose is None, which is zero."""
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def saved_bytes(forward: Callable[[Tensor], Tensor], x: Tensor, weights: Iterable[Tensor]) -> int:
    """Bytes that one forward keeps for its backward: every storage once and whole, the weights apart."""
    known = {weight.untyped_storage().data_ptr() for weight in weights}
    seen: dict[int, int] = {}
    kept: list[Tensor] = []  # so that no storage is freed and its address seen twice

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            seen[storage.data_ptr()] = storage.nbytes()
            kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = forward(x.clone().requires_grad_())
    del y
    return sum(seen.values())


def main() -> int:
    """Answer requests until stdin ends."""
    from safetensors.torch import load_file, save_file

    contender: Contender | None = None
    for line in sys.stdin:
        asked = json.loads(line)
        answer: dict[str, Any] = {}
        if asked["do"] == "build":
            torch.set_num_threads(asked["threads"])
            contender = Contender(asked["fields"], load_file(asked["tensors"]))
        assert contender is not None
        if asked["do"] == "step":
            answer["seconds"] = list(contender.step()[0])
        elif asked["do"] == "save":
            save_file({name: t.contiguous() for name, t in contender.step()[1].items()}, asked["to"])
        elif asked["do"] == "saved bytes":
            layer = contender.layer
            answer["bytes"] = saved_bytes(layer.forward, contender.x, [*layer.trained.values(), *layer.frozen])
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
