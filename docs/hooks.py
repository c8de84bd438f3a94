"""What `mkdocs build` makes beyond the pages as written.

* `<!-- generated: KIND ARGUMENT -->` becomes what KIND makes of it (`GENERATED`).
* A block ```` ```console run ```` of `$ fastlora ...` lines shows what they print on the machine that builds.
* The plots of benchmarks/results are part of the site.
"""

from __future__ import annotations

import ast
import pathlib
import re
import sys
from collections.abc import Callable
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "docs")]

import gen_benchmarks  # noqa: E402
import gen_commands  # noqa: E402

from benchmarks import scaling  # noqa: E402

MARK = re.compile(r"^<!-- generated: (\w+) ?(.*?) -->$", re.MULTILINE)
RUN = re.compile(r"^```console run\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def example(name: str) -> str:
    """A script of examples/: what its first lines say, and its source, folded."""
    source = (ROOT / "examples" / name).read_text(encoding="utf-8")
    first, _, rest = (ast.get_docstring(ast.parse(source)) or name).partition("\n")
    code = "\n".join(f"    {line}".rstrip() for line in ["```python", *source.splitlines(), "```"])
    usage = "\n".join(line.strip() for line in rest.splitlines() if line.startswith("    "))
    prose = "\n".join(line for line in rest.splitlines() if not line.startswith("    ")).strip()
    told = [f"## {name}", first, f"```bash\n{usage}\n```" if usage else "", prose, f'??? example "Source"\n\n{code}']
    return "\n\n".join(part for part in told if part)


def examples(_: str) -> str:
    """Every script of examples/."""
    return "\n\n".join(example(path.name) for path in sorted((ROOT / "examples").glob("*.py")))


def deeper(text: str) -> str:
    """A page's headings a level down; a # within a block of code is none."""
    parts = re.split(r"(^```.*?^```[ \t]*$)", text, flags=re.DOTALL | re.MULTILINE)
    return "".join(part if part.startswith("```") else re.sub(r"^#", "##", part, flags=re.M) for part in parts)


def transcripts(_: str) -> str:
    """Recorded runs, where there are any (docs/transcripts/*.md), a heading deeper."""
    found = sorted((ROOT / "docs" / "transcripts").glob("*.md"))
    return "\n\n".join(deeper(path.read_text(encoding="utf-8")) for path in found)


GENERATED: dict[str, Callable[[str], str]] = {
    "benchmarks": lambda _: gen_benchmarks.page(),
    "benchmark": gen_benchmarks.section,
    "commands": lambda _: gen_commands.reference(),
    "examples": examples,
    "scaling": lambda _: scaling.table(),
    "transcripts": transcripts,
}


def _made(match: re.Match[str]) -> str:
    kind, argument = match.groups()
    if kind not in GENERATED:
        raise PluginError(f"unknown mark {match.group(0)}; known: {', '.join(GENERATED)}")
    try:
        return GENERATED[kind](argument)
    except FileNotFoundError as error:
        raise PluginError(f"{match.group(0)}: {error}") from error


def _ran(match: re.Match[str]) -> str:
    lines = [line for line in match.group(1).splitlines() if line.strip()]
    told = []
    for line in lines:
        try:
            told.append(f"{line}\n{gen_commands.run(line.removeprefix('$ '))}")
        except ValueError as error:
            raise PluginError(str(error)) from error
    return "```console\n" + "\n\n".join(told) + "\n```"


def on_files(files: Any, config: Any) -> Any:
    """Add the plots."""
    for path in sorted(gen_benchmarks.RESULTS.glob("*.png")):
        files.append(File.generated(config, f"images/results/{path.name}", abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Fill in what is generated."""
    return RUN.sub(_ran, MARK.sub(_made, markdown))
