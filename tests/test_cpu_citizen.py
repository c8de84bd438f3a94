"""The CPU library as a citizen of its process: threads, forks, memory, operands of any kind, and libraries that are
missing, foreign or broken."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import pathlib
import resource
import shutil
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch
from torch import Tensor

from fastlora import backends, settings
from fastlora.backends import _cpu_library, cpu
from fastlora.cli import explain
from fastlora.dispatch import registry
from fastlora.errors import UnsupportedError
from fastlora.math import nf4
from fastlora.ops.lora import lora_linear
from fastlora.ops.qlora import qlora_linear
from fastlora.problem import BIAS, NEED_DMAG, NEED_DX, TRAIN, Format, Problem
from tests.test_cpu_backend import (
    ALL_NEEDS,
    DTYPES,
    FOUND,
    MODES,
    WHY,
    Case,
    any_problem,
    check,
    one_thread,
    same,
    tier,
)

pytestmark = pytest.mark.skipif(FOUND is None, reason=WHY or "built")
__all__ = ["one_thread", "tier"]  # fixtures
LIBRARY = pathlib.Path(settings.current.cpu_library or _cpu_library.INSTALLED).resolve()


def train_case(dtype: torch.dtype = torch.float32) -> Case:
    flags = MODES["dora-peft"] | TRAIN | ALL_NEEDS
    return Case(300, 500, 640, 16, dtype, "nested", flags, torch.float32)


def test_threads_and_repeats_do_not_change_a_bit(tier: str) -> None:
    few = Case(4, 3000, 1024, 16, torch.float32, "nf4", 0, torch.float32)
    for case in (train_case(), train_case(torch.bfloat16), few):
        results = []
        for count in (1, 2, 2, 3):
            torch.set_num_threads(count)
            y, h, mask, z = case.forward()
            gradients = case.backward(h, mask, z) if h is not None else ()
            results.append([y, *(t for t in gradients if t is not None)])
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_repeated_calls_do_not_grow(tier: str) -> None:
    case = train_case()

    def once() -> None:
        _, h, mask, z = case.forward()
        case.backward(h, mask, z)

    for _ in range(3):
        once()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(20):
        once()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before <= 2048  # KiB


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", ["lora", "drop", "dora-peft"])
def test_scratch_is_bounded(tier: str, dtype: torch.dtype, mode: str) -> None:
    """One forward of 512 tokens: a decoded tile, an fp32 copy of x (and of the dropped x), a MiB; never the weight."""
    m, n, k, r = 512, 1536, 1024, 16
    case = Case(m, n, k, r, dtype, "nested", MODES[mode] | TRAIN, torch.float32)
    held = ctypes.CDLL(str(LIBRARY)).fl_scratch_bytes
    held.restype = ctypes.c_int64
    seen: list[int] = []

    def once() -> None:  # scratch belongs to the calling thread: a fresh one has none
        torch.set_num_threads(1)
        seen.append(held())
        case.forward()
        seen.append(held())

    thread = threading.Thread(target=once)
    thread.start()
    thread.join()
    tile, copy = 128 * 256 * 4, 4 * m * k * (2 if mode == "dora-peft" and dtype != torch.float32 else 1)
    assert seen[0] == 0
    assert 0 < seen[1] <= tile + copy + (1 << 20)
    assert seen[1] < 4 * n * k


def _checksum() -> float:
    torch.manual_seed(5)
    return Case(40, 200, 256, 8, torch.float32, "nf4", 0, torch.float32).forward()[0].sum().item()


def _forward_in_child(queue: multiprocessing.queues.Queue[float]) -> None:
    torch.set_num_threads(1)
    queue.put(_checksum())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_one_thread_works_after_a_fork() -> None:
    torch.set_num_threads(2)
    train_case().forward()  # the parent's pool exists
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_forward_in_child, args=(queue,))
    child.start()
    child.join(30)
    assert child.exitcode == 0
    assert queue.get(timeout=5) == _checksum()


def test_forced_tiers_are_checked() -> None:
    problem = any_problem()._replace(format=Format("nf4", 64))
    with settings.override(cpu_tier="quantum"):
        assert "unknown CPU tier" in _cpu_library.missing()
        with pytest.raises(UnsupportedError, match="unknown CPU tier"):
            registry.select(problem, "cpu")
        with pytest.raises(UnsupportedError, match="unknown CPU tier"):
            cpu.quantize(problem, torch.ones(8), "nf4", 64)
    assert FOUND is not None
    lacking = _cpu_library.Library.__new__(_cpu_library.Library)
    lacking.tiers = ("scalar",)
    assert "lacks the forced tier 'avx512'" in lacking.why_not_tier("avx512")
    with settings.override(cpu_tier="scalar"):
        assert _cpu_library.missing() == ""


def test_fp64_is_refused_with_a_reason() -> None:
    problem = any_problem("lora_fwd")._replace(dtype=torch.float64, adapter_dtype=torch.float64)
    with pytest.raises(UnsupportedError, match="dtype must be one of"):
        registry.select(problem, "cpu")


# --- threads ----------------------------------------------------------------------------------------------------------


def long_case() -> Case:
    return Case(512, 2048, 1024, 16, torch.float32, "nf4", 0, torch.float32, 64)


def busy_others() -> int:
    """Nanoseconds that this process's other threads have run."""
    total = 0
    for task in os.listdir("/proc/self/task"):
        if int(task) != threading.get_native_id():
            total += int(pathlib.Path(f"/proc/self/task/{task}/schedstat").read_text().split()[0])
    return total


