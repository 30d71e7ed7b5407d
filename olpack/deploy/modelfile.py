"""A package as a Modelfile: written from a Jinja template, read back by the server's grammar.

The grammar has two ways to quote, `"…"` and triple quotes, and no escapes. So a text with a line that ends in three quotes cannot be
written, and characters that Go calls unprintable (no-break spaces, joiners, right-to-left marks) vanish without a message. The JSON of the
API carries both, which is why models are registered over it, and the Modelfile lists what it cannot express.
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from olpack import templating
from olpack.deploy.parameters import PARAMETERS, ParameterValue, number
from olpack.errors import OlpackError

COMMANDS = ("from", "adapter", "template", "system", "parameter", "message", "license", "renderer", "parser", "requires", "draft")
ROLES = ("system", "user", "assistant")
_LETTERS, _WORD = frozenset(string.ascii_letters), frozenset(string.ascii_letters + string.digits + "_")


@dataclass(frozen=True)
class Package:
    """What a model is registered with, beside its weights.

    Attributes:
        system: the system prompt; None: the chat template's own default applies.
        template: a Go template in place of the GGUF's chat template; None for all but special cases.
        parameters: name to value, as in the table of `olpack.deploy.parameters`.
        license: its text or name.
        messages: turns that precede every conversation, each with `role` and `content`.
    """

    system: str | None = None
    template: str | None = None
    parameters: dict[str, ParameterValue] = field(default_factory=dict)
    license: str | None = None
    messages: tuple[dict[str, str], ...] = ()

    @property
    def num_ctx(self) -> int:
        """Tokens of context that the server keeps; 0 where the package leaves that to the server."""
        return int(number(self.parameters, "num_ctx"))


@dataclass(frozen=True)
class ParsedModelfile:
    """What the server would read from a Modelfile: the paths after FROM and ADAPTER, the package, and any other command with its text."""

    source: str
    package: Package
    adapter: str | None = None
    others: tuple[tuple[str, str], ...] = ()


# -- writing -------------------------------------------------------------------------------------------------------------------------------


def render(package: Package, gguf_path: Path | str, template_source: str, adapter_path: Path | str | None = None) -> str:
    """The Modelfile of one quant.

    Args:
        package: what the Modelfile contains.
        gguf_path: what FROM names. `ollama create -f` takes a relative path from the folder of the Modelfile.
        template_source: Jinja, of `templates/Modelfile.j2` or the user's own. It sees `gguf` and `adapter`, the attributes of the package,
            `problems` (what the grammar cannot express) and the filter `quoted`.
        adapter_path: what ADAPTER names; None: the GGUF contains the fine-tuned weights.

    Raises:
        OlpackError: the template does not compile, or names something that is not there.
    """
    return templating.render(
        template_source,
        "Modelfile.j2",
        "The Modelfile template",
        filters={"quoted": quoted},
        gguf=str(gguf_path),
        adapter=None if adapter_path is None else str(adapter_path),
        system=package.system,
        template=package.template,
        license=package.license,
        messages=package.messages,
        parameters=[(name, item) for name, value in package.parameters.items() for item in (value if isinstance(value, (list, tuple)) else [value])],
        problems=unrepresentable(package),
    )


def quoted(value: object) -> str:
    """A value as the grammar reads it back: numbers bare, one line in `"…"`, any other text in triple quotes."""
    if isinstance(value, bool):
        return str(value).lower()
    if not isinstance(value, str):
        return str(value)
    if '"' in value or "\n" in value or "\r" in value:
        return f'"""{value}"""'
    return f'"{value}"'


# -- reading -------------------------------------------------------------------------------------------------------------------------------


def parse(text: str) -> ParsedModelfile:
    """Read a Modelfile as the server does.

    Raises:
        OlpackError: where `ollama create` would refuse it, with the line and the reason.
    """
    source: str | None = None
    adapter: str | None = None
    texts: dict[str, str] = {}
    licenses: list[str] = []
    parameters: dict[str, ParameterValue] = {}
    messages: list[dict[str, str]] = []
    others: list[tuple[str, str]] = []
    for _line, command, word, value in commands(text):
        if command == "from":
            source = value
        elif command == "adapter":
            adapter = value
        elif command in ("system", "template"):
            texts[command] = value
        elif command == "license":
            licenses.append(value)
        elif command == "message":
            messages.append({"role": word, "content": value})
        elif command == "parameter":
            _set_parameter(parameters, word, value)
        else:
            others.append((command, value))
    if source is None:
        raise OlpackError("The Modelfile has no FROM line.", "It must name the GGUF: FROM ./model.gguf")
    package = Package(texts.get("system"), texts.get("template"), parameters, "\n".join(licenses) if licenses else None, tuple(messages))
    return ParsedModelfile(source, package, adapter, tuple(others))


def _set_parameter(parameters: dict[str, ParameterValue], name: str, value: str) -> None:
    read = parameter(name, value)
    before = parameters.get(name)
    parameters[name] = [*before, *read] if isinstance(before, list) and isinstance(read, list) else read


def parameter(name: str, value: str) -> ParameterValue:
    """The value of a PARAMETER line; of one that may stand there several times, a list.

    Raises:
        OlpackError: Ollama has no such parameter, or its value is another kind.
    """
    known = PARAMETERS.get(name)
    if known is None:
        raise OlpackError(f"The Modelfile sets {name!r}, which is no parameter of Ollama.", f"It has: {', '.join(PARAMETERS)}.")
    if known.kind == "texts":
        return [value]
    try:
        return {"true": True, "false": False}[value.lower()] if known.kind == "bool" else int(value) if known.kind == "int" else float(value)
    except (KeyError, ValueError):
        raise OlpackError(f"The Modelfile sets {name} to {value!r}.", f"It must be {known.kind}.") from None


def commands(text: str) -> Iterator[tuple[int, str, str, str]]:
    """Commands in order: (line, name in lower case, the parameter's name or the message's role or "", value).

    One character at a time, as the server's reader goes: a value ends at the first line end where what stands so far is unquoted or
    properly closed, and it is only looked at there. What that means for a text with quotes in it follows from this loop alone.
    """
    name = word = value = ""
    state = "nothing"
    line = begun = 1
    for char in text.removeprefix("\ufeff"):
        line += char == "\n"
        newline, space = char in "\r\n", char in " \t"
        if state == "nothing":
            if char == "#":
                state = "comment"
            elif not newline and not space:
                state, name, begun = "name", char, line
        elif state == "comment":
            if newline:
                state = "nothing"
        elif state == "name":
            if space:
                name = name.lower()
                if name not in COMMANDS:
                    raise _refused(line, f"{name!r} is no command")
                state, word, value = ("word" if name in ("parameter", "message") else "value"), "", ""
            elif char in _LETTERS:
                name += char
            else:
                raise _refused(line - newline, f"{name} has no value" if newline else f"{name + char!r} is no command")
        elif state == "word":
            if space:
                if name == "message" and word not in ROLES:
                    raise _refused(line, f"{word!r} is no role of a message")
                state, value = "value", ""
            elif char in (_WORD if name == "parameter" else _LETTERS):
                word += char
            else:
                raise _refused(line, f"{name} {word + char!r} is not complete")
        elif newline and (done := _unquoted(value)) is not None:
            yield begun, name, word, done
            state = "nothing"
        elif newline or space or char.isprintable():  # Python and Go agree on what is printable
            value += char
    if state == "value":
        if (done := _unquoted(value)) is None:
            raise _refused(line, f"the quotes after {name.upper()} are not closed")
        yield begun, name, word, done
    elif state in ("name", "word"):
        raise _refused(line, f"{name.upper()} has no value")


def _unquoted(value: str) -> str | None:
    """The text inside the quotes; None where they are still open."""
    value = value.strip()
    for mark in ('"""', '"'):
        if value.startswith(mark):
            return value[len(mark) : -len(mark)] if len(value) >= 2 * len(mark) and value.endswith(mark) else None
    return value


