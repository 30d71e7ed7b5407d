"""What llama.cpp reads back from a header: the keys that were meant, and a tokenizer that makes of text what the model's own makes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from olpack.errors import OlpackError
from olpack.export.plan import FilePlan
from olpack.llamacpp.vocabulary import Vocabulary

# Code, contractions in both cases, runs of spaces and of digits, and some scripts: where pre-tokenizers differ.
_SAMPLE = """def is_prime(n: int) -> bool:
    \"\"\"Return True if n is prime; it's 2, 3, 5, ... 1234567.\"\"\"
\tif n < 2 or (n % 2 == 0 and n != 2):\r\n        return   False

    return all(n % i for i in range(3, int(n**0.5) + 1, 2))


I'LL say we've DON'T; email@example.com, 3.14159 + 10_000 = x²? «Naïve café» — Привет, мир! 你好，世界 こんにちは 안녕하세요 🙂🎉
"""


def verify_tokenizer(source: Path, gguf: Path) -> list[str]:
    """Compare llama.cpp's tokens of a sample with the model's own.

    Args:
        source: the model's folder. Without a tokenizer.json nothing is compared.
        gguf: a GGUF with its vocabulary.

    Returns:
        A warning where they differ, else nothing.

    Raises:
        OlpackError: llama.cpp does not accept the header or the vocabulary.
    """
    try:
        with Vocabulary(gguf) as vocabulary:
            found = vocabulary.tokenize(_SAMPLE)
    except OlpackError as error:
        reason = error.problem.rpartition(f"'{gguf}': ")[2]
        raise OlpackError(
            f"llama.cpp would refuse the model made from '{source}': {reason}", "Compare its tokenizer with the publisher's."
        ) from error
    path = source / "tokenizer.json"
    if not path.is_file():
        return []
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(path))
    expected = tokenizer.encode(_SAMPLE, add_special_tokens=False).ids
    if found == expected:
        return []
    place = next((i for i, (a, b) in enumerate(zip(found, expected, strict=False)) if a != b), min(len(found), len(expected)))
    return [
        f"llama.cpp splits text otherwise than the tokenizer of '{source}' (the first difference comes after "
        f"{tokenizer.decode(expected[max(0, place - 4) : place])!r}), so the exported model sees other tokens than the trained one."
    ]


def verify_file(parts: Sequence[tuple[FilePlan, Path]], keys: Mapping[str, Any]) -> None:
    """Check a written file against its plan: its size, its file type, and every text in its header.

    Args:
        parts: what the file consists of, mostly one: what it should hold, and where it is.
        keys: the header's keys, as in `SourceModel.keys`.

    Raises:
        OlpackError: llama.cpp does not read back what was meant.
    """
    for plan, path in parts:
        if path.stat().st_size != plan.size:
            raise OlpackError(f"'{path}' has {path.stat().st_size:,} bytes instead of {plan.size:,}.", "Check the disk, and export again.")
    quant, first = parts[0][0].quant, parts[0][1]
    meant = {name: key.value for name, key in keys.items() if isinstance(key.value, str)} | {"general.file_type": str(quant.ftype)}
    with Vocabulary(first) as vocabulary:
        for name, value in meant.items():
            if vocabulary.key(name) != value:
                raise OlpackError(
                    f"llama.cpp reads {vocabulary.key(name)!r} as '{name}' of the {quant.name} file, and {value!r} was written.",
                    "Leave characters out that text cannot hold, such as a null.",
                )
