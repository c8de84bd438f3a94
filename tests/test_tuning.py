"""The measured cache: never unasked, once a key, shared by processes, and unharmed by a broken file."""

from __future__ import annotations

import json
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch

from fastlora import settings
from fastlora.dispatch import registry, tuning
from fastlora.dispatch.registry import Kernel, Limits
from fastlora.dispatch.tuning import TuneKey, Tuner, bucket, source_hash
from fastlora.errors import UnsupportedError
from fastlora.functional import lora_linear
from fastlora.problem import BIAS, DENSE, Format, Problem

KEY = TuneKey("5c2a", "3.9.0", "NVIDIA H200", "lora_fwd bf16 nf4/64", (8192, 4096, 4096, 16))


@pytest.fixture
def path(tmp_path):
    return tmp_path / "deep" / "tuning.json"


@pytest.fixture
def tuning_on():
    with settings.override(tune=True):
        yield


class Measure:
    """Pretended seconds of candidates; notes what was asked."""

    def __init__(self, **seconds: float) -> None:
        self.seconds, self.asked = seconds, []

    def __call__(self, candidate: str) -> float:
        self.asked.append(candidate)
        return self.seconds[candidate]


def test_nothing_is_measured_or_written_unless_asked(path):
    measure = Measure(merge=2.0, split=1.0)
    assert not settings.Settings().tune
    assert Tuner(path).choose(KEY, ["merge", "split"], measure) == "merge"
    assert Tuner(path).choose(KEY, ["merge", "split"], measure, default="split") == "split"
    assert measure.asked == [] and not path.parent.exists()


@pytest.mark.usefixtures("tuning_on")
def test_the_fastest_is_measured_once_and_remembered(path):
    measure = Measure(merge=2.0, split=1.0, dense=3.0)
    tuner = Tuner(path)
    for _ in range(3):
        assert tuner.choose(KEY, ["merge", "split", "dense"], measure) == "split"
    assert measure.asked == ["merge", "split", "dense"]
    # Another process, another order.
    assert Tuner(path).choose(KEY, ["dense", "split"], measure) == "split"
    assert len(measure.asked) == 3


@pytest.mark.usefixtures("tuning_on")
@pytest.mark.parametrize("field", TuneKey._fields)
def test_any_part_of_the_key_measures_anew(path, field):
    tuner = Tuner(path)
    assert tuner.choose(KEY, ["merge", "split"], Measure(merge=2.0, split=1.0)) == "split"
    other = KEY._replace(**{field: (1, 2) if field == "shape" else "other"})
    assert tuner.choose(other, ["merge", "split"], Measure(merge=1.0, split=2.0)) == "merge"
    assert tuner.choose(KEY, ["merge", "split"], Measure()) == "split"


@pytest.mark.usefixtures("tuning_on")
def test_a_remembered_plan_that_is_gone_is_measured_anew(path):
    Tuner(path).choose(KEY, ["merge", "split"], Measure(merge=1.0, split=2.0))
    assert Tuner(path).choose(KEY, ["dense", "split"], Measure(dense=3.0, split=2.0)) == "split"


@pytest.mark.usefixtures("tuning_on")
def test_a_candidate_that_cannot_run_is_not_chosen_and_failure_of_all_is_not_remembered(path):
    never = float("inf")
    assert Tuner(path).choose(KEY, ["merge", "split"], Measure(merge=never, split=9.0)) == "split"
    other = KEY._replace(device="other")
    assert Tuner(path).choose(other, ["merge", "split"], Measure(merge=never, split=never), default="split") == "split"
    assert list(json.loads(path.read_text())["choices"]) == [str(KEY)]
    assert json.loads(path.read_text())["choices"][str(KEY)] == {"choice": "split", "seconds": {"split": 9.0}}


@pytest.mark.usefixtures("tuning_on")
def test_no_candidates_is_an_error(path):
    with pytest.raises(ValueError, match="candidates must not be empty"):
        Tuner(path).choose(KEY, [], Measure())


BROKEN = {
    "empty": "",
    "half": '{"schema": 1, "choices": {"a": {"cho',
    "list": "[1, 2]",
    "null": '{"schema": 1, "choices": null}',
    "bytes": b"\xff\xfe\x00\x80",
}


