"""Everything PEFT does to a model goes on after `accelerate`: the same results as on the model left alone."""

from __future__ import annotations

import copy
import pickle
import warnings

import peft
import pytest
import torch
from peft.helpers import disable_input_dtype_casting, rescale_adapter_scale
from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap
from torch import nn

import fastlora
from fastlora.nn import accelerate as accelerating
from tests.accelerate_tools import LINEARS, adapted, batch, close, llama, logits, shake, train, twins

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft", "ignore::UserWarning:torch")
BASES = pytest.mark.parametrize("quant", ["", "nf4"])


def made(quant="", **fields):
    return shake(adapted(llama(quant=quant), **fields))


def second(model, **fields):
    """A second adapter, of another rank."""
    torch.manual_seed(9)
    model.add_adapter("second", peft.LoraConfig(**{"r": 3, "lora_alpha": 5, "target_modules": LINEARS} | fields))
    for name, parameter in model.named_parameters():
        if "second" in name and "magnitude" not in name:
            parameter.data = torch.randn(parameter.shape) * 0.5 * parameter.shape[-1] ** -0.5
    return model


def lora_layers(model):
    return [layer for _, layer in accelerating.tuner_layers(model)]


def trains(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def all_fused(model, count=14):
    report = fastlora.report(model)
    assert (len(report.fused), report.left) == (count, {})


# --- the same objects -------------------------------------------------------------------------------------------------


@BASES
def test_modules_parameters_names_and_types_stay(quant):
    model = made(quant, use_dora=True)
    objects = {name: id(module) for name, module in model.named_modules()}
    tensors = {name: (id(t), t.data_ptr()) for name, t in model.named_parameters()}
    text, state, counts = repr(model), list(model.state_dict()), model.get_nb_trainable_parameters()
    status, before = model.get_layer_status(), set(dir(lora_layers(model)[0]))
    assert fastlora.accelerate(model) is model
    assert {name: id(module) for name, module in model.named_modules()} == objects
    assert {name: (id(t), t.data_ptr()) for name, t in model.named_parameters()} == tensors
    assert (repr(model), list(model.state_dict()), model.get_nb_trainable_parameters()) == (text, state, counts)
    assert model.get_layer_status() == status
    for layer in lora_layers(model):
        assert type(layer).__name__ == ("Linear4bit" if quant else "Linear")
        assert isinstance(layer, peft.tuners.lora.Linear4bit if quant else peft.tuners.lora.Linear)
        assert (layer.in_features, layer.out_features) == tuple(
            layer.base_layer.__dict__[k] for k in ("in_features", "out_features")
        )
    assert before <= set(dir(lora_layers(model)[0]))


@BASES
def test_accelerating_twice_and_back(quant):
    model = made(quant).train()  # in evaluation bitsandbytes may repack the weights, see test_accelerate_bnb
    kinds, keys = [type(layer) for layer in lora_layers(model)], [set(vars(layer)) for layer in lora_layers(model)]
    want = logits(model)
    fastlora.accelerate(fastlora.accelerate(model))
    all_fused(model)
    close(logits(model), want)
    assert fastlora.decelerate(fastlora.decelerate(model)) is model
    assert [type(layer) for layer in lora_layers(model)] == kinds
    assert [set(vars(layer)) for layer in lora_layers(model)] == keys
    assert torch.equal(logits(model), want)


@BASES
def test_deepcopy_pickle_and_torch_save(quant, tmp_path):
    model = fastlora.accelerate(made(quant))
    want = logits(model.train())
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    torch.save(model, tmp_path / "model.pt")
    copies.append(torch.load(tmp_path / "model.pt", weights_only=False))
    for other in copies:
        all_fused(other)
        assert torch.equal(logits(other), want)
        own = {t.data_ptr() for t in model.parameters()}
        assert not own & {t.data_ptr() for t in other.parameters()}
        layer = lora_layers(other)[0]
        layer.base_layer.weight.data.zero_()  # of the copy: its own bytes, read at the next call
        assert not torch.equal(logits(other), want)
        assert torch.equal(logits(model), want)
        fastlora.decelerate(other)


def test_the_optimizer_made_before_goes_on():
    model = adapted(llama())
    chosen = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(chosen, lr=0.5)
    fastlora.accelerate(model).train()
    losses = []
    for _ in range(4):
        loss = model(input_ids=batch(), labels=batch()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0] - 0.05


# --- adapters ---------------------------------------------------------------------------------------------------------


@BASES
@pytest.mark.parametrize("fields", [{}, {"use_dora": True}], ids=["lora", "dora"])
def test_add_set_disable_and_delete(quant, fields):
    theirs, ours = twins(lambda: made(quant, **fields))
    for step in (
        lambda m: second(m, **fields),
        lambda m: m.set_adapter("second"),
        lambda m: m.set_adapter("default"),
        lambda m: m.base_model.disable_adapter_layers(),
        lambda m: m.base_model.enable_adapter_layers(),
        lambda m: m.set_adapter("second"),
        lambda m: m.delete_adapter("default"),
    ):
        want, got = [], []
        for model, out in ((theirs, want), (ours, got)):
            step(model)
            model.train()
            out += [logits(model), trains(model), list(model.active_adapters)]
        close(got[0], want[0])
        assert got[1:] == want[1:]
    all_fused(ours)


@BASES
def test_leaving_the_disabling_context_restores_everything(quant):
    theirs, ours = twins(lambda: made(quant))
    want, training = logits(ours), trains(ours)
    with ours.disable_adapter(), theirs.disable_adapter():
        base = logits(ours.train())
        close(base, logits(theirs.train()))
    assert (base - want).abs().max() > 0.1
    assert torch.equal(logits(ours), want)
    assert trains(ours) == training


@BASES
def test_several_active_adapters_are_pefts(quant):
    theirs, ours = (second(model) for model in twins(lambda: made(quant)))
    for model in (theirs, ours):
        model.base_model.set_adapter(["default", "second"])
    assert torch.equal(logits(ours.train()), logits(theirs.train()))
    assert set(fastlora.report(ours).left.values()) == {"several adapters are active"}


def test_several_active_adapters_with_dora_warn_once_a_layer():
    ours = fastlora.accelerate(second(made(use_dora=True)))
    theirs = fastlora.decelerate(copy.deepcopy(ours))
    for model in (theirs, ours):
        model.base_model.set_adapter(["default", "second"])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        got = [logits(ours) for _ in range(3)][-1]
    told = [w for w in caught if "depends on their order" in str(w.message)]
    assert len(told) == 14
    assert torch.equal(got, logits(theirs))


def test_an_adapter_on_some_layers_only():
    def both():
        return second(made(), target_modules=["q_proj"])

    theirs, ours = twins(both)
    for names in (["second"], ["default", "second"]):
        for model in (theirs, ours):
            model.base_model.set_adapter(names)
        close(logits(ours), logits(theirs))
    assert set(fastlora.report(ours).left.values()) == {"several adapters are active"}
    assert len(fastlora.report(ours).left) == 2  # q_proj of both layers; the rest has one adapter


@BASES
def test_mixed_batches_equal_one_adapter_at_a_time(quant):
    ours = fastlora.accelerate(second(made(quant))).eval()
    names = ["default", "second", "__base__", "default"]
    tokens = batch(rows=4)
    with torch.no_grad():
        got = ours(input_ids=tokens, adapter_names=names).logits
        for row, name in enumerate(names):
            if name == "__base__":
                with ours.disable_adapter():
                    want = ours(input_ids=tokens[row : row + 1]).logits
            else:
                ours.set_adapter(name)
                want = ours(input_ids=tokens[row : row + 1]).logits
            close(got[row : row + 1], want)


def test_a_mixed_batch_shows_in_the_report_until_the_next_call():
    ours = fastlora.accelerate(made()).eval()
    with torch.no_grad():
        ours(input_ids=batch(), adapter_names=["default", "__base__"])
    assert set(fastlora.report(ours).left.values()) == {"at its last call adapter_names or other arguments came with x"}
    logits(ours)
    all_fused(ours)


def test_patterns_modules_to_save_and_tied_weights():
    fields = {
        "rank_pattern": {"q_proj": 7, "down_proj": 1},
        "alpha_pattern": {"k_proj": 3},
        "modules_to_save": ["lm_head"],
        "use_rslora": True,
    }
    theirs, ours = twins(lambda: made(**fields))
    close(logits(ours), logits(theirs))
    assert trains(ours) == trains(theirs)
    all_fused(ours)
    tied = {"target_modules": ["embed_tokens", "lm_head", "q_proj"], "ensure_weight_tying": True}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        theirs, ours = (shake(adapted(llama(tied=True), **tied)) for _ in range(2))  # views cannot be deep-copied
        fastlora.accelerate(ours)
    assert any("layer.Embedding over Embedding has no fused path" in str(w.message) for w in caught)
    close(logits(ours), logits(theirs))
    assert len(fastlora.report(ours).fused) == 3
    losses = [train(model, 5) for model in (theirs, ours)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)


def test_layer_replication_and_target_parameters():
    model = llama()
    fields = {"layer_replication": [[0, 2], [1, 2]], "target_modules": ["q_proj"]}
    theirs, ours = twins(lambda: made(**fields))
    close(logits(ours), logits(theirs))
    all_fused(ours, 3)
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], target_parameters=["mlp.up_proj.weight"])
    model = shake(peft.get_peft_model(llama(bias=False), config))
    want = logits(model)
    with pytest.warns(UserWarning, match=r"layer\.ParamWrapper over Linear has no fused path"):
        fastlora.accelerate(model)
    close(logits(model), want)
    assert len(fastlora.report(model).fused) == 2


