"""The models that quants are compared with: the unquantized fine-tune, the untuned base, the quants without their importance matrix. Each is
written for the comparison, one file at a time, and removed at once.

The unquantized fine-tune is a GGUF in F16, or in BF16 where F16 overflows. Of the types with two bytes a weight F16 is the more exact one:
on builtin/tiny-coder with an adapter its KL divergence from float32 is 4e-7 nats, BF16's 1.4e-5 (its kernels round activations to
8 bits of mantissa too), Q8_0's 2.5e-4. F32 would take twice the disk and the memory to remove an error that is a thousandth of Q8_0's.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from olpack.compare.cache import DIVERGENCE_WITHOUT_IMPORTANCE, Cache, Keys, Units
from olpack.compare.job import Asked, Job, ReferenceLogits, asked_of, run_worker
from olpack.compare.results import BaseResult, Divergence, Perplexity, Reference, Scores
from olpack.compare.scores import check_answers
from olpack.compare.settings import LOGITS_BYTES
from olpack.errors import OlpackError
from olpack.progress import quantity
from olpack.recipe.tasks import Task

REFERENCE_QUANTS = ("F16", "BF16")  # in the order in which they are tried

WriteModel = Callable[[str, Path], object]  # writes a GGUF of a quant type to a path; raises OlpackError where it cannot, as on a full disk


@dataclass(frozen=True)
class ReferenceModels:
    """How the reference models are made, and the identities of their weights.

    Attributes:
        folder: for temporary files; it is removed with its content.
        write_reference: writes the unquantized fine-tune.
        reference_key: identity of its weights.
        write_base: writes the base without its adapter; None: there is no base.
        base_key: identity of its weights.
        base_quant: the quant type at which the base is measured.
        write_without_importance: writes one of the quants without its importance matrix; one with a budget, with the same types.
        without_importance_keys: identity of the weights that this gives, by quant: of those that have a matrix and can be made without.
        write_by_ggml: writes one of the quants by ggml's rounding, with the same types and importance matrix.
        ggml_keys: identity of the weights that this gives, by quant: of those that have another rounding.
        ggml_tasks: whether these are asked the tasks too.
        rounding: of the quants, as `export.rounding` has it.
    """

    folder: Path
    write_reference: WriteModel
    reference_key: str
    write_base: WriteModel | None = None
    base_key: str = ""
    base_quant: str = "Q8_0"
    write_without_importance: WriteModel | None = None
    without_importance_keys: Mapping[str, str] = field(default_factory=dict)
    write_by_ggml: WriteModel | None = None
    ggml_keys: Mapping[str, str] = field(default_factory=dict)
    ggml_tasks: bool = False
    rounding: str = "ggml"

    @contextmanager
    def temporary(self) -> Iterator[Path]:
        """The empty folder, for as long as the block runs; what a killed comparison left in it is removed first."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        try:
            yield self.folder
        finally:
            shutil.rmtree(self.folder, ignore_errors=True)


@dataclass(frozen=True)
class MergedModels:
    """How the fine-tune of an adapter package becomes one file, as `package: merged` would serve it.

    Attributes:
        folder: for temporary files, that of the reference models or another; it is removed with its content.
        write: writes the file of a quant.
        keys: identity of the weights that this gives, by quant.
    """

    folder: Path
    write: WriteModel
    keys: Mapping[str, str]


@dataclass
class ReferenceFigures:
    """What was measured of the reference models.

    Attributes:
        logits: the reference's logits on the disk; None where no file needs them, or they could not be measured.
        other_logits: those on the rows outside the user's domain; None also where there are no such rows.
        reference, base: their own figures.
        problems: what went wrong. The quants are measured all the same.
    """

    logits: ReferenceLogits | None = None
    other_logits: ReferenceLogits | None = None
    reference: Reference | None = None
    base: BaseResult | None = None
    problems: list[OlpackError] = field(default_factory=list)


