"""The GPU's encoder beside the CPU's: the same blocks, and how long each takes; then a whole export of an 8B to four quants.

    python benchmarks/gpu_encoder.py --work /scratch [--memory /dev/shm] [--layers 32] [--only-gpu] [--output benchmarks/gpu_encoder.md]

`--work` needs room for a base of random weights in Llama 3 8B's shape (16 GB) and its quants (24 GB); `--memory` names a folder in memory, for
an export that no disk slows down. Each part is printed when it is done. Where the package index cannot be reached, OLPACK_LLAMA_CPP names
llama.cpp's converter.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from build_8b import HIDDEN, INTERMEDIATE, ROWS
from export import QUANTS, measure_reading, measure_writing
from page import command_line, environment, measured_here, publish
from random_model import REPOSITORY, write_adapter, write_base

sys.path.insert(0, str(REPOSITORY))

from olpack.llamacpp import gpu_encoder, library
from olpack.llamacpp.cores import usable_processors

CPU_CHUNK = 1 << 19  # as olpack.export.write has it

# Exports as the worker does, and prints how long each part took: wall time of what happens once, and the sum over all threads of the rest. In a build
# the worker imports the converter while rows are read; `olpack export` has to wait for it, and the GPU starts meanwhile.
EXPORT = """
import json, os, resource, sys, threading, time
began = time.monotonic()
from pathlib import Path
from olpack.export import converter, run, write
from olpack.llamacpp import gpu_encoder
from olpack.llamacpp.source import converter_source
seconds, lock = {"imports of olpack": time.monotonic() - began}, threading.Lock()
def timed(owner, name, part):
    function = getattr(owner, name)
    def wrapped(*arguments, **options):
        began = time.monotonic()
        try:
            return function(*arguments, **options)
        finally:
            with lock:
                seconds[part] = seconds.get(part, 0) + time.monotonic() - began
    setattr(owner, name, wrapped)
timed(converter, "use_converter", "imports of the converter")
timed(run, "_prepare", "plan")
timed(gpu_encoder, "start", "torch and the start of the GPU, beside these")
timed(run, "write_files", "the pass")
timed(run, "verify_file", "verification")
timed(write._TensorJob, "load", "threads: read and merge")
timed(write._TensorJob, "_quantize", "threads: check and quantize")
timed(gpu_encoder._Lane, "upload", "of these: to pinned memory")
timed(gpu_encoder._Lane, "quantize", "of these: on the GPU and back")
timed(write._FileWriter, "_append", "threads: write and hash")
timed(os, "fsync", "threads: wait for the disk at the end")
in_build, base, adapter, out, *quants = sys.argv[1:]
targets = [(quant, str(Path(out, f"{quant}.gguf"))) for quant in quants]
gpu = None if in_build else run.begin_gpu_encoder(base, {})
converter.use_converter(converter_source())
asked = time.monotonic()
files = run.export(base, targets, {"adapter": adapter}, lambda count, total: None, gpu or run.begin_gpu_encoder(base, {}))
used = resource.getrusage(resource.RUSAGE_SELF)
print(json.dumps({
    "wall": time.monotonic() - asked if in_build else None, "seconds": seconds,
    "cpu": used.ru_utime + used.ru_stime, "memory": used.ru_maxrss * 1024, "encoder": files[0].encoder,
    "digests": [file.sha256 for file in files], "size": sum(file.size for file in files),
}))
"""


def best(work: Callable[[], object], times: int = 3) -> float:
    """Seconds of the fastest of some runs."""
    took = []
    for _ in range(times):
        began = time.monotonic()
        work()
        took.append(time.monotonic() - began)
    return min(took)


def compare_types(encoder: gpu_encoder.GpuEncoder) -> list[str]:
    """A matrix of Llama 3 8B in each type, by the GPU and by all cores of the CPU, without and with an importance matrix: a table."""
    random, threads = np.random.default_rng(0), usable_processors()
    values = random.standard_normal((INTERMEDIATE, HIDDEN), np.float32) * np.float32(0.02)
    importance = random.standard_normal(HIDDEN, np.float32) ** 2
    lines = [
        f"A matrix of {INTERMEDIATE} x {HIDDEN} random weights, copies to and from the GPU included; {threads} threads either way.",
        "",
        "| type | importance matrix | blocks compared | identical | CPU, s | GPU, s | times faster |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    with ThreadPoolExecutor(threads) as pool:
        for type_, recipe in gpu_encoder.RECIPES.items():
            for weights in (None, importance):
                made = np.zeros((2, len(values), library.row_size(type_, HIDDEN)), np.uint8)

                def run(chunk: int, one: Callable[[slice], object], pool: ThreadPoolExecutor = pool) -> Callable[[], object]:
                    step = chunk // HIDDEN
                    return lambda: list(pool.map(one, [slice(start, start + step) for start in range(0, INTERMEDIATE, step)]))

                def by_cpu(part: slice, type_: int = type_, weights=weights, out: np.ndarray = made[0]) -> None:
                    library.quantize_rows(type_, values[part], out[part], weights)

                def by_gpu(part: slice, type_: int = type_, weights=weights, out: np.ndarray = made[1]) -> None:
                    assert encoder.quantize_rows(values[part], {type_: out[part]}, weights)

                slow, fast = best(run(CPU_CHUNK, by_cpu), 2), best(run(gpu_encoder.CHUNK, by_gpu))
                blocks = values.size // recipe.block
                same = int((made[0] == made[1]).reshape(blocks, -1).all(1).sum())
                lines.append(
                    f"| {library.type_name(type_)} | {'no' if weights is None else 'yes'} | {blocks:,} | {same:,} | {slow:.3f} | {fast:.3f} | "
                    f"{slow / fast:.1f} |"
                )
                print(lines[-1], file=sys.stderr, flush=True)
    assert encoder.failure is None, encoder.failure
    return [*lines, ""]


def export(base: Path, adapter: Path, out: Path, *, on_gpu: bool, in_build: bool) -> dict:
    """All quants in a process of its own: what it prints, with the wall time as "wall": in a build from the export's begin on, else that of the
    process. The files are removed."""
    from olpack.export import client

    variables = {**client.environment(), **environment(), **({} if on_gpu else {"CUDA_VISIBLE_DEVICES": ""})}
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    began = time.monotonic()
    command = [sys.executable, "-c", EXPORT, "in a build" if in_build else "", *map(str, (base, adapter, out)), *QUANTS]
    found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=variables).stdout)
    found["wall"] = found["wall"] or time.monotonic() - began
    shutil.rmtree(out)
    return found


def warm_up(work: Path) -> None:
    """An export of a small model, after which all programs are in the system's cache, as after a training."""
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    write_base(work / "base", 512, 1024, 2, llama=True)
    write_adapter(work / "adapter", work / "base")
    describe("a small model", export(work / "base", work / "adapter", work / "quants", on_gpu=True, in_build=False))
    shutil.rmtree(work)


