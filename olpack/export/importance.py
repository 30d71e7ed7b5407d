"""An importance matrix: the weight of each column of a weight matrix, and its file in llama.cpp's GGUF form.

The error of a weight costs as much as what the weight is multiplied with, so a quantizer that knows the mean square of each column's input
puts the error where it costs least. The form is that of llama.cpp's tools/imatrix: `<tensor>.in_sum2` and `<tensor>.counts`, float32.
llama-quantize takes such a file, and what llama-imatrix writes is read here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from olpack.errors import OlpackError
from olpack.export.gguf_writer import header_bytes
from olpack.export.job import ImportanceCounts
from olpack.llamacpp.activations import InputSquares, input_squares
from olpack.model.gguf_header import read_header
from olpack.workspace import write_atomically

CHUNK = 512  # tokens; rows differ in length, and llama.cpp counts text in chunks of its default context
_ALIGNMENT = 32


@dataclass(frozen=True)
class ImportanceMatrix:
    """Sums of squared inputs for the weight tensors of a model.

    Attributes:
        tensors: by the tensor's name in the GGUF; `sums` in float32.
        datasets: names of the texts that were read, at least one.
        chunk_count: how many chunks those were.
        chunk_size: tokens of a chunk.
    """

    tensors: dict[str, InputSquares]
    datasets: list[str]
    chunk_count: int
    chunk_size: int

    def weights(self, name: str, matrices: int) -> np.ndarray:
        """The weights of the columns' errors in the quantizer: the mean squares of their inputs, as llama.cpp's tools/quantize computes them.

        Args:
            name: of the tensor.
            matrices: how many it is made of: its experts, else 1.

        Returns:
            float32 [matrices, columns]. Ones for an expert that no token was sent to.
        """
        found = self.tensors[name]
        counts = found.counts.astype(np.float32)[:, None]
        means = np.divide(found.sums, counts, out=np.ones_like(found.sums), where=counts > 0)
        return np.ascontiguousarray(means.reshape(matrices, -1))


def read_importance(path: Path) -> ImportanceMatrix:
    """Read an importance matrix.

    Raises:
        OlpackError: there is no such file, it is no importance matrix in llama.cpp's GGUF form, or it contains values that are no sums of squares.
    """
    import gguf

    if not path.is_file():
        raise OlpackError(f"There is no importance matrix '{path}'.", "Correct the path, or set export.importance: train, which collects one.")
    try:
        read_header(path)  # which refuses what would keep gguf busy, or fail in it
        reader = gguf.GGUFReader(path)
        found = {tensor.name: np.array(tensor.data) for tensor in reader.tensors}
        keys = gguf.Keys.IMatrix
        datasets, count, size = (reader.fields[key].contents() for key in (keys.DATASETS, keys.CHUNK_COUNT, keys.CHUNK_SIZE))
    except (ValueError, OSError, IndexError, KeyError, OlpackError) as error:
        raise OlpackError(
            f"'{path}' is no importance matrix in llama.cpp's GGUF form.",
            "Collect it again; one in the older form becomes a GGUF with `llama-imatrix --in-file OLD.dat -o NEW.gguf`.",
        ) from error
    tensors = {}
    for key in found:
        name = key.removesuffix(".in_sum2").removesuffix(".counts")
        if name not in tensors:
            tensors[name] = _squares(path, name, found.get(f"{name}.in_sum2"), found.get(f"{name}.counts"))
    return ImportanceMatrix(tensors, datasets, int(count), int(size))


def _squares(path: Path, name: str, sums: np.ndarray | None, counts: np.ndarray | None) -> InputSquares:
    damaged = OlpackError(f"The importance matrix '{path}' is damaged at '{name}'.", "Collect it again.")
    if sums is None or counts is None or (sums.dtype, counts.dtype) != (np.float32, np.float32) or sums.size % (counts.size or 1):
        raise damaged
    if not (np.isfinite(sums).all() and np.isfinite(counts).all()):
        raise OlpackError(
            f"The importance matrix '{path}' has an infinite or undefined value for '{name}'.",
            "The model that it was collected on computes no numbers: check its files, and collect it again.",
        )
    if sums.min(initial=0) < 0 or counts.min(initial=0) < 0:
        raise damaged
    return InputSquares(sums.reshape(counts.size, -1), np.rint(counts).astype(np.int64).reshape(-1))


def write_importance(matrix: ImportanceMatrix, path: Path) -> None:
    """Write an importance matrix as llama-imatrix does: tensors by name, each with its sums and counts. The file appears when it is complete.

    Raises:
        OlpackError: the file cannot be written.
    """
    import gguf

    writer = gguf.GGUFWriter(None, "")
    writer.kv_data = [{}]  # no architecture: this is no model
    writer.add_type(gguf.GGUFType.IMATRIX)
    writer.add_array(gguf.Keys.IMatrix.DATASETS, matrix.datasets)
    writer.add_uint32(gguf.Keys.IMatrix.CHUNK_COUNT, matrix.chunk_count)
    writer.add_uint32(gguf.Keys.IMatrix.CHUNK_SIZE, matrix.chunk_size)
    data = []
    for name, found in sorted(matrix.tensors.items()):
        for key, array in ((f"{name}.in_sum2", found.sums), (f"{name}.counts", found.counts[:, None])):
            values = np.ascontiguousarray(array, np.float32)
            writer.add_tensor_info(key, values.shape if len(values) > 1 else values.shape[1:], values.dtype, values.nbytes)
            data.append(values.tobytes().ljust(-(-values.nbytes // _ALIGNMENT) * _ALIGNMENT, b"\0"))
    header = header_bytes(writer)
    write_atomically(path, b"".join([header, bytes(-len(header) % _ALIGNMENT), *data]))


@dataclass(frozen=True)
class ColumnWeights:
    """An importance matrix as the quantizer takes it for one model.

    Attributes:
        by_tensor: float32 [matrices, columns] by tensor name. None where the matrix is still to be collected, on this model.
        keys: that record it in the headers of the files that are made with it.
        unknown: tensors that are in the matrix and not in the model.
    """

    by_tensor: dict[str, np.ndarray] | None
    keys: dict[str, str | int]
    unknown: list[str] = field(default_factory=list)


def column_weights(path: Path, tensors: Mapping[str, Any]) -> ColumnWeights:
    """Read an importance matrix for a model.

    Args:
        path: its file.
        tensors: the model's, by name, with their `shape`. The matrix may lack some and have others.

    Raises:
        OlpackError: as `read_importance`, or the matrix is for another model.
    """
    matrix = read_importance(path)
    weights = {}
    for name in (name for name in matrix.tensors if name in tensors):
        shape: tuple[int, ...] = tensors[name].shape
        columns, matrices, found = shape[-1], math.prod(shape[:-2]), matrix.tensors[name].sums.size
        if found != matrices * columns:
            raise OlpackError(
                f"The importance matrix '{path}' is for another model: it has {found:,} values for '{name}', and this one needs "
                f"{matrices * columns:,}.",
                "Take the matrix that was collected on this model.",
            )
        weights[name] = matrix.weights(name, matrices)
    if not weights:
        raise OlpackError(
            f"The importance matrix '{path}' is for another model: it has none of this one's tensors.",
            "Take the matrix that was collected on this model.",
        )
    return ColumnWeights(weights, _header_keys(path, matrix), sorted(matrix.tensors.keys() - weights.keys()))


def _header_keys(path: Path, matrix: ImportanceMatrix) -> dict[str, str | int]:
    """The keys that llama-quantize writes of a matrix, in its order and truncated as there, so that the files are the same.

    Of the path only the name is written, as by a llama-quantize that runs in the file's folder: the folder is private.
    """

    def cut(text: str) -> str:
        return text.encode()[:127].decode(errors="ignore")

    keys: dict[str, str | int] = {"quantize.imatrix.file": cut(path.name)}
    if matrix.datasets:
        keys["quantize.imatrix.dataset"] = cut(matrix.datasets[0])
    keys["quantize.imatrix.entries_count"] = len(matrix.tensors)
    if matrix.chunk_count:
        keys["quantize.imatrix.chunks_count"] = matrix.chunk_count
    return keys


def collect(gguf: str, rows: list[list[int]], out: str, dataset: str, threads: int | None, report: Callable[[int, int], None]) -> ImportanceCounts:
    """`olpack.export.collect_importance`, over the pipe."""
    total = sum(len(row) for row in rows)
    found = input_squares(Path(gguf), rows, threads=threads, advance=lambda count: report(count, total))
    tensors = {name: InputSquares(squares.sums.astype(np.float32), squares.counts) for name, squares in found.items()}
    for name, squares in tensors.items():
        if not np.isfinite(squares.sums).all():
            raise OlpackError(
                f"The model '{gguf}' computes no numbers: what goes into '{name}' is infinite or undefined.",
                "Its weights are damaged, or its training diverged: take another checkpoint.",
            )
    write_importance(ImportanceMatrix(tensors, [dataset], -(-total // CHUNK), CHUNK), Path(out))
    counts = [squares.counts for squares in tensors.values() if squares.counts.size > 1]
    return ImportanceCounts(experts=sum(count.size for count in counts), unused=sum(int((count == 0).sum()) for count in counts))
