"""What will happen, and everything that would fail, before anything is done.

`check` runs at the start of every build; `olpack plan` shows what it found, every setting with its origin, sizes and an estimate of the time.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING

from olpack import progress
from olpack.errors import OlpackError
from olpack.export.client import begin_worker, one_worker
from olpack.stages import compare, deploy, export, train
from olpack.stages.build import Build
from olpack.stages.calibration import needs_importance_source, needs_rounding_source, reads_rows, rounding_seconds, scaled_quants, temporary_quants
from olpack.stages.order import STAGES, all_steps
from olpack.stages.records import Step
from olpack.stages.stage import Checks
from olpack.workspace import free_bytes, write_atomically

if TYPE_CHECKING:
    import torch

    from olpack.data import TokenRow
    from olpack.export import ExportPlan
    from olpack.train.planner import Fit


@dataclass(frozen=True)
class Estimate:
    """What a build needs, as far as it is known before it runs.

    Attributes:
        parameters: weights of the base.
        train_rows, eval_rows, train_tokens, learned_tokens: of one pass over the data.
        steps: optimizer steps.
        adapter_parameters: weights of the adapter.
        device: where it trains.
        train_seconds: from a matrix product timed here, at half its rate; None on a GPU, and where nothing is trained.
        fit: what training takes of a GPU's memory and how it uses it.
        weights_bytes: the frozen base in memory.
        held: its quantization: "nf4", or the one that it comes in ("gptq").
        adapter_bytes: adapter, its gradients and optimizer state.
        disk_bytes: of each GGUF, exact, by quant; of a budget, about what it allows.
        temporary_bytes: what the comparison takes for as long as it runs: the unquantized fine-tune, and its logits.
        importance_bytes: of a Q8_0 file that is there for as long as the importance matrix is collected on it.
        rounding_bytes: of the matrices that are rounded on training rows, and of a Q8_0 file where one is there to read the rows.
        scaled: the quants whose block scales are trained.
        rounding_seconds: from a matrix product timed here; None on a GPU, and where no matrix is rounded on rows.
        sensitivity_bytes: of an F16 file that is there for as long as the sensitivity is measured on it.
        pre_tokenizer: llama.cpp's name of the one that the files will name; empty for vocabularies that have none.
        texts_read, texts_differing: rows and made-up conversations that llama.cpp tokenized, and those that became other tokens than in training.
        answers: the sandbox of the answers that run: what it stops on this machine, and what it does not; empty where no answer runs.
        warnings: what a user should know and need not change.
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
    rounding_bytes: int
    scaled: list[str]
    rounding_seconds: float | None
    sensitivity_bytes: int
    pre_tokenizer: str
    texts_read: int
    texts_differing: int
    answers: str
    warnings: list[str] = field(default_factory=list)


@one_worker(with_gpu=False)
def check(build: Build, stale: list[Step], *, now: bool = False) -> ExportPlan | None:
    """Refuse now what would fail later. Reads headers, the tokenizer and every row; writes nothing in the build.

    Args:
        build: the package.
        stale: the steps that will run. Those that are done are not checked again.
        now: they run next, and are not only planned.

    Returns:
        What the export would write; None where neither training nor the export is stale.

    Raises:
        OlpackError: the first thing that would fail, with its remedy.
    """
    checks = Checks(stale, now)
    if "compare" in checks.stages:
        compare.check_answers_may_run(build)
    if checks.stages & export.STAGE.checked_for and not build.paths.served:
        begin_worker()
    if checks.stages & {"export", "deploy", "compare"}:
        from olpack.llamacpp.probe import check_library

        check_library()
    if checks.stages & {"train", "export", "compare"}:
        _check_end_of_turn(build)
    for stage in STAGES:
        if stage.checked_for & checks.stages:
            stage.check(build, checks)
    if "train" in checks.stages:
        _check_space(build, checks)
    return checks.exported


def _check_end_of_turn(build: Build) -> None:
    _ = build.rows
    if build.renderer.end_of_turn() is None and "stop" not in build.package.parameters:
        raise OlpackError(
            "The base's chat template ends an assistant's turn with no special token, so served answers would never stop.",
            "Set `modelfile.parameters.stop` to the text that ends a turn.",
        )


def _check_space(build: Build, checks: Checks) -> None:
    """Refuse a disk that cannot take adapter and quants; warn where it cannot take what the comparison writes for a while."""
    exported = checks.exported
    need = train.disk_bytes(build) + (sum(exported.sizes.values()) if exported else 0)
    if (free := free_bytes(build.paths.root)) < need:
        raise OlpackError(
            f"{build.paths.root} needs {progress.quantity(need, 'B')} of space, and {progress.quantity(free, 'B')} are free.",
            "Free some, choose another disk with --out, or make fewer quants.",
        )
    if "compare" in checks.stages and exported and free < need + (temporary := compare.temporary_bytes(build, exported.parameters)):
        progress.warn(
            f"The comparison needs {progress.quantity(need + temporary - free, 'B')} more space than is free, for the unquantized "
            "fine-tune, while it runs. Free them by then, or it leaves out what the quants lost against it."
        )


