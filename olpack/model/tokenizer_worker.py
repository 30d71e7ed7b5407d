"""Tokenizes texts in a worker, as `tokenizer_trial` asks: `python -m olpack.model.tokenizer_worker`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from olpack.trials import serve

_loaded: dict[str, Any] = {}


def attempt(asked: tuple[str, list[str]]) -> None:
    """Tokenize texts with the tokenizer of a folder, which is loaded once."""
    from tokenizers import Tokenizer

    from olpack.model.base import load_untried

    folder, texts = asked
    if folder not in _loaded:
        own = Tokenizer.from_file(str(Path(folder, "tokenizer.json")))
        for text in texts:
            own.decode(own.encode(text).ids)
        _loaded[folder] = load_untried(Path(folder))
    for special in (True, False):
        _loaded[folder](texts, add_special_tokens=special, return_offsets_mapping=True, return_attention_mask=False, verbose=False)


if __name__ == "__main__":
    serve(attempt)
