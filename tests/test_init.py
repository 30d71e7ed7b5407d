"""`olpack init`: a recipe that says what the defaults say, wherever base and rows lie."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from olpack import recipe
from olpack.cli import app
from olpack.commands.init import PARAMETERS, TEMPLATES, new_recipe, write_recipe
from olpack.data import load_chats
from olpack.errors import OlpackError
from olpack.model.base import BUILTIN, resolve

ROWS = Path(__file__).parents[1] / "modelfiles/coding-assistant/eval.jsonl"


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    shutil.copy(ROWS, tmp_path / "chats.jsonl")
    return tmp_path


def begin(name: str, *said: str | None) -> Path:
    path = new_recipe(name)
    write_recipe(path, *said)
    return path


@pytest.mark.parametrize("system", [None, 'Say "yes": نعم # and no more\nthan: that', "\x7f\x85\u2028\t" + 300 * "long "])
def test_the_recipe_holds_the_defaults_and_what_was_said(system):
    path = begin("support", "builtin/tiny-coder", "chats.jsonl", system)
    assert path == Path("modelfiles/support/recipe.yaml")
    found = recipe.load(path)
    assert found.modelfile == recipe.Modelfile(system=system, parameters=PARAMETERS)
    plain = recipe.Recipe(base=found.base, data=recipe.Data(train=found.data.train))
    assert found.model_dump(exclude={"modelfile"}) == plain.model_dump(exclude={"modelfile"})
    assert len(load_chats(found.folder / found.data.train)) == len(ROWS.read_text("utf-8").splitlines())


def test_a_base_and_rows_are_named_from_where_the_recipe_is(here):
    shutil.copytree(BUILTIN / "tiny-coder", here / "models/mine")
    found = recipe.load(begin("near", "models/mine", "chats.jsonl"))
    assert resolve(found.base, relative_to=found.folder).config["model_type"] == "qwen3"
    found = recipe.load(begin("far", str(here / "models/mine"), str(here / "chats.jsonl")))
    assert (found.base, found.data.train) == (str(here / "models/mine"), str(here / "chats.jsonl"))
    found = recipe.load(begin("hub", "Qwen/Qwen3-0.6B", "HuggingFaceH4/no_robots"))
    assert (found.base, found.data.train.hub) == ("Qwen/Qwen3-0.6B", "HuggingFaceH4/no_robots")


@pytest.mark.parametrize(
    ("name", "base", "train", "said"),
    [
        ("support", "builtin/tiny-coder", "there/are-none.jsonl", "no there/are-none.jsonl here"),
        ("support", "builtin/tiny-coder", "./rows", "no ./rows here"),
        ("support", "builtin/tiny-coder", "data/rows.jsonl.gz", "no data/rows.jsonl.gz here"),
        ("support", "builtin/tiny-coder", "x" * 300, "no xxx"),
        ("support", "../model", "chats.jsonl", "no folder ../model here"),
        ("support", "~nobody-of-this-name/model", "chats.jsonl", "no folder ~nobody"),
        ("support", "chats.jsonl", "chats.jsonl", "no folder chats.jsonl here"),
        ("team/support", "builtin/tiny-coder", "chats.jsonl", "cannot be the name of a package"),
        ("no good", "builtin/tiny-coder", "chats.jsonl", "no good"),
    ],
)
def test_what_cannot_be_is_said_and_nothing_is_written(name, base, train, said):
    with pytest.raises(OlpackError, match=said):
        begin(name, base, train)
    assert not Path("modelfiles").exists()


def test_a_recipe_that_is_there_stays():
    path = begin("support", "builtin/tiny-coder", "chats.jsonl")
    path.write_text("mine")
    with pytest.raises(OlpackError, match="is there already"):
        begin("support", "builtin/tiny-coder", "chats.jsonl")
    assert path.read_text() == "mine"


def test_a_modelfiles_folder_elsewhere_is_named_from_there(here):
    (here / "real/deep/modelfiles").mkdir(parents=True)
    (here / "modelfiles").symlink_to("real/deep/modelfiles")
    found = recipe.load(begin("support", "builtin/tiny-coder", "chats.jsonl"))
    assert (found.folder / found.data.train).is_file()


def test_a_modelfiles_that_is_a_file_is_an_error(here):
    (here / "modelfiles").write_text("")
    with pytest.raises(OlpackError, match="cannot be made"):
        begin("support", "builtin/tiny-coder", "chats.jsonl")


def test_an_own_template_that_is_wrong_is_an_error_with_its_line(here):
    (here / "templates").mkdir()
    (here / "templates/recipe.yaml.j2").write_text("base: x\n{% if %}")
    with pytest.raises(OlpackError, match=r"The recipe's template has an error in line 2.*templates/recipe\.yaml\.j2"):
        begin("support", "builtin/tiny-coder", "chats.jsonl")
    assert not Path("modelfiles").exists()


@pytest.mark.parametrize(("train", "system"), [("chats.jsonl", None), ("me/rows", "أنت مساعد: أجب # بإيجاز")])
def test_recipes_in_both_languages_are_the_same_data(train, system):
    texts = {lang: begin(f"in-{lang}", "builtin/tiny-coder", train, system, lang).read_text(encoding="utf-8") for lang in TEMPLATES}
    assert list(texts) == ["en", "ar"]
    assert yaml.safe_load(texts["ar"]) == yaml.safe_load(texts["en"])
    keys, others = (set(re.findall(r"^ *(?:# )?([a-z_]+): ", text, re.MULTILINE)) for text in texts.values())
    assert keys == others >= {"num_ctx", "export", "compare"}  # those that are commented out, too


def test_no_line_of_the_arabic_recipe_mixes_two_directions_in_a_sentence():
    lines = begin("support", "builtin/tiny-coder", "chats.jsonl", None, "ar").read_text(encoding="utf-8").splitlines()
    sentences = [line for line in lines if re.search("[\u0621-\u064a]", line) and not line.startswith("  # system: ")]
    assert len(sentences) > 15
    for line in sentences:
        assert re.match(r" *# ", line) and not re.search("[A-Za-z]", line), line


def test_an_unknown_language_is_one_error_and_nothing_is_written(here):
    result = CliRunner().invoke(app, ["init", "support", "--base", "builtin/tiny-coder", "--train", "chats.jsonl", "--lang", "fr"])
    assert result.exit_code == 2 and "'fr' is not a language of recipes. The languages are en, ar." in " ".join(result.stderr.split())
    assert not (here / "modelfiles").exists()


def test_without_a_terminal_it_asks_nothing():
    result = CliRunner().invoke(app, ["init", "support", "--base", "builtin/tiny-coder"])
    assert isinstance(result.exception, OlpackError) and "--train chats.jsonl" in str(result.exception)
    result = CliRunner().invoke(app, ["init", "support", "--base", "builtin/tiny-coder", "--train", "chats.jsonl"])
    assert result.exit_code == 0 and result.stdout == "modelfiles/support/recipe.yaml\n"
