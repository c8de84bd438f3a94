"""What goes wrong leaves nothing behind: memory that does not suffice, kernels that do not fit, arguments that lie."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from triton.runtime.errors import OutOfResources

from fastlora import backends
from fastlora.backends.triton import launch as launching
from fastlora.backends.triton import weight as weights
from fastlora.backends.triton.launch import record
from fastlora.config import LoraConfig
from fastlora.dispatch import registry, tuning
from fastlora.errors import UnsupportedError
from fastlora.functional import dora_weight_norm, lora_linear, qlora_linear
from fastlora.math import nf4
from fastlora.settings import override

backends.load()
M, N, K, R = 5, 16, 64, 3
DTYPE = torch.bfloat16


class Given:
    """One QDoRA layer's tensors, with a seed of its own."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(1)
        self.x = torch.randn(M, K, generator=generator).to(DTYPE).requires_grad_()
        self.w = (torch.randn(N, K, generator=generator) / 8).to(DTYPE)
        self.weight = nf4.pack(self.w, "nf4", 64, True)
        self.a = (torch.randn(R, K, generator=generator) / 8).requires_grad_()
        self.b = torch.randn(N, R, generator=generator).requires_grad_()
        self.mag = torch.rand(N, generator=generator).add(0.5).requires_grad_()

    def call(self, plan: str = "split", **changed: Any) -> torch.Tensor:
        """The forward, by Triton's interpreter."""
        given = {"x": self.x, "weight": self.weight, "a": self.a, "b": self.b, "scale": 1.5}
        options = {"magnitude": self.mag, "dropout_p": 0.3, "seed": 5, "dora_dropout": "shared"}
        values = given | options | {"backend": f"triton:{plan}"} | changed
        positional = [values.pop(name) for name in given]
        return qlora_linear(*positional, **values)

    def step(self, plan: str = "split") -> list[torch.Tensor]:
        """y and every gradient."""
        leaves = [self.x, self.a, self.b, self.mag]
        y = self.call(plan)
        return [y.detach(), *torch.autograd.grad(y.float().square().sum(), leaves)]


