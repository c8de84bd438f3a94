"""The demo's task: give a sentence its capitals and punctuation back.

Prompt `raw: <the sentence in lower case, without punctuation>` and a second line `fixed:`; target: the sentence and
the end mark. Only target tokens count in the loss.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from fastlora.cli import _packages, _smollm2
from fastlora.cli._task import Score, Task

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

SHORTEST, LONGEST = 30, 110
HELD_OUT = 120
EVAL_BATCH = 16
IGNORE = -100
GROUP = 8
BATCH, RATE, STEPS, SAMPLES = 8, 1e-3, 40, 3


class Example(NamedTuple):
    """One sentence as tokens; `ids` is the prompt and the target, of which the first `prompt` are the prompt."""

    sentence: str
    ids: list[int]
    prompt: int


def usable(lines: Sequence[str]) -> list[str]:
    """The sentences of 30 to 110 characters that end with a full stop, each once, in their order."""
    stripped = (line.strip() for line in lines)
    return list(dict.fromkeys(line for line in stripped if SHORTEST <= len(line) <= LONGEST and line.endswith(".")))


def flatten(sentence: str) -> str:
    """The sentence in lower case, without punctuation."""
    return " ".join(re.sub(r"[^\w\s]", "", sentence).lower().split())


def prompt_of(sentence: str) -> str:
    """What the model is given."""
    return f"raw: {flatten(sentence)}\nfixed:"


def encode(tokenizer: PreTrainedTokenizerFast, sentences: Sequence[str]) -> list[Example]:
    """Tokens of each sentence; prompt and target are encoded apart, so that generation starts at a token's border."""
    prompts = tokenizer([prompt_of(sentence) for sentence in sentences])["input_ids"]
    targets = tokenizer([f" {sentence}" for sentence in sentences])["input_ids"]
    end = tokenizer.eos_token_id
    return [
        Example(sentence, [*prompt, *target, end], len(prompt))
        for sentence, prompt, target in zip(sentences, prompts, targets, strict=True)
    ]


def split(sentences: Sequence[str], count: int, seed: int) -> tuple[list[str], list[str]]:
    """`count` sentences to train on and 120 held out, drawn at random, disjoint.

    Raises:
        ValueError: not enough sentences.
    """
    if len(sentences) < count + HELD_OUT:
        raise ValueError(f"need {count + HELD_OUT} sentences, got {len(sentences)}: fewer steps, please")
    shuffled = random.Random(seed).sample(list(sentences), count + HELD_OUT)
    return shuffled[HELD_OUT:], shuffled[:HELD_OUT]


def batches(examples: Sequence[Example], size: int, seed: int | None = None) -> list[list[Example]]:
    """Batches of sentences of like length, so that little is padding.

    Without a seed the whole list is sorted; with one, only every `GROUP` batches among themselves, and those batches
    then come in random order: neighbours in length are not always the same.
    """
    chunk = len(examples) if seed is None else size * GROUP
    found: list[list[Example]] = []
    for start in range(0, len(examples), chunk):
        ordered = sorted(examples[start : start + chunk], key=lambda example: len(example.ids))
        groups = [ordered[at : at + size] for at in range(0, len(ordered), size)]
        if seed is not None:
            random.Random(seed + start).shuffle(groups)
        found += groups
    return found


def collate(batch: Sequence[Example], pad: int) -> tuple[Tensor, Tensor, Tensor]:
    """ids [batch, length], attention mask [batch, length], labels [batch, length]; padded on the right."""
    length = max(len(example.ids) for example in batch)
    ids = torch.full((len(batch), length), pad)
    mask = torch.zeros((len(batch), length), dtype=torch.int64)
    labels = torch.full((len(batch), length), IGNORE)
    for row, example in enumerate(batch):
        end = len(example.ids)
        ids[row, :end] = torch.tensor(example.ids)
        mask[row, :end] = 1
        labels[row, example.prompt : end] = ids[row, example.prompt : end]
    return ids, mask, labels


def target_logits(model: PreTrainedModel, batch: Sequence[Example], pad: int) -> tuple[Tensor, Tensor, Tensor]:
    """Logits [targets, vocabulary] of the target tokens alone, those tokens [targets], and each one's row [targets].

    The output head is a quarter of this small model's arithmetic; half the tokens are prompts and skip it.
    """
    ids, mask, labels = collate(batch, pad)
    hidden = model.model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
    wanted = labels[:, 1:] != IGNORE
    rows = wanted.nonzero()[:, 0]
    return model.lm_head(hidden[:, :-1][wanted]), labels[:, 1:][wanted], rows


