"""What will happen, and all that would fail, before anything is done.

`check` runs at the start of every build; `olpack plan` shows what it found, every setting with its origin, sizes and an estimate of the time.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from typing import TYPE_CHECKING

from olpack import progress
from olpack.deploy import advertised, context_warnings
from olpack.errors import OlpackError
from olpack.stages.build import ADAPTER
from olpack.workspace import free_bytes, template_source, write_atomically

if TYPE_CHECKING:
    import torch
    from rich.table import Table

    from olpack.data import TokenRow
    from olpack.export import ExportPlan, TokenDifference, TokenText
    from olpack.stages.build import Build, Step
    from olpack.train.planner import Fit

_CHECKPOINTS = 9  # the adapter; two checkpoints, the one being replaced and the new one, each with adapter, best adapter and two moments


@dataclass(frozen=True)
class Estimate:
    """What a build needs, as far as it can be told before it runs.

    Attributes:
        parameters: weights of the base.
        train_rows, eval_rows, train_tokens, learned_tokens: of one pass over the data.
        steps: optimizer steps.
        adapter_parameters: weights of the adapter.
        device: where it trains.
        train_seconds: from a matrix product timed here, at half its rate; None on a GPU.
        fit: what training takes of a GPU's memory and how it uses it.
        weights_bytes: the frozen base in memory.
        held: what it is held in: "nf4", or how it comes ("gptq").
        adapter_bytes: adapter, its gradients and optimizer state.
        disk_bytes: of each GGUF, exact, by quant; of a budget, about what it allows.
        temporary_bytes: what the comparison takes for as long as it runs: the unquantized fine-tune, and its logits.
        importance_bytes: of a Q8_0 file that is there for as long as the importance matrix is collected on it.
        sensitivity_bytes: of an F16 file that is there for as long as the sensitivity is measured on it.
        warnings: what a user should know and need not mend.
    """

    parameters: int
    train_rows: int
    eval_rows: int
    train_tokens: int
    learned_tokens: int
    steps: int
    adapter_parameters: int
    device: str
    train_seconds: float | None
    fit: Fit
    weights_bytes: int
    held: str
    adapter_bytes: int
    disk_bytes: dict[str, int]
    temporary_bytes: int
    importance_bytes: int
    sensitivity_bytes: int
    warnings: list[str] = field(default_factory=list)


def check(build: Build, stale: list[Step]) -> ExportPlan | None:
    """Refuse now what would fail later. Reads headers, the tokenizer and every row; writes nothing in the build.

    Args:
        build: what is asked for.
        stale: the steps that will be done. What is already done is not checked again.

    Raises:
        OlpackError: the first thing that stands in the way, with its remedy.
    """
    from olpack.stages.work import measure_settings, questions

    stages = {step.stage for step in stale}
    exported = None
    if stages & {"export", "deploy", "compare"}:
        from olpack.llamacpp.probe import check_library

        check_library()
    if stages & {"train", "export"}:
        from olpack.export import check_export
        from olpack.stages.export import said_of_a_file

        quants = [step.inputs["quant"] for step in stale if step.stage == "export" and step.unit != f"export-{ADAPTER}"] or build.recipe.quants
        importance = build.importance_file
        exported = check_export(
            build.base.path,
            quants + _for_a_while(build, stale),
            out=build.paths.gguf(quants[0]).parent,
            importance="later" if importance == build.paths.importance else importance,
            tensor_types=build.recipe.export.tensor_types,
            texts=_texts(build),
            **said_of_a_file(build),
        )
        for warning in exported.warnings:
            progress.warn(warning)
        _judge_tokens(build, exported.differences)
    if stages & {"train", "export", "compare"}:
        rows, _ = build.rows
        if build.renderer.end_of_turn() is None and "stop" not in build.package.parameters:
            raise OlpackError(
                "The base's chat template ends an assistant's turn with no special token, so served answers would never stop.",
                "Set `modelfile.parameters.stop` to the text that ends a turn.",
            )
    if stages & {"deploy", "compare"} and not questions(build):
        raise OlpackError("No held-out row opens with a request, so there is nothing to ask the quants.", "Give them prompts as `compare.prompts`.")
    if stages & {"train", "modelfiles", "deploy", "compare"}:
        _check_served(build)
    if "modelfiles" in stages:
        from olpack.stages.work import rendered_modelfiles

        rendered_modelfiles(build)
    if "compare" in stages:
        from olpack.compare.report import check_template

        measure_settings(build)
        check_template(template_source("report.html.j2"))
    if "compare" in stages and (own := {task.expected: task for task in build.tasks if task.check == "function"}):
        from olpack.compare.scores import load_function

        for task in own.values():
            load_function(task)
    if "compare" in stages and build.recipe.compare.suites:
        from olpack.compare.harness import check_suites

        check_suites(build.recipe.compare.suites, build.suite_folder)
    if "train" in stages:
        from olpack.train.adapter import experts_left_out
        from olpack.train.checks import check_training
        from olpack.train.launch import launcher
        from olpack.train.metrics import check_trackers
        from olpack.train.model import pick_device
        from olpack.train.untrained import untrained_tokens

        if build.base.leftover_quantization:
            progress.warn(
                f"config.json of {build.base.label} says that the weights are quantized by bitsandbytes, and none of them is: they are taken "
                "as they are."
            )
        check_training(build.base, build.recipe.train, on_gpu=pick_device().type == "cuda")
        if left_out := experts_left_out(build.base, build.recipe.train):
            progress.warn(left_out)
        if build.meta_model.carries_state:
            progress.warn(
                f"Layers of {build.base.label} carry a state from token to token (convolution, recurrence). Training tries whether it "
                "passes from one packed row to the next; where it does, they are trained one by one."
            )
        if untrained := untrained_tokens(build.base, build.recipe.train, build.renderer.tokenizer, rows, build.recipe.package):
            progress.warn(untrained)
        launcher(build.recipe.train)
        check_trackers(build.recipe.train.trackers)
        need = _adapter_parameters(build) * 4 * _CHECKPOINTS + (sum(exported.sizes.values()) if exported else 0)
        if (free := free_bytes(build.paths.root)) < need:
            raise OlpackError(
                f"{build.paths.root} needs {progress.quantity(need, 'B')} of space, and {progress.quantity(free, 'B')} are free.",
                "Free some, choose another disk with --out, or make fewer quants.",
            )
        if "compare" in stages and exported and free < need + (temporary := _temporary_bytes(build, exported.parameters)):
            progress.warn(
                f"The comparison needs {progress.quantity(need + temporary - free, 'B')} more space than is free, for the unquantized "
                "fine-tune, while it runs. Free them by then, or it leaves out what the quants lost against it."
            )
        longest = max(len(row.ids) for row in rows)
        for warning in context_warnings(build.package.num_ctx, trained=longest, longest=build.base.context_length):
            progress.warn(warning)
        if build.paths.base:
            from olpack.export.lora import check_adapter
            from olpack.train.memory import adapter_shapes

            check_adapter(build.base.path, adapter_shapes(build.meta_model, build.recipe.train.target_modules))
    if stages & {"train", "deploy"}:
        from olpack.stages.deploy import check_server, length_warnings

        # Reading every row takes longer than registering a changed system prompt does: it is done where rows are needed anyway.
        for warning in length_warnings(build, build.rows[1] if stages & {"train", "export", "compare"} else []):
            progress.warn(warning)
        if moment := build.renderer.moment:
            progress.warn(
                f"The base's chat template writes the date. All rows are rendered at {moment:%Y-%m-%d %H:%M:%S}, so one date is trained, "
                "and the server writes that of each day."
            )
        if "deploy" in stages:
            check_server(build)
    return exported


_MADE_UP = "the conversation with "  # before the label of one that olpack made up


def _texts(build: Build) -> list[TokenText]:
    """All rows as training tokenizes them, and the conversations that templates and servers get wrong."""
    from olpack.deploy.identity import HARD
    from olpack.export import TokenText

    renderer, rows = build.renderer, [row for side in build.rows for row in side]
    texts = [TokenText(row.source, [row.text[start:end] for start, end in pairwise([0, *row.cuts, len(row.text)])], list(row.ids)) for row in rows]
    for label, conversation in HARD.items():
        try:
            text = renderer.text(conversation, ask=True)
        except Exception:  # a conversation that the template refuses cannot be served either
            continue
        texts.append(TokenText(f"{_MADE_UP}{label}", [text], renderer.tokens(text)[0]))
    return texts


def _judge_tokens(build: Build, differences: list[TokenDifference]) -> None:
    """Refuse to train on rows that llama.cpp would read as other tokens; warn of made-up conversations that it would.

    Raises:
        OlpackError: with the first of the rows.
    """
    for found in sorted(differences, key=lambda found: found.source.startswith(_MADE_UP)):
        trained, read, before = (
            " ".join(map(repr, build.renderer.tokenizer.convert_ids_to_tokens(ids))) for ids in (found.trained, found.read, found.before)
        )
        text = f"llama.cpp reads {found.source} as other tokens than training does: {read} in place of {trained}, after {before or 'nothing'}"
        if not found.source.startswith(_MADE_UP):
            raise OlpackError(
                f"{text}. None of its pre-tokenizers splits the rows as the base's tokenizer does.",
                "Take the tokenizer files from the model's publisher, or another base.",
            )
        progress.warn(f"{text}.")


def _check_served(build: Build) -> None:
    """Render what every request begins with: the Modelfile's system prompt and messages before a question."""
    package = build.package
    if package.template:  # the server renders with this one, and the base's is not asked
        if more := advertised(build.renderer.tokenizer.chat_template) - advertised(package.template):
            progress.warn(
                f"The base's chat template supports {' and '.join(sorted(more))} and modelfile.template does not: Ollama then serves the "
                "base's template, and deploy fails. Leave modelfile.template out of the recipe."
            )
        return
    start = ([{"role": "system", "content": package.system}] if package.system else []) + list(package.messages)
    what = " and ".join(name for name, given in (("modelfile.system", package.system), ("modelfile.messages", package.messages)) if given)
    try:
        asked = build.renderer.text([*start, {"role": "user", "content": "Hello."}], ask=True)
    except Exception as error:  # a template raises whatever its author wrote
        raise OlpackError(
            f"The base's chat template refuses what each request would begin with{f' ({what})' if what else ''}: {' '.join(str(error).split())}.",
            "Leave it out of the recipe, or take a base whose template accepts it.",
        ) from None
    if any(message["content"].strip() not in asked for message in start):
        progress.warn(f"The base's chat template does not write all of what each request would begin with ({what}), so the model never sees it.")


