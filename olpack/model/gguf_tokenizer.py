"""A tokenizer folder from the vocabulary in a GGUF: what llama.cpp reads there, in the form that transformers loads.

    write_tokenizer(Path("model.gguf"), folder)      # tokenizer.json, tokenizer_config.json, chat_template.jinja, generation_config.json

transformers reads GGUFs as well, and drops the name of the pre-tokenizer: a GGUF marked `smollm` then splits text as GPT-2 does. Here texts,
kinds and scores of the tokens come from llama.cpp itself, merges from the file, and the split patterns from `olpack.model.pretokenizers`. A plan
compares the result with llama.cpp's tokens of every row.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from olpack.errors import OlpackError
from olpack.llamacpp.vocabulary import Vocabulary, VocabularyToken
from olpack.model.gguf_header import Header, read_header, read_texts
from olpack.model.pretokenizers import SPLITS, Splits
from olpack.workspace import write_atomically

VERSION = 1
"""Raised when the same file would give another tokenizer."""

_SPACE = "▁"  # stands for a space in SentencePiece's vocabularies
_NAMED = ("bos", "eos", "unk", "pad", "sep", "cls", "mask")
_KEYS = {"unk": "unknown", "sep": "seperator"}  # as the format spells them
_OF_SENTENCEPIECE = {"bos": 1, "eos": 2, "unk": 0}  # what llama.cpp takes where a header names none
_ANOTHER = "Take the model's GGUF from another publisher, or its folder with safetensors as base."


def write_tokenizer(source: Path, folder: Path) -> None:
    """Write the tokenizer of a GGUF, its chat template if it has one, and the tokens that end an answer.

    Args:
        source: the file; of a split GGUF the first part.
        folder: where the files go; it exists.

    Raises:
        OlpackError: llama.cpp cannot read the file, it has no vocabulary, or one of a kind that no tokenizer here reads as llama.cpp does.
    """
    header = read_header(source)
    with Vocabulary(source) as vocabulary:
        tokens, kind, begins, ends, end_ids = vocabulary.tokens(), vocabulary.kind, vocabulary.begins, vocabulary.ends, vocabulary.end_ids()
    if not tokens or not kind:
        raise OlpackError(f"'{source}' has no vocabulary.", _ANOTHER)
    if kind == "BPE":
        fast = _merged(source, header, tokens)
    elif kind == "SPM":
        fast = _sentencepiece(header, tokens)
    else:
        raise OlpackError(f"'{source}' has a vocabulary of the kind {kind}, and olpack builds tokenizers of BPE and SentencePiece (SPM).", _ANOTHER)
    named = _named_tokens(header, tokens, kind)
    fast |= {"version": "1.0", "truncation": None, "padding": None, "added_tokens": _added(tokens)}
    fast["post_processor"] = _around(named["bos"] if begins else None, named["eos"] if ends else None, tokens)
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": header.integer(f"{header.text('general.architecture')}.context_length") or int(1e30),
    }
    settings |= {f"{name}_token": tokens[number].text for name, number in named.items() if number is not None}
    for name, content in (
        ("tokenizer.json", fast),
        ("tokenizer_config.json", settings),
        ("generation_config.json", {"eos_token_id": end_ids} if end_ids else {}),
    ):
        write_atomically(folder / name, json.dumps(content, ensure_ascii=False))
    if template := header.text("tokenizer.chat_template"):
        write_atomically(folder / "chat_template.jinja", template)


def _named_tokens(header: Header, tokens: Sequence[VocabularyToken], kind: str) -> dict[str, int | None]:
    """Number of each token with a role, None where there is none. llama.cpp takes token 11 for a BPE's begin and end where a header names none,
    which is no token of that role."""
    named: dict[str, int | None] = {}
    for name in _NAMED:
        number = header.integer(f"tokenizer.ggml.{_KEYS.get(name, name)}_token_id")
        if number is None and kind == "SPM":
            number = _OF_SENTENCEPIECE.get(name)
        named[name] = number if number is not None and number < len(tokens) else None
    return named


def _added(tokens: Sequence[VocabularyToken]) -> list[dict[str, Any]]:
    return [
        {
            "id": number,
            "content": token.text,
            "single_word": False,
            "lstrip": token.strips_left,
            "rstrip": token.strips_right,
            "normalized": False,
            "special": token.special,
        }
        for number, token in enumerate(tokens)
        if token.found
    ]


def _around(begin: int | None, end: int | None, tokens: Sequence[VocabularyToken]) -> dict[str, Any] | None:
    """What adds the tokens around a text, as the `add_bos_token` and `add_eos_token` of a header ask for."""
    if begin is None and end is None:
        return None
    text = [{"Sequence": {"id": "A", "type_id": 0}}]

    def special(number: int | None) -> list[dict[str, Any]]:
        return [] if number is None else [{"SpecialToken": {"id": tokens[number].text, "type_id": 0}}]

    single = special(begin) + text + special(end)
    around = {
        tokens[number].text: {"id": tokens[number].text, "ids": [number], "tokens": [tokens[number].text]}
        for number in (begin, end)
        if number is not None
    }
    return {"type": "TemplateProcessing", "single": single, "pair": single + [{"Sequence": {"id": "B", "type_id": 0}}], "special_tokens": around}


def _merged(source: Path, header: Header, tokens: Sequence[VocabularyToken]) -> dict[str, Any]:
    """The parts of tokenizer.json for a vocabulary with merges."""
    name = "gemma4" if header.text("tokenizer.ggml.model") == "gemma4" else header.text("tokenizer.ggml.pre") or "default"
    splits = SPLITS.get(name)
    if splits is None:
        raise OlpackError(f"'{source}' names the pre-tokenizer {name!r}, whose split pattern olpack does not know.", _ANOTHER)
    numbers = {token.text: number for number, token in enumerate(tokens)}
    merges = _merges(read_texts(source, "tokenizer.ggml.merges"), numbers)
    steps = [{"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False} for pattern in splits.patterns]
    if splits.bytes_as_text:
        steps.append({"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False})
        ways = {"normalizer": None, "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}}
    else:
        ways = {"normalizer": _replace(" ", _SPACE), "decoder": _DECODER}
    return {**ways, "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps}, "model": _model(numbers, merges, splits)}


def _merges(texts: Sequence[str], numbers: dict[str, int]) -> list[tuple[str, str]]:
    """Pairs in the order of their rank. The first of two equal ones counts; one whose parts or whole are no tokens does nothing here."""
    pairs: dict[tuple[str, str], None] = {}
    for text in texts:
        at = text.find(" ", 1)
        left, right = (text[:at], text[at + 1 :]) if at > 0 else ("", "")
        if left in numbers and right in numbers and left + right in numbers:
            pairs.setdefault((left, right))
    return list(pairs)


def _sentencepiece(header: Header, tokens: Sequence[VocabularyToken]) -> dict[str, Any]:
    """The parts of tokenizer.json for a SentencePiece vocabulary: merges are the ways to put a token together from two, best score first."""
    numbers = {token.text: number for number, token in enumerate(tokens)}
    pairs = []
    for text, number in numbers.items():
        pairs += [(-tokens[number].score, -at, text[:at], text[at:]) for at in range(1, len(text)) if text[:at] in numbers and text[at:] in numbers]
    pairs.sort(key=lambda pair: pair[:2])
    prefix = [{"type": "Prepend", "prepend": _SPACE}] if header.metadata.get("tokenizer.ggml.add_space_prefix", True) else []
    decoders = _DECODER if not prefix else {**_DECODER, "decoders": [*_DECODER["decoders"], {"type": "Strip", "content": " ", "start": 1, "stop": 0}]}
    return {
        "normalizer": {"type": "Sequence", "normalizers": [*prefix, _replace(" ", _SPACE)]},
        "pre_tokenizer": None,
        "decoder": decoders,
        "model": _model(numbers, [(left, right) for *_, left, right in pairs], Splits((), bytes_as_text=False)),
    }


def _model(numbers: dict[str, int], merges: list[tuple[str, str]], splits: Splits) -> dict[str, Any]:
    unknown = None if splits.bytes_as_text else next((text for text in ("<unk>",) if text in numbers), None)
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": unknown,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": not splits.bytes_as_text,
        "byte_fallback": not splits.bytes_as_text,
        "ignore_merges": splits.whole_words,
        "vocab": numbers,
        "merges": merges,
    }


def _replace(text: str, by: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": {"String": text}, "content": by}


_DECODER: dict[str, Any] = {"type": "Sequence", "decoders": [_replace(_SPACE, " "), {"type": "ByteFallback"}, {"type": "Fuse"}]}
