"""The house rules that no linter knows: what importing loads, who reads the environment, what the command line says."""

from __future__ import annotations

import ast
import inspect
import json
import re
import struct
import subprocess
import sys
import typing
from collections.abc import Iterator
from pathlib import Path

import pytest

import fastlora
from fastlora import functional
from fastlora.cli import main as cli
from fastlora.math import nf4

ROOT = Path(__file__).resolve().parent.parent
MODULES = sorted((ROOT / "fastlora").rglob("*.py"))
LAZY = ["triton", "bitsandbytes", "peft", "transformers", "matplotlib", "typer", "rich", "tqdm", "safetensors"]


def in_fresh_process(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def parsed() -> Iterator[tuple[Path, ast.Module]]:
    for path in MODULES:
        yield path.relative_to(ROOT), ast.parse(path.read_text(encoding="utf-8"))


# --- importing --------------------------------------------------------------------------------------------------------


def test_import_loads_nothing_heavy():
    code = "import sys, torch; before = set(sys.modules); import fastlora; print(*sorted(set(sys.modules) - before))"
    loaded = {name.partition(".")[0] for name in in_fresh_process(code).split()}
    assert not loaded & set(LAZY)


def test_import_works_where_optional_packages_are_absent():
    # A None entry makes `import name` raise ImportError, as if the package were not installed.
    code = f"""
import sys, torch
sys.modules.update(dict.fromkeys({LAZY!r}))
import fastlora
layer = fastlora.QLoraLinear.from_linear(torch.nn.Linear(32, 16), r=2)
layer(torch.randn(3, 32)).sum().backward()
print(layer.lora_B["default"].grad.abs().sum().item() > 0)
"""
    assert in_fresh_process(code).split() == ["True"]


def test_import_starts_no_gpu_and_spawns_no_backend():
    code = """
import sys, torch, fastlora
from fastlora.dispatch import registry
print(torch.cuda.is_initialized(), registry.backends())
"""
    assert in_fresh_process(code).split() == ["False", "[]"]


# --- source -----------------------------------------------------------------------------------------------------------


def environment_readers(tree: ast.Module) -> Iterator[int]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv", "putenv"):
            yield node.lineno
        if isinstance(node, ast.ImportFrom) and node.module == "os":
            yield from (node.lineno for name in node.names if name.name in ("environ", "getenv", "putenv"))


def test_only_settings_reads_the_environment():
    found = {str(path) for path, tree in parsed() if any(environment_readers(tree))}
    assert found == {"fastlora/settings.py"}


def broad_handlers(tree: ast.Module) -> Iterator[int]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ExceptHandler):
            caught = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
            names = {getattr(kind, "id", None) for kind in caught}
            # Undoing and raising again, also at Ctrl-C, hides nothing.
            raises_again = isinstance(node.body[-1], ast.Raise) and node.body[-1].exc is None
            if (node.type is None or names & {"Exception", "BaseException"}) and not raises_again:
                yield node.lineno


def test_no_broad_except():
    assert [f"{path}:{line}" for path, tree in parsed() for line in broad_handlers(tree)] == []


def spellings() -> dict[str, set[str]]:
    """The NF4 codebook's uncommon values as they would be typed: decimal, hexadecimal, bit pattern."""
    values = [abs(value) for value in nf4.table("nf4").tolist() if value not in (0.0, -1.0, 1.0)]
    return {
        r"0\.\d{5,}": {f"{value:.9f}"[:7] for value in values},
        r"0x1\.[0-9a-f]{5,}": {value.hex()[:9] for value in values},
        r"\b[3b][0-9a-f]{7}\b": {struct.pack(">f", value).hex() for value in values},
    }


def test_one_codebook():
    sources = [*MODULES, *(path for path in (ROOT / "csrc").rglob("*") if path.is_file())]
    holders = set()
    for path in sources:
        text = path.read_text(encoding="utf-8").lower()
        for pattern, known in spellings().items():
            length = len(next(iter(known)))
            if len({number[:length] for number in re.findall(pattern, text)} & known) >= 3:
                holders.add(str(path.relative_to(ROOT)))
    assert holders == {"fastlora/math/nf4.py", "csrc/include/nf4_table.h"}


def test_files_stay_small():
    # About 500 lines: past that a file does two things.
    assert [f"{p.name}: {n}" for p in MODULES if (n := len(p.read_text(encoding="utf-8").splitlines())) > 550] == []


