"""Bases that come quantized: the methods that config.json can name, which of them can be read, and the tensors after dequantization.

llama.cpp's converter dequantizes GPTQ, fp8, compressed-tensors and some more while it reads them; bitsandbytes does so for its own weights,
and AWQ, HQQ, EETQ and AQLM are unpacked by olpack.model.packed. `METHODS` is the one list of them.
An adapter names the weights that it was trained on, which such a checkpoint stores under other names and in other shapes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn

from olpack.errors import OlpackError
from olpack.model.checkpoint import TensorHeader
from olpack.model.packed import HQQ_UNUSED, Aqlm, Awq, CompressedInts, Eetq, Gptq, Hqq, Layout, Scaled

ORIGINAL = "Take the original model in 16 bits: an adapter that was trained on this one fits it, too."

# By `quant_method` of config.json's quantization_config: what cannot be read here, and why.
_UNREADABLE = {
    "auto-round": ("AutoRound", "which has several packings of its own", "Export it from AutoRound again in the format auto_gptq."),
    "fbgemm_fp8": ("FBGEMM's fp8", "with scales of its own"),
    "fouroversix": ("Four Over Six", "4-bit floats with scales of its own"),
    "fp_quant": ("FP-Quant", "of weights that were rotated before"),
    "gemma": ("Gemma's own quantization", "in a packing of its own"),
    "higgs": ("HIGGS", "of weights that were rotated before"),
    "metal": ("Metal's kernels", "whose integers lie in the order of its GPU kernels"),
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
STATE = ".quant_state.bitsandbytes__"  # after the weight's name, and before "nf4" or "fp4"


def quantization_of(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The quantization settings of a config.json; empty where the weights are not quantized."""
    return config.get("quantization_config") or (config.get("text_config") or {}).get("quantization_config") or {}


def quantization_method(config: Mapping[str, Any]) -> str | None:
    """The `quant_method` of a config.json; None where the weights are not quantized."""
    return quantization_of(config).get("quant_method")


def method_of(config: Mapping[str, Any]) -> Method | None:
    """How a base is read, by its config.json; None where it is not quantized, or by a method that cannot be read."""
    return METHODS.get(quantization_method(config) or "")


def layout_of(config: Mapping[str, Any]) -> Layout | None:
    """The packing of a base's linear layers, by its config.json; None where they are not packed, or `olpack.model.packed` does not unpack them.

    `dequantized_headers` checks that the checkpoint matches it.
    """
    method = method_of(config)
    return method.layout(quantization_of(config)) if method is not None and method.layout is not None else None


def dequantized_headers(source: Path, config: Mapping[str, Any], stored: Mapping[str, TensorHeader]) -> dict[str, TensorHeader]:
    """The tensors of a base by the names and shapes that they have once they are dequantized. Those of other bases are as they are stored.

    Args:
        source: the model's folder, for messages.
        config: its config.json.
        stored: its tensors, as `read_tensor_headers` finds them.

    Raises:
        OlpackError: the base is quantized in a form that cannot be read.
    """
    name = quantization_method(config)
    if name is None:
        return dict(stored)
    if name in _UNREADABLE:
        title, why, *remedy = _UNREADABLE[name]
        raise OlpackError(f"'{source}' is quantized by {title}, {why}, and cannot be dequantized here.", *(remedy or [ORIGINAL]))
    if name not in METHODS:
        raise OlpackError(f"'{source}' is quantized by '{name}', which llama.cpp's converter does not know.", ORIGINAL)
    return METHODS[name].headers(source, quantization_of(config), stored)


def _restored(packed: TensorHeader, shape: tuple[int, ...]) -> TensorHeader:
    return TensorHeader("F32", tuple(shape), packed.file)


def _of_bitsandbytes(source: Path, settings: Mapping[str, Any], stored: Mapping[str, TensorHeader]) -> dict[str, TensorHeader]:
    from safetensors import safe_open

    headers = dict(stored)
    for name, found in stored.items():
        weight, is_state, _ = name.partition(STATE)
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
        raise OlpackError(f"'{source}' is GPTQ in {bits} bits, and llama.cpp's converter dequantizes 2, 4 and 8 bits.", ORIGINAL)
    if layout not in ("gptq", "gptq_v2"):
        raise OlpackError(f"'{source}' is GPTQ in the layout '{layout}', and llama.cpp's converter dequantizes gptq and gptq_v2.", ORIGINAL)
    headers = dict(stored)
    for module, found, parts in _packed(source, stored, "qweight", ("g_idx", "qzeros", "scales"), ORIGINAL):
        columns = parts["g_idx"].shape[0]
        if found.shape[0] * _INT32 != columns * bits or found.dtype != "I32":
            raise OlpackError(
                f"'{source}' packs '{module}.qweight' otherwise than {bits} bits into int32, which llama.cpp's converter expects.", ORIGINAL
            )
        headers[f"{module}.weight"] = _restored(found, (found.shape[1], columns))
    return headers


