"""LoraLinear and QLoraLinear: drop-in replacements of `nn.Linear` with a frozen base and trainable adapters."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from fastlora.errors import ConfigError, DtypeError, ShapeError
from fastlora.nn.adapted import AdaptedLinear
from fastlora.nn.adapters import checked_config
from fastlora.nn.quantized import QuantizedWeight
from fastlora.ops import lora, qlora


def _fresh_linear(
    k: int, n: int, bias: bool, device: torch.device | str | None, dtype: torch.dtype | None
) -> tuple[Tensor, nn.Parameter | None]:
    """Weight and bias drawn as `nn.Linear` draws them."""
    if not isinstance(bias, bool):
        raise DtypeError(f"bias must be True or False here, got {bias!r}; which biases train goes into config")
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise DtypeError(f"expected a floating-point torch.dtype, got {dtype!r}")
    weight = torch.empty((n, k), device=device, dtype=dtype)
    nn.init.kaiming_uniform_(weight, a=math.sqrt(5))
    if not bias:
        return weight, None
    vector = torch.empty((n,), device=device, dtype=dtype)
    nn.init.uniform_(vector, -1 / math.sqrt(k), 1 / math.sqrt(k))
    return weight, nn.Parameter(vector, requires_grad=False)


class LoraLinear(AdaptedLinear):
    """y = x W^T + bias + scaling * drop(x) A^T B^T with W frozen (LoRA, 2106.09685); DoRA with `use_dora`.

    Args:
        in_features, out_features, bias, device, dtype: as `nn.Linear`.
        config: LoraConfig, dict or peft.LoraConfig; its fields may also be given by keyword.
        adapter_name: of the first adapter.

    Attributes:
        weight: Parameter [out, in], frozen.
        bias: Parameter [out] or None, frozen unless config.bias says otherwise.
        lora_A: adapter name -> [r, in].
        lora_B: adapter name -> [out, r].
        lora_magnitude: adapter name -> [out] (only DoRA).
        lora_E: adapter name -> [r, 1] (only AdaLoRA).
        scaling: adapter name -> float.
        active_adapters: names whose contribution is added, in order.

    Raises:
        ConfigError, ShapeError, DtypeError: a field or size that does not fit.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        config: Any = None,
        adapter_name: str = "default",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **config_fields: Any,
    ) -> None:
        super().__init__(in_features, out_features)
        weight, self.bias = _fresh_linear(in_features, out_features, bias, device, dtype)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self._first_adapter(adapter_name, checked_config(config, config_fields))

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, config: Any = None, *, adapter_name: str = "default", **fields: Any
    ) -> LoraLinear:
        """Adopt an `nn.Linear`'s own weight and bias (no copy; they are frozen from now on).

        Args:
            linear: its weight [out, in] in any float dtype.
            config: LoraConfig, dict or peft.LoraConfig; `fields` on top.
            adapter_name: of the first adapter.

        Raises:
            DtypeError: not a plain `nn.Linear`, or a weight that is not floating-point.
            ConfigError: a field that does not fit.
        """
        _check_linear(linear)
        config = checked_config(config, fields)
        layer = cls.__new__(cls)
        AdaptedLinear.__init__(layer, linear.in_features, linear.out_features)
        layer.weight, layer.bias = linear.weight, linear.bias
        layer._first_adapter(adapter_name, config)
        layer.weight.requires_grad_(False)
        return layer.train(linear.training)

    def _op(self, x: Tensor, a: Tensor, b: Tensor, scale: float, **keywords: Any) -> Tensor:
        return lora.lora_linear(x, self._base(), a, b, scale, bias=self.bias, **keywords)

    def _float_base(self, strategy: str) -> Tensor:
        if strategy == "loftq":
            raise ConfigError("init 'loftq' repairs what quantizing loses: it needs a QLoraLinear, not a dense base")
        return self.weight.detach()

    def _replace_base(self, weight: Tensor) -> None:
        self.weight.data.copy_(weight)

    def _round_trip(self, weight: Tensor) -> Tensor:
        return weight

    def _base_device(self) -> torch.device:
        return self.weight.device


