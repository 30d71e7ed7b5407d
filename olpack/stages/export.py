"""The export stage: base and adapter become one GGUF for each quant; of an adapter package, quants of its base and a LoRA GGUF."""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from olpack import __version__, progress
from olpack.errors import OlpackError
from olpack.model.gguf_blocks import FLOATS
from olpack.quants import Rounding, overridable, quant_type
from olpack.stages import records, train
from olpack.stages.build import Build
from olpack.stages.calibration import (
    ROUNDING_VERSION,
    SCALES_VERSION,
    SENSITIVITY,
    awaiting_importance,
    awaiting_sensitivity,
    budgets,
    check_scales_memory,
    collect_importance_matrix,
    fine_tune_inputs,
    importance_file,
    importance_key,
    measure_matrix_sensitivity,
    reads_rows,
    round_on_training_rows,
    rounding_rows,
    temporary_quants,
    trains_scales,
    uses_importance,
)
from olpack.stages.records import Step
from olpack.stages.stage import Checks, Stage
from olpack.workspace import remove

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from olpack.export import ExportedFile, ExportOptions, TokenDifference, TokenText

ADAPTER = "adapter"  # beside the names of quants: the LoRA GGUF of an adapter package


def units(build: Build) -> list[str]:
    """One for each quant, and one for the adapter where it is not merged. A GGUF that is served as it is needs none for itself."""
    made = [] if build.paths.served else [f"export-{quant.name}" for quant in build.quants]
    return made + ([f"export-{ADAPTER}"] if build.paths.base else [])


def inputs(build: Build, unit: str) -> dict[str, Any]:
    """Weights, names and, where they decide anything, the recipe's choices for this quant."""
    from olpack.llamacpp.source import VERSION

    quant = unit.removeprefix("export-")
    made: dict[str, Any] = {"llama.cpp": VERSION, "quant": quant, "name": build.paths.home(unit).name}
    if quant != ADAPTER and (absent := build.base.absent_tokens):
        made["pinned in the chat template"] = absent
    if build.paths.base and quant != ADAPTER:
        return made | {"base": build.base.digest}
    return made | fine_tune_inputs(build) | _choices(build, quant)


def _choices(build: Build, quant: str) -> dict[str, Any]:
    """What the recipe's `export` decides for one quant: nothing, where its file would be the same."""
    asked = build.recipe.export
    made: dict[str, Any] = {}
    if quant == ADAPTER:
        return {}
    if asked.tensor_types and overridable(quant_type(quant)):
        made["export.tensor_types"] = [list(pair) for pair in asked.tensor_types.items()]  # their order counts
    if asked.rounding != "ggml" and overridable(quant_type(quant)):
        made["export.rounding"] = asked.rounding
    if reads_rows(build, quant):
        made["rounding on rows"] = ROUNDING_VERSION
    if trains_scales(build, quant):
        made["export.scale_steps"], made["trained block scales"] = asked.scale_steps, SCALES_VERSION
    if uses_importance(build, quant):
        made["export.importance"] = importance_key(build)
    if quant in budgets(build):
        made["sensitivity"] = SENSITIVITY.key(build)
    return made


