"""How long OpenMP's threads spin before they sleep (GOMP_SPINCOUNT): small products in one process, and in several side by side.

    python benchmarks/openmp_waiting.py [--gguf FILE]

The products are those of tiny-coder's layers on 64 tokens, which take a core some microseconds, so that threads wait for each other most of the
time. With a file, also the tokens that the embedded llama.cpp generates. Each process uses all cores. Prints a Markdown table and writes it to
benchmarks/openmp_waiting.md. Takes about two minutes.
"""

from __future__ import annotations

import argparse
import itertools
import os
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

from olpack.compare.hardware import describe_machine
from olpack.llamacpp.cores import usable_processors

SPINS = (300_000, 10_000, 1_000, 0)  # the first is GNU's default
SIDE_BY_SIDE = (1, 2, 4)
TOKENS, HIDDEN, LAYERS, WORDS = 64, 320, 20, 960


Work = Callable[[], None]


def products() -> Work:
    """A pass over layers of tiny-coder's size."""
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

    return compute


def generation(file: Path) -> Work:
    """A token of llama.cpp, behind few others."""
    from olpack.llamacpp.engine import Engine

    engine, places = Engine(file, context=256), itertools.cycle(range(200))

    def compute() -> None:
        engine.extend(7) if next(places) else engine.process([1, 2, 3])

    return compute


def count(work: Work, seconds: float) -> int:
    """How often the work is done in so many seconds, from the line that comes on stdin on."""
    work()
    print("ready", flush=True)
    sys.stdin.readline()
    done, end = 0, time.monotonic() + seconds
    while time.monotonic() < end:
        work()
        done += 1
    return done


def measure(spins: int, processes: int, seconds: float, gguf: Path | None) -> float:
    """How often all processes together do their work in a second."""
    command = [sys.executable, __file__, "--seconds", str(seconds), "--worker", *(["--gguf", str(gguf)] if gguf else [])]
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
    parser.add_argument("--gguf", type=Path, help="a small model")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".md"))
    arguments = parser.parse_args()
    if arguments.worker:
        print(count(generation(arguments.gguf) if arguments.gguf else products(), arguments.seconds))
        return
    load, files = os.getloadavg()[0], [None, *([arguments.gguf] if arguments.gguf else [])]
    columns = [(number, file) for file in files for number in SIDE_BY_SIDE]
    titles = [f"{'tokens/s' if file else 'passes/s'}, {number} process{'' if number == 1 else 'es'}" for number, file in columns]
    lines = ["# How long OpenMP's threads spin", "", f"Of all processes together; each uses all {usable_processors()} processors.", ""]
    lines += [f"| GOMP_SPINCOUNT | {' | '.join(titles)} |", "| ---: |" + " ---: |" * len(columns)]
    print("\n".join(lines), flush=True)
    for spins in SPINS:
        row = f"| {spins:,} | " + " | ".join(f"{measure(spins, number, arguments.seconds, file):,.0f}" for number, file in columns) + " |"
        print(row, flush=True)
        lines.append(row)
    machine = describe_machine(None)
    place = f"{datetime.now(UTC):%Y-%m-%d}, {machine.cores} cores of {machine.cpu}, load average {load:.1f} before"
    lines += ["", f"{place}. `python benchmarks/openmp_waiting.py`"]
    arguments.output.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n" + lines[-1])


if __name__ == "__main__":
    main()
