"""Chat templates that write the time: `strftime_now`, which transformers and llama.cpp give them.

Rows are rendered at one moment, which is recorded with the training. A server writes its own time, so its prompts differ from the trained ones
in that, and must differ in nothing else.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace

_FUNCTION = "strftime_now"

# What stands for a date in a marked text: characters for private use, around the format that was asked for.
_BEGIN, _END = "\ue0f0", "\ue0f1"
_DIGITS = {
    "d": r"\d\d",
    "m": r"\d\d",
    "y": r"\d\d",
    "Y": r"\d{4}",
    "H": r"\d\d",
    "I": r"\d\d",
    "M": r"\d\d",
    "S": r"\d\d",
    "j": r"\d{3}",
    "f": r"\d{6}",
}
_WORDS = "aAbBp"
_OF_THE_DAY = "HIMSfpXcTRsr"


def is_dated(chat_template: object) -> bool:
    """Whether a chat template asks for the time."""
    return _FUNCTION in str(chat_template)


@contextmanager
def written_by(strftime: Callable[[str], str] | None) -> Iterator[None]:
    """Within it, `apply_chat_template` writes what `strftime` makes of a format; None: the time of the rendering.

    transformers takes only plain data as template variables, so the clock that its `strftime_now` reads is another one meanwhile.
    """
    if strftime is None:
        yield
        return
    from transformers.utils import chat_template_utils

    names = vars(chat_template_utils)
    before = names["datetime"]
    names["datetime"] = SimpleNamespace(now=lambda: SimpleNamespace(strftime=strftime))
    try:
        yield
    finally:
        names["datetime"] = before


def mark(form: str) -> str:
    """What stands in place of a date of that format, to be compared by `same_but_for_dates`."""
    return f"{_BEGIN}{form}{_END}"


def same_but_for_dates(text: str, served: str) -> bool:
    """Whether `served` is the marked `text` with some date at each mark."""
    parts = re.split(f"{_BEGIN}(.*?){_END}", text, flags=re.DOTALL)
    pattern = "".join(_pattern(part) if number % 2 else re.escape(part) for number, part in enumerate(parts))
    return len(parts) > 1 and re.fullmatch(pattern, served, re.DOTALL) is not None


def times_of_day(text: str) -> bool:
    """Whether a mark of the text asks for more than the day, so that two renderings in a row can differ."""
    return any(set(_OF_THE_DAY).intersection(re.findall(r"%-?(\w)", form)) for form in re.findall(f"{_BEGIN}(.*?){_END}", text, re.DOTALL))


def _pattern(form: str) -> str:
    patterns = []
    for part in re.split(r"(%-?\w)", form):
        if not re.fullmatch(r"%-?\w", part):
            patterns.append(re.escape(part))
        elif part[-1] in _DIGITS:
            patterns.append(r"\d{1,6}" if part[1] == "-" else _DIGITS[part[-1]])
        else:
            patterns.append(r"[^\W\d_]+\.?" if part[-1] in _WORDS else r"[^\n]+?")
    return "".join(patterns)
