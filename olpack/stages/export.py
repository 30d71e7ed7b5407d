"""The export stage: the quants, and what has to be there before some of them: an importance matrix, the measured sensitivity."""

from __future__ import annotations

import random
from bisect import bisect_right
from collections.abc import Callable, Mapping
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING

from olpack import __version__, progress
from olpack.errors import OlpackError
from olpack.quants import quant_type
from olpack.stages.build import ADAPTER, IMPORTANCE_TOKENS, SENSITIVITY_TOKENS
from olpack.workspace import value_digest

if TYPE_CHECKING:
    from olpack.data import TokenRow
    from olpack.export import ExportedFile
    from olpack.stages.build import Build, Step


def export(build: Build, steps: list[Step]) -> None:
    """Merge, convert and quantize in one pass; a GGUF for each stale step. An adapter package gets quants of its base, and a LoRA GGUF.

    Where an importance matrix is to be collected first, or the sensitivity to be measured, the quants that do without make a pass of their
    own before it.
    """
    from olpack.export.client import one_worker

    for left in (build.paths.importance_source, build.paths.sensitivity_source):
        left.unlink(missing_ok=True)  # of a build that was killed
    if alone := [step for step in steps if step.unit == f"export-{ADAPTER}"]:
        _export_adapter(build, alone[0])
    quants = [step for step in steps if step not in alone]
    with one_worker():
        if waiting := build.uncollected(quants):
            _export_quants(build, [step for step in quants if step not in waiting])
            _collect_importance(build)
            quants = waiting
        if budgets := build.unmeasured(quants):
            _export_quants(build, [step for step in quants if step not in budgets])
            _measure_sensitivity(build)
            quants = budgets
        _export_quants(build, quants)


def _export_adapter(build: Build, step: Step) -> None:
    from olpack.export.lora import export_adapter

    path = build.paths.gguf(ADAPTER)
    with progress.task("exporting the adapter"):
        size, sha256 = export_adapter(build.base.path, build.paths.adapter, path)
    build.finish(step, [path], {"size": size, "sha256": sha256}, {path: sha256})
    progress.say(f"wrote {path} ({progress.quantity(size, 'B')})")


def _export_quants(build: Build, steps: list[Step]) -> None:
    if not steps:
        return
    importance = build.importance_file if any(build.weighs(step.inputs["quant"]) for step in steps) else None
    paths = {step.inputs["quant"]: build.paths.gguf(step.inputs["quant"]) for step in steps}
    files = write_quants(build, paths, importance)
    for step, path, file in zip(steps, paths.values(), files, strict=True):
        kept = ("size", "sha256", "bits_per_weight", "parameters", "types", "needs_importance")
        build.finish(step, [path], {name: getattr(file, name) for name in kept}, {path: file.sha256})
    made = ", ".join(f"{file.quant} {progress.quantity(file.size, 'B')}" for file in files)
    progress.say(f"wrote {made} to {next(iter(paths.values())).parent}")


def write_quants(build: Build, paths: Mapping[str, Path], importance: Path | None) -> list[ExportedFile]:
    """Write quants of the recipe, as it wants them but for the importance matrix. `paths` are by quant, and so is the order of the result."""
    from olpack.export import Target, export

    return export(
        build.base.path,
        [Target(quant, path) for quant, path in paths.items()],
        adapter=None if build.paths.base else build.paths.adapter,
        importance=importance,
        tensor_types=build.recipe.export.tensor_types,
        merge_base=build.recipe.train.merge_base,
        sensitivity=build.paths.sensitivity if any(quant_type(quant).budget for quant in paths) else None,
        **said_of_a_file(build),
    )


def said_of_a_file(build: Build) -> dict:
    """What every GGUF of a build says beside its weights, as arguments of `export`. One that packages share says nothing of either."""
    from olpack.model.chat_template import pins_for, protect

    template, base = build.renderer.tokenizer.chat_template, build.paths.base
    return {
        "name": build.model_name,
        "chat_template": protect(template, pins_for(template, {}, build.base.absent_tokens)),
        # What ends a turn is what training saw there, whatever the tokenizer calls it.
        "end_of_turn": build.renderer.end_of_turn(),
        "pre_tokenizer": build.pre_tokenizer,
        "metadata": {
            "olpack.version": __version__,
            "olpack.base": build.recipe.base,
            "olpack.base_digest": build.base.digest,
            **({} if base else {"olpack.training": value_digest(build.inputs("train"))}),
            **({"general.license": build.base.license} if build.base.license else {}),
        },
    }


def _collect_importance(build: Build) -> None:
    """Read training rows with the largest quant that needs no matrix, or with a Q8_0 file that is there for this only."""
    from olpack.export import Target, collect_importance, export

    step, rows = build.step("importance"), _sample(build.rows[0], IMPORTANCE_TOKENS)
    at_hand = [build.paths.gguf(quant) for quant in build.unweighed]
    source = max(at_hand, key=lambda path: path.stat().st_size, default=build.paths.importance_source)
    try:
        if not at_hand:
            export(build.base.path, [Target("Q8_0", source)], adapter=build.paths.adapter, merge_base=build.recipe.train.merge_base)
        dataset = ", ".join(one.label for one in build.sources("train"))
        collect_importance(source, [row.ids for row in rows], build.paths.importance, dataset=dataset)
    finally:
        build.paths.importance_source.unlink(missing_ok=True)
    tokens = sum(len(row.ids) for row in rows)
    build.finish(step, [build.paths.importance], {"rows": len(rows), "tokens": tokens})
    progress.say(f"collected the importance matrix on {tokens:,} tokens of {len(rows):,} training rows")


def _measure_sensitivity(build: Build) -> None:
    """Round one matrix of the unquantized fine-tune after the other and read training rows: a 16-bit file is there for this only."""
    from olpack.compare.reference_models import REFERENCE_QUANTS
    from olpack.export import Target, export, measure_sensitivity

    paths, step = build.paths, build.step("sensitivity")
    rows = _sample(build.rows[0], SENSITIVITY_TOKENS, lambda row: row.target_count)
    try:
        for quant in REFERENCE_QUANTS:
            export(build.base.path, [Target(quant, paths.sensitivity_source)], adapter=paths.adapter, merge_base=build.recipe.train.merge_base)
            if measure_sensitivity(
                paths.sensitivity_source,
                [row.ids for row in rows],
                [row.loss_mask for row in rows],
                paths.sensitivity,
                key=value_digest([step.key, quant]),
                importance=build.importance_file,
            ):
                break
        else:
            raise OlpackError("The unquantized fine-tune's probabilities are no numbers.", "Train again with a lower learning rate.")
    finally:
        paths.sensitivity_source.unlink(missing_ok=True)
    answers = sum(row.target_count for row in rows)
    build.finish(step, [paths.sensitivity], {"rows": len(rows), "learned_tokens": answers})
    progress.say(f"measured what each matrix loses on {answers:,} answer tokens of {len(rows):,} training rows")


def _sample(rows: list[TokenRow], tokens: int, count: Callable[[TokenRow], int] = lambda row: len(row.ids)) -> list[TokenRow]:
    """Rows drawn from all over the data, the same ones each time, with at most so many tokens as `count` counts them (but one row at least)."""
    drawn = random.Random(0).sample(rows, len(rows))
    ends = list(accumulate(map(count, drawn)))
    return drawn[: max(1, bisect_right(ends, tokens))]
