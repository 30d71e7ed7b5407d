"""Tokenizes texts in a worker, as `tokenizer_trial` asks: `python -m olpack.model.tokenizer_worker`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from olpack.trials import serve

_loaded: list[Any] = []


def attempt(asked: tuple[str | None, list[str]]) -> None:
    """Load the tokenizer of a folder, if one is named, and tokenize texts."""
    from olpack.model.base import load_untried

    folder, texts = asked
    if folder is not None:
        from tokenizers import Tokenizer

        _loaded[:] = [load_untried(Path(folder))]
        own = Tokenizer.from_file(str(Path(folder, "tokenizer.json")))
        for text in texts:
            own.decode(own.encode(text).ids)
    (tokenizer,) = _loaded
    for special in (True, False):
        tokenizer(texts, add_special_tokens=special, return_offsets_mapping=True, return_attention_mask=False, verbose=False)


if __name__ == "__main__":
    serve(attempt)
