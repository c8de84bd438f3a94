"""load_quantized: a folder becomes what `convert` makes of the loaded model, in little memory, or nothing at all."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from accelerate import init_empty_weights
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import fastlora
from fastlora import ConfigError, DtypeError, ShapeError, StateDictError
from fastlora.nn.streaming import INDEX, SINGLE
from tests.model_tools import llama, tokens

Q1 = "model.layers.1.self_attn.q_proj.weight"


def saved(folder, shard=None, **keywords):
    """A folder as `save_pretrained` writes it; `shard` bytes a file."""
    model = llama(**({"dtype": torch.bfloat16} | keywords))
    model.save_pretrained(folder, max_shard_size=shard or "1GB")
    return folder


def empty(folder):
    """The folder's model on meta."""
    config = AutoModelForCausalLM.from_pretrained(folder).config
    with init_empty_weights(include_buffers=False):
        model = LlamaForCausalLM(config)
    model.tie_weights()
    return model.eval()


def same(one, other):
    """Parameters, flags, places and logits, bit for bit."""
    left, right = dict(one.named_parameters()), dict(other.named_parameters())
    assert list(left) == list(right)
    for name, tensor in left.items():
        assert tensor.dtype == right[name].dtype, name
        assert torch.equal(tensor, right[name]), name
        assert tensor.requires_grad == right[name].requires_grad, name
    assert not any(tensor.is_meta for tensor in (*left.values(), *one.buffers()))
    assert {n: m.training for n, m in one.named_modules()} == {n: m.training for n, m in other.named_modules()}
    with torch.no_grad():
        assert torch.equal(one(input_ids=tokens()).logits, other(input_ids=tokens()).logits)


# --- what comes out ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shard", [None, "20KB"], ids=["one file", "sharded"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_result_is_that_of_convert(shard, tied, dtype, tmp_path):
    saved(tmp_path, shard, tied=tied, dtype=dtype)
    assert (tmp_path / INDEX).exists() == (shard is not None)
    fields = {"r": 4, "init_seed": 5}
    want = fastlora.convert(AutoModelForCausalLM.from_pretrained(tmp_path), progress=False, **fields)
    got = fastlora.load_quantized(tmp_path, progress=False, **fields)
    assert type(got) is LlamaForCausalLM
    assert (got.lm_head.weight is got.model.embed_tokens.weight) == tied
    same(got, want)
    same(fastlora.load_quantized(tmp_path, model=empty(tmp_path), progress=False, **fields), want)


@pytest.mark.parametrize(
    "options",
    [
        {"quantize": "fp4", "blocksize": 128, "double_quant": False, "compute_dtype": torch.bfloat16},
        {"use_dora": True, "bias": "all"},
        {"init_lora_weights": "olora"},
        {"init_lora_weights": "loftq"},
        {"target_modules": ["q_proj", "down_proj"], "modules_to_save": ["lm_head"], "adapter_name": "mine"},
    ],
    ids=lambda options: next(iter(options)),
)
def test_every_option_of_convert(options, tmp_path):
    saved(tmp_path, "20KB")
    fields = {"r": 4, "init_seed": 5, "progress": False} | options
    want = fastlora.convert(AutoModelForCausalLM.from_pretrained(tmp_path), **fields)
    same(fastlora.load_quantized(tmp_path, **fields), want)


def test_a_dtype_is_that_of_from_pretrained(tmp_path):
    saved(tmp_path)
    want = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    fields = {"r": 4, "init_seed": 5, "progress": False}
    got = fastlora.load_quantized(tmp_path, dtype=torch.float32, **fields)
    assert got.config.dtype == torch.float32
    same(got, fastlora.convert(want, **fields))


class Plain(nn.Module):
    """No transformers: linears, a buffer in the checkpoint, one that is not, and a layer in two places."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 8, bias=False))
        self.twice = nn.ModuleList([self.body[2]])
        self.register_buffer("scale", torch.full((1,), 3.0), persistent=False)

    def forward(self, x):
        return self.body(x) * self.scale


def test_any_module_and_its_buffers(tmp_path):
    model = Plain().eval()
    model.body[1].running_mean.normal_()
    state = {name: t for name, t in model.state_dict().items() if not name.startswith("twice")}
    save_file(state, tmp_path / SINGLE)
    with init_empty_weights(include_buffers=False):
        bare = Plain().eval()
    bare.twice[0] = bare.body[2]
    fields = {"r": 2, "target_modules": ["body.0"], "init_seed": 1}
    got = fastlora.load_quantized(tmp_path, model=bare, **fields)
    assert got is bare
    want = fastlora.convert(model, **fields)
    x = torch.randn(5, 8)
    assert torch.equal(got(x), want(x))
    assert got.twice[0] is got.body[2]


def test_what_comes_out_trains_saves_and_loads(tmp_path):
    saved(tmp_path / "base")
    model = fastlora.load_quantized(tmp_path / "base", r=4, progress=False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(6):
        loss = model(input_ids=tokens(), labels=tokens()).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    fastlora.save_adapter(model, tmp_path / "adapter")
    again = fastlora.load_quantized(tmp_path / "base", r=4, progress=False)
    fastlora.load_adapter(again, tmp_path / "adapter")
    with torch.no_grad():
        assert torch.equal(again(input_ids=tokens()).logits, model(input_ids=tokens()).logits)


def test_a_progress_bar_shows_unless_it_is_switched_off(tmp_path, capsys):
    saved(tmp_path)
    fastlora.load_quantized(tmp_path, r=2)
    assert "quantize" in capsys.readouterr().err
    fastlora.load_quantized(tmp_path, r=2, progress=False)
    assert capsys.readouterr().err == ""


# --- memory -----------------------------------------------------------------------------------------------------------

_MEASURE = """
import sys, torch
from pathlib import Path
from torch import nn
import fastlora

