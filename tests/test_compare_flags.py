"""Is it broken? Scripts that do not belong there, and files that are worse than smaller ones."""

from __future__ import annotations

import pytest
from test_compare_results import quant
from tiny_models import write_model

from olpack.compare.recommend import set_losses
from olpack.compare.result_flags import ExpectedScripts, dominant_script, flag_answers, flag_neighbours, flag_same_types
from olpack.compare.results import QuantResult

ENGLISH = "Please tell me how a list is reversed in Python."
ARABIC = "من فضلك اشرح لي كيف أعكس ترتيب قائمة في لغة بايثون."
RUSSIAN = "Пожалуйста, расскажите, как развернуть список."
JAPANESE = "リストを逆順にする方法を教えてください。お願いします。"
KOREAN = "파이썬에서 리스트를 뒤집는 방법을 알려 주세요 부탁합니다."
CODE = "def reverse(items):\n    return list(reversed(items))"


@pytest.mark.parametrize(
    ("text", "script"),
    [
        (ENGLISH, "LATIN"),
        (ARABIC, "ARABIC"),
        (RUSSIAN, "CYRILLIC"),
        (JAPANESE, "CJK"),
        (KOREAN, "HANGUL"),
        (CODE, "LATIN"),
        ("Ｆｕｌｌ ｗｉｄｔｈ ｌｅｔｔｅｒｓ ｏｆ Ｌａｔｉｎ", "LATIN"),
        ("1234567890 " * 9, None),
        ("Да", None),
        (ENGLISH + RUSSIAN, None),
    ],
)
def test_the_script_of_most_letters(text, script):
    assert dominant_script(text) == script


@pytest.mark.parametrize(
    ("examples", "request_", "answer", "switched"),
    [
        ([], ENGLISH, JAPANESE, True),
        ([], ENGLISH, CODE, False),
        ([], ARABIC, ENGLISH, True),
        ([(ENGLISH, CODE)], ARABIC, CODE, False),  # a coding assistant asked in Arabic
        ([(ENGLISH, CODE)], ARABIC, ARABIC, False),
        ([(ENGLISH, CODE)], ARABIC, RUSSIAN, True),
        ([(ENGLISH, ARABIC)], ENGLISH, ARABIC, False),  # a translator
        ([(ENGLISH, ARABIC)], ENGLISH, ENGLISH, True),
        ([(ENGLISH, ENGLISH), (ARABIC, ARABIC)], ARABIC, ENGLISH, True),  # an assistant of two languages
        ([], ENGLISH, "42", False),
    ],
)
def test_another_script_than_expected(examples, request_, answer, switched):
    assert ExpectedScripts(examples).switched(request_, answer) == switched


def test_answers_in_another_script_are_flagged():
    one = quant("Q4_0", 10, None, answer=JAPANESE)
    flag_answers(one, [[{"role": "system", "content": JAPANESE}, {"role": "user", "content": ENGLISH}]], ExpectedScripts([]))
    (flag,) = one.flags
    assert one.answers[0].flags == ["script"] and flag.code == "script" and flag.text.startswith("1 of 1 answers") and not flag.serious


def test_a_file_worse_than_a_smaller_one_is_flagged():
    best = [12.0, 25.0, 33.0]
    quants = [
        quant("Q4_0", 10, [value + 0.2 for value in best]),
        quant("Q4_K_M", 11, best),
        quant("Q5_K_M", 13, [13.1, 27.0, 36.1]),  # worse on every token by about the same
        quant("Q6_K", 15, [12.9, 24.5, 33.1]),  # worse on one row, better on another
        quant("Q8_0", 18, best),
    ]
    set_losses(quants, [10, 20, 30])
    flag_neighbours(quants, [10, 20, 30])
    assert {one.quant: [flag.code for flag in one.flags] for one in quants if one.flags} == {"Q5_K_M": ["neighbours"]}
    assert "above that of Q4_K_M, which is smaller" in quants[2].flags[0].text


def test_without_an_error_nothing_is_said_of_neighbours():
    quants = [quant("Q4_0", 10, [12.0]), quant("Q8_0", 18, [24.0])]
    for one in quants:
        one.perplexity.row_nll = one.perplexity.row_nll[:1]
    set_losses(quants, [10])
    flag_neighbours(quants, [10])
    assert not any(one.flags for one in quants)


def test_quants_that_fall_back_to_the_same_types_are_named(tmp_path):
    """Rows that are no multiple of 256 take no K-quant (ggml-org/llama.cpp#28474)."""
    from olpack.export import Target, export

    base = write_model(tmp_path / "model", hidden_size=64, intermediate_size=96, num_attention_heads=2, num_key_value_heads=1, head_dim=32)
    made = export(base, [Target(quant, tmp_path / f"{quant}.gguf") for quant in ("Q5_K_M", "Q6_K", "Q8_0")])
    quants = [QuantResult(quant=file.quant, tag=file.quant.lower(), file="", sha256="", size_bytes=file.size) for file in made]
    flag_same_types(quants, {file.quant: file.types for file in made})
    assert [[flag.text for flag in quant.flags] for quant in quants] == [[], [], ["its tensors have the same types as those of Q6_K"]]
