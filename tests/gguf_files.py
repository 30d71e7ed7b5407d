"""Small quantized GGUFs of whole models with random weights, made by the exporter from `tiny_models`."""

from __future__ import annotations

import struct
from pathlib import Path

from tiny_models import converter, write_model

from olpack.export import Target


def write_gguf(folder: Path, chat_template: str | None = None, *, quant: str = "Q4_K_M", model_type: str = "llama", **options: object) -> Path:
    """A GGUF of a model of two layers. The model's own folder beside it is made where it is not there yet.

    Args:
        folder: for both.
        chat_template: of the file; None: that of `tiny_models`.
        options: of the export.
    """
    model = folder / model_type
    if not model.is_dir():
        write_model(model, model_type)
    path = folder / f"{model_type}-{quant}-{abs(hash(chat_template))}.gguf"
    converter().export(model, [Target(quant, path)], chat_template=chat_template, **options)
    return path


def with_text(source: Path, key: str, value: str, path: Path) -> Path:
    """A copy of a GGUF in which a text of the header is another one of the same length, so that all else stays where it is."""
    content = source.read_bytes()
    name = struct.pack("<Q", len(key)) + key.encode()
    at = content.index(name) + len(name) + 4
    length = struct.unpack_from("<Q", content, at)[0]
    assert length == len(value.encode()), f"{key} has {length} bytes"
    path.write_bytes(content[: at + 8] + value.encode() + content[at + 8 + length :])
    return path
