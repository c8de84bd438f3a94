"""Interrupted half-way, by whatever: the earlier result is as it was, and nothing is left beside it."""

from __future__ import annotations

import errno
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fastlora.cli import main
from fastlora.nn import shards
from tests.folder_tools import adapter_folder, model_folder, names
from tests.model_tools import contents

ROOT = Path(__file__).resolve().parent.parent
# The command, slowed down at every tensor it writes, so that there is a half-way.
SLOW = """
import signal, sys, time
# A process in the background ignores them.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
from fastlora.nn import shards
write = shards.Shard.write
def slowly(*arguments):
    write(*arguments)
    print("written", flush=True)
    time.sleep(0.2)
shards.Shard.write = slowly
from fastlora.cli.main import main
main()
"""
COMMANDS = {
    "quantize": ["quantize", "model", "out", "--overwrite"],
    "merge": ["merge", "model", "adapter", "out", "--overwrite"],
}


@pytest.fixture
def place(tmp_path):
    model_folder(tmp_path / "model", beside=False)
    adapter_folder(tmp_path / "adapter")
    model_folder(tmp_path / "out", None, beside=False, seed=7)
    return tmp_path


def stopped(place: Path, arguments: list[str], number: int) -> tuple[int, str]:
    """Start the command, send the signal in the middle of its work; exit code and stderr."""
    command = [sys.executable, "-c", SLOW, *arguments]
    process = subprocess.Popen(
        command, cwd=place, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={"PYTHONPATH": str(ROOT)}
    )
    try:
        assert process.stdout is not None
        for _ in range(3):
            line = process.stdout.readline()
            assert line == "written\n", process.communicate()[1]
        assert any(path.name.startswith(".out-") for path in place.iterdir())  # half of it is there
        process.send_signal(number)
        error = process.communicate(timeout=60)[1]
    finally:
        process.kill()
    return process.returncode, error


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="another kind of system")
@pytest.mark.parametrize("arguments", COMMANDS.values(), ids=COMMANDS)
@pytest.mark.parametrize(
    ("name", "code", "said"),
    [("SIGINT", 130, "interrupted"), ("SIGTERM", 143, "terminated"), ("SIGHUP", 129, "terminated")],
)
def test_a_signal_leaves_the_old_folder(place, arguments, name, code, said):
    before = names(place), contents(place)
    assert stopped(place, arguments, getattr(signal, name)) == (code, f"fastlora: {said}\n")
    assert (names(place), contents(place)) == before


@pytest.mark.parametrize("arguments", COMMANDS.values(), ids=COMMANDS)
def test_a_disk_that_fills_up_leaves_the_old_folder(place, arguments, monkeypatch, capsys):
    monkeypatch.chdir(place)
    write, count = shards.Shard.write, []

    def filling(*rest):
        count.append(rest)
        if len(count) > 5:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(*rest)

    monkeypatch.setattr(shards.Shard, "write", filling)
    before = names(place), contents(place)
    assert main.run(arguments) == 1
    assert capsys.readouterr().err == "fastlora: [Errno 28] No space left on device\n"
    assert len(count) > 5
    assert (names(place), contents(place)) == before


@pytest.mark.parametrize("arguments", COMMANDS.values(), ids=COMMANDS)
def test_the_very_last_step_too(place, arguments, monkeypatch, capsys):
    """Between the two renames the process is asked to end: the new folder still comes, whole, and then it ends."""
    from fastlora.nn import output

    monkeypatch.chdir(place)
    replace = output.os.replace

    def interrupted(source, target):
        replace(source, target)
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(output.os, "replace", interrupted)
    usual = signal.getsignal(signal.SIGTERM)
    assert main.run(arguments) == 143
    assert capsys.readouterr().err == "fastlora: terminated\n"
    assert signal.getsignal(signal.SIGTERM) == usual
    assert sorted(path.name for path in place.iterdir()) == ["adapter", "model", "out"]
    model = {path.name for path in (place / "model").glob("*.safetensors")}
    assert {path.name for path in (place / "out").glob("*.safetensors")} == model
    monkeypatch.undo()


def test_signals_are_left_alone_outside_the_main_thread(place, monkeypatch):
    import threading

    monkeypatch.chdir(place)
    codes = []
    thread = threading.Thread(target=lambda: codes.append(main.run(COMMANDS["merge"])))
    began = time.monotonic()
    thread.start()
    thread.join(60)
    assert codes == [0], time.monotonic() - began
