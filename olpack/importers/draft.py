"""A recipe in the making: settings of another tool, what each becomes, and what becomes of none."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from olpack.data.records import SUFFIXES
from olpack.errors import OlpackError
from olpack.printable import HIDDEN
from olpack.recipe import Recipe
from olpack.workspace import HUB_ID, named_from

_SHOWN = 100  # characters of a value
_SECRET = re.compile("(^|_)(token|key|secret|password)$", re.IGNORECASE)
_ODD = re.compile("[\ud800-\udfff\0]")  # what no recipe may contain


@dataclass(frozen=True)
class Given:
    """One setting of another tool: the line that gives it, its name there, its value."""

    place: str
    key: str
    value: Any

    @property
    def public(self) -> Any:
        """The value as JSON takes it, without passwords and access tokens."""
        return HIDDEN if _SECRET.search(self.key) and isinstance(self.value, str) else plain(self.value)

    @property
    def shown(self) -> str:
        """The setting on one line: `lora_r: 32`."""
        if self.value is None:
            return self.key
        text = json.dumps(self.public, ensure_ascii=False)
        return f"{self.key}: {text}" if len(text) <= _SHOWN else f"{self.key}: {text[:_SHOWN]}…"


def plain(value: Any) -> Any:
    """A value of YAML or Python as JSON takes it: dates, sets, bytes and infinite numbers as texts."""
    if isinstance(value, dict):
        return {str(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    if value is None or isinstance(value, str | bool | int) or (isinstance(value, float) and math.isfinite(value)):
        return value
    return str(value)


def line_of(text: str, key: str) -> int | None:
    """The line of a JSON text on which a key first begins a line; None where it begins none."""
    found = re.search(rf'^\s*"{re.escape(key)}"\s*:', text, re.MULTILINE)
    return text.count("\n", 0, found.end()) + 1 if found else None


@dataclass(frozen=True)
class Outcome:
    """What became of one setting.

    Attributes:
        given: the setting.
        kind: "carried" over; "needless", because olpack does the same by itself or has no use for it; "lost", where olpack has nothing equal.
        to: the recipe keys that it sets, with their values.
        note: how the two differ, why nothing is to be set, or the reason and the nearest setting.
    """

    given: Given
    kind: Literal["carried", "needless", "lost"]
    to: dict[str, Any] = field(default_factory=dict)
    note: str = ""


@dataclass(frozen=True)
class Rule:
    """How one setting of another tool is read.

    Attributes:
        to: the recipe keys that it can set, for the documentation.
        note: as of `Outcome`.
        read: does it.
    """

    to: str
    note: str
    read: Callable[[Draft, Given, Rule], None]


def copied(to: str, note: str = "") -> Rule:
    """The value is that of a recipe key."""

    def read(draft: Draft, given: Given, rule: Rule) -> None:
        draft.carry(given, {to: given.value}, note)

    return Rule(to, note, read)


def needless(note: str) -> Rule:
    """Nothing is to be set."""
    return Rule("", note, lambda draft, given, rule: draft.need_not(given, note))


def lost(note: str) -> Rule:
    """olpack has nothing equal. A setting that is off loses nothing."""

    def read(draft: Draft, given: Given, rule: Rule) -> None:
        if given.value is False or given.value == 0:
            draft.need_not(given, "It is off.")
        else:
            draft.lose(given, note)

    return Rule("", note, read)


def switch(to: str, value: str, note: str = "", off: str = "It is off.") -> Rule:
    """Where it is on, a recipe key has this value.

    Args:
        note: for the documentation.
        off: the note where it is off.
    """

    def read(draft: Draft, given: Given, rule: Rule) -> None:
        if given.value is True:
            draft.carry(given, {to: value})
        else:
            draft.need_not(given, off)

    return Rule(to, note, read)


def by(read: Callable[[Draft, Given], None], to: str, note: str = "") -> Rule:
    """A function reads it."""
    return Rule(to, note, lambda draft, given, rule: read(draft, given))


class Draft:
    """A recipe in the making.

    Args:
        tool: the other tool's name.
        file: its file, or folder.
        folder: of the package, whose recipe names paths relative to it.

    Attributes:
        settings: recipe keys by their dotted names.
        origins: the line that each of them comes from.
        outcomes: what became of each setting.
        given: the settings that are read, by name, for rules that depend on several.
    """

    def __init__(self, tool: str, file: Path, folder: Path):
        self.tool, self.file, self.folder = tool, file, folder
        self.settings: dict[str, Any] = {}
        self.origins: dict[str, str] = {}
        self.outcomes: list[Outcome] = []
        self.given: dict[str, Given] = {}

    def place(self, line: int | str | None) -> str:
        """A line of the file: "axolotl.yml:12"."""
        return f"{self.file.name}:{line}" if line else self.file.name

    def in_order(self) -> list[Outcome]:
        """What became of each setting, in the order of the file's lines; what no line of it gives comes last."""

        def position(outcome: Outcome) -> tuple[bool, list[int]]:
            name, _, line = outcome.given.place.rpartition(":")
            return name != self.file.name, [int(number) for number in re.findall("[0-9]+", line)]

        return sorted(self.outcomes, key=position)

    def read(self, given: Iterable[Given], rules: Mapping[str, Rule]) -> None:
        """Read settings by the rules for their names. A setting without a value is none."""
        self.given = {one.key: one for one in given if one.value not in (None, "", [], {})}
        for one in self.given.values():
            if (rule := rules.get(one.key)) is None:
                self.lose(one, f"olpack does not know this setting of {self.tool}.")
            else:
                rule.read(self, one, rule)

    def value(self, key: str, default: Any = None) -> Any:
        """The value of another setting of the same file."""
        return self.given[key].value if key in self.given else default

    def carry(self, given: Given, to: Mapping[str, Any], note: str = "") -> bool:
        """Set recipe keys. A value that the recipe does not take is lost, with the reason; returns whether it was taken."""
        for key, value in to.items():
            if reason := _refused(key, value):
                self.lose(given, f"{key}: {reason}.")
                return False
        self.settings |= to
        self.origins |= dict.fromkeys(to, given.place)
        self.outcomes.append(Outcome(given, "carried", dict(to), note))
        return True

    def add(self, given: Given, key: str, item: Any) -> None:
        """Add an item to a recipe key that is a list."""
        before = self.settings.get(key, [])
        if self.carry(given, {key: [*before, item]}):
            self.outcomes[-1] = Outcome(given, "carried", {key: [item]})

    def default(self, to: Mapping[str, Any], key: str, value: Any) -> None:
        """Set recipe keys that the file leaves to the other tool's default, where olpack's differs."""
        if key not in self.given and not any(name in self.settings for name in to):
            self.carry(Given(f"{self.tool}'s default", key, value), to)

    def need_not(self, given: Given, note: str) -> None:
        """Nothing is to be set."""
        self.outcomes.append(Outcome(given, "needless", note=note))

    def lose(self, given: Given, note: str) -> None:
        """olpack has nothing equal."""
        self.outcomes.append(Outcome(given, "lost", note=note))

    def withdraw(self, keys: Iterable[str], note: str) -> None:
        """Unset recipe keys, because something else replaces them."""
        for key in keys:
            self.settings.pop(key, None)
            self.origins.pop(key, None)
            self.outcomes = [Outcome(one.given, "needless", note=note) if key in one.to else one for one in self.outcomes]

    # -- what is more than a value ---------------------------------------------------------------------------------------------------------

    def base(self, given: Given, name: Any) -> None:
        """The base model: a folder here, or a Hub id."""
        if not isinstance(name, str):
            self.lose(given, "It is no text.")
        elif (folder := self.near(name)) and folder.is_dir():
            self.carry(given, {"base": named_from(self.folder, str(folder))})
        elif HUB_ID.fullmatch(name):
            self.carry(given, {"base": name})
        else:
            self.lose(given, "There is no such folder here, and it is no Hub id.")

    def near(self, name: str) -> Path | None:
        """A file or folder by a path relative to the working folder, or to the folder of the file; None where there is none."""
        try:
            places = (Path(name).expanduser(), self.file.parent / name)
            return next((place for place in places if place.exists()), None)
        except (OSError, RuntimeError, ValueError):  # a name that is too long, another user's home that is not there, a null
            return None

    def source(self, given: Given, name: Any, *, form: str | None = None, **hub: str) -> dict[str, Any] | None:
        """A source of rows as a recipe writes it; None where there is none, which is an outcome of the setting.

        Args:
            form: of the rows, where it is known.
            hub: split, subset and revision of a data set on the Hub.
        """
        named = {"form": form} if form else {}
        if not isinstance(name, str):
            self.lose(given, "It is no path.")
            return None
        if place := self.near(name):
            if place.is_dir() or place.suffix in SUFFIXES:
                return {"file": named_from(self.folder, str(place)), **named}
            self.lose(given, f"olpack reads {', '.join(SUFFIXES)}, and folders of them.")
            return None
        if HUB_ID.fullmatch(name) and not set(SUFFIXES).intersection(Path(name).suffixes):
            return {"hub": name, **hub, **named}
        self.lose(given, f"There is no {name} in the working folder or beside {self.file.name}.")
        return None

    def document(self) -> dict[str, Any]:
        """The recipe as nested sections.

        Raises:
            OlpackError: no base or no rows could be carried over, or settings do not go together.
        """
        if "base" not in self.settings:
            raise self._lacking("base model", ("base_model", "model_name", "FROM"), "Name it with --base: a Hub id, or a folder.")
        if "train.adapter" in self.settings and "data.eval" not in self.settings:
            raise OlpackError(
                f"{self.file} is an adapter that is trained already, and its quants are compared on rows that it was not trained on.",
                "Name such rows with --eval: a file, a folder, or a data set on the Hub.",
            )
        if "train.adapter" not in self.settings and "data.train" not in self.settings:
            names = ("dataset", "train_dataset", "path", "data_files", "load_dataset", "file_name")
            raise self._lacking("training rows", names, "Name them with --train: a file, a folder, or a data set on the Hub.")
        document: dict[str, Any] = {}
        for key in sorted(self.settings, key=_order):
            place, parts = document, key.split(".")
            for section in parts[:-1]:
                place = place.setdefault(section, {})
            place[parts[-1]] = self.settings[key]
        try:
            Recipe.model_validate(document)
        except ValidationError as error:
            reason = error.errors()[0]["msg"].removeprefix("Value error, ").rstrip(".")
            raise OlpackError(f"{self.file} becomes no recipe: {reason}.", "Change the file, and import it again.") from None
        return document

    def _lacking(self, what: str, names: tuple[str, ...], remedy: str) -> OlpackError:
        """The error for a file from which something could not be carried over, with the first reason."""
        reasons = [
            f" {one.given.place}: {one.note}" for one in self.outcomes if one.kind == "lost" and one.given.key.rpartition(".")[2].startswith(names)
        ]
        return OlpackError(f"{self.file} names no {what} that can be carried over.{reasons[0] if reasons else ''}", remedy)


