"""A tokenizer is recognized by how it splits text, and llama.cpp then makes the same tokens of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_models import LLAMA3, QWEN2, converter, write_model, write_tokenizer

from olpack.errors import OlpackError
from olpack.export.pretokenizer import recognize

BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
GPT2 = {**BYTE_LEVEL, "use_regex": True}
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def split(pattern: str, behavior: str = "Isolated", invert: bool = False) -> dict:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": behavior, "invert": invert}


def sequence(*steps: dict) -> dict:
    return {"type": "Sequence", "pretokenizers": list(steps)}


@pytest.mark.parametrize(
    ("pre_tokenizer", "ignore_merges", "name"),
    [
        (sequence(split(QWEN2), BYTE_LEVEL), False, "qwen2"),
        (sequence(split(QWEN2, "Removed", invert=True), BYTE_LEVEL), False, "qwen2"),
        (sequence(split(QWEN2.replace("(?i:'s|'t|'re|'ve|'m|'ll|'d)", "'(?i:[sdmt]|ll|ve|re)")), BYTE_LEVEL), False, "qwen2"),
        (sequence(split(LLAMA3), BYTE_LEVEL), True, "llama-bpe"),
        (sequence(split(LLAMA3), BYTE_LEVEL), False, "dbrx"),
        (sequence(split(TEKKEN), BYTE_LEVEL), True, "tekken"),
        (GPT2, False, "gpt-2"),
        (sequence({"type": "Digits", "individual_digits": True}, GPT2), False, "smollm"),
    ],
)
def test_known_patterns_have_a_name(tmp_path, pre_tokenizer, ignore_merges, name):
    write(tmp_path, pre_tokenizer, ignore_merges)
    assert recognize(tmp_path) == name


@pytest.mark.parametrize(
    ("pre_tokenizer", "shown"),
    [
        (sequence(split(r"\w+|\W"), BYTE_LEVEL), r"'\w+|\W'"),
        (sequence(split(QWEN2, "MergedWithNext"), BYTE_LEVEL), "MergedWithNext"),
        ({**GPT2, "add_prefix_space": True}, "ByteLevel with a space before the text"),
        ({"type": "Whitespace"}, '{"type": "Whitespace"}'),
        (None, "splits text by not at all"),
    ],
)
def test_an_unknown_pattern_is_shown(tmp_path, pre_tokenizer, shown):
    write(tmp_path, pre_tokenizer, False)
    with pytest.raises(OlpackError) as error:
        recognize(tmp_path)
    assert shown in str(error.value)


def write(folder: Path, pre_tokenizer: dict | None, ignore_merges: bool) -> None:
    model = {"type": "BPE", "ignore_merges": ignore_merges}
    (folder / "tokenizer.json").write_text(json.dumps({"pre_tokenizer": pre_tokenizer, "model": model}))


@pytest.mark.parametrize("kind", ["qwen2", "llama"])
def test_llama_cpp_makes_the_same_tokens(tmp_path, kind):
    plan = converter().check(write_model(tmp_path / "model", kind), ["Q8_0"])
    assert plan.pre_tokenizer == {"qwen2": "qwen2", "llama": "llama-bpe"}[kind]
    assert plan.warnings == []


def test_other_tokens_are_announced(tmp_path):
    """Merges that llama.cpp cannot know of: a token of two words, which no merge after the split can make."""
    source = write_model(tmp_path / "model")
    write_tokenizer(source, pattern=QWEN2)
    path = source / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    tokenizer["normalizer"] = {"type": "Lowercase"}
    path.write_text(json.dumps(tokenizer))
    plan = converter().check(source, ["Q8_0"])
    assert "llama.cpp splits text otherwise than the tokenizer" in plan.warnings[0]
