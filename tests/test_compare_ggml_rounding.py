"""What another rounding than ggml's gave: the paired differences by hand, and where the tables and the page have them."""

from __future__ import annotations

import csv
import io
import math

import pytest
from test_compare_report import scores
from test_compare_results import TOKENS, against_the_unquantized, four, printed, quant

from olpack import workspace
from olpack.compare.cache import Cache, Units
from olpack.compare.divergence import summarize
from olpack.compare.ggml_rounding import by_ggml
from olpack.compare.report import render_report
from olpack.compare.results import Results, read_results, write_results
from olpack.compare.table import to_csv
from olpack.errors import OlpackError

GGML = summarize("F16", [[0.001, 0.004] * 5, [0.01] * 20, [0.02] * 30], [8, 18, 24])


def compared() -> Results:
    """Q4_K_M with searched scales: its rows diverge by a half, a half and three quarters of what ggml's do."""
    made = against_the_unquantized(four())
    one = made.quants[1]
    row_kl = [sum_ * share for sum_, share in zip(GGML.row_kl, (0.5, 0.5, 0.75), strict=True)]
    one.divergence = GGML.model_copy(update={"row_kl": row_kl, "mean": sum(row_kl) / 60, "row_same_top": [9, 18, 27]})
    one.scores = scores(1, 1, 0, 1)
    one.scores.values[3] = None  # cut before its answer began
    known = Units(Cache(None), "q4_k_m-ggml", {})
    known.add("divergence", GGML.model_dump(mode="json"))
    worse = [nll + count * math.log(1.01) for nll, count in zip(one.perplexity.row_nll, TOKENS, strict=True)]
    known.add("perplexity", quant("Q4_K_M", 11, worse).perplexity.model_dump(mode="json"))
    known.add("scores", scores(1, 0, 0, 1).model_dump(mode="json"))
    one.by_ggml = by_ggml(one, "search", known, TOKENS)
    return made


def test_the_differences_by_hand():
    found = compared().quants[1].by_ggml
    # Sums of 25, 200 and 600 millinats in 10, 20 and 30 tokens become 12.5, 100, 450: -262.5 / 60; deviations from -4.375 a token.
    error = math.sqrt(3 / 2 * ((-12.5 + 43.75) ** 2 + (-100 + 87.5) ** 2 + (-150 + 131.25) ** 2)) / 60
    assert 1000 * found.divergence_change.value == pytest.approx(-4.375) and 1000 * found.divergence_change.standard_error == pytest.approx(error)
    # Equal tops: 1, 0 and 3 more, of 60.
    error = math.sqrt(3 / 2 * ((1 - 10 / 15) ** 2 + (20 / 15) ** 2 + 1)) / 60
    assert found.same_top_change.value == pytest.approx(4 / 60) and found.same_top_change.standard_error == pytest.approx(error)
    # Every token's loss is lower by the same: no other row is known to be.
    assert found.perplexity_change.value == pytest.approx(1 / 1.01 - 1) and (found.perplexity_change.standard_error or 0) < 1e-9
    # Three tasks have a score of both: 0, 1 and 0 more.
    assert found.score_change.value == pytest.approx(1 / 3) and found.score_change.standard_error == pytest.approx(1 / 3)


def test_ggmls_figures_stand_below_those_of_what_was_used(tmp_path):
    made = compared()
    text = printed(made)
    tables, notes = text[: text.index("Q4_K_M, search")], text[text.index("Q4_K_M, search") :]
    assert max(len(line) for line in tables.splitlines()) <= 80 and "…" not in tables
    lines = tables.splitlines()
    at = next(number for number, line in enumerate(lines) if "by ggml" in line)
    assert "Q4_K_M" in lines[at - 1] and lines[at].endswith("83.3 ± 3.5%")
    assert notes.startswith("Q4_K_M, search against ggml's rounding: KL mean -4.38 ± 0.79 mnat, same top token +6.7 ± 3.5%, perplexity -0.99")
    row = list(csv.DictReader(io.StringIO(to_csv(made))))[1]
    assert float(row["ggml_kl_divergence"]) == GGML.mean and float(row["divergence_against_ggml"]) == pytest.approx(-0.004375)
    page = render_report(made, workspace.template_source("report.html.j2"))
    assert "ggml&#39;s rounding: 100%" in page and ">68.2% <" in page
    write_results(made, tmp_path / "results.json")
    assert read_results(tmp_path / "results.json") == made
    made.quants[1].by_ggml.divergence.row_kl.pop()
    write_results(made, tmp_path / "results.json")
    with pytest.raises(OlpackError, match="the divergence of Q4_K_M by ggml's rounding does not have 3 rows"):
        read_results(tmp_path / "results.json")


def test_only_what_both_have_is_compared():
    made = compared()
    one = made.quants[1]
    one.perplexity = one.scores = None
    found = by_ggml(one, "search", Units(Cache(None), "tag", {}), TOKENS)
    assert (found.perplexity_change, found.divergence_change, found.score_change) == (None, None, None)
    one.by_ggml = found
    assert "Q4_K_M, search against ggml's rounding: not measured" in printed(made)