# --- merging ----------------------------------------------------------------------------------------------------------


@BASES
@pytest.mark.parametrize("safe", [False, True])
@pytest.mark.parametrize("fields", [{}, {"use_dora": True}], ids=["lora", "dora"])
def test_merge_and_unmerge_are_pefts(quant, safe, fields):
    theirs, ours = twins(lambda: made(quant, **fields).train())
    for _ in range(2):  # a second time is harmless
        theirs.merge_adapter(safe_merge=safe)
        ours.merge_adapter(safe_merge=safe)
        assert torch.equal(logits(ours), logits(theirs))
    assert set(fastlora.report(ours).left.values()) == {"its adapters are merged into the base weight"}
    for model in (theirs, ours):
        model.unmerge_adapter()
    close(logits(ours), logits(theirs))
    all_fused(ours)


@BASES
def test_merging_by_name_and_hooked_into_the_next_forward(quant):
    """A merge changes the base weight through .data or replaces it: the bytes are read again at the next call."""
    theirs, ours = (second(model).train() for model in twins(lambda: made(quant)))
    for model in (theirs, ours):
        logits(model)
        model.merge_adapter(adapter_names=["second"])
        for layer in lora_layers(model):
            layer.merged_adapters.clear()  # as if the base had always been this one
    close(logits(ours), logits(theirs))
    all_fused(ours)


