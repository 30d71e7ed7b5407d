"""The header of a GGUF file: the metadata and the tensors, without the long lists and the texts in lists."""

from __future__ import annotations

import math
import os
import re
import struct
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

from olpack.bounded_json import check_regular
from olpack.errors import OlpackError

_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}  # GGUF's type: its format
_STRING, _ARRAY = 8, 9
_LEAST_KEY, _LEAST_TENSOR = 13, 32  # bytes of the shortest key with its value, and of the shortest description of a tensor
_LONGEST_NAME = 65_535  # bytes, as in the format's description
_MOST_AXES = 4  # of ggml
_MOST_ELEMENTS = 1 << 48
_TYPES = 64  # ggml numbers 42 of them; llama.cpp refuses those that it does not know
_LONGEST_LIST = 1000  # entries: one for each layer, or for each pair of a head's columns
_ALIGNMENT = 32  # of the tensors' data, where no key gives another
_COUNT = (int, 0, (1 << 31) - 1)
_TYPED: dict[str, tuple[type, int, int]] = {  # key: its type, its least and its most
    "general.architecture": (str, 0, 0),
    "general.name": (str, 0, 0),
    "general.alignment": (int, 8, 1 << 20),
    "general.file_type": _COUNT,
    "general.quantization_version": _COUNT,
    "split.count": (int, 0, 65_535),
    "split.no": (int, 0, 65_535),
    "split.tensors.count": _COUNT,
    "tokenizer.chat_template": (str, 0, 0),
    "tokenizer.ggml.model": (str, 0, 0),
    "tokenizer.ggml.pre": (str, 0, 0),
}
_AGAIN = "Make it again with 'olpack export', or download it again."
_LENGTH = struct.Struct("<Q")

PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
"""Name of a part of a split GGUF, as llama.cpp writes it."""

Scalar = str | int | float  # and bool, which is an int
FileState = tuple[int, int, int]  # size in bytes, time of change in ns, inode


def part_names(name: str, count: int) -> list[str]:
    """The names of the parts of a file: "model.gguf" in two is "model-00001-of-00002.gguf", "model-00002-of-00002.gguf"."""
    stem = name.removesuffix(".gguf")
    return [f"{stem}-{number:05d}-of-{count:05d}.gguf" for number in range(1, count + 1)]


@dataclass(frozen=True)
class Header:
    """The header of a GGUF file.

    Attributes:
        metadata: key to number, bool or text. Lists are left out.
        tensors: name to (lengths of the axes, innermost first; number of ggml's type).
        lists: key to the numbers or bools of a list of at most 1000.
        counts: key of a list, also of a long one and one of texts, to its number of entries.
        offsets: name of a tensor to the byte of the file where its data begins.
        size: bytes of the file.
        state: of the file, which tells it from another one of the same name.
    """

    metadata: dict[str, Scalar]
    tensors: dict[str, tuple[tuple[int, ...], int]]
    lists: dict[str, tuple[int | float, ...]] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    offsets: dict[str, int] = field(default_factory=dict)
    size: int = 0
    state: FileState = (0, 0, 0)

    @property
    def parameters(self) -> int:
        """Elements of all tensors."""
        return sum(math.prod(shape) for shape, _ in self.tensors.values())

    def text(self, key: str) -> str | None:
        """A text of the metadata, None where it has no such key or another type."""
        value = self.metadata.get(key)
        return value if isinstance(value, str) else None

    def integer(self, key: str) -> int | None:
        """An integer of the metadata, None where it has no such key or another type."""
        value = self.metadata.get(key)
        return value if isinstance(value, int) else None


def read_header(path: Path) -> Header:
    """The header of a GGUF file. One that has the size and the time of an earlier reading is not read again.

    Raises:
        OlpackError: the file is not there, is no GGUF, or ends within its header.
    """
    check_regular(path)
    try:
        found = path.stat()
    except FileNotFoundError:
        raise OlpackError(f"{path} does not exist.", "Make it with 'olpack export'.") from None
    return _read(path.resolve(), file_state(found))


def file_state(found: os.stat_result) -> FileState:
    """What `Header.state` has."""
    return found.st_size, found.st_mtime_ns, found.st_ino


@lru_cache(maxsize=64)
def _read(path: Path, state: FileState) -> Header:
    size = state[0]
    try:
        with path.open("rb") as file:
            magic, version, tensors, count = struct.unpack("<4sIQQ", file.read(24))
            if magic != b"GGUF" or version not in (2, 3):
                raise _Damage("it does not begin as one")
            if count * _LEAST_KEY + tensors * _LEAST_TENSOR > size:
                raise _Damage(f"it declares {count:,} keys and {tensors:,} tensors, more than it has bytes for")
            header = Header({}, {}, size=size, state=state)
            _read_metadata(file, count, header)
            _read_tensors(file, tensors, header)
            return header
    except (struct.error, UnicodeDecodeError):
        raise OlpackError(f"{path} is no whole GGUF file.", _AGAIN) from None
    except _Damage as error:
        raise OlpackError(f"{path} is no whole GGUF file: {error}.", _AGAIN) from None


