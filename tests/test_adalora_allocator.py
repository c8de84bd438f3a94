"""The rank allocator beside PEFT's: budgets, scores, masks; resuming; the calls it refuses."""

from __future__ import annotations

import copy

import pytest
import torch

import fastlora
from fastlora import ConfigError, StateDictError
from fastlora.adalora import AdaLoraConfig, RankAllocator, orthogonal_penalty, rank_pattern
from tests.adalora_tools import SCHEDULE, copy_adapter, fields, move_adapter, ours, random_gradients, tensors_of, theirs
from tests.model_tools import layers_of, llama, unchanged

SCHEDULES = {
    "all phases": {},
    "every step": {"deltaT": 1, "tinit": 0, "tfinal": 0},
    "no final phase": {"tfinal": 0},
    "betas": {"beta1": 0.5, "beta2": 0.97},
    "sparse": {"deltaT": 7, "tinit": 3},
    "to one": {"target_r": 1, "init_r": 7},
}
EVERY_SCHEDULE = pytest.mark.parametrize("changes", SCHEDULES.values(), ids=SCHEDULES)


def allocator_of(model, **changes):
    return RankAllocator(model, AdaLoraConfig(**fields(**changes)))


def descend(parameters, gradients, rate=1e-3):
    """A plain optimizer step by given gradients, which stay for the allocator."""
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.grad = gradients[name].clone()
            parameter.sub_(gradients[name], alpha=rate)


# --- beside PEFT ------------------------------------------------------------------------------------------------------


@EVERY_SCHEDULE
def test_fifty_steps_are_pefts(changes):
    """On the same gradients: budgets and masks exactly equal, scores to the bit."""
    peft_model, model = theirs(**changes), ours(**changes)
    move_adapter(peft_model)
    copy_adapter(peft_model, model)
    reference, allocator = peft_model.base_model, allocator_of(model, **changes)
    mine, other = tensors_of(model), tensors_of(peft_model)
    assert mine.keys() == other.keys()
    pruned, revived = set(), set()
    for step in range(1, SCHEDULE["total_step"] + 1):
        gradients = random_gradients(mine, seed=step)
        descend(mine, gradients)
        descend(other, gradients)
        reference.update_and_allocate(step)
        budget = allocator.step(step)
        assert budget == reference.rankallocator.budget_schedule(step)[0]
        for name in mine:
            assert torch.equal(mine[name], other[name]), (step, name)
        if not allocator.frozen:
            _same_scores(allocator, reference.rankallocator, model)
        pattern = peft_model.peft_config["default"].rank_pattern
        if pattern is not None and allocator.budget(step)[1]:
            assert rank_pattern(model) == {name.removesuffix(".default"): kept for name, kept in pattern.items()}
        if allocator.budget(step)[1]:
            now = {(name, row) for name, kept in rank_pattern(model).items() for row, k in enumerate(kept) if not k}
            revived |= pruned - now
            pruned = now
    assert allocator.frozen
    assert sum(map(sum, rank_pattern(model).values())) == allocator.budget(50)[0]
    assert len({sum(kept) for kept in rank_pattern(model).values()}) > 1, "every layer kept as many: nothing moved"
    assert revived, "no triplet came back: the test shows less than it should"


def _same_scores(allocator, reference, model):
    names = list(layers_of(model))
    for name, score in zip(names, allocator.scores(), strict=True):
        e, a, b = (reference._element_score(f"{name}.lora_{part}.default") for part in "EAB")
        assert torch.equal(score, e.view(-1) + (a.mean(1) + b.mean(0)))


@EVERY_SCHEDULE
def test_the_schedule_is_pefts_at_every_step(changes):
    reference = theirs(**changes).base_model.rankallocator
    allocator = allocator_of(ours(**changes), **changes)
    for step in range(SCHEDULE["total_step"] + 20):
        budget, allocates = reference.budget_schedule(step)
        assert allocator.budget(step) == (budget, allocates or step == SCHEDULE["total_step"] - _tfinal(changes))


def _tfinal(changes):
    return {**SCHEDULE, **changes}["tfinal"]


def test_statistics_of_sixteen_bit_adapters_are_kept_in_fp32():
    model = ours(adapter_dtype=torch.bfloat16)
    move_adapter(model)
    allocator = allocator_of(model)
    gradients = {name: g.bfloat16() for name, g in random_gradients(tensors_of(model), 0).items()}
    descend(tensors_of(model), gradients)
    allocator.step(1)
    name, layer = next(iter(layers_of(model).items()))
    seen = (layer.lora_A["default"].detach().float() * gradients[f"{name}.lora_A"].float()).abs()
    state = allocator.state_dict()
    assert torch.equal(state["sensitivity"][f"{name}.lora_A"], seen * (1 - 0.85))