@pytest.mark.usefixtures("tuning_on")
@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN)
def test_a_broken_file_is_ignored_with_one_warning_and_rewritten(path, content):
    path.parent.mkdir()
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    tuner, measure = Tuner(path), Measure(merge=2.0, split=1.0)
    with pytest.warns(UserWarning, match="is ignored and will be written anew"):
        tuner.choose(KEY, ["merge", "split"], measure)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tuner.choose(KEY._replace(device="other"), ["merge", "split"], measure) == "split"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert Tuner(path).choose(KEY, ["merge", "split"], Measure()) == "split"
    assert len(json.loads(path.read_text())["choices"]) == 2


@pytest.mark.usefixtures("tuning_on")
def test_single_broken_entries_and_other_schemas_are_dropped(path):
    path.parent.mkdir()
    good = {"choice": "split", "seconds": {}}
    path.write_text(json.dumps({"schema": 1, "choices": {"a": 3, "b": {"choice": 4}, str(KEY): good}}))
    assert Tuner(path).choose(KEY, ["merge", "split"], Measure()) == "split"
    path.write_text(json.dumps({"schema": 99, "choices": {str(KEY): good}}))
    assert Tuner(path).choose(KEY, ["merge", "split"], Measure(merge=1.0, split=2.0)) == "merge"


@pytest.mark.usefixtures("tuning_on")
def test_a_file_that_cannot_be_written_costs_a_warning_not_the_choice(tmp_path):
    (tmp_path / "file").write_text("")
    tuner = Tuner(tmp_path / "file" / "tuning.json")
    with pytest.warns(UserWarning, match="is ignored"):
        tuner.choose(KEY, ["merge", "split"], Measure(merge=2.0, split=1.0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tuner.choose(KEY, ["merge", "split"], Measure()) == "split"


@pytest.mark.usefixtures("tuning_on")
def test_nothing_else_is_left_in_the_folder(path):
    Tuner(path).choose(KEY, ["merge", "split"], Measure(merge=2.0, split=1.0))
    assert {file.name for file in path.parent.iterdir()} == {"tuning.json", "tuning.lock"}


def test_the_path_is_the_settings():
    with settings.override(tune_cache="/somewhere/else.json"):
        assert Tuner().path == Path("/somewhere/else.json")
    assert tuning.default_path().parts[-2:] == ("fastlora", "tuning.json")
    assert tuning.default_path().is_relative_to(Path.home())


_WRITER = """
import sys
from pathlib import Path
from fastlora import settings
from fastlora.dispatch.tuning import TuneKey, Tuner
with settings.override(tune=True):
    tuner = Tuner(Path(sys.argv[1]))
    print("ready", flush=True)
    sys.stdin.readline()
    for index in range(40):
        key = TuneKey("s", "t", sys.argv[2], str(index), (1,))
        tuner.choose(key, ["slow", "fast"], {"slow": 2.0, "fast": 1.0}.__getitem__)
"""


@pytest.mark.usefixtures("tuning_on")
def test_two_processes_lose_nothing_of_each_other(path):
    path.parent.mkdir()
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", _WRITER, str(path), name], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for name in ("first", "second")
    ]
    for writer in writers:
        assert writer.stdout.readline() == "ready\n"  # both have read the absent file by their first choice
    for writer in writers:
        writer.stdin.write("go\n")
        writer.stdin.flush()
    for writer in writers:
        writer.communicate(timeout=60)
        assert writer.returncode == 0
    choices = json.loads(path.read_text())["choices"]
    assert len(choices) == 80 and {entry["choice"] for entry in choices.values()} == {"fast"}


@pytest.mark.usefixtures("tuning_on")
def test_what_others_wrote_is_seen_after_a_write_of_ones_own(path):
    first, second = Tuner(path), Tuner(path)
    other = KEY._replace(device="other")
    first.choose(KEY, ["merge", "split"], Measure(merge=2.0, split=1.0))
    second.choose(other, ["merge", "split"], Measure(merge=1.0, split=2.0))
    assert second.choose(KEY, ["merge", "split"], Measure()) == "split"
    third = KEY._replace(device="third")
    first.choose(third, ["merge", "split"], Measure(merge=1.0, split=2.0))
    assert first.choose(other, ["merge", "split"], Measure()) == "merge"


def test_buckets_round_tokens_only():
    assert [bucket(m)[0] for m in (0, 1, 2, 3, 4, 5, 1000, 1024, 1025)] == [0, 1, 2, 4, 4, 8, 1024, 1024, 2048]
    assert bucket(100, 11008, 4096, 3) == (128, 11008, 4096, 3)


def test_the_source_hash_sees_every_file(tmp_path):
    (tmp_path / "a.py").write_text("x = 1")
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "b.py").write_text("y = 1")
    (tmp_path / "notes.txt").write_text("no source")
    before = source_hash(tmp_path)
    (tmp_path / "notes.txt").write_text("still none")
    assert source_hash(tmp_path) == before
    (tmp_path / "deep" / "b.py").write_text("y = 2")
    changed = source_hash(tmp_path)
    assert changed != before
    (tmp_path / "deep" / "b.py").rename(tmp_path / "deep" / "c.py")
    assert source_hash(tmp_path) not in (before, changed)
    assert source_hash(tmp_path / "a.py") == source_hash(tmp_path / "a.py") != source_hash(tmp_path)


