"""The documentation holds: its blocks run, its commands exist, its figures are measured ones.

A page's Python blocks run in order in one namespace, in an empty folder. A block ```` ```text title="prints" ```` after
one holds what it printed.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import json
import os
import pathlib
import re
import shlex
import types
from collections.abc import Iterator

import pytest

import fastlora
from fastlora import backends, settings
from fastlora.cli import main as cli
from fastlora.dispatch import registry
from tests.docs_tools import Block, blocks, load

ROOT = pathlib.Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(path for path in DOCS.rglob("*.md") if "transcripts" not in path.parts)


def pages_with(*languages: str) -> list[object]:
    """The pages that hold such a block, as parameters."""
    found = [path for path in PAGES if any(block.language in languages for block in blocks(path))]
    return [pytest.param(path, id=str(path.relative_to(DOCS))) for path in found]


gen_benchmarks = load(DOCS / "gen_benchmarks.py")
gen_commands = load(DOCS / "gen_commands.py")


# --- blocks -----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def inside(folder: pathlib.Path) -> Iterator[None]:
    before = pathlib.Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def run_page(found: list[Block]) -> None:
    """Run the Python blocks of a page; compare what they print with the blocks that say it."""
    names: dict[str, object] = {"__name__": "page"}
    printed = None
    for block in found:
        if block.language == "python":
            out = io.StringIO()
            with contextlib.redirect_stdout(out):
                exec(compile(block.text, block.where, "exec"), names)
            printed = out.getvalue()
        elif block.language == "text" and 'title="prints"' in block.options:
            assert printed is not None, f"{block.where}: no block before it prints"
            assert printed.rstrip() == block.text.rstrip(), f"{block.where}: it printed\n{printed}"
            printed = None


@pytest.fixture
def same_kernels() -> Iterator[None]:
    """Kernels that a page registers are gone after it."""
    backends.load()
    before = {op: list(kernels) for op, kernels in registry._kernels.items()}
    yield
    registry._kernels.clear()
    registry._kernels.update(before)
    registry._selected.clear()


@pytest.mark.usefixtures("same_kernels")
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("path", pages_with("python"))
def test_python_blocks_run(path, tmp_path):
    found = blocks(path)
    if any("peft" in block.text or "transformers" in block.text for block in found):
        pytest.importorskip("peft")
        pytest.importorskip("transformers")
    if any("import bitsandbytes" in block.text or "from bitsandbytes" in block.text for block in found):
        pytest.importorskip("bitsandbytes")
    with inside(tmp_path):
        run_page(found)


def test_a_block_that_fails_or_prints_otherwise_is_noticed(tmp_path):
    page = tmp_path / "page.md"
    for body in ("```python\nassert False\n```\n", '```python\nprint(1)\n```\n\n```text title="prints"\n2\n```\n'):
        page.write_text(body, encoding="utf-8")
        with pytest.raises(AssertionError):
            run_page(blocks(page))


def test_every_block_says_its_language():
    known = {"python", "bash", "text", "console"}
    strange = [block.where for path in PAGES for block in blocks(path) if block.language not in known]
    assert strange == []


def test_code_fits_the_column():
    """A line to copy is seen whole: the column of a page holds 88 characters."""
    lines = [
        (b.where, line)
        for path in PAGES
        for b in blocks(path)
        if b.language == "python"
        for line in b.text.splitlines()
    ]
    assert [f"{where}: {line}" for where, line in lines if len(line) > 88] == []


# --- commands ---------------------------------------------------------------------------------------------------------

CHEAP = {"env", "explain"}


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))


def check_command(line: str, folder: pathlib.Path) -> str:
    """What is wrong with a line of shell, "" if nothing: it runs where it is cheap, else what it names must exist."""
    words = shlex.split(line, comments=True)
    variables = {}
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
        name, _, variables[name] = words.pop(0).partition("=")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    if unknown := [name for name in variables if f"`{name}`" not in readme]:
        return f"the README knows no {unknown[0]}"
    if words[0] == "fastlora":
        command = gen_commands.commands().get(words[1])
        if command is None:
            return f"no command {words[1]}"
        if words[1] not in CHEAP:
            command.make_context(words[1], words[2:], resilient_parsing=True)
            return ""
        changes = {"backend": variables["FASTLORA_BACKEND"]} if "FASTLORA_BACKEND" in variables else {}
        with inside(folder), settings.override(**changes), contextlib.redirect_stdout(io.StringIO()):
            return "" if cli.run(words[1:]) == 0 else "it fails"
    if words[0] == "make":
        return "" if words[1] in make_targets() else f"no target {words[1]}"
    if words[:2] == ["pip", "install"]:
        extras = re.findall(r"\[(.*?)\]", words[2])
        project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
        missing = [each for text in extras for each in text.split(",") if f"\n{each} = [" not in project]
        return f"no extra {missing[0]}" if missing else ""
    if words[:2] == ["python", "-m"]:
        with contextlib.suppress(ModuleNotFoundError):
            if importlib.util.find_spec(words[2]) is not None:
                return ""
        return f"no module {words[2]}"
    scripts = [word for word in words if word.endswith(".py")]
    if not scripts:
        return "a command that this test does not know"
    return next((f"no file {script}" for script in scripts if not (ROOT / script).is_file()), "")


@pytest.mark.parametrize("path", pages_with("bash", "console"))
def test_commands_exist(path, tmp_path):
    lines = [
        (block.where, line.removeprefix("$ "))
        for block in blocks(path)
        if block.language in ("bash", "console")
        for line in block.text.splitlines()
        if line.strip() and not line.startswith("#")
    ]
    assert lines
    assert [f"{where}: {line}: {why}" for where, line in lines if (why := check_command(line, tmp_path))] == []


@pytest.mark.parametrize(
    "line",
    ["fastlora fly", "make coffee", "pip install '.[tea]'", "python -m benchmarks.tea", "FASTLORA_TEA=1 make test"],
)
def test_commands_that_do_not_exist_are_noticed(line, tmp_path):
    assert check_command(line, tmp_path)


def test_command_reference_names_every_option():
    text = gen_commands.reference()
    for name, command in gen_commands.commands().items():
        section = text.partition(f"## fastlora {name}\n")[2].partition("\n## ")[0]
        assert section
        for parameter in command.params:
            wanted = parameter.opts[-1] if parameter.param_type_name == "option" else gen_commands.shown_name(parameter)
            assert wanted in section, f"{name}: {wanted}"


# --- benchmarks -------------------------------------------------------------------------------------------------------


def test_benchmark_page_shows_every_result_and_plot():
    text = gen_benchmarks.page()
    for path in gen_benchmarks.RESULTS.glob("*.png"):
        assert f"images/results/{path.name})" in text
    assert text.count("\n## ") + 1 == len({path.stem for path in gen_benchmarks.RESULTS.glob("*.*")})


def test_benchmark_figures_are_those_of_the_files(tmp_path):
    source = json.loads((gen_benchmarks.RESULTS / "step_beside_peft.json").read_text(encoding="utf-8"))
    source["results"][0] |= {"peft_over_fastlora": 7.25, "frozen_over_fastlora": 0.5}
    (tmp_path / "step_beside_peft.json").write_text(json.dumps(source), encoding="utf-8")
    text = gen_benchmarks.page(tmp_path)
    assert "| 7.25 | **0.50** |" in text


def test_a_slower_result_stays_visibly_slower():
    assert [gen_benchmarks.ratio(value) for value in (0.996, 0.5, 1.0, None)] == ["**0.996**", "**0.50**", "1.00", None]


def test_unknown_results_still_have_a_section(tmp_path):
    (tmp_path / "tea.json").write_text("{}", encoding="utf-8")
    assert "## Tea" in gen_benchmarks.page(tmp_path)


def test_pages_hold_no_speed_typed_by_hand():
    """A time or a ratio belongs to the generator: prose has none."""
    pattern = re.compile(
        r"\b\d[\d.,]* ?(?:ms|µs|us|GB/s|GF/s|tokens/s)\b|\b\d+(?:\.\d+)? ?(?:times|x) (?:as fast|faster|slower)"
    )
    found = []
    for path in PAGES:
        prose = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
        found += [f"{path.name}: {text}" for text in pattern.findall(prose)]
    assert found == []


# --- the site ---------------------------------------------------------------------------------------------------------


def test_make_docs_fails_at_a_warning():
    """--strict alone: mkdocs' --quiet would keep warnings from being counted."""
    recipe = re.search(r"^docs:.*\n\t(.*)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)[1]
    assert "--strict" in recipe.split()
    assert not {"-q", "--quiet"} & set(recipe.split())
    settings_of_links = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nvalidation:")[2]
    for kind in ("omitted_files", "unrecognized_links", "anchors"):
        assert f"  {kind}: warn" in settings_of_links


def test_every_page_is_in_the_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:")[2]
    assert [str(p.relative_to(DOCS)) for p in PAGES if str(p.relative_to(DOCS)) not in navigation] == []


def test_every_public_name_is_in_the_reference():
    text = "\n".join(path.read_text(encoding="utf-8") for path in (DOCS / "api").glob("*.md"))
    shown = set(re.findall(r"^::: (\S+)$", text, re.MULTILINE))
    wanted = {
        f"fastlora.{name}" for name in fastlora.__all__ if not isinstance(getattr(fastlora, name), types.ModuleType)
    }
    for part in ("functional", "adalora", "moe"):
        wanted |= {f"fastlora.{part}.{name}" for name in importlib.import_module(f"fastlora.{part}").__all__}

    def ends(name: str) -> tuple[str, str]:  # what is imported when first asked for stands under its own module
        parts = name.split(".")
        return parts[1], parts[-1]

    assert {name for name in wanted if ends(name) not in set(map(ends, shown))} == set()


def test_nothing_is_fetched_from_elsewhere():
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert "font: false" in text
    assert not re.findall(r"https?://", text)


def test_readme_links_lead_somewhere():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]
    assert [link for link in links if link and not (ROOT / link).exists()] == []
    assert any(link.startswith("docs/") for link in links)
