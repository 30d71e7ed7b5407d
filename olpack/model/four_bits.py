"""bitsandbytes' 4 bits on a CPU, whose kernel is only used for what it computes right on this machine.

Versions up to 0.50.2 take the scale of another block on CPUs with AVX-512 where a row is no whole number of blocks, as in a matrix of 50 x 48.
Whatever uses 4 bits goes through one operator of torch, which `check_kernel` replaces for the whole process where it is wrong.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Sequence

import torch

_OPERATOR = ("bitsandbytes", "dequantize_4bit")
_BLOCK = 64  # numbers that share a scale, by default
_WHOLE_ROWS, _BROKEN_ROWS = [(8, 2 * _BLOCK), (3, _BLOCK)], [(50, 48), (33, 96), (5, _BLOCK + 2)]

Dequantize = Callable[[torch.Tensor, torch.Tensor, int, str, Sequence[int], torch.dtype], torch.Tensor]
"""(packed, scales, numbers of a block, "nf4" or "fp4", shape, dtype) to the dense matrix; a byte packs two numbers, the first in its high half."""


@functools.cache
def check_kernel() -> torch.library.Library | None:
    """Compare the CPU's kernel with the formula, once in a process, and put the formula in its place where it is wrong.

    Returns:
        The registration that replaces it for as long as it lives; None where the kernel is right.
    """
    import bitsandbytes  # noqa: F401, which registers the kernel

    operator = torch.library.get_kernel("::".join(_OPERATOR), "CPU")

    def kernel(*arguments) -> torch.Tensor:
        return operator.call_boxed(torch._C.DispatchKeySet(torch._C.DispatchKey.CPU), *arguments)

    if _is_right(kernel, _WHOLE_ROWS + _BROKEN_ROWS):
        return None
    own = functools.partial(_by_blocks, kernel) if _is_right(kernel, _WHOLE_ROWS) else dequantize
    library = torch.library.Library(_OPERATOR[0], "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that a kernel is replaced is what is meant
        library.impl(_OPERATOR[1], own, "CPU")
    return library


def dequantize(packed: torch.Tensor, scales: torch.Tensor, block: int, kind: str, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """By the formula: the level of each code times the scale of its block, in float32, then rounded to `dtype`."""
    from bitsandbytes.functional import get_4bit_type

    levels, byte, numbers = get_4bit_type(kind, device=packed.device), torch.arange(256, device=packed.device), math.prod(shape)
    pairs = torch.stack((levels[byte >> 4], levels[byte & 15]), dim=1)
    values = pairs[packed.reshape(-1).view(torch.uint8).int()].reshape(-1)[:numbers]
    whole = numbers - numbers % block
    values[:whole].view(-1, block).mul_(scales[: whole // block, None])
    values[whole:].mul_(scales[whole // block :])
    return values.to(dtype).view(tuple(shape))


def _by_blocks(
    kernel: Dequantize, packed: torch.Tensor, scales: torch.Tensor, block: int, kind: str, shape: Sequence[int], dtype: torch.dtype
) -> torch.Tensor:
    """A matrix as one of whole blocks, for which the kernel is right, and a rest by the formula."""
    packed, numbers = packed.reshape(-1).view(torch.uint8), math.prod(shape)
    rows = numbers // block
    parts = []
    if rows:
        parts.append(kernel(packed[: rows * block // 2], scales[:rows], block, kind, (rows, block), dtype).reshape(-1))
    if rest := numbers % block:
        parts.append(dequantize(packed[rows * block // 2 :], scales[rows:], block, kind, (rest,), dtype))
    return (parts[0] if len(parts) == 1 else torch.cat(parts) if parts else torch.empty(0, dtype=dtype)).view(tuple(shape))


def _is_right(kernel: Dequantize, shapes: Sequence[tuple[int, int]]) -> bool:
    random = torch.Generator().manual_seed(0)
    for rows, columns in shapes:
        numbers = rows * columns
        packed = torch.randint(256, (-(-numbers // 2), 1), generator=random, dtype=torch.uint8)
        scales = torch.arange(1, -(-numbers // _BLOCK) + 1).float()  # each of its own, so that no block passes with another's
        for kind in ("nf4", "fp4"):
            for dtype in (torch.float32, torch.float16, torch.bfloat16):
                arguments = (packed, scales, _BLOCK, kind, (rows, columns), dtype)
                if not torch.allclose(kernel(*arguments).float(), dequantize(*arguments).float(), rtol=2 * torch.finfo(dtype).eps, atol=0):
                    return False
    return True
