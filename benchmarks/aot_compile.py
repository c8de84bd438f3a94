"""One recorded launch, compiled for one GPU on any machine, and what its machine code shows.

The launch is specialised exactly as Triton's own JIT would (an int of 1 and None become constants, pointers and ints
divisible by 16 say so), because the JIT's own binder is asked. Registers come from `cuobjdump`, everything else is
counted in the disassembly; for gfx942 both stand in the assembler text.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import hashlib
import inspect
import re
import subprocess
import tempfile
import textwrap
import time
from collections import Counter
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from fastlora.backends.triton.launch import Launch, compiler_options, interpreting

# Raised whenever the figures below are read in another way: older records are then no longer used.
READER = {"cuda": 3, "hip": 4}
GPUS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_89": GPUTarget("cuda", 89, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
_BIN = Path(triton.__file__).parent / "backends/nvidia/bin"
_DOT = re.compile(r"tt\.dot(?:_scaled)? .*: tensor<[\dx]*x(\w+)> \* tensor<[\dx]*x(\w+)>")
# A matrix instruction of any generation: Ampere, Hopper, Blackwell; AMD.
_MATRIX = re.compile(r"(HMMA|HGMMA|IMMA|QGMMA|UTC\w*MMA|DMMA|v_mfma_\w+|v_wmma_\w+)")


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What one kernel became.

    Attributes:
        kernel: its module's and its function's name.
        target: a key of `GPUS`.
        tile: blocks, warps and stages, as text.
        specialisation: argument types, constants and attributes, as text.
        source: hash of the kernel and all it calls, see `source_hash`.
        registers: 32-bit registers a thread (gfx942: vector registers, accumulators included).
        spills: instructions that touch thread-local memory (gfx942: scratch memory; scalar registers kept in lanes of
            a vector register are none).
        shared: bytes of shared memory a program.
        matrix: the matrix instructions, by name, with their counts.
        instructions: all instructions, padding left out.
        loop: instructions of the main loop, the innermost loop with most of them; 0 without one.
        warps, warp: warps a program, threads a warp.
        dots: the products of Triton's own IR by operand types, as "bf16*bf16", with their counts.
        half: whether matrix instructions are due: a product of 16-bit operands, or any product in a kernel whose first
            tensor is a 16-bit one.
        seconds: time the compiler took.
        binary: where asked for, the machine code.
    """

    kernel: str
    target: str
    tile: str
    specialisation: str
    source: str
    registers: int
    spills: int
    shared: int
    matrix: dict[str, int]
    instructions: int
    loop: int
    warps: int
    warp: int
    dots: dict[str, int]
    half: bool
    seconds: float
    binary: bytes | str | None = dataclasses.field(default=None, repr=False, compare=False)

    @property
    def matrix_instructions(self) -> int:
        """How many matrix instructions there are in all."""
        return sum(self.matrix.values())

    def per_element(self, elements: int, *, loop: bool = True) -> float:
        """Thread instructions per decoded element.

        Instructions of the main loop (of the whole kernel where there is no loop, or with `loop=False`), times the
        program's threads, over `elements`: how many elements one pass of that code decodes. The loop's count includes
        its loads, products and bookkeeping; a loop the compiler unrolled decodes as many times more elements.
        """
        count = self.loop if loop and self.loop else self.instructions
        return count * self.warps * self.warp / elements

    def record(self) -> dict[str, Any]:
        """Everything but the machine code, as JSON types."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "binary"}


# --- what is compiled -------------------------------------------------------------------------------------------------


def _reach(kernel: JITFunction) -> list[tuple[JITFunction, dict[str, Any]]]:
    """The kernel and every jitted function it can call, each with the constants it reads, in the order met."""
    found: dict[int, tuple[JITFunction, dict[str, Any]]] = {}
    waiting = [kernel]
    while waiting:
        function = waiting.pop(0)
        if id(function) in found:
            continue
        scope = function.fn.__globals__ | inspect.getclosurevars(function.fn).nonlocals
        constants: dict[str, Any] = {}
        found[id(function)] = (function, constants)
        tree = ast.parse(textwrap.dedent(inspect.getsource(function.fn)))
        for node in ast.walk(tree):
            value = None
            if isinstance(node, ast.Name):
                value = scope.get(node.id)
            elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                value = getattr(scope.get(node.value.id), node.attr, None)
            if isinstance(value, JITFunction):
                if not value.fn.__module__.startswith("triton."):  # Triton's own library goes by Triton's version
                    waiting.append(value)
            elif isinstance(value, triton.language.constexpr):
                constants[ast.unparse(node)] = value.value
    return list(found.values())


@functools.cache
def source_hash(kernel: JITFunction) -> str:
    """Hash of a kernel's source, of all it calls and of the constants they read; not of where the text stands."""
    digest = hashlib.sha256()
    for function, constants in _reach(kernel):
        tree = ast.parse(textwrap.dedent(inspect.getsource(function.fn)))
        digest.update(ast.unparse(tree).encode())  # without comments
        digest.update(repr(sorted(constants.items())).encode())
    return digest.hexdigest()[:16]


