"""The answer of `/api/show` about one model, in types."""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass, field
from typing import Any

from olpack.deploy.answers import ShownModel
from olpack.deploy.parameters import ParameterValue


@dataclass(frozen=True)
class ModelInfo:
    """What a model was registered with, as the server reports it.

    Attributes:
        blob: digest of its weights, `sha256:<64 hex>`; None where the server names no blob.
        path: of the file of that digest on the server's machine; None where the server names no blob.
        adapter: digest of the adapter that is applied to them, in the same form; None where there is none.
        system, template, license: None where there is none. `template` is the GGUF's own Jinja or a Go template, whichever runs.
        parameters: name to value; `stop` is always a list.
        messages: turns that precede every conversation.
        capabilities: "completion", "tools", "thinking", …
        details: family, parameter_size, quantization_level, …
    """

    blob: str | None
    path: str | None = None
    adapter: str | None = None
    system: str | None = None
    template: str | None = None
    license: str | None = None
    parameters: dict[str, ParameterValue] = field(default_factory=dict)
    messages: tuple[dict[str, str], ...] = ()
    capabilities: tuple[str, ...] = ()
    details: dict[str, Any] = field(default_factory=dict)


def read_model_info(answer: ShownModel) -> ModelInfo:
    """What `/api/show` answers about one model."""
    # The first line that begins so is the weights' own, and an adapter's comes right after it: the model's texts follow these.
    weights = re.search(r"^FROM (.*sha256-([0-9a-f]{64}))\s*(?:^ADAPTER .*sha256-([0-9a-f]{64})\s*)?$", answer.modelfile, re.MULTILINE)
    path, blob, adapter = weights.groups() if weights else (None, None, None)
    return ModelInfo(
        blob=blob and f"sha256:{blob}",
        path=path,
        adapter=adapter and f"sha256:{adapter}",
        system=answer.system or None,
        template=answer.template or None,
        license=answer.license or None,
        parameters=read_parameters(answer.parameters),
        messages=tuple({"role": turn.role, "content": turn.content} for turn in answer.messages),
        capabilities=answer.capabilities,
        details=answer.details,
    )


def read_parameters(text: str) -> dict[str, ParameterValue]:
    """Parameters from the server's two columns: a name, then a number, a bool, or a text in Go's quotes. A list has one line for each
    item.
    """
    parameters: dict[str, ParameterValue] = {}
    stops: list[str] = []
    for line in text.splitlines():
        name, _, written = line.partition(" ")
        value = _value(written.strip())
        if name == "stop":
            stops.append(str(value))
            parameters[name] = stops
        else:
            parameters[name] = value
    return parameters


def _value(written: str) -> int | float | bool | str:
    if written in ("true", "false"):
        return written == "true"
    if written.startswith('"'):
        # Go quotes as Python does, but for \U, which has 8 digits in both; the closing quote is the only bare one.
        try:
            return str(ast.literal_eval(written))
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            return written
    try:
        number = float(written)
    except ValueError:
        return written
    return int(number) if number.is_integer() else number
