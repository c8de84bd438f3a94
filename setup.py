"""Builds the CPU library (csrc/cpu) and the CUDA library (csrc/cuda) as plain C into fastlora/_lib: no torch headers,
no Python ABI. Metadata is in pyproject.toml.

FASTLORA_BUILD=auto (default) builds each where its compiler is found and otherwise installs without it, leaving the
reason beside the package; =cpu builds the CPU library alone and makes a failure an error; =cuda builds both and makes a
failure of the CUDA library an error; =none builds neither.
"""

from __future__ import annotations

import concurrent.futures
import glob
import os
import pathlib
import shutil
import subprocess
import sys

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

MODE = os.environ.get("FASTLORA_BUILD", "") or "auto"
if MODE not in ("auto", "cpu", "cuda", "none"):
    raise SystemExit(f"FASTLORA_BUILD must be auto, cpu, cuda or none, got {MODE!r}")

# A compiler's response file, so that `make neon` and `make asan` compile as this does. No -march: each tier's source
# names its own target. No contraction: products that feed sums must round twice. Aligned loops are worth up to 2 % of
# the matrix kernel.
FLAGS_FILE = "csrc/cpu/flags.txt"
FLAGS = ["-O3", f"@{FLAGS_FILE}"]
OPENMP = ["-fopenmp"] if sys.platform == "linux" else []  # elsewhere it would bring a second OpenMP runtime
# Machine code for each generation, and PTX for those to come. "90a" has what 9.0 alone has.
CUDA_ARCHES = ("80", "86", "89", "90a", "100", "100ptx")
CUDA_FLAGS_FILE = "csrc/cuda/flags.txt"


def compiler() -> list[str]:
    """The C++ compiler's command: CXX, else g++ (whose OpenMP runtime torch brings along), else c++."""
    if chosen := os.environ.get("CXX", "").split():
        return chosen
    for name in ("g++", "c++"):
        if path := shutil.which(name):
            return [path]
    raise RuntimeError("no C++ compiler found when installing; reinstall with g++ present")


def nvcc() -> list[str]:
    """nvcc's command: CUDACXX, else that of CUDA_HOME or CUDA_PATH, else the one on the PATH.

    NVIDIA's packages for pip keep the runtime where their nvcc does not look: its folder is named.
    """
    chosen = os.environ.get("CUDACXX", "")
    for root in (os.environ.get("CUDA_HOME", ""), os.environ.get("CUDA_PATH", "")):
        candidate = pathlib.Path(root) / "bin" / "nvcc"
        chosen = chosen or (str(candidate) if root and candidate.is_file() else "")
    chosen = chosen or shutil.which("nvcc") or ""
    if not chosen:
        raise RuntimeError("no nvcc found when installing; reinstall with CUDA_HOME set")
    beside = pathlib.Path(chosen).resolve().parent.parent / "lib"
    return [chosen, *([f"-L{beside}"] if (beside / "libcudart_static.a").is_file() else [])]


def gencode(arch: str) -> str:
    """nvcc's option for an entry of CUDA_ARCHES."""
    number = arch.removesuffix("ptx")
    return f"-gencode=arch=compute_{number},code={'compute' if arch.endswith('ptx') else 'sm'}_{number}"


def run(command: list[str]) -> None:
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise RuntimeError(f"{command[0]} could not be started: {error}") from error
    if result.returncode:
        raise RuntimeError(f"{command[0]} failed: {result.stderr.strip()[:2000]}")


def compile_cuda(sources: list[str], target: pathlib.Path) -> None:
    """One library of every architecture in CUDA_ARCHES. Raises RuntimeError."""
    options = [CUDA_FLAGS_FILE, f'-DFL_ARCHES="{",".join(CUDA_ARCHES)}"', *map(gencode, CUDA_ARCHES)]
    run([*nvcc(), "--options-file", *options, "--threads", "0", "-shared", *sources, "-o", str(target)])


def reason_name(library: pathlib.Path) -> str:
    """The file that says why a library was not built; fastlora/backends/_{cpu,cuda}_library.py show its text."""
    return library.stem.removeprefix("libfastlora_") + "_build_failed.txt"


class BuildLibrary(build_ext):
    """Compiles the sources side by side and links them; "extension" is only setuptools' word for it."""

    built = False  # by this process

    def finalize_options(self) -> None:
        super().finalize_options()
        self.in_place_asked = bool(self.inplace)  # setuptools hides it from build_extension

    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split(".")) + ".so"

    def build_extension(self, ext: Extension) -> None:
        target = pathlib.Path(self.get_ext_fullpath(ext.name))
        # An editable install reads the source tree, whatever directory setuptools builds in.
        in_tree = self.in_place_asked or self.editable_mode
        places = [target.parent, pathlib.Path("fastlora/_lib")] if in_tree else [target.parent]
        for place in places:
            place.mkdir(parents=True, exist_ok=True)
            for name in (target.name, reason_name(target)):
                (place / name).unlink(missing_ok=True)
        cuda = ext is CUDA
        what = "CUDA" if cuda else "CPU"
        try:
            if cuda:
                compile_cuda(ext.sources, target)
            else:
                self.compile(ext, target)
        except RuntimeError as error:
            if what.lower() == MODE:
                raise SystemExit(f"fastlora: the {what} library was not built: {error}") from error
            print(f"fastlora: installing without the {what} library: {error}", file=sys.stderr)
            for place in places:
                (place / reason_name(target)).write_text(f"{error}\n", encoding="utf-8")
            return
        BuildLibrary.built = True
        for place in places[1:]:
            if place.resolve() != target.parent.resolve():
                shutil.copy2(target, place / target.name)

    def compile(self, ext: Extension, target: pathlib.Path) -> None:
        command = compiler()
        temporary = pathlib.Path(self.build_temp)
        temporary.mkdir(parents=True, exist_ok=True)
        objects = [str(temporary / (pathlib.Path(source).stem + ".o")) for source in ext.sources]
        jobs = [[*command, *FLAGS, *OPENMP, "-c", s, "-o", o] for s, o in zip(ext.sources, objects, strict=True)]
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            list(pool.map(run, jobs))
        run([*command, "-shared", *OPENMP, *objects, "-o", str(target)])

    def copy_extensions_to_source(self) -> None:
        """Done in `build_extension`: there may be no library to copy."""

    def get_outputs(self) -> list[str]:
        built = [pathlib.Path(self.get_ext_fullpath(ext.name)) for ext in self.extensions]
        return [str(path) for lib in built for path in (lib, lib.parent / reason_name(lib)) if path.is_file()]


class PlatformWheel(bdist_wheel):
    """The library depends on the platform but on no Python version; without it the wheel is pure."""

    def get_tag(self) -> tuple[str, str, str]:
        return ("py3", "none", super().get_tag()[2] if BuildLibrary.built else "any")


CPU = Extension(
    "fastlora._lib.libfastlora_cpu",
    sources=sorted(glob.glob("csrc/cpu/*.cpp")),
    depends=sorted([FLAGS_FILE, *glob.glob("csrc/cpu/*.h"), *glob.glob("csrc/include/*.h")]),
)
CUDA = Extension(
    "fastlora._lib.libfastlora_cuda",
    sources=["csrc/cuda/api.cu"],
    depends=sorted([CUDA_FLAGS_FILE, *glob.glob("csrc/cuda/*.h"), *glob.glob("csrc/include/*.h")]),
)

setup(
    ext_modules={"none": [], "cpu": [CPU]}.get(MODE, [CPU, CUDA]),
    cmdclass={"build_ext": BuildLibrary, "bdist_wheel": PlatformWheel},
)
