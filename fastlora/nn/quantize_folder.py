"""A model's folder becomes a folder of 4-bit weights in bitsandbytes' layout, one tensor at a time."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastlora.config import LoraConfig
from fastlora.errors import ConfigError, DtypeError, FastloraError, StateDictError
from fastlora.io import bnb
from fastlora.math import nf4
from fastlora.nn.linear import check_compute_dtype
from fastlora.nn.output import check_output, check_space, copy_others, whole_folder
from fastlora.nn.quantized import QuantizedWeight
from fastlora.nn.shards import Entry, Shards, dtype_of
from fastlora.nn.streaming import Files, built, sources_of
from fastlora.nn.targets import find_targets

CONFIG = "config.json"
_STATE_BYTES = 256  # the JSON of a weight's facts is padded to it: its length must be known before it is
_COPY_BYTES = 32 << 20  # read and written at once of a tensor that stays as it is


@dataclasses.dataclass
class Quantized:
    """What `quantize_folder` did.

    Attributes:
        layers: how many linears are 4-bit now.
        kept: the names of the linears that stay as they are.
        bytes_before, bytes_after: of all weights.
        files: how many weight files. copied: the other files.
    """

    layers: int
    kept: list[str]
    bytes_before: int
    bytes_after: int
    files: int
    copied: list[str]


def quantize_folder(
    folder: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    quantize: str = "nf4",
    blocksize: int = 64,
    double_quant: bool = True,
    compute_dtype: torch.dtype | None = None,
    exclude_modules: Sequence[str] | None = None,
    overwrite: bool = False,
    advance: Callable[[int, int], None] | None = None,
) -> Quantized:
    """Write a model's folder with its linears in 4 bits, as transformers with bitsandbytes loads it.

    Quantized are the linears that `fastlora.convert` would take; the bytes are those of `fastlora.load_quantized`. One
    tensor is in memory at a time. The output appears whole, at the end, or not at all. config.json gets a
    quantization_config; tokenizer and other files are copied.

    Args:
        folder: with config.json and safetensors files, of a model that transformers knows.
        output: the folder to make.
        quantize, blocksize, double_quant: as `fastlora.convert`.
        compute_dtype: what bitsandbytes shall multiply in; default: the model's own dtype.
        exclude_modules: linears to leave alone, names or name endings.
        overwrite: replace a model's folder that is there.
        advance: called with bytes read so far and in all.

    Raises:
        ConfigError: as `load_quantized`. StateDictError: a damaged file, or keys that do not fit the model.
        ShapeError, DtypeError: a weight that cannot be quantized, NaN or inf among them. OSError: files and folders.
    """
    source, target = Path(folder), Path(output)
    if quantize not in nf4.QUANT_TYPES:
        raise ConfigError(f"quantize must be one of {', '.join(nf4.QUANT_TYPES)}, got {quantize!r}")
    nf4.check_format(quantize, blocksize)
    check_compute_dtype(compute_dtype)
    check_output(target, [source], mark=CONFIG, overwrite=overwrite)
    files = Files(source)
    config = read_config(source)
    weights, kept, dtype = _choose(files, exclude_modules)
    facts = config_of(quantize, double_quant, compute_dtype or dtype, kept)
    parts = {key: parts_of(files.facts[key].shape, quantize, blocksize, double_quant) for key in weights}
    plan: dict[str, dict[str, Entry]] = {}
    for key, fact in files.facts.items():
        entries = plan.setdefault(fact.file.name, {})
        if key in parts:
            entries |= {joined(key, part): entry for part, entry in parts[key].items()}
        else:
            entries[key] = Entry(dtype_of(fact.dtype, key), fact.shape)
    total = sum(_bytes(files, key) for key in files.facts)
    with whole_folder(target) as scratch:
        shards = Shards(scratch, plan)
        check_space(scratch, shards.nbytes)
        with shards:
            done = 0
            for key in files.facts:
                if key in parts:
                    _quantize(files, key, shards, quantize, blocksize, double_quant)
                    done += _bytes(files, key)
                    _tell(advance, done, total)
                    continue
                for size in copy_rows(files, key, functools.partial(shards.write, key)):
                    done += size
                    _tell(advance, done, total)
        copied = copy_others(source, scratch)
        write_config(scratch, config | {"quantization_config": facts})
    return Quantized(len(weights), kept, total, shards.nbytes, len(plan), copied)


def _tell(advance: Callable[[int, int], None] | None, done: int, total: int) -> None:
    if advance is not None:
        advance(done, total)


def _bytes(files: Files, key: str) -> int:
    fact = files.facts[key]
    return math.prod(fact.shape) * dtype_of(fact.dtype, key).itemsize


def _choose(files: Files, exclude: Sequence[str] | None) -> tuple[set[str], list[str], torch.dtype]:
    """The keys of the weights to quantize, the names of the linears that stay, and the model's dtype."""
    model = built(files.folder, None)
    targets = find_targets(model, LoraConfig(exclude_modules=list(exclude) if exclude else None))
    sources = sources_of(model, files)
    linears = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    kept = sorted(linears - set(targets))
    for name in targets:
        if other := next((other for other in kept if _skipped(name, other)), None):
            raise ConfigError(f"{other} stays as it is, and by transformers' rule so would {name}: exclude both")
    weights: Any = {name: linear.weight for name, linear in targets.items()}
    return {sources[id(weight)] for weight in weights.values()}, kept, next(model.parameters()).dtype