@pytest.mark.skipif(not os.path.exists("/proc/self/schedstat"), reason="the kernel keeps no times of threads")
def test_it_follows_torch_set_num_threads() -> None:
    """Two threads, one, two again: another thread works exactly when it may."""
    case, shares = long_case(), []
    for count in (2, 1, 2):
        torch.set_num_threads(count)
        if count == 1:
            time.sleep(0.5)  # a waiting thread may spin for a while
        before, start = busy_others(), time.thread_time_ns()
        for _ in range(4):
            case.forward()
        own = time.thread_time_ns() - start
        shares.append((busy_others() - before) / own)
    assert shares[0] > 0.1 and shares[2] > 0.1, shares
    assert shares[1] < 0.01, shares


_POOLS = """
import os, torch
from tests.test_cpu_backend import Case, TIERS
from fastlora import settings
torch.set_num_threads(2)
torch.randn(600, 600) @ torch.randn(600, 600)
torch.randn(1 << 20).exp()
before = len(os.listdir("/proc/self/task"))
for tier in TIERS:
    with settings.override(cpu_tier=tier):
        Case(512, 512, 512, 16, torch.float32, "nf4", 0, torch.float32, 64).forward()
with open("/proc/self/maps") as maps:
    runtimes = {line.split()[-1] for line in maps if "libgomp" in line or "libomp" in line or "libiomp" in line}
print(before, len(os.listdir("/proc/self/task")), len(runtimes))
"""


def run_python(source: str, *arguments: str) -> str:
    command = [sys.executable, "-c", source, *arguments]
    result = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert result.returncode == 0, (result.returncode, result.stderr[-2000:])
    return result.stdout


@pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="the system does not list threads")
def test_there_is_no_second_pool_of_threads() -> None:
    before, after, runtimes = map(int, run_python(_POOLS).split())
    assert before == after and runtimes == 1


def test_other_python_threads_run_during_a_call() -> None:
    """A long call releases the GIL: a thread that wakes each millisecond does so within it."""
    case, woke, stop = long_case(), [], threading.Event()

    def tick() -> None:
        while not stop.is_set():
            woke.append(time.perf_counter())
            time.sleep(0.001)

    call = _cpu_library.Library.call
    spans = []

    def timed(library: _cpu_library.Library, op: str, record: bytes) -> None:
        start = time.perf_counter()
        call(library, op, record)
        spans.append((start, time.perf_counter()))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_cpu_library.Library, "call", timed)
        thread = threading.Thread(target=tick)
        thread.start()
        with settings.override(cpu_tier="scalar"):
            case.forward()
        stop.set()
        thread.join()
    ((start, end),) = spans
    assert end - start > 0.02, "the call is too short to tell"
    assert sum(start + 0.005 < at < end - 0.005 for at in woke) >= 2