# --- public names -----------------------------------------------------------------------------------------------------


def public() -> list[tuple[str, object]]:
    found = [(name, getattr(fastlora, name)) for name in fastlora.__all__]
    return found + [(f"functional.{name}", getattr(functional, name)) for name in functional.__all__]


@pytest.mark.parametrize(("name", "thing"), public(), ids=lambda value: value if isinstance(value, str) else "")
def test_every_public_name_says_what_it_is(name, thing):
    assert inspect.getdoc(thing)
    if inspect.isclass(thing):
        own = {
            key: value for key, value in vars(thing).items() if not key.startswith("_") and inspect.isfunction(value)
        }
        assert [key for key, value in own.items() if not inspect.getdoc(getattr(thing, key))] == []


@pytest.mark.parametrize(("name", "thing"), public(), ids=lambda value: value if isinstance(value, str) else "")
def test_every_public_function_is_typed(name, thing):
    if inspect.isfunction(thing):
        hints = typing.get_type_hints(thing)
        assert set(inspect.signature(thing).parameters) | {"return"} <= set(hints)


def test_version_is_said_once():
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert re.search(r'^version = "(.+)"$', text, re.MULTILINE)[1] == fastlora.__version__


def test_readme_names_every_setting():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    source = (ROOT / "fastlora/settings.py").read_text(encoding="utf-8")
    for variable in set(re.findall(r"FASTLORA_[A-Z_]+", source)):
        assert f"`{variable}`" in readme


# --- command line -----------------------------------------------------------------------------------------------------


def test_env_json_parses(capsys):
    assert cli.run(["env", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["versions"]["fastlora"] == fastlora.__version__
    assert found["backends"]["reference"]["usable"]
    assert found["devices"]["cpu"]["threads"] >= 1
    for backend in found["backends"].values():
        assert backend["usable"] or backend["missing"]


def test_env_prints_every_backend(capsys):
    assert cli.run(["env"]) == 0
    out = capsys.readouterr().out
    assert "reference" in out
    assert "torch" in out


@pytest.mark.parametrize("extra", [[], ["--backward"], ["--quant", "nf4", "--dora", "--dropout", "--dtype", "fp32"]])
def test_explain_names_a_kernel(capsys, extra):
    sizes = ["-m", "512", "-n", "576", "-k", "576", "-r", "16", "--device", "cpu"]
    assert cli.run(["explain", *sizes, *extra]) == 0
    text = capsys.readouterr().out
    assert "->" in text
    assert cli.run(["explain", *sizes, *extra, "--json"]) == 0
    kernels = json.loads(capsys.readouterr().out)["kernels"]
    assert [kernel["chosen"] for kernel in kernels].count(True) == 1
    assert all(kernel["seconds"] is not None or kernel["reasons"] for kernel in kernels)


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["explain", "-m", "0", "-n", "8", "-k", "8"], 1, "m must be at least 1, got 0"),
        (["explain", "-m", "8", "-n", "8", "-k", "8", "--dtype", "int4"], 1, "'int4'; known: bf16"),
        (["explain", "-m", "8", "-n", "8", "-k", "8", "--quant", "int8"], 1, "'int8'; known: nf4"),
        (["explain", "-m", "many", "-n", "8", "-k", "8"], 2, "'-m'"),
        (["explain", "-n", "8", "-k", "8"], 2, "'-m'"),
        (["demo", "--steps", "0"], 1, "steps must be at least 1, got 0"),
        (["demo", "--json", "no/such/folder/result.json"], 1, "no such folder"),
        (["explain", "-m", "8", "-n", "8", "-k", "8", "--device", "tpu"], 1, "'tpu'; known: cpu, cuda"),
        (["fly"], 2, "'fly'"),
    ],
)
def test_errors_are_one_line(capsys, arguments, code, said):
    assert cli.run(arguments) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("fastlora: ")
    assert captured.err.count("\n") == 1
    assert said in captured.err


def test_interrupt_is_130(capsys, monkeypatch):
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("fastlora.dispatch.registry.explain", interrupted)
    assert cli.run(["explain", "-m", "8", "-n", "8", "-k", "8", "--device", "cpu"]) == 130
    assert capsys.readouterr().err == "fastlora: interrupted\n"


def test_python_dash_m():
    done = subprocess.run(
        [sys.executable, "-m", "fastlora", "explain", "-m", "0", "-n", "8", "-k", "8"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=300,
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "fastlora: m must be at least 1, got 0\n"
