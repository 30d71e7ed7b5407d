"""Text of others made fit to be shown: without what acts on a terminal, and without secrets of the environment.

`echo`, `console` and olpack.progress print through `visible`: a server's texts, a model's answers, rows of data, paths, errors.
"""

from __future__ import annotations

import json
import logging
import os
import re
import sys
import threading
import traceback
import warnings
from contextlib import suppress
from functools import cache
from types import TracebackType
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

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
_UNSAFE_IN_JSON = re.compile(r"[\x7f-\x9f\u202d\u202e\ud800-\udfff]")
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
    own = {match.removesuffix("@") for match in _USER_INFO.findall(text)}  # a text may repeat it without its URL
    text = _USER_INFO.sub(f"{HIDDEN}@", text)
    for secret in [*(secret for secret in own if len(secret) >= _SHORTEST), *_secrets()]:
        text = text.replace(secret, HIDDEN)
    return text


def _secrets() -> list[str]:
    found: set[str] = set()
    for name, value in os.environ.items():
        if _SECRET_NAMES.search(name):
            found.add(value.strip())
        else:
            url = value if "://" in value or name != "OLLAMA_HOST" else f"http://{value}"
            for match in _USER_INFO.findall(url):
                user_info = match.removesuffix("@")
                found |= {user_info, user_info.partition(":")[2], unquote(user_info.partition(":")[2])}
    return sorted((secret for secret in found if len(secret) >= _SHORTEST), key=len, reverse=True)


def redact_libraries() -> None:
    """Have what libraries print by Python's own means go through `redacted` and `visible`, too: log records with their tracebacks, warnings, and
    exceptions that nothing catches.
    """
    make, form = logging.getLogRecordFactory(), warnings.formatwarning
    if make.__module__ == __name__:  # it was done before
        return

    def record(*arguments: Any, **fields: Any) -> logging.LogRecord:
        made = make(*arguments, **fields)
        with suppress(TypeError, ValueError):  # a message that does not fit its arguments: logging reports that itself
            made.msg, made.args = _fit(made.getMessage()), ()
        if made.exc_info:
            made.exc_text, made.exc_info = _fit("".join(traceback.format_exception(*made.exc_info)).rstrip("\n")), None
        if made.stack_info:
            made.stack_info = _fit(made.stack_info)
        return made

    def of_thread(failed: threading.ExceptHookArgs) -> None:
        if failed.exc_type is not SystemExit:
            uncaught(failed.exc_type, failed.exc_value, failed.exc_traceback)

    def uncaught(kind: type[BaseException], error: BaseException | None, trace: TracebackType | None) -> None:
        echo(redacted("".join(traceback.format_exception(kind, error, trace))), end="", err=True)

    logging.setLogRecordFactory(record)
    warnings.formatwarning = lambda *arguments, **fields: _fit(form(*arguments, **fields))
    sys.excepthook, threading.excepthook = uncaught, of_thread
    sys.unraisablehook = lambda failed: uncaught(failed.exc_type, failed.exc_value, failed.exc_traceback)


def _fit(text: str) -> str:
    return visible(redacted(text))


def echo(text: str, end: str = "\n", *, err: bool = False) -> None:
    """Print a text, with what is foreign in it made `visible`, to stdout or stderr."""
    print(visible(text), end=end, file=sys.stderr if err else sys.stdout, flush=True)


def json_text(value: object, indent: int | None = None) -> str:
    """A value as JSON for stdout or a log: what acts on a terminal is escaped, so nothing of the value is lost."""
    text = json.dumps(value, indent=indent, ensure_ascii=False)  # which escapes the control codes before the space
    return _UNSAFE_IN_JSON.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


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
