"""README.ar.md: its figures are README.md's or computed, and a browser shows it right to left, with code left to right."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterator
from pathlib import Path

import pytest
from markdown_it import MarkdownIt
from markdown_it.token import Token
from oracle import olpack

ROOT = Path(__file__).parent.parent
ENGLISH, ARABIC = (ROOT / "README.md").read_text(encoding="utf-8"), (ROOT / "README.ar.md").read_text(encoding="utf-8")
MEMORY = ARABIC.partition("\n## كم تحتاج من الذاكرة\n")[2].partition("\n## ")[0]
NUMBER = re.compile(r"(?<![\w.])\d+(?:\.\d+)*(?![\w.]*\d)")
GB = 1e9
_QUANTS = [word for quant in ("Q4_K_M", "Q5_K_M", "Q6_K", "Q8_0") for word in ("--quant", quant)]  # the others are smaller, or F16


def _tables(text: str) -> list[list[list[str]]]:
    """Cells of each table in a text, without its title."""
    tables = re.findall(r"(?:^\|.*\n)+", text + "\n", re.MULTILINE)
    return [[[cell.strip() for cell in line.strip("|").split(" |")] for line in table.splitlines()[2:]] for table in tables]


def test_each_language_links_to_the_other():
    assert "(README.ar.md)" in ENGLISH.split("\n\n")[1] and "(README.md)" in ARABIC.split("\n\n")[2]


def test_the_quants_are_those_of_the_english_page():
    def figures(text: str, title: str) -> list[list[str]]:
        rows = _tables(text.partition(f"\n## {title}\n")[2])[0]
        shown = [[cell.removesuffix(" GB") for cell in cells if NUMBER.match(cell) or cell == "–"] for _, *cells in rows]
        return [[re.sub(r"`|<.*?>", "", name), *cells] for (name, *_), cells in zip(rows, shown, strict=True)]

    assert figures(ARABIC, "أيّ نسخة مكمَّمة تختار") == figures(ENGLISH, "Which quant")


def test_other_figures_are_those_of_the_english_page():
    known = set(NUMBER.findall(ENGLISH))
    found = set(NUMBER.findall(ARABIC.replace(MEMORY, "")))
    assert len(found) > 20 and found <= known, found - known


def test_the_memory_is_what_the_named_command_computes(tmp_path):
    command = re.search(r"`olpack (estimate --params .+?)`", MEMORY)[1]
    found = json.loads(olpack(tmp_path, *command.split(), *_QUANTS, "--json")[1])
    computed = {row["precision"]: row for row in found["transformers"]} | {row["quant"]: row for row in found["llama_cpp"]}
    names = {"FP32": "float32", "FP16 أو BF16": "bfloat16", "INT8": "int8", "NF4 (أربع بتات)": "nf4"}
    table = _tables(MEMORY)[0]
    assert len(table) == 6
    for name, size, rule, weights, total in table:
        row = computed[names.get(name, name)]
        constants = row.get("constants", 0)
        assert float(rule) == 7 * float(size)
        assert weights in (f"{row['weights'] / GB:.1f}", f"{(row['weights'] + constants) / GB:.1f}"), name
        assert total == f"{row['total'] / GB:.1f}", name
    left_out = " ".join(MEMORY.partition("\n- ")[2].partition("\n\n")[0].split())
    training, served = found["training"]["QLoRA"], computed["Q4_K_M"]
    adapter = training["adapter"] + training["gradients"] + training["optimizer"]
    for figure in (served["kv"], training["weights"], training["activations"], training["peak"], training["peak_checkpointing"]):
        assert f"{figure / GB:.1f} " in left_out
    for figure in (served["buffers"], adapter):
        assert f"{figure / GB:.2f} " in left_out
    assert f"{found['parameters']['total'] / GB:.2f} " in MEMORY
    assert f"{found['training']['tokens']} " in left_out and f"{found['training']['rank']} " in left_out


@pytest.mark.parametrize("case", _tables(MEMORY)[1], ids=lambda case: re.match(r"\d+B", case[0])[0])
def test_the_choice_is_what_olpack_recommends(tmp_path, case):
    what, rule, by_rule, computed, choice = case
    size, gpu, context = re.match(r"(\d+B)\D+(\d+)\D+(\d+)", what).groups()
    asked = ("recommend", "--params", size, "--vram", gpu, "--ram", "32", "--context", context, "--json")
    found = json.loads(olpack(tmp_path, *asked, *_QUANTS)[1])
    quants = {row["quant"]: row for row in found["quants"]}
    assert (by_rule, computed) == tuple(f"{quants[rule][key] / GB:.1f}" for key in ("rule_of_thumb_bytes", "total_bytes"))
    assert any(f"chooses {rule}" in note for note in found["notes"])
    assert re.match(r"\w+", choice)[0] == found["best"]["quant"]
    if takes := NUMBER.findall(choice):
        assert takes == [f"{quants[found['best']['quant']]['total_bytes'] / GB:.1f}"]
    else:  # four times the context does not fit
        chosen = quants[rule]
        assert chosen["where"] == "gpu" and chosen["total_bytes"] + 3 * chosen["kv_bytes"] > found["machine"]["gpu_bytes"][0]


def _first_strong(text: str) -> str:
    """The bidirectional class of the first letter, by which GitHub's dir="auto" directs a paragraph; "" without letters."""
    return next((kind for kind in map(unicodedata.bidirectional, text) if kind in ("L", "R", "AL")), "")


def _with_directions(text: str) -> Iterator[tuple[Token, list[str]]]:
    """Tokens of a page, each with the directions of the elements around it."""
    around: list[str] = []
    for token in MarkdownIt("commonmark").enable("table").parse(text):
        if token.type == "html_block":
            for tag in re.findall(r'<div dir="(\w+)"|<(/)div>', token.content):
                around = [*around, tag[0]] if tag[0] else around[:-1]
        yield token, around


def test_text_runs_right_to_left_and_code_left_to_right():
    texts = codes = 0
    before = ""
    for token, around in _with_directions(ARABIC):
        if token.type in ("code_block", "fence"):
            assert around == ["rtl", "ltr"], token.content
            codes += 1
        elif token.type == "inline":
            text = "".join(child.content for child in token.children if child.type in ("text", "code_inline"))
            assert around == ["rtl"], text
            # A cell has the direction of the page, and a picture alone has no letters.
            assert before in ("th_open", "td_open") or _first_strong(text) in ("AL", ""), text
            texts += 1
        before = token.type
    assert codes == 4 and texts > 100


def test_code_in_a_sentence_begins_and_ends_with_a_letter():
    """A mark at its end would move to the other side: `--lang` becomes `lang--`. `<code dir="ltr">` has such code."""
    for token, _ in _with_directions(ARABIC):
        for child in token.children or []:
            assert child.type != "code_inline" or re.fullmatch(r"[A-Za-z].*[A-Za-z0-9]", child.content), child.content
