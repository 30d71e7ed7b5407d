"""The device that a model trains on, and the dtype that it computes in there."""

from __future__ import annotations

import torch


def pick_device() -> torch.device:
    """The first CUDA GPU, or the CPU."""
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def compute_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 on a GPU that has it, float16 on an older one, float32 on a CPU (few of them multiply bfloat16 any faster)."""
    if device.type == "cpu":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def working_dtype(device: torch.device) -> torch.dtype:
    """What a GGUF's model computes in where no loss is scaled: gradients are smaller than the smallest numbers of float16."""
    dtype = compute_dtype(device)
    return torch.float32 if dtype == torch.float16 else dtype
