"""A training run in a process of its own, which may be killed at a chosen place.

It is forked from one that has imported all and done nothing: importing torch takes longer than a run on so small a model.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.forkserver
import os
import resource
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

import bitsandbytes  # noqa: F401 — these are here so that no child has to import them
import peft  # noqa: F401
import pytest
import torch
import transformers.models.qwen3.modeling_qwen3  # noqa: F401
from transformers import AutoModelForCausalLM, BitsAndBytesConfig  # noqa: F401

from olpack.data import TokenRow
from olpack.errors import OlpackError
from olpack.model.base import Base
from olpack.recipe import Train
from olpack.train import checkpoint, loop, metrics, train


def make_rows(count: int, seed: int = 0) -> list[TokenRow]:
    """Rows whose answer is always the same: soon learned, also for prompts never seen."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for index in range(count):
        length = 4 + int(torch.randint(0, 12, (), generator=generator))
        prompt = torch.randint(3, 500, (length,), generator=generator).tolist()
        rows.append(TokenRow(prompt + [7, 8, 9, 10, 0], [False] * length + [True] * 5, "", f"x:{index}"))
    return rows


PLACES = {
    "backward": (loop, "_backward"),  # in the middle of a step
    "logged": (metrics.Metrics, "log"),  # before a record is written
    "evaluate": (loop, "evaluate"),
    "replace": (os, "replace"),  # a checkpoint is written, and not yet in its place
    "written": (loop, "_write_adapter"),
}


def at_call(real, call: int, what):
    """A function that does something more when it is called for the so-many-th time. Its `calls` say how often it was called."""

    def counted(*arguments, **named):
        counted.calls += 1
        if counted.calls == call:
            what()
        return real(*arguments, **named)

    counted.calls = 0
    return counted


def happen_at(place: str, call: int, what) -> None:
    """Do something when the function of a place is called for the so-many-th time."""
    owner, name = PLACES[place]
    setattr(owner, name, at_call(getattr(owner, name), call, what))


def _start_forks():
    """The process that children are forked from. It finds modules by PYTHONPATH alone."""
    forks = multiprocessing.get_context("forkserver")
    forks.set_forkserver_preload(["train_child"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(map(str, (Path(__file__).parents[1], Path(__file__).parent))))
        multiprocessing.forkserver.ensure_running()
    return forks


@dataclass(frozen=True)
class Ended:
    """How a child ended: its exit code, or minus a signal's number, and what it said."""

    code: int
    said: str


def child(base: Path, out: Path, settings: Train, *, at: str = "", call: int = 0, limit: int | None = None) -> Ended:
    """Train on `base`, with a checkpoint after every step.

    Args:
        out: the build's folder.
        at, call: kill the process with SIGKILL when the function of this place is called for the so-many-th time;
        limit: instead, let it write no file of more bytes from then on.
    """
    out.mkdir(exist_ok=True)
    log = out / "said"
    process = _start_forks().Process(target=_run, args=(log, base, out, settings, at, call, limit))
    process.start()
    process.join()
    return Ended(process.exitcode, log.read_text())


def _run(log: Path, base: Path, out: Path, settings: Train, at: str, call: int, limit: int | None) -> None:
    sys.stderr = log.open("w", buffering=1)
    torch.set_num_threads(1)
    try:
        _train(base, out, settings, at, call, limit)
    except OlpackError as error:
        print(error, file=sys.stderr)
        os._exit(1)


def _train(base: Path, out: Path, settings: Train, at: str, call: int, limit: int | None) -> None:
    checkpoint.EVERY_S, checkpoint._SHARE = 0.0, 1e9
    if limit is not None:
        happen_at(at, call, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY)))
    elif at:
        happen_at(at, call, lambda: os.kill(os.getpid(), signal.SIGKILL))
    train(Base("tiny", base), make_rows(24), make_rows(8, seed=9), settings, out=out / "adapter", checkpoint=out / "checkpoint", key="k")
