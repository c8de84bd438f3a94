"""The defects of MoE-PEFT and mLoRA that must not come back, one test each of what is right."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import fastlora
from fastlora import ConfigError, FastloraError, moe
from tests.model_tools import llama

HIDDEN, WIDTH, EXPERTS = 8, 12, 4


class MLP(nn.Module):
    """A gated MLP as Llama has it."""

    def __init__(self, bias: bool = True, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(HIDDEN, WIDTH, bias, dtype=dtype)
        self.up_proj = nn.Linear(HIDDEN, WIDTH, bias, dtype=dtype)
        self.down_proj = nn.Linear(WIDTH, HIDDEN, bias, dtype=dtype)
        self.act_fn = nn.SiLU()

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


def _moved(module, dtype=torch.float64):
    """Every trained value off its start."""
    module.to(dtype)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator, dtype=dtype)
                parameter.mul_(1 + 0.3 * noise) if "magnitude" in name else parameter.copy_(0.5 * noise)
    return module


def mixlora(dtype=torch.float64, bias=True, **fields):
    torch.manual_seed(0)
    config = {"peft_type": "MIXLORA", "num_experts": EXPERTS, "r": 2, "init_seed": 0} | fields
    return _moved(moe.MixLoraMLP.from_mlp(MLP(bias, dtype), moe.config_from_dict(config)), dtype)


def plugin(kind, dtype=torch.float64, **fields):
    torch.manual_seed(0)
    linear = nn.Linear(HIDDEN, WIDTH, dtype=dtype)
    return _moved(kind.from_linear(linear, kind.config_class(num_experts=EXPERTS, r=2, init_seed=0, **fields)), dtype)


MODULES = {
    "MixLoRA": mixlora,
    "LoRAMoE": lambda **fields: plugin(moe.LoraMoeLinear, **fields),
    "MoLA": lambda **fields: plugin(moe.MolaLinear, **fields),
}
EVERY = pytest.mark.parametrize("make", MODULES.values(), ids=MODULES)


def tokens(rows=6, dtype=torch.float64):
    return torch.randn(2, rows, HIDDEN, generator=torch.Generator().manual_seed(2), dtype=dtype)


@EVERY
def test_d1_no_dropout_in_eval(make):
    """Modules are registered, so `.eval()` of whatever holds them reaches their dropout."""
    holder, plain = nn.Sequential(make(lora_dropout=0.5)), make(lora_dropout=0.0)
    x = tokens()
    assert not torch.equal(holder(x), holder(x))
    holder.eval()
    assert torch.equal(holder(x), holder(x))
    torch.testing.assert_close(holder(x), plain(x))
    adapter = fastlora.LoraLinear(HIDDEN, WIDTH, r=2, lora_dropout=0.5, init_lora_weights=False)
    adapted = nn.Sequential(adapter).eval()
    assert torch.equal(adapted(x.float()), adapted(x.float()))


@EVERY
def test_d2_gradients_are_of_the_dropped_input(make):
    """Against finite differences under the same mask: dA and dx, which MoE-PEFT takes from the undropped x."""
    module, x = make(lora_dropout=0.4), tokens().requires_grad_()
    dy = torch.randn_like(module(x))

    def loss():
        torch.manual_seed(7)
        return (module(x) * dy).sum()

    assert (loss() - (module.eval()(x) * dy).sum()).abs() > 1e-3
    module.train()
    first = next(p for n, p in module.named_parameters() if n.endswith("lora_A"))
    for place in (first, x):
        (grad,) = torch.autograd.grad(loss(), place)
        step = torch.randn(place.shape, generator=torch.Generator().manual_seed(3), dtype=place.dtype) * 1e-6
        with torch.no_grad():
            place.add_(step)
            above = loss()
            place.sub_(2 * step)
            below = loss()
            place.add_(step)
        torch.testing.assert_close((grad * step).sum(), (above - below) / 2, rtol=1e-5, atol=1e-11)


@EVERY
def test_d3_no_dropout_is_allowed_and_does_nothing(make):
    module, x = make(lora_dropout=0.0), tokens()
    assert torch.equal(module.train()(x), module.eval()(x))


@EVERY
def test_d4_frozen_adapters_still_count(make):
    module, x = make(), tokens()
    want = module(x)
    module.requires_grad_(False)
    torch.testing.assert_close(module(x), want)
    for name, parameter in module.named_parameters():
        if "lora_B" in name:
            parameter.zero_()
    assert (module(x) - want).abs().max() > 0.01


def test_d5_rows_without_the_adapter_are_the_base(monkeypatch):
    """Nothing uninitialised: memory is poisoned before."""
    linear = nn.Linear(HIDDEN, WIDTH)
    layer = fastlora.LoraLinear.from_linear(linear, r=2, use_dora=True, init_lora_weights=False, adapter_name="one")
    x = torch.randn(3, 4, HIDDEN)
    empty = torch.empty
    poisoned = lambda *size, **kw: empty(*size, **kw).fill_(float("nan"))  # noqa: E731
    monkeypatch.setattr(torch, "empty", poisoned)
    y = layer(x, adapter_names=[None, "one", None])
    for row in (0, 2):
        torch.testing.assert_close(y[row], linear(x[row]))
    assert (y[1] - linear(x[1])).abs().max() > 0.01


def test_d6_dora_leaves_the_bias_unscaled_and_keeps_the_base():
    """g (W x + s B A x) + b, in a plain layer and in an expert."""
    x = tokens()
    layer = fastlora.LoraLinear(HIDDEN, WIDTH, r=2, use_dora=True, init_lora_weights=False, dtype=torch.float64)
    layer = _moved(layer)
    with torch.no_grad():
        layer.bias.normal_()
    delta = layer.scaling["default"] * layer.lora_B["default"] @ layer.lora_A["default"]
    merged = layer.weight + delta
    gain = layer.lora_magnitude["default"] / merged.norm(dim=1)
    torch.testing.assert_close(layer(x), x @ (gain[:, None] * merged).T + layer.bias)

    module = mixlora(use_dora=True, top_k=1)
    weights = {}
    for name, part in module.projections.items():
        merged = part.weight + part.scaling * part.lora_B @ part.lora_A
        weights[name] = part.lora_magnitude[..., None] * merged / merged.norm(dim=2, keepdim=True), part.bias
    chosen = (x @ module.gate.weight.T).argmax(-1)
    want = torch.empty_like(x)
    for place in torch.cartesian_prod(torch.arange(2), torch.arange(6)).tolist():
        token, expert = x[tuple(place)], int(chosen[tuple(place)])
        gate, up, down = (weights[name] for name in ("gate_proj", "up_proj", "down_proj"))
        hidden = nn.functional.silu(gate[0][expert] @ token + gate[1]) * (up[0][expert] @ token + up[1])
        want[tuple(place)] = down[0][expert] @ hidden + down[1]
    torch.testing.assert_close(module(x), want)


@pytest.mark.parametrize("kind", [moe.LoraMoeLinear, moe.MolaLinear])
def test_d7_use_dora_is_refused_where_it_would_be_ignored(kind):
    linear = nn.Linear(HIDDEN, WIDTH)
    with pytest.raises(ConfigError, match="use_dora cannot be honoured"):
        kind.from_linear(linear, {"peft_type": kind.config_class.peft_type, "num_experts": 2, "use_dora": True})


def test_d8_switch_at_inference_is_the_same_formula():
    """Not its input: what training computes without jitter and dropout."""
    fields = {"routing_strategy": "mixlora-switch", "expert_capacity": 2}
    module, x = mixlora(jitter_noise=0.0, **fields), tokens()
    want = module.train()(x)
    torch.testing.assert_close(module.eval()(x), want)
    assert (want - x).abs().max() > 0.1
    jittered = mixlora(jitter_noise=0.3, ffn_dropout=0.5, **fields)
    torch.testing.assert_close(jittered.eval()(x), want)


@pytest.mark.parametrize("strategy", ["mixlora", "mixlora-dynamic", "mixlora-switch"])
def test_d9_jitter_does_not_write_into_the_callers_tensor(strategy):
    module, x = mixlora(routing_strategy=strategy, jitter_noise=0.5), tokens()
    before = x.clone()
    assert not torch.equal(module(x), module(x))
    assert torch.equal(x, before)


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_d10_the_balance_loss_is_k_when_balanced_or_1_if_asked(top_k):
    module = mixlora(top_k=top_k, router_aux_loss_coef=1.0, router_loss=True)
    ramp = torch.tensor([4.0, 3.0, 2.0, 1.0], dtype=torch.float64)
    x = torch.zeros(4, HIDDEN, dtype=torch.float64)
    with torch.no_grad():
        module.gate.weight.zero_()
        module.gate.weight[:, :EXPERTS] = torch.eye(EXPERTS)
        for row in range(4):
            x[row, :EXPERTS] = ramp.roll(row)
    module(x)
    assert moe.router_loss(module).item() == pytest.approx(top_k, rel=1e-6)
    assert moe.router_loss(module, normalized=True).item() == pytest.approx(1.0, rel=1e-6)


def test_d11_an_experts_config_is_a_plain_one():
    config = moe.MixLoraConfig(num_experts=3, r=5, lora_alpha=7, lora_dropout=0.1)
    expert = config.expert_config()
    assert type(expert) is fastlora.LoraConfig
    assert (expert.r, expert.lora_alpha, expert.lora_dropout) == (5, 7, 0.1)
    own = config.replace(expert_lora={"r": 2}).expert_config()
    assert (own.r, own.lora_alpha) == (2, 7)


@EVERY
def test_d12_a_call_in_inference_mode_leaves_training_alone(make):
    module, x = make(), tokens().requires_grad_()
    with torch.inference_mode():
        module(tokens())
    module(x).sum().backward()
    assert x.grad.isfinite().all()


def test_d12_not_even_the_first_call_of_a_process():
    """Where no cache has been filled before."""
    code = (
        "import torch\n"
        "from fastlora import moe\n"
        "for kind in (moe.LoraMoeLinear, moe.MolaLinear):\n"
        "    config = kind.config_class(num_experts=3, r=2)\n"
        "    module = kind.from_linear(torch.nn.Linear(8, 8), config)\n"
        "    with torch.inference_mode():\n"
        "        module(torch.ones(2, 5, 8))\n"
        "    x = torch.ones(2, 5, 8, requires_grad=True)\n"
        "    module(x).sum().backward()\n"
        "    assert x.grad.isfinite().all()\n"
    )
    root = Path(__file__).resolve().parent.parent
    environment = dict(os.environ, PYTHONPATH=str(root), OMP_NUM_THREADS="1")
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=root, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_d13_magnitudes_are_trained_saved_and_loaded(tmp_path):
    fields = {"peft_type": "MIXLORA", "num_experts": 3, "r": 2, "use_dora": True, "init_seed": 0}
    model = moe.convert(llama(bias=False), fields, progress=False).train()
    names = [name for name, p in model.named_parameters() if "lora_magnitude" in name and p.requires_grad]
    assert len(names) == 2 * (4 + 3)
    start = {name: model.get_parameter(name).clone() for name in names}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    ids = torch.arange(20).reshape(2, 10)
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    assert all(not torch.equal(model.get_parameter(name), start[name]) for name in names)
    saved = load_file(moe.save_adapter(model, tmp_path) / "adapter_model.safetensors")
    assert sum("lora_magnitude_vector" in key for key in saved) == 2 * (4 + 3 * 3)
    again = moe.load_adapter(llama(bias=False), tmp_path)
    assert all(torch.equal(again.get_parameter(name), model.get_parameter(name)) for name in names)
    part = again.model.layers[0].mlp.up_proj
    assert (part.lora_magnitude - part.weight_norm()).abs().max() > 0.05  # not what a reload would compute


def test_d14_several_mixtures_in_one_model_each_do_their_part():
    """MixLoRA on one layer, MoLA's linears on another; the loss copes with routers that have not run."""
    model = llama(bias=False)
    layers = model.model.layers
    layers[0].mlp = moe.MixLoraMLP.from_mlp(layers[0].mlp, moe.MixLoraConfig(num_experts=3, r=2, init_seed=0))
    mola = moe.MolaConfig(num_experts=4, r=2, router_loss=True, init_seed=0)
    for name in ("gate_proj", "up_proj", "down_proj"):
        setattr(layers[1].mlp, name, moe.MolaLinear.from_linear(getattr(layers[1].mlp, name), mola))
    model.idle = moe.MolaLinear.from_linear(nn.Linear(4, 4), mola)
    _moved(model.train(), torch.float32)
    ids = torch.arange(20).reshape(2, 10)
    out = model(input_ids=ids, labels=ids)
    assert len(moe.router_logits(model)) == 4
    (out.loss + moe.router_loss(model, torch.ones_like(ids))).backward()
    for name, parameter in model.named_parameters():
        if "idle" not in name and ("lora_B" in name or name.endswith((".mlp.gate.weight", "_proj.gate.weight"))):
            assert parameter.grad is not None, name
            assert parameter.grad.abs().max() > 0, name
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name and "layers.1" in name:
                parameter.zero_()
    assert (model(input_ids=ids).logits - out.logits).abs().max() > 1e-3


