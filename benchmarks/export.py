"""One pass against the usual way: merge with peft, convert to BF16, quantize four times. Same model, same machine, same run.

    python benchmarks/export.py                                          # 280M parameters, tiny-coder's vocabulary
    python benchmarks/export.py --hidden 4096 --intermediate 12288 --layers 36 --rows 151936 --work /scratch --deadline 500    # 8B

With --work the steps that are done are kept in that folder, so that the same command goes on where it was; --deadline stops it between
two steps. The disk holds the base, and beside it either one set of quants, or the merged checkpoint and one BF16 file: files are compared
by their SHA-256 and removed at once. Before each step, what it reads is dropped from the system's cache.

Prints a Markdown table and writes it to benchmarks/export.md. Needs olpack on PYTHONPATH or installed; where the package index cannot be
reached, OLPACK_LLAMA_CPP names llama.cpp's converter.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

from page import command_line, environment, publish  # noqa: E402 — beside this file
from random_model import write_adapter, write_base  # noqa: E402

from olpack.llamacpp.cores import usable_processors  # noqa: E402
from olpack.workspace import file_digest  # noqa: E402

QUANTS = ("Q4_0", "Q4_K_M", "Q5_K_M", "Q8_0")

MERGE = """
import sys, shutil, torch
from pathlib import Path
from peft import PeftModel
from transformers import AutoModelForCausalLM
base, adapter, out = map(Path, sys.argv[1:])
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(out)
for file in [*base.glob("tokenizer*"), *base.glob("chat_template*")]:
    shutil.copy(file, out)
