"""The plan of each file: the tensors in llama.cpp's order with the types that llama.cpp itself chooses, and the header's bytes.

llama.cpp decides from a GGUF with a real header and a hole in place of the data, so no rule about types is repeated here.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from olpack import bounded_regex
from olpack.errors import OlpackError
from olpack.export.converter import FLOATS, SourceModel
from olpack.export.gguf_writer import header_bytes, packed_array
from olpack.export.importance import ColumnWeights
from olpack.export.size_budget import MatrixLoss, choose, quantizable_tensors
from olpack.llamacpp import library
from olpack.quants import QUANT_TYPES, Budget, QuantType, gains_by_importance, overridable
from olpack.workspace import scratch

# The mixes of which the nearest names a file with chosen types in its header.
_MIXES = ("Q2_K", "Q3_K_S", "Q3_K_M", "Q3_K_L", "Q4_K_S", "Q4_K_M", "Q5_K_S", "Q5_K_M", "Q6_K", "Q8_0")

_LAYER = re.compile(r"^\w+\.\d+\.")  # "blk.7."

ALIGNMENT = 32  # of tensor data in a GGUF; llama.cpp's quantizer knows no other


@dataclass(frozen=True)
class FilePlan:
    """The plan of one GGUF: its header's bytes, and its tensors.

    Attributes:
        quant: the file type.
        header: everything in front of the first tensor's data, padding included.
        tensors: (name, tensor type of ggml, bytes without padding) in the order of the file.
        fallbacks: llama.cpp's message for each tensor whose rows do not fit the blocks of its type.
        unweighted: tensors of the layers that are quantized without importance in a file that is made with a matrix.
        needs_importance: whether llama.cpp makes these types with an importance matrix only.
    """

    quant: QuantType
    header: bytes
    tensors: list[tuple[str, int, int]]
    fallbacks: list[str]
    unweighted: list[str] = field(default_factory=list)
    needs_importance: bool = False

    @property
    def types(self) -> dict[str, dict[str, int]]:
        """How many matrices of each kind ("attn_v", "token_embd") have which quantized type."""
        found: dict[str, dict[str, int]] = {}
        for name, type_, _ in self.tensors:
            if (type_name := library.type_name(type_)).upper() not in FLOATS:
                of_kind = found.setdefault(_LAYER.sub("", name).removesuffix(".weight"), {})
                of_kind[type_name] = of_kind.get(type_name, 0) + 1
        return found

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
def header_only_gguf(model: SourceModel) -> Iterator[Path]:
    """llama.cpp's BF16 file of a model as a sparse file: a real header and a hole in place of the data. A few MB, whatever the model's size."""
    tensors = [(t.name, library.tensor_type(t.type_name), t.nbytes) for t in model.tensors.values()]
    header = _header(model, tensors, ftype=None)
    with scratch() as folder:
        path = folder / "model.gguf"
        try:
            with path.open("wb") as file:
                file.write(header)
                file.truncate(len(header) + sum(padded(nbytes) for _, _, nbytes in tensors))
        except OSError as error:
            raise OlpackError(
                f"A header of {len(header):,} bytes does not fit into '{folder}': {os.strerror(error.errno) if error.errno else error}.",
                "Free space there, or set TMPDIR to another folder.",
            ) from error
        yield path


@contextmanager
def vocabulary_file(model: SourceModel, pre_tokenizer: str | None = None) -> Iterator[Path]:
    """A GGUF of a model's keys alone: enough for its vocabulary.

    Args:
        pre_tokenizer: llama.cpp's name of one, in place of the model's.
    """
    with scratch() as folder:
        path = folder / "vocabulary.gguf"
        path.write_bytes(_header(model, [], ftype=None, more={} if pre_tokenizer is None else {"tokenizer.ggml.pre": pre_tokenizer}))
        yield path


def plan_files(
    model: SourceModel,
    header_gguf: Path,
    quants: Sequence[QuantType],
    *,
    importance: ColumnWeights | None = None,
    tensor_types: Mapping[str, str] = {},
    losses: Mapping[str, MatrixLoss] = {},
) -> list[FilePlan]:
    """Plan one file per quant.

    Args:
        model: the opened model.
        header_gguf: its `header_only_gguf`.
        quants: the file types.
        importance: the importance matrix, if there is one. Files that gain nothing by it are the same as without.
        tensor_types: regular expression to tensor type: the first that is found in a tensor's name decides, in quantized file types.
        losses: by tensor name, what decides the types in a file with a budget. Empty: types for which the file has the size that it will have.

    Raises:
        OlpackError: llama.cpp refuses the model, a quant needs an importance matrix or has none for some tensor, the base's weights are
            quantized already, one of `tensor_types` is for no tensor, or a budget is too small.
    """
    plans = []
    for quant in quants:
        types = tensor_types
        if quant.budget:
            quant, types = _within_budget(model, header_gguf, quant, quant.budget, importance, tensor_types, losses)
        plan = _plan(model, header_gguf, quant, importance, types)
        if importance is not None and gains_by_importance(quant, types):
            plan = replace(plan, needs_importance=_needs_importance(library.type_plan(header_gguf, _file_type(quant), overrides=_overrides(types))))
        plans.append(plan)
    return plans


def _within_budget(
    model: SourceModel,
    header_gguf: Path,
    quant: QuantType,
    budget: Budget,
    importance: ColumnWeights | None,
    tensor_types: Mapping[str, str],
    losses: Mapping[str, MatrixLoss],
) -> tuple[QuantType, dict[str, str]]:
    """(the quant with the file type of the nearest mix, patterns for the types of its tensors: the user's first)."""
    like = _plan(model, header_gguf, replace(quant, ftype=QUANT_TYPES["Q4_K_M"].ftype), importance, tensor_types)
    now = {name: (type_, nbytes) for name, type_, nbytes in like.tensors}
    matrices = [name for name in quantizable_tensors(header_gguf) if not any(_fits(pattern, name) for pattern in tensor_types)]
    unused = [name for name in matrices if losses and name not in losses]  # no pass over the rows uses them
    shapes = {}
    for name in matrices:
        if name not in unused:
            columns = model.tensors[name].shape[-1]
            shapes[name] = (model.tensors[name].elements // columns, columns)
    rest = like.data_size - sum(now[name][1] for name in shapes)
    if budget.size is not None:
        alignment, beside, limit = ALIGNMENT, like.size - sum(padded(now[name][1]) for name in shapes), budget.size
    else:
        assert budget.bits_per_weight is not None  # a budget has one of the two
        alignment, beside, limit = 1, rest, math.floor(budget.bits_per_weight * model.parameters / 8)
    try:
        chosen = choose(shapes, losses, limit - beside, with_importance=importance is not None, alignment=alignment)
    except ValueError as error:
        least = beside + error.args[0]
        bits = math.ceil(800 * least / model.parameters) / 100
        smallest = f"{bits:g}bpw" if budget.size is None else f"{math.ceil(least / 1000) / 1000:g}MB"
        problem = f"No choice of types makes a file of {quant.tag} from this model."
        raise OlpackError(problem, f"The smallest that is possible is {smallest}.") from None
    types = dict(tensor_types)
    types |= {f"^{re.escape(name)}$": type_ for name, type_ in chosen.items()}
    types |= {f"^{re.escape(name)}$": library.type_name(now[name][0]) for name in unused}
    taken = sum(rows * library.row_size(library.tensor_type(chosen[name]), columns) for name, (rows, columns) in shapes.items())
    return replace(quant, ftype=_nearest_mix(model, header_gguf, rest + taken, importance).ftype), types


def _nearest_mix(model: SourceModel, header_gguf: Path, size: int, importance: ColumnWeights | None) -> QuantType:
    """The mix of llama.cpp's whose tensors take nearest to so many bytes."""
    mixes = [_plan(model, header_gguf, QUANT_TYPES[name], importance, {}) for name in _MIXES]
    return min(mixes, key=lambda mix: abs(mix.data_size - size)).quant


def _plan(model: SourceModel, header_gguf: Path, quant: QuantType, importance: ColumnWeights | None, tensor_types: Mapping[str, str]) -> FilePlan:
    matrix = importance if gains_by_importance(quant, tensor_types) else None
    overrides = _overrides(tensor_types)
    ftype = _file_type(quant)
    chosen = library.type_plan(header_gguf, ftype, overrides=overrides, with_importance=matrix is not None)
    if {name for name, _ in chosen.tensors} != set(model.tensors):
        raise OlpackError(
            "llama.cpp's library and its converter list different tensors for this model.",
            "Their versions differ: unset OLPACK_LLAMA_CPP, or install the matching llama-cpp-python.",
        )
    changed = {name: type_ for name, type_ in chosen.tensors if type_ != library.tensor_type(model.tensors[name].type_name)}
    if overridable(quant):
        _refuse_idle(overrides, chosen, changed)
    missing: dict[str, int] = {}
    if matrix is None:
        if _needs_importance(chosen):
            raise OlpackError(
                f"{quant.name} needs an importance matrix.",
                "Set `export.importance: train` in the recipe, or give one to `olpack quantize` with --importance.",
            )
    elif matrix.by_tensor is not None:
        missing = {name: type_ for name, type_ in changed.items() if name not in matrix.by_tensor}
        _refuse_gaps(header_gguf, quant, missing)
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
    header = _header(model, tensors, ftype, matrix.keys if matrix else {})
    return FilePlan(quant, header, tensors, chosen.fallbacks, [name for name in missing if name.startswith("blk.")])


def _file_type(quant: QuantType) -> int:
    assert quant.ftype is not None  # a budget gets the number of the nearest mix before it is planned
    return quant.ftype


def _overrides(tensor_types: Mapping[str, str]) -> list[tuple[str, int]]:
    return [(pattern, library.tensor_type(name)) for pattern, name in tensor_types.items()]


def _needs_importance(chosen: library.TypePlan) -> bool:
    return chosen.needs_importance or any(library.requires_importance(type_) for _, type_ in chosen.tensors)


def _refuse_idle(overrides: Sequence[tuple[str, int]], chosen: library.TypePlan, changed: Mapping[str, int]) -> None:
    """Raise OlpackError where a pattern has no effect: it matches no tensor, or only such as llama.cpp never quantizes (norms, routers)."""
    for pattern, wanted in overrides:
        named = [(name, type_) for name, type_ in chosen.tensors if _fits(pattern, name)]
        if not any(name in changed or type_ == wanted for name, type_ in named):
            what = f"quantizes no tensor named like '{pattern}'" if named else f"has no tensor named like '{pattern}'"
            raise OlpackError(
                f"llama.cpp {what} in this model, which tensor_types has.", f"Names are like {', '.join(list(changed)[:3])}: correct the pattern."
            )


def _refuse_gaps(header_gguf: Path, quant: QuantType, missing: Mapping[str, int]) -> None:
    """Raise OlpackError where a tensor that is not in the matrix would get a type that needs it.

    llama.cpp itself reports which types those are: in a plan in which every other tensor gets a type that needs no matrix.
    """
    aborting = [name for name, type_ in missing.items() if library.requires_importance(type_)]
    alone = [(f"^{re.escape(name)}$", type_) for name, type_ in missing.items()]
    everything_else = (".", library.tensor_type("q8_0"))
    if aborting or library.type_plan(header_gguf, _file_type(quant), overrides=[*alone, everything_else]).needs_importance:
        name = next(iter([*aborting, *(name for name in missing if name.startswith("blk.")), *missing]))
        raise OlpackError(
            f"{quant.name} needs the importance of every tensor, and the matrix lacks '{name}'.",
            "Collect it on this model, or give that tensor a larger type (tensor_types).",
        )


def _header(model: SourceModel, tensors: Sequence[tuple[str, int, int]], ftype: int | None, more: Mapping[str, Any] = {}) -> bytes:
    """Magic, keys and tensor table. With `ftype`, the keys are in the order in which llama.cpp's quantizer writes them, `more` last."""
    import gguf

    class Writer(gguf.GGUFWriter):
        def _pack_val(self, val: Any, vtype: gguf.GGUFValueType, add_vtype: bool, sub_type: gguf.GGUFValueType | None = None) -> bytes:
            if vtype != gguf.GGUFValueType.ARRAY or not add_vtype:
                return super()._pack_val(val, vtype, add_vtype, sub_type)
            if id(val) not in model.packed:
                model.packed[id(val)] = packed_array(val, sub_type) or super()._pack_val(val, vtype, add_vtype, sub_type)
            return model.packed[id(val)]

    writer = Writer(None, model.architecture)
    writer.kv_data = [dict(model.keys)]
    if ftype is not None:
        for key in (gguf.Keys.General.QUANTIZATION_VERSION, gguf.Keys.General.FILE_TYPE):
            writer.kv_data[0].pop(key, None)  # the quantizer sets these two last
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        writer.add_file_type(ftype)
    for key, value in more.items():
        writer.kv_data[0].pop(key, None)
        writer.add_uint32(key, value) if isinstance(value, int) else writer.add_string(key, value)
    for name, type_, nbytes in tensors:
        writer.add_tensor_info(name, _trimmed(model.tensors[name].shape), np.dtype(np.float32), nbytes, gguf.GGMLQuantizationType(type_))
    header = header_bytes(writer)
    return header.ljust(padded(len(header)), b"\0")


def _trimmed(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A shape without leading ones: ggml does not store dimensions of one beyond the last that matters."""
    while len(shape) > 1 and shape[0] == 1:
        shape = shape[1:]
    return shape or (1,)


def _fits(pattern: str, name: str) -> bool:
    """Whether a pattern of `export.tensor_types` matches a part of a tensor's name."""
    return bounded_regex.search(pattern, name, "`export.tensor_types`")
