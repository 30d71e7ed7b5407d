"""The blocks of ggml's tensor types, and the weights that they stand for.

    weights = TYPES[12].dequantize(blocks)     # uint8 [..., bytes of a row] -> float32 [..., columns]

The functions here are plain torch and give ggml's `dequantize_row_*` bit for bit: each multiplies and adds in its order. They run on GPUs; on a CPU
ggml's own are many times faster and take their place. The layouts are those of ggml's `ggml-common.h`.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from olpack.llamacpp import library

if TYPE_CHECKING:
    import torch

    Function = Callable[[torch.Tensor], torch.Tensor]

IQ4 = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
FP4 = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)  # doubled, as their scale is halved
_PIECE = 1 << 20  # weights that a thread dequantizes at once
_GPU_PIECE = 1 << 22  # so that what is computed in between takes some 60 MB


@dataclass(frozen=True)
class BlockType:
    """A tensor type of ggml.

    Attributes:
        name: ggml's, "Q4_K".
        weights, bytes: of a block.
    """

    name: str
    weights: int
    bytes: int
    _function: Function

    @property
    def bits(self) -> float:
        """Of a weight, scales included."""
        return 8 * self.bytes / self.weights

    def row_bytes(self, columns: int) -> int:
        """Bytes of a row; its columns are whole blocks."""
        return columns // self.weights * self.bytes

    def columns(self, row_bytes: int) -> int:
        """Columns of a row."""
        return row_bytes // self.bytes * self.weights

    def dequantize(self, blocks: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The weights, [..., columns], in `dtype` (float32 by default). On a GPU, weights that are stored in this dtype are not copied.

        Args:
            blocks: uint8 [..., bytes of a row], on any device.
        """
        import torch

        on_cpu = blocks.device.type == "cpu"
        if self.weights == 1 and not on_cpu:
            return self._function(blocks).to(dtype or torch.float32)
        shape = (*blocks.shape[:-1], self.columns(blocks.shape[-1]))
        each = blocks.reshape(-1, self.bytes)
        weights = torch.empty(len(each), self.weights, dtype=dtype or torch.float32, device=blocks.device)
        count = max(1, (_PIECE if on_cpu else _GPU_PIECE) // self.weights)
        pieces = list(zip(each.split(count), weights.split(count), strict=True))
        if not on_cpu:
            for piece, place in pieces:
                place.copy_(self.by_torch(piece))
        elif len(pieces) == 1:
            self._by_ggml(*pieces[0])
        else:
            with ThreadPoolExecutor(torch.get_num_threads()) as pool:
                for _ in pool.map(lambda pair: self._by_ggml(*pair), pieces):
                    pass
        return weights.view(shape)

    def by_torch(self, blocks: torch.Tensor) -> torch.Tensor:
        """The weights of blocks, uint8 [blocks, bytes] to [blocks, weights]; float32 but for the 16-bit types."""
        return self._function(blocks)

    def _by_ggml(self, blocks: torch.Tensor, out: torch.Tensor) -> None:
        import torch

        if self.name in ("F32", *INTEGERS):
            out.copy_(self._function(blocks))
            return
        wide = out if out.dtype == torch.float32 else torch.empty_like(out, dtype=torch.float32)
        library.dequantize_rows(library.tensor_type(self.name), blocks.contiguous().view(-1).numpy(), wide.view(1, -1).numpy())
        if wide is not out:
            out.copy_(wide)


def _half(blocks: torch.Tensor, at: int) -> torch.Tensor:
    """The float16 at a byte of each block, float32 [blocks, 1]."""
    import torch

    return blocks[:, at : at + 2].contiguous().view(torch.float16).float()


def _nibbles(packed: torch.Tensor) -> torch.Tensor:
    """The low halves of the bytes, then the high ones: [..., n] to [..., 2n]."""
    import torch

    return torch.cat((packed & 15, packed >> 4), dim=-1)


def _bits(words: torch.Tensor) -> torch.Tensor:
    """The bits of little-endian bytes, [blocks, n] to [blocks, 8n] of 0 and 1."""
    import torch

    return ((words.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8, device=words.device)) & 1).flatten(1)