def status(field):
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024

folder, count, width, streamed = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4] == "streamed"
torch.set_num_threads(1)
fastlora.convert(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)), r=4)  # what is loaded once
with torch.device("meta"):
    model = nn.Sequential(*[nn.Linear(width, width, bias=False, dtype=torch.bfloat16) for _ in range(count)])
Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
before = status("VmRSS")
if streamed:
    fastlora.load_quantized(folder, model=model, r=4, progress=False)
else:
    from safetensors.torch import load_file
    model.load_state_dict({k: t.clone() for k, t in load_file(folder / "model.safetensors").items()}, assign=True)
    fastlora.convert(model, r=4, progress=False)
print(status("VmHWM") - before, sum(p.nbytes for p in model.parameters()))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_peak_is_the_result_and_one_dense_weight(tmp_path):
    """Measured: within 8 MB of it; a model that is loaded first holds all of its dense weights."""
    count, width = 10, 2560
    dense, spare = 2 * width * width, 16 * 2**20
    weights = {f"{place}.weight": torch.randn(width, width, dtype=torch.bfloat16) for place in range(count)}
    save_file(weights, tmp_path / SINGLE)

    def peak(how: str) -> tuple[int, int]:
        command = [sys.executable, "-c", _MEASURE, str(tmp_path), str(count), str(width), how]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        if "Permission" in done.stderr:
            pytest.skip("the peak cannot be reset here")
        assert done.returncode == 0, done.stderr
        grown, final = map(int, done.stdout.split())
        return grown, final

    grown, final = peak("streamed")
    assert final < count * dense / 3
    assert grown <= final + dense + spare
    assert peak("loaded")[0] > count * dense


# --- what goes wrong --------------------------------------------------------------------------------------------------


def edit(folder, change):
    """Rewrite the single file's tensors."""
    state = load_file(folder / SINGLE)
    change(state)
    save_file(state, folder / SINGLE, metadata={"format": "pt"})


def cut(folder, size):
    data = (folder / SINGLE).read_bytes()
    (folder / SINGLE).write_bytes(data[: int(len(data) * size)])


def bad_value(value):
    def change(state):
        state[Q1] = state[Q1].clone()
        state[Q1][3, 5] = value

    return lambda folder: edit(folder, change)


def pickled(folder):
    torch.save(load_file(folder / SINGLE), folder / "pytorch_model.bin")
    (folder / SINGLE).unlink()


def index(text):
    return lambda folder: (folder / INDEX).write_text(text)


