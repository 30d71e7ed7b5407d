"""What a model's matrices are multiplied with while it reads text: sums of squares, column by column, for an importance matrix, and sums of
products of any two columns, for second-order rounding.

llama.cpp calls back for every node of its graph, of whatever architecture, so the inputs are those of the matrices under their GGUF names.
What is counted, and how, follows llama.cpp's tools/imatrix: the matrices of the layers, each expert of a stack for itself. Unlike there, short
rows count too, and sums over many batches are kept in float64.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Generic, TypeVar

import numpy as np

from olpack.errors import OlpackError
from olpack.llamacpp.graph import Tensor, check_layout, operation, plain_name
from olpack.llamacpp.library import ggml, tensor_type

if TYPE_CHECKING:
    import torch

Counted = TypeVar("Counted")  # what a collector makes of an input

_AT_ONCE = 512  # inputs whose products are added at once: a sum of matrices costs as much as the product of many vectors


@dataclass
class InputSquares:
    """The inputs of one weight tensor.

    Attributes:
        sums: [matrices, columns], squares of the inputs, summed over the vectors that a matrix was multiplied with. Of matrices that are all
            multiplied with something at every token (not experts), one row holds all: [1, matrices * columns].
        counts: int64, one for each row of `sums`: how many vectors those were.
    """

    sums: np.ndarray
    counts: np.ndarray


def input_squares(
    gguf: Path, rows: Sequence[Sequence[int]], *, threads: int | None = None, advance: Callable[[int], None] = lambda count: None
) -> dict[str, InputSquares]:
    """Have a model read token rows, each from an empty context, and sum the squares of what its matrices are multiplied with.

    Args:
        gguf: the model, of any type that llama.cpp runs.
        rows: token ids. Every token counts.
        threads: CPU threads; by default the physical cores that this process may use.
        advance: gets the number of tokens of each row that was read.

    Returns:
        By the tensor's name in the GGUF; `sums` in float64. The token embedding and the output layer are not in it, as in llama.cpp's default.

    Raises:
        OlpackError: no rows, no such file, one that llama.cpp refuses, or a token that the model does not have.
    """
    collector = _SquaresCollector()
    _read_rows(gguf, rows, collector, threads, advance)
    return collector.found


@dataclass
class InputProducts:
    """The inputs of one weight matrix, or of several that have the same.

    Attributes:
        sums: float32 [columns, columns]: Σ x xᵀ over the inputs x.
        count: of the inputs.
    """

    sums: torch.Tensor
    count: int = 0
    _waiting: list[np.ndarray] = field(default_factory=list)

    def add(self, vectors: np.ndarray) -> None:
        """Add inputs [vectors, columns]. They may wait for more."""
        self._waiting.append(vectors)
        self.count += len(vectors)
        if sum(map(len, self._waiting)) >= _AT_ONCE:
            self.finish()

    def finish(self) -> None:
        """Add the inputs that wait."""
        import torch

        if self._waiting:
            vectors = torch.from_numpy(np.concatenate(self._waiting)).to(self.sums.device)
            self._waiting = []
            self.sums.addmm_(vectors.T, vectors)


def input_products(
    gguf: Path,
    rows: Sequence[Sequence[int]],
    names: Collection[str],
    device: torch.device,
    *,
    threads: int | None = None,
    advance: Callable[[int], None] = lambda count: None,
) -> dict[str, InputProducts]:
    """As `input_squares`, for products of columns and for some matrices alone. They take 4 * columns² bytes for each input.

    Args:
        names: of weight matrices of two dimensions in the GGUF.
        device: where the sums are.

    Returns:
        By the matrix's name; those with the same input have the same object. A matrix that no row was multiplied with is missing.

    Raises:
        OlpackError: as `input_squares`.
    """
    collector = _ProductsCollector(names, device)
    _read_rows(gguf, rows, collector, threads, advance)
    for products in collector.found.values():
        products.finish()
    return collector.found


def _read_rows(
    gguf: Path, rows: Sequence[Sequence[int]], collector: _SquaresCollector | _ProductsCollector, threads: int | None, advance: Callable[[int], None]
) -> None:
    from olpack.llamacpp.engine import Engine  # loads llama.cpp

    longest = max((len(row) for row in rows), default=0)
    if longest == 0:
        raise OlpackError("There is no text to read: what a model's matrices are multiplied with is unknown.", "Give rows with tokens.")
    with Engine(gguf, longest, threads, watch=collector) as engine:
        for index, row in enumerate(rows):
            engine.process_whole(row)
            collector.check()
            if index == 0:
                collector.leave_out_the_rest()
            advance(len(row))


@dataclass
class _SharedInput(Generic[Counted]):
    """An input that several matrices in a row have (those of query, key and value do), and the matrices that it was counted for."""

    key: tuple
    counted: Counted
    names: set[str]


class _Collector(ABC, Generic[Counted]):
    """llama.cpp's evaluation callback. Called as `Engine`'s `watch`."""

    def __init__(self) -> None:
        self._plain, self._experts, self._f32 = operation("MUL_MAT"), operation("MUL_MAT_ID"), tensor_type("f32")
        self._checked = False
        self._failure: BaseException | None = None
        self._shared: _SharedInput[Counted] | None = None
        self._seen: Counter[str] = Counter()
        self._latest = self._last = ""

    def __call__(self, address: int, ask: bool) -> bool:
        try:
            return self._ask(address) if ask else self._take(address)
        except BaseException as error:  # nothing can be raised through C; the interrupt of a user neither
            self._failure = error
            return False

    def check(self) -> None:
        """Raise what went wrong in the callback."""
        if self._failure is not None:
            raise self._failure

    def leave_out_the_rest(self) -> None:
        """From now on, end each pass at the last matrix that is collected: the output layer is a large part of a small model, and not needed.

        After the first pass that matrix is known. It must be used once in a pass, as the rarest of all is.
        """
        if self._seen and self._seen[self._latest] == min(self._seen.values()):
            self._last = self._latest

    def _ask(self, address: int) -> bool:
        """Whether the values that go into this node are to be read when they are there."""
        node = Tensor.from_address(address)
        if node.op not in (self._plain, self._experts) or self._failure is not None:
            return False
        if not self._checked:
            check_layout(address)
            self._checked = True
        weight = Tensor.from_address(node.src[0])
        name = plain_name(weight.name)
        if not self._wants(name, node, weight) or Tensor.from_address(node.src[1]).type != self._f32:
            return False
        # A name that is in it already begins another pass, in which the same address holds other values.
        if self._shared is not None and self._shared.key == _key(node, weight) and name not in self._shared.names:
            self._note(name, self._shared)
            return False
        return True

    def _take(self, address: int) -> bool:
        """Count what went into this node. Returns whether the pass is to go on."""
        node = Tensor.from_address(address)
        weight = Tensor.from_address(node.src[0])
        name = plain_name(weight.name)
        self._shared = _SharedInput(_key(node, weight), self._count(name, node, weight), set())
        self._note(name, self._shared)
        return name != self._last

    def _note(self, name: str, shared: _SharedInput[Counted]) -> None:
        self._add(name, shared.counted)
        shared.names.add(name)
        self._seen[name] += 1
        self._latest = name

    @abstractmethod
    def _wants(self, name: str, node: Tensor, weight: Tensor) -> bool:
        """Whether the inputs of a matrix are counted."""

    @abstractmethod
    def _count(self, name: str, node: Tensor, weight: Tensor) -> Counted:
        """What a node's input adds up to."""

    @abstractmethod
    def _add(self, name: str, counted: Counted) -> None:
        """Have that count for a matrix."""


