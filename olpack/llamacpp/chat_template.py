"""A GGUF's own chat template, rendered as transformers' `apply_chat_template` renders it."""

from __future__ import annotations

import json
from datetime import datetime
from functools import lru_cache

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from olpack.errors import OlpackError
from olpack.templating import Exceeded, bounded


class _Generation(Extension):
    """`{% generation %}` marks for training what the assistant says; in rendering it changes nothing."""

    tags = {"generation"}  # noqa: RUF012 — jinja2 declares it as an attribute of each instance

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def render_chat(template: str, messages: list[dict], special: dict[str, str], tools: list[dict] | None = None) -> str:
    """The conversation as text, with the opening of the assistant's turn at its end.

    Args:
        template: Jinja source, the value of `tokenizer.chat_template`. It comes with a model, so it runs in a sandbox.
        messages: turns in order.
        special: texts of the special tokens by the names a template uses: bos_token, eos_token, …
        tools: JSON schemas of the functions that the model may call.

    Raises:
        OlpackError: the template does not compile, or refuses the conversation.
    """
    try:
        with bounded():
            return _compiled(template).render(messages=messages, add_generation_prompt=True, **special, **({"tools": tools} if tools else {}))
    except MemoryError:
        raise OlpackError("The model's chat template fails: it takes too much memory.") from None
    except (jinja2.TemplateError, Exceeded, ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise OlpackError(f"The model's chat template refuses this conversation: {error}.") from error


@lru_cache(maxsize=1)  # hundreds of conversations are asked with one template, and most of the time of each would be its compilation
def _compiled(template: str) -> jinja2.Template:
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment.from_string(template)


def _to_json(value: object, ensure_ascii: bool = False, indent: int | None = None, separators=None, sort_keys: bool = False) -> str:
    # Jinja's own filter escapes for HTML, which a prompt must not be.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)