def check(build: Build, checks: Checks) -> None:
    """Refuse what the converter, llama.cpp or an importance matrix would refuse, and rows that llama.cpp would read as other tokens."""
    from olpack.export import check_export

    if build.paths.served:
        _check_file(build, checks)
        return
    asked = [step.inputs["quant"] for step in checks.steps if step.stage == "export" and step.unit != f"export-{ADAPTER}"]
    quants = asked or build.recipe.quants
    if any(reads_rows(build, quant) for quant in quants):
        rounding_rows(build.rows[0])  # refuses too few
    importance, texts = importance_file(build), _texts(build)
    exported = checks.exported = check_export(
        build.base.source,
        quants,
        temporary=temporary_quants(build, checks.steps),
        out=build.paths.gguf(quants[0]).parent,
        importance="later" if importance == build.paths.importance else importance,
        tensor_types=build.recipe.export.tensor_types,
        rounding=build.recipe.export.rounding,
        rounded=build.paths.rounded,
        scales="later" if build.recipe.export.scale_steps else {},
        texts=texts,
        requantize=build.base.gguf is not None,
        adapter=None if build.paths.base else build.finished_adapter,
        merge_base=build.recipe.train.merge_base,
        **header_options(build),
    )
    check_scales_memory(exported, build.recipe.export.scale_steps, build.base)
    for warning in exported.warnings:
        progress.warn(warning)
    _warn_of_own_type(build)
    _judge_tokens(build, texts, exported.differences)
    build.pre_tokenizer = exported.pre_tokenizer


def _warn_of_own_type(build: Build) -> None:
    """Warn of merged quants of a GGUF's own type: its weights lie on that grid, and changes smaller than half a step are rounded away."""
    base = build.base.quantization
    if build.base.gguf is None or build.paths.base or base in (*FLOATS, "Q8_0"):  # whose steps are small
        return
    for quant in build.quants:
        if quant.name == base or quant.name.startswith(f"{base}_"):
            progress.warn(
                f"{quant.name} is the type of the base's own weights: merged onto the same grid, most of a small fine-tune is rounded away. "
                "Take another type, or set `package: adapter`."
            )


def _check_file(build: Build, checks: Checks) -> None:
    """Refuse an adapter on a GGUF whose vocabulary llama.cpp reads otherwise than training does, or that would never end an answer."""
    from olpack.export import ExportPlan
    from olpack.export.verify import compare_tokens

    gguf, texts = build.base.gguf, _texts(build)
    assert gguf is not None and build.paths.served is not None  # so it is with every adapter on a GGUF
    differences = compare_tokens(build.paths.served, texts)
    checks.exported = ExportPlan(
        gguf.architecture,
        str(gguf.metadata.get("tokenizer.ggml.pre", "")),
        build.base.context_length,
        parameters_of(build),
        {},
        texts=len(texts),
        differences=differences,
    )
    _judge_tokens(build, texts, differences)
    end = build.renderer.end_of_turn()
    if end is not None and build.renderer.tokenizer.convert_tokens_to_ids(end) not in build.base.end_ids() and not _stops_at(build, end):
        raise OlpackError(
            f"The chat template ends a turn with '{end}', and llama.cpp does not end an answer there: '{build.paths.served}' names another token.",
            f"Set `modelfile.parameters.stop` to {end!r}.",
        )


def _stops_at(build: Build, text: str) -> bool:
    stops = build.package.parameters.get("stop", [])
    return text in (stops if isinstance(stops, (list, tuple)) else [stops])


def parameters_of(build: Build) -> int:
    """Weights of a GGUF that is served as it is."""
    assert build.base.gguf is not None
    return sum(math.prod(tensor.shape) for tensor in build.base.gguf.tensors.values())


def quant_facts(build: Build, quant: str) -> dict[str, Any]:
    """What is known of a quant, or of the GGUF that is served in its place: size, sha256, bits_per_weight, parameters, types, needs_importance."""
    if build.paths.served is None or quant == ADAPTER:
        return records.result(build.paths, f"export-{quant}")
    from olpack.model.gguf_files import content_digest

    gguf = build.base.gguf
    assert gguf is not None
    types: dict[str, dict[str, int]] = {}
    for name, tensor in gguf.tensors.items():
        if len(tensor.shape) > 1:
            kind = types.setdefault(_LAYER.sub("", name).removesuffix(".weight"), {})
            kind[tensor.type.name] = kind.get(tensor.type.name, 0) + 1
    return {
        "size": sum(path.stat().st_size for path in gguf.paths),
        "sha256": content_digest(build.paths.served),
        "bits_per_weight": 8 * gguf.size / parameters_of(build),
        "parameters": parameters_of(build),
        "types": types,
        "needs_importance": False,
    }


