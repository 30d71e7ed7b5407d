"""Generation prompts that say more than a finished turn, in the manners of published templates: the answer stands behind what is served."""

from __future__ import annotations

import copy
import json

import pytest

from olpack.data import Chat, Renderer, Source, load_sides, render_rows
from olpack.data.check import check_data
from olpack.errors import OlpackError
from olpack.model.base import BUILTIN, Base

TURN = "{% for m in messages %}<|im_start|>{{ m.role }}\n"
END = "{{ m.content }}<|im_end|>\n{% endfor %}"
ASK = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
THINK = "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
NO_THINK = "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n\n</think>\n\n{% endif %}"
CUT = "{{ m.content.split('</think>')[-1] }}<|im_end|>\n{% endfor %}"  # what DeepSeek-R1's templates do: no turn has reasoning
FIELD = (
    "{% if m.role == 'assistant' %}{% if m.reasoning_content %}<think>\n{{ m.reasoning_content }}\n</think>{% else %}</think>{% endif %}{% endif %}"
)
MARKS = (
    TURN + "{% if m.role == 'assistant' %}{% if m.reasoning_content %}<|START_THINKING|>{{ m.reasoning_content }}<|END_THINKING|>{% endif %}"
    "<|START_TEXT|>{{ m.content }}<|END_TEXT|>{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<|START_THINKING|>{% endif %}"
)
LEAD = TURN + END + "{% if add_generation_prompt %}<|im_start|>assistant\nMy steps:\n{% endif %}"
CLOSED = (
    TURN
    + "{% if m.role == 'assistant' %}</think>{% endif %}"
    + END
    + "{% if add_generation_prompt %}<|im_start|>assistant\n<think></think>{% endif %}"
)
QWEN3 = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% set c = m.content %}{% set r = m.reasoning_content or '' %}"
    "{% if '</think>' in c %}{% set r = c.split('</think>')[0].split('<think>')[-1].strip() %}"
    "{% set c = c.split('</think>')[-1].lstrip() %}{% endif %}"
    "{% if m.role == 'assistant' and loop.last %}<think>\n{{ r }}\n</think>\n\n{% endif %}{{ c }}<|im_end|>\n{% endfor %}"
)
INLINE = "<think>\nSo 4.\n</think>\n\nIt is 4."
ORPHAN = "So 4.\n</think>\n\nIt is 4."


@pytest.fixture(scope="module")
def tiny() -> Base:
    return Base("builtin/tiny-coder", BUILTIN / "tiny-coder")


def with_template(tiny: Base, template: str) -> Renderer:
    tokenizer = copy.deepcopy(tiny.tokenizer())
    tokenizer.chat_template = template
    return Renderer(tokenizer, tiny.end_ids())


def split_row(renderer: Renderer, answer: str, **fields: str) -> tuple[str, str]:
    """What of a row is behind the last role and before the target tokens, and the target tokens."""
    messages = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": answer, **fields}]
    (row,) = renderer.rows(Chat(messages, "x:1"))
    asked = renderer.text(messages[:1], ask=True)
    ids = renderer.tokenizer(asked, add_special_tokens=False)["input_ids"]
    assert row.ids[: len(ids)] == ids and row.loss_mask.index(True) == len(ids)
    return asked.rpartition("assistant\n")[2], renderer.tokenizer.decode(
        [i for i, is_target in zip(row.ids, row.loss_mask, strict=True) if is_target]
    )


