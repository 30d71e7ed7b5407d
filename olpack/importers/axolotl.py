"""Axolotl: the YAML of `axolotl train`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from olpack.errors import OlpackError
from olpack.importers.draft import Draft, Given, Rule, by, copied, lost, needless, switch
from olpack.importers.trainer import (
    NO_TOKENS,
    OWN_KERNELS,
    TRAINER_RULES,
    batch,
    default_batch,
    default_epochs,
    epochs,
    is_number,
    optimizer,
    schedule,
    share,
)

_BATCH = ("micro_batch_size", "gradient_accumulation_steps"), (1, 1)
_SHAREGPT = {"role": "from", "content": "value"}
_CHAT = {"role": "role", "content": "content"}
_OWN_TEMPLATE = (
    "olpack trains and serves the base's own chat template. The nearest way: copy the base into a folder, put the template there as "
    "chat_template.jinja, and name that folder as `base`."
)
_SPECIAL = "olpack takes the special tokens of the base's tokenizer."
_WANDB = "olpack sends nothing unless it is asked to. The nearest setting is train.trackers: [wandb]."
_MULTI = "The nearest settings are train.gpus and train.sharding."
_PREPARED = "olpack reads the rows at each build, and keeps no prepared copy."


def read(draft: Draft, document: dict[str, Any], lines: Mapping[str, int]) -> None:
    """Read a configuration.

    Raises:
        OlpackError: it trains on preferences or rewards.
    """
    if document.get("rl") or document.get("reward_model") or document.get("process_reward_model"):
        raise OlpackError(
            f"{draft.file} trains with {document.get('rl') or 'a reward model'}, and olpack fine-tunes on rows with their answers (SFT).",
            "Train with Axolotl, then import the folder of the adapter.",
        )
    draft.read((Given(draft.place(lines.get(str(key))), str(key), value) for key, value in document.items()), _rules(lines))
    default_batch(draft, *_BATCH)
    default_epochs(draft, "num_epochs", 1)
    draft.default({"data.max_length": 512}, "sequence_len", 512)
    if "adapter" not in draft.given:
        draft.lose(Given(draft.place(None), "adapter", None), "Without an adapter Axolotl trains all weights. olpack trains an adapter.")


def _rules(lines: Mapping[str, int]) -> dict[str, Rule]:
    def sources(draft: Draft, given: Given) -> None:
        _sources(draft, given, lines)

    return RULES | {"datasets": by(sources, ""), "test_datasets": by(sources, "")}


def _sources(draft: Draft, given: Given, lines: Mapping[str, int]) -> None:
    """`datasets` become `data.train`, `test_datasets` become `data.eval`."""
    found, paths = [], []
    for number, entry in enumerate(given.value if isinstance(given.value, list) else [given.value]):
        name = f"{given.key}.{number}"
        if not isinstance(entry, dict):
            draft.lose(Given(draft.place(lines.get(name)), f"{given.key}[{number}]", entry), "It is no data set with a path.")
            continue
        settings = {str(key): Given(draft.place(lines.get(f"{name}.{key}")), f"{given.key}[{number}].{key}", value) for key, value in entry.items()}
        settings = {key: one for key, one in settings.items() if one.value not in (None, "", [], {})}
        if source := _source(draft, settings):
            found.append(source)
            paths.append(settings["path"])
    if paths:
        key = "data.train" if given.key == "datasets" else "data.eval"
        plain = [source["file"] if source.keys() == {"file"} else source for source in found]
        shown = Given(paths[0].place, given.key, [path.value for path in paths])
        draft.carry(shown, {key: plain[0] if len(plain) == 1 else plain})


def _source(draft: Draft, settings: dict[str, Given]) -> dict[str, Any] | None:
    """One data set as a source; what else is set of it goes into the outcomes."""
    path = settings.get("path")
    if path is None:
        return None
    files = settings.get("data_files")
    form, notes = _form(draft, settings)
    hub = {to: str(settings[key].value) for key, to in (("split", "split"), ("name", "subset"), ("revision", "revision")) if key in settings}
    listed = files.value if files and isinstance(files.value, list) else [files.value] if files else []
    if files and len(listed) == 1:
        source = draft.source(files, listed[0], form=form, **hub)
    elif files:
        draft.lose(files, "Name each file as a source of its own.")
        source = None
    else:
        source = draft.source(path, path.value, form=form, **hub)
    for key, given in settings.items():
        if key in ("path", "data_files") or (key in ("split", "name", "revision") and source and "hub" in source):
            continue
        if (rule := _SOURCE_RULES.get(key)) is not None:
            rule.read(draft, given, rule)
        elif key in ("split", "name", "revision"):
            draft.need_not(given, "A file has none.")
        elif key not in _OF_THE_FORM:
            draft.lose(given, "olpack has no such setting of a source.")
    for given, note, kept in notes:
        (draft.need_not if kept else draft.lose)(given, note)
    return source


_OF_THE_FORM = ("type", "field", "field_messages", "message_property_mappings", "message_field_role", "message_field_content")


def _form(draft: Draft, settings: dict[str, Given]) -> tuple[str | None, list[tuple[Given, str, bool]]]:
    """(the form of the rows, None where the rows decide; what to note of each setting, and whether it loses nothing)."""
    given = settings.get("type")
    kind = given.value if given else None
    notes: list[tuple[Given, str, bool]] = []
    if given is None:
        return None, notes
    prompt = "The rows are read. olpack writes them with the base's chat template, and not with the text that Axolotl puts around them."
    if kind in ("alpaca", "alpaca:chat"):
        return "alpaca", [(given, prompt, False)]
    if kind == "completion":
        field = settings.get("field")
        if field is None or field.value == "text":
            return "text", [(given, "Each row is one text without a chat template (form: text).", True)]
        return None, [(field, "olpack reads the text from the key `text`: rename the column.", False)]
    if kind in ("chat_template", "sharegpt"):
        notes.append((given, "olpack writes the rows with the base's chat template.", True))
        default = "conversations" if kind == "sharegpt" else "messages"
        messages = settings["field_messages"].value if "field_messages" in settings else default
        mapping = dict(_SHAREGPT) if kind == "sharegpt" else dict(_CHAT)
        if "message_property_mappings" in settings and isinstance(settings["message_property_mappings"].value, dict):
            mapping |= settings["message_property_mappings"].value
        for key, name in (("message_field_role", "role"), ("message_field_content", "content")):
            if key in settings:
                mapping[name] = settings[key].value
        names = {key: mapping[key] for key in ("role", "content")}
        about = [settings[key] for key in _OF_THE_FORM[2:] if key in settings]
        rest = [f"{key}: {value}" for key, value in mapping.items() if key not in names and key != value]
        if (names == _CHAT and messages == "messages") or (names == _SHAREGPT and messages in ("conversations", "messages")):
            form = "chat" if names == _CHAT else "sharegpt"
            notes += [(one, f"They are the keys of the form {form}.", True) for one in about]
        else:
            form = None
            reads = "olpack reads `messages` with role and content, or `conversations` with from and value: rename the keys."
            notes += [(one, reads, False) for one in about]
        if rest and "message_property_mappings" in settings:
            notes.append((settings["message_property_mappings"], f"olpack renames no keys of a message ({', '.join(rest)}).", False))
        return form, notes
    return None, [
        (given, "olpack has no form of this name; the keys of the rows decide their form, and `olpack data check` lists rows of none.", False)
    ]


_SOURCE_RULES: dict[str, Rule] = {
    "ds_type": needless("The file's name gives its kind."),
    "roles_to_train": Rule("", "", lambda draft, given, rule: _roles(draft, given)),
    "train_on_eos": Rule("", "", lambda draft, given, rule: _end(draft, given)),
    "train_on_eot": Rule("", "", lambda draft, given, rule: _end(draft, given)),
    "chat_template": Rule("", "", lambda draft, given, rule: _template(draft, given)),
    "chat_template_jinja": lost(_OWN_TEMPLATE),
    "preprocess_shards": needless("It decides how rows are prepared, not which."),
    "trust_remote_code": lost("olpack runs no code that a data set contains."),
    "field_tools": Rule("", "", lambda draft, given, rule: _tools(draft, given)),
}


def _roles(draft: Draft, given: Given) -> None:
    roles = given.value if isinstance(given.value, list) else [given.value]
    if all(role in ("assistant", "gpt", "model") for role in roles):
        draft.need_not(given, "Target tokens are the assistant's turns.")
    else:
        draft.lose(given, "Target tokens are the assistant's turns alone; data.learn: last takes the last one of each row.")


def _end(draft: Draft, given: Given) -> None:
    if given.value == "turn":
        draft.need_not(given, "The token that ends a turn of the assistant is a target token.")
    else:
        draft.lose(given, "The token that ends a turn of the assistant is always a target token, and no other one is.")


def _template(draft: Draft, given: Given) -> None:
    if given.value == "tokenizer_default":
        draft.need_not(given, "olpack trains and serves the base's own chat template.")
    else:
        draft.lose(given, _OWN_TEMPLATE)


def _tools(draft: Draft, given: Given) -> None:
    if given.value == "tools":
        draft.need_not(given, "olpack reads tools from this key.")
    else:
        draft.lose(given, "olpack reads tools from the key `tools`: rename the column.")


def _adapter(draft: Draft, given: Given) -> None:
    if given.value in ("lora", "qlora"):
        quantized = draft.value("load_in_4bit") or draft.value("load_in_8bit")
        if not quantized:
            draft.carry(given, {"train.quantization": "none"}, "The base stays in 16 bits.")
        else:
            draft.need_not(given, "olpack trains an adapter; load_in_4bit and load_in_8bit give the quantization of the base.")
    else:
        draft.lose(given, "olpack trains LoRA, rsLoRA, DoRA and VeRA (train.method).")


def _initial(draft: Draft, given: Given) -> None:
    value = given.value
    if value is True:
        draft.need_not(given, "The adapter begins as no change.")
    elif value == "pissa" or (isinstance(value, str) and value.startswith("pissa_niter_")):
        draft.carry(given, {"train.initialization": "pissa"})
    elif value == "loftq":
        draft.carry(given, {"train.initialization": "loftq"})
    else:
        draft.lose(given, "olpack begins with no change, pissa or loftq (train.initialization).")


def _modules(draft: Draft, given: Given) -> None:
    if draft.value("lora_target_linear") is True:
        draft.lose(given, "lora_target_linear takes every linear layer, and olpack adds none to those.")
    else:
        draft.carry(given, {"train.target_modules": given.value})


def _on_inputs(draft: Draft, given: Given) -> None:
    if given.value is False:
        draft.need_not(given, "Target tokens are the assistant's turns.")
    else:
        draft.lose(given, "Target tokens are the assistant's turns alone.")


def _length(draft: Draft, given: Given) -> None:
    how = {"truncate": "cuts", "raise": "refuses"}.get(str(draft.value("excess_length_strategy")), "drops")
    differs = "" if how == "refuses" else f"A longer row is an error with its line; Axolotl {how} it."
    draft.carry(given, {"data.max_length": given.value}, differs)


def _ratio(draft: Draft, given: Given) -> None:
    TRAINER_RULES["warmup_ratio"].read(draft, given, TRAINER_RULES["warmup_ratio"])


def _patience(draft: Draft, given: Given) -> None:
    draft.carry(given, {"train.patience": given.value})


def _per_epoch(draft: Draft, given: Given) -> None:
    count = f"{given.value:g}" if is_number(given.value) else "them"
    draft.lose(given, f"train.eval_every is a number of steps: steps of an epoch / {count}. By default olpack makes ten evaluations.")


RULES: dict[str, Rule] = {
    "base_model": by(lambda draft, given: draft.base(given, given.value), "base"),
    "revision_of_model": copied("revision"),
    "datasets": by(lambda draft, given: None, "data.train", "path, split, name and revision; type as form. `chat_template` is chat or sharegpt."),
    "test_datasets": by(lambda draft, given: None, "data.eval", "As datasets."),
    "val_set_size": by(share, "data.eval_share"),
    "sequence_len": by(_length, "data.max_length", "A longer row is an error with its line; Axolotl drops or cuts it."),
    "excess_length_strategy": needless("A longer row is an error with its line."),
    "adapter": by(_adapter, "train.quantization", "`lora` without load_in_8bit: none."),
    "load_in_4bit": switch("train.quantization", "nf4"),
    "load_in_8bit": switch("train.quantization", "int8"),
    "lora_r": copied("train.rank"),
    "lora_alpha": copied("train.alpha"),
    "lora_dropout": copied("train.dropout"),
    "lora_target_linear": switch("train.target_modules", "all-linear"),
    "lora_target_modules": by(_modules, "train.target_modules"),
    "lora_modules_to_save": copied("train.modules_to_save"),
    "peft_use_dora": switch("train.method", "dora"),
    "peft_use_rslora": switch("train.method", "rslora"),
    "peft_init_lora_weights": by(_initial, "train.initialization"),
    "lora_model_dir": lost("A build begins with a new adapter. A finished one is named as train.adapter: import its folder."),
    "lora_target_parameters": lost("olpack trains linear layers, and no stacks of experts."),
    "lora_fan_in_fan_out": needless("olpack sees how the base stores its layers."),
    "loraplus_lr_ratio": lost("olpack has one learning rate."),
    "micro_batch_size": by(batch(*_BATCH), "train.batch_size", "micro_batch_size × gradient_accumulation_steps."),
    "gradient_accumulation_steps": by(batch(*_BATCH), "train.batch_size", "micro_batch_size × gradient_accumulation_steps."),
    "num_epochs": by(epochs, "train.epochs"),
    "lr_scheduler": by(schedule, "train.schedule", TRAINER_RULES["lr_scheduler_type"].note),
    "cosine_min_lr_ratio": lost("olpack's cosine falls to zero."),
    "cosine_constant_lr_ratio": lost("olpack's cosine falls to zero."),
    "optimizer": by(optimizer, "", "AdamW in any form is olpack's own."),
    "early_stopping_patience": by(_patience, "train.patience"),
    "evals_per_epoch": by(_per_epoch, "", "The nearest setting is train.eval_every."),
    "saves_per_epoch": TRAINER_RULES["save_steps"],
    "train_on_inputs": by(_on_inputs, "", "Target tokens are the assistant's turns alone."),
    "chat_template": by(_template, "", _OWN_TEMPLATE),
    "chat_template_jinja": lost(_OWN_TEMPLATE),
    "default_system_message": lost("The nearest setting is modelfile.system, with which the server answers; rows have their own system turns."),
    "special_tokens": lost(_SPECIAL),
    "tokens": lost(NO_TOKENS),
    "sample_packing": needless("Rows are packed without padding, and attention does not cross rows."),
    "eval_sample_packing": needless("Rows are packed without padding, and attention does not cross rows."),
    "pad_to_sequence_len": needless("Rows are packed without padding, and attention does not cross rows."),
    "dataset_prepared_path": needless(_PREPARED),
    "dataset_processes": needless(_PREPARED),
    "dataset_exact_deduplication": lost("`olpack data check` lists rows that are there twice."),
    "shuffle_merged_datasets": needless("Rows are shuffled by train.seed."),
    "bfloat16": TRAINER_RULES["bf16"],
    "float16": TRAINER_RULES["fp16"],
    **dict.fromkeys(
        ("flash_attention", "sdp_attention", "xformers_attention", "flex_attention", "attn_implementation", "eager_attention", "sage_attention"),
        needless("olpack chooses the attention kernel."),
    ),
    **dict.fromkeys(
        (
            "lora_mlp_kernel",
            "lora_qkv_kernel",
            "lora_o_kernel",
            "plugins",
            "liger_rope",
            "liger_rms_norm",
            "liger_glu_activation",
            "liger_fused_linear_cross_entropy",
            "liger_layer_norm",
            "chunked_cross_entropy",
        ),
        needless(OWN_KERNELS),
    ),
    **dict.fromkeys(
        ("wandb_project", "wandb_entity", "wandb_watch", "wandb_name", "wandb_log_model", "use_wandb", "mlflow_experiment_name"), lost(_WANDB)
    ),
    "use_tensorboard": lost("olpack sends nothing unless it is asked to. The nearest setting is train.trackers: [tensorboard]."),
    **dict.fromkeys(("fsdp_version", "ddp", "sequence_parallel_degree", "tensor_parallel_size", "context_parallel_size"), lost(_MULTI)),
    **dict.fromkeys(
        ("model_type", "tokenizer_type", "is_llama_derived_model", "is_mistral_derived_model", "tokenizer_use_fast"),
        needless("config.json and tokenizer_config.json of the base give it."),
    ),
    "trust_remote_code": lost("olpack runs no code that a model contains."),
    "eot_tokens": needless("olpack finds the token that ends a turn by rendering the base's chat template."),
    "eval_batch_size": TRAINER_RULES["per_device_eval_batch_size"],
    "gptq": needless("config.json of the base gives it."),
    "processor_type": needless("olpack trains the text model alone."),
    "skip_prepare_dataset": needless(_PREPARED),
    "strict": needless("olpack refuses keys that it does not know."),
    "loss_watchdog_threshold": lost("olpack stops at a loss that is no number."),
    "loss_watchdog_patience": lost("olpack stops at a loss that is no number."),
    "activation_offloading": needless("olpack decides by the memory that is there."),
    **{
        key: rule
        for key, rule in TRAINER_RULES.items()
        if key not in ("per_device_eval_batch_size", "num_train_epochs", "lr_scheduler_type", "optim")
    },
}
"""Names of Axolotl's settings."""
