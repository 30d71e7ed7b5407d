"""The text that people see, compared with the files in tests/data/snapshots (see `snapshots.py`)."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import served_gguf
from ollama_double import OllamaDouble
from snapshots import FOLDER, RECIPE, check, make_workspace, terminal
from typer.core import TyperGroup
from typer.main import get_command

from olpack import cli
from olpack.commands import doctor
from olpack.commands.doctor import Finding
from olpack.compare.report import render_report
from olpack.compare.results import read_results
from olpack.compare.table import print_table
from olpack.deploy import Package
from olpack.deploy.client import OllamaClient
from olpack.deploy.register import TagFile, register
from olpack.workspace import template_source

RESULTS = Path(__file__).parent / "data/results.json"


def commands() -> Iterator[list[str]]:
    """The words of every command, and of the groups: [], ["build"], ["data"], ["data", "check"]."""
    waiting: list[tuple[list[str], object]] = [([], get_command(cli.app))]
    while waiting:
        words, command = waiting.pop(0)
        yield words
        if isinstance(command, TyperGroup):
            waiting += [([*words, name], one) for name, one in command.commands.items()]


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    return make_workspace(tmp_path)


@pytest.mark.parametrize("words", list(commands()), ids=lambda words: "-".join(["help", *words]))
def test_help(tmp_path: Path, words: list[str]) -> None:
    check("-".join(["help", *words]), terminal(tmp_path, *words, "--help"))


def test_the_comparison_table(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    print_table(read_results(RESULTS))
    check("comparison", capsys.readouterr().out)


def test_the_report() -> None:
    """The page without the drawings, the style and the script, one tag a line."""
    page = render_report(read_results(RESULTS), template_source("report.html.j2"))
    page = re.sub(r"<(svg|style|script)\b([^>]*)>.*?</\1>", lambda found: f"<{found[1]}>…</{found[1]}>", page, flags=re.DOTALL)
    lines = [line.strip() for line in re.sub(r"(</?[a-z!][^>]*>)", r"\n\1\n", page).splitlines()]
    check("report", "\n".join(line for line in lines if line))


def test_a_list(workspace: Path, ollama_double: OllamaDouble) -> None:
    parts = [terminal(workspace, "list")]
    file = workspace / "build/support/gguf/support-Q4_K_M.gguf"
    file.parent.mkdir(parents=True)
    made = TagFile("q4_K_M", file, served_gguf.write(file, served_gguf.CHAT, 15))
    (workspace / "build/support/stages").mkdir()
    (workspace / "build/support/stages/compare.json").write_text(json.dumps({"inputs": {}, "outputs": {}, "result": {"recommended": "q4_K_M"}}))
    (workspace / "build/support/adapter").mkdir()
    (workspace / "build/support/adapter/adapter_config.json").write_text("{}")
    register(OllamaClient(ollama_double.url), "support", [made], Package(parameters={"num_ctx": 512}))
    parts.append(terminal(workspace, "list", server=ollama_double.url))
    check("list", "\n\n".join(parts))


FINDINGS = [
    Finding("olpack", "ready", "0.1.0 on Python 3.11.2, Linux x86_64"),
    Finding("torch", "ready", "2.13.0"),
    Finding("peft", "broken", "not installed", "python -m pip install peft"),
    Finding("GPU", "missing", "none that torch can use: training runs on the CPU", "For an NVIDIA card, install its driver."),
    Finding("disk", "ready", "123 GB free for build/"),
]


def test_the_doctor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = []
    for findings in (FINDINGS, [one for one in FINDINGS if one.state == "ready"]):
        monkeypatch.setattr(doctor, "examine", lambda findings=findings: findings)
        parts.append(terminal(tmp_path, "doctor"))
    check("doctor", "\n\n".join(parts))


# -- errors: what is wrong, and what fixes it ----------------------------------------------------------------------------------------------

WRONG_RECIPES = {
    "an unknown key": RECIPE.replace("batch_size", "batchsize"),
    "a value of another type": RECIPE.replace("epochs: 2", "epochs: many"),
    "a value out of range": RECIPE.replace("epochs: 2", "rank: 0"),
    "no base": RECIPE.replace("base: builtin/tiny-coder\n", ""),
    "no data": RECIPE.replace("data: {train: chats.jsonl, eval_share: 0.25}\n", ""),
    "an unknown quant": RECIPE.replace("Q4_K_M, Q8_0", "Q4_K_X"),
    "a quant twice": RECIPE.replace("Q4_K_M, Q8_0", "Q8_0, Q8_0"),
    "an unknown parameter of Ollama": RECIPE.replace("temperature", "temprature"),
    "a key twice": RECIPE + "quants: [Q4_0]\n",
    "a bracket that is not closed": RECIPE.replace("[Q4_K_M, Q8_0]", "[Q4_K_M, Q8_0"),
    "an empty recipe": "",
}
WRONG_FILES = [
    ["build", "suport"],
    ["quantize", "model.gguf", "--quant", "Q4_K_M"],
    ["compare", "support", "--against", "notes.txt"],
    ["recommend", "model.gguf"],
    ["show", "prophet"],
    ["bundle", "support"],
]
WRONG_OPTIONS = [
    ["biuld", "support"],
    ["build", "support", "--only", "quantize"],
    ["build", "support", "--quants", "Q8_0"],
    ["build", "support", "--set", "train.epochs"],
    ["build", "support", "--set", "train.epoch=3"],
    ["build", "support", "--set", "train.epochs=3x"],
    ["build", "support", "--quant", "Q9_0"],
    ["init", "assistant"],
    ["init", "support", "--base", "builtin/tiny-coder", "--train", "chats.jsonl"],
    ["init", "support", "--base", "builtin/tiny-coder", "--train", "chats.jsonl", "--lang", "fr"],
    ["init", "مساعد", "--base", "builtin/tiny-coder", "--train", "chats.jsonl"],
    ["init", "my/assistant", "--base", "builtin/tiny-coder", "--train", "chats.jsonl"],
    ["deploy", "support"],
    ["push", "support"],
    ["push", "support", "--hub", "me/support"],
    ["compare", "support", "--prompt", "Hi"],
    ["compare", "llama3:8b", "--quant", "Q8_0"],
    ["data", "check", "notes.txt"],
    ["data", "check", "support", "--base", "builtin/tiny-coder"],
    ["estimate"],
    ["estimate", "--params", "huge"],
    ["run", "support:q9"],
]


def test_errors_of_recipes(workspace: Path) -> None:
    parts = []
    for title, text in WRONG_RECIPES.items():
        (workspace / "modelfiles/support/recipe.yaml").write_text(text)
        parts.append(f"# {title}\n{terminal(workspace, 'plan', 'support')}")
    check("errors-recipes", "\n\n".join(parts))


@pytest.mark.parametrize(("name", "lines"), [("errors-files", WRONG_FILES), ("errors-options", WRONG_OPTIONS)])
def test_errors_of_command_lines(workspace: Path, name: str, lines: list[list[str]]) -> None:
    (workspace / "notes.txt").write_text("Buy milk.\n")
    check(name, "\n\n".join(terminal(workspace, *words) for words in lines))


def test_every_snapshot_belongs_to_a_test() -> None:
    names = {"-".join(["help", *words]) for words in commands()}
    names |= {"plan", "comparison", "report", "list", "doctor", "errors-models", "errors-recipes", "errors-rows", "errors-files", "errors-options"}
    names |= {f"import-{path.name.replace('.', '-')}" for path in (Path(__file__).parent / "data/import").iterdir() if path.is_file()}
    assert {path.stem for path in FOLDER.iterdir()} == names
