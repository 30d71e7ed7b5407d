"""What quants are held against: the unquantized fine-tune, the untuned base, themselves without an importance matrix. All of it is made for
the comparison, one file at a time, and removed at once.

The unquantized fine-tune is a GGUF in F16, or in BF16 where F16 overflows. Of the types with two bytes a weight F16 is the nearer to exact:
on builtin/tiny-coder with an adapter its KL divergence from float32 is 4e-7 nats, BF16's 1.4e-5 (its kernels round activations to
8 bits of mantissa too), Q8_0's 2.5e-4. F32 takes twice the disk and the memory, to take away an error that is a thousandth of Q8_0's.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from olpack.compare.cache import Cache
from olpack.compare.job import LOGITS_BYTES, Job, LogitsJob
from olpack.compare.results import BaseResult, Divergence, Perplexity, Reference, Scores
from olpack.compare.scores import check_answers
from olpack.compare.units import UNWEIGHED, Units, run_worker
from olpack.errors import OlpackError
from olpack.progress import quantity
from olpack.recipe.tasks import Task

REFERENCE_QUANTS = ("F16", "BF16")  # in the order in which they are tried


@dataclass(frozen=True)
class Yardstick:
    """How the further models are made, and what they are.

    Attributes:
        folder: for temporary files; it is removed with all that is in it.
        write_reference: writes the unquantized fine-tune as a GGUF: (quant, path). Raises OlpackError where it cannot, as on a full disk.
        reference_key: identity of its weights.
        write_base: likewise the base without its adapter; None: no base.
        base_key: identity of its weights.
        base_quant: the quant at which the base is measured.
        write_unweighed: likewise one of the quants without its importance matrix; a budget with the same types.
        unweighed_keys: identity of the weights that this gives, by quant: of those that have a matrix and can be made without.
    """

    folder: Path
    write_reference: Callable[[str, Path], None]
    reference_key: str
    write_base: Callable[[str, Path], None] | None = None
    base_key: str = ""
    base_quant: str = "Q8_0"
    write_unweighed: Callable[[str, Path], None] | None = None
    unweighed_keys: Mapping[str, str] = field(default_factory=dict)

    @contextmanager
    def temporary(self) -> Iterator[Path]:
        """The empty folder, for as long as the block runs; what a killed comparison left in it is removed first."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        try:
            yield self.folder
        finally:
            shutil.rmtree(self.folder, ignore_errors=True)


@dataclass
class Held:
    """What came of it.

    Attributes:
        logits: where the reference's logits lie; None where no file needs them, or they could not be had.
        reference, base: their own figures.
        problems: what went wrong. The quants are measured all the same.
    """

    logits: LogitsJob | None = None
    reference: Reference | None = None
    base: BaseResult | None = None
    problems: list[OlpackError] = field(default_factory=list)


def hold(yardstick: Yardstick, job: Job, depends: dict[str, dict], cache: Cache, needed: bool, temporary: ExitStack, tasks: Sequence[Task]) -> Held:
    """Measure the reference and the base, as far as their figures are not in the cache.

    Args:
        job: with the rows, and nothing to measure.
        depends: what the units "perplexity", "divergence", "tasks" and "scores" depend on, the file left out.
        needed: a quant lacks a divergence, so the reference's logits are wanted in any case.
        temporary: the logits last until it closes. The two GGUFs are gone when this returns.
        tasks: what the base is asked.
    """
    reference = Units(cache, "reference", {unit: depends["perplexity"] | {"file": yardstick.reference_key} for unit in ("perplexity", "quant")})
    identity = {"file": yardstick.base_key, "quant": yardstick.base_quant}
    base = Units(cache, "base", {unit: depends[unit] | identity for unit in ("perplexity", "divergence", "tasks", "scores") if unit in depends})
    wanted = {"perplexity": True, "tasks": [task.messages for task in tasks]}
    base_missing = yardstick.write_base is not None and not base.found.keys() >= depends.keys() & {"perplexity", "divergence", "tasks"}
    reference_missing = not {"perplexity", "quant"} <= reference.found.keys()
    held = Held()
    try:
        if needed or reference_missing or base_missing:
            folder = temporary.enter_context(yardstick.temporary())
        if needed or reference_missing or (base_missing and "divergence" not in base.found):
            held.logits = _measure_reference(yardstick, job, folder, reference)
        if base_missing:
            with _written(yardstick.write_base, yardstick.base_quant, folder) as path:
                missing = {unit: value for unit, value in (wanted | {"divergence": held.logits}).items() if unit not in base.found}
                held.problems += run_worker(job.model_copy(update={"path": path, **missing}), f"the base ({yardstick.base_quant})", base)
        check_answers(tasks, base, "the base")
    except OlpackError as error:
        held.problems.append(error)
    if {"perplexity", "quant"} <= reference.found.keys():
        held.reference = Reference(quant=reference.found["quant"]["quant"], perplexity=reference.get("perplexity", Perplexity))
    if yardstick.write_base is not None and base.found:
        held.base = BaseResult(
            quant=yardstick.base_quant,
            perplexity=base.get("perplexity", Perplexity),
            divergence=base.get("divergence", Divergence),
            task_answers=base.answers("tasks"),
            scores=base.get("scores", Scores),
        )
    return held


def measure_unweighed(yardstick: Yardstick, quant: str, job: Job, logits: LogitsJob, units: Units) -> list[OlpackError]:
    """Measure the divergence that a quant has without its importance matrix, into its unit `UNWEIGHED`; what went wrong comes back.

    Args:
        quant: one of `yardstick.unweighed_keys`.
        job: as for `hold`.
        logits: the reference's, which `hold` has left.
        units: of the quant.
    """
    found = Units(Cache(None), quant, {})
    try:
        with _written(yardstick.write_unweighed, quant, yardstick.folder) as path:
            problems = run_worker(job.model_copy(update={"path": path, "divergence": logits}), f"{quant} without importance", found)
    except OlpackError as error:
        return [error]
    if "divergence" in found.found:
        units.add(UNWEIGHED, found.found["divergence"])
    return problems


def _measure_reference(yardstick: Yardstick, job: Job, folder: Path, units: Units) -> LogitsJob:
    logits = folder / "logits.f32"
    for quant in REFERENCE_QUANTS:
        tried = Units(Cache(None), "reference", {})
        with _written(yardstick.write_reference, quant, folder) as path:
            wanted = {"path": path, "perplexity": True, "keep_logits": logits}
            problems = run_worker(job.model_copy(update=wanted), f"the unquantized model ({quant})", tried)
        if problems:
            raise problems[0]
        if None in tried.found["perplexity"]["row_nll"]:
            continue
        if not (rows := tried.found["logits"]["rows"]):
            limit = quantity(LOGITS_BYTES, "B")
            raise OlpackError(f"The logits of the first held-out row take more than the {limit} allowed for all.", "Put a shorter row first.")
        units.add("quant", {"quant": quant})
        units.add("perplexity", tried.found["perplexity"])
        return LogitsJob(path=logits, quant=quant, rows=rows)
    raise OlpackError("The unquantized fine-tune's probabilities are no numbers.", "Train again with a lower learning rate.")


@contextmanager
def _written(write: Callable[[str, Path], None], quant: str, folder: Path) -> Iterator[Path]:
    """A GGUF that lasts as long as the block."""
    path = folder / f"{quant}.gguf"
    try:
        write(quant, path)
        yield path
    finally:
        path.unlink(missing_ok=True)
