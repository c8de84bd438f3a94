"""What moe-peft 2.0.2 computes, kept as small tensors: tests/data/moe. Runs in the peer's environment (`moe_peer`).

    build/moe-venv/bin/python -m benchmarks.moe_goldens tests/data/moe
    build/moe-venv/bin/python -m benchmarks.moe_goldens tests/data/moe --read FOLDER mixlora

With --read it computes nothing new: moe-peft opens an adapter's folder that fastlora saved and prints how far its
logits are from the case's.

A Llama of two layers in fp32, random everywhere a zero would hide an error: biases (but for DoRA, whose bias the peer
scales), B, wide gates, magnitudes off their init. One file a case: `adapter.*` under the peer's own keys, `grad.*` of
loss + auxiliary loss for each of them, `embeddings_grad`, `aux_grad.*` of the auxiliary loss for the gates, and the
outputs. The metadata hold the config it was made from and the one the peer writes when it saves.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import moe_peer

SIZES = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}
_LORA = {"r": 3, "lora_alpha": 5, "lora_dropout": moe_peer.P, "target_modules": list(moe_peer.PROJECTIONS)}
_MOE = {**_LORA, "num_experts": 4, "router_aux_loss_coef": 0.05, "router_loss": True}
_MIX = {**_MOE, "peft_type": "MIXLORA", "jitter_noise": 0.0}
CASES: dict[str, dict[str, Any]] = {
    "lora": {**_LORA, "peft_type": "LORA"},
    "dora": {**_LORA, "peft_type": "LORA", "use_dora": True},
    "mixlora": {**_MIX, "routing_strategy": "mixlora", "top_k": 2},
    "mixlora_dora": {**_MIX, "routing_strategy": "mixlora", "top_k": 2, "use_dora": True},
    "mixlora_dynamic": {**_MIX, "routing_strategy": "mixlora-dynamic", "top_p": 0.7},
    "mixlora_dynamic_own": {
        **_MIX,
        "routing_strategy": "mixlora-dynamic",
        "top_p": 0.9,
        "temperature": 0.8,
        "expert_lora": {"r": 2, "lora_alpha": 7, "lora_dropout": moe_peer.P},
    },
    "mixlora_switch": {
        **_MIX,
        "routing_strategy": "mixlora-switch",
        "expert_capacity": 2,
        "router_z_loss_coef": 0.01,
    },
    "loramoe": {**_LORA, "peft_type": "LORAMOE", "num_experts": 4},
    "mola": {**_MOE, "peft_type": "MOLA", "top_k": 2, "use_rslora": True},
}


def base_weights() -> dict[str, Tensor]:
    """The frozen model's weights, biases included."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(attention_bias=True, mlp_bias=True, **SIZES))
    state = dict(model.state_dict())
    for name, tensor in state.items():
        if name.endswith("norm.weight"):
            tensor.normal_(1, 0.2)
        elif name.endswith("bias"):
            tensor.normal_(0, 0.3)
        elif "embed" in name:
            tensor.normal_(0, 1)
        else:
            tensor.normal_(0, tensor.shape[1] ** -0.5)
    return {name: tensor.clone() for name, tensor in state.items()}


