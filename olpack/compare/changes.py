"""What changed: between two comparisons, and by the importance matrix of a quant.

    changes(read_results(old), read_results(new))       # one Change for each figure that both have, by quant

A repeated figure has changed where the ranges of its repeats do not touch; perplexity, where the change is more than twice its standard
error. On the same rows that error is of the paired differences, which is far smaller than that of either value.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from olpack.compare.perplexity import paired_loss, ratio
from olpack.compare.results import Divergence, QuantResult, Results, Spread

Verdict = Literal["better", "worse", "same"]


@dataclass(frozen=True)
class Change:
    """One figure of one quant, before and after.

    Attributes:
        quant: "Q4_K_M".
        figure: what was measured, with its unit.
        before, after: medians where it was repeated.
        relative: after / before - 1; None where before is 0.
        verdict: "same" where the difference is within the noise of both.
    """

    quant: str
    figure: str
    before: float
    after: float
    relative: float | None
    verdict: Verdict


def changes(old: Results, new: Results) -> list[Change]:
    """Every figure that both comparisons have of a quant, in the order of the new one."""
    before = {quant.tag.lower(): quant for quant in old.quants}
    every: list[Change] = []
    for quant in new.quants:
        if earlier := before.get(quant.tag.lower()):
            every += _speeds(earlier, quant)
            every += _qualities(earlier, quant, old, new)
    return every


def _speeds(old: QuantResult, new: QuantResult) -> Iterator[Change]:
    yield from _exact(new.quant, "size, bytes", old.size_bytes, new.size_bytes)
    if old.speed is None or new.speed is None:
        return
    before = {prompt.prompt_tokens: prompt.tokens_per_s for prompt in old.speed.prompt}
    for prompt in new.speed.prompt:
        # A server counts the tokens of a prompt anew each time, so lengths that are near are the same length.
        near = min(before, key=lambda length: abs(length - prompt.prompt_tokens), default=None)
        if near is not None and abs(near - prompt.prompt_tokens) <= 0.1 * prompt.prompt_tokens:
            yield from _repeated(new.quant, f"prompt tokens/s at {prompt.prompt_tokens}", before[near], prompt.tokens_per_s, more_is_better=True)
    yield from _repeated(new.quant, "generated tokens/s", old.speed.generation_tokens_per_s, new.speed.generation_tokens_per_s, more_is_better=True)
    yield from _repeated(new.quant, "load, s", old.speed.load_warm_s, new.speed.load_warm_s, more_is_better=False)
    if old.speed.peak_memory_bytes and new.speed.peak_memory_bytes and old.speed.context == new.speed.context:
        noise = 0.02 * old.speed.peak_memory_bytes  # pages that happen to be touched
        yield _change(new.quant, "peak memory, bytes", old.speed.peak_memory_bytes, new.speed.peak_memory_bytes, noise, more_is_better=False)


def _qualities(old: QuantResult, new: QuantResult, before: Results, after: Results) -> Iterator[Change]:
    one, two = old.perplexity, new.perplexity
    if one is None or two is None or one.value is None or two.value is None:
        return
    same_rows = before.rows and after.rows and before.rows.digest == after.rows.digest
    earlier, later = one.finite_nll, two.finite_nll
    if same_rows and after.rows and earlier is not None and later is not None:
        _, error = paired_loss(later, earlier, after.rows.learned_tokens)
        noise = 2 * one.value * (error or 0)
    else:
        noise = 2 * math.hypot(one.standard_error or 0, two.standard_error or 0)
    yield _change(new.quant, "perplexity", one.value, two.value, noise, more_is_better=False)


def _exact(quant: str, figure: str, before: int, after: int) -> Iterator[Change]:
    yield _change(quant, figure, before, after, 0, more_is_better=False)


def _repeated(quant: str, figure: str, before: Spread | None, after: Spread | None, *, more_is_better: bool) -> Iterator[Change]:
    if before is None or after is None:
        return
    apart = after.low > before.high or after.high < before.low
    noise = 0.0 if apart else math.inf
    yield _change(quant, figure, before.median, after.median, noise, more_is_better=more_is_better)


def _change(quant: str, figure: str, before: float, after: float, noise: float, *, more_is_better: bool) -> Change:
    verdict: Verdict = "same"
    if abs(after - before) > noise:
        verdict = "better" if (after > before) == more_is_better else "worse"
    return Change(quant, figure, before, after, after / before - 1 if before else None, verdict)


@dataclass(frozen=True)
class ImportanceGain:
    """How an importance matrix changed the KL divergence of a quant.

    Attributes:
        quant, tag: "Q4_K_M", "q4_K_M".
        with_importance, without_importance: KL divergence of the quant, and of the same without its matrix.
        change: of the mean divergence, by the matrix: -0.3 is 30 % less.
        standard_error: of `change`, paired by row; None with fewer than two rows.
    """

    quant: str
    tag: str
    with_importance: Divergence
    without_importance: Divergence
    change: float
    standard_error: float | None


def importance_gains(results: Results) -> list[ImportanceGain]:
    """Of every quant that was measured with its importance matrix and without, in the order of the results."""
    gains = []
    for quant in results.quants:
        own, other = quant.divergence, quant.divergence_without_importance
        if own and other and other.mean > 0:
            share, error = ratio(own.row_kl, other.row_kl)
            gains.append(ImportanceGain(quant.quant, quant.tag, own, other, share - 1, error))
    return gains
