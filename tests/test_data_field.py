"""Rows as people have them: parts, history, reasoning, generation prompts that say more than a turn, files of Excel, columns that nobody reads."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from olpack.data import Renderer, Source, load_chats, load_split, render_rows, split
from olpack.data.chats import unread_keys
from olpack.data.check import check_data
from olpack.data.forms import RowError, to_chat
from olpack.errors import OlpackError
from olpack.model.base import BUILTIN, Base

TURNS = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
CHATML = TURNS + "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
EMPTY_THOUGHT = TURNS + "{% if add_generation_prompt %}<|im_start|>assistant\n<|channel>thought\n<channel|>{% endif %}"
OPENS = TURNS + "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
SPLITS = (
    "{% for m in messages %}{% set c = m.content %}{% set r = m.reasoning_content or '' %}"
    "{% if m.role == 'assistant' and '<think>' in c and '</think>' in c %}{% set r = c.split('</think>')[0].split('<think>')[-1].strip() %}"
    "{% set c = c.split('</think>')[-1].lstrip() %}{% endif %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}<think>\n{{ r }}\n</think>\n\n{% endif %}{{ c }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)


def renderer(tmp_path: Path, template: str) -> Renderer:
    shutil.copytree(BUILTIN / "tiny-coder", tmp_path / "base", ignore=shutil.ignore_patterns("*.safetensors"), dirs_exist_ok=True)
    (tmp_path / "base/chat_template.jinja").write_text(template)
    base = Base("base", tmp_path / "base")
    return Renderer(base.tokenizer(), base.end_ids())


def chats(tmp_path: Path, *rows, name: str = "d.jsonl"):
    (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_chats(tmp_path / name)


def turns(*contents: str, **last) -> dict:
    messages = [{"role": ("user", "assistant")[at % 2], "content": content} for at, content in enumerate(contents)]
    messages[-1] |= last
    return {"messages": messages}


def target(row, renderer: Renderer) -> str:
    """The target tokens of a row as text."""
    return renderer.tokenizer.decode([token for token, is_target in zip(row.ids, row.loss_mask, strict=True) if is_target])


# Generation prompts and reasoning


@pytest.mark.parametrize(("template", "between"), [(EMPTY_THOUGHT, ""), (OPENS, "\n</think>\n\n"), (CHATML, "")])
def test_an_answer_stands_behind_what_the_server_sends(tmp_path, template, between):
    made = renderer(tmp_path, template)
    (chat,) = chats(tmp_path, turns("2+2?", "It is 4.", "And 3+3?", "It is 6."))
    rows = made.rows(chat)
    served = [made.text(chat.messages[:1], ask=True), made.text(chat.messages[:3], ask=True)]
    assert len(rows) == (1 if template == CHATML else 2)
    for prompt, row, answer in zip(served[-len(rows) :], rows, ["It is 4.", "It is 6."][-len(rows) :], strict=True):
        answer = between + answer  # a block that the generation prompt leaves open is closed before the answer
        assert row.text.startswith(prompt + answer) and target(row, made).endswith(f"{answer}<|im_end|>")
        asked = made.tokenizer(prompt, add_special_tokens=False)["input_ids"]
        assert row.ids[: len(asked)] == asked


def test_an_answer_that_begins_like_the_thought_is_trained_whole(tmp_path):
    made = renderer(tmp_path, EMPTY_THOUGHT)
    (chat,) = chats(tmp_path, turns("Say it.", "<|channel>"))
    (row,) = made.rows(chat)
    assert row.text.endswith("assistant\n<|channel>thought\n<channel|><|channel><|im_end|>\n") and target(row, made) == "<|channel><|im_end|>"


@pytest.mark.parametrize("template", [SPLITS, OPENS])
def test_an_answer_that_only_closes_its_reasoning(tmp_path, template):
    made = renderer(tmp_path, template)
    (chat,) = chats(tmp_path, turns("2+2?", "2 and 2 is 4.\n</think>\n\nThe answer is 4."))
    (row,) = made.rows(chat)
    assert target(row, made) == "2 and 2 is 4.\n</think>\n\nThe answer is 4.<|im_end|>"
    assert row.text.count("<think>") == row.text.count("</think>") == 1


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_that_the_template_leaves_out_is_refused(tmp_path, name):
    made = renderer(tmp_path, CHATML)
    (chat,) = chats(tmp_path, turns("2+2?", "4", **{name: "2 and 2 is 4"}))
    with pytest.raises(OlpackError, match=r"d.jsonl:1: the base's chat template does not write the reasoning of an answer"):
        made.rows(chat)
    (row,) = renderer(tmp_path, SPLITS).rows(chats(tmp_path, turns("2+2?", "4", reasoning_content="2 and 2 is 4"))[0])
    assert "2 and 2 is 4" in row.text


# Forms


def test_history_makes_earlier_turns():
    row = {"instruction": "And in Celsius?", "input": "", "output": "41.", "system": "Brief.", "history": [["How hot in F?", "106."]]}
    expected = [("system", "Brief."), ("user", "How hot in F?"), ("assistant", "106."), ("user", "And in Celsius?"), ("assistant", "41.")]
    assert [(turn["role"], turn["content"]) for turn in to_chat("alpaca", row)["messages"]] == expected
    assert to_chat("alpaca", row | {"history": json.dumps(row["history"])}) == to_chat("alpaca", row)
    assert len(to_chat("alpaca", row | {"history": []})["messages"]) == 3
    with pytest.raises(RowError, match="list of"):
        to_chat("alpaca", row | {"history": ["one"]})


def test_text_in_parts_is_one_text():
    parts = [{"type": "text", "text": "2+2?"}, {"type": "text", "text": " Quick."}, "!"]
    messages = [
        {"role": "developer", "content": [{"type": "text", "text": "Brief."}]},
        {"role": "user", "content": parts},
        {"role": "assistant", "content": [{"type": "text", "text": "4"}]},
    ]
    found = to_chat("chat", {"messages": messages})["messages"]
    assert [(turn["role"], turn["content"]) for turn in found] == [("system", "Brief."), ("user", "2+2? Quick.!"), ("assistant", "4")]


@pytest.mark.parametrize(
    ("part", "said"),
    [
        ({"type": "image_url", "image_url": {"url": "x"}}, "'image_url': only text is trained"),
        ({"type": "text"}, "without text"),
        (7, "without text"),
        ({"type": "input_audio"}, "'input_audio'"),
    ],
)
def test_parts_that_are_no_text_are_refused(part, said):
    with pytest.raises(RowError, match=said):
        to_chat("chat", {"messages": [{"role": "user", "content": [part]}, {"role": "assistant", "content": "4"}]})


def test_what_is_not_read_is_named_once_a_file(tmp_path, capsys):
    rows = [{"prompt": "2+2?", "completion": "4", "category": "sums", "note": ""}, {"prompt": "3+3?", "completion": "6", "category": "sums", "id": 7}]
    found = chats(tmp_path, *rows) + chats(tmp_path, {"text": "plain"}, name="t.jsonl")
    assert unread_keys(found) == ["d.jsonl: not read: category (2 rows), id (1 row)"]


def test_what_is_not_read_inside_of_messages_is_named_by_its_path(tmp_path):
    part = {"type": "text", "text": "4", "cache_control": {"type": "ephemeral"}}
    function = {"name": "f", "arguments": {}, "strict": True}
    call = {"role": "assistant", "tool_calls": [{"id": "1", "index": 0, "type": "function", "function": function}]}
    row = turns("2+2?", [part], weight=1, timestamp="2026", name="", loss=float("nan"))
    row["messages"] = [row["messages"][0] | {"id": "m1"}, call, row["messages"][1]]
    from_table = {"conversations": [{"from": "human", "value": "q", "lang": "en"}, {"from": "gpt", "value": "a", "lang": "en"}]}
    found = chats(tmp_path, row) + chats(tmp_path, from_table, name="s.jsonl")
    inside = ["messages.content.cache_control", "messages.timestamp", "messages.tool_calls.function.strict", "messages.tool_calls.id"]
    assert sorted(found[0].unread) == [
        "messages.content.cache_control",
        "messages.id",
        "messages.timestamp",
        "messages.tool_calls.function.strict",
        "messages.tool_calls.id",
        "messages.tool_calls.index",
    ]
    first, second = unread_keys(found, "{{ m.index }} {{ m.identity }}")
    assert all(f"{key} (1 row)" in first for key in inside) and "index" not in first
    assert second == "s.jsonl: not read: messages.lang (1 row)"
    columns = tmp_path / "c.csv"
    columns.write_text("prompt,completion,,Unnamed: 0,empty\nq,a,x,0,\n")
    assert unread_keys(load_chats(columns)) == ["c.csv: not read: (no name) (1 row), Unnamed: 0 (1 row)"]


def test_what_is_not_read_is_in_the_check_and_in_the_plan(tmp_path, capsys):
    made = renderer(tmp_path, CHATML)
    rows = [{**turns(f"q{n}", f"a{n}"), "category": "sums"} for n in range(24)]
    path = tmp_path / "d.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = check_data([Source(path)], [], made, max_length=64, eval_share=0.1)
    assert [(finding.place, finding.kind, finding.text, finding.fails) for finding in report.findings] == [
        ("d.jsonl", "not read", "Keys that are not read: category (24 rows).", False)
    ]
    render_rows(*load_split([path], eval_share=0.1), made, max_length=64)
    assert capsys.readouterr().err.count("d.jsonl: not read: category (24 rows)") == 1


def test_of_few_rows_one_is_held_out(tmp_path):
    found = chats(tmp_path, *(turns(f"{n}+{n}?", str(2 * n)) for n in range(3)))
    train, apart = split(found, 0.05)
    assert (len(train), len(apart)) == (2, 1)
    assert split(found[::-1], 0.05)[1] == apart
    assert split(found, 0) == (found, []) and split(found[:1], 0.05)[1] == []
    many = chats(tmp_path, *(turns(f"{n}+{n}?", str(2 * n)) for n in range(300)))
    assert [chat for chat in many if int(chat.digest[:8], 16) / 2**32 < 0.05] == split(many, 0.05)[1]


# Files


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-be", "utf-8-sig", "utf-8"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".tsv", ".json"])
def test_what_a_file_begins_with_says_its_encoding(tmp_path, encoding, mark, suffix):
    between = "\t" if suffix == ".tsv" else ","
    text = {".jsonl": '{"prompt": "naïve?", "completion": "نعم"}\r\n', ".json": '[{"prompt": "naïve?", "completion": "نعم"}]'}.get(
        suffix, f"prompt{between}completion\r\nnaïve?{between}نعم\r\n"
    )
    (tmp_path / f"d{suffix}").write_bytes((text if encoding in ("utf-16", "utf-32", "utf-8-sig") else mark + text).encode(encoding))
    (chat,) = load_chats(tmp_path / f"d{suffix}")
    assert [turn["content"] for turn in chat.messages] == ["naïve?", "نعم"]


def test_a_file_of_two_bytes_a_character_that_is_cut_is_one_sentence(tmp_path):
    (tmp_path / "d.jsonl").write_bytes('{"text": "نعم"}\n'.encode("utf-16")[:-1])
    with pytest.raises(OlpackError, match=r"d.jsonl begins as UTF-16 and cannot be read as that at byte 33\. Save it again as UTF-8\."):
        load_chats(tmp_path / "d.jsonl")


def test_lines_separators_and_long_cells(tmp_path):
    text = "one\u2028two\u0085three"
    (tmp_path / "u.jsonl").write_text(json.dumps({"prompt": text, "completion": "x"}, ensure_ascii=False) + "\nnot json\n", encoding="utf-8")
    with pytest.raises(OlpackError, match=r"u.jsonl, line 2: not JSON"):
        load_chats(tmp_path / "u.jsonl")
    (tmp_path / "long.csv").write_text(f"prompt,completion\n{'a ' * 100_000},null\nq,NA\nq2,007\n")
    assert [chat.messages[1]["content"] for chat in load_chats(tmp_path / "long.csv")] == ["null", "NA", "007"]


def test_columns_that_hold_what_others_read_as_nothing_or_numbers_stay_text(tmp_path):
    (tmp_path / "a.csv").write_bytes("prompt,completion\r\na,null\r\nb,NA\r\nc,None\r\nd,007\r\ne,1e3\r\nf,true\r\n".encode("utf-8-sig"))
    assert [chat.messages[1]["content"] for chat in load_chats(tmp_path / "a.csv")] == ["null", "NA", "None", "007", "1e3", "true"]
    (tmp_path / "b.csv").write_bytes("prompt;completion\r\na;b\r\n".encode("utf-8-sig"))
    with pytest.raises(OlpackError, match=r"separated by semicolons, and not by commas\? A row is"):
        load_chats(tmp_path / "b.csv")


def test_a_field_may_be_long_on_every_system(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr("csv.field_size_limit", asked.append)
    (tmp_path / "a.csv").write_text("prompt,completion\na,b\n")
    load_chats(tmp_path / "a.csv")
    assert asked[0] < 2**31  # a C long has 32 bits on Windows


def test_what_a_template_wants_of_a_tool_call_is_named_in_its_words(tmp_path):
    nine = "{% for m in messages %}{% for c in m.tool_calls %}{% if c.id | length != 9 %}{{ raise_exception('Tool call IDs should be nine long!') }}"
    made = renderer(tmp_path, nine + "{% endif %}{{ c.function.name }}{% endfor %}{% endfor %}" + CHATML)

    def row(name: str) -> dict:
        call = {"id": name, "type": "function", "function": {"name": "f", "arguments": "{}"}}
        return {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": None, "tool_calls": [call]}]}

    _, long = chats(tmp_path, row("abcdefghi"), row("call_AbCdEfGhIj"))
    with pytest.raises(OlpackError, match=r"d.jsonl:2: the base's chat template refuses this conversation: Tool call IDs should be nine long!"):
        made.rows(long)


def test_a_row_that_is_longer_than_allowed_and_one_of_half_a_character_are_named(tmp_path):
    made = renderer(tmp_path, CHATML)
    (tmp_path / "d.jsonl").write_text(json.dumps(turns("q", "a")) + "\n" + json.dumps(turns("word " * 200, "a")) + "\n")
    with pytest.raises(OlpackError, match=r"1 row is longer than 64 tokens; d.jsonl:2 has"):
        render_rows(*load_split([tmp_path / "d.jsonl"], eval_share=0.5), made, max_length=64)
    with pytest.raises(OlpackError, match=r"line 1: message 2 has half a character"):
        chats(tmp_path, turns("q", "ok \ud83d end"))


def test_tools_padded_with_null_keep_their_own_keys(tmp_path):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    def row(name: str, key: str) -> dict:
        tool = {"type": "function", "function": {"name": name, "parameters": {"type": "object", "properties": {key: {"type": "string"}}}}}
        return {**turns("Do it.", "Done."), "tools": [tool]}

    parquet.write_table(pa.Table.from_pylist([row("one", "a"), row("two", "b")]), tmp_path / "t.parquet")
    found = load_chats(tmp_path / "t.parquet")
    assert [list(chat.tools[0]["function"]["parameters"]["properties"]) for chat in found] == [["a"], ["b"]]
