"""Each form in each container, byte for byte; what a tool call becomes; sources, weights and what is said of rows that do not fit."""

from __future__ import annotations

import csv
import json
import re
import tracemalloc
from pathlib import Path

import pytest

from olpack.data import Chat, Renderer, Source, load_chats, records, render_rows, split
from olpack.data.chats import times
from olpack.data.records import read_records
from olpack.errors import OlpackError
from olpack.model.base import BUILTIN, Base

NASTY = "مرحبا\u200f بالعالم! 👩‍💻 e\u0301\n\tdef f():\n\t\t'''a \"quoted\" docstring'''\r\n  end, semi; [bold]x[/bold] \u202bעברית\u202c"
ASKED = [{"role": "user", "content": f"Q {NASTY}"}]
MESSAGES = [{"role": "system", "content": f"S {NASTY}"}, *ASKED, {"role": "assistant", "content": f"A {NASTY}"}]
ROWS = {
    "chat": {"messages": MESSAGES},
    "sharegpt": {
        "conversations": [{"from": "system", "value": f"S {NASTY}"}, {"from": "human", "value": f"Q {NASTY}"}, {"from": "gpt", "value": f"A {NASTY}"}]
    },
    "completion": {"prompt": f"Q {NASTY}", "completion": f"A {NASTY}"},
    "alpaca": {"instruction": "Q", "input": NASTY, "output": f"A {NASTY}", "system": f"S {NASTY}"},
    "text": {"text": NASTY},
}


def write(path: Path, rows: list[dict]) -> Path:
    """Rows in the container that the name asks for; in CSV, what is no text as JSON."""
    kind = path.name.partition(".")[2]
    if kind == "jsonl":
        path.write_bytes("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())
    elif kind == "json":
        path.write_bytes(json.dumps(rows, ensure_ascii=False, indent=1).encode())
    elif kind == "object.json":
        path.write_bytes(json.dumps({"version": [{"data": 1}], "data": rows}, ensure_ascii=False, indent=1).encode())
    elif kind in ("csv", "tsv"):
        with path.open("w", encoding="utf-8-sig", newline="") as file:
            table = csv.DictWriter(file, list(rows[0]), delimiter="\t" if kind == "tsv" else ",")
            table.writeheader()
            for row in rows:
                table.writerow({key: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False) for key, value in row.items()})
    else:
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


@pytest.fixture(scope="module")
def renderer() -> Renderer:
    base = Base("builtin/tiny-coder", BUILTIN / "tiny-coder")
    return Renderer(base.tokenizer(), base.end_ids())


@pytest.mark.parametrize("container", ["jsonl", "json", "object.json", "csv", "tsv", "parquet"])
@pytest.mark.parametrize("form", ROWS)
def test_each_form_goes_through_each_container_byte_for_byte(tmp_path, renderer, form, container):
    path = write(tmp_path / f"rows.{container}", [ROWS[form], ROWS[form]])
    chats = load_chats(path)
    assert [chat.form for chat in chats] == [form, form]
    if form == "text":
        assert chats[0].text == NASTY
    else:
        expected = {"completion": MESSAGES[1:], "alpaca": [MESSAGES[0], {"role": "user", "content": f"Q\n\n{NASTY}"}, MESSAGES[2]]}
        assert chats[0].messages == expected.get(form, MESSAGES)
    (row,) = renderer.rows(chats[1])
    targets = renderer.tokenizer.decode([token for token, flag in zip(row.ids, row.loss_mask, strict=True) if flag])
    assert targets == (NASTY if form == "text" else f"A {NASTY}") + "<|im_end|>"
    assert load_chats(Source(path, form))[0].digest == chats[0].digest