def test_d15_dora_over_4_bit_weights_stays_on_its_device():
    """No detour over CUDA, which this machine may not have: the formula on the dequantized weight."""
    pytest.importorskip("bitsandbytes")
    x = torch.randn(3, 64)
    layer = fastlora.QLoraLinear(64, 32, r=2, use_dora=True, init_lora_weights=False)
    merged = layer.dequantize(torch.float32) + layer.delta_weight("default")
    gain = layer.lora_magnitude["default"] / merged.norm(dim=1)
    want = x @ (gain[:, None] * merged).T + layer.bias
    torch.testing.assert_close(layer(x), want, rtol=1e-4, atol=1e-4)

    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate_proj, self.up_proj = nn.Linear(64, 64), nn.Linear(64, 64)
            self.down_proj, self.act_fn = nn.Linear(64, 64), nn.SiLU()

        def forward(self, x):
            return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))

    config = moe.MixLoraConfig(num_experts=2, r=2, use_dora=True, init_seed=0)
    module = moe.MixLoraMLP.from_mlp(Wide(), config, quantize="nf4")
    y = module(x)
    y.sum().backward()
    assert {tensor.device.type for tensor in (y, *module.parameters())} == {"cpu"}
    part = module.up_proj
    norms = (part.dequantize(torch.float32) + part.scaling * part.lora_B @ part.lora_A).norm(dim=2)
    torch.testing.assert_close(part.weight_norm(), norms, rtol=1e-4, atol=1e-4)


def test_d16_an_8_bit_base_is_refused_by_name_not_by_a_missing_function():
    bnb = pytest.importorskip("bitsandbytes")
    linear = bnb.nn.Linear8bitLt(HIDDEN, WIDTH, has_fp16_weights=False)
    linear.weight.data = torch.ones(WIDTH, HIDDEN, dtype=torch.int8)  # as it is once it has been on a device
    for adopt in (
        lambda: fastlora.LoraLinear.from_linear(linear, r=2, use_dora=True),
        lambda: fastlora.QLoraLinear.from_linear(linear, r=2, use_dora=True),
        lambda: moe.MolaLinear.from_linear(linear, moe.MolaConfig(num_experts=2)),
    ):
        with pytest.raises(FastloraError, match=r"torch\.int8 in Linear8bitLt \(8-bit"):
            adopt()


def test_there_is_one_test_for_each_defect():
    found = {name.split("_")[1] for name in globals() if name.startswith("test_d")}
    assert found == {f"d{number}" for number in range(1, 17)}
