"""The report page: what it shows of comparisons made by hand, whole and with little measured, and how it marks differences."""

from __future__ import annotations

import json
import re
from html import unescape
from html.parser import HTMLParser

import pytest
from test_compare_results import TOKENS, against_the_unquantized, four, quant, results, with_choices

from olpack import workspace
from olpack.compare.answer_diff import compare_words, group_answers, split_blocks
from olpack.compare.plot import plot_divergence, plot_loss, plot_quality
from olpack.compare.recommend import set_losses
from olpack.compare.report import render_report, write_outputs, write_report
from olpack.compare.results import Answer, CheckScore, Concurrency, Flag, PromptSpeed, Results, Scores, Spread, SuiteScore, TaskAsked
from olpack.errors import OlpackError

ARABIC = "إليك الدالة المطلوبة، وهي تحصر القيمة بين حدّين:\n\n"
ARABIC += "```python\ndef clamp(value, low, high):\n    # تعليق بالعربية\n    return max(low, min(value, high))\n"
ARABIC += "```\n\nتعمل مع الأعداد كلها."
CODE = "def clamp(value, low, high):\n    if value < low:\n        return low\n    return min(value, high)\n"


@pytest.fixture
def template() -> str:
    return workspace.template_source("report.html.j2")


def scores(*values: float) -> Scores:
    mean = sum(values) / len(values)
    checks = [CheckScore(check="exact", count=len(values), mean=mean, standard_error=0.1)]
    return Scores(count=len(values), mean=mean, standard_error=0.1, checks=checks, values=list(values))


def answered(text: str, **rest) -> Answer:
    return Answer(text=text, finish="stop", tokens=7, **rest)


def with_tasks(made: Results, *values: tuple[float, ...]) -> Results:
    """Scores of each quant, task by task, and an answer to each task that says its value."""
    made.tasks = [
        TaskAsked(messages=[{"role": "user", "content": f"Task {at} <b>"}], check="exact", expected=f"<{at}>", source=f"tasks.jsonl:{at}")
        for at in range(len(values[0]))
    ]
    for one, own in zip(made.quants, values, strict=True):
        one.scores = scores(*own)
        one.task_answers = [answered(f"worth {value}") for value in own]
    return made


def arabic() -> Results:
    """Prompts and answers from right to left, with code in them; one quant in a loop, one that failed, a flag of the whole."""
    made = against_the_unquantized(four())
    system = {"role": "system", "content": "أنت مساعد برمجة. أجب بشيفرة بايثون."}
    asked = "اكتب دالة بايثون `clamp(value, low, high)` تُبقي القيمة بين حدّين.\nأضف مثالًا واحدًا."
    made.prompts = [[system, {"role": "user", "content": asked}], [system, {"role": "user", "content": "Write `clamp`."}]]
    made.quants[0].answers = [answered(ARABIC.replace("كلها", "الصحيحة")), answered(CODE)]
    made.quants[1].answers = [answered(ARABIC), answered(CODE.replace("value < low", "low > value"))]
    made.quants[2].answers = [answered("x = 1\n" * 60, flags=["looping"]), answered("", flags=["empty"])]
    made.quants[3].answers = None
    made.quants[3].flags = [Flag(code="failed", text="llama.cpp ended with signal 11 while it answered.", serious=True)]
    made.flags = [Flag(code="reference", text="The unquantized fine-tune did not fit on the disk.", serious=False)]
    return made


