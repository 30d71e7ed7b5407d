"""Perplexity and its growth, with standard errors in which the row is the sampling unit: the tokens of one row are not independent."""

from __future__ import annotations

import math
from collections.abc import Sequence


def perplexity(row_nll: Sequence[float], row_tokens: Sequence[int]) -> tuple[float, float | None]:
    """Perplexity of rows and its standard error.

    With S_r the negative log-probability of row r in nats, T_r its tokens and L = ΣS/ΣT, the perplexity is exp(L). L is a ratio of two sums
    over n rows, so its variance is, by linearization (Cochran, Sampling Techniques, section 6.4), n/(n-1) · Σ(S_r - L·T_r)² / (ΣT)²;
    the delta method makes exp(L) times its root the standard error of exp(L).

    Args:
        row_nll: S_r, in nats.
        row_tokens: T_r, at least one token in all.

    Returns:
        perplexity, and its standard error, None with fewer than two rows.
    """
    mean, error = ratio(row_nll, row_tokens)
    value = _exp(mean)
    return value, None if error is None else value * error


def paired_loss(row_nll: Sequence[float], reference_nll: Sequence[float], row_tokens: Sequence[int]) -> tuple[float, float | None]:
    """Relative growth of perplexity against a reference measured on the same rows, and its standard error.

    exp(Σ(S_r - R_r)/ΣT) - 1. How hard a row is cancels in S_r - R_r, so the error is far smaller than that of either perplexity.
    """
    difference, error = ratio([own - other for own, other in zip(row_nll, reference_nll, strict=True)], row_tokens)
    growth = _exp(difference)
    return growth - 1, None if error is None else growth * error


def ratio(sums: Sequence[float], counts: Sequence[float]) -> tuple[float, float | None]:
    """Mean per token, ΣS/ΣT, of sums over the tokens of each row, and its standard error as in `perplexity`.

    Args:
        sums: S_r, of anything that a token has: nats, or 1 where a condition is true.
        counts: T_r, at least one token in all.
    """
    total = sum(counts)
    mean = math.fsum(sums) / total
    rows = len(sums)
    if rows < 2:
        return mean, None
    squares = math.fsum((value - mean * count) ** 2 for value, count in zip(sums, counts, strict=True))
    return mean, math.sqrt(rows / (rows - 1) * squares) / total


def _exp(value: float) -> float:
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf
