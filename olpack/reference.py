"""The generated pages of docs/reference/: `python -m olpack.reference`, or `make docs`.

Commands come from the command line itself, recipe keys and results from their JSON schemas, so a page cannot differ from the code.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperArgument, TyperCommand, TyperGroup, TyperOption

from olpack import cli
from olpack.compare.results import Results
from olpack.importers import adapter, axolotl, llama_factory, modelfile, unsloth
from olpack.quants import QUANT_TYPES, TENSOR_TYPES
from olpack.recipe import json_schema, tasks

FOLDER = Path(__file__).parents[1] / "docs/reference"
_LONG_ENUM = 20  # a type with more values is spelled "text", and the page lists the values once
_TYPES = {"string": "text", "integer": "integer", "number": "number", "boolean": "true or false", "null": "null", "object": "object"}
_BOUNDS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}

_COMMANDS = """\
# Commands

`make docs` generates this page from the command line. `olpack COMMAND --help` prints the same text.

`olpack --version` prints the version. `olpack --debug COMMAND` prints tracebacks and the warnings of libraries.

Exit codes: 0 success, 1 error, 2 usage error, 130 interrupted. Results go to stdout, everything else to stderr; with `--json` both are JSON.
"""

_IMPORT = """\
# What an import carries over

`make docs` generates this page from the importers. [Import](../import.md) describes the command. A dash means that no recipe key is set: the note
gives the reason, or what olpack does by itself. A setting that is not listed is reported as not carried over.
"""

_RECIPE = """\
# recipe.yaml

`make docs` generates this page from the schema. A key that is not listed here is an error, which names its line and the nearest known key.
`--set KEY=VALUE` replaces any key: `--set train.epochs=3`. `olpack plan NAME` prints every value and its origin.

Editors complete and check a recipe with [recipe.schema.json](recipe.schema.json), which `olpack schema` prints as well. For the YAML language
server, write `olpack schema > recipe.schema.json` and put this line at the top of the recipe:

    # yaml-language-server: $schema=recipe.schema.json

Paths of files are relative to the recipe. [Data](../data.md) describes sources and forms of rows, [training](../training.md) methods, bases and
merges, [which quant](../quants.md) the quants.
"""

_RESULTS = """\
# results.json

`olpack compare` writes it into `build/NAME/compare/`, beside `results.csv`, `results.md` and `report.html`. `make docs` generates this page from
the schema.

Units are in the names: `_bytes`, `_s` (seconds), `_per_s`. Log-probabilities are natural. A figure that could not be measured is null, and a
flag gives the reason. `schema_version` grows when a field changes its meaning or is removed; new fields may be added at any time.
"""


def pages() -> dict[str, str]:
    """The text of each page, by file name."""
    return {
        "commands.md": commands(),
        "import.md": imports(),
        "recipe.md": recipe(),
        "recipe.schema.json": json.dumps(json_schema(), indent=1, ensure_ascii=False) + "\n",
        "results.md": results(),
    }


def commands() -> str:
    """Every command with usage, arguments, options and defaults."""
    return "\n".join([_COMMANDS, *_command_sections("olpack", typer.main.get_command(cli.app))])


def _command_sections(path: str, command: object) -> Iterator[str]:
    if isinstance(command, TyperGroup):
        for name, inner in command.commands.items():
            yield from _command_sections(f"{path} {name}", inner)
    if not isinstance(command, TyperCommand):
        return
    arguments = {_argument(one): one for one in command.params if isinstance(one, TyperArgument)}
    options = {_option(one): one for one in command.params if isinstance(one, TyperOption)}
    usage = " ".join([path, *arguments, *(["[OPTIONS]"] if options else [])])
    rows = [(f"`{spelling}`", _meaning(one)) for spelling, one in (arguments | options).items()]
    yield "\n".join(
        [
            f"## {path}",
            "",
            f"    {usage}",
            "",
            inspect.cleandoc(command.help or ""),
            "",
            *(_table(("argument or option", "meaning"), rows) if rows else []),
        ]
    )


def _argument(argument: TyperArgument) -> str:
    spelling = f"{argument.metavar}{'…' if argument.nargs < 0 else ''}"
    return spelling if argument.required else f"[{spelling}]"


def _option(option: TyperOption) -> str:
    return " ".join([*option.opts, *([option.metavar] if option.metavar else [])])


def _meaning(parameter: TyperArgument | TyperOption) -> str:
    """The help of an argument or option. Arguments show by brackets whether they are required."""
    notes = ["Required."] if parameter.required and isinstance(parameter, TyperOption) else []
    notes += [f"Default: {parameter.default}."] if parameter.show_default and isinstance(parameter.default, str | int) and parameter.default else []
    return " ".join([parameter.help or "", *notes])


def imports() -> str:
    """What `olpack import` makes of each setting, tool by tool."""
    sections = [_IMPORT]
    for tool, what, rules, others in (
        ("Axolotl", "setting", axolotl.RULES, ()),
        ("LLaMA-Factory", "setting", llama_factory.RULES, ()),
        ("Unsloth", "argument or call", unsloth.RULES, unsloth.TABLE_OF_CALLS),
        ("Modelfile", "command", {}, modelfile.TABLE),
        ("Adapter", "field or file", {}, adapter.TABLE),
    ):
        rows = [(f"`{name}`", to, note) for name, to, note in others]
        merged: dict[tuple[str, str], list[str]] = {}
        for name, rule in rules.items():
            merged.setdefault((rule.to, rule.note), []).append(f"`{name}`")
        rows += [(", ".join(names), to, note) for (to, note), names in merged.items()]
        cells = [(name, f"`{to}`" if to else "–", note) for name, to, note in rows]
        sections.append("\n".join([f"## {tool}", "", *_table((what, "recipe key", "note"), cells)]))
    return "\n".join(sections)


def recipe() -> str:
    """Every key of a recipe with type, default and meaning, section by section."""
    schema = json_schema()
    sections = [_keys(schema, schema, "", "## Top level")]
    sections += [_keys(schema, schema["$defs"][name], path, f"## {path}") for name, path in _places(schema).items()]
    parameters = schema["$defs"]["Modelfile"]["properties"]["parameters"]["properties"]
    rows = [(f"`{name}`", _type(value)) for name, value in parameters.items()]
    sections.append("\n".join(["## modelfile.parameters", "", "The parameters of an Ollama model.", "", *_table(("key", "type"), rows)]))
    sections.append(f"## compare.tasks\n\n{inspect.cleandoc(tasks.__doc__ or '')}\n")
    types = [("quants", QUANT_TYPES), ("export.tensor_types", TENSOR_TYPES)]
    sections += ["\n".join([f"## Types of {key}", "", ", ".join(f"`{name}`" for name in names) + ".", ""]) for key, names in types]
    return "\n".join([_RECIPE, *sections])


def _places(schema: dict[str, Any]) -> dict[str, str]:
    """The sections of a recipe, each with the key that has it, in the recipe's order."""
    places: dict[str, str] = {}

    def visit(node: dict[str, Any], path: str) -> None:
        for key, value in node["properties"].items():
            for name in _references(value):
                if name not in places:
                    places[name] = f"{path}{key}"
                    visit(schema["$defs"][name], f"{path}{key}.")

    visit(schema, "")
    return places