def _shifted(packed: torch.Tensor, shifts: tuple[int, ...]) -> torch.Tensor:
    """[blocks, parts, n] to [blocks, parts, shifts, n]."""
    import torch

    return packed.unsqueeze(2) >> torch.tensor(shifts, dtype=torch.uint8, device=packed.device).view(1, 1, -1, 1)


def _from_table(codes: torch.Tensor, table: tuple[int, ...]) -> torch.Tensor:
    import torch

    return torch.tensor(table, dtype=torch.float32, device=codes.device)[codes.int()]


def _q4_0(blocks: torch.Tensor) -> torch.Tensor:
    return (_nibbles(blocks[:, 2:]).float() - 8) * _half(blocks, 0)


def _q4_1(blocks: torch.Tensor) -> torch.Tensor:
    return _nibbles(blocks[:, 4:]).float() * _half(blocks, 0) + _half(blocks, 2)


def _q5_0(blocks: torch.Tensor) -> torch.Tensor:
    return ((_nibbles(blocks[:, 6:]) | _bits(blocks[:, 2:6]) << 4).float() - 16) * _half(blocks, 0)


def _q5_1(blocks: torch.Tensor) -> torch.Tensor:
    return (_nibbles(blocks[:, 8:]) | _bits(blocks[:, 4:8]) << 4).float() * _half(blocks, 0) + _half(blocks, 2)


def _q8_0(blocks: torch.Tensor) -> torch.Tensor:
    import torch

    return blocks[:, 2:].view(torch.int8).float() * _half(blocks, 0)


def _q2_k(blocks: torch.Tensor) -> torch.Tensor:
    """16 scales and minima of 4 bits; 2 bits for each of 256 weights, which lie in four layers of two halves."""
    scales, codes = blocks[:, :16], blocks[:, 16:80].reshape(-1, 2, 32)
    codes = (_shifted(codes, (0, 2, 4, 6)) & 3).reshape(-1, 16, 16).float()
    scale = (_half(blocks, 80) * (scales & 15).float()).unsqueeze(-1)
    least = (_half(blocks, 82) * (scales >> 4).float()).unsqueeze(-1)
    return (scale * codes - least).flatten(1)


def _q3_k(blocks: torch.Tensor) -> torch.Tensor:
    """As Q2_K, with a third bit apart, and 16 scales of 6 bits whose upper two lie apart as well."""
    import torch

    high, codes, packed = blocks[:, :32], blocks[:, 32:96].reshape(-1, 2, 32), blocks[:, 96:108]
    low_scales = _nibbles(packed[:, :8])
    high_scales = (_shifted(packed[:, 8:].unsqueeze(1), (0, 2, 4, 6)) & 3).flatten(1)
    scale = (_half(blocks, 108) * ((low_scales | high_scales << 4).view(torch.int8) - 32).float()).unsqueeze(-1)
    third = (_shifted(high.unsqueeze(1), tuple(range(8))) & 1).reshape(-1, 2, 4, 32)
    signed = (_shifted(codes, (0, 2, 4, 6)) & 3 | third << 2).reshape(-1, 16, 16).float() - 4
    return (scale * signed).flatten(1)


