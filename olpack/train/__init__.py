"""Training: from rows to a LoRA adapter in peft's format.

result = train(base, rows, eval_rows, settings, out=Path("adapter"), checkpoint=Path("checkpoint"), key="…")
"""

from __future__ import annotations

import gc
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from olpack.train.result import TrainResult

if TYPE_CHECKING:
    from olpack.data import TokenRow
    from olpack.model.base import Base
    from olpack.recipe import Train

__all__ = ["TrainResult", "train"]


def train(base: Base, rows: list[TokenRow], eval_rows: list[TokenRow], settings: Train, *, out: Path, checkpoint: Path, key: str) -> TrainResult:
    """Fine-tune the base with QLoRA and write the adapter.

    Args:
        base: the model.
        rows: training rows; only target tokens, those that `loss_mask` flags, enter the loss.
        eval_rows: held-out rows, scored before and after.
        settings: the recipe's `train` section.
        out: folder of the adapter, in peft's format, with `metrics.jsonl` and `settings.json`; replaced whole.
        checkpoint: folder that an interrupted run leaves, and from which the next run resumes; removed at the end.
        key: identity of everything that decides the result; a checkpoint with another key is not used.

    Raises:
        OlpackError: the base does not load, the loss is not finite, a single row does not fit into memory, the disk is full.
        KeyboardInterrupt: after the checkpoint has been written.
    """
    from olpack.train.launch import launcher, run_launched

    command = launcher(settings)
    if command is not None:
        job = {"base": base, "rows": rows, "eval_rows": eval_rows, "settings": settings, "out": out, "checkpoint": checkpoint, "key": key}
        return run_launched(command, job)
    from olpack.model.libraries import import_libraries
    from olpack.train.device import compute_dtype, pick_device
    from olpack.train.ops.pointwise import compile_kernels

    device = pick_device()
    compile_kernels(device, compute_dtype(device), base.config, settings.rank)
    import_libraries()
    from olpack.train.loop import run  # takes seconds, most of them for transformers and peft

    result = run(base, rows, eval_rows, settings, out=out, checkpoint=checkpoint, key=key)
    free_memory()
    return result


def free_memory() -> None:
    """Free the model's memory: the next stages, with llama.cpp or Ollama, need it on the same GPU."""
    import torch

    gc.collect()  # a model whose forward passes are replaced refers to itself
    if torch.cuda.is_initialized():
        with suppress(AttributeError):  # it has no public name
            torch._C._cuda_clearCublasWorkspaces()  # 64 MB in the midst of GBs, which could not be freed with them there
    torch.cuda.empty_cache()
