"""One GGUF, measured in a process of its own: a fresh resident set, and a crash of llama.cpp that takes nobody with it.

    python -m olpack.compare.worker < job.json

The job (`Job`) is JSON on stdin. What comes out on stdout is JSON lines, each flushed, so that what was measured survives a later crash:

    {"event": "progress", "unit": "perplexity", "done": 12, "total": 100}
    {"event": "result", "unit": "perplexity", "data": {…}}         a SpeedRound, Perplexity or Divergence, {"rows": …} kept, {"answers": […]}
    {"event": "failed", "unit": "answers", "problem": "…", "remedy": "…"}

How speed is taken (as llama-bench does): a prompt is a run of random token ids, new for each repeat; generation feeds one random token
after another and takes no time for choosing them. The first run of each is discarded.
"""

from __future__ import annotations

import json
import math
import os
import random
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import numpy as np
import psutil

from olpack.compare.answers import answer_of
from olpack.compare.divergence import LogitsWriter, open_logits, summarize
from olpack.compare.energy import joules
from olpack.compare.job import Job
from olpack.compare.perplexity import perplexity
from olpack.compare.results import Perplexity
from olpack.compare.rounds import PromptRun, SpeedRound
from olpack.compare.units import suite_unit
from olpack.errors import OlpackError
from olpack.llamacpp.engine import Engine, Sampling, llama_cpp
from olpack.llamacpp.logits import kl_divergence, log_softmax

_BEFORE_GENERATION = 32  # tokens already in the context when generation is timed


def main() -> None:
    # llama.cpp and its backends may print; the events have a stdout of their own.
    events = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def send(**event: object) -> None:
        print(json.dumps(event), file=events, flush=True)

    job = Job.model_validate_json(sys.stdin.buffer.read())
    for unit, measure, wanted in (
        ("speed", measure_speed, job.speed),
        ("rows", measure_rows, job.perplexity or job.keep_logits or job.divergence),
        ("answers", partial(measure_answers, unit="answers"), job.answers),
        ("tasks", partial(measure_answers, unit="tasks"), job.tasks),
        ("suites", partial(measure_suites, show=lambda done, total: send(event="progress", unit="suites", done=done, total=total)), job.suites),
    ):
        if not wanted:
            continue
        try:
            for step in measure(job):
                if isinstance(step, tuple):
                    send(event="progress", unit=unit, done=step[0], total=step[1])
                else:
                    for name, data in step.items():
                        send(event="result", unit=name, data=data)
        except OlpackError as error:
            send(event="failed", unit=unit, problem=error.problem, remedy=error.remedy)


Steps = Iterator[tuple[int, int] | dict[str, dict]]  # (done, total) any number of times, then the results by unit


def measure_speed(job: Job) -> Steps:
    """One round of load, prompt and generation speed, and memory.

    Load time is from opening the file until one token has gone through the model. Memory is the growth of this process's resident set from
    just before the load to its peak after the timed runs: the weights as far as they were touched (mapped pages count), weights repacked
    for the CPU, KV cache and compute buffers. Memory on a GPU is not in it. Only the first round's first load can be cold.
    """
    plan = job.speed
    total = (len(plan.prompt_lengths) + 1) * (plan.repeats + 1) + 2
    done = 0
    cold = plan.round == 0 and _drop_from_cache(job.path)
    before, read_before = psutil.Process().memory_info().rss, _bytes_read()
    started = time.perf_counter()
    with _open(job, job.context) as engine:
        first_load = time.perf_counter() - started
        # Dropping is a request: the load was cold only if the file was read from the disk.
        cold = cold and _bytes_read() - read_before > job.path.stat().st_size / 2
        yield (done := done + 1), total

        fresh = random.Random(plan.round)

        def tokens(count: int) -> list[int]:
            return [fresh.randrange(engine.vocabulary_size) for _ in range(count)]

        prompts = []
        for length in dict.fromkeys(min(length, job.context - plan.generated_tokens) for length in plan.prompt_lengths):
            for repeat in range(plan.repeats + 1):
                ids = tokens(length)
                started = time.perf_counter()
                engine.process(ids)  # what chooses the first token is there when it returns
                seconds = time.perf_counter() - started
                if repeat:
                    prompts.append(PromptRun(asked=length, tokens=length, seconds=seconds, first_token_s=seconds))
                yield (done := done + 1), total

        rates, energies = [], []
        for repeat in range(plan.repeats + 1):
            engine.process(tokens(min(_BEFORE_GENERATION, job.context - plan.generated_tokens)))
            ids = tokens(plan.generated_tokens)
            used, started = joules(), time.perf_counter()
            for token in ids:
                engine.extend(token)
            if repeat:
                rates.append(len(ids) / (time.perf_counter() - started))
                if llama_cpp.llama_supports_gpu_offload() and used is not None and (now := joules()) is not None:
                    energies.append((now - used) / len(ids))
            yield (done := done + 1), total
        peak = _peak_resident()

    started = time.perf_counter()
    with _open(job, job.context):
        again = time.perf_counter() - started
    found = SpeedRound(
        context=job.context,
        load_cold_s=first_load if cold else None,
        loads_s=[again] if plan.round == 0 else [first_load, again],
        prompts=prompts,
        generation_tokens_per_s=rates,
        joules_per_token=energies,
        memory_bytes=peak - before,
    )
    yield {f"speed-{plan.round}": found.model_dump(mode="json")}


