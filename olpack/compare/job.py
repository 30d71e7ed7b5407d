"""One GGUF measured by a worker process: the job that the worker gets, its events as they come, and the error for each way in which it dies."""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from pydantic import BaseModel

from olpack import progress, workers
from olpack.compare.cache import ADAPTER_SPEED, Units
from olpack.compare.settings import LOGITS_BYTES
from olpack.errors import OlpackError
from olpack.llamacpp.cores import usable_processors
from olpack.llamacpp.library import INSTALL

if TYPE_CHECKING:
    from olpack.recipe.tasks import Task

READY = {"event": "ready"}  # the first event of a worker: it has imported what measuring needs
_NOUNS = {
    "speed": "runs",
    ADAPTER_SPEED: "turns",
    "concurrency": "loads",
    "rows": "rows",
    "other text": "texts",
    "answers": "answers",
    "tasks": "answers",
    "suites": "requests",
}


class SpeedJob(BaseModel):
    """One round of the speed that `MeasureSettings` describe."""

    round: int
    prompt_lengths: list[int]
    generated_tokens: int
    repeats: int


class AdapterJob(BaseModel):
    """Turns with the adapter and without it; with a merged file of the same fine-tune, turns of that file too."""

    prompt_tokens: int
    generated_tokens: int
    repeats: int
    merged: Path | None = None


class RowJob(BaseModel):
    """A TokenRow: token ids, which of them are targets, and the text that they encode."""

    ids: list[int]
    loss_mask: list[bool]
    text: str


class ReferenceLogits(BaseModel):
    """A reference's logits on the disk, as `divergence.LogitsWriter` writes them: of the first `rows` rows."""

    path: Path
    quant: str
    rows: int


class SuitesJob(BaseModel):
    """Suites of lm-evaluation-harness, as `MeasureSettings` name them."""

    names: list[str]
    folder: Path | None
    limit: int | None


class Asked(BaseModel):
    """A conversation that is to be answered, with the tools that the model may call."""

    messages: list[dict]
    tools: list[dict] | None = None


class Job(BaseModel):
    """What to measure of which file. A unit that is None or False is left out.

    `threads` are for what is timed, `untimed_threads` for all else. `write_logits` is the file into which the unquantized model's logits are
    written, of at most `logits_bytes`, `divergence` the logits that a quant is compared with; the same of `other_rows`, which are outside the
    user's domain. `template` writes prompts in place of the file's own chat template.
    """

    path: Path
    adapter: Path | None = None
    template: str | None = None
    engine: str
    context: int
    threads: int
    untimed_threads: int
    answer_tokens: int
    rows: list[RowJob] = []
    speed: SpeedJob | None = None
    adapter_speed: AdapterJob | None = None
    perplexity: bool = False
    write_logits: Path | None = None
    logits_bytes: int = LOGITS_BYTES
    divergence: ReferenceLogits | None = None
    other_rows: list[RowJob] = []
    write_other_logits: Path | None = None
    other_divergence: ReferenceLogits | None = None
    answers: list[Asked] | None = None
    tasks: list[Asked] | None = None
    suites: SuitesJob | None = None


def asked_of(tasks: Sequence[Task]) -> list[Asked]:
    """What tasks ask."""
    return [Asked(messages=task.messages, tools=task.tools) for task in tasks]


def run_worker(job: Job, name: str, units: Units) -> list[OlpackError]:
    """Measure what the job asks for, into `units`. `name` is for the progress shown.

    Returns:
        what went wrong.
    """
    problems = []
    shown = UnitProgress(f"measuring {name}")
    try:
        with closing(events(job)) as stream:
            for event in stream:
                if event["event"] == "progress":
                    shown.show(event["unit"], event["done"], event["total"])
                elif event["event"] == "result":
                    units.add(event["unit"], event["data"])
                else:
                    problems.append(OlpackError(event["problem"], event["remedy"]))
    except OlpackError as error:
        problems.append(error)
    finally:
        shown.close()
    return problems


class UnitProgress:
    """One progress task per unit, one after the other."""

    def __init__(self, title: str):
        self._title, self._unit = title, ""
        self._open = ExitStack()
        self._task: progress.ProgressTask | None = None

    def show(self, unit: str, done: int, total: int) -> None:
        """Show that `done` of `total` of a unit's runs, rows or answers are measured."""
        if self._task is None or unit != self._unit or total != self._task.total:
            self._open.close()
            self._task = self._open.enter_context(progress.task(f"{self._title}: {unit}", total, _NOUNS[unit]))
            self._unit = unit
        self._task.advance(done - self._task.done)

    def close(self) -> None:
        """End the task that is shown."""
        self._open.close()


@dataclass(frozen=True)
class _Worker:
    """A process for a job, and the file of what it prints to stderr."""

    process: subprocess.Popen[bytes]
    errors: IO[bytes]

    @classmethod
    def start(cls) -> _Worker:
        errors = tempfile.TemporaryFile()  # noqa: SIM115 — closed with the worker
        process = subprocess.Popen(
            workers.command("olpack.compare.worker"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            env=workers.environment(offline=False),  # suites take their data from the Hub
        )
        return cls(process, errors)

    @property
    def pipes(self) -> tuple[IO[bytes], IO[bytes]]:
        """(for the job, for the events)."""
        assert self.process.stdin and self.process.stdout  # both are pipes
        return self.process.stdin, self.process.stdout

    def end(self) -> None:
        """Kill the process, if it runs."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        for pipe in self.pipes:
            with suppress(BrokenPipeError):
                pipe.close()
        self.errors.close()


_idle: list[_Worker] = []  # that have no job yet


@contextmanager
def started(count: int) -> Iterator[None]:
    """Start the processes of the next `count` jobs at once, which takes a fraction of the time that their imports take one after the other, and go on
    once they have imported what measuring needs: within the block none of them starts beside what is timed.

    There are at most as many as processors, and fewer where the system gives no more. Further jobs start a process each.
    """
    try:
        with suppress(OSError):  # the jobs start theirs, and say what is wrong
            for _ in range(min(count, usable_processors())):
                _idle.append(_Worker.start())
        for worker in _idle:
            worker.pipes[1].readline()  # the event "ready", or nothing where it died
        yield
    finally:
        while _idle:
            _idle.pop().end()


def _next_worker() -> _Worker:
    """One that has no job yet, or a new one."""
    while _idle:
        worker = _idle.pop()
        if worker.process.poll() is None:
            return worker
        worker.end()  # something else killed it before it had a job
    return _Worker.start()


def events(job: Job) -> Generator[dict[str, Any], None, None]:
    """Run a worker and yield its events as they come. Leaving the loop early ends the worker.

    Raises:
        OlpackError: the worker died, by a signal or otherwise, after the events that were yielded.
    """
    worker = _next_worker()
    try:
        stdin, stdout = worker.pipes
        try:
            stdin.write(job.model_dump_json().encode())
            stdin.close()
        except BrokenPipeError:
            pass  # it died before reading; its exit status shows how
        for line in stdout:
            if (event := json.loads(line)) != READY:
                yield event
        if code := worker.process.wait():
            worker.errors.seek(0)
            raise workers.exit_error(
                f"The process that measured {job.path.name}",
                code,
                worker.errors.read().decode(errors="replace"),
                "Run `olpack doctor`.",
                crash_remedy=f"If every file crashes it, the build of llama.cpp does not suit this machine; this one runs everywhere: {INSTALL}",
                memory_remedy="Close other programs, or load with a shorter context (num_ctx).",
            )
    finally:
        worker.end()
