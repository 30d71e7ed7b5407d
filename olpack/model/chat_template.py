"""The chat template that goes into a GGUF: the one trained with, kept from being replaced or re-set by the server.

Two things would make the served prompt differ from the trained one. On registering, the server compares the template with those it knows by
edit distance, and below 100 edits uses its own instead: a long comment in front keeps it. On rendering, the server sets variables that
training did not (`enable_thinking`, dates): the template's first statements set them back. Neither adds a character to what is rendered.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from enum import Enum
from pathlib import Path

from olpack.errors import OlpackError
from olpack.model.gguf_header import read_header


class Undefined(Enum):
    """The value of a variable that was not set in training."""

    UNDEFINED = "undefined"


UNDEFINED = Undefined.UNDEFINED

SERVER_VARIABLES = ("enable_thinking", "thinking", "date_string", "datetime")
"""What the server sets while rendering, whatever the model was trained with."""

SPECIAL_TOKENS = ("bos_token", "eos_token")
"""Texts that the server takes from the GGUF's vocabulary: from token 11 where it names none, which training rendered as nothing."""

# An undefined name gives the undefined value; a name that nobody sets must be used for it.
_NEVER_SET = "olpack_never_set"

_COMMENT = (
    "This is the chat template that the model was trained with, unchanged from the end of this preamble on. The comment keeps a server "
    "from taking it for a similar one of its own; the statements that may follow hold variables at their values in training. "
    "Neither adds anything to the prompt."
)


def printed_tokens(chat_template: str) -> list[str]:
    """The special tokens that a template reads, by the names of their variables."""
    return [name for name in SPECIAL_TOKENS if re.search(rf"\b{name}\b", chat_template)]


def pins_for(chat_template: str, trained: Mapping[str, object], absent: Collection[str] = ()) -> dict[str, object]:
    """The variables to pin in front of a template: those it was trained under, and those that the server would set and training did not.

    Args:
        chat_template: the Jinja that training rendered with.
        trained: the template variables that training set, `{"enable_thinking": False}`.
        absent: which of SPECIAL_TOKENS the tokenizer has not: they are pinned to no text where the template reads them.
    """
    named = [name for name in SERVER_VARIABLES if re.search(rf"\b{name}\b", chat_template)]
    return {name: UNDEFINED for name in named} | {name: "" for name in printed_tokens(chat_template) if name in absent} | dict(trained)


def advertised(template: str) -> set[str]:
    """What a Jinja or Go template supports as a server sees it, by words in its text: "tools", "thinking".

    A server runs the Jinja in a GGUF in place of the Go template that it is given where the Jinja supports more.
    """
    signs = {"tools": r"tool_call|[Tt]ools", "thinking": r"<think>|\.Thinking"}
    return {name for name, sign in signs.items() if re.search(sign, template)}


def protect(chat_template: str, pins: Mapping[str, object]) -> str:
    """The template to put into the GGUF: a comment, the pinned variables, then the training template, character for character.

    Args:
        chat_template: the Jinja that training rendered with.
        pins: variable to its value in training (text, number, bool, None, lists and mappings of these), or `UNDEFINED` for one that was not
            set.

    Returns:
        a template that renders what `chat_template` renders with the pinned variables set so, whatever a server sets.

    Raises:
        OlpackError: a pin is no legal variable name, or its value has no Jinja literal.
    """
    statements = [f"set {_checked(name)} = {_literal(name, value)}" for name, value in pins.items()]
    tags = [f"{{#- {_COMMENT} -#}}", *(f"{{%- {statement} -%}}" for statement in statements)]
    if chat_template[:1].isspace():
        # "-" would eat the template's own leading whitespace. Without it, trim_blocks (always on for chat templates) eats the one newline
        # put here, and the template still begins at the start of a line, where lstrip_blocks acts as before.
        tags[-1] = tags[-1][:-3] + tags[-1][-2:] + "\n"
    return "".join(tags) + chat_template


def _checked(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
        raise OlpackError(f"{name!r} is no variable that a chat template could have.", "Name it as the template does, for example 'enable_thinking'.")
    return name


def _literal(name: str, value: object) -> str:
    if value is UNDEFINED:
        return _NEVER_SET
    if value is None or isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, str):
        escaped = value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n").replace("\r", "\\r").replace("\t", "\\t")
        return f'"{escaped}"'
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_literal(name, item) for item in value) + "]"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_literal(name, str(key))}: {_literal(name, item)}" for key, item in value.items()) + "}"
    raise OlpackError(
        f"The template variable {name!r} is {type(value).__name__}, which a chat template cannot hold.", "Use text, numbers, true or false."
    )


def read_chat_template(path: Path) -> str | None:
    """The `tokenizer.chat_template` of a GGUF file, None where it has none.

    Raises:
        OlpackError: the file is no GGUF, or ends within its header.
    """
    return read_header(path).text("tokenizer.chat_template")
