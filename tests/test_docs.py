"""The documents agree with the code."""

from __future__ import annotations

import functools
import json
import re
import subprocess
import sys

import pytest
import typer
from documented_commands import PAGES, ROOT, appears, blocks, mentioned, split
from documented_scenes import SCENES
from oracle import olpack
from typer.main import get_command

from olpack import cli, progress, reference
from olpack.recipe import Recipe, json_schema

_UsageError = typer.BadParameter.__base__  # of the click that typer brings
_OLLAMA = {"create", "list", "pull", "ps", "rm", "run", "serve", "show", "stop"}
README = (ROOT / "README.md").read_text(encoding="utf-8")


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


def _section(text, title):
    return text.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def _rows(text):
    """The cells of the first table in a text, row by row, its title first."""
    lines = text[text.index("\n|") + 1 :].partition("\n\n")[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split(" |")] for line in lines if not line.startswith("| ---")]


def test_the_readme_has_two_screens():
    assert sum(not line.startswith("|") for line in README.splitlines()) <= 110


def test_the_quick_start_is_what_the_makefile_and_ci_have():
    targets = re.findall(r"^    make (\w+)", README, re.MULTILINE)
    assert targets == ["demo", "test"]
    assert all(re.search(rf"^{target}: install\b", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE) for target in targets)
    assert "make test" in (ROOT / ".ci/run").read_text(encoding="utf-8").split("\n")


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


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_all_commands_of_a_page_exist(page):
    for block in blocks(page):
        assert SCENES.keys() >= {block.marks[mark] for mark in ("scene",) if mark in block.marks}, block.place
        for command in block.commands if not block.runs else []:
            _check(command, block.place, whole=True)
    for command in mentioned(page):
        _check(command, page.name, whole=False)


def _check(command: str, place: str, whole: bool) -> None:
    """Parse a command without running it."""
    if not whole:
        command = re.split(r"…|\s[|>&]", command.replace('…"', '"'))[0]
    words = split(command)[1]
    while words and words[0] in ("-m", "sudo"):
        words = words[1:]
    match words:
        case ["olpack", *rest]:
            if problem := _unparsed(rest, whole):
                pytest.fail(f"{place}: `{command}`: {problem}")
        case ["make", *targets]:
            rules = (ROOT / "Makefile").read_text()
            assert all(re.search(rf"^{re.escape(target)}:", rules, re.MULTILINE) for target in targets if "=" not in target), f"{place}: {command}"
        case ["ollama", verb, *_]:
            assert verb in _OLLAMA, f"{place}: {command}"
        case ["python" | "python3", script, *_] if script.endswith(".py"):
            assert (ROOT / script).is_file(), f"{place}: {command}"


@functools.cache
def _olpack() -> typer.core.TyperGroup:
    return get_command(cli.app)


def _unparsed(words: list[str], whole: bool) -> str:
    """What is wrong with an olpack command line, "" if nothing is. In a sentence only names have to exist."""
    command, context = _olpack(), None
    if words[:1] == ["--install-completion"]:  # typer writes to the shell's settings while it parses
        return "" if any(words[0] in option.opts for option in command.params) else "No such option"
    try:
        while command is not None:
            context = command.make_context("olpack", list(words), parent=context)
            words = [*context._protected_args, *context.args]
            command = command.resolve_command(context, words)[1] if words and hasattr(command, "resolve_command") else None
            words = words[1:]
    except typer.Exit:
        return ""
    except _UsageError as error:
        return error.format_message() if whole or error.format_message().startswith("No such") else ""
    finally:
        progress.use("lines")
    return ""


def test_pages_name_the_pinned_versions():
    pinned = re.search(r'"(llama-cpp-python==[^"]+)"', (ROOT / "pyproject.toml").read_text())[1]
    for page in PAGES:
        assert set(re.findall(r"llama-cpp-python==[\d.]+\d", page.read_text(encoding="utf-8"))) <= {pinned}, page


def test_the_checks_see_faults(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("<!-- need: x -->\n```console\n$ olpack list\n```\n")
    with pytest.raises(ValueError, match="need is no mark"):
        blocks(page)
    assert "No such option" in _unparsed(["plan", "support", "--vrm", "6"], whole=True)
    assert "No such command" in _unparsed(["biuld", "support"], whole=False)
    assert _unparsed(["plan"], whole=True) and not _unparsed(["plan"], whole=False)
    assert appears("disk  3.1 MB: …; no files", "x\ndisk   790 kB: Q4_0; no files")
    assert not appears("disk", "a disk")


def _script(name: str, *words: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, ROOT / ".ci" / name, *words], capture_output=True, text=True)


def test_every_link_leads_somewhere():
    assert (done := _script("links.py")).returncode == 0, done.stderr


def test_a_broken_link_and_a_broken_anchor_are_found(tmp_path):
    (tmp_path / "a.md").write_text("# One `two`\n[b](b.md) [c](#one-two) [d](#three) ![e](e.png)\n\n    [f](f.md)\n")
    done = _script("links.py", str(tmp_path))
    assert done.returncode == 1
    assert done.stderr.splitlines()[1:] == [
        "a.md: b.md: there is no such file",
        "a.md: #three: no heading has this anchor",
        "a.md: e.png: there is no such file",
    ]
