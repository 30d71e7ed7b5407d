"""The train stage: rows and a base become a LoRA adapter in `build/NAME/adapter/`."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from olpack import progress
from olpack.stages import records
from olpack.stages.build import Build
from olpack.stages.records import Step
from olpack.stages.stage import Checks, Stage
from olpack.workspace import file_digest

# Settings that decide memory, speed and reports, and not the adapter; and one of the merge.
_OTHER_SETTINGS = (
    "train.micro_batch_tokens",
    "train.gradient_checkpointing",
    "train.gpus",
    "train.sharding",
    "train.launch",
    "train.trackers",
    "train.merge_base",
)
# Optimizer steps × learning rate below which an adapter changes little. AdamW moves a weight by about the learning rate at most, so 25 steps at
# 2e-4 move none by more than 0.005.
_FEW_STEPS = 0.005
_CHECKPOINTS = 9  # the adapter; two checkpoints, the one being replaced and the new one, each with adapter, best adapter and two moments


def inputs(build: Build, unit: str) -> dict[str, Any]:
    """Base, rows and settings. Held-out rows too, where they choose which step's adapter is kept, or when to stop."""
    settings = {key: value for key, value in build.settings("train").items() if key not in _OTHER_SETTINGS}
    chosen = build.recipe.train.keep == "best" or build.recipe.train.patience
    return {"base": build.base.digest} | build.data_inputs("train") | (build.data_inputs("eval") if chosen else {}) | settings


def check(build: Build, checks: Checks) -> None:
    """Refuse a base, settings or rows with which training would fail, and warn of those with which it would be in vain."""
    from olpack.deploy import context_warnings
    from olpack.train.adapter import experts_left_out
    from olpack.train.batches import schedule
    from olpack.train.checks import check_training
    from olpack.train.device import pick_device
    from olpack.train.launch import launcher
    from olpack.train.metrics import check_trackers
    from olpack.train.untrained_tokens import untrained_tokens

    rows, _ = build.rows
    if build.base.leftover_quantization:
        progress.warn(
            f"config.json of {build.base.label} names bitsandbytes as the quantization of the weights, and none of them is quantized: olpack takes "
            "them as they are."
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

        check_adapter(build.base.path, adapter_shapes(build.meta_model, build.recipe.train.target_modules))


def run(build: Build, steps: list[Step]) -> None:
    """Fine-tune the base."""
    from olpack.train import train

    (step,) = steps
    rows, held_out = build.rows
    paths, moment = build.paths, build.renderer.moment
    dated = {"rendered_at": moment.isoformat()} if moment else {}
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


def adapter_parameters(build: Build) -> int:
    """Weights that are trained."""
    from olpack.train.adapter import whole_parameters
    from olpack.train.memory import adapter_parameters

    asked = build.recipe.train
    return adapter_parameters(build.meta_model, asked.rank, asked.target_modules, asked.method) + whole_parameters(build.base, asked)


def disk_bytes(build: Build) -> int:
    """Most that adapter and checkpoints take on the disk at once."""
    return adapter_parameters(build) * 4 * _CHECKPOINTS


STAGE = Stage("train", 2, inputs, units=lambda build: ["train"], checked_for=frozenset({"train"}), check=check, run=run)
