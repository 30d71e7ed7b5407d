"""A model of an Ollama server as a base: its file on this machine, found through the server or in the folder where it keeps its models.

    tag = find_tag("llama3.2:3b")      # its name, the digest of its weights, their file

Nothing is downloaded and nothing is copied. The file is what its name says: its SHA-256 is computed once.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from olpack.deploy.client import OllamaClient
from olpack.deploy.model_info import ModelInfo
from olpack.deploy.names import check_name, parse_name
from olpack.deploy.ollama_store import model_stores, read_manifest
from olpack.errors import OlpackError
from olpack.model.gguf_files import content_digest

_MODEL = "application/vnd.ollama.image.model"


@dataclass(frozen=True)
class ServedTag:
    """A model of the server, and its file here.

    Attributes:
        name: as a recipe names it, "llama3.2:3b".
        blob: digest of its weights, `sha256:<64 hex>`.
        path: their file on this machine.
        info: what the server reports of it; None where none answers.
        manifest: what the store has of it; empty where its store is not found.
    """

    name: str
    blob: str
    path: Path
    info: ModelInfo | None = None
    manifest: dict[str, Any] = field(default_factory=dict)


def find_tag(name: str) -> ServedTag:
    """The file of a model of the server.

    Raises:
        OlpackError: no legal name, no such model, one without a file here, one with an adapter, a file that cannot be read or is not what its
            name says.
    """
    check_name(name)
    client = OllamaClient()
    info = None
    if client.version():
        info = client.show(name)
        if info is None:
            raise OlpackError(f"The Ollama server at {client.url} has no {name}.", f"Run `ollama pull {name}`, or name one that `ollama list` shows.")
        if info.blob is None or info.path is None:
            raise OlpackError(
                f"{name} has no file on this machine: it is a cloud model, or none that the server keeps as a GGUF.",
                "Name a model that `ollama pull` downloads.",
            )
        if info.adapter:
            raise OlpackError(f"{name} has an adapter already, and another one would be added to it.", "Name the model that it was made from.")
    manifests = [manifest for store in model_stores() if (manifest := read_manifest(store, parse_name(name)))]
    found = info.blob if info else next((weights for manifest in manifests if (weights := _weights(name, manifest))), None)
    if found is None:
        looked = ", ".join(map(str, model_stores()))
        raise OlpackError(
            f"No Ollama server answers at {client.url}, and no model store here has {name} (looked in {looked}).",
            f"Start the server with `ollama serve`, run `ollama pull {name}`, or set OLLAMA_MODELS to where its models are.",
        )
    path = _file(name, found, info, client)
    if f"sha256:{content_digest(path, name)}" != found:
        raise OlpackError(
            f"The file of {name}, {path}, is not what its name says: its SHA-256 is another one.", f"Run `ollama rm {name}` and `ollama pull {name}`."
        )
    return ServedTag(name, found, path, info, next((one for one in manifests if _weights(name, one) == found), {}))


def _weights(name: str, manifest: dict[str, Any]) -> str | None:
    """Digest of the weights that a manifest names.

    Raises:
        OlpackError: it names an adapter, too, or several files of weights.
    """
    layers = [layer for layer in manifest["layers"] if isinstance(layer, dict)]
    if any(layer.get("mediaType") == "application/vnd.ollama.image.adapter" for layer in layers):
        raise OlpackError(f"{name} has an adapter already, and another one would be added to it.", "Name the model that it was made from.")
    found = [str(layer.get("digest")) for layer in layers if layer.get("mediaType") == _MODEL]
    if len(found) > 1:
        raise OlpackError(f"{name} consists of {len(found)} files of weights.", "Name a model of one file, or the GGUF itself.")
    return found[0] if found else None


def _file(name: str, blob: str, info: ModelInfo | None, client: OllamaClient) -> Path:
    named = [Path(info.path)] if info and info.path else []
    places = [*named, *(store / "blobs" / blob.replace(":", "-") for store in model_stores())]
    locked = None
    for path in places:
        try:
            there = path.is_file()
        except PermissionError:
            there, locked = False, path
        if there and os.access(path, os.R_OK):
            return path
        if there:
            locked = path
    if locked is not None:
        raise OlpackError(
            f"The file of {name}, {locked}, is another user's and cannot be read.",
            "Run olpack as that user, join its group (sudo usermod -aG ollama $USER), or copy the file and name the copy as base.",
        )
    if not client.here:
        raise OlpackError(
            f"The Ollama server at {client.url} runs on another machine, and the file of {name} is there.",
            "Run olpack there, or copy the file here and name it as base: base: path/to/model.gguf.",
        )
    raise OlpackError(
        f"The file of {name} is not found on this machine ({places[0]}).", "Set OLLAMA_MODELS to the folder that the server has it set to."
    )
