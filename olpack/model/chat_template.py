"""The chat template that goes into a GGUF: the one trained with, kept from being replaced or re-set by the server.

Two things would make the served prompt differ from the trained one. On registering, the server compares the template with those it knows by
edit distance, and below 100 edits uses its own instead: a long comment in front keeps it. On rendering, the server sets variables that
training did not (`enable_thinking`, dates): the template's first statements set them back. Neither adds a character to what is rendered.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path

from olpack.model.gguf_header import read_header

UNDEFINED = "olpack_never_set"
"""An expression of Jinja with the undefined value: a name that nobody sets."""

EMPTY = '""'

SERVER_VARIABLES = ("enable_thinking", "thinking", "date_string", "datetime")
"""What the server sets while rendering, whatever the model was trained with."""

SPECIAL_TOKENS = ("bos_token", "eos_token")
"""Texts that the server takes from the GGUF's vocabulary: from token 11 where it names none, which training rendered as nothing."""

_COMMENT = (
    "This is the chat template that the model was trained with, unchanged from the end of this preamble on. The comment keeps a server "
    "from taking it for a similar one of its own; the statements that may follow hold variables at their values in training. "
    "Neither adds anything to the prompt."
)


def printed_tokens(chat_template: str) -> list[str]:
    """The special tokens that a template reads, by the names of their variables."""
    return [name for name in SPECIAL_TOKENS if re.search(rf"\b{name}\b", chat_template)]


def pins_for(chat_template: str, absent: Collection[str] = ()) -> dict[str, str]:
    """The variables to pin in front of a template: those that the server would set and training did not.

    Args:
        chat_template: the Jinja that training rendered with.
        absent: which of SPECIAL_TOKENS the tokenizer lacks: they are pinned to no text where the template reads them.

    Returns:
        variable to the Jinja expression of its value in training.
    """
    named = [name for name in SERVER_VARIABLES if re.search(rf"\b{name}\b", chat_template)]
    return {name: UNDEFINED for name in named} | {name: EMPTY for name in printed_tokens(chat_template) if name in absent}


def advertised(template: str) -> set[str]:
    """What a Jinja or Go template supports as a server sees it, by words in its text: "tools", "thinking".

    A server runs the Jinja in a GGUF in place of the Go template that it is given where the Jinja supports more.
    """
    signs = {"tools": r"tool_call|[Tt]ools", "thinking": r"<think>|\.Thinking"}
    return {name for name, sign in signs.items() if re.search(sign, template)}


def protect(chat_template: str, pins: Mapping[str, str]) -> str:
    """The template to put into the GGUF: a comment, the pinned variables, then the training template, character for character.

    Args:
        chat_template: the Jinja that training rendered with.
        pins: as `pins_for` gives them.

    Returns:
        a template that renders what `chat_template` renders with the pinned variables set so, whatever a server sets.
    """
    statements = [f"set {name} = {expression}" for name, expression in pins.items()]
    tags = [f"{{#- {_COMMENT} -#}}", *(f"{{%- {statement} -%}}" for statement in statements)]
    if chat_template[:1].isspace():
        # "-" would eat the template's own leading whitespace. Without it, trim_blocks (always on for chat templates) eats the one newline
        # put here, and the template still begins at the start of a line, where lstrip_blocks acts as before.
        tags[-1] = tags[-1][:-3] + tags[-1][-2:] + "\n"
    return "".join(tags) + chat_template


def read_chat_template(path: Path) -> str | None:
    """The `tokenizer.chat_template` of a GGUF file, None where it has none.

    Raises:
        OlpackError: the file is no GGUF, or ends within its header.
    """
    return read_header(path).text("tokenizer.chat_template")
