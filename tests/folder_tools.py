"""What the tests of model folders share: a tiny Llama's folder, an adapter beside it, and what must be left of both."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

import fastlora
from tests.model_tools import llama, move

SHARD = "20KB"


def model_folder(folder: Path, shard: str | None = SHARD, beside: bool = True, **keywords) -> Path:
    """As `save_pretrained` writes it, with files beside the weights that stay or go."""
    llama(**({"dtype": torch.bfloat16} | keywords)).save_pretrained(folder, max_shard_size=shard or "1GB")
    if beside:
        (folder / "tokenizer.json").write_text('{"version": "1.0"}')
        (folder / "chat_template.jinja").write_text("{{ messages }}")
        (folder / "additional_chat_templates").mkdir()
        (folder / "additional_chat_templates" / "tool.jinja").write_text("{{ tools }}")
        (folder / "pytorch_model.bin").write_bytes(b"weights in another format")
        (folder / ".hidden").write_text("x")
        (folder / "runs").mkdir()
        (folder / "runs" / "log").write_text("x")
    return folder


BESIDE = {"tokenizer.json", "chat_template.jinja", "additional_chat_templates/tool.jinja"}


def adapter_folder(folder: Path, **fields) -> Path:
    """An adapter of the tiny Llama that moves its outputs."""
    model = move(fastlora.convert(llama(), quantize=None, progress=False, **({"r": 4} | fields)))
    return fastlora.save_adapter(model, folder)


def load(folder: Path) -> torch.nn.Module:
    """The model of a folder, plain or by bitsandbytes."""
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def same_parameters(got: torch.nn.Module, want: torch.nn.Module) -> None:
    """Equal bytes and dtypes."""
    left, right = dict(got.named_parameters()), dict(want.named_parameters())
    assert list(left) == list(right)
    for name, tensor in right.items():
        assert left[name].dtype == tensor.dtype, name
        assert torch.equal(left[name], tensor), name


def names(folder: Path) -> list[str]:
    """Everything in a folder, hidden things too."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))
