"""The compare stage: every quant measured, one recommended, results and report written."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from olpack import progress
from olpack.deploy.names import same
from olpack.errors import OlpackError
from olpack.recipe.tasks import check_consent, function_files, task_files
from olpack.stages import deploy, export, records
from olpack.stages.build import Build
from olpack.stages.calibration import importance_file, uses_importance
from olpack.stages.export import ADAPTER, header_options, write_quants
from olpack.stages.prompts import check_questions, examples, questions
from olpack.stages.records import Record, Step
from olpack.stages.stage import Checks, Stage
from olpack.workspace import file_digest, template_source, value_digest

if TYPE_CHECKING:
    from olpack.compare.reference_models import MergedModels, ReferenceModels
    from olpack.compare.results import Results
    from olpack.compare.settings import ComparedFile, MeasureSettings
    from olpack.data.rows import TokenRow
    from olpack.deploy.client import OllamaClient

_BUILTIN = "builtin"  # text of olpack's own
_OF_THE_SPEED = ("num_ctx", "num_batch", "num_gpu", "num_thread", "use_mmap")


def inputs(build: Build, unit: str) -> dict[str, Any]:
    """Files, held-out rows, settings, tasks with the files of their checks, and the report's template."""
    asked: dict[str, Any] = {name: build.package.parameters.get(name) for name in _OF_THE_SPEED} | {"modelfile.system": build.recipe.modelfile.system}
    if build.tasks:
        asked["compare.tasks"] = value_digest(
            [[task.messages, task.check, [str(part) for part in task.expected], *([task.tools] if task.tools else [])] for task in build.tasks]
        )
        asked |= {str(path): file_digest(path) for path in function_files(build.tasks)}
    if build.recipe.compare.suites and build.suite_folder:
        asked |= {str(path): file_digest(path) for path in task_files(build.suite_folder)}
    template = {"templates/report.html.j2": template_source("report.html.j2")}
    settings = build.settings("compare")
    del settings["compare.run_answers"]  # consent changes no figure
    if build.recipe.compare.ggml_rounding == "rows":  # as before there was a choice
        del settings["compare.ggml_rounding"]
    if build.recipe.compare.other_text == _BUILTIN:
        del settings["compare.other_text"]
    elif path := _other_file(build):
        settings["compare.other_text"] = file_digest(path) if path.is_file() else None
    if not build.recipe.compare.merged:
        del settings["compare.merged"]  # which earlier versions did not have
    return deploy.exported_files(build) | build.data_inputs("eval") | settings | asked | template


def stale(build: Build, unit: str, inputs: dict[str, Any], record: Record) -> str:
    """Why a finished comparison must run again. Figures taken through a server stay while it is down."""
    served = record.result.get("served", bool(record.inputs.get("server")))
    before = {name: value for name, value in record.inputs.items() if name != "server"}  # earlier versions recorded the server's address
    reason = records.changed(inputs, before) or records.damage(build.paths, unit, record)
    return reason or ("speed was measured without the server that answers now" if build.server and not served else "")


def check_answers_may_run(build: Build) -> None:
    """Refuse tasks that run code without the recipe's consent. It reads the tasks alone, so it comes before every other check."""
    if not build.recipe.compare.run_answers:
        check_consent(
            build.tasks,
            f"{build.recipe.folder / 'recipe.yaml'}: compare.tasks",
            "Add `run_answers: true` below `compare:`, or --set compare.run_answers=true, to allow it; `olpack doctor` reports the sandbox.",
        )


def check(build: Build, checks: Checks) -> None:
    """Refuse prompts, settings, tasks, suites and a report's template with which a measurement would fail."""
    from olpack.compare.report import check_template
    from olpack.compare.scores import load_function

    check_questions(build)
    measure_settings(build)
    _other_rows(build)
    if build.recipe.compare.merged:
        _check_merged(build)
    check_template(template_source("report.html.j2"))
    for task in {task.expected: task for task in build.tasks if task.check == "function"}.values():
        load_function(task)
    if build.recipe.compare.suites:
        from olpack.compare.harness import check_suites  # which not every installation has

        check_suites(build.recipe.compare.suites, build.suite_folder)


