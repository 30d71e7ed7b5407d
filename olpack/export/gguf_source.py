"""A GGUF in 16 or 32 bits as the source of others: its header's keys as they are, its tensors still to be loaded.

Runs in the worker process only, on the converter's own `gguf` package.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from olpack.errors import OlpackError
from olpack.export.converter import FLOATS, SourceModel, SourceTensor, set_keys
from olpack.model.gguf_header import read_header


def open_gguf(
    source: Path,
    *,
    name: str | None = None,
    chat_template: str | None = None,
    end_of_turn: str | None = None,
    metadata: Mapping[str, str] | None = None,
) -> SourceModel:
    """Open an F16, BF16 or F32 GGUF. The arguments are those of `olpack.export.export`.

    Raises:
        OlpackError: no GGUF, a truncated one, one of several parts, or one that is quantized already.
    """
    import gguf

    read_header(source)  # which refuses what would keep gguf busy, or fail in it
    try:
        reader = gguf.GGUFReader(source)
    except (ValueError, OSError, IndexError) as error:
        raise OlpackError(f"'{source}' is no whole GGUF file: {error}.", "Download or make it again.") from error
    keys = {key: _value(field) for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    if "split.count" in keys:
        raise OlpackError(f"'{source}' is one part of a GGUF in several files.", "Join them with llama-gguf-split --merge.")
    for tensor in reader.tensors:
        kind = tensor.tensor_type.name
        if kind not in (*FLOATS, "I8", "I16", "I32", "I64"):
            raise OlpackError(f"'{source}' is quantized already: '{tensor.name}' is {kind}.", "Start from an F16, BF16 or F32 file of the model.")
    if "general.architecture" not in keys:
        raise OlpackError(f"'{source}' names no architecture.", "Download or make it again.")

    writer = gguf.GGUFWriter(None, keys["general.architecture"].value)
    writer.kv_data = [keys]
    if name is not None:
        writer.add_name(name)
    set_keys(writer, chat_template, end_of_turn, metadata or {})
    tensors = {
        tensor.name: SourceTensor(
            tensor.name,
            tensor.name,
            tuple(int(n) for n in reversed(tensor.shape)),
            tensor.tensor_type.name,
            tensor.n_bytes,
            _loader(tensor),
        )
        for tensor in reader.tensors
    }
    return SourceModel(writer.arch, tensors, dict(writer.kv_data[0]))


def _value(field: Any) -> Any:
    from gguf.gguf_writer import GGUFValue

    return GGUFValue(field.contents(), field.types[0], field.types[-1] if len(field.types) > 1 else None)


def _loader(tensor: Any) -> Any:
    columns = int(tensor.shape[0])

    def load() -> np.ndarray:
        import torch

        data = tensor.data.reshape(-1)
        if tensor.tensor_type.name == "BF16":
            return torch.from_numpy(data.view(np.int16)).view(torch.bfloat16).float().numpy().reshape(-1, columns)
        if tensor.tensor_type.name in FLOATS:
            return np.array(data, dtype=np.float32).reshape(-1, columns)
        return data.view(np.uint8)

    return load
