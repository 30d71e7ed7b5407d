"""Chats from files, and which of their tokens are target tokens."""

from __future__ import annotations

import copy
import json

import pytest

from olpack.data import Chat, Renderer, load_chats, render_rows, split
from olpack.errors import OlpackError
from olpack.model.base import BUILTIN, Base

TINY = Base("builtin/tiny-coder", BUILTIN / "tiny-coder")


@pytest.fixture(scope="module")
def renderer() -> Renderer:
    return Renderer(TINY.tokenizer(), TINY.end_ids())


def turns(*contents: str, system: str | None = None) -> list[dict]:
    roles = ("user", "assistant")
    start = [{"role": "system", "content": system}] if system is not None else []
    return start + [{"role": roles[index % 2], "content": content} for index, content in enumerate(contents)]


def target_text(renderer: Renderer, row) -> str:
    return renderer.tokenizer.decode([token for token, flag in zip(row.ids, row.loss_mask, strict=True) if flag])


def test_only_the_answer_and_its_end_are_targets(renderer):
    row = renderer.rows(Chat(turns("Add two.", "def add(a, b):\n\treturn a + b", system="Be brief."), "x:1"))[0]
    assert target_text(renderer, row) == "def add(a, b):\n\treturn a + b<|im_end|>"
    assert renderer.tokenizer.decode(row.ids) == row.text


def test_every_assistants_turn_is_a_target(renderer):
    row = renderer.rows(Chat(turns("a?", "one", "b?", "two"), "x:1"))[0]
    assert target_text(renderer, row) == "one<|im_end|>two<|im_end|>"


NASTY = [
    "\tif x:\n\t\treturn '''a \"\"\" b'''",
    "مرحبا بالعالم\u200f!",
    "👩‍💻 🚀",
    "a\r\nb",
    " leading and trailing ",
    "{{ messages }} {% raw %}",
    "e\u0301 ｆｕｌｌ",
]


@pytest.mark.parametrize("text", NASTY)
def test_text_goes_through_byte_for_byte(renderer, text):
    row = renderer.rows(Chat(turns(text, text), "x:1"))[0]
    assert target_text(renderer, row) == text + "<|im_end|>"
    assert renderer.tokenizer.decode(row.ids) == row.text


def test_an_answer_that_begins_with_a_line_break_is_a_target_from_there(renderer):
    messages = turns("q", "\n\nanswer")
    (row,) = renderer.rows(Chat(messages, "x:1"))
    assert target_text(renderer, row) == "\n\nanswer<|im_end|>"
    asked = renderer.prompt(messages[:1])
    assert row.ids[: len(asked)] == asked and row.loss_mask.index(True) == len(asked)


def test_special_token_text_inside_a_message_does_not_end_the_learning_early(renderer):
    row = renderer.rows(Chat(turns("q", "say <|im_end|> twice"), "x:1"))[0]
    assert target_text(renderer, row) == "say <|im_end|> twice<|im_end|>"


def test_a_template_that_adds_an_empty_thinking_block_to_the_prompt(renderer):
    thinking = copy.deepcopy(renderer.tokenizer)
    thinking.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n\n</think>\n\n{% endif %}"
    )
    for answer in ("answer", "<think>\nyes\n</think>\n\nanswer", "<tool_call>"):
        row = Renderer(thinking).rows(Chat(turns("q", answer), "x:1"))[0]
        assert target_text(renderer, row) == answer + "<|im_end|>"


def test_the_token_that_ends_a_turn_is_found_whatever_the_tokenizer_calls_it(renderer):
    other = copy.deepcopy(renderer.tokenizer)
    other.eos_token = "<|endoftext|>"
    row = Renderer(other).rows(Chat(turns("q", "answer"), "x:1"))[0]
    assert Renderer(other).end_of_turn() == "<|im_end|>"
    other.chat_template = (
        "{% for m in messages %}{{ m.role }}:\n{{ m.content }}\n### End\n{% endfor %}{% if add_generation_prompt %}assistant:\n{% endif %}"
    )
    row = Renderer(other).rows(Chat(turns("q", "answer"), "x:1"))[0]
    assert target_text(Renderer(other), row) == "answer\n### End\n"
    assert Renderer(other).end_of_turn() is None


