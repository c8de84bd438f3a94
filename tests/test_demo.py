"""The demo's parts on small made-up data: the GGUF reader, the task, the score, training."""

from __future__ import annotations

import struct

import pytest
import torch

from fastlora.cli import _gguf, _keep, _restore, _smollm2, main
from fastlora.cli.demo import adapt

transformers = pytest.importorskip("transformers")

SENTENCES = ["A lion in the wild, it's said, sleeps.", "Bees are found in Europe; not in Antarctica."]


def gguf_bytes(tensors: dict[str, tuple[list[int], int, bytes]], metadata: bytes = b"", keys: int = 0) -> bytes:
    """A GGUF file: tensors name -> (dimensions, type, data)."""
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), keys) + metadata
    data = b""
    for name, (shape, kind, raw) in tensors.items():
        head += struct.pack("<Q", len(name)) + name.encode() + struct.pack("<I", len(shape))
        head += struct.pack(f"<{len(shape)}Q", *reversed(shape)) + struct.pack("<IQ", kind, len(data))
        data += raw + bytes(-len(raw) % 32)
    return head + bytes(-len(head) % 32) + data


def text_key(key: str, value: str) -> bytes:
    return struct.pack("<Q", len(key)) + key.encode() + struct.pack("<IQ", 8, len(value)) + value.encode()


def test_gguf_reads_each_type(tmp_path):
    half = lambda value: struct.pack("<e", value)  # noqa: E731
    nibbles = bytes(low | (15 - low) << 4 for low in range(16))
    signed = struct.pack("<32b", *range(-16, 16))
    floats = struct.pack("<4f", 1, -2, 3.5, 0)
    path = tmp_path / "x.gguf"
    path.write_bytes(
        gguf_bytes(
            {
                "f32": ([2, 2], 0, floats),
                "f16": ([2], 1, half(0.5) + half(-1.5)),
                "q4_1": ([1, 32], 3, half(0.5) + half(-1.0) + nibbles),
                "q8_0": ([32], 8, half(0.25) + signed),
            },
            text_key("general.name", "tiny"),
            1,
        )
    )
    file = _gguf.read(path)
    assert file.metadata == {"general.name": "tiny"}
    assert file.tensors["f32"].tolist() == [[1, -2], [3.5, 0]]
    assert file.tensors["f16"].tolist() == [0.5, -1.5]
    codes = [*range(16), *range(15, -1, -1)]
    assert file.tensors["q4_1"].tolist() == [[0.5 * code - 1.0 for code in codes]]
    assert file.tensors["q8_0"].tolist() == [0.25 * value for value in range(-16, 16)]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"not a model at all", "not a GGUF file"),
        (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "version must be 2 or 3, got 1"),
        (gguf_bytes({"x": ([8], 0, bytes(32))})[:-20], "cut short"),
        (gguf_bytes({"x": ([8], 0, bytes(32))})[:30], "cut short"),
        (gguf_bytes({"x": ([8], 12, bytes(32))}), "type 12 is not supported"),
        (gguf_bytes({"x": ([31], 8, bytes(34))}), "no multiple"),
    ],
)
def test_gguf_refuses(tmp_path, content, said):
    path = tmp_path / "x.gguf"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=said):
        _gguf.read(path)


def test_task_takes_case_and_punctuation_away():
    assert _restore.flatten(SENTENCES[0]) == "a lion in the wild its said sleeps"
    lines = ["Short.", "  " + SENTENCES[0], SENTENCES[0], "No stop at the end of this sentence", "x" * 111 + "."]
    assert _restore.usable(lines) == [SENTENCES[0]]


def test_split_is_disjoint_and_seeded():
    sentences = [f"Sentence {index}." for index in range(200)]
    train, held_out = _restore.split(sentences, 80, seed=1)
    assert (len(train), len(held_out)) == (80, _restore.HELD_OUT)
    assert not set(train) & set(held_out)
    assert _restore.split(sentences, 80, seed=1) == (train, held_out)
    assert _restore.split(sentences, 80, seed=2) != (train, held_out)
    with pytest.raises(ValueError, match="need 201 sentences, got 200"):
        _restore.split(sentences, 81, seed=1)


def test_schedule_warms_up_and_decays_to_a_tenth():
    factors = [_restore.schedule(step, 40) for step in range(41)]
    assert factors[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert factors[5:] == sorted(factors[5:], reverse=True)
    assert factors[40] == pytest.approx(0.1)


def tiny_model(vocabulary: int = 64) -> torch.nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
        tie_word_embeddings=True,
    )
    return transformers.LlamaForCausalLM(config).eval()


