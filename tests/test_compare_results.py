"""Formulas, recommendation, table and results.json of comparisons made by hand."""

from __future__ import annotations

import csv
import io
import json
import math

import numpy as np
import pytest
from rich.console import Console

from olpack.compare.changes import importance_gains
from olpack.compare.divergence import summarize
from olpack.compare.perplexity import paired_loss, perplexity
from olpack.compare.recommend import recommend, set_losses
from olpack.compare.result_flags import flags_of
from olpack.compare.results import (
    Answer,
    BaseResult,
    CheckScore,
    Flag,
    Loss,
    MachineInfo,
    Perplexity,
    PromptSpeed,
    QuantResult,
    Reference,
    Results,
    Rows,
    Scores,
    Speed,
    Spread,
    SuiteScore,
    TaskAsked,
    read_results,
    write_results,
)
from olpack.compare.table import markdown_table, print_table, to_csv, types_in_short
from olpack.errors import OlpackError

TOKENS = [10, 20, 30]


def quant(name: str, megabytes: int, nll: list[float] | None, serious: bool = False, answer: str = "ok") -> QuantResult:
    score = None
    if nll is not None:
        value, error = perplexity(nll, TOKENS)
        score = Perplexity(value=value, standard_error=error, row_nll=nll, same_tokens_rows=3)
    speed = Speed(
        engine="llama-cpp-python 1, embedded",
        context=2048,
        threads=2,
        load_warm_s=Spread.of([0.06, 0.05, 0.07]),
        load_cold_s=0.4,
        prompt=[PromptSpeed(prompt_tokens=512, tokens_per_s=Spread.of([1234.5, 1200.0, 1300.0]))],
        generation_tokens_per_s=Spread.of([123.4 - megabytes, 120 - megabytes, 130 - megabytes]),
        generated_tokens=64,
        peak_memory_bytes=123_400_000,
    )
    return QuantResult(
        quant=name,
        tag=name.lower(),
        file=f"{name}.gguf",
        sha256="0" * 64,
        size_bytes=megabytes * 1_000_000,
        bits_per_weight=4.5,
        speed=speed,
        perplexity=score,
        answers=[Answer(text=answer, finish="stop", tokens=3)],
        flags=[Flag(code="failed", text="it broke", serious=True)] if serious else [],
    )


def results(*quants: QuantResult, tolerance: float = 0.01) -> Results:
    set_losses(list(quants), TOKENS)
    made = Results(
        name="coding-assistant",
        created="2026-01-02T03:04:05+00:00",
        quants=list(quants),
        prompts=[[{"role": "user", "content": "Reverse a list."}]],
        machine=MachineInfo(cpu="A CPU", cores=2, memory_bytes=16_000_000_000, system="Debian", busy=0.1, versions={"olpack": "0.1.0"}),
        settings={"repeats": 3, "answer_tokens": 64, "tolerance": tolerance},
        rows=Rows(count=3, learned_tokens=TOKENS, digest="0" * 64),
    )
    made.recommendation = recommend(made, tolerance)
    return made


def four() -> Results:
    best = [12.0, 25.0, 33.0]
    return results(
        quant("Q4_0", 10, [value * 1.05 for value in best]),
        quant("Q4_K_M", 11, [value + 0.1 for value in best]),
        quant("Q5_K_M", 13, [value + 0.05 for value in best]),
        quant("Q8_0", 18, best),
    )


def test_perplexity_and_its_standard_error_by_hand():
    # Two rows, S = (2, 4), T = (1, 3): L = 6/4; deviations 2 - 1.5 and 4 - 4.5; s.e. of L = sqrt(2/1 · (0.25 + 0.25)) / 4
    value, error = perplexity([2.0, 4.0], [1, 3])
    assert value == pytest.approx(math.exp(1.5))
    assert error == pytest.approx(math.exp(1.5) * 0.25)
    assert perplexity([3.0], [2]) == (pytest.approx(math.exp(1.5)), None)


def test_standard_error_is_the_spread_of_repeated_draws():
    random = np.random.default_rng(0)

    def draw() -> tuple[float, float]:
        tokens = random.integers(20, 200, size=150)
        difficulty = random.normal(2.0, 0.4, size=150)
        return perplexity(list(tokens * difficulty), list(tokens))

    values, errors = zip(*(draw() for _ in range(400)), strict=True)
    assert np.mean(errors) == pytest.approx(np.std(values), rel=0.1)


def test_paired_loss_cancels_how_hard_a_row_is():
    reference = [12.0, 90.0, 33.0]
    relative, error = paired_loss([own + 0.02 * count for own, count in zip(reference, TOKENS, strict=True)], reference, TOKENS)
    assert relative == pytest.approx(math.exp(0.02) - 1) and error == pytest.approx(0, abs=1e-9)
    assert perplexity(reference, TOKENS)[1] > 1


