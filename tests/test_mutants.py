"""The kernels' tests notice mistakes: the list fits the sources, the engine tells killed from survived, and every day
five other mutants are tried (`make mutants` tries all)."""

from __future__ import annotations

import dataclasses
import json

import pytest

pytest.importorskip("triton")

from benchmarks import mutants
from benchmarks.mutant_list import MUTANTS
from benchmarks.mutants import BadMutant, Mutant, Outcome, apply

SOURCE = "def f(a, b):\n    c = a + b  # sum\n    return c + 1\n"
GOOD = Mutant("kernel.py", "a + b", "a - b", ("test_kernel.py",))


def test_the_list_fits_the_sources():
    problems = []
    for mutant in MUTANTS:
        try:
            apply((mutants.ROOT / mutants.KERNELS / mutant.file).read_text(), mutant)
        except BadMutant as error:
            problems.append(str(error))
    assert problems == []


def test_the_list_is_large_and_covers_every_kernel_file():
    assert len(MUTANTS) >= 40
    assert len({(mutant.file, mutant.old, mutant.new) for mutant in MUTANTS}) == len(MUTANTS)
    files = {
        path.name
        for path in (mutants.ROOT / mutants.KERNELS).glob("*.py")
        if "@triton.jit" in path.read_text()  # what holds kernels
    }
    assert files <= {mutant.file for mutant in MUTANTS}


def test_the_named_tests_exist():
    for mutant in MUTANTS:
        assert (mutants.ROOT / "tests/triton" / mutant.tests[0]).exists(), mutant


def test_a_mutant_changes_its_line():
    changed, line = apply(SOURCE, GOOD)
    assert line == 2 and changed == SOURCE.replace("a + b", "a - b")


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("a * b", "a - b", "occurs 0 times"),
        ("c", "d", "occurs 2 times"),
        ("c = a + b  # sum\n    return c + 1", "c = a - b\n    return c", "changes 2 lines"),
        ("    c = a + b  # sum\n", "", "changes the number of lines"),
        ("a + b", "a + b", "changes 0 lines"),
        ("# sum", "# difference", "changes only layout or a comment"),
        ("a + b", "a +", "is no Python"),
    ],
)
def test_a_mutant_that_does_not_fit_is_an_error(old, new, words):
    with pytest.raises(BadMutant, match=words):
        apply(SOURCE, dataclasses.replace(GOOD, old=old, new=new))


@pytest.fixture
def project(tmp_path):
    """A package with one kernel file, a test that sees the sum and one that does not."""
    kernels = tmp_path / mutants.KERNELS
    kernels.mkdir(parents=True)
    for folder in (tmp_path / "fastlora", tmp_path / "fastlora/backends", kernels):
        (folder / "__init__.py").write_text("")
    (kernels / "kernel.py").write_text(SOURCE)
    tests = tmp_path / "tests/triton"
    tests.mkdir(parents=True)
    head = "import os, time\nfrom fastlora.backends.triton.kernel import f\n\n"
    (tests / "test_kernel.py").write_text(f"{head}def test_sum():\n    assert f(2, 3) == 6\n")
    (tests / "test_blind.py").write_text(f"{head}def test_sum():\n    assert f(2, 0) == 3\n")
    (tests / "test_slow.py").write_text(f"{head}def test_end():\n    time.sleep(30 * (f(2, 3) != 6))\n")
    (tests / "test_mode.py").write_text(f"{head}def test_mode():\n    assert os.environ['TRITON_INTERPRET'] == '1'\n")
    return tmp_path


def test_killed_and_survived_are_told_apart(project):
    outcome, line = mutants.try_mutant(GOOD, project)
    assert (outcome.status, outcome.killed_by, line) == ("killed", "test_kernel.py::test_sum", 2)
    outcome, _ = mutants.try_mutant(dataclasses.replace(GOOD, tests=("test_blind.py",)), project)
    assert outcome.status == "survived"
    outcome, _ = mutants.try_mutant(dataclasses.replace(GOOD, tests=("test_mode.py",)), project)
    assert outcome.status == "survived"  # that is, the interpreter was asked for
    assert (project / mutants.KERNELS / "kernel.py").read_text() == SOURCE  # the original stays as it was


def test_what_runs_no_test_is_neither(project):
    outcome, _ = mutants.try_mutant(dataclasses.replace(GOOD, tests=("test_absent.py",)), project)
    assert outcome.status == "invalid"
    broken = Mutant("kernel.py", "def f(a, b):", "def g(a, b):", ("test_kernel.py",))
    outcome, _ = mutants.try_mutant(broken, project)
    assert outcome.status == "invalid"  # nothing was judged: the file cannot be imported


def test_a_mutant_that_does_not_end_is_stopped(project):
    outcome, _ = mutants.try_mutant(dataclasses.replace(GOOD, tests=("test_slow.py",)), project, timeout=8)
    assert outcome.status == "time-out" and outcome.seconds < 20


def test_turns_walk_the_whole_list():
    numbered = [dataclasses.replace(GOOD, new=str(number)) for number in range(12)]
    seen = [mutant.new for turn in range(3) for mutant in mutants.rotate(numbered, turn)]
    assert set(seen) == {str(number) for number in range(12)} and len(seen) == 15
    assert mutants.rotate(numbered, 7) != mutants.rotate(numbered, 8)
    assert mutants.rotate([], 3) == [] and len(mutants.rotate(numbered[:2], 3)) == 2
    assert mutants.turn() > 0


def _record(status: str, survives: str = "") -> dict:
    return mutants.record(dataclasses.replace(GOOD, survives=survives), Outcome(status), 2)


def test_the_verdict():
    killed = [_record("killed")] * 20
    assert mutants.verdict(killed) == []
    assert mutants.verdict([*killed, _record("time-out"), _record("survived", "equal on every device")]) == []
    assert "survived" in mutants.verdict([*killed, _record("survived")])[0]
    assert "invalid" in mutants.verdict([*killed, _record("invalid")])[0]
    explained = [_record("survived", "equal on every device")] * 2
    assert mutants.verdict([*killed[:19], *explained]) == ["19 of 21 killed, required 95%"]


def test_the_recorded_run_killed_what_it_should():
    recorded = json.loads(mutants.RESULTS.read_text())
    assert mutants.verdict(recorded["mutants"]) == []
    assert recorded["of"] == len(recorded["mutants"]) >= 40


@pytest.mark.slow
@pytest.mark.parametrize("mutant", mutants.rotate(MUTANTS, mutants.turn()), ids=lambda mutant: mutant.file)
def test_five_of_them_today(mutant):
    outcome, line = mutants.try_mutant(mutant)
    assert outcome.status in ("killed", "time-out") or mutant.survives, (mutant, line, outcome.output[-2000:])
