"""`metrics.jsonl`, always, and the trackers that a user asks for."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from olpack import progress
from olpack.errors import OlpackError, first_line
from olpack.workspace import write_atomically

if TYPE_CHECKING:
    from accelerate.tracking import TensorBoardTracker, WandBTracker

    from olpack.recipe import Train
    from olpack.train.checkpoint import State

PROJECT = "olpack"  # of Weights & Biases


def check_trackers(trackers: Sequence[str]) -> None:
    """Refuse now a tracker whose package is not there.

    Raises:
        OlpackError: with the command that installs it.
    """
    for name in trackers:
        if importlib.util.find_spec(name) is None:
            raise OlpackError(f"`train.trackers` asks for {name}, which is not installed.", f"Install it: pip install {name}")


class Metrics:
    """The records of a run: {"step": 1, "loss": 2.3, …} of each step, {"step": 0, "eval_loss": 2.5, "perplexity": 12.2} of each evaluation.

    The file starts with what the state holds: lines of steps after the checkpoint are gone with their steps.

    Args:
        folder: of the checkpoint; `metrics.jsonl` grows there line by line, and the adapter gets a copy at the end.
        settings: the recipe's `train` section, with `trackers`.
        state: of the run that begins or resumes.
        name: of the run in the trackers. TensorBoard's files are in `tensorboard/NAME` beside the checkpoint.
        writes: False in a process whose records another writes.

    Raises:
        OlpackError: a tracker does not start, or the file cannot be written.
    """

    def __init__(self, folder: Path, settings: Train, state: State, *, name: str, writes: bool = True):
        self.file, self.writes = folder / "metrics.jsonl", writes
        self._trackers: list[TensorBoardTracker | WandBTracker] = []
        self._warned = False
        if writes:
            write_atomically(self.file, "".join(json.dumps(record) + "\n" for record in state.metrics))
            self._trackers = _start(settings, folder.parent / "tensorboard", state, name)

    def log(self, state: State, **record: float) -> None:
        """Append one record to the state, to the file and to the trackers."""
        record = {"step": state.step, **record}
        state.metrics.append(record)
        if not self.writes:
            return
        try:
            with self.file.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as error:  # the record is in the state, and so in the next checkpoint and beside the adapter
            if not self._warned:
                progress.warn(f"{self.file} could not be written: {error.strerror}. Training goes on.")
            self._warned = True
        for tracker in self._trackers:
            tracker.log({name: value for name, value in record.items() if name != "step"}, step=state.step)

    def close(self) -> None:
        """Let the trackers send their last records."""
        for tracker in self._trackers:
            tracker.finish()


def _start(settings: Train, folder: Path, state: State, name: str) -> list[TensorBoardTracker | WandBTracker]:
    if not settings.trackers:
        return []
    from accelerate import PartialState
    from accelerate.tracking import TensorBoardTracker, WandBTracker

    PartialState()  # trackers ask it which process they are in
    started = []
    for asked in settings.trackers:
        if asked == "tensorboard":
            tracker = TensorBoardTracker(name, folder)
        else:
            tracker = WandBTracker(PROJECT, name=name, id=state.run, resume="allow")
        try:
            tracker.start()
            if not state.metrics:
                tracker.store_init_configuration(_flat(settings))
        except Exception as error:  # no login, no network: whatever a service's own client raises
            raise OlpackError(f"{asked} does not start: {first_line(error)}", "Fix that, or take it out of `train.trackers`.") from error
        started.append(tracker)
    return started


def _flat(settings: Train) -> dict[str, str | int | float | bool]:
    """Settings as trackers take them: numbers, texts and flags."""
    values = settings.model_dump().items()
    return {name: value if isinstance(value, bool | int | float | str) else json.dumps(value) for name, value in values}
