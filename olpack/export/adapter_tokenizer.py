"""The tokenizer of an adapter that was trained with more tokens than its base knows."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from olpack import bounded_json
from olpack.errors import OlpackError
from olpack.export.adapter import Adapter
from olpack.model.checkpoint import TOKENIZER_FILES, TensorHeader
from olpack.model.names import BaseNames


def adapter_tokenizer(folder: Path, source: Path, adapter: Adapter, base: Mapping[str, TensorHeader]) -> tuple[Path | None, str | None]:
    """The folder whose tokenizer goes into the file in place of the base's, if one does, and a warning where one cannot.

    Args:
        folder: of the adapter.
        source: of the base.
        adapter: what is in `folder`.
        base: the base's tensors.

    Raises:
        OlpackError: the vocabulary grew, and the adapter's folder has no tokenizer.
    """
    embedding = BaseNames(base).embedding
    rows = base[embedding].shape[0] if embedding else 0
    has_one = any((folder / name).is_file() for name in TOKENIZER_FILES if name not in ("tokenizer_config.json", "chat_template.jinja"))
    if adapter.vocabulary is not None:
        if has_one:
            return folder, None
        if adapter.vocabulary > rows:
            raise OlpackError(
                f"The vocabulary of the adapter '{folder}' grew by {adapter.vocabulary - rows:,} tokens to {adapter.vocabulary:,}, and "
                "there is no tokenizer beside it.",
                "Put the tokenizer that it was trained with there (tokenizer.save_pretrained).",
            )
        return None, None
    tokens, new = (_tokens(place / "tokenizer.json") for place in (source, folder))
    more = {index: text for index, text in new.items() if index not in tokens}
    if not tokens or not more or any(new.get(index) != text for index, text in tokens.items()):
        return None, None  # the base's tokens, or an unrelated tokenizer of another model
    if max(more) < rows:
        return folder, None
    token = more[max(more)]
    return None, (
        f"The tokenizer beside the adapter '{folder}' has {len(more):,} tokens that the base's lacks ({token!r}), and the adapter "
        "no rows for them: the file gets the base's tokenizer."
    )


def _tokens(path: Path) -> dict[int, str]:
    """Number to text of every token of a tokenizer.json; none where there is no such file."""
    try:
        found = bounded_json.read_object(path, "Save the adapter again.")
        vocabulary = found["model"]["vocab"]
        pairs = vocabulary.items() if isinstance(vocabulary, dict) else ((text, index) for index, (text, _) in enumerate(vocabulary))
        return {index: text for text, index in pairs} | {token["id"]: token["content"] for token in found.get("added_tokens") or ()}
    except (OlpackError, ValueError, KeyError, TypeError, AttributeError):
        return {}
