"""Matrices that are rounded before the pass over the model, so that their outputs on the user's rows change least (`rounding: learned`).

The model reads the rows, some layers at a time: as many as have room in memory for the second moments of their inputs. Then each matrix of
those layers is rounded to every type that some file gives it, and its blocks are written to a file of their own. The pass copies them from there.
What is written stays written, so an interrupted run goes on with the layers that are left.

The matrices of experts (each is read by few of the tokens), the embedding and the output layer are none of these: their scales are searched for.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from olpack import progress
from olpack.errors import OlpackError, first_line
from olpack.export.converter import FLOATS, SourceModel, SourceTensor
from olpack.export.job import RoundedMatrices, blocks_file
from olpack.export.plan import FilePlan
from olpack.export.second_order import DAMPING, Factor, factor, round_matrix
from olpack.export.write import prepare_weights, too_large
from olpack.llamacpp import library
from olpack.llamacpp.activations import InputProducts, input_products
from olpack.llamacpp.cores import usable_processors
from olpack.llamacpp.grids import GRID_TYPES
from olpack.machine import this_machine
from olpack.quants import FEW_BITS, has_few_bits
from olpack.workspace import write_atomically

if TYPE_CHECKING:
    import torch

    from olpack.train.layer_inputs import LayerInputs

_MATRIX = re.compile(r"blk\.(\d+)\.[\w.-]+")
_INDEX = "matrices.json"


def rounded_types(model: SourceModel, plans: Sequence[FilePlan]) -> dict[str, list[str]]:
    """The matrices that can be rounded by what they are multiplied with, and the types that files give them, layer by layer."""
    found: dict[str, list[str]] = {}
    for name, type_, _ in (tensor for plan in plans for tensor in plan.tensors):
        source, type_name = model.tensors[name], library.type_name(type_)
        if is_layer_matrix(source) and type_name in GRID_TYPES and not (source.stored and source.stored[0] == type_):
            types = found.setdefault(name, [])
            types.extend([type_name] if type_name not in types else [])
    return dict(sorted(found.items(), key=lambda item: _layer(item[0])))


def is_layer_matrix(source: SourceTensor) -> bool:
    """Whether a tensor is one matrix of a layer, and neither a stack of experts nor the embedding or the output layer."""
    return bool(_MATRIX.fullmatch(source.name)) and len(source.shape) == 2 and source.type_name in FLOATS


def few_bit_matrices(model: SourceModel, plan: FilePlan, tensor_types: Mapping[str, str]) -> dict[str, str]:
    """The matrices of a file that can be rounded, and their types, where most of the layers' weights are in Q2_K, Q3_K or Q4_0; else nothing."""
    if not has_few_bits(plan.quant, tensor_types):
        return {}
    types = {name: one for name, (one,) in rounded_types(model, [plan]).items()}
    of_layers = sum(model.tensors[name].elements for name, _, _ in plan.tensors if _MATRIX.fullmatch(name))
    few = sum(model.tensors[name].elements for name, one in types.items() if one.upper() in FEW_BITS)
    return types if 2 * few > of_layers else {}


