"""One training step of a whole model: fastlora beside PEFT + bitsandbytes and beside the frozen fp32 model.

    python -m benchmarks.step_beside_peft [--json FILE] [--png FILE] [--threads N] [--steps N] [--tokens M]

SmolLM2-135M and the demo's own batches. A step is forward, backward, gradient clipping and AdamW, as in the demo.
Everybody holds the same NF4 bytes and, after loading the adapter that fastlora saved, the same adapter. Parity comes
first: unless both compute the same loss on the same batch, nobody gets a time. Steps take turns, A B C A B C, on the
same batch each; reported are medians and the median of the rounds' ratios.

The floor is the unquantized model without adapters, forward and backward down to the first layer's input: what a step
costs that trains nothing.
"""

from __future__ import annotations

import copy
import dataclasses
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fastlora
from benchmarks import plots, script, timing

SCHEMA = 1
RANK, ALPHA, RATE, CLIP = 16, 32, 1e-3, 1.0
DROPOUTS = (0.0, 0.05)
COMPUTE = {"fp32": torch.float32, "bf16": torch.bfloat16}
LOSS_BUDGET = 0.02  # between two implementations of the same model on the same batch
FACTOR, LEAST = 3.0, 0.02  # `near_fp32`, for batches on which rounding alone exceeds that budget
OURS, PEFT, FLOOR = "fastlora", "peft", "frozen"
IGNORE = -100


@dataclasses.dataclass(frozen=True)
class Options:
    """What to measure.

    Attributes:
        threads: of torch. steps: rounds of each setting, warm-up apart.
        tokens: of a batch, about; 0 takes the demo's batches of 8 sentences.
        budget: seconds for all settings' rounds; at least three rounds are taken, whatever it says.
        compute: dtypes of weights' use and activations, "fp32" and "bf16". dropouts: on the adapters' input.
        tiny: a made-up model of two small layers: checks the machinery, never speed.
    """

    threads: int = 1
    steps: int = 7
    tokens: int = 0
    budget: float = 120.0
    compute: tuple[str, ...] = tuple(COMPUTE)
    dropouts: tuple[float, ...] = DROPOUTS
    tiny: bool = False


@dataclasses.dataclass(frozen=True)
class Batch:
    """ids, attention mask and labels, each [batch, length]; labels are IGNORE where no loss is taken."""

    ids: Tensor
    mask: Tensor
    labels: Tensor


class Missing(RuntimeError):
    """What has to be installed for a contender."""


# --- model and text ---------------------------------------------------------------------------------------------------


def _tiny() -> tuple[nn.Module, list[Batch]]:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)).eval()
    ids = torch.randint(0, 96, (4, 3, 10), generator=torch.Generator().manual_seed(1))
    return model, [Batch(row, torch.ones_like(row), row.clone()) for row in ids]


def _real(tokens: int) -> tuple[nn.Module, list[Batch]]:
    """SmolLM2-135M and batches of the demo's sentences."""
    from fastlora.cli import _packages, _restore, _smollm2

    model, tokenizer = _smollm2.load()
    sentences = _restore.usable(_packages.text_file().read_text(encoding="utf-8").splitlines())
    examples = _restore.encode(tokenizer, sentences[: 40 * _restore.BATCH])
    mean = sum(len(example.ids) for example in examples) / len(examples)
    size = min(max(1, round(tokens / mean)), len(examples)) if tokens else _restore.BATCH
    groups = [group for group in _restore.batches(examples, size, seed=0) if len(group) == size]
    return model, [Batch(*_restore.collate(group, tokenizer.pad_token_id)) for group in groups]


# --- contenders -------------------------------------------------------------------------------------------------------


def _linears(model: nn.Module) -> list[str]:
    head = model.get_output_embeddings()
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and module is not head]


