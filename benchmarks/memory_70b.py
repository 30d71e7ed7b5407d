"""Peak memory of the pass over a model of 70B parameters, without 140 GB of weights: a Llama shape whose files are holes.

    python benchmarks/memory_70b.py                  # all 80 layers
    python benchmarks/memory_70b.py --layers 8       # the peak does not depend on their number

The real pass runs: it maps and reads every tensor (zeros), merges an adapter into it, quantizes it to four types and writes four files.
What is written is punched out of the files again as they grow, so that some GB of disk are enough. Zeros are quantized faster than
weights, so the time is that of reading, merging, writing and hashing. Prints a table and writes it to benchmarks/memory_70b.md.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import resource
import subprocess
import sys
import tempfile
import threading
import time
from datetime import date
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from export import QUANTS, machine
from page import command_line, publish
from random_model import write_adapter, write_base

HIDDEN, INTERMEDIATE, LAYERS, ROWS = 8192, 28672, 80, 128256  # of Llama 3 70B
_PUNCH = 0x01 | 0x02  # FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE


class Puncher(threading.Thread):
    """Gives the disk back what is written to some files, as they grow."""

    def __init__(self, paths: list[Path]):
        super().__init__(daemon=True)
        self._paths, self._done = paths, {path: 0 for path in paths}
        self._stopped = threading.Event()
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]

    def run(self) -> None:
        while not self._stopped.wait(0.2):
            for path in self._paths:
                size = path.stat().st_size if path.exists() else 0
                if size > self._done[path]:
                    with path.open("r+b") as file:
                        if self._libc.fallocate(file.fileno(), _PUNCH, self._done[path], size - self._done[path]):
                            raise OSError(ctypes.get_errno(), "this file system cannot punch holes")
                    self._done[path] = size

    def stop(self) -> None:
        self._stopped.set()
        self.join()


def export_hollow(work: Path) -> None:
    """The pass as the worker does it, in this process; prints its figures as JSON."""
    from olpack.export.converter import use_converter
    from olpack.llamacpp.cores import usable_processors
    from olpack.llamacpp.source import converter_source

    use_converter(converter_source())
    from olpack.export.run import _prepare
    from olpack.export.write import write_files

    began = time.monotonic()
    model, plans, *_ = _prepare(work / "base", list(QUANTS), str(work / "adapter"), None, {})
    figures = {
        "parameters": model.parameters,
        "largest": 4 * max(tensor.elements for tensor in model.tensors.values()),
        "before": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }
    paths = [work / f"{quant}.gguf" for quant in QUANTS]
    puncher = Puncher(paths)
    puncher.start()
    write_files(model, [[file] for file in zip(plans, paths, strict=True)], threads=usable_processors())
    puncher.stop()
    used = resource.getrusage(resource.RUSAGE_SELF)
    sizes = {quant: path.stat().st_size for quant, path in zip(QUANTS, paths, strict=True)}
    assert sizes == {plan.quant.name: plan.size for plan in plans}
    print(
        json.dumps({**figures, "peak": used.ru_maxrss * 1024, "wall": time.monotonic() - began, "cpu": used.ru_utime + used.ru_stime, "sizes": sizes})
    )


def table(layers: int, figures: dict) -> list[str]:
    limit = (2 << 30) + 3 * figures["largest"]
    rows = [
        ("parameters", f"{figures['parameters'] / 1e9:.2f}B, {layers} of {LAYERS} layers"),
        ("files written", ", ".join(f"{quant} {size / 1e9:.1f} GB" for quant, size in figures["sizes"].items())),
        ("largest tensor in float32", f"{figures['largest'] / 1e9:.2f} GB"),
        ("memory before the first tensor", f"{figures['before'] / 1e9:.2f} GB"),
        ("**peak memory**", f"**{figures['peak'] / 1e9:.2f} GB**"),
        ("limit: 2 GiB + 3 × the largest tensor", f"{limit / 1e9:.2f} GB ({'kept' if figures['peak'] < limit else 'EXCEEDED'})"),
        ("wall time, of zeros", f"{figures['wall']:.0f} s, {figures['wall'] / layers:.1f} s a layer (CPU time {figures['cpu']:.0f} s)"),
    ]
    lines = [
        f"{date.today()}: Llama 3 70B's shape with zeros for weights, LoRA of rank 16 on all linear layers. {machine()}.",
        "",
        "| | |",
        "| --- | --- |",
        *(f"| {name} | {value} |" for name, value in rows),
    ]
    if layers < LAYERS:
        lines += ["", "The peak does not depend on the number of layers: what is in flight is bounded, and the largest tensors are the embedding's."]
    return lines


def main() -> None:
    parser = command_line(__file__, __doc__)
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument("--work", type=Path, help="a folder on a file system that can punch holes")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker is not None:
        export_hollow(arguments.worker)
        return
    from olpack.export.client import environment

    with tempfile.TemporaryDirectory(dir=arguments.work) as scratch:
        work = Path(scratch)
        write_base(work / "base", HIDDEN, INTERMEDIATE, arguments.layers, ROWS, llama=True, sparse=True)
        write_adapter(work / "adapter", work / "base", zero=True)
        command = [sys.executable, __file__, "--worker", str(work)]
        child = subprocess.run(command, env=environment(), stdout=subprocess.PIPE, text=True, check=True)
    publish(table(arguments.layers, json.loads(child.stdout.splitlines()[-1])), arguments.output)


if __name__ == "__main__":
    main()
