"""How far a quant's predictions are from the unquantized model's: KL divergence and equal top tokens, position by position.

The reference's logits are written to a temporary file, because it and a quant need not fit into memory together. They are measured on the GGUFs
themselves, so llama.cpp's own rounding (its kernels quantize activations too) is part of the figure, as it is when they are served.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from olpack.compare.perplexity import ratio
from olpack.compare.results import Divergence
from olpack.errors import OlpackError

_RESAMPLES = 1000
_PERCENTILE = 0.99


class LogitsWriter:
    """Writes a reference's logits at the target tokens of whole rows, from the first row on, as far as they fit.

    The file is float32 of shape [positions, vocabulary], with no header. It is written by calls: a full disk is then an error, where
    a write into mapped memory would be a signal. Threads may write rows in any order, each row by one thread.

    Args:
        path: the file.
        row_tokens: target tokens of each row.
        vocabulary: entries of one position.
        limit: bytes that the file may have.

    Attributes:
        rows: how many rows fit.
    """

    def __init__(self, path: Path, row_tokens: Sequence[int], vocabulary: int, limit: int):
        ends = np.cumsum(row_tokens)
        self.rows = int(np.searchsorted(ends, limit // (4 * vocabulary), side="right"))
        self._next = [4 * vocabulary * int(end - count) for end, count in zip(ends, row_tokens, strict=True)]  # where the row goes on
        self._file = path.open("wb")
        self._lock = threading.Lock()

    def __enter__(self) -> LogitsWriter:
        return self

    def __exit__(self, *_: object) -> None:
        with self._writing():
            self._file.close()

    def add(self, row: int, logits: np.ndarray) -> None:
        """Write the logits of the row's next position, float32 of shape [vocabulary], if the row is one of those that fit.

        Raises:
            OlpackError: the disk is full.
        """
        if row < self.rows:
            written = logits.astype(np.float32).tobytes()
            with self._lock, self._writing():
                self._file.seek(self._next[row])
                self._file.write(written)
            self._next[row] += len(written)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise OlpackError(f"{self._file.name} could not be written: {error.strerror}.", "Free some space.") from None


def open_logits(path: Path, positions: int, vocabulary: int) -> np.ndarray:
    """What a `LogitsWriter` wrote: float32 of shape [positions, vocabulary], read from the disk as it is used.

    Raises:
        OlpackError: the file was made with another vocabulary.
    """
    if path.stat().st_size != 4 * positions * vocabulary:
        raise OlpackError("This file's vocabulary is not that of the unquantized model, so their predictions cannot be compared.", "Export it again.")
    return np.memmap(path, np.float32, "r", shape=(positions, vocabulary))


def summarize(reference: str, rows: Sequence[Sequence[float]], same_top: Sequence[int]) -> Divergence:
    """The figures of one file.

    The mean and the share of equal top tokens are ratios of sums over rows, with the error of `perplexity.ratio`. The 99th percentile is
    over all positions (linear interpolation); its error is the standard deviation of the percentile over 1000 resamples of whole rows, drawn
    with replacement and a fixed seed (Efron and Tibshirani, An Introduction to the Bootstrap, chapter 6; rows and not positions are drawn
    because the positions of a row depend on each other: Davison and Hinkley, Bootstrap Methods and their Application, section 3.8).

    Args:
        reference: quant type of the reference, "F16".
        rows: KL divergence in nats of every scored position, by row; finite.
        same_top: positions of each row at which both models give the same token the highest probability.
    """
    counts = [len(row) for row in rows]
    sums = [float(np.sum(row)) for row in rows]
    mean, error = ratio(sums, counts)
    share, share_error = ratio(same_top, counts)
    percentile, percentile_error = _percentile(rows)
    return Divergence(
        reference=reference,
        rows=len(rows),
        tokens=sum(counts),
        mean=mean,
        standard_error=error,
        p99=percentile,
        p99_standard_error=percentile_error,
        same_top=share,
        same_top_standard_error=share_error,
        row_kl=sums,
        row_same_top=list(same_top),
    )


def _percentile(rows: Sequence[Sequence[float]]) -> tuple[float, float | None]:
    parts = [np.asarray(row) for row in rows]
    value = float(np.quantile(np.concatenate(parts), _PERCENTILE))
    if len(parts) < 2:
        return value, None
    draw = np.random.default_rng(0)
    resampled = [
        np.quantile(np.concatenate([parts[index] for index in draw.integers(len(parts), size=len(parts))]), _PERCENTILE) for _ in range(_RESAMPLES)
    ]
    return value, float(np.std(resampled, ddof=1))
