r"""How llama.cpp splits text before it merges, by the name of the pre-tokenizer in a GGUF, as patterns for the `tokenizers` library.

The patterns are facts about `src/llama-vocab.cpp` and `src/unicode.cpp`: what llama.cpp does, also where the tokenizer that a model was published
with does something else. It matches upper and lower case by ASCII alone, for one, where `\p{Lu}` and `\p{Ll}` are published.
"""

from __future__ import annotations

from dataclasses import dataclass

CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
TAIL = r"\s*[\r\n]+|\s+(?!\S)|\s+"
WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
SYMBOLS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_EITHER_CASE = "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_MARKED = r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|" + TAIL
_UPPER, _LOWER = r"[\p{L}&&[^a-z]]", r"[\p{L}&&[^A-Z]]"
_CAMEL_A, _CAMEL_B = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+", rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
_PATHS = rf" ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{TAIL}"
_EAST = r"[[一-龥ࠀ-一가-퟿]&&[^\s]]+"  # llama.cpp puts an ASCII character in place of any other white space first
_LATIN_OF_DEEPSEEK = (
    "A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af\u0370-\u0373\u0376\u0377\u037b-\u037d\u037f"
    "\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5\u03f7-\u0481\u048a-\u052f\u0531-\u0556\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd"
    "\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77\u1d79-\u1d9a\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59"
    "\u1f5b\u1f5d\u1f5f-\u1f7d\u1f80-\u1fb4\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb\u1fe0-\u1fec\u1ff2-\u1ff4"
    "\u1ff6-\u1ffc\u2102\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128\u212a-\u212d\u212f-\u2134\u2139\u213c-\u213f\u2145-\u2149"
    "\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4\u2ceb-\u2cee\u2cf2\u2cf3\ua640-\ua66d\ua680-\ua69b\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e"
    "\uab70-\uabbf\ufb00-\ufb06\ufb13-\ufb17\uff21-\uff3a\uff41-\uff5a\U00010400-\U0001044f\U000104b0-\U000104d3\U000104d8-\U000104fb"
    "\U00010c80-\U00010cb2\U00010cc0-\U00010cf2\U000118a0-\U000118df\U0001e900-\U0001e943"
)


@dataclass(frozen=True)
class Splits:
    """One way to split text.

    Attributes:
        patterns: regular expressions in order: each splits the pieces that the ones before it left, at its matches and between them.
        bytes_as_text: pieces are written in GPT-2's letters for bytes. False: as they are, with "▁" in place of spaces.
        whole_words: a piece that is a token is taken before any merge.
    """

    patterns: tuple[str, ...]
    bytes_as_text: bool = True
    whole_words: bool = False


def _qwen2(words: str = WORDS, digits: str = r"\p{N}", symbols: str = SYMBOLS) -> str:
    return f"{_EITHER_CASE}|{words}|{digits}|{symbols}|{TAIL}"


_DIGITS_THEN_GPT2 = (r"\p{N}", _GPT2)
_LLAMA3 = (_qwen2(digits=r"\p{N}{1,3}"),)
_DEEPSEEK3 = (r"\p{N}{1,3}", "[一-龥぀-ゟ゠-ヿ]+", _MARKED)
_GPT4O = (rf"{_CAMEL_A}{_EITHER_CASE}?|{_CAMEL_B}{_EITHER_CASE}?|\p{{N}}{{1,3}}|{_PATHS}",)
_BAILING = (rf"'(?:[sSdDmMtT]|[lL][lL]|[vV][eE]|[rR][eE])|{WORDS}|\p{{N}}|{SYMBOLS}|\s*[\r\n]|\s+(?!\S)|\s+",)
_GROUPS_OF_THREE = r"\P{N}*\p{N}{1,3}(?=(?:\p{N}{3})*(?!\p{N}))"  # from the right; what stands before a number stays with its first digits
_LINES = (r"[^\n]+|\n+",)
_TINY_AYA = (
    _GROUPS_OF_THREE,
    rf"[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+{_EITHER_CASE}?|\p{{N}}{{1,3}}|{_PATHS}",
)
_DEFAULT = (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]")

