"""Tokenizers that may take any time and memory: which they are, and their trial in a worker before this process uses one.

The patterns and replacements in a tokenizer.json run in native code, on the user's rows, and no Python code ends them. A pattern can backtrack
without end, and a few replacements can make gigabytes of a word. Published tokenizers consist of the few patterns that are known here, so a
trial is rare.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from olpack.model.settings import read_object
from olpack.trials import Trial

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_CASED = "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
_CAMEL = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*",
)
_ALTERNATIVES = frozenset(  # of the patterns of published tokenizers: each takes a time that grows as the text does
    (
        *("'s", "'t", "'re", "'ve", "'m", "'ll", "'d", _CONTRACTIONS, _CASED, "'(?i:[sdmt]|ll|ve|re)", "'(?:[sdmt]|ll|ve|re)"),
        *(r" ?\p{L}+", r" ?\p{N}+", r" ?[^\s\p{L}\p{N}]+", r" ?[^\s\p{L}\p{N}]+[\r\n]*", r" ?[^\s\p{L}\p{N}]+[\r\n/]*"),
        *(r"\s+(?!\S)", r"\s+", r"\s*[\r\n]+", r"\s*[\r\n]", r"\s", " ", " +", " {2,}", "[\r\n]", r"[\r\n]", r"\n", r"\n+", r"\r?\n"),
        *(r"\p{N}", r"\p{N}{1}", r"\p{N}{1,3}", r"\p{N}+", r"\d", r"\d+", r"\d{1,3}", r"[0-9]", r"[0-9]+", r"\w+", r"[^\w\s]+", r"\S+"),
        *(r"[^\r\n\p{L}\p{N}]?\p{L}+", r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+", r" ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*", r"\s?\p{L}+", r"\s?\p{P}+"),
        *_CAMEL,
        *(f"{camel}{ending}?" for camel in _CAMEL for ending in (_CONTRACTIONS, _CASED)),
        *("[一-龥぀-ゟ゠-ヿ]+", "[一-龥ࠀ-一가-퟿]+", r"[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+", r" ?[\p{P}\p{S}]+[\r\n]*"),
        r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+""",
    )
)
_PLAIN = frozenset(  # steps whose time and output are bounded by the text, whatever their settings
    (
        *("NFC", "NFD", "NFKC", "NFKD", "Nmt", "Lowercase", "StripAccents", "BertNormalizer", "ByteLevel", "Whitespace", "WhitespaceSplit"),
        *("BertPreTokenizer", "Punctuation", "CharDelimiterSplit", "Digits", "UnicodeScripts", "Fuse", "ByteFallback"),
        *("BertProcessing", "RobertaProcessing"),
    )
)
_MOST_STEPS = 32
_MOST_GROWTH = 16  # times that all replacements together make a text longer
_SHORT = 100  # characters of a text that a step adds
_LOAD_S, _LEAST_S, _CHARACTERS_PER_S = 60, 20, 50_000  # of the slowest tokenizers
_LOAD_MEMORY, _MEMORY, _MEMORY_PER_CHARACTER = 4 << 30, 2 << 30, 400  # bytes; of the address space, in which loaded libraries count
_RUN = 64  # of one character: enough for a pattern that backtracks without end
_SAMPLE = "".join(letter * _RUN + "\n" for letter in "aA1 .-_\t\u00e9\u4e2d") + (
    "Ab 12,345.67  \n\n\t  don't CamelCase_snake (x+y)==z; e\u0301 \u0938\u094d \U0001f469\u200d\U0001f4bb \r\n" * 4
)

_trials: WeakKeyDictionary[Any, TokenizerTrial] = WeakKeyDictionary()


def needs_trial(tokenizer: dict[str, Any]) -> bool:
    """Whether a tokenizer may take any time or memory for a text.

    Args:
        tokenizer: the fields of a tokenizer.json.
    """
    growth, count = 1.0, 0
    for step in _steps([tokenizer.get(name) for name in ("normalizer", "pre_tokenizer", "post_processor", "decoder")]):
        count += 1
        if not _is_bounded(step):
            return True
        if step["type"] == "Replace":
            growth *= max(1, len(step["content"]) / max(1, len(_pattern(step)[1])))
    padding = tokenizer.get("padding")
    return count > _MOST_STEPS or growth > _MOST_GROWTH or (isinstance(padding, dict) and padding.get("strategy") != "BatchLongest")