class Shortage:
    """Makes `torch.empty` fail at its n-th call from now on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.left, self.failed = -1, False
        empty = torch.empty

        def short(*size: Any, **keywords: Any) -> torch.Tensor:
            self.left -= 1
            if self.left == -1:
                self.failed = True
                raise torch.OutOfMemoryError("no memory is left")
            return empty(*size, **keywords)

        monkeypatch.setattr(torch, "empty", short)

    def after(self, calls: int) -> None:
        self.left, self.failed = calls, False


@pytest.mark.parametrize("plan", ["split", "dense"])
def test_after_an_out_of_memory_the_next_call_is_right(plan, monkeypatch):
    """Every allocation of a training step fails once, forward and backward."""
    given = Given()
    want = given.step(plan)
    shortage = Shortage(monkeypatch)
    met = 0
    while True:
        shortage.after(met)
        if not shortage_met(given, plan, shortage):
            break
        met += 1
        assert not launching._recorders
        assert all(leaf.grad is None for leaf in (given.x, given.a, given.b, given.mag))
        if met != 5:  # the whole step at once, once: the interpreter is slow
            continue
        shortage.after(-1)
        for one, other in zip(given.step(plan), want, strict=True):
            assert torch.equal(one, other)
    assert met >= 8
    shortage.after(-1)
    for one, other in zip(given.step(plan), want, strict=True):
        assert torch.equal(one, other)


def shortage_met(given: Given, plan: str, shortage: Shortage) -> bool:
    """Whether the step met the shortage and raised it."""
    try:
        with record():  # what is launched does not matter here
            given.step(plan)
    except torch.OutOfMemoryError:
        return shortage.failed
    return False


def test_constants_are_not_kept_from_a_failure(monkeypatch):
    monkeypatch.setattr(weights, "_made", {})
    device = torch.device("meta")

    def fails() -> torch.Tensor:
        raise torch.OutOfMemoryError

    with pytest.raises(torch.OutOfMemoryError):
        weights.made_once("x", device, fails)
    assert weights.made_once("x", device, lambda: torch.zeros(2)).shape == (2,)


def test_a_plan_without_memory_is_not_what_tuning_remembers(monkeypatch, tmp_path):
    given = Given()
    monkeypatch.setattr(registry, "_selected", {})
    monkeypatch.setattr(registry, "_HOPELESS", float("inf"))
    monkeypatch.setattr(tuning, "tuner", tuning.Tuner(tmp_path / "tuning.json"))
    asked = []

    def measured(run, kind):
        asked.append(kind)
        return float("inf")

    monkeypatch.setattr(tuning, "seconds_of", measured)
    with override(tune=True), record():
        given.call("", backend="triton")
    assert len(asked) > 1 and not (tmp_path / "tuning.json").exists()


def test_a_kernel_that_does_not_fit_says_so():
    class Large:
        __name__ = "_large_kernel"

        def __getitem__(self, grid):
            def run(*args, **options):
                raise OutOfResources(300000, 232448, "shared memory")

            return run

    with pytest.raises(UnsupportedError, match=r"_large_kernel does not fit this device: .*300000.*232448"):
        launching.launch(Large(), (1,))


# --- arguments --------------------------------------------------------------------------------------------------------


def shorter(name: str) -> dict[str, Any]:
    weight = Given().weight
    return {"weight": weight._replace(**{name: getattr(weight, name)[:-1]})}


WRONG = {
    "x of another width": lambda g: {"x": torch.zeros(M, K + 1, dtype=DTYPE)},
    "a of another width": lambda g: {"a": torch.zeros(R, K + 1)},
    "b of another height": lambda g: {"b": torch.zeros(N + 1, R)},
    "ranks that differ": lambda g: {"b": torch.zeros(N, R + 1)},
    "a of integers": lambda g: {"a": torch.zeros(R, K, dtype=torch.int32)},
    "a and b of two dtypes": lambda g: {"b": torch.zeros(N, R, dtype=DTYPE)},
    "x of integers": lambda g: {"x": torch.zeros(M, K, dtype=torch.int64)},
    "a short magnitude": lambda g: {"magnitude": torch.zeros(N - 1)},
    "a short bias": lambda g: {"bias": torch.zeros(N - 1)},
    "a on another device": lambda g: {"a": torch.zeros(R, K, device="meta")},
    "scale NaN": lambda g: {"scale": float("nan")},
    "scale infinite": lambda g: {"scale": float("inf")},
    "p of one": lambda g: {"dropout_p": 1.0},
    "a seed of two": lambda g: {"seed": torch.tensor([1, 2])},
    "a negative seed": lambda g: {"seed": -1},
    "unknown semantics": lambda g: {"dora_dropout": "other"},
    "packed too short": lambda g: shorter("packed"),
    "absmax too short": lambda g: shorter("absmax"),
    "nested_absmax too short": lambda g: shorter("nested_absmax"),
    "no nested_offset": lambda g: {"weight": g.weight._replace(nested_offset=None)},
    "another blocksize": lambda g: {"weight": g.weight._replace(blocksize=32)},
    "absmax on another device": lambda g: {"weight": g.weight._replace(absmax=g.weight.absmax.to("meta"))},
}


@pytest.mark.parametrize("plan", ["split", "dense", "fused", "skinny"])
@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
def test_wrong_arguments_are_refused_before_any_launch(wrong, plan):
    given = Given()
    changed = {"magnitude": None} | wrong(given)  # no magnitude: its norm would be the first to look
    with record() as launches, pytest.raises((ValueError, TypeError)):
        given.call(plan, **changed)
    assert not launches


@pytest.mark.parametrize("name", ["packed", "absmax", "nested_absmax"])
def test_a_weight_with_a_short_part_is_refused_everywhere(name):
    given, weight = Given(), shorter(name)["weight"]
    with record() as launches:
        with pytest.raises(ValueError, match=f"{name}: expected shape"):
            dora_weight_norm(weight, given.a, given.b, 1.0, backend="triton")
        with pytest.raises(ValueError, match=f"{name}: expected shape"):
            torch.ops.fastlora.dequantize(*weight[:7], False, weight.shape, DTYPE, "triton")
        saved = torch.zeros(M, R)
        with pytest.raises(ValueError, match=f"{name}: expected shape"):
            torch.ops.fastlora.qlora_bwd(
                torch.zeros(M, N, dtype=DTYPE), given.x, *weight[:7], False, given.a, given.b, 1.0,
                None, None, saved, None, None, None, 0, 0.0, 0, "triton",
            )  # fmt: skip
    assert not launches


def test_rank_0_is_refused_by_configuration_and_is_the_frozen_layer_below():
    with pytest.raises(ValueError, match="r must be"):
        LoraConfig(r=0, target_modules=["q"])
    given = Given()
    frozen = {"a": given.a[:0], "b": given.b[:, :0], "magnitude": None, "dropout_p": 0.0}
    y = given.call("split", **frozen)
    w = nf4.dequantize(given.weight, DTYPE)
    torch.testing.assert_close(y, given.x @ w.T)


def test_a_dense_weight_of_another_dtype_or_with_a_gradient_is_refused():
    given = Given()
    for weight in (given.w.half(), given.w.clone().requires_grad_(), given.w[0]):
        with record() as launches, pytest.raises((ValueError, TypeError)):
            lora_linear(given.x, weight, given.a, given.b, 1.0, backend="triton")
        assert not launches


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"x": torch.zeros(M, K, dtype=torch.float64)}, "dtype must be one of bfloat16, float16, float32, got float64"),
        ({"a": torch.zeros(300, K), "b": torch.zeros(N, 300)}, "rank at most 256, got 300"),
    ],
)
def test_a_forced_backend_lists_why_it_cannot(changed, words):
    with record() as launches, pytest.raises(UnsupportedError, match=words) as caught:
        Given().call("", backend="triton", magnitude=None, **changed)
    assert not launches and set(caught.value.reasons) == {"triton"}
    assert len(caught.value.reasons["triton"]) >= 5  # each of the five plans says why


def test_a_forced_plan_names_its_own_limit():
    x = torch.zeros(65, K, dtype=DTYPE)
    with record() as launches, pytest.raises(UnsupportedError, match="at most 64 tokens, got 65"):
        Given().call("skinny", x=x, magnitude=None)
    assert not launches