def _check_merged(build: Build) -> None:
    """Refuse the type of a GGUF that is served as it is, where no merged file can have it."""
    from olpack.export import check_export

    if build.paths.served is None:
        return  # the export checks the quants
    try:
        check_export(build.base.source, [quant.name for quant in build.quants], requantize=True, **header_options(build))
    except OlpackError as error:
        raise OlpackError(
            f"No merged file can have the type of {build.base.label}, {build.quants[0].name}: {error.problem}", "Leave `compare.merged` out."
        ) from None


def run(build: Build, steps: list[Step]) -> None:
    """Measure every quant, recommend one, write results and report, and point `:latest` to the recommended tag."""
    from olpack.compare.measure import measure
    from olpack.compare.report import write_outputs
    from olpack.deploy.client import OllamaClient
    from olpack.deploy.register import point_latest

    asked, paths, (step,) = build.recipe.compare, build.paths, steps
    settings = measure_settings(build)
    _, held_out = build.rows
    client = OllamaClient() if build.server else None
    results = measure(
        [replace(file, alone=_tag_of_base(build, client)) for file in quant_files(build)],
        held_out[: asked.eval_rows],
        questions(build),
        settings,
        client,
        build.recipe.name,
        cache=paths.compare / "measured",
        references=_reference_models(build) if asked.reference else None,
        tasks=build.tasks,
        examples=examples(build),
        other=_other_rows(build),
        merged=_merged_models(build) if asked.merged else None,
    )
    identity = _prompt_identity(build) if build.server else None
    outputs = write_outputs(results, paths.compare, template_source("report.html.j2"), paths.adapter / "metrics.jsonl", identity)
    best, unmoved = results.recommendation, False
    if client and best:
        try:
            if left_out := _not_compared(build, results):
                progress.warn(f"{build.recipe.name}:latest stays what it was: {', '.join(left_out)} could not be compared.")
            else:
                point_latest(client, build.recipe.name, best.tag)
        except OlpackError as error:  # what was measured is worth showing all the same
            unmoved = True
            progress.warn(f"{build.recipe.name}:latest stays what it was: {error}")
    outcome = {"recommended": best.tag if best else None, "served": client is not None}
    again = f"`olpack compare {build.recipe.name}` tries again and keeps what was measured"
    if failed := [quant.quant for quant in results.quants if any(flag.code == "failed" for flag in quant.flags)]:
        progress.warn(f"some figures of {', '.join(failed)} could not be measured; {again}")
    if results.flags:
        progress.warn(
            f"{' '.join(flag.text for flag in results.flags)} So the quants are compared with a part of the references only; "
            f"{again}, with `--set compare.reference=false` it does without"
        )
    if failed or results.flags or unmoved:
        records.remember(build.paths, step, outcome)
        return
    records.finish(build.paths, step, outputs, outcome)


def _not_compared(build: Build, results: Results) -> list[str]:
    """Quants that the server has of this package and that were not compared: one that failed, or one that `--quant` left out."""
    compared = {quant.quant for quant in results.quants if quant.loss}
    deployed = records.read(build.paths, "deploy")
    there = [*(deployed.inputs.get("quants", []) if deployed else []), *(quant.quant for quant in results.quants)]
    return [quant for quant in dict.fromkeys(there) if quant not in compared]


def measure_settings(build: Build) -> MeasureSettings:
    """How the recipe has its quants measured.

    Raises:
        OlpackError: its settings leave no tokens of the context for a prompt.
    """
    from olpack.compare.settings import MeasureSettings

    asked = build.recipe.compare
    return MeasureSettings(
        prompt_lengths=tuple(asked.prompt_tokens),
        generated_tokens=asked.generated_tokens,
        repeats=asked.repeats,
        answer_tokens=asked.answer_tokens,
        clients=tuple(asked.clients),
        context=build.package.num_ctx,
        tolerance=asked.max_loss,
        suites=tuple(asked.suites),
        suite_folder=str(build.suite_folder) if build.suite_folder else None,
        suite_limit=asked.suite_limit,
        load={name: value for name in _OF_THE_SPEED if name != "num_ctx" and (value := build.package.parameters.get(name)) is not None},
        template=build.renderer.tokenizer.chat_template if build.base.template else None,
    )


