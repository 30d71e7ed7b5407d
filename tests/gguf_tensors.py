"""The tensors of a GGUF by name."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def tensors(file: Path) -> dict[str, torch.Tensor]:
    """Every tensor of an F32 GGUF as torch has it."""
    import gguf
    import torch

    return {one.name: torch.tensor(one.data).reshape(tuple(int(n) for n in reversed(one.shape))) for one in gguf.GGUFReader(str(file)).tensors}
