"""Second-order rounding: codes that keep a matrix's output on the user's rows, in place of those that keep its weights.

With H the mean of x xᵀ over a matrix's inputs x, the mean square change of an output is e H eᵀ for the row e of errors of that output's weights.
H = R Rᵀ with R upper triangular makes it the sum over columns j of (R_jj (e_j + Σ_{k<j} e_k R_kj / R_jj))², so each column in turn is rounded
to the level that is nearest to its weight plus what the errors before it ask for. That is GPTQ's order and result (Frantar et al., 2023) without
its inverse; Chee et al. (QuIP, 2023, section 3) show that the two are the same. The scales of a block are searched for when its first column is
reached, on the weights as the earlier errors have moved them, and with R_jj² as the weight of column j's error.
"""

from __future__ import annotations

import functools
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from olpack import progress
from olpack.errors import first_line
from olpack.llamacpp import library
from olpack.llamacpp.cores import usable_processors
from olpack.llamacpp.grids import GRID_TYPES, GridType, read_grid, write_codes

if TYPE_CHECKING:
    import torch

    from olpack.export.column_kernel import KernelColumns

# Of the mean of H's diagonal, added to each of its elements. GPTQ's value; more of it came closer to plain rounding (benchmarks/rounding.md).
DAMPING = 0.01
_HARDER = (0.1, 1.0)  # where that leaves a matrix that is not positive definite in floating point

_AT_LEAST = 1 << 12  # weights that one thread searches scales for


@dataclass(frozen=True)
class Factor:
    """What a matrix's inputs say of the errors of its columns.

    Attributes:
        feedback: float32 [columns, columns], strictly lower triangular: R_kj / R_jj in row j, column k.
        weights: float32 [columns], R_jj², on the CPU.
        damping: the share of the mean diagonal that was added.
    """

    feedback: torch.Tensor
    weights: np.ndarray
    damping: float


def factor(products: torch.Tensor, count: int) -> Factor | None:
    """Factorize the second moments of a matrix's inputs.

    Args:
        products: float32 [columns, columns], Σ x xᵀ, on any device. It is left as it is.
        count: of the inputs.

    Returns:
        None where the inputs are all zero.
    """
    import torch

    mean = float(products.diagonal().double().mean()) / count
    if mean == 0:
        return None
    for damping in (DAMPING, *_HARDER):
        # The rows and columns in reverse order turn the lower factor, which torch gives, into the upper one.
        reversed_ = products.flip(0, 1).double() / count
        reversed_.diagonal().add_(damping * mean)
        lower, failed = torch.linalg.cholesky_ex(reversed_)
        del reversed_
        if not int(failed):
            break
    upper = lower.flip(0, 1)
    del lower
    diagonal = upper.diagonal().clone()
    feedback = (upper / diagonal).T.tril(-1).float().contiguous()
    return Factor(feedback, (diagonal**2).float().cpu().numpy(), damping)


