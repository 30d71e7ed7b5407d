"""The train stage: rows and a base become a LoRA adapter in `build/NAME/adapter/`; or one that is trained already is copied there."""

from __future__ import annotations

import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from olpack import bounded_json, progress
from olpack.errors import OlpackError
from olpack.stages import records
from olpack.stages.build import Build
from olpack.stages.records import Step
from olpack.stages.stage import Checks, Stage
from olpack.workspace import file_digest, folder_atomically, scratch

# Settings that decide memory, speed and reports, and not the adapter; and one of the merge.
_OTHER_SETTINGS = (
    "train.micro_batch_tokens",
    "train.gradient_checkpointing",
    "train.gpus",
    "train.sharding",
    "train.launch",
    "train.trackers",
    "train.merge_base",
    "train.adapter",
)
# Optimizer steps × learning rate below which an adapter changes little. AdamW moves a weight by about the learning rate at most, so 25 steps at
# 2e-4 move none by more than 0.005.
_FEW_STEPS = 0.005
_CHECKPOINTS = 9  # the adapter; two checkpoints, the one being replaced and the new one, each with adapter, best adapter and two moments


def inputs(build: Build, unit: str) -> dict[str, Any]:
    """Base, rows and settings. Held-out rows too, where they choose which step's adapter is kept, or when to stop. Of an adapter that is trained
    already, the base and its files."""
    if build.finished_adapter:
        return {"base": build.base.digest, "train.adapter": build.finished_adapter_digest}
    settings = {key: value for key, value in build.settings("train").items() if key not in _OTHER_SETTINGS}
    if settings["train.products"] == "bf16":  # so did builds from before the key, which stay fresh
        del settings["train.products"]
    chosen = build.recipe.train.keep == "best" or build.recipe.train.patience
    return {"base": build.base.digest} | build.data_inputs("train") | (build.data_inputs("eval") if chosen else {}) | settings


def check(build: Build, checks: Checks) -> None:
    """Refuse a base, settings or rows with which training would fail, and warn of those with which it would be in vain. Refuse an adapter that is
    trained already and does not fit the base."""
    if build.finished_adapter:
        _check_finished(build, build.finished_adapter)
        return
    rows, _ = build.rows
    _import_libraries(build, compiles="train" in checks.stages and checks.now)
    from olpack.deploy import context_warnings
    from olpack.train.adapter import experts_left_out
    from olpack.train.batches import schedule
    from olpack.train.checks import check_training
    from olpack.train.device import pick_device
    from olpack.train.launch import launcher
    from olpack.train.metrics import check_trackers
    from olpack.train.untrained_tokens import untrained_tokens

    if build.base.leftover_quantization:
        progress.warn(
            f"config.json of {build.base.label} names bitsandbytes as the quantization of the weights, and none of them is quantized: olpack takes "
            "them as they are."
        )
    check_training(build.base, build.recipe.train, on_gpu=pick_device().type == "cuda")
    if left_out := experts_left_out(build.base, build.recipe.train):
        progress.warn(left_out)
    if unseen := _untrained_system(build):
        progress.warn(unseen)
    if build.meta_model.carries_state:
        progress.warn(
            f"Layers of {build.base.label} carry a state from token to token (convolution, recurrence). Training tries whether it "
            "passes from one packed row to the next; where it does, they are trained one by one."
        )
    if untrained := untrained_tokens(build.base, build.recipe.train, build.renderer.tokenizer, rows, build.recipe.package):
        progress.warn(untrained)
    asked = build.recipe.train
    steps = len(schedule(len(rows), asked.epochs, asked.batch_size, asked.seed))
    if steps * asked.learning_rate < _FEW_STEPS:
        progress.warn(
            f"Training takes few optimizer steps, {steps} at a learning rate of {asked.learning_rate:g}, in which an adapter changes little: answers "
            "will be much like the base's. More train.epochs, a smaller train.batch_size or more rows make more steps."
        )
    launcher(build.recipe.train)
    check_trackers(build.recipe.train.trackers)
    longest = max(len(row.ids) for row in rows)
    for warning in context_warnings(build.package.num_ctx, trained=longest, longest=build.base.context_length):
        progress.warn(warning)
    if build.paths.base:
        from olpack.export.lora import check_adapter
        from olpack.model.shape import adapter_shapes

        check_adapter(build.base.source, adapter_shapes(build.meta_model, build.recipe.train.target_modules))


def _import_libraries(build: Build, *, compiles: bool) -> None:
    """Import what training calls. A GPU's kernels compile meanwhile, where this process trains and `compiles`."""
    from olpack.model.libraries import import_libraries
    from olpack.train.device import compute_dtype, pick_device
    from olpack.train.launch import launcher
    from olpack.train.ops.pointwise import compile_kernels

    if compiles and launcher(build.recipe.train) is None:
        device = pick_device()
        compile_kernels(device, compute_dtype(device), build.base.config, build.recipe.train.rank)
    import_libraries()


