"""How quantized checkpoints pack the weight of a linear layer, and the weight that the packed tensors stand for.

    layout = layout_of(config)                        # None where the base is not quantized, or is by something that other code reads
    weight = layout.dequantize({"qweight": …, …})     # float32 [rows, columns]

A layer's tensors are named after its module: "model.layers.0.mlp.up_proj" + ".qweight". Training keeps them as they are and dequantizes when
a layer computes (olpack.train.frozen); the export dequantizes those that llama.cpp's converter does not know (olpack.export.quantized).
The layouts were written down by AutoGPTQ, AutoAWQ, compressed-tensors, DeepSeek (fp8), HQQ, EETQ and AQLM in their published sources.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

Parts = Mapping[str, "torch.Tensor"]

# AWQ's GEMM layout packs eight 4-bit integers into an int32, and this is the order in which they come out (AutoAWQ, awq/utils/packing_utils.py).
_AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)

# EETQ stores 16 columns of a row in this order: column i is at place _EETQ_ORDER[i].
_EETQ_ORDER = (0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15)
_EETQ_TILE = 64

_HQQ_UNUSED = (
    "group_size",
    "axis",
    "packing",
    "unpack_view_dtype",
    "view_as_float",
    "quant_scale",
    "quant_zero",
    "compute_dtype",
    "offload_meta",
    "encoded_state_dict",
    "stores_quant_config",
    "channel_wise",
    "optimize",
    "round_zero",
)


@dataclass(frozen=True)
class Layout:
    """A way to pack a weight.

    Attributes:
        name: as people call it, "GPTQ".
        marker: the tensor by which a packed layer is recognized.
        parts: all tensors that the packing needs.
        optional: tensors that some checkpoints have besides.
        unused: tensors that say nothing of the weight.
    """

    name: str
    marker: str
    parts: tuple[str, ...]
    optional: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()

    def dequantize(self, parts: Parts) -> torch.Tensor:
        """The weight in float32, [rows, columns], from tensors by the ends of their names."""
        raise NotImplementedError


@dataclass(frozen=True)
class Gptq(Layout):
    """scale[group] * (integer - zero[group]); integers packed along the columns, zero points along the rows, columns in groups by `g_idx`."""

    bits: int = 4
    less_one: bool = True  # the older layout stores each zero point less one

    def dequantize(self, parts: Parts) -> torch.Tensor:
        integers = _unpack(parts["qweight"], self.bits, 0)
        zeros = _unpack(parts["qzeros"], self.bits, 1) + int(self.less_one)
        group = parts["g_idx"].long()
        return ((integers - zeros[group]) * parts["scales"].float()[group]).T


@dataclass(frozen=True)
class Awq(Layout):
    """scale[group] * (integer - zero[group]) of the transposed weight; eight neighbours of a row in an int32, groups of equal size."""

    def dequantize(self, parts: Parts) -> torch.Tensor:
        def unpack(values: torch.Tensor) -> torch.Tensor:
            return _unpack(values, 4, 1).unflatten(1, (-1, 8))[..., list(_AWQ_ORDER)].flatten(1)

        each = parts["qweight"].shape[0] // parts["scales"].shape[0]
        zeros, scales = (part.repeat_interleave(each, 0) for part in (unpack(parts["qzeros"]), parts["scales"].float()))
        return ((unpack(parts["qweight"]) - zeros) * scales).T


@dataclass(frozen=True)
class CompressedInts(Layout):
    """compressed-tensors, "pack-quantized": as GPTQ, but packed along the columns of each row, with groups of neighbours."""

    bits: int = 4

    def dequantize(self, parts: Parts) -> torch.Tensor:
        scales = parts["weight_scale"].float()
        integers = _unpack(parts["weight_packed"], self.bits, 1)
        zeros: torch.Tensor | int = 1 << (self.bits - 1)
        if "weight_zero_point" in parts:
            zeros = _unpack(parts["weight_zero_point"], self.bits, 0)[: len(scales)].unsqueeze(-1)
        return ((integers.unflatten(1, (scales.shape[1], -1)) - zeros) * scales.unsqueeze(-1)).flatten(1)


@dataclass(frozen=True)
class Scaled(Layout):
    """Small floats or integers times a scale: one for each block of the matrix, for each row, or for all of it."""

    block: tuple[int, int] | None = None

    def dequantize(self, parts: Parts) -> torch.Tensor:
        weight, scales = parts["weight"], parts[self.parts[1]].float()
        if self.block is not None:
            rows, columns = weight.shape
            scales = scales.repeat_interleave(self.block[0], 0)[:rows].repeat_interleave(self.block[1], 1)[:, :columns]
        return weight.float() * scales


@dataclass(frozen=True)
class Hqq(Layout):
    """scale * (code - zero), where codes lie in groups of neighbours (axis 1) or across the rows (axis 0), and fewer than 8 bits share a byte."""

    def dequantize(self, parts: Parts) -> torch.Tensor:
        rows, columns = (int(n) for n in parts["shape"].tolist())
        return dequantize_hqq(parts["W_q"], parts["scale"], parts["zero"], int(parts["nbits"]), (rows, columns))


def dequantize_hqq(codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, bits: int, shape: tuple[int, int]) -> torch.Tensor:
    """float32 [rows, columns] of HQQ's packed codes, uint8: the highest bits hold the first part of the codes, the lowest the last."""
    import torch

    each = 8 // bits
    shifts = torch.arange(each - 1, -1, -1, device=codes.device, dtype=torch.uint8) * bits
    unpacked = ((codes.unsqueeze(0) >> shifts.view(-1, 1, 1)) & (2**bits - 1)).flatten(0, 1)
    return ((unpacked.float() - zero.float()) * scale.float()).reshape(shape)


