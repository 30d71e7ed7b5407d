"""Measure a set of GGUF files: each in a process of its own, speed through the server where there is one."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import TypeAdapter

from olpack import progress
from olpack.compare import speed
from olpack.compare.cache import Cache
from olpack.compare.flags import flag_answers, flag_neighbours
from olpack.compare.job import LOGITS_BYTES, Job, RowJob, SuitesJob
from olpack.compare.language import Scripts
from olpack.compare.machine import describe_machine
from olpack.compare.recommend import recommend, set_losses
from olpack.compare.results import (
    SCHEMA_VERSION,
    Answer,
    Divergence,
    Flag,
    Perplexity,
    QuantResult,
    Results,
    Rows,
    Scores,
    Speed,
    SuiteScore,
    TaskAsked,
)
from olpack.compare.scores import check_answers
from olpack.compare.units import Units, run_worker, suite_unit
from olpack.compare.yardstick import Held, Yardstick, hold
from olpack.data.rows import TokenRow
from olpack.errors import OlpackError
from olpack.llamacpp.cores import usable_cores
from olpack.tasks import Task, function_files
from olpack.workspace import file_digest, value_digest

if TYPE_CHECKING:
    from olpack.deploy.client import OllamaClient

_BUSY = 0.3  # share of the CPU time used by others from which figures suffer


@dataclass(frozen=True)
class QuantFile:
    """One GGUF to measure.

    Attributes:
        quant: "Q4_K_M".
        tag: "q4_K_M"; through a server the model is `<name>:<tag>`.
        path: the file.
        size: in bytes.
        bits_per_weight: None where nobody knows.
        sha256: of the file, as hexadecimal digits; None: it is read and hashed.
        adapter: a LoRA GGUF that is applied to it; None: there is none.
    """

    quant: str
    tag: str
    path: Path
    size: int
    bits_per_weight: float | None = None
    sha256: str | None = None
    adapter: Path | None = None


@dataclass(frozen=True)
class MeasureSettings:
    """How to measure.

    Attributes:
        prompt_lengths: prompt lengths in tokens at which prompt speed is taken.
        generated_tokens: tokens generated in one timed run.
        repeats: timed runs of each speed figure, shared out over the rounds; in each round one more goes before and is discarded.
        clients: numbers of clients that ask at once, measured through a server only; none: it is not measured.
        context: context length to load with, in tokens. Memory depends on it: give what the package serves (num_ctx).
        threads: CPU threads of the embedded engine; None: the physical cores that this process may use.
        answer_tokens: an answer is cut here.
        tolerance: relative growth of perplexity the recommendation accepts.
        suites: tasks of lm-evaluation-harness to run on every file.
        suite_folder: a folder with tasks of one's own in YAML.
        suite_limit: at most this many questions of each; None: all.
    """

    prompt_lengths: tuple[int, ...] = (512,)
    generated_tokens: int = 64
    repeats: int = 5
    clients: tuple[int, ...] = ()
    context: int = 4096
    threads: int | None = None
    answer_tokens: int = 256
    tolerance: float = 0.01
    suites: tuple[str, ...] = ()
    suite_folder: str | None = None
    suite_limit: int | None = None


def measure(
    files: Sequence[QuantFile],
    rows: Sequence[TokenRow],
    prompts: Sequence[list[dict]],
    settings: MeasureSettings,
    server: OllamaClient | None,
    name: str,
    cache: Path | None = None,
    yardstick: Yardstick | None = None,
    tasks: Sequence[Task] = (),
    examples: Sequence[tuple[str, str]] = (),
) -> Results:
    """Speed, memory, perplexity and answers of every file, with the recommendation.

    Speed, load time and memory come from the server where there is one, else from the embedded engine, in rounds that visit every file;
    perplexity and answers always come from the embedded engine, on the GGUF that ships.

    Args:
        files: the GGUFs; the order is kept.
        rows: held-out rows; empty: no perplexity, and so no recommendation.
        prompts: conversations (lists of messages, the last from the user) that every quant answers.
        server: a client of the Ollama server that has `<name>:<tag>` of every file, or None.
        name: of the package.
        cache: folder that keeps what was measured, one JSON file per quant and kind of figure, under a key of all that it depends on.
            An interrupted comparison goes on from there, and an unchanged quant is not measured again. None: nothing is kept.
        yardstick: how to make the unquantized fine-tune and the untuned base. They are made only if a figure that is not in the cache
            needs them, and removed before the others are measured. None, or no rows: no KL divergence and no figures of the base.
        tasks: what every file, and the base, is asked and scored on.
        examples: (request, answer) of held-out rows, which say in what script answers are expected.

    Raises:
        OlpackError: nothing could be measured of any file. One file that fails is flagged in its result and does not stop the others.
    """
    threads = settings.threads or usable_cores()
    embedded = f"llama-cpp-python {version('llama-cpp-python')}, embedded"
    server_version = server.version() if server else None
    machine = describe_machine(server_version)
    untimed = threads
    if machine.busy > _BUSY:
        # Threads that share a core with somebody else's work make all the others wait: fewer of them are much faster then.
        untimed = max(1, round(threads * (1 - machine.busy)))
        progress.warn(f"Others use {machine.busy:.0%} of this machine's CPU time: measuring will take long, and speeds will come out low.")
    described = _describe_rows(rows) if rows else None
    job = Job(
        path=Path(), engine=embedded, context=settings.context, threads=threads, untimed_threads=untimed,
        answer_tokens=settings.answer_tokens, rows=[RowJob(ids=row.ids, learned=row.learned, text=row.text) for row in rows],
    )  # fmt: skip
    wanted = {
        "perplexity": bool(rows),
        "answers": list(prompts) or None,
        "tasks": [task.messages for task in tasks] or None,
    }
    timed = {
        "engine": f"Ollama {server_version}, {server.url}" if server else f"{embedded}, {threads} threads",
        "cpu": machine.cpu,
        "context": settings.context,
        "prompt_lengths": list(settings.prompt_lengths),
        "generated_tokens": settings.generated_tokens,
        "repeats": settings.repeats,
    }
    depends: dict[str, dict] = {
        **dict.fromkeys(speed.UNITS, timed),
        speed.CONCURRENCY: timed | {"clients": list(settings.clients)},
        "perplexity": {"engine": embedded, "rows": described.digest if described else None},
        "answers": {"engine": embedded, "prompts": list(prompts), "tokens": settings.answer_tokens, "context": settings.context},
    }
    if tasks:
        depends["tasks"] = depends["answers"] | {"prompts": wanted["tasks"]}
        checks = [[task.check, [str(part) for part in task.expected]] for task in tasks]
        depends["scores"] = depends["tasks"] | {"checks": checks, "functions": [file_digest(path) for path in function_files(tasks)]}
    if yardstick and rows:
        depends["divergence"] = depends["perplexity"] | {"reference": yardstick.reference_key, "kept": LOGITS_BYTES}
    for suite in settings.suites:
        depends[suite_unit(suite)] = {"engine": embedded, "context": settings.context, "limit": settings.suite_limit, "tasks": _own_suites(settings)}
    depends = {unit: {"schema": SCHEMA_VERSION, **rest} for unit, rest in depends.items()}

    store = Cache(cache)
    files = [file if file.sha256 else replace(file, sha256=file_digest(Path(file.path))) for file in files]
    known = [Units(store, file.tag, {unit: rest | _weights(file) for unit, rest in depends.items()}) for file in files]
    if server:
        visit = speed.served(server, [f"{name}:{file.tag}" for file in files], known, settings)
    else:
        visit = speed.embedded(files, known, job, settings)
    problems = speed.measure_speeds(known, visit, settings.repeats)
    ran = {"engine": f"Ollama {server_version}" if server else embedded, "threads": None if server else threads}
    held = Held()
    scripts = Scripts(examples)
    quants = []
    with ExitStack() as temporary:
        if yardstick and rows:
            needed = any("divergence" not in units.found for units in known)
            held = hold(yardstick, job, depends, store, needed, temporary, tasks)
        for file, units, failed in zip(files, known, problems, strict=True):
            missing = {unit: value for unit, value in (wanted | {"divergence": held.logits}).items() if value and unit not in units.found}
            if suites := [suite for suite in settings.suites if suite_unit(suite) not in units.found]:
                missing["suites"] = SuitesJob(names=suites, folder=settings.suite_folder, limit=settings.suite_limit)
            if missing:
                failed += run_worker(job.model_copy(update={"path": Path(file.path), "adapter": file.adapter, **missing}), file.quant, units)
            try:
                check_answers(tasks, units, file.quant)
            except OlpackError as error:
                failed.append(error)
            figures = speed.speed_of(units, **ran, generated_tokens=settings.generated_tokens)
            quants.append(_result(file, figures, units.found, failed, described))
            flag_answers(quants[-1], prompts, scripts)

    if any(problems) and not any(quant.speed or quant.perplexity or quant.answers for quant in quants):
        raise next(failed[0] for failed in problems if failed)
    if described:
        set_losses(quants, described.learned_tokens)
        flag_neighbours(quants, described.learned_tokens)
    results = Results(
        name=name, created=datetime.now(UTC).isoformat(timespec="seconds"), machine=machine, rows=described,
        settings=TypeAdapter(MeasureSettings).dump_python(settings, mode="json"), prompts=list(prompts), quants=quants,
        tasks=describe_tasks(tasks),
        reference=held.reference, base=held.base, flags=[Flag(code="reference", text=str(problem), serious=False) for problem in held.problems],
    )  # fmt: skip
    results.recommendation = recommend(results, settings.tolerance)
    return results


def _weights(file: QuantFile) -> dict[str, str]:
    """What a unit's key holds of the weights."""
    return {"file": file.sha256} | ({"adapter": file_digest(file.adapter)} if file.adapter else {})


