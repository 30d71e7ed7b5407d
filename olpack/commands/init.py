"""The recipe of a new package."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import yaml

from olpack.data.records import SUFFIXES
from olpack.deploy.names import check_name
from olpack.errors import OlpackError
from olpack.model.base import HUB_FILE, OF_SERVER
from olpack.model.gguf_files import is_gguf
from olpack.recipe import Data, Recipe
from olpack.templating import render
from olpack.workspace import HUB_ID, check_package, named_from, template_source, write_atomically

PARAMETERS = {"num_predict": 1024, "repeat_penalty": 1.05}
"""What a new recipe serves with: an answer that comes to repeat itself is made less likely, and ends."""

TEMPLATES = {"en": "recipe.yaml.j2", "ar": "recipe.ar.yaml.j2"}
"""The template of a recipe with comments in each language."""


def new_recipe(name: str) -> Path:
    """Where the recipe of a package will be that is not there yet.

    Raises:
        OlpackError: the name cannot be one, or the recipe is there already.
    """
    check_package(name)
    check_name(name, tagged=False)
    path = Path("modelfiles") / name / "recipe.yaml"
    if path.exists():
        raise OlpackError(f"{path} is there already.", "Edit it, or take another name.")
    return path


def write_recipe(path: Path, base: str, train: str, system: str | None = None, lang: str = "en") -> None:
    """Write a recipe, commented, with the settings that are changed most.

    Args:
        path: of `new_recipe`.
        base: `builtin/tiny-coder`, a folder, a GGUF, a Hub id, a GGUF of the Hub, or a model of the Ollama server. On one of the server and on a
            GGUF the package is an adapter: no copy of the base is made.
        train: a file or folder of rows, or a data set on the Hub.
        system: the system prompt.
        lang: language of the comments, of `TEMPLATES`.

    Raises:
        OlpackError: there is no such folder or file, the server has no such model, or the recipe cannot be written.
    """
    folder = path.parent
    on_file = base.startswith(OF_SERVER) or base.endswith(".gguf") or _is_gguf(base)
    base = base_from(folder, base)
    hub = not _is(Path.exists, train)
    if hub and (not HUB_ID.fullmatch(train) or set(SUFFIXES).intersection(Path(train).suffixes)):
        raise OlpackError(f"There is no {train} here.", "Name a file or a folder of rows, or a data set on the Hub as owner/name.")
    settings = Recipe(base=base, data=Data(train=train if hub else named_from(folder, train)))
    text = render(
        template_source(TEMPLATES[lang]),
        TEMPLATES[lang],
        "The recipe's template",
        filters={"quoted": quoted},
        name=folder.name,
        settings=settings,
        hub=hub,
        on_file=on_file,
        system=system,
        parameters=PARAMETERS,
    )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OlpackError(f"{folder} cannot be made: {error.strerror}.", "Begin a package where you may write.") from None
    write_atomically(path, text)


def base_from(folder: Path, base: str) -> str:
    """A base that was named from the working folder, as a recipe in `folder` names it.

    Raises:
        OlpackError: it is a folder that is not there, or a model that the server has not.
    """
    if base.startswith(OF_SERVER):
        from olpack.deploy.tag_bases import find_tag

        find_tag(base.removeprefix(OF_SERVER))
        return base
    here = _is(Path.is_dir, base) or _is_gguf(base)
    if not here and not base.startswith("builtin/") and not HUB_ID.fullmatch(base) and not HUB_FILE.fullmatch(base):
        raise OlpackError(
            f"There is no folder {base} here, and no GGUF of that name.",
            "Name a folder, a GGUF, ollama/NAME for a model of the server, a model on the Hub as owner/name, or builtin/tiny-coder.",
        )
    return named_from(folder, base) if here else base


def _is_gguf(base: str) -> bool:
    return _is(Path.is_file, base) and is_gguf(Path(base).expanduser())


def quoted(text: str) -> str:
    """A text as YAML reads it back."""
    return yaml.safe_dump(text, default_style='"', allow_unicode=True, width=float("inf")).strip()


def _is(test: Callable[[Path], bool], given: str) -> bool:
    try:
        return test(Path(given).expanduser())
    except (OSError, RuntimeError, ValueError):  # a name that is too long, another user's home that is not there, a null
        return False
