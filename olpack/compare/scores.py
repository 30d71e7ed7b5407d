"""Scores of answers to tasks: each answer by its task's check, from 0 to 1, and their mean with its standard error.

The Python of an answer runs in `sandbox`; a function of the user runs in this process. Both run only with `compare.run_answers`.
"""

from __future__ import annotations

import ast
import importlib.util
import inspect
import json
import math
import re
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, lru_cache
from pathlib import Path
from statistics import fmean, stdev
from types import ModuleType

from olpack import progress
from olpack.compare.cache import Units
from olpack.compare.results import CheckScore, Scores
from olpack.compare.sandbox import asserts_hold
from olpack.errors import OlpackError
from olpack.llamacpp.cores import usable_cores
from olpack.recipe.tasks import CHECKS, Task, call_text
from olpack.templating import Exceeded, bounded
from olpack.workspace import file_digest

_SEARCH_S = 2.0  # that a regular expression may take for an answer
_FENCE = re.compile(r"^```[^\n]*\n(.*?)(?:^```|\Z)", re.DOTALL | re.MULTILINE)


def score_answers(tasks: Sequence[Task], answers: Sequence[str | None], name: str) -> Scores | None:
    """Check every answer.

    Args:
        tasks, answers: of the same length; None for an answer that was cut before it began, which is not scored.
        name: whose answers they are, for the progress shown.

    Returns:
        None where there is no answer to score.

    Raises:
        OlpackError: as `score`.
    """
    # Checks that wait for a process run in parallel. The others run in this thread, the only one in which a regular expression can be ended.
    with progress.task(f"checking {name}", len(tasks), "answers") as shown, ThreadPoolExecutor(usable_cores()) as pool:
        pairs = list(zip(tasks, answers, strict=True))
        running = [pool.submit(score, task, answer) if answer is not None and task.check == "python_asserts" else None for task, answer in pairs]
        values: list[float | None] = []
        for (task, answer), future in zip(pairs, running, strict=True):
            values.append(future.result() if future else None if answer is None else score(task, answer))
            shown.advance()
    checks = []
    for check in CHECKS:
        if part := [value for task, value in zip(tasks, values, strict=True) if task.check == check and value is not None]:
            checks.append(CheckScore(check=check, count=len(part), mean=fmean(part), standard_error=standard_error(part)))
    known = [value for value in values if value is not None]
    if not known:
        return None
    return Scores(count=len(known), mean=fmean(known), standard_error=standard_error(known), checks=checks, values=values)


def check_answers(tasks: Sequence[Task], units: Units, name: str) -> None:
    """Turn a file's answers to the tasks (its unit "tasks") into its unit "scores", where that is not known yet.

    Raises:
        OlpackError: as `score`.
    """
    if "tasks" in units.known and "scores" not in units.known:
        answers = [None if "reasoning" in answer["flags"] else answer["text"] for answer in units.known["tasks"]["answers"]]
        if scores := score_answers(tasks, answers, name):
            units.add("scores", scores.model_dump(mode="json"))


def standard_error(values: Sequence[float]) -> float | None:
    """Of the mean of independent values: s/√n. For passed and failed it is the binomial √(p(1-p)/(n-1)).

    None with fewer than two values, and where all are equal: ten of ten passed does not show that all would.
    """
    if len(values) < 2 or min(values) == max(values):
        return None
    return stdev(values) / math.sqrt(len(values))


def score(task: Task, answer: str) -> float:
    """What an answer is worth, from 0 to 1.

    Raises:
        OlpackError: a user's function raised, or returned no share; a regular expression takes too long.
    """
    match task.check:
        case "exact":
            return float(answer.strip() == task.expected.strip())
        case "contains":
            return float(all(text in answer for text in task.expected))
        case "regex":
            return float(_matches(task, answer))
        case "json":
            return float(_is_json(fenced(answer), task.expected))
        case "tool_call":
            return float(_calls(answer) == task.expected)
        case "python":
            return float(_parses(fenced(answer)))
        case "python_asserts":
            return float(_parses(fenced(answer)) and _holds(fenced(answer), tuple(task.expected)))
        case "function":
            return _share_by_function(task, answer)
    raise ValueError(task.check)


@lru_cache(maxsize=10_000)
def _holds(code: str, asserts: tuple[str, ...]) -> bool:
    """Whether the code does what the asserts say. Most quants give the same answers, and each is run once."""
    return asserts_hold(code, asserts)


def fenced(answer: str) -> str:
    """The first fenced block of an answer, else the answer. A block that was cut before its end counts."""
    match = _FENCE.search(answer)
    return match.group(1) if match else answer


def load_function(task: Task) -> Callable[..., object]:
    """The user's function of a task.

    Raises:
        OlpackError: its file does not run, or has no such function.
    """
    path, name = task.expected
    try:
        module = _module(path, file_digest(path))
    except Exception as error:
        raise OlpackError(f"{path}, which {task.source} names, does not run: {type(error).__name__}: {error}.", "Fix it.") from None
    if not callable(function := getattr(module, name, None)):
        raise OlpackError(f"{path}, which {task.source} names, has no function `{name}`.", "Define it there.")
    return function


@cache
def _module(path: Path, digest: str) -> ModuleType:
    """The module of a file, run once for as long as its content stays the same."""
    spec = importlib.util.spec_from_file_location(f"olpack_task_{path.stem}_{digest[:12]}", path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path.name} has no suffix of a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and the like look their module up there while it runs
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[spec.name]
        raise
    return module


def _share_by_function(task: Task, answer: str) -> float:
    function = load_function(task)
    try:
        takes_task = len(inspect.signature(function).parameters) > 1
        value = function(answer, task) if takes_task else function(answer)
    except Exception as error:
        problem = f"{task.expected[0]}: `{task.expected[1]}` raised {type(error).__name__}: {error}, for {task.source}."
        raise OlpackError(problem, "It must return True, False or a number from 0 to 1 for any answer.") from None
    if not isinstance(value, bool | int | float) or not 0 <= value <= 1:
        raise OlpackError(
            f"{task.expected[0]}: `{task.expected[1]}` returned {value!r}, for {task.source}.", "It must return True, False or a number from 0 to 1."
        )
    return float(value)


def _matches(task: Task, answer: str) -> bool:
    try:
        with bounded(_SEARCH_S, memory=None):
            return re.search(task.expected, answer) is not None
    except Exceeded:
        raise OlpackError(
            f"{task.source}: the `regex` '{task.expected}' takes longer than {_SEARCH_S:g} s to search an answer.",
            "Write it without nested repetitions.",
        ) from None


def _is_json(text: str, keys: Sequence[str]) -> bool:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return False
    return not keys or (isinstance(value, dict) and all(key in value for key in keys))


def _calls(answer: str) -> list[str]:
    """The calls of tools in an answer: its JSON objects with a name and arguments, which some models call parameters."""
    found, at, decoder = [], answer.find("{"), json.JSONDecoder()
    while at >= 0:
        try:
            value, end = decoder.raw_decode(answer, at)
        except (ValueError, RecursionError):
            value, end = None, at + 1
        if isinstance(value, dict) and "name" in value and (arguments := value.get("arguments", value.get("parameters"))) is not None:
            found.append(call_text(value["name"], arguments))
        at = answer.find("{", end)
    return found


def _parses(text: str) -> bool:
    try:
        return bool(ast.parse(text).body)
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return False
