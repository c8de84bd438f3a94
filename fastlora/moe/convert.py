"""Put mixtures of LoRA experts into a transformers model: found by structure, checked first, then swapped in place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from fastlora.config import fresh_seed
from fastlora.errors import ConfigError, DtypeError
from fastlora.moe.config import LoraMoeConfig, MixLoraConfig, MoeConfig, MolaConfig, config_from_dict
from fastlora.moe.experts import Quantization, check_base, derived_seed
from fastlora.moe.mixlora import MixLoraMLP, layout_of, plan_of
from fastlora.moe.plugin import LoraMoeLinear, MolaLinear
from fastlora.nn.adapters import check_name
from fastlora.nn.convert import _keep_device_hook, _release_from_transformers, put, with_progress
from fastlora.nn.linear import LoraLinear, QLoraLinear
from fastlora.nn.targets import _layer_index, is_head, shared_weights, why_not

Make = Callable[[], nn.Module]


class _Model:
    """The linears of a model's decoder layers, and which of them make up an MLP.

    Attributes:
        mlps: name -> module. linears: name -> linear, those of MLPs too, in the model's order.
        layers: the number of decoder layers.
    """

    def __init__(self, model: nn.Module) -> None:
        self.mlps = {name: m for name, m in model.named_modules() if name and layout_of(m) is not None}
        if not self.mlps:
            raise ConfigError(
                f"{type(model).__name__} has no gated MLP: expected modules with linears gate_proj, up_proj, down_proj "
                "(or gate_up_proj, down_proj; fc1, fc2)"
            )
        tied = shared_weights(model)
        blocks = {name.rpartition(".")[0] for name in self.mlps}
        self.linears: dict[str, nn.Module] = {}
        for name, module in model.named_modules():
            inside = any(name.startswith(block + ".") if block else True for block in blocks)
            if not isinstance(module, nn.Linear) or not name or not inside or is_head(model, name, module):
                continue
            if why_not(model, name, module, tied):
                continue
            self.linears[name] = module
        self.order = {name: at for at, name in enumerate(dict.fromkeys(map(self._block, self.linears)))}
        self.layers = len(blocks)

    def _block(self, name: str) -> object:
        index = _layer_index(name, None)
        return name.rpartition(".")[0] if index is None else index

    def layer(self, name: str) -> int:
        """The number of the decoder layer a module is in."""
        return self.order[self._block(name)]

    def mlp_of(self, name: str) -> str | None:
        """The MLP a linear belongs to."""
        parent = name.rpartition(".")[0]
        return parent if parent in self.mlps else None


def _chosen(found: _Model, config: MoeConfig) -> list[str]:
    """The linears that target_modules names.

    Raises:
        ConfigError: a name that no linear has.
    """
    if config.targets is None:
        return list(found.linears)
    ends = {name.rpartition(".")[2] for name in found.linears}
    if unknown := [name for name in config.targets if name not in ends]:
        raise ConfigError(f"target_modules: no linear is named {unknown[0]!r}; have {', '.join(sorted(ends))}")
    return [name for name in found.linears if name.rpartition(".")[2] in config.targets]


def _plain(linear: Any, config: MoeConfig, seed: int, adapter_name: str, quantization: Quantization) -> Make:
    """A plain adapter on a linear beside the experts."""
    own = config.lora_config(init_seed=seed)
    if quantization.kind is None and not hasattr(linear.weight, "quant_state"):
        return lambda: LoraLinear.from_linear(linear, own, adapter_name=adapter_name)
    form: dict[str, Any] = {}
    if not hasattr(linear.weight, "quant_state"):
        form = {
            "quant_type": quantization.kind,
            "blocksize": quantization.blocksize,
            "double_quant": quantization.double_quant,
        }
    return lambda: QLoraLinear.from_linear(linear, own, adapter_name=adapter_name, **form)


def _plan_mixlora(
    found: _Model, config: MixLoraConfig, adapter_name: str, quantization: Quantization
) -> dict[str, Make]:
    make: dict[str, Make] = {}
    chosen = _chosen(found, config)
    assert config.init_seed is not None
    if config.targets is not None and not any(found.mlp_of(name) for name in chosen):
        raise ConfigError(f"target_modules {config.targets} names no linear of an MLP: MixLoRA's experts are there")
    for name, mlp in found.mlps.items():
        plan = plan_of(mlp, config.replace(init_seed=derived_seed(config.init_seed, name)), quantization)
        layer = found.layer(name + ".")

        def build(mlp: nn.Module = mlp, plan: Any = plan, layer: int = layer) -> nn.Module:
            made = MixLoraMLP(mlp, plan, layer)
            made.model_config = config
            return made

        make[name] = build
    for name in chosen:
        if found.mlp_of(name) is None:
            check_base(found.linears[name], quantization)
            seed = derived_seed(config.init_seed, name)
            make[name] = _plain(found.linears[name], config, seed, adapter_name, quantization)
    return make


def _plan_plugin(found: _Model, config: MoeConfig, adapter_name: str, quantization: Quantization) -> dict[str, Make]:
    mola = isinstance(config, MolaConfig)
    if isinstance(config, MolaConfig) and config.layers not in (None, found.layers):
        raise ConfigError(f"the lists need {found.layers} entries, one a decoder layer, got {config.layers}")
    make: dict[str, Make] = {}
    chosen = _chosen(found, config)
    assert config.init_seed is not None
    if not mola and not any(found.mlp_of(name) for name in chosen):
        raise ConfigError(f"target_modules {config.targets} names no linear of an MLP: LoRAMoE's experts are there")
    kind = MolaLinear if mola else LoraMoeLinear
    for name in chosen:
        linear, seed = found.linears[name], derived_seed(config.init_seed, name)
        check_base(linear, quantization)
        if not mola and found.mlp_of(name) is None:
            make[name] = _plain(linear, config, seed, adapter_name, quantization)
            continue

        def build(linear: nn.Module = linear, seed: int = seed, layer: int = found.layer(name)) -> nn.Module:
            made = kind(linear, config.replace(init_seed=seed), quantization, layer)
            made.model_config = config
            return made

        make[name] = build
    return make


def convert(
    model: nn.Module,
    config: Any,
    *,
    quantize: str | None = None,
    blocksize: int = 64,
    double_quant: bool = True,
    adapter_name: str = "default",
    progress: bool = True,
) -> nn.Module:
    """Put a MixLoRA, LoRAMoE or MoLA adapter into a model in place and freeze the rest.

    Gated MLPs are found by structure (Llama, Mistral, Qwen2, Gemma, Phi and alike). MixLoRA: each becomes a
    `MixLoraMLP`, other linears of the decoder layers get plain adapters. LoRAMoE: each linear of an MLP becomes a
    `LoraMoeLinear`, the others get plain adapters. MoLA: every linear becomes a `MolaLinear`; its lists have one entry
    a decoder layer.

    Args:
        model: of transformers, or any whose decoder layers hold gated MLPs.
        config: MixLoraConfig, LoraMoeConfig, MolaConfig, or a dict with MoE-PEFT's keys.
        quantize: "nf4" or "fp4" quantizes dense bases; a bitsandbytes 4-bit base stays as it is.
        blocksize: weights that share one scale of the 4-bit format.
        double_quant: quantize the scales too.
        adapter_name: of the plain adapters.
        progress: show a progress bar.

    Returns:
        The same model.

    Raises:
        ConfigError, DtypeError, ShapeError: an unknown module, lists of another length, no MLP; nothing has changed.
    """
    if not isinstance(config, MoeConfig):
        config = config_from_dict(config) if isinstance(config, dict) else config
    if not isinstance(config, (MixLoraConfig, LoraMoeConfig, MolaConfig)):
        raise DtypeError(f"expected a MixLoraConfig, LoraMoeConfig, MolaConfig or dict, got {type(config).__name__}")
    quantization = Quantization(quantize, blocksize, double_quant)
    quantization.check()
    check_name(adapter_name)
    if config.init_seed is None:
        config = config.replace(init_seed=fresh_seed())
    found = _Model(model)
    if isinstance(config, MixLoraConfig):
        make = _plan_mixlora(found, config, adapter_name, quantization)
    else:
        make = _plan_plugin(found, config, adapter_name, quantization)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    swap(model, make, progress)
    return model


def swap(model: nn.Module, make: dict[str, Make], progress: bool) -> None:
    """Build each module and put it in its place."""
    four_bit = False
    for name in with_progress(list(make), "convert", progress):
        old = model.get_submodule(name)
        new = make.pop(name)()
        _keep_device_hook(old, new)
        put(model, name, new)
        four_bit = four_bit or any(p.dtype == torch.uint8 for p in new.parameters())
    if four_bit:
        _release_from_transformers(model)