def _of_awq(source: Path, settings: Mapping[str, Any], stored: Mapping[str, TensorHeader]) -> dict[str, TensorHeader]:
    bits, layout = settings.get("bits", settings.get("w_bit")), str(settings.get("version", settings.get("format", "gemm"))).lower()
    if bits != 4 or layout != "gemm":
        raise OlpackError(f"'{source}' is AWQ in {bits} bits and the layout '{layout}'; 4 bits in the layout gemm are read.", ORIGINAL)
    headers = dict(stored)
    for module, found, parts in _packed(source, stored, "qweight", ("qzeros", "scales")):
        columns, rows = found.shape[0], 8 * found.shape[1]
        if parts["scales"].shape[1] != rows or columns % parts["scales"].shape[0]:
            raise OlpackError(f"'{source}' packs '{module}.qweight' otherwise than AWQ's layout gemm does.", ORIGINAL)
        headers[f"{module}.weight"] = _restored(found, (rows, columns))
    return headers


def _of_hqq(source: Path, settings: Mapping[str, Any], stored: Mapping[str, TensorHeader]) -> dict[str, TensorHeader]:
    from safetensors import safe_open

    headers = dict(stored)
    remedy = "Save the model again with HQQ's encoded state."
    for module, found, _ in _packed(source, stored, "W_q", ("scale", "zero", "shape", "nbits"), remedy):
        with safe_open(str(found.file), framework="pt") as file:
            bits, shape = file.get_tensor(f"{module}.nbits").item(), tuple(file.get_tensor(f"{module}.shape").tolist())
        if bits not in (1, 2, 4, 8) or found.dtype != "U8":
            raise OlpackError(
                f"'{source}' packs '{module}.W_q' by HQQ in {bits:g} bits as {found.dtype}; 1, 2, 4 and 8 bits in bytes are read.", ORIGINAL
            )
        if math.prod(found.shape) * 8 != math.prod(shape) * bits:
            raise OlpackError(f"'{source}' packs '{module}.W_q' otherwise than HQQ does: {list(found.shape)} for {list(shape)}.", ORIGINAL)
        headers[f"{module}.weight"] = _restored(found, shape)
    return headers


def _of_eetq(source: Path, settings: Mapping[str, Any], stored: Mapping[str, TensorHeader]) -> dict[str, TensorHeader]:
    headers = dict(stored)
    for name in stored:
        weight, is_scale, end = name.partition(".weight_scales")
        if not is_scale or end:
            continue
        found = stored.get(f"{weight}.weight")
        if found is None or found.dtype != "I8" or found.shape[0] % 64 or found.shape[1] % 2 or stored[name].shape != found.shape[1:]:
            raise OlpackError(f"'{source}' packs '{weight}' otherwise than EETQ does for GPUs since Turing.", ORIGINAL)
        headers[f"{weight}.weight"] = _restored(found, found.shape[::-1])
    return headers


def _of_aqlm(source: Path, settings: Mapping[str, Any], stored: Mapping[str, TensorHeader]) -> dict[str, TensorHeader]:
    headers = dict(stored)
    for module, found, parts in _packed(source, stored, "codes", ("codebooks", "scales")):
        books = parts["codebooks"].shape
        if len(found.shape) != 3 or len(books) != 4 or found.shape[2] != books[0]:
            raise OlpackError(f"'{source}' packs '{module}.codes' otherwise than AQLM does.", ORIGINAL)
        headers[f"{module}.weight"] = _restored(found, (found.shape[0] * books[2], found.shape[1] * books[3]))
    return headers


def _of_compressed_tensors(source: Path, settings: Mapping[str, Any], stored: Mapping[str, TensorHeader]) -> dict[str, TensorHeader]:
    kind = settings.get("format")
    groups: Mapping[str, Mapping[str, Any]] = settings.get("config_groups") or {}
    if kind not in ("float-quantized", "int-quantized", "naive-quantized", "pack-quantized"):
        return dict(stored)  # formats that llama.cpp has itself (NVFP4, MXFP4), or that the converter refuses in its own words

    def refuse(what: str) -> NoReturn:
        raise OlpackError(f"'{source}' is stored by compressed-tensors as {kind} {what}, which llama.cpp's converter does not take.", ORIGINAL)

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


