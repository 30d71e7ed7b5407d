"""Model names by the server's own rules: `[host/][namespace/]model[:tag]`.

Each part has 1 to 80 characters (a host up to 350), begins with a letter, a digit or `_`, and goes on with letters, digits, `_`, `-` and
`.`; a namespace has no `.`, a host may have a `:` before its port. Letters are ASCII. Names are stored as written and matched without
regard to case.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass

from olpack.errors import OlpackError

DEFAULT_HOST, DEFAULT_NAMESPACE, DEFAULT_TAG = "registry.ollama.ai", "library", "latest"
_LONGEST = {"host": 350, "namespace": 80, "model": 80, "tag": 80}
_EXTRA = {"host": "_-.:", "namespace": "_-", "model": "_-.", "tag": "_-."}


@dataclass(frozen=True)
class Name:
    """A full model name, what was left out filled in."""

    host: str
    namespace: str
    model: str
    tag: str


def parse_name(name: str) -> Name:
    """Split a name the way the server does. Nothing is checked here: see `check_name`."""
    head, colon, tag = name.rpartition(":")
    if not colon or "/" in tag:
        head, tag = name, DEFAULT_TAG
    *before, model = head.split("/")
    namespace = before.pop() if before else DEFAULT_NAMESPACE
    host = "/".join(before) if before else DEFAULT_HOST
    return Name(host, namespace, model, tag)


def check_name(name: str, *, tagged: bool = True) -> None:
    """Refuse a name that the server would refuse.

    Args:
        name: `[host/][namespace/]model[:tag]`.
        tagged: False for the name of a package, whose tags are its quants.

    Raises:
        OlpackError: naming the rule that is broken and a legal name near it.
    """
    if not tagged and ":" in name.rpartition("/")[2]:
        raise OlpackError(
            f"The package name {name!r} has a tag.",
            f"Leave the tag out, as in {_legal(name).rpartition(':')[0]!r}: each quant becomes one.",
        )
    parsed = parse_name(name)
    for kind in _LONGEST:
        if broken := _broken_rule(kind, getattr(parsed, kind)):
            raise OlpackError(f"Ollama would refuse the name {name!r}: {broken}.", f"A legal name near it: {_legal(name)!r}.")


def _broken_rule(kind: str, part: str) -> str | None:
    if not part:
        return f"its {kind} is empty"
    if len(part) > _LONGEST[kind]:
        return f"its {kind} has {len(part)} characters, {_LONGEST[kind]} are allowed"
    if not re.match(r"[A-Za-z0-9_]", part):
        return f"its {kind} begins with {part[0]!r}, and must begin with one of A-Z, a-z, 0-9 and '_'"
    if wrong := re.search(rf"[^A-Za-z0-9{re.escape(_EXTRA[kind])}]", part):
        return f"its {kind} has {wrong.group()!r} in it, and only A-Z, a-z, 0-9 and {' '.join(_EXTRA[kind])} are allowed"
    return None


def _legal(name: str) -> str:
    """The nearest name that follows the rules: accents dropped, anything else that is not allowed made a `-`."""
    head, colon, tag = name.rpartition(":")
    if not colon or "/" in tag:
        head, tag = name, ""
    parts = head.split("/")[-3:]
    kinds = ("host", "namespace", "model")[-len(parts) :]
    legal = "/".join(filter(None, (_legal_part(kind, part) for kind, part in zip(kinds, parts, strict=True))))
    legal = legal or "my-assistant"
    return f"{legal}:{_legal_part('tag', tag)}" if tag and _legal_part("tag", tag) else legal


def _legal_part(kind: str, part: str) -> str:
    plain = unicodedata.normalize("NFKD", part).encode("ascii", "ignore").decode()
    plain = re.sub(rf"[^A-Za-z0-9{re.escape(_EXTRA[kind])}]+", "-", plain)
    return plain.lstrip("-.:").rstrip("-")[: _LONGEST[kind]]


def canonical(name: str) -> str:
    """The name in full and in lower case: two names are the same model where these are equal."""
    parsed = parse_name(name)
    return f"{parsed.host}/{parsed.namespace}/{parsed.model}:{parsed.tag}".lower()


def same(a: str, b: str) -> bool:
    """Whether the server takes both names for one model: `coder`, `library/Coder:LATEST` and `coder:latest` are one."""
    return canonical(a) == canonical(b)
