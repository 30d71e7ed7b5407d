"""A budget: the type of each matrix with the least total loss on the user's data, in a file of at most so many bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pydantic import TypeAdapter

from olpack import bounded_json
from olpack.errors import OlpackError
from olpack.llamacpp import library

# For rows of whole blocks of 256 weights, and for others. Types below Q2_K lose more than a model can bear in most of its matrices.
_TYPES = ("q2_K", "q3_K", "iq3_s", "iq4_xs", "q4_K", "q5_K", "q6_K", "q8_0")
_TYPES_OF_SHORT_ROWS = ("q4_0", "iq4_nl", "q5_0", "q5_1", "q8_0")
_WITH_IMPORTANCE = ("iq3_s", "iq4_xs", "iq4_nl")  # poor without

_Q8_0 = 7  # LLAMA_FTYPE_MOSTLY_Q8_0
_UNITS = 1 << 17  # of size, at most, that the search tells apart: a second of work for a model of hundreds of matrices


@dataclass(frozen=True)
class MatrixLoss:
    """The measured sensitivity of one matrix.

    Attributes:
        divergence: KL divergence in nats a token of the model with only this matrix rounded to `probe`.
        probe: a tensor type of ggml.
        errors: squared error of each type that can be chosen, weighted with the importance of the columns.
    """

    divergence: float
    probe: str
    errors: dict[str, float]

    def loss(self, type_name: str) -> float:
        """Expected KL divergence, in nats a token, of a type."""
        probed = self.errors[self.probe]
        return self.divergence * self.errors[type_name] / probed if probed else 0.0  # a matrix of zeros is exact in any type


def read_sensitivity(path: Path) -> dict[str, MatrixLoss]:
    """The figures of `olpack.export.measure_sensitivity`, by tensor name.

    Raises:
        OlpackError: no such file, or one without these figures.
    """
    try:
        found = TypeAdapter(dict[str, MatrixLoss]).validate_python(bounded_json.read_object(path, "Build again.").get("matrices"))
        if any(loss.probe not in loss.errors for loss in found.values()):
            raise ValueError
        return found
    except (OlpackError, ValueError) as error:
        raise OlpackError(f"'{path}' contains no measured sensitivity.", "Delete it, and build again.") from error


def candidates(columns: int, with_importance: bool) -> list[str]:
    """The types that a matrix may get, by the length of its rows, and whether the importance of its columns is known."""
    types = _TYPES if library.fits(library.tensor_type(_TYPES[0]), columns) else _TYPES_OF_SHORT_ROWS
    return [name for name in types if with_importance or name not in _WITH_IMPORTANCE]


def quantizable_tensors(header_gguf: Path) -> list[str]:
    """The tensors that llama.cpp quantizes, of a model's header-only GGUF."""
    return [name for name, type_ in library.type_plan(header_gguf, _Q8_0).tensors if type_ == library.tensor_type("q8_0")]


def choose(
    shapes: Mapping[str, tuple[int, int]], losses: Mapping[str, MatrixLoss], limit: int, *, with_importance: bool, alignment: int
) -> dict[str, str]:
    """The types with which all matrices together take at most so many bytes and lose least.

    Args:
        shapes: (rows, columns) of each matrix, by name.
        losses: of each matrix, as measured. Empty before that: then the bits of a type decide its loss.
        limit: bytes.
        with_importance: whether there is an importance matrix.
        alignment: each matrix takes a multiple of so many bytes.

    Raises:
        ValueError: the limit is too small; its argument is the smallest possible one.
    """
    options, sizes, lost = [], [], []
    for name, (rows, columns) in shapes.items():
        types = list(losses[name].errors) if losses else candidates(columns, with_importance)
        packed = [rows * library.row_size(library.tensor_type(type_), columns) for type_ in types]
        options.append(types)
        sizes.append([-(-size // alignment) * alignment for size in packed])
        lost.append(
            [
                losses[name].loss(type_) if losses else rows * columns * 4.0 ** (-8 * size / (rows * columns))
                for type_, size in zip(types, packed, strict=True)
            ]
        )
    chosen = solve_knapsack(sizes, lost, limit)
    if chosen is None:
        raise ValueError(sum(map(min, sizes)))
    return {name: types[index] for name, types, index in zip(shapes, options, chosen, strict=True)}


def solve_knapsack(sizes: Sequence[Sequence[int]], losses: Sequence[Sequence[float]], limit: int) -> list[int] | None:
    """The choice of one option for each item that loses least in all, of those whose sizes add up to no more than a limit.

    A multiple-choice knapsack, solved by dynamic programming over the size (Kellerer, Pferschy and Pisinger, Knapsack Problems, section
    11.5). Sizes are counted in units of what divides them all, so the choice is the best there is; where that makes too many, in larger
    units and rounded up, so the limit holds and the last 0.001 % of it may stay unused for each item.

    Args:
        sizes: bytes of each option of each item.
        losses: of each option of each item.
        limit: bytes.

    Returns:
        The index of the option for each item; None where even the smallest are too large.
    """
    smallest = [min(options) for options in sizes]
    budget = limit - sum(smallest)
    if budget < 0:
        return None
    extra = [[size - least for size in options] for options, least in zip(sizes, smallest, strict=True)]
    budget = min(budget, sum(max(options) for options in extra))
    unit = max(1, int(np.gcd.reduce([size for options in extra for size in options])), -(-budget // _UNITS))
    cells = budget // unit + 1
    best = np.zeros(cells)
    taken = np.zeros((len(sizes), cells), np.uint8)
    for item, (options, lost) in enumerate(zip(extra, losses, strict=True)):
        before, best = best, np.full(cells, np.inf)
        for index, (size, loss) in enumerate(zip(options, lost, strict=True)):
            step = -(-size // unit)
            if step < cells:
                with_it = before[: cells - step] + loss
                better = with_it < best[step:]
                best[step:][better] = with_it[better]
                taken[item, step:][better] = index
    cell, chosen = cells - 1, []
    for item in reversed(range(len(sizes))):
        chosen.append(int(taken[item, cell]))
        cell -= -(-extra[item][chosen[-1]] // unit)
    return chosen[::-1]
