"""Hook of MkDocs: the site has the folders of the repository, so one relative link works on the site and in the repository.

MkDocs reads one folder. The pages of this project are README.md and its neighbours, docs/ and benchmarks/, and they link to each other.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
PATTERNS = ("*.md", "docs/**/*.*", "benchmarks/*.md", "modelfiles/*/*.md", "olpack/assets/*/*.md", "LICENSE")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """The navigation, with the pages of each pattern that it does not name itself, by name."""
    named = set(_names(config.nav))
    config.nav = _expanded(config.nav, named)
    return config


def _names(entry: Any) -> Iterator[str]:
    if isinstance(entry, str):
        yield entry
    for inner in entry.values() if isinstance(entry, dict) else entry if isinstance(entry, list) else ():
        yield from _names(inner)


def _expanded(entry: Any, named: set[str]) -> Any:
    if isinstance(entry, dict):
        return {title: _expanded(inner, named) for title, inner in entry.items()}
    if not isinstance(entry, list):
        return entry
    pages: list[Any] = []
    for inner in entry:
        if isinstance(inner, str) and "*" in inner:
            pages += sorted({path.relative_to(ROOT).as_posix() for path in ROOT.glob(inner)} - named)
        else:
            pages.append(_expanded(inner, named))
    return pages


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """The pages and pictures of the repository under their own paths, beside the files of the theme."""
    own = [file for file in files if file.src_dir != config.docs_dir]
    paths = sorted({path.relative_to(ROOT).as_posix() for pattern in PATTERNS for path in ROOT.glob(pattern) if path.is_file()})
    return Files([*own, *(File.generated(config, path, abs_src_path=str(ROOT / path)) for path in paths)])
