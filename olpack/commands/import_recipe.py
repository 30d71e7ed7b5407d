"""`olpack import`: a recipe from a file of another tool, with a list of what became of each of its settings."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from olpack import importers, printable
from olpack.commands.init import PARAMETERS, new_recipe
from olpack.errors import OlpackError
from olpack.importers import Draft, Given, Outcome
from olpack.workspace import write_atomically

if TYPE_CHECKING:
    from rich.table import Table

_TITLES = {"carried": "Carried over", "needless": "Nothing to set", "lost": "Not carried over"}


@dataclass(frozen=True)
class Imported:
    """A recipe that was written, the tool that its settings come from, and what became of each."""

    name: str
    recipe: Path
    tool: str
    outcomes: list[Outcome]

    def as_json(self) -> dict[str, Any]:
        """The list as JSON takes it."""
        lines = [
            {
                "place": one.given.place,
                "key": one.given.key,
                "value": one.given.public,
                "outcome": one.kind,
                "to": importers.plain(one.to),
                "note": one.note,
            }
            for one in self.outcomes
        ]
        return {"name": self.name, "recipe": str(self.recipe), "tool": self.tool, "settings": lines}


def import_recipe(source: str, name: str | None, base: str | None, train: str | None, held_out: str | None, system: str | None) -> Imported:
    """Write a recipe from a file of another tool, or from the folder of an adapter.

    Args:
        source: the file or folder.
        name: of the package; None: as the source is called.
        base, train, held_out, system: base model, training rows, held-out rows and system prompt in place of the source's.

    Raises:
        OlpackError: the source cannot be read, names no base or no rows that can be carried over, or the recipe is there already.
    """
    path = Path(source).expanduser()
    recipe = new_recipe(name or importers.name_for(path))
    draft = importers.read(path, recipe.parent)
    for option, key, value in (("--base", "base", base), ("--train", "data.train", train), ("--eval", "data.eval", held_out)):
        if value is not None:
            _replace(draft, option, key, value)
    if system is not None:
        draft.carry(Given("--system", "system", system), {"modelfile.system": system})
    if not any(key.startswith("modelfile.parameters.") for key in draft.settings):
        parameters = {f"modelfile.parameters.{key}": value for key, value in PARAMETERS.items()}
        draft.carry(Given("olpack's default", "parameters", None), parameters, "As `olpack init` writes them: an answer that repeats itself ends.")
    document = draft.document()
    try:
        recipe.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OlpackError(f"{recipe.parent} cannot be made: {error.strerror}.", "Begin a package where you may write.") from None
    write_atomically(recipe, _text(draft, document, recipe.parent.name))
    return Imported(recipe.parent.name, recipe, draft.tool, draft.in_order())


def _replace(draft: Draft, option: str, key: str, value: str) -> None:
    given = Given(option, key, value)
    draft.withdraw(["base", "revision"] if key == "base" else [key], f"{option} replaces it.")
    if key == "base":
        if value.startswith("builtin/"):
            draft.carry(given, {"base": value})
        else:
            draft.base(given, value)
        if draft.outcomes[-1].kind == "lost":
            raise OlpackError(f"There is no folder {value} here.", "Name a folder, a model on the Hub as owner/name, or builtin/tiny-coder.")
        return
    if (source := draft.source(given, value)) is None:
        raise OlpackError(f"There is no {value} here.", "Name a file or a folder of rows, or a data set on the Hub as owner/name.")
    draft.carry(given, {key: source.get("file", source)})


# -- the recipe's text ---------------------------------------------------------------------------------------------------------------------


def _text(draft: Draft, document: dict[str, Any], name: str) -> str:
    lines = [f"# From {_on_one_line(draft.file.name)} by `olpack import`. `olpack plan {name}` prints every setting.", ""]
    lines += _section(draft, document, "", 0)
    if lost := [one for one in draft.in_order() if one.kind == "lost"]:
        lines += ["", "# Not carried over:"]
        lines += [f"#   {_on_one_line(f'{one.given.place}  {one.given.shown}: {one.note}')}" for one in lost]
    return "\n".join(lines) + "\n"


def _section(draft: Draft, section: dict[str, Any], prefix: str, depth: int) -> list[str]:
    lines = []
    for key, value in section.items():
        indent, dotted = "  " * depth, f"{prefix}{key}"
        if isinstance(value, dict) and dotted not in draft.settings:
            lines += [f"{indent}{key}:", *_section(draft, value, f"{dotted}.", depth + 1)]
            continue
        origin = f"  # {_on_one_line(draft.origins[dotted])}" if dotted in draft.origins else ""
        if isinstance(value, list) and any(isinstance(item, dict) for item in value):
            lines += [f"{indent}{key}:{origin}", *(f"{indent}  - {_value(item)}" for item in value)]
        else:
            lines.append(f"{indent}{key}: {_value(value)}{origin}")
    return lines


def _on_one_line(text: str) -> str:
    """A text as a comment takes it, whatever its author wrote."""
    return printable.visible(" ".join(text.split()))


def _value(value: Any) -> str:
    """A value on one line, as YAML reads it back."""
    style = '"' if isinstance(value, str) and not value.replace("-", "").replace("_", "").replace("/", "").replace(".", "").isalnum() else None
    text = yaml.safe_dump(value, default_flow_style=True, default_style=style, allow_unicode=True, width=float("inf"), sort_keys=False)
    return text.removesuffix("\n").removesuffix("\n...")


# -- the list ------------------------------------------------------------------------------------------------------------------------------


def print_imported(imported: Imported) -> None:
    """What became of each setting, and the recipe's path."""
    console = printable.console()
    for kind, title in _TITLES.items():
        if outcomes := [one for one in imported.outcomes if one.kind == kind]:
            console.print(_table(title, outcomes, kind), "", highlight=False)
    printable.echo(str(imported.recipe))


def _table(title: str, outcomes: list[Outcome], kind: str) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    table.add_column(title, overflow="fold", ratio=2)
    table.add_column("setting", overflow="fold", ratio=5)
    table.add_column("recipe" if kind == "carried" else "why", overflow="fold", ratio=8)
    for one in outcomes:
        to = "\n".join(f"{key}: {_value(value)}" for key, value in one.to.items())
        table.add_row(*(Text(printable.visible(text)) for text in (one.given.place, one.given.shown)), Text("\n".join(filter(None, (to, one.note)))))
    return table