def missing_types(folder: Path, wanted: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """The matrices that are not in `folder` in some of the types that are wanted, and those types."""
    missing = {name: [one for one in types if not blocks_file(folder, name, one).is_file()] for name, types in wanted.items()}
    return {name: types for name, types in missing.items() if types}


def packed_size(model: SourceModel, wanted: Mapping[str, Sequence[str]]) -> int:
    """Bytes of the blocks of matrices in some types."""
    return sum(
        model.tensors[name].shape[0] * library.row_size(library.tensor_type(one), model.tensors[name].shape[1])
        for name, types in wanted.items()
        for one in types
    )


@contextmanager
def gpu_memory_for_others() -> Iterator[None]:
    """Give back the GPU's memory after the function: this process goes on, and another one trains block scales.

    Raises:
        OlpackError: within it the GPU's memory ran out.
    """
    import torch

    from olpack.train import free_memory

    try:
        yield
    except torch.OutOfMemoryError:
        problem = "Rounding matrices by their outputs ran out of the GPU's memory."
        raise OlpackError(problem, "Free memory there, or do it on the CPU: run the command with CUDA_VISIBLE_DEVICES= before it.") from None
    finally:
        free_memory()


@gpu_memory_for_others()
def round_to_files(
    model: SourceModel,
    wanted: Mapping[str, Sequence[str]],
    gguf: Path,
    rows: Sequence[Sequence[int]],
    folder: Path,
    *,
    round_to_bf16: bool = False,
    threads: int | None = None,
    report: Callable[[int, int], None],
) -> RoundedMatrices:
    """Write the blocks of each matrix in each type to `folder`, except for those that are there. The matrices of `model` are used up.

    Args:
        model: the opened model.
        wanted: as `rounded_types` gives it.
        gguf: the same model, which reads the rows.
        rows: token ids.
        round_to_bf16: as in `write_files`.
        threads: that read the rows, by default one for each core; and that search for scales, by default one for each processor.
        report: gets what is done, and how much there is in all: weights, each of which is read once and rounded to each type.

    Raises:
        OlpackError: what goes into a matrix is no number, a weight is none, or a disk fills up.
    """
    missing = missing_types(folder, wanted)
    shapes = {name: (model.tensors[name].shape[0], model.tensors[name].shape[1]) for name in missing}
    total = sum(model.tensors[name].elements * (1 + len(types)) for name, types in missing.items())
    unread: list[str] = []
    damped: list[str] = []
    with ThreadPoolExecutor(threads or usable_processors(), thread_name_prefix="search") as pool:
        for names, given in input_factors(gguf, rows, shapes, threads=threads, advance=lambda count: report(count, total)):
            for name in names:
                source = model.tensors.pop(name)
                if given is None:
                    unread.append(name)
                    continue
                if given.damping > DAMPING:
                    damped.append(name)
                values = source.load()
                prepare_weights(source, values, round_to_bf16)
                for one in missing[name]:
                    blocks = round_matrix(one, values, given, pool)
                    if blocks is None:
                        raise too_large(source)
                    write_atomically(blocks_file(folder, name, one), blocks.tobytes())
                    report(values.size, total)
    made = {name: types for name, types in wanted.items() if name not in unread}
    write_atomically(folder / _INDEX, json.dumps(made, indent=1) + "\n")
    tokens = sum(map(len, rows))
    return RoundedMatrices(
        matrices=len(made), unread=unread, damped=damped, singular=[name for name, (_, columns) in shapes.items() if columns > tokens]
    )


def rounded_files(folder: Path, wanted: Mapping[str, Sequence[str]]) -> dict[tuple[str, int], Path]:
    """The files of blocks that `round_to_files` wrote, by matrix and tensor type of ggml.

    Raises:
        OlpackError: it has not finished in this folder.
    """
    try:
        made: dict[str, list[str]] = json.loads((folder / _INDEX).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise OlpackError(f"The rounded matrices in '{folder}' are not complete.", "Build again: it goes on where it was.") from error
    return {(name, library.tensor_type(one)): blocks_file(folder, name, one) for name in wanted.keys() & made.keys() for one in wanted[name]}


def _layer(name: str) -> int:
    match = _MATRIX.fullmatch(name)
    assert match, name
    return int(match[1])


def input_factors(
    gguf: Path,
    rows: Sequence[Sequence[int]],
    shapes: Mapping[str, tuple[int, int]],
    *,
    threads: int | None = None,
    advance: Callable[[int], None] = lambda count: None,
) -> Iterator[tuple[list[str], Factor | None]]:
    """What the inputs of matrices say of the errors of their columns, for those with the same input at a time.

    Args:
        gguf: the model, which reads the rows once for as many layers as the memory has room for.
        rows: token ids.
        shapes: (rows, columns) of the matrices, by name.
        threads: that read the rows; by default one for each core.
        advance: gets a share of the matrices' weights for each row that is read.

    Returns:
        (their names, the factor). It is None for matrices that no row was multiplied with, or only zeros.

    Raises:
        OlpackError: what goes into a matrix is infinite or undefined.
    """
    import torch

    layers: dict[int, list[str]] = {}
    for name in shapes:
        layers.setdefault(_layer(name), []).append(name)
    if not layers:
        return
    tokens = sum(map(len, rows))
    sizes = [[shapes[name] for name in names] for names in layers.values()]
    memory = _Memory.available(sizes)
    model = _on_gpu(gguf, shapes, rows, memory)
    if model is not None and (memory := _Memory.available(sizes)).device.type != "cuda":  # another program took what was free
        model = None
    for names in memory.groups(layers, shapes):
        shares = _Shares(sum(rows * columns for rows, columns in (shapes[name] for name in names)), tokens, advance)
        found = None
        with torch.inference_mode():
            if model is not None and (found := _read_on_gpu(model, rows, names, shares)) is None:
                model = None
            if found is None:
                found = input_products(gguf, rows, names, memory.device, threads=threads, advance=shares)
        inputs: dict[int, tuple[InputProducts, list[str]]] = {}
        for name in names:
            if name in found:
                products = found.pop(name)
                inputs.setdefault(id(products), (products, []))[1].append(name)
        unread = [name for name in names if not any(name in sharing for _, sharing in inputs.values())]
        if unread:
            yield unread, None
        for key in list(inputs):
            products, sharing = inputs.pop(key)
            with torch.inference_mode():
                if not torch.isfinite(products.sums).all():
                    raise OlpackError(
                        f"The model '{gguf}' computes no numbers: what goes into '{sharing[0]}' is infinite or undefined.",
                        "Its weights are damaged, or its training diverged: take another checkpoint.",
                    )
                given = factor(products.sums, products.count)
            del products
            yield sharing, given


def _on_gpu(gguf: Path, names: Collection[str], rows: Sequence[Sequence[int]], memory: _Memory) -> LayerInputs | None:
    """The model on the GPU where second moments are collected, to read rows there, if there is room for it."""
    if memory.device.type != "cuda":
        return None
    from olpack.model.libraries import import_libraries

    import_libraries()
    from olpack.train.layer_inputs import LayerInputs

    try:
        return LayerInputs.load(gguf, names, max(map(len, rows), default=0), memory.device, memory.spare)
    except Exception as error:  # whatever it is, llama.cpp reads the rows
        _leave_it_to_llama_cpp(error)
        return None


def _read_on_gpu(
    model: LayerInputs, rows: Sequence[Sequence[int]], names: Collection[str], advance: Callable[[int], None]
) -> dict[str, InputProducts] | None:
    """As `input_products`; None where it fails, as for a lack of memory."""
    try:
        return model.products(rows, names, advance)
    except Exception as error:
        _leave_it_to_llama_cpp(error)
        return None


def _leave_it_to_llama_cpp(error: Exception) -> None:
    problem = first_line(error)
    progress.warn(f"llama.cpp reads the rows on the CPU, which is slower: the model cannot on the GPU ({problem})")


@dataclass(frozen=True)
class _Memory:
    """Where second moments are collected, and how many bytes of them at once.

    Attributes:
        spare: bytes that are free besides the second moments of a layer and the work on a matrix.
    """

    device: torch.device
    limit: int
    spare: int

    @classmethod
    def available(cls, layers: Sequence[Sequence[tuple[int, int]]]) -> _Memory:
        """Half of what is free, of the GPU where it has room for one layer and for the work on its largest matrix, else of the host.

        Args:
            layers: (rows, columns) of each matrix of each layer.
        """
        import psutil
        import torch

        # H in float64, its factor in float64 and in float32, and three copies of the weights in float32.
        work = max(20 * columns**2 + 12 * rows * columns for layer in layers for rows, columns in layer)
        least = max(map(_products_size, layers)) + work
        if torch.cuda.is_available() and (free := torch.cuda.mem_get_info()[0]) > 1.2 * least:
            return cls(torch.device("cuda"), (free - work) // 2, int(free / 1.2) - least)
        free = min(psutil.virtual_memory().available, this_machine().ram)
        return cls(torch.device("cpu"), (free - work) // 2, free - least)

    def groups(self, layers: Mapping[int, Sequence[str]], shapes: Mapping[str, tuple[int, int]]) -> Iterator[list[str]]:
        """The names of the matrices of as many layers as there is room for, at least of one."""
        group: list[str] = []
        taken = 0
        for names in layers.values():
            size = _products_size([shapes[name] for name in names])
            if group and taken + size > self.limit:
                yield group
                group, taken = [], 0
            group = [*group, *names]
            taken += size
        yield group


def _products_size(layer: Sequence[tuple[int, int]]) -> int:
    """Most bytes of the second moments of a layer: less where matrices share an input."""
    return sum(4 * columns**2 for _, columns in layer)


class _Shares:
    """Turns tokens that were read into a share of some weights."""

    def __init__(self, weights: int, tokens: int, advance: Callable[[int], None]):
        self._weights, self._tokens, self._advance = weights, tokens, advance
        self._read = self._given = 0

    def __call__(self, tokens: int) -> None:
        self._read = min(self._read + tokens, self._tokens)  # where the GPU read a part before it failed, they are read again
        now = self._weights * self._read // self._tokens
        self._advance(now - self._given)
        self._given = now
