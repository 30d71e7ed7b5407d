"""The columns of a block rounded by a Triton kernel: each program takes some rows, and keeps what their columns aim at in registers.

Kernel by kernel a column takes ten launches: 0.98 s for the keys of an 8B, in place of 0.12 (benchmarks/rounding_8b.md).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from olpack.llamacpp.grids import GridType

_ROWS = 16  # of a program: 256 columns of them are 16 KiB
_TO_WHOLE = tl.constexpr(12_582_912.0)  # 1.5 · 2²³: added to a small number and subtracted again, it rounds half to even


@triton.jit(do_not_specialize=["rows"])
def _kernel(
    weights,
    asked,
    scales,
    inverses,
    lows,
    feedback,
    levels,
    middles,
    codes,
    errors,
    rows,
    COLUMNS: tl.constexpr,
    PART: tl.constexpr,
    LEVELS: tl.constexpr,
    BOTTOM: tl.constexpr,
    WHOLE: tl.constexpr,
    ROWS: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    known = row < rows
    column = tl.arange(0, COLUMNS)
    place = column[None, :] * rows + row[:, None]
    aims = tl.load(weights + place, mask=known[:, None], other=0.0) + tl.load(asked + place, mask=known[:, None], other=0.0)
    for at in range(COLUMNS):
        aim = tl.sum(tl.where(column[None, :] == at, aims, 0.0), axis=1)
        here, part = at * rows + row, at // PART * rows + row
        scale = tl.load(scales + part, mask=known, other=0.0)
        inverse = tl.load(inverses + part, mask=known, other=0.0)
        low = tl.load(lows + part, mask=known, other=0.0)
        value = (aim - low) * inverse
        if WHOLE:
            nearest = tl.minimum(tl.maximum(value, BOTTOM), BOTTOM + LEVELS - 1)
            level = (nearest + _TO_WHOLE) - _TO_WHOLE
            code = (level - BOTTOM).to(tl.int32)
        else:
            code = tl.zeros([ROWS], tl.int32)
            for number in range(LEVELS - 1):
                code += (value > tl.load(middles + number)).to(tl.int32)
            level = tl.load(levels + code)
        error = tl.load(weights + here, mask=known, other=0.0) - (low + scale * level)
        tl.store(codes + here, code.to(tl.uint8), mask=known)
        tl.store(errors + here, error, mask=known)
        aims += error[:, None] * tl.load(feedback + at * COLUMNS + column)[None, :]


class KernelColumns:
    """`olpack.export.second_order.Columns` on a GPU."""

    def __init__(self, kind: GridType, device: torch.device):
        self._kind = kind
        self._levels = torch.tensor(kind.levels, dtype=torch.float32, device=device)
        self._middles = (self._levels[1:] + self._levels[:-1]) / 2

    def __call__(
        self, weights: torch.Tensor, asked: torch.Tensor, scales: torch.Tensor, lows: torch.Tensor, feedback: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As there. All are contiguous but `feedback`."""
        columns, rows = weights.shape
        errors, codes = torch.empty_like(weights), torch.empty(weights.shape, dtype=torch.uint8, device=weights.device)
        inverses = torch.where(scales == 0, 0, 1 / scales)
        _kernel[(triton.cdiv(rows, _ROWS),)](
            weights,
            asked,
            scales,
            inverses,
            lows,
            feedback.T.contiguous(),
            self._levels,
            self._middles,
            codes,
            errors,
            rows,
            COLUMNS=columns,
            PART=self._kind.part,
            LEVELS=len(self._kind.levels),
            BOTTOM=float(self._kind.levels[0]),
            WHOLE=self._kind.whole,
            ROWS=_ROWS,
            num_warps=4,
            enable_fp_fusion=False,
        )
        return codes, errors
