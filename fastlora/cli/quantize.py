"""`fastlora quantize IN OUT`: a model's folder of safetensors to 4 bits, in bitsandbytes' layout, streamed."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from fastlora.cli import _work
from fastlora.cli.explain import DTYPES, QUANTS, dtype_of, one_of
from fastlora.nn.output import check_output


def quantize(
    model: Annotated[Path, typer.Argument(metavar="IN", help="A model's folder: config.json and safetensors.")],
    output: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to make.")],
    quant: Annotated[str, typer.Option(help="nf4 or fp4.")] = "nf4",
    blocksize: Annotated[int, typer.Option(help="Weights that share a scale: 32, 64, ... 4096.")] = 64,
    double_quant: Annotated[bool, typer.Option(help="Quantize the scales too.")] = True,
    compute_dtype: Annotated[
        str, typer.Option(help="For bitsandbytes: bf16, fp16, fp32; the model's own without.")
    ] = "",
    exclude: Annotated[
        list[str] | None, typer.Option(help="A linear to leave alone, by name or its ending; may be repeated.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a model's folder at OUT.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Machine-readable output.")] = False,
) -> None:
    """Quantize a model's folder to 4 bits, one tensor at a time; transformers + bitsandbytes load the result."""
    one_of("quant", quant, QUANTS)
    if compute_dtype:
        one_of("compute dtype", compute_dtype, DTYPES)
    check_output(output, [model], mark="config.json", overwrite=overwrite)
    if not model.is_dir():
        raise FileNotFoundError(f"{model} is no folder")
    from fastlora.nn.quantize_folder import quantize_folder

    clock = _work.Clock()
    with _work.bytes_bar("quantizing") as advance:
        done = quantize_folder(
            model,
            output,
            quantize=quant,
            blocksize=blocksize,
            double_quant=double_quant,
            compute_dtype=dtype_of(compute_dtype) if compute_dtype else None,
            exclude_modules=exclude,
            overwrite=overwrite,
            advance=advance,
        )
    if json:
        _work.print_json({"output": str(output)} | dataclasses.asdict(done) | clock.facts())
        return
    print(f"{done.layers} linears in {quant}, {_work.counted(done.kept) or 'none'} left as they were")
    before, after = _work.size(done.bytes_before), _work.size(done.bytes_after)
    print(f"weights: {before} -> {after} in {_work.files(done.files)}; {clock}")
    print(f"kept in {output}, with {_work.counted(done.copied)}")
