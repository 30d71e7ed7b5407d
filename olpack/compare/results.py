"""What a comparison measured: the schema of `results.json`, and how the file is read and written.

Units are in the names: `_bytes`, `_s` (seconds), `_per_s`. Log-probabilities are natural. A figure that could not be measured is null, and
a flag says why. `schema_version` grows when a field changes its meaning or goes away; new fields may come at any time.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from olpack.errors import OlpackError
from olpack.workspace import write_atomically

SCHEMA_VERSION = 1


class _Record(BaseModel):
    model_config = ConfigDict(extra="ignore", ser_json_inf_nan="null")


class Spread(_Record):
    """One figure measured several times."""

    median: float
    low: float = Field(description="smallest of the values")
    high: float = Field(description="largest of the values")
    values: list[float] = Field(description="every repeat, in the order measured; the discarded first call is not among them")

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """The spread of at least one value."""
        return cls(median=statistics.median(values), low=min(values), high=max(values), values=list(values))


class PromptSpeed(_Record):
    """Prompt processing at one length. Every repeat has fresh tokens and shares no prefix with an earlier one."""

    prompt_tokens: int = Field(description="length of the prompt (through a server: the median of the lengths it counted)")
    tokens_per_s: Spread


class Speed(_Record):
    """Speed, load time and memory of one quant."""

    engine: str = Field(description='what ran it: "llama-cpp-python 0.3.36 (embedded)" or "Ollama 0.33.0"')
    context: int = Field(description="context length it was loaded with, in tokens; memory depends on it")
    threads: int | None = Field(None, description="CPU threads; null where the server chose")
    load_cold_s: float | None = Field(
        None, description="first load until the first token is out, the file dropped from the page cache before where the system allows it"
    )
    load_warm_s: Spread | None = Field(None, description="the same with the file in the page cache")
    prompt: list[PromptSpeed] = []
    generation_tokens_per_s: Spread | None = None
    generated_tokens: int | None = Field(None, description="tokens generated in each repeat (through a server: at most)")
    peak_memory_bytes: int | None = Field(
        None,
        description="embedded: growth of the process's resident set, from before the load to its peak after the speed runs "
        "(weights, KV cache, compute buffers; not what lies on a GPU). Through a server: what /api/ps calls size",
    )
    gpu_memory_bytes: int | None = Field(None, description="through a server: what /api/ps calls size_vram; embedded: null")


class Perplexity(_Record):
    """Perplexity over the learned tokens of the rows, each predicted from all tokens before it."""

    value: float | None = Field(description="exp of the mean negative log-probability per token; null if that is no finite number")
    standard_error: float | None = Field(description="by rows, rows being the sampling unit; null with fewer than two rows")
    row_nll: list[float | None] = Field(description="negative log-probability summed over the learned tokens of each row, in nats")
    same_tokens_rows: int = Field(description="rows whose text the GGUF's own tokenizer turns into exactly the training's ids")


class Loss(_Record):
    """What a quant lost against the best of the files compared, row by row on the same rows."""

    reference: str = Field(description="tag of the best file")
    relative: float = Field(description="growth of perplexity, 0.01 is one per cent")
    standard_error: float | None = Field(description="of `relative`, from paired differences by row; null with fewer than two rows")


class Divergence(_Record):
    """How far a file's predictions are from the unquantized fine-tune's, over the learned tokens of the first `rows` rows."""

    reference: str = Field(description='quant type that the unquantized fine-tune was written in, "F16"')
    rows: int = Field(description="rows from the first on; fewer than were scored where the reference's logits did not all fit on the disk")
    tokens: int = Field(description="learned tokens of these rows")
    mean: float = Field(description="mean of KL(reference ‖ file) per token, in nats")
    standard_error: float | None = Field(description="of `mean`, by rows; null with fewer than two rows")
    p99: float = Field(description="99th percentile of KL(reference ‖ file) over the tokens, in nats")
    p99_standard_error: float | None = Field(description="of `p99`, from 1000 resamples of whole rows; null with fewer than two rows")
    same_top: float = Field(description="share of tokens for which both hold the same token for the likeliest")
    same_top_standard_error: float | None = Field(description="of `same_top`, by rows; null with fewer than two rows")
    row_kl: list[float] = Field(description="KL divergence summed over the learned tokens of each row, in nats")
    row_same_top: list[int] = Field(description="tokens of each row for which both hold the same token for the likeliest")


class Answer(_Record):
    """A free answer at temperature 0."""

    text: str
    finish: Literal["stop", "length"] = Field(description='"length": it was still going at the limit')
    tokens: int
    flags: list[Literal["empty", "looping", "endless", "script"]] = Field([], description='"script": in another script than expected')


class CheckScore(_Record):
    """Tasks of one check."""

    check: str = Field(description='"exact", "contains", "regex", "json", "python", "python_asserts" or "function"')
    count: int
    mean: float
    standard_error: float | None = Field(description="null with fewer than two tasks, and where all scored the same")


class Scores(_Record):
    """Task scores, each from 0 to 1, the tasks being the sampling unit."""

    count: int
    mean: float
    standard_error: float | None = Field(description="null with fewer than two tasks, and where all scored the same")
    checks: list[CheckScore]
    values: list[float] = Field(description="one per task, in the order of `Results.tasks`")


class SuiteScore(_Record):
    """One metric of one task of lm-evaluation-harness."""

    suite: str = Field(description='the task: "gsm8k"')
    metric: str = Field(description='as the harness calls it, with its filter where it has one: "exact_match, strict-match"')
    value: float
    standard_error: float | None = Field(description="as the harness computes it; null where it does not")
    limit: int | None = Field(None, description="only so many questions of it were asked; null: all")


class TaskAsked(_Record):
    """A task as it was put to every file."""

    messages: list[dict]
    check: str
    expected: str | list[str] = Field(description="what the check compares with")
    source: str = Field(description='where the task stands: "tasks.jsonl:4"')


class Flag(_Record):
    """Something that a person should know before choosing this quant."""

    code: Literal["failed", "broken", "tokenizer", "empty", "looping", "endless", "script", "neighbours", "reference"]
    text: str
    serious: bool = Field(description="a quant with a serious flag is never recommended")


class QuantResult(_Record):
    """One file."""

    quant: str = Field(description='"Q4_K_M"')
    tag: str = Field(description='"q4_K_M"')
    file: str
    sha256: str
    size_bytes: int
    bits_per_weight: float | None = None
    speed: Speed | None = None
    perplexity: Perplexity | None = None
    loss: Loss | None = None
    divergence: Divergence | None = Field(None, description="null without an unquantized reference")
    answers: list[Answer] | None = Field(None, description="one per prompt, in the order of `Results.prompts`")
    task_answers: list[Answer] | None = Field(None, description="one per task, in the order of `Results.tasks`")
    scores: Scores | None = None
    suites: list[SuiteScore] = Field([], description="every metric of `settings.suites`")
    flags: list[Flag] = []


class Reference(_Record):
    """The unquantized fine-tune, written for the comparison and removed after it."""

    quant: str = Field(description='quant type that it was written in, "F16"')
    perplexity: Perplexity


class BaseResult(_Record):
    """The base before its training, at one quant, on the same rows: what the fine-tune gave. Removed after the comparison too."""

    quant: str = Field(description='"Q8_0"')
    perplexity: Perplexity | None = None
    divergence: Divergence | None = Field(None, description="from the unquantized fine-tune")
    scores: Scores | None = None


class Rows(_Record):
    """The rows that perplexity was taken over."""

    count: int
    learned_tokens: list[int] = Field(description="learned tokens of each row")
    digest: str = Field(description="sha256 of ids and learned flags")


class Machine(_Record):
    """Where the figures were measured."""

    cpu: str
    cores: int = Field(description="physical cores this process may use")
    memory_bytes: int
    system: str
    busy: float = Field(description="share of the CPU time that others used just before it began: it makes speeds lower, spreads wider")
    versions: dict[str, str] = Field(description="olpack, llama-cpp-python, Ollama where one served, Python")


class Recommendation(_Record):
    """Which quant to take."""

    quant: str
    tag: str
    reason: str = Field(description="one sentence")
    tolerance: float = Field(description="relative growth of perplexity that was accepted")


class Results(_Record):
    """A whole comparison."""

    schema_version: Literal[1] = SCHEMA_VERSION
    name: str
    created: str = Field(description="ISO 8601, UTC")
    machine: Machine
    settings: dict = Field(description="the settings it ran with")
    rows: Rows | None = None
    prompts: list[list[dict]] = Field([], description="conversations put to every quant")
    tasks: list[TaskAsked] = []
    quants: list[QuantResult]
    reference: Reference | None = None
    base: BaseResult | None = None
    recommendation: Recommendation | None = None
    flags: list[Flag] = Field([], description="what a person should know about the comparison as a whole")


def write_results(results: Results, path: Path) -> None:
    """Write `results.json`; what was there is replaced whole or not at all."""
    write_atomically(Path(path), results.model_dump_json(indent=1) + "\n")


def read_results(path: Path) -> Results:
    """Read `results.json`.

    Raises:
        OlpackError: no such file, or one that is no results file of this schema version.
    """
    try:
        return Results.model_validate_json(Path(path).read_bytes())
    except FileNotFoundError:
        raise OlpackError(f"There is no results file at {path}.", "Run `olpack compare` first.") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise OlpackError(
            f"{path} is not a results file that this version reads: {where}: {first['msg']}.", "Measure again with `olpack compare`."
        ) from None
