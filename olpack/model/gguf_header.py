"""The header of a GGUF file: the scalar metadata and the tensors, without the long lists."""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

from olpack.errors import OlpackError

_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}  # GGUF's type: its format
_STRING, _ARRAY = 8, 9
_LENGTH = struct.Struct("<Q")


Scalar = str | int | float  # and bool, which is an int


@dataclass(frozen=True)
class Header:
    """The header of a GGUF file.

    Attributes:
        metadata: key to number, bool or text. Lists are left out.
        tensors: name to (lengths of the axes, innermost first; number of ggml's type).
    """

    metadata: dict[str, Scalar]
    tensors: dict[str, tuple[tuple[int, ...], int]]

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
    try:
        found = path.stat()
    except FileNotFoundError:
        raise OlpackError(f"{path} does not exist.", "Make it with 'olpack export'.") from None
    return _read(path.resolve(), found.st_size, found.st_mtime_ns, found.st_ino)


@lru_cache(maxsize=64)
def _read(path: Path, _size: int, _modified: int, _inode: int) -> Header:
    try:
        with path.open("rb") as file:
            magic, version, tensors, count = struct.unpack("<4sIQQ", file.read(24))
            if magic != b"GGUF" or version not in (2, 3):
                raise ValueError
            metadata: dict[str, Scalar] = {}
            for _ in range(count):
                key, kind = _text(file), _integer(file, "<I")
                if kind == _ARRAY:
                    _skip_list(file)
                else:
                    metadata[key] = _text(file) if kind == _STRING else _number(file, _SCALARS[kind])
            return Header(metadata, dict(_tensor(file) for _ in range(tensors)))
    except (struct.error, ValueError, KeyError):
        raise OlpackError(f"{path} is no whole GGUF file.", "Make it again with 'olpack export'.") from None


def _number(file: BinaryIO, form: str) -> int | float:
    return struct.unpack(form, file.read(struct.calcsize(form)))[0]


def _integer(file: BinaryIO, form: str) -> int:
    return int(_number(file, form))


def _text(file: BinaryIO) -> str:
    size = _integer(file, "<Q")
    raw = file.read(size)
    if len(raw) < size:
        raise ValueError
    return raw.decode("utf-8")


def _skip_list(file: BinaryIO) -> None:
    kind, count = _integer(file, "<I"), _integer(file, "<Q")
    if kind in _SCALARS:
        file.seek(struct.calcsize(_SCALARS[kind]) * count, 1)
    elif kind == _STRING:
        _skip_texts(file, count)
    else:
        for _ in range(count):
            _skip_list(file)


def _skip_texts(file: BinaryIO, count: int) -> None:
    """A vocabulary has some 100,000 texts: their lengths are read out of large pieces of the file."""
    begin, at, piece = file.tell(), 0, b""
    for _ in range(count):
        if at + 8 > len(piece):
            begin += at
            file.seek(begin)
            at, piece = 0, file.read(1 << 20)
        at += 8 + _LENGTH.unpack_from(piece, at)[0]
    file.seek(begin + at)


def _tensor(file: BinaryIO) -> tuple[str, tuple[tuple[int, ...], int]]:
    """The tensor described here: name, number of axes, their lengths, type, offset."""
    name = _text(file)
    shape = tuple(_integer(file, "<Q") for _ in range(_integer(file, "<I")))
    type_ = _integer(file, "<I")
    file.seek(8, 1)
    return name, (shape, type_)
