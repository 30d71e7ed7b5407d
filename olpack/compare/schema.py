"""The schema of `results.json` as Markdown: `python -m olpack.compare.schema > docs/results.md`."""

from __future__ import annotations

import types
import typing

from pydantic import BaseModel

from olpack.compare import results

_INTRODUCTION = """\
# results.json

Written by `olpack compare` into `build/NAME/compare/`, beside `results.csv`, `results.md` and `report.html`. This page is generated
from the schema: `python -m olpack.compare.schema > docs/results.md`.

Units are in the names: `_bytes`, `_s` (seconds), `_per_s`. Log-probabilities are natural. A figure that could not be measured is null, and a
flag gives the reason. `schema_version` grows when a field changes its meaning or is removed; new fields may be added at any time.
"""


def to_markdown() -> str:
    """Every record of the schema, each after the records that use it."""
    order: list[type[BaseModel]] = []

    def visit(model: type[BaseModel]) -> None:
        if model not in order:
            order.append(model)
            for field in model.model_fields.values():
                for inner in _models(field.annotation):
                    visit(inner)

    visit(results.Results)
    return "\n".join([_INTRODUCTION, *(_section(model) for model in order)])


def _section(model: type[BaseModel]) -> str:
    lines = [f"## {model.__name__}", "", (model.__doc__ or "").strip(), "", "| field | type | meaning |", "| --- | --- | --- |"]
    for name, field in model.model_fields.items():
        meaning = (field.description or "").replace("|", "\\|")
        lines.append(f"| `{name}` | {_spelled(field.annotation)} | {meaning} |")
    return "\n".join([*lines, ""])


def _models(annotation: object) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for inner in typing.get_args(annotation) for model in _models(inner)]


def _spelled(annotation: object) -> str:
    """The name of a type in JSON."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_spelled(argument) for argument in arguments)
    if origin is typing.Literal:
        return ", ".join(f"`{value!r}`".replace("'", '"') for value in arguments)
    if origin is list:
        return f"list of {_spelled(arguments[0])}"
    if origin is dict or annotation is dict:
        return "object"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return f"[{annotation.__name__}](#{annotation.__name__.lower()})"
    names: dict[object, str] = {str: "text", int: "integer", float: "number", bool: "true or false", type(None): "null"}
    return names.get(annotation, "any value")


if __name__ == "__main__":
    print(to_markdown(), end="")