def served() -> Results:
    """Models of a server that are no files of ours."""
    made = with_tasks(
        results(quant("hf.co/bartowski/Qwen2.5-Coder-0.5B-Instruct-GGUF:Q4_K_M", 398, None), quant("qwen3:0.6b", 523, None)), (1, 0, 0.5), (1, 1, 0)
    )
    made.rows, made.name = None, " · ".join(one.quant for one in made.quants)
    for at, one in enumerate(made.quants):
        one.tag, one.file, one.bits_per_weight, one.parameters, one.quantization = one.quant, "", None, "494M", "Q4_K_M"
        one.speed.engine, one.speed.threads, one.speed.load_cold_s, one.speed.gpu_memory_bytes = "Ollama 0.33.0", None, None, 400_000_000
        one.speed.generation_tokens_per_s = Spread.of([100 + 20 * at, 110 + 20 * at])
        one.speed.joules_per_token = Spread.of([0.21, 0.22])
        one.speed.prompt = [
            PromptSpeed(prompt_tokens=length + at, tokens_per_s=Spread.of([2000.0, 2100.0]), first_token_s=Spread.of([0.0312, 0.0391]))
            for length in (128, 512, 2048)
        ]
        one.speed.concurrency = [
            Concurrency(clients=count, tokens_per_s=100.0 * count, first_token_s=Spread.of([0.1, 0.1 * count]), failed=count // 8)
            for count in (1, 2, 4, 8)
        ]
    return made


class Tags(HTMLParser):
    """Fails on a tag that is closed and not open, or open and not closed."""

    def __init__(self, page: str):
        super().__init__()
        self.open: list[str] = []
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_report_needs_nothing_from_outside(tmp_path, template):
    metrics = tmp_path / "metrics.jsonl"
    lines = [{"step": 0, "eval_loss": 2.5}, {"step": 1, "loss": 2.4}, {"step": 2, "loss": 2.2}, {"step": 2, "eval_loss": 2.0}]
    metrics.write_text("\n".join(map(json.dumps, lines)) + '\n{"step": 3, "lo')
    path = tmp_path / "report.html"
    write_report(against_the_unquantized(four()), path, template, metrics, "prompt identical: 42/42")
    page = path.read_bytes().decode("utf-8")
    assert not re.search(r"""(?:src|href|action|data)\s*=\s*["']?\s*(?!#)[^\s"'>]""", page.replace("data-label", ""))
    assert not re.search(r"<(script|link|iframe|object|img|base)\b|@import|url\((?!#)", page)
    names_of_formats = {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    assert set(re.findall(r"https?://[^\s\"'<]+", page)) <= names_of_formats
    assert page.count("<svg") == 3 and "Take Q4_K_M" in page and "2.50" in page and "Prompt identical: 42/42" in page


@pytest.mark.parametrize("make", [four, arabic, served, lambda: with_choices(four()), lambda: with_tasks(arabic(), (1, 1), (0, 1), (0.5, 1), (1, 1))])
def test_every_tag_is_closed(make, template):
    Tags(render_report(make(), template))


PLANTED = {
    "html": "</td></table></div></style><script>alert(1)</script><h1 onclick=alert(1)>x",
    "svg": "</svg><svg onload=alert(1)><image href='https://evil.invalid/x'/><a xlink:href='javascript:alert(1)'>x</a>",
    "link": '<a href="javascript:alert(1)">x</a> javascript:alert(1) [x](javascript:alert(1)) ![x](https://evil.invalid/y.png)',
    "quotes": '" onmouseover="alert(1)" x=\'" style=\'background:url(https://evil.invalid/z)',
    "braces": "{{ 7 * 7 }}{% include '/etc/passwd' %}</title><base href=//evil.invalid>",
    "mathematics": r"$\frac{ $x$ \x $$ _^",
    "markup": "&lt;b&gt; ]]> --> <!-- <meta http-equiv=refresh content='0;url=https://evil.invalid'>",
}


class Elements(HTMLParser):
    """The elements of a page with the names of their attributes, and its text."""

    def __init__(self, page: str):
        super().__init__()
        self.elements: set[tuple[str, tuple[str, ...]]] = set()
        self.links: list[str] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.elements.add((tag, tuple(sorted(name for name, _ in attrs))))
        self.links += [
            value or "" for name, value in attrs if name in ("href", "xlink:href", "src", "srcset", "action", "formaction", "data", "poster")
        ]

    def handle_data(self, data):
        self.text += data


def planted(text: str) -> Results:
    """A comparison with a text in everything that comes from data, models, servers and recipes."""
    made = with_tasks(with_choices(four()), (1,), (0,), (1,), (1,))
    made.name = made.machine.cpu = made.machine.system = made.machine.versions["olpack"] = made.recommendation.reason = text
    made.flags = [Flag(code="reference", text=text, serious=False)]
    made.prompts = [[{"role": "system", "content": text}, {"role": "user", "content": text}], [{"role": text, "content": text}]]
    made.tasks[0].messages[0]["content"] = made.tasks[0].expected = made.tasks[0].source = text
    for number, one in enumerate(made.quants):
        one.quant, one.file, one.speed.engine, one.speed.others = f"{number}{text}", f"{text}.gguf", text, [text]
        one.quantization = one.parameters = text
        one.answers = [answered(f"{text} {number}"), answered(f"```\n{text}\n```", reasoning=text)]
        one.task_answers = [answered(f"{text} is number {number}")]
        one.flags = [Flag(code="failed", text=text, serious=True)]
        one.types = {text: {text: 1}} if number else None
        one.suites = [SuiteScore(suite=text, metric=text, value=0.5, standard_error=None)]
    return made


@pytest.mark.parametrize("text", PLANTED.values(), ids=PLANTED)
def test_nothing_that_is_planted_becomes_part_of_the_page(template, tmp_path, text):
    paths = write_outputs(planted(text), tmp_path, template, identity=text)
    page = paths[3].read_text(encoding="utf-8")
    found, harmless = Elements(page), Elements(render_report(planted("harmless text"), template, identity="harmless text"))
    assert not any(name.startswith("on") for _, names in found.elements for name in names)
    assert found.elements <= harmless.elements | {("del", ("title",)), ("del", ()), ("mark", ())}
    assert all(link.startswith("#") for link in found.links) and " ".join(text.split()) in " ".join(found.text.split())
    Tags(page)
    markdown = paths[2].read_text(encoding="utf-8")
    assert (
        not re.search(r"(?<!\\)[<\[\]`]", markdown)
        and len({line.replace("\\|", "").count("|") for line in markdown.splitlines() if line[:1] == "|"}) == 1
    )


def test_the_page_forbids_the_browser_to_load_or_run_anything(template):
    page = render_report(four(), template)
    policy = re.search(r'<head>\n<meta http-equiv="Content-Security-Policy" content="([^"]*)">', page)
    assert policy and policy[1].startswith("default-src 'none'; style-src 'unsafe-inline';") and "script" not in policy[1]
    own = "<!doctype html><HEAD lang='en'><title>{{ results.name }}</title></HEAD>{{ results.quants[0].tag }}"
    assert render_report(four(), own).startswith("<!doctype html><HEAD lang='en'>\n<meta http-equiv=")


def test_the_report_escapes_what_models_and_people_say(template):
    bad = "</pre><script>alert('x')</script> & <b>"
    made = with_tasks(four(), (1,), (0,), (1,), (1,))
    made.name = made.machine.cpu = made.machine.versions["olpack"] = made.tasks[0].expected = made.recommendation.reason = bad
    made.prompts = [[{"role": "system", "content": bad}, {"role": "user", "content": bad}]]
    made.tasks[0].messages[0]["content"] = bad
    for number, one in enumerate(made.quants):
        one.answers[0].text = one.task_answers[0].text = f"{bad} it is number {number}"
        one.flags = [Flag(code="failed", text=bad, serious=True)]
        one.suites = [SuiteScore(suite=bad, metric=bad, value=0.5, standard_error=None)]
    page = render_report(made, template, identity=bad)
    assert "<script" not in page and "alert(&#39;x&#39;)" in page and "<b>'" not in page
    Tags(page)


def test_the_report_renders_when_little_was_measured(template):
    made = results(quant("Q4_0", 10, None, serious=True))
    made.quants[0].speed = made.quants[0].answers = None
    made.rows, made.prompts = None, []
    page = render_report(made, template)
    for absent in ("How it was measured", "first token", "Prompt identical"):
        assert absent not in page
    assert "No recommendation" in page and "<svg" not in page and "it broke" in page


def test_the_report_says_what_the_fine_tune_gave_and_the_quants_took(template):
    made = against_the_unquantized(four())
    made.flags = [Flag(code="reference", text="it did not fit", serious=False)]
    page = render_report(made, template)
    assert "before the training" in page and "KL divergence" in page and "it did not fit" in page and "± 3.08" in page
    # The base is given Q4_0's answers here, the unquantized fine-tune Q8_0's: their losses against the best are those.
    loss = f"{100 * made.quants[0].loss.relative:+.2f}%"
    assert row_of(page, "base, Q8_0")[1] == row_of(page, "Q4_0")[1] == loss and row_of(page, "unquantized")[1] == "best"
    assert "KL divergence" not in render_report(four(), template)


def test_the_report_says_what_the_importance_matrix_gave_and_which_types_a_budget_chose(template):
    page = render_report(with_choices(four()), template)
    table = re.search(r"What the importance matrix gave.*?</table>", page, re.DOTALL)[0]
    assert all(figure in table for figure in (">3.33<", ">12.50<", ">-73.33%<", "± 2.52%")) and table.count("<tr") == 2
    assert "<dt>Q4_K_M</dt><dd>token_embd q6_K, attn_v q6_K ×6 q5_K ×2, ffn_down q4_K ×8</dd>" in page
    plain = render_report(against_the_unquantized(four()), template)
    assert "importance matrix" not in plain and "budgets chose" not in plain


def row_of(page: str, name: str) -> list[str]:
    """Figures of a file in the table of quality, without their errors."""
    table = next(table for table in re.findall(r"<table.*?</table>", page, re.DOTALL) if ">perplexity<" in table)
    row = re.search(rf'<th scope="row">{name}[^,].*?</tr>', table, re.DOTALL)[0]
    return [re.sub(r'<span class="note">.*?</span>|<[^>]+>', "", cell) for cell in re.findall(r"<td.*?</td>", row, re.DOTALL)]


def test_every_length_and_load_has_its_column(template):
    made = four()
    made.quants[0].speed.prompt = [
        PromptSpeed(prompt_tokens=length, tokens_per_s=Spread.of([900.0, 950.0]), first_token_s=Spread.of([length / 1000, length / 500]))
        for length in (128, 512)
    ]
    page = render_report(made, template)
    assert page.count("<th>128</th>") == page.count("<th>512</th>") == 2
    for figure in ("0.77 s", "0.51–1.02", "0.40 s", "0.050–0.070"):
        assert figure in page
    for title in ("joules", "Several clients", "parameters", "KL divergence"):
        assert title not in page


def test_flags_that_several_quants_have_are_told_once_and_serious_ones_first(template):
    made = four()
    made.quants[0].flags = made.quants[2].flags = [Flag(code="looping", text="1 of 1 answers in a loop", serious=False)]
    made.quants[3].flags = [Flag(code="failed", text="it broke", serious=True)]
    flags = re.findall(r"<li( class=\"serious\")?><b>(.*?)</b> (.*?)</li>", render_report(made, template))
    assert [(names, text) for _, names, text in flags] == [("Q8_0:", "it broke"), ("Q4_0, Q5_K_M:", "1 of 1 answers in a loop")]


def test_models_of_a_server_have_a_page_without_what_only_files_have(template):
    page = render_report(served(), template)
    assert "2 models side by side" in page and "the files lie with the server" in page and "494M" in page and "on the GPU" in page
    for present in ("joules per", "<th>8</th>", "1 without answer", "<th>2048–2049</th>", "Ollama 0.33.0"):
        assert present in page
    for absent in ("bits per", "perplexity<", "KL divergence", "load, cold", "before the training", "Take ", "held-out"):
        assert absent not in page
    assert "hf.co/bartowski" in page and page.count("<svg") == 1 and "tasks solved, %" in page


def test_tasks_are_a_grid_and_the_answers_that_differ_are_open(template):
    page = render_report(with_tasks(four(), (1, 1, 0), (0, 1, 0), (0.5, 1, 0), (1, 1, 0)), template)
    grid = re.search(r'<table class="tasks">.*?<tfoot>', page, re.DOTALL)[0]
    assert (grid.count("✓"), grid.count("✗"), grid.count("50.0%")) == (6, 5, 1)
    assert "1 of 3 were solved by every quant, 1 by none" in page
    (opened,) = re.findall(r"<details open>.*?</details>", page, re.DOTALL)
    assert "Task 0 &lt;b&gt;" in opened and "&lt;0&gt;" in opened and "<b>Q4_0 · Q8_0</b>" in opened and opened.count("worth") == 3


def test_scores_stand_with_their_errors(template):
    made = with_tasks(against_the_unquantized(four()), *[(1, 1, 0)] * 4)
    made.base.scores = scores(0, 0, 0).model_copy(update={"standard_error": None})
    for one in made.quants[1:]:
        one.suites = [SuiteScore(suite="gsm8k", metric="exact_match, strict-match", value=0.125, standard_error=0.01)]
    made.settings["suite_limit"] = 50
    page = render_report(made, template)
    assert row_of(page, "base, Q8_0")[-1] == "0%" and row_of(page, "Q4_0")[-1] == "66.7%" and "± 10.0%" in page
    assert page.count("exact_match, strict-match") == 1 and page.count("0.12<") == 3 and "± 0.010" in page
    assert "only the first 50" in page and "exact, 3 tasks" in page and "<details" not in page


def test_of_many_tasks_those_are_listed_that_the_quants_did_not_all_do_alike(template):
    same = (1,) * 30
    page = render_report(with_tasks(four(), (*same, 0), (*same, 1), (*same, 1), (*same, 1)), template)
    assert "Task 29 &lt;b&gt;" not in page and "Task 30 &lt;b&gt;" in page and "30 of 31 were solved by every quant" in page


def test_equal_answers_stand_once_and_missing_ones_are_named(template):
    made = arabic()
    made.quants[2].answers = made.quants[0].answers
    page = render_report(made, template)
    assert page.count("<b>Q4_0 · Q5_K_M</b>") == 2 and "<b>Q8_0</b> <span>no answer</span>" in page


def test_each_line_has_its_own_direction_and_code_keeps_its_indentation(template):
    blocks = split_blocks([("same", ARABIC)])
    assert [(block.direction, block.code) for block in blocks] == [("auto", False), ("ltr", True), ("auto", False), ("auto", False)]
    assert "    # تعليق بالعربية\n    return max(low" in blocks[1].html
    page = render_report(arabic(), template)
    assert '<div dir="auto">إليك الدالة' in page and '<div dir="ltr" class="code">```python' in page
    assert page.count("أنت مساعد برمجة") == 1  # the system prompt of all


@pytest.mark.parametrize(
    ("text", "starts"),
    [
        ("", [""]),
        (CODE, ["def clamp"]),
        ("مرحبا\ndef f():\n    # نعم\n\n    return 1\n", ["مرحبا", "def f"]),
        ("a\n\n```\nx\n```", ["a", "```"]),
        ("```py\nx\n\ny", ["```py"]),
        ("- `x`\n- ```y``` z\n", ["- `x`", "- ```y"]),
        ("  a\nb", ["  a", "b"]),
        ("\n\nx", ["\n\n", "x"]),
    ],
)
def test_a_block_is_a_line_at_the_margin_and_what_is_indented_below_it(text, starts):
    blocks = split_blocks([("same", text)])
    assert [block.html[: len(start)] for block, start in zip(blocks, starts, strict=True)] == starts
    assert unescape("".join(block.html for block in blocks)) == text


PAIRS = [
    (CODE, CODE),
    (CODE, CODE.replace("value < low", "low > value")),
    (CODE, CODE.replace("        return low\n", "        value = low\n        log(value)\n")),
    (CODE, CODE + "\n\nprint(clamp(1, 2, 3))"),
    (CODE + "\n\nprint(clamp(1, 2, 3))", CODE),
    (CODE, CODE.replace("    return min", "return min")),
    ("one two three four", "one two 3 four <b>"),
    (ARABIC, ARABIC.replace("كلها", "الصحيحة")),
    ("a\n  b\n", "a\n  b"),
    ("", "x"),
    ("x", ""),
    ("", ""),
    ("x = 1\n" * 300, "x = 1\n" * 200 + "y = 2\n" * 20),
]


@pytest.mark.parametrize(("first", "text"), PAIRS)
def test_what_is_the_same_and_what_is_marked_is_the_answer_to_the_letter(first, text):
    pieces = compare_words(first, text)
    if pieces is not None:
        assert "".join(part for kind, part in pieces if kind != "del") == text
        assert bool([kind for kind, _ in pieces if kind != "same"]) == ([*first.splitlines()] != [*text.splitlines()])
    else:
        assert not first or not text
    html = "".join(block.html for block in group_answers(["a", "b"], [answered(first), answered(text)])[-1].blocks)
    assert unescape(re.sub(r"<del.*?</del>|</?mark>", "", html, flags=re.DOTALL)) == text


def test_the_words_that_differ_are_marked():
    assert compare_words("return low", "return high") == [("same", "return "), ("del", "low"), ("mark", "high")]
    said = group_answers(["a", "b"], [answered(CODE), answered(CODE.replace("return low\n", "return low\n        # <done>\n"))])
    assert [one.compared for one in said] == ["first", "marked"]
    assert "        return low\n        <mark># &lt;done&gt;</mark>\n    return min" in said[1].blocks[0].html


def test_what_is_lacking_is_shown_where_it_is_short_and_moves_no_line():
    said = group_answers(["a", "b"], [answered(CODE), answered(CODE.replace("    if value < low:\n        return low\n", ""))])
    (block,) = said[1].blocks
    assert re.sub(r'<del title="    if [^"]*">⋯</del>', "[…]", block.html) == "def clamp(value, low, high):[…]\n    return min(value, high)\n"


def test_another_answer_is_not_marked_all_over():
    said = group_answers(["a", "b"], [answered(CODE), answered("Use numpy.clip instead, please.")])
    assert said[1].compared == "unlike" and "<mark>" not in said[1].blocks[0].html


def test_plots_have_the_colours_of_the_page_and_only_what_was_measured():
    made = against_the_unquantized(four())
    for svg in (plot_quality(made), plot_divergence(made), plot_loss([{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}])):
        assert "currentColor" in svg and "var(--faint)" in svg and not re.search(r"#0[0-9a-f]0[0-9a-f]0[0-9a-f]", svg)
        places = [(float(x), float(y)) for x, y in re.findall(r'<text[^>]* x="([^"]+)" y="([^"]+)"', svg)]
        assert places and all(0 <= x <= 310 and 0 <= y <= 231 for x, y in places)  # points of 4.3 × 3.2 inches
    made.quants[0].divergence.mean = 0.0
    assert ">Q4_0<" not in plot_divergence(made) and ">Q8_0<" in plot_divergence(made)
    assert plot_divergence(four()) is None and plot_quality(results(quant("Q4_0", 10, [12.0, 25.0, 33.0]))) is None


def test_a_template_that_does_not_render_is_named():
    with pytest.raises(OlpackError, match="report's template"):
        render_report(four(), "{{ nothing_like_it }}")


def test_a_score_that_is_no_number_has_no_place_in_the_figures(template):
    made = results(quant("Q4_0", 10, [12.0, 25.0, 33.0]), quant("Q8_0", 18, [12.0, 25.0, 33.0]))
    made.quants[0].perplexity.value, made.quants[0].perplexity.row_nll = None, [None, 1.0, 2.0]
    set_losses(made.quants, TOKENS)
    page = render_report(made, template)
    assert made.quants[0].loss is None and "nan" not in page.lower().replace("contenteditable", "") and "None" not in page
