"""Which quant to take, and the sentence with the reason."""

from __future__ import annotations

from olpack.compare.adapter_cost import adapter_reasons, better_package
from olpack.compare.perplexity import paired_loss
from olpack.compare.results import Loss, QuantResult, Recommendation, Results
from olpack.progress import quantity


def set_losses(quants: list[QuantResult], target_tokens: list[int]) -> None:
    """Fill in every quant's `loss` against the one with the lowest perplexity; None where there is no finite perplexity.

    Args:
        target_tokens: of each row.
    """
    scored = []
    for quant in quants:
        quant.loss = None
        if (score := quant.perplexity) and score.value is not None and (nll := score.finite_nll) is not None:
            scored.append((score.value, nll, quant))
    if not scored:
        return
    _, best_nll, best = min(scored, key=lambda item: item[0])
    for _, nll, quant in scored:
        relative, error = paired_loss(nll, best_nll, target_tokens)
        quant.loss = Loss(reference=best.tag, relative=relative, standard_error=error)


def recommend(results: Results, tolerance: float = 0.01) -> Recommendation | None:
    """The smallest file whose perplexity is at most `tolerance` above that of the best.

    Files with a serious flag are left out, unless all have one. Losses are those of `QuantResult.loss`, paired by row on the same rows.
    None where no file has a perplexity: size and speed alone are no measure of what a quant is worth.
    """
    scored = [(quant, quant.loss) for quant in results.quants if quant.loss is not None]
    # A flag that all of them have (a tokenizer that splits otherwise) is no reason for one against another.
    sound = [(quant, loss) for quant, loss in scored if not any(flag.serious for flag in quant.flags)] or scored
    if not sound:
        return None
    accepted = [(quant, loss) for quant, loss in sound if loss.relative <= tolerance]
    if accepted:
        chosen, loss = min(accepted, key=lambda item: (item[0].size_bytes, item[1].relative))
    else:  # the best file itself is flagged
        chosen, loss = min(sound, key=lambda item: item[1].relative)
    package = better_package(chosen, tolerance)
    reason = " ".join([_reason(chosen, loss, results.quants, sound, tolerance), *adapter_reasons(chosen, package), *_gaps(results.quants)])
    return Recommendation(quant=chosen.quant, tag=chosen.tag, reason=reason, tolerance=tolerance, package=package)


def _gaps(quants: list[QuantResult]) -> list[str]:
    """What was not measured, and so had no part in the choice; one sentence for each kind of figure."""
    unscored = [quant.quant for quant in quants if quant.loss is None]
    untimed = [quant.quant for quant in quants if not (quant.speed and quant.speed.generation_tokens_per_s and quant.speed.prompt)]
    sentences = [f"Not compared, because the perplexity is missing: {', '.join(unscored)}."] if unscored else []
    if untimed:
        sentences.append(f"This rests on size and perplexity: the speed of {', '.join(untimed)} was not measured, or not all of it.")
    return sentences


def _reason(chosen: QuantResult, loss: Loss, quants: list[QuantResult], sound: list[tuple[QuantResult, Loss]], tolerance: float) -> str:
    if len(quants) == 1:
        return f"{chosen.quant} is the only file."
    if len(sound) == 1:
        return f"{chosen.quant} is the only file that was scored and has no serious flag."
    best = next(quant for quant in quants if quant.tag == loss.reference)
    smaller = [(quant, other) for quant, other in sound if quant.size_bytes < chosen.size_bytes]
    rest = ""
    if smaller:
        nearest, other = min(smaller, key=lambda item: item[1].relative)
        rest = f"; {nearest.quant}, smaller, loses {percent(other)}"
    name = f"{chosen.quant} ({quantity(chosen.size_bytes, 'B')})"
    if chosen is best:
        return f"{name} has the lowest perplexity{rest or ' and is the smallest file too'}."
    if loss.relative > tolerance:
        return f"{name} comes nearest to {best.quant}, which is flagged: it loses {percent(loss)}."
    saved = 1 - chosen.size_bytes / best.size_bytes
    size = f"is {saved:.0%} smaller" if saved > 0 else f"is no smaller, at {quantity(chosen.size_bytes, 'B')},"
    unsure = loss.standard_error is not None and loss.standard_error > tolerance
    note = " (with so few rows the loss is uncertain)" if unsure else ""
    return (
        f"{name} {size} than {best.quant}, the best here, "
        f"and its perplexity is {percent(loss)} higher, within the {tolerance:.0%} accepted{note}{rest}."
    )


def percent(loss: Loss) -> str:
    """ "0.31 ± 0.08%": a loss with its standard error where there is one."""
    error = "" if loss.standard_error is None else f" ± {100 * loss.standard_error:.2f}"
    return f"{100 * loss.relative:.2f}{error}%"
