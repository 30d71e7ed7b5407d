"""`olpack compare TAG TAG …`: any models that the Ollama server has, ours or not, on the user's prompts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from olpack.bounded_json import check_regular
from olpack.errors import OlpackError
from olpack.recipe.tasks import CHECKS, Task, check_consent, load_tasks
from olpack.workspace import packages, template_source

if TYPE_CHECKING:
    from olpack.compare.results import Results

_ANSWERED = 10  # requests of a data set that every model answers: more than one reads side by side


def is_package(names: Sequence[str]) -> bool:
    """Whether what was named is one package of ours. A bare name is, unless only the server knows it."""
    from olpack.deploy import same
    from olpack.deploy.client import OllamaClient

    if len(names) != 1 or ":" in names[0]:
        return False
    if names[0] in packages():
        return True
    client = OllamaClient()
    return client.version() is None or not any(same(tag.model, f"{names[0]}:latest") for tag in client.tags())


def compare_models(
    names: Sequence[str], prompts: Sequence[str], file: Path | None, clients: Sequence[int], folder: Path, run_answers: bool
) -> Results:
    """Measure models of the server, and write the outcome into `folder`.

    Args:
        names: as the server knows them; a package of ours means all its tags that the server has.
        prompts: put to every model.
        file: further prompts: one a line in a text file; a JSONL file of tasks with checks, or of chats, whose first requests are asked.
        clients: numbers of clients that ask at once; empty: that is not measured.
        run_answers: whether tasks may run code.

    Raises:
        OlpackError: no server, a model that it lacks, a file that holds no prompts, or tasks that run code without consent.
    """
    from olpack.compare.report import write_outputs
    from olpack.compare.served_models import compare_served, settings_for
    from olpack.compare.settings import MeasureSettings
    from olpack.deploy.client import OllamaClient

    asked, tasks = _read(file) if file else ([], [])
    if not run_answers:
        check_consent(tasks, str(file), "Add --run-answers to allow it; `olpack doctor` reports the sandbox.")
    client = OllamaClient()
    client.require()
    listed = [tag.model for tag in client.tags()]
    models = list(dict.fromkeys(model for name in names for model in _tags_of(name, listed)))
    conversations = [[{"role": "user", "content": prompt}] for prompt in prompts] + asked
    settings = settings_for(client, models, MeasureSettings(prompt_lengths=(128, 512), repeats=4, clients=tuple(clients)))
    results = compare_served(client, models, conversations, settings, tasks, cache=folder / "measured")
    write_outputs(results, folder, template_source("report.html.j2"))
    return results


def _tags_of(name: str, listed: Sequence[str]) -> list[str]:
    ours = [model for model in listed if model.lower().startswith(f"{name.lower()}:") and not model.endswith(":latest")]
    return ours if ours and name in packages() else [name]


def _read(path: Path) -> tuple[list[list[dict]], list[Task]]:
    """(conversations, tasks) of a file of prompts."""
    from olpack.data import load_chats, request_of

    check_regular(path)
    if path.suffix.lower() == ".jsonl":
        if _has_checks(path):
            return [], load_tasks(path)
        return [request for chat in load_chats(path) if (request := request_of(chat.messages))][:_ANSWERED], []
    try:
        with path.open(encoding="utf-8-sig") as file:  # its lines end at line breaks alone, not at U+2028 and the like
            lines = [line.strip() for line in file]
    except UnicodeDecodeError as error:
        raise OlpackError(f"{path} is not UTF-8 (byte {error.start}).", "Save it as UTF-8.") from None
    except OSError as error:
        raise OlpackError(f"{path} cannot be read: {error.strerror}.", "Name a file with one prompt a line, or a JSONL file.") from None
    if not any(lines):
        raise OlpackError(f"{path} holds no prompts.", "Write one on each line.")
    return [[{"role": "user", "content": line}] for line in lines if line], []


def _has_checks(path: Path) -> bool:
    """Whether the first line of a JSONL file is a task; the reader of the whole file reports what is wrong with it."""
    try:
        with path.open(encoding="utf-8-sig") as file:
            first = json.loads(next((line for line in file if line.strip()), "null"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(first, dict) and any(check in first for check in CHECKS)
