"""A GGUF in several files, as llama.cpp's `gguf-split` makes them and its loader finds them: NAME-00001-of-00003.gguf and so on.

The first part carries all keys, every part carries its own number, and the tensors follow one another through the parts.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import replace

from olpack import progress
from olpack.errors import OlpackError
from olpack.export.plan import FilePlan, padded

_PREFIX = struct.Struct("<4sIQQ")  # magic, version, number of tensors, number of keys
_UINT16, _INT32 = 2, 5  # GGUF's types of values
_SLACK = 31  # the longest padding of a header


def split_plan(plan: FilePlan, limit: int | None) -> list[FilePlan]:
    """The plans of the files that a planned file is cut into; itself alone where it is small enough.

    Args:
        plan: of the whole file.
        limit: most bytes of a part, header included; None: the file stays whole.

    Raises:
        OlpackError: a tensor that is larger than that, or a header.
    """
    if limit is None or plan.size <= limit:
        return [plan]
    keys, infos = _parts_of(plan)
    groups: list[list[int]] = [[]]
    used = _PREFIX.size + len(keys) + _SPLIT_KEYS_SIZE
    for index, (name, _, nbytes) in enumerate(plan.tensors):
        needed = len(infos[index]) + padded(nbytes)
        if used + needed + _SLACK > limit and groups[-1]:
            groups.append([])
            used = _PREFIX.size + _SPLIT_KEYS_SIZE
        if used + needed + _SLACK > limit:
            raise OlpackError(
                f"The {plan.quant.name} file cannot be split into parts of {progress.quantity(limit, 'B')}: '{name}' needs "
                f"{progress.quantity(used + needed, 'B')} with its header.",
                "Allow larger parts.",
            )
        groups[-1].append(index)
        used += needed
    return [_part(plan, keys if number == 0 else b"", infos, group, number, len(groups)) for number, group in enumerate(groups)]


def _split_keys(number: int, count: int, tensors: int) -> bytes:
    def key(name: str, kind: int, value: bytes) -> bytes:
        return struct.pack("<Q", len(name)) + name.encode() + struct.pack("<I", kind) + value

    return (
        key("split.no", _UINT16, struct.pack("<H", number))
        + key("split.count", _UINT16, struct.pack("<H", count))
        + key("split.tensors.count", _INT32, struct.pack("<i", tensors))
    )


_SPLIT_KEYS_SIZE = len(_split_keys(0, 0, 0))


def _parts_of(plan: FilePlan) -> tuple[bytes, list[bytes]]:
    """A header's keys, and its entry for each tensor without the offset."""
    first = plan.tensors[0][0].encode()
    # The table comes after the keys, so the last place with this length and name is its beginning.
    at = table = plan.header.rindex(struct.pack("<Q", len(first)) + first)
    infos = []
    for name, *_ in plan.tensors:
        dimensions_at = at + 8 + len(name.encode())
        (dimensions,) = struct.unpack_from("<I", plan.header, dimensions_at)
        end = dimensions_at + 4 + 8 * dimensions + 4
        infos.append(plan.header[at:end])
        at = end + 8
    return plan.header[_PREFIX.size : table], infos


def _part(plan: FilePlan, keys: bytes, infos: Sequence[bytes], group: Sequence[int], number: int, count: int) -> FilePlan:
    magic, version, _, key_count = _PREFIX.unpack_from(plan.header)
    tensors = [plan.tensors[index] for index in group]
    offsets = [0]
    for _, _, nbytes in tensors:
        offsets.append(offsets[-1] + padded(nbytes))
    header = b"".join(
        [
            _PREFIX.pack(magic, version, len(group), 3 + (key_count if keys else 0)),
            keys,
            _split_keys(number, count, len(plan.tensors)),
            *(infos[index] + struct.pack("<Q", offset) for index, offset in zip(group, offsets, strict=False)),
        ]
    )
    return replace(plan, header=header.ljust(padded(len(header)), b"\0"), tensors=tensors)
