"""The tokenizer that olpack builds from a GGUF against llama.cpp's vocabulary of the same file, on texts that tokenizers get wrong.

    python benchmarks/gguf_tokenizers.py llama.cpp/models/ggml-vocab-*.gguf model.gguf

Vocabularies alone will do, as llama.cpp's source has them. Prints a Markdown table.
"""

from __future__ import annotations

import random
import sys
import tempfile
from datetime import date
from pathlib import Path

from olpack.deploy.prompt_identity import HARD
from olpack.errors import OlpackError
from olpack.llamacpp.vocabulary import Vocabulary
from olpack.model.base import load_tokenizer
from olpack.model.gguf_header import read_header
from olpack.model.gguf_tokenizer import write_tokenizer

TEXTS = [
    "\n    1",
    "éCole ÉCOLE iPhone XMLHttpRequest ǅ ªº ʰ",
    "a\u0301 e\u0308 नमस्ते ไทย বাংলা",
    "1234567 12 3,456.78 ²³ Ⅷ ٣٤٥",
    "\n\n\n  \t x",
    "   ",
    "a  b   c    d\r\n\r\n\te ",
    "I'LL we've DON'T it's 's 'S 'Ré",
    "日本語テスト。これは「括弧」です！ 한국어 你好，世界",
    "👩‍💻👨‍👩‍👧🏽🇩🇪 ∑∫≠ $x^2$ ~`@#%&*",
    "\u00a0\u2003\u3000\u200b\ufeff x \u0085 y \u2028z",
    "<s></s><unk><|im_start|>user\nhi<|im_end|>\n<|endoftext|>",
    "АБВ абв ﬀ Ａｂ １２３ שלום مرحبا Ünïcödé ßß",
    "<0x0A><0xFF> ▁▁ ▁a",
]
_RANGES = [
    (32, 127),
    (0xA0, 0x250),
    (0x370, 0x530),
    (0x3040, 0x30FF),
    (0x4E00, 0x9FFF),
    (48, 58),
    (0x2000, 0x2BFF),
    (0x600, 0xDFF),
    (32, 33),
    (10, 11),
]


def texts() -> list[str]:
    """The hard conversations' turns, the texts above, and 200 of random characters of several scripts."""
    dice = random.Random(0)
    made = ["".join(chr(dice.randrange(*dice.choice(_RANGES))) for _ in range(dice.randrange(5, 60))) for _ in range(200)]
    return [turn["content"] for turns in HARD.values() for turn in turns] + TEXTS + made


def row(path: Path, wanted: list[str]) -> str:
    header = read_header(path)
    kind = f"{header.text('tokenizer.ggml.model')}, {header.text('tokenizer.ggml.pre') or '–'}"
    with tempfile.TemporaryDirectory() as folder:
        try:
            write_tokenizer(path, Path(folder))
        except OlpackError as error:
            return f"| {path.stem} | {kind} | | refused: {error.problem.partition(' has ')[2] or error.problem} |"
        built = load_tokenizer(Path(folder))
        with Vocabulary(path) as vocabulary:
            same = sum(built(text, add_special_tokens=False)["input_ids"] == vocabulary.tokenize(text) for text in wanted)
    return f"| {path.stem} | {kind} | {len(built):,} | {same} of {len(wanted)} |"


def main() -> None:
    wanted = texts()
    print("# Tokenizers built from GGUF files\n")
    print(f"{date.today()}, by `python benchmarks/gguf_tokenizers.py FILE …`. `same`: texts of which the built tokenizer makes llama.cpp's tokens.\n")
    print("| file | vocabulary, pre-tokenizer | tokens | same |\n| --- | --- | ---: | ---: |")
    for name in sys.argv[1:]:
        print(row(Path(name), wanted), flush=True)


if __name__ == "__main__":
    main()
