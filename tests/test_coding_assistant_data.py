"""The shipped chats: generated again byte for byte, right by execution, short, and honestly apart."""

from __future__ import annotations

import ast
import json
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from olpack.compare.sandbox import asserts_hold
from olpack.recipe import load

FOLDER = Path(__file__).parent.parent / "modelfiles" / "coding-assistant"
sys.path.insert(0, str(FOLDER))

import exercises  # noqa: E402
import make_data  # noqa: E402

ROWS = {name: [json.loads(line) for line in (FOLDER / f"{name}.jsonl").read_text("utf-8").splitlines()] for name in ("train", "eval", "tasks")}


def test_the_script_makes_the_shipped_files(tmp_path: Path) -> None:
    # Another hash seed: the order of a set must not show in the files.
    subprocess.run([sys.executable, FOLDER / "make_data.py", "--out", tmp_path], check=True, capture_output=True, env={"PYTHONHASHSEED": "5"})
    for name in ("train.jsonl", "eval.jsonl", "tasks.jsonl"):
        assert (tmp_path / name).read_bytes() == (FOLDER / name).read_bytes(), name


def test_every_row_is_a_request_and_one_function() -> None:
    answers = Counter()
    for row in ROWS["train"] + ROWS["eval"]:
        *system, user, assistant = row["messages"]
        assert [turn["role"] for turn in row["messages"]] == ["system"] * len(system) + ["user", "assistant"]
        assert all(turn["content"] == make_data.SYSTEM for turn in system)
        if assistant["content"] == make_data.SCOPE:
            answers["beyond"] += 1
            continue
        (node,) = ast.parse(assistant["content"]).body
        assert isinstance(node, ast.FunctionDef)
        answers["named" if f"{node.name}(" in user["content"] else "unnamed"] += 1
    assert answers["beyond"] == len(ROWS["train"]) / make_data.BEYOND
    assert answers["unnamed"] < 0.1 * answers["named"]


def test_held_out_combinations_are_never_trained() -> None:
    known: set[str] = set()
    apart = {exercise.combination for _, exercise in make_data.exercises(True, make_data.HELD_OUT_ROWS, "held out", known)}
    trained = {exercise.combination for _, exercise in make_data.exercises(False, make_data.TRAIN_ROWS, "train", known)}
    assert not apart & trained
    # Each part of a held-out combination is trained in others, else nothing could be composed.
    parts = {(combination[0], part) for combination in trained for part in combination[1:]}
    assert not [combination for combination in apart for part in combination[1:] if (combination[0], part) not in parts]


def test_no_request_of_recipe_or_tasks_is_trained() -> None:
    trained = {row["messages"][-2]["content"] for row in ROWS["train"]}
    assert not trained & {row["prompt"] for row in ROWS["tasks"]}
    assert not trained & set(load(FOLDER / "recipe.yaml").compare.prompts[:4])


def test_the_held_out_answers_pass_their_tasks() -> None:
    assert len(ROWS["eval"]) == len(ROWS["tasks"]) == 200
    pairs = list(zip(ROWS["eval"], ROWS["tasks"], strict=True))
    for row, task in pairs:
        assert row["messages"][-2]["content"] == task["prompt"] and len(task["python_asserts"]) >= 2
    code = "\n".join(
        f"def run{number}():\n"
        + "\n".join(f"    {line}" for text in (row["messages"][-1]["content"], *task["python_asserts"]) for line in text.split("\n"))
        + f"\nrun{number}()"
        for number, (row, task) in enumerate(pairs)
    )
    assert asserts_hold(code, [])
    assert not asserts_hold(code + "\nassert run0() is not None", [])


@pytest.mark.parametrize("kind", exercises.KINDS)
def test_code_of_every_kind_does_what_its_words_say(kind: str) -> None:
    """The values that asserts compare with come from the parts' functions, not from the code."""
    rng = random.Random(kind)
    sound = [make_data._sound(exercises.KINDS[kind](rng)) for _ in range(300)]
    assert sum(sound) >= 285  # a parameter can have the name of a loop's variable: such a draw is thrown away


def test_a_wrong_function_is_thrown_away() -> None:
    exercise = exercises.Exercise(("numbers",), "f(n)", "n plus one", "def f(n):\n    return n + 2", ("assert f(1) == 2", "assert f(2) == 3"))
    assert not make_data._sound(exercise)


@pytest.mark.parametrize(
    ("wanted", "verbal", "asked"),
    [
        (
            "the sum of the numbers",
            False,
            ("returns the sum of the numbers", "gives me the sum", "return the sum", "computes the sum", "gives the sum"),
        ),
        ("whether a number is even", False, ("whether a number is even", "if a number is even")),
        ("keeps a value in bounds", True, ("keeps a value in bounds", "keep a value in bounds")),
    ],
)
def test_requests_are_english(wanted: str, verbal: bool, asked: tuple[str, ...]) -> None:
    rng = random.Random(0)
    exercise = exercises.Exercise((), "name(x)", wanted, "", (), verbal=verbal)
    for _ in range(40):
        words = make_data.request(exercise, rng)
        assert "name(x)" in words and any(part in words for part in asked), words
        assert any(part in make_data.unnamed_request(exercise, rng) for part in asked)


def test_rows_fit_a_cpu_run() -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(FOLDER.parent.parent / "olpack" / "assets" / "tiny-coder")
    lengths = [len(tokenizer.encode(tokenizer.apply_chat_template(row["messages"], tokenize=False))) for row in ROWS["train"]]
    assert max(lengths) <= 300 and sum(lengths) <= 175_000
