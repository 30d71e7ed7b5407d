"""What is measured on training rows before some quants are made: an importance matrix, the sensitivity of each matrix to rounding, and the inputs
of matrices that are rounded by them."""

from __future__ import annotations

import random
from bisect import bisect_right
from collections.abc import Callable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from olpack import progress
from olpack.errors import OlpackError
from olpack.machine import this_machine
from olpack.quants import gains_by_importance, has_few_bits, quant_type
from olpack.stages import records, train
from olpack.stages.build import Build
from olpack.stages.records import Step
from olpack.stages.stage import Artefact
from olpack.workspace import file_digest, remove, value_digest

if TYPE_CHECKING:
    from olpack.data import TokenRow
    from olpack.export import ExportOptions, ExportPlan, RoundedMatrices
    from olpack.model.base import Base

# Of the training rows, at most so many tokens are read for an importance matrix. 2,048 served as well as 72,895 did (benchmarks/importance.md);
# sixteen times as many leave that for each expert where a token is sent to one in sixteen of them (8 of 128).
_IMPORTANCE_TOKENS = 32_768

# Of the answers in the training rows, so many tokens are predicted anew for each matrix of the model to measure its sensitivity. Matrices
# differ by a factor of ten and more, their figures on so many tokens by some percent.
_SENSITIVITY_TOKENS = 1_024

# Of the training rows, so many tokens are read to round matrices by what they are multiplied with: twice and four times as many gave nothing more.
# At least so many must be there: with an eighth of that the loss was larger than with ggml's blocks, and with half of it that on other text was.
_ROUNDING_TOKENS = 16_384
LEAST_ROUNDING_TOKENS = 2_048

_SEARCH_SECONDS = 2e-7  # for a weight: to search scales and to choose codes column by column

ROUNDING_VERSION = 1  # raised when the same inputs would no longer give the same blocks
SCALES_VERSION = 1  # likewise, of trained block scales


def fine_tune_inputs(build: Build) -> dict[str, Any]:
    """What decides the merged weights, and llama.cpp's version, which decides their form in a GGUF."""
    from olpack.llamacpp.source import VERSION

    made = {"llama.cpp": VERSION, "training": train.STAGE.key(build), "adapter": records.result(build.paths, "train").get("adapter_digest")}
    merge_base = build.recipe.train.merge_base
    return made if merge_base == "original" else made | {"train.merge_base": merge_base}


def _importance_inputs(build: Build, unit: str) -> dict[str, Any]:
    return fine_tune_inputs(build) | {"tokens": _IMPORTANCE_TOKENS}


def _sensitivity_inputs(build: Build, unit: str) -> dict[str, Any]:
    rounding = build.recipe.export.rounding
    made = fine_tune_inputs(build) | {"tokens": _SENSITIVITY_TOKENS, "importance": importance_key(build)}
    if rounding == "learned":
        made["rounding on rows"] = ROUNDING_VERSION
    return made if rounding == "ggml" else made | {"export.rounding": rounding}


IMPORTANCE = Artefact("importance", 1, _importance_inputs)
SENSITIVITY = Artefact("sensitivity", 1, _sensitivity_inputs)


def importance_key(build: Build) -> str | None:
    """Identity of the importance matrix, None where there is none."""
    path = importance_file(build)
    return None if path is None else IMPORTANCE.key(build) if path == build.paths.importance else file_digest(path)


def importance_file(build: Build) -> Path | None:
    """The importance matrix that the recipe asks for, which may still have to be collected.

    Raises:
        OlpackError: the recipe names a file that is not there.
    """
    asked = build.recipe.export.importance
    if asked in ("none", "train"):
        return build.paths.importance if asked == "train" else None
    path = build.recipe.folder / asked
    if not path.is_file():
        raise OlpackError(f"There is no {path}, which `export.importance` names.", "Set it to `train`, `none`, or a file relative to the recipe.")
    return path


def uses_importance(build: Build, quant: str) -> bool:
    """Whether an importance matrix decides anything in the file of a quant."""
    return build.recipe.export.importance != "none" and gains_by_importance(quant_type(quant), build.recipe.export.tensor_types)


def without_importance(build: Build) -> list[str]:
    """The recipe's quants that are the same without an importance matrix: one can be collected on them."""
    return [quant.name for quant in build.quants if not uses_importance(build, quant.name)]


