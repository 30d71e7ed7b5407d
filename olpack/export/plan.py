"""What each file will hold: the tensors in llama.cpp's order with the types that llama.cpp itself chooses, and the header's bytes.

llama.cpp decides from a GGUF whose header is real and whose data is a hole, so no rule about types is repeated here.
"""

from __future__ import annotations

import io
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from olpack.errors import OlpackError
from olpack.export.converter import FLOATS, SourceModel
from olpack.llamacpp import library
from olpack.quants import QuantType

ALIGNMENT = 32  # of tensor data in a GGUF; llama.cpp's quantizer knows no other


@dataclass(frozen=True)
class FilePlan:
    """One GGUF to be: its header's bytes, and then its tensors.

    Attributes:
        quant: the file type.
        header: everything in front of the first tensor's data, padding included.
        tensors: (name, tensor type of ggml, bytes without padding) in the order of the file.
        fallbacks: what llama.cpp says of tensors whose rows do not fit the blocks of their type.
    """

    quant: QuantType
    header: bytes
    tensors: list[tuple[str, int, int]]
    fallbacks: list[str]

    @property
    def size(self) -> int:
        """Bytes of the whole file."""
        return len(self.header) + sum(padded(nbytes) for _, _, nbytes in self.tensors)

    @property
    def data_size(self) -> int:
        """Bytes of the tensors, padding not counted."""
        return sum(nbytes for _, _, nbytes in self.tensors)


def padded(nbytes: int) -> int:
    """The next multiple of the alignment."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


@contextmanager
def hollow_file(model: SourceModel) -> Iterator[Path]:
    """llama.cpp's BF16 file of a model with a hole where the data would be: a few MB on the disk, whatever the model's size."""
    tensors = [(t.name, library.tensor_type(t.type_name), t.nbytes) for t in model.tensors.values()]
    header = _header(model, tensors, ftype=None)
    with tempfile.TemporaryDirectory(prefix="olpack-") as scratch:
        path = Path(scratch) / "model.gguf"
        try:
            with path.open("wb") as file:
                file.write(header)
                file.truncate(len(header) + sum(padded(nbytes) for _, _, nbytes in tensors))
        except OSError as error:
            raise OlpackError(
                f"No room for a header of {len(header):,} bytes in '{scratch}': {os.strerror(error.errno)}.",
                "Make room there, or set TMPDIR to another folder.",
            ) from error
        yield path


def plan_files(model: SourceModel, hollow: Path, quants: Sequence[QuantType]) -> list[FilePlan]:
    """Plan one file per quant.

    Args:
        model: the opened model.
        hollow: its `hollow_file`.
        quants: the file types.

    Raises:
        OlpackError: llama.cpp refuses the model, a quant needs an importance matrix, or the base's weights are quantized already.
    """
    plans = []
    for quant in quants:
        chosen = library.type_plan(hollow, quant.ftype)
        if chosen.needs_importance:
            raise OlpackError(
                f"{quant.name} needs an importance matrix, which olpack does not make yet.",
                "Take a quant type that works without one: Q2_K and larger, IQ3_S, IQ4_XS.",
            )
        if {name for name, _ in chosen.tensors} != set(model.tensors):
            raise OlpackError(
                "llama.cpp's library and its converter disagree about the model's tensors.",
                "Their versions differ: unset OLPACK_LLAMA_CPP, or install the matching llama-cpp-python.",
            )
        tensors = []
        for name, type_ in chosen.tensors:
            source = model.tensors[name]
            if source.type_name in FLOATS:
                columns = source.shape[-1] if source.shape else 1
                nbytes = source.elements // columns * library.row_size(type_, columns)
            elif type_ == library.tensor_type(source.type_name):
                nbytes = source.nbytes
            else:
                raise OlpackError(
                    f"The base's '{source.origin}' is quantized already ({source.type_name}) and cannot become {quant.name}.",
                    "Start from the model in 16 bits.",
                )
            tensors.append((name, type_, nbytes))
        plans.append(FilePlan(quant, _header(model, tensors, quant.ftype), tensors, chosen.fallbacks))
    return plans


def _header(model: SourceModel, tensors: Sequence[tuple[str, int, int]], ftype: int | None) -> bytes:
    """Magic, keys and tensor table. With `ftype`, the keys are in the order in which llama.cpp's quantizer writes them."""
    import gguf

    writer = gguf.GGUFWriter(None, model.architecture)
    writer.kv_data = [dict(model.keys)]
    if ftype is not None:
        for key in (gguf.Keys.General.QUANTIZATION_VERSION, gguf.Keys.General.FILE_TYPE):
            writer.remove_key(key)  # the quantizer sets these two last
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        writer.add_file_type(ftype)
    for name, type_, nbytes in tensors:
        writer.add_tensor_info(name, _trimmed(model.tensors[name].shape), "float32", nbytes, gguf.GGMLQuantizationType(type_))
    buffer = io.BytesIO()
    writer.fout, writer.state = [buffer], gguf.gguf_writer.WriterState.EMPTY
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    return buffer.getvalue().ljust(padded(buffer.tell()), b"\0")


def _trimmed(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A shape without leading ones: ggml does not store dimensions of one beyond the last that matters."""
    while len(shape) > 1 and shape[0] == 1:
        shape = shape[1:]
    return shape or (1,)
