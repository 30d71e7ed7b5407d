"""The recipe of a new package."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

from olpack.deploy.names import check_name
from olpack.errors import OlpackError
from olpack.recipe import Data, Recipe
from olpack.workspace import template_source, write_atomically

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def write_recipe(name: str, base: str, train: str, system: str | None = None) -> Path:
    """Write `modelfiles/NAME/recipe.yaml`, commented, with the settings that are changed most.

    Args:
        name: of the package.
        base: `builtin/tiny-coder`, a folder, or a Hub id.
        train: a file or folder of rows, or a data set on the Hub.
        system: the system prompt.

    Returns:
        where it is.

    Raises:
        OlpackError: the name cannot be one, the recipe is there already, or there is no such folder or file.
    """
    import jinja2

    if Path(name).name != name:
        raise OlpackError(f"{name!r} cannot be the name of a package.", "A package is a folder in modelfiles/, such as coding-assistant.")
    check_name(name, tagged=False)
    path = Path("modelfiles") / name / "recipe.yaml"
    if path.exists():
        raise OlpackError(f"{path} is there already.", "Edit it, or take another name.")
    base, _ = _place(base, path.parent, "model")
    train, hub = _place(train, path.parent, "training rows")
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, undefined=jinja2.StrictUndefined)
    environment.filters["quoted"] = lambda text: json.dumps(text, ensure_ascii=False)
    settings = Recipe(base=base, data=Data(train=train))
    text = environment.from_string(template_source("recipe.yaml.j2")).render(name=name, settings=settings, hub=hub, system=system)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, text)
    return path


def _place(given: str, folder: Path, what: str) -> tuple[str, bool]:
    """(how a recipe in `folder` names it, whether it is on the Hub): what lies here by its path from there."""
    found = Path(given).expanduser()
    if found.exists():
        return (str(found) if found.is_absolute() else os.path.relpath(found, folder)), False
    if given.startswith("builtin/"):
        return given, False
    if _HUB_ID.fullmatch(given) and not found.suffix.lower().startswith((".json", ".csv", ".tsv", ".parquet")):
        return given, True
    raise OlpackError(f"There is no {given} here for the {what}.", "Name a file or a folder, or something on the Hub as owner/name.")
