"""From a file and `--set` to a `Recipe`, with the line of each setting, and each error as a sentence with its place."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from olpack import bounded_yaml
from olpack.deploy.names import check_name
from olpack.errors import OlpackError
from olpack.recipe.schema import Recipe

_SHOWN = 20  # problems listed before "and N more"
_ODD = re.compile("[\ud800-\udfff\0]")


def load(path: Path, overrides: list[str] | None = None) -> Recipe:
    """Read a recipe and check it.

    Args:
        path: the `recipe.yaml`; the package is called like its folder.
        overrides: "train.epochs=3", values in YAML's notation, each replacing what the file says.

    Raises:
        OlpackError: every problem of the file, each with its line.
    """
    name = path.parent.resolve().name
    check_name(name, tagged=False)
    document, lines = bounded_yaml.read(path)
    if not isinstance(document, dict):
        raise OlpackError(f"{path} must contain settings such as `base: builtin/tiny-coder`.")
    origins = {key: f"{path.name}:{line}" for key, line in lines.items()}
    return _checked(document, overrides, name, path, lines, origins)


def of_data(file: Path, base: str, overrides: list[str] | None = None) -> Recipe:
    """A recipe of only a data file and a base, to check the data with.

    Raises:
        OlpackError: an override is wrong.
    """
    return _checked({"base": base, "data": {"train": str(file)}}, overrides, file.stem, Path("recipe.yaml"), {}, {})


def _checked(document: dict[str, Any], overrides: list[str] | None, name: str, path: Path, lines: dict[str, int], origins: dict[str, str]) -> Recipe:
    for override in overrides or []:
        key = _apply_override(document, override)
        origins[key] = "--set"
    _refuse_odd_characters(document, "", path, lines)
    try:
        recipe = Recipe.model_validate(document)
    except ValidationError as error:
        found = error.errors()
        problems = [_sentence(item, path, lines, origins) for item in found[:_SHOWN]]
        raise OlpackError("\n".join(problems + ([f"and {len(found) - _SHOWN} more"] if len(found) > _SHOWN else []))) from None
    recipe._name, recipe._folder, recipe._origins = name, path.parent, origins
    return recipe


def _refuse_odd_characters(value: Any, key: str, path: Path, lines: dict[str, int]) -> None:
    """Refuse texts that no file and no path can contain: half of a character, as "\\ud800" writes it, and the character of the number 0."""
    if isinstance(value, dict):
        for name, inner in value.items():
            _refuse_odd_characters(name, key, path, lines)
            _refuse_odd_characters(inner, f"{key}.{name}" if key else str(name), path, lines)
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            _refuse_odd_characters(inner, f"{key}.{number}", path, lines)
    elif isinstance(value, str) and (odd := _ODD.search(value)):
        place = f"{path}, line {lines[key]}" if key in lines else str(path)
        what = f"'{key}'" if key else "a key"
        raise OlpackError(f"{place}: {what} contains the character {odd[0]!r}, which no text has.", "Write the text without it.")


def _apply_override(document: dict[str, Any], override: str) -> str:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise OlpackError(f"--set {override!r} is not of the form key=value.", "For example: --set train.epochs=3")
    try:
        bounded_yaml.check(text, f"--set {_shortened(key)}")
        value = yaml.load(text, bounded_yaml.Loader)
    except yaml.YAMLError:
        value = text
    place = document
    *parents, last = key.split(".")
    if len(parents) >= bounded_yaml.MOST_LEVELS:
        raise OlpackError(f"--set {_shortened(key)}: no setting has that many levels.", "For example: --set train.epochs=3")
    for parent in parents:
        if place.get(parent) is None:  # `train:` with nothing below it is a section in which nothing is set
            place[parent] = {}
        place = place[parent]
        if isinstance(place, list):
            raise OlpackError(f"--set {key}: '{parent}' is a list, whose values have no names.", f"Set the whole list: --set {parent}=[…]")
        if not isinstance(place, dict):
            raise OlpackError(f"--set {key}: '{parent}' is a single value, it has no settings inside.")
    place[last] = value
    return key


# Names that Axolotl, LLaMA-Factory, Unsloth and peft have for keys of a recipe, and that resemble another key or none.
_OF_OTHER_TOOLS = {
    "lora_r": "rank",
    "lora_rank": "rank",
    "r": "rank",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "lora_target": "target_modules",
    "lora_target_modules": "target_modules",
    "lr": "learning_rate",
    "lr_scheduler": "schedule",
    "lr_scheduler_type": "schedule",
    "num_epochs": "epochs",
    "num_train_epochs": "epochs",
    "warmup_ratio": "warmup",
    "gradient_accumulation_steps": "batch_size",
    "per_device_train_batch_size": "batch_size",
    "micro_batch_size": "micro_batch_tokens",
    "random_state": "seed",
    "base_model": "base",
    "model_name_or_path": "base",
    "sequence_len": "max_length",
    "cutoff_len": "max_length",
    "max_seq_length": "max_length",
    "val_set_size": "eval_share",
}


def _shortened(text: str) -> str:
    return text if len(text) <= 200 else f"{text[:200]}…"


def _sentence(item: ErrorDetails, path: Path, lines: dict[str, int], origins: dict[str, str]) -> str:
    """One of pydantic's errors as a sentence with its place and the nearest known key."""
    parts = [str(part) for part in item["loc"]]
    fields = [part for part in parts if part not in ("constrained-int", "constrained-float", "int", "float", "bool", "str", "source")]
    fields = [part for part in fields if not part.startswith(("literal[", "list["))]
    key = ".".join(fields)
    known = next((".".join(fields[:n]) for n in range(len(fields), 0, -1) if ".".join(fields[:n]) in origins), "")
    if origins.get(known) == "--set":
        place = f"--set {known}"
    else:
        place = f"{path}, line {lines[known]}" if known in lines else str(path)
    if item["type"] == "extra_forbidden":
        keys = _keys_of(fields[:-1])
        near = [key for key in (_OF_OTHER_TOOLS.get(fields[-1]),) if key in keys] or difflib.get_close_matches(fields[-1], keys, n=1, cutoff=0.5)
        hint = f"Did you mean '{near[0]}'?" if near else f"Known here: {', '.join(keys)}."
        return f"{place}: unknown key '{key}'. {hint}"
    if item["type"] == "missing":
        return f"{place}: '{key}' is missing: {_section(fields[:-1]).model_fields[fields[-1]].description}"
    message = item["msg"].removeprefix("Value error, ").rstrip(".")
    got = "" if item["type"] == "value_error" else f", not {_shortened(repr(item['input']))}"
    subject = f"'{key}': " if key else ""
    return f"{place}: {subject}{message}{got}."


def _section(fields: list[str]) -> type[BaseModel]:
    model: type[BaseModel] = Recipe
    for field in fields:
        if field in model.model_fields:
            model = next(_sections(model.model_fields[field].annotation), model)
    return model


def _sections(annotation: Any) -> Iterator[type[BaseModel]]:
    """The sections in a field's type, also inside a list or a union."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        yield from _sections(inner)


def _keys_of(fields: list[str]) -> list[str]:
    return list(_section(fields).model_fields)
