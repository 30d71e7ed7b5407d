"""The longest row that a GPU of a size trains on, beside Unsloth's published table.

    python benchmarks/context.py [--seconds 150] [--rows 8B:8 8B:12 8B:16 8B:24 70B:48]

Shapes of Llama 3.1 8B and Llama 3.3 70B with random weights in NF4, made on the GPU; LoRA of rank 32 on all linear layers, as in that table.
For each size the planner gives the longest row that fits. It is trained on for one step (forward, backward, optimizer) while
`set_per_process_memory_fraction` enforces the size: GB of 10⁹ bytes, so that a GPU of as many GiB has 7 % more for the driver's context.
Attention takes time with the square of the length, so what would take longer than `--most` seconds is left out, with the estimate.
Prints each line as soon as it has it, and writes the table to benchmarks/context.md. Needs 40 GB of host memory for 100,000 tokens of an 8B.
"""

from __future__ import annotations

import gc
import sys
import time
from bisect import bisect_right
from datetime import date

import torch
from page import command_line
from streaming import SLACK, free
from train_8b import BEGUN, SHAPES, matmul_rate, random_model

RANK = 32
# Tokens that Unsloth publishes by (shape, GB): https://unsloth.ai/docs/basics/unsloth-benchmarks, read on 2026-11-29.
PUBLISHED = {
    ("8B", 8): 2_972,
    ("8B", 12): 21_848,
    ("8B", 16): 40_724,
    ("8B", 24): 78_475,
    ("8B", 48): 191_728,
    ("8B", 80): 342_733,
    ("70B", 48): 12_106,
    ("70B", 80): 89_389,
}
STEPS = 1_024  # tokens between two lengths that are looked at
ATTENTION = 0.45  # of the speed of a large product that flash attention reaches, forward and back together


def seconds_of(shape: str, tokens: int, rate: float) -> float:
    """Estimated time of a step over one row: forward, forward again and back. The backward pass of attention is as much work as 2.5 passes."""
    hidden, middle, layers, heads, key_heads, words = SHAPES[shape]
    weights = layers * (2 * hidden**2 * (1 + key_heads / heads) + 3 * hidden * middle) + words * hidden
    products = 6 * weights * tokens / (0.7 * rate)
    return products + layers * 4.5 * 2 * tokens**2 * hidden / (ATTENTION * rate)


