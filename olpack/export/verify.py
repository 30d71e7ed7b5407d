"""Checks of a header in llama.cpp: it loads the model, splits text as the model's own tokenizer does, and reads every key as written."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from olpack import progress
from olpack.errors import OlpackError
from olpack.export.converter import PHI3_NAMES, SourceModel
from olpack.export.job import TokenDifference, TokenText
from olpack.export.plan import FilePlan, vocabulary_file
from olpack.export.pretokenizer import NAMES, recognize
from olpack.llamacpp.vocabulary import Vocabulary
from olpack.model.base import load_tokenizer

if TYPE_CHECKING:
    from tokenizers import Tokenizer

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


def training_tokenizer(folder: Path) -> Tokenizer | None:
    """The tokenizer that training uses, None for a GGUF or a folder without tokenizer.json.

    It is not always what that file describes: of some classes (GPT2Tokenizer, Qwen2Tokenizer) transformers takes the vocabulary from the file and
    splits text in the way of the class.
    """
    from tokenizers import Tokenizer

    path = folder / "tokenizer.json"
    if not path.is_file():
        return None
    try:
        return load_tokenizer(folder).backend_tokenizer
    except (OSError, ValueError, KeyError, AttributeError):  # a class that transformers does not know: such a folder is only converted
        return Tokenizer.from_file(str(path))


def settle_pretokenizer(
    folder: Path,
    tokenizer: Tokenizer | None,
    model: SourceModel,
    texts: Sequence[TokenText] = (),
    report: Callable[[int, int], None] = lambda *_: None,
) -> list[TokenDifference]:
    """Have a model's header name the pre-tokenizer with which llama.cpp splits text as training does.

    The converter goes by a hash of one text's tokens, which tokenizers that split otherwise can share. Its choice stays where it reads all texts
    and a sample right, or where no other reads more of them before the first that differs.

    Args:
        folder: of tokenizer.json.
        tokenizer: the one that training uses.
        model: changed here.
        texts: with training's tokens; those that matter most come first.
        report: progress over the texts.

    Returns:
        Where llama.cpp's tokens are not training's; one entry for each text that differs.
    """
    key = model.keys.get("tokenizer.ggml.pre")
    names: list[str | None] = [None]
    if key is not None and tokenizer is not None and "ByteLevel" in str(tokenizer.pre_tokenizer):
        try:
            recognized = [recognize(folder)]
        except OlpackError:
            recognized = []
        names = list(dict.fromkeys([key.value, *recognized, *NAMES]))
    if tokenizer is not None:
        texts = [*texts, TokenText("", [_SAMPLE], tokenizer.encode(_SAMPLE, add_special_tokens=False).ids)]
    if not texts:
        return []
    best = -1
    found: dict[int, TokenDifference] = {}
    for name in names:
        with vocabulary_file(model, name) as file, Vocabulary(file) as vocabulary:
            differing = token_differences(vocabulary, texts, report if best < 0 else lambda *_: None)
        read = min(differing, default=len(texts))
        if read > best:
            best, found = read, differing
            if key is not None and name is not None:
                model.keys["tokenizer.ggml.pre"] = replace(key, value=name)
        if all(texts[place].made_up for place in differing):
            break
    return [difference for difference in found.values() if difference.source]


def compare_tokens(gguf: Path, texts: Sequence[TokenText]) -> list[TokenDifference]:
    """Where llama.cpp's tokens of texts, by the vocabulary of a GGUF, are not training's; one entry for each text that differs."""
    with Vocabulary(gguf) as vocabulary, progress.task("comparing tokens with llama.cpp's", len(texts), "texts") as task:
        return list(token_differences(vocabulary, texts, lambda done, _: task.advance(done)).values())


def token_differences(vocabulary: Vocabulary, texts: Sequence[TokenText], report: Callable[[int, int], None]) -> dict[int, TokenDifference]:
    """Where llama.cpp's tokens of texts are not training's, by the text's place."""
    found = {}
    for place, text in enumerate(texts):
        read = [token for piece in text.pieces for token in vocabulary.tokenize(piece)]
        if read != text.ids:
            pairs = enumerate(zip(read, text.ids, strict=False))
            at = next((index for index, (one, other) in pairs if one != other), min(len(read), len(text.ids)))
            before = text.ids[max(0, at - _AROUND) : at]
            found[place] = TokenDifference(text.source, before, text.ids[at : at + _AROUND], read[at : at + _AROUND])
        report(1, len(texts))
    return found


