"""The CPU benchmarks' machinery: rows and files, the parity gate, ratios, and that every op has a case."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys

import pytest
import torch

from benchmarks import cpu_report, many_adapters
from benchmarks.arena import Arena, Options, blank_row
from benchmarks.contenders import Missing
from benchmarks.replay import CLOCK, play
from benchmarks.suites import Row, Suite, suites
from fastlora import backends
from fastlora.dispatch import registry
from fastlora.problem import Problem

TINY = Options(tiny=True, case_seconds=0.02)
STATUSES = {"ok", "missing", "failed", "parity failed", "skipped"}


@pytest.fixture(scope="module")
def tiny():
    """Every tiny case, and the ops that its contenders dispatched."""
    seen: dict[str, set[str]] = {}
    choose, arena = registry.select, Arena(TINY)

    def watch(problem: Problem, *rest):
        seen.setdefault(current[0], set()).add(problem.op)
        return choose(problem, *rest)

    current = [""]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "select", watch)
        for suite in arena.suites.values():
            for row in suite.rows():
                current[0] = row.case
                arena.row(row)
    return arena, seen


def test_every_registered_op_has_a_case(tiny, tmp_path, monkeypatch, capsys):
    """Mixed batches, mixtures, groups and gated units have their own; a mixed mask is drawn as `dropout_mask`'s."""
    _, seen = tiny
    mixed, choose = set(), registry.select
    monkeypatch.setattr(registry, "select", lambda problem, *rest: mixed.add(problem.op) or choose(problem, *rest))
    assert many_adapters.main(["--tiny", "--json", str(tmp_path / "a.json"), "--png", str(tmp_path / "a.png")]) == 0
    backends.load()
    elsewhere = {"grouped_mask", "glu_fwd", "glu_bwd", "projections_fwd", "projections_bwd"}
    elsewhere |= {"mixture_fwd", "mixture_bwd", "routed_fwd", "routed_bwd"}
    assert {kernel.op for kernel in registry.kernels()} <= set().union(*seen.values(), mixed, elsewhere)
    kinds = {(case.op, case.train) for suite in suites().values() for case in suite.cases}
    covered = {(case.op, case.train) for suite in suites(tiny=True).values() for case in suite.cases}
    assert covered <= kinds  # so the real cases reach at least the ops that the tiny ones do


def test_the_real_cases_are_those_promised():
    layers, ops = (suites()[name].cases for name in ("layers", "ops"))
    for cases in (layers, ops):
        assert len({case.name for case in cases}) == len(cases)
    square = {(case.m, case.dtype, case.train) for case in layers if (case.n, case.k) == (4096, 4096) and case.quant}
    for m in (1, 8, 64, 512):
        for dtype in (torch.float32, torch.bfloat16):
            assert {(m, dtype, True), (m, dtype, False)} <= square
    assert {(5632, 2048), (576, 576), (1536, 576), (576, 1536)} <= {(case.n, case.k) for case in layers}
    assert {case.p for case in layers} == {case.p for case in ops if case.op == "linear"} == {0.0, 0.05}
    assert any(case.dora for case in layers) and any(not case.quant for case in layers)
    for suite in suites().values():
        for case in suite.cases:
            assert "fastlora" in {one.name for one in suite.entrants(case)}


def test_report_has_every_row_and_its_parity(tiny, tmp_path):
    arena, _ = tiny
    report = cpu_report.assemble(arena, 1.0)
    cpu_report.write(report, tmp_path)
    text = (tmp_path / "cpu.json").read_text()
    report = json.loads(text)
    assert report["schema"] == cpu_report.SCHEMA and report["mode"] == "tiny" and report["complete"]
    assert str(cpu_report.ROOT) not in text and os.uname().nodename not in text
    wanted = [(row.suite, row.case, row.contender) for suite in arena.suites.values() for row in suite.rows()]
    assert [(row["suite"], row["case"], row["contender"]) for row in report["rows"]] == wanted
    suite = arena.suites["layers"]
    keys = set(blank_row(suite, suite.cases[0], suite.contenders[0]))
    for row in report["rows"]:
        assert set(row) == keys and row["status"] in STATUSES
        if row["status"] == "ok":
            assert row["parity"]["ok"] and row["time_ms"]["median"] >= row["time_ms"]["best"] > 0
        else:
            assert row["reason"] and row["time_ms"] is None
    assert all(row["status"] == "ok" for row in report["rows"] if row["role"] in ("ours", "floor"))


