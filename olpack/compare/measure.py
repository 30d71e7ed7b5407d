"""Measure a set of GGUF files: each in a process of its own, speed through the server where there is one."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import TypeAdapter

from olpack import progress
from olpack.compare.adapter_cost import adapter_result, merged_result
from olpack.compare.cache import (
    ADAPTER_SPEED,
    DIVERGENCE_WITHOUT_IMPORTANCE,
    OTHER_DIVERGENCE,
    SPEED_UNITS,
    Cache,
    Key,
    Keys,
    Units,
    answer_keys,
    row_keys,
    speed_keys,
    suite_keys,
    suite_unit,
)
from olpack.compare.gain import set_gains
from olpack.compare.ggml_rounding import by_ggml, ggml_units, measure_by_ggml
from olpack.compare.hardware import describe_machine
from olpack.compare.job import AdapterJob, Asked, Job, RowJob, SuitesJob, asked_of, run_worker, started
from olpack.compare.recommend import recommend, set_losses
from olpack.compare.reference_models import (
    MergedModels,
    ReferenceFigures,
    ReferenceModels,
    measure_references,
    measure_without_importance,
    written,
)
from olpack.compare.result_flags import ExpectedScripts, flag_answers, flag_neighbours, flag_rows, flag_same_types
from olpack.compare.results import Divergence, Flag, MachineInfo, Perplexity, QuantResult, Results, Rows, Scores, Speed, SuiteScore, TaskAsked
from olpack.compare.scores import check_answers
from olpack.compare.server_speed import visit_through_server
from olpack.compare.settings import ComparedFile, MeasureSettings
from olpack.compare.speed import measure_speeds, speed_of, visit_embedded
from olpack.data.rows import TokenRow
from olpack.errors import OlpackError
from olpack.llamacpp.cores import usable_cores
from olpack.recipe.tasks import Task
from olpack.workspace import file_digest, value_digest

if TYPE_CHECKING:
    from olpack.deploy.client import OllamaClient

_BUSY = 0.3  # share of the CPU time used by other processes from which figures suffer


def measure(
    files: Sequence[ComparedFile],
    rows: Sequence[TokenRow],
    prompts: Sequence[list[dict]],
    settings: MeasureSettings,
    server: OllamaClient | None,
    name: str,
    cache: Path | None = None,
    references: ReferenceModels | None = None,
    tasks: Sequence[Task] = (),
    examples: Sequence[tuple[str, str]] = (),
    other: Sequence[TokenRow] = (),
    merged: MergedModels | None = None,
) -> Results:
    """Speed, memory, perplexity and answers of every file, with the recommendation.

    Speed, load time and memory come from the server where there is one, else from the embedded engine, in rounds that visit every file;
    perplexity and answers always come from the embedded engine, on the GGUF that is published.

    Args:
        files: the GGUFs; the results have their order.
        rows: held-out rows; empty: no perplexity, and so no recommendation.
        prompts: conversations (lists of messages, the last from the user) that every quant answers.
        server: a client of the Ollama server that has `<name>:<tag>` of every file, or None.
        name: of the package.
        cache: folder for what was measured, one JSON file per quant and kind of figure, under a key of all that it depends on.
            An interrupted comparison goes on from there, and an unchanged quant is not measured again. None: nothing is stored.
        references: how to make the models that the files are compared with. They are made only if a figure that is not in the cache needs
            them, and removed at once. None, or no rows: no KL divergence and no figures of the base.
        tasks: what every file, the base and the unquantized fine-tune are asked and scored on.
        other: rows outside the user's domain, on which the divergence is measured too, where there are references.
        examples: (request, answer) of held-out rows, which show in what script answers are expected.
        merged: how to make the merged file that is measured beside each file with an adapter. It is written only if a figure that is not in the
            cache needs it, and removed at once. None: there is none.

    Raises:
        OlpackError: nothing could be measured of any file. One file that fails is flagged in its result and does not stop the others.
    """
    embedded = f"llama-cpp-python {version('llama-cpp-python')}, embedded"
    server_version = server.version() if server else None
    machine = describe_machine(server_version)
    job = _job(embedded, rows, other, settings, machine.busy)
    described = _describe_rows(rows) if rows else None
    references = references if rows else None
    timed_by = f"Ollama {server_version}" if server else f"{embedded}, {job.threads} threads"
    keys = speed_keys(timed_by, machine.cpu, settings) | answer_keys(embedded, prompts, tasks, settings) | suite_keys(embedded, settings)
    in_turns = f"{embedded}, {job.threads} threads"
    keys[ADAPTER_SPEED] = speed_keys(in_turns, machine.cpu, settings)[SPEED_UNITS[0]]
    if described:
        keys |= row_keys(embedded, described, references.reference_key if references else None, _digest(other) if other else None)

    if settings.template:
        keys = {unit: key | {"template": value_digest(settings.template)} for unit, key in keys.items()}
    store = Cache(cache)
    measured = [_known(store, file, keys, references, merged) for file in files]
    with started(_job_count(measured, timed=server is None, references=references, tasks=bool(tasks))):
        _measure_speeds(measured, server, name, job, settings)
        figures = _measure_the_rest(measured, job, settings, prompts, tasks, keys, store, references, merged)
    engine, threads = (f"Ollama {server_version}", None) if server else (embedded, job.threads)
    timed = partial(speed_of, engine=engine, threads=threads, generated_tokens=settings.generated_tokens)
    rounding, scripts = references.rounding if references else None, ExpectedScripts(examples)
    quants = [_result(one, timed, in_turns, described, rounding) for one in measured]
    for result in quants:
        flag_answers(result, prompts, scripts)
    flag_same_types(quants, {file.quant: file.tensors for file in files})
    results = gather(name, machine, settings, prompts, tasks, quants, [one.problems for one in measured])
    results.rows, results.reference, results.base = described, figures.reference, figures.base
    results.other_text = other[0].source.rpartition(":")[0] if other and references else None
    results.flags = [Flag(code="reference", text=str(problem), serious=False) for problem in figures.problems]
    if described:
        set_losses(quants, described.learned_tokens)
        flag_neighbours(quants, described.learned_tokens)
    set_gains(results)
    results.recommendation = recommend(results, settings.tolerance)
    return results


@dataclass
class _Measured:
    """What is known of one file and of what it is compared with; None for what is not asked for.

    Attributes:
        own: of the file.
        merged: of the merged file that could be served in its place.
        alone: of the server's model of the file without its adapter.
        by_ggml: of the same quant by ggml's rounding.
        problems: what went wrong.
    """

    file: ComparedFile
    own: Units
    merged: Units | None
    alone: Units | None
    by_ggml: Units | None
    problems: list[OlpackError] = field(default_factory=list)


def _known(store: Cache, file: ComparedFile, keys: Keys, references: ReferenceModels | None, merged: MergedModels | None) -> _Measured:
    """What the cache has of a file."""
    return _Measured(
        file,
        own=_units(store, file, keys, references, merged),
        merged=_units_merged(store, file, keys, merged) if merged and file.adapter else None,
        alone=_units_alone(store, file, keys) if file.alone else None,
        by_ggml=ggml_units(references, store, file.quant, file.tag, keys) if references else None,
    )


def _job_count(measured: Sequence[_Measured], *, timed: bool, references: ReferenceModels | None, tasks: bool) -> int:
    """How many jobs there are at most, those left out that take models which are rarely there.

    Args:
        timed: whether the speeds are jobs.
        tasks: whether there are tasks.
    """
    speeds = sum(one.own.lacks(unit) for one in measured for unit in SPEED_UNITS) if timed else 0
    files = sum(any(one.own.lacks(unit) for unit in ("perplexity", "divergence", OTHER_DIVERGENCE, "tasks")) for one in measured)
    models = (1 + tasks + (references.write_base is not None)) if references and files else 0
    return speeds + files + models


def _measure_speeds(measured: Sequence[_Measured], server: OllamaClient | None, name: str, job: Job, settings: MeasureSettings) -> None:
    """Measure the speed of every file, and of the server's models without their adapters, in rounds that visit all of them."""
    own, alone = [one.own for one in measured], [(one, one.alone) for one in measured if one.alone]
    units = [*own, *(units for _, units in alone)]
    if server:
        models = [f"{name}:{one.file.tag}" for one in measured] + [one.file.alone for one, _ in alone if one.file.alone]
        visit = visit_through_server(server, models, units, settings)
    else:
        visit = visit_embedded([one.file for one in measured], own, job, settings)
    for one, failed in zip([*measured, *(one for one, _ in alone)], measure_speeds(units, visit, settings.repeats), strict=True):
        one.problems += failed


