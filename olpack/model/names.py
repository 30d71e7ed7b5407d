"""Names of tensors and modules where a checkpoint, transformers' module tree and peft differ in the containers around the text model."""

from __future__ import annotations

from collections.abc import Mapping

from olpack.errors import OlpackError
from olpack.model.checkpoint import TensorHeader

HEAD = "lm_head.weight"
EMBEDDINGS = ("embed_tokens.weight", "wte.weight")
_CONTAINERS = ("model", "language_model", "transformer")


def short_name(name: str) -> str:
    """The name of a tensor or module without the containers that a checkpoint nests otherwise than the class does."""
    return ".".join(part for part in name.split(".") if part not in _CONTAINERS)


class BaseNames:
    """The base's name for a tensor that peft names after the module tree.

    The two differ for models that a checkpoint nests otherwise than the class does ("language_model.model.layers…" and
    "model.language_model.layers…"), so containers of that kind are left out of the comparison where the plain name is not found.

    Attributes:
        embedding: the base's name of its input embedding, None where it has no usual one.
        head: the name of its output layer, also where it has none (`headless`) because it uses the embedding as such.
    """

    def __init__(self, base: Mapping[str, TensorHeader]):
        self._base = base
        self._short: dict[str, str] = {}
        for name in base:
            self._short[short_name(name)] = name
        self.embedding = next((name for name in base if name.endswith(EMBEDDINGS)), None)
        self.headless = self.embedding is not None and "lm_head" not in {name.split(".")[-2] for name in base if "." in name}
        self.head = self._short.get(HEAD, HEAD)

    @property
    def vocabularies(self) -> tuple[str, ...]:
        """The tensors that have a row for each token."""
        return () if self.embedding is None else (self.embedding, self.head)

    def get(self, name: str) -> str | None:
        """The base's name of a tensor, None where it has no such tensor. An output layer that is the embedding has the name `head`."""
        found = name if name in self._base else self._short.get(short_name(name))
        return self.head if found is None and self.headless and short_name(name) == HEAD else found

    def find(self, name: str) -> str:
        """As `get`.

        Raises:
            OlpackError: the base has no such tensor.
        """
        found = self.get(name)
        if found is not None:
            return found
        if name.endswith(".bias"):
            raise OlpackError(
                f"The adapter trained the bias '{name}' (bias: all or lora_only), and the base has none there.",
                "Name the base that it was trained on, or train with bias: none.",
            )
        raise OlpackError(
            f"The adapter is for another base: it changes '{name}', which the base does not have.", "Name the base that it was trained on."
        )
