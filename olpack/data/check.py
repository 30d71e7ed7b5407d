"""`olpack data check`: every problem of the data with its place, and the figures of the rows. It needs no GPU and loads no weights."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from olpack import progress
from olpack.data.chats import leaks, split, times, unread_keys
from olpack.data.reasoning_marks import stray_mark
from olpack.data.render import Renderer
from olpack.data.rows import Chat, Problem
from olpack.data.sources import Source
from olpack.errors import OlpackError


@dataclass(frozen=True)
class RowFinding:
    """A problem of one row, or a warning about it.

    Attributes:
        place: "train.jsonl:17".
        kind: "unreadable", "form", "empty answer", "nothing to learn", "half a character", "template", "too long", "leakage", "too few rows";
            or of the warnings "duplicate", "other answer", "special token", "reasoning", "not read".
        text: a sentence.
        fails: whether a build refuses it.
    """

    place: str
    kind: str
    text: str
    fails: bool


@dataclass
class Part:
    """The rows of one file on one side.

    Attributes:
        name: of the file or data set.
        form: of its rows.
        chats: rows of the file that are used; those that the weight of its source leaves out are not.
        rows: rows that the model sees of them: more, where the template rewrites earlier turns.
        seen: rows that it sees in one epoch, by the weight of the source; of held-out ones each once.
        tokens, targets: of `rows`, all tokens and target tokens.
    """

    name: str
    form: str
    chats: int = 0
    rows: int = 0
    seen: int = 0
    tokens: int = 0
    targets: int = 0

    def as_json(self) -> dict[str, Any]:
        fields = asdict(self)
        return {"learned" if name == "targets" else name: value for name, value in fields.items()}


@dataclass
class Side:
    """The training rows, or the held-out rows.

    Attributes:
        parts: by file, in order.
        lengths: of each row, in tokens.
        turns: how many answers a chat has, and how many chats have so many.
    """

    parts: list[Part] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    turns: Counter[int] = field(default_factory=Counter)

    def as_json(self) -> dict[str, Any]:
        ends = {"median": percentile(self.lengths, 0.5), "p95": percentile(self.lengths, 0.95), "max": max(self.lengths, default=0)}
        bins = [list(pair) for pair in histogram(self.lengths)]
        return {
            "sources": [part.as_json() for part in self.parts],
            "tokens_per_row": ends,
            "histogram": bins,
            "answers_per_chat": {str(turns): count for turns, count in sorted(self.turns.items())},
        }


@dataclass
class Report:
    """The result of a check.

    Attributes:
        findings: all problems and warnings, those that fail a build first.
        train, held_out: figures of both sides.
        max_length: longest row that the recipe allows, in tokens.
    """

    findings: list[RowFinding]
    train: Side
    held_out: Side
    max_length: int

    @property
    def fails(self) -> bool:
        """Whether a build would refuse this data."""
        return any(finding.fails for finding in self.findings)

    def as_json(self) -> dict[str, Any]:
        return {
            "fails": self.fails,
            "findings": [asdict(finding) for finding in self.findings],
            "max_length": self.max_length,
            "train": self.train.as_json(),
            "eval": self.held_out.as_json(),
        }


def check_data(train: Sequence[Source], held_out: Sequence[Source], renderer: Renderer, *, max_length: int, eval_share: float) -> Report:
    """Look at every row, as `render_rows` would, and go on after a problem.

    Args:
        train: sources of training chats; empty for an adapter that is trained already.
        held_out: sources of held-out chats; empty: `eval_share` of the training chats is held out, 0 holds out none.
        renderer, max_length: as `render_rows` takes them.

    Raises:
        OlpackError: a source is missing or cannot be read at all.
    """
    findings: list[RowFinding] = []
    chats = list(_read(train, findings))
    if held_out:
        apart = list(_read(held_out, findings))
    else:
        chats, apart = split(chats, eval_share)
    seen = [chat for chat in chats if times(chat)]
    for name, some in (("to train on", chats), ("held out", apart)):
        if not some and (eval_share or some is chats) and (train or some is apart):
            findings.append(RowFinding("data", "too few rows", f"No row is {name}.", True))
    if chats and not seen:
        findings.append(RowFinding("data", "too few rows", "No row is left at this `weight`.", True))
    for chat, twin in leaks(chats, apart):
        findings.append(RowFinding(chat.source, "leakage", f"It is held out, and also in the training data ({twin.source}).", True))
    findings += _repeated(chats, apart)
    for sentence in unread_keys([*chats, *apart], str(renderer.tokenizer.chat_template)):
        name, _, keys = sentence.partition(": not read: ")
        findings.append(RowFinding(name, "not read", f"Keys that are not read: {keys}.", False))
    report = Report(findings, Side(), Side(), max_length)
    with progress.task("reading the data", total=len(seen) + len(apart), unit="rows") as task:
        for side, some in ((report.train, seen), (report.held_out, apart)):
            _render(side, some, report, renderer, task)
    findings.sort(key=lambda finding: not finding.fails)
    return report


def _read(sources: Sequence[Source], findings: list[RowFinding]) -> Iterator[Chat]:
    for source in sources:
        row = None
        for row in source.read():
            if isinstance(row, Problem):
                findings.append(RowFinding(row.source, row.kind, f"{row.text[0].upper()}{row.text[1:]}.", True))
            else:
                yield row
        if row is None:
            findings.append(RowFinding(source.label, "too few rows", "It is empty.", True))


def _repeated(chats: list[Chat], apart: list[Chat]) -> Iterator[RowFinding]:
    """Rows that are there twice on one side, and questions that have two answers."""
    answers: dict[str, tuple[str, Chat]] = {}
    for side in (chats, apart):
        seen: dict[str, Chat] = {}
        for chat in side:
            if (twin := seen.setdefault(chat.digest, chat)) is not chat:
                yield RowFinding(chat.source, "duplicate", f"It is the same as {twin.source}.", False)
            elif chat.first_answer:
                request, answer = chat.first_answer
                known, other = answers.setdefault(request, (answer, chat))
                if known != answer:
                    yield RowFinding(chat.source, "other answer", f"It answers the question of {other.source} in another way.", False)


def _render(side: Side, chats: list[Chat], report: Report, renderer: Renderer, task: progress.ProgressTask) -> None:
    parts: dict[str, Part] = {}
    special = re.compile("|".join(re.escape(token) for token in sorted(renderer.tokenizer.all_special_tokens, key=len, reverse=True)) or r"(?!)")
    for chat, rows in zip(chats, renderer.batches(chats), strict=True):
        task.advance()
        if isinstance(rows, OlpackError):
            problem = rows.problem.removeprefix(f"{chat.source}: ")
            report.findings.append(RowFinding(chat.source, "template", f"{problem[0].upper()}{problem[1:].rstrip('.')}.", True))
            continue
        name = chat.source.rpartition(":")[0]
        part = parts.setdefault(name, Part(name, chat.form))
        part.chats += 1
        part.rows += len(rows)
        part.seen += len(rows) * (times(chat) if side is report.train else 1)
        part.tokens += sum(len(row.ids) for row in rows)
        part.targets += sum(row.target_count for row in rows)
        side.lengths += [len(row.ids) for row in rows]
        side.turns[sum(message["role"] == "assistant" for message in chat.messages)] += 1
        longest = max(len(row.ids) for row in rows)
        if longest > report.max_length:
            text = f"It has {longest:,} tokens, and at most {report.max_length:,} are allowed (`data.max_length`, and the base's context)."
            report.findings.append(RowFinding(chat.source, "too long", text, True))
        contents = [chat.text] if chat.text is not None else [message["content"] for message in chat.messages]
        if token := next((match for content in contents if (match := special.search(content))), None):
            text = f"Its text contains {token[0]}, which the model reads as a special token."
            report.findings.append(RowFinding(chat.source, "special token", text, False))
        if text := next((text for row in rows if (text := stray_mark(row, renderer))), ""):
            report.findings.append(RowFinding(chat.source, "reasoning", text, False))
    side.parts = list(parts.values())


def percentile(values: list[int], share: float) -> int:
    """The smallest of some values that at least this share of them does not exceed; 0 where there are none."""
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)] if values else 0


def histogram(lengths: list[int]) -> list[tuple[int, int]]:
    """(longest row, rows) of bins that double: up to 16 tokens, up to 32, …; those before the first row and behind the last are left out."""
    bins = Counter(max(16, 1 << (length - 1).bit_length()) for length in lengths)
    if not bins:
        return []
    low, high = min(bins), max(bins)
    return [(low << step, bins[low << step]) for step in range((high // low).bit_length())]