@BASES
def test_merge_and_unload_gives_plain_layers(quant):
    theirs, ours = twins(lambda: made(quant).train())
    plain = [model.merge_and_unload() for model in (theirs, ours)]
    assert torch.equal(logits(plain[1]), logits(plain[0]))
    assert not list(accelerating.tuner_layers(plain[1]))


def test_a_broken_adapter_is_refused_and_the_base_stays_whole():
    ours = fastlora.accelerate(made())
    layer = lora_layers(ours)[0]
    before = layer.base_layer.weight.clone()
    layer.lora_A["default"].weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match="NaNs detected"):
        ours.merge_adapter(safe_merge=True)
    assert torch.equal(layer.base_layer.weight, before)


def test_merging_the_lora_bias_of_a_4bit_layer_warns():
    ours = fastlora.accelerate(made("nf4", lora_bias=True))
    with pytest.warns(UserWarning, match="lora_bias of a 4-bit layer without its scaling"):
        ours.merge_adapter()


# --- parameters and scales change -------------------------------------------------------------------------------------


@BASES
def test_data_writes_replacements_and_casts_are_seen_by_the_next_forward(quant):
    theirs, ours = twins(lambda: made(quant).train())

    def parts(layer):
        return layer.lora_A["default"], layer.lora_B["default"]

    def cast(layer):
        for part in parts(layer):
            part.weight.data = part.weight.data.bfloat16()

    changes = {
        "in place": lambda layer: parts(layer)[0].weight.data.mul_(2),
        ".data": lambda layer: setattr(parts(layer)[1].weight, "data", parts(layer)[1].weight.data * 0.3),
        "replaced": lambda layer: setattr(parts(layer)[0], "weight", nn.Parameter(parts(layer)[0].weight / 3)),
        "bias": lambda layer: layer.base_layer.bias.data.add_(1),
        "base in place": lambda layer: layer.base_layer.weight.data.copy_(layer.base_layer.weight.data.flip(0)),
        "base .data": lambda layer: setattr(layer.base_layer.weight, "data", layer.base_layer.weight.data.flip(1, 0)),
        "cast": cast,
    }
    for name, change in changes.items():
        before = logits(ours)
        for model in (theirs, ours):
            for layer in lora_layers(model):
                change(layer)
        # PEFT rounds x A^T to bf16, we do not.
        close(logits(ours), logits(theirs), 2e-3 if name == "cast" else 1e-5)
        assert (logits(ours) - before).abs().max() > 1e-4
    all_fused(ours)


@BASES
def test_scales_are_read_at_every_call(quant):
    theirs, ours = twins(lambda: made(quant).train())
    for model in (theirs, ours):
        for layer in lora_layers(model):
            layer.set_scale("default", 0.25)
    close(logits(ours), logits(theirs))
    with rescale_adapter_scale(ours, 3.0), rescale_adapter_scale(theirs, 3.0):
        close(logits(ours), logits(theirs))
    for model in (theirs, ours):
        for layer in lora_layers(model):
            layer.scaling["default"] = torch.tensor(0.7)  # what hot-swapping makes of it
    close(logits(ours), logits(theirs))
    for layer in lora_layers(ours):
        layer.scaling["default"] = 0.0
    with ours.disable_adapter():
        base = logits(ours)
    close(logits(ours), base)
    all_fused(ours)


