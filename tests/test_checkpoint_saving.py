"""save_adapter over what is there and into what cannot be written: whole or not at all."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import pytest
import safetensors
import safetensors.torch
import torch
from torch import nn

import fastlora
from fastlora import ConfigError, LoraLinear
from tests import checkpoint_tools
from tests.checkpoint_tools import CASES, CONFIG, WEIGHTS, converted, peft_loads, peft_saves
from tests.model_tools import close, contents, llama, logits, move

base_logits = checkpoint_tools.base_logits


def two_adapters():
    """The same model with an adapter, and with a larger one of another kind."""
    return move(converted(**CASES["lora"])), move(converted(r=7, use_dora=True), seed=5)


def test_saving_over_an_adapter_replaces_it(tmp_path, base_logits):
    old, new = two_adapters()
    fastlora.save_adapter(old, tmp_path)
    (tmp_path / "README.md").write_text("mine")
    fastlora.save_adapter(new, tmp_path)
    assert sorted(contents(tmp_path)) == ["README.md", CONFIG, WEIGHTS]
    close(logits(peft_loads(tmp_path)), logits(new), base_logits)
    assert (tmp_path / "README.md").read_text() == "mine"


def test_saving_over_pefts_adapter_replaces_it(tmp_path, base_logits):
    peft_saves(CASES["lora"], tmp_path)
    _, new = two_adapters()
    fastlora.save_adapter(new, tmp_path)
    close(logits(peft_loads(tmp_path)), logits(new), base_logits)


def test_a_loaded_adapter_saves_over_its_own_file(tmp_path, base_logits):
    """The tensors must not depend on the file they came from."""
    old, _ = two_adapters()
    fastlora.save_adapter(old, tmp_path)
    model = fastlora.load_adapter(llama(), tmp_path)
    before = contents(tmp_path)
    fastlora.save_adapter(model, tmp_path)
    fastlora.save_adapter(model, tmp_path)
    assert contents(tmp_path).keys() == before.keys()
    close(logits(peft_loads(tmp_path)), logits(old), base_logits)


class Boom(OSError):
    pass


def _raise_on(call_number, real):
    calls = []

    def fake(*args, **kwargs):
        calls.append(args)
        if len(calls) == call_number:
            raise Boom("disk on fire")
        return real(*args, **kwargs)

    return fake


def _half_file(*args, **kwargs):
    path = args[1] if len(args) > 1 else kwargs["filename"]
    with open(path, "wb") as file:
        file.write(b"\x10\0\0\0\0\0\0\0{half")
    raise Boom("disk on fire")


FAILURES = {
    "save_file": lambda patch: patch.setattr(safetensors.torch, "save_file", _half_file),
    "first replace": lambda patch: patch.setattr(os, "replace", _raise_on(1, os.replace)),
    "second replace": lambda patch: patch.setattr(os, "replace", _raise_on(2, os.replace)),
    "config": lambda patch: patch.setattr("pathlib.Path.write_text", _raise_on(1, None)),
}


@pytest.mark.parametrize("failure", FAILURES.values(), ids=FAILURES)
@pytest.mark.parametrize("name", ["default", "other"])
def test_a_failed_save_leaves_the_old_adapter_and_no_litter(failure, name, tmp_path, monkeypatch):
    old = move(converted(adapter_name=name, **CASES["lora"]))
    new = move(converted(adapter_name=name, r=7, use_dora=True), seed=5)
    fastlora.save_adapter(old, tmp_path, name)
    before = contents(tmp_path)
    with monkeypatch.context() as patch:
        failure(patch)
        with pytest.raises(Boom):
            fastlora.save_adapter(new, tmp_path, name)
    assert contents(tmp_path) == before
    assert sorted(p.name for p in tmp_path.rglob("*") if p.is_dir()) == ([] if name == "default" else [name])
    fastlora.load_adapter(llama(), tmp_path, name)
    fastlora.save_adapter(new, tmp_path, name)
    peft_loads(tmp_path if name == "default" else tmp_path / name)


@pytest.mark.parametrize("failure", FAILURES.values(), ids=FAILURES)
def test_a_failed_first_save_leaves_nothing(failure, tmp_path, monkeypatch):
    model = converted(**CASES["lora"])
    with monkeypatch.context() as patch:
        failure(patch)
        with pytest.raises(Boom):
            fastlora.save_adapter(model, tmp_path / "new")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("when", ["save_file", "second replace"])
def test_an_interrupted_save_is_as_harmless(when, tmp_path, monkeypatch):
    """Ctrl-C is not an Exception."""
    old, new = two_adapters()
    fastlora.save_adapter(old, tmp_path)
    before = contents(tmp_path)
    real, calls = os.replace, []

    def interrupted(*args, **kwargs):
        calls.append(args)
        if when == "save_file" or len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    target = safetensors.torch if when == "save_file" else os
    with monkeypatch.context() as patch:
        patch.setattr(target, when if when == "save_file" else "replace", interrupted)
        with pytest.raises(KeyboardInterrupt):
            fastlora.save_adapter(new, tmp_path)
    assert contents(tmp_path) == before
    assert [p for p in tmp_path.rglob("*") if p.is_dir()] == []


def test_a_killed_save_leaves_the_old_adapter(tmp_path):
    """The process dies with half of the new file on disk; the next save works as ever."""
    script = """
        import os, sys, safetensors.torch, fastlora
        from torch import nn
        def die(state, path, **_):
            open(path, "wb").write(b"half")
            os._exit(9)
        safetensors.torch.save_file = die
        fastlora.save_adapter(nn.ModuleDict({"lin": fastlora.LoraLinear(8, 8, r=3)}), sys.argv[1])
    """
    model = nn.ModuleDict({"lin": LoraLinear(8, 8, r=2, init_lora_weights=False)})
    fastlora.save_adapter(model, tmp_path)
    before = contents(tmp_path)
    assert _process(script, tmp_path).returncode == 9
    after = contents(tmp_path)
    assert {key: after[key] for key in before} == before
    fresh = fastlora.load_adapter(nn.ModuleDict({"lin": nn.Linear(8, 8)}), tmp_path)
    assert torch.equal(fresh["lin"].lora_B["default"], model["lin"].lora_B["default"])
    fastlora.save_adapter(fresh, tmp_path)


def _process(script, *args):
    """A fresh Python runs the script."""
    command = [sys.executable, "-c", textwrap.dedent(script), *map(str, args)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run(command, env=environment, capture_output=True, timeout=120, check=False, text=True)


FOREIGN_CONFIGS = {
    "another tool's": '{"model_type": "llama"}',
    "a list": '["peft_type"]',
    "a string": '"peft_type"',
    "not JSON": "{half",
    "empty": "",
    "not text": b"\xff\xfe\x00peft_type",
}


@pytest.mark.parametrize("text", FOREIGN_CONFIGS.values(), ids=FOREIGN_CONFIGS)
@pytest.mark.parametrize("with_weights", [True, False])
def test_files_that_are_no_adapters_are_refused_and_stay(text, with_weights, tmp_path):
    (tmp_path / CONFIG).write_bytes(text if isinstance(text, bytes) else text.encode())
    if with_weights:
        (tmp_path / WEIGHTS).write_bytes(b"precious")
    before = contents(tmp_path)
    with pytest.raises(FileExistsError, match=CONFIG):
        fastlora.save_adapter(converted(r=2), tmp_path)
    assert contents(tmp_path) == before
    assert len(list(tmp_path.iterdir())) == len(before)


def test_weights_without_a_config_are_refused_and_stay(tmp_path):
    (tmp_path / "other").mkdir()
    for path, name in ((tmp_path / WEIGHTS, "default"), (tmp_path / "other" / WEIGHTS, "other")):
        path.write_bytes(b"precious")
        before = contents(tmp_path)
        with pytest.raises(FileExistsError, match=WEIGHTS):
            fastlora.save_adapter(converted(r=2, adapter_name=name), tmp_path, name)
        assert contents(tmp_path) == before


def test_folders_of_those_names_are_refused_and_stay(tmp_path):
    for name in (CONFIG, WEIGHTS):
        folder = tmp_path / name[:9] / name
        folder.mkdir(parents=True)
        (folder / "precious").write_text("yes")
        with pytest.raises(OSError, match=name):
            fastlora.save_adapter(converted(r=2), folder.parent)
        assert sorted(contents(folder.parent)) == [f"{name}/precious"]
    old, new = two_adapters()
    fastlora.save_adapter(old, tmp_path / "ours")
    (tmp_path / "ours" / WEIGHTS).unlink()
    (tmp_path / "ours" / WEIGHTS).mkdir()
    before = contents(tmp_path / "ours")
    with pytest.raises(OSError, match=WEIGHTS):
        fastlora.save_adapter(new, tmp_path / "ours")
    assert contents(tmp_path / "ours") == before


@pytest.mark.parametrize("below", ["", "sub", "sub/deeper"])
@pytest.mark.parametrize("name", ["default", "other"])
def test_a_file_in_place_of_the_folder(below, name, tmp_path):
    file = tmp_path / "file"
    file.write_text("precious")
    with pytest.raises(OSError, match="file"):
        fastlora.save_adapter(converted(r=2, adapter_name=name), file / below, name)
    assert contents(tmp_path) == {"file": b"precious"}


def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    """As root permissions do not bind, so the refusal is played."""

    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied", str(tmp_path))

    old, new = two_adapters()
    fastlora.save_adapter(old, tmp_path)
    before = contents(tmp_path)
    for target in ("tempfile.mkdtemp", "os.mkdir"):
        with monkeypatch.context() as patch:
            patch.setattr(target, refuse)
            with pytest.raises(PermissionError):
                fastlora.save_adapter(new, tmp_path)
    assert contents(tmp_path) == before
    with monkeypatch.context() as patch:
        patch.setattr("os.mkdir", refuse)
        with pytest.raises(PermissionError):
            fastlora.save_adapter(new, tmp_path / "sub")
    assert contents(tmp_path) == before


def test_a_full_disk_is_an_os_error(tmp_path):
    """A real one: the process may write only 4 kB to a file."""
    script = """
        import resource, signal, sys, fastlora
        from torch import nn
        model = nn.ModuleDict({"lin": fastlora.LoraLinear(512, 512, r=8)})
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        try:
            fastlora.save_adapter(model, sys.argv[1])
        except OSError:
            sys.exit(7)
    """
    done = _process(script, tmp_path / "new")
    assert done.returncode == 7, done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["nobody", "", "a.b"])
def test_saving_an_adapter_nobody_has(name, tmp_path):
    with pytest.raises(ConfigError, match="default"):
        fastlora.save_adapter(converted(r=2), tmp_path / "x", name)
    with pytest.raises(ConfigError, match="none"):
        fastlora.save_adapter(llama(), tmp_path / "x", name)
    assert not (tmp_path / "x").exists()