def _measure_the_rest(
    measured: Sequence[_Measured],
    job: Job,
    settings: MeasureSettings,
    prompts: Sequence[list[dict]],
    tasks: Sequence[Task],
    keys: Keys,
    store: Cache,
    references: ReferenceModels | None,
    merged: MergedModels | None,
) -> ReferenceFigures:
    """Measure all but the speed of files as they are served. The models that they are compared with are there for as long as that takes.

    Returns:
        the figures of the reference models.
    """
    figures = ReferenceFigures()
    with ExitStack() as temporary:
        if merged:
            temporary.callback(shutil.rmtree, merged.folder, ignore_errors=True)
        if references:
            compared = ("divergence", OTHER_DIVERGENCE, DIVERGENCE_WITHOUT_IMPORTANCE)
            needed = any(units.lacks(unit) for one in measured for units in (one.own, one.by_ggml) if units for unit in compared)
            needed |= any(one.merged.lacks("divergence") for one in measured if one.merged)
            figures = measure_references(references, job, keys, store, needed, temporary.enter_context(references.temporary()), tasks)
        for one in measured:
            one.problems += _measure_quality(one.file, one.own, job, settings, prompts, tasks, figures)
            if merged and one.merged:
                one.problems += _measure_merged(one.file, one.own, one.merged, merged, job, settings, tasks, figures)
            elif one.own.lacks(ADAPTER_SPEED):
                one.problems += _measure_in_turns(one.file, one.own, job, settings, None)
            if references and references.write_without_importance and figures.logits and one.own.lacks(DIVERGENCE_WITHOUT_IMPORTANCE):
                write, folder = references.write_without_importance, references.folder
                figures.problems += measure_without_importance(write, folder, one.file.quant, job, figures.logits, one.own)
            if references and one.by_ggml:
                figures.problems += measure_by_ggml(references, one.file.quant, job, figures, tasks, one.by_ggml)
    return figures