def _k_scales(packed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(scales, minima) of Q4_K and Q5_K, uint8 [blocks, 8], from 12 bytes that have 6 bits for each."""
    import torch

    first, second, rest = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scales = torch.cat((first & 63, rest & 15 | first >> 6 << 4), dim=1)
    return scales, torch.cat((second & 63, rest >> 4 | second >> 6 << 4), dim=1)


def _q45_k(blocks: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """Of Q4_K and Q5_K, with codes uint8 [blocks, 8, 32]."""
    scales, minima = _k_scales(blocks[:, 4:16])
    scale = (_half(blocks, 0) * scales.float()).unsqueeze(-1)
    least = (_half(blocks, 2) * minima.float()).unsqueeze(-1)
    return (scale * codes.float() - least).flatten(1)


def _q4_k(blocks: torch.Tensor) -> torch.Tensor:
    return _q45_k(blocks, _nibbles(blocks[:, 16:].reshape(-1, 4, 32)).reshape(-1, 8, 32))


def _q5_k(blocks: torch.Tensor) -> torch.Tensor:
    codes = _nibbles(blocks[:, 48:].reshape(-1, 4, 32)).reshape(-1, 8, 32)
    fifth = (_shifted(blocks[:, 16:48].unsqueeze(1), tuple(range(8))) & 1).reshape(-1, 8, 32)
    return _q45_k(blocks, codes | fifth << 4)


def _q6_k(blocks: torch.Tensor) -> torch.Tensor:
    """16 scales of 8 bits; of each half of 128 weights the lower 4 bits lie in 64 bytes, the upper two in 32."""
    import torch

    low, high = blocks[:, :128].reshape(-1, 2, 64), blocks[:, 128:192].reshape(-1, 2, 32)
    codes = _nibbles(low).reshape(-1, 2, 4, 32) | (_shifted(high, (0, 2, 4, 6)) & 3) << 4
    scale = _half(blocks, 208) * blocks[:, 192:208].view(torch.int8).float()
    return (scale.unsqueeze(-1) * (codes.reshape(-1, 16, 16).float() - 32)).flatten(1)


def _iq4_nl(blocks: torch.Tensor) -> torch.Tensor:
    return _half(blocks, 0) * _from_table(_nibbles(blocks[:, 2:]), IQ4)


def _iq4_xs(blocks: torch.Tensor) -> torch.Tensor:
    import torch

    high = (_shifted(blocks[:, None, 2:4], (0, 2, 4, 6)) & 3).squeeze(1).transpose(1, 2).flatten(1)
    low = torch.stack((blocks[:, 4:8] & 15, blocks[:, 4:8] >> 4), dim=-1).flatten(1)
    scale = _half(blocks, 0) * ((low | high << 4).float() - 32)
    return (scale.unsqueeze(-1) * _from_table(_nibbles(blocks[:, 8:].reshape(-1, 8, 16)), IQ4)).flatten(1)


def _mxfp4(blocks: torch.Tensor) -> torch.Tensor:
    """A power of two for 32 weights, as half of an 8-bit exponent; the two smallest are subnormal."""
    import torch

    exponent = blocks[:, :1].int()
    bits = torch.where(exponent < 2, 0x00200000 << exponent.clamp(max=1), (exponent - 1) << 23)
    return bits.view(torch.float32) * _from_table(_nibbles(blocks[:, 1:]), FP4)


def _plain(name: str, blocks: torch.Tensor) -> torch.Tensor:
    """Of a dtype of torch, whose blocks are single weights."""
    import torch

    return blocks.contiguous().view(getattr(torch, name))


TYPES = {
    0: BlockType("F32", 1, 4, partial(_plain, "float32")),
    1: BlockType("F16", 1, 2, partial(_plain, "float16")),
    2: BlockType("Q4_0", 32, 18, _q4_0),
    3: BlockType("Q4_1", 32, 20, _q4_1),
    6: BlockType("Q5_0", 32, 22, _q5_0),
    7: BlockType("Q5_1", 32, 24, _q5_1),
    8: BlockType("Q8_0", 32, 34, _q8_0),
    10: BlockType("Q2_K", 256, 84, _q2_k),
    11: BlockType("Q3_K", 256, 110, _q3_k),
    12: BlockType("Q4_K", 256, 144, _q4_k),
    13: BlockType("Q5_K", 256, 176, _q5_k),
    14: BlockType("Q6_K", 256, 210, _q6_k),
    20: BlockType("IQ4_NL", 32, 18, _iq4_nl),
    23: BlockType("IQ4_XS", 256, 136, _iq4_xs),
    24: BlockType("I8", 1, 1, partial(_plain, "int8")),
    25: BlockType("I16", 1, 2, partial(_plain, "int16")),
    26: BlockType("I32", 1, 4, partial(_plain, "int32")),
    27: BlockType("I64", 1, 8, partial(_plain, "int64")),
    30: BlockType("BF16", 1, 2, partial(_plain, "bfloat16")),
    39: BlockType("MXFP4", 32, 17, _mxfp4),
}
"""The types that a base can have, by ggml's number."""

FLOATS = ("F32", "F16", "BF16")
INTEGERS = ("I8", "I16", "I32", "I64")
