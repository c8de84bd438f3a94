"""`fastlora convert ADAPTER OUT`: an adapter's folder in PEFT's, MoE-PEFT's or a plain layout."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from fastlora.cli import _work
from fastlora.cli.explain import one_of
from fastlora.nn.output import check_output

LAYOUTS = ("peft", "moe-peft", "plain")


def convert(
    adapter: Annotated[Path, typer.Argument(metavar="ADAPTER", help="An adapter's folder, in any of the layouts.")],
    output: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to make.")],
    to: Annotated[
        str,
        typer.Option(
            help="peft; moe-peft (adapter_model.bin); plain (adapter.safetensors, keys as in the model's state_dict)."
        ),
    ] = "peft",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an adapter's folder at OUT.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Machine-readable output.")] = False,
) -> None:
    """Write an adapter in another layout: PEFT's, MoE-PEFT's or plain; its own is found out, no value changes."""
    one_of("layout", to, LAYOUTS)
    check_output(output, [adapter], mark="adapter_config.json", overwrite=overwrite)
    if not adapter.is_dir():
        raise FileNotFoundError(f"{adapter} is no folder")
    from fastlora.nn.adapter_layouts import convert_adapter

    done = convert_adapter(adapter, output, to, overwrite=overwrite)
    if json:
        _work.print_json({"output": str(output)} | dataclasses.asdict(done))
        return
    amount = f"{done.tensors} tensors of {done.modules} modules, {_work.size(done.nbytes)}"
    print(f"{done.method} from {done.source} to {done.layout}: {amount}")
    for note in done.notes:
        print(f"note: {note}")
    print(f"kept in {output}: {_work.counted([done.file, 'adapter_config.json', *done.copied])}")
