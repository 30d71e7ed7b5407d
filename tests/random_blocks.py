"""Blocks of ggml's types with random codes and chosen scales."""

from __future__ import annotations

import torch

from olpack.model.gguf_blocks import BlockType

SCALES = {
    "Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q8_0": (0,), "Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2),
    "Q6_K": (208,), "IQ4_NL": (0,), "IQ4_XS": (0,),
}  # fmt: skip
"""Type to the bytes of a block where its float16 numbers begin: the scale, and what is added (Q4_1, Q5_1) or subtracted."""


def random_blocks(type_: BlockType, rows: int, columns: int, device: torch.device, scale: float, offset: float = 0.0) -> torch.Tensor:
    """uint8 [rows, bytes of a row] on a device.

    Args:
        scale, offset: the float16 numbers of each block; of MXFP4, the nearest power of two below the scale.
    """
    blocks = torch.randint(0, 256, (rows * columns // type_.weights, type_.bytes), dtype=torch.uint8, device=device)
    if type_.name == "MXFP4":
        blocks[:, 0] = 127 + int(torch.tensor(scale).log2().floor())
    for at, value in zip(SCALES.get(type_.name, ()), (scale, offset), strict=False):
        blocks[:, at : at + 2] = torch.tensor([value], dtype=torch.float16).view(torch.uint8).to(device)
    return blocks.view(rows, -1)