def describe(where: str, found: dict) -> list[str]:
    """The seconds of one export."""
    parts = "; ".join(f"{name} {seconds:.1f}" for name, seconds in found["seconds"].items())
    line = (
        f"- {where}, by {found['encoder']}: **{found['wall']:.1f} s**, CPU time {found['cpu']:.0f} s, {found['memory'] / 1e9:.1f} GB of RAM. {parts}."
    )
    print(line, file=sys.stderr, flush=True)
    return [line]


def main() -> None:
    parser = command_line(__file__, __doc__)
    parser.add_argument("--work", type=Path, required=True, help="a folder for the base and the quants")
    parser.add_argument("--memory", type=Path, help="a folder in memory, for a further export")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--only-gpu", action="store_true", help="export by the GPU; leave out the comparison of blocks, the CPU and the disk alone")
    arguments = parser.parse_args()
    began = time.monotonic()
    encoder = gpu_encoder.start()
    if encoder is None:
        raise SystemExit("No GPU here makes ggml's bits.")
    lines = [measured_here(__file__) + f", {encoder.name}.", ""]
    print(f"compiled and compared in {time.monotonic() - began:.1f} s", file=sys.stderr, flush=True)
    if not arguments.only_gpu:
        lines += compare_types(encoder)
    del encoder  # its memory is for the export
    warm_up(arguments.work / "small")
    base, adapter, began = arguments.work / "base", arguments.work / "adapter", time.monotonic()
    if not adapter.is_dir():
        write_base(base, HIDDEN, INTERMEDIATE, arguments.layers, ROWS, llama=True)
        write_adapter(adapter, base)
        os.sync()
    nbytes = sum(path.stat().st_size for path in base.glob("*.safetensors"))
    print(f"a base of {nbytes / 1e9:.1f} GB in {time.monotonic() - began:.1f} s", file=sys.stderr, flush=True)
    lines += [f"From an adapter on a base of {nbytes / 1e9:.1f} GB to {', '.join(QUANTS)}; the base is in the system's cache.", ""]
    disk = arguments.work / "quants"
    asked = [("in a build, to the disk", disk, True, True)]
    if arguments.memory:
        asked.append(("in a build, to memory", arguments.memory / "quants", True, True))
    if not arguments.only_gpu:
        asked += [("`olpack export`, to the disk", disk, True, False), ("in a build, to the disk", disk, False, True)]
    runs = []
    for where, out, on_gpu, in_build in asked:
        runs.append(export(base, adapter, out, on_gpu=on_gpu, in_build=in_build))
        lines += describe(where, runs[-1])
    first = runs[0]
    same = "identical" if all(one["digests"] == first["digests"] for one in runs) else "DIFFERENT"
    lines += ["", f"The files of all are {same} (SHA-256)."]
    if not arguments.only_gpu:
        written, read = measure_writing(arguments.work / "plain"), measure_reading(arguments.work / "plain")
        write_rate, read_rate = written.written / written.wall, read.read / read.wall
        lines.append(
            f"The disk alone: {first['size'] / 1e9:.1f} GB of quants are written in {first['size'] / write_rate:.1f} s "
            f"({write_rate / 1e9:.2f} GB/s, a plain file), and the base is read in {nbytes / read_rate:.1f} s ({read_rate / 1e9:.2f} GB/s) "
            "where the cache does not have it."
        )
    publish(lines, arguments.output)


if __name__ == "__main__":
    main()
