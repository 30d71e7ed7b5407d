"""A GGUF as the source of others: its header's keys as they are, its tensors still to be loaded, an adapter added.

Runs in the worker process only, on the converter's own `gguf` package.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from olpack.errors import OlpackError
from olpack.export.adapter import Adapter, read_adapter
from olpack.export.converter import FLOATS, SourceModel, SourceTensor, set_keys
from olpack.llamacpp import library
from olpack.model.gguf_architectures import Weight, config_of, tensor_headers, weights_of
from olpack.model.gguf_base import GgufBase, GgufTensor, open_gguf
from olpack.model.gguf_blocks import INTEGERS
from olpack.model.gguf_header import read_header
from olpack.model.shape import MetaModel

_SPLIT = ("split.count", "split.no", "split.tensors.count")
_OUTPUT = "output.weight"


def open_source(
    source: Path,
    *,
    adapter: Path | None = None,
    requantize: bool = False,
    name: str | None = None,
    chat_template: str | None = None,
    end_of_turn: str | None = None,
    metadata: Mapping[str, str] | None = None,
) -> SourceModel:
    """Open a GGUF: one in F16, BF16 or F32, or with an adapter or `requantize` one of any type that olpack trains on. The arguments are those of
    `olpack.export.export`.

    A quantized tensor has its dequantized values. Where the adapter leaves them, and a file wants the very type, it gets the source's bytes.

    Raises:
        OlpackError: no GGUF, a truncated one, one that is quantized already and gets no adapter, or an adapter for another base.
    """
    import gguf

    read_header(source)  # which refuses what would keep gguf busy, or fail in it
    base = open_gguf(source)
    if adapter is None and not requantize:
        _refuse_quantized(base)
    try:
        reader = gguf.GGUFReader(source)
    except (ValueError, OSError, IndexError) as error:
        raise OlpackError(f"'{source}' is no whole GGUF file: {error}.", "Download or make it again.") from error
    keys = {key: _value(field) for key, field in reader.fields.items() if not key.startswith("GGUF.") and key not in _SPLIT}
    writer = gguf.GGUFWriter(None, base.architecture)
    writer.kv_data = [keys]
    if name is not None:
        writer.add_name(name)
    set_keys(writer, chat_template, end_of_turn, metadata or {})
    tensors = {one.name: _stored(base, one) for one in base.tensors.values()}
    if adapter is not None:
        tensors |= _merged(base, adapter)
    elif requantize:  # an adapter comes later
        for one in tensors.values():
            one.changed = one.stored[0] if one.stored is not None and one.name.startswith("blk.") else None
    return SourceModel(writer.arch, tensors, dict(writer.kv_data[0]))


def _refuse_quantized(base: GgufBase) -> None:
    for tensor in base.tensors.values():
        if tensor.type.name not in (*FLOATS, *INTEGERS):
            raise OlpackError(
                f"'{tensor.path}' is quantized already: '{tensor.name}' is {tensor.type.name}.", "Start from an F16, BF16 or F32 file of the model."
            )


def _value(field: Any) -> Any:
    from gguf.gguf_writer import GGUFValue

    return GGUFValue(field.contents(), field.types[0], field.types[-1] if len(field.types) > 1 else None)


def _stored(base: GgufBase, tensor: GgufTensor) -> SourceTensor:
    """A tensor as the file has it; a quantized one counts as 16 bits, as llama.cpp's converter would store it."""
    if tensor.type.name in INTEGERS:
        return _tensor(tensor, tensor.type.name, lambda: _blocks(base, tensor.name).reshape(-1))
    quantized = tensor.type.name not in FLOATS
    blocks = (library.tensor_type(tensor.type.name), partial(_blocks, base, tensor.name)) if quantized else None
    return _tensor(tensor, "BF16" if quantized else tensor.type.name, partial(_values, base, tensor.name), blocks)


def _tensor(
    tensor: GgufTensor, type_name: str, load: Callable[[], np.ndarray], stored: tuple[int, Callable[[], np.ndarray]] | None = None
) -> SourceTensor:
    columns = tensor.shape[-1]
    rows = int(np.prod(tensor.shape[:-1], dtype=np.int64))
    nbytes = rows * library.row_size(library.tensor_type(type_name), columns)
    return SourceTensor(tensor.name, tensor.name, tensor.shape, type_name, nbytes, load, stored)


def _blocks(base: GgufBase, name: str) -> np.ndarray:
    return base.blocks(name).flatten(0, -2).numpy()


def _values(base: GgufBase, name: str) -> np.ndarray:
    return base.dequantized(name).view(-1, base.tensors[name].shape[-1]).numpy()


def _merged(base: GgufBase, adapter: Path) -> dict[str, SourceTensor]:
    """The tensors that an adapter changes."""
    config = config_of(base)
    change = read_adapter(adapter, tensor_headers(base), tied=config["tie_word_embeddings"])
    if change.vocabulary is not None:
        raise OlpackError(
            f"The adapter '{adapter}' has another vocabulary than '{base.paths[0]}', whose tokenizer is in the file.",
            "Name the folder of the model that it was trained on.",
        )
    weights = weights_of(base, MetaModel(config, str(base.paths[0])).module)
    tensors = {}
    for name in sorted(change.tensors):
        weight = weights[change.untied.get(name, name)]
        for stored in weight.tensors:
            tensor = base.tensors[stored]
            type_name = tensor.type.name if tensor.type.name in FLOATS else "BF16"
            if name in change.untied:
                tensor = replace(tensor, name=_OUTPUT)
            tensors[tensor.name] = changed = _tensor(tensor, type_name, partial(_changed, base, change, name, weight, stored))
            changed.changed = library.tensor_type(tensor.type.name) if tensor.type.name not in FLOATS else None
    return tensors


def _changed(base: GgufBase, change: Adapter, name: str, weight: Weight, stored: str) -> np.ndarray:
    import torch

    with torch.inference_mode():
        values = weight.restore(change.apply(name, weight.read(base, torch.float32)))[stored]
    return values.reshape(-1, values.shape[-1]).contiguous().numpy()
