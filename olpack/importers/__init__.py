"""Configurations of other tools, read as a recipe: what each setting becomes, and which has no equal here.

draft = read(Path("axolotl.yml"), Path("modelfiles/support"))
draft.document(), draft.outcomes      # the recipe's sections; one outcome for each setting

Files are data: none is executed, and all are read within bounds.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from olpack import bounded_json, bounded_yaml
from olpack.errors import OlpackError
from olpack.importers import adapter, axolotl, llama_factory, modelfile, unsloth
from olpack.importers.draft import Draft, Given, Outcome, Rule, line_of, plain

__all__ = ["Draft", "Given", "Outcome", "Rule", "name_for", "plain", "read"]

_KINDS = "a YAML of Axolotl or LLaMA-Factory, a script or notebook of Unsloth, a Modelfile, or the folder of an adapter"
_MOST_BYTES = 1 << 20  # of a configuration in JSON
_MOST_OF_A_MODELFILE = 1 << 17


def read(source: Path, folder: Path) -> Draft:
    """Read a file or a folder of another tool.

    Args:
        source: a configuration, a script, a Modelfile, or the folder of an adapter.
        folder: of the package, whose recipe names paths relative to it.

    Raises:
        OlpackError: there is no such file, it is of none of these kinds, cannot be read, or trains in a way that olpack does not.
    """
    bounded_json.check_regular(source)
    if source.is_dir():
        draft = Draft("peft", source, folder)
        adapter.read(draft)
        return draft
    if not source.is_file():
        raise OlpackError(f"There is no {source}.", f"Name {_KINDS}.")
    if source.suffix.lower() in (".py", ".ipynb"):
        draft = Draft("Unsloth", source, folder)
        try:
            unsloth.read(draft)
        except RecursionError:
            raise OlpackError(f"{source} is nested too deep.", "Name the training script alone.") from None
        return draft
    if source.suffix.lower() in (".yml", ".yaml", ".json"):
        document, lines = _settings(source)
        if isinstance(document, dict) and "base_model" in document:
            draft = Draft("Axolotl", source, folder)
            axolotl.read(draft, document, lines)
            return draft
        if isinstance(document, dict) and "model_name_or_path" in document:
            draft = Draft("LLaMA-Factory", source, folder)
            llama_factory.read(draft, document, lines)
            return draft
        raise OlpackError(f"{source} names neither base_model, as Axolotl does, nor model_name_or_path, as LLaMA-Factory does.", f"Name {_KINDS}.")
    text = _text(source)
    if not modelfile.is_modelfile(source, text):
        raise OlpackError(f"{source} is of no known kind.", f"Name {_KINDS}.")
    draft = Draft("Ollama", source, folder)
    modelfile.read(draft, text)
    return draft


def name_for(source: Path) -> str:
    """What a package is called by default: as the file or the folder, a Modelfile as its folder; in lower case, with hyphens."""
    named = source.resolve().parent if source.name.lower() == "modelfile" else source
    text = named.resolve().name if named.is_dir() else named.stem
    return re.sub(r"[^a-z0-9._]+", "-", text.lower()).strip("-._") or "imported"


def _settings(path: Path) -> tuple[Any, dict[str, int]]:
    """The value in a YAML or JSON file, and the lines of its keys."""
    if path.suffix.lower() != ".json":
        return bounded_yaml.read(path)
    document = bounded_json.read_object(path, f"Name {_KINDS}.", most=_MOST_BYTES)
    text = path.read_text(encoding="utf-8")
    return document, {key: line for key in document if (line := line_of(text, key))}


def _text(path: Path) -> str:
    if path.stat().st_size > _MOST_OF_A_MODELFILE:
        raise OlpackError(f"{path} has {path.stat().st_size:,} bytes, and at most {_MOST_OF_A_MODELFILE:,} are read.", f"Name {_KINDS}.")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise OlpackError(f"{path} is not UTF-8 (byte {error.start}).", f"Name {_KINDS}.") from None
