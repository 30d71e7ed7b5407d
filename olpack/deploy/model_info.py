"""The answer of `/api/show` about one model, in types."""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass, field
from typing import Any

from olpack.deploy.parameters import ParameterValue


@dataclass(frozen=True)
class ModelInfo:
    """What a model was registered with, as the server reports it.

    Attributes:
        blob: digest of its weights, `sha256:<64 hex>`; None where the server names no blob.
        adapter: digest of the adapter that is applied to them, in the same form; None where there is none.
        system, template, license: None where there is none. `template` is the GGUF's own Jinja or a Go template, whichever runs.
        parameters: name to value; `stop` is always a list.
        messages: turns that precede every conversation.
        capabilities: "completion", "tools", "thinking", …
        details: family, parameter_size, quantization_level, …
        model_info: the GGUF's metadata, without its long lists.
    """

    blob: str | None
    adapter: str | None = None
    system: str | None = None
    template: str | None = None
    license: str | None = None
    parameters: dict[str, ParameterValue] = field(default_factory=dict)
    messages: tuple[dict[str, str], ...] = ()
    capabilities: tuple[str, ...] = ()
    details: dict[str, Any] = field(default_factory=dict)
    model_info: dict[str, Any] = field(default_factory=dict)


def read_model_info(answer: dict[str, Any]) -> ModelInfo:
    """The answer of `/api/show` in types."""
    # The first line that begins so is the weights' own, and an adapter's comes right after it: the model's texts follow these.
    weights = re.search(r"^FROM .*sha256-([0-9a-f]{64})\s*(?:^ADAPTER .*sha256-([0-9a-f]{64})\s*)?$", answer.get("modelfile") or "", re.MULTILINE)
    blob, adapter = weights.groups() if weights else (None, None)
    return ModelInfo(
        blob=blob and f"sha256:{blob}",
        adapter=adapter and f"sha256:{adapter}",
        system=answer.get("system") or None,
        template=answer.get("template") or None,
        license=answer.get("license") or None,
        parameters=read_parameters(answer.get("parameters") or ""),
        messages=tuple({"role": turn.get("role", ""), "content": turn.get("content", "")} for turn in answer.get("messages") or ()),
        capabilities=tuple(answer.get("capabilities") or ()),
        details=answer.get("details") or {},
        model_info=answer.get("model_info") or {},
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
        return str(ast.literal_eval(written))
    try:
        number = float(written)
    except ValueError:
        return written
    return int(number) if number.is_integer() else number