def _for_a_while(build: Build, stale: list[Step]) -> list[str]:
    """Q8_0 where it is written to collect an importance matrix on it, because the recipe has no quant that will do for that; F16 where it is
    written to measure the sensitivity on it."""
    return (["Q8_0"] if build.uncollected(stale) and not build.unweighed else []) + (["F16"] if build.unmeasured(stale) else [])


def _temporary_bytes(build: Build, parameters: int) -> int:
    """Most that the comparison's temporary files take at once, norms and vocabulary of the unquantized fine-tune left out.

    The other files that are there for a while, one after the other and after this one, are smaller: quants without their importance matrix.
    """
    from olpack.compare.job import LOGITS_BYTES

    if not build.recipe.compare.reference:
        return 0
    vocabulary = build.meta_model.shape.vocabulary
    positions = sum(row.target_count for row in build.rows[1][: build.recipe.compare.eval_rows])
    return 2 * parameters + min(LOGITS_BYTES, 4 * vocabulary * positions)


def estimate(build: Build, vram: float | None = None) -> Estimate:
    """Sizes, counts and time of a whole build. Times one matrix product; writes nothing.

    Args:
        vram: GiB of the GPU that is planned for, in place of the one found here.
    """
    import torch

    from olpack.model.packed import quantization_of
    from olpack.train.batches import schedule
    from olpack.train.memory import frozen_bytes
    from olpack.train.model import pick_device
    from olpack.train.planner import stored_bytes

    planned = [replace(step, reason="planned") for step in build.steps()]
    exported = check(build, planned)
    rows, held_out = build.rows
    asked, device = build.recipe.train, pick_device()
    adapter = _adapter_parameters(build)
    tokens = sum(len(row.ids) for row in rows)
    parameters = exported.parameters
    full = 4 if device.type == "cpu" else 2
    came = quantization_of(build.base.config).get("quant_method", "")
    held = asked.quantization if asked.quantization != "none" else "float32" if full == 4 else "bfloat16"
    passes = asked.epochs * tokens * 4 + 2 * sum(len(row.ids) for row in held_out) * 2  # forward 2, backward of activations 2, per weight and token
    return Estimate(
        parameters=parameters,
        train_rows=len(rows),
        eval_rows=len(held_out),
        train_tokens=tokens,
        learned_tokens=sum(row.target_count for row in rows),
        steps=len(schedule(len(rows), asked.epochs, asked.batch_size, asked.seed)),
        adapter_parameters=adapter,
        device="cpu" if device.type == "cpu" else torch.cuda.get_device_name(device),
        train_seconds=passes * parameters / (0.5 * _matmul_rate()) if device.type == "cpu" else None,
        fit=_fit(build, rows, device, vram),
        weights_bytes=stored_bytes(build.base) or sum(frozen_bytes(build.meta_model, held, full)),
        held=came or held,
        adapter_bytes=adapter * (4 + 4 + (8 if device.type == "cpu" else 2)),
        disk_bytes={quant.name: exported.sizes[quant.name] for quant in build.quants},
        temporary_bytes=_temporary_bytes(build, parameters),
        importance_bytes=exported.sizes["Q8_0"] if "Q8_0" in _for_a_while(build, planned) else 0,
        sensitivity_bytes=exported.sizes["F16"] if "F16" in _for_a_while(build, planned) else 0,
        warnings=exported.warnings,
    )


