"""The command `fastlora`: collects the commands and turns every expected error into one line and an exit code.

A command module imports at its top only what is cheap; transformers and friends are imported by the command that runs.
"""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from types import FrameType

import typer

from fastlora.cli import bench, convert, demo, env, explain, merge, quantize, tune
from fastlora.errors import FastloraError

# Typer bundles its own copy of click in some versions and depends on click in others: the base of all usage errors
# is found through a name that typer exports in both.
_UsageError: type[Exception] = typer.BadParameter.__mro__[2]
INTERRUPTED = 130

app = typer.Typer(
    name="fastlora",
    help="Fused LoRA, QLoRA and DoRA layers for PyTorch.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command(name="demo")(demo.demo)
app.command(name="env")(env.env)
app.command(name="explain")(explain.explain)
app.command(name="tune")(tune.tune)
app.command(name="bench")(bench.bench)
app.command(name="quantize")(quantize.quantize)
app.command(name="merge")(merge.merge)
app.command(name="convert")(convert.convert)


@app.callback()
def _group() -> None:
    """Fused LoRA, QLoRA and DoRA layers for PyTorch."""


class _Terminated(SystemExit):
    """The process was asked to end: what is half done is undone on the way out."""


@contextlib.contextmanager
def _ended_by_signals() -> Iterator[None]:
    """SIGTERM, and SIGHUP of a terminal that closes, raise `_Terminated`, where nobody has arranged otherwise."""
    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    if threading.current_thread() is not threading.main_thread():
        numbers = []

    def end(number: int, _: FrameType | None) -> None:
        raise _Terminated(128 + number)

    mine = [number for number in numbers if signal.getsignal(number) is signal.SIG_DFL]
    for number in mine:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number in mine:
            signal.signal(number, signal.SIG_DFL)


def one_line(error: BaseException) -> str:
    """The message of an error on one line; never empty."""
    return " ".join(str(error).split()) or type(error).__name__


def run(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: what follows the program's name; None takes the process's own.

    Returns:
        The exit code: 0, 1 for a failed command, 2 for wrong usage, 130 when interrupted, 143 when asked to end.
    """
    with _ended_by_signals():
        return _run(arguments)


def _run(arguments: Sequence[str] | None) -> int:
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
    except _Terminated as error:
        print("fastlora: terminated", file=sys.stderr)
        return int(str(error.code))
    except (FastloraError, ValueError, TypeError, OSError, ModuleNotFoundError, MemoryError) as error:
        print(f"fastlora: {one_line(error)}", file=sys.stderr)
        return 1
    if result == INTERRUPTED:
        print("fastlora: interrupted", file=sys.stderr)
    return result if isinstance(result, int) else 0


def main() -> None:
    """Entry point of the command `fastlora`."""
    sys.exit(run())
