"""Text of others made fit to be shown: without what acts on a terminal, and without secrets of the environment.

`visible` goes over everything that is printed: a server's texts, a model's answers, rows of data, paths, errors.
"""

from __future__ import annotations

import os
import re
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

HIDDEN = "***"

# Escape sequences go as a whole, so that no rest of them is read as text; both lengths are bounded, so that the search takes linear time.
_SEQUENCES = re.compile(
    r"(?:\x1b\[|\x9b)[0-?]{0,64}[ -/]{0,8}[@-~]"  # CSI: colours, movements of the cursor
    r"|(?:\x1b[\]PX^_]|[\x90\x98\x9d\x9e\x9f])[^\x00-\x08\x0a-\x1f\x7f-\x9f]{0,1000}(?:\x07|\x1b\\|\x9c)"  # OSC and its like: titles, links
    r"|\x1b[ -/]{0,8}[0-~]"
)
# Control codes but for tab and line feed, and the two marks that show text in another order than its letters have. Marks of right-to-left text stay.
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202d\u202e]")
_SURROGATES = re.compile(r"[\ud800-\udfff]")

_USER_INFO = re.compile(r"(?<=://)[^\s/?#@'\"<>]{1,1000}@")
_SECRET_NAMES = re.compile(r"(TOKEN|KEY|SECRET|PASSWORD|PASSWD|PASSPHRASE|CREDENTIALS?)$", re.IGNORECASE)
_SHORTEST = 6  # characters of a secret: a shorter one would be found in ordinary text


def visible(text: str) -> str:
    """A text without escape sequences and control characters. Tabs, line breaks and right-to-left text stay; a lone surrogate, which cannot be
    written, becomes U+FFFD.
    """
    if text.isascii() and text.isprintable():
        return text
    text = _SEQUENCES.sub("", text.replace("\r\n", "\n"))
    return _SURROGATES.sub("\ufffd", _CONTROLS.sub("", text))


def redacted(text: str) -> str:
    """A text without the user information of URLs, and without the secrets of the environment: values of variables such as HF_TOKEN and
    OLLAMA_API_KEY, passwords of proxies.
    """
    text = _USER_INFO.sub(f"{HIDDEN}@", text)
    for secret in _secrets():
        text = text.replace(secret, HIDDEN)
    return text


def _secrets() -> list[str]:
    found: set[str] = set()
    for name, value in os.environ.items():
        if _SECRET_NAMES.search(name):
            found.add(value.strip())
        elif "@" in value and (name.upper() == "OLLAMA_HOST" or "://" in value):
            for url in value.split():
                user_info = url.partition("://")[2].rpartition("@")[0] or url.rpartition("@")[0]
                found |= {user_info, user_info.partition(":")[2]}
    return sorted((secret for secret in found if len(secret) >= _SHORTEST), key=len, reverse=True)


@cache
def _console_class() -> type[Console]:
    from rich.console import Console, RenderableType
    from rich.segment import Segment

    class VisibleConsole(Console):
        """A console that prints foreign text as `visible` makes it. Its own colours are styles and not text, so they stay."""

        def render(self, renderable: RenderableType, options: Any = None) -> Any:
            for segment in super().render(renderable, options):
                yield segment if segment.control else Segment(visible(segment.text), segment.style)

    return VisibleConsole


def console(**options: Any) -> Console:
    """A rich console for stdout or, with `stderr=True`, for stderr, on which nothing reads as markup and nothing acts on the terminal.

    Args:
        options: those of `rich.console.Console`.
    """
    return _console_class()(markup=False, emoji=False, **options)