def with_template(renderer, template: str, learn: str = "all") -> Renderer:
    other = copy.deepcopy(renderer.tokenizer)
    other.chat_template = template
    return Renderer(other, learn=learn)


# What Qwen3 does: thinking is written for the last turn only, and an empty block where it has none.
FORGETFUL = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last and '<think>' not in m.content %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m.content if loop.last or m.role != 'assistant' else m.content.split('</think>')[-1].lstrip() }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_each_turn_is_trained_as_it_is_served_where_a_template_rewrites_earlier_ones(renderer):
    forgetful = with_template(renderer, FORGETFUL)
    messages = turns("q1", "<think>\nhm\n</think>\n\na1", "q2", "a2", "q3", "<think>\nso\n</think>\n\na3")
    rows = forgetful.rows(Chat(messages, "x:7"))
    assert [target_text(forgetful, row) for row in rows] == [
        "<think>\nhm\n</think>\n\na1<|im_end|>",
        "<think>\n\n</think>\n\na2<|im_end|>",
        "<think>\nso\n</think>\n\na3<|im_end|>",
    ]
    for row, until in zip(rows, (1, 3, 5), strict=True):
        assert row.text.startswith(forgetful.text(messages[:until], ask=True))
    assert [row.source for row in rows] == ["x:7 (1 of 3)", "x:7 (2 of 3)", "x:7 (3 of 3)"]
    (last,) = with_template(renderer, FORGETFUL, "last").rows(Chat(messages, "x:7"))
    assert last.ids == rows[2].ids and last.loss_mask == rows[2].loss_mask


# A header of its own and a token that ends a turn, white space cut, and no generation markers, as in the templates of Llama 3.1 and Gemma 2.
PUBLISHED = {
    "<|eot_id|>": "<|endoftext|>{% for m in messages %}<|start|>{{ m.role }}<|stop|>\n\n{{ m.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant<|stop|>\n\n{% endif %}",
    "<end_of_turn>": "<|endoftext|>{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('alternate') }}"
    "{% endif %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}",
}