class Bench:
    """A model on the GPU with activation offloading and the output layer offloaded."""

    def __init__(self, shape: str, device: torch.device):
        from olpack.model.shape import MetaModel
        from olpack.recipe import Train
        from olpack.train import planner

        self.shape, self.device, self.model = shape, device, random_model(shape, device, RANK)
        meta = MetaModel({"architectures": ["LlamaForCausalLM"], **self.model.config.to_dict()}, shape)
        self._estimate = planner._estimator(meta, Train(rank=RANK), None, 0, 1)

    def peak(self, tokens: int) -> int:
        """Estimated bytes of a step over one row of so many tokens."""
        return self._estimate(tokens, tokens).total(True, offload_head=True)

    def longest(self, limit: float) -> int:
        """Tokens of the longest row that the planner gives a GPU of so many bytes."""
        return STEPS * (bisect_right(range(STEPS, 2**20, STEPS), limit * (1 - SLACK), key=self.peak))

    def prepare(self, tokens: int) -> None:
        """Pinned memory for rows of so many tokens."""
        from olpack.recipe import Train
        from olpack.train import loop
        from olpack.train.forward import Forward
        from olpack.train.ops.flat_parameters import FlatParameters
        from olpack.train.ops.pinned_memory import PinnedMemory

        pinned = PinnedMemory(self._estimate(tokens, tokens).pinned(offload_head=True), self.device)
        self.forward = Forward(self.model, self.device, checkpointing=True, pinned=pinned, offload_head=True)
        self.trained = FlatParameters(self.model)
        self.optimizer = loop._optimizer(self.trained.parameters, Train(), self.device)

    def step(self, tokens: int) -> tuple[float, float]:
        """(loss, seconds) of a step over one row."""
        from olpack.data import TokenRow
        from olpack.train import loop
        from olpack.train.checkpoint import State

        row = TokenRow([index % 1000 for index in range(tokens)], [True] * tokens, "", "")
        torch.cuda.synchronize()
        started = time.time()
        loss = loop._backward(self.forward, self.trained, [row], State(budget=tokens))
        torch.nn.utils.clip_grad_norm_(self.trained.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        torch.cuda.synchronize()
        return loss, time.time() - started


def measure(bench: Bench, gigabytes: int, tokens: int) -> str:
    from olpack.errors import OlpackError

    torch.cuda.set_per_process_memory_fraction(gigabytes * 1e9 / torch.cuda.get_device_properties(bench.device).total_memory)
    while True:
        free()
        torch.cuda.reset_peak_memory_stats()
        try:
            loss, seconds = bench.step(tokens)
            break
        except (OlpackError, torch.OutOfMemoryError) as error:
            print(f"out of memory: {tokens:,} tokens in {gigabytes} GB, peak {torch.cuda.max_memory_allocated() / 1e9:.2f} GB: {error}", flush=True)
            tokens = tokens * 9 // 10
    torch.cuda.set_per_process_memory_fraction(1.0)
    peak, published = torch.cuda.max_memory_allocated() / 1e9, PUBLISHED[bench.shape, gigabytes]
    estimated = bench.peak(tokens) / 1e9
    return (
        f"| {bench.shape} | {gigabytes} | {published:,} | {tokens:,} | {tokens / published:.2f} × "
        f"| {estimated:.2f} | {peak:.2f} | {seconds:.1f} | {loss:.3f} |"
    )


def main() -> None:
    parser = command_line(__file__, __doc__)
    parser.add_argument("--seconds", type=float, default=150)
    parser.add_argument("--most", type=float, default=60, help="seconds of a step, by the estimate")
    parser.add_argument("--rows", nargs="+", default=["8B:8", "8B:12", "8B:16", "8B:24", "8B:48", "8B:80", "70B:48", "70B:80"])
    arguments = parser.parse_args()
    device = torch.device("cuda", 0)
    rate = matmul_rate()
    page = [
        f"{date.today()}, {torch.cuda.get_device_name()}, torch {torch.__version__}; NF4, rank {RANK} on all linear layers, one row a step, all its "
        "tokens targets. `python benchmarks/context.py`",
        "",
        "| model | GB | Unsloth, published | olpack, one row trained | | peak, estimated | peak, GB | seconds | loss |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    print("\n".join(page), flush=True)

    def show(text: str) -> None:
        page.append(text)
        print(text, f"   ({time.time() - BEGUN:.0f} s since the start)", flush=True)
        arguments.output.write_text("\n".join(page) + "\n", encoding="utf-8")

    asked = [(shape, int(size)) for shape, _, size in (row.partition(":") for row in arguments.rows)]
    for shape in dict.fromkeys(shape for shape, _ in asked):
        if time.time() - BEGUN > arguments.seconds:
            show(f"not begun: {shape}")
            continue
        torch.manual_seed(0)
        bench = Bench(shape, device)
        lengths = {size: bench.longest(size * 1e9) for other, size in asked if other == shape}
        chosen = {}
        for size, tokens in lengths.items():
            if (seconds := seconds_of(shape, tokens, rate)) <= arguments.most:
                chosen[size] = tokens
            elif (seconds := seconds_of(shape, least := round(PUBLISHED[shape, size] * 1.05), rate)) <= arguments.most and least <= tokens:
                chosen[size] = least
            else:
                left_out = f"{tokens:,} by the estimate; not run, {round(PUBLISHED[shape, size] * 1.05):,} would take about {seconds:.0f} s"
                show(f"| {shape} | {size} | {PUBLISHED[shape, size]:,} | {left_out} | | | | | |")
        try:
            bench.prepare(max(chosen.values()))
            for size, tokens in chosen.items():
                left = arguments.seconds - (time.time() - BEGUN)
                lengths = [tokens, min(tokens, round(PUBLISHED[shape, size] * 1.05))]
                if length := next((length for length in lengths if seconds_of(shape, length, rate) < left), None):
                    show(measure(bench, size, length))
                else:
                    show(f"not begun: {shape}, {size} GB")
        except Exception as error:  # the other shape's lines are worth having
            show(f"failed: {shape}: {error!r}")
        torch.cuda.set_per_process_memory_fraction(1.0)
        del bench
        gc.collect()
        free()


if __name__ == "__main__":
    sys.exit(main())
