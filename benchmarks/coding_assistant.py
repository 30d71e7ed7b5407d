"""What the shipped package answers: its 200 held-out requests, by the base before training and by each quant.

    olpack build coding-assistant --no-deploy
    python benchmarks/coding_assistant.py build/coding-assistant/compare/results.json

Reads the results of a build and prints a Markdown table: answers that pass their asserts, answers in a loop, answers cut at
`compare.answer_tokens`; and what each quant answers to the recipe's prompts.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

from olpack.compare.results import Answer, Results, Scores, read_results


def rows(results: Results) -> Iterator[tuple[str, Scores, list[Answer]]]:
    """(name, scores, answers) of the base and of every quant."""
    if results.base and results.base.scores and results.base.task_answers:
        yield f"base {results.base.quant}, before training", results.base.scores, results.base.task_answers
    for quant in results.quants:
        if quant.scores and quant.task_answers:
            yield quant.quant, quant.scores, quant.task_answers


def main() -> None:
    results = read_results(Path(sys.argv[1]))
    print("| | passed | in a loop | cut |\n| --- | ---: | ---: | ---: |")
    for name, scores, answers in rows(results):
        loops = sum("looping" in answer.flags for answer in answers)
        cut = sum(answer.finish == "length" for answer in answers)
        print(f"| {name} | {sum(scores.values):.0f} of {scores.count} ({scores.mean:.1%}) | {loops} | {cut} |")
    for number, messages in enumerate(results.prompts):
        print(f"\n**{messages[-1]['content']}**\n")
        said = {quant.quant: quant.answers[number].text for quant in results.quants if quant.answers}
        for text in dict.fromkeys(said.values()):
            print(f"{', '.join(quant for quant, answer in said.items() if answer == text)}:\n\n```python\n{text}\n```")


if __name__ == "__main__":
    main()
