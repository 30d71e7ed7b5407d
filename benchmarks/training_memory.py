"""GPU memory of a training step: what `olpack plan` estimates beside what torch measures, on a model of 8B parameters in NF4.

    python benchmarks/training_memory.py                          # 2,048 and 8,192 tokens at once, with and without checkpointing
    python benchmarks/training_memory.py --tokens 1024 4096 --layers 16

The model is a Llama 3 8B in shape; its files are holes, which read as zeros, because memory does not depend on the weights. Every token is
learned, so that the logits are as large as they get. Prints a table and writes it to benchmarks/training_memory.md.
"""

from __future__ import annotations

import argparse
import gc
import platform
import sys
import tempfile
from datetime import date
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from random_model import write_base

from olpack import progress

HIDDEN, INTERMEDIATE, LAYERS, ROWS = 4096, 14336, 32, 128256  # of Llama 3 8B
_STEPS = 3  # the optimizer's state is there after the first
GIB = 1 << 30


def measure(base, checkpointing: bool, lengths: list[int], rank: int) -> list[dict]:
    """Estimated and measured bytes for each length, in the order of the lengths."""
    import torch

    from olpack.data import TokenRow
    from olpack.model.shape import MetaModel
    from olpack.recipe import Train
    from olpack.train import loop, planner
    from olpack.train.checkpoint import State
    from olpack.train.forward import Forward
    from olpack.train.model import load_with_adapter
    from olpack.train.ops.flat_parameters import FlatParameters
    from olpack.train.ops.pinned_memory import PinnedMemory

    device, found = torch.device("cuda", 0), []
    settings = Train(rank=rank, batch_size=1, epochs=1, gradient_checkpointing=checkpointing)
    shape = MetaModel(base.config, base.label)
    room = planner.free_gpu_memory(device)
    model = load_with_adapter(base, settings, device).model
    forward = Forward(model, device, checkpointing=checkpointing, pinned=PinnedMemory(0, device) if checkpointing else None)
    trained = FlatParameters(model)
    optimizer = loop._optimizer(trained.parameters, settings, device)
    torch.cuda.synchronize()
    resting = torch.cuda.memory_allocated(device)
    for tokens in lengths:
        row = TokenRow([index % 1000 for index in range(tokens)], [True] * tokens, "", "")
        asked = settings.model_copy(update={"micro_batch_tokens": tokens})
        planned = planner.on_gpu(shape, [row], asked, room)
        torch.cuda.reset_peak_memory_stats(device)
        for _ in range(_STEPS):
            loop._backward(forward, trained, [row], State(budget=tokens))
            torch.nn.utils.clip_grad_norm_(trained.parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        measured = torch.cuda.max_memory_allocated(device)
        found.append({"tokens": tokens, "checkpointing": checkpointing, "planned": planned, "measured": measured, "resting": resting})
    return found


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--tokens", type=int, nargs="+", default=[2048, 8192])
    arguments.add_argument("--layers", type=int, default=LAYERS)
    arguments.add_argument("--rank", type=int, default=16)
    arguments.add_argument("--no-file", action="store_true", help="print only")
    asked = arguments.parse_args()
    progress.use("lines")

    import torch

    from olpack.model.base import Base

    with tempfile.TemporaryDirectory() as work:
        folder = Path(work) / "base"
        write_base(folder, HIDDEN, INTERMEDIATE, asked.layers, ROWS, llama=True, sparse=True)
        found = []
        for checkpointing in (True, False):
            found += measure(Base("shape", folder), checkpointing, asked.tokens, asked.rank)
            gc.collect()
            torch.cuda.empty_cache()
    lines = [
        f"Llama 3 8B's shape with {asked.layers} layers, NF4, rank {asked.rank} on all linear layers, every token learned. GiB. "
        f"{date.today()}, {torch.cuda.get_device_name()}, torch {torch.__version__}, Python {platform.python_version()}.",
        "",
        "| tokens at once | checkpointing | base | adapter, optimizer | activations | one layer | logits | estimated peak | measured peak | off |",
        "| ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in found:
        taken, planned = row["planned"].training, row["planned"]
        _, fixed, kept, _ = planned.parts.values()
        parts = (taken.weights, fixed, kept, sum(taken.layer.values()), taken.logits, planned.bytes, row["measured"])
        cells = " | ".join(f"{size / GIB:.2f}" for size in parts)
        lines.append(f"| {row['tokens']:,} | {'yes' if row['checkpointing'] else 'no'} | {cells} | {planned.bytes / row['measured'] - 1:+.1%} |")
    terms = ", ".join(f"{name} {size / GIB:.3f}" for name, size in found[-1]["planned"].training.layer.items())
    resting = ", ".join(sorted({f"{row['resting'] / GIB:.2f}" for row in found}))
    lines += ["", f"One layer at {found[-1]['tokens']:,} tokens: {terms}.", f"Allocated before the first step: {resting}."]
    print("\n".join(lines))
    if not asked.no_file:
        Path(__file__).with_suffix(".md").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
