"""The command blocks of README.md and docs/ do what the pages show, and the commands in their sentences exist.

CONTRIBUTING.md describes the marks. The blocks of the first guide make the build that all other pages start from.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import documented_commands as documented
import pytest
from documented_scenes import SCENES, Workplace, scene, write_hub_cache
from ollama_double import Answer, OllamaDouble
from oracle import olpack
from typer.main import get_command

from olpack import cli, progress

ROOT = Path(__file__).parent.parent
FIRST = ROOT / "docs/guides/first-assistant.md"
PAGES = [page for page in sorted([*ROOT.glob("README*.md"), *ROOT.glob("docs/**/*.md")]) if page.parent.name != "reference"]
LONG = "coding-assistant"  # its build takes minutes
_OTHERS = {"create", "list", "pull", "ps", "rm", "run", "serve", "show", "stop"}  # of ollama


def _blocks(page: Path) -> list[documented.Block]:
    return documented.blocks(page, ROOT)


def _runs(block: documented.Block) -> bool:
    return "needs" not in block.marks and "file" not in block.marks


PAGES_THAT_RUN = [page for page in PAGES if page != FIRST and any(_runs(block) for block in _blocks(page))]


@pytest.fixture(scope="module")
def hub(tmp_path_factory) -> Path:
    """The small model in a cache of the Hub."""
    return write_hub_cache(tmp_path_factory.mktemp("hub"))


@pytest.fixture(scope="module")
def offline(hub) -> Iterator[None]:
    """A Hub that is only its cache."""
    import huggingface_hub.constants as constants

    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"HF_HUB_CACHE": str(hub.parents[2]), "HF_HUB_OFFLINE": True}.items():
            patch.setattr(constants, name, value)
        yield


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[OllamaDouble]:
    """The server of all pages: a record of a deploy has its address."""
    with OllamaDouble(tmp_path_factory.mktemp("server")) as double:
        double.answer = lambda prompt: Answer(["Open Settings, ", "choose Account, ", "then Reset password."])
        yield double


@pytest.fixture(scope="module")
def built(tmp_path_factory, hub, offline, server) -> Path:
    """A folder with the working folder that the first guide leaves, and the models that its server has then."""
    root = tmp_path_factory.mktemp("first")
    (root / "work").mkdir()
    _run_page(FIRST, Workplace(root / "work", server, hub))
    shutil.copytree(server.store.root, root / "models")
    return root


@pytest.fixture
def workplace(built, hub, server, tmp_path) -> Workplace:
    """A copy of all that to change."""
    shutil.copytree(built / "work", tmp_path / "work")
    shutil.rmtree(server.store.root)
    shutil.copytree(built / "models", server.store.root)
    return Workplace(tmp_path / "work", server, hub)


def _run_page(page: Path, place: Workplace) -> None:
    for block in _blocks(page):
        if name := block.marks.get("file"):
            path = place.folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(block.text, encoding="utf-8")
        elif _runs(block):
            with scene(block.marks.get("scene"), place):
                _run(block, place)


def _run(block: documented.Block, place: Workplace) -> None:
    printed, codes = "", []
    for command in block.commands:
        variables, words = documented.split(command)
        assert words[0] == "olpack" and LONG not in words, f"{block.place}: no test can run `{command}`: mark the block with <!-- needs: … -->"
        server = variables.pop("OLLAMA_HOST", place.server.url)
        with pytest.MonkeyPatch.context() as patch:
            for name, value in variables.items():
                patch.setenv(name, value)
            code, out, err = olpack(place.folder, *words[1:], server=server, columns=100)
        codes.append(code)
        printed += f"{out}\n{err}\n"
    assert codes[:-1] == [0] * len(codes[:-1]) and codes[-1] == int(block.marks.get("exit", 0)), f"{block.place}: {codes}\n{printed}"
    for line in block.shown:
        assert documented.appears(line, printed), f"{block.place}: `{line}` is not in what was printed:\n{printed}"


def test_the_first_guide_ends_in_a_finished_build(built):
    assert (built / "work/build/support/compare/report.html").is_file()


@pytest.mark.parametrize("page", PAGES_THAT_RUN, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_the_command_blocks_of_a_page(page, workplace):
    _run_page(page, workplace)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_all_commands_of_a_page_exist(page):
    for block in _blocks(page):
        assert SCENES.keys() >= {block.marks[mark] for mark in ("scene",) if mark in block.marks}, block.place
        for command in block.commands:
            _check(command, block.place, whole=True)
    for command in documented.mentioned(page):
        _check(command, page.name, whole=False)


def _check(command: str, place: str, whole: bool) -> None:
    """Parse a command without running it."""
    if not whole:
        command = re.split(r"…|\s[|>&]", command)[0]
    words = documented.split(command)[1]
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
            assert verb in _OTHERS, f"{place}: {command}"
        case ["python" | "python3", script, *_] if script.endswith(".py"):
            assert (ROOT / script).is_file(), f"{place}: {command}"


def _unparsed(words: list[str], whole: bool) -> str:
    """What is wrong with an olpack command line, "" if nothing is. In a sentence an argument may be missing."""
    command, context = get_command(cli.app), None
    try:
        while words or context is None:
            context = command.make_context("olpack", list(words), parent=context)
            if not hasattr(command, "resolve_command"):
                break
            words = [*context._protected_args, *context.args]
            _, command, words = command.resolve_command(context, words)
    except click.exceptions.MissingParameter as error:
        return error.format_message() if whole else ""
    except click.exceptions.UsageError as error:
        return error.format_message()
    except click.exceptions.Exit:
        return ""
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
        documented.blocks(page, tmp_path)
    assert "No such option" in _unparsed(["plan", "support", "--vrm", "6"], whole=True)
    assert "No such command" in _unparsed(["biuld", "support"], whole=False)
    assert _unparsed(["plan"], whole=True) and not _unparsed(["plan"], whole=False)
    assert documented.appears("disk  3.1 MB: …; no files", "x\ndisk   790 kB: Q4_0; no files")
    assert not documented.appears("disk", "a disk")


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
