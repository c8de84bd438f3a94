"""The GPU report's machinery on a CPU: rows and files, the parity gate, the budget, and contenders that misbehave."""

from __future__ import annotations

import dataclasses
import json
import sys
import textwrap

import pytest
import torch

from benchmarks import gpu_report, measure, plots, worker
from benchmarks.cases import METRICS, Case, grid
from benchmarks.contenders import Built, Contender, Missing
from benchmarks.oracle import Drop, Oracle, make_inputs
from benchmarks.ours import ours
from benchmarks.peers import peers
from fastlora import backends
from fastlora.dispatch import registry

CPU = torch.device("cpu")
ROW_KEYS = set(measure.blank_row(grid(True)[0], peers()[0], "ok"))
TIMES = [key for key in ROW_KEYS if key.endswith("_ms")]
STATUSES = {"ok", "missing", "failed", "parity failed", "skipped"}


def _named(contenders: list[Contender], name: str, op: str = "linear") -> Contender:
    case = next(case for case in grid(True) if case.op == op)
    return next(one for one in contenders if one.name == name and one.applies(case))


@pytest.fixture(scope="module")
def dry(tmp_path_factory):
    """One whole dry run, worker process and all."""
    folder = tmp_path_factory.mktemp("report")
    assert gpu_report.main(["--dry", "--out", str(folder)]) == 0
    return folder, json.loads((folder / "report.json").read_text())


def test_report_has_a_row_for_every_pair(dry):
    _, report = dry
    assert report["schema"] == gpu_report.SCHEMA and report["mode"] == "dry"
    expected = {(case.name, one.name) for case in grid(True) for one in worker.all_contenders() if one.applies(case)}
    assert {(row["case"], row["contender"]) for row in report["rows"]} == expected
    assert len(report["rows"]) == len(expected)
    for row in report["rows"]:
        assert set(row) == ROW_KEYS
        assert row["status"] in STATUSES
        assert row["status"] == "ok" or row["reason"]


def test_report_states_environment_roof_and_cases(dry):
    _, report = dry
    environment = report["environment"]
    assert environment["packages"]["torch"] == torch.__version__
    assert len(environment["source_sha256"]) == 64
    assert environment["backends"]["reference"] == ""
    assert report["roof"]["copy"]["bytes_per_second"] > 0
    assert all(row["flops_per_second"] > 0 for row in report["roof"]["matrix"])
    assert report["roof"]["launch"]["host_us"] > 0
    assert [case["name"] for case in report["cases"]] == [case.name for case in grid(True)]
    assert report["gpu_tests"]["status"] == "not run" and report["gpu_tests"]["reason"]


def test_ours_and_the_floor_pass_parity_and_are_timed(dry):
    _, report = dry
    rows = [row for row in report["rows"] if row["role"] in ("floor", "ours")]
    assert {row["role"] for row in rows} == {"floor", "ours"}
    for row in rows:
        assert row["status"] == "ok", row
        assert row["parity"]["ok"] and row["forward_ms"]["median"] > 0
        assert row["graph_forward_ms"] is None and row["graph_reason"]
        assert row["launches"]["forward"] >= 1
    trained = {case.name for case in grid(True) if case.train and case.op == "linear"}
    assert all(row["step_ms"]["median"] > 0 for row in rows if row["case"] in trained)


def test_every_plan_has_its_own_rows(dry):
    _, report = dry
    backends.load()
    plans = {f"fastlora:{each.plan}" for each in registry.kernels("lora_fwd") if each.backend == "triton"}
    assert plans and plans == {one.name for one in ours() if one.role == "plan"}
    rows = [row for row in report["rows"] if row["role"] == "plan"]
    assert {row["contender"] for row in rows} == plans
    dropped = {row["contender"] for row in rows if row["case"].startswith("lora-p0.05")}
    assert "fastlora:split" in dropped and "fastlora:merge" not in dropped  # no plan that cannot take the case
    if not torch.cuda.is_available():
        assert {row["status"] for row in rows} == {"missing"}
        assert all("no GPU that torch can use" in row["reason"] for row in rows)
    for entry in report["summary"]:
        assert all(judged["ours"] in (None, "fastlora", "fastlora-16bit") for judged in entry["judged_on"].values())


def test_summary_gives_ratios_losses_included(dry):
    _, report = dry
    entry = next(entry for entry in report["summary"] if entry["case"] == "qlora-p0-192x128")
    judged = entry["judged_on"]["step_ms"]
    assert judged["ratio_to_floor"]["floor"] == 1.0
    assert judged["ratio_to_floor"]["fastlora"] > 0
    assert set(judged["metrics"]) == set(METRICS)
    assert entry["target"]["metric"] == "ratio_to_floor" and entry["met"] is None  # targets are for a GPU


