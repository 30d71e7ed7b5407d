"""One GGUF, measured in a process of its own: with a fresh resident set, and without harm to others where llama.cpp crashes.

    python -m olpack.compare.worker < job.json

The job (`Job`) is JSON on stdin. The events on stdout are JSON lines, each flushed, so that what was measured survives a later crash:

    {"event": "ready"}                                                              once, before the job is read
    {"event": "progress", "unit": "perplexity", "done": 12, "total": 100}
    {"event": "result", "unit": "perplexity", "data": {…}}         a SpeedRound, Perplexity or Divergence, {"rows": …} of logits, {"answers": […]}
    {"event": "failed", "unit": "answers", "problem": "…", "remedy": "…"}

How speed is measured (as llama-bench does): a prompt is a run of random token ids, new for each repeat; generation feeds one random token
after another, and choosing them takes no time. The first run of each is discarded.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import psutil

from olpack.compare.adapter_cost import AdapterRuns
from olpack.compare.cache import ADAPTER_SPEED, SPEED_UNITS, suite_unit
from olpack.compare.divergence import LogitsWriter, open_logits, summarize
from olpack.compare.hardware import bytes_read, drop_from_cache, joules, peak_resident
from olpack.compare.job import READY, AdapterJob, Asked, Job, SpeedJob, SuitesJob
from olpack.compare.perplexity import perplexity
from olpack.compare.result_flags import answer_of
from olpack.compare.results import Answer, Perplexity
from olpack.compare.settings import OTHER_LOGITS_BYTES
from olpack.compare.speed import PromptRun, SpeedRound
from olpack.errors import OlpackError
from olpack.llamacpp.engine import Engine, Sampling, llama_cpp
from olpack.llamacpp.logits import kl_divergence, log_softmax
from olpack.llamacpp.side_by_side import side_by_side

_BEFORE_GENERATION = 32  # tokens already in the context when generation is timed


def main() -> None:
    # llama.cpp and its backends may print; the events have a stdout of their own.
    events = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def send(**event: object) -> None:
        print(json.dumps(event), file=events, flush=True)

    send(**READY)
    job = Job.model_validate_json(sys.stdin.buffer.read())

    def show_suites(done: int, total: int) -> None:
        send(event="progress", unit="suites", done=done, total=total)

    # Nothing is measured before its generator is iterated.
    wanted: dict[str, Steps] = {}
    if job.speed:
        wanted["speed"] = measure_speed(job, job.speed)
    if job.adapter_speed:
        wanted[ADAPTER_SPEED] = measure_adapter(job, job.adapter_speed)
    if job.perplexity or job.write_logits or job.divergence:
        wanted["rows"] = measure_rows(job)
    if job.write_other_logits or job.other_divergence:
        wanted["other text"] = measure_other_text(job)
    if job.answers:
        wanted["answers"] = measure_answers(job, "answers", job.answers)
    if job.tasks:
        wanted["tasks"] = measure_answers(job, "tasks", job.tasks)
    if job.suites:
        wanted["suites"] = measure_suites(job, job.suites, show_suites)
    for unit, steps in wanted.items():
        try:
            for step in steps:
                if isinstance(step, tuple):
                    send(event="progress", unit=unit, done=step[0], total=step[1])
                else:
                    for name, data in step.items():
                        send(event="result", unit=name, data=data)
        except OlpackError as error:
            send(event="failed", unit=unit, problem=error.problem, remedy=error.remedy)


Steps = Iterator[tuple[int, int] | dict[str, dict[str, Any]]]  # (done, total) any number of times, then the results by unit


def measure_speed(job: Job, plan: SpeedJob) -> Steps:
    """One round of load, prompt and generation speed, and memory.

    Load time is from opening the file until one token has gone through the model. Memory is the growth of this process's resident set from
    just before the load to its peak after the timed runs: the weights as far as they were touched (mapped pages count), weights repacked
    for the CPU, KV cache and compute buffers. Memory on a GPU is not counted. Only the first round's first load can be cold.
    """
    total = (len(plan.prompt_lengths) + 1) * (plan.repeats + 1) + 2
    done = 0
    cold = plan.round == 0 and drop_from_cache(job.path)
    before, read_before = psutil.Process().memory_info().rss, bytes_read()
    started = time.perf_counter()
    with _open(job, job.context) as engine:
        first_load = time.perf_counter() - started
        # Dropping is a request: the load was cold only if the file was read from the disk.
        cold = cold and bytes_read() - read_before > job.path.stat().st_size / 2
        yield (done := done + 1), total

        fresh = random.Random(plan.round)

        def tokens(count: int) -> list[int]:
            return [fresh.randrange(engine.vocabulary_size) for _ in range(count)]

        prompts: list[PromptRun] = []
        for length in dict.fromkeys(min(length, job.context - plan.generated_tokens) for length in plan.prompt_lengths):
            for repeat in range(plan.repeats + 1):
                ids = tokens(length)
                seconds = _prompt_s(engine, ids)  # the logits of the first token are computed then
                if repeat:
                    prompts.append(PromptRun(asked=length, tokens=length, seconds=seconds, first_token_s=seconds))
                yield (done := done + 1), total

        rates: list[float] = []
        energies: list[float] = []
        for repeat in range(plan.repeats + 1):
            engine.process(tokens(min(_BEFORE_GENERATION, job.context - plan.generated_tokens)))
            ids = tokens(plan.generated_tokens)
            used = joules()
            seconds = _generation_s(engine, ids)
            if repeat:
                rates.append(len(ids) / seconds)
                if llama_cpp.llama_supports_gpu_offload() and used is not None and (now := joules()) is not None:
                    energies.append((now - used) / len(ids))
            yield (done := done + 1), total
        peak = peak_resident()

    started = time.perf_counter()
    with _open(job, job.context):
        again = time.perf_counter() - started
    measured = SpeedRound(
        context=job.context,
        load_cold_s=first_load if cold else None,
        loads_s=[again] if plan.round == 0 else [first_load, again],
        prompts=prompts,
        generation_tokens_per_s=rates,
        joules_per_token=energies,
        memory_bytes=peak - before,
    )
    yield {SPEED_UNITS[plan.round]: measured.model_dump(mode="json")}


def measure_adapter(job: Job, plan: AdapterJob) -> Steps:
    """Prompt and generation speed with the adapter, without it, and of the merged file where there is one, in turns.

    The file is loaded once, and the adapter applied or left out between two runs, so nothing else differs. Each turn runs all of them, in
    the opposite order of the turn before. The first turn is discarded.
    """
    fresh = random.Random(0)
    runs = AdapterRuns(prompt_tokens=min(plan.prompt_tokens, job.context - plan.generated_tokens))
    with ExitStack() as opened:
        engine = opened.enter_context(Engine(job.path, job.context, job.threads, adapter=job.adapter, max_outputs=1))
        models: list[tuple[str, Engine, bool]] = [("with_adapter", engine, True), ("without", engine, False)]
        if plan.merged:
            models.append(("merged", opened.enter_context(Engine(plan.merged, job.context, job.threads, max_outputs=1)), False))
        for turn in range(plan.repeats + 1):
            for name, one, applied in models if turn % 2 else reversed(models):
                one.apply_adapter(applied)
                prompt, before, generated = (
                    [fresh.randrange(engine.vocabulary_size) for _ in range(count)]
                    for count in (runs.prompt_tokens, min(_BEFORE_GENERATION, runs.prompt_tokens), plan.generated_tokens)
                )
                one.process(before)  # what a change of the adapter costs once is no part of the speed
                prompt_s = _prompt_s(one, prompt)
                one.process(before)
                generation_s = _generation_s(one, generated)
                if turn:
                    runs.prompt.setdefault(name, []).append(len(prompt) / prompt_s)
                    runs.generation.setdefault(name, []).append(len(generated) / generation_s)
            yield turn + 1, plan.repeats + 1
    yield {ADAPTER_SPEED: runs.model_dump(mode="json")}


def _prompt_s(engine: Engine, ids: Sequence[int]) -> float:
    started = time.perf_counter()
    engine.process(ids)
    return time.perf_counter() - started


def _generation_s(engine: Engine, ids: Sequence[int]) -> float:
    started = time.perf_counter()
    for token in ids:
        engine.extend(token)
    return time.perf_counter() - started


@dataclass
class _RowScores:
    """Of one row: the negative log-likelihood of its target tokens in nats, their divergences from the reference and how many have its top token,
    and whether the GGUF's tokenizer gives the row's ids."""

    nll: float = 0.0
    divergences: list[float] = field(default_factory=list)
    same_top: int = 0
    same_tokens: bool = False


def measure_rows(job: Job) -> Steps:
    """One pass over the rows for all that is computed from the logits of the target tokens.

    Perplexity, and whether the GGUF's tokenizer gives the training's ids; the logits themselves, written for other files; the divergence from
    a reference's logits. Where only the divergence is wanted, only the rows that have reference logits are run.
    """
    every_row = job.perplexity or job.write_logits is not None
    compared_rows = job.divergence.rows if job.divergence else 0
    rows = job.rows if every_row else job.rows[:compared_rows]
    counts = [sum(row.loss_mask[1:]) for row in job.rows]
    starts = [0, *itertools.accumulate(counts)]
    scores: list[_RowScores] = []
    with ExitStack() as opened:
        engine = opened.enter_context(Engine(job.path, max(len(row.ids) for row in rows), job.untimed_threads, adapter=job.adapter))
        written = opened.enter_context(LogitsWriter(job.write_logits, counts, engine.vocabulary_size, job.logits_bytes)) if job.write_logits else None
        references = open_logits(job.divergence.path, starts[compared_rows], engine.vocabulary_size) if job.divergence else None

        def score(number: int, one: Engine) -> _RowScores:
            row, found = rows[number], _RowScores()
            reference = references[starts[number] : starts[number + 1]] if references is not None and number < compared_rows else None
            for position, (token, logits) in enumerate(one.scored(row.ids, row.loss_mask)):
                own = log_softmax(logits)
                found.nll -= float(own[token])
                if written:
                    written.add(number, logits)
                if reference is not None:
                    found.divergences.append(kl_divergence(log_softmax(reference[position]), own))
                    found.same_top += int(np.argmax(reference[position]) == np.argmax(logits))
            found.same_tokens = one.tokenize(row.text) == row.ids
            return found

        works = [partial(score, number) for number in range(len(rows))]
        for row_scores in side_by_side(engine, works, job.threads, job.untimed_threads):
            scores.append(row_scores)
            yield len(scores), len(rows)
    sums, divergences = [one.nll for one in scores], [one.divergences for one in scores[:compared_rows]]
    results: dict[str, dict[str, Any]] = {}
    if job.perplexity:
        value, error = perplexity(sums, counts)
        results["perplexity"] = Perplexity(
            value=value if math.isfinite(value) else None,
            standard_error=error if error is not None and math.isfinite(error) else None,
            row_nll=[total if math.isfinite(total) else None for total in sums],
            same_tokens_rows=sum(one.same_tokens for one in scores),
        ).model_dump(mode="json")
    if written:
        results["logits"] = {"rows": written.rows}
    if job.divergence and divergences and all(math.isfinite(value) for row in divergences for value in row):
        results["divergence"] = summarize(job.divergence.quant, divergences, [one.same_top for one in scores[:compared_rows]]).model_dump(mode="json")
    yield results


def measure_other_text(job: Job) -> Steps:
    """Logits or divergence on the rows outside the user's domain, as `measure_rows` takes them, under units of their own."""
    rows = {"rows": job.other_rows, "write_logits": job.write_other_logits, "divergence": job.other_divergence}
    for step in measure_rows(job.model_copy(update={**rows, "perplexity": False, "logits_bytes": OTHER_LOGITS_BYTES})):
        yield step if isinstance(step, tuple) else {f"other_{unit}": data for unit, data in step.items()}


