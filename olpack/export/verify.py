"""What llama.cpp makes of a header: a model that it loads, the tokens that the model's own tokenizer makes of text, the keys that were meant."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from olpack.errors import OlpackError
from olpack.export.converter import PHI3_NAMES, SourceModel
from olpack.export.job import TokenDifference, TokenText
from olpack.export.plan import FilePlan, vocabulary_file
from olpack.export.pretokenizer import NAMES, recognize
from olpack.llamacpp.vocabulary import Vocabulary

# Code, contractions in both cases, runs of spaces and of digits, and some scripts: where pre-tokenizers differ.
_SAMPLE = """def is_prime(n: int) -> bool:
    \"\"\"Return True if n is prime; it's 2, 3, 5, ... 1234567.\"\"\"
\tif n < 2 or (n % 2 == 0 and n != 2):\r\n        return   False

    return all(n % i for i in range(3, int(n**0.5) + 1, 2))


I'LL say we've DON'T; email@example.com, 3.14159 + 10_000 = x²? «Naïve café» — Привет, мир! 你好，世界 こんにちは 안녕하세요 🙂🎉
rows = [
    1,
    22,
\t333]  # and 4444
"""
_AROUND = 4  # tokens shown on both sides of a difference


def settle_pretokenizer(source: Path, model: SourceModel) -> None:
    """Have a model's header name the pre-tokenizer that splits text as its tokenizer.json does.

    The converter goes by a hash of one text's tokens, which tokenizers that split otherwise can share. Its choice stays where it splits the sample
    right, or where no other does; then a warning of `verify_model` says so.
    """
    path, key = source / "tokenizer.json", model.keys.get("tokenizer.ggml.pre")
    if key is None or not path.is_file():
        return
    from tokenizers import Tokenizer

    expected = Tokenizer.from_file(str(path)).encode(_SAMPLE, add_special_tokens=False).ids
    try:
        recognized = [recognize(source)]
    except OlpackError:
        recognized = []
    for name in dict.fromkeys([key.value, *recognized, *NAMES]):
        with vocabulary_file(model, name) as file, Vocabulary(file) as vocabulary:
            if vocabulary.tokenize(_SAMPLE) == expected:
                model.keys["tokenizer.ggml.pre"] = replace(key, value=name)
                return


def token_differences(model: SourceModel, texts: Sequence[TokenText], report: Callable[[int, int], None]) -> list[TokenDifference]:
    """Where llama.cpp's tokens of texts are not training's; one entry for each text that differs."""
    found = []
    with vocabulary_file(model) as file, Vocabulary(file) as vocabulary:
        for text in texts:
            read = [token for piece in text.pieces for token in vocabulary.tokenize(piece)]
            if read != text.ids:
                pairs = enumerate(zip(read, text.ids, strict=False))
                at = next((index for index, (one, other) in pairs if one != other), min(len(read), len(text.ids)))
                found.append(TokenDifference(text.source, text.ids[max(0, at - _AROUND) : at], text.ids[at : at + _AROUND], read[at : at + _AROUND]))
            report(1, len(texts))
    return found


def verify_model(source: Path, gguf: Path) -> list[str]:
    """Have llama.cpp load a model without its weights, and compare its tokens of a sample with the model's own.

    Args:
        source: the model's folder. Without a tokenizer.json no tokens are compared.
        gguf: a GGUF of it, whose data may be missing.

    Returns:
        A warning where they differ, else nothing.

    Raises:
        OlpackError: llama.cpp does not accept the header or the vocabulary, lacks a tensor, or wants one in another shape.
    """
    try:
        with Vocabulary(gguf, whole=True) as vocabulary:
            return _token_differences(source, vocabulary)
    except OlpackError as error:
        reason = error.problem.rpartition(f"'{gguf}': ")[2].rpartition("error loading model: ")[2]
        raise OlpackError(
            f"llama.cpp would refuse the model made from '{source}': {' '.join(reason.split())}",
            "Compare its config.json, weights and tokenizer with the publisher's.",
        ) from error


def _token_differences(source: Path, vocabulary: Vocabulary) -> list[str]:
    path = source / "tokenizer.json"
    if not path.is_file():
        return []
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(path))
    found, expected = vocabulary.tokenize(_SAMPLE), tokenizer.encode(_SAMPLE, add_special_tokens=False).ids
    if found == expected:
        return _stripping_differences(source, tokenizer, vocabulary)
    place = next((i for i, (a, b) in enumerate(zip(found, expected, strict=False)) if a != b), min(len(found), len(expected)))
    return [
        f"llama.cpp splits text otherwise than the tokenizer of '{source}' (the first difference comes after "
        f"{tokenizer.decode(expected[max(0, place - 4) : place])!r}), so the exported model sees other tokens than the trained one."
    ]


def _stripping_differences(source: Path, tokenizer: Any, vocabulary: Vocabulary) -> list[str]:
    """A warning where special tokens swallow the spaces after them, as Phi-3's do, and llama.cpp, which goes by a model's name, keeps them."""
    greedy = [token.content for token in tokenizer.get_added_tokens_decoder().values() if token.rstrip]
    texts = {token: f"a{token}\n b" for token in greedy}
    for token, text in texts.items():
        if vocabulary.tokenize(text) != tokenizer.encode(text, add_special_tokens=False).ids:
            return [
                f"The tokenizer of '{source}' drops spaces and line breaks after '{token}', and llama.cpp keeps them under this name, so the "
                f"exported model sees other tokens than the trained one. llama.cpp drops them in models with '{PHI3_NAMES[0]}' in their name."
            ]
    return []


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
    verify_keys(first, keys, {"general.file_type": str(quant.ftype)})


def verify_keys(gguf: Path, keys: Mapping[str, Any], more: Mapping[str, str] = {}) -> None:
    """Check that llama.cpp reads every text of a header as it was meant.

    Args:
        gguf: the file, whose data may be missing.
        keys: as in `SourceModel.keys`.
        more: further keys, with the text that llama.cpp gives for each.

    Raises:
        OlpackError: a text differs.
    """
    meant = {name: key.value for name, key in keys.items() if isinstance(key.value, str)} | dict(more)
    with Vocabulary(gguf) as vocabulary:
        for name, value in meant.items():
            if vocabulary.key(name) != value:
                raise OlpackError(
                    f"llama.cpp reads {vocabulary.key(name)!r} as '{name}', and {value!r} was written.",
                    "Leave characters out that text cannot contain, such as a null.",
                )
