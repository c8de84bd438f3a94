"""These tests run kernels by Triton's interpreter, which must be asked for before the first kernel is decorated.

`make pytest` does: `TRITON_INTERPRET=1 pytest tests/triton`. Anywhere else every test here is skipped and says so.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent


def _why_not() -> str:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if os.environ.get("TRITON_INTERPRET") != "1":
        return "needs Triton's interpreter: TRITON_INTERPRET=1 pytest tests/triton"
    return ""


WHY_NOT = _why_not()


class _Unreadable(pytest.Module):
    """Stands for a test file that must not even be imported here: kernels in it would be decorated otherwise."""

    def collect(self):
        pytest.skip(WHY_NOT, allow_module_level=True)


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    """Skip whole files, unread."""
    if WHY_NOT and HERE in module_path.parents:
        return _Unreadable.from_parent(parent, path=module_path)
    return None


@pytest.fixture(autouse=True)
def _same_numbers_every_run():
    """A budget is compared with one draw's own rounding: the draw must not change from run to run."""
    torch.manual_seed(0)
