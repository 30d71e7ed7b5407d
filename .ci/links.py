"""Checks every link in the Markdown of the project, and lists those that lead to other hosts.

    python .ci/links.py            # problems to stderr, exit code 1 if there are any; links to other hosts to stdout, each with its pages
    python .ci/links.py FOLDER     # the same for another folder

A relative link needs its file, and its anchor a heading of that page, spelled as GitHub and the site spell it. No other host is asked: the list
is for a person, or for a tool that may use the network.
"""

from __future__ import annotations

import re
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from urllib.parse import unquote

from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT = Path(__file__).parents[1]
LEFT_OUT = {"build", "dist", "node_modules"}  # and hidden folders, but for .github
_PARSER = MarkdownIt("commonmark").enable("table")
_IN_HTML = re.compile(r"""\b(id|name|href|src|srcset)=["']([^"']+)["']""")


def pages(root: Path) -> list[Path]:
    """The Markdown files of the project, without those that a build or a tool made."""

    def shown(path: Path) -> bool:
        folders = path.relative_to(root).parts[:-1]
        return not any(name in LEFT_OUT or (name.startswith(".") and name != ".github") for name in folders)

    return sorted(path for path in root.rglob("*.md") if shown(path))


def tokens(text: str) -> Iterator[Token]:
    """All tokens of a page, those within a line included."""
    for token in _PARSER.parse(text):
        yield token
        yield from token.children or []


def anchors(text: str) -> set[str]:
    """The anchors of a page: its headings, and the names that its HTML gives."""
    found, seen = set(), Counter[str]()
    parsed = _PARSER.parse(text)
    for opened, inline in pairwise(parsed):
        if opened.type == "heading_open":
            title = "".join(child.content for child in inline.children or [] if child.type in ("text", "code_inline"))
            slug = re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")
            found.add(f"{slug}-{seen[slug]}" if seen[slug] else slug)
            seen[slug] += 1
    html = " ".join(token.content for token in tokens(text) if token.type in ("html_block", "html_inline"))
    return found | {value for key, value in _IN_HTML.findall(html) if key in ("id", "name")}


def links(text: str) -> Iterator[str]:
    """The targets of a page's links and pictures."""
    for token in tokens(text):
        if token.type in ("link_open", "image"):
            yield str(token.attrGet("href") or token.attrGet("src"))
        elif token.type in ("html_block", "html_inline"):
            yield from (value for key, value in _IN_HTML.findall(token.content) if key in ("href", "src", "srcset"))


def check(root: Path) -> tuple[list[str], dict[str, list[str]]]:
    """The problems of all pages, and the links to other hosts with the pages that have them."""
    problems, elsewhere = [], defaultdict(list)
    known: dict[Path, set[str]] = {}
    for page in pages(root):
        name = page.relative_to(root).as_posix()
        for link in links(page.read_text(encoding="utf-8")):
            if re.match(r"[a-z]+:", link):
                elsewhere[link].append(name)
                continue
            path, _, anchor = unquote(link).partition("#")
            target = (page.parent / path).resolve() if path else page
            if not target.exists() or not target.is_relative_to(root.resolve()):
                problems.append(f"{name}: {link}: there is no such file")
            elif anchor and target.suffix == ".md":
                if target not in known:
                    known[target] = anchors(target.read_text(encoding="utf-8"))
                if anchor not in known[target]:
                    problems.append(f"{name}: {link}: no heading has this anchor")
    return problems, elsewhere


def main() -> int:
    root = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT
    problems, elsewhere = check(root.resolve())
    for link, names in sorted(elsewhere.items()):
        print(f"{link}  {', '.join(sorted(set(names)))}")
    print(f"{len(pages(root))} pages, {len(elsewhere)} links to other hosts, {len(problems)} problems", file=sys.stderr)
    print("".join(f"{problem}\n" for problem in problems), end="", file=sys.stderr)
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main())
