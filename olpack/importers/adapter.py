"""An adapter that another tool trained: the folder that peft's `save_pretrained` writes."""

from __future__ import annotations

from olpack import bounded_json
from olpack.export.adapter import adapter_files
from olpack.importers.draft import Draft, Given, line_of
from olpack.workspace import named_from

_MOST_BYTES = 16 << 20
_OF_THE_ADAPTER = (
    "peft_type",
    "r",
    "lora_alpha",
    "lora_dropout",
    "use_rslora",
    "use_dora",
    "target_modules",
    "modules_to_save",
    "bias",
    "init_lora_weights",
)
TABLE = (
    ("the folder", "train.adapter", "A build copies adapter_config.json and adapter_model.safetensors."),
    ("base_model_name_or_path", "base", "A folder here, or a Hub id; else --base names it."),
    ("revision", "revision", "Of a base on the Hub."),
    (", ".join(_OF_THE_ADAPTER), "", "They stay in the adapter."),
    (
        "chat_template.jinja, tokenizer_config.json",
        "",
        "olpack serves the base's chat template; `olpack plan` warns if the adapter's writes a held-out row otherwise.",
    ),
    ("training_args.bin", "", "A pickle, which olpack does not open."),
)
"""What becomes of each field and file, for the documentation: (field, recipe key, note)."""


def read(draft: Draft) -> None:
    """Read the configuration of an adapter.

    Raises:
        OlpackError: it is none, or not complete.
    """
    folder = draft.file
    config, _tensors = adapter_files(folder)
    for file in (config, folder / "chat_template.jinja"):
        bounded_json.check_regular(file)
    text = config.read_text(encoding="utf-8", errors="replace") if config.stat().st_size <= _MOST_BYTES else ""
    settings = bounded_json.read_object(config, "Save the adapter again.", most=_MOST_BYTES)

    def given(key: str) -> Given:
        line = line_of(text, key)
        return Given(f"{config.name}:{line}" if line else config.name, key, settings[key])

    draft.carry(Given(folder.name, "adapter", str(folder)), {"train.adapter": named_from(draft.folder, str(folder))}, "A build copies it.")
    if settings.get("base_model_name_or_path"):
        draft.base(given("base_model_name_or_path"), settings["base_model_name_or_path"])
    if settings.get("revision"):
        draft.carry(given("revision"), {"revision": settings["revision"]})
    for key in _OF_THE_ADAPTER:
        if settings.get(key) not in (None, False, [], ""):
            draft.need_not(given(key), "It stays in the adapter.")
    if any((folder / name).is_file() for name in ("chat_template.jinja", "tokenizer_config.json")):
        draft.need_not(
            Given(folder.name, "chat template", None),
            "olpack serves the base's; `olpack plan` warns if the adapter's writes a held-out row otherwise.",
        )
    if (folder / "training_args.bin").is_file():
        draft.need_not(Given(folder.name, "training_args.bin", None), "It is a pickle, which olpack does not open.")