def _result(one: _Measured, timed: Callable[[Units], Speed | None], in_turns: str, described: Rows | None, rounding: str | None) -> QuantResult:
    """The result of a file.

    Args:
        timed: gives the speed that units have.
        in_turns: the engine that measures an adapter's cost in turns.
        described: the rows, if there are any.
        rounding: of the quants, where they are compared with ggml's.
    """
    file, result = one.file, _identity(one.file)
    add_figures(result, one.own, speed := timed(one.own), one.problems)
    if file.adapter:
        served = [speed, timed(one.alone)] if one.alone else []
        result.adapter = adapter_result(file.adapter.stat().st_size, one.own, in_turns, served)
        if one.merged and described:
            result.adapter.merged = merged_result(result, one.merged, described.learned_tokens)
    if described:
        flag_rows(result, described)
        if rounding and one.by_ggml and one.by_ggml.known:
            result.by_ggml = by_ggml(result, rounding, one.by_ggml, described.learned_tokens)
    return result


def _job(engine: str, rows: Sequence[TokenRow], other: Sequence[TokenRow], settings: MeasureSettings, busy: float) -> Job:
    """The job of every worker, with nothing to measure yet. `busy` is the share of the CPU time that other processes use."""
    threads = untimed = settings.threads or usable_cores()
    if busy > _BUSY:
        # A thread that shares its core with another process makes all other threads wait: fewer threads are much faster then.
        untimed = max(1, round(threads * (1 - busy)))
        progress.warn(f"Other processes use {busy:.0%} of this machine's CPU time: measuring will take long, and speeds will come out low.")
    return Job(
        path=Path(),
        engine=engine,
        context=settings.context,
        threads=threads,
        untimed_threads=untimed,
        answer_tokens=settings.answer_tokens,
        template=settings.template,
        rows=[RowJob(ids=row.ids, loss_mask=row.loss_mask, text=row.text) for row in rows],
        other_rows=[RowJob(ids=row.ids, loss_mask=row.loss_mask, text=row.text) for row in other],
    )


