"""A tokenizer that takes any time or memory is ended in a worker; one of known steps is not tried."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from oracle import CHAT
from tiny_models import write_tokenizer

from olpack.data import Chat, Renderer
from olpack.errors import OlpackError
from olpack.export import pretokenizer
from olpack.model import tokenizer_trial
from olpack.model.base import BUILTIN, Base, load_tokenizer
from olpack.model.tokenizer_trial import needs_trial


def split(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def replace(text: str, content: str, kind: str = "String") -> dict[str, Any]:
    return {"type": "Replace", "pattern": {kind: text}, "content": content}


def sequence(kind: str, *steps: dict[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", kind: list(steps)}


DOUBLES = sequence("normalizers", *[replace("a", "aa")] * 30)


def hostile(folder: Path, **parts: Any) -> Path:
    """A base whose tokenizer.json has these parts."""
    write_tokenizer(folder)
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | parts))
    settings = folder / "tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"chat_template": CHAT, "tokenizer_class": "PreTrainedTokenizerFast"}))
    return folder


@pytest.mark.parametrize(
    "parts",
    [
        {"pre_tokenizer": split("(?:a|aa)+b")},
        {"pre_tokenizer": sequence("pretokenizers", split(r"\s+"), split("(a+)+$"))},
        {"pre_tokenizer": sequence("pretokenizers", *[split(r"\s+")] * 40)},
        {"normalizer": DOUBLES},
        {"normalizer": replace("a", "x" * 1000)},
        {"normalizer": replace("", "x")},
        {"normalizer": replace("(a|a)*b", "", "Regex")},
        {"normalizer": {"type": "Prepend", "prepend": "x" * 1_000_000}},
        {"normalizer": {"type": "Precompiled", "precompiled_charsmap": ""}},
        {"normalizer": {"type": "New"}},
        {"decoder": DOUBLES | {"type": "Sequence"}},
        {"post_processor": {"type": "TemplateProcessing", "single": [{}] * 1_000_000, "pair": [], "special_tokens": {}}},
        {"padding": {"strategy": {"Fixed": 1_000_000_000}}},
    ],
    ids=lambda parts: f"{next(iter(parts))}: {json.dumps(next(iter(parts.values())))[:60]}",
)
def test_what_may_have_no_end_is_tried(parts):
    assert needs_trial(parts)


def test_published_patterns_are_known_to_end():
    for steps, _ in pretokenizer._KNOWN:
        for step in steps:
            assert step in ("gpt-2", "digit") or not needs_trial({"pre_tokenizer": split(step)}), step
    for other in pretokenizer._SPELLINGS:
        assert not needs_trial({"pre_tokenizer": split(other)}), other
    shipped = json.loads((BUILTIN / "tiny-coder/tokenizer.json").read_text())
    assert not needs_trial(shipped)
    spaces = sequence("normalizers", {"type": "Prepend", "prepend": "▁"}, replace(" ", "▁"))
    steps = [replace("▁", " "), {"type": "ByteFallback"}, {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0}]
    assert not needs_trial({"normalizer": spaces, "decoder": sequence("decoders", *steps), "pre_tokenizer": None})


@pytest.mark.parametrize(
    ("parts", "reason"),
    [
        ({"normalizer": DOUBLES}, "takes (longer than 9 s|more than 4,096 MiB of memory)"),
        ({"pre_tokenizer": split("(?:a|aa)+\\z")}, "fails: Onig: Regex search error: retry-limit-in-match over"),
    ],
    ids=["doubles", "backtracks"],
)
def test_a_base_with_a_tokenizer_without_end_is_refused(tmp_path, monkeypatch, parts, reason):
    if "normalizer" in parts:
        monkeypatch.setattr(tokenizer_trial, "_LOAD_S", 9)
    with pytest.raises(OlpackError, match=f"The tokenizer in {tmp_path}/base {reason}"):
        Base("base", hostile(tmp_path / "base", **parts)).tokenizer()


def test_rows_are_tried_before_this_process_tokenizes_them(tmp_path, monkeypatch):
    slow = split("q(?:[^\\n]{0,60}){3}(?=\\n\\nq)|[^\\n]|\\n")  # some milliseconds for each q
    renderer = Renderer(load_tokenizer(hostile(tmp_path / "base", pre_tokenizer=slow)))
    monkeypatch.setattr(tokenizer_trial, "_LEAST_S", 2)
    assert renderer.rows(Chat([], "a", text="a question"))
    with pytest.raises(OlpackError, match="takes longer than 2 s") as raised:
        renderer.rows(Chat([], "b", text="q" * 5000))
    assert "tokenizer.json as the model's publisher has it" in raised.value.remedy


def test_a_tokenizer_of_unknown_but_harmless_steps_is_used(tmp_path):
    bytewise = {"type": "ByteLevel", "use_regex": False, "add_prefix_space": False, "trim_offsets": True}
    folder = hostile(tmp_path / "base", pre_tokenizer=sequence("pretokenizers", split("[a-z]{1,8}|[^a-z]"), bytewise))
    tokenizer = load_tokenizer(folder)
    assert tokenizer in tokenizer_trial._trials
    tokenizer_trial.attempt(tokenizer, ["some text", "and more"])
    assert tokenizer("some text")["input_ids"]
