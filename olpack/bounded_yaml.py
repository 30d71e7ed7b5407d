"""YAML that others wrote, read only where its size and depth are those of settings.

A few lines of aliases can stand for more values than a machine can hold, so they are counted while nothing of them is made yet.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from olpack.errors import OlpackError

MOST_CHARACTERS, MOST_VALUES, MOST_LEVELS = 1 << 20, 100_000, 50  # with every alias written out
_LIMITS = f"At most 1 MB, {MOST_VALUES} values and {MOST_LEVELS} levels are read, with every alias written out."


class Loader(yaml.SafeLoader):
    """YAML with 1.2's numbers: `2e-4` is a float, as its author means it."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError):  # a 13th month, an integer of 5000 digits, `!!bool perhaps`
            raise yaml.constructor.ConstructorError(None, None, f"this is no {node.tag.rpartition(':')[2]}", node.start_mark) from None


Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9][0-9_]*(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789"))


def check(text: str, subject: str) -> None:
    """Refuse YAML that is too large or too deep, before any value of it is made.

    Args:
        subject: what the text is, for the error: "recipe.yaml".

    Raises:
        OlpackError: it is too large or too deep, or an alias refers to a value that contains it.
        yaml.YAMLError: it is no YAML.
    """
    if len(text) > MOST_CHARACTERS:
        raise OlpackError(f"{subject} is longer than 1 MB.", _LIMITS)
    whole: dict[str | None, tuple[int, int, int]] = {}  # of each anchor: its values, their characters, its levels
    opened: list[list[Any]] = []  # of each list and mapping that has not ended: its anchor, `values` and `characters` before it, its levels so far
    values = characters = 0
    for event in yaml.parse(text, Loader):
        place, levels = f"{subject}, line {event.start_mark.line + 1 if event.start_mark else 1}", 0
        if isinstance(event, yaml.CollectionStartEvent):
            opened.append([event.anchor, values, characters, 1])
            values += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before, written, levels = opened.pop()
            whole[anchor] = (values - before, characters - written, levels)
        elif isinstance(event, yaml.ScalarEvent):
            values, characters = values + 1, characters + len(event.value)
            whole[event.anchor] = (1, len(event.value), 0)
        elif isinstance(event, yaml.AliasEvent):
            if any(anchor == event.anchor for anchor, *_ in opened):
                raise OlpackError(f"{place}: *{event.anchor} refers to a value that contains it.", "Write the value out.")
            more, length, levels = whole.get(event.anchor, (0, 0, 0))  # one without an anchor is named by whoever reads the text
            values, characters = values + more, characters + length
        if opened:
            opened[-1][3] = max(opened[-1][3], levels + 1)
        if len(opened) + levels > MOST_LEVELS:
            raise OlpackError(f"{place}: this is nested too deep.", _LIMITS)
        if values > MOST_VALUES or characters > MOST_CHARACTERS:
            raise OlpackError(f"{place}: this is too large.", _LIMITS)


def read(path: Path) -> tuple[Any, dict[str, int]]:
    """The value in a YAML file, and the line of each key by its dotted name: {"train.rank": 5, "quants.0": 7}.

    Raises:
        OlpackError: it is not there, no UTF-8, no YAML, too large or too deep, or gives a key twice.
    """
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(MOST_CHARACTERS + 1)
    except FileNotFoundError:
        raise OlpackError(f"There is no {path}.") from None
    except UnicodeDecodeError as error:
        raise OlpackError(f"{path} is not UTF-8 (byte {error.start}).", "Save it as UTF-8.") from None
    try:
        check(text, str(path))
        loader = Loader(text)
        try:
            node = loader.get_single_node()
            lines: dict[str, int] = {}
            _lines_of(node, "", lines, path)
            return (None if node is None else loader.construct_document(node)), lines
        finally:
            loader.dispose()
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f", line {mark.line + 1}" if mark else ""
        raise OlpackError(f"{path}{place}: {getattr(error, 'problem', None) or error}.", "It must be valid YAML.") from None


def _lines_of(node: yaml.Node | None, prefix: str, lines: dict[str, int], path: Path) -> None:
    if isinstance(node, yaml.SequenceNode):
        for number, item in enumerate(node.value):
            lines[f"{prefix}{number}"] = item.start_mark.line + 1
            _lines_of(item, f"{prefix}{number}.", lines, path)
    if not isinstance(node, yaml.MappingNode):
        return
    for key, value in node.value:
        name = f"{prefix}{key.value}"
        if name in lines:
            raise OlpackError(f"{path}, line {key.start_mark.line + 1}: '{name}' is given twice.", "Keep one of them.")
        lines[name] = key.start_mark.line + 1
        _lines_of(value, f"{name}.", lines, path)
