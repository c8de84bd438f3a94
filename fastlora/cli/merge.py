"""`fastlora merge MODEL ADAPTER OUT`: an adapter folded into a model's folder, a few rows at a time."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from fastlora.cli import _work
from fastlora.cli.explain import DTYPES, dtype_of, one_of
from fastlora.nn.output import check_output

# Rounding beside what the adapter adds, from where on it is worth a warning. What is wholly rounded away from a 16-bit
# base makes 1.
MUCH = 0.9


def merge(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="A model's folder, 16-bit or quantized.")],
    adapter: Annotated[Path, typer.Argument(metavar="ADAPTER", help="An adapter's folder in PEFT's layout.")],
    output: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to make.")],
    dtype: Annotated[
        str, typer.Option(help="Of the result: bf16, fp16, fp32. Without: the model's own, 16-bit if that is 4-bit.")
    ] = "",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a model's folder at OUT.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Machine-readable output.")] = False,
) -> None:
    """Fold a LoRA, DoRA or AdaLoRA adapter into a model's folder, in little memory, and say what rounding costs."""
    if dtype:
        one_of("dtype", dtype, DTYPES)
    check_output(output, [model, adapter], mark="config.json", overwrite=overwrite)
    for folder in (model, adapter):
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder} is no folder")
    from fastlora.nn.merge_folder import merge_folder

    clock = _work.Clock()
    with _work.bytes_bar("merging") as advance:
        done = merge_folder(
            model,
            adapter,
            output,
            dtype=dtype_of(dtype) if dtype else None,
            overwrite=overwrite,
            advance=advance,
        )
    if json:
        _work.print_json({"output": str(output)} | dataclasses.asdict(done) | clock.facts())
        return
    ranks = _work.counted(done.ranks)
    four_bit = f", {done.quantized} of them 4-bit" if done.quantized else ""
    print(f"{done.method} of rank {ranks} merged into {done.layers} layers{four_bit}; now {_work.counted(done.dtypes)}")
    if done.replaced:
        print(f"taken from the adapter as they are: {len(done.replaced)} tensors ({done.replaced[0]}, ...)")
    if done.bare:
        print("the adapter holds no magnitudes (MoE-PEFT saves none): the row norms of W + s B A stand for them")
    print(
        f"rounding changed the merged weights by {done.rounding:.1e} of their norm, {done.lost:.2f} of the norm of "
        f"what the adapter adds (most in {done.worst}: {done.worst_lost:.2f})"
    )
    if done.lost >= MUCH:
        print("the adapter is hardly more than that rounding: --dtype fp32 keeps it, or leave it unmerged")
    before, after = _work.size(done.bytes_before), _work.size(done.bytes_after)
    print(f"weights: {before} -> {after} in {_work.files(done.files)}; {clock}")
    print(f"kept in {output}, with {_work.counted(done.copied)}")
