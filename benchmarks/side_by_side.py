"""Answers of a small model by one context on all CPU cores, and by several contexts of one thread each: time, processor time, the same answers.

    olpack build coding-assistant --no-deploy
    python benchmarks/side_by_side.py build/coding-assistant [--answers 100] [--times 3]

The requests are the package's tasks, greedy. Both ways take turns in one process. Prints a Markdown table and writes it to
benchmarks/side_by_side.md.
"""

from __future__ import annotations

import os
import time
from functools import partial
from pathlib import Path
from statistics import median

from page import command_line, measured_here, publish

from olpack.compare.results import read_results
from olpack.llamacpp.cores import usable_cores
from olpack.llamacpp.engine import Engine, Sampling
from olpack.llamacpp.side_by_side import side_by_side

CONTEXT, ANSWER_TOKENS = 2048, 64


def answers(file: Path, prompts: list[list[dict]], contexts: int) -> tuple[list[str], float, float]:
    """(answers, seconds, seconds of the processor)."""
    began, processor = time.perf_counter(), time.process_time()
    with Engine(file, CONTEXT, usable_cores()) as engine:

        def answer(ids: list[int], one: Engine) -> str:
            return "".join(one.generate(ids, ANSWER_TOKENS, Sampling(temperature=0)))

        works = [partial(answer, engine.tokenize(engine.chat_prompt(messages))) for messages in prompts]
        found = list(side_by_side(engine, works, contexts, usable_cores()))
    return found, time.perf_counter() - began, time.process_time() - processor


def main() -> None:
    parser = command_line(__file__, __doc__)
    parser.add_argument("build", type=Path)
    parser.add_argument("--answers", type=int, default=100)
    parser.add_argument("--times", type=int, default=3)
    arguments = parser.parse_args()
    results = read_results(arguments.build / "compare/results.json")
    prompts = [task.messages for task in results.tasks[: arguments.answers]]
    cores = usable_cores()
    load = os.getloadavg()[0]
    lines = [
        f"{measured_here(__file__)} {arguments.build.name}, beside other work (load average {load:.1f}).",
        "",
        f"{len(prompts)} answers, the median of {arguments.times} turns.",
        "",
        f"| quant | one context of {cores} threads, s | processor, s | {cores} contexts of one thread, s | processor, s | the same answers |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for file in sorted((arguments.build / "gguf").glob("*.gguf")):
        turns = {contexts: [] for contexts in (1, cores)}
        for _ in range(arguments.times):
            for contexts, made in turns.items():
                made.append(answers(file, prompts, contexts))
        said = [found for made in turns.values() for found, _, _ in made]
        same = sum(len(set(one)) == 1 for one in zip(*said, strict=True))
        figures = [median(turn[place] for turn in made) for made in turns.values() for place in (1, 2)]
        lines.append(f"| {file.stem.rpartition('-')[2]} | " + " | ".join(f"{figure:.1f}" for figure in figures) + f" | {same} of {len(prompts)} |")
    publish(lines, arguments.output)


if __name__ == "__main__":
    main()