@dataclasses.dataclass(frozen=True)
class Specialisation:
    """A launch as the compiler sees it: two launches with equal `text` and `source` are one binary."""

    kernel: JITFunction
    target: str
    signature: dict[str, Any]
    constants: dict[tuple[int, ...], Any]
    attributes: dict[tuple[int, ...], Any]
    options: Any
    launch: Launch

    @property
    def tile(self) -> str:
        """Blocks, warps and stages."""
        blocks = [f"{name.removeprefix('BLOCK_')}{value}" for name, value in _blocks(self.launch).items()]
        return " ".join([*blocks, f"w{self.launch.num_warps}", f"s{self.launch.num_stages}"])

    @property
    def text(self) -> str:
        """Types, constants and attributes, one word an argument."""
        names = list(self.signature)
        words = []
        for index, name in enumerate(names):
            kind = self.signature[name]
            if kind == "constexpr":
                value = self.constants.get((index,))
                words.append(f"{name}={getattr(value, 'name', value)}")
            else:
                facts = {fact[0].removeprefix("tt.") for fact in self.attributes.get((index,), ())}
                words.append(f"{name}:{kind}{''.join('%' + fact for fact in sorted(facts))}")
        words.append(f"warps={self.launch.num_warps} stages={self.launch.num_stages} fusion={self.launch.fp_fusion}")
        if limit := getattr(self.options, "maxnreg", None):
            words.append(f"registers<={limit}")
        return " ".join(words).replace("%divisibility", "/16").replace("%pointer_range", "/32bit")

    @property
    def name(self) -> str:
        """Module and function."""
        return f"{self.kernel.__module__.rpartition('.')[2]}.{self.kernel.__name__}"

    @property
    def source(self) -> str:
        """Hash of the kernel's source."""
        return source_hash(self.kernel)

    @property
    def key(self) -> str:
        """Names the record of this binary, across runs and checkouts."""
        parts = [self.name, self.target, self.source, self.text, triton.__version__]
        parts.append(str(READER[GPUS[self.target].backend]))
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:24]


def _blocks(launch: Launch) -> dict[str, int]:
    given = {name: value for name, value in launch.constexprs.items() if isinstance(value, int) and name != "BLOCKSIZE"}
    return {name: value for name, value in given.items() if name.startswith("BLOCK") or name in ("R", "RANK")}


def specialise(launch: Launch, target_name: str) -> Specialisation:
    """The specialisation that Triton's JIT would compile for this launch on that GPU.

    Raises:
        RuntimeError: kernels were decorated for the interpreter (TRITON_INTERPRET=1).
    """
    if interpreting() or not isinstance(launch.kernel, JITFunction):
        raise RuntimeError("kernels are decorated for the interpreter: start Python without TRITON_INTERPRET")
    kernel = launch.kernel
    backend = make_backend(GPUS[target_name])
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    arch = GPUS[target_name].arch
    own = (launch.num_warps, launch.num_stages, launch.fp_fusion)
    options = compiler_options(arch if isinstance(arch, int) else 0, *own) | {"debug": False}
    bound, facts, options = bind(*launch.args, **launch.constexprs, **options)
    parsed, signature, constants, attributes = kernel._pack_args(backend, options, bound, facts, options)
    return Specialisation(kernel, target_name, signature, constants, attributes, parsed, launch)


def compile_launch(launch: Launch, target_name: str, *, keep: bool = False) -> Compiled:
    """Compile one recorded launch (see `launch.record`) for a key of `GPUS`; `keep` also returns the machine code."""
    return compile_specialisation(specialise(launch, target_name), keep=keep)


