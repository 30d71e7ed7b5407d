"""How much a model's predictions change when one of its matrices is rounded: measured on the user's rows, matrix by matrix.

llama.cpp loads the model in 16 bits. One matrix after the other is overwritten with its values rounded to a small type, the rows are read,
and the matrix is restored. The figure is the KL divergence of the predictions from those of the unchanged model.

What the other types would cost follows from the error that they make in the weights: KL divergence has its minimum, zero, where nothing
changes, so to leading order it is quadratic in the change, half of δᵀFδ with F the Fisher information (Kullback, Information Theory and
Statistics, 1959, section 2.6). With F approximated as a quantizer that has an importance matrix does it, by the mean squares of the columns'
inputs, the divergence grows as the squared error weighted with these. Where matrices are rounded by all second moments of their inputs, it is
these that weight the errors.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from olpack.errors import OlpackError
from olpack.export.converter import SourceModel
from olpack.export.gguf_source import open_source
from olpack.export.importance import column_weights
from olpack.export.job import SensitivityResult
from olpack.export.plan import header_only_gguf
from olpack.export.rounded import gpu_memory_for_others, input_factors, is_layer_matrix
from olpack.export.second_order import Factor, output_error, round_matrix
from olpack.export.size_budget import MatrixLoss, candidates, quantizable_tensors
from olpack.export.write import CHUNK
from olpack.llamacpp import library
from olpack.llamacpp.cores import usable_processors
from olpack.llamacpp.graph import LoadedWeights
from olpack.llamacpp.grids import GRID_TYPES
from olpack.llamacpp.logits import kl_divergence, log_softmax
from olpack.quants import Rounding
from olpack.workspace import write_atomically

# What a matrix is rounded to, the first that fits its rows. Its error must stand out from the noise of 16-bit arithmetic, in a model of
# hundreds of matrices too, and still be small enough for the divergence to be quadratic in it.
_PROBES = ("q3_K", "q4_0")

_REFERENCE_BYTES = 1 << 30  # of memory for the unchanged model's log-probabilities, in float32
_SAMPLE = 1 << 16  # weights of a matrix on which the errors of its types are compared: sums over so many differ by less than a percent


@gpu_memory_for_others()
def measure(
    gguf: str,
    rows: list[list[int]],
    loss_masks: list[list[bool]],
    importance: str | None,
    rounding: Rounding,
    calibration: list[list[int]],
    out: str,
    key: str,
    threads: int | None,
    report: Callable[[int, int], None],
) -> SensitivityResult:
    """`olpack.export.measure_sensitivity`, over the pipe."""
    from olpack.llamacpp.engine import Engine  # loads llama.cpp

    model = open_source(Path(gguf))
    weights = column_weights(Path(importance), model.tensors).by_tensor if importance else None
    weights = weights or {}
    search = rounding != "ggml"
    with header_only_gguf(model) as header_gguf:
        names = quantizable_tensors(header_gguf)
    found = _measured_before(Path(out), key)
    total = (len(names) + 1) * sum(map(len, rows))
    where = LoadedWeights()
    with Engine(Path(gguf), max(map(len, rows)), threads, watch=where, writable=True) as engine, ThreadPoolExecutor(usable_processors()) as pool:
        reference = _Reference(engine, rows, loss_masks, lambda count: report(count, total))
        where.check()
        if not reference.finite:
            return SensitivityResult(finite=False)
        left = [name for name in names if name in where and name not in found]
        report(sum(map(len, rows)) * (len(names) - len(left)), total)
        for name, given in _with_factors(Path(gguf), calibration if rounding == "learned" else [], model, left, threads):
            source = model.tensors.pop(name)
            original = source.load()
            experts: Sequence[np.ndarray | None] = list(weights[name]) if name in weights else [None]
            types = candidates(original.shape[1], name in weights)
            probe = next(type_ for type_ in _PROBES if type_ in types)
            if given is None:
                errors = dict(zip(types, pool.map(partial(_squared_error, values=original, experts=experts, search=search), types), strict=True))
                rounded = _rounded(probe, original, experts, pool, search)
            else:
                errors = {type_: _output_error(type_, original, experts[0], given, pool) for type_ in types}
                rounded = _by_output(probe, original, experts[0], given, pool)
            where.write(name, _as(source.type_name, rounded))
            try:
                divergence = reference.divergence(lambda count: report(count, total))
            finally:
                where.write(name, _as(source.type_name, original))
            if not np.isfinite(divergence):
                return SensitivityResult(finite=False)
            found[name] = MatrixLoss(divergence, probe, errors)
            write_atomically(Path(out), json.dumps({"key": key, "matrices": {name: vars(loss) for name, loss in found.items()}}, indent=1) + "\n")
    return SensitivityResult(finite=True)


def _with_factors(
    gguf: Path, rows: list[list[int]], model: SourceModel, names: Sequence[str], threads: int | None
) -> Iterator[tuple[str, Factor | None]]:
    """The matrices with what their inputs on the rows say of errors, where rows are given and the matrix is rounded by that."""
    shapes = {name: (model.tensors[name].shape[0], model.tensors[name].shape[1]) for name in names if rows and is_layer_matrix(model.tensors[name])}
    for sharing, given in input_factors(gguf, rows, shapes, threads=threads):
        for name in sharing:
            yield name, given
    for name in names:
        if name not in shapes:
            yield name, None


def _measured_before(path: Path, key: str) -> dict[str, MatrixLoss]:
    """The figures of an earlier run with the same key, which may have been interrupted."""
    try:
        earlier: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return {name: MatrixLoss(**fields) for name, fields in earlier["matrices"].items()} if earlier.get("key") == key else {}


class _Reference:
    """The unchanged model's predictions, and how far from them a changed one's are.

    Attributes:
        finite: whether they are numbers: in F16 some models overflow.
    """

    def __init__(self, engine: Any, rows: Sequence[Sequence[int]], loss_masks: Sequence[Sequence[bool]], advance: Callable[[int], None]):
        self._engine, self._rows, self._loss_masks = engine, rows, loss_masks
        most = max(1, _REFERENCE_BYTES // (4 * engine.vocabulary_size))
        self._kept: list[np.ndarray] = []
        for scores in self._scores(advance):
            self._kept.append(scores.astype(np.float32))
            if len(self._kept) == most:
                break
        self.finite = all(np.isfinite(scores).all() for scores in self._kept)

    def divergence(self, advance: Callable[[int], None]) -> float:
        """Mean KL divergence in nats a token."""
        return float(np.mean([kl_divergence(kept, scores) for kept, scores in zip(self._kept, self._scores(advance), strict=False)]))

    def _scores(self, advance: Callable[[int], None]) -> Iterator[np.ndarray]:
        for ids, loss_mask in zip(self._rows, self._loss_masks, strict=True):
            for _, logits in self._engine.scored(ids, loss_mask):
                yield log_softmax(logits)
            advance(len(ids))


def _squared_error(type_name: str, values: np.ndarray, experts: Sequence[np.ndarray | None], search: bool) -> float:
    """Σ_j w_j · Σ_i (v_ij - rounded v_ij)² over rows from all of the matrix, with w the weights of its columns, or ones."""
    rows, columns = values.shape
    chosen = np.unique(np.linspace(0, rows - 1, min(rows, max(len(experts), _SAMPLE // columns))).astype(int))
    total = 0.0
    for expert, weights in enumerate(experts):
        mine = values[chosen[chosen * len(experts) // rows == expert]]
        if len(mine):
            squares = np.square(mine - _round(type_name, mine, weights, search), dtype=np.float64).sum(axis=0)
            total += float(squares.sum() if weights is None else squares @ weights)
    return total


def _output_error(type_name: str, values: np.ndarray, importance: np.ndarray | None, given: Factor, pool: ThreadPoolExecutor) -> float:
    """What a type changes in the outputs of some rows from all of the matrix, squared and summed."""
    some = values[np.unique(np.linspace(0, len(values) - 1, min(len(values), max(1, _SAMPLE // values.shape[1]))).astype(int))]
    return output_error(some, _by_output(type_name, some, importance, given, pool), given)


def _by_output(type_name: str, values: np.ndarray, importance: np.ndarray | None, given: Factor, pool: ThreadPoolExecutor) -> np.ndarray:
    """A matrix rounded to a type as the files have it, float32 of the same shape: by its outputs where that type can be."""
    if type_name not in GRID_TYPES:
        return _round(type_name, values, importance, search=True)
    packed = round_matrix(type_name, values, given, pool)
    if packed is None:
        raise _too_large()
    return _dequantized(type_name, packed, values)


def _rounded(type_name: str, values: np.ndarray, experts: Sequence[np.ndarray | None], pool: ThreadPoolExecutor, search: bool) -> np.ndarray:
    """A matrix rounded to a type, float32 of the same shape."""
    rows, columns = values.shape
    step, of_one = max(1, CHUNK // columns), rows // len(experts)
    parts = [
        pool.submit(_round, type_name, values[start : min(start + step, first + of_one)], weights, search)
        for first, weights in zip(range(0, rows, of_one), experts, strict=True)
        for start in range(first, first + of_one, step)
    ]
    return np.concatenate([part.result() for part in parts])


def _round(type_name: str, values: np.ndarray, importance: np.ndarray | None, search: bool) -> np.ndarray:
    type_ = library.tensor_type(type_name)
    packed = np.empty((len(values), library.row_size(type_, values.shape[1])), np.uint8)
    if not library.quantize_rows(type_, values, packed, importance, search=search):
        raise _too_large()
    return _dequantized(type_name, packed, values)


def _dequantized(type_name: str, packed: np.ndarray, like: np.ndarray) -> np.ndarray:
    values = np.empty_like(like)
    library.dequantize_rows(library.tensor_type(type_name), packed, values)
    return values


def _too_large() -> OlpackError:
    return OlpackError("The model has weights that are too large to be quantized.", "Leave the budget out, or take another checkpoint.")


def _as(type_name: str, values: np.ndarray) -> np.ndarray:
    """The bytes of float32 values in a float type of ggml."""
    type_ = library.tensor_type(type_name)
    if type_name == "F32":
        return values
    out = np.empty((len(values), library.row_size(type_, values.shape[1])), np.uint8)
    library.quantize_rows(type_, values, out)
    return out
