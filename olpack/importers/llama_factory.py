"""LLaMA-Factory: the YAML or JSON of `llamafactory-cli train`, and of `llamafactory-cli export`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from olpack import bounded_json
from olpack.errors import OlpackError
from olpack.export.adapter import adapter_files
from olpack.importers.draft import Draft, Given, Rule, by, copied, lost, needless, switch
from olpack.importers.trainer import (
    ACCUMULATION,
    EPOCHS,
    MICRO_BATCH,
    NO_TOKENS,
    OWN_KERNELS,
    SCHEDULE,
    TRAINER_RULES,
    batch,
    default_batch,
    default_epochs,
    share,
)
from olpack.workspace import named_from

_BATCH = (MICRO_BATCH, ACCUMULATION), (8, 1)
_INFO = "dataset_info.json"
_MOST_BYTES, _MOST_SETS = 16 << 20, 1_000
_ALPACA = {"prompt": "instruction", "query": "input", "response": "output", "system": "system", "history": "history", "tools": "tools"}
_SHAREGPT_TAGS = {
    "role_tag": "from",
    "content_tag": "value",
    "user_tag": "human",
    "assistant_tag": "gpt",
    "observation_tag": "observation",
    "function_tag": "function_call",
    "system_tag": "system",
}
_CHAT_TAGS = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant", "system_tag": "system"}
_TEMPLATE = "olpack trains and serves the base's own chat template; `olpack data show NAME 1` prints a row as the model reads it."
_OTHER_TRAINING = "olpack trains adapters: LoRA, rsLoRA, DoRA and VeRA (train.method)."


def read(draft: Draft, document: dict[str, Any], lines: Mapping[str, int]) -> None:
    """Read a configuration.

    Raises:
        OlpackError: it trains on preferences or rewards.
    """
    stage = document.get("stage", "sft")
    if stage not in ("sft", "pt"):
        raise OlpackError(
            f"{draft.file} trains with stage: {stage}, and olpack fine-tunes on rows with their answers (SFT).",
            "Train with LLaMA-Factory, then import the folder of the adapter.",
        )
    given = [Given(draft.place(lines.get(str(key))), str(key), value) for key, value in document.items()]
    trained = "adapter_name_or_path" in document and not document.get("do_train") and not document.get("dataset")
    draft.read(given, RULES | (_FINISHED if trained else {}))
    if "train.adapter" in draft.settings:
        return
    default_batch(draft, *_BATCH)
    default_epochs(draft, EPOCHS, 3)
    draft.default({"train.rank": 8}, "lora_rank", 8)
    if rank := draft.settings.get("train.rank"):
        draft.default({"train.alpha": 2 * rank}, "lora_alpha", 2 * rank)
    draft.default({"train.learning_rate": 5e-5}, "learning_rate", 5e-5)
    if SCHEDULE not in draft.given:
        draft.default({"train.schedule": "linear"}, SCHEDULE, "linear")
    if not draft.given.keys() & {"warmup_ratio", "warmup_steps"}:
        draft.default({"train.warmup": 0}, "warmup_steps", 0)
    if "quantization_bit" not in draft.given:
        draft.default({"train.quantization": "none"}, "quantization_bit", None)
    draft.default({"train.seed": 42}, "seed", 42)
    draft.default({"train.keep": "last"}, "load_best_model_at_end", False)


def _stage(draft: Draft, given: Given) -> None:
    if given.value == "pt":
        draft.carry(given, {"data.form": "text"}, "Each row is one text without a chat template.")
    else:
        draft.need_not(given, "olpack fine-tunes on rows with their answers (SFT).")


def _adapter(draft: Draft, given: Given) -> None:
    draft.lose(given, "A build begins with a new adapter. A finished one is named as train.adapter: import its folder.")


def _finished(draft: Draft, given: Given) -> None:
    place = draft.near(given.value) if isinstance(given.value, str) else None
    if place is None:
        raise OlpackError(
            f"{given.place}: there is no folder {given.value} in the working folder or beside {draft.file.name}.", "Import the adapter's folder."
        )
    adapter_files(place)
    draft.carry(given, {"train.adapter": named_from(draft.folder, str(place))}, "The adapter is trained: a build copies it.")


def _method(draft: Draft, given: Given) -> None:
    if given.value == "lora":
        draft.need_not(given, "olpack trains LoRA by default.")
    else:
        draft.lose(given, _OTHER_TRAINING)


def _modules(key: str):
    def read(draft: Draft, given: Given) -> None:
        names = [name.strip() for name in given.value.split(",")] if isinstance(given.value, str) else given.value
        draft.carry(given, {key: "all-linear" if names == ["all"] else names})

    return read


def _bits(draft: Draft, given: Given) -> None:
    method = str(draft.value("quantization_method", "bnb"))
    four = str(draft.value("quantization_type", "nf4"))
    found = {("bnb", 4): four, ("bitsandbytes", 4): four, ("bnb", 8): "int8", ("bitsandbytes", 8): "int8", ("hqq", 4): "hqq4", ("hqq", 8): "hqq8"}
    if isinstance(given.value, int) and (quantization := found.get((method, given.value))):
        draft.carry(given, {"train.quantization": quantization}, f"With quantization_method: {method}.")
    else:
        draft.lose(given, "olpack quantizes the base to nf4, fp4, int8, hqq4 or hqq8 (train.quantization).")


def _rows(to: str):
    def read(draft: Draft, given: Given) -> None:
        names = [name.strip() for name in given.value.split(",")] if isinstance(given.value, str) else given.value
        if not isinstance(names, list) or len(names) > _MOST_SETS:
            draft.lose(given, f"It is no list of up to {_MOST_SETS:,} names.")
            return
        where = str(draft.value("dataset_dir", "data"))
        folder = draft.near(where)
        info = folder / _INFO if folder else None
        if info is None or not info.is_file():
            draft.lose(given, f"There is no {_INFO} in {where}, which describes the data set.")
            return
        described = bounded_json.read_object(info, "It describes LLaMA-Factory's data sets.", most=_MOST_BYTES)
        found = [source for name in names if (source := _source(draft, given, str(name), info, described.get(str(name))))]
        plain = [source["file"] if source.keys() == {"file"} else source for source in found]
        if plain:
            draft.carry(given, {to: plain[0] if len(plain) == 1 else plain}, f"By {_INFO}.")

    return read


def _source(draft: Draft, given: Given, name: str, info: Path, entry: Any) -> dict[str, Any] | None:
    """One data set as its entry in dataset_info.json describes it; what is set of it besides goes into the outcomes."""
    if not isinstance(entry, dict):
        draft.lose(given, f"{info} has no data set '{name}'.")
        return None
    about = {key: Given(f"{_INFO}: {name}", key, value) for key, value in entry.items() if value not in (None, "", [], {})}
    if entry.get("ranking"):
        draft.lose(about["ranking"], "Its rows are preferences, and olpack trains on answers.")
        return None
    form = _form(draft, entry, about)
    if "hf_hub_url" in about:
        hub = {to: str(entry[key]) for key, to in (("split", "split"), ("subset", "subset")) if entry.get(key)}
        source = draft.source(about["hf_hub_url"], entry["hf_hub_url"], form=form, **hub)
    elif "file_name" in about:
        near = info.parent / str(entry["file_name"])
        source = draft.source(about["file_name"], str(near) if near.exists() else entry["file_name"], form=form)
    else:
        draft.lose(given, f"{info} names neither file_name nor hf_hub_url for '{name}'.")
        return None
    for key in ("num_samples", "folder"):
        if key in about:
            draft.lose(about[key], "A source is read as a whole; of a data set on the Hub `split` can be a part: train[:1000].")
    return source


def _table(entry: dict[str, Any], key: str) -> dict[str, Any]:
    """A part of an entry that is a table of names; empty where it is none."""
    value = entry.get(key)
    return value if isinstance(value, dict) else {}


def _form(draft: Draft, entry: dict[str, Any], about: dict[str, Given]) -> str | None:
    kind = entry.get("formatting", "alpaca")
    columns, tags = _table(entry, "columns"), _table(entry, "tags")
    if draft.value("stage") == "pt":
        given = about.get("columns") or Given(f"{_INFO}", "columns", None)
        if columns.get("prompt") == "text":
            draft.need_not(given, "The form text.")
            return "text"
        draft.lose(given, "olpack reads the text from the key `text`: rename the column.")
        return None
    if media := [key for key in ("images", "videos", "audios") if columns.get(key)]:
        draft.lose(about["columns"], f"olpack trains on text, and the rows have {', '.join(media)}.")
        return None
    if kind == "alpaca":
        given = about.get("formatting") or Given(about["columns"].place if "columns" in about else f"{_INFO}", "formatting", "alpaca")
        if all(value == _ALPACA.get(key, value) for key, value in columns.items()):
            draft.need_not(given, "The form alpaca. An empty line stands between instruction and input; LLaMA-Factory writes a line break.")
            return "alpaca"
        draft.lose(about["columns"], f"olpack reads the keys {', '.join(_ALPACA.values())}: rename the columns.")
        return None
    messages, named = columns.get("messages", "conversations"), _SHAREGPT_TAGS | tags
    form = None
    if messages == "messages" and all(named[key] == value for key, value in _CHAT_TAGS.items()):
        form = "chat"
    elif messages in ("conversations", "messages") and all(named[key] == value for key, value in _SHAREGPT_TAGS.items()):
        form = "sharegpt"
    if form:
        draft.need_not(about["formatting"], f"The form {form}.")
        return form
    reads = "olpack reads `messages` with role and content, or `conversations` with from and value: rename the keys."
    draft.lose(about.get("tags") or about.get("columns") or about["formatting"], reads)
    return None


def _max_samples(draft: Draft, given: Given) -> None:
    draft.lose(given, f"A file is read as a whole; of a data set on the Hub `split` can be a part: train[:{given.value}].")


def _on_prompt(draft: Draft, given: Given) -> None:
    if given.value is False:
        draft.need_not(given, "Target tokens are the assistant's turns.")
    else:
        draft.lose(given, "Target tokens are the assistant's turns alone.")


def _packing(draft: Draft, given: Given) -> None:
    crosses = given.key == "packing" and given.value is True and draft.value("neat_packing") is not True
    differs = " In LLaMA-Factory it does, without neat_packing." if crosses else ""
    draft.need_not(given, f"Rows are packed without padding, and attention does not cross rows.{differs}")


def _early(draft: Draft, given: Given) -> None:
    draft.carry(given, {"train.patience": given.value}, "Evaluations in a row without a lower loss.")


def _pissa_iterations(draft: Draft, given: Given) -> None:
    draft.need_not(given, "olpack's decomposition makes four passes.")


def _checkpointing_off(draft: Draft, given: Given) -> None:
    draft.carry(given, {"train.gradient_checkpointing": given.value is not True})


def _revision(draft: Draft, given: Given) -> None:
    if given.value == "main":
        draft.need_not(given, "It is the default.")
    else:
        draft.carry(given, {"revision": given.value})


def _system(draft: Draft, given: Given) -> None:
    draft.carry(given, {"modelfile.system": given.value}, "The server answers with it. Training rows without a system turn are read without one.")


def _double(draft: Draft, given: Given) -> None:
    draft.carry(given, {"train.double_quantization": given.value})


_FINISHED: dict[str, Rule] = {"adapter_name_or_path": by(_finished, "train.adapter")}

RULES: dict[str, Rule] = {
    "model_name_or_path": by(lambda draft, given: draft.base(given, given.value), "base"),
    "model_revision": by(_revision, "revision"),
    "adapter_name_or_path": by(_adapter, "train.adapter", "In a file that trains nothing (`llamafactory-cli export`)."),
    "stage": by(_stage, "data.form", "`pt`: text. Stages other than sft and pt are refused."),
    "finetuning_type": by(_method, "", _OTHER_TRAINING),
    "dataset": by(
        _rows("data.train"), "data.train", "By dataset_info.json: file_name or hf_hub_url, split, subset; formatting, columns and tags as form."
    ),
    "eval_dataset": by(_rows("data.eval"), "data.eval", "As dataset."),
    "dataset_dir": needless("It is where dataset_info.json was looked for."),
    "template": lost(_TEMPLATE),
    "enable_thinking": lost(_TEMPLATE),
    "default_system": by(_system, "modelfile.system"),
    "cutoff_len": copied("data.max_length", "A longer row is an error with its line; LLaMA-Factory cuts it."),
    "max_samples": by(_max_samples, "", "A file is read as a whole; of a data set on the Hub `split` can be a part."),
    "val_size": by(share, "data.eval_share"),
    "mask_history": switch("data.learn", "last", off="Target tokens are all turns of the assistant."),
    "train_on_prompt": by(_on_prompt, "", "Target tokens are the assistant's turns alone."),
    "packing": by(_packing, "", "Rows are packed without padding, and attention does not cross rows."),
    "neat_packing": by(_packing, "", "Rows are packed without padding, and attention does not cross rows."),
    "mix_strategy": lost("Sources are read one after the other and shuffled; `weight` of a source gives how often."),
    "interleave_probs": lost("Sources are read one after the other and shuffled; `weight` of a source gives how often."),
    "streaming": lost("olpack reads all rows before it trains."),
    "infer_backend": needless("Ollama serves the model."),
    "tool_format": lost("The base's chat template writes tools and calls."),
    "quantization_bit": by(_bits, "train.quantization"),
    "quantization_method": needless("It is read with quantization_bit."),
    "quantization_type": needless("It is read with quantization_bit."),
    "double_quantization": by(_double, "train.double_quantization"),
    "lora_rank": copied("train.rank"),
    "lora_alpha": copied("train.alpha"),
    "lora_dropout": copied("train.dropout"),
    "lora_target": by(_modules("train.target_modules"), "train.target_modules", "`all` is all-linear."),
    "additional_target": by(_modules("train.modules_to_save"), "train.modules_to_save"),
    "use_rslora": switch("train.method", "rslora"),
    "use_dora": switch("train.method", "dora"),
    "pissa_init": switch("train.initialization", "pissa"),
    "pissa_iter": by(_pissa_iterations, "", "olpack's decomposition makes four passes."),
    "pissa_convert": needless("olpack writes an adapter that fits the original base."),
    "create_new_adapter": needless("A build begins with a new adapter."),
    "loraplus_lr_ratio": lost("olpack has one learning rate."),
    MICRO_BATCH: by(batch(*_BATCH), "train.batch_size", f"{MICRO_BATCH} × {ACCUMULATION}."),
    ACCUMULATION: by(batch(*_BATCH), "train.batch_size", f"{MICRO_BATCH} × {ACCUMULATION}."),
    "disable_gradient_checkpointing": by(_checkpointing_off, "train.gradient_checkpointing"),
    "early_stopping_steps": by(_early, "train.patience"),
    "resize_vocab": lost(NO_TOKENS),
    "add_tokens": lost(NO_TOKENS),
    "add_special_tokens": lost(NO_TOKENS),
    "new_special_tokens_config": lost(NO_TOKENS),
    "rope_scaling": lost("olpack leaves the base's positions as they are."),
    "shift_attn": lost("olpack computes full attention."),
    "use_galore": lost("olpack trains with AdamW."),
    "use_apollo": lost("olpack trains with AdamW."),
    "use_badam": lost("olpack trains with AdamW."),
    "use_adam_mini": lost("olpack trains with AdamW."),
    "use_muon": lost("olpack trains with AdamW."),
    "trust_remote_code": lost("olpack runs no code that a model contains."),
    **dict.fromkeys(("hf_hub_token", "ms_hub_token", "om_hub_token"), needless("huggingface_hub's own login, or HF_TOKEN, is used.")),
    **dict.fromkeys(
        ("flash_attn", "use_unsloth", "use_unsloth_gc", "enable_liger_kernel", "use_reentrant_gc", "upcast_layernorm"), needless(OWN_KERNELS)
    ),
    **dict.fromkeys(
        ("overwrite_cache", "preprocessing_num_workers", "preprocessing_batch_size", "cache_dir", "use_fast_tokenizer", "low_cpu_mem_usage"),
        needless("It decides how data and model are loaded, not what is trained."),
    ),
    **dict.fromkeys(
        ("plot_loss", "include_num_input_tokens_seen", "print_param_status", "compute_accuracy"),
        needless("The report has the loss curve and the counts of tokens."),
    ),
    **dict.fromkeys(("export_dir", "export_size", "export_device", "export_legacy_format"), needless("A build writes its files into build/NAME.")),
    "use_swanlab": lost("olpack sends nothing unless it is asked to. Its trackers are tensorboard and wandb (train.trackers)."),
    **TRAINER_RULES,
}
"""Names of LLaMA-Factory's settings."""
