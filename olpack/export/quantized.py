"""Dequantization of bases that come quantized, in llama.cpp's converter, where it does not dequantize them itself."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from olpack.errors import OlpackError
from olpack.model.checkpoint import read_tensor_headers
from olpack.model.quantized import ORIGINAL, STATE, dequantized_headers, layout_of, method_of

_STATE_PARTS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
_ROWS_OF_INT8 = 0  # bitsandbytes' number for int8 weights in plain rows; the others are layouts of older GPUs


def replace_dequantization(model: Any) -> None:
    """Put a `dequant_model` of our own in place of the converter's, where that does not know the base's quantization.

    Args:
        model: of llama.cpp's converter.
    """
    method = method_of(model.hparams)
    if method is None or method.dequantizer == "converter":
        return
    own = dequantize_packed if method.dequantizer == "layout" else dequantize_bitsandbytes
    model.dequant_model = lambda: own(model)


def dequantize_packed(model: Any) -> None:
    """Have each weight that olpack.model.packed knows load as it dequantizes it, in place of the converter's `dequant_model`.

    Args:
        model: of llama.cpp's converter.
    """
    import torch
    from conversion import LazyTorchTensor

    tensors, layout = model.model_tensors, layout_of(model.hparams)
    assert layout is not None, "called for a quantization without a layout"

    def unpack(*parts: Any) -> Any:
        return layout.dequantize(dict(zip(layout.parts, parts, strict=True)))

    shapes = {}
    for stored, header in dequantized_headers(model.dir_model, model.hparams, read_tensor_headers(model.dir_model)).items():
        if kept := type(model).filter_tensors((stored, lambda: None)):  # None for a part of a vision tower
            shapes[kept[0]] = header.shape
    for name in [name for name in tensors if name.endswith(f".{layout.marker}")]:
        module = name.removesuffix(f".{layout.marker}")
        arguments = tuple(tensors.pop(f"{module}.{part}")() for part in layout.parts)
        for part in layout.unused:
            tensors.pop(f"{module}.{part}", None)
        meta = LazyTorchTensor.meta_with_dtype_and_shape(torch.float32, shapes[f"{module}.weight"])
        tensors[f"{module}.weight"] = lambda meta=meta, arguments=arguments: LazyTorchTensor(meta=meta, args=arguments, func=unpack)


def dequantize_bitsandbytes(model: Any) -> None:
    """Have each weight that bitsandbytes quantized load as bitsandbytes dequantizes it, in place of the converter's `dequant_model`.

    Args:
        model: of llama.cpp's converter. 4-bit weights get the values of the dtype that they were quantized from, which are what an adapter
            was trained on; int8 weights are exact.

    Raises:
        OlpackError: int8 weights in the layout of one GPU.
    """
    import torch
    from conversion import LazyTorchTensor

    tensors = model.model_tensors
    dequantize: Callable[..., Any]
    for name in list(tensors):
        weight, in_4_bits, quant_type = name.partition(STATE)
        if in_4_bits:
            state = LazyTorchTensor.to_eager(tensors.pop(name)())
            parts = {part: tensors.pop(f"{weight}.{part}")() for part in _STATE_PARTS if f"{weight}.{part}" in tensors}
            shape = json.loads(bytes(state.tolist()))["shape"]
            names = (f"quant_state.bitsandbytes__{quant_type}", *parts)
            arguments: tuple[Any, ...] = (tensors[weight](), names, (state, *parts.values()))
            dequantize = _from_4_bits
        elif name.endswith(".SCB"):
            weight = name.removesuffix("SCB") + "weight"
            layout = tensors.pop(f"{weight}_format", None)
            if layout is not None and int(LazyTorchTensor.to_eager(layout())) != _ROWS_OF_INT8:
                raise OlpackError(f"'{weight}' has int8 values in the order of one kind of GPU.", ORIGINAL)
            arguments = (tensors[weight](), tensors.pop(name)())
            shape, dequantize = arguments[0].shape, _from_int8
        else:
            continue
        meta = LazyTorchTensor.meta_with_dtype_and_shape(torch.float32, tuple(shape))
        tensors[weight] = lambda meta=meta, arguments=arguments, dequantize=dequantize: LazyTorchTensor(meta=meta, args=arguments, func=dequantize)


def _from_4_bits(packed: Any, names: tuple[str, ...], parts: tuple[Any, ...]) -> Any:
    from bitsandbytes.functional import QuantState, dequantize_4bit

    from olpack.model.four_bits import check_kernel

    check_kernel()
    state = QuantState.from_dict(dict(zip(names, parts, strict=True)), device=packed.device)
    return dequantize_4bit(packed, state).float()


def _from_int8(values: Any, row_maxima: Any) -> Any:
    from bitsandbytes.functional import int8_vectorwise_dequant

    return int8_vectorwise_dequant(values, row_maxima)
