"""Every error fastlora raises on purpose, each also a standard Python error users already catch."""

from __future__ import annotations

from collections.abc import Mapping


class FastloraError(Exception):
    """Base class of all errors raised by fastlora itself."""


class ShapeError(FastloraError, ValueError):
    """A tensor or a size does not fit; the message holds expected and actual."""


class DtypeError(FastloraError, TypeError):
    """A dtype, device or Python type does not fit; the message holds expected and actual."""


class ConfigError(FastloraError, ValueError):
    """A configuration field is unknown, out of range or cannot be honoured."""


class StateDictError(FastloraError, RuntimeError):
    """A state dict is truncated, foreign or mis-shaped; the module is unchanged."""


class UnsupportedError(FastloraError, RuntimeError):
    """No backend, or not the forced one, can run a problem.

    Args:
        message: what was asked for.
        reasons: for each backend, the sentences that say why it cannot.
    """

    def __init__(self, message: str, reasons: Mapping[str, list[str]] | None = None) -> None:
        self.reasons: dict[str, list[str]] = {name: list(why) for name, why in (reasons or {}).items()}
        lines = [f"  {name}: {'; '.join(why)}" for name, why in self.reasons.items()]
        super().__init__("\n".join([message, *lines]))