class Checksums(torch.utils.data.Dataset[float]):
    """One forward an item, in the worker."""

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> float:
        assert torch.get_num_threads() == 1
        return _checksum()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_data_loaders_worker_computes_after_a_fork() -> None:
    torch.set_num_threads(2)
    train_case().forward()  # the parent's pool exists
    loader = torch.utils.data.DataLoader(
        Checksums(), batch_size=None, num_workers=1, multiprocessing_context="fork", timeout=60
    )
    assert list(loader) == [_checksum()] * 2


# --- operands of any kind ---------------------------------------------------------------------------------------------


def shifted(t: Tensor) -> Tensor:
    """t at an address that is no multiple of its item's size."""
    raw = t.detach().contiguous().view(-1).view(torch.uint8)
    buffer = torch.cat([raw.new_zeros(1), raw, raw.new_zeros(8)]).numpy()
    moved = torch.frombuffer(buffer.data, dtype=t.dtype, count=t.numel(), offset=1).view(t.shape)
    assert moved.data_ptr() % t.element_size()
    return moved


def forms_of(t: Tensor) -> dict[str, Tensor]:
    wide = torch.empty(t.shape[0], 2 * t.shape[1], dtype=t.dtype)
    odd = torch.empty(t.numel() + 1, dtype=t.dtype)[1:].view(t.shape)
    forms = {"transposed": t.t().contiguous().t(), "every second": wide[:, ::2], "odd start": odd}
    for name in ("every second", "odd start"):
        forms[name].copy_(t)
    return {**forms, "misaligned": shifted(t)}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("fmt", ["nested", "dense"])
