"""A GGUF as a base model: its parts, its header and its tensors in the blocks of the file.

    base = open_gguf(Path("model.gguf"))
    base.architecture                                  # "llama"
    base.blocks("blk.0.attn_q.weight")                 # uint8 [rows, bytes of a row], mapped into memory
    olpack.model.gguf_architectures.config_of(base)     # the fields of a config.json

Only headers are read; a tensor's bytes are read where they are used.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from olpack.errors import OlpackError
from olpack.model.gguf_blocks import FLOATS, INTEGERS, TYPES, BlockType
from olpack.model.gguf_header import PART, FileState, Header, Scalar, file_state, part_names, read_header

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class GgufTensor:
    """One tensor of a GGUF.

    Attributes:
        name: "blk.0.attn_q.weight".
        shape: dimensions, outermost first; the last one is that of a row.
        type: of its blocks.
        path: the file that contains it.
        offset: the byte of the file where its data begins.
        state: of the file when it was opened.
    """

    name: str
    shape: tuple[int, ...]
    type: BlockType
    path: Path
    offset: int
    state: FileState

    @property
    def nbytes(self) -> int:
        """Of its blocks."""
        return math.prod(self.shape[:-1]) * self.type.row_bytes(self.shape[-1])


@dataclass(frozen=True, eq=False)
class GgufBase:
    """An opened GGUF.

    Attributes:
        paths: its files, the first part first.
        metadata: key to number, bool or text, of the first part.
        lists: key to a list of numbers with at most 1000 entries, such as one of each layer.
        counts: key of any list to its number of entries: `counts["tokenizer.ggml.tokens"]`.
        tensors: of all parts, by name, in the order of the files.
    """

    paths: tuple[Path, ...]
    metadata: Mapping[str, Scalar]
    lists: Mapping[str, tuple[int | float, ...]]
    counts: Mapping[str, int]
    tensors: Mapping[str, GgufTensor] = field(repr=False)

    @property
    def architecture(self) -> str:
        """llama.cpp's name: "llama", "qwen3", "gemma3"."""
        return str(self.metadata["general.architecture"])

    @property
    def size(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def types(self) -> dict[str, int]:
        """Bytes of the matrices of each tensor type, the largest first: {"Q4_K": …, "Q6_K": …}."""
        found: dict[str, int] = {}
        for tensor in self.tensors.values():
            if len(tensor.shape) > 1:
                found[tensor.type.name] = found.get(tensor.type.name, 0) + tensor.nbytes
        return dict(sorted(found.items(), key=lambda item: -item[1]))

    @property
    def quantized(self) -> bool:
        """Whether any matrix has blocks of fewer than 16 bits."""
        return any(name not in (*FLOATS, *INTEGERS) for name in self.types)

    def integer(self, key: str) -> int | None:
        """A key of the architecture, "attention.head_count"; None where it is not there. A list of one number for each layer counts if all are one.

        Raises:
            OlpackError: it is no integer.
        """
        full = f"{self.architecture}.{key}"
        value = self.metadata.get(full)
        if value is None and len(of_layers := set(self.lists.get(full, ()))) == 1:
            (value,) = of_layers
        elif value is None and full in self.counts:
            raise OlpackError(f"'{self.paths[0]}' has a '{full}' for each layer, and olpack reads one for all.", "Take the model's folder as base.")
        if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
            raise OlpackError(f"'{self.paths[0]}' has '{full}' as {value!r}, which is no integer.", "Download or make it again.")
        return value

    def number(self, key: str) -> float | None:
        """A key of the architecture, "rope.freq_base"; None where it is not there.

        Raises:
            OlpackError: it is no finite number.
        """
        value = self.metadata.get(f"{self.architecture}.{key}")
        if value is not None and (isinstance(value, str | bool) or not math.isfinite(value)):
            raise OlpackError(f"'{self.paths[0]}' has '{self.architecture}.{key}' as {value!r}, which is no number.", "Download or make it again.")
        return value

    def blocks(self, name: str) -> torch.Tensor:
        """The blocks of a tensor, uint8 [..., bytes of a row], mapped into memory: a page is read when it is used, and what is written stays out of
        the file.

        Raises:
            OlpackError: another file has taken the place of the one that was opened.
        """
        tensor = self.tensors[name]
        bytes_ = _mapped(tensor.path, tensor.state)[tensor.offset : tensor.offset + tensor.nbytes]
        return bytes_.view(*tensor.shape[:-1], tensor.type.row_bytes(tensor.shape[-1]))

    def dequantized(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The weights of a tensor, in its shape, float32 by default. Of its own memory."""
        return self.tensors[name].type.dequantize(self.blocks(name), dtype)


@functools.lru_cache(maxsize=64)
def _mapped(path: Path, state: FileState) -> torch.Tensor:
    """The bytes of the file that has this state, uint8 [bytes], mapped for this process alone."""
    import torch

    if file_state(path.stat()) != state:
        raise OlpackError(f"'{path}' was replaced while it was read.", "Run the same command again.")
    return torch.from_file(str(path), shared=False, size=state[0], dtype=torch.uint8)


def parts_of(path: Path) -> tuple[Path, ...]:
    """The files of a GGUF: itself, or all parts of the split one whose first part it is.

    Raises:
        OlpackError: another part, a name that is not that of a part, or a part that is missing.
    """
    header = read_header(path)
    count = header.integer("split.count") or 1
    if count == 1:
        return (path,)
    match = PART.fullmatch(path.name)
    if match is None or int(match["count"]) != count or header.integer("split.no") != int(match["number"]) - 1:
        raise OlpackError(
            f"'{path}' is one of {count} parts of a GGUF, and its name does not tell which.", "Give the parts the names they came with."
        )
    names = part_names(f"{match['stem']}.gguf", count)
    if path.name != names[0]:
        raise OlpackError(f"'{path}' is part {int(match['number'])} of {count} of a GGUF.", f"Name its first part, {names[0]}.")
    paths = tuple(map(path.with_name, names))
    if missing := [part.name for part in paths if not part.is_file()]:
        raise OlpackError(f"'{path.parent}' lacks {missing[0]}, a part of this GGUF.", "Finish its download.")
    return paths


def open_gguf(path: Path) -> GgufBase:
    """Open a GGUF; of a split one by its first part. Reads headers.

    Raises:
        OlpackError: no GGUF, a truncated one, one without an architecture or without a part, a tensor of a type that olpack does not dequantize.
    """
    paths = parts_of(path)
    headers = [read_header(part) for part in paths]
    tensors: dict[str, GgufTensor] = {}
    for path, header in zip(paths, headers, strict=True):
        for name in header.tensors:
            if name in tensors:
                raise OlpackError(f"'{path}' has the tensor '{name}', which another part has, too.", "Take the parts of one file.")
            tensors[name] = _tensor(path, header, name)
    first = headers[0]
    if not first.text("general.architecture"):
        raise OlpackError(f"'{paths[0]}' names no architecture.", "Take the GGUF of a language model.")
    return GgufBase(paths, first.metadata, first.lists, first.counts, tensors)


def _tensor(path: Path, header: Header, name: str) -> GgufTensor:
    axes, number = header.tensors[name]
    shape = axes[::-1]
    if number not in TYPES:
        raise OlpackError(
            f"'{path}' has '{name}' in a tensor type that olpack does not read (number {number}).",
            f"Take a file with {', '.join(one.name for one in TYPES.values() if one.name not in INTEGERS)}.",
        )
    type_ = TYPES[number]
    if shape[-1] % type_.weights:
        raise OlpackError(f"'{path}' has '{name}' with rows of {shape[-1]} weights, which are no blocks of {type_.name}.", "Download it again.")
    tensor = GgufTensor(name, shape, type_, path, header.offsets[name], header.state)
    if tensor.offset + tensor.nbytes > header.size:
        raise OlpackError(
            f"'{path}' is truncated: it has {header.size:,} bytes, and '{name}' ends at byte {tensor.offset + tensor.nbytes:,}.",
            "Download it again.",
        )
    return tensor
