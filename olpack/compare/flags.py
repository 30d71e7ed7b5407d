"""Is it broken? What answers, and a quant's place among its neighbours, say about a file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from olpack.compare.language import Scripts
from olpack.compare.perplexity import paired_loss
from olpack.compare.results import Flag, QuantResult

_SAID = {
    "empty": "empty",
    "looping": "in a loop",
    "endless": "not finished at the limit",
    "script": "in another script than expected",
    "reasoning": "not scored: cut before the reasoning ended",
}
_ERRORS = 3  # standard errors: chance alone passes them once in 740 pairs, and a comparison of five files has ten pairs


def flag_answers(result: QuantResult, prompts: Sequence[list[dict]], scripts: Scripts) -> None:
    """Mark answers in an unexpected script, and sum up the marks of all answers as flags of the file."""
    answers = result.answers or []
    for messages, answer in zip(prompts, answers, strict=bool(answers)):
        if scripts.switched(messages[-1]["content"], answer.text):
            answer.flags.append("script")
    for code, said in _SAID.items():
        if count := sum(code in answer.flags for answer in answers):
            result.flags.append(Flag(code=code, text=f"{count} of {len(answers)} answers {said}", serious=False))
    tasks = result.task_answers or []
    if count := sum("reasoning" in answer.flags for answer in tasks):
        text = f"{count} of {len(tasks)} tasks are not scored: the answer was cut before its reasoning ended (`compare.answer_tokens`)"
        result.flags.append(Flag(code="reasoning", text=text, serious=False))


def flag_same_types(quants: Sequence[QuantResult], types: Mapping[str, Mapping[str, Mapping[str, int]]]) -> None:
    """Flag files that hold the same types as an earlier one: rows that suit no K-quant fall back, and then two names mean one file.

    Args:
        types: by quant, how many matrices of each kind have which type; empty where nobody knows.
    """
    seen: list[QuantResult] = []
    for quant in quants:
        if own := types.get(quant.quant):
            first = next((other.quant for other in seen if types[other.quant] == own), None)
            seen.append(quant)
            if first:
                quant.flags.append(Flag(code="same_types", text=f"its tensors have the same types as those of {first}", serious=False))


def flag_neighbours(quants: Sequence[QuantResult], learned_tokens: Sequence[int]) -> None:
    """Flag every file whose perplexity is above that of a smaller one by more than chance explains.

    More bits should not predict worse. Both files were scored on the same rows, so the difference of their losses is taken row by row
    (`perplexity.paired_loss`), which leaves out how hard the rows are; it counts where it is more than three of its standard errors. With
    fewer than two rows there is no error, and so no flag. A file named here is no failure by itself: an older type (Q4_1) can honestly be
    worse than a smaller newer one. It is one that nobody should choose.
    """
    scored = [quant for quant in quants if quant.loss is not None]
    for quant in scored:
        worst: tuple[float, float, QuantResult] | None = None
        for other in scored:
            if other.size_bytes < quant.size_bytes:
                growth, error = paired_loss(quant.perplexity.row_nll, other.perplexity.row_nll, learned_tokens)
                if error is not None and growth > _ERRORS * error and (worst is None or growth > worst[0]):
                    worst = growth, error, other
        if worst:
            growth, error, other = worst
            text = f"its perplexity is {100 * growth:.2f} ± {100 * error:.2f}% above that of {other.quant}, which is smaller"
            quant.flags.append(Flag(code="neighbours", text=text, serious=False))