class _SquaresCollector(_Collector[InputSquares]):
    """Squares of the inputs of all matrices of the layers."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, InputSquares] = {}

    def _wants(self, name: str, node: Tensor, weight: Tensor) -> bool:
        return name.startswith("blk.")

    def _count(self, name: str, node: Tensor, weight: Tensor) -> InputSquares:
        squares = np.square(_read(node.src[1], np.float32))
        if node.op == self._experts:
            return InputSquares(*_by_expert(squares, _read(node.src[2], np.int32), experts=weight.ne[2]))
        return InputSquares(*_by_matrix(squares, matrices=(weight.ne[3], weight.ne[2])))

    def _add(self, name: str, counted: InputSquares) -> None:
        so_far = self.found.setdefault(name, InputSquares(np.zeros(counted.sums.shape), np.zeros(counted.counts.shape, np.int64)))
        so_far.sums += counted.sums
        so_far.counts += counted.counts


class _ProductsCollector(_Collector[InputProducts]):
    """Products of the inputs of some matrices, each input once for all matrices that have it."""

    def __init__(self, names: Collection[str], device: torch.device) -> None:
        super().__init__()
        self.found: dict[str, InputProducts] = {}
        self._names, self._device = names, device

    def _wants(self, name: str, node: Tensor, weight: Tensor) -> bool:
        return name in self._names and node.op == self._plain and weight.ne[2] == weight.ne[3] == 1

    def _count(self, name: str, node: Tensor, weight: Tensor) -> InputProducts:
        import torch

        columns = weight.ne[0]
        products = self.found.get(name) or InputProducts(torch.zeros(columns, columns, device=self._device))
        products.add(_read(node.src[1], np.float32).reshape(-1, columns))
        return products

    def _add(self, name: str, counted: InputProducts) -> None:
        self.found[name] = counted


def _key(node: Tensor, weight: Tensor) -> tuple:
    """Equal for two nodes that sum the same: operation, input, choice of experts, and how many matrices there are."""
    return node.op, node.src[1], node.src[2], weight.ne[2], weight.ne[3]


def _read(address: int, dtype: type) -> np.ndarray:
    """A tensor's values, on whatever device, as a new array of four dimensions, outermost first."""
    tensor, nbytes = Tensor.from_address(address), ggml().ggml_nbytes(address)
    data = np.empty(nbytes, np.uint8)
    ggml().ggml_backend_tensor_get(address, data.ctypes.data, 0, nbytes)
    return np.ndarray(tuple(reversed(tensor.ne)), dtype, data, strides=tuple(reversed(tensor.nb)))


