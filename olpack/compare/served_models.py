"""Any models of a server side by side, olpack's or not: speed, memory, answers, task scores.

    results = compare_served(client, ["coding-assistant:q4_K_M", "qwen3:0.6b"], prompts, MeasureSettings(), cache=folder)

Only the server has their weights, so there is no perplexity, and no recommendation follows from size and speed alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from olpack import progress
from olpack.compare.cache import Cache, Units, answer_keys, speed_keys
from olpack.compare.hardware import describe_machine
from olpack.compare.job import Asked, asked_of
from olpack.compare.measure import add_figures, gather
from olpack.compare.result_flags import ExpectedScripts, answer_of, flag_answers
from olpack.compare.results import QuantResult, Results
from olpack.compare.scores import check_answers
from olpack.compare.server_speed import visit_through_server
from olpack.compare.settings import MeasureSettings
from olpack.compare.speed import measure_speeds, speed_of
from olpack.deploy.names import same
from olpack.errors import OlpackError
from olpack.recipe.tasks import call_text

if TYPE_CHECKING:
    from olpack.deploy.client import ChatFields, OllamaClient, Tag
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
        models: names of the server; the results have their order. A name without a tag means `:latest`.
        prompts: conversations that every model answers, at temperature 0. A model's own system prompt applies where they have none.
        settings: as for `measure`; those about files are ignored.
        tasks: what every model is asked and scored on.
        cache: as for `measure`.

    Raises:
        OlpackError: the server lacks a model (before anything is measured), or nothing could be measured of any. One model that fails is
            flagged in its result and does not stop the others.
    """
    listed = [_find(client, model) for model in models]
    version, names = client.version(), [model.model for model in listed]
    machine = describe_machine(version)
    engine = f"Ollama {version}"  # without its address: the figures are those of the same server under another address too
    keys = speed_keys(engine, machine.cpu, settings) | answer_keys(engine, prompts, tasks, settings)
    store = Cache(cache)
    known = [
        Units(store, model.model.replace("/", "+").replace(":", "+"), {unit: key | {"file": model.digest} for unit, key in keys.items()})
        for model in listed
    ]
    problems = measure_speeds(known, visit_through_server(client, names, known, settings), settings.repeats)
    quants = []
    for model, units, failed in zip(listed, known, problems, strict=True):
        for unit, asked in (("answers", [Asked(messages=messages) for messages in prompts]), ("tasks", asked_of(tasks))):
            if asked and unit not in units.known:
                failed += _answer(client, model.model, unit, asked, settings, units)
        try:
            check_answers(tasks, units, model.model)
        except OlpackError as error:
            failed.append(error)
        quants.append(result := _identity(model))
        add_figures(result, units, speed_of(units, engine=engine, threads=None, generated_tokens=settings.generated_tokens), failed)
        flag_answers(result, prompts, ExpectedScripts(()))
    return gather(" · ".join(names), machine, settings, prompts, tasks, quants, problems)


def _find(client: OllamaClient, model: str) -> Tag:
    wanted, tags = model if ":" in model.rpartition("/")[2] else f"{model}:latest", client.tags()
    tag = next((tag for tag in tags if same(tag.model, wanted)), None)
    if tag is None:
        names = ", ".join(tag.model for tag in tags) or "none"
        raise OlpackError(f"The Ollama server at {client.url} has no model {wanted}.", f"It has: {names}. `ollama pull {model}` fetches one.")
    return tag


def _identity(tag: Tag) -> QuantResult:
    """The result of a model before anything is measured."""
    return QuantResult(
        quant=tag.model,
        tag=tag.model,
        file="",
        sha256=tag.digest,
        size_bytes=tag.size,
        parameters=tag.parameters,
        quantization=tag.quantization,
    )


def _answer(client: OllamaClient, model: str, unit: str, conversations: list[Asked], settings: MeasureSettings, units: Units) -> list[OlpackError]:
    """Get one answer to each conversation, at temperature 0, into `units`.

    Returns:
        what went wrong.
    """
    options = {"temperature": 0, "num_predict": settings.answer_tokens, "num_ctx": settings.context}
    answers = []
    try:
        with progress.task(f"asking {model}: {unit}", len(conversations), "answers") as shown:
            for asked in conversations:
                fields: ChatFields = {"tools": asked.tools} if asked.tools else {}
                response = client.chat(model, asked.messages, options, **fields)
                # The server sets calls apart from the text that they were written in.
                calls = [call_text(call.function.name, dict(call.function.arguments)) for call in response.message.tool_calls or ()]
                # Without `done`, the server broke off an answer that repeats one token.
                answer = answer_of(
                    "\n".join(filter(None, [response.message.content, *calls])),
                    "stop" if response.done_reason == "stop" else "length",
                    response.eval_count or 0,
                    reasoning=response.message.thinking or "",
                    broken_off=not response.done,
                )
                answers.append(answer.model_dump(mode="json"))
                shown.advance()
    except OlpackError as error:
        return [error]
    units.add(unit, {"answers": answers})
    return []


def settings_for(client: OllamaClient, models: Sequence[str], settings: MeasureSettings) -> MeasureSettings:
    """The settings with a context that every model has: the smallest `num_ctx` that they are registered with, 4,096 where none has one. In
    a short context fewer tokens are generated, so that a prompt fits beside them."""
    contexts = []
    for model in models:
        try:
            shown = client.show(model)
        except OlpackError as error:
            progress.warn(f"{error} A context of 4,096 tokens is assumed for {model}.")
            continue
        if shown:
            context = shown.parameters.get("num_ctx", 4096)
            contexts.append(context if isinstance(context, int) else 4096)
    smallest = min(contexts, default=4096)
    return replace(settings, context=smallest, generated_tokens=min(settings.generated_tokens, smallest // 2))
