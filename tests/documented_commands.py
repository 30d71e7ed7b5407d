"""The command blocks of a page, as CONTRIBUTING.md describes them: what is typed, what is shown, and the marks before a block."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from markdown_it import MarkdownIt

ROOT = Path(__file__).parent.parent
PAGES = [page for page in sorted([*ROOT.glob("README*.md"), *ROOT.glob("docs/**/*.md")]) if page.parent.name != "reference"]
MARKS = ("needs", "file", "scene", "exit")
# Programs whose lines make a block without `$` a block of commands.
PROGRAMS = ("olpack", "ollama", "make", "pip", "pipx", "uv", "python", "python3", "git", "apt", "brew", "cd", "unzip", "docker", "curl", "cmake")
_MARK = re.compile(r"<!--\s*(\w+):\s*(.*?)\s*-->", re.DOTALL)
_VARIABLE = re.compile(r"[A-Z_]+=\S*")


@dataclass
class Block:
    """One code block of a page.

    Attributes:
        place: page and line, for messages.
        commands: what is typed, a line that ends in `\\` joined with the next.
        shown: lines of output that the page shows.
        text: the whole content, for `file`.
        marks: of `MARKS`.
    """

    place: str
    commands: list[str] = field(default_factory=list)
    shown: list[str] = field(default_factory=list)
    text: str = ""
    marks: dict[str, str] = field(default_factory=dict)

    @property
    def runs(self) -> bool:
        """Whether a test runs it."""
        return "needs" not in self.marks and "file" not in self.marks


def blocks(page: Path) -> list[Block]:
    """The blocks of a page that have commands or marks.

    Raises:
        ValueError: a mark is misspelled, or has no block behind it.
    """
    found, marks = [], {}
    name = page.relative_to(ROOT).as_posix() if page.is_relative_to(ROOT) else page.name
    for token in MarkdownIt("commonmark").enable("table").parse(page.read_text(encoding="utf-8")):
        place = f"{name}:{(token.map or [0])[0] + 1}"
        if token.type == "html_block":
            written = dict(_MARK.findall(token.content))
            if unknown := written.keys() - set(MARKS):
                raise ValueError(f"{place}: {', '.join(unknown)} is no mark; the marks are {', '.join(MARKS)}")
            marks |= written
        elif token.type in ("fence", "code_block"):
            block = _block(place, token.content, token.info == "console", marks)
            if block.commands or block.marks:
                found.append(block)
            marks = {}
        elif marks:
            raise ValueError(f"{place}: {marks} stands before no block")
    return found


def _block(place: str, text: str, console: bool, marks: dict[str, str]) -> Block:
    block = Block(place, text=text, marks=marks)
    if "file" in marks:
        return block
    for line in text.replace("\\\n", " ").splitlines():
        if console:
            (block.commands if line.startswith("$ ") else block.shown).append(line.removeprefix("$ "))
        elif program(command := line.removeprefix("$ ").partition(" # ")[0].strip()) in PROGRAMS:
            block.commands.append(command)
    return block


def program(command: str) -> str:
    """The program that a line starts, without variables before it."""
    words = command.split()
    while words and _VARIABLE.fullmatch(words[0]):
        words.pop(0)
    return words[0] if words else ""


def split(command: str) -> tuple[dict[str, str], list[str]]:
    """Variables and words of a command line."""
    words, variables = shlex.split(command, comments=True), {}
    while words and _VARIABLE.fullmatch(words[0]):
        name, _, value = words.pop(0).partition("=")
        variables[name] = value
    return variables, words


def mentioned(page: Path) -> Iterator[str]:
    """The olpack commands in the sentences and tables of a page: `olpack plan NAME --vram 6`."""
    for token in MarkdownIt("commonmark").enable("table").parse(page.read_text(encoding="utf-8")):
        for child in token.children or []:
            if child.type == "code_inline" and child.content.startswith("olpack "):
                yield child.content


def appears(shown: str, printed: str) -> bool:
    """Whether a line of a page is a line of what a command printed. Numbers may differ, `…` stands for anything, and blanks for one blank."""

    def plain(line: str) -> str:
        return " ".join(re.sub(r"\d[\d,.]*", "0", re.sub(r"\b[kMGT]B\b", "B", line)).split())

    pattern = re.compile(r".*".join(re.escape(plain(part)) for part in shown.split("…")))
    return not plain(shown) or any(pattern.fullmatch(plain(line)) for line in printed.splitlines())
