"""What a kernel that writes a weight in fp8 must do."""

from __future__ import annotations

from collections.abc import Callable

import torch

from olpack.train.ops import fp8


def assert_writes_codes(write: Callable[[torch.Tensor, torch.Tensor], object], weight: torch.Tensor, *, turned: bool) -> None:
    """The codes are those of the weight as fp8 rounds, and nothing is written beside them.

    Args:
        write: writes the codes, with these scales [rows, 1], to this place.
        weight: [out, in], on the device of the kernel.
    """
    dense = (weight.T if turned else weight).float()
    rows, columns = dense.shape
    scale = fp8._scale(dense.abs().amax(1, keepdim=True))
    around = fp8.turned_codes(rows, columns + 32, dense.device)
    around.copy_(torch.zeros(around.shape))
    codes = around[:, 16:-16]
    write(scale, codes)
    apart = (codes.float() * scale - dense).abs()
    within = (apart <= dense.abs() / 14 + scale / 512).float().mean()
    assert within == 1 if dense.is_cuda else within > 0.9  # Triton's interpreter loses the carry where a mantissa is rounded up to 2
    assert (around[:, :16].float() == 0).all() and (around[:, -16:].float() == 0).all()