def test_the_same_example_in_another_form_is_the_same_example(tmp_path):
    alpaca = write(tmp_path / "a.csv", [{"instruction": "Q", "input": "", "output": "A"}])
    sharegpt = write(tmp_path / "b.json", [{"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]}])
    prompt, answer = [{"role": "user", "content": "Q"}], [{"role": "assistant", "content": "A"}]
    completion = write(tmp_path / "c.parquet", [{"prompt": prompt, "completion": answer}])
    chats = load_chats(alpaca, sharegpt, completion)
    assert len({chat.digest for chat in chats}) == 1
    assert [chat.source for chat in chats] == ["a.csv:2", "b.json:2", "c.parquet:1"]


def test_a_folder_is_all_its_files(tmp_path):
    (tmp_path / "rows/deep").mkdir(parents=True)
    write(tmp_path / "rows/b.jsonl", [ROWS["chat"]])
    write(tmp_path / "rows/deep/a.csv", [ROWS["alpaca"]])
    (tmp_path / "rows/README.md").write_text("no data")
    (tmp_path / "rows/.ipynb_checkpoints").mkdir()
    write(tmp_path / "rows/.ipynb_checkpoints/b-checkpoint.jsonl", [ROWS["chat"]])
    (tmp_path / "rows/._b.jsonl").write_bytes(b"\0\xff")
    assert [chat.source for chat in load_chats(tmp_path / "rows")] == ["rows/b.jsonl:1", "rows/deep/a.csv:2"]
    before = Source(tmp_path / "rows").digest()
    (tmp_path / "rows/b.jsonl").rename(tmp_path / "rows/c.jsonl")
    assert Source(tmp_path / "rows").digest() != before
    (tmp_path / "empty").mkdir()
    with pytest.raises(OlpackError, match="contains no data"):
        load_chats(tmp_path / "empty")


TOOL = {"name": "weather", "description": "of a city", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}
TOOL_TEMPLATE = (
    "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for c in m.tool_calls %}<call>{{ c.function.name }} {{ c.function.arguments | tojson }}</call>{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ASK, RESULT, END = {"role": "user", "content": "Riyadh?"}, {"role": "tool", "content": "41"}, {"role": "assistant", "content": "Hot."}
FUNCTION = {"name": "weather", "arguments": '{"city": "الرياض"}'}
CALL = {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "type": "function", "function": FUNCTION}]}


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [ASK, CALL, RESULT, END], "tools": [{"type": "function", "function": TOOL}]},
        {
            "messages": [
                ASK,
                {"role": "assistant", "content": "", "tool_calls": [{"name": "weather", "arguments": {"city": "الرياض"}}]},
                RESULT,
                END,
            ],
            "tools": json.dumps([TOOL]),
        },
        {
            "conversations": [
                {"from": "human", "value": "Riyadh?"},
                {"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "الرياض"}}'},
                {"from": "observation", "value": "41"},
                {"from": "gpt", "value": "Hot."},
            ],
            "tools": json.dumps([TOOL]),
        },
    ],
)
@pytest.mark.parametrize("container", ["jsonl", "csv", "parquet"])
def test_tool_calls_are_targets_and_what_tools_answer_is_not(tmp_path, renderer, row, container):
    import copy

    tokenizer = copy.deepcopy(renderer.tokenizer)
    tokenizer.chat_template = TOOL_TEMPLATE
    (chat,) = load_chats(write(tmp_path / f"rows.{container}", [row]))
    (made,) = Renderer(tokenizer).rows(chat)
    assert '"name": "weather"' in made.text and "41" in made.text
    targets = tokenizer.decode([token for token, flag in zip(made.ids, made.loss_mask, strict=True) if flag])
    assert targets == '<call>weather {"city": "الرياض"}</call><|im_end|>Hot.<|im_end|>'
    (last,) = Renderer(tokenizer, learn="last").rows(chat)
    assert tokenizer.decode([token for token, flag in zip(last.ids, last.loss_mask, strict=True) if flag]) == "Hot.<|im_end|>"


def test_a_template_that_knows_no_tools_is_told(renderer, tmp_path):
    calls = write(tmp_path / "a.jsonl", [{"messages": [ASK, CALL, RESULT, END]}])
    with pytest.raises(OlpackError, match=r"a.jsonl:1: .*does not write the tool calls of an answer"):
        renderer.rows(load_chats(calls)[0])
    tools = write(tmp_path / "b.jsonl", [{"messages": [ASK, END], "tools": [TOOL]}])
    with pytest.raises(OlpackError, match="does not write the `tools` of a row"):
        renderer.rows(load_chats(tools)[0])


