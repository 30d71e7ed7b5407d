"""The recipe: what it accepts, and one sentence with place and remedy for what it does not."""

from __future__ import annotations

from pathlib import Path

import pytest

from olpack.errors import OlpackError
from olpack.recipe import load

GOOD = "base: builtin/tiny-coder\ndata: {train: train.jsonl}\n"


def write(tmp_path: Path, text: str, name: str = "assistant") -> Path:
    path = tmp_path / name / "recipe.yaml"
    path.parent.mkdir()
    path.write_text(text, encoding="utf-8")
    return path


def test_two_lines_are_a_recipe(tmp_path):
    recipe = load(write(tmp_path, GOOD))
    assert recipe.name == "assistant"
    assert recipe.quants == ["Q4_0", "Q4_K_M", "Q5_K_M", "Q8_0"]
    assert recipe.train.rank == 16
    assert recipe.origin("train.rank") == "default"
    assert recipe.origin("base") == "recipe.yaml:1"


def test_numbers_are_read_as_their_author_means_them(tmp_path):
    recipe = load(write(tmp_path, GOOD + "train: {learning_rate: 2e-4, epochs: 3}\nquants: [q4_k_m]\n"))
    assert recipe.train.learning_rate == 2e-4
    assert recipe.train.epochs == 3
    assert recipe.quants == ["Q4_K_M"]


def test_budgets_are_quants(tmp_path):
    recipe = load(write(tmp_path, GOOD + "quants: [q4_k_m, {budget: 4.60 bpw}, {size: 1.5 GB}, 300mb]\n"))
    assert recipe.quants == ["Q4_K_M", "4.6BPW", "1.5GB", "300MB"]


def test_arabic_system_prompt_and_whitespace_are_kept(tmp_path):
    recipe = load(write(tmp_path, GOOD + 'modelfile:\n  system: "أنت مساعد برمجة.\\u200f \\n"\n'))
    assert recipe.modelfile.system == "أنت مساعد برمجة.\u200f \n"


def test_overrides_win_and_say_so(tmp_path):
    recipe = load(write(tmp_path, GOOD + "train: {epochs: 3}\n"), ["train.epochs=0.5", "quants=[Q8_0]", "modelfile.parameters.temperature=0.1"])
    assert recipe.train.epochs == 0.5
    assert recipe.quants == ["Q8_0"]
    assert recipe.modelfile.parameters == {"temperature": 0.1}
    assert recipe.origin("train.epochs") == "--set"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (GOOD + "quant: [Q8_0]\n", "line 3: unknown key 'quant'. Did you mean 'quants'?"),
        (GOOD + "train:\n  epoch: 3\n", "line 4: unknown key 'train.epoch'. Did you mean 'epochs'?"),
        (GOOD + "train:\n  rank: sixteen\n", "line 4: 'train.rank': Input should be a valid integer, not 'sixteen'"),
        (GOOD + "train:\n  rank: yes\n", "line 4: 'train.rank'"),
        (GOOD + 'train:\n  rank: "16"\n', "line 4: 'train.rank'"),
        (GOOD + "train:\n  rank: 0\n", "greater than or equal to 1"),
        (GOOD + "train:\n  schedule: cosin\n", "'cosine', 'linear' or 'constant'"),
        (GOOD + "quants: [Q4_K_X]\n", "Q4_K_X"),
        (GOOD + "quants: [Q8_0, q8_0]\n", "Q8_0 is listed twice"),
        (GOOD + "quants: []\n", "'quants'"),
        (GOOD + "quants: [{budget: 4.6}]\n", "'4.6' is no budget: write it like {budget: 4.6 bpw}"),
        (GOOD + "quants:\n- {size: 4.6 bpw}\n", "'4.6 bpw' is no size: write it like {size: 5 GB}"),
        (GOOD + "quants: [{bits: 4}]\n", "a quant is a name such as Q4_K_M, {budget: 4.6 bpw} or {size: 5 GB}"),
        (GOOD + "quants: [{budget: 4.6 bpw}, 4.6BPW]\n", "4.6BPW is listed twice"),
        (GOOD + "quants: [{size: 5 GB}]\npackage: adapter\n", "5GB goes with package: merged"),
        (GOOD + "train:\n  lora_r: 8\n", "line 4: unknown key 'train.lora_r'. Did you mean 'rank'?"),
        (GOOD + "train:\n  lr: 1e-4\n", "line 4: unknown key 'train.lr'. Did you mean 'learning_rate'?"),
        (GOOD + "train:\n  gradient_accumulation_steps: 4\n", "unknown key 'train.gradient_accumulation_steps'. Did you mean 'batch_size'?"),
        (GOOD + "export:\n  tensor_types: {attn_v: q6k}\n", "line 4: 'export.tensor_types': There is no tensor type 'q6k'. Did you mean q6_K?"),
        (GOOD + "export: {importance: train}\npackage: adapter\n", "export goes with package: merged"),
        (GOOD + "modelfile:\n  parameters: {temprature: 1}\n", "temperature"),
        (GOOD + "modelfile:\n  parameters: {num_ctx: big}\n", "num_ctx"),
        ("data: {train: train.jsonl}\n", "'base' is missing: `builtin/tiny-coder`, a folder with a Hugging Face model, or a Hub id"),
        ("base: builtin/tiny-coder\n", "'data' is missing: Training and held-out rows."),
        (GOOD + "modelfile:\n  messages: [{role: user}]\n", "line 4: 'modelfile.messages.0.content' is missing: Text of the turn."),
        (GOOD + "base: other\n", "line 3: 'base' is given twice"),
        (GOOD + "train: [\n", "line 4"),
        ("- a\n", "must contain settings"),
        ("", "must contain settings"),
        (GOOD + "revision: main\n", "builtin/tiny-coder has none"),
    ],
)
def test_what_is_wrong_is_named_with_its_line(tmp_path, text, said):
    with pytest.raises(OlpackError) as caught:
        load(write(tmp_path, text))
    assert said in str(caught.value)
    assert "recipe.yaml" in str(caught.value)


def test_every_problem_is_told_at_once(tmp_path):
    with pytest.raises(OlpackError) as caught:
        load(write(tmp_path, GOOD + "quant: 1\ntrain: {rank: -1}\n"))
    assert len(str(caught.value).splitlines()) == 2


def test_a_name_that_ollama_would_refuse(tmp_path):
    with pytest.raises(OlpackError, match="legal name"):
        load(write(tmp_path, GOOD, name="my assistant!"))


@pytest.mark.parametrize("override", ["train.epochs", "=3", "base.x=1"])
def test_an_override_that_is_none(tmp_path, override):
    with pytest.raises(OlpackError, match="--set"):
        load(write(tmp_path, GOOD), [override])


def test_not_utf8(tmp_path):
    path = write(tmp_path, GOOD)
    path.write_bytes(b"base: \xff\xfe\n")
    with pytest.raises(OlpackError, match="UTF-8"):
        load(path)


def test_names_of_other_tools_lead_to_keys_that_exist():
    from olpack.recipe import reader

    keys = {*reader._keys_of([]), *reader._keys_of(["train"]), *reader._keys_of(["data"])}
    assert set(reader._OF_OTHER_TOOLS.values()) <= keys and not keys.intersection(reader._OF_OTHER_TOOLS)
