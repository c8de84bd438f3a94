"""The script that trains a PEFT model before and after `accelerate`: its machinery on a tiny model, and its verdict."""

from __future__ import annotations

import json

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")
pytest.importorskip("bitsandbytes")

from benchmarks import adoption, adoption_runs
from benchmarks.cpu_report import RESULTS
from fastlora.nn import accelerate as accelerating

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft", "ignore:.*kernels")


def arguments(folder, *more):
    return ["--tiny", "--json", str(folder / "a.json"), "--png", str(folder / "a.png"), *more]


def test_every_kind_runs_and_is_written(tmp_path):
    assert adoption.main(arguments(tmp_path, "--steps", "2")) == 0
    report = json.loads((tmp_path / "a.json").read_text())
    assert [entry["kind"] for entry in report["results"]] == list(adoption.KINDS)
    for entry in report["results"]:
        assert entry["steps"] == 2
        assert entry["layers_fused"] == 14
        assert entry["ok"]
        assert {len(losses) for losses in entry["losses"].values()} == {entry["steps"]}
        assert 0 < entry["largest_allowed"] < 1e-4
    assert (tmp_path / "a.png").stat().st_size > 10_000


def test_grouped_kinds_run_grouped(tmp_path):
    assert adoption.main(arguments(tmp_path, "--group", "--steps", "2")) == 0
    report = json.loads((tmp_path / "a.json").read_text())
    assert [entry["kind"] for entry in report["results"]] == list(adoption.GROUPED)
    assert report["adapter"]["r"] == adoption.GROUPED_RANK
    assert all(entry["layers_grouped"] == 12 for entry in report["results"])  # all but o_proj, in two layers
    assert all(0 < entry["largest_allowed"] < 1e-2 for entry in report["results"])
    far = report["results"][2]["from_fp32"]
    assert 0 < far["accelerated"]["mean"] <= far["accelerated"]["largest"] < 1e-2
    assert "from_fp32" not in report["results"][0]


def test_kinds_are_of_their_way(tmp_path, capsys):
    for more, way in ((("--group", "--kinds", "lora"), "with --group"), (("--kinds", "nf4 nested"), "without --group")):
        with pytest.raises(SystemExit):
            adoption.main(arguments(tmp_path, *more))
        assert f"{way} the kinds are" in capsys.readouterr().err


def test_a_scale_off_by_a_thousandth_is_too_far(tmp_path, monkeypatch):
    accelerate = adoption.fastlora.accelerate

    def wrong(model, **keywords):
        for _, layer in accelerating.tuner_layers(model):
            layer.scaling["default"] *= 1.001
        return accelerate(model, **keywords)

    monkeypatch.setattr(adoption.fastlora, "accelerate", wrong, raising=False)
    assert adoption.main(arguments(tmp_path, "--steps", "6", "--kinds", "lora")) == 1
    [entry] = json.loads((tmp_path / "a.json").read_text())["results"]
    assert entry["share_of_allowance"] > 10


def test_runs_that_are_equal_are_no_measure(tmp_path, monkeypatch, capsys):
    import contextlib

    monkeypatch.setattr(adoption_runs, "nudged", lambda model: contextlib.nullcontext())
    monkeypatch.setattr(adoption_runs, "threads", lambda count: contextlib.nullcontext())
    assert adoption.main(arguments(tmp_path, "--steps", "2", "--kinds", "lora")) == 1
    assert "no measure" in capsys.readouterr().err
    assert not (tmp_path / "a.json").exists()


def test_the_allowance_grows_with_pefts_own_distance():
    want, two, nudge = [1.0, 1.0, 1.0], [1.0, 1.1, 1.0], [1.0, 1.0, 1.05]
    assert adoption_runs.allowance(want, two, nudge) == pytest.approx([0.0, 0.3, 0.3])


def test_a_nudge_moves_about_half_of_an_output_by_one_unit():
    from tests.accelerate_tools import wrap

    model = wrap(torch.nn.Linear(64, 64), r=2)
    x = torch.randn(40, 64)
    plain = model.model["lin"](x)
    with adoption_runs.nudged(model):
        moved = model.model["lin"](x)
    assert torch.equal(model.model["lin"](x), plain)
    steps = (moved.view(torch.int32) - plain.view(torch.int32)).abs()
    assert set(steps.unique().tolist()) == {0, 1}
    assert 0.45 < steps.double().mean().item() < 0.55


@pytest.mark.parametrize("more", [(), ("--group",)])
def test_a_tiny_run_does_not_overwrite_the_results(more, capsys):
    with pytest.raises(SystemExit):
        adoption.main(["--tiny", *more])
    assert "no measurement" in capsys.readouterr().err


@pytest.mark.parametrize(("more", "name"), [((), "adoption"), (("--group",), "grouped")])
def test_grouped_runs_have_files_of_their_own(more, name, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(adoption.script, "run", lambda parser, chosen, *_: seen.append(chosen) or 0)
    assert adoption.main([*more]) == 0
    assert adoption.main(["--png", str(tmp_path / "a.png"), *more]) == 0
    assert [chosen.json for chosen in seen] == [RESULTS / f"{name}.json"] * 2
    assert [chosen.png for chosen in seen] == [RESULTS / f"{name}.png", tmp_path / "a.png"]


@pytest.mark.parametrize(
    ("name", "kinds", "steps"), [("adoption", adoption.KINDS, 50), ("grouped", adoption.GROUPED, 100)]
)
def test_the_committed_result_is_whole(name, kinds, steps):
    report = json.loads((RESULTS / f"{name}.json").read_text())
    assert report["mode"] == "cpu"
    assert [entry["kind"] for entry in report["results"]] == list(kinds)
    assert max(entry["steps"] for entry in report["results"]) == steps
    for entry in report["results"]:
        losses = entry["losses"]
        allowed = adoption_runs.allowance(losses["peft"], losses["peft_two_threads"], losses["peft_nudged"])
        found = adoption_runs.distances(losses["peft"], losses["accelerated"])
        assert entry["ok"] == all(one <= most for one, most in zip(found, allowed, strict=True))
        assert entry["layers_fused"] == 210