def measure_rows(job: Job) -> Steps:
    """One pass over the rows for all that is taken from the target tokens' logits.

    Perplexity, and whether the GGUF's tokenizer gives the training's ids; the logits themselves, kept for other files; the divergence from
    logits that were kept. Where only the divergence is wanted, only the rows that have kept logits are run.
    """
    all_rows = job.perplexity or job.keep_logits is not None
    rows = job.rows if all_rows else job.rows[: job.divergence.rows]
    counts = [sum(row.loss_mask[1:]) for row in job.rows]
    sums, same_tokens, divergences, same_top = [], 0, [], []
    with ExitStack() as opened:
        engine = opened.enter_context(Engine(job.path, max(len(row.ids) for row in rows), job.untimed_threads, adapter=job.adapter))
        kept = opened.enter_context(LogitsWriter(job.keep_logits, counts, engine.vocabulary_size)) if job.keep_logits else None
        against = None
        if job.divergence:
            against = iter(open_logits(job.divergence.path, sum(counts[: job.divergence.rows]), engine.vocabulary_size))
        for number, row in enumerate(rows):
            compared = against is not None and number < job.divergence.rows
            total, row_divergences, row_same = 0.0, [], 0
            for token, logits in engine.scored(row.ids, row.loss_mask):
                scores = log_softmax(logits)
                total -= float(scores[token])
                if kept:
                    kept.add(number, logits)
                if compared:
                    reference = next(against)
                    row_divergences.append(kl_divergence(log_softmax(reference), scores))
                    row_same += int(np.argmax(reference) == np.argmax(logits))
            sums.append(total)
            same_tokens += engine.tokenize(row.text) == row.ids
            if compared:
                divergences.append(row_divergences)
                same_top.append(row_same)
            yield number + 1, len(rows)
    found: dict[str, dict] = {}
    if job.perplexity:
        value, error = perplexity(sums, counts)
        found["perplexity"] = Perplexity(
            value=value if math.isfinite(value) else None,
            standard_error=error if error is not None and math.isfinite(error) else None,
            row_nll=[total if math.isfinite(total) else None for total in sums],
            same_tokens_rows=same_tokens,
        ).model_dump(mode="json")
    if kept:
        found["logits"] = {"rows": kept.rows}
    if divergences and all(math.isfinite(value) for row in divergences for value in row):
        found["divergence"] = summarize(job.divergence.quant, divergences, same_top).model_dump(mode="json")
    yield found


def measure_answers(job: Job, unit: str) -> Steps:
    """A free answer to each conversation of the unit, at temperature 0."""
    answers, conversations = [], getattr(job, unit)
    with Engine(job.path, job.context, job.untimed_threads, adapter=job.adapter) as engine:
        for done, messages in enumerate(conversations, 1):
            generation = engine.generate(messages, job.answer_tokens, Sampling(temperature=0))
            text = "".join(generation)  # finish and tokens are final only now
            answer = answer_of(text, generation.finish, generation.tokens, prompt=engine.chat_prompt(messages))
            answers.append(answer.model_dump(mode="json"))
            yield done, len(conversations)
    yield {unit: {"answers": answers}}


def measure_suites(job: Job, show: Callable[[int, int], None]) -> Steps:
    """Each suite's scores as a unit of its own. The harness runs for long between two results; `show` gets its (done, total)."""
    from olpack.compare.harness import run_suite  # a large import that only this needs

    with Engine(job.path, job.context, job.untimed_threads, adapter=job.adapter) as engine:
        for name in job.suites.names:
            scores = run_suite(engine, name, job.suites.folder, job.suites.limit, show)
            yield {suite_unit(name): {"scores": [score.model_dump(mode="json") for score in scores]}}


def _open(job: Job, context: int) -> Engine:
    engine = Engine(job.path, context, job.threads, adapter=job.adapter, max_outputs=1)
    engine.process([0])
    return engine


def _drop_from_cache(path: Path) -> bool:
    """Ask the system to forget the file's pages; False where it cannot be asked."""
    if not hasattr(os, "posix_fadvise") or not path.is_file():
        return False
    with path.open("rb") as file:
        os.fsync(file.fileno())  # pages not yet written cannot be dropped
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return True


def _bytes_read() -> int:
    """Bytes that this process had fetched from storage, page faults included; 0 where the system does not count them."""
    try:
        return psutil.Process().io_counters().read_bytes
    except (AttributeError, psutil.Error, OSError):
        return 0


def _peak_resident() -> int:
    """Largest resident set of this process so far, in bytes; where the system keeps no peak, what it is now.

    getrusage's ru_maxrss will not do on Linux: across exec it keeps the peak of the parent, which may have trained a model.
    """
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    memory = psutil.Process().memory_info()
    return getattr(memory, "peak_wset", memory.rss)


if __name__ == "__main__":
    main()