def measure_references(
    models: ReferenceModels, job: Job, keys: Keys, cache: Cache, needed: bool, folder: Path, tasks: Sequence[Task]
) -> ReferenceFigures:
    """Measure the reference and the base, as far as their figures are not in the cache.

    Args:
        job: with the rows, and nothing to measure.
        keys: of the units "perplexity", "divergence", "tasks" and "scores", without the identity of a file.
        needed: a quant lacks a divergence, so the reference's logits are needed in any case.
        folder: of `ReferenceModels.temporary`, where the logits stay. The two GGUFs are removed when this returns.
        tasks: what the base and the unquantized fine-tune are asked.
    """
    own = {"perplexity": keys["perplexity"], "quant": keys["perplexity"]} | {unit: keys[unit] for unit in ("tasks", "scores") if unit in keys}
    reference = Units(cache, "reference", {unit: key | {"file": models.reference_key} for unit, key in own.items()})
    identity = {"file": models.base_key, "quant": models.base_quant}
    base = Units(cache, "base", {unit: keys[unit] | identity for unit in ("perplexity", "divergence", "tasks", "scores") if unit in keys})
    base_missing = models.write_base is not None and not base.known.keys() >= keys.keys() & {"perplexity", "divergence", "tasks"}
    reference_missing = not {"perplexity", "quant"} <= reference.known.keys()
    unasked = asked_of(tasks) if reference.lacks("tasks") else []
    figures = ReferenceFigures()
    try:
        if needed or reference_missing or base_missing or unasked:
            if needed or reference_missing or (base_missing and "divergence" not in base.known):
                figures.logits, figures.other_logits = _measure_reference(models, job, folder, reference, unasked, figures.problems)
            elif unasked:
                with written(models.write_reference, reference.known["quant"]["quant"], folder) as path:
                    figures.problems += _ask(path, job, reference, unasked)
            if models.write_base is not None and base_missing:
                wanted = {"perplexity": True, "tasks": asked_of(tasks), "divergence": figures.logits}
                missing = {unit: value for unit, value in wanted.items() if unit not in base.known}
                with written(models.write_base, models.base_quant, folder) as path:
                    name = f"the base ({models.base_quant})"
                    figures.problems += run_worker(job.model_copy(update={"path": path, **missing}), name, base)
        check_answers(tasks, base, "the base")
        check_answers(tasks, reference, "the unquantized model")
    except OlpackError as error:
        figures.problems.append(error)
    if "quant" in reference.known and (perplexity := reference.get("perplexity", Perplexity)):
        figures.reference = Reference(
            quant=reference.known["quant"]["quant"],
            perplexity=perplexity,
            task_answers=reference.answers("tasks"),
            scores=reference.get("scores", Scores),
        )
    if models.write_base is not None and base.known:
        figures.base = BaseResult(
            quant=models.base_quant,
            perplexity=base.get("perplexity", Perplexity),
            divergence=base.get("divergence", Divergence),
            task_answers=base.answers("tasks"),
            scores=base.get("scores", Scores),
        )
    return figures


def measure_without_importance(write: WriteModel, folder: Path, quant: str, job: Job, logits: ReferenceLogits, units: Units) -> list[OlpackError]:
    """Measure the divergence that a quant has without its importance matrix, into its unit `DIVERGENCE_WITHOUT_IMPORTANCE`.

    Args:
        write, folder: `ReferenceModels.write_without_importance`, and where the file is written.
        quant: one of `ReferenceModels.without_importance_keys`.
        job: as for `measure_references`.
        logits: of the reference, as `measure_references` has written them.
        units: of the quant.

    Returns:
        what went wrong.
    """
    temporary = Units(Cache(None), quant, {})
    try:
        with written(write, quant, folder) as path:
            problems = run_worker(job.model_copy(update={"path": path, "divergence": logits}), f"{quant} without importance", temporary)
    except OlpackError as error:
        return [error]
    if "divergence" in temporary.known:
        units.add(DIVERGENCE_WITHOUT_IMPORTANCE, temporary.known["divergence"])
    return problems


def _measure_reference(
    models: ReferenceModels, job: Job, folder: Path, units: Units, unasked: list[Asked], problems: list[OlpackError]
) -> tuple[ReferenceLogits, ReferenceLogits | None]:
    """Perplexity, answers to what is `unasked`, and logits on the rows and on those outside the user's domain.

    Answers that fail are added to `problems`.

    Raises:
        OlpackError: there are no logits to compare with.
    """
    logits, other = folder / "logits.f32", folder / "other-logits.f32"
    for quant in REFERENCE_QUANTS:
        tried = Units(Cache(None), "reference", {})
        with written(models.write_reference, quant, folder) as path:
            wanted = {"path": path, "perplexity": True, "write_logits": logits, "write_other_logits": other if job.other_rows else None}
            if failed := run_worker(job.model_copy(update=wanted), f"the unquantized model ({quant})", tried):
                raise failed[0]
            if None in tried.known["perplexity"]["row_nll"]:
                continue
            if unasked:
                problems += _ask(path, job, units, unasked)
        if not (rows := tried.known["logits"]["rows"]):
            limit = quantity(LOGITS_BYTES, "B")
            raise OlpackError(f"The logits of the first held-out row take more than the {limit} allowed for all.", "Put a shorter row first.")
        units.add("quant", {"quant": quant})
        units.add("perplexity", tried.known["perplexity"])
        fitting = tried.known["other_logits"]["rows"] if job.other_rows else 0
        other_logits = ReferenceLogits(path=other, quant=quant, rows=fitting) if fitting else None
        return ReferenceLogits(path=logits, quant=quant, rows=rows), other_logits
    raise OlpackError("The unquantized fine-tune's probabilities are no numbers.", "Train again with a lower learning rate.")


def _ask(path: Path, job: Job, units: Units, unasked: list[Asked]) -> list[OlpackError]:
    """The unquantized fine-tune's answers to the tasks, into its unit "tasks"; what went wrong."""
    return run_worker(job.model_copy(update={"path": path, "tasks": unasked}), "the unquantized model", units)


@contextmanager
def written(write: WriteModel, quant: str, folder: Path) -> Iterator[Path]:
    """A GGUF that exists as long as the block runs."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{quant}.gguf"
    try:
        write(quant, path)
        yield path
    finally:
        path.unlink(missing_ok=True)