@pytest.mark.parametrize(
    ("tolerance", "chosen", "said"),
    [(0.01, "Q4_K_M", "39% smaller than Q8_0"), (0.001, "Q8_0", "lowest perplexity"), (0.5, "Q4_0", "within the 50% accepted")],
)
def test_the_smallest_file_within_the_accepted_loss_is_recommended(tolerance, chosen, said):
    made = four()
    recommendation = recommend(made, tolerance)
    assert recommendation.quant == chosen and said in recommendation.reason and recommendation.reason.count(". ") == 0


def test_the_reason_names_what_the_smaller_ones_lose():
    assert "; Q4_0, smaller, loses 5.9" in recommend(four(), 0.01).reason.replace("6.0", "5.9")


def test_a_file_with_a_serious_flag_is_not_recommended_unless_all_have_one():
    best = [12.0, 25.0, 33.0]
    assert results(quant("Q4_0", 10, best, serious=True), quant("Q8_0", 18, best)).recommendation.quant == "Q8_0"
    assert results(quant("Q4_0", 10, best, serious=True), quant("Q8_0", 18, best, serious=True)).recommendation.quant == "Q4_0"


def test_the_best_file_may_be_flagged():
    best = [12.0, 25.0, 33.0]
    worse, bad = ([value * factor for value in best] for factor in (1.2, 1.3))
    made = results(quant("Q4_0", 10, bad), quant("Q5_K_M", 13, worse), quant("Q8_0", 18, best, serious=True))
    assert made.recommendation.quant == "Q5_K_M" and "flagged" in made.recommendation.reason


def test_without_perplexity_nothing_is_recommended():
    assert results(quant("Q4_0", 10, None), quant("Q8_0", 18, None)).recommendation is None


def printed(made: Results, width: int = 80, terminal: bool = False) -> str:
    out = io.StringIO()
    print_table(made, Console(file=out, width=width, force_terminal=terminal))
    return out.getvalue()


def test_the_table_fits_80_columns_and_a_log():
    made = four()
    made.quants[0].flags = [Flag(code="endless", text="2 of 3 answers not finished at the limit", serious=False)]
    text = printed(made)
    assert max(len(line) for line in text.split("Recommended")[0].splitlines()) <= 80 and "\x1b" not in text
    row = next(line for line in text.splitlines() if "Q4_K_M" in line)
    assert row.split()[:4] == ["→", "Q4_K_M", "11.0", "MB"]
    assert row.split()[4:-3] == ["4.50", "1,234", "112", "0.06", "s", "123.4", "MB"] and row.split()[-2] == "±"
    assert "…" not in text and "Q4_0: 2 of 3 answers not finished at the limit" in text and "Recommended: Q4_K_M" in text


def against_the_unquantized(made: Results) -> Results:
    for number, one in enumerate(made.quants, 1):
        one.divergence = summarize("F16", [[0.001 / number, 0.004 / number], [0.01 / number], [0.02 / number] * 3], [2, 1, 2])
    made.reference = Reference(quant="F16", perplexity=made.quants[-1].perplexity)
    made.base = BaseResult(quant="Q8_0", perplexity=made.quants[0].perplexity, divergence=made.quants[0].divergence)
    return made


def with_choices(made: Results) -> Results:
    """Q4_0 has an importance matrix, with which its rows lose a half, a quarter and a quarter of what they do without; Q4_K_M is a budget."""
    made = against_the_unquantized(made)
    without = made.quants[0].divergence
    weighed = [sum_ * share for sum_, share in zip(without.row_kl, (0.5, 0.25, 0.25), strict=True)]
    made.quants[0].divergence = without.model_copy(update={"row_kl": weighed, "mean": sum(weighed) / without.tokens})
    made.quants[0].divergence_without_importance = without
    made.quants[1].types = {"token_embd": {"q6_K": 1}, "attn_v": {"q5_K": 2, "q6_K": 6}, "ffn_down": {"q4_K": 8}}
    return made


def test_what_was_chosen_for_a_quant_and_what_it_gave_is_told():
    made = with_choices(four())
    # By hand: S = (2.5, 2.5, 15), T = (5, 10, 60), share 20/75; deviations 2.5 - 4/3, 2.5 - 8/3, 15 - 16.
    (gain,) = importance_gains(made)
    error = math.sqrt(3 / 2 * ((7 / 6) ** 2 + (1 / 6) ** 2 + 1)) / 75
    assert (gain.quant, gain.change, gain.standard_error) == ("Q4_0", pytest.approx(20 / 75 - 1), pytest.approx(error))
    short = types_in_short(made.quants[1].types)
    assert short == "token_embd q6_K, attn_v q6_K ×6 q5_K ×2, ffn_down q4_K ×8"
    text = printed(made)
    assert "Q4_0: KL mean 3.33 mnat with the importance matrix, 12.50 without: -73.3 ± 2.5%" in text and f"Q4_K_M: {short}" in text
    assert "12.50 without: -73.3" in markdown_table(made) and "kl_divergence_without_importance" in to_csv(made).splitlines()[0]


