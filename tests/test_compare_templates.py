"""Answers of the embedded engine under templates that open the reasoning, or that mark what the assistant says."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import tiny_gguf
from test_compare_measure import PROMPTS, SETTINGS, quant_file

from olpack.compare.measure import measure
from olpack.compare.table import print_table
from olpack.recipe.tasks import parse_task

THINKS = tiny_gguf.TEMPLATE.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
MARKS = tiny_gguf.TEMPLATE.replace("{{ m.content }}", "{% generation %}{{ m.content }}{% endgeneration %}")  # abetlen/llama-cpp-python#2225


def write(folder: Path, name: str, template: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that says "x" for ever, with a chat template of its own."""
    monkeypatch.setattr(tiny_gguf, "TEMPLATE", template)
    tokenizer = tiny_gguf.tokenizer()
    tiny_gguf.write(folder / f"{name}.gguf", tiny_gguf.parrot(tokenizer.get_vocab_size(), tokenizer.encode("x").ids[0]), tokenizer)


def test_reasoning_that_does_not_end_is_not_scored_as_wrong(tmp_path, monkeypatch, capsys):
    write(tmp_path, "THINKS", THINKS, monkeypatch)
    tasks = [parse_task({"prompt": "2+2?", "contains": "4"}), parse_task({"prompt": "Say x.", "contains": "x"})]
    results = measure([quant_file(tmp_path, "THINKS")], [], PROMPTS, dataclasses.replace(SETTINGS, answer_tokens=16), None, "tiny", tasks=tasks)
    (quant,) = results.quants
    assert quant.scores is None and [answer.text for answer in quant.task_answers] == ["", ""]
    assert [answer.reasoning for answer in quant.answers] == ["x" * 16] * 2 and all("reasoning" in answer.flags for answer in quant.answers)
    assert any(flag.text.startswith("2 of 2 tasks are not scored: the answer was cut before its reasoning ended") for flag in quant.flags)
    print_table(results)
    assert "2 of 2 tasks are not scored" in capsys.readouterr().out


def test_an_answer_is_scored_where_the_template_opens_no_reasoning(tmp_path, monkeypatch):
    write(tmp_path, "MARKS", MARKS, monkeypatch)
    tasks = [parse_task({"prompt": "2+2?", "contains": "4"}), parse_task({"prompt": "Say x.", "contains": "x"})]
    conversation = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    (quant,) = measure([quant_file(tmp_path, "MARKS")], [], [conversation], SETTINGS, None, "tiny", tasks=tasks).quants
    assert quant.scores.values == [0, 1] and quant.answers[0].text == "x" * 48 and quant.answers[0].reasoning == ""