# --- by hand ----------------------------------------------------------------------------------------------------------


def one_layer(init_r=4, **schedule):
    config = AdaLoraConfig(init_r=init_r, lora_alpha=1, **schedule)
    layer = fastlora.LoraLinear(3, 2, bias=False, config=config)
    with torch.no_grad():
        layer.lora_A["default"].fill_(1.0)
        layer.lora_B["default"].fill_(1.0)
        layer.lora_E["default"].copy_(torch.tensor([[1.0], [2.0], [3.0], [4.0]]))
    return layer, RankAllocator(layer, config)


def give_gradients(layer, e):
    layer.lora_A["default"].grad = torch.zeros(4, 3)
    layer.lora_B["default"].grad = torch.zeros(2, 4)
    layer.lora_E["default"].grad = torch.tensor(e)[:, None]


def test_scores_by_hand():
    layer, allocator = one_layer(target_r=2, total_step=10, beta1=0.5, beta2=0.75)
    give_gradients(layer, [1.0, 1.0, 1.0, 1.0])
    layer.lora_A["default"].grad[1, 2] = 6.0
    layer.lora_B["default"].grad[0, 3] = 8.0
    allocator.step(0)  # observes, does not allocate
    # From zero: S = 0.5 I, U = 0.25 (I - S) = 0.125 I, score = I^2 / 16; A's mean is over 3, B's over 2.
    want = torch.tensor([1.0, 4.0 + 36 / 3, 9.0, 16.0 + 64 / 2]) / 16
    assert torch.allclose(allocator.scores()[0], want, rtol=1e-6)
    assert layer.lora_E["default"].flatten().tolist() == [1, 2, 3, 4]


def test_ties_at_the_threshold_all_go():
    layer, allocator = one_layer(target_r=2, total_step=2, tinit=0)
    with torch.no_grad():
        layer.lora_E["default"].fill_(1.0)
    give_gradients(layer, [1.0, 1.0, 1.0, 5.0])
    allocator.step(0)
    assert allocator.step(2) == 2
    assert layer.lora_E["default"].flatten().tolist() == [0, 0, 0, 1]
    assert rank_pattern(layer) == {"lora_E": [False, False, False, True]}


def test_a_triplet_comes_back_before_the_freeze_and_not_after():
    layer, allocator = one_layer(target_r=3, total_step=5, tfinal=1, beta1=0.01, beta2=0.01)
    give_gradients(layer, [0.1, 5.0, 5.0, 5.0])
    allocator.step(1)
    give_gradients(layer, [0.1, 9.0, 9.0, 9.0])
    allocator.step(2)
    assert layer.lora_E["default"][0].item() == 0
    a = layer.lora_A["default"][0].clone()
    with torch.no_grad():
        layer.lora_E["default"][0] = 2.0  # as the optimizer may do: neither E nor A, B are cut off
    give_gradients(layer, [50.0, 0.01, 30.0, 30.0])
    assert rank_pattern(layer)["lora_E"] == [True] * 4  # dropping a triplet that is off zero would change the function
    allocator.step(3)
    assert layer.lora_E["default"].flatten().tolist() == [2, 0, 3, 4]
    allocator.step(4)
    assert allocator.frozen
    with torch.no_grad():
        layer.lora_E["default"][1] = 9.0
    give_gradients(layer, [0.0, 1e6, 0.0, 0.0])
    allocator.step(5)
    assert layer.lora_E["default"].flatten().tolist() == [2, 0, 3, 4]
    assert torch.equal(layer.lora_A["default"][0], a)


def test_as_many_ranks_as_at_the_start_masks_nothing():
    """PEFT's kthvalue(0) raises here."""
    changes = {"init_r": 6, "target_r": 6}
    model = move_adapter(ours(**changes))
    allocator = allocator_of(model, **changes)
    for step in range(1, 51):
        descend(tensors_of(model), random_gradients(tensors_of(model), step))
        assert allocator.step(step) == 36
    assert allocator.frozen
    assert all(all(kept) for kept in rank_pattern(model).values())
    assert all((layer.lora_E["default"] != 0).all() for layer in layers_of(model).values())


