"""Flags of answers and files: what is broken or suspicious, found in the answers, on the rows, and by comparison with other files."""

from __future__ import annotations

import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

from olpack.compare.perplexity import paired_loss
from olpack.compare.results import Answer, AnswerFlag, Flag, QuantResult, Rows
from olpack.data.reasoning_marks import REASONING_MARKS
from olpack.data.repetition import repeats_itself

_DESCRIPTIONS: dict[AnswerFlag, str] = {
    "empty": "empty",
    "looping": "in a loop",
    "endless": "not finished at the limit",
    "script": "in another script than expected",
    "reasoning": "not scored: cut before the reasoning ended",
}
_ERRORS = 3  # standard errors: chance alone passes them once in 740 pairs, and a comparison of five files has ten pairs
_FEWEST_LETTERS = 20  # fewer have no dominant script: names, symbols, one word of English
_DOMINANT = 0.6  # share of the letters; below it a text is mixed and has no dominant script
# Scripts that one text mixes.
_TOGETHER = {"HIRAGANA": "CJK", "KATAKANA": "CJK", "KATAKANA-HIRAGANA": "CJK", "IDEOGRAPHIC": "CJK"}


def answer_of(
    text: str, finish: Literal["stop", "length"], tokens: int, *, prompt: str = "", reasoning: str = "", broken_off: bool = False
) -> Answer:
    """An answer with its reasoning split off, and its flags.

    Args:
        text: all that the model wrote, or what a server calls the content.
        finish: "stop" where the model ended its turn, "length" where it was cut.
        tokens: generated.
        prompt: the rendered prompt. Some templates open the reasoning at its end, and then the answer contains only the mark that closes it.
        reasoning: what a server has split off already.
        broken_off: the server ended the answer because it repeats one token.
    """
    for begin, end in REASONING_MARKS if not reasoning else ():
        opened = text.lstrip().startswith(begin) or prompt.rstrip().endswith(begin)
        if end in text:
            reasoning, _, text = text.rpartition(end)
        elif opened:
            reasoning, text = text, ""
        if reasoning:
            reasoning = reasoning.lstrip().removeprefix(begin)
            break
    text = text.lstrip() if reasoning else text
    flags: list[AnswerFlag]
    if broken_off:
        flags = ["looping"]
    elif reasoning and not text.strip() and finish == "length":
        flags = ["looping", "reasoning"] if repeats_itself(reasoning) else ["reasoning"]
    else:
        flags = flags_of(text, finish)
    return Answer(text=text, finish=finish, tokens=tokens, flags=flags, reasoning=reasoning)


def flags_of(text: str, finish: str) -> list[AnswerFlag]:
    """Flags of an answer that ended by itself ("stop") or was cut at the limit ("length").

    "looping": cut while it repeated itself. "endless": cut otherwise.
    """
    if not text.strip():
        return ["empty"]
    if finish == "stop":
        return []
    return ["looping"] if repeats_itself(text) else ["endless"]


def dominant_script(text: str) -> str | None:
    """The script of most letters, as Unicode's character names begin: "LATIN", "ARABIC", "CJK" (with kana), "HANGUL".

    None where there are fewer than 20 letters, or none has 60 % of them.
    """
    counts: Counter[str] = Counter()
    for letter in unicodedata.normalize("NFKC", text):  # full-width and mathematical letters are Latin ones
        if letter.isalpha():
            script = unicodedata.name(letter, "UNKNOWN").split()[0]
            counts[_TOGETHER.get(script, script)] += 1
    if (total := counts.total()) < _FEWEST_LETTERS:
        return None
    script, count = counts.most_common(1)[0]
    return script if count >= _DOMINANT * total else None


