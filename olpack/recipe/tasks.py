"""Tasks: a prompt with one check of the answer. They stand in `compare.tasks` of a recipe, or in the JSONL file that it names.

    {"prompt": "What is 6 times 7? Answer with the number only.", "exact": "42"}
    {"prompt": "Write `double(number)` in Python.", "python_asserts": ["assert double(4) == 8"]}
    {"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}], "contains": true}
    {"prompt": "Is it hot in Riyadh?", "tools": [{"type": "function", …}], "tool_call": {"name": "weather", "arguments": {"city": "Riyadh"}}}

| check | the answer passes if it | value |
| --- | --- | --- |
| `exact` | is this text, without the white space around it | text; true: the conversation's last answer |
| `contains` | contains this text, or all of these | text or list; true: the conversation's last answer |
| `regex` | has a match | a regular expression of Python |
| `json` | is JSON | true, or the keys that the object must have |
| `tool_call` | calls this tool with these arguments, and no other | the `name` and the `arguments` |
| `python` | is Python that parses and is not empty | true |
| `python_asserts` | is Python after which these statements pass | text or list |
| `function` | passes your own function, which returns True, False or a share from 0 to 1 | `file.py:name` |

`python_asserts` runs what a model wrote, in a sandbox, and `function` runs your file, without one: both need `compare.run_answers: true`
([what the sandbox stops](../security.md)). The others run nothing. A function gets the answer, and the task if it has a second parameter.
`json` and the Python checks take the first fenced block of an answer that has one. `tools` are those of a row ([forms](../data.md#forms)), and the
model reads them as its chat template writes them. `tool_call` reads calls that the model writes as JSON, as most do.
"""

from __future__ import annotations

import ast
import difflib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from olpack.bounded_json import check_regular
from olpack.data.forms import tools_of
from olpack.errors import OlpackError

CHECKS = ("exact", "contains", "regex", "json", "tool_call", "python", "python_asserts", "function")
RUNNING = ("python_asserts", "function")  # those that run code: the answer, or the user's file
KEYS = ("prompt", "messages", "tools", *CHECKS)
_MOST_BYTES = 1 << 20  # of a file of checks
_SHOWN = 10  # problems listed before "and N more"


@dataclass(frozen=True)
class Task:
    """One prompt with its check.

    Attributes:
        messages: the conversation that is asked, its last turn from the user.
        check: one of CHECKS.
        expected: what the check compares with: a text, a list of texts, or a function as (file, name).
        source: where the task stands, "tasks.jsonl:4".
        tools: JSON schemas of the functions that the model may call, as in a row; None: none.
    """

    messages: list[dict]
    check: str
    expected: Any
    source: str
    tools: list[dict] | None = None


def parse_task(item: Any, source: str = "", folder: Path | None = None, system: str | None = None) -> Task:
    """One task as a file or a recipe holds it.

    Args:
        item: the mapping.
        source: where it stands.
        folder: that files of functions are relative to; None: they are not looked for.
        system: system prompt of a task that has a `prompt`. Messages are taken as they are.

    Raises:
        ValueError: what is wrong with it, as a sentence without its full stop.
    """
    if not isinstance(item, dict):
        raise ValueError("a task is an object with a `prompt` and a check")
    for key in item:
        if key not in KEYS:
            near = difflib.get_close_matches(str(key), KEYS, n=1, cutoff=0.5)
            raise ValueError(f"unknown key '{key}'; " + (f"did you mean '{near[0]}'?" if near else f"a task has {', '.join(KEYS)}"))
    if ("prompt" in item) == ("messages" in item):
        raise ValueError("a task has either a `prompt` or `messages`")
    checks = [check for check in CHECKS if check in item]
    if len(checks) != 1:
        raise ValueError(f"a task has one check, of {', '.join(CHECKS)}; this one has {' and '.join(checks) or 'none'}")
    (check,) = checks
    messages, answer = _conversation(item, system)
    return Task(messages, check, _expected(check, item[check], answer, folder), source, tools_of(item))


def load_tasks(path: Path, system: str | None = None) -> list[Task]:
    """Read every task of a JSONL file.

    Raises:
        OlpackError: the file is missing, not UTF-8 or empty, or has lines that are no tasks: each named by its number.
    """
    check_regular(path)
    try:
        with path.open(encoding="utf-8-sig") as file:  # its lines end at line breaks alone, not at U+2028 and the like
            lines = list(file)
    except UnicodeDecodeError as error:
        raise OlpackError(f"{path} is not UTF-8 (byte {error.start}).", "Save it as UTF-8.") from None
    except OSError as error:
        raise OlpackError(f"{path}, which `compare.tasks` names, cannot be read: {error.strerror}.", "It is relative to the recipe.") from None
    tasks, problems = [], []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            tasks.append(parse_task(json.loads(line), f"{path.name}:{number}", path.parent, system))
        except json.JSONDecodeError as error:
            problems.append(f"{path}, line {number}: not JSON: {error.msg.lower()} at column {error.colno}.")
        except RecursionError:
            problems.append(f"{path}, line {number}: not JSON: nested too deeply.")
        except ValueError as error:
            problems.append(f"{path}, line {number}: {error}.")
    if problems:
        raise OlpackError("\n".join(problems[:_SHOWN] + ([f"and {len(problems) - _SHOWN} more"] if len(problems) > _SHOWN else [])))
    if not tasks:
        raise OlpackError(f"{path} is empty.", 'Each line is an object such as {"prompt": "What is 6 times 7?", "contains": "42"}.')
    return tasks