def _other_file(build: Build) -> Path | None:
    """The file with text outside the user's domain, which may not be there; None where the recipe names none."""
    asked = build.recipe.compare.other_text
    return None if asked in (_BUILTIN, "none") else build.recipe.folder / asked


def _other_rows(build: Build) -> list[TokenRow]:
    """The rows outside the user's domain, as the model reads plain text.

    Raises:
        OlpackError: the recipe names a file that cannot be read, or has no text.
    """
    from olpack.compare.other_text import OTHER_TEXTS, other_rows, read_texts

    if build.recipe.compare.other_text == "none" or not build.recipe.compare.reference:
        return []
    path = _other_file(build)
    texts = read_texts(path) if path else OTHER_TEXTS
    context = min(build.package.num_ctx, build.base.context_length)
    return other_rows(texts, path.name if path else _BUILTIN, build.renderer, context, build.meta_model.shape.vocabulary)


def _tag_of_base(build: Build, client: OllamaClient | None) -> str | None:
    """The server's model of the file that an adapter is served on, None where it has none."""
    if client is None or not build.paths.served or not build.base.tag:
        return None
    return next((tag.model for tag in client.tags() if same(tag.model, build.base.tag)), None)


def _prompt_identity(build: Build) -> str | None:
    """The summary of the prompts that the last deploy compared, with what differs in made-up conversations."""
    deployed = records.result(build.paths, "deploy")
    if "identity" not in deployed:
        return None
    return " ".join([deployed["identity"] + ".", *deployed.get("identity_warnings", [])]).removesuffix(".")


def _reference_models(build: Build) -> ReferenceModels:
    """The unquantized fine-tune, the untuned base at Q8_0, or at the largest quant that is made where that is none of them, and the quants that
    have an importance matrix without it."""
    from olpack.compare.reference_models import ReferenceModels
    from olpack.export import Target
    from olpack.export import export as write_files
    from olpack.llamacpp.source import VERSION

    training, merge_base = records.result(build.paths, "train")["adapter_digest"], build.recipe.train.merge_base

    def write(quant: str, path: Path, adapter: Path | None) -> None:
        if build.paths.served and adapter is None:  # the base is that file, and no quant of it
            path.symlink_to(build.paths.served.resolve())
            return
        write_files(
            build.base.source,
            [Target(quant, path)],
            adapter=adapter,
            merge_base=merge_base,
            requantize=build.base.gguf is not None,
            **header_options(build),
        )

    return ReferenceModels(
        folder=build.paths.temporary,
        write_reference=partial(write, adapter=build.paths.adapter),
        reference_key=value_digest([build.base.digest, training, VERSION, *([merge_base] if merge_base != "original" else [])]),
        write_base=partial(write, adapter=None),
        base_key=value_digest([build.base.digest, VERSION]),
        base_quant=max(quant_files(build), key=lambda file: (file.quant == "Q8_0", file.size)).quant,
        write_without_importance=lambda quant, path: write_quants(build, {quant: path}, None),
        without_importance_keys=_without_importance_keys(build),
        write_by_ggml=partial(_write_by_ggml, build),
        ggml_keys=by_ggml_keys(build),
        ggml_tasks=build.recipe.compare.ggml_rounding == "tasks",
        rounding=build.recipe.export.rounding,
    )


def _write_by_ggml(build: Build, quant: str, path: Path) -> None:
    """A quant of the recipe by ggml's rounding. A budget keeps its types: the sensitivity decides them, and it stays what it is."""
    write_quants(build, {quant: path}, importance_file(build) if uses_importance(build, quant) else None, rounding="ggml")


