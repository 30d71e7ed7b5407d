"""What each stage does with its inputs: the seam between the pipeline and the rooms. Each function gets the build and its stale steps."""

from __future__ import annotations

import os
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from olpack import progress
from olpack.errors import OlpackError
from olpack.quants import quant_type
from olpack.stages.build import ADAPTER
from olpack.stages.deploy import deploy as deploy
from olpack.stages.export import export as export
from olpack.stages.export import said_of_a_file, write_quants
from olpack.workspace import file_digest, template_source, value_digest, write_atomically

if TYPE_CHECKING:
    from olpack.compare import MeasureSettings, Results
    from olpack.stages.build import Build, Step

_ANSWERED = 3  # held-out requests that every quant answers where the recipe has no prompts


def train(build: Build, steps: list[Step]) -> None:
    """Fine-tune; the adapter lands in `build/NAME/adapter/`."""
    from olpack.train import train as run

    (step,) = steps
    rows, held_out = build.rows
    paths, moment = build.paths, build.renderer.moment
    dated = {"rendered_at": moment.isoformat()} if moment else {}
    if moment and "rendered_at" not in step.result:  # before training, so that one that goes on tomorrow has the same rows
        build.remember(step, {**step.result, **dated})
    result = run(build.base, rows, held_out, build.recipe.train, out=paths.adapter, checkpoint=paths.checkpoint, key=step.key)
    kept = "" if result.kept_step == result.steps else f", step {result.kept_step} kept"
    progress.say(
        f"eval loss {result.eval_loss_before:.3f} -> {result.eval_loss_after:.3f} in {result.steps} steps{kept} "
        f"({result.learned_tokens:,} target tokens, rows {'packed' if result.packed else 'one by one'}, no padding)"
    )
    if result.peak_gpu_bytes is not None and result.estimated_gpu_bytes is not None:
        progress.say(
            f"GPU memory: {progress.quantity(result.peak_gpu_bytes, 'B')} at the peak, {progress.quantity(result.estimated_gpu_bytes, 'B')} estimated"
        )
    outputs = sorted(path for path in paths.adapter.iterdir() if path.is_file())
    build.finish(step, outputs, {**asdict(result), "adapter_digest": file_digest(paths.adapter / "adapter_model.safetensors"), **dated})


def modelfiles(build: Build, steps: list[Step]) -> None:
    """Write a Modelfile for each quant, usable with `ollama create -f`."""
    from olpack.deploy.modelfile import unrepresentable

    for problem in unrepresentable(build.package):
        progress.warn(f"{problem} `olpack deploy` sends it unchanged.")
    texts = rendered_modelfiles(build)
    for path, text in texts.items():
        write_atomically(path, text)
    if build.paths.base:
        progress.say("the Modelfiles name an ADAPTER, which `ollama create` refuses from Ollama 0.34.1 on; there, `olpack deploy` registers them")
    build.finish(steps[0], list(texts), {"from": str(next(iter(texts)))})


def rendered_modelfiles(build: Build) -> dict[Path, str]:
    """The Modelfile of each quant, by its path.

    Raises:
        OlpackError: the template cannot be rendered, or Ollama would read another package from the result than the recipe describes.
    """
    from olpack.deploy.modelfile import differences, parse, render, unrepresentable

    source, texts = template_source("Modelfile.j2"), {}
    for quant in build.quants:
        path = build.paths.modelfile(quant.tag)
        gguf, adapter = (os.path.relpath(file, path.parent) for file in (build.paths.gguf(quant.name), build.paths.gguf(ADAPTER)))
        adapter = adapter if build.paths.base else None
        text = render(build.package, gguf, source, adapter)
        if not unrepresentable(build.package) and (lost := differences(parse(text), build.package, adapter)):
            raise OlpackError(f"The rendered Modelfile differs from the recipe: {'; '.join(lost)}", "Fix templates/Modelfile.j2.")
        texts[path] = text
    return texts


def compare(build: Build, steps: list[Step]) -> None:
    """Measure every quant, recommend one, write `results.json` and the report, and point `:latest` to the recommended tag."""
    from olpack.compare import measure
    from olpack.compare.outputs import write_outputs
    from olpack.deploy.client import OllamaClient
    from olpack.deploy.register import point_latest

    asked, paths, (step,) = build.recipe.compare, build.paths, steps
    settings = measure_settings(build)
    _, held_out = build.rows
    client = OllamaClient() if build.server else None
    results = measure(
        quant_files(build),
        held_out[: asked.eval_rows],
        questions(build),
        settings,
        client,
        build.recipe.name,
        cache=paths.compare / "measured",
        yardstick=_yardstick(build) if asked.reference else None,
        tasks=build.tasks,
        examples=_examples(build),
    )
    identity = _prompts_said(build) if build.server else None
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
            f"{' '.join(flag.text for flag in results.flags)} So not all that the quants are held against is known; "
            f"{again}, with `--set compare.reference=false` it does without"
        )
    if failed or results.flags or unmoved:
        build.remember(step, outcome)
        return
    build.finish(step, outputs, outcome)


