"""The base that a recipe names, whether it is a folder, a GGUF, a model of the Hub, or a model of the Ollama server.

base = resolve_base("ollama/llama3.2:3b", relative_to=folder, served=True)
"""

from __future__ import annotations

from pathlib import Path

from olpack.deploy.served_template import served_template
from olpack.deploy.tag_bases import find_tag
from olpack.model.base import OF_SERVER, Base, of_gguf, resolve
from olpack.model.gguf_files import open_model


def resolve_base(label: str, *, relative_to: Path, revision: str | None = None, weights: bool = True, served: bool = False) -> Base:
    """As `olpack.model.base.resolve`, also for a model of the server.

    Args:
        served: the base is trained with the prompts with which the server serves it, and not only with the GGUF's chat template.

    Raises:
        OlpackError: as `resolve`, `find_tag` and `served_template`.
    """
    if not label.startswith(OF_SERVER):
        return resolve(label, relative_to=relative_to, revision=revision, weights=weights)
    tag = find_tag(label.removeprefix(OF_SERVER))
    own = open_model(tag.path).metadata.get("tokenizer.chat_template")
    if not served and own:
        return of_gguf(label, tag.path, tag=tag.name)
    written = served_template(tag, of_gguf(label, tag.path).tokenizer())
    return of_gguf(label, tag.path, tag=tag.name, template=None if written == own else written)