def by_ggml_keys(build: Build) -> dict[str, str]:
    """Identity of what the quants with another rounding than ggml's are with it, by quant."""
    if build.recipe.compare.ggml_rounding == "none":
        return {}
    inputs = {quant.name: export.STAGE.all_inputs(build, f"export-{quant.name}") for quant in build.quants}
    other = {quant: own for quant, own in inputs.items() if "export.rounding" in own}
    dropped = ("export.rounding", "rounding on rows", "export.scale_steps", "trained block scales")
    return {quant: value_digest({name: value for name, value in own.items() if name not in dropped}) for quant, own in other.items()}


def _merged_models(build: Build) -> MergedModels:
    """The fine-tune in the quants of the package, as `package: merged` makes them."""
    from olpack.compare.reference_models import MergedModels
    from olpack.llamacpp.source import VERSION

    made = [build.base.digest, records.result(build.paths, "train")["adapter_digest"], VERSION, build.recipe.train.merge_base]
    return MergedModels(
        folder=build.paths.temporary,
        write=lambda quant, path: write_quants(build, {quant: path}, None, merged=True),
        keys={quant.name: value_digest([*made, quant.name]) for quant in build.quants},
    )


def _without_importance_keys(build: Build) -> dict[str, str]:
    """Identity of what the quants with an importance matrix are without it, by quant. Those that cannot be made without are left out."""
    keys = {}
    if build.recipe.export.rounding == "learned":  # which weighs errors by the rows itself
        return {}
    for quant in build.quants:
        if uses_importance(build, quant.name) and not export.quant_facts(build, quant.name)["needs_importance"]:
            inputs = export.STAGE.all_inputs(build, f"export-{quant.name}")
            keys[quant.name] = value_digest({name: value for name, value in inputs.items() if name != "export.importance"})
    return keys


def quant_files(build: Build) -> list[ComparedFile]:
    """The exported GGUFs as they are compared."""
    from olpack.compare.settings import ComparedFile

    files = []
    for quant in build.quants:
        made = export.quant_facts(build, quant.name)
        adapter = build.paths.gguf(ADAPTER) if build.paths.base else None
        size = made["size"] + (records.result(build.paths, f"export-{ADAPTER}")["size"] if adapter else 0)
        types = made["types"] if quant.budget else {}
        files.append(
            ComparedFile(
                quant.name, quant.tag, build.paths.gguf(quant.name), size, made["bits_per_weight"], made["sha256"], adapter, types, made["types"]
            )
        )
    return files


def temporary_bytes(build: Build, parameters: int) -> int:
    """Most that the comparison's temporary files take at once, norms and vocabulary of the unquantized fine-tune left out.

    The other files that are there for a while, one after the other and after this one, are smaller: quants without their importance matrix.
    """
    from olpack.compare.settings import LOGITS_BYTES, OTHER_LOGITS_BYTES

    if not build.recipe.compare.reference:
        return 2 * parameters if build.recipe.compare.merged else 0  # at most
    vocabulary = build.meta_model.shape.vocabulary
    positions = sum(row.target_count for row in build.rows[1][: build.recipe.compare.eval_rows])
    others = sum(row.target_count for row in _other_rows(build))
    return 2 * parameters + min(LOGITS_BYTES, 4 * vocabulary * positions) + min(OTHER_LOGITS_BYTES, 4 * vocabulary * others)


def sandboxed(build: Build) -> str:
    """What the sandbox of the models' answers stops on this machine, and what it does not; "" where no answer runs."""
    from olpack.compare.sandbox import described, protections

    if not any(task.check == "python_asserts" for task in build.tasks):
        return ""
    stopped, open_to_them = described(protections())
    return f"their Python runs in a sandbox: {stopped}" + (f". But {open_to_them}" if open_to_them else "")


def recommended(build: Build) -> str:
    """The tag to run: the one that the comparison recommends, or the first quant's."""
    return records.result(build.paths, "compare").get("recommended") or build.quants[0].tag


STAGE = Stage(
    "compare",
    1,
    inputs,
    stale,
    units=lambda build: ["compare"],
    checked_for=frozenset({"compare"}),
    check=check,
    run=run,
    needs=("train", "export", "deploy"),
)
