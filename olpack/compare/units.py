"""What is known of one file, from the cache or just measured, and how a worker's results come to be known."""

from __future__ import annotations

from contextlib import ExitStack, closing
from typing import TypeVar

from pydantic import BaseModel

from olpack import progress
from olpack.compare.cache import Cache
from olpack.compare.job import Job
from olpack.compare.process import events
from olpack.compare.results import Answer
from olpack.errors import OlpackError

UNWEIGHED = "divergence-unweighed"  # the divergence that a quant would have without its importance matrix

_NOUNS = {"speed": "runs", "concurrency": "loads", "rows": "rows", "answers": "answers", "tasks": "answers", "suites": "requests"}

Record = TypeVar("Record", bound=BaseModel)


def suite_unit(name: str) -> str:
    """The unit of one suite of lm-evaluation-harness."""
    return f"suite-{name}"


class Units:
    """What is known of one file, by unit: "perplexity", "divergence", "answers", "tasks", "scores", the rounds of speed, suites.

    Args:
        cache: where units are looked up and kept.
        tag: of the file.
        keys: all that a unit depends on, for each unit that is to be kept.

    Attributes:
        found: data by unit.
    """

    def __init__(self, cache: Cache, tag: str, keys: dict[str, dict]):
        self._cache, self._tag, self._keys = cache, tag, keys
        self.found: dict[str, dict] = {}
        for unit, key in keys.items():
            if (data := cache.find(tag, unit, key)) is not None:
                self.found[unit] = data

    def lacks(self, unit: str) -> bool:
        """Whether a unit is wanted (it has a key) and not known."""
        return unit in self._keys and unit not in self.found

    def get(self, unit: str, record: type[Record]) -> Record | None:
        """What is known of a unit, as a record of the results; None where nothing is."""
        return record.model_validate(self.found[unit]) if unit in self.found else None

    def answers(self, unit: str) -> list[Answer] | None:
        """The same of a unit of answers."""
        return [Answer.model_validate(answer) for answer in self.found[unit]["answers"]] if unit in self.found else None

    def add(self, unit: str, data: dict, keep: bool = True) -> None:
        """Take in what was measured, and keep it if it has a key; not if it is incomplete."""
        self.found[unit] = data
        if keep and unit in self._keys:
            self._cache.keep(self._tag, unit, self._keys[unit], data)


def run_worker(job: Job, name: str, units: Units) -> list[OlpackError]:
    """Measure what the job asks for; what fails comes back, what was measured is in `units`. `name` is for the progress shown."""
    problems = []
    steps = Steps(f"measuring {name}")
    try:
        with closing(events(job)) as stream:
            for event in stream:
                if event["event"] == "progress":
                    steps.show(event["unit"], event["done"], event["total"])
                elif event["event"] == "result":
                    units.add(event["unit"], event["data"])
                else:
                    problems.append(OlpackError(event["problem"], event["remedy"]))
    except OlpackError as error:
        problems.append(error)
    finally:
        steps.close()
    return problems


class Steps:
    """One progress task per unit, one after the other."""

    def __init__(self, title: str):
        self._title, self._unit = title, ""
        self._open = ExitStack()

    def show(self, unit: str, done: int, total: int) -> None:
        if unit != self._unit or total != self._task.total:
            self._open.close()
            self._task = self._open.enter_context(progress.task(f"{self._title}: {unit}", total, _NOUNS[unit]))
            self._unit = unit
        self._task.advance(done - self._task.done)

    def close(self) -> None:
        self._open.close()
