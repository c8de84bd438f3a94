"""The ahead-of-time compiler: what it specialises on, what it counts, and that its gate refuses what is bad."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

pytest.importorskip("triton")

from benchmarks import aot, aot_compile
from fastlora.backends.triton.launch import TARGETS

ROOT = Path(__file__).resolve().parent.parent
GOOD = {
    "kernel": "k",
    "target": "sm_90",
    "spills": 0,
    "half": True,
    "matrix": {"HGMMA": 8},
    "shared": 98304,
    "specialisation": "w_ptr:*u8/16 table_ptr:*fp32 n:i32 BLOCKSIZE=64 BLOCK_M=16 BLOCK_N=64 BLOCK_K=128 warps=4",
    "instructions": 700,
    "loop": 256,
    "registers": 100,
    "warps": 4,
    "warp": 32,
}


def _script(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A run in a process where kernels are compiled, not interpreted."""
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=inherited | {"PYTHONPATH": str(ROOT)} | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


def _records(what: str, *targets: str) -> list[dict]:
    done = _script("tests/aot_kernels.py", what, *targets)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


# --- the gate ---------------------------------------------------------------------------------------------------------


def test_the_gate_passes_what_is_good():
    assert aot.faults(GOOD) == []
    assert aot.faults(GOOD | {"half": False, "matrix": {}}) == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"spills": 3}, "3 spills"),
        ({"matrix": {}}, "16-bit product without matrix instructions"),
        ({"instructions": 2}, "nothing but a trap: more tensor memory than the target has"),
        ({"shared": 232449}, "232449 bytes of shared memory, the target has 232448"),
        ({"target": "gfx942", "shared": 65537}, "65537 bytes of shared memory, the target has 65536"),
    ],
)
def test_the_gate_refuses_what_is_bad(change, words):
    assert aot.faults(GOOD | change) == [words]


def test_the_gate_names_every_fault():
    assert len(aot.faults(GOOD | {"spills": 1, "matrix": {}, "shared": 1 << 20})) == 3


@pytest.mark.slow
def test_the_gate_refuses_bad_machine_code():
    widened, spilled, large = _records("bad", "sm_90")
    assert aot.faults(widened) == ["16-bit product without matrix instructions"]
    assert widened["dots"] == {"f32*f32": 1} and not widened["matrix"]
    assert spilled["spills"] > 0 and f"{spilled['spills']} spills" in aot.faults(spilled)
    assert large["shared"] > TARGETS["sm_90"].shared_memory
    assert aot.faults(large) == [f"{large['shared']} bytes of shared memory, the target has 232448"]


@pytest.mark.slow
def test_kernels_compile_for_gpus_this_machine_lacks():
    families = {"sm_80": "HMMA", "sm_90": "HGMMA", "gfx942": "v_mfma"}
    records = _records("good", *families)
    for target, family in families.items():
        ours = [record for record in records if record["target"] == target]
        assert {record["kernel"] for record in ours} >= {"__main__.product_kernel", "expand._expand_kernel"}
        for record in ours:
            assert aot.faults(record) == []
            assert 0 < record["registers"] <= 512 and record["instructions"] > record["loop"] >= 0
        product = next(record for record in ours if record["kernel"] == "__main__.product_kernel")
        assert product["matrix"] and all(name.startswith(family) for name in product["matrix"])
        assert product["dots"] == {"bf16*bf16": 1} and product["half"] and product["shared"] > 0 and product["loop"]


# --- the specialisation -----------------------------------------------------------------------------------------------


def test_launches_are_specialised_as_the_jit_does():
    one, odd, wide, *ampere = _records("specialisations", "sm_90", "sm_80")
    assert one["text"].startswith("x_ptr:*fp32/16 n=1 factor:fp32 other_ptr=None BLOCK=64")
    assert odd["text"].startswith("x_ptr:*fp32/16 n:i32 factor:fp32 other_ptr:*fp32 BLOCK=64")
    assert wide["text"].startswith("x_ptr:*fp32/16 n:i64/16 factor:fp32 other_ptr:*fp32/16 BLOCK=64")
    assert one["source"] == odd["source"] == wide["source"]
    assert len({one["key"], odd["key"], wide["key"]}) == 3
    assert {each["key"] for each in ampere}.isdisjoint({one["key"], odd["key"], wide["key"]})
    assert [each["text"] for each in ampere] == [one["text"], odd["text"], wide["text"]]


def test_the_interpreter_is_refused():
    done = _script("tests/aot_kernels.py", "specialisations", "sm_90", TRITON_INTERPRET="1")
    assert done.returncode != 0 and "start Python without TRITON_INTERPRET" in done.stderr


_HASH = """
import importlib.util, sys
from benchmarks.aot_compile import source_hash
for path in sys.argv[1:]:
    spec = importlib.util.spec_from_file_location("kernels", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    print(source_hash(module.outer))
"""
_KERNELS = """
import triton
import triton.language as tl

LIMIT = tl.constexpr(3)


@triton.jit
def inner(x):
    return x + LIMIT


@triton.jit
def other(x):
    return x


@triton.jit
def outer(x_ptr):
    tl.store(x_ptr, inner(tl.load(x_ptr)))
"""