def estimate(build: Build, vram: float | None = None) -> Estimate:
    """Sizes, counts and time of a whole build. Times one matrix product; writes nothing.

    Args:
        vram: GiB of the GPU that is planned for, in place of the one found here.
    """
    import torch

    from olpack.train.batches import schedule
    from olpack.train.device import pick_device
    from olpack.train.memory import frozen_bytes
    from olpack.train.planner import stored_bytes

    planned = [replace(step, reason="planned") for step in all_steps(build)]
    exported = check(build, planned)
    assert exported is not None, "all steps are planned, so the export is checked"
    rows, held_out = build.rows
    asked, device = build.recipe.train, pick_device()
    adapter = train.adapter_parameters(build)
    tokens = sum(len(row.ids) for row in rows)
    parameters = exported.parameters
    rounded = [quant.name for quant in build.quants if not build.paths.base and reads_rows(build, quant.name)]
    scaled = scaled_quants(exported, build.recipe.export.scale_steps)
    full = 4 if device.type == "cpu" else 2
    held = asked.quantization if asked.quantization != "none" else "float32" if full == 4 else "bfloat16"
    passes = asked.epochs * tokens * 4 + 2 * sum(len(row.ids) for row in held_out) * 2  # forward 2, backward of activations 2, per weight and token
    return Estimate(
        parameters=parameters,
        train_rows=len(rows),
        eval_rows=len(held_out),
        train_tokens=tokens,
        learned_tokens=sum(row.target_count for row in rows),
        steps=0 if build.finished_adapter else len(schedule(len(rows), asked.epochs, asked.batch_size, asked.seed)),
        adapter_parameters=adapter,
        device="cpu" if device.type == "cpu" else torch.cuda.get_device_name(device),
        train_seconds=passes * parameters / (0.5 * _matmul_rate()) if device.type == "cpu" and not build.finished_adapter else None,
        fit=_fit(build, rows, device, vram),
        weights_bytes=stored_bytes(build.base, full) or sum(frozen_bytes(build.meta_model, held, full)),
        held=build.base.quantization or held,
        adapter_bytes=adapter * (4 + 4 + (8 if device.type == "cpu" else 2)),
        disk_bytes={"adapter": 2 * adapter} if build.paths.served else {quant.name: exported.sizes[quant.name] for quant in build.quants},
        temporary_bytes=compare.temporary_bytes(build, parameters),
        importance_bytes=exported.sizes["Q8_0"] if needs_importance_source(build, planned) else 0,
        rounding_bytes=sum(exported.sizes[quant] for quant in rounded) + (exported.sizes["Q8_0"] if needs_rounding_source(build, planned) else 0),
        scaled=scaled,
        rounding_seconds=rounding_seconds(build, rounded, len(scaled), parameters, _matmul_rate()) if rounded and device.type == "cpu" else None,
        sensitivity_bytes=exported.sizes["F16"] if "F16" in temporary_quants(build, planned) else 0,
        pre_tokenizer=exported.pre_tokenizer,
        texts_read=exported.texts,
        texts_differing=len(exported.differences),
        answers=compare.sandboxed(build),
        warnings=exported.warnings,
    )


def _fit(build: Build, rows: list[TokenRow], device: torch.device, vram: float | None) -> Fit:
    import torch

    from olpack.train import planner
    from olpack.train.adapter import whole_parameters

    asked = build.recipe.train
    if build.finished_adapter or (vram is None and device.type == "cpu"):
        return planner.on_cpu(asked)
    gpus = asked.gpus if asked.gpus != "all" else max(1, torch.cuda.device_count())
    available = planner.free_gpu_memory(device) if vram is None else planner.card_memory(vram)
    whole = whole_parameters(build.base, asked)
    return planner.on_gpu(
        build.meta_model,
        rows,
        asked,
        available,
        pinnable=planner.pinnable_memory(),
        streamable=planner.streamable_memory(),
        pace=partial(planner.measure_pace, device) if vram is None else lambda: planner.ASSUMED_PACE,
        stored=planner.stored_bytes(build.base),
        whole=whole,
        gpus=gpus,
        multiplies_fp8=planner.multiplies_fp8(device),
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


def write_plan(build: Build) -> None:
    """`plan.json`: every resolved setting with its origin, and what was stale when the build began."""
    write_atomically(build.paths.plan, json.dumps(describe(build), indent=1, ensure_ascii=False) + "\n")


def _served(build: Build) -> str:
    """The GGUF that an adapter is trained on and served with, in words."""
    facts = export.quant_facts(build, build.quants[0].name)
    return (
        f"{build.base.tag or build.base.label}: {build.quants[0].name}, {progress.quantity(facts['size'], 'B')}, in {build.paths.served}; "
        "it is neither downloaded nor copied"
    )


def describe(build: Build, estimated: Estimate | None = None) -> dict:
    """The plan as plain data."""
    settings = {key: {"value": value, "from": build.recipe.origin(key)} for key, value in build.recipe.settings().items()}
    steps = [{"stage": step.stage, "step": step.unit, "stale": step.reason or None} for step in all_steps(build)]
    places = {"base": str(build.base.source), "build": str(build.paths.root), "server": build.server}
    served = {"served_as_it_is": _served(build)} if build.paths.served else {}
    plan = {"name": build.recipe.name, **places, **served, "settings": settings, "steps": steps}
    if estimated and (way := deploy.way_of_tags(build)):
        plan["tags"] = way
    return plan | ({"estimate": asdict(estimated) | {"fit": estimated.fit.as_json()}} if estimated else {})
