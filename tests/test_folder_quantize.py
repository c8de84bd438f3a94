"""quantize_folder: what transformers and bitsandbytes load is what `load_quantized` makes, or nothing is there."""

from __future__ import annotations

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import fastlora
from fastlora import ConfigError, DtypeError, ShapeError, StateDictError
from fastlora.io import bnb
from fastlora.nn import output, shards
from fastlora.nn.quantize_folder import _skipped, config_of, parts_of, quantize_folder
from fastlora.nn.quantized import QuantizedWeight
from fastlora.nn.streaming import INDEX, SINGLE
from tests.folder_tools import BESIDE, load, model_folder, names, same_parameters
from tests.model_tools import contents

pytest.importorskip("bitsandbytes")
Q1 = "model.layers.1.self_attn.q_proj.weight"


def header_of(path):
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    return 8 + size, json.loads(data[8 : 8 + size])


@pytest.mark.parametrize(
    ("shard", "options", "keywords"),
    [
        (None, {}, {}),
        ("20KB", {}, {}),
        ("20KB", {"double_quant": False}, {"tied": True}),
        (None, {"quantize": "fp4", "blocksize": 128}, {"dtype": torch.float16}),
        (None, {"blocksize": 32}, {"dtype": torch.float32, "bias": False}),
    ],
    ids=["one file", "sharded", "plain scales", "fp4", "fp32"],
)
def test_the_result_is_that_of_load_quantized(tmp_path, shard, options, keywords):
    model_folder(tmp_path / "in", shard, **keywords)
    done = quantize_folder(tmp_path / "in", tmp_path / "out", **options)
    assert (tmp_path / "out" / INDEX).exists() == (shard is not None)
    loaded = load(tmp_path / "out")
    assert type(loaded.model.layers[0].mlp.up_proj).__module__.startswith("bitsandbytes")
    assert loaded.dtype == keywords.get("dtype", torch.bfloat16)
    fields = {"r": 4, "init_seed": 5, "progress": False}
    want = fastlora.load_quantized(tmp_path / "in", **fields, **options)
    same_parameters(fastlora.convert(loaded, **fields), want)
    assert done.layers == 14
    assert done.kept == ["lm_head"]


