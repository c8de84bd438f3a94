"""Loading the CUDA library and choosing the backend: every reason why it cannot run, in words. No GPU is needed."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
from pathlib import Path
from types import ModuleType

import pytest
import setuptools
import torch

from fastlora import backends
from fastlora.backends import _cuda_library
from fastlora.dispatch import registry
from fastlora.errors import UnsupportedError
from fastlora.problem import DROPOUT, NEED_DA, NEED_DX, TRAIN, Format, Problem

backends.load()
ROOT = Path(__file__).resolve().parent.parent


def stub(folder: Path, abi: int, size: int, arches: str = "90a", status: int = 0) -> Path:
    """A library that says what it is and has every function, none of which does anything."""
    compiler = shutil.which("gcc") or shutil.which("cc") or pytest.skip("no C compiler")
    ops = "".join(f"long long fl_cuda_{op}(const void* args) {{ return {status}; }}\n" for op in _cuda_library.OPS)
    source = f"""
long long fl_cuda_abi_version() {{ return {abi}; }}
long long fl_cuda_args_bytes() {{ return {size}; }}
const char* fl_cuda_arches() {{ return "{arches}"; }}
const char* fl_cuda_error(long long status) {{ return "no kernel image"; }}
{ops}"""
    (folder / "stub.c").write_text(source)
    path = folder / f"stub{abi}.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-w", "-o", path, folder / "stub.c"], check=True)
    return path


def test_absent_library_says_what_to_do(tmp_path: Path) -> None:
    path = tmp_path / "libfastlora_cuda.so"
    assert _cuda_library.open_library(path) == (None, f"CUDA library not built (no file {path})")
    (tmp_path / _cuda_library.REASON_NAME).write_text("no nvcc found when installing")
    assert _cuda_library.open_library(path)[1] == "CUDA library not built (no nvcc found when installing)"


def test_unusable_files_are_refused(tmp_path: Path) -> None:
    text = tmp_path / "text.so"
    text.write_text("no library")
    assert "cannot be loaded" in _cuda_library.open_library(text)[1]
    whole = stub(tmp_path, _cuda_library.ABI_VERSION, 288).read_bytes()
    short = tmp_path / "short.so"
    short.write_bytes(whole[: len(whole) // 2])
    assert "cut short" in _cuda_library.open_library(short)[1]


def test_another_interface_is_refused(tmp_path: Path) -> None:
    size = _cuda_library._RECORD.size
    for abi, bytes_, ok in ((_cuda_library.ABI_VERSION, size, True), (0, size, False), (1, 8, False)):
        (folder := tmp_path / f"{abi}.{bytes_}").mkdir()
        found, why = _cuda_library.open_library(stub(folder, abi, bytes_))
        assert (found is not None) == ok
        assert (
            ok or f"has interface {abi}.{bytes_}, this package needs {_cuda_library.ABI_VERSION}.{size}: rebuild" in why
        )


@pytest.mark.parametrize(
    ("arches", "runs", "refused"),
    [
        ("80,86,89,90a,100,100ptx", [(8, 0), (8, 6), (8, 7), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0)], [(7, 5)]),
        ("90a", [(9, 0)], [(8, 9), (10, 0)]),
        ("86", [(8, 6), (8, 9)], [(8, 0), (9, 0)]),
        ("80ptx", [(8, 0), (12, 0)], [(7, 5)]),
    ],
)
def test_another_architecture_is_refused_by_name(
    tmp_path: Path, arches: str, runs: list[tuple[int, int]], refused: list[tuple[int, int]]
) -> None:
    found, _ = _cuda_library.open_library(stub(tmp_path, _cuda_library.ABI_VERSION, _cuda_library._RECORD.size, arches))
    assert found is not None
    assert [found.why_not_device(*each) for each in runs] == [""] * len(runs)
    for major, minor in refused:
        why = found.why_not_device(major, minor)
        assert f"this GPU is sm_{major}{minor}: rebuild" in why and arches.split(",")[0] in why


@pytest.mark.parametrize(("status", "why"), [(0, ""), (101, ""), (35, "CUDA library: no kernel image (35)")])
def test_a_driver_too_old_is_a_reason(tmp_path: Path, status: int, why: str) -> None:
    path = stub(tmp_path, _cuda_library.ABI_VERSION, _cuda_library._RECORD.size, status=status)
    found, _ = _cuda_library.open_library(path)
    assert found is not None
    assert found.why_not_driver() == why


def fwd(m: int = 4, flags: int = 0, kind: str = "nf4") -> Problem:
    fmt = Format(kind, 64) if kind != "dense" else Format()
    return Problem("lora_fwd", m, 64, 64, 8, torch.bfloat16, torch.float32, fmt, flags, "cuda")


def test_forced_backend_lists_its_reasons() -> None:
    if not _cuda_library.missing():
        pytest.skip("it runs here")
    with pytest.raises(UnsupportedError, match="CUDA library|no GPU"):
        registry.select(fwd(), "cuda")


def test_reasons_name_what_a_kernel_cannot_do() -> None:
    skinny, merge, dx = (
        next(each for each in registry.kernels(op) if each.backend == "cuda" and each.plan == plan)
        for op, plan in (("lora_fwd", "skinny"), ("lora_fwd", "merge"), ("lora_bwd", "skinny"))
    )

    def reasons(kernel: registry.Kernel, problem: Problem) -> list[str]:
        return [why for why in registry.why_not(kernel, problem) if why != _cuda_library.missing()]

    assert not reasons(skinny, fwd(64, TRAIN | DROPOUT)) and not reasons(merge, fwd(9000))
    assert reasons(skinny, fwd(65)) == ["at most 64 tokens, got 65"]
    assert reasons(skinny, fwd(kind="dense")) == ["weight format must be one of fp4, nf4, got dense"]
    assert reasons(merge, fwd(flags=TRAIN)) == ["cannot do train"]
    assert reasons(dx, fwd(16, NEED_DX)._replace(op="lora_bwd")) == []
    assert reasons(dx, fwd(16, NEED_DX | NEED_DA)._replace(op="lora_bwd")) == ["cannot do da"]


def test_never_chosen_by_itself() -> None:
    """Until a GPU has timed it, any other able backend goes first, where nothing but the prediction differs."""
    for kernel in (each for each in registry.kernels() if each.backend == "cuda"):
        for m in (1, 64):
            problem = fwd(m)._replace(op=kernel.op)
            others = [each for each in registry.kernels(kernel.op) if each.backend in ("reference", "triton")]
            assert others
            assert kernel.seconds(problem) > max(each.seconds(problem) for each in others)


# --- setup.py ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def setup_py(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.setattr(setuptools, "setup", lambda **options: None)
    monkeypatch.chdir(ROOT)
    spec = importlib.util.spec_from_file_location("fastlora_setup", ROOT / "setup.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_nvcc_is_looked_for_in_order(setup_py: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("CUDACXX", "CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RuntimeError, match="no nvcc found when installing"):
        setup_py.nvcc()
    for folder in ("path", "home/bin", "home/lib"):
        (tmp_path / folder).mkdir(parents=True)
    for place in ("path/nvcc", "home/bin/nvcc"):
        (tmp_path / place).write_text("#!/bin/sh\n")
        (tmp_path / place).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "path"))
    assert setup_py.nvcc() == [str(tmp_path / "path/nvcc")]
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
    assert setup_py.nvcc() == [str(tmp_path / "home/bin/nvcc")]
    (tmp_path / "home/lib/libcudart_static.a").touch()
    assert setup_py.nvcc() == [str(tmp_path / "home/bin/nvcc"), f"-L{tmp_path / 'home/lib'}"]
    monkeypatch.setenv("CUDACXX", "/opt/nvcc")
    assert setup_py.nvcc()[0] == "/opt/nvcc"


def test_architectures_and_reason_files(setup_py: ModuleType) -> None:
    assert setup_py.gencode("90a") == "-gencode=arch=compute_90a,code=sm_90a"
    assert setup_py.gencode("100ptx") == "-gencode=arch=compute_100,code=compute_100"
    assert setup_py.reason_name(_cuda_library.INSTALLED) == _cuda_library.REASON_NAME