_LAYER = re.compile(r"^blk\.\d+\.")
_MADE_UP = "the conversation with "  # before the label of one that olpack made up


def _texts(build: Build) -> list[TokenText]:
    """All rows as training tokenizes them, and the conversations that templates and servers get wrong."""
    from olpack.deploy.prompt_identity import HARD
    from olpack.export import TokenText

    renderer, rows = build.renderer, [row for side in build.rows for row in side]
    texts = [TokenText(row.source, [row.text[start:end] for start, end in pairwise([0, *row.cuts, len(row.text)])], list(row.ids)) for row in rows]
    for label, conversation in HARD.items():
        try:
            text = renderer.text(conversation, ask=True)
        except Exception:  # a conversation that the template refuses cannot be served either
            continue
        texts.append(TokenText(f"{_MADE_UP}{label}", [text], renderer.tokens(text)[0], made_up=True))
    return texts


def _judge_tokens(build: Build, texts: list[TokenText], differences: list[TokenDifference]) -> None:
    """Refuse to train on rows that llama.cpp would read as other tokens; warn of made-up conversations that it would.

    Raises:
        OlpackError: with the first of the rows.
    """
    tokenizer, texts_of = build.renderer.tokenizer, {text.source: "".join(text.pieces) for text in texts}
    for one in sorted(differences, key=lambda one: one.source.startswith(_MADE_UP)):
        trained, read, before = (" ".join(map(repr, tokenizer.convert_ids_to_tokens(ids))) for ids in (one.trained, one.read, one.before))
        text = f"llama.cpp reads {one.source} as other tokens than training does: {read} in place of {trained}, after {before or 'nothing'}"
        if build.base.gguf is not None:  # whose tokenizer was built to be llama.cpp's
            raise OlpackError(f"{text}.", "Take the folder of the model as base, and report this with the file's name.")
        if one.source.startswith(_MADE_UP):
            progress.warn(f"{text}.")
        elif _is_composed(tokenizer, whole := texts_of[one.source]) and not unicodedata.is_normalized("NFC", whole):
            raise OlpackError(
                f"{text}. The base's tokenizer composes characters (NFC), and llama.cpp does not.",
                "Write the rows in Unicode's composed form: unicodedata.normalize('NFC', text).",
            )
        else:
            raise OlpackError(
                f"{text}. None of its pre-tokenizers splits the rows as the base's tokenizer does.",
                "Take the tokenizer files from the model's publisher, or another base.",
            )


def _is_composed(tokenizer: PreTrainedTokenizerFast, text: str) -> bool:
    """Whether a tokenizer turns a text into Unicode's composed form before it splits it."""
    normalizer = tokenizer.backend_tokenizer.normalizer
    return normalizer is not None and normalizer.normalize_str(text) == unicodedata.normalize("NFC", text)


def run(build: Build, steps: list[Step]) -> None:
    """Merge, convert and quantize in one pass; a GGUF for each stale step. An adapter package gets quants of its base, and a LoRA GGUF.

    Where an importance matrix is to be collected first, or the sensitivity to be measured, the quants that do without make a pass of their
    own before it.
    """
    from olpack.export.client import one_worker

    for left in (build.paths.importance_source, build.paths.sensitivity_source, build.paths.rounding_source):
        left.unlink(missing_ok=True)  # of a build that was killed
    if alone := [step for step in steps if step.unit == f"export-{ADAPTER}"]:
        _export_adapter(build, alone[0])
    quants = [step for step in steps if step not in alone]
    with one_worker():
        if waiting := awaiting_importance(build, quants):
            _export_quants(build, [step for step in quants if step not in waiting])
            collect_importance_matrix(build)
            quants = waiting
        if measured_first := awaiting_sensitivity(build, quants):
            _export_quants(build, [step for step in quants if step not in measured_first])
            measure_matrix_sensitivity(build)
            quants = measured_first
        _export_quants(build, quants)
    remove(build.paths.rounded)


