"""The frame that the measuring scripts share: options, exit codes, files, turns and ratios. Nothing is measured."""

from __future__ import annotations

import itertools
import json
import re
import sys

import pytest

import fastlora
from benchmarks import plots, script, timing
from benchmarks.cpu_report import RESULTS
from benchmarks.environment import now

REPORT = {"mode": "tiny", "threads": 2, "environment": {"cpu": "a CPU"}, "results": [1.5, None]}


def table(report):
    return f"{len(report['results'])} rows"


def draw(report, path):
    figure = plots.figure(2, 2, 50)
    axes = figure.add_subplot()
    plots.bars(axes, (0, 2), report["results"], label="one", color="#2e7d32")
    axes.set_title(plots.caution(report) + plots.machine(report))
    figure.savefig(path)


@pytest.fixture
def start(tmp_path):
    """A script's `main` with some measurement; its files are s.json and s.png in `tmp_path`."""

    def run(measure=lambda: REPORT, *more, draw=draw, good=None):
        parser = script.parser("s", "First line.\n\nMore.", tiny="a small one")
        parser.add_argument("--rounds", type=script.at_least(1), default=3)
        files = ["--json", str(tmp_path / "s.json"), "--png", str(tmp_path / "s.png")]
        chosen = parser.parse_args(["--tiny", *files, *more])
        return script.run(parser, chosen, measure, table, draw, good)

    return run


# --- options ----------------------------------------------------------------------------------------------------------


def test_files_go_to_the_results_under_the_scripts_name():
    chosen = script.parser("s", None, tiny="a small one").parse_args([])
    assert (chosen.json, chosen.png, chosen.tiny) == (RESULTS / "s.json", RESULTS / "s.png", False)
    assert vars(script.parser("s", None).parse_args([])) == {"json": RESULTS / "s.json"}


def test_help_is_the_first_line_of_the_docstring(capsys):
    with pytest.raises(SystemExit):
        script.parser("s", "First line.\n\nMore.").parse_args(["--help"])
    said = capsys.readouterr().out
    assert said.startswith("usage: python -m benchmarks.s ") and "First line." in said and "More." not in said


@pytest.mark.parametrize(
    ("given", "said"), [("0", "argument --rounds: must be at least 1, got 0"), ("x", "invalid"), ("1.5", "invalid")]
)
def test_a_number_that_is_none_is_refused(start, capsys, given, said):
    with pytest.raises(SystemExit) as stopped:
        start(lambda: REPORT, "--rounds", given)
    assert stopped.value.code == 2 and said in capsys.readouterr().err


@pytest.mark.parametrize("ending", ["json", "png"])
def test_a_tiny_run_writes_no_result(start, capsys, ending):
    def measure():
        pytest.fail("measured all the same")

    with pytest.raises(SystemExit) as stopped:
        start(measure, f"--{ending}", str(RESULTS / f"s.{ending}"))
    assert stopped.value.code == 2 and "--tiny is no measurement" in capsys.readouterr().err


# --- what becomes of a report -----------------------------------------------------------------------------------------


def test_a_report_is_printed_and_written(start, tmp_path, capsys):
    assert start() == 0
    assert capsys.readouterr().out == "2 rows\n"
    assert json.loads((tmp_path / "s.json").read_text()) == REPORT
    assert (tmp_path / "s.png").read_bytes().startswith(b"\x89PNG")


def test_what_is_not_good_is_written_and_ends_with_1(start, tmp_path):
    assert start(good=lambda report: report["mode"] == "cpu") == 1
    assert (tmp_path / "s.json").is_file() and (tmp_path / "s.png").is_file()
    assert start(good=lambda report: report["mode"] == "tiny") == 0


@pytest.mark.parametrize("kind", [fastlora.FastloraError, RuntimeError, ImportError])
def test_what_cannot_be_measured_is_one_line(start, tmp_path, capsys, kind):
    def measure():
        raise kind("parity failed")

    assert start(measure) == 1
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "s: parity failed\n")
    assert list(tmp_path.iterdir()) == []


def test_a_number_that_json_has_not_is_not_written(start):
    with pytest.raises(ValueError, match="JSON"):
        start(lambda: REPORT | {"results": [float("nan")]})


def test_without_matplotlib_there_is_a_line_and_no_picture(start, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert start() == 0
    assert capsys.readouterr().err == "no plot: matplotlib is not installed\n"
    assert [path.name for path in tmp_path.iterdir()] == ["s.json"]


def test_facts_say_how_long_when_and_where():
    before, found = now(), script.facts(started=0.0, about={"cpu": "a CPU"})
    assert list(found) == ["seconds", "finished", "environment"]
    assert found["seconds"] > 0 and found["environment"] == {"cpu": "a CPU"}
    assert before <= found["finished"] <= now()
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", before)
    assert script.facts(0.0)["environment"]["packages"]["torch"]


# --- pictures ---------------------------------------------------------------------------------------------------------


def test_bars_stand_side_by_side_under_their_values():
    axes = plots.figure(2, 2, 50).add_subplot()
    for place in range(3):
        plots.bars(axes, (place, 3), [1.0 + place, None, 0.0], ".1f", label="x", color="red")
    edges = sorted((bar.get_x(), bar.get_x() + bar.get_width()) for bar in axes.patches)
    assert len(edges) == 9 and all(end < start for (_, end), (start, _) in itertools.pairwise(edges))
    middles = [sum(edges[at]) / 2 for at in (1, 4, 7)]
    assert middles == pytest.approx([0, 1, 2])  # the middle series stands above its group
    assert [text.get_text() for text in axes.texts] == ["1.0", "-", "0.0", "2.0", "-", "0.0", "3.0", "-", "0.0"]


def test_a_title_says_what_is_no_measurement():
    assert plots.caution(REPORT) + plots.machine(REPORT) == "TINY, not a measurement: a CPU, 2 thread(s)"
    assert plots.caution(REPORT | {"mode": "cpu"}) == ""


# --- turns and ratios -------------------------------------------------------------------------------------------------


def test_turns_rotate_and_stop_with_the_budget():
    seen = []
    steps = {name: lambda *given, name=name: seen.append((name, given)) for name in "abc"}
    times = timing.in_turns(steps, [(10, 1), (11, 2)], rounds=9, seconds=0.0)
    assert [name for name, _ in seen] == list("abcbcacababc")
    assert {len(values) for values in times.values()} == {3}
    assert [seen[at][1] for at in (0, 3, 6, 9)] == [(11, 2), (10, 1), (11, 2), (10, 1)]
    assert all(len({given for _, given in seen[at : at + 3]}) == 1 for at in range(0, len(seen), 3))


def test_turns_without_a_budget_take_every_round():
    seen = []
    times = timing.in_turns({"a": seen.append}, [(1,)], rounds=5, warm=2)
    assert len(seen) == 7 and len(times["a"]) == 5 and min(times["a"]) > 0


def test_a_ratio_is_the_median_of_the_rounds_ratios():
    assert timing.ratio([2.0, 9.0, 8.0], [1.0, 3.0, 2.0]) == 3.0
    assert timing.ratio([], [1.0]) is None
    with pytest.raises(ValueError, match="longer"):
        timing.ratio([1.0], [1.0, 2.0])