def call_text(name: Any, arguments: Any) -> str:
    """A call of a tool as JSON, the same whatever the order of the arguments."""
    return json.dumps({"name": name, "arguments": arguments}, ensure_ascii=False, sort_keys=True)


def check_consent(tasks: Sequence[Task], place: str, remedy: str) -> None:
    """Refuse tasks that run code.

    Args:
        place: what the tasks belong to, and `remedy` how its user consents.

    Raises:
        OlpackError: the first of them, with what it runs.
    """
    if task := next((task for task in tasks if task.check in RUNNING), None):
        runs = "your file " + str(task.expected[0]) if task.check == "function" else "Python that the models write"
        raise OlpackError(f"{place}: `{task.check}` of {task.source} runs {runs} on this machine.", remedy)


def task_files(folder: Path) -> list[Path]:
    """What the user's own tasks of lm-evaluation-harness may be made of, in a fixed order."""
    return [path for path in sorted(folder.rglob("*")) if path.is_file() and path.suffix != ".pyc"]


def function_files(tasks: Sequence[Task]) -> list[Path]:
    """The users' own files that the checks run, each once."""
    return sorted({task.expected[0] for task in tasks if task.check == "function"})


def _check_python(path: Path) -> None:
    try:
        if path.suffix != ".py":
            raise ValueError("its name does not end in .py")
        if path.stat().st_size > _MOST_BYTES:
            raise ValueError("it is larger than 1 MB")
        ast.parse(path.read_bytes())
    except (SyntaxError, ValueError, MemoryError, RecursionError, OSError) as error:
        raise ValueError(f"{path}, which `function` names, is no Python file: {str(error) or 'it is nested too deep'}") from None


def _conversation(item: dict, system: str | None) -> tuple[list[dict], str | None]:
    """(what is asked, the answer that the conversation ends with)."""
    if "prompt" in item:
        if not isinstance(item["prompt"], str) or not item["prompt"].strip():
            raise ValueError("`prompt` is no text")
        return [*([{"role": "system", "content": system}] if system else []), {"role": "user", "content": item["prompt"]}], None
    messages = item["messages"]
    if not isinstance(messages, list) or not all(
        isinstance(turn, dict) and turn.get("role") in ("system", "user", "assistant") and isinstance(turn.get("content"), str) for turn in messages
    ):
        raise ValueError("`messages` is no list of turns, each with a `role` of system, user, assistant and a text as `content`")
    asked = [{"role": turn["role"], "content": turn["content"]} for turn in messages]
    answer = asked.pop()["content"] if asked and asked[-1]["role"] == "assistant" else None
    if not asked or asked[-1]["role"] != "user":
        raise ValueError("the last of `messages` must be the user's, or the assistant's answer to the user")
    return asked, answer


def _expected(check: str, value: Any, answer: str | None, folder: Path | None) -> Any:
    """The check's value, checked."""
    texts = [value] if isinstance(value, str) else value
    is_texts = isinstance(texts, list) and bool(texts) and all(isinstance(text, str) and text for text in texts)
    if check in ("exact", "contains") and value is True:
        if answer is None:
            raise ValueError(f"`{check}: true` takes the answer that `messages` end with, and there is none")
        return answer if check == "exact" else [answer]
    if check == "exact":
        if not isinstance(value, str):
            raise ValueError("`exact` is no text")
        return value
    if check == "regex":
        try:
            re.compile(value)
        except (re.error, TypeError, OverflowError, RecursionError) as error:
            raise ValueError(f"`regex` is no regular expression: {error}") from None
        return value
    if check == "tool_call":
        if not isinstance(value, dict) or value.keys() != {"name", "arguments"} or not isinstance(value["arguments"], dict):
            raise ValueError("`tool_call` is no object with `name` and `arguments`")
        return [call_text(value["name"], value["arguments"])]
    if check == "python" or (check == "json" and value is True):
        if value is not True:
            raise ValueError("`python` can only be true")
        return []
    if not is_texts:
        raise ValueError(f"`{check}` is no text or list of texts" + (", nor true" if check in ("contains", "json") else ""))
    if check == "python_asserts":
        for text in texts:
            try:
                ast.parse(text)
            except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
                raise ValueError(f"`python_asserts` does not parse: {error}: {text}") from None
    if check == "function":
        file, colon, name = texts[0].rpartition(":")
        if not colon or not name.isidentifier() or len(texts) > 1:
            raise ValueError(f"`function` is not of the form file.py:name: {value}")
        if folder is not None and not (folder / file).is_file():
            raise ValueError(f"there is no {folder / file}, which `function` names")
        if folder is not None:
            _check_python(folder / file)
        return ((folder or Path()) / file, name)
    return texts