class QLoraLinear(AdaptedLinear):
    """LoraLinear over a 4-bit base: y = x deq(W)^T + bias + scaling * drop(x) A^T B^T (QLoRA, 2305.14314, equation 5).

    Args:
        in_features, out_features, bias, device: as `nn.Linear`.
        quant_type: "nf4" or "fp4".
        blocksize: weights that share one scale, a power of two in 32 ... 4096.
        double_quant: quantize the scales too.
        compute_dtype: x is cast to it and the result cast back; None computes in the dtype of x.
        config, adapter_name, config_fields: as `LoraLinear`.

    Attributes:
        weight: QuantizedWeight of shape [out, in] (a dense Parameter while merged). The others are those of
            `LoraLinear`.

    Raises:
        ConfigError, ShapeError, DtypeError: a format, field or size that does not fit.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        quant_type: str = "nf4",
        blocksize: int = 64,
        double_quant: bool = True,
        compute_dtype: torch.dtype | None = None,
        config: Any = None,
        adapter_name: str = "default",
        device: torch.device | str | None = None,
        **config_fields: Any,
    ) -> None:
        super().__init__(in_features, out_features)
        weight, self.bias = _fresh_linear(in_features, out_features, bias, device, torch.float32)
        self._set_format(quant_type, blocksize, double_quant, compute_dtype)
        self._quantize(weight)
        self._pending = weight
        self._first_adapter(adapter_name, checked_config(config, config_fields))
        del self._pending

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        config: Any = None,
        *,
        quant_type: str = "nf4",
        blocksize: int = 64,
        double_quant: bool = True,
        compute_dtype: torch.dtype | None = None,
        adapter_name: str = "default",
        **fields: Any,
    ) -> QLoraLinear:
        """Quantize an `nn.Linear`'s weight, or adopt a bitsandbytes `Linear4bit`'s bytes (no requantization, no copy).

        For a `Linear4bit` the format is its own and `compute_dtype` defaults to its own.

        Args:
            linear: `nn.Linear` with a weight [out, in] in fp32, bf16 or fp16, or `Linear4bit`.
            config: LoraConfig, dict or peft.LoraConfig; `fields` on top.
            quant_type, blocksize, double_quant, compute_dtype: the format, as in `QLoraLinear`.
            adapter_name: of the first adapter.

        Raises:
            DtypeError: not a linear layer we know. ShapeError: NaN or inf in the weight, or bytes of another size.
            ConfigError: a format or field that does not fit.
        """
        config = checked_config(config, fields)
        four_bit = hasattr(getattr(linear, "weight", None), "quant_state")
        if not four_bit:
            _check_linear(linear)
        layer = cls.__new__(cls)
        AdaptedLinear.__init__(layer, linear.in_features, linear.out_features)
        layer.bias = linear.bias
        if four_bit:
            weight = QuantizedWeight.from_bnb(linear)
            if tuple(weight.shape) != (linear.out_features, linear.in_features):
                want = (linear.out_features, linear.in_features)
                raise ShapeError(f"expected a quantized weight of shape {want}, got {tuple(weight.shape)}")
            own = getattr(linear, "compute_dtype", None)
            layer._set_format(weight.quant_type, weight.blocksize, weight.nested, compute_dtype or own)
            layer._set_weight(weight)
            layer._first_adapter(adapter_name, config)
            return layer.train(linear.training)
        layer._set_format(quant_type, blocksize, double_quant, compute_dtype)
        layer._quantize(linear.weight.detach())
        layer._pending = linear.weight.detach()
        layer._first_adapter(adapter_name, config)
        del layer._pending
        return layer.train(linear.training)

    _pending: Tensor  # the float weight, while the first adapter is made

    def _set_format(
        self, quant_type: str, blocksize: int, double_quant: bool, compute_dtype: torch.dtype | None
    ) -> None:
        check_compute_dtype(compute_dtype)
        self.quant_type, self.blocksize, self.double_quant = quant_type, blocksize, double_quant
        self.compute_dtype = compute_dtype

    def _set_weight(self, weight: QuantizedWeight) -> None:
        weight.__dict__["_loaded_by_layer"] = True
        self.weight = weight

    def _quantize(self, weight: Tensor) -> None:
        self._set_weight(QuantizedWeight.from_float(weight, self.quant_type, self.blocksize, self.double_quant))

    def _op(self, x: Tensor, a: Tensor, b: Tensor, scale: float, **keywords: Any) -> Tensor:
        return self._quantized_op(self._base(), x, a, b, scale, **keywords)

    def _quantized_op(
        self, weight: QuantizedWeight, x: Tensor, a: Tensor, b: Tensor, scale: float, **keywords: Any
    ) -> Tensor:
        keywords |= {"bias": self.bias, "compute_dtype": self.compute_dtype, "on_grid": weight.absmax_on_grid}
        return qlora.qlora_linear(x, weight.pack(), a, b, scale, **keywords)

    def _merged_forward(self, x: Tensor) -> Tensor:
        if isinstance(self.weight, QuantizedWeight):  # merged with requantize=True
            return self._quantized_op(self.weight, x, *self._no_adapter(x), 1.0)
        return super()._merged_forward(x)

    def _float_base(self, strategy: str) -> Tensor:
        weight: Tensor | None = self.__dict__.get("_pending")
        if weight is None:
            raise ConfigError(
                f"init {strategy!r} needs the unquantized weight: use QLoraLinear.from_linear(nn.Linear, config)"
            )
        return weight

    def _replace_base(self, weight: Tensor) -> None:
        self._quantize(weight.to(self.weight.dtype))

    def _round_trip(self, weight: Tensor) -> Tensor:
        quantized = QuantizedWeight.from_float(weight, self.quant_type, self.blocksize, self.double_quant)
        return quantized.dequantize(torch.float32)

    def _base_device(self) -> torch.device:
        weight: Any = self.weight
        device: torch.device = weight.device
        return device


def check_compute_dtype(dtype: Any) -> None:
    """Raise DtypeError unless it is None or a floating-point dtype."""
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise DtypeError(f"compute_dtype must be a floating-point torch.dtype, got {dtype!r}")


def _check_linear(linear: nn.Module) -> None:
    if not isinstance(linear, nn.Linear) or not isinstance(getattr(linear, "weight", None), Tensor):
        raise DtypeError(f"expected an nn.Linear, got {type(linear).__name__}")
    if not linear.weight.is_floating_point():
        raise DtypeError(
            f"expected a floating-point nn.Linear weight, got {linear.weight.dtype} in {type(linear).__name__} "
            "(8-bit, GPTQ, AWQ and HQQ bases are not supported)"
        )
