"""A GGUF opened for its header and vocabulary only, as llama.cpp itself reads them."""

from __future__ import annotations

import ctypes
import os
from dataclasses import dataclass
from pathlib import Path

from olpack.errors import OlpackError
from olpack.llamacpp.library import captured_log, load_llama_cpp

_KINDS = {1: "SPM", 2: "BPE", 3: "WPM", 4: "UGM", 5: "RWKV", 6: "PLaMo2"}  # enum llama_vocab_type
_UNKNOWN, _CONTROL, _USER_DEFINED, _LSTRIP, _RSTRIP = 1, 8, 16, 128, 256  # enum llama_token_attr


@dataclass(frozen=True)
class VocabularyToken:
    """One token as llama.cpp has it, after what it changes of a header.

    Attributes:
        text: as the vocabulary writes it.
        score: of a SentencePiece vocabulary: of two possible merges, that into the token of the higher score comes first.
        found: it is looked for in text before anything else is split.
        special: of those found, it is a control token and not a text that a user may write.
        strips_left, strips_right: white space beside it goes with it.
    """

    text: str
    score: float
    found: bool
    special: bool
    strips_left: bool
    strips_right: bool


class Vocabulary:
    """The header and the tokenizer of a GGUF. Its tensors are not read, so their data may be missing.

    Args:
        path: the file.
        whole: have llama.cpp also look for every tensor that the architecture has, in the shape that it must have.

    Raises:
        OlpackError: llama.cpp cannot read it.
    """

    def __init__(self, path: Path, *, whole: bool = False):
        self._llama = load_llama_cpp()
        params = self._llama.llama_model_default_params()
        if whole:
            params.no_alloc, params.load_mode, params.n_gpu_layers = True, self._llama.LLAMA_LOAD_MODE_NONE, 0
        else:
            params.vocab_only = True
        with captured_log() as log:
            self._model = self._llama.llama_model_load_from_file(os.fsencode(path), params)
        if not self._model:
            reasons = [line for line in "".join(log).splitlines() if "error" in line]
            raise OlpackError(f"llama.cpp cannot read '{path}': {reasons[0] if reasons else 'no reason given'}.", "Export it again.")
        self._vocab = self._llama.llama_model_get_vocab(self._model)

    def __enter__(self) -> Vocabulary:
        return self

    def __exit__(self, *exception: object) -> None:
        self._llama.llama_model_free(self._model)

    def key(self, name: str) -> str | None:
        """A scalar of the header as text, None if it is not there."""
        size = self._llama.llama_model_meta_val_str(self._model, name.encode(), None, 0)
        if size < 0:
            return None
        buffer = ctypes.create_string_buffer(size + 1)
        self._llama.llama_model_meta_val_str(self._model, name.encode(), buffer, size + 1)
        return buffer.value.decode("utf-8")

    def tokenize(self, text: str) -> list[int]:
        """Token ids of a text, without the tokens that a model adds around it."""
        data = text.encode("utf-8")
        tokens = (self._llama.llama_token * (len(data) + 8))()
        count = self._llama.llama_tokenize(self._vocab, data, len(data), tokens, len(tokens), False, True)
        return list(tokens[:count])

    @property
    def kind(self) -> str:
        """The algorithm: "BPE", "SPM", …; "" where the file has no vocabulary."""
        return _KINDS.get(self._llama.llama_vocab_type(self._vocab), "")

    @property
    def begins(self) -> bool:
        """Whether a text begins with the begin-of-sequence token."""
        return bool(self._llama.llama_vocab_get_add_bos(self._vocab))

    @property
    def ends(self) -> bool:
        """Whether a text ends with the end-of-sequence token."""
        return bool(self._llama.llama_vocab_get_add_eos(self._vocab))

    def end_ids(self) -> list[int]:
        """Tokens with which llama.cpp ends an answer."""
        count = self._llama.llama_vocab_n_tokens(self._vocab)
        return [number for number in range(count) if self._llama.llama_vocab_is_eog(self._vocab, number)]

    def tokens(self) -> list[VocabularyToken]:
        """Every token, in the order of their ids."""
        made = []
        for number in range(self._llama.llama_vocab_n_tokens(self._vocab)):
            flags = self._llama.llama_vocab_get_attr(self._vocab, number)
            text = self._llama.llama_vocab_get_text(self._vocab, number).decode("utf-8", "replace")
            found, special = flags & (_CONTROL | _USER_DEFINED | _UNKNOWN), flags & (_CONTROL | _UNKNOWN)
            score = self._llama.llama_vocab_get_score(self._vocab, number)
            made.append(VocabularyToken(text, score, bool(found), bool(special), bool(flags & _LSTRIP), bool(flags & _RSTRIP)))
        return made