def _own_suites(settings: MeasureSettings) -> list[str]:
    """Digests of all files in the user's folder of suites: a task may take its data or its code from any of them."""
    folder = Path(settings.suite_folder) if settings.suite_folder else None
    return [file_digest(path) for path in sorted(folder.rglob("*")) if path.is_file() and path.suffix != ".pyc"] if folder else []


def describe_tasks(tasks: Sequence[Task]) -> list[TaskAsked]:
    """The tasks as the results hold them."""
    return [TaskAsked(messages=task.messages, check=task.check, expected=_shown(task), source=task.source) for task in tasks]


def _shown(task: Task) -> str | list[str]:
    return f"{task.expected[0].name}:{task.expected[1]}" if task.check == "function" else task.expected


def _result(
    file: QuantFile, speed: Speed | None, found: dict[str, dict], problems: list[OlpackError], rows: Rows | None
) -> QuantResult:
    result = QuantResult(
        quant=file.quant, tag=file.tag, file=Path(file.path).name, sha256=file.sha256,
        size_bytes=file.size, bits_per_weight=file.bits_per_weight,
        speed=speed,
        perplexity=Perplexity.model_validate(found["perplexity"]) if "perplexity" in found else None,
        divergence=Divergence.model_validate(found["divergence"]) if "divergence" in found else None,
        answers=[Answer.model_validate(answer) for answer in found["answers"]["answers"]] if "answers" in found else None,
        task_answers=[Answer.model_validate(answer) for answer in found["tasks"]["answers"]] if "tasks" in found else None,
        scores=Scores.model_validate(found["scores"]) if "scores" in found else None,
        suites=[SuiteScore.model_validate(score) for unit in found if unit.startswith(suite_unit("")) for score in found[unit]["scores"]],
    )  # fmt: skip
    # The same crash ends every measurement: it is told once.
    result.flags = [Flag(code="failed", text=text, serious=True) for text in dict.fromkeys(str(error) for error in problems)]
    score = result.perplexity
    if score is not None and score.value is None:
        result.flags.append(Flag(code="broken", text="the model's probabilities are no numbers: this file is broken", serious=True))
    if score is not None and score.same_tokens_rows < rows.count:
        different = rows.count - score.same_tokens_rows
        text = f"its tokenizer turns {different} of {rows.count} rows into other tokens than training saw: it is not served what it learned"
        result.flags.append(Flag(code="tokenizer", text=text, serious=True))
    return result


def _describe_rows(rows: Sequence[TokenRow]) -> Rows:
    return Rows(
        count=len(rows),
        learned_tokens=[row.learned_count for row in rows],
        digest=value_digest([[row.ids, row.learned, row.text] for row in rows]),
    )