def _not_compared(build: Build, results: Results) -> list[str]:
    """Quants that the server has of this package and that the comparison says nothing of: one that failed, or one that `--quant` left out."""
    compared = {quant.quant for quant in results.quants if quant.loss}
    there = [*build.step("deploy").inputs["quants"], *(quant.quant for quant in results.quants)]
    return [quant for quant in dict.fromkeys(there) if quant not in compared]


def measure_settings(build: Build) -> MeasureSettings:
    """How the recipe has its quants measured.

    Raises:
        OlpackError: its settings leave no room for a prompt in the context.
    """
    from olpack.compare import MeasureSettings

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
        suite_folder=build.suite_folder and str(build.suite_folder),
        suite_limit=asked.suite_limit,
    )


def _prompts_said(build: Build) -> str | None:
    """What the last deploy found of the prompts, with what differs in made-up conversations."""
    found = build.result("deploy")
    return " ".join([found["identity"] + ".", *found.get("identity_warnings", [])]).removesuffix(".") if "identity" in found else None


def _yardstick(build: Build):
    """The unquantized fine-tune, the untuned base at Q8_0, or at the largest quant that is made where that is none of them, and the quants that
    have an importance matrix without it."""
    from olpack.compare import Yardstick
    from olpack.export import Target
    from olpack.export import export as write_files
    from olpack.llamacpp.source import VERSION

    training, merge_base = build.result("train")["adapter_digest"], build.recipe.train.merge_base

    def write(quant: str, path: Path, adapter: Path | None) -> None:
        write_files(build.base.path, [Target(quant, path)], adapter=adapter, merge_base=merge_base, **said_of_a_file(build))

    return Yardstick(
        folder=build.paths.compare / "temporary",
        write_reference=partial(write, adapter=build.paths.adapter),
        reference_key=value_digest([build.base.digest, training, VERSION, *([merge_base] if merge_base != "original" else [])]),
        write_base=partial(write, adapter=None),
        base_key=value_digest([build.base.digest, VERSION]),
        base_quant=max(quant_files(build), key=lambda file: (file.quant == "Q8_0", file.size)).quant,
        write_unweighed=lambda quant, path: write_quants(build, {quant: path}, None),
        unweighed_keys=_unweighed_keys(build),
    )


def _unweighed_keys(build: Build) -> dict[str, str]:
    """Identity of what the quants with an importance matrix are without it, by quant. Those that cannot be made without are left out."""
    keys = {}
    for quant in build.quants:
        if build.weighs(quant.name) and not build.result(f"export-{quant.name}")["needs_importance"]:
            inputs = build.inputs("export", quant.name)
            keys[quant.name] = value_digest({name: value for name, value in inputs.items() if name != "export.importance"})
    return keys


def quant_files(build: Build) -> list:
    """The exported GGUFs as the compare room takes them."""
    from olpack.compare import QuantFile

    files = []
    for quant in build.quants:
        made = build.result(f"export-{quant.name}")
        adapter = build.paths.gguf(ADAPTER) if build.paths.base else None
        size = made["size"] + (build.result(f"export-{ADAPTER}")["size"] if adapter else 0)
        types = made["types"] if quant.budget else {}
        files.append(
            QuantFile(
                quant.name, quant.tag, build.paths.gguf(quant.name), size, made["bits_per_weight"], made["sha256"], adapter, types, made["types"]
            )
        )
    return files


def registrable(build: Build) -> list:
    """The exported GGUFs as the deploy room takes them."""
    from olpack.deploy.register import TagFile

    return [TagFile(file.tag, file.path, file.sha256, file.adapter) for file in quant_files(build)]


def registered(build: Build) -> list:
    """What the last deploy put on the server."""
    from olpack.deploy.register import Registered

    return [Registered(**record) for record in build.result("deploy").get("registered", [])]


def questions(build: Build) -> list[list[dict]]:
    """Conversations that every quant answers: the recipe's prompts under its system prompt, or the first held-out requests as they are."""
    if not build.recipe.compare.prompts:
        return held_out_requests(build)[:_ANSWERED]
    system = [{"role": "system", "content": build.recipe.modelfile.system}] if build.recipe.modelfile.system else []
    return [[*system, {"role": "user", "content": prompt}] for prompt in build.recipe.compare.prompts]


def held_out_requests(build: Build) -> list[list[dict]]:
    """What the held-out chats open with, up to the first answer; those that open otherwise are left out."""
    from olpack.data import request_of

    return [request for chat in build.chats[1] if (request := request_of(chat.messages))]


def _examples(build: Build) -> list[tuple[str, str]]:
    """(request, answer) of the held-out chats: the first of each that opens with a request. One that calls a tool is no answer in words."""
    from olpack.data import request_of

    chats = [(chat.messages, request) for chat in build.chats[1] if (request := request_of(chat.messages))]
    examples = [(request[-1]["content"], messages[len(request)]["content"]) for messages, request in chats]
    return [(asked, answer) for asked, answer in examples if answer]


def recommended(build: Build) -> str:
    """The tag to run: what the comparison recommends, or the first quant's."""
    return build.result("compare").get("recommended") or quant_type(build.recipe.quants[0]).tag