def _of_bitnet(source: Path, settings: Mapping[str, Any], stored: Mapping[str, TensorHeader]) -> dict[str, TensorHeader]:
    """Four weights of 2 bits a byte, along the rows."""
    packed = {name for name, found in stored.items() if found.dtype == "U8" and f"{name}_scale" in stored}
    return {name: _restored(found, (4 * found.shape[0], *found.shape[1:])) if name in packed else found for name, found in stored.items()}


def _as_stored(source: Path, settings: Mapping[str, Any], stored: Mapping[str, TensorHeader]) -> dict[str, TensorHeader]:
    return dict(stored)


def _gptq(settings: Mapping[str, Any]) -> Layout:
    bits, less_one = settings.get("bits", 4), settings.get("checkpoint_format", "gptq") == "gptq"
    return Gptq("GPTQ", "qweight", ("qweight", "qzeros", "scales", "g_idx"), bits=bits, less_one=less_one)


def _awq(settings: Mapping[str, Any]) -> Layout:
    return Awq("AWQ", "qweight", ("qweight", "qzeros", "scales"))


def _fp8(settings: Mapping[str, Any]) -> Layout:
    block = settings.get("weight_block_size")
    return Scaled("fp8", "weight_scale_inv", ("weight", "weight_scale_inv"), block=tuple(block) if block else None)


def _compressed_tensors(settings: Mapping[str, Any]) -> Layout:
    groups: Mapping[str, Mapping[str, Any]] = settings.get("config_groups") or {}
    weights = next(iter(groups.values()), {}).get("weights") or {}
    if settings.get("format") == "pack-quantized":
        parts, optional = ("weight_packed", "weight_scale", "weight_shape"), ("weight_zero_point",)
        return CompressedInts("compressed-tensors", "weight_packed", parts, optional, bits=weights.get("num_bits", 4))
    block = weights.get("block_structure")
    return Scaled("compressed-tensors", "weight_scale", ("weight", "weight_scale"), block=tuple(block) if block else None)


def _hqq(settings: Mapping[str, Any]) -> Layout:
    return Hqq("HQQ", "W_q", ("W_q", "scale", "zero", "nbits", "shape"), unused=HQQ_UNUSED)


def _eetq(settings: Mapping[str, Any]) -> Layout:
    return Eetq("EETQ", "weight_scales", ("weight", "weight_scales"))


def _aqlm(settings: Mapping[str, Any]) -> Layout:
    return Aqlm("AQLM", "codes", ("codes", "codebooks", "scales"), bits=settings.get("nbits_per_codebook", 16))


@dataclass(frozen=True)
class Method:
    """How a base of one `quant_method` is read.

    Attributes:
        headers: (folder, settings of the quantization, stored tensors) to what `dequantized_headers` returns.
        layout: (settings of the quantization) to the packing of its linear layers, which training keeps; None: olpack unpacks none.
        dequantizer: what dequantizes its weights for an export: llama.cpp's converter, bitsandbytes, or the layout.
    """

    headers: Callable[[Path, Mapping[str, Any], Mapping[str, TensorHeader]], dict[str, TensorHeader]]
    layout: Callable[[Mapping[str, Any]], Layout] | None = None
    dequantizer: Literal["converter", "bitsandbytes", "layout"] = "converter"

    @property
    def trains(self) -> bool:
        """Whether an adapter can be trained on such a base."""
        return self.layout is not None or self.dequantizer == "bitsandbytes"


METHODS = {
    "aqlm": Method(_of_aqlm, _aqlm, "layout"),
    "awq": Method(_of_awq, _awq, "layout"),
    "bitnet": Method(_of_bitnet),
    "bitsandbytes": Method(_of_bitsandbytes, dequantizer="bitsandbytes"),
    "compressed-tensors": Method(_of_compressed_tensors, _compressed_tensors),
    "eetq": Method(_of_eetq, _eetq, "layout"),
    "fp8": Method(_as_stored, _fp8),
    "gptq": Method(_of_gptq, _gptq),
    "hqq": Method(_of_hqq, _hqq, "layout"),
    "modelopt": Method(_as_stored),
    "mxfp4": Method(_as_stored),
}
"""By `quant_method` of config.json."""
