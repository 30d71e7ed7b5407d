"""What a model's matrices are multiplied with while it reads text: sums of squares, column by column, for an importance matrix.

llama.cpp calls back for every node of its graph, of whatever architecture, so the inputs are those of the matrices under their GGUF names.
What is counted, and how, follows llama.cpp's tools/imatrix: the matrices of the layers, each expert of a stack for itself. Unlike there, short
rows count too, and sums over many batches are kept in float64.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from olpack.errors import OlpackError
from olpack.llamacpp.graph import Tensor, check_layout, operation, plain_name
from olpack.llamacpp.library import ggml, tensor_type


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
    from olpack.llamacpp.engine import Engine  # loads llama.cpp

    longest = max((len(row) for row in rows), default=0)
    if longest == 0:
        raise OlpackError("There is no text to collect an importance matrix on.", "Give rows with tokens.")
    collector = _Collector()
    with Engine(gguf, longest, threads, watch=collector) as engine:
        for index, row in enumerate(rows):
            engine.process_whole(row)
            collector.check()
            if index == 0:
                collector.leave_out_the_rest()
            advance(len(row))
    return collector.found


@dataclass
class _SharedInput:
    """An input that several matrices in a row have (those of query, key and value do), and the matrices that it was counted for."""

    key: tuple
    sums: np.ndarray
    counts: np.ndarray
    names: set[str]


class _Collector:
    """llama.cpp's evaluation callback. Called as `Engine`'s `watch`."""

    def __init__(self) -> None:
        self.found: dict[str, InputSquares] = {}
        self._plain, self._experts, self._f32 = operation("MUL_MAT"), operation("MUL_MAT_ID"), tensor_type("f32")
        self._checked = False
        self._failure: BaseException | None = None
        self._shared: _SharedInput | None = None
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
        if not name.startswith("blk.") or Tensor.from_address(node.src[1]).type != self._f32:
            return False
        # A name that is in it already begins another pass, in which the same address holds other values.
        if self._shared is not None and self._shared.key == _key(node, weight) and name not in self._shared.names:
            self._add(name, self._shared)
            return False
        return True

    def _take(self, address: int) -> bool:
        """Square and sum what went into this node. Returns whether the pass is to go on."""
        node = Tensor.from_address(address)
        weight = Tensor.from_address(node.src[0])
        squares = np.square(_read(node.src[1], np.float32))
        if node.op == self._experts:
            sums, counts = _by_expert(squares, _read(node.src[2], np.int32), experts=weight.ne[2])
        else:
            sums, counts = _by_matrix(squares, matrices=(weight.ne[3], weight.ne[2]))
        self._shared = _SharedInput(_key(node, weight), sums, counts, set())
        name = plain_name(weight.name)
        self._add(name, self._shared)
        return name != self._last

    def _add(self, name: str, shared: _SharedInput) -> None:
        so_far = self.found.setdefault(name, InputSquares(np.zeros(shared.sums.shape), np.zeros(shared.counts.shape, np.int64)))
        so_far.sums += shared.sums
        so_far.counts += shared.counts
        shared.names.add(name)
        self._seen[name] += 1
        self._latest = name


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