def test_hot_swapping_another_rank(tmp_path):
    other = made(r=2, lora_alpha=16)
    shake(other, 8).save_pretrained(tmp_path / "other")
    theirs, ours = twins(made)
    for model in (theirs, ours):
        prepare_model_for_compiled_hotswap(model, target_rank=6)
        hotswap_adapter(model, str(tmp_path / "other"), "default", torch_device="cpu")
    assert isinstance(lora_layers(ours)[0].scaling["default"], torch.Tensor)
    close(logits(ours), logits(theirs))
    close(logits(ours), logits(other))
    all_fused(ours)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_models_cast_to_16_bit(dtype):
    theirs, ours = twins(made)
    want = logits(theirs)
    for model in (theirs, ours):
        model.to(dtype)
    assert ours(input_ids=batch()).logits.dtype == dtype
    rounding = (logits(theirs) - want).norm()
    assert (logits(ours) - want).norm() <= 1.5 * rounding
    all_fused(ours)


# --- hooks and the rest of the world ----------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["lora_A", "lora_B", "lora_dropout", "base_layer", "the layer"])
def test_forward_hooks_fire(part):
    """One on the layer itself runs as before; one inside it needs PEFT's forward."""
    theirs, ours = twins(lambda: made(lora_dropout=0.1).eval())
    seen = []
    for model in (theirs, ours):
        layer = lora_layers(model)[3]
        module = layer if part == "the layer" else getattr(layer, part)
        module = module["default"] if isinstance(module, nn.ModuleDict) else module
        handle = module.register_forward_hook(lambda m, args, y: (seen.append(m), y * 1.5)[1])
    assert (logits(ours) - logits(theirs)).abs().max() < 1e-4
    assert len(seen) == 2
    assert len(fastlora.report(ours).left) == (0 if part == "the layer" else 1)
    handle.remove()
    all_fused(ours)


def test_a_global_hook_sees_every_module():
    ours, seen = fastlora.accelerate(made()), set()
    handle = nn.modules.module.register_module_forward_hook(lambda m, args, y: seen.add(id(m)) or None)
    try:
        logits(ours)
    finally:
        handle.remove()
    assert all(id(layer.lora_A["default"]) in seen for layer in lora_layers(ours))


def test_input_casting_switched_off_is_honoured():
    theirs, ours = twins(lambda: made().to(torch.bfloat16))
    for model in (theirs, ours):
        for layer in lora_layers(model):
            layer.lora_A.float(), layer.lora_B.float()
    for model in (theirs, ours):
        with disable_input_dtype_casting(model), pytest.raises(RuntimeError, match="same dtype"):
            logits(model)
    assert logits(ours).isfinite().all()
    all_fused(ours)


def test_meta_loading(tmp_path):
    made().save_pretrained(tmp_path)
    want = logits(peft.PeftModel.from_pretrained(llama(), tmp_path))
    model = llama()
    empty = peft.get_peft_model(model, peft.LoraConfig.from_pretrained(tmp_path), low_cpu_mem_usage=True)
    fastlora.accelerate(empty)
    empty.load_adapter(tmp_path, "default", low_cpu_mem_usage=True)
    close(logits(empty.eval()), want)
    all_fused(empty)


@pytest.mark.parametrize("init", ["pissa", "olora", "orthogonal", "gaussian", False])
def test_inits_that_change_the_base_or_start_off_zero(init, tmp_path):
    theirs, ours = twins(lambda: adapted(llama(), init_lora_weights=init))
    close(logits(ours), logits(theirs))
    ours.save_pretrained(tmp_path)
    again = fastlora.accelerate(peft.PeftModel.from_pretrained(llama(), tmp_path).eval())
    assert torch.equal(logits(again), logits(ours.eval()))


def test_gradient_checkpointing_of_a_whole_model():
    runs = []
    for checkpointing in (False, True):
        model = fastlora.accelerate(made(lora_dropout=0.2))
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.enable_input_require_grads()
        torch.manual_seed(4)
        model.train()(input_ids=batch(), labels=batch()).loss.backward()
        runs.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert runs[0].keys() == runs[1].keys()
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])


def test_our_own_loading_and_saving_is_refused_with_what_to_use_instead(tmp_path):
    model = fastlora.accelerate(made())
    model.save_pretrained(tmp_path / "theirs")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for name in ("default", "another"):
        with pytest.raises(fastlora.ConfigError, match="are PEFT's, accelerated or not: use its own load_adapter"):
            fastlora.load_adapter(model, tmp_path / "theirs", name)
    with pytest.raises(fastlora.ConfigError, match="save_pretrained"):
        fastlora.save_adapter(model, tmp_path / "ours")
    assert not (tmp_path / "ours").exists()
    after = model.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[name], before[name]) for name in before)