def _skipped(name: str, skipped: str) -> bool:
    """transformers' rule for `llm_int8_skip_modules`."""
    return re.match(rf"(?:{skipped})(?:(?<=\.)|(?=\.|$))", name) is not None or name.endswith(skipped)


def config_of(quant_type: str, double_quant: bool, compute_dtype: torch.dtype, kept: Sequence[str]) -> dict[str, Any]:
    """The quantization_config of config.json: transformers' `BitsAndBytesConfig`, as it writes itself."""
    return {
        "_load_in_4bit": True,
        "_load_in_8bit": False,
        "bnb_4bit_compute_dtype": str(compute_dtype).removeprefix("torch."),
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": quant_type,
        "bnb_4bit_use_double_quant": double_quant,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": list(kept),
        "llm_int8_threshold": 6.0,
        "load_in_4bit": True,
        "load_in_8bit": False,
        "quant_method": "bitsandbytes",
    }


def read_config(folder: Path) -> dict[str, Any]:
    """A model's config.json.

    Raises:
        FileNotFoundError: there is none. StateDictError: it is not a JSON object.
    """
    path = folder / CONFIG
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is no folder")
    if not path.is_file():
        raise FileNotFoundError(f"no {CONFIG} in {folder}")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise StateDictError(f"{path} is not JSON: {error}") from None
    if not isinstance(config, dict):
        raise StateDictError(f"{path}: expected a JSON object, got {type(config).__name__}")
    return config


def write_config(folder: Path, config: Mapping[str, Any]) -> None:
    """The config.json of a model's folder, in transformers' form."""
    text = json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False)
    (folder / CONFIG).write_text(text + "\n", encoding="utf-8")


def joined(key: str, part: str) -> str:
    """The name of one part of a quantized weight; the bytes themselves have the weight's own."""
    return f"{key}.{part}" if part else key


def parts_of(shape: tuple[int, ...], quant_type: str, blocksize: int, nested: bool) -> dict[str, Entry]:
    """What `fastlora.io.bnb.to_state` will give for a weight of this shape."""
    blocks = -(-math.prod(shape) // blocksize)
    parts = {
        "": Entry(torch.uint8, ((math.prod(shape) + 1) // 2, 1)),
        "quant_map": Entry(torch.float32, (16,)),
        "absmax": Entry(torch.uint8 if nested else torch.float32, (blocks,)),
        bnb.STATE_KEY + quant_type: Entry(torch.uint8, (_STATE_BYTES,)),
    }
    if nested:
        parts["nested_absmax"] = Entry(torch.float32, (-(-blocks // nf4.NESTED_BLOCKSIZE),))
        parts["nested_quant_map"] = Entry(torch.float32, (256,))
    return parts


def _quantize(files: Files, key: str, shards: Shards, quant_type: str, blocksize: int, nested: bool) -> None:
    try:
        tensor = files.read(key)
        weight = QuantizedWeight.from_float(tensor, quant_type, blocksize, nested)
    except DtypeError as error:
        raise DtypeError(f"{key}: {error}") from None
    except FastloraError as error:
        raise type(error)(f"{key}: {error}") from None
    for part, value in bnb.to_state(weight.pack(), tensor.dtype).items():
        if part.startswith(bnb.STATE_KEY):
            value = torch.nn.functional.pad(value, (0, _STATE_BYTES - value.numel()), value=ord(" "))
        shards.write(joined(key, part), value)


def copy_rows(files: Files, key: str, write: Callable[[Tensor, int], None]) -> Iterator[int]:
    """Hand a tensor to `write`, rows and the first one's index, in pieces; yields the bytes of each."""
    shape = files.facts[key].shape
    if not shape or not math.prod(shape):
        tensor = files.read(key)
        write(tensor, 0)
        yield tensor.nbytes
        return
    step = max(1, _COPY_BYTES * shape[0] // max(1, _bytes(files, key)))
    for first in range(0, shape[0], step):
        rows = files.rows(key, first, min(first + step, shape[0]))
        write(rows, first)
        yield rows.nbytes