@dataclass(frozen=True)
class Aqlm(Layout):
    """Sums of vectors from codebooks: codes [row groups, column groups, books], books [books, vectors, rows of a group, columns of a group]."""

    bits: int = 16  # of a code

    def dequantize(self, parts: Parts) -> torch.Tensor:
        import torch

        books = parts["codebooks"].float()
        codes = parts["codes"].long() & (2**self.bits - 1)  # stored with a sign that they do not have
        groups, across, count = codes.shape
        offsets = torch.arange(count, device=codes.device) * books.shape[1]
        vectors = books.flatten(0, 1).flatten(1)
        summed = torch.nn.functional.embedding_bag((codes + offsets).flatten(0, 1), vectors, mode="sum")
        blocks = summed.view(groups, across, *books.shape[2:]) * parts["scales"].float()
        return blocks.swapaxes(1, 2).reshape(groups * books.shape[2], across * books.shape[3])


@dataclass(frozen=True)
class Eetq(Layout):
    """int8 times a scale for each row, in the order of EETQ's kernels for GPUs since Turing (its cutlass_preprocessors.cc).

    Of the transposed weight, sixteen rows at a time change places, and the columns of two rows lie interleaved in tiles of 64; bytes are stored
    with 128 added, the second and third of each four exchanged.
    """

    def dequantize(self, parts: Parts) -> torch.Tensor:
        import torch

        columns, rows = parts["weight"].shape
        integers = parts["weight"].contiguous().view(torch.uint8).view(-1, 4)[:, [0, 2, 1, 3]].short() - 128
        tiles = integers.view(rows // 2, columns // _EETQ_TILE, 2, _EETQ_TILE).swapaxes(1, 2).reshape(rows, -1, len(_EETQ_ORDER))
        return tiles[..., list(_EETQ_ORDER)].reshape(rows, columns).float() * parts["weight_scales"].float().view(-1, 1)


def _unpack(values: torch.Tensor, bits: int, dim: int) -> torch.Tensor:
    """The unsigned integers in int32, the first one lowest, as int32 along `dim`."""
    import torch

    shifts = torch.arange(0, 32, bits, dtype=torch.int32, device=values.device)
    if dim == 0:
        return ((values.unsqueeze(1) >> shifts.view(1, -1, 1)) & (2**bits - 1)).flatten(0, 1)
    return ((values.unsqueeze(-1) >> shifts) & (2**bits - 1)).flatten(1)


def quantization_of(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """What config.json says of how the weights are quantized; empty where they are not."""
    return config.get("quantization_config") or (config.get("text_config") or {}).get("quantization_config") or {}


def layout_of(config: Mapping[str, Any]) -> Layout | None:
    """The layout of a base's packed weights by its config.json; None where there is none or it is not one of these.

    `dequantized_headers` of olpack.export.quantized says whether a checkpoint keeps to its layout.
    """
    settings = quantization_of(config)
    method = settings.get("quant_method")
    if method == "gptq":
        return Gptq(
            "GPTQ",
            "qweight",
            ("qweight", "qzeros", "scales", "g_idx"),
            bits=settings.get("bits", 4),
            less_one=settings.get("checkpoint_format", "gptq") == "gptq",
        )
    if method == "awq":
        return Awq("AWQ", "qweight", ("qweight", "qzeros", "scales"))
    if method == "fp8":
        block = settings.get("weight_block_size")
        return Scaled("fp8", "weight_scale_inv", ("weight", "weight_scale_inv"), block=tuple(block) if block else None)
    if method == "compressed-tensors":
        groups: Mapping[str, Mapping[str, Any]] = settings.get("config_groups") or {}
        weights = next(iter(groups.values()), {}).get("weights") or {}
        if settings.get("format") == "pack-quantized":
            return CompressedInts(
                "compressed-tensors",
                "weight_packed",
                ("weight_packed", "weight_scale", "weight_shape"),
                ("weight_zero_point",),
                bits=weights.get("num_bits", 4),
            )
        block = weights.get("block_structure")
        return Scaled("compressed-tensors", "weight_scale", ("weight", "weight_scale"), block=tuple(block) if block else None)
    if method == "hqq":
        return Hqq("HQQ", "W_q", ("W_q", "scale", "zero", "nbits", "shape"), unused=_HQQ_UNUSED)
    if method == "eetq":
        return Eetq("EETQ", "weight_scales", ("weight", "weight_scales"))
    if method == "aqlm":
        return Aqlm("AQLM", "codes", ("codes", "codebooks", "scales"), bits=settings.get("nbits_per_codebook", 16))
    return None


# -- HQQ ------------------------------------------------------------------------------------------------------------------------------------

HQQ_GROUP = 64  # neighbours of a row that share a scale and a zero point
_HQQ_STEPS, _HQQ_NORM, _HQQ_BETA, _HQQ_GROWTH = 20, 0.7, 10.0, 1.01  # as published


def quantize_hqq(weight: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Half-quadratic quantization (Badri and Shaji, 2023) in groups of 64: zero points are moved for as long as the mean error falls.

    Args:
        weight: [rows, columns], columns a multiple of HQQ_GROUP, an even number of groups.
        bits: 4 or 8.

    Returns:
        (codes, uint8 [groups × bits / 8, 64], packed as `dequantize_hqq` takes them; scale and zero, float16 [groups, 1]).
    """
    values = weight.float().reshape(-1, HQQ_GROUP)
    most = 2**bits - 1
    lowest, highest = values.amin(1, keepdim=True), values.amax(1, keepdim=True)
    spread = highest - lowest
    inverse = (most / spread).masked_fill(spread <= 1e-4, 1.0).clamp(max=2e4)  # of the scale; bounded as float16 is
    zero = -lowest * inverse

    def rounded(zero: torch.Tensor) -> torch.Tensor:
        return (values * inverse + zero).round_().clamp_(0, most)

    best, least, beta = zero, float("inf"), _HQQ_BETA
    for _ in range(_HQQ_STEPS):
        codes = rounded(zero)
        error = values - (codes - zero) / inverse
        if (mean := error.abs().mean().item()) >= least:
            break
        best, least = zero, mean
        size = error.abs()
        shrunk = (size - size.pow(_HQQ_NORM - 1) / beta).clamp_(min=0) * error.sign()  # what the p-norm lets stay an outlier
        zero = (codes - (values - shrunk) * inverse).mean(1, keepdim=True)
        beta *= _HQQ_GROWTH
    scale, zero = (1 / inverse).half(), best.half()
    codes = (values / scale.float() + zero.float()).round_().clamp_(0, most).byte()
    if bits == 8:
        return codes, scale, zero
    half = len(codes) // 2
    return (codes[:half] << 4) | codes[half:], scale, zero