_ORDER = ("base", "revision", "data", "train", "quants", "export", "package", "modelfile", "compare")


def _order(key: str) -> tuple[int, ...]:
    """Sections in the order of a recipe's schema, and their keys in theirs."""
    top, _, rest = key.partition(".")
    field = Recipe.model_fields[top].annotation
    inner = list(getattr(field, "model_fields", {}))
    return _ORDER.index(top), inner.index(rest.partition(".")[0]) if rest.partition(".")[0] in inner else 0


def _refused(key: str, value: Any) -> str | None:
    """Why a recipe does not take a value for a key; None where it does."""
    if odd := _ODD.search(json.dumps(plain(value), ensure_ascii=False).replace("\\u0000", "\0")):
        return f"it contains the character {odd[0]!r}, which no text has"
    document: dict[str, Any] = {"base": "b", "data": {"train": "t"}}
    place = document
    *sections, last = key.split(".")
    for section in sections:
        place = place.setdefault(section, {})
    place[last] = value
    try:
        Recipe.model_validate(document)
    except ValidationError as error:
        for one in error.errors():
            if tuple(map(str, one["loc"][: len(sections) + 1])) == (*sections, last) or one["loc"][:1] == tuple(sections[:1]):
                return str(one["msg"]).removeprefix("Value error, ").rstrip(".")
    return None