"""
CONVERT = """
import sys
from pathlib import Path
from olpack.llamacpp.source import converter_source
sys.path[:0] = [str(converter_source()), str(converter_source() / "gguf-py"), "tests"]
from usual_way import convert
convert(Path(sys.argv[1]), Path(sys.argv[2]))
"""
QUANTIZE = """
import sys
from pathlib import Path
sys.path.insert(0, "tests")
from usual_way import quantize
quantize(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
"""
ONE_PASS = """
import sys
from pathlib import Path
from olpack.export import Target, export
base, adapter, out, rounded, *quants = sys.argv[1:]
targets = [Target(quant, Path(out, f"{quant}.gguf")) for quant in quants]
export(Path(base), targets, adapter=Path(adapter), round_to_bf16=rounded == "rounded")
"""


@dataclass
class Cost:
    """What one or more commands took.

    Attributes:
        wall, cpu: seconds; CPU time is user and system of the command and its children.
        memory: peak bytes of the largest process.
        read, written: bytes from and to the disk. What a later command finds in the system's cache is not read again.
        digests: SHA-256 of each quant that was made.
        weights: how many weights went to each tensor type of ggml, each type of a tensor counted once.
    """

    wall: float = 0.0
    cpu: float = 0.0
    memory: int = 0
    read: int = 0
    written: int = 0
    digests: dict[str, str] = field(default_factory=dict)
    weights: dict[str, int] = field(default_factory=dict)

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.wall + other.wall,
            self.cpu + other.cpu,
            max(self.memory, other.memory),
            self.read + other.read,
            self.written + other.written,
            self.digests | other.digests,
        )


def run(code: str, *arguments: object) -> Cost:
    """Run a piece of Python in a process of its own, from the repository, and say what it and its children took."""
    with tempfile.TemporaryFile("w+") as log:
        began = time.monotonic()
        child = subprocess.Popen(
            [sys.executable, "-c", code, *map(str, arguments)], cwd=REPOSITORY, stdout=subprocess.DEVNULL, stderr=log, env=environment()
        )
        _, status, used = os.wait4(child.pid, 0)
        wall = time.monotonic() - began
        child.returncode = os.waitstatus_to_exitcode(status)
        if child.returncode:
            log.seek(0)
            raise SystemExit(f"a step failed:\n{log.read()[-3000:]}")
    return Cost(wall, used.ru_utime + used.ru_stime, used.ru_maxrss * 1024, used.ru_inblock * 512, used.ru_oublock * 512)


def forget(*places: Path) -> None:
    """Have the system drop files from its cache, after they are on the disk."""
    for place in places:
        for path in sorted(place.rglob("*")) if place.is_dir() else [place]:
            if path.is_file():
                with path.open("rb") as file:
                    os.fsync(file.fileno())
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


class Steps:
    """The steps of a benchmark, each done once: its cost is written beside the files when it is done."""

    def __init__(self, work: Path, deadline: float | None):
        self.work = work
        self._records = work / "done"
        self._records.mkdir(parents=True, exist_ok=True)
        self._until = time.monotonic() + deadline if deadline else None

    def do(self, name: str, step: Callable[[], Cost]) -> Cost:
        """Do a step, or read what it took before."""
        record = self._records / f"{name}.json"
        if record.is_file():
            return Cost(**json.loads(record.read_text()))
        if self._until and time.monotonic() > self._until:
            raise SystemExit(f"The time is up before the step '{name}': run the same command again, it goes on there.")
        print(f"{name} …", file=sys.stderr, flush=True)
        cost = step()
        record.write_text(json.dumps(asdict(cost), indent=1))
        print(f"{name}: {cost.wall:.1f} s, CPU {cost.cpu:.1f} s", file=sys.stderr, flush=True)
        return cost


def one_pass(base: Path, adapter: Path, out: Path, rounding: str) -> Cost:
    """All quants by olpack, hashed and removed."""
    import gguf

    shutil.rmtree(out, ignore_errors=True)
    forget(base, adapter)
    cost = run(ONE_PASS, base, adapter, out, rounding, *QUANTS)
    counted: set[tuple[str, str]] = set()
    for quant in QUANTS:
        path = out / f"{quant}.gguf"
        for tensor in gguf.GGUFReader(path).tensors:
            kind = tensor.tensor_type.name
            if (tensor.name, kind) not in counted:
                counted.add((tensor.name, kind))
                cost.weights[kind] = cost.weights.get(kind, 0) + int(tensor.n_elements)
        cost.digests[quant] = file_digest(path)
        path.unlink()
    return cost


def merge(base: Path, adapter: Path, merged: Path) -> Cost:
    shutil.rmtree(merged, ignore_errors=True)
    forget(base, adapter)
    return run(MERGE, base, adapter, merged)


def convert(merged: Path, intermediate: Path) -> Cost:
    forget(merged)
    cost = run(CONVERT, merged, intermediate)
    shutil.rmtree(merged)
    return cost


def quantize(intermediate: Path, out: Path, quant: str) -> Cost:
    forget(intermediate)
    cost = run(QUANTIZE, intermediate, out, quant)
    cost.digests[quant] = file_digest(out)
    out.unlink()
    return cost


def measure_quantizer(weights: dict[str, int]) -> Cost:
    """What the quantizing alone of so many weights of each type takes on all cores at once, from 8M weights for each of them."""
    import numpy as np

    from olpack.llamacpp import library

    cores = usable_processors()
    values = np.random.default_rng(0).standard_normal((2048, 4096), np.float32) * 0.02
    seconds = 0.0
    with ThreadPoolExecutor(cores) as pool:
        for kind, count in weights.items():
            if kind == "F32":
                continue
            type_ = library.tensor_type(kind)
            outs = [np.zeros((len(values), library.row_size(type_, values.shape[1])), np.uint8) for _ in range(cores)]
            began = time.monotonic()
            list(pool.map(lambda out, type_=type_: library.quantize_rows(type_, values, out), outs))
            seconds += (time.monotonic() - began) / (cores * values.size) * count
    return Cost(wall=seconds)


def measure_writing(path: Path, nbytes: int = 2 << 30) -> Cost:
    """Writing a plain file of so many bytes, until it is on the disk."""
    block = os.urandom(64 << 20)
    began = time.monotonic()
    with path.open("wb", buffering=0) as file:
        for _ in range(nbytes // len(block)):
            file.write(block)
        os.fsync(file.fileno())
    return Cost(wall=time.monotonic() - began, written=nbytes)


def measure_reading(path: Path) -> Cost:
    """Reading that file from the disk. It is removed."""
    forget(path)
    began, count, block = time.monotonic(), 0, bytearray(64 << 20)
    with path.open("rb", buffering=0) as file:
        while read := file.readinto(block):
            count += read
    path.unlink()
    return Cost(wall=time.monotonic() - began, read=count)


def machine() -> str:
    """The processor, how many of its threads may be used, and the memory."""
    info = Path("/proc/cpuinfo").read_text()
    name = next((line.partition(":")[2].strip() for line in info.splitlines() if line.startswith("model name")), "unknown processor")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return f"{name}, {usable_processors()} cores, {memory / 1e9:.0f} GB of memory"


def table(shape: str, steps: dict[str, Cost], ours: Cost, rounded: Cost, quantizer: Cost, writes: Cost, reads: Cost) -> list[str]:
    """The figures as Markdown."""
    cores = usable_processors()
    total = sum(steps.values(), Cost())

    def line(name: str, cost: Cost) -> str:
        share = cost.cpu / cost.wall / cores
        return (
            f"| {name} | {cost.wall:.1f} s | {cost.cpu:.1f} s | {share:.0%} | {cost.memory / 1e9:.2f} GB | {cost.read / 1e9:.2f} GB | "
            f"{cost.written / 1e9:.2f} GB |"
        )

    quantizing, writing_rate, reading_rate = quantizer.wall, writes.written / writes.wall, reads.read / reads.wall
    writing, reading = ours.written / writing_rate, ours.read / reading_rate
    slowest = max(quantizing, writing + reading)
    pace = sum(ours.weights.values()) * 2 / max(quantizing * cores, 1e-9) / 1e6
    same = ", ".join(f"{quant} {'yes' if total.digests[quant] == rounded.digests[quant] else 'NO'}" for quant in QUANTS)
    return [
        f"{date.today()}: {shape}, {', '.join(QUANTS)}. {machine()}.",
        "",
        "| way | wall time | CPU time | CPU share | peak memory | read | written |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
        *(line(f"usual: {name}", cost) for name, cost in steps.items()),
        line("**usual, together**", total),
        line("**olpack, one pass**", ours),
        "",
        f"**{total.wall / ours.wall:.1f} × faster** ({total.cpu / ours.cpu:.1f} × less CPU time), "
        f"{total.written / max(ours.written, 1):.1f} × less written.",
        f"Rounded to bfloat16 as the usual way rounds, the files are identical: {same}.",
        "",
        f"The slowest part alone would take {slowest:.1f} s: quantizing {quantizing:.1f} s ({pace:.0f} MB/s of bfloat16 weights a core and "
        f"type, {cores} cores); the disk {writing + reading:.1f} s, {writing:.1f} s of writing (a plain file: {writing_rate / 1e6:.0f} MB/s) "
        f"and {reading:.1f} s of reading ({reading_rate / 1e6:.0f} MB/s). The whole pass takes {ours.wall / slowest:.1f} × that.",
    ]


def main() -> None:
    parser = command_line(__file__, __doc__)
    parser.add_argument("--hidden", type=int, default=1280)
    parser.add_argument("--intermediate", type=int, default=4096)
    parser.add_argument("--layers", type=int, default=13)
    parser.add_argument("--rows", type=int, help="of the embedding, if more than tiny-coder's vocabulary has tokens")
    parser.add_argument("--vocabulary", type=Path, help="a GGUF with a vocabulary, as llama.cpp's source holds some")
    parser.add_argument("--work", type=Path, help="a folder that keeps what is done, with room for three times the model")
    parser.add_argument("--deadline", type=float, metavar="SECONDS", help="begin no further step after this time")
    arguments = parser.parse_args()
    if arguments.work is None:
        with tempfile.TemporaryDirectory() as scratch:
            benchmark(Path(scratch), arguments)
    else:
        benchmark(arguments.work, arguments)


def benchmark(work: Path, arguments: argparse.Namespace) -> None:
    """All steps in `work`, then the table."""
    asked = {name: str(getattr(arguments, name)) for name in ("hidden", "intermediate", "layers", "rows", "vocabulary")}
    shape_file = work / "shape.json"
    if shape_file.is_file() and json.loads(shape_file.read_text()) != asked:
        raise SystemExit(f"{work} holds a benchmark of another shape: remove it, or name another folder.")
    steps = Steps(work, arguments.deadline)
    shape_file.write_text(json.dumps(asked))
    base, adapter, merged, intermediate = work / "base", work / "adapter", work / "merged" / "base", work / "bf16.gguf"

    def make_base() -> Cost:
        shutil.rmtree(base, ignore_errors=True)
        began = time.monotonic()
        parameters = write_base(base, arguments.hidden, arguments.intermediate, arguments.layers, arguments.rows, arguments.vocabulary)
        write_adapter(adapter, base)
        return Cost(wall=time.monotonic() - began, weights={"BF16": parameters})

    parameters = steps.do("base", make_base).weights["BF16"]
    ours = steps.do("one pass", lambda: one_pass(base, adapter, work / "ours", "exact"))
    rounded = steps.do("one pass, rounded", lambda: one_pass(base, adapter, work / "ours", "rounded"))
    # The merged folder has the base's name, because it becomes `general.name`.
    usual = {"merge": steps.do("merge", lambda: merge(base, adapter, merged))}
    usual["convert"] = steps.do("convert", lambda: convert(merged, intermediate))
    for quant in QUANTS:
        usual[quant] = steps.do(quant, lambda quant=quant: quantize(intermediate, work / f"{quant}.gguf", quant))
    intermediate.unlink(missing_ok=True)
    quantizer = steps.do("quantizer alone", lambda: measure_quantizer(ours.weights))
    writes = steps.do("writing alone", lambda: measure_writing(work / "plain"))
    reads = steps.do("reading alone", lambda: measure_reading(work / "plain"))
    shape = f"Qwen3 shape, {parameters / 1e6:.0f}M parameters, LoRA of rank 16 on all linear layers"
    publish(table(shape, usual, ours, rounded, quantizer, writes, reads), arguments.output)


if __name__ == "__main__":
    main()
