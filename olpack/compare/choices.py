"""What was chosen for quants on the user's rows, and what it gave: importance matrices in figures, the types of a budget in short."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from olpack.compare.perplexity import ratio
from olpack.compare.results import Divergence, Results


@dataclass(frozen=True)
class Gain:
    """What an importance matrix gave a quant.

    Attributes:
        quant, tag: "Q4_K_M", "q4_K_M".
        weighed, unweighed: KL divergence with the matrix and without.
        change: of the mean divergence, by the matrix: -0.3 is 30 % less.
        standard_error: of `change`, paired by row; None with fewer than two rows.
    """

    quant: str
    tag: str
    weighed: Divergence
    unweighed: Divergence
    change: float
    standard_error: float | None


def gains(results: Results) -> list[Gain]:
    """Of every quant that was measured with its importance matrix and without, in the order of the results."""
    found = []
    for quant in results.quants:
        weighed, unweighed = quant.divergence, quant.divergence_without_importance
        if weighed and unweighed and unweighed.mean > 0:
            share, error = ratio(weighed.row_kl, unweighed.row_kl)
            found.append(Gain(quant.quant, quant.tag, weighed, unweighed, share - 1, error))
    return found


def types_in_short(types: Mapping[str, Mapping[str, int]]) -> str:
    """ "token_embd q6_K, attn_v q6_K ×6 q8_0 ×2": the types of each kind of matrix, the commonest first. A number stands where there are several."""
    kinds = []
    for kind, counts in types.items():
        several = sum(counts.values()) > 1
        words = [f"{name} ×{count}" if several else name for name, count in sorted(counts.items(), key=lambda pair: -pair[1])]
        kinds.append(f"{kind} {' '.join(words)}")
    return ", ".join(kinds)
