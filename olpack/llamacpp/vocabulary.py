"""A GGUF opened for its header and vocabulary only, as llama.cpp itself reads them."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

from olpack.errors import OlpackError
from olpack.llamacpp.library import captured_log, load_llama_cpp


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