def test_exact_match_is_what_generation_gives():
    """The score read off teacher-forced logits counts exactly the sentences greedy decoding reproduces."""
    model = tiny_model()
    examples = []
    for index in range(20):
        prompt = torch.randint(3, 64, (1, 4 + index % 5), generator=torch.Generator().manual_seed(index))
        out = model.generate(prompt, max_new_tokens=6, do_sample=False, eos_token_id=63, pad_token_id=2)[0].tolist()
        if index % 2:
            spoilt = prompt.shape[1] + index % 6
            out[min(spoilt, len(out) - 1)] = (out[min(spoilt, len(out) - 1)] + 1) % 64
        examples.append(_restore.Example("", out, prompt.shape[1]))
    rounds = []
    score = _restore.evaluate(model, examples, 2, lambda: rounds.append(1))
    assert score.exact == 0.5
    assert len(rounds) == 2
    truth = []
    for example in examples:
        labels = torch.tensor([[_restore.IGNORE] * example.prompt + example.ids[example.prompt :]])
        logits = model(torch.tensor([example.ids])).logits[0, :-1]
        truth.append(torch.nn.functional.cross_entropy(logits, labels[0, 1:], reduction="sum").item())
    count = sum(len(example.ids) - example.prompt for example in examples)
    assert score.loss == pytest.approx(sum(truth) / count, rel=1e-5)


def test_adapted_model_learns():
    model = tiny_model()
    assert adapt(model, seed=0) == 14
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all(".lora_" in name for name in trained)
    example = _restore.Example("", [5, 6, 7, 8, 9, 10, 2], 3)
    losses = list(_restore.train(model, [[example] * 4] * 12, 1e-2, 2))
    assert losses[-1] < 0.5 * losses[0]


def test_absent_packages_are_named(capsys, monkeypatch):
    monkeypatch.setattr(_smollm2.importlib.util, "find_spec", lambda name: None)
    assert main.run(["demo"]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "randfacts" in error
    assert "make demo" in error


def interrupted_run(folder):
    with _keep.whole_folder(folder) as scratch:
        (scratch / "half").write_text("x")
        raise KeyboardInterrupt


def test_kept_folder_appears_whole_or_not_at_all(tmp_path):
    folder = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        interrupted_run(folder)
    assert list(tmp_path.iterdir()) == []
    for text in ("first", "second"):
        with _keep.whole_folder(folder) as scratch:
            (scratch / _keep.REPORT).write_text(text)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (folder / _keep.REPORT).read_text() == "second"
    with pytest.raises(KeyboardInterrupt):
        interrupted_run(folder)
    assert (folder / _keep.REPORT).read_text() == "second"


def test_a_folder_of_something_else_is_refused(tmp_path, capsys):
    (tmp_path / "thesis.txt").write_text("years of work")
    assert main.run(["demo", "--output", str(tmp_path)]) == 1
    assert "no demo's" in capsys.readouterr().err
    assert main.run(["demo", "--output", str(tmp_path / "thesis.txt")]) == 1
    assert main.run(["demo", "--output", str(tmp_path / "a" / "b")]) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_what_is_kept_of_a_tiny_model(tmp_path):
    """Save, reload into a fresh model, merge, draw: the demo's own steps."""
    pytest.importorskip("matplotlib")
    model = tiny_model()
    adapt(model, seed=0)
    example = _restore.Example("", [5, 6, 7, 8, 9, 10, 2], 3)
    losses = list(_restore.train(model, [[example] * 2] * 5, 1e-2, 2))
    import fastlora

    fastlora.save_adapter(model, tmp_path / _keep.ADAPTER)
    fresh = tiny_model()
    adapt(fresh, seed=1)
    ids = torch.tensor([example.ids])
    assert _keep.largest_difference(model, fresh, ids) > 1e-3
    fastlora.load_adapter(fresh, tmp_path / _keep.ADAPTER)
    assert _keep.largest_difference(model, fresh, ids) == 0.0
    before = _restore.evaluate(model, [example], 2, lambda: None).loss
    merged = fastlora.merge_and_unload(model, dtype=torch.bfloat16).float()
    assert _restore.evaluate(merged, [example], 2, lambda: None).loss == pytest.approx(before, rel=0.05)
    assert _keep.draw_losses(tmp_path / _keep.PLOT, losses, 2.0, 1.0)
    assert (tmp_path / _keep.PLOT).read_bytes().startswith(b"\x89PNG")
    with pytest.raises(fastlora.FastloraError, match="not finite"):
        _keep.write_report(tmp_path / "x.json", {"loss": float("nan")})
