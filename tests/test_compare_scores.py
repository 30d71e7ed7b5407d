"""Tasks: what is refused before any work, what each check accepts, what is scored and kept."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from pathlib import Path

import gguf
import psutil
import pytest
import tiny_gguf
from test_compare_measure import SETTINGS, quant_file

from olpack import recipe
from olpack.compare import scores
from olpack.compare.measure import measure
from olpack.compare.sandbox import asserts_hold
from olpack.compare.scores import load_function, score, score_answers, standard_error
from olpack.errors import OlpackError
from olpack.recipe.tasks import load_tasks, parse_task

FENCED = "Here it is:\n```python\ndef double(number):\n    return 2 * number\n```\nDone."
CALL = {"name": "dim", "arguments": {"room": "hall", "percent": 30}}
ASK = [{"role": "user", "content": "Say 42."}, {"role": "assistant", "content": "42"}]


def task(folder: Path | None = None, **check):
    return parse_task({"prompt": "p", **check}, "tasks.jsonl:1", folder)


def test_an_expression_without_end_is_named(monkeypatch):
    monkeypatch.setattr(scores, "_SEARCH_S", 0.3)
    tasks = [parse_task({"prompt": "p", "regex": pattern}, f"tasks.jsonl:{line}") for line, pattern in enumerate(("a", "(a+)+$"), 1)]
    assert score_answers(tasks, ["aaa", "aaa"], "x").mean == 1
    with pytest.raises(OlpackError, match=r"tasks\.jsonl:2: the `regex` '\(a\+\)\+\$' takes longer than 0\.3 s") as raised:
        score_answers(tasks, ["a", "a" * 40 + "b"], "x")
    assert "nested repetitions" in raised.value.remedy


@pytest.mark.parametrize("check", ["json", "python"])
@pytest.mark.parametrize("text", ["[" * 100_000, "(" * 100_000, "-" * 100_000 + "1", "a" + ".b" * 100_000, "a" + "()" * 100_000, "not " * 50_000])
def test_an_answer_that_is_nested_deep_is_scored(check, text):
    assert score(parse_task({"prompt": "p", check: True}, "tasks.jsonl:1"), text) in (0, 1)


@pytest.mark.parametrize(
    ("check", "answer", "passes"),
    [
        ({"exact": "42"}, " 42\n", True),
        ({"exact": "42"}, "42.", False),
        ({"contains": "def add("}, FENCED.replace("double", "add"), True),
        ({"contains": ["a", "b"]}, "only a", False),
        ({"regex": r"\b4\d\b"}, "it is 42.", True),
        ({"regex": r"^4$"}, "it is 42.", False),
        ({"json": True}, '```json\n{"a": 1}\n```', True),
        ({"json": True}, "{'a': 1}", False),
        ({"json": ["a", "b"]}, '{"a": 1, "b": null}', True),
        ({"json": ["a", "b"]}, '{"a": 1}', False),
        ({"json": "a"}, "[1]", False),
        ({"tool_call": CALL}, '<tool_call>\n{"name": "dim", "arguments": {"percent": 30, "room": "hall"}}\n</tool_call>', True),
        ({"tool_call": CALL}, 'Sure {: [{"name": "dim", "parameters": {"room": "hall", "percent": 30}}]', True),
        ({"tool_call": CALL}, '{"name": "dim", "arguments": {"room": "hall", "percent": "30"}}', False),
        ({"tool_call": CALL}, '{"name": "lift", "arguments": {"room": "hall", "percent": 30}}', False),
        ({"tool_call": CALL}, 2 * '{"name": "dim", "arguments": {"room": "hall", "percent": 30}}', False),
        ({"tool_call": CALL}, "dim(hall, 30)" + 5000 * '{"a":', False),
        ({"python": True}, FENCED, True),
        ({"python": True}, "def f(:", False),
        ({"python": True}, "  \n# nothing", False),
        ({"python": True}, "```python\ndef f():\n    return 1\n", True),
        ({"python_asserts": "assert double(4) == 8"}, FENCED, True),
        ({"python_asserts": ["assert double(4) == 8", "assert double('a') == 'a'"]}, FENCED, False),
        ({"python_asserts": "assert f()"}, "import os\nf = lambda: True\nos._exit(0)", False),
        ({"python_asserts": "assert f()"}, "raise SystemExit(0)", False),
        ({"python_asserts": "assert f()"}, "def f(:", False),
    ],
)
def test_each_check(check, answer, passes):
    assert score(task(**check), answer) == float(passes)


def test_the_expected_answer_may_be_the_conversations_own():
    made = parse_task({"messages": ASK, "exact": True})
    assert made.messages == ASK[:1] and score(made, "42 ") == 1
    assert parse_task({"messages": ASK, "contains": True}).expected == ["42"]
    assert parse_task({"prompt": "p", "python": True}, system="Be brief.").messages[0] == {"role": "system", "content": "Be brief."}


@pytest.mark.parametrize(
    ("code", "limits"),
    [
        ("while True: pass", {"cpu_s": 1}),
        ("import time\ntime.sleep(60)", {"wall_s": 1}),
        ("import subprocess, sys\nsubprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])", {"wall_s": 2}),
        ("held = bytearray(1 << 30)", {"memory_bytes": 1 << 29}),
        ("open('big', 'wb').write(bytes(1 << 25))", {}),
        ("import os\nos.kill(os.getpid(), 11)", {}),
        ("input()", {}),
        ("import sys\nsys.setrecursionlimit(10**9)\ndef f(n): return f(n + 1)\nf(0)", {"wall_s": 2}),
    ],
)
def test_code_that_misbehaves_is_stopped(code, limits):
    started, before = time.monotonic(), set(psutil.Process().children(recursive=True))
    assert not asserts_hold(code, ["pass"], **limits)
    assert time.monotonic() - started < 30
    assert not [child for child in set(psutil.Process().children(recursive=True)) - before if child.status() != psutil.STATUS_ZOMBIE]


def test_a_function_of_ones_own(tmp_path):
    (tmp_path / "checks.py").write_text(
        "def share(answer): return len(answer) / 10\ndef fits(answer, task): return task.source in answer\n"
        "def wrong(answer): return 'yes'\ndef broken(answer): return 1 / 0\nnumber = 3\n"
    )
    assert score(task(tmp_path, function="checks.py:share"), "12345") == 0.5
    assert score(task(tmp_path, function="checks.py:fits"), "see tasks.jsonl:1") == 1
    for name, said in (("wrong", "returned 'yes'"), ("broken", "raised ZeroDivisionError"), ("share", "returned 1.1")):
        with pytest.raises(OlpackError, match=f"{said}.*tasks.jsonl:1"):
            score(task(tmp_path, function=f"checks.py:{name}"), "12345678901")
    with pytest.raises(OlpackError, match="no function `number`"):
        load_function(task(tmp_path, function="checks.py:number"))
    (tmp_path / "checks.py").write_text("import nothing_like_it")
    with pytest.raises(OlpackError, match="does not run: ModuleNotFoundError"):
        load_function(task(tmp_path, function="checks.py:share"))


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "not JSON"),
        ("[]", "a task is an object"),
        ('{"prompt": "p"}', "this one has none"),
        ('{"prompt": "p", "exact": "a", "regex": "b"}', "exact and regex"),
        ('{"prompt": "p", "contain": "a"}', "did you mean 'contains'"),
        ('{"exact": "a"}', "either a `prompt` or `messages`"),
        ('{"prompt": " ", "exact": "a"}', "`prompt` is no text"),
        ('{"prompt": "p", "exact": true}', "there is none"),
        ('{"prompt": "p", "exact": 42}', "`exact` is no text"),
        ('{"prompt": "p", "contains": []}', "`contains` is no text or list"),
        ('{"prompt": "p", "regex": "("}', "no regular expression"),
        ('{"prompt": "p", "json": false}', "nor true"),
        ('{"prompt": "p", "tool_call": {"name": "dim"}}', "no object with `name` and `arguments`"),
        ('{"prompt": "p", "tools": [{"name": 1}], "exact": "a"}', "tool 1 is no function"),
        ('{"prompt": "p", "python": "x"}', "can only be true"),
        ('{"prompt": "p", "python_asserts": "assert ("}', "does not parse"),
        ('{"prompt": "p", "function": "checks.py"}', "file.py:name"),
        ('{"prompt": "p", "function": "checks.py:f"}', "there is no"),
        ('{"messages": [{"role": "assistant", "content": "a"}], "python": true}', "must be the user's"),
        ('{"messages": "hi", "python": true}', "no list of turns"),
    ],
)
def test_a_malformed_task_is_named_with_its_line(tmp_path, line, said):
    path = tmp_path / "tasks.jsonl"
    path.write_text('{"prompt": "fine", "exact": "a"}\n\n' + line + "\n")
    with pytest.raises(OlpackError, match="tasks.jsonl, line 3: ") as caught:
        load_tasks(path)
    assert said in str(caught.value)


def test_a_malformed_task_of_a_recipe_is_named_with_its_line(tmp_path):
    path = tmp_path / "mine" / "recipe.yaml"
    path.parent.mkdir()
    path.write_text("base: b\ndata: {train: t}\ncompare:\n  tasks:\n    - {prompt: p, exact: a}\n    - {prompt: p,\n       contain: a}\n")
    with pytest.raises(OlpackError, match="line 6: 'compare.tasks.1': unknown key 'contain'; did you mean 'contains'"):
        recipe.load(path)
    path.write_text(path.read_text().replace("contain:", "contains:"))
    assert len(recipe.load(path).compare.tasks) == 2
    path.write_text("base: b\ndata: {train: t}\ncompare:\n  tasks: tasks.jsonl\n")
    assert recipe.load(path).compare.tasks == "tasks.jsonl"
    path.write_text("base: b\ndata: {train: t}\ncompare:\n  tasks: 3\n")
    with pytest.raises(OlpackError, match="line 4: 'compare.tasks'") as caught:
        recipe.load(path)
    assert "\n" not in str(caught.value)


def test_standard_errors():
    assert standard_error([1, 1, 0, 0]) == pytest.approx(math.sqrt(0.25 / 3))
    assert standard_error([1.0]) is None and standard_error([1, 1, 1]) is None


def test_every_file_is_scored_and_the_answers_are_kept(tmp_path):
    tokenizer = tiny_gguf.tokenizer()
    tiny_gguf.write(tmp_path / "X.gguf", tiny_gguf.parrot(tokenizer.get_vocab_size(), tokenizer.encode("x").ids[0]), tokenizer)
    tiny_gguf.write(tmp_path / "R.gguf", tiny_gguf.model(tokenizer.get_vocab_size()), tokenizer, gguf.GGMLQuantizationType.Q8_0)
    checks = tmp_path / "checks.py"
    checks.write_text("def half(answer): return 0.5")
    items = [{"prompt": "p", "regex": "^x+$"}, {"prompt": "q", "contains": "y"}, {"prompt": "p", "function": "checks.py:half"}]
    tasks = [parse_task(item, f"task {number}", tmp_path) for number, item in enumerate(items, 1)]
    settings = dataclasses.replace(SETTINGS, answer_tokens=8, repeats=1, prompt_lengths=(16,))
    files, cache = [quant_file(tmp_path, name) for name in ("X", "R")], tmp_path / "cache"
    results = measure(files, [], [], settings, None, "tiny", cache, tasks=tasks)
    parrot = results.quants[0].scores
    assert parrot.values == [1, 0, 0.5] and parrot.mean == 0.5 and parrot.standard_error == pytest.approx(0.5 / math.sqrt(3))
    assert {part.check: part.mean for part in parrot.checks} == {"regex": 1, "contains": 0, "function": 0.5}
    assert results.quants[0].task_answers[0].text == "x" * 8 and results.tasks[2].expected == "checks.py:half"

    kept = {path.name: path.read_bytes() for path in cache.iterdir()}
    checks.write_text("def half(answer): return 1 / 0")
    again = measure(files, [], [], settings, None, "tiny", cache, tasks=tasks)
    assert {path.name: path.read_bytes() for path in cache.iterdir()} == kept  # asked again: nothing
    assert again.quants[0].scores is None and "ZeroDivisionError" in again.quants[0].flags[0].text
    assert json.loads(kept["x.tasks.json"])["data"]["answers"][0]["text"] == "x" * 8
