"""Settings of transformers' Trainer and of TRL, as LLaMA-Factory, Unsloth and Axolotl pass them on."""

from __future__ import annotations

from typing import Any

from olpack.importers.draft import Draft, Given, Rule, by, copied, lost, needless

OWN_KERNELS = "olpack has its own kernels, and chooses them by itself."
NO_TOKENS = "olpack adds no tokens: it takes the base's tokenizer as it is."
_ADAMW = ("adamw", "paged_adamw")  # how the names of AdamW's forms begin: adamw_torch, adamw_bnb_8bit, paged_adamw_32bit
_NOT_ADAMW = ("adamw_anyprecision", "adamw_apex_fused", "adamw_torch_4bit")
_SCHEDULES = {
    "cosine": "cosine",
    "linear": "linear",
    "constant": "constant",
    "constant_with_warmup": "constant",
    "cosine_with_restarts": "cosine",  # one cycle, which has no restart
}
MICRO_BATCH, ACCUMULATION, EPOCHS, SCHEDULE = (
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "num_train_epochs",
    "lr_scheduler_type",
)
_HUGE = 1e15
_OWN_FILES = "olpack writes checkpoints and metrics by itself, into build/NAME."
_OWN_ATTENTION = "olpack chooses the attention kernel."
_PRECISION = "olpack trains in bfloat16 on a GPU and in float32 on a CPU."
_MEMORY = "olpack chooses micro-batches that fit the memory."
_DISTRIBUTED = "The nearest settings are train.gpus and train.sharding."
_FIXED_ADAM = "olpack's AdamW has the usual betas (0.9, 0.999) and epsilon (1e-8)."
_LOADING = "It decides how data is loaded, not what is trained."


def is_number(value: Any) -> bool:
    """Whether a value is a number of the size of settings, and no bool."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < _HUGE


def number(value: Any) -> Any:
    """A number that was written as a text ("2e-4"), or the value itself."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def rate(draft: Draft, given: Given) -> None:
    """The peak learning rate."""
    draft.carry(given, {"train.learning_rate": number(given.value)})


def batch(names: tuple[str, str], defaults: tuple[int, int] | None):
    """A rule for the two factors of the rows per step, and what they are where a file leaves them out; None: that is not known."""

    def read(draft: Draft, given: Given) -> None:
        micro, steps = (draft.value(name, default) for name, default in zip(names, defaults or (None, None), strict=True))
        if micro is None or steps is None:
            draft.lose(given, f"train.batch_size is {names[0]} × {names[1]}, and the file gives one of them.")
            return
        if not all(is_number(count) and isinstance(count, int) for count in (micro, steps)):
            draft.lose(given, "It is no whole number. The nearest setting is train.batch_size, the rows of a step.")
            return
        note = f"{micro} × {steps} rows, on one GPU."
        if given.key == names[0] and any(draft.value(name) for name in ("sample_packing", "packing", "neat_packing")):
            note += " With packing, a row there is a sequence of several; olpack counts rows, so the same step has a larger train.batch_size."
        draft.carry(given, {"train.batch_size": micro * steps}, note)

    return read


def default_batch(draft: Draft, names: tuple[str, str], defaults: tuple[int, int]) -> None:
    """Rows per step where a file has neither factor."""
    if not draft.given.keys() & set(names):
        draft.default({"train.batch_size": defaults[0] * defaults[1]}, " × ".join(names), list(defaults))


def schedule(draft: Draft, given: Given) -> None:
    """The learning rate's way down."""
    if not isinstance(given.value, str) or given.value not in _SCHEDULES:
        draft.lose(given, "olpack has the schedules cosine, linear and constant (train.schedule).")
    elif draft.value("lr_scheduler_kwargs"):
        draft.lose(given, f"Its lr_scheduler_kwargs have no equal. The nearest setting is train.schedule: {_SCHEDULES[given.value]}.")
    elif given.value == "constant":
        draft.carry(given, {"train.schedule": "constant", "train.warmup": 0}, "Without a warmup, as in transformers.")
    else:
        draft.carry(given, {"train.schedule": _SCHEDULES[given.value]})


