"""The shipped chats: whole, parseable, short, and honestly apart."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "modelfiles" / "coding-assistant"
sys.path.insert(0, str(FOLDER))

import make_data  # noqa: E402

ROWS = {name: [json.loads(line) for line in (FOLDER / f"{name}.jsonl").read_text("utf-8").splitlines()] for name in ("train", "eval")}


def without_name(code: str) -> str:
    """Arguments and body of a definition, normalised: the same for a copy under another name."""
    (node,) = ast.parse(code).body
    return "\n".join([ast.unparse(node.args), *map(ast.unparse, node.body)])


@pytest.mark.parametrize(("name", "least"), [("train", 600), ("eval", 100)])
def test_every_row_is_a_request_and_one_function(name: str, least: int) -> None:
    assert len(ROWS[name]) >= least
    systems = 0
    for row in ROWS[name]:
        *system, user, assistant = row["messages"]
        systems += len(system)
        assert [turn["role"] for turn in row["messages"]] == ["system"] * len(system) + ["user", "assistant"]
        assert all(turn["content"] == make_data.SYSTEM for turn in system)
        module, function = row["source"].split(":")
        (node,) = ast.parse(assistant["content"]).body
        assert isinstance(node, ast.FunctionDef) and node.name == function and ast.get_docstring(node) is None
        assert f"`{function}(" in user["content"] and module
    assert 0.4 < systems / len(ROWS[name]) < 0.6


def test_no_function_is_in_both() -> None:
    train, held = ({without_name(row["messages"][-1]["content"]) for row in rows} for rows in ROWS.values())
    assert not train & held
    assert len(train) == len(ROWS["train"]) and len(held) == len(ROWS["eval"])


def test_modules_are_on_their_side_of_the_rule() -> None:
    assert not any(make_data.held_out(row["source"].split(":")[0]) for row in ROWS["train"])
    assert all(make_data.held_out(row["source"].split(":")[0]) for row in ROWS["eval"])


def test_rows_fit_a_cpu_run() -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(FOLDER.parent.parent / "olpack" / "assets" / "tiny-coder")
    lengths = [len(tokenizer.encode(tokenizer.apply_chat_template(row["messages"], tokenize=False))) for row in ROWS["train"]]
    assert max(lengths) <= 300 and sum(lengths) <= 110_000


def library(folder: Path) -> Path:
    """A library of two modules, one of them held out, and a test that holds a copy of one held-out function."""
    names = [f"module{number}" for number in range(100)]
    apart = next(name for name in names if make_data.held_out(name))
    learned = next(name for name in names if not make_data.held_out(name))
    (folder / "test").mkdir(parents=True)
    (folder / f"{learned}.py").write_text('def double(x):\n    """Return the number times two. More."""\n\n    # why\n    return 2 * x\n')
    secret = 'def secret(a, b):\n    """Compare two numbers in a way of its own."""\n    return a - b > 7\n'
    copied = 'def copied(a):\n    """Return the number plus one, as its test does."""\n    return a + 1\n'
    (folder / f"{apart}.py").write_text(secret + copied)
    (folder / "test" / "test_copied.py").write_text("class Test:\n    def other_name(a):\n        return a + 1\n")
    (folder / "test" / "bad_latin1.py").write_bytes(b"# \xe9\n")
    return folder


def test_the_script_keeps_copies_out_and_repeats_itself(tmp_path: Path) -> None:
    stdlib, outs = library(tmp_path / "lib"), [tmp_path / "one", tmp_path / "two"]
    for out in outs:
        out.mkdir()
        subprocess.run([sys.executable, FOLDER / "make_data.py", "--stdlib", stdlib, "--out", out], check=True, capture_output=True)
    (train,) = map(json.loads, (outs[0] / "train.jsonl").read_text("utf-8").splitlines())
    (held,) = map(json.loads, (outs[0] / "eval.jsonl").read_text("utf-8").splitlines())
    assert train["messages"][-1]["content"] == "def double(x):\n    # why\n    return 2 * x"
    assert "number times two" in train["messages"][-2]["content"]
    assert held["source"].endswith(":secret")
    for name in ("train.jsonl", "eval.jsonl"):
        assert (outs[0] / name).read_bytes() == (outs[1] / name).read_bytes()


@pytest.mark.parametrize(
    ("summary", "asked"),
    [
        ("Return the answer", "returns the answer|should return the answer|Return the answer: write"),
        ("Copies one file", "copies one file|should copy one file|Copy one file: write"),
        ("Searches for a name", "searches for a name|should search for a name|Search for a name: write"),
        ("A helper of another", "A helper of another"),
    ],
)
def test_requests_are_english(summary: str, asked: str) -> None:
    import re

    for number in range(20):
        function = make_data.Function(f"module:name{number}", "name(x)", summary, "", "")
        assert re.search(asked, make_data.request(function)) and "`name(x)`" in make_data.request(function)
