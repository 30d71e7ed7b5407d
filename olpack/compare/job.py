"""What a worker is told: one GGUF, and which figures of it are wanted."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel

# The reference's logits may take this much disk: 7,000 positions of a 38k vocabulary or 1,766 of a 152k one. On that many the mean is known
# to some percent of itself, which tells quants apart; ten times as many positions would only divide its error by three.
LOGITS_BYTES = 1 << 30


class SpeedJob(BaseModel):
    """One round of what `olpack.compare.MeasureSettings` says about speed."""

    round: int
    prompt_lengths: list[int]
    generated_tokens: int
    repeats: int


class RowJob(BaseModel):
    """A TokenRow."""

    ids: list[int]
    loss_mask: list[bool]
    text: str


class LogitsJob(BaseModel):
    """A reference's logits on the disk, as `divergence.LogitsWriter` keeps them: of the first `rows` rows."""

    path: Path
    quant: str
    rows: int


class SuitesJob(BaseModel):
    """Suites of lm-evaluation-harness, as `olpack.compare.MeasureSettings` names them."""

    names: list[str]
    folder: Path | None
    limit: int | None


class Job(BaseModel):
    """What to measure of which file. A unit that is None or False is left out.

    `threads` are for what is timed, `untimed_threads` for all else. `keep_logits` is where the unquantized model leaves its logits,
    `divergence` what it left.
    """

    path: Path
    adapter: Path | None = None
    engine: str
    context: int
    threads: int
    untimed_threads: int
    answer_tokens: int
    rows: list[RowJob] = []
    speed: SpeedJob | None = None
    perplexity: bool = False
    keep_logits: Path | None = None
    divergence: LogitsJob | None = None
    answers: list[list[dict]] | None = None
    tasks: list[list[dict]] | None = None
    suites: SuitesJob | None = None
