"""The examples: packages with data of their own, of which `olpack init --example NAME` writes a copy."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml

from olpack import recipe
from olpack.commands.init import base_from, new_recipe, quoted
from olpack.errors import OlpackError
from olpack.printable import echo
from olpack.stages.build import Build
from olpack.workspace import folder_atomically, shipped

_BUILTIN_RATE = "2e-3"  # a base of some million parameters learns little at the rates that suit hundreds of millions


@dataclass(frozen=True)
class Example:
    """One example.

    Attributes:
        title: one line, from the head of its README.md, as `licence` is.
        licence: SPDX identifier of its data.
        folder: where it came with olpack.
    """

    name: str
    title: str
    licence: str
    folder: Path

    @property
    def rows(self) -> int:
        """Number of its training rows."""
        from olpack.data import load_chats

        return len(load_chats(*Build(recipe.load(self.folder / "recipe.yaml")).sources("train")))


def examples() -> list[Example]:
    """All of them, in the order of their names."""
    return sorted(_found(), key=lambda example: example.name)


def find(name: str) -> Example:
    """The example of a name.

    Raises:
        OlpackError: there is none; the names that exist are listed.
    """
    known = examples()
    for example in known:
        if example.name == name:
            return example
    names = ", ".join(example.name for example in known)
    raise OlpackError(f"There is no example {name!r}.", f"The examples are {names}; `olpack init --example` describes them.")


def write_example(example: Example, name: str, base: str | None = None) -> Path:
    """Copy an example as the package `name`.

    Args:
        base: in place of the example's own, as for `write_recipe`.

    Returns:
        the recipe.

    Raises:
        OlpackError: the name cannot be one, there is such a package or such a base is missing, or the package cannot be written.
    """
    path = new_recipe(name)
    if path.parent.exists() and any(path.parent.iterdir()):
        raise OlpackError(f"{path.parent} is there already.", f"Take another name: `olpack init NAME --example {example.name}`.")
    text = (example.folder / "recipe.yaml").read_text(encoding="utf-8")
    if base is not None:
        text = _with_value(text, "base", quoted(base_from(path.parent, base)))
        if base.startswith("builtin/"):
            text = _with_value(text, "  learning_rate", _BUILTIN_RATE)
    if name != example.name:
        text = re.sub(rf"(olpack (?:data check|plan|build|run|show)) {re.escape(example.name)}\b", rf"\1 {name}", text)
    with folder_atomically(path.parent) as folder:
        for file in sorted(example.folder.iterdir()):
            if file.is_file():
                shutil.copyfile(file, folder / file.name)
        (folder / "recipe.yaml").write_text(text, encoding="utf-8")
    return path


def print_examples(listed: list[Example]) -> None:
    """Name, licence, rows and title of each."""
    width = max(len(example.name) for example in listed)
    for example in listed:
        echo(f"{example.name:{width}}  {example.rows:5,} rows  {example.licence:10}  {example.title}")


def first_question(path: Path) -> str:
    """What to ask a package first: the first of its prompts, or of its tasks."""
    build = Build(recipe.load(path))
    prompts = build.recipe.compare.prompts
    return prompts[0] if prompts else build.tasks[0].messages[-1]["content"]


def _found() -> Iterator[Example]:
    for path in (*shipped("examples").glob("*/recipe.yaml"), *shipped("modelfiles").glob("*/recipe.yaml")):
        head = yaml.safe_load((path.parent / "README.md").read_text(encoding="utf-8").split("---\n")[1])
        yield Example(path.parent.name, head["title"], head["license"], path.parent)


def _with_value(text: str, key: str, value: str) -> str:
    """A recipe's text with another value of a key, whose comment stays beside it."""
    return re.sub(rf"^({key}: )(\S+)", lambda match: f"{match[1]}{value}", text, count=1, flags=re.MULTILINE)