def round_matrix(type_name: str, values: np.ndarray, given: Factor, pool: ThreadPoolExecutor) -> np.ndarray | None:
    """Round a matrix so that its outputs change least.

    Args:
        type_name: one of `GRID_TYPES`.
        values: float32 [rows, columns], C-contiguous.
        given: the factor of its inputs' second moments; the work is done on its device.
        pool: threads that search for scales.

    Returns:
        uint8 [rows, bytes of a row], ggml's blocks; None where a scale is infinite or undefined.
    """
    import torch

    device, kind = given.feedback.device, GRID_TYPES[type_name]
    rows, columns = values.shape
    packed = np.empty((rows, columns // kind.block, library.row_size(library.tensor_type(type_name), kind.block)), np.uint8)
    weights = torch.from_numpy(values).to(device).T.contiguous()  # a column's weights are next to each other
    errors = torch.empty_like(weights)
    round_columns = _columns(type_name, device)
    for start in range(0, columns, kind.block):
        stop = start + kind.block
        inside = given.feedback[start:stop, start:stop]
        asked = given.feedback[start:stop, :start] @ errors[:start]
        # What would make up for all the errors so far, if the block's weights were free: the errors that they make at that are fed back, too.
        free = torch.linalg.solve_triangular(inside, asked, upper=False, unitriangular=True)
        blocks = _searched(type_name, (weights[start:stop] + free).T.contiguous().cpu().numpy(), given.weights[start:stop], pool)
        if blocks is None:
            return None
        scales, lows = (torch.from_numpy(one.T.copy()).to(device) for one in read_grid(type_name, blocks))
        codes, errors[start:stop] = round_columns(weights[start:stop], asked, scales, lows, inside)
        write_codes(type_name, blocks, codes.T.contiguous().cpu().numpy())
        packed[:, start // kind.block] = blocks
    return packed.reshape(rows, -1)


class Columns:
    """Rounds the columns of a block, one after the other.

    Args:
        kind: of its type.
    """

    def __init__(self, kind: GridType, device: torch.device):
        import torch

        self.kind, self.levels = kind, torch.tensor(kind.levels, dtype=torch.float32, device=device)
        self._middles, self._whole = (self.levels[1:] + self.levels[:-1]) / 2, kind.whole

    def __call__(
        self, weights: torch.Tensor, asked: torch.Tensor, scales: torch.Tensor, lows: torch.Tensor, feedback: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(codes, uint8; errors, float32), [columns, rows] both.

        Args:
            weights: float32 [columns, rows].
            asked: float32 [columns, rows], what the errors of earlier blocks ask for.
            scales, lows: float32 [parts, rows].
            feedback: float32 [columns, columns], as in `Factor`.
        """
        import torch

        inverses = torch.where(scales == 0, 0, 1 / scales)
        wanted = weights + asked
        errors, codes = torch.empty_like(weights), torch.empty(weights.shape, dtype=torch.uint8, device=weights.device)
        for column, aim in enumerate(wanted):
            part = column // self.kind.part
            if column:
                aim = torch.addmv(aim, errors[:column].T, feedback[column, :column])
            code = self._nearest((aim - lows[part]) * inverses[part])
            codes[column] = code
            torch.sub(weights[column], torch.addcmul(lows[part], scales[part], self.levels[code]), out=errors[column])
        return codes, errors

    def _nearest(self, values: torch.Tensor) -> torch.Tensor:
        """Codes of the levels that are nearest to values, which are changed."""
        import torch

        if self._whole:
            bottom, top = self.kind.levels[0], self.kind.levels[-1]
            return values.round_().clamp_(bottom, top).sub_(bottom).to(torch.int64)
        return torch.bucketize(values, self._middles)


@functools.cache
def _columns(type_name: str, device: torch.device) -> Columns | KernelColumns:
    """The kernel, on a GPU where it works."""
    kind = GRID_TYPES[type_name]
    plain = Columns(kind, device)
    if device.type != "cuda":
        return plain
    try:
        from olpack.export.column_kernel import KernelColumns

        kernel = KernelColumns(kind, device)
        if agree(plain, kernel, kind, device):
            return kernel
        problem = "it gives other codes"
    except Exception as error:  # no Triton, no C compiler, a GPU that it does not know: whatever it is, plain torch works
        problem = first_line(error)
    progress.warn(f"matrices are rounded to {type_name} by plain torch, which is slower: the kernel does not work here ({problem})")
    return plain


def agree(some: Columns, others: Columns | KernelColumns, kind: GridType, device: torch.device) -> bool:
    """Whether both round the same block alike. Its numbers are such that float32 has no need to round any sum, in whatever order it is added up."""
    import torch

    dice = torch.Generator().manual_seed(0)
    rows = 67

    def whole(low: int, high: int, *size: int) -> torch.Tensor:
        return torch.randint(low, high, size, generator=dice).to(device, torch.float32)

    weights, asked = whole(-200, 200, kind.block, rows) / 8, whole(-32, 32, kind.block, rows) / 8
    scales, lows = 2 ** whole(-2, 3, kind.block // kind.part, rows), whole(-8, 8, kind.block // kind.part, rows)
    scales[0, 0] = 0
    feedback = (whole(-2, 3, kind.block, kind.block) / 8).tril(-1)
    given = weights, asked, scales, lows, feedback
    return all(torch.equal(one, other) for one, other in zip(some(*given), others(*given), strict=True))


def _searched(type_name: str, values: np.ndarray, weights: np.ndarray, pool: ThreadPoolExecutor) -> np.ndarray | None:
    """Blocks of one column of blocks with searched scales, uint8 [rows, bytes of a block]; None where one is unsound."""
    type_ = library.tensor_type(type_name)
    blocks = np.empty((len(values), library.row_size(type_, values.shape[1])), np.uint8)
    threads = min(usable_processors(), -(-values.size // _AT_LEAST))
    rows = -(-len(values) // threads)

    def search(first: int) -> bool:
        part = slice(first, first + rows)
        return library.quantize_rows(type_, values[part], blocks[part], weights, search=True)

    return blocks if all(list(pool.map(search, range(0, len(values), rows)))) else None


def output_error(original: np.ndarray, rounded: np.ndarray, given: Factor) -> float:
    """Σ e H eᵀ over the rows e of original - rounded: what the rounding changes in the matrix's outputs, squared.

    Args:
        original, rounded: float32 [rows, columns].
        given: of its inputs.
    """
    import torch

    errors = torch.from_numpy(original - rounded).to(given.feedback.device).T
    moved = (errors + given.feedback @ errors).double()
    return float((moved.square().sum(dim=1) * torch.from_numpy(given.weights).to(moved)).sum())