def test_report_states_the_machine_and_every_ratio(tiny, tmp_path):
    arena, _ = tiny
    report = cpu_report.assemble(arena, 1.0)
    about = report["environment"]
    assert about["cpu"] and about["torch_tier"] and isinstance(about["native_bf16"], bool)
    assert about["packages"]["torch"] == torch.__version__ and len(about["source_sha256"]) == 64
    assert report["threads"] == 1 and "commit" in about
    for entry in report["summary"]:
        assert set(entry["speedup"]) == set(cpu_report.COLUMNS)
        assert entry["slower_than"] == [name for name, value in entry["speedup"].items() if value and value < 1]
    step = next(entry for entry in report["summary"] if entry["case"].startswith("qlora-step"))
    assert step["speedup"]["linear-fp32"] == round(step["ms"]["linear-fp32"] / step["ms"]["fastlora"], 3)
    assert step["speedup"]["peft"] == round(
        min(step["ms"]["peft"], step["ms"]["peft-16bit"]) / step["ms"]["fastlora"], 3
    )
    shown = cpu_report.table(report)
    assert "not a measurement" in shown and "comparisons" in shown
    assert all(case["name"] in shown for case in report["cases"])
    pytest.importorskip("matplotlib")
    assert cpu_report.write(report, tmp_path)[1].read_bytes().startswith(b"\x89PNG")


def test_only_a_whole_real_run_becomes_a_result(tiny):
    arena, _ = tiny
    assert cpu_report.folder(arena, save=True) == cpu_report.SCRATCH
    fresh = Arena(Options())
    assert not fresh.complete and cpu_report.folder(fresh, save=True) == cpu_report.SCRATCH


# --- contenders that misbehave ----------------------------------------------------------------------------------------


def _race(**changes) -> tuple[Arena, dict[str, dict]]:
    """The tiny dense DoRA case with some contenders' `build` replaced."""
    layers = suites(tiny=True)["layers"]
    case = next(case for case in layers.cases if case.name.startswith("dora"))
    taking_part = tuple(
        dataclasses.replace(one, build=changes[one.name](one.build)) if one.name in changes else one
        for one in layers.entrants(case)
    )
    arena = Arena(TINY, {"layers": Suite("layers", 1.0, (case,), taking_part)})
    arena.run()
    return arena, {row.contender: found for row, found in arena.rows.items()}


def _scaled(build):
    """A hundredth of the adapter too much."""
    return lambda case, inputs, copies: build(case, dataclasses.replace(inputs, b=inputs.b * 1.01), copies)


def _absent(build):
    def missing(case, inputs, copies):
        raise Missing("no such package")

    return missing


def test_a_wrong_peer_gets_no_ratio_and_is_skipped():
    arena, rows = _race(peft=_scaled)
    assert rows["peft"]["status"] == "parity failed" and rows["peft"]["time_ms"] is None
    assert Row("layers", rows["peft"]["case"], "peft") not in arena.samples
    entry = cpu_report.summarize(list(rows.values()))
    assert entry["speedup"]["peft"] is None and entry["ms"]["peft"] is None and entry["speedup"]["linear"] > 0
    assert cpu_report.verdict(rows["peft"])[0] == "skip"
    assert "outside the error budget" in cpu_report.table(cpu_report.assemble(arena, 1.0))


def test_when_we_are_wrong_nobody_has_a_ratio_and_the_run_fails():
    _, rows = _race(fastlora=_scaled)
    assert rows["fastlora"]["status"] == "parity failed" and rows["fastlora"]["time_ms"] is None
    entry = cpu_report.summarize(list(rows.values()))
    assert set(entry["speedup"].values()) == {None} and entry["slower_than"] == []
    outcome, why = cpu_report.verdict(rows["fastlora"])
    assert outcome == "fail" and "outside the error budget" in why