def warmup_steps(draft: Draft, given: Given) -> None:
    """Steps, or a share of them, as transformers 5 takes either."""
    value, most = given.value, draft.value("max_steps")
    if _constant(draft):
        draft.need_not(given, "The constant schedule of transformers has no warmup.")
    elif not is_number(value) or value < 0:
        draft.lose(given, "It is no number of steps.")
    elif value == 0 or 0 < value < 1:
        draft.carry(given, {"train.warmup": value})
    elif is_number(most) and most > value:
        draft.carry(given, {"train.warmup": round(value / most, 6)}, f"{value} of {most} steps.")
    else:
        draft.lose(
            given, f"olpack's warmup is a share of the steps: train.warmup = {value} / steps, which `olpack plan` prints. Without it, it is 0.03."
        )


def warmup_ratio(draft: Draft, given: Given) -> None:
    """A share of the steps."""
    if _constant(draft):
        draft.need_not(given, "The constant schedule of transformers has no warmup.")
    elif is_number(draft.value("warmup_steps")) and draft.value("warmup_steps") > 0:
        draft.need_not(given, "warmup_steps replaces it.")
    else:
        draft.carry(given, {"train.warmup": number(given.value)})


def _constant(draft: Draft) -> bool:
    return "constant" in (draft.value("lr_scheduler_type"), draft.value("lr_scheduler"))


def max_steps(draft: Draft, given: Given) -> None:
    """A number of steps, which olpack gives as passes over the rows."""
    if not is_number(given.value) or given.value <= 0:
        draft.need_not(given, "It sets no limit.")
        return
    rows = draft.settings.get("train.batch_size")
    same = f"{given.value} steps of {rows} rows are {given.value * rows:,} rows: " if rows else ""
    draft.lose(
        given, f"olpack counts passes over the rows. {same}train.epochs = max_steps × train.batch_size / training rows, which `olpack plan` prints."
    )


def epochs(draft: Draft, given: Given) -> None:
    """Passes over the rows."""
    limit = draft.value("max_steps")
    if is_number(limit) and limit > 0:
        draft.need_not(given, "max_steps replaces it.")
    else:
        draft.carry(given, {"train.epochs": number(given.value)})


def default_epochs(draft: Draft, key: str, value: float) -> None:
    """Passes where a file gives neither them nor a number of steps."""
    limit = draft.value("max_steps")
    if not (is_number(limit) and limit > 0):
        draft.default({"train.epochs": value}, key, value)


def optimizer(draft: Draft, given: Given) -> None:
    """AdamW in any form is olpack's; others it has not."""
    name = str(given.value)
    if name.startswith(_ADAMW) and name not in _NOT_ADAMW:
        draft.need_not(given, "olpack trains with AdamW, on a GPU with moments in 8 bits.")
    else:
        draft.lose(given, "olpack trains with AdamW, on a GPU with moments in 8 bits.")


def checkpointing(draft: Draft, given: Given) -> None:
    """Recomputation of activations."""
    if isinstance(given.value, bool):
        draft.carry(given, {"train.gradient_checkpointing": given.value})
    else:
        draft.need_not(given, "olpack decides by the memory that is there (train.gradient_checkpointing: auto), and offloads activations with it.")


def eval_steps(draft: Draft, given: Given) -> None:
    """Steps between evaluations."""
    if isinstance(given.value, int) and not isinstance(given.value, bool) and given.value >= 1:
        draft.carry(given, {"train.eval_every": given.value})
    else:
        draft.lose(given, "train.eval_every is a number of steps, and by default makes ten evaluations.")


def share(draft: Draft, given: Given) -> None:
    """The share of the training rows that is held out."""
    value = given.value
    if "data.eval" in draft.settings:
        draft.need_not(given, "The held-out rows have a source of their own.")
    elif value == 0:
        draft.lose(given, "olpack always holds out rows, to compare the quants on: data.eval_share is 0.05 by default.")
    elif is_number(value) and value >= 1:
        draft.lose(given, "It is a number of rows; data.eval_share is a share of them, 0.05 by default.")
    else:
        draft.carry(given, {"data.eval_share": value}, "Which rows are held out is decided by the hash of each.")


def best(draft: Draft, given: Given) -> None:
    """Which step's adapter is kept."""
    draft.carry(given, {"train.keep": "best" if given.value is True else "last"})


def precision(draft: Draft, given: Given) -> None:
    """Half precision."""
    if given.key in ("fp16", "float16") and given.value is True:
        draft.lose(given, _PRECISION)
    else:
        draft.need_not(given, _PRECISION)


def tracker(draft: Draft, given: Given) -> None:
    """Programs that metrics are sent to."""
    asked = given.value if isinstance(given.value, list) else [given.value]
    if all(name in ("none", "", None) for name in asked):
        draft.need_not(given, "olpack sends nothing unless it is asked to.")
    else:
        draft.lose(given, "olpack sends nothing unless it is asked to. The nearest setting is train.trackers: [tensorboard] or [wandb].")


