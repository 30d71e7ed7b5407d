"""Which of llama.cpp's BPE pre-tokenizers splits text as a tokenizer does, seen from the split patterns in its tokenizer.json.

llama.cpp's converter knows published tokenizers by a hash of what they make of one text, so a tokenizer trained by anybody else is
unknown to it even if it splits text exactly as Qwen2's does. The patterns here are facts about `src/llama-vocab.cpp`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from olpack import bounded_json
from olpack.errors import OlpackError
from olpack.model.pretokenizers import CONTRACTIONS, SYMBOLS, TAIL, WORDS

_CAMEL_A = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
_CAMEL_B = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"

# The steps that split the text, in order, then the name. "gpt-2" stands for ByteLevel's own pattern, "digit" for one digit at a time.
# A name with ignore_merges applies to tokenizers that take a whole word from the vocabulary before any merge.
_KNOWN: dict[tuple[tuple[str, ...], bool], str] = {
    (("gpt-2",), False): "gpt-2",
    (("digit", "gpt-2"), False): "smollm",
    ((f"{CONTRACTIONS}|{WORDS}|\\p{{N}}|{SYMBOLS}|{TAIL}",), False): "qwen2",
    ((f"{CONTRACTIONS}|{WORDS}|\\p{{N}}{{1,3}}|{SYMBOLS}|{TAIL}",), False): "dbrx",
    ((f"{CONTRACTIONS}|{WORDS}|\\p{{N}}{{1,3}}|{SYMBOLS}|{TAIL}",), True): "llama-bpe",
    ((f"{WORDS}|\\p{{N}}|{SYMBOLS}|{TAIL}",), False): "ufakzeka",
    ((rf"{CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{TAIL}",), False): "qwen35",
    ((rf"{_CAMEL_A}|{_CAMEL_B}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{TAIL}",), True): "tekken",
    ((rf"{_CAMEL_A}{CONTRACTIONS}?|{_CAMEL_B}{CONTRACTIONS}?|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{TAIL}",), False): "gpt-4o",
    (
        (
            r"\p{N}{1,3}",
            "[一-龥぀-ゟ゠-ヿ]+",
            r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|"""
            r"[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|" + TAIL,
        ),
        False,
    ): "deepseek-v3",
    (("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+", "digit"), False): "deepseek-coder",
}

# Other ways to write the same pattern.
_SPELLINGS = {
    "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])": CONTRACTIONS,
    "'(?i:[sdmt]|ll|ve|re)": CONTRACTIONS,
    "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+": "gpt-2",
    "'(?:[sdmt]|ll|ve|re)| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+": "gpt-2",
    "\\p{N}{1}": "\\p{N}",
}


NAMES = tuple(dict.fromkeys(_KNOWN.values()))
"""llama.cpp's names of all pre-tokenizers that are known here."""


def recognize(source: Path) -> str:
    """llama.cpp's name of the pre-tokenizer that splits text as `source`/tokenizer.json does.

    Raises:
        OlpackError: llama.cpp has none like it, or the file is no tokenizer.
    """
    path = source / "tokenizer.json"
    if not path.is_file():
        raise OlpackError(
            f"llama.cpp does not know the tokenizer in '{source}', and without a tokenizer.json it cannot be recognized.",
            "Save it as a fast tokenizer (tokenizer.json), or take another base.",
        )
    tokenizer = bounded_json.read_object(path, "Save it again with save_pretrained, or download it again.")
    steps = tuple(_steps(tokenizer.get("pre_tokenizer")))
    model = tokenizer.get("model")
    ignore_merges = isinstance(model, dict) and bool(model.get("ignore_merges"))
    name = _KNOWN.get((steps, ignore_merges))
    if name is None:
        shown = ", then ".join(f"'{step}'" for step in steps) or "not at all"
        raise OlpackError(
            f"llama.cpp has no pre-tokenizer like the one in '{path}', which splits text by {shown}"
            f"{' and takes whole words before merges' if ignore_merges else ''}.",
            "Take a base whose tokenizer llama.cpp knows, or train the tokenizer with the split pattern of Qwen2 or GPT-2.",
        )
    return name


def _steps(pre_tokenizer: Any) -> list[str]:
    """The splits of a pre-tokenizer in order, each as its pattern in one spelling; what it does besides, or a value that is none, keeps its text."""
    if not isinstance(pre_tokenizer, dict):
        return [] if pre_tokenizer is None else [json.dumps(pre_tokenizer, ensure_ascii=False)]
    kind, parts = pre_tokenizer.get("type"), pre_tokenizer.get("pretokenizers", [])
    if kind == "Sequence" and isinstance(parts, list):
        return [step for part in parts for step in _steps(part)]
    if kind == "ByteLevel":
        if pre_tokenizer.get("add_prefix_space"):
            return ["ByteLevel with a space before the text"]
        return ["gpt-2"] if pre_tokenizer.get("use_regex", True) else []
    if kind == "Digits":
        return ["digit" if pre_tokenizer.get("individual_digits") else "digits"]
    if kind == "Split":
        pattern = pre_tokenizer.get("pattern")
        pattern = pattern.get("Regex") if isinstance(pattern, dict) else None
        # Kept between the matches or at the matches, all text stays: both are "isolated" when the pattern matches everything.
        plain = pre_tokenizer.get("behavior") in ("Isolated", "Removed") and (
            pre_tokenizer.get("behavior") == "Isolated" or pre_tokenizer.get("invert")
        )
        if isinstance(pattern, str) and plain:
            return [_spelling(pattern)]
    return [json.dumps(pre_tokenizer, ensure_ascii=False)] if pre_tokenizer else []


def _spelling(pattern: str) -> str:
    if pattern in (r"\p{N}", r"\d"):
        return "digit"
    for other, canonical in _SPELLINGS.items():
        pattern = pattern.replace(other, canonical)
    return pattern