# --- the registry's choice --------------------------------------------------------------------------------------------

PROBLEM = Problem("lora_fwd", 64, 32, 48, 8, torch.float32, torch.float32, DENSE, BIAS, "cpu")


@pytest.fixture
def scratch(monkeypatch, path):
    """A registry and a cache of its own."""
    monkeypatch.setattr(registry, "_kernels", {})
    monkeypatch.setattr(registry, "_selected", {})
    monkeypatch.setattr(tuning, "tuner", Tuner(path))
    monkeypatch.setattr(tuning, "_ROUND", 0.0)


def kernel(backend: str, predicted: float, takes: float, *, fails: Exception | None = None) -> list:
    """Registers a kernel that sleeps; returns the list of the arguments it was run with."""
    runs: list = []

    def run(problem, *args):
        runs.append(args)
        if fails is not None:
            raise fails
        time.sleep(takes)

    registry.register(Kernel("lora_fwd", backend, run, Limits(), lambda problem: predicted))
    return runs


@pytest.mark.usefixtures("scratch", "tuning_on")
def test_select_measures_once_and_remembers_across_processes(monkeypatch, path):
    predicted, faster = kernel("predicted", 1.0, 0.02), kernel("faster", 1.5, 0.0)
    for _ in range(3):
        assert registry.select(PROBLEM, "", (1, "two")).backend == "faster"
    measured = len(predicted), len(faster)
    assert measured == (7, 7) and set(predicted + faster) == {(1, "two")}
    assert registry.select(PROBLEM._replace(m=60), "", ()).backend == "faster"  # the same power of two
    monkeypatch.setattr(registry, "_selected", {})
    monkeypatch.setattr(tuning, "tuner", Tuner(path))
    assert registry.select(PROBLEM, "", ()).backend == "faster"
    assert (len(predicted), len(faster)) == measured
    registry.select(PROBLEM._replace(m=65), "", ())
    assert len(faster) > measured[1]


@pytest.mark.usefixtures("scratch")
def test_select_predicts_where_tuning_is_off(path):
    predicted, faster = kernel("predicted", 1.0, 0.02), kernel("faster", 1.5, 0.0)
    assert registry.select(PROBLEM, "", ()).backend == "predicted"
    assert not predicted and not faster and not path.exists()


@pytest.mark.usefixtures("scratch", "tuning_on")
def test_nothing_is_measured_without_arguments_or_inside_a_capture(monkeypatch):
    predicted, faster = kernel("predicted", 1.0, 0.02), kernel("faster", 1.5, 0.0)
    assert registry.select(PROBLEM).backend == "predicted"
    monkeypatch.setattr(registry, "capturing", lambda kind: True)
    assert registry.select(PROBLEM, "", ()).backend == "predicted"
    monkeypatch.undo()
    assert not predicted and not faster


