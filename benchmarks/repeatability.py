"""Does a second comparison of the same files say the same? The largest difference of each figure, against its stated spread.

    olpack build coding-assistant --no-deploy && python benchmarks/repeatability.py [--out build] [--package coding-assistant]

Measures twice with nothing kept in between. Prints a Markdown table and writes it to benchmarks/repeatability.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import date
from pathlib import Path

from page import command_line, publish

from olpack import recipe
from olpack.compare import MeasureSettings, measure
from olpack.compare.results import QuantResult, Spread
from olpack.compare.table import plain
from olpack.pipeline import Build
from olpack.stages import quant_files, questions
from olpack.workspace import recipe_path


def repeated(quant: QuantResult) -> Iterator[tuple[str, Spread]]:
    """Every figure that is a median of repeats."""
    for prompt in quant.speed.prompt:
        yield f"prompt tokens/s at {prompt.prompt_tokens}", prompt.tokens_per_s
        yield f"first token, s, at {prompt.prompt_tokens}", prompt.first_token_s
    yield "generated tokens/s", quant.speed.generation_tokens_per_s
    yield "load, warm, s", quant.speed.load_warm_s


def single(quant: QuantResult) -> Iterator[tuple[str, float, float]]:
    """(figure, value, standard error) of what is computed once."""
    yield "perplexity", quant.perplexity.value, quant.perplexity.standard_error
    yield "peak memory, bytes", quant.speed.peak_memory_bytes, 0.0


def table(first: list[QuantResult], second: list[QuantResult]) -> list[str]:
    """One line a figure: of the quant in which the two comparisons differ most."""
    found: dict[str, tuple[float, list[str]]] = {}

    def note(figure: str, quant: str, one: float, two: float, spread: float, stated: str) -> None:
        difference = abs(two / one - 1)
        cells = [figure, quant, plain(one), plain(two), f"{difference:.1%}", stated, "" if not spread else f"{abs(two - one) / spread:.2f}"]
        if figure not in found or difference > found[figure][0]:
            found[figure] = (difference, cells)

    for one, two in zip(first, second, strict=True):
        for (figure, a), (_, b) in zip(repeated(one), repeated(two), strict=True):
            low, high = min(a.low, b.low), max(a.high, b.high)
            note(figure, one.quant, a.median, b.median, high - low, f"{plain(low)}–{plain(high)}")
        for (figure, a, error), (_, b, _) in zip(single(one), single(two), strict=True):
            note(figure, one.quant, a, b, error, f"± {plain(error)}" if error else "none stated")
    return [f"| {' | '.join(cells)} |" for _, cells in found.values()]


def main() -> None:
    parser = command_line(__file__, __doc__)
    parser.add_argument("--out", type=Path, default=Path("build"))
    parser.add_argument("--package", default="coding-assistant")
    arguments = parser.parse_args()
    build = Build(recipe.load(recipe_path(arguments.package)), arguments.out)
    asked, (_, rows) = build.recipe.compare, build.rows
    settings = MeasureSettings(prompt_lengths=tuple(asked.prompt_tokens), generated_tokens=asked.generated_tokens, repeats=asked.repeats,
                               context=build.package.parameters["num_ctx"])
    once, again = (measure(quant_files(build), rows[: asked.eval_rows], questions(build), settings, None, arguments.package) for _ in range(2))
    same = all([answer.text for answer in a.answers] == [answer.text for answer in b.answers] for a, b in zip(once.quants, again.quants, strict=True))
    publish([
        f"{date.today()}, {once.machine.cpu}, {once.machine.cores} cores, {once.machine.busy:.0%} and {again.machine.busy:.0%} used by others. "
        f"{arguments.package}, {', '.join(quant.quant for quant in once.quants)}, {asked.repeats} repeats.",
        "Of each figure, the quant that differs most.",
        "",
        "| figure | quant | first | second | difference | stated spread | difference / spread |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
        *table(once.quants, again.quants), "", f"Answers at temperature 0 are {'the same' if same else 'NOT the same'}.",
    ], arguments.output)  # fmt: skip


if __name__ == "__main__":
    main()
