"""What a rounding other than ggml's gave: the same quant by ggml's rounding, measured on the same rows, and the differences, paired.

That quant has the same types and the same importance matrix. It is written for the comparison alone, and removed at once.
"""

from __future__ import annotations

from collections.abc import Sequence

from olpack.compare.cache import OTHER_DIVERGENCE, Cache, Keys, Units
from olpack.compare.job import Job, asked_of, run_worker
from olpack.compare.perplexity import paired_loss, ratio
from olpack.compare.reference_models import ReferenceFigures, ReferenceModels, written
from olpack.compare.results import ByGgml, Difference, Divergence, Perplexity, QuantResult, Scores
from olpack.compare.scores import check_answers
from olpack.errors import OlpackError
from olpack.recipe.tasks import Task


def ggml_units(models: ReferenceModels, cache: Cache, quant: str, tag: str, keys: Keys) -> Units | None:
    """What is known of a quant by ggml's rounding; None where that is not asked for, or is the quant itself."""
    if (identity := models.ggml_keys.get(quant)) is None:
        return None
    wanted = ("perplexity", "divergence", OTHER_DIVERGENCE, *(("tasks", "scores") if models.ggml_tasks else ()))
    return Units(cache, f"{tag}-ggml", {unit: keys[unit] | {"file": identity} for unit in wanted if unit in keys})


def measure_by_ggml(
    models: ReferenceModels, quant: str, job: Job, figures: ReferenceFigures, tasks: Sequence[Task], units: Units
) -> list[OlpackError]:
    """Measure what `ggml_units` lack.

    Args:
        job: with the rows, and nothing to measure.
        figures: of the reference, with its logits where they could be measured.
        tasks: what it is asked, where `units` have tasks.

    Returns:
        what went wrong.
    """
    wanted: dict[str, object] = {"perplexity": True, "divergence": figures.logits, OTHER_DIVERGENCE: figures.other_logits, "tasks": asked_of(tasks)}
    missing = {unit: value for unit, value in wanted.items() if value and units.lacks(unit)}
    name = f"{quant} by ggml's rounding"
    problems = []
    try:
        if missing and models.write_by_ggml:
            with written(models.write_by_ggml, quant, models.folder) as path:
                problems += run_worker(job.model_copy(update={"path": path, **missing}), name, units)
        check_answers(tasks, units, name)
    except OlpackError as error:
        problems.append(error)
    return problems


def by_ggml(quant: QuantResult, rounding: str, units: Units, target_tokens: Sequence[int]) -> ByGgml:
    """The figures of a quant by ggml's rounding, and how the quant's own differ.

    Args:
        rounding: of the quant.
        target_tokens: of each row.
    """
    found = ByGgml(
        rounding=rounding,
        perplexity=units.get("perplexity", Perplexity),
        divergence=units.get("divergence", Divergence),
        other_text=units.get(OTHER_DIVERGENCE, Divergence),
        task_answers=units.answers("tasks"),
        scores=units.get("scores", Scores),
    )
    own, other = (one.perplexity.finite_nll if one.perplexity else None for one in (quant, found))
    if own is not None and other is not None:
        found.perplexity_change = _difference(*paired_loss(own, other, target_tokens))
    if (mine := quant.divergence) and (ggml := found.divergence) and mine.rows == ggml.rows:
        counts = target_tokens[: mine.rows]
        found.divergence_change = _difference(*ratio(_minus(mine.row_kl, ggml.row_kl), counts))
        found.same_top_change = _difference(*ratio(_minus(mine.row_same_top, ggml.row_same_top), counts))
    if quant.scores and found.scores:
        pairs = zip(quant.scores.values, found.scores.values, strict=True)
        if changes := [mine - ggml for mine, ggml in pairs if mine is not None and ggml is not None]:
            found.score_change = _difference(*ratio(changes, [1] * len(changes)))
    return found


def _minus(own: Sequence[float], other: Sequence[float]) -> list[float]:
    return [mine - ggml for mine, ggml in zip(own, other, strict=True)]


def _difference(value: float, error: float | None) -> Difference:
    return Difference(value=value, standard_error=error or None)  # 0: all rows alike, which does not show that all would be