def _export_adapter(build: Build, step: Step) -> None:
    from olpack.export.lora import export_adapter

    path = build.paths.gguf(ADAPTER)
    with progress.task("exporting the adapter"):
        size, sha256 = export_adapter(build.base.source, build.paths.adapter, path)
    records.finish(build.paths, step, [path], {"size": size, "sha256": sha256}, {path: sha256})
    progress.say(f"wrote {path} ({progress.quantity(size, 'B')})")


def _export_quants(build: Build, steps: list[Step]) -> None:
    if not steps:
        return
    plain = [step for step in steps if not reads_rows(build, step.inputs["quant"])]
    if plain and plain != steps:  # one of them can read the rows for the others
        _export_quants(build, plain)
        steps = [step for step in steps if step not in plain]
    importance = importance_file(build) if any(uses_importance(build, step.inputs["quant"]) for step in steps) else None
    paths = {step.inputs["quant"]: build.paths.gguf(step.inputs["quant"]) for step in steps}
    files = write_quants(build, paths, importance)
    for step, path, file in zip(steps, paths.values(), files, strict=True):
        kept = ("size", "sha256", "bits_per_weight", "parameters", "types", "needs_importance", "encoder")
        records.finish(build.paths, step, [path], {name: getattr(file, name) for name in kept}, {path: file.sha256})
    made = ", ".join(f"{file.quant} {progress.quantity(file.size, 'B')}" for file in files)
    on_gpu = "" if files[0].encoder == "CPU" else f", quantized on {files[0].encoder}"
    progress.say(f"wrote {made} to {next(iter(paths.values())).parent}{on_gpu}")


def write_quants(
    build: Build, paths: Mapping[str, Path], importance: Path | None, merged: bool = False, rounding: Rounding | None = None
) -> list[ExportedFile]:
    """Write quants of the recipe, as it wants them but for the importance matrix. `paths` are by quant, and so is the order of the result.
    `merged`: with the fine-tune in them, whatever the package is. `rounding`: in place of the recipe's."""
    from olpack.export import Target, export

    options: ExportOptions = {
        "adapter": None if build.paths.base and not merged else build.paths.adapter,
        "importance": importance,
        "tensor_types": build.recipe.export.tensor_types,
        "rounding": rounding or build.recipe.export.rounding,
        "merge_base": build.recipe.train.merge_base,
        "sensitivity": build.paths.sensitivity if any(quant_type(quant).budget for quant in paths) else None,
        "requantize": build.base.gguf is not None,
        **header_options(build),
    }
    if options["rounding"] == "learned" and (reading := [quant for quant in paths if reads_rows(build, quant)]):
        options |= round_on_training_rows(build, reading, options)
    return export(build.base.source, [Target(quant, path) for quant, path in paths.items()], **options)


def header_options(build: Build) -> dict:
    """What the header of every GGUF of a build has beside the base's, as options of `export`. One that packages share names none of them."""
    from olpack.model.chat_template import pins_for, protect

    template, base = build.renderer.tokenizer.chat_template, build.paths.base
    return {
        "name": build.model_name,
        "chat_template": protect(template, pins_for(template, build.base.absent_tokens)),
        # What ends a turn is what training saw there, whatever the tokenizer calls it.
        "end_of_turn": build.renderer.end_of_turn(),
        "pre_tokenizer": build.pre_tokenizer,
        "metadata": {
            "olpack.version": __version__,
            "olpack.base": build.recipe.base,
            "olpack.base_digest": build.base.digest,
            **({} if base else {"olpack.training": train.STAGE.key(build)}),
            **({"general.license": build.base.license} if build.base.license else {}),
        },
    }


STAGE = Stage("export", 2, inputs, units=units, checked_for=frozenset({"train", "export"}), check=check, run=run, needs=("train",))