def test_a_prompt_and_a_message_of_weight_0_hold_no_targets(renderer, tmp_path):
    first, second = {"role": "assistant", "content": "one"}, {"role": "assistant", "content": "two"}
    prompts = write(tmp_path / "p.jsonl", [{"prompt": [ASK, first, ASK], "completion": [second]}])
    chats = write(tmp_path / "c.jsonl", [{"messages": [ASK, {**first, "weight": 0}, ASK, second]}, {"messages": [first, ASK, second]}])
    for chat in load_chats(prompts, chats):
        (row,) = renderer.rows(chat)
        assert renderer.tokenizer.decode([token for token, flag in zip(row.ids, row.loss_mask, strict=True) if flag]) == "two<|im_end|>"
    only = write(tmp_path / "b.jsonl", [{"messages": [first, ASK]}])
    with pytest.raises(OlpackError, match="no target tokens"):
        renderer.rows(load_chats(only)[0])


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.csv", 'instruction,output\nq,a\nq,"b\nc",d\n', "line 3: 3 fields, where the header has 2"),
        ("a.csv", 'instruction,output\nq,a\n"line\nbreak", \n', "line 3: `output` is empty"),
        ("a.csv", 'instruction,output\nq,a\n"q"x,b\n', "line 3: not CSV"),
        ("a.csv", b"instruction,output\nq,a\nq,\xff\n", "line 3: not UTF-8 (byte 3 of the line)"),
        ("a.json", '[\n{"text": "a"},\n{"text": ]', "line 3: not JSON: expecting value at column 10"),
        ("a.json", '[\n{"text": "a"}\n{"text": "b"}]', "line 3: not JSON: expecting ','"),
        ("a.json", '[\n{"text": "a"},\n\n{"text": 3}]', "line 4: there is no text as `text`"),
        ("a.json", '{"rows": [],\n "b": {}}', "line 1: neither an array of rows"),
        ("a.json", b'[{"text": "a"},\n{"text": "\xff"}]', "line 2: not UTF-8"),
        ("a.json", '{"text": "a"}\n{"text": ""}\n', "line 2: `text` is empty"),
        ("a.jsonl", '{"conversations": [{"from": "human", "value": "q"}, {"from": "robot", "value": "a"}]}', "turn 2 is from 'robot'"),
        ("a.jsonl", '{"messages": [{"role": "assistant", "tool_calls": [{"name": "f", "arguments": "{"}]}]}', "the arguments of f are no JSON"),
        ("a.jsonl", '{"messages": [{"role": "assistant", "tool_calls": [{"arguments": {}}]}]}', "without the name of a function"),
        ("a.jsonl", '{"prompt": "q", "completion": " "}', "`completion` is empty"),
        ("a.jsonl", '{"instruction": "q", "output": "a"}\n{"text": "a"}', "line 2: there is no text as `instruction`"),
        ("a.jsonl", '{"question": "q", "reply": "a"}', "the first one has question, reply. Name its keys or columns as one of the forms does: chat"),
        ("a.parquet", "no parquet", "no Parquet file"),
        ("a.json", '[{"text": "a"}]\n[{"text": "b"}]', "line 2: not JSON: something stands behind the rows at column 1"),
        ("a.json", '{"data": [{"text": "a"}]}\ngarbage', "line 2: not JSON: something stands behind the rows"),
        ("a.json", '{"data": [{"text": "a"}],\n "data": [{"text": "b"}]}', "line 2: not JSON: a second `data`"),
        ("a.json", '{"data": [{"text": "a"}], "by": {}\n', "line 2: not JSON: expecting '}'"),
        ("a.json", '[{"text": "a"},\n{"text": "b", "n": ' + "1" * 5000 + "}]", "line 2: not JSON: a number of more than 4,300 digits"),
        ("a.json", '[{"text": "a"},\n' + "[" * 100_000, "line 2: not JSON: nested too deeply"),
        ("a.jsonl", '{"text": "a"}\n{"n": ' + "1" * 5000 + "}", "line 2: not JSON: a number of more than 4,300 digits"),
        ("a.jsonl", '{"text": "a"}\n' + "[" * 100_000, "line 2: not JSON: nested too deeply"),
        ("a.json", "[" * 100_000, "line 1: not JSON: nested too deeply"),
        ("a.jsonl", '{"messages": [{"role": "user", "content": "q", "more": ' + "[" * 2000 + "]" * 2000 + "}]}", "nested too deeply"),
        ("a.jsonl", '{"instruction": "q", "input": 0, "output": "a"}', "line 1: there is no text as `input`"),
        ("a.csv", "text,text\na,b\n", "line 1: the header has the column text twice"),
        ("a.csv", "\nprompt;completion\nq;a\n", "line 2: the header is one column; is the file separated by semicolons, and not by commas?"),
        ("a.tsv", "prompt,completion\nq,a\n", "is the file separated by commas, and not by tabs?"),
        ("a.jsonl.gz", b"\x1f\x8b\n\xff\n", "of a kind that olpack does not read. It reads .jsonl, "),
    ],
)
def test_a_row_that_does_not_fit_is_named_with_its_line(tmp_path, name, text, said):
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(OlpackError) as caught:
        load_chats(path)
    assert said in str(caught.value) and str(path) in str(caught.value)