def _weights(file: ComparedFile) -> Key:
    return {"file": file.sha256} | ({"adapter": file_digest(file.adapter)} if file.adapter else {})


def _units(store: Cache, file: ComparedFile, keys: Keys, references: ReferenceModels | None, merged: MergedModels | None) -> Units:
    own = {unit: key | _weights(file) for unit, key in keys.items()}
    if not file.adapter:
        del own[ADAPTER_SPEED]
    elif merged:
        own[ADAPTER_SPEED] |= {"merged": merged.keys[file.quant]}
    for unit in SPEED_UNITS if file.alone else ():
        own[unit] |= {"beside": file.alone}  # both are measured in the same rounds, or their difference may be that of two days
    if references and (digest := references.without_importance_keys.get(file.quant)):
        own[DIVERGENCE_WITHOUT_IMPORTANCE] = keys["divergence"] | {"file": digest}
    return Units(store, file.tag, own)


def _units_alone(store: Cache, file: ComparedFile, keys: Keys) -> Units:
    """Of a server's model of the file without its adapter: its speed, and nothing else."""
    return Units(store, f"{file.tag}-alone", {unit: keys[unit] | _weights(file) | {"alone": file.alone} for unit in SPEED_UNITS})


def _units_merged(store: Cache, file: ComparedFile, keys: Keys, merged: MergedModels) -> Units:
    units: Keys = {"size": {}} | {unit: keys[unit] for unit in ("perplexity", "divergence", "tasks", "scores") if unit in keys}
    return Units(store, f"{file.tag}-merged", {unit: key | {"merged": merged.keys[file.quant]} for unit, key in units.items()})


def _measure_merged(
    file: ComparedFile,
    units: Units,
    of_merged: Units,
    merged: MergedModels,
    job: Job,
    settings: MeasureSettings,
    tasks: Sequence[Task],
    figures: ReferenceFigures,
) -> list[OlpackError]:
    """Measure the merged file that could be served in place of a file with its adapter, and all of them in turns.

    Returns:
        what went wrong.
    """
    wanted = ["size", "perplexity", "tasks"] + (["divergence"] if figures.logits else [])
    if not units.lacks(ADAPTER_SPEED) and not any(of_merged.lacks(unit) for unit in wanted):
        return []
    try:
        with written(merged.write, file.quant, merged.folder) as path:
            of_merged.add("size", {"bytes": path.stat().st_size})
            one = replace(file, quant=f"{file.quant} merged", path=path, adapter=None)
            problems = _measure_quality(one, of_merged, job, replace(settings, suites=()), (), tasks, figures)
            if units.lacks(ADAPTER_SPEED):
                problems += _measure_in_turns(file, units, job, settings, path)
    except OlpackError as error:
        problems = [error]
    return problems


def _measure_in_turns(file: ComparedFile, units: Units, job: Job, settings: MeasureSettings, merged: Path | None) -> list[OlpackError]:
    plan = AdapterJob(prompt_tokens=max(settings.prompt_lengths), generated_tokens=settings.generated_tokens, repeats=settings.repeats, merged=merged)
    return run_worker(job.model_copy(update={"path": file.path, "adapter": file.adapter, "adapter_speed": plan}), f"{file.quant} in turns", units)