def _keys(schema: dict[str, Any], node: dict[str, Any], path: str, title: str) -> str:
    places = _places(schema)
    rows = []
    for key, value in node["properties"].items():
        spelled = _type(value, lambda name: f"[section](#{places[name].replace('.', '')})")
        default = "required" if key in node.get("required", []) else _yaml(value["default"]) if "default" in value else ""
        rows.append((f"`{path}.{key}`".replace("`.", "`"), spelled, default, value["description"]))
    return "\n".join([title, "", node["description"], "", *_table(("key", "type", "default", "meaning"), rows)])


def _yaml(value: object) -> str:
    """A default as a recipe writes it."""
    return value if isinstance(value, str) else json.dumps(value).replace('"', "")


def results() -> str:
    """Every record of results.json, each after the records that use it."""
    schema = Results.model_json_schema()
    order: list[str] = []

    def visit(node: dict[str, Any]) -> None:
        for name in _references(node["properties"]):
            if name not in order:
                order.append(name)
                visit(schema["$defs"][name])

    visit(schema)
    return "\n".join([_RESULTS, _record(schema), *(_record(schema["$defs"][name]) for name in order)])


def _record(node: dict[str, Any]) -> str:
    rows = [(f"`{key}`", _type(value), value.get("description", "")) for key, value in node["properties"].items()]
    return "\n".join([f"## {node['title']}", "", node["description"], "", *_table(("field", "type", "meaning"), rows)])


def _references(node: object) -> Iterator[str]:
    """The names of the definitions that a schema refers to, in its order."""
    if isinstance(node, dict):
        if "$ref" in node:
            yield node["$ref"].rpartition("/")[2]
        node = list(node.values())
    if isinstance(node, list):
        for inner in node:
            yield from _references(inner)


def _type(node: dict[str, Any], link: Callable[[str], str] = lambda name: f"[{name}](#{name.lower()})") -> str:
    """A type of JSON schema in words."""
    if "$ref" in node:
        return link(node["$ref"].rpartition("/")[2])
    if kinds := node.get("anyOf", node.get("oneOf")):
        return " or ".join(dict.fromkeys(_type(kind, link) for kind in kinds))
    if "const" in node or "enum" in node:
        values = node.get("enum", [node.get("const")])
        return "text" if len(values) > _LONG_ENUM else ", ".join(f"`{json.dumps(value)}`" for value in values)
    if node.get("type") == "array":
        return f"list of {_type(node['items'], link)}"
    bounds = [f"{sign} {node[key]:,}" for key, sign in _BOUNDS.items() if key in node]
    return " ".join([_TYPES[node["type"]] if "type" in node else "any value", ", ".join(bounds)]).strip()


def _table(titles: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> list[str]:
    lines = [titles, ("---",) * len(titles), *rows]
    return [f"| {' | '.join(' '.join(cell.replace('|', chr(92) + '|').split()) for cell in line)} |" for line in lines] + [""]


if __name__ == "__main__":
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, text in pages().items():
        (FOLDER / name).write_text(text, encoding="utf-8")
