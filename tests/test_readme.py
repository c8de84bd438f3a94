"""The README's Python blocks run as they stand, in order, in one namespace."""

from __future__ import annotations

import contextlib
import io
import os
import pathlib
import re

import pytest

README = pathlib.Path(__file__).resolve().parent.parent / "README.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```", README.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def test_readme_has_snippets():
    assert len(BLOCKS) >= 3


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_snippets_run(tmp_path):
    pytest.importorskip("peft")
    pytest.importorskip("transformers")
    names: dict[str, object] = {}
    before = pathlib.Path.cwd()
    os.chdir(tmp_path)
    try:
        for number, block in enumerate(BLOCKS):
            with contextlib.redirect_stdout(io.StringIO()):
                exec(compile(block, f"README.md block {number + 1}", "exec"), names)
    finally:
        os.chdir(before)