def test_a_missing_peer_keeps_its_row_and_reason():
    _, rows = _race(peft=_absent)
    assert rows["peft"]["status"] == "missing" and rows["peft"]["reason"] == "no such package"
    assert rows["fastlora"]["status"] == "ok"


def test_no_budget_skips_everything_and_says_so():
    arena = Arena(dataclasses.replace(TINY, budget=0.0))
    arena.run()
    assert {row["status"] for row in arena.rows.values()} == {"skipped"} and arena.complete
    assert "time budget used up" in cpu_report.table(cpu_report.assemble(arena, 0.0))


# --- pytest-benchmark's side ------------------------------------------------------------------------------------------


def test_samples_are_played_back_one_a_round():
    class Fixture:
        def __init__(self):
            self.extra_info, self.group, self.got = {}, None, []

        def pedantic(self, target, setup, rounds):
            for _ in range(rounds):
                arguments, keywords = setup()
                begin = CLOCK.read()
                target(*arguments, **keywords)
                self.got.append(CLOCK.read() - begin)

    fixture = Fixture()
    found = {"mode": "step", "role": "ours", "parity": {"ok": True}, "note": ""}
    play(fixture, Row("layers", "case", "fastlora"), found, [0.5, 0.25, 2.0])
    assert fixture.got == [0.5, 0.25, 2.0]
    assert fixture.group == "layers: case" and fixture.extra_info["parity"] == {"ok": True}


def test_the_command_runs_a_case_and_reports(tmp_path):
    command = [sys.executable, "-m", "pytest", "benchmarks", "--benchmark-only", "-p", "no:xdist", "-q"]
    options = ["--bench-tiny", "-k", "dequantize-nested", "--results-dir", str(tmp_path)]
    store = tmp_path / "store.json"
    # A worker of a parallel run tells its children so, and pytest-benchmark would then refuse to measure.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    done = subprocess.run(
        [*command, *options, f"--benchmark-json={store}"],
        cwd=cpu_report.ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "speed-up of fastlora" in done.stdout
    report = json.loads((tmp_path / "cpu.json").read_text())
    assert not report["complete"] and {row["case"] for row in report["rows"]} == {"dequantize-nested-96x64-bf16"}
    stored = {
        entry["extra_info"]["role"]: entry["stats"]["median"] for entry in json.loads(store.read_text())["benchmarks"]
    }
    ours = next(row for row in report["rows"] if row["role"] == "ours")
    assert stored["ours"] == pytest.approx(ours["time_ms"]["median"] * 1e-3, rel=1e-6)
    assert "node" not in json.loads(store.read_text())["machine_info"]


# --- the GPU's rows ---------------------------------------------------------------------------------------------------


def _gpu_rows(tmp_path, *options) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "pytest", "benchmarks/bench_gpu.py", "--benchmark-only", "-q", "-p", "no:xdist"]
    command += ["--benchmark-json", str(tmp_path / "gpu.json"), *options]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    environment |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    root = cpu_report.ROOT
    return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.slow
def test_the_gpu_rows_show_everybody_beside_the_floor(tmp_path):
    done = _gpu_rows(tmp_path, "--bench-tiny", "-k", "qdora-p0.05")
    assert done.returncode == 0, done.stdout[-3000:]
    rows = json.loads((tmp_path / "gpu.json").read_text())["benchmarks"]
    found = {row["extra_info"]["role"]: row for row in rows}
    assert {"floor", "base", "peer", "ours"} <= found.keys()
    floor, ours = found["floor"]["stats"]["median"], found["ours"]["stats"]["median"]
    # DoRA with dropout multiplies the frozen weight twice: its floor is twice the plain one.
    assert found["ours"]["extra_info"]["over_floor"] == pytest.approx(ours / (2 * floor), rel=1e-3)
    assert all(row["extra_info"]["parity"]["ok"] for row in rows)


@pytest.mark.slow
def test_without_a_gpu_its_rows_say_so(tmp_path):
    done = _gpu_rows(tmp_path, "-k", "decode-m1-14336x4096 and fastlora", "-rs")
    assert done.returncode == 0, done.stdout[-3000:]
    assert "needs a GPU" in done.stdout and "passed" not in done.stdout
