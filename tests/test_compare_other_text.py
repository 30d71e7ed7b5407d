"""Text outside the user's domain: the file that a recipe names, the rows that texts become, and where tables and page have what was measured."""

from __future__ import annotations

import csv
import io
import os

import pytest
from test_compare_ggml_rounding import GGML, compared
from test_compare_results import four, printed

from olpack import workspace
from olpack.compare.divergence import LogitsWriter
from olpack.compare.other_text import OTHER_TEXTS, other_rows, read_texts
from olpack.compare.report import render_report
from olpack.compare.settings import OTHER_LOGITS_BYTES
from olpack.compare.table import markdown_table, to_csv
from olpack.data.render import Renderer
from olpack.errors import OlpackError
from olpack.model.base import BUILTIN, Base


def test_empty_lines_separate_the_texts_of_a_file(tmp_path):
    path = tmp_path / "other.txt"
    path.write_text("One.\nStill one.\n\n \nTwo ä.\n\n\n", encoding="utf-8")
    assert read_texts(path) == ["One.\nStill one.", "Two ä."]
    path.write_bytes(("ä" * 600_000).encode())  # the limit falls between the two bytes of a character
    assert read_texts(path)[0] == "ä" * (1 << 19)
    path.write_bytes(b"x" + "ä".encode() * 600_000)
    assert read_texts(path)[0] == "x" + "ä" * ((1 << 19) - 1)


@pytest.mark.parametrize(("content", "problem"), [(b" \n\n", "has no text"), (b"\xff\xfe", "cannot be read"), (None, "cannot be read")])
def test_a_file_without_text_is_named(tmp_path, content, problem):
    path = tmp_path / "other.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(OlpackError, match=f"other.txt, which `compare.other_text` names, {problem}") as raised:
        read_texts(path)
    assert "`builtin` or `none`" in raised.value.remedy


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "other.txt")
    with pytest.raises(OlpackError, match="is a pipe"):
        read_texts(tmp_path / "other.txt")


def test_texts_become_rows_that_a_model_can_read():
    base = Base("builtin/tiny-coder", BUILTIN / "tiny-coder")
    renderer = Renderer(base.tokenizer(), base.end_ids())
    rows = other_rows(OTHER_TEXTS, "builtin", renderer, 4096, 38_000)
    assert [row.source for row in rows] == [f"builtin:{number}" for number in range(1, 7)]
    assert all(len(row.ids) > 20 and row.target_count == len(row.ids) - 1 for row in rows)
    assert [len(row.ids) for row in other_rows(OTHER_TEXTS, "builtin", renderer, 12, 38_000)] == [12] * 6
    (cut,) = other_rows(["word " * 100_000], "long.txt", renderer, 4096, 38_000)
    assert len(cut.ids) == len(cut.loss_mask) == 512


@pytest.mark.parametrize("vocabulary", [38_000, 152_000, 262_144])
@pytest.mark.parametrize("count", [1, 2, 9])
def test_the_logits_of_some_long_texts_fit_whatever_the_vocabulary(tmp_path, vocabulary, count):
    base = Base("builtin/tiny-coder", BUILTIN / "tiny-coder")
    rows = other_rows(["word " * 5000] * count, "long.txt", Renderer(base.tokenizer(), base.end_ids()), 4096, vocabulary)
    with LogitsWriter(tmp_path / "logits.f32", [row.target_count for row in rows], vocabulary, OTHER_LOGITS_BYTES) as written:
        assert written.rows >= min(count, 4)


def test_tables_and_page_have_what_quants_lose_elsewhere():
    made = compared()
    made.other_text = "builtin"
    for one in made.quants:
        one.other_text = GGML
    made.quants[1].by_ggml.other_text = GGML.model_copy(update={"mean": 0.01, "standard_error": None})
    text = printed(made)
    tables = text[: text.index("other text: builtin, 60 tokens of 3 texts")]
    assert max(len(line) for line in tables.splitlines()) <= 80 and "…" not in tables
    last = tables[tables.index("other text: KL") :].splitlines()
    assert [line.split()[-3:] for line in last if "Q4_K_M" in line] == [["13.75", "±", "4.72"]]
    assert [line.split() for line in last if "by ggml" in line] == [["by", "ggml", "10.00"]]
    assert "| KL divergence on other text, millinats |" in markdown_table(made)
    row = list(csv.DictReader(io.StringIO(to_csv(made))))[1]
    assert (float(row["other_text_kl_divergence"]), float(row["ggml_other_text_kl_divergence"])) == (GGML.mean, 0.01)
    page = workspace.template_source("report.html.j2")
    assert "KL on other text, millinats" in render_report(made, page) and "other text" not in render_report(four(), page)
    assert "other text" not in printed(four())
