"""What an adapter costs, and the merged file in its place: figures by hand, the sentence, the tables and the report."""

from __future__ import annotations

import csv
import io
import math

import pytest
from test_compare_results import TOKENS, against_the_unquantized, printed, quant, results

from olpack import workspace
from olpack.compare.adapter_cost import AdapterRuns, adapter_result, better_package, merged_result
from olpack.compare.cache import ADAPTER_SPEED, Cache, Units
from olpack.compare.recommend import recommend
from olpack.compare.report import render_report
from olpack.compare.results import AdapterResult, Perplexity, PromptSpeed, QuantResult, Results, Speed, Spread, read_results, write_results
from olpack.compare.table import markdown_table, to_csv
from olpack.errors import OlpackError

NLL = [12.0, 25.0, 33.0]
WITH, WITHOUT, MERGED = [90.0, 95.0], [100.0, 100.0], [99.0, 104.5]


def known(unit: str, data: dict) -> Units:
    units = Units(Cache(None), "q4_1", {})
    units.add(unit, data)
    return units


def runs(**generation: list[float]) -> Units:
    measured = AdapterRuns(prompt_tokens=512, prompt={name: [3 * value for value in values] for name, values in generation.items()})
    return known(ADAPTER_SPEED, measured.model_copy(update={"generation": generation}).model_dump(mode="json"))


def speed(*rates: float) -> Speed:
    prompt = PromptSpeed(prompt_tokens=500, tokens_per_s=Spread.of([10 * rate for rate in rates]))
    return Speed(engine="Ollama 0.33.0", context=512, prompt=[prompt], generation_tokens_per_s=Spread.of(rates))


def on_a_file(merged_nll: list[float] | None = None, served: tuple[Speed, ...] = (), **generation: list[float]) -> Results:
    """One quant with an adapter of 10 MB, and its merged file of 98 MB."""
    one = quant("Q4_1", 108, NLL)
    one.adapter = adapter_result(10_000_000, runs(**generation), "llama-cpp-python 1, embedded, 2 threads", served)
    if merged_nll is not None:
        score = Perplexity(value=3.0, standard_error=0.1, row_nll=merged_nll, same_tokens_rows=3)
        units = known("size", {"bytes": 98_000_000})
        units.add("perplexity", score.model_dump(mode="json"))
        one.adapter.merged = merged_result(one, units, TOKENS)
    return against_the_unquantized(results(one))


def adapter_of(made: Results) -> AdapterResult:
    assert made.quants[0].adapter is not None
    return made.quants[0].adapter


def test_the_cost_is_that_of_the_turns():
    """ln 0.9 and ln 0.95: their mean, and their standard deviation over √2."""
    [embedded] = adapter_of(on_a_file(with_adapter=WITH, without=WITHOUT)).speeds
    logs = [math.log(0.9), math.log(0.95)]
    ratio = math.sqrt(0.9 * 0.95)
    assert embedded.generation.cost == embedded.prompt.cost == pytest.approx(1 - ratio)
    assert embedded.generation.standard_error == pytest.approx(ratio * abs(logs[0] - logs[1]) / 2)
    assert embedded.prompt_tokens == 512 and embedded.prompt.with_adapter.values == [270.0, 285.0] and embedded.generation.merged is None


def test_a_server_that_has_the_file_alone_gives_figures_of_its_own():
    made = on_a_file(served=(speed(40, 42), speed(50, 50)), with_adapter=WITH, without=WITHOUT)
    embedded, served = adapter_of(made).speeds
    assert (embedded.engine, served.engine) == ("llama-cpp-python 1, embedded, 2 threads", "Ollama 0.33.0")
    assert served.generation.cost == pytest.approx(1 - math.sqrt(0.8 * 0.84)) and served.prompt_tokens == 500
    reason = made.recommendation.reason
    assert (
        "Q4_1 is the only file. The adapter adds 10.0 MB to the base's file and costs 18.0 ± 2.0% of the generation speed (Ollama 0.33.0)." in reason
    )
    silent = Speed(engine="Ollama 0.33.0", context=512)
    [_, served] = adapter_of(on_a_file(served=(silent, speed(50, 50)), with_adapter=WITH, without=WITHOUT)).speeds
    assert served.generation is served.prompt is served.prompt_tokens is None


def test_runs_of_two_models_through_a_server_are_not_paired():
    """Both vary alike by chance; as pairs they would give no error at all. A run that failed leaves one value out."""
    [_, served] = adapter_of(on_a_file(served=(speed(40, 44), speed(50, 55)), with_adapter=WITH, without=WITHOUT)).speeds
    deviation = abs(math.log(1.1)) / 2
    assert served.generation.cost == pytest.approx(0.2)
    assert served.generation.standard_error == pytest.approx(0.8 * math.sqrt(2) * deviation)
    [_, served] = adapter_of(on_a_file(served=(speed(40, 44), speed(50, 55, 50, 55)), with_adapter=WITH, without=WITHOUT)).speeds
    assert served.generation.cost == pytest.approx(0.2)
    [_, served] = adapter_of(on_a_file(served=(speed(40), speed(50, 55)), with_adapter=WITH, without=WITHOUT)).speeds
    assert served.generation.standard_error is None


@pytest.mark.parametrize(
    ("merged", "generation", "package", "text"),
    [
        ([value * 1.5 for value in NLL], MERGED, "adapter", "a generation speed 10.00 ± 0.00% higher: the better package here is `adapter`."),
        (NLL, MERGED, "merged", "a perplexity 0.00 ± 0.00% higher and a generation speed 10.00 ± 0.00% higher: the better package here is `merged`."),
        (NLL, [80.0, 110.0], "adapter", "a generation speed 1.45 ± 13.41% higher: the better package here is `adapter`."),
        ([value * 0.9 for value in NLL], WITH, "merged", "% lower and a generation speed 0.00 ± 0.00% higher: the better package here is `merged`."),
    ],
)
def test_the_recommendation_weighs_quality_speed_and_bytes(merged, generation, package, text):
    made = on_a_file(merged, with_adapter=WITH, without=WITHOUT, merged=generation)
    advice = made.recommendation
    assert advice.package == package == better_package(made.quants[0], 0.01) and advice.quant == "Q4_1"
    growth = math.exp((sum(merged) - sum(NLL)) / sum(TOKENS)) - 1
    assert f"Merged into one Q4_1 of 98.0 MB, it has a perplexity {abs(100 * growth):.2f} ± " in advice.reason and text in advice.reason, (
        advice.reason
    )


def test_a_cost_within_the_noise_is_none():
    reason = on_a_file(with_adapter=[95.0, 104.0], without=WITHOUT).recommendation.reason
    assert "and costs 0.6 ± 4.5% (no more than chance) of the generation speed" in reason, reason
    assert "costs 10.0% of the generation speed" in on_a_file(with_adapter=[90.0], without=[100.0]).recommendation.reason


def test_what_was_not_measured_is_left_out():
    made = results(quant("Q4_1", 108, NLL))
    made.quants[0].adapter = AdapterResult(size_bytes=10_000_000)
    advice = recommend(made)
    assert advice.reason == "Q4_1 is the only file. The adapter adds 10.0 MB to the base's file." and advice.package is None
    without_rows = merged_result(QuantResult.model_validate(made.quants[0].model_dump()), known("other", {}), TOKENS)
    assert without_rows is None
    assert better_package(on_a_file(NLL, with_adapter=WITH, without=WITHOUT).quants[0], 0.01) is None


def test_tables_report_and_json_show_it(tmp_path):
    made = on_a_file([value * 1.5 for value in NLL], with_adapter=WITH, without=WITHOUT, merged=MERGED)
    text = printed(made)
    assert max(len(line) for line in text.split("Q4_1: the adapter")[0].splitlines()) <= 80 and "Q4_1 merged" in text
    note = "Q4_1: the adapter costs 7.5 ± 2.5% of the generation speed and 7.5 ± 2.5% of the speed of prompts of 512 tokens: llama-cpp-python"
    assert note in text and note in markdown_table(made)
    [row] = csv.DictReader(io.StringIO(to_csv(made)))
    assert (row["adapter_bytes"], row["merged_bytes"], row["merged_perplexity"]) == ("10000000", "98000000", "3.0")
    assert float(row["adapter_cost_of_generation"]) == pytest.approx(1 - math.sqrt(0.9 * 0.95))
    page = render_report(made, workspace.template_source("report.html.j2"))
    assert "the better package here is `adapter`" in page
    write_results(made, path := tmp_path / "results.json")
    assert read_results(path) == made
    adapter_of(made).merged.perplexity.row_nll.pop()
    write_results(made, path)
    with pytest.raises(OlpackError, match="the perplexity of merged Q4_1 has 2 rows"):
        read_results(path)