def read_texts(path: Path, key: str) -> list[str]:
    """A list of texts of the metadata, such as `tokenizer.ggml.merges`; empty where the file has no such key.

    Raises:
        OlpackError: as `read_header`, or the key is another value than a list of texts.
    """
    size = read_header(path).size  # which refuses what is no whole header
    with path.open("rb") as file:
        file.seek(8)
        _, count = _integer(file, "<Q"), _integer(file, "<Q")
        for _ in range(count):
            name, kind = _text(file, size, _LONGEST_NAME), _integer(file, "<I")
            if name == key:
                if kind != _ARRAY or _integer(file, "<I") != _STRING:
                    raise OlpackError(f"{path} is no whole GGUF file: its key {key} is no list of texts.", _AGAIN)
                texts = _texts(file, _integer(file, "<Q"))
                try:
                    return [text.decode("utf-8") for text in texts]
                except UnicodeDecodeError:
                    raise OlpackError(f"{path} is no whole GGUF file: its key {key} has a text that is not UTF-8.", _AGAIN) from None
            if kind == _ARRAY:
                _read_list(file, name, Header({}, {}, size=size))
            elif kind == _STRING:
                file.seek(_integer(file, "<Q"), 1)
            else:
                file.seek(struct.calcsize(_SCALARS[kind]), 1)
    return []


def _texts(file: BinaryIO, count: int) -> list[bytes]:
    texts = []
    for _ in range(count):
        texts.append(file.read(_integer(file, "<Q")))
    return texts


class _Damage(Exception):
    """What is wrong with a header, without its full stop."""


def _read_metadata(file: BinaryIO, count: int, header: Header) -> None:
    metadata, size, seen = header.metadata, header.size, set()
    for _ in range(count):
        key, kind = _text(file, size, _LONGEST_NAME), _integer(file, "<I")
        if key in seen:
            raise _Damage(f"it has the key {_shown(key)} twice")
        seen.add(key)
        if kind == _ARRAY:
            if key in _TYPED:
                raise _Damage(f"its key {key} is a list")
            _read_list(file, key, header)
        elif kind == _STRING or kind in _SCALARS:
            metadata[key] = _text(file, size, size) if kind == _STRING else _number(file, _SCALARS[kind])
        else:
            raise _Damage(f"its key {_shown(key)} has the unknown type {kind}")
        if key in metadata and key in _TYPED:
            _check_value(key, metadata[key])


def _check_value(key: str, value: Scalar) -> None:
    """Keys that llama.cpp takes without looking at their type, or computes with."""
    kind, low, high = _TYPED[key]
    if not isinstance(value, kind) or isinstance(value, bool):
        raise _Damage(f"its key {key} is {_shown(value)}")
    if isinstance(value, int) and not low <= value <= high:
        raise _Damage(f"its key {key} is {value:,}, and must lie between {low:,} and {high:,}")
    if key == "general.alignment" and isinstance(value, int) and value & (value - 1):
        raise _Damage(f"its key {key} is {value:,} and no power of two")


def _number(file: BinaryIO, form: str) -> int | float:
    return struct.unpack(form, file.read(struct.calcsize(form)))[0]


def _integer(file: BinaryIO, form: str) -> int:
    return int(_number(file, form))


def _text(file: BinaryIO, size: int, longest: int) -> str:
    length = _integer(file, "<Q")
    if length > min(longest, size - file.tell()):
        raise _Damage(f"it declares a text of {length:,} bytes")
    return file.read(length).decode("utf-8")


def _read_list(file: BinaryIO, key: str, header: Header) -> None:
    size = header.size
    kind, count = _integer(file, "<I"), _integer(file, "<Q")
    if kind not in _SCALARS and kind != _STRING:
        raise _Damage(f"its key {_shown(key)} is a list of the type {kind}, and olpack reads lists of numbers and texts")
    width = 8 if kind == _STRING else struct.calcsize(_SCALARS[kind])
    if count * width > size - file.tell():
        raise _Damage(f"its key {_shown(key)} declares a list of {count:,} entries")
    header.counts[key] = count
    if kind == _STRING:
        _skip_texts(file, count, size)
    elif count <= _LONGEST_LIST:
        header.lists[key] = struct.unpack(f"<{count}{_SCALARS[kind][1]}", file.read(width * count))
    else:
        file.seek(width * count, 1)


def _skip_texts(file: BinaryIO, count: int, size: int) -> None:
    """A vocabulary has some 100,000 texts: their lengths are read out of large pieces of the file."""
    begin, at, piece = file.tell(), 0, b""
    for _ in range(count):
        if at + 8 > len(piece):
            begin += at
            file.seek(begin)
            at, piece = 0, file.read(1 << 20)
        at += 8 + _LENGTH.unpack_from(piece, at)[0]
        if begin + at > size:
            raise _Damage("it ends within a list of texts")
    file.seek(begin + at)


def _read_tensors(file: BinaryIO, count: int, header: Header) -> None:
    """The tensors described here: name, number of axes, their lengths, type, offset of each."""
    tensors, size = header.tensors, header.size
    for _ in range(count):
        name, axes = _text(file, size, _LONGEST_NAME), _integer(file, "<I")
        if not 1 <= axes <= _MOST_AXES:
            raise _Damage(f"its tensor {_shown(name)} has {axes:,} dimensions")
        shape = tuple(_integer(file, "<Q") for _ in range(axes))
        type_, offset = _integer(file, "<I"), _integer(file, "<Q")
        if min(shape) < 1 or math.prod(shape) > _MOST_ELEMENTS:
            raise _Damage(f"its tensor {_shown(name)} has the shape {list(shape)}")
        if type_ >= _TYPES:
            raise _Damage(f"its tensor {_shown(name)} has the unknown type {type_:,}")
        if offset > _MOST_ELEMENTS:
            raise _Damage(f"its tensor {_shown(name)} stands at byte {offset:,}")
        if name in tensors:
            raise _Damage(f"it has the tensor {_shown(name)} twice")
        tensors[name] = (shape, type_)
        header.offsets[name] = offset
    alignment = header.integer("general.alignment") or _ALIGNMENT
    begin = -(-file.tell() // alignment) * alignment
    for name in tensors:
        header.offsets[name] += begin


def _shown(value: Scalar) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}…"
