"""Linear layers whose frozen weight stays packed: bases that come quantized (GPTQ, AWQ, a GGUF, …), and HQQ, whose codes are computed while a base
loads.

A layer dequantizes its weight when it computes, and once more in the backward pass, so that nothing dense is saved in between.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import BitsAndBytesConfig, PretrainedConfig, PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.integrations.bitsandbytes import Bnb4bitQuantize
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from olpack.errors import OlpackError
from olpack.model.base import Base
from olpack.model.checkpoint import TensorHeader, read_tensor_headers
from olpack.model.gguf_blocks import BlockType
from olpack.model.names import short_name
from olpack.model.packed import Layout, dequantize_hqq, quantize_hqq
from olpack.model.quantized import dequantized_headers, layout_of
from olpack.train.block_experts import BlockExperts
from olpack.train.ops import blocks

_METHOD, _STREAMED = "olpack", "olpack-streamed"  # our names among transformers' quantizers


class FrozenLinear(nn.Linear):
    """A linear layer with a packed weight, in buffers under the names that a checkpoint has for them.

    `dequantize()` returns the weight, `weight` is the same for code that looks at it, such as peft's.
    """

    def __init__(self, rows: int, columns: int, parts: Mapping[str, torch.Tensor], bias: nn.Parameter | None, dtype: torch.dtype):
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.compute_dtype = columns, rows, dtype
        self.register_parameter("bias", bias)
        self._buffers.update(parts)  # not register_buffer, which refuses the name `weight` for being a property
        self._is_hf_initialized = True

    @property
    def weight(self) -> torch.Tensor:
        return self.dequantize()

    @weight.setter
    def weight(self, value: torch.Tensor) -> None:
        raise AttributeError("a packed weight has no place for a dense one")

    def dequantize(self) -> torch.Tensor:
        """The weight, [rows, columns], in the dtype that the model computes in."""
        raise NotImplementedError

    def write_fp8(self, scale: torch.Tensor, codes: torch.Tensor, *, turned: bool) -> bool:
        """Write the weight as fp8 codes (`olpack.train.ops.fp8.WriteFp8`); returns False where it must be dequantized first."""
        return False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _Product.apply(x.to(self.compute_dtype), self)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, packed={list(self._buffers)}"


class PackedLinear(FrozenLinear):
    """A linear layer of a checkpoint that comes quantized."""

    def __init__(self, layout: Layout, rows: int, columns: int, parts: Mapping[str, torch.Tensor], bias: nn.Parameter | None, dtype: torch.dtype):
        super().__init__(rows, columns, parts, bias, dtype)
        self.layout = layout

    def dequantize(self) -> torch.Tensor:
        return self.layout.dequantize({name: part for name, part in self._buffers.items() if part is not None}).to(self.compute_dtype)


class BlockLinear(FrozenLinear):
    """A linear layer of a GGUF, in the blocks of the file: `blocks` is uint8 [rows, bytes of a row]."""

    def __init__(self, block_type: BlockType, rows: int, columns: int, bias: nn.Parameter | None, dtype: torch.dtype):
        packed = torch.empty(rows, block_type.row_bytes(columns), dtype=torch.uint8, device="meta")
        super().__init__(rows, columns, {"blocks": packed}, bias, dtype)
        self.block_type = block_type

    def dequantize(self) -> torch.Tensor:
        return blocks.dequantize(self.block_type, self.get_buffer("blocks"), self.compute_dtype)

    def write_fp8(self, scale: torch.Tensor, codes: torch.Tensor, *, turned: bool) -> bool:
        return blocks.write_fp8(self.block_type, self.get_buffer("blocks"), scale, codes, turned=turned)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, block_type={self.block_type.name}"


class HqqLinear(FrozenLinear):
    """A linear layer that is quantized by HQQ while the base loads."""

    def __init__(self, weight: torch.Tensor, bits: int, bias: nn.Parameter | None):
        rows, columns = weight.shape
        codes, scale, zero = quantize_hqq(weight, bits)
        super().__init__(rows, columns, {"W_q": codes, "scale": scale, "zero": zero}, bias, weight.dtype)
        self.bits = bits

    def dequantize(self) -> torch.Tensor:
        return dequantize_hqq(self.W_q, self.scale, self.zero, self.bits, (self.out_features, self.in_features)).to(self.compute_dtype)

    def replace(self, weight: torch.Tensor) -> None:
        """Quantize another weight in place of this one, [rows, columns]."""
        self.W_q, self.scale, self.zero = quantize_hqq(weight.to(self.compute_dtype), self.bits)


class _Product(torch.autograd.Function):
    """x @ W.T + bias, for which autograd saves neither x nor W."""

    @staticmethod
    def forward(context: Any, x: torch.Tensor, layer: FrozenLinear) -> torch.Tensor:
        context.layer = layer
        return F.linear(x, layer.dequantize(), layer.bias)

    @staticmethod
    def backward(context: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient @ context.layer.dequantize().to(gradient.dtype), None


# -- how transformers loads them ------------------------------------------------------------------------------------------------------------


Make = Callable[[nn.Module], nn.Module]
"""From a plain module to the one in its place, whose packed tensors are on the meta device."""


class FrozenConfig(QuantizationConfigMixin):
    """Which frozen layers a model gets while it loads.

    Args:
        packed: name of a linear layer, or of stacked experts, to what makes the module in its place, of a base that comes quantized.
        bits: of HQQ, for a base that does not.
        dtype: in which the model computes.
    """

    def __init__(self, packed: Mapping[str, Make] | None = None, bits: int | None = None, dtype: torch.dtype = torch.float32):
        self.quant_method = _METHOD  # type: ignore[assignment] # transformers takes any name that is registered, and declares its own only
        self.packed, self.bits, self.dtype = packed, bits, dtype

    def to_dict(self) -> dict[str, Any]:
        return {"quant_method": _METHOD}

    def to_diff_dict(self) -> dict[str, Any]:
        return self.to_dict()

    @classmethod
    def from_dict(cls, config_dict: Any, return_unused_kwargs: bool = False, **kwargs: Any) -> FrozenConfig:
        return config_dict["frozen"]


class _FrozenQuantizer(HfQuantizer):
    quantization_config: FrozenConfig

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        asked = self.quantization_config
        if asked.packed is None:
            text = {id(module) for module in model.get_decoder().modules()}
            self._hqq = {name for name, module in model.named_modules() if isinstance(module, nn.Linear) and id(module) in text}
            return
        left = {short_name(name): make for name, make in asked.packed.items()}
        for name, module in list(model.named_modules()):
            if (isinstance(module, nn.Linear) or hasattr(module, "num_experts")) and (make := left.pop(short_name(name), None)):
                model.set_submodule(name, make(module))
        if left:
            raise OlpackError(
                f"The base packs '{next(iter(left))}', which is no linear layer of the model as transformers has it.",
                "Take the original model in 16 bits; `train.quantization` quantizes it to 4 or 8.",
            )

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs: Any) -> bool:
        module, _, end = param_name.rpartition(".")
        if self.quantization_config.packed is not None:  # so that transformers accepts a packed tensor's shape, which is not that of the weight
            return isinstance(model.get_submodule(module), FrozenLinear | BlockExperts)
        return end == "weight" and module in self._hqq

    def get_quantize_ops(self) -> ConversionOps:
        bits = self.quantization_config.bits
        if bits is None:
            raise NotImplementedError("packed weights stay as they are")
        return _ToHqq(bits)

    def is_serializable(self) -> bool:
        return False

    @property
    def is_trainable(self) -> bool:
        return True


class _ToHqq(ConversionOps):
    """Puts a quantized layer in place of the one whose weight has just been read."""

    def __init__(self, bits: int):
        self.bits = bits

    def convert(  # type: ignore[override] # transformers passes these by keyword, and declares two that its callers leave out for quantizers
        self, input_dict: dict[str, Any], full_layer_name: str, model: nn.Module, missing_keys: set[str] | None = None, **kwargs: Any
    ) -> dict[str, list[torch.Tensor]]:
        ((_, weight),) = input_dict.items()
        name = full_layer_name.removesuffix(".weight")
        plain = model.get_submodule(name)
        bias = plain.bias if isinstance(plain, nn.Linear) else None
        model.set_submodule(name, HqqLinear(weight[0] if isinstance(weight, list) else weight, self.bits, bias))
        if missing_keys is not None:
            missing_keys.discard(full_layer_name)
        return {}


class StreamedFourBits(BitsAndBytesConfig):
    """4 bits that a GPU computes while a model loads, one matrix after the other, and that stay in the host's memory.

    Args:
        device: the GPU, whose 4 bits are those of a model that loads there.
        settings: of bitsandbytes.
    """

    def __init__(self, device: torch.device, **settings: Any):
        super().__init__(load_in_4bit=True, **settings)
        self.quant_method = _STREAMED  # type: ignore[assignment] # as above
        self.device = device


class _StreamedQuantizer(Bnb4BitHfQuantizer):
    quantization_config: StreamedFourBits

    def get_quantize_ops(self) -> ConversionOps:
        return _ToFourBits(self, self.quantization_config.device)


class _ToFourBits(Bnb4bitQuantize):
    """bitsandbytes' quantization on a GPU of a matrix in the host's memory."""

    def __init__(self, quantizer: _StreamedQuantizer, device: torch.device):
        super().__init__(quantizer)
        self.device = device

    def convert(self, input_dict: dict[str, Any], **kwargs: Any) -> dict[str, torch.Tensor]:  # type: ignore[override] # called by keyword
        weights = {name: (value[0] if isinstance(value, list) else value).to(self.device) for name, value in input_dict.items()}
        return {name: weight.to("cpu") for name, weight in super().convert(weights, **kwargs).items()}


AUTO_QUANTIZER_MAPPING[_STREAMED], AUTO_QUANTIZATION_CONFIG_MAPPING[_STREAMED] = _StreamedQuantizer, StreamedFourBits
AUTO_QUANTIZER_MAPPING[_METHOD], AUTO_QUANTIZATION_CONFIG_MAPPING[_METHOD] = _FrozenQuantizer, FrozenConfig

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


def use_packed(config: PretrainedConfig, base: Base, dtype: torch.dtype) -> bool:
    """Let a base whose packing `olpack.model.packed` knows load with its weights packed. Changes `config`.

    Returns:
        False where the base is not quantized, or by something that transformers loads (bitsandbytes).

    Raises:
        OlpackError: the checkpoint does not match its layout.
    """
    layout = layout_of(base.config)
    if layout is None:
        return False
    stored = read_tensor_headers(base.path)
    weights = dequantized_headers(base.path, base.config, stored)
    packed: dict[str, Make] = {}
    for name in stored:
        module, marker, end = name.rpartition("." + layout.marker)
        if marker and not end:
            rows, columns = weights[f"{module}.weight"].shape
            headers: dict[str, TensorHeader] = {end: stored[f"{module}.{end}"] for end in layout.parts}
            headers |= {end: stored[f"{module}.{end}"] for end in layout.optional if f"{module}.{end}" in stored}
            packed[module] = partial(_packed_linear, layout, rows, columns, headers, dtype)
    for part in (config, config.get_text_config(decoder=True)):
        if getattr(part, "quantization_config", None) is not None:
            del part.quantization_config
    use_frozen(config, packed, dtype)
    return True


def use_frozen(config: PretrainedConfig, packed: Mapping[str, Make], dtype: torch.dtype) -> None:
    """Let a model load with these layers in place of its own. Changes `config`."""
    config.quantization_config = {"quant_method": _METHOD, "frozen": FrozenConfig(packed, dtype=dtype)}


def _packed_linear(
    layout: Layout, rows: int, columns: int, headers: Mapping[str, TensorHeader], dtype: torch.dtype, plain: nn.Module
) -> PackedLinear:
    assert isinstance(plain, nn.Linear)
    parts = {end: torch.empty(header.shape, dtype=_DTYPES[header.dtype], device="meta") for end, header in headers.items()}
    return PackedLinear(layout, rows, columns, parts, plain.bias, dtype)