def awaiting_importance(build: Build, steps: list[Step]) -> list[Step]:
    """Of these steps, the quants that can be made only after an importance matrix is collected."""
    if build.recipe.export.importance != "train" or not (train.STAGE.step(build).stale or IMPORTANCE.step(build).stale):
        return []
    return [step for step in steps if step.stage == "export" and uses_importance(build, step.inputs["quant"])]


def budgets(build: Build) -> set[str]:
    """Names of the quants whose types are chosen for a size."""
    return {quant.name for quant in build.quants if quant.budget}


def awaiting_sensitivity(build: Build, steps: list[Step]) -> list[Step]:
    """Of these steps, the budgets that can be made only after the sensitivity is measured."""
    if not (train.STAGE.step(build).stale or SENSITIVITY.step(build).stale):
        return []
    return [step for step in steps if step.stage == "export" and step.inputs["quant"] in budgets(build)]


def needs_importance_source(build: Build, steps: list[Step]) -> bool:
    """Whether a Q8_0 file is written to collect an importance matrix on it, because the recipe has no quant that will do."""
    return bool(awaiting_importance(build, steps)) and not without_importance(build)


def temporary_quants(build: Build, steps: list[Step]) -> list[str]:
    """Q8_0 where it is written to read rows with it, and F16 where it is written to measure the sensitivity on it."""
    eight_bits = needs_importance_source(build, steps) or needs_rounding_source(build, steps)
    return (["Q8_0"] if eight_bits else []) + (["F16"] if awaiting_sensitivity(build, steps) else [])


def reads_rows(build: Build, quant: str) -> bool:
    """Whether the matrices of a quant are rounded by what they are multiplied with on training rows."""
    return build.recipe.export.rounding == "learned" and gains_by_importance(quant_type(quant), build.recipe.export.tensor_types)


def trains_scales(build: Build, quant: str) -> bool:
    """Whether the block scales of a quant are trained, if its matrices turn out to have few bits."""
    asked = build.recipe.export
    return reads_rows(build, quant) and asked.scale_steps > 0 and has_few_bits(quant_type(quant), asked.tensor_types)


def scaled_quants(exported: ExportPlan, steps: int) -> list[str]:
    """The quants whose block scales will be trained, in so many steps."""
    if not exported.few_bits or not steps:
        return []
    from olpack.train.block_scales import trains

    return exported.few_bits if trains(exported.architecture) else []


