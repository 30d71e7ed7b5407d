"""NF4 and FP4 by their formula, in numpy and without bitsandbytes' code."""

from __future__ import annotations

import numpy as np
import torch

NF4 = [
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
]
FP4 = [sign * value / 12 for sign in (1, -1) for value in (0, 0.0625, 8, 12, 4, 6, 2, 3)]
LEVELS = {"nf4": np.array(NF4, np.float32), "fp4": np.array(FP4, np.float32)}


def dequantized(packed: torch.Tensor, state) -> torch.Tensor:
    """The dense matrix, [rows, columns], of what bitsandbytes packed; `state` is its `QuantState`."""
    codes = packed.detach().cpu().contiguous().view(torch.uint8).numpy().reshape(-1)
    numbers = int(np.prod(state.shape))
    levels = LEVELS[state.quant_type][np.stack((codes >> 4, codes & 15), axis=1).reshape(-1)[:numbers]]
    scales = state.absmax.cpu().numpy()
    if state.nested:
        outer = state.state2
        scales = outer.code.cpu().numpy()[scales] * outer.absmax.cpu().numpy().repeat(outer.blocksize)[: len(scales)] + np.float32(
            state.offset.item()
        )
    dense = levels * scales.astype(np.float32).repeat(state.blocksize)[:numbers]
    return torch.from_numpy(dense.astype(np.float32)).to(state.dtype).view(tuple(state.shape))
