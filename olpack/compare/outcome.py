"""What was measured, as the results hold it."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from pydantic import TypeAdapter

from olpack.compare.results import Divergence, Flag, Machine, Perplexity, QuantResult, Results, Scores, Speed, SuiteScore, TaskAsked
from olpack.compare.settings import MeasureSettings
from olpack.compare.units import UNWEIGHED, Units, suite_unit
from olpack.errors import OlpackError
from olpack.recipe.tasks import Task


def quant_result(units: Units, speed: Speed | None, problems: Sequence[OlpackError], **identity: Any) -> QuantResult:
    """One file or model: what is known of it, what went wrong as flags, and `identity`, which are fields of `QuantResult`."""
    scores = [score for unit, data in units.found.items() if unit.startswith(suite_unit("")) for score in data["scores"]]
    # The same crash ends every measurement: one flag is enough. A file whose quality is known can be recommended without its speed.
    flags = [Flag(code="failed", text=text, serious="perplexity" not in units.found) for text in dict.fromkeys(str(error) for error in problems)]
    if speed and speed.others:
        text = f"while its speed was measured, the server also kept {', '.join(speed.others)} loaded"
        flags.append(Flag(code="shared", text=text, serious=False))
    return QuantResult(
        **identity,
        speed=speed,
        perplexity=units.get("perplexity", Perplexity),
        divergence=units.get("divergence", Divergence),
        divergence_without_importance=units.get(UNWEIGHED, Divergence),
        answers=units.answers("answers"),
        task_answers=units.answers("tasks"),
        scores=units.get("scores", Scores),
        suites=[SuiteScore.model_validate(score) for score in scores],
        flags=flags,
    )


def gather(
    name: str,
    machine: Machine,
    settings: MeasureSettings,
    prompts: Sequence[list[dict]],
    tasks: Sequence[Task],
    quants: list[QuantResult],
    problems: Sequence[Sequence[OlpackError]],
) -> Results:
    """All of them together. `problems` are what went wrong, by file.

    Raises:
        OlpackError: nothing could be measured of any file; the first thing that went wrong.
    """
    if any(problems) and not any(quant.speed or quant.perplexity or quant.answers for quant in quants):
        raise next(failed[0] for failed in problems if failed)
    asked = [TaskAsked(messages=task.messages, check=task.check, expected=_shown(task), source=task.source) for task in tasks]
    return Results(
        name=name,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        machine=machine,
        settings=TypeAdapter(MeasureSettings).dump_python(settings, mode="json"),
        prompts=list(prompts),
        tasks=asked,
        quants=quants,
    )


def _shown(task: Task) -> str | list[str]:
    return f"{task.expected[0].name}:{task.expected[1]}" if task.check == "function" else task.expected
