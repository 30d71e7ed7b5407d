"""Rows whose marks of reasoning do not fit each other: closed twice, closed without being opened, or opened after the prompt has closed them."""

from __future__ import annotations

from olpack.data.render import Renderer, pieces
from olpack.data.rows import TokenRow

REASONING_MARKS = (
    ("<think>", "</think>"),
    ("<thinking>", "</thinking>"),
    ("<thought>", "</thought>"),
    ("<reasoning>", "</reasoning>"),
    ("[THINK]", "[/THINK]"),
    ("<seed:think>", "</seed:think>"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<|channel>thought", "<channel|>"),
)
"""Between which marks published chat templates have a model reason."""


def stray_mark(row: TokenRow, renderer: Renderer) -> str:
    """A sentence about the first answer whose marks do not fit, "" where all do.

    Args:
        row: as `renderer` made it.
        renderer: with the tokenizer.
    """
    marks = [(begin, end) for begin, end in REASONING_MARKS if end in row.text]
    if not marks:
        return ""
    before = ""
    for text, is_target, _ in pieces(row, renderer, by_kind=False):
        for begin, end in marks if is_target else ():
            opened = before.rstrip()
            if text.count(end) > text.count(begin) + opened.endswith(begin):
                return f"Its target tokens contain {end} more often than reasoning is opened."
            if opened.endswith(end) and text.lstrip().startswith(begin):
                return f"The generation prompt ends with {end}, and the answer opens reasoning behind it."
        before = text
    return ""
