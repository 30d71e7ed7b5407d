"""What each Triton kernel of olpack/train/ops/kernels.py gains: the plain functions, the same compiled by torch, and the kernel, in one run.

    python benchmarks/train_kernels.py [--tokens 16384]

Shapes are those of Llama 3 8B. "Of the copy" is the pace at which the bytes that must be read and written go by, as a share of what a large
copy reaches on the card. Needs a GPU; writes benchmarks/train_kernels.md.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import date

import torch
import torch.nn.functional as F
import triton
from page import command_line, publish

from olpack.train.ops import kernels, pointwise
from olpack.train.ops.low_rank import MlpLowRank

os.environ["TORCHDYNAMO_DISABLE"] = "0"  # which olpack sets: here torch's compiler is a peer
HIDDEN, MIDDLE, HEADS, WORDS, RANK = 4096, 14336, 32, 128256, 16


def milliseconds(run: Callable[[], object]) -> float:
    return triton.testing.do_bench(run, warmup=50, rep=150, return_mode="median")


def numbers(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(*shape, device="cuda", dtype=dtype)


def copy_pace() -> float:
    """Bytes per millisecond that a large copy reads and writes."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    return 2 * source.nbytes / milliseconds(source.clone)


def apart(found, wanted) -> float:
    """The largest relative difference of a result."""
    found, wanted = ([value] if isinstance(value, torch.Tensor) else [*value] for value in (found, wanted))
    return max(((one.float() - other.float()).norm() / other.float().norm()).item() for one, other in zip(found, wanted, strict=True))


def cases(tokens: int) -> dict[str, tuple[Callable, Callable, int]]:
    """Name to (plain, kernel, bytes that must be read and written)."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    x, dy, weight = numbers(tokens, HIDDEN), numbers(tokens, HIDDEN), numbers(HIDDEN)
    _, scale = pointwise.norm.plain(x, weight, 1e-6, 0.0)
    heads, cos, sin = numbers(tokens, HEADS, 128), numbers(tokens, 128), numbers(tokens, 128)
    logits, targets = numbers(512, WORDS), torch.randint(0, WORDS, (512,), device="cuda")
    gated, upped, dmiddle = (numbers(tokens, MIDDLE) for _ in range(3))
    adapters = MlpLowRank(numbers(tokens, 2 * RANK), *(0.1 * numbers(MIDDLE, RANK) for _ in range(2)), 0.01 * numbers(RANK, MIDDLE))
    dlow, gate = numbers(tokens, RANK), pointwise.gate_of(F.silu)
    packed, state = quantize_4bit(numbers(MIDDLE, HIDDEN), quant_type="nf4", compress_statistics=True)
    row, wide = 2 * tokens * HIDDEN, 2 * tokens * MIDDLE

    def products() -> tuple[torch.Tensor, ...]:
        """In passes of their own: the adapters' products added to the others in memory, then the gate."""
        of_gate, of_up = adapters.halves
        middle = F.silu(torch.addmm(gated, of_gate, adapters.gate_b.T)) * torch.addmm(upped, of_up, adapters.up_b.T)
        return middle, middle @ adapters.down_a.T

    @torch.compile
    def pieces(dmiddle, gate, up):
        wide, wide_up, raised = dmiddle.float(), up.float(), F.silu(gate.float())
        return (raised * wide_up).bfloat16(), (wide * wide_up * gate_slope(gate.float())).bfloat16(), (wide * raised).bfloat16()

    gate_slope = gate.slope

    def gradients() -> tuple[torch.Tensor, ...]:
        of_gate, of_up = adapters.halves
        summed = torch.addmm(gated, of_gate, adapters.gate_b.T), torch.addmm(upped, of_up, adapters.up_b.T)
        middle, dgate, dup = pieces(torch.addmm(dmiddle, dlow, adapters.down_a), *summed)
        return dgate.T @ of_gate, dup.T @ of_up, middle.T @ dlow

    def by_kernel() -> tuple[torch.Tensor, ...]:
        return (*kernels.gradients(dmiddle, gated, upped, adapters, dlow, "silu"),)

    return {
        "norm": (lambda: pointwise.norm.plain(x, weight, 1e-6, 0.0), lambda: kernels.norm(x, weight, 1e-6, 0.0), 2 * row),
        "norm, backward": (
            lambda: pointwise.norm_backward.plain(dy, x, scale, weight, 0.0),
            lambda: kernels.norm_backward(dy, x, scale, weight, 0.0),
            3 * row,
        ),
        "rotary embedding": (lambda: pointwise.rotate.plain(heads, cos, sin), lambda: kernels.rotate(heads, cos, sin), 2 * row),
        "loss of 512 tokens": (lambda: pointwise.loss.plain(logits, targets, 0.0), lambda: kernels.loss(logits, targets, 0.0), 2 * logits.nbytes),
        "gate with its adapters": (products, lambda: kernels.product(gated, upped, adapters, "silu"), 3 * wide),
        "gate, backward": (gradients, by_kernel, 5 * wide),
        "NF4 to 16 bits": (lambda: dequantize_4bit(packed, state), lambda: kernels.dequantize_4bit(packed, state), packed.nbytes * 5),
    }


def main() -> None:
    parser = command_line(__file__, __doc__)
    parser.add_argument("--tokens", type=int, default=16384)
    arguments = parser.parse_args()
    pace = copy_pace()
    versions = f"torch {torch.__version__}, Triton {triton.__version__}"
    lines = [
        f"{date.today()}, {torch.cuda.get_device_name()}, {versions}; {arguments.tokens:,} tokens of "
        f"Llama 3 8B's shape, rank {RANK}; a copy moves {pace / 1e9:.2f} TB/s.",
        "",
        "| | plain, ms | compiled by torch, ms | kernel, ms | of the copy | apart from plain |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, (plain, kernel, size) in cases(arguments.tokens).items():
        wanted = plain()
        taken = milliseconds(plain)
        if "NF4" in name:
            compiled = "–"
        elif "backward" in name and "gate" in name:  # its plain way is compiled already, where that helps
            taken, compiled = float("nan"), f"{taken:.3f}"
        else:
            compiled = f"{milliseconds(torch.compile(plain)):.3f}"
        distance = apart(kernel(), wanted)  # the first time: some take the place of their arguments
        by_kernel = milliseconds(kernel)
        lines.append(f"| {name} | {taken:.3f} | {compiled} | {by_kernel:.3f} | {size / by_kernel / pace:.0%} | {distance:.1e} |".replace("nan", "–"))
        print(lines[-1], flush=True)
    publish(lines, arguments.output)


if __name__ == "__main__":
    main()
