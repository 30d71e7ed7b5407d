"""`olpack data check` and `olpack data show`, as they are typed; sources in a recipe, and what they do to the stages' keys."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from oracle import olpack

from olpack import recipe
from olpack.data import Chat, HubSet, Renderer, Source, load_chats
from olpack.data.chats import times
from olpack.data.check import histogram, percentile
from olpack.data.show import pieces
from olpack.errors import OlpackError
from olpack.model.base import BUILTIN, Base
from olpack.stages.build import Build
from olpack.stages.order import stage_of
from olpack.stages.prompts import held_out_requests, questions

RECIPE = "base: builtin/tiny-coder\ndata: {train: train.jsonl, eval: eval.jsonl, max_length: 64}\n"


def chat(asked: str, answer: str) -> str:
    return json.dumps({"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]}, ensure_ascii=False)


def package(root: Path, train: list[str], held_out: list[str], text: str = RECIPE) -> Path:
    folder = root / "modelfiles/support"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.yaml").write_text(text)
    (folder / "train.jsonl").write_text("\n".join(train) + "\n", encoding="utf-8", errors="surrogateescape")
    (folder / "eval.jsonl").write_text("\n".join(held_out) + "\n", encoding="utf-8")
    return root


GOOD = [chat(f"q{number}", "a" * number) for number in range(1, 20)]


def test_all_problems_are_listed_and_the_exit_code_says_so(tmp_path):
    broken, unfit = ["{"] * 12, [chat("q", " "), chat("long", "word " * 100)]
    train = [*GOOD, *broken, *unfit, chat("q1", "a"), chat("q1", "another"), chat("q", "<|im_end|>"), '{"text": "\udcff"}']
    package(tmp_path, train, [chat("e", "a"), chat("q3", "aaa"), '{"messages": [{"role": "user", "content": "q"}]}'])
    code, printed, _ = olpack(tmp_path, "data", "check", "support", "--json")
    assert code == 1
    found = json.loads(printed)
    by_kind = {}
    for finding in found["findings"]:
        by_kind.setdefault((finding["kind"], finding["fails"]), []).append(finding["place"])
    assert by_kind == {
        ("unreadable", True): [f"train.jsonl:{number}" for number in range(20, 32)] + ["train.jsonl:37"],
        ("empty answer", True): ["train.jsonl:32"],
        ("too long", True): ["train.jsonl:33"],
        ("leakage", True): ["eval.jsonl:2"],
        ("nothing to learn", True): ["eval.jsonl:3"],
        ("duplicate", False): ["train.jsonl:34"],
        ("other answer", False): ["train.jsonl:35"],
        ("special token", False): ["train.jsonl:36"],
    }
    assert found["fails"] and found["train"]["sources"][0]["chats"] == 23
    code, printed, _ = olpack(tmp_path, "data", "check", "support")
    assert code == 1
    assert "train.jsonl:20: Not JSON" in printed and "eval.jsonl:2: It is held out, and also in the training data (train.jsonl:3)." in printed
    assert "train.jsonl:34: warning: It is the same as train.jsonl:1." in printed
    assert "17 problems that a build refuses, 3 warnings" in printed
    assert re.search(r"up to 128 +█+ +1 too long", printed)
    with pytest.raises(OlpackError) as refused:
        load_chats(tmp_path / "modelfiles/support/train.jsonl")
    assert str(refused.value).count("not JSON") == 10 and "and 4 more (`olpack data check` lists all)" in str(refused.value)


def test_sound_data_passes_and_is_shown_in_figures(tmp_path):
    package(tmp_path, GOOD, [chat("e", "a")])
    code, printed, _ = olpack(tmp_path, "data", "check", "support", "--json")
    found = json.loads(printed)
    assert code == 0 and found["findings"] == []
    (part,) = found["train"]["sources"]
    assert (part["name"], part["form"], part["chats"], part["rows"], part["seen"]) == ("train.jsonl", "chat", 19, 19, 19)
    assert 0 < part["learned"] < part["tokens"]
    assert sum(count for _, count in found["train"]["histogram"]) == 19
    assert found["train"]["answers_per_chat"] == {"1": 19}
    code, printed, _ = olpack(tmp_path, "data", "check", "support")
    assert code == 0 and "no problem, 0 warnings" in printed


def test_a_file_with_no_recipe(tmp_path):
    (tmp_path / "rows.csv").write_text('text\n"[red]one[/red]\nline"\ntwo\n')
    code, printed, _ = olpack(tmp_path, "data", "check", "rows.csv", "--base", "builtin/tiny-coder")
    assert code == 0 and "rows.csv" in printed and "text" in printed
    code, printed, _ = olpack(tmp_path, "data", "show", "rows.csv", "1", "--base", "builtin/tiny-coder")
    assert code == 0 and printed.endswith("⟦[red]one[/red]\nline<|im_end|>⟧\n")
    shutil.copytree(BUILTIN / "tiny-coder", tmp_path / "base", ignore=shutil.ignore_patterns("*.safetensors"))
    assert olpack(tmp_path, "data", "show", "rows.csv", "1", "--base", "base")[:2] == (0, printed)  # without its weights
    code, _, said = olpack(tmp_path, "data", "check", "rows.csv")
    assert code == 2 and "--base" in said
    code, _, said = olpack(tmp_path, "data", "check", "coding-assistant", "--base", "base")
    assert code == 2 and "there is no file coding-assistant" in " ".join(said.split())


def test_roles_in_an_order_that_the_template_refuses(tmp_path):
    shutil.copytree(BUILTIN / "tiny-coder", tmp_path / "base")
    (tmp_path / "base/chat_template.jinja").write_text(
        "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Roles must alternate') }}{% endif %}"
        "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    system = json.dumps({"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]})
    (tmp_path / "rows.jsonl").write_text(f"{GOOD[0]}\n{system}\n{GOOD[1]}\n")
    code, printed, _ = olpack(tmp_path, "data", "check", "rows.jsonl", "--base", "base")
    assert code == 1 and "rows.jsonl:2: The base's chat template refuses this conversation: Roles must alternate." in printed
    assert "1 problem that a build refuses" in printed


def test_show_prints_a_row_whole(tmp_path):
    answer = "\tdef f():  # \u200fمرحبا [bold]\r\n\t\treturn '👩‍💻'"
    package(tmp_path, [*GOOD, chat("[link]", answer)], [chat("e", "a")])
    code, printed, _ = olpack(tmp_path, "data", "show", "support", "20")
    assert code == 0
    assert printed.startswith("train row 20, train.jsonl:20: ") and "target tokens (" in printed
    shown = answer.replace("\r", "␍")
    assert printed.endswith(f"<|im_start|>user\n[link]<|im_end|>\n<|im_start|>assistant\n⟦{shown}<|im_end|>⟧\n")
    code, printed, _ = olpack(tmp_path, "data", "show", "support", "1", "--eval")
    assert code == 0 and "eval row 1, eval.jsonl:1" in printed
    code, _, said = olpack(tmp_path, "data", "show", "support", "21")
    assert code == 1 and "There is no row 21: the training side has 20." in said


def test_on_a_terminal_colours_mark_target_tokens(tmp_path, monkeypatch):
    package(tmp_path, [chat("[red]q", "a\tمرحبا\u200f\r\x1b[2Jb")], [chat("e", "a")])
    monkeypatch.setenv("FORCE_COLOR", "1")
    code, printed, _ = olpack(tmp_path, "data", "show", "support", "1")
    shown = printed.partition("\n\n")[2]
    assert code == 0 and "\x1b[32ma\tمرحبا\u200f␍␛[2Jb\x1b[0m" in shown and "⟦" not in shown
    assert re.sub(r"\x1b\[[\d;]*m", "", shown).startswith("<|im_start|>user\n[red]q<|im_end|>\n")


@pytest.mark.parametrize("terminal", [True, False])
def test_without_colours_control_codes_are_pictures(tmp_path, monkeypatch, terminal):
    """A pipe may end in a terminal: `olpack data show support 1 | head`."""
    package(tmp_path, [chat("q", "a\tb\r\x1b[2J\x9bc")], [chat("e", "a")])
    if terminal:
        monkeypatch.setenv("FORCE_COLOR", "1")
        monkeypatch.setenv("NO_COLOR", "1")
    code, printed, _ = olpack(tmp_path, "data", "show", "support", "1")
    assert code == 0 and "⟦a\tb␍␛[2J" in printed and "\x9b" not in printed and "\x1b" not in printed


def test_rows_that_a_weight_leaves_out_are_no_problem_here_and_none_in_a_build(tmp_path):
    weighted = RECIPE.replace("train.jsonl", "{file: train.jsonl, weight: WEIGHT}")
    root = package(tmp_path, [*GOOD, *(chat(f"long {number}", "word " * 100) for number in range(20))], [chat("e", "a")])
    rows = load_chats(root / "modelfiles/support/train.jsonl")
    lines = (root / "modelfiles/support/train.jsonl").read_text().splitlines()
    seen = [times(replace(row, weight=0.5)) for row in rows]
    assert 0 < sum(seen[:19]) < 19 and 0 < sum(seen[19:]) < 20
    kept = [line for number, (line, often) in enumerate(zip(lines, seen, strict=True)) if number < 19 or not often]

    def checked(train: list[str], weight: str) -> dict:
        package(root, train, [chat("e", "a")], weighted.replace("WEIGHT", weight))
        return json.loads(olpack(root, "data", "check", "support", "--json")[1])

    def train_rows() -> list:
        return Build(recipe.load(root / "modelfiles/support/recipe.yaml")).rows[0]

    assert len(checked(lines, "0.5")["findings"]) == sum(seen[19:])
    with pytest.raises(OlpackError, match=f"{sum(seen[19:])} rows are longer"):
        train_rows()
    found = checked(kept, "0.5")
    assert not found["fails"] and found["train"]["sources"][0]["seen"] == len(train_rows()) == sum(seen[:19])
    found = checked([line for line, often in zip(lines, seen, strict=True) if not often], "0.5")
    assert [finding["text"] for finding in found["findings"]] == ["No row is left at this `weight`."]
    with pytest.raises(OlpackError, match="no row left at this weight"):
        train_rows()


@pytest.mark.parametrize("sides", ["train: train.jsonl, eval: eval.jsonl", "train: train.jsonl, eval_share: 0.3"])
def test_one_build_parses_each_source_once(tmp_path, monkeypatch, sides):
    root = package(tmp_path, GOOD, [chat("e", "a")], RECIPE.replace("train: train.jsonl, eval: eval.jsonl", sides))
    build = Build(recipe.load(root / "modelfiles/support/recipe.yaml"))
    parsed, read = [], Source.read
    monkeypatch.setattr(Source, "read", lambda source: parsed.append(source.label) or read(source))
    train, held_out = build.rows
    assert len(train) + len(held_out) == (20 if "eval:" in sides else 19)
    assert len(held_out_requests(build)) == len(held_out) and len(questions(build)) == min(3, len(held_out))
    assert sorted(parsed) == (["eval.jsonl", "train.jsonl"] if "eval:" in sides else ["train.jsonl"])


def test_held_out_rows_are_seen_once_and_an_empty_source_is_a_problem(tmp_path):
    both = "train: train.jsonl, eval: eval.jsonl"
    package(tmp_path, GOOD, [""], RECIPE.replace(both, "train: {file: train.jsonl, weight: 3}, eval_share: 0.3"))
    (part,) = json.loads(olpack(tmp_path, "data", "check", "support", "--json")[1])["eval"]["sources"]
    assert part["seen"] == part["rows"] > 0
    package(tmp_path, GOOD, [""], RECIPE.replace(both, "train: [train.jsonl, eval.jsonl]"))
    code, printed, _ = olpack(tmp_path, "data", "check", "support")
    assert code == 1 and "eval.jsonl: It is empty." in printed


def test_the_pieces_of_a_row_are_the_row():
    base = Base("builtin/tiny-coder", BUILTIN / "tiny-coder")
    renderer = Renderer(base.tokenizer(), base.end_ids())
    messages = [{"role": "user", "content": "👩‍💻"}, {"role": "assistant", "content": "\n\nمرحبا"}]
    (row,) = renderer.rows(Chat(messages, "x:1"))
    found = list(pieces(row, renderer))
    assert "".join(text for text, *_ in found) == row.text
    assert [text for text, is_target, _ in found if is_target] == ["\n\nمرحبا", "<|im_end|>"]
    assert [text for text, _, special in found if special] == ["<|im_start|>", "<|im_end|>", "<|im_start|>", "<|im_end|>"]


def test_percentiles_and_bins():
    assert [percentile(list(range(1, 101)), share) for share in (0.5, 0.95, 1)] == [50, 95, 100]
    assert percentile([], 0.5) == 0 and histogram([]) == []
    assert histogram([3, 16, 17, 100]) == [(16, 2), (32, 1), (64, 0), (128, 1)]


# -- sources in the recipe ----------------------------------------------------------------------------------------------------------------


def written(folder: Path, data: str) -> Path:
    path = folder / "support/recipe.yaml"
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"base: builtin/tiny-coder\ndata:\n{data}")
    return path


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ("  train: {file: a.jsonl, wieght: 2}\n", "line 3: unknown key 'data.train.wieght'. Did you mean 'weight'?"),
        ("  train:\n  - a.jsonl\n  - {file: b.jsonl, weight: many}\n", "line 5: 'data.train.1.weight'"),
        ("  train: {weight: 2}\n", "line 3: 'data.train': a source is either a `file` or a `hub` data set."),
        ("  train: {file: a.jsonl, split: test}\n", "split goes with a `hub` data set"),
        ("  train: {hub: user/set}\n  eval: {file: a.jsonl, weight: 2}\n", "line 4: 'data.eval': weight goes with data.train"),
        ("  train: 3\n", "line 3: 'data.train': a source is a file, {file: …} or {hub: …}, or a list of these, not 3."),
        ("  train: null\n", "data.train is missing: it names the training rows."),
        ("  train: [[a.jsonl]]\n", "line 3: 'data.train.0': a source is a file, {file: …} or {hub: …}, not ['a.jsonl']."),
        ('  train: ""\n', "line 3: 'data.train'"),
        ('  train: [a.jsonl, ""]\n', "line 3: 'data.train.1'"),
        ('  train: a.jsonl\n  eval: ""\n', "line 4: 'data.eval'"),
        ('  train: {file: ""}\n', "line 3: 'data.train.file'"),
        ('  train: {hub: ""}\n', "line 3: 'data.train.hub'"),
        ("  train: []\n", "line 3: 'data.train'"),
        ("  train: a.jsonl\n  form: chats\n", "line 4: 'data.form'"),
        ("  train: {file: a.jsonl, form: chats}\n", "line 3: 'data.train.form'"),
    ],
)
def test_a_mistake_in_a_source_is_named_with_its_line(tmp_path, data, said):
    with pytest.raises(OlpackError) as caught:
        recipe.load(written(tmp_path, data))
    assert said in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_sources_of_each_kind(tmp_path):
    sources = '  - a.jsonl\n  - {file: texts, form: text, weight: 0.5}\n  - {hub: user/set, split: "train[:10]", revision: v1, subset: ar}\n'
    asked = recipe.load(written(tmp_path, f"  train:\n{sources}  form: alpaca\n"))
    first, second, third = Build(asked).sources("train")
    assert (first.place, first.form, first.weight) == (tmp_path / "support/a.jsonl", "alpaca", 1.0)
    assert (second.place, second.form, second.weight) == (tmp_path / "support/texts", "text", 0.5)
    assert (third.place, third.form) == (HubSet("user/set", "train[:10]", "v1", "ar"), "alpaca")
    assert Build(asked).sources("eval") == []
    build = Build(asked)
    assert build.sources("train")[2].place is build.sources("train")[2].place  # one commit for the key and for the rows
    assert asked.settings()["data.train"][1]["weight"] == 0.5 and asked.origin("data.train") == "recipe.yaml:3"


def test_files_of_one_name_are_told_apart(tmp_path):
    data = "{train: [train.jsonl, more/train.jsonl], eval: eval.jsonl}"
    package(tmp_path, GOOD[:1], [chat("e", "a")], f"base: builtin/tiny-coder\ndata: {data}\n")
    (tmp_path / "modelfiles/support/more").mkdir()
    (tmp_path / "modelfiles/support/more/train.jsonl").write_text(GOOD[1])
    code, printed, _ = olpack(tmp_path, "data", "check", "support", "--json")
    found = json.loads(printed)
    assert code == 0 and [part["name"] for part in found["train"]["sources"]] == ["train.jsonl", "more/train.jsonl"]


def test_a_plan_prints_names_as_they_are(tmp_path):
    package(tmp_path, GOOD, [chat("e", "a")])
    code, printed, _ = olpack(tmp_path, "plan", "support", "--out", "[bold]")
    assert code == 0 and "builds into [bold]/support" in printed


def test_held_out_texts_and_tool_calls_are_no_questions_and_answers(tmp_path):
    from olpack.stages.prompts import examples, questions

    call = {"role": "assistant", "tool_calls": [{"name": "f", "arguments": {}}]}
    asked = {"role": "user", "content": "q"}
    package(tmp_path, GOOD, [json.dumps({"messages": [asked, call, {"role": "tool", "content": "1"}]}), chat("e", "a")])
    (tmp_path / "modelfiles/support/texts.csv").write_text("text\nplain\n")
    data = "base: builtin/tiny-coder\ndata: {train: train.jsonl, eval: [texts.csv, eval.jsonl]}\n"
    path = tmp_path / "modelfiles/support/recipe.yaml"
    path.write_text(data)
    build = Build(recipe.load(path))
    assert questions(build) == [[asked], [{"role": "user", "content": "e"}]]
    assert examples(build) == [("e", "a")]
    path.write_text(data.replace(", eval.jsonl]", "]"))
    assert questions(Build(recipe.load(path))) == []


def test_what_decides_the_rows_decides_the_key(tmp_path):
    def key(data: str, stage: str = "train") -> str:
        package(tmp_path, GOOD, [chat("e", "a")], f"base: builtin/tiny-coder\ndata: {data}\n")
        return stage_of(stage).all_inputs(Build(recipe.load(tmp_path / "modelfiles/support/recipe.yaml")))

    plain = key("{train: train.jsonl, eval: eval.jsonl}")
    assert key("{train: {file: train.jsonl}, eval: [eval.jsonl]}") == plain
    others = [
        "{train: {file: train.jsonl, weight: 2}, eval: eval.jsonl}",
        "{train: [train.jsonl, eval.jsonl], eval: eval.jsonl}",
        "{train: train.jsonl}",
        "{train: {file: train.jsonl, form: chat}, eval: eval.jsonl}",
        "{train: train.jsonl, eval: eval.jsonl, learn: last}",
    ]
    keys = [json.dumps(key(other), sort_keys=True) for other in others]
    assert len({*keys, json.dumps(plain, sort_keys=True)}) == 6
    folder = tmp_path / "modelfiles/support/more"
    folder.mkdir()
    (folder / "a.jsonl").write_text(GOOD[0])
    one = key("{train: [train.jsonl, more], eval: eval.jsonl}")
    (folder / "b.jsonl").write_text(GOOD[1])
    assert key("{train: [train.jsonl, more], eval: eval.jsonl}") != one