def test_the_source_hash_follows_what_is_called_and_read_but_not_where_it_stands(tmp_path):
    texts = {
        "first": _KERNELS,
        "moved": _KERNELS.replace("LIMIT =", "\n\n# further down\nLIMIT ="),
        "not_called": _KERNELS.replace("    return x\n", "    return x * 2\n"),
        "called": _KERNELS.replace("x + LIMIT", "x - LIMIT"),
        "read": _KERNELS.replace("constexpr(3)", "constexpr(4)"),
    }
    for name, text in texts.items():
        assert name == "first" or text != _KERNELS
        (tmp_path / f"{name}.py").write_text(text)
    done = _script("-c", _HASH, *(str(tmp_path / f"{name}.py") for name in texts))
    assert done.returncode == 0, done.stderr
    found = dict(zip(texts, done.stdout.split(), strict=True))
    assert found["first"] == found["moved"] == found["not_called"]
    assert len({found["first"], found["called"], found["read"]}) == 3


# --- counting ---------------------------------------------------------------------------------------------------------

SASS = """
        .global         kernel
.text.kernel:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
.L_x_0:
        /*0010*/              @!P0 LDG.E.128 R4, desc[UR6][R2.64] ;
.L_x_1:
        /*0020*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], R24 ;
        /*0030*/                   STL.64 [R1], R4 ;
        /*0040*/              @!UP1 LDL R4, [R1] ;
        /*0050*/               @P1 BRA `(.L_x_1) ;
        /*0060*/               @P2 BRA `(.L_x_0) ;
        /*0070*/               @P2 BRA `(.L_x_3) ;
        /*0080*/                   HMMA.16816.F32.BF16 R4, R4, R8, R4 ;
.L_x_3:
        /*0090*/                   EXIT ;
.L_x_2:
        /*00a0*/                   BRA `(.L_x_2);
        /*00b0*/                   NOP;
        /*00c0*/                   NOP;
"""

GCN = """
kernel:
        s_load_dwordx2 s[0:1], s[4:5], 0x0
.LBB0_1:
        v_mfma_f32_32x32x8_bf16_1k a[0:15], v[0:1], v[2:3], a[0:15]
        ds_read_b128 v[0:3], v4
        scratch_load_dwordx2 v[0:1], off, off offset:8 ; 8-byte Folded Reload
        v_writelane_b32 v40, s30, 0
        s_nop 1
        s_cbranch_scc1 .LBB0_1
        s_cbranch_scc1 .LBB0_9
        buffer_store_dwordx4 v[0:3], v4, s[0:3], 0 offen
.LBB0_9:
        s_endpgm
        .vgpr_count:     96
"""


def test_sass_is_counted():
    found = aot_compile.read_sass(SASS)
    assert found == {"instructions": 10, "spills": 2, "matrix": {"HGMMA": 1, "HMMA": 1}, "loop": 4}


def test_gcn_is_counted():
    found = aot_compile.read_gcn(GCN)
    assert found == {"instructions": 9, "spills": 1, "matrix": {"v_mfma_f32_32x32x8_bf16_1k": 1}, "loop": 5}


def test_instructions_per_decoded_weight():
    # 256 instructions of a loop, 128 threads, 64 x 128 weights a pass.
    assert aot.per_element(GOOD) == 4.0
    assert aot.per_element(GOOD | {"loop": 0}) == pytest.approx(700 * 128 / (64 * 128), abs=0.01)
    assert (
        aot.per_element(GOOD | {"specialisation": "w_ptr:*bf16/16 table_ptr=None BLOCKSIZE=0 BLOCK_N=64 BLOCK_K=128"})
        is None
    )


# --- files ------------------------------------------------------------------------------------------------------------


def test_the_committed_figures_hide_no_fault():
    runs = json.loads(aot.RESULTS.read_text())["triton"]
    assert {"3.6.0", "3.9.0"} <= set(runs)
    for run in runs.values():
        bad = [f"{record['kernel']} on {record['target']}" for record in run["kernels"] if aot.faults(record)]
        listed = [failure["what"].split(" (")[0] for failure in run["failures"]]
        assert not Counter(bad) - Counter(listed)
        assert {record["target"] for record in run["kernels"]} == set(aot.DEFAULT_TARGETS)
        assert len(run["kernels"]) > 300 and all(failure["why"] for failure in run["failures"])


def test_a_broken_cache_file_is_dropped(tmp_path, monkeypatch):
    monkeypatch.setattr(aot, "CACHE", tmp_path)
    monkeypatch.setattr(aot, "RESULTS", tmp_path / "none" / "aot.json")
    (tmp_path / "good.json").write_text(json.dumps(GOOD))
    (tmp_path / "bad.json").write_text('{"kern')
    assert aot.known(recorded=True) == {"good": ("cache", GOOD)}
    assert not (tmp_path / "bad.json").exists()


def test_another_tritons_figures_stay_in_the_file(tmp_path, monkeypatch):
    path = tmp_path / "aot.json"
    path.write_text(json.dumps({"schema": 1, "triton": {"1.0": {"kernels": [{"key": "a", "x": 1}], "failures": []}}}))
    aot.write(path, {}, 1.0)
    document = json.loads(path.read_text())
    assert document["triton"]["1.0"]["kernels"] == [{"key": "a", "x": 1}]
    assert len(document["triton"]) == 2
    monkeypatch.setattr(aot, "CACHE", tmp_path / "none")
    monkeypatch.setattr(aot, "RESULTS", path)
    assert aot.known(recorded=True) == {"a": ("recorded", {"key": "a", "x": 1})}
    assert aot.known(recorded=False) == {}
