"""Bases that are stored quantized: which of them can be read, and their tensors after dequantization.

llama.cpp's converter dequantizes GPTQ, fp8, compressed-tensors and some more while it reads them; bitsandbytes does so for what it made,
and AWQ, HQQ, EETQ and AQLM are unpacked by olpack.model.packed.
An adapter names the weights that it was trained on, which such a checkpoint stores under other names and in other shapes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from olpack.errors import OlpackError
from olpack.model.checkpoint import TensorHeader, read_tensor_headers
from olpack.model.packed import layout_of, quantization_of

_ORIGINAL = "Take the original model in 16 bits: an adapter that was trained on this one fits it, too."

# By `quant_method` of config.json's quantization_config: what cannot be read here, and why.
_UNREADABLE = {
    "auto-round": ("AutoRound", "which has several packings of its own", "Export it from AutoRound again in the format auto_gptq."),
    "fbgemm_fp8": ("FBGEMM's fp8", "with scales of its own"),
    "fouroversix": ("Four Over Six", "4-bit floats with scales of its own"),
    "fp_quant": ("FP-Quant", "of weights that were rotated before"),
    "gemma": ("Gemma's own quantization", "in a packing of its own"),
    "higgs": ("HIGGS", "of weights that were rotated before"),
    "metal": ("Metal's kernels", "whose integers are in the order of its GPU kernels"),
    "mxfp8": ("MXFP8", "8-bit floats with a shared exponent"),
    "nvfp4": ("NVFP4 of transformers", "4-bit floats in a packing of its own"),
    "quanto": ("Quanto", "whose tensors only its library can unpack"),
    "quark": ("Quark", "in packings of its own"),
    "sinq": ("SINQ", "with scales of rows and columns"),
    "spqr": ("SpQR", "with its outliers kept apart"),
    "torchao": ("torchao", "whose tensors only its library can unpack"),
    "vptq": ("VPTQ", "vectors from codebooks"),
}

_INT32 = 32
_STATE = ".quant_state.bitsandbytes__"  # after the weight's name, and before "nf4" or "fp4"
_STATE_PARTS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
_ROWS_OF_INT8 = 0  # bitsandbytes' number for int8 weights in plain rows; the others are layouts of older GPUs


def dequantized_headers(source: Path, config: Mapping[str, Any], stored: Mapping[str, TensorHeader]) -> dict[str, TensorHeader]:
    """The tensors of a base by the names and shapes that they have once they are dequantized. Those of other bases are as they are stored.

    Args:
        source: the model's folder, for messages.
        config: its config.json.
        stored: its tensors, as `read_tensor_headers` finds them.

    Raises:
        OlpackError: the base is quantized in a form that cannot be read.
    """
    settings = quantization_of(config)
    method = settings.get("quant_method")
    if method in _UNREADABLE:
        name, why, *remedy = _UNREADABLE[method]
        raise OlpackError(f"'{source}' is quantized by {name}, {why}, and cannot be dequantized here.", *(remedy or [_ORIGINAL]))
    if method == "bitsandbytes":
        return _of_bitsandbytes(source, stored)
    if method == "gptq":
        return _of_gptq(source, settings, stored)
    if method == "awq":
        return _of_awq(source, settings, stored)
    if method == "hqq":
        return _of_hqq(source, stored)
    if method == "aqlm":
        return _of_aqlm(source, stored)
    if method == "eetq":
        return _of_eetq(source, stored)
    if method == "compressed-tensors":
        return _of_compressed_tensors(source, settings, stored)
    if method == "bitnet":  # four weights of 2 bits a byte, along the rows
        packed = {name for name, found in stored.items() if found.dtype == "U8" and f"{name}_scale" in stored}
        return {name: _restored(found, (4 * found.shape[0], *found.shape[1:])) if name in packed else found for name, found in stored.items()}
    if method not in (None, "fp8", "modelopt", "mxfp4"):
        raise OlpackError(f"'{source}' is quantized by '{method}', which llama.cpp's converter does not know.", _ORIGINAL)
    return dict(stored)


def _restored(packed: TensorHeader, shape: tuple[int, ...]) -> TensorHeader:
    return TensorHeader("F32", tuple(shape), packed.file)


def _of_bitsandbytes(source: Path, stored: Mapping[str, TensorHeader]) -> dict[str, TensorHeader]:
    from safetensors import safe_open

    headers = dict(stored)
    for name, found in stored.items():
        weight, is_state, _ = name.partition(_STATE)
        if is_state:
            if weight not in stored or f"{weight}.absmax" not in stored:
                raise OlpackError(f"'{source}' has '{name}' without its weight or its scales.", "Save it again, or download it again.")
            with safe_open(str(found.file), framework="numpy") as file:
                headers[weight] = _restored(stored[weight], json.loads(file.get_tensor(name).tobytes())["shape"])
    return headers


def _packed(
    source: Path, stored: Mapping[str, TensorHeader], suffix: str, parts: Sequence[str], remedy: str = "Download the model again."
) -> Iterator[tuple[str, TensorHeader, dict[str, TensorHeader]]]:
    """(module, packed weight, what else belongs to it, by its name in `parts`) of every module with a tensor MODULE.suffix.

    Raises:
        OlpackError: a part is missing.
    """
    for name, found in stored.items():
        module, is_packed, _ = name.rpartition(f".{suffix}")
        if not is_packed:
            continue
        if lost := [part for part in parts if f"{module}.{part}" not in stored]:
            raise OlpackError(f"'{source}' has '{name}' and no '{module}.{lost[0]}'.", remedy)
        yield module, found, {part: stored[f"{module}.{part}"] for part in parts}


def _of_gptq(source: Path, settings: Mapping[str, Any], stored: Mapping[str, TensorHeader]) -> dict[str, TensorHeader]:
    bits, layout = settings.get("bits"), settings.get("checkpoint_format", "gptq")
    if bits not in (2, 4, 8):
        raise OlpackError(f"'{source}' is GPTQ in {bits} bits, and llama.cpp's converter dequantizes 2, 4 and 8 bits.", _ORIGINAL)
    if layout not in ("gptq", "gptq_v2"):
        raise OlpackError(f"'{source}' is GPTQ in the layout '{layout}', and llama.cpp's converter dequantizes gptq and gptq_v2.", _ORIGINAL)
    headers = dict(stored)
    for module, found, parts in _packed(source, stored, "qweight", ("g_idx", "qzeros", "scales"), _ORIGINAL):
        columns = parts["g_idx"].shape[0]
        if found.shape[0] * _INT32 != columns * bits or found.dtype != "I32":
            raise OlpackError(
                f"'{source}' packs '{module}.qweight' otherwise than {bits} bits into int32, which llama.cpp's converter expects.", _ORIGINAL
            )
        headers[f"{module}.weight"] = _restored(found, (found.shape[1], columns))
    return headers


def _of_awq(source: Path, settings: Mapping[str, Any], stored: Mapping[str, TensorHeader]) -> dict[str, TensorHeader]:
    bits, layout = settings.get("bits", settings.get("w_bit")), str(settings.get("version", settings.get("format", "gemm"))).lower()
    if bits != 4 or layout != "gemm":
        raise OlpackError(f"'{source}' is AWQ in {bits} bits and the layout '{layout}'; 4 bits in the layout gemm are read.", _ORIGINAL)
    headers = dict(stored)
    for module, found, parts in _packed(source, stored, "qweight", ("qzeros", "scales")):
        columns, rows = found.shape[0], 8 * found.shape[1]
        if parts["scales"].shape[1] != rows or columns % parts["scales"].shape[0]:
            raise OlpackError(f"'{source}' packs '{module}.qweight' otherwise than AWQ's layout gemm does.", _ORIGINAL)
        headers[f"{module}.weight"] = _restored(found, (rows, columns))
    return headers


def _of_hqq(source: Path, stored: Mapping[str, TensorHeader]) -> dict[str, TensorHeader]:
    from safetensors import safe_open

    headers = dict(stored)
    remedy = "Save the model again with HQQ's encoded state."
    for module, found, _ in _packed(source, stored, "W_q", ("scale", "zero", "shape", "nbits"), remedy):
        with safe_open(str(found.file), framework="pt") as file:
            bits, shape = file.get_tensor(f"{module}.nbits").item(), tuple(file.get_tensor(f"{module}.shape").tolist())
        if bits not in (1, 2, 4, 8) or found.dtype != "U8":
            raise OlpackError(
                f"'{source}' packs '{module}.W_q' by HQQ in {bits:g} bits as {found.dtype}; 1, 2, 4 and 8 bits in bytes are read.", _ORIGINAL
            )
        if math.prod(found.shape) * 8 != math.prod(shape) * bits:
            raise OlpackError(f"'{source}' packs '{module}.W_q' otherwise than HQQ does: {list(found.shape)} for {list(shape)}.", _ORIGINAL)
        headers[f"{module}.weight"] = _restored(found, shape)
    return headers


def _of_eetq(source: Path, stored: Mapping[str, TensorHeader]) -> dict[str, TensorHeader]:
    headers = dict(stored)
    for name in stored:
        weight, is_scale, end = name.partition(".weight_scales")
        if not is_scale or end:
            continue
        found = stored.get(f"{weight}.weight")
        if found is None or found.dtype != "I8" or found.shape[0] % 64 or found.shape[1] % 2 or stored[name].shape != found.shape[1:]:
            raise OlpackError(f"'{source}' packs '{weight}' otherwise than EETQ does for GPUs since Turing.", _ORIGINAL)
        headers[f"{weight}.weight"] = _restored(found, found.shape[::-1])
    return headers


def _of_aqlm(source: Path, stored: Mapping[str, TensorHeader]) -> dict[str, TensorHeader]:
    headers = dict(stored)
    for module, found, parts in _packed(source, stored, "codes", ("codebooks", "scales")):
        books = parts["codebooks"].shape
        if len(found.shape) != 3 or len(books) != 4 or found.shape[2] != books[0]:
            raise OlpackError(f"'{source}' packs '{module}.codes' otherwise than AQLM does.", _ORIGINAL)
        headers[f"{module}.weight"] = _restored(found, (found.shape[0] * books[2], found.shape[1] * books[3]))
    return headers


def _of_compressed_tensors(source: Path, settings: Mapping[str, Any], stored: Mapping[str, TensorHeader]) -> dict[str, TensorHeader]:
    kind = settings.get("format")
    groups: Mapping[str, Mapping[str, Any]] = settings.get("config_groups") or {}
    if kind not in ("float-quantized", "int-quantized", "naive-quantized", "pack-quantized"):
        return dict(stored)  # formats that llama.cpp has itself (NVFP4, MXFP4), or that the converter refuses in its own words

    def refuse(what: str) -> NoReturn:
        raise OlpackError(f"'{source}' is stored by compressed-tensors as {kind} {what}, which llama.cpp's converter does not take.", _ORIGINAL)

    if settings.get("transform_config"):
        refuse("with rotated weights (transform_config)")
    if len(groups) != 1:
        refuse(f"with {len(groups)} groups of settings")
    weights: Mapping[str, Any] = next(iter(groups.values())).get("weights") or {}
    strategy, size = weights.get("strategy"), weights.get("group_size")
    packed = kind == "pack-quantized"
    if strategy not in (("group",) if packed else ("channel", "block")):
        refuse(f"with one scale per {strategy}")
    if packed != isinstance(size, int) or (packed and weights.get("type", "int") != "int"):
        refuse(f"with group_size {size} and type {weights.get('type')}")
    unused = (".weight_g_idx", ".input_scale", ".output_scale", ".k_scale", ".v_scale", *(() if packed else (".weight_zero_point",)))
    if left := next((name for name in stored if name.endswith(unused)), None):
        refuse(f"with '{left}'")
    headers = dict(stored)
    for name, found in stored.items():
        if packed and name.endswith(".weight_packed"):
            weight = name.removesuffix("_packed")
            scale = stored.get(f"{weight}_scale")
            if scale is None or f"{weight}_shape" not in stored:
                raise OlpackError(f"'{source}' has '{name}' without its scale or its shape.", "Download the model again.")
            assert isinstance(size, int)  # as checked above
            headers[weight] = _restored(found, (found.shape[0], scale.shape[1] * size))
    return headers


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
        weight, in_4_bits, quant_type = name.partition(_STATE)
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
                raise OlpackError(f"'{weight}' has int8 values in the order of one kind of GPU.", _ORIGINAL)
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
