"""Speed in rounds: every model is visited, then every model again in the opposite order, and the rounds of a model are merged.

A machine that grows warm, or busy, drifts. With one model after the other the drift would look like a difference between them; in two
rounds of opposite order a steady drift affects all models alike, and what is left of it widens the spread that the report shows.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from pydantic import BaseModel

from olpack.compare.cache import CONCURRENCY, SPEED_UNITS, Units
from olpack.compare.job import Job, SpeedJob, run_worker
from olpack.compare.results import Concurrency, PromptSpeed, Speed, Spread
from olpack.errors import OlpackError

if TYPE_CHECKING:
    from olpack.compare.settings import ComparedFile, MeasureSettings

ROUNDS = len(SPEED_UNITS)


class PromptRun(BaseModel):
    """One prompt through the model: the length asked for and the real one in tokens, seconds for the prompt, seconds to the first token."""

    asked: int
    tokens: int
    seconds: float
    first_token_s: float


class SpeedRound(BaseModel):
    """What one visit to one model measured, without the discarded calls. `problems` are the reasons why a figure is missing, `others` the models
    of others that the server ran meanwhile.
    """

    context: int
    load_cold_s: float | None = None
    loads_s: list[float]
    prompts: list[PromptRun]
    generation_tokens_per_s: list[float]
    joules_per_token: list[float] = []
    memory_bytes: int | None
    gpu_memory_bytes: int | None = None
    problems: list[str] = []
    others: list[str] = []


def visits(count: int) -> list[tuple[int, int]]:
    """(round, index of the model) in the order in which they are measured: there, and back again."""
    return [(number, index) for number in range(ROUNDS) for index in (range(count) if number % 2 == 0 else reversed(range(count)))]


def repeats_of(number: int, repeats: int) -> int:
    """Timed runs of round `number`: the repeats are divided evenly, at least one for each round."""
    return max(1, (repeats + ROUNDS - 1 - number) // ROUNDS)


def merge_rounds(rounds: Sequence[SpeedRound], *, engine: str, threads: int | None, generated_tokens: int) -> Speed:
    """The speed of a model from its rounds. Memory is the largest of the rounds."""
    runs = [run for one in rounds for run in one.prompts]
    prompt = []
    for asked in dict.fromkeys(run.asked for run in runs):
        same = [run for run in runs if run.asked == asked]
        prompt.append(
            PromptSpeed(
                prompt_tokens=round(statistics.median(run.tokens for run in same)),
                tokens_per_s=Spread.of([run.tokens / run.seconds for run in same]),
                first_token_s=Spread.of([run.first_token_s for run in same]),
            )
        )
    rates = [rate for one in rounds for rate in one.generation_tokens_per_s]
    loads = [load for one in rounds for load in one.loads_s]
    joules = [value for one in rounds for value in one.joules_per_token]
    return Speed(
        engine=engine,
        context=rounds[0].context,
        threads=threads,
        load_cold_s=rounds[0].load_cold_s,
        load_warm_s=Spread.of(loads) if loads else None,
        prompt=prompt,
        generation_tokens_per_s=Spread.of(rates) if rates else None,
        generated_tokens=generated_tokens,
        joules_per_token=Spread.of(joules) if joules else None,
        peak_memory_bytes=max((one.memory_bytes for one in rounds if one.memory_bytes is not None), default=None),
        gpu_memory_bytes=max((one.gpu_memory_bytes for one in rounds if one.gpu_memory_bytes is not None), default=None),
        others=sorted({model for one in rounds for model in one.others}),
    )


class Visit(Protocol):
    """Measures one round of one model into its units, and returns what went wrong."""

    def __call__(self, index: int, round: int, repeats: int) -> list[OlpackError]: ...


def measure_speeds(known: Sequence[Units], visit: Visit, repeats: int) -> list[list[OlpackError]]:
    """Visit every model in every round, as far as the rounds are not known yet. A model of which a round gave nothing is not visited again.

    Returns:
        what went wrong, for each model.
    """
    problems: list[list[OlpackError]] = [[] for _ in known]
    for number, index in visits(len(known)):
        failed = problems[index] and not any(unit in known[index].known for unit in SPEED_UNITS)
        if SPEED_UNITS[number] not in known[index].known and not failed:
            problems[index] += visit(index, number, repeats_of(number, repeats))
    return problems


def visit_embedded(files: Sequence[ComparedFile], known: Sequence[Units], job: Job, settings: MeasureSettings) -> Visit:
    """Visits with the embedded engine, each in a process of its own."""

    def visit(index: int, round: int, repeats: int) -> list[OlpackError]:
        file = files[index]
        plan = SpeedJob(round=round, repeats=repeats, prompt_lengths=list(settings.prompt_lengths), generated_tokens=settings.generated_tokens)
        return run_worker(job.model_copy(update={"path": file.path, "adapter": file.adapter, "speed": plan}), file.quant, known[index])

    return visit


def speed_of(units: Units, *, engine: str, threads: int | None, generated_tokens: int) -> Speed | None:
    """The speed of a model from the rounds that are known; None where none is."""
    rounds = [SpeedRound.model_validate(units.known[unit]) for unit in SPEED_UNITS if unit in units.known]
    if not rounds:
        return None
    speed = merge_rounds(rounds, engine=engine, threads=threads, generated_tokens=generated_tokens)
    clients = units.known.get(CONCURRENCY, {"clients": []})["clients"]
    return speed.model_copy(update={"concurrency": [Concurrency.model_validate(one) for one in clients]})
