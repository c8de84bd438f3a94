"""The one way kernels are launched: what is recorded, what runs, and what a device's target is."""

from __future__ import annotations

import types

import pytest
import torch
import triton
import triton.language as tl

from fastlora.backends.triton import launch as launching
from fastlora.backends.triton.launch import INTERPRETER, TARGETS, Tile, cdiv, launch, next_power_of_2, record, target


@triton.jit
def _count(out_ptr, step, n, WIDTH: tl.constexpr):
    """out[3 i + j, :] += step for program (i, j) of a grid with three columns."""
    at = tl.program_id(0) * 3 + tl.program_id(1)
    where = at * WIDTH + tl.arange(0, WIDTH)
    tl.store(out_ptr + where, tl.load(out_ptr + where, mask=where < n) + step, mask=where < n)


def _run(out, step=2, grid=(2, 3)):
    launch(_count, grid, out, step, out.numel(), WIDTH=4, num_warps=2, num_stages=1, fp_fusion=False)


def test_every_program_of_the_grid_runs_once():
    out = torch.zeros(6 * 4)
    _run(out)
    assert torch.equal(out, torch.full_like(out, 2))
    _run(out, step=5, grid=(1, 3))
    assert torch.equal(out, torch.cat([torch.full((12,), 7.0), torch.full((12,), 2.0)]))


@pytest.mark.parametrize("grid", [(0,), (0, 3), (2, 0), (4, 3, 0)])
def test_no_program_means_no_launch(grid):
    out = torch.zeros(24)
    with record(run=True) as launches:
        _run(out, grid=grid)
    assert launches == [] and not out.any()
    _run(out, grid=grid)
    assert not out.any()


def test_recording_notes_and_does_not_run():
    out = torch.zeros(24)
    with record() as launches:
        _run(out, step=7)
        _run(out, grid=(1, 3))
    assert not out.any() and len(launches) == 2
    first = launches[0]
    assert first.name == "_count" and first.kernel is _count and first.grid == (2, 3)
    assert first.args[0] is out and first.args[1:] == (7, 24)
    assert first.constexprs == {"WIDTH": 4}
    assert (first.num_warps, first.num_stages, first.fp_fusion) == (2, 1, False)
    assert launches[1].grid == (1, 3)


def test_nothing_is_recorded_outside_the_block():
    out = torch.zeros(24)
    with record() as launches:
        pass
    _run(out)
    assert launches == [] and bool((out == 2).all())


def test_recording_ends_with_an_exception():
    out = torch.zeros(24)
    launches = []

    def broken_off():
        with record() as noted:
            launches.append(noted)
            _run(out)
            raise KeyError("stop")

    with pytest.raises(KeyError):
        broken_off()
    launches = launches[0]
    assert len(launches) == 1 and not out.any()
    _run(out)
    assert bool((out == 2).all())


def test_recording_takes_meta_tensors():
    with record(TARGETS["sm_90"]) as launches:
        _run(torch.empty(24, device="meta"))
    assert launches[0].args[0].device.type == "meta"


def test_counting_runs_too():
    out = torch.zeros(24)
    with record(run=True) as launches:
        _run(out)
        _run(out)
    assert len(launches) == 2 and bool((out == 4).all())


def test_nested_recorders_all_note_and_one_that_forbids_running_wins():
    out = torch.zeros(24)
    with record(run=True) as outer:
        _run(out)
        with record() as inner:
            _run(out)
        _run(out)
    assert (len(outer), len(inner)) == (3, 1)
    assert bool((out == 4).all())
    with record() as outer, record(run=True) as inner:
        _run(out)
    assert (len(outer), len(inner)) == (1, 1) and bool((out == 4).all())


def test_the_target_is_the_innermost_recorder_that_names_one():
    cpu = torch.device("cpu")
    assert target(cpu) is INTERPRETER and target(torch.device("meta")) is INTERPRETER
    with record(TARGETS["sm_80"]):
        assert target(cpu) is TARGETS["sm_80"]
        with record(TARGETS["gfx942"]):
            assert target(cpu) is TARGETS["gfx942"]
            with record():
                assert target(cpu) is TARGETS["gfx942"]
        assert target(cpu) is TARGETS["sm_80"]
    assert target(cpu) is INTERPRETER


@pytest.fixture
def fake_gpus(monkeypatch):
    """Two devices that differ, the second current."""
    h200 = types.SimpleNamespace(major=9, minor=0, multi_processor_count=132, shared_memory_per_block_optin=232448)
    a10 = types.SimpleNamespace(major=8, minor=6, multi_processor_count=72, shared_memory_per_block_optin=101376)
    monkeypatch.setattr(torch.cuda, "get_device_properties", [h200, a10].__getitem__)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    launching._device_target.cache_clear()
    yield
    launching._device_target.cache_clear()


@pytest.mark.usefixtures("fake_gpus")
def test_a_gpu_describes_itself(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", None)
    assert target(torch.device("cuda", 0)) == TARGETS["sm_90"]
    assert target(torch.device("cuda", 1)) == ("cuda", 86, 72, 101376, 32)
    assert target(torch.device("cuda")) == ("cuda", 86, 72, 101376, 32)


@pytest.mark.parametrize(
    ("name", "arch", "warp"),
    [("gfx942:sramecc+:xnack-", 942, 64), ("gfx1100", 1100, 32), ("gfx950", 950, 64)],
)
def test_an_amd_gpu_describes_itself(monkeypatch, name, arch, warp):
    properties = types.SimpleNamespace(gcnArchName=name, multi_processor_count=304)
    monkeypatch.setattr(torch.version, "hip", "7.0")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    launching._device_target.cache_clear()
    assert target(torch.device("cuda", 0)) == ("hip", arch, 304, 65536, warp)
    launching._device_target.cache_clear()


def test_a_target_of_every_kind_fits_its_waves():
    assert {t.kind for t in TARGETS.values()} == {"cuda", "hip"}
    assert all(t.warp == (64 if t.kind == "hip" else 32) for t in TARGETS.values())
    assert all(t.shared_memory <= 232448 for t in TARGETS.values())


def test_sizes():
    assert [cdiv(a, 4) for a in (0, 1, 4, 5, 8)] == [0, 1, 1, 2, 2]
    assert [next_power_of_2(n) for n in (0, 1, 2, 3, 16, 17, 255, 256)] == [1, 1, 2, 4, 16, 32, 256, 256]
    assert Tile() == (0, 0, 0, 4, 2)


def test_the_tensors_device_is_made_current(monkeypatch):
    made = []
    monkeypatch.setattr(torch.cuda, "device", lambda device: made.append(device) or _Null())
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    with launching.on_device(torch.empty(1)):
        assert made == []
    other = types.SimpleNamespace(device=torch.device("cuda", 1))
    with launching.on_device(other):
        assert made == [torch.device("cuda", 1)]
    with launching.on_device(types.SimpleNamespace(device=torch.device("cuda", 0))):
        assert len(made) == 1


class _Null:
    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None
