"""What the CUDA kernels cost as compiled: `python -m benchmarks.cuda_resources LIBRARY`, no GPU needed.

Reads registers, spills, shared memory and matrix instructions of every kernel and architecture out of the library with
cuobjdump (of CUDA, or the one Triton's package carries), fails on a fault, and writes benchmarks/results/cuda.json,
which tests compare with the sources.
"""

from __future__ import annotations

import argparse
import collections
import hashlib
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks/results/cuda.json"
SHARED_LIMIT = 48 << 10  # bytes a block gets without asking
_MATRIX = re.compile(r"\b(HMMA|QGMMA|HGMMA|UTCHMMA)\b")
_SPILL = re.compile(r"\b(STL|LDL)\b")  # stores and loads of thread-local memory
_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(.*?);")
_USAGE = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")
_NAME = re.compile(r"_Z\d+(?P<kernel>\w+?_kernel)(?P<rest>.*)")


def source_hash() -> str:
    """Names the state of what the library is compiled from."""
    digest = hashlib.sha256()
    for folder in ("csrc/cuda", "csrc/include"):
        for path in sorted((ROOT / folder).iterdir()):
            if path.name != "emulate.h":
                digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def cuobjdump() -> str:
    """The tool's path.

    Raises:
        SystemExit: neither CUDA nor Triton brings it.
    """
    if found := shutil.which("cuobjdump"):
        return found
    import triton

    path = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    if not path.is_file():
        raise SystemExit("no cuobjdump: it comes with CUDA and with Triton's package")
    return str(path)


def _lines(*options: str) -> Iterable[str]:
    done = subprocess.run([cuobjdump(), *options], capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def readable(symbol: str) -> str:
    """_Z17skinny_mma_kernelI8Bf16TypeLi4ELb1EEv4Args -> skinny_mma_kernel<bf16,4,true>."""
    match = _NAME.match(symbol)
    if match is None:
        return symbol
    rest = match["rest"]
    words = [name.lower() for name in re.findall(r"(Bf16|F16|F32)Type", rest)]
    words += re.findall(r"Li(\d+)E", rest)
    words += [("false", "true")[int(bit)] for bit in re.findall(r"Lb(\d)E", rest)]
    return match["kernel"] + (f"<{','.join(words)}>" if words else "")


def table(library: Path) -> dict[str, dict[str, dict[str, int]]]:
    """architecture -> kernel -> registers, stack, shared, spills, matrix and all instructions."""
    found: dict[str, dict[str, dict[str, int]]] = collections.defaultdict(dict)
    arch = symbol = ""
    for line in _lines("-res-usage", str(library)):
        if "arch = " in line:
            arch = line.split("= ")[1].strip()
        elif line.strip().startswith("Function "):
            symbol = line.split()[1].rstrip(":")
        elif (match := _USAGE.search(line)) and _NAME.match(symbol):
            registers, stack, shared, local = map(int, match.groups())
            found[arch][readable(symbol)] = {"registers": registers, "stack": stack + local, "shared": shared}
    counts: dict[str, int] = {}
    for line in _lines("-sass", str(library)):
        if "arch = " in line:
            arch = line.split("= ")[1].strip()
        elif "Function : " in line:
            counts = found[arch].get(readable(line.split(" : ")[1].strip()), {})
            counts |= {"instructions": 0, "matrix": 0, "spills": 0}
        elif match := _INSTRUCTION.match(line):
            counts["instructions"] += 1
            counts["matrix"] += bool(_MATRIX.search(match[1]))
            counts["spills"] += bool(_SPILL.search(match[1]))
    return {arch: dict(sorted(kernels.items())) for arch, kernels in sorted(found.items())}


def faults(arch: str, kernel: str, record: dict[str, int]) -> list[str]:
    """What the gate refuses in one compiled kernel, in words."""
    where, found = f"{arch} {kernel}", []
    if record["spills"] or record["stack"]:
        found.append(f"{where}: {record['spills']} spills, {record['stack']} bytes of stack")
    if "mma" in kernel and not record["matrix"]:
        found.append(f"{where}: no matrix instruction")
    if record["shared"] > SHARED_LIMIT:
        found.append(f"{where}: {record['shared']} bytes of shared memory")
    return found


def all_faults(architectures: dict[str, dict[str, dict[str, int]]]) -> list[str]:
    """`faults` of a whole table."""
    return [
        fault
        for arch, kernels in architectures.items()
        for name, one in kernels.items()
        for fault in faults(arch, name, one)
    ]


def main(arguments: list[str] | None = None) -> int:
    """Write the table; 1 if something is at fault."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("library", type=Path)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    architectures = table(options.library)
    wrong = all_faults(architectures)
    report: dict[str, Any] = {"sources": source_hash(), "architectures": architectures}
    options.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    for arch, kernels in architectures.items():
        most = max(kernels.values(), key=lambda record: record["registers"])
        print(f"{arch}: {len(kernels)} kernels, at most {most['registers']} registers")
    print("\n".join(wrong) or "no faults")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