@torch.no_grad()
def evaluate(model: PreTrainedModel, examples: Sequence[Example], pad: int, done: Callable[[], None]) -> Score:
    """Loss per token and exact match, both from one forward a sentence.

    Greedy decoding gives the target exactly when every target token, its end mark included, is the most likely one
    after those before it; that can be read off the teacher-forced logits, and no token need be generated.

    Args:
        model: a causal language model.
        examples: the held-out sentences.
        pad: the padding token.
        done: called after each batch.
    """
    model.eval()
    total, tokens, exact = 0.0, 0, 0
    for batch in batches(examples, EVAL_BATCH):
        logits, targets, rows = target_logits(model, batch, pad)
        total += torch.nn.functional.cross_entropy(logits, targets, reduction="sum").item()
        tokens += targets.numel()
        wrong = rows[logits.argmax(-1) != targets]
        exact += len(batch) - wrong.unique().numel()
        done()
    return Score(total / tokens, exact / len(examples))


@torch.no_grad()
def write(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, sentences: Sequence[str]) -> list[str]:
    """What the model makes of each sentence, decoded greedily; one line each."""
    model.eval()
    room = 4 + max(len(tokenizer(f" {sentence}")["input_ids"]) for sentence in sentences)
    tokenizer.padding_side = "left"
    inputs = tokenizer([prompt_of(sentence) for sentence in sentences], return_tensors="pt", padding=True)
    out = model.generate(**inputs, max_new_tokens=room, do_sample=False, pad_token_id=tokenizer.pad_token_id)
    texts = tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [" / ".join(part.strip() for part in text.splitlines() if part.strip()) for text in texts]


class Restoration(Task):
    """SmolLM2-135M on real sentences."""

    model_name = _smollm2.NAME
    title = "SmolLM2-135M learns to restore capitals and punctuation (QLoRA over NF4)"
    held_out = f"{HELD_OUT} held-out sentences"
    unit = "target token"
    exact = "sentences restored exactly"
    batch, rate, steps = BATCH, RATE, STEPS

    def __init__(self, steps: int, seed: int) -> None:
        """Read the sentences and split them.

        Raises:
            ValueError: not enough sentences for so many steps.
        """
        lines = _packages.text_file().read_text(encoding="utf-8").splitlines()
        self.text = f"{len(lines)} sentences"
        self._train, self._held_out = split(usable(lines), steps * BATCH, seed)
        self._seed = seed
        self.truths = self._held_out[:SAMPLES]
        self.raws = [flatten(truth) for truth in self.truths]

    def load(self) -> nn.Module:
        """The fp32 model; the first call also makes the tokens."""
        model, self.tokenizer = _smollm2.load()
        if not hasattr(self, "examples"):
            self.examples = encode(self.tokenizer, self._held_out)
            self.groups = batches(encode(self.tokenizer, self._train), BATCH, self._seed)
            self.rounds = len(batches(self.examples, EVAL_BATCH))
        return model

    @property
    def _pad(self) -> int:
        pad: int = self.tokenizer.pad_token_id
        return pad

    def outputs(self, model: Any, batch: Sequence[Example]) -> tuple[Tensor, Tensor]:
        """Logits and tokens of the targets alone."""
        return target_logits(model, batch, self._pad)[:2]

    def evaluate(self, model: Any, done: Callable[[], None]) -> Score:
        """See `evaluate` above."""
        return evaluate(model, self.examples, self._pad, done)

    def logits(self, model: nn.Module) -> Tensor:
        """Logits [batch, length, vocabulary] of the first held-out sentences."""
        ids = collate(self.examples[:BATCH], self._pad)[0]
        logits: Tensor = model(input_ids=ids, use_cache=False).logits
        return logits

    def write(self, model: Any) -> list[str]:
        """See `write` above."""
        return write(model, self.tokenizer, self.truths)

    def save(self, model: Any, folder: Path) -> None:
        """The model in bf16 with its tokenizer, as `from_pretrained` reads them."""
        model.to(torch.bfloat16).save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
