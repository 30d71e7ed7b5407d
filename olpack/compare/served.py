"""Any models of a server side by side, olpack's or not: speed, memory, answers, task scores.

    results = compare_served(client, ["coding-assistant:q4_K_M", "qwen3:0.6b"], prompts, MeasureSettings(), cache=folder)

Their weights lie with the server, so there is no perplexity, and no recommendation follows from size and speed alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from olpack import progress
from olpack.compare import keys, speed
from olpack.compare.answers import answer_of
from olpack.compare.cache import Cache
from olpack.compare.flags import flag_answers
from olpack.compare.language import Scripts
from olpack.compare.machine import describe_machine
from olpack.compare.outcome import gather, quant_result
from olpack.compare.results import Results
from olpack.compare.scores import check_answers
from olpack.compare.settings import MeasureSettings
from olpack.compare.units import Units
from olpack.deploy.names import same
from olpack.errors import OlpackError

if TYPE_CHECKING:
    from ollama import ListResponse

    from olpack.deploy.client import OllamaClient
    from olpack.recipe.tasks import Task


def compare_served(
    client: OllamaClient,
    models: Sequence[str],
    prompts: Sequence[list[dict]],
    settings: MeasureSettings,
    tasks: Sequence[Task] = (),
    cache: Path | None = None,
) -> Results:
    """Measure models of a server.

    Args:
        client: of a server that answers.
        models: as the server knows them; the order is kept. A name without a tag means `:latest`.
        prompts: conversations that every model answers, at temperature 0. A model's own system prompt applies where they have none.
        settings: as for `measure`; what is about files is not looked at.
        tasks: what every model is asked and scored on.
        cache: as for `measure`.

    Raises:
        OlpackError: the server lacks a model (before anything is measured), or nothing could be measured of any. One model that fails is
            flagged in its result and does not stop the others.
    """
    listed = [_find(client, model) for model in models]
    version, names = client.version(), [model.model for model in listed]
    machine = describe_machine(version)
    engine = f"Ollama {version}"  # not its address: what is kept holds for the same server under another name
    depends = keys.of_speed(engine, machine.cpu, settings) | keys.of_answers(engine, prompts, tasks, settings)
    store = Cache(cache)
    known = [
        Units(store, model.model.replace("/", "+").replace(":", "+"), {unit: rest | {"file": model.digest} for unit, rest in depends.items()})
        for model in listed
    ]
    problems = speed.measure_speeds(known, speed.served(client, names, known, settings), settings.repeats)
    quants = []
    for model, units, failed in zip(listed, known, problems, strict=True):
        for unit, asked in (("answers", list(prompts)), ("tasks", [task.messages for task in tasks])):
            if asked and unit not in units.found:
                failed += _answer(client, model.model, unit, asked, settings, units)
        try:
            check_answers(tasks, units, model.model)
        except OlpackError as error:
            failed.append(error)
        figures = speed.speed_of(units, engine=f"Ollama {version}", threads=None, generated_tokens=settings.generated_tokens)
        quants.append(quant_result(units, figures, failed, **_identity(model)))
        flag_answers(quants[-1], prompts, Scripts(()))
    return gather(" · ".join(names), machine, settings, prompts, tasks, quants, problems)


def _find(client: OllamaClient, model: str) -> ListResponse.Model:
    wanted = model if ":" in model.rpartition("/")[2] else f"{model}:latest"
    found = next((tag for tag in client.tags() if same(tag.model, wanted)), None)
    if found is None:
        there = ", ".join(tag.model for tag in client.tags()) or "none"
        raise OlpackError(f"The Ollama server at {client.url} has no model {wanted}.", f"It has: {there}. `ollama pull {model}` fetches one.")
    return found


def _answer(
    client: OllamaClient, model: str, unit: str, conversations: list[list[dict]], settings: MeasureSettings, units: Units
) -> list[OlpackError]:
    """One answer to each conversation, at temperature 0; what went wrong comes back."""
    options = {"temperature": 0, "num_predict": settings.answer_tokens, "num_ctx": settings.context}
    answers = []
    try:
        with progress.task(f"asking {model}: {unit}", len(conversations), "answers") as shown:
            for messages in conversations:
                said = client.chat(model, messages, options)
                # Without `done`, the server broke off an answer that repeats one token.
                answer = answer_of(
                    said.message.content or "",
                    "stop" if said.done_reason == "stop" else "length",
                    said.eval_count or 0,
                    reasoning=said.message.thinking or "",
                    broken_off=not said.done,
                )
                answers.append(answer.model_dump(mode="json"))
                shown.advance()
    except OlpackError as error:
        return [error]
    units.add(unit, {"answers": answers})
    return []


def _identity(model: ListResponse.Model) -> dict:
    details = model.details
    return {
        "quant": model.model,
        "tag": model.model,
        "file": "",
        "sha256": model.digest,
        "size_bytes": model.size,
        "parameters": details.parameter_size if details else None,
        "quantization": details.quantization_level if details else None,
    }


def settings_for(client: OllamaClient, models: Sequence[str], settings: MeasureSettings) -> MeasureSettings:
    """The settings with a context that every model has: the smallest `num_ctx` they are registered with, 4,096 where none says. In a short one
    fewer tokens are generated, so that a prompt has its place."""
    context = min((shown.parameters.get("num_ctx", 4096) for model in models if (shown := client.show(model))), default=4096)
    return replace(settings, context=context, generated_tokens=min(settings.generated_tokens, context // 2))