def verify_model(source: Path, tokenizer: Tokenizer | None, gguf: Path, keys: Mapping[str, Any]) -> list[str]:
    """Have llama.cpp load a model without its weights, check the texts of its header, and compare its tokens of a sample with training's.

    Args:
        source: the model's folder, for messages.
        tokenizer: the one that training uses. Without it no tokens are compared.
        gguf: a GGUF of the model, whose data may be missing.
        keys: of its header, as in `SourceModel.keys`.

    Returns:
        A warning where they differ, else nothing.

    Raises:
        OlpackError: llama.cpp does not accept the header or the vocabulary, lacks a tensor, expects one in another shape, or reads another
            text than was written.
    """
    try:
        opened = Vocabulary(gguf, whole=True)
    except OlpackError as error:
        reason = error.problem.rpartition(f"'{gguf}': ")[2].rpartition("error loading model: ")[2]
        raise OlpackError(
            f"llama.cpp would refuse the model made from '{source}': {' '.join(reason.split())}",
            "Compare its config.json, weights and tokenizer with the publisher's.",
        ) from error
    with opened as vocabulary:
        _verify_keys(vocabulary, keys)
        return [] if tokenizer is None else _sample_differences(source, tokenizer, vocabulary)


def _sample_differences(source: Path, tokenizer: Tokenizer, vocabulary: Vocabulary) -> list[str]:
    found, expected = vocabulary.tokenize(_SAMPLE), tokenizer.encode(_SAMPLE, add_special_tokens=False).ids
    if found == expected:
        return _stripping_differences(source, tokenizer, vocabulary)
    place = next((i for i, (a, b) in enumerate(zip(found, expected, strict=False)) if a != b), min(len(found), len(expected)))
    return [
        f"llama.cpp splits text otherwise than the tokenizer of '{source}' (the first difference comes after "
        f"{tokenizer.decode(expected[max(0, place - 4) : place])!r}), so the exported model sees other tokens than the trained one."
    ]


def _stripping_differences(source: Path, tokenizer: Tokenizer, vocabulary: Vocabulary) -> list[str]:
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
        parts: of the file, mostly one: the plan of each, and its path.
        keys: the header's keys, as in `SourceModel.keys`.

    Raises:
        OlpackError: llama.cpp reads something else than was written.
    """
    for plan, path in parts:
        if path.stat().st_size != plan.size:
            raise OlpackError(f"'{path}' has {path.stat().st_size:,} bytes instead of {plan.size:,}.", "Check the disk, and export again.")
    quant, first = parts[0][0].quant, parts[0][1]
    with Vocabulary(first) as vocabulary:
        _verify_keys(vocabulary, keys, {"general.file_type": str(quant.ftype)})


def _verify_keys(vocabulary: Vocabulary, keys: Mapping[str, Any], more: Mapping[str, str] = {}) -> None:
    """Check that llama.cpp reads every text of a header as it was written.

    Args:
        vocabulary: of the file.
        keys: as in `SourceModel.keys`.
        more: further keys, with the text that llama.cpp gives for each.

    Raises:
        OlpackError: a text differs.
    """
    meant = {name: key.value for name, key in keys.items() if isinstance(key.value, str)} | dict(more)
    for name, value in meant.items():
        if vocabulary.key(name) != value:
            raise OlpackError(
                f"llama.cpp reads {vocabulary.key(name)!r} as '{name}', and {value!r} was written.",
                "Remove characters that text cannot contain, such as a null.",
            )
