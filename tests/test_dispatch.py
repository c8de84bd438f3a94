"""The registry: reasons, choice, forcing, caching and the words `explain` uses."""

from __future__ import annotations

import dataclasses
import types

import pytest
import torch

import fastlora
from fastlora import backends
from fastlora.dispatch import cost, registry
from fastlora.dispatch.registry import Kernel, Limits
from fastlora.errors import ConfigError, UnsupportedError
from fastlora.problem import BIAS, DENSE, DORA, DROPOUT, NEED_DX, TRAIN, Format, Problem

backends.load()
PROBLEM = Problem("lora_fwd", 64, 32, 48, 8, torch.float32, torch.float32, DENSE, BIAS, "cpu")


@pytest.fixture
def scratch(monkeypatch):
    """A registry of its own, so that test kernels do not stay."""
    monkeypatch.setattr(registry, "_kernels", {})
    monkeypatch.setattr(registry, "_selected", {})


def _kernel(backend, seconds=1.0, **limits):
    return registry.register(
        Kernel("lora_fwd", backend, run=lambda *a: backend, limits=Limits(**limits), seconds=lambda p: seconds)
    )


@pytest.mark.usefixtures("scratch")
def test_the_cheapest_able_kernel_is_chosen():
    slow = _kernel("slow", 2.0)
    fast = _kernel("fast", 1.0, dtypes=frozenset({torch.bfloat16}))
    assert registry.select(PROBLEM) is slow
    assert registry.select(PROBLEM._replace(dtype=torch.bfloat16)) is fast
    faster = _kernel("faster", 0.5)  # registering forgets earlier choices
    assert registry.select(PROBLEM) is faster


@pytest.mark.usefixtures("scratch")
@pytest.mark.parametrize(
    ("limits", "words"),
    [
        ({"devices": frozenset({"cuda"})}, "device must be one of cuda, got cpu"),
        ({"dtypes": frozenset({torch.float16})}, "dtype must be one of float16, got float32"),
        ({"adapter_dtypes": frozenset({torch.float16})}, "adapter dtype must be one of float16, got float32"),
        ({"formats": frozenset({"nf4", "fp4"})}, "weight format must be one of fp4, nf4, got dense"),
        ({"flags": DROPOUT}, "cannot do bias"),
        ({"max_m": 4}, "at most 4 tokens, got 64"),
        ({"max_r": 4}, "rank at most 4, got 8"),
        ({"missing": lambda: "library not built"}, "library not built"),
    ],
)
def test_every_limit_has_its_sentence(limits, words):
    _kernel("picky", **limits)
    with pytest.raises(UnsupportedError) as caught:
        registry.select(PROBLEM)
    assert caught.value.reasons == {"picky": [words]}
    assert words in str(caught.value) and str(PROBLEM) in str(caught.value)
    assert words in registry.explain(PROBLEM)


@pytest.mark.usefixtures("scratch")
def test_forcing_never_falls_back():
    _kernel("able")
    _kernel("unable", dtypes=frozenset({torch.float16}))
    assert registry.select(PROBLEM, "able").backend == "able"
    with pytest.raises(UnsupportedError, match="'unable' cannot run"):
        registry.select(PROBLEM, "unable")
    with pytest.raises(UnsupportedError, match="unknown backend 'nobody'"):
        registry.select(PROBLEM, "nobody")
    with fastlora.settings.override(backend="unable"), pytest.raises(UnsupportedError):
        registry.select(PROBLEM)
    assert registry.select(PROBLEM).backend == "able"  # the override ended


@pytest.mark.usefixtures("scratch")
def test_choices_are_cached_and_the_cache_is_bounded(monkeypatch):
    calls = []
    registry.register(
        Kernel("lora_fwd", "counting", run=len, limits=Limits(), seconds=lambda p: calls.append(p) or 1.0)
    )
    monkeypatch.setattr(registry, "_CACHE_SIZE", 3)
    for _ in range(5):
        registry.select(PROBLEM)
    assert len(calls) == 1
    for m in range(10):
        registry.select(PROBLEM._replace(m=m))
    assert len(registry._selected) <= 3