def _fit(build: Build, rows: list[TokenRow], device: torch.device, vram: float | None) -> Fit:
    import torch

    from olpack.train import planner
    from olpack.train.adapter import whole_parameters

    asked = build.recipe.train
    if vram is None and device.type == "cpu":
        return planner.on_cpu(asked)
    gpus = asked.gpus if asked.gpus != "all" else max(1, torch.cuda.device_count())
    room = planner.free_room(device) if vram is None else planner.card_room(vram)
    whole = whole_parameters(build.base, asked)
    return planner.on_gpu(
        build.meta_model, rows, asked, room, host=planner.host_room(), stored=planner.stored_bytes(build.base), whole=whole, gpus=gpus
    )


def _matmul_rate() -> float:
    """Floating-point operations per second of a float32 matrix product of this machine, the best of a few."""
    import torch

    n = 512
    a, b = torch.randn(n, n), torch.randn(n, n)
    best = float("inf")
    for _ in range(20):
        started = time.perf_counter()
        a @ b
        best = min(best, time.perf_counter() - started)
    return 2 * n**3 / best


def _adapter_parameters(build: Build) -> int:
    from olpack.train.adapter import whole_parameters
    from olpack.train.memory import adapter_parameters

    asked = build.recipe.train
    return adapter_parameters(build.meta_model, asked.rank, asked.target_modules, asked.method) + whole_parameters(build.base, asked)


