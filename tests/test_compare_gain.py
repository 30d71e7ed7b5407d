"""The share of the fine-tune's gain that a quant keeps: by hand, against repeated draws, and where the tables and the page have it."""

from __future__ import annotations

import csv
import io
import math

import numpy as np
import pytest
from test_compare_report import scores, with_tasks
from test_compare_results import TOKENS, four, printed, quant, results

from olpack import workspace
from olpack.compare.gain import gain_kept, set_gains
from olpack.compare.perplexity import perplexity
from olpack.compare.report import render_report
from olpack.compare.results import BaseResult, Perplexity, Reference, Results, read_results, write_results
from olpack.compare.table import markdown_table, to_csv

BASE, TUNED, OWN = [40.0, 50.0, 90.0], [20.0, 30.0, 30.0], [22.0, 32.0, 38.0]


def measured(nll: list[float]) -> Perplexity:
    value, error = perplexity(nll, TOKENS)
    return Perplexity(value=value, standard_error=error, row_nll=nll, same_tokens_rows=3)


def compared(base: list[float] = BASE, own: list[float] = OWN) -> Results:
    """Two quants: one that loses what `own` shows, and one like the unquantized fine-tune."""
    made = results(quant("Q4_0", 10, own), quant("Q8_0", 18, TUNED))
    made.base, made.reference = BaseResult(quant="Q8_0", perplexity=measured(base)), Reference(quant="F16", perplexity=measured(TUNED))
    set_gains(made)
    return made


def test_the_share_of_the_gain_by_hand():
    # Gains of the rows 20, 20, 60 of 10, 20, 30 tokens; kept are 18, 18, 52: 88 of 100. Deviations from 0.88 of each row's gain: 0.4, 0.4, -0.8.
    kept = gain_kept(BASE, TUNED, OWN, TOKENS)
    assert kept.value == pytest.approx(0.88) and kept.standard_error == pytest.approx(math.sqrt(3 / 2 * (0.16 + 0.16 + 0.64)) / 100)
    # 100 nats of 60 tokens; deviations 20 - 100/6, 20 - 200/6, 60 - 300/6.
    error = math.sqrt(3 / 2 * ((20 / 6) ** 2 + (80 / 6) ** 2 + 10**2)) / 60
    assert (kept.gain, kept.gain_standard_error, kept.reason) == (pytest.approx(100 / 60), pytest.approx(error), "")
    # The whole gain in each row: how far it would differ in others is unknown.
    whole = gain_kept(BASE, TUNED, TUNED, TOKENS)
    assert whole.value == 1 and whole.standard_error is None
    assert gain_kept([4.0], [2.0], [3.0], [2]).value == 0.5


def test_its_standard_error_is_the_spread_of_repeated_draws():
    draw = np.random.default_rng(0)

    def drawn(rows: int = 60):
        tokens = draw.integers(5, 60, rows)
        tuned = tokens * draw.normal(2, 0.3, rows)
        gain = tokens * draw.normal(0.8, 0.3, rows)
        return gain_kept(tuned + gain, tuned, tuned + gain * draw.normal(0.1, 0.05, rows) + draw.normal(0, 0.5, rows), tokens)

    many = [drawn() for _ in range(400)]
    assert np.mean([one.value for one in many]) == pytest.approx(0.9, abs=0.005)
    assert np.mean([one.standard_error for one in many]) == pytest.approx(np.std([one.value for one in many]), rel=0.1)


@pytest.mark.parametrize(
    ("base", "reason"),
    [
        ([20.0, 29.0, 30.0], "the unquantized fine-tune is no better than the base"),
        (TUNED, "the unquantized fine-tune is no better than the base"),
        ([30.0, 20.0, 60.0], "the fine-tune's gain is within 2 standard errors of none"),
    ],
)
def test_there_is_no_share_of_a_gain_that_is_none(base, reason):
    made = compared(base)
    assert [(one.gain_kept.value, one.gain_kept.reason) for one in made.quants] == [(None, reason)] * 2
    text = printed(made)
    assert f"are not reported, because {reason}" in text and "gain kept" not in text
    assert "gain kept" not in markdown_table(made) and "gain of the fine-tune kept" not in render_report(made, page())
    assert to_csv(made).count("gain_kept") == 2  # the columns are there, and empty


def page() -> str:
    return workspace.template_source("report.html.j2")


def test_tables_and_page_have_the_shares(tmp_path):
    made = with_tasks(compared(), (1, 1, 1, 0, 0), (1, 1, 1, 1, 0))
    made.base.scores, made.reference.scores = scores(0, 0, 0, 0, 0), scores(1, 1, 1, 1, 0)
    set_gains(made)
    text = printed(made)
    assert max(len(line) for line in text.split("Recommended")[0].splitlines()) <= 80 and "…" not in text
    rows = [line for line in text.splitlines() if "Q4_0" in line]
    assert rows[2].split() == ["Q4_0", "88.0", "±", "1.2%", "75.0", "±", "24.2%"]
    assert "gain of the fine-tune in held-out loss: 1.67 ± 0.35 nats a token\n" in text
    assert "gain of the fine-tune in task score: 0.80 ± 0.20\n" in text
    unquantized = next(line for line in text.splitlines() if "unquantized  " in line)
    assert unquantized.endswith("80 ± 10%")
    table = markdown_table(made)
    assert "| gain kept in held-out loss | gain kept in task score |" in table and "| 88.0 ± 1.2% | 75.0 ± 24.2% |" in table
    first, second = csv.DictReader(io.StringIO(to_csv(made)))
    assert float(first["gain_kept"]) == pytest.approx(0.88) and float(first["task_gain_kept"]) == 0.75 and second["gain_kept_standard_error"] == ""
    html = render_report(made, page())
    assert "gain of the fine-tune kept" in html and ">88.0% <" in html and ">75.0% <" in html
    write_results(made, tmp_path / "results.json")
    assert read_results(tmp_path / "results.json") == made


def test_tasks_that_one_of_the_three_did_not_answer_are_left_out():
    made = with_tasks(compared(), (1, 1, 0, 1), (1, 1, 1, 1))
    made.base.scores, made.reference.scores = scores(0, 0, 0, 0), scores(1, 1, 1, 1)
    made.base.scores.values[3] = None
    made.reference.scores.values[0] = None
    set_gains(made)
    assert [one.task_gain_kept.value for one in made.quants] == [0.5, 1]


def test_without_a_base_or_a_finite_loss_there_is_no_share():
    made = compared()
    made.quants[0].perplexity.row_nll[1] = None
    set_gains(made)
    assert made.quants[0].gain_kept is None and made.quants[1].gain_kept.value == 1
    made.base = None
    set_gains(made)
    assert [one.gain_kept for one in made.quants] == [None, None]
    assert "gain" not in printed(four())
