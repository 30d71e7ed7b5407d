"""What each stage does with its inputs: the seam between the pipeline and the rooms. Each function gets the build and its stale steps."""

from __future__ import annotations

import os
import random
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING

from olpack import __version__, progress
from olpack.errors import OlpackError
from olpack.pipeline import ADAPTER, IMPORTANCE_TOKENS, SENSITIVITY_TOKENS
from olpack.quants import quant_type
from olpack.workspace import file_digest, template_source, value_digest, write_atomically

if TYPE_CHECKING:
    from olpack.data import TokenRow
    from olpack.pipeline import Build, Step

_ANSWERED = 3  # held-out requests that every quant answers where the recipe has no prompts


def train(build: Build, steps: list[Step]) -> None:
    """Fine-tune; the adapter lands in `build/NAME/adapter/`."""
    from olpack.train import train as run

    (step,) = steps
    rows, held_out = build.rows
    paths = build.paths
    result = run(build.base, rows, held_out, build.recipe.train, out=paths.adapter, checkpoint=paths.checkpoint, key=step.key)
    progress.say(f"eval loss {result.eval_loss_before:.3f} -> {result.eval_loss_after:.3f} in {result.steps} steps "
                 f"({result.learned_tokens:,} learned tokens, {result.padding_share:.0%} padding)")
    outputs = sorted(path for path in paths.adapter.iterdir() if path.is_file())
    build.finish(step, outputs, {**asdict(result), "adapter_digest": file_digest(paths.adapter / "adapter_model.safetensors")})


def export(build: Build, steps: list[Step]) -> None:
    """Merge, convert and quantize in one pass; a GGUF for each stale step. An adapter package gets quants of its base, and a LoRA GGUF.

    Where an importance matrix is to be collected first, or the sensitivity to be measured, the quants that do without make a pass of their
    own before it.
    """
    for left in (build.paths.importance_source, build.paths.sensitivity_source):
        left.unlink(missing_ok=True)  # of a build that was killed
    if alone := [step for step in steps if step.unit == f"export-{ADAPTER}"]:
        _export_adapter(build, alone[0])
    quants = [step for step in steps if step not in alone]
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
    from olpack.export import Target, export

    if not steps:
        return
    paths = {step.unit: build.paths.gguf(step.inputs["quant"]) for step in steps}
    targets = [Target(step.inputs["quant"], paths[step.unit]) for step in steps]
    adapter = None if build.paths.base else build.paths.adapter
    importance = build.importance_file if any(build.weighs(step.inputs["quant"]) for step in steps) else None
    sensitivity = build.paths.sensitivity if any(quant_type(step.inputs["quant"]).budget for step in steps) else None
    files = export(build.base.path, targets, adapter=adapter, importance=importance, tensor_types=build.recipe.export.tensor_types,
                   sensitivity=sensitivity, merge_base=build.recipe.train.merge_base, **_said_of_a_file(build))
    for step, file in zip(steps, files, strict=True):
        figures = {"size": file.size, "sha256": file.sha256, "bits_per_weight": file.bits_per_weight, "parameters": file.parameters}
        build.finish(step, [paths[step.unit]], figures, {paths[step.unit]: file.sha256})
    made = ", ".join(f"{file.quant} {progress.quantity(file.size, 'B')}" for file in files)
    progress.say(f"wrote {made} to {next(iter(paths.values())).parent}")


