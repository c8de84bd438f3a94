"""The CPU targets' machinery: every line is judged the right way round, and nobody who is wrong gets a ratio."""

from __future__ import annotations

import dataclasses
import json

import pytest

from benchmarks import cpu_targets
from benchmarks.cpu_targets import Goal, judge, least_seconds, products, settle
from benchmarks.suites import BF16, FP32, _linear, _op

CASE = _linear("qlora", "step", 64, FP32)
RATES = {"float32": 1e11, "bfloat16": 2e11, "read": 1e10, "write": 5e9}


def rows(mine: float | None, theirs: float | None) -> dict:
    def row(ms: float | None) -> dict:
        good = ms is not None
        return {
            "status": "ok" if good else "parity failed",
            "reason": None if good else "outside",
            "samples": [ms] * good,
        }

    return {(CASE.name, "we"): row(mine), (CASE.name, "they"): row(theirs)}


@pytest.mark.parametrize(
    ("least", "most", "met", "ratio"),
    [(2.0, None, True, 3.0), (4.0, None, False, 3.0), (None, 0.5, True, 1 / 3), (None, 0.3, False, 1 / 3)],
)
def test_a_ratio_is_theirs_over_ours_and_a_share_ours_over_theirs(least, most, met, ratio):
    line = judge(Goal("line", CASE, "we", "they", least, most), rows(1.0, 3.0))
    assert line["met"] is met
    assert line["ratio"] == pytest.approx(ratio)


def test_without_a_target_there_is_a_ratio_and_no_verdict():
    line = judge(Goal("line", CASE, "we", "they"), rows(2.0, 3.0))
    assert line["ratio"] == pytest.approx(1.5)
    assert line["met"] is None


@pytest.mark.parametrize("times", [(None, 3.0), (1.0, None)])
def test_who_failed_parity_has_no_ratio_and_nobody_against_it(times):
    line = judge(Goal("line", CASE, "we", "they", 2.0), rows(*times))
    assert line["ratio"] is None and line["met"] is None
    assert line["reason"] == "outside"


def test_the_bound_is_products_at_the_best_rate_or_one_read_of_the_weight():
    many, one = _linear("qlora", "step", 512, BF16), _linear("qlora", "forward", 1, BF16)
    assert least_seconds(many, RATES) == pytest.approx(4 * 512 * 4096**2 / 2e11)
    assert least_seconds(one, RATES) == pytest.approx(one.weight_bytes / 1e10)
    twice = dataclasses.replace(many, dora=True, p=0.1)
    assert least_seconds(twice, RATES) == pytest.approx(2 * least_seconds(many, RATES))
    shared = dataclasses.replace(twice, dora_dropout="shared")
    assert least_seconds(shared, RATES) == pytest.approx(least_seconds(many, RATES))
    packed, dense = _op("dequantize", BF16).weight_bytes, 2 * 4096**2
    assert least_seconds(_op("dequantize", BF16), RATES) == pytest.approx(packed / 1e10 + dense / 5e9)
    packed = _op("quantize", BF16).weight_bytes
    assert least_seconds(_op("quantize", BF16), RATES) == pytest.approx(packed / 5e9 + dense / 1e10)


def test_the_best_rate_is_torchs_or_the_best_that_a_line_shows():
    line = judge(Goal("line", CASE, "we", "they", 2.0), rows(10.0, 30.0))
    rates = dict(RATES)
    settle([line], {CASE.name: CASE}, rates)
    assert rates["float32"] == pytest.approx(products(CASE) / 10e-3)
    assert line["bound"] == pytest.approx(3.0)  # nobody was faster than we were
    share = judge(Goal("line", CASE, "we", "they", most=0.5), rows(100.0, 300.0))
    settle([share], {CASE.name: CASE}, dict(RATES))
    assert share["bound"] == pytest.approx(products(CASE) / 1e11 / 0.3)


def test_every_line_names_contenders_that_apply():
    people = cpu_targets.contenders()
    for goal in cpu_targets.goals(tiny=False):
        assert any(one.applies(goal.case) for one in people[goal.who]), goal
        assert any(one.applies(goal.other_case or goal.case) for one in people[goal.other]), goal


def test_a_tiny_run_prints_and_writes_every_line(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(cpu_targets, "SCRATCH", tmp_path)
    assert cpu_targets.main(["--tiny", "--threads", "1", "--save-results"]) == 0
    report = json.loads((tmp_path / "cpu_targets.json").read_text())
    lines = report["runs"][0]["lines"]
    assert len(lines) == len(cpu_targets.goals(tiny=True))
    assert all(line["ratio"] is not None for line in lines), [line["reason"] for line in lines]
    assert all(parity["ok"] for line in lines for parity in line["parity"].values())
    printed = capsys.readouterr().out
    assert all(line["label"] in printed for line in lines)
    assert (tmp_path / "cpu_targets.png").stat().st_size > 1000
