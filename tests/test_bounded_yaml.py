"""YAML that is small to write and endless to read ends in one sentence, before anything is made of it."""

from __future__ import annotations

import pytest

from olpack.errors import OlpackError
from olpack.model.base import Base
from olpack.recipe import load

GOOD = "base: builtin/tiny-coder\ndata: {train: train.jsonl}\n"
BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{name}: &{name} [{','.join(['*' + inner] * 9)}]\n" for inner, name in zip("abcdef", "bcdefg", strict=True)
)
MERGED = "a: &a {x: 1}\n" + "".join(
    f"{name}: &{name} {{<<: [{','.join(['*' + inner] * 9)}]}}\n" for inner, name in zip("abcdef", "bcdefg", strict=True)
)
LONG_TEXT = f"a: &a {'x' * 1000}\nb: [{','.join(['*a'] * 2000)}]\n"
CHAIN = "a0: &a0 [1]\n" + "".join(f"a{n + 1}: &a{n + 1} [*a{n}]\n" for n in range(100))

ENDLESS = {
    "aliases of aliases": (BOMB, "this is too large"),
    "merged aliases": (MERGED, "this is too large"),
    "a long text again and again": (LONG_TEXT, "this is too large"),
    "a list inside of itself": ("a: &a [1, *a]\n", "line 1: *a refers to a value that contains it"),
    "levels": ("a: " + "[" * 400 + "]" * 400 + "\n", "this is nested too deep"),
    "levels by aliases": (CHAIN, "this is nested too deep"),
}


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "assistant" / "recipe.yaml"
    path.parent.mkdir()
    path.write_text(GOOD)
    return path


@pytest.mark.parametrize("case", ENDLESS)
def test_an_endless_recipe_is_one_sentence(recipe, case):
    text, problem = ENDLESS[case]
    recipe.write_text(text + GOOD)
    with pytest.raises(OlpackError) as caught:
        load(recipe)
    assert problem in str(caught.value) and str(recipe) in str(caught.value)
    assert len(str(caught.value)) < 400 and "\n" not in str(caught.value)


@pytest.mark.parametrize("case", ENDLESS)
def test_an_endless_setting_is_one_sentence(recipe, case):
    text, problem = ENDLESS[case]
    with pytest.raises(OlpackError, match="^--set train, line") as caught:
        load(recipe, [f"train={text}"])
    assert problem in str(caught.value)


def test_a_recipe_of_megabytes_is_not_read(recipe):
    recipe.write_text(GOOD + "#" * (2 << 20))
    with pytest.raises(OlpackError, match="recipe.yaml is longer than 1 MB"):
        load(recipe)


def test_a_model_card_without_end_names_no_licence(tmp_path):
    (tmp_path / "README.md").write_text(f"---\n{BOMB}license: mit\n---\n")
    assert Base("base", tmp_path).license is None
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n")
    assert Base("base", tmp_path).license == "mit"


def test_aliases_within_reason_are_read(recipe):
    recipe.write_text(GOOD + "train: &same {epochs: 1}\ncompare:\n  prompts: [&ask 'Why?', *ask]\n")
    assert load(recipe).compare.prompts == ["Why?", "Why?"]


@pytest.mark.parametrize("value", ["2001-13-45", "!!bool perhaps", "!!int ''", "!!timestamp x", "9" * 5000])
def test_a_value_that_its_type_does_not_have(recipe, value):
    recipe.write_text(f"{GOOD}train: {{rank: {value}}}\n")
    with pytest.raises(OlpackError, match="line 3: this is no (timestamp|bool|int)"):
        load(recipe)
    recipe.write_text(GOOD)
    with pytest.raises(OlpackError, match="--set train.rank: 'train.rank': Input should be a valid integer, not") as caught:
        load(recipe, [f"train.rank={value}"])
    assert len(str(caught.value)) < 400


def test_a_setting_of_thousands_of_parts(recipe):
    with pytest.raises(OlpackError, match="no setting has that many levels"):
        load(recipe, ["modelfile.parameters" + ".a" * 5000 + "=1"])


@pytest.mark.parametrize("section", ["train:", "train: {}", "train: null", "train: ~"])
def test_a_section_with_nothing_in_it_takes_settings(recipe, section):
    recipe.write_text(f"{GOOD}{section}\n")
    assert load(recipe, ["train.epochs=3"]).train.epochs == 3


def test_a_value_of_a_list_has_no_name(recipe):
    with pytest.raises(OlpackError, match="--set quants.0: 'quants' is a list, whose values have no names"):
        load(recipe, ["quants=[Q8_0]", "quants.0=Q4_0"])