def test_strided_and_misaligned_operands(tier: str, fmt: str, dtype: torch.dtype) -> None:
    """The same bits whatever the strides and the address of x, dy, w, a and b."""
    torch.manual_seed(20)
    for m in (3, 40):
        case = Case(m, 37, 128, 6, dtype, fmt, 0, dtype, 64)

        def results(x: Tensor, dy: Tensor, w: Tensor | nf4.PackedWeight, a: Tensor, b: Tensor) -> list[Tensor]:
            leaves = [t.detach().requires_grad_() for t in (x, a, b)]
            linear = lora_linear if isinstance(w, Tensor) else qlora_linear
            y = linear(leaves[0], w, *leaves[1:], 0.5, backend="cpu")  # type: ignore[arg-type]
            return [y.detach(), *torch.autograd.grad(y, leaves, dy)]

        expected = results(case.x, case.dy, case.weight, case.a, case.b)
        forms = [forms_of(t) for t in (case.x, case.dy, case.a, case.b)]
        for name in forms[0]:
            x, dy, a, b = (form[name] for form in forms)
            weight = forms_of(case.weight)[name] if isinstance(case.weight, Tensor) else case.weight
            found = results(x, dy, weight, a, b)
            assert all(torch.equal(f, e) for f, e in zip(found, expected, strict=True)), (m, name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_quantize_and_dequantize_anywhere(tier: str, dtype: torch.dtype) -> None:
    w = torch.randn(3, 100).to(dtype)
    packed, absmax = cpu.quantize(any_problem(), w, "nf4", 64)
    for name, form in forms_of(w).items():
        again = cpu.quantize(any_problem(), form, "nf4", 64)
        assert torch.equal(again[0], packed) and torch.equal(again[1], absmax), name
    weight = nf4.pack(w, "nf4", 64)
    expected = nf4.dequantize(weight, dtype)
    for name, out in forms_of(torch.full_like(expected, float("nan"))).items():
        assert cpu.dequantize(any_problem(), weight, dtype, out) is out and same(out.contiguous(), expected), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_empty_sides(tier: str, dtype: torch.dtype) -> None:
    """No tokens, no outputs, no inputs, no rank: every result has its shape, and empty sums are 0."""
    for m, n, k, r in (
        (0, 8, 64, 4),
        (3, 0, 64, 4),
        (3, 8, 0, 4),
        (3, 8, 64, 0),
        (0, 0, 0, 0),
        (40, 0, 64, 4),
        (40, 8, 0, 4),
    ):
        case = Case(m, n, max(k, 1), r, dtype, "dense", TRAIN | BIAS | (ALL_NEEDS & ~NEED_DMAG), torch.float32)
        if not k:
            case.x, case.weight, case.a = case.x[:, :0], torch.empty(n, 0, dtype=dtype), case.a[:, :0]
            case.problem, case.w = case.problem._replace(k=0), case.w[:, :0]
        check(case, tier)
    packed, absmax = cpu.quantize(any_problem(), torch.empty(0, 64, dtype=dtype), "nf4", 64)
    assert packed.shape == (0, 1) and absmax.shape == (0,)


def test_a_nan_block_stays_nan(tier: str) -> None:
    """A block that held a NaN makes its own output NaN and no other one."""
    torch.manual_seed(21)
    for m, fmt, dtype in ((3, "nf4", torch.float32), (40, "nested", torch.bfloat16), (40, "nf4", torch.float16)):
        case = Case(m, 40, 128, 4, dtype, "dense", 0, torch.float32)
        assert isinstance(case.weight, Tensor)
        case.weight[7, 70] = float("nan")
        case.weight = nf4.pack(case.weight, "nf4", 64)
        decoded = cpu.dequantize(any_problem(), case.weight, dtype)
        assert decoded[7, 64:].isnan().all() and int(decoded.isnan().sum()) == 64
        case.problem = case.problem._replace(format=Format("nf4", 64))
        bad = case.forward()[0].isnan()
        assert bad[:, 7].all() and int(bad.sum()) == m, fmt


@pytest.mark.slow
def test_more_than_2_to_31_weights(tier: str) -> None:
    """Rows beyond element 2^31 of a packed weight whose other blocks are 0: their pages are never made."""
    torch.manual_seed(22)
    n, k, some, blocksize = (1 << 21) + 5, 1024, 5, 1024
    last = nf4.pack(torch.randn(some, k), "nf4", blocksize)
    packed = torch.from_numpy(np.zeros((n * k // 2, 1), np.uint8))  # lazily zero, unlike torch.zeros
    absmax = torch.from_numpy(np.zeros((n, 4), np.uint8))
    packed[-some * k // 2 :], absmax[-some:] = last.packed, last.absmax
    whole = last._replace(packed=packed, absmax=absmax, shape=(n, k))
    x, dy, a, b = torch.randn(2, k), torch.randn(2, n), torch.randn(1, k), torch.zeros(n, 1)
    problem = Problem("lora_fwd", 2, n, k, 1, torch.float32, torch.float32, Format("nf4", blocksize), 0, "cpu")
    nothing = (None, None, None, 0, 0.0)
    y = cpu.lora_fwd(problem, x, whole, None, a, b, 1.0, *nothing)[0]
    assert not y[:, :-some].any()
    truth = nf4.dequantize(last, torch.float32).double()
    torch.testing.assert_close(y[:, -some:].double(), x.double() @ truth.T, rtol=1e-5, atol=1e-4)
    problem = problem._replace(op="lora_bwd", flags=NEED_DX)
    dx = cpu.lora_bwd(problem, dy, None, whole, a, b, 1.0, None, None, None, *nothing)[0]
    assert dx is not None
    torch.testing.assert_close(dx.double(), dy[:, -some:].double() @ truth, rtol=1e-5, atol=1e-4)


# --- what is refused, and libraries that are no use -------------------------------------------------------------------


def test_neon_is_known_and_refused_elsewhere() -> None:
    assert FOUND is not None and "neon" in _cpu_library.TIERS
    if "neon" in FOUND.tiers:
        pytest.skip("this CPU has it")
    with settings.override(cpu_tier="neon"):
        assert "lacks the forced tier 'neon'; it has: scalar" in _cpu_library.missing()
        with pytest.raises(UnsupportedError, match="lacks the forced tier 'neon'"):
            cpu.quantize(any_problem(), torch.ones(8), "nf4", 64)


@pytest.mark.parametrize("present", [False, True])
def test_amx_is_named_and_changes_no_choice(monkeypatch: pytest.MonkeyPatch, present: bool) -> None:
    """Nothing here uses AMX: `fastlora env` says so, and a CPU that has it runs what any other runs."""
    backends.load()
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: present)
    assert ("AMX" in cpu.describe()) == present
    for m, plan in ((4, "few"), (512, "tiled")):
        problem = Problem("lora_fwd", m, 4096, 4096, 16, torch.bfloat16, torch.float32, Format("nf4", 64), 0, "cpu")
        chosen = registry.select(problem)
        assert (chosen.backend, chosen.plan) == ("cpu", plan)


def test_fp64_goes_to_the_reference_and_explain_says_why() -> None:
    problem = any_problem("lora_fwd")._replace(dtype=torch.float64, adapter_dtype=torch.float64)
    backends.load()
    found = {(row["backend"], row["plan"]): row for row in explain.rows(problem)}
    assert found["reference", "torch"]["chosen"]
    for plan in ("few", "tiled"):
        assert any("dtype must be one of" in reason for reason in found["cpu", plan]["reasons"])


def useless(path: pathlib.Path) -> str:
    found, why = _cpu_library.open_library(path)
    assert found is None and "\n" not in why
    return why


def test_a_missing_or_foreign_library_is_a_reason(tmp_path: pathlib.Path) -> None:
    path = tmp_path / _cpu_library.INSTALLED.name
    assert "CPU library not built" in useless(path)
    (tmp_path / _cpu_library.REASON_NAME).write_text("no C++ compiler found when installing")
    assert "no C++ compiler found when installing" in useless(path)
    for text in ("", "not a library"):
        path.write_text(text)
        assert "cannot be loaded" in useless(path)


@pytest.mark.skipif(shutil.which("g++") is None, reason="no compiler")
@pytest.mark.parametrize("version", [0, _cpu_library.ABI_VERSION])
def test_a_library_of_another_version_is_a_reason(tmp_path: pathlib.Path, version: int) -> None:
    """An older interface, and the right number with a record of another size."""
    source, path = tmp_path / "other.cpp", tmp_path / "other.so"
    source.write_text(
        f'extern "C" long fl_abi_version() {{ return {version}; }} extern "C" long fl_args_bytes() {{ return 8; }}'
    )
    subprocess.run(["g++", "-shared", "-fPIC", str(source), "-o", str(path)], check=True)
    assert f"has interface {version}.8, this package needs {_cpu_library.ABI_VERSION}." in useless(path)


def test_a_library_without_our_functions_is_a_reason() -> None:
    assert "cannot be loaded" in useless(pathlib.Path(str(torch._C.__file__)))


_CUT = """
import pathlib, sys
from fastlora.backends import _cpu_library
whole, path = pathlib.Path(sys.argv[1]).read_bytes(), pathlib.Path(sys.argv[2])
for part in range(1, 20):
    path.unlink(missing_ok=True)  # a new file: one that was opened stays mapped
    path.write_bytes(whole[: len(whole) * part // 20])
    found, why = _cpu_library.open_library(path)
    assert "cannot be loaded" in why or part > 8 and found is not None, (part, why)
    if found is None:
        print(why)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ELF")
def test_a_library_cut_short_is_a_reason(tmp_path: pathlib.Path) -> None:
    """At any length, in a process of its own: the loader is killed where a segment lies beyond the file's end."""
    reasons = run_python(_CUT, str(LIBRARY), str(tmp_path / "cut.so")).splitlines()
    assert len(reasons) >= 8 and all("cut short" in why for why in reasons)


def test_without_a_library_layers_run_on_the_reference() -> None:
    case = Case(5, 24, 64, 4, torch.float32, "nf4", 0, torch.float32)
    operands = (case.x, case.weight, case.a, case.b, 0.5)
    expected = qlora_linear(*operands, backend="reference")
    backends.load()
    with settings.override(cpu_library="/nowhere/lib.so"):
        assert _cpu_library.missing() == "CPU library not built (no file /nowhere/lib.so)"
        assert registry.select(case.problem).backend == "reference"
        assert torch.equal(qlora_linear(*operands), expected)
        with pytest.raises(UnsupportedError, match="no file /nowhere/lib.so"):
            qlora_linear(*operands, backend="cpu")
    assert registry.select(case.problem).backend == "cpu"