CASES = [
    # DeepSeek-R1: the generation prompt opens the block, and the template writes no reasoning in a turn.
    (TURN + CUT + THINK, "It is 4.", {}, "<think>\n", "\n</think>\n\nIt is 4.<|im_end|>"),
    (TURN + CUT + THINK, INLINE, {}, "<think>\n", f"{ORPHAN}<|im_end|>"),
    (TURN + CUT + THINK, ORPHAN, {}, "<think>\n", f"{ORPHAN}<|im_end|>"),
    (TURN + CUT + THINK, "It is 4.", {"reasoning_content": "So 4."}, "<think>\n", f"{ORPHAN}<|im_end|>"),
    # GLM, Nemotron: a turn without reasoning has the closing mark alone, or none of the white space.
    (TURN + FIELD + END + THINK, "It is 4.", {}, "<think>\n", "\n</think>It is 4.<|im_end|>"),
    (TURN + FIELD + END + THINK, ORPHAN, {}, "<think>\n", "So 4.\n</think>It is 4.<|im_end|>"),
    # Cohere: other marks, of which a turn without reasoning begins with the same letters.
    (MARKS, "It is 4.", {}, "<|START_THINKING|>", "<|END_THINKING|><|START_TEXT|>It is 4.<|END_TEXT|><|im_end|>"),
    (MARKS, "It is 4.", {"thinking": "So 4."}, "<|START_THINKING|>", "So 4.<|END_THINKING|><|START_TEXT|>It is 4.<|END_TEXT|><|im_end|>"),
    # Apriel: words and no mark. DeepSeek V3.2: the turn says the end of what the prompt says.
    (LEAD, "It is 4.", {}, "My steps:\n", "It is 4.<|im_end|>"),
    (CLOSED, "It is 4.", {}, "<think></think>", "It is 4.<|im_end|>"),
    (CLOSED, "</think>", {}, "<think></think>", "</think><|im_end|>"),
    # Without thinking, as QwQ and Qwen3 with it switched off.
    (TURN + END + NO_THINK, "It is 4.", {}, "<think>\n\n</think>\n\n", "It is 4.<|im_end|>"),
    # Templates whose turns begin with the generation prompt stay as they were.
    (TURN + END + ASK, "It is 4.", {}, "", "It is 4.<|im_end|>"),
    (TURN + END + ASK, INLINE, {}, "", f"{INLINE}<|im_end|>"),
    (QWEN3 + ASK, "It is 4.", {}, "", "<think>\n\n</think>\n\nIt is 4.<|im_end|>"),
    (QWEN3 + ASK, ORPHAN, {}, "", f"{INLINE}<|im_end|>"),
    (QWEN3 + THINK, "It is 4.", {}, "<think>\n", "\n</think>\n\nIt is 4.<|im_end|>"),
    (QWEN3 + THINK, INLINE, {}, "<think>\n", f"{ORPHAN}<|im_end|>"),
    (QWEN3 + THINK, ORPHAN, {}, "<think>\n", f"{ORPHAN}<|im_end|>"),
]


@pytest.mark.parametrize(("template", "answer", "fields", "opened", "target"), CASES)
def test_the_answer_stands_behind_the_generation_prompt(tiny, template, answer, fields, opened, target):
    assert split_row(with_template(tiny, template), answer, **fields) == (opened, target)


def test_reasoning_in_the_text_that_the_template_cuts_off_is_refused(tiny):
    messages = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": INLINE}]
    with pytest.raises(OlpackError, match="x:1: .*does not write the reasoning of an answer"):
        with_template(tiny, TURN + CUT + ASK).rows(Chat(messages, "x:1"))


def test_earlier_answers_that_only_close_their_reasoning_are_given_to_the_template_whole(tiny):
    renderer = with_template(tiny, QWEN3 + THINK)
    question = {"role": "user", "content": "And 3+3?"}
    messages = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": ORPHAN}, question, {"role": "assistant", "content": ORPHAN}]
    first, second = renderer.rows(Chat(messages, "x:1"))
    assert first.text.count("</think>") == second.text.count("</think>") == 1 and "assistant\nIt is 4.<|im_end|>" in second.text


@pytest.mark.parametrize(
    ("template", "answer", "said"),
    [
        (TURN + END + ASK, ORPHAN, "Its target tokens contain </think> more often than reasoning is opened."),
        (TURN + END + THINK, f"Well.\n</think>{ORPHAN}", "Its target tokens contain </think> more often than reasoning is opened."),
        (TURN + END + NO_THINK, INLINE, "The generation prompt ends with </think>, and the answer opens reasoning behind it."),
        (TURN + END + ASK, INLINE, None),
        (TURN + CUT + THINK, INLINE, None),
        (QWEN3 + THINK, ORPHAN, None),
        (TURN + END + NO_THINK, "4", None),
    ],
)
def test_marks_that_do_not_fit_are_a_warning(tiny, tmp_path, capsys, template, answer, said):
    rows = [{"messages": [{"role": "user", "content": f"{n}+{n}?"}, {"role": "assistant", "content": answer}]} for n in range(3)]
    path = tmp_path / "d.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    renderer = with_template(tiny, template)
    report = check_data([Source(path)], [], renderer, max_length=64, eval_share=0.1)
    assert not report.fails and [finding.text for finding in report.findings] == [said] * 3 * bool(said)
    render_rows(*load_sides([path], [], eval_share=0.1), renderer, max_length=64)
    printed = capsys.readouterr().err
    assert (f"{said} This is so of 3 rows" in " ".join(printed.split())) if said else "more often" not in printed and "behind it" not in printed
