"""DDP, FSDP2 and sharded checkpoints through torch's own engine, in small worlds of gloo processes."""

from __future__ import annotations

import time

import pytest
import torch
import torch.distributed.checkpoint as dcp

import fastlora
from benchmarks import scaling
from tests import distributed_workers as workers
from tests.distributed_tools import KINDS, TIMEOUT, batch, make, run_world, train
from tests.distributed_workers import ROWS

pytestmark = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="torch has no gloo here")


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    return ((got.double() - want.double()).norm() / want.double().norm().clamp_min(1e-30)).item()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("world")


@pytest.fixture(scope="module")
def world(folder):
    return run_world(2, folder, workers.everything, str(folder))


def test_ddp_gradients_equal_one_process(world):
    for kind in KINDS:
        model = make(kind)
        model(batch(ROWS)).square().mean().backward()
        want = workers.gradients(model)
        assert want
        for found in world:
            assert found["ddp"][kind].keys() == want.keys()
            for name, gradient in want.items():
                assert relative(found["ddp"][kind][name], gradient) <= 1e-6, (kind, name)


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("kind", list(KINDS))
def test_fsdp2_trains_as_one_process(world, kind, mixed):
    model = make(kind)
    alone = train(model, 4, ROWS)
    shares = (found["fsdp"][f"{kind}-{mixed}"]["losses"] for found in world)
    together = [(a + b) / 2 for a, b in zip(*shares, strict=True)]
    if mixed:  # bf16 parameters in the forward: the same start, then a trajectory of its own
        assert together[0] == pytest.approx(alone[0], rel=1e-2)
    else:
        assert together == pytest.approx(alone, rel=1e-5)
    assert together[-1] < together[0]


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("kind", list(KINDS))
def test_fsdp2_full_state_reloads_on_one_process(world, kind, mixed):
    first, second = (found["fsdp"][f"{kind}-{mixed}"] for found in world)
    fresh, model = make(kind), make(kind)
    for name, value in fresh.state_dict().items():
        if ".weight." in name:  # packed bytes and scales: never cast, never changed
            assert torch.equal(first["state"][name], value), name
    model.load_state_dict(first["state"])
    with torch.no_grad():
        y = model(batch(ROWS, 99))
    assert torch.equal(first["y"], second["y"])
    if mixed:
        assert relative(first["y"], y) <= 2e-2
    else:
        assert torch.equal(first["y"], y)


@pytest.mark.parametrize("kind", list(KINDS))
def test_fsdp2_saves_an_adapter_that_one_process_loads(world, kind):
    found = world[0]["fsdp"][f"{kind}-False"]
    model = make(kind)
    fastlora.load_adapter(model, found["saved"])
    with torch.no_grad():
        assert torch.equal(model(batch(ROWS, 99)), found["y"])


def test_sharded_checkpoint_loads_into_another_world(world, folder, tmp_path):
    for y in run_world(3, tmp_path, workers.checkpoint_load, str(folder / "saved")):
        assert torch.equal(y, world[0]["saved"])


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_sharded_checkpoint_loads_without_processes(world, folder):
    model = make("qdora")
    state = model.state_dict()
    dcp.load(state, checkpoint_id=str(folder / "saved"), no_dist=True)
    model.load_state_dict(state)
    with torch.no_grad():
        assert torch.equal(model(batch(ROWS, 99)), world[0]["saved"])


def test_a_missing_shard_is_an_error_on_every_process(world):
    for found in world:
        assert "__1_" in found["missing"]
        assert found["missing_seconds"] < TIMEOUT


def test_an_adapter_absent_on_one_process_is_an_error_on_every_one(world, folder):
    assert all("processes disagree" in found["absent"] for found in world)
    assert not (folder / "absent").exists()


def test_killing_a_process_while_saving_leaves_the_previous_adapter(tmp_path):
    saved = tmp_path / "saved"
    started = time.monotonic()
    with pytest.raises(Exception, match=r"exit code 17|Process 1|terminated"):
        run_world(2, tmp_path, workers.killed_while_saving, str(saved))
    assert time.monotonic() - started < 2 * TIMEOUT
    model = fastlora.load_adapter(make("qlora"), saved)
    with torch.no_grad():
        assert torch.equal(model(batch(ROWS)), make("qlora")(batch(ROWS)))


def test_trainable_parameters_of_two_dtypes_are_refused_clearly(world):
    assert all("dtype" in found["dtypes"] for found in world)


def test_sharded_layers_refuse_what_needs_the_full_weight(world):
    assert all(found["refusals"] == {"merge": True, "add": True} for found in world)


def test_the_model_on_paper_has_the_published_size():
    llama = scaling.MODELS[0]
    assert llama.linear_parameters() + llama.other_parameters() == 8_030_261_248  # as published for Llama 3 8B