def _measure_quality(
    file: ComparedFile,
    units: Units,
    job: Job,
    settings: MeasureSettings,
    prompts: Sequence[list[dict]],
    tasks: Sequence[Task],
    figures: ReferenceFigures,
) -> list[OlpackError]:
    """Measure whatever speed is not and is not known yet.

    Returns:
        what went wrong.
    """
    wanted: dict[str, object] = {
        "perplexity": bool(job.rows),
        "divergence": figures.logits,
        OTHER_DIVERGENCE: figures.other_logits,
        "answers": [Asked(messages=messages) for messages in prompts],
        "tasks": asked_of(tasks),
    }
    missing = {unit: value for unit, value in wanted.items() if value and unit not in units.known}
    if suites := [suite for suite in settings.suites if units.lacks(suite_unit(suite))]:
        folder = Path(settings.suite_folder) if settings.suite_folder else None
        missing["suites"] = SuitesJob(names=suites, folder=folder, limit=settings.suite_limit)
    problems = []
    if missing:
        problems += run_worker(job.model_copy(update={"path": file.path, "adapter": file.adapter, **missing}), file.quant, units)
    try:
        check_answers(tasks, units, file.quant)
    except OlpackError as error:
        problems.append(error)
    return problems


def _identity(file: ComparedFile) -> QuantResult:
    """The result of a file before anything is known of it."""
    return QuantResult(
        quant=file.quant,
        tag=file.tag,
        file=file.path.name,
        sha256=file.sha256,
        size_bytes=file.size,
        bits_per_weight=file.bits_per_weight,
        types={kind: dict(counts) for kind, counts in file.types.items()},
    )


def _describe_rows(rows: Sequence[TokenRow]) -> Rows:
    return Rows(
        count=len(rows),
        learned_tokens=[row.target_count for row in rows],
        digest=_digest(rows),
    )


def _digest(rows: Sequence[TokenRow]) -> str:
    return value_digest([[row.ids, row.loss_mask, row.text] for row in rows])


def add_figures(result: QuantResult, units: Units, speed: Speed | None, problems: Sequence[OlpackError]) -> None:
    """Fill in what is known of one file or model, and what went wrong as flags."""
    result.speed = speed
    result.perplexity = units.get("perplexity", Perplexity)
    result.divergence = units.get("divergence", Divergence)
    result.divergence_without_importance = units.get(DIVERGENCE_WITHOUT_IMPORTANCE, Divergence)
    result.other_text = units.get(OTHER_DIVERGENCE, Divergence)
    result.answers, result.task_answers = units.answers("answers"), units.answers("tasks")
    result.scores = units.get("scores", Scores)
    suites = [data["scores"] for unit, data in units.known.items() if unit.startswith(suite_unit(""))]
    result.suites = [SuiteScore.model_validate(score) for scores in suites for score in scores]
    # The same crash ends every measurement: one flag is enough. A file whose quality is known can be recommended without its speed.
    serious = result.perplexity is None
    result.flags = [Flag(code="failed", text=text, serious=serious) for text in dict.fromkeys(str(error) for error in problems)]
    if speed and speed.others:
        text = f"while its speed was measured, the server also had {', '.join(speed.others)} loaded"
        result.flags.append(Flag(code="shared", text=text, serious=False))


def gather(
    name: str,
    machine: MachineInfo,
    settings: MeasureSettings,
    prompts: Sequence[list[dict]],
    tasks: Sequence[Task],
    quants: list[QuantResult],
    problems: Sequence[Sequence[OlpackError]],
) -> Results:
    """The results of all files or models together. `problems` are what went wrong, by file.

    Raises:
        OlpackError: nothing could be measured of any file; the first thing that went wrong.
    """
    if any(problems) and not any(quant.speed or quant.perplexity or quant.answers for quant in quants):
        raise next(failed[0] for failed in problems if failed)
    asked = [TaskAsked(messages=task.messages, tools=task.tools, check=task.check, expected=_expected(task), source=task.source) for task in tasks]
    return Results(
        name=name,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        machine=machine,
        settings=TypeAdapter(MeasureSettings).dump_python(settings, mode="json"),
        prompts=list(prompts),
        tasks=asked,
        quants=quants,
    )


def _expected(task: Task) -> str | list[str]:
    return f"{task.expected[0].name}:{task.expected[1]}" if task.check == "function" else task.expected
