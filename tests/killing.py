"""Builds of the package `oracle` that are killed in a given stage and run again: what is left of each, and whether it ends as an unbroken one.

A kill is aimed: the build reports when a stage begins, and SIGKILL comes after a random share of the time that the stage takes in an unbroken
build, or where a random one of the files that the stage writes has just appeared, vanished or got its name.

Each build is forked from a process that has imported all and done nothing, because importing torch takes longer than a stage of so small a model.
Its parent alone gets SIGKILL; its workers are on their own.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import multiprocessing.forkserver
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

import bitsandbytes  # noqa: F401 — these are here so that no build has to import them
import peft  # noqa: F401
import psutil
import pytest
import torch
import transformers.models.qwen3.modeling_qwen3  # noqa: F401
from ollama_double import OllamaDouble
from oracle import make_workspace

from olpack import cli
from olpack.stages import run
from olpack.train import checkpoint, loop  # noqa: F401

CHECKS = "checks"  # all that a build does before the work of its first stage
BETWEEN = "between stages"
STAGES = ("train", "export", "modelfiles", "deploy", "compare")
SETTINGS = ("--set", "train.quantization=none", "--set", "train.epochs=6")
ALIVE_AFTER_S = 1.0
_EVERY_S = 0.002


@dataclass(frozen=True)
class Kill:
    """One SIGKILL of a build and its outcome.

    Attributes:
        stage: in which it came.
        at_a_file: whether a file of the stage had just appeared, vanished or got its name.
        workers: processes that the build had started and that ran at that moment.
        alive: those that still ran a second later.
        broken: files under their final names that are not as in the unbroken build.
        unfinished: files and folders with temporary names.
    """

    stage: str
    at_a_file: bool
    workers: int
    alive: int
    broken: int
    unfinished: int


@dataclass(frozen=True)
class Series:
    """A build that was killed several times and then ended.

    Attributes:
        kills: the kills, in order.
        code: the exit code of the last run.
        same: whether its adapter, GGUFs and Modelfiles have the digests of the unbroken build, and the server has the same models.
        left: files with temporary names that the last run left, in the build folder or in TMPDIR.
    """

    kills: list[Kill]
    code: int
    same: bool
    left: list[str]


class Run:
    """A build that runs. It waits at the beginning of each stage until it is let go on.

    Attributes:
        stage: that it is in; "" before it has begun.
    """

    def __init__(self, folder: Path, server: str):
        forks = multiprocessing.get_context("forkserver")
        forks.set_forkserver_preload(["killing"])
        here = Path(__file__).parent
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PYTHONPATH", os.pathsep.join(map(str, (here.parent, here))))
            multiprocessing.forkserver.ensure_running()
        (folder / "log").unlink(missing_ok=True)
        self.folder, self.stage = folder, ""
        self._events, theirs = forks.Pipe()
        self.process: BaseProcess = forks.Process(target=_build, args=(folder, server, theirs), daemon=True)
        self.process.start()
        theirs.close()

    def next_stage(self) -> bool:
        """Wait until a stage begins; False where the build has ended instead."""
        try:
            self.stage = self._events.recv()
        except EOFError:
            self.process.join()
            assert self.process.exitcode == 0, (self.folder / "log").read_text()
            return False
        return True

    def go_on(self) -> None:
        """Let a build work that waits at the beginning of a stage."""
        with suppress(BrokenPipeError):
            self._events.send(None)

    def until(self, stage: str) -> bool:
        """Have a build work up to the beginning of a stage, at which it waits; False where it ends before."""
        while self.next_stage():
            if self.stage == stage:
                return True
            self.go_on()
        return False

    def left_the_stage(self) -> bool:
        """Whether the stage is over: the next one waits, or the build has ended."""
        return self._events.poll(0)


class Killer:
    """An unbroken build, and the builds that are killed.

    Args:
        root: an empty folder.
        base: a model folder.

    Attributes:
        durations: of each stage in the unbroken build, in seconds.
        changes: how often the names in the build folder change during a stage.
    """

    def __init__(self, root: Path, base: Path):
        self.root, self.base = root, base
        self.durations: dict[str, float] = {}
        self.changes: dict[str, int] = {}
        folder = self._folder("unbroken")
        with OllamaDouble(root / "unbroken-server") as server:
            build = Run(folder, server.url)
            while build.next_stage():
                shutil.copytree(folder, root / f"before-{build.stage}", ignore=shutil.ignore_patterns("log"))
                shutil.copytree(root / "unbroken-server", root / f"server-before-{build.stage}")
                began, stage = time.monotonic(), build.stage
                build.go_on()
                self.changes[stage] = sum(1 for _ in _changes(build))
                self.durations[stage] = time.monotonic() - began
            self.served = _served(server)
        assert self.durations.keys() == {CHECKS, *STAGES}
        self.digests = _digests(folder)

    def series(self, name: str, aims: Sequence[str], moments: random.Random) -> Series:
        """Kill a build once in each of these stages, in turn, at random moments, about half of them at a change of a file; then let it end.

        It begins where all stages before the first one are done. A stage that is done already by its turn loses its record, and is so made again.
        No more kills follow where the build ends before its moment.
        """
        folder = self._folder(name, aims[0])
        done: list[Kill] = []
        shutil.copytree(self.root / f"server-before-{aims[0]}", self.root / f"{name}-server")
        with OllamaDouble(self.root / f"{name}-server") as server:
            for stage in aims:
                for record in (folder / "build/oracle/stages").glob(f"{stage}*.json"):
                    record.unlink()
                build = Run(folder, server.url)
                at_a_file = self.changes[stage] > 0 and moments.random() < 0.5
                if not build.until(stage) or not (kill := self._aimed(build, at_a_file, moments)):
                    build.process.join()
                    break
                done.append(kill)
            build = Run(folder, server.url)
            build.until("")
            same = _digests(folder) == self.digests and _served(server) == self.served
        assert build.process.exitcode is not None
        return Series(done, build.process.exitcode, same, [str(path) for path in (*_unfinished(folder), *(folder / "tmp").iterdir())])

    def _aimed(self, build: Run, at_a_file: bool, moments: random.Random) -> Kill | None:
        """Let a stage work until its moment has come, and kill the build; None where it has ended before."""
        stage = build.stage
        build.go_on()
        if at_a_file:
            count = moments.randrange(self.changes[stage])
            for number, _ in enumerate(_changes(build)):
                if number == count:
                    break
        else:
            time.sleep(moments.random() * self.durations[stage])
        with suppress(psutil.NoSuchProcess):
            return self._kill(build, at_a_file)
        return None

    def _folder(self, name: str, stage: str = "") -> Path:
        folder = self.root / name
        if stage:
            shutil.copytree(self.root / f"before-{stage}", folder)
        else:
            make_workspace(folder, self.base)
        (folder / "tmp").mkdir(exist_ok=True)
        return folder

    def _kill(self, build: Run, at_a_file: bool) -> Kill:
        assert build.process.pid is not None
        workers = psutil.Process(build.process.pid).children(recursive=True)
        os.kill(build.process.pid, signal.SIGKILL)
        build.process.join()
        time.sleep(ALIVE_AFTER_S)
        stage = build.stage
        with suppress(EOFError, AssertionError):
            if build.left_the_stage() and build.next_stage():  # the next one waited at its beginning
                stage, at_a_file = BETWEEN, False
        alive = [worker for worker in workers if _runs(worker)]
        for worker in alive:
            worker.kill()
        found = _digests(build.folder)
        broken = sum(digest != self.digests[name] for name, digest in found.items())
        return Kill(stage, at_a_file, len(workers), len(alive), broken, len(list(_unfinished(build.folder))))


def _changes(build: Run) -> Iterator[None]:
    """Yield at each change of the names in a build folder, until the stage is over."""
    root, before = build.folder / "build", None
    while not build.left_the_stage():
        names = {Path(folder, name) for folder, below, files in os.walk(root) for name in (*below, *files)}
        if before is not None and names != before:
            yield
        before = names
        time.sleep(_EVERY_S)


def _runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _served(server: OllamaDouble) -> dict[str, str]:
    """The digest of each model of a server, by its name."""
    return {model["name"]: model["digest"] for model in server.store.listed()}


def _digests(folder: Path) -> dict[str, str]:
    """SHA-256 of what a build makes and what other runs must make alike, by path."""
    root = folder / "build/oracle"
    made = [*root.glob("adapter/adapter_model.safetensors"), *root.glob("gguf/*.gguf"), *root.glob("modelfiles/*.Modelfile")]
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(made)}


def _unfinished(folder: Path) -> Iterator[Path]:
    for path in (folder / "build").rglob("*"):
        if path.suffix in (".tmp", ".partial", ".old") or path.name == "temporary":
            yield path.relative_to(folder)


def _build(folder: Path, server: str, events: Connection) -> None:
    """The process of a build, which reports its stages."""
    os.chdir(folder)
    os.environ |= {"OLLAMA_HOST": server, "TMPDIR": str(folder / "tmp")}
    log = (folder / "log").open("w", buffering=1)
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    sys.stdout = sys.stderr = log
    torch.set_num_threads(1)
    checkpoint.EVERY_S, checkpoint._SHARE = 0.0, 1e9  # a checkpoint after every step
    timed = run._timed

    def begins(stage: str) -> None:
        events.send(stage)
        events.recv()

    @contextmanager
    def reported(stage: str) -> Iterator[None]:
        begins(stage)
        with timed(stage):
            yield

    run._timed = reported
    begins(CHECKS)
    sys.argv = ["olpack", "build", "oracle", *SETTINGS]
    cli.main()