def test_models_that_are_no_language_models(tmp_path):
    """An encoder, as embedding models are: the class is the one its config names."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = transformers.BertModel(transformers.BertConfig(vocab_size=61, max_position_embeddings=32, **sizes)).eval()
    model.save_pretrained(tmp_path / "in")
    done = quantize_folder(tmp_path / "in", tmp_path / "out")
    assert (done.layers, done.kept) == (13, [])
    loaded = transformers.AutoModel.from_pretrained(tmp_path / "out")
    assert type(loaded.pooler.dense).__name__ == "Linear4bit"
    fields = {"r": 4, "init_seed": 5, "progress": False}
    want = fastlora.load_quantized(tmp_path / "in", **fields)
    assert type(want) is transformers.BertModel
    same_parameters(fastlora.convert(loaded, **fields), want)


def test_sizes_and_files_are_what_is_said(tmp_path):
    model_folder(tmp_path / "in")
    seen = []
    done = quantize_folder(tmp_path / "in", tmp_path / "out", advance=lambda *step: seen.append(step))
    files = {path.name for path in (tmp_path / "in").glob("*.safetensors")}
    assert {path.name for path in (tmp_path / "out").glob("*.safetensors")} == files
    assert done.files == len(files) == 3
    for folder, said in (("in", done.bytes_before), ("out", done.bytes_after)):
        tensors = [t for file in files for t in load_file(tmp_path / folder / file).values()]
        assert sum(tensor.nbytes for tensor in tensors) == said
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    assert index["metadata"]["total_size"] == done.bytes_after
    assert seen[-1] == (done.bytes_before, done.bytes_before)
    assert [step[0] for step in seen] == sorted(step[0] for step in seen)


def test_what_stands_beside_the_weights_comes_along(tmp_path):
    model_folder(tmp_path / "in")
    done = quantize_folder(tmp_path / "in", tmp_path / "out", compute_dtype=torch.float16)
    assert set(done.copied) == BESIDE | {"config.json", "generation_config.json"}
    left = {name for name in names(tmp_path / "out") if not name.endswith((".safetensors", INDEX))}
    assert left == set(done.copied) | {"additional_chat_templates"}
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    before = json.loads((tmp_path / "in" / "config.json").read_text())
    facts = config.pop("quantization_config")
    assert config == before
    assert facts == config_of("nf4", True, torch.float16, ["lm_head"])


def test_transformers_writes_the_same_quantization_config():
    transformers = pytest.importorskip("transformers")
    theirs = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=["lm_head"],
    ).to_dict()
    assert config_of("nf4", True, torch.bfloat16, ["lm_head"]) == theirs


def test_excluded_linears_stay(tmp_path):
    model_folder(tmp_path / "in")
    done = quantize_folder(
        tmp_path / "in", tmp_path / "out", exclude_modules=["down_proj", "layers.0.self_attn.q_proj"]
    )
    assert done.layers == 11
    loaded = load(tmp_path / "out")
    assert type(loaded.model.layers[1].mlp.down_proj) is torch.nn.Linear
    assert type(loaded.model.layers[0].self_attn.q_proj) is torch.nn.Linear
    assert type(loaded.model.layers[1].self_attn.q_proj) is not torch.nn.Linear


def test_skipping_is_read_as_transformers_reads_it():
    utils = pytest.importorskip("transformers.quantizers.quantizers_utils")
    names = ["model.layers.1.q_proj", "model.layers.11.q_proj", "xq_proj", "layers.1.mlp", "layers.11.mlp", "mlp.gate"]
    names += ["mlp.gate_proj", "lm_head"]
    for name in names:
        for skipped in [*names, "layers.1", "q_proj", "layers.*", "model"]:
            assert _skipped(name, skipped) != utils.should_convert_module(name, [skipped]), (name, skipped)


def test_every_tensor_stands_on_the_border_of_its_elements(tmp_path):
    model_folder(tmp_path / "in", None)
    quantize_folder(tmp_path / "in", tmp_path / "out")
    start, header = header_of(tmp_path / "out" / SINGLE)
    header.pop("__metadata__")
    assert start % 8 == 0
    for name, facts in header.items():
        assert facts["data_offsets"][0] % shards.DTYPES[facts["dtype"]].itemsize == 0, name


# --- what is refused --------------------------------------------------------------------------------------------------


def spoil(folder, key, change):
    """Change one tensor of a single-file folder."""
    tensors = load_file(folder / SINGLE)
    tensors[key] = change(tensors[key])
    save_file(tensors, folder / SINGLE)


def bad_value(value):
    def change(tensor):
        tensor[3, 5] = value
        return tensor

    return change


def edit_config(folder, **fields):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


FAULTS = {
    "no folder": (lambda f: shutil.rmtree(f), FileNotFoundError, "is no folder"),
    "no config": (lambda f: (f / "config.json").unlink(), FileNotFoundError, "no config.json"),
    "no JSON": (lambda f: (f / "config.json").write_text("{"), StateDictError, "is not JSON"),
    "no weights": (lambda f: (f / SINGLE).unlink(), FileNotFoundError, "neither model.safetensors nor"),
    "cut short": (lambda f: os.truncate(f / SINGLE, 9000), StateDictError, "damaged"),
    "NaN": (lambda f: spoil(f, Q1, bad_value(float("nan"))), ShapeError, f"{Q1}: cannot quantize a weight with NaN"),
    "inf": (lambda f: spoil(f, Q1, bad_value(float("inf"))), ShapeError, f"{Q1}: cannot quantize a weight with NaN"),
    "dtype": (lambda f: spoil(f, Q1, lambda t: t.double()), DtypeError, Q1),
    "shape": (lambda f: spoil(f, Q1, lambda t: t[:-1]), StateDictError, "expected shape"),
    "quantized": (
        lambda f: edit_config(f, quantization_config={"load_in_4bit": True}),
        ConfigError,
        "quantized already",
    ),
    "another model": (lambda f: edit_config(f, num_hidden_layers=3), StateDictError, "missing keys"),
}


@pytest.mark.parametrize(("fault", "error", "said"), FAULTS.values(), ids=FAULTS)
@pytest.mark.parametrize("earlier", [False, True], ids=["", "over an earlier result"])
def test_nothing_appears_when_it_fails(tmp_path, fault, error, said, earlier):
    model_folder(tmp_path / "in", None)
    if earlier:
        quantize_folder(tmp_path / "in", tmp_path / "out", double_quant=False)
    fault(tmp_path / "in")
    before = names(tmp_path), contents(tmp_path)
    with pytest.raises(error, match=said):
        quantize_folder(tmp_path / "in", tmp_path / "out", overwrite=earlier)
    assert (names(tmp_path), contents(tmp_path)) == before


def test_bad_options_are_refused(tmp_path):
    model_folder(tmp_path / "in", None)
    with pytest.raises(ConfigError, match="got 'int8'"):
        quantize_folder(tmp_path / "in", tmp_path / "out", quantize="int8")
    with pytest.raises(ConfigError, match="blocksize"):
        quantize_folder(tmp_path / "in", tmp_path / "out", blocksize=63)
    with pytest.raises(DtypeError, match="compute_dtype"):
        quantize_folder(tmp_path / "in", tmp_path / "out", compute_dtype=torch.int8)
    with pytest.raises(ConfigError, match="matched no linear"):
        quantize_folder(tmp_path / "in", tmp_path / "out", exclude_modules=["q_proj", "k_proj", "v_proj", "o_proj",
                        "gate_proj", "up_proj", "down_proj"])  # fmt: skip
    assert names(tmp_path) == sorted(["in", *(f"in/{name}" for name in names(tmp_path / "in"))])


@pytest.mark.parametrize(
    ("place", "said"),
    [
        ("in", "one folder or inside one another"),
        ("in/below", "one folder or inside one another"),
        (".", "one folder or inside one another"),
        ("file", "is a file"),
        ("no/such", "expected an existing one"),
        ("thesis", "no config.json: it is no earlier result"),
        ("old", "exists and is not empty"),
    ],
)
def test_places_that_will_not_do(tmp_path, monkeypatch, place, said):
    monkeypatch.chdir(tmp_path)
    model_folder(tmp_path / "in", None)
    for name in ("thesis", "old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "chapter").write_text("mine")
    (tmp_path / "old" / "config.json").write_text("{}")
    (tmp_path / "file").write_text("mine")
    before = contents(tmp_path)
    with pytest.raises(OSError, match=said):
        quantize_folder("in", place)
    if place == "thesis":
        with pytest.raises(OSError, match=said):
            quantize_folder("in", place, overwrite=True)
    assert contents(tmp_path) == before


def test_an_earlier_result_is_replaced_as_a_whole(tmp_path):
    model_folder(tmp_path / "in", "20KB")
    quantize_folder(tmp_path / "in", tmp_path / "out")
    model_folder(tmp_path / "other", None, seed=1)
    quantize_folder(tmp_path / "other", tmp_path / "out", overwrite=True)
    assert [path.name for path in (tmp_path / "out").glob("*.safetensors*")] == [SINGLE]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "other", "out"]


def test_a_full_disk_is_noticed_before(tmp_path, monkeypatch):
    model_folder(tmp_path / "in", None)
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(output.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(OSError, match=r"takes 0\.0 GB, and .* has 0\.0 GB left"):
        quantize_folder(tmp_path / "in", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


# --- the writer -------------------------------------------------------------------------------------------------------


def test_the_writer_writes_what_safetensors_reads(tmp_path):
    made = {short: (torch.arange(30) % 7).reshape(5, 6).to(dtype) for short, dtype in shards.DTYPES.items()}
    made |= {"scalar": torch.tensor(2.5), "none": torch.empty(0, 3), "one": torch.ones(3, dtype=torch.uint8)}
    made = {key: tensor for key, tensor in made.items() if key not in ("C64", "U64", "U32", "U16", "F8_E8M0")}
    with shards.Shards(
        tmp_path, {"a.safetensors": {k: shards.Entry(t.dtype, tuple(t.shape)) for k, t in made.items()}}
    ) as out:
        for key, tensor in made.items():
            if tensor.dim() == 2 and len(tensor):
                out.write(key, tensor[2:], 2)
                out.write(key, tensor[:2].t().contiguous().t())
            else:
                out.write(key, tensor)
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]
    got = load_file(tmp_path / "a.safetensors")
    assert got.keys() == made.keys()
    for key, tensor in made.items():
        assert got[key].dtype == tensor.dtype
        left, right = (t.reshape(-1).view(torch.uint8) for t in (got[key], tensor))
        assert torch.equal(left, right), key


def write_half(folder):
    with shards.Shards(folder, {"a": {"x": shards.Entry(torch.uint8, (4, 2))}}) as out:
        out.write("x", torch.zeros(2, 2, dtype=torch.uint8))


def test_the_writer_refuses_what_was_not_announced(tmp_path):
    with pytest.raises(ShapeError, match="x was not written in full"):
        write_half(tmp_path)
    entries = {"a": {"x": shards.Entry(torch.uint8, (4, 2))}}
    for value, first in ((torch.zeros(4, 2), 0), (torch.zeros(4, 3).byte(), 0), (torch.zeros(2, 2).byte(), 3)):
        with pytest.raises(ShapeError, match="x: expected"), shards.Shards(tmp_path, entries) as out:
            out.write("x", value, first)
    with pytest.raises(StateDictError, match="F4, which cannot be copied"):
        shards.dtype_of("F4", "x")


def test_quantized_parts_are_announced_as_they_come():
    for shape, blocksize, nested in (((7, 9), 32, False), ((33, 65), 64, True), ((300, 64), 64, True)):
        weight = QuantizedWeight.from_float(torch.randn(shape), "nf4", blocksize, nested)
        made = bnb.to_state(weight.pack(), torch.float32)
        said = parts_of(shape, "nf4", blocksize, nested)
        assert made.keys() == said.keys()
        for part, tensor in made.items():
            if not part.startswith(bnb.STATE_KEY):
                assert (tensor.dtype, tuple(tensor.shape)) == said[part], part
