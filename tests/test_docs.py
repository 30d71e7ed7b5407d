"""What the documents say is what the code says."""

from __future__ import annotations

import re
from pathlib import Path

from oracle import olpack
from typer.main import get_command

from olpack import cli
from olpack.compare.schema import to_markdown

ROOT = Path(__file__).parent.parent


def test_the_schema_page_is_the_schema():
    assert (ROOT / "docs/results.md").read_text(encoding="utf-8") == to_markdown(), "python -m olpack.compare.schema > docs/results.md"


def test_the_readme_names_every_verb_and_no_other():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`olpack ([a-z]+)", text)) | set(re.findall(r"^    olpack ([a-z]+)", text, re.MULTILINE)) | {"train", "export"}
    named |= {verb for verbs in re.findall(r"`olpack [a-z]+`((?:, `[a-z]+`)*)", text) for verb in re.findall(r"`([a-z]+)`", verbs)}
    assert named == set(get_command(cli.app).commands)


def test_the_files_that_the_documents_link_to_are_there():
    for page in [ROOT / "README.md", *ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists() or "{" in target, f"{page.name} links to {target}"


def test_help_shows_the_first_sentence_of_each_command_whole(tmp_path):
    for words in ([], ["data"]):
        commands = olpack(tmp_path, *words, "--help", width=80)[1].partition("Commands:")[2].strip().splitlines()
        assert commands and all(line.endswith(".") and not line.endswith("...") for line in commands), commands