def _by_matrix(squares: np.ndarray, matrices: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Sums over all vectors, for each matrix of a tensor by itself.

    Args:
        squares: [outer, inner, vectors, columns].
        matrices: how many the tensor has in the two outer dimensions; the vectors' are taken modulo these.

    Returns:
        sums [1, matrices * columns], and the number of vectors for a matrix [1].
    """
    outer, inner = matrices
    sums = np.zeros((outer, inner, squares.shape[-1]), np.float32)
    for i, j in np.ndindex(squares.shape[:2]):
        sums[i % outer, j % inner] += squares[i, j].sum(axis=0)
    vectors = squares.size // squares.shape[-1]
    return sums.reshape(1, -1), np.array([vectors // (outer * inner)])


def _by_expert(squares: np.ndarray, ids: np.ndarray, experts: int) -> tuple[np.ndarray, np.ndarray]:
    """Sums over the vectors that each expert was chosen for.

    Args:
        squares: [1, tokens, inputs, columns]; inputs is 1 where the chosen experts of a token have the same input, else their number.
        ids: int32 [1, 1, tokens, chosen].
        experts: how many there are.

    Returns:
        sums [experts, columns], and the number of vectors for each [experts].
    """
    _, tokens, inputs, columns = squares.shape
    chosen = ids.shape[-1]
    times = np.zeros((experts, tokens, inputs), np.float32)
    np.add.at(times, (ids[0, 0], np.arange(tokens)[:, None], np.arange(chosen) % inputs), 1)
    sums = times.reshape(experts, -1) @ squares.reshape(-1, columns)
    return sums, np.bincount(ids.reshape(-1), minlength=experts)
