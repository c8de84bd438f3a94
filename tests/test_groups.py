"""Groups in models: found by a call, computed together, bit for bit the single layers; all that PEFT does after."""

from __future__ import annotations

import copy
import io
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import fastlora
from fastlora.errors import ConfigError, DtypeError
from fastlora.nn import gated, groups
from fastlora.nn.groups import groups_of
from tests.accelerate_tools import quantized
from tests.model_tools import llama, tokens

ATTENTION, MLP = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj", "down_proj")


def own(quantize: str | None = "nf4", **fields: Any) -> nn.Module:
    model = llama()
    fastlora.convert(model, quantize=quantize, blocksize=32, progress=False, **{"r": 4, "init_seed": 0} | fields)
    return off_start(model)


def of_peft(four_bit: bool = False, **fields: Any) -> nn.Module:
    model = quantized(llama()) if four_bit else llama()
    config = peft.LoraConfig(**{"r": 4, "target_modules": "all-linear", "lora_alpha": 8} | fields)
    return off_start(fastlora.accelerate(peft.get_peft_model(model, config)))


def off_start(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1, generator=generator)
    return model.train()


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of the groups computed together, in order."""
    seen: list[int] = []
    whole = groups.projections

    def watch(x: Tensor, group: Any, **keywords: Any) -> Any:
        seen.append(len(group))
        return whole(x, group, **keywords)

    monkeypatch.setattr(groups, "projections", watch)
    return seen


def step(model: nn.Module, seed: int = 0) -> tuple[float, dict[str, Tensor]]:
    """The loss, and every gradient."""
    torch.manual_seed(seed)
    model.zero_grad()
    loss = model(input_ids=tokens(), labels=tokens()).loss
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def same(one: tuple[float, dict[str, Tensor]], other: tuple[float, dict[str, Tensor]]) -> bool:
    return one[0] == other[0] and all(torch.equal(grad, other[1][name]) for name, grad in one[1].items())


BUILD = {
    "nf4": lambda: own(),
    "dense": lambda: own(None),
    "dora": lambda: own(use_dora=True),
    "ranks": lambda: own(rank_pattern={"k_proj": 7, "up_proj": 2}),
    "some": lambda: own(target_modules=["q_proj", "v_proj", "up_proj", "down_proj"]),
    "peft": lambda: of_peft(),
    "peft-4bit": lambda: of_peft(four_bit=True),
    "peft-dora": lambda: of_peft(use_dora=True),
    "peft-rank": lambda: of_peft(rank_pattern={"k_proj": 7}, use_rslora=True),
}


@pytest.mark.parametrize("name", list(BUILD))
def test_found_and_bitwise_the_single_layers(name, computed):
    model = BUILD[name]()
    want = step(copy.deepcopy(model))
    assert fastlora.group(model) is model
    computed.clear()
    got = step(model)
    if name == "some":  # k_proj, a plain linear, gives its dx before or between: a sum in another order
        assert got[0] == want[0]
        assert all(torch.allclose(got[1][each], grad, rtol=1e-4, atol=1e-6) for each, grad in want[1].items())
    else:
        assert same(got, want)
    assert computed == ([2, 2] if name == "some" else [3, 2, 3, 2])
    found = {tuple(each.rpartition(".")[2] for each in group) for group in groups_of(model).values()}
    assert found == ({("q_proj", "v_proj")} if name == "some" else {ATTENTION, MLP})
    model.eval()
    computed.clear()
    with torch.no_grad():
        got = model(input_ids=tokens()).logits
        assert computed == ([2, 2] if name == "some" else [3, 2, 3, 2])
        assert torch.equal(got, fastlora.ungroup(model)(input_ids=tokens()).logits)


def snapshot(model: nn.Module) -> list[tuple[Any, ...]]:
    """Everything that hangs on the modules: attributes, hooks, parameters, classes."""
    sizes = {name: [len(v) for v in m.__dict__.values() if hasattr(v, "__len__")] for name, m in model.named_modules()}
    return [(name, type(module), sorted(module.__dict__), sizes[name]) for name, module in model.named_modules()] + [
        (name, id(parameter)) for name, parameter in model.named_parameters()
    ]


@pytest.mark.parametrize("name", ["nf4", "peft", "peft-4bit"])
def test_undone_without_a_trace(name, computed):
    model = BUILD[name]()
    step(model)
    before = snapshot(model)
    fastlora.group(model)
    step(model)
    fastlora.ungroup(fastlora.ungroup(model))
    computed.clear()
    step(model)
    assert snapshot(model) == before and computed == [] and groups_of(model) == {}


def test_decelerate_takes_groups_away():
    model = peft.get_peft_model(llama(), peft.LoraConfig(r=4, target_modules="all-linear"))
    model(input_ids=tokens())
    before = snapshot(model)
    fastlora.accelerate(model, group=True)
    assert groups_of(model)
    fastlora.decelerate(model)
    assert snapshot(model) == before


def test_the_call_that_looks_leaves_nothing_behind():
    model = own(lora_dropout=0.3)
    torch.manual_seed(4)
    state = torch.get_rng_state()
    fastlora.group(model, tokens())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(groups.SCOPE in module.__dict__ for module in model.modules())


@pytest.mark.parametrize(
    "asked", [True, {"input_ids": tokens()}, (tokens(),), tokens()], ids=lambda a: type(a).__name__
)
def test_asked_for_by_convert_and_accelerate(asked):
    model = llama()
    fastlora.convert(model, r=4, progress=False, group=asked)
    assert len(groups_of(model)) == 12
    wrapped = peft.get_peft_model(llama(), peft.LoraConfig(r=4, target_modules="all-linear"))
    assert len(groups_of(fastlora.accelerate(wrapped, group=asked))) == 12
    plain = peft.get_peft_model(llama(), peft.LoraConfig(r=4, target_modules="all-linear"))
    assert groups_of(fastlora.accelerate(plain)) == {}


# --- gated MLPs -------------------------------------------------------------------------------------------------------


class Mlp(nn.Module):
    """A gated MLP under other names; `shape` makes it something else."""

    def __init__(self, act: nn.Module | None = None, shape: str = "") -> None:
        super().__init__()
        torch.manual_seed(0)
        fields: dict[str, Any] = {"r": 2, "init_lora_weights": False}
        make = fastlora.LoraLinear.from_linear
        self.b, self.c, self.a = (make(nn.Linear(*size), **fields) for size in ((8, 6), (6, 8), (8, 6)))
        self.f, self.shape = act or nn.SiLU(), shape
        if shape == "parameter":
            self.extra = nn.Parameter(torch.ones(8))
        if shape == "two":
            self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.f(self.a(x)) * self.b(x)
        if self.shape == "dropout":
            hidden = nn.functional.dropout(hidden, 0.5, self.training)
        if self.shape == "negative":
            hidden = hidden if bool((x > -1.5).all()) else -hidden
        y = self.c(hidden)
        return y + x if self.shape == "residual" else y


ACTS = {
    "silu": nn.SiLU(),
    "gelu": nn.GELU(),
    "gelu_tanh": nn.GELU(approximate="tanh"),
    "relu": nn.ReLU(),
}


@pytest.mark.parametrize("act", list(ACTS))
def test_gated_mlps_are_found_by_what_they_compute(act):
    model = Mlp(ACTS[act])
    single = copy.deepcopy(model)
    fastlora.group(model, torch.randn(5, 8))
    assert isinstance(model, Mlp) and type(model).__name__ == "Mlp" and type(model) is not Mlp
    assert model.__dict__[gated.GATED] == gated.Names("a", "b", "c", act)
    x = torch.randn(4, 8, requires_grad=True)
    got, want = model(x), single(x)
    assert torch.equal(got, want)
    for one, other in zip(_gradients([got], x, model), _gradients([want], x, single), strict=True):
        assert torch.equal(one, other)
    other = copy.deepcopy(model)
    assert type(other) is type(model) and torch.equal(other(x), want)
    fastlora.ungroup(model)
    assert type(model) is Mlp and gated.GATED not in model.__dict__
    assert type(other) is not Mlp


@pytest.mark.parametrize(
    "model",
    [
        *(Mlp(shape=shape) for shape in ("parameter", "two", "dropout", "negative", "residual")),
        Mlp(nn.Tanh()),
        Mlp(nn.Softplus()),
        Mlp(nn.PReLU()),
    ],
    ids=lambda model: model.shape or type(model.f).__name__,
)
def test_what_is_no_gated_mlp_is_grouped_only(model):
    single = copy.deepcopy(model)
    fastlora.group(model, torch.randn(5, 8))
    assert type(model) is Mlp and gated.GATED not in model.__dict__ and groups_of(model)
    assert model.training and all(module.training for module in model.modules())
    x = torch.randn(4, 8)
    torch.manual_seed(1)
    got = model(x)
    torch.manual_seed(1)
    assert torch.equal(got, single(x))


def test_a_gated_mlp_whose_layers_cannot_join_runs_its_own_forward(computed):
    model = fastlora.group(Mlp(), torch.randn(5, 8))
    single = fastlora.ungroup(copy.deepcopy(model))
    x = torch.randn(4, 8)
    for change, joined in (
        (lambda m: m.c.merge(), [2]),
        (lambda m: m.a.merge(), []),
        (lambda m: (m.a.unmerge(), m.c.unmerge()), [2]),
        (lambda m: setattr(m, "seen", m.f.register_forward_hook(lambda *_: None)), [2]),
    ):
        change(model)
        change(single)
        computed.clear()
        assert torch.equal(model(x), single(x))
        assert computed == joined
    called = []
    model.c.register_forward_hook(lambda *_: called.append(1))
    model(x)
    assert called == [1]


def test_another_class_on_top_is_said():
    model = fastlora.group(Mlp(), torch.randn(5, 8))
    fused = type(model)
    model.__class__ = type("Other", (fused,), {})
    with pytest.raises(ConfigError, match="derived from a grouped module"):
        fastlora.ungroup(model)
    model.__class__ = fused
    assert type(fastlora.ungroup(model)) is Mlp


# --- single layers in other company -----------------------------------------------------------------------------------


class Parent(nn.Module):
    """Calls its layers as it is told."""

    def __init__(self, count: int = 3) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = [
            fastlora.LoraLinear.from_linear(nn.Linear(8, 6 + i), r=2, init_lora_weights=False) for i in range(count)
        ]
        for i, layer in enumerate(self.layers):
            self.add_module(f"lin{i}", layer)
        self.told: Any = None

    def forward(self, x: Tensor) -> list[Tensor]:
        return (self.told or self.usual)(*self.layers, x)

    @staticmethod
    def usual(one: Any, two: Any, three: Any, x: Tensor) -> list[Tensor]:
        return [one(x), two(x), three(x)]


def _gradients(ys: list[Tensor], x: Tensor, model: nn.Module) -> tuple[Tensor | None, ...]:
    loss = sum(y.square().sum() for y in ys if y.requires_grad)
    leaves = [x, *(parameter for parameter in model.parameters() if parameter.requires_grad)]
    return torch.autograd.grad(loss, leaves, allow_unused=True)


def test_layers_called_in_other_ways_are_right(computed):
    model = fastlora.group(Parent(), torch.randn(4, 8))
    single = copy.deepcopy(fastlora.ungroup(copy.deepcopy(model)))
    x, other = torch.randn(4, 8, requires_grad=True), torch.randn(4, 8)

    def changed(one, two, three, x):
        x = x * 1
        first = one(x)
        x.data_ptr()
        x.add_(1)
        return [first, two(x), three(x)]

    def no_grad_inside(one, two, three, x):
        with torch.no_grad():
            first = one(x)
        return [first, two(x), three(x)]

    def other_precision(one, two, three, x):
        with torch.autocast("cpu", torch.bfloat16):
            first = one(x)
        return [first, two(x), three(x)]

    ways = {
        "other precision": other_precision,
        "alone": lambda one, two, three, x: [two(x)],
        "out of order": lambda one, two, three, x: [three(x), one(x), two(x)],
        "another x": lambda one, two, three, x: [one(x), two(other), three(x)],
        "a copy": lambda one, two, three, x: [one(x), two(x.clone()), three(x)],
        "twice": lambda one, two, three, x: [one(x), one(x), two(x), one(other)],
        "changed between": changed,
        "other mode": no_grad_inside,
        "wider": lambda one, two, three, x: [one(x[None]), two(x), three(x[:1])],
        "inference": lambda one, two, three, x: [two(x)],
    }
    for name, way in ways.items():
        model.told = single.told = way
        got, want = model(x), single(x)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True)), name
        assert [a.requires_grad for a in got] == [b.requires_grad for b in want], name
        if name != "changed between" and any(a.requires_grad for a in got):  # autograd refuses that one for all
            grads = [_gradients(ys, x, each) for ys, each in ((got, model), (want, single))]
            for one, two in zip(*grads, strict=True):
                assert (one is None) == (two is None), name
                assert one is None or torch.allclose(one, two, atol=1e-5), name
    model.told = single.told = None
    for layer, twin in zip(model.layers, single.layers, strict=True):  # outside their parent
        assert torch.equal(layer(x), twin(x))
    with torch.inference_mode():
        assert all(torch.equal(a, b) for a, b in zip(model(other), single(other), strict=True))


def test_parameters_changed_between_calls_are_seen():
    model = fastlora.group(Parent(), torch.randn(4, 8))
    x = torch.randn(4, 8)
    first = model(x)
    for layer in model.layers:
        layer.lora_B["default"].data.mul_(2)  # no version counter sees this
    second = model(x)
    for layer, a, b in zip(model.layers, first, second, strict=True):
        assert not torch.equal(a, b) and torch.equal(b, layer(x))


def test_an_exception_leaves_no_scope(computed):
    model = fastlora.group(Parent(), torch.randn(4, 8))

    def fails(one, two, three, x):
        one(x)
        raise KeyError("stop")

    model.told = fails
    with pytest.raises(KeyError):
        model(torch.randn(4, 8))
    assert not any(groups.SCOPE in layer.__dict__ for layer in model.layers)


def test_a_hook_on_a_layer_is_called_and_may_change_what_comes_out(computed):
    model = fastlora.group(Parent(), torch.randn(4, 8))
    x = torch.randn(4, 8)
    want = model(x)
    handle = model.layers[1].register_forward_hook(lambda layer, args, y: y + 1)
    assert torch.equal(model(x)[1], want[1] + 1)
    handle.remove()
    computed.clear()
    model.layers[1].register_forward_pre_hook(lambda layer, args: (args[0] * 2,))
    got = model(x)
    assert computed == []  # what a hook prepares is not there for the others
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], model.layers[1].forward(x * 2))


def test_checkpoint_inside_a_parent():
    from torch.utils.checkpoint import checkpoint

    for reentrant in (False, True):
        model = Parent()
        for layer in model.layers:
            layer.adapter_configs["default"] = layer.adapter_configs["default"].replace(lora_dropout=0.4)
        model.train()
        x = torch.randn(4, 8, requires_grad=True)

        def part(one, two, three, x, reentrant=reentrant):
            return [checkpoint(one, x, use_reentrant=reentrant), two(x), three(x)]

        single = copy.deepcopy(model)
        fastlora.group(model, torch.randn(4, 8))
        model.told = part
        torch.manual_seed(1)
        y = model(x)[0]
        (got,) = torch.autograd.grad(y.sum(), x) if not reentrant else (_backward(y, x),)
        torch.manual_seed(1)
        (want,) = torch.autograd.grad(single.layers[0](x).sum(), x)
        assert torch.equal(got, want)


def _backward(y: Tensor, x: Tensor) -> Tensor:
    x.grad = None
    y.sum().backward()
    return x.grad


# --- dropout, checkpoints, copies, the compiler -----------------------------------------------------------------------


def test_dropout_draws_one_seed_a_group_and_repeats():
    model = fastlora.group(own(lora_dropout=0.3))
    assert same(step(model, 5), step(model, 5))
    assert step(model, 5)[0] != step(model, 6)[0]


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_gradient_checkpointing(reentrant, p, computed):
    model = fastlora.group(own(lora_dropout=p))
    want = step(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    computed.clear()
    assert same(step(model), want)
    assert computed == [3, 2] * 4


def test_copies_and_pickles_keep_their_groups(computed):
    model = fastlora.group(own())
    want = step(model)
    stored = io.BytesIO()
    torch.save(model, stored)
    stored.seek(0)
    for other in (copy.deepcopy(model), torch.load(stored, weights_only=False)):
        computed.clear()
        assert same(step(other), want) and computed == [3, 2, 3, 2]
        assert not {id(p) for p in other.parameters()} & {id(p) for p in model.parameters()}
    part = copy.deepcopy(model.model.layers[0].self_attn.q_proj)  # one layer alone does not drag the others along
    assert torch.equal(part(torch.ones(1, 32)), model.model.layers[0].self_attn.q_proj(torch.ones(1, 32)))


def test_state_dict_is_unchanged():
    model = own()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    fastlora.group(model)
    after = model.state_dict()
    assert list(before) == list(after) and all(torch.equal(before[name], after[name]) for name in before)
    assert model.load_state_dict(before).missing_keys == []


def test_compiled_models_run_layer_by_layer(computed):
    model = own()
    want = step(copy.deepcopy(model))
    fastlora.group(model)
    torch._dynamo.reset()
    computed.clear()
    got = step(torch.compile(model, backend="aot_eager", fullgraph=True))
    assert got[0] == pytest.approx(want[0], abs=1e-6) and computed == []


# --- what PEFT does afterwards ----------------------------------------------------------------------------------------


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=tokens()).logits


def test_everything_peft_does_afterwards(computed, tmp_path):
    model = of_peft()
    model.add_adapter("other", peft.LoraConfig(r=3, target_modules=["q_proj", "v_proj", "up_proj"]))
    fastlora.accelerate(model, group=True)
    off_start(model)
    single = fastlora.ungroup(copy.deepcopy(model))

    def check(expected: list[int]) -> None:
        computed.clear()
        assert torch.equal(logits(model), logits(single))
        assert computed == expected

    check([3, 2, 3, 2])
    for each in (model, single):
        each.set_adapter("other")
    check([])  # k_proj and gate_proj have no such adapter
    for each in (model, single):
        each.set_adapter("default")
    check([3, 2, 3, 2])
    with model.disable_adapter(), single.disable_adapter():
        check([])
    for each in (model, single):
        each.merge_adapter()
    check([])
    for each in (model, single):
        each.unmerge_adapter()
    check([3, 2, 3, 2])
    for each in (model, single):
        each.delete_adapter("other")
    check([3, 2, 3, 2])
    ones = [each.base_model.model.model.layers[0].self_attn.q_proj for each in (model, single)]
    handles = [one.lora_A["default"].register_forward_hook(lambda *_: None) for one in ones]
    check([2, 3, 2])  # one of them is left to PEFT: its group runs layer by layer
    for handle in handles:
        handle.remove()
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(llama(), tmp_path)
    assert torch.allclose(logits(again), logits(model), atol=1e-5)
    assert torch.allclose(logits(model.merge_and_unload()), logits(single), atol=1e-4)


def test_own_layers_merged_disabled_and_switched(computed):
    model = own()
    fastlora.add_adapters(model, {"other": {"r": 2, "init_lora_weights": False}})
    fastlora.group(model)
    single = fastlora.ungroup(copy.deepcopy(model))
    for change in (
        lambda m: fastlora.set_adapter(m, "other"),
        lambda m: fastlora.set_adapter(m, ["default", "other"]),
        lambda m: fastlora.set_adapter(m, "default"),
        lambda m: m.model.layers[0].self_attn.k_proj.merge(),
        fastlora.merge,
        fastlora.unmerge,
    ):
        change(model)
        change(single)
        assert torch.equal(logits(model), logits(single))
    layer = model.model.layers[0].self_attn.q_proj
    with layer.disable_adapters():
        computed.clear()
        logits(model)
        assert computed == [3, 2, 3, 2]  # a frozen layer among adapted ones


def test_autocast(computed):
    model = own()
    single = copy.deepcopy(model)
    fastlora.group(model)
    computed.clear()
    with torch.autocast("cpu", torch.bfloat16):
        got, want = step(model), step(single)
    assert computed == [3, 2, 3, 2] and got[0] == want[0]


# --- the report -------------------------------------------------------------------------------------------------------


def test_the_report_names_each_layers_group():
    model = fastlora.group(own())
    rows = {row.name: row for row in fastlora.report(model)}
    first = "model.layers.0.self_attn."
    assert rows[first + "k_proj"].group == tuple(first + name for name in ATTENTION)
    assert rows[first + "o_proj"].group == ()
    line = next(line for line in str(fastlora.report(model)).splitlines() if line.startswith(first + "k_proj"))
    assert "q_proj, v_proj" in line
    assert "with" not in str(fastlora.report(fastlora.ungroup(model))).splitlines()[0]


@pytest.mark.parametrize("grouping", [False, True])
def test_measured_memory(grouping):
    model = own(lora_dropout=0.25)
    if grouping:
        fastlora.group(model)
    example = {"input_ids": tokens()}
    state = torch.get_rng_state()
    report = fastlora.report(model, memory=example)
    assert torch.equal(torch.get_rng_state(), state)
    m, mask = tokens().numel(), tokens().numel() * 4
    held = {row.name.rpartition("layers.0.")[2]: row.held for row in report if "layers.0." in row.name}
    h = 4 * m * 4
    seed = 8
    # x of q, k, v is the norm's own output, which nobody else keeps; each keeps h, its bits and a seed.
    qkv = held["self_attn.q_proj"] + held["self_attn.k_proj"] + held["self_attn.v_proj"]
    x = 4 * m * 32
    assert qkv == x + 3 * (h + mask) + (seed if grouping else 3 * seed)
    if grouping:
        assert held["self_attn.k_proj"] == held["self_attn.v_proj"] == 0
    mlp = held["mlp.gate_proj"] + held["mlp.up_proj"] + held["mlp.down_proj"]
    wide = 4 * m * 64
    seeds = 2 if grouping else 3
    # Its x is nobody else's either. Fused it keeps what gate and up made, and not the product; otherwise they are the
    # activation's and the multiplication's to keep.
    assert mlp == x + 3 * h + 2 * mask + m * 8 + seeds * seed + (2 * wide if grouping else wide)
    if grouping:
        plain = fastlora.report(fastlora.ungroup(model), memory=example)
        whole = [sum(row.held for row in each) + each.rest for each in (plain, report)]
        # In each of two layers: act(gate), the product, and the seeds of k, v and up.
        assert whole[0] - whole[1] == 2 * (2 * wide + 3 * seed)
    assert report.rest > 0 and "B by the rest of the model" in str(report) and "held" in str(report)
    assert fastlora.report(model, memory=True)[0].held is None
    assert not any(module._forward_hooks for module in model.modules() if groups.STATE not in module.__dict__)


# --- what is refused --------------------------------------------------------------------------------------------------


def test_bad_models_and_examples():
    with pytest.raises(ConfigError, match="no module with two adapted layers"):
        fastlora.group(nn.Sequential(nn.Linear(3, 3)))
    with pytest.raises(ConfigError, match="has no dummy_inputs"):
        fastlora.group(Parent())

    model = Parent()
    model.told = lambda one, two, three, x: [one(x), two(x + 1), three(x + 2)]
    with pytest.raises(ConfigError, match="no two adapted layers of Parent read one tensor"):
        fastlora.group(model, torch.randn(4, 8))
    assert groups_of(model) == {} and not model._forward_pre_hooks
    with pytest.raises(RuntimeError):
        _wrong_call(model)
    assert not any(layer._forward_pre_hooks for layer in model.layers)
    with pytest.raises(DtypeError, match="group must be True, False or an example input, got str"):
        fastlora.convert(llama(), r=2, progress=False, group="yes")
    with pytest.raises(DtypeError, match="memory must be True, False or an example input, got str"):
        fastlora.report(own(), memory="yes")


def _wrong_call(model: nn.Module) -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("stop")

    model.told = broken
    fastlora.group(model, torch.randn(4, 8))
