"""Do two comparisons of the same files say the same? The largest difference of each figure, against its stated spread.

    olpack build coding-assistant --no-deploy --out one && cp -r one two && rm -r two/coding-assistant/compare
    olpack compare coding-assistant --out two
    python benchmarks/repeatability.py one/coding-assistant/compare/results.json two/coding-assistant/compare/results.json

Prints a Markdown table and writes it to benchmarks/repeatability.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import date
from pathlib import Path

from page import command_line, publish

from olpack.compare.results import QuantResult, Spread, read_results
from olpack.compare.table import plain


def repeated(quant: QuantResult) -> Iterator[tuple[str, Spread]]:
    """Every figure that is a median of repeats."""
    for prompt in quant.speed.prompt:
        yield f"prompt tokens/s at {prompt.prompt_tokens}", prompt.tokens_per_s
        yield f"first token, s, at {prompt.prompt_tokens}", prompt.first_token_s
    yield "generated tokens/s", quant.speed.generation_tokens_per_s
    yield "load, warm, s", quant.speed.load_warm_s


def single(quant: QuantResult) -> Iterator[tuple[str, float, float]]:
    """(figure, value, standard error or 0) of what is computed once."""
    yield "perplexity", quant.perplexity.value, quant.perplexity.standard_error
    yield "KL divergence, nats", quant.divergence.mean, quant.divergence.standard_error
    yield "KL divergence, 99th percentile", quant.divergence.p99, quant.divergence.p99_standard_error
    yield "same top token", quant.divergence.same_top, quant.divergence.same_top_standard_error
    yield "tasks", quant.scores.mean, quant.scores.standard_error
    yield "peak memory, bytes", quant.speed.peak_memory_bytes, 0.0


def table(first: list[QuantResult], second: list[QuantResult]) -> list[str]:
    """One line a figure: of the quant in which the two comparisons differ most. A spread is the wider of the two that they state."""
    found: dict[str, tuple[float, list[str]]] = {}

    def note(figure: str, quant: str, one: float, two: float, spread: float, stated: str) -> None:
        difference = abs(two / one - 1)
        cells = [figure, quant, plain(one), plain(two), f"{difference:.1%}", stated, "" if not spread else f"{abs(two - one) / spread:.2f}"]
        if figure not in found or difference > found[figure][0]:
            found[figure] = (difference, cells)

    for one, two in zip(first, second, strict=True):
        for (figure, a), (_, b) in zip(repeated(one), repeated(two), strict=True):
            wider = max(a, b, key=lambda spread: spread.high - spread.low)
            note(figure, one.quant, a.median, b.median, wider.high - wider.low, f"{plain(wider.low)}–{plain(wider.high)}")
        for (figure, a, error), (_, b, _) in zip(single(one), single(two), strict=True):
            note(figure, one.quant, a, b, error, f"± {plain(error)}" if error else "none stated")
    return [f"| {' | '.join(cells)} |" for _, cells in found.values()]


def main() -> None:
    parser = command_line(__file__, __doc__)
    parser.add_argument("first", type=Path, help="results.json")
    parser.add_argument("second", type=Path, help="results.json of the same files, measured anew")
    arguments = parser.parse_args()
    one, two = read_results(arguments.first), read_results(arguments.second)
    same = all([answer.text for answer in a.answers] == [answer.text for answer in b.answers] for a, b in zip(one.quants, two.quants, strict=True))
    publish(
        [
            f"{date.today()}, {one.machine.cpu}, {one.machine.cores} cores, {one.machine.busy:.0%} and {two.machine.busy:.0%} used by others. "
            f"{', '.join(quant.quant for quant in one.quants)}; of each figure, the quant that differs most.",
            "",
            "| figure | quant | first | second | difference | stated spread | difference / spread |",
            "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
            *table(one.quants, two.quants),
            "",
            f"Answers at temperature 0 are {'the same' if same else 'NOT the same'}.",
        ],
        arguments.output,
    )


if __name__ == "__main__":
    main()
