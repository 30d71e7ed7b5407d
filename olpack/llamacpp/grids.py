"""The values that a block of ggml's types can stand for, given its scales, and how other codes are written into it.

A weight is `scale * level + low`. The scale and the low belong to a sub-block of 16 or 32 weights; the level is one of a type's levels, and
the code that a block stores is the level's number. The layouts are those of ggml-common.h.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from olpack.llamacpp import library

_UNEVEN = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)  # of IQ4_NL


@dataclass(frozen=True)
class GridType:
    """A type whose codes are chosen weight by weight.

    Attributes:
        block: weights that share what a block stores.
        part: weights that share a scale and a low.
        levels: by code, ascending.
    """

    block: int
    part: int
    levels: tuple[int, ...]

    @property
    def whole(self) -> bool:
        """Whether the levels are one apart, so that rounding finds the nearest."""
        return self.levels == _whole(self.levels[0], self.levels[-1])


def _whole(bottom: int, top: int) -> tuple[int, ...]:
    return tuple(range(bottom, top + 1))


# Q8_0 is not among them: its error is too small for the choice of a code to matter.
GRID_TYPES = {
    "q4_0": GridType(32, 32, _whole(-8, 7)),
    "q4_1": GridType(32, 32, _whole(0, 15)),
    "q5_0": GridType(32, 32, _whole(-16, 15)),
    "q5_1": GridType(32, 32, _whole(0, 31)),
    "iq4_nl": GridType(32, 32, _UNEVEN),
    "q2_K": GridType(256, 16, _whole(0, 3)),
    "q3_K": GridType(256, 16, _whole(-4, 3)),
    "q4_K": GridType(256, 32, _whole(0, 15)),
    "q5_K": GridType(256, 32, _whole(0, 31)),
    "q6_K": GridType(256, 16, _whole(-32, 31)),
}

# Bytes of a block at which its half-precision numbers begin: what scales the levels, and what scales the lows of a type that has them.
HALVES = {
    "q4_0": (0,),
    "q4_1": (0, 2),
    "q5_0": (0,),
    "q5_1": (0, 2),
    "iq4_nl": (0,),
    "q2_K": (80, 82),
    "q3_K": (108,),
    "q4_K": (0, 2),
    "q5_K": (0, 2),
    "q6_K": (208,),
}


def read_grid(name: str, packed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scales and lows of rows of blocks.

    Args:
        name: one of `GRID_TYPES`.
        packed: uint8 [rows, bytes of a row].

    Returns:
        (scales, lows), each float32 [rows, columns / part]. They give ggml's own dequantized values.
    """
    rows = len(packed)
    blocks = packed.reshape(rows, -1, library.row_size(library.tensor_type(name), GRID_TYPES[name].block))
    match name:
        case "q4_0" | "q5_0" | "iq4_nl":
            scales = _halves(blocks[..., :2])
            lows = np.zeros_like(scales)
        case "q4_1" | "q5_1":
            scales, lows = _halves(blocks[..., :2]), _halves(blocks[..., 2:4])
        case "q2_K":
            scales = _halves(blocks[..., 80:82]) * (blocks[..., :16] & 15)
            lows = -(_halves(blocks[..., 82:84]) * (blocks[..., :16] >> 4))
        case "q3_K":
            low_bits, high_bits = blocks[..., 96:104], blocks[..., 104:108]
            numbers = np.concatenate([low_bits & 15, low_bits >> 4], axis=-1)
            numbers |= np.concatenate([(high_bits >> shift & 3) << 4 for shift in (0, 2, 4, 6)], axis=-1)
            scales = _halves(blocks[..., 108:110]) * (numbers.astype(np.float32) - 32)
            lows = np.zeros_like(scales)
        case "q4_K" | "q5_K":
            first, second, third = blocks[..., 4:8], blocks[..., 8:12], blocks[..., 12:16]
            scales = _halves(blocks[..., :2]) * np.concatenate([first & 63, (third & 15) | (first >> 6) << 4], axis=-1)
            lows = -(_halves(blocks[..., 2:4]) * np.concatenate([second & 63, (third >> 4) | (second >> 6) << 4], axis=-1))
        case "q6_K":
            scales = _halves(blocks[..., 208:210]) * blocks[..., 192:208].view(np.int8)
            lows = np.zeros_like(scales)
        case _:
            raise ValueError(name)
    return scales.reshape(rows, -1), lows.reshape(rows, -1)


