"""ExpertLinear: a frozen linear, dense or 4-bit, and the stacked adapters of E experts."""

from __future__ import annotations

import zlib
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastlora.config import SEED_END, LoraConfig
from fastlora.errors import ConfigError, DtypeError, ShapeError
from fastlora.math import init, nf4
from fastlora.math.nf4 import PackedWeight
from fastlora.nn.linear import _check_linear
from fastlora.nn.quantized import QuantizedWeight
from fastlora.ops.experts import Frozen, expert_norms
from fastlora.ops.lora import autocast_dtype

PROJECTION_STREAMS = 65536  # dropout streams of one projection: projection * 65536 + expert


class Quantization(NamedTuple):
    """How a dense base is stored: `kind` None leaves it dense."""

    kind: str | None = None
    blocksize: int = 64
    double_quant: bool = True

    def check(self) -> None:
        """Raise ConfigError unless there is such a format."""
        if self.kind not in ("nf4", "fp4", None):
            raise ConfigError(f'quantize must be "nf4", "fp4" or None, got {self.kind!r}')
        if self.kind is not None:
            nf4.check_format(self.kind, self.blocksize)


def derived_seed(seed: int, name: str) -> int:
    """The seed of one part of what has this seed."""
    return (seed + zlib.crc32(name.encode())) % SEED_END


def check_base(linear: nn.Module, quantization: Quantization) -> None:
    """Raise what adopting this linear would; change nothing."""
    if hasattr(getattr(linear, "weight", None), "quant_state"):
        return
    _check_linear(linear)
    weight: Any = linear.weight
    if quantization.kind is None:
        return
    if weight.dtype not in nf4.SOURCE_DTYPES:
        raise DtypeError(f"cannot quantize: expected float32, bfloat16 or float16, got {weight.dtype}")
    if not weight.is_meta and not torch.stack(weight.detach().aminmax()).isfinite().all():
        raise ShapeError("cannot quantize a weight with NaN or inf")


def _draw(config: LoraConfig, count: int, k: int, n: int, seed: int, like: torch.device) -> tuple[Tensor, Tensor]:
    """a [E, r, k], b [E, n, r] in fp32, each expert drawn with its own seed."""
    if like.type == "meta":
        return torch.empty((count, config.r, k), device=like), torch.empty((count, n, config.r), device=like)
    drawn = [
        init.init_adapter(
            config.init_lora_weights, config.r, k, n, bound=config.init_bound, seed=derived_seed(seed, f"expert.{e}")
        )
        for e in range(count)
    ]
    return torch.stack([each.a for each in drawn]).to(like), torch.stack([each.b for each in drawn]).to(like)


class ExpertLinear(nn.Module):
    """y = x W^T + bias for every token, and what each expert adds to it; the modules of this package run it.

    Attributes:
        weight: frozen; a Parameter [out, in] or a `QuantizedWeight`.
        bias: frozen [out] or None.
        lora_A: [E, r, in], or None where a projection has no adapters.
        lora_B: [E, out, r], or None.
        lora_magnitude: [E, out], only with DoRA.
        scaling: of every expert.
        dropout: p of every expert.
        in_features: of the linear.
        out_features: of the linear.
    """

    in_features: int
    out_features: int
    weight: Any
    bias: nn.Parameter | None
    lora_A: nn.Parameter | None
    lora_B: nn.Parameter | None
    lora_magnitude: nn.Parameter | None

    def __init__(
        self,
        linear: nn.Module,
        config: LoraConfig | None,
        experts: int,
        seed: int,
        quantization: Quantization | None = None,
        projection: int = 0,
    ) -> None:
        super().__init__()
        self._adopt(linear, quantization or Quantization())
        self.projection = projection
        self.scaling, self.dropout = (config.scaling, config.lora_dropout) if config else (1.0, 0.0)
        for name in ("lora_A", "lora_B", "lora_magnitude"):
            self.register_parameter(name, None)
        if config is None:
            return
        device = self.device
        a, b = _draw(config, experts, self.in_features, self.out_features, seed, device)
        self.lora_A, self.lora_B = nn.Parameter(a), nn.Parameter(b)
        if config.use_dora:
            self.lora_magnitude = nn.Parameter(self.weight_norm())

    def _adopt(self, linear: Any, quantization: Quantization) -> None:
        check_base(linear, quantization)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.compute_dtype: torch.dtype | None = None
        self.bias = linear.bias
        if self.bias is not None:
            self.bias.requires_grad_(False)
        if hasattr(linear.weight, "quant_state"):
            self.weight = QuantizedWeight.from_bnb(linear)
            self.compute_dtype = getattr(linear, "compute_dtype", None)
        elif quantization.kind is not None:
            form = (quantization.kind, quantization.blocksize, quantization.double_quant)
            self.weight = QuantizedWeight.from_float(linear.weight.detach(), *form)
        else:
            self.weight = linear.weight
            self.weight.requires_grad_(False)

    @property
    def device(self) -> torch.device:
        """Where the base is."""
        device: torch.device = self.weight.device
        return device

    def _packed(self) -> Tensor | PackedWeight:
        return self.weight.pack() if isinstance(self.weight, QuantizedWeight) else self.weight

    def weight_norm(self) -> Tensor:
        """|W + scaling B_e A_e| per row: fp32 [E, out], detached (DoRA, 2402.09353, equation 5)."""
        assert self.lora_A is not None and self.lora_B is not None
        return expert_norms(self._packed(), self.lora_A, self.lora_B, self.scaling)

    def operand_dtype(self, x: Tensor) -> torch.dtype:
        """What x [..., in] is computed in: the 4-bit layer's compute dtype, autocast's, or its own.

        Raises:
            DtypeError: a dense weight of another dtype.
        """
        dtype = self.compute_dtype or autocast_dtype(x) or x.dtype
        if isinstance(self.weight, Tensor) and self.weight.dtype != x.dtype and autocast_dtype(x) is None:
            raise DtypeError(f"expected x and weight of one dtype, got x {x.dtype} and weight {self.weight.dtype}")
        return dtype

    def frozen(self, dtype: torch.dtype) -> Frozen:
        """What the ops take of this linear, for an x of that dtype."""
        weight = self._packed()
        on_grid = isinstance(self.weight, QuantizedWeight) and self.weight.absmax_on_grid
        norm = None if self.lora_magnitude is None else self.weight_norm()
        if isinstance(weight, Tensor):
            weight = weight.to(dtype)
        p = self.dropout if self.training else 0.0
        return Frozen(weight, self.bias, on_grid, self.scaling, p, self.projection * PROJECTION_STREAMS, norm)

    def adapters(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """lora_A [E, r, in], lora_B [E, out, r], lora_magnitude [E, out], in their own dtype; None where absent."""
        return self.lora_A, self.lora_B, self.lora_magnitude

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The frozen weight as a dense [out, in] tensor of a dtype (default: its own, or the one it had)."""
        if isinstance(self.weight, QuantizedWeight):
            return self.weight.dequantize(dtype)
        dense: Tensor = self.weight.detach()
        return dense.to(dtype or dense.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Not callable: which experts a token goes to is the router's business."""
        raise DtypeError("an ExpertLinear is not called; its MLP or layer runs it")

    def extra_repr(self) -> str:
        """Sizes, for `repr`."""
        experts = "no adapters" if self.lora_A is None else "experts={}, r={}".format(*self.lora_A.shape[:2])
        return f"in_features={self.in_features}, out_features={self.out_features}, {experts}"
