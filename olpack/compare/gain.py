"""What a quant keeps of the fine-tune's gain: from the base's loss, or score, down to the unquantized fine-tune's.

With B, F and Q the losses of base, unquantized fine-tune and quant on the same rows, a quant keeps Σ(B_r - Q_r) / Σ(B_r - F_r): 1 is all of the
gain, 0 leaves nothing of it, and less than 0 is a quant that is worse than the base. Tasks have scores in place of losses, and the task in place of
the row.

It is a ratio of two sums over rows, so `perplexity.ratio` gives its standard error by linearization (the delta method); how hard a row is cancels in
both differences. Below a gain of two standard errors the ratio has no bounded interval (Fieller, Some Problems in Interval Estimation, 1954), and it
is not reported.
"""

from __future__ import annotations

from collections.abc import Sequence

from olpack.compare.perplexity import ratio
from olpack.compare.results import ByGgml, GainKept, QuantResult, Results

_CLEAR = 2  # standard errors that a gain must have, for a share of it to be a figure


def set_gains(results: Results) -> None:
    """Fill in `gain_kept` and `task_gain_kept` of every quant, where base, unquantized fine-tune and quant have the figures."""
    for quant in results.quants:
        quant.gain_kept, quant.task_gain_kept = gain_of_rows(results, quant), gain_of_tasks(results, quant)


def gain_of_rows(results: Results, quant: QuantResult | ByGgml) -> GainKept | None:
    """Of the loss on the held-out rows; None where one of the three models has none."""
    models = (results.base, results.reference, quant)
    losses = [model.perplexity.finite_nll if model and model.perplexity else None for model in models]
    base, tuned, own = losses
    if results.rows is None or base is None or tuned is None or own is None:
        return None
    return gain_kept(base, tuned, own, results.rows.learned_tokens)


def gain_of_tasks(results: Results, quant: QuantResult | ByGgml) -> GainKept | None:
    """Of the scores of the tasks that all three models have one of; None where there is no such task."""
    models = (results.base, results.reference, quant)
    scores = [model.scores.values if model and model.scores else [] for model in models]
    if not all(scores):
        return None
    # A score grows where a loss shrinks.
    known = [[-value for value in values if value is not None] for values in zip(*scores, strict=True) if None not in values]
    base, tuned, own = ([values[at] for values in known] for at in range(3))
    return gain_kept(base, tuned, own, [1] * len(known)) if known else None


def gain_kept(base: Sequence[float], tuned: Sequence[float], own: Sequence[float], counts: Sequence[int]) -> GainKept:
    """The share of a gain that a quant keeps.

    Args:
        base, tuned, own: loss of the base, of the unquantized fine-tune and of the quant, summed over each row.
        counts: tokens of each row.
    """
    gains = [before - after for before, after in zip(base, tuned, strict=True)]
    gain, error = ratio(gains, counts)
    kept = GainKept(value=None, standard_error=None, gain=gain, gain_standard_error=error)
    if gain <= 0:
        kept.reason = "the unquantized fine-tune is no better than the base"
    elif error is not None and gain <= _CLEAR * error:
        kept.reason = f"the fine-tune's gain is within {_CLEAR} standard errors of none"
    else:
        kept.value, share_error = ratio([before - after for before, after in zip(base, own, strict=True)], gains)
        kept.standard_error = share_error or None  # 0: every row gives the same share, which does not show that all would
    return kept