@pytest.mark.parametrize("text", ["=1+1", "+1", "-1+cmd|' /C calc'!A0", "@SUM(A1)", "\t=1", "\r=1", " =1", "＝1"])
def test_no_cell_of_the_csv_is_a_formula(text):
    made = four()
    made.quants[0].quant = made.quants[0].tag = text
    made.quants[0].flags = [Flag(code="failed", text=text, serious=False)]
    made.quants[0].loss = Loss(reference="q8_0", relative=-0.25, standard_error=0.5)
    rows = list(csv.DictReader(io.StringIO(to_csv(made), newline="")))
    assert [rows[0][column] for column in ("quant", "tag", "flags")] == ["'" + text.replace("\r", "\n")] * 3
    assert (rows[0]["loss_relative"], rows[1]["quant"]) == ("-0.25", "Q4_K_M")


def test_quality_has_a_table_of_its_own_where_there_is_more_of_it():
    text = printed(against_the_unquantized(four()))
    assert max(len(line) for line in text.split("Recommended")[0].splitlines()) <= 80 and "…" not in text
    assert text.count("Q4_K_M") == 3 and "base Q8_0" in text and "unquantized" in text
    # By hand: S = (2.5, 5, 30), T = (2, 1, 3), mean 37.5/6, deviations -10, -1.25, 11.25; for equal tops S = (2, 1, 2).
    row = next(line for line in text.splitlines() if line.startswith("→  Q4_K_M") and "%" in line)
    assert row.split()[5:] == ["6.25", "±", "3.08", "10.00", "83.3", "±", "12.7%"]


def test_the_table_shows_what_is_missing():
    made = results(quant("Q4_0", 10, None))
    made.quants[0].speed = None
    assert printed(made).count("–") == 5


def test_results_round_trip(tmp_path):
    made = four()
    path = tmp_path / "compare" / "results.json"
    write_results(made, path)
    assert read_results(path) == made
    assert json.loads(path.read_text())["schema_version"] == 1
    assert [entry.name for entry in path.parent.iterdir()] == ["results.json"]


@pytest.mark.parametrize("content", ["{}", "not json", '{"schema_version": 99}'])
def test_a_file_that_is_no_results_file_is_named(tmp_path, content):
    path = tmp_path / "results.json"
    with pytest.raises(OlpackError, match="no results file"):
        read_results(path)
    path.write_text(content)
    with pytest.raises(OlpackError, match=r"results\.json is not a results file"):
        read_results(path)


@pytest.mark.parametrize(
    ("text", "finish", "flags"),
    [
        ("", "stop", ["empty"]),
        (" \n ", "length", ["empty"]),
        ("def f(): pass", "stop", []),
        ("def f(): pass", "length", ["endless"]),
        ("so: " + "    return x\n" * 20, "length", ["looping"]),
        ("so: " + "    return x\n" * 20 + "    ret", "length", ["looping"]),
        ("x" * 300, "length", ["looping"]),
        ("=" * 300, "stop", []),
        ("\n".join(f"line {number} = {number * number}" for number in range(60)), "length", ["endless"]),
    ],
)
def test_flags_of_an_answer(text, finish, flags):
    assert flags_of(text, finish) == flags


def test_tasks_and_suites_have_their_place():
    made = against_the_unquantized(four())
    made.tasks = [TaskAsked(messages=[], check="python", expected=[], source="tasks.jsonl:1")] * 3
    check = CheckScore(check="python", count=3, mean=2 / 3, standard_error=1 / 3)
    scores = Scores(count=3, mean=2 / 3, standard_error=1 / 3, values=[1, 1, 0], checks=[check])
    made.base.scores = scores.model_copy(update={"mean": 0.0, "standard_error": None})
    for one in made.quants:
        one.scores = scores
        one.suites = [SuiteScore(suite="gsm8k", metric="exact_match, strict-match", value=0.125, standard_error=0.01)]
    text = printed(made)
    assert max(len(line) for line in text.split("Recommended")[0].splitlines()) <= 80 and "…" not in text
    assert "67 ± 33%" in text and "0.12 ± 0.010" in text and text.count("gsm8k") == 1