def _check_finished(build: Build, folder: Path) -> None:
    """Refuse an adapter that was trained on another base or with more tokens than the base's tokenizer has; warn of one that was trained with
    another chat template."""
    from olpack.export.adapter import read_adapter
    from olpack.export.adapter_tokenizer import adapter_tokenizer
    from olpack.export.lora import export_adapter

    headers = build.base.tensor_headers()
    dequantized = build.recipe.train.merge_base == "dequantized"
    change = read_adapter(folder, headers, dequantized=dequantized, tied=build.meta_model.shape.tied)
    tokenizer, warning = adapter_tokenizer(folder, build.base.path, change, headers)
    if tokenizer or change.vocabulary is not None:
        raise OlpackError(
            f"The adapter '{folder}' was trained with tokens that the tokenizer of {build.base.label} does not have, and a build reads all rows with "
            "the base's.",
            "Merge it with peft where it was trained (merge_and_unload), save the tokenizer into the merged folder, and run `olpack quantize FOLDER`."
            if change.vocabulary is not None
            else "Copy the base into a folder, put the adapter's tokenizer files there, and name that folder as `base`.",
        )
    if warning:
        progress.warn(warning)
    if build.paths.base:
        with scratch() as place:
            export_adapter(build.base.source, folder, place / "adapter.gguf")
    if differing := _differing_prompt(build, folder):
        progress.warn(
            f"The chat template beside the adapter '{folder}' writes {differing} otherwise than that of {build.base.label}, and olpack compares and "
            "serves with the base's. If it was trained with its own, copy the base into a folder, put the adapter's chat_template.jinja there, and "
            "name that folder as `base`."
        )


def _differing_prompt(build: Build, folder: Path) -> str | None:
    """The first held-out row that the chat template beside an adapter writes otherwise than the base's; None where it has none, or all are alike."""
    template = _template_beside(folder)
    if template is None or template == build.renderer.tokenizer.chat_template:
        return None
    return next((chat.source for chat in build.held_out_chats if build.renderer.written_otherwise(chat, template)), None)


def _template_beside(folder: Path) -> str | None:
    """The chat template that the tokenizer beside an adapter has."""
    own, settings = folder / "chat_template.jinja", folder / "tokenizer_config.json"
    if own.is_file():
        return own.read_text(encoding="utf-8", errors="replace")
    template = bounded_json.read_object(settings, "Save the tokenizer again.").get("chat_template") if settings.is_file() else None
    return template if isinstance(template, str) else None


def _untrained_system(build: Build) -> str | None:
    """A warning where the server puts a system prompt before requests, and most rows have been written without one."""
    chats = [chat for chat in build.chats[0] if chat.messages]
    without = sum(all(message["role"] != "system" for message in chat.messages) for chat in chats)
    if not build.recipe.modelfile.system or 2 * without <= len(chats):
        return None
    return (
        f"The server puts `modelfile.system` before each request without a system prompt, and {without:,} of {len(chats):,} training chats have "
        "none, so that training sees other prompts than it serves. Add the prompt to the rows as a message of role system, or leave out "
        "`modelfile.system`."
    )


def run(build: Build, steps: list[Step]) -> None:
    """Fine-tune the base, or copy the adapter that is trained already."""
    from olpack.export.client import end_worker
    from olpack.train import train
    from olpack.train.device import pick_device

    (step,) = steps
    paths, moment = build.paths, build.renderer.moment
    dated = {"rendered_at": moment.isoformat()} if moment else {}
    if build.finished_adapter:
        _copy(build, build.finished_adapter, step, dated)
        return
    if pick_device().type == "cpu":
        end_worker()  # a training on the CPU takes minutes, and needs the memory more than the export its start
    rows, held_out = build.rows
    if moment and "rendered_at" not in step.result:  # before training, so that one that goes on tomorrow has the same rows
        records.remember(paths, step, {**step.result, **dated})
    result = train(build.base, rows, held_out, build.recipe.train, out=paths.adapter, checkpoint=paths.checkpoint, key=step.key)
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
    digest = file_digest(paths.adapter / "adapter_model.safetensors")
    records.finish(paths, step, outputs, {**asdict(result), "adapter_digest": digest, **dated})


def _copy(build: Build, folder: Path, step: Step, dated: dict[str, str]) -> None:
    from olpack.export.adapter import adapter_files

    paths = build.paths
    with folder_atomically(paths.adapter) as place:
        for file in adapter_files(folder, dequantized=build.recipe.train.merge_base == "dequantized"):
            shutil.copyfile(file, place / file.name)
    outputs = sorted(paths.adapter.iterdir())
    digest = file_digest(paths.adapter / "adapter_model.safetensors")
    records.finish(paths, step, outputs, {"adapter_digest": digest, "copied_from": str(folder), **dated})
    progress.say(f"copied the adapter {folder}: nothing is trained")


def adapter_parameters(build: Build) -> int:
    """Weights that are trained, or those of the adapter that is trained already."""
    if build.finished_adapter:
        from math import prod

        from olpack.export.adapter import adapter_files
        from olpack.model.checkpoint import read_safetensors_header

        return sum(prod(tensor.shape) for tensor in read_safetensors_header(adapter_files(build.finished_adapter)[1]).values())
    from olpack.train.adapter import whole_parameters
    from olpack.train.memory import adapter_parameters

    asked = build.recipe.train
    return adapter_parameters(build.meta_model, asked.rank, asked.target_modules, asked.method) + whole_parameters(build.base, asked)


def disk_bytes(build: Build) -> int:
    """Most that adapter and checkpoints take on the disk at once."""
    if build.finished_adapter:
        from olpack.export.adapter import adapter_files

        return sum(file.stat().st_size for file in adapter_files(build.finished_adapter))
    return adapter_parameters(build) * 4 * _CHECKPOINTS


STAGE = Stage("train", 2, inputs, units=lambda build: ["train"], checked_for=frozenset({"train"}), check=check, run=run)
