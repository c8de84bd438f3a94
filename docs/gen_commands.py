"""The reference of docs/commands.md, made from the command line's own declarations."""

from __future__ import annotations

import contextlib
import io
import shlex
from typing import Any

import typer

from fastlora.cli import main


def run(line: str) -> str:
    """What one `fastlora ...` command prints.

    Raises:
        ValueError: not a fastlora command, or it fails.
    """
    words = shlex.split(line)
    if not words or words[0] != "fastlora":
        raise ValueError(f"not a fastlora command: {line!r}")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        code = main.run(words[1:])
    if code:
        raise ValueError(f"{line!r} ends with exit code {code}: {printed.getvalue().strip()}")
    return printed.getvalue().rstrip()


def commands() -> dict[str, Any]:
    """Every command by name, as typer built it."""
    group: Any = typer.main.get_command(main.app)
    return {name: command for name, command in sorted(group.commands.items()) if not command.hidden}


def shown_name(argument: Any) -> str:
    """An argument as the usage line shows it."""
    return str(argument.metavar or argument.name.upper())


def _row(parameter: Any) -> list[str]:
    argument = parameter.param_type_name == "argument"
    name = shown_name(parameter) if argument else ", ".join(parameter.opts)
    if not argument and parameter.secondary_opts:
        name += f" / {', '.join(parameter.secondary_opts)}"
    default = parameter.default
    shown = "" if default in (None, "", ()) or isinstance(default, bool) else f"`{default}`"
    text = " ".join((getattr(parameter, "help", None) or "").split())
    return [f"`{name}`", "required" if parameter.required else shown, text.replace("|", "\\|")]


def reference() -> str:
    """A section for each command: what it does, how it is called, its arguments and options."""
    parts = []
    for name, command in commands().items():
        arguments = [shown_name(each) for each in command.params if each.param_type_name == "argument"]
        rows = [_row(each) for each in command.params if getattr(each, "name", "") != "help"]
        lines = [f"## fastlora {name}", command.help or ""]
        lines.append("```text\n" + " ".join(["fastlora", name, *arguments, "[OPTIONS]"]) + "\n```")
        if rows:
            table = ["| argument or option | default | meaning |", "|---|---|---|"]
            lines.append("\n".join(table + ["| " + " | ".join(row) + " |" for row in rows]))
        parts.append("\n\n".join(lines))
    return "\n\n".join(parts)