def _said_of_a_file(build: Build) -> dict:
    """What every GGUF of a build says beside its weights, as arguments of `export`. One that packages share says nothing of either."""
    from olpack.deploy.chat_template import pins_for, protect

    template, base = build.renderer.tokenizer.chat_template, build.paths.base
    return {
        "name": build.model_name,
        "chat_template": protect(template, pins_for(template, {})),
        # What ends a turn is what training saw there, whatever the tokenizer calls it.
        "end_of_turn": build.renderer.end_of_turn(build.rows[0][0]),
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
        collect_importance(source, [row.ids for row in rows], build.paths.importance, dataset=build.recipe.data.train)
    finally:
        build.paths.importance_source.unlink(missing_ok=True)
    tokens = sum(len(row.ids) for row in rows)
    build.finish(step, [build.paths.importance], {"rows": len(rows), "tokens": tokens})
    progress.say(f"collected the importance matrix on {tokens:,} tokens of {len(rows):,} training rows")


def _measure_sensitivity(build: Build) -> None:
    """Round one matrix of the unquantized fine-tune after the other and read training rows: a 16-bit file is there for this only."""
    from olpack.compare.yardstick import REFERENCE_QUANTS
    from olpack.export import Target, export, measure_sensitivity

    paths, step = build.paths, build.step("sensitivity")
    rows = _sample(build.rows[0], SENSITIVITY_TOKENS, lambda row: row.learned_count)
    try:
        for quant in REFERENCE_QUANTS:
            export(build.base.path, [Target(quant, paths.sensitivity_source)], adapter=paths.adapter, merge_base=build.recipe.train.merge_base)
            if measure_sensitivity(paths.sensitivity_source, [row.ids for row in rows], [row.learned for row in rows], paths.sensitivity,
                                   key=value_digest([step.key, quant]), importance=build.importance_file):
                break
        else:
            raise OlpackError("The unquantized fine-tune's probabilities are no numbers.", "Train again with a lower learning rate.")
    finally:
        paths.sensitivity_source.unlink(missing_ok=True)
    answers = sum(row.learned_count for row in rows)
    build.finish(step, [paths.sensitivity], {"rows": len(rows), "learned_tokens": answers})
    progress.say(f"measured what each matrix loses on {answers:,} answer tokens of {len(rows):,} training rows")


def _sample(rows: list[TokenRow], tokens: int, count: Callable[[TokenRow], int] = lambda row: len(row.ids)) -> list[TokenRow]:
    """Rows drawn from all over the data, the same ones each time, with at most so many tokens as `count` counts them (but one row at least)."""
    drawn = random.Random(0).sample(rows, len(rows))
    ends = list(accumulate(map(count, drawn)))
    return drawn[: max(1, bisect_right(ends, tokens))]


def modelfiles(build: Build, steps: list[Step]) -> None:
    """Render a Modelfile for each quant, usable with `ollama create -f`."""
    from olpack.deploy.modelfile import differences, parse, render, unrepresentable

    source, outputs = template_source("Modelfile.j2"), []
    for problem in unrepresentable(build.package):
        progress.warn(f"{problem} `olpack deploy` sends it unchanged.")
    for quant in build.quants:
        path = build.paths.modelfile(quant.tag)
        gguf, adapter = (os.path.relpath(file, path.parent) for file in (build.paths.gguf(quant.name), build.paths.gguf(ADAPTER)))
        adapter = adapter if build.paths.base else None
        text = render(build.package, gguf, source, adapter)
        if not unrepresentable(build.package) and (lost := differences(parse(text), build.package, adapter)):
            raise OlpackError(f"The rendered Modelfile does not say what the recipe does: {'; '.join(lost)}", "Mend templates/Modelfile.j2.")
        write_atomically(path, text)
        outputs.append(path)
    build.finish(steps[0], outputs, {"from": str(outputs[0])})


def deploy(build: Build, steps: list[Step]) -> None:
    """Register every quant with the server, prove that the prompt is the trained one, and have each tag answer once."""
    from olpack.deploy.client import OllamaClient
    from olpack.deploy.identity import check_identity
    from olpack.deploy.register import register
    from olpack.deploy.smoke import smoke

    client, (step,) = OllamaClient(), steps
    client.require()
    records, known = [], registered(build)
    for file in registrable(build):
        records += register(client, build.recipe.name, [file], build.package, before=known)
        # Written down after each tag: what is on the server must be known, to be removed or left alone, should the next one fail.
        known = [record for record in known if record.model != records[-1].model] + records[-1:]
        build.remember(step, {"registered": [asdict(record) for record in known]})
    conversations = questions(build)
    identity = check_identity(client, records[0].model, build.renderer.tokenizer, conversations)
    identity.require()
    progress.say(identity.summary())
    for record in records:
        answered = smoke(client, record.model, conversations[0])
        if not answered.stopped:
            progress.warn(f"{record.model} was cut after {answered.tokens} tokens: it may not know when to stop")
    build.finish(step, [], {"registered": [asdict(record) for record in known], "identity": identity.summary()})


def compare(build: Build, steps: list[Step]) -> None:
    """Measure every quant, recommend one, write `results.json` and the report, and point `:latest` to the recommended tag."""
    from olpack.compare import MeasureSettings, measure
    from olpack.compare.outputs import write_outputs
    from olpack.deploy.client import OllamaClient
    from olpack.deploy.register import point_latest

    asked, paths, (step,) = build.recipe.compare, build.paths, steps
    settings = MeasureSettings(prompt_lengths=tuple(asked.prompt_tokens), generated_tokens=asked.generated_tokens, repeats=asked.repeats,
                               clients=tuple(asked.clients), context=build.package.parameters["num_ctx"], tolerance=asked.max_loss,
                               suites=tuple(asked.suites), suite_folder=build.suite_folder and str(build.suite_folder), suite_limit=asked.suite_limit)
    _, held_out = build.rows
    client = OllamaClient() if build.server else None
    results = measure(quant_files(build), held_out[: asked.eval_rows], questions(build), settings, client, build.recipe.name,
                      cache=paths.compare / "measured", yardstick=_yardstick(build) if asked.reference else None, tasks=build.tasks,
                      examples=_examples(build))
    identity = build.result("deploy").get("identity") if build.server else None
    outputs = write_outputs(results, paths.compare, template_source("report.html.j2"), paths.adapter / "metrics.jsonl", identity)
    best = results.recommendation
    if client and best:
        point_latest(client, build.recipe.name, best.tag)
    outcome, again = {"recommended": best.tag if best else None}, f"`olpack compare {build.recipe.name}` tries again and keeps what was measured"
    if failed := [quant.quant for quant in results.quants if any(flag.code == "failed" for flag in quant.flags)]:
        progress.warn(f"{', '.join(failed)} could not be measured; {again}")
    if results.flags:
        progress.warn(f"{' '.join(flag.text for flag in results.flags)} So what the quants lost against the unquantized fine-tune is not known; "
                      f"{again}, with `--set compare.reference=false` it does without")
    if failed or results.flags:
        build.remember(step, outcome)
        return
    build.finish(step, outputs, outcome)


def _yardstick(build: Build):
    """The unquantized fine-tune, and the untuned base at Q8_0, or at the largest quant that is made where that is none of them."""
    from olpack.compare import Yardstick
    from olpack.export import Target, export

    training, version = build.result("train")["adapter_digest"], build.inputs("export")["llama.cpp"]
    merge_base = build.recipe.train.merge_base

    def write(quant: str, path: Path, adapter: Path | None) -> None:
        export(build.base.path, [Target(quant, path)], adapter=adapter, merge_base=merge_base, **_said_of_a_file(build))

    return Yardstick(
        folder=build.paths.compare / "temporary",
        write_reference=partial(write, adapter=build.paths.adapter),
        reference_key=value_digest([build.base.digest, training, version] + ([merge_base] if merge_base != "original" else [])),
        write_base=partial(write, adapter=None),
        base_key=value_digest([build.base.digest, version]),
        base_quant=max(quant_files(build), key=lambda file: (file.quant == "Q8_0", file.size)).quant,
    )


def quant_files(build: Build) -> list:
    """The exported GGUFs as the compare room takes them."""
    from olpack.compare.measure import QuantFile

    files = []
    for quant in build.quants:
        made = build.result(f"export-{quant.name}")
        adapter = build.paths.gguf(ADAPTER) if build.paths.base else None
        size = made["size"] + (build.result(f"export-{ADAPTER}")["size"] if adapter else 0)
        files.append(QuantFile(quant.name, quant.tag, build.paths.gguf(quant.name), size, made["bits_per_weight"], made["sha256"], adapter))
    return files


def registrable(build: Build) -> list:
    """The exported GGUFs as the deploy room takes them."""
    from olpack.deploy.register import QuantFile

    return [QuantFile(file.tag, file.path, file.sha256, file.adapter) for file in quant_files(build)]


def registered(build: Build) -> list:
    """What the last deploy put on the server."""
    from olpack.deploy.register import Registered

    return [Registered(**record) for record in build.result("deploy").get("registered", [])]


def questions(build: Build) -> list[list[dict]]:
    """Conversations that every quant answers: the recipe's prompts under its system prompt, or the first held-out requests as they are."""
    if not build.recipe.compare.prompts:
        from olpack.data.chats import request_of

        return [request for chat in _held_out(build) if (request := request_of(chat.messages))][:_ANSWERED]
    system = [{"role": "system", "content": build.recipe.modelfile.system}] if build.recipe.modelfile.system else []
    return [[*system, {"role": "user", "content": prompt}] for prompt in build.recipe.compare.prompts]


def _examples(build: Build) -> list[tuple[str, str]]:
    """(request, answer) of the held-out chats: the first of each that opens with a request."""
    from olpack.data.chats import request_of

    chats = [(chat.messages, request) for chat in _held_out(build) if (request := request_of(chat.messages))]
    return [(request[-1]["content"], messages[len(request)]["content"]) for messages, request in chats]


def _held_out(build: Build) -> list:
    from olpack.data import load_chats, split

    path = build.data_file("eval")
    return load_chats(path) if path else split(load_chats(build.data_file("train")), build.recipe.data.eval_share)[1]


def recommended(build: Build) -> str:
    """The tag to run: what the comparison recommends, or the first quant's."""
    return build.result("compare").get("recommended") or quant_type(build.recipe.quants[0]).tag
