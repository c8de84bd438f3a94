"""The command `fastlora`: collects the commands and turns every expected error into one line and an exit code.

A command module imports at its top only what is cheap; transformers and friends are imported by the command that runs.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import typer

from fastlora.cli import demo, env, explain
from fastlora.errors import FastloraError

# Typer bundles its own copy of click in some versions and depends on click in others: the base of all usage errors
# is found through a name that typer exports in both.
_UsageError: type[Exception] = typer.BadParameter.__mro__[2]
INTERRUPTED = 130

app = typer.Typer(
    name="fastlora",
    help="Fused LoRA, QLoRA and DoRA layers for PyTorch.",
    no_args_is_help=True,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command(name="demo")(demo.demo)
app.command(name="env")(env.env)
app.command(name="explain")(explain.explain)


@app.callback()
def _group() -> None:
    """Fused LoRA, QLoRA and DoRA layers for PyTorch."""


def one_line(error: BaseException) -> str:
    """The message of an error on one line; never empty."""
    return " ".join(str(error).split()) or type(error).__name__


def run(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: what follows the program's name; None takes the process's own.

    Returns:
        The exit code: 0, 1 for a failed command, 2 for wrong usage, 130 when interrupted.
    """
    try:
        result = app(list(arguments) if arguments is not None else None, prog_name="fastlora", standalone_mode=False)
    except _UsageError as error:
        # `fastlora` alone shows the help, which it has printed already.
        message = " ".join(getattr(error, "format_message", error.__str__)().split())
        if type(error).__name__ != "NoArgsIsHelpError":
            print(f"fastlora: {message} (see fastlora --help)", file=sys.stderr)
        return 2
    except (KeyboardInterrupt, typer.Abort):
        print("fastlora: interrupted", file=sys.stderr)
        return INTERRUPTED
    except (FastloraError, ValueError, TypeError, OSError, ModuleNotFoundError) as error:
        print(f"fastlora: {one_line(error)}", file=sys.stderr)
        return 1
    if result == INTERRUPTED:
        print("fastlora: interrupted", file=sys.stderr)
    return result if isinstance(result, int) else 0


def main() -> None:
    """Entry point of the command `fastlora`."""
    sys.exit(run())
