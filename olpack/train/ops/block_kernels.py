"""Triton kernels that dequantize the blocks of a GGUF (`olpack.model.gguf_blocks`), in one pass over memory: to a dense weight, to fp8 codes, and
to the fp8 codes of the turned weight.

All three go by 32 weights at a time, which every type has as two halves of 16: a block is one or eight of them. A type's function returns what
ggml's `dequantize_row_*` does, bit for bit; sums and products are rounded one by one for that. Each weight reads the bytes that it needs, though
others need them, too: then loads and stores have one layout, and threads exchange nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

import torch
import triton
import triton.language as tl

from olpack.model import gguf_blocks
from olpack.model.gguf_blocks import FP4, IQ4, BlockType
from olpack.train.ops.kernels import to_fp8

GROUP = 32  # weights
_GROUPS = 64  # of a program: 16 weights a thread
_ROWS, _TURNED_GROUPS = 128, 2  # of a program that turns a weight
_EXACT = {"num_warps": 4, "enable_fp_fusion": False}


def _words(table: tuple[int, ...]) -> tuple[tl.constexpr, tl.constexpr]:
    """16 numbers of 8 bits as two of 64."""
    whole = b"".join(number.to_bytes(1, "little", signed=True) for number in table)
    low, high = (int.from_bytes(part, "little", signed=True) for part in (whole[:8], whole[8:]))
    return tl.constexpr(low), tl.constexpr(high)


_IQ4_LOW, _IQ4_HIGH = _words(IQ4)
_FP4_LOW, _FP4_HIGH = _words(FP4)


@triton.jit
def _places():
    """(half [1, 2, 1], place in it [1, 1, 16]) of a weight in its group."""
    return tl.arange(0, 2)[None, :, None], tl.arange(0, 16)[None, None, :]


@triton.jit
def _byte(blocks, at, known):
    return tl.load(blocks + at, mask=known, other=0).to(tl.int32)


@triton.jit
def _signed_byte(blocks, at, known):
    return tl.load(blocks + at, mask=known, other=0).to(tl.int8, bitcast=True).to(tl.float32)


@triton.jit
def _float16(words, at, known):
    return tl.load(words + at, mask=known, other=0).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _from_table(code, low, high):
    return (tl.where(code < 8, low, high) >> ((code & 7) * 8).to(tl.int64)).to(tl.int8).to(tl.float32)


# -- A function for each type. blocks and words point to the same bytes; block and group [n, 1, 1] are the blocks of n groups and their places in
# -- these; known [n, 1, 1] says which there are. They return float32 [n, 2, 16].


@triton.jit
def _nibble(blocks, start, known):
    """Of a type with 32 weights in a block: the low halves of 16 bytes, then the high ones."""
    half, place = _places()
    return (_byte(blocks, start + place + 0 * half, known) >> (4 * half)) & 15


@triton.jit
def _fifth_bit(words, at, known):
    half, place = _places()
    return ((tl.load(words + at + half, mask=known, other=0).to(tl.int32) >> place) & 1) << 4


@triton.jit
def _q4_0(blocks, words, block, group, known):
    return (_nibble(blocks, block * 18 + 2, known) - 8).to(tl.float32) * _float16(words, block * 9, known)


@triton.jit
def _q4_1(blocks, words, block, group, known):
    code = _nibble(blocks, block * 20 + 4, known)
    return code.to(tl.float32) * _float16(words, block * 10, known) + _float16(words, block * 10 + 1, known)


@triton.jit
def _q5_0(blocks, words, block, group, known):
    code = _nibble(blocks, block * 22 + 6, known) | _fifth_bit(words, block * 11 + 1, known)
    return (code - 16).to(tl.float32) * _float16(words, block * 11, known)


@triton.jit
def _q5_1(blocks, words, block, group, known):
    code = _nibble(blocks, block * 24 + 8, known) | _fifth_bit(words, block * 12 + 2, known)
    return code.to(tl.float32) * _float16(words, block * 12, known) + _float16(words, block * 12 + 1, known)


@triton.jit
def _q8_0(blocks, words, block, group, known):
    half, place = _places()
    return _signed_byte(blocks, block * 34 + 2 + 16 * half + place, known) * _float16(words, block * 17, known)


@triton.jit
def _iq4_nl(blocks, words, block, group, known):
    return _float16(words, block * 9, known) * _from_table(_nibble(blocks, block * 18 + 2, known), _IQ4_LOW, _IQ4_HIGH)


@triton.jit
def _mxfp4(blocks, words, block, group, known):
    exponent = _byte(blocks, block * 17, known)
    bits = tl.where(exponent < 2, 0x00200000 << tl.minimum(exponent, 1), (exponent - 1) << 23)
    return bits.to(tl.float32, bitcast=True) * _from_table(_nibble(blocks, block * 17 + 1, known), _FP4_LOW, _FP4_HIGH)


@triton.jit
def _two_bits(blocks, start, group, known):
    """Of Q2_K and Q3_K: four groups share 32 bytes."""
    half, place = _places()
    return (_byte(blocks, start + group // 4 * 32 + 16 * half + place, known) >> (group % 4 * 2)) & 3


@triton.jit
def _q2_k(blocks, words, block, group, known):
    half, _ = _places()
    packed = _byte(blocks, block * 84 + 2 * group + half, known)
    scale = _float16(words, block * 42 + 40, known) * (packed & 15).to(tl.float32)
    least = _float16(words, block * 42 + 41, known) * (packed >> 4).to(tl.float32)
    return scale * _two_bits(blocks, block * 84 + 16, group, known).to(tl.float32) - least


@triton.jit
def _q3_k(blocks, words, block, group, known):
    half, place = _places()
    part = 2 * group + half
    low = (_byte(blocks, block * 110 + 96 + part % 8, known) >> (part // 8 * 4)) & 15
    high = (_byte(blocks, block * 110 + 104 + part % 4, known) >> (part // 4 * 2)) & 3
    scale = _float16(words, block * 55 + 54, known) * ((low | high << 4) - 32).to(tl.float32)
    third = (_byte(blocks, block * 110 + 16 * half + place, known) >> group) & 1
    return scale * ((_two_bits(blocks, block * 110 + 32, group, known) | third << 2) - 4).to(tl.float32)


@triton.jit
def _k_scales(blocks, words, block, group, known, BYTES: tl.constexpr):
    """(scale, minimum) of a group of Q4_K and Q5_K, float32 [n, 1, 1]."""
    start = block * BYTES + 4 + group % 4
    first, second, rest = _byte(blocks, start, known), _byte(blocks, start + 4, known), _byte(blocks, start + 8, known)
    scale = tl.where(group < 4, first & 63, rest & 15 | first >> 6 << 4)
    least = tl.where(group < 4, second & 63, rest >> 4 | second >> 6 << 4)
    at = block * (BYTES // 2)
    return _float16(words, at, known) * scale.to(tl.float32), _float16(words, at + 1, known) * least.to(tl.float32)


@triton.jit
def _pair_nibble(blocks, start, group, known):
    """Of Q4_K and Q5_K: two groups share 32 bytes."""
    half, place = _places()
    return (_byte(blocks, start + group // 2 * 32 + 16 * half + place, known) >> (group % 2 * 4)) & 15


@triton.jit
def _q4_k(blocks, words, block, group, known):
    scale, least = _k_scales(blocks, words, block, group, known, 144)
    return scale * _pair_nibble(blocks, block * 144 + 16, group, known).to(tl.float32) - least


@triton.jit
def _q5_k(blocks, words, block, group, known):
    half, place = _places()
    scale, least = _k_scales(blocks, words, block, group, known, 176)
    fifth = (_byte(blocks, block * 176 + 16 + 16 * half + place, known) >> group) & 1
    return scale * (_pair_nibble(blocks, block * 176 + 48, group, known) | fifth << 4).to(tl.float32) - least


@triton.jit
def _q6_k(blocks, words, block, group, known):
    half, place = _places()
    scale = _float16(words, block * 105 + 104, known) * _signed_byte(blocks, block * 210 + 192 + 2 * group + half, known)
    inside = 16 * half + place
    low = (_byte(blocks, block * 210 + group // 4 * 64 + group % 2 * 32 + inside, known) >> (group % 4 // 2 * 4)) & 15
    high = (_byte(blocks, block * 210 + 128 + group // 4 * 32 + inside, known) >> (group % 4 * 2)) & 3
    return scale * ((low | high << 4) - 32).to(tl.float32)


@triton.jit
def _iq4_xs(blocks, words, block, group, known):
    half, place = _places()
    high = (_byte(blocks, block * 136 + 2 + group // 4, known) >> (group % 4 * 2)) & 3
    low = (_byte(blocks, block * 136 + 4 + group // 2, known) >> (group % 2 * 4)) & 15
    scale = _float16(words, block * 68, known) * ((low | high << 4) - 32).to(tl.float32)
    code = (_byte(blocks, block * 136 + 8 + group * 16 + place + 0 * half, known) >> (4 * half)) & 15
    return scale * _from_table(code, _IQ4_LOW, _IQ4_HIGH)


_READERS = {
    "Q4_0": _q4_0, "Q4_1": _q4_1, "Q5_0": _q5_0, "Q5_1": _q5_1, "Q8_0": _q8_0, "Q2_K": _q2_k, "Q3_K": _q3_k, "Q4_K": _q4_k, "Q5_K": _q5_k,
    "Q6_K": _q6_k, "IQ4_NL": _iq4_nl, "IQ4_XS": _iq4_xs, "MXFP4": _mxfp4,
}  # fmt: skip
TYPES = frozenset(_READERS)
"""Names of the types that have kernels: those with several weights in a block."""


@triton.jit
def _weights(blocks, words, start, block, group, known, READ: tl.constexpr, BYTES: tl.constexpr):
    """The weights of groups, float32 [groups, 2, 16]. Only the block that the others are counted from is a number of 64 bits."""
    here, words_here = blocks + start * BYTES, words + start * (BYTES // 2)
    return READ(here, words_here, block[:, None, None], group[:, None, None], known[:, None, None])


@triton.jit(do_not_specialize=["groups"])
def _dequantize_kernel(
    blocks,
    words,
    scale,
    out,
    groups,
    per_row,
    step,
    READ: tl.constexpr,
    BYTES: tl.constexpr,
    PER: tl.constexpr,
    IN_FP8: tl.constexpr,
    GROUPS: tl.constexpr,
):
    half, place = _places()
    first, each = tl.program_id(0) * GROUPS, tl.arange(0, GROUPS)
    known = first + each < groups
    numbers = _weights(blocks, words, (first // PER).to(tl.int64), each // PER, each % PER, known, READ, BYTES)
    if IN_FP8:
        row = (first + each) // per_row
        numbers = to_fp8(numbers / tl.load(scale + row, mask=known, other=1.0)[:, None, None])
        start = row.to(tl.int64) * step + (first + each) % per_row * 32
    else:
        out += first.to(tl.int64) * 32
        start = each * 32
    tl.store(out + start[:, None, None] + 16 * half + place, numbers, mask=known[:, None, None])


@triton.jit(do_not_specialize=["rows"])
def _turned_fp8_kernel(
    blocks,
    words,
    scale,
    out,
    rows,
    per_row,
    step,
    READ: tl.constexpr,
    BYTES: tl.constexpr,
    PER: tl.constexpr,
    ROWS: tl.constexpr,
    GROUPS: tl.constexpr,
):
    # Four rows are one word, because single bytes are turned at a third of the pace.
    word = tl.program_id(0) * (ROWS // 4) + tl.arange(0, ROWS // 4)
    column = tl.program_id(1) * (GROUPS * 32) + tl.arange(0, GROUPS * 32)
    each, of_row = tl.arange(0, ROWS // 4 * GROUPS), per_row // PER
    first, across = tl.program_id(0) * ROWS, tl.program_id(1) * GROUPS + each % GROUPS
    inverse = 1 / tl.load(scale + column, mask=column < 32 * per_row, other=1.0)[None, :]
    result = tl.zeros([ROWS // 4, GROUPS * 32], tl.int32)
    for byte in tl.static_range(4):
        row = each // GROUPS * 4 + byte
        known = (first + row < rows) & (across < per_row)
        numbers = _weights(blocks, words, first.to(tl.int64) * of_row, row * of_row + across // PER, across % PER, known, READ, BYTES)
        codes = to_fp8(tl.reshape(numbers, (ROWS // 4, GROUPS * 32)) * inverse)
        result |= codes.to(tl.uint8, bitcast=True).to(tl.int32) << (8 * byte)
    place = column.to(tl.int64)[:, None] * step + word[None, :]
    tl.store(out + place, tl.trans(result), mask=(column < 32 * per_row)[:, None] & (4 * word < rows)[None, :])


def _constants(type_: BlockType) -> dict[str, Any]:
    return {"READ": _READERS[type_.name], "BYTES": type_.bytes, "PER": type_.weights // GROUP, **_EXACT}


def _pointers(type_: BlockType, blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Bytes, and words of 16 bits, which have no use where a block's bytes are odd."""
    return blocks, blocks if type_.bytes % 2 else blocks.view(torch.int16)


