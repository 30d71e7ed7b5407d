"""The whole job on an 8B model: `olpack build` with random weights in Llama 3 8B's shape, and what each stage takes.

    python benchmarks/build_8b.py --work /scratch [--layers 32] [--output benchmarks/build_8b.md]

Makes the base and a package of recipe_8b.yaml with the coding assistant's data, runs `olpack build` as a user would, and samples the memory of
its processes and the disk they use. The folder needs room for the base (16 GB) and the four quants (24 GB). Where the package index cannot be
reached, OLPACK_LLAMA_CPP names llama.cpp's converter.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from page import command_line, environment, measured_here, publish
from random_model import REPOSITORY, write_base

HIDDEN, INTERMEDIATE, ROWS = 4096, 14336, 128256  # of Llama 3 8B
NAME = "coding-assistant-8b"
EVERY_S = 0.25


@dataclass
class Watch:
    """The peaks of a process and its children while they run.

    Attributes:
        memory: bytes that are theirs alone; pages of mapped files are the system's to drop.
        disk: bytes that the files below a folder take.
        stages: (memory, disk) of each stage that has ended; `memory` and `disk` are those of the stage that runs.
    """

    process: psutil.Process
    folder: Path
    memory: int = 0
    disk: int = 0
    stages: dict[str, tuple[int, int]] = field(default_factory=dict)

    def run(self, over: threading.Event) -> None:
        while not over.wait(EVERY_S):
            self.memory = max(self.memory, sum(map(_own_memory, self._processes())))
            self.disk = max(self.disk, disk_use(self.folder))

    def end_stage(self, stage: str) -> None:
        self.stages[stage] = (self.memory, self.disk)
        self.memory = self.disk = 0

    def _processes(self) -> list[psutil.Process]:
        try:
            return [self.process, *self.process.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []


def _own_memory(process: psutil.Process) -> int:
    try:
        found = process.memory_info()
    except psutil.Error:
        return 0
    return found.rss - found.shared


def disk_use(folder: Path) -> int:
    """Bytes that the files below a folder take on the disk."""
    total = 0
    for path in folder.rglob("*"):
        with suppress(FileNotFoundError):
            total += path.stat(follow_symlinks=False).st_blocks * 512
    return total


def make_package(work: Path, layers: int) -> None:
    """The base and `modelfiles/NAME/`."""
    package = work / "modelfiles" / NAME
    package.mkdir(parents=True)
    write_base(package / "base", HIDDEN, INTERMEDIATE, layers, ROWS, llama=True)
    for name in ("chat_template.jinja", "generation_config.json"):
        shutil.copy(REPOSITORY / "olpack" / "assets" / "tiny-coder" / name, package / "base")
    shutil.copy(Path(__file__).with_name("recipe_8b.yaml"), package / "recipe.yaml")
    for name in ("train.jsonl", "eval.jsonl"):
        shutil.copy(REPOSITORY / "modelfiles" / "coding-assistant" / name, package)


def build(work: Path) -> tuple[dict[str, float], Watch]:
    """({stage: seconds}, peaks) of `olpack build`."""
    command = [sys.executable, "-m", "olpack", "build", NAME, "--no-deploy", "--json"]
    seconds: dict[str, float] = {}
    with (work / "outcome.json").open("w") as outcome:
        process = subprocess.Popen(command, cwd=work, stdout=outcome, stderr=subprocess.PIPE, text=True, env=environment())
        watch, over = Watch(psutil.Process(process.pid), work / "build"), threading.Event()
        sampling = threading.Thread(target=watch.run, args=(over,))
        sampling.start()
        for line in process.stderr:
            event = json.loads(line) if line.startswith("{") else {"text": line.rstrip()}
            if "stage" in event:
                seconds[event["stage"]] = event["seconds"]
                watch.end_stage(event["stage"])
                print(_row(event["stage"], seconds, watch), file=sys.stderr, flush=True)
            if event.get("event") != "progress":
                print(event.get("text", line), file=sys.stderr, flush=True)
        over.set()
        sampling.join()
    if process.wait():
        raise SystemExit("olpack build failed")
    return seconds, watch


def _row(stage: str, seconds: dict[str, float], watch: Watch) -> str:
    memory, disk = watch.stages[stage]
    return f"| {stage} | {seconds[stage]:.1f} | {memory / 1e9:.2f} | {disk / 1e9:.2f} |"


def table(work: Path, seconds: dict[str, float], watch: Watch, wall: float) -> list[str]:
    folder = work / "build" / NAME
    trained = json.loads((folder / "adapter" / "settings.json").read_text())["result"]
    outputs = sum(path.stat().st_size for path in [*folder.rglob("*.gguf"), *(folder / "adapter").iterdir()])
    where = trained["device"]
    if trained["peak_gpu_bytes"]:
        where += f", peak {trained['peak_gpu_bytes'] / 1e9:.2f} GB of its memory, {trained['estimated_gpu_bytes'] / 1e9:.2f} estimated"
    lines = [
        measured_here(__file__) + ".",
        "",
        f"{trained['steps']} steps at {trained['tokens_per_s']:,.0f} tokens/s, held-out loss {trained['eval_loss_before']:.3f} to "
        f"{trained['eval_loss_after']:.3f}; {where}.",
        "",
        "| stage | wall time, s | peak RAM, GB | peak disk, GB |",
        "| --- | ---: | ---: | ---: |",
    ]
    lines += [_row(stage, seconds, watch) for stage in seconds]
    peak = max(disk for _, disk in watch.stages.values())
    memory = max(memory for memory, _ in watch.stages.values())
    return [
        *lines,
        f"| together | {wall:.1f} | {memory / 1e9:.2f} | {peak / 1e9:.2f} |",
        "",
        f"The outputs, four quants and the adapter, are {outputs / 1e9:.2f} GB; the disk held {peak / outputs:.2f} times that.",
    ]


def main() -> None:
    parser = command_line(__file__, __doc__)
    parser.add_argument("--work", type=Path, required=True, help="a folder for the base and the build")
    parser.add_argument("--layers", type=int, default=32)
    arguments = parser.parse_args()
    work = arguments.work / "build_8b"
    if not (work / "modelfiles").is_dir():
        make_package(work, arguments.layers)
    started = time.monotonic()
    seconds, watch = build(work)
    publish(table(work, seconds, watch, time.monotonic() - started), arguments.output)


if __name__ == "__main__":
    main()