def test_every_op_has_a_reference_kernel():
    ops = {kernel.op for kernel in registry.kernels()}
    assert ops == {kernel.op for kernel in registry.kernels() if kernel.backend == "reference"}
    assert "lora_fwd" in ops and "lora_bwd" in ops


def test_explain_marks_the_choice():
    text = registry.explain(PROBLEM)
    chosen = registry.select(PROBLEM)
    arrow = [line for line in text.splitlines() if line.startswith("->")]
    assert len(arrow) == 1 and chosen.backend in arrow[0] and "us predicted" in arrow[0]
    layer = fastlora.QLoraLinear(48, 32, r=4, use_dora=True)
    words = layer.explain(16)
    assert all(op in words for op in ("lora_fwd", "lora_bwd", "dora_norm")) and "nf4/64+nested" in words


def test_work_counts():
    m, n, k, r = 128, 256, 512, 8
    problem = Problem("lora_fwd", m, n, k, r, torch.bfloat16, torch.float32, DENSE, 0, "cpu")
    work = cost.work(problem)
    assert work.flops == 2 * m * n * k + 2 * m * r * (n + k)
    assert work.bytes == 2 * n * k + 4 * r * (n + k) + 2 * m * (n + k)
    peft_dropout = problem._replace(flags=DORA | DROPOUT)
    assert cost.work(peft_dropout).flops - work.flops == 2 * m * n * k
    quantized = problem._replace(format=Format("nf4", 64, nested=True))
    assert cost.weight_bytes(quantized.format, n, k, 2) * 8 / (n * k) == pytest.approx(4.127, abs=1e-3)
    backward = problem._replace(op="lora_bwd", flags=NEED_DX)
    assert cost.work(backward).flops >= 2 * m * n * k
    assert cost.work(problem._replace(flags=TRAIN)).bytes > work.bytes


def test_settings_refuse_unknown_names_and_values(monkeypatch):
    with pytest.raises(ConfigError, match="bakend"), fastlora.settings.override(bakend="cpu"):
        pass
    monkeypatch.setenv("FASTLORA_LOW_MEMORY", "yes")
    with pytest.raises(ConfigError, match="FASTLORA_LOW_MEMORY must be 0 or 1, got 'yes'"):
        fastlora.settings._from_environment()
    monkeypatch.setenv("FASTLORA_LOW_MEMORY", "1")
    monkeypatch.setenv("FASTLORA_BACKEND", "reference")
    read = dataclasses.asdict(fastlora.settings._from_environment())
    assert read == dataclasses.asdict(fastlora.settings.Settings()) | {"low_memory": True, "backend": "reference"}


# --- predicted time ---------------------------------------------------------------------------------------------------