def _write(type_: BlockType, blocks: torch.Tensor, scale: torch.Tensor | None, out: torch.Tensor) -> None:
    pointers, constants = _pointers(type_, blocks), _constants(type_)
    per_row = out.shape[1] // GROUP
    groups = len(blocks) * per_row
    rows = (per_row, out.stride(0)) if scale is not None else (1, 1)  # which a dense weight does not need: one kernel for all shapes
    _dequantize_kernel[(triton.cdiv(groups, _GROUPS),)](*pointers, scale, out, groups, *rows, IN_FP8=scale is not None, GROUPS=_GROUPS, **constants)


def dequantize(type_: BlockType, blocks: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The same as `BlockType.dequantize`, bit for bit, for one of `TYPES`."""
    rows = blocks.reshape(-1, blocks.shape[-1])
    out = torch.empty(len(rows), type_.columns(blocks.shape[-1]), dtype=dtype, device=blocks.device)
    _write(type_, rows.contiguous(), None, out)
    return out.view(*blocks.shape[:-1], -1)


def dequantize_to_fp8(type_: BlockType, blocks: torch.Tensor, scale: torch.Tensor, out: torch.Tensor, turned: bool) -> None:
    """Write a weight as fp8 codes.

    Args:
        type_: one of `TYPES`.
        blocks: uint8 [rows, bytes of a row]; rows are divisible by 16.
        scale: float32, of each row, or of each column if turned.
        out: float8_e4m3fn [rows, columns], or [columns, rows] if turned; numbers of a row stand side by side. If turned, its row stride is
            divisible by 64 (`fp8.turned_codes` says why).
    """
    blocks = blocks.contiguous()
    if not turned:
        _write(type_, blocks, scale, out)
        return
    pointers, constants = _pointers(type_, blocks), _constants(type_)
    rows, per_row, out = len(blocks), len(out) // GROUP, out.view(torch.int32)
    grid = (triton.cdiv(rows, _ROWS), triton.cdiv(per_row, _TURNED_GROUPS))
    _turned_fp8_kernel[grid](*pointers, scale, out, rows, per_row, out.stride(0), ROWS=_ROWS, GROUPS=_TURNED_GROUPS, **constants)


def compile_for(names: Collection[str], dtype: torch.dtype) -> Iterator[Any]:
    """Compile the kernels that dequantize types of these names to `dtype`, one at each iteration; others are compiled when they are met."""
    for type_ in gguf_blocks.TYPES.values():
        if type_.name in names and type_.name in TYPES:
            words = torch.uint8 if type_.bytes % 2 else torch.int16
            constants = {"IN_FP8": False, "GROUPS": _GROUPS, **_constants(type_)}
            yield _dequantize_kernel.warmup(torch.uint8, words, None, dtype, _GROUPS, 1, 1, **constants, grid=(1,))