def test_a_header_below_empty_lines_and_with_spaces(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("\n \nprompt, completion,,\nq, a,,\n")
    (chat,) = load_chats(path)
    assert [message["content"] for message in chat.messages] == ["q", " a"] and chat.source == "a.csv:4"


def test_what_stands_around_the_rows_of_an_object_is_left_alone(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('{"by": ["x"],\n "data": [{"text": "a"}],\n "count": 1, "of": {"data": 2}}\n')
    assert [chat.text for chat in load_chats(path)] == ["a"]


def test_a_form_that_is_named_is_the_form(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"messages": MESSAGES, "text": "plain"}])
    assert load_chats(Source(path, "text"))[0].text == "plain"
    with pytest.raises(OlpackError, match="line 1: there is no text as `instruction`"):
        load_chats(Source(path, "alpaca"))


def test_a_weight_says_how_often_a_row_is_seen(tmp_path, renderer):
    rows = [{"instruction": f"q{number}", "output": "a"} for number in range(200)]
    path = write(tmp_path / "a.jsonl", rows)
    held_out = write(tmp_path / "b.jsonl", [{"instruction": "other", "output": "a"}])
    counts = {}
    for weight in (0.25, 1.0, 2.5):
        train_rows, scored = render_rows(load_chats(Source(path, weight=weight)), load_chats(held_out), renderer, max_length=64)
        counts[weight] = [sum(row.source == f"a.jsonl:{number}" for row in train_rows) for number in range(1, 201)]
        assert len(scored) == 1
    assert 25 < sum(counts[0.25]) < 75 and max(counts[0.25]) == 1
    assert counts[1.0] == [1] * 200
    assert set(counts[2.5]) == {2, 3} and 450 < sum(counts[2.5]) < 550
    # Which half it is has nothing to do with which rows are held out.
    chats = load_chats(Source(path, weight=0.5))
    assert any(times(chat) for chat in split(chats, 0.2)[1])


def test_a_held_out_row_that_is_also_trained_is_refused_in_whatever_form(tmp_path, renderer):
    train = write(tmp_path / "a.jsonl", [{"instruction": "q", "output": "a"}])
    apart = write(tmp_path / "b.jsonl", [{"messages": [{"role": "user", "content": "q", "id": 7}, {"role": "assistant", "content": "a"}]}])
    with pytest.raises(OlpackError, match=r"b.jsonl:1 is also in the training data \(a.jsonl:1\)"):
        render_rows(load_chats(train), load_chats(apart), renderer, max_length=64)


@pytest.mark.parametrize("form", ROWS)
def test_the_split_is_stable_in_every_form_and_parts_no_twins(tmp_path, form):
    def rows(first: int, count: int) -> list[dict]:
        return [json.loads(json.dumps(ROWS[form]).replace("docstring", f"docstring {number}")) for number in range(first, first + count)]

    few = load_chats(write(tmp_path / "a.jsonl", rows(0, 200)))
    more = load_chats(write(tmp_path / "b.jsonl", rows(1000, 50)), tmp_path / "a.jsonl", tmp_path / "a.jsonl")
    apart = {chat.digest for chat in split(few, 0.1)[1]}
    trained, again = ({chat.digest for chat in side} for side in split(more, 0.1))
    assert 5 < len(apart) < 40
    assert apart <= again and not trained & again


def test_a_text_has_nothing_to_ask():
    from olpack.data import request_of

    assert request_of(Chat([], "x:1", text="plain", form="text").messages) == []