@pytest.mark.parametrize("end", PUBLISHED)
@pytest.mark.parametrize("learn", ["all", "last"])
def test_the_token_that_ends_each_target_turn_is_a_target(renderer, end, learn):
    tokenizer = copy.deepcopy(renderer.tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|start|>", "<|stop|>", "<start_of_turn>", end]})
    tokenizer.chat_template = PUBLISHED[end]
    other = Renderer(tokenizer, learn=learn)
    (row,) = other.rows(Chat(turns("q", "مرحبا\n", "r", " \tb 👩‍💻"), "x:1"))
    assert target_text(other, row) == (f"مرحبا{end}" if learn == "all" else "") + f"b 👩‍💻{end}"
    assert other.end_of_turn() == end


def test_turns_share_a_row_as_far_as_they_are_served_alike(renderer):
    # The token that ends the text is written behind the last turn only, and not before the fourth.
    once = with_template(
        renderer,
        "{% for m in messages %}{{ m.role }}:\n{{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant:\n{% elif messages|length > 3 %}<|endoftext|>{% endif %}",
    )
    rows = once.rows(Chat(turns("a", "b", "c", "d", "e", "f"), "x:1"))
    assert [target_text(once, row) for row in rows] == ["b\nd\n<|endoftext|>", "f\n<|endoftext|>"]


def test_a_template_that_rewrites_the_question_once_it_is_answered_is_refused(renderer):
    marked = with_template(
        renderer,
        "{% for m in messages %}{{ m.role }}:{{ '>' if loop.last }}{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}",
    )
    with pytest.raises(OlpackError, match="x:7: .*writes the turns before an answer otherwise"):
        marked.rows(Chat(turns("a", "b"), "x:7"))


def test_a_template_that_refuses_a_system_turn(renderer):
    strict = copy.deepcopy(renderer.tokenizer)
    strict.chat_template = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    with pytest.raises(OlpackError, match=r"x:2: .*no system role"):
        Renderer(strict).rows(Chat(turns("a", "b", system="s"), "x:2"))[0]


def test_no_template(renderer):
    bare = copy.deepcopy(renderer.tokenizer)
    bare.chat_template = None
    with pytest.raises(OlpackError, match="no chat template"):
        Renderer(bare)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"messages": [', "line 2: not JSON"),
        ('{"text": "x"}', "line 2: there is no list of `messages`"),
        ('{"messages": [{"role": "robot", "content": "x"}]}', "message 1 has no role"),
        ('{"messages": [{"role": "user", "content": 3}]}', "message 1 has no text"),
        ('{"messages": [{"role": "user", "content": "cut \\ud83d"}]}', "half a character"),
        ('{"messages": [{"role": "user", "content": "x"}]}', "no assistant's turn"),
        ('{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": " "}]}', "message 2, the assistant's, is empty"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, said):
    path = tmp_path / "train.jsonl"
    path.write_text(json.dumps({"messages": turns("a", "b")}) + "\n" + line + "\n", encoding="utf-8")
    with pytest.raises(OlpackError) as caught:
        load_chats(path)
    assert said in str(caught.value)


def test_broken_utf8_missing_and_empty_files(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_bytes(b'{"messages": "\xff"}\n')
    with pytest.raises(OlpackError, match="line 1: not UTF-8"):
        load_chats(path)
    path.write_text("\n\n")
    with pytest.raises(OlpackError, match="is empty"):
        load_chats(path)
    with pytest.raises(OlpackError, match="There is no"):
        load_chats(tmp_path / "absent.jsonl")


def test_a_row_stays_on_its_side_of_the_split():
    chats = [Chat(turns(f"q{n}", "a"), f"x:{n}") for n in range(400)]
    train, held_out = split(chats, 0.1)
    assert 15 < len(held_out) < 75
    more = [Chat(turns(f"new{n}", "a"), f"y:{n}") for n in range(50)]
    again = {chat.source for chat in split(more + chats, 0.1)[1]}
    assert {chat.source for chat in held_out} <= again
    assert not {chat.source for chat in train} & again


def test_a_row_that_is_too_long_is_refused_and_named(renderer, tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps({"messages": turns("q", "a" * n)}) + "\n" for n in (5, 3000)), encoding="utf-8")
    held_out = tmp_path / "eval.jsonl"
    held_out.write_text(json.dumps({"messages": turns("q", "a")}) + "\n")
    with pytest.raises(OlpackError, match=r"1 row is longer than 64 tokens; train.jsonl:2.*data.max_length"):
        render_rows(load_chats(path), load_chats(held_out), renderer, max_length=64)


def test_a_text_is_tokenized_as_the_tokenizer_does_it_with_an_end_behind_it():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    text = "def add(a, b):\n\treturn مرحبا"
    spaced = Tokenizer(models.BPE())  # as Llama 2 has it: <s>, and a space that it puts before each text
    spaced.pre_tokenizer, spaced.decoder = pre_tokenizers.Metaspace(prepend_scheme="first"), decoders.Metaspace(prepend_scheme="first")
    spaced.train_from_iterator([text], trainers.BpeTrainer(vocab_size=200, special_tokens=["<s>", "</s>"], show_progress=False))
    spaced.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=spaced, bos_token="<s>", eos_token="</s>", chat_template="{{ messages[0].content }}")
    (row,) = Renderer(tokenizer).rows(Chat([], "x:1", text=text))
    assert row.ids == [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    assert row.target_count == len(row.ids) - 1 and row.text == f"<s>{text}</s>"
