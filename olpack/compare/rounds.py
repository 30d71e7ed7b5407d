"""Speed in rounds: every model is visited, then every model again in the opposite order, and what was timed is put together.

A machine that grows warm, or busy, drifts. With one model after the other the drift would be taken for a difference between them; in two
rounds of opposite order a steady drift falls on all of them alike, and what is left of it widens the spread that the report shows.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from pydantic import BaseModel

from olpack.compare.results import PromptSpeed, Speed, Spread

ROUNDS = 2


class PromptRun(BaseModel):
    """One prompt through the model: how long it was asked to be, how many tokens it had, seconds for them, seconds to the first token."""

    asked: int
    tokens: int
    seconds: float
    first_token_s: float


class SpeedRound(BaseModel):
    """What one visit to one model measured. Discarded calls are not in it; `problems` say why a figure is missing."""

    context: int
    load_cold_s: float | None = None
    loads_s: list[float]
    prompts: list[PromptRun]
    generation_tokens_per_s: list[float]
    joules_per_token: list[float] = []
    memory_bytes: int | None
    gpu_memory_bytes: int | None = None
    problems: list[str] = []
    others: list[str] = []  # models of others that the server ran meanwhile


def visits(count: int) -> list[tuple[int, int]]:
    """(round, index of the model) in the order in which they are measured: there, and back again."""
    return [(number, index) for number in range(ROUNDS) for index in (range(count) if number % 2 == 0 else reversed(range(count)))]


def repeats_of(round_: int, repeats: int) -> int:
    """Timed runs of a round: the repeats are shared out evenly, at least one in each."""
    return max(1, (repeats + ROUNDS - 1 - round_) // ROUNDS)


def put_together(rounds: Sequence[SpeedRound], *, engine: str, threads: int | None, generated_tokens: int) -> Speed:
    """The rounds of one model as its speed. Memory is the largest of the rounds."""
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
