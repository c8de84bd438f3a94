"""The committed table of what the CUDA kernels cost as compiled, without nvcc: current, complete and free of faults."""

from __future__ import annotations

import copy
import json
import re

from benchmarks import cuda_resources

REPORT = json.loads(cuda_resources.RESULTS.read_text(encoding="utf-8"))
TABLE = REPORT["architectures"]


def test_table_is_of_these_sources() -> None:
    assert REPORT["sources"] == cuda_resources.source_hash(), "run: make cuda"


def test_every_architecture_has_every_kernel() -> None:
    setup = (cuda_resources.ROOT / "setup.py").read_text(encoding="utf-8")
    arches = re.search(r"CUDA_ARCHES = \((.*?)\)", setup)
    assert arches is not None
    built = {f"sm_{name}" for name in re.findall(r'"(\w+)"', arches[1]) if not name.endswith("ptx")}
    assert set(TABLE) == built
    sources = "".join(path.read_text() for path in sorted((cuda_resources.ROOT / "csrc/cuda").glob("*.h")))
    named = set(re.findall(r"FL_KERNEL\([^\n]*\) (\w+_kernel)\(", sources))
    for arch, kernels in TABLE.items():
        assert {name.partition("<")[0] for name in kernels} == named, arch
        assert kernels.keys() == TABLE["sm_80"].keys()


def test_no_kernel_is_at_fault() -> None:
    assert cuda_resources.all_faults(TABLE) == []


def test_a_fault_is_noticed() -> None:
    name = next(name for name in TABLE["sm_80"] if "mma" in name)
    for field, value in (("spills", 1), ("stack", 8), ("matrix", 0), ("shared", 1 << 16)):
        broken = copy.deepcopy(TABLE)
        broken["sm_80"][name][field] = value
        assert len(cuda_resources.all_faults(broken)) == 1, field


def test_kernels_are_named_as_in_the_source() -> None:
    names = {
        "_Z17skinny_mma_kernelI8Bf16TypeLi4ELb1EEv4Args": "skinny_mma_kernel<bf16,4,true>",
        "_Z19skinny_plain_kernelI7F32TypeEv4Args": "skinny_plain_kernel<f32>",
        "_Z13finish_kernel4Args6Finish": "finish_kernel",
    }
    assert {symbol: cuda_resources.readable(symbol) for symbol in names} == names