def measure_answers(job: Job, unit: str, conversations: Sequence[Asked]) -> Steps:
    """A free answer to each conversation of a unit, at temperature 0."""
    answers = []
    with Engine(job.path, job.context, job.untimed_threads, adapter=job.adapter, template=job.template) as engine:

        def answer(prompt: str, one: Engine) -> Answer:
            generation = one.generate(one.tokenize(prompt), job.answer_tokens, Sampling(temperature=0))
            text = "".join(generation)  # finish and tokens are final only now
            return answer_of(text, generation.finish, generation.tokens, prompt=prompt)

        works = [partial(answer, engine.chat_prompt(asked.messages, asked.tools)) for asked in conversations]
        for done, made in enumerate(side_by_side(engine, works, job.threads, job.untimed_threads), 1):
            answers.append(made.model_dump(mode="json"))
            yield done, len(conversations)
    yield {unit: {"answers": answers}}


def measure_suites(job: Job, suites: SuitesJob, show: Callable[[int, int], None]) -> Steps:
    """Each suite's scores as a unit of its own. The harness runs for long between two results; `show` is called with its (done, total)."""
    from olpack.compare.harness import run_suite  # a large import that only this needs

    with Engine(job.path, job.context, job.untimed_threads, adapter=job.adapter, template=job.template) as engine:
        for name in suites.names:
            scores = run_suite(engine, name, suites.folder, suites.limit, show)
            yield {suite_unit(name): {"scores": [score.model_dump(mode="json") for score in scores]}}


def _open(job: Job, context: int) -> Engine:
    engine = Engine(job.path, context, job.threads, adapter=job.adapter, max_outputs=1)
    engine.process([0])
    return engine


if __name__ == "__main__":
    main()
