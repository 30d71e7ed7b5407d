"""Models of a server side by side, through the command line and the double; and two comparisons against each other."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import served_gguf
from ollama_double import OllamaDouble
from ollama_double_store import CHATML
from oracle import olpack

from olpack.compare.changes import changes
from olpack.compare.results import Spread, read_results
from olpack.deploy.client import OllamaClient, blob_digest
from olpack.model.chat_template import protect


@pytest.fixture
def served(ollama_double: OllamaDouble, tmp_path: Path) -> OllamaDouble:
    """Two models that olpack knows nothing of."""
    client = OllamaClient(ollama_double.url)
    for number, model in enumerate(("strange:latest", "other:q8_0")):
        path = tmp_path / f"{number}.gguf"
        served_gguf.write(path, protect(CHATML.jinja, {}), filling=number)
        client.upload(path, digest := blob_digest(path))
        client.create({"model": model, "files": {"m.gguf": digest}, "parameters": {"num_ctx": 512}})
    return ollama_double


def test_any_models_of_a_server(served, tmp_path):
    (tmp_path / "prompts.txt").write_text("Write f.\n\nWrite g.\n")
    words = ["compare", "strange", "other:q8_0", "--prompt", "Write h.", "--prompts", "prompts.txt", "--out", "side", "--clients", "2"]
    code, printed, said = olpack(tmp_path, *words, server=served.url)
    assert code == 0, said
    assert "strange:latest" in printed and "other:q8_0" in printed and "side/report.html" in printed
    results = read_results(tmp_path / "side/results.json")
    assert [quant.tag for quant in results.quants] == ["strange:latest", "other:q8_0"] and results.recommendation is None
    assert [messages[-1]["content"] for messages in results.prompts] == ["Write h.", "Write f.", "Write g."]
    for quant in results.quants:
        assert len(quant.answers) == 3 and "def answer" in quant.answers[0].text
        assert quant.speed.context == 512 and [prompt.tokens_per_s.median for prompt in quant.speed.prompt] == [pytest.approx(10_000)] * 2
        assert [load.clients for load in quant.speed.concurrency] == [2]
    rows = list(csv.DictReader((tmp_path / "side/results.csv").open()))
    assert [row["quant"] for row in rows] == ["strange:latest", "other:q8_0"] and float(rows[0]["generation_tokens_per_s"]) > 0
    assert (tmp_path / "side/results.md").read_text().count("\n| ") >= 4
    assert "<table" in (tmp_path / "side/report.html").read_text()
    served.requests.clear()
    assert olpack(tmp_path, *words, server=served.url)[0] == 0
    assert served.count("POST", "/api/generate") == served.count("POST", "/api/chat") == 0  # all of it was kept


def test_tasks_and_chats_as_prompts(served, tmp_path):
    tasks = [{"prompt": "Write f.", "contains": "def answer"}, {"prompt": "Say 7.", "exact": "7"}]
    (tmp_path / "tasks.jsonl").write_text("\n".join(map(json.dumps, tasks)))
    code, _, said = olpack(tmp_path, "compare", "strange", "other:q8_0", "--prompts", "tasks.jsonl", server=served.url)
    assert code == 0, said
    results = read_results(tmp_path / "build/side-by-side/results.json")
    assert [quant.scores.mean for quant in results.quants] == [0.5, 0.5]
    turns = [{"role": "user", "content": "Write f."}, {"role": "assistant", "content": "def f(): pass"}]
    (tmp_path / "chats.jsonl").write_text(json.dumps({"messages": turns}))
    code, printed, said = olpack(tmp_path, "compare", "other:q8_0", "--prompts", "chats.jsonl", "--json", server=served.url)
    assert code == 0, said
    assert json.loads(printed)["prompts"] == [turns[:1]]


def test_tasks_that_run_code_need_consent(served, tmp_path):
    (tmp_path / "tasks.jsonl").write_text(json.dumps({"prompt": "Write answer.", "python_asserts": "answer"}))
    words = ["compare", "strange", "other:q8_0", "--prompts", "tasks.jsonl"]
    served.requests.clear()
    code, _, said = olpack(tmp_path, *words, server=served.url)
    assert code == 1 and "tasks.jsonl:1 runs Python that the models write" in said and "Add --run-answers" in said
    assert served.count("POST", "/api/chat") == served.count("POST", "/api/generate") == 0
    code, _, said = olpack(tmp_path, *words, "--run-answers", server=served.url)
    assert code == 0, said
    assert read_results(tmp_path / "build/side-by-side/results.json").quants[0].scores.checks[0].check == "python_asserts"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["strange", "nobody:q4_0"], "has no model nobody:q4_0. It has: "),
        (["strange", "other:q8_0", "--set", "train.epochs=1"], "these options need a package"),
        (["strange", "other:q8_0", "--prompts", "absent.txt"], "absent.txt cannot be read"),
        (["nobody"], "There is no modelfiles/nobody/recipe.yaml"),
        (["strange", "--against", "absent.json"], "absent.json"),
    ],
)
def test_mistakes(served, tmp_path, words, said):
    served.requests.clear()
    code, _, told = olpack(tmp_path, "compare", *words, server=served.url)
    assert code in (1, 2) and said in " ".join(told.replace("│", " ").split())
    assert served.count("POST", "/api/generate") == 0 and not (tmp_path / "build").exists()


def test_without_a_server(tmp_path):
    code, _, said = olpack(tmp_path, "compare", "strange:latest", "other:q8_0")
    assert code == 1 and "ollama.com/download" in said


def test_what_got_better_and_what_is_noise(served, tmp_path):
    assert olpack(tmp_path, "compare", "strange", "other:q8_0", server=served.url)[0] == 0
    path = tmp_path / "build/side-by-side/results.json"
    old = read_results(path)
    slower = old.model_copy(deep=True)
    slower.quants[0].speed.generation_tokens_per_s = Spread.of([100.0, 101.0, 102.0])
    slower.quants[1].speed.load_warm_s = Spread.of([9.0, 9.5])
    found = {(change.quant, change.figure): change.verdict for change in changes(slower, old)}
    assert found["strange:latest", "generated tokens/s"] == "better" and found["other:q8_0", "load, s"] == "better"
    assert found["other:q8_0", "generated tokens/s"] == "same" and found["strange:latest", "size, bytes"] == "same"
    assert {change.verdict for change in changes(old, slower) if change.figure == "load, s"} == {"same", "worse"}
    (tmp_path / "old.json").write_text(slower.model_dump_json())
    code, printed, said = olpack(tmp_path, "compare", "strange", "other:q8_0", "--against", "old.json", server=served.url)
    assert code == 0 and "figures changed" in printed and "better" in printed, said
