"""What olpack does with a `gguf.GGUFWriter` that has no file."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

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
