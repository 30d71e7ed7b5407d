"""What was measured before, stored in files: the units of a model, the key of each, and the folder that stores them.

A unit is one kind of figure of one model: "perplexity", "divergence", "answers", "tasks", "scores", a round of speed, a suite. Its key is all
that it depends on; whoever measures a model adds the identity of its weights.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import BaseModel

from olpack import progress
from olpack.compare.results import SCHEMA_VERSION, Answer, Rows
from olpack.compare.settings import LOGITS_BYTES, OTHER_LOGITS_BYTES, MeasureSettings
from olpack.workspace import file_digest, value_digest, write_atomically

if TYPE_CHECKING:
    from olpack.recipe.tasks import Task

SPEED_UNITS = ("speed-0", "speed-1")  # one for each round
CONCURRENCY = "concurrency"
OTHER_DIVERGENCE = "other_divergence"  # on text outside the user's domain
ADAPTER_SPEED = "adapter-speed"  # speeds with an adapter and without it, in turns on the embedded engine
DIVERGENCE_WITHOUT_IMPORTANCE = "divergence-unweighed"  # the divergence that a quant would have without its importance matrix

Key = dict[str, Any]  # a JSON object
Keys = dict[str, Key]  # by unit

_SCHEMA: Key = {"schema": SCHEMA_VERSION}

Record = TypeVar("Record", bound=BaseModel)


def suite_unit(name: str) -> str:
    """The unit of one suite of lm-evaluation-harness."""
    return f"suite-{name}"


class Cache:
    """A folder with one JSON file per model and unit. A figure of an older key is replaced by that of the new one.

    Args:
        folder: it is made when the first figure is stored; None: nothing is stored, and nothing is known.
    """

    def __init__(self, folder: Path | None):
        self._folder = folder

    def load(self, tag: str, unit: str, key: Key) -> dict[str, Any] | None:
        """The figure that was stored under exactly this key; None where there is none."""
        if self._folder is None:
            return None
        try:
            stored = json.loads(self._path(self._folder, tag, unit).read_bytes())
        except (OSError, ValueError):
            return None
        if not isinstance(stored, dict) or stored.get("key") != value_digest(key):
            return None
        data = stored.get("data")
        if stored.keys() - {"key", "digest", "data"} or ("digest" in stored and stored["digest"] != value_digest(data)):
            progress.warn(f"{self._path(self._folder, tag, unit)} is damaged: {unit} is measured again")
            return None
        return data

    def store(self, tag: str, unit: str, key: Key, data: dict[str, Any]) -> None:
        """Write a figure at once."""
        if self._folder is not None:
            text = json.dumps(data, ensure_ascii=False)
            digest = value_digest(json.loads(text))  # of what will be read: tuples are lists then
            write_atomically(self._path(self._folder, tag, unit), f'{{"key": "{value_digest(key)}", "digest": "{digest}", "data": {text}}}')

    @staticmethod
    def _path(folder: Path, tag: str, unit: str) -> Path:
        return folder / f"{tag}.{unit}.json"


class Units:
    """What is known of one model, by unit.

    Args:
        cache: where figures are looked up and stored.
        tag: of the model.
        keys: all that a unit depends on, for each unit that is to be stored.

    Attributes:
        known: figures by unit, from the cache or just measured.
    """

    def __init__(self, cache: Cache, tag: str, keys: Mapping[str, Key]):
        self._cache, self._tag, self._keys = cache, tag, keys
        self.known: dict[str, dict[str, Any]] = {}
        for unit, key in keys.items():
            if (data := cache.load(tag, unit, key)) is not None:
                self.known[unit] = data

    def lacks(self, unit: str) -> bool:
        """Whether a unit is wanted (it has a key) and not known."""
        return unit in self._keys and unit not in self.known

    def get(self, unit: str, record: type[Record]) -> Record | None:
        """The figure of a unit, as a record of the results; None where it is not known."""
        return record.model_validate(self.known[unit]) if unit in self.known else None

    def answers(self, unit: str) -> list[Answer] | None:
        """The answers of a unit; None where it is not known."""
        return [Answer.model_validate(answer) for answer in self.known[unit]["answers"]] if unit in self.known else None

    def add(self, unit: str, data: dict[str, Any], store: bool = True) -> None:
        """Take in a figure that was measured. It is stored if its unit has a key, unless `store` is False because the figure is incomplete."""
        self.known[unit] = data
        if store and unit in self._keys:
            self._cache.store(self._tag, unit, self._keys[unit], data)


def speed_keys(engine: str, cpu: str, settings: MeasureSettings) -> Keys:
    """Keys of the rounds of speed and of concurrency. `engine` names what runs the model, its version and threads included."""
    timed = _SCHEMA | {
        "engine": engine,
        "cpu": cpu,
        "context": settings.context,
        "prompt_lengths": list(settings.prompt_lengths),
        "generated_tokens": settings.generated_tokens,
        "repeats": settings.repeats,
        **({"load": dict(settings.load)} if settings.load else {}),
    }
    return {**dict.fromkeys(SPEED_UNITS, timed), CONCURRENCY: timed | {"clients": list(settings.clients)}}


def answer_keys(engine: str, prompts: Sequence[list[dict]], tasks: Sequence[Task], settings: MeasureSettings) -> Keys:
    """Keys of the answers to the prompts and, where there are tasks, of the answers to these and their scores."""
    from olpack.recipe.tasks import function_files  # which a process that measures does without

    asked = _SCHEMA | {"engine": engine, "tokens": settings.answer_tokens, "context": settings.context}
    keys = {"answers": asked | {"prompts": list(prompts)}}
    if tasks:
        tools = {"tools": [task.tools for task in tasks]} if any(task.tools for task in tasks) else {}
        keys["tasks"] = asked | {"prompts": [task.messages for task in tasks]} | tools
        checks = [[task.check, [str(part) for part in task.expected]] for task in tasks]
        keys["scores"] = keys["tasks"] | {"checks": checks, "functions": [file_digest(path) for path in function_files(tasks)]}
    return keys


def row_keys(engine: str, rows: Rows, reference: str | None, other: str | None = None) -> Keys:
    """Keys of what is measured on rows.

    Args:
        rows: the held-out rows.
        reference: identity of the unquantized fine-tune; None where there is none.
        other: identity of the rows outside the user's domain; None where there are none.
    """
    scored = _SCHEMA | {"engine": engine, "rows": rows.digest}
    divergence = {"divergence": scored | {"reference": reference, "kept": LOGITS_BYTES}} if reference is not None else {}
    if other is not None and reference is not None:
        divergence[OTHER_DIVERGENCE] = _SCHEMA | {"engine": engine, "rows": other, "reference": reference, "kept": OTHER_LOGITS_BYTES}
    return {"perplexity": scored} | divergence


def suite_keys(engine: str, settings: MeasureSettings) -> Keys:
    """Keys of each suite of lm-evaluation-harness, with all files in the user's folder: a task may take its data or its code from any of them."""
    from olpack.recipe.tasks import task_files

    folder = Path(settings.suite_folder) if settings.suite_folder else None
    own = [file_digest(path) for path in task_files(folder)] if folder else []
    asked = _SCHEMA | {"engine": engine, "context": settings.context, "limit": settings.suite_limit, "tasks": own}
    return {suite_unit(suite): asked for suite in settings.suites}