@pytest.mark.usefixtures("scratch", "tuning_on")
def test_a_prediction_is_not_kept_where_a_measurement_may_follow():
    kernel("predicted", 1.0, 0.02)
    kernel("faster", 1.5, 0.0)
    assert registry.select(PROBLEM).backend == "predicted"
    assert registry.select(PROBLEM, "", ()).backend == "faster"


@pytest.mark.usefixtures("scratch", "tuning_on")
def test_a_forced_backend_is_measured_among_its_own_plans_only():
    outside = kernel("faster", 1.0, 0.0)
    inside = kernel("forced", 1.0, 0.0)
    assert registry.select(PROBLEM, "forced", ()).backend == "forced"
    assert not outside and not inside  # one candidate: nothing to measure


@pytest.mark.usefixtures("scratch", "tuning_on")
@pytest.mark.parametrize("error", [torch.OutOfMemoryError("full"), UnsupportedError("too large"), MemoryError()])
def test_a_kernel_without_room_is_not_chosen(error):
    kernel("predicted", 1.0, 0.0, fails=error)
    kernel("slower", 1.5, 0.001)
    assert registry.select(PROBLEM, "", ()).backend == "slower"


@pytest.mark.usefixtures("scratch", "tuning_on")
def test_where_nothing_has_room_the_prediction_stands_and_is_not_written(path):
    kernel("predicted", 1.0, 0.0, fails=MemoryError())
    kernel("other", 1.5, 0.0, fails=MemoryError())
    assert registry.select(PROBLEM, "", ()).backend == "predicted"
    assert not path.exists()


@pytest.mark.usefixtures("scratch", "tuning_on")
def test_a_mistake_in_a_kernel_is_raised():
    kernel("predicted", 1.0, 0.0, fails=AssertionError("wrong"))
    kernel("other", 1.5, 0.0)
    with pytest.raises(AssertionError, match="wrong"):
        registry.select(PROBLEM, "", ())


@pytest.mark.usefixtures("scratch", "tuning_on")
def test_a_hopeless_kernel_is_not_measured():
    kernel("predicted", 1.0, 0.001)
    hopeless = kernel("hopeless", 4.1, 0.0)
    kernel("near", 3.9, 0.0)
    assert registry.select(PROBLEM, "", ()).backend == "near"
    assert not hopeless


@pytest.mark.usefixtures("tuning_on")
def test_the_ops_tune_on_their_own_arguments(monkeypatch, path):
    monkeypatch.setattr(registry, "_selected", {})
    monkeypatch.setattr(registry, "_HOPELESS", float("inf"))  # whatever is predicted on this machine
    monkeypatch.setattr(tuning, "tuner", Tuner(path))
    monkeypatch.setattr(tuning, "_ROUND", 0.0)
    x, w, a, b = torch.randn(5, 48), torch.randn(32, 48), torch.randn(4, 48), torch.randn(32, 4)
    a.requires_grad_()
    y = lora_linear(x, w, a, b, 2.0)
    y.sum().backward()
    written = json.loads(path.read_text())["choices"]
    for op in ("lora_fwd", "lora_bwd"):
        (entry,) = [entry for name, entry in written.items() if f"|{op} float32 float32 dense" in name]
        assert "reference:torch" in entry["seconds"] and entry["choice"] in entry["seconds"]
    torch.testing.assert_close(y, x @ w.T + 2 * (x @ a.T) @ b.T, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(a.grad, 2 * (torch.ones(5, 32) @ b).T @ x, rtol=1e-4, atol=1e-4)


def test_the_key_tells_problems_apart():
    key = tuning.key_of(PROBLEM)
    assert key.shape == (64, 32, 48, 8) and key == tuning.key_of(PROBLEM._replace(m=33))
    others = [{"op": "lora_bwd"}, {"n": 33}, {"k": 49}, {"r": 9}, {"m": 65}, {"dtype": torch.bfloat16}, {"flags": 0}]
    others += [{"adapter_dtype": torch.bfloat16}, {"format": Format("nf4", 64)}]
    found = {str(tuning.key_of(PROBLEM._replace(**other))) for other in others} | {str(key)}
    assert len(found) == len(others) + 1
    with settings.override(cpu_tier="scalar"):
        assert tuning.key_of(PROBLEM) != key
