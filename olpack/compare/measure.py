"""Measure a set of GGUF files: each in a process of its own, speed through the server where there is one."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from olpack import progress
from olpack.compare import keys, speed
from olpack.compare.cache import Cache
from olpack.compare.flags import flag_answers, flag_neighbours, flag_same_types
from olpack.compare.job import Job, RowJob, SuitesJob
from olpack.compare.language import Scripts
from olpack.compare.machine import describe_machine
from olpack.compare.outcome import gather, quant_result
from olpack.compare.recommend import recommend, set_losses
from olpack.compare.results import Flag, QuantResult, Results, Rows
from olpack.compare.scores import check_answers
from olpack.compare.settings import MeasureSettings, QuantFile
from olpack.compare.units import UNWEIGHED, Units, run_worker, suite_unit
from olpack.compare.yardstick import Held, Yardstick, hold, measure_unweighed
from olpack.data.rows import TokenRow
from olpack.errors import OlpackError
from olpack.llamacpp.cores import usable_cores
from olpack.recipe.tasks import Task
from olpack.workspace import file_digest, value_digest

if TYPE_CHECKING:
    from olpack.deploy.client import OllamaClient

_BUSY = 0.3  # share of the CPU time used by others from which figures suffer


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
        yardstick: how to make what the files are held against. It is made only if a figure that is not in the cache needs it, and removed
            at once. None, or no rows: no KL divergence and no figures of the base.
        tasks: what every file, and the base, is asked and scored on.
        examples: (request, answer) of held-out rows, which say in what script answers are expected.

    Raises:
        OlpackError: nothing could be measured of any file. One file that fails is flagged in its result and does not stop the others.
    """
    embedded = f"llama-cpp-python {version('llama-cpp-python')}, embedded"
    server_version = server.version() if server else None
    machine = describe_machine(server_version)
    job = _job(embedded, rows, settings, machine.busy)
    described = _describe_rows(rows) if rows else None
    yardstick = yardstick if rows else None
    timed_by = f"Ollama {server_version}" if server else f"{embedded}, {job.threads} threads"
    depends = keys.of_speed(timed_by, machine.cpu, settings) | keys.of_answers(embedded, prompts, tasks, settings)
    depends |= keys.of_suites(embedded, settings)
    if described:
        depends |= keys.of_rows(embedded, described, yardstick and yardstick.reference_key)

    store = Cache(cache)
    files = [file if file.sha256 else replace(file, sha256=file_digest(file.path)) for file in files]
    known = [_units(store, file, depends, yardstick) for file in files]
    if server:
        visit = speed.served(server, [f"{name}:{file.tag}" for file in files], known, settings)
    else:
        visit = speed.embedded(files, known, job, settings)
    problems = speed.measure_speeds(known, visit, settings.repeats)
    held = Held()
    with ExitStack() as temporary:
        if yardstick:
            needed = any(units.lacks("divergence") or units.lacks(UNWEIGHED) for units in known)
            held = hold(yardstick, job, depends, store, needed, temporary, tasks)
        for file, units, failed in zip(files, known, problems, strict=True):
            failed += _measure_quality(file, units, job, settings, prompts, tasks, held)
            if held.logits and units.lacks(UNWEIGHED):
                held.problems += measure_unweighed(yardstick, file.quant, job, held.logits, units)

    ran = {"engine": f"Ollama {server_version}" if server else embedded, "threads": None if server else job.threads}
    quants, scripts = [], Scripts(examples)
    for file, units, failed in zip(files, known, problems, strict=True):
        figures = speed.speed_of(units, **ran, generated_tokens=settings.generated_tokens)
        quants.append(result := quant_result(units, figures, failed, **_identity(file)))
        _flag_rows(result, described)
        flag_answers(result, prompts, scripts)
    flag_same_types(quants, {file.quant: file.tensors for file in files})
    results = gather(name, machine, settings, prompts, tasks, quants, problems)
    results.rows, results.reference, results.base = described, held.reference, held.base
    results.flags = [Flag(code="reference", text=str(problem), serious=False) for problem in held.problems]
    if described:
        set_losses(quants, described.learned_tokens)
        flag_neighbours(quants, described.learned_tokens)
    results.recommendation = recommend(results, settings.tolerance)
    return results