def _add_memory(needs: Table, fit: dict, held: str) -> None:
    """What a training step takes of a GPU, by what it is for, and how it was made to fit."""
    parts = {name if name != "base" else f"base as {held}": size for name, size in fit["parts"].items()}
    needs.add_row("GPU memory", _sizes(parts))
    needs.add_row("", fit["said"])
    if fit["host_parts"]:
        needs.add_row("locked host memory", f"for each GPU: {_sizes(fit['host_parts'])}")


def _sizes(parts: dict[str, int]) -> str:
    return "; ".join(f"{name} {progress.quantity(size, 'B')}" for name, size in parts.items())


def write_plan(build: Build) -> None:
    """`plan.json`: every resolved setting with its origin, and what was stale when the build began."""
    write_atomically(build.paths.plan, json.dumps(describe(build), indent=1, ensure_ascii=False) + "\n")


def describe(build: Build, estimated: Estimate | None = None) -> dict:
    """The plan as plain data."""
    settings = {key: {"value": value, "from": build.recipe.origin(key)} for key, value in build.recipe.settings().items()}
    steps = [{"stage": step.stage, "step": step.unit, "stale": step.reason or None} for step in build.steps()]
    places = {"base": str(build.base.path), "build": str(build.paths.root), "server": build.server}
    plan = {"name": build.recipe.name, **places, "settings": settings, "steps": steps}
    return plan | ({"estimate": asdict(estimated) | {"fit": estimated.fit.as_json()}} if estimated else {})


