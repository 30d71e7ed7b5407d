"""What olpack does with a `gguf.GGUFWriter` that has no file."""

from __future__ import annotations

import io
import struct
from collections.abc import Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import gguf


def header_bytes(writer: gguf.GGUFWriter) -> bytes:
    """Magic, keys and tensor table of a GGUF as its writer has them, without the padding in front of the first tensor's data."""
    from gguf.gguf_writer import WriterState

    header = io.BytesIO()
    writer.fout, writer.state = [io.BufferedWriter(header)], WriterState.EMPTY
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    return header.getvalue()


def packed_array(values: Sequence[Any], item_type: gguf.GGUFValueType | None) -> bytes | None:
    """An array as `GGUFWriter` packs it, many times faster; None where the writer has to do it, such as for arrays in an array.

    Args:
        values: the items.
        item_type: their type; None: the one that the writer gives them.
    """
    from gguf import GGUFValueType, GGUFWriter

    if not isinstance(values, (list, tuple)) or not values:
        return None
    examples = {type(value): value for value in values}.values()
    types = {item_type} if item_type is not None else set(map(GGUFValueType.get_type, examples))
    if len(types) > 1:
        return None
    item_type = types.pop()
    if item_type == GGUFValueType.STRING:
        texts = [value.encode() if isinstance(value, str) else value for value in values]
        items = b"".join(chain.from_iterable((len(text).to_bytes(8, "little"), text) for text in texts))
    elif item_type in GGUFWriter._simple_value_packing:
        items = struct.pack(f"<{len(values)}{GGUFWriter._simple_value_packing[item_type]}", *values)
    else:
        return None
    return struct.pack("<IIQ", GGUFValueType.ARRAY, item_type, len(values)) + items