def _job(engine: str, rows: Sequence[TokenRow], settings: MeasureSettings, busy: float) -> Job:
    """What every worker is told, with nothing to measure yet. `busy` is the share of the CPU time that others use."""
    threads = untimed = settings.threads or usable_cores()
    if busy > _BUSY:
        # Threads that share a core with somebody else's work make all the others wait: fewer of them are much faster then.
        untimed = max(1, round(threads * (1 - busy)))
        progress.warn(f"Others use {busy:.0%} of this machine's CPU time: measuring will take long, and speeds will come out low.")
    return Job(
        path=Path(),
        engine=engine,
        context=settings.context,
        threads=threads,
        untimed_threads=untimed,
        answer_tokens=settings.answer_tokens,
        rows=[RowJob(ids=row.ids, loss_mask=row.loss_mask, text=row.text) for row in rows],
    )


def _units(store: Cache, file: QuantFile, depends: keys.Keys, yardstick: Yardstick | None) -> Units:
    weights = {"file": file.sha256} | ({"adapter": file_digest(file.adapter)} if file.adapter else {})
    own = {unit: rest | weights for unit, rest in depends.items()}
    if yardstick and (key := yardstick.unweighed_keys.get(file.quant)):
        own[UNWEIGHED] = depends["divergence"] | {"file": key}
    return Units(store, file.tag, own)


def _measure_quality(
    file: QuantFile, units: Units, job: Job, settings: MeasureSettings, prompts: Sequence[list[dict]], tasks: Sequence[Task], held: Held
) -> list[OlpackError]:
    """Whatever speed is not, as far as it is not known; what went wrong comes back."""
    wanted = {"perplexity": bool(job.rows), "divergence": held.logits, "answers": list(prompts), "tasks": [task.messages for task in tasks]}
    missing = {unit: value for unit, value in wanted.items() if value and unit not in units.found}
    if suites := [suite for suite in settings.suites if units.lacks(suite_unit(suite))]:
        missing["suites"] = SuitesJob(names=suites, folder=settings.suite_folder, limit=settings.suite_limit)
    problems = []
    if missing:
        problems += run_worker(job.model_copy(update={"path": file.path, "adapter": file.adapter, **missing}), file.quant, units)
    try:
        check_answers(tasks, units, file.quant)
    except OlpackError as error:
        problems.append(error)
    return problems


def _identity(file: QuantFile) -> dict:
    return {
        "quant": file.quant,
        "tag": file.tag,
        "file": file.path.name,
        "sha256": file.sha256,
        "size_bytes": file.size,
        "bits_per_weight": file.bits_per_weight,
        "types": file.types,
    }


def _flag_rows(result: QuantResult, rows: Rows | None) -> None:
    """Flag a file that computes no numbers on the rows, or reads them otherwise than training did."""
    score = result.perplexity
    if score is not None and score.value is None:
        result.flags.append(Flag(code="broken", text="the model's probabilities are no numbers: this file is broken", serious=True))
    if score is not None and score.same_tokens_rows < rows.count:
        different = rows.count - score.same_tokens_rows
        text = f"its tokenizer turns {different} of {rows.count} rows into other tokens than training saw: it is not served what it learned"
        result.flags.append(Flag(code="tokenizer", text=text, serious=True))


def _describe_rows(rows: Sequence[TokenRow]) -> Rows:
    return Rows(
        count=len(rows),
        learned_tokens=[row.target_count for row in rows],
        digest=value_digest([[row.ids, row.loss_mask, row.text] for row in rows]),
    )