def print_plan(plan: dict) -> None:
    """The plan for a person: what will be done, what it takes, and each setting with where it came from."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(soft_wrap=False, markup=False, emoji=False)  # a path or a reason may hold what reads like markup
    found = plan["estimate"]
    counts = f"  {found['parameters'] / 1e6:,.1f} M parameters, builds into {plan['build']}"
    console.print(Text.assemble((plan["name"], "bold"), counts), highlight=False)
    steps = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for title in ("step", "what will happen", "because"):
        steps.add_column(title, overflow="fold")
    for step in plan["steps"]:
        steps.add_row(step["step"], "run" if step["stale"] else "nothing", step["stale"] or "done, and its inputs are the same")
    if plan["server"] is None:
        steps.add_row("deploy", "nothing", "no Ollama server answers")
    console.print(steps, "")
    needs = Table(box=None, pad_edge=False, show_header=False)
    epochs = plan["settings"]["train.epochs"]["value"]
    needs.add_row(
        "data",
        f"{found['train_rows']:,} rows to learn, {found['eval_rows']:,} held out; {found['train_tokens']:,} tokens a pass, "
        f"{found['learned_tokens'] / found['train_tokens']:.0%} of them learned",
    )
    needs.add_row(
        "training",
        f"{found['steps']:,} steps ({epochs:g} epochs) on {found['device']}"
        + (f", about {progress.duration(found['train_seconds'])}" if found["train_seconds"] else ""),
    )
    if found["fit"]["training"]:
        needs.add_row("adapter", f"{found['adapter_parameters']:,} weights")
        _add_memory(needs, found["fit"], found["held"])
    else:
        size = progress.quantity(found["adapter_bytes"], "B")
        needs.add_row("adapter", f"{found['adapter_parameters']:,} weights, {size} with gradients and optimizer")
        needs.add_row(
            "frozen base",
            f"{progress.quantity(found['weights_bytes'], 'B')} in memory as {found['held']}, activations and logits besides "
            "(`--vram 24` plans for a GPU of 24 GiB)",
        )
    files = ", ".join(f"{quant} {progress.quantity(size, 'B')}" for quant, size in found["disk_bytes"].items())
    needs.add_row("disk", f"{progress.quantity(sum(found['disk_bytes'].values()), 'B')}: {files}; no intermediate files")
    if found["importance_bytes"]:
        needs.add_row("while exporting", f"{progress.quantity(found['importance_bytes'], 'B')} more disk: a Q8_0 to collect the importance matrix on")
    if found["sensitivity_bytes"]:
        needs.add_row(
            "while exporting",
            f"{progress.quantity(found['sensitivity_bytes'], 'B')} more disk, and as much memory: the fine-tune in 16 bits, "
            "to measure what each matrix loses",
        )
    if found["temporary_bytes"]:
        needs.add_row("while comparing", f"{progress.quantity(found['temporary_bytes'], 'B')} more disk: the unquantized fine-tune and its logits")
    console.print(needs, "", highlight=False)
    settings = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for title in ("setting", "value", "from"):
        settings.add_column(title, overflow="fold")
    for key, setting in plan["settings"].items():
        value = setting["value"]
        settings.add_row(key, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False), setting["from"])
    console.print(settings, highlight=False)
