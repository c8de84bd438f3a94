"""Builds the CPU library (csrc/cpu) as plain C into fastlora/_lib: no torch headers, no Python ABI. Metadata is in
pyproject.toml.

FASTLORA_BUILD=auto (default) builds it where a C++ compiler is found and otherwise installs without it, leaving the
reason beside the package; =cpu makes a failure an error; =none does not try.
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
if MODE not in ("auto", "cpu", "none"):
    raise SystemExit(f"FASTLORA_BUILD must be auto, cpu or none, got {MODE!r}")

LIBRARY = "libfastlora_cpu.so"
REASON = "cpu_build_failed.txt"  # fastlora/backends/_cpu_library.py shows its text
# A compiler's response file, so that `make neon` and `make asan` compile as this does. No -march: each tier's source
# names its own target. No contraction: products that feed sums must round twice. Aligned loops are worth up to 2 % of
# the matrix kernel.
FLAGS_FILE = "csrc/cpu/flags.txt"
FLAGS = ["-O3", f"@{FLAGS_FILE}"]
OPENMP = ["-fopenmp"] if sys.platform == "linux" else []  # elsewhere it would bring a second OpenMP runtime


def compiler() -> list[str]:
    """The C++ compiler's command: CXX, else g++ (whose OpenMP runtime torch brings along), else c++."""
    if chosen := os.environ.get("CXX", "").split():
        return chosen
    for name in ("g++", "c++"):
        if path := shutil.which(name):
            return [path]
    raise RuntimeError("no C++ compiler found when installing; reinstall with g++ present")


def run(command: list[str]) -> None:
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise RuntimeError(f"{command[0]} could not be started: {error}") from error
    if result.returncode:
        raise RuntimeError(f"{command[0]} failed: {result.stderr.strip()[:2000]}")


class BuildLibrary(build_ext):
    """Compiles the sources side by side and links them; "extension" is only setuptools' word for it."""

    built = False  # by this process

    def finalize_options(self) -> None:
        super().finalize_options()
        self.in_place_asked = bool(self.inplace)  # setuptools hides it from build_extension

    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split(".")[:-1], LIBRARY)

    def build_extension(self, ext: Extension) -> None:
        target = pathlib.Path(self.get_ext_fullpath(ext.name))
        # An editable install reads the source tree, whatever directory setuptools builds in.
        in_tree = self.in_place_asked or self.editable_mode
        places = [target.parent, pathlib.Path("fastlora/_lib")] if in_tree else [target.parent]
        for place in places:
            place.mkdir(parents=True, exist_ok=True)
            for name in (LIBRARY, REASON):
                (place / name).unlink(missing_ok=True)
        try:
            self.compile(ext, target)
        except RuntimeError as error:
            if MODE == "cpu":
                raise SystemExit(f"fastlora: the CPU library was not built: {error}") from error
            print(f"fastlora: installing without the CPU library: {error}", file=sys.stderr)
            for place in places:
                (place / REASON).write_text(f"{error}\n", encoding="utf-8")
            return
        BuildLibrary.built = True
        for place in places[1:]:
            if place.resolve() != target.parent.resolve():
                shutil.copy2(target, place / LIBRARY)

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
        return [str(path) for library in built for path in (library, library.parent / REASON) if path.is_file()]


class PlatformWheel(bdist_wheel):
    """The library depends on the platform but on no Python version; without it the wheel is pure."""

    def get_tag(self) -> tuple[str, str, str]:
        return ("py3", "none", super().get_tag()[2] if BuildLibrary.built else "any")


EXTENSION = Extension(
    "fastlora._lib.libfastlora_cpu",
    sources=sorted(glob.glob("csrc/cpu/*.cpp")),
    depends=sorted([FLAGS_FILE, *glob.glob("csrc/cpu/*.h"), *glob.glob("csrc/include/*.h")]),
)

setup(
    ext_modules=[] if MODE == "none" else [EXTENSION],
    cmdclass={"build_ext": BuildLibrary, "bdist_wheel": PlatformWheel},
)