def write_codes(name: str, packed: np.ndarray, codes: np.ndarray) -> None:
    """Give blocks other codes; their scales stay.

    Args:
        name: one of `GRID_TYPES`.
        packed: uint8 [rows, bytes of a row], changed in place.
        codes: uint8 [rows, columns], numbers of levels.
    """
    rows = len(packed)
    kind = GRID_TYPES[name]
    blocks = packed.reshape(rows, -1, library.row_size(library.tensor_type(name), kind.block))
    quarters = codes.reshape(rows, -1, kind.block // 32, 32)  # of 32 weights, which ggml interleaves
    match name:
        case "q4_0" | "q4_1" | "q5_0" | "q5_1" | "iq4_nl":
            one = quarters[..., 0, :]
            blocks[..., -16:] = (one[..., :16] & 15) | (one[..., 16:] & 15) << 4
            if name in ("q5_0", "q5_1"):
                blocks[..., -20:-16] = np.packbits(one >> 4, axis=-1, bitorder="little")
        case "q2_K":
            blocks[..., 16:80] = _pairs(quarters)
        case "q3_K":
            blocks[..., :32] = _high_bits(quarters >> 2)
            blocks[..., 32:96] = _pairs(quarters)
        case "q4_K" | "q5_K":
            low_bits = quarters & 15
            blocks[..., -128:] = (low_bits[..., ::2, :] | low_bits[..., 1::2, :] << 4).reshape(*blocks.shape[:2], 128)
            if name == "q5_K":
                blocks[..., 16:48] = _high_bits(quarters >> 4)
        case "q6_K":
            halves = quarters.reshape(*blocks.shape[:2], 2, 4, 32)
            low_bits = halves & 15
            blocks[..., :128] = (low_bits[..., :2, :] | low_bits[..., 2:, :] << 4).reshape(*blocks.shape[:2], 128)
            blocks[..., 128:192] = _pairs(quarters >> 4)
        case _:
            raise ValueError(name)


def write_halves(name: str, packed: np.ndarray, halves: np.ndarray) -> None:
    """Give blocks other half-precision numbers; all else stays.

    Args:
        name: one of `GRID_TYPES`.
        packed: uint8 [rows, bytes of a row], changed in place.
        halves: float16 [numbers of a block, rows, blocks], in the order of `HALVES`.
    """
    blocks = packed.reshape(len(packed), -1, library.row_size(library.tensor_type(name), GRID_TYPES[name].block))
    for at, numbers in zip(HALVES[name], halves, strict=True):
        blocks[..., at : at + 2] = numbers[..., None].view(np.uint8)


def _halves(data: np.ndarray) -> np.ndarray:
    """Half-precision numbers as float32: [..., 2] bytes to [..., 1]."""
    return np.ascontiguousarray(data).view(np.float16).astype(np.float32)


def _pairs(quarters: np.ndarray) -> np.ndarray:
    """The two low bits of each of 256 codes: 64 bytes. [rows, blocks, 8, 32] to [rows, blocks, 64]."""
    halves = quarters.reshape(*quarters.shape[:2], 2, 4, 32) & 3
    return (halves[..., 0, :] | halves[..., 1, :] << 2 | halves[..., 2, :] << 4 | halves[..., 3, :] << 6).reshape(*quarters.shape[:2], 64)


def _high_bits(bits: np.ndarray) -> np.ndarray:
    """One bit of each of 256 codes: 32 bytes. [rows, blocks, 8, 32] to [rows, blocks, 32]."""
    return np.packbits(bits, axis=-2, bitorder="little")[..., 0, :]