def check_scales_memory(exported: ExportPlan, steps: int, base: Base) -> None:
    """Refuse a training of block scales that this machine has too little memory for.

    Raises:
        OlpackError: it has.
    """
    if not (scaled := scaled_quants(exported, steps)):
        return
    import torch

    from olpack.model.shape import MetaModel
    from olpack.train.block_scales import check_memory
    from olpack.train.device import pick_device, working_dtype

    device, shape = pick_device(), MetaModel(base.config, base.label).shape
    full = working_dtype(device).itemsize
    there = this_machine().ram if device.type == "cpu" else torch.cuda.get_device_properties(device).total_memory
    rest = shape.hidden * shape.vocabulary * (full if shape.tied else 2 * full)
    # The unquantized model has 8 bits at best, and blocks at most 256 weights.
    files = exported.parameters * 34 // 32 + max(exported.sizes[quant] for quant in scaled) + rest
    check_memory(shape, files, 2 * exported.parameters // 256, there, full)


def rounding_rows(rows: Sequence[TokenRow]) -> list[TokenRow]:
    """The rows that matrices are rounded by.

    Raises:
        OlpackError: too few.
    """
    tokens = sum(len(row.ids) for row in rows)
    if tokens < LEAST_ROUNDING_TOKENS:
        more = "" if not tokens else f": with rows like these, {-(-LEAST_ROUNDING_TOKENS * len(rows) // tokens):,} rows"
        raise OlpackError(
            f"`rounding: learned` needs {LEAST_ROUNDING_TOKENS:,} tokens of training rows, and there are {tokens:,}.",
            f"Add rows{more}; or set rounding to search, which reads none.",
        )
    return _sample(rows, _ROUNDING_TOKENS)


def needs_rounding_source(build: Build, steps: list[Step]) -> bool:
    """Whether a Q8_0 file is written to round matrices by what they are multiplied with, because the recipe has no quant that will do."""
    exported = {step.inputs["quant"] for step in steps if step.stage == "export"}
    return any(quant.name in exported and reads_rows(build, quant.name) for quant in build.quants) and not _rounding_sources(build)


def _rounding_sources(build: Build) -> list[Path]:
    """Quants that read rows as the unquantized fine-tune does: those in 16 or 8 bits. They are made first."""
    return [build.paths.gguf(quant.name) for quant in build.quants if not reads_rows(build, quant.name)]


def round_on_training_rows(build: Build, quants: list[str], options: ExportOptions) -> ExportOptions:
    """Round the matrices of some quants and train their block scales, or go on where that was interrupted.

    Args:
        options: of the export that follows.

    Returns:
        What is added to them: where blocks and scales are.
    """
    from olpack.export import round_matrices

    rows = rounding_rows(build.rows[0])
    folder = blocks_folder(build.paths.rounded, fine_tune_inputs(build), rows)
    sources = sorted((path for path in _rounding_sources(build) if path.is_file()), key=lambda path: path.stat().st_size)
    try:
        if not sources:
            sources = [build.paths.rounding_source]
            _write_fine_tune(build, "Q8_0", sources[0])
        made = round_matrices(build.base.source, quants, sources[-1], [row.ids for row in rows], folder, **options)
        progress.say(rounded_on(made, rows))
        scales = train_scales(sources[0], made, build.rows[0], folder, build.recipe.export.scale_steps)
    finally:
        build.paths.rounding_source.unlink(missing_ok=True)
    return {"rounded": folder, "scales": scales}


def train_scales(gguf: Path, made: RoundedMatrices, rows: Sequence[TokenRow], folder: Path, steps: int) -> dict[str, Path]:
    """Train the block scales of quants with few bits, or go on where that was interrupted.

    Args:
        gguf: the unquantized model.
        made: what was rounded, into `folder`.
        rows: training rows.
        steps: of training; 0: none are trained.

    Returns:
        Files of scales by quant. A quant whose scales cannot be trained is not among them, and a warning says why.

    Raises:
        OlpackError: too little memory, or space; predictions that are no numbers.
    """
    if not steps or not made.few_bits:
        return {}
    from olpack.export import blocks_file
    from olpack.model.gguf_base import open_gguf
    from olpack.model.libraries import import_libraries

    import_libraries()
    from olpack.train.block_scales import train_block_scales, trains

    if not trains(architecture := open_gguf(gguf).architecture):
        named = " and ".join(made.few_bits)
        progress.warn(f"The block scales of {named} stay as they were rounded: olpack trains on no GGUF files of the architecture {architecture}")
        return {}
    found: dict[str, Path] = {}
    of_rows = value_digest([SCALES_VERSION, steps, [row.ids for row in rows]])
    for quant, types in made.few_bits.items():
        path = folder / f"{value_digest([of_rows, types])[:16]}.safetensors"
        if not path.is_file():
            matrices = {name: (type_name, blocks_file(folder, name, type_name)) for name, type_name in types.items()}
            trained = train_block_scales(gguf, matrices, rows, path, steps=steps, title=f"training the block scales of {quant}")
            if trained is None:
                progress.warn(f"The block scales of {quant} stay as they were rounded: none of its matrices is a linear layer")
                continue
            if not trained.steps:
                progress.say(f"training gained nothing for the block scales of {quant} on training rows that were set aside, so they stay")
            else:
                figures = f"from {1000 * trained.before:.1f} to {1000 * trained.after:.1f} mnat a token"
                progress.say(
                    f"trained the block scales of {quant}: the KL divergence that its matrices cause fell {figures} on rows that were set aside"
                )
        found[quant] = path
    return found


def _write_fine_tune(build: Build, quant: str, path: Path) -> None:
    """The fine-tune in one file, which is there to read rows with."""
    from olpack.export import Target, export

    export(build.base.source, [Target(quant, path)], adapter=build.paths.adapter, merge_base=build.recipe.train.merge_base)


def rounding_seconds(build: Build, quants: Sequence[str], trained: int, parameters: int, rate: float) -> float:
    """About how long `round_on_training_rows` takes on CPU cores.

    Args:
        quants: that are rounded.
        trained: of how many of them the block scales are trained.
        parameters: weights of the model.
        rate: floating-point operations per second of a matrix product.
    """
    tokens = min(_ROUNDING_TOKENS, sum(len(row.ids) for row in build.rows[0]))
    reading = 4 * parameters * tokens  # the model's own products, and about as many for those of the inputs
    feedback = 2 * parameters * build.meta_model.shape.hidden * len(quants)
    training = 0
    if trained:
        from olpack.train.block_scales import training_tokens

        # Two forward passes, the gradients of inputs and of weights, and as long again for their sums and to dequantize.
        training = 16 * parameters * trained * training_tokens(build.rows[0], build.recipe.export.scale_steps)
    return (reading + feedback + training) / (0.5 * rate) + _SEARCH_SECONDS * parameters * len(quants)


def blocks_folder(parent: Path, model: Any, rows: Sequence[TokenRow]) -> Path:
    """The folder of the blocks of a model whose matrices are rounded on some rows. Those of other models or rows are removed.

    Args:
        parent: of these folders.
        model: JSON-able identity of the weights.
    """
    folder = parent / value_digest([model, ROUNDING_VERSION, [list(row.ids) for row in rows]])[:16]
    for other in parent.glob("*"):
        if other != folder:
            remove(other)
    return folder


def rounded_on(made: RoundedMatrices, rows: Sequence[TokenRow]) -> str:
    """A sentence on what was rounded."""
    tokens = sum(len(row.ids) for row in rows)
    singular = f"; {len(made.singular):,} of them have more columns than that, so damping decides a part of it" if made.singular else ""
    return f"rounded {made.matrices:,} matrices by {tokens:,} tokens of {len(rows):,} rows{singular}"


def collect_importance_matrix(build: Build) -> None:
    """Read training rows with the largest quant that needs no matrix, or with a Q8_0 file that is there for this only."""
    from olpack.export import collect_importance

    step, rows = IMPORTANCE.step(build), _sample(build.rows[0], _IMPORTANCE_TOKENS)
    at_hand = [build.paths.gguf(quant) for quant in without_importance(build)]
    source = max(at_hand, key=lambda path: path.stat().st_size, default=build.paths.importance_source)
    try:
        if not at_hand:
            _write_fine_tune(build, "Q8_0", source)
        dataset = ", ".join(one.label for one in build.sources("train"))
        collect_importance(source, [row.ids for row in rows], build.paths.importance, dataset=dataset)
    finally:
        build.paths.importance_source.unlink(missing_ok=True)
    tokens = sum(len(row.ids) for row in rows)
    records.finish(build.paths, step, [build.paths.importance], {"rows": len(rows), "tokens": tokens})
    progress.say(f"collected the importance matrix on {tokens:,} tokens of {len(rows):,} training rows")


def measure_matrix_sensitivity(build: Build) -> None:
    """Round one matrix of the unquantized fine-tune after the other and read training rows: a 16-bit file is there for this only."""
    from olpack.compare.reference_models import REFERENCE_QUANTS
    from olpack.export import measure_sensitivity

    paths, step = build.paths, SENSITIVITY.step(build)
    rows = _sample(build.rows[0], _SENSITIVITY_TOKENS, lambda row: row.target_count)
    try:
        for quant in REFERENCE_QUANTS:
            _write_fine_tune(build, quant, paths.sensitivity_source)
            if measure_sensitivity(
                paths.sensitivity_source,
                [row.ids for row in rows],
                [row.loss_mask for row in rows],
                paths.sensitivity,
                key=value_digest([step.key, quant]),
                importance=importance_file(build),
                rounding=build.recipe.export.rounding,
                calibration=[row.ids for row in rounding_rows(build.rows[0])] if build.recipe.export.rounding == "learned" else (),
            ):
                break
        else:
            raise OlpackError("The unquantized fine-tune's probabilities are no numbers.", "Train again with a lower learning rate.")
    finally:
        paths.sensitivity_source.unlink(missing_ok=True)
    answers = sum(row.target_count for row in rows)
    records.finish(build.paths, step, [paths.sensitivity], {"rows": len(rows), "learned_tokens": answers})
    progress.say(f"measured what each matrix loses on {answers:,} answer tokens of {len(rows):,} training rows")


def _sample(rows: Sequence[TokenRow], tokens: int, count: Callable[[TokenRow], int] = lambda row: len(row.ids)) -> list[TokenRow]:
    """Rows drawn from all over the data, the same ones each time, with at most so many tokens as `count` counts them (but one row at least)."""
    drawn = random.Random(0).sample(rows, len(rows))
    ends = list(accumulate(map(count, drawn)))
    return drawn[: max(1, bisect_right(ends, tokens))]
