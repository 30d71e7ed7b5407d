"""What each figure depends on, by unit: the keys under which it is kept. Whoever measures a file adds what tells its weights apart."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from olpack.compare import speed
from olpack.compare.job import LOGITS_BYTES
from olpack.compare.results import SCHEMA_VERSION, Rows
from olpack.compare.settings import MeasureSettings
from olpack.compare.units import suite_unit
from olpack.recipe.tasks import Task, function_files, task_files
from olpack.workspace import file_digest

Keys = dict[str, dict]

_SCHEMA = {"schema": SCHEMA_VERSION}


def of_speed(engine: str, cpu: str, settings: MeasureSettings) -> Keys:
    """The rounds of speed, and several clients at once. `engine` says what runs the model, its version and threads included."""
    timed = _SCHEMA | {
        "engine": engine,
        "cpu": cpu,
        "context": settings.context,
        "prompt_lengths": list(settings.prompt_lengths),
        "generated_tokens": settings.generated_tokens,
        "repeats": settings.repeats,
    }
    return {**dict.fromkeys(speed.UNITS, timed), speed.CONCURRENCY: timed | {"clients": list(settings.clients)}}


def of_answers(engine: str, prompts: Sequence[list[dict]], tasks: Sequence[Task], settings: MeasureSettings) -> Keys:
    """Answers to the prompts and, where there are tasks, answers to these and their scores."""
    asked = _SCHEMA | {"engine": engine, "tokens": settings.answer_tokens, "context": settings.context}
    keys = {"answers": asked | {"prompts": list(prompts)}}
    if tasks:
        keys["tasks"] = asked | {"prompts": [task.messages for task in tasks]}
        checks = [[task.check, [str(part) for part in task.expected]] for task in tasks]
        keys["scores"] = keys["tasks"] | {"checks": checks, "functions": [file_digest(path) for path in function_files(tasks)]}
    return keys


def of_rows(engine: str, rows: Rows, reference: str | None) -> Keys:
    """What is taken from the held-out rows. `reference` is the identity of the unquantized fine-tune; None where there is none."""
    scored = _SCHEMA | {"engine": engine, "rows": rows.digest}
    against = {"divergence": scored | {"reference": reference, "kept": LOGITS_BYTES}} if reference is not None else {}
    return {"perplexity": scored} | against


def of_suites(engine: str, settings: MeasureSettings) -> Keys:
    """Each suite of lm-evaluation-harness, with all files in the user's folder: a task may take its data or its code from any of them."""
    folder = Path(settings.suite_folder) if settings.suite_folder else None
    own = [file_digest(path) for path in task_files(folder)] if folder else []
    asked = _SCHEMA | {"engine": engine, "context": settings.context, "limit": settings.suite_limit, "tasks": own}
    return {suite_unit(suite): asked for suite in settings.suites}
