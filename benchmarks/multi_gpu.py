"""Training on several GPUs: tokens per second and scaling with a whole base in each, peak memory with a base spread over all (FSDP2).

    python benchmarks/multi_gpu.py                     # on 1, 2, 4, … GPUs, as many as there are
    python benchmarks/multi_gpu.py --gpus 1 2 --steps 12 --layers 8

The model is a Llama 3 8B in shape with random weights (16 GB in a temporary folder; --work says where). The rows of a step are the same for
each number of GPUs, and so is the loss. Prints a table and writes it to benchmarks/multi_gpu.md.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import sys
import tempfile
from datetime import date
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from random_model import write_base

from olpack import progress

HIDDEN, INTERMEDIATE, LAYERS, ROWS = 4096, 14336, 32, 128256  # of Llama 3 8B
_BATCH = 64  # rows of a step: about 30,000 tokens
_LONGEST = 2048
GIB = 1 << 30


def make_rows(count: int):
    """Rows of random tokens with log-normal lengths, median 365, half of each learned."""
    from olpack.data import TokenRow

    dice, rows = random.Random(0), []
    for index in range(count):
        length = min(_LONGEST, max(32, round(dice.lognormvariate(5.9, 0.8))))
        ids = [dice.randrange(1000) for _ in range(length)]
        rows.append(TokenRow(ids, [place >= length // 2 for place in range(length)], "", f"row:{index}"))
    return rows


def main() -> None:
    import torch

    count = torch.cuda.device_count()
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--gpus", type=int, nargs="+", default=[number for number in (1, 2, 4, 8) if number <= count])
    arguments.add_argument("--steps", type=int, default=16)
    arguments.add_argument("--layers", type=int, default=LAYERS)
    arguments.add_argument("--work", type=Path, help="folder for the model")
    arguments.add_argument("--base", type=Path, help="a model that is there already, instead of one made with --layers")
    arguments.add_argument("--no-file", action="store_true", help="print only")
    asked = arguments.parse_args()
    progress.use("lines")

    from olpack.model.base import Base
    from olpack.recipe import Train
    from olpack.train import train

    rows, found = make_rows(asked.steps * _BATCH), []
    with tempfile.TemporaryDirectory(dir=asked.work) as work:
        folder = Path(work)
        if asked.base is None:
            write_base(folder / "base", HIDDEN, INTERMEDIATE, asked.layers, ROWS, llama=True)
        base = Base("shape", asked.base or folder / "base")
        cases = [(gpus, "none") for gpus in asked.gpus] + [(gpus, "full") for gpus in asked.gpus if gpus > 1]
        for gpus, sharding in cases:
            # One process too is started by the launcher: it leaves no memory behind.
            launch = f"{sys.executable} -m torch.distributed.run --standalone --nproc-per-node {gpus}"
            settings = Train(launch=launch, sharding=sharding, epochs=1, batch_size=_BATCH, eval_every=10**6, learning_rate=1e-5)
            out = folder / f"{gpus}-{sharding}"
            result = train(base, rows, rows[:8], settings, out=out / "adapter", checkpoint=out / "checkpoint", key="benchmark")
            records = [json.loads(line) for line in (out / "adapter" / "metrics.jsonl").read_text().splitlines()]
            found.append((gpus, sharding, result, [record["loss"] for record in records if "loss" in record]))
    alone = next((result.tokens_per_s for gpus, _, result, _ in found if gpus == 1), None)
    first = found[0][3]
    lines = [
        f"Llama 3 8B's shape with {base.config['num_hidden_layers']} layers and random weights, NF4, rank 16 on all linear layers, "
        f"{_BATCH} rows a step, {asked.steps} steps, {sum(len(row.ids) for row in rows):,} tokens. {date.today()}, {torch.cuda.get_device_name()}, "
        f"torch {torch.__version__}, Python {platform.python_version()}.",
        "",
        "| GPUs | base | tokens/s | of one GPU's times as many | peak, GiB | estimated, GiB | last loss | difference of the first loss | of any |",
        "| ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for gpus, sharding, result, losses in found:
        share = f"{result.tokens_per_s / (gpus * alone):.1%}" if alone else "–"
        held = "spread" if sharding == "full" else "whole"
        apart = [abs(loss - other) for loss, other in zip(losses, first, strict=True)]
        sizes = " | ".join(f"{size / GIB:.2f}" for size in (result.peak_gpu_bytes, result.estimated_gpu_bytes))
        lines.append(f"| {gpus} | {held} | {result.tokens_per_s:,.0f} | {share} | {sizes} | {losses[-1]:.4f} | {apart[0]:.1e} | {max(apart):.1e} |")
    print("\n".join(lines))
    if not asked.no_file:
        Path(__file__).with_suffix(".md").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