def test_the_examples_of_the_page_are_what_it_says(tmp_path):
    page = (Path(__file__).parent.parent / "docs/data.md").read_text(encoding="utf-8")
    examples = re.findall(r"```json\n(.*?)```", page, re.DOTALL)
    told = []
    for number, example in enumerate(examples):
        path = tmp_path / f"{number}.json"
        path.write_text(f"[{example}]", encoding="utf-8")
        told += [chat.form for chat in load_chats(path)]
    assert told == ["chat", *re.findall(r"^\*\*`([a-z]+)`\*\*", page, re.MULTILINE)]


def write_small_rows(path: Path, count: int) -> Path:
    """Rows of 2,000 characters each, in the container that the name asks for."""
    text = "x" * 1000
    if path.suffix == ".csv":
        path.write_text("prompt,completion\n" + f"{text},{text}\n" * count)
    else:
        encoding = "utf-16" if path.stem == "wide" else "utf-8"
        path.write_text((json.dumps({"prompt": text, "completion": text}) + "\n") * count, encoding=encoding)
    return path


@pytest.mark.parametrize("name", ["rows.jsonl", "wide.jsonl", "lines.json", "rows.csv"])
def test_a_file_is_read_row_by_row(tmp_path, name):
    path = write_small_rows(tmp_path / name, 10_000)
    tracemalloc.start()
    assert sum(1 for _ in read_records(path)) == 10_000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert path.stat().st_size > 20_000_000 > 12_000_000 > peak


def test_a_line_that_is_too_long_is_never_in_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "_LONGEST_LINE", 1 << 20)
    path = tmp_path / "long.jsonl"
    with path.open("w") as file:
        file.write('{"text": "a"}\n')
        for _ in range(40):
            file.write("x" * (1 << 20))
        file.write('\r\n{"text": "b"}')
    tracemalloc.start()
    read = list(read_records(path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [(one.number, one.problem) for one in read] == [(1, ""), (2, records.TOO_LONG), (3, "")]
    assert peak < 12_000_000


@pytest.mark.parametrize("chunk", [4, 5, 7, 64])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32"])
def test_where_a_part_of_a_file_ends_decides_nothing(tmp_path, monkeypatch, encoding, chunk):
    text = '{"text": "é👩"}\r\n\r\n \n{"text": 1}\r{"text": }\n{"text": "ü"}'
    (tmp_path / "a.jsonl").write_bytes(text.encode(encoding))
    monkeypatch.setattr(records, "CHUNK", chunk)
    read = list(read_records(tmp_path / "a.jsonl"))
    assert [one.number for one in read] == [1, 4, 5, 6]
    assert [one.value and one.value["text"] for one in read] == ["é👩", 1, None, "ü"]
    assert read[2].problem == "not JSON: expecting value at column 10"
    (tmp_path / "a.csv").write_bytes('text,b\r\n"é\n👩",1\r\nü,2'.encode(encoding))
    assert [(one.number, one.value) for one in read_records(tmp_path / "a.csv")] == [(2, {"text": "é\n👩", "b": "1"}), (4, {"text": "ü", "b": "2"})]


@pytest.mark.parametrize("chunk", [4, 6, 1 << 20])
def test_the_byte_that_is_no_utf16_is_named(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(records, "CHUNK", chunk)
    path = tmp_path / "a.jsonl"
    path.write_bytes("\ufeffabc".encode("utf-16-le") + b"\x00\xd8a\x00")
    with pytest.raises(OlpackError, match=r"begins as UTF-16 and cannot be read as that at byte 9\."):
        list(read_records(path))
    path.write_bytes("\ufeffabc".encode("utf-16-le") + b"a")
    with pytest.raises(OlpackError, match=r"begins as UTF-16 and cannot be read as that at byte 9\."):
        list(read_records(path))


def test_an_array_that_is_too_large_to_be_read_whole_is_refused(tmp_path):
    with (tmp_path / "a.json").open("wb") as file:
        file.write(b"[\n")
        file.truncate((1 << 30) + 1)
    with pytest.raises(OlpackError, match="an array of at most 1,073,741,824 bytes is read") as raised:
        list(read_records(tmp_path / "a.json"))
    assert "JSON lines" in raised.value.remedy
