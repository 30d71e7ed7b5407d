"""The documents agree with the code."""

from __future__ import annotations

import json
import re
import shlex
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


@pytest.mark.parametrize("page", ["README.md", "README.ar.md"])
def test_the_readme_names_every_verb_and_no_other(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    named = set(re.findall(r"`olpack ([a-z]+)", text)) | set(re.findall(r"^    olpack ([a-z]+)", text, re.MULTILINE)) | {"train", "export"}
    named |= {verb for verbs in re.findall(r"`olpack [a-z]+`((?:, `[a-z]+`)*)", text) for verb in re.findall(r"`([a-z]+)`", verbs)}
    assert named == set(get_command(cli.app).commands)


PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("benchmarks/*.md")]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def _section(text, title):
    return text.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def _rows(text):
    """The cells of the first table in a text, row by row, its title first."""
    lines = text[text.index("\n|") + 1 :].partition("\n\n")[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split(" |")] for line in lines if not line.startswith("| ---")]


def test_the_files_that_the_documents_link_to_are_there():
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for target in re.findall(r"\]\(([^)#:]+)[^):]*\)", text) + re.findall(r'<img src="([^":]+)"', text):
            assert (page.parent / target).exists() or "{" in target, f"{page.name} links to {target}"


def test_the_headings_that_the_documents_link_to_are_there():
    for page in PAGES:
        for target, heading in re.findall(r"\]\(([^):#]*)#([^)]+)\)", page.read_text(encoding="utf-8")):
            lines = re.findall(r"^#+ (.+)$", ((page.parent / target) if target else page).read_text(encoding="utf-8"), re.MULTILINE)
            assert heading in {re.sub(r"[^\w -]", "", line.lower()).replace(" ", "-") for line in lines}, f"{page.name} links to {target}#{heading}"


def test_the_readme_has_two_screens():
    assert sum(not line.startswith("|") for line in README.splitlines()) <= 110


def test_the_quick_start_is_what_the_makefile_and_ci_have():
    targets = re.findall(r"^    make (\w+)", README, re.MULTILINE)
    assert targets == ["demo", "test"]
    assert all(re.search(rf"^{target}: install$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE) for target in targets)
    assert "make test" in (ROOT / ".ci/run").read_text(encoding="utf-8").split("\n")


@pytest.mark.parametrize("page", [*sorted(ROOT.glob("README*.md")), *sorted(ROOT.glob("docs/*.md"))], ids=lambda page: page.name)
def test_the_commands_of_the_pages_have_these_options(page):
    commands = _commands(get_command(cli.app), "olpack")
    text = page.read_text(encoding="utf-8")
    for quoted in re.findall(r"`(olpack [^`]+)`", text) + re.findall(r"^ {4}(olpack .+)", text, re.MULTILINE):
        words = shlex.split(quoted, comments=True)
        command = commands.get(" ".join(words[:3])) or commands.get(" ".join(words[:2]))
        if command is None:  # a word that is no command: `olpack COMMAND`, or an option of olpack itself
            assert words[1].isupper() or words[1].startswith("--"), f"{page.name}: {quoted}"
            continue
        known = {name for parameter in command.params for name in parameter.opts} | {"--help"}
        assert {word.partition("=")[0] for word in words if word.startswith("--")} <= known, f"{page.name}: {quoted}"


def test_each_cell_of_the_comparison_has_a_source():
    text = (ROOT / "docs/comparison.md").read_text(encoding="utf-8")
    overview = _rows(text)
    tools = overview[0][1:]
    assert len(tools) == 7 and len(overview) > 12
    for title, *cells in overview[1:]:
        rows = _rows(_section(text, re.fullmatch(r"\[(.+)\]\(#.+\)", title)[1]))[1:]
        assert [row[0] for row in rows] == tools, title
        for cell, (tool, long, source) in zip(cells, rows, strict=True):
            assert long.partition(":")[0] == cell, (title, tool)
            assert re.search(r"\]\(https://|`(olpack|python|make) " if tool != "olpack" else r"`(olpack|python|make) |\]\(", source), (title, tool)
    assert _rows(_section(README, "Beside other tools")) == _rows(text.replace("](#", "](docs/comparison.md#"))


def test_the_figures_of_the_readme_are_on_their_pages():
    rows = _rows(_section(README, "Figures"))[1:]
    assert len(rows) > 4
    for what, figure, measured, command in rows:
        page = (ROOT / re.search(r"\]\((.+?)\)", measured)[1]).read_text(encoding="utf-8")
        for number in re.findall(r"\d min \d+ s|\d[\d,.]*\d", figure):
            assert number in page, f"{what}: {number}"
        date = re.match(r"\d{4}-\d\d-\d\d", measured)[0]
        assert date in page, what
        script = re.match(r"`(?:python ([^\s`]+)|make \w+)", command)[1]
        assert script is None or (ROOT / script).is_file(), command


def test_the_quants_of_the_readme_are_those_of_their_page():
    page = {row[0]: row for row in _rows((ROOT / "docs/quants.md").read_text(encoding="utf-8"))}
    for name, _, bits, lost, *_ in _rows(_section(README, "Which quant"))[1:]:
        assert name.startswith("`{budget") or (bits, lost) == (page[name][1], page[name][3]), name


def test_each_claim_names_a_check_that_is_there():
    rows = _rows((ROOT / "docs/claims.md").read_text(encoding="utf-8"))[1:]
    assert len(rows) > 15
    for claim, check in rows:
        files = re.findall(r"(?:benchmarks|tests)/\w+\.py", check)
        assert files or "`olpack " in check, claim
        assert all((ROOT / file).is_file() for file in files), check


def test_every_variable_that_olpack_reads_is_documented():
    page = (ROOT / "docs/files.md").read_text(encoding="utf-8")
    read = {
        name
        for path in ROOT.glob("olpack/**/*.py")
        for name in re.findall(r'environ\.get\("(\w+)"|^VARIABLE = "(\w+)"', path.read_text(encoding="utf-8"), re.MULTILINE)
    }
    names = {one or other for one, other in read} - {"PYTHONPATH"}
    assert len(names) > 6 and all(f"`{name}`" in page for name in names), names


def test_the_picture_of_the_terminal_fetches_nothing():
    picture = (ROOT / "docs/build.svg").read_text(encoding="utf-8")
    assert "Recommended" in picture.replace("&#160;", " ")
    assert not re.search(r"@font-face|<script|<image|href=|url\((?!#)", picture)


def test_help_shows_the_first_sentence_of_each_command_whole(tmp_path):
    for words in ([], ["data"]):
        commands = olpack(tmp_path, *words, "--help", columns=80)[1].partition("Commands:")[2].strip().splitlines()
        assert commands and all(line.endswith(".") and not line.endswith("...") for line in commands), commands