def _four_bit(model: nn.Module, ours: nn.Module, compute: torch.dtype) -> nn.Module:
    """The model with bitsandbytes' `Linear4bit`s over the bytes that ours holds."""
    try:
        import bitsandbytes
    except (ImportError, OSError, RuntimeError) as error:
        raise Missing(f"bitsandbytes cannot be imported: {error}") from error
    for name in _linears(model):
        linear = model.get_submodule(name)
        layer = bitsandbytes.nn.Linear4bit(
            linear.in_features,
            linear.out_features,
            bias=False,
            compute_dtype=compute,
            compress_statistics=True,
            quant_type="nf4",
            device="meta",
        )
        layer.weight = ours.get_submodule(name).weight.to_bnb()
        model.set_submodule(name, layer)
    model.is_loaded_in_4bit = True
    return model


def randomize(model: nn.Module, kind: str, std: float) -> None:
    """Random parameters whose names hold `kind`, the zeros of a new adapter, so that it counts from the first step."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if kind in name:
            parameter.data.normal_(std=std, generator=generator)


def build_ours(model: nn.Module, compute: torch.dtype, **fields: Any) -> nn.Module:
    """The model with our NF4 layers and a random B; fields of the adapter's config."""
    config = fastlora.LoraConfig(r=RANK, lora_alpha=ALPHA, init_seed=0, **fields)
    fastlora.convert(model.to(compute), config, quantize="nf4", double_quant=True, progress=False)
    randomize(model, "lora_B", 0.01)
    return model


def with_adapter(model: nn.Module, ours: nn.Module) -> Any:
    """PEFT's model with the adapter read from the folder that ours is saved to."""
    try:
        from peft import PeftModel
    except ImportError as error:
        raise Missing(f"peft cannot be imported: {error}") from error
    with tempfile.TemporaryDirectory() as folder:
        fastlora.save_adapter(ours, folder)
        return PeftModel.from_pretrained(model, folder, is_trainable=True)


def build_peft(model: nn.Module, ours: nn.Module, compute: torch.dtype) -> nn.Module:
    """PEFT over bitsandbytes, with the same adapter."""
    inner: nn.Module = with_adapter(_four_bit(model.to(compute), ours, compute), ours).base_model.model
    return inner


def loss_of(model: nn.Module, batch: Batch, **inputs: Any) -> Tensor:
    """Cross-entropy per target, in fp32; the output head runs on the targets alone, as in the demo."""
    inputs = inputs or {"input_ids": batch.ids}
    hidden = model.model(**inputs, attention_mask=batch.mask, use_cache=False).last_hidden_state
    wanted = batch.labels[:, 1:] != IGNORE
    return nn.functional.cross_entropy(model.lm_head(hidden[:, :-1][wanted]).float(), batch.labels[:, 1:][wanted])


def _autocast(compute: torch.dtype) -> Any:
    """PEFT's usual setting for 16-bit training: fp32 adapters under autocast. Everybody runs under it."""
    return torch.autocast("cpu", torch.bfloat16, enabled=compute == torch.bfloat16)


def trainer(model: nn.Module, compute: torch.dtype) -> Callable[[Batch], float]:
    """A full step over the parameters that ask for gradients; gives the loss."""
    model.train()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.0)

    def step(batch: Batch) -> float:
        with _autocast(compute):
            loss = loss_of(model, batch)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, CLIP)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def frozen(model: nn.Module, compute: torch.dtype) -> Callable[[Batch], float]:
    """Forward, and backward to the first layer's input; nothing is trained."""
    model.train().requires_grad_(False)

    def step(batch: Batch) -> float:
        embedded = model.get_input_embeddings()(batch.ids).requires_grad_()
        with _autocast(compute):
            loss = loss_of(model, batch, inputs_embeds=embedded)
        loss.backward()
        return loss.item()

    return step


# --- parity and time --------------------------------------------------------------------------------------------------