@pytest.fixture
def gpus(monkeypatch):
    """Two GPUs, an H200 and one that is in no table; the second is current."""
    h200 = types.SimpleNamespace(name="NVIDIA H200", major=9, minor=0, multi_processor_count=132)
    unknown = types.SimpleNamespace(
        name="NVIDIA L40S",
        major=8,
        minor=9,
        multi_processor_count=142,
        clock_rate=2_520_000,
        memory_clock_rate=9_001_000,
        memory_bus_width=384,
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", [h200, unknown].__getitem__)
    cost._gpu.cache_clear()
    yield
    cost._gpu.cache_clear()


@pytest.mark.usefixtures("gpus")
def test_each_gpu_has_its_own_rates():
    assert cost.device("cuda:0").name == "H200" and cost.device("cuda:0") is cost._GPUS["H200"]
    assert cost.device("cuda").name == cost.device("cuda:1").name == "NVIDIA L40S"  # the current one
    assert cost.device("cpu").host


@pytest.mark.usefixtures("gpus")
def test_an_unknown_gpu_is_described_by_its_properties():
    found = cost.device("cuda:1")
    # 142 multiprocessors at 2.52 GHz: datasheet 362 TFLOP/s (GeForce twins half), 91 TFLOP/s fp32, 864 GB/s.
    assert found.flops_16 == pytest.approx(0.75 * 142 * 2.52e9 * 512)
    assert 100e12 < found.flops_16 < 362e12 and 45e12 < found.flops_32 < 91e12
    assert found.flops_tf32 == found.flops_16 / 2
    assert 0.7 * 864e9 < found.bandwidth < 864e9 and not found.host


@pytest.mark.parametrize(
    ("facts", "flops_16", "tf32"),
    [
        ({"name": "Tesla T4", "major": 7, "minor": 5, "multi_processor_count": 40}, (15e12, 65e12), False),
        ({"name": "RTX 5090", "major": 12, "minor": 0, "multi_processor_count": 170}, (60e12, 210e12), True),
        ({"name": "GB300", "major": 10, "minor": 3, "multi_processor_count": 160}, (1200e12, 2500e12), True),
        (
            {"name": "MI210", "major": 9, "minor": 0, "multi_processor_count": 104, "gcnArchName": "gfx90a:sramecc+"},
            (90e12, 181e12),
            False,
        ),
    ],
)
def test_old_new_and_other_makers_gpus_get_plausible_rates(facts, flops_16, tf32):
    found = cost._unknown(types.SimpleNamespace(**facts))  # the clocks are not told
    assert flops_16[0] < found.flops_16 < flops_16[1]
    assert bool(found.flops_tf32) == tf32 and found.flops_32 <= found.flops_16
    assert 0.3e12 < found.bandwidth < 1e12


def test_the_table_is_ordered_so_that_the_longer_name_wins():
    names = list(cost._GPUS)
    for index, name in enumerate(names):
        assert not any(earlier in name for earlier in names[:index])
    for entry in cost._GPUS.values():
        assert entry.flops_16 > entry.flops_tf32 and entry.flops_16 > entry.flops_32 > entry.flops_tf32 / 20


@pytest.mark.usefixtures("gpus")
def test_building_blocks_of_a_prediction():
    on = cost._GPUS["H200"]
    m, n, k = 8192, 4096, 4096
    bf16, fp32, fp64 = torch.bfloat16, torch.float32, torch.float64
    assert cost.gemm_seconds(m, n, k, bf16, "cuda:0") == pytest.approx(2 * m * n * k / on.flops_16)
    assert cost.gemm_seconds(m, n, k, fp32, "cuda:0") == pytest.approx(2 * m * n * k / on.flops_32)
    assert cost.gemm_seconds(m, n, k, fp32, "cuda:0", own=True) == pytest.approx(2 * m * n * k / (on.flops_tf32 / 3))
    assert cost.gemm_seconds(m, n, k, fp64, "cuda:0") == pytest.approx(4 * m * n * k / on.flops_32)
    # One token: reading the weight decides.
    assert cost.gemm_seconds(1, n, k, bf16, "cuda:0") == pytest.approx((n * k + n + k) * 2 / on.bandwidth)
    assert cost.pass_seconds(43e9, "cuda:0") == pytest.approx(0.01)
    assert cost.launches_seconds(3, "cuda:0") == pytest.approx(12e-6)


@pytest.mark.usefixtures("gpus")
def test_the_roofline_of_a_gpu():
    problem = Problem("lora_fwd", 8192, 4096, 4096, 16, torch.bfloat16, torch.float32, DENSE, 0, "cuda:0")
    on = cost._GPUS["H200"]
    assert cost.roofline_seconds(problem) == pytest.approx(cost.work(problem).flops / on.flops_16 + on.launch)
    few = problem._replace(m=1)
    assert cost.roofline_seconds(few) == pytest.approx(cost.work(few).bytes / on.bandwidth + on.launch)


def test_a_cpus_rates_follow_its_threads():
    one = cost._host("cpu", 1)
    assert cost._host("cpu", 4).flops_32 == 4 * one.flops_32 and cost._host("cpu", 4).name == "cpu x4"
    assert cost.matrix_rate(torch.bfloat16, "cpu") == cost.matrix_rate(torch.float32, "cpu")
