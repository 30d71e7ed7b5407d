"""What the frozen base is held in while an adapter is trained on it, and what its weights are then."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from olpack.model.packed import dequantize_hqq, quantize_hqq

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Held:
    """How training held the base; `settings.json` beside an adapter keeps it.

    Attributes:
        kind: `train.quantization`.
        double_quantization: of the scales of nf4 and fp4.
        dtype: in which the model was loaded and computed, "float32" or "bfloat16".
        initialization: `train.initialization`. For pissa, what was held is the weight less the adapter's first value.
        modules: the text model's linear layers that were held so, by module name.
    """

    kind: str
    double_quantization: bool
    dtype: str
    initialization: str
    modules: list[str]

    def round_trip(self, weight: torch.Tensor) -> torch.Tensor:
        """The weight as a layer computes with it, float32 [rows, columns].

        int8 is what LLM.int8 holds; on a GPU that also rounds the layer's inputs, which no weight can stand for.
        """
        import torch

        dtype = getattr(torch, self.dtype)
        return _ROUND_TRIPS[self.kind](self, weight.to(dtype)).to(dtype).float()


def _in_4_bits(held: Held, weight: torch.Tensor) -> torch.Tensor:
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    from olpack.model.four_bits import check_kernel

    check_kernel()
    return dequantize_4bit(*quantize_4bit(weight.contiguous(), quant_type=held.kind, compress_statistics=held.double_quantization))


def _in_int8(held: Held, weight: torch.Tensor) -> torch.Tensor:
    from bitsandbytes.functional import int8_vectorwise_quant

    codes, maxima, _ = int8_vectorwise_quant(weight.half())
    return codes.to(weight.dtype) * (maxima.unsqueeze(1) * (1 / 127))


def _by_hqq(held: Held, weight: torch.Tensor) -> torch.Tensor:
    bits = int(held.kind.removeprefix("hqq"))
    return dequantize_hqq(*quantize_hqq(weight, bits), bits, (weight.shape[0], weight.shape[1]))


_ROUND_TRIPS = {"nf4": _in_4_bits, "fp4": _in_4_bits, "int8": _in_int8, "hqq4": _by_hqq, "hqq8": _by_hqq}
