"""What a worker is told: one GGUF, and which figures of it are wanted."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel


class SpeedJob(BaseModel):
    """What `olpack.compare.MeasureSettings` says about speed."""

    prompt_lengths: list[int]
    generated_tokens: int
    repeats: int


class RowJob(BaseModel):
    """A TokenRow."""

    ids: list[int]
    learned: list[bool]
    text: str


class Job(BaseModel):
    """What to measure of which file. A unit that is None is left out.

    `threads` are for what is timed, `untimed_threads` for perplexity and answers.
    """

    path: Path
    adapter: Path | None = None
    engine: str
    context: int
    threads: int
    untimed_threads: int
    answer_tokens: int
    speed: SpeedJob | None = None
    perplexity: list[RowJob] | None = None
    answers: list[list[dict]] | None = None