def test_plots_are_written_and_named(dry):
    folder, report = dry
    pytest.importorskip("matplotlib")
    assert {"training.png", "decode.png"} <= set(report["plots"])
    for name in report["plots"]:
        assert (folder / name).read_bytes().startswith(b"\x89PNG")
    assert len(list(folder.iterdir())) <= 8


def test_without_matplotlib_the_report_says_so(dry, tmp_path, monkeypatch):
    _, report = dry
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    names, reason = plots.draw(report, tmp_path)
    assert names == [] and "matplotlib" in reason


def test_no_budget_lists_everything_as_skipped(tmp_path, capsys):
    assert gpu_report.main(["--dry", "--budget", "0", "--out", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["rows"] and report["roof"] is None and report["roof_reason"]
    assert {row["status"] for row in report["rows"]} == {"skipped"}
    assert all(row[key] is None for row in report["rows"] for key in TIMES)
    assert "skipped" in capsys.readouterr().out


# --- the parity gate --------------------------------------------------------------------------------------------------


def _spoiled(spoil) -> Contender:
    """Our layer, its inputs changed before it is built: a kernel that computes something else."""
    honest = _named(ours(), "fastlora")

    def build(case, inputs, copies):
        return honest.build(case, spoil(inputs), copies)

    return dataclasses.replace(honest, name="wrong", build=build)


SPOILS = {
    "adapter lost": lambda given: dataclasses.replace(given, b=torch.zeros_like(given.b)),
    "two percent off": lambda given: dataclasses.replace(given, b=given.b * 1.02),
    "a column of the weight": lambda given: dataclasses.replace(given, w=given.w.clone().index_fill_(1, _column(), 0)),
    "not a number": lambda given: dataclasses.replace(given, a=given.a * float("nan")),
}


def _column() -> torch.Tensor:
    return torch.tensor([5])


@pytest.mark.parametrize("what", SPOILS)
def test_a_wrong_contender_has_no_time(what, tmp_path):
    taking_part = [_named(peers(), "floor"), _spoiled(SPOILS[what])]
    options = gpu_report.Options(dry=True, out=tmp_path, only=["lora-p0-fp32"])
    report = gpu_report.generate(options, taking_part)
    floor, wrong = report["rows"]
    assert floor["status"] == "ok" and floor["step_ms"]
    assert wrong["status"] == "parity failed"
    assert "outside the error budget" in wrong["reason"]
    assert all(wrong[key] is None for key in TIMES)
    (entry,) = report["summary"]
    assert entry["judged_on"]["step_ms"]["ratio_to_floor"]["wrong"] is None
    assert entry["judged_on"]["step_ms"]["ours"] is None and entry["met"] is None


def test_a_lost_dropout_scale_is_wrong():
    """The gate sees the 5 % between keep_scale and 1, and a mask that is not the one used."""
    case = next(case for case in grid(True) if case.name.startswith("lora-p0.05"))
    inputs = make_inputs(case, CPU, 1)
    layer = _named(ours(), "fastlora").build(case, inputs, 1)
    x = inputs.x.clone().requires_grad_()
    y, drop = layer.parity(x)
    assert drop is not None
    grads = torch.autograd.grad(y, [x, *layer.leaves[0].values()], inputs.dy)
    outputs = {"y": y.detach()} | dict(zip(["dx", "da", "db"], grads, strict=True))
    oracle = Oracle(case, inputs)

    def wrong(seen: Drop) -> set[str]:
        return {name for name, value in oracle.judge(outputs, "adapted", seen).items() if not value["ok"]}

    assert wrong(drop) == set()
    assert {"da", "db"} <= wrong(drop._replace(keep_scale=1.0))
    assert wrong(drop._replace(mask=drop.mask.roll(1, 0))) == {"y", "dx", "da", "db"}


def test_a_contender_that_raises_or_is_missing_becomes_a_reason(tmp_path):
    def broken(case, inputs, copies):
        raise RuntimeError("out of registers")

    def missing(case, inputs, copies):
        raise Missing("no such package")

    def late(case, inputs, copies):
        calls = iter(range(3))

        def layer(x):
            if next(calls, None) is None:
                raise RuntimeError("fails when it is timed")
            return x @ inputs.w.t()

        return Built([layer] * copies, [{} for _ in range(copies)])

    floor = _named(peers(), "floor")
    taking_part = [
        dataclasses.replace(floor, name="broken", role="peer", build=broken),
        dataclasses.replace(floor, name="absent", role="peer", build=missing),
        dataclasses.replace(floor, name="late", role="peer", build=late),
        floor,
    ]
    report = gpu_report.generate(gpu_report.Options(dry=True, out=tmp_path, only=["lora-p0-fp32"]), taking_part)
    rows = {row["contender"]: row for row in report["rows"]}
    assert rows["broken"]["status"] == "failed" and "out of registers" in rows["broken"]["reason"]
    assert rows["absent"]["status"] == "missing" and rows["absent"]["reason"] == "no such package"
    assert rows["late"]["status"] == "failed" and "fails when it is timed" in rows["late"]["reason"]
    assert all(rows[name][key] is None for name in ("broken", "absent", "late") for key in TIMES)
    assert rows["floor"]["status"] == "ok"


# --- a worker that dies or hangs --------------------------------------------------------------------------------------

FAKE = """
import json, os, sys, time
asked = json.loads(sys.argv[1])
say = lambda **event: print({mark!r} + json.dumps(event), flush=True)
barred = [tuple(place[:3]) for place in asked["barred"]]
case = asked["cases"][0]
say(event="roof", roof={{}})
say(event="case", case=case)
if (case, "peft", "eager") not in barred:
    say(event="at", case=case, contender="peft", stage="eager")
    print("Xid 13: illegal address", file=sys.stderr, flush=True)
    {misbehave}
say(event="row", row={row} | {{"case": case}})
say(event="end")
"""


@pytest.mark.parametrize(
    ("misbehave", "expected"), [("os._exit(7)", "status 7: Xid 13"), ("time.sleep(60)", "taken to hang")]
)
def test_a_worker_that_dies_is_replaced_and_the_culprit_named(misbehave, expected, tmp_path, monkeypatch):
    options = gpu_report.Options(dry=True, out=tmp_path, only=["lora-p0-fp32"])
    (case,) = grid(True, options.only)
    row = measure.blank_row(case, _named(peers(), "floor"), "ok")
    script = tmp_path / "fake.py"
    script.write_text(textwrap.dedent(FAKE).format(mark=worker.MARK, misbehave=misbehave, row=row))
    monkeypatch.setattr(gpu_report, "WORKER", [str(script)])
    monkeypatch.setattr(gpu_report, "SILENCE", 4.0)
    report = gpu_report.generate(options)
    rows = {row["contender"]: row for row in report["rows"]}
    assert rows["floor"]["status"] == "ok"
    assert rows["peft"]["status"] == "failed" and expected in rows["peft"]["reason"]


def test_a_worker_that_cannot_start_gives_every_row_the_reason(tmp_path, monkeypatch):
    script = tmp_path / "fake.py"
    script.write_text("import sys; sys.exit('no driver')")
    monkeypatch.setattr(gpu_report, "WORKER", [str(script)])
    report = gpu_report.generate(gpu_report.Options(dry=True, out=tmp_path))
    assert report["rows"] and all(row["status"] == "failed" for row in report["rows"])
    assert all("no driver" in row["reason"] for row in report["rows"])
    assert "no driver" in report["roof_reason"]


# --- the grid and the command -----------------------------------------------------------------------------------------


def test_grid_names_are_unique_and_the_targets_known():
    for cases in (grid(False), grid(True)):
        names = [case.name for case in cases]
        assert len(set(names)) == len(names)
        assert all(case.target.metric in METRICS for case in cases if case.target)
    shapes = {(case.n, case.k) for case in grid(False) if case.op == "linear"}
    assert shapes == {(4096, 4096), (14336, 4096), (4096, 14336)}


def test_only_selects_and_unknown_names_are_refused(capsys):
    assert [case.name for case in grid(True, ["decode"])] == ["decode-m1-192x128"]
    assert all(case.train for case in grid(False, ["q*-p0-*"]))
    with pytest.raises(ValueError, match="no case matches 'nonsense'"):
        grid(True, ["nonsense"])
    assert gpu_report.main(["--dry", "--only", "nonsense"]) == 2
    assert "no case matches" in capsys.readouterr().err
    assert gpu_report.main(["--dry", "--contenders", "nobody"]) == 2
    assert "unknown contender 'nobody'" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_only_a_dry_run_starts(capsys):
    assert gpu_report.main([]) == 2
    assert "--dry" in capsys.readouterr().err


def test_dora_with_dropout_is_judged_against_twice_the_floor():
    case = Case("c", "linear", 8, 8, m=4, p=0.1, dora=True)
    rows = [
        measure.blank_row(case, _named(peers(), name), "ok") | {"step_ms": {"median": time}}
        for name, time in (("floor", 1.0), ("bitsandbytes", 1.2), ("peft", 3.0))
    ]
    judged = gpu_report.summarize(case, rows, None)["judged_on"]["step_ms"]["ratio_to_floor"]
    assert judged == {"floor": 1.0, "bitsandbytes": 1.2, "peft": 1.5}
