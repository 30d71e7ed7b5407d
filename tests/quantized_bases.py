"""Quantized checkpoints of a small model, each packed by hand after the layout that its format publishes, with the weights that they stand for."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

GROUP = 64
Parts = dict[str, torch.Tensor]
Packed = tuple[Parts, torch.Tensor]  # tensors by the end of their names, and the weight in float32 that they make


def _pack(values: torch.Tensor, bits: int, dim: int) -> torch.Tensor:
    """Unsigned integers into int32 along a dimension, the first one lowest."""
    values = values.to(torch.int64).movedim(dim, -1)
    values = values.reshape(*values.shape[:-1], -1, 32 // bits)
    packed = (values << torch.arange(0, 32, bits)).sum(-1)
    return packed.to(torch.int32).movedim(-1, dim).contiguous()  # the highest bit becomes the sign


def _affine(values: torch.Tensor, bits: int, dim: int) -> Packed:
    """Scales, float16, and zero points, int64, that map the range of the values along a dimension to unsigned integers."""
    low, high = values.amin(dim), values.amax(dim)
    scales = ((high - low) / (2**bits - 1)).half()
    return scales, (-low / scales.float()).round().clamp(0, 2**bits - 1).long()


def _centres(points: torch.Tensor, count: int) -> torch.Tensor:
    """`count` points that stand for all of them: a few rounds of k-means on some."""
    some = points[torch.randperm(len(points))[: 4 * count]]
    centres = some[torch.randperm(len(some))[:count]].clone()
    for _ in range(4):
        nearest = torch.cdist(some, centres).argmin(1)
        sums = torch.zeros_like(centres).index_add_(0, nearest, some)
        counts = torch.bincount(nearest, minlength=count).unsqueeze(1)
        centres = torch.where(counts > 0, sums / counts.clamp(min=1), centres)
    return centres


def gptq(bits: int, layout: str) -> tuple[dict, Callable[[torch.Tensor], Packed]]:
    """GPTQ: the layouts differ in whether zero points are stored less one. Columns belong to groups in no order, as with desc_act."""

    def quantize(weight: torch.Tensor) -> Packed:
        columns = weight.shape[1]
        groups = columns // GROUP
        group_of = (torch.arange(columns) % groups).to(torch.int32)
        by_group = torch.stack([weight[:, group_of == group] for group in range(groups)])  # [groups, rows, columns of a group]
        scales, zeros = _affine(by_group, bits, 2)
        zeros = zeros.clamp(min=1)
        integers = (weight.T / scales[group_of].float() + zeros[group_of]).round().clamp(0, 2**bits - 1).int()
        parts = {
            "qweight": _pack(integers, bits, 0),
            "qzeros": _pack(zeros - int(layout == "gptq"), bits, 1),
            "scales": scales,
            "g_idx": group_of,
        }
        return parts, (scales[group_of].float() * (integers - zeros[group_of])).T

    return {"quant_method": "gptq", "bits": bits, "group_size": GROUP, "desc_act": True, "checkpoint_format": layout}, quantize


def awq() -> tuple[dict, Callable[[torch.Tensor], Packed]]:
    """AWQ, layout gemm: the weight transposed, eight columns of it in an int32, column 8c + order[i] in bits 4i."""
    order = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])

    def interleaved(values: torch.Tensor) -> torch.Tensor:
        return values.reshape(len(values), -1, 8)[..., order].reshape(len(values), -1)

    def quantize(weight: torch.Tensor) -> Packed:
        scales, zeros = _affine(weight.T.unflatten(0, (-1, GROUP)), 4, 1)
        spread, shift = (part.repeat_interleave(GROUP, 0) for part in (scales.float(), zeros))
        integers = (weight.T / spread + shift).round().clamp(0, 15).int()
        return {"qweight": _pack(interleaved(integers), 4, 1), "qzeros": _pack(interleaved(zeros), 4, 1), "scales": scales}, (
            (integers - shift) * spread
        ).T

    return {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm", "zero_point": True}, quantize


def hqq(bits: int, axis: int) -> tuple[dict, Callable[[torch.Tensor], Packed]]:
    """HQQ: codes in groups of neighbours or across the rows; the first part of the codes is in the highest bits of a byte."""

    def quantize(weight: torch.Tensor) -> Packed:
        values = weight.reshape(-1, GROUP) if axis == 1 else weight.reshape(GROUP, -1)
        low, high = values.amin(axis, keepdim=True), values.amax(axis, keepdim=True)
        scale = ((high - low) / (2**bits - 1)).half()
        zero = (-low / scale.float()).half()  # not rounded
        codes = (values / scale.float() + zero.float()).round().clamp(0, 2**bits - 1).byte()
        packed = sum(part << shift for part, shift in zip(codes.chunk(8 // bits), range(8 - bits, -1, -bits), strict=True))
        parts = {
            "W_q": packed,
            "scale": scale,
            "zero": zero,
            "nbits": torch.tensor(bits, dtype=torch.int32),
            "shape": torch.tensor(weight.shape),
            "axis": torch.tensor(axis, dtype=torch.int32),
            "encoded_state_dict": torch.tensor(1, dtype=torch.uint8),
        }
        return parts, ((codes - zero.float()) * scale.float()).reshape(weight.shape)

    return {"quant_method": "hqq", "quant_config": {"weight_quant_params": {"nbits": bits, "group_size": GROUP, "axis": axis}}}, quantize


def aqlm(rows_of_group: int, bits: int) -> tuple[dict, Callable[[torch.Tensor], Packed]]:
    """AQLM: each block of the weight is the sum of two vectors from two codebooks, times a scale for its rows. Codes are stored signed."""

    def quantize(weight: torch.Tensor) -> Packed:
        rows, columns = weight.shape
        scales = weight.reshape(rows // rows_of_group, -1).std(1).view(-1, 1, 1, 1)
        wanted = weight.reshape(rows // rows_of_group, rows_of_group, -1, 8).swapaxes(1, 2) / scales  # [row groups, column groups, rows, 8]
        left, codes, books = wanted.flatten(2).flatten(0, 1), [], []
        for _ in range(2):
            book = _centres(left, 2**bits)
            codes.append(torch.cdist(left, book).argmin(1))
            books.append(book.view(-1, rows_of_group, 8))
            left = left - book[codes[-1]]
        codes, books = torch.stack(codes, 1).view(*wanted.shape[:2], 2), torch.stack(books)
        blocks = (books[0][codes[..., 0]] + books[1][codes[..., 1]]) * scales
        signed = torch.where(codes >= 2 ** (bits - 1), codes - 2**bits, codes).to(torch.int8 if bits <= 8 else torch.int16)
        return {"codes": signed, "codebooks": books, "scales": scales}, blocks.permute(0, 2, 1, 3).reshape(rows, columns)

    return {"quant_method": "aqlm", "in_group_size": 8, "out_group_size": rows_of_group, "num_codebooks": 2, "nbits_per_codebook": bits}, quantize


def eetq() -> tuple[dict, Callable[[torch.Tensor], Packed]]:
    """EETQ: int8 with a scale for each row, step by step as its preprocessing for GPUs since Turing orders them."""

    def quantize(weight: torch.Tensor) -> Packed:
        rows, columns = weight.shape
        scales = (weight.abs().amax(1) / 128).half()
        integers = (weight / scales.float().unsqueeze(1)).round().clamp(-128, 127).to(torch.int8)
        moved = torch.empty_like(integers.T)  # [columns, rows]
        for tile_row in range(16):
            moved[tile_row::16] = integers.T[8 * (tile_row % 4 // 2) + tile_row % 2 + 2 * (tile_row // 4) :: 16]
        pairs = moved.T.reshape(rows // 2, 2, columns // 64, 64)
        order = torch.stack([pairs[:, 0], pairs[:, 1]], dim=2).flatten()  # in each tile of 64 columns first the one row, then the other
        stored = (order.short() + 128).to(torch.uint8).view(-1, 4)
        stored[:, [1, 2]] = stored[:, [2, 1]]
        return {"weight": stored.view(torch.int8).view(columns, rows), "weight_scales": scales}, integers.float() * scales.float().unsqueeze(1)

    return {"quant_method": "eetq", "weights": "int8"}, quantize


def fp8(block: tuple[int, int] | None) -> tuple[dict, Callable[[torch.Tensor], Packed]]:
    """8-bit floats with one scale for each block of the matrix, or for all of it."""

    def quantize(weight: torch.Tensor) -> Packed:
        rows, columns = weight.shape
        height, width = block or (rows, columns)
        scales = 1e-3 * (1 + torch.rand(-(-rows // height), -(-columns // width)))
        spread = scales.repeat_interleave(height, 0)[:rows].repeat_interleave(width, 1)[:, :columns]
        stored = (weight / spread).clamp(-448, 448).to(torch.float8_e4m3fn)  # before torch 2.13, what is larger becomes a NaN
        return {"weight": stored, "weight_scale_inv": scales if block else scales.reshape(())}, stored.float() * spread

    return {"quant_method": "fp8", "weight_block_size": list(block) if block else None}, quantize


def compressed_in_4_bits(symmetric: bool) -> tuple[dict, Callable[[torch.Tensor], Packed]]:
    """compressed-tensors, pack-quantized: columns in groups; zero points are packed along the rows."""

    def quantize(weight: torch.Tensor) -> Packed:
        rows, columns = weight.shape
        scales = (0.5 + torch.rand(rows, columns // GROUP)).mul(weight.abs().max() / 8).bfloat16()
        zeros = torch.full(scales.shape, 8) if symmetric else torch.randint(0, 16, scales.shape)
        spread = scales.float().repeat_interleave(GROUP, 1)
        integers = (weight / spread + zeros.repeat_interleave(GROUP, 1)).round().clamp(0, 15).int()
        parts = {"weight_packed": _pack(integers, 4, 1), "weight_scale": scales, "weight_shape": torch.tensor([rows, columns])}
        if not symmetric:
            parts["weight_zero_point"] = _pack(zeros, 4, 0)
        return parts, (integers - zeros.repeat_interleave(GROUP, 1)) * spread

    weights = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": GROUP, "symmetric": symmetric}
    return _compressed("pack-quantized", weights), quantize


def compressed_in_8_bits(dtype: torch.dtype) -> tuple[dict, Callable[[torch.Tensor], Packed]]:
    """compressed-tensors in fp8 or int8, with a scale for each row."""

    def quantize(weight: torch.Tensor) -> Packed:
        scales = (weight.abs().amax(1, keepdim=True) / (127 if dtype == torch.int8 else 448)).bfloat16()
        exact = weight / scales.float()
        stored = (exact.round().clamp(-128, 127) if dtype == torch.int8 else exact.clamp(-448, 448)).to(dtype)
        return {"weight": stored, "weight_scale": scales}, stored.float() * scales.float()

    weights = {"num_bits": 8, "type": "int" if dtype == torch.int8 else "float", "strategy": "channel"}
    return _compressed("int-quantized" if dtype == torch.int8 else "float-quantized", weights), quantize


def _compressed(layout: str, weights: dict) -> dict:
    return {"quant_method": "compressed-tensors", "format": layout, "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}}}


BY_HAND = {
    "gptq-4": gptq(4, "gptq"),
    "gptq-8": gptq(8, "gptq_v2"),
    "awq": awq(),
    "hqq-4": hqq(4, axis=1),
    "hqq-8-across": hqq(8, axis=0),
    "hqq-2-across": hqq(2, axis=0),
    "eetq": eetq(),
    "aqlm": aqlm(1, 8),
    "aqlm-blocks": aqlm(2, 9),
    "fp8-blocks": fp8((128, 128)),
    "fp8-tensor": fp8(None),
    "compressed-4": compressed_in_4_bits(symmetric=True),
    "compressed-4-zeros": compressed_in_4_bits(symmetric=False),
    "compressed-fp8": compressed_in_8_bits(torch.float8_e4m3fn),
    "compressed-int8": compressed_in_8_bits(torch.int8),
}

_NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
BITSANDBYTES = {
    "nf4": _NF4,
    "nf4-double": {**_NF4, "bnb_4bit_use_double_quant": True},
    "nf4-stored-in-bfloat16": {**_NF4, "bnb_4bit_quant_storage": "bfloat16"},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "int8": {"load_in_8bit": True},
}


def write_quantized(name: str, base: Path, out: Path, plain: Path) -> None:
    """Write a base quantized into `out`, and the model that it stands for in float32 into `plain`."""
    for folder in (out, plain):
        shutil.copytree(base, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    if name in BITSANDBYTES:
        weights = _write_with_transformers(BITSANDBYTES[name], base, out)
    else:
        weights = _write_by_hand(*BY_HAND[name], base, out)
    save_file(weights, plain / "model.safetensors", metadata={"format": "pt"})


def _write_by_hand(settings: dict, quantize: Callable[[torch.Tensor], Packed], base: Path, out: Path) -> Parts:
    torch.manual_seed(3)
    stored, weights = {}, {}
    for name, weight in load_file(base / "model.safetensors").items():
        if not name.endswith("_proj.weight"):
            stored[name], weights[name] = weight, weight.float()
            continue
        parts, dequantized = quantize(weight.float())
        weights[name] = dequantized.contiguous()
        stored |= {f"{name.removesuffix('weight')}{end}": tensor for end, tensor in parts.items()}
    save_file(stored, out / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))
    return weights


def _write_with_transformers(settings: dict, base: Path, out: Path) -> Parts:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig
    from transformers.integrations.bitsandbytes import dequantize_bnb_weight

    quantization = BitsAndBytesConfig(**settings)
    AutoModelForCausalLM.from_pretrained(base, quantization_config=quantization, dtype=torch.bfloat16, device_map="cpu").save_pretrained(out)
    weights = {}
    for name, module in AutoModelForCausalLM.from_pretrained(out, device_map="cpu").named_modules():
        if (weight := getattr(module, "weight", None)) is not None:
            weights[f"{name}.weight"] = dequantize_bnb_weight(weight, getattr(module, "state", None)).detach().float().contiguous()
    return weights