def batch() -> dict[str, Tensor]:
    """Two sequences of ten tokens, the second padded by three."""
    generator = torch.Generator().manual_seed(1)
    # Not the last id: without a padding token the peer's embedding drops that one's gradient.
    ids = torch.randint(1, SIZES["vocab_size"] - 1, (2, 10), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    ids[1, 7:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def randomize(found: dict[str, torch.nn.Parameter]) -> None:
    """Nothing at its init: B far from zero, gates wide, magnitudes off the norms; still, fp32 rounds by 1e-6 only."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for key, parameter in found.items():
            noise = torch.randn(parameter.shape, generator=generator)
            if "magnitude" in key:
                parameter.mul_(1 + 0.3 * noise)
            elif "moe_gate" in key:
                parameter.copy_(0.4 * noise)
            else:
                parameter.copy_(noise * parameter.shape[1] ** -0.5 * (0.3 if "lora_B" in key else 1.0))


def check_gaps(logits: Tensor) -> None:
    """Refuse routings that rounding could turn: neighbouring logits of a token closer than 1e-4."""
    closest = float(logits.sort(-1).values.diff(dim=-1).min())
    if closest < 1e-4:
        raise RuntimeError(f"two experts' logits of one token differ by {closest:.1e}: take another seed")


def golden(fields: dict[str, Any], base: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """One case: its tensors and metadata."""
    bare = bool(fields.get("use_dora"))
    model = moe_peer.llama(SIZES, {n: t for n, t in base.items() if not (bare and n.endswith("bias"))})
    config = moe_peer.adopt(model, fields)
    found = moe_peer.parameters(model, config)
    for parameter in found.values():
        parameter.requires_grad_(True)
    randomize(found)
    embeddings = model.model_.embed_tokens_.token_embedding_.requires_grad_(True)
    given = batch()
    out = moe_peer.run(model, given["input_ids"], given["attention_mask"], given["labels"])
    kept = {f"adapter.{key}": parameter.detach().clone() for key, parameter in found.items()}
    kept |= {"logits": out.logits.detach(), "loss": out.loss.detach()}
    total = out.loss
    if out.router_logits is not None:
        kept["router_logits"] = out.router_logits.detach()
        if fields["peft_type"] != "LORAMOE":  # it takes all experts
            check_gaps(out.router_logits.detach())
    if out.aux_loss is not None:
        kept["aux_loss"] = out.aux_loss.detach()
        total = total + out.aux_loss
        for key, parameter in found.items():
            if "moe_gate" in key:
                (grad,) = torch.autograd.grad(out.aux_loss, parameter, retain_graph=True)
                kept[f"aux_grad.{key}"] = grad
    total.backward()
    kept |= {f"grad.{key}": moe_peer.grad(parameter) for key, parameter in found.items()}
    kept["embeddings_grad"] = embeddings.grad
    exported = config.export() | {"base_model_name_or_path": "tiny", "task_type": "CAUSAL_LM"}
    about = {"config": json.dumps(fields, sort_keys=True), "exported": json.dumps(exported, sort_keys=True)}
    return {name: tensor.contiguous() for name, tensor in kept.items()}, about


def write(folder: Path) -> None:
    """base.safetensors and one file a case."""
    from safetensors.torch import save_file

    base = base_weights()
    save_file({**base, **batch()}, folder / "base.safetensors", metadata={"sizes": json.dumps(SIZES)})
    (folder / "base.safetensors").chmod(0o644)
    for name, fields in CASES.items():
        tensors, about = golden(fields, base)
        save_file(tensors, folder / f"{name}.safetensors", metadata=about)
        (folder / f"{name}.safetensors").chmod(0o644)  # safetensors writes for the owner alone
        shown = {key: float(tensors[key]) for key in ("loss", "aux_loss") if key in tensors}
        print(name, f"{sum(t.nbytes for t in tensors.values()) >> 10} KiB", shown)


def read(folder: Path, adapter: Path, name: str) -> float:
    """The largest difference between a case's logits and those of an adapter's folder, both in the peer."""
    from safetensors.torch import load_file

    tensors = load_file(folder / "base.safetensors")
    given = {key: tensors.pop(key) for key in batch()}
    bare = bool(CASES[name].get("use_dora"))
    model = moe_peer.llama(SIZES, {n: t for n, t in tensors.items() if not (bare and n.endswith("bias"))})
    fields = json.loads((adapter / "adapter_config.json").read_text())
    moe_peer.adopt(model, fields, load_file(adapter / "adapter_model.safetensors"))
    out = moe_peer.run(model, given["input_ids"], given["attention_mask"], given["labels"])
    return float((out.logits - load_file(folder / f"{name}.safetensors")["logits"]).abs().max())


def main(arguments: list[str]) -> int:
    """Write the cases, or read an adapter."""
    torch.set_num_threads(1)
    folder = Path(arguments[0])
    if arguments[1:2] == ["--read"]:
        print(read(folder, Path(arguments[2]), arguments[3]))
    else:
        write(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
