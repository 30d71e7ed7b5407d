"""Builds of the package `oracle` that are killed at random moments and run again: what is left of each, and whether it ends as an unbroken one.

Each build is forked from a process that has imported all and done nothing, because importing torch takes longer than a stage of so small a model.
Its parent alone gets SIGKILL; its workers are on their own.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import multiprocessing.forkserver
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
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
from olpack.stages import order  # noqa: F401
from olpack.train import checkpoint, loop  # noqa: F401

STAGES = ("train", "export", "compare")  # a build begins where the stage before is done; the last one makes Modelfiles and deploys first
SETTINGS = ("--set", "train.quantization=none", "--set", "train.epochs=6")
ALIVE_AFTER_S = 1.0
_EVERY_S = 0.05
_WORK_S = {"train": 4.0, "export": 0.3, "compare": 8.0}  # seconds in which the work of a stage is over, nearly


@dataclass(frozen=True)
class Kill:
    """One SIGKILL of a build and its outcome.

    Attributes:
        stage: in which it came, "checks" before the work of any.
        after_s: processor time that the build and its workers had taken.
        workers: processes that the build had started and that ran at that moment.
        alive: those that still ran a second later.
        broken: files under their final names that are not as in the unbroken build.
        unfinished: files and folders with temporary names.
    """

    stage: str
    after_s: float
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
        same: whether its adapter, GGUFs and Modelfiles have the digests of the unbroken build.
        left: files with temporary names that the last run left, in the build folder or in TMPDIR.
    """

    kills: list[Kill]
    code: int
    same: bool
    left: list[str]


class Killer:
    """An unbroken build, stage by stage, and the builds that are killed.

    Args:
        root: an empty folder.
        base: a model folder.
    """

    def __init__(self, root: Path, base: Path):
        self.root, self.base = root, base
        self.durations: dict[str, float] = {}  # processor time in seconds
        folder = self._folder("unbroken")
        with OllamaDouble(root / "unbroken-server") as server:
            for stage in STAGES:
                shutil.copytree(folder, root / f"before-{stage}", ignore=shutil.ignore_patterns("log"))
                process = _start(folder, server.url, "build" if stage == STAGES[-1] else stage)
                self.durations[stage] = _wait(process, float("inf"))
                assert process.exitcode == 0, (folder / "log").read_text()
        self.digests = _digests(folder)

    def series(self, name: str, stage: str, kills: int, moments: random.Random) -> Series:
        """Kill a build `kills` times while it does the work of a stage, at random moments, every other of them after the checks
        before the work; then let it end."""
        folder = self._folder(name, stage)
        done: list[Kill] = []
        with OllamaDouble(self.root / f"{name}-server") as server:
            while len(done) < kills:
                process = _start(folder, server.url)
                if len(done) % 2:
                    spent = _wait(process, moments.uniform(0, self.durations[stage]))
                    process.join(moments.uniform(0, 2 * _EVERY_S))
                else:
                    spent = _wait(process, self.durations[stage], begins=partial(_works, folder, stage))
                    process.join(moments.triangular(0, _WORK_S[stage], 0))
                if process.exitcode is None:
                    done.append(self._kill(process, folder, spent))
                else:  # it was done before its moment came: another build is killed in its place
                    assert process.exitcode == 0, (folder / "log").read_text()
                    shutil.rmtree(folder)
                    folder = self._folder(name, stage)
            process = _start(folder, server.url)
            process.join()
        assert process.exitcode is not None
        same = _digests(folder) == self.digests
        return Series(done, process.exitcode, same, [str(path) for path in (*_unfinished(folder), *(folder / "tmp").iterdir())])

    def _folder(self, name: str, stage: str = "") -> Path:
        folder = self.root / name
        if stage:
            shutil.copytree(self.root / f"before-{stage}", folder)
        else:
            make_workspace(folder, self.base)
        (folder / "tmp").mkdir(exist_ok=True)
        return folder

    def _kill(self, process: BaseProcess, folder: Path, spent: float) -> Kill:
        assert process.pid is not None
        stage = _stage(folder)
        workers = psutil.Process(process.pid).children(recursive=True)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        time.sleep(ALIVE_AFTER_S)
        alive = [worker for worker in workers if _runs(worker)]
        for worker in alive:
            worker.kill()
        found = _digests(folder)
        broken = sum(digest != self.digests[name] for name, digest in found.items())
        return Kill(stage, spent, len(workers), len(alive), broken, len(list(_unfinished(folder))))


def _runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _wait(process: BaseProcess, seconds: float, begins: Callable[[], bool] = lambda: False) -> float:
    """Wait until a build and its workers have taken so much processor time, or something begins, or the build has ended; returns what they took."""
    assert process.pid is not None
    taken = 0.0
    with suppress(psutil.NoSuchProcess):
        build = psutil.Process(process.pid)
        while process.exitcode is None and taken < seconds and not begins():
            taken = max(taken, sum(build.cpu_times()[:4]))  # with the workers that have ended
            for worker in build.children(recursive=True):
                with suppress(psutil.NoSuchProcess):
                    taken = max(taken, sum(build.cpu_times()[:4]) + sum(worker.cpu_times()[:4]))
            process.join(_EVERY_S)
    return taken


def _works(folder: Path, stage: str) -> bool:
    """Whether the checks before the work of a stage are over."""
    if stage == "export":
        files = (folder / "build/oracle/gguf").glob(".*.partial")  # of a worker that runs, not of a killed one
        return any(psutil.pid_exists(int(path.suffixes[-2][1:])) for path in files)
    return (folder / "log").exists() and ("loading " if stage == "train" else "measuring ") in (folder / "log").read_text()


def _stage(folder: Path) -> str:
    """The stage of a build that was killed."""
    stages = folder / "build/oracle/stages"
    for stage in ("train", "export-Q8_0", "modelfiles", "deploy"):
        record = stages / f"{stage}.json"
        if not record.exists() or not json.loads(record.read_text())["inputs"]:
            stage = stage.partition("-")[0]
            return stage if stage not in STAGES or _works(folder, stage) else "checks"
    return "compare"


def _digests(folder: Path) -> dict[str, str]:
    """SHA-256 of what a build makes and what other runs must make alike, by path."""
    root = folder / "build/oracle"
    made = [*root.glob("adapter/adapter_model.safetensors"), *root.glob("gguf/*.gguf"), *root.glob("modelfiles/*.Modelfile")]
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(made)}


def _unfinished(folder: Path) -> Iterator[Path]:
    for path in (folder / "build").rglob("*"):
        if path.suffix in (".tmp", ".partial", ".old") or path.name == "temporary":
            yield path.relative_to(folder)


def _start(folder: Path, server: str, command: str = "build") -> BaseProcess:
    forks = multiprocessing.get_context("forkserver")
    forks.set_forkserver_preload(["killing"])
    here = Path(__file__).parent
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(map(str, (here.parent, here))))
        multiprocessing.forkserver.ensure_running()
    (folder / "log").unlink(missing_ok=True)
    process = forks.Process(target=_build, args=(folder, server, command))
    process.start()
    return process


def _build(folder: Path, server: str, command: str) -> None:
    os.chdir(folder)
    os.environ |= {"OLLAMA_HOST": server, "TMPDIR": str(folder / "tmp")}
    log = (folder / "log").open("w", buffering=1)
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    sys.stdout = sys.stderr = log
    torch.set_num_threads(1)
    checkpoint.EVERY_S, checkpoint._SHARE = 0.0, 1e9  # a checkpoint after every step
    sys.argv = ["olpack", command, "oracle", *SETTINGS]
    cli.main()