def _steps(value: Any) -> Iterator[dict[str, Any]]:
    """The steps in a part of a tokenizer, those in a sequence one by one."""
    if isinstance(value, list):
        for one in value:
            yield from _steps(one)
    elif isinstance(value, dict) and value.get("type") == "Sequence":
        yield from _steps([inner for key, inner in value.items() if key != "type"])
    elif value is not None:
        yield value if isinstance(value, dict) else {}


def _is_bounded(step: dict[str, Any]) -> bool:
    kind, special = step.get("type"), step.get("special_tokens")
    if kind == "Split":
        pattern, text = _pattern(step)
        return pattern == "String" or all(one in _ALTERNATIVES for one in _alternatives(text))
    if kind == "Replace":
        pattern, text = _pattern(step)
        return isinstance(step.get("content"), str) and (len(text) > 0 and (pattern == "String" or text in _ALTERNATIVES))
    if kind in ("Prepend", "Metaspace", "WordPiece", "BPEDecoder", "CTC", "Strip"):  # whose settings are texts
        return all(len(text) <= _SHORT for text in step.values() if isinstance(text, str))
    if kind == "TemplateProcessing":
        added = list(special.values()) if isinstance(special, dict) else [None]
        ids = [token.get("ids") if isinstance(token, dict) else None for token in added]
        return all(isinstance(part, list) and len(part) <= _SHORT for part in (step.get("single"), step.get("pair"), *ids))
    return isinstance(kind, str) and kind in _PLAIN


def _pattern(step: dict[str, Any]) -> tuple[str, str]:
    """The kind of a step's pattern, "String" or "Regex", and its text."""
    pattern = step.get("pattern")
    if isinstance(pattern, dict) and len(pattern) == 1:
        ((kind, text),) = pattern.items()
        if kind in ("String", "Regex") and isinstance(text, str):
            return kind, text
    return "", ""


def _alternatives(pattern: str) -> list[str]:
    """The alternatives of a regular expression: the texts between the bars that stand in no bracket."""
    found, begin, depth, at = [], 0, 0, 0
    while at < len(pattern):
        letter = pattern[at]
        if letter == "\\":
            at += 1
        elif letter == "[":
            at = _class_end(pattern, at)
        elif letter in "()":
            depth += 1 if letter == "(" else -1
        elif letter == "|" and depth == 0:
            found.append(pattern[begin:at])
            begin = at + 1
        at += 1
    return [*found, pattern[begin:]]


def _class_end(pattern: str, at: int) -> int:
    """Where a character class ends that begins at a character."""
    at += 1
    while at < len(pattern) and pattern[at] != "]":
        at += 2 if pattern[at] == "\\" else 1
    return at


class TokenizerTrial:
    """The worker of one tokenizer.

    Args:
        folder: of the tokenizer.
    """

    def __init__(self, folder: Path):
        self._folder, self._trial = folder, Trial("olpack.model.tokenizer_worker")

    def attempt(self, texts: Sequence[str], seconds: int, memory: int) -> None:
        """Tokenize texts in the worker; it loads the tokenizer first.

        Raises:
            OlpackError: that takes too much time or memory.
        """
        remedy = "Take a base with another tokenizer, or its tokenizer.json as the model's publisher has it."
        self._trial.attempt([str(self._folder.absolute()), list(texts)], f"The tokenizer in {self._folder}", remedy, seconds, memory)


def start(folder: Path) -> TokenizerTrial | None:
    """Try a folder's tokenizer in a worker: it loads there, and tokenizes a short text.

    Returns:
        the worker, for more texts; None where the tokenizer needs none.

    Raises:
        OlpackError: it takes too much time or memory.
    """
    file = folder / "tokenizer.json"
    if not file.is_file() or not needs_trial(read_object(file)):
        return None
    trial = TokenizerTrial(folder)
    trial.attempt([_SAMPLE, "a b\n  c", "a", ""], _LOAD_S, _LOAD_MEMORY)
    return trial


def belongs(trial: TokenizerTrial | None, tokenizer: Any) -> None:
    """Have the texts of a tokenizer tried by this worker from now on."""
    if trial is not None:
        _trials[tokenizer] = trial


def attempt(tokenizer: Any, texts: Sequence[str]) -> None:
    """Try to tokenize texts in a worker, where the tokenizer needs that; then this process can do it.

    Raises:
        OlpackError: they take too much time or memory.
    """
    if trial := _trials.get(tokenizer):
        length = sum(map(len, texts))
        trial.attempt(texts, _LEAST_S + length // _CHARACTERS_PER_S, _MEMORY + length * _MEMORY_PER_CHARACTER)
