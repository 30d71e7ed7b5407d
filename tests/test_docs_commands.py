"""The command blocks of README.md and docs/ do what the pages show.

CONTRIBUTING.md describes the marks. The blocks of the first guide make the build that all other pages start from.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from documented_commands import PAGES, ROOT, Block, appears, blocks, split
from documented_scenes import Workplace, scene, write_hub_cache
from ollama_double import Answer, OllamaDouble
from oracle import olpack

FIRST = ROOT / "docs/guides/first-assistant.md"
RUN = [page for page in PAGES if page != FIRST and any(block.runs for block in blocks(page))]
LONG = "coding-assistant"  # its build takes minutes


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
    for block in blocks(page):
        if name := block.marks.get("file"):
            path = place.folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(block.text, encoding="utf-8")
        elif block.runs:
            with scene(block.marks.get("scene"), place):
                _run(block, place)


def _run(block: Block, place: Workplace) -> None:
    printed, codes = "", []
    for command in block.commands:
        variables, words = split(command)
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
        assert appears(line, printed), f"{block.place}: `{line}` is not in what was printed:\n{printed}"


def test_the_first_guide_ends_in_a_finished_build(built):
    assert (built / "work/build/support/compare/report.html").is_file()


@pytest.mark.parametrize("page", RUN, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_the_command_blocks_of_a_page(page, workplace):
    _run_page(page, workplace)
