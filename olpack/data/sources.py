"""Where rows come from: a file, a folder of files, a data set on the Hub; in which form, and how often each is seen."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path

from olpack.bounded_json import check_regular
from olpack.data.forms import KEYS, RowError, form_of, to_chat
from olpack.data.hub import HubSet
from olpack.data.records import MOST_CHARACTERS, SUFFIXES, TOO_DEEP, TOO_LONG, Record, counts_rows, read_records, without_nulls
from olpack.data.rows import Chat, Form, Problem
from olpack.errors import OlpackError
from olpack.workspace import file_digest, value_digest

_LOOKED_AT = 20  # rows that decide the form of a file


@dataclass(frozen=True)
class Source:
    """Rows of one kind.

    Attributes:
        place: a file, a folder of files, or a data set on the Hub.
        form: of all its rows; None where each file's own rows decide it.
        weight: how often its rows are seen in an epoch: 2 for twice each, 0.5 for half of them.
        name: a file or folder as the recipe writes it; "" where only its own name is known.
    """

    place: Path | HubSet
    form: Form | None = None
    weight: float = 1.0
    name: str = ""

    @property
    def label(self) -> str:
        """What its rows are named by: "train.jsonl", "faq", "user/name/subset[train]"."""
        return self.place.label if isinstance(self.place, HubSet) else Path(self.name or self.place.name).as_posix()

    def digest(self) -> str:
        """Identity of the data: of each file's bytes, or of the commit on the Hub.

        Raises:
            OlpackError: it is not there.
        """
        if isinstance(self.place, HubSet):
            return value_digest([self.place.id, self.place.commit, self.place.split, self.place.subset])
        if self.place.is_file():
            return file_digest(self.place)
        return value_digest([[str(path.relative_to(self.place)), file_digest(path)] for path in _files(self.place)])

    def read(self) -> Iterator[Chat | Problem]:
        """Every row in order, as a chat or as the reason why it is none.

        Raises:
            OlpackError: the source is missing, cannot be read at all, or has a form that olpack does not know.
        """
        if isinstance(self.place, HubSet):
            rows = (Record(number, without_nulls(row)) for number, row in enumerate(self.place.rows(), 1))
            yield from self._chats(rows, self.label, self.label, "row")
            return
        for path in _files(self.place):
            label = Path(self.label, path.relative_to(self.place)).as_posix()
            yield from self._chats(read_records(path), label, str(path), "row" if counts_rows(path) else "line")

    def _chats(self, records: Iterator[Record], label: str, name: str, unit: str) -> Iterator[Chat | Problem]:
        first = list(islice(records, _LOOKED_AT))
        form = self.form or _common_form(first, name)
        for record in chain(first, records):
            source, place = f"{label}:{record.number}", f"{name}, {unit} {record.number}"
            if record.problem:
                yield Problem(source, place, record.problem, "unreadable")
                continue
            try:
                fields = to_chat(form, record.value)
            except RowError as error:
                yield Problem(source, place, str(error), error.kind)
            except RecursionError:
                yield Problem(source, place, TOO_DEEP, "unreadable")
            else:
                chat = Chat(source=source, form=form, weight=self.weight, **fields)
                yield chat if _length(chat) <= MOST_CHARACTERS else Problem(source, place, TOO_LONG, "unreadable")


def _length(chat: Chat) -> int:
    """Characters of a chat's texts."""
    return len(chat.text or "") + sum(len(text) for message in chat.messages or [] for text in message.values() if isinstance(text, str))


def _files(place: Path) -> list[Path]:
    """The files of a source: itself, or those in a folder, sorted by name. Hidden files belong to an editor or the system and are no data."""
    check_regular(place)
    if not place.is_dir():
        if not place.exists():
            raise OlpackError(f"There is no {place}.", "The recipe's `data` names files relative to the recipe.")
        return [place]
    below = (path for path in place.rglob("*") if not any(part.startswith(".") for part in path.relative_to(place).parts))
    files = sorted(path for path in below if path.suffix.lower() in SUFFIXES and path.is_file())
    if not files:
        raise OlpackError(f"{place} contains no data.", f"olpack reads {', '.join(SUFFIXES)}.")
    return files


def _common_form(first: list[Record], name: str) -> Form:
    """The form that most of the first rows have."""
    readable = [record for record in first if not record.problem]
    forms = Counter(form for record in readable if (form := form_of(record.value)))
    if forms:
        return forms.most_common(1)[0][0]
    if not readable:
        return "chat"  # no row decides: each problem is reported
    keys = ", ".join(map(str, readable[0].value)) if isinstance(readable[0].value, dict) else f"no keys, it is {readable[0].value!r:.40}"
    known = "; ".join(f"{form}: {', '.join(keys)}" for form, keys in KEYS.items())
    raise OlpackError(
        f"{name} has rows of no form that olpack knows; the first one has {keys}.", f"Name its keys or columns as one of the forms does: {known}."
    )