def compile_specialisation(what: Specialisation, *, keep: bool = False) -> Compiled:
    """Compile and read what came out."""
    begin = time.perf_counter()
    source = ASTSource(what.kernel, what.signature, what.constants, what.attributes)
    gpu = GPUS[what.target]
    made = triton.compile(source, target=gpu, options=what.options.__dict__)
    seconds = time.perf_counter() - begin
    code = made.asm["cubin"] if gpu.backend == "cuda" else made.asm["amdgcn"]
    figures = _read_cubin(code) if gpu.backend == "cuda" else _read_amdgcn(code)
    dots = Counter(f"{found[1]}*{found[2]}" for found in _DOT.finditer(str(made.asm["ttir"])))
    first = next((kind for kind in what.signature.values() if str(kind).startswith("*")), "")
    return Compiled(
        kernel=what.name,
        target=what.target,
        tile=what.tile,
        specialisation=what.text,
        source=what.source,
        shared=int(made.metadata.shared),
        warps=int(made.metadata.num_warps),
        warp=gpu.warp_size,
        dots=dict(dots),
        half=bool(dots) and (first in ("*bf16", "*fp16") or any("16" in operands for operands in dots)),
        seconds=round(seconds, 2),
        binary=code if keep else None,
        **figures,
    )


# --- what came out ----------------------------------------------------------------------------------------------------


def _run(tool: str, *arguments: str) -> str:
    done = subprocess.run([str(_BIN / tool), *arguments], capture_output=True, text=True, check=True, timeout=120)
    return done.stdout


def disassemble(cubin: bytes) -> str:
    """SASS of a cubin."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return _run("nvdisasm", "-c", file.name)


def _read_cubin(cubin: bytes) -> dict[str, Any]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _run("cuobjdump", "-res-usage", file.name)
        text = _run("nvdisasm", "-c", file.name)
    registers = re.search(r"REG:(\d+)", usage)
    if registers is None:
        raise ValueError(f"cuobjdump printed no register count: {usage!r}")
    return read_sass(text) | {"registers": int(registers[1])}


def read_sass(text: str) -> dict[str, Any]:
    """Counts from nvdisasm's listing: instructions, local-memory accesses, matrix instructions, the main loop."""
    labels: dict[str, int] = {}
    opcodes: list[str] = []
    jumps: list[tuple[int, str]] = []
    for line in text.splitlines():
        if label := re.match(r"\s*(\.L_[\w$]+):", line):
            labels[label[1]] = len(opcodes)
            continue
        found = re.match(r"\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)(.*);", line)
        if not found:
            continue
        if found[1].split(".")[0] == "BRA" and (to := re.search(r"`\((\.L_[\w$]+)\)", found[2])):
            jumps.append((len(opcodes), to[1]))
        opcodes.append(found[1])
    back = [(labels[to], at) for at, to in jumps if to in labels and labels[to] <= at]
    words = Counter(name.split(".")[0] for name in opcodes)
    matrix = Counter(found[1] for name in opcodes if (found := _MATRIX.match(name)))
    return {
        "instructions": len(opcodes) - words["NOP"] - sum(1 for first, last in back if first == last),
        "spills": words["LDL"] + words["STL"],
        "matrix": dict(matrix),
        "loop": _main_loop(back),
    }


def _read_amdgcn(text: str) -> dict[str, Any]:
    def fact(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", text)
        if found is None:
            raise ValueError(f"the assembler text has no .{name}")
        return int(found[1])

    return read_gcn(text) | {"registers": fact("vgpr_count")}


def read_gcn(text: str) -> dict[str, Any]:
    """Counts from an AMD assembler listing: instructions, scratch accesses, matrix instructions, the main loop."""
    labels: dict[str, int] = {}
    jumps: list[tuple[int, str]] = []
    matrix: Counter[str] = Counter()
    count = spills = 0
    for line in text.splitlines():
        if label := re.match(r"(\.LBB\w+):", line):
            labels[label[1]] = count
            continue
        found = re.match(r"\s+((?:s|v|ds|buffer|global|flat|scratch)_\w+)(.*)", line)
        if not found or found[1] == "s_nop":
            continue
        if found[1].startswith(("s_cbranch", "s_branch")) and (to := re.search(r"(\.LBB\w+)", found[2])):
            jumps.append((count, to[1]))
        if name := _MATRIX.match(found[1]):
            matrix[name[1]] += 1
        spills += found[1].startswith("scratch_")
        count += 1
    back = [(labels[to], at) for at, to in jumps if to in labels and labels[to] <= at]
    return {"instructions": count, "spills": spills, "matrix": dict(matrix), "loop": _main_loop(back)}


def _main_loop(back: list[tuple[int, int]]) -> int:
    """Instructions of the largest innermost loop, given (first, last) of every backward jump."""
    loops = [(first, last) for first, last in back if first < last]
    innermost = [
        (first, last)
        for first, last in loops
        if not any((first, last) != (a, b) and first <= a and b <= last for a, b in loops)
    ]
    return max((last - first + 1 for first, last in innermost), default=0)
