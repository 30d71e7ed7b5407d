"""How long OpenMP's threads spin before they sleep (GOMP_SPINCOUNT): small products in one process, and in several side by side.

    python benchmarks/openmp_waiting.py

The products are those of tiny-coder's layers on 64 tokens, which take a core some microseconds, so that threads wait for each other most of the
time. Each process uses all cores. Prints a Markdown table and writes it to benchmarks/openmp_waiting.md. Takes about a minute.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

from olpack.compare.hardware import describe_machine
from olpack.llamacpp.cores import usable_processors

SPINS = (300_000, 10_000, 1_000, 0)  # the first is GNU's default
SIDE_BY_SIDE = (1, 2, 4)
TOKENS, HIDDEN, LAYERS, WORDS = 64, 320, 20, 960


def count_passes(seconds: float) -> int:
    """Passes over the layers, from the line that comes on stdin on."""
    import torch
    import torch.nn.functional as F

    torch.manual_seed(0)
    x, head = torch.randn(TOKENS, HIDDEN), 0.05 * torch.randn(WORDS, HIDDEN)
    weights = [0.05 * torch.randn(HIDDEN, HIDDEN) for _ in range(LAYERS)]

    def compute() -> None:
        for weight in weights:
            y = x + F.silu(x @ weight.T)
            y = y / y.pow(2).mean(-1, keepdim=True).sqrt()
        (y @ head.T).softmax(-1)

    compute()
    print("ready", flush=True)
    sys.stdin.readline()
    passes, end = 0, time.monotonic() + seconds
    while time.monotonic() < end:
        compute()
        passes += 1
    return passes


def measure(spins: int, processes: int, seconds: float) -> float:
    """Passes a second of all processes together."""
    command = [sys.executable, __file__, "--seconds", str(seconds), "--worker"]
    environment = os.environ | {"GOMP_SPINCOUNT": str(spins)}
    workers = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment) for _ in range(processes)]
    for worker in workers:
        worker.stdout.readline()
    for worker in workers:
        worker.stdin.write("go\n")
        worker.stdin.flush()
    return sum(int(worker.communicate()[0]) for worker in workers) / seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=3.0, help="of each measurement")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".md"))
    arguments = parser.parse_args()
    if arguments.worker:
        print(count_passes(arguments.seconds))
        return
    load = os.getloadavg()[0]
    lines = [
        "# How long OpenMP's threads spin",
        "",
        f"Passes a second of all processes together; each uses all {usable_processors()} processors.",
        "",
        "| GOMP_SPINCOUNT | " + " | ".join("one process" if count == 1 else f"{count} side by side" for count in SIDE_BY_SIDE) + " |",
        "| ---: |" + " ---: |" * len(SIDE_BY_SIDE),
    ]
    print("\n".join(lines), flush=True)
    for spins in SPINS:
        row = f"| {spins:,} | " + " | ".join(f"{measure(spins, count, arguments.seconds):,.0f}" for count in SIDE_BY_SIDE) + " |"
        print(row, flush=True)
        lines.append(row)
    machine = describe_machine(None)
    place = f"{datetime.now(UTC):%Y-%m-%d}, {machine.cores} cores of {machine.cpu}, load average {load:.1f} before"
    lines += ["", f"{place}. `python benchmarks/openmp_waiting.py`"]
    arguments.output.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n" + lines[-1])


if __name__ == "__main__":
    main()
