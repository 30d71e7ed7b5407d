"""A frozen weight in the blocks of a GGUF, dequantized: on a GPU by a Triton kernel, where there is one that works, else as `BlockType` does it."""

from __future__ import annotations

import torch

from olpack import progress
from olpack.errors import first_line
from olpack.model.gguf_blocks import BlockType
from olpack.train.ops.pointwise import kernels_for

_ROWS = 16  # that a kernel is tried on
_works: dict[str, bool] = {}  # name of a type to whether its kernel does


def dequantize(type_: BlockType, blocks: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The weights, [..., columns], in `dtype`. Weights that the file has in this dtype are not copied on a GPU.

    Args:
        blocks: uint8 [..., bytes of a row].
    """
    if not _has_kernel(type_, blocks, dtype):
        return type_.dequantize(blocks, dtype)
    from olpack.train.ops import block_kernels

    return block_kernels.dequantize(type_, blocks, dtype)


def write_fp8(type_: BlockType, blocks: torch.Tensor, scale: torch.Tensor, codes: torch.Tensor, *, turned: bool) -> bool:
    """Write a weight as fp8 codes; returns False where no kernel does.

    Args:
        blocks: uint8 [rows, bytes of a row].
        scale: float32, of each row, or of each column if turned.
        codes: float8_e4m3fn [rows, columns], or [columns, rows] if turned: then with a row stride that is divisible by 64.
    """
    if not _has_kernel(type_, blocks, torch.float32):
        return False
    from olpack.train.ops import block_kernels

    block_kernels.dequantize_to_fp8(type_, blocks, scale, codes, turned)
    return True


def _has_kernel(type_: BlockType, blocks: torch.Tensor, dtype: torch.dtype) -> bool:
    if kernels_for(blocks) is None:
        return False
    if type_.name not in _works:
        _works[type_.name] = _try(type_, blocks, dtype)
    return _works[type_.name]


def _try(type_: BlockType, blocks: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether the kernel of a type gives what `BlockType.by_torch` gives, on the first rows of a weight."""
    from olpack.train.ops import block_kernels

    if type_.name not in block_kernels.TYPES:
        return False
    some = blocks.reshape(-1, blocks.shape[-1])[:_ROWS]
    try:
        found = block_kernels.dequantize(type_, some, dtype)
    except Exception as error:  # whatever it is, plain torch works
        problem = first_line(error)
    else:
        expected = type_.by_torch(some.reshape(-1, type_.bytes)).view(found.shape).to(dtype)
        if torch.equal(found.nan_to_num(), expected.nan_to_num()):
            return True
        problem = "it gives other weights"
    progress.warn(f"{type_.name} blocks are dequantized by plain torch, which is slower: the kernel does not work here ({problem})")
    return False
