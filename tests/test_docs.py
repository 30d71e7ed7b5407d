"""The documents agree with the code."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from oracle import olpack
from typer.main import get_command

from olpack import cli, reference
from olpack.recipe import Recipe, json_schema

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("name", reference.pages())
def test_generated_pages_are_current(name):
    assert (ROOT / "docs/reference" / name).read_text(encoding="utf-8") == reference.pages()[name], "make docs"


def test_every_command_with_each_option_is_documented():
    page = reference.commands()
    commands = _commands(get_command(cli.app), "olpack")
    assert len(commands) > 18
    for path, command in commands.items():
        section = page.partition(f"## {path}\n")[2].partition("\n## ")[0]
        assert section, path
        for parameter in command.params:
            row = parameter.opts[0] if parameter.param_type_name == "option" else parameter.metavar
            assert re.search(rf"^\| `\[?{re.escape(row)}.*` \| \S", section, re.MULTILINE), (path, row)


def _commands(command, path):
    inner = getattr(command, "commands", None)
    return (
        {path: command} if inner is None else {key: value for name, one in inner.items() for key, value in _commands(one, f"{path} {name}").items()}
    )


def test_every_recipe_key_is_documented():
    page = reference.recipe()
    keys = [key.partition("parameters.")[0] for key in Recipe.model_validate({"base": "b", "data": {"train": "t"}}).settings()]
    assert len(keys) > 50
    for key in keys:
        assert re.search(rf"^\| `{re.escape(key)}` \| .+ \| \S[^|]* \|$", page, re.MULTILINE), key


def test_every_recipe_key_has_a_docstring():
    schema = json_schema()
    for section in (schema, *schema["$defs"].values()):
        for key, value in section["properties"].items():
            assert value.get("description"), f"{section['title']}: {key}"


def test_the_schema_command_prints_the_page(tmp_path):
    code, printed, _ = olpack(tmp_path, "schema")
    assert code == 0 and printed == (ROOT / "docs/reference/recipe.schema.json").read_text(encoding="utf-8")
    assert "$id" not in json.loads(printed)


def test_the_readme_names_every_verb_and_no_other():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`olpack ([a-z]+)", text)) | set(re.findall(r"^    olpack ([a-z]+)", text, re.MULTILINE)) | {"train", "export"}
    named |= {verb for verbs in re.findall(r"`olpack [a-z]+`((?:, `[a-z]+`)*)", text) for verb in re.findall(r"`([a-z]+)`", verbs)}
    assert named == set(get_command(cli.app).commands)


def test_the_files_that_the_documents_link_to_are_there():
    for page in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("benchmarks/*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists() or "{" in target, f"{page.name} links to {target}"


def test_help_shows_the_first_sentence_of_each_command_whole(tmp_path):
    for words in ([], ["data"]):
        commands = olpack(tmp_path, *words, "--help", columns=80)[1].partition("Commands:")[2].strip().splitlines()
        assert commands and all(line.endswith(".") and not line.endswith("...") for line in commands), commands