def undropped(model: nn.Module) -> nn.Module:
    """The model in training mode, but for dropout, and our layers, which draw their own.

    Not in evaluation, where bitsandbytes repacks its weights for bf16 products on CPUs that have them, and keeps them.
    """
    model.train()
    for module in model.modules():
        if isinstance(module, (nn.Dropout, fastlora.QLoraLinear)):
            module.eval()
    return model


def _gradients(model: nn.Module, batch: Batch, compute: torch.dtype) -> tuple[float, dict[str, Tensor]]:
    """The loss without dropout, and each adapter's gradient under a name that both libraries share."""
    undropped(model)
    with _autocast(compute):
        loss = loss_of(model, batch)
    loss.backward()
    found = {
        name.replace(".default", "").removesuffix(".weight"): parameter.grad
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    model.zero_grad()
    return loss.item(), found


def parity(ours: nn.Module, peft: nn.Module, batch: Batch, compute: torch.dtype) -> dict[str, Any]:
    """Both losses on one batch without dropout and, in fp32, how far the adapters' gradients are apart, norm-wise.

    In bf16 that distance says nothing: this model's first gradients are so sensitive that either library's lie about
    their own norm away from the fp32 ones (fastlora 0.94, PEFT 1.02; 2026-11).

    Raises:
        RuntimeError: the losses differ by more than the budget, or the gradients are not of the same parameters.
    """
    (loss, own), (other_loss, other) = (_gradients(model, batch, compute) for model in (ours, peft))
    apart = gradients_apart((loss, other_loss), own, other, LOSS_BUDGET)
    return {
        "loss": loss,
        "loss_peft": other_loss,
        "adapters": len(own),
        "gradient_difference": apart if compute == torch.float32 else None,
    }


def sensitivity(model: nn.Module, batch: Batch) -> tuple[float, float]:
    """The fp32 loss of a model, and how far it goes when adapted outputs are rounded up or down to bf16 at random."""
    plain = plain_loss(model, batch, torch.float32)
    generator = torch.Generator().manual_seed(3)

    def move(layer: nn.Module, args: Any, y: Tensor) -> Tensor:
        near = y.bfloat16()
        side = torch.where(y > near, torch.inf, -torch.inf).to(torch.bfloat16)
        other = torch.nextafter(near, side)
        return torch.where(torch.rand(y.shape, generator=generator) < 0.5, near, other).to(y.dtype)

    layers = [module for module in model.modules() if isinstance(module, fastlora.QLoraLinear)]
    handles = [layer.register_forward_hook(move) for layer in layers]
    moved = [abs(plain_loss(model, batch, torch.float32) - plain) for _ in range(2)]
    for handle in handles:
        handle.remove()
    return plain, max(moved)


def plain_loss(model: nn.Module, batch: Batch, compute: torch.dtype) -> float:
    """Of one batch, without gradients."""
    with torch.no_grad(), _autocast(compute):
        return loss_of(model, batch).item()


def near_fp32(losses: Sequence[float], fp32: tuple[float, float]) -> dict[str, float]:
    """Hold bf16 losses to the fp32 loss, within `FACTOR` times what rounding alone moves it (or `LEAST`, which two
    moves may undercut by luck): adoption's rule, with bf16's unit in place of fp32's.

    Args:
        losses: ours and PEFT's, in bf16.
        fp32: the fp32 loss, and how far rounding moves it (`sensitivity`).

    Raises:
        RuntimeError: one is farther away.
    """
    want, moved = fp32
    allowed = max(LEAST, FACTOR * moved)
    if not all(abs(loss - want) <= allowed for loss in losses):
        raise RuntimeError(f"parity failed: fp32 loss {want:.4f}, bf16 {losses} (ours, PEFT), allowed {allowed:.4f}")
    return {"loss_fp32": want, "moved_by_rounding": moved, "allowed": allowed}


def gradients_apart(
    losses: tuple[float, float], own: dict[str, Tensor], other: dict[str, Tensor], budget: float
) -> float:
    """How far our gradients are from PEFT's, over PEFT's norm.

    Raises:
        RuntimeError: the losses differ by more than the budget, or the gradients are not of the same parameters.
    """
    if set(own) != set(other) or not own:
        raise RuntimeError(f"{len(own)} of our parameters have gradients and {len(other)} of PEFT's, or other ones")
    loss, other_loss = losses
    if not abs(loss - other_loss) <= budget:
        raise RuntimeError(f"parity failed: loss {loss:.5f} here and {other_loss:.5f} with PEFT, budget {budget}")
    apart = sum((own[name] - other[name]).square().sum() for name in own)
    return float((apart / sum(grad.square().sum() for grad in other.values())) ** 0.5)


def setting(model: nn.Module, batches: list[Batch], compute: str, options: Options) -> list[dict[str, Any]]:
    """Everybody at one compute dtype and every dropout, in one interleaved run; one entry a dropout."""
    dtype = COMPUTE[compute]
    steps: dict[str, Callable[[Batch], float]] = {}
    reasons: dict[str, str] = {}
    found: dict[str, Any] | None = None
    for p in options.dropouts:
        ours = build_ours(copy.deepcopy(model), dtype, lora_dropout=p)
        try:
            peft = build_peft(copy.deepcopy(model), ours, dtype)
            if found is None:
                found = parity(ours, peft, batches[0], dtype)
            steps[f"{PEFT} {p}"] = trainer(peft, dtype)
        except Missing as error:
            reasons[PEFT] = str(error)
        steps[f"{OURS} {p}"] = trainer(ours, dtype)
    steps[FLOOR] = frozen(copy.deepcopy(model).to(dtype), dtype)
    seconds = options.budget / len(options.compute)
    times = timing.in_turns(steps, [(batch,) for batch in batches], options.steps, seconds=seconds)
    return [_entry(times, compute, p, found, reasons) for p in options.dropouts]


def _entry(
    times: dict[str, list[float]], compute: str, p: float, found: dict[str, Any] | None, reasons: dict[str, str]
) -> dict[str, Any]:
    samples = {OURS: times[f"{OURS} {p}"], PEFT: times.get(f"{PEFT} {p}", []), FLOOR: times[FLOOR]}
    own = samples[OURS]
    return {
        "compute": compute,
        "dropout": p,
        "rounds": len(own),
        "seconds": {name: statistics.median(values) if values else None for name, values in samples.items()},
        "peft_over_fastlora": timing.ratio(samples[PEFT], own),
        "frozen_over_fastlora": timing.ratio(samples[FLOOR], own),
        "parity": found,
        "reasons": reasons,
        "samples": samples,
    }


def measure(options: Options) -> dict[str, Any]:
    """Everything, as JSON types.

    Raises:
        RuntimeError: our loss is not PEFT's. fastlora.FastloraError: the model's packages are not installed.
    """
    torch.set_num_threads(options.threads)
    started = time.perf_counter()
    model, batches = _tiny() if options.tiny else _real(options.tokens)
    results = [entry for compute in options.compute for entry in setting(model, batches, compute, options)]
    used = batches[: options.steps]
    return {
        "schema": SCHEMA,
        "mode": "tiny" if options.tiny else "cpu",
        "model": "two small random layers" if options.tiny else "SmolLM2-135M",
        "adapter": {"r": RANK, "lora_alpha": ALPHA, "layers": len(_linears(model))},
        "batch": {
            "sequences": batches[0].ids.shape[0],
            "tokens_median": int(statistics.median(batch.ids.numel() for batch in used)),
        },
        "threads": options.threads,
        **script.facts(started),
        "results": results,
    }


# --- what comes out ---------------------------------------------------------------------------------------------------


def table(report: dict[str, Any]) -> str:
    """The short form, for the terminal."""
    lines = [
        f"{report['model']}, {report['adapter']['layers']} adapted linears, rank {RANK}; "
        f"{report['batch']['sequences']} sequences, {report['batch']['tokens_median']} tokens; "
        f"{report['threads']} thread(s)",
        f"{'':<20}{'fastlora s':>12}{'peft s':>10}{'frozen s':>10}{'peft/ours':>11}{'frozen/ours':>13}",
    ]
    for entry in report["results"]:
        cells = [*entry["seconds"].values(), entry["peft_over_fastlora"], entry["frozen_over_fastlora"]]
        shown = [f"{'-' if cell is None else format(cell, '.2f')}" for cell in cells]
        name = f"{entry['compute']}, dropout {entry['dropout']}"
        lines.append(f"{name:<20}{shown[0]:>12}{shown[1]:>10}{shown[2]:>10}{shown[3]:>11}{shown[4]:>13}")
    for entry in {entry["compute"]: entry for entry in report["results"]}.values():
        compute = entry["compute"]
        if found := entry["parity"]:
            apart = found["gradient_difference"]
            gradients = "" if apart is None else f", gradients apart by {apart:.1e} of their norm"
            lines.append(f"parity {compute}: loss {found['loss']:.4f} and {found['loss_peft']:.4f} (PEFT){gradients}")
        lines += [f"{compute}: no {name}: {why}" for name, why in entry["reasons"].items()]
    return "\n".join(lines)


def draw(report: dict[str, Any], path: Path) -> None:
    """Seconds a step as bars, one group a setting."""
    figure = plots.figure(7.2, 3.8, 130)
    axes = figure.add_subplot()
    looks = (
        (PEFT, "PEFT + bitsandbytes", "#9db4c8"),
        (OURS, "fastlora", "#2e7d32"),
        (FLOOR, "frozen model", "#d7d7d7"),
    )
    for place, (name, label, colour) in enumerate(looks):
        values = [entry["seconds"][name] for entry in report["results"]]
        plots.bars(axes, (place, len(looks)), values, size=8, color=colour, label=label)
    names = [f"{entry['compute']}, dropout {entry['dropout']}" for entry in report["results"]]
    axes.set_xticks(range(len(names)), names)
    axes.set_ylabel("seconds a step")
    axes.set_title(
        f"{plots.caution(report)}one training step, {report['model']}, NF4, rank {RANK}\n"
        f"{plots.machine(report)}, {report['batch']['tokens_median']} tokens",
        fontsize=10,
        loc="left",
    )
    axes.margins(y=0.12)
    axes.legend(frameon=False, fontsize=9)
    figure.savefig(path)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, write."""
    parser = script.parser("step_beside_peft", __doc__, tiny="a made-up small model")
    parser.add_argument("--threads", type=script.at_least(1), default=Options.threads)
    parser.add_argument("--steps", type=script.at_least(1), default=Options.steps, help="rounds of each setting")
    parser.add_argument(
        "--tokens", type=script.at_least(0), default=Options.tokens, help="of a batch, about (0: the demo's batches)"
    )
    parser.add_argument("--budget", type=float, default=Options.budget, help="seconds for all rounds")
    parser.add_argument("--compute", choices=tuple(COMPUTE), nargs="+", default=Options.compute)
    parser.add_argument("--dropout", type=float, nargs="+", default=Options.dropouts)
    chosen = parser.parse_args(arguments)
    several = {"compute": tuple(dict.fromkeys(chosen.compute)), "dropouts": tuple(dict.fromkeys(chosen.dropout))}
    options = Options(chosen.threads, chosen.steps, chosen.tokens, chosen.budget, tiny=chosen.tiny, **several)
    if not all(0 <= p < 1 for p in options.dropouts):
        parser.error("--dropout must be in [0, 1)")
    return script.run(parser, chosen, lambda: measure(options), table, draw)


if __name__ == "__main__":
    sys.exit(main())