def _refused(line: int, reason: str) -> OlpackError:
    return OlpackError(f"Modelfile, line {line}: {reason}.", "A text whose lines end in three quotes, or that is not in quotes, reads so.")


# -- the round trip ------------------------------------------------------------------------------------------------------------------------


def unrepresentable(package: Package) -> list[str]:
    """Which texts of a package the Modelfile's grammar cannot express, and why, one sentence each. The API carries all of them."""
    problems = []
    for label, text in _texts(package):
        try:
            read = parse(f"FROM x\nSYSTEM {quoted(text)}\n").package.system
        except OlpackError:
            read = None
        if read != text:
            problems.append(f"{label[0].upper()}{label[1:]} {_reason(text)}.")
    return problems


def differences(parsed: ParsedModelfile, package: Package, adapter: str | None = None) -> list[str]:
    """In what a Modelfile differs from the package, one clause each. None of them proves that a rendered file, from a user's own template
    too, is right.
    """
    other = parsed.package
    pairs: list[tuple[str, object, object]] = [(name, getattr(package, name), getattr(other, name)) for name in ("system", "template", "license")]
    pairs.append(("adapter", adapter, parsed.adapter))
    pairs.append(
        (
            "messages",
            [(turn["role"], turn["content"]) for turn in package.messages],
            [(turn["role"], turn["content"]) for turn in other.messages],
        )
    )
    for name in dict.fromkeys([*package.parameters, *other.parameters]):
        wanted, read = package.parameters.get(name), other.parameters.get(name)
        pairs.append((f"parameter {name}", list(wanted) if isinstance(wanted, tuple) else wanted, read))
    return [
        f"{label}: the package has {_short(wanted)}, the Modelfile has {_short(read)}"
        for label, wanted, read in pairs
        if _or_nothing(wanted) != _or_nothing(read)
    ]


def _or_nothing(value: object) -> object:
    """An empty text or list means the same as an absent one."""
    return None if value in ("", [], ()) else value


def _texts(package: Package) -> Iterator[tuple[str, str]]:
    for name in ("system", "template", "license"):
        if text := getattr(package, name):
            yield f"the {name} {'text' if name == 'license' else 'prompt' if name == 'system' else ''}".strip(), text
    for index, turn in enumerate(package.messages, 1):
        yield f"message {index} ({turn['role']})", turn["content"]
    stops = package.parameters.get("stop", [])
    for text in stops if isinstance(stops, (list, tuple)) else []:
        yield f"the stop text {text!r}", text


def _reason(text: str) -> str:
    reasons = []
    *lines, _last = re.split(r"\r\n|\r|\n", text)
    if numbers := [str(number) for number, line in enumerate(lines, 1) if line.rstrip().endswith('"""')]:
        reasons.append(f'has a line that ends in """ (line {", ".join(numbers)})')
    lost = dict.fromkeys(char for char in text if not char.isprintable() and char not in "\r\n\t")
    if named := ", ".join(f"U+{ord(char):04X} {unicodedata.name(char, 'control character').lower()}" for char in lost):
        reasons.append(f"has characters that would vanish: {named}")
    return " and ".join(reasons)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:60]}… ({len(text)} characters)"