_FAMILIES: tuple[tuple[str, Splits], ...] = (
    ("default", Splits(_DEFAULT)),
    ("gpt-2 phi-2 jina-es jina-de gigachat jina-v2-es jina-v2-de a.x-4.0 mellum modern-bert exaone4", Splits((_GPT2,))),
    ("jina-v1-en jina-v2-code roberta-bpe mpt olmo jais trillion granite-docling", Splits((_GPT2,))),
    ("smollm starcoder refact command-r codeshell exaone minerva-7b mellum2", Splits(_DIGITS_THEN_GPT2)),
    ("qwen2 deepseek-r1-qwen kormo f2llmv2 megrez stablelm2 hunyuan solar-open grok-2", Splits((_qwen2(),))),
    ("qwen35", Splits((_qwen2(r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+", symbols=r" ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"),))),
    ("llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano", Splits(_LLAMA3, whole_words=True)),
    ("glm4 glm5", Splits(_LLAMA3, whole_words=True)),
    ("dbrx smaug-bpe chatglm-bpe", Splits(_LLAMA3)),
    ("deepseek-v3 hunyuan-dense joyai-llm hy_v4", Splits(_DEEPSEEK3)),
    (
        "deepseek-llm",
        Splits(
            (
                "[\r\n]",
                rf"\s?[{_LATIN_OF_DEEPSEEK}]+",
                r"\s?[[!-/:-~！-／：-～‘-‟\u3000-。]&&[^\s]]+",
                r"\s+$",
                _EAST,
                r"\p{N}+",
            )
        ),
    ),
    ("deepseek-coder", Splits(("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _EAST, r"\p{N}"))),
    ("falcon", Splits((r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, "[0-9][0-9][0-9]"))),
    ("tekken", Splits((rf"{_CAMEL_A}|{_CAMEL_B}|\p{{N}}|{_PATHS}",), whole_words=True)),
    ("gpt-4o llama4 kanana2 talkie minimax-m2", Splits(_GPT4O)),
    ("tiny_aya cohere2moe", Splits(_TINY_AYA)),
    ("bailingmoe bailingmoe2 llada-moe", Splits(_BAILING)),
    ("seed-coder", Splits((_qwen2(symbols=r" ?[^\s\p{L}\p{N}\r\n]+"),))),
    ("ufakzeka", Splits((rf"{WORDS}|\p{{N}}|{SYMBOLS}|{TAIL}",))),
    ("minicpm5", Splits((r"\p{N}{1,3}", _qwen2(digits=r"\p{N}+")), whole_words=True)),
    ("laguna", Splits((*_LINES, _qwen2()))),
    (
        "exaone-moe",
        Splits(
            (
                rf"{_EITHER_CASE}|[^\r\n\p{{L}}\p{{N}}]?(?:\p{{L}}\p{{M}}*(?: \p{{L}}\p{{M}}*)*)+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]?|"
                r"\s*[\r\n]|\s+(?!\S)|\s+",
            )
        ),
    ),
    (
        "jais-2",
        Splits(
            (
                rf"{_EITHER_CASE}|{WORDS}|\p{{N}}{{1,3}}|{SYMBOLS}|\s*[\r\n]+|"
                + "|".join(rf"\s{{{count}}}(?!\S)" for count in (512, 256, 128, 64, 32, 16, 8, 4))
                + r"|\s{1,2}(?!\S)|\s{1}",
            )
        ),
    ),
    ("gemma4 granite-embed-multi-311m", Splits(_LINES, bytes_as_text=False)),
    ("sarvam-moe", Splits(_LINES, bytes_as_text=False)),
    ("poro-chat bloom gpt3-finnish", Splits((r" ?[^(\s|.,!?…。，、।۔،)]+",))),
    ("viking", Splits((r" ?[^(\s|.,!?…。，、।۔،)]+", r"\p{N}"))),
)

SPLITS: dict[str, Splits] = {name: splits for names, splits in _FAMILIES for name in names.split()}
"""By llama.cpp's name. A GGUF that names none is read as "default"."""
