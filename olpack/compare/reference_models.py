"""The models that quants are compared with: the unquantized fine-tune, the untuned base, the quants without their importance matrix. Each is
written for the comparison, one file at a time, and removed at once.

The unquantized fine-tune is a GGUF in F16, or in BF16 where F16 overflows. Of the types with two bytes a weight F16 is the more exact one:
on builtin/tiny-coder with an adapter its KL divergence from float32 is 4e-7 nats, BF16's 1.4e-5 (its kernels round activations to
8 bits of mantissa too), Q8_0's 2.5e-4. F32 would take twice the disk and the memory to remove an error that is a thousandth of Q8_0's.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from olpack.compare.cache import DIVERGENCE_WITHOUT_IMPORTANCE, Cache, Keys, Units
from olpack.compare.job import Job, ReferenceLogits, asked_of, run_worker
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
    """

    folder: Path
    write_reference: WriteModel
    reference_key: str
    write_base: WriteModel | None = None
    base_key: str = ""
    base_quant: str = "Q8_0"
    write_without_importance: WriteModel | None = None
    without_importance_keys: Mapping[str, str] = field(default_factory=dict)

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
        reference, base: their own figures.
        problems: what went wrong. The quants are measured all the same.
    """

    logits: ReferenceLogits | None = None
    reference: Reference | None = None
    base: BaseResult | None = None
    problems: list[OlpackError] = field(default_factory=list)


def measure_references(
    models: ReferenceModels, job: Job, keys: Keys, cache: Cache, needed: bool, temporary: ExitStack, tasks: Sequence[Task]
) -> ReferenceFigures:
    """Measure the reference and the base, as far as their figures are not in the cache.

    Args:
        job: with the rows, and nothing to measure.
        keys: of the units "perplexity", "divergence", "tasks" and "scores", without the identity of a file.
        needed: a quant lacks a divergence, so the reference's logits are needed in any case.
        temporary: the logits last until it closes. The two GGUFs are removed when this returns.
        tasks: what the base is asked.
    """
    reference = Units(cache, "reference", {unit: keys["perplexity"] | {"file": models.reference_key} for unit in ("perplexity", "quant")})
    identity = {"file": models.base_key, "quant": models.base_quant}
    base = Units(cache, "base", {unit: keys[unit] | identity for unit in ("perplexity", "divergence", "tasks", "scores") if unit in keys})
    base_missing = models.write_base is not None and not base.known.keys() >= keys.keys() & {"perplexity", "divergence", "tasks"}
    reference_missing = not {"perplexity", "quant"} <= reference.known.keys()
    figures = ReferenceFigures()
    try:
        if needed or reference_missing or base_missing:
            folder = temporary.enter_context(models.temporary())
            if needed or reference_missing or "divergence" not in base.known:
                figures.logits = _measure_reference(models, job, folder, reference)
            if models.write_base is not None and base_missing:
                wanted = {"perplexity": True, "tasks": asked_of(tasks), "divergence": figures.logits}
                missing = {unit: value for unit, value in wanted.items() if unit not in base.known}
                with written(models.write_base, models.base_quant, folder) as path:
                    name = f"the base ({models.base_quant})"
                    figures.problems += run_worker(job.model_copy(update={"path": path, **missing}), name, base)
        check_answers(tasks, base, "the base")
    except OlpackError as error:
        figures.problems.append(error)
    if "quant" in reference.known and (perplexity := reference.get("perplexity", Perplexity)):
        figures.reference = Reference(quant=reference.known["quant"]["quant"], perplexity=perplexity)
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


def _measure_reference(models: ReferenceModels, job: Job, folder: Path, units: Units) -> ReferenceLogits:
    logits = folder / "logits.f32"
    for quant in REFERENCE_QUANTS:
        tried = Units(Cache(None), "reference", {})
        with written(models.write_reference, quant, folder) as path:
            wanted = {"path": path, "perplexity": True, "write_logits": logits}
            problems = run_worker(job.model_copy(update=wanted), f"the unquantized model ({quant})", tried)
        if problems:
            raise problems[0]
        if None in tried.known["perplexity"]["row_nll"]:
            continue
        if not (rows := tried.known["logits"]["rows"]):
            limit = quantity(LOGITS_BYTES, "B")
            raise OlpackError(f"The logits of the first held-out row take more than the {limit} allowed for all.", "Put a shorter row first.")
        units.add("quant", {"quant": quant})
        units.add("perplexity", tried.known["perplexity"])
        return ReferenceLogits(path=logits, quant=quant, rows=rows)
    raise OlpackError("The unquantized fine-tune's probabilities are no numbers.", "Train again with a lower learning rate.")


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
