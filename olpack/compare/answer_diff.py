"""Answers as a page shows them: equal ones once, the differences from the first answer marked, each line in its own direction."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from olpack.compare.results import Answer

if TYPE_CHECKING:
    from markupsafe import Markup

# A word, one of ASCII's punctuation marks, or indentation, which in code means something, with the end of the line before.
_TOKEN = re.compile(r"[^\s!-/:-@\[-^`{-~]+|[!-/:-@\[-^`{-~]|\n[^\S\n]*|\A[^\S\n]+")
_RELATED = 0.5  # share of common tokens, as difflib counts it, below which lines are not compared word by word
_ALIKE = 0.3  # share of an answer that is in the first one too, below which nothing is marked
_AT_MOST = 4000  # tokens of both texts together that are compared; the time grows with their square
_STRUCK = 40  # characters of a missing stretch that are shown; a longer one would hide the answer itself

Piece = tuple[str, str]  # "same", "mark" (not in the first answer) or "del" (only in the first answer), and the text


@dataclass(frozen=True)
class Block:
    """A line at the margin with the indented or empty lines after it, or a whole fenced block.

    Attributes:
        html: escaped, with <mark> and <del> in it.
        direction: for the attribute `dir`. A function's comments in Arabic do not turn the function round: its first line decides.
        code: it is shown in a fixed-width type.
    """

    html: Markup
    direction: str
    code: bool


@dataclass(frozen=True)
class AnswerGroup:
    """One answer and the quants that gave it.

    Attributes:
        names: of the quants, in their order.
        answer: as the first of them gave it.
        blocks: its text.
        compared: "first" for the answer that others are compared with, "marked", or "unlike" where so little is the same that nothing is
            marked.
    """

    names: list[str]
    answer: Answer
    blocks: list[Block]
    compared: str


def group_answers(names: Sequence[str], answers: Sequence[Answer | None]) -> list[AnswerGroup]:
    """Equal answers grouped, in the order in which they first come. None, for a quant that did not answer, is left out."""
    named: dict[tuple[str, ...], tuple[Answer, list[str]]] = {}
    for name, answer in zip(names, answers, strict=True):
        if answer is not None:
            named.setdefault((answer.text, answer.finish, *answer.flags), (answer, []))[1].append(name)
    groups: list[AnswerGroup] = []
    for answer, own in named.values():
        pieces = compare_words(groups[0].answer.text, answer.text) if groups else [("same", answer.text)]
        compared = "unlike" if pieces is None else "marked" if groups else "first"
        groups.append(AnswerGroup(own, answer, split_blocks(pieces or [("same", answer.text)]), compared))
    return groups


def compare_words(first: str, text: str) -> list[Piece] | None:
    """The text in pieces: what it has in common with `first` ("same"), what only it has ("mark"), and what only `first` has ("del").

    "same" and "mark" together are the text. Lines first, then words in the lines that differ; spaces within a line are not compared. None
    where too little is the same.
    """
    one, two = first.splitlines(keepends=True), text.splitlines(keepends=True)
    matcher = difflib.SequenceMatcher(None, [line.rstrip() for line in one], [line.rstrip() for line in two], autojunk=False)
    pieces: list[Piece] = []
    for kind, a, a_end, b, b_end in matcher.get_opcodes():
        old, new = "".join(one[a:a_end]), "".join(two[b:b_end])
        if old and kind != "equal" and pieces and pieces[-1][1].endswith("\n"):
            # A missing stretch is shown at the end of the line before, where it moves no indentation.
            before, line = pieces.pop()
            compared = _compare_lines(old, new)
            missing_first = compared[0][0] == "del"
            if missing_first:
                pieces += [(before, line[:-1]), compared[0], ("same", "\n"), *compared[1:]]
            else:
                pieces += [(before, line), *compared]
        else:
            pieces += [("same", new)] if kind == "equal" else _compare_lines(old, new)
    same = sum(len(part.split()) for kind, part in pieces if kind == "same")
    return pieces if same >= _ALIKE * len(text.split()) and (same or first == text) else None


def _compare_lines(first: str, text: str) -> list[Piece]:
    one, two = list(_TOKEN.finditer(first)), list(_TOKEN.finditer(text))
    matcher = difflib.SequenceMatcher(None, [token[0] for token in one], [token[0] for token in two], autojunk=False)
    if not one or not two or len(one) + len(two) > _AT_MOST or matcher.ratio() < _RELATED:
        return [piece for piece in (("del", first), ("mark", text)) if piece[1]]
    pieces: list[Piece] = []
    done = 0
    for kind, a, a_end, b, b_end in matcher.get_opcodes():
        if kind == "equal":
            continue
        start = two[b].start() if b < b_end else two[b - 1].end() if b else 0
        pieces.append(("same", text[done:start]))
        if a < a_end:
            pieces.append(("del", first[one[a].start() : one[a_end - 1].end()]))
        done = start
        if b < b_end:
            done = two[b_end - 1].end()
            pieces.append(("mark", text[start:done]))
    return [piece for piece in [*pieces, ("same", text[done:])] if piece[1]]


def split_blocks(pieces: Sequence[Piece]) -> list[Block]:
    """The pieces of `compare_words` cut into blocks. Of what only the first answer has, at most a few words of one line are shown."""
    from markupsafe import Markup, escape

    text = "".join(part for kind, part in pieces if kind != "del")
    ranges = list(_ranges(text))
    html = [Markup("") for _ in ranges]
    index = position = 0
    for kind, part in pieces:
        if kind == "del":
            shown = part.strip()
            short = 0 < len(shown) <= _STRUCK and "\n" not in shown
            html[index] += Markup("<del>%s</del>") % shown if short else Markup('<del title="%s">⋯</del>') % part
            continue
        while part:
            while position >= ranges[index][1]:
                index += 1
            taken = part[: ranges[index][1] - position]
            html[index] += _marked(taken) if kind == "mark" else escape(taken)
            part, position = part[len(taken) :], position + len(taken)
    # Where code is not fenced, its indentation gives it away.
    indented = any(re.search(r"\n[ \t]+\S", text[start:end]) for start, end, fenced in ranges if not fenced)
    return [Block(own, "ltr" if fenced else "auto", fenced or indented) for own, (_, _, fenced) in zip(html, ranges, strict=True)]


def _marked(text: str) -> Markup:
    """Each line in a mark of its own, which leaves out the space around it, unless space is all that there is."""
    from markupsafe import Markup, escape

    if not text.strip():
        return Markup("<mark>%s</mark>") % text
    parts = re.split(r"(\s*\n\s*|^\s+)", text)
    return Markup("").join(Markup("<mark>%s</mark>") % part if part.strip() else escape(part) for part in parts)


def _ranges(text: str) -> Iterator[tuple[int, int, bool]]:
    """(start, end, fenced) of each block; together they are the text, and there is at least one."""
    start = end = 0
    fenced = False
    for line in text.splitlines(keepends=True):
        fence = line.lstrip().startswith("```") and line.count("```") == 1
        if end > start and not fenced and (fence or not line[0].isspace()):
            yield start, end, False
            start = end
        end += len(line)
        if fence and fenced:
            yield start, end, True
            start = end
        fenced ^= fence
    if end > start or not text:
        yield start, end, fenced