def epochs_between(draft: Draft, given: Given) -> None:
    """When evaluations are made."""
    if given.value in ("no", "steps"):
        draft.need_not(given, "olpack evaluates every train.eval_every steps; its default makes ten evaluations.")
    else:
        draft.lose(given, "The nearest setting is train.eval_every, a number of steps.")


TRAINER_RULES: dict[str, Rule] = {
    "learning_rate": by(rate, "train.learning_rate"),
    EPOCHS: by(epochs, "train.epochs"),
    "max_steps": by(max_steps, "", "olpack counts passes over the rows: train.epochs."),
    SCHEDULE: by(schedule, "train.schedule", "cosine, linear and constant; `constant` sets train.warmup to 0, as in transformers."),
    "lr_scheduler_kwargs": lost("olpack's schedules have no further settings."),
    "warmup_ratio": by(warmup_ratio, "train.warmup"),
    "warmup_steps": by(warmup_steps, "train.warmup", "As a share of max_steps, if the file gives them."),
    "weight_decay": copied("train.weight_decay"),
    "max_grad_norm": copied("train.max_grad_norm"),
    "seed": copied("train.seed"),
    "data_seed": lost("olpack has one seed, train.seed."),
    "optim": by(optimizer, "", "AdamW in any form is olpack's own."),
    "optim_args": lost(_FIXED_ADAM),
    "adam_beta1": lost(_FIXED_ADAM),
    "adam_beta2": lost(_FIXED_ADAM),
    "adam_epsilon": lost(_FIXED_ADAM),
    "gradient_checkpointing": by(checkpointing, "train.gradient_checkpointing"),
    "gradient_checkpointing_kwargs": needless(_MEMORY),
    "eval_strategy": by(epochs_between, "", "The nearest setting is train.eval_every."),
    "evaluation_strategy": by(epochs_between, "", "The nearest setting is train.eval_every."),
    "eval_steps": by(eval_steps, "train.eval_every"),
    "load_best_model_at_end": by(best, "train.keep"),
    "metric_for_best_model": lost("olpack keeps the adapter with the lowest loss on the held-out rows."),
    "greater_is_better": lost("olpack keeps the adapter with the lowest loss on the held-out rows."),
    "neftune_noise_alpha": lost("olpack adds no noise to embeddings."),
    "label_smoothing_factor": lost("olpack trains on the plain cross-entropy."),
    "group_by_length": needless("Rows are packed without padding, whatever their lengths."),
    "bf16": by(precision, "", _PRECISION),
    "fp16": by(precision, "", _PRECISION),
    "tf32": needless(_PRECISION),
    "report_to": by(tracker, "", "olpack sends nothing unless it is asked to. The nearest setting is train.trackers."),
    "run_name": needless(_OWN_FILES),
    "output_dir": needless("A build writes into build/NAME."),
    "overwrite_output_dir": needless("A build makes anew what is stale, and keeps the rest."),
    "resume_from_checkpoint": needless("A build resumes by itself."),
    "push_to_hub": lost("`olpack push NAME --hub USER/REPO` publishes a build."),
    "hub_model_id": lost("`olpack push NAME --hub USER/REPO` publishes a build."),
    "do_train": needless("olpack trains."),
    "do_eval": needless("olpack evaluates on the held-out rows."),
    "per_device_eval_batch_size": needless(_MEMORY),
    "eval_accumulation_steps": needless(_MEMORY),
    "auto_find_batch_size": needless(_MEMORY),
    "torch_compile": needless("olpack compiles its own kernels."),
    "deepspeed": lost(_DISTRIBUTED),
    "fsdp": lost(_DISTRIBUTED),
    "fsdp_config": lost(_DISTRIBUTED),
    **dict.fromkeys(("ddp_timeout", "ddp_find_unused_parameters"), needless(_DISTRIBUTED)),
    **dict.fromkeys(
        ("dataloader_num_workers", "dataloader_pin_memory", "dataset_num_proc", "remove_unused_columns", "dataset_kwargs"), needless(_LOADING)
    ),
    **dict.fromkeys(
        (
            "logging_steps",
            "logging_strategy",
            "logging_first_step",
            "logging_dir",
            "save_steps",
            "save_strategy",
            "save_total_limit",
            "save_only_model",
        ),
        needless(_OWN_FILES),
    ),
}
"""Names of transformers' TrainingArguments."""