def test_a_freeze_that_was_stepped_over_comes_at_the_next_step():
    layer, allocator = one_layer(target_r=2, total_step=10, tfinal=5)
    give_gradients(layer, [1.0, 2.0, 3.0, 4.0])
    allocator.step(4)
    assert allocator.step(9) == 2
    assert allocator.frozen
    assert rank_pattern(layer) == {"lora_E": [False, False, True, True]}


def test_a_layer_without_gradient_keeps_its_statistics():
    model = move_adapter(ours())
    allocator = allocator_of(model)
    descend(tensors_of(model), random_gradients(tensors_of(model), 0))
    allocator.step(1)
    before = allocator.state_dict()["sensitivity"]
    left_out = next(iter(layers_of(model)))
    for part in "AEB":
        tensors_of(model)[f"{left_out}.lora_{part}"].grad = None
    allocator.step(2)
    after = allocator.state_dict()["sensitivity"]
    for name in before:
        assert torch.equal(before[name], after[name]) == name.startswith(left_out), name


def test_no_step_waits_for_the_device():
    """No value is read back: on a GPU each would be a wait."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            assert func.overloadpacket.__name__ not in ("_local_scalar_dense", "item", "nonzero", "is_nonzero"), func
            return func(*args, **(kwargs or {}))

    model = move_adapter(ours())
    allocator = allocator_of(model)
    with Watch():
        for step in range(1, 51):
            descend(tensors_of(model), random_gradients(tensors_of(model), step))
            allocator.step(step)
    assert allocator.frozen


# --- resuming ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stop", [0, 3, 10, 30, 41, 42, 46])
def test_a_resumed_run_is_the_uninterrupted_one(stop, tmp_path):
    def run(model, allocator, steps):
        for step in steps:
            descend(tensors_of(model), random_gradients(tensors_of(model), step))
            allocator.step(step)

    model = move_adapter(ours())
    allocator = allocator_of(model)
    run(model, allocator, range(1, stop + 1))
    torch.save({"model": model.state_dict(), "allocator": allocator.state_dict()}, tmp_path / "state.pt")
    run(model, allocator, range(stop + 1, 51))
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    again = ours()
    again.load_state_dict(state["model"])
    second = allocator_of(again)
    second.load_state_dict(state["allocator"])
    run(again, second, range(stop + 1, 51))
    assert second.frozen
    for name, tensor in tensors_of(model).items():
        assert torch.equal(tensor, tensors_of(again)[name]), name
    assert rank_pattern(again) == rank_pattern(model)


def test_the_state_is_a_copy():
    model = move_adapter(ours())
    allocator = allocator_of(model)
    descend(tensors_of(model), random_gradients(tensors_of(model), 0))
    allocator.step(1)
    state = allocator.state_dict()
    before = copy.deepcopy(state)
    descend(tensors_of(model), random_gradients(tensors_of(model), 1))
    allocator.step(6)
    assert all(torch.equal(before["sensitivity"][name], state["sensitivity"][name]) for name in before["sensitivity"])


def _bad_states(good):
    def changed(**parts):
        return {**copy.deepcopy(good), **parts}

    name = next(iter(good["sensitivity"]))
    lacking = dict(good["sensitivity"])
    del lacking[name]
    yield {}, "expected the state of a RankAllocator"
    yield [], "expected the state of a RankAllocator, got list"
    yield changed(schedule={**good["schedule"], "total_step": 51}), "total_step"
    yield changed(step="3"), "expected a step"
    yield changed(frozen=None), "expected a step and a flag"
    yield changed(sensitivity=lacking), "sensitivity: expected tensors of"
    yield changed(sensitivity={**good["sensitivity"], name: torch.zeros(2, 2)}), r"expected torch.float32 \(6, 32\)"
    yield changed(uncertainty={**good["uncertainty"], name: 3}), "got int"
    yield changed(kept={**good["kept"], next(iter(good["kept"])): torch.zeros(6)}), r"expected torch.bool \(6,\)"
    yield changed(uncertainty=None), "half of its statistics"
    yield changed(frozen=True, kept=None), "no pattern"


def test_a_foreign_state_changes_nothing():
    model = move_adapter(ours())
    allocator = allocator_of(model)
    for step in range(1, 13):
        descend(tensors_of(model), random_gradients(tensors_of(model), step))
        allocator.step(step)
    good = allocator.state_dict()
    pattern = rank_pattern(model)
    for state, words in _bad_states(good):
        with unchanged(model), pytest.raises(StateDictError, match=words):
            allocator.load_state_dict(state)
        now = allocator.state_dict()
        assert now["step"] == 12
        assert all(torch.equal(now["uncertainty"][name], good["uncertainty"][name]) for name in good["uncertainty"])
        assert rank_pattern(model) == pattern


# --- refused ----------------------------------------------------------------------------------------------------------


def test_calls_that_cannot_be_right_are_refused():
    model = move_adapter(ours())
    allocator = allocator_of(model)
    with unchanged(model), pytest.raises(ConfigError, match="before zero_grad"):
        allocator.step(1)
    descend(tensors_of(model), random_gradients(tensors_of(model), 0))
    allocator.step(2)
    for step, words in [(2, "after 2, got 2"), (1, "after 2, got 1"), (-1, "got -1"), (2.5, "got 2.5"), (True, "True")]:
        with unchanged(model), pytest.raises(ConfigError, match=words):
            allocator.step(step)
    assert allocator.state_dict()["step"] == 2


def test_a_freeze_without_statistics_is_refused():
    """PEFT raises a KeyError here; all scores would tie at zero and every triplet would go."""
    model = move_adapter(ours())
    allocator = allocator_of(model)
    descend(tensors_of(model), random_gradients(tensors_of(model), 0))
    with unchanged(model), pytest.raises(ConfigError, match="load_state_dict"):
        allocator.step(42)
    with pytest.raises(ConfigError, match="no step was observed"):
        allocator.scores()


def test_models_that_do_not_fit_are_refused():
    config = AdaLoraConfig(**fields())
    plain = fastlora.convert(llama(), r=2, quantize=None, progress=False)
    with pytest.raises(ConfigError, match="no layer has an AdaLoRA adapter 'default'; have none"):
        RankAllocator(plain, config)
    with pytest.raises(ConfigError, match="one AdaLoRA adapter that trains, found none"):
        orthogonal_penalty(plain)
    with pytest.raises(ConfigError, match="'other'; have default"):
        RankAllocator(ours(), config, "other")
    with pytest.raises(ConfigError, match="tinit=5, the config says 4"):
        RankAllocator(ours(), config.replace(tinit=4))
    with pytest.raises(TypeError, match="AdaLoraConfig"):
        RankAllocator(ours(), fastlora.LoraConfig())
    model = ours()
    fastlora.add_adapters(model, {"second": config})
    fastlora.set_adapter(model, ["default", "second"])
    with pytest.raises(ConfigError, match="found default, second"):
        rank_pattern(model)
    assert rank_pattern(model, "second").keys() == rank_pattern(model, "default").keys()


# --- the penalty ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weight", [0.5, 0.1, 0.0])
def test_the_penalty_and_its_gradients_are_pefts(weight):
    peft_model, model = theirs(orth_reg_weight=weight), ours(orth_reg_weight=weight)
    move_adapter(peft_model)
    copy_adapter(peft_model, model)
    ids = torch.arange(24).reshape(2, 12) % 61
    with_penalty = peft_model(input_ids=ids, labels=ids).loss
    want = with_penalty - peft_model.base_model.model(input_ids=ids, labels=ids).loss
    got = orthogonal_penalty(model)
    assert abs(got.item() - want.item()) <= 2e-6 * (1 + with_penalty.item())
    got.backward()
    norms = {}
    for name, tensor in tensors_of(peft_model).items():
        if not name.endswith("lora_E"):
            square = tensor @ tensor.T if name.endswith("lora_A") else tensor.T @ tensor
            norms[name] = (square - torch.eye(6)).norm()
    (weight * sum(norms.values()) / len(norms)).backward()
    for name in norms:
        mine, other = tensors_of(model)[name].grad, tensors_of(peft_model)[name].grad
        assert torch.allclose(mine, other, rtol=1e-5, atol=1e-7), name


def test_the_papers_penalty():
    model = move_adapter(ours())
    want = 0.0
    for layer in layers_of(model).values():
        a, b = layer.lora_A["default"].double(), layer.lora_B["default"].double()
        want += ((a @ a.T - torch.eye(6)) ** 2).sum() + ((b.T @ b - torch.eye(6)) ** 2).sum()
    got = orthogonal_penalty(model, weight=0.25, squared=True)
    assert abs(got.item() - 0.25 * want.item()) <= 1e-5 * want.item()
    with pytest.raises(ConfigError, match="at least 0"):
        orthogonal_penalty(model, weight=-1.0)