class ExpectedScripts:
    """Which scripts answers are expected in, by the script of the request.

    A script is expected where the answers of held-out rows have it to requests of the same script: a translator's Arabic to English requests,
    a coding assistant's Latin to Arabic ones. Where no held-out request has the script, the request's own script is expected, or any that the
    answers of held-out rows have.

    Args:
        examples: (request, answer) of held-out rows.
    """

    def __init__(self, examples: Iterable[tuple[str, str]]):
        self._answers: dict[str | None, set[str]] = defaultdict(set)
        for request, answer in examples:
            if script := dominant_script(answer):
                self._answers[dominant_script(request)].add(script)

    def switched(self, request: str, answer: str) -> bool:
        """Whether the answer's script is none that is expected. False where request or answer has no dominant script."""
        asked, given = dominant_script(request), dominant_script(answer)
        if asked is None or given is None:
            return False
        expected = self._answers.get(asked) or {asked}.union(*self._answers.values())
        return given not in expected


def flag_answers(result: QuantResult, prompts: Sequence[list[dict]], scripts: ExpectedScripts) -> None:
    """Flag answers in an unexpected script, and sum up the flags of all answers as flags of the file."""
    answers = result.answers or []
    for messages, answer in zip(prompts, answers, strict=bool(answers)):
        if scripts.switched(messages[-1]["content"], answer.text):
            answer.flags.append("script")
    for code, description in _DESCRIPTIONS.items():
        if count := sum(code in answer.flags for answer in answers):
            result.flags.append(Flag(code=code, text=f"{count} of {len(answers)} answers {description}", serious=False))
    tasks = result.task_answers or []
    if count := sum("reasoning" in answer.flags for answer in tasks):
        text = f"{count} of {len(tasks)} tasks are not scored: the answer was cut before its reasoning ended (`compare.answer_tokens`)"
        result.flags.append(Flag(code="reasoning", text=text, serious=False))


def flag_rows(result: QuantResult, rows: Rows) -> None:
    """Flag a file whose probabilities on the rows are no numbers, or whose tokenizer reads the rows otherwise than training did."""
    perplexity = result.perplexity
    if perplexity is None:
        return
    if perplexity.value is None:
        result.flags.append(Flag(code="broken", text="the model's probabilities are no numbers: this file is broken", serious=True))
    if different := rows.count - perplexity.same_tokens_rows:
        text = f"its tokenizer turns {different} of {rows.count} rows into other tokens than training did: it was trained on others"
        result.flags.append(Flag(code="tokenizer", text=text, serious=True))


def flag_same_types(quants: Sequence[QuantResult], types: Mapping[str, Mapping[str, Mapping[str, int]]]) -> None:
    """Flag files whose tensors have the same types as those of an earlier file. Rows that suit no K-quant fall back to other types, and then
    two names mean one file.

    Args:
        types: by quant, how many matrices of each kind have which type; empty where unknown.
    """
    seen: list[QuantResult] = []
    for quant in quants:
        if own := types.get(quant.quant):
            first = next((other.quant for other in seen if types[other.quant] == own), None)
            seen.append(quant)
            if first:
                quant.flags.append(Flag(code="same_types", text=f"its tensors have the same types as those of {first}", serious=False))


def flag_neighbours(quants: Sequence[QuantResult], target_tokens: Sequence[int]) -> None:
    """Flag every file whose perplexity is above that of a smaller one by more than chance explains.

    More bits should not predict worse. Both files were scored on the same rows, so the difference of their losses is computed row by row
    (`perplexity.paired_loss`), which leaves out how hard the rows are; it counts where it is more than three of its standard errors. With
    fewer than two rows there is no error, and so no flag. A file flagged here is no failure by itself: an older type (Q4_1) can be worse than
    a smaller newer one. It is one that nobody should choose.

    Args:
        target_tokens: of each row.
    """
    scored = [(quant, nll) for quant in quants if quant.loss and quant.perplexity and (nll := quant.perplexity.finite_nll) is not None]
    for quant, own in scored:
        worst: tuple[float, float, QuantResult] | None = None
        for other, smaller in scored:
            if other.size_bytes < quant.size_bytes:
                growth, error = paired_loss(own, smaller, target_tokens)
                if error is not None and growth > _ERRORS * error and (worst is None or growth > worst[0]):
                    worst = growth, error, other
        if worst:
            growth, error, other = worst
            text = f"its perplexity is {100 * growth:.2f} ± {100 * error:.2f}% above that of {other.quant}, which is smaller"
            quant.flags.append(Flag(code="neighbours", text=text, serious=False))