BAD = {
    "pickle only": (pickled, FileNotFoundError, "neither model.safetensors nor .*index.json; pickled"),
    "empty file": (lambda d: (d / SINGLE).write_bytes(b""), StateDictError, "model.safetensors is damaged"),
    "truncated header": (lambda d: cut(d, 0.001), StateDictError, "model.safetensors is damaged"),
    "truncated by a byte": (lambda d: cut(d, 0.99999), StateDictError, "model.safetensors is damaged"),
    "text": (lambda d: (d / SINGLE).write_text("<html>"), StateDictError, "model.safetensors is damaged"),
    "missing key": (lambda d: edit(d, lambda s: s.pop(Q1)), StateDictError, f"missing keys {Q1}, unexpected keys none"),
    "unexpected key": (
        lambda d: edit(d, lambda s: s.update(foreign=torch.zeros(3))),
        StateDictError,
        "missing keys none, unexpected keys foreign",
    ),
    "other shape": (
        lambda d: edit(d, lambda s: s.update({Q1: torch.zeros(3, 4)})),
        StateDictError,
        rf"{Q1}: expected shape \(32, 32\), got \(3, 4\) in model.safetensors",
    ),
    "NaN": (bad_value(torch.nan), ShapeError, "cannot quantize model.layers.1.self_attn.q_proj: .*NaN"),
    "inf": (bad_value(torch.inf), ShapeError, "cannot quantize model.layers.1.self_attn.q_proj: .*inf"),
    "integers": (
        lambda d: edit(d, lambda s: s.update({Q1: torch.ones(32, 32, dtype=torch.int8)})),
        DtypeError,
        "model.layers.1.self_attn.q_proj: expected a floating-point weight, got torch.int8",
    ),
    "float64": (
        lambda d: edit(d, lambda s: s.update({Q1: s[Q1].double()})),
        DtypeError,
        "cannot quantize model.layers.1.self_attn.q_proj: expected float32, bfloat16 or float16",
    ),
    "index not JSON": (index("{half"), StateDictError, "index.json: expected a JSON object with weight_map"),
    "index without a map": (index("{}"), StateDictError, "index.json: expected a JSON object with weight_map"),
    "index a list": (index("[]"), StateDictError, "index.json: expected a JSON object with weight_map"),
    "index leads outside": (
        index(json.dumps({"weight_map": {"a": "../other.safetensors"}})),
        StateDictError,
        "files of the same folder",
    ),
    "a shard is missing": (
        index(json.dumps({"weight_map": {"a": "model-00001-of-00002.safetensors"}})),
        FileNotFoundError,
        "model-00001-of-00002.safetensors is missing",
    ),
    "index and file disagree": (
        index(json.dumps({"weight_map": {"a": SINGLE}})),
        StateDictError,
        "says that a is in model.safetensors; it is not",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_folder_is_one_clear_error_and_the_model_as_it_was(name, tmp_path):
    damage, error, text = BAD[name]
    model = empty(saved(tmp_path))
    before = {key: id(value) for key, value in model.state_dict(keep_vars=True).items()}
    damage(tmp_path)
    with pytest.raises(error, match=text):
        fastlora.load_quantized(tmp_path, model=model, r=4, progress=False)
    assert {key: id(value) for key, value in model.state_dict(keep_vars=True).items()} == before
    assert all(parameter.is_meta and parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"target_modules": ["q_prj"]}, ConfigError, "near: .*q_proj"),
        ({"quantize": None}, ConfigError, 'quantize must be "nf4" or "fp4", got None'),
        ({"blocksize": 7}, ConfigError, "blocksize"),
        ({"dtype": torch.int8}, DtypeError, "dtype must be a floating-point torch.dtype"),
        ({"rank": 3}, ConfigError, "rank"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_arguments_change_nothing(options, error, text, tmp_path):
    model = empty(saved(tmp_path))
    with pytest.raises(error, match=text):
        fastlora.load_quantized(tmp_path, model=model, progress=False, **options)
    assert all(parameter.is_meta for parameter in model.parameters())


def test_tied_tensors_that_differ_in_the_files(tmp_path):
    saved(tmp_path, tied=True)
    edit(tmp_path, lambda s: s.update({"lm_head.weight": s["model.embed_tokens.weight"].clone()}))
    fastlora.load_quantized(tmp_path, r=2, progress=False)
    edit(tmp_path, lambda s: s.update({"lm_head.weight": s["model.embed_tokens.weight"] + 1}))
    with pytest.raises(StateDictError, match=r"model\.embed_tokens\.weight and lm_head\.weight are one tensor"):
        fastlora.load_quantized(tmp_path, r=2, progress=False)


def test_a_forgotten_tie_and_a_buffer_on_meta_are_named(tmp_path):
    saved(tmp_path, tied=True)
    config = AutoModelForCausalLM.from_pretrained(tmp_path).config
    with init_empty_weights(include_buffers=False):
        untied = LlamaForCausalLM(config)
    untied.lm_head.weight = nn.Parameter(untied.lm_head.weight.clone())
    with pytest.raises(StateDictError, match=r"missing keys lm_head\.weight.*is a tie_weights\(\) missing"):
        fastlora.load_quantized(tmp_path, model=untied, r=2, progress=False)
    with torch.device("meta"):
        hollow = LlamaForCausalLM(config)
    with pytest.raises(ConfigError, match=r"the buffer .*inv_freq is on the meta device"):
        fastlora.load_quantized(tmp_path, model=hollow, r=2, progress=False)


def test_a_folder_without_config_or_packages(tmp_path, monkeypatch):
    saved(tmp_path)
    with pytest.raises(FileNotFoundError, match="is no folder"):
        fastlora.load_quantized(tmp_path / "elsewhere")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ConfigError, match=r"needs transformers and accelerate .* or pass model="):
        fastlora.load_quantized(tmp_path)


def test_a_quantized_folder_is_named(tmp_path):
    saved(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="quantized already"):
        fastlora.load_quantized(tmp_path)
